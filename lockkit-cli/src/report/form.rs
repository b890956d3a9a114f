//! The form of a report: its fields in JSON, and its text.
//!
//! The JSON forms have a version, and are documented in docs/CLI.md. Within a version fields are
//! only added.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::time::SystemTime;

use lockkit::{Liveness, Owner};
use serde::Serialize;

use crate::failure::{Failure, code};
use crate::style::{BAD, GOOD, ODD, TITLE, paint, plain};

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

    pub(super) fn painted(self) -> String {
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
    pub(super) pid: u32,
    pub(super) program: Option<String>,
    pub(super) host: Option<String>,
    /// When it acquired the lock, in RFC 3339.
    pub(super) since: Option<String>,
    pub(super) alive: Option<bool>,
    /// It is alive, keeps the lock, and does nothing until it is continued.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) stopped: bool,
    /// For a table: the number of the lock.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) lock: Option<u32>,
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
        if let Some((_, life)) = owners
            .iter()
            .find(|(known, _)| known.is_same_process(owner))
        {
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
        Self {
            lock: Some(id),
            ..Self::new(owner)
        }
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
    pub(super) name_bytes: Option<Vec<u8>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) scope: Option<&'static str>,
    pub(crate) state: State,
    pub(crate) holders: Vec<Holder>,
    /// The highest possible number of waiters, among those that are visible.
    pub(super) waiters: Option<u32>,
    /// For a lease.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) token: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) expires_in_ms: Option<u64>,
    /// For a table.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) available: Option<u32>,
    /// The reason for an unknown state.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reason: Option<String>,
}

impl Report {
    pub(super) fn new(kind: Kind, name: impl Into<String>, state: State) -> Self {
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
        let kind = if has_pid_extension(path) {
            Kind::Pidfile
        } else {
            Kind::File
        };
        Self {
            reason: Some(failure.message().to_owned()),
            ..Self::of_path(kind, path, State::Unknown)
        }
    }

    pub(super) fn of_path(kind: Kind, path: &Path, state: State) -> Self {
        // If paths are no bytes on this system, these are in the encoding of Rust's library.
        let name_bytes = path
            .to_str()
            .is_none()
            .then(|| path.as_os_str().as_encoded_bytes().to_vec());
        Self {
            name_bytes,
            ..Self::new(kind, path.display().to_string(), state)
        }
    }

    pub(super) fn kind_text(&self) -> String {
        let kind = format!("{:?}", self.kind).to_lowercase();
        match self.scope {
            Some("machine") => format!("{kind} (machine)"),
            _ => kind,
        }
    }

    /// Writes one sentence or more.
    pub(crate) fn show(&self, out: &mut impl Write) -> std::io::Result<()> {
        writeln!(
            out,
            "{} {} is {}",
            self.kind_text(),
            paint(TITLE, plain(&self.name)),
            self.state.painted()
        )?;
        for holder in &self.holders {
            writeln!(
                out,
                "  {}: {}",
                if self.state == State::Stale {
                    "left by"
                } else {
                    "held by"
                },
                holder.text()
            )?;
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
        let mut held = self
            .holders
            .iter()
            .map(Holder::text)
            .collect::<Vec<_>>()
            .join("; ");
        if held.is_empty() {
            held = "-".to_owned();
        }
        let waiters = self
            .waiters
            .map_or("-".to_owned(), |waiters| waiters.to_string());
        if let Some(reason) = &self.reason {
            held = plain(reason);
        }
        [
            self.kind_text(),
            plain(&self.name),
            format!("{:?}", self.state).to_lowercase(),
            waiters,
            held,
        ]
    }
}

/// Writes a JSON form, one line.
pub(crate) fn json(form: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string(form)
        .map_err(|error| Failure::io("write JSON", std::io::Error::from(error)))?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}").map_err(|error| Failure::io("write to the standard output", error))
}

/// Writes text to the standard output, coloured if requested.
pub(crate) fn say(
    write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> Result<(), Failure> {
    let mut out = anstream::stdout().lock();
    write(&mut out).map_err(|error| Failure::io("write to the standard output", error))
}

pub(crate) fn has_pid_extension(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "pid")
}
