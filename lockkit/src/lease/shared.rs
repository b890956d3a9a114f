//! A held lease, as its guard, its watchers and the heartbeat share it.
//!
//! The state is under a mutex. No thread holds the mutex during a request to a store, so a reader
//! of the state never waits for a store. A forked child has a copy, perhaps of a locked mutex. The
//! child checks [`ProcessId`] first, and touches nothing else.

use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::clock::Clock;
use super::heartbeat::{FailureDomain, HeartbeatScheduler, Renewable};
use super::options::Loss;
use super::spec::{LeaseSpec, MIN_REQUEST_TIMEOUT};
use super::state::{Action, LeaseState};
use super::store::lease_store::{
    Attempt, ClaimId, Deadline, Grant, LeaseSnapshot, Released, Renewal,
};
use crate::base::cancel::CancelToken;
use crate::base::error::{Error, ErrorKind, LossReason, Result, StoreError};
use crate::base::lock_info::LockInfo;
use crate::base::owner::Owner;
use crate::base::telemetry;
use crate::sys::fork::ProcessId;

/// The maximum time that a release waits for the store. A quarter of the ttl applies if it is
/// shorter.
const MAX_RELEASE_TIMEOUT: Duration = Duration::from_millis(250);

/// The maximum time of a request of the heartbeat, which may first have to connect to a distant
/// server. A quarter of the ttl applies if it is shorter. The limit is lower if another lease of
/// the same domain has a short ttl, because that lease may have to wait for the request. The limit
/// is then not below [`MAX_RELEASE_TIMEOUT`].
const MAX_RENEWAL_TIMEOUT: Duration = Duration::from_secs(2);

/// A lease from its grant to its end.
pub(super) struct Held {
    lease: Arc<LeaseSpec>,
    grant: Grant,
    /// False if it is unknown whether the claim was granted, and under which token.
    is_granted: bool,
    scheduler: &'static HeartbeatScheduler,
    /// The process that holds the lease. A forked child has a copy of this value.
    process: ProcessId,
    /// Cancelled when the lease has ended.
    ended: CancelToken,
    state: Mutex<State>,
    /// Notified when a renewal under way has returned.
    renewed: Condvar,
}

struct State {
    lease_state: LeaseState,
    /// The heartbeat has sent a renewal to the store, and has no answer yet.
    is_renewing: bool,
    /// The record may still say that the lease is held: the heartbeat must release it.
    is_release_pending: bool,
    /// The guard was released after the loss, and has done what was left to do.
    is_abandoned: bool,
    /// When a request of the claim was sent that got no answer, before another request was granted.
    unanswered: Option<Duration>,
}

/// An acquisition under way. If it ends without a grant after a request that got no answer, the
/// request may leave an orphaned grant, also later. The heartbeat then frees the orphaned grant, so
/// that it does not block clients.
pub(super) struct PendingClaim {
    lease: Arc<LeaseSpec>,
    scheduler: &'static HeartbeatScheduler,
    pub(super) claim: ClaimId,
    /// When the last request was sent that got no answer.
    unanswered: Option<Duration>,
}

impl PendingClaim {
    pub(super) fn begin(lease: Arc<LeaseSpec>, scheduler: &'static HeartbeatScheduler) -> Self {
        Self {
            lease,
            scheduler,
            claim: ClaimId::random(),
            unanswered: None,
        }
    }

    /// Records that the request that was sent at `sent` got no answer.
    pub(super) fn record_unanswered(&mut self, sent: Duration) {
        self.unanswered = Some(sent);
    }

    /// Begins to hold the name, which a request sent at `sent` was granted.
    pub(super) fn granted(mut self, grant: Grant, sent: Duration) -> Arc<Held> {
        Held::begin(
            self.lease.clone(),
            grant,
            self.scheduler,
            sent,
            self.unanswered.take(),
        )
    }

    /// Leaves a grant to the heartbeat: a request sent at `sent` was granted, and the grant could
    /// not be given back.
    pub(super) fn abandon_claim(&mut self, sent: Duration) {
        Held::reclaim_orphan(self.lease.clone(), &self.claim, 0, self.scheduler, sent);
        self.replace_claim();
    }

    /// Replaces the claim after its grant was given back. Later requests use the new claim.
    pub(super) fn replace_claim(&mut self) {
        (self.claim, self.unanswered) = (ClaimId::random(), None);
    }
}

impl Drop for PendingClaim {
    fn drop(&mut self) {
        if let Some(sent) = self.unanswered {
            Held::reclaim_orphan(self.lease.clone(), &self.claim, 0, self.scheduler, sent);
        }
    }
}

impl Held {
    /// Begins to hold the grant of a request that was sent at `sent`. The first heartbeat comes
    /// after half an interval to a whole interval, at random. So a thousand leases that are
    /// acquired at once do not renew at once for ever. If the store granted less than the ttl, the
    /// first heartbeat comes sooner by the difference.
    fn begin(
        lease: Arc<LeaseSpec>,
        grant: Grant,
        scheduler: &'static HeartbeatScheduler,
        sent: Duration,
        unanswered: Option<Duration>,
    ) -> Arc<Self> {
        let options = &lease.options;
        let timing = options.timing();
        let half = timing.heartbeat / 2;
        let missing = options.ttl.saturating_sub(grant.ttl());
        let due =
            sent + half + half.mul_f64(grant.claim().number() as u16 as f64 / f64::from(u16::MAX));
        let due = due.saturating_sub(missing);
        let lease_state = LeaseState::new(timing, sent, grant.ttl(), options.clock.now(), due);
        let held = Self::new(lease, grant, scheduler, lease_state, true, unanswered);
        scheduler.schedule(held.clone(), due);
        held
    }

    /// Has the heartbeat free what the claim may be granted by a request that was sent at `sent`
    /// and got no answer. If `known` is not 0, a grant under the token `known` is left alone. The
    /// heartbeat checks at once, and repeatedly until such a grant would have expired, because the
    /// request may take effect late.
    fn reclaim_orphan(
        lease: Arc<LeaseSpec>,
        claim: &ClaimId,
        known: u64,
        scheduler: &'static HeartbeatScheduler,
        sent: Duration,
    ) {
        let options = &lease.options;
        let (now, ttl) = (options.clock.now(), options.ttl);
        let mut lease_state = LeaseState::new(options.timing(), sent, ttl, now, now);
        lease_state.release();
        let grant = Grant::new(&lease.name, claim, known, ttl);
        let held = Self::new(lease, grant, scheduler, lease_state, false, None);
        held.lock().is_release_pending = true;
        scheduler.schedule(held, now);
    }

    fn new(
        lease: Arc<LeaseSpec>,
        grant: Grant,
        scheduler: &'static HeartbeatScheduler,
        lease_state: LeaseState,
        is_granted: bool,
        unanswered: Option<Duration>,
    ) -> Arc<Self> {
        Arc::new(Self {
            lease,
            grant,
            is_granted,
            scheduler,
            process: ProcessId::current(),
            ended: CancelToken::new(),
            state: Mutex::new(State {
                lease_state,
                is_renewing: false,
                is_release_pending: false,
                is_abandoned: false,
                unanswered,
            }),
            renewed: Condvar::new(),
        })
    }

    pub(super) fn name(&self) -> &str {
        self.lease.name.as_str()
    }

    pub(super) fn token(&self) -> u64 {
        self.grant.token()
    }

    fn now(&self) -> Duration {
        self.clock().now()
    }

    /// Checks that the lease is held now. Otherwise the error is the reason.
    pub(super) fn check(&self) -> std::result::Result<(), LossReason> {
        if self.is_inherited() {
            return Err(LossReason::Forked);
        }
        let now = self.now();
        let mut state = self.lock();
        if let Some(reason) = state.lease_state.expire(now) {
            drop(state);
            self.report_loss(reason.clone());
            return Err(reason);
        }
        state.lease_state.ended().cloned().map_or(Ok(()), Err)
    }

    pub(super) fn remaining(&self) -> Duration {
        match self.check() {
            Ok(()) => self.lock().lease_state.remaining(self.now()),
            Err(_) => Duration::ZERO,
        }
    }

    pub(super) fn progress(&self) {
        if !self.is_inherited() {
            let now = self.now();
            self.lock().lease_state.progress(now);
        }
    }

    /// Ends the lease and releases it at the store. Later calls do nothing.
    pub(super) fn release(self: &Arc<Self>) -> Result<()> {
        if self.is_inherited() {
            return Ok(());
        }
        let ended = self.end();
        // A request without an answer may take effect now that the lease is free, or after other
        // holders had the lease.
        let unanswered = self.lock().unanswered.take();
        if let Some(sent) = unanswered.filter(|sent| self.now() < *sent + self.ttl()) {
            Self::reclaim_orphan(
                self.lease.clone(),
                self.grant.claim(),
                self.token(),
                self.scheduler,
                sent,
            );
        }
        ended
    }

    fn end(self: &Arc<Self>) -> Result<()> {
        let by = Deadline::after(self.release_timeout());
        if let Err(reason) = self.check() {
            // A live process must not make others wait for a lease that the process has lost.
            let has_run_out = matches!(reason, LossReason::Expired | LossReason::Store(_));
            if has_run_out && !mem::replace(&mut self.lock().is_abandoned, true) {
                let is_abandoned = !self.is_store_busy()
                    && catch_panics(|| self.lease.store.abandon(&self.grant, by)).is_ok();
                if !is_abandoned {
                    self.defer_release();
                }
            }
            return Err(self.loss_error(reason));
        }
        let mut state = self.lock();
        if let Some(reason) = state.lease_state.ended() {
            return Err(self.loss_error(reason.clone()));
        }
        state.lease_state.release();
        // A renewal that arrives after the release must not restore the record.
        while state.is_renewing && !by.is_past() {
            let waited = self.renewed.wait_timeout(state, by.remaining());
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        let result = match self.is_store_busy() {
            true => Err(StoreError::unknown("an earlier request is still under way")),
            false => self.release_grant(by.max(Deadline::after(MIN_REQUEST_TIMEOUT))),
        };
        if let Ok(Released::NotMine) = result {
            let reason = self.lock().lease_state.release_was_too_late();
            self.scheduler.record_release();
            self.report_loss(reason.clone());
            return Err(self.loss_error(reason));
        }
        self.ended.cancel();
        telemetry::released(&**self);
        // The heartbeat repeats a failed release for as long as the record may block others.
        match result {
            Err(_) => self.defer_release(),
            Ok(_) => self.scheduler.record_release(),
        }
        match result {
            Ok(_) => Ok(()),
            Err(error) => Err(self.lease.error(error)),
        }
    }

    /// Returns whether a request to the store may now hang behind an earlier request. Only the
    /// heartbeat has threads for that.
    fn is_store_busy(&self) -> bool {
        self.lock().is_renewing || self.scheduler.is_stuck(self.domain())
    }

    /// Leaves the release to the heartbeat.
    fn defer_release(self: &Arc<Self>) {
        self.lock().is_release_pending = true;
        self.scheduler.schedule(self.clone(), self.now());
    }

    /// Frees the grant at the store, as the end of the lease requires.
    fn release_grant(&self, by: Deadline) -> Result<Released, StoreError> {
        let is_released = matches!(self.lock().lease_state.ended(), Some(LossReason::Released));
        catch_panics(|| match is_released {
            _ if !self.is_granted => self.free_orphan(by),
            true => self.lease.store.release(&self.grant, by),
            // A late renewal may have extended the grant again, also in a store that detects the
            // expiry by itself.
            false => match self.lease.store.abandon(&self.grant, by) {
                Ok(Released::NotMine) if self.snapshot(by)?.is_some() => {
                    self.lease.store.release(&self.grant, by)
                }
                result => result,
            },
        })
    }

    /// Returns the snapshot of the store if it shows the claim as the holder.
    fn snapshot(&self, by: Deadline) -> Result<Option<LeaseSnapshot>, StoreError> {
        let snapshot = self.lease.store.get(self.grant.name(), by)?;
        Ok(snapshot.filter(|snapshot| snapshot.claim() == Some(*self.grant.claim())))
    }

    /// Frees what the claim was granted. Always returns an error, because the unanswered request
    /// may still take effect.
    fn free_orphan(&self, by: Deadline) -> Result<Released, StoreError> {
        // The code that knows how the grant under the known token ended gives that grant back.
        let is_to_free = |snapshot: LeaseSnapshot| match self.token() {
            0 => true,
            known => snapshot.token().is_some_and(|token| token != known),
        };
        if self.snapshot(by)?.is_some_and(is_to_free) {
            let (store, name, claim) = (&self.lease.store, self.grant.name(), self.grant.claim());
            // An attempt with the same claim returns the same grant, which reports whether its
            // previous owner died.
            if let Attempt::Granted(grant) = store.try_acquire(name, claim, self.grant.ttl(), by)? {
                self.lease.return_grant(&grant, by)?;
            }
        }
        Err(StoreError::unknown("the request may still take effect"))
    }

    /// Returns the error that says that the lease is not held any more.
    pub(super) fn loss_error(&self, reason: LossReason) -> Error {
        ErrorKind::LeaseLost {
            lock: self.describe(),
            reason,
        }
        .into()
    }

    /// Reports a loss to all watchers. The code that ended the lease calls this, so it runs once.
    #[cold]
    fn report_loss(&self, reason: LossReason) {
        self.ended.cancel();
        telemetry::lost(self, self.token(), &reason);
        let Some(call) = self.lease.options.on_lost.clone() else {
            return;
        };
        self.scheduler.report_loss(
            call,
            Loss {
                lock: self.describe(),
                token: self.token(),
                reason,
            },
        );
    }

    /// Returns the deadline of a request that the heartbeat sends now.
    fn renewal_deadline(&self) -> Deadline {
        let min_ttl = self
            .scheduler
            .min_ttl_of(self.domain())
            .unwrap_or(self.ttl());
        Deadline::after(
            (self.ttl() / 4)
                .min(MAX_RENEWAL_TIMEOUT)
                .min((min_ttl / 4).max(MAX_RELEASE_TIMEOUT)),
        )
    }

    /// Returns the token that is cancelled when the lease has ended.
    pub(super) fn end_token(&self) -> &CancelToken {
        &self.ended
    }

    /// Returns whether this is a forked child's copy of a lease of its parent.
    pub(super) fn is_inherited(&self) -> bool {
        !self.process.is_current()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic leaves no partial change in here.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Renewable for Held {
    fn clock(&self) -> &Arc<dyn Clock> {
        &self.lease.options.clock
    }

    fn clock_id(&self) -> Option<u128> {
        self.lease.options.clock_id
    }

    fn ttl(&self) -> Duration {
        self.lease.options.ttl
    }

    fn heartbeat(&self) -> Duration {
        self.lease.options.heartbeat
    }

    fn domain(&self) -> FailureDomain {
        let store = &self.lease.store;
        store.profile().failure_domain.map_or(
            FailureDomain::Store(Arc::as_ptr(store).cast::<()>() as usize),
            FailureDomain::Common,
        )
    }

    fn is_over(&self) -> bool {
        let state = self.lock();
        state.lease_state.ended().is_some() && !state.is_release_pending
    }

    fn release_timeout(&self) -> Duration {
        (self.ttl() / 4).min(MAX_RELEASE_TIMEOUT)
    }

    fn renew(&self) -> Option<Duration> {
        let now = self.now();
        let mut state = self.lock();
        let mut next = state.lease_state.next_action(now);
        if matches!(next, Action::Renew) {
            state.is_renewing = true;
            drop(state);
            let answer =
                catch_panics(|| self.lease.store.renew(&self.grant, self.renewal_deadline()));
            // After an error the store may still have renewed the lease.
            let in_force = !matches!(answer, Ok(Renewal::Lost { .. }));
            let answered = self.now();
            state = self.lock();
            state.is_renewing = false;
            next = state.lease_state.record_answer(now, answered, answer);
            // Waiters must not wait for a lease without a holder. A guard that waits for this
            // answer releases the lease itself.
            match state.lease_state.ended() {
                None => {}
                Some(LossReason::Released) => self.renewed.notify_all(),
                Some(_) => state.is_release_pending = in_force,
            }
        }
        let (is_release_pending, until) =
            (state.is_release_pending, state.lease_state.valid_until());
        drop(state);
        match next {
            Action::Sleep(until) => return Some(until),
            Action::ReportLoss(reason) => self.report_loss(reason),
            Action::Renew | Action::Nothing => {}
        }
        if is_release_pending {
            let result = self.release_grant(self.renewal_deadline());
            let now = self.now();
            if result.is_err() && now < until {
                // Retries as soon as after a failed renewal, because others wait.
                return Some(now + self.heartbeat() / 4);
            }
            self.lock().is_release_pending = false;
        }
        None
    }

    fn skip_renewal(&self, backoff: Duration) -> Option<Duration> {
        let now = self.now();
        let mut state = self.lock();
        let lost = state.lease_state.expire(now);
        let again = match state.lease_state.ended() {
            None => Some((now + backoff).min(state.lease_state.valid_until())),
            // A thread with a request to the store under way may leave work to the heartbeat.
            Some(_) => (state.is_renewing || state.is_release_pending).then(|| now + backoff),
        };
        drop(state);
        if let Some(reason) = lost {
            self.report_loss(reason);
        }
        again
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

/// Returns the answer of a store. A panic becomes an error, because the heartbeat serves other
/// leases, too.
fn catch_panics<T>(ask: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    catch_unwind(AssertUnwindSafe(ask))
        .unwrap_or_else(|_| Err(StoreError::unknown("the store panicked")))
}
