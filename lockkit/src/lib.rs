//! Locks between processes: each lock gives an owned guard, and dropping the guard releases the
//! lock.
//!
//! A crash never leaves a lock stuck and never lets two processes hold it. The next owner's guard
//! reports the crash.
//!
//! # Which one first
//!
//! Use a [`NamedLock`], or [`single_instance`], which puts one around a function, unless one of
//! these is true:
//!
//! | if | use | it is a lock on |
//! |---|---|---|
//! | a file or directory is guarded, several processes may read it together, or flock(1) is used too | [`FileLock`] | a path, exclusive or shared |
//! | a second start hands its arguments over to the first (Linux) | [`Instance`] | a name, whose holder receives the messages of further starts |
//! | people and programs want to read the holder's pid: `kill $(cat …)`, systemd's `PIDFile=` | [`PidFile`] | a path whose file names the holder |
//! | several hosts take part, or a holder that hangs must lose its lock | [`Lease`] | a key, for a time that a heartbeat renews |
//! | there are thousands of locks, or one is acquired a million times a second | [`ShmLockManager`] | a number from a table in shared memory |
//! | the same, without memory to share; or inside one process, for tests | [`FileLockManager`]; [`InMemoryLockManager`] | a number |
//!
//! All are a [`Lock`] with a [`Guard`], and wait as a [`Wait`] says: not at all, for ever, up to a
//! limit, until a [`CancelToken`] is cancelled.
//!
//! ```
//! use lockkit::prelude::*;
//! # fn main() -> lockkit::Result<()> {
//! let lock = NamedLock::new("lockkit-doc-crate")?;
//! {
//!     let guard = lock.lock()?;
//!     // One process at a time is here.
//!     if let Some(died) = guard.recovered() {
//!         eprintln!("the previous owner died inside: {died}");
//!     }
//! }
//! # Ok(()) }
//! ```
//!
//! ```no_run
//! # #[cfg(feature = "macros")]
//! #[lockkit::single_instance("com.example.backup")]
//! fn main() {
//!     println!("no other one of me runs");
//! }
//! # #[cfg(not(feature = "macros"))] fn main() {}
//! ```
//!
//! The features `etcd`, `postgres` and `redis` add leases on servers: [`Lease::connect`] takes
//! their URL. All features but `macros`, the attribute, are off by default. The package
//! `lockkit-cli` has the command `lockkit`, which on Linux is flock(1), too.
//!
//! With the feature `tokio` every lock can also be acquired in tasks (`acquire_async`,
//! [`AsyncLock`]). With the feature `tracing` the locks report events to a subscriber:
//!
//! - debug events when a lock is waited for (`holder`) and acquired (`waited`, in seconds);
//! - a warning if the previous owner died (`recovered`);
//! - an error if a lease is lost (`token`, `reason`);
//! - trace events at the release.
//!
//! Each event has the `kind` and the `name` of the lock. A debug span `acquire` covers each
//! acquisition.
//!
#![cfg_attr(
    not(feature = "tokio"),
    doc = "[`AsyncLock`]: https://docs.rs/lockkit/latest/lockkit/trait.AsyncLock.html"
)]
#![doc = include_str!("traps.md")]
#![warn(missing_docs)]
#![deny(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]
// They are const; clippy does not see that in the macro's expansion there.
#![cfg_attr(windows, allow(clippy::missing_const_for_thread_local))]

mod base;
mod file_lock;
pub mod instance;
pub mod lease;
mod manager;
mod named;
mod pidfile;
mod sys;

#[cfg(feature = "tokio")]
pub use base::blocking::AsyncLock;
pub use base::cancel::CancelToken;
pub use base::error::{Error, ErrorKind, Result};
pub use base::guard::{Guard, Recovered};
pub use base::lock::Lock;
pub use base::owner::{Liveness, Owner};
pub use base::wait::Wait;
pub use file_lock::{FileGuard, FileLock};
#[cfg(target_os = "linux")]
pub use instance::{Activation, FirstInstance, Instance, SecondInstance};
pub use lease::{Lease, LeaseBuilder, LeaseGuard, LeaseStatus, Loss, LossReason, LostSignal};
#[cfg(feature = "macros")]
#[doc = include_str!("single_instance.md")]
pub use lockkit_macros::single_instance;
pub use manager::{
    FileLockManager, HeldLock, InMemoryLockManager, LockManager, ManagedGuard, ManagedLock,
    ShmLockManager,
};
pub use named::{Backend, HeldNamedLock, NamedGuard, NamedLock, NamedLockBuilder, Scope};
pub use pidfile::{PidFile, PidGuard, PidStatus};
#[cfg(lockkit_failpoints)]
pub use sys::failpoint;
#[cfg(target_os = "linux")]
#[cfg_attr(docsrs, doc(cfg(target_os = "linux")))]
pub use sys::proc_locks;

/// The items that most programs need, for one `use`.
pub mod prelude {
    #[cfg(target_os = "linux")]
    pub use crate::Instance;
    #[cfg(feature = "macros")]
    pub use crate::single_instance;
    pub use crate::{
        CancelToken, FileLock, Guard, Lease, Lock, LockManager, NamedLock, PidFile, Wait,
    };
}
