//! The state of a held lease.

use std::sync::Arc;

use super::store::StoreError;
use crate::owner::Owner;

/// Why a lease is not held any more.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LossReason {
    /// Its time was over before it was renewed: the process was stopped, or asleep with the machine, or it did not
    /// call [`progress`](super::LeaseGuard::progress).
    #[error("it was not renewed in time")]
    Expired,
    /// The record names somebody else, or was given free by force.
    #[error("it was taken over{}", .by.as_ref().map(|by| format!(" by {}", by.describe())).unwrap_or_default())]
    TakenOver {
        /// Who has it, where that is known.
        by: Option<Owner>,
    },
    /// Its guard released it.
    #[error("it was released")]
    Released,
    /// Its time was over, because the store did not renew it.
    #[error("it could not be renewed in time")]
    Store(#[source] Arc<StoreError>),
    /// This is a forked child's copy of its guard: the lease stays with the parent.
    #[error("it is the parent's of this forked process")]
    Forked,
}
