//! A value of which each process, also a forked one, has its own.
//!
//! A forked child makes a new value at its first use, and neither touches nor drops the inherited
//! one: another thread of the parent may have locked it, or dropping it may affect the parent. So
//! the inherited value leaks, once for each fork that is followed by a use.
//!
//! All operations are sequentially consistent. A thread that makes a value and then reads a flag,
//! and a thread that sets the flag and then gets the value, do not both miss the other's write.

use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use super::fork::ProcessId;

/// One value for each process, made at its first use.
pub(crate) struct ProcessLocal<T> {
    /// Null, or from `Box::into_raw`, with the process that made the value. No value is freed
    /// before `self` is dropped.
    current: AtomicPtr<(ProcessId, T)>,
}

impl<T> ProcessLocal<T> {
    pub(crate) const fn new() -> Self {
        Self {
            current: AtomicPtr::new(ptr::null_mut()),
        }
    }
}

impl<T> Default for ProcessLocal<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Send + Sync> ProcessLocal<T> {
    /// Returns this process's value, if it is made.
    pub(crate) fn get(&self) -> Option<&T> {
        self.own(self.current.load(Ordering::SeqCst))
    }

    /// Returns this process's value, and makes it at the first use. If several threads make one,
    /// one value stays and the others are dropped.
    pub(crate) fn get_or_make(&self, make: impl FnOnce() -> T) -> &T {
        let made = self.get_or_try_make(|_| true, || Ok::<_, std::convert::Infallible>(make()));
        made.unwrap_or_else(|never| match never {})
    }

    /// Returns this process's value as [`get_or_make`](Self::get_or_make) does, and replaces a
    /// value that is not good. A replaced value leaks, because other threads may still use it.
    pub(crate) fn get_or_try_make<E>(
        &self,
        is_good: impl Fn(&T) -> bool,
        make: impl FnOnce() -> Result<T, E>,
    ) -> Result<&T, E> {
        let mut current = self.current.load(Ordering::SeqCst);
        if let Some(value) = self.own(current).filter(|value| is_good(value)) {
            return Ok(value);
        }
        let fresh = Box::into_raw(Box::new((ProcessId::current(), make()?)));
        loop {
            match self
                .current
                .compare_exchange(current, fresh, Ordering::SeqCst, Ordering::SeqCst)
            {
                // SAFETY: from `Box::into_raw` above. Values live as long as `self`, which is
                // borrowed.
                Ok(_) => return Ok(unsafe { &(*fresh).1 }),
                Err(other) => current = other,
            }
            if let Some(value) = self.own(current).filter(|value| is_good(value)) {
                // SAFETY: `fresh` comes from `Box::into_raw` above and was not shared.
                drop(unsafe { Box::from_raw(fresh) });
                return Ok(value);
            }
        }
    }

    fn own(&self, current: *mut (ProcessId, T)) -> Option<&T> {
        // SAFETY: null, or from `Box::into_raw` and shared only by reference. Values live as long
        // as `self`.
        let (maker, value) = unsafe { current.as_ref() }?;
        maker.is_current().then_some(value)
    }
}

impl<T> Drop for ProcessLocal<T> {
    fn drop(&mut self) {
        let current = *self.current.get_mut();
        // SAFETY: null, or from `Box::into_raw`, and nothing refers to it any more.
        if unsafe { current.as_ref() }.is_some_and(|(maker, _)| maker.is_current()) {
            // SAFETY: as above. The value is freed once, because `self` is being dropped.
            drop(unsafe { Box::from_raw(current) });
        }
    }
}
