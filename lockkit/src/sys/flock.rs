//! Whole-file locks: flock(2), through `fs2`.
//!
//! Only this module uses `fs2`, and changes two results: a wait continues after a signal, and a
//! lock that another process holds is `false`, not an error.

use std::fs::File;
use std::io;

use fs2::FileExt;

use crate::sys::failpoint::step;

/// How much a lock on a file excludes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Allows other shared locks.
    Shared,
    /// Allows no other lock.
    Exclusive,
}

/// Acquires the lock. Waits in the kernel without a limit.
pub(crate) fn lock(file: &File, mode: Mode) -> io::Result<()> {
    retry_interrupted(|| match mode {
        Mode::Shared => FileExt::lock_shared(file),
        Mode::Exclusive => FileExt::lock_exclusive(file),
    })
}

/// Acquires the lock if it is free. Returns whether it was.
pub(crate) fn try_lock(file: &File, mode: Mode) -> io::Result<bool> {
    let tried = retry_interrupted(|| match mode {
        Mode::Shared => FileExt::try_lock_shared(file),
        Mode::Exclusive => FileExt::try_lock_exclusive(file),
    });
    match tried {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}

/// Releases the lock, also if a forked child still has the descriptor.
pub(crate) fn unlock(file: &File) -> io::Result<()> {
    retry_interrupted(|| FileExt::unlock(file))
}

/// Whether the error says that the file system has no flock at all, so that no process can hold one
/// on the file. Any other error (`ENOLCK`, `ENOMEM`, `EIO`) says nothing about the locks of other
/// processes.
pub(crate) fn is_unsupported(error: &io::Error) -> bool {
    // ENOTSUP and EOPNOTSUPP are the same number on Linux only.
    let unsupported = [libc::ENOSYS, libc::EOPNOTSUPP, libc::ENOTSUP];
    error
        .raw_os_error()
        .is_some_and(|code| unsupported.contains(&code))
}

fn retry_interrupted(mut call: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => {
                // A failed call has changed nothing.
                if result.is_ok() {
                    step("flock called");
                }
                return result;
            }
        }
    }
}
