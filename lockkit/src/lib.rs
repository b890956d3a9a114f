//! Locks that outlive a process boundary: each gives an owned guard, and dropping the guard releases.
//!
//! A crash never leaves a lock stuck, never lets two in, and the next owner is told about it.
//!
//! | type | a lock on | pick it for |
//! |---|---|---|
//! | [`NamedLock`] | a name on this machine | single-instance programs, cron jobs, daemons |
//! | [`Instance`] | a name, whose holder further starts talk to (Linux) | programs that are started again to open more |
//! | [`FileLock`] | a path, exclusive or shared | guarding a file or folder, working together with flock(1) |
//! | [`PidFile`] | a path whose file says who holds it | daemons, `kill $(cat …)`, systemd's `PIDFile=` |
//! | [`Lease`] | a key, for a time that a heartbeat renews | leaders, shared disks, several hosts |
//! | [`LockManager`] | a number out of a table | thousands of fine locks |
//!
//! ```
//! use lockkit::prelude::*;
//! # fn main() -> lockkit::Result<()> {
//! let lock = NamedLock::new("lockkit-doc-crate")?;
//! {
//!     let _guard = lock.lock()?;
//!     // One process at a time is here.
//! }
//! # Ok(()) }
//! ```
//!
//! [`single_instance`] puts a named lock around a whole function:
//! ```no_run
//! # #[cfg(feature = "macros")]
//! #[lockkit::single_instance("com.example.backup")]
//! fn main() {
//!     println!("no other one of me runs");
//! }
//! # #[cfg(not(feature = "macros"))] fn main() {}
//! ```
//!
//! With the feature `tokio` every lock can be waited for in tasks, too (`acquire_async`, [`AsyncLock`]). With the feature
//! `tracing` they tell a subscriber what happens to them: debug events when a lock is waited for (`holder`) and acquired
//! (`waited`, in seconds), a warning when the owner before died (`recovered`), an error when a lease is lost (`token`,
//! `reason`), and trace events at the release, each with the `kind` and the `name` of the lock and in a debug span
//! `acquire` for as long as an acquisition takes.
//!
#![cfg_attr(not(feature = "tokio"), doc = "[`AsyncLock`]: https://docs.rs/lockkit/latest/lockkit/trait.AsyncLock.html")]
#![warn(missing_docs)]
#![deny(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(feature = "tokio")]
mod awaiting;
#[cfg(all(unix, feature = "cli"))]
#[doc(hidden)]
pub mod command;
mod error;
mod file;
#[cfg(target_os = "linux")]
mod flocks;
pub mod instance;
pub mod lease;
mod lines;
mod lock;
mod manager;
mod name;
mod named;
mod owner;
mod pidfile;
#[cfg(feature = "steps")]
#[doc(hidden)]
pub mod steps;
#[cfg(not(feature = "steps"))]
mod steps;
mod sys;
mod trace;
mod wait;

#[cfg(feature = "tokio")]
pub use awaiting::AsyncLock;
pub use error::{Error, ErrorKind, Result};
pub use file::{FileGuard, FileLock};
#[cfg(target_os = "linux")]
pub use instance::{Activation, FirstInstance, Instance, SecondInstance};
pub use lease::{Lease, LeaseBuilder, LeaseGuard, LeaseStatus, Loss, LossReason, LostSignal};
pub use lock::{Guard, Lock, Recovered};
#[cfg(feature = "macros")]
#[doc = include_str!("single_instance.md")]
pub use lockkit_macros::single_instance;
pub use manager::{
    FileLockManager, HeldLock, InMemoryLockManager, LockManager, ManagedGuard, ManagedLock, ShmLockManager,
};
pub use named::{Backend, NamedGuard, NamedLock, NamedLockBuilder, Scope};
pub use owner::{Liveness, Owner};
pub use pidfile::{PidFile, PidGuard, PidStatus};
pub use wait::{CancelToken, Wait};

/// What most programs need, for one `use`.
pub mod prelude {
    #[cfg(target_os = "linux")]
    pub use crate::Instance;
    #[cfg(feature = "macros")]
    pub use crate::single_instance;
    pub use crate::{CancelToken, FileLock, Guard, Lease, Lock, LockManager, NamedLock, PidFile, Wait};
}

/// Compiles what README shows.
#[cfg(all(doctest, feature = "macros"))]
#[doc = include_str!("../../README.md")]
struct Readme;

/// Compiles what the page on engines shows.
#[cfg(doctest)]
#[doc = include_str!("../../docs/ENGINES.md")]
struct Engines;
