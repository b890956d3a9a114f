//! What is known of one lock: its kind, its state and who holds it, as text and as JSON.
//!
//! The JSON forms have a version, and are documented in docs/CLI.md. Within a version fields are only added.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::time::SystemTime;

use lockkit::{
    Backend, FileLock, FileLockManager, Lease, LeaseStatus, Liveness, LockManager, NamedLock, Owner, PidFile,
    PidStatus, Scope, ShmLockManager,
};
use serde::Serialize;

use crate::failure::{Failure, code};
use crate::paint::{BAD, GOOD, ODD, TITLE, paint};
use crate::place::{self, Place, ScopeArgument};

/// The version of the JSON forms.
pub(crate) const VERSION: u32 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    Named,
    File,
    Pidfile,
    Lease,
    Table,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    Free,
    Held,
    /// The one that held it died or ran out of time, and the next to come takes it over.
    Stale,
}

impl State {
    /// What `status` exits with.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Free => 0,
            Self::Held => 1,
            Self::Stale => 2,
        }
    }

    fn painted(self) -> String {
        match self {
            Self::Free => paint(GOOD, "free"),
            Self::Held => paint(ODD, "held"),
            Self::Stale => paint(BAD, "stale"),
        }
    }
}

/// A process that holds a lock.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Holder {
    /// 0 where a pid namespace hides it.
    pid: u32,
    program: Option<String>,
    host: Option<String>,
    /// Since when it holds, in RFC 3339.
    since: Option<String>,
    alive: Option<bool>,
    /// Of a table: which of its locks.
    #[serde(skip_serializing_if = "Option::is_none")]
    lock: Option<u32>,
    #[serde(skip)]
    text: String,
}

impl Holder {
    pub(crate) fn new(owner: &Owner) -> Self {
        let alive = match owner.liveness() {
            Liveness::Alive => Some(true),
            Liveness::Dead => Some(false),
            Liveness::Unknown => None,
        };
        Self {
            pid: owner.pid(),
            program: owner.program().map(str::to_owned),
            host: owner.host().map(str::to_owned),
            since: owner.acquired().map(rfc3339),
            alive,
            lock: None,
            text: owner.describe(),
        }
    }

    pub(crate) fn of_lock(owner: &Owner, id: u32) -> Self {
        Self { lock: Some(id), ..Self::new(owner) }
    }

    pub(crate) fn text(&self) -> String {
        match self.lock {
            Some(id) => format!("lock {id} by {}", self.text),
            None => self.text.clone(),
        }
    }
}

/// With control characters, which anybody can give a file's name, written out: they would reach the terminal.
pub(crate) fn plain(text: &str) -> String {
    let escape = |letter: char| match letter.is_control() {
        true => letter.escape_default().to_string(),
        false => letter.to_string(),
    };
    text.chars().map(escape).collect()
}

fn rfc3339(moment: SystemTime) -> String {
    humantime::format_rfc3339_seconds(moment).to_string()
}

/// What is known of a lock.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Sight {
    pub(crate) kind: Kind,
    pub(crate) name: String,
    /// Of a path that is no text.
    #[serde(skip_serializing_if = "Option::is_none")]
    name_bytes: Option<Vec<u8>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scope: Option<&'static str>,
    pub(crate) state: State,
    pub(crate) holders: Vec<Holder>,
    /// How many wait, at most; of those that can be seen.
    waiters: Option<u32>,
    /// Of a lease.
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_in_ms: Option<u64>,
    /// Of a table.
    #[serde(skip_serializing_if = "Option::is_none")]
    available: Option<u32>,
}

impl Sight {
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
        }
    }

    fn of_path(kind: Kind, path: &Path, state: State) -> Self {
        // Where they are no bytes to the system, they are in the encoding of Rust's library.
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

    /// One sentence or more.
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

    /// What `list` shows of it in columns.
    pub(crate) fn row(&self) -> [String; 5] {
        let mut held = self.holders.iter().map(Holder::text).collect::<Vec<_>>().join("; ");
        if held.is_empty() {
            held = "-".to_owned();
        }
        let waiters = self.waiters.map_or("-".to_owned(), |waiters| waiters.to_string());
        [self.kind_text(), plain(&self.name), format!("{:?}", self.state).to_lowercase(), waiters, held]
    }
}

/// What is known of the lock at `place`.
pub(crate) fn at(place: &Place, scope: ScopeArgument) -> Result<Sight, Failure> {
    match place {
        Place::Lease(lease) => of_lease(lease),
        Place::Name(name) => named(&place::named(name, scope)?),
        Place::Path(path) => {
            let path = place::absolute(path)?;
            match recognised(&path) {
                Some(sight) => sight,
                None => file(&path),
            }
        }
    }
}

/// The state alone, for who asks again and again: asking who holds a name may cost a place in its queue.
pub(crate) fn state(place: &Place, scope: ScopeArgument) -> Result<State, Failure> {
    match place {
        Place::Name(name) => {
            place::named(name, scope)?;
            let held = NamedLock::list(scope.into())?.iter().any(|lock| lock.name() == name);
            Ok(if held { State::Held } else { State::Free })
        }
        Place::Path(_) | Place::Lease(_) => Ok(at(place, scope)?.state),
    }
}

pub(crate) fn named(lock: &NamedLock) -> Result<Sight, Failure> {
    let mut sight = of_named(lock)?;
    // One kept on request in a file is another lock of the same name, looked at when the usual one is free.
    if sight.state == State::Free && lock.backend() != Backend::File {
        let held = NamedLock::list(lock.scope())?;
        let filed = held.iter().find(|other| other.backend() == Backend::File && other.name() == lock.name());
        if let Some(filed) = filed {
            sight = of_named(filed)?;
        }
    }
    Ok(sight)
}

fn of_named(lock: &NamedLock) -> Result<Sight, Failure> {
    let owner = lock.owner()?;
    // Asked for after the owner, whom asking may cost a place in the queue only where there is no record.
    let waiters = lock.waiters()?;
    // A name can be taken by somebody who cannot be looked up.
    let held = owner.is_some()
        || NamedLock::list(lock.scope())?
            .iter()
            .any(|other| (other.name(), other.backend()) == (lock.name(), lock.backend()));
    let mut sight = Sight::new(Kind::Named, lock.name(), if held { State::Held } else { State::Free });
    sight.scope = Some(match lock.scope() {
        Scope::Machine => "machine",
        _ => "user",
    });
    sight.holders = owner.iter().map(Holder::new).collect();
    sight.waiters = Some(waiters);
    Ok(sight)
}

/// A lock whose kind the file at `path` tells; `None` for any other file, and none.
pub(crate) fn recognised(path: &Path) -> Option<Result<Sight, Failure>> {
    let found = std::fs::metadata(path).ok()?;
    if found.is_dir() {
        let begin = beginning(&path.join("next")).unwrap_or_default();
        return begin.starts_with(b"lockkitF").then(|| table(path));
    }
    if !found.is_file() {
        return None;
    }
    match beginning(path)? {
        begin if begin.starts_with(b"lockkit lease ") => Some(lease(path)),
        begin if begin.starts_with(b"lockkitT") => Some(table(path)),
        begin if says_a_pid(&begin) => Some(pidfile(path)),
        _ => None,
    }
}

fn beginning(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(64).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// Whether the first line is a number.
fn says_a_pid(begin: &[u8]) -> bool {
    let line = begin.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = line.trim_ascii();
    (1..=10).contains(&line.len()) && line.iter().all(u8::is_ascii_digit)
}

/// A lock on any file or folder.
pub(crate) fn file(path: &Path) -> Result<Sight, Failure> {
    let lock = FileLock::new(path);
    let holders = lock.holders()?;
    let held = !holders.is_empty() || is_locked_by_somebody_hidden(path);
    let mut sight = Sight::of_path(Kind::File, path, if held { State::Held } else { State::Free });
    sight.holders = holders.iter().map(Holder::new).collect();
    sight.waiters = Some(lock.waiters()?);
    Ok(sight)
}

/// Tries the lock, shared and for a moment, where nothing shows who may have it.
fn is_locked_by_somebody_hidden(path: &Path) -> bool {
    // To open a FIFO would wait for its other end, and a device may do anything when it is opened.
    let is_harmless = std::fs::metadata(path).is_ok_and(|found| found.is_file() || found.is_dir());
    let Some(file) = is_harmless.then(|| File::open(path).ok()).flatten() else { return false };
    #[cfg(unix)]
    let tried = rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockShared);
    #[cfg(unix)]
    return tried == Err(rustix::io::Errno::WOULDBLOCK);
    // flock(2) goes by the file, which one that only reads may open; here it is lockkit's own lock.
    #[cfg(not(unix))]
    return {
        drop(file);
        FileLock::new(path).try_lock_shared().is_err_and(|error| error.is_held())
    };
}

pub(crate) fn pidfile(path: &Path) -> Result<Sight, Failure> {
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
    let mut sight = Sight::of_path(Kind::Pidfile, path, state);
    sight.holders = owner.iter().map(Holder::new).collect();
    if state == State::Held {
        sight.waiters = FileLock::new(path).waiters().ok();
    }
    Ok(sight)
}

pub(crate) fn lease(path: &Path) -> Result<Sight, Failure> {
    let name_bytes = Sight::of_path(Kind::Lease, path, State::Free).name_bytes;
    Ok(Sight { name_bytes, ..of_lease(&Lease::file(path).build()?)? })
}

pub(crate) fn of_lease(lease: &Lease) -> Result<Sight, Failure> {
    let mut sight = Sight::new(Kind::Lease, lease.name(), State::Free);
    if let LeaseStatus::Held(seen) = lease.status()? {
        let over = seen.expires_in().is_some_and(|left| left.is_zero());
        sight.state = if over { State::Stale } else { State::Held };
        sight.holders = seen.owner().into_iter().map(Holder::new).collect();
        sight.token = seen.token();
        sight.expires_in_ms = seen.expires_in().map(|left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX));
    }
    Ok(sight)
}

fn table(path: &Path) -> Result<Sight, Failure> {
    let manager: Box<dyn LockManager> = match path.is_dir() {
        true => Box::new(FileLockManager::open(path)?),
        false => Box::new(ShmLockManager::open(path)?),
    };
    let held = manager.held()?;
    let mut sight = Sight::of_path(Kind::Table, path, if held.is_empty() { State::Free } else { State::Held });
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

/// Writes text to the standard output, coloured where that is wanted.
pub(crate) fn say(write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<(), Failure> {
    let mut out = anstream::stdout().lock();
    write(&mut out).map_err(|error| Failure::io("write to the standard output", error))
}
