//! Tests of lockkit with real processes, real signals and real kills.
//!
//! - [`Kind`] is a kind of lock under test. [`Spec`] is one lock of a kind, which any process can open from its text.
//! - [`Actor`] is a second process (the program `actor` of this package) that acquires and releases locks on command.
//! - [`mod@conformance`] has the cases that every kind must pass, on every system; [`conformance!`] makes tests of
//!   them.
//! - [`mod@async_conformance`] has the cases of waits in tasks that every kind must pass, and [`task_suite!`] makes
//!   tests of them.
//! - [`mod@managers`] has the tables of locks under test, and the cases that every manager must pass. It also has a
//!   second process that works on a table on command.
//! - [`mod@leases`] has a second process that works on a lease on command, and forges records.
//! - [`instances`] has a second process that is an instance of a program, and peers that attack the first instance.
//! - [`failpoint`] has the places in the library at which a test kills or stops a process.
//! - [`mod@fault_injection`] takes resources from locks: room, files, processes, uninterrupted sleep.
//! - [`realtime`] has a process of a real-time class on one processor.
//! - [`servers`] starts real servers, and ensures that they end.
//! - [`mod@server_conformance`] has the drills of leases on servers; [`drills!`] makes tests of them for one engine.
//! - [`small_disk`] has a small file system, which a test can fill.
//! - [`namespaces`] makes user namespaces, in which a uid means several users.
//! - [`wine`] lists the differences between Wine and Windows, because of which Wine cannot judge every case.
//! - [`chaos`] has a conductor that kills and stops many processes at random, and checks the log of the holders and
//!   their times.

pub mod async_conformance;
pub mod chaos;
pub mod conformance;
pub mod crash_points;
pub mod failpoint;
#[cfg(target_os = "linux")]
pub mod fault_injection;
pub mod fixtures;
pub mod helper_process;
#[cfg(target_os = "linux")]
pub mod hostile;
#[cfg(target_os = "linux")]
pub mod instances;
pub mod leases;
pub mod managers;
#[cfg(target_os = "linux")]
pub mod namespaces;
#[cfg(target_os = "linux")]
pub mod realtime;
#[cfg(target_os = "linux")]
pub mod server_conformance;
#[cfg(target_os = "linux")]
pub mod servers;
pub mod small_disk;
#[cfg(windows)]
mod windows;
pub mod wine;

pub use fixtures::{Kind, Spec};
pub use helper_process::Actor;

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The time limit for anything that must happen: far more than it needs, because machines can be slow.
pub const LIVELY: Duration = Duration::from_secs(30);

/// Waits until `fact` holds. Panics with `what` if it does not hold within [`LIVELY`].
pub fn until(what: &str, mut fact: impl FnMut() -> bool) {
    let start = Instant::now();
    while !fact() {
        assert!(start.elapsed() < LIVELY, "timed out waiting until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits for the value of `fact`. Panics with `what` if there is none within [`LIVELY`].
pub fn until_some<T>(what: &str, mut fact: impl FnMut() -> Option<T>) -> T {
    let mut found = None;
    until(what, || {
        found = fact();
        found.is_some()
    });
    found.expect("a value was found")
}

/// Returns whether the process `pid` is stopped.
#[cfg(target_os = "linux")]
pub fn is_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with('T')
}

/// Runs a case for a kind of lock, or reports why this machine cannot.
pub fn run_or_leave_out(kind: Kind, case: impl FnOnce(Kind)) {
    match kind.left_out() {
        None => case(kind),
        Some(why) => left_out(why),
    }
}

/// Reports that the test on this thread is left out, and why, even when the test runner captures the output of passing
/// tests.
pub fn left_out(why: impl std::fmt::Display) {
    use std::io::Write;
    let thread = std::thread::current();
    // A closed standard error has no reader.
    let _ = writeln!(std::io::stderr(), "left out: {}: {why}", thread.name().unwrap_or_default());
}

/// Returns whether the process runs directly on a host, and reports the test as left out where it does not. In a
/// container no process knows whether an earlier boot of the host was of this host.
pub fn is_on_a_host() -> bool {
    let number = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    // The first pid namespace has this number on every Linux.
    let is = number.as_os_str() == "pid:[4026531836]" && std::path::Path::new("/etc/machine-id").exists();
    if !is {
        left_out("this is a container, or has no machine-id");
    }
    is
}

/// Makes a test of each name that reports why it is left out, on systems other than Linux. The file has the test itself
/// for Linux only.
#[macro_export]
macro_rules! left_out {
    ($why:literal: $($case:ident,)*) => {
        $(#[test]
        #[cfg(not(target_os = "linux"))]
        fn $case() {
            $crate::left_out($why);
        })*
    };
}

/// Returns the path of the program `name` of this package, next to the running test.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the test has a path");
    let name = format!("{name}{}", std::env::consts::EXE_SUFFIX);
    let directory = test.ancestors().find(|directory| directory.join(&name).is_file());
    directory
        .unwrap_or_else(|| panic!("cannot find {name} near {}: build the package first", test.display()))
        .join(name)
}

/// Runs a command without output, and returns whether it succeeds.
pub fn succeeds(command: &mut Command) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// Returns a program that sleeps for `time`.
pub fn sleeper(time: Duration) -> Command {
    let mut command = if cfg!(unix) { Command::new("sleep") } else { Command::new(program("actor")) };
    command.args((!cfg!(unix)).then_some("sleep")).arg(time.as_secs().to_string()).stdin(Stdio::null());
    command
}

/// Returns the lines of standard input, as the commands of a second process. On Linux they are read with `readv`, so
/// that a test can make each `read` of a lock fail, and no other.
pub fn commands() -> impl Iterator<Item = String> {
    struct Input;
    impl Read for Input {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            #[cfg(target_os = "linux")]
            return Ok(rustix::io::readv(std::io::stdin(), &mut [std::io::IoSliceMut::new(buffer)])?);
            #[cfg(not(target_os = "linux"))]
            std::io::stdin().read(buffer)
        }
    }
    BufReader::new(Input).lines().map_while(Result::ok)
}

/// Returns a name that no other test and no other run uses.
pub fn fresh_name(prefix: &str) -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("{prefix}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

#[cfg(target_os = "linux")]
/// Returns a user that exists in no other test, for tests that need another user. Returns `None`, and reports the
/// reason, where this process may not act as others. Dropping it removes the files that lockkit made for that user.
pub fn another_user() -> Option<AnotherUser> {
    use std::sync::atomic::{AtomicU32, Ordering};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    if !rustix::process::geteuid().is_root() {
        left_out("only root can act as another user");
        return None;
    }
    let uid = 1_000_000 + std::process::id() * 100 + COUNT.fetch_add(1, Ordering::Relaxed);
    Some(AnotherUser { uid })
}

#[cfg(target_os = "linux")]
/// See [`another_user`].
#[derive(Debug)]
pub struct AnotherUser {
    /// Its uid.
    pub uid: u32,
}

#[cfg(target_os = "linux")]
impl AnotherUser {
    /// Returns the directories that lockkit uses for this user: that of the file backend, and that of the records in
    /// memory.
    pub fn directories(&self) -> [PathBuf; 2] {
        ["/tmp", "/dev/shm"].map(|base| PathBuf::from(format!("{base}/lockkit-u{}", self.uid)))
    }
}

#[cfg(target_os = "linux")]
impl Drop for AnotherUser {
    fn drop(&mut self) {
        use std::os::unix::fs::MetadataExt;
        // An actor that lived on could create them again.
        let is_its_own = |entry: &std::fs::DirEntry| entry.metadata().is_ok_and(|found| found.uid() == self.uid);
        let pids = || {
            let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten().filter(is_its_own);
            entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).collect::<Vec<_>>()
        };
        let is_dead = |pid: &u32| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            status.is_empty() || status.contains("State:\tZ")
        };
        let pids = pids();
        pids.iter().for_each(|pid| kill_pid(*pid));
        until("the processes of the user have ended", || pids.iter().all(is_dead));
        for directory in self.directories() {
            let _ = std::fs::remove_dir_all(&directory).or_else(|_| std::fs::remove_file(&directory));
        }
    }
}

/// The open files and threads of a process, to check that nothing is left behind.
#[derive(Debug, PartialEq, Eq)]
pub struct Belongings {
    descriptors: usize,
    threads: usize,
}

impl Belongings {
    /// Counts them now, for the process `pid`. The heartbeat and its watchdog, which starts at the first heartbeat,
    /// count as one. Where the system does not show them (neither Linux nor Windows), all counts are equal.
    pub fn of(pid: u32) -> Self {
        let names = thread_names(pid);
        let of_leases = names.iter().filter(|name| *name == "lockkit-lease").count();
        Self { descriptors: descriptors(pid), threads: names.len() - usize::from(of_leases == 2) }
    }

    /// Returns the number of open descriptors, or handles.
    pub fn descriptors(&self) -> usize {
        self.descriptors
    }

    /// Returns the number of threads.
    pub fn threads(&self) -> usize {
        self.threads
    }
}

#[cfg(target_os = "linux")]
fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).expect("/proc").count()
}

#[cfg(windows)]
use windows::handles as descriptors;

#[cfg(not(any(target_os = "linux", windows)))]
fn descriptors(_pid: u32) -> usize {
    0
}

/// Returns the names of the threads of the process `pid`. A thread that is just beginning or ending may have no name.
/// Where the system does not show them, the list is empty.
#[cfg(target_os = "linux")]
pub(crate) fn thread_names(pid: u32) -> Vec<String> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("/proc").flatten();
    let name = |thread: std::fs::DirEntry| std::fs::read_to_string(thread.path().join("comm")).unwrap_or_default();
    threads.map(|thread| name(thread).trim_end().to_owned()).collect()
}

#[cfg(windows)]
pub(crate) use windows::threads as thread_names;

#[cfg(not(any(target_os = "linux", windows)))]
pub(crate) fn thread_names(_pid: u32) -> Vec<String> {
    Vec::new()
}

/// Returns whether a thread of the process `pid` sleeps, as a waiter does.
#[cfg(target_os = "linux")]
pub fn sleeps(pid: u32, thread: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/task/{thread}/stat")).unwrap_or_default();
    stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with('S')
}

/// Returns true after a moment, because this system does not show it. Most waiters sleep by then. A test's later
/// assertions must hold at any moment of the waiter.
#[cfg(not(target_os = "linux"))]
pub fn sleeps(_pid: u32, _thread: u32) -> bool {
    std::thread::sleep(Duration::from_millis(10));
    true
}

/// Returns this thread's id, as [`sleeps`] expects it.
pub fn thread_id() -> u32 {
    #[cfg(target_os = "linux")]
    return rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
    #[cfg(not(target_os = "linux"))]
    0
}

/// Stops the process `pid` until [`resume`].
pub fn stop(pid: u32) {
    #[cfg(unix)]
    helper_process::signal_pid(pid, rustix::process::Signal::STOP);
    #[cfg(windows)]
    windows::suspend(pid, true);
}

/// Ends a [`stop`].
pub fn resume(pid: u32) {
    #[cfg(unix)]
    helper_process::signal_pid(pid, rustix::process::Signal::CONT);
    #[cfg(windows)]
    windows::suspend(pid, false);
}

/// Kills a grandchild process. Ignores a process that is already gone. Where a kill needs a handle, which no process
/// has on it, it ends by itself.
pub fn kill_pid(pid: u32) {
    #[cfg(unix)]
    helper_process::signal_pid(pid, rustix::process::Signal::KILL);
    #[cfg(not(unix))]
    let _ = pid;
}

/// Returns whether a child that has been waited for was killed, and did not end by itself.
pub fn was_killed(status: std::process::ExitStatus) -> bool {
    #[cfg(unix)]
    return std::os::unix::process::ExitStatusExt::signal(&status) == Some(9);
    // A panic exits with 101.
    #[cfg(not(unix))]
    return status.code() == Some(1);
}

/// Compiles the examples in the project's pages. They are here and not in lockkit itself, whose package has neither
/// these pages nor the peers that one of them shows. The README's examples of instances are for Linux.
#[cfg(all(doctest, target_os = "linux"))]
mod pages {
    #[doc = include_str!("../../README.md")]
    struct Readme;
    #[doc = include_str!("../../docs/ENGINES.md")]
    struct Engines;
    #[doc = include_str!("../../docs/MIGRATING.md")]
    struct Migrating;
    #[doc = include_str!("../../docs/COMPARE.md")]
    struct Compare;
    #[doc = include_str!("../../lockkit-macros/README.md")]
    struct Macros;
}
