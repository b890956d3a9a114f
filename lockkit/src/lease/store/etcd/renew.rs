//! The renewal of a grant: of its session, and the check of its key.

use std::time::Duration;

use serde_json::{Value, json};

use super::json::number;
use super::record::is_at;
use super::session::{Session, now};
use super::state::{ProcessState, session_of};
use crate::base::error::StoreError;
use crate::lease::store::lease_store::{Deadline, Grant, Renewal};
use crate::lease::store::server::Result;

/// How often in a row the leader may change during one renewal.
const MAX_ROUNDS: u32 = 3;

impl ProcessState {
    /// Renews a grant. A renewal sends no request if the session and the key were checked recently.
    pub(super) fn renew(&self, grant: &Grant, by: Deadline) -> Result<Renewal> {
        let session = session_of(grant)?;
        let began = now();
        if session.covers(grant, began) {
            return Ok(Renewal::Extended {
                ttl: session.left(began),
            });
        }
        // The key is being deleted as orphaned: the lease is lost, though its key may still exist.
        if session.orphan_cause(Some(*grant.claim())).is_some() {
            return Ok(Renewal::Lost { by: None });
        }
        let renewal = session.renewal_lock.try_lock_until(by.moment());
        let _renewal = renewal.ok_or_else(|| {
            StoreError::not_applied("cannot renew the session: another renewal is still under way")
        })?;
        if session.covers(grant, began) {
            return Ok(Renewal::Extended {
                ttl: session.left(began),
            });
        }
        for _ in 0..MAX_ROUNDS {
            let keep_alive = match session.is_fresh(began) {
                true => None,
                false => match self.keep_alive(session, by)? {
                    Some(keep_alive) => Some(keep_alive),
                    None => return self.lost_or_unknown(grant, by),
                },
            };
            let Some(term) = self.check_keys(session, grant, began, by)? else {
                return self.lost_or_unknown(grant, by);
            };
            match keep_alive {
                Some(keep_alive) if keep_alive.term != term => {}
                keep_alive => {
                    keep_alive.inspect(|keep_alive| session.record_keep_alive(keep_alive.sent));
                    return Ok(Renewal::Extended {
                        ttl: session.left(began),
                    });
                }
            }
        }
        Err(StoreError::not_applied(
            "cannot renew the session: the leader of etcd changed repeatedly",
        ))
    }

    /// Checks the keys of the session that are due for a check. Returns the leader's term if the
    /// grant's key is in place.
    fn check_keys(
        &self,
        session: &Session,
        grant: &Grant,
        began: Duration,
        by: Deadline,
    ) -> Result<Option<u64>> {
        let names = session.keys_to_check(grant, began);
        let keys: Vec<_> = names.iter().map(|(name, _)| self.keys.held(name)).collect();
        let compare: Value = keys
            .iter()
            .zip(&names)
            .map(|(key, (_, token))| is_at(key, *token))
            .collect();
        let read: Value = keys
            .iter()
            .map(|key| json!({ "request_range": { "key": key } }))
            .collect();
        let sent = now();
        let answer = self.transact(compare, json!([]), read, by)?;
        let is_in_place =
            |at, token| answer.is_done() || number(&answer.read(at)["mod_revision"]) == token;
        let found = names.into_iter().enumerate();
        let found = found.map(|(at, (name, token))| (name, token, is_in_place(at, token)));
        session.record_check(found, sent, now());
        Ok(is_in_place(0, grant.token()).then(|| answer.term()))
    }

    /// Returns the result of a renewal that did not find the grant's key in place.
    fn lost_or_unknown(&self, grant: &Grant, by: Deadline) -> Result<Renewal> {
        let seen = self.get(grant.name(), by)?;
        if seen
            .as_ref()
            .is_some_and(|seen| seen.revision() == grant.token())
        {
            return Err(StoreError::not_applied(
                "cannot renew the lease: etcd has its key, but not its session",
            ));
        }
        session_of(grant)?.remove(grant);
        Ok(Renewal::Lost {
            by: seen.and_then(|seen| seen.owner().cloned()),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::lease::store::etcd::config::Config;
    use crate::lease::store::lease_store::{ClaimId, LeaseName};

    #[test]
    fn renew_of_grant_due_for_deletion_is_lost() {
        // No server listens at this address, so only the session's own state can answer.
        let state = ProcessState::new(&Config::parse("etcd://127.0.0.1:1").unwrap());
        let (began, ttl) = (now(), Duration::from_secs(8));
        let (name, claim) = (LeaseName::new("one").unwrap(), ClaimId::from_number(1));
        let session = Arc::new(Session::new(1, ttl, began));
        session.add(&name, &claim, 1, began);
        let grant = Grant::new(&name, &claim, 1, ttl).with_handle(session.clone());
        let renewed = || state.renew(&grant, Deadline::after(ttl));
        assert!(matches!(renewed(), Ok(Renewal::Extended { .. })));
        assert_eq!(session.due_for_deletion(now() + ttl * 2).len(), 1);
        assert!(matches!(renewed(), Ok(Renewal::Lost { .. })));
    }
}
