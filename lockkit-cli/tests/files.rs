//! Tests of files of other programs, and of correct answers of the command about them. Each small input failed once.
//! The tests check the expected result, and variations of the input.

#![cfg(target_os = "linux")]

use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime};

use jsonschema::Validator;
use lockkit::{FileLock, Lease, NamedLock};
use rustix::process::{Pid, Signal, kill_process};
use rustix::termios::Winsize;
use serde_json::Value;
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_lockkit");

/// The time limit for anything that must happen: far more than it needs, because machines can be slow.
const BOUND: Duration = Duration::from_secs(30);

/// A user without any rights to the files of these tests.
const OTHER: u32 = 1_900_003;

fn left_out(why: &str) {
    let thread = std::thread::current();
    let _ = writeln!(std::io::stderr(), "left out: {}: {why}", thread.name().unwrap_or_default());
}

fn until(what: &str, mut fact: impl FnMut() -> bool) {
    let start = Instant::now();
    while !fact() {
        assert!(start.elapsed() < BOUND, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A directory in which the tests of this file run lockkit. Other users can reach it.
struct Site(TempDir);

impl Site {
    fn new() -> Self {
        let directory = TempDir::new_in("/tmp").expect("a directory");
        fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).expect("a directory");
        Self(directory)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        fs::write(self.path(name), content).expect("a file");
        self.path(name)
    }

    /// As [`write`](Self::write), with a modification time one hour ago.
    fn write_old(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.write(name, content);
        let hour_ago = SystemTime::now() - Duration::from_secs(3600);
        File::options().write(true).open(&path).and_then(|file| file.set_modified(hour_ago)).expect("a file");
        path
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(arguments).current_dir(self.0.path()).stdin(Stdio::null()).env_remove("NO_COLOR");
        command
    }

    fn run(&self, arguments: &[&str]) -> Ended {
        Ended::of(&mut self.command(arguments))
    }

    /// As [`run`](Self::run), as another user. Returns `None`, and prints the reason, if that is impossible.
    fn run_as_other(&self, arguments: &[&str]) -> Option<Ended> {
        if !rustix::process::geteuid().is_root() {
            left_out("only root can act as another user");
            return None;
        }
        let id = OTHER.to_string();
        let mut command = Command::new("setpriv");
        command.args(["--reuid", &id, "--regid", &id, "--clear-groups", PROGRAM]).args(arguments);
        command.current_dir(self.0.path()).stdin(Stdio::null());
        let ended = Ended::of(&mut command);
        if ended.code == 126 || ended.code == 127 {
            left_out("another user cannot run what was built here");
            return None;
        }
        Some(ended)
    }

    /// Starts `lockkit run` with these options, whose program prints `held` and keeps running.
    fn hold(&self, options: &[&str]) -> Running {
        let mut command = self.command(&["run"]);
        command.args(options).args(["--", "sh", "-c", "echo held; exec sleep 60"]);
        let mut running = Running::start(command);
        assert_eq!(running.line(), "held", "{options:?}");
        running
    }
}

/// The result of an ended command.
struct Ended {
    code: i32,
    out: String,
    err: String,
}

impl Ended {
    fn of(command: &mut Command) -> Self {
        let Output { status, stdout, stderr } = command.output().expect("it starts");
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self { code: status.code().unwrap_or(-1), out: text(stdout), err: text(stderr) }
    }

    /// Parses the output, which must match the schema.
    fn json(&self) -> Value {
        static SCHEMA: LazyLock<Validator> = LazyLock::new(|| {
            let schema = serde_json::from_str(include_str!("../src/forms.schema.json")).expect("JSON");
            jsonschema::validator_for(&schema).expect("a schema")
        });
        let form = serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"));
        assert!(SCHEMA.is_valid(&form), "{form}");
        form
    }
}

impl std::fmt::Debug for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "exit {}: {:?}, {:?}", self.code, self.out, self.err)
    }
}

/// A program that ends with the test, by a signal that lockkit forwards. A killed lockkit would leave its lock to its
/// program.
struct Running {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Running {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().expect("it starts");
        let lines = BufReader::new(child.stdout.take().expect("a pipe"));
        Self { child, lines }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("a line");
        line.trim_end().to_owned()
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw).expect("a pid");
        kill_process(pid, signal).expect("it runs");
    }

    fn code(&mut self) -> i32 {
        self.child.wait().expect("a child").code().unwrap_or(-1)
    }
}

impl Drop for Running {
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

fn sleeper() -> Running {
    let mut command = Command::new("sh");
    command.args(["-c", "echo ready; exec sleep 60"]);
    let mut running = Running::start(command);
    assert_eq!(running.line(), "ready");
    running
}

/// Returns the pid of a process that has ended.
fn dead() -> u32 {
    let mut child = Command::new("true").spawn().expect("it starts");
    child.wait().expect("a child");
    child.id()
}

fn fresh_name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("files-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

// Files of other programs (A).

#[test]
fn a1_lease_on_other_file_is_refused_and_leaves_it() {
    let site = Site::new();
    let contents: [(&str, &[u8]); 4] = [
        ("notes.txt", b"one\ntwo\n"),
        ("data.db", b"SQLite format 3\0and more"),
        ("table", b"lockkitT but no table"),
        ("script", b"#!/bin/sh\nexit 0\n"),
    ];
    for (name, content) in contents {
        let path = site.write_old(name, content);
        let ended = site.run(&["run", "--timeout", "4s", "--lease", name, "--", "echo", "RAN"]);
        assert_eq!((ended.code, &*ended.out), (65, ""), "{name}: {ended:?}");
        assert_eq!(fs::read(&path).expect("a file"), content, "{name}");
        assert_eq!(site.run(&["lease", "show", name]).code, 65, "{name}");
    }
}

#[test]
fn a2_pidfile_on_other_file_is_refused_and_leaves_it() {
    let site = Site::new();
    let lease = Lease::file(site.path("free.pid")).build().expect("a lease");
    lease.try_lock().expect("a free lease").release().expect("a release");
    let free = fs::read(site.path("free.pid")).expect("a file");
    let contents: [(&str, &[u8]); 4] =
        [("app.conf", b"key = value\n"), ("app.pid", b"not a pid\n"), ("zero.pid", b"0\n"), ("free.pid", &free)];
    for (name, content) in contents {
        let path = site.write_old(name, content);
        let ended = site.run(&["run", "--try", "--pidfile", &site.text(name), "--", "echo", "RAN"]);
        assert_eq!((ended.code, &*ended.out), (65, ""), "{name}: {ended:?}");
        assert_eq!(fs::read(&path).expect("a file"), content, "{name}");
    }
}

#[test]
fn a3_pidfile_of_live_program_is_held_in_every_form() {
    let site = Site::new();
    let program = sleeper();
    let pid = program.pid();
    let forms = [
        format!("{pid}\n"),
        format!("{pid}"),
        format!("{pid} host.example"),
        format!("\n{pid}\n"),
        format!("\n\n  {pid}\n"),
        format!("{pid}\nhost.example\n"),
        format!("{pid}\0"),
        format!("{pid}\r\n"),
    ];
    for form in forms {
        let path = site.write_old("gc.pid", &form);
        // A file that is older than the process would belong to an earlier process.
        File::options().write(true).open(&path).and_then(|file| file.set_modified(SystemTime::now())).expect("a file");
        assert_eq!(site.run(&["pidfile", "check", "gc.pid"]).code, 1, "{form:?}");
        assert_eq!(site.run(&["status", "./gc.pid"]).code, 1, "{form:?}");
        let ended = site.run(&["run", "--try", "--pidfile", "gc.pid", "--", "echo", "RAN"]);
        assert_eq!((ended.code, &*ended.out), (75, ""), "{form:?}: {ended:?}");
        assert_eq!(fs::read_to_string(&path).expect("a file"), form);
        assert_eq!(site.run(&["wait", "--timeout", "50ms", "./gc.pid"]).code, 75, "{form:?}");
    }
}

#[test]
fn a4_pidfile_is_one_word_for_kill() {
    let site = Site::new();
    let mut running = site.command(&["run", "--pidfile", "app.pid", "--", "sh", "-c", "echo $$; exec sleep 60"]);
    running.current_dir(site.0.path());
    let mut running = Running::start(running);
    let pid = running.line();
    until("it names the program", || {
        fs::read_to_string(site.path("app.pid")).unwrap_or_default() == format!("{pid}\n")
    });
    running.signal(Signal::TERM);
    assert_eq!(running.code(), 128 + 15);
}

#[test]
fn a8_old_damaged_lease_is_healed_by_try() {
    let site = Site::new();
    let zeros: [&[u8]; 3] = [b"", &[0; 1024], b"lockkit lease 1"];
    for content in zeros {
        site.write_old("empty.lease", content);
        // One attempt may be needed to observe that the file does not change.
        let ran = (0..3).any(|_| {
            let ended = site.run(&["run", "--try", "--lease", "empty.lease", "--", "echo", "RAN"]);
            if ended.code != 0 {
                std::thread::sleep(Duration::from_secs(1));
            }
            ended.out == "RAN\n"
        });
        assert!(ran, "{} bytes", content.len());
        assert_eq!(site.run(&["status", "./empty.lease"]).code, 0);
        assert_eq!(site.run(&["lease", "show", "empty.lease"]).code, 0);
    }
}

#[test]
fn a8_status_and_lease_show_agree_on_damaged_lease() {
    let site = Site::new();
    for content in [&b""[..], &[0; 1024], &[0; 100], b"lockkit lease 1"] {
        for old in [false, true] {
            match old {
                true => site.write_old("x.lease", content),
                false => site.write("x.lease", content),
            };
            let [status, show] = [["status", "./x.lease"].as_slice(), &["lease", "show", "x.lease"]]
                .map(|arguments| site.run(arguments).code);
            assert_eq!(status, show, "{} bytes, old: {old}", content.len());
        }
    }
}

#[test]
fn b6_dry_run_of_clean_promises_what_clean_does() {
    let site = Site::new();
    let content = format!("{}\n", dead());
    site.write("a.pid", &content);
    fs::hard_link(site.path("a.pid"), site.path("b.pid")).expect("a link");
    site.write("single.pid", &content);
    symlink(site.path("single.pid"), site.path("link.pid")).expect("a link");
    site.write_old("junk.pid", "junk\n");
    for name in ["a.pid", "link.pid", "junk.pid", "single.pid"] {
        let dry = site.run(&["pidfile", "clean", "--dry-run", name]);
        let clean = site.run(&["pidfile", "clean", name]);
        assert_eq!(dry.code, clean.code, "{name}: {dry:?}, {clean:?}");
        assert_eq!(dry.out.contains("would remove"), clean.out.contains("removed"), "{name}: {dry:?}, {clean:?}");
        assert_eq!(clean.out.contains("removed"), !site.path(name).is_symlink() && !site.path(name).exists(), "{name}");
    }
    assert_eq!(site.run(&["pidfile", "clean", "nosuchdir"]).code, 66);
}

#[test]
fn d8_scheme_with_one_slash_is_a_usage_error() {
    let site = Site::new();
    for url in [
        "redis:/host/x",
        "redis:host/x",
        "REDIS:/host/x",
        "etcd:/host/x",
        "postgres:/host/db/x",
        "postgresql:/host/db/x",
        "rediss:/host/x",
        "valkey:/host/x",
        "http:/host/x",
        "https:/host/x",
        "file:/srv/x",
        "redis:///",
    ] {
        for arguments in
            [["run", "--try", "--lease", url, "--", "true"].as_slice(), &["status", url], &["lease", "show", url]]
        {
            let ended = site.run(arguments);
            // If the form is valid, the first error is about a missing engine.
            assert!(ended.code == 64 || url == "redis:///" && ended.code == 69, "{arguments:?}: {ended:?}");
            assert!(!ended.err.is_empty());
        }
    }
    assert_eq!(fs::read_dir(site.0.path()).expect("a directory").count(), 0, "nothing was made");
    // A file with that name remains accessible.
    fs::create_dir_all(site.path("redis:/host")).expect("directories");
    assert_eq!(site.run(&["run", "--lease", "./redis:/host/x", "--", "true"]).code, 0);
    let url = "redis:/user:secret@host/x";
    assert!(!site.run(&["status", url]).err.contains("secret"));
}

#[test]
fn a10_mode_is_exact_whatever_the_umask_is() {
    let site = Site::new();
    for (kind, name) in [("--file", "a.lock"), ("--pidfile", "a.pid"), ("--lease", "a.lease")] {
        for (umask, mode) in [("077", "664"), ("000", "600"), ("022", "666"), ("027", "640")] {
            let _ = fs::remove_file(site.path(name));
            let script = format!("umask {umask}; exec {PROGRAM} run {kind} {name} --mode {mode} -- stat -c %a {name}");
            let mut command = Command::new("sh");
            command.args(["-c", &script]).current_dir(site.0.path()).stdin(Stdio::null());
            let ended = Ended::of(&mut command);
            assert_eq!((ended.code, ended.out.trim()), (0, mode), "{kind}, umask {umask}: {ended:?}");
        }
    }
    // Without the option, the mode of the file is as with flock(1).
    let mut command = Command::new("sh");
    command.args(["-c", &format!("umask 027; exec {PROGRAM} run --file b.lock -- stat -c %a b.lock")]);
    command.current_dir(site.0.path()).stdin(Stdio::null());
    assert_eq!(Ended::of(&mut command).out.trim(), "640");
}

#[test]
fn a11_parents_are_made_on_request_alone() {
    let site = Site::new();
    for kind in ["--file", "--pidfile", "--lease"] {
        let path = site.text(&format!("{kind}/deep/lock"));
        let refused = site.run(&["run", kind, &path, "--", "true"]);
        assert_eq!(refused.code, 66, "{kind}: {refused:?}");
        assert!(!site.path(kind).exists(), "{kind}");
        let made = site.run(&["run", kind, &path, "--create-parents", "--", "true"]);
        assert_eq!(made.code, 0, "{kind}: {made:?}");
        assert!(site.path(&format!("{kind}/deep")).is_dir(), "{kind}");
    }
}

#[test]
fn a10_mode_and_create_parents_need_a_file() {
    let site = Site::new();
    let cases: [&[&str]; 8] = [
        &["--name", "a", "--mode", "600"],
        &["--name", "a", "--create-parents"],
        &["--lease", "redis://host/x", "--mode", "600"],
        &["--lease", "etcd://host/x", "--create-parents"],
        &["--file", "a", "--mode", "rw"],
        &["--file", "a", "--mode", "1777"],
        &["--file", "a", "--mode", "0o600"],
        &["--pidfile", "a", "--mode", "444"],
    ];
    for options in cases {
        let mut command = site.command(&["run"]);
        let ended = Ended::of(command.args(options).args(["--", "true"]));
        assert_eq!(ended.code, 64, "{options:?}: {ended:?}");
        assert!(ended.err.contains("For example: lockkit "), "{options:?}: {ended:?}");
    }
}

// Answers (B).

#[test]
fn b1_unreadable_lock_is_unknown_never_free() {
    let site = Site::new();
    let _lease = site.hold(&["--lease", "held.lease"]);
    let _pidfile = site.hold(&["--pidfile", &site.text("held.pid")]);
    let _file = site.hold(&["--file", "held.lock"]);
    site.write("free", "");
    let table = site.text("table");
    assert_eq!(site.run(&["table", "create", &table]).code, 0);
    fs::create_dir(site.path("closed")).expect("a directory");
    site.write("closed/x.lease", "");
    symlink("closed/x.lease", site.path("link")).expect("a link");
    for name in ["held.lease", "held.pid", "held.lock", "free", "table"] {
        fs::set_permissions(site.path(name), Permissions::from_mode(0o600)).expect("a file");
    }
    fs::set_permissions(site.path("closed"), Permissions::from_mode(0o700)).expect("a directory");
    let names =
        ["held.lease", "held.pid", "held.lock", "free", "table", "closed", "closed/x.lease", "closed/none", "link"];
    for name in names {
        let path = format!("./{name}");
        let Some(status) = site.run_as_other(&["status", &path]) else { return };
        assert_eq!((status.code, &*status.out), (77, ""), "{name}: {status:?}");
        let told = status.err.contains(name) && status.err.contains("ask as its owner or as root");
        assert!(told && status.err.lines().count() == 1, "{name}: {status:?}");
        let wait = site.run_as_other(&["wait", "--timeout", "1s", &path]).expect("another user");
        assert_eq!((wait.code, &wait.err), (77, &status.err), "{name}");
        let quiet = site.run_as_other(&["status", "--quiet", &path]).expect("another user");
        assert_eq!((quiet.code, &*quiet.err), (77, ""), "{name}");
        let json = site.run_as_other(&["status", "--json", &path]).expect("another user");
        assert_eq!((json.code, &json.json()["lock"]["state"]), (77, &"unknown".into()), "{name}: {json:?}");
    }
    let url = format!("file://{}", site.text("held.lease"));
    assert_eq!(site.run_as_other(&["status", &url]).expect("another user").code, 77);
    assert_eq!(site.run_as_other(&["lease", "show", "held.lease"]).expect("another user").code, 77);
}

#[test]
fn b1_named_lock_in_unreadable_file_is_unknown() {
    let site = Site::new();
    let name = fresh_name();
    let path = PathBuf::from(format!("/tmp/lockkit-machine-{name}.lock"));
    let file = File::create(&path).expect("a file");
    fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("a file");
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).expect("a free lock");
    for command in [&["status"][..], &["wait", "--timeout", "1s"]] {
        let arguments: Vec<&str> = command.iter().copied().chain(["--scope", "machine", &name]).collect();
        let asked = site.run_as_other(&arguments);
        // A user that may read it finds no record, and the kernel reports the lock.
        let seen = site.run(&arguments);
        if let Some(asked) = asked {
            assert!(asked.code == 77 && asked.err.contains(&*path.to_string_lossy()), "{asked:?}");
        }
        assert_eq!(seen.code, if command[0] == "status" { 1 } else { 75 }, "{seen:?}");
    }
    drop(file);
    fs::remove_file(&path).expect("it is there");
    assert_eq!(site.run(&["status", "--scope", "machine", &name]).code, 0);
}

#[test]
fn b1_list_shows_unreadable_files_as_unknown() {
    let site = Site::new();
    let _lease = site.hold(&["--lease", "held.lease"]);
    site.write("secret.pid", "1\n");
    site.write("open.txt", "text\n");
    symlink("nowhere", site.path("dangling.pid")).expect("a link");
    symlink("loop.pid", site.path("loop.pid")).expect("a link");
    fs::create_dir(site.path("closed")).expect("a directory");
    for name in ["held.lease", "secret.pid"] {
        fs::set_permissions(site.path(name), Permissions::from_mode(0o600)).expect("a file");
    }
    fs::set_permissions(site.path("closed"), Permissions::from_mode(0o700)).expect("a directory");
    let here = site.0.path().display().to_string();
    let Some(listed) = site.run_as_other(&["list", "--json", &here]) else { return };
    assert_eq!(listed.code, 0, "{listed:?}");
    let form = listed.json();
    let rows: Vec<_> = form["locks"].as_array().expect("locks").iter().collect();
    let state = |name: &str| {
        let path = site.text(name);
        rows.iter().find(|row| row["name"] == *path).map(|row| row["state"].as_str().unwrap_or_default().to_owned())
    };
    for name in ["held.lease", "secret.pid", "closed"] {
        assert_eq!(state(name).as_deref(), Some("unknown"), "{name}: {form}");
    }
    for name in ["open.txt", "dangling.pid"] {
        assert_eq!(state(name), None, "{name}: {form}");
    }
    let text = site.run_as_other(&["list", &here]).expect("another user");
    assert!(text.out.lines().any(|line| line.contains("held.lease") && line.contains("unknown")), "{text:?}");
    // An unreadable argument makes the command fail with that error, after the other rows.
    for name in ["closed", "closed/x", "held.lease"] {
        let refused = site.run_as_other(&["list", "--json", name, &here]).expect("another user");
        assert_eq!(refused.code, 77, "{name}: {refused:?}");
        assert!(refused.err.contains(name) && !refused.json()["locks"].as_array().expect("locks").is_empty());
    }
}

#[test]
fn b1_links_that_lead_nowhere_are_errors() {
    let site = Site::new();
    symlink("nowhere", site.path("dangling")).expect("a link");
    symlink("loop", site.path("loop")).expect("a link");
    assert_eq!(site.run(&["status", "./dangling"]).code, 66);
    assert_eq!(site.run(&["wait", "./dangling"]).code, 66);
    assert_eq!(site.run(&["status", "./loop"]).code, 74);
    assert_eq!(site.run(&["status", "./nosuch"]).code, 0, "nobody can hold what is not there");
    assert_eq!(site.run(&["status", "./nosuch/file"]).code, 0);
}

#[test]
fn b1_without_proc_held_locks_are_still_held() {
    if !rustix::process::geteuid().is_root() {
        left_out("only root can hide /proc");
        return;
    }
    let site = Site::new();
    let _file = site.hold(&["--file", "held.lock"]);
    let _shared = site.hold(&["--file", "shared.lock", "--shared"]);
    let _lease = site.hold(&["--lease", "held.lease"]);
    let name = fresh_name();
    let _named = site.hold(&["--name", &name]);
    site.write("free.lock", "");
    for (place, code) in
        [("./held.lock", 1), ("./shared.lock", 1), ("./held.lease", 1), (&*name, 1), ("./free.lock", 0)]
    {
        let script = format!("mount -t tmpfs none /proc && exec {PROGRAM} status {place}");
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script]).current_dir(site.0.path()).stdin(Stdio::null());
        let ended = Ended::of(&mut command);
        assert_eq!(ended.code, code, "{place}: {ended:?}");
    }
}

#[test]
fn b2_status_of_name_tells_of_file_with_that_name() {
    let site = Site::new();
    let name = fresh_name();
    let none = site.run(&["status", &name]);
    assert_eq!((none.code, &*none.err), (0, ""));
    let _file = site.hold(&["--file", &name]);
    let status = site.run(&["status", &name]);
    assert_eq!(status.code, 0, "the named lock is free: {status:?}");
    assert!(status.err.contains(&format!("./{name}")) && status.out.contains("is free"), "{status:?}");
    let json = site.run(&["status", "--json", &name]);
    assert_eq!(json.json()["lock"]["kind"], "named");
    assert!(json.err.contains(&format!("./{name}")));
    let quiet = site.run(&["status", "--quiet", &name]);
    assert_eq!((&*quiet.out, &*quiet.err), ("", ""));
    let wait = site.run(&["wait", &name]);
    assert!(wait.code == 0 && wait.err.contains(&format!("./{name}")), "{wait:?}");
    assert_eq!(site.run(&["wait", "--quiet", &name]).err, "");
    assert_eq!(site.run(&["status", &format!("./{name}")]).code, 1);
    // The same holds for text that cannot be a name.
    site.write("1.lock", "");
    let refused = site.run(&["status", "1.lock"]);
    assert!(refused.code == 64 && refused.err.contains("./1.lock"), "{refused:?}");
}

/// Starts programs that keep every processor busy until they are dropped.
fn busy() -> Vec<Running> {
    let hog = || {
        let mut command = Command::new("sh");
        command.args(["-c", "while :; do :; done"]);
        Running::start(command)
    };
    let processors = std::thread::available_parallelism().map_or(2, |number| number.get());
    (0..2 * processors).map(|_| hog()).collect()
}

#[test]
fn b3_wait_reads_no_processes_and_is_not_late() {
    let site = Site::new();
    let _busy = busy();
    for kind in ["--file", "--name", "--pidfile", "--lease"] {
        let place = match kind {
            "--name" => fresh_name(),
            _ => format!("./{kind}.lock"),
        };
        let late: Vec<_> = (0..3)
            .map(|_| {
                let mut holder = site.command(&["run", kind, &place, "--", "sh", "-c", "echo held; cat"]);
                let mut holder = Running::start({
                    holder.stdin(Stdio::piped());
                    holder
                });
                assert_eq!(holder.line(), "held");
                let mut waiting = Running::start(site.command(&["wait", &place]));
                // The wait lasts longer than the time in which its pauses grow.
                std::thread::sleep(Duration::from_millis(300));
                assert!(waiting.child.try_wait().expect("a child").is_none(), "{kind}");
                drop(holder.child.stdin.take());
                assert_eq!(holder.code(), 0);
                let free = Instant::now();
                assert_eq!(waiting.code(), 0, "{kind}");
                free.elapsed()
            })
            .collect();
        println!("{kind}: {late:?}");
        // 50 ms, and the time that a machine with four programs per processor needs to schedule this test again.
        assert!(late.iter().min() < Some(&Duration::from_millis(250)), "{kind}: {late:?}");
    }
}

#[test]
fn b3_wait_for_a_shared_holder_waits() {
    let site = Site::new();
    let holder = site.hold(&["--file", "a.lock", "--shared"]);
    assert_eq!(site.run(&["wait", "--timeout", "100ms", "./a.lock"]).code, 75);
    // A query does not affect the other holders.
    assert_eq!(site.run(&["run", "--try", "--file", "a.lock", "--shared", "--", "true"]).code, 0);
    drop(holder);
    assert_eq!(site.run(&["wait", "--timeout", "30s", "./a.lock"]).code, 0);
}

#[test]
fn b3_wait_for_a_name_takes_no_place_in_the_queue() {
    let site = Site::new();
    let name = fresh_name();
    let _holder = site.hold(&["--name", &name]);
    let waiting: Vec<_> = (0..3).map(|_| Running::start(site.command(&["wait", &name]))).collect();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(site.run(&["status", "--json", &name]).json()["lock"]["waiters"], 0);
    drop(waiting);
}

/// Starts a Python program that prints `held` after it has run `script`, and keeps running. Returns `None` without
/// Python.
fn python(site: &Site, script: &str) -> Option<Running> {
    let script = format!("import fcntl, struct, sys, time\n{script}\nprint('held', flush=True)\ntime.sleep(60)\n");
    let mut command = Command::new("python3");
    command.args(["-c", &script]).current_dir(site.0.path()).stdin(Stdio::null()).stdout(Stdio::piped());
    let Ok(mut child) = command.spawn() else {
        left_out("python3 is not installed");
        return None;
    };
    let lines = BufReader::new(child.stdout.take().expect("a pipe"));
    let mut running = Running { child, lines };
    assert_eq!(running.line(), "held", "{script}");
    Some(running)
}

#[test]
fn b5_files_locked_by_fcntl_are_held() {
    let site = Site::new();
    let open = "file = open('data', 'r+b')";
    // struct flock of 64-bit Linux: type, whence, start, length, pid.
    let ofd = |kind: &str, start: u32, length: u32| {
        format!("{open}\nfcntl.fcntl(file, 37, struct.pack('hhqqi', fcntl.{kind}, 0, {start}, {length}, 0))")
    };
    let cases = [
        ("lockf", format!("{open}\nfcntl.lockf(file, fcntl.LOCK_EX)"), true),
        ("a range", format!("{open}\nfcntl.lockf(file, fcntl.LOCK_EX, 512, 0x40000000)"), true),
        ("a read lock", format!("{open}\nfcntl.lockf(file, fcntl.LOCK_SH)"), true),
        ("OFD", ofd("F_WRLCK", 0, 0), true),
        ("OFD on a byte", ofd("F_RDLCK", 7, 1), true),
    ];
    for (name, script, has_pid) in cases {
        site.write("data", "0123456789");
        let Some(mut holder) = python(&site, &script) else { return };
        let status = site.run(&["status", "--json", "./data"]);
        let lock = &status.json()["lock"];
        assert_eq!(
            (status.code, &lock["kind"], &lock["state"]),
            (1, &"fcntl".into(), &"held".into()),
            "{name}: {lock}"
        );
        if has_pid {
            assert_eq!(lock["holders"][0]["pid"], holder.pid(), "{name}: {lock}");
        }
        assert!(site.run(&["status", "./data"]).out.starts_with("fcntl "), "{name}");
        let listed = site.run(&["list", "--json"]).json();
        let rows: Vec<_> = listed["locks"].as_array().expect("locks").iter().collect();
        let rows: Vec<_> = rows.into_iter().filter(|row| row["name"] == *site.text("data")).collect();
        assert!(rows.len() == 1 && rows[0]["kind"] == "fcntl", "{name}: {rows:?}");
        assert_eq!(site.run(&["wait", "--timeout", "50ms", "./data"]).code, 75, "{name}");
        // Each mechanism is independent of the other.
        assert!(FileLock::new(site.path("data")).try_lock().is_ok(), "{name}");
        assert_eq!(FileLock::new(site.path("data")).holders().expect("a file"), [], "{name}");
        holder.child.kill().expect("it runs");
        assert_eq!(site.run(&["wait", "--timeout", "30s", "./data"]).code, 0, "{name}");
        assert_eq!(site.run(&["status", "./data"]).code, 0, "{name}");
    }
}

#[test]
fn b5_sqlite_database_in_use_is_held() {
    let site = Site::new();
    let script = "import sqlite3\nbase = sqlite3.connect('app.db', isolation_level=None)\n\
                  base.execute('create table t (x)')\nbase.execute('begin exclusive')";
    let Some(holder) = python(&site, script) else { return };
    let status = site.run(&["status", "./app.db"]);
    assert!(
        status.code == 1 && status.out.contains("fcntl") && status.out.contains(&holder.pid().to_string()),
        "{status:?}"
    );
}

#[test]
fn b5_file_locked_both_ways_has_two_rows() {
    let site = Site::new();
    site.write("both", "");
    let script = "file = open('both', 'r+b')\nfcntl.lockf(file, fcntl.LOCK_EX)\nfcntl.flock(file, fcntl.LOCK_EX)";
    let Some(_holder) = python(&site, script) else { return };
    let listed = site.run(&["list", "--json"]).json();
    let rows: Vec<_> = listed["locks"].as_array().expect("locks").iter().collect();
    let kinds: Vec<_> =
        rows.iter().filter(|row| row["name"] == *site.text("both")).map(|row| row["kind"].clone()).collect();
    assert_eq!(kinds, ["file", "fcntl"]);
    let status = site.run(&["status", "--json", "./both"]);
    assert_eq!((status.code, &status.json()["lock"]["kind"]), (1, &"file".into()));
}

#[test]
fn b5_fcntl_lock_of_hidden_process_is_held() {
    if !rustix::process::geteuid().is_root() {
        left_out("only root can make a pid namespace");
        return;
    }
    let site = Site::new();
    site.write("data", "");
    let Some(_holder) = python(&site, "file = open('data', 'r+b')\nfcntl.lockf(file, fcntl.LOCK_EX)") else { return };
    // The kernel's table hides the locks of processes outside the namespace.
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--mount-proc", PROGRAM, "status", "./data"]).current_dir(site.0.path());
    let ended = Ended::of(command.stdin(Stdio::null()));
    assert!(ended.code == 1 && ended.out.starts_with("fcntl "), "{ended:?}");
    let _flock = site.hold(&["--file", "shared.lock", "--shared"]);
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--mount-proc", PROGRAM, "status", "./shared.lock"]).current_dir(site.0.path());
    let ended = Ended::of(command.stdin(Stdio::null()));
    assert!(ended.code == 1 && ended.out.starts_with("file "), "{ended:?}");
}

#[test]
fn b5_locks_of_pidfiles_and_tables_are_no_rows_of_their_own() {
    use lockkit::{LockManager, ShmLockManager};
    let site = Site::new();
    let table = ShmLockManager::create(site.path("table"), 8).expect("a table");
    let _guard = table.allocate().and_then(|lock| lock.lock()).expect("a free lock");
    let _pidfile = site.hold(&["--pidfile", "app.pid"]);
    let _lease = site.hold(&["--lease", "leader"]);
    let listed = site.run(&["list", "--json"]).json();
    let rows = listed["locks"].as_array().expect("locks").iter();
    let mut kinds: Vec<_> = rows
        .filter(|row| row["name"].as_str().is_some_and(|name| Path::new(name).starts_with(site.0.path())))
        .map(|row| row["kind"].as_str().unwrap_or_default().to_owned())
        .collect();
    kinds.sort_unstable();
    kinds.retain(|kind| kind != "pidfile");
    assert_eq!(kinds, ["lease", "table"], "{listed}");
}

#[test]
fn status_of_locked_counter_file_is_held() {
    let site = Site::new();
    for number in [1, dead()] {
        site.write_old("counter", format!("{number}\n"));
        let lock = FileLock::new(site.path("counter"));
        let guard = lock.lock().expect("a free lock");
        let status = site.run(&["status", "--json", "./counter"]);
        let lock = &status.json()["lock"];
        let me = std::process::id();
        assert_eq!((status.code, &lock["kind"], &lock["holders"][0]["pid"]), (1, &"file".into(), &me.into()), "{lock}");
        drop(guard);
    }
}

#[test]
fn b7_recovered_has_control_characters_written_out() {
    let site = Site::new();
    let odd = "sl\ne\x1b[31mep\u{202e}";
    fs::copy("/bin/sh", site.path(odd)).expect("a copy");
    let name = fresh_name();
    for (kind, place) in [("--name", &*name), ("--pidfile", "odd.pid")] {
        let program = format!("./{odd}");
        let mut command =
            site.command(&["run", kind, place, "--", &program, "-c", "echo $$; while :; do read x; done"]);
        let mut running = Running::start({
            command.stdin(Stdio::piped());
            command
        });
        let pid: i32 = running.line().parse().expect("a pid");
        until("the program is named", || {
            let shown = site.run(&["status", "--json", if kind == "--name" { place } else { "./odd.pid" }]).json();
            shown["lock"]["holders"][0]["pid"] == pid
        });
        running.child.kill().expect("it runs");
        running.child.wait().expect("a child");
        kill_process(Pid::from_raw(pid).expect("a pid"), Signal::KILL).expect("it runs");
        let next =
            site.run(&["run", "--verbose", "--timeout", "20s", kind, place, "--", "printenv", "LOCKKIT_RECOVERED"]);
        let raw = |text: &str| text.trim_end().chars().any(|letter| letter.is_control() || letter == '\u{202e}');
        assert!(next.code == 0 && next.out.contains(&format!("pid {pid}")), "{kind}: {next:?}");
        assert!(!raw(&next.out) && !raw(&next.err), "{kind}: {next:?}");
    }
}

#[test]
fn b7_file_names_reach_no_message_raw() {
    let site = Site::new();
    let odd = "a\x1b[31m\nb\u{202e}";
    let cases: [&[&str]; 9] = [
        &["run", "--file", &format!("{odd}/x"), "--", "true"],
        &["run", "--pidfile", &format!("{odd}/x"), "--", "true"],
        &["run", "--lease", &format!("file://{odd}"), "--", "true"],
        &["status", &format!("./{odd}")],
        &["status", &format!("{odd}/../x://")],
        &["list", &format!("./{odd}")],
        &["lease", "show", &format!("./{odd}")],
        &["table", "list", &format!("./{odd}")],
        &["doctor", &format!("./{odd}")],
    ];
    for arguments in cases {
        let ended = site.run(arguments);
        for text in [&ended.out, &ended.err] {
            assert!(
                !text.contains('\x1b') && !text.contains('\u{202e}') && !text.contains("\nb"),
                "{arguments:?}: {ended:?}"
            );
        }
    }
}

#[test]
fn b9_list_shows_no_free_locks_but_files_that_are_given() {
    let site = Site::new();
    assert_eq!(site.run(&["run", "--lease", "free.lease", "--", "true"]).code, 0);
    site.write("dead.pid", format!("{}\n", dead()));
    let here = site.0.path().display().to_string();
    let rows = |arguments: &[&str]| {
        let listed = site.run(&[&["list", "--json"], arguments].concat()).json();
        let rows = listed["locks"].as_array().expect("locks").iter();
        let mine = rows.filter(|row| row["name"].as_str().is_some_and(|name| name.starts_with(&here)));
        mine.map(|row| row["state"].as_str().unwrap_or_default().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(rows(&[&here]), ["stale"]);
    assert_eq!(rows(&["free.lease"]), ["free"]);
    // Locks that come and go are shown as held, or not at all.
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for number in 0..2 {
            let (stop, file) = (&stop, FileLock::new(site.path(&format!("{number}.lock"))));
            let named = NamedLock::new(&fresh_name()).expect("a name");
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    drop((file.lock().expect("a lock"), named.lock().expect("a lock")));
                }
            });
        }
        let states: Vec<_> = (0..20)
            .flat_map(|_| {
                let listed = site.run(&["list", "--json"]).json();
                let rows = listed["locks"].as_array().expect("locks").clone();
                rows.into_iter().map(|row| row["state"].clone())
            })
            .collect();
        stop.store(true, Ordering::Relaxed);
        assert!(states.iter().all(|state| state == "held"), "{states:?}");
    });
}

#[test]
fn b10_log_of_a_wait_has_a_line_for_each_holder() {
    let site = Site::new();
    let name = fresh_name();
    for (kind, place) in [("--name", &*name), ("--file", "a.lock"), ("--pidfile", "a.pid"), ("--lease", "a.lease")] {
        let first = site.hold(&[kind, place]);
        let mut waiting = site.command(&["run", "--verbose", "--timeout", "3s", kind, place, "--", "true"]);
        let waited = Ended::of(&mut waiting);
        drop(first);
        let lines: Vec<_> = waited.err.lines().filter(|line| line.contains("waiting for")).collect();
        assert!(waited.code == 75 && lines.len() == 1, "{kind}: {waited:?}");
        assert!(lines[0].contains("held by pid"), "{kind}: {waited:?}");
        until("it is free", || site.run(&["run", "--try", "--quiet", kind, place, "--", "true"]).code == 0);
    }
}

#[test]
fn b10_log_of_a_wait_tells_of_the_next_holder() {
    let site = Site::new();
    let name = fresh_name();
    let mut first = site.hold(&["--name", &name]);
    let second = site.command(&["run", "--quiet", "--name", &name, "--", "sh", "-c", "echo held; exec sleep 60"]);
    let mut second = Running::start(second);
    let waiters = || site.run(&["status", "--json", &name]).json()["lock"]["waiters"].as_u64().unwrap_or_default();
    until("the second waits", || waiters() == 1);
    let log = site.path("log");
    let mut third = site.command(&["run", "--verbose", "--name", &name, "--", "true"]);
    third.stderr(File::create(&log).expect("a file"));
    let _third = Running::start(third);
    let lines = || fs::read_to_string(&log).expect("a file").matches("waiting for").count();
    until("the wait has begun", || lines() == 1);
    first.signal(Signal::TERM);
    first.code();
    assert_eq!(second.line(), "held");
    until("the next holder is told of", || lines() == 2);
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(lines(), 2, "{}", fs::read_to_string(&log).expect("a file"));
}

// Hard corners (C).

/// Starts `lockkit run` as the first process of a pid namespace. Returns `None` if that is impossible.
fn as_first(site: &Site, options: &[&str], script: &str) -> Option<Running> {
    if !rustix::process::geteuid().is_root() {
        left_out("only root can make a pid namespace");
        return None;
    }
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--mount-proc", "--kill-child", PROGRAM, "run"]).args(options);
    command.args(["--", "sh", "-c", script]).current_dir(site.0.path()).stdin(Stdio::null());
    Some(Running::start(command))
}

#[test]
fn c9_run_as_first_process_reaps_orphans() {
    let site = Site::new();
    let name = fresh_name();
    for (kind, place) in [("--name", &*name), ("--file", "a.lock"), ("--pidfile", "a.pid"), ("--lease", "a.lease")] {
        // Each `sleep` outlives the shell that started it, so the first process becomes its parent.
        let script = "for i in 1 2 3 4 5; do (sleep 0.1 &); done; i=0; \
                      while [ $i -lt 200 ]; do sleep 0.1; i=$((i+1)); \
                      grep -l '^State:.Z' /proc/[0-9]*/status > zombies 2> /dev/null || { [ $i -gt 5 ] && break; }; done; \
                      cat zombies; echo end; exit 7";
        let Some(mut running) = as_first(&site, &[kind, place], script) else { return };
        assert_eq!(running.line(), "end", "{kind}: zombies are left");
        assert_eq!(running.code(), 7, "{kind}");
        assert_eq!(site.run(&["run", "--timeout", "20s", kind, place, "--", "true"]).code, 0, "{kind}");
    }
}

#[test]
fn c9_run_as_first_process_reaps_orphans_while_it_waits() {
    let site = Site::new();
    let name = fresh_name();
    for (kind, place) in [("--name", &*name), ("--file", "a.lock"), ("--pidfile", "a.pid"), ("--lease", "a.lease")] {
        let holder = site.hold(&[kind, place]);
        let Some(mut running) = as_first(&site, &[kind, place], "echo ready") else { return };
        let first = child_of(running.pid());
        // `docker exec` starts a process in this way: its parent is outside, and ends before it.
        let mut command = Command::new("nsenter");
        command.args(["--target", &first.to_string(), "--pid", "--mount", "sh", "-c", "(sleep 0.2 & echo $!)"]);
        let orphan = Ended::of(command.stdin(Stdio::null()));
        assert_eq!(orphan.code, 0, "{kind}: {orphan:?}");
        let path = format!("/proc/{first}/root/proc/{}", orphan.out.trim());
        until("the orphan is reaped", || !Path::new(&path).exists());
        drop(holder);
        assert_eq!(running.line(), "ready", "{kind}");
        assert_eq!(running.code(), 0, "{kind}");
    }
}

/// Returns the first process of the namespace that `unshare`, with this pid, has made.
fn child_of(pid: u32) -> i32 {
    let mut child = None;
    until("it has a child", || {
        let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        child = list.split_ascii_whitespace().next().and_then(|pid| pid.parse().ok());
        child.is_some()
    });
    child.expect("a child")
}

#[test]
fn c9_signals_to_run_as_first_process_end_it() {
    let site = Site::new();
    let name = fresh_name();
    for (kind, place) in [("--name", &*name), ("--file", "a.lock"), ("--pidfile", "a.pid"), ("--lease", "a.lease")] {
        let Some(mut running) = as_first(&site, &[kind, place], "echo ready; exec sleep 60") else { return };
        assert_eq!(running.line(), "ready", "{kind}");
        let first = Pid::from_raw(child_of(running.pid())).expect("a pid");
        kill_process(first, Signal::TERM).expect("it runs");
        assert_eq!(running.code(), 128 + 15, "{kind}");
        // The same holds while it waits for the lock. Here the signal comes from inside, and the kernel does not force
        // such signals on a first process.
        let holder = site.hold(&[kind, place]);
        let mut command = Command::new("unshare");
        let inner = format!("(sleep 0.7; kill -TERM 1) & exec {PROGRAM} run {kind} {place} -- true");
        command.args(["--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", &inner]);
        let begun = Instant::now();
        let ended = Ended::of(command.current_dir(site.0.path()).stdin(Stdio::null()));
        assert_eq!(ended.code, 128 + 15, "{kind}: {ended:?}");
        assert!(begun.elapsed() < BOUND, "{kind}");
        drop(holder);
        until("it is free", || site.run(&["run", "--try", "--quiet", kind, place, "--", "true"]).code == 0);
    }
}

/// Opens a pseudo-terminal with so many columns. Returns the program's end, and the screen.
fn terminal(columns: u16) -> (OwnedFd, File) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let screen = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a terminal");
    grantpt(&screen).expect("a terminal");
    unlockpt(&screen).expect("a terminal");
    let name = ptsname(&screen, Vec::new()).expect("a name").into_string().expect("a plain name");
    let end = File::options().read(true).write(true).open(name).expect("a terminal");
    let size = Winsize { ws_row: 24, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&end, size).expect("a terminal");
    (end.into(), screen.into())
}

/// Reads the screen until `fact` holds for the text.
fn read_until(screen: &mut File, fact: impl Fn(&str) -> bool) -> String {
    let begun = Instant::now();
    let mut shown = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&shown).into_owned();
        if fact(&text) {
            return text;
        }
        assert!(begun.elapsed() < BOUND, "{text:?}");
        let mut watched = [rustix::event::PollFd::new(&*screen, rustix::event::PollFlags::IN)];
        let tick = rustix::event::Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
        if rustix::event::poll(&mut watched, Some(&tick)).is_ok_and(|ready| ready > 0) {
            let mut more = [0; 1024];
            let read = screen.read(&mut more).unwrap_or_default();
            shown.extend_from_slice(&more[..read]);
        }
    }
}

#[test]
fn c10_waiting_line_is_cut_by_the_width_without_escapes() {
    let site = Site::new();
    let name = fresh_name();
    let _holder = site.hold(&["--name", &name]);
    for columns in [200, 80, 40, 20, 5, 2] {
        let (end, mut screen) = terminal(columns);
        let mut waiting = site.command(&["run", "--name", &name, "--", "true"]);
        waiting.env("TERM", "xterm-256color").stderr(end.try_clone().expect("a terminal"));
        let _waiting = Running::start(waiting);
        let shown = read_until(&mut screen, |shown| shown.matches('\r').count() > 2);
        assert!(!shown.contains('\x1b') && !shown.contains('\n'), "{columns}: {shown:?}");
        // The last line may have been read in part.
        let lines: Vec<_> = shown.split('\r').filter(|line| !line.is_empty()).collect();
        let (_, whole) = lines.split_last().expect("lines");
        for line in whole {
            assert!(line.chars().count() < usize::from(columns), "{columns}: {line:?}");
            assert_eq!(line.trim_end().ends_with('…'), columns < 200, "{columns}: {line:?}");
        }
    }
}

#[test]
fn c10_waiting_line_counts_wide_letters_twice() {
    let site = Site::new();
    let path = "日本語日本語日本語日本語.lock";
    let _holder = site.hold(&["--file", path]);
    let (end, mut screen) = terminal(30);
    let mut waiting = site.command(&["run", "--file", path, "--", "true"]);
    waiting.env("TERM", "xterm").stderr(end.try_clone().expect("a terminal"));
    let _waiting = Running::start(waiting);
    let shown = read_until(&mut screen, |shown| shown.contains('…'));
    let line = shown.split('\r').find(|line| line.contains('…')).expect("a line");
    let columns: usize =
        line.chars().map(|letter| if ('\u{3000}'..'\u{a000}').contains(&letter) { 2 } else { 1 }).sum();
    assert!((28..30).contains(&columns), "{line:?}");
}

#[test]
fn c10_dumb_terminal_gets_plain_lines() {
    let site = Site::new();
    let name = fresh_name();
    let _holder = site.hold(&["--name", &name]);
    for kind in [Some("dumb"), Some(""), None] {
        let (end, mut screen) = terminal(80);
        let mut waiting = site.command(&["run", "--timeout", "1500ms", "--name", &name, "--", "true"]);
        match kind {
            Some(kind) => waiting.env("TERM", kind),
            None => waiting.env_remove("TERM"),
        };
        waiting.env("NO_COLOR", "1").stderr(end.try_clone().expect("a terminal"));
        let mut waiting = Running::start(waiting);
        assert_eq!(waiting.code(), 75);
        drop(end);
        let shown = read_until(&mut screen, |shown| shown.contains("lockkit: The"));
        // The terminal itself turns each line end into two characters.
        let shown = shown.replace("\r\n", "\n");
        assert!(!shown.contains('\x1b') && !shown.contains('\r'), "{kind:?}: {shown:?}");
        assert_eq!(shown.matches("waiting for").count(), 1, "{kind:?}: {shown:?}");
    }
}

#[test]
fn c10_waiting_line_is_one_write() {
    if Command::new("strace").arg("-V").stdout(Stdio::null()).status().is_err() {
        left_out("strace is not installed");
        return;
    }
    let site = Site::new();
    let name = fresh_name();
    let _holder = site.hold(&["--name", &name]);
    let (end, screen) = terminal(100);
    let trace = site.path("trace");
    let mut command = Command::new("strace");
    command.args(["-f", "-s", "300", "-e", "trace=write,writev", "-o"]).arg(&trace).arg(PROGRAM);
    command.args(["run", "--timeout", "1200ms", "--name", &name, "--", "true"]).env("TERM", "xterm");
    command.stdin(Stdio::null()).stderr(end);
    assert_eq!(command.status().expect("strace starts").code(), Some(75));
    drop(screen);
    let trace = fs::read_to_string(trace).expect("a trace");
    let lines: Vec<_> = trace.lines().filter(|line| line.contains("write(2, \"\\r")).collect();
    // Several updates of the line, and its erasure.
    assert!(lines.len() >= 2, "{trace}");
    let (last, shown) = lines.split_last().expect("lines");
    assert!(shown.iter().all(|line| line.contains("\"\\rWaiting for the named lock")), "{trace}");
    assert!(last.contains("\"\\r ") && last.contains(" \\r\""), "{trace}");
    assert!(!trace.contains("[?7"), "{trace}");
}

#[test]
fn mode_of_a_file_of_another_is_left() {
    let site = Site::new();
    let path = site.write("a.lock", "");
    fs::set_permissions(&path, Permissions::from_mode(0o604)).expect("a file");
    assert_eq!(site.run(&["run", "--file", "a.lock", "--mode", "660", "--", "true"]).code, 0);
    assert_eq!(fs::metadata(&path).expect("a file").mode() & 0o7777, 0o604);
}
