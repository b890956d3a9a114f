//! The table of records: its file, its levels, and the search for a slot.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use super::slot::*;
use crate::base::error::{Error, Result};
use crate::base::holder_record::{self, ACQUIRED, IDENTITY, WORDS, Words};
use crate::base::owner::Owner;
use crate::base::runtime_dir::{self, RuntimeDir, Sharing};
use crate::sys::failpoint::step;
use crate::sys::file_id::{self, FileId};
use crate::sys::fork::ForkGuarded;
use crate::sys::mapping::Mapping;
use crate::sys::process_local::ProcessLocal;
use crate::sys::{files, flock, tmpfile};

/// The file's name, with the version of the format.
const FILE: &str = "records-1";
const MAGIC: u64 = u64::from_ne_bytes(*b"lockkitR");
const PAGE_WORDS: usize = PAGE as usize / WORD;
/// The words of the header: the magic, how many levels there are, and where the counters begin.
const LEVEL_COUNT: usize = 1;
const COUNTERS: usize = 256;

/// A table of records.
#[derive(Debug)]
pub(super) struct Records {
    sharing: Sharing,
    base: Option<&'static str>,
    path: PathBuf,
    /// Device and inode of the file.
    file: FileId,
    /// When the path was last seen to lead to the file, from [`holder_record::now`].
    checked: AtomicU64,
    store: Store,
}

// A process usually has only one of them.
#[allow(clippy::large_enum_variant)]
#[derive(Debug)]
enum Store {
    /// In shared memory. Each level is mapped at its first use.
    Mapped {
        header: Mapping,
        levels: [OnceLock<Mapping>; MAX_LEVELS as usize],
    },
    /// Accessed by system calls.
    File(Opened),
}

/// A descriptor of the table's file. A program may close descriptors that it did not open; then the
/// file is opened again.
#[derive(Debug)]
struct Opened {
    file: ForkGuarded<File>,
    reopened: OnceLock<Box<Opened>>,
}

impl Opened {
    fn new(file: File) -> Self {
        let Ok(file) = ForkGuarded::new(|| Ok::<_, Infallible>(file));
        Self {
            file: file.know().keep_across_fork(),
            reopened: OnceLock::new(),
        }
    }

    /// Returns the descriptor that was opened last.
    fn last(&self) -> &Self {
        std::iter::successors(Some(self), |opened| opened.reopened.get().map(Box::as_ref))
            .last()
            .unwrap_or(self)
    }
}

/// Opens the file of the table below `base`, or in the directory of the file backend.
fn open_file(base: Option<&str>, sharing: Sharing) -> Result<(RuntimeDir, File)> {
    let directory = base.map_or_else(
        || runtime_dir::open(sharing),
        |base| runtime_dir::open_in(base.as_ref(), sharing),
    )?;
    let file = directory.open_file(FILE)?;
    Ok((directory, file))
}

impl Records {
    /// Returns the table for `sharing`, which this process opens once: in memory, or in the
    /// directory of the file backend if memory cannot be used. A deleted file is opened again.
    pub(super) fn of(sharing: Sharing) -> Result<Arc<Self>> {
        /// A forked child has its own value, because it may have inherited the mutex locked.
        static OPENED: ProcessLocal<Mutex<Vec<Arc<Records>>>> = ProcessLocal::new();
        let mut opened = OPENED.get_or_make(Mutex::default).lock();
        opened.retain(|records| records.sharing != sharing || records.is_current_file());
        if let Some(records) = opened.iter().find(|records| records.sharing == sharing) {
            return Ok(records.clone());
        }
        let records = Self::open(Some("/dev/shm"), sharing)
            .or_else(|_| Self::open(None, sharing))
            .map(Arc::new)?;
        opened.push(records.clone());
        Ok(records)
    }

    fn open(base: Option<&'static str>, sharing: Sharing) -> Result<Self> {
        let (directory, file) = open_file(base, sharing)?;
        let path = directory.file(FILE);
        let failed = |error| Error::io("inspect", &path, error);
        let found = file.metadata().map_err(failed)?;
        let private = matches!(sharing, Sharing::User(_));
        let mapped = || {
            is_complete(&file, found.len(), 2 * PAGE).then_some(())?;
            let header = Mapping::new(&file, 0, PAGE_WORDS).ok()?;
            let found =
                header.words()[0].compare_exchange(0, MAGIC, Ordering::AcqRel, Ordering::Acquire);
            matches!(found, Ok(_) | Err(MAGIC)).then_some(())?;
            header.words()[LEVEL_COUNT].fetch_max(1, Ordering::AcqRel);
            Some(Store::Mapped {
                header,
                levels: [const { OnceLock::new() }; MAX_LEVELS as usize],
            })
        };
        let file_id = file_id::of(&found);
        let store = if private && tmpfile::is_in_memory(&file) {
            mapped()
        } else {
            None
        };
        let store = match store {
            Some(store) => store,
            // System calls must not write a mapped table: they would not see the exchanges of word
            // 0.
            None if private && tmpfile::is_in_memory(&file) => {
                return Err(failed(std::io::ErrorKind::InvalidData.into()));
            }
            None => Store::File(Opened::new(file)),
        };
        Ok(Self {
            sharing,
            base,
            path,
            file: file_id,
            checked: AtomicU64::new(holder_record::now()),
            store,
        })
    }

    /// Returns whether the path still leads to the file, as of at most 10 ms ago.
    fn is_current_file(&self) -> bool {
        const RECHECK_INTERVAL: Duration = Duration::from_millis(10);
        let now = holder_record::now();
        let age = now.abs_diff(self.checked.load(Ordering::Relaxed));
        if u128::from(age) < RECHECK_INTERVAL.as_nanos() {
            return true;
        }
        self.checked.store(now, Ordering::Relaxed);
        std::fs::metadata(&self.path).is_ok_and(|found| file_id::of(&found) == self.file)
    }

    /// Returns the counter of waiters of the lock with this key, and of some others. Only a mapped
    /// table has counters.
    pub(super) fn waiter_counter(&self, key: u64) -> Option<&AtomicU64> {
        match &self.store {
            Store::Mapped { header, .. } => header.words().get(COUNTERS + (key >> 56) as usize),
            Store::File(_) => None,
        }
    }

    fn levels(&self) -> Option<u32> {
        match &self.store {
            Store::Mapped { header, .. } => {
                let levels = header.words()[LEVEL_COUNT].load(Ordering::Acquire);
                Some(u32::try_from(levels).map_or(MAX_LEVELS, |levels| levels.clamp(1, MAX_LEVELS)))
            }
            Store::File(opened) => {
                let found = match opened.last().file.metadata() {
                    Ok(found) if file_id::of(&found) == self.file => found,
                    // Another error does not show that the descriptor was closed.
                    Err(error) if Errno::from_io_error(&error) != Some(Errno::BADF) => return None,
                    _ => self.reopen(opened)?,
                };
                Some(
                    (1..MAX_LEVELS)
                        .find(|level| found.len() <= PAGE << level)
                        .unwrap_or(MAX_LEVELS),
                )
            }
        }
    }

    /// Returns the file's metadata if the descriptor is still the table's: a program may have
    /// closed it, and opened another file. A slot with the lock's key proves the same, so nothing
    /// is written through a descriptor of another file.
    fn metadata_if_current(&self, file: &File) -> Option<std::fs::Metadata> {
        file.metadata()
            .ok()
            .filter(|found| file_id::of(found) == self.file)
    }

    /// Opens the file through another descriptor, if the path still leads to it.
    #[cold]
    fn reopen(&self, opened: &Opened) -> Option<std::fs::Metadata> {
        let (_, file) = open_file(self.base, self.sharing).ok()?;
        let found = self.metadata_if_current(&file)?;
        // Another thread may have set it first.
        let _ = opened.last().reopened.set(Box::new(Opened::new(file)));
        Some(found)
    }

    /// Returns the memory of an existing level of the table.
    fn level(&self, level: u32) -> Option<&Mapping> {
        let Store::Mapped { levels, .. } = &self.store else {
            return None;
        };
        let mapped = levels.get(level as usize)?;
        if let Some(mapped) = mapped.get() {
            return Some(mapped);
        }
        let (_, file) = open_file(self.base, self.sharing).ok()?;
        self.metadata_if_current(&file)?;
        let mapping = Mapping::new(&file, PAGE << level, PAGE_WORDS << level).ok()?;
        Some(mapped.get_or_init(|| mapping))
    }

    /// Returns the words of the slot `at` in memory.
    pub(super) fn slot(&self, at: u32) -> Option<&[AtomicU64]> {
        let level = (at / SLOTS_OF_A_PAGE).checked_ilog2()?;
        let first = (at - (SLOTS_OF_A_PAGE << level)) as usize * SLOT_WORDS;
        self.level(level)?.words().get(first..first + SLOT_WORDS)
    }

    /// Reads the slots from `at` on.
    pub(super) fn read<const N: usize>(&self, at: u32, into: &mut [Words; N]) -> Option<()> {
        match &self.store {
            Store::Mapped { .. } => {
                for (at, words) in (at..).zip(into) {
                    read_slot(self.slot(at)?, words);
                }
            }
            Store::File(opened) => {
                let file = &opened.last().file;
                let mut slots = [[0; SLOT]; N];
                // A part that the file does not have yet reads as zeros. A local file is read up to
                // its end in one call. A record that was not read completely has a wrong sum.
                while let Err(error) =
                    file.read_at(slots.as_flattened_mut(), u64::from(at) * SLOT as u64)
                {
                    if error.kind() != std::io::ErrorKind::Interrupted {
                        return None;
                    }
                }
                for (words, bytes) in into.iter_mut().zip(&slots) {
                    for (word, bytes) in words[..=ACQUIRED].iter_mut().zip(bytes.chunks_exact(WORD))
                    {
                        *word = u64::from_ne_bytes(std::array::from_fn(|at| bytes[at]));
                    }
                }
            }
        }
        Some(())
    }

    /// Returns the slot of the lock with this key. If there is none and `to_claim` is set, it
    /// returns a slot that the lock can take.
    pub(super) fn locate(&self, key: u64, to_claim: bool) -> Option<SlotContent> {
        let mut vacant = None;
        let mut living = holder_record::LivenessCache::default();
        let levels = self.levels()?;
        for level in 0..levels {
            let first = bucket_of(key, level);
            let mut words = [[0; WORDS]; BUCKET];
            // A level that cannot be read may have the slot, so no slot may be taken in another
            // level.
            self.read(first, &mut words)?;
            let bucket = || {
                (first..)
                    .zip(&words)
                    .map(|(at, words)| SlotContent { at, words: *words })
            };
            if let Some(found) = bucket().find(|seen| seen.is_of(key)) {
                return Some(found);
            }
            if to_claim && vacant.is_none() {
                let age = |seen: &SlotContent| seen.words[ACQUIRED];
                vacant = bucket()
                    .filter(|seen| seen.state() == CLEARED)
                    .min_by_key(age);
                if vacant.is_none() && level >= FIRST_EVICTING_LEVEL {
                    vacant = bucket()
                        .filter(|seen| is_of_dead_holder(seen, &mut living))
                        .min_by_key(age);
                }
            }
        }
        if to_claim && vacant.is_none() {
            vacant = self.grow(levels).map(|()| SlotContent {
                at: bucket_of(key, levels),
                words: [0; WORDS],
            });
        }
        vacant
    }

    /// Adds a level.
    #[cold]
    fn grow(&self, level: u32) -> Option<()> {
        (level < MAX_LEVELS).then_some(())?;
        // A file grows when it is written.
        let Store::Mapped { header, .. } = &self.store else {
            return Some(());
        };
        let (_, file) = open_file(self.base, self.sharing).ok()?;
        let found = self.metadata_if_current(&file)?;
        is_complete(&file, found.len(), PAGE << (level + 1)).then_some(())?;
        header.words()[LEVEL_COUNT].fetch_max(u64::from(level) + 1, Ordering::AcqRel);
        Some(())
    }

    /// Orders the processes that take a slot of another lock, until the returned file is dropped.
    /// Only the file store needs it, because it has no exchange. It waits only briefly, because
    /// another user may keep the lock; then two processes may take the same slot, and one of them
    /// has no record.
    pub(super) fn order_claims(&self) -> Option<File> {
        const MAX_TRIES: usize = 20;
        const RETRY_INTERVAL: Duration = Duration::from_micros(50);
        let Store::File(_) = &self.store else {
            return None;
        };
        // If the file has been replaced, there is nothing to order.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(files::NOFOLLOW | files::NONBLOCK)
            .open(&self.path)
            .ok()?;
        for _ in 0..MAX_TRIES {
            if flock::try_lock(&file, flock::Mode::Exclusive).ok()? {
                return Some(file);
            }
            std::thread::sleep(RETRY_INTERVAL);
        }
        None
    }

    /// Returns whether this process may write the slot `at`. It is checked once for each slot and
    /// not at each write, which would cost a machine-wide lock a tenth of its cycle.
    pub(super) fn may_write(&self, at: u32) -> bool {
        matches!(self.store, Store::Mapped { .. }) || may_reach(u64::from(at + 1) * SLOT as u64)
    }

    /// Writes a record into a slot, unless the slot has changed since it was read.
    pub(super) fn write(&self, seen: &SlotContent, key: u64, state: u64, record: &Words) -> bool {
        let before = seen.words[0];
        let word = word_after(before, key, state);
        match &self.store {
            Store::Mapped { .. } => self
                .slot(seen.at)
                .is_some_and(|slot| write_slot(slot, before, word, record)),
            Store::File(opened) => {
                let mut bytes = [0; (ACQUIRED + 1) * WORD];
                let words = [word]
                    .into_iter()
                    .chain(record[IDENTITY.start..ACQUIRED].iter().copied());
                for (bytes, word) in bytes
                    .chunks_exact_mut(WORD)
                    .zip(words.chain([holder_record::now()]))
                {
                    bytes.copy_from_slice(&word.to_ne_bytes());
                }
                opened
                    .last()
                    .file
                    .write_all_at(&bytes, u64::from(seen.at) * SLOT as u64)
                    .is_ok()
            }
        }
    }

    pub(super) fn clear(&self, seen: &SlotContent) {
        let before = seen.words[0];
        let word = word_after(before, before & KEY, CLEARED);
        match &self.store {
            Store::Mapped { .. } => {
                if let Some(slot) = self.slot(seen.at) {
                    let _ =
                        slot[0].compare_exchange(before, word, Ordering::AcqRel, Ordering::Relaxed);
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
    pub(super) fn holders(&self) -> HashMap<u64, Owner> {
        let mut holders = HashMap::new();
        for first in
            (SLOTS_OF_A_PAGE..SLOTS_OF_A_PAGE << self.levels().unwrap_or_default()).step_by(BUCKET)
        {
            let mut bucket = [[0; WORDS]; BUCKET];
            if self.read(first, &mut bucket).is_none() {
                continue;
            }
            for words in bucket
                .iter()
                .filter(|words| [WRITTEN, HANDED].contains(&(words[0] & STATE)))
            {
                holders.extend(holder_record::owner_of(words).map(|owner| (words[0] & KEY, owner)));
            }
        }
        holders
    }
}

/// Returns whether the holder of a record is dead.
#[cold]
fn is_of_dead_holder(seen: &SlotContent, living: &mut holder_record::LivenessCache) -> bool {
    holder_record::owner_of(&seen.words).is_some_and(|owner| !living.may_live(&owner))
}

/// Returns whether the file, which was `length` bytes long, has memory for `bytes` bytes, and
/// reserves them if not.
fn is_complete(file: &File, length: u64, bytes: u64) -> bool {
    if length >= bytes {
        return true;
    }
    let is_reserved =
        may_reach(bytes) && fallocate(file, FallocateFlags::empty(), 0, bytes).is_ok();
    step("space for records reserved");
    is_reserved
}

/// Returns whether this process may write a file up to this length. Beyond its limit of file sizes
/// the kernel would kill it (`SIGXFSZ`).
fn may_reach(length: u64) -> bool {
    getrlimit(Resource::Fsize)
        .current
        .is_none_or(|most| length <= most)
}
