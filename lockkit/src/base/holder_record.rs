//! The record of a lock's holder, which reports its death to the next holder.
//!
//! The kernel frees a named lock when its holder dies, and keeps no trace of that. So a holder
//! writes its identity before the guard is returned, and clears the record before the lock is
//! released. If the next holder finds a written record, the previous holder died, and the record
//! identifies it. Only the holder writes, and the lock itself makes the writes of one holder
//! visible to the next. The record excludes no process: losing it loses a report, never the lock.
//!
//! A record is [`WORDS`] 64-bit words, native byte order. A writer sets the state last, and clears
//! nothing but the state:
//! ```text
//! 0      state: CLEARED or WRITTEN
//! 1      pid
//! 2      start time
//! 3      pid namespace
//! 4, 5   boot id, low word first
//! 6..10  program name, UTF-8, filled with zeros
//! 10     sum of the words 1 to 9, so that half a record is not believed
//! 11     when acquired, nanoseconds since the epoch
//! 12     unused
//! ```
//! The records of locks that are not files have the same words, except for the first, in a table:
//! see `named/records.rs`.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use crate::base::guard::Recovered;
use crate::base::owner::{Liveness, Owner};
use crate::sys::failpoint::step;
use crate::sys::files::FileExt;
use crate::sys::fnv;
use crate::sys::fork::ProcessId;
use crate::sys::process;
#[cfg(target_os = "linux")]
use rustix::fs::{FallocateFlags, fallocate};

/// The length of a record in words.
pub(crate) const WORDS: usize = 13;
/// The length of a record in bytes.
pub(crate) const BYTES: usize = WORDS * WORD;
const WORD: usize = size_of::<u64>();

const STATE: usize = 0;
/// The words that identify the holder.
pub(crate) const IDENTITY: Range<usize> = 1..SUM;
pub(crate) const PID: usize = 1;
const START: usize = 2;
pub(crate) const NAMESPACE: usize = 3;
const BOOT: Range<usize> = 4..6;
pub(crate) const PROGRAM: Range<usize> = 6..SUM;
pub(crate) const SUM: usize = 10;
pub(crate) const ACQUIRED: usize = 11;
/// The words that a holder writes.
const WRITTEN_BY_HOLDER: Range<usize> = STATE..ACQUIRED + 1;

/// The holder released, or there never was one.
const CLEARED: u64 = 0;
/// A holder holds the lock, or died holding it. The value changes with the layout.
const WRITTEN: u64 = u64::from_ne_bytes(*b"lockkit2");

pub(crate) type Words = [u64; WORDS];

/// The place where a record is kept. A record that cannot be read counts as none, and a failed
/// write is ignored: both lose only a report.
pub(crate) trait RecordStorage {
    /// Returns the record, unless it is cleared.
    fn read(&self) -> Option<Words>;
    /// Writes the holder `record` and the time at which it acquired.
    fn write(&self, record: &Words, acquired: u64);
    fn clear(&self);
}

/// A record in a file, through system calls: a mapping would fault if a hostile user truncated the
/// file, or if the disk was full.
impl RecordStorage for File {
    fn read(&self) -> Option<Words> {
        let mut bytes = [0; WRITTEN_BY_HOLDER.end * WORD];
        self.read_exact_at(&mut bytes, 0).ok()?;
        let mut words = [0; WORDS];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(WORD)) {
            *word = u64::from_ne_bytes(std::array::from_fn(|at| bytes[at]));
        }
        (words[STATE] != CLEARED).then_some(words)
    }

    fn write(&self, record: &Words, acquired: u64) {
        let mut record = *record;
        record[ACQUIRED] = acquired;
        let mut bytes = [0; WRITTEN_BY_HOLDER.end * WORD];
        for (word, bytes) in record.iter().zip(bytes.chunks_exact_mut(WORD)) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        let _ = self.write_all_at(&bytes, 0);
    }

    /// Clears the record. If it stayed, the next owner would get a false report of a death.
    fn clear(&self) {
        if self.write_all_at(&CLEARED.to_ne_bytes(), 0).is_err() {
            step("record not cleared");
            punch_hole(self);
        }
    }
}

/// Clears the record if writing fails: a punched hole reads as zeros, takes no room and meets no
/// limit of sizes.
#[cold]
fn punch_hole(file: &File) {
    const _: () = assert!(STATE == 0 && CLEARED == 0);
    #[cfg(target_os = "linux")]
    let _ = fallocate(
        file,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        0,
        WORD as u64,
    );
    #[cfg(not(target_os = "linux"))]
    let _ = file.write_all_at(&CLEARED.to_ne_bytes(), 0);
}

/// A record in shared memory.
impl RecordStorage for [AtomicU64; WORDS] {
    fn read(&self) -> Option<Words> {
        let written = self[STATE].load(Ordering::Acquire) != CLEARED;
        written.then(|| std::array::from_fn(|at| self[at].load(Ordering::Acquire)))
    }

    fn write(&self, record: &Words, acquired: u64) {
        for at in STATE + 1..ACQUIRED {
            self[at].store(record[at], Ordering::Relaxed);
        }
        self[ACQUIRED].store(acquired, Ordering::Relaxed);
        self[STATE].store(WRITTEN, Ordering::Release);
    }

    fn clear(&self) {
        self[STATE].store(CLEARED, Ordering::Release);
    }
}

/// Records this process as the holder, and returns the process that died holding the lock before.
pub(crate) fn record_current(storage: &impl RecordStorage) -> Option<Box<Recovered>> {
    let before = storage.read();
    write_current(storage);
    step("holder recorded");
    before.map(|before| Box::new(Recovered::new(decode(&before))))
}

/// Records `owner` as the holder: a process for which this process has acquired the lock.
pub(crate) fn record_owner(storage: &impl RecordStorage, owner: &Owner) {
    storage.write(&encode(owner), now());
}

/// Returns the process that holds the lock, or died holding it, from the record.
pub(crate) fn holder(storage: &impl RecordStorage) -> Option<Owner> {
    decode(&storage.read()?)
}

fn write_current(storage: &impl RecordStorage) {
    with_current(|record| storage.write(record, now()));
}

/// Calls `what` with the record of this process.
pub(crate) fn with_current<T>(what: impl Fn(&Words) -> T) -> T {
    thread_local! {
        /// The record of a process.
        static CURRENT: RefCell<Option<(ProcessId, Words)>> = const { RefCell::new(None) };
    }
    let done = CURRENT.try_with(|current| match &mut *current.borrow_mut() {
        Some((process, record)) if process.is_current() && is_complete(record) => what(record),
        current => what(
            &current
                .insert((ProcessId::current(), encode(&Owner::current())))
                .1,
        ),
    });
    // A thread that is ending no longer has thread-local storage.
    done.unwrap_or_else(|_| what(&encode(&Owner::current())))
}

/// Returns whether the record has everything that distinguishes the process from all others. A part
/// that could not be read, for example without a free descriptor, is read again next time.
fn is_complete(record: &Words) -> bool {
    record[START] != 0 && record[NAMESPACE] != 0 && record[BOOT] != [0, 0]
}

/// A cache of which processes live, for a list: each process is checked once.
#[derive(Debug, Default)]
pub(crate) struct LivenessCache(HashMap<Identity, bool>);

/// Pid, start time and pid namespace, boot id.
type Identity = (u32, [Option<u64>; 2], Option<u128>);

impl LivenessCache {
    /// Returns whether the owner lives or may live.
    pub(crate) fn may_live(&mut self, owner: &Owner) -> bool {
        let identity = (owner.pid, [owner.start, owner.namespace], owner.boot);
        *self
            .0
            .entry(identity)
            .or_insert_with(|| owner.liveness_by_name() != Liveness::Dead)
    }
}

/// Returns the nanoseconds since the epoch, by the clock that is cheapest to read. An error of a
/// few milliseconds does not matter to a reader of the record.
pub(crate) fn now() -> u64 {
    let since = process::cheap_time()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    since.as_nanos() as u64
}

pub(crate) fn encode(owner: &Owner) -> Words {
    let mut words = [0; WORDS];
    words[STATE] = WRITTEN;
    words[PID] = owner.pid.into();
    words[START] = owner.start.unwrap_or_default();
    words[NAMESPACE] = owner.namespace.unwrap_or_default();
    let boot = owner.boot.unwrap_or_default();
    (words[4], words[5]) = (boot as u64, (boot >> 64) as u64);
    let program = owner.program.as_deref().unwrap_or_default();
    let mut end = program.len().min(PROGRAM.len() * WORD);
    while !program.is_char_boundary(end) {
        end -= 1;
    }
    for (word, letters) in words[PROGRAM]
        .iter_mut()
        .zip(program.as_bytes()[..end].chunks(WORD))
    {
        let mut bytes = [0; WORD];
        bytes[..letters.len()].copy_from_slice(letters);
        *word = u64::from_ne_bytes(bytes);
    }
    words[SUM] = sum(&words);
    words
}

fn decode(words: &Words) -> Option<Owner> {
    (words[STATE] == WRITTEN).then(|| owner_of(words)).flatten()
}

/// Returns the holder that the words name, whatever their state, and `None` if they are not one
/// whole record.
pub(crate) fn owner_of(words: &Words) -> Option<Owner> {
    if words[SUM] != sum(words) {
        return None;
    }
    let some = |word: u64| (word != 0).then_some(word);
    let program: Vec<u8> = words[PROGRAM]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .take_while(|byte| *byte != 0)
        .collect();
    Some(Owner {
        pid: u32::try_from(words[PID]).ok()?,
        start: some(words[START]),
        namespace: some(words[NAMESPACE]),
        boot: Some(u128::from(words[4]) | u128::from(words[5]) << 64).filter(|boot| *boot != 0),
        // A named lock belongs to this machine; the boot id distinguishes an earlier boot of it.
        host: process::host().map(str::to_owned),
        program: String::from_utf8(program)
            .ok()
            .filter(|program| !program.is_empty()),
        acquired: some(words[ACQUIRED])
            .and_then(|nanos| SystemTime::UNIX_EPOCH.checked_add(Duration::from_nanos(nanos))),
    })
}

/// Returns the FNV-1a sum of the words. It detects half-written records, not forgeries.
pub(crate) fn sum(words: &Words) -> u64 {
    words[IDENTITY].iter().copied().fold(fnv::BASIS, fnv::add)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> [AtomicU64; WORDS] {
        [const { AtomicU64::new(0) }; WORDS]
    }

    #[test]
    fn holder_record_reports_dead_predecessor_until_cleared() {
        let storage = &memory();
        assert_eq!(record_current(storage), None, "no process held it before");
        let died = record_current(storage).unwrap().owner().cloned().unwrap();
        let mut me = Owner::current();
        me.acquired = died.acquired;
        assert_eq!(died, me);
        storage.clear();
        assert_eq!(holder(storage), None);
        assert_eq!(
            record_current(storage),
            None,
            "the previous holder released"
        );
    }

    #[test]
    fn half_written_record_reports_unknown_owner() {
        let storage = &memory();
        record_current(storage);
        storage[2].fetch_add(1, Ordering::Relaxed);
        assert_eq!(holder(storage), None);
        assert_eq!(
            record_current(storage),
            Some(Box::new(Recovered::new(None)))
        );
    }

    #[test]
    fn long_program_name_is_cut_between_characters() {
        let mut owner = Owner::current();
        owner.program = Some("é".repeat(40));
        let words = encode(&owner);
        assert_eq!(decode(&words).unwrap().program, Some("é".repeat(16)));
    }
}
