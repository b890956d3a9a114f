//! The options of a lease, after the builder has checked them.

use std::sync::Arc;
use std::time::Duration;

use super::clock::Clock;
use super::state::LeaseTiming;
use crate::base::error::LossReason;

/// The minimum ttl. Below it, the safety margin and the time of a request leave nothing.
pub(super) const MIN_TTL: Duration = Duration::from_millis(30);
/// The maximum ttl. A lock that needs a longer ttl does not need a lease.
pub(super) const MAX_TTL: Duration = Duration::from_secs(365 * 86_400);

/// An error of the program's own, created for each use.
pub(super) type HeldError = Arc<dyn Fn() -> Box<dyn std::error::Error + Send + Sync> + Send + Sync>;
pub(super) type OnLost = Arc<dyn Fn(&Loss) + Send + Sync>;

/// The options of a lease, which passed the checks of
/// [`LeaseBuilder::build`](super::LeaseBuilder::build).
pub(super) struct Options {
    pub(super) ttl: Duration,
    pub(super) heartbeat: Duration,
    pub(super) progress: Option<Duration>,
    pub(super) on_lost: Option<OnLost>,
    pub(super) held_error: Option<HeldError>,
    pub(super) retry_limit: u32,
    pub(super) retry_delay: Duration,
    pub(super) clock: Arc<dyn Clock>,
    /// The [`shared_id`](Clock::shared_id) of the clock, kept here because a call costs system
    /// calls.
    pub(super) clock_id: Option<u128>,
}

impl Options {
    pub(super) fn timing(&self) -> LeaseTiming {
        LeaseTiming {
            ttl: self.ttl,
            heartbeat: self.heartbeat,
            progress: self.progress,
        }
    }
}

/// The loss of a lease: the argument of the [`on_lost`](super::LeaseBuilder::on_lost) callback.
///
/// ```
/// # fn main() -> lockkit::Result<()> {
/// let builder = lockkit::Lease::file("/srv/shared/leader");
/// let lease = builder.on_lost(|loss| eprintln!("{}, under {}: {}", loss.lock, loss.token, loss.reason)).build()?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Loss {
    /// The lease, described for people.
    pub lock: String,
    /// The token under which the lease was held.
    pub token: u64,
    /// The reason of the loss.
    pub reason: LossReason,
}
