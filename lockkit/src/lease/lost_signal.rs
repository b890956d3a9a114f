//! The signal of the loss of a lease, which outlives the guard.

use std::fmt;
use std::sync::Arc;

use super::shared::Held;
#[cfg(feature = "tokio")]
use crate::base::blocking;
use crate::base::cancel::CancelToken;
use crate::base::error::{LossReason, Result};
use crate::base::lock_info::LockInfo;
use crate::base::wait::{Wait, WaitState};
use crate::sys::fd::AsFd;

/// A signal of the loss of a lease, or of its release. Clones are the same signal, and all outlive
/// the guard.
///
/// ```
/// # fn main() -> lockkit::Result<()> {
/// # let path = std::env::temp_dir().join(format!("lockkit-doc-lost-signal-{}", std::process::id()));
/// use lockkit::lease::LossReason;
/// let guard = lockkit::Lease::file(&path).build()?.lock()?;
/// let lost = guard.lost();
/// assert!(!lost.is_lost() && lost.reason().is_none());
/// guard.release()?;
/// assert!(matches!(lost.reason(), Some(LossReason::Released)));
/// # std::fs::remove_file(path).unwrap();
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct LostSignal(Arc<Held>);

impl LostSignal {
    pub(super) fn new(held: Arc<Held>) -> Self {
        Self(held)
    }

    /// Returns whether the lease is not held any more, by the clock, as
    /// [`is_held`](super::LeaseGuard::is_held) does.
    pub fn is_lost(&self) -> bool {
        self.reason().is_some()
    }

    /// Returns why the lease is not held any more; `None` while it is held.
    pub fn reason(&self) -> Option<LossReason> {
        self.0.check().err()
    }

    /// Returns a token that is cancelled at the loss or the release, to end waits for other locks.
    /// The heartbeat thread cancels the token, or the first other check that finds the lease lost.
    ///
    /// ```
    /// # fn main() -> lockkit::Result<()> {
    /// # let path = std::env::temp_dir().join(format!("lockkit-doc-lease-token-{}", std::process::id()));
    /// use lockkit::{Lease, NamedLock, Wait};
    /// let leader = Lease::file(&path).build()?.lock()?;
    /// // Waits for as long as this process leads.
    /// let wait = Wait::forever().or_cancelled(&leader.lost().token());
    /// let guard = NamedLock::new("lockkit-doc-lease-token")?.acquire(&wait)?;
    /// # drop((guard, leader));
    /// # std::fs::remove_file(path).unwrap();
    /// # Ok(()) }
    /// ```
    pub fn token(&self) -> CancelToken {
        if self.0.is_inherited() {
            let token = CancelToken::new();
            token.cancel();
            return token;
        }
        self.0.end_token().clone()
    }

    /// Waits for the loss or the release, as long as `wait` says.
    ///
    /// # Errors
    /// - [`Timeout`](crate::ErrorKind::Timeout), or [`Held`](crate::ErrorKind::Held) without
    ///   waiting, if the lease is still held by then.
    /// - [`Cancelled`](crate::ErrorKind::Cancelled), as `wait` says.
    /// - [`Io`](crate::ErrorKind::Io) if no descriptor is left to wait with.
    pub fn wait(&self, wait: &Wait) -> Result<LossReason> {
        let held = &self.0;
        let mut wait_state = None;
        loop {
            let wait_state = match self.wait_state(wait, &mut wait_state)? {
                Ok(wait_state) => wait_state,
                Err(reason) => return Ok(reason),
            };
            // The heartbeat may be late in noticing the end.
            let event = held.end_token().event()?;
            if let Err(error) = wait_state.wait(Some(event.as_fd()), held.remaining())? {
                return Err(wait_state.error(error, &**held));
            }
        }
    }

    /// Waits as [`wait`](Self::wait) does, in a task. If nothing else ends the wait, await the
    /// signal itself.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> lockkit::Result<()> {
    /// # let path = std::env::temp_dir().join(format!("lockkit-doc-lease-lost-async-{}", std::process::id()));
    /// use lockkit::{Lease, LossReason, Wait};
    /// let guard = Lease::file(&path).build()?.acquire_async(&Wait::forever()).await?;
    /// let watcher = tokio::spawn(guard.lost().into_future());
    /// guard.release_async().await?;
    /// assert!(matches!(watcher.await.unwrap(), LossReason::Released));
    /// # std::fs::remove_file(path).unwrap();
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`wait`](Self::wait), without `Io`; [`Unsupported`](crate::ErrorKind::Unsupported)
    /// outside of a tokio runtime.
    ///
    /// # Panics
    /// tokio panics if its runtime was built without a timer (`enable_time`).
    ///
    /// ```no_run
    /// # async fn lead() -> lockkit::Result<()> {
    /// use lockkit::Wait;
    /// let guard = lockkit::Lease::file("/srv/shared/leader").build()?.acquire_async(&Wait::forever()).await?;
    /// let reason = guard.lost().wait_async(&Wait::forever()).await?;
    /// println!("leads no more: {reason}");
    /// # Ok(()) }
    /// # fn main() {}
    /// ```
    #[cfg(feature = "tokio")]
    #[cfg_attr(docsrs, doc(cfg(feature = "tokio")))]
    pub async fn wait_async(&self, wait: &Wait) -> Result<LossReason> {
        let held = &self.0;
        let mut wait_state = None;
        loop {
            let wait_state = match self.wait_state(wait, &mut wait_state)? {
                Ok(wait_state) => wait_state,
                Err(reason) => return Ok(reason),
            };
            blocking::check_runtime()?;
            let ended = async {
                held.end_token().cancelled().await;
                Ok(())
            };
            if let Err(error) = wait_state.wait_async(ended, held.remaining()).await? {
                return Err(wait_state.error(error, &**held));
            }
        }
    }

    /// Returns why the lease is not held any more, or the state of the wait for its end.
    fn wait_state<'p>(
        &self,
        wait: &Wait,
        wait_state: &'p mut Option<WaitState>,
    ) -> Result<std::result::Result<&'p WaitState, LossReason>> {
        let held = &self.0;
        if let Err(reason) = held.check() {
            return Ok(Err(reason));
        }
        wait.check(&**held)?;
        match wait_state {
            Some(wait_state) => Ok(Ok(wait_state)),
            none => match wait.state() {
                Some(wait_state) => Ok(Ok(none.insert(wait_state))),
                None => Err(held.held()),
            },
        }
    }
}

/// Waits in a task for the loss or the release.
///
/// ```
/// # async fn example(leader: lockkit::LeaseGuard, work: impl Future<Output = ()> + Unpin) {
/// use tokio::select;
/// select! {
///     () = work => {}
///     reason = leader.lost() => eprintln!("no leader any more: {reason}"),
/// }
/// # }
/// ```
///
/// # Panics
/// tokio panics outside of its runtime, and in a runtime that was built without a timer
/// (`enable_time`).
#[cfg(feature = "tokio")]
#[cfg_attr(docsrs, doc(cfg(feature = "tokio")))]
impl IntoFuture for LostSignal {
    type Output = LossReason;
    type IntoFuture = std::pin::Pin<Box<dyn Future<Output = LossReason> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let held = &self.0;
            while let Ok(()) = held.check() {
                // The heartbeat may be late in noticing the end.
                let _ = tokio::time::timeout(held.remaining(), held.end_token().cancelled()).await;
            }
            held.check().err().unwrap_or(LossReason::Released)
        })
    }
}

impl fmt::Debug for LostSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LostSignal")
            .field("reason", &self.reason())
            .finish_non_exhaustive()
    }
}
