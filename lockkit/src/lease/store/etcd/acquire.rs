//! The acquisition of a lease: the name is free, its holder is dead, or its grant is orphaned.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::error::is_session_gone;
use super::json::encode;
use super::record::{Answer, HELD, Record, snapshot};
use super::session::{OrphanCause, Session, now};
use super::state::ProcessState;
use crate::base::error::StoreError;
use crate::lease::store::lease_store::{
    Attempt, ClaimId, Deadline, Grant, LeaseName, LeaseSnapshot,
};
use crate::lease::store::server::{Result, format_current_owner};
use crate::sys::failpoint::step;

/// How often in a row the session may end, or the name be released, during one acquisition.
const MAX_ROUNDS: u32 = 3;

/// An acquisition that is under way.
pub(super) struct Acquisition<'a> {
    state: &'a ProcessState,
    name: &'a LeaseName,
    claim: &'a ClaimId,
    ttl: Duration,
    by: Deadline,
    /// The key to take over, if any.
    replaced: Option<Replaced>,
}

/// A key that the acquisition takes over: its revision and its claim.
#[derive(Clone, Copy, Default)]
struct Replaced {
    revision: u64,
    claim: Option<ClaimId>,
    /// The reason why the grant is orphaned, if it is.
    orphan_cause: Option<OrphanCause>,
}

impl<'a> Acquisition<'a> {
    /// Returns the acquisition of a name that is free, or whose holder has expired.
    pub(super) fn new(
        state: &'a ProcessState,
        name: &'a LeaseName,
        claim: &'a ClaimId,
        ttl: Duration,
        expired: Option<&LeaseSnapshot>,
        by: Deadline,
    ) -> Self {
        let replaced = expired.map(|seen| Replaced {
            revision: seen.revision(),
            claim: seen.claim(),
            orphan_cause: None,
        });
        Self {
            state,
            name,
            claim,
            ttl,
            by,
            replaced,
        }
    }

    pub(super) fn run(mut self) -> Result<Attempt> {
        let began = now();
        let record = Record::text(HELD, self.claim, &format_current_owner());
        for _ in 0..MAX_ROUNDS {
            let (session, keep_alive) = self.state.session(self.ttl, self.by)?;
            let sent = now();
            // Until the outcome is recorded, other threads do not treat the claim as orphaned.
            let _request = session.begin_request(self.claim, sent);
            let answer = match self.request(&record, &session) {
                Err(error) if is_session_gone(&error) => {
                    self.state.forget_session(self.ttl, &session, self.by);
                    continue;
                }
                Err(error) => {
                    // For any error: one endpoint may have applied the request before another
                    // refused it.
                    session.record_orphan(self.name, self.claim, OrphanCause::Indeterminate, sent);
                    return Err(error);
                }
                Ok(answer) => answer,
            };
            if let Some(keep_alive) =
                keep_alive.filter(|keep_alive| keep_alive.term == answer.term())
            {
                session.record_keep_alive(keep_alive.sent);
            }
            if answer.is_done() {
                return self.granted(&answer, session, began, sent);
            }
            if let Some(busy) = self.refused(&answer, &session) {
                return Ok(busy);
            }
        }
        Err(StoreError::unknown(
            "cannot acquire the lease: its session ended, or another client released it, in each of several attempts",
        ))
    }

    /// Writes both keys if the `held` key is the replaced one, or does not exist.
    fn request(&self, record: &str, session: &Session) -> Result<Answer> {
        let (state, name, claim) = (self.state, self.name, self.claim);
        let Replaced {
            revision,
            claim: holder,
            ..
        } = self.replaced.unwrap_or_default();
        let put: Value = json!([
            { "request_put": {
                "key": state.keys.held(name), "value": encode(claim.to_string()), "lease": session.id.to_string(),
            } },
            { "request_put": { "key": state.keys.record(name), "value": encode(record), "prev_kv": true } },
        ]);
        state.transact(
            state.is_held(name, revision, holder),
            put,
            state.read_both(name),
            self.by,
        )
    }

    fn granted(
        &self,
        answer: &Answer,
        session: Arc<Session>,
        began: Duration,
        sent: Duration,
    ) -> Result<Attempt> {
        step("record written");
        let (name, claim) = (self.name, self.claim);
        let Replaced {
            revision,
            claim: holder,
            orphan_cause,
        } = self.replaced.unwrap_or_default();
        let before = match orphan_cause {
            Some(OrphanCause::Indeterminate) => {
                match self
                    .state
                    .record_before(name, revision, holder, &session, self.by)
                {
                    Ok(before) => before,
                    Err(error) => {
                        // The claim is indeterminate again: it is unknown whose death the next
                        // grant must report.
                        session.record_orphan(name, claim, OrphanCause::Indeterminate, sent);
                        return Err(StoreError::unknown(error));
                    }
                }
            }
            _ => Record::parse(answer.before(1)),
        };
        let token = answer.revision();
        if answer.is_indeterminate {
            // The same request may be applied once more, even after the release.
            session.record_orphan(name, claim, OrphanCause::Indeterminate, sent);
        }
        session.add(name, claim, token, sent);
        let grant = Grant::new(name, claim, token, session.left(began)).with_handle(session);
        Ok(Attempt::Granted(match &*before.state {
            HELD if orphan_cause != Some(OrphanCause::Released) => {
                grant.recovered_from(before.owner)
            }
            _ => grant,
        }))
    }

    /// Returns the holder that keeps the name, if there is one. Otherwise the next round can
    /// acquire the name.
    fn refused(&mut self, answer: &Answer, session: &Session) -> Option<Attempt> {
        let held = answer.read(0);
        if held.is_null() {
            // The name became free after it was seen held.
            self.replaced = None;
            return None;
        }
        let seen = snapshot(held, answer.read(1));
        let orphan_cause = match session.orphan_cause(seen.claim()) {
            None if seen.claim() == Some(*self.claim) => Some(OrphanCause::Indeterminate),
            None => return Some(Attempt::Busy(seen)),
            cause => cause,
        };
        // An earlier request took effect, and its grant is orphaned. The grant is taken over, not
        // simply accepted, so that only one of two finders gets it.
        self.replaced = Some(Replaced {
            revision: seen.revision(),
            claim: seen.claim(),
            orphan_cause,
        });
        None
    }
}
