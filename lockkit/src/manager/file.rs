//! The manager of a lock table in a directory: [`FileLockManager`].

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::file_table::Directory;
use super::lock_manager::{HeldLock, LockManager};
use super::managed_lock::{Handle, ManagedLock};
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::lock_info::LockInfo;
use crate::sys::failpoint::step;
use crate::sys::files::{self, DirBuilderExt};

/// A table of locks as files in a directory, for the processes of one machine. A clone is another
/// handle on it.
///
/// For systems without shared memory, or for a few locks that should be visible in the file system.
/// Only the file system limits the number of locks. A lock costs a few microseconds, and a
/// [`ShmLockManager`](crate::ShmLockManager) lock nanoseconds. Do not use it on a file system that
/// several machines share. Only the managers of the table should touch the directory, which belongs
/// to one user.
///
/// Each held lock takes a descriptor, and each [`ManagedLock`] that was ever locked keeps one for
/// the next time: keep numbers rather than thousands of handles.
///
/// A process that is stopped while it allocates or frees blocks all other allocations and frees,
/// and releases of freed locks, until it continues or dies. Freeing a lock whose owner died in it
/// discards the report of that death. [`held`](LockManager::held) uses the records of the owners.
/// Two kinds of owners stay listed until the next owner comes:
/// - An owner that has executed another program (exec), which ended its hold.
/// - An owner that died in another pid namespace.
///
/// ```
/// use lockkit::{FileLockManager, LockManager};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = std::env::temp_dir().join(format!("lockkit-doc-locks-{}", std::process::id()));
/// let manager = FileLockManager::create(&directory)?;
/// let lock = manager.allocate()?;
/// drop(FileLockManager::open(&directory)?.retrieve(lock.id())?.lock()?);
/// lock.free()?;
/// # std::fs::remove_dir_all(directory)?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct FileLockManager(Arc<Directory>);

impl FileLockManager {
    /// Creates the directory `directory`, which must not exist yet, with mode 0700, and a table in
    /// it.
    ///
    /// # Errors
    /// [`Io`](ErrorKind::Io) if the path exists (`AlreadyExists`), or a system call fails.
    pub fn create(directory: impl AsRef<Path>) -> Result<Self> {
        let directory = directory.as_ref();
        let failed = |error| Error::io("create", directory, error);
        fs::DirBuilder::new()
            .mode(0o700)
            .create(directory)
            .map_err(failed)?;
        step("directory made");
        // The umask belongs to the program, so the mode is set here.
        files::set_directory_mode(directory, 0o700).map_err(failed)?;
        step("mode of the directory set");
        Self::open(directory)
    }

    /// Opens the table in the directory `directory`.
    ///
    /// # Errors
    /// - [`Io`](ErrorKind::Io) if there is no such directory, or a system call fails.
    /// - [`LayoutMismatch`](ErrorKind::LayoutMismatch) if the directory contains anything other
    ///   than a table of this version. An empty directory becomes a table.
    /// - [`ForeignOwner`](ErrorKind::ForeignOwner) if it belongs to another user, other than root.
    /// - [`Insecure`](ErrorKind::Insecure) if other users can create files in it.
    pub fn open(directory: impl AsRef<Path>) -> Result<Self> {
        let failed = |error| Error::io("open", directory.as_ref(), error);
        let path = directory.as_ref().canonicalize().map_err(failed)?;
        if !path.is_dir() {
            return Err(failed(io::ErrorKind::NotADirectory.into()));
        }
        Ok(Self(Arc::new(Directory::open(path)?)))
    }

    /// Returns the directory.
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl LockManager for FileLockManager {
    fn allocate(&self) -> Result<ManagedLock> {
        match self.0.allocate()? {
            Some(id) => Ok(ManagedLock(Handle::File(self.0.lock(id)))),
            None => {
                let table = format!("the lock table {}", self.path().display());
                Err(ErrorKind::Exhausted {
                    table,
                    capacity: u32::MAX,
                    allocated: u32::MAX,
                }
                .into())
            }
        }
    }

    fn retrieve(&self, id: u32) -> Result<ManagedLock> {
        Ok(ManagedLock(Handle::File(self.0.lock(id))))
    }

    fn allocate_at(&self, id: u32) -> Result<ManagedLock> {
        let lock = self.0.lock(id);
        match self.0.allocate_at(id)? {
            true => Ok(ManagedLock(Handle::File(lock))),
            false => Err(ErrorKind::AlreadyAllocated {
                lock: lock.describe(),
            }
            .into()),
        }
    }

    fn available(&self) -> Result<Option<u32>> {
        Ok(None)
    }

    fn held(&self) -> Result<Vec<HeldLock>> {
        let mut held = Vec::new();
        for id in self.0.ids()? {
            held.extend(self.0.lock(id).holder().map(|owner| HeldLock { id, owner }));
        }
        Ok(held)
    }

    fn free_all(&self) -> Result<()> {
        self.0.free_all()
    }
}
