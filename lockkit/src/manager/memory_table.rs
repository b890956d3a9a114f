//! A table of locks inside one process.
//!
//! One mutex guards the whole table, and one condition variable wakes all waiters of all locks. The
//! manager is for tests of programs that use the other managers, so it is short, and has all their
//! rules.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::hold::Hold;
use crate::base::error::{ErrorKind, Result};
use crate::base::lock_info::LockInfo;
use crate::base::owner::Owner;
use crate::base::wait::Wait;
use crate::sys::process;

pub(super) const DESCRIPTION: &str = "the lock table in memory";

/// The table.
pub(super) struct Memory {
    pub(super) capacity: u32,
    pub(super) state: Mutex<MemoryState>,
    released: Condvar,
}

#[derive(Default)]
pub(super) struct MemoryState {
    pub(super) allocated: BTreeSet<u32>,
    /// A number below which all numbers are allocated.
    pub(super) hint: u32,
    pub(super) held: BTreeMap<u32, Entry>,
    /// The number of acquisitions so far.
    acquisitions: u64,
}

/// The holder of a lock.
pub(super) struct Entry {
    pub(super) owner: Owner,
    acquisition: u64,
}

impl Memory {
    pub(super) fn new(capacity: u32) -> Self {
        Self {
            capacity,
            state: Mutex::default(),
            released: Condvar::new(),
        }
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory")
            .field("capacity", &self.capacity)
            .finish_non_exhaustive()
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
    acquisition: u64,
}

impl MemoryLock {
    pub(super) fn new(memory: Arc<Memory>, id: u32) -> Self {
        Self { memory, id }
    }

    pub(super) fn id(&self) -> u32 {
        self.id
    }

    pub(super) fn free(&self) -> Result<()> {
        let mut state = self.memory.state.lock();
        if !state.allocated.remove(&self.id) {
            return Err(ErrorKind::NotAllocated {
                lock: self.describe(),
            }
            .into());
        }
        state.hint = state.hint.min(self.id);
        Ok(())
    }

    pub(super) fn acquire(&self, wait: &Wait) -> Result<MemoryHold> {
        /// The longest sleep of a waiter before it checks its token again.
        const MAX_SLEEP: Duration = Duration::from_secs(1);
        wait.check(self)?;
        let owner = Owner {
            acquired: Some(process::cheap_time()),
            ..Owner::current()
        };
        let mut state = self.memory.state.lock();
        if state.held.contains_key(&self.id) {
            // Creating an error asks for the holder, which needs the mutex. So the mutex is
            // unlocked here.
            let wait_state =
                parking_lot::MutexGuard::unlocked(&mut state, || match wait.state_for(self) {
                    Some(wait_state) => Ok(wait_state),
                    None => Err(self.held()),
                })?;
            while state.held.contains_key(&self.id) {
                match wait_state.portion(MAX_SLEEP) {
                    Ok(portion) => _ = self.memory.released.wait_for(&mut state, portion),
                    Err(reason) => {
                        drop(state);
                        return Err(wait_state.error(reason, self));
                    }
                }
            }
        }
        state.acquisitions += 1;
        let acquisition = state.acquisitions;
        state.held.insert(self.id, Entry { owner, acquisition });
        Ok(MemoryHold {
            lock: self.clone(),
            acquisition,
        })
    }

    pub(super) fn unlock(&self) -> Result<()> {
        self.release(|_| true)
    }

    fn release(&self, which: impl FnOnce(&Entry) -> bool) -> Result<()> {
        let mut state = self.memory.state.lock();
        if !state.held.get(&self.id).is_some_and(which) {
            return Err(ErrorKind::NotLocked {
                lock: self.describe(),
            }
            .into());
        }
        state.held.remove(&self.id);
        self.memory.released.notify_all();
        Ok(())
    }
}

impl Hold for MemoryHold {
    fn release(&mut self) -> Result<()> {
        self.lock
            .release(|entry| entry.acquisition == self.acquisition)
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
        self.memory
            .state
            .lock()
            .held
            .get(&self.id)
            .map(|entry| entry.owner.clone())
    }
}
