//! When the comparison of the open file with the path may be omitted.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// How long a comparison is valid for locks that follow each other in a [`RecheckWindow`], in
/// nanoseconds.
pub(super) const MAX_COMPARISON_AGE: u64 = 1_000_000;

/// The time from one lock here to the next, with the unlock in between, in which no other process
/// can have locked, deleted and unlocked. It is at most the shortest time in which this process
/// ever unlocked, locked and looked up the path. A deletion begins with such a look-up and then
/// does more work. So the window fits the speed of the machine.
pub(super) struct RecheckWindow {
    samples: AtomicU32,
    nanos: AtomicU64,
}

impl RecheckWindow {
    /// The number of measurements that the window needs: any one of them may have been interrupted.
    const MIN_SAMPLES: u32 = 32;
    /// The upper bound of the window, whatever was measured.
    const MAX_NANOS: u64 = 2000;

    const fn new() -> Self {
        Self {
            samples: AtomicU32::new(0),
            nanos: AtomicU64::new(Self::MAX_NANOS),
        }
    }

    /// Records a measured time that includes a look-up of the path.
    #[cold]
    pub(super) fn add_sample(&self, nanos: u64) {
        self.nanos.fetch_min(nanos, Ordering::Relaxed);
        if self.samples.load(Ordering::Relaxed) < Self::MIN_SAMPLES {
            self.samples.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns whether a time without a look-up is in the window. A time of zero means that the
    /// clock is too coarse.
    #[inline]
    pub(super) fn covers(&self, nanos: u64) -> bool {
        nanos != 0
            && self.samples.load(Ordering::Relaxed) >= Self::MIN_SAMPLES
            && nanos < self.nanos.load(Ordering::Relaxed)
    }
}

pub(super) static RECHECK_WINDOW: RecheckWindow = RecheckWindow::new();
