//! Stale pidfiles: whether a file is stale, and its removal.

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use super::existing::is_at;
use super::pid_file::PidFile;
use super::taker::{TAKER_TIMEOUT, TakerLock};
use crate::base::error::{Error, Result};
use crate::base::wait::Backoff;
use crate::sys::failpoint::step;
use crate::sys::{files, write_lock};

impl PidFile {
    /// Removes the file at `path` if it is stale, and returns whether it did. It excludes other
    /// takers meanwhile, so it never removes the file of a process that has just taken it over.
    ///
    /// ```
    /// # fn main() -> lockkit::Result<()> {
    /// if lockkit::PidFile::remove_stale("/run/lockkit-doc-app.pid")? {
    ///     println!("it was stale");
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// - [`RelativePath`](crate::ErrorKind::RelativePath) unless the path is absolute.
    /// - [`NotAPidFile`](crate::ErrorKind::NotAPidFile) for a file that contains something other
    ///   than a pid.
    /// - [`Insecure`](crate::ErrorKind::Insecure) for a symbolic or hard link.
    /// - [`Io`](crate::ErrorKind::Io) if the file cannot be read or removed.
    pub fn remove_stale(path: impl Into<PathBuf>) -> Result<bool> {
        let pid_file = Self::new(path)?;
        let path = &*pid_file.path;
        let failed = |error| Error::io("remove", path, error);
        let (mut backoff, since) = (Backoff::new(), Instant::now());
        while pid_file.stale()?.is_some() {
            let taker_file = match pid_file.lock_taker_file("remove")? {
                TakerLock::Acquired(taker_file) => taker_file,
                TakerLock::Busy(_) if since.elapsed() < TAKER_TIMEOUT => {
                    std::thread::sleep(backoff.next());
                    continue;
                }
                TakerLock::Busy(Some(error)) => return Err(error),
                TakerLock::Busy(None) => break,
            };
            let Some(existing) = pid_file.stale()? else {
                break;
            };
            if is_at(path, &existing.file)? {
                fs::remove_file(path).map_err(failed)?;
                step("stale file removed");
                drop(taker_file);
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Returns whether [`remove_stale`](Self::remove_stale) would remove the file at `path` now.
    /// Changes nothing.
    ///
    /// ```
    /// # fn main() -> lockkit::Result<()> {
    /// assert!(!lockkit::PidFile::is_stale("/run/lockkit-doc-none.pid")?);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`remove_stale`](Self::remove_stale); also [`Io`](crate::ErrorKind::Io) if this process
    /// may not remove the file.
    pub fn is_stale(path: impl Into<PathBuf>) -> Result<bool> {
        let pid_file = Self::new(path)?;
        let Some(existing) = pid_file.stale()? else {
            return Ok(false);
        };
        files::check_removable(pid_file.directory(), &existing.metadata)
            .map_err(|error| Error::io("remove", &pid_file.path, error))?;
        let taker = pid_file.taker_path();
        let Some(file) = pid_file.open_taker_file(&taker)? else {
            return Ok(true);
        };
        let failed = |error| Error::io("look at", &taker, error);
        // A taker that holds its file for so long is stopped.
        let (mut backoff, since) = (Backoff::new(), Instant::now());
        while write_lock::holder(&file).map_err(failed)?.is_some() {
            if since.elapsed() >= TAKER_TIMEOUT {
                return Ok(false);
            }
            std::thread::sleep(backoff.next());
        }
        pid_file.check_taker_file(&taker, &file).map(|_| true)
    }
}
