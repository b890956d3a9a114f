//! Locks on a name, valid for all processes of a user or of the machine.
//!
//! [`NamedLock`] is the public type. A [`Backend`] says how the lock is held: a listening socket
//! (`socket`, Linux), a named mutex (`mutex_windows`), or a locked file in a private directory
//! (`file`, on all other systems, and on request). All backends report a dead holder to the next
//! one with the same small record (`holder_record`).
//!
//! # Implementation
//! `backend` combines the file backend and the native backend of the system into one type. `native`
//! is an alias for the module of that backend: `socket`, `mutex_windows` or `no_native`. `lock`,
//! `guard` and `options` have the public types.

mod backend;
mod file;
mod guard;
mod lock;
#[cfg(windows)]
mod mutex_windows;
#[cfg(not(any(target_os = "linux", windows)))]
mod no_native;
mod options;
#[cfg(target_os = "linux")]
mod records;
#[cfg(target_os = "linux")]
mod socket;

#[cfg(windows)]
use mutex_windows as native;
#[cfg(not(any(target_os = "linux", windows)))]
use no_native as native;
#[cfg(target_os = "linux")]
use socket as native;

pub use guard::NamedGuard;
pub use lock::{HeldNamedLock, NamedLock, NamedLockBuilder};
pub use options::{Backend, Scope};
