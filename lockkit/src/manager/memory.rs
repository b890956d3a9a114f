//! A table of locks inside one process.
//!
//! One mutex guards the whole table, and one condition variable wakes all waiters of all locks. The manager is for
//! tests of programs that use the other managers, so it is short, and has all their rules.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::{Handle, HeldLock, LockManager, ManagedLock, Releases};
use crate::base::error::{ErrorKind, Result};
use crate::base::lock_info::LockInfo;
use crate::base::owner::Owner;
use crate::base::wait::Wait;
use crate::sys::process;

/// A table of locks inside one process, for tests of programs that use the other managers. It excludes threads, not
/// processes. A clone is another handle on the same table.
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

struct Memory {
    capacity: u32,
    state: Mutex<State>,
    released: Condvar,
}

#[derive(Default)]
struct State {
    allocated: BTreeSet<u32>,
    /// A number below which all numbers are allocated.
    hint: u32,
    held: BTreeMap<u32, Entry>,
    turns: u64,
}

struct Entry {
    owner: Owner,
    turn: u64,
}

impl InMemoryLockManager {
    /// Creates a table of `capacity` locks.
    ///
    /// # Errors
    /// [`InvalidCapacity`](ErrorKind::InvalidCapacity) for 0.
    pub fn new(capacity: u32) -> Result<Self> {
        match capacity {
            0 => Err(ErrorKind::InvalidCapacity { capacity, most: u32::MAX }.into()),
            _ => Ok(Self(Arc::new(Memory { capacity, state: Mutex::default(), released: Condvar::new() }))),
        }
    }

    fn lock(&self, id: u32) -> MemoryLock {
        MemoryLock { memory: self.0.clone(), id }
    }

    fn check(&self, id: u32) -> Result<()> {
        match self.0.capacity {
            capacity if id < capacity => Ok(()),
            capacity => Err(ErrorKind::NoSuchLock { table: DESCRIPTION.to_owned(), id, capacity }.into()),
        }
    }
}

const DESCRIPTION: &str = "the lock table in memory";

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory").field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

impl LockManager for InMemoryLockManager {
    fn allocate(&self) -> Result<ManagedLock> {
        let mut state = self.0.state.lock();
        let free = (state.hint..self.0.capacity).find(|id| !state.allocated.contains(id));
        let Some(id) = free else {
            let (capacity, allocated) = (self.0.capacity, state.allocated.len() as u32);
            return Err(ErrorKind::Exhausted { table: DESCRIPTION.to_owned(), capacity, allocated }.into());
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
            false => Err(ErrorKind::AlreadyAllocated { lock: lock.describe() }.into()),
        }
    }

    fn available(&self) -> Result<Option<u32>> {
        Ok(Some(self.0.capacity - self.0.state.lock().allocated.len() as u32))
    }

    fn held(&self) -> Result<Vec<HeldLock>> {
        let state = self.0.state.lock();
        Ok(state.held.iter().map(|(id, entry)| HeldLock { id: *id, owner: entry.owner.clone() }).collect())
    }

    fn free_all(&self) -> Result<()> {
        let mut state = self.0.state.lock();
        state.allocated.clear();
        state.hint = 0;
        Ok(())
    }
}

/// A lock of the table.
#[derive(Clone, Debug)]
pub(super) struct MemoryLock {
    memory: Arc<Memory>,
    id: u32,
}

/// A held lock of the table.
#[derive(Debug)]
pub(super) struct MemoryHold {
    lock: MemoryLock,
    turn: u64,
}

impl MemoryLock {
    pub(super) fn id(&self) -> u32 {
        self.id
    }

    pub(super) fn free(&self) -> Result<()> {
        let mut state = self.memory.state.lock();
        if !state.allocated.remove(&self.id) {
            return Err(ErrorKind::NotAllocated { lock: self.describe() }.into());
        }
        state.hint = state.hint.min(self.id);
        Ok(())
    }

    pub(super) fn acquire(&self, wait: &Wait) -> Result<MemoryHold> {
        /// The longest sleep of a waiter before it checks its token again.
        const TICK: Duration = Duration::from_secs(1);
        wait.check(self)?;
        let owner = Owner { acquired: Some(process::cheap_time()), ..Owner::current() };
        let mut state = self.memory.state.lock();
        if state.held.contains_key(&self.id) {
            // Creating an error asks for the holder, which needs the mutex. So the mutex is unlocked here.
            let patience = parking_lot::MutexGuard::unlocked(&mut state, || match wait.state_for(self) {
                Some(patience) => Ok(patience),
                None => Err(self.held()),
            })?;
            while state.held.contains_key(&self.id) {
                match patience.portion(TICK) {
                    Ok(portion) => _ = self.memory.released.wait_for(&mut state, portion),
                    Err(gave_up) => {
                        drop(state);
                        return Err(patience.error(gave_up, self));
                    }
                }
            }
        }
        state.turns += 1;
        let turn = state.turns;
        state.held.insert(self.id, Entry { owner, turn });
        Ok(MemoryHold { lock: self.clone(), turn })
    }

    pub(super) fn unlock(&self) -> Result<()> {
        self.release(|_| true)
    }

    fn release(&self, which: impl FnOnce(&Entry) -> bool) -> Result<()> {
        let mut state = self.memory.state.lock();
        if !state.held.get(&self.id).is_some_and(which) {
            return Err(ErrorKind::NotLocked { lock: self.describe() }.into());
        }
        state.held.remove(&self.id);
        self.memory.released.notify_all();
        Ok(())
    }
}

impl Releases for MemoryHold {
    fn release(&mut self) -> Result<()> {
        self.lock.release(|entry| entry.turn == self.turn)
    }
}

impl LockInfo for MemoryLock {
    fn describe(&self) -> String {
        format!("lock {} of {DESCRIPTION}", self.id)
    }

    #[cfg(feature = "tracing")]
    fn label(&self) -> (&'static str, String) {
        ("memory", self.id.to_string())
    }

    fn holder(&self) -> Option<Owner> {
        self.memory.state.lock().held.get(&self.id).map(|entry| entry.owner.clone())
    }
}
