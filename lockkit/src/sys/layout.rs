//! The layout of a lock table in shared memory, and the table as typed atomics.
//!
//! ```text
//! 0          Header       one page: what the table is, and what allocation goes by
//! 4096       [Slot]       SLOTS of them: the processes that use the table
//! 528384     full         a bit for each word of `allocated`: all its bits are set
//! ...        touched      a bit for each page of cells: it has been reserved, and may have been used
//! ...        allocated    a bit for each lock: it is allocated
//! ...        [Cell]       at a page, one for each lock
//! ```
//! Numbers are native; the header's `layout` word detects another byte order and changed sizes. All
//! zeros is a table with nothing allocated, nothing locked and no process attached, so a new file
//! needs only its header. A page of cells has as many cells as a word of `allocated` has bits.

use std::fs::File;
use std::io;
use std::mem::{align_of, offset_of, size_of};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::mapping::Mapping;

/// The number of processes that can use a table at once.
pub(crate) const SLOTS: u32 = 4094;
/// The most locks that a table can have.
pub(crate) const MAX_LOCKS: u32 = 1 << 24;
/// The number of locks whose cells are in one page.
pub(crate) const LOCKS_PER_PAGE: u32 = (PAGE / size_of::<Cell>()) as u32;
/// The unit of reservation and of use counting, whatever the system's own page size is.
const PAGE: usize = 4096;
/// Processor caches share no line between two of these.
const LINE: usize = 64;

/// The first bytes of a table.
pub(crate) const MAGIC: u64 = u64::from_ne_bytes(*b"lockkitT");
/// Grows with every change that an older lockkit must not read.
pub(crate) const VERSION: u32 = 1;
/// The sizes. In another byte order it is another number.
pub(crate) const LAYOUT: u32 =
    SLOTS << 16 | (size_of::<Slot>() as u32) << 8 | size_of::<Cell>() as u32;

/// The start of a table. The first three fields never change, so that they can be checked before
/// the file is mapped.
#[repr(C, align(64))]
pub(crate) struct Header {
    pub(crate) magic: AtomicU64,
    pub(crate) version: AtomicU32,
    pub(crate) layout: AtomicU32,
    pub(crate) capacity: AtomicU32,
    /// Not zero: no process has counted since a process attached, and a kill may have left the
    /// count wrong before that.
    pub(crate) count_state: AtomicU32,
    _reserved: [AtomicU32; 10],
    pub(crate) count: Line<AtomicU64>,
    pub(crate) hint: Line<AtomicU32>,
    /// The slot at which the next process starts its search for a free slot.
    pub(crate) next_slot: Line<AtomicU32>,
}

/// A value with its own cache line.
#[repr(C, align(64))]
pub(crate) struct Line<T>(pub(crate) T);

/// A process that uses the table, or did.
///
/// The process holds a kernel lock on the slot's first byte while it lives.
#[repr(C)]
pub(crate) struct Slot {
    /// The number of times that the slot was taken; a lock's owner is a slot and its generation.
    pub(crate) generation: AtomicU32,
    _reserved: [AtomicU32; 5],
    /// The record of the process, as `base::holder_record` writes it.
    pub(crate) record: [AtomicU64; 13],
}

/// A lock.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Cell {
    /// The lock word, see `manager::shm::raw_lock`.
    pub(crate) word: AtomicU32,
    /// Changes with every acquisition, so that no release ends the acquisition of another holder.
    pub(crate) acquisition: AtomicU32,
    /// The time of the acquisition, in nanoseconds since the epoch, by the coarse clock.
    pub(crate) acquired_at: AtomicU64,
    /// The time at which a release last kept the lock for waiters, in nanoseconds of the monotonic
    /// clock.
    pub(crate) handed_off_at: AtomicU64,
    _reserved: [AtomicU64; 5],
}

const _: () = {
    assert!(size_of::<Header>() == 256 && size_of::<Header>() <= PAGE);
    assert!(offset_of!(Header, magic) == 0);
    assert!(offset_of!(Header, version) == 8);
    assert!(offset_of!(Header, layout) == 12);
    assert!(offset_of!(Header, capacity) == 16);
    assert!(offset_of!(Header, count_state) == 20);
    assert!(offset_of!(Header, count) == 64);
    assert!(offset_of!(Header, hint) == 128);
    assert!(offset_of!(Header, next_slot) == 192);
    assert!(size_of::<Slot>() == 128);
    assert!(offset_of!(Slot, generation) == 0);
    assert!(offset_of!(Slot, record) == 24);
    assert!(size_of::<Cell>() == 64 && align_of::<Cell>() == LINE);
    assert!(offset_of!(Cell, word) == 0);
    assert!(offset_of!(Cell, acquisition) == 4);
    assert!(offset_of!(Cell, acquired_at) == 8);
    assert!(offset_of!(Cell, handed_off_at) == 16);
    assert!(LOCKS_PER_PAGE == u64::BITS);
    assert!(PAGE + SLOTS as usize * size_of::<Slot>() == 528_128);
    assert!(Shape::of(1).full == 528_384);
};

/// Returns the header of a new table, as bytes: what [`Header::of`] reads.
pub(crate) fn header(capacity: u32) -> [u8; 20] {
    let mut bytes = [0; 20];
    bytes[..8].copy_from_slice(&MAGIC.to_ne_bytes());
    for (at, word) in [VERSION, LAYOUT, capacity].into_iter().enumerate() {
        bytes[8 + 4 * at..][..4].copy_from_slice(&word.to_ne_bytes());
    }
    bytes
}

/// Returns the capacity of the table that starts with `bytes` and is `length` bytes long, or what
/// is wrong with it.
pub(crate) fn capacity(bytes: &[u8; 20], length: u64) -> Result<u32, &'static str> {
    let word = |at: usize| u32::from_ne_bytes(std::array::from_fn(|byte| bytes[at + byte]));
    if u64::from_ne_bytes(std::array::from_fn(|byte| bytes[byte])) != MAGIC {
        return Err("it does not start as a lock table does");
    }
    if word(8) != VERSION {
        return Err("it is of another version");
    }
    if word(12) != LAYOUT {
        return Err("it is of another layout, as on another kind of machine");
    }
    let capacity = word(16);
    if capacity == 0 || capacity > MAX_LOCKS {
        return Err("its capacity is out of bounds");
    }
    if length != Shape::of(capacity).size {
        return Err("its size does not fit its capacity; it was cut short or added to");
    }
    Ok(capacity)
}

/// The offsets of the parts of a table, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    full: usize,
    touched: usize,
    allocated: usize,
    cells: usize,
    /// The length of the file.
    pub(crate) size: u64,
    capacity: u32,
}

impl Shape {
    pub(crate) const fn of(capacity: u32) -> Self {
        let words = capacity.div_ceil(u64::BITS) as usize;
        let summary =
            (words.div_ceil(u64::BITS as usize) * size_of::<u64>()).next_multiple_of(LINE);
        let full = (PAGE + SLOTS as usize * size_of::<Slot>()).next_multiple_of(PAGE);
        let touched = full + summary;
        let allocated = touched + summary;
        let cells = (allocated + words * size_of::<u64>()).next_multiple_of(PAGE);
        // Whole pages, so that reserving one never makes the file longer.
        let size = cells as u64 + words as u64 * PAGE as u64;
        Self {
            full,
            touched,
            allocated,
            cells,
            size,
            capacity,
        }
    }

    /// Returns the range that must be reserved before a table can be used at all: the bitmaps.
    pub(crate) fn bitmaps(&self) -> (u64, u64) {
        (self.full as u64, (self.cells - self.full) as u64)
    }

    /// Returns the offset and length of the page of cells numbered `page`.
    pub(crate) fn page_of_cells(&self, page: usize) -> (u64, u64) {
        (self.cells as u64 + page as u64 * PAGE as u64, PAGE as u64)
    }

    /// Returns the offset and length of the slot numbered `at`. The slot's process locks its first
    /// byte.
    pub(crate) fn slot(at: u32) -> (u32, u32) {
        (
            PAGE as u32 + at * size_of::<Slot>() as u32,
            size_of::<Slot>() as u32,
        )
    }

    fn words(&self) -> usize {
        self.capacity.div_ceil(u64::BITS) as usize
    }
}

/// Memory that other processes change at any time: atomics only, and every bit pattern is a value.
///
/// # Safety
/// The type is `repr(C)` or an atomic integer itself, and consists of atomic integers and padding.
unsafe trait Shared {}
// SAFETY: an atomic integer.
unsafe impl Shared for AtomicU64 {}
// SAFETY: `repr(C)`, of atomic integers and padding.
unsafe impl Shared for Header {}
// SAFETY: `repr(C)`, of atomic integers.
unsafe impl Shared for Slot {}
// SAFETY: `repr(C)`, of atomic integers.
unsafe impl Shared for Cell {}

/// A mapped table.
#[derive(Debug)]
pub(crate) struct Table {
    mapping: Mapping,
    shape: Shape,
}

impl Table {
    /// Maps `file`, which [`capacity`] found to be a table of `capacity` locks.
    ///
    /// If a process shortens the file while it is mapped, the system ends each process that touches
    /// the missing part (SIGBUS). The process cannot prevent that.
    pub(crate) fn map(file: &File, capacity: u32) -> io::Result<Self> {
        let shape = Shape::of(capacity);
        let words = usize::try_from(shape.size / 8).map_err(|_| io::ErrorKind::FileTooLarge)?;
        Ok(Self {
            mapping: Mapping::new(file, 0, words)?,
            shape,
        })
    }

    pub(crate) fn shape(&self) -> &Shape {
        &self.shape
    }

    pub(crate) fn header(&self) -> &Header {
        &self.part(0, 1)[0]
    }

    pub(crate) fn slots(&self) -> &[Slot] {
        self.part(PAGE, SLOTS as usize)
    }

    pub(crate) fn full(&self) -> &[AtomicU64] {
        self.part(
            self.shape.full,
            self.shape.words().div_ceil(u64::BITS as usize),
        )
    }

    pub(crate) fn touched(&self) -> &[AtomicU64] {
        self.part(
            self.shape.touched,
            self.shape.words().div_ceil(u64::BITS as usize),
        )
    }

    pub(crate) fn allocated(&self) -> &[AtomicU64] {
        self.part(self.shape.allocated, self.shape.words())
    }

    pub(crate) fn cells(&self) -> &[Cell] {
        self.part(self.shape.cells, self.shape.capacity as usize)
    }

    /// Returns the cells that may have been used, page by page, with the number of the page. The
    /// other cells are not touched, because that would allocate memory for them.
    pub(crate) fn used_cells(&self) -> impl Iterator<Item = (u32, &[Cell])> {
        let pages = self.cells().chunks(LOCKS_PER_PAGE as usize).zip(0..);
        let touched = self.touched();
        pages
            .map(|(cells, page)| (page, cells))
            .filter(|(page, _)| {
                touched[*page as usize / 64].load(Ordering::Acquire) & 1 << (page % 64) != 0
            })
    }

    fn part<T: Shared>(&self, offset: usize, count: usize) -> &[T] {
        let words = &self.mapping.words()[offset / 8..][..count * size_of::<T>() / 8];
        let start = words.as_ptr().cast::<T>();
        debug_assert!(start.is_aligned());
        // SAFETY: `words` is mapped for as long as `self` lives, is as long as `count` of `T`, and
        // aligned, for a mapping starts at a page and each part at a multiple of a cache line;
        // `Shared` says that any bytes are a `T`, and that it changes through atomics only.
        unsafe { std::slice::from_raw_parts(start, count) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_disjoint_and_within_file() {
        for capacity in [1, 63, 64, 65, 2048, 4096, 4097, 1_000_000, MAX_LOCKS] {
            let shape = Shape::of(capacity);
            let summary = shape.words().div_ceil(64) * 8;
            assert!(shape.full >= 4096 + SLOTS as usize * 128);
            assert!(shape.touched >= shape.full + summary);
            assert!(shape.allocated >= shape.touched + summary);
            assert!(shape.cells >= shape.allocated + shape.words() * 8);
            assert!(shape.size >= shape.cells as u64 + u64::from(capacity) * 64);
            assert_eq!(shape.size % 4096, 0);
        }
    }

    #[test]
    fn header_with_any_wrong_byte_is_rejected() {
        let good = header(100);
        let size = Shape::of(100).size;
        assert_eq!(super::capacity(&good, size), Ok(100));
        for at in 0..good.len() {
            let mut bad = good;
            bad[at] ^= 0x40;
            assert!(super::capacity(&bad, size).is_err(), "byte {at}");
        }
        assert!(super::capacity(&good, size - 1).is_err());
        assert!(super::capacity(&good, size + 4096).is_err());
        assert!(super::capacity(&header(0), size).is_err());
    }
}
