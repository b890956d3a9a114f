//! The records of the holders of all locks on sockets: one table for each user, and one for the
//! machine.
//!
//! A record identifies the holder of a lock, or the process that died holding it (see
//! [`holder_record`](crate::base::holder_record)). The record excludes no process: a lost record is
//! a lost report.
//!
//! # Guarantees
//! - The memory of a table is bounded by the number of locks that are held at once, plus 1 MiB for
//!   the records of dead holders. At 32 MiB further locks have no record.
//! - A kill at any time leaves the record of the previous holder, of the new holder, or none.
//!
//! # Implementation
//! A table is a file of pages:
//! ```text
//! page 0            header: the magic, the number of levels, and 256 counters of waiters
//! page 1            level 0: 4 buckets of 8 slots
//! pages 2 to 3      level 1: 8 buckets
//! pages 4 to 7      level 2: 16 buckets, and so on
//! ```
//! A slot is 128 bytes: word 0, the words 1 to 11 of a record, and a copy. The copy has the words 1
//! to 3 (pid, start time, namespace) of the previous record, if that holder died. It reports the
//! death if the next holder is killed while it writes.
//! ```text
//! word 0, bits 8 to 63   the key: a hash of the lock's name
//!         bits 2 to 7    changes with every write
//!         bits 0 to 1    CLEARED, WRITTEN, HANDED or CLAIMED
//! ```
//! A lock's slot is in the bucket of its key, in the lowest level whose bucket had room. A released
//! lock leaves its key in the slot until another lock takes the slot; the least recently used slot
//! is taken first. So a handle that remembers its slot finds it again without a search. A level is
//! added when the buckets of all others are full of held locks. From level 7 on, the record of a
//! dead holder makes room, too.
//!
//! Only the holder of a lock writes a slot with the lock's key, and only after a search through all
//! levels, so no key has two slots. Two holders that take the same slot for different locks
//! exchange word 0, and one exchange fails.
//!
//! The table of a user is mapped once in each process: its file is private, complete and in memory,
//! so no other user can shorten it under the mapping. Every user can write the table of the
//! machine, so it is never mapped, but read and written by system calls. There a flock on the file
//! orders the processes that take a slot of another lock.

mod slot;
mod table;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use self::slot::{
    CLEARED, HANDED, KEY, STATE, SlotContent, WRITTEN, copied_owner, key_of, word_after, write_slot,
};
use self::table::Records;
use crate::base::error::Result;
use crate::base::guard::Recovered;
use crate::base::holder_record::{self, WORDS, Words};
use crate::base::owner::Owner;
use crate::base::runtime_dir::Sharing;
use crate::sys::failpoint::step;

/// The record of one lock, for a handle of the lock.
#[derive(Debug)]
pub(super) struct HolderRecord {
    records: Arc<Records>,
    key: u64,
    /// The last position of the lock's slot. 0, which is in the header, means none.
    slot: AtomicU32,
}

impl HolderRecord {
    pub(super) fn open(name: &str, sharing: Sharing) -> Result<Self> {
        Ok(Self {
            records: Records::of(sharing)?,
            key: key_of(name),
            slot: AtomicU32::new(0),
        })
    }

    /// Records that this process holds the lock. For a holder that bound the name, it returns the
    /// process that died holding the lock before. A holder that received the lock by a hand-over
    /// follows a holder that released.
    pub(super) fn record_current(&self, has_bound: bool) -> Option<Box<Recovered>> {
        let before = holder_record::with_current(|record| self.put(record, WRITTEN));
        step("holder recorded");
        let died = before
            .filter(|before| has_bound && before.is_of(self.key) && before.state() == WRITTEN)?;
        let owner = holder_record::owner_of(&died.words)
            .or_else(|| copied_owner(self.records.slot(died.at)?));
        Some(Box::new(Recovered::new(owner)))
    }

    /// Records that `owner` holds the lock: a process for which this process has acquired it.
    pub(super) fn record_owner(&self, owner: &Owner) {
        self.put(&holder_record::encode(owner), WRITTEN);
    }

    /// Records that the lock is about to be handed over to the process of this record.
    pub(super) fn record_receiver(&self, record: &Words) {
        self.put(record, HANDED);
        step("receiver recorded");
    }

    /// Records that no process holds the lock. If the record stayed, the next owner would get a
    /// false report of a death.
    pub(super) fn clear(&self) {
        if let Some((slot, word)) = self.remembered_word() {
            if word & STATE != CLEARED {
                // No other process changes the slot, not even for a new lock, because this holder
                // lives.
                slot[0].store(word_after(word, self.key, CLEARED), Ordering::Release);
            }
            return;
        }
        // A process that has written a slot may write it again.
        let known = self.remembered();
        let found = || {
            self.records
                .locate(self.key, false)
                .filter(|seen| self.records.may_write(seen.at))
        };
        if let Some(seen) = known.or_else(found).filter(|seen| seen.state() != CLEARED) {
            self.records.clear(&seen);
        }
    }

    /// Returns the holder from the record, or the process that died holding the lock.
    pub(super) fn holder(&self) -> Option<Owner> {
        /// A record is written in less time. The reader does not wait for a writer that is stopped
        /// in between.
        const MAX_TRIES: usize = 100;
        for _ in 0..MAX_TRIES {
            let seen = self.find()?;
            match seen.state() {
                CLEARED => return None,
                WRITTEN | HANDED => {
                    if let Some(owner) = holder_record::owner_of(&seen.words) {
                        return Some(owner);
                    }
                }
                _ => {}
            }
            std::hint::spin_loop();
        }
        None
    }

    /// Returns how often waiters of this lock, and of some others, have queued up so far, and
    /// `None` without shared memory for the count.
    pub(super) fn waiter_count(&self) -> Option<u64> {
        Some(self.counter()?.load(Ordering::SeqCst))
    }

    /// Counts a waiter that has queued up.
    pub(super) fn count_waiter(&self) {
        if let Some(counter) = self.counter() {
            counter.fetch_add(1, Ordering::SeqCst);
            step("waiter counted");
        }
    }

    fn counter(&self) -> Option<&AtomicU64> {
        self.records.waiter_counter(self.key)
    }

    /// Returns the lock's slot.
    fn find(&self) -> Option<SlotContent> {
        self.remembered()
            .or_else(|| self.records.locate(self.key, false))
    }

    /// Returns the lock's slot at its last position.
    fn remembered(&self) -> Option<SlotContent> {
        let at = self.slot.load(Ordering::Relaxed);
        let mut words = [[0; WORDS]];
        (at != 0)
            .then(|| self.records.read(at, &mut words))
            .flatten()?;
        Some(SlotContent {
            at,
            words: words[0],
        })
        .filter(|seen| seen.is_of(self.key))
    }

    /// Returns the slot and its word 0, like [`remembered`](Self::remembered), for a mapped table.
    #[inline]
    fn remembered_word(&self) -> Option<(&[AtomicU64], u64)> {
        let slot = self.records.slot(self.slot.load(Ordering::Relaxed))?;
        let word = slot[0].load(Ordering::Acquire);
        (word & KEY == self.key).then_some((slot, word))
    }

    /// Writes `record` into the lock's slot, or takes a slot for it. Returns the previous content,
    /// also if writing fails.
    fn put(&self, record: &Words, state: u64) -> Option<SlotContent> {
        /// The number of times that another lock may take the slot first; then this lock has no
        /// record.
        const MAX_TRIES: usize = 16;
        let mut seen = None;
        if let Some((slot, word)) = self
            .remembered_word()
            .filter(|(_, word)| word & STATE == CLEARED)
        {
            if write_slot(slot, word, word_after(word, self.key, state), record) {
                return None;
            }
        }
        for _ in 0..MAX_TRIES {
            let mut order = None;
            let found = match self.remembered() {
                Some(found) => found,
                None => {
                    order = self.records.order_claims();
                    self.records
                        .locate(self.key, true)
                        .filter(|found| self.records.may_write(found.at))?
                }
            };
            seen = Some(found);
            let is_done = self.records.write(&found, self.key, state, record);
            drop(order);
            if is_done {
                self.slot.store(found.at, Ordering::Relaxed);
                break;
            }
        }
        seen
    }
}

/// The holders of all locks according to their records, for a list.
pub(super) struct Holders(HashMap<u64, Owner>);

impl Holders {
    pub(super) fn read(sharing: Sharing) -> Self {
        Self(
            Records::of(sharing)
                .map(|records| records.holders())
                .unwrap_or_default(),
        )
    }

    pub(super) fn of(&mut self, name: &str) -> Option<Owner> {
        self.0.remove(&key_of(name))
    }
}
