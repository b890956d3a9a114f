//! The error type of the crate.
//!
//! [`Error`] is one word wide, so that a `Result` with a guard costs no more than the guard; the
//! details are in a boxed [`ErrorKind`]. Programs mostly use the predicates, such as
//! [`Error::is_held`]. Messages name the lock, its holder, the time of its acquisition, and the
//! system's error.
//!
//! `Display` includes the cause, so that `println!("{error}")` prints the system's error. Therefore
//! `source()` does not repeat these causes: reporters that print the whole chain would print them
//! twice.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::base::owner::{Owner, format_duration};

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// The result of every fallible operation in lockkit.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The reason why a lock was not acquired, released or checked.
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
/// How a caller handles an error:
///
/// ```
/// use lockkit::ErrorKind;
///
/// fn explain(error: &lockkit::Error) -> String {
///     match error.kind() {
///         ErrorKind::Held { .. } => "try again later".to_owned(),
///         ErrorKind::InvalidName { rule, .. } => format!("choose another name: {rule}"),
///         _ if error.is_timeout() || error.is_cancelled() => "the wait has ended".to_owned(),
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

/// Formats the sentence of `Display`, followed by the causes that it leaves out: `main` and
/// `unwrap` print it. `{:#?}` prints the fields of the error.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match f.alternate() {
            true => f.debug_tuple("Error").field(&self.0).finish(),
            false => f.write_str(&chain(self)),
        }
    }
}

impl std::error::Error for Error {
    /// Returns the first cause that `Display` does not include.
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self.kind() {
            ErrorKind::Io { source, .. } => source.source(),
            ErrorKind::Store { .. } => None,
            kind => kind.source(),
        }
    }
}

/// Returns the error and its causes, joined by colons.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

/// The kind of an error; the example of [`Error`] matches on it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Another holder has the lock, and the caller did not wait.
    #[error("{lock} is held{}", by(.owner))]
    Held {
        /// The lock, for people: its kind and its name.
        lock: String,
        /// The holder, where it is known.
        owner: Option<Box<Owner>>,
        /// The program's own error, for a lease that has one
        /// ([`held_error`](crate::LeaseBuilder::held_error)).
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The lock was still held at the end of the wait.
    #[error("{lock} was still held{} after waiting {}", by(.owner), format_duration(*.waited))]
    Timeout {
        /// The lock, for people: its kind and its name.
        lock: String,
        /// How long the caller has waited.
        waited: Duration,
        /// The holder, where it is known.
        owner: Option<Box<Owner>>,
    },
    /// The [`CancelToken`](crate::CancelToken) of the wait was cancelled before the lock was
    /// acquired.
    #[error("waiting for {lock} was cancelled")]
    Cancelled {
        /// The lock, for people: its kind and its name.
        lock: String,
    },
    /// A name violates the rule of lock names.
    #[error("invalid lock name {name:?}: {rule}")]
    InvalidName {
        /// The name, cut to its first 80 characters.
        name: String,
        /// The rule that it violates.
        rule: &'static str,
    },
    /// A path is not absolute. It would name another file after a change of the working directory,
    /// which daemons make.
    #[error("invalid path {}: it must begin at the root", .path.display())]
    RelativePath {
        /// The path.
        path: PathBuf,
    },
    /// A pidfile was expected at the path, but the file contains no pid in a form that programs
    /// write. The file is unchanged.
    #[error("{} is not a pidfile: {rule}; it begins with \"{text}\"", .path.display())]
    NotAPidFile {
        /// The file.
        path: PathBuf,
        /// The beginning of its first line, escaped.
        text: String,
        /// The rule that it violates.
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
    /// Another user, which is not trusted with the lock, occupies its name or owns the directory
    /// that must contain it.
    #[error("{lock} is occupied by another user: uid {uid}{}; only that user or root can give it up", of_pid(*.pid))]
    ForeignOwner {
        /// The lock or directory.
        lock: String,
        /// The other user.
        uid: u32,
        /// The other user's process, where it is known.
        pid: Option<u32>,
    },
    /// Other users could change a directory or file that must contain a lock, so it is not used.
    #[error("{} is not safe to keep locks in: {problem}", .path.display())]
    Insecure {
        /// The directory or file.
        path: PathBuf,
        /// The problem, and how to fix it.
        problem: &'static str,
    },
    /// The file was deleted or replaced repeatedly during the acquisition of its lock, or while the
    /// lock was held.
    #[error("{} was deleted or replaced by another process while its lock was in use", .path.display())]
    RogueDeletion {
        /// The file.
        path: PathBuf,
    },
    /// Every lock of a table is allocated.
    #[error("cannot allocate a lock of {table}: {allocated} of {capacity} are allocated")]
    Exhausted {
        /// The table.
        table: String,
        /// How many locks it has.
        capacity: u32,
        /// How many of them are allocated.
        allocated: u32,
    },
    /// A number beyond the end of a table of locks.
    #[error("{table} has no lock {id}: its capacity is {capacity}")]
    NoSuchLock {
        /// The table.
        table: String,
        /// The number.
        id: u32,
        /// How many locks the table has; they are numbered from 0.
        capacity: u32,
    },
    /// The lock with this number is allocated already.
    #[error("cannot allocate {lock}: it is allocated already")]
    AlreadyAllocated {
        /// The lock, for people.
        lock: String,
    },
    /// A lock was to be freed that is not allocated.
    #[error("cannot free {lock}: it is not allocated")]
    NotAllocated {
        /// The lock, for people.
        lock: String,
    },
    /// A lock was to be unlocked that this process does not hold.
    #[error("cannot unlock {lock}: this process does not hold it")]
    NotLocked {
        /// The lock, for people.
        lock: String,
    },
    /// A file does not have the layout of this version of lockkit.
    ///
    /// - The file of a lock table is something else, truncated, or from another version or another
    ///   kind of machine.
    /// - The file of a lease is from a later version, or contains the largest fencing token.
    #[error("cannot use {}: {problem}", .path.display())]
    LayoutMismatch {
        /// The file.
        path: PathBuf,
        /// The mismatch.
        problem: &'static str,
    },
    /// An option of a lease is invalid, alone or together with the others.
    #[error("invalid {option}: {problem}")]
    InvalidOption {
        /// The method of the builder.
        option: &'static str,
        /// The problem.
        problem: String,
    },
    /// A URL of a lease is invalid.
    #[error("invalid URL {url}: {problem}")]
    InvalidUrl {
        /// The URL, without its credentials and parameters.
        url: String,
        /// The problem.
        problem: String,
    },
    /// A lease is no longer held.
    #[error("{lock} is lost: {reason}")]
    LeaseLost {
        /// The lease, for people.
        lock: String,
        /// The reason.
        reason: LossReason,
    },
    /// The store of a lease failed repeatedly.
    #[error("cannot reach {lock}: {source}")]
    Store {
        /// The lease, for people.
        lock: String,
        /// The store's last error.
        source: StoreError,
    },
    /// The first instance of a program did not answer an activation in time: it hangs, is stopped,
    /// or accepts none. If it had already accepted the activation, it may still handle it;
    /// otherwise the activation is dropped.
    #[error("{first} did not answer within {}{}", format_duration(*.waited), running(.owner))]
    NoAnswer {
        /// The instance, for people.
        first: String,
        /// How long the caller has waited.
        waited: Duration,
        /// The process of the first instance, where it is known.
        owner: Option<Box<Owner>>,
    },
    /// The first instance of a program has reported that it did not handle an activation, or its
    /// answer is invalid or incomplete. With an incomplete answer it may have handled the
    /// activation.
    #[error("{first} has not answered the activation: {problem}")]
    NotHandled {
        /// The instance, for people.
        first: String,
        /// The reason.
        problem: &'static str,
    },
    /// An activation or its answer is too large. Nothing was sent.
    #[error("invalid size of {what}: {size} bytes; at most {most} are allowed")]
    TooLarge {
        /// The object that is too large.
        what: &'static str,
        /// How many bytes it has.
        size: usize,
        /// The largest size that can be sent.
        most: usize,
    },
    /// A lock table was to be created without locks, or with more than the largest table has.
    #[error("invalid capacity {capacity}: a lock table has 1 to {most} locks")]
    InvalidCapacity {
        /// The requested capacity.
        capacity: u32,
        /// The largest capacity.
        most: u32,
    },
    /// The maximum number of processes already has the lock table open.
    #[error("cannot open {table}: {most} processes use it, and no slot is free")]
    TooManyProcesses {
        /// The table.
        table: String,
        /// How many processes can share it.
        most: u32,
    },
    /// This system lacks the mechanism, or its mechanism could not give the guarantee; or lockkit
    /// was built without the feature that it needs.
    #[error("{what} is not supported here")]
    Unsupported {
        /// The requested operation.
        what: &'static str,
    },
    /// A system call that the lock needs failed.
    ///
    /// A write beyond the limit of file sizes (`RLIMIT_FSIZE`, `ulimit -f`) is such an error only
    /// in a program that ignores or handles `SIGXFSZ`. Rust programs do not by default, so the
    /// signal kills them, as at every other write. The locks that such a program held are then free
    /// like those of any process that died. lockkit changes no signal's handling.
    #[error("cannot {action} {}: {source}", .path.display())]
    Io {
        /// The attempted operation, as a verb: "open", "bind".
        action: &'static str,
        /// Its object. Abstract sockets are written with a leading `@`, as `ss` and `netstat` do.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

fn by(owner: &Option<Box<Owner>>) -> String {
    owner
        .as_ref()
        .map(|owner| format!(" by {}", owner.describe()))
        .unwrap_or_default()
}

fn running(owner: &Option<Box<Owner>>) -> String {
    owner
        .as_ref()
        .map(|owner| format!("; it is {}", owner.describe()))
        .unwrap_or_default()
}

fn of_pid(pid: Option<u32>) -> String {
    pid.map(|pid| format!(", pid {pid}")).unwrap_or_default()
}

impl Error {
    /// Returns the kind of the error, to match on.
    pub fn kind(&self) -> &ErrorKind {
        &self.0
    }

    /// Returns whether another holder has the lock, and the call did not wait.
    pub fn is_held(&self) -> bool {
        matches!(self.kind(), ErrorKind::Held { .. })
    }

    /// Returns whether the wait ended before the lock was free, or before the first instance
    /// answered.
    pub fn is_timeout(&self) -> bool {
        matches!(
            self.kind(),
            ErrorKind::Timeout { .. } | ErrorKind::NoAnswer { .. }
        )
    }

    /// Returns whether the wait was cancelled.
    pub fn is_cancelled(&self) -> bool {
        matches!(self.kind(), ErrorKind::Cancelled { .. })
    }

    /// Returns whether a retry after a short sleep may succeed: the lock was held, or the wait for
    /// it timed out.
    pub fn is_temporary(&self) -> bool {
        self.is_held() || self.is_timeout()
    }

    /// Returns the holder of the lock, if the error concerns it and it is known.
    pub fn owner(&self) -> Option<&Owner> {
        match self.kind() {
            ErrorKind::Held { owner, .. }
            | ErrorKind::Timeout { owner, .. }
            | ErrorKind::NoAnswer { owner, .. } => owner.as_deref(),
            _ => None,
        }
    }

    pub(crate) fn is_io(&self, kind: io::ErrorKind) -> bool {
        matches!(self.kind(), ErrorKind::Io { source, .. } if source.kind() == kind)
    }

    pub(crate) fn io(
        action: &'static str,
        path: impl AsRef<Path>,
        source: impl Into<io::Error>,
    ) -> Self {
        ErrorKind::Io {
            action,
            path: path.as_ref().to_owned(),
            source: source.into(),
        }
        .into()
    }
}

impl From<ErrorKind> for Error {
    fn from(kind: ErrorKind) -> Self {
        Self(Box::new(kind))
    }
}

/// Converts a held lock to `WouldBlock`, a timeout to `TimedOut`, and a cancellation to
/// `Interrupted`. A system's error keeps its kind. The lockkit error stays reachable through
/// `get_ref`.
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match error.kind() {
            ErrorKind::Held { .. } => io::ErrorKind::WouldBlock,
            ErrorKind::Timeout { .. } | ErrorKind::NoAnswer { .. } => io::ErrorKind::TimedOut,
            ErrorKind::Cancelled { .. } => io::ErrorKind::Interrupted,
            ErrorKind::InvalidName { .. } | ErrorKind::RelativePath { .. } => {
                io::ErrorKind::InvalidInput
            }
            ErrorKind::NotAPidFile { .. } | ErrorKind::NotALease { .. } => {
                io::ErrorKind::InvalidData
            }
            ErrorKind::ForeignOwner { .. } | ErrorKind::Insecure { .. } => {
                io::ErrorKind::PermissionDenied
            }
            ErrorKind::RogueDeletion { .. } | ErrorKind::NoSuchLock { .. } => {
                io::ErrorKind::NotFound
            }
            ErrorKind::Exhausted { .. } | ErrorKind::TooManyProcesses { .. } => {
                io::ErrorKind::QuotaExceeded
            }
            ErrorKind::AlreadyAllocated { .. } => io::ErrorKind::AlreadyExists,
            ErrorKind::NotAllocated { .. } | ErrorKind::NotLocked { .. } => {
                io::ErrorKind::InvalidInput
            }
            ErrorKind::InvalidCapacity { .. } => io::ErrorKind::InvalidInput,
            ErrorKind::LayoutMismatch { .. } => io::ErrorKind::InvalidData,
            ErrorKind::InvalidOption { .. } | ErrorKind::InvalidUrl { .. } => {
                io::ErrorKind::InvalidInput
            }
            ErrorKind::LeaseLost { .. }
            | ErrorKind::Store { .. }
            | ErrorKind::NotHandled { .. } => io::ErrorKind::Other,
            ErrorKind::TooLarge { .. } => io::ErrorKind::InvalidInput,
            ErrorKind::Unsupported { .. } => io::ErrorKind::Unsupported,
            ErrorKind::Io { source, .. } => source.kind(),
        };
        Self::new(kind, error)
    }
}

/// Returns the beginning of the first line of a file, escaped, for a message.
pub(crate) fn first_line(bytes: &[u8]) -> String {
    const MAX_SHOWN: usize = 40;
    let first = bytes
        .split(|byte| *byte == b'\n')
        .next()
        .unwrap_or_default();
    let cut = String::from_utf8_lossy(&first[..first.len().min(MAX_SHOWN)])
        .escape_debug()
        .to_string();
    if first.len() > MAX_SHOWN {
        cut + "..."
    } else {
        cut
    }
}

/// The reason why a lease is not held any more, in [`Loss`](crate::Loss) and
/// [`LostSignal`](crate::LostSignal).
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LossReason {
    /// The lease expired before it was renewed. The process was stopped, or asleep with the
    /// machine, or it did not call [`progress`](crate::LeaseGuard::progress).
    #[error("it was not renewed in time")]
    Expired,
    /// The record names another holder, or was freed by force.
    #[error("it was taken over{}", .by.as_ref().map(|by| format!(" by {}", by.describe())).unwrap_or_default())]
    TakenOver {
        /// The new holder, if it is known.
        by: Option<Box<Owner>>,
    },
    /// Its guard released it.
    #[error("it was released")]
    Released,
    /// The lease expired, because the store did not renew it. Contains the last error of the store.
    #[error("it could not be renewed in time: {}", .0)]
    Store(Arc<StoreError>),
    /// This guard is a forked child's copy: the lease stays with the parent.
    #[error("it is held by the parent of this forked process")]
    Forked,
}

/// The reason why a store did not carry out a request.
///
/// How a store converts the errors of its connection:
///
/// ```
/// use std::io::{Error, ErrorKind};
/// use lockkit::lease::StoreError;
///
/// fn failed(error: Error, is_sent: bool) -> StoreError {
///     match error.kind() {
///         ErrorKind::PermissionDenied => StoreError::permanent(error), // Waiting does not help.
///         _ if is_sent => StoreError::unknown(error), // It may have taken effect.
///         _ => StoreError::not_applied(error),
///     }
/// }
/// # assert!(matches!(failed(ErrorKind::TimedOut.into(), true), StoreError::Unknown(_)));
/// ```
#[derive(Debug)]
pub enum StoreError {
    /// The request had no effect; the same request may work later.
    NotApplied(Cause),
    /// The request may have taken effect: no answer came, or the answer broke off. If an
    /// acquisition ends like this, its claim may have an orphaned grant. The same is true if a
    /// later attempt of the acquisition has been granted and released since. From then on, until a
    /// ttl after the request, the heartbeat [checks](crate::lease::LeaseStore::get) for the claim,
    /// and gives an orphaned grant back.
    Unknown(Cause),
    /// The request had no effect, and never will: the request, the name or the store's location is
    /// wrong. If the cause is a lockkit [`Error`], acquiring fails with that error.
    Permanent(Cause),
}

impl StoreError {
    /// Creates [`NotApplied`](Self::NotApplied) with this cause.
    pub fn not_applied(cause: impl Into<Cause>) -> Self {
        Self::NotApplied(cause.into())
    }

    /// Creates [`Unknown`](Self::Unknown) with this cause.
    pub fn unknown(cause: impl Into<Cause>) -> Self {
        Self::Unknown(cause.into())
    }

    /// Creates [`Permanent`](Self::Permanent) with this cause.
    pub fn permanent(cause: impl Into<Cause>) -> Self {
        Self::Permanent(cause.into())
    }

    /// Returns the cause.
    pub(crate) fn cause(&self) -> &(dyn std::error::Error + Send + Sync + 'static) {
        let (Self::NotApplied(cause) | Self::Unknown(cause) | Self::Permanent(cause)) = self;
        &**cause
    }

    /// Returns the error of an operation on `lock` that ends with this store error.
    pub(crate) fn into_error(self, lock: impl FnOnce() -> String) -> Error {
        let (cause, kind): (Cause, fn(Cause) -> Self) = match self {
            Self::NotApplied(cause) => (cause, Self::NotApplied),
            Self::Unknown(cause) => (cause, Self::Unknown),
            Self::Permanent(cause) => (cause, Self::Permanent),
        };
        match cause.downcast::<Error>() {
            Ok(error) => *error,
            Err(cause) => ErrorKind::Store {
                lock: lock(),
                source: kind(cause),
            }
            .into(),
        }
    }
}

/// Includes the causes, so `source()` has none.
impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let outcome = match self {
            // The error of a built-in store is a complete sentence.
            Self::NotApplied(cause) | Self::Permanent(cause) if cause.is::<Error>() => {
                return cause.fmt(f);
            }
            Self::NotApplied(_) => "the store refused",
            Self::Unknown(_) => "the store may or may not have done it",
            Self::Permanent(_) => "the store cannot do this",
        };
        write!(f, "{outcome}: {}", chain(self.cause()))
    }
}

impl std::error::Error for StoreError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_size_is_one_word() {
        assert_eq!(size_of::<Error>(), size_of::<usize>());
        assert_eq!(size_of::<Result<()>>(), size_of::<usize>());
    }

    #[test]
    fn first_line_in_message_is_short_and_harmless() {
        assert_eq!(first_line(b"12\x1b[2J x\nrest"), "12\\u{1b}[2J x");
        assert!(first_line(&[0xff; 9000]).len() < 200);
    }

    #[test]
    fn b11_display_and_debug_include_the_cause_once() {
        let error = Error::io("open", "/x", io::Error::from(io::ErrorKind::NotFound));
        assert_eq!(error.to_string(), "cannot open /x: entity not found");
        assert_eq!(format!("{error:?}"), "cannot open /x: entity not found");
        assert!(format!("{error:#?}").starts_with("Error(\n    Io {"));
    }

    #[test]
    fn conversion_to_io_error_keeps_kind_and_cause() {
        let error = Error::io("open", "/x", io::Error::from(io::ErrorKind::NotFound));
        let io: io::Error = error.into();
        assert_eq!(io.kind(), io::ErrorKind::NotFound);
        assert_eq!(io.to_string(), "cannot open /x: entity not found");
        let ours = io
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<Error>())
            .unwrap();
        assert!(
            matches!(ours.kind(), ErrorKind::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
        );
    }
}
