//! Locks that outlive a process boundary: each gives an owned guard, and dropping the guard releases.
//!
//! A crash never leaves a lock stuck, never lets two in, and the next owner is told about it.
//!
//! | type | a lock on | pick it for |
//! |---|---|---|
//! | [`NamedLock`] | a name on this machine | single-instance programs, cron jobs, daemons |
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

#![warn(missing_docs)]
#![deny(unsafe_code)]
// They are const; clippy does not see it in what the macro makes of them there.
#![cfg_attr(windows, allow(clippy::missing_const_for_thread_local))]

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
mod wait;

pub use error::{Error, ErrorKind, Result};
pub use file::{FileGuard, FileLock};
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
    #[cfg(feature = "macros")]
    pub use crate::single_instance;
    pub use crate::{CancelToken, FileLock, Guard, Lease, Lock, LockManager, NamedLock, PidFile, Wait};
}

/// Compiles what README shows.
#[cfg(all(doctest, feature = "macros"))]
#[doc = include_str!("../../README.md")]
struct Readme;
