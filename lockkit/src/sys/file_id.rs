//! The identity of a file, and whether a path still names that file.

use std::io;

use super::files::{Metadata, MetadataExt};

/// Device and inode. No other file has them while this file is open.
pub(crate) type FileId = (u64, u64);

/// Returns the identity of the file.
pub(crate) fn of(found: &Metadata) -> FileId {
    (found.dev(), found.ino())
}

/// Returns the identity of a file that is renamed while it is open. On Windows it is the file's id
/// alone, because Wine forgets the volume of such a file.
pub(crate) fn of_renamed(found: &Metadata) -> FileId {
    (if cfg!(windows) { 0 } else { found.dev() }, found.ino())
}

/// Returns whether a path names the file that `is_file` recognizes. `named` is the metadata of the
/// path; a path without a file names none.
pub(crate) fn is_named(
    named: io::Result<Metadata>,
    is_file: impl FnOnce(&Metadata) -> bool,
) -> io::Result<bool> {
    match named {
        Ok(named) => Ok(is_file(&named)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}
