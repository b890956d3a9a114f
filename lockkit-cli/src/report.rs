//! The information about one lock: its kind, its state and its holders, as text and as JSON.
//!
//! The JSON forms have a version, and are documented in docs/CLI.md. Within a version fields are only added.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::SystemTime;

#[cfg(not(unix))]
use lockkit::FileLock;
use lockkit::{
    Backend, FileLockManager, HeldNamedLock, Lease, LeaseStatus, Liveness, LockManager, NamedLock, Owner, PidFile,
    PidStatus, Scope, ShmLockManager,
};
use serde::Serialize;

use crate::failure::{Failure, code};
use crate::locks::{FileLocks, LockHolders, LocksOnFile, Owners};
use crate::style::{BAD, GOOD, ODD, TITLE, paint, plain};
use crate::target::{self, ScopeArgument, Target};

/// The version of the JSON forms.
pub(crate) const VERSION: u32 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    Named,
    /// flock(2) on a file or directory.
    File,
    /// fcntl(2) on a file.
    Fcntl,
    Pidfile,
    Lease,
    Table,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    Free,
    Held,
    /// The holder died or its time ran out, and the next process takes the lock over.
    Stale,
    /// It may be held, but this process may not read the evidence.
    Unknown,
}

impl State {
    /// Returns the exit code of `status`.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Free => 0,
            Self::Held => 1,
            Self::Stale => 2,
            Self::Unknown => code::NO_PERMISSION,
        }
    }

    fn painted(self) -> String {
        match self {
            Self::Free => paint(GOOD, "free"),
            Self::Held => paint(ODD, "held"),
            Self::Stale => paint(BAD, "stale"),
            Self::Unknown => paint(ODD, "unknown"),
        }
    }
}

/// A process that holds a lock.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Holder {
    /// 0 if a pid namespace hides it.
    pid: u32,
    program: Option<String>,
    host: Option<String>,
    /// When it acquired the lock, in RFC 3339.
    since: Option<String>,
    alive: Option<bool>,
    /// It is alive, keeps the lock, and does nothing until it is continued.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    stopped: bool,
    /// For a table: the number of the lock.
    #[serde(skip_serializing_if = "Option::is_none")]
    lock: Option<u32>,
    #[serde(skip)]
    pub(crate) owner: Owner,
}

/// Whether a process is alive, and whether it is stopped.
type Life = (Option<bool>, bool);

thread_local! {
    /// The lives of the checked owners, by pid: many locks may have one holder.
    static KNOWN: RefCell<HashMap<u32, Vec<(Owner, Life)>>> = RefCell::default();
}

/// Checks each process once.
fn life(owner: &Owner) -> Life {
    KNOWN.with_borrow_mut(|known| {
        let owners = known.entry(owner.pid()).or_default();
        if let Some((_, life)) = owners.iter().find(|(known, _)| known.is_same_process(owner)) {
            return *life;
        }
        let alive = match owner.liveness() {
            Liveness::Alive => Some(true),
            Liveness::Dead => Some(false),
            Liveness::Unknown => None,
        };
        let life = (alive, owner.is_stopped());
        owners.push((owner.clone(), life));
        life
    })
}

impl Holder {
    pub(crate) fn new(owner: &Owner) -> Self {
        let (alive, stopped) = life(owner);
        Self {
            pid: owner.pid(),
            program: owner.program().map(str::to_owned),
            host: owner.host().map(str::to_owned),
            since: owner.acquired().map(rfc3339),
            alive,
            stopped,
            lock: None,
            owner: owner.clone(),
        }
    }

    pub(crate) fn of_lock(owner: &Owner, id: u32) -> Self {
        Self { lock: Some(id), ..Self::new(owner) }
    }

    pub(crate) fn text(&self) -> String {
        let stopped = if self.stopped { ", stopped" } else { "" };
        match self.lock {
            Some(id) => format!("lock {id} by {}{stopped}", self.owner.describe()),
            None => format!("{}{stopped}", self.owner.describe()),
        }
    }
}

fn rfc3339(moment: SystemTime) -> String {
    humantime::format_rfc3339_seconds(moment).to_string()
}

/// The information about a lock.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) kind: Kind,
    pub(crate) name: String,
    /// For a path that is no text.
    #[serde(skip_serializing_if = "Option::is_none")]
    name_bytes: Option<Vec<u8>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scope: Option<&'static str>,
    pub(crate) state: State,
    pub(crate) holders: Vec<Holder>,
    /// The highest possible number of waiters, among those that are visible.
    waiters: Option<u32>,
    /// For a lease.
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_in_ms: Option<u64>,
    /// For a table.
    #[serde(skip_serializing_if = "Option::is_none")]
    available: Option<u32>,
    /// The reason for an unknown state.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

impl Report {
    fn new(kind: Kind, name: impl Into<String>, state: State) -> Self {
        Self {
            kind,
            name: name.into(),
            name_bytes: None,
            scope: None,
            state,
            holders: Vec::new(),
            waiters: None,
            token: None,
            expires_in_ms: None,
            available: None,
            reason: None,
        }
    }

    /// Returns a report of the lock at `path` if it is unknown whether the lock is held.
    pub(crate) fn unknown(path: &Path, failure: &Failure) -> Self {
        let kind = if has_pid_extension(path) { Kind::Pidfile } else { Kind::File };
        Self { reason: Some(failure.message().to_owned()), ..Self::of_path(kind, path, State::Unknown) }
    }

    fn of_path(kind: Kind, path: &Path, state: State) -> Self {
        // If paths are no bytes on this system, these are in the encoding of Rust's library.
        let name_bytes = path.to_str().is_none().then(|| path.as_os_str().as_encoded_bytes().to_vec());
        Self { name_bytes, ..Self::new(kind, path.display().to_string(), state) }
    }

    fn kind_text(&self) -> String {
        let kind = format!("{:?}", self.kind).to_lowercase();
        match self.scope {
            Some("machine") => format!("{kind} (machine)"),
            _ => kind,
        }
    }

    /// Writes one sentence or more.
    pub(crate) fn show(&self, out: &mut impl Write) -> std::io::Result<()> {
        writeln!(out, "{} {} is {}", self.kind_text(), paint(TITLE, plain(&self.name)), self.state.painted())?;
        for holder in &self.holders {
            writeln!(out, "  {}: {}", if self.state == State::Stale { "left by" } else { "held by" }, holder.text())?;
        }
        if let (State::Held, true) = (self.state, self.holders.is_empty()) {
            writeln!(out, "  held by a process that cannot be seen from here")?;
        }
        if let Some(waiters) = self.waiters.filter(|waiters| *waiters > 0) {
            writeln!(out, "  waiters: {waiters}")?;
        }
        if let Some(token) = self.token {
            writeln!(out, "  token: {token}")?;
        }
        if let Some(left) = self.expires_in_ms.filter(|_| self.state == State::Held) {
            writeln!(out, "  runs out unless renewed: in {left} ms")?;
        }
        if let Some(available) = self.available {
            writeln!(out, "  locks left to allocate: {available}")?;
        }
        Ok(())
    }

    /// Returns the columns of `list`.
    pub(crate) fn row(&self) -> [String; 5] {
        let mut held = self.holders.iter().map(Holder::text).collect::<Vec<_>>().join("; ");
        if held.is_empty() {
            held = "-".to_owned();
        }
        let waiters = self.waiters.map_or("-".to_owned(), |waiters| waiters.to_string());
        if let Some(reason) = &self.reason {
            held = plain(reason);
        }
        [self.kind_text(), plain(&self.name), format!("{:?}", self.state).to_lowercase(), waiters, held]
    }
}

/// Returns the report of the lock at `place`. `locks` reads the kernel's information about locked files if it is
/// needed.
pub(crate) fn at(place: &Target, scope: ScopeArgument, locks: impl FnOnce() -> FileLocks) -> Result<Report, Failure> {
    match place {
        Target::Lease(lease) => of_lease(lease),
        Target::Name(name) => named(&target::named_or_file(name, scope)?),
        Target::Path(path) => at_path(&target::absolute(path)?, &locks()),
    }
}

/// Returns the report for an absolute path, as [`at`] does.
pub(crate) fn at_path(path: &Path, locks: &FileLocks) -> Result<Report, Failure> {
    match recognised(path, locks, true)? {
        Some(sight) => Ok(sight),
        None => file(path, locks),
    }
}

/// A lock whose state is read repeatedly: cheaply, and without blocking other processes.
pub(crate) struct Watched<'p> {
    place: &'p Target,
    scope: ScopeArgument,
    /// For a path. Kept, because a lease of another host counts as expired once it was seen unchanged for long enough.
    lease: Option<Lease>,
}

impl<'p> Watched<'p> {
    pub(crate) fn new(place: &'p Target, scope: ScopeArgument) -> Self {
        Self { place, scope, lease: None }
    }

    pub(crate) fn state(&mut self) -> Result<State, Failure> {
        let path = match self.place {
            Target::Name(name) => {
                let usual = target::named_or_file(name, self.scope)?;
                // A lock that is kept in a file on request is another lock of the same name.
                let held = usual.is_held()? || filed(name, self.scope.into())?.is_held()?;
                return Ok(if held { State::Held } else { State::Free });
            }
            Target::Lease(lease) => return Ok(of_lease(lease)?.state),
            Target::Path(path) => target::absolute(path)?,
        };
        match found_at(&path)? {
            Found::Missing => Ok(State::Free),
            Found::Lease => {
                let lease = match &self.lease {
                    Some(lease) => lease,
                    None => self.lease.insert(Lease::file(&path).build()?),
                };
                Ok(of_lease(lease)?.state)
            }
            Found::Table => Ok(table(&path)?.state),
            Found::Pidfile => Ok(pidfile(&path)?.state),
            Found::Number(_) => match pidfile(&path)?.state {
                State::Held => Ok(State::Held),
                state => Ok(if tried(&path)?.is_some() { State::Held } else { state }),
            },
            Found::Plain => Ok(if tried(&path)?.is_some() { State::Held } else { State::Free }),
            Found::Special => Ok(file(&path, &FileLocks::read_table())?.state),
        }
    }
}

fn filed(name: &str, scope: Scope) -> Result<NamedLock, Failure> {
    Ok(NamedLock::builder(name).scope(scope).backend(Backend::File).build()?)
}

pub(crate) fn named(lock: &NamedLock) -> Result<Report, Failure> {
    let sight = of_named(lock)?;
    if sight.state == State::Free && lock.backend() != Backend::File {
        let filed = filed(lock.name(), lock.scope())?;
        if filed.is_held()? {
            return of_named(&filed);
        }
    }
    Ok(sight)
}

/// Returns the report of one of a list of held locks, or `None` if the lock is known to be released meanwhile.
pub(crate) fn of_held(held: &HeldNamedLock) -> Option<Report> {
    let mut sight = with_owner(held.lock(), State::Held, held.owner());
    if held.owner().is_none() {
        // Without a record the kernel may know more.
        match of_named(held.lock()) {
            Ok(asked) if asked.state == State::Free => return None,
            Ok(asked) => sight.holders = asked.holders,
            // The lock is held by a process that cannot be queried.
            Err(_) => {}
        }
    }
    sight.waiters = Some(held.waiters());
    Some(sight)
}

fn with_owner(lock: &NamedLock, state: State, owner: Option<&Owner>) -> Report {
    let mut sight = Report::new(Kind::Named, lock.name(), state);
    sight.scope = Some(match lock.scope() {
        Scope::Machine => "machine",
        _ => "user",
    });
    sight.holders = owner.map(Holder::new).into_iter().collect();
    sight
}

/// Returns the report of the lock of this backend only.
fn of_named(lock: &NamedLock) -> Result<Report, Failure> {
    let owner = lock.owner()?;
    // A name can be held by a process that cannot be looked up.
    let held = owner.is_some() || lock.is_held()?;
    let mut sight = with_owner(lock, if held { State::Held } else { State::Free }, owner.as_ref());
    // Read after the owner. Reading the owner may take a place in the queue only if there is no record.
    sight.waiters = lock.waiters().ok();
    Ok(sight)
}

/// The kind of file at a path.
enum Found {
    Missing,
    Lease,
    Table,
    Pidfile,
    /// A file that contains only a number: a pidfile, unless a process with another pid has it locked.
    Number(u32),
    /// Any other file, or a directory.
    Plain,
    /// A FIFO, a socket or a device: opening it could wait for its other end, or have any effect.
    Special,
}

/// Determines the kind of file at `path`. An unreadable file may be any lock, so that is an error.
fn found_at(path: &Path) -> Result<Found, Failure> {
    let unreadable = |error| unreadable(path, error);
    let found = match std::fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => match path.is_symlink() {
            true => {
                let message = format!("{} is a symbolic link to a file that does not exist", path.display());
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
        begin if begin.starts_with(b"lockkit lease ") || was_lease(path, begin, &file) => Found::Lease,
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

/// Opens a file for reading that was no FIFO or device when it was checked. Does not wait if it has become one.
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
    let has_extension = path.extension().is_some_and(|extension| extension == "lease");
    begin.iter().all(|byte| *byte == 0)
        && (has_extension || !begin.is_empty() && file.metadata().is_ok_and(|found| found.len() == RECORD))
}

/// Whether the file is a pidfile by lockkit's mark, which earlier versions wrote after the pid.
fn is_own(begin: &[u8], file: &File) -> bool {
    const OLD_MARK: &[u8] = b"\nlockkit 1\n";
    let digits = begin.iter().take_while(|byte| byte.is_ascii_digit()).count();
    digits > 0 && (begin[digits..].starts_with(OLD_MARK) || PidFile::has_owner_identity(file))
}

/// Returns the pid if it is the whole content of the file.
fn number(begin: &[u8], file: &File) -> Option<u32> {
    // No system gives out a greater pid: `PID_MAX_LIMIT` on Linux.
    const MAX_PID: u32 = 1 << 22;
    let text = std::str::from_utf8(begin).ok()?;
    let digits = text.strip_suffix('\n').unwrap_or(text);
    let number = digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok()).flatten()?;
    let is_whole = file.metadata().is_ok_and(|found| found.len() == begin.len() as u64);
    (is_whole && (1..=MAX_PID).contains(&number)).then_some(number)
}

pub(crate) fn has_pid_extension(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "pid")
}

/// Returns the report of a lock whose kind the file at `path` shows, or `None` for any other file and for none. `guess`
/// decides whether a file that contains just a number counts as a pidfile.
pub(crate) fn recognised(path: &Path, locks: &FileLocks, guess: bool) -> Result<Option<Report>, Failure> {
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
                // If a process with another pid has the file locked, the number is data that the lock guards.
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
fn file(path: &Path, locks: &FileLocks) -> Result<Report, Failure> {
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
                    format!("cannot tell whether {} is held: /proc/locks cannot be read: {error}", path.display()),
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
pub(crate) fn locked(path: &Path, on: &LocksOnFile, owners: &Owners) -> impl Iterator<Item = Report> {
    let sight = |kind, locked: &LockHolders| {
        let mut sight = Report::of_path(kind, path, State::Held);
        sight.holders = locked.pids.iter().filter_map(|pid| owners.of(*pid)).map(|owner| Holder::new(&owner)).collect();
        sight.waiters = Some(locked.waiters);
        sight
    };
    let flock = on.flock.as_ref().map(|locked| sight(Kind::File, locked));
    flock.into_iter().chain(on.fcntl.as_ref().map(|locked| sight(Kind::Fcntl, locked)))
}

/// Tests whether a process has the file or directory locked. Returns the kind, and the pid if it is known. A failed try
/// acquires nothing. A successful try holds the lock for a moment, exclusively, because otherwise it would not detect a
/// shared lock.
#[cfg(unix)]
fn tried(path: &Path) -> Result<Option<(Kind, Option<u32>)>, Failure> {
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
    // The try of another process looks like a holder, so only several failed tries count as a holder.
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
fn tried(path: &Path) -> Result<Option<(Kind, Option<u32>)>, Failure> {
    match open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => drop(opened.map_err(|error| unreadable(path, error))?),
    }
    let held = FileLock::new(path).try_lock_shared().is_err_and(|error| error.is_held());
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
                format!("{} is not a pidfile: {rule}", plain(&path.display().to_string())),
            ));
        }
    };
    let mut sight = Report::of_path(Kind::Pidfile, path, state);
    sight.holders = owner.iter().map(Holder::new).collect();
    Ok(sight)
}

fn lease(path: &Path) -> Result<Report, Failure> {
    let name_bytes = Report::of_path(Kind::Lease, path, State::Free).name_bytes;
    Ok(Report { name_bytes, ..of_lease(&Lease::file(path).build()?)? })
}

pub(crate) fn of_lease(lease: &Lease) -> Result<Report, Failure> {
    let mut sight = Report::new(Kind::Lease, lease.name(), State::Free);
    if let LeaseStatus::Held(seen) = lease.status()? {
        let over = seen.expires_in().is_some_and(|left| left.is_zero());
        sight.state = if over { State::Stale } else { State::Held };
        sight.holders = seen.owner().into_iter().map(Holder::new).collect();
        sight.token = seen.token();
        sight.expires_in_ms = seen.expires_in().map(|left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX));
    }
    Ok(sight)
}

fn table(path: &Path) -> Result<Report, Failure> {
    let manager: Box<dyn LockManager> = match path.is_dir() {
        true => Box::new(FileLockManager::open(path)?),
        false => Box::new(ShmLockManager::open(path)?),
    };
    let held = manager.held()?;
    let mut sight = Report::of_path(Kind::Table, path, if held.is_empty() { State::Free } else { State::Held });
    sight.holders = held.iter().map(|held| Holder::of_lock(held.owner(), held.id())).collect();
    sight.available = manager.available()?;
    Ok(sight)
}

/// Writes a JSON form, one line.
pub(crate) fn json(form: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string(form).map_err(|error| Failure::io("write JSON", std::io::Error::from(error)))?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}").map_err(|error| Failure::io("write to the standard output", error))
}

/// Writes text to the standard output, coloured if requested.
pub(crate) fn say(write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<(), Failure> {
    let mut out = anstream::stdout().lock();
    write(&mut out).map_err(|error| Failure::io("write to the standard output", error))
}
