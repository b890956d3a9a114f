//! The native backend of systems that have none: types without values. Named locks are files there.

use super::options::Backend;
use crate::base::error::Result;
use crate::base::guard::Recovered;
use crate::base::lock_info::LockInfo;
use crate::base::owner::Owner;
use crate::base::runtime_dir::Sharing;
use crate::base::wait::Wait;

/// The backend that [`Backend::Auto`] selects.
pub(super) const NATIVE: Backend = Backend::File;

/// A type without values.
#[derive(Debug)]
enum Never {}

#[derive(Debug)]
pub(super) struct NativeLock(Never);

#[derive(Debug)]
pub(super) struct NativeHold(Never);

impl NativeLock {
    pub(super) fn new(_name: &str, _sharing: Sharing) -> Result<Self> {
        unreachable!("no backend of this system is a native one")
    }

    pub(super) fn list(_sharing: Sharing) -> Result<Vec<(String, Option<Owner>, u32)>> {
        Ok(Vec::new())
    }

    pub(super) fn acquire(
        &self,
        _: &Wait,
        _: &dyn LockInfo,
    ) -> Result<(NativeHold, Option<Box<Recovered>>)> {
        match self.0 {}
    }

    pub(super) fn release(&self, hold: NativeHold) -> Result<()> {
        match hold.0 {}
    }

    pub(super) fn name_holder(&self, _owner: &Owner) {
        match self.0 {}
    }

    pub(super) fn waiters(&self) -> Result<u32> {
        match self.0 {}
    }

    pub(super) fn is_held(&self) -> Result<bool> {
        match self.0 {}
    }

    pub(super) fn owner(&self) -> Result<Option<Owner>> {
        match self.0 {}
    }
}

impl NativeHold {
    pub(super) fn descriptor(&self) -> std::io::Result<std::os::fd::OwnedFd> {
        match self.0 {}
    }
}
