//! A lock of a table in shared memory, and its hold.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use rustix::time::ClockId;

use super::attach::{self, Attached};
use super::raw_lock::{self, Acquired, OWNER};
use super::waiter::{ShmWaiter, SleepError, nanos};
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::guard::Recovered;
use crate::base::lock_info::LockInfo;
use crate::base::owner::Owner;
use crate::base::wait::{Wait, WaitError};
use crate::manager::hold::Hold;
use crate::sys::failpoint::step;
use crate::sys::fork::ProcessId;
use crate::sys::layout::Cell;

/// A lock of the table.
#[derive(Clone, Copy, Debug)]
pub(in crate::manager) struct ShmLock {
    pub(super) table: &'static Attached,
    pub(super) cell: &'static Cell,
    pub(super) id: u32,
}

/// A held lock of the table. Its fields have the same width, because processors stall on a read of
/// what was just written in several parts.
#[derive(Debug)]
pub(in crate::manager) struct ShmHold {
    cell: &'static Cell,
    /// The owner, in the upper half, and the number of the acquisition.
    owner_and_acquisition: u64,
    /// Identifies the process that holds the lock, because a forked child has a copy; or
    /// [`RELEASED`](Self::RELEASED).
    process: u64,
}

impl ShmLock {
    pub(in crate::manager) fn id(&self) -> u32 {
        self.id
    }

    pub(in crate::manager) fn free(&self) -> Result<()> {
        match self.table.bitmap().free(self.id) {
            true => Ok(()),
            false => Err(ErrorKind::NotAllocated {
                lock: self.describe(),
            }
            .into()),
        }
    }

    /// Acquires the lock if it is free and no slow path is needed.
    #[inline]
    pub(in crate::manager) fn acquire_free(&self, wait: &Wait) -> Option<ShmHold> {
        let owner = self.table.known_own_number()?;
        (wait.is_bare() && raw_lock::acquire_free(&self.cell.word, owner))
            .then(|| self.begin(owner))
    }

    pub(in crate::manager) fn acquire(
        &self,
        wait: &Wait,
    ) -> Result<(ShmHold, Option<Box<Recovered>>)> {
        wait.check(self)?;
        let owner = self.table.own_number()?;
        let acquired = match raw_lock::acquire_free(&self.cell.word, owner) {
            true => Acquired::Free,
            false => self.acquire_held(owner, wait)?,
        };
        let recovered = match acquired {
            Acquired::Free => None,
            Acquired::FromDead(died) => Some(self.recovered(died)),
        };
        Ok((self.begin(owner), recovered))
    }

    /// Records the acquisition. Only the holder writes this, and the lock makes the writes visible
    /// to the next holder.
    #[inline]
    fn begin(&self, owner: u32) -> ShmHold {
        step("lock word acquired");
        let acquisition = self
            .cell
            .acquisition
            .load(Ordering::Relaxed)
            .wrapping_add(1);
        self.cell.acquisition.store(acquisition, Ordering::Relaxed);
        self.cell
            .acquired_at
            .store(nanos(ClockId::RealtimeCoarse), Ordering::Relaxed);
        step("acquisition recorded");
        ShmHold::new(self.cell, owner, acquisition)
    }

    #[cold]
    fn acquire_held(&self, owner: u32, wait: &Wait) -> Result<Acquired> {
        let word = &self.cell.word;
        let is_dead = |owner| self.table.is_dead(owner);
        let Some(wait_state) = wait.state_for(self) else {
            return raw_lock::acquire_now(word, owner, is_dead).ok_or_else(|| self.held());
        };
        let mut waiter = ShmWaiter::new(self.table, self.cell, &wait_state);
        raw_lock::acquire(word, owner, &mut waiter).or_else(|stopped| match stopped {
            // After its timeout the waiter tries once more. It may acquire a lock that is kept for
            // waiters.
            SleepError::Wait(WaitError::TimedOut) => raw_lock::acquire_now(word, owner, is_dead)
                .ok_or_else(|| wait_state.error(WaitError::TimedOut, self)),
            SleepError::Wait(reason) => Err(wait_state.error(reason, self)),
            SleepError::Io(error) => Err(Error::io("wait on a lock of", &self.table.path, error)),
        })
    }

    #[cold]
    fn recovered(&self, died: u32) -> Box<Recovered> {
        let owner = self.table.owner(died).map(|owner| self.with_time(owner));
        Box::new(Recovered::new(owner))
    }

    fn with_time(&self, mut owner: Owner) -> Owner {
        owner.acquired = match self.cell.acquired_at.load(Ordering::Relaxed) {
            0 => None,
            since => SystemTime::UNIX_EPOCH.checked_add(Duration::from_nanos(since)),
        };
        owner
    }

    /// Returns the holder of the lock, unless it has died.
    pub(super) fn living_owner(&self, known: &mut HashMap<u32, Option<Owner>>) -> Option<Owner> {
        let held_by = self.cell.word.load(Ordering::Acquire) & OWNER;
        if held_by == raw_lock::FREE {
            return None;
        }
        let read = || {
            if self.table.is_dead(held_by) {
                None
            } else {
                self.table.owner(held_by)
            }
        };
        let owner = known
            .entry(held_by)
            .or_insert_with(read)
            .clone()
            .map(|owner| self.with_time(owner));
        owner.filter(|_| self.cell.word.load(Ordering::Acquire) & OWNER == held_by)
    }

    pub(in crate::manager) fn unlock(&self) -> Result<()> {
        let owner = self.table.own_number()?;
        if self.cell.word.load(Ordering::Relaxed) & OWNER != owner {
            return Err(self.not_locked());
        }
        // The guard of this acquisition must not release the lock of a later one.
        let acquisition = self
            .cell
            .acquisition
            .load(Ordering::Relaxed)
            .wrapping_add(1);
        self.cell.acquisition.store(acquisition, Ordering::Relaxed);
        ShmHold::new(self.cell, owner, acquisition).release()
    }

    #[cold]
    fn not_locked(&self) -> Error {
        ErrorKind::NotLocked {
            lock: self.describe(),
        }
        .into()
    }
}

impl ShmHold {
    /// A value that is the number of no process.
    const RELEASED: u64 = u64::MAX;

    #[inline]
    fn new(cell: &'static Cell, owner: u32, acquisition: u32) -> Self {
        let owner_and_acquisition = u64::from(owner) << 32 | u64::from(acquisition);
        Self {
            cell,
            owner_and_acquisition,
            process: ProcessId::known().number().into(),
        }
    }

    /// Releases the lock, once, in the process that acquired it.
    #[inline]
    pub(in crate::manager) fn release(&mut self) -> Result<()> {
        if self.process != u64::from(ProcessId::known().number()) {
            return Ok(());
        }
        self.process = Self::RELEASED;
        let (owner, acquisition) = (
            (self.owner_and_acquisition >> 32) as u32,
            self.owner_and_acquisition as u32,
        );
        let is_current = self.cell.acquisition.load(Ordering::Relaxed) == acquisition;
        if is_current {
            // If the next holder is killed before it records its time, it must not have this
            // holder's time.
            self.cell.acquired_at.store(0, Ordering::Relaxed);
        }
        // By value, here and below: a guard whose address is never taken can stay in registers.
        match is_current && raw_lock::release(&self.cell.word, owner, self.cell) {
            true => Ok(()),
            false => Err(Self::not_locked(self.cell)),
        }
    }

    #[cold]
    fn not_locked(cell: &'static Cell) -> Error {
        match attach::table_of(cell) {
            Some((table, id)) => ShmLock { table, cell, id }.not_locked(),
            None => ErrorKind::NotLocked {
                lock: "a lock of a lock table".to_owned(),
            }
            .into(),
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

impl Hold for ShmHold {
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
