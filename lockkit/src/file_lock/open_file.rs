//! The open file of a lock, which is kept between acquisitions.

use std::fs::File;

use super::recheck::RECHECK_WINDOW;
use crate::sys::file_id::FileId;
use crate::sys::fork::{ForkGuarded, ProcessId};

/// An open file, and when it was used.
#[derive(Debug)]
pub(super) struct OpenFile {
    pub(super) file: ForkGuarded<File>,
    pub(super) id: FileId,
    /// Identifies the process that opened it: a forked child's copy is inert.
    pub(super) process: ProcessId,
    /// Whether this acquisition created it.
    pub(super) is_new: bool,
    /// When it was last seen to be the file at the path. This and the next two values are
    /// [`nanos`](crate::sys::clock::nanos); 0 means never.
    pub(super) compared_at: u64,
    /// When the descriptor was last used, and belonged to the lock.
    pub(super) used_at: u64,
    /// When the lock was last known to be held, at the beginning of a hold. A holder that deletes
    /// its own file does so later, so a [`RecheckWindow`](super::recheck::RecheckWindow) starts
    /// here.
    pub(super) held_at: u64,
}

impl OpenFile {
    /// The divisor of a recheck window for a time too short to close a file and open another: an
    /// open looks a path up, and does more.
    pub(super) const HELD_DIVISOR: u64 = 2;
    /// The same divisor for the time between two holds, which includes an unlock.
    pub(super) const IDLE_DIVISOR: u64 = 3;

    /// Returns whether the descriptor still belongs to this lock. `divisor` divides the recheck
    /// window: the quotient is too short to replace the descriptor.
    #[inline]
    pub(super) fn is_own(&self, now: u64, divisor: u64) -> bool {
        RECHECK_WINDOW.covers(now.wrapping_sub(self.used_at).saturating_mul(divisor))
            || self.file.is_own()
    }
}
