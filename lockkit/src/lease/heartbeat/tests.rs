//! Tests of the scheduler with leases that have no store.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::queue::{
    MAX_COALESCING_WINDOW, MAX_WATCHDOG_INTERVAL, backoff_after, coalescing_window,
    watchdog_interval,
};
use super::*;
use crate::lease::clock::{Clock, ManualClock, SystemClock};
use crate::lease::tests::fixtures::{MS, eventually};

/// A lease that counts its renewals.
struct CountedLease {
    domain: u64,
    clock: Arc<dyn Clock>,
    renewals: AtomicUsize,
    skipped: AtomicUsize,
    is_over: AtomicBool,
    /// A renewal does not return while this is set.
    hangs: AtomicBool,
    /// The next renewal panics.
    panics: AtomicBool,
}

impl CountedLease {
    fn new(domain: u64, clock: impl Clock + 'static) -> Arc<Self> {
        Arc::new(Self {
            domain,
            clock: Arc::new(clock),
            renewals: AtomicUsize::default(),
            skipped: AtomicUsize::default(),
            is_over: AtomicBool::default(),
            hangs: AtomicBool::default(),
            panics: AtomicBool::default(),
        })
    }

    fn renewals(&self) -> usize {
        self.renewals.load(Ordering::Relaxed)
    }

    fn next(&self) -> Option<Duration> {
        (!self.is_over()).then(|| self.clock.now() + self.heartbeat())
    }
}

impl Renewable for CountedLease {
    fn domain(&self) -> FailureDomain {
        FailureDomain::Common(self.domain)
    }

    fn ttl(&self) -> Duration {
        MS * 200
    }

    fn heartbeat(&self) -> Duration {
        MS * 20
    }

    fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    fn clock_id(&self) -> Option<u128> {
        None
    }

    fn release_timeout(&self) -> Duration {
        MS * 50
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }

    fn renew(&self) -> Option<Duration> {
        self.renewals.fetch_add(1, Ordering::Relaxed);
        while self.hangs.load(Ordering::Relaxed) {
            thread::sleep(MS);
        }
        if self.panics.swap(false, Ordering::Relaxed) {
            std::panic::resume_unwind(Box::new(()));
        }
        self.next()
    }

    fn skip_renewal(&self, _: Duration) -> Option<Duration> {
        self.skipped.fetch_add(1, Ordering::Relaxed);
        self.next()
    }
}

/// Starts a scheduler that lives as long as the process, because its threads do.
fn scheduler() -> &'static HeartbeatScheduler {
    let scheduler: &'static _ = Box::leak(Box::new(HeartbeatScheduler::default()));
    scheduler.ensure_started().unwrap();
    scheduler
}

#[test]
fn schedule_lease_renews_until_it_is_over() {
    let scheduler = scheduler();
    let lease = CountedLease::new(1, SystemClock);
    scheduler.schedule(lease.clone(), Duration::ZERO);
    eventually("the lease is renewed again", || lease.renewals() >= 3);
    lease.is_over.store(true, Ordering::Relaxed);
    scheduler.record_release();
    eventually("the lease leaves the queue", || {
        Arc::strong_count(&lease) == 1
    });
}

#[test]
fn clock_jump_runs_due_renewals() {
    let clock = ManualClock::new();
    let lease = CountedLease::new(1, clock.clone());
    scheduler().schedule(lease.clone(), MS * 1000);
    thread::sleep(MS * 30);
    assert_eq!(lease.renewals(), 0, "no renewal is due");
    clock.advance(MS * 1000);
    eventually("the lease is renewed", || lease.renewals() == 1);
}

#[test]
fn stuck_renewal_delays_only_its_failure_domain() {
    let scheduler = scheduler();
    let [stuck, same, other] = [1, 1, 2].map(|domain| CountedLease::new(domain, SystemClock));
    stuck.hangs.store(true, Ordering::Relaxed);
    scheduler.schedule(stuck.clone(), Duration::ZERO);
    eventually("the request hangs", || stuck.renewals() == 1);
    scheduler.schedule(same.clone(), Duration::ZERO);
    scheduler.schedule(other.clone(), Duration::ZERO);
    eventually("the other domain is renewed", || other.renewals() >= 3);
    eventually("the hanging request is late", || {
        scheduler.is_stuck(FailureDomain::Common(1))
    });
    assert!(!scheduler.is_stuck(FailureDomain::Common(2)));
    eventually("the same domain is skipped", || {
        same.skipped.load(Ordering::Relaxed) >= 3
    });
    assert_eq!(
        (stuck.renewals(), same.renewals()),
        (1, 0),
        "the domain has one request"
    );
    stuck.hangs.store(false, Ordering::Relaxed);
    eventually("the same domain is renewed again", || {
        same.renewals() >= 1 && stuck.renewals() >= 2
    });
    assert!(!scheduler.is_stuck(FailureDomain::Common(1)));
}

#[test]
fn panicking_renewal_leaves_other_leases_renewed() {
    let scheduler = scheduler();
    let [panicking, other] = [1, 2].map(|domain| CountedLease::new(domain, SystemClock));
    panicking.panics.store(true, Ordering::Relaxed);
    scheduler.schedule(panicking.clone(), Duration::ZERO);
    scheduler.schedule(other.clone(), Duration::ZERO);
    eventually("the other lease is renewed", || other.renewals() >= 3);
}

#[test]
fn record_release_of_most_leases_removes_them() {
    let scheduler = scheduler();
    let clock = ManualClock::new();
    let leases: Vec<_> = (0..100)
        .map(|_| CountedLease::new(1, clock.clone()))
        .collect();
    for lease in &leases {
        scheduler.schedule(lease.clone(), MS * 1_000_000);
    }
    for lease in &leases[..65] {
        lease.is_over.store(true, Ordering::Relaxed);
        scheduler.record_release();
    }
    let is_removed = |lease: &Arc<CountedLease>| Arc::strong_count(lease) == 1;
    assert_eq!(leases.iter().filter(|lease| is_removed(lease)).count(), 65);
}

#[test]
fn backoff_after_slow_request_is_limited() {
    assert_eq!(backoff_after(MS, MS * 250), None);
    assert_eq!(backoff_after(MS * 40, MS * 250), Some(MS * 40));
    // A lease of 3 s that was renewed just before a stop of 1.6 s has 1.4 s left.
    assert_eq!(backoff_after(MS * 1600, MS * 250), Some(MS * 250));
}

#[test]
fn coalescing_window_is_a_twentieth_of_heartbeat() {
    assert_eq!(coalescing_window(None), MAX_COALESCING_WINDOW);
    assert_eq!(coalescing_window(Some(MS * 250)), MAX_COALESCING_WINDOW);
    assert_eq!(coalescing_window(Some(MS * 20)), MS);
}

#[test]
fn watchdog_detects_stuck_request_within_quarter_of_ttl() {
    for ttl in [MS * 40, MS * 100, MS * 1000, MS * 60_000] {
        // The request began before the first check at the latest. By the second check it has lasted
        // for a whole interval.
        assert!(watchdog_interval(Some(ttl)) * 2 <= ttl / 4);
    }
    assert_eq!(watchdog_interval(Some(MS * 60_000)), MAX_WATCHDOG_INTERVAL);
}
