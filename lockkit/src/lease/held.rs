//! A held lease, as its guard, its watchers and the heartbeat share it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::tenure::LossReason;
use crate::error::{Error, Result};
use crate::wait::{CancelToken, Wait};

pub(super) struct Held {}

impl Held {
    pub(super) fn name(&self) -> &str {
        todo!()
    }
    pub(super) fn token(&self) -> u64 {
        todo!()
    }
    pub(super) fn check(&self) -> Result<(), LossReason> {
        todo!()
    }
    pub(super) fn remaining(&self) -> Duration {
        todo!()
    }
    pub(super) fn progress(&self) {
        todo!()
    }
    pub(super) fn release(&self) -> Result<()> {
        todo!()
    }
    pub(super) fn lost(&self, _: LossReason) -> Error {
        todo!()
    }
}

/// Tells of the loss of a lease, or of its release. Clones tell of the same one, and all outlive the guard.
#[derive(Clone)]
pub struct LostSignal(Arc<Held>);

impl LostSignal {
    pub(super) fn new(held: Arc<Held>) -> Self {
        Self(held)
    }

    /// Whether the lease is not held any more, by the clock: as [`is_held`](super::LeaseGuard::is_held) has it.
    pub fn is_lost(&self) -> bool {
        self.reason().is_some()
    }

    /// Why the lease is not held any more; `None` while it is.
    pub fn reason(&self) -> Option<LossReason> {
        self.0.check().err()
    }

    /// A token that is cancelled at the loss or the release, to end waits for other locks with. The heartbeat thread
    /// cancels it, or whoever else finds the lease lost first.
    pub fn token(&self) -> CancelToken {
        todo!()
    }

    /// Waits for the loss or the release, as long as `wait` says.
    ///
    /// # Errors
    /// [`Timeout`](crate::ErrorKind::Timeout), or [`Held`](crate::ErrorKind::Held) without waiting, when the lease is
    /// still held by then; [`Cancelled`](crate::ErrorKind::Cancelled); [`Io`](crate::ErrorKind::Io) when no descriptor
    /// is left to wait with.
    pub fn wait(&self, _wait: &Wait) -> Result<LossReason> {
        todo!()
    }
}

impl fmt::Debug for LostSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LostSignal").field("reason", &self.reason()).finish_non_exhaustive()
    }
}
