//! The acquisition of a lease: attempts at the store, and the waits between them.

use std::mem;
use std::sync::Arc;
use std::time::Duration;

use super::heartbeat::HeartbeatScheduler;
use super::shared::{Held, PendingClaim};
use super::spec::LeaseSpec;
use super::store::lease_store::{Attempt, Deadline, Grant, LeaseSnapshot};
use super::waiters::Waiter;
use crate::base::error::{Error, ErrorKind, Result, StoreError};
use crate::base::guard::Recovered;
use crate::base::lock_info::LockInfo;
use crate::base::owner::Owner;
use crate::base::telemetry;
use crate::base::wait::{Wait, WaitError, WaitState};

/// The minimum pause of a waiter: a lease that expires now is requested again after this time.
const MIN_WAIT_INTERVAL: Duration = Duration::from_millis(1);

/// The maximum pause with a clock that no other process reads, because such a clock may run at any
/// speed.
const MAX_PRIVATE_CLOCK_INTERVAL: Duration = Duration::from_millis(5);

/// A held lease, and the report on its previous owner, if that owner did not release.
type Acquired = (Arc<Held>, Option<Box<Recovered>>);

/// Acquires the lease, waiting as `wait` says.
pub(super) fn acquire(lease: &Arc<LeaseSpec>, wait: &Wait) -> Result<Acquired> {
    let mut waiter = None;
    let acquired = Acquisition::begin(lease, wait, &mut waiter).and_then(Acquisition::run);
    let is_of_wait = |error: &Error| error.is_held() || error.is_timeout() || error.is_cancelled();
    if let (Err(error), Some(waiter)) = (&acquired, waiter) {
        if !is_of_wait(error) {
            // The store failed for this thread only: the other threads ask for themselves.
            waiter.dissolve();
        }
    }
    acquired
}

struct Acquisition<'a> {
    lease: &'a LeaseSpec,
    wait: &'a Wait,
    /// This thread in the queue of the process. It outlives the acquisition, which may have to
    /// dissolve the queue.
    waiter: &'a mut Option<Waiter>,
    /// `None` if the acquisition does not wait for a holder.
    wait_state: Option<WaitState>,
    found: FoundLease<'a>,
    claim: PendingClaim,
    /// The report on a previous owner that no store passes on to the next owner.
    recovered: Option<Box<Recovered>>,
    /// How many attempts in a row have failed.
    failures: u32,
    /// The store has answered an attempt.
    is_answered: bool,
    /// The wait for a holder was reported to telemetry.
    is_waiting: bool,
}

/// The outcome of one attempt.
enum Outcome {
    /// The request that was sent at this time was granted.
    Granted(Grant, Duration),
    Busy(LeaseSnapshot),
    Failed(StoreError),
}

impl<'a> Acquisition<'a> {
    fn begin(
        lease: &'a Arc<LeaseSpec>,
        wait: &'a Wait,
        waiter: &'a mut Option<Waiter>,
    ) -> Result<Self> {
        let found = FoundLease::new(lease);
        wait.check(&found)?;
        let scheduler = HeartbeatScheduler::start().map_err(|error| {
            Error::io("start the heartbeat thread for", lease.name.as_str(), error)
        })?;
        Ok(Self {
            lease,
            wait,
            waiter,
            claim: PendingClaim::begin(lease.clone(), scheduler),
            // The time limit starts here, so that it also bounds a store that does not answer.
            wait_state: wait.state(),
            found,
            recovered: None,
            failures: 0,
            is_answered: false,
            is_waiting: false,
        })
    }

    fn run(mut self) -> Result<Acquired> {
        if self.wait_state.is_some() && self.lease.queue.has_waiters() {
            self.found.owner = self.lease.queue.holder();
            self.is_waiting = true;
            telemetry::waiting(&self.found);
            self.wait_in_queue()?;
        }
        loop {
            match self.attempt()? {
                Outcome::Granted(grant, sent) => {
                    return Ok((self.claim.granted(grant, sent), self.recovered));
                }
                Outcome::Busy(snapshot) => self.wait_for_holder(&snapshot)?,
                // The next attempt repeats the claim. If the store carried out this attempt, it
                // returns the same grant.
                Outcome::Failed(failure) => self.pause_after(failure)?,
            }
        }
    }

    /// Sends one request to the store, and judges the answer.
    fn attempt(&mut self) -> Result<Outcome> {
        let (lease, options) = (self.lease, &self.lease.options);
        let by = match self.wait_state.as_ref().and_then(WaitState::until) {
            Some(until) => {
                let earliest = Deadline::after(lease.min_attempt_timeout());
                lease
                    .request_deadline()
                    .min(Deadline::from(until).max(earliest))
            }
            None => lease.request_deadline(),
        };
        let sent = options.clock.now();
        match lease
            .store
            .try_acquire(&lease.name, &self.claim.claim, options.ttl, by)
        {
            Ok(Attempt::Granted(mut grant)) => {
                if options.clock.now() >= options.timing().valid_until(sent, grant.ttl()) {
                    return Ok(Outcome::Failed(self.return_late_grant(grant, sent)));
                }
                self.recovered = grant.take_recovered().or(self.recovered.take());
                Ok(Outcome::Granted(grant, sent))
            }
            Ok(Attempt::Busy(snapshot)) => Ok(Outcome::Busy(snapshot)),
            Err(error @ StoreError::Permanent(_)) => Err(lease.error(error)),
            Err(error) => {
                if matches!(error, StoreError::Unknown(_)) {
                    self.claim.record_unanswered(sent);
                }
                Ok(Outcome::Failed(error))
            }
        }
    }

    /// Gives back a grant whose answer came after its time was over. Returns the failure of the
    /// attempt.
    fn return_late_grant(&mut self, mut grant: Grant, sent: Duration) -> StoreError {
        match self
            .lease
            .return_grant(&grant, self.lease.request_deadline())
        {
            Ok(is_passed_on) => {
                // If the store does not pass this report on, this acquisition is the last that can
                // make it.
                self.recovered = grant
                    .take_recovered()
                    .filter(|_| !is_passed_on)
                    .or(self.recovered.take());
                self.claim.replace_claim();
            }
            // The heartbeat gives the grant back, and passes the report of the dead owner on.
            Err(_) => self.claim.abandon_claim(sent),
        }
        self.is_answered = true;
        StoreError::not_applied("the answer came too late")
    }

    /// Waits until the lease may have changed, or until the wait ends. An acquisition that does not
    /// wait fails.
    fn wait_for_holder(&mut self, snapshot: &LeaseSnapshot) -> Result<()> {
        (self.failures, self.is_answered) = (0, true);
        self.found.owner = snapshot.owner().cloned();
        if self.wait_state.is_none() {
            return Err(self.found.held());
        }
        if !mem::replace(&mut self.is_waiting, true) {
            telemetry::waiting(&self.found);
        }
        if self.wait_in_queue()? {
            self.wait_for_change(snapshot)?;
        }
        Ok(())
    }

    /// Waits until this thread is first in the queue of the process. Returns true if it was first
    /// already and may wait at the store, and false if the lease may have changed in the meantime.
    fn wait_in_queue(&mut self) -> Result<bool> {
        let Some(wait_state) = &self.wait_state else {
            return Ok(true);
        };
        let queue = &self.lease.queue;
        if !self.waiter.as_ref().is_some_and(Waiter::is_first) {
            // Without a free descriptor the thread asks the store out of order.
            *self.waiter = queue.join().ok();
        }
        let Some(waiter) = self.waiter else {
            return Ok(true);
        };
        let event = match waiter.as_fd() {
            Some(event) if !waiter.is_first() => event,
            _ => {
                queue.set_holder(self.found.owner.as_ref());
                return Ok(true);
            }
        };
        let woken = wait_state.wait(Some(event), Duration::MAX)?;
        woken.map(|()| false).map_err(|error| {
            self.found.owner = queue.holder();
            wait_state.error(error, &self.found)
        })
    }

    /// Waits until the lease differs from the snapshot, until the snapshot expires, or until the
    /// wait ends.
    fn wait_for_change(&self, snapshot: &LeaseSnapshot) -> Result<()> {
        let Some(wait_state) = &self.wait_state else {
            return Ok(());
        };
        let (lease, options) = (self.lease, &self.lease.options);
        let mut limit = snapshot
            .expires_in()
            .unwrap_or(options.ttl)
            .max(MIN_WAIT_INTERVAL);
        if !lease.store.profile().wakes_waiters {
            limit = limit.min(options.retry_delay);
        }
        if options.clock.shared_id().is_none() {
            limit = limit.min(MAX_PRIVATE_CLOCK_INTERVAL);
        }
        let by = wait_state.until().map_or(Deadline::after(limit), |until| {
            Deadline::after(limit).min(until.into())
        });
        let stop = wait_state.token().cloned().unwrap_or_default();
        let has_failed = match lease
            .store
            .wait_for_change(&lease.name, snapshot, by, &stop)
        {
            Err(error @ StoreError::Permanent(_)) => return Err(lease.error(error)),
            waited => waited.is_err(),
        };
        let pause = if has_failed {
            wait_state.sleep(options.retry_delay)?
        } else {
            Ok(())
        };
        pause
            .and_then(|()| wait_state.portion(Duration::MAX).map(drop))
            .map_err(|error| wait_state.error(error, &self.found))
    }

    /// Pauses before the next attempt, or fails if there were too many failures or the wait ends.
    fn pause_after(&mut self, failure: StoreError) -> Result<()> {
        let options = &self.lease.options;
        self.failures += 1;
        if self.failures > options.retry_limit {
            return Err(self.lease.error(failure));
        }
        // A call that does not wait for a holder still waits for the store.
        let Some(wait_state) = &self.wait_state else {
            std::thread::sleep(options.retry_delay);
            return self.wait.check(&self.found);
        };
        match wait_state.sleep(options.retry_delay)? {
            Ok(()) => Ok(()),
            // The store never answered that the lease is held, so this is not a timeout of the
            // lock.
            Err(WaitError::TimedOut) if !self.is_answered => Err(self.lease.error(failure)),
            Err(error) => Err(wait_state.error(error, &self.found)),
        }
    }
}

/// A lease as an acquisition found it, for errors and events.
pub(super) struct FoundLease<'a> {
    lease: &'a LeaseSpec,
    owner: Option<Owner>,
}

impl<'a> FoundLease<'a> {
    pub(super) fn new(lease: &'a LeaseSpec) -> Self {
        Self { lease, owner: None }
    }
}

impl LockInfo for FoundLease<'_> {
    fn describe(&self) -> String {
        self.lease.describe()
    }

    #[cfg(feature = "tracing")]
    fn label(&self) -> (&'static str, String) {
        ("lease", self.lease.name.as_str().to_owned())
    }

    fn holder(&self) -> Option<Owner> {
        self.owner.clone()
    }

    fn held(&self) -> Error {
        let source = self.lease.options.held_error.as_ref().map(|error| error());
        ErrorKind::Held {
            lock: self.describe(),
            owner: self.holder().map(Box::new),
            source,
        }
        .into()
    }
}
