//! Replaces `shm` on systems without futexes: a manager that cannot be created.

use std::path::Path;

use crate::base::error::{ErrorKind, Result};
use crate::base::guard::Recovered;
use crate::base::lock_info::LockInfo;
use crate::base::owner::Owner;
use crate::base::wait::Wait;
use crate::manager::{HeldLock, LockManager, ManagedLock, Releases};

/// A table of locks in shared memory: Linux only. On this system no value of this type exists.
#[derive(Clone, Copy, Debug)]
pub struct ShmLockManager(Never);

/// A type without values.
#[derive(Clone, Copy, Debug)]
pub(in crate::manager) enum Never {}

fn unsupported<T>() -> Result<T> {
    Err(ErrorKind::Unsupported { what: "a lock table in shared memory" }.into())
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

#[derive(Clone, Debug)]
pub(in crate::manager) struct ShmLock(Never);

#[derive(Debug)]
pub(in crate::manager) struct ShmHold(Never);

impl ShmLock {
    pub(in crate::manager) fn id(&self) -> u32 {
        match self.0 {}
    }

    pub(in crate::manager) fn free(&self) -> Result<()> {
        match self.0 {}
    }

    pub(in crate::manager) fn acquire_free(&self, _wait: &Wait) -> Option<ShmHold> {
        match self.0 {}
    }

    pub(in crate::manager) fn acquire(&self, _wait: &Wait) -> Result<(ShmHold, Option<Box<Recovered>>)> {
        match self.0 {}
    }

    pub(in crate::manager) fn unlock(&self) -> Result<()> {
        match self.0 {}
    }
}

impl LockInfo for ShmLock {
    fn describe(&self) -> String {
        match self.0 {}
    }

    #[cfg(feature = "tracing")]
    fn label(&self) -> (&'static str, String) {
        match self.0 {}
    }

    fn holder(&self) -> Option<Owner> {
        match self.0 {}
    }
}

impl Releases for ShmHold {
    fn release(&mut self) -> Result<()> {
        match self.0 {}
    }
}
