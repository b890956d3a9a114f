//! The locks of flock(2) on files, as the kernel lists them.

use std::io;
use std::path::{Path, PathBuf};

use crate::sys::proc_locks::{FileLocks, LockHolders};

/// Returns the paths of the files that are locked.
pub(super) fn locked_files() -> Vec<PathBuf> {
    let locks = FileLocks::read();
    locks
        .files()
        .filter(|(_, on)| on.flock.is_some())
        .map(|(path, _)| path.to_owned())
        .collect()
}

/// Returns the holders and the number of waiters of the lock on the file at `path`. A missing file
/// has none.
pub(super) fn holders_and_waiters(path: &Path) -> io::Result<(Vec<u32>, u32)> {
    match FileLocks::read().on(path) {
        Ok(on) => Ok(on
            .flock
            .map_or_else(Default::default, |LockHolders { pids, waiters, .. }| {
                (pids, waiters)
            })),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Default::default()),
        Err(error) => Err(error),
    }
}
