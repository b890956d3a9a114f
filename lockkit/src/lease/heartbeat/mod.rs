//! Renews all leases of a process from one thread.
//!
//! # Guarantees
//! - A renewal runs at most [`MAX_COALESCING_WINDOW`](queue::MAX_COALESCING_WINDOW) after it is due
//!   (1/20 of the shortest heartbeat interval if that is less). A slow or hanging request adds to
//!   that.
//! - A store that hangs delays the renewals of other failure domains by at most a quarter of the
//!   shortest ttl, or 10 ms if that is more, and at most half a second.
//! - Each failure domain that hangs costs one thread.
//!
//! # Implementation
//! The queue is an ordered map from due time to lease, one map per clock. Most renewals are taken
//! from one end and put in at the other, so a renewal touches little memory however long the queue
//! is. Renewals that are due within the coalescing window run in one pass. A released lease stays
//! in the queue until it is due, or until released leases are more than half of the queue. A
//! release never searches the queue.
//!
//! One request runs at a time. A second thread, the watchdog, checks the running request four times
//! per second, or more often if a scheduled ttl is shorter than two seconds. If the request is
//! stuck, the watchdog takes over the queue and starts a new watchdog. The stuck thread exits when
//! its request returns. Until then the scheduler sends no request to the same failure domain (a
//! store, or the file system of a lease file). The ends of its leases are still reported.
//!
//! After a slow request that returned in time, the failure domain gets no request for as long as
//! the request took. So other domains get at least half of the time. This back-off is no longer
//! than a release waits for the store. A longer request may mean that this process was stopped, and
//! its leases cannot wait.
//!
//! # Fork
//! A forked child starts its own scheduler with its first lease, without the leases of its parent.
//! The mutex is the standard library's: parking_lot keeps a process-wide table that a fork can
//! leave locked.

mod queue;
mod renewable;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

use self::queue::{DomainBackoff, Queue, Request, ScheduledRenewal, Until, Work};
pub(super) use self::renewable::{FailureDomain, Renewable};
use super::options::{Loss, OnLost};
use crate::sys::process_local::ProcessLocal;

/// How long the thread pauses after a panic.
const PANIC_RETRY_INTERVAL: Duration = Duration::from_millis(3);

/// The heartbeat scheduler of this process.
#[derive(Default)]
pub(super) struct HeartbeatScheduler {
    queue: Mutex<Queue>,
    /// Wakes the active worker.
    changed: Condvar,
    /// Wakes an idle watchdog.
    scheduled: Condvar,
    losses: Mutex<Losses>,
}

/// The losses that are not yet reported to `on_lost`.
#[derive(Default)]
struct Losses {
    /// A thread reports the losses, or the active worker will.
    is_reporting: bool,
    queue: VecDeque<(OnLost, Loss)>,
}

/// The waker of the scheduler for a clock that jumps.
struct ClockWaker(&'static HeartbeatScheduler);

impl Wake for ClockWaker {
    fn wake(self: Arc<Self>) {
        // Takes the lock, so that the wake-up comes before the scheduler reads the clock, or after
        // it has gone to sleep.
        let _queue = self.0.lock();
        self.0.changed.notify_one();
    }
}

impl HeartbeatScheduler {
    /// Returns how many clocks have a queue.
    #[cfg(test)]
    pub(super) fn clocks(&self) -> usize {
        self.lock().clocks()
    }

    /// Returns the scheduler of this process, and starts it if it does not run.
    pub(super) fn start() -> io::Result<&'static Self> {
        static SCHEDULER: ProcessLocal<HeartbeatScheduler> = ProcessLocal::new();
        let scheduler = SCHEDULER.get_or_make(Self::default);
        scheduler.ensure_started()?;
        Ok(scheduler)
    }

    fn ensure_started(&'static self) -> io::Result<()> {
        let mut queue = self.lock();
        if queue.active_worker == 0 {
            Self::spawn(move || self.run_worker(1))?;
            queue.active_worker = 1;
        }
        queue.needs_watchdog = !queue.has_watchdog;
        Ok(())
    }

    fn spawn(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        thread::Builder::new()
            .name("lockkit-lease".into())
            .spawn(work)
            .map(drop)
    }

    /// Starts a watchdog. This happens only at a heartbeat, so that the first lease does not delay
    /// a program that is about to start another program. If no thread can be started, the scheduler
    /// runs without a watchdog until the heartbeat after the next acquisition.
    fn start_watchdog(&'static self, queue: &mut Queue) {
        queue.has_watchdog = Self::spawn(move || self.run_worker(self.run_watchdog())).is_ok();
    }

    /// Renews `lease` from `due` on until it ends.
    pub(super) fn schedule(&self, lease: Arc<dyn Renewable>, due: Duration) {
        let mut queue = self.lock();
        let is_shorter = queue.record_intervals(&*lease);
        let is_first = queue.push(ScheduledRenewal { due, lease });
        let is_watchdog_idle = mem::take(&mut queue.is_watchdog_idle);
        drop(queue);
        if is_first || is_shorter {
            self.changed.notify_one();
        }
        if is_watchdog_idle {
            self.scheduled.notify_one();
        }
    }

    /// Reports a loss, after earlier losses, on a thread that ends when all losses are reported.
    pub(super) fn report_loss(&'static self, call: OnLost, loss: Loss) {
        let mut losses = self.losses.lock().unwrap_or_else(PoisonError::into_inner);
        losses.queue.push_back((call, loss));
        if mem::replace(&mut losses.is_reporting, true) {
            return;
        }
        drop(losses);
        if thread::Builder::new()
            .name("lockkit-lost".into())
            .spawn(|| self.report_losses())
            .is_err()
        {
            self.lock().must_report_losses = true;
            self.changed.notify_one();
        }
    }

    fn report_losses(&self) {
        loop {
            let mut losses = self.losses.lock().unwrap_or_else(PoisonError::into_inner);
            let Some((call, loss)) = losses.queue.pop_front() else {
                losses.is_reporting = false;
                return;
            };
            drop(losses);
            // The panic hook has reported the panic, and no other lease depends on it. The
            // callback's own values are dropped in here, too.
            let _ = catch_unwind(AssertUnwindSafe(move || call(&loss)));
        }
    }

    /// Returns a ttl such that no scheduled lease of the domain has a shorter ttl, as far as it is
    /// remembered.
    pub(super) fn min_ttl_of(&self, domain: FailureDomain) -> Option<Duration> {
        self.lock().min_ttl_of(domain)
    }

    /// Returns whether a request to the domain hangs that has taken longer than allowed.
    pub(super) fn is_stuck(&self, domain: FailureDomain) -> bool {
        let now = Instant::now();
        self.lock().is_stuck(domain, now)
    }

    /// Records the release of a scheduled lease.
    pub(super) fn record_release(&self) {
        let removed = self.lock().record_release();
        // The ended leases are dropped without the lock: a store may be dropped with them, or a
        // callback that holds a lease itself.
        drop(removed);
    }

    /// Runs the thread with the number `worker` from when it is active.
    fn run_worker(&'static self, worker: u64) {
        // A panic in a program's own clock or store, for example at its drop, must not end the
        // other leases.
        while catch_unwind(AssertUnwindSafe(|| self.run_active(worker))).is_err() {
            thread::sleep(PANIC_RETRY_INTERVAL);
        }
    }

    /// Runs a watchdog until the active worker is stuck. The watchdog then takes over the queue.
    /// Returns its number as the active worker.
    fn run_watchdog(&'static self) -> u64 {
        let mut queue = self.lock();
        loop {
            if queue.request.is_none() && queue.is_empty() {
                queue.is_watchdog_idle = true;
                queue.forget_intervals();
                queue = self
                    .scheduled
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let interval = queue.watchdog_interval();
            if let Some(request) = queue
                .request
                .take_if(|request| request.began.elapsed() >= interval)
            {
                let stuck = queue.active_worker;
                queue.active_worker += 1;
                let late = request.began + request.lease.release_timeout();
                let until = Until::Return {
                    thread: stuck,
                    late,
                };
                queue.backoffs.push(DomainBackoff {
                    domain: request.lease.domain(),
                    until,
                });
                // The end of that lease must be reported, too.
                queue.push(ScheduledRenewal {
                    due: Duration::ZERO,
                    lease: request.lease,
                });
                self.start_watchdog(&mut queue);
                return queue.active_worker;
            }
            queue = self
                .scheduled
                .wait_timeout(queue, interval)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn run_active(&'static self, worker: u64) {
        let clock_waker = Waker::from(Arc::new(ClockWaker(self)));
        let mut queue = self.lock();
        // The back-off of a renewal that panicked.
        queue.end_backoffs_of(worker);
        if queue.active_worker == worker {
            let request = queue.request.take();
            drop(queue);
            drop(request);
            queue = self.lock();
        }
        while queue.active_worker == worker {
            if mem::take(&mut queue.must_report_losses) {
                drop(queue);
                self.report_losses();
                queue = self.lock();
                continue;
            }
            match queue.next_work(&clock_waker) {
                Work::Renew(renewal) => {
                    if mem::take(&mut queue.needs_watchdog) && !queue.has_watchdog {
                        self.start_watchdog(&mut queue);
                    }
                    match self.renew(queue, renewal, worker) {
                        Some(still_active) => queue = still_active,
                        None => return,
                    }
                }
                Work::Sleep(None) => {
                    queue = self
                        .changed
                        .wait(queue)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                Work::Sleep(Some(pause)) => {
                    let pause = pause + queue.coalescing_window();
                    queue = self
                        .changed
                        .wait_timeout(queue, pause)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0;
                }
            }
        }
    }

    /// Renews one lease, without the lock during the request. Returns `None` if a watchdog has
    /// taken over the queue.
    fn renew(
        &'static self,
        mut queue: MutexGuard<'static, Queue>,
        mut renewal: ScheduledRenewal,
        worker: u64,
    ) -> Option<MutexGuard<'static, Queue>> {
        let domain = renewal.lease.domain();
        let began = Instant::now();
        queue.request = Some(Request {
            lease: renewal.lease.clone(),
            began,
        });
        let backoff = queue.backoff_of(domain, began, renewal.lease.heartbeat());
        drop(queue);
        let next = match backoff {
            Some(backoff) => renewal.lease.skip_renewal(backoff),
            None => renewal.lease.renew(),
        };
        let ended = Instant::now();
        queue = self.lock();
        queue.end_backoffs_of(worker);
        queue.back_off_after(domain, began, ended, renewal.lease.release_timeout());
        if queue.active_worker != worker {
            // The watchdog has put in a renewal for that lease. This one may hold the last
            // reference to a store, so it is dropped without the lock.
            drop(queue);
            drop(renewal);
            return None;
        }
        // Not the last reference, because `renewal` has one, too.
        queue.request = None;
        if let Some(due) = next {
            renewal.due = due;
            queue.push(renewal);
            return Some(queue);
        }
        // The renewal of an ended lease is dropped without the lock.
        drop(queue);
        drop(renewal);
        queue = self.lock();
        queue.record_removal();
        Some(queue)
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // A panic leaves no partial change in here.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
