//! Tests of a lease with a store that fails, hangs, or answers late.

use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Instant;

use super::faulty_store::FaultyStore;
use super::fixtures::{MS, TestDir, eventually};
use crate::base::error::ErrorKind;
use crate::lease::LeaseGuard;
use crate::lease::{Attempt, Deadline, Lease, LeaseName, LeaseStore, LossReason, ManualClock};

#[test]
fn unanswered_grant_is_freed_by_heartbeat() {
    let clock = ManualClock::new();
    let store = FaultyStore::new(&clock);
    let lease = store.lease().acquire_retry_limit(0).build().unwrap();
    let is_free = || store.record.lock().1.is_none();
    store.loses_answer.store(true, Ordering::Relaxed);
    assert!(matches!(
        lease.try_lock().unwrap_err().kind(),
        ErrorKind::Store { .. }
    ));
    // By this clock the name would be held for ever.
    eventually("the grant is freed", is_free);

    store.hangs.store(true, Ordering::Relaxed);
    assert!(matches!(
        lease.lock_for(MS).unwrap_err().kind(),
        ErrorKind::Store { .. }
    ));
    store.hangs.store(false, Ordering::Relaxed);
    let claim = store.last.lock().unwrap();
    let late = store.try_acquire(
        &LeaseName::new("faulty").unwrap(),
        &claim,
        MS * 3000,
        Deadline::after(MS),
    );
    assert!(matches!(late, Ok(Attempt::Granted(_))));
    clock.advance(MS * 250);
    eventually("a late grant is freed, too", is_free);

    let guard = lease.try_lock().unwrap();
    clock.advance(MS * 2900);
    eventually("the lease is renewed", || guard.remaining() > MS * 2900);
    assert!(guard.is_held() && !is_free(), "the new grant is not freed");
}

#[test]
fn retry_after_lost_answer_returns_same_grant() {
    let clock = ManualClock::new();
    let store = FaultyStore::new(&clock);
    store.loses_answer.store(true, Ordering::Relaxed);
    assert_eq!(
        store.lease().build().unwrap().try_lock().unwrap().token(),
        1
    );
}

#[test]
fn acquire_after_late_answer_reports_recovery_once() {
    let clock = ManualClock::new();
    let store = FaultyStore::new(&clock);
    store.answers_late.store(true, Ordering::Relaxed);
    let guard = store.lease().build().unwrap().lock().unwrap();
    assert!(guard.recovered().is_some() && guard.token() == 2);
    guard.release().unwrap();

    // If that is the last try, the next holder gets the report, once.
    store.answers_late.store(true, Ordering::Relaxed);
    let error = store
        .lease()
        .acquire_retry_limit(0)
        .build()
        .unwrap()
        .try_lock()
        .unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Store { .. }), "{error:?}");
    for is_reported in [true, false] {
        let guard = store.lease().build().unwrap().try_lock().unwrap();
        assert_eq!(guard.recovered().is_some(), is_reported);
        guard.release().unwrap();
    }
}

#[test]
fn acquire_with_limit_ends_when_store_hangs() {
    let store = FaultyStore::new(&ManualClock::new());
    store.hangs.store(true, Ordering::Relaxed);
    let lease = store.lease().ttl(MS * 60_000).build().unwrap();
    let began = Instant::now();
    let error = lease.lock_for(MS * 100).unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::Store { .. }),
        "the store never answered that the lease is held: {error:?}"
    );
    assert!(
        began.elapsed() >= MS * 100 && began.elapsed() < MS * 500,
        "{:?}",
        began.elapsed()
    );
}

#[test]
fn acquire_from_failing_store_fails_after_retries() {
    let clock = ManualClock::new();
    let store = FaultyStore::new(&clock);
    store.fails.store(true, Ordering::Relaxed);
    let error = store
        .lease()
        .acquire_retry_limit(2)
        .build()
        .unwrap()
        .try_lock()
        .unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Store { .. }), "{error:?}");
}

#[test]
fn heartbeat_follows_clock_of_lease() {
    let clock = ManualClock::new();
    let store = FaultyStore::new(&clock);
    let guard = store.lease().build().unwrap().lock().unwrap();
    for count in 1..=10 {
        clock.advance(MS * 250);
        eventually("the lease is renewed", || {
            store.renewals.load(Ordering::Relaxed) >= count
        });
        eventually("the lease is renewed", || guard.remaining() == MS * 2968);
    }
    store.panics.store(true, Ordering::Relaxed);
    clock.advance(MS * 250);
    eventually("the store is asked again after a panic", || {
        clock.advance(MS);
        store.renewals.load(Ordering::Relaxed) >= 12
    });
    assert!(guard.is_held());
    clock.advance(MS * 3000);
    assert!(
        !guard.is_held(),
        "the first check after a jump finds the lease lost"
    );
    assert!(matches!(guard.lost().reason(), Some(LossReason::Expired)));
}

#[test]
fn failed_renewals_lose_lease_at_deadline_with_reason() {
    let clock = ManualClock::new();
    let store = FaultyStore::new(&clock);
    let guard = store.lease().build().unwrap().lock().unwrap();
    store.fails.store(true, Ordering::Relaxed);
    clock.advance(MS * 300);
    eventually("the store is asked", || {
        store.renewals.load(Ordering::Relaxed) >= 1
    });
    clock.advance(MS * 2600);
    eventually("the store is asked", || {
        store.renewals.load(Ordering::Relaxed) >= 2
    });
    assert!(guard.is_held());
    clock.advance(MS * 100);
    assert!(matches!(guard.lost().reason(), Some(LossReason::Store(_))));
    let error = guard.check().unwrap_err().to_string();
    assert!(error.ends_with("test failure"), "{error}");
}

#[test]
fn hanging_store_keeps_leases_of_other_store() {
    let directory = TestDir::new();
    let guard = Lease::file(directory.path())
        .ttl(MS * 1000)
        .heartbeat(MS * 100)
        .build()
        .unwrap()
        .lock()
        .unwrap();
    let store = FaultyStore::new(&ManualClock::new());
    let hanging: Vec<_> = (0..50)
        .map(|n| {
            Lease::with_store(store.clone(), n.to_string())
                .build()
                .unwrap()
        })
        .map(|lease| {
            store.record.lock().1 = None;
            lease.lock().unwrap()
        })
        .collect();
    store.hangs.store(true, Ordering::Relaxed);
    let (began, before) = (Instant::now(), directory.record().heartbeat_number());
    while began.elapsed() < MS * 3500 {
        guard.check().unwrap();
        thread::sleep(MS * 10);
    }
    assert!(
        directory.record().heartbeat_number() - before >= 10,
        "{}",
        directory.record().heartbeat_number() - before
    );
    assert!(hanging.iter().all(|guard| !guard.is_held()));
    let began = Instant::now();
    drop(hanging);
    assert!(began.elapsed() < MS * 1000);
}

/// Acquires ten leases in the store, with the reports of their losses.
fn ten_leases_of(store: &Arc<FaultyStore>) -> Vec<(LeaseGuard, mpsc::Receiver<u64>)> {
    let acquire = |name: usize| {
        store.record.lock().1 = None;
        let (report, reports) = mpsc::channel();
        let lease = Lease::with_store(store.clone(), name.to_string())
            .ttl(MS * 600)
            .heartbeat(MS * 50);
        (
            lease
                .on_lost(move |loss| _ = report.send(loss.token))
                .build()
                .unwrap()
                .lock()
                .unwrap(),
            reports,
        )
    };
    (0..10).map(acquire).collect()
}

fn lease_of_another_store_expires_and_is_reported() {
    let clock = ManualClock::new();
    let (report, reports) = mpsc::channel();
    let other = FaultyStore::new(&clock)
        .lease()
        .on_lost(move |_| _ = report.send(()))
        .build()
        .unwrap()
        .lock()
        .unwrap();
    let signal = other.lost().token();
    clock.advance(MS * 10_000);
    reports
        .recv_timeout(MS * 1500)
        .expect("the loss of the other lease is reported");
    assert!(signal.is_cancelled());
}

#[test]
fn stuck_request_delays_no_other_renewal_or_loss_report() {
    let directory = TestDir::new();
    let guard = Lease::file(directory.path())
        .ttl(MS * 400)
        .heartbeat(MS * 50)
        .build()
        .unwrap()
        .lock()
        .unwrap();
    let frozen = FaultyStore::new(&ManualClock::new());
    let mut stuck = ten_leases_of(&frozen);
    frozen.freezes.store(true, Ordering::Relaxed);
    eventually("the store is asked", || {
        frozen.renewals.load(Ordering::Relaxed) > 0
    });
    lease_of_another_store_expires_and_is_reported();
    for (guard, reports) in &stuck {
        assert_eq!(
            reports
                .recv_timeout(MS * 2000)
                .expect("the loss of each lease of the frozen store is reported"),
            guard.token()
        );
    }
    let (began, before) = (Instant::now(), directory.record().heartbeat_number());
    while began.elapsed() < MS * 1000 {
        guard.check().unwrap();
        thread::sleep(MS * 5);
    }
    assert!(directory.record().heartbeat_number() - before > 10);
    assert_eq!(
        frozen.renewals.load(Ordering::Relaxed),
        1,
        "a failure domain has one stuck request"
    );
    let (lost, _) = stuck.swap_remove(5);
    let dropping = thread::spawn(move || drop(lost));
    eventually("the drop of a lost guard does not hang", || {
        dropping.is_finished()
    });
    frozen.freezes.store(false, Ordering::Relaxed);
    drop(stuck);
    frozen.record.lock().1 = None;
    let again = frozen
        .lease()
        .heartbeat(MS * 50)
        .build()
        .unwrap()
        .lock()
        .unwrap();
    eventually("the store is asked again", || {
        frozen.clock.advance(MS);
        frozen.renewals.load(Ordering::Relaxed) > 3
    });
    again.check().unwrap();
}

#[test]
fn hanging_store_keeps_short_leases_of_other_store() {
    let directory = TestDir::new();
    let guard = Lease::file(directory.path())
        .ttl(MS * 200)
        .heartbeat(MS * 20)
        .build()
        .unwrap()
        .lock()
        .unwrap();
    let hanging = FaultyStore::new(&ManualClock::new());
    // Each request of this store may take 2 s.
    let _slow = Lease::with_store(hanging.clone(), "hanging")
        .ttl(MS * 60_000)
        .build()
        .unwrap()
        .lock()
        .unwrap();
    hanging.hangs.store(true, Ordering::Relaxed);
    let began = Instant::now();
    while hanging.renewals.load(Ordering::Relaxed) < 2 {
        guard.check().unwrap();
        thread::sleep(MS * 5);
        assert!(began.elapsed() < MS * 60_000, "the store is asked again");
    }
}
