//! Waiting for locks in tasks (feature `tokio`).
//!
//! Each lock has `acquire_async` beside `acquire`, and [`AsyncLock`] is for code that works with any. Dropping the
//! future gives up: nobody takes the lock later, and no thread and no descriptor stays behind. Only a lease may yet be
//! granted, by a request to its store that is under way; it is released on the spot.
//!
//! - A [`NamedLock`](crate::NamedLock) on a socket sleeps on the reactor: the steps are those of the blocking wait, only
//!   the sleep between them is another ([`WaitState::wait_async`](crate::wait::WaitState::wait_async)). A future that is
//!   dropped has closed its connection, so nothing is left to be cleaned up.
//! - All others wait in a futex, in flock or for a store, which only a thread can. Who finds the lock held gets a thread
//!   of its own ([`on_a_thread`]), and a token that dropping the future cancels. What the thread brings after that goes
//!   to nobody and is released on the spot. It is not one of the runtime's blocking threads: their number is limited, so
//!   as many waiters would keep the holder from all that needs such a thread, and they live on for seconds.

use std::future::{Future, poll_fn};
use std::pin::pin;

#[cfg(target_os = "linux")]
use tokio::io::{Interest, unix::AsyncFd};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::error::{Error, ErrorKind, Result};
use crate::lock::Lock;
#[cfg(target_os = "linux")]
use crate::sys::fd::BorrowedFd;
use crate::telemetry;
use crate::wait::{CancelToken, LockInfo, Wait};

/// A [`Lock`] that tasks can wait for. Every lock of this crate is one, and has the method as its own, too.
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
    /// Takes the lock, waiting as `wait` says, without blocking the thread. Dropping the future gives up at once; a lease
    /// may yet be granted by a request under way, and is released again.
    ///
    /// # Errors
    /// As [`acquire`](Lock::acquire), and what waiting in a task adds.
    fn acquire_async(&self, wait: &Wait) -> impl Future<Output = Result<Self::Guard>> + Send;
}

/// When `fd` has something to read, or has hung up; never without one.
#[cfg(target_os = "linux")]
pub(crate) async fn readable(fd: Option<BorrowedFd<'_>>) -> std::io::Result<()> {
    let Some(fd) = fd else { return std::future::pending().await };
    // Its successor asks for a promise, in `unsafe`, that the descriptor stays open: that is what borrowing it says.
    #[allow(deprecated)]
    let registered = AsyncFd::with_interest(fd, Interest::READABLE)?;
    registered.readable().await.map(drop)
}

/// Refuses to wait where nothing would wake the task.
pub(crate) fn check_runtime() -> Result<()> {
    let missing = |_| ErrorKind::Unsupported { what: "waiting in a task outside of a tokio runtime" }.into();
    Handle::try_current().map(drop).map_err(missing)
}

/// Takes the lock here and now if it is free, which blocks for no longer than a few system calls; else on a thread.
pub(crate) async fn at_once_or_on_a_thread<G: Send + 'static>(
    wait: &Wait,
    subject: &dyn LockInfo,
    take: impl Fn(&Wait) -> Result<G> + Send + 'static,
) -> Result<G> {
    match take(&wait.at_once()) {
        Err(error) if error.is_held() && wait.waits() => on_a_thread(wait, subject, take).await,
        taken => taken,
    }
}

/// Takes the lock on a thread of its own, which ends soon after the future is dropped.
pub(crate) async fn on_a_thread<G: Send + 'static>(
    wait: &Wait,
    subject: &dyn LockInfo,
    take: impl FnOnce(&Wait) -> Result<G> + Send + 'static,
) -> Result<G> {
    wait.check(subject)?;
    let stop = CancelToken::new();
    let elsewhere = wait.elsewhere(&stop);
    // Also when this future is dropped: the receiver goes first, so nothing can arrive any more.
    let stop = Cancelling(stop);
    let mut taken = pin!(elsewhere_do(subject, move || take(&elsewhere)));
    let mut cancelled = pin!(wait.cancelled());
    let mut is_cancelled = false;
    poll_fn(|context| {
        // The thread says what came of it, for it may just have got the lock.
        if !is_cancelled && cancelled.as_mut().poll(context).is_ready() {
            is_cancelled = true;
            stop.0.cancel();
        }
        taken.as_mut().poll(context)
    })
    .await
}

/// Does what blocks on a thread of its own. When the future is dropped the thread goes on, and drops what came of it.
pub(crate) async fn elsewhere_do<T: Send + 'static>(
    subject: &dyn LockInfo,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (send, receive) = oneshot::channel();
    let work = telemetry::carried(work);
    let thread = std::thread::Builder::new().name("lockkit-wait".to_owned());
    let started = thread.spawn(move || drop(send.send(work())));
    started.map_err(|error| Error::io("start a thread for", subject.describe(), error))?;
    receive.await.unwrap_or_else(|_| {
        let panicked = std::io::Error::other("the thread that did it panicked");
        Err(Error::io("wait for", subject.describe(), panicked))
    })
}

/// Cancels its token when it goes.
struct Cancelling(CancelToken);

impl Drop for Cancelling {
    fn drop(&mut self) {
        self.0.cancel();
    }
}
