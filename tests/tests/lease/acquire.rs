//! Acquire and release, alone and under contention.

use std::fs;
#[cfg(target_os = "linux")]
use std::sync::Mutex;
#[cfg(target_os = "linux")]
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

#[cfg(target_os = "linux")]
use lockkit::CancelToken;
use lockkit::{ErrorKind, Lease, LeaseStatus, LossReason, Wait};
use lockkit_tests::leases::{Terms, left_by_the_dead, line};
use lockkit_tests::small_disk::SmallDisk;
use lockkit_tests::wine::{is_wine, wine_cannot_judge};
use lockkit_tests::{Actor, Belongings, LIVELY, until};

use crate::fixture::{
    acquire, is_held, read, record_of_other_host, replace, temp_lease, terms_on, token,
    token_after, write,
};
#[cfg(target_os = "linux")]
use crate::fixture::{inotify_watches, wait_for_heartbeats};

#[test]
fn try_lock_of_held_lease_refused_until_release() {
    #[derive(Debug, PartialEq)]
    struct BuildRuns;
    impl std::fmt::Display for BuildRuns {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a build is running")
        }
    }
    impl std::error::Error for BuildRuns {}

    let (_directory, terms) = temp_lease();
    let mut holder = Actor::start_lease(&terms);
    let first = acquire(&mut holder, "try");
    let lease = terms.builder().held_error(|| BuildRuns).build().unwrap();
    let error = lease.try_lock().unwrap_err();
    assert!(error.is_held());
    assert_eq!(error.owner().unwrap().pid(), holder.pid());
    let own = std::error::Error::source(&error).and_then(|source| source.downcast_ref());
    assert_eq!(
        own,
        Some(&BuildRuns),
        "the error that the caller has set is the source"
    );
    holder.expect("release", "released");
    let second = lease.try_lock().unwrap();
    assert!(second.token() > first && second.recovered().is_none());
    assert!(is_held(&holder.ask("try")));
}

#[test]
fn try_lock_by_twelve_contenders_has_one_winner() {
    let (directory, terms) = temp_lease();
    let mut contenders: Vec<Actor> = (0..12).map(|_| Actor::start_lease(&terms)).collect();
    for round in 0..100 {
        // In every other round the record exists, and is free.
        if round % 2 == 0 {
            let _ = fs::remove_file(&terms.path);
        }
        contenders
            .iter_mut()
            .for_each(|contender| contender.tell("try"));
        let answers: Vec<String> = contenders.iter_mut().map(Actor::answer).collect();
        let winners: Vec<usize> = (0..12)
            .filter(|at| answers[*at].starts_with("held "))
            .collect();
        assert_eq!(winners.len(), 1, "round {round}: {answers:?}");
        assert_eq!(
            answers.iter().filter(|answer| is_held(answer)).count(),
            11,
            "round {round}: {answers:?}"
        );
        token(&answers[winners[0]]);
        contenders[winners[0]].expect("release", "released");
    }
    assert_eq!(
        directory.path().read_dir().unwrap().count(),
        1,
        "only the record is left"
    );
}

#[test]
fn try_lock_of_stale_record_by_eight_has_one_winner() {
    let (_directory, terms) = temp_lease();
    let stale = left_by_the_dead(&terms);
    let died = line(&stale, "pid").parse().unwrap();
    let mut racers: Vec<Actor> = (0..8).map(|_| Actor::start_lease(&terms)).collect();
    // Under Wine each round takes many times as long.
    for round in 0..if is_wine() { 50 } else { 2000 } {
        write(&terms, &stale);
        racers.iter_mut().for_each(|racer| racer.tell("try"));
        let answers: Vec<String> = racers.iter_mut().map(Actor::answer).collect();
        let winners: Vec<usize> = (0..8)
            .filter(|at| answers[*at].starts_with("held "))
            .collect();
        assert_eq!(winners.len(), 1, "round {round}: {answers:?}");
        assert_eq!(
            answers.iter().filter(|answer| is_held(answer)).count(),
            7,
            "round {round}: {answers:?}"
        );
        token_after(&answers[winners[0]], died);
        let winner = &mut racers[winners[0]];
        assert_eq!(line(&read(&terms), "pid"), winner.pid().to_string());
        winner.expect("release", "released");
    }
}

#[test]
fn release_keeps_foreign_record() {
    let (_directory, mut terms) = temp_lease();
    // The interval is so long that no heartbeat comes in between.
    (terms.ttl, terms.heartbeat) = (60_000, 20_000);
    let lease = terms.open();
    let foreign = record_of_other_host(&terms);
    let newer = b"lockkit lease 2\nflavour sour\n";
    let changes: [&dyn Fn(); 3] = [
        &|| write(&terms, &foreign),
        &|| replace(&terms, &foreign),
        &|| replace(&terms, newer),
    ];
    for change in changes {
        for drops in [false, true] {
            let _ = fs::remove_file(&terms.path);
            let guard = lease.try_lock().unwrap();
            change();
            let left = fs::read(&terms.path).ok();
            match drops {
                true => drop(guard),
                false => {
                    let error = guard.release().unwrap_err();
                    assert!(
                        matches!(error.kind(), ErrorKind::LeaseLost { .. }),
                        "{error}"
                    );
                }
            }
            assert_eq!(fs::read(&terms.path).ok(), left);
        }
    }
}

#[test]
fn release_of_damaged_or_deleted_record_succeeds() {
    let (_directory, mut terms) = temp_lease();
    (terms.ttl, terms.heartbeat) = (60_000, 20_000);
    let lease = terms.open();
    let changes: [&dyn Fn(); 3] = [&|| write(&terms, "lock"), &|| replace(&terms, ""), &|| {
        fs::remove_file(&terms.path).unwrap()
    }];
    for change in changes {
        for drops in [false, true] {
            let guard = lease.try_lock().unwrap();
            let (token, lost) = (guard.token(), guard.lost());
            change();
            let is_there = terms.path.exists();
            match drops {
                true => drop(guard),
                false => guard.release().unwrap(),
            }
            assert!(matches!(lost.reason(), Some(LossReason::Released)));
            assert_eq!(
                terms.path.exists(),
                is_there,
                "a deleted file is left deleted"
            );
            let next = lease.try_lock().unwrap();
            assert!(next.token() > token && next.recovered().is_none());
            next.release().unwrap();
        }
    }
}

#[test]
fn drop_during_heartbeat_leaves_record_free() {
    if wine_cannot_judge("each step of a lease takes milliseconds there, and it counts them") {
        return;
    }
    let (_directory, terms) = temp_lease();
    let lease = terms
        .builder()
        .ttl(LIVELY)
        .heartbeat(Duration::from_millis(1))
        .build()
        .unwrap();
    let mut last = 0;
    for round in 0..500 {
        let guard = lease.try_lock().expect("no renewal restored the record");
        assert!(guard.token() > last && guard.recovered().is_none());
        last = guard.token();
        // Heartbeats come every millisecond, so the drop comes at another moment each time.
        std::thread::sleep(Duration::from_micros(round * 7 % 3000));
        drop(guard);
        assert_eq!(lease.status().unwrap(), LeaseStatus::Free);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn forked_child_does_not_inherit_lease() {
    let (directory, terms) = temp_lease();
    let mut parent = Actor::start_lease(&terms);
    let first = acquire(&mut parent, "try");
    parent.expect(
        &format!("fork {}", directory.path().join("other").display()),
        "parted",
    );
    wait_for_heartbeats(&terms);
    parent.expect("is-held", "yes");
    parent.expect("losses", "losses");
    assert!(terms.open().try_lock().unwrap_err().is_held());
    parent.expect("release", "released");
    assert!(acquire(&mut parent, "try") > first);
}

#[test]
fn drop_or_kill_with_thousand_leases_frees_all() {
    if wine_cannot_judge("each step of a lease takes milliseconds there, and it counts them") {
        return;
    }
    // The lease is in memory, because each new record is synced.
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut terms = Terms::of(directory.path().join("lease"));
    // A slow machine needs more than a moment for a thousand leases.
    (terms.ttl, terms.heartbeat) = (10_000, 1000);
    let mut holder = Actor::start_lease(&terms);
    acquire(&mut holder, "try");
    holder.expect("release", "released");
    let before = Belongings::of(holder.pid());
    let leases: Vec<Lease> = (0..1000)
        .map(|n| {
            Terms {
                path: directory.path().join(n.to_string()),
                ..terms.clone()
            }
            .open()
        })
        .collect();
    let hold = format!("hold-many 1000 {}", directory.path().display());
    holder.expect(&hold, "holds 1000");
    // A heartbeat has the file open for as long as it lasts.
    until(
        "all leases share one thread, and keep no descriptor",
        || Belongings::of(holder.pid()) == before,
    );
    assert!(
        leases
            .iter()
            .all(|lease| lease.try_lock().is_err_and(|error| error.is_held()))
    );
    holder.expect("drop-many", "dropped");
    assert!(
        leases
            .iter()
            .all(|lease| lease.try_lock().unwrap().recovered().is_none())
    );
    holder.expect("losses", "losses");
    holder.expect(&hold, "holds 1000");
    holder.kill();
    assert!(
        leases
            .iter()
            .all(|lease| lease.try_lock().unwrap().recovered().is_some())
    );
}

#[test]
fn acquire_retries_follow_limit_and_delay() {
    if wine_cannot_judge("each step of a lease takes milliseconds there, and it counts them") {
        return;
    }
    let (directory, terms) = temp_lease();
    let pause = Duration::from_millis(20);
    // A file in the place of its directory is a permanent error, which is reported immediately.
    fs::write(directory.path().join("file"), "").unwrap();
    let below_file = Lease::file(directory.path().join("file/lease"))
        .acquire_retry_limit(u32::MAX)
        .build()
        .unwrap();
    let error = below_file.lock().unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Io { .. }), "{error}");
    let Some(disk) = SmallDisk::mount("size=64k") else {
        return;
    };
    disk.fill();
    for limit in [0, 1, 10] {
        let lease = Lease::file(terms_on(&disk).path)
            .acquire_retry_limit(limit)
            .acquire_retry_delay(pause)
            .build()
            .unwrap();
        for wait in [Wait::none(), Wait::forever(), Wait::at_most(LIVELY)] {
            let start = Instant::now();
            let error = lease.acquire(&wait).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Io { .. }), "{error}");
            assert!(start.elapsed() >= pause * limit, "{:?}", start.elapsed());
        }
    }
    // A held lease is not a failed attempt.
    let _guard = terms.open().try_lock().unwrap();
    let lease = terms.builder().acquire_retry_limit(0).build().unwrap();
    assert!(
        lease
            .lock_for(Duration::from_millis(100))
            .unwrap_err()
            .is_timeout()
    );
}

#[cfg(target_os = "linux")]
#[test]
fn wait_after_timeout_leaves_no_inotify_watch() {
    let (_directory, terms) = temp_lease();
    let mut holder = Actor::start_lease(&terms);
    acquire(&mut holder, "try");
    let mut waiter = Actor::start_lease(&terms);
    assert!(waiter.ask("lock-for 1").starts_with("error Timeout"));
    let pid = waiter.pid();
    let before = Belongings::of(pid);
    waiter.tell_to_wait("lock-for 500");
    until("the waiter watches the file", || inotify_watches(pid) == 1);
    assert!(waiter.answer().starts_with("error Timeout"));
    assert_eq!((inotify_watches(pid), Belongings::of(pid)), (0, before));
}

/// Returns how long `threads` threads take to acquire the lease `often` times each.
#[cfg(target_os = "linux")]
fn acquire_in_threads(threads: usize, often: usize, open: impl Fn() -> Lease + Sync) -> Duration {
    let holders = AtomicUsize::new(0);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let lease = open();
                for _ in 0..often {
                    let guard = lease.lock_for(4 * LIVELY).unwrap();
                    assert_eq!(
                        holders.fetch_add(1, Ordering::SeqCst),
                        0,
                        "two threads hold the lease"
                    );
                    holders.fetch_sub(1, Ordering::SeqCst);
                    drop(guard);
                }
            });
        }
    });
    start.elapsed()
}

#[cfg(target_os = "linux")]
#[test]
fn c13_acquire_by_200_threads_is_quick_and_exclusive() {
    let (_directory, terms) = temp_lease();
    let shared = terms.open();
    let took = acquire_in_threads(200, 5, || shared.clone());
    println!("200 threads took one lease 1000 times in {took:?}");
    assert!(took < Duration::from_secs(8), "{took:?}");
    // Leases of one path share a queue.
    let took = acquire_in_threads(200, 5, || terms.open());
    println!("200 leases of one path were taken 1000 times in {took:?}");
    assert!(took < Duration::from_secs(8), "{took:?}");
}

#[cfg(target_os = "linux")]
#[test]
fn c13_waiters_of_one_process_served_in_order() {
    let (_directory, terms) = temp_lease();
    let lease = terms.open();
    let order = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        let guard = lease.lock().unwrap();
        for number in 0..20 {
            let (lease, order) = (terms.open(), &order);
            let (send, receive) = std::sync::mpsc::channel();
            scope.spawn(move || {
                send.send(lockkit_tests::thread_id()).unwrap();
                let guard = lease.lock_for(LIVELY).unwrap();
                order.lock().unwrap().push(number);
                drop(guard);
            });
            let thread = receive.recv().unwrap();
            until("the waiter sleeps", || {
                lockkit_tests::sleeps(std::process::id(), thread)
            });
            // A try does not join the queue.
            let start = Instant::now();
            let error = terms.open().try_lock().unwrap_err();
            assert!(error.is_held() && error.owner().is_some() && start.elapsed() < LIVELY / 10);
        }
        // The error names the holder, although this thread has not asked the store.
        let error = terms
            .open()
            .lock_for(Duration::from_millis(50))
            .unwrap_err();
        assert!(
            error.is_timeout()
                && error
                    .owner()
                    .is_some_and(|owner| owner.pid() == std::process::id()),
            "{error}"
        );
        drop(guard);
    });
    assert_eq!(order.into_inner().unwrap(), (0..20).collect::<Vec<_>>());
}

#[cfg(target_os = "linux")]
#[test]
fn c13_wait_after_timeout_or_cancel_leaks_nothing() {
    let (_directory, terms) = temp_lease();
    let lease = terms.open();
    let guard = lease.lock().unwrap();
    let stop = CancelToken::new();
    // Creates the descriptor that a process keeps for its next wait, and that of the token.
    assert!(
        lease
            .acquire(&Wait::at_most(Duration::from_millis(10)).or_cancelled(&stop))
            .is_err()
    );
    // The events of the waiters. Other tests of this process may have events, too.
    let events = || {
        let open = fs::read_dir("/proc/self/fd").unwrap().flatten();
        open.filter(|fd| {
            fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str() == "anon_inode:[eventfd]")
        })
        .count()
    };
    let start = || {
        let (lease, wait) = (lease.clone(), Wait::forever().or_cancelled(&stop));
        std::thread::spawn(move || lease.acquire(&wait).map(drop))
    };
    let waiters: Vec<_> = (0..50).map(|_| start()).collect();
    until("all waiters wait", || events() >= 49);
    let timed: Vec<_> = (0..50)
        .map(|_| {
            let lease = lease.clone();
            std::thread::spawn(move || lease.lock_for(Duration::from_millis(100)).map(drop))
        })
        .collect();
    for waiter in timed {
        assert!(waiter.join().unwrap().unwrap_err().is_timeout());
    }
    let cancelled = Instant::now();
    stop.cancel();
    for waiter in waiters {
        assert!(waiter.join().unwrap().unwrap_err().is_cancelled());
    }
    assert!(
        cancelled.elapsed() < Duration::from_secs(5),
        "{:?}",
        cancelled.elapsed()
    );
    until("no waiter has left a descriptor", || events() < 20);
    drop(guard);
    drop(lease.try_lock().expect("no waiter is left"));
}
