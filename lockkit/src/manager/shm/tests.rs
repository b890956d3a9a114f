//! Tests of a table with other slots than that of this process.

use std::fs::File;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::attach::{Attached, open_file};
use super::manager::ShmLockManager;
use super::raw_lock::OWNER;
use super::slots::{self, GENERATION, SLOT, SLOT_BITS};
use crate::base::wait::Wait;
use crate::manager::LockManager;
use crate::sys::fork::ForkGuarded;
use crate::sys::layout::SLOTS;

struct TestTable(ShmLockManager);

impl TestTable {
    fn new(name: &str) -> Self {
        let path = format!("/dev/shm/lockkit-unit-{name}-{}", std::process::id());
        Self(ShmLockManager::create(path, 100).unwrap())
    }

    /// Takes another slot, as another process would.
    fn take_slot(&self) -> (ForkGuarded<File>, u32) {
        let Attached { table, path, .. } = self.0.0;
        let file = open_file(path).unwrap();
        let number = slots::take_slot(table, path, &file).unwrap();
        (file, number as u32)
    }

    fn word(&self, id: u32) -> &AtomicU32 {
        drop(self.0.retrieve(id).unwrap());
        &self.0.0.cells[id as usize].word
    }
}

impl Drop for TestTable {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.0.path());
    }
}

#[test]
fn owner_is_dead_when_slot_is_unlocked_or_reused() {
    let table = TestTable::new("dead");
    let (file, other) = table.take_slot();
    table.word(7).store(other, Ordering::SeqCst);
    let lock = table.0.retrieve(7).unwrap();
    assert!(lock.try_lock().unwrap_err().is_held());
    assert_eq!(table.0.held().unwrap().len(), 1);
    drop(file);
    assert_eq!(table.0.held().unwrap(), []);
    let guard = lock.try_lock().unwrap();
    assert_eq!(
        guard.recovered().unwrap().owner().unwrap().pid(),
        std::process::id()
    );
    drop(guard);
    // Another process takes the same slot: the slot is alive again, but the holder of the lock is
    // not.
    table.word(7).store(other, Ordering::SeqCst);
    table
        .0
        .0
        .table
        .header()
        .next_slot
        .0
        .fetch_sub(1, Ordering::SeqCst);
    let (_file, another) = table.take_slot();
    assert_eq!(another & SLOT, other & SLOT);
    assert_eq!(lock.try_lock().unwrap().recovered().unwrap().owner(), None);
}

#[test]
fn acquire_without_wait_takes_lock_reserved_for_handoff() {
    /// The word of a waiter that requested a hand-off and was killed: it was woken, and the release
    /// kept the lock for it.
    const HANDOFF: u32 = 0b11 << 29;
    let table = TestTable::new("kept");
    let lock = table.0.retrieve(7).unwrap();
    for wait in [
        Wait::none(),
        Wait::at_most(Duration::ZERO),
        Wait::until(std::time::Instant::now()),
    ] {
        table.word(7).store(HANDOFF, Ordering::SeqCst);
        drop(lock.acquire(&wait).unwrap());
    }
}

#[test]
fn owner_without_time_does_not_inherit_previous_time() {
    let table = TestTable::new("untimed");
    let lock = table.0.retrieve(7).unwrap();
    let guard = lock.lock().unwrap();
    assert!(table.0.held().unwrap()[0].owner.acquired().is_some());
    drop(guard);
    let (_file, other) = table.take_slot();
    table.word(7).store(other, Ordering::SeqCst);
    assert_eq!(table.0.held().unwrap()[0].owner.acquired(), None);
}

#[test]
fn acquire_invalid_slot_in_lock_word_reports_dead_owner() {
    let table = TestTable::new("damaged");
    for owner in [1 << SLOT_BITS, SLOTS + 1, OWNER] {
        table.word(7).store(owner, Ordering::SeqCst);
        assert_eq!(table.0.held().unwrap(), []);
        assert_eq!(
            table
                .0
                .retrieve(7)
                .unwrap()
                .try_lock()
                .unwrap()
                .recovered()
                .unwrap()
                .owner(),
            None
        );
    }
}

#[test]
fn dead_holder_recovered_after_generation_wraparound() {
    let table = TestTable::new("anew");
    let (file, other) = table.take_slot();
    let at = (other & SLOT) - 1;
    // The state that the first generation of the slot left.
    table.word(7).store(at + 1, Ordering::SeqCst);
    table.0.0.table.slots()[at as usize]
        .generation
        .store(GENERATION, Ordering::SeqCst);
    drop(file);
    table
        .0
        .0
        .table
        .header()
        .next_slot
        .0
        .fetch_sub(1, Ordering::SeqCst);
    let (_file, first_again) = table.take_slot();
    assert_eq!(first_again, at + 1, "it looks like the one that died");
    let guard = table.0.retrieve(7).unwrap().try_lock().unwrap();
    assert_eq!(guard.recovered().unwrap().owner(), None);
}
