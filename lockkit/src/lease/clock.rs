//! The clocks by which leases are counted.
//!
//! A lease is a promise about time, so the clock must not be one that somebody sets, and must go on while the machine
//! sleeps: a holder that slept for an hour must find its lease gone. No two processes compare their clocks; each only
//! measures how long something has been as it is on its own.

use std::fmt;
use std::mem;
use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use parking_lot::Mutex;

use crate::sys::{clock, process};

/// What a lease reads the time from.
///
/// Programs need [`SystemClock`], which every lease has unless told otherwise; tests need [`ManualClock`].
///
/// One that goes twice as fast as the system's:
///
/// ```
/// use std::task::Waker;
/// use std::time::Duration;
/// use lockkit::lease::{Clock, SystemClock};
///
/// #[derive(Debug)]
/// struct Fast;
///
/// impl Clock for Fast {
///     fn now(&self) -> Duration {
///         SystemClock.now() * 2
///     }
///     fn on_jump(&self, _sleeper: &Waker) {} // It never jumps.
///     fn shared_id(&self) -> Option<u128> {
///         None // No other process has it.
///     }
/// }
/// # assert!(Fast.now() > SystemClock.now() && Fast.shared_id().is_none());
/// ```
pub trait Clock: fmt::Debug + Send + Sync {
    /// How long it is since some moment that stays the same as long as the clock lives. Never goes back.
    fn now(&self) -> Duration;

    /// Wakes `sleeper` at the next jump, for a clock that jumps: who sleeps until a moment of this clock has counted
    /// on it to run as time does. Once; the sleeper asks anew before it reads the clock and sleeps again.
    fn on_jump(&self, _sleeper: &Waker) {}

    /// What tells the clock that other processes read, too, from every other one; `None` for a clock of this process's
    /// own, which is what it is unless told otherwise. Two readings under the same id can be compared, and leases of
    /// one process whose clocks have the same are counted by any of them.
    fn shared_id(&self) -> Option<u128> {
        None
    }
}

/// The time since the machine started, that asleep included: `CLOCK_BOOTTIME` of [clock_gettime(2)] on Linux and
/// Android, the interrupt time on Windows, `CLOCK_MONOTONIC_RAW` on macOS, and `CLOCK_MONOTONIC` on the BSDs, of which
/// only OpenBSD's counts sleep in every version.
///
/// ```
/// use lockkit::lease::{Clock, SystemClock};
/// let before = SystemClock.now();
/// assert!(SystemClock.now() >= before);
/// ```
///
/// [clock_gettime(2)]: https://man7.org/linux/man-pages/man2/clock_gettime.2.html
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[inline]
    fn now(&self) -> Duration {
        clock::now()
    }

    fn shared_id(&self) -> Option<u128> {
        process::clock_id()
    }
}

/// A clock that stands still until it is told to go on, for tests without sleeping. Clones are the same clock.
///
/// ```
/// use std::time::Duration;
/// use lockkit::lease::{Clock, ManualClock};
/// let clock = ManualClock::new();
/// clock.advance(Duration::from_secs(3600));
/// assert_eq!(clock.now(), Duration::from_secs(3600));
/// ```
#[derive(Clone, Default)]
pub struct ManualClock(Arc<Mutex<Manual>>);

#[derive(Default)]
struct Manual {
    now: Duration,
    sleepers: Vec<Waker>,
}

impl ManualClock {
    /// A clock that stands at zero.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets `step` pass at once, and wakes who sleeps by this clock.
    pub fn advance(&self, step: Duration) {
        let sleepers = {
            let mut manual = self.0.lock();
            manual.now = manual.now.saturating_add(step);
            mem::take(&mut manual.sleepers)
        };
        sleepers.into_iter().for_each(Waker::wake);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Duration {
        self.0.lock().now
    }

    fn on_jump(&self, sleeper: &Waker) {
        let mut manual = self.0.lock();
        if !manual.sleepers.iter().any(|known| known.will_wake(sleeper)) {
            manual.sleepers.push(sleeper.clone());
        }
    }
}

impl fmt::Debug for ManualClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ManualClock").field(&self.now()).finish()
    }
}
