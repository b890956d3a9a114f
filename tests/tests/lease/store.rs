//! A store of the test, which fails and blocks on request.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use lockkit::lease::{
    Attempt, ClaimId, Deadline, Durability, Grant, LeaseName, LeaseSnapshot, LeaseStore, Released,
    Renewal, StoreError, StoreProfile,
};
use lockkit::{CancelToken, ErrorKind, Lease, LeaseStatus, Wait};
use lockkit_tests::until;

use crate::fixture::temp_lease;

/// A store in memory that fails, and blocks renewals, on request.
#[derive(Default)]
pub(crate) struct MemoryStore {
    /// The last token, and the claim of the holder.
    record: Mutex<(u64, Option<ClaimId>)>,
    /// Whether every request fails as on a bad disk.
    is_broken: AtomicBool,
    attempts: AtomicUsize,
    /// Whether renewals block.
    is_blocked: Mutex<bool>,
    unblocked: Condvar,
    /// The steps of requests so far, in order.
    log: Mutex<Vec<&'static str>>,
}

impl MemoryStore {
    fn log_step(&self, step: &'static str) {
        self.log.lock().unwrap().push(step);
    }

    fn has_logged(&self, what: &str) -> bool {
        self.log.lock().unwrap().contains(&what)
    }

    fn block_renewals(&self, is_blocked: bool) {
        *self.is_blocked.lock().unwrap() = is_blocked;
        self.unblocked.notify_all();
    }

    fn works(&self) -> Result<(), StoreError> {
        match self.is_broken.load(Ordering::Relaxed) {
            true => Err(StoreError::unknown(std::io::Error::other("the disk fails"))),
            false => Ok(()),
        }
    }
}

impl LeaseStore for MemoryStore {
    fn profile(&self) -> StoreProfile {
        StoreProfile::new(Durability::Memory)
    }

    fn try_acquire(
        &self,
        name: &LeaseName,
        claim: &ClaimId,
        ttl: Duration,
        _: Deadline,
    ) -> Result<Attempt, StoreError> {
        self.attempts.fetch_add(1, Ordering::Relaxed);
        self.works()?;
        let (token, holder) = &mut *self.record.lock().unwrap();
        if holder.is_some_and(|holder| holder != *claim) {
            return Ok(Attempt::Busy(LeaseSnapshot::new(*token)));
        }
        *token += u64::from(holder.replace(*claim).is_none());
        Ok(Attempt::Granted(Grant::new(name, claim, *token, ttl)))
    }

    fn renew(&self, grant: &Grant, _: Deadline) -> Result<Renewal, StoreError> {
        self.log_step("renewal requested");
        let is_blocked = self.is_blocked.lock().unwrap();
        drop(
            self.unblocked
                .wait_while(is_blocked, |is_blocked| *is_blocked)
                .unwrap(),
        );
        self.works()?;
        self.log_step("renewed");
        // This is how a careless store behaves: a renewal restores a released claim.
        self.record.lock().unwrap().1 = Some(*grant.claim());
        Ok(Renewal::Extended { ttl: grant.ttl() })
    }

    fn release(&self, grant: &Grant, _: Deadline) -> Result<Released, StoreError> {
        self.works()?;
        self.log_step("released");
        match self
            .record
            .lock()
            .unwrap()
            .1
            .take_if(|claim| claim == grant.claim())
        {
            Some(_) => Ok(Released::Done),
            None => Ok(Released::NotMine),
        }
    }

    fn get(&self, _: &LeaseName, _: Deadline) -> Result<Option<LeaseSnapshot>, StoreError> {
        self.works()?;
        let (token, holder) = &*self.record.lock().unwrap();
        Ok(holder.map(|claim| {
            LeaseSnapshot::new(*token)
                .with_claim(claim)
                .with_token(*token)
        }))
    }

    fn evict(&self, _: &LeaseName, _: &LeaseSnapshot, _: Deadline) -> Result<Released, StoreError> {
        Err(StoreError::permanent("this store evicts no holder"))
    }
}

#[test]
fn drop_during_renewal_releases_after_it() {
    for unblocks_first in [true, false] {
        let store = Arc::new(MemoryStore::default());
        let lease = Lease::with_store(store.clone(), "key")
            .heartbeat(Duration::from_millis(20))
            .build()
            .unwrap();
        let guard = lease.lock().unwrap();
        store.block_renewals(true);
        store.log.lock().unwrap().clear();
        until("the store receives a renewal", || {
            store.has_logged("renewal requested")
        });
        if unblocks_first {
            let dropper = std::thread::spawn(move || drop(guard));
            store.block_renewals(false);
            dropper.join().unwrap();
        } else {
            // The drop does not wait for ever. It leaves the release to the heartbeat.
            drop(guard);
            assert!(!store.has_logged("released"));
            store.block_renewals(false);
            until("the store has released the lease", || {
                store.has_logged("released")
            });
        }
        assert_eq!(store.log.lock().unwrap().last(), Some(&"released"));
        assert_eq!(lease.status().unwrap(), LeaseStatus::Free);
        drop(lease.try_lock().unwrap());
    }
}

#[test]
fn broken_store_is_retried_and_lease_survives() {
    let store = Arc::new(MemoryStore::default());
    let builder =
        || Lease::with_store(store.clone(), "key").acquire_retry_delay(Duration::from_millis(5));
    for limit in [0, 1, 7] {
        store.is_broken.store(true, Ordering::Relaxed);
        store.attempts.store(0, Ordering::Relaxed);
        let error = builder()
            .acquire_retry_limit(limit)
            .build()
            .unwrap()
            .lock()
            .unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Store { .. }), "{error}");
        assert_eq!(store.attempts.load(Ordering::Relaxed), limit as usize + 1);
    }
    let stop = CancelToken::new();
    std::thread::scope(|scope| {
        let lease = builder().acquire_retry_limit(u32::MAX).build().unwrap();
        let wait = Wait::forever().or_cancelled(&stop);
        let waiter = scope.spawn(move || lease.acquire(&wait));
        until("the store has received many requests", || {
            store.attempts.load(Ordering::Relaxed) > 20
        });
        stop.cancel();
        assert!(waiter.join().unwrap().unwrap_err().is_cancelled());
    });
    store.is_broken.store(false, Ordering::Relaxed);
    let guard = builder()
        .ttl(Duration::from_secs(10))
        .heartbeat(Duration::from_millis(20))
        .build()
        .unwrap()
        .lock();
    let guard = guard.unwrap();
    store.is_broken.store(true, Ordering::Relaxed);
    store.log.lock().unwrap().clear();
    until("the store has received many renewals", || {
        store.log.lock().unwrap().len() > 10
    });
    assert!(guard.is_held() && !store.has_logged("renewed"));
    store.is_broken.store(false, Ordering::Relaxed);
    until("the lease is renewed", || store.has_logged("renewed"));
    guard.release().unwrap();
}

#[test]
fn c5_build_with_heartbeat_below_1_ms_refused() {
    let (_directory, terms) = temp_lease();
    let on_file = || Lease::file(&terms.path);
    let in_store = || Lease::with_store(Arc::new(MemoryStore::default()), "key");
    let clock = || Arc::new(lockkit::lease::ManualClock::new());
    for short in [0, 1, 999_999].map(Duration::from_nanos) {
        for builder in [
            on_file().heartbeat(short),
            in_store().heartbeat(short),
            on_file().clock(clock()).heartbeat(short),
            on_file().acquire_retry_delay(short),
            in_store().acquire_retry_delay(short),
        ] {
            let error = builder.build().unwrap_err();
            assert!(
                matches!(error.kind(), ErrorKind::InvalidOption { .. }),
                "{error}"
            );
            assert!(
                error.to_string().contains("1ms"),
                "the error states the minimum: {error}"
            );
        }
    }
    let shortest = Duration::from_millis(1);
    assert!(
        on_file()
            .heartbeat(shortest)
            .acquire_retry_delay(shortest)
            .build()
            .is_ok()
    );
}
