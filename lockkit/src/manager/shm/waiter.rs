//! A waiter for a lock in shared memory: its sleeps on a futex, and the times of hand-offs.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use super::attach::Attached;
use super::raw_lock::{self, Env, Fairness, OWNER, Slept};
use crate::base::wait::{Backoff, WaitError, WaitState};
use crate::sys::futex;
use crate::sys::layout::Cell;

/// The longest sleep of a waiter before it checks that the owner is alive: the first sleep.
const MIN_CHECK_INTERVAL: Duration = Duration::from_micros(500);
/// The longest sleep of a waiter before it checks that the owner is alive: after further sleeps.
const MAX_CHECK_INTERVAL: Duration = Duration::from_millis(5);
/// The interval of hand-off requests by waiters that were woken and did not get the lock. It is
/// short enough to bound the wait, and long enough that the spinning costs little.
const HANDOFF_REQUEST_INTERVAL: Duration = Duration::from_micros(200);
/// The interval at which a release may keep the lock for a waiter without a processor, which costs
/// two context switches.
const HANDOFF_INTERVAL: Duration = Duration::from_millis(1);

/// Returns the time until the last hand-off is `pause` ago. If that is zero, records a hand-off
/// now.
#[inline]
fn until_due(cell: &Cell, pause: Duration) -> Duration {
    let now = nanos(ClockId::Monotonic);
    // A time in the future is from an earlier boot.
    let since = now
        .checked_sub(cell.handed_off_at.load(Ordering::Relaxed))
        .map_or(pause, Duration::from_nanos);
    let left = pause.saturating_sub(since);
    if left.is_zero() {
        cell.handed_off_at.store(now, Ordering::Relaxed);
    }
    left
}

impl Fairness for Cell {
    #[inline]
    fn hands_off(&self) -> bool {
        /// In a tight loop, one of this many releases reads the clock.
        const RELEASES_PER_CLOCK_READ: u32 = 16;
        self.acquisition.load(Ordering::Relaxed) % RELEASES_PER_CLOCK_READ == 0
            && until_due(self, HANDOFF_INTERVAL).is_zero()
    }

    fn wake(&self, word: &AtomicU32) -> bool {
        futex::wake_one(word)
    }
}

/// A waiter.
pub(super) struct ShmWaiter<'p> {
    table: &'static Attached,
    cell: &'static Cell,
    wait_state: &'p WaitState,
    /// The following check intervals.
    intervals: Backoff,
    check_interval: Duration,
}

/// The reason why a waiter stops waiting.
pub(super) enum SleepError {
    Wait(WaitError),
    Io(io::Error),
}

impl<'p> ShmWaiter<'p> {
    pub(super) fn new(
        table: &'static Attached,
        cell: &'static Cell,
        wait_state: &'p WaitState,
    ) -> Self {
        let intervals = Backoff::between(MIN_CHECK_INTERVAL * 2, MAX_CHECK_INTERVAL);
        Self {
            table,
            cell,
            wait_state,
            intervals,
            check_interval: MIN_CHECK_INTERVAL,
        }
    }
}

impl Env for ShmWaiter<'_> {
    type WaitError = SleepError;

    fn is_dead(&self, owner: u32) -> bool {
        self.table.is_dead(owner)
    }

    fn back_off(&self) {
        let left = until_due(self.cell, HANDOFF_REQUEST_INTERVAL);
        match self.wait_state.portion(left) {
            Ok(left) if !left.is_zero() => std::thread::sleep(left),
            _ => {}
        }
    }

    fn spin(&self, word: &AtomicU32) {
        /// Longer than a short hold, and much shorter than a sleep and a wake-up.
        const MAX_SPIN: Duration = Duration::from_micros(5);
        let until = nanos(ClockId::Monotonic) + MAX_SPIN.as_nanos() as u64;
        while nanos(ClockId::Monotonic) < until {
            for _ in 0..32 {
                if word.load(Ordering::Relaxed) & OWNER == raw_lock::FREE {
                    return;
                }
                std::hint::spin_loop();
            }
        }
    }

    fn sleep(&mut self, word: &AtomicU32, seen: u32) -> std::result::Result<Slept, SleepError> {
        let portion = self
            .wait_state
            .portion(self.check_interval)
            .map_err(SleepError::Wait)?;
        match futex::wait(word, seen, portion).map_err(SleepError::Io)? {
            futex::Woke::Early => Ok(Slept::Woken),
            // No thread woke it. If signals came faster than ticks, no other tick would ever end.
            futex::Woke::Interrupted => Ok(Slept::Tick),
            futex::Woke::TimedOut => {
                self.check_interval = self.intervals.next();
                Ok(Slept::Tick)
            }
        }
    }
}

#[inline]
pub(super) fn nanos(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
