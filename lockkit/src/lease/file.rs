//! The store that is built in: a file for each lease.
//!
//! Every step opens the file, sees what it is, takes its flock, sees that the path still names it, reads the record,
//! decides, writes it in place, unlocks and closes; a beat that finds its own claim in the file need not look at it. So
//! each step is one for all processes, and a process that is killed in the middle has changed all or nothing. Nobody
//! waits in flock(2) itself, for somebody may be stopped inside: it is tried again until the step's deadline, and who
//! wants the lease counts it as held.
//!
//! Who may take a record that says it is held: see [`FileStore::judge`]. What becomes of the token:
//! - It is above the one before, and at least the microseconds since the epoch, where there is no readable record just
//!   those. So no token is far ahead of the time, and whatever takes a record back (a deletion, a restored backup, a
//!   power cut) does not take the tokens back, as long as the wall clock is not set back at the same time, too.
//!
//! What a holder does when its record is not as it left it:
//! - Another claim, or none: it was taken over, or evicted. Lost.
//! - Deleted or spoilt, and nobody has claimed it: it writes the record anew. Under the flock, and with the path naming
//!   that very file, nobody else can be taking it at that moment, and until its deadline the lease is still its own.
//!   Who comes first after a deletion wins: the record then names somebody else.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind as Io};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;

use super::builder::SMALLEST_TTL;
use super::clock::Clock;
use super::observer::Observer;
use super::record::{self, Content, Record, SIZE};
use super::store::{
    Attempt, ClaimId, Deadline, Durability, Grant, LeaseName, LeaseStore, Released, Renewal, Seen, StoreError,
    StoreProfile, sleep,
};
use crate::error::{Error, ErrorKind};
use crate::file::beginning;
use crate::owner::{Liveness, Owner};
use crate::steps::step;
use crate::sys::event;
use crate::sys::fd::AsFd;
use crate::sys::files::{self, DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, Seen as Found};
use crate::sys::flock::{self, Mode};
use crate::sys::fork::Shielded;
use crate::sys::{folder, unnamed, watch};
use crate::wait::{Backoff, CancelToken};

type Result<T, E = StoreError> = std::result::Result<T, E>;

/// How long a renewal tries to get the flock. A step lasts some microseconds, so whoever has it longer is not running;
/// and other leases are to beat, too.
const OCCUPIED: Duration = Duration::from_millis(20);
/// How long an attempt to acquire does. Somebody is inside, so it is truly held, and the waiter must look at its limit
/// and its token.
const TAKEN: Duration = Duration::from_millis(4);
/// How long the maker of a file tries. Others only look into what is so young, but one that looks may be interrupted.
const LOOKED_AT: Duration = Duration::from_millis(500);
/// How often in a row the file may be replaced under a step.
const MOST_REPLACEMENTS: u32 = 100;
/// How often a waiter looks whether an owner lives that it can look up; nothing wakes it when that dies.
const LOOK: Duration = Duration::from_millis(50);
/// How often a reader without the flock reads again that has met somebody writing.
const MOST_READS: u32 = 8;

pub(super) struct FileStore {
    pub(super) path: PathBuf,
    pub(super) heartbeat: Duration,
    /// How long a record that cannot be read counts as held.
    pub(super) unreadable: Duration,
    pub(super) retry_delay: Duration,
    pub(super) file_mode: u32,
    pub(super) folder_mode: u32,
    pub(super) clock: Arc<dyn Clock>,
    /// The file system that the file is on, by its number; 0 until it has been opened. What hangs is a file system.
    pub(super) device: AtomicU64,
    /// What is written must be synced to reach those who share the file.
    pub(super) is_remote: AtomicBool,
    /// What this process has seen of the record. Whoever does not get it at once goes without, so that a fork which
    /// left it locked in the child does no harm: the notes in the record do the same work.
    pub(super) observer: Mutex<Observer>,
}

/// What the file is opened for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Aim {
    /// To hold the lease: not in a file of another user, who could take it back at will.
    Hold,
    /// To make it free, which root may do for anybody.
    Free,
}

/// What a step found at the path.
enum Place<'s> {
    /// The file, with its flock.
    Locked(Locked<'s>),
    /// Somebody else has its flock, and keeps it.
    Occupied,
    /// None.
    Absent,
}

/// The file that the path names, as long as it is locked.
struct Locked<'s> {
    file: Shielded<File>,
    store: &'s FileStore,
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // If it fails, closing the file unlocks.
        let _ = flock::unlock(&self.file);
    }
}

/// What a taker makes of a record.
enum Verdict {
    /// It may take the lease, after this record, if it could be read.
    Free(Option<Box<Record>>),
    /// The same claim has it already: an earlier request was done after all.
    Mine(Box<Record>),
    Held(Seen),
}

/// The beats of a grant, which are never repeated: an observer that saw one before goes on counting from then.
#[derive(Default)]
struct Beats(AtomicU64);

impl Beats {
    fn next(&self, written: u64) -> u64 {
        let next = self.0.load(Ordering::Relaxed).max(written).saturating_add(1);
        self.0.store(next, Ordering::Relaxed);
        next
    }
}

impl LeaseStore for FileStore {
    fn profile(&self) -> StoreProfile {
        StoreProfile {
            smallest_ttl: SMALLEST_TTL,
            // Where it cannot be woken it looks at the retry delay itself.
            wakes_waiters: true,
            place: match self.device.load(Ordering::Relaxed) {
                0 => None,
                device => Some(device),
            },
            ..StoreProfile::new(Durability::Local)
        }
    }

    fn try_acquire(&self, name: &LeaseName, claim: &ClaimId, ttl: Duration, by: Deadline) -> Result<Attempt> {
        let granted = |token| Grant::new(name, claim, token, ttl).with_handle(Beats::default());
        for _ in 0..MOST_REPLACEMENTS {
            let locked = match self.lock(by.min(Deadline::after(TAKEN)))? {
                Place::Locked(locked) => locked,
                Place::Occupied => return Ok(Attempt::Busy(self.look_unlocked()?.unwrap_or(Seen::new(0)))),
                Place::Absent => {
                    let token = seed();
                    match self.create(self.own_record(claim, token, ttl))? {
                        true => return Ok(Attempt::Granted(granted(token))),
                        false => continue,
                    }
                }
            };
            let bytes = locked.read()?;
            let before = match self.judge(&locked, &bytes, claim)? {
                Verdict::Held(seen) => return Ok(Attempt::Busy(seen)),
                Verdict::Mine(record) => {
                    let grant = granted(record.token());
                    locked.beat(record, &grant, &bytes)?;
                    return Ok(Attempt::Granted(grant));
                }
                Verdict::Free(before) => before,
            };
            let token = token_after(before.as_deref())?;
            locked.write(&mut self.own_record(claim, token, ttl), &bytes)?;
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
                Place::Locked(locked) => locked,
                Place::Occupied => return Err(self.occupied()),
                Place::Absent => match self.create(self.record_again(grant))? {
                    true => return Ok(extended),
                    false => continue,
                },
            };
            let bytes = locked.read()?;
            return match record::parse(&bytes) {
                Content::Ours(record) if is_of(&record, grant) => locked.beat(record, grant, &bytes).map(|()| extended),
                _ if !self.is_named(&locked)? => continue,
                Content::Ours(record) if record.is_held() => Ok(Renewal::Lost { by: record.owner() }),
                Content::Ours(_) | Content::Newer => Ok(Renewal::Lost { by: None }),
                Content::Junk => locked.write(&mut self.record_again(grant), &bytes).map(|()| extended),
            };
        }
        Err(self.replaced())
    }

    fn release(&self, grant: &Grant, by: Deadline) -> Result<Released> {
        // Whoever had taken what was deleted or spoilt would stand there now, as the next beat would have put us back.
        self.free_if(by, Released::Done, |content, _| match content {
            Content::Ours(mut record) if is_of(&record, grant) => {
                record.set_free();
                Some(record)
            }
            Content::Junk => {
                let mut record = self.record_again(grant);
                record.set_free();
                Some(Box::new(record))
            }
            _ => None,
        })
    }

    fn give_up(&self, grant: &Grant, by: Deadline) -> Result<Released> {
        self.free_if(by, Released::NotMine, |content, _| match content {
            Content::Ours(mut record) if is_of(&record, grant) => {
                record.set_lost();
                if let Some(recovered) = grant.recovered() {
                    record.set_owner(recovered.owner());
                }
                Some(record)
            }
            _ => None,
        })
    }

    fn look(&self, _: &LeaseName, _: Deadline) -> Result<Option<Seen>> {
        self.look_unlocked()
    }

    fn evict(&self, _: &LeaseName, seen: &Seen, by: Deadline) -> Result<Released> {
        self.free_if(by, Released::NotMine, |content, bytes| match content {
            Content::Ours(mut record) if record.is_held() && seen.is_same_holder(&seen_holder(&record)) => {
                record.set_free();
                Some(record)
            }
            // What cannot be read had a token that nobody knows.
            Content::Junk if seen.is_same_holder(&Seen::new(record::print(bytes))) => {
                let mut record = self.own_record(&ClaimId::from_number(0), seed(), Duration::ZERO);
                record.set_free();
                Some(Box::new(record))
            }
            _ => None,
        })
    }

    fn park(&self, _: &LeaseName, seen: &Seen, by: Deadline, stop: &CancelToken) -> Result<()> {
        // First watch, then look, so that nothing falls in between.
        let watch = watch::changes_of(&self.path).ok();
        let Some(file) = self.open_for_reading()? else { return Ok(()) };
        let bytes = read(&file).map_err(|error| self.failed("read", error))?;
        drop(file);
        let look = match record::parse(&bytes) {
            Content::Ours(record) if record.print() == seen.cursor() => {
                match record.owner().is_some_and(|owner| owner.liveness() == Liveness::Alive) {
                    true => LOOK,
                    // inotify(7) does not tell what another host does.
                    false => record.heartbeat().clamp(self.retry_delay.min(LOOK), LOOK * 20),
                }
            }
            Content::Junk if record::print(&bytes) == seen.cursor() => LOOK,
            _ => return Ok(()),
        };
        match watch {
            Some(watch) => {
                let event = stop.event().map_err(StoreError::refused)?;
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
    /// Who may take what the locked file says. Unknown is never taken on that ground:
    /// - a record that says it is free, or lost by its owner: everybody;
    /// - held, by an owner that is dead by its identity: everybody, at once;
    /// - held, by whom it may be: who has seen the same beat for the ttl that stands in the record, by its own clock,
    ///   or finds noted by another process of this clock that it did;
    /// - one that cannot be read: who has seen it so for [`FileStore::unreadable`], by its own clock;
    /// - one of a later version: nobody.
    fn judge(&self, locked: &Locked<'_>, bytes: &[u8], claim: &ClaimId) -> Result<Verdict> {
        let mut record = match record::parse(bytes) {
            Content::Ours(record) => record,
            Content::Newer => return Err(self.newer()),
            Content::Junk => {
                let print = record::print(bytes);
                let age = self.observe(print, None);
                return Ok(match self.unreadable.checked_sub(age) {
                    None | Some(Duration::ZERO) => Verdict::Free(None),
                    Some(left) => Verdict::Held(Seen::new(print).with_expires_in(left)),
                });
            }
        };
        if !record.is_held() {
            return Ok(Verdict::Free(Some(record)));
        }
        if record.claim() == *claim {
            return Ok(Verdict::Mine(record));
        }
        let clock = self.clock.shared_id();
        let noted = clock.and_then(|clock| record.noted(clock));
        let age = self.observe(record.print(), noted);
        let seen = self.seen(&record, age);
        if seen.expires_in() == Some(Duration::ZERO) {
            return Ok(Verdict::Free(Some(record)));
        }
        let unnoted = clock
            .filter(|_| noted.is_none() && self.observer.try_lock().is_none_or(|mut observer| observer.is_to_note()));
        if let Some(clock) = unnoted {
            record.note(clock, self.clock.now());
            // A note that is lost costs time only.
            let _ = locked.file.write_all_at(record.seal(), 0);
            step("note written");
        }
        Ok(Verdict::Held(seen))
    }

    /// How long what has this print has been seen so.
    fn observe(&self, print: u64, noted: Option<Duration>) -> Duration {
        let now = self.clock.now();
        match self.observer.try_lock() {
            Some(mut observer) => observer.unchanged_for(print, now, noted),
            None => Observer::default().unchanged_for(print, now, noted),
        }
    }

    /// What there is to see of a held record that has been as it is for so long.
    fn seen(&self, record: &Record, unchanged_for: Duration) -> Seen {
        let seen = seen_holder(record);
        let owner = record.owner();
        let is_dead = owner.as_ref().is_some_and(|owner| owner.liveness() == Liveness::Dead);
        let left = if is_dead { Duration::ZERO } else { record.ttl().saturating_sub(unchanged_for) };
        let seen = seen.with_expires_in(left);
        match owner {
            Some(owner) => seen.with_owner(owner),
            None => seen,
        }
    }

    fn look_unlocked(&self) -> Result<Option<Seen>> {
        let Some(file) = self.open_for_reading()? else { return Ok(None) };
        let mut before = None;
        for _ in 0..MOST_READS {
            let bytes = read(&file).map_err(|error| self.failed("read", error))?;
            match record::parse(&bytes) {
                Content::Newer => return Err(self.newer()),
                Content::Ours(record) if !record.is_held() => return Ok(None),
                Content::Ours(record) => {
                    let noted = self.clock.shared_id().and_then(|clock| record.noted(clock));
                    let age = self.observe(record.print(), noted);
                    return Ok(Some(self.seen(&record, age)));
                }
                // Somebody may be writing just now: it counts as junk when it is the same twice.
                Content::Junk => {
                    let print = record::print(&bytes);
                    if before.replace(print) == Some(print) {
                        let age = self.observe(print, None);
                        return Ok(Some(Seen::new(print).with_expires_in(self.unreadable.saturating_sub(age))));
                    }
                }
            }
        }
        Ok(Some(Seen::new(before.unwrap_or_default())))
    }

    /// Writes the record of a free lease that `which` makes of what the file says, unless it makes none of it. Where there
    /// is no file it is `absent`.
    fn free_if(
        &self,
        by: Deadline,
        absent: Released,
        which: impl FnOnce(Content, &[u8]) -> Option<Box<Record>>,
    ) -> Result<Released> {
        match self.lock_to(Aim::Free, by)? {
            Place::Absent => Ok(absent),
            Place::Occupied => Err(self.occupied()),
            Place::Locked(locked) => {
                let bytes = locked.read()?;
                match which(record::parse(&bytes), &bytes) {
                    Some(mut record) => locked.write(&mut record, &bytes).map(|()| Released::Done),
                    None => Ok(Released::NotMine),
                }
            }
        }
    }

    /// The file that the path names, locked, to hold the lease.
    fn lock(&self, by: Deadline) -> Result<Place<'_>> {
        self.lock_to(Aim::Hold, by)
    }

    fn lock_to(&self, aim: Aim, by: Deadline) -> Result<Place<'_>> {
        for _ in 0..MOST_REPLACEMENTS {
            let Some(file) = self.open()? else { return Ok(Place::Absent) };
            let found = self.vet(&file, aim)?;
            let Some(locked) = self.flock(file, by)? else { return Ok(Place::Occupied) };
            if self.names(&found)? {
                return Ok(Place::Locked(locked));
            }
        }
        Err(self.replaced())
    }

    /// What the path names, locked, whatever it is. Whoever finds its own claim in it needs to know no more: it is the
    /// file that was looked at when the claim was written, and what happens to the path from now on the next beat finds.
    fn lock_as_it_is(&self, by: Deadline) -> Result<Place<'_>> {
        let Some(file) = self.open()? else { return Ok(Place::Absent) };
        Ok(self.flock(file, by)?.map_or(Place::Occupied, Place::Locked))
    }

    /// Whether what was locked as it is may be written to, and the path still names it.
    #[cold]
    fn is_named(&self, locked: &Locked<'_>) -> Result<bool> {
        self.names(&self.vet(&locked.file, Aim::Hold)?)
    }

    fn flock(&self, file: Shielded<File>, by: Deadline) -> Result<Option<Locked<'_>>> {
        let mut backoff = Backoff::new();
        while !flock::try_lock(&file, Mode::Exclusive).map_err(|error| self.failed("lock", error))? {
            if by.is_past() {
                return Ok(None);
            }
            std::thread::sleep(backoff.next().min(by.remaining()));
        }
        Ok(Some(Locked { file, store: self }))
    }

    /// Whether the path names what was found.
    fn names(&self, found: &Found) -> Result<bool> {
        match files::look_at_link(&self.path) {
            Ok(named) => Ok((named.dev(), named.ino()) == (found.dev(), found.ino())),
            Err(error) if error.kind() == Io::NotFound => Ok(false),
            Err(error) => Err(self.failed("look at", error)),
        }
    }

    /// What the path names, if there is anything.
    fn open(&self) -> Result<Option<Shielded<File>>> {
        // Not blocking, so that no FIFO keeps the call, and no terminal becomes this process's.
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(files::NOFOLLOW | files::NONBLOCK | files::NOCTTY);
        match Shielded::new(|| files::open(&options, &self.path)) {
            Err(error) if error.kind() == Io::NotFound => Ok(None),
            Err(error) if files::is_of_a_link(&error) => Err(self.is_link()),
            opened => opened.map(Some).map_err(|error| self.failed("open", error)),
        }
    }

    /// What the file is, if it is one that may be written to.
    fn vet(&self, file: &File, aim: Aim) -> Result<Found> {
        let found = self.check(file)?;
        let is_foreign = |me| found.uid() != me && !(me == 0 && aim == Aim::Free);
        if found.uid() != 0 && is_foreign(folder::effective_uid()) {
            let lock = format!("the lease {}", self.path.display());
            return Err(StoreError::misuse(Error::from(ErrorKind::ForeignOwner { lock, uid: found.uid(), pid: None })));
        }
        self.place(file, &found);
        Ok(found)
    }

    /// Notes on which file system the file is, and asks of a new one whether it is this machine's own.
    fn place(&self, file: &File, found: &Found) {
        if self.device.load(Ordering::Relaxed) != found.dev() {
            self.is_remote.store(!is_local(file), Ordering::Relaxed);
            self.device.store(found.dev(), Ordering::Relaxed);
        }
    }

    /// What the file is, if it is a plain one without other names.
    fn check(&self, file: &File) -> Result<Found> {
        let found = files::look(file).map_err(|error| self.failed("look at", error))?;
        if found.is_symlink() {
            return Err(self.is_link());
        }
        if !found.is_file() {
            return Err(self.insecure("it is no plain file"));
        }
        if found.nlink() > 1 {
            return Err(self.insecure("it is a hard link to a file that has other names"));
        }
        Ok(found)
    }

    fn open_for_reading(&self) -> Result<Option<File>> {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(files::NOFOLLOW | files::NONBLOCK | files::NOCTTY);
        match files::open(&options, &self.path) {
            Err(error) if error.kind() == Io::NotFound => Ok(None),
            Err(error) if files::is_of_a_link(&error) => Err(self.is_link()),
            opened => {
                let file = opened.map_err(|error| self.failed("open", error))?;
                self.check(&file)?;
                Ok(Some(file))
            }
        }
    }

    /// Makes the file with this record, whole before the path names it; says whether it did, or somebody else came
    /// first.
    #[cold]
    fn create(&self, mut record: Record) -> Result<bool> {
        let folder = self.path.parent().unwrap_or(&self.path);
        let failed = |error| self.failed("create", error);
        let file = match Shielded::new(|| unnamed::file_in(folder, self.file_mode)) {
            Err(error) if error.kind() == Io::NotFound => {
                let made = DirBuilder::new().recursive(true).mode(self.folder_mode).create(folder);
                made.map_err(|error| failed_at("create the folder", folder, error))?;
                step("folders made");
                Shielded::new(|| unnamed::file_in(folder, self.file_mode))
            }
            made => made,
        };
        let file = match file {
            Err(error) if error.kind() == Io::Unsupported => return self.create_in_place(&mut record),
            file => file.map_err(failed)?,
        };
        let made = files::look(&file).map_err(|error| self.failed("look at", error))?;
        self.place(&file, &made);
        file.write_all_at(record.seal(), 0).map_err(|error| self.failed("write", error))?;
        step("nameless file written");
        // Once in the life of a file, so that no power cut leaves an empty one, which programs that only ever try once
        // would find held for ever.
        file.sync_data().map_err(|error| self.failed("write", error))?;
        step("nameless file synced");
        match unnamed::name(&file, &self.path) {
            Ok(()) => {
                step("file named");
                Ok(true)
            }
            Err(error) if error.kind() == Io::AlreadyExists => Ok(false),
            Err(error) if error.kind() == Io::Unsupported => self.create_in_place(&mut record),
            Err(error) => Err(failed(error)),
        }
    }

    /// As [`create`](Self::create), where a file system has no files without a name: others may see it empty, which
    /// counts as held for a while, also if the maker is killed at that moment.
    #[cold]
    fn create_in_place(&self, record: &mut Record) -> Result<bool> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(self.file_mode);
        match Shielded::new(|| files::create(&options, &self.path)) {
            Err(error) if error.kind() == Io::AlreadyExists => return Ok(false),
            made => drop(made.map_err(|error| self.failed("create", error))?),
        }
        step("file made");
        match self.lock(Deadline::after(LOOKED_AT))? {
            // Nobody takes what is so young; only a holder whose own record was deleted may have written into it.
            Place::Locked(locked) if locked.read()?.is_empty() => {
                let synced = || locked.file.sync_data().map_err(|error| self.failed("write", error));
                let written = locked.write(record, &[]).and_then(|()| synced());
                if written.is_err() {
                    // An empty one would count as held. While it is locked, nobody else is using it.
                    let _ = fs::remove_file(&self.path);
                }
                written.map(|()| true)
            }
            _ => Ok(false),
        }
    }

    /// The record of this process, which takes the lease now.
    fn own_record(&self, claim: &ClaimId, token: u64, ttl: Duration) -> Record {
        let owner = Owner { acquired: Some(SystemTime::now()), ..Owner::current() };
        Record::held(claim, token, ttl, self.heartbeat, &owner)
    }

    /// The record of a grant that was deleted or spoilt.
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
        StoreError::misuse(Error::from(ErrorKind::Insecure { path: self.path.clone(), problem }))
    }

    fn newer(&self) -> StoreError {
        let problem = "it is the lease of a later version of lockkit";
        StoreError::misuse(Error::from(ErrorKind::LayoutMismatch { path: self.path.clone(), problem }))
    }

    fn replaced(&self) -> StoreError {
        StoreError::refused(Error::from(ErrorKind::RogueDeletion { path: self.path.clone() }))
    }

    fn occupied(&self) -> StoreError {
        let stuck = io::Error::new(Io::TimedOut, "somebody has locked it and does not go on");
        self.failed("lock", stuck)
    }

    fn failed(&self, action: &'static str, error: io::Error) -> StoreError {
        failed_at(action, &self.path, error)
    }
}

impl Locked<'_> {
    fn read(&self) -> Result<Vec<u8>> {
        read(&self.file).map_err(|error| self.store.failed("read", error))
    }

    /// Replaces what the file says, which begins with `old`. One write does it, within one page. If that fails `old` is
    /// put back.
    fn write(&self, record: &mut Record, old: &[u8]) -> Result<()> {
        let mut written = self.file.write_all_at(record.seal(), 0);
        step(if record.is_held() { "record written" } else { "record freed" });
        if written.is_ok() && self.store.is_remote.load(Ordering::Relaxed) {
            // Else it may stand in this machine's memory only, and count here though nobody else sees it.
            written = self.file.sync_data();
        }
        written.map_err(|error| {
            let _ = self.file.write_all_at(old, 0);
            step("old record put back");
            StoreError::unknown(Error::io("write", &self.store.path, error))
        })
    }

    /// Writes the next beat of `grant` into its record, which stands in the file as `old`.
    fn beat(&self, mut record: Box<Record>, grant: &Grant, old: &[u8]) -> Result<()> {
        record.set_beat(next_beat(grant, record.beat()));
        self.write(&mut record, old)
    }
}

/// The token of who comes after this record.
fn token_after(before: Option<&Record>) -> Result<u64> {
    let next = before.map_or(Some(1), |before| before.token().checked_add(1));
    next.map(|next| next.max(seed())).ok_or_else(|| StoreError::misuse("the tokens are used up"))
}

/// Whether the file is on a file system of this machine's own. One that is not known is not.
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

/// Microseconds since the epoch: nobody takes a lease so often.
fn seed() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX / 2).max(1)
}

fn next_beat(grant: &Grant, written: u64) -> u64 {
    grant.handle::<Beats>().map_or(written.saturating_add(1), |beats| beats.next(written))
}

fn seen_holder(record: &Record) -> Seen {
    Seen::new(record.print()).with_claim(record.claim()).with_token(record.token())
}

fn is_of(record: &Record, grant: &Grant) -> bool {
    record.is_held() && record.claim() == *grant.claim() && record.token() == grant.token()
}

/// The beginning of a file, as much as a record is long.
fn read(file: &File) -> io::Result<Vec<u8>> {
    beginning(file, SIZE)
}

/// What no waiting heals is the caller's to mend.
fn failed_at(action: &'static str, path: &Path, error: io::Error) -> StoreError {
    use Io::{IsADirectory, NotADirectory, PermissionDenied, ReadOnlyFilesystem};
    let lasting = matches!(error.kind(), PermissionDenied | ReadOnlyFilesystem | IsADirectory | NotADirectory)
        || files::is_name_too_long(&error);
    let error = Error::io(action, path, error);
    if lasting { StoreError::misuse(error) } else { StoreError::refused(error) }
}

#[cfg(test)]
mod tests {
    use std::{fs, thread};

    use super::super::SystemClock;
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn only_file_systems_that_are_known_are_local() {
        assert!(is_local(&File::open("/dev/shm").unwrap()));
        assert!(!is_local(&File::open("/proc/self/stat").unwrap()), "none that leases stand on");
    }

    #[test]
    fn who_looks_into_a_file_that_is_just_being_made_does_not_spoil_it() {
        let base = if cfg!(target_os = "linux") { PathBuf::from("/dev/shm") } else { std::env::temp_dir() };
        let path = base.join(format!("lockkit-lease-made-{}", std::process::id()));
        let ttl = Duration::from_secs(1);
        let store = FileStore {
            path: path.clone(),
            heartbeat: ttl / 4,
            unreadable: ttl,
            retry_delay: ttl,
            file_mode: 0o600,
            folder_mode: 0o700,
            clock: Arc::new(SystemClock),
            device: AtomicU64::default(),
            is_remote: AtomicBool::default(),
            observer: Mutex::default(),
        };
        let is_over = AtomicBool::new(false);
        let spoilt = thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    // It may also have been deleted again.
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
