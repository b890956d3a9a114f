//! A place for one value. Any thread can put the value there or take it without waiting.
//!
//! Each operation is one atomic exchange; a mutex takes two. A fork cannot leave it locked.

use std::fmt;
use std::marker::PhantomData;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Empty, or a boxed value.
pub(crate) struct AtomicBox<T> {
    /// Null, or from `Box::into_raw`.
    value: AtomicPtr<T>,
    owns: PhantomData<Box<T>>,
}

impl<T> AtomicBox<T> {
    pub(crate) const fn empty() -> Self {
        Self {
            value: AtomicPtr::new(ptr::null_mut()),
            owns: PhantomData,
        }
    }

    /// Takes the value.
    pub(crate) fn take(&self) -> Option<Box<T>> {
        let value = self.value.swap(ptr::null_mut(), Ordering::Acquire);
        // SAFETY: a pointer that is not null came from `Box::into_raw` in `put`, and the swap gave
        // it to this call alone.
        (!value.is_null()).then(|| unsafe { Box::from_raw(value) })
    }

    /// Stores a value, or drops it if there is one already.
    pub(crate) fn put(&self, value: Box<T>) {
        let value = Box::into_raw(value);
        if self
            .value
            .compare_exchange(ptr::null_mut(), value, Ordering::Release, Ordering::Relaxed)
            .is_err()
        {
            // SAFETY: the exchange failed, so only this call has the pointer that `Box::into_raw`
            // just made.
            drop(unsafe { Box::from_raw(value) });
        }
    }
}

impl<T> Drop for AtomicBox<T> {
    fn drop(&mut self) {
        drop(self.take());
    }
}

impl<T> fmt::Debug for AtomicBox<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AtomicBox").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn value_is_taken_once_and_second_is_dropped() {
        let (first, second) = (Arc::new(1), Arc::new(2));
        let value = AtomicBox::empty();
        assert!(value.take().is_none());
        value.put(Box::new(first.clone()));
        value.put(Box::new(second.clone()));
        assert_eq!(Arc::strong_count(&second), 1);
        assert_eq!(value.take(), Some(Box::new(first.clone())));
        assert!(value.take().is_none());
        value.put(Box::new(first.clone()));
        drop(value);
        assert_eq!(Arc::strong_count(&first), 1);
    }
}
