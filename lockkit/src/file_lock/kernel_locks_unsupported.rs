//! The locks on files on systems whose kernels do not list them.

use std::io;
use std::path::{Path, PathBuf};

pub(super) fn locked_files() -> Vec<PathBuf> {
    Vec::new()
}

pub(super) fn holders_and_waiters(_: &Path) -> io::Result<(Vec<u32>, u32)> {
    Ok((Vec::new(), 0))
}
