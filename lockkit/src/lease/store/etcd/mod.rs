//! Leases on etcd, 3.4 or later: `etcd://host:2379,host:2379/name`, or `etcds://` for TLS.
//!
//! Each lease has two keys below the prefix:
//! - `held/NAME` exists while the lease is held. Its value is the claim, and its revision is the
//!   token. The key is attached to the [session] of its holder: etcd deletes the key when the
//!   session was not kept alive for its TTL.
//! - `record/NAME` is never deleted. It contains `held`, `free` or `evicted`, the claim of the last
//!   holder, and, with `held`, the identity of that holder. It says `held` if the last holder did
//!   not release; the next grant reports this. If the last holder never learned of its grant, the
//!   record names the owner that died before it instead.
//!
//! Every step is one transaction. The transaction compares the revision of `held/NAME`, which is
//! zero if the key does not exist and which only an acquisition changes. Then it changes both keys
//! or none. A token is the revision of the granting transaction, so tokens grow unless the
//! cluster's data is restored from an earlier backup.
//!
//! Every request can be repeated. A repeated acquisition finds its grant by the claim; a repeated
//! release or eviction finds its effect in the record. A session whose creation got no answer
//! expires by itself.
//!
//! One watch over all `held/` keys, for deletions only, wakes the waiters. The watch starts from
//! now: etcd serves such watches at once, but watches from a past revision only ten times per
//! second. After the watch has begun, the waiter reads the key once more, so that no change is
//! missed.

mod acquire;
mod client;
mod config;
mod error;
mod http;
mod json;
mod listener;
mod record;
mod renew;
mod session;
mod state;
mod watch_stream;

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use self::acquire::Acquisition;
use self::config::Config;
use self::record::{EVICTED, FREE, HELD, Record};
use self::session::OrphanCause;
use self::state::ProcessState;
use crate::base::cancel::CancelToken;
use crate::lease::store::lease_store::{
    Attempt, ClaimId, Deadline, Durability, Grant, LeaseName, LeaseSnapshot, LeaseStore, Released,
    Renewal, StoreProfile,
};
use crate::lease::store::server::{
    Result, acquire_or_take_over, format_recovered_owner, release_not_found,
};
use crate::sys::process_local::ProcessLocal;

/// The minimum TTL of etcd with its default timing: one and a half election timeouts, in whole
/// seconds.
const MIN_TTL: Duration = Duration::from_secs(2);
/// The timeout of a waiter's check that the lease is still held.
const WAITER_REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// Returns the store on the servers at `url`, without connecting.
pub(in crate::lease) fn open(url: &str) -> crate::Result<Arc<dyn LeaseStore>> {
    Ok(Arc::new(EtcdStore {
        config: Config::parse(url)?,
        state: ProcessLocal::new(),
    }))
}

struct EtcdStore {
    config: Config,
    state: ProcessLocal<Arc<ProcessState>>,
}

impl LeaseStore for EtcdStore {
    fn profile(&self) -> StoreProfile {
        let mut hasher = DefaultHasher::new();
        ("etcd", &*self.config.hosts).hash(&mut hasher);
        StoreProfile {
            smallest_ttl: MIN_TTL,
            ttl_step: Duration::from_secs(1),
            wakes_waiters: true,
            failure_domain: Some(hasher.finish()),
            ..StoreProfile::new(Durability::Quorum)
        }
    }

    fn try_acquire(
        &self,
        name: &LeaseName,
        claim: &ClaimId,
        ttl: Duration,
        by: Deadline,
    ) -> Result<Attempt> {
        let state = self.state();
        acquire_or_take_over(|expired| {
            Acquisition::new(&state, name, claim, ttl, expired, by).run()
        })
    }

    fn renew(&self, grant: &Grant, by: Deadline) -> Result<Renewal> {
        self.state().renew(grant, by)
    }

    fn release(&self, grant: &Grant, by: Deadline) -> Result<Released> {
        let free = Record::text(FREE, grant.claim(), "");
        let freed = self
            .state()
            .free_grant(grant, OrphanCause::Released, Some(&free), by)?;
        let claim = Some(*grant.claim());
        Ok(match freed {
            Ok(()) => Released::Done,
            Err(other) if other.record.is(FREE, claim) => Released::Done,
            Err(other) if other.record.claim != claim => release_not_found(other.is_indeterminate),
            // The record has this claim, but no attempt of this request wrote `free` to it.
            Err(_) => Released::NotMine,
        })
    }

    fn abandon(&self, grant: &Grant, by: Deadline) -> Result<Released> {
        // The record keeps saying `held`, so the next grant reports that this one was not released.
        let record =
            format_recovered_owner(grant).map(|dead| Record::text(HELD, grant.claim(), &dead));
        let cause = if record.is_some() {
            OrphanCause::Indeterminate
        } else {
            OrphanCause::NotRenewed
        };
        let freed = self
            .state()
            .free_grant(grant, cause, record.as_deref(), by)?;
        Ok(if freed.is_ok() {
            Released::Done
        } else {
            Released::NotMine
        })
    }

    fn get(&self, name: &LeaseName, by: Deadline) -> Result<Option<LeaseSnapshot>> {
        self.state().get(name, by)
    }

    fn evict(&self, name: &LeaseName, seen: &LeaseSnapshot, by: Deadline) -> Result<Released> {
        let claim = seen.claim().unwrap_or(ClaimId::from_number(0));
        let evicted = Record::text(EVICTED, &claim, "");
        let freed = self
            .state()
            .free(name, seen.claim(), seen.revision(), Some(&evicted), by)?;
        Ok(match freed {
            Err(other) if !other.record.is(EVICTED, Some(claim)) => Released::NotMine,
            _ => Released::Done,
        })
    }

    fn wait_for_change(
        &self,
        name: &LeaseName,
        seen: &LeaseSnapshot,
        by: Deadline,
        stop: &CancelToken,
    ) -> Result<()> {
        let state = self.state();
        let subscription = state.subscriptions.subscribe(name, by, stop)?;
        if stop.is_cancelled() {
            return Ok(());
        }
        match state.get(name, by.min(Deadline::after(WAITER_REQUEST_TIMEOUT)))? {
            Some(current) if current.revision() == seen.revision() => {
                subscription.wait(seen.owner(), by, stop)
            }
            _ => Ok(()),
        }
    }
}

impl EtcdStore {
    fn state(&self) -> Arc<ProcessState> {
        self.state
            .get_or_make(|| Arc::new(ProcessState::new(&self.config)))
            .clone()
    }
}
