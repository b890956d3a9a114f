//! A value of which each process, also a forked one, has its own.
//!
//! A forked child makes a new value at its first use. The inherited value may have been locked by a thread that the
//! child does not have. So the child neither touches nor drops it. The inherited value leaks once for each fork that is
//! followed by a use.

use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use super::fork;

/// One value for each process, made at its first use.
pub(crate) struct PerProcess<T: 'static> {
    /// Null, or leaked by `get`; with the fork generation that it belongs to.
    current: AtomicPtr<(u32, T)>,
}

impl<T: Send + Sync + 'static> PerProcess<T> {
    pub(crate) const fn new() -> Self {
        Self { current: AtomicPtr::new(ptr::null_mut()) }
    }

    pub(crate) fn get(&self, make: impl Fn() -> T) -> &'static T {
        let generation = fork::generation();
        let mut current = self.current.load(Ordering::Acquire);
        loop {
            // SAFETY: null, or leaked below, and so alive for ever and shared only by reference.
            match unsafe { current.as_ref() } {
                Some((made, value)) if *made == generation => return value,
                _ => {}
            }
            let fresh = Box::into_raw(Box::new((generation, make())));
            match self.current.compare_exchange(current, fresh, Ordering::AcqRel, Ordering::Acquire) {
                // SAFETY: just made by `Box::into_raw`, and never freed.
                Ok(_) => return unsafe { &(*fresh).1 },
                Err(first) => {
                    // SAFETY: `fresh` comes from `Box::into_raw` above and was not shared.
                    drop(unsafe { Box::from_raw(fresh) });
                    current = first;
                }
            }
        }
    }
}
