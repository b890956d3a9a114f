//! A slot of the table: its words, and reading and writing it in shared memory.

use std::sync::atomic::{AtomicU64, Ordering, fence};

use crate::base::holder_record::{self, ACQUIRED, NAMESPACE, PID, PROGRAM, SUM, Words};
use crate::base::owner::Owner;
use crate::sys::failpoint::step;
use crate::sys::fnv;

pub(super) const WORD: usize = size_of::<u64>();
pub(super) const PAGE: u64 = 4096;
pub(super) const SLOT: usize = 128;
pub(super) const SLOT_WORDS: usize = SLOT / WORD;
pub(super) const SLOTS_OF_A_PAGE: u32 = (PAGE as usize / SLOT) as u32;
pub(super) const BUCKET: usize = 8;
/// The limit makes at most 262,112 records possible.
pub(super) const MAX_LEVELS: u32 = 13;
/// From this level on, 1 MiB into the table, the record of a dead holder makes room.
pub(super) const FIRST_EVICTING_LEVEL: u32 = 7;

/// The words of a dead holder's record that are kept until the next record is whole.
pub(super) const COPIED: std::ops::RangeInclusive<usize> = PID..=NAMESPACE;

pub(super) const KEY: u64 = !0xff;
pub(super) const CHANGES: u64 = 0xfc;
pub(super) const ONE_CHANGE: u64 = 4;
pub(super) const STATE: u64 = 3;
/// The holder released, or there never was one.
pub(super) const CLEARED: u64 = 0;
/// A holder holds the lock, or died holding it.
pub(super) const WRITTEN: u64 = 1;
/// The lock is in flight to this holder, or this receiver died before it began.
pub(super) const HANDED: u64 = 2;
/// A holder is writing the record, or died while writing.
pub(super) const CLAIMED: u64 = 3;

/// Returns the key of the lock `name`: FNV-1a with its bits mixed.
pub(super) fn key_of(name: &str) -> u64 {
    let mut key = fnv::of_bytes(name.as_bytes());
    key = (key ^ key >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    key ^= key >> 32;
    // Key 0 means that no lock has used the slot.
    (key & KEY).max(1 << KEY.trailing_zeros())
}

/// Returns word 0 for the next state of a slot whose word 0 is `seen`.
pub(super) fn word_after(seen: u64, key: u64, state: u64) -> u64 {
    key | (seen.wrapping_add(ONE_CHANGE) & CHANGES) | state
}

/// A slot and the words that were read from it.
#[derive(Clone, Copy)]
pub(super) struct SlotContent {
    pub(super) at: u32,
    pub(super) words: Words,
}

impl SlotContent {
    pub(super) fn state(&self) -> u64 {
        self.words[0] & STATE
    }

    pub(super) fn is_of(&self, key: u64) -> bool {
        self.words[0] & KEY == key
    }
}

/// Writes a record into a slot, with this word 0, if word 0 is still `before`.
#[inline]
pub(super) fn write_slot(slot: &[AtomicU64], before: u64, word: u64, record: &Words) -> bool {
    // A holder that dies while it writes has not begun. But if it follows a holder that died, that
    // death must still be reported. A releasing holder that dies while it writes its receiver has
    // released: the receiver lives.
    let follows_death = (before ^ word) & (KEY | STATE) == 0 && word & STATE == WRITTEN;
    let meanwhile = if follows_death { word } else { word | CLAIMED };
    if slot[0]
        .compare_exchange(before, meanwhile, Ordering::AcqRel, Ordering::Relaxed)
        .is_err()
    {
        return false;
    }
    if follows_death {
        copy_identity(slot);
    }
    // No reader may find new words under the old word 0.
    fence(Ordering::Release);
    for (word, value) in slot[..ACQUIRED].iter().zip(record).skip(1) {
        word.store(*value, Ordering::Relaxed);
    }
    slot[ACQUIRED].store(holder_record::now(), Ordering::Relaxed);
    step("words of a record written");
    slot[0].store(word, Ordering::Release);
    true
}

/// Copies the identity of a dead holder before its record is overwritten. If the record is not
/// whole, a holder that also died was overwriting it, and the copy exists already.
#[cold]
pub(super) fn copy_identity(slot: &[AtomicU64]) {
    let record: Words = std::array::from_fn(|at| slot[at].load(Ordering::Relaxed));
    if record[SUM] == holder_record::sum(&record) {
        for (at, copy) in COPIED.zip(&slot[ACQUIRED + 1..]) {
            copy.store(record[at], Ordering::Relaxed);
        }
    }
}

/// Returns the dead holder whose record was being overwritten.
pub(super) fn copied_owner(slot: &[AtomicU64]) -> Option<Owner> {
    // The copy is of this boot, as is the memory of the table.
    let mut record = holder_record::with_current(|own| *own);
    record[PROGRAM].fill(0);
    record[ACQUIRED] = 0;
    for (at, copy) in COPIED.zip(&slot[ACQUIRED + 1..]) {
        record[at] = copy.load(Ordering::Relaxed);
    }
    record[SUM] = holder_record::sum(&record);
    holder_record::owner_of(&record)
}

/// Reads a consistent state of a slot, unless its writer takes too long.
pub(super) fn read_slot(slot: &[AtomicU64], words: &mut Words) {
    const MAX_TRIES: usize = 100;
    for _ in 0..MAX_TRIES {
        words[0] = slot[0].load(Ordering::Acquire);
        for (word, value) in words[..=ACQUIRED].iter_mut().zip(slot).skip(1) {
            *word = value.load(Ordering::Relaxed);
        }
        fence(Ordering::Acquire);
        if slot[0].load(Ordering::Relaxed) == words[0] {
            return;
        }
        std::hint::spin_loop();
    }
}

/// Returns the first slot of the bucket for a key.
pub(super) fn bucket_of(key: u64, level: u32) -> u32 {
    let buckets = u64::from(SLOTS_OF_A_PAGE << level) / BUCKET as u64;
    (SLOTS_OF_A_PAGE << level) + ((key >> 8) & (buckets - 1)) as u32 * BUCKET as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::holder_record::IDENTITY;

    #[test]
    fn buckets_of_level_stay_within_its_pages() {
        for level in 0..MAX_LEVELS {
            let pages = SLOTS_OF_A_PAGE << level;
            for number in 0..1000 {
                let first = bucket_of(key_of(&format!("lock-{number}")), level);
                assert!((pages..2 * pages).contains(&first) && first % BUCKET as u32 == 0);
            }
        }
    }

    #[test]
    fn word_of_slot_changes_with_every_write() {
        let key = key_of("lock");
        let (mut word, mut seen) = (0, Vec::new());
        for state in [WRITTEN, CLEARED, HANDED, WRITTEN, CLEARED] {
            word = word_after(word, key, state);
            assert_eq!((word & KEY, word & STATE), (key, state));
            assert!(!seen.contains(&word));
            seen.push(word);
        }
    }

    #[test]
    fn overwrite_killed_midway_reports_first_death() {
        let slot = [const { AtomicU64::new(0) }; SLOT_WORDS];
        let key = key_of("lock");
        let record = |pid| {
            let mut owner = Owner::current();
            owner.pid = pid;
            holder_record::encode(&owner)
        };
        let words = || -> Words { std::array::from_fn(|at| slot[at].load(Ordering::Relaxed)) };
        assert!(write_slot(
            &slot,
            0,
            word_after(0, key, WRITTEN),
            &record(7)
        ));
        assert_eq!(holder_record::owner_of(&words()).unwrap().pid(), 7);
        for _ in 0..2 {
            // The writer follows a death, and is killed after it has written one word.
            copy_identity(&slot);
            slot[IDENTITY.start].store(8, Ordering::Relaxed);
            assert_eq!(holder_record::owner_of(&words()), None);
            assert_eq!(copied_owner(&slot).unwrap().pid(), 7);
        }
        let before = slot[0].load(Ordering::Relaxed);
        assert!(write_slot(
            &slot,
            before,
            word_after(before, key, WRITTEN),
            &record(9)
        ));
        assert_eq!(holder_record::owner_of(&words()).unwrap().pid(), 9);
    }

    #[test]
    fn keys_of_names_are_distinct() {
        let keys: std::collections::HashSet<u64> = (0..100_000)
            .map(|number| key_of(&format!("lock-{number}")))
            .collect();
        assert_eq!(keys.len(), 100_000);
        assert!(!keys.contains(&0));
    }
}
