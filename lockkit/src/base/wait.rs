//! How long to wait for a lock, and how to stop waiting early.
//!
//! [`Wait`] is what a caller requests. When an acquisition finds its lock held, the `Wait` becomes
//! a [`WaitState`]: the deadline, and the event that wakes the waiter when its [`CancelToken`] is
//! cancelled. Every kind of lock waits through `WaitState`, so a limit and a token mean the same
//! for all of them. A waiting thread needs no second thread; for tasks see `blocking`.

use std::time::{Duration, Instant};

use crate::base::cancel::CancelToken;
#[cfg(feature = "tokio")]
use crate::base::cancel::cancelled;
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::lock_info::LockInfo;
use crate::base::telemetry;
use crate::sys::event::{self, Woke};
use crate::sys::fd::{AsFd, BorrowedFd};

/// How long to wait for a lock.
///
/// ```
/// use std::time::Duration;
/// use lockkit::{CancelToken, NamedLock, Wait};
/// # fn main() -> lockkit::Result<()> {
/// let stop = CancelToken::new();
/// let wait = Wait::at_most(Duration::from_secs(5)).or_cancelled(&stop);
/// let guard = NamedLock::new("lockkit-doc-wait")?.acquire(&wait)?;
/// # Ok(()) }
/// ```
///
/// The shortest and the longest wait:
///
/// ```
/// # fn main() -> lockkit::Result<()> {
/// # use lockkit::{NamedLock, Wait};
/// let lock = NamedLock::new("lockkit-doc-wait-ends")?;
/// let guard = lock.acquire(&Wait::forever())?;
/// assert!(lock.acquire(&Wait::none()).unwrap_err().is_held());
/// # drop(guard);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Wait {
    limit: Limit,
    cancel: Option<CancelToken>,
}

#[derive(Clone, Debug)]
enum Limit {
    None,
    Forever,
    For(Duration),
    Until(Instant),
}

impl Wait {
    /// Does not wait: a held lock returns [`Held`](crate::ErrorKind::Held).
    pub const fn none() -> Self {
        Self {
            limit: Limit::None,
            cancel: None,
        }
    }

    /// Waits without a limit.
    pub const fn forever() -> Self {
        Self {
            limit: Limit::Forever,
            cancel: None,
        }
    }

    /// Waits at most `limit`, measured from the start of each acquisition. Zero tries once; a limit
    /// beyond the range of the clock means forever.
    pub const fn at_most(limit: Duration) -> Self {
        Self {
            limit: Limit::For(limit),
            cancel: None,
        }
    }

    /// Waits until `moment`; a moment in the past tries once.
    pub const fn until(moment: Instant) -> Self {
        Self {
            limit: Limit::Until(moment),
            cancel: None,
        }
    }

    /// Adds a token: the wait also ends as soon as `token` is cancelled. A token that is cancelled
    /// before the acquisition starts ends it even if the lock is free.
    pub fn or_cancelled(mut self, token: &CancelToken) -> Self {
        self.cancel = Some(token.clone());
        self
    }

    /// Returns whether there is no token.
    #[cfg_attr(not(all(target_os = "linux", not(loom))), allow(dead_code))]
    #[inline]
    pub(crate) fn is_bare(&self) -> bool {
        self.cancel.is_none()
    }

    /// Returns the same wait without waiting.
    #[cfg(feature = "tokio")]
    pub(crate) fn at_once(&self) -> Self {
        Self {
            limit: Limit::None,
            cancel: self.cancel.clone(),
        }
    }

    /// Returns the same wait for another thread that begins later, and that `stop` ends.
    #[cfg(feature = "tokio")]
    pub(crate) fn for_thread(&self, stop: &CancelToken) -> Self {
        let limit = match self.limit {
            Limit::For(limit) => Instant::now()
                .checked_add(limit)
                .map_or(Limit::Forever, Limit::Until),
            ref limit => limit.clone(),
        };
        Self {
            limit,
            cancel: Some(stop.clone()),
        }
    }

    /// Returns whether it waits at all.
    #[cfg(feature = "tokio")]
    pub(crate) fn waits(&self) -> bool {
        !matches!(self.limit, Limit::None)
    }

    /// Waits until the token is cancelled.
    #[cfg(feature = "tokio")]
    pub(crate) async fn cancelled(&self) {
        cancelled(self.cancel.as_ref()).await;
    }

    /// Returns whether the token is already cancelled.
    #[cfg(target_os = "linux")]
    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancel.as_ref().is_some_and(CancelToken::is_cancelled)
    }

    /// Returns an error if the token was cancelled before the acquisition began.
    pub(crate) fn check(&self, info: &dyn LockInfo) -> Result<()> {
        match &self.cancel {
            Some(token) if token.is_cancelled() => {
                Err(WaitError::Cancelled.error(info, Duration::ZERO))
            }
            _ => Ok(()),
        }
    }

    /// Returns the state of this wait for an acquisition that has just found `info` held, and
    /// `None` without a wait.
    pub(crate) fn state_for(&self, info: &dyn LockInfo) -> Option<WaitState> {
        let wait_state = self.state()?;
        telemetry::waiting(info);
        Some(wait_state)
    }

    /// Returns the state of this wait from now on, and `None` without a wait.
    pub(crate) fn state(&self) -> Option<WaitState> {
        let since = Instant::now();
        let until = match self.limit {
            Limit::None => return None,
            Limit::Forever => None,
            Limit::For(limit) => since.checked_add(limit),
            Limit::Until(moment) => Some(moment),
        };
        Some(WaitState {
            since,
            until,
            cancel: self.cancel.clone(),
        })
    }
}

/// The state of a [`Wait`] after its lock was found held.
pub(crate) struct WaitState {
    since: Instant,
    until: Option<Instant>,
    cancel: Option<CancelToken>,
}

/// The event of a wait: the awaited condition or the end of the pause, or an error that ends the
/// acquisition.
pub(crate) type WaitResult = std::result::Result<(), WaitError>;

/// The reason why a waiter stopped waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WaitError {
    /// The deadline has passed.
    TimedOut,
    /// The token was cancelled.
    Cancelled,
}

impl WaitState {
    /// Creates the state of a caller that does not wait for a holder, but retries for a moment.
    #[cfg(target_os = "linux")]
    pub(crate) fn brief(moment: Duration) -> Self {
        let since = Instant::now();
        Self {
            since,
            until: Some(since + moment),
            cancel: None,
        }
    }

    /// Returns whether only the lock ends this wait. Then the wait may block where only the kernel
    /// can end it.
    pub(crate) fn is_endless(&self) -> bool {
        self.until.is_none() && self.cancel.is_none()
    }

    /// Returns the deadline.
    pub(crate) fn until(&self) -> Option<Instant> {
        self.until
    }

    /// Returns the token that may cancel the wait.
    pub(crate) fn token(&self) -> Option<&CancelToken> {
        self.cancel.as_ref()
    }

    /// Sleeps for `pause`.
    pub(crate) fn sleep(&self, pause: Duration) -> Result<WaitResult> {
        self.wait(None, pause)
    }

    /// Waits until `fd` is readable or has hung up, but no longer than `pause`. The end of the
    /// pause is `Ok`, too.
    pub(crate) fn wait(&self, fd: Option<BorrowedFd<'_>>, pause: Duration) -> Result<WaitResult> {
        let (until, over) = self.end_of(pause);
        self.wait_by(|cancel| event::wait(fd, cancel, until), over)
    }

    /// Waits like [`wait`](Self::wait), until the other end of `fd` has ended its stream.
    #[cfg(target_os = "linux")]
    pub(crate) fn wait_for_end(
        &self,
        fd: Option<BorrowedFd<'_>>,
        pause: Duration,
    ) -> Result<WaitResult> {
        let (until, over) = self.end_of(pause);
        self.wait_by(|cancel| event::wait_for_end(fd, cancel, until), over)
    }

    /// Waits until `fd` is writable, or has hung up.
    #[cfg(target_os = "linux")]
    pub(crate) fn writable(&self, fd: BorrowedFd<'_>) -> Result<WaitResult> {
        self.wait_by(
            |cancel| event::wait_for_room(fd, cancel, self.until),
            Err(WaitError::TimedOut),
        )
    }

    fn wait_by(
        &self,
        wait: impl FnOnce(Option<BorrowedFd<'_>>) -> std::io::Result<Woke>,
        over: WaitResult,
    ) -> Result<WaitResult> {
        let cancel = self.cancel.as_ref().map(CancelToken::event).transpose()?;
        let is_cancelled = || self.cancel.as_ref().is_some_and(CancelToken::is_cancelled);
        match wait(cancel.as_ref().map(|event| event.as_fd())).map_err(failed)? {
            Woke::Ready => Ok(Ok(())),
            Woke::Cancelled if is_cancelled() => Ok(Err(WaitError::Cancelled)),
            // The program has closed the event, and opened another file. The next wait creates
            // another event.
            Woke::Cancelled => Ok(Ok(())),
            Woke::TimedOut => Ok(over),
        }
    }

    /// Returns how long the wait has lasted.
    #[cfg(target_os = "linux")]
    pub(crate) fn waited(&self) -> Duration {
        self.since.elapsed()
    }

    /// Waits like [`wait`](Self::wait), in a task, for `ready`. If `ready` and another event come
    /// together, `ready` wins, because its result would be lost otherwise.
    #[cfg(feature = "tokio")]
    pub(crate) async fn wait_async(
        &self,
        ready: impl Future<Output = std::io::Result<()>>,
        pause: Duration,
    ) -> Result<WaitResult> {
        use std::task::Poll::{Pending, Ready};
        let (until, over) = self.end_of(pause);
        let (mut ready, mut cancelled) = (
            std::pin::pin!(ready),
            std::pin::pin!(cancelled(self.token())),
        );
        let mut timer = std::pin::pin!(async {
            match until {
                Some(until) => tokio::time::sleep_until(until.into()).await,
                None => std::future::pending().await,
            }
        });
        std::future::poll_fn(|context| {
            if let Ready(result) = ready.as_mut().poll(context) {
                return Ready(result.map(Ok).map_err(failed));
            }
            if cancelled.as_mut().poll(context).is_ready() {
                return Ready(Ok(Err(WaitError::Cancelled)));
            }
            match timer.as_mut().poll(context) {
                Ready(()) => Ready(Ok(over)),
                Pending => Pending,
            }
        })
        .await
    }

    /// Returns when a pause ends, and the result at its end.
    fn end_of(&self, pause: Duration) -> (Option<Instant>, WaitResult) {
        match (Instant::now().checked_add(pause), self.until) {
            (Some(wake), until) if until.is_none_or(|until| wake <= until) => (Some(wake), Ok(())),
            (_, until) => (until, Err(WaitError::TimedOut)),
        }
    }

    /// Returns how long a sleep may last that no token can end: at most `pause`, and not beyond the
    /// limit. With a token it is also so short that a cancellation is noticed within a few
    /// milliseconds.
    pub(crate) fn portion(&self, pause: Duration) -> std::result::Result<Duration, WaitError> {
        /// The interval at which a waiter checks its token.
        const CANCEL_CHECK_INTERVAL: Duration = Duration::from_millis(2);
        let pause = match &self.cancel {
            Some(token) if token.is_cancelled() => return Err(WaitError::Cancelled),
            Some(_) => pause.min(CANCEL_CHECK_INTERVAL),
            None => pause,
        };
        let Some(until) = self.until else {
            return Ok(pause);
        };
        match until.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(WaitError::TimedOut),
            left => Ok(left.min(pause)),
        }
    }

    /// Returns the error for the reason why the wait for `info` ended.
    pub(crate) fn error(&self, reason: WaitError, info: &dyn LockInfo) -> Error {
        reason.error(info, self.since.elapsed())
    }
}

fn failed(error: std::io::Error) -> Error {
    Error::io("wait on", "a lock", error)
}

impl WaitError {
    fn error(self, info: &dyn LockInfo, waited: Duration) -> Error {
        let lock = info.describe();
        match self {
            Self::TimedOut => ErrorKind::Timeout {
                lock,
                waited,
                owner: info.holder().map(Box::new),
            }
            .into(),
            Self::Cancelled => ErrorKind::Cancelled { lock }.into(),
        }
    }
}

/// The pauses between attempts if nothing wakes the waiter. Each is twice the previous one, within
/// bounds that keep both the delay after a release and the processor time small.
pub(crate) struct Backoff {
    next: Duration,
    max: Duration,
}

impl Backoff {
    const MIN_PAUSE: Duration = Duration::from_micros(50);
    const MAX_PAUSE: Duration = Duration::from_millis(5);

    pub(crate) fn new() -> Self {
        Self::between(Self::MIN_PAUSE, Self::MAX_PAUSE)
    }

    pub(crate) fn between(min: Duration, max: Duration) -> Self {
        Self { next: min, max }
    }

    pub(crate) fn next(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(self.max);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limit_beyond_clock_range_is_endless() {
        let wait_state = Wait::at_most(Duration::MAX).state().unwrap();
        assert!(wait_state.is_endless());
    }

    #[test]
    fn pause_beyond_clock_range_ends_with_limit() {
        let wait_state = Wait::at_most(Duration::from_millis(5)).state().unwrap();
        assert_eq!(
            wait_state.sleep(Duration::MAX).unwrap(),
            Err(WaitError::TimedOut)
        );
    }

    #[test]
    fn cancel_ends_present_and_later_sleeps() {
        let token = CancelToken::new();
        let wait_state = Wait::forever().or_cancelled(&token).state().unwrap();
        let canceller = std::thread::spawn({
            let token = token.clone();
            move || token.cancel()
        });
        assert_eq!(
            wait_state.sleep(Duration::from_secs(60)).unwrap(),
            Err(WaitError::Cancelled)
        );
        canceller.join().unwrap();
        let later = Wait::forever().or_cancelled(&token).state().unwrap();
        assert_eq!(
            later.sleep(Duration::from_secs(60)).unwrap(),
            Err(WaitError::Cancelled)
        );
    }

    #[test]
    fn sleep_until_past_moment_times_out_at_once() {
        let wait_state = Wait::until(Instant::now() - Duration::from_secs(1))
            .state()
            .unwrap();
        assert_eq!(
            wait_state.sleep(Duration::from_secs(60)).unwrap(),
            Err(WaitError::TimedOut)
        );
    }

    #[test]
    fn backoff_pauses_grow_to_maximum() {
        let mut backoff = Backoff::new();
        let pauses: Vec<_> = (0..12).map(|_| backoff.next()).collect();
        assert_eq!(pauses[0], Backoff::MIN_PAUSE);
        assert_eq!(pauses[1], Backoff::MIN_PAUSE * 2);
        assert_eq!(pauses[11], Backoff::MAX_PAUSE);
    }
}
