//! Waiting for locks in tasks (feature `tokio`).
//!
//! Each lock has `acquire_async` in addition to `acquire`, and [`AsyncLock`] is for code that works
//! with any lock. Dropping the future gives up: the lock is not acquired later, and no thread and
//! no descriptor stays behind. Only a lease may still be granted, by a request to its store that is
//! in flight; it is released at once.
//!
//! - A [`NamedLock`](crate::NamedLock) on a socket sleeps on the reactor. The steps are those of
//!   the blocking wait, except for the sleep between them
//!   ([`WaitState::wait_async`](crate::base::wait::WaitState::wait_async)). Dropping the future
//!   closes its connection, so nothing remains to be cleaned up.
//! - All others wait in a futex, in flock or for a store, which only a thread can. An acquisition
//!   that finds the lock held starts its own thread ([`on_a_thread`]), with a token that is
//!   cancelled when the future is dropped. If the thread acquires the lock after that, it releases
//!   the lock at once. It is not one of the runtime's blocking threads: their number is limited, so
//!   as many waiters would block the holder from such a thread, and these threads live for seconds.

use std::future::{Future, poll_fn};
use std::pin::pin;

#[cfg(target_os = "linux")]
use tokio::io::{Interest, unix::AsyncFd};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::base::cancel::CancelToken;
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::lock::Lock;
use crate::base::lock_info::LockInfo;
use crate::base::telemetry;
use crate::base::wait::Wait;
#[cfg(target_os = "linux")]
use crate::sys::fd::BorrowedFd;

/// A [`Lock`] that tasks can wait for. Every lock of this crate implements it, and also has the
/// method itself.
///
/// ```
/// use std::time::Duration;
/// use lockkit::{AsyncLock, NamedLock, Result, Wait};
///
/// async fn exclusively<L: AsyncLock, T>(lock: &L, work: impl Future<Output = T>) -> Result<T> {
///     let _guard = lock.acquire_async(&Wait::at_most(Duration::from_secs(5))).await?;
///     Ok(work.await)
/// }
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<()> {
/// assert_eq!(exclusively(&NamedLock::new("lockkit-doc-async-lock")?, async { 42 }).await?, 42);
/// # Ok(()) }
/// ```
#[cfg_attr(docsrs, doc(cfg(feature = "tokio")))]
pub trait AsyncLock: Lock {
    /// Acquires the lock, waiting as `wait` says, without blocking the thread. Dropping the future
    /// gives up at once; a lease may still be granted by a request in flight, and is then released.
    ///
    /// # Errors
    /// As [`acquire`](Lock::acquire), and those that waiting in a task adds.
    fn acquire_async(&self, wait: &Wait) -> impl Future<Output = Result<Self::Guard>> + Send;
}

/// Waits until `fd` is readable, or has hung up; without a descriptor, forever.
#[cfg(target_os = "linux")]
pub(crate) async fn readable(fd: Option<BorrowedFd<'_>>) -> std::io::Result<()> {
    let Some(fd) = fd else {
        return std::future::pending().await;
    };
    // The successor of this function needs a promise, in `unsafe`, that the descriptor stays open.
    // The borrow proves that.
    #[allow(deprecated)]
    let registered = AsyncFd::with_interest(fd, Interest::READABLE)?;
    registered.readable().await.map(drop)
}

/// Returns an error outside a tokio runtime, where nothing would wake the task.
pub(crate) fn check_runtime() -> Result<()> {
    let missing = |_| {
        ErrorKind::Unsupported {
            what: "waiting in a task outside of a tokio runtime",
        }
        .into()
    };
    Handle::try_current().map(drop).map_err(missing)
}

/// Acquires a free lock in this thread, which blocks for no longer than a few system calls.
/// Otherwise waits on a thread.
pub(crate) async fn at_once_or_on_a_thread<G: Send + 'static>(
    wait: &Wait,
    info: &dyn LockInfo,
    take: impl Fn(&Wait) -> Result<G> + Send + 'static,
) -> Result<G> {
    match take(&wait.at_once()) {
        Err(error) if error.is_held() && wait.waits() => on_a_thread(wait, info, take).await,
        taken => taken,
    }
}

/// Acquires the lock on its own thread, which ends soon after the future is dropped.
pub(crate) async fn on_a_thread<G: Send + 'static>(
    wait: &Wait,
    info: &dyn LockInfo,
    take: impl FnOnce(&Wait) -> Result<G> + Send + 'static,
) -> Result<G> {
    wait.check(info)?;
    let stop = CancelToken::new();
    let thread_wait = wait.for_thread(&stop);
    // This also cancels when the future is dropped: the receiver is dropped first, so no result can
    // arrive any more.
    let stop = CancelOnDrop(stop);
    let mut taken = pin!(run_on_thread(info, move || take(&thread_wait)));
    let mut cancelled = pin!(wait.cancelled());
    let mut is_cancelled = false;
    poll_fn(|context| {
        // The thread's result decides, because the thread may have just acquired the lock.
        if !is_cancelled && cancelled.as_mut().poll(context).is_ready() {
            is_cancelled = true;
            stop.0.cancel();
        }
        taken.as_mut().poll(context)
    })
    .await
}

/// Runs blocking work on its own thread. If the future is dropped, the thread continues, and drops
/// the result.
pub(crate) async fn run_on_thread<T: Send + 'static>(
    info: &dyn LockInfo,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (send, receive) = oneshot::channel();
    let work = telemetry::in_current_span(work);
    let thread = std::thread::Builder::new().name("lockkit-wait".to_owned());
    let started = thread.spawn(move || drop(send.send(work())));
    started.map_err(|error| Error::io("start a thread for", info.describe(), error))?;
    receive.await.unwrap_or_else(|_| {
        let panicked = std::io::Error::other("the thread panicked");
        Err(Error::io("wait for", info.describe(), panicked))
    })
}

/// A guard that cancels its token when it is dropped.
struct CancelOnDrop(CancelToken);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}
