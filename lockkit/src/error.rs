//! What can go wrong, in one type.
//!
//! [`Error`] is one word wide, so that a `Result` with a guard costs no more than the guard; what happened stands
//! behind it in [`ErrorKind`]. Programs mostly ask the predicates ([`Error::is_held`] and its like); messages say
//! which lock, who holds it and since when, and what the system said.
//!
//! `Display` includes the cause, so that `println!("{error}")` says what the system said. The causes are therefore not
//! repeated by `source()`: reporters that print the whole chain would print them twice.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::lease::{LossReason, StoreError};
use crate::owner::{Owner, spoken};

/// The result of everything in lockkit that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a lock was not taken, released or looked at.
///
/// ```
/// # fn main() -> lockkit::Result<()> {
/// let lock = lockkit::NamedLock::new("lockkit-doc-error")?;
/// let guard = lock.lock()?;
/// let error = lock.try_lock().unwrap_err();
/// assert!(error.is_held() && error.is_temporary());
/// assert_eq!(error.owner().unwrap().pid(), std::process::id());
/// # Ok(()) }
/// ```
///
/// What a caller does with it:
///
/// ```
/// use lockkit::ErrorKind;
///
/// fn explain(error: &lockkit::Error) -> String {
///     match error.kind() {
///         ErrorKind::Held { .. } => "try again later".to_owned(),
///         ErrorKind::InvalidName { rule, .. } => format!("choose another name: {rule}"),
///         _ if error.is_timeout() || error.is_cancelled() => "somebody had no patience".to_owned(),
///         _ => error.to_string(), // A sentence that includes the cause.
///     }
/// }
/// # assert!(explain(&lockkit::NamedLock::new("1").unwrap_err()).starts_with("choose"));
/// ```
pub struct Error(Box<ErrorKind>);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// The sentence of `Display`, followed by the causes that it leaves out: `main` and `unwrap` print it. `{:#?}` prints the
/// fields of the error.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match f.alternate() {
            true => f.debug_tuple("Error").field(&self.0).finish(),
            false => f.write_str(&chain(self)),
        }
    }
}

impl std::error::Error for Error {
    /// The first cause that `Display` does not include.
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self.kind() {
            ErrorKind::Io { source, .. } => source.source(),
            ErrorKind::Store { .. } => None,
            kind => kind.source(),
        }
    }
}

/// The error and its causes, joined by colons.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// What happened; the example of [`Error`] matches on it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Somebody else holds the lock, and the caller did not want to wait.
    #[error("{lock} is held{}", by(.owner))]
    Held {
        /// Which lock, for people: its kind and its name.
        lock: String,
        /// Who holds it, where that is known.
        owner: Option<Box<Owner>>,
        /// The program's own word for it, of a lease that has one
        /// ([`held_error`](crate::LeaseBuilder::held_error)).
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The lock was still held when the time to wait was over.
    #[error("{lock} was still held{} after waiting {}", by(.owner), spoken(*.waited))]
    Timeout {
        /// Which lock, for people: its kind and its name.
        lock: String,
        /// How long the caller has waited.
        waited: Duration,
        /// Who holds it, where that is known.
        owner: Option<Box<Owner>>,
    },
    /// The [`CancelToken`](crate::CancelToken) of the wait was cancelled before the lock was taken.
    #[error("waiting for {lock} was cancelled")]
    Cancelled {
        /// Which lock, for people: its kind and its name.
        lock: String,
    },
    /// A name that breaks the rule of lock names.
    #[error("invalid lock name {name:?}: {rule}")]
    InvalidName {
        /// The name, cut to its first 80 characters.
        name: String,
        /// The rule that it breaks.
        rule: &'static str,
    },
    /// A path that does not start at the root: it would name another file after a change of the working directory, as
    /// daemons make one.
    #[error("invalid path {}: it must begin at the root", .path.display())]
    RelativePath {
        /// The path.
        path: PathBuf,
    },
    /// A pidfile was expected at the path, but the file contains no pid in a form that programs write. The file is
    /// unchanged.
    #[error("{} is not a pidfile: {rule}; it begins with \"{text}\"", .path.display())]
    NotAPidFile {
        /// The file.
        path: PathBuf,
        /// The beginning of its first line, escaped.
        text: String,
        /// The rule that it breaks.
        rule: &'static str,
    },
    /// A lease was expected at the path, but the file is something else. The file is unchanged.
    #[error("{} is not a lease: it begins with \"{text}\"; name a file that does not exist, or an empty one", .path.display())]
    NotALease {
        /// The file.
        path: PathBuf,
        /// The beginning of its first line, escaped.
        text: String,
    },
    /// Another user sits on the name, or owns the directory in which the lock must live, and is not trusted with it.
    #[error("{lock} is occupied by another user: uid {uid}{}; only that user or root can give it up", of_pid(*.pid))]
    ForeignOwner {
        /// Which lock or directory.
        lock: String,
        /// The other user.
        uid: u32,
        /// The other user's process, where it is known.
        pid: Option<u32>,
    },
    /// A directory or file in which a lock must live could be tampered with by other users, and is not used.
    #[error("{} is not safe to keep locks in: {problem}", .path.display())]
    Insecure {
        /// The directory or file.
        path: PathBuf,
        /// What is wrong with it and what would mend it.
        problem: &'static str,
    },
    /// The file was deleted or replaced again and again while the lock on it was being taken, or while it was held.
    #[error("{} was deleted or replaced by another process while its lock was in use", .path.display())]
    RogueDeletion {
        /// The file.
        path: PathBuf,
    },
    /// Every lock of a table is allocated.
    #[error("{table} has no lock left to allocate: {allocated} of {capacity} are allocated")]
    Exhausted {
        /// Which table.
        table: String,
        /// How many locks it has.
        capacity: u32,
        /// How many of them are allocated.
        allocated: u32,
    },
    /// A number beyond the end of a table of locks.
    #[error("{table} has no lock {id}: its capacity is {capacity}")]
    NoSuchLock {
        /// Which table.
        table: String,
        /// The number.
        id: u32,
        /// How many locks the table has; they are numbered from 0.
        capacity: u32,
    },
    /// The lock with this number is allocated already.
    #[error("{lock} is allocated already")]
    AlreadyAllocated {
        /// Which lock, for people.
        lock: String,
    },
    /// A lock was freed that is not allocated.
    #[error("{lock} is not allocated, so it cannot be freed")]
    NotAllocated {
        /// Which lock, for people.
        lock: String,
    },
    /// A lock was unlocked that this process does not hold.
    #[error("{lock} is not locked by this process, so it cannot be unlocked")]
    NotLocked {
        /// Which lock, for people.
        lock: String,
    },
    /// A file is not laid out as this version of lockkit has it. One of a table of locks is something else, cut short,
    /// or made by another version or for another kind of machine; one of a lease was written by a later version, or contains
    /// the largest fencing token.
    #[error("cannot use {}: {problem}", .path.display())]
    LayoutMismatch {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        problem: &'static str,
    },
    /// An option of a lease that cannot be, alone or together with the others.
    #[error("invalid {option}: {problem}")]
    InvalidOption {
        /// The method of the builder.
        option: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// A URL of a lease is not right.
    #[error("invalid URL {url}: {problem}")]
    InvalidUrl {
        /// It, without its credentials and parameters.
        url: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A lease is not held any more.
    #[error("{lock} is lost: {reason}")]
    LeaseLost {
        /// Which lease, for people.
        lock: String,
        /// Why.
        reason: LossReason,
    },
    /// The store of a lease did not do what it was asked, again and again.
    #[error("cannot reach {lock}: {source}")]
    Store {
        /// Which lease, for people.
        lock: String,
        /// What the store said the last time.
        source: StoreError,
    },
    /// The first instance of a program did not answer an activation within the time to wait: it hangs, is stopped, or
    /// takes none. It may still handle it if it had taken it already; what it had not is dropped.
    #[error("{first} did not answer within {}{}", spoken(*.waited), running(.owner))]
    NoAnswer {
        /// Which instance, for people.
        first: String,
        /// How long the caller has waited.
        waited: Duration,
        /// The process that is first, where it is known.
        owner: Option<Box<Owner>>,
    },
    /// The first instance of a program has said that it did not handle an activation, or has answered what this one
    /// does not understand, or has broken off its answer: then it may have handled it.
    #[error("{first} has not answered the activation: {problem}")]
    NotHandled {
        /// Which instance, for people.
        first: String,
        /// Why.
        problem: &'static str,
    },
    /// An activation or its answer is larger than can be sent. Nothing was sent.
    #[error("invalid size of {what}: {size} bytes; at most {most} are allowed")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// How many bytes it has.
        size: usize,
        /// The most that can be sent.
        most: usize,
    },
    /// A table of locks was to be made with no locks, or with more than the largest table has.
    #[error("a lock table has 1 to {most} locks, not {capacity}")]
    InvalidCapacity {
        /// What was asked for.
        capacity: u32,
        /// The most that can be had.
        most: u32,
    },
    /// As many processes as can share a table of locks have it open already.
    #[error("{table} is in use by {most} processes, and has no place for another")]
    TooManyProcesses {
        /// Which table.
        table: String,
        /// How many can share it.
        most: u32,
    },
    /// This system has no such thing, or none that could keep the promise; or lockkit was built without the feature
    /// that it needs.
    #[error("{what} is not supported here")]
    Unsupported {
        /// The thing asked for.
        what: &'static str,
    },
    /// The system refused something that the lock needs.
    ///
    /// A write beyond the limit of file sizes (`RLIMIT_FSIZE`, `ulimit -f`) is such an error only in a program that
    /// ignores or handles `SIGXFSZ`. Rust programs do not by default, so the signal ends them, as it does at every
    /// other write; what they held is then free like that of any process that died. lockkit changes no signal's
    /// handling.
    #[error("cannot {action} {}: {source}", .path.display())]
    Io {
        /// What was attempted, as a verb: "open", "bind".
        action: &'static str,
        /// On what. Abstract sockets are written with a leading `@`, as `ss` and `netstat` do.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

fn by(owner: &Option<Box<Owner>>) -> String {
    owner.as_ref().map(|owner| format!(" by {}", owner.describe())).unwrap_or_default()
}

fn running(owner: &Option<Box<Owner>>) -> String {
    owner.as_ref().map(|owner| format!("; it is {}", owner.describe())).unwrap_or_default()
}

fn of_pid(pid: Option<u32>) -> String {
    pid.map(|pid| format!(", pid {pid}")).unwrap_or_default()
}

impl Error {
    /// What happened, to match on.
    pub fn kind(&self) -> &ErrorKind {
        &self.0
    }

    /// Somebody else holds the lock, and the call did not wait.
    pub fn is_held(&self) -> bool {
        matches!(self.kind(), ErrorKind::Held { .. })
    }

    /// The time to wait was over before the lock came free, or before the first instance answered.
    pub fn is_timeout(&self) -> bool {
        matches!(self.kind(), ErrorKind::Timeout { .. } | ErrorKind::NoAnswer { .. })
    }

    /// The wait was cancelled.
    pub fn is_cancelled(&self) -> bool {
        matches!(self.kind(), ErrorKind::Cancelled { .. })
    }

    /// Trying again after a short sleep may well succeed: the lock was held, or the wait for it ran out.
    pub fn is_temporary(&self) -> bool {
        self.is_held() || self.is_timeout()
    }

    /// Who holds the lock, where the error is about that and it is known.
    pub fn owner(&self) -> Option<&Owner> {
        match self.kind() {
            ErrorKind::Held { owner, .. } | ErrorKind::Timeout { owner, .. } | ErrorKind::NoAnswer { owner, .. } => {
                owner.as_deref()
            }
            _ => None,
        }
    }

    pub(crate) fn is_io(&self, kind: io::ErrorKind) -> bool {
        matches!(self.kind(), ErrorKind::Io { source, .. } if source.kind() == kind)
    }

    pub(crate) fn io(action: &'static str, path: impl AsRef<Path>, source: impl Into<io::Error>) -> Self {
        ErrorKind::Io { action, path: path.as_ref().to_owned(), source: source.into() }.into()
    }
}

impl From<ErrorKind> for Error {
    fn from(kind: ErrorKind) -> Self {
        Self(Box::new(kind))
    }
}

/// A held lock is `WouldBlock`, a wait that ran out `TimedOut`, a cancelled one `Interrupted`; what came from the
/// system keeps its kind. The lockkit error stays reachable through `get_ref`.
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match error.kind() {
            ErrorKind::Held { .. } => io::ErrorKind::WouldBlock,
            ErrorKind::Timeout { .. } | ErrorKind::NoAnswer { .. } => io::ErrorKind::TimedOut,
            ErrorKind::Cancelled { .. } => io::ErrorKind::Interrupted,
            ErrorKind::InvalidName { .. } | ErrorKind::RelativePath { .. } => io::ErrorKind::InvalidInput,
            ErrorKind::NotAPidFile { .. } | ErrorKind::NotALease { .. } => io::ErrorKind::InvalidData,
            ErrorKind::ForeignOwner { .. } | ErrorKind::Insecure { .. } => io::ErrorKind::PermissionDenied,
            ErrorKind::RogueDeletion { .. } | ErrorKind::NoSuchLock { .. } => io::ErrorKind::NotFound,
            ErrorKind::Exhausted { .. } | ErrorKind::TooManyProcesses { .. } => io::ErrorKind::QuotaExceeded,
            ErrorKind::AlreadyAllocated { .. } => io::ErrorKind::AlreadyExists,
            ErrorKind::NotAllocated { .. } | ErrorKind::NotLocked { .. } => io::ErrorKind::InvalidInput,
            ErrorKind::InvalidCapacity { .. } => io::ErrorKind::InvalidInput,
            ErrorKind::LayoutMismatch { .. } => io::ErrorKind::InvalidData,
            ErrorKind::InvalidOption { .. } | ErrorKind::InvalidUrl { .. } => io::ErrorKind::InvalidInput,
            ErrorKind::LeaseLost { .. } | ErrorKind::Store { .. } | ErrorKind::NotHandled { .. } => {
                io::ErrorKind::Other
            }
            ErrorKind::TooLarge { .. } => io::ErrorKind::InvalidInput,
            ErrorKind::Unsupported { .. } => io::ErrorKind::Unsupported,
            ErrorKind::Io { source, .. } => source.kind(),
        };
        Self::new(kind, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_word_wide() {
        assert_eq!(size_of::<Error>(), size_of::<usize>());
        assert_eq!(size_of::<Result<()>>(), size_of::<usize>());
    }

    #[test]
    fn display_and_debug_include_the_cause_once() {
        let error = Error::io("open", "/x", io::Error::from(io::ErrorKind::NotFound));
        assert_eq!(error.to_string(), "cannot open /x: entity not found");
        assert_eq!(format!("{error:?}"), "cannot open /x: entity not found");
        assert!(format!("{error:#?}").starts_with("Error(\n    Io {"));
    }

    #[test]
    fn an_io_error_keeps_the_kind_the_message_and_the_cause() {
        let error = Error::io("open", "/x", io::Error::from(io::ErrorKind::NotFound));
        let io: io::Error = error.into();
        assert_eq!(io.kind(), io::ErrorKind::NotFound);
        assert_eq!(io.to_string(), "cannot open /x: entity not found");
        let ours = io.get_ref().and_then(|inner| inner.downcast_ref::<Error>()).unwrap();
        assert!(matches!(ours.kind(), ErrorKind::Io { source, .. } if source.kind() == io::ErrorKind::NotFound));
    }
}
