//! The cases that hold for every manager.

#![allow(missing_docs)] // Each name states the operation, the condition and the result.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lockkit::{ErrorKind, Liveness};

use super::table::{CAPACITY, Kind};
use crate::LIVELY;
use crate::wine::{DELETED, is_wine, wine_cannot_judge};

/// Makes a module `$module` with a test for every case that holds for all managers.
#[macro_export]
macro_rules! managers {
    ($module:ident, $kind:expr) => {
        $crate::managers!($module, $kind;
            allocate_lock_unlock_free_each_succeed,
            allocate_until_full_gives_distinct_numbers,
            allocate_after_free_reuses_number,
            free_of_unallocated_lock_fails,
            unlock_of_unlocked_lock_fails,
            release_after_unlock_keeps_next_holder,
            allocate_at_same_number_twice_fails,
            free_all_makes_first_number_available,
            release_in_other_order_serves_waiter,
            lock_of_freed_number_still_excludes,
            held_lists_owner_and_time_without_waiting,
            allocate_by_many_threads_gives_distinct_numbers,
            panic_of_holder_thread_releases,
            freed_lock_under_contention_stays_exclusive,
        );
    };
    ($module:ident, $kind:expr; $($case:ident,)*) => {
        mod $module {
            $(#[test]
            fn $case() {
                $crate::managers::$case($kind);
            })*
        }
    };
}

pub fn allocate_lock_unlock_free_each_succeed(kind: Kind) {
    let table = kind.fresh();
    let manager = table.open();
    let lock = manager.allocate().unwrap();
    let guard = lock.lock().unwrap();
    assert_eq!(guard.recovered(), None);
    assert!(lock.try_lock().unwrap_err().is_held());
    guard.release().unwrap();
    std::mem::forget(lock.lock().unwrap());
    lock.unlock().unwrap();
    lock.try_lock().unwrap().release().unwrap();
    lock.free().unwrap();
    table.clean();
}

pub fn allocate_until_full_gives_distinct_numbers(kind: Kind) {
    let table = kind.fresh();
    let manager = table.open();
    let ids: BTreeSet<u32> = (0..CAPACITY)
        .map(|_| manager.allocate().unwrap().id())
        .collect();
    assert_eq!(ids.len(), CAPACITY as usize);
    if kind.is_limited() {
        assert_eq!(manager.available().unwrap(), Some(0));
        let error = manager.allocate().unwrap_err();
        let is_exhausted = matches!(
            error.kind(),
            ErrorKind::Exhausted {
                capacity: CAPACITY,
                allocated: CAPACITY,
                ..
            }
        );
        assert!(is_exhausted, "{error}");
    } else {
        assert_eq!(manager.available().unwrap(), None);
    }
    table.clean();
}

pub fn allocate_after_free_reuses_number(kind: Kind) {
    let table = kind.fresh();
    let manager = table.open();
    let locks: Vec<_> = (0..CAPACITY).map(|_| manager.allocate().unwrap()).collect();
    for lock in [&locks[77], &locks[0], &locks[127]] {
        lock.free().unwrap();
        let next = manager.allocate().unwrap();
        if kind.is_limited() {
            assert_eq!(next.id(), lock.id());
        }
    }
    table.clean();
}

pub fn free_of_unallocated_lock_fails(kind: Kind) {
    let table = kind.fresh();
    let manager = table.open();
    let lock = manager.retrieve(7).unwrap();
    let refused = || {
        matches!(
            lock.free().unwrap_err().kind(),
            ErrorKind::NotAllocated { .. }
        )
    };
    assert!(refused());
    manager.allocate_at(7).unwrap();
    lock.free().unwrap();
    assert!(refused());
    if kind.is_limited() {
        assert_eq!(manager.available().unwrap(), Some(CAPACITY));
    }
    table.clean();
}

pub fn unlock_of_unlocked_lock_fails(kind: Kind) {
    let table = kind.fresh();
    let lock = table.open().allocate().unwrap();
    let refused = || {
        matches!(
            lock.unlock().unwrap_err().kind(),
            ErrorKind::NotLocked { .. }
        )
    };
    assert!(refused());
    std::mem::forget(lock.lock().unwrap());
    lock.unlock().unwrap();
    assert!(refused());
    table.clean();
}

pub fn release_after_unlock_keeps_next_holder(kind: Kind) {
    let table = kind.fresh();
    let lock = table.open().allocate().unwrap();
    let (first, second) = (lock.lock().unwrap(), {
        lock.unlock().unwrap();
        lock.lock().unwrap()
    });
    assert!(matches!(
        first.release().unwrap_err().kind(),
        ErrorKind::NotLocked { .. }
    ));
    assert!(lock.try_lock().unwrap_err().is_held());
    second.release().unwrap();
    table.clean();
}

pub fn allocate_at_same_number_twice_fails(kind: Kind) {
    let table = kind.fresh();
    let manager = table.open();
    assert_eq!(manager.allocate_at(42).unwrap().id(), 42);
    let taken = |id| {
        matches!(
            manager.allocate_at(id).unwrap_err().kind(),
            ErrorKind::AlreadyAllocated { .. }
        )
    };
    assert!(taken(42));
    assert!(taken(manager.allocate().unwrap().id()));
    if kind.is_limited() {
        let absent = |error: lockkit::Error| {
            matches!(
                error.kind(),
                ErrorKind::NoSuchLock {
                    id: CAPACITY,
                    capacity: CAPACITY,
                    ..
                }
            )
        };
        assert!(absent(manager.allocate_at(CAPACITY).unwrap_err()));
        assert!(absent(manager.retrieve(CAPACITY).unwrap_err()));
        assert!(manager.retrieve(u32::MAX).is_err());
        assert_eq!(manager.available().unwrap(), Some(CAPACITY - 2));
    }
    for id in 0..CAPACITY {
        let _ = manager.allocate_at(id);
    }
    assert!((0..CAPACITY).all(taken));
    table.clean();
}

pub fn free_all_makes_first_number_available(kind: Kind) {
    let table = kind.fresh();
    let manager = table.open();
    let first = manager.allocate().unwrap();
    for _ in 1..100 {
        manager.allocate().unwrap();
    }
    let held = first.lock().unwrap();
    manager.free_all().unwrap();
    assert!(
        first.try_lock().unwrap_err().is_held(),
        "locks that are held stay held"
    );
    if kind.is_limited() {
        assert_eq!(manager.available().unwrap(), Some(CAPACITY));
    }
    assert_eq!(manager.allocate().unwrap().id(), first.id());
    held.release().unwrap();
    table.clean();
}

pub fn release_in_other_order_serves_waiter(kind: Kind) {
    let table = kind.fresh();
    let manager = table.open();
    let (a, b) = (manager.allocate().unwrap(), manager.allocate().unwrap());
    let (held_a, held_b) = (a.lock().unwrap(), b.lock().unwrap());
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            manager
                .retrieve(a.id())
                .unwrap()
                .lock_for(LIVELY)
                .unwrap()
                .release()
                .unwrap()
        });
        held_b.release().unwrap();
        b.lock().unwrap().release().unwrap();
        assert!(!waiter.is_finished());
        held_a.release().unwrap();
        waiter.join().unwrap();
    });
    table.clean();
}

pub fn lock_of_freed_number_still_excludes(kind: Kind) {
    if kind == Kind::Directory && wine_cannot_judge(DELETED) {
        return;
    }
    let table = kind.fresh();
    let manager = table.open();
    let lock = manager.allocate().unwrap();
    let held = lock.lock().unwrap();
    lock.free().unwrap();
    assert!(
        manager
            .retrieve(lock.id())
            .unwrap()
            .try_lock()
            .unwrap_err()
            .is_held(),
        "freed while held"
    );
    held.release().unwrap();
    let held = lock.lock().unwrap();
    assert!(lock.try_lock().unwrap_err().is_held(), "locked while free");
    assert_eq!(
        manager.allocate_at(lock.id()).unwrap().id(),
        lock.id(),
        "locking does not allocate"
    );
    assert!(
        lock.try_lock().unwrap_err().is_held(),
        "allocated while held"
    );
    held.release().unwrap();
    lock.free().unwrap();
    drop(lock.lock().unwrap());
    if kind == Kind::Directory {
        assert!(table.has_no_lock_files());
    }
    table.clean();
}

pub fn held_lists_owner_and_time_without_waiting(kind: Kind) {
    let table = kind.fresh();
    let manager = table.open();
    assert_eq!(manager.held().unwrap(), []);
    let before = std::time::SystemTime::now() - Duration::from_secs(1);
    let guards = [3, 77].map(|id| manager.retrieve(id).unwrap().lock().unwrap());
    let held = manager.held().unwrap();
    assert_eq!(
        held.iter().map(|held| held.id()).collect::<Vec<_>>(),
        [3, 77]
    );
    for lock in &held {
        assert_eq!(lock.owner().pid(), std::process::id());
        assert_eq!(lock.owner().liveness(), Liveness::Alive);
        assert!(lock.owner().acquired().unwrap() >= before);
    }
    let error = manager.retrieve(77).unwrap().try_lock().unwrap_err();
    assert_eq!(error.owner().unwrap().pid(), std::process::id());
    drop(guards);
    assert_eq!(manager.held().unwrap(), []);
    table.clean();
}

pub fn allocate_by_many_threads_gives_distinct_numbers(kind: Kind) {
    if kind == Kind::Directory && wine_cannot_judge(DELETED) {
        return;
    }
    let table = kind.fresh();
    let manager = table.open();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..100 {
                    let locks: Vec<_> = (0..8).map(|_| manager.allocate().unwrap()).collect();
                    for lock in &locks {
                        drop(lock.try_lock().expect("no other thread holds it"));
                        lock.free().unwrap();
                    }
                }
            });
        }
    });
    if kind.is_limited() {
        assert_eq!(manager.available().unwrap(), Some(CAPACITY));
    }
    table.clean();
}

pub fn panic_of_holder_thread_releases(kind: Kind) {
    let table = kind.fresh();
    let lock = table.open().allocate().unwrap();
    let inside = lock.clone();
    let panicked = std::thread::spawn(move || {
        let _guard = inside.lock().unwrap();
        std::panic::resume_unwind(Box::new("on purpose"));
    });
    assert!(panicked.join().is_err());
    drop(lock.try_lock().unwrap());
    table.clean();
}

pub fn freed_lock_under_contention_stays_exclusive(kind: Kind) {
    // Each release of a freed lock may remove its representation, such as its file.
    let (threads, rounds) = if is_wine() { (4, 10) } else { (48, 40) };
    let table = kind.fresh();
    let manager = table.open();
    let lock = manager.allocate().unwrap();
    lock.free().unwrap();
    let (inside, all) = (AtomicBool::new(false), std::sync::Barrier::new(threads));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                all.wait();
                for _ in 0..rounds {
                    let guard = lock.lock().unwrap();
                    assert!(!inside.swap(true, Ordering::SeqCst));
                    std::thread::yield_now();
                    inside.store(false, Ordering::SeqCst);
                    guard.release().unwrap();
                }
            });
        }
    });
    table.clean();
}
