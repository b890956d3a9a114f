//! Leases on etcd, 3.4 or later: `etcd://host:2379,host:2379/name`, or `etcds://` for TLS.
//!
//! Each lease has two keys below the prefix:
//! - `held/NAME` exists while the lease is held. Its value is the claim, and its revision is the token. The key is
//!   attached to the [session](session) of its holder: etcd deletes the key when the session was not kept alive for its
//!   TTL.
//! - `record/NAME` is never deleted. It contains `held`, `free` or `evicted`, the claim of the last holder, and, with
//!   `held`, the identity of that holder. It says `held` if the last holder did not release; the next grant reports
//!   this. If the last holder never learned of its grant, the record names the owner that died before it instead.
//!
//! Every step is one transaction. The transaction compares the revision of `held/NAME`, which is zero if the key does
//! not exist and which only an acquisition changes. Then it changes both keys or none. A token is the revision of the
//! granting transaction, so tokens grow unless the cluster's data is restored from an earlier backup.
//!
//! Every request can be repeated. A repeated acquisition finds its grant by the claim; a repeated release or eviction
//! finds its effect in the record. A session whose creation got no answer expires by itself.
//!
//! One watch over all `held/` keys, for deletions only, wakes the waiters. The watch starts from now: etcd serves such
//! watches at once, but watches from a past revision only ten times per second. After the watch has begun, the waiter
//! reads the key once more, so that no change is missed.

mod client;
mod http;
mod session;

use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::{Value, json};

use self::client::{Address, Gateway, Stream, decoded, encoded, is_compacted, is_session_gone, number};
use self::session::{Kept, Orphan, Session, now};
use crate::base::cancel::CancelToken;
use crate::base::error::StoreError;
use crate::base::owner::Owner;
use crate::lease::store::lease_store::{
    Attempt, ClaimId, Deadline, Durability, Grant, LeaseName, LeaseSnapshot, LeaseStore, Released, Renewal,
    StoreProfile,
};
use crate::lease::store::server::{
    Listener, Result, Subscriptions, attempt, is_own, own_text, owner_of, passed_on, shown, text_of,
};
use crate::sys::failpoint::step;
use crate::sys::process_local::ProcessLocal;

/// The minimum TTL of etcd with its default timing: one and a half election timeouts, in whole seconds.
const SMALLEST_TTL: Duration = Duration::from_secs(2);
/// The timeout of a waiter's check that the lease is still held.
const LOOK: Duration = Duration::from_secs(2);
/// The time without news after which a watch checks that its endpoint is alive.
const QUIET: Duration = Duration::from_secs(4);
/// How often in a row the session may end, or the leader change, during one request.
const MOST_TURNS: u32 = 3;

/// Returns the store on the servers at `url`, without connecting.
pub(in crate::lease) fn open(url: &str) -> crate::Result<Arc<dyn LeaseStore>> {
    Ok(Arc::new(Store { address: Address::parse(url)?, own: ProcessLocal::new() }))
}

struct Store {
    address: Address,
    own: ProcessLocal<Arc<Own>>,
}

/// The state of the store in one process.
struct Own {
    gateway: Arc<Gateway>,
    keys: Keys,
    /// The session for each TTL, in seconds.
    sessions: Mutex<HashMap<u64, Arc<SessionSlot>>>,
    bells: Arc<Subscriptions>,
}

/// The session for a TTL. Its lock is held while a session is created.
type SessionSlot = Mutex<Option<Arc<Session>>>;

/// The prefixes of the keys.
#[derive(Clone)]
struct Keys {
    held: String,
    record: String,
}

impl Keys {
    fn held(&self, name: &LeaseName) -> String {
        encoded(format!("{}{name}", self.held))
    }

    fn record(&self, name: &LeaseName) -> String {
        encoded(format!("{}{name}", self.record))
    }
}

/// The content of a `record` key.
struct Record {
    state: String,
    claim: Option<ClaimId>,
    owner: Option<Owner>,
}

const HELD: &str = "held";
const FREE: &str = "free";
const EVICTED: &str = "evicted";

impl Record {
    fn text(state: &str, claim: &ClaimId, owner: &str) -> String {
        format!("{state} {claim}\n{owner}")
    }

    /// Parses a key in etcd's JSON. Without a key, the record is empty.
    fn parse(key: &Value) -> Self {
        let text = decoded(&key["value"]);
        let (first, owner) = text.split_once('\n').unwrap_or_default();
        let (state, claim) = first.split_once(' ').unwrap_or_default();
        Self { state: state.to_owned(), claim: parse_claim(claim), owner: owner_of(owner) }
    }

    fn is(&self, state: &str, claim: Option<ClaimId>) -> bool {
        self.state == state && self.claim == claim
    }
}

/// What a step found that wanted to free a key, if the key belongs to another claim or does not exist.
struct Found {
    record: Record,
    /// An earlier attempt of the request got no answer.
    is_in_doubt: bool,
}

impl Found {
    fn of(answer: &Answer) -> Self {
        Self { record: Record::parse(answer.read(0)), is_in_doubt: answer.is_in_doubt }
    }
}

fn parse_claim(text: &str) -> Option<ClaimId> {
    u128::from_str_radix(text, 16).ok().map(ClaimId::from_number)
}

/// The answer of etcd to a transaction.
struct Answer {
    told: Value,
    /// An earlier attempt got no answer.
    is_in_doubt: bool,
}

impl Answer {
    /// Returns whether all comparisons held.
    fn is_done(&self) -> bool {
        self.told["succeeded"] == true
    }

    fn revision(&self) -> u64 {
        number(&self.told["header"]["revision"])
    }

    fn term(&self) -> u64 {
        number(&self.told["header"]["raft_term"])
    }

    /// Returns the key that the operation of this number read; null if there is none.
    fn read(&self, at: usize) -> &Value {
        &self.told["responses"][at]["response_range"]["kvs"][0]
    }

    /// Returns the key as it was before the operation of this number wrote it.
    fn before(&self, at: usize) -> &Value {
        &self.told["responses"][at]["response_put"]["prev_kv"]
    }
}

impl LeaseStore for Store {
    fn profile(&self) -> StoreProfile {
        let mut hasher = DefaultHasher::new();
        ("etcd", self.address.hosts()).hash(&mut hasher);
        StoreProfile {
            smallest_ttl: SMALLEST_TTL,
            ttl_step: Duration::from_secs(1),
            wakes_waiters: true,
            failure_domain: Some(hasher.finish()),
            ..StoreProfile::new(Durability::Quorum)
        }
    }

    fn try_acquire(&self, name: &LeaseName, claim: &ClaimId, ttl: Duration, by: Deadline) -> Result<Attempt> {
        let own = self.own();
        attempt(|over| own.acquire(name, claim, ttl, over, by))
    }

    fn renew(&self, grant: &Grant, by: Deadline) -> Result<Renewal> {
        self.own().renew(grant, by)
    }

    fn release(&self, grant: &Grant, by: Deadline) -> Result<Released> {
        let free = Record::text(FREE, grant.claim(), "");
        let freed = self.own().give_back(grant, Orphan::Released, Some(&free), by)?;
        let claim = Some(*grant.claim());
        Ok(match freed {
            Ok(()) => Released::Done,
            Err(found) if found.record.is(FREE, claim) => Released::Done,
            // The first of several requests got no answer but freed the name, and another claim acquired the name.
            Err(found) if found.is_in_doubt && found.record.claim != claim => Released::Done,
            Err(_) => Released::NotMine,
        })
    }

    fn abandon(&self, grant: &Grant, by: Deadline) -> Result<Released> {
        // The record keeps saying `held`, so the next grant reports that this one was not released.
        let record = passed_on(grant).map(|died| Record::text(HELD, grant.claim(), &died));
        let why = if record.is_some() { Orphan::InDoubt } else { Orphan::RunOut };
        let freed = self.own().give_back(grant, why, record.as_deref(), by)?;
        Ok(if freed.is_ok() { Released::Done } else { Released::NotMine })
    }

    fn get(&self, name: &LeaseName, by: Deadline) -> Result<Option<LeaseSnapshot>> {
        self.own().get(name, by)
    }

    fn evict(&self, name: &LeaseName, seen: &LeaseSnapshot, by: Deadline) -> Result<Released> {
        let claim = seen.claim().unwrap_or(ClaimId::from_number(0));
        let evicted = Record::text(EVICTED, &claim, "");
        let freed = self.own().free(name, seen.claim(), seen.revision(), Some(&evicted), by)?;
        Ok(match freed {
            Err(found) if !found.record.is(EVICTED, Some(claim)) => Released::NotMine,
            _ => Released::Done,
        })
    }

    fn wait_for_change(&self, name: &LeaseName, seen: &LeaseSnapshot, by: Deadline, stop: &CancelToken) -> Result<()> {
        let own = self.own();
        let bell = own.bells.subscribe(name, by, stop)?;
        if stop.is_cancelled() {
            return Ok(());
        }
        match own.get(name, by.min(Deadline::after(LOOK)))? {
            Some(still) if still.revision() == seen.revision() => bell.wait(seen.owner(), by, stop),
            _ => Ok(()),
        }
    }
}

impl Store {
    fn own(&self) -> Arc<Own> {
        self.own.get_or_make(|| Arc::new(Own::new(&self.address))).clone()
    }
}

fn session_of(grant: &Grant) -> Result<&Arc<Session>> {
    grant.handle().ok_or_else(|| StoreError::permanent("the grant is of another store"))
}

impl Own {
    fn new(address: &Address) -> Self {
        let gateway = Arc::new(Gateway::new(address));
        let keys = Keys { held: format!("{}held/", address.prefix), record: format!("{}record/", address.prefix) };
        let (to_watch, prefix) = (gateway.clone(), keys.held.clone());
        let bells = Subscriptions::new(move |by| Ok(Box::new(Watch::begin(&to_watch, &prefix, by)?)));
        Self { gateway, keys, sessions: Mutex::default(), bells }
    }

    /// Runs one transaction: `then` if all comparisons hold, `otherwise` if not.
    fn transact(&self, compare: Value, then: Value, otherwise: Value, by: Deadline) -> Result<Answer> {
        let body = json!({ "compare": compare, "success": then, "failure": otherwise });
        let (told, is_in_doubt) = self.gateway.ask_in_doubt("/v3/kv/txn", &body, by)?;
        Ok(Answer { told, is_in_doubt })
    }

    /// Returns the comparison of a `held` key's revision, and of its claim if one is given.
    fn is_held(&self, name: &LeaseName, revision: u64, claim: Option<ClaimId>) -> Value {
        let key = self.keys.held(name);
        match claim {
            None => json!([is_at(&key, revision)]),
            Some(claim) => json!([is_at(&key, revision), is_of(&key, claim)]),
        }
    }

    fn read_both(&self, name: &LeaseName) -> Value {
        json!([
            { "request_range": { "key": self.keys.held(name) } },
            { "request_range": { "key": self.keys.record(name) } },
        ])
    }

    /// Acquires the name if it is free, or if its holder is `over`.
    fn acquire(
        &self,
        name: &LeaseName,
        claim: &ClaimId,
        ttl: Duration,
        over: Option<&LeaseSnapshot>,
        by: Deadline,
    ) -> Result<Attempt> {
        let began = now();
        let mut over = over.map(|seen| (seen.revision(), seen.claim()));
        // Why the grant that is taken over is orphaned, if it is.
        let mut nobody = None;
        let record = Record::text(HELD, claim, &own_text());
        for _ in 0..MOST_TURNS {
            let (session, kept) = self.session(ttl, by)?;
            let sent = now();
            // Until the outcome is recorded, other threads do not treat the claim as orphaned.
            let _asked = session.ask(claim, sent);
            let (revision, holder) = over.unwrap_or_default();
            let put = json!([
                { "request_put": {
                    "key": self.keys.held(name), "value": encoded(claim.to_string()), "lease": session.id.to_string(),
                } },
                { "request_put": { "key": self.keys.record(name), "value": encoded(&record), "prev_kv": true } },
            ]);
            let answer = match self.transact(self.is_held(name, revision, holder), put, self.read_both(name), by) {
                Err(error) if is_session_gone(&error) => {
                    self.forget(ttl, &session, by);
                    continue;
                }
                Err(error) => {
                    // For any error: one endpoint may have applied the request before another refused it.
                    session.loosen(name, claim, Orphan::InDoubt, sent);
                    return Err(error);
                }
                Ok(answer) => answer,
            };
            if let Some(kept) = kept.filter(|kept| kept.term == answer.term()) {
                session.keep(kept.sent);
            }
            if answer.is_done() {
                step("record written");
                let before = match nobody {
                    Some(Orphan::InDoubt) => match self.before(name, revision, holder, &session, by) {
                        Ok(before) => before,
                        Err(error) => {
                            // The claim is in doubt again: it is unknown whose death the next grant must report.
                            session.loosen(name, claim, Orphan::InDoubt, sent);
                            return Err(StoreError::unknown(error));
                        }
                    },
                    _ => Record::parse(answer.before(1)),
                };
                let token = answer.revision();
                if answer.is_in_doubt {
                    // The same request may be applied once more, even after the release.
                    session.loosen(name, claim, Orphan::InDoubt, sent);
                }
                session.add(name, claim, token, sent);
                let grant = Grant::new(name, claim, token, session.left(began)).with_handle(session);
                return Ok(Attempt::Granted(match &*before.state {
                    HELD if nobody != Some(Orphan::Released) => grant.recovered_from(before.owner),
                    _ => grant,
                }));
            }
            let held = answer.read(0);
            if held.is_null() {
                // The name became free after it was seen held.
                (over, nobody) = (None, None);
                continue;
            }
            let seen = seen(held, answer.read(1));
            nobody = match session.loose(seen.claim()) {
                None if seen.claim() == Some(*claim) => Some(Orphan::InDoubt),
                None => return Ok(Attempt::Busy(seen)),
                why => why,
            };
            // An earlier request took effect, and its grant is orphaned. The grant is taken over, not simply accepted,
            // so that only one of two finders gets it.
            over = Some((seen.revision(), seen.claim()));
        }
        Err(StoreError::unknown("the session ended, or the lease was released, again and again meanwhile"))
    }

    /// Returns the record as it was before the claim's indeterminate request at that revision, and before other
    /// indeterminate requests of this process. If etcd has compacted the revision, the record is empty.
    fn before(
        &self,
        name: &LeaseName,
        mut revision: u64,
        claim: Option<ClaimId>,
        session: &Session,
        by: Deadline,
    ) -> Result<Record> {
        loop {
            let body = json!({ "key": self.keys.record(name), "revision": revision.saturating_sub(1).to_string() });
            let answer = match self.gateway.ask("/v3/kv/range", &body, by) {
                Err(error) if is_compacted(&error) => return Ok(Record::parse(&Value::Null)),
                answer => answer?,
            };
            let (found, record) = (&answer["kvs"][0], Record::parse(&answer["kvs"][0]));
            let is_own = record.owner.as_ref().is_some_and(is_own);
            let in_doubt = record.claim == claim || session.is_in_doubt(record.claim);
            if record.state != HELD || !is_own || !in_doubt {
                return Ok(record);
            }
            revision = number(&found["mod_revision"]);
        }
    }

    fn renew(&self, grant: &Grant, by: Deadline) -> Result<Renewal> {
        let session = session_of(grant)?;
        let began = now();
        if session.covers(grant, began) {
            return Ok(Renewal::Extended { ttl: session.left(began) });
        }
        // The key is being deleted as orphaned: the lease is lost, though its key may still exist.
        if session.loose(Some(*grant.claim())).is_some() {
            return Ok(Renewal::Lost { by: None });
        }
        let turn = session.turn.try_lock_until(by.moment());
        let _turn = turn.ok_or_else(|| StoreError::not_applied("another renewal of its session is under way"))?;
        if session.covers(grant, began) {
            return Ok(Renewal::Extended { ttl: session.left(began) });
        }
        for _ in 0..MOST_TURNS {
            let kept = match session.is_fresh(began) {
                true => None,
                false => match self.keep(session, by)? {
                    Some(kept) => Some(kept),
                    None => return self.what_became_of(grant, by),
                },
            };
            let names = session.to_look_at(grant, began);
            let keys: Vec<_> = names.iter().map(|(name, _)| self.keys.held(name)).collect();
            let compare: Value = keys.iter().zip(&names).map(|(key, (_, token))| is_at(key, *token)).collect();
            let read: Value = keys.iter().map(|key| json!({ "request_range": { "key": key } })).collect();
            let sent = now();
            let answer = self.transact(compare, json!([]), read, by)?;
            let is_in_place = |at, token| answer.is_done() || number(&answer.read(at)["mod_revision"]) == token;
            let found = names.into_iter().enumerate();
            let found = found.map(|(at, (name, token))| (name, token, is_in_place(at, token)));
            session.looked_at(found, sent, now());
            if !is_in_place(0, grant.token()) {
                return self.what_became_of(grant, by);
            }
            match kept {
                Some(kept) if kept.term != answer.term() => {}
                kept => {
                    kept.inspect(|kept| session.keep(kept.sent));
                    return Ok(Renewal::Extended { ttl: session.left(began) });
                }
            }
        }
        Err(StoreError::not_applied("etcd changed its leader just now"))
    }

    /// Finds the present holder after the key of a grant was not found in place.
    fn what_became_of(&self, grant: &Grant, by: Deadline) -> Result<Renewal> {
        let seen = self.get(grant.name(), by)?;
        if seen.as_ref().is_some_and(|seen| seen.revision() == grant.token()) {
            return Err(StoreError::not_applied("etcd knows the lease, but not its session"));
        }
        session_of(grant)?.remove(grant);
        Ok(Renewal::Lost { by: seen.and_then(|seen| seen.owner().cloned()) })
    }

    /// Frees the key of a grant; see [`free`](Self::free).
    fn give_back(&self, grant: &Grant, why: Orphan, record: Option<&str>, by: Deadline) -> Result<Result<(), Found>> {
        let session = session_of(grant)?;
        let freed = self.free(grant.name(), Some(*grant.claim()), grant.token(), record, by);
        match freed {
            Ok(_) => {
                step("record freed");
                session.remove(grant);
            }
            Err(_) => session.loosen(grant.name(), grant.claim(), why, now()),
        }
        freed
    }

    /// Deletes the `held` key of that revision and claim, and writes the record if one is given. Returns what it found
    /// as `Err` if the key has another revision or claim.
    fn free(
        &self,
        name: &LeaseName,
        claim: Option<ClaimId>,
        revision: u64,
        record: Option<&str>,
        by: Deadline,
    ) -> Result<Result<(), Found>> {
        let record_key = self.keys.record(name);
        let mut then = vec![json!({ "request_delete_range": { "key": self.keys.held(name) } })];
        then.extend(record.map(|text| json!({ "request_put": { "key": record_key, "value": encoded(text) } })));
        let otherwise = json!([{ "request_range": { "key": record_key } }]);
        let answer = self.transact(self.is_held(name, revision, claim), then.into(), otherwise, by)?;
        Ok(if answer.is_done() { Ok(()) } else { Err(Found::of(&answer)) })
    }

    fn get(&self, name: &LeaseName, by: Deadline) -> Result<Option<LeaseSnapshot>> {
        let answer = self.transact(json!([]), self.read_both(name), json!([]), by)?;
        let held = answer.read(0);
        Ok((!held.is_null()).then(|| seen(held, answer.read(1))))
    }

    /// Returns the session for leases of this TTL. Either enough of the session is left, or a request has just kept it
    /// alive. In the second case the next request shows whether that counts.
    fn session(&self, ttl: Duration, by: Deadline) -> Result<(Arc<Session>, Option<Kept>)> {
        let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        let place = self.sessions.lock().entry(seconds).or_default().clone();
        let place = place.try_lock_until(by.moment());
        let mut place = place.ok_or_else(|| StoreError::not_applied("a session is being made, and it takes long"))?;
        if let Some(session) = &*place {
            if session.can_begin(now()) {
                return Ok((session.clone(), None));
            }
            if let Some(kept) = self.keep(session, by)? {
                return Ok((session.clone(), Some(kept)));
            }
        }
        let sent = now();
        let answer = self.gateway.ask("/v3/lease/grant", &json!({ "TTL": seconds.to_string() }), by)?;
        step("session made");
        let id = number(&answer["ID"]);
        if id == 0 {
            return Err(StoreError::not_applied("etcd made no session"));
        }
        let session = Arc::new(Session::new(id, Duration::from_secs(seconds), sent));
        *place = Some(session.clone());
        Ok((session, None))
    }

    /// Keeps a session alive for another TTL. Returns `None` if the session is gone.
    fn keep(&self, session: &Session, by: Deadline) -> Result<Option<Kept>> {
        let sent = now();
        let answer = self.gateway.ask("/v3/lease/keepalive", &json!({ "ID": session.id.to_string() }), by)?;
        step("session kept");
        let is_there = number(&answer["TTL"]) > 0;
        if is_there {
            self.let_go(session, sent, number(&answer["header"]["revision"]), by);
        }
        Ok(is_there.then(|| Kept { sent, term: number(&answer["header"]["raft_term"]) }))
    }

    /// Deletes the orphaned keys of a session that were written at or before this revision. A deletion may be applied
    /// late, after the claim was requested once more and granted. That grant has a greater revision, because a claim
    /// that is being requested is not deleted. A failed deletion is retried later.
    fn let_go(&self, session: &Session, now: Duration, revision: u64, by: Deadline) {
        for (name, claim, why) in session.due_for_deletion(now) {
            if self.let_go_of(&name, claim, why, session, revision, by).is_err() {
                return;
            }
        }
    }

    fn let_go_of(
        &self,
        name: &LeaseName,
        claim: ClaimId,
        why: Orphan,
        session: &Session,
        revision: u64,
        by: Deadline,
    ) -> Result<()> {
        let free = Record::text(FREE, &claim, "");
        if why == Orphan::InDoubt {
            let held = self.get(name, by)?.filter(|held| held.claim() == Some(claim) && held.revision() <= revision);
            let Some(held) = held else { return Ok(()) };
            let before = self.before(name, held.revision(), Some(claim), session, by)?;
            // The next grant must report the earlier holder that did not release.
            let record = match &*before.state {
                HELD => Record::text(HELD, &claim, &before.owner.as_ref().map(text_of).unwrap_or_default()),
                _ => free,
            };
            return self.free(name, Some(claim), held.revision(), Some(&record), by).map(drop);
        }
        let key = self.keys.held(name);
        let is_old = json!({
            "key": key, "target": "MOD", "result": "LESS", "mod_revision": (revision + 1).to_string(),
        });
        let mut then = vec![json!({ "request_delete_range": { "key": key } })];
        if why == Orphan::Released {
            then.push(json!({ "request_put": { "key": self.keys.record(name), "value": encoded(free) } }));
        }
        self.transact(json!([is_of(&key, claim), is_old]), then.into(), json!([]), by).map(drop)
    }

    /// Forgets the session, so that the next lease of this TTL uses another.
    fn forget(&self, ttl: Duration, session: &Arc<Session>, by: Deadline) {
        let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        let place = self.sessions.lock().entry(seconds).or_default().clone();
        if let Some(mut place) = place.try_lock_until(by.moment()) {
            place.take_if(|current| Arc::ptr_eq(current, session));
        }
    }
}

/// Returns the comparison of a key's revision, which is the revision of the granting transaction.
fn is_at(key: &str, revision: u64) -> Value {
    json!({ "key": key, "target": "MOD", "result": "EQUAL", "mod_revision": revision.to_string() })
}

/// Returns the comparison of the claim in a key.
fn is_of(key: &str, claim: ClaimId) -> Value {
    json!({ "key": key, "target": "VALUE", "result": "EQUAL", "value": encoded(claim.to_string()) })
}

/// Returns the snapshot of a holder from its two keys.
fn seen(held: &Value, record: &Value) -> LeaseSnapshot {
    let revision = number(&held["mod_revision"]);
    let mut seen = LeaseSnapshot::new(revision).with_token(revision);
    let claim = parse_claim(&decoded(&held["value"]));
    if let Some(claim) = claim {
        seen = seen.with_claim(claim);
    }
    let record = Record::parse(record);
    // The claims differ only after tampering.
    if let Some(owner) = record.owner.filter(|_| record.claim == claim) {
        seen = seen.with_owner(owner);
    }
    shown(seen)
}

/// A watch over the `held` keys.
struct Watch {
    gateway: Arc<Gateway>,
    stream: Stream,
    prefix: String,
    /// When the endpoint last sent anything.
    heard: Instant,
}

impl Watch {
    fn begin(gateway: &Arc<Gateway>, prefix: &str, by: Deadline) -> Result<Self> {
        // The prefix ends with a slash. The range ends at the prefix with this last byte incremented.
        let mut end = prefix.as_bytes().to_vec();
        if let Some(last) = end.last_mut() {
            *last += 1;
        }
        let request = json!({ "create_request": {
            "key": encoded(prefix), "range_end": encoded(end), "filters": ["NOPUT"],
        } });
        let stream = gateway.watch(&request, by)?;
        Ok(Self { gateway: gateway.clone(), stream, prefix: prefix.to_owned(), heard: Instant::now() })
    }
}

impl Listener for Watch {
    fn listen(&mut self, at_most: Duration, ring: &mut dyn FnMut(&str)) -> Result<()> {
        let Some(line) = self.stream.next(Deadline::after(at_most))? else {
            if self.heard.elapsed() > QUIET {
                // A frozen endpoint looks like an endpoint without news.
                self.gateway.greet(self.stream.place(), Deadline::after(QUIET / 2))?;
                self.heard = Instant::now();
            }
            return Ok(());
        };
        self.heard = Instant::now();
        let news: Value = serde_json::from_slice(&line).map_err(StoreError::not_applied)?;
        let result = &news["result"];
        // etcd ends the watch if it has no leader, or if it has compacted the revision that the watch had reached.
        if !result.is_object() || result["canceled"] == true {
            return Err(StoreError::not_applied(format!("etcd ended the watch: {news}")));
        }
        for event in result["events"].as_array().into_iter().flatten() {
            if let Some(name) = decoded(&event["kv"]["key"]).strip_prefix(&self.prefix) {
                ring(name);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renew_of_grant_due_for_deletion_is_lost() {
        // No server listens at this address, so only the session's own state can answer.
        let own = Own::new(&Address::parse("etcd://127.0.0.1:1").unwrap());
        let (began, ttl) = (now(), Duration::from_secs(8));
        let (name, claim) = (LeaseName::new("one").unwrap(), ClaimId::from_number(1));
        let session = Arc::new(Session::new(1, ttl, began));
        session.add(&name, &claim, 1, began);
        let grant = Grant::new(&name, &claim, 1, ttl).with_handle(session.clone());
        let renewed = || own.renew(&grant, Deadline::after(ttl));
        assert!(matches!(renewed(), Ok(Renewal::Extended { .. })));
        assert_eq!(session.due_for_deletion(now() + ttl * 2).len(), 1);
        assert!(matches!(renewed(), Ok(Renewal::Lost { .. })));
    }
}
