//! The guard of a held lock.

use std::fs::File;
#[cfg(unix)]
use std::io;
use std::sync::Arc;

use super::open_file::OpenFile;
use super::shared::Shared;
use crate::base::error::{Error, Result};
use crate::base::guard::{Guard, Recovered};
use crate::base::telemetry;
use crate::sys::clock::nanos;
use crate::sys::flock::{self, Mode};
use crate::sys::fork;

/// A held [`FileLock`](crate::FileLock), shared or exclusive; dropping it releases.
///
/// A forked child's copy of a guard holds nothing, and its file is an empty pipe: the lock stays
/// with the parent.
///
/// ```
/// # fn main() -> lockkit::Result<()> {
/// # let path = std::env::temp_dir().join(format!("lockkit-doc-file-guard-{}", std::process::id()));
/// let lock = lockkit::FileLock::new(&path);
/// assert!(lock.lock_shared()?.is_shared());
/// let guard = lock.lock()?;
/// assert!(!guard.is_shared() && guard.file().metadata().is_ok_and(|file| file.len() == 0));
/// guard.release()?;
/// # std::fs::remove_file(path).unwrap();
/// # Ok(()) }
/// ```
#[must_use = "a guard that is dropped at once releases its lock at once; bind it to a name such as `_guard`"]
#[derive(Debug)]
pub struct FileGuard {
    /// `None` after the release has taken it.
    open: Option<Box<OpenFile>>,
    mode: Mode,
    lock: Arc<Shared>,
}

impl FileGuard {
    pub(super) fn new(open: Box<OpenFile>, mode: Mode, lock: Arc<Shared>) -> Self {
        Self {
            open: Some(open),
            mode,
            lock,
        }
    }

    /// Returns the locked file, for reading, and for writing if its permissions allow it. Its
    /// position continues from one acquisition to the next; seek, or read and write at offsets.
    pub fn file(&self) -> &File {
        match &self.open {
            Some(open) => &open.file,
            None => unreachable!("only a release takes the file, and a release consumes the guard"),
        }
    }

    /// Returns another descriptor of the locked file.
    #[cfg(unix)]
    pub(crate) fn copy(&self) -> io::Result<File> {
        match &self.open {
            Some(open) if open.file.is_own() => fork::unguarded(|| open.file.try_clone()),
            _ => Err(fork::closed_by_program()),
        }
    }

    /// Returns whether the lock is shared, so that other processes may hold it shared at the same
    /// time.
    pub fn is_shared(&self) -> bool {
        self.mode == Mode::Shared
    }

    /// Releases the lock now and returns any failure.
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io) if the kernel refuses to unlock, or if the program has closed
    /// the descriptor and so released the lock earlier. The lock is released all the same.
    pub fn release(mut self) -> Result<()> {
        self.release_lock()
    }

    /// Always `None`: the content of the file belongs to the caller, so nothing shows how the
    /// previous holder ended.
    pub fn recovered(&self) -> Option<&Recovered> {
        None
    }

    /// Writes to the file, unless the descriptor no longer belongs to the lock.
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io) in that case; the lock was released when the descriptor was
    /// closed.
    pub(crate) fn write<T>(&mut self, write: impl FnOnce(&File) -> T) -> Result<T> {
        let Some(open) = &mut self.open else {
            unreachable!("only a release takes the file, and a release consumes the guard")
        };
        if !open.is_own(nanos(), OpenFile::HELD_DIVISOR) {
            return Err(Error::io(
                "write to",
                &self.lock.spec.path,
                fork::closed_by_program(),
            ));
        }
        let written = write(&open.file);
        open.used_at = nanos();
        Ok(written)
    }

    /// Releases as [`release`](Self::release), and calls `inspect` with the unlocked file.
    pub(crate) fn release_and<T>(mut self, inspect: impl FnOnce(&File) -> T) -> Result<T> {
        let Some(mut open) = self.open.take() else {
            unreachable!("only a release takes the file, and a release consumes the guard")
        };
        self.unlock(&mut open)?;
        let result = inspect(&open.file);
        open.used_at = nanos();
        self.keep_for_reuse(open);
        Ok(result)
    }

    fn release_lock(&mut self) -> Result<()> {
        let Some(mut open) = self.open.take() else {
            return Ok(());
        };
        self.unlock(&mut open)?;
        if !self.lock.spec.hardened && open.process.is_current() {
            telemetry::released(&*self.lock);
        }
        self.keep_for_reuse(open);
        Ok(())
    }

    fn unlock(&self, open: &mut OpenFile) -> Result<()> {
        // In a forked child the lock belongs to the parent, and the descriptor is inert.
        if !open.process.is_current() {
            return Ok(());
        }
        let failed = |error| Error::io("unlock", &self.lock.spec.path, error);
        let now = nanos();
        if !open.is_own(now, OpenFile::HELD_DIVISOR) {
            return Err(failed(fork::closed_by_program()));
        }
        open.used_at = now;
        // If this fails, closing the file releases the lock.
        flock::unlock(&open.file).map_err(failed)
    }

    fn keep_for_reuse(&self, open: Box<OpenFile>) {
        if open.process.is_current() {
            self.lock.spare.put(open);
        }
    }
}

impl Guard for FileGuard {
    fn release(self) -> Result<()> {
        self.release()
    }

    fn recovered(&self) -> Option<&Recovered> {
        self.recovered()
    }
}

impl Drop for FileGuard {
    fn drop(&mut self) {
        // Closing the file also releases, so a failure here leaves nothing locked.
        let _ = self.release_lock();
    }
}
