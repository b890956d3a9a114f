//! Files without a name, on systems that have none.

use std::fs::File;
use std::io;
use std::path::Path;

pub(crate) fn file_in(directory: &Path, _: u32) -> io::Result<File> {
    // A missing directory is reported first, as on systems with `O_TMPFILE`.
    directory.metadata()?;
    Err(io::ErrorKind::Unsupported.into())
}

pub(crate) fn name(_: &File, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

pub(crate) fn is_in_memory(_: &File) -> bool {
    false
}
