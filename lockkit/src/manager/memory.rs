//! The manager of a lock table inside one process: [`InMemoryLockManager`].

use std::sync::Arc;

use super::lock_manager::{HeldLock, LockManager};
use super::managed_lock::{Handle, ManagedLock};
use super::memory_table::{DESCRIPTION, Memory, MemoryLock};
use crate::base::error::{ErrorKind, Result};
use crate::base::lock_info::LockInfo;

/// A table of locks inside one process, for tests of programs that use the other managers. It
/// excludes threads, not processes. A clone is another handle on the same table.
///
/// ```
/// use lockkit::{InMemoryLockManager, LockManager};
/// # fn main() -> lockkit::Result<()> {
/// let manager = InMemoryLockManager::new(1)?;
/// let lock = manager.allocate()?;
/// assert!(manager.allocate().is_err(), "there is only one");
/// let guard = lock.lock()?;
/// assert!(lock.try_lock().unwrap_err().is_held());
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct InMemoryLockManager(Arc<Memory>);

impl InMemoryLockManager {
    /// Creates a table of `capacity` locks.
    ///
    /// # Errors
    /// [`InvalidCapacity`](ErrorKind::InvalidCapacity) for 0.
    pub fn new(capacity: u32) -> Result<Self> {
        match capacity {
            0 => Err(ErrorKind::InvalidCapacity {
                capacity,
                most: u32::MAX,
            }
            .into()),
            _ => Ok(Self(Arc::new(Memory::new(capacity)))),
        }
    }

    fn lock(&self, id: u32) -> MemoryLock {
        MemoryLock::new(self.0.clone(), id)
    }

    fn check(&self, id: u32) -> Result<()> {
        match self.0.capacity {
            capacity if id < capacity => Ok(()),
            capacity => Err(ErrorKind::NoSuchLock {
                table: DESCRIPTION.to_owned(),
                id,
                capacity,
            }
            .into()),
        }
    }
}

impl LockManager for InMemoryLockManager {
    fn allocate(&self) -> Result<ManagedLock> {
        let mut state = self.0.state.lock();
        let free = (state.hint..self.0.capacity).find(|id| !state.allocated.contains(id));
        let Some(id) = free else {
            let (capacity, allocated) = (self.0.capacity, state.allocated.len() as u32);
            return Err(ErrorKind::Exhausted {
                table: DESCRIPTION.to_owned(),
                capacity,
                allocated,
            }
            .into());
        };
        state.allocated.insert(id);
        state.hint = id + 1;
        Ok(ManagedLock(Handle::Memory(self.lock(id))))
    }

    fn retrieve(&self, id: u32) -> Result<ManagedLock> {
        self.check(id)?;
        Ok(ManagedLock(Handle::Memory(self.lock(id))))
    }

    fn allocate_at(&self, id: u32) -> Result<ManagedLock> {
        self.check(id)?;
        let lock = self.lock(id);
        match self.0.state.lock().allocated.insert(id) {
            true => Ok(ManagedLock(Handle::Memory(lock))),
            false => Err(ErrorKind::AlreadyAllocated {
                lock: lock.describe(),
            }
            .into()),
        }
    }

    fn available(&self) -> Result<Option<u32>> {
        Ok(Some(
            self.0.capacity - self.0.state.lock().allocated.len() as u32,
        ))
    }

    fn held(&self) -> Result<Vec<HeldLock>> {
        let state = self.0.state.lock();
        Ok(state
            .held
            .iter()
            .map(|(id, entry)| HeldLock {
                id: *id,
                owner: entry.owner.clone(),
            })
            .collect())
    }

    fn free_all(&self) -> Result<()> {
        let mut state = self.0.state.lock();
        state.allocated.clear();
        state.hint = 0;
        Ok(())
    }
}
