//! A table of locks in shared memory.
//!
//! [`layout`] has the file format, [`raw_lock`] the lock word, and [`bitmap`] the allocation. This module combines
//! them: files, processes and sleeping.
//!
//! A process takes a *slot* of the table and keeps a kernel lock on the slot's first byte for as long as it lives. A
//! lock word names its owner by slot and generation of the slot. So an owner is dead when its slot has a later
//! generation or its byte is not locked. The kernel decides this, not a pid, so it also works across pid namespaces.
//! The next user of a slot raises its generation first, so that it is never mistaken for the dead one.
//!
//! A process attaches to a table once and for its life, whatever the number of managers it opens. The memory is never
//! unmapped, so a guard is a plain reference without a reference count.
//!
//! A page of cells is reserved in the file before its first lock is handed out. So a full file system is an error
//! there, and not a SIGBUS later.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, Mode, OFlags, PROC_SUPER_MAGIC, SealFlags, fallocate, fchmod, fcntl_add_seals,
    ftruncate, linkat, openat, statfs,
};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};

use super::bitmap::{self, Bitmap};
use super::raw_lock::{self, Env, Fairness, OWNER, Slept, Taken};
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::guard::Recovered;
use crate::base::holder_record;
use crate::base::lock_info::LockInfo;
use crate::base::owner::Owner;
use crate::base::runtime_dir;
use crate::base::wait::{Backoff, Wait, WaitError, WaitState};
use crate::manager::{Handle, HeldLock, LockManager, ManagedLock, Releases};
use crate::sys::failpoint::step;
use crate::sys::fork::{ForkGuarded, NoFork, ProcessId};
use crate::sys::layout::{self, Cell, LOCKS_PER_PAGE, MOST, SLOTS, Shape, Table};
use crate::sys::{futex, ofd};

/// A table of locks in shared memory, for the processes of one machine. Linux only.
///
/// Acquiring and releasing a free lock costs some ten nanoseconds and no system call. A process may die holding
/// thousands of locks. The next owner of each lock gets the report ([`ManagedGuard::recovered`]): at once if it comes
/// later, and within 10 ms if it waits.
///
/// The table is a file, best in a file system in memory such as `/dev/shm` or `/run`, which is empty after a boot.
/// Locks whose numbers were stored elsewhere are then allocated again with [`allocate_at`](LockManager::allocate_at).
/// The table belongs to the user that created it, with mode 0600; a process that can write to it can break every lock
/// in it. It takes memory as locks are first used, 4 KiB for each 64 of them.
///
/// A process stays attached to a table until it ends, also after all handles are dropped. So use a few tables per
/// process, not thousands of short-lived ones. At most 4094 processes share a table.
///
/// A process that closes descriptors which it did not open, as some daemons do at their start, gives up the locks that
/// it holds; it must call [`open`](Self::open) afterwards. A forked child attaches again when it first uses the table.
/// The file must still exist then, and be the same file.
///
/// Do not put the table on a file system that several machines share. On a disk, create the table again when the
/// machine starts: after a crash the file may be older than the locks that were held.
///
/// # Truncation
/// The table is mapped memory. If a program with write permission shortens the file, the kernel kills every process
/// that then touches a lock beyond the new end (`SIGBUS`). That includes a process that only waits, and
/// `lockkit table`. No error is returned, and no guard is dropped. `truncate`, a shell redirection (`> table`) and `cp`
/// onto the file shorten it. Removing or replacing the file does not: attached processes keep the old one.
///
/// Opening seals the file against that (`F_SEAL_SHRINK`, [memfd_create(2)]) if the file is a memfd that allows seals. A
/// process opens a memfd by the path `/proc/self/fd/N`. No other file takes seals, not even in `/dev/shm`: there only
/// the file's mode, 0600, protects the table from other users.
///
/// A full file system that cannot reserve room (fallocate(2)) kills processes in the same way. File systems in memory,
/// ext4, XFS and btrfs can reserve room.
///
/// [memfd_create(2)]: https://man7.org/linux/man-pages/man2/memfd_create.2.html
///
/// ```
/// # #[cfg(target_os = "linux")]
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use lockkit::{LockManager, ShmLockManager};
/// # let path = format!("/dev/shm/lockkit-doc-shm-{}", std::process::id());
/// let manager = ShmLockManager::open_or_create(&path, 2048)?;
/// let lock = manager.allocate()?;
/// {
///     let guard = lock.lock()?;
///     if let Some(died) = guard.recovered() {
///         eprintln!("the previous owner died inside: {died}");
///     }
/// }
/// lock.free()?;
/// # std::fs::remove_file(path)?;
/// # Ok(()) }
/// # #[cfg(not(target_os = "linux"))] fn main() {}
/// ```
///
/// Sources: [futex(2)](https://man7.org/linux/man-pages/man2/futex.2.html),
/// open file description locks in [fcntl(2)](https://man7.org/linux/man-pages/man2/fcntl.2.html).
///
/// [`ManagedGuard::recovered`]: crate::ManagedGuard::recovered
///
/// A service that creates the table, and programs that only open it:
///
/// ```
/// # #[cfg(target_os = "linux")]
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use lockkit::ShmLockManager;
/// # let path = format!("/dev/shm/lockkit-doc-shm-create-{}", std::process::id());
/// let made = ShmLockManager::create(&path, 100)?; // Fails if the path exists.
/// let opened = ShmLockManager::open(&path)?;
/// assert_eq!(opened.capacity(), 100);
/// # std::fs::remove_file(path)?;
/// # Ok(()) }
/// # #[cfg(not(target_os = "linux"))] fn main() {}
/// ```
#[derive(Clone, Copy)]
pub struct ShmLockManager(&'static Attached);

impl ShmLockManager {
    /// Creates a table of `capacity` locks at `path`, which must not exist yet. The table appears there complete.
    ///
    /// # Errors
    /// - [`InvalidCapacity`](ErrorKind::InvalidCapacity) for 0, or more than 16,777,216.
    /// - [`Io`](ErrorKind::Io) if the path exists (`AlreadyExists`) or a system call fails, for example because the
    ///   file system is full or cannot create files without a name (`O_TMPFILE`).
    /// - [`Unsupported`](ErrorKind::Unsupported) outside Linux.
    ///
    /// If only the attachment of this process fails, because all slots are taken or it has too many descriptors, the
    /// table exists and is complete. Then only [`open`](Self::open) remains to be called.
    pub fn create(path: impl AsRef<Path>, capacity: u32) -> Result<Self> {
        make(path.as_ref(), capacity)?;
        Self::open(path)
    }

    /// Opens the table at `path`; the file contains the number of locks. Seals the file against
    /// [truncation](Self#truncation) where that is possible.
    ///
    /// # Errors
    /// - [`Io`](ErrorKind::Io) if there is no file (`NotFound`), or a system call fails.
    /// - [`LayoutMismatch`](ErrorKind::LayoutMismatch) if the file is not a table, or is damaged.
    /// - [`ForeignOwner`](ErrorKind::ForeignOwner) if it belongs to another user, other than root.
    /// - [`TooManyProcesses`](ErrorKind::TooManyProcesses) if 4094 processes use it.
    /// - [`Unsupported`](ErrorKind::Unsupported) outside Linux.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let path = std::path::absolute(path).map_err(|error| Error::io("find", path, error))?;
        Ok(Self(Attached::at(path)?))
    }

    /// Opens the table at `path`, or creates it with `capacity` locks. Any number of processes may do so at once: all
    /// get the same table, with the capacity of the first process.
    ///
    /// # Errors
    /// As [`create`](Self::create) and [`open`](Self::open), except for an existing or a missing file.
    pub fn open_or_create(path: impl AsRef<Path>, capacity: u32) -> Result<Self> {
        loop {
            match Self::open(&path) {
                Err(error) if is_io(&error, io::ErrorKind::NotFound) => {}
                opened => return opened,
            }
            match make(path.as_ref(), capacity) {
                Err(error) if !is_io(&error, io::ErrorKind::AlreadyExists) => return Err(error),
                _ => {}
            }
        }
    }

    /// Returns how many locks the table has.
    pub fn capacity(&self) -> u32 {
        self.0.capacity
    }

    /// Returns the path by which this process first opened the table.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    fn lock(&self, id: u32) -> Result<ShmLock> {
        let table = self.0;
        let Some(cell) = table.cells.get(id as usize) else {
            return Err(ErrorKind::NoSuchLock { table: table.describe(), id, capacity: table.capacity }.into());
        };
        table.reserve(id)?;
        Ok(ShmLock { table, cell, id })
    }
}

impl fmt::Debug for ShmLockManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShmLockManager").field("path", &self.0.path).field("capacity", &self.0.capacity).finish()
    }
}

impl LockManager for ShmLockManager {
    #[inline]
    fn allocate(&self) -> Result<ManagedLock> {
        match self.0.bitmap().allocate() {
            Some(id) => match self.lock(id) {
                Ok(lock) => Ok(ManagedLock(Handle::Shm(lock))),
                Err(error) => {
                    self.0.bitmap().free(id);
                    Err(error)
                }
            },
            None => {
                let (capacity, allocated) = (self.0.capacity, self.0.bitmap().allocated());
                Err(ErrorKind::Exhausted { table: self.0.describe(), capacity, allocated }.into())
            }
        }
    }

    fn retrieve(&self, id: u32) -> Result<ManagedLock> {
        Ok(ManagedLock(Handle::Shm(self.lock(id)?)))
    }

    fn allocate_at(&self, id: u32) -> Result<ManagedLock> {
        let lock = self.lock(id)?;
        match self.0.bitmap().allocate_at(id) {
            true => Ok(ManagedLock(Handle::Shm(lock))),
            false => Err(ErrorKind::AlreadyAllocated { lock: lock.describe() }.into()),
        }
    }

    fn available(&self) -> Result<Option<u32>> {
        Ok(Some(self.0.bitmap().available()))
    }

    fn held(&self) -> Result<Vec<HeldLock>> {
        self.0.check_slot()?;
        let (mut held, mut known) = (Vec::new(), HashMap::new());
        for (page, cells) in self.0.table.used_cells() {
            for (at, cell) in cells.iter().enumerate() {
                let lock = ShmLock { table: self.0, cell, id: page * LOCKS_PER_PAGE + at as u32 };
                held.extend(lock.living_owner(&mut known).map(|owner| HeldLock { id: lock.id, owner }));
            }
        }
        Ok(held)
    }

    fn free_all(&self) -> Result<()> {
        self.0.bitmap().free_all();
        Ok(())
    }
}

fn is_io(error: &Error, kind: io::ErrorKind) -> bool {
    matches!(error.kind(), ErrorKind::Io { source, .. } if source.kind() == kind)
}

/// Creates a table without a name, and links it to `path` when it is complete. A process that is killed in between
/// leaves nothing.
fn make(path: &Path, capacity: u32) -> Result<()> {
    if capacity == 0 || capacity > MOST {
        return Err(ErrorKind::InvalidCapacity { capacity, most: MOST }.into());
    }
    let failed = |error| Error::io("create", path, error);
    let directory = match path.parent() {
        Some(directory) if directory != Path::new("") => directory,
        _ => Path::new("."),
    };
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = File::from(openat(CWD, directory, flags, Mode::from_raw_mode(0o600)).map_err(failed)?);
    step("nameless file made");
    // The umask belongs to the program, so the mode is set here.
    fchmod(&file, Mode::from_raw_mode(0o600)).map_err(failed)?;
    step("mode of the file set");
    let shape = Shape::of(capacity);
    ftruncate(&file, shape.size).map_err(failed)?;
    step("size of the table set");
    reserve(&file, shape.bitmaps()).map_err(failed)?;
    step("room for the bitmaps reserved");
    let failed_io = |error| Error::io("create", path, error);
    file.write_all_at(&layout::header(capacity), 0).map_err(failed_io)?;
    step("table written");
    // Otherwise a crash of the system could leave the name without its content. In memory the call costs nothing.
    file.sync_all().map_err(failed_io)?;
    step("table synced");
    let own = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    linkat(CWD, own, CWD, path, AtFlags::SYMLINK_FOLLOW).map_err(failed)?;
    step("table linked");
    Ok(())
}

/// Reserves room in the file system for a range of bytes. If it cannot reserve, room is allocated at the first use.
fn reserve(file: &File, (offset, length): (u64, u64)) -> std::result::Result<(), Errno> {
    match rustix::io::retry_on_intr(|| fallocate(file, FallocateFlags::KEEP_SIZE, offset, length)) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        result => result,
    }
}

/// A table as this process uses it.
struct Attached {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
    table: &'static Table,
    /// The cells of `table`.
    cells: &'static [Cell],
    capacity: u32,
    /// The owner number of this process in lock words. The upper half is the fork generation for which it is valid.
    me: AtomicU64,
    /// The open file that holds the slot's lock. This mutex is locked with forks held off. A forked child's copy holds
    /// nothing. The mapping uses another open file, because a mapping keeps its file open, and a child keeps the
    /// mapping.
    slot: Mutex<ForkGuarded<File>>,
}

/// The tables to which this process is attached. The mutex is locked with forks held off.
static ATTACHED: Mutex<Vec<&'static Attached>> = Mutex::new(Vec::new());

/// An owner in a lock word: the lower bits are the number of its slot, from 1 on, and the upper bits the slot's
/// generation.
const SLOT_BITS: u32 = 12;
const SLOT: u32 = (1 << SLOT_BITS) - 1;
const GENERATION: u32 = OWNER >> SLOT_BITS;
/// An owner that died and whose slot is no longer known.
const DIED: u32 = SLOT;
const _: () = assert!(SLOTS < DIED);

impl Attached {
    fn at(path: PathBuf) -> Result<&'static Self> {
        // Files are opened and closed without the mutex, because forks are held off while it is locked.
        let slot = open_file(&path)?;
        let (identity, capacity) = check(&path, &slot)?;
        let mapped = open_file(&path)?;
        if self::identity(&path, &mapped)? != identity {
            return Err(ErrorKind::RogueDeletion { path }.into());
        }
        // A process that shortens the file kills every process that uses it. A memfd that was created with
        // MFD_ALLOW_SEALING can be sealed against that; every other file refuses.
        if fcntl_add_seals(&*mapped, SealFlags::SHRINK).is_ok() {
            step("table sealed");
        }
        let no_fork = NoFork::hold();
        let mut attached = ATTACHED.lock();
        if let Some(known) = attached.iter().copied().find(|known| known.identity == identity) {
            drop((attached, no_fork));
            known.check_slot()?;
            return Ok(known);
        }
        let table = Table::map(&mapped, capacity).map_err(|error| Error::io("map", &path, error))?;
        let me = take_slot(&table, &path, &slot)?;
        let table: &'static Table = Box::leak(Box::new(table));
        let fresh: &'static Self = Box::leak(Box::new(Self {
            path,
            identity,
            table,
            cells: table.cells(),
            capacity,
            me: AtomicU64::new(me),
            slot: Mutex::new(slot),
        }));
        attached.push(fresh);
        Ok(fresh)
    }

    /// Returns the owner number of this process, unless the process has forked since it attached.
    #[inline]
    fn known_me(&self) -> Option<u32> {
        let me = self.me.load(Ordering::Relaxed);
        ((me >> 32) as u32 == ProcessId::known().number()).then_some(me as u32)
    }

    /// Returns the owner number of this process.
    #[inline]
    fn me(&self) -> Result<u32> {
        match self.known_me() {
            Some(me) => Ok(me),
            None => self.take_new_slot(),
        }
    }

    /// Takes another slot for this process: a forked child has no slot, and closing the descriptor gives a slot up.
    #[cold]
    fn take_new_slot(&self) -> Result<u32> {
        let mut own = open_file(&self.path)?;
        if identity(&self.path, &own)? != self.identity {
            return Err(ErrorKind::RogueDeletion { path: self.path.clone() }.into());
        }
        let _no_fork = NoFork::hold();
        let mut slot = self.slot.lock();
        let mut me = self.me.load(Ordering::Relaxed);
        if (me >> 32) as u32 != ProcessId::current().number() || !slot.is_own() {
            me = take_slot(self.table, &self.path, &own)?;
            // The old file is closed after the mutex is unlocked.
            std::mem::swap(&mut *slot, &mut own);
            self.me.store(me, Ordering::Relaxed);
        }
        Ok(me as u32)
    }

    #[inline]
    fn bitmap(&self) -> Bitmap<'_> {
        let header = self.table.header();
        Bitmap {
            words: self.table.allocated(),
            full: self.table.full(),
            count: &header.count.0,
            in_doubt: &header.is_count_in_doubt,
            hint: &header.hint.0,
            capacity: self.capacity,
        }
    }

    /// Reserves room in the file for the lock `id` before a process accesses the lock.
    #[inline]
    fn reserve(&self, id: u32) -> Result<()> {
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
        reserve(&self.slot.lock(), self.table.shape().page_of_cells(page))
            .map_err(|error| Error::io("make room in", &self.path, error))?;
        step("page of locks reserved");
        self.table.touched()[page / 64].fetch_or(1 << (page % 64), Ordering::Release);
        step("page of locks marked");
        Ok(())
    }

    /// Returns the owner number, as [`me`](Self::me), and checks whether the program has closed the slot's descriptor.
    fn check_slot(&self) -> Result<u32> {
        let me = self.me()?;
        let is_own = {
            let _no_fork = NoFork::hold();
            self.slot.lock().is_own()
        };
        if is_own { Ok(me) } else { self.take_new_slot() }
    }

    /// Returns whether the owner of a lock has died. If the kernel does not answer, the owner counts as alive.
    fn is_dead(&self, owner: u32) -> bool {
        // A damaged word may name no slot.
        let at = (owner & SLOT).wrapping_sub(1);
        let Some(slot) = self.table.slots().get(at as usize) else { return true };
        if slot.generation.load(Ordering::Acquire) & GENERATION != owner >> SLOT_BITS {
            return true;
        }
        if u64::from(owner) == self.me.load(Ordering::Relaxed) & u64::from(u32::MAX) {
            return false;
        }
        let no_fork = NoFork::hold();
        let file = self.slot.lock();
        if file.is_own() {
            return ofd::is_locked(&file, Shape::slot(at).0).is_ok_and(|locked| !locked);
        }
        // Every owner would seem dead in another file that reused the descriptor. The next check uses a new descriptor.
        drop((file, no_fork));
        let _ = self.take_new_slot();
        false
    }

    /// Returns the identity of a live or dead owner, as long as its slot has its record.
    fn owner(&self, owner: u32) -> Option<Owner> {
        let slot = self.table.slots().get((owner & SLOT).checked_sub(1)? as usize)?;
        let same = || slot.generation.load(Ordering::Acquire) & GENERATION == owner >> SLOT_BITS;
        // The generation changes before the record does.
        same().then(|| holder_record::holder(&slot.record)).flatten().filter(|_| same())
    }

    fn describe(&self) -> String {
        format!("the lock table {}", self.path.display())
    }
}

impl fmt::Debug for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Attached").field(&self.path).finish()
    }
}

fn open_file(path: &Path) -> Result<ForkGuarded<File>> {
    let mut flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    // A link in /proc/self/fd is made by the kernel, and leads to the open file itself.
    let is_in_proc = |directory: &Path| statfs(directory).is_ok_and(|found| found.f_type == PROC_SUPER_MAGIC);
    if !path.parent().is_some_and(is_in_proc) {
        flags |= OFlags::NOFOLLOW;
    }
    let mut options = File::options();
    options.read(true).write(true).custom_flags(flags.bits() as i32);
    ForkGuarded::new(|| options.open(path)).map(ForkGuarded::know).map_err(|error| match error.kind() {
        io::ErrorKind::IsADirectory => no_plain_file(path),
        _ => Error::io("open", path, error),
    })
}

fn no_plain_file(path: &Path) -> Error {
    ErrorKind::LayoutMismatch { path: path.to_owned(), problem: "it is not a plain file" }.into()
}

fn identity(path: &Path, file: &File) -> Result<(u64, u64)> {
    let found = file.metadata().map_err(|error| Error::io("look at", path, error))?;
    Ok((found.dev(), found.ino()))
}

/// Checks a file before any of it is mapped. Returns its identity and the number of its locks.
fn check(path: &Path, file: &File) -> Result<((u64, u64), u32)> {
    let mismatch = |problem| Error::from(ErrorKind::LayoutMismatch { path: path.to_owned(), problem });
    let found = file.metadata().map_err(|error| Error::io("look at", path, error))?;
    if !found.is_file() {
        return Err(no_plain_file(path));
    }
    // Another owner could shorten the mapped file.
    if found.uid() != 0 && !runtime_dir::is_own(file, &found) {
        let lock = format!("the lock table {}", path.display());
        return Err(ErrorKind::ForeignOwner { lock, uid: found.uid(), pid: None }.into());
    }
    let mut header = [0; 20];
    match file.read_exact_at(&mut header, 0) {
        Ok(()) => {
            let capacity = layout::capacity(&header, found.len()).map_err(mismatch)?;
            Ok(((found.dev(), found.ino()), capacity))
        }
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(mismatch("it is too short")),
        Err(error) => Err(Error::io("read", path, error)),
    }
}

/// Takes a slot that no live process has, with `file`, and records this process in it. Returns the owner number, with
/// the fork generation for which it is valid in the upper half.
fn take_slot(table: &Table, path: &Path, file: &File) -> Result<u64> {
    let fork = u64::from(ProcessId::current().number()) << 32;
    let start = table.header().next_slot.0.fetch_add(1, Ordering::Relaxed) % SLOTS;
    for at in (start..SLOTS).chain(0..start) {
        let (offset, length) = Shape::slot(at);
        if !ofd::try_lock(file, offset).map_err(|error| Error::io("lock a slot of", path, error))? {
            continue;
        }
        step("slot locked");
        // A process may have been killed between its change of the bitmap and that of the count. The next caller that
        // needs the count recounts, so that a large table opens as fast as a small one.
        table.header().is_count_in_doubt.store(bitmap::IN_DOUBT, Ordering::SeqCst);
        reserve(file, (offset.into(), length.into())).map_err(|error| Error::io("make room in", path, error))?;
        step("room for the slot reserved");
        let slot = &table.slots()[at as usize];
        // Only the process that has the slot changes its generation.
        let generation = slot.generation.load(Ordering::Acquire).wrapping_add(1);
        if generation & GENERATION == 0 {
            // This comes first, so that after a kill in between the next user of the slot does it.
            forget_generations(table, at);
            step("generations forgotten");
        }
        slot.generation.store(generation, Ordering::Release);
        // No reader may find parts of the new record under the old generation.
        fence(Ordering::SeqCst);
        let generation = generation & GENERATION;
        step("slot of a new generation");
        holder_record::take(&slot.record);
        return Ok(fork | u64::from(generation << SLOT_BITS | (at + 1)));
    }
    Err(ErrorKind::TooManyProcesses { table: format!("the lock table {}", path.display()), most: SLOTS }.into())
}

/// Resets the owners of a slot whose generations wrap around, which happens once in 131,072 uses of the slot. Locks
/// that a dead user of the slot still holds must not count as the new user's. So their owner becomes [`DIED`].
#[cold]
fn forget_generations(table: &Table, slot: u32) {
    for cell in table.used_cells().flat_map(|(_, cells)| cells) {
        let _ = cell.word.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |word| {
            (word & SLOT == slot + 1).then_some(word & !OWNER | DIED)
        });
    }
}

/// A lock of the table.
#[derive(Clone, Copy, Debug)]
pub(in crate::manager) struct ShmLock {
    table: &'static Attached,
    cell: &'static Cell,
    id: u32,
}

/// A held lock of the table. Its fields have the same width, because processors stall on a read of what was just
/// written in several parts.
#[derive(Debug)]
pub(in crate::manager) struct ShmHold {
    cell: &'static Cell,
    /// The owner, in the upper half, and the number of the acquisition.
    acquired: u64,
    /// Identifies the process that holds the lock, because a forked child has a copy; or [`RELEASED`](Self::RELEASED).
    process: u64,
}

impl ShmLock {
    pub(in crate::manager) fn id(&self) -> u32 {
        self.id
    }

    pub(in crate::manager) fn free(&self) -> Result<()> {
        match self.table.bitmap().free(self.id) {
            true => Ok(()),
            false => Err(ErrorKind::NotAllocated { lock: self.describe() }.into()),
        }
    }

    /// Acquires the lock if it is free and no slow path is needed.
    #[inline]
    pub(in crate::manager) fn acquire_free(&self, wait: &Wait) -> Option<ShmHold> {
        let owner = self.table.known_me()?;
        (wait.is_bare() && raw_lock::take_free(&self.cell.word, owner)).then(|| self.begin(owner))
    }

    pub(in crate::manager) fn acquire(&self, wait: &Wait) -> Result<(ShmHold, Option<Box<Recovered>>)> {
        wait.check(self)?;
        let owner = self.table.me()?;
        let taken = match raw_lock::take_free(&self.cell.word, owner) {
            true => Taken::Clean,
            false => self.acquire_held(owner, wait)?,
        };
        let recovered = match taken {
            Taken::Clean => None,
            Taken::From(died) => Some(self.recovered(died)),
        };
        Ok((self.begin(owner), recovered))
    }

    /// Records the acquisition. Only the holder writes this, and the lock makes the writes visible to the next holder.
    #[inline]
    fn begin(&self, owner: u32) -> ShmHold {
        step("lock word taken");
        let turn = self.cell.turn.load(Ordering::Relaxed).wrapping_add(1);
        self.cell.turn.store(turn, Ordering::Relaxed);
        self.cell.since.store(nanos(ClockId::RealtimeCoarse), Ordering::Relaxed);
        step("owner written down");
        ShmHold::new(self.cell, owner, turn)
    }

    #[cold]
    fn acquire_held(&self, owner: u32, wait: &Wait) -> Result<Taken> {
        let word = &self.cell.word;
        let Some(patience) = wait.state_for(self) else {
            return raw_lock::take_now(word, owner, |owner| self.table.is_dead(owner)).ok_or_else(|| self.held());
        };
        let mut sleeper = Sleeper {
            lock: *self,
            patience: &patience,
            ticks: Backoff::between(FIRST_TICK * 2, LAST_TICK),
            tick: FIRST_TICK,
        };
        let is_dead = |owner| self.table.is_dead(owner);
        raw_lock::take(word, owner, &mut sleeper).or_else(|stopped| match stopped {
            // After its timeout the waiter tries once more. It may acquire a lock that is kept for waiters.
            Stopped::WaitError(WaitError::TimedOut) => {
                raw_lock::take_now(word, owner, is_dead).ok_or_else(|| patience.error(WaitError::TimedOut, self))
            }
            Stopped::WaitError(gave_up) => Err(patience.error(gave_up, self)),
            Stopped::Failed(error) => Err(Error::io("wait on a lock of", &self.table.path, error)),
        })
    }

    #[cold]
    fn recovered(&self, died: u32) -> Box<Recovered> {
        let owner = self.table.owner(died).map(|owner| self.since(owner));
        Box::new(Recovered::new(owner))
    }

    fn since(&self, mut owner: Owner) -> Owner {
        owner.acquired = match self.cell.since.load(Ordering::Relaxed) {
            0 => None,
            since => SystemTime::UNIX_EPOCH.checked_add(Duration::from_nanos(since)),
        };
        owner
    }

    /// Returns the holder of the lock, unless it has died.
    fn living_owner(&self, known: &mut HashMap<u32, Option<Owner>>) -> Option<Owner> {
        let held_by = self.cell.word.load(Ordering::Acquire) & OWNER;
        if held_by == raw_lock::FREE {
            return None;
        }
        let look = || if self.table.is_dead(held_by) { None } else { self.table.owner(held_by) };
        let owner = known.entry(held_by).or_insert_with(look).clone().map(|owner| self.since(owner));
        owner.filter(|_| self.cell.word.load(Ordering::Acquire) & OWNER == held_by)
    }

    pub(in crate::manager) fn unlock(&self) -> Result<()> {
        let owner = self.table.me()?;
        if self.cell.word.load(Ordering::Relaxed) & OWNER != owner {
            return Err(self.not_locked());
        }
        // The guard of this acquisition must not release the lock of a later one.
        let turn = self.cell.turn.load(Ordering::Relaxed).wrapping_add(1);
        self.cell.turn.store(turn, Ordering::Relaxed);
        ShmHold::new(self.cell, owner, turn).release()
    }

    #[cold]
    fn not_locked(&self) -> Error {
        ErrorKind::NotLocked { lock: self.describe() }.into()
    }
}

impl ShmHold {
    /// A value that is the number of no process.
    const RELEASED: u64 = u64::MAX;

    #[inline]
    fn new(cell: &'static Cell, owner: u32, turn: u32) -> Self {
        let acquired = u64::from(owner) << 32 | u64::from(turn);
        Self { cell, acquired, process: ProcessId::known().number().into() }
    }

    /// Releases the lock, once, in the process that acquired it.
    #[inline]
    pub(in crate::manager) fn release(&mut self) -> Result<()> {
        if self.process != u64::from(ProcessId::known().number()) {
            return Ok(());
        }
        self.process = Self::RELEASED;
        let (owner, turn) = ((self.acquired >> 32) as u32, self.acquired as u32);
        let mine = self.cell.turn.load(Ordering::Relaxed) == turn;
        if mine {
            // If the next holder is killed before it records its time, it must not have this holder's time.
            self.cell.since.store(0, Ordering::Relaxed);
        }
        // By value, here and below: a guard whose address is never taken can stay in registers.
        match mine && raw_lock::release(&self.cell.word, owner, self.cell) {
            true => Ok(()),
            false => Err(Self::not_locked(self.cell)),
        }
    }

    #[cold]
    fn not_locked(locked: &'static Cell) -> Error {
        let cell = std::ptr::from_ref(locked);
        let no_fork = NoFork::hold();
        let table = ATTACHED.lock().iter().copied().find(|table| table.cells.as_ptr_range().contains(&cell));
        drop(no_fork);
        match table {
            Some(table) => {
                let offset = cell.addr() - table.cells.as_ptr().addr();
                ShmLock { table, cell: locked, id: (offset / size_of::<Cell>()) as u32 }.not_locked()
            }
            None => ErrorKind::NotLocked { lock: "a lock of a lock table".to_owned() }.into(),
        }
    }
}

impl Drop for ShmHold {
    #[inline]
    fn drop(&mut self) {
        // The release fails if the lock was already released.
        let _ = Self::release(self);
    }
}

impl Releases for ShmHold {
    fn release(&mut self) -> Result<()> {
        self.release()
    }
}

impl LockInfo for ShmLock {
    fn describe(&self) -> String {
        format!("lock {} of {}", self.id, self.table.describe())
    }

    #[cfg(feature = "tracing")]
    fn label(&self) -> (&'static str, String) {
        ("shm", format!("{}#{}", self.table.path.display(), self.id))
    }

    fn holder(&self) -> Option<Owner> {
        self.living_owner(&mut HashMap::new())
    }
}

/// The longest sleep of a waiter before it checks that the owner is alive: at first, and in the end.
const FIRST_TICK: Duration = Duration::from_micros(500);
const LAST_TICK: Duration = Duration::from_millis(5);
/// The interval of hand-off requests by waiters that were woken and did not get the lock. It is short enough to bound
/// the wait, and long enough that the spinning costs little.
const PRESS: Duration = Duration::from_micros(200);
/// The interval at which a release may keep the lock for a waiter without a processor, which costs two context
/// switches.
const YIELD: Duration = Duration::from_millis(1);

/// Returns the time until the last hand-off is `pause` ago. If that is zero, records a hand-off now.
#[inline]
fn until_due(cell: &Cell, pause: Duration) -> Duration {
    let now = nanos(ClockId::Monotonic);
    // A time in the future is from an earlier boot.
    let since = now.checked_sub(cell.kept.load(Ordering::Relaxed)).map_or(pause, Duration::from_nanos);
    let left = pause.saturating_sub(since);
    if left.is_zero() {
        cell.kept.store(now, Ordering::Relaxed);
    }
    left
}

impl Fairness for Cell {
    #[inline]
    fn keeps(&self) -> bool {
        /// In a tight loop, one of this many releases reads the clock.
        const LOOKS: u32 = 16;
        self.turn.load(Ordering::Relaxed) % LOOKS == 0 && until_due(self, YIELD).is_zero()
    }

    fn wake(&self, word: &AtomicU32) -> bool {
        futex::wake_one(word)
    }
}

/// A waiter.
struct Sleeper<'p> {
    lock: ShmLock,
    patience: &'p WaitState,
    ticks: Backoff,
    tick: Duration,
}

enum Stopped {
    WaitError(WaitError),
    Failed(io::Error),
}

impl Env for Sleeper<'_> {
    type WaitError = Stopped;

    fn is_dead(&self, owner: u32) -> bool {
        self.lock.table.is_dead(owner)
    }

    fn back_off(&self) {
        let left = until_due(self.lock.cell, PRESS);
        match self.patience.portion(left) {
            Ok(left) if !left.is_zero() => std::thread::sleep(left),
            _ => {}
        }
    }

    fn spin(&self, word: &AtomicU32) {
        /// Longer than a short hold, and much shorter than a sleep and a wake-up.
        const LONGEST: Duration = Duration::from_micros(5);
        let until = nanos(ClockId::Monotonic) + LONGEST.as_nanos() as u64;
        while nanos(ClockId::Monotonic) < until {
            for _ in 0..32 {
                if word.load(Ordering::Relaxed) & OWNER == raw_lock::FREE {
                    return;
                }
                std::hint::spin_loop();
            }
        }
    }

    fn sleep(&mut self, word: &AtomicU32, seen: u32) -> std::result::Result<Slept, Stopped> {
        let portion = self.patience.portion(self.tick).map_err(Stopped::WaitError)?;
        match futex::wait(word, seen, portion).map_err(Stopped::Failed)? {
            futex::Woke::Early => Ok(Slept::Woken),
            // No thread woke it. If signals came faster than ticks, no other tick would ever end.
            futex::Woke::Interrupted => Ok(Slept::Tick),
            futex::Woke::TimedOut => {
                self.tick = self.ticks.next();
                Ok(Slept::Tick)
            }
        }
    }
}

#[inline]
fn nanos(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fresh(ShmLockManager);

    impl Fresh {
        fn new(name: &str) -> Self {
            let path = format!("/dev/shm/lockkit-unit-{name}-{}", std::process::id());
            Self(ShmLockManager::create(path, 100).unwrap())
        }

        /// Takes another slot, as another process would.
        fn take_slot(&self) -> (ForkGuarded<File>, u32) {
            let Attached { table, path, .. } = self.0.0;
            let file = open_file(path).unwrap();
            let me = take_slot(table, path, &file).unwrap();
            (file, me as u32)
        }

        fn word(&self, id: u32) -> &AtomicU32 {
            drop(self.0.retrieve(id).unwrap());
            &self.0.0.cells[id as usize].word
        }
    }

    impl Drop for Fresh {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(self.0.path());
        }
    }

    #[test]
    fn an_owner_is_dead_when_its_slot_is_unlocked_or_taken_again() {
        let fresh = Fresh::new("dead");
        let (file, other) = fresh.take_slot();
        fresh.word(7).store(other, Ordering::SeqCst);
        let lock = fresh.0.retrieve(7).unwrap();
        assert!(lock.try_lock().unwrap_err().is_held());
        assert_eq!(fresh.0.held().unwrap().len(), 1);
        drop(file);
        assert_eq!(fresh.0.held().unwrap(), []);
        let guard = lock.try_lock().unwrap();
        assert_eq!(guard.recovered().unwrap().owner().unwrap().pid(), std::process::id());
        drop(guard);
        // Another process takes the same slot: the slot is alive again, but the holder of the lock is not.
        fresh.word(7).store(other, Ordering::SeqCst);
        fresh.0.0.table.header().next_slot.0.fetch_sub(1, Ordering::SeqCst);
        let (_file, another) = fresh.take_slot();
        assert_eq!(another & SLOT, other & SLOT);
        assert_eq!(lock.try_lock().unwrap().recovered().unwrap().owner(), None);
    }

    #[test]
    fn acquire_without_wait_takes_lock_reserved_for_handoff() {
        /// The word of a waiter that requested a hand-off and was killed: it was woken, and the release kept the lock
        /// for it.
        const HANDOFF: u32 = 0b11 << 29;
        let fresh = Fresh::new("kept");
        let lock = fresh.0.retrieve(7).unwrap();
        for wait in [Wait::none(), Wait::at_most(Duration::ZERO), Wait::until(std::time::Instant::now())] {
            fresh.word(7).store(HANDOFF, Ordering::SeqCst);
            drop(lock.acquire(&wait).unwrap());
        }
    }

    #[test]
    fn owner_without_time_does_not_inherit_previous_time() {
        let fresh = Fresh::new("untimed");
        let lock = fresh.0.retrieve(7).unwrap();
        let guard = lock.lock().unwrap();
        assert!(fresh.0.held().unwrap()[0].owner.acquired().is_some());
        drop(guard);
        let (_file, other) = fresh.take_slot();
        fresh.word(7).store(other, Ordering::SeqCst);
        assert_eq!(fresh.0.held().unwrap()[0].owner.acquired(), None);
    }

    #[test]
    fn acquire_invalid_slot_in_lock_word_reports_dead_owner() {
        let fresh = Fresh::new("damaged");
        for owner in [1 << SLOT_BITS, SLOTS + 1, OWNER] {
            fresh.word(7).store(owner, Ordering::SeqCst);
            assert_eq!(fresh.0.held().unwrap(), []);
            assert_eq!(fresh.0.retrieve(7).unwrap().try_lock().unwrap().recovered().unwrap().owner(), None);
        }
    }

    #[test]
    fn dead_holder_recovered_after_generation_wraparound() {
        let fresh = Fresh::new("anew");
        let (file, other) = fresh.take_slot();
        let at = (other & SLOT) - 1;
        // The state that the first generation of the slot left.
        fresh.word(7).store(at + 1, Ordering::SeqCst);
        fresh.0.0.table.slots()[at as usize].generation.store(GENERATION, Ordering::SeqCst);
        drop(file);
        fresh.0.0.table.header().next_slot.0.fetch_sub(1, Ordering::SeqCst);
        let (_file, first_again) = fresh.take_slot();
        assert_eq!(first_again, at + 1, "it looks like the one that died");
        let guard = fresh.0.retrieve(7).unwrap().try_lock().unwrap();
        assert_eq!(guard.recovered().unwrap().owner(), None);
    }
}
