//! A program of which one instance runs at a time.
//!
//! Start it, and start it again in a second terminal while it works:
//! ```text
//! cargo run --example single_instance -- 30s
//! ```
//! The second start names the running process, and exits with 75 immediately. Kill the first with
//! `kill -9`: the next start succeeds immediately, and reports that the last owner died.

use std::io::{self, Write};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

#[lockkit::single_instance("lockkit-example")]
fn main() -> ExitCode {
    match time_to_work().and_then(work) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("single_instance: {problem}");
            ExitCode::from(2)
        }
    }
}

fn work(time: Duration) -> Result<(), String> {
    print_line(&format!(
        "pid {} holds the name; working for {}",
        std::process::id(),
        humantime::format_duration(time)
    ))?;
    thread::sleep(time);
    print_line("done")
}

/// Parses the first argument, such as `30s`.
fn time_to_work() -> Result<Duration, String> {
    match std::env::args().nth(1) {
        None => Ok(Duration::from_secs(5)),
        Some(time) => humantime::parse_duration(&time).map_err(|error| {
            format!("invalid time to work {time:?}: {error}; use a time such as \"5s\" or \"2m\"")
        }),
    }
}

/// Prints a line immediately, also into a pipe.
fn print_line(line: &str) -> Result<(), String> {
    let mut out = io::stdout();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .map_err(|error| format!("cannot write: {error}"))
}
