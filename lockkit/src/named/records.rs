//! The records of the holders of all locks on sockets: one table for each user, and one for the machine.
//!
//! A record identifies the holder of a lock, or the process that died holding it (see
//! [`holder_record`](crate::base::holder_record)). The record excludes no process: a lost record is a lost report.
//!
//! # Guarantees
//! - The memory of a table is bounded by the number of locks that are held at once, plus 1 MiB for the records of dead
//!   holders. At 32 MiB further locks have no record.
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
//! A slot is 128 bytes: word 0, the words 1 to 11 of a record, and a copy. The copy has the words 1 to 3 (pid, start
//! time, namespace) of the previous record, if that holder died. It reports the death if the next holder is killed
//! while it writes.
//! ```text
//! word 0, bits 8 to 63   the key: a hash of the lock's name
//!         bits 2 to 7    changes with every write
//!         bits 0 to 1    CLEARED, WRITTEN, HANDED or CLAIMED
//! ```
//! A lock's slot is in the bucket of its key, in the lowest level whose bucket had room. A released lock leaves its key
//! in the slot until another lock takes the slot; the least recently used slot is taken first. So a handle that
//! remembers its slot finds it again without a search. A level is added when the buckets of all others are full of held
//! locks. From level 7 on, the record of a dead holder makes room, too.
//!
//! Only the holder of a lock writes a slot with the lock's key, and only after a search through all levels, so no key
//! has two slots. Two holders that take the same slot for different locks exchange word 0, and one exchange fails.
//!
//! The table of a user is mapped once in each process: its file is private, complete and in memory, so no other user
//! can shorten it under the mapping. Every user can write the table of the machine, so it is never mapped, but read and
//! written by system calls. There a flock on the file orders the processes that take a slot of another lock.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use crate::base::error::{Error, Result};
use crate::base::guard::Recovered;
use crate::base::holder_record::{self, ACQUIRED, IDENTITY, NAMESPACE, PID, PROGRAM, SUM, WORDS, Words};
use crate::base::owner::Owner;
use crate::base::runtime_dir::{self, RuntimeDir, Sharing};
use crate::sys::failpoint::step;
use crate::sys::fnv;
use crate::sys::fork::ForkGuarded;
use crate::sys::mapping::Mapping;
use crate::sys::process_local::ProcessLocal;
use crate::sys::{files, flock, tmpfile};

/// The file's name, with the version of the format.
const FILE: &str = "records-1";
const MAGIC: u64 = u64::from_ne_bytes(*b"lockkitR");
const WORD: usize = size_of::<u64>();
const PAGE: u64 = 4096;
const PAGE_WORDS: usize = PAGE as usize / WORD;
/// The words of the header: the magic, how many levels there are, and where the counters begin.
const LEVEL_COUNT: usize = 1;
const COUNTERS: usize = 256;

const SLOT: usize = 128;
const SLOT_WORDS: usize = SLOT / WORD;
const SLOTS_OF_A_PAGE: u32 = (PAGE as usize / SLOT) as u32;
const BUCKET: usize = 8;
/// The limit makes at most 262,112 records possible.
const MAX_LEVELS: u32 = 13;
/// From this level on, 1 MiB into the table, the record of a dead holder makes room.
const FIRST_EVICTING: u32 = 7;

/// The words of a dead holder's record that are kept until the next record is whole.
const COPIED: std::ops::RangeInclusive<usize> = PID..=NAMESPACE;

const KEY: u64 = !0xff;
const CHANGES: u64 = 0xfc;
const ONE_CHANGE: u64 = 4;
const STATE: u64 = 3;
/// The holder released, or there never was one.
const CLEARED: u64 = 0;
/// A holder holds the lock, or died holding it.
const WRITTEN: u64 = 1;
/// The lock is in flight to this holder, or this receiver died before it began.
const HANDED: u64 = 2;
/// A holder is writing the record, or died while writing.
const CLAIMED: u64 = 3;

/// Returns the key of the lock `name`: FNV-1a with its bits mixed.
fn key_of(name: &str) -> u64 {
    let mut key = fnv::of_bytes(name.as_bytes());
    key = (key ^ key >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    key ^= key >> 32;
    // Key 0 means that no lock has used the slot.
    (key & KEY).max(1 << KEY.trailing_zeros())
}

/// Returns word 0 for the next state of a slot whose word 0 is `seen`.
fn word_after(seen: u64, key: u64, state: u64) -> u64 {
    key | (seen.wrapping_add(ONE_CHANGE) & CHANGES) | state
}

/// The record of one lock, for a handle of the lock.
#[derive(Debug)]
pub(super) struct HolderRecord {
    records: Arc<Records>,
    key: u64,
    /// The last position of the lock's slot. 0, which is in the header, means none.
    slot: AtomicU32,
}

/// A slot and the words that were read from it.
#[derive(Clone, Copy)]
struct Seen {
    at: u32,
    words: Words,
}

impl Seen {
    fn state(&self) -> u64 {
        self.words[0] & STATE
    }

    fn is_of(&self, key: u64) -> bool {
        self.words[0] & KEY == key
    }
}

impl HolderRecord {
    pub(super) fn open(name: &str, sharing: Sharing) -> Result<Self> {
        Ok(Self { records: Records::of(sharing)?, key: key_of(name), slot: AtomicU32::new(0) })
    }

    /// Records that this process holds the lock. For a holder that bound the name, it returns the process that died
    /// holding the lock before. A holder that received the lock by a hand-over follows a holder that released.
    pub(super) fn take(&self, has_bound: bool) -> Option<Box<Recovered>> {
        let before = holder_record::with_current(|record| self.put(record, WRITTEN));
        step("holder recorded");
        let died = before.filter(|before| has_bound && before.is_of(self.key) && before.state() == WRITTEN)?;
        let owner = holder_record::owner_of(&died.words).or_else(|| copied(self.records.slot(died.at)?));
        Some(Box::new(Recovered::new(owner)))
    }

    /// Records that `owner` holds the lock: a process for which this process has acquired it.
    pub(super) fn name(&self, owner: &Owner) {
        self.put(&holder_record::encode(owner), WRITTEN);
    }

    /// Records that the lock is about to be handed over to the process of this record.
    pub(super) fn hand_to(&self, record: &Words) {
        self.put(record, HANDED);
        step("receiver recorded");
    }

    /// Records that no process holds the lock. If the record stayed, the next owner would get a false report of a
    /// death.
    pub(super) fn clear(&self) {
        if let Some((slot, word)) = self.remembered_word() {
            if word & STATE != CLEARED {
                // No other process changes the slot, not even for a new lock, because this holder lives.
                slot[0].store(word_after(word, self.key, CLEARED), Ordering::Release);
            }
            return;
        }
        // A process that has written a slot may write it again.
        let known = self.remembered();
        let found = || self.records.locate(self.key, false).filter(|seen| self.records.may_write(seen.at));
        if let Some(seen) = known.or_else(found).filter(|seen| seen.state() != CLEARED) {
            self.records.clear(&seen);
        }
    }

    /// Returns the holder from the record, or the process that died holding the lock.
    pub(super) fn holder(&self) -> Option<Owner> {
        /// A record is written in less time. The reader does not wait for a writer that is stopped in between.
        const TRIES: usize = 100;
        for _ in 0..TRIES {
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

    /// Returns how often waiters of this lock, and of some others, have queued up so far, and `None` without shared
    /// memory for the count.
    pub(super) fn waits(&self) -> Option<u64> {
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
        match &self.records.store {
            Store::Mapped { header, .. } => header.words().get(COUNTERS + (self.key >> 56) as usize),
            Store::File(_) => None,
        }
    }

    /// Returns the lock's slot.
    fn find(&self) -> Option<Seen> {
        self.remembered().or_else(|| self.records.locate(self.key, false))
    }

    /// Returns the lock's slot at its last position.
    fn remembered(&self) -> Option<Seen> {
        let at = self.slot.load(Ordering::Relaxed);
        let mut words = [[0; WORDS]];
        (at != 0).then(|| self.records.read(at, &mut words)).flatten()?;
        Some(Seen { at, words: words[0] }).filter(|seen| seen.is_of(self.key))
    }

    /// Returns the slot and its word 0, like [`remembered`](Self::remembered), for a mapped table.
    #[inline]
    fn remembered_word(&self) -> Option<(&[AtomicU64], u64)> {
        let slot = self.records.slot(self.slot.load(Ordering::Relaxed))?;
        let word = slot[0].load(Ordering::Acquire);
        (word & KEY == self.key).then_some((slot, word))
    }

    /// Writes `record` into the lock's slot, or takes a slot for it. Returns the previous content, also if writing
    /// fails.
    fn put(&self, record: &Words, state: u64) -> Option<Seen> {
        /// The number of times that another lock may take the slot first; then this lock has no record.
        const TRIES: usize = 16;
        let mut seen = None;
        if let Some((slot, word)) = self.remembered_word().filter(|(_, word)| word & STATE == CLEARED) {
            if write_slot(slot, word, word_after(word, self.key, state), record) {
                return None;
            }
        }
        for _ in 0..TRIES {
            let mut order = None;
            let found = match self.remembered() {
                Some(found) => found,
                None => {
                    order = self.records.order_claims();
                    self.records.locate(self.key, true).filter(|found| self.records.may_write(found.at))?
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

/// A table of records.
#[derive(Debug)]
struct Records {
    sharing: Sharing,
    base: Option<&'static str>,
    path: PathBuf,
    /// Device and inode of the file.
    file: (u64, u64),
    /// When the path was last seen to lead to the file, from [`holder_record::now`].
    checked: AtomicU64,
    store: Store,
}

// A process usually has only one of them.
#[allow(clippy::large_enum_variant)]
#[derive(Debug)]
enum Store {
    /// In shared memory. Each level is mapped at its first use.
    Mapped { header: Mapping, levels: [OnceLock<Mapping>; MAX_LEVELS as usize] },
    /// Accessed by system calls.
    File(Opened),
}

/// A descriptor of the table's file. A program may close descriptors that it did not open; then the file is opened
/// again.
#[derive(Debug)]
struct Opened {
    file: ForkGuarded<File>,
    again: OnceLock<Box<Opened>>,
}

impl Opened {
    fn new(file: File) -> Self {
        let Ok(file) = ForkGuarded::new(|| Ok::<_, Infallible>(file));
        Self { file: file.know().keep_across_fork(), again: OnceLock::new() }
    }

    /// Returns the descriptor that was opened last.
    fn last(&self) -> &Self {
        std::iter::successors(Some(self), |opened| opened.again.get().map(Box::as_ref)).last().unwrap_or(self)
    }
}

/// Opens the file of the table below `base`, or in the directory of the file backend.
fn open_file(base: Option<&str>, sharing: Sharing) -> Result<(RuntimeDir, File)> {
    let directory =
        base.map_or_else(|| runtime_dir::open(sharing), |base| runtime_dir::open_in(base.as_ref(), sharing))?;
    let file = directory.open_file(FILE)?;
    Ok((directory, file))
}

fn identity(file: &std::fs::Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

impl Records {
    /// Returns the table for `sharing`, which this process opens once: in memory, or in the directory of the file
    /// backend if memory cannot be used. A deleted file is opened again.
    fn of(sharing: Sharing) -> Result<Arc<Self>> {
        /// A forked child has its own value, because it may have inherited the mutex locked.
        static OPENED: ProcessLocal<Mutex<Vec<Arc<Records>>>> = ProcessLocal::new();
        let mut opened = OPENED.get_or_make(Mutex::default).lock();
        opened.retain(|records| records.sharing != sharing || records.is_there());
        if let Some(records) = opened.iter().find(|records| records.sharing == sharing) {
            return Ok(records.clone());
        }
        let records = Self::open(Some("/dev/shm"), sharing).or_else(|_| Self::open(None, sharing)).map(Arc::new)?;
        opened.push(records.clone());
        Ok(records)
    }

    fn open(base: Option<&'static str>, sharing: Sharing) -> Result<Self> {
        let (directory, file) = open_file(base, sharing)?;
        let path = directory.file(FILE);
        let failed = |error| Error::io("look at", &path, error);
        let found = file.metadata().map_err(failed)?;
        let private = matches!(sharing, Sharing::User(_));
        let mapped = || {
            is_complete(&file, found.len(), 2 * PAGE).then_some(())?;
            let header = Mapping::new(&file, 0, PAGE_WORDS).ok()?;
            let found = header.words()[0].compare_exchange(0, MAGIC, Ordering::AcqRel, Ordering::Acquire);
            matches!(found, Ok(_) | Err(MAGIC)).then_some(())?;
            header.words()[LEVEL_COUNT].fetch_max(1, Ordering::AcqRel);
            Some(Store::Mapped { header, levels: [const { OnceLock::new() }; MAX_LEVELS as usize] })
        };
        let file_id = identity(&found);
        let store = if private && tmpfile::is_in_memory(&file) { mapped() } else { None };
        let store = match store {
            Some(store) => store,
            // System calls must not write a mapped table: they would not see the exchanges of word 0.
            None if private && tmpfile::is_in_memory(&file) => {
                return Err(failed(std::io::ErrorKind::InvalidData.into()));
            }
            None => Store::File(Opened::new(file)),
        };
        Ok(Self { sharing, base, path, file: file_id, checked: AtomicU64::new(holder_record::now()), store })
    }

    /// Returns whether the path still leads to the file, as of at most 10 ms ago.
    fn is_there(&self) -> bool {
        const RECHECK_INTERVAL: Duration = Duration::from_millis(10);
        let now = holder_record::now();
        let age = now.abs_diff(self.checked.load(Ordering::Relaxed));
        if u128::from(age) < RECHECK_INTERVAL.as_nanos() {
            return true;
        }
        self.checked.store(now, Ordering::Relaxed);
        std::fs::metadata(&self.path).is_ok_and(|found| identity(&found) == self.file)
    }

    fn levels(&self) -> Option<u32> {
        match &self.store {
            Store::Mapped { header, .. } => {
                let levels = header.words()[LEVEL_COUNT].load(Ordering::Acquire);
                Some(u32::try_from(levels).map_or(MAX_LEVELS, |levels| levels.clamp(1, MAX_LEVELS)))
            }
            Store::File(opened) => {
                let found = match opened.last().file.metadata() {
                    Ok(found) if identity(&found) == self.file => found,
                    // Another error does not show that the descriptor was closed.
                    Err(error) if Errno::from_io_error(&error) != Some(Errno::BADF) => return None,
                    _ => self.open_again(opened)?,
                };
                Some((1..MAX_LEVELS).find(|level| found.len() <= PAGE << level).unwrap_or(MAX_LEVELS))
            }
        }
    }

    /// Returns the file's metadata if the descriptor is still the table's: a program may have closed it, and opened
    /// another file. A slot with the lock's key proves the same, so nothing is written through a descriptor of another
    /// file.
    fn looked_at(&self, file: &File) -> Option<std::fs::Metadata> {
        file.metadata().ok().filter(|found| identity(found) == self.file)
    }

    /// Opens the file through another descriptor, if the path still leads to it.
    #[cold]
    fn open_again(&self, opened: &Opened) -> Option<std::fs::Metadata> {
        let (_, file) = open_file(self.base, self.sharing).ok()?;
        let found = self.looked_at(&file)?;
        // Another thread may have set it first.
        let _ = opened.last().again.set(Box::new(Opened::new(file)));
        Some(found)
    }

    /// Returns the memory of an existing level of the table.
    fn level(&self, level: u32) -> Option<&Mapping> {
        let Store::Mapped { levels, .. } = &self.store else { return None };
        let mapped = levels.get(level as usize)?;
        if let Some(mapped) = mapped.get() {
            return Some(mapped);
        }
        let (_, file) = open_file(self.base, self.sharing).ok()?;
        self.looked_at(&file)?;
        let mapping = Mapping::new(&file, PAGE << level, PAGE_WORDS << level).ok()?;
        Some(mapped.get_or_init(|| mapping))
    }

    /// Returns the words of the slot `at` in memory.
    fn slot(&self, at: u32) -> Option<&[AtomicU64]> {
        let level = (at / SLOTS_OF_A_PAGE).checked_ilog2()?;
        let first = (at - (SLOTS_OF_A_PAGE << level)) as usize * SLOT_WORDS;
        self.level(level)?.words().get(first..first + SLOT_WORDS)
    }

    /// Reads the slots from `at` on.
    fn read<const N: usize>(&self, at: u32, into: &mut [Words; N]) -> Option<()> {
        match &self.store {
            Store::Mapped { .. } => {
                for (at, words) in (at..).zip(into) {
                    read_slot(self.slot(at)?, words);
                }
            }
            Store::File(opened) => {
                let file = &opened.last().file;
                let mut slots = [[0; SLOT]; N];
                // A part that the file does not have yet reads as zeros. A local file is read up to its end in one
                // call. A record that was not read completely has a wrong sum.
                while let Err(error) = file.read_at(slots.as_flattened_mut(), u64::from(at) * SLOT as u64) {
                    if error.kind() != std::io::ErrorKind::Interrupted {
                        return None;
                    }
                }
                for (words, bytes) in into.iter_mut().zip(&slots) {
                    for (word, bytes) in words[..=ACQUIRED].iter_mut().zip(bytes.chunks_exact(WORD)) {
                        *word = u64::from_ne_bytes(std::array::from_fn(|at| bytes[at]));
                    }
                }
            }
        }
        Some(())
    }

    /// Returns the slot of the lock with this key. If there is none and `to_claim` is set, it returns a slot that the
    /// lock can take.
    fn locate(&self, key: u64, to_claim: bool) -> Option<Seen> {
        let mut vacant = None;
        let mut living = holder_record::Living::default();
        let levels = self.levels()?;
        for level in 0..levels {
            let first = bucket_of(key, level);
            let mut words = [[0; WORDS]; BUCKET];
            // A level that cannot be read may have the slot, so no slot may be taken in another level.
            self.read(first, &mut words)?;
            let bucket = || (first..).zip(&words).map(|(at, words)| Seen { at, words: *words });
            if let Some(found) = bucket().find(|seen| seen.is_of(key)) {
                return Some(found);
            }
            if to_claim && vacant.is_none() {
                let age = |seen: &Seen| seen.words[ACQUIRED];
                vacant = bucket().filter(|seen| seen.state() == CLEARED).min_by_key(age);
                if vacant.is_none() && level >= FIRST_EVICTING {
                    vacant = bucket().filter(|seen| is_left(seen, &mut living)).min_by_key(age);
                }
            }
        }
        if to_claim && vacant.is_none() {
            vacant = self.grow(levels).map(|()| Seen { at: bucket_of(key, levels), words: [0; WORDS] });
        }
        vacant
    }

    /// Adds a level.
    #[cold]
    fn grow(&self, level: u32) -> Option<()> {
        (level < MAX_LEVELS).then_some(())?;
        // A file grows when it is written.
        let Store::Mapped { header, .. } = &self.store else { return Some(()) };
        let (_, file) = open_file(self.base, self.sharing).ok()?;
        let found = self.looked_at(&file)?;
        is_complete(&file, found.len(), PAGE << (level + 1)).then_some(())?;
        header.words()[LEVEL_COUNT].fetch_max(u64::from(level) + 1, Ordering::AcqRel);
        Some(())
    }

    /// Orders the processes that take a slot of another lock, until the returned file is dropped. Only the file store
    /// needs it, because it has no exchange. It waits only briefly, because another user may keep the lock; then two
    /// processes may take the same slot, and one of them has no record.
    fn order_claims(&self) -> Option<File> {
        const TRIES: usize = 20;
        const PAUSE: Duration = Duration::from_micros(50);
        let Store::File(_) = &self.store else { return None };
        // If the file has been replaced, there is nothing to order.
        let file =
            OpenOptions::new().read(true).custom_flags(files::NOFOLLOW | files::NONBLOCK).open(&self.path).ok()?;
        for _ in 0..TRIES {
            if flock::try_lock(&file, flock::Mode::Exclusive).ok()? {
                return Some(file);
            }
            std::thread::sleep(PAUSE);
        }
        None
    }

    /// Returns whether this process may write the slot `at`. It is checked once for each slot and not at each write,
    /// which would cost a machine-wide lock a tenth of its cycle.
    fn may_write(&self, at: u32) -> bool {
        matches!(self.store, Store::Mapped { .. }) || may_reach(u64::from(at + 1) * SLOT as u64)
    }

    /// Writes a record into a slot, unless the slot has changed since it was read.
    fn write(&self, seen: &Seen, key: u64, state: u64, record: &Words) -> bool {
        let before = seen.words[0];
        let word = word_after(before, key, state);
        match &self.store {
            Store::Mapped { .. } => self.slot(seen.at).is_some_and(|slot| write_slot(slot, before, word, record)),
            Store::File(opened) => {
                let mut bytes = [0; (ACQUIRED + 1) * WORD];
                let words = [word].into_iter().chain(record[IDENTITY.start..ACQUIRED].iter().copied());
                for (bytes, word) in bytes.chunks_exact_mut(WORD).zip(words.chain([holder_record::now()])) {
                    bytes.copy_from_slice(&word.to_ne_bytes());
                }
                opened.last().file.write_all_at(&bytes, u64::from(seen.at) * SLOT as u64).is_ok()
            }
        }
    }

    fn clear(&self, seen: &Seen) {
        let before = seen.words[0];
        let word = word_after(before, before & KEY, CLEARED);
        match &self.store {
            Store::Mapped { .. } => {
                if let Some(slot) = self.slot(seen.at) {
                    let _ = slot[0].compare_exchange(before, word, Ordering::AcqRel, Ordering::Relaxed);
                }
            }
            Store::File(opened) => {
                let file = &opened.last().file;
                let at = u64::from(seen.at) * SLOT as u64;
                if file.write_all_at(&word.to_ne_bytes(), at).is_err() {
                    step("record not cleared");
                    // A punched hole reads as zeros, takes no room and meets no limit of sizes.
                    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    let _ = fallocate(&**file, flags, at, WORD as u64);
                }
            }
        }
    }

    /// Returns the holders of all locks, by the keys of the locks.
    fn holders(&self) -> HashMap<u64, Owner> {
        let mut holders = HashMap::new();
        for first in (SLOTS_OF_A_PAGE..SLOTS_OF_A_PAGE << self.levels().unwrap_or_default()).step_by(BUCKET) {
            let mut bucket = [[0; WORDS]; BUCKET];
            if self.read(first, &mut bucket).is_none() {
                continue;
            }
            for words in bucket.iter().filter(|words| [WRITTEN, HANDED].contains(&(words[0] & STATE))) {
                holders.extend(holder_record::owner_of(words).map(|owner| (words[0] & KEY, owner)));
            }
        }
        holders
    }
}

/// The holders of all locks according to their records, for a list.
pub(super) struct Holders(HashMap<u64, Owner>);

impl Holders {
    pub(super) fn read(sharing: Sharing) -> Self {
        Self(Records::of(sharing).map(|records| records.holders()).unwrap_or_default())
    }

    pub(super) fn of(&mut self, name: &str) -> Option<Owner> {
        self.0.remove(&key_of(name))
    }
}

/// Writes a record into a slot, with this word 0, if word 0 is still `before`.
#[inline]
fn write_slot(slot: &[AtomicU64], before: u64, word: u64, record: &Words) -> bool {
    // A holder that dies while it writes has not begun. But if it follows a holder that died, that death must still be
    // reported. A releasing holder that dies while it writes its receiver has released: the receiver lives.
    let follows_death = (before ^ word) & (KEY | STATE) == 0 && word & STATE == WRITTEN;
    let meanwhile = if follows_death { word } else { word | CLAIMED };
    if slot[0].compare_exchange(before, meanwhile, Ordering::AcqRel, Ordering::Relaxed).is_err() {
        return false;
    }
    if follows_death {
        copy(slot);
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

/// Copies the identity of a dead holder before its record is overwritten. If the record is not whole, a holder that
/// also died was overwriting it, and the copy exists already.
#[cold]
fn copy(slot: &[AtomicU64]) {
    let record: Words = std::array::from_fn(|at| slot[at].load(Ordering::Relaxed));
    if record[SUM] == holder_record::sum(&record) {
        for (at, copy) in COPIED.zip(&slot[ACQUIRED + 1..]) {
            copy.store(record[at], Ordering::Relaxed);
        }
    }
}

/// Returns the dead holder whose record was being overwritten.
fn copied(slot: &[AtomicU64]) -> Option<Owner> {
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
fn read_slot(slot: &[AtomicU64], words: &mut Words) {
    const TRIES: usize = 100;
    for _ in 0..TRIES {
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
fn bucket_of(key: u64, level: u32) -> u32 {
    let buckets = u64::from(SLOTS_OF_A_PAGE << level) / BUCKET as u64;
    (SLOTS_OF_A_PAGE << level) + ((key >> 8) & (buckets - 1)) as u32 * BUCKET as u32
}

/// Returns whether the holder of a record is dead.
#[cold]
fn is_left(seen: &Seen, living: &mut holder_record::Living) -> bool {
    holder_record::owner_of(&seen.words).is_some_and(|owner| !living.has(&owner))
}

/// Returns whether the file, which was `length` bytes long, has memory for `bytes` bytes, and reserves them if not.
fn is_complete(file: &File, length: u64, bytes: u64) -> bool {
    if length >= bytes {
        return true;
    }
    let is_reserved = may_reach(bytes) && fallocate(file, FallocateFlags::empty(), 0, bytes).is_ok();
    step("room for records reserved");
    is_reserved
}

/// Returns whether this process may write a file up to this length. Beyond its limit of file sizes the kernel would
/// kill it (`SIGXFSZ`).
fn may_reach(length: u64) -> bool {
    getrlimit(Resource::Fsize).current.is_none_or(|most| length <= most)
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn record_killed_in_overwriting_reports_the_first_death() {
        let slot = [const { AtomicU64::new(0) }; SLOT_WORDS];
        let key = key_of("lock");
        let record = |pid| {
            let mut owner = Owner::current();
            owner.pid = pid;
            holder_record::encode(&owner)
        };
        let words = || -> Words { std::array::from_fn(|at| slot[at].load(Ordering::Relaxed)) };
        assert!(write_slot(&slot, 0, word_after(0, key, WRITTEN), &record(7)));
        assert_eq!(holder_record::owner_of(&words()).unwrap().pid(), 7);
        for _ in 0..2 {
            // The writer follows a death, and is killed after it has written one word.
            copy(&slot);
            slot[IDENTITY.start].store(8, Ordering::Relaxed);
            assert_eq!(holder_record::owner_of(&words()), None);
            assert_eq!(copied(&slot).unwrap().pid(), 7);
        }
        let before = slot[0].load(Ordering::Relaxed);
        assert!(write_slot(&slot, before, word_after(before, key, WRITTEN), &record(9)));
        assert_eq!(holder_record::owner_of(&words()).unwrap().pid(), 9);
    }

    #[test]
    fn names_have_different_keys() {
        let keys: std::collections::HashSet<u64> =
            (0..100_000).map(|number| key_of(&format!("lock-{number}"))).collect();
        assert_eq!(keys.len(), 100_000);
        assert!(!keys.contains(&0));
    }
}
