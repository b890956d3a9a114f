//! Tests the example from a user's view: files handed over from another directory, and a first
//! instance that hangs, dies and closes.

#![cfg(target_os = "linux")]

mod common;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::example;
use rustix::process::{Pid, Signal, kill_process};

/// A first instance. It is killed and reaped when dropped, so that a failed test leaves nothing
/// behind.
struct First {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl First {
    fn start(file: &str) -> Self {
        let mut command = Command::new(example("activate"));
        command
            .arg(file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Self { child, out }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn expect(&mut self, line: &str) {
        assert_eq!(self.line(), line);
    }

    /// Stops all its threads. A thread continues for a moment after the signal.
    fn stop(&self) {
        self.signal(Signal::STOP);
        let start = Instant::now();
        let is_stopped = |task: std::fs::DirEntry| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit(") ")
                .next()
                .is_some_and(|state| state.starts_with('T'))
        };
        while !std::fs::read_dir(format!("/proc/{}/task", self.child.id()))
            .unwrap()
            .flatten()
            .all(is_stopped)
        {
            assert!(
                start.elapsed() < Duration::from_secs(30),
                "the first instance does not stop"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for First {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn second(directory: &Path, files: &[&str]) -> Output {
    Command::new(example("activate"))
        .args(files)
        .current_dir(directory)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// This is one test, because the example has one name.
#[test]
fn activate_example_survives_hang_death_and_close_of_first() {
    // A failed run may have left the record of an instance that it killed, which this start reads
    // and clears.
    second(Path::new("/"), &[]);
    let mut first = First::start("/a");
    first.expect("open /a");
    first.expect(&format!("pid {} is the first instance", first.child.id()));

    let answered = second(
        Path::new("/usr"),
        &["b", "with space", "/c", "1", "2", "3", "4", "5", "6", "7"],
    );
    assert!(answered.status.success());
    assert_eq!(answered.stdout, b"the first instance says: 11 open\n");
    for file in ["/usr/b", "/usr/with space", "/c", "/usr/1"] {
        first.expect(&format!("open {file}"));
    }
    (2..=7).for_each(|file| first.expect(&format!("open /usr/{file}")));

    first.stop();
    let timed_out = second(Path::new("/"), &["d"]);
    assert_eq!(timed_out.status.code(), Some(75));
    let said = String::from_utf8(timed_out.stderr).unwrap();
    let expected =
        "activate: the first instance of \"lockkit-example-activate\" did not answer within ";
    assert!(said.starts_with(expected), "{said}");
    first.signal(Signal::CONT);
    assert_eq!(
        second(Path::new("/"), &["e"]).stdout,
        b"the first instance says: 12 open\n"
    );
    first.expect("open /e");

    let died = first.child.id();
    first.child.kill().unwrap();
    let mut next = First::start("/f");
    assert!(next.line().starts_with(&format!(
        "the last first instance died: pid {died} (activate), since "
    )));
    next.expect("open /f");
    next.expect(&format!("pid {} is the first instance", next.child.id()));
    drop(next.child.stdin.take());
    next.expect("closed");
    assert!(next.child.wait().unwrap().success());

    let alone = second(Path::new("/"), &[]);
    assert!(
        String::from_utf8(alone.stdout)
            .unwrap()
            .ends_with("is the first instance\nclosed\n")
    );
}
