//! Tokens that stop waits early.
//!
//! A token is a flag, an event for threads and a notification for tasks. A forked child inherits
//! the flag, and creates its own event: an inherited event would wake the parent.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::base::error::{Error, Result};
use crate::sys::event::Event;
use crate::sys::process_local::ProcessLocal;

/// Stops waits early, from any thread. Clones are the same token; a cancelled token stays
/// cancelled.
///
/// A token belongs to the process that created it: cancelling a copy in a forked child does not
/// affect the parent.
///
/// ```
/// use lockkit::{CancelToken, NamedLock, Wait};
/// # fn main() -> lockkit::Result<()> {
/// let lock = NamedLock::new("lockkit-doc-cancel")?;
/// let _held = lock.lock()?;
/// let stop = CancelToken::new();
/// let waiter = std::thread::spawn({
///     let (lock, stop) = (lock.clone(), stop.clone());
///     move || lock.acquire(&Wait::forever().or_cancelled(&stop))
/// });
/// stop.cancel();
/// assert!(waiter.join().unwrap().unwrap_err().is_cancelled());
/// # Ok(()) }
/// ```
#[derive(Clone, Default)]
pub struct CancelToken(Arc<TokenState>);

#[derive(Default)]
struct TokenState {
    cancelled: AtomicBool,
    /// The event that threads wait for. The first waiter creates it, so a token without waiters
    /// costs nothing.
    event: ProcessLocal<Event>,
    /// The notification that tasks wait for, created in the same way.
    #[cfg(feature = "tokio")]
    tasks: ProcessLocal<tokio::sync::Notify>,
}

impl CancelToken {
    /// Creates a token that is not cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Wakes all present and future waiters of this token with
    /// [`Cancelled`](crate::ErrorKind::Cancelled).
    pub fn cancel(&self) {
        // The flag is set first: a waiter checks it after storing its event, so it sees the flag or
        // its event is set. All these operations are sequentially consistent.
        self.0.cancelled.store(true, Ordering::SeqCst);
        if let Some(event) = self.0.event.get() {
            event.set();
        }
        #[cfg(feature = "tokio")]
        if let Some(tasks) = self.0.tasks.get() {
            tasks.notify_waiters();
        }
    }

    /// Returns whether it is cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::SeqCst)
    }

    /// Returns the event that becomes readable when the token is cancelled.
    pub(crate) fn event(&self) -> Result<&Event> {
        let made = self.0.event.get_or_try_make(Event::is_own, Event::new);
        let event = made.map_err(|error| Error::io("create", "a cancel event", error))?;
        if self.is_cancelled() {
            event.set();
        }
        Ok(event)
    }

    /// Waits in a task until the token is cancelled, on any runtime. A dropped future leaves
    /// nothing behind.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() {
    /// let stop = lockkit::CancelToken::new();
    /// let waiter = tokio::spawn({
    ///     let stop = stop.clone();
    ///     async move { stop.cancelled().await }
    /// });
    /// stop.cancel();
    /// waiter.await.unwrap();
    /// # }
    /// ```
    #[cfg(feature = "tokio")]
    #[cfg_attr(docsrs, doc(cfg(feature = "tokio")))]
    pub async fn cancelled(&self) {
        let tasks = self.0.tasks.get_or_make(tokio::sync::Notify::new);
        let mut notified = std::pin::pin!(tasks.notified());
        // `cancel` notifies the tasks on the list, so the flag is checked after this task is on it.
        notified.as_mut().enable();
        if !self.is_cancelled() {
            notified.await;
        }
    }
}

impl fmt::Debug for CancelToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CancelToken")
            .field("cancelled", &self.is_cancelled())
            .finish()
    }
}

/// Waits until the token is cancelled; without a token, forever.
#[cfg(feature = "tokio")]
pub(crate) async fn cancelled(token: Option<&CancelToken>) {
    match token {
        Some(token) => token.cancelled().await,
        None => std::future::pending().await,
    }
}
