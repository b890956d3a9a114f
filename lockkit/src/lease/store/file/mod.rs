//! The store that is built in: a file for each lease.
//!
//! A reader opens the file, checks that it is a plain file, and reads the record. It takes no lock, so a stopped or
//! killed reader has no effect on other processes. The checksum shows whether the record is complete. If not, a write
//! is in progress, and the reader reads again.
//!
//! A writer starts as a reader. If the record lets it write, the writer takes the file's flock and checks that the path
//! still names the file. Then the writer reads the record again, decides again, writes the record in place, unlocks the
//! file and closes it. A heartbeat that finds its own claim does not check the path. The flock makes each step atomic
//! for all processes. A process that is killed in a step has changed everything or nothing. No process waits in
//! flock(2), because the process that has the flock may be stopped: a step tries again until its deadline, and a waiter
//! then counts the lease as held.
//!
//! [`FileStore::judge`] decides whether a process may take a record that says that the lease is held. The token of a
//! new grant:
//! - It is above the previous token, and at least the microseconds since the epoch. Without a readable record it is
//!   exactly those microseconds. So no token is far ahead of the time. A deletion, a restored backup or a power cut
//!   takes the record back, but not the tokens. The only condition is that the wall clock is not set back at the same
//!   time.
//!
//! What a holder does if its record differs from what it wrote:
//! - Another claim, or none: the lease was taken over or evicted, and is lost.
//! - Deleted, blank or damaged, and without another claim: the holder writes the record again. It has the flock and the
//!   path names that file, so no other process can take the lease at that moment. Until its deadline the lease is its
//!   own. After a deletion the first process to create the file has the lease.
//! - The file of another program: the holder never writes to it. It keeps the lease until its deadline, in case the
//!   record is restored, and then has lost the lease.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind as Io};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;

use crate::lease::builder::{LONGEST_TTL, SMALLEST_TTL};
use crate::lease::clock::Clock;

pub(in crate::lease) mod format;
mod staleness;

use self::format::{Content, Record, SIZE};
use self::staleness::Observer;
use crate::base::cancel::CancelToken;
use crate::base::error::{Error, ErrorKind, StoreError};
use crate::base::owner::{Liveness, Owner};
use crate::base::runtime_dir;
use crate::base::wait::Backoff;
use crate::lease::store::lease_store::{
    Attempt, ClaimId, Deadline, Durability, Grant, LeaseName, LeaseSnapshot, LeaseStore, Released, Renewal,
    StoreProfile, sleep,
};
use crate::sys::event;
use crate::sys::failpoint::step;
use crate::sys::fd::AsFd;
use crate::sys::files::{self, DirBuilderExt, FileExt, Metadata as Found, MetadataExt, OpenOptionsExt};
use crate::sys::flock::{self, Mode};
use crate::sys::fork::ForkGuarded;
use crate::sys::{inotify, tmpfile};

type Result<T, E = StoreError> = std::result::Result<T, E>;

/// How long a renewal tries to get the flock. A step lasts some microseconds, so a process that has the flock for
/// longer is not running. Other leases must be renewed, too.
const OCCUPIED: Duration = Duration::from_millis(20);
/// How long an attempt to acquire tries to get the flock. Another process is in its step, so the lease is truly held.
/// The waiter must check its time limit and its cancellation.
const TAKEN: Duration = Duration::from_millis(4);
/// How long the creator of a file tries to get the flock. Other processes only look into such a new file, but such a
/// process may be interrupted.
const LOOKED_AT: Duration = Duration::from_millis(500);
/// How often in a row the file may be replaced during a step.
const MOST_REPLACEMENTS: u32 = 100;
/// How often a waiter checks that the owner is alive, if it can look the owner up. Nothing wakes a waiter when the
/// owner dies.
const LOOK: Duration = Duration::from_millis(50);
/// How often a reader without the flock reads again if a write is in progress.
const MOST_READS: u32 = 8;
/// How far the clock of a file server may differ from this machine's clock.
const CLOCKS_APART: Duration = Duration::from_secs(3600);
/// A token so far ahead of the microseconds since the epoch belongs to no grant: 285 years, more than any clock is set
/// back.
const FARTHEST_AHEAD: u64 = 1 << 53;
/// The default modes of new files and directories.
const FILE_MODE: u32 = 0o600;
const DIRECTORY_MODE: u32 = 0o700;

pub(in crate::lease) struct FileStore {
    pub(in crate::lease) path: PathBuf,
    pub(in crate::lease) heartbeat: Duration,
    /// How long a blank or damaged record counts as held.
    pub(in crate::lease) unreadable: Duration,
    pub(in crate::lease) retry_delay: Duration,
    /// The exact mode of a new file; `None` is [`FILE_MODE`], less the umask. A mode that lets others write shares the
    /// lease between users.
    pub(in crate::lease) file_mode: Option<u32>,
    /// The exact mode of a new directory; `None` is [`DIRECTORY_MODE`], less the umask.
    pub(in crate::lease) directory_mode: Option<u32>,
    /// Whether missing directories are created.
    pub(in crate::lease) create_parents: bool,
    pub(in crate::lease) clock: Arc<dyn Clock>,
    /// The shared id of the clock, kept here because asking the clock takes system calls.
    pub(in crate::lease) clock_id: Option<u128>,
    /// The number of the file system of the file; 0 until the file has been opened. A file system is a failure domain.
    pub(in crate::lease) device: AtomicU64,
    /// Whether a write must be synced to reach the other users of the file.
    pub(in crate::lease) is_remote: AtomicBool,
    /// What this process has seen of the record. A thread that does not get the mutex at once goes without it. So a
    /// fork that left the mutex locked in the child does no harm: the notes in the record do the same work.
    pub(in crate::lease) observer: Mutex<Observer>,
}

/// The purpose of an open.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Aim {
    /// To hold the lease. The file must not belong to another user, because that user could take it back at any time.
    Hold,
    /// To free the lease, which root may do for any user.
    Free,
}

/// What a step found at the path.
enum LockedPath<'s> {
    /// The file, with its flock.
    Locked(Locked<'s>),
    /// Another process has the flock, and keeps it.
    Occupied,
    /// There is no file.
    Absent,
}

/// The file that the path names, while it is locked.
struct Locked<'s> {
    file: ForkGuarded<File>,
    store: &'s FileStore,
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // If it fails, closing the file unlocks.
        let _ = flock::unlock(&self.file);
    }
}

/// The content of a file at one moment.
struct Reading {
    /// The first bytes of the file, at most one more than a record has.
    bytes: Vec<u8>,
    content: Content,
}

impl Reading {
    fn of(bytes: Vec<u8>) -> Self {
        Self { content: format::parse(&bytes), bytes }
    }
}

/// The state of a lease, as a reading shows it.
enum Verdict<'r> {
    /// The record says that the lease is free.
    Free(&'r Record),
    /// The lease is held, or the file is blank or damaged (then there is no record). When [`LeaseSnapshot::expires_in`]
    /// is zero, any process may take the lease.
    Held(LeaseSnapshot, Option<&'r Record>),
}

impl Verdict<'_> {
    /// Returns the holder if it keeps this claim from taking the lease.
    fn blocks(&self, claim: &ClaimId) -> Option<&LeaseSnapshot> {
        match self {
            Self::Held(seen, _) if seen.expires_in() != Some(Duration::ZERO) && seen.claim() != Some(*claim) => {
                Some(seen)
            }
            _ => None,
        }
    }
}

/// The beat numbers of a grant. No number is repeated, because an observer that saw it before would continue to count
/// from then.
#[derive(Default)]
struct Beats(AtomicU64);

impl Beats {
    fn next(&self, written: u64) -> u64 {
        // The next beat differs from a forged beat that is the largest number, too.
        let next = self.0.load(Ordering::Relaxed).max(written).wrapping_add(1);
        self.0.store(next, Ordering::Relaxed);
        next
    }
}

impl LeaseStore for FileStore {
    fn profile(&self) -> StoreProfile {
        StoreProfile {
            smallest_ttl: SMALLEST_TTL,
            // If a waiter cannot be woken, this store itself polls at the retry delay.
            wakes_waiters: true,
            failure_domain: match self.device.load(Ordering::Relaxed) {
                0 => None,
                device => Some(device),
            },
            ..StoreProfile::new(Durability::Local)
        }
    }

    fn try_acquire(&self, name: &LeaseName, claim: &ClaimId, ttl: Duration, by: Deadline) -> Result<Attempt> {
        let granted = |token| Grant::new(name, claim, token, ttl).with_handle(Beats::default());
        for _ in 0..MOST_REPLACEMENTS {
            let Some(file) = self.open()? else {
                let token = seed();
                match self.create(self.own_record(claim, token, ttl))? {
                    true => return Ok(Attempt::Granted(granted(token))),
                    false => continue,
                }
            };
            let found = self.vet(&file, Aim::Hold)?;
            let reading = self.read_unlocked(&file)?;
            let verdict = self.judge(&file, &reading)?;
            if let Some(seen) = verdict.blocks(claim) {
                self.leave_note(file, &verdict);
                return Ok(Attempt::Busy(seen.clone()));
            }
            let Some(locked) = self.flock(file, by.min(Deadline::after(TAKEN)))? else {
                // Another writer is in its step.
                return Ok(Attempt::Busy(match verdict {
                    Verdict::Held(seen, _) => seen,
                    Verdict::Free(_) => LeaseSnapshot::new(0),
                }));
            };
            if !self.names(&found)? {
                continue;
            }
            let now = locked.read_unless(&reading)?;
            let (reading, verdict) = match &now {
                Some(now) => (now, self.judge(&locked.file, now)?),
                None => (&reading, verdict),
            };
            if let Some(seen) = verdict.blocks(claim) {
                return Ok(Attempt::Busy(seen.clone()));
            }
            let before = match verdict {
                Verdict::Held(_, Some(record)) if record.claim() == *claim => {
                    // An earlier request of this claim has taken effect.
                    let grant = granted(record.token());
                    locked.beat(record.clone(), &grant, &reading.bytes)?;
                    return Ok(Attempt::Granted(grant));
                }
                Verdict::Held(_, before) => before,
                Verdict::Free(before) => Some(before),
            };
            let token = token_after(before);
            locked.write(&mut self.own_record(claim, token, ttl), &reading.bytes)?;
            let grant = granted(token);
            return Ok(Attempt::Granted(match before {
                Some(before) if !before.is_held() && !before.is_lost() => grant,
                before => grant.recovered_from(before.and_then(|before| before.owner())),
            }));
        }
        Err(self.replaced())
    }

    fn renew(&self, grant: &Grant, by: Deadline) -> Result<Renewal> {
        let extended = Renewal::Extended { ttl: grant.ttl() };
        for _ in 0..MOST_REPLACEMENTS {
            let locked = match self.lock_as_it_is(by.min(Deadline::after(OCCUPIED)))? {
                LockedPath::Locked(locked) => locked,
                LockedPath::Occupied => return Err(self.occupied()),
                LockedPath::Absent => match self.create(self.record_again(grant))? {
                    true => return Ok(extended),
                    false => continue,
                },
            };
            let Reading { bytes, content } = locked.read()?;
            return match content {
                Content::Ours(record) if is_of(&record, grant) => {
                    locked.beat(*record, grant, &bytes).map(|()| extended)
                }
                _ if !self.is_named(&locked)? => continue,
                Content::Ours(record) if record.is_held() => Ok(Renewal::Lost { by: record.owner() }),
                Content::Ours(_) | Content::Newer => Ok(Renewal::Lost { by: None }),
                Content::Damaged => locked.write(&mut self.record_again(grant), &bytes).map(|()| extended),
                Content::Foreign => Err(self.not_a_lease(&bytes)),
            };
        }
        Err(self.replaced())
    }

    fn release(&self, grant: &Grant, by: Deadline) -> Result<Released> {
        // After a deletion or damage, another holder would have written its own record.
        self.free_if(by, true, Released::Done, |content, _| match content {
            Content::Ours(record) if is_of(record, grant) => {
                let mut record = (**record).clone();
                record.set_free();
                Some(record)
            }
            Content::Damaged => {
                let mut record = self.record_again(grant);
                record.set_free();
                Some(record)
            }
            _ => None,
        })
    }

    fn abandon(&self, grant: &Grant, by: Deadline) -> Result<Released> {
        self.free_if(by, false, Released::NotMine, |content, _| match content {
            Content::Ours(record) if is_of(record, grant) => {
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
        self.look_unlocked()
    }

    fn evict(&self, _: &LeaseName, seen: &LeaseSnapshot, by: Deadline) -> Result<Released> {
        self.free_if(by, false, Released::NotMine, |content, bytes| match content {
            Content::Ours(record) if record.is_held() && seen.is_same_holder(&seen_holder(record)) => {
                let mut record = (**record).clone();
                record.set_free();
                Some(record)
            }
            // The token of an unreadable record is unknown.
            Content::Damaged if seen.is_same_holder(&LeaseSnapshot::new(format::fingerprint(bytes))) => {
                let mut record = self.own_record(&ClaimId::from_number(0), seed(), Duration::ZERO);
                record.set_free();
                Some(record)
            }
            _ => None,
        })
    }

    fn wait_for_change(&self, _: &LeaseName, seen: &LeaseSnapshot, by: Deadline, stop: &CancelToken) -> Result<()> {
        // Subscribes before it reads, so that it misses no change in between.
        let watch = inotify::changes_of(&self.path).ok();
        let Some(file) = self.open_for_reading()? else { return Ok(()) };
        let Reading { bytes, content } = self.read(&file)?;
        drop(file);
        let look = match content {
            Content::Ours(record) if record.fingerprint() == seen.revision() => {
                match record.owner().is_some_and(|owner| owner.liveness() == Liveness::Alive) {
                    true => LOOK,
                    // inotify(7) does not report the changes of another host.
                    false => record.heartbeat().clamp(self.retry_delay.min(LOOK), LOOK * 20),
                }
            }
            Content::Damaged if format::fingerprint(&bytes) == seen.revision() => LOOK,
            _ => return Ok(()),
        };
        match watch {
            Some(watch) => {
                let event = stop.event().map_err(StoreError::not_applied)?;
                let until = by.min(Deadline::after(look));
                event::wait(Some(watch.as_fd()), Some(event.as_fd()), Some(until.moment()))
                    .map(drop)
                    .map_err(|error| self.failed("wait for", error))
            }
            None => sleep(by.min(Deadline::after(look.min(self.retry_delay))), stop),
        }
    }
}

impl FileStore {
    /// Judges a reading. An attempt, a waiter and `status` all use this. A lease is never taken because a fact is
    /// unknown:
    /// - The record says that the lease is free, or lost by its owner: any process may take it.
    /// - Held, and the owner is dead by its identity: any process may take it at once.
    /// - Held by an owner that may be alive: a process may take it after it has seen the same beat for the ttl of the
    ///   record on its own clock, or if a note shows that another process with the same clock has.
    /// - Blank or damaged: a process may take it after it has seen the file unchanged for [`FileStore::unreadable`] on
    ///   its own clock, or if the file's times show that.
    /// - A later version, a file that is not a lease, or a token that is far ahead of the time: an error.
    fn judge<'r>(&self, file: &File, reading: &'r Reading) -> Result<Verdict<'r>> {
        match &reading.content {
            Content::Ours(record) if record.token().saturating_sub(FARTHEST_AHEAD) > seed() => Err(self.is_forged()),
            Content::Ours(record) if !record.is_held() => Ok(Verdict::Free(record)),
            Content::Ours(record) => {
                let noted = self.clock_id.and_then(|clock| record.noted(clock));
                let age = self.observe(record.fingerprint(), noted);
                Ok(Verdict::Held(self.seen(record, age), Some(record)))
            }
            Content::Damaged => {
                let print = format::fingerprint(&reading.bytes);
                let age = self.observe(print, None).max(self.unchanged_for(file)?);
                Ok(Verdict::Held(LeaseSnapshot::new(print).with_expires_in(self.unreadable.saturating_sub(age)), None))
            }
            Content::Newer => Err(self.newer()),
            Content::Foreign => Err(self.not_a_lease(&reading.bytes)),
        }
    }

    /// Returns at least how long the file has been unchanged, by its modification time. Zero if the time is in the
    /// future or unknown.
    #[cold]
    fn unchanged_for(&self, file: &File) -> Result<Duration> {
        let found = files::metadata_of(file).map_err(|error| self.failed("look at", error))?;
        let age = found.modified().ok().and_then(|modified| SystemTime::now().duration_since(modified).ok());
        let margin = match self.is_remote.load(Ordering::Relaxed) {
            true => CLOCKS_APART,
            false => Duration::ZERO,
        };
        Ok(age.unwrap_or_default().saturating_sub(margin))
    }

    /// Writes a note into a held record of when this process first saw its beat, for later processes. A process writes
    /// one note. After that it uses its own observation, so waiters do not wake each other with notes.
    fn leave_note(&self, file: ForkGuarded<File>, of: &Verdict<'_>) {
        let (Verdict::Held(_, Some(record)), Some(clock)) = (of, self.clock_id) else { return };
        let is_noted = record.noted(clock).is_some();
        if is_noted || !self.observer.try_lock().is_none_or(|mut observer| observer.is_to_note()) {
            return;
        }
        let write = |file: &File| {
            let (at, note) = record.note(clock, self.clock.now());
            // A lost note costs time only.
            let _ = file.write_all_at(&note, at);
            step("note written");
        };
        if !self.is_remote.load(Ordering::Relaxed) {
            return write(&file);
        }
        // Without a lock on the file, an NFS client may write its whole cached page back, which contains an old beat.
        if let Ok(Some(locked)) = self.flock(file, Deadline::after(Duration::ZERO)) {
            let is_same =
                |now: Reading| matches!(now.content, Content::Ours(now) if now.fingerprint() == record.fingerprint());
            if locked.read().is_ok_and(is_same) {
                write(&locked.file);
            }
        }
    }

    /// Returns how long the content with this fingerprint has been seen unchanged.
    fn observe(&self, print: u64, noted: Option<Duration>) -> Duration {
        let now = self.clock.now();
        match self.observer.try_lock() {
            Some(mut observer) => observer.unchanged_for(print, now, noted),
            None => Observer::default().unchanged_for(print, now, noted),
        }
    }

    /// Returns the snapshot of a held record that has been unchanged for this long.
    fn seen(&self, record: &Record, unchanged_for: Duration) -> LeaseSnapshot {
        let seen = seen_holder(record);
        let owner = record.owner();
        let is_dead = owner.as_ref().is_some_and(|owner| owner.liveness() == Liveness::Dead);
        // A longer ttl is forged, because no lease can have it. Such a record counts as held as long as a damaged one.
        let ttl = if record.ttl() > LONGEST_TTL { self.unreadable } else { record.ttl() };
        let left = if is_dead { Duration::ZERO } else { ttl.saturating_sub(unchanged_for) };
        let seen = seen.with_expires_in(left);
        match owner {
            Some(owner) => seen.with_owner(owner),
            None => seen,
        }
    }

    fn look_unlocked(&self) -> Result<Option<LeaseSnapshot>> {
        let Some(file) = self.open_for_reading()? else { return Ok(None) };
        Ok(match self.judge(&file, &self.read_unlocked(&file)?)? {
            Verdict::Held(seen, _) => Some(seen),
            Verdict::Free(_) => None,
        })
    }

    /// Reads the file without a lock. Another process may be writing, so content that is not a complete record is read
    /// again until two readings are equal.
    fn read_unlocked(&self, file: &File) -> Result<Reading> {
        let mut reading = self.read(file)?;
        for _ in 0..MOST_READS {
            if matches!(reading.content, Content::Ours(_) | Content::Newer) {
                break;
            }
            let before = std::mem::replace(&mut reading, self.read(file)?);
            if before.bytes == reading.bytes {
                break;
            }
        }
        Ok(reading)
    }

    fn read(&self, file: &File) -> Result<Reading> {
        read(file).map(Reading::of).map_err(|error| self.failed("read", error))
    }

    /// Writes the record of a free lease that `which` makes of the content, unless `which` returns `None`. Returns
    /// `absent` if there is no file. `is_own`: this process holds the lease.
    fn free_if(
        &self,
        by: Deadline,
        is_own: bool,
        absent: Released,
        which: impl Fn(&Content, &[u8]) -> Option<Record>,
    ) -> Result<Released> {
        let which = |reading: &Reading| match &reading.content {
            Content::Foreign => Err(self.not_a_lease(&reading.bytes)),
            content => Ok(which(content, &reading.bytes)),
        };
        for _ in 0..MOST_REPLACEMENTS {
            let Some(file) = self.open()? else { return Ok(absent) };
            let found = self.vet(&file, Aim::Free)?;
            // The flock on another holder's file would delay its renewal. The file of a holder that has not expired is
            // its own, except after an eviction.
            if !is_own && which(&self.read_unlocked(&file)?)?.is_none() {
                return Ok(Released::NotMine);
            }
            let Some(locked) = self.flock(file, by)? else { return Err(self.occupied()) };
            if !self.names(&found)? {
                continue;
            }
            let reading = locked.read()?;
            return match which(&reading)? {
                Some(mut record) => locked.write(&mut record, &reading.bytes).map(|()| Released::Done),
                None => Ok(Released::NotMine),
            };
        }
        Err(self.replaced())
    }

    /// Opens the file that the path names, and locks it, to hold the lease.
    fn lock(&self, by: Deadline) -> Result<LockedPath<'_>> {
        for _ in 0..MOST_REPLACEMENTS {
            let Some(file) = self.open()? else { return Ok(LockedPath::Absent) };
            let found = self.vet(&file, Aim::Hold)?;
            let Some(locked) = self.flock(file, by)? else { return Ok(LockedPath::Occupied) };
            if self.names(&found)? {
                return Ok(LockedPath::Locked(locked));
            }
        }
        Err(self.replaced())
    }

    /// Opens the file that the path names, and locks it, without a check. A holder that finds its own claim needs no
    /// check: the file was checked when the claim was written. The next heartbeat finds later changes of the path.
    fn lock_as_it_is(&self, by: Deadline) -> Result<LockedPath<'_>> {
        let Some(file) = self.open()? else { return Ok(LockedPath::Absent) };
        Ok(self.flock(file, by)?.map_or(LockedPath::Occupied, LockedPath::Locked))
    }

    /// Returns whether a file that was locked without a check may be written to, and the path still names it.
    #[cold]
    fn is_named(&self, locked: &Locked<'_>) -> Result<bool> {
        self.names(&self.vet(&locked.file, Aim::Hold)?)
    }

    fn flock(&self, file: ForkGuarded<File>, by: Deadline) -> Result<Option<Locked<'_>>> {
        let mut backoff = Backoff::new();
        while !flock::try_lock(&file, Mode::Exclusive).map_err(|error| self.failed("lock", error))? {
            if by.is_past() {
                return Ok(None);
            }
            std::thread::sleep(backoff.next().min(by.remaining()));
        }
        Ok(Some(Locked { file, store: self }))
    }

    /// Returns whether the path names the file `found`.
    fn names(&self, found: &Found) -> Result<bool> {
        match files::symlink_metadata(&self.path) {
            Ok(named) => Ok((named.dev(), named.ino()) == (found.dev(), found.ino())),
            Err(error) if error.kind() == Io::NotFound => Ok(false),
            Err(error) => Err(self.failed("look at", error)),
        }
    }

    /// Opens the file that the path names, if there is one.
    fn open(&self) -> Result<Option<ForkGuarded<File>>> {
        self.check_path()?;
        // Non-blocking, so that a FIFO does not block the call; and a terminal must not become this process's own.
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(files::NOFOLLOW | files::NONBLOCK | files::NOCTTY);
        match ForkGuarded::new(|| files::open(&options, &self.path)) {
            Err(error) if error.kind() == Io::NotFound => Ok(None),
            Err(error) if files::is_symlink_refused(&error) => Err(self.is_link()),
            opened => opened.map(Some).map_err(|error| self.failed("open", error)),
        }
    }

    /// Returns the metadata of the file, if the file may be written to.
    fn vet(&self, file: &File, aim: Aim) -> Result<Found> {
        let found = self.check(file)?;
        // A lease is shared if both its file and this caller's mode let the same class of users write.
        let is_shared = files::group_other_write_bits(&found) & self.file_mode.unwrap_or_default() != 0;
        let may_free = || aim == Aim::Free && runtime_dir::effective_uid() == 0;
        if found.uid() != 0 && !is_shared && !runtime_dir::is_own(file, &found) && !may_free() {
            let lock = format!("the lease {}", self.path.display());
            return Err(StoreError::permanent(Error::from(ErrorKind::ForeignOwner {
                lock,
                uid: found.uid(),
                pid: None,
            })));
        }
        self.place(file, &found);
        Ok(found)
    }

    /// Records the file system of the file. For a new file system, checks whether it is this machine's own.
    fn place(&self, file: &File, found: &Found) {
        if self.device.load(Ordering::Relaxed) != found.dev() {
            self.is_remote.store(!is_local(file), Ordering::Relaxed);
            self.device.store(found.dev(), Ordering::Relaxed);
        }
    }

    /// Checks the type of the file before the first open, because opening a device can have side effects.
    fn check_path(&self) -> Result<()> {
        if self.device.load(Ordering::Relaxed) != 0 {
            return Ok(());
        }
        match files::symlink_metadata(&self.path) {
            Err(error) if error.kind() == Io::NotFound => Ok(()),
            found => self.check_found(&found.map_err(|error| self.failed("open", error))?),
        }
    }

    /// Returns the metadata of the file, if it is a plain file without other names.
    fn check(&self, file: &File) -> Result<Found> {
        let found = files::metadata_of(file).map_err(|error| self.failed("look at", error))?;
        self.check_found(&found)?;
        Ok(found)
    }

    fn check_found(&self, found: &Found) -> Result<()> {
        if found.is_symlink() {
            return Err(self.is_link());
        }
        if !found.is_file() {
            return Err(self.insecure("it is no plain file"));
        }
        if found.nlink() > 1 {
            return Err(self.insecure("it is a hard link to a file that has other names"));
        }
        Ok(())
    }

    fn open_for_reading(&self) -> Result<Option<File>> {
        self.check_path()?;
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(files::NOFOLLOW | files::NONBLOCK | files::NOCTTY);
        match files::open(&options, &self.path) {
            Err(error) if error.kind() == Io::NotFound => Ok(None),
            Err(error) if files::is_symlink_refused(&error) => Err(self.is_link()),
            opened => {
                let file = opened.map_err(|error| self.failed("open", error))?;
                let found = self.check(&file)?;
                self.place(&file, &found);
                Ok(Some(file))
            }
        }
    }

    /// Creates the file with this record, complete before the path names it. Returns false if another process created
    /// the file first.
    #[cold]
    fn create(&self, mut record: Record) -> Result<bool> {
        let directory = self.path.parent().unwrap_or(&self.path);
        let failed = |error| self.failed("create", error);
        let make = || ForkGuarded::new(|| tmpfile::file_in(directory, self.file_mode.unwrap_or(FILE_MODE)));
        let file = match make() {
            Err(error) if error.kind() == Io::NotFound => {
                self.create_directories(directory, error)?;
                make()
            }
            made => made,
        };
        let file = match file {
            Err(error) if error.kind() == Io::Unsupported => return self.create_in_place(&mut record),
            file => file.map_err(failed)?,
        };
        let made = files::metadata_of(&file).map_err(|error| self.failed("look at", error))?;
        self.place(&file, &made);
        self.set_mode(&file)?;
        file.write_all_at(record.seal(), 0).map_err(|error| self.failed("write", error))?;
        step("nameless file written");
        // Once in the life of a file, so that no power cut leaves an empty file. Programs that try only once would find
        // such a file held for ever.
        file.sync_data().map_err(|error| self.failed("write", error))?;
        step("nameless file synced");
        match tmpfile::name(&file, &self.path) {
            Ok(()) => {
                step("file named");
                Ok(true)
            }
            Err(error) if error.kind() == Io::AlreadyExists => Ok(false),
            Err(error) if error.kind() == Io::Unsupported => self.create_in_place(&mut record),
            Err(error) => Err(failed(error)),
        }
    }

    /// Creates the file as [`create`](Self::create) does, for a file system without nameless files. Other processes may
    /// see the file empty, which counts as held for a while, also if the creator is killed at that moment.
    #[cold]
    fn create_in_place(&self, record: &mut Record) -> Result<bool> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(self.file_mode.unwrap_or(FILE_MODE));
        let file = match ForkGuarded::new(|| files::create(&options, &self.path)) {
            Err(error) if error.kind() == Io::AlreadyExists => return Ok(false),
            made => made.map_err(|error| self.failed("create", error))?,
        };
        step("file made");
        self.set_mode(&file)?;
        drop(file);
        match self.lock(Deadline::after(LOOKED_AT))? {
            // No process takes such a new file. Only a holder whose own record was deleted may have written into it.
            LockedPath::Locked(locked) if locked.read()?.bytes.is_empty() => {
                let synced = || locked.file.sync_data().map_err(|error| self.failed("write", error));
                let written = locked.write(record, &[]).and_then(|()| synced());
                if written.is_err() {
                    // An empty file would count as held. While it is locked, no other process uses it.
                    let _ = fs::remove_file(&self.path);
                }
                written.map(|()| true)
            }
            _ => Ok(false),
        }
    }

    /// Gives a new file its exact mode, independent of the umask.
    fn set_mode(&self, file: &File) -> Result<()> {
        let Some(mode) = self.file_mode else { return Ok(()) };
        files::set_mode(file, mode).map_err(|error| self.failed("set the mode of", error))?;
        step("mode of the file set");
        Ok(())
    }

    /// Creates the missing directories down to `directory` if the caller wants that; otherwise the error is `missing`.
    fn create_directories(&self, directory: &Path, missing: io::Error) -> Result<()> {
        if !self.create_parents {
            return Err(StoreError::permanent(Error::io("open the directory", directory, missing)));
        }
        let is_missing =
            |directory: &&Path| files::metadata(directory).is_err_and(|error| error.kind() == Io::NotFound);
        let missing: Vec<_> = directory.ancestors().take_while(is_missing).collect();
        for directory in missing.into_iter().rev() {
            match DirBuilder::new().mode(self.directory_mode.unwrap_or(DIRECTORY_MODE)).create(directory) {
                Err(error) if error.kind() == Io::AlreadyExists => continue,
                made => made.map_err(|error| failed_at("create the directory", directory, error))?,
            }
            step("directory made");
            if let Some(mode) = self.directory_mode {
                let set = files::set_directory_mode(directory, mode);
                set.map_err(|error| failed_at("set the mode of the directory", directory, error))?;
                step("mode of the directory set");
            }
        }
        Ok(())
    }

    /// Creates the record of this process, which acquires the lease now.
    fn own_record(&self, claim: &ClaimId, token: u64, ttl: Duration) -> Record {
        let owner = Owner { acquired: Some(SystemTime::now()), ..Owner::current() };
        Record::held(claim, token, ttl, self.heartbeat, &owner)
    }

    /// Returns the error for a forged token. The next grant would get a greater token, and some day no greater token
    /// would be left.
    fn is_forged(&self) -> StoreError {
        let problem = "its fencing token is centuries ahead of the time, so the record is forged; remove the file";
        StoreError::permanent(Error::from(ErrorKind::LayoutMismatch { path: self.path.clone(), problem }))
    }

    /// Creates the record of a grant again, after its file was deleted or damaged.
    #[cold]
    fn record_again(&self, grant: &Grant) -> Record {
        let mut record = self.own_record(grant.claim(), grant.token(), grant.ttl());
        record.set_beat(next_beat(grant, 0));
        record
    }

    fn is_link(&self) -> StoreError {
        self.insecure("it is a symbolic link; use the path that it leads to")
    }

    fn insecure(&self, problem: &'static str) -> StoreError {
        StoreError::permanent(Error::from(ErrorKind::Insecure { path: self.path.clone(), problem }))
    }

    fn newer(&self) -> StoreError {
        let problem = "it is the lease of a later version of lockkit";
        StoreError::permanent(Error::from(ErrorKind::LayoutMismatch { path: self.path.clone(), problem }))
    }

    fn not_a_lease(&self, bytes: &[u8]) -> StoreError {
        let text = crate::base::error::first_line(bytes);
        StoreError::permanent(Error::from(ErrorKind::NotALease { path: self.path.clone(), text }))
    }

    fn replaced(&self) -> StoreError {
        StoreError::not_applied(Error::from(ErrorKind::RogueDeletion { path: self.path.clone() }))
    }

    fn occupied(&self) -> StoreError {
        let stuck = io::Error::new(Io::TimedOut, "another process keeps it locked");
        self.failed("lock", stuck)
    }

    fn failed(&self, action: &'static str, error: io::Error) -> StoreError {
        failed_at(action, &self.path, error)
    }
}

impl Locked<'_> {
    fn read(&self) -> Result<Reading> {
        self.store.read(&self.file)
    }

    /// Reads the locked file; `None` if it contains the same record as `before`. A record is never repeated, so it has
    /// not changed in between.
    fn read_unless(&self, before: &Reading) -> Result<Option<Reading>> {
        let bytes = read(&self.file).map_err(|error| self.store.failed("read", error))?;
        let is_same = matches!(before.content, Content::Ours(_)) && bytes == before.bytes;
        Ok((!is_same).then(|| Reading::of(bytes)))
    }

    /// Replaces the content of the file, which begins with `old`, by one write within one page. If the write fails,
    /// `old` is put back.
    fn write(&self, record: &mut Record, old: &[u8]) -> Result<()> {
        let mut written = self.file.write_all_at(record.seal(), 0);
        step(if record.is_held() { "record written" } else { "record freed" });
        if written.is_ok() && self.store.is_remote.load(Ordering::Relaxed) {
            // Without a sync the record may be in this machine's memory only, and count here though no other machine
            // sees it.
            written = self.file.sync_data();
        }
        written.map_err(|error| {
            let _ = self.file.write_all_at(&old[..old.len().min(SIZE)], 0);
            step("old record put back");
            StoreError::unknown(Error::io("write", &self.store.path, error))
        })
    }

    /// Writes the next beat of `grant` into its record, which the file contains as `old`.
    fn beat(&self, mut record: Record, grant: &Grant, old: &[u8]) -> Result<()> {
        record.set_beat(next_beat(grant, record.beat()));
        self.write(&mut record, old)
    }
}

/// Returns whether the file is on a file system of this machine. An unknown file system is not.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn is_local(file: &File) -> bool {
    /// tmpfs, ramfs, ext2 to 4, xfs, btrfs, overlayfs, zfs, f2fs, bcachefs, jfs, fat, exfat: the numbers of
    /// [statfs(2)].
    ///
    /// [statfs(2)]: https://man7.org/linux/man-pages/man2/statfs.2.html
    const LOCAL: [u64; 12] = [
        0x0102_1994,
        0x8584_58f6,
        0xef53,
        0x5846_5342,
        0x9123_683e,
        0x794c_7630,
        0x2fc1_2fc1,
        0xf2f5_2010,
        0xca45_1a4e,
        0x3153_464a,
        0x4d44,
        0x2011_bab0,
    ];
    // The type of `f_type` differs between systems, and its sign.
    rustix::fs::fstatfs(file).is_ok_and(|found| LOCAL.contains(&(found.f_type as u64 & 0xffff_ffff)))
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn is_local(file: &File) -> bool {
    files::is_local(file)
}

/// Returns the token of the grant that follows this record.
fn token_after(before: Option<&Record>) -> u64 {
    before.map_or(0, Record::token).saturating_add(1).max(seed())
}

/// Returns the microseconds since the epoch. No lease is granted as often as once per microsecond.
fn seed() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX / 2).max(1)
}

fn next_beat(grant: &Grant, written: u64) -> u64 {
    grant.handle::<Beats>().map_or(written.saturating_add(1), |beats| beats.next(written))
}

fn seen_holder(record: &Record) -> LeaseSnapshot {
    LeaseSnapshot::new(record.fingerprint()).with_claim(record.claim()).with_token(record.token())
}

fn is_of(record: &Record, grant: &Grant) -> bool {
    record.is_held() && record.claim() == *grant.claim() && record.token() == grant.token()
}

/// Reads the first bytes of a file: a record, and one more byte if the file is longer.
fn read(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; SIZE + 1];
    let mut filled = 0;
    // The buffer is longer than a record, so a read that returns exactly a record has reached the end of the file.
    while filled < SIZE {
        match file.read_at(&mut bytes[filled..], filled as u64) {
            Ok(0) => break,
            Ok(more) => filled += more,
            Err(error) if error.kind() == Io::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}

/// Converts an I/O error. It is permanent if waiting does not help and the caller must remove the cause.
fn failed_at(action: &'static str, path: &Path, error: io::Error) -> StoreError {
    use Io::{IsADirectory, NotADirectory, PermissionDenied, ReadOnlyFilesystem};
    let lasting = matches!(error.kind(), PermissionDenied | ReadOnlyFilesystem | IsADirectory | NotADirectory)
        || files::is_name_too_long(&error);
    let error = Error::io(action, path, error);
    if lasting { StoreError::permanent(error) } else { StoreError::not_applied(error) }
}

#[cfg(test)]
mod tests {
    use std::{fs, thread};

    use super::*;
    use crate::lease::SystemClock;

    #[test]
    #[cfg(target_os = "linux")]
    fn only_file_systems_that_are_known_are_local() {
        assert!(is_local(&File::open("/dev/shm").unwrap()));
        assert!(!is_local(&File::open("/proc/self/stat").unwrap()), "none that leases stand on");
    }

    fn store(name: &str, ttl: Duration) -> FileStore {
        let base = if cfg!(target_os = "linux") { PathBuf::from("/dev/shm") } else { std::env::temp_dir() };
        FileStore {
            path: base.join(format!("lockkit-lease-{name}-{}", std::process::id())),
            heartbeat: ttl / 4,
            unreadable: ttl,
            retry_delay: ttl,
            file_mode: None,
            directory_mode: None,
            create_parents: false,
            clock: Arc::new(SystemClock),
            clock_id: None,
            device: AtomicU64::default(),
            is_remote: AtomicBool::default(),
            observer: Mutex::default(),
        }
    }

    #[test]
    fn age_by_the_clock_of_another_machine_counts_less_an_hour() {
        let store = store("aged", Duration::from_secs(1));
        let minute = Duration::from_secs(60);
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&store.path).unwrap();
        for (is_remote, age, least) in [
            (false, minute, minute),
            (true, minute, Duration::ZERO),
            (true, CLOCKS_APART + minute, minute),
            (false, Duration::ZERO, Duration::ZERO),
        ] {
            store.is_remote.store(is_remote, Ordering::Relaxed);
            file.set_modified(SystemTime::now() - age).unwrap();
            let found = store.unchanged_for(&file).unwrap();
            assert!((least..least + minute / 2).contains(&found), "{is_remote} {age:?}: {found:?}");
        }
        file.set_modified(SystemTime::now() + minute).unwrap();
        assert_eq!(store.unchanged_for(&file).unwrap(), Duration::ZERO);
        fs::remove_file(&store.path).unwrap();
    }

    #[test]
    fn reader_does_not_disturb_create_in_place() {
        let ttl = Duration::from_secs(1);
        let store = store("made", ttl);
        let path = store.path.clone();
        let is_over = AtomicBool::new(false);
        let spoilt = thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    // The file may also have been deleted again.
                    let _ = store.lock(Deadline::after(Duration::ZERO));
                }
            });
            let make = || store.create_in_place(&mut store.own_record(&ClaimId::random(), 1, ttl));
            let is_spoilt = |_: &u32| {
                let made = make().unwrap();
                fs::remove_file(&path).unwrap();
                !made
            };
            let spoilt = (0..2000).filter(is_spoilt).count();
            is_over.store(true, Ordering::Relaxed);
            spoilt
        });
        assert_eq!(spoilt, 0);
    }
}
