//! The part of the library's system layer that the command `lockkit` needs. Other programs should not use it.

use std::fs::File;
#[cfg(target_os = "linux")]
use std::io;

#[cfg(windows)]
pub use crate::sys::command::{Cage, end_at_a_closed_pipe, pass_over_interrupts};
#[cfg(unix)]
pub use crate::sys::command::{as_given, end_at_a_closed_pipe, fork, inherited, rename_process, wait_for_children};
#[cfg(target_os = "linux")]
pub use crate::sys::proc_locks::{FileLocks, Locked, Mechanism, OnFile};
use crate::{NamedLock, Owner, Result};

/// Returns whether a process has an fcntl lock on any byte of the file, with its pid if the kernel reports it. Locks
/// nothing.
///
/// # Errors
/// Fails if the file system has no such locks.
#[cfg(target_os = "linux")]
pub fn fcntl_holder(file: &File) -> io::Result<Option<Option<u32>>> {
    crate::sys::ofd::holder(file)
}

/// Returns whether the lock is held now. On Linux this takes no place in the holder's queue of waiters, and its cost
/// does not depend on the number of held locks.
///
/// # Errors
/// [`Io`](crate::ErrorKind::Io) if the system does not report the state.
pub fn is_held(lock: &NamedLock) -> Result<bool> {
    lock.is_held()
}

/// Returns whether the file has the attribute in which lockkit keeps the owner of a pidfile.
pub fn is_own_pidfile(file: &File) -> bool {
    crate::pidfile::has_identity(file)
}

/// Returns whether two owners are the same process, whatever program it runs and since when it holds a lock.
pub fn is_same_process(one: &Owner, other: &Owner) -> bool {
    one.is_same_process(other)
}
