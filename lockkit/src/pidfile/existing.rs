//! The file that the path of a [`PidFile`] names.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind as Io;
use std::path::Path;

use super::inspect::not_a_plain_file;
use super::pid_file::PidFile;
use super::verdict::{self, Verdict};
use crate::base::error::{self, Error, ErrorKind, Result};
use crate::sys::file_id::{self, FileId};
use crate::sys::files::{self, Metadata, MetadataExt, OpenOptionsExt};
use crate::sys::fork::ForkGuarded;

/// An existing file, and its meaning.
pub(super) struct ExistingFile {
    pub(super) file: ForkGuarded<File>,
    pub(super) metadata: Metadata,
    pub(super) verdict: Verdict,
    pub(super) bytes: Vec<u8>,
}

impl PidFile {
    /// Judges the file that the path names. Returns `None` if there is none.
    pub(super) fn judge(&self) -> Result<Option<ExistingFile>> {
        let path = &*self.path;
        // The check comes first, because the open of a FIFO or a device may have side effects.
        match files::symlink_metadata(path) {
            Err(error) if error.kind() == Io::NotFound => return Ok(None),
            found => {
                self.check_plain(&found.map_err(|error| Error::io("look at", path, error))?)?
            }
        }
        let mut options = OpenOptions::new();
        options
            .read(true)
            .custom_flags(files::NOFOLLOW | files::NONBLOCK);
        let file = match ForkGuarded::new(|| files::open(&options, path)) {
            Err(error) if error.kind() == Io::NotFound => return Ok(None),
            opened => opened.map_err(|error| Error::io("open", path, error))?,
        };
        // Checked again, because another file may have been put there in between.
        let metadata =
            files::metadata_of(&file).map_err(|error| Error::io("look at", path, error))?;
        self.check_plain(&metadata)?;
        let (verdict, bytes) =
            verdict::judge(path, &file).map_err(|error| Error::io("read", path, error))?;
        Ok(Some(ExistingFile {
            file,
            metadata,
            verdict,
            bytes,
        }))
    }

    /// Rejects files that must not be replaced.
    fn check_plain(&self, found: &Metadata) -> Result<()> {
        let problem = match found {
            found if found.is_symlink() => "it is a symbolic link; use the path that it leads to",
            found if !found.is_file() => {
                return Err(Error::io("lock", &self.path, not_a_plain_file()));
            }
            found if found.nlink() > 1 => "it is a hard link to a file that has other names",
            _ => return Ok(()),
        };
        Err(ErrorKind::Insecure {
            path: self.path.to_path_buf(),
            problem,
        }
        .into())
    }

    /// Returns the existing file, if it is stale.
    pub(super) fn stale(&self) -> Result<Option<ExistingFile>> {
        let Some(existing) = self.judge()? else {
            return Ok(None);
        };
        match existing.verdict {
            Verdict::Stale(_) => Ok(Some(existing)),
            Verdict::Other(rule) => Err(self.not_a_pidfile(&existing.bytes, rule)),
            Verdict::Held { .. } | Verdict::Own(_) | Verdict::Blank { .. } => Ok(None),
        }
    }

    pub(super) fn not_a_pidfile(&self, bytes: &[u8], rule: &'static str) -> Error {
        ErrorKind::NotAPidFile {
            path: self.path.to_path_buf(),
            text: error::first_line(bytes),
            rule,
        }
        .into()
    }
}

/// Returns whether `path` names the open `file`.
pub(super) fn is_at(path: &Path, file: &File) -> Result<bool> {
    let open = files::metadata_of(file).map_err(|error| Error::io("look at", path, error))?;
    names(path, file_id::of_renamed(&open))
}

/// Returns whether `path` names the file with this identity.
pub(super) fn names(path: &Path, id: FileId) -> Result<bool> {
    file_id::is_named(files::symlink_metadata(path), |named| {
        file_id::of_renamed(named) == id
    })
    .map_err(|error| Error::io("look at", path, error))
}
