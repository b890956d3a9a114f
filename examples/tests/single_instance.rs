//! Tests the example from a user's view: started once, started twice, killed, started with an
//! invalid argument.

mod common;

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::example;

/// The time limit on a busy machine for a program that does not wait.
const MAX_START_TIME: Duration = Duration::from_secs(5);

/// A running example. It is killed and reaped when dropped, so that a failed test leaves nothing
/// behind.
struct Running {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Running {
    /// Starts an example that works for `time`, and waits until it reports that it holds the name.
    fn start(time: &str) -> Self {
        let mut child = Command::new(example("single_instance"))
            .arg(time)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let mut running = Self { child, out };
        let line = running.line();
        let holds = format!("pid {} holds the name", running.child.id());
        assert!(
            line.starts_with(&holds),
            "{line:?}; is another instance running?"
        );
        running
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line
    }

    /// Sends SIGKILL, and waits for the end. Returns the pid.
    fn kill(mut self) -> u32 {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child.id()
    }

    /// Waits for the end, and returns the output on standard error.
    fn finish(mut self) -> String {
        assert_eq!(self.line(), "done\n");
        assert!(self.child.wait().unwrap().success());
        std::io::read_to_string(self.child.stderr.take().unwrap()).unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // The process may have ended by now.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

/// This is one test, because the example has one name.
#[test]
fn single_instance_example_runs_once_and_restarts_after_kill() {
    single_instance_second_start_names_holder_and_exits_75();
    single_instance_start_after_kill_reports_dead_holder();
    single_instance_start_after_release_reports_nothing();
    single_instance_invalid_argument_gets_clear_error();
}

fn single_instance_second_start_names_holder_and_exits_75() {
    let first = Running::start("1m");
    let start = Instant::now();
    let second = Command::new(example("single_instance")).output().unwrap();
    assert!(start.elapsed() < MAX_START_TIME, "{:?}", start.elapsed());
    assert_eq!(second.status.code(), Some(75));
    assert_eq!(second.stdout, b"");
    let said = stderr(&second);
    assert!(
        said.starts_with("lockkit-example is already running: pid "),
        "{said:?}"
    );
    assert!(
        said.contains(&format!(
            "pid {} (single_instance), since 2",
            first.child.id()
        )),
        "{said:?}"
    );
    assert!(said.ends_with(" ago)\n"), "{said:?}");
    assert_eq!(said.lines().count(), 1, "{said:?}");
    first.kill();
}

fn single_instance_start_after_kill_reports_dead_holder() {
    let killed = Running::start("1m").kill();
    let start = Instant::now();
    let next = Running::start("1ms");
    assert!(start.elapsed() < MAX_START_TIME, "{:?}", start.elapsed());
    let said = next.finish();
    let died = format!(
        "lockkit-example: the last owner died without releasing it: pid {killed} (single_instance)"
    );
    assert!(said.starts_with(&died), "{said:?}");
    assert_eq!(said.lines().count(), 1, "{said:?}");
}

fn single_instance_start_after_release_reports_nothing() {
    Running::start("0s").finish();
    assert_eq!(Running::start("0s").finish(), "");
}

fn single_instance_invalid_argument_gets_clear_error() {
    let output = Command::new(example("single_instance"))
        .arg("soon")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).contains("invalid time to work \"soon\""),
        "{}",
        stderr(&output)
    );
}
