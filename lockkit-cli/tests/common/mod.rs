//! What the tests of the command share. They use the command as people and scripts do: with real
//! processes, real signals and real terminals.

// Each file of tests uses a part of it.
#![allow(dead_code)]

mod site;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use jsonschema::Validator;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

#[allow(unused_imports)]
pub(crate) use site::{Ended, Program, Site, dead, sleeper};

/// The time limit for anything that must happen: far more than it needs, because machines can be
/// slow.
pub(crate) const LIVELY: Duration = Duration::from_secs(30);

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_lockkit");

pub(crate) fn until(what: &str, mut fact: impl FnMut() -> bool) {
    let start = Instant::now();
    while !fact() {
        assert!(start.elapsed() < LIVELY, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Reports that the test on this thread is left out, and why, even when the test runner captures
/// the output of passing tests.
pub(crate) fn left_out(why: &str) {
    let thread = std::thread::current();
    // A closed standard error has no reader.
    let _ = writeln!(
        std::io::stderr(),
        "left out: {}: {why}",
        thread.name().unwrap_or_default()
    );
}

pub(crate) fn lockkit<const N: usize>(arguments: [&str; N]) -> Command {
    let mut command = Command::new(PROGRAM);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .env_remove("NO_COLOR");
    command
}

pub(crate) fn output<const N: usize>(arguments: [&str; N]) -> Output {
    lockkit(arguments).output().expect("lockkit starts")
}

pub(crate) fn code<const N: usize>(arguments: [&str; N]) -> i32 {
    code_of(&output(arguments))
}

pub(crate) fn code_of(output: &Output) -> i32 {
    output.status.code().unwrap_or_else(|| panic!("{output:?}"))
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Parses the output as [`form`] does.
pub(crate) fn json(output: &Output) -> Value {
    form(&output.stdout)
}

/// Parses a JSON form, which must match the schema and contain no other fields.
pub(crate) fn form(bytes: &[u8]) -> Value {
    static SCHEMA: LazyLock<Validator> = LazyLock::new(|| {
        let mut schema: Value = serde_json::from_str(FORMS).expect("JSON");
        close(&mut schema);
        jsonschema::validator_for(&schema).expect("a schema")
    });
    let form =
        serde_json::from_slice(bytes).unwrap_or_else(|error| panic!("{error}: {}", text(bytes)));
    let wrong: Vec<_> = SCHEMA
        .iter_errors(&form)
        .map(|error| error.to_string())
        .collect();
    assert!(wrong.is_empty(), "{wrong:?}: {form}");
    form
}

pub(crate) const FORMS: &str = include_str!("../../src/forms.schema.json");

/// Makes the schema reject fields that it does not define, so that every field is documented.
pub(crate) fn close(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            if fields.get("type") == Some(&"object".into()) && fields.contains_key("properties") {
                fields.insert("additionalProperties".to_owned(), false.into());
            }
            fields.values_mut().for_each(close);
        }
        Value::Array(values) => values.iter_mut().for_each(close),
        _ => {}
    }
}

pub(crate) fn fresh_name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!(
        "cli-{}-{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    )
}

pub(crate) fn signal(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .expect("a pid");
    let _ = kill_process(pid, signal);
}

/// Returns whether a process runs and is not a zombie.
pub(crate) fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')')
        .next()
        .is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with(['Z', 'X']))
}

/// A lock as arguments of `run` and of `status`.
pub(crate) struct Lock {
    pub(crate) run: [String; 2],
    pub(crate) place: String,
    /// The directory of its file, kept for as long as the file is needed.
    pub(crate) directory: TempDir,
}

/// Removes the record that a named lock leaves for its next holder.
impl Drop for Lock {
    fn drop(&mut self) {
        let uid = rustix::process::geteuid().as_raw();
        let _ = fs::remove_file(format!("/dev/shm/lockkit-u{uid}/{}.record", self.place));
    }
}

pub(crate) const KINDS: [&str; 4] = ["--name", "--file", "--pidfile", "--lease"];

impl Lock {
    pub(crate) fn new(kind: &str) -> Self {
        let directory = TempDir::new().expect("a directory");
        let place = match kind {
            "--name" => fresh_name(),
            _ => directory.path().join("lock").display().to_string(),
        };
        Self {
            run: [kind.to_owned(), place.clone()],
            place,
            directory,
        }
    }

    /// Returns the command that runs `script` under it.
    pub(crate) fn run<const N: usize>(&self, options: [&str; N], script: &str) -> Command {
        let mut command = lockkit(["run"]);
        command
            .args(&self.run)
            .args(options)
            .args(["--", "sh", "-c", script]);
        command
    }

    /// Holds it with a program that keeps running. Also returns the program's pid.
    pub(crate) fn hold<const N: usize>(&self, options: [&str; N]) -> (Running, u32) {
        let mut running = Running::start(self.run(options, "echo $$; exec sleep 60"));
        let pid = running.line().parse().expect("a pid");
        (running, pid)
    }

    pub(crate) fn status(&self) -> i32 {
        code(["status", &self.place])
    }

    pub(crate) fn try_once(&self) -> i32 {
        code_of(
            &self
                .run(["--try"], "true")
                .output()
                .expect("lockkit starts"),
        )
    }
}

/// A program that is killed at the end of the test.
pub(crate) struct Running {
    pub(crate) child: Child,
    pub(crate) lines: Option<BufReader<std::process::ChildStdout>>,
}

impl Running {
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().expect("it starts");
        let lines = child.stdout.take().map(BufReader::new);
        Self { child, lines }
    }

    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines
            .as_mut()
            .expect("a pipe")
            .read_line(&mut line)
            .expect("a line");
        line.trim_end().to_owned()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn code(&mut self) -> i32 {
        let status = self.child.wait().expect("a child");
        status
            .code()
            .unwrap_or_else(|| -status.signal().expect("it was killed"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A program that outlives its parent. It is killed at the end of the test.
pub(crate) struct Orphan(pub(crate) u32);

impl Drop for Orphan {
    fn drop(&mut self) {
        signal(self.0, Signal::KILL);
    }
}

/// Opens a pseudo-terminal with so many columns. Returns the program's end, and the screen.
pub(crate) fn terminal(columns: u16) -> (OwnedFd, File) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let screen =
        openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a terminal");
    grantpt(&screen).expect("a terminal");
    unlockpt(&screen).expect("a terminal");
    let name = ptsname(&screen, Vec::new())
        .expect("a name")
        .into_string()
        .expect("a plain name");
    let end = File::options()
        .read(true)
        .write(true)
        .open(name)
        .expect("a terminal");
    let size = rustix::termios::Winsize {
        ws_row: 24,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(&end, size).expect("a terminal");
    (end.into(), screen.into())
}

/// Reads the screen until `fact` holds for all of the text.
pub(crate) fn read_until(screen: &mut File, fact: impl Fn(&str) -> bool) -> String {
    let begun = Instant::now();
    let mut shown = Vec::new();
    let mut more = [0; 1024];
    while !fact(&text(&shown)) {
        assert!(begun.elapsed() < LIVELY, "{}", text(&shown));
        let mut watched = [rustix::event::PollFd::new(
            &*screen,
            rustix::event::PollFlags::IN,
        )];
        let tick = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 50_000_000,
        };
        if rustix::event::poll(&mut watched, Some(&tick)).is_ok_and(|ready| ready > 0) {
            let read = screen.read(&mut more).unwrap_or_default();
            shown.extend_from_slice(&more[..read]);
        }
    }
    text(&shown)
}

/// Returns `command` with default actions for the signals that a shell makes its background jobs
/// ignore. This test may be such a job. A shell cannot trap a signal that is ignored from the
/// start.
pub(crate) fn with_usual_signals(command: &Command) -> Command {
    let mut usual = Command::new("env");
    usual
        .arg("--default-signal")
        .arg(command.get_program())
        .args(command.get_args());
    usual.stdin(Stdio::null());
    usual
}

/// Creates a directory with a pidfile of a live process, a pidfile of an ended process, and another
/// file.
pub(crate) fn pidfiles() -> (TempDir, [PathBuf; 3]) {
    let directory = TempDir::new().expect("a directory");
    let paths = ["alive.pid", "dead.pid", "notes.txt"].map(|name| directory.path().join(name));
    let mut ended = Command::new("true").spawn().expect("it starts");
    ended.wait().expect("a child");
    fs::write(&paths[0], format!("{}\n", std::process::id())).expect("a file");
    fs::write(&paths[1], format!("{}\n", ended.id())).expect("a file");
    fs::write(&paths[2], "4194305\n").expect("a file");
    (directory, paths)
}
