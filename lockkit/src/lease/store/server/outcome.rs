//! What the answers of a server mean: for a request that was sent more than once, and for a holder
//! that is dead.

use std::cell::Cell;
use std::time::Duration;

use crate::base::error::StoreError;
use crate::base::owner::{Liveness, Owner};
use crate::lease::store::lease_store::{Attempt, LeaseSnapshot, Released};

pub(in crate::lease::store) type Result<T, E = StoreError> = std::result::Result<T, E>;

/// Whether an attempt of a request got no answer, and so may have taken effect.
///
/// A refusal of the last attempt says nothing about earlier attempts. So the request is
/// indeterminate if the last attempt is refused and an earlier one got no answer.
#[derive(Default)]
pub(in crate::lease::store) struct Outcome {
    is_indeterminate: Cell<bool>,
}

impl Outcome {
    /// Records the error of one attempt.
    pub(in crate::lease::store) fn observe(&self, error: &StoreError) {
        if matches!(error, StoreError::Unknown(_)) {
            self.set_indeterminate();
        }
    }

    /// Records an attempt that may have taken effect.
    pub(in crate::lease::store) fn set_indeterminate(&self) {
        self.is_indeterminate.set(true);
    }

    /// Returns whether an attempt got no answer.
    pub(in crate::lease::store) fn is_indeterminate(&self) -> bool {
        self.is_indeterminate.get()
    }

    /// Returns the error of the whole request, from the error of its last attempt.
    pub(in crate::lease::store) fn resolve(&self, last: StoreError) -> StoreError {
        match last {
            StoreError::NotApplied(cause) | StoreError::Permanent(cause)
                if self.is_indeterminate() =>
            {
                StoreError::Unknown(cause)
            }
            error => error,
        }
    }
}

/// Returns the result of a release that found the name under another claim. If an earlier attempt
/// got no answer, that attempt freed the name, and the other claim acquired the name afterwards.
pub(in crate::lease::store) fn release_not_found(is_indeterminate: bool) -> Released {
    if is_indeterminate {
        Released::Done
    } else {
        Released::NotMine
    }
}

/// The state in which a grant ends, as the records of the servers name it.
#[cfg(any(feature = "postgres", feature = "redis"))]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::lease::store) enum EndState {
    /// The holder released the lease.
    Released,
    /// The holder gave the lease up.
    Lost,
    /// The holder was evicted.
    Evicted,
}

#[cfg(any(feature = "postgres", feature = "redis"))]
impl EndState {
    /// Returns the word in the record.
    pub(in crate::lease::store) fn text(self) -> &'static str {
        match self {
            Self::Released => "released",
            Self::Lost => "lost",
            Self::Evicted => "evicted",
        }
    }
}

/// Tries to acquire. `request` makes the request; its argument is the holder whose grant counts as
/// expired, if any. The request itself compares the claim and the token of that holder, so a holder
/// that acquired the name meanwhile is not affected.
pub(in crate::lease::store) fn acquire_or_take_over(
    mut request: impl FnMut(Option<&LeaseSnapshot>) -> Result<Attempt>,
) -> Result<Attempt> {
    match request(None)? {
        Attempt::Busy(seen) if is_dead(seen.owner()) => request(Some(&seen)),
        attempt => Ok(attempt),
    }
}

/// Returns whether the owner is certainly dead. A reboot of this host is no proof. Another host of
/// the same name and installation, such as a machine from the same image, may share the server.
pub(super) fn is_dead(owner: Option<&Owner>) -> bool {
    owner.is_some_and(|owner| owner.is_of_this_boot() && owner.liveness() == Liveness::Dead)
}

/// Returns a holder as callers see it: a dead holder has no time left.
pub(in crate::lease::store) fn expire_if_dead(seen: LeaseSnapshot) -> LeaseSnapshot {
    if is_dead(seen.owner()) {
        seen.with_expires_in(Duration::ZERO)
    } else {
        seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusal_after_unanswered_attempt_is_unknown() {
        let refusals = [
            || StoreError::not_applied("down"),
            || StoreError::permanent("never"),
        ];
        for refusal in refusals {
            let outcome = Outcome::default();
            outcome.observe(&refusal());
            assert!(!matches!(
                outcome.resolve(refusal()),
                StoreError::Unknown(_)
            ));
            outcome.observe(&StoreError::unknown("cut"));
            assert!(matches!(outcome.resolve(refusal()), StoreError::Unknown(_)));
        }
        assert_eq!(
            [false, true].map(release_not_found),
            [Released::NotMine, Released::Done]
        );
    }

    #[test]
    fn acquire_from_dead_owner_of_this_boot_takes_over() {
        let seen =
            |owner: Owner| Attempt::Busy(LeaseSnapshot::new(7).with_token(7).with_owner(owner));
        let mut dead = Owner::current();
        dead.start = dead.start.map(|start| start + 1);
        let mut of_earlier_boot = dead.clone();
        of_earlier_boot.boot = of_earlier_boot.boot.map(|boot| boot ^ 1);
        let mut requests = Vec::new();
        for owner in [Owner::current(), of_earlier_boot, dead] {
            let _ = acquire_or_take_over(|expired| {
                requests.push(expired.map(LeaseSnapshot::revision));
                Ok(seen(owner.clone()))
            });
        }
        assert_eq!(requests, [None, None, None, Some(7)]);
    }
}
