//! Tests of lockkit with real processes, real signals and real kills.
//!
//! - [`Kind`] is a kind of lock under test, and [`Spec`] one lock of it, which any process can open from its text.
//! - [`Actor`] is a second process (the program `actor` of this package) that takes and releases locks as it is told.
//! - [`mod@suite`] has the cases that every kind must pass; [`suite!`] makes tests of them.
//! - [`chaos`] lets a conductor kill and stop many processes at random, and checks the log of who held when.

pub mod actor;
pub mod chaos;
pub mod kinds;
pub mod steps;
pub mod suite;

pub use actor::Actor;
pub use kinds::{Kind, Spec};

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

/// The program `name` of this package, beside the test that runs.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test knows where it is");
    let folder = test.ancestors().find(|folder| folder.join(name).is_file());
    folder.unwrap_or_else(|| panic!("{name} is not built beside {}", test.display())).join(name)
}

/// A name that no other test and no other run uses.
pub fn fresh_name(prefix: &str) -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("{prefix}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// What this process has open and running, to see that nothing is left behind.
#[derive(Debug, PartialEq, Eq)]
pub struct Belongings {
    descriptors: usize,
    threads: usize,
}

impl Belongings {
    /// Counts them now, for the process `pid`.
    pub fn of(pid: u32) -> Self {
        let count = |folder: &str| std::fs::read_dir(format!("/proc/{pid}/{folder}")).expect("/proc").count();
        Self { descriptors: count("fd"), threads: count("task") }
    }
}

/// A token that a thread cancels once this process has `threads` threads asleep in a wait; used to cancel a waiter
/// that is known to wait.
pub fn sleeps(pid: u32, thread: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/task/{thread}/stat")).unwrap_or_default();
    stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with('S')
}

/// This thread's id, as `/proc` names it.
pub fn thread_id() -> u32 {
    rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs()
}
