//! Tests of lockkit with real processes, real signals and real kills.
//!
//! - [`Kind`] is a kind of lock under test. [`Spec`] is one lock of a kind, which any process can
//!   open from its text.
//! - [`Actor`] is a second process (the program `actor` of this package) that acquires and releases
//!   locks on command.
//! - [`mod@conformance`] has the cases that every kind must pass, on every system; [`conformance!`]
//!   makes tests of them.
//! - [`mod@async_conformance`] has the cases of waits in tasks that every kind must pass, and
//!   [`task_suite!`] makes tests of them.
//! - [`mod@managers`] has the tables of locks under test, and the cases that every manager must
//!   pass. It also has a second process that works on a table on command.
//! - [`mod@leases`] has a second process that works on a lease on command, and forges records.
//! - [`instances`] has a second process that is an instance of a program, and peers that attack the
//!   first instance.
//! - [`failpoint`] has the places in the library at which a test kills or stops a process.
//! - [`mod@fault_injection`] takes resources from locks: room, files, processes, uninterrupted
//!   sleep.
//! - [`realtime`] has a process of a real-time class on one processor.
//! - [`servers`] starts real servers, and ensures that they end.
//! - [`mod@server_conformance`] has the drills of leases on servers; [`drills!`] makes tests of
//!   them for one engine.
//! - [`until`] waits for a fact, [`left_out()`] reports a test that this machine cannot run, and
//!   [`Belongings`] counts what a process must not leave behind.
//! - [`errors`] formats errors.
//! - [`small_disk`] has a small file system, which a test can fill.
//! - [`namespaces`] makes user namespaces, in which a uid means several users.
//! - [`wine`] lists the differences between Wine and Windows, because of which Wine cannot judge
//!   every case.
//! - [`chaos`] kills and stops many processes at random, and checks the log of the holders and
//!   their times.

pub mod async_conformance;
pub mod chaos;
pub mod conformance;
pub mod crash_points;
pub mod errors;
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
mod left_out;
pub mod managers;
#[cfg(target_os = "linux")]
pub mod namespaces;
mod process;
#[cfg(target_os = "linux")]
pub mod realtime;
#[cfg(target_os = "linux")]
pub mod server_conformance;
#[cfg(target_os = "linux")]
pub mod servers;
pub mod small_disk;
#[cfg(target_os = "linux")]
mod users;
mod waiting;
#[cfg(windows)]
mod windows;
pub mod wine;

pub use fixtures::{Kind, Spec};
pub use helper_process::Actor;
pub use left_out::{is_on_a_host, left_out};
#[cfg(unix)]
pub use process::signal_pid;
pub(crate) use process::thread_names;
pub use process::{
    Belongings, commands, kill_pid, program, resume, sleeper, sleeps, stop, succeeds, thread_id,
    was_killed,
};
#[cfg(target_os = "linux")]
pub use process::{is_stopped, wait_until_stopped};
#[cfg(target_os = "linux")]
pub use users::{AnotherUser, another_user};
pub use waiting::{LIVELY, fresh_name, until, until_some};

/// Compiles the examples in the project's pages. They are here and not in lockkit itself, whose
/// package has neither these pages nor the peers that one of them shows. The README's examples of
/// instances are for Linux.
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
