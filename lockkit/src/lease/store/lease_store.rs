//! The interface between a lease and the store that keeps its record.
//!
//! Each request of a [`LeaseStore`] is atomic for all users of the store. The store also says how
//! to wait for a change. The lease decides everything else: how long a grant is valid, when to
//! renew, what a failure means, when the lease is lost. So a store for another engine needs five
//! requests, and cannot get the timing wrong.

use std::time::Duration;

pub use super::types::{
    Attempt, ClaimId, Deadline, Durability, Grant, LeaseName, LeaseSnapshot, Released, Renewal,
    StoreProfile,
};
use crate::base::cancel::CancelToken;
use crate::base::error::StoreError;
use crate::base::wait::Wait;

/// A store that keeps the records of leases.
///
/// Requirements for every store:
/// - [`try_acquire`](Self::try_acquire) is one atomic step. A name that is absent, free, expired,
///   or already the claim's becomes the claim's. Its token is above every earlier token of that
///   name, but a claim that already has the name keeps its token.
/// - [`renew`](Self::renew), [`release`](Self::release) and [`evict`](Self::evict) compare the
///   claim and the token in the step in which they change the record.
/// - No request takes longer than its [`Deadline`]. One heartbeat thread serves all leases of a
///   process. A hanging request delays the renewals of other leases until another thread has
///   noticed, and costs a thread for as long as the request hangs. A renewal may come too late if
///   it queues behind the requests of other threads, for example on a shared connection. The same
///   is true behind a waiter in [`wait_for_change`](Self::wait_for_change).
/// - A request that may have taken effect, though no answer came, is [`StoreError::Unknown`].
///
/// No process compares a store's clock with another clock. A store promises to keep a record for
/// the ttl from when the store got the request; the lease counts from before it sent the request.
///
/// A store in memory, for the threads of one process:
/// ```
/// use std::collections::HashMap;
/// use std::sync::{Arc, Condvar, Mutex};
/// use std::time::{Duration, Instant};
/// use lockkit::lease::{
///     Attempt, ClaimId, Deadline, Durability, Grant, LeaseName, LeaseSnapshot, LeaseStore, Released, Renewal,
///     StoreError, StoreProfile,
/// };
/// use lockkit::{CancelToken, Lease};
///
/// #[derive(Default)]
/// struct Memory(Mutex<HashMap<String, Record>>);
///
/// #[derive(Default)]
/// struct Record { holder: Option<(ClaimId, Instant, Duration)>, token: u64 }
///
/// impl Record {
///     fn snapshot(&self) -> Option<LeaseSnapshot> {
///         let (claim, until, _) = self.holder?;
///         let left = until.saturating_duration_since(Instant::now());
///         Some(LeaseSnapshot::new(self.token).with_claim(claim).with_token(self.token).with_expires_in(left))
///     }
///     fn is_of(&self, grant: &Grant) -> bool {
///         self.token == grant.token() && self.holder.is_some_and(|(claim, ..)| claim == *grant.claim())
///     }
/// }
///
/// impl LeaseStore for Memory {
///     fn profile(&self) -> StoreProfile {
///         StoreProfile::new(Durability::Memory)
///     }
///     fn try_acquire(&self, name: &LeaseName, claim: &ClaimId, ttl: Duration, _: Deadline)
///         -> Result<Attempt, StoreError> {
///         let mut records = self.0.lock().unwrap();
///         let record = records.entry(name.as_str().to_owned()).or_default();
///         let (now, old) = (Instant::now(), record.holder);
///         match old {
///             Some((holder, until, _)) if holder != *claim && until > now => {
///                 return Ok(Attempt::Busy(record.snapshot().expect("a busy name is held")));
///             }
///             Some((holder, ..)) if holder == *claim => {}
///             _ => record.token += 1,
///         }
///         record.holder = Some((*claim, now + ttl, ttl));
///         Ok(Attempt::Granted(Grant::new(name, claim, record.token, ttl)))
///     }
///     fn renew(&self, grant: &Grant, _: Deadline) -> Result<Renewal, StoreError> {
///         match self.0.lock().unwrap().get_mut(grant.name().as_str()) {
///             Some(record) if record.is_of(grant) => {
///                 record.holder = Some((*grant.claim(), Instant::now() + grant.ttl(), grant.ttl()));
///                 Ok(Renewal::Extended { ttl: grant.ttl() })
///             }
///             _ => Ok(Renewal::Lost { by: None }),
///         }
///     }
///     fn release(&self, grant: &Grant, _: Deadline) -> Result<Released, StoreError> {
///         match self.0.lock().unwrap().get_mut(grant.name().as_str()) {
///             Some(record) if record.is_of(grant) => {
///                 record.holder = None;
///                 Ok(Released::Done)
///             }
///             _ => Ok(Released::NotMine),
///         }
///     }
///     fn get(&self, name: &LeaseName, _: Deadline) -> Result<Option<LeaseSnapshot>, StoreError> {
///         Ok(self.0.lock().unwrap().get(name.as_str()).and_then(Record::snapshot))
///     }
///     fn evict(&self, name: &LeaseName, snapshot: &LeaseSnapshot, _: Deadline) -> Result<Released, StoreError> {
///         match self.0.lock().unwrap().get_mut(name.as_str()) {
///             Some(record) if record.snapshot().is_some_and(|now| now.is_same_holder(snapshot)) => {
///                 record.holder = None;
///                 Ok(Released::Done)
///             }
///             _ => Ok(Released::NotMine),
///         }
///     }
/// }
///
/// # fn main() -> lockkit::Result<()> {
/// let store = Arc::new(Memory::default());
/// let first = Lease::with_store(store.clone(), "nightly").build()?.lock()?;
/// assert!(Lease::with_store(store.clone(), "nightly").build()?.try_lock().unwrap_err().is_held());
/// let token = first.token();
/// first.release()?;
/// assert!(Lease::with_store(store, "nightly").build()?.lock()?.token() > token);
/// # Ok(()) }
/// ```
pub trait LeaseStore: Send + Sync {
    /// Returns what the store can do. The result is always the same, except that the first request
    /// may determine the failure domain. The lease calls this often.
    fn profile(&self) -> StoreProfile;

    /// Gives the name to `claim` for `ttl`, unless another claim has it. Repeated with the same
    /// claim after [`StoreError::Unknown`], it returns the grant that the earlier request may have
    /// made.
    ///
    /// # Errors
    /// See [`StoreError`], here and below.
    fn try_acquire(
        &self,
        name: &LeaseName,
        claim: &ClaimId,
        ttl: Duration,
        by: Deadline,
    ) -> Result<Attempt, StoreError>;

    /// Extends the grant by another ttl from now, if the grant is still in force.
    ///
    /// # Errors
    /// After an error the outcome is in doubt. The lease repeats the request until the grant has
    /// expired.
    fn renew(&self, grant: &Grant, by: Deadline) -> Result<Renewal, StoreError>;

    /// Frees the name, if it is still the grant's. The token stays, so that the next token is
    /// greater.
    ///
    /// # Errors
    /// After an error the grant expires by itself.
    fn release(&self, grant: &Grant, by: Deadline) -> Result<Released, StoreError>;

    /// Releases, as [`release`](Self::release) does, a grant that its holder did not release. The
    /// store reports this to the next owner:
    /// - The grant has expired by its holder's clock.
    /// - No caller received the grant, because its request got no answer, and the grant was
    ///   [recovered](Grant::recovered) from an earlier owner. The store reports that earlier owner
    ///   to the next owner.
    ///
    /// A store needs this only if other processes would go on waiting for an expired grant, or if
    /// it returns [`StoreError::Unknown`]. By default this does nothing.
    ///
    /// # Errors
    /// As [`release`](Self::release).
    fn abandon(&self, grant: &Grant, by: Deadline) -> Result<Released, StoreError> {
        let _ = (grant, by);
        Ok(Released::NotMine)
    }

    /// Returns the holder of the name; `None` if the name is free. Changes nothing.
    ///
    /// # Errors
    /// See [`StoreError`].
    fn get(&self, name: &LeaseName, by: Deadline) -> Result<Option<LeaseSnapshot>, StoreError>;

    /// Takes the name from the holder in `snapshot`, and from no other holder.
    ///
    /// # Errors
    /// See [`StoreError`].
    fn evict(
        &self,
        name: &LeaseName,
        snapshot: &LeaseSnapshot,
        by: Deadline,
    ) -> Result<Released, StoreError>;

    /// Waits until a change since `snapshot`, until `by`, or until `stop` is cancelled. A spurious
    /// return is allowed: the lease then tries again, and bounds each wait by
    /// [`LeaseSnapshot::expires_in`].
    ///
    /// A store with notifications subscribes to changes before it checks for a change that has
    /// already happened. By default this only sleeps. The lease then limits `by` to
    /// [`acquire_retry_delay`](crate::LeaseBuilder::acquire_retry_delay), because
    /// [`wakes_waiters`](StoreProfile::wakes_waiters) is false.
    ///
    /// # Errors
    /// After an error the lease tries again at its retry delay; a
    /// [`Permanent`](StoreError::Permanent) error ends the acquisition.
    ///
    /// A store in memory that notifies every change through a condition variable:
    ///
    /// ```
    /// # use std::sync::{Condvar, Mutex};
    /// # use lockkit::lease::Deadline;
    /// # struct Memory { version: Mutex<u64>, changed: Condvar }
    /// # impl Memory {
    /// fn wait_for_change(&self, snapshot: u64, by: Deadline) {
    ///     let version = self.version.lock().unwrap();
    ///     drop(self.changed.wait_timeout_while(version, by.remaining(), |version| *version == snapshot));
    /// }
    /// # }
    /// # let memory = Memory { version: Mutex::new(1), changed: Condvar::new() };
    /// # memory.wait_for_change(0, Deadline::after(std::time::Duration::from_secs(9)));
    /// ```
    fn wait_for_change(
        &self,
        name: &LeaseName,
        snapshot: &LeaseSnapshot,
        by: Deadline,
        stop: &CancelToken,
    ) -> Result<(), StoreError> {
        let _ = (name, snapshot);
        sleep(by, stop)
    }
}

/// Sleeps until `by` or `stop`.
pub(in crate::lease) fn sleep(by: Deadline, stop: &CancelToken) -> Result<(), StoreError> {
    match Wait::until(by.moment()).or_cancelled(stop).state() {
        Some(wait_state) => wait_state
            .sleep(by.remaining())
            .map(drop)
            .map_err(StoreError::not_applied),
        None => Ok(()),
    }
}
