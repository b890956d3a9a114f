//! Writes the owner into a pidfile: the pid, and the identity in an extended attribute.

use std::fs::File;
use std::io;
use std::path::Path;

use super::{record, verdict};
use crate::base::error::{Error, Result};
use crate::base::owner::Owner;
use crate::sys::failpoint::step;
use crate::sys::file_id::{self, FileId};
use crate::sys::files::{self, FileExt, Metadata};
use crate::sys::flock::{self, Mode};
use crate::sys::xattr;

/// The file that a holder has written.
#[derive(Debug)]
pub(super) struct WrittenFile {
    /// The whole content of the file.
    pub(super) text: String,
    /// Whether the file also has the attribute with the identity of the owner.
    pub(super) has_identity: bool,
    pub(super) id: FileId,
}

/// Writes the owner into a new file, which will be at `path`. This process holds its write lock.
pub(super) fn write_owner(path: &Path, file: &File, owner: &Owner) -> Result<WrittenFile> {
    // The file is new, so no other process can have a flock on it.
    lock_for_others(file).map_err(|error| Error::io("lock", path, error))?;
    let text = record::content(owner.pid);
    file.write_all_at(text.as_bytes(), 0)
        .map_err(|error| Error::io("write", path, error))?;
    step("pid written");
    let found = files::metadata_of(file).map_err(|error| Error::io("look at", path, error))?;
    Ok(WrittenFile {
        text,
        has_identity: set_identity(file, &found, owner),
        id: file_id::of_renamed(&found),
    })
}

/// Acquires the flock if it is free, for programs that use no other lock.
pub(super) fn lock_for_others(file: &File) -> io::Result<()> {
    match flock::try_lock(file, Mode::Exclusive) {
        Err(error) if !flock::is_unsupported(&error) => Err(error),
        _ => Ok(()),
    }
}

/// Writes the identity of `owner` to a file that was just written, as `found` shows, and returns
/// whether that succeeded. Without an identity the file is judged by its pid and its time, so a
/// full or unsupported attribute does no harm.
pub(super) fn set_identity(file: &File, found: &Metadata, owner: &Owner) -> bool {
    let identity = found
        .modified()
        .ok()
        .and_then(|written| record::identity(owner, written));
    identity.is_some_and(|identity| xattr::set(file, record::ATTRIBUTE, &identity).is_ok())
}

/// Replaces `old`, the whole content of the file, with `new`. A single write covers all of `old`,
/// so no kill leaves a mixture. If the write fails, `old` is restored.
pub(super) fn overwrite(file: &File, new: &str, old: &[u8]) -> io::Result<()> {
    let before = file.metadata()?.modified()?;
    let mut bytes = new.as_bytes().to_vec();
    bytes.resize(new.len().max(old.len()), b'\n');
    let written = file.write_all_at(&bytes, 0).and_then(|()| {
        step("record written");
        match new.len() < old.len() {
            true => file
                .set_len(new.len() as u64)
                .map(|()| step("file truncated")),
            false => Ok(()),
        }
    });
    if written.is_err() && !verdict::read(file).is_ok_and(|bytes| bytes == old) {
        let _ = file.write_all_at(old, 0);
        step("old content restored");
        let _ = file.set_len(old.len() as u64);
        step("old length restored");
        let _ = file.set_modified(before);
    }
    written
}
