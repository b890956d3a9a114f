//! The requests of a lease to its file.

use std::fs::File;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::file_store::{FileStore, MAX_REPLACEMENTS, Result};
use super::format::{self, Content};
use super::grant::{holder_snapshot, is_of_grant, min_token, new_grant, token_after};
use super::judgement::Verdict;
use super::locked::{Locked, LockedPath};
use super::open::Purpose;
use super::reading::Reading;
use crate::base::cancel::CancelToken;
use crate::base::error::StoreError;
use crate::base::owner::Liveness;
use crate::lease::options::MIN_TTL;
use crate::lease::store::lease_store::{
    Attempt, ClaimId, Deadline, Durability, Grant, LeaseName, LeaseSnapshot, LeaseStore, Released,
    Renewal, StoreProfile, sleep,
};
use crate::sys::event;
use crate::sys::failpoint::step;
use crate::sys::fd::AsFd;
use crate::sys::files::FileExt;
use crate::sys::fork::ForkGuarded;
use crate::sys::inotify;

/// How long a renewal tries to get the flock. A step lasts some microseconds, so a process that has
/// the flock for longer is not running. Other leases must be renewed, too.
const RENEWAL_FLOCK_TIMEOUT: Duration = Duration::from_millis(20);
/// How long an attempt to acquire tries to get the flock. Another process is in its step, so the
/// lease is truly held. The waiter must check its time limit and its cancellation.
const ACQUISITION_FLOCK_TIMEOUT: Duration = Duration::from_millis(4);
/// How often a waiter checks that the owner is alive, if it can look the owner up. Nothing wakes a
/// waiter when the owner dies.
const OWNER_CHECK_INTERVAL: Duration = Duration::from_millis(50);

impl LeaseStore for FileStore {
    fn profile(&self) -> StoreProfile {
        StoreProfile {
            smallest_ttl: MIN_TTL,
            // If a waiter cannot be woken, this store itself polls at the retry delay.
            wakes_waiters: true,
            failure_domain: match self.device.load(Ordering::Relaxed) {
                0 => None,
                device => Some(device),
            },
            ..StoreProfile::new(Durability::Local)
        }
    }

    fn try_acquire(
        &self,
        name: &LeaseName,
        claim: &ClaimId,
        ttl: Duration,
        by: Deadline,
    ) -> Result<Attempt> {
        let granted = |token| new_grant(name, claim, token, ttl);
        for _ in 0..MAX_REPLACEMENTS {
            let Some(file) = self.open()? else {
                let token = min_token();
                match self.create(self.own_record(claim, token, ttl))? {
                    true => return Ok(Attempt::Granted(granted(token))),
                    false => continue,
                }
            };
            let metadata = self.check_writable(&file, Purpose::Hold)?;
            let reading = self.read_unlocked(&file)?;
            let verdict = self.judge(&file, &reading)?;
            if let Some(snapshot) = verdict.blocks(claim) {
                self.leave_note(file, &verdict);
                return Ok(Attempt::Busy(snapshot.clone()));
            }
            let Some(locked) =
                self.flock(file, by.min(Deadline::after(ACQUISITION_FLOCK_TIMEOUT)))?
            else {
                // Another writer is in its step.
                return Ok(Attempt::Busy(match verdict {
                    Verdict::Held(snapshot, _) => snapshot,
                    Verdict::Free(_) => LeaseSnapshot::new(0),
                }));
            };
            if !self.is_path_of(&metadata)? {
                continue;
            }
            let now = locked.read_unless(&reading)?;
            let (reading, verdict) = match &now {
                Some(now) => (now, self.judge(&locked.file, now)?),
                None => (&reading, verdict),
            };
            if let Some(snapshot) = verdict.blocks(claim) {
                return Ok(Attempt::Busy(snapshot.clone()));
            }
            return self
                .take(&locked, &reading.bytes, verdict, claim, ttl, granted)
                .map(Attempt::Granted);
        }
        Err(self.replaced_error())
    }

    fn renew(&self, grant: &Grant, by: Deadline) -> Result<Renewal> {
        let extended = Renewal::Extended { ttl: grant.ttl() };
        for _ in 0..MAX_REPLACEMENTS {
            let locked =
                match self.lock_unchecked(by.min(Deadline::after(RENEWAL_FLOCK_TIMEOUT)))? {
                    LockedPath::Locked(locked) => locked,
                    LockedPath::Occupied => return Err(self.locked_error()),
                    LockedPath::Absent => match self.create(self.rebuilt_record(grant))? {
                        true => return Ok(extended),
                        false => continue,
                    },
                };
            let Reading { bytes, content } = locked.read()?;
            return match content {
                Content::Ours(record) if is_of_grant(&record, grant) => {
                    locked.renew(*record, grant, &bytes).map(|()| extended)
                }
                _ if !self.may_write(&locked)? => continue,
                Content::Ours(record) if record.is_held() => {
                    Ok(Renewal::Lost { by: record.owner() })
                }
                Content::Ours(_) | Content::Newer => Ok(Renewal::Lost { by: None }),
                Content::Damaged => locked
                    .write(&mut self.rebuilt_record(grant), &bytes)
                    .map(|()| extended),
                Content::Foreign => Err(self.foreign_error(&bytes)),
            };
        }
        Err(self.replaced_error())
    }

    fn release(&self, grant: &Grant, by: Deadline) -> Result<Released> {
        // After a deletion or damage, another holder would have written its own record.
        self.free_if(by, true, Released::Done, |content, _| match content {
            Content::Ours(record) if is_of_grant(record, grant) => {
                let mut record = (**record).clone();
                record.set_free();
                Some(record)
            }
            Content::Damaged => {
                let mut record = self.rebuilt_record(grant);
                record.set_free();
                Some(record)
            }
            _ => None,
        })
    }

    fn abandon(&self, grant: &Grant, by: Deadline) -> Result<Released> {
        self.free_if(by, false, Released::NotMine, |content, _| match content {
            Content::Ours(record) if is_of_grant(record, grant) => {
                let mut record = (**record).clone();
                record.set_lost();
                if let Some(recovered) = grant.recovered() {
                    record.set_owner(recovered.owner());
                }
                Some(record)
            }
            _ => None,
        })
    }

    fn get(&self, _: &LeaseName, _: Deadline) -> Result<Option<LeaseSnapshot>> {
        self.read_snapshot()
    }

    fn evict(&self, _: &LeaseName, snapshot: &LeaseSnapshot, by: Deadline) -> Result<Released> {
        self.free_if(
            by,
            false,
            Released::NotMine,
            |content, bytes| match content {
                Content::Ours(record)
                    if record.is_held() && snapshot.is_same_holder(&holder_snapshot(record)) =>
                {
                    let mut record = (**record).clone();
                    record.set_free();
                    Some(record)
                }
                // The token of an unreadable record is unknown.
                Content::Damaged
                    if snapshot.is_same_holder(&LeaseSnapshot::new(format::fingerprint(bytes))) =>
                {
                    let mut record =
                        self.own_record(&ClaimId::from_number(0), min_token(), Duration::ZERO);
                    record.set_free();
                    Some(record)
                }
                _ => None,
            },
        )
    }

    fn wait_for_change(
        &self,
        _: &LeaseName,
        snapshot: &LeaseSnapshot,
        by: Deadline,
        stop: &CancelToken,
    ) -> Result<()> {
        // Subscribes before it reads, so that it misses no change in between.
        let watch = inotify::changes_of(&self.spec.path).ok();
        let Some(file) = self.open_for_reading()? else {
            return Ok(());
        };
        let Reading { bytes, content } = self.read(&file)?;
        drop(file);
        let check_interval = match content {
            Content::Ours(record) if record.fingerprint() == snapshot.revision() => {
                match record
                    .owner()
                    .is_some_and(|owner| owner.liveness() == Liveness::Alive)
                {
                    true => OWNER_CHECK_INTERVAL,
                    // inotify(7) does not report the changes of another host.
                    false => record.heartbeat().clamp(
                        self.spec.retry_delay.min(OWNER_CHECK_INTERVAL),
                        OWNER_CHECK_INTERVAL * 20,
                    ),
                }
            }
            Content::Damaged if format::fingerprint(&bytes) == snapshot.revision() => {
                OWNER_CHECK_INTERVAL
            }
            _ => return Ok(()),
        };
        match watch {
            Some(watch) => {
                let event = stop.event().map_err(StoreError::not_applied)?;
                let until = by.min(Deadline::after(check_interval));
                event::wait(
                    Some(watch.as_fd()),
                    Some(event.as_fd()),
                    Some(until.moment()),
                )
                .map(drop)
                .map_err(|error| self.io_error("wait for", error))
            }
            None => sleep(
                by.min(Deadline::after(check_interval.min(self.spec.retry_delay))),
                stop,
            ),
        }
    }
}

impl FileStore {
    /// Writes the claim into the locked file, which contains `old` and may be taken. `granted`
    /// makes the grant of a token.
    fn take(
        &self,
        locked: &Locked<'_>,
        old: &[u8],
        verdict: Verdict<'_>,
        claim: &ClaimId,
        ttl: Duration,
        granted: impl Fn(u64) -> Grant,
    ) -> Result<Grant> {
        let before = match verdict {
            Verdict::Held(_, Some(record)) if record.claim() == *claim => {
                // An earlier request of this claim has taken effect.
                let grant = granted(record.token());
                locked.renew(record.clone(), &grant, old)?;
                return Ok(grant);
            }
            Verdict::Held(_, before) => before,
            Verdict::Free(before) => Some(before),
        };
        let token = token_after(before);
        locked.write(&mut self.own_record(claim, token, ttl), old)?;
        let grant = granted(token);
        Ok(match before {
            Some(before) if !before.is_held() && !before.is_lost() => grant,
            before => grant.recovered_from(before.and_then(|before| before.owner())),
        })
    }

    /// Writes a note into a held record of when this process first saw its heartbeat number, for
    /// later processes. A process writes one note. After that it uses its own observation, so
    /// waiters do not wake each other with notes.
    fn leave_note(&self, file: ForkGuarded<File>, of: &Verdict<'_>) {
        let (Verdict::Held(_, Some(record)), Some(clock)) = (of, self.spec.clock_id) else {
            return;
        };
        let is_noted = record.first_seen(clock).is_some();
        if is_noted
            || !self
                .observer
                .try_lock()
                .is_none_or(|mut observer| observer.must_leave_note())
        {
            return;
        }
        let write = |file: &File| {
            let (at, note) = record.note(clock, self.spec.clock.now());
            // A lost note costs time only.
            let _ = file.write_all_at(&note, at);
            step("note written");
        };
        if !self.is_remote.load(Ordering::Relaxed) {
            return write(&file);
        }
        // Without a lock on the file, an NFS client may write its whole cached page back, which
        // contains an old heartbeat number.
        if let Ok(Some(locked)) = self.flock(file, Deadline::after(Duration::ZERO)) {
            let is_same = |now: Reading| matches!(now.content, Content::Ours(now) if now.fingerprint() == record.fingerprint());
            if locked.read().is_ok_and(is_same) {
                write(&locked.file);
            }
        }
    }
}
