//! Tests of lockkit with real processes, real signals and real kills.
//!
//! - [`Kind`] is a kind of lock under test, and [`Spec`] one lock of it, which any process can open from its text.
//! - [`Actor`] is a second process (the program `actor` of this package) that takes and releases locks as it is told.
//! - [`mod@everywhere`] has the core of it in a form that runs on every system; the rest is Unix's.
//! - [`mod@suite`] has the cases that every kind must pass; [`suite!`] makes tests of them.
//! - [`mod@tasks`] has the cases of waits in tasks that every kind must pass, and [`task_suite!`] makes tests of them.
//! - [`mod@managers`] has the tables of locks under test, the cases that every manager must pass, and a second process
//!   that works on a table as it is told.
//! - [`mod@leases`] has a second process that works on a lease as it is told, and forges records.
//! - [`instances`] has a second process that is an instance of a program, and peers that mean ill with the first.
//! - [`mod@faults`] takes from locks what the system owes them: room, files, processes, uninterrupted sleep.
//! - [`servers`] starts real servers, and sees that they end.
//! - [`mod@engines`] has the drills of leases on servers; [`drills!`] makes tests of them for one engine.
//! - [`chaos`] lets a conductor kill and stop many processes at random, and checks the log of who held when.

#[cfg(unix)]
pub mod actor;
#[cfg(unix)]
pub mod chaos;
#[cfg(unix)]
pub mod engines;
pub mod everywhere;
#[cfg(unix)]
pub mod faults;
#[cfg(unix)]
pub mod instances;
#[cfg(unix)]
pub mod kinds;
#[cfg(unix)]
pub mod leases;
#[cfg(unix)]
pub mod managers;
#[cfg(unix)]
pub mod rogue;
#[cfg(unix)]
pub mod servers;
#[cfg(unix)]
pub mod steps;
#[cfg(unix)]
pub mod suite;
#[cfg(unix)]
pub mod tasks;

#[cfg(unix)]
pub use actor::Actor;
#[cfg(unix)]
pub use kinds::{Kind, Spec};

#[cfg(unix)]
use std::io::{BufRead, BufReader, IoSliceMut, Read};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long anything may take that must happen: far more than it needs, for machines can be slow.
pub const LIVELY: Duration = Duration::from_secs(30);

/// Waits until `fact` holds; panics with `what` when it does not within [`LIVELY`].
pub fn until(what: &str, mut fact: impl FnMut() -> bool) {
    let start = Instant::now();
    while !fact() {
        assert!(start.elapsed() < LIVELY, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[cfg(unix)]
/// Runs a case for a kind of lock, or says why this machine cannot.
pub fn left_out_or(kind: Kind, case: impl FnOnce(Kind)) {
    match kind.left_out() {
        None => case(kind),
        Some(why) => left_out(why),
    }
}

/// Says that the test on this thread is left out, and why: also when those who run tests keep to themselves what passing
/// ones print.
pub fn left_out(why: impl std::fmt::Display) {
    use std::io::Write;
    let thread = std::thread::current();
    // Nobody reads it where it cannot be written.
    let _ = writeln!(std::io::stderr(), "left out: {}: {why}", thread.name().unwrap_or_default());
}

/// The program `name` of this package, beside the test that runs.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test knows where it is");
    let folder = test.ancestors().find(|folder| folder.join(name).is_file());
    folder.unwrap_or_else(|| panic!("{name} is not built beside {}", test.display())).join(name)
}

#[cfg(unix)]
/// The lines of standard input, as the commands of a second process. They are read with `readv`, so that a test can let
/// each `read` of a lock fail, and no other.
pub fn commands() -> impl Iterator<Item = String> {
    struct Input;
    impl Read for Input {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            Ok(rustix::io::readv(std::io::stdin(), &mut [IoSliceMut::new(buffer)])?)
        }
    }
    BufReader::new(Input).lines().map_while(Result::ok)
}

/// A name that no other test and no other run uses.
pub fn fresh_name(prefix: &str) -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("{prefix}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

#[cfg(unix)]
/// A user that nobody else is, for tests in which another one is needed; `None`, with a word on it, where this process
/// may not act as others. Dropping it takes away what lockkit made for that user.
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

#[cfg(unix)]
/// See [`another_user`].
#[derive(Debug)]
pub struct AnotherUser {
    /// Its uid.
    pub uid: u32,
}

#[cfg(unix)]
impl AnotherUser {
    /// The folders that lockkit uses for this user: that of the file backend, and that of the records in memory.
    pub fn folders(&self) -> [PathBuf; 2] {
        ["/tmp", "/dev/shm"].map(|base| PathBuf::from(format!("{base}/lockkit-u{}", self.uid)))
    }
}

#[cfg(unix)]
impl Drop for AnotherUser {
    fn drop(&mut self) {
        for folder in self.folders() {
            let _ = std::fs::remove_dir_all(&folder).or_else(|_| std::fs::remove_file(&folder));
        }
    }
}

/// What this process has open and running, to see that nothing is left behind.
#[derive(Debug, PartialEq, Eq)]
pub struct Belongings {
    descriptors: usize,
    threads: usize,
}

impl Belongings {
    /// Counts them now, for the process `pid`. The heartbeat and its deputy, which comes at the first beat, count as one.
    pub fn of(pid: u32) -> Self {
        let list = |folder: &str| std::fs::read_dir(format!("/proc/{pid}/{folder}")).expect("/proc").flatten();
        let is_of_leases = |thread: &std::fs::DirEntry| {
            std::fs::read_to_string(thread.path().join("comm")).is_ok_and(|name| name.trim_end() == "lockkit-lease")
        };
        let (of_leases, others): (Vec<_>, Vec<_>) = list("task").partition(is_of_leases);
        let beating = if of_leases.len() == 2 { 1 } else { of_leases.len() };
        Self { descriptors: list("fd").count(), threads: others.len() + beating }
    }

    /// How many descriptors it has open.
    pub fn descriptors(&self) -> usize {
        self.descriptors
    }

    /// How many threads it has.
    pub fn threads(&self) -> usize {
        self.threads
    }
}

/// Whether a thread of the process `pid` sleeps, as a waiter does.
pub fn sleeps(pid: u32, thread: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/task/{thread}/stat")).unwrap_or_default();
    stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with('S')
}

#[cfg(unix)]
/// This thread's id, as `/proc` names it.
pub fn thread_id() -> u32 {
    rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs()
}

/// Compiles what the pages of the project show. Here and not in lockkit itself, whose package has neither these pages nor
/// the peers that one of them shows. What the README shows of instances is Linux's.
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
