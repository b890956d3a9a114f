//! lockkit's own files: at fixed places, which the system's shell knows, whatever the environment says.
//!
//! The files of one user lie in a directory of lockkit's in the user's local application data, which no other user
//! enters and which does not roam. The files of the whole machine lie in the directory for all users' application data.
//! Each has an access control list: all users may read and write the file, and only administrators may remove it or
//! change the list.
//!
//! File names are case-insensitive here, and some are devices (`nul.x`). So a lock's file name has `!` before each
//! letter that was a capital. It starts with `n-`, or with the prefix of the machine's files.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::windows::io::OwnedHandle;
use std::path::{Path, PathBuf};

use windows_sys::Win32::Foundation::ERROR_FILE_EXISTS;
use windows_sys::Win32::Storage::FileSystem::FILE_FLAG_BACKUP_SEMANTICS;

use super::{MACHINE, Sharing};
use crate::base::error::{Error, ErrorKind, Result};
use crate::sys::failpoint::step;
use crate::sys::files::{self, Metadata, MetadataExt, OpenOptionsExt};
use crate::sys::known_folder;
use crate::sys::security::Descriptor;

/// Returns the mode of lockkit's own files. Modes are for Unix.
pub(crate) fn file_mode(_: Sharing) -> u32 {
    0
}

/// A directory of lockkit's, or one that contains its files.
#[derive(Debug)]
pub(crate) struct RuntimeDir {
    pub(crate) fd: OwnedHandle,
    path: PathBuf,
    sharing: Sharing,
}

impl RuntimeDir {
    /// Returns the path of lockkit's file `name`.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(file_name(name, self.sharing))
    }

    /// Opens lockkit's file `name` for reading and writing, or creates it. It must be a file of its own, not a link to
    /// another one.
    pub(crate) fn open_file(&self, name: &str) -> Result<File> {
        let path = self.file(name);
        let failed = |error| Error::io("open", &path, error);
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        OpenOptionsExt::custom_flags(&mut options, files::NOFOLLOW);
        let file = match files::open(&options, &path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => match self.make(&path) {
                // Another process has just created it.
                Err(error) if error.raw_os_error() == Some(ERROR_FILE_EXISTS as i32) => files::open(&options, &path),
                made => {
                    step("file made");
                    made
                }
            },
            opened => opened,
        }
        .map_err(failed)?;
        let found = files::metadata_of(&file).map_err(failed)?;
        match found.is_file() && found.nlink() == 1 {
            true => Ok(file),
            false => Err(ErrorKind::Insecure { path, problem: "it is not a plain file of its own" }.into()),
        }
    }

    fn make(&self, path: &std::path::Path) -> io::Result<File> {
        let everybody = match self.sharing {
            Sharing::User(_) => None,
            // Reading and writing for all users, including the maker.
            Sharing::Machine => {
                Some(Descriptor::new("D:P(A;;0x12019F;;;WD)(A;;0x12019F;;;OW)(A;;FA;;;SY)(A;;FA;;;BA)")?)
            }
        };
        files::create_new(path, everybody.as_ref())
    }
}

fn file_name(name: &str, sharing: Sharing) -> String {
    let mut written = String::from(if sharing == Sharing::Machine { MACHINE } else { "n-" });
    for letter in name.chars() {
        if letter.is_ascii_uppercase() {
            written.push('!');
        }
        written.push(letter.to_ascii_lowercase());
    }
    written
}

/// Returns the lock name from which `file_name` made `file`, if it did.
pub(crate) fn name_of(file: &str, sharing: Sharing) -> Option<String> {
    let mut letters = file.strip_prefix(if sharing == Sharing::Machine { MACHINE } else { "n-" })?.chars();
    let mut name = String::new();
    while let Some(letter) = letters.next() {
        name.push(if letter == '!' { letters.next()?.to_ascii_uppercase() } else { letter });
    }
    Some(name)
}

/// Whether the file or directory belongs to this process's user; Windows does not report it here.
pub(crate) fn is_own(_: &File, found: &Metadata) -> bool {
    found.uid() == effective_uid()
}

/// Checks the directory at the path, as [`is_own`] does.
pub(crate) fn is_own_at(_: &Path, found: &Metadata) -> bool {
    found.uid() == effective_uid()
}

/// Returns 0: users have no numbers here, and no file has one as its owner.
pub(crate) fn effective_uid() -> u32 {
    0
}

fn place(sharing: Sharing) -> io::Result<PathBuf> {
    Ok(match sharing {
        Sharing::User(_) => known_folder::local_app_data()?.join("lockkit"),
        Sharing::Machine => known_folder::program_data()?,
    })
}

/// Returns the directory for `sharing`, if it exists, for callers that only read.
pub(crate) fn path(sharing: Sharing) -> Option<PathBuf> {
    place(sharing).ok().filter(|path| path.is_dir())
}

/// Opens the directory for `sharing`, and creates a user's directory if it is missing.
///
/// # Errors
/// `Io` if it cannot be created or opened.
pub(crate) fn open(sharing: Sharing) -> Result<RuntimeDir> {
    let path = place(sharing).map_err(|error| Error::io("find the directory for", "named locks", error))?;
    let mut options = OpenOptions::new();
    options.read(true);
    std::os::windows::fs::OpenOptionsExt::custom_flags(&mut options, FILE_FLAG_BACKUP_SEMANTICS);
    let opened = match options.open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(&path).map_err(|error| Error::io("create the directory", &path, error))?;
            step("directory made");
            options.open(&path)
        }
        opened => opened,
    };
    let directory = opened.map_err(|error| Error::io("open the directory", &path, error))?;
    Ok(RuntimeDir { fd: directory.into(), path, sharing })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_name_is_lowercase_and_maps_back_to_name() {
        for sharing in [Sharing::User(0), Sharing::Machine] {
            for name in ["nul.record", "Nul.record", "NUL.x-_", "a"] {
                let file = file_name(name, sharing);
                assert_eq!(file, file.to_ascii_lowercase());
                assert_eq!(name_of(&file, sharing).as_deref(), Some(name));
            }
        }
        assert_eq!(name_of("other", Sharing::User(0)), None);
    }
}
