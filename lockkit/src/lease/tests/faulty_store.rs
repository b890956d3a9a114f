//! A store that fails in the ways that a test wants.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use super::fixtures::MS;
use crate::lease::{
    Attempt, ClaimId, Clock, Deadline, Durability, Grant, Lease, LeaseBuilder, LeaseName,
    LeaseSnapshot, LeaseStore, ManualClock, Released, Renewal, StoreError, StoreProfile,
};

/// A store in memory with a clock of its own, which fails as these fields say.
pub(super) struct FaultyStore {
    pub(super) clock: ManualClock,
    pub(super) record: parking_lot::Mutex<(u64, Option<(ClaimId, Duration)>)>,
    pub(super) fails: AtomicBool,
    pub(super) panics: AtomicBool,
    /// The next grant is made, but its answer is lost.
    pub(super) loses_answer: AtomicBool,
    /// The next grant follows an owner that died, and the answer comes a ttl late.
    pub(super) answers_late: AtomicBool,
    /// Attempts and renewals take as long as their deadline allows, and get no answer.
    pub(super) hangs: AtomicBool,
    /// While this is set, renewals and releases do not return, whatever their deadline.
    pub(super) freezes: AtomicBool,
    pub(super) renewals: AtomicUsize,
    /// The claim of the last attempt.
    pub(super) last: parking_lot::Mutex<Option<ClaimId>>,
    /// The last grant was abandoned, and an owner had died before.
    pub(super) has_recovery: AtomicBool,
}

impl FaultyStore {
    pub(super) fn new(clock: &ManualClock) -> Arc<Self> {
        Arc::new(Self {
            clock: clock.clone(),
            record: Default::default(),
            fails: Default::default(),
            panics: Default::default(),
            loses_answer: Default::default(),
            answers_late: Default::default(),
            hangs: Default::default(),
            freezes: Default::default(),
            renewals: Default::default(),
            last: Default::default(),
            has_recovery: Default::default(),
        })
    }

    pub(super) fn lease(self: &Arc<Self>) -> LeaseBuilder {
        Lease::with_store(self.clone(), "faulty")
            .clock(Arc::new(self.clock.clone()))
            .acquire_retry_delay(MS)
    }
}

impl FaultyStore {
    /// Does not return while `freezes` is set.
    fn block_while_frozen(&self) {
        while self.freezes.load(Ordering::Relaxed) {
            thread::sleep(MS);
        }
    }
}

impl LeaseStore for FaultyStore {
    fn profile(&self) -> StoreProfile {
        StoreProfile::new(Durability::Memory)
    }

    fn try_acquire(
        &self,
        name: &LeaseName,
        claim: &ClaimId,
        ttl: Duration,
        by: Deadline,
    ) -> Result<Attempt, StoreError> {
        *self.last.lock() = Some(*claim);
        if self.hangs.load(Ordering::Relaxed) {
            thread::sleep(by.remaining());
            return Err(StoreError::unknown("no answer"));
        }
        if self.fails.load(Ordering::Relaxed) {
            return Err(StoreError::not_applied("test failure"));
        }
        let (token, holder) = &mut *self.record.lock();
        let now = self.clock.now();
        match holder {
            Some((held, until)) if held != claim && *until > now => {
                return Ok(Attempt::Busy(
                    LeaseSnapshot::new(*token).with_expires_in(*until - now),
                ));
            }
            Some((held, _)) if held == claim => {}
            _ => *token += 1,
        }
        *holder = Some((*claim, now + ttl));
        let grant = Grant::new(name, claim, *token, ttl);
        let grant = if self.has_recovery.swap(false, Ordering::Relaxed) {
            grant.recovered_from(None)
        } else {
            grant
        };
        if self.answers_late.swap(false, Ordering::Relaxed) {
            self.clock.advance(ttl);
            return Ok(Attempt::Granted(grant.recovered_from(None)));
        }
        match self.loses_answer.swap(false, Ordering::Relaxed) {
            true => Err(StoreError::unknown("no answer")),
            false => Ok(Attempt::Granted(grant)),
        }
    }

    fn renew(&self, grant: &Grant, by: Deadline) -> Result<Renewal, StoreError> {
        self.renewals.fetch_add(1, Ordering::Relaxed);
        self.block_while_frozen();
        if self.hangs.load(Ordering::Relaxed) {
            thread::sleep(by.remaining());
            return Err(StoreError::unknown("no answer"));
        }
        if self.panics.swap(false, Ordering::Relaxed) {
            std::panic::resume_unwind(Box::new(()));
        }
        if self.fails.load(Ordering::Relaxed) {
            return Err(StoreError::not_applied("test failure"));
        }
        match &mut self.record.lock().1 {
            Some((claim, until)) if claim == grant.claim() => {
                *until = self.clock.now() + grant.ttl();
                Ok(Renewal::Extended { ttl: grant.ttl() })
            }
            _ => Ok(Renewal::Lost { by: None }),
        }
    }

    fn release(&self, grant: &Grant, _: Deadline) -> Result<Released, StoreError> {
        self.block_while_frozen();
        let holder = &mut self.record.lock().1;
        match holder.take_if(|(claim, _)| claim == grant.claim()) {
            Some(_) => Ok(Released::Done),
            None => Ok(Released::NotMine),
        }
    }

    fn abandon(&self, grant: &Grant, by: Deadline) -> Result<Released, StoreError> {
        self.has_recovery
            .store(grant.recovered().is_some(), Ordering::Relaxed);
        self.release(grant, by)
    }

    fn get(&self, _: &LeaseName, _: Deadline) -> Result<Option<LeaseSnapshot>, StoreError> {
        let (token, holder) = &*self.record.lock();
        Ok(holder.map(|(claim, _)| {
            LeaseSnapshot::new(*token)
                .with_claim(claim)
                .with_token(*token)
        }))
    }

    fn evict(
        &self,
        _: &LeaseName,
        snapshot: &LeaseSnapshot,
        _: Deadline,
    ) -> Result<Released, StoreError> {
        match self
            .record
            .lock()
            .1
            .take_if(|(claim, _)| Some(*claim) == snapshot.claim())
        {
            Some(_) => Ok(Released::Done),
            None => Ok(Released::NotMine),
        }
    }
}
