//! A manager of which no value exists.

use std::path::Path;

use super::lock::Never;
use crate::base::error::{ErrorKind, Result};
use crate::manager::lock_manager::{HeldLock, LockManager};
use crate::manager::managed_lock::ManagedLock;

/// A table of locks in shared memory: Linux only. On this system no value of this type exists.
#[derive(Clone, Copy, Debug)]
pub struct ShmLockManager(Never);

fn unsupported<T>() -> Result<T> {
    Err(ErrorKind::Unsupported {
        what: "a lock table in shared memory",
    }
    .into())
}

impl ShmLockManager {
    /// # Errors
    /// [`Unsupported`](ErrorKind::Unsupported), always.
    pub fn create(_path: impl AsRef<Path>, _capacity: u32) -> Result<Self> {
        unsupported()
    }

    /// # Errors
    /// [`Unsupported`](ErrorKind::Unsupported), always.
    pub fn open(_path: impl AsRef<Path>) -> Result<Self> {
        unsupported()
    }

    /// # Errors
    /// [`Unsupported`](ErrorKind::Unsupported), always.
    pub fn open_or_create(_path: impl AsRef<Path>, _capacity: u32) -> Result<Self> {
        unsupported()
    }

    /// Returns how many locks the table has.
    pub fn capacity(&self) -> u32 {
        match self.0 {}
    }

    /// Returns the path by which this process first opened the table.
    pub fn path(&self) -> &Path {
        match self.0 {}
    }
}

impl LockManager for ShmLockManager {
    fn allocate(&self) -> Result<ManagedLock> {
        match self.0 {}
    }

    fn retrieve(&self, _id: u32) -> Result<ManagedLock> {
        match self.0 {}
    }

    fn allocate_at(&self, _id: u32) -> Result<ManagedLock> {
        match self.0 {}
    }

    fn available(&self) -> Result<Option<u32>> {
        match self.0 {}
    }

    fn held(&self) -> Result<Vec<HeldLock>> {
        match self.0 {}
    }

    fn free_all(&self) -> Result<()> {
        match self.0 {}
    }
}
