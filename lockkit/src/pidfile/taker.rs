//! The taker file `.NAME.lockkit`, by which the processes that replace a pidfile exclude each
//! other.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind as Io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::existing::is_at;
use super::pid_file::PidFile;
use super::record::{self, Content};
use super::verdict;
use crate::base::error::{Error, ErrorKind, Result};
use crate::sys::failpoint::step;
use crate::sys::files::{self, Metadata, MetadataExt, OpenOptionsExt};
use crate::sys::fork::ForkGuarded;
use crate::sys::{flock, fnv, write_lock};

/// How long a call that does not wait for the lock waits for another taker. A taker that is not
/// stopped needs microseconds.
pub(super) const TAKER_TIMEOUT: Duration = Duration::from_secs(1);

/// The result of a try to exclude all other takers.
pub(super) enum TakerLock {
    Acquired(TakerFile),
    /// Another taker is at work. The error is the one to return if that lasts.
    Busy(Option<Error>),
}

/// The taker file, whose write lock this process has. A drop removes the file while it is still
/// locked.
pub(super) struct TakerFile {
    name: TakerName,
    pub(super) file: ForkGuarded<File>,
}

impl TakerFile {
    pub(super) fn path(&self) -> &Path {
        &self.name.path
    }

    /// Returns the file after its rename to the path of the pidfile.
    pub(super) fn into_pidfile(self) -> ForkGuarded<File> {
        let Self { mut name, file } = self;
        name.is_renamed = true;
        file
    }
}

struct TakerName {
    path: PathBuf,
    is_renamed: bool,
}

impl Drop for TakerName {
    fn drop(&mut self) {
        if !self.is_renamed {
            let _ = fs::remove_file(&self.path);
            step("taker file removed");
        }
    }
}

/// The taker file, and whether this process created it; or the fact that another taker is at work,
/// with the error that shows it.
type OpenedTakerFile = std::result::Result<(ForkGuarded<File>, bool), Option<Error>>;

impl PidFile {
    /// Excludes all other takers. `action` is what the taker is about to do to the file, for
    /// errors.
    ///
    /// A process changes, moves and removes the taker file only if it has the write lock and the
    /// name leads to that file. Only users that may write the pidfile can open the taker file, so
    /// no other user can have a lock on it.
    pub(super) fn lock_taker_file(&self, action: &'static str) -> Result<TakerLock> {
        let path = self.taker_path();
        let shared = self.mode.unwrap_or_default() & 0o022;
        // A user that may write the pidfile may read and write the taker file.
        let mode = 0o600 | shared | shared << 1;
        let (file, is_new) = match self.open_or_create_taker_file(action, &path, mode)? {
            Ok(opened) => opened,
            Err(why) => return Ok(TakerLock::Busy(why)),
        };
        match write_lock::try_lock(&file) {
            Ok(true) => {}
            Ok(false) => return Ok(TakerLock::Busy(None)),
            Err(error) => {
                // Another process may have locked a file that this process has not created.
                if is_new && flock::is_unsupported(&error) {
                    let _ = fs::remove_file(&path);
                    step("taker file removed");
                }
                return Err(Error::io("lock", &self.path, error));
            }
        }
        if !is_at(&path, &file)? {
            return Ok(TakerLock::Busy(None));
        }
        let found = self.check_taker_file(&path, &file)?;
        let taker_file = TakerFile {
            name: TakerName {
                path,
                is_renamed: false,
            },
            file,
        };
        if !files::is_owned_by_user(&found) {
            // Another user's process left it. The drop of `taker_file` removes it.
            return Ok(TakerLock::Busy(None));
        }
        let failed = |error| Error::io(action, &self.path, error);
        if found.len() > 0 {
            taker_file.file.set_len(0).map_err(failed)?;
            step("taker file emptied");
        }
        if shared != 0 {
            files::set_mode(&taker_file.file, mode).map_err(failed)?;
            step("taker file mode set");
        }
        Ok(TakerLock::Acquired(taker_file))
    }

    /// Opens the taker file, or creates it.
    fn open_or_create_taker_file(
        &self,
        action: &'static str,
        path: &Path,
        mode: u32,
    ) -> Result<OpenedTakerFile> {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .create_new(true)
            .mode(mode)
            .custom_flags(files::NOFOLLOW | files::NONBLOCK);
        let created = self.with_parents(|| ForkGuarded::new(|| files::create(&options, path)));
        match created {
            Ok(file) => {
                step("taker file created");
                Ok(Ok((file, true)))
            }
            Err(error) if error.kind() == Io::AlreadyExists => match self.open_taker_file(path) {
                Ok(Some(file)) => Ok(Ok((file, false))),
                Ok(None) => Ok(Err(None)),
                // The file belongs to another user's taker, which will finish soon or was killed.
                Err(error) if error.is_io(Io::PermissionDenied) => Ok(Err(Some(error))),
                Err(error) => Err(error),
            },
            Err(error) => Err(Error::io(action, &self.path, error)),
        }
    }

    /// Opens an existing taker file. Returns `None` if there is none.
    pub(super) fn open_taker_file(&self, path: &Path) -> Result<Option<ForkGuarded<File>>> {
        // The check comes first, because the open of a FIFO or a device may have side effects.
        match files::symlink_metadata(path) {
            Err(error) if error.kind() == Io::NotFound => return Ok(None),
            found => check_plain_taker(
                path,
                &found.map_err(|error| Error::io("look at", path, error))?,
            )?,
        }
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .custom_flags(files::NOFOLLOW | files::NONBLOCK);
        match ForkGuarded::new(|| files::open(&options, path)) {
            Err(error) if error.kind() == Io::NotFound => Ok(None),
            opened => opened
                .map(Some)
                .map_err(|error| Error::io("open", path, error)),
        }
    }

    /// Rejects a file with the name of the taker file that no taker has created.
    pub(super) fn check_taker_file(&self, path: &Path, file: &File) -> Result<Metadata> {
        let found = files::metadata_of(file).map_err(|error| Error::io("look at", path, error))?;
        check_plain_taker(path, &found)?;
        let bytes = verdict::read(file).map_err(|error| Error::io("read", path, error))?;
        match record::parse(&bytes) {
            Content::Blank
            | Content::Pids {
                is_single: true, ..
            } => Ok(found),
            _ => {
                let problem = "it contains something other than a pid, and lockkit uses this name for the file that \
                               serializes takeovers of a pidfile; move it away";
                Err(ErrorKind::Insecure {
                    path: path.to_owned(),
                    problem,
                }
                .into())
            }
        }
    }

    /// Returns whether a taker is at work, or was killed.
    pub(super) fn has_taker(&self) -> bool {
        files::symlink_metadata(&self.taker_path()).is_ok()
    }

    /// Returns `.NAME.lockkit` in the directory of the file; a hash replaces a name that would be
    /// too long.
    pub(super) fn taker_path(&self) -> PathBuf {
        /// The limit of Linux and most other systems, in bytes.
        const NAME_MAX: usize = 255;
        let name = self.path.file_name().unwrap_or_default();
        let mut own = OsString::from(".");
        own.push(name);
        own.push(".lockkit");
        if own.len() > NAME_MAX {
            own = format!(
                ".{:016x}.lockkit",
                fnv::of_bytes(name.to_string_lossy().as_bytes())
            )
            .into();
        }
        self.directory().join(own)
    }
}

fn check_plain_taker(path: &Path, found: &Metadata) -> Result<()> {
    let problem = "it is no plain file, or has other names, and lockkit uses this name for the file that serializes \
                   takeovers of a pidfile; remove it";
    match found.is_file() && found.nlink() <= 1 {
        true => Ok(()),
        false => Err(ErrorKind::Insecure {
            path: path.to_owned(),
            problem,
        }
        .into()),
    }
}
