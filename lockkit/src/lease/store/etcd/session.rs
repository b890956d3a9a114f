//! Sessions: one etcd lease for all leases of a process that have the same TTL.
//!
//! etcd deletes the keys of a session that was not kept alive for its TTL. So one request renews all its leases. The
//! validity of a lease counts from the time at which the request that last kept the session alive was *sent*. A renewal
//! sends no request if two facts are recent: the session was kept alive, and the lease's key was found in place. Recent
//! means less than an eighth of the TTL ago, and less than 250 ms ago. Otherwise the renewal asks etcd, and checks as
//! many other keys as fit into the request. So a thousand leases of 2 s cost about forty requests per second.
//!
//! **A session counts as kept alive only after a quorum confirms it.** The leader keeps sessions alive by itself. A
//! leader that was cut off or stopped would continue to do so until it learns that it was replaced. Every answer names
//! the term of its leader. A quorum answers the request that follows, a transaction. If its term is the term of the
//! answer before, the server that kept the session alive was the leader.
//!
//! **Orphaned keys are deleted.** A key lives as long as its session. A key without a holder, or without renewals,
//! would live as long as other leases of the process. There are three kinds: see [`Orphan`]. The thread that keeps the
//! session alive deletes keys that have been orphaned for a TTL. A new acquisition takes them over at once. A request
//! without an answer may be applied later than the request that replaced it. So the possible grant of such a request is
//! looked after for three TTLs, even if its claim has been granted and released since.
//!
//! A session without leases is not kept alive, and ends after its TTL.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::lease::clock::{Clock, SystemClock};
use crate::lease::store::lease_store::{ClaimId, Grant, LeaseName};

/// A check of the session or of a key counts for the TTL divided by this, at most [`LONGEST_KNOWN`]. The limit exists
/// because a holder with a short heartbeat interval must learn of a loss soon.
const PARTS: u32 = 8;
const LONGEST_KNOWN: Duration = Duration::from_millis(250);
/// The maximum number of keys that one request checks; etcd refuses transactions with more operations.
const MOST_KEYS: usize = 128;
/// The number of TTLs for which a request without an answer counts as possibly still under way.
const LONG: u32 = 3;
/// The maximum number of orphaned keys that are deleted at once.
const MOST_LOOSE: usize = 16;

pub(super) struct Session {
    /// The id that etcd gave the session.
    pub(super) id: u64,
    ttl: Duration,
    /// Held by the one renewal that keeps the session alive and checks its keys.
    pub(super) turn: Mutex<()>,
    state: Mutex<State>,
}

struct State {
    /// When the request was sent that last kept the session alive.
    kept: Duration,
    keys: HashMap<LeaseName, Key>,
    loose: Vec<LooseKey>,
    /// The claims that are being requested, each as often as there are requests.
    asked: Vec<ClaimId>,
    /// Until this time a key counts as found if it was found within a TTL.
    rests_until: Duration,
}

/// A key that is attached to the session, as far as this process knows.
struct Key {
    claim: ClaimId,
    token: u64,
    /// When the request was sent that found the key in place.
    found: Duration,
    /// When its lease was last renewed.
    renewed: Duration,
}

/// The reason why a key that may exist has no holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Orphan {
    /// The request that acquired the key got no answer, and no caller received the grant.
    InDoubt,
    /// The request that released the key got no answer.
    Released,
    /// The key was not renewed for a TTL: its holder hangs, or could not report that it gave up the lease.
    RunOut,
}

struct LooseKey {
    name: LeaseName,
    claim: ClaimId,
    why: Orphan,
    since: Duration,
    /// When the key is due for deletion, for the first time or again.
    due: Duration,
}

/// A claim that is being requested; see [`Session::ask`].
pub(super) struct Asked {
    session: Arc<Session>,
    claim: ClaimId,
}

impl Drop for Asked {
    fn drop(&mut self) {
        let mut state = self.session.state.lock();
        if let Some(at) = state.asked.iter().position(|claim| *claim == self.claim) {
            state.asked.swap_remove(at);
        }
    }
}

/// A keep-alive of a session by a request sent at `sent`. It counts if the leader of `term` still is the leader.
#[derive(Clone, Copy)]
pub(super) struct Kept {
    pub(super) sent: Duration,
    pub(super) term: u64,
}

impl Session {
    /// Returns the session that etcd created for a request sent at `sent`.
    pub(super) fn new(id: u64, ttl: Duration, sent: Duration) -> Self {
        Self {
            id,
            ttl,
            turn: Mutex::new(()),
            state: Mutex::new(State {
                kept: sent,
                keys: HashMap::new(),
                loose: Vec::new(),
                asked: Vec::new(),
                rests_until: Duration::ZERO,
            }),
        }
    }

    /// Returns whether enough of the session is left to begin a lease. The first heartbeat of the lease keeps the
    /// session alive, before another third of the TTL has passed. Keeping it alive first would cost a waiter one more
    /// request.
    pub(super) fn can_begin(&self, now: Duration) -> bool {
        now.saturating_sub(self.state.lock().kept) < self.ttl / 4
    }

    /// Returns whether the session was kept alive shortly before `now`.
    pub(super) fn is_fresh(&self, now: Duration) -> bool {
        self.is_recent(self.state.lock().kept, now)
    }

    fn is_recent(&self, then: Duration, now: Duration) -> bool {
        now.saturating_sub(then) < self.known_for()
    }

    fn known_for(&self) -> Duration {
        (self.ttl / PARTS).min(LONGEST_KNOWN)
    }

    /// Records a keep-alive that a quorum has confirmed.
    pub(super) fn keep(&self, sent: Duration) {
        let mut state = self.state.lock();
        state.kept = state.kept.max(sent);
    }

    /// Returns how long a lease of this session is valid, counted from `now`. The elapsed part counts for a little
    /// more, so that the lease's deduction for clock drift covers the whole TTL.
    pub(super) fn left(&self, now: Duration) -> Duration {
        let over = now.saturating_sub(self.state.lock().kept);
        self.ttl.saturating_sub(over + over / 64)
    }

    /// Records a key that was attached by a request sent at `sent`.
    pub(super) fn add(&self, name: &LeaseName, claim: &ClaimId, token: u64, sent: Duration) {
        let key = Key { claim: *claim, token, found: sent, renewed: now() };
        let mut state = self.state.lock();
        // The answer to a later acquisition may arrive first; then this one is out of date.
        if state.keys.get(name).is_none_or(|known| known.token <= token) {
            state.keys.insert(name.clone(), key);
        }
    }

    /// Removes the grant's key, which is not attached any more.
    pub(super) fn remove(&self, grant: &Grant) {
        let mut state = self.state.lock();
        if state.keys.get(grant.name()).is_some_and(|key| key.is_of(grant)) {
            state.keys.remove(grant.name());
        }
    }

    /// Records a renewal of the grant. Returns whether the session was kept alive and the grant's key was found in
    /// place shortly before `now`.
    pub(super) fn covers(&self, grant: &Grant, now: Duration) -> bool {
        let mut state = self.state.lock();
        let (is_kept, rests) = (self.is_recent(state.kept, now), now < state.rests_until);
        let Some(key) = state.keys.get_mut(grant.name()).filter(|key| key.is_of(grant)) else { return false };
        key.renewed = key.renewed.max(now);
        is_kept && (self.is_recent(key.found, now) || (rests && now.saturating_sub(key.found) < self.ttl))
    }

    /// Records that the key of this claim is orphaned, though the key may exist.
    pub(super) fn loosen(&self, name: &LeaseName, claim: &ClaimId, why: Orphan, since: Duration) {
        let mut state = self.state.lock();
        if state.keys.get(name).is_some_and(|key| key.claim == *claim) {
            state.keys.remove(name);
        }
        state.loosen(LooseKey { name: name.clone(), claim: *claim, why, since, due: since + self.ttl });
    }

    /// Records that the claim is being requested, from `now` until the returned value is dropped. Meanwhile its key is
    /// not orphaned. The key is not deleted before a TTL has passed, which no request outlasts.
    pub(super) fn ask(self: &Arc<Self>, claim: &ClaimId, now: Duration) -> Asked {
        let mut state = self.state.lock();
        if let Some(loose) = state.loose.iter_mut().find(|loose| loose.claim == *claim) {
            loose.due = loose.due.max(now + self.ttl);
        }
        state.asked.push(*claim);
        Asked { session: self.clone(), claim: *claim }
    }

    /// Returns why the key of this claim is orphaned, if it is. A claim that is being requested is not orphaned.
    pub(super) fn loose(&self, claim: Option<ClaimId>) -> Option<Orphan> {
        let state = self.state.lock();
        let loose = state.loose.iter().find(|loose| Some(loose.claim) == claim)?;
        (!state.has(loose)).then_some(loose.why)
    }

    /// Returns whether a request of this claim got no answer, and no later request of the claim was granted. A later
    /// request may be under way.
    pub(super) fn is_in_doubt(&self, claim: Option<ClaimId>) -> bool {
        let state = self.state.lock();
        let in_doubt = |loose: &&LooseKey| loose.why == Orphan::InDoubt && Some(loose.claim) == claim;
        state.loose.iter().find(in_doubt).is_some_and(|loose| !state.is_granted(loose))
    }

    /// Returns the orphaned keys to delete now. The same keys are due again later, because a request without an answer
    /// may still be under way.
    pub(super) fn due_for_deletion(&self, now: Duration) -> Vec<(LeaseName, ClaimId, Orphan)> {
        let mut state = self.state.lock();
        let run_out = state.keys.iter().filter(|(_, key)| now.saturating_sub(key.renewed) > self.ttl);
        let run_out: Vec<_> = run_out.map(|(name, key)| (name.clone(), key.claim)).collect();
        for (name, claim) in run_out {
            state.keys.remove(&name);
            state.loosen(LooseKey { name, claim, why: Orphan::RunOut, since: now, due: now });
        }
        let mut loose = std::mem::take(&mut state.loose);
        loose.retain(|loose| now < loose.since + self.ttl * LONG);
        let due = loose.iter_mut().filter(|loose| loose.due <= now && !state.has(loose)).take(MOST_LOOSE);
        let due_for_deletion = due.map(|loose| {
            loose.due = now + self.ttl;
            (loose.name.clone(), loose.claim, loose.why)
        });
        let due_for_deletion = due_for_deletion.collect();
        state.loose = loose;
        due_for_deletion
    }

    /// Returns the keys to check together with the grant's, and their tokens: the keys whose last check is the oldest.
    pub(super) fn to_look_at(&self, grant: &Grant, now: Duration) -> Vec<(LeaseName, u64)> {
        let state = self.state.lock();
        let mut stale: Vec<_> = state.keys.iter().filter(|(name, _)| *name != grant.name()).collect();
        stale.retain(|(_, key)| now.saturating_sub(key.found) >= self.known_for() / 2);
        stale.sort_unstable_by_key(|(_, key)| key.found);
        let stale = stale.into_iter().map(|(name, key)| (name.clone(), key.token)).take(MOST_KEYS - 1);
        std::iter::once((grant.name().clone(), grant.token())).chain(stale).collect()
    }

    /// Records that a request sent at `sent` checked whether the keys of the names have these tokens. The answer
    /// arrived at `now`. No further check follows for as long as the request took. So on a slow server the heartbeats
    /// of many leases do not wait for one check after another.
    pub(super) fn looked_at(&self, found: impl Iterator<Item = (LeaseName, u64, bool)>, sent: Duration, now: Duration) {
        let mut state = self.state.lock();
        state.rests_until = now + now.saturating_sub(sent);
        for (name, token, is_in_place) in found {
            let known = state.keys.get_mut(&name).filter(|key| key.token == token);
            match known {
                Some(key) if is_in_place => key.found = key.found.max(sent),
                // The next renewal of the lease finds out why.
                Some(_) => drop(state.keys.remove(&name)),
                None => {}
            }
        }
    }
}

impl State {
    /// Records an orphan, in place of an earlier one of the same claim.
    fn loosen(&mut self, key: LooseKey) {
        self.loose.retain(|known| known.claim != key.claim);
        self.loose.push(key);
    }

    /// Returns whether a later request of the claim was granted, or is under way and may be granted.
    fn has(&self, loose: &LooseKey) -> bool {
        self.is_granted(loose) || self.asked.contains(&loose.claim)
    }

    fn is_granted(&self, loose: &LooseKey) -> bool {
        self.keys.get(&loose.name).is_some_and(|key| key.claim == loose.claim)
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

    const S: Duration = Duration::from_secs(1);

    fn grant(name: &str, token: u64) -> Grant {
        Grant::new(&LeaseName::new(name).unwrap(), &ClaimId::from_number(token.into()), token, S * 8)
    }

    fn add(session: &Session, grant: &Grant, sent: Duration) {
        session.add(grant.name(), grant.claim(), grant.token(), sent);
    }

    #[test]
    fn lease_validity_is_bounded_by_session_ttl() {
        let session = Session::new(1, S * 8, S * 100);
        assert_eq!(session.left(S * 100), S * 8);
        assert_eq!(session.left(S * 99), S * 8, "it was kept since");
        for over in 0..8 {
            // The lease computes its validity from this: see `LeaseTiming::valid_until`.
            let left = session.left(S * (100 + over));
            assert!(S * over + (left - left / 100) <= S * 8 - S * 8 / 100, "{over}");
        }
        assert_eq!(session.left(S * 108), Duration::ZERO);
        session.keep(S * 104);
        session.keep(S * 101);
        assert_eq!(session.left(S * 104), S * 8, "never back");
    }

    #[test]
    fn what_was_kept_and_found_just_now_is_not_asked_for_again() {
        let (session, one, other) = (Session::new(1, S * 8, S * 100), grant("one", 1), grant("other", 2));
        add(&session, &one, S * 100);
        add(&session, &other, S * 100);
        let later = S * 100 + LONGEST_KNOWN;
        let soon = later - Duration::from_nanos(1);
        assert!(session.covers(&one, soon) && !session.covers(&one, later));
        assert!(session.can_begin(S * 101) && !session.can_begin(S * 102), "it has three quarters left, or not");
        assert!(!session.covers(&grant("one", 3), soon), "it is another's");
        session.keep(later);
        assert!(!session.covers(&one, later), "kept, but not found");
        let names: Vec<_> = session.to_look_at(&one, later).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, [one.name().clone(), other.name().clone()]);
        let found = [(one.name().clone(), one.token(), true), (other.name().clone(), other.token(), false)];
        session.looked_at(found.into_iter(), later, later);
        assert!(session.covers(&one, later) && !session.covers(&other, later));
        session.remove(&one);
        assert!(!session.covers(&one, later));
    }

    #[test]
    fn orphaned_or_unrenewed_grant_is_deleted_after_ttl() {
        let (session, kept, hung) = (Session::new(1, S * 8, now()), grant("kept", 1), grant("hung", 2));
        let began = now();
        add(&session, &kept, began);
        add(&session, &hung, began);
        session.loosen(grant("lost", 3).name(), grant("lost", 3).claim(), Orphan::InDoubt, began);
        assert!(session.due_for_deletion(began + S * 7).is_empty());
        session.covers(&kept, began + S * 8);
        let let_go = session.due_for_deletion(began + S * 9);
        let mut let_go: Vec<_> = let_go.iter().map(|(name, _, why)| (name.as_str(), *why)).collect();
        let_go.sort_by_key(|(name, _)| *name);
        assert_eq!(let_go, [("hung", Orphan::RunOut), ("lost", Orphan::InDoubt)]);
        assert_eq!(session.loose(Some(*hung.claim())), Some(Orphan::RunOut));
        assert!(session.due_for_deletion(began + S * 16).is_empty(), "a ttl later, again");
        assert_eq!(session.due_for_deletion(began + S * 18).len(), 3);
    }

    #[test]
    fn a_doubt_outlasts_the_grant_and_the_release_of_its_claim() {
        let (session, lease) = (Session::new(1, S * 8, now()), grant("one", 1));
        let (began, claim) = (now(), lease.claim());
        session.loosen(lease.name(), claim, Orphan::InDoubt, began);
        add(&session, &lease, began);
        assert_eq!(session.loose(Some(*claim)), None, "it is held");
        session.covers(&lease, began + S * 8);
        assert!(session.due_for_deletion(began + S * 9).is_empty());
        session.remove(&lease);
        // The first request may be applied only now.
        assert_eq!(session.loose(Some(*claim)), Some(Orphan::InDoubt));
        assert_eq!(session.due_for_deletion(began + S * 10), [(lease.name().clone(), *claim, Orphan::InDoubt)]);
        assert!(session.due_for_deletion(began + S * 24).is_empty(), "not for ever");
    }

    #[test]
    fn pending_claim_is_neither_orphan_nor_deleted() {
        let (session, lease) = (Arc::new(Session::new(1, S * 8, now())), grant("one", 1));
        let began = now();
        session.loosen(lease.name(), lease.claim(), Orphan::InDoubt, began);
        let asked = session.ask(lease.claim(), began + S * 7);
        assert_eq!(session.loose(Some(*lease.claim())), None, "somebody is about to have it");
        assert!(session.is_in_doubt(Some(*lease.claim())), "all the same");
        drop(asked);
        assert_eq!(session.loose(Some(*lease.claim())), Some(Orphan::InDoubt));
        assert!(session.due_for_deletion(began + S * 9).is_empty());
        assert_eq!(session.due_for_deletion(began + S * 16).len(), 1);
    }

    #[test]
    fn a_claim_is_loose_for_one_reason() {
        let (session, lease) = (Session::new(1, S * 8, now()), grant("one", 1));
        let began = now();
        session.loosen(lease.name(), lease.claim(), Orphan::InDoubt, began);
        add(&session, &lease, began);
        let run_out = [(lease.name().clone(), *lease.claim(), Orphan::RunOut)];
        assert_eq!(session.due_for_deletion(began + S * 9), run_out);
        assert_eq!(session.due_for_deletion(began + S * 26), run_out, "looked after from when it ran out");
    }

    #[test]
    fn a_later_acquisition_is_not_taken_back_by_an_earlier_answer() {
        let (session, early, late) = (Session::new(1, S * 8, S), grant("one", 1), grant("one", 2));
        add(&session, &late, S);
        add(&session, &early, S);
        session.remove(&early);
        assert!(session.covers(&late, S) && !session.covers(&early, S));
    }

    #[test]
    fn a_request_looks_at_no_more_keys_than_etcd_takes() {
        let session = Session::new(1, S * 8, S);
        for token in 1..=1000 {
            add(&session, &grant(&token.to_string(), token), S);
        }
        assert_eq!(session.to_look_at(&grant("7", 7), S * 3).len(), MOST_KEYS);
    }
}
