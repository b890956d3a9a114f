//! What a grant writes: its token, its heartbeat numbers, and its record.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use super::file_store::FileStore;
use super::format::Record;
use crate::base::owner::Owner;
use crate::lease::store::lease_store::{ClaimId, Grant, LeaseName, LeaseSnapshot};

/// The heartbeat numbers of a grant. No number is repeated, because an observer that saw it before
/// would continue to count from then.
#[derive(Default)]
struct HeartbeatNumbers(AtomicU64);

impl HeartbeatNumbers {
    fn next(&self, written: u64) -> u64 {
        // The next number differs from a forged number that is the largest, too.
        let next = self.0.load(Ordering::Relaxed).max(written).wrapping_add(1);
        self.0.store(next, Ordering::Relaxed);
        next
    }
}

/// Creates the grant of `token` in this store.
pub(super) fn new_grant(name: &LeaseName, claim: &ClaimId, token: u64, ttl: Duration) -> Grant {
    Grant::new(name, claim, token, ttl).with_handle(HeartbeatNumbers::default())
}

impl FileStore {
    /// Creates the record of this process, which acquires the lease now.
    pub(super) fn own_record(&self, claim: &ClaimId, token: u64, ttl: Duration) -> Record {
        let owner = Owner {
            acquired: Some(SystemTime::now()),
            ..Owner::current()
        };
        Record::held(claim, token, ttl, self.spec.heartbeat, &owner)
    }

    /// Creates the record of a grant again, after its file was deleted or damaged.
    #[cold]
    pub(super) fn rebuilt_record(&self, grant: &Grant) -> Record {
        let mut record = self.own_record(grant.claim(), grant.token(), grant.ttl());
        record.set_heartbeat_number(next_heartbeat_number(grant, 0));
        record
    }
}

/// Returns the token of the grant that follows this record.
pub(super) fn token_after(before: Option<&Record>) -> u64 {
    before
        .map_or(0, Record::token)
        .saturating_add(1)
        .max(min_token())
}

/// Returns the microseconds since the epoch. No lease is granted as often as once per microsecond.
pub(super) fn min_token() -> u64 {
    let since = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_micros())
        .unwrap_or(u64::MAX / 2)
        .max(1)
}

/// Returns the next heartbeat number of the grant, whose record has the number `written`.
pub(super) fn next_heartbeat_number(grant: &Grant, written: u64) -> u64 {
    grant
        .handle::<HeartbeatNumbers>()
        .map_or(written.saturating_add(1), |numbers| numbers.next(written))
}

/// Returns the snapshot of a record without what depends on the observer.
pub(super) fn holder_snapshot(record: &Record) -> LeaseSnapshot {
    LeaseSnapshot::new(record.fingerprint())
        .with_claim(record.claim())
        .with_token(record.token())
}

/// Returns whether the record is held under this grant.
pub(super) fn is_of_grant(record: &Record, grant: &Grant) -> bool {
    record.is_held() && record.claim() == *grant.claim() && record.token() == grant.token()
}
