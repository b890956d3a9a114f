//! What the heartbeat scheduler needs to know of a lease, so that tests of the scheduler need no
//! store.

use std::sync::Arc;
use std::time::Duration;

use crate::lease::clock::Clock;

/// A lease that the heartbeat scheduler renews until it is over.
pub(in crate::lease) trait Renewable: Send + Sync {
    fn domain(&self) -> FailureDomain;

    fn ttl(&self) -> Duration;

    /// Returns the interval between two renewals.
    fn heartbeat(&self) -> Duration;

    fn clock(&self) -> &Arc<dyn Clock>;

    /// Returns the id that the clock shares with other clocks that show the same time.
    fn clock_id(&self) -> Option<u128>;

    /// Returns how long a release waits for the store. A longer request is stuck.
    fn release_timeout(&self) -> Duration;

    /// Returns whether the lease has ended, and the scheduler has nothing more to do for it.
    fn is_over(&self) -> bool;

    /// Does what is due, with at most one request at a time. Returns when to run again, if ever.
    fn renew(&self) -> Option<Duration>;

    /// Does what [`renew`](Self::renew) does while the store must get no request for the duration
    /// `backoff`: only reports the end.
    fn skip_renewal(&self, backoff: Duration) -> Option<Duration>;
}

/// A failure domain: leases that hang together. After one stuck request, further requests of the
/// domain are likely to be stuck.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::lease) enum FailureDomain {
    /// A store, by its address.
    Store(usize),
    /// The failure domain that several stores report as theirs.
    Common(u64),
}
