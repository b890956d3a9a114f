//! A program whose second start hands its files over to the first instance, as editors and viewers
//! do.
//!
//! Start it, and start it again in another directory of a second terminal, with files:
//! ```text
//! cargo run --example activate -- README.md
//! cd /tmp && /path/to/activate notes.txt "with spaces"
//! ```
//! The first instance opens the files relative to the second's directory, and returns the number of
//! open files. The second prints this number and exits with success. Kill the first with `kill -9`
//! or stop it with Ctrl-Z, and start the program again: a dead instance is replaced, and an
//! instance that hangs costs the second two seconds. Press Ctrl-D to close the first.

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lockkit::instance::{Activation, Instance, Outcome};
use lockkit::{FirstInstance, Wait};

/// The files that this program has open.
type Open = Arc<Mutex<Vec<PathBuf>>>;

fn main() -> ExitCode {
    match enter() {
        Ok(Some(first)) => work(&first),
        Ok(None) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("activate: {problem}");
            ExitCode::from(75)
        }
    }
}

/// Becomes the first instance, or sends it the files to open. In the second case nothing is left to
/// do.
fn enter() -> lockkit::Result<Option<FirstInstance>> {
    match Instance::enter("lockkit-example-activate")? {
        Instance::First(first) => Ok(Some(first)),
        Instance::Second(second) => {
            let second = second.variables(["XDG_ACTIVATION_TOKEN", "DESKTOP_STARTUP_ID"]);
            match second.activate(&Wait::at_most(Duration::from_secs(2)))? {
                Outcome::Answered(answer) => {
                    print_line(&format!(
                        "the first instance says: {}",
                        String::from_utf8_lossy(&answer)
                    ));
                    Ok(None)
                }
                Outcome::BecameFirst(first) => Ok(Some(first)),
            }
        }
    }
}

/// Does the program's work: here, it keeps files open until its input ends.
fn work(first: &FirstInstance) -> ExitCode {
    if let Some(died) = first.recovered() {
        print_line(&format!("the last first instance died: {died}"));
    }
    let open = Open::default();
    let directory = std::env::current_dir().unwrap_or_default();
    add(
        &open,
        std::env::args_os().skip(1).map(|file| directory.join(file)),
    );
    let listening = first.on_activation({
        let open = open.clone();
        move |activation| handle(&open, activation)
    });
    if let Err(error) = listening {
        eprintln!("activate: {error}");
        return ExitCode::from(71);
    }
    print_line(&format!("pid {} is the first instance", std::process::id()));
    let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
    print_line("closed");
    ExitCode::SUCCESS
}

/// Opens the files of a second start.
fn handle(open: &Open, activation: Activation) {
    let files: Vec<&OsString> = activation.arguments().iter().skip(1).collect();
    let count = add(open, files.into_iter().map(|file| activation.resolve(file)));
    // A second start that has given up does not need the answer.
    let _ = activation.answer(format!("{count} open").as_bytes());
}

/// Opens files, and returns how many are open now.
fn add(open: &Open, files: impl Iterator<Item = PathBuf>) -> usize {
    let Ok(mut open) = open.lock() else { return 0 };
    for file in files {
        print_line(&format!("open {}", file.display()));
        open.push(file);
    }
    open.len()
}

/// Prints a line immediately, also into a pipe.
fn print_line(line: &str) {
    let mut out = std::io::stdout();
    // A closed output is no reason to stop.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}
