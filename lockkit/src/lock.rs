//! The words that every lock shares.

use std::time::Duration;

use crate::error::Result;
use crate::owner::Owner;
use crate::wait::Wait;

/// Something that one owner at a time can hold, whichever thread or process it lives in.
///
/// Every type has these four methods of its own as well, so the trait is needed only by code that works with any
/// lock.
///
/// ```
/// use lockkit::{Lock, NamedLock, Result};
///
/// fn exclusively<L: Lock, T>(lock: &L, work: impl FnOnce() -> T) -> Result<T> {
///     let _guard = lock.lock()?; // Or `lock.acquire(&wait)?`, which all others come down to.
///     Ok(work())
/// }
/// # fn main() -> Result<()> {
/// assert_eq!(exclusively(&NamedLock::new("lockkit-doc-lock")?, || 42)?, 42);
/// # Ok(()) }
/// ```
pub trait Lock {
    /// What holding the lock is; dropping it releases.
    type Guard: Guard;

    /// Takes the lock, waiting as `wait` says.
    ///
    /// # Errors
    /// [`Held`](crate::ErrorKind::Held), [`Timeout`](crate::ErrorKind::Timeout) or
    /// [`Cancelled`](crate::ErrorKind::Cancelled) as `wait` has it, and what the kind of lock adds.
    fn acquire(&self, wait: &Wait) -> Result<Self::Guard>;

    /// Takes the lock if it is free now.
    ///
    /// # Errors
    /// [`Held`](crate::ErrorKind::Held) when it is not, and what [`acquire`](Self::acquire) adds.
    #[inline]
    fn try_lock(&self) -> Result<Self::Guard> {
        self.acquire(&Wait::none())
    }

    /// Takes the lock, waiting for it as long as it takes.
    ///
    /// # Errors
    /// Those that the kind of lock adds to [`acquire`](Self::acquire).
    #[inline]
    fn lock(&self) -> Result<Self::Guard> {
        self.acquire(&Wait::forever())
    }

    /// Takes the lock, waiting for it at most `limit`.
    ///
    /// # Errors
    /// [`Timeout`](crate::ErrorKind::Timeout) when it was still held then, and what [`acquire`](Self::acquire) adds.
    fn lock_for(&self, limit: Duration) -> Result<Self::Guard> {
        self.acquire(&Wait::at_most(limit))
    }
}

/// A held lock. It owns all it needs, so it can be kept in a struct, held across `.await` and dropped on any thread.
#[must_use = "a guard that is dropped at once releases its lock at once; bind it to a name such as `_guard`"]
pub trait Guard: Send {
    /// Releases now and says what went wrong, which dropping cannot.
    ///
    /// # Errors
    /// What the kind of lock says. The lock is released all the same.
    fn release(self) -> Result<()>;

    /// Whether the previous owner died holding the lock, and who that was where it is known. What the lock protects
    /// may then be half done.
    fn recovered(&self) -> Option<&Recovered>;
}

/// The previous owner of a lock died holding it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    owner: Option<Owner>,
}

impl Recovered {
    pub(crate) fn new(owner: Option<Owner>) -> Self {
        Self { owner }
    }

    /// The owner that died, where something still told who it was.
    pub fn owner(&self) -> Option<&Owner> {
        self.owner.as_ref()
    }
}

/// For people: `pid 4242 (backup), since 2026-11-20 17:03:11 UTC (42 s ago)`, or `an unknown process`.
impl std::fmt::Display for Recovered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.owner {
            Some(owner) => f.write_str(&owner.describe()),
            None => f.write_str("an unknown process"),
        }
    }
}

/// Gives a lock type the methods of [`Lock`] and `AsyncLock` as its own, on top of an inherent `acquire` and a private
/// `take_async`. `in_tasks` says how that waits.
macro_rules! lock_methods {
    ($lock:ty, $guard:ty, in_tasks: $in_tasks:expr) => {
        impl $lock {
            /// Takes the lock if it is free now.
            ///
            /// # Errors
            /// [`Held`](crate::ErrorKind::Held) when it is not, and what [`acquire`](Self::acquire) adds.
            #[inline]
            pub fn try_lock(&self) -> $crate::Result<$guard> {
                $crate::Lock::try_lock(self)
            }

            /// Takes the lock, waiting for it as long as it takes.
            ///
            /// # Errors
            /// Those that [`acquire`](Self::acquire) adds.
            #[inline]
            pub fn lock(&self) -> $crate::Result<$guard> {
                $crate::Lock::lock(self)
            }

            /// Takes the lock, waiting for it at most `limit`.
            ///
            /// # Errors
            /// [`Timeout`](crate::ErrorKind::Timeout) when it was still held then, and what
            /// [`acquire`](Self::acquire) adds.
            #[inline]
            pub fn lock_for(&self, limit: std::time::Duration) -> $crate::Result<$guard> {
                $crate::Lock::lock_for(self, limit)
            }
        }

        #[cfg(feature = "tokio")]
        impl $lock {
            /// As [`acquire`](Self::acquire), in a task: the thread is free for others while this one waits.
            ///
            #[doc = $in_tasks]
            ///
            /// Dropping the future gives up: this process does not keep the lock any more, and nothing stays behind.
            /// Only a lease may yet be granted by a request under way, and is released again.
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
            /// As [`acquire`](Self::acquire), and as it says above.
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
