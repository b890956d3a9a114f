//! The directories on Windows: those that the system's shell knows, whatever the environment says.
//!
//! The files of one user lie in a directory of lockkit's in the user's local application data,
//! which no other user enters and which does not roam. The files of the whole machine lie in the
//! directory for all users' application data. Each has an access control list: all users may read
//! and write the file, and only administrators may remove it or change the list.
//!
//! File names are case-insensitive here, and some are devices (`nul.x`). So a lock's file name has
//! `!` before each letter that was a capital. It starts with `n-`, or with the prefix of the
//! machine's files.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::windows::io::OwnedHandle;
use std::path::{Path, PathBuf};

use windows_sys::Win32::Foundation::ERROR_FILE_EXISTS;
use windows_sys::Win32::Storage::FileSystem::FILE_FLAG_BACKUP_SEMANTICS;

use crate::base::error::{Error, Result};
use crate::sys::failpoint::step;
use crate::sys::files::{self, Metadata, MetadataExt, OpenOptionsExt};
use crate::sys::known_folder;
use crate::sys::security::Descriptor;
use crate::sys::sharing::Sharing;

/// Returns the mode of lockkit's own files. Modes are for Unix.
pub(crate) fn file_mode(_: Sharing) -> u32 {
    0
}

/// A file name is no device name with this prefix.
pub(super) const USER_PREFIX: &str = "n-";

/// Opens a file for reading and writing, or creates it. Does not follow a symbolic link.
pub(super) fn open_or_create(path: &Path, sharing: Sharing) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    OpenOptionsExt::custom_flags(&mut options, files::NOFOLLOW);
    match files::open(&options, path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => match create(path, sharing) {
            // Another process has just created it.
            Err(error) if error.raw_os_error() == Some(ERROR_FILE_EXISTS as i32) => {
                files::open(&options, path)
            }
            created => {
                step("file made");
                created
            }
        },
        opened => opened,
    }
}

fn create(path: &Path, sharing: Sharing) -> io::Result<File> {
    let access = match sharing {
        Sharing::User(_) => None,
        // Reading and writing for all users, including the creator.
        Sharing::Machine => Some(Descriptor::new(
            "D:P(A;;0x12019F;;;WD)(A;;0x12019F;;;OW)(A;;FA;;;SY)(A;;FA;;;BA)",
        )?),
    };
    files::create_new(path, access.as_ref())
}

/// Repairs nothing: modes are for Unix.
#[allow(clippy::unnecessary_wraps)] // As on Unix.
pub(super) fn repair_mode(_: &File, _: &Metadata, _: Sharing) -> io::Result<()> {
    Ok(())
}

/// Returns the form of a lock's name in a file name.
pub(super) fn encode(name: &str) -> String {
    let mut written = String::new();
    for letter in name.chars() {
        if letter.is_ascii_uppercase() {
            written.push('!');
        }
        written.push(letter.to_ascii_lowercase());
    }
    written
}

/// Returns the lock name with this form, if it is such a form.
pub(super) fn decode(file: &str) -> Option<String> {
    let mut letters = file.chars();
    let mut name = String::new();
    while let Some(letter) = letters.next() {
        name.push(if letter == '!' {
            letters.next()?.to_ascii_uppercase()
        } else {
            letter
        });
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

/// Returns the directory that contains that for `sharing`, as the system's shell knows it.
pub(super) fn base(sharing: Sharing) -> io::Result<PathBuf> {
    match sharing {
        Sharing::User(_) => known_folder::local_app_data(),
        Sharing::Machine => known_folder::program_data(),
    }
}

/// Returns the directory for `sharing` below `base`.
pub(super) fn directory(base: &Path, sharing: Sharing) -> PathBuf {
    match sharing {
        Sharing::User(_) => base.join("lockkit"),
        Sharing::Machine => base.to_owned(),
    }
}

/// Opens the directory, and creates a user's directory if it is missing.
pub(super) fn open_directory(path: &Path, _: Sharing) -> Result<OwnedHandle> {
    let mut options = OpenOptions::new();
    options.read(true);
    std::os::windows::fs::OpenOptionsExt::custom_flags(&mut options, FILE_FLAG_BACKUP_SEMANTICS);
    let opened = match options.open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(path)
                .map_err(|error| Error::io("create the directory", path, error))?;
            step("directory made");
            options.open(path)
        }
        opened => opened,
    };
    Ok(opened
        .map_err(|error| Error::io("open the directory", path, error))?
        .into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_name_is_lowercase_and_maps_back_to_name() {
        for name in ["nul.record", "Nul.record", "NUL.x-_", "a"] {
            let file = encode(name);
            assert_eq!(file, file.to_ascii_lowercase());
            assert_eq!(decode(&file).as_deref(), Some(name));
        }
    }
}
