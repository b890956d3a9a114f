//! Tests of the command `lockkit`, used as people and scripts use it: real processes, real signals, a real terminal,
//! and the machine's own flock(1) for comparison.

#![cfg(target_os = "linux")]

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime};

use jsonschema::Validator;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// The time limit for anything that must happen: far more than it needs, because machines can be slow.
const LIVELY: Duration = Duration::from_secs(30);

const PROGRAM: &str = env!("CARGO_BIN_EXE_lockkit");

fn until(what: &str, mut fact: impl FnMut() -> bool) {
    let start = Instant::now();
    while !fact() {
        assert!(start.elapsed() < LIVELY, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Reports that the test on this thread is left out, and why, even when the test runner captures the output of passing
/// tests.
fn left_out(why: &str) {
    let thread = std::thread::current();
    // A closed standard error has no reader.
    let _ = writeln!(std::io::stderr(), "left out: {}: {why}", thread.name().unwrap_or_default());
}

fn lockkit<const N: usize>(arguments: [&str; N]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(arguments).stdin(Stdio::null()).env_remove("NO_COLOR");
    command
}

fn output<const N: usize>(arguments: [&str; N]) -> Output {
    lockkit(arguments).output().expect("lockkit starts")
}

fn code<const N: usize>(arguments: [&str; N]) -> i32 {
    code_of(&output(arguments))
}

fn code_of(output: &Output) -> i32 {
    output.status.code().unwrap_or_else(|| panic!("{output:?}"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Parses the output, which must match the schema and contain no other fields.
fn json(output: &Output) -> Value {
    static SCHEMA: LazyLock<Validator> = LazyLock::new(|| {
        let mut schema: Value = serde_json::from_str(FORMS).expect("JSON");
        close(&mut schema);
        jsonschema::validator_for(&schema).expect("a schema")
    });
    let form = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    let wrong: Vec<_> = SCHEMA.iter_errors(&form).map(|error| error.to_string()).collect();
    assert!(wrong.is_empty(), "{wrong:?}: {form}");
    form
}

const FORMS: &str = include_str!("../src/forms.schema.json");

/// Makes the schema reject fields that it does not define, so that every field is documented.
fn close(schema: &mut Value) {
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

fn fresh_name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("cli-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

fn signal(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a pid");
    let _ = kill_process(pid, signal);
}

/// Returns whether a process runs and is not a zombie.
fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with(['Z', 'X']))
}

/// A lock as arguments of `run` and of `status`.
struct Lock {
    run: [String; 2],
    place: String,
    /// The directory of its file, kept for as long as the file is needed.
    _directory: TempDir,
}

/// Removes the record that a named lock leaves for its next holder.
impl Drop for Lock {
    fn drop(&mut self) {
        let uid = rustix::process::geteuid().as_raw();
        let _ = fs::remove_file(format!("/dev/shm/lockkit-u{uid}/{}.record", self.place));
    }
}

const KINDS: [&str; 4] = ["--name", "--file", "--pidfile", "--lease"];

impl Lock {
    fn new(kind: &str) -> Self {
        let directory = TempDir::new().expect("a directory");
        let place = match kind {
            "--name" => fresh_name(),
            _ => directory.path().join("lock").display().to_string(),
        };
        Self { run: [kind.to_owned(), place.clone()], place, _directory: directory }
    }

    /// Returns the command that runs `script` under it.
    fn run<const N: usize>(&self, options: [&str; N], script: &str) -> Command {
        let mut command = lockkit(["run"]);
        command.args(&self.run).args(options).args(["--", "sh", "-c", script]);
        command
    }

    /// Holds it with a program that keeps running. Also returns the program's pid.
    fn hold<const N: usize>(&self, options: [&str; N]) -> (Running, u32) {
        let mut running = Running::start(self.run(options, "echo $$; exec sleep 60"));
        let pid = running.line().parse().expect("a pid");
        (running, pid)
    }

    fn status(&self) -> i32 {
        code(["status", &self.place])
    }

    fn try_once(&self) -> i32 {
        code_of(&self.run(["--try"], "true").output().expect("lockkit starts"))
    }
}

/// A program that is killed at the end of the test.
struct Running {
    child: Child,
    lines: Option<BufReader<std::process::ChildStdout>>,
}

impl Running {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().expect("it starts");
        let lines = child.stdout.take().map(BufReader::new);
        Self { child, lines }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.as_mut().expect("a pipe").read_line(&mut line).expect("a line");
        line.trim_end().to_owned()
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn code(&mut self) -> i32 {
        let status = self.child.wait().expect("a child");
        status.code().unwrap_or_else(|| -status.signal().expect("it was killed"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A program that outlives its parent. It is killed at the end of the test.
struct Orphan(u32);

impl Drop for Orphan {
    fn drop(&mut self) {
        signal(self.0, Signal::KILL);
    }
}

#[test]
fn run_ends_as_its_program_ends() {
    for kind in KINDS {
        let lock = Lock::new(kind);
        let run = |script| code_of(&lock.run([], script).output().expect("lockkit starts"));
        assert_eq!(run("exit 7"), 7, "{kind}");
        assert_eq!(run("kill -9 $$"), 128 + 9, "{kind}");
        assert_eq!(run("kill -TERM $$"), 128 + 15, "{kind}");
        assert_eq!(lock.status(), 0, "{kind}");
        let [option, place] = &lock.run;
        assert_eq!(code(["run", option, place, "--", "/no/such/program"]), 127, "{kind}");
        assert_eq!(code(["run", option, place, "--", "/etc/passwd"]), 126, "{kind}");
        assert_eq!(lock.try_once(), 0, "{kind}");
    }
}

#[test]
fn a_held_lock_ends_run_with_the_code_for_it() {
    for kind in KINDS {
        let lock = Lock::new(kind);
        let (running, pid) = lock.hold([]);
        let refused = lock.run(["--try"], "true").output().expect("lockkit starts");
        assert_eq!(code_of(&refused), 75, "{kind}");
        let said = text(&refused.stderr);
        assert!(said.contains("is held") && said.ends_with(".\n"), "{kind}: {said}");
        let waited = lock.run(["--timeout", "50ms"], "true").output().expect("lockkit starts");
        assert_eq!(code_of(&waited), 75, "{kind}");
        // The holder of a lease is lockkit's keeper; the holders of a file are lockkit and its keeper.
        let (holder, program) = match kind {
            "--lease" => (keeper(running.pid()), "lockkit"),
            "--file" => (running.pid(), "lockkit"),
            _ => (pid, "s"),
        };
        for said in [said, text(&waited.stderr)] {
            assert!(said.contains(&format!("by pid {holder} ({program}")), "{kind}: {said}");
        }
        let refused =
            lock.run(["--timeout", "50ms", "--exit-code", "3", "--quiet"], "true").output().expect("it starts");
        assert_eq!((code_of(&refused), text(&refused.stderr)), (3, String::new()), "{kind}");
        assert_eq!(lock.status(), 1, "{kind}");
    }
}

#[test]
fn nothing_panics_where_nothing_can_be_written() {
    let lock = Lock::new("--name");
    let (_running, _) = lock.hold([]);
    let full = || File::options().write(true).open("/dev/full").expect("a device");
    let file = lock._directory.path().join("file").display().to_string();
    let cases: [(&[&str], i32); 6] = [
        (&["list"], 74),
        (&["list", "--json"], 74),
        (&["run", "--try", "--name", &lock.place, "--", "true"], 75),
        (&["run", "--verbose", "--timeout", "300ms", "--name", &lock.place, "--", "true"], 75),
        (&["flock", "--verbose", &file, "true"], 1),
        (&["nonsense"], 64),
    ];
    for (arguments, code) in cases {
        let status = lockkit([]).args(arguments).stdout(full()).stderr(full()).status().expect("lockkit starts");
        assert_eq!(status.code(), Some(code), "{arguments:?}");
    }
}

#[test]
fn a_machine_wide_name_is_another_than_the_users() {
    let users = Lock::new("--name");
    let name = users.place.clone();
    let mut machine = lockkit(["run", "--name", &name, "--scope", "machine", "--"]);
    machine.args(["sh", "-c", "echo held; exec sleep 60"]);
    let mut machine = Running::start(machine);
    assert_eq!(machine.line(), "held");
    assert_eq!(code(["status", &name]), 0);
    assert_eq!(code(["status", &name, "--scope", "machine"]), 1);
    assert_eq!(code(["run", "--try", "--name", &name, "--", "true"]), 0);
    let _ = fs::remove_file(format!("/dev/shm/lockkit-machine-{name}.record"));
}

#[test]
fn run_shared_file_lock_admits_shared_refuses_exclusive() {
    let lock = Lock::new("--file");
    let (_running, _) = lock.hold(["--shared"]);
    let run = |options: [&str; 2]| code_of(&lock.run(options, "true").output().expect("lockkit starts"));
    assert_eq!(run(["--try", "--shared"]), 0);
    assert_eq!(run(["--try", "--quiet"]), 75);
}

#[test]
fn killed_lockkit_leaves_lock_held_by_its_program() {
    for kind in KINDS {
        let lock = Lock::new(kind);
        let (mut running, pid) = lock.hold([]);
        let program = Orphan(pid);
        running.child.kill().expect("it runs");
        running.child.wait().expect("a child");
        // The pause is longer than any pending action would take.
        std::thread::sleep(Duration::from_millis(200));
        assert!(lives(program.0), "{kind}");
        assert_eq!(lock.status(), 1, "{kind}");
        assert_eq!(lock.try_once(), 75, "{kind}");
        let waiter = Running::start(lock.run(["--quiet"], "true"));
        std::thread::sleep(Duration::from_millis(100));
        assert!(lives(waiter.pid()), "{kind}: somebody got in");
        signal(program.0, Signal::KILL);
        let mut waiter = waiter;
        assert_eq!(waiter.code(), 0, "{kind}");
        until("it is free", || lock.status() == 0);
    }
}

/// Returns the live children of `pid`.
fn children(pid: u32) -> Vec<u32> {
    let all = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    all.split_ascii_whitespace().filter_map(|child| child.parse().ok()).collect()
}

/// Returns the process that keeps `lock` when lockkit, with that pid, is killed.
fn keeper(lockkit: u32) -> u32 {
    let name = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let mut found = None;
    until("its keeper has its name", || {
        found = children(lockkit).into_iter().find(|pid| name(pid) == "lock-keeper\n");
        found.is_some()
    });
    found.expect("a keeper")
}

#[test]
fn lock_outlives_killed_lockkit_and_keeper_until_program_ends() {
    for kind in ["--name", "--file"] {
        for keeper_first in [false, true] {
            let lock = Lock::new(kind);
            let (running, pid) = lock.hold([]);
            let (program, lockkit) = (Orphan(pid), running.pid());
            let keeper = keeper(lockkit);
            for killed in if keeper_first { [keeper, lockkit] } else { [lockkit, keeper] } {
                signal(killed, Signal::KILL);
                until("it is dead", || !lives(killed));
                assert!(lives(program.0), "{kind}");
                assert_eq!((lock.status(), lock.try_once()), (1, 75), "{kind}, the keeper first: {keeper_first}");
            }
            signal(program.0, Signal::KILL);
            until("it is free", || lock.try_once() == 0);
        }
    }
}

#[test]
fn a_pidfile_names_the_program_that_its_killed_lockkit_ran() {
    let lock = Lock::new("--pidfile");
    let (mut running, pid) = lock.hold([]);
    let program = Orphan(pid);
    assert_eq!(children(running.pid()), [pid], "nothing else keeps it");
    running.child.kill().expect("it runs");
    running.child.wait().expect("a child");
    assert_eq!((lock.status(), lock.try_once()), (1, 75));
    assert_eq!(json(&output(["status", &lock.place, "--json"]))["lock"]["holders"][0]["pid"], pid);
    signal(program.0, Signal::KILL);
    until("it is stale", || lock.status() == 2);
    assert_eq!(lock.try_once(), 0);
}

#[test]
fn program_never_outlives_lease_if_lockkit_or_keeper_dies() {
    for (lockkit_first, keeper_too) in [(true, false), (true, true), (false, true), (false, false)] {
        let lock = Lock::new("--lease");
        // The script starts a process that it waits for, a process whose parent has ended, and a process in a session
        // of its own.
        let script = "sleep 60 > /dev/null & echo $!; (sleep 60 > /dev/null & echo $!); \
                      setsid sleep 60 > /dev/null & echo $!; echo $$; wait";
        let mut running = Running::start(lock.run(["--ttl", "1s"], script));
        let below: Vec<Orphan> = (0..4).map(|_| Orphan(running.line().parse().expect("a pid"))).collect();
        let keeper = Orphan(keeper(running.pid()));
        if lockkit_first {
            signal(running.pid(), Signal::KILL);
            running.child.wait().expect("a child");
            // The loop runs for longer than the lease lasts without a renewal.
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_millis(1500) {
                assert_eq!(lock.status(), 1);
                std::thread::sleep(Duration::from_millis(50));
            }
            assert!(below.iter().all(|process| lives(process.0)));
            assert_eq!(lock.try_once(), 75);
        }
        if keeper_too {
            signal(keeper.0, Signal::KILL);
            until("the program has ended", || !lives(below[3].0));
            if !lockkit_first {
                assert_eq!(running.code(), 128 + 9);
                assert!(below.iter().all(|process| !lives(process.0)), "something is left of it");
            }
        } else {
            // A loss also ends all of it, whether or not lockkit still runs.
            assert_eq!(code(["lease", "steal", "--yes", &lock.place]), 0);
            until("all has ended", || below.iter().all(|process| !lives(process.0)));
        }
        until("the lease is free", || lock.try_once() == 0);
    }
}

#[test]
fn a_kill_by_name_or_by_command_line_does_not_reach_the_keeper() {
    for kind in ["--name", "--file", "--lease"] {
        let lock = Lock::new(kind);
        let (running, pid) = lock.hold([]);
        let (program, keeper) = (Orphan(pid), Orphan(keeper(running.pid())));
        let line = fs::read_to_string(format!("/proc/{}/cmdline", keeper.0)).expect("a process");
        assert_eq!(line.trim_end_matches('\0'), "lock-keeper", "{kind}");
        // `pkill -9 -f lockkit` would do the same, but it would also kill other tests' processes.
        let killed = Command::new("pkill").args(["-9", "-f", &format!("lockkit.*{}", lock.place)]).status();
        assert!(killed.expect("pkill starts").success(), "{kind}");
        until("lockkit is dead", || !lives(running.pid()));
        assert!(lives(keeper.0) && lives(program.0), "{kind}");
        assert_eq!((lock.status(), lock.try_once()), (1, 75), "{kind}");
        signal(program.0, Signal::KILL);
        until("the keeper has left", || !lives(keeper.0));
        assert_eq!(lock.try_once(), 0, "{kind}");
    }
}

#[test]
fn leftover_child_does_not_keep_lock_of_killed_lockkit() {
    for kind in ["--name", "--file"] {
        let lock = Lock::new(kind);
        let script = "sleep 60 > /dev/null & echo $!; echo $$; exec sleep 60";
        let mut running = Running::start(lock.run([], script));
        let left = Orphan(running.line().parse().expect("a pid"));
        let program = Orphan(running.line().parse().expect("a pid"));
        running.child.kill().expect("it runs");
        running.child.wait().expect("a child");
        signal(program.0, Signal::KILL);
        until("it is free", || lock.try_once() == 0);
        assert!(lives(left.0), "{kind}");
    }
}

#[test]
fn a_lockkit_that_is_killed_while_it_waits_runs_nothing_later() {
    for kind in KINDS {
        let lock = Lock::new(kind);
        let (mut running, pid) = lock.hold([]);
        let ran = lock._directory.path().join("ran");
        let mut waiter = Running::start(lock.run([], &format!("echo > {}", ran.display())));
        match kind {
            "--lease" => until("it waits", || !children(waiter.pid()).is_empty()),
            // Its place in a queue is not visible. So the kill may also come before the wait.
            "--pidfile" => {}
            _ => until("it waits", || json(&output(["status", &lock.place, "--json"]))["lock"]["waiters"] == 1),
        }
        let behind: Vec<_> = children(waiter.pid()).into_iter().map(Orphan).collect();
        waiter.child.kill().expect("it runs");
        waiter.child.wait().expect("a child");
        until("nothing is left of it", || behind.iter().all(|process| !lives(process.0)));
        signal(pid, Signal::KILL);
        running.code();
        assert_eq!(lock.try_once(), 0, "{kind}");
        assert!(!ran.exists(), "{kind}");
    }
}

#[test]
fn the_lock_outlasts_a_lockkit_that_is_killed_at_any_moment() {
    // At whatever moment the kill comes, no other process gets the lock as long as the program lives.
    for kind in ["--name", "--file", "--pidfile"] {
        let lock = Lock::new(kind);
        for round in 0..30 {
            let pid_file = lock._directory.path().join(format!("program-{round}"));
            let script = format!("echo $$ > {0}.new; mv {0}.new {0}; exec sleep 60", pid_file.display());
            let mut running = Running::start(lock.run([], &script));
            std::thread::sleep(Duration::from_micros(700 * round));
            running.child.kill().expect("it runs");
            running.child.wait().expect("a child");
            // Either the program runs, however late on a busy machine, or the lock comes free.
            let mut program = None;
            until("the program runs or the lock is free", || {
                let free = lock.try_once() == 0;
                program = fs::read_to_string(&pid_file).ok().and_then(|pid| pid.trim().parse().ok()).map(Orphan);
                assert!(!free || program.is_none(), "{kind}, round {round}: free under its program");
                free || program.is_some()
            });
            if let Some(program) = program {
                assert!(lives(program.0), "{kind}, round {round}");
                assert_eq!(lock.try_once(), 75, "{kind}, round {round}");
            }
            until("it is free again", || lock.try_once() == 0);
        }
    }
}

#[test]
fn what_a_program_leaves_running_does_not_keep_the_lock() {
    for kind in KINDS {
        let lock = Lock::new(kind);
        let mut running = Running::start(lock.run([], "sleep 60 > /dev/null & echo $!"));
        let left = Orphan(running.line().parse().expect("a pid"));
        assert_eq!(running.code(), 0);
        assert!(lives(left.0), "{kind}");
        assert_eq!(lock.try_once(), 0, "{kind}");
    }
}

#[test]
fn keeper_does_not_keep_program_output_open() {
    let lock = Lock::new("--name");
    let (mut running, pid) = lock.hold([]);
    let _program = Orphan(pid);
    running.child.kill().expect("it runs");
    signal(pid, Signal::KILL);
    let mut rest = String::new();
    running.lines.as_mut().expect("a pipe").read_to_string(&mut rest).expect("its end");
    assert_eq!(rest, "");
}

/// Returns `command` with default actions for the signals that a shell makes its background jobs ignore. This test may
/// be such a job. A shell cannot trap a signal that is ignored from the start.
fn with_usual_signals(command: &Command) -> Command {
    let mut usual = Command::new("env");
    usual.arg("--default-signal").arg(command.get_program()).args(command.get_args());
    usual.stdin(Stdio::null());
    usual
}

#[test]
fn signals_are_passed_on() {
    let script = "for s in INT TERM HUP QUIT USR1 USR2; do trap \"exit 4\\$(echo $s | wc -c)\" $s; done; echo ready; \
                  while :; do sleep 0.01; done";
    for kind in KINDS {
        let lock = Lock::new(kind);
        for (number, code) in [(Signal::INT, 44), (Signal::TERM, 45), (Signal::HUP, 44), (Signal::USR1, 45)] {
            let mut running = Running::start(with_usual_signals(&lock.run([], script)));
            assert_eq!(running.line(), "ready");
            signal(running.pid(), number);
            assert_eq!(running.code(), code, "{kind} {number:?}");
        }
    }
}

#[test]
fn a_signal_while_waiting_ends_the_wait() {
    for kind in KINDS {
        let lock = Lock::new(kind);
        let (_running, _) = lock.hold([]);
        let mut waiter = Running::start(lock.run([], "true"));
        std::thread::sleep(Duration::from_millis(100));
        signal(waiter.pid(), Signal::TERM);
        let code = waiter.code();
        assert!(code == -15 || code == 128 + 15, "{kind}: {code}");
        assert_eq!(lock.status(), 1, "{kind}");
    }
}

#[test]
fn a_lost_lease_ends_its_program() {
    let lock = Lock::new("--lease");
    let mut running = Running::start(lock.run(["--ttl", "1s"], "echo $LOCKKIT_TOKEN; exec sleep 60"));
    let token: u64 = running.line().parse().expect("a token");
    assert_eq!(json(&output(["lease", "show", &lock.place, "--json"]))["lock"]["token"], token);
    assert_eq!(code(["lease", "steal", "--yes", &lock.place]), 0);
    assert_eq!(running.code(), 128 + 15);
}

#[test]
fn run_lease_lost_kills_unresponsive_program_and_descendants() {
    let lock = Lock::new("--lease");
    let script = "trap '' TERM; sleep 60 > /dev/null & echo $!; wait; while :; do sleep 0.05; done";
    let mut running = Running::start(lock.run(["--grace", "300ms"], script));
    let below = Orphan(running.line().parse().expect("a pid"));
    let begun = Instant::now();
    assert_eq!(code(["lease", "steal", "--yes", &lock.place]), 0);
    assert_eq!(running.code(), 128 + 9);
    assert!(begun.elapsed() >= Duration::from_millis(300));
    until("what it started has ended", || !lives(below.0));
}

#[test]
fn what_a_program_under_a_lease_leaves_behind_is_buried() {
    let lock = Lock::new("--lease");
    let mut running = Running::start(lock.run([], "(sleep 0.2 & echo $!) ; exec sleep 60"));
    let left: u32 = running.line().parse().expect("a pid");
    until("nothing is left of it", || !Path::new(&format!("/proc/{left}")).exists());
    assert_eq!(lock.status(), 1);
    signal(running.pid(), Signal::TERM);
    assert_eq!(running.code(), 128 + 15);
}

#[test]
fn a_killed_holder_of_a_lease_takes_its_program_along() {
    let lock = Lock::new("--lease");
    let (mut running, pid) = lock.hold([]);
    let program = Orphan(pid);
    let shown = json(&output(["lease", "show", &lock.place, "--json"]));
    let holder = shown["lock"]["holders"][0]["pid"].as_u64().expect("a pid");
    signal(holder as u32, Signal::KILL);
    until("the program has ended", || !lives(program.0));
    assert_eq!(running.code(), 128 + 9);
}

#[test]
fn run_after_death_reports_dead_holder_to_program() {
    let lock = Lock::new("--pidfile");
    let (mut running, pid) = lock.hold([]);
    running.child.kill().expect("it runs");
    signal(pid, Signal::KILL);
    until("it is stale", || lock.status() == 2);
    let told = lock.run(["--verbose"], "echo \"$LOCKKIT_RECOVERED\"").output().expect("lockkit starts");
    assert!(text(&told.stdout).starts_with(&format!("pid {pid} (s")), "{told:?}");
    assert!(text(&told.stderr).contains("died"), "{told:?}");
}

/// Opens a pseudo-terminal. Returns the program's end, and the screen.
fn terminal() -> (OwnedFd, File) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let screen = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a terminal");
    grantpt(&screen).expect("a terminal");
    unlockpt(&screen).expect("a terminal");
    let name = ptsname(&screen, Vec::new()).expect("a name").into_string().expect("a plain name");
    let end = File::options().read(true).write(true).open(name).expect("a terminal");
    let size = rustix::termios::Winsize { ws_row: 24, ws_col: 160, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&end, size).expect("a terminal");
    (end.into(), screen.into())
}

/// Reads the screen until `fact` holds for all of the text.
fn read_until(screen: &mut File, fact: impl Fn(&str) -> bool) -> String {
    let begun = Instant::now();
    let mut shown = Vec::new();
    let mut more = [0; 1024];
    while !fact(&text(&shown)) {
        assert!(begun.elapsed() < LIVELY, "{}", text(&shown));
        let mut watched = [rustix::event::PollFd::new(&*screen, rustix::event::PollFlags::IN)];
        let tick = rustix::event::Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
        if rustix::event::poll(&mut watched, Some(&tick)).is_ok_and(|ready| ready > 0) {
            let read = screen.read(&mut more).unwrap_or_default();
            shown.extend_from_slice(&more[..read]);
        }
    }
    text(&shown)
}

#[test]
fn wait_on_terminal_shows_lock_holder_and_elapsed_time() {
    let lock = Lock::new("--name");
    let (mut running, pid) = lock.hold([]);
    let (end, mut screen) = terminal();
    let mut waiting = lock.run([], "true");
    let mut waiter = Running::start({
        waiting.stderr(end.try_clone().expect("a terminal")).env("TERM", "xterm");
        waiting
    });
    let held = format!("pid {pid} (sh), since ");
    let shown = read_until(&mut screen, |shown| shown.contains(&held) && shown.contains("for 1s"));
    assert!(shown.contains(&format!("Waiting for the named lock {:?}", lock.place)), "{shown}");
    running.child.kill().expect("it runs");
    signal(pid, Signal::KILL);
    assert_eq!(waiter.code(), 0);
    // The line is erased at the end.
    read_until(&mut screen, |shown| shown.ends_with(" \r"));
}

#[test]
fn an_interrupt_from_the_terminal_reaches_the_program_once() {
    for kind in ["--name", "--lease"] {
        let lock = Lock::new(kind);
        let (end, mut screen) = terminal();
        let script = "trap 'echo interrupted' INT; echo ready; i=0; while [ $i -lt 40 ]; do sleep 0.02; i=$((i+1)); \
                      done; echo ended";
        let run = with_usual_signals(&lock.run([], script));
        // The terminal becomes the controlling terminal, so that it sends signals.
        let mut session = Command::new("setsid");
        session.args(["--ctty", "--wait"]).arg(run.get_program()).args(run.get_args());
        session.stdin(end.try_clone().expect("a terminal")).stderr(end.try_clone().expect("a terminal"));
        session.stdout(end);
        let mut session = session.spawn().expect("setsid starts");
        read_until(&mut screen, |shown| shown.contains("ready"));
        screen.write_all(b"\x03").expect("a terminal");
        let shown = read_until(&mut screen, |shown| shown.contains("ended"));
        assert_eq!(shown.matches("interrupted").count(), 1, "{kind}: {shown}");
        assert!(session.wait().expect("a child").success(), "{kind}");
    }
}

#[test]
fn run_program_in_other_group_receives_interrupt_and_hangup() {
    for kind in ["--name", "--lease"] {
        // With setsid(1) the program leaves the session. Without it, lockkit leads the session and alone receives the
        // signal.
        for (begin, signal) in [("exec setsid sh -c", "INT"), ("exec sh -c", "HUP")] {
            let lock = Lock::new(kind);
            let (end, mut screen) = terminal();
            let heard = lock._directory.path().join("heard");
            let script = format!(
                "{begin} 'trap \"echo > {}; exit\" {signal}; echo ready; while :; do sleep 0.02; done'",
                heard.display()
            );
            let run = with_usual_signals(&lock.run([], &script));
            let mut session = Command::new("setsid");
            session.args(["--ctty", "--fork"]).arg(run.get_program()).args(run.get_args());
            session.stdin(end.try_clone().expect("a terminal")).stderr(end.try_clone().expect("a terminal"));
            session.stdout(end);
            session.status().expect("setsid starts");
            drop(session);
            read_until(&mut screen, |shown| shown.contains("ready"));
            match signal {
                "INT" => screen.write_all(b"\x03").expect("a terminal"),
                _ => drop(screen),
            }
            until("the program has heard of it", || heard.exists());
            until("the lock is free", || lock.status() == 0);
        }
    }
}

#[test]
fn no_color_is_heeded_on_a_terminal() {
    let lock = Lock::new("--name");
    let (_running, _) = lock.hold([]);
    for no_color in [false, true] {
        let (end, mut screen) = terminal();
        let mut status = lockkit(["status", &lock.place]);
        status.env("TERM", "xterm").stdout(end.try_clone().expect("a terminal"));
        if no_color {
            status.env("NO_COLOR", "1");
        }
        assert_eq!(status.status().expect("lockkit starts").code(), Some(1));
        let shown = read_until(&mut screen, |shown| shown.contains("waiters") || shown.contains("held by"));
        assert_eq!(shown.contains("\x1b[33mheld"), !no_color, "{shown:?}");
    }
}

#[test]
fn wait_on_pipe_prints_only_with_verbose() {
    let lock = Lock::new("--name");
    let (_running, pid) = lock.hold([]);
    let wait = |option: &str| {
        let waited = lock.run(["--timeout", "400ms", option], "true").output().expect("lockkit starts");
        assert_eq!(code_of(&waited), 75);
        text(&waited.stderr)
    };
    let plain = lock.run(["--timeout", "400ms"], "true").output().expect("lockkit starts");
    assert!(!text(&plain.stderr).to_lowercase().contains("waiting for"), "{plain:?}");
    assert_eq!(wait("--quiet"), "");
    assert!(wait("--verbose").contains(&format!("waiting for the named lock {:?}, held by pid {pid}", lock.place)));
}

#[test]
fn the_schema_tells_the_forms_from_others() {
    let schema = serde_json::from_str(FORMS).expect("JSON");
    assert!(jsonschema::meta::is_valid(&schema), "it is a schema");
    let schema = jsonschema::validator_for(&schema).expect("a schema");
    let lock = serde_json::json!({"kind": "file", "name": "/a", "state": "free", "holders": [], "waiters": 0});
    let with = |field: &str, value: Value| {
        let mut lock = lock.clone();
        lock[field] = value;
        schema.is_valid(&serde_json::json!({"version": 1, "lock": lock}))
    };
    assert!(with("waiters", Value::Null) && with("of a later release", true.into()));
    assert!(with("kind", "fcntl".into()) && !with("state", "unknown".into()), "an unknown state has a reason");
    let wrong: [(&str, Value); 8] = [
        ("kind", "mutex".into()),
        ("state", "busy".into()),
        ("waiters", (-1).into()),
        ("name", Value::Null),
        ("holders", serde_json::json!([{"pid": 1}])),
        ("scope", "user".into()),
        ("token", 7.into()),
        ("reason", "of a free lock".into()),
    ];
    for (field, value) in wrong {
        assert!(!with(field, value), "{field}");
    }
    assert!(!schema.is_valid(&serde_json::json!({"version": 2, "lock": lock})));
    assert!(!schema.is_valid(&serde_json::json!({"version": 1})));
}

#[test]
fn status_and_list_say_the_same_in_json() {
    let locks = KINDS.map(Lock::new);
    let _held: Vec<_> = locks.iter().map(|lock| lock.hold([])).collect();
    let list = output(["list", "--json", &locks[2].place]);
    let list = json(&list);
    assert_eq!(list["version"], 1);
    let listed = list["locks"].as_array().expect("locks");
    for (lock, kind) in locks.iter().zip(["named", "file", "pidfile", "lease"]) {
        let status = output(["status", &lock.place, "--json"]);
        assert_eq!(code_of(&status), 1);
        let status = json(&status);
        assert_eq!(
            (&status["version"], &status["lock"]["kind"], &status["lock"]["state"]),
            (&1.into(), &kind.into(), &"held".into())
        );
        assert_ne!(status["lock"]["holders"][0]["pid"], 0);
        let found: Vec<_> = listed.iter().filter(|found| found["name"] == lock.place.as_str()).collect();
        assert_eq!(found.len(), 1, "{kind} in {list}");
        assert_eq!(found[0]["holders"][0]["pid"], status["lock"]["holders"][0]["pid"]);
    }
    let table = text(&output(["list"]).stdout);
    assert!(table.starts_with("KIND") && table.contains(&locks[0].place), "{table}");
    assert!(!table.contains('\x1b'));
}

#[test]
fn list_shows_directory_on_request_and_tables_in_use_always() {
    use lockkit::{LockManager, ShmLockManager};
    let (directory, paths) = pidfiles();
    let table = directory.path().join("table");
    let manager = ShmLockManager::create(&table, 8).expect("a table");
    let _guard = manager.allocate().and_then(|lock| lock.lock()).expect("a free lock");
    let kinds = |list: &Output| {
        let list = json(list);
        let locks = list["locks"].as_array().expect("locks").iter();
        let here = locks.filter(|lock| Path::new(lock["name"].as_str().expect("a name")).starts_with(directory.path()));
        here.map(|lock| lock["kind"].as_str().expect("a kind").to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(kinds(&output(["list", "--json"])), ["table"]);
    let all = output(["list", "--json", &directory.path().display().to_string()]);
    assert_eq!(kinds(&all), ["pidfile", "pidfile", "table"], "{paths:?}");
}

#[test]
fn status_escapes_file_names_and_does_not_block_on_fifo() {
    let directory = TempDir::new().expect("a directory");
    let odd = directory.path().join("a\x1b[31m\nb").display().to_string();
    let _holder = Running::start(lockkit(["run", "--file", &odd, "--", "sleep", "60"]));
    until("it is held", || code(["status", &odd]) == 1);
    for shown in [output(["status", &odd]), output(["list"])] {
        let shown = text(&shown.stdout);
        assert!(shown.contains(r"a\u{1b}[31m\nb") && !shown.contains('\x1b'), "{shown:?}");
    }
    let fifo = directory.path().join("fifo").display().to_string();
    assert!(Command::new("mkfifo").arg(&fifo).status().expect("mkfifo starts").success());
    assert_eq!(code(["status", &fifo]), 0);
}

#[test]
fn waiters_are_counted() {
    for kind in ["--name", "--file"] {
        let lock = Lock::new(kind);
        let (_running, _) = lock.hold([]);
        let _waiters = [0; 3].map(|_| Running::start(lock.run(["--quiet"], "true")));
        until("three wait", || json(&output(["status", &lock.place, "--json"]))["lock"]["waiters"] == 3);
    }
}

#[test]
fn wait_returns_when_the_lock_is_free_and_does_not_take_it() {
    for kind in KINDS {
        let lock = Lock::new(kind);
        assert_eq!(code(["wait", &lock.place]), 0, "{kind}");
        let mut running = Running::start(lock.run([], "echo held; sleep 0.4"));
        assert_eq!(running.line(), "held");
        assert_eq!(code(["wait", &lock.place, "--timeout", "50ms"]), 75, "{kind}");
        assert_eq!(code(["wait", &lock.place, "--timeout", "30s"]), 0, "{kind}");
        assert_eq!(running.code(), 0, "{kind}");
    }
}

/// Creates a directory with a pidfile of a live process, a pidfile of an ended process, and another file.
fn pidfiles() -> (TempDir, [PathBuf; 3]) {
    let directory = TempDir::new().expect("a directory");
    let paths = ["alive.pid", "dead.pid", "notes.txt"].map(|name| directory.path().join(name));
    let mut ended = Command::new("true").spawn().expect("it starts");
    ended.wait().expect("a child");
    fs::write(&paths[0], format!("{}\n", std::process::id())).expect("a file");
    fs::write(&paths[1], format!("{}\n", ended.id())).expect("a file");
    fs::write(&paths[2], "4194305\n").expect("a file");
    (directory, paths)
}

#[test]
fn pidfiles_are_checked_and_only_stale_ones_are_removed() {
    let (directory, paths) = pidfiles();
    let text_of = |path: &Path| path.display().to_string();
    let dir = text_of(directory.path());
    assert_eq!(code(["pidfile", "check", &text_of(&paths[0])]), 1);
    assert_eq!(code(["pidfile", "check", &text_of(&paths[1])]), 2);
    assert_eq!(code(["pidfile", "check", &dir]), 1);
    assert_eq!(code(["pidfile", "check", &text_of(&directory.path().join("none.pid"))]), 66);
    let form = json(&output(["pidfile", "check", "--json", &dir]));
    assert_eq!((&form["version"], form["locks"].as_array().map(Vec::len)), (&1.into(), Some(2)));
    let dead = fs::read(&paths[1]).expect("a file");
    let dry = output(["pidfile", "clean", "--dry-run", &dir]);
    assert!(text(&dry.stdout).contains("would remove") && paths[1].exists());
    let clean = output(["pidfile", "clean", &dir]);
    assert_eq!((code_of(&clean), text(&clean.stdout).lines().count()), (0, 1));
    assert_eq!(paths.each_ref().map(|path| path.exists()), [true, false, true]);
    // A link's target is left unchanged, and the output says so.
    let link = directory.path().join("link.pid");
    fs::write(&paths[2], dead).expect("a file");
    symlink(&paths[2], &link).expect("a link");
    for options in [["clean", "--dry-run"].as_slice(), &["clean"]] {
        let refused = lockkit(["pidfile"]).args(options).arg(&dir).output().expect("lockkit starts");
        assert_eq!((code_of(&refused), text(&refused.stdout)), (77, String::new()));
        assert!(link.is_symlink() && paths[2].exists());
    }
}

#[test]
fn b6_dry_run_check_and_clean_judge_alike() {
    let (directory, [alive, dead, junk]) = pidfiles();
    let old = |path: &Path| {
        let file = fs::File::options().write(true).open(path).expect("a file");
        file.set_modified(std::time::SystemTime::now() - Duration::from_secs(60)).expect("its time can be set");
    };
    let file = |name: &str| directory.path().join(name);
    fs::write(file("blank.pid"), "").expect("a file");
    old(&file("blank.pid"));
    fs::write(file("text.pid"), "key = value\n").expect("a file");
    fs::copy(&dead, file("one.pid")).expect("a file");
    fs::hard_link(file("one.pid"), file("two.pid")).expect("a link");
    symlink(&dead, file("link.pid")).expect("a link");
    let missing = file("none.pid");
    for (path, checked, cleaned) in [
        (&alive, 1, 0),
        (&junk, 65, 65),
        (&file("text.pid"), 65, 65),
        (&file("blank.pid"), 0, 0),
        (&file("one.pid"), 2, 77),
        (&file("link.pid"), 2, 77),
        (&missing, 66, 66),
        (&file("no/such.pid"), 66, 66),
        (&dead, 2, 0),
    ] {
        let path_text = path.display().to_string();
        let before = fs::read(path).ok();
        assert_eq!(code(["pidfile", "check", &path_text]), checked, "{path_text}");
        let said = |dry: &[&str]| {
            let run = lockkit(["pidfile", "clean"]).args(dry).arg(path).output().expect("lockkit starts");
            // The age of the file differs in each run.
            let done = text(&run.stdout).replace("would remove", "removed");
            (code_of(&run), done.split(", since").next().unwrap_or_default().to_owned(), text(&run.stderr))
        };
        let dry = said(&["--dry-run"]);
        assert_eq!(fs::read(path).ok(), before, "{path_text}");
        assert_eq!(said(&[]), dry, "{path_text}");
        assert_eq!((dry.0, dry.1.is_empty()), (cleaned, path != &dead), "{path_text}: {dry:?}");
        assert_eq!(path.exists(), before.is_some() && path != &dead, "{path_text}");
    }
    // The other files of a directory are judged nevertheless.
    fs::write(&dead, "4194304\n").expect("a file");
    let dir = directory.path().display().to_string();
    let run = output(["pidfile", "clean", &dir]);
    assert!(text(&run.stdout).contains("dead.pid") && code_of(&run) != 0, "{run:?}");
}

#[test]
fn b6_file_that_may_not_be_read_or_removed_is_refused() {
    if !rustix::process::geteuid().is_root() {
        return left_out("acting as another user needs root");
    }
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("app.pid");
    let set = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("it can be set");
    for (above, mode) in [(0o777, 0o600), (0o755, 0o644), (0o1777, 0o644)] {
        fs::write(&path, "4194304\n").expect("a file");
        set(directory.path(), above);
        set(&path, mode);
        for command in [["clean", "--dry-run"].as_slice(), &["clean"]] {
            let mut run = Command::new("setpriv");
            run.args(["--reuid=1001", "--regid=1001", "--clear-groups", PROGRAM, "pidfile"]).args(command).arg(&path);
            let run = run.output().expect("setpriv starts");
            assert_eq!((code_of(&run), text(&run.stdout)), (77, String::new()), "{command:?} {mode:o}: {run:?}");
            assert!(path.exists());
        }
    }
}

#[test]
fn a_lease_is_shown_released_and_stolen() {
    let lock = Lock::new("--lease");
    let url = format!("file://{}", lock.place);
    assert_eq!(code(["lease", "show", &url]), 0);
    let (_running, _) = lock.hold([]);
    let shown = json(&output(["lease", "show", &url, "--json"]));
    let (token, holder) = (&shown["lock"]["token"], &shown["lock"]["holders"][0]["pid"]);
    assert_eq!(code(["lease", "show", &url]), 1);
    let refused = output(["lease", "release", &url]);
    assert_eq!(code_of(&refused), 75);
    assert!(text(&refused.stderr).contains(&format!("pid {holder}")), "{refused:?}");
    assert_eq!(code(["lease", "release", &url, "--token", "1"]), 75);
    assert_eq!(code(["lease", "steal", &url]), 64, "nobody to ask");
    assert_eq!(code(["lease", "show", &url]), 1);
    assert_eq!(code(["lease", "release", &url, "--token", &token.to_string()]), 0);
    assert_eq!(code(["lease", "show", &url]), 0);
}

#[test]
fn stealing_a_lease_asks_and_names_the_owner() {
    for (answer, code, after) in [("n\n", 75, 1), ("yes\n", 0, 0)] {
        let lock = Lock::new("--lease");
        let (_running, _) = lock.hold([]);
        let shown = json(&output(["lease", "show", &lock.place, "--json"]));
        let (end, mut screen) = terminal();
        let mut steal = lockkit(["lease", "steal", &lock.place]);
        steal.stdin(end.try_clone().expect("a terminal")).stderr(end.try_clone().expect("a terminal"));
        let mut steal = Running::start(steal);
        let asked = read_until(&mut screen, |shown| shown.contains("[y/N]"));
        assert!(asked.contains(&format!("from pid {} (lockkit)", shown["lock"]["holders"][0]["pid"])), "{asked}");
        screen.write_all(answer.as_bytes()).expect("a terminal");
        assert_eq!(steal.code(), code);
        assert_eq!(lock.status(), after);
    }
}

#[test]
fn missing_server_store_error_names_cargo_feature() {
    let engines = [
        ("redis://user:secret@localhost:1/leader", "redis", cfg!(feature = "redis")),
        ("postgres://user:secret@localhost:1/db/leader", "postgres", cfg!(feature = "postgres")),
        ("etcd://user:secret@localhost:1/leader", "etcd", cfg!(feature = "etcd")),
    ];
    for (url, feature, is_built_in) in engines {
        if is_built_in {
            left_out(&format!("a build without {feature}"));
            continue;
        }
        let refused = [
            output(["run", "--lease", url, "--", "true"]),
            output(["status", url]),
            output(["wait", url]),
            output(["lease", "show", url]),
            output(["lease", "release", url]),
            output(["lease", "steal", url]),
        ];
        for refused in refused {
            assert_eq!(code_of(&refused), 69, "{refused:?}");
            let said = text(&refused.stderr);
            assert!(said.contains(&format!("feature `{feature}`")) && !said.contains("secret"), "{said}");
            assert!(said.contains("For example: cargo install lockkit-cli --features "), "{said}");
        }
    }
    for wrong in ["gopher://host/leader", "file://elsewhere/leader", "file:///a%zz"] {
        assert_eq!(code(["run", "--lease", wrong, "--", "true"]), 64, "{wrong}");
        assert_eq!(code(["status", wrong]), 64, "{wrong}");
    }
}

#[test]
fn a_lease_by_url_is_the_lease_at_its_path() {
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("my leader").display().to_string();
    let url = format!("file://{}", path.replace(' ', "%20"));
    assert_eq!((code(["status", &url]), code(["wait", &url])), (0, 0));
    let mut run = lockkit(["run", "--lease", &url, "--", "sh", "-c"]);
    run.arg("echo $LOCKKIT_TOKEN; read end").stdin(Stdio::piped());
    let mut running = Running::start(run);
    let token: u64 = running.line().parse().expect("a token");
    for place in [&url, &path] {
        for shown in [output(["status", place, "--json"]), output(["lease", "show", place, "--json"])] {
            assert_eq!(code_of(&shown), 1);
            assert_eq!(json(&shown)["lock"]["token"], token);
        }
        assert_eq!(code(["wait", place, "--timeout", "50ms"]), 75);
        assert_eq!(code(["run", "--try", "--lease", place, "--", "true"]), 75);
    }
    let listed = json(&output(["list", "--json"]));
    let locks = listed["locks"].as_array().expect("locks");
    assert!(locks.iter().any(|lock| lock["name"] == path.as_str() && lock["kind"] == "lease"), "{listed}");
    drop(running.child.stdin.take());
    assert_eq!(code(["wait", &url, "--timeout", "30s"]), 0);
    assert_eq!(code(["status", &url]), 0);
}

/// Starts a Redis server that is killed at the end of the test. Returns it with the URL of a lease on it. Returns
/// `None`, and prints the reason, if that is impossible.
fn redis() -> Option<(TempDir, Running, String)> {
    if !cfg!(feature = "redis") {
        left_out("this build has no redis");
        return None;
    }
    let directory = TempDir::new().expect("a directory");
    let socket = directory.path().join("socket").display().to_string();
    let mut server = Command::new("redis-server");
    server.args(["--port", "0", "--unixsocket", &socket, "--save", "", "--appendonly", "no", "--dir"]);
    let started = server.arg(directory.path()).stdin(Stdio::null()).stdout(Stdio::null()).spawn();
    let Ok(child) = started else {
        left_out("redis-server is not installed");
        return None;
    };
    until("the server listens", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
    let url = format!("redis+unix://{socket}?lease=leader");
    Some((directory, Running { child, lines: None }, url))
}

#[test]
fn cli_redis_lease_works_and_is_lost_with_server() {
    let Some((_directory, mut server, url)) = redis() else { return };
    assert_eq!((code(["status", &url]), code(["wait", &url])), (0, 0));
    let run = || {
        let mut run = lockkit(["run", "--lease", &url, "--ttl", "3s", "--", "sh", "-c"]);
        run.arg("echo $LOCKKIT_TOKEN; exec sleep 60");
        let mut running = Running::start(run);
        let token: u64 = running.line().parse().expect("a token");
        (running, token)
    };
    let (mut running, token) = run();
    for shown in [output(["status", &url, "--json"]), output(["lease", "show", &url, "--json"])] {
        assert_eq!(code_of(&shown), 1);
        assert_eq!(json(&shown)["lock"]["token"], token);
    }
    assert_eq!(code(["run", "--try", "--lease", &url, "--", "true"]), 75);
    assert_eq!(code(["wait", &url, "--timeout", "50ms"]), 75);
    let waiting = Running::start(lockkit(["wait", &url, "--timeout", "30s"]));
    assert_eq!(code(["lease", "steal", "--yes", &url]), 0);
    assert_eq!(running.code(), 128 + 15, "its program is ended");
    assert_eq!({ waiting }.code(), 0);
    let (mut running, next) = run();
    assert!(next > token);
    assert_eq!(code(["lease", "release", &url, "--token", &token.to_string()]), 75, "that was another one");
    server.child.kill().expect("it runs");
    assert_eq!(running.code(), 128 + 15, "it could not be renewed");
    let refused = output(["run", "--try", "--lease", &url, "--", "true"]);
    assert!(code_of(&refused) != 0 && text(&refused.stderr).contains("cannot connect to"), "{refused:?}");
}

#[test]
fn paths_that_are_no_text_are_locks_like_any_other() {
    let directory = TempDir::new().expect("a directory");
    for kind in ["--file", "--pidfile", "--lease"] {
        let path = directory.path().join(OsStr::from_bytes(&[kind.as_bytes(), b"-\xff.pid"].concat()));
        let on_path = |arguments: &[&str]| {
            let mut command = lockkit([]);
            command.args(arguments).arg(&path);
            command
        };
        let mut run = on_path(&["run", kind]);
        run.args(["--", "sh", "-c", "echo held; exec sleep 60"]);
        let mut running = Running::start(run);
        assert_eq!(running.line(), "held", "{kind}");
        assert!(path.exists(), "{kind}");
        let status = on_path(&["status", "--json"]).output().expect("lockkit starts");
        assert_eq!(code_of(&status), 1, "{kind}");
        let bytes = Value::from(path.as_os_str().as_bytes().to_vec());
        assert_eq!(json(&status)["lock"]["name_bytes"], bytes, "{kind}");
        assert_ne!(json(&status)["lock"]["holders"][0]["pid"], 0, "{kind}");
        let listed = json(&output(["list", "--json", &directory.path().display().to_string()]));
        let locks = listed["locks"].as_array().expect("locks");
        assert!(locks.iter().any(|lock| lock["name_bytes"] == bytes), "{kind}: {listed}");
        let code = |mut command: Command| code_of(&command.output().expect("lockkit starts"));
        assert_eq!(code(on_path(&["wait", "--timeout", "50ms"])), 75, "{kind}");
        let mut refused = on_path(&["run", "--try", kind]);
        refused.args(["--", "true"]);
        assert_eq!(code(refused), 75, "{kind}");
        match kind {
            "--lease" => {
                assert_eq!(code(on_path(&["lease", "show"])), 1);
                assert_eq!(code(on_path(&["lease", "steal", "--yes"])), 0);
                running.code();
            }
            "--pidfile" => assert_eq!(code(on_path(&["pidfile", "check"])), 1),
            _ => {}
        }
        signal(running.pid(), Signal::TERM);
        running.code();
        assert_eq!(code(on_path(&["wait"])), 0, "{kind}");
    }
    let mut name = lockkit(["status"]);
    assert_eq!(name.arg(OsStr::from_bytes(b"a\xff")).output().expect("lockkit starts").status.code(), Some(64));
}

#[test]
fn steal_lease_of_other_user_requires_root() {
    if !rustix::process::geteuid().is_root() {
        left_out("only root can act as another user");
        return;
    }
    let as_user = |uid: u32, arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", &uid.to_string(), "--clear-groups", PROGRAM]).args(arguments);
        command.stdin(Stdio::null());
        command
    };
    // Users have to reach the directory.
    let directory = TempDir::new_in("/tmp").expect("a directory");
    fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).expect("a directory");
    let lease = directory.path().join("lease").display().to_string();
    let (owner, other) = (1_900_001, 1_900_002);
    if as_user(owner, &["lease", "show", &lease]).status().expect("setpriv starts").code() != Some(0) {
        left_out("another user cannot run what was built here");
        return;
    }
    let mut running =
        Running::start(as_user(owner, &["run", "--lease", &lease, "--", "sh", "-c", "echo held; exec sleep 60"]));
    assert_eq!(running.line(), "held");
    for readable in [false, true] {
        let mode = if readable { 0o666 } else { 0o600 };
        fs::set_permissions(&lease, Permissions::from_mode(mode)).expect("a file");
        let refused = as_user(other, &["lease", "steal", "--yes", &lease]).output().expect("setpriv starts");
        assert_eq!(code_of(&refused), 77, "{refused:?}");
    }
    assert_eq!(code(["lease", "show", &lease]), 1);
    let stolen = output(["lease", "steal", "--yes", &lease]);
    assert_eq!(code_of(&stolen), 0, "{stolen:?}");
    assert_eq!(running.code(), 128 + 15, "it lost the lease");
    assert_eq!(code(["lease", "show", &lease]), 0);
    // Root may not hold it there either, because that user could take it back.
    let refused = output(["run", "--lease", &lease, "--", "true"]);
    assert_eq!(code_of(&refused), 77);
    assert!(text(&refused.stderr).contains("another user"), "{refused:?}");
    let again = as_user(owner, &["run", "--lease", &lease, "--", "true"]).status().expect("setpriv starts");
    assert!(again.success());
}

#[test]
fn doctor_interrupted_or_killed_is_cleaned_up() {
    let directory = TempDir::new_in("/dev/shm").expect("a directory");
    let left = || -> Vec<PathBuf> {
        fs::read_dir(directory.path()).expect("a directory").map(|entry| entry.expect("an entry").path()).collect()
    };
    let path = directory.path().display().to_string();
    let begin = || {
        let mut doctor = lockkit(["doctor", &path]);
        doctor.stderr(Stdio::null());
        let running = Running::start(doctor);
        // Or the command has ended already.
        until("it has begun", || !left().is_empty() || !lives(running.pid()));
        running
    };
    for number in [Signal::INT, Signal::TERM, Signal::HUP] {
        // On a busy machine a run may end before the signal, and then it shows nothing.
        let interrupted = (0..50).any(|_| {
            let mut running = begin();
            signal(running.pid(), number);
            let code = running.code();
            // Or the signal arrived after the work was done.
            assert!([0, 128 + number.as_raw(), -number.as_raw()].contains(&code), "{code}");
            assert!(left().is_empty(), "{:?}", left());
            code == 128 + number.as_raw()
        });
        assert!(interrupted, "{number:?}");
    }
    let killed = || {
        let mut running = begin();
        signal(running.pid(), Signal::KILL);
        running.code();
        running
    };
    let running = (0..50).map(|_| killed()).find(|_| !left().is_empty()).expect("one that has not ended first");
    let [abandoned] = &left()[..] else { panic!("{:?}", left()) };
    let name = abandoned.file_name().expect("a name").to_string_lossy().into_owned();
    assert_eq!(name, format!(".lockkit-doctor-{}", running.pid()), "as the documentation has it");
    // The directory may belong to a running doctor, so it stays until it is old.
    assert_eq!(code(["doctor", &path]), 0);
    assert!(abandoned.exists());
    let hour_ago = SystemTime::now() - Duration::from_secs(3600);
    File::open(abandoned).and_then(|directory| directory.set_modified(hour_ago)).expect("a directory");
    assert_eq!(code(["doctor", &path]), 0);
    assert!(left().is_empty(), "{:?}", left());
}

#[test]
fn tables_give_out_numbers_and_take_them_back() {
    let directory = TempDir::new_in("/dev/shm").expect("a directory");
    for kind in [["--capacity", "4"].as_slice(), &["--directory"]] {
        let path = directory.path().join(kind[0]).display().to_string();
        let mut create = lockkit(["table", "create", &path]);
        assert!(create.args(kind).status().expect("lockkit starts").success());
        assert_eq!(code(["table", "create", &path]), 73, "something is there");
        let allocate = || text(&output(["table", "allocate", &path]).stdout).trim().to_owned();
        assert_eq!([allocate(), allocate()], ["0", "1"]);
        assert_eq!(code(["table", "allocate", &path, "--at", "1"]), 69);
        assert_eq!(code(["table", "free", &path, "0"]), 0);
        assert_eq!(code(["table", "free", &path, "0"]), 69);
        let form = json(&output(["table", "list", &path, "--json"]));
        assert_eq!(form["lock"]["kind"], "table");
        let renumbered = output(["table", "renumber", "--yes", &path, "3", "1", "1"]);
        let numbers = text(&renumbered.stdout);
        let numbers: Vec<_> = numbers.lines().filter_map(|line| line.split_once(' ')).collect();
        assert_eq!(numbers[..2], [("3", "3"), ("1", "1")]);
        assert_eq!(numbers[2].0, "1");
        assert!(!["1", "3"].contains(&numbers[2].1), "a number of its own: {numbers:?}");
        assert_eq!(code(["table", "free", &path, "--all"]), 64, "nobody to ask");
        assert_eq!(code(["table", "free", &path, "--all", "--yes"]), 0);
    }
}

#[test]
fn table_numbers_kept_when_output_or_renumber_fails() {
    let directory = TempDir::new_in("/dev/shm").expect("a directory");
    let path = directory.path().join("table").display().to_string();
    assert_eq!(code(["table", "create", &path, "--capacity", "2"]), 0);
    assert_eq!(text(&output(["table", "allocate", &path]).stdout), "0\n");
    let left = || json(&output(["table", "list", &path, "--json"]))["lock"]["available"].clone();
    let full = File::options().write(true).open("/dev/full").expect("a device");
    let unread = lockkit(["table", "allocate", &path]).stdout(full).status().expect("lockkit starts");
    assert_eq!((unread.code(), left()), (Some(74), 1.into()));
    let refused = output(["table", "renumber", "--yes", &path, "0", "0", "0"]);
    assert_eq!((code_of(&refused), text(&refused.stdout), left()), (69, String::new(), 1.into()));
}

#[test]
fn table_status_reports_holder_of_each_lock() {
    use lockkit::{LockManager, ShmLockManager};
    let directory = TempDir::new_in("/dev/shm").expect("a directory");
    let path = directory.path().join("table");
    let table = ShmLockManager::create(&path, 8).expect("a table");
    let lock = table.allocate_at(5).expect("a lock");
    let _guard = lock.lock().expect("free");
    let path = path.display().to_string();
    let status = output(["status", &path, "--json"]);
    assert_eq!(code_of(&status), 1);
    let holder = &json(&status)["lock"]["holders"][0];
    assert_eq!((&holder["lock"], &holder["pid"]), (&5.into(), &std::process::id().into()));
    assert_eq!(code(["table", "renumber", "--yes", &path, "5"]), 75, "somebody holds one");
}

#[test]
fn the_doctor_finds_memory_sound() {
    let directory = TempDir::new_in("/dev/shm").expect("a directory");
    let path = directory.path().display().to_string();
    let report = output(["doctor", &path, "--json"]);
    assert_eq!(code_of(&report), 0, "{report:?}");
    let report = json(&report);
    assert_eq!((&report["version"], &report["filesystem"]["kind"]), (&1.into(), &"tmpfs".into()));
    assert_eq!(report["folder"], path.as_str());
    assert!(
        report["checks"]
            .as_array()
            .is_some_and(|checks| checks.len() == 8 && checks.iter().all(|check| check["passed"] == true))
    );
    assert!(report["advice"].as_array().is_some_and(|advice| advice.iter().all(|lock| lock["usable"] == true)));
    assert_eq!(fs::read_dir(directory.path()).expect("a directory").count(), 0, "nothing stays behind");
    let shown = text(&output(["doctor", &path]).stdout);
    assert!(shown.contains("tmpfs") && shown.contains("What to use here"), "{shown}");
    assert_eq!(code(["doctor", "/no/such/directory"]), 66);
}

#[test]
fn the_doctor_trusts_proc_with_nothing() {
    assert_ne!(code(["doctor", "/proc/self"]), 0);
}

#[test]
fn commands_have_completions_man_page_and_help_example() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = output(["completions", shell]);
        assert!(code_of(&script) == 0 && text(&script.stdout).contains("lockkit"), "{shell}");
    }
    let directory = TempDir::new().expect("a directory");
    assert_eq!(code(["man", &directory.path().display().to_string()]), 0);
    let commands =
        ["run", "flock", "list", "status", "wait", "pidfile", "lease", "table", "doctor", "completions", "man"];
    for command in commands {
        let page = fs::read_to_string(directory.path().join(format!("lockkit-{command}.1"))).expect(command);
        assert!(page.contains(".TH"), "{command}");
        if command == "flock" {
            // Its help is flock(1)'s.
            assert!(page.contains("Example: lockkit flock"), "{page}");
            continue;
        }
        let mut below = vec![Vec::new()];
        below.extend(match command {
            "pidfile" => ["check", "clean"].map(|name| vec![name]).to_vec(),
            "lease" => ["show", "release", "steal"].map(|name| vec![name]).to_vec(),
            "table" => ["create", "list", "allocate", "free", "renumber"].map(|name| vec![name]).to_vec(),
            _ => Vec::new(),
        });
        for names in below {
            let help = lockkit([command]).args(&names).arg("--help").output().expect("lockkit starts");
            assert_eq!(code_of(&help), 0, "{command} {names:?}");
            let help = text(&help.stdout);
            let first = help.lines().next().unwrap_or_default();
            assert!(first.starts_with(char::is_uppercase) && first.contains(' '), "{command} {names:?}: {first}");
            assert!(help.contains("Example"), "{command} {names:?}");
            let page = [&["lockkit", command], &names[..]].concat().join("-");
            let page = fs::read_to_string(directory.path().join(format!("{page}.1"))).expect("a page");
            assert!(page.contains(".TH") && page.contains("Example"), "{command} {names:?}");
        }
    }
}

#[test]
fn arguments_that_make_no_sense_are_refused_with_an_example() {
    let cases: [&[&str]; 9] = [
        &["nonsense"],
        &["status"],
        &["run", "--name", "a"],
        &["run", "--", "true"],
        &["run", "--name", "a", "--file", "b", "--", "true"],
        &["run", "--name", "a/b", "--", "true"],
        &["run", "--name", "a", "--shared", "--", "true"],
        &["run", "--name", "a", "--timeout", "soon", "--", "true"],
        &["table", "free", "/dev/shm/x"],
    ];
    for arguments in cases {
        let refused = lockkit([]).args(arguments).output().expect("lockkit starts");
        assert_eq!(code_of(&refused), 64, "{arguments:?}");
        assert!(text(&refused.stderr).contains("For example: lockkit "), "{arguments:?}: {refused:?}");
        assert!(!text(&refused.stderr).contains('\x1b'));
    }
}

/// Returns the machine's flock(1) and ours, each under the name `flock` in a directory of its own, as `sh` would find
/// them.
fn both_flocks() -> Option<(TempDir, [PathBuf; 2])> {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let Some(real) = std::env::split_paths(&paths).map(|directory| directory.join("flock")).find(|path| path.is_file())
    else {
        left_out("this machine has no flock(1)");
        return None;
    };
    let directory = TempDir::new().expect("a directory");
    let both = [("real", real), ("ours", PROGRAM.into())].map(|(name, program)| {
        fs::create_dir(directory.path().join(name)).expect("a directory");
        let link = directory.path().join(name).join("flock");
        symlink(program, &link).expect("a link");
        link
    });
    Some((directory, both))
}

/// musl's error texts, each with the text of the C library that the machine's own flock uses.
#[cfg(target_env = "musl")]
const WORDS: [[&str; 2]; 3] = [
    ["Filename too long", "File name too long"],
    ["Symbolic link loop", "Too many levels of symbolic links"],
    ["Result not representable", "Numerical result out of range"],
];
#[cfg(not(target_env = "musl"))]
const WORDS: [[&str; 2]; 0] = [];

/// Returns the part of the result that must be equal: the exit code, and both outputs. The program's own path, the
/// times, and the C library's texts are normalised.
fn outcome(program: &Path, command: &mut Command) -> (i32, String, String) {
    let ended = command.output().expect("it starts");
    let plain = |bytes: &[u8]| {
        // Each byte becomes one letter, so that no byte is mistaken for another.
        let text: String = bytes.iter().map(|byte| char::from(*byte)).collect();
        let text = text.replace(&program.display().to_string(), "flock");
        let text = WORDS.iter().fold(text, |text, [ours, theirs]| text.replace(ours, theirs));
        text.lines()
            .map(|line| match line.split_once("getting lock took ") {
                Some((begin, took)) => {
                    let seconds = took.strip_suffix(" seconds").expect("a time");
                    assert_eq!(seconds.split_once('.').map(|(_, micros)| micros.len()), Some(6), "{line}");
                    format!("{begin}getting lock took T seconds\n")
                }
                None => format!("{line}\n"),
            })
            .collect()
    };
    (code_of(&ended), plain(&ended.stdout), plain(&ended.stderr))
}

#[test]
fn flock_does_what_the_machines_own_does() {
    let Some((directory, both)) = both_flocks() else { return };
    let file = directory.path().join("file").display().to_string();
    let held = directory.path().join("held").display().to_string();
    let shared = directory.path().join("shared").display().to_string();
    let dir = directory.path().join("real").display().to_string();
    let _held = [("-x", &held), ("-s", &shared)].map(|(kind, path)| {
        let mut holder = Command::new(&both[0]);
        holder.args([kind, path, "sh", "-c", "echo held; exec sleep 60"]);
        let mut holder = Running::start(holder);
        assert_eq!(holder.line(), "held");
        holder
    });
    let (f, h, s, d) = (&*file, &*held, &*shared, &*dir);
    let cases: Vec<Vec<&str>> = vec![
        // Running commands.
        vec![f, "true"],
        vec![f, "sh", "-c", "exit 7"],
        vec![f, "sh", "-c", "kill -9 $$"],
        vec![f, "sh", "-c", "kill -TERM $$"],
        vec![f, "-c", "echo said; exit 5"],
        vec![f, "--command", "echo said"],
        vec![f, "-c"],
        vec![f, "-c", "a", "b"],
        vec![f, "--command"],
        vec![f, "/no/such/program"],
        vec![f, "/etc/passwd"],
        vec![f, "echo", "-n", "--", "-x"],
        vec![d, "true"],
        vec!["-x", d, "echo", "said"],
        vec!["/no/such/directory/file", "true"],
        vec!["/etc/passwd/file", "true"],
        vec!["", "true"],
        // Every option, also in its long forms.
        vec!["-s", f, "true"],
        vec!["--shared", f, "true"],
        vec!["-x", f, "true"],
        vec!["-e", f, "true"],
        vec!["--exclusive", f, "true"],
        vec!["-u", f, "echo", "said"],
        vec!["--unlock", h, "echo", "said"],
        vec!["-n", f, "true"],
        vec!["-n", h, "true"],
        vec!["--nonblock", h, "true"],
        vec!["--nonblocking", h, "true"],
        vec!["--nb", h, "true"],
        vec!["-n", "--verbose", h, "true"],
        vec!["-n", "-s", s, "true"],
        vec!["-ns", s, "true"],
        vec!["-nx", s, "true"],
        vec!["-n", "-s", h, "true"],
        vec!["-w", "0.05", h, "true"],
        vec!["-w0.05", h, "true"],
        vec!["-w", "0", h, "true"],
        vec!["-w", "0", "--verbose", h, "true"],
        vec!["--wait", "0.05", h, "true"],
        vec!["--timeout=0.05", h, "true"],
        vec!["--timeout", "0.05", "--verbose", h, "true"],
        vec!["-w", "5", f, "true"],
        vec!["-w", "abc", f, "true"],
        vec!["-w", "", f, "true"],
        vec!["-w", "1x", f, "true"],
        vec!["-w", "-1", f, "true"],
        vec!["-w", "1e30", f, "true"],
        vec!["-w", "inf", f, "true"],
        vec!["-w", "nan", f, "true"],
        vec!["-w", ".1", f, "true"],
        vec!["-w", " 1", f, "true"],
        vec!["-w", "1 ", f, "true"],
        vec!["-w", "0x1p-4", h, "true"],
        vec!["-w", "0x", f, "true"],
        vec!["-w", "9223372036854775807", f, "true"],
        vec!["-w", "9223372036854775808", f, "true"],
        vec!["-w"],
        vec!["--wait"],
        vec!["-E", "42", "-n", h, "true"],
        vec!["-E42", "-n", h, "true"],
        vec!["-nE", "42", h, "true"],
        vec!["--conflict-exit-code", "42", "-w", "0.01", h, "true"],
        vec!["--conflict-exit-code=0", "-n", h, "true"],
        vec!["-E", "42", f, "true"],
        vec!["-E", "256", f, "true"],
        vec!["-E", "010", "-n", h, "true"],
        vec!["-E", "0x10", f, "true"],
        vec!["-E", "7 ", f, "true"],
        vec!["-E", "2147483648", f, "true"],
        vec!["-E", "1", "-nE2", h, "true"],
        vec!["-E", "-1", f, "true"],
        vec!["-E", "x", f, "true"],
        vec!["-E", "", f, "true"],
        vec!["-E", " 7", "-n", h, "true"],
        vec!["-E", "+7", "-n", h, "true"],
        vec!["-E", "99999999999", f, "true"],
        vec!["-E", "99999999999999999999999", f, "true"],
        vec!["-o", f, "true"],
        vec!["--close", f, "sh", "-c", "ls /proc/self/fd | wc -l"],
        vec!["-F", f, "sh", "-c", "exit 3"],
        vec!["--no-fork", f, "/no/such/program"],
        vec!["-F", "-o", f, "true"],
        vec!["--verbose", f, "true"],
        vec!["--verbose", "-s", f, "-c", "echo said"],
        vec!["--verb", f, "true"],
        // Invalid arguments.
        vec![],
        vec!["-n"],
        vec!["-z"],
        vec!["-nz", f, "true"],
        vec!["-?"],
        vec!["--bogus"],
        vec!["--bogus=1"],
        vec!["--no", f, "true"],
        vec!["--n", f, "true"],
        vec!["--ver"],
        vec!["-é", f, "true"],
        vec!["--é=1", f, "true"],
        vec!["-z", "-h"],
        vec!["--c", f, "true"],
        vec!["--e", f, "true"],
        vec!["--u", h, "true"],
        vec!["--t", "0.01", h, "true"],
        vec!["-s=1", f, "true"],
        vec!["--w", "0.01", h, "true"],
        vec!["--shared=1", f, "true"],
        vec!["-c", "true", f],
        vec!["--", f, "true"],
        vec!["--", "-n", "true"],
        vec!["-", "true"],
        // Descriptors.
        vec!["99"],
        vec!["-1"],
        vec!["--", "-1"],
        vec!["abc"],
        vec!["99999999999"],
        vec!["+99"],
        vec!["0x0"],
        vec!["0 "],
        vec![" 0"],
        vec!["0"],
        vec!["-o", "0"],
        vec!["-F", "0"],
        vec!["--verbose", "0"],
        vec!["-u", "0"],
        vec!["-n", "-x", "0"],
    ];
    for arguments in cases {
        let ended = both.each_ref().map(|program| {
            let mut command = Command::new(program);
            // The commands run in a directory of their own, because one case creates files with odd names.
            command.args(&arguments).stdin(File::open("/etc/hostname").expect("a file")).current_dir(directory.path());
            command.env("SHELL", "/bin/sh").env("LC_ALL", "C");
            let (code, stdout, stderr) = outcome(program, &mut command);
            // If the output is a pipe, the machine's own flock writes its messages after the command's.
            let mut lines: Vec<_> = stdout.lines().map(str::to_owned).collect();
            lines.sort_unstable();
            (code, lines, stderr)
        });
        assert_eq!(ended[1], ended[0], "flock {arguments:?}");
    }
}

#[test]
fn flock_by_descriptor_does_what_the_machines_own_does() {
    let Some((directory, both)) = both_flocks() else { return };
    let scripts = [
        // The shell holds the lock from the command on, until it closes the descriptor.
        "exec 9>file; flock -n 9; echo $?; real -n file true; echo $?; exec 9>&-; real -n file true; echo $?",
        "(flock -x 8; real -n file true; echo $?) 8>file; real -n file true; echo $?",
        "exec 9>file; flock 9; flock -u 9; real -n file true; echo $?",
        "exec 9<file; flock -s 9; real -ns file true; echo $?; real -nx file true; echo $?",
        "exec 8>file 9>file; real 8; flock -n 9; echo $?; flock -n -E 5 --verbose 9; echo $?; flock -w 0.05 9; echo $?",
        "exec 8>file 9>file; real -s 8; flock -n -s 9; echo $?; flock -n 9; echo $?; flock -u 8; flock -n 9; echo $?",
        "exec 9>file; flock -n 7; echo $?; flock 9 9>&-; echo $?",
        // Closed descriptors count as missing, whatever Rust's runtime opens in their place.
        "flock 0 <&-; echo $?; flock 1 2>&1 >&-; echo $?; flock 2 2>&-; echo $?",
        "flock -h >&-; echo $?; flock file echo said >&-; echo $?; flock --verbose file true >&- 2>&-; echo $?",
        "flock -F file sh -c 'ls /proc/self/fd | wc -w' <&-; flock file sh -c 'ls /proc/self/fd | wc -w' <&-",
        "flock -z 2>/dev/full; echo $?; flock -n 2>&-; echo $?; flock --verbose file true 2>/dev/full; echo $?",
        // Bytes that are not valid text.
        "flock /no/such/$'f\\xff' true; flock file $'no\\xff'; flock -w $'\\xff' file true; flock -E $'\\xff' file true",
        "flock $'\\xff'; flock -n$'\\xff' file true; flock --n$'\\xff' file true; flock $'f\\xff' true; ls",
        // Files of other users, and files that may not be read or created.
        "chmod 755 .; chmod 600 file; [ $(id -u) != 0 ] || setpriv --reuid 65534 --clear-groups flock file true; echo $?",
        "chmod 755 .; chmod 644 file; [ $(id -u) != 0 ] || setpriv --reuid 65534 --clear-groups flock file true; echo $?",
        "chmod 755 .; [ $(id -u) != 0 ] || setpriv --reuid 65534 --clear-groups flock new true; echo $?; ls",
        "umask 027; flock new true; stat -c %a new; ln -s nowhere a; flock a true; ln -s b b; flock b true; ls",
        "flock dir/new true; flock file/ true; flock $(printf 'a%.0s' $(seq 300)) true; flock /dev/null echo said",
        "SHELL= flock file -c 'echo $0'; unset SHELL; flock file -c 'echo $0'; SHELL=/no/such flock file -c true; echo $?",
        "mkfifo fifo; exec 9<>fifo; flock 9; echo $?; exec 9<.; flock -n 9; echo $?; flock 9 -c 'echo said' 9>file; ls",
        // Signals: a command that receives one, and flock itself.
        "flock file sh -c 'kill -SEGV $$'; echo $?; trap '' INT CHLD; flock file sh -c 'kill -INT $$; exit 4'; echo $?",
        "flock file sh -c 'kill $PPID' & wait $!; echo $?; flock -w 9 file sh -c 'kill -INT $$' & wait $!; echo $?",
        // The command inherits the descriptor by default, and its surviving children keep the lock.
        "flock file sh -c 'sleep 60 > /dev/null 2>&1 & echo $! > pid'; real -n file true; echo $?; kill $(cat pid)",
        "flock -o file sh -c 'sleep 60 > /dev/null 2>&1 & echo $! > pid'; real -n file true; echo $?; kill $(cat pid)",
        // Without a fork the command has flock's own pid.
        "flock -F file sh -c 'echo $$' & wait $!; [ $! = $! ] && echo same",
        "flock -F file sh -c 'sleep 60 > /dev/null 2>&1 & echo $! > pid'; real -n file true; echo $?; kill $(cat pid)",
    ];
    for script in scripts {
        let ended = both.each_ref().map(|program| {
            let work = TempDir::new_in(directory.path()).expect("a directory");
            fs::write(work.path().join("file"), "").expect("a file");
            let script = script.replace("real", &both[0].display().to_string());
            let path = format!(
                "{}:{}",
                program.parent().expect("a directory").display(),
                std::env::var("PATH").expect("a path")
            );
            let mut command = Command::new("bash");
            command.args(["-c", &script]).current_dir(work.path()).env("PATH", path).env("LC_ALL", "C");
            let (code, mut stdout, stderr) = outcome(program, &mut command);
            if script.contains("echo $$") {
                stdout = stdout.lines().skip(1).collect();
            }
            (code, stdout, stderr)
        });
        assert_eq!(ended[1], ended[0], "{script}");
    }
}

#[test]
fn flock_subcommand_excludes_system_flock() {
    let Some((directory, both)) = both_flocks() else { return };
    let file = directory.path().join("file").display().to_string();
    let mut holder = lockkit(["flock", &file, "sh", "-c", "echo held; exec sleep 60"]);
    holder.stderr(Stdio::null());
    let mut holder = Running::start(holder);
    assert_eq!(holder.line(), "held");
    let real = |arguments: &[&str]| Command::new(&both[0]).args(arguments).status().expect("it starts").code();
    assert_eq!(real(&["-n", &file, "true"]), Some(1));
    assert_eq!(code(["flock", "-n", &file, "true"]), 1);
    assert_eq!(code(["run", "--try", "--file", &file, "--", "true"]), 75);
    assert_eq!(code(["status", &file]), 1);
    assert!(text(&output(["flock", "--help"]).stdout).contains("flock [options] <file>|<directory> <command>"));
    assert!(text(&output(["flock", "-V"]).stdout).starts_with("flock from lockkit "));
}

#[test]
fn a_timed_wait_of_flock_gets_the_lock_when_it_comes_free() {
    let directory = TempDir::new().expect("a directory");
    let file = directory.path().join("file").display().to_string();
    let mut holder = Running::start(lockkit(["flock", &file, "sh", "-c", "echo held; sleep 0.3"]));
    assert_eq!(holder.line(), "held");
    assert_eq!(code(["flock", "-w", "30", &file, "true"]), 0);
}
