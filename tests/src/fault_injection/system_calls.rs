//! System calls that fail once each, injected by strace(1).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use lockkit::LeaseStatus;
use rustix::process::Signal;

use super::acquire::{ACQUIRE_IN_TIME, assert_each_acquires, files};
use crate::helper_process::signal_pid;
use crate::leases::Terms;
use crate::{Actor, Belongings, Kind, Spec, managers, until};

/// The errors that the manual pages list for the system calls of locks, as far as they can happen.
/// The list omits errors about wrong arguments, and errors about missing objects that exist. It
/// also omits a failing `close`: strace can only prevent the call, and the kernel closes in any
/// case. Actors read their commands with `readv` and answer with `write`, which locks do not use.
const ERRORS: [(&str, &str); 41] = [
    (
        "accept4",
        "EINTR ECONNABORTED EMFILE ENFILE ENOBUFS ENOMEM EPERM",
    ),
    ("bind", "EACCES EADDRINUSE ENOMEM"),
    ("chmod", "EACCES EIO ENOMEM EPERM EROFS"),
    ("clock_nanosleep", "EINTR"),
    ("clone", "EAGAIN ENOMEM"),
    ("clone3", "EAGAIN ENOMEM"),
    ("connect", "EACCES EAGAIN ECONNREFUSED EINTR EPERM"),
    ("eventfd2", "EMFILE ENFILE ENOMEM"),
    ("fallocate", "EFBIG EINTR EIO ENOSPC EOPNOTSUPP EPERM"),
    ("fchmod", "EIO EPERM EROFS"),
    ("fcntl", "EACCES EAGAIN EINTR ENOLCK"),
    ("fdatasync", "EDQUOT EINTR EIO ENOSPC EROFS"),
    ("flock", "EAGAIN EINTR ENOLCK"),
    ("fstat", "ENOMEM EOVERFLOW"),
    ("fstatfs", "EINTR EIO ENOMEM ENOSYS"),
    ("fsync", "EDQUOT EINTR EIO ENOSPC EROFS"),
    ("ftruncate", "EFBIG EINTR EIO EPERM EROFS"),
    ("futex", "EAGAIN EINTR ETIMEDOUT"),
    ("getdents64", "ENOENT"),
    ("getsockopt", "ENOMEM"),
    ("inotify_add_watch", "ENOMEM ENOSPC"),
    ("inotify_init1", "EMFILE ENFILE ENOMEM"),
    ("inotify_rm_watch", "EINVAL"),
    ("kill", "EPERM"),
    (
        "linkat",
        "EACCES EDQUOT EEXIST EIO EMLINK ENOENT ENOMEM ENOSPC EPERM EROFS",
    ),
    ("listen", "EADDRINUSE EOPNOTSUPP"),
    ("lstat", "EACCES ENOMEM"),
    (
        "mkdir",
        "EACCES EDQUOT EEXIST EMLINK ENOMEM ENOSPC EPERM EROFS",
    ),
    ("mmap", "EACCES EAGAIN ENFILE ENODEV ENOMEM EPERM"),
    ("newfstatat", "EACCES ENOMEM"),
    (
        "open",
        "EACCES EDQUOT EINTR EMFILE ENFILE ENOMEM ENOSPC EROFS",
    ),
    (
        "openat",
        "EACCES EDQUOT EINTR EMFILE ENFILE ENOMEM ENOSPC EROFS",
    ),
    ("poll", "EINTR ENOMEM"),
    ("ppoll", "EINTR ENOMEM"),
    ("pread64", "EINTR EIO"),
    ("pwrite64", "EDQUOT EFBIG EINTR EIO ENOSPC EPERM"),
    ("read", "EINTR EIO"),
    ("readlink", "EACCES EIO ENOMEM"),
    ("recvmsg", "EAGAIN ECONNREFUSED EINTR ENOMEM"),
    ("sendmsg", "EAGAIN ECONNRESET EINTR ENOBUFS ENOMEM EPIPE"),
    ("socket", "EACCES EMFILE ENFILE ENOBUFS ENOMEM"),
];
const MORE_ERRORS: [(&str, &str); 13] = [
    ("getsockname", "ENOBUFS"),
    ("ioctl", "ENOTTY"),
    ("recvfrom", "EAGAIN EINTR ENOMEM"),
    ("sendto", "EAGAIN ECONNRESET EINTR ENOBUFS ENOMEM EPIPE"),
    ("setsockopt", "ENOBUFS"),
    ("fgetxattr", "EIO ENODATA ENOMEM EOPNOTSUPP ERANGE"),
    (
        "fsetxattr",
        "E2BIG EDQUOT EIO ENOMEM ENOSPC EOPNOTSUPP EPERM ERANGE",
    ),
    ("rename", "EACCES EDQUOT EIO ENOMEM ENOSPC EPERM EROFS"),
    (
        "renameat2",
        "EACCES EEXIST EINVAL EIO ENOMEM ENOSPC EPERM EROFS",
    ),
    ("stat", "EACCES ENOMEM"),
    ("statx", "EACCES ENOMEM"),
    ("unlink", "EACCES EBUSY EIO ENOMEM EPERM EROFS"),
    ("unlinkat", "EACCES EBUSY EIO ENOMEM EPERM EROFS"),
];

/// The number of calls with one name that fail once each, counted from the first.
const MAX_CALLS_PER_NAME: usize = 6;

/// strace(1), attached to all threads of an actor.
pub struct Strace {
    strace: Child,
    log: PathBuf,
    _directory: tempfile::TempDir,
}

impl Strace {
    /// Attaches strace; `options` select the failures.
    pub fn attach(actor: &Actor, options: &[String]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let log = directory.path().join("log");
        let mut strace = Command::new("strace");
        strace
            .args(["-f", "-qq", "-s", "0", "-o"])
            .arg(&log)
            .args(options)
            .arg("-p")
            .arg(actor.pid().to_string());
        let strace = strace.stderr(Stdio::null()).spawn().expect("strace");
        let is_traced = |task: fs::DirEntry| {
            let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
            !status.contains("TracerPid:\t0\n")
        };
        until("every thread is traced", || {
            let mut tasks = fs::read_dir(format!("/proc/{}/task", actor.pid()))
                .into_iter()
                .flatten()
                .flatten();
            tasks.all(is_traced)
        });
        Self {
            strace,
            log,
            _directory: directory,
        }
    }

    /// Returns the log so far.
    pub fn so_far(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Detaches strace, and returns the log.
    pub fn end(&mut self) -> String {
        signal_pid(self.strace.id(), Signal::TERM);
        // strace may wait for the remains of an ended process that only this process can reap.
        let end = Instant::now() + Duration::from_secs(2);
        while self.strace.try_wait().is_ok_and(|ended| ended.is_none()) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        let _ = self.strace.kill();
        let _ = self.strace.wait();
        self.so_far()
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        let _ = self.strace.kill();
        let _ = self.strace.wait();
    }
}

/// Returns whether strace(1) is installed and may inject failures. Reports a test as left out where
/// it may not.
pub fn calls_can_fail() -> bool {
    let mut strace = Command::new("strace");
    strace
        .args([
            "-f",
            "-qq",
            "-o",
            "/dev/null",
            "-e",
            "inject=flock:error=EINTR",
            "true",
        ])
        .stderr(Stdio::null());
    let is_allowed = strace.status().is_ok_and(|status| status.success());
    if !is_allowed {
        crate::left_out("strace is not installed, or may not trace");
    }
    is_allowed
}

/// Returns the lock's system calls of the thread `thread` in `log`: the name, and the index among
/// calls with that name.
fn calls(log: &str, thread: u32) -> Vec<(String, usize)> {
    let mut counts = std::collections::HashMap::new();
    let mut calls = Vec::new();
    for line in log.lines() {
        let Some((pid, call)) = line.split_once(' ') else {
            continue;
        };
        let Some((name, arguments)) = call.trim_start().split_once('(') else {
            continue;
        };
        if pid != thread.to_string() || name.contains(' ') {
            continue;
        }
        let count = counts.entry(name.to_owned()).or_insert(0);
        *count += 1;
        let is_a_locks = match name {
            // Private memory of the process is not part of the lock.
            "mmap" => arguments.contains("MAP_SHARED"),
            "fcntl" => arguments.contains("F_OFD_"),
            "futex" => arguments.contains("FUTEX_WAIT"),
            _ => true,
        };
        if is_a_locks && *count <= MAX_CALLS_PER_NAME {
            calls.push((name.to_owned(), *count));
        }
    }
    calls
}

fn errors(name: &str) -> impl Iterator<Item = &'static str> {
    let known = ERRORS
        .iter()
        .chain(&MORE_ERRORS)
        .filter(move |(known, _)| *known == name);
    known.flat_map(|(_, errors)| errors.split(' '))
}

/// The name of the call that fails once, its index from the first, and the error.
pub(super) type Fault = (String, usize, &'static str);

/// Returns the strace options for a fault.
fn injection(fault: Option<&Fault>) -> Vec<String> {
    fault.map_or(vec![], |(name, at, error)| {
        vec![
            "-e".to_owned(),
            format!("trace={name}"),
            format!("-einject={name}:error={error}:when={at}"),
        ]
    })
}

/// Checks a file lock whose first flock fails on a file that its process has just created, while
/// another process holds the lock. The other process keeps the lock.
pub fn fail_flock_with_other_holder(error: &str) {
    if !calls_can_fail() {
        return;
    }
    let spec = Kind::FILE.fresh();
    let [mut victim, mut holder] = [(); 2].map(|()| Actor::start(&spec));
    // During the delay the holder acquires.
    let options = [
        "-e".to_owned(),
        "trace=flock".to_owned(),
        format!("-einject=flock:error={error}:delay_enter=1s"),
    ];
    let mut strace = Strace::attach(&victim, &options);
    victim.tell("try");
    until("the file is there", || Path::new(spec.at()).exists());
    holder.expect("lock", "held");
    let answer = victim.answer();
    assert!(answer.starts_with("error Io"), "{answer}");
    strace.end();
    let answer = victim.ask("try");
    assert!(
        answer.starts_with("error Held"),
        "two processes hold the lock after {error}: {answer}"
    );
    holder.expect("release", "released");
    assert_each_acquires(&mut [&mut victim, &mut holder]);
    spec.clean();
}

/// Checks a file lock whose flock fails as on a file system without flock. The newly created file
/// is removed.
pub fn fail_flock_on_a_new_file(error: &str) {
    if !calls_can_fail() {
        return;
    }
    let spec = Kind::FILE.fresh();
    let mut victim = Actor::start(&spec);
    let options = [
        "-e".to_owned(),
        "trace=flock".to_owned(),
        format!("-einject=flock:error={error}"),
    ];
    let mut strace = Strace::attach(&victim, &options);
    let answer = victim.ask("try");
    assert!(answer.starts_with("error "), "{answer}");
    assert!(!Path::new(spec.at()).exists());
    fs::write(spec.at(), "another's").expect("room");
    let answer = victim.ask("try");
    assert!(answer.starts_with("error "), "{answer}");
    assert_eq!(
        fs::read_to_string(spec.at()).expect("it stays"),
        "another's"
    );
    strace.end();
    spec.clean();
}

/// The result of one run.
pub(super) struct Run<L> {
    /// The strace log.
    log: String,
    /// The thread whose calls fail.
    thread: u32,
    /// The state afterwards.
    remainder: L,
}

/// Runs the scenario once without a fault, and then once for each error of each system call in the
/// log. The scenario checks its invariants, and the state afterwards must be the same each time.
pub(super) fn fail_each_call<L: PartialEq + std::fmt::Debug + Sync>(
    what: &str,
    scenario: impl Fn(Option<&Fault>) -> Run<L> + Sync,
) {
    if !calls_can_fail() {
        return;
    }
    let without_fault = scenario(None);
    let calls = calls(&without_fault.log, without_fault.thread);
    let faults: Vec<Fault> = calls
        .iter()
        .flat_map(|(name, at)| errors(name).map(|error| (name.clone(), *at, error)))
        .collect();
    let names: BTreeSet<&str> = calls.iter().map(|(name, _)| name.as_str()).collect();
    println!(
        "{what}: {} faults in {}",
        faults.len(),
        Vec::from_iter(names).join(" ")
    );
    // Between processes a lock in shared memory may need no system call.
    assert!(
        !faults.is_empty() || what == "shm",
        "no system call that can fail: {}",
        without_fault.log
    );
    let (next, failures) = (Mutex::new(faults.iter()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let Some(fault) = next.lock().expect("no panic with it").next() else {
                        return;
                    };
                    let attempt = || {
                        assert_eq!(
                            scenario(Some(fault)).remainder,
                            without_fault.remainder,
                            "with {fault:?}"
                        )
                    };
                    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(attempt)).is_err() {
                        failures.lock().expect("no panic with it").push(fault);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().expect("no panic with it");
    assert!(
        failures.is_empty(),
        "{what} does not recover from these faults: {failures:?}"
    );
}

/// The belongings of an actor, and the files.
pub(super) type Remainder = (Belongings, BTreeSet<String>);

/// The actions of a traced victim and of another process. The victim answers every command.
pub(super) type Scenario = fn(victim: &mut Actor, other: &mut Actor);

pub(super) fn run_lock_scenario(
    kind: Kind,
    scenario: Scenario,
    fault: Option<&Fault>,
) -> Run<Remainder> {
    run_scenario(&kind.fresh(), scenario, fault)
}

fn run_scenario(spec: &Spec, scenario: Scenario, fault: Option<&Fault>) -> Run<Remainder> {
    let [mut victim, mut other] = [(); 2].map(|()| Actor::start(spec));
    // The actor has read this command, so it now waits for the next one.
    for actor in [&mut victim, &mut other] {
        actor.expect("owner", "owner none");
    }
    let mut strace = Strace::attach(&victim, &injection(fault));
    scenario(&mut victim, &mut other);
    let log = strace.end();
    assert_each_acquires(&mut [&mut other, &mut victim]);
    // Some locks keep a descriptor from one wait for the next.
    other.expect(ACQUIRE_IN_TIME, "held");
    victim.tell_to_wait(ACQUIRE_IN_TIME);
    other.expect("release", "released");
    assert_eq!(victim.answer(), "held");
    victim.expect("release", "released");
    let name = |path: String| {
        path.replace(
            &*Path::new(spec.at())
                .file_name()
                .expect("a name")
                .to_string_lossy(),
            "*",
        )
    };
    let remainder = (
        Belongings::of(victim.pid()),
        files(spec, Path::new("/")).into_iter().map(name).collect(),
    );
    spec.clean();
    Run {
        log,
        thread: victim.pid(),
        remainder,
    }
}

/// A victim creates a table, or opens it where `table_exists`, and allocates, locks, unlocks and
/// frees.
fn use_table(
    kind: managers::Kind,
    table_exists: bool,
    fault: Option<&Fault>,
) -> Run<(Belongings, Option<u32>)> {
    let table = kind.fresh();
    if table_exists {
        drop(table.open());
    }
    let mut victim = Actor::start_at(&table);
    victim.expect(&format!("kill-at {}", usize::MAX), "armed");
    let mut strace = Strace::attach(&victim, &injection(fault));
    let works = |answer: &str| {
        assert!(
            !answer.is_empty() && answer != "gone",
            "the victim answers under every fault"
        );
        !answer.starts_with("error ")
    };
    let answer = victim.ask("allocate");
    let id = works(&answer).then(|| {
        answer
            .strip_prefix("allocated ")
            .expect("a number")
            .to_owned()
    });
    if let Some(id) = &id {
        if works(&victim.ask(&format!("try {id}"))) {
            works(&victim.ask(&format!("release {id}")));
        }
        works(&victim.ask(&format!("free {id}")));
    }
    let log = strace.end();
    // No process holds it any more. A lock whose free failed can be freed now, and an unallocated
    // lock does not exist.
    if let Some(id) = &id {
        match victim.ask(&format!("try {id}")) {
            held if held == "held" => victim.expect(&format!("release {id}"), "ok"),
            answer => assert!(answer.starts_with("error NotAllocated"), "{answer}"),
        }
        let answer = victim.ask(&format!("free {id}"));
        assert!(
            answer == "ok" || answer.starts_with("error NotAllocated"),
            "{answer}"
        );
    }
    let mut other = Actor::start_at(&table);
    for actor in [&mut victim, &mut other] {
        let answer = actor.ask("allocate");
        let id = answer
            .strip_prefix("allocated ")
            .unwrap_or_else(|| panic!("{answer}"));
        actor.expect(&format!("try {id}"), "held");
        actor.expect(&format!("release {id}"), "ok");
        actor.expect(&format!("free {id}"), "ok");
    }
    if kind == managers::Kind::Directory {
        assert_eq!(
            table.lock_files(),
            BTreeSet::new(),
            "a free lock has no file"
        );
    }
    let remainder = (
        Belongings::of(victim.pid()),
        table.open().available().expect("it can be counted"),
    );
    table.clean();
    Run {
        log,
        thread: victim.pid(),
        remainder,
    }
}

/// A victim holds a lease while the calls of its heartbeat thread fail. No process loses anything
/// by that.
fn hold_under_faults(fault: Option<&Fault>) -> Run<Remainder> {
    let directory = tempfile::tempdir().expect("a directory");
    let mut terms = Terms::of(directory.path().join("lease"));
    (terms.ttl, terms.heartbeat) = (10_000, 20);
    let mut victim = Actor::start_lease(&terms);
    assert!(victim.ask("try").starts_with("held "));
    let lease = terms.open();
    let record = || match lease.status().expect("it can be read") {
        LeaseStatus::Held(seen) => Some(seen.revision()),
        _ => None,
    };
    let mut strace = Strace::attach(&victim, &injection(fault));
    for _ in 0..=MAX_CALLS_PER_NAME {
        let before = record();
        until("the lease is renewed", || record() != before);
    }
    let log = strace.end();
    victim.expect("is-held", "yes");
    assert!(lease.try_lock().expect_err("it is held").is_held());
    victim.expect("release", "released");
    victim.expect("losses", "losses");
    assert!(lease.try_lock().expect("it is free").recovered().is_none());
    assert!(victim.ask("try").starts_with("held "));
    victim.expect("release", "released");
    let is_renewal = |line: &&str| {
        line.contains("pwrite64(") && !line.starts_with(&format!("{} ", victim.pid()))
    };
    let thread = log
        .lines()
        .find(is_renewal)
        .and_then(|line| line.split(' ').next()?.parse().ok());
    let names = fs::read_dir(directory.path())
        .expect("a directory")
        .flatten();
    let remainder = names
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    Run {
        log,
        thread: thread.unwrap_or_default(),
        remainder: (Belongings::of(victim.pid()), remainder),
    }
}

/// Makes each system call that creates or opens a table, or allocates or frees its locks, fail
/// once.
pub fn fail_each_call_of_a_table(kind: managers::Kind) {
    for table_exists in [false, true] {
        fail_each_call(
            &format!("{kind:?}, a table that is there: {table_exists}"),
            |fault| use_table(kind, table_exists, fault),
        );
    }
}

/// Makes each system call fail once in an acquisition that takes over a stale pidfile.
pub fn fail_each_call_of_a_takeover() {
    let scenario = |victim: &mut Actor, other: &mut Actor| {
        if victim.ask("try").starts_with("held") {
            assert!(other.ask("try").starts_with("error Held"));
            let answer = victim.ask("release");
            assert!(
                answer == "released" || answer.starts_with("error "),
                "{answer}"
            );
        }
        // The takeover happens now, if it did not happen before.
        assert!(other.ask(ACQUIRE_IN_TIME).starts_with("held"));
        other.expect("release", "released");
    };
    for content in ["4194304\n", "\n"] {
        fail_each_call("a takeover", |fault| {
            let spec = Kind::PIDFILE.fresh();
            fs::write(spec.at(), content).expect("a file");
            run_scenario(&spec, scenario, fault)
        });
    }
}

/// Makes each system call of a heartbeat fail once.
pub fn fail_each_call_of_a_heartbeat() {
    fail_each_call("a heartbeat", hold_under_faults);
}

/// Checks that the victim has answered that it holds the lock, and does hold it, or has answered
/// with an error.
fn is_held(answer: &str, other: &mut Actor) -> bool {
    if answer == "held" {
        let answer = other.ask("try");
        assert!(
            answer.starts_with("error Held"),
            "two processes hold the lock: {answer}"
        );
    } else {
        assert!(answer.starts_with("error "), "{answer}");
    }
    answer == "held"
}

pub(super) fn acquire_without_contention(victim: &mut Actor, other: &mut Actor) {
    for command in ["try", "lock"] {
        let answer = victim.ask(command);
        if is_held(&answer, other) {
            let answer = victim.ask("release");
            assert!(
                answer == "released" || answer.starts_with("error "),
                "{answer}"
            );
        }
    }
}

pub(super) fn hand_over(victim: &mut Actor, other: &mut Actor) {
    other.expect(ACQUIRE_IN_TIME, "held");
    victim.tell("lock");
    let mut answer = None;
    until("the victim waits, or has an answer", || {
        answer = victim.answered();
        answer.is_some() || victim.waits()
    });
    other.expect("release", "released");
    let answer = answer.unwrap_or_else(|| victim.answer());
    if is_held(&answer, other) {
        other.tell_to_wait(ACQUIRE_IN_TIME);
        let answer = victim.ask("release");
        assert!(
            answer == "released" || answer.starts_with("error "),
            "{answer}"
        );
        assert_eq!(other.answer(), "held");
        other.expect("release", "released");
    }
}
