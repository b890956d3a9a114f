//! The checked directories of lockkit's own files. Their paths are fixed, whatever the environment
//! says.
//!
//! Two processes with different environments must still exclude each other, so no environment
//! variable counts. `unix` and `windows` say where the directories are, and check them.

#[cfg(unix)]
#[path = "unix.rs"]
mod system;
#[cfg(windows)]
#[path = "windows.rs"]
mod system;

#[cfg(any(target_os = "linux", windows))]
use std::fs::File;
use std::path::{Path, PathBuf};

use crate::base::error::{Error, Result};
use crate::sys::fd::OwnedFd;
#[cfg(any(target_os = "linux", windows))]
use crate::sys::files::{self, MetadataExt};
pub(crate) use crate::sys::sharing::Sharing;

pub(crate) use system::{effective_uid, file_mode, is_own, is_own_at};

/// The prefix of the names of the machine's files.
const MACHINE_PREFIX: &str = "lockkit-machine-";

/// A directory that was found safe.
#[derive(Debug)]
pub(crate) struct RuntimeDir {
    pub(crate) fd: OwnedFd,
    path: PathBuf,
    sharing: Sharing,
}

impl RuntimeDir {
    /// Returns the path of lockkit's file `name`.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path
            .join(prefix(self.sharing).to_owned() + &system::encode(name))
    }

    /// Opens lockkit's file `name` for reading and writing, or creates it. It must be a file of its
    /// own, not a link to another one.
    #[cfg(any(target_os = "linux", windows))]
    pub(crate) fn open_file(&self, name: &str) -> Result<File> {
        let path = self.file(name);
        let failed = |error| Error::io("open", &path, error);
        let file = system::open_or_create(&path, self.sharing).map_err(failed)?;
        let found = files::metadata_of(&file).map_err(failed)?;
        if !found.is_file() || found.nlink() != 1 {
            let problem = "it is not a plain file of its own";
            return Err(crate::ErrorKind::Insecure { path, problem }.into());
        }
        system::repair_mode(&file, &found, self.sharing).map_err(failed)?;
        Ok(file)
    }
}

fn prefix(sharing: Sharing) -> &'static str {
    match sharing {
        Sharing::User(_) => system::USER_PREFIX,
        Sharing::Machine => MACHINE_PREFIX,
    }
}

/// Returns the lock name from which [`RuntimeDir::file`] made the file name `file`, if it did.
pub(crate) fn name_of(file: &str, sharing: Sharing) -> Option<String> {
    system::decode(file.strip_prefix(prefix(sharing))?)
}

/// Returns the directory for `sharing`, if it exists, for callers that only read.
pub(crate) fn path(sharing: Sharing) -> Option<PathBuf> {
    let base = system::base(sharing).ok()?;
    Some(system::directory(&base, sharing)).filter(|path| path.is_dir())
}

/// Opens the directory as [`open_in`] does, below the directory that this system has for it.
pub(crate) fn open(sharing: Sharing) -> Result<RuntimeDir> {
    let base = system::base(sharing)
        .map_err(|error| Error::io("find the directory for", "named locks", error))?;
    open_in(&base, sharing)
}

/// Opens the directory for `sharing` below `base`, and creates a user's directory if it is missing.
///
/// # Errors
/// - `ForeignOwner` if it belongs to a user that is not trusted with it.
/// - `Insecure` if others could tamper with it.
/// - `Io` if it cannot be created or opened (on Unix a symlink in the place of a user's directory
///   is `ELOOP` or `ENOTDIR`).
pub(crate) fn open_in(base: &Path, sharing: Sharing) -> Result<RuntimeDir> {
    let path = system::directory(base, sharing);
    let fd = system::open_directory(&path, sharing)?;
    Ok(RuntimeDir { fd, path, sharing })
}

#[cfg(test)]
mod tests {
    #[cfg(target_os = "linux")]
    use std::fs;
    #[cfg(target_os = "linux")]
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn name_of_file_without_prefix_is_none() {
        assert_eq!(name_of("other", Sharing::Machine), None);
        assert_eq!(
            name_of("lockkit-machine-other", Sharing::Machine).as_deref(),
            Some("other")
        );
        assert_eq!(name_of("other", Sharing::User(0)).is_some(), cfg!(unix));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn open_file_repairs_mode_after_killed_creator() {
        let base = std::env::temp_dir().join(format!("lockkit-runtime-dir-{}", std::process::id()));
        fs::create_dir_all(&base).unwrap();
        let directory = open_in(&base, Sharing::User(effective_uid())).unwrap();
        let mode = || {
            fs::metadata(directory.file("table"))
                .unwrap()
                .permissions()
                .mode()
                & 0o7777
        };
        for left in [0o644, 0o600, 0o640] {
            drop(directory.open_file("table").unwrap());
            assert_eq!(mode(), 0o600);
            fs::set_permissions(directory.file("table"), fs::Permissions::from_mode(left)).unwrap();
        }
        drop(directory.open_file("table").unwrap());
        assert_eq!(mode(), 0o600);
        fs::remove_dir_all(base).unwrap();
    }
}
