//! A value of which each process has its own, also one that was forked.
//!
//! A forked child gets a fresh one at its first use. What it inherited may have been locked by a thread that it does
//! not have, so it is neither touched nor dropped: it is left where it is, once for each fork that is followed by a
//! use.

use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use super::fork;

/// One for each process, made when it is first asked for.
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
                // SAFETY: just made by `Box::into_raw`, and nobody ever frees it.
                Ok(_) => return unsafe { &(*fresh).1 },
                Err(first) => {
                    // SAFETY: `fresh` comes from `Box::into_raw` above and was shared with nobody.
                    drop(unsafe { Box::from_raw(fresh) });
                    current = first;
                }
            }
        }
    }
}
