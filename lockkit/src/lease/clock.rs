//! The clocks that leases use.
//!
//! A lease is a promise about time. So no user must be able to set its clock, and the clock must
//! run while the machine sleeps: a holder that slept for an hour must find its lease lost. No two
//! processes compare their clocks. Each process only measures, on its own clock, how long something
//! has been unchanged.

use std::fmt;
use std::mem;
use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use parking_lot::Mutex;

use crate::sys::{clock, process};

/// The source of time of a lease.
///
/// Programs need [`SystemClock`], the default of every lease; tests need [`ManualClock`].
///
/// A clock that runs twice as fast as the system's:
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
    /// Returns the time since some moment that stays the same for the life of the clock. Never goes
    /// back.
    fn now(&self) -> Duration;

    /// Wakes `sleeper` at the next jump, if the clock can jump, because a sleeper assumes that the
    /// clock runs as time does. The registration is for one jump. The sleeper registers again
    /// before it reads the clock and sleeps again.
    fn on_jump(&self, _sleeper: &Waker) {}

    /// Returns the id of a clock that other processes read, too, which distinguishes it from every
    /// other clock. `None`, the default, means a clock of this process only. Two readings under the
    /// same id can be compared. Leases of one process whose clocks have the same id may be counted
    /// by any of these clocks.
    fn shared_id(&self) -> Option<u128> {
        None
    }
}

/// The time since the machine started, including sleep: `CLOCK_BOOTTIME` of [clock_gettime(2)] on
/// Linux and Android, the interrupt time on Windows, `CLOCK_MONOTONIC_RAW` on macOS, and
/// `CLOCK_MONOTONIC` on the BSDs. Of the BSDs, only OpenBSD's clock counts sleep in every version.
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

/// A clock that moves only by [`advance`](Self::advance), for tests without sleeping. Clones are
/// the same clock.
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
    /// Creates a clock at zero.
    pub fn new() -> Self {
        Self::default()
    }

    /// Advances the clock by `step` at once, and wakes the sleepers of this clock.
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
