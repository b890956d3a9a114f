//! Sleeping until a word of shared memory changes: [futex(2)].
//!
//! [futex(2)]: https://man7.org/linux/man-pages/man2/futex.2.html

use std::io;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use rustix::event::Timespec;
use rustix::io::Errno;
use rustix::thread::futex::{self, Flags};

/// What ended a sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Woke {
    /// The word already had another value, or another thread woke this one.
    Early,
    /// A signal arrived.
    Interrupted,
    /// The limit passed.
    TimedOut,
}

/// Sleeps until a thread of this or another process calls [`wake_one`] for `word`, but at most
/// `limit`, and only if `word` is still `expected`.
pub(crate) fn wait(word: &AtomicU32, expected: u32, limit: Duration) -> io::Result<Woke> {
    let limit = Timespec::try_from(limit).ok();
    match futex::wait(word, Flags::empty(), expected, limit.as_ref()) {
        Ok(()) | Err(Errno::AGAIN) => Ok(Woke::Early),
        Err(Errno::INTR) => Ok(Woke::Interrupted),
        Err(Errno::TIMEDOUT) => Ok(Woke::TimedOut),
        Err(error) => Err(error.into()),
    }
}

/// Wakes the thread that has slept longest on `word`. Returns whether there was one.
pub(crate) fn wake_one(word: &AtomicU32) -> bool {
    futex::wake(word, Flags::empty(), 1).is_ok_and(|woken| woken > 0)
}
