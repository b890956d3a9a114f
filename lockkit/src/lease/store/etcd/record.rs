//! The two keys of a lease, and etcd's answers about them.

use serde_json::{Value, json};

use super::json::{decode, encode, number};
use crate::base::owner::Owner;
use crate::lease::store::lease_store::{ClaimId, LeaseName, LeaseSnapshot};
use crate::lease::store::server::{expire_if_dead, parse_claim, parse_owner};

/// The prefixes of the keys.
#[derive(Clone)]
pub(super) struct Keys {
    pub(super) held: String,
    record: String,
}

impl Keys {
    pub(super) fn new(prefix: &str) -> Self {
        Self {
            held: format!("{prefix}held/"),
            record: format!("{prefix}record/"),
        }
    }

    pub(super) fn held(&self, name: &LeaseName) -> String {
        encode(format!("{}{name}", self.held))
    }

    pub(super) fn record(&self, name: &LeaseName) -> String {
        encode(format!("{}{name}", self.record))
    }
}

/// The content of a `record` key.
pub(super) struct Record {
    pub(super) state: String,
    pub(super) claim: Option<ClaimId>,
    pub(super) owner: Option<Owner>,
}

pub(super) const HELD: &str = "held";
pub(super) const FREE: &str = "free";
pub(super) const EVICTED: &str = "evicted";

impl Record {
    pub(super) fn text(state: &str, claim: &ClaimId, owner: &str) -> String {
        format!("{state} {claim}\n{owner}")
    }

    /// Parses a key in etcd's JSON. Without a key, the record is empty.
    pub(super) fn parse(key: &Value) -> Self {
        let text = decode(&key["value"]);
        let (first, owner) = text.split_once('\n').unwrap_or_default();
        let (state, claim) = first.split_once(' ').unwrap_or_default();
        Self {
            state: state.to_owned(),
            claim: parse_claim(claim),
            owner: parse_owner(owner),
        }
    }

    pub(super) fn is(&self, state: &str, claim: Option<ClaimId>) -> bool {
        self.state == state && self.claim == claim
    }
}

/// The record that a request found instead of the key to free: the key belongs to another claim or
/// does not exist.
pub(super) struct NotFreed {
    pub(super) record: Record,
    /// An earlier attempt of the request got no answer.
    pub(super) is_indeterminate: bool,
}

impl NotFreed {
    pub(super) fn of(answer: &Answer) -> Self {
        Self {
            record: Record::parse(answer.read(0)),
            is_indeterminate: answer.is_indeterminate,
        }
    }
}

/// The answer of etcd to a transaction.
pub(super) struct Answer {
    pub(super) body: Value,
    /// An earlier attempt got no answer.
    pub(super) is_indeterminate: bool,
}

impl Answer {
    /// Returns whether all comparisons held.
    pub(super) fn is_done(&self) -> bool {
        self.body["succeeded"] == true
    }

    pub(super) fn revision(&self) -> u64 {
        number(&self.body["header"]["revision"])
    }

    pub(super) fn term(&self) -> u64 {
        number(&self.body["header"]["raft_term"])
    }

    /// Returns the key that the operation of this number read; null if there is none.
    pub(super) fn read(&self, at: usize) -> &Value {
        &self.body["responses"][at]["response_range"]["kvs"][0]
    }

    /// Returns the key as it was before the operation of this number wrote it.
    pub(super) fn before(&self, at: usize) -> &Value {
        &self.body["responses"][at]["response_put"]["prev_kv"]
    }
}

/// Returns the comparison of a key's revision, which is the revision of the granting transaction.
pub(super) fn is_at(key: &str, revision: u64) -> Value {
    json!({ "key": key, "target": "MOD", "result": "EQUAL", "mod_revision": revision.to_string() })
}

/// Returns the comparison of the claim in a key.
pub(super) fn is_of(key: &str, claim: ClaimId) -> Value {
    json!({ "key": key, "target": "VALUE", "result": "EQUAL", "value": encode(claim.to_string()) })
}

/// Returns the snapshot of a holder from its two keys.
pub(super) fn snapshot(held: &Value, record: &Value) -> LeaseSnapshot {
    let revision = number(&held["mod_revision"]);
    let mut snapshot = LeaseSnapshot::new(revision).with_token(revision);
    let claim = parse_claim(&decode(&held["value"]));
    if let Some(claim) = claim {
        snapshot = snapshot.with_claim(claim);
    }
    let record = Record::parse(record);
    // The claims differ only after tampering.
    if let Some(owner) = record.owner.filter(|_| record.claim == claim) {
        snapshot = snapshot.with_owner(owner);
    }
    expire_if_dead(snapshot)
}
