//! Windows has no fork, and its handles are inherited by nobody who is not told to: nothing to shield.

use std::ops::Deref;
use std::os::windows::io::OwnedHandle;

/// A handle that holds a lock.
#[derive(Debug)]
pub(crate) struct Shielded<T = OwnedHandle>(T);

impl<T> Shielded<T> {
    pub(crate) fn new<E>(make: impl FnOnce() -> Result<T, E>) -> Result<Self, E> {
        make().map(Self)
    }

    pub(crate) fn unshield(self) -> T {
        self.0
    }
}

impl<T> Deref for Shielded<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// Holds nothing off.
#[derive(Debug)]
pub(crate) struct NoFork(());

impl NoFork {
    pub(crate) fn hold() -> Self {
        Self(())
    }
}

/// Which process this is, counted in forks: none.
#[inline]
pub(crate) fn generation() -> u32 {
    0
}
