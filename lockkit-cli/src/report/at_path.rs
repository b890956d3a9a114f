//! What is at a path: a lease, a table, a pidfile, or another file, and who holds it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::path::Path;

#[cfg(not(unix))]
use lockkit::FileLock;
use lockkit::{
    FileLockManager, Lease, LeaseStatus, LockManager, Owner, PidFile, PidStatus, ShmLockManager,
};

use super::form::{Holder, Kind, Report, State, has_pid_extension};
use crate::failure::{Failure, code};
use crate::locks::{FileLocks, LockHolders, LocksOnFile, Owners};
use crate::style::plain;

/// The kind of file at a path.
pub(super) enum Found {
    Missing,
    Lease,
    Table,
    Pidfile,
    /// A file that contains only a number: a pidfile, unless a process with another pid has it
    /// locked.
    Number(u32),
    /// Any other file, or a directory.
    Plain,
    /// A FIFO, a socket or a device: opening it could wait for its other end, or have any effect.
    Special,
}

/// Determines the kind of file at `path`. An unreadable file may be any lock, so that is an error.
pub(super) fn found_at(path: &Path) -> Result<Found, Failure> {
    let unreadable = |error| unreadable(path, error);
    let found = match std::fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => match path.is_symlink() {
            true => {
                let message = format!(
                    "{} is a symbolic link to a file that does not exist",
                    path.display()
                );
                return Err(Failure::new(code::NO_INPUT, message));
            }
            false => return Ok(Found::Missing),
        },
        found => found.map_err(unreadable)?,
    };
    if found.is_dir() {
        return match beginning(&path.join("next")) {
            Ok((begin, _)) if begin.starts_with(b"lockkitF") => Ok(Found::Table),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(unreadable(error)),
            _ => Ok(Found::Plain),
        };
    }
    if !found.is_file() {
        return Ok(Found::Special);
    }
    let (begin, file) = match beginning(path) {
        // It has just been removed.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Missing),
        read => read.map_err(unreadable)?,
    };
    Ok(match &*begin {
        begin if begin.starts_with(b"lockkit lease ") || was_lease(path, begin, &file) => {
            Found::Lease
        }
        begin if begin.starts_with(b"lockkitT") => Found::Table,
        begin if has_pid_extension(path) || is_own(begin, &file) => Found::Pidfile,
        begin => number(begin, &file).map_or(Found::Plain, Found::Number),
    })
}

fn unreadable(path: &Path, error: io::Error) -> Failure {
    let path = path.display();
    let message = match error.kind() {
        io::ErrorKind::PermissionDenied => {
            format!(
                "cannot tell whether {path} is held, because this user may not read it: {error}; ask as its owner or as root"
            )
        }
        _ => format!("cannot tell whether {path} is held: {error}"),
    };
    Failure::new(crate::failure::of_io(error.kind()), message)
}

/// Whether the failure of a look leaves open that the lock is held.
pub(crate) fn is_unknown(failure: &Failure) -> bool {
    matches!(failure.code(), code::NO_PERMISSION | code::IO)
}

/// Returns the first bytes, and the file.
fn beginning(path: &Path) -> io::Result<(Vec<u8>, File)> {
    let mut file = open(path)?;
    let mut bytes = vec![0; 64];
    let length = loop {
        match file.read(&mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A regular file returns all its bytes.
            read => break read?,
        }
    };
    bytes.truncate(length);
    Ok((bytes, file))
}

/// Opens a file for reading that was no FIFO or device when it was checked. Does not wait if it has
/// become one.
fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    {
        use rustix::fs::OFlags;
        use std::os::unix::fs::OpenOptionsExt;
        options.custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32);
    }
    options.open(path)
}

/// Whether a file without a record is a lease file whose record a crash has erased.
fn was_lease(path: &Path, begin: &[u8], file: &File) -> bool {
    const RECORD: u64 = 1024;
    let has_extension = path
        .extension()
        .is_some_and(|extension| extension == "lease");
    begin.iter().all(|byte| *byte == 0)
        && (has_extension
            || !begin.is_empty() && file.metadata().is_ok_and(|found| found.len() == RECORD))
}

/// Whether the file is a pidfile by lockkit's mark, which earlier versions wrote after the pid.
fn is_own(begin: &[u8], file: &File) -> bool {
    const OLD_MARK: &[u8] = b"\nlockkit 1\n";
    let digits = begin
        .iter()
        .take_while(|byte| byte.is_ascii_digit())
        .count();
    digits > 0 && (begin[digits..].starts_with(OLD_MARK) || PidFile::has_owner_identity(file))
}

/// Returns the pid if it is the whole content of the file.
fn number(begin: &[u8], file: &File) -> Option<u32> {
    // No system gives out a greater pid: `PID_MAX_LIMIT` on Linux.
    const MAX_PID: u32 = 1 << 22;
    let text = std::str::from_utf8(begin).ok()?;
    let digits = text.strip_suffix('\n').unwrap_or(text);
    let number = digits
        .bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| digits.parse().ok())
        .flatten()?;
    let is_whole = file
        .metadata()
        .is_ok_and(|found| found.len() == begin.len() as u64);
    (is_whole && (1..=MAX_PID).contains(&number)).then_some(number)
}

/// Returns the report of a lock whose kind the file at `path` shows, or `None` for any other file
/// and for none. `guess` decides whether a file that contains just a number counts as a pidfile.
pub(crate) fn recognised(
    path: &Path,
    locks: &FileLocks,
    guess: bool,
) -> Result<Option<Report>, Failure> {
    let explained = |failure: Failure| match failure.code() {
        code::NO_PERMISSION => Failure::new(
            code::NO_PERMISSION,
            format!(
                "cannot tell whether {} is held: {}; ask as its owner or as root",
                path.display(),
                failure.message()
            ),
        ),
        _ => failure,
    };
    match found_at(path)? {
        Found::Lease => lease(path).map_err(explained).map(Some),
        Found::Table => table(path).map_err(explained).map(Some),
        Found::Number(_) if !guess => Ok(None),
        found @ (Found::Pidfile | Found::Number(_)) => {
            let on = locks.on(path).unwrap_or_default();
            if let Found::Number(number) = found {
                // If a process with another pid has the file locked, the number is data that the
                // lock guards.
                let mut by = [&on.flock, &on.fcntl].into_iter().flatten();
                if by.any(|locked| !locked.pids.contains(&number)) {
                    return Ok(None);
                }
            }
            let mut sight = pidfile(path).map_err(explained)?;
            if sight.state == State::Held {
                sight.waiters = Some(on.flock.map_or(0, |locked| locked.waiters));
            }
            Ok(Some(sight))
        }
        Found::Missing | Found::Plain | Found::Special => Ok(None),
    }
}

/// Returns the report of a lock on any file or directory.
pub(super) fn file(path: &Path, locks: &FileLocks) -> Result<Report, Failure> {
    let on = match locks.on(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => LocksOnFile::default(),
        on => on.map_err(|error| unreadable(path, error))?,
    };
    if let Some(sight) = locked(path, &on, &Owners::default()).next() {
        return Ok(sight);
    }
    let kind = match std::fs::metadata(path) {
        Ok(found) if found.is_file() || found.is_dir() => tried(path)?,
        // Only the kernel's table shows these locks.
        Ok(_) => match locks.table_error() {
            Some(error) => {
                return Err(Failure::new(
                    code::IO,
                    format!(
                        "cannot tell whether {} is held: /proc/locks cannot be read: {error}",
                        path.display()
                    ),
                ));
            }
            None => None,
        },
        Err(_) => None,
    };
    let (kind, state, pid) = match kind {
        Some((kind, pid)) => (kind, State::Held, pid),
        None => (Kind::File, State::Free, None),
    };
    let mut sight = Report::of_path(kind, path, state);
    sight.holders = pid.and_then(Owner::of).iter().map(Holder::new).collect();
    sight.waiters = Some(0);
    Ok(sight)
}

/// Returns the locks that the kernel shows on the file at `path`, that of flock(2) first.
pub(crate) fn locked(
    path: &Path,
    on: &LocksOnFile,
    owners: &Owners,
) -> impl Iterator<Item = Report> {
    let sight = |kind, locked: &LockHolders| {
        let mut sight = Report::of_path(kind, path, State::Held);
        sight.holders = locked
            .pids
            .iter()
            .filter_map(|pid| owners.of(*pid))
            .map(|owner| Holder::new(&owner))
            .collect();
        sight.waiters = Some(locked.waiters);
        sight
    };
    let flock = on.flock.as_ref().map(|locked| sight(Kind::File, locked));
    flock
        .into_iter()
        .chain(on.fcntl.as_ref().map(|locked| sight(Kind::Fcntl, locked)))
}

/// Tests whether a process has the file or directory locked. Returns the kind, and the pid if it is
/// known. A failed try acquires nothing. A successful try holds the lock for a moment, exclusively,
/// because otherwise it would not detect a shared lock.
#[cfg(unix)]
pub(super) fn tried(path: &Path) -> Result<Option<(Kind, Option<u32>)>, Failure> {
    use rustix::fs::{FlockOperation, flock};
    use rustix::io::{Errno, retry_on_intr};

    let file = match open(path) {
        // A missing file is not locked.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(|error| unreadable(path, error))?,
    };
    #[cfg(target_os = "linux")]
    if let Ok(Some(pid)) = crate::locks::fcntl_holder(&file) {
        return Ok(Some((Kind::Fcntl, pid)));
    }
    // The try of another process looks like a holder, so only several failed tries count as a
    // holder.
    for pause in [100, 1000, 3000] {
        match retry_on_intr(|| flock(&file, FlockOperation::NonBlockingLockExclusive)) {
            Err(Errno::WOULDBLOCK) => std::thread::sleep(std::time::Duration::from_micros(pause)),
            // NFS requires a file to be open for writing for an exclusive lock.
            Err(Errno::BADF) => {
                let tried = retry_on_intr(|| flock(&file, FlockOperation::NonBlockingLockShared));
                return Ok((tried == Err(Errno::WOULDBLOCK)).then_some((Kind::File, None)));
            }
            // If flock(2) does not work there, no process holds such a lock.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => return Ok(None),
            Err(error) => return Err(unreadable(path, error.into())),
        }
    }
    Ok(Some((Kind::File, None)))
}

/// On this system it is lockkit's own lock.
#[cfg(not(unix))]
pub(super) fn tried(path: &Path) -> Result<Option<(Kind, Option<u32>)>, Failure> {
    match open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => drop(opened.map_err(|error| unreadable(path, error))?),
    }
    let held = FileLock::new(path)
        .try_lock_shared()
        .is_err_and(|error| error.is_held());
    Ok(held.then_some((Kind::File, None)))
}

pub(crate) fn pidfile(path: &Path) -> Result<Report, Failure> {
    let (state, owner) = match PidFile::inspect(path)? {
        PidStatus::Absent => (State::Free, None),
        PidStatus::Running(owner) => (State::Held, Some(owner)),
        PidStatus::Stale(owner) => (State::Stale, Some(owner)),
        PidStatus::Locked => (State::Held, None),
        // A program may be about to write it.
        PidStatus::Blank { is_free: false, .. } => (State::Held, None),
        PidStatus::Blank { .. } => (State::Free, None),
        PidStatus::Invalid { rule } => {
            return Err(Failure::new(
                code::DATA,
                format!(
                    "{} is not a pidfile: {rule}",
                    plain(&path.display().to_string())
                ),
            ));
        }
    };
    let mut sight = Report::of_path(Kind::Pidfile, path, state);
    sight.holders = owner.iter().map(Holder::new).collect();
    Ok(sight)
}

fn lease(path: &Path) -> Result<Report, Failure> {
    let name_bytes = Report::of_path(Kind::Lease, path, State::Free).name_bytes;
    Ok(Report {
        name_bytes,
        ..of_lease(&Lease::file(path).build()?)?
    })
}

pub(crate) fn of_lease(lease: &Lease) -> Result<Report, Failure> {
    let mut sight = Report::new(Kind::Lease, lease.name(), State::Free);
    if let LeaseStatus::Held(seen) = lease.status()? {
        let over = seen.expires_in().is_some_and(|left| left.is_zero());
        sight.state = if over { State::Stale } else { State::Held };
        sight.holders = seen.owner().into_iter().map(Holder::new).collect();
        sight.token = seen.token();
        sight.expires_in_ms = seen
            .expires_in()
            .map(|left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX));
    }
    Ok(sight)
}

pub(super) fn table(path: &Path) -> Result<Report, Failure> {
    let manager: Box<dyn LockManager> = match path.is_dir() {
        true => Box::new(FileLockManager::open(path)?),
        false => Box::new(ShmLockManager::open(path)?),
    };
    let held = manager.held()?;
    let mut sight = Report::of_path(
        Kind::Table,
        path,
        if held.is_empty() {
            State::Free
        } else {
            State::Held
        },
    );
    sight.holders = held
        .iter()
        .map(|held| Holder::of_lock(held.owner(), held.id()))
        .collect();
    sight.available = manager.available()?;
    Ok(sight)
}
