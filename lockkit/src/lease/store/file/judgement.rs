//! Judging what a file says: whether the lease is free, held, or may be taken.

use std::fs::File;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::file_store::{FileStore, Result};
use super::format::{self, Content, Record};
use super::grant::{holder_snapshot, min_token};
use super::reading::Reading;
use super::staleness::Observer;
use crate::base::owner::Liveness;
use crate::lease::options::MAX_TTL;
use crate::lease::store::lease_store::{ClaimId, LeaseSnapshot};
use crate::sys::files::{self, MetadataExt};
use crate::sys::fnv;

/// How far the clock of a file server may differ from this machine's clock.
pub(super) const MAX_CLOCK_DIFFERENCE: Duration = Duration::from_secs(3600);
/// A token so far ahead of the microseconds since the epoch belongs to no grant: 285 years, more
/// than any clock is set back.
const MAX_TOKEN_LEAD: u64 = 1 << 53;

/// The state of a lease, as a reading shows it.
pub(super) enum Verdict<'r> {
    /// The record says that the lease is free.
    Free(&'r Record),
    /// The lease is held, or the file is blank or damaged (then there is no record). When
    /// [`LeaseSnapshot::expires_in`] is zero, any process may take the lease.
    Held(LeaseSnapshot, Option<&'r Record>),
}

impl Verdict<'_> {
    /// Returns the holder if it keeps this claim from taking the lease.
    pub(super) fn blocks(&self, claim: &ClaimId) -> Option<&LeaseSnapshot> {
        match self {
            Self::Held(snapshot, _)
                if snapshot.expires_in() != Some(Duration::ZERO)
                    && snapshot.claim() != Some(*claim) =>
            {
                Some(snapshot)
            }
            _ => None,
        }
    }
}

/// Returns what identifies one damage of one file. Equal content is not enough: a file can be
/// blank, become a record, and be blank again.
fn damage_key(fingerprint: u64, metadata: &files::Metadata) -> u64 {
    let modified = metadata
        .modified()
        .ok()
        .and_then(|modified| modified.duration_since(UNIX_EPOCH).ok());
    [
        metadata.ino(),
        modified.map_or(0, |since| since.as_nanos() as u64),
    ]
    .into_iter()
    .fold(fingerprint, fnv::add)
}

impl FileStore {
    /// Judges a reading. An attempt, a waiter and `status` all use this. A lease is never taken
    /// because a fact is unknown:
    /// - The record says that the lease is free, or lost by its owner: any process may take it.
    /// - Held, and the owner is dead by its identity: any process may take it at once.
    /// - Held by an owner that may be alive: a process may take it after it has seen the same
    ///   heartbeat number for the ttl of the record on its own clock, or if a note shows that
    ///   another process with the same clock has.
    /// - Blank or damaged: a process may take it after it has seen the file unchanged for
    ///   [`FileSpec::damage_timeout`](super::FileSpec::damage_timeout) on its own clock, or if the
    ///   file's times show that.
    /// - A later version, a file that is not a lease, or a token that is far ahead of the time: an
    ///   error.
    pub(super) fn judge<'r>(&self, file: &File, reading: &'r Reading) -> Result<Verdict<'r>> {
        match &reading.content {
            Content::Ours(record)
                if record.token().saturating_sub(MAX_TOKEN_LEAD) > min_token() =>
            {
                Err(self.forged_error())
            }
            Content::Ours(record) if !record.is_held() => Ok(Verdict::Free(record)),
            Content::Ours(record) => {
                let first_seen = self
                    .spec
                    .clock_id
                    .and_then(|clock| record.first_seen(clock));
                let age = self.observe(record.fingerprint(), first_seen);
                Ok(Verdict::Held(self.snapshot(record, age), Some(record)))
            }
            Content::Damaged => {
                let fingerprint = format::fingerprint(&reading.bytes);
                let metadata =
                    files::metadata_of(file).map_err(|error| self.io_error("inspect", error))?;
                let seen_for = self.observe(damage_key(fingerprint, &metadata), None);
                let age = seen_for.max(self.unchanged_for(&metadata));
                Ok(Verdict::Held(
                    LeaseSnapshot::new(fingerprint)
                        .with_expires_in(self.spec.damage_timeout.saturating_sub(age)),
                    None,
                ))
            }
            Content::Newer => Err(self.newer_error()),
            Content::Foreign => Err(self.foreign_error(&reading.bytes)),
        }
    }

    /// Returns at least how long the file has been unchanged, by its modification time. Zero if the
    /// time is in the future or unknown.
    #[cold]
    pub(super) fn unchanged_for(&self, metadata: &files::Metadata) -> Duration {
        let age = metadata
            .modified()
            .ok()
            .and_then(|modified| SystemTime::now().duration_since(modified).ok());
        let margin = match self.is_remote.load(Ordering::Relaxed) {
            true => MAX_CLOCK_DIFFERENCE,
            false => Duration::ZERO,
        };
        age.unwrap_or_default().saturating_sub(margin)
    }

    /// Returns how long the content with this fingerprint has been seen unchanged.
    fn observe(&self, fingerprint: u64, first_seen: Option<Duration>) -> Duration {
        let now = self.spec.clock.now();
        match self.observer.try_lock() {
            Some(mut observer) => observer.unchanged_for(fingerprint, now, first_seen),
            None => Observer::default().unchanged_for(fingerprint, now, first_seen),
        }
    }

    /// Returns the snapshot of a held record that has been unchanged for this long.
    fn snapshot(&self, record: &Record, unchanged_for: Duration) -> LeaseSnapshot {
        let snapshot = holder_snapshot(record);
        let owner = record.owner();
        let is_dead = owner
            .as_ref()
            .is_some_and(|owner| owner.liveness() == Liveness::Dead);
        // A longer ttl is forged, because no lease can have it. Such a record counts as held as
        // long as a damaged one.
        let ttl = if record.ttl() > MAX_TTL {
            self.spec.damage_timeout
        } else {
            record.ttl()
        };
        let left = if is_dead {
            Duration::ZERO
        } else {
            ttl.saturating_sub(unchanged_for)
        };
        let snapshot = snapshot.with_expires_in(left);
        match owner {
            Some(owner) => snapshot.with_owner(owner),
            None => snapshot,
        }
    }

    /// Returns the snapshot of the lease, read without a lock; `None` if it is free.
    pub(super) fn read_snapshot(&self) -> Result<Option<LeaseSnapshot>> {
        let Some(file) = self.open_for_reading()? else {
            return Ok(None);
        };
        Ok(match self.judge(&file, &self.read_unlocked(&file)?)? {
            Verdict::Held(snapshot, _) => Some(snapshot),
            Verdict::Free(_) => None,
        })
    }
}
