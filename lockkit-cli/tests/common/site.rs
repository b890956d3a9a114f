//! A directory in which a test runs lockkit, and the programs that a test runs there.

use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant, SystemTime};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use super::{PROGRAM, form, left_out};

/// A user without any rights to the files of these tests.
pub(crate) const OTHER: u32 = 1_900_003;

/// A directory in which a test runs lockkit. Other users can reach it.
pub(crate) struct Site(TempDir);

impl Site {
    pub(crate) fn new() -> Self {
        let directory = TempDir::new_in("/tmp").expect("a directory");
        fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).expect("a directory");
        Self(directory)
    }

    pub(crate) fn directory(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        fs::write(self.path(name), content).expect("a file");
        self.path(name)
    }

    /// As [`write`](Self::write), with a modification time one hour ago.
    pub(crate) fn write_old(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.write(name, content);
        let hour_ago = SystemTime::now() - Duration::from_secs(3600);
        File::options()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_modified(hour_ago))
            .expect("a file");
        path
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command
            .args(arguments)
            .current_dir(self.0.path())
            .stdin(Stdio::null())
            .env_remove("NO_COLOR");
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Ended {
        Ended::of(&mut self.command(arguments))
    }

    /// As [`run`](Self::run), as another user. Returns `None`, and prints the reason, if that is
    /// impossible.
    pub(crate) fn run_as_other(&self, arguments: &[&str]) -> Option<Ended> {
        if !rustix::process::geteuid().is_root() {
            left_out("only root can act as another user");
            return None;
        }
        let id = OTHER.to_string();
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid", &id, "--regid", &id, "--clear-groups", PROGRAM])
            .args(arguments);
        command.current_dir(self.0.path()).stdin(Stdio::null());
        let ended = Ended::of(&mut command);
        if ended.code == 126 || ended.code == 127 {
            left_out("another user cannot run what was built here");
            return None;
        }
        Some(ended)
    }

    /// Starts `lockkit run` with these options, whose program prints `held` and keeps running.
    pub(crate) fn hold(&self, options: &[&str]) -> Program {
        let mut command = self.command(&["run"]);
        command
            .args(options)
            .args(["--", "sh", "-c", "echo held; exec sleep 60"]);
        let mut running = Program::start(command);
        assert_eq!(running.line(), "held", "{options:?}");
        running
    }
}

/// The result of an ended command.
pub(crate) struct Ended {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ended {
    pub(crate) fn of(command: &mut Command) -> Self {
        let Output {
            status,
            stdout,
            stderr,
        } = command.output().expect("it starts");
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self {
            code: status.code().unwrap_or(-1),
            out: text(stdout),
            err: text(stderr),
        }
    }

    /// Parses the output, which must match the schema.
    pub(crate) fn json(&self) -> Value {
        form(self.out.as_bytes())
    }
}

impl std::fmt::Debug for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "exit {}: {:?}, {:?}", self.code, self.out, self.err)
    }
}

/// A program that ends with the test, by a signal that lockkit forwards. A killed lockkit would
/// leave its lock to its program.
pub(crate) struct Program {
    pub(crate) child: Child,
    pub(crate) lines: BufReader<ChildStdout>,
}

impl Program {
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().expect("it starts");
        let lines = BufReader::new(child.stdout.take().expect("a pipe"));
        Self { child, lines }
    }

    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("a line");
        line.trim_end().to_owned()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid())
            .ok()
            .and_then(Pid::from_raw)
            .expect("a pid");
        kill_process(pid, signal).expect("it runs");
    }

    pub(crate) fn code(&mut self) -> i32 {
        self.child.wait().expect("a child").code().unwrap_or(-1)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let begun = Instant::now();
        while self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            match begun.elapsed() < Duration::from_secs(5) {
                true => self.signal(Signal::TERM),
                false => drop(self.child.kill()),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

pub(crate) fn sleeper() -> Program {
    let mut command = Command::new("sh");
    command.args(["-c", "echo ready; exec sleep 60"]);
    let mut running = Program::start(command);
    assert_eq!(running.line(), "ready");
    running
}

/// Returns the pid of a process that has ended.
pub(crate) fn dead() -> u32 {
    let mut child = Command::new("true").spawn().expect("it starts");
    child.wait().expect("a child");
    child.id()
}
