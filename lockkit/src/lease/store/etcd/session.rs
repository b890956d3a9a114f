//! Sessions: one etcd lease for all leases of a process that have the same TTL.
//!
//! etcd deletes the keys of a session that was not kept alive for its TTL. So one request renews
//! all its leases. The validity of a lease counts from the time at which the request that last kept
//! the session alive was *sent*. A renewal sends no request if two facts are recent: the session
//! was kept alive, and the lease's key was found in place. Recent means less than an eighth of the
//! TTL ago, and less than 250 ms ago. Otherwise the renewal asks etcd, and checks as many other
//! keys as fit into the request. So a thousand leases of 2 s cost about forty requests per second.
//!
//! **A session counts as kept alive only after a quorum confirms it.** The leader keeps sessions
//! alive by itself. A leader that was cut off or stopped would continue to do so until it learns
//! that it was replaced. Every answer names the term of its leader. A quorum answers the request
//! that follows, a transaction. If its term is the term of the answer before, the server that kept
//! the session alive was the leader.
//!
//! **Orphaned keys are deleted.** A key lives as long as its session. A key without a holder, or
//! without renewals, would live as long as other leases of the process. There are three kinds: see
//! [`OrphanCause`]. The thread that keeps the session alive deletes keys that have been orphaned
//! for a TTL. A new acquisition takes them over at once. A request without an answer may be applied
//! later than the request that replaced it. So the possible grant of such a request is looked after
//! for three TTLs, even if its claim has been granted and released since.
//!
//! A session without leases is not kept alive, and ends after its TTL.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::lease::clock::{Clock, SystemClock};
use crate::lease::store::lease_store::{ClaimId, Grant, LeaseName};

/// A check of the session or of a key counts for the TTL divided by this, at most [`MAX_RECENT`].
/// The limit exists because a holder with a short heartbeat interval must learn of a loss soon.
const RECENT_DIVISOR: u32 = 8;
const MAX_RECENT: Duration = Duration::from_millis(250);
/// The maximum number of keys that one request checks; etcd refuses transactions with more
/// operations.
const MAX_KEYS_PER_REQUEST: usize = 128;
/// An orphaned key is looked after for so many TTLs. Until then a request without an answer counts
/// as possibly under way.
const ORPHAN_LIFETIME_TTLS: u32 = 3;
/// The maximum number of orphaned keys that one keep-alive of the session deletes.
const MAX_DELETIONS_PER_KEEP_ALIVE: usize = 16;

pub(super) struct Session {
    /// The id that etcd gave the session.
    pub(super) id: u64,
    ttl: Duration,
    /// Held by the one renewal that keeps the session alive and checks its keys.
    pub(super) renewal_lock: Mutex<()>,
    state: Mutex<State>,
}

struct State {
    /// When the request was sent that last kept the session alive.
    kept_alive_at: Duration,
    keys: HashMap<LeaseName, Key>,
    orphans: Vec<Orphan>,
    /// The claims that are being requested, each as often as there are requests.
    requested_claims: Vec<ClaimId>,
    /// Until this time a key counts as found if it was found within a TTL.
    checks_paused_until: Duration,
}

/// A key that is attached to the session, as far as this process knows.
struct Key {
    claim: ClaimId,
    token: u64,
    /// When the request was sent that found the key in place.
    found_at: Duration,
    /// When its lease was last renewed.
    renewed_at: Duration,
}

/// The reason why a key that may exist has no holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OrphanCause {
    /// The request that acquired the key got no answer, and no caller received the grant.
    Indeterminate,
    /// The request that released the key got no answer.
    Released,
    /// The key was not renewed for a TTL: its holder hangs, or could not report that it gave up the
    /// lease.
    NotRenewed,
}

struct Orphan {
    name: LeaseName,
    claim: ClaimId,
    cause: OrphanCause,
    since: Duration,
    /// When the key is due for deletion, for the first time or again.
    due: Duration,
}

/// A claim that is being requested; see [`Session::begin_request`].
pub(super) struct ClaimRequest {
    session: Arc<Session>,
    claim: ClaimId,
}

impl Drop for ClaimRequest {
    fn drop(&mut self) {
        let mut state = self.session.state.lock();
        if let Some(at) = state
            .requested_claims
            .iter()
            .position(|claim| *claim == self.claim)
        {
            state.requested_claims.swap_remove(at);
        }
    }
}

/// A keep-alive of a session by a request sent at `sent`. It counts if the leader of `term` still
/// is the leader.
#[derive(Clone, Copy)]
pub(super) struct KeepAlive {
    pub(super) sent: Duration,
    pub(super) term: u64,
}

impl Session {
    /// Returns the session that etcd created for a request sent at `sent`.
    pub(super) fn new(id: u64, ttl: Duration, sent: Duration) -> Self {
        Self {
            id,
            ttl,
            renewal_lock: Mutex::new(()),
            state: Mutex::new(State {
                kept_alive_at: sent,
                keys: HashMap::new(),
                orphans: Vec::new(),
                requested_claims: Vec::new(),
                checks_paused_until: Duration::ZERO,
            }),
        }
    }

    /// Returns whether enough of the session is left to begin a lease. The first heartbeat of the
    /// lease keeps the session alive, before another third of the TTL has passed. Keeping it alive
    /// first would cost a waiter one more request.
    pub(super) fn can_begin(&self, now: Duration) -> bool {
        now.saturating_sub(self.state.lock().kept_alive_at) < self.ttl / 4
    }

    /// Returns whether the session was kept alive shortly before `now`.
    pub(super) fn is_fresh(&self, now: Duration) -> bool {
        self.is_recent(self.state.lock().kept_alive_at, now)
    }

    fn is_recent(&self, then: Duration, now: Duration) -> bool {
        now.saturating_sub(then) < self.recent_limit()
    }

    fn recent_limit(&self) -> Duration {
        (self.ttl / RECENT_DIVISOR).min(MAX_RECENT)
    }

    /// Records a keep-alive that a quorum has confirmed.
    pub(super) fn record_keep_alive(&self, sent: Duration) {
        let mut state = self.state.lock();
        state.kept_alive_at = state.kept_alive_at.max(sent);
    }

    /// Returns how long a lease of this session is valid, counted from `now`. The elapsed part
    /// counts for a little more, so that the lease's deduction for clock drift covers the whole
    /// TTL.
    pub(super) fn left(&self, now: Duration) -> Duration {
        let over = now.saturating_sub(self.state.lock().kept_alive_at);
        self.ttl.saturating_sub(over + over / 64)
    }

    /// Records a key that was attached by a request sent at `sent`.
    pub(super) fn add(&self, name: &LeaseName, claim: &ClaimId, token: u64, sent: Duration) {
        let key = Key {
            claim: *claim,
            token,
            found_at: sent,
            renewed_at: now(),
        };
        let mut state = self.state.lock();
        // The answer to a later acquisition may arrive first; then this one is out of date.
        if state
            .keys
            .get(name)
            .is_none_or(|known| known.token <= token)
        {
            state.keys.insert(name.clone(), key);
        }
    }

    /// Removes the grant's key, which is not attached any more.
    pub(super) fn remove(&self, grant: &Grant) {
        let mut state = self.state.lock();
        if state
            .keys
            .get(grant.name())
            .is_some_and(|key| key.is_of(grant))
        {
            state.keys.remove(grant.name());
        }
    }

    /// Records a renewal of the grant. Returns whether the session was kept alive and the grant's
    /// key was found in place shortly before `now`.
    pub(super) fn covers(&self, grant: &Grant, now: Duration) -> bool {
        let mut state = self.state.lock();
        let (is_kept, is_paused) = (
            self.is_recent(state.kept_alive_at, now),
            now < state.checks_paused_until,
        );
        let Some(key) = state
            .keys
            .get_mut(grant.name())
            .filter(|key| key.is_of(grant))
        else {
            return false;
        };
        key.renewed_at = key.renewed_at.max(now);
        is_kept
            && (self.is_recent(key.found_at, now)
                || (is_paused && now.saturating_sub(key.found_at) < self.ttl))
    }

    /// Records that the key of this claim is orphaned, though the key may exist.
    pub(super) fn record_orphan(
        &self,
        name: &LeaseName,
        claim: &ClaimId,
        cause: OrphanCause,
        since: Duration,
    ) {
        let mut state = self.state.lock();
        if state.keys.get(name).is_some_and(|key| key.claim == *claim) {
            state.keys.remove(name);
        }
        state.record_orphan(Orphan {
            name: name.clone(),
            claim: *claim,
            cause,
            since,
            due: since + self.ttl,
        });
    }

    /// Records that the claim is being requested, from `now` until the returned value is dropped.
    /// Meanwhile its key is not orphaned. The key is not deleted before a TTL has passed, which no
    /// request outlasts.
    pub(super) fn begin_request(self: &Arc<Self>, claim: &ClaimId, now: Duration) -> ClaimRequest {
        let mut state = self.state.lock();
        if let Some(orphan) = state
            .orphans
            .iter_mut()
            .find(|orphan| orphan.claim == *claim)
        {
            orphan.due = orphan.due.max(now + self.ttl);
        }
        state.requested_claims.push(*claim);
        ClaimRequest {
            session: self.clone(),
            claim: *claim,
        }
    }

    /// Returns why the key of this claim is orphaned, if it is. A claim that is being requested is
    /// not orphaned.
    pub(super) fn orphan_cause(&self, claim: Option<ClaimId>) -> Option<OrphanCause> {
        let state = self.state.lock();
        let orphan = state
            .orphans
            .iter()
            .find(|orphan| Some(orphan.claim) == claim)?;
        (!state.is_granted_or_requested(orphan)).then_some(orphan.cause)
    }

    /// Returns whether a request of this claim got no answer, and no later request of the claim was
    /// granted. A later request may be under way.
    pub(super) fn is_indeterminate(&self, claim: Option<ClaimId>) -> bool {
        let state = self.state.lock();
        let matches_claim = |orphan: &&Orphan| {
            orphan.cause == OrphanCause::Indeterminate && Some(orphan.claim) == claim
        };
        state
            .orphans
            .iter()
            .find(matches_claim)
            .is_some_and(|orphan| !state.is_granted(orphan))
    }

    /// Returns the orphaned keys to delete now. The same keys are due again later, because a
    /// request without an answer may still be under way.
    pub(super) fn due_for_deletion(&self, now: Duration) -> Vec<(LeaseName, ClaimId, OrphanCause)> {
        let mut state = self.state.lock();
        let not_renewed = state
            .keys
            .iter()
            .filter(|(_, key)| now.saturating_sub(key.renewed_at) > self.ttl);
        let not_renewed: Vec<_> = not_renewed
            .map(|(name, key)| (name.clone(), key.claim))
            .collect();
        for (name, claim) in not_renewed {
            state.keys.remove(&name);
            state.record_orphan(Orphan {
                name,
                claim,
                cause: OrphanCause::NotRenewed,
                since: now,
                due: now,
            });
        }
        let mut orphans = std::mem::take(&mut state.orphans);
        orphans.retain(|orphan| now < orphan.since + self.ttl * ORPHAN_LIFETIME_TTLS);
        let due = orphans
            .iter_mut()
            .filter(|orphan| orphan.due <= now && !state.is_granted_or_requested(orphan))
            .take(MAX_DELETIONS_PER_KEEP_ALIVE);
        let due_for_deletion = due.map(|orphan| {
            orphan.due = now + self.ttl;
            (orphan.name.clone(), orphan.claim, orphan.cause)
        });
        let due_for_deletion = due_for_deletion.collect();
        state.orphans = orphans;
        due_for_deletion
    }

    /// Returns the keys to check together with the grant's, and their tokens: the keys whose last
    /// check is the oldest.
    pub(super) fn keys_to_check(&self, grant: &Grant, now: Duration) -> Vec<(LeaseName, u64)> {
        let state = self.state.lock();
        let mut stale: Vec<_> = state
            .keys
            .iter()
            .filter(|(name, _)| *name != grant.name())
            .collect();
        stale.retain(|(_, key)| now.saturating_sub(key.found_at) >= self.recent_limit() / 2);
        stale.sort_unstable_by_key(|(_, key)| key.found_at);
        let stale = stale
            .into_iter()
            .map(|(name, key)| (name.clone(), key.token))
            .take(MAX_KEYS_PER_REQUEST - 1);
        std::iter::once((grant.name().clone(), grant.token()))
            .chain(stale)
            .collect()
    }

    /// Records that a request sent at `sent` checked whether the keys of the names have these
    /// tokens. The answer arrived at `now`. No further check follows for as long as the request
    /// took. So on a slow server the heartbeats of many leases do not wait for one check after
    /// another.
    pub(super) fn record_check(
        &self,
        found: impl Iterator<Item = (LeaseName, u64, bool)>,
        sent: Duration,
        now: Duration,
    ) {
        let mut state = self.state.lock();
        state.checks_paused_until = now + now.saturating_sub(sent);
        for (name, token, is_in_place) in found {
            let known = state.keys.get_mut(&name).filter(|key| key.token == token);
            match known {
                Some(key) if is_in_place => key.found_at = key.found_at.max(sent),
                // The next renewal of the lease finds out why.
                Some(_) => drop(state.keys.remove(&name)),
                None => {}
            }
        }
    }
}

impl State {
    /// Records an orphan, in place of an earlier one of the same claim.
    fn record_orphan(&mut self, orphan: Orphan) {
        self.orphans.retain(|known| known.claim != orphan.claim);
        self.orphans.push(orphan);
    }

    /// Returns whether a later request of the claim was granted, or is under way and may be
    /// granted.
    fn is_granted_or_requested(&self, orphan: &Orphan) -> bool {
        self.is_granted(orphan) || self.requested_claims.contains(&orphan.claim)
    }

    fn is_granted(&self, orphan: &Orphan) -> bool {
        self.keys
            .get(&orphan.name)
            .is_some_and(|key| key.claim == orphan.claim)
    }
}

impl Key {
    fn is_of(&self, grant: &Grant) -> bool {
        (self.claim, self.token) == (*grant.claim(), grant.token())
    }
}

/// Returns the time on the clock that sessions use.
pub(super) fn now() -> Duration {
    SystemClock.now()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn grant(name: &str, token: u64) -> Grant {
        Grant::new(
            &LeaseName::new(name).unwrap(),
            &ClaimId::from_number(token.into()),
            token,
            SECOND * 8,
        )
    }

    fn add(session: &Session, grant: &Grant, sent: Duration) {
        session.add(grant.name(), grant.claim(), grant.token(), sent);
    }

    #[test]
    fn lease_validity_is_bounded_by_session_ttl() {
        let session = Session::new(1, SECOND * 8, SECOND * 100);
        assert_eq!(session.left(SECOND * 100), SECOND * 8);
        assert_eq!(
            session.left(SECOND * 99),
            SECOND * 8,
            "a later request kept it alive"
        );
        for over in 0..8 {
            // The lease computes its validity from this: see `LeaseTiming::valid_until`.
            let left = session.left(SECOND * (100 + over));
            assert!(
                SECOND * over + (left - left / 100) <= SECOND * 8 - SECOND * 8 / 100,
                "{over}"
            );
        }
        assert_eq!(session.left(SECOND * 108), Duration::ZERO);
        session.record_keep_alive(SECOND * 104);
        session.record_keep_alive(SECOND * 101);
        assert_eq!(
            session.left(SECOND * 104),
            SECOND * 8,
            "an earlier request has no effect"
        );
    }

    #[test]
    fn renew_within_recent_check_sends_no_request() {
        let (session, one, other) = (
            Session::new(1, SECOND * 8, SECOND * 100),
            grant("one", 1),
            grant("other", 2),
        );
        add(&session, &one, SECOND * 100);
        add(&session, &other, SECOND * 100);
        let later = SECOND * 100 + MAX_RECENT;
        let soon = later - Duration::from_nanos(1);
        assert!(session.covers(&one, soon) && !session.covers(&one, later));
        assert!(
            session.can_begin(SECOND * 101) && !session.can_begin(SECOND * 102),
            "three quarters of the TTL must be left"
        );
        assert!(
            !session.covers(&grant("one", 3), soon),
            "another grant has the key"
        );
        session.record_keep_alive(later);
        assert!(
            !session.covers(&one, later),
            "the key was not found recently"
        );
        let names: Vec<_> = session
            .keys_to_check(&one, later)
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        assert_eq!(names, [one.name().clone(), other.name().clone()]);
        let found = [
            (one.name().clone(), one.token(), true),
            (other.name().clone(), other.token(), false),
        ];
        session.record_check(found.into_iter(), later, later);
        assert!(session.covers(&one, later) && !session.covers(&other, later));
        session.remove(&one);
        assert!(!session.covers(&one, later));
    }

    #[test]
    fn orphaned_or_unrenewed_grant_is_deleted_after_ttl() {
        let (session, renewed, hung) = (
            Session::new(1, SECOND * 8, now()),
            grant("renewed", 1),
            grant("hung", 2),
        );
        let began = now();
        add(&session, &renewed, began);
        add(&session, &hung, began);
        session.record_orphan(
            grant("lost", 3).name(),
            grant("lost", 3).claim(),
            OrphanCause::Indeterminate,
            began,
        );
        assert!(session.due_for_deletion(began + SECOND * 7).is_empty());
        session.covers(&renewed, began + SECOND * 8);
        let deleted = session.due_for_deletion(began + SECOND * 9);
        let mut deleted: Vec<_> = deleted
            .iter()
            .map(|(name, _, cause)| (name.as_str(), *cause))
            .collect();
        deleted.sort_by_key(|(name, _)| *name);
        assert_eq!(
            deleted,
            [
                ("hung", OrphanCause::NotRenewed),
                ("lost", OrphanCause::Indeterminate)
            ]
        );
        assert_eq!(
            session.orphan_cause(Some(*hung.claim())),
            Some(OrphanCause::NotRenewed)
        );
        assert!(
            session.due_for_deletion(began + SECOND * 16).is_empty(),
            "the next deletion is due after a TTL"
        );
        assert_eq!(session.due_for_deletion(began + SECOND * 18).len(), 3);
    }

    #[test]
    fn indeterminate_claim_outlives_grant_and_release() {
        let (session, lease) = (Session::new(1, SECOND * 8, now()), grant("one", 1));
        let (began, claim) = (now(), lease.claim());
        session.record_orphan(lease.name(), claim, OrphanCause::Indeterminate, began);
        add(&session, &lease, began);
        assert_eq!(
            session.orphan_cause(Some(*claim)),
            None,
            "a later request was granted"
        );
        session.covers(&lease, began + SECOND * 8);
        assert!(session.due_for_deletion(began + SECOND * 9).is_empty());
        session.remove(&lease);
        // The first request may be applied only now.
        assert_eq!(
            session.orphan_cause(Some(*claim)),
            Some(OrphanCause::Indeterminate)
        );
        assert_eq!(
            session.due_for_deletion(began + SECOND * 10),
            [(lease.name().clone(), *claim, OrphanCause::Indeterminate)]
        );
        assert!(
            session.due_for_deletion(began + SECOND * 24).is_empty(),
            "an orphan is forgotten after three TTLs"
        );
    }

    #[test]
    fn pending_claim_is_neither_orphan_nor_deleted() {
        let (session, lease) = (
            Arc::new(Session::new(1, SECOND * 8, now())),
            grant("one", 1),
        );
        let began = now();
        session.record_orphan(
            lease.name(),
            lease.claim(),
            OrphanCause::Indeterminate,
            began,
        );
        let pending = session.begin_request(lease.claim(), began + SECOND * 7);
        assert_eq!(
            session.orphan_cause(Some(*lease.claim())),
            None,
            "the claim is being requested"
        );
        assert!(
            session.is_indeterminate(Some(*lease.claim())),
            "no later request was granted"
        );
        drop(pending);
        assert_eq!(
            session.orphan_cause(Some(*lease.claim())),
            Some(OrphanCause::Indeterminate)
        );
        assert!(session.due_for_deletion(began + SECOND * 9).is_empty());
        assert_eq!(session.due_for_deletion(began + SECOND * 16).len(), 1);
    }

    #[test]
    fn claim_has_one_orphan_cause() {
        let (session, lease) = (Session::new(1, SECOND * 8, now()), grant("one", 1));
        let began = now();
        session.record_orphan(
            lease.name(),
            lease.claim(),
            OrphanCause::Indeterminate,
            began,
        );
        add(&session, &lease, began);
        let not_renewed = [(
            lease.name().clone(),
            *lease.claim(),
            OrphanCause::NotRenewed,
        )];
        assert_eq!(session.due_for_deletion(began + SECOND * 9), not_renewed);
        assert_eq!(
            session.due_for_deletion(began + SECOND * 26),
            not_renewed,
            "the time counts from the missed renewal"
        );
    }

    #[test]
    fn late_answer_keeps_later_acquisition() {
        let (session, early, late) = (
            Session::new(1, SECOND * 8, SECOND),
            grant("one", 1),
            grant("one", 2),
        );
        add(&session, &late, SECOND);
        add(&session, &early, SECOND);
        session.remove(&early);
        assert!(session.covers(&late, SECOND) && !session.covers(&early, SECOND));
    }

    #[test]
    fn check_is_limited_to_etcd_operation_limit() {
        let session = Session::new(1, SECOND * 8, SECOND);
        for token in 1..=1000 {
            add(&session, &grant(&token.to_string(), token), SECOND);
        }
        assert_eq!(
            session.keys_to_check(&grant("7", 7), SECOND * 3).len(),
            MAX_KEYS_PER_REQUEST
        );
    }
}
