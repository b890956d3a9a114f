//! The flock of another program on a pidfile, on systems other than Linux.

use std::fs::File;
use std::io;
use std::path::Path;

use crate::base::owner::Owner;
use crate::sys::files::Metadata;

/// Always `None`: the write lock is a flock here.
pub(super) fn holder(_: &Path, _: &File, _: &Metadata) -> io::Result<Option<Option<Owner>>> {
    Ok(None)
}
