//! What a holder leaves behind if it dies: a small record beside the lock.
//!
//! The kernel frees a named lock when its holder dies, and forgets. So a holder writes down who it is before the guard
//! is given out and wipes that before the lock is released; whoever takes the lock next and finds it written knows that
//! the holder before died, and who that was. Only the holder writes, and the lock itself carries the writes from one
//! holder to the next. The record excludes nobody: losing it loses a report, never the lock.
//!
//! A record is [`WORDS`] 64-bit words, native byte order. A writer sets the state last, and wipes nothing but the state:
//! ```text
//! 0      state: WIPED or WRITTEN
//! 1      pid
//! 2      start time
//! 3      pid namespace
//! 4, 5   boot id, low word first
//! 6      when acquired, nanoseconds since the epoch
//! 7..11  program name, UTF-8, filled with zeros
//! 11     sum of the words 1 to 10, so that half a record is not believed
//! ```

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use crate::lock::Recovered;
use crate::owner::Owner;
use crate::steps::step;
use crate::sys::process;
#[cfg(target_os = "linux")]
use crate::{
    error::Result,
    sys::{
        folder::{self, Sharing},
        mapping::Mapping,
        unnamed,
    },
};
#[cfg(target_os = "linux")]
use rustix::fs::{FallocateFlags, fallocate};

/// The length of a record in words.
pub(super) const WORDS: usize = 12;
/// The length of a record in bytes.
pub(super) const BYTES: usize = WORDS * WORD;
const WORD: usize = size_of::<u64>();

const STATE: usize = 0;
const BODY: std::ops::Range<usize> = 1..SUM;
const PROGRAM: std::ops::Range<usize> = 7..SUM;
const SUM: usize = 11;

/// The holder released, or there never was one.
const WIPED: u64 = 0;
/// A holder is inside, or died there. Changes with the layout.
const WRITTEN: u64 = u64::from_ne_bytes(*b"lockkit1");

type Words = [u64; WORDS];

/// Where a record stands. Reading what cannot be read gives a wiped one, and writing what cannot be written is left:
/// both lose a report only.
pub(super) trait Slate {
    fn read(&self) -> Words;
    fn write(&self, record: &Words);
    fn wipe(&self);
}

/// In a file, through system calls: for files that a hostile user or a full disk could pull away from under a mapping.
impl Slate for File {
    fn read(&self) -> Words {
        let mut bytes = [0; BYTES];
        let mut words = [WIPED; WORDS];
        if self.read_exact_at(&mut bytes, 0).is_ok() {
            for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(WORD)) {
                *word = u64::from_ne_bytes(std::array::from_fn(|at| bytes[at]));
            }
        }
        words
    }

    fn write(&self, record: &Words) {
        let mut bytes = [0; BYTES];
        for (word, bytes) in record.iter().zip(bytes.chunks_exact_mut(WORD)) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        let _ = self.write_all_at(&bytes, 0);
    }

    fn wipe(&self) {
        let _ = self.write_all_at(&WIPED.to_ne_bytes(), 0);
    }
}

/// In shared memory.
impl Slate for [AtomicU64] {
    fn read(&self) -> Words {
        // The state comes first and is looked at again last: a record that changes meanwhile is no record.
        let state = self[STATE].load(Ordering::Acquire);
        let mut words: Words = std::array::from_fn(|at| self[at].load(Ordering::Acquire));
        words[STATE] = state;
        words
    }

    fn write(&self, record: &Words) {
        for at in 1..WORDS {
            self[at].store(record[at], Ordering::Release);
        }
        self[STATE].store(record[STATE], Ordering::Release);
    }

    fn wipe(&self) {
        self[STATE].store(WIPED, Ordering::Release);
    }
}

/// Writes down that this process holds the lock from now on, and says who died holding it before.
pub(super) fn take(slate: &(impl Slate + ?Sized)) -> Option<Recovered> {
    let before = slate.read();
    let mut mine = current();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    mine[6] = now.as_nanos() as u64;
    mine[SUM] = sum(&mine);
    slate.write(&mine);
    step("holder written down");
    (before[STATE] != WIPED).then(|| Recovered::new(decode(&before)))
}

/// Who holds the lock, or died holding it, by the record.
pub(super) fn holder(slate: &(impl Slate + ?Sized)) -> Option<Owner> {
    decode(&slate.read())
}

/// This process's record; when it acquired is left open.
fn current() -> Words {
    thread_local! {
        static RECORD: std::cell::Cell<Option<(u32, Words)>> = const { std::cell::Cell::new(None) };
    }
    let generation = crate::sys::fork::generation();
    if let Ok(Some((made, words))) = RECORD.try_with(std::cell::Cell::get)
        && made == generation
    {
        return words;
    }
    let words = encode(&Owner::current());
    let _ = RECORD.try_with(|record| record.set(Some((generation, words))));
    words
}

fn encode(owner: &Owner) -> Words {
    let mut words = [0; WORDS];
    words[STATE] = WRITTEN;
    words[1] = owner.pid.into();
    words[2] = owner.start.unwrap_or_default();
    words[3] = owner.namespace.unwrap_or_default();
    let boot = owner.boot.unwrap_or_default();
    (words[4], words[5]) = (boot as u64, (boot >> 64) as u64);
    let program = owner.program.as_deref().unwrap_or_default();
    let mut end = program.len().min(PROGRAM.len() * WORD);
    while !program.is_char_boundary(end) {
        end -= 1;
    }
    for (word, letters) in words[PROGRAM].iter_mut().zip(program.as_bytes()[..end].chunks(WORD)) {
        let mut bytes = [0; WORD];
        bytes[..letters.len()].copy_from_slice(letters);
        *word = u64::from_ne_bytes(bytes);
    }
    words
}

fn decode(words: &Words) -> Option<Owner> {
    if words[STATE] != WRITTEN || words[SUM] != sum(words) {
        return None;
    }
    let some = |word: u64| (word != 0).then_some(word);
    let program: Vec<u8> =
        words[PROGRAM].iter().flat_map(|word| word.to_ne_bytes()).take_while(|byte| *byte != 0).collect();
    Some(Owner {
        pid: u32::try_from(words[1]).ok()?,
        start: some(words[2]),
        namespace: some(words[3]),
        boot: Some(u128::from(words[4]) | u128::from(words[5]) << 64).filter(|boot| *boot != 0),
        // A named lock is this machine's; an earlier boot of it is told by the boot id.
        host: Some(process::host().to_owned()),
        program: String::from_utf8(program).ok().filter(|program| !program.is_empty()),
        acquired: some(words[6]).and_then(|nanos| SystemTime::UNIX_EPOCH.checked_add(Duration::from_nanos(nanos))),
    })
}

/// FNV-1a over words: it guards against halves, not against forgers.
fn sum(words: &Words) -> u64 {
    words[BODY].iter().fold(0xcbf2_9ce4_8422_2325, |sum, word| (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3))
}

/// The record of a lock that is no file itself, kept in memory where no disk is involved and no full one matters.
#[cfg(target_os = "linux")]
#[derive(Debug)]
pub(super) struct Mark {
    file: File,
    mapping: Option<Mapping>,
}

#[cfg(target_os = "linux")]
impl Mark {
    const MEMORY: &str = "/dev/shm";

    /// Opens or makes the record of the lock `name`.
    ///
    /// It is mapped where its memory cannot be pulled away: a file in memory, complete, that only this user can change.
    pub(super) fn open(name: &str, sharing: Sharing) -> Result<Self> {
        let folder = folder::open_in(Self::MEMORY.as_ref(), sharing)?;
        let file = folder.open_file(name, sharing)?;
        let private = matches!(sharing, Sharing::User(_));
        let complete = || fallocate(&file, FallocateFlags::empty(), 0, BYTES as u64).is_ok();
        let mapping =
            if private && unnamed::is_in_memory(&file) && complete() { Mapping::new(&file, WORDS).ok() } else { None };
        Ok(Self { file, mapping })
    }

    pub(super) fn take(&self) -> Option<Recovered> {
        match &self.mapping {
            Some(mapping) => take(mapping.words()),
            None => take(&self.file),
        }
    }

    pub(super) fn holder(&self) -> Option<Owner> {
        match &self.mapping {
            Some(mapping) => holder(mapping.words()),
            None => holder(&self.file),
        }
    }

    pub(super) fn wipe(&self) {
        match &self.mapping {
            Some(mapping) => mapping.words().wipe(),
            None => self.file.wipe(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> [AtomicU64; WORDS] {
        [const { AtomicU64::new(0) }; WORDS]
    }

    #[test]
    fn a_record_tells_the_next_owner_who_died() {
        let slate: &[AtomicU64] = &memory();
        assert_eq!(take(slate), None, "nobody was here before");
        let died = take(slate).unwrap().owner().cloned().unwrap();
        let mut me = Owner::current();
        me.acquired = died.acquired;
        assert_eq!(died, me);
        slate.wipe();
        assert_eq!(holder(slate), None);
        assert_eq!(take(slate), None, "the one before released");
    }

    #[test]
    fn half_a_record_is_a_death_without_a_name() {
        let slate: &[AtomicU64] = &memory();
        take(slate);
        slate[2].fetch_add(1, Ordering::Relaxed);
        assert_eq!(holder(slate), None);
        assert_eq!(take(slate), Some(Recovered::new(None)));
    }

    #[test]
    fn a_long_program_name_is_cut_between_characters() {
        let mut owner = Owner::current();
        owner.program = Some("é".repeat(40));
        let mut words = encode(&owner);
        words[SUM] = sum(&words);
        assert_eq!(decode(&words).unwrap().program, Some("é".repeat(16)));
    }
}
