//! The tables to which this process is attached.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use rustix::fs::{OFlags, PROC_SUPER_MAGIC, SealFlags, fcntl_add_seals, statfs};

use super::bitmap::Bitmap;
use super::slots;
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::owner::Owner;
use crate::base::runtime_dir;
use crate::sys::failpoint::step;
use crate::sys::file_id::{self, FileId};
use crate::sys::fork::{ForkGuarded, NoFork, ProcessId};
use crate::sys::layout::{self, Cell, LOCKS_PER_PAGE, Table};
use crate::sys::ofd;

/// A table as this process uses it.
pub(super) struct Attached {
    pub(super) path: PathBuf,
    /// Device and inode.
    identity: FileId,
    pub(super) table: &'static Table,
    /// The cells of `table`.
    pub(super) cells: &'static [Cell],
    pub(super) capacity: u32,
    /// The owner number of this process in lock words. The upper half is the fork generation for
    /// which it is valid.
    own_number: AtomicU64,
    /// The open file that holds the slot's lock. This mutex is locked with forks held off. A forked
    /// child's copy holds nothing. The mapping uses another open file, because a mapping keeps its
    /// file open, and a child keeps the mapping.
    slot: Mutex<ForkGuarded<File>>,
}

/// The tables to which this process is attached. The mutex is locked with forks held off.
static ATTACHED: Mutex<Vec<&'static Attached>> = Mutex::new(Vec::new());

impl Attached {
    pub(super) fn at(path: PathBuf) -> Result<&'static Self> {
        // Files are opened and closed without the mutex, because forks are held off while it is
        // locked.
        let slot = open_file(&path)?;
        let (identity, capacity) = check(&path, &slot)?;
        let mapped = open_file(&path)?;
        if self::identity(&path, &mapped)? != identity {
            return Err(ErrorKind::RogueDeletion { path }.into());
        }
        // A process that shortens the file kills every process that uses it. A memfd that was
        // created with MFD_ALLOW_SEALING can be sealed against that; every other file refuses.
        if fcntl_add_seals(&*mapped, SealFlags::SHRINK).is_ok() {
            step("table sealed");
        }
        let no_fork = NoFork::hold();
        let mut attached = ATTACHED.lock();
        if let Some(known) = attached
            .iter()
            .copied()
            .find(|known| known.identity == identity)
        {
            drop((attached, no_fork));
            known.check_slot()?;
            return Ok(known);
        }
        let table =
            Table::map(&mapped, capacity).map_err(|error| Error::io("map", &path, error))?;
        let own_number = slots::take_slot(&table, &path, &slot)?;
        let table: &'static Table = Box::leak(Box::new(table));
        let attached_now: &'static Self = Box::leak(Box::new(Self {
            path,
            identity,
            table,
            cells: table.cells(),
            capacity,
            own_number: AtomicU64::new(own_number),
            slot: Mutex::new(slot),
        }));
        attached.push(attached_now);
        Ok(attached_now)
    }

    /// Returns the owner number of this process, unless the process has forked since it attached.
    #[inline]
    pub(super) fn known_own_number(&self) -> Option<u32> {
        let own_number = self.own_number.load(Ordering::Relaxed);
        ((own_number >> 32) as u32 == ProcessId::known().number()).then_some(own_number as u32)
    }

    /// Returns the owner number of this process.
    #[inline]
    pub(super) fn own_number(&self) -> Result<u32> {
        match self.known_own_number() {
            Some(own_number) => Ok(own_number),
            None => self.take_new_slot(),
        }
    }

    /// Takes another slot for this process: a forked child has no slot, and closing the descriptor
    /// gives a slot up.
    #[cold]
    fn take_new_slot(&self) -> Result<u32> {
        let mut own = open_file(&self.path)?;
        if identity(&self.path, &own)? != self.identity {
            return Err(ErrorKind::RogueDeletion {
                path: self.path.clone(),
            }
            .into());
        }
        let _no_fork = NoFork::hold();
        let mut slot = self.slot.lock();
        let mut own_number = self.own_number.load(Ordering::Relaxed);
        if (own_number >> 32) as u32 != ProcessId::current().number() || !slot.is_own() {
            own_number = slots::take_slot(self.table, &self.path, &own)?;
            // The old file is closed after the mutex is unlocked.
            std::mem::swap(&mut *slot, &mut own);
            self.own_number.store(own_number, Ordering::Relaxed);
        }
        Ok(own_number as u32)
    }

    #[inline]
    pub(super) fn bitmap(&self) -> Bitmap<'_> {
        let header = self.table.header();
        Bitmap {
            words: self.table.allocated(),
            full: self.table.full(),
            count: &header.count.0,
            count_state: &header.count_state,
            hint: &header.hint.0,
            capacity: self.capacity,
        }
    }

    /// Reserves room in the file for the lock `id` before a process accesses the lock.
    #[inline]
    pub(super) fn reserve(&self, id: u32) -> Result<()> {
        let page = (id / LOCKS_PER_PAGE) as usize;
        match self.table.touched()[page / 64].load(Ordering::Acquire) & 1 << (page % 64) {
            0 => self.reserve_page(page),
            _ => Ok(()),
        }
    }

    #[cold]
    fn reserve_page(&self, page: usize) -> Result<()> {
        self.check_slot()?;
        let _no_fork = NoFork::hold();
        slots::reserve(&self.slot.lock(), self.table.shape().page_of_cells(page))
            .map_err(|error| Error::io("make room in", &self.path, error))?;
        step("page of locks reserved");
        self.table.touched()[page / 64].fetch_or(1 << (page % 64), Ordering::Release);
        step("page of locks marked");
        Ok(())
    }

    /// Returns the owner number, as [`own_number`](Self::own_number) does. Takes another slot if
    /// the program has closed the slot's descriptor.
    pub(super) fn check_slot(&self) -> Result<u32> {
        let own_number = self.own_number()?;
        let is_own = {
            let _no_fork = NoFork::hold();
            self.slot.lock().is_own()
        };
        if is_own {
            Ok(own_number)
        } else {
            self.take_new_slot()
        }
    }

    /// Returns whether the owner of a lock has died. If the kernel does not answer, the owner
    /// counts as alive.
    pub(super) fn is_dead(&self, owner: u32) -> bool {
        if !slots::has_generation_of(self.table, owner) {
            return true;
        }
        if u64::from(owner) == self.own_number.load(Ordering::Relaxed) & u64::from(u32::MAX) {
            return false;
        }
        let no_fork = NoFork::hold();
        let file = self.slot.lock();
        if file.is_own() {
            return ofd::is_locked(&file, slots::byte_of(owner)).is_ok_and(|locked| !locked);
        }
        // Every owner would seem dead in another file that reused the descriptor. The next check
        // uses a new descriptor.
        drop((file, no_fork));
        let _ = self.take_new_slot();
        false
    }

    /// Returns the identity of a live or dead owner, as long as its slot has its record.
    pub(super) fn owner(&self, owner: u32) -> Option<Owner> {
        slots::owner_in(self.table, owner)
    }

    pub(super) fn describe(&self) -> String {
        format!("the lock table {}", self.path.display())
    }
}

impl fmt::Debug for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Attached").field(&self.path).finish()
    }
}

pub(super) fn open_file(path: &Path) -> Result<ForkGuarded<File>> {
    let mut flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    // A link in /proc/self/fd is made by the kernel, and leads to the open file itself.
    let is_in_proc =
        |directory: &Path| statfs(directory).is_ok_and(|found| found.f_type == PROC_SUPER_MAGIC);
    if !path.parent().is_some_and(is_in_proc) {
        flags |= OFlags::NOFOLLOW;
    }
    let mut options = File::options();
    options
        .read(true)
        .write(true)
        .custom_flags(flags.bits() as i32);
    ForkGuarded::new(|| options.open(path))
        .map(ForkGuarded::know)
        .map_err(|error| match error.kind() {
            io::ErrorKind::IsADirectory => not_a_plain_file(path),
            _ => Error::io("open", path, error),
        })
}

fn not_a_plain_file(path: &Path) -> Error {
    ErrorKind::LayoutMismatch {
        path: path.to_owned(),
        problem: "it is not a plain file",
    }
    .into()
}

fn identity(path: &Path, file: &File) -> Result<FileId> {
    let found = file
        .metadata()
        .map_err(|error| Error::io("inspect", path, error))?;
    Ok(file_id::of(&found))
}

/// Checks a file before any of it is mapped. Returns its identity and the number of its locks.
fn check(path: &Path, file: &File) -> Result<(FileId, u32)> {
    let mismatch = |problem| {
        Error::from(ErrorKind::LayoutMismatch {
            path: path.to_owned(),
            problem,
        })
    };
    let found = file
        .metadata()
        .map_err(|error| Error::io("inspect", path, error))?;
    if !found.is_file() {
        return Err(not_a_plain_file(path));
    }
    // Another owner could shorten the mapped file.
    if found.uid() != 0 && !runtime_dir::is_own(file, &found) {
        let lock = format!("the lock table {}", path.display());
        return Err(ErrorKind::ForeignOwner {
            lock,
            uid: found.uid(),
            pid: None,
        }
        .into());
    }
    let mut header = [0; 20];
    match file.read_exact_at(&mut header, 0) {
        Ok(()) => {
            let capacity = layout::capacity(&header, found.len()).map_err(mismatch)?;
            Ok((file_id::of(&found), capacity))
        }
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Err(mismatch("it is too short"))
        }
        Err(error) => Err(Error::io("read", path, error)),
    }
}

/// Returns the table that contains the cell, and the number of its lock.
pub(super) fn table_of(cell: &'static Cell) -> Option<(&'static Attached, u32)> {
    let cell = std::ptr::from_ref(cell);
    let _no_fork = NoFork::hold();
    let table = ATTACHED
        .lock()
        .iter()
        .copied()
        .find(|table| table.cells.as_ptr_range().contains(&cell))?;
    let offset = cell.addr() - table.cells.as_ptr().addr();
    Some((table, (offset / size_of::<Cell>()) as u32))
}
