//! A part of a file as shared memory, in atomic 64-bit words.

use std::fs::File;
use std::io;
use std::ptr;
use std::sync::atomic::AtomicU64;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// `words` words of a file, shared with every other process that maps it.
///
/// The file must stay at least that long while it is mapped: the system ends a process that touches
/// a mapped page which its file no longer has (SIGBUS). Callers map only files that no other user
/// can shorten.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: ptr::NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the memory is only ever reached as `&[AtomicU64]`, which any thread may use.
unsafe impl Send for Mapping {}
// SAFETY: as for `Send`.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `words` words of `file` from the byte `start` on, which begins a page. The file must be
    /// open for reading and writing, and must be that long.
    pub(crate) fn new(file: &File, start: u64, words: usize) -> io::Result<Self> {
        if file.metadata()?.len() < start + (words * size_of::<AtomicU64>()) as u64 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
        // SAFETY: a fresh mapping at an address of the kernel's choice, so it overlaps no other
        // memory.
        let start = unsafe {
            mmap(
                ptr::null_mut(),
                words * size_of::<AtomicU64>(),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file,
                start,
            )?
        };
        let start = ptr::NonNull::new(start.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { start, words })
    }

    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: `start` is a mapping of this many words, page-aligned, that lives until `self` is
        // dropped; other processes change it only through atomics, and every bit pattern is a valid
        // word.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `new` made, and no reference into it outlives `self`.
        let _ = unsafe {
            munmap(
                self.start.as_ptr().cast(),
                self.words * size_of::<AtomicU64>(),
            )
        };
    }
}
