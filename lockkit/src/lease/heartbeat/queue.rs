//! The queue of the heartbeat scheduler: which renewal is due next, and which failure domains back
//! off.

use std::collections::BTreeMap;
use std::mem;
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use super::renewable::{FailureDomain, Renewable};
use crate::lease::clock::Clock;

/// The maximum delay of a renewal after it is due, so that renewals run together. If a lease has a
/// short heartbeat interval, the maximum is one part in [`COALESCING_WINDOWS_PER_HEARTBEAT`] of
/// that interval. With a wake-up every 3 ms, ten thousand renewals per second cost a seventh more.
pub(super) const MAX_COALESCING_WINDOW: Duration = Duration::from_millis(10);
const COALESCING_WINDOWS_PER_HEARTBEAT: u32 = 20;

/// A longer request makes its domain back off. A request to a file whose flock another process
/// keeps is shorter.
const SLOW_REQUEST_TIMEOUT: Duration = Duration::from_millis(25);

/// How often the watchdog checks for a stuck request. If a lease has a short ttl, the interval is a
/// part of that ttl.
pub(super) const MAX_WATCHDOG_INTERVAL: Duration = Duration::from_millis(250);
const MIN_WATCHDOG_INTERVAL: Duration = Duration::from_millis(5);
const WATCHDOG_CHECKS_PER_TTL: u32 = 8;

/// The maximum number of domains whose minimum ttl is remembered.
const MAX_REMEMBERED_DOMAINS: usize = 64;

/// Up to this number, released leases in the queue are not worth a clean-up.
const MAX_RELEASED_WITHOUT_CLEANUP: usize = 64;

#[derive(Default)]
pub(super) struct Queue {
    /// The number of the active worker, the thread that renews; 0 before the first.
    pub(super) active_worker: u64,
    pub(super) has_watchdog: bool,
    /// A watchdog must be started at the next heartbeat.
    pub(super) needs_watchdog: bool,
    /// The active worker must report losses, because no other thread could be started.
    pub(super) must_report_losses: bool,
    /// The watchdog sleeps until a lease is scheduled.
    pub(super) is_watchdog_idle: bool,
    /// The request of the active worker.
    pub(super) request: Option<Request>,
    pub(super) backoffs: Vec<DomainBackoff>,
    /// No scheduled lease has a shorter ttl.
    min_ttl: Option<Duration>,
    /// The same for each domain, as far as it is remembered.
    domain_min_ttls: Vec<(FailureDomain, Duration)>,
    /// No scheduled lease has a shorter heartbeat interval.
    min_heartbeat: Option<Duration>,
    clock_queues: Vec<ClockQueue>,
    /// How many renewals have been put in.
    pushed: u64,
    /// How many of the renewals are of released leases.
    released: usize,
}

/// A renewal under way.
pub(super) struct Request {
    pub(super) lease: Arc<dyn Renewable>,
    pub(super) began: Instant,
}

/// A domain that gets no request now.
pub(super) struct DomainBackoff {
    pub(super) domain: FailureDomain,
    pub(super) until: Until,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Until {
    Time(Instant),
    /// Until this thread, which is not active any more, has returned. The thread is late after the
    /// moment `late`.
    Return {
        thread: u64,
        late: Instant,
    },
}

impl Until {
    fn is_return_of(self, worker: u64) -> bool {
        matches!(self, Self::Return { thread, .. } if thread == worker)
    }
}

/// The renewals by one clock, or by several clocks that show the same time.
struct ClockQueue {
    clock: Arc<dyn Clock>,
    clock_id: Option<u128>,
    renewals: Renewals,
}

type Renewals = BTreeMap<Due, Arc<dyn Renewable>>;

/// The due time of a renewal, and a number that distinguishes renewals with the same due time.
type Due = (Duration, u64);

pub(super) struct ScheduledRenewal {
    pub(super) due: Duration,
    pub(super) lease: Arc<dyn Renewable>,
}

/// What the active worker does next.
pub(super) enum Work {
    Renew(ScheduledRenewal),
    /// Nothing for this long; `None` means until something changes.
    Sleep(Option<Duration>),
}

impl Queue {
    #[cfg(test)]
    pub(super) fn clocks(&self) -> usize {
        self.clock_queues.len()
    }

    /// Returns whether no lease is scheduled.
    pub(super) fn is_empty(&self) -> bool {
        self.clock_queues
            .iter()
            .all(|clock_queue| clock_queue.renewals.is_empty())
    }

    /// Records the intervals of a lease that is about to be scheduled. Returns whether the maximum
    /// delay of renewals became shorter.
    pub(super) fn record_intervals(&mut self, lease: &dyn Renewable) -> bool {
        let domain = lease.domain();
        match self
            .domain_min_ttls
            .iter_mut()
            .find(|(known, _)| *known == domain)
        {
            Some((_, min_ttl)) => *min_ttl = lease.ttl().min(*min_ttl),
            None => {
                // Each store may be a domain of its own, and a program may create any number of
                // stores.
                if self.domain_min_ttls.len() == MAX_REMEMBERED_DOMAINS {
                    self.domain_min_ttls.clear();
                }
                self.domain_min_ttls.push((domain, lease.ttl()));
            }
        }
        self.min_ttl = Some(
            self.min_ttl
                .map_or(lease.ttl(), |min_ttl| min_ttl.min(lease.ttl())),
        );
        let window_before = self.coalescing_window();
        self.min_heartbeat = Some(
            self.min_heartbeat
                .map_or(lease.heartbeat(), |min_heartbeat| {
                    min_heartbeat.min(lease.heartbeat())
                }),
        );
        self.coalescing_window() < window_before
    }

    /// Forgets the intervals of earlier leases when no lease is scheduled.
    pub(super) fn forget_intervals(&mut self) {
        (self.min_ttl, self.min_heartbeat) = (None, None);
        self.domain_min_ttls.clear();
    }

    /// Returns a ttl such that no scheduled lease of the domain has a shorter ttl, as far as it is
    /// remembered.
    pub(super) fn min_ttl_of(&self, domain: FailureDomain) -> Option<Duration> {
        self.domain_min_ttls
            .iter()
            .find(|(known, _)| *known == domain)
            .map(|(_, min_ttl)| *min_ttl)
    }

    /// Returns the maximum delay of a renewal after it is due.
    pub(super) fn coalescing_window(&self) -> Duration {
        coalescing_window(self.min_heartbeat)
    }

    /// Returns how often the watchdog checks for a stuck request.
    pub(super) fn watchdog_interval(&self) -> Duration {
        watchdog_interval(self.min_ttl)
    }

    /// Returns whether a request to the domain hangs that has taken longer than allowed.
    pub(super) fn is_stuck(&self, domain: FailureDomain, now: Instant) -> bool {
        let is_stuck = |backoff: &DomainBackoff| matches!(backoff.until, Until::Return { late, .. } if late <= now);
        self.backoffs
            .iter()
            .any(|backoff| backoff.domain == domain && is_stuck(backoff))
    }

    /// Ends the back-off of the domains that wait for the return of this worker.
    pub(super) fn end_backoffs_of(&mut self, worker: u64) {
        self.backoffs
            .retain(|backoff| !backoff.until.is_return_of(worker));
    }

    /// Makes the domain back off if the request took long.
    pub(super) fn back_off_after(
        &mut self,
        domain: FailureDomain,
        began: Instant,
        ended: Instant,
        max_backoff: Duration,
    ) {
        if let Some(backoff) = backoff_after(ended - began, max_backoff) {
            self.backoffs.push(DomainBackoff {
                domain,
                until: Until::Time(ended + backoff),
            });
        }
    }

    /// Returns how long the domain must get no request; a heartbeat interval if that time is
    /// unknown.
    pub(super) fn backoff_of(
        &mut self,
        domain: FailureDomain,
        now: Instant,
        heartbeat: Duration,
    ) -> Option<Duration> {
        if self.backoffs.is_empty() {
            return None;
        }
        self.backoffs
            .retain(|backoff| !matches!(backoff.until, Until::Time(time) if time <= now));
        let backoffs = self
            .backoffs
            .iter()
            .filter(|backoff| backoff.domain == domain);
        backoffs
            .map(|backoff| {
                if let Until::Time(time) = backoff.until {
                    time - now
                } else {
                    heartbeat
                }
            })
            .max()
    }

    /// Puts in a renewal. Returns whether it is now the first of its queue.
    pub(super) fn push(&mut self, renewal: ScheduledRenewal) -> bool {
        let (clock, clock_id) = (renewal.lease.clock(), renewal.lease.clock_id());
        let is_of = |queue: &ClockQueue| match clock_id {
            Some(_) => queue.clock_id == clock_id,
            None => Arc::ptr_eq(&queue.clock, clock),
        };
        let queue = match self.clock_queues.iter().position(is_of) {
            Some(at) => &mut self.clock_queues[at],
            None => {
                self.clock_queues.push(ClockQueue {
                    clock: clock.clone(),
                    clock_id,
                    renewals: BTreeMap::new(),
                });
                let last = self.clock_queues.len() - 1;
                &mut self.clock_queues[last]
            }
        };
        let is_first = queue
            .renewals
            .first_key_value()
            .is_none_or(|(first, _)| renewal.due < first.0);
        self.pushed += 1;
        queue
            .renewals
            .insert((renewal.due, self.pushed), renewal.lease);
        is_first
    }

    /// Takes the renewal that is due, or says how long none is due.
    pub(super) fn next_work(&mut self, clock_waker: &Waker) -> Work {
        let mut pause: Option<Duration> = None;
        let mut chosen = None;
        for (at, queue) in self.clock_queues.iter().enumerate() {
            let Some(((due, _), _)) = queue.renewals.first_key_value() else {
                continue;
            };
            queue.clock.on_jump(clock_waker);
            let left = due.saturating_sub(queue.clock.now());
            if pause.is_none_or(|pause| left < pause) {
                pause = Some(left);
                chosen = Some(at);
            }
        }
        match (pause, chosen) {
            (Some(Duration::ZERO), Some(at)) => {
                let first = self.clock_queues[at].renewals.pop_first();
                first.map_or(Work::Sleep(None), |((due, _), lease)| {
                    Work::Renew(ScheduledRenewal { due, lease })
                })
            }
            _ => {
                // Going to sleep is rare enough for the removal of unused clocks.
                self.clock_queues.retain(|queue| !queue.renewals.is_empty());
                Work::Sleep(pause)
            }
        }
    }

    /// Records that a scheduled lease was released. Returns the renewals of ended leases if this
    /// call removed them.
    pub(super) fn record_release(&mut self) -> Vec<Renewals> {
        let mut removed = Vec::new();
        self.released += 1;
        let is_worth_it = |queue: &Self| {
            queue.released
                > queue
                    .clock_queues
                    .iter()
                    .map(|queue| queue.renewals.len())
                    .sum::<usize>()
                    / 2
        };
        if self.released > MAX_RELEASED_WITHOUT_CLEANUP && is_worth_it(self) {
            for queue in &mut self.clock_queues {
                let renewals = mem::take(&mut queue.renewals).into_iter();
                let (over, going): (BTreeMap<_, _>, _) =
                    renewals.partition(|(_, lease)| lease.is_over());
                queue.renewals = going;
                removed.push(over);
            }
            self.released = 0;
        }
        removed
    }

    /// Records that the renewal of an ended lease has left the queue.
    pub(super) fn record_removal(&mut self) {
        self.released = self.released.saturating_sub(1);
    }
}

/// Returns how long a domain backs off after a request that took `took`, at most `max_backoff`.
pub(super) fn backoff_after(took: Duration, max_backoff: Duration) -> Option<Duration> {
    (took > SLOW_REQUEST_TIMEOUT).then(|| took.min(max_backoff))
}

/// Returns the maximum delay of a renewal after it is due, if no heartbeat interval is shorter than
/// `min_heartbeat`.
pub(super) fn coalescing_window(min_heartbeat: Option<Duration>) -> Duration {
    min_heartbeat.map_or(MAX_COALESCING_WINDOW, |min_heartbeat| {
        (min_heartbeat / COALESCING_WINDOWS_PER_HEARTBEAT).min(MAX_COALESCING_WINDOW)
    })
}

/// Returns how often the watchdog checks, if no ttl is shorter than `min_ttl`.
pub(super) fn watchdog_interval(min_ttl: Option<Duration>) -> Duration {
    min_ttl.map_or(MAX_WATCHDOG_INTERVAL, |min_ttl| {
        (min_ttl / WATCHDOG_CHECKS_PER_TTL).clamp(MIN_WATCHDOG_INTERVAL, MAX_WATCHDOG_INTERVAL)
    })
}
