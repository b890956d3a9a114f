//! A lease as its handles, guards and acquisitions share it: the name, the store, and the options.

use std::sync::Arc;
use std::time::Duration;

use super::options::Options;
use super::store::lease_store::{Deadline, Grant, LeaseName, LeaseStore, Released};
use super::waiters::QueueKey;
use crate::base::error::{Error, StoreError};

/// The maximum time of a request that a caller waits for. A quarter of the ttl applies if it is
/// shorter.
const MAX_REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// The minimum time of a request, also of a release that waited long for a renewal.
pub(super) const MIN_REQUEST_TIMEOUT: Duration = Duration::from_millis(20);

pub(super) struct LeaseSpec {
    pub(super) name: LeaseName,
    pub(super) store: Arc<dyn LeaseStore>,
    /// Identifies the queue of its waiters in this process.
    pub(super) queue: QueueKey,
    pub(super) options: Options,
}

impl LeaseSpec {
    /// Gives back a grant that no caller received. Returns whether the store reports the owner that
    /// the grant was recovered from to the next owner.
    pub(super) fn return_grant(&self, grant: &Grant, by: Deadline) -> Result<bool, StoreError> {
        let is_passed_on =
            grant.recovered().is_some() && self.store.abandon(grant, by)? == Released::Done;
        if !is_passed_on {
            self.store.release(grant, by)?;
        }
        Ok(is_passed_on)
    }

    /// Returns the deadline of a request that starts now: well within a ttl, and while the caller
    /// still waits.
    pub(super) fn request_deadline(&self) -> Deadline {
        Deadline::after((self.options.ttl / 4).min(MAX_REQUEST_TIMEOUT))
    }

    /// Returns the minimum time of an attempt, even if the waiter gives up sooner. Without an
    /// answer the outcome would be unknown, and an orphaned grant could hold the name for a moment.
    /// A store that keeps no short ttls is slow.
    pub(super) fn min_attempt_timeout(&self) -> Duration {
        (self.store.profile().smallest_ttl / 8)
            .clamp(MIN_REQUEST_TIMEOUT, Duration::from_millis(250))
    }

    /// Describes the lease for people.
    pub(super) fn describe(&self) -> String {
        format!("the lease {}", self.name)
    }

    /// Converts an error of the store.
    pub(super) fn error(&self, error: StoreError) -> Error {
        error.into_error(|| self.describe())
    }
}
