//! The types of a lock in shared memory, without values.

use crate::base::error::Result;
use crate::base::guard::Recovered;
use crate::base::lock_info::LockInfo;
use crate::base::owner::Owner;
use crate::base::wait::Wait;
use crate::manager::hold::Hold;

/// A type without values.
#[derive(Clone, Copy, Debug)]
pub(in crate::manager) enum Never {}

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

    pub(in crate::manager) fn acquire(
        &self,
        _wait: &Wait,
    ) -> Result<(ShmHold, Option<Box<Recovered>>)> {
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

impl Hold for ShmHold {
    fn release(&mut self) -> Result<()> {
        match self.0 {}
    }
}
