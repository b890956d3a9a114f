//! The locked file of a lease, and the writes into it.

use std::fs::File;
use std::sync::atomic::Ordering;

use super::file_store::{FileStore, MAX_REPLACEMENTS, Result};
use super::format::{Content, Record, SIZE};
use super::grant::next_heartbeat_number;
use super::open::Purpose;
use super::reading::{Reading, read_bytes};
use crate::base::error::{Error, StoreError};
use crate::base::wait::Backoff;
use crate::lease::store::lease_store::{Deadline, Grant, Released};
use crate::sys::failpoint::step;
use crate::sys::files::FileExt;
use crate::sys::flock::{self, Mode};
use crate::sys::fork::ForkGuarded;

/// What a step found at the path.
pub(super) enum LockedPath<'s> {
    /// The file, with its flock.
    Locked(Locked<'s>),
    /// Another process has the flock, and keeps it.
    Occupied,
    /// There is no file.
    Absent,
}

/// The file that the path names, while it is locked.
pub(super) struct Locked<'s> {
    pub(super) file: ForkGuarded<File>,
    store: &'s FileStore,
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // If it fails, closing the file unlocks.
        let _ = flock::unlock(&self.file);
    }
}

impl FileStore {
    /// Locks the file; `None` if another process keeps the flock until `by`.
    pub(super) fn flock(
        &self,
        file: ForkGuarded<File>,
        by: Deadline,
    ) -> Result<Option<Locked<'_>>> {
        let mut backoff = Backoff::new();
        while !flock::try_lock(&file, Mode::Exclusive)
            .map_err(|error| self.io_error("lock", error))?
        {
            if by.is_past() {
                return Ok(None);
            }
            std::thread::sleep(backoff.next().min(by.remaining()));
        }
        Ok(Some(Locked { file, store: self }))
    }

    /// Opens the file that the path names, and locks it, to hold the lease.
    pub(super) fn lock(&self, by: Deadline) -> Result<LockedPath<'_>> {
        for _ in 0..MAX_REPLACEMENTS {
            let Some(file) = self.open()? else {
                return Ok(LockedPath::Absent);
            };
            let metadata = self.check_writable(&file, Purpose::Hold)?;
            let Some(locked) = self.flock(file, by)? else {
                return Ok(LockedPath::Occupied);
            };
            if self.is_path_of(&metadata)? {
                return Ok(LockedPath::Locked(locked));
            }
        }
        Err(self.replaced_error())
    }

    /// Opens the file that the path names, and locks it, without a check. A holder that finds its
    /// own claim needs no check: the file was checked when the claim was written. The next
    /// heartbeat finds later changes of the path.
    pub(super) fn lock_unchecked(&self, by: Deadline) -> Result<LockedPath<'_>> {
        let Some(file) = self.open()? else {
            return Ok(LockedPath::Absent);
        };
        Ok(self
            .flock(file, by)?
            .map_or(LockedPath::Occupied, LockedPath::Locked))
    }

    /// Returns whether a file that was locked without a check may be written to, and the path still
    /// names it.
    #[cold]
    pub(super) fn may_write(&self, locked: &Locked<'_>) -> Result<bool> {
        self.is_path_of(&self.check_writable(&locked.file, Purpose::Hold)?)
    }

    /// Writes the record of a free lease that `freed` makes of the content, unless `freed` returns
    /// `None`. Returns `absent` if there is no file. `is_own`: this process holds the lease.
    pub(super) fn free_if(
        &self,
        by: Deadline,
        is_own: bool,
        absent: Released,
        freed: impl Fn(&Content, &[u8]) -> Option<Record>,
    ) -> Result<Released> {
        let freed = |reading: &Reading| match &reading.content {
            Content::Foreign => Err(self.foreign_error(&reading.bytes)),
            content => Ok(freed(content, &reading.bytes)),
        };
        for _ in 0..MAX_REPLACEMENTS {
            let Some(file) = self.open()? else {
                return Ok(absent);
            };
            let metadata = self.check_writable(&file, Purpose::Free)?;
            // The flock on another holder's file would delay its renewal. The file of a holder that
            // has not expired is its own, except after an eviction.
            if !is_own && freed(&self.read_unlocked(&file)?)?.is_none() {
                return Ok(Released::NotMine);
            }
            let Some(locked) = self.flock(file, by)? else {
                return Err(self.locked_error());
            };
            if !self.is_path_of(&metadata)? {
                continue;
            }
            let reading = locked.read()?;
            return match freed(&reading)? {
                Some(mut record) => locked
                    .write(&mut record, &reading.bytes)
                    .map(|()| Released::Done),
                None => Ok(Released::NotMine),
            };
        }
        Err(self.replaced_error())
    }
}

impl Locked<'_> {
    pub(super) fn read(&self) -> Result<Reading> {
        self.store.read(&self.file)
    }

    /// Reads the locked file; `None` if it contains the same record as `before`. A record is never
    /// repeated, so it has not changed in between.
    pub(super) fn read_unless(&self, before: &Reading) -> Result<Option<Reading>> {
        let bytes = read_bytes(&self.file).map_err(|error| self.store.io_error("read", error))?;
        let is_same = matches!(before.content, Content::Ours(_)) && bytes == before.bytes;
        Ok((!is_same).then(|| Reading::of(bytes)))
    }

    /// Replaces the content of the file, freed begins with `old`, by one write within one page. If
    /// the write fails, `old` is put back.
    pub(super) fn write(&self, record: &mut Record, old: &[u8]) -> Result<()> {
        let mut written = self.file.write_all_at(record.seal(), 0);
        step(if record.is_held() {
            "record written"
        } else {
            "record freed"
        });
        if written.is_ok() && self.store.is_remote.load(Ordering::Relaxed) {
            // Without a sync the record may be in this machine's memory only, and count here though
            // no other machine sees it.
            written = self.file.sync_data();
        }
        written.map_err(|error| {
            let _ = self.file.write_all_at(&old[..old.len().min(SIZE)], 0);
            step("old record put back");
            StoreError::unknown(Error::io("write", &self.store.spec.path, error))
        })
    }

    /// Writes the next heartbeat number of `grant` into its record, freed the file contains as
    /// `old`.
    pub(super) fn renew(&self, mut record: Record, grant: &Grant, old: &[u8]) -> Result<()> {
        record.set_heartbeat_number(next_heartbeat_number(grant, record.heartbeat_number()));
        self.write(&mut record, old)
    }
}
