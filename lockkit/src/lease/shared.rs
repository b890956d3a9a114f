//! A held lease, as its guard, its watchers and the heartbeat share it.
//!
//! The state is under a mutex. No thread holds the mutex during a request to a store, so a reader of the state never
//! waits for a store. A forked child has a copy, perhaps of a locked mutex. The child checks [`ProcessId`] first, and
//! touches nothing else.

use std::fmt;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::clock::Clock;
use super::heartbeat::{FailureDomain, HeartbeatScheduler};
use super::state::{Action, LeaseState};
use super::store::lease_store::{Attempt, ClaimId, Deadline, Grant, LeaseSnapshot, Released, Renewal};
use super::{Inner, Loss};
#[cfg(feature = "tokio")]
use crate::base::blocking;
use crate::base::cancel::CancelToken;
use crate::base::error::LossReason;
use crate::base::error::StoreError;
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::lock_info::LockInfo;
use crate::base::owner::Owner;
use crate::base::telemetry;
use crate::base::wait::{Wait, WaitState};
use crate::sys::fd::AsFd;
use crate::sys::fork::ProcessId;

/// The maximum time that a release waits for the store. A quarter of the ttl applies if it is shorter.
const LONGEST_RELEASE: Duration = Duration::from_millis(250);

/// The maximum time of a request of the heartbeat, which may first have to connect to a distant server. A quarter of
/// the ttl applies if it is shorter. The limit is lower if another lease of the same domain has a short ttl, because
/// that lease may have to wait for the request. The limit is then not below [`LONGEST_RELEASE`].
const LONGEST_BEAT: Duration = Duration::from_secs(2);

/// The minimum time of a request, also of a release that waited long for a renewal.
pub(super) const SHORTEST_REQUEST: Duration = Duration::from_millis(20);

pub(super) struct Held {
    lease: Arc<Inner>,
    grant: Grant,
    /// False if it is unknown whether the claim was granted, and under which token.
    is_granted: bool,
    heart: &'static HeartbeatScheduler,
    /// The process that holds the lease. A forked child has a copy of this value.
    process: ProcessId,
    /// Cancelled when the lease has ended.
    ended: CancelToken,
    state: Mutex<State>,
    /// Notified when a renewal under way has returned.
    answered: Condvar,
}

struct State {
    tenure: LeaseState,
    /// The heartbeat has sent a renewal to the store, and has no answer yet.
    asking: bool,
    /// The record may still say that the lease is held: the heartbeat must release it.
    left_to_heart: bool,
    /// The guard was released after the loss, and has done what was left to do.
    is_given_up: bool,
    /// When a request of the claim was sent that got no answer, before another request was granted.
    unanswered: Option<Duration>,
}

/// An acquisition under way. If it ends without a grant after a request that got no answer, the request may leave an
/// orphaned grant, also later. The heartbeat then frees the orphaned grant, so that it does not block clients.
pub(super) struct PendingClaim {
    lease: Arc<Inner>,
    heart: &'static HeartbeatScheduler,
    pub(super) claim: ClaimId,
    /// When the last request was sent that got no answer.
    unanswered: Option<Duration>,
}

impl PendingClaim {
    pub(super) fn begin(lease: Arc<Inner>, heart: &'static HeartbeatScheduler) -> Self {
        Self { lease, heart, claim: ClaimId::random(), unanswered: None }
    }

    /// Records that the request that was sent at `sent` got no answer.
    pub(super) fn is_unanswered(&mut self, sent: Duration) {
        self.unanswered = Some(sent);
    }

    /// Begins to hold the name, which a request sent at `sent` was granted.
    pub(super) fn granted(mut self, grant: Grant, sent: Duration) -> Arc<Held> {
        Held::begin(self.lease.clone(), grant, self.heart, sent, self.unanswered.take())
    }

    /// Leaves a grant to the heartbeat: a request sent at `sent` was granted, and the grant could not be given back.
    pub(super) fn abandon_claim(&mut self, sent: Duration) {
        Held::reclaim_orphan(self.lease.clone(), &self.claim, 0, self.heart, sent);
        self.renew_claim();
    }

    /// Replaces the claim after its grant was given back. Later requests use the new claim.
    pub(super) fn renew_claim(&mut self) {
        (self.claim, self.unanswered) = (ClaimId::random(), None);
    }
}

impl Drop for PendingClaim {
    fn drop(&mut self) {
        if let Some(sent) = self.unanswered {
            Held::reclaim_orphan(self.lease.clone(), &self.claim, 0, self.heart, sent);
        }
    }
}

impl Held {
    /// Begins to hold the grant of a request that was sent at `sent`. The first heartbeat comes after half an interval
    /// to a whole interval, at random. So a thousand leases that are acquired at once do not renew at once for ever. If
    /// the store granted less than the ttl, the first heartbeat comes sooner by the difference.
    fn begin(
        lease: Arc<Inner>,
        grant: Grant,
        heart: &'static HeartbeatScheduler,
        sent: Duration,
        unanswered: Option<Duration>,
    ) -> Arc<Self> {
        let options = &lease.options;
        let terms = options.terms();
        let half = terms.heartbeat / 2;
        let missing = options.ttl.saturating_sub(grant.ttl());
        let due = sent + half + half.mul_f64(grant.claim().number() as u16 as f64 / f64::from(u16::MAX));
        let due = due.saturating_sub(missing);
        let tenure = LeaseState::new(terms, sent, grant.ttl(), options.clock.now(), due);
        let held = Self::new(lease, grant, heart, tenure, true, unanswered);
        heart.serve(held.clone(), due);
        held
    }

    /// Has the heartbeat free what the claim may be granted by a request that was sent at `sent` and got no answer. If
    /// `known` is not 0, a grant under the token `known` is left alone. The heartbeat checks at once, and repeatedly
    /// until such a grant would have expired, because the request may take effect late.
    fn reclaim_orphan(
        lease: Arc<Inner>,
        claim: &ClaimId,
        known: u64,
        heart: &'static HeartbeatScheduler,
        sent: Duration,
    ) {
        let options = &lease.options;
        let (now, ttl) = (options.clock.now(), options.ttl);
        let mut tenure = LeaseState::new(options.terms(), sent, ttl, now, now);
        tenure.release();
        let grant = Grant::new(&lease.name, claim, known, ttl);
        let held = Self::new(lease, grant, heart, tenure, false, None);
        held.lock().left_to_heart = true;
        heart.serve(held, now);
    }

    fn new(
        lease: Arc<Inner>,
        grant: Grant,
        heart: &'static HeartbeatScheduler,
        tenure: LeaseState,
        is_granted: bool,
        unanswered: Option<Duration>,
    ) -> Arc<Self> {
        Arc::new(Self {
            lease,
            grant,
            is_granted,
            heart,
            process: ProcessId::current(),
            ended: CancelToken::new(),
            state: Mutex::new(State { tenure, asking: false, left_to_heart: false, is_given_up: false, unanswered }),
            answered: Condvar::new(),
        })
    }

    pub(super) fn name(&self) -> &str {
        self.lease.name.as_str()
    }

    pub(super) fn token(&self) -> u64 {
        self.grant.token()
    }

    pub(super) fn clock(&self) -> &Arc<dyn Clock> {
        &self.lease.options.clock
    }

    /// Returns the id that the clock shares with other clocks that show the same time.
    pub(super) fn clock_id(&self) -> Option<u128> {
        self.lease.options.clock_id
    }

    pub(super) fn now(&self) -> Duration {
        self.clock().now()
    }

    pub(super) fn ttl(&self) -> Duration {
        self.lease.options.ttl
    }

    pub(super) fn heartbeat(&self) -> Duration {
        self.lease.options.heartbeat
    }

    /// Returns the failure domain of the store.
    pub(super) fn domain(&self) -> FailureDomain {
        let store = &self.lease.store;
        store
            .profile()
            .failure_domain
            .map_or(FailureDomain::Store(Arc::as_ptr(store).cast::<()>() as usize), FailureDomain::Common)
    }

    /// Checks that the lease is held now. Otherwise the error is the reason.
    pub(super) fn check(self: &Arc<Self>) -> std::result::Result<(), LossReason> {
        if self.is_inherited() {
            return Err(LossReason::Forked);
        }
        let now = self.now();
        let mut state = self.lock();
        if let Some(reason) = state.tenure.expire(now) {
            drop(state);
            self.tell(reason.clone());
            return Err(reason);
        }
        state.tenure.ended().cloned().map_or(Ok(()), Err)
    }

    /// Returns whether the lease has ended, and the heartbeat has nothing more to do for it.
    pub(super) fn is_over(&self) -> bool {
        let state = self.lock();
        state.tenure.ended().is_some() && !state.left_to_heart
    }

    pub(super) fn remaining(self: &Arc<Self>) -> Duration {
        match self.check() {
            Ok(()) => self.lock().tenure.remaining(self.now()),
            Err(_) => Duration::ZERO,
        }
    }

    pub(super) fn progress(&self) {
        if !self.is_inherited() {
            let now = self.now();
            self.lock().tenure.progress(now);
        }
    }

    /// Ends the lease and releases it at the store. Later calls do nothing.
    pub(super) fn release(self: &Arc<Self>) -> Result<()> {
        if self.is_inherited() {
            return Ok(());
        }
        let ended = self.end();
        // A request without an answer may take effect now that the lease is free, or after other holders had the lease.
        let unanswered = self.lock().unanswered.take();
        if let Some(sent) = unanswered.filter(|sent| self.now() < *sent + self.ttl()) {
            Self::reclaim_orphan(self.lease.clone(), self.grant.claim(), self.token(), self.heart, sent);
        }
        ended
    }

    fn end(self: &Arc<Self>) -> Result<()> {
        let by = Deadline::after(self.longest_release());
        if let Err(reason) = self.check() {
            // A live process must not make others wait for a lease that the process has lost.
            let has_run_out = matches!(reason, LossReason::Expired | LossReason::Store(_));
            if has_run_out && !mem::replace(&mut self.lock().is_given_up, true) {
                let is_given_up =
                    !self.is_store_busy() && protected(|| self.lease.store.abandon(&self.grant, by)).is_ok();
                if !is_given_up {
                    self.leave_to_heart();
                }
            }
            return Err(self.lost(reason));
        }
        let mut state = self.lock();
        if let Some(reason) = state.tenure.ended() {
            return Err(self.lost(reason.clone()));
        }
        state.tenure.release();
        // A renewal that arrives after the release must not restore the record.
        while state.asking && !by.is_past() {
            let waited = self.answered.wait_timeout(state, by.remaining());
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        let told = match self.is_store_busy() {
            true => Err(StoreError::unknown("it is still busy with a request before")),
            false => self.give_back(by.max(Deadline::after(SHORTEST_REQUEST))),
        };
        if let Ok(Released::NotMine) = told {
            let reason = self.lock().tenure.release_was_too_late();
            self.heart.released();
            self.tell(reason.clone());
            return Err(self.lost(reason));
        }
        self.ended.cancel();
        telemetry::released(&**self);
        // The heartbeat repeats a failed release for as long as the record may block others.
        match told {
            Err(_) => self.leave_to_heart(),
            Ok(_) => self.heart.released(),
        }
        match told {
            Ok(_) => Ok(()),
            Err(error) => Err(self.lease.failed(error)),
        }
    }

    /// Returns whether a request to the store may now hang behind an earlier request. Only the heartbeat has threads
    /// for that.
    fn is_store_busy(&self) -> bool {
        self.lock().asking || self.heart.is_stuck(self.domain())
    }

    fn leave_to_heart(self: &Arc<Self>) {
        self.lock().left_to_heart = true;
        self.heart.serve(self.clone(), self.now());
    }

    fn give_back(&self, by: Deadline) -> Result<Released, StoreError> {
        let is_released = matches!(self.lock().tenure.ended(), Some(LossReason::Released));
        protected(|| match is_released {
            _ if !self.is_granted => self.find_and_free(by),
            true => self.lease.store.release(&self.grant, by),
            // A late renewal may have extended the grant again, also in a store that detects the expiry by itself.
            false => match self.lease.store.abandon(&self.grant, by) {
                Ok(Released::NotMine) if self.seen(by)?.is_some() => self.lease.store.release(&self.grant, by),
                told => told,
            },
        })
    }

    /// Returns the snapshot of the store if it shows the claim as the holder.
    fn seen(&self, by: Deadline) -> Result<Option<LeaseSnapshot>, StoreError> {
        let seen = self.lease.store.get(self.grant.name(), by)?;
        Ok(seen.filter(|seen| seen.claim() == Some(*self.grant.claim())))
    }

    /// Frees what the claim was granted. Always returns an error, because the unanswered request may still take effect.
    fn find_and_free(&self, by: Deadline) -> Result<Released, StoreError> {
        // The code that knows how the grant under the known token ended gives that grant back.
        let is_to_free = |seen: LeaseSnapshot| match self.token() {
            0 => true,
            known => seen.token().is_some_and(|token| token != known),
        };
        if self.seen(by)?.is_some_and(is_to_free) {
            let (store, name, claim) = (&self.lease.store, self.grant.name(), self.grant.claim());
            // An attempt with the same claim returns the same grant, which reports whether its previous owner died.
            if let Attempt::Granted(grant) = store.try_acquire(name, claim, self.grant.ttl(), by)? {
                self.lease.give_back_untold(&grant, by)?;
            }
        }
        Err(StoreError::unknown("the request may yet be carried out"))
    }

    /// Does what is due, on the heartbeat thread. Returns when to run again, if ever.
    pub(super) fn beat(self: &Arc<Self>) -> Option<Duration> {
        let now = self.now();
        let mut state = self.lock();
        let mut next = state.tenure.beat(now);
        if matches!(next, Action::Renew) {
            state.asking = true;
            drop(state);
            let answer = protected(|| self.lease.store.renew(&self.grant, self.request()));
            // After an error the store may still have renewed the lease.
            let in_force = !matches!(answer, Ok(Renewal::Lost { .. }));
            let answered = self.now();
            state = self.lock();
            state.asking = false;
            next = state.tenure.answered(now, answered, answer);
            // Waiters must not wait for a lease without a holder. A guard that waits for this answer releases the lease
            // itself.
            match state.tenure.ended() {
                None => {}
                Some(LossReason::Released) => self.answered.notify_all(),
                Some(_) => state.left_to_heart = in_force,
            }
        }
        let (left_to_heart, until) = (state.left_to_heart, state.tenure.until());
        drop(state);
        match next {
            Action::Sleep(until) => return Some(until),
            Action::Tell(reason) => self.tell(reason),
            Action::Renew | Action::Nothing => {}
        }
        if left_to_heart {
            let told = self.give_back(self.request());
            let now = self.now();
            if told.is_err() && now < until {
                // Retries as soon as after a failed renewal, because others wait.
                return Some(now + self.heartbeat() / 4);
            }
            self.lock().left_to_heart = false;
        }
        None
    }

    /// Does what [`beat`](Self::beat) does while the store must get no request for the duration `rest`: only reports
    /// the end.
    pub(super) fn beat_at_rest(self: &Arc<Self>, rest: Duration) -> Option<Duration> {
        let now = self.now();
        let mut state = self.lock();
        let lost = state.tenure.expire(now);
        let again = match state.tenure.ended() {
            None => Some((now + rest).min(state.tenure.until())),
            // A thread with a request to the store under way may leave work to the heartbeat.
            Some(_) => (state.asking || state.left_to_heart).then(|| now + rest),
        };
        drop(state);
        if let Some(reason) = lost {
            self.tell(reason);
        }
        again
    }

    /// Returns the error that says that the lease is not held any more.
    pub(super) fn lost(&self, reason: LossReason) -> Error {
        ErrorKind::LeaseLost { lock: self.describe(), reason }.into()
    }

    /// Reports a loss to all watchers. The code that ended the lease calls this, so it runs once.
    #[cold]
    fn tell(self: &Arc<Self>, reason: LossReason) {
        self.ended.cancel();
        telemetry::lost(&**self, self.token(), &reason);
        let Some(call) = self.lease.options.on_lost.clone() else { return };
        self.heart.tell(call, Loss { lock: self.describe(), token: self.token(), reason });
    }

    /// Returns the deadline of a request that the heartbeat sends now.
    fn request(&self) -> Deadline {
        let shortest = self.heart.shortest_at(self.domain()).unwrap_or(self.ttl());
        Deadline::after((self.ttl() / 4).min(LONGEST_BEAT).min((shortest / 4).max(LONGEST_RELEASE)))
    }

    /// Returns how long a release waits for the store.
    pub(super) fn longest_release(&self) -> Duration {
        (self.ttl() / 4).min(LONGEST_RELEASE)
    }

    fn is_inherited(&self) -> bool {
        !self.process.is_current()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic leaves no partial change in here.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LockInfo for Held {
    fn describe(&self) -> String {
        self.lease.describe()
    }

    #[cfg(feature = "tracing")]
    fn label(&self) -> (&'static str, String) {
        ("lease", self.name().to_owned())
    }

    fn holder(&self) -> Option<Owner> {
        Some(Owner::current())
    }
}

/// Returns the answer of a store. A panic becomes an error, because the heartbeat serves other leases, too.
fn protected<T>(ask: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    catch_unwind(AssertUnwindSafe(ask)).unwrap_or_else(|_| Err(StoreError::unknown("the store panicked")))
}

/// A signal of the loss of a lease, or of its release. Clones are the same signal, and all outlive the guard.
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

    /// Returns whether the lease is not held any more, by the clock, as [`is_held`](super::LeaseGuard::is_held) does.
    pub fn is_lost(&self) -> bool {
        self.reason().is_some()
    }

    /// Returns why the lease is not held any more; `None` while it is held.
    pub fn reason(&self) -> Option<LossReason> {
        self.0.check().err()
    }

    /// Returns a token that is cancelled at the loss or the release, to end waits for other locks. The heartbeat thread
    /// cancels the token, or the first other check that finds the lease lost.
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
        self.0.ended.clone()
    }

    /// Waits for the loss or the release, as long as `wait` says.
    ///
    /// # Errors
    /// - [`Timeout`](ErrorKind::Timeout), or [`Held`](ErrorKind::Held) without waiting, if the lease is still held by
    ///   then.
    /// - [`Cancelled`](ErrorKind::Cancelled), as `wait` says.
    /// - [`Io`](ErrorKind::Io) if no descriptor is left to wait with.
    pub fn wait(&self, wait: &Wait) -> Result<LossReason> {
        let held = &self.0;
        let mut patience = None;
        loop {
            let patience = match self.look(wait, &mut patience)? {
                Ok(patience) => patience,
                Err(reason) => return Ok(reason),
            };
            // The heartbeat may be late in noticing the end.
            let event = held.ended.event()?;
            if let Err(gave_up) = patience.wait(Some(event.as_fd()), held.remaining())? {
                return Err(patience.error(gave_up, &**held));
            }
        }
    }

    /// Waits as [`wait`](Self::wait) does, in a task. If nothing else ends the wait, await the signal itself.
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
    /// As [`wait`](Self::wait), without `Io`; [`Unsupported`](ErrorKind::Unsupported) outside of a tokio runtime.
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
        let mut patience = None;
        loop {
            let patience = match self.look(wait, &mut patience)? {
                Ok(patience) => patience,
                Err(reason) => return Ok(reason),
            };
            blocking::check_runtime()?;
            let ended = async {
                held.ended.cancelled().await;
                Ok(())
            };
            if let Err(gave_up) = patience.wait_async(ended, held.remaining()).await? {
                return Err(patience.error(gave_up, &**held));
            }
        }
    }

    /// Returns why the lease is not held any more, or the state of the wait for its end.
    fn look<'p>(
        &self,
        wait: &Wait,
        patience: &'p mut Option<WaitState>,
    ) -> Result<std::result::Result<&'p WaitState, LossReason>> {
        let held = &self.0;
        if let Err(reason) = held.check() {
            return Ok(Err(reason));
        }
        wait.check(&**held)?;
        match patience {
            Some(patience) => Ok(Ok(patience)),
            none => match wait.patience() {
                Some(patience) => Ok(Ok(none.insert(patience))),
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
/// tokio panics outside of its runtime, and in a runtime that was built without a timer (`enable_time`).
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
                let _ = tokio::time::timeout(held.remaining(), held.ended.cancelled()).await;
            }
            held.check().err().unwrap_or(LossReason::Released)
        })
    }
}

impl fmt::Debug for LostSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LostSignal").field("reason", &self.reason()).finish_non_exhaustive()
    }
}
