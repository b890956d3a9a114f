//! Windows has no fork, and a child inherits a handle only on request: there is nothing to guard.

use std::io;
use std::ops::Deref;
use std::os::windows::io::OwnedHandle;

/// A handle that holds a lock.
#[derive(Debug)]
pub(crate) struct ForkGuarded<T = OwnedHandle>(T);

impl<T> ForkGuarded<T> {
    pub(crate) fn new<E>(make: impl FnOnce() -> Result<T, E>) -> Result<Self, E> {
        make().map(Self)
    }

    pub(crate) fn keep_across_fork(self) -> Self {
        self
    }

    pub(crate) fn know(self) -> Self {
        self
    }

    pub(crate) fn know_as(self, _: (u64, u64)) -> Self {
        self
    }

    /// A program that closes the guard's handle is at fault; Windows reports it to a debugger.
    pub(crate) fn is_own(&self) -> bool {
        true
    }
}

impl<T> Deref for ForkGuarded<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// Makes a handle for the caller's own use.
#[allow(dead_code)] // As on the other systems.
pub(crate) fn unguarded<T, E>(make: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    make()
}

/// Returns the error of a release whose handle is not its own any more, which never happens.
pub(crate) fn closed_by_program() -> io::Error {
    io::Error::other("this process has closed the handle of the lock, and so released it earlier")
}

/// Delays nothing.
#[derive(Debug)]
pub(crate) struct NoFork(());

impl NoFork {
    pub(crate) fn hold() -> Self {
        Self(())
    }
}

/// A process. A Windows process has no forks to be distinguished from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ProcessId(());

impl ProcessId {
    #[inline]
    pub(crate) fn current() -> Self {
        Self(())
    }

    #[inline]
    pub(crate) fn is_current(self) -> bool {
        true
    }
}
