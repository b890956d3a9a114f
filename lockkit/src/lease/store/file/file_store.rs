//! The store of one lease in a file: what it is built from, what it has learned of the file, and
//! its errors.

use std::io::{self, ErrorKind as Io};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;

use parking_lot::Mutex;

use super::staleness::Observer;
use crate::base::error::{Error, ErrorKind, StoreError, first_line};
use crate::lease::clock::Clock;
use crate::sys::files;

pub(super) type Result<T, E = StoreError> = std::result::Result<T, E>;

/// The default modes of new files and directories.
pub(super) const DEFAULT_FILE_MODE: u32 = 0o600;
pub(super) const DEFAULT_DIRECTORY_MODE: u32 = 0o700;
/// How often in a row the file may be replaced during a step.
pub(super) const MAX_REPLACEMENTS: u32 = 100;

/// The options of a lease in a file.
pub(in crate::lease) struct FileSpec {
    pub(in crate::lease) path: PathBuf,
    pub(in crate::lease) heartbeat: Duration,
    /// How long a blank or damaged record counts as held.
    pub(in crate::lease) damage_timeout: Duration,
    pub(in crate::lease) retry_delay: Duration,
    /// The exact mode of a new file; `None` is [`DEFAULT_FILE_MODE`], less the umask. A mode that
    /// lets others write shares the lease between users.
    pub(in crate::lease) file_mode: Option<u32>,
    /// The exact mode of a new directory; `None` is [`DEFAULT_DIRECTORY_MODE`], less the umask.
    pub(in crate::lease) directory_mode: Option<u32>,
    /// Whether missing directories are created.
    pub(in crate::lease) create_parents: bool,
    pub(in crate::lease) clock: Arc<dyn Clock>,
    /// The shared id of the clock, kept here because asking the clock takes system calls.
    pub(in crate::lease) clock_id: Option<u128>,
}

/// The store of one lease, in a file.
pub(in crate::lease) struct FileStore {
    pub(super) spec: FileSpec,
    /// The number of the file system of the file; 0 until the file has been opened. A file system
    /// is a failure domain.
    pub(super) device: AtomicU64,
    /// Whether a write must be synced to reach the other users of the file.
    pub(super) is_remote: AtomicBool,
    /// What this process has seen of the record. A thread that does not get the mutex at once goes
    /// without it. So a fork that left the mutex locked in the child does no harm: the notes in the
    /// record do the same work.
    pub(super) observer: Mutex<Observer>,
}

impl FileStore {
    pub(in crate::lease) fn new(spec: FileSpec) -> Self {
        Self {
            spec,
            device: AtomicU64::default(),
            is_remote: AtomicBool::default(),
            observer: Mutex::default(),
        }
    }

    /// Returns the error for a forged token. The next grant would get a greater token, and some day
    /// no greater token would be left.
    pub(super) fn forged_error(&self) -> StoreError {
        let problem = "its fencing token is centuries ahead of the time, so the record is forged; remove the file";
        StoreError::permanent(Error::from(ErrorKind::LayoutMismatch {
            path: self.spec.path.clone(),
            problem,
        }))
    }

    pub(super) fn link_error(&self) -> StoreError {
        self.insecure_error("it is a symbolic link; use the path that it leads to")
    }

    pub(super) fn insecure_error(&self, problem: &'static str) -> StoreError {
        StoreError::permanent(Error::from(ErrorKind::Insecure {
            path: self.spec.path.clone(),
            problem,
        }))
    }

    pub(super) fn newer_error(&self) -> StoreError {
        let problem = "it is the lease of a later version of lockkit; update lockkit";
        StoreError::permanent(Error::from(ErrorKind::LayoutMismatch {
            path: self.spec.path.clone(),
            problem,
        }))
    }

    pub(super) fn foreign_error(&self, bytes: &[u8]) -> StoreError {
        let text = first_line(bytes);
        StoreError::permanent(Error::from(ErrorKind::NotALease {
            path: self.spec.path.clone(),
            text,
        }))
    }

    pub(super) fn replaced_error(&self) -> StoreError {
        StoreError::not_applied(Error::from(ErrorKind::RogueDeletion {
            path: self.spec.path.clone(),
        }))
    }

    pub(super) fn locked_error(&self) -> StoreError {
        let timeout = io::Error::new(Io::TimedOut, "another process keeps it locked");
        self.io_error("lock", timeout)
    }

    pub(super) fn io_error(&self, action: &'static str, error: io::Error) -> StoreError {
        io_error_at(action, &self.spec.path, error)
    }
}

/// Converts an I/O error. It is permanent if waiting does not help and the caller must remove the
/// cause.
pub(super) fn io_error_at(action: &'static str, path: &Path, error: io::Error) -> StoreError {
    use Io::{IsADirectory, NotADirectory, PermissionDenied, ReadOnlyFilesystem};
    let is_permanent = matches!(
        error.kind(),
        PermissionDenied | ReadOnlyFilesystem | IsADirectory | NotADirectory
    ) || files::is_name_too_long(&error);
    let error = Error::io(action, path, error);
    if is_permanent {
        StoreError::permanent(error)
    } else {
        StoreError::not_applied(error)
    }
}
