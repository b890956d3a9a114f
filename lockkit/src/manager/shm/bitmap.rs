//! The allocation of the numbers of a table: a bit for each number, and an upper bit for each full
//! word of bits.
//!
//! The bits decide. A compare-and-swap takes one, so no number is allocated twice. The rest makes
//! the search fast: a hint stores the last place with room, and the upper bits skip full words,
//! 4096 numbers at a time. Both may be wrong briefly, or for longer after a kill between two
//! writes. A search that finds nothing with them checks every word before it fails.
//!
//! The count is a separate word. A kill between the change of a bit and that of the count leaves
//! the count wrong by one. A recount corrects it when a process finds the table full, or when the
//! count is first read after a process has attached.
//!
//! The upper half of the count counts the changes, so that a recount notices a change in between.
//! The upper half of that counts the recounts. So a process that has changed a bit, but not yet the
//! count, notices a recount in between. That recount may have seen the bit or not, so the process
//! recounts.

use super::atomic::{AtomicU32, AtomicU64, Ordering};
use crate::sys::failpoint::step;

const BITS: u32 = u64::BITS;
/// The change of the count by one allocation, and by one free: the upper half grows with both.
const ONE_MORE: u64 = (1 << 32) + 1;
const ONE_LESS: u64 = (1 << 32) - 1;
/// `count_state`: the count is right, unless a process is killed between a bit and the count.
const EXACT: u32 = 0;
/// `count_state`: the count may be wrong.
pub(super) const MAY_BE_STALE: u32 = 1;
/// `count_state`: a process recounts, and may have been killed.
const RECOUNTING: u32 = 2;
/// The change of the count by a recount. So many changes look like a recount, too, which costs an
/// unnecessary recount.
const RECOUNT: u64 = 1 << 48;

/// Returns how many bits are set. Most words of a large table are empty, so they are read a cache
/// line at a time. Without an instruction for it, counting bits takes ten times as long as reading
/// them.
fn count_set_bits(words: &[AtomicU64]) -> u32 {
    const LINE: usize = 8;
    let load = |word: &AtomicU64| word.load(Ordering::SeqCst);
    let count = |word: u64| {
        if word == u64::MAX {
            BITS
        } else {
            word.count_ones()
        }
    };
    let in_line = |line: &[AtomicU64]| match line.iter().fold(0, |any, word| any | load(word)) {
        0 => 0,
        _ => line.iter().map(|word| count(load(word))).sum(),
    };
    words.chunks(LINE).map(in_line).sum()
}

/// Returns the number of recounts in a count.
fn epoch(count: u64) -> u64 {
    count / RECOUNT
}

/// The bits of a table, in any memory.
#[derive(Clone, Copy)]
pub(super) struct Bitmap<'t> {
    /// A bit for each number.
    pub(super) words: &'t [AtomicU64],
    /// A bit for each full word.
    pub(super) full: &'t [AtomicU64],
    /// The number of set bits; in the upper half the number of changes.
    pub(super) count: &'t AtomicU64,
    /// [`EXACT`], [`MAY_BE_STALE`] or [`RECOUNTING`].
    pub(super) count_state: &'t AtomicU32,
    /// A word that may have room.
    pub(super) hint: &'t AtomicU32,
    /// The number of numbers.
    pub(super) capacity: u32,
}

impl Bitmap<'_> {
    /// Allocates a number, preferably a low one. Returns `None` if all are allocated.
    #[inline]
    pub(super) fn allocate(&self) -> Option<u32> {
        let start = self.hint.load(Ordering::Relaxed) as usize;
        match self.words.get(start).and_then(|_| self.claim_in(start)) {
            Some(id) => Some(id),
            None => self.allocate_from(start),
        }
    }

    #[cold]
    fn allocate_from(&self, start: usize) -> Option<u32> {
        let (upper, from) = (
            start / BITS as usize % self.full.len(),
            start % BITS as usize,
        );
        for round in 0..=self.full.len() {
            let at = (upper + round) % self.full.len();
            // The first round starts behind the hint; the last round covers the part before it.
            let mut not_full = !self.full[at].load(Ordering::Relaxed)
                & if round == 0 {
                    u64::MAX << from
                } else {
                    u64::MAX
                };
            while not_full != 0 {
                let word = at * BITS as usize + not_full.trailing_zeros() as usize;
                not_full &= not_full - 1;
                if word >= self.words.len() {
                    continue;
                }
                if let Some(id) = self.claim_in(word) {
                    self.hint.store(word as u32, Ordering::Relaxed);
                    return Some(id);
                }
                self.mark_full(word);
            }
        }
        for word in 0..self.words.len() {
            if let Some(id) = self.claim_in(word) {
                self.full[word / BITS as usize].fetch_and(!bit(word), Ordering::SeqCst);
                return Some(id);
            }
        }
        if !self.recount() {
            self.count_state.store(MAY_BE_STALE, Ordering::SeqCst);
        }
        None
    }

    /// Allocates `id`. Returns `false` if it is allocated.
    pub(super) fn allocate_at(&self, id: u32) -> bool {
        let word = (id / BITS) as usize;
        let epoch = self.epoch();
        if self.words[word].fetch_or(1 << (id % BITS), Ordering::SeqCst) & 1 << (id % BITS) != 0 {
            return false;
        }
        self.count_allocation(epoch);
        true
    }

    /// Frees `id`. Returns `false` if it is not allocated.
    #[inline]
    pub(super) fn free(&self, id: u32) -> bool {
        let word = (id / BITS) as usize;
        let epoch = self.epoch();
        if self.words[word].fetch_and(!(1 << (id % BITS)), Ordering::SeqCst) & 1 << (id % BITS) == 0
        {
            return false;
        }
        self.count_frees(epoch, word, ONE_LESS);
        true
    }

    /// Frees every number.
    pub(super) fn free_all(&self) {
        for (word, bits) in self.words.iter().enumerate() {
            if bits.load(Ordering::Relaxed) != 0 {
                let epoch = self.epoch();
                let freed = bits.swap(0, Ordering::SeqCst).count_ones();
                self.count_frees(epoch, word, ONE_LESS.wrapping_mul(freed.into()));
            }
        }
        self.hint.store(0, Ordering::Relaxed);
    }

    /// Returns how many numbers are not allocated. Recounts first if the count is in doubt.
    pub(super) fn available(&self) -> u32 {
        if self.count_state.load(Ordering::SeqCst) != EXACT {
            // The count may come into doubt again meanwhile. It stays in doubt if other processes
            // change it too fast.
            self.count_state.store(RECOUNTING, Ordering::SeqCst);
            if self.recount() {
                let _ = self.count_state.compare_exchange(
                    RECOUNTING,
                    EXACT,
                    Ordering::SeqCst,
                    Ordering::Relaxed,
                );
            }
        }
        self.capacity - self.allocated()
    }

    /// Returns how many numbers are allocated, from the count.
    pub(super) fn allocated(&self) -> u32 {
        // The bits change before the count, so the count may briefly be negative.
        let count = self.count.load(Ordering::Relaxed) as u32 as i32;
        count.clamp(0, self.capacity as i32) as u32
    }

    /// Corrects the count. Returns `false` if other processes changed it during every attempt.
    #[cold]
    pub(super) fn recount(&self) -> bool {
        const ATTEMPTS: u32 = 8;
        for _ in 0..ATTEMPTS {
            let before = self.count.load(Ordering::SeqCst);
            let bits = count_set_bits(self.words);
            let after = (before >> 32 << 32).wrapping_add(RECOUNT) | u64::from(bits);
            if self
                .count
                .compare_exchange(before, after, Ordering::SeqCst, Ordering::Relaxed)
                .is_ok()
            {
                return true;
            }
        }
        false
    }

    /// Returns the number of recounts; to be called before a bit is changed.
    #[inline]
    fn epoch(&self) -> u64 {
        epoch(self.count.load(Ordering::SeqCst))
    }

    /// Adds a change that was made after `epoch` was read.
    #[inline]
    fn count(&self, epoch: u64, change: u64) {
        if self::epoch(self.count.fetch_add(change, Ordering::SeqCst)) != epoch && !self.recount() {
            self.count_state.store(MAY_BE_STALE, Ordering::SeqCst);
        }
    }

    /// Allocates the lowest free number of a word.
    #[inline]
    fn claim_in(&self, word: usize) -> Option<u32> {
        let epoch = self.epoch();
        let mut seen = self.words[word].load(Ordering::Relaxed);
        loop {
            let free = !seen & self.mask(word);
            if free == 0 {
                return None;
            }
            let lowest = free & free.wrapping_neg();
            match self.words[word].compare_exchange_weak(
                seen,
                seen | lowest,
                Ordering::SeqCst,
                Ordering::Relaxed,
            ) {
                Ok(_) => {
                    self.count_allocation(epoch);
                    return Some(word as u32 * BITS + lowest.trailing_zeros());
                }
                Err(changed) => seen = changed,
            }
        }
    }

    #[inline]
    fn count_allocation(&self, epoch: u64) {
        step("number allocated");
        self.count(epoch, ONE_MORE);
        step("allocation counted");
    }

    /// Makes the next searches skip a word in which a search found no room. Allocating the last
    /// number of a word does not mark it yet: if that number is allocated and freed again and
    /// again, the mark would change each time, too.
    fn mark_full(&self, word: usize) {
        let upper = &self.full[word / BITS as usize];
        upper.fetch_or(bit(word), Ordering::SeqCst);
        step("word marked full");
        // Another process may have freed a number in the word before the mark was set, and so did
        // not clear the mark.
        if !self.is_full(word) {
            upper.fetch_and(!bit(word), Ordering::SeqCst);
        }
    }

    #[inline]
    fn count_frees(&self, epoch: u64, word: usize, change: u64) {
        step("number freed");
        let upper = &self.full[word / BITS as usize];
        if upper.load(Ordering::SeqCst) & bit(word) != 0 {
            upper.fetch_and(!bit(word), Ordering::SeqCst);
        }
        step("word marked not full");
        if (word as u32) < self.hint.load(Ordering::Relaxed) {
            self.hint.store(word as u32, Ordering::Relaxed);
        }
        self.count(epoch, change);
        step("free counted");
    }

    fn is_full(&self, word: usize) -> bool {
        !self.words[word].load(Ordering::SeqCst) & self.mask(word) == 0
    }

    /// Returns the bits of a word that are numbers: all of them, except in the last word.
    fn mask(&self, word: usize) -> u64 {
        match self.capacity - word as u32 * BITS {
            left if left < BITS => (1 << left) - 1,
            _ => u64::MAX,
        }
    }
}

/// Returns the upper bit of a word.
fn bit(word: usize) -> u64 {
    1 << (word % BITS as usize)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[derive(Default)]
    struct TestBitmap {
        words: Vec<AtomicU64>,
        full: Vec<AtomicU64>,
        count: AtomicU64,
        count_state: AtomicU32,
        hint: AtomicU32,
        capacity: u32,
    }

    impl TestBitmap {
        fn new(capacity: u32) -> Self {
            let words = capacity.div_ceil(BITS);
            let zeros = |count: u32| (0..count).map(|_| AtomicU64::new(0)).collect();
            Self {
                words: zeros(words),
                full: zeros(words.div_ceil(BITS)),
                capacity,
                ..Self::default()
            }
        }

        fn bitmap(&self) -> Bitmap<'_> {
            let Self {
                words,
                full,
                count,
                count_state,
                hint,
                capacity,
            } = self;
            Bitmap {
                words,
                full,
                count,
                count_state,
                hint,
                capacity: *capacity,
            }
        }
    }

    #[test]
    fn allocate_returns_each_number_once_in_order() {
        for capacity in [1, 63, 64, 65, 4096, 4097, 10_000] {
            let owned = TestBitmap::new(capacity);
            let bitmap = owned.bitmap();
            for id in 0..capacity {
                assert_eq!(bitmap.allocate(), Some(id));
            }
            assert_eq!(bitmap.allocate(), None);
            assert_eq!(bitmap.allocated(), capacity);
            for id in [capacity - 1, capacity / 2, 0] {
                assert!(bitmap.free(id));
                assert!(!bitmap.free(id));
                assert_eq!(bitmap.allocate(), Some(id), "the only one that is free");
            }
            bitmap.free_all();
            assert_eq!(bitmap.allocated(), 0);
            assert_eq!(bitmap.allocate(), Some(0));
        }
    }

    #[test]
    fn bitmap_behaves_like_a_set() {
        let owned = TestBitmap::new(9000);
        let bitmap = owned.bitmap();
        let mut set = BTreeSet::new();
        let mut random: u64 = 42;
        for _ in 0..200_000 {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let id = (random >> 33) as u32 % 9000;
            match random >> 61 {
                0..4 => match bitmap.allocate() {
                    Some(id) => assert!(set.insert(id)),
                    None => assert_eq!(set.len(), 9000),
                },
                4 => assert_eq!(bitmap.allocate_at(id), set.insert(id)),
                _ => assert_eq!(bitmap.free(id), set.remove(&id)),
            }
            assert_eq!(bitmap.allocated() as usize, set.len());
        }
    }

    #[test]
    fn wrong_state_after_kill_is_corrected() {
        let owned = TestBitmap::new(130);
        let bitmap = owned.bitmap();
        // A mark on a word that has room, and a hint to no word.
        owned.full[0].store(7, Ordering::SeqCst);
        owned.hint.store(77, Ordering::SeqCst);
        let all: BTreeSet<u32> = (0..130).map_while(|_| bitmap.allocate()).collect();
        assert_eq!(all.len(), 130);
        // A bit without its count.
        owned.words[1].fetch_and(!1, Ordering::SeqCst);
        owned.words[1].fetch_or(1, Ordering::SeqCst);
        owned.count.fetch_sub(1, Ordering::SeqCst);
        assert_eq!(bitmap.allocated(), 129);
        assert_eq!(bitmap.allocate(), None);
        assert_eq!(bitmap.allocated(), 130);
        // A count without its bit.
        owned.words[2].store(0, Ordering::SeqCst);
        assert_eq!(bitmap.available(), 0, "the count is not marked as stale");
        owned.count_state.store(1, Ordering::SeqCst);
        assert_eq!((bitmap.available(), bitmap.allocated()), (2, 128));
        assert_eq!(owned.count_state.load(Ordering::SeqCst), 0);
    }
}

#[cfg(all(loom, test))]
mod models {
    use std::sync::Arc;

    use loom::thread;

    use super::*;

    struct TestBitmap {
        words: [AtomicU64; 2],
        full: [AtomicU64; 1],
        count: AtomicU64,
        count_state: AtomicU32,
        hint: AtomicU32,
    }

    impl TestBitmap {
        /// Creates a table of 66 numbers, of which `free` are free.
        fn with_free(free: &[u32]) -> Arc<Self> {
            let mut words = [u64::MAX, 0b11];
            for id in free {
                words[(id / BITS) as usize] &= !(1 << (id % BITS));
            }
            let full = u64::from(words[0] == u64::MAX) | u64::from(words[1] == 0b11) << 1;
            Arc::new(Self {
                words: words.map(AtomicU64::new),
                full: [AtomicU64::new(full)],
                count: AtomicU64::new(66 - free.len() as u64),
                count_state: AtomicU32::new(0),
                hint: AtomicU32::new(0),
            })
        }

        fn bitmap(&self) -> Bitmap<'_> {
            let Self {
                words,
                full,
                count,
                count_state,
                hint,
            } = self;
            Bitmap {
                words,
                full,
                count,
                count_state,
                hint,
                capacity: 66,
            }
        }
    }

    #[test]
    fn loom_allocate_returns_no_number_twice() {
        loom::model(|| {
            let owned = TestBitmap::with_free(&[5, 64]);
            let other = thread::spawn({
                let owned = owned.clone();
                move || owned.bitmap().allocate()
            });
            let (mine, other) = (owned.bitmap().allocate(), other.join().unwrap());
            assert!(mine.is_some() && other.is_some() && mine != other);
            assert_eq!(owned.bitmap().allocated(), 66);
        });
    }

    #[test]
    fn loom_concurrent_recounts_keep_count_exact() {
        loom::model(|| {
            let owned = TestBitmap::with_free(&[64]);
            let other = thread::spawn({
                let owned = owned.clone();
                move || owned.bitmap().allocate()
            });
            let mine = owned.bitmap().allocate();
            let got = [mine, other.join().unwrap()];
            assert!(got == [Some(64), None] || got == [None, Some(64)]);
            assert!(owned.bitmap().free(64) && owned.bitmap().free(3));
            assert_eq!(owned.bitmap().allocated(), 64);
        });
    }

    #[test]
    fn loom_allocate_and_allocate_at_share_no_number() {
        loom::model(|| {
            let owned = TestBitmap::with_free(&[5, 64]);
            let other = thread::spawn({
                let owned = owned.clone();
                move || owned.bitmap().allocate_at(5)
            });
            let any = owned.bitmap().allocate();
            assert_eq!(other.join().unwrap(), any == Some(64));
            assert!(any == Some(5) || any == Some(64));
            let left = u32::from(any == Some(5));
            assert_eq!(owned.bitmap().allocate().is_some(), left == 1);
            assert_eq!(owned.bitmap().allocated(), 66);
        });
    }

    #[test]
    fn loom_freed_number_is_allocated_again() {
        loom::model(|| {
            let owned = TestBitmap::with_free(&[64]);
            let other = thread::spawn({
                let owned = owned.clone();
                move || assert!(owned.bitmap().free(3))
            });
            let first = owned.bitmap().allocate();
            assert!(first.is_some());
            other.join().unwrap();
            let second = owned.bitmap().allocate();
            assert!(second.is_some() && second != first);
            assert_eq!(owned.bitmap().allocate(), None);
            assert_eq!(owned.bitmap().allocated(), 66);
        });
    }
}
