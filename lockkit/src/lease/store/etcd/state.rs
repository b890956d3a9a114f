//! The state of the store in one process, and the requests that it sends.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::{Value, json};

use super::client::Client;
use super::config::Config;
use super::error::is_compacted;
use super::json::{encode, number};
use super::listener::EtcdListener;
use super::record::{Answer, FREE, HELD, Keys, NotFreed, Record, is_at, is_of, snapshot};
use super::session::{KeepAlive, OrphanCause, Session, now};
use crate::base::error::StoreError;
use crate::lease::store::lease_store::{ClaimId, Deadline, Grant, LeaseName, LeaseSnapshot};
use crate::lease::store::server::{Listener, Result, Subscriptions, format_owner, is_this_process};
use crate::sys::failpoint::step;

/// The state of the store in one process.
pub(super) struct ProcessState {
    client: Arc<Client>,
    pub(super) keys: Keys,
    /// The session for each TTL, in seconds.
    sessions: Mutex<HashMap<u64, Arc<SessionSlot>>>,
    pub(super) subscriptions: Arc<Subscriptions>,
}

/// The session for a TTL. Its lock is held while a session is created.
type SessionSlot = Mutex<Option<Arc<Session>>>;

/// Returns the session of a grant.
pub(super) fn session_of(grant: &Grant) -> Result<&Arc<Session>> {
    grant
        .handle()
        .ok_or_else(|| StoreError::permanent("cannot use the grant: it belongs to another store"))
}

impl ProcessState {
    pub(super) fn new(config: &Config) -> Self {
        let client = Arc::new(Client::new(config));
        let keys = Keys::new(&config.prefix);
        let (listen_client, prefix) = (client.clone(), keys.held.clone());
        let listen = move |by| {
            Ok(Box::new(EtcdListener::open(&listen_client, &prefix, by)?) as Box<dyn Listener>)
        };
        let subscriptions = Subscriptions::new(listen);
        Self {
            client,
            keys,
            sessions: Mutex::default(),
            subscriptions,
        }
    }

    /// Runs one transaction: `then` if all comparisons hold, `otherwise` if not.
    pub(super) fn transact(
        &self,
        compare: Value,
        then: Value,
        otherwise: Value,
        by: Deadline,
    ) -> Result<Answer> {
        let body = json!({ "compare": compare, "success": then, "failure": otherwise });
        let (body, is_indeterminate) = self.client.send_observed("/v3/kv/txn", &body, by)?;
        Ok(Answer {
            body,
            is_indeterminate,
        })
    }

    /// Returns the comparison of a `held` key's revision, and of its claim if one is given.
    pub(super) fn is_held(&self, name: &LeaseName, revision: u64, claim: Option<ClaimId>) -> Value {
        let key = self.keys.held(name);
        match claim {
            None => json!([is_at(&key, revision)]),
            Some(claim) => json!([is_at(&key, revision), is_of(&key, claim)]),
        }
    }

    pub(super) fn read_both(&self, name: &LeaseName) -> Value {
        json!([
            { "request_range": { "key": self.keys.held(name) } },
            { "request_range": { "key": self.keys.record(name) } },
        ])
    }

    /// Returns the record as it was before the claim's indeterminate request at that revision, and
    /// before other indeterminate requests of this process. If etcd has compacted the revision, the
    /// record is empty.
    pub(super) fn record_before(
        &self,
        name: &LeaseName,
        mut revision: u64,
        claim: Option<ClaimId>,
        session: &Session,
        by: Deadline,
    ) -> Result<Record> {
        loop {
            let body = json!({ "key": self.keys.record(name), "revision": revision.saturating_sub(1).to_string() });
            let answer = match self.client.send("/v3/kv/range", &body, by) {
                Err(error) if is_compacted(&error) => return Ok(Record::parse(&Value::Null)),
                answer => answer?,
            };
            let (found, record) = (&answer["kvs"][0], Record::parse(&answer["kvs"][0]));
            let is_own = record.owner.as_ref().is_some_and(is_this_process);
            let is_indeterminate = record.claim == claim || session.is_indeterminate(record.claim);
            if record.state != HELD || !is_own || !is_indeterminate {
                return Ok(record);
            }
            revision = number(&found["mod_revision"]);
        }
    }

    /// Frees the key of a grant; see [`free`](Self::free).
    pub(super) fn free_grant(
        &self,
        grant: &Grant,
        cause: OrphanCause,
        record: Option<&str>,
        by: Deadline,
    ) -> Result<Result<(), NotFreed>> {
        let session = session_of(grant)?;
        let freed = self.free(
            grant.name(),
            Some(*grant.claim()),
            grant.token(),
            record,
            by,
        );
        match freed {
            Ok(_) => {
                step("record freed");
                session.remove(grant);
            }
            Err(_) => session.record_orphan(grant.name(), grant.claim(), cause, now()),
        }
        freed
    }

    /// Deletes the `held` key of that revision and claim, and writes the record if one is given.
    /// Returns what it found as `Err` if the key has another revision or claim.
    pub(super) fn free(
        &self,
        name: &LeaseName,
        claim: Option<ClaimId>,
        revision: u64,
        record: Option<&str>,
        by: Deadline,
    ) -> Result<Result<(), NotFreed>> {
        let record_key = self.keys.record(name);
        let mut then = vec![json!({ "request_delete_range": { "key": self.keys.held(name) } })];
        then.extend(
            record
                .map(|text| json!({ "request_put": { "key": record_key, "value": encode(text) } })),
        );
        let otherwise = json!([{ "request_range": { "key": record_key } }]);
        let answer = self.transact(
            self.is_held(name, revision, claim),
            then.into(),
            otherwise,
            by,
        )?;
        Ok(if answer.is_done() {
            Ok(())
        } else {
            Err(NotFreed::of(&answer))
        })
    }

    pub(super) fn get(&self, name: &LeaseName, by: Deadline) -> Result<Option<LeaseSnapshot>> {
        let answer = self.transact(json!([]), self.read_both(name), json!([]), by)?;
        let held = answer.read(0);
        Ok((!held.is_null()).then(|| snapshot(held, answer.read(1))))
    }

    /// Returns the session for leases of this TTL. Either enough of the session is left, or a
    /// request has just kept it alive. In the second case the next request shows whether that
    /// counts.
    pub(super) fn session(
        &self,
        ttl: Duration,
        by: Deadline,
    ) -> Result<(Arc<Session>, Option<KeepAlive>)> {
        let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        let slot = self.sessions.lock().entry(seconds).or_default().clone();
        let slot = slot.try_lock_until(by.moment());
        let mut slot = slot.ok_or_else(|| {
            StoreError::not_applied(
                "cannot use a session: another thread of this process is still creating it",
            )
        })?;
        if let Some(session) = &*slot {
            if session.can_begin(now()) {
                return Ok((session.clone(), None));
            }
            if let Some(keep_alive) = self.keep_alive(session, by)? {
                return Ok((session.clone(), Some(keep_alive)));
            }
        }
        let sent = now();
        let answer = self.client.send(
            "/v3/lease/grant",
            &json!({ "TTL": seconds.to_string() }),
            by,
        )?;
        step("session created");
        let id = number(&answer["ID"]);
        if id == 0 {
            return Err(StoreError::not_applied(
                "cannot create a session: etcd returned no id",
            ));
        }
        let session = Arc::new(Session::new(id, Duration::from_secs(seconds), sent));
        *slot = Some(session.clone());
        Ok((session, None))
    }

    /// Keeps a session alive for another TTL. Returns `None` if the session is gone.
    pub(super) fn keep_alive(&self, session: &Session, by: Deadline) -> Result<Option<KeepAlive>> {
        let sent = now();
        let answer = self.client.send(
            "/v3/lease/keepalive",
            &json!({ "ID": session.id.to_string() }),
            by,
        )?;
        step("session kept alive");
        let is_there = number(&answer["TTL"]) > 0;
        if is_there {
            self.delete_orphans(session, sent, number(&answer["header"]["revision"]), by);
        }
        Ok(is_there.then(|| KeepAlive {
            sent,
            term: number(&answer["header"]["raft_term"]),
        }))
    }

    /// Deletes the orphaned keys of a session that were written at or before this revision. A
    /// deletion may be applied late, after the claim was requested once more and granted. That
    /// grant has a greater revision, because a claim that is being requested is not deleted. A
    /// failed deletion is retried later.
    fn delete_orphans(&self, session: &Session, now: Duration, revision: u64, by: Deadline) {
        for (name, claim, cause) in session.due_for_deletion(now) {
            if self
                .delete_orphan(&name, claim, cause, session, revision, by)
                .is_err()
            {
                return;
            }
        }
    }

    fn delete_orphan(
        &self,
        name: &LeaseName,
        claim: ClaimId,
        cause: OrphanCause,
        session: &Session,
        revision: u64,
        by: Deadline,
    ) -> Result<()> {
        let free = Record::text(FREE, &claim, "");
        if cause == OrphanCause::Indeterminate {
            let held = self
                .get(name, by)?
                .filter(|held| held.claim() == Some(claim) && held.revision() <= revision);
            let Some(held) = held else { return Ok(()) };
            let before = self.record_before(name, held.revision(), Some(claim), session, by)?;
            // The next grant must report the earlier holder that did not release.
            let record = match &*before.state {
                HELD => Record::text(
                    HELD,
                    &claim,
                    &before.owner.as_ref().map(format_owner).unwrap_or_default(),
                ),
                _ => free,
            };
            return self
                .free(name, Some(claim), held.revision(), Some(&record), by)
                .map(drop);
        }
        let key = self.keys.held(name);
        let is_old = json!({
            "key": key, "target": "MOD", "result": "LESS", "mod_revision": (revision + 1).to_string(),
        });
        let mut then = vec![json!({ "request_delete_range": { "key": key } })];
        if cause == OrphanCause::Released {
            then.push(
                json!({ "request_put": { "key": self.keys.record(name), "value": encode(free) } }),
            );
        }
        self.transact(
            json!([is_of(&key, claim), is_old]),
            then.into(),
            json!([]),
            by,
        )
        .map(drop)
    }

    /// Forgets the session, so that the next lease of this TTL uses another.
    pub(super) fn forget_session(&self, ttl: Duration, session: &Arc<Session>, by: Deadline) {
        let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        let slot = self.sessions.lock().entry(seconds).or_default().clone();
        if let Some(mut slot) = slot.try_lock_until(by.moment()) {
            slot.take_if(|current| Arc::ptr_eq(current, session));
        }
    }
}
