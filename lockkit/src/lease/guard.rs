//! The guard of a held lease.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::lost_signal::LostSignal;
use super::shared::Held;
#[cfg(feature = "tokio")]
use crate::base::blocking;
use crate::base::error::Result;
use crate::base::guard::{Guard, Recovered};

/// A held [`Lease`](super::Lease). Dropping the guard releases the lease, and waits for the store
/// for a quarter of the ttl, at most 250 ms. A file on a mount that hangs has no such limit. But if
/// a request is known to hang already, the drop leaves the release to the heartbeat.
///
/// A guard is held until its lease is lost, and a lost lease stays lost. When the guard of a lost
/// lease is dropped, it frees the name as far as that is possible at once, so that waiters stop
/// waiting. The next owner then learns that the lease was not released. A forked child's copy of a
/// guard is not held, and dropping it does nothing. The lease of a leaked guard (`mem::forget`) is
/// renewed until the process ends.
///
/// All methods may be called from any thread. Only dropping and releasing access the store.
///
/// ```
/// # fn main() -> lockkit::Result<()> {
/// # let path = std::env::temp_dir().join(format!("lockkit-doc-lease-guard-{}", std::process::id()));
/// let guard = lockkit::Lease::file(&path).build()?.lock()?;
/// guard.check()?; // Returns the reason as an error if the lease is lost.
/// assert!(guard.is_held() && guard.remaining() <= std::time::Duration::from_secs(3)); // The default ttl.
/// guard.release()?;
/// # std::fs::remove_file(path).unwrap();
/// # Ok(()) }
/// ```
#[must_use = "a guard that is dropped at once releases its lock at once; bind it to a name such as `_guard`"]
pub struct LeaseGuard {
    held: Arc<Held>,
    recovered: Option<Box<Recovered>>,
}

impl LeaseGuard {
    pub(super) fn new(held: Arc<Held>, recovered: Option<Box<Recovered>>) -> Self {
        Self { held, recovered }
    }

    /// Returns the fencing token: greater than the token of every earlier owner of this lease. Send
    /// it with each write to the resource that the lease guards. That resource must refuse a token
    /// lower than the highest token that it has seen.
    pub fn token(&self) -> u64 {
        self.held.token()
    }

    /// Returns whether the lease is held now. The result depends on the clock and not only on the
    /// last heartbeat: the first call after the time is over finds the lease lost. A call takes
    /// some 50 ns.
    pub fn is_held(&self) -> bool {
        self.held.check().is_ok()
    }

    /// Returns how long the lease lasts if it is not renewed; zero once it is lost.
    pub fn remaining(&self) -> Duration {
        self.held.remaining()
    }

    /// Checks [`is_held`](Self::is_held), for use with `?`.
    ///
    /// # Errors
    /// [`LeaseLost`](crate::ErrorKind::LeaseLost) with the reason if the lease is not held any
    /// more.
    pub fn check(&self) -> Result<()> {
        self.held
            .check()
            .map_err(|reason| self.held.loss_error(reason))
    }

    /// Returns a signal of the loss, which other code can watch. The signal outlives the guard.
    ///
    /// ```
    /// # fn main() -> lockkit::Result<()> {
    /// # let path = std::env::temp_dir().join(format!("lockkit-doc-lease-lost-{}", std::process::id()));
    /// use lockkit::{Lease, LossReason, Wait};
    /// let guard = Lease::file(&path).build()?.lock()?;
    /// let lost = guard.lost();
    /// let watcher = std::thread::spawn(move || lost.wait(&Wait::forever()));
    /// drop(guard);
    /// assert!(matches!(watcher.join().unwrap()?, LossReason::Released));
    /// # std::fs::remove_file(path).unwrap();
    /// # Ok(()) }
    /// ```
    pub fn lost(&self) -> LostSignal {
        LostSignal::new(self.held.clone())
    }

    /// Reports that the work makes progress. With
    /// [`require_progress`](super::LeaseBuilder::require_progress) the lease is renewed only while
    /// this is called often enough.
    pub fn progress(&self) {
        self.held.progress();
    }

    /// Releases the lease now, and returns an error if that fails.
    ///
    /// # Errors
    /// - [`LeaseLost`](crate::ErrorKind::LeaseLost) if the lease was lost before.
    /// - [`Io`](crate::ErrorKind::Io) or [`Store`](crate::ErrorKind::Store) if the release at the
    ///   store failed. The heartbeat then repeats the release until the lease expires.
    pub fn release(self) -> Result<()> {
        self.held.release()
    }

    /// Releases the lease as [`release`](Self::release) does, without blocking the thread. Dropping
    /// the guard in a task blocks the task for as long as the store takes: a quarter of the ttl or
    /// 250 ms at most. The limit also holds when a renewal is under way. The release runs on a
    /// thread of its own. The release also completes when the future is dropped after its first
    /// poll.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> lockkit::Result<()> {
    /// # let path = std::env::temp_dir().join(format!("lockkit-doc-lease-async-{}", std::process::id()));
    /// use lockkit::{Lease, Wait};
    /// let guard = Lease::file(&path).build()?.acquire_async(&Wait::forever()).await?;
    /// guard.release_async().await?;
    /// # std::fs::remove_file(path).unwrap();
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`release`](Self::release), and [`Io`](crate::ErrorKind::Io) if no thread can be started.
    /// In that case the calling thread releases the lease.
    #[cfg(feature = "tokio")]
    #[cfg_attr(docsrs, doc(cfg(feature = "tokio")))]
    pub async fn release_async(self) -> Result<()> {
        let held = self.held.clone();
        blocking::run_on_thread(&*held, move || self.release()).await
    }

    /// Returns `Some` if the previous owner did not release: it died, was silent for its ttl, or
    /// its record was damaged. The value names that owner, if it is known. That owner may be alive,
    /// and may never have learned that it had the lease.
    pub fn recovered(&self) -> Option<&Recovered> {
        self.recovered.as_deref()
    }
}

impl Guard for LeaseGuard {
    fn release(self) -> Result<()> {
        self.release()
    }

    fn recovered(&self) -> Option<&Recovered> {
        self.recovered()
    }
}

impl Drop for LeaseGuard {
    fn drop(&mut self) {
        // A lease that could not be released expires.
        let _ = self.held.release();
    }
}

impl fmt::Debug for LeaseGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("LeaseGuard");
        shown
            .field("name", &self.held.name())
            .field("token", &self.token())
            .field("remaining", &self.remaining());
        shown
            .field("recovered", &self.recovered)
            .finish_non_exhaustive()
    }
}
