//! How long to wait for a lock, and how to stop waiting early.
//!
//! [`Wait`] is what a caller asks for. Once an acquisition finds its lock held, it becomes a [`Patience`]: the moment
//! to give up at, and the event that wakes the waiter when its [`CancelToken`] is cancelled. Every kind of lock waits
//! through `Patience`, so a limit and a token mean the same for all of them. No wait needs a helper thread.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::error::{Error, ErrorKind, Result};
use crate::owner::Owner;
use crate::sys::event::{self, Event, Woke};
use crate::sys::fd::{AsFd, BorrowedFd};
use crate::sys::fork;

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
    /// Not at all: a lock that is held is [`Held`](crate::ErrorKind::Held).
    pub const fn none() -> Self {
        Self { limit: Limit::None, cancel: None }
    }

    /// As long as it takes.
    pub const fn forever() -> Self {
        Self { limit: Limit::Forever, cancel: None }
    }

    /// At most `limit`, counted anew from the start of each acquisition. Zero tries once; what is too long for the
    /// clock to count is for ever.
    pub const fn at_most(limit: Duration) -> Self {
        Self { limit: Limit::For(limit), cancel: None }
    }

    /// Until `moment`; one in the past tries once.
    pub const fn until(moment: Instant) -> Self {
        Self { limit: Limit::Until(moment), cancel: None }
    }

    /// Gives up as soon as `token` is cancelled, too. A token that is cancelled before the acquisition starts wins
    /// over a lock that is free.
    pub fn or_cancelled(mut self, token: &CancelToken) -> Self {
        self.cancel = Some(token.clone());
        self
    }

    /// Whether nothing can cancel it.
    #[cfg_attr(not(all(target_os = "linux", not(loom))), allow(dead_code))]
    #[inline]
    pub(crate) fn is_bare(&self) -> bool {
        self.cancel.is_none()
    }

    /// Refuses what was cancelled before it began.
    pub(crate) fn check(&self, subject: &dyn Subject) -> Result<()> {
        match &self.cancel {
            Some(token) if token.is_cancelled() => Err(GaveUp::Cancelled.error(subject, Duration::ZERO)),
            _ => Ok(()),
        }
    }

    /// What is left of this wait for an acquisition that has just found its lock held; `None` when it does not wait.
    pub(crate) fn patience(&self) -> Result<Option<Patience>> {
        let since = Instant::now();
        let until = match self.limit {
            Limit::None => return Ok(None),
            Limit::Forever => None,
            Limit::For(limit) => since.checked_add(limit),
            Limit::Until(moment) => Some(moment),
        };
        let cancel = match &self.cancel {
            Some(token) => Some((token.clone(), token.event()?)),
            None => None,
        };
        Ok(Some(Patience { since, until, cancel }))
    }
}

/// Stops waits early, from any thread. Clones are the same token; a cancelled token stays cancelled.
///
/// A token belongs to the process that made it: cancelling a copy in a forked child does not reach the parent.
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
    /// Made by the first waiter, so that a token that nobody waits with costs no descriptor. A forked child shares its
    /// parent's, and needs one of its own: the number is the fork generation that it belongs to.
    event: Mutex<Option<(u32, Arc<Event>)>>,
}

impl CancelToken {
    /// A token that nobody has cancelled yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Wakes everybody who waits with this token, and whoever will, with [`Cancelled`](crate::ErrorKind::Cancelled).
    pub fn cancel(&self) {
        // The flag goes first: a waiter looks at it after its event stands in the slot, so it sees one or the other.
        self.0.cancelled.store(true, Ordering::Release);
        if let Some((generation, event)) = &*self.0.event.lock()
            && *generation == fork::generation()
        {
            event.set();
        }
    }

    /// Whether somebody has cancelled it.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Acquire)
    }

    /// What becomes readable when it is cancelled.
    pub(crate) fn event(&self) -> Result<Arc<Event>> {
        let mut slot = self.0.event.lock();
        let current = fork::generation();
        if let Some((generation, event)) = &*slot
            && *generation == current
        {
            return Ok(event.clone());
        }
        let event = Arc::new(Event::new().map_err(|error| Error::io("create", "a cancel event", error))?);
        if self.is_cancelled() {
            event.set();
        }
        *slot = Some((current, event.clone()));
        Ok(event)
    }
}

impl fmt::Debug for CancelToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CancelToken").field("cancelled", &self.is_cancelled()).finish()
    }
}

/// What is left of a [`Wait`] once its lock was found held.
pub(crate) struct Patience {
    since: Instant,
    until: Option<Instant>,
    cancel: Option<(CancelToken, Arc<Event>)>,
}

/// What came first: what was waited for, or a reason to stop.
pub(crate) type Waited = std::result::Result<(), GaveUp>;

/// Why a waiter stopped waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GaveUp {
    /// The moment to give up at has come.
    TimedOut,
    /// The token was cancelled.
    Cancelled,
}

impl Patience {
    /// Nothing but the lock ends this wait, so it may block where only the kernel wakes it.
    pub(crate) fn is_endless(&self) -> bool {
        self.until.is_none() && self.cancel.is_none()
    }

    /// Waits until `fd` has something to read, or has hung up.
    #[cfg(target_os = "linux")]
    pub(crate) fn readable(&self, fd: BorrowedFd<'_>) -> Result<Waited> {
        self.wait(Some(fd), self.until)
    }

    /// Waits until `fd` has something to read, but no longer than `pause`, which is then `Ok`, too.
    pub(crate) fn readable_within(&self, fd: BorrowedFd<'_>, pause: Duration) -> Result<Waited> {
        self.pause(Some(fd), pause)
    }

    /// What wakes the waiter when it is cancelled.
    #[cfg(windows)]
    pub(crate) fn event(&self) -> Option<&Arc<Event>> {
        self.cancel.as_ref().map(|(_, event)| event)
    }

    /// The moment to give up at.
    pub(crate) fn until(&self) -> Option<Instant> {
        self.until
    }

    /// What may cancel it.
    pub(crate) fn token(&self) -> Option<&CancelToken> {
        self.cancel.as_ref().map(|(token, _)| token)
    }

    /// Lets `pause` pass.
    pub(crate) fn sleep(&self, pause: Duration) -> Result<Waited> {
        self.pause(None, pause)
    }

    fn pause(&self, fd: Option<BorrowedFd<'_>>, pause: Duration) -> Result<Waited> {
        let wake = Instant::now().checked_add(pause);
        match self.until {
            Some(until) if wake.is_none_or(|wake| until < wake) => self.wait(fd, self.until),
            _ => Ok(self.wait(fd, wake)?.or_else(|gave_up| match gave_up {
                GaveUp::TimedOut => Ok(()),
                GaveUp::Cancelled => Err(gave_up),
            })),
        }
    }

    /// How long a sleep may last that no token can end: at most `pause`, not beyond the limit, and never so long that a
    /// cancellation goes unseen for more than a few milliseconds.
    pub(crate) fn portion(&self, pause: Duration) -> std::result::Result<Duration, GaveUp> {
        /// How often a waiter looks at its token.
        const GLANCE: Duration = Duration::from_millis(2);
        let pause = match &self.cancel {
            Some((token, _)) if token.is_cancelled() => return Err(GaveUp::Cancelled),
            Some(_) => pause.min(GLANCE),
            None => pause,
        };
        let Some(until) = self.until else { return Ok(pause) };
        match until.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(GaveUp::TimedOut),
            left => Ok(left.min(pause)),
        }
    }

    fn wait(&self, fd: Option<BorrowedFd<'_>>, until: Option<Instant>) -> Result<Waited> {
        let cancel = self.cancel.as_ref().map(|(_, event)| event.as_fd());
        match event::wait(fd, cancel, until).map_err(|error| Error::io("wait on", "a lock", error))? {
            Woke::Ready => Ok(Ok(())),
            Woke::Cancelled => Ok(Err(GaveUp::Cancelled)),
            Woke::TimedOut => Ok(Err(GaveUp::TimedOut)),
        }
    }

    /// The error that says why the wait for `subject` ended.
    pub(crate) fn error(&self, gave_up: GaveUp, subject: &dyn Subject) -> Error {
        gave_up.error(subject, self.since.elapsed())
    }
}

impl GaveUp {
    fn error(self, subject: &dyn Subject, waited: Duration) -> Error {
        let lock = subject.describe();
        match self {
            Self::TimedOut => ErrorKind::Timeout { lock, waited, owner: subject.holder().map(Box::new) }.into(),
            Self::Cancelled => ErrorKind::Cancelled { lock }.into(),
        }
    }
}

/// A lock as errors speak of it.
pub(crate) trait Subject {
    /// Its kind and its name, for people.
    fn describe(&self) -> String;
    /// Who holds it now, where that is known.
    fn holder(&self) -> Option<Owner>;
    /// The error for somebody who does not wait.
    fn held(&self) -> Error {
        ErrorKind::Held { lock: self.describe(), owner: self.holder().map(Box::new), source: None }.into()
    }
}

/// Pauses between attempts where nothing wakes the waiter: each twice the one before, within bounds that keep both
/// the delay after a release and the processor time small.
pub(crate) struct Backoff {
    next: Duration,
    longest: Duration,
}

impl Backoff {
    const FIRST: Duration = Duration::from_micros(50);
    const LONGEST: Duration = Duration::from_millis(5);

    pub(crate) fn new() -> Self {
        Self::between(Self::FIRST, Self::LONGEST)
    }

    pub(crate) fn between(first: Duration, longest: Duration) -> Self {
        Self { next: first, longest }
    }

    pub(crate) fn next(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(self.longest);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_beyond_the_clock_is_for_ever() {
        let patience = Wait::at_most(Duration::MAX).patience().unwrap().unwrap();
        assert!(patience.is_endless());
    }

    #[test]
    fn a_pause_beyond_the_clock_ends_with_the_limit() {
        let patience = Wait::at_most(Duration::from_millis(5)).patience().unwrap().unwrap();
        assert_eq!(patience.sleep(Duration::MAX).unwrap(), Err(GaveUp::TimedOut));
    }

    #[test]
    fn cancelling_ends_a_sleep_at_once_and_for_good() {
        let token = CancelToken::new();
        let patience = Wait::forever().or_cancelled(&token).patience().unwrap().unwrap();
        let canceller = std::thread::spawn({
            let token = token.clone();
            move || token.cancel()
        });
        assert_eq!(patience.sleep(Duration::from_secs(60)).unwrap(), Err(GaveUp::Cancelled));
        canceller.join().unwrap();
        let later = Wait::forever().or_cancelled(&token).patience().unwrap().unwrap();
        assert_eq!(later.sleep(Duration::from_secs(60)).unwrap(), Err(GaveUp::Cancelled));
    }

    #[test]
    fn a_limit_in_the_past_ends_at_once() {
        let patience = Wait::until(Instant::now() - Duration::from_secs(1)).patience().unwrap().unwrap();
        assert_eq!(patience.sleep(Duration::from_secs(60)).unwrap(), Err(GaveUp::TimedOut));
    }

    #[test]
    fn pauses_grow_to_a_bound() {
        let mut backoff = Backoff::new();
        let pauses: Vec<_> = (0..12).map(|_| backoff.next()).collect();
        assert_eq!(pauses[0], Backoff::FIRST);
        assert_eq!(pauses[1], Backoff::FIRST * 2);
        assert_eq!(pauses[11], Backoff::LONGEST);
    }
}
