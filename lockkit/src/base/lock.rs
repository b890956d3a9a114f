//! The trait of locks, and the methods that all locks share.

use std::time::Duration;

use crate::base::error::Result;
use crate::base::guard::Guard;
use crate::base::wait::Wait;

/// A lock that one owner at a time can hold, in any thread or process.
///
/// Every lock type also has these four methods itself, so only code that works with any lock needs
/// the trait.
///
/// ```
/// use lockkit::{Lock, NamedLock, Result};
///
/// fn exclusively<L: Lock, T>(lock: &L, work: impl FnOnce() -> T) -> Result<T> {
///     let _guard = lock.lock()?; // Or `lock.acquire(&wait)?`, on which the others are built.
///     Ok(work())
/// }
/// # fn main() -> Result<()> {
/// assert_eq!(exclusively(&NamedLock::new("lockkit-doc-lock")?, || 42)?, 42);
/// # Ok(()) }
/// ```
pub trait Lock {
    /// The guard of a held lock; dropping it releases.
    type Guard: Guard;

    /// Acquires the lock, waiting as `wait` says.
    ///
    /// # Errors
    /// [`Held`](crate::ErrorKind::Held), [`Timeout`](crate::ErrorKind::Timeout) or
    /// [`Cancelled`](crate::ErrorKind::Cancelled), as `wait` says, and those that the kind of lock
    /// adds.
    fn acquire(&self, wait: &Wait) -> Result<Self::Guard>;

    /// Acquires the lock if it is free now.
    ///
    /// # Errors
    /// [`Held`](crate::ErrorKind::Held) if it is not, and those that [`acquire`](Self::acquire)
    /// adds.
    #[inline]
    fn try_lock(&self) -> Result<Self::Guard> {
        self.acquire(&Wait::none())
    }

    /// Acquires the lock, waiting without a limit.
    ///
    /// # Errors
    /// Those that the kind of lock adds to [`acquire`](Self::acquire).
    #[inline]
    fn lock(&self) -> Result<Self::Guard> {
        self.acquire(&Wait::forever())
    }

    /// Acquires the lock, waiting at most `limit`.
    ///
    /// # Errors
    /// [`Timeout`](crate::ErrorKind::Timeout) if it was still held then, and those that
    /// [`acquire`](Self::acquire) adds.
    fn lock_for(&self, limit: Duration) -> Result<Self::Guard> {
        self.acquire(&Wait::at_most(limit))
    }
}

/// Implements the methods of [`Lock`] and `AsyncLock` on a lock type, from an inherent `acquire`
/// and a private `take_async`. `in_tasks` documents how the latter waits.
macro_rules! lock_methods {
    ($lock:ty, $guard:ty, in_tasks: $in_tasks:expr) => {
        impl $lock {
            /// Acquires the lock if it is free now.
            ///
            /// # Errors
            /// [`Held`](crate::ErrorKind::Held) if it is not, and those that
            /// [`acquire`](Self::acquire) adds.
            #[inline]
            pub fn try_lock(&self) -> $crate::Result<$guard> {
                $crate::Lock::try_lock(self)
            }

            /// Acquires the lock, waiting without a limit.
            ///
            /// # Errors
            /// Those that [`acquire`](Self::acquire) adds.
            #[inline]
            pub fn lock(&self) -> $crate::Result<$guard> {
                $crate::Lock::lock(self)
            }

            /// Acquires the lock, waiting at most `limit`.
            ///
            /// # Errors
            /// [`Timeout`](crate::ErrorKind::Timeout) if it was still held then, and those that
            /// [`acquire`](Self::acquire) adds.
            #[inline]
            pub fn lock_for(&self, limit: std::time::Duration) -> $crate::Result<$guard> {
                $crate::Lock::lock_for(self, limit)
            }
        }

        #[cfg(feature = "tokio")]
        impl $lock {
            /// Acquires as [`acquire`](Self::acquire), in a task: other tasks can use the thread
            /// during the wait.
            ///
            #[doc = $in_tasks]
            ///
            /// Dropping the future gives up: this process does not keep the lock, and no resources
            /// stay behind. Only a lease may still be granted by a request in flight; it is then
            /// released.
            ///
            /// ```
            /// use std::time::Duration;
            /// use lockkit::{NamedLock, Wait};
            /// # #[tokio::main(flavor = "current_thread")]
            /// # async fn main() -> lockkit::Result<()> {
            /// let lock = NamedLock::new("lockkit-doc-acquire-async")?;
            /// let guard = lock.acquire_async(&Wait::at_most(Duration::from_secs(5))).await?;
            /// // Guards are held across `.await`.
            /// tokio::task::yield_now().await;
            /// # Ok(()) }
            /// ```
            ///
            /// # Errors
            /// As [`acquire`](Self::acquire), and those named above.
            #[cfg_attr(docsrs, doc(cfg(feature = "tokio")))]
            pub async fn acquire_async(&self, wait: &$crate::Wait) -> $crate::Result<$guard> {
                self.take_async(wait).await
            }
        }

        #[cfg(feature = "tokio")]
        impl $crate::AsyncLock for $lock {
            async fn acquire_async(&self, wait: &$crate::Wait) -> $crate::Result<$guard> {
                self.take_async(wait).await
            }
        }

        impl $crate::Lock for $lock {
            type Guard = $guard;

            #[inline]
            fn acquire(&self, wait: &$crate::Wait) -> $crate::Result<$guard> {
                self.acquire(wait)
            }
        }
    };
}
pub(crate) use lock_methods;
