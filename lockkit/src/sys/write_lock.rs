//! The lock of a pidfile's holder, which a process that may only read the file cannot acquire.
//!
//! On Linux it is a write lock of the open file ([`ofd`](super::ofd)). The kernel grants one only
//! through a descriptor that is open for writing, and distinguishes write locks from read locks. So
//! the locks of readers delay no holder, and are not mistaken for one. Forked children share the
//! lock with the open file.
//!
//! Elsewhere, and on a kernel without such locks (`EINVAL`), it is flock(2), which readers can
//! acquire, too.

use std::fs::File;
use std::io;

use super::failpoint::step;
use super::{flock, ofd};

/// Acquires the lock if no process has a lock on the file. Returns whether it did. The file must be
/// open for writing.
pub(crate) fn try_lock(file: &File) -> io::Result<bool> {
    if let Some(answer) = supported(ofd::try_write_lock(file)) {
        let acquired = answer?;
        if acquired {
            step("write lock acquired");
        }
        return Ok(acquired);
    }
    flock::try_lock(file, flock::Mode::Exclusive)
}

/// Releases the lock, also if a forked child shares the open file.
pub(crate) fn unlock(file: &File) -> io::Result<()> {
    if let Some(answer) = supported(ofd::unlock(file)) {
        return answer.inspect(|()| step("write lock released"));
    }
    flock::unlock(file)
}

/// Returns the process that has the lock through another open file, or 0 if the system does not
/// name it. Returns `None` if no process has it.
pub(crate) fn holder(file: &File) -> io::Result<Option<u32>> {
    if let Some(answer) = supported(ofd::writer(file)) {
        return answer;
    }
    // Shared, so that two processes that check do not mistake each other for a holder.
    match flock::try_lock(file, flock::Mode::Shared)? {
        true => flock::unlock(file).map(|()| None),
        false => Ok(Some(0)),
    }
}

/// Sleeps until no other process has the lock. The file must be open for reading. Closing it
/// removes what the wait leaves behind.
pub(crate) fn wait(file: &File) -> io::Result<()> {
    if let Some(answer) = supported(ofd::wait_for_writers(file)) {
        return answer.inspect(|()| step("write lock waited for"));
    }
    flock::lock(file, flock::Mode::Shared)
}

/// Returns the kernel's answer, or `None` if the system does not know the command.
fn supported<T>(answer: io::Result<T>) -> Option<io::Result<T>> {
    // Linux has the locks since 3.15, and some kernels that emulate Linux have none (`EINVAL`,
    // `ENOSYS`).
    let is_unknown = |error: &io::Error| {
        matches!(
            error.kind(),
            io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported
        ) || flock::is_unsupported(error)
    };
    if answer.as_ref().is_err_and(is_unknown) {
        None
    } else {
        Some(answer)
    }
}
