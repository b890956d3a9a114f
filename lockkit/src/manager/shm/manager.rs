//! The manager of a lock table in shared memory: [`ShmLockManager`].

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::path::Path;

use super::attach::Attached;
use super::create::create;
use super::lock::ShmLock;
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::lock_info::LockInfo;
use crate::manager::lock_manager::{HeldLock, LockManager};
use crate::manager::managed_lock::{Handle, ManagedLock};
use crate::sys::layout::LOCKS_PER_PAGE;

/// A table of locks in shared memory, for the processes of one machine. Linux only.
///
/// Acquiring and releasing a free lock costs some ten nanoseconds and no system call. A process may
/// die holding thousands of locks. The next owner of each lock gets the report
/// ([`ManagedGuard::recovered`]): at once if it comes later, and within 10 ms if it waits.
///
/// The table is a file, best in a file system in memory such as `/dev/shm` or `/run`, which is
/// empty after a boot. Locks whose numbers were stored elsewhere are then allocated again with
/// [`allocate_at`](LockManager::allocate_at). The table belongs to the user that created it, with
/// mode 0600; a process that can write to it can break every lock in it. It takes memory as locks
/// are first used, 4 KiB for each 64 of them.
///
/// A process stays attached to a table until it ends, also after all handles are dropped. So use a
/// few tables per process, not thousands of short-lived ones. At most 4094 processes share a table.
///
/// A process that closes descriptors which it did not open, as some daemons do at their start,
/// gives up the locks that it holds; it must call [`open`](Self::open) afterwards. A forked child
/// attaches again when it first uses the table. The file must still exist then, and be the same
/// file.
///
/// Do not put the table on a file system that several machines share. On a disk, create the table
/// again when the machine starts: after a crash the file may be older than the locks that were
/// held.
///
/// # Truncation
/// The table is mapped memory. If a program with write permission shortens the file, the kernel
/// kills every process that then touches a lock beyond the new end (`SIGBUS`). That includes a
/// process that only waits, and `lockkit table`. No error is returned, and no guard is dropped.
/// `truncate`, a shell redirection (`> table`) and `cp` onto the file shorten it. Removing or
/// replacing the file does not: attached processes keep the old one.
///
/// Opening seals the file against that (`F_SEAL_SHRINK`, [memfd_create(2)]) if the file is a memfd
/// that allows seals. A process opens a memfd by the path `/proc/self/fd/N`. No other file takes
/// seals, not even in `/dev/shm`: there only the file's mode, 0600, protects the table from other
/// users.
///
/// A full file system that cannot reserve room (fallocate(2)) kills processes in the same way. File
/// systems in memory, ext4, XFS and btrfs can reserve room.
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
pub struct ShmLockManager(pub(super) &'static Attached);

impl ShmLockManager {
    /// Creates a table of `capacity` locks at `path`, which must not exist yet. The table appears
    /// there complete.
    ///
    /// # Errors
    /// - [`InvalidCapacity`](ErrorKind::InvalidCapacity) for 0, or more than 16,777,216.
    /// - [`Io`](ErrorKind::Io) if the path exists (`AlreadyExists`) or a system call fails, for
    ///   example because the file system is full or cannot create files without a name
    ///   (`O_TMPFILE`).
    /// - [`Unsupported`](ErrorKind::Unsupported) outside Linux.
    ///
    /// If only the attachment of this process fails, because all slots are taken or it has too many
    /// descriptors, the table exists and is complete. Then only [`open`](Self::open) remains to be
    /// called.
    pub fn create(path: impl AsRef<Path>, capacity: u32) -> Result<Self> {
        create(path.as_ref(), capacity)?;
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

    /// Opens the table at `path`, or creates it with `capacity` locks. Any number of processes may
    /// do so at once: all get the same table, with the capacity of the first process.
    ///
    /// # Errors
    /// As [`create`](Self::create) and [`open`](Self::open), except for an existing or a missing
    /// file.
    pub fn open_or_create(path: impl AsRef<Path>, capacity: u32) -> Result<Self> {
        loop {
            match Self::open(&path) {
                Err(error) if error.is_io(io::ErrorKind::NotFound) => {}
                opened => return opened,
            }
            match create(path.as_ref(), capacity) {
                Err(error) if !error.is_io(io::ErrorKind::AlreadyExists) => return Err(error),
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
            return Err(ErrorKind::NoSuchLock {
                table: table.describe(),
                id,
                capacity: table.capacity,
            }
            .into());
        };
        table.reserve(id)?;
        Ok(ShmLock { table, cell, id })
    }
}

impl fmt::Debug for ShmLockManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShmLockManager")
            .field("path", &self.0.path)
            .field("capacity", &self.0.capacity)
            .finish()
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
                Err(ErrorKind::Exhausted {
                    table: self.0.describe(),
                    capacity,
                    allocated,
                }
                .into())
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
            false => Err(ErrorKind::AlreadyAllocated {
                lock: lock.describe(),
            }
            .into()),
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
                let lock = ShmLock {
                    table: self.0,
                    cell,
                    id: page * LOCKS_PER_PAGE + at as u32,
                };
                held.extend(
                    lock.living_owner(&mut known)
                        .map(|owner| HeldLock { id: lock.id, owner }),
                );
            }
        }
        Ok(held)
    }

    fn free_all(&self) -> Result<()> {
        self.0.bitmap().free_all();
        Ok(())
    }
}
