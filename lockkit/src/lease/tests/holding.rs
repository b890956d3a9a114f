//! Tests of a held lease: renewals, the loss, callbacks, and the release.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use super::faulty_store::FaultyStore;
use super::fixtures::{MS, TestDir, eventually, held_by, remote_owner};
use crate::base::error::ErrorKind;
use crate::base::wait::Wait;
use crate::lease::heartbeat::HeartbeatScheduler;
use crate::lease::{
    Lease, LeaseGuard, LeaseStatus, LossReason, LostSignal, ManualClock, SystemClock,
};

#[test]
fn held_lease_beyond_ttl_blocks_second_acquire() {
    let directory = TestDir::new();
    let lease = directory.lease().build().unwrap();
    let guard = lease.lock().unwrap();
    let error = lease.lock_for(MS * 1500).unwrap_err();
    assert!(error.is_timeout());
    assert_eq!(error.owner().unwrap().pid(), std::process::id());
    guard.check().unwrap();
    assert!(guard.remaining() > Duration::ZERO);
    assert!(directory.record().heartbeat_number() >= 5);
}

#[test]
fn evict_with_old_snapshot_keeps_new_holder() {
    let directory = TestDir::new();
    let lease = directory.lease().build().unwrap();
    let first = lease.lock().unwrap();
    let LeaseStatus::Held(snapshot) = lease.status().unwrap() else {
        panic!("the lease must be held")
    };
    assert_eq!(
        (snapshot.token(), snapshot.owner().unwrap().pid()),
        (Some(first.token()), std::process::id())
    );
    drop(first);
    let second = lease.lock().unwrap();
    assert!(!lease.evict(&snapshot).unwrap());
    let LeaseStatus::Held(snapshot) = lease.status().unwrap() else {
        panic!("the lease must be held")
    };
    assert!(lease.evict(&snapshot).unwrap());
    let third = lease.try_lock().unwrap();
    assert!(third.token() > second.token());
    let reason = second.lost().wait(&Wait::at_most(MS * 2000)).unwrap();
    assert!(matches!(reason, LossReason::TakenOver { by: Some(_) }));
    assert!(third.is_held());
    drop(third);
    fs::write(directory.path(), "lock").unwrap();
    let LeaseStatus::Held(snapshot) = lease.status().unwrap() else {
        panic!("the lease must count as held")
    };
    assert!(lease.evict(&snapshot).unwrap());
    assert!(lease.try_lock().is_ok());
}

#[test]
fn missing_progress_loses_lease_despite_panicking_callback() {
    let directory = TestDir::new();
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    let lease = directory.lease().require_progress(MS * 100).on_lost(|_| {
        CALLS.fetch_add(1, Ordering::Relaxed);
        std::panic::resume_unwind(Box::new(()));
    });
    let guard = lease.build().unwrap().lock().unwrap();
    let began = Instant::now();
    while began.elapsed() < MS * 600 {
        guard.progress();
        guard.check().unwrap();
        thread::sleep(MS * 10);
    }
    let reason = guard.lost().wait(&Wait::at_most(MS * 2000)).unwrap();
    assert!(matches!(reason, LossReason::Expired));
    eventually("on_lost is called", || CALLS.load(Ordering::Relaxed) == 1);
    assert!(
        directory
            .lease()
            .build()
            .unwrap()
            .lock_for(MS * 2000)
            .is_ok(),
        "the heartbeat continues"
    );
}

#[test]
fn callback_that_holds_another_lease_does_not_deadlock() {
    let directory = TestDir::new();
    let path = directory.0.clone();
    let (report, reports) = mpsc::channel();
    thread::spawn(move || {
        for n in 0..200 {
            let inner = Lease::file(path.join(format!("inner-{n}")))
                .build()
                .unwrap();
            let inner = (n % 3 == 0).then(|| inner.lock().unwrap());
            let outer = Lease::file(path.join(format!("outer-{n}")))
                .ttl(MS * 60_000)
                .heartbeat(MS * 20_000);
            let outer =
                outer.on_lost(move |_| assert!(inner.as_ref().is_none_or(LeaseGuard::is_held)));
            drop(outer.build().unwrap().lock().unwrap());
        }
        report.send(()).unwrap();
    });
    reports
        .recv_timeout(MS * 10_000)
        .expect("ended leases are dropped without a lock that a release needs");
}

#[test]
fn panicking_drop_in_heartbeat_keeps_other_leases() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            assert!(
                thread::current().name() == Some("lockkit-lease"),
                "the heartbeat thread has the last reference"
            );
            std::panic::resume_unwind(Box::new(()));
        }
    }
    let directory = TestDir::new();
    let bomb = Bomb;
    let lease = Lease::file(directory.0.join("bomb"))
        .heartbeat(MS * 10)
        .on_lost(move |_| _ = &bomb)
        .build()
        .unwrap();
    let guard = lease.lock().unwrap();
    drop(lease);
    drop(guard);
    thread::sleep(MS * 50);
    let guard = directory.lease().build().unwrap().lock().unwrap();
    thread::sleep(MS * 1200);
    guard.check().unwrap();
}

#[test]
fn loss_found_at_release_is_reported_once() {
    let directory = TestDir::new();
    let (report, reports) = mpsc::channel();
    let lease = directory.lease().ttl(MS * 60_000).heartbeat(MS * 20_000);
    let lease = lease
        .on_lost(move |loss| report.send(loss.clone()).unwrap())
        .build()
        .unwrap();
    let guard = lease.lock().unwrap();
    let (signal, token) = (guard.lost(), guard.token());
    directory.write(held_by(&remote_owner(), token + 1));
    assert!(matches!(
        guard.release().unwrap_err().kind(),
        ErrorKind::LeaseLost { .. }
    ));
    assert!(
        matches!(signal.reason(), Some(LossReason::TakenOver { .. }))
            && signal.token().is_cancelled()
    );
    let loss = reports.recv_timeout(MS * 2000).unwrap();
    assert!(matches!(loss.reason, LossReason::TakenOver { .. }) && loss.token == token);
    assert!(
        reports.recv_timeout(MS * 50).is_err(),
        "the loss is reported once"
    );
}

#[test]
fn drop_of_expired_guard_frees_lease_as_lost() {
    let directory = TestDir::new();
    let clock = ManualClock::new();
    let lease = Lease::file(directory.path())
        .ttl(MS * 60_000)
        .heartbeat(MS * 20_000)
        .clock(Arc::new(clock.clone()));
    let lease = lease.require_progress(MS * 20_000).build().unwrap();
    let guard = lease.lock().unwrap();
    let token = guard.token();
    let signal = guard.lost();
    let other = Lease::file(directory.path())
        .ttl(MS * 60_000)
        .heartbeat(MS * 20_000)
        .build()
        .unwrap();
    let mine = directory.record();
    clock.advance(MS * 200_000);
    assert!(!guard.is_held());
    directory.write(mine);
    drop(guard);
    assert!(directory.record().is_lost());
    assert_eq!(other.status().unwrap(), LeaseStatus::Free);
    let next = other
        .try_lock()
        .expect("the lease is free without another ttl");
    assert!(next.token() > token);
    assert_eq!(
        next.recovered().unwrap().owner().unwrap().pid(),
        std::process::id()
    );
    assert!(
        matches!(signal.reason(), Some(LossReason::Expired)),
        "the lease stays lost"
    );
}

#[test]
fn leases_with_system_clocks_share_one_queue() {
    let directory = TestDir::new();
    let lease = |n: u32| {
        Lease::file(directory.0.join(n.to_string()))
            .clock(Arc::new(SystemClock))
            .build()
            .unwrap()
    };
    let _guards: Vec<_> = (0..200).map(|n| lease(n).lock().unwrap()).collect();
    // Other tests run at the same time, with clocks of their own.
    assert!(HeartbeatScheduler::start().unwrap().clocks() < 100);
}

#[test]
fn on_lost_callbacks_run_serially_on_one_thread() {
    let clock = ManualClock::new();
    let store = FaultyStore::new(&clock);
    let (report, reports) = mpsc::channel();
    let (inside, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let guards: Vec<_> = (0..200)
        .map(|n| {
            store.record.lock().1 = None;
            let (report, inside, most) = (report.clone(), inside.clone(), most.clone());
            let lease =
                Lease::with_store(store.clone(), n.to_string()).clock(Arc::new(clock.clone()));
            let lease = lease.on_lost(move |_| {
                most.fetch_max(
                    inside.fetch_add(1, Ordering::Relaxed) + 1,
                    Ordering::Relaxed,
                );
                thread::sleep(MS / 2);
                assert!(thread::current().name() == Some("lockkit-lost"));
                inside.fetch_sub(1, Ordering::Relaxed);
                report.send(n).unwrap();
            });
            lease.build().unwrap().lock().unwrap()
        })
        .collect();
    clock.advance(MS * 10_000);
    assert!(guards.iter().all(|guard| !guard.is_held()));
    let mut all: Vec<_> = guards
        .iter()
        .map(|_| reports.recv_timeout(MS * 5000).unwrap())
        .collect();
    all.sort_unstable();
    assert!(all.into_iter().eq(0..200) && reports.try_recv().is_err());
    assert_eq!(most.load(Ordering::Relaxed), 1);
}

#[test]
fn lease_types_are_send_and_sync() {
    fn check<T: Send + Sync + 'static>() {}
    check::<Lease>();
    check::<LeaseGuard>();
    check::<LostSignal>();
}

#[test]
fn drop_of_thousand_guards_frees_all_leases() {
    let directory = TestDir::new();
    let leases: Vec<_> = (0..1000)
        .map(|n| {
            Lease::file(directory.0.join(n.to_string()))
                .build()
                .unwrap()
        })
        .collect();
    let guards: Vec<_> = leases
        .iter()
        .map(|lease| lease.try_lock().unwrap())
        .collect();
    drop(guards);
    assert!(leases.iter().all(|lease| lease.try_lock().is_ok()));
}
