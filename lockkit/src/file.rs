//! A lock on a path: flock(2), taken so that a deleted or replaced file is noticed.
//!
//! The lock is the kernel's, on the open file; the path only leads to it. So after locking, the open file is compared
//! with what the path names now, and the acquisition starts again if somebody deleted or replaced the file meanwhile:
//! whoever holds the lock holds it on the file that the next taker will open. The file is never deleted here.
//!
//! Each acquisition has an open file of its own, so threads exclude each other exactly as processes do. Files are kept
//! between acquisitions, which then cost no open. A wait without an end sits in the kernel; one with a limit or a token
//! tries again on a timer, because a thread blocked in flock could not be called back.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind as Io};
use std::ops::Deref;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::fs::{Mode as Permissions, OFlags, RawMode, fchmod};

use crate::error::{Error, ErrorKind, Result};
use crate::lock::{Guard, Recovered, lock_methods};
use crate::owner::Owner;
use crate::steps::step;
use crate::sys::flock::{self, Mode};
use crate::sys::fork::{self, Shielded};
use crate::wait::{Backoff, Subject, Wait};

/// How often a file may be replaced under an acquisition before it is called rogue.
const MOST_REPLACEMENTS: u32 = 100;

/// A lock on a file.
///
/// Cloning gives another handle on the same lock. It excludes every process that locks the same file with flock(2),
/// the `flock` command among them.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = std::env::temp_dir().join(format!("lockkit-doc-file-{}", std::process::id()));
/// # std::fs::create_dir_all(&folder)?;
/// let lock = lockkit::FileLock::new(folder.join("data.lock"));
/// let guard = lock.lock()?;
/// assert!(lock.try_lock().unwrap_err().is_held());
/// drop(guard);
/// # std::fs::remove_dir_all(folder)?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct FileLock(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    /// The permissions of a file made here.
    mode: u32,
    /// The folder is open to other users, who may have put something else in the file's place.
    wary: bool,
    /// Open files that no guard uses, and the fork generation they belong to.
    spare: Mutex<(u32, Vec<Shielded<File>>)>,
}

impl FileLock {
    /// A lock on the file at `path`, which is made when it is first locked and missing. Nothing happens to the file
    /// until then.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self::with(path.into(), 0o600, false)
    }

    fn with(path: PathBuf, mode: u32, wary: bool) -> Self {
        Self(Arc::new(Inner { path, mode, wary, spare: Mutex::default() }))
    }

    /// A lock on a file of lockkit's own, which has exactly `mode`, and which no symlink, hard link or special file
    /// may stand for.
    pub(crate) fn own(path: PathBuf, mode: u32) -> Self {
        Self::with(path, mode, true)
    }

    /// The permissions that a file gets when locking makes it, less the process's umask; 0600 unless told otherwise.
    pub fn create_with_mode(self, mode: u32) -> Self {
        Self::with(self.0.path.clone(), mode, self.0.wary)
    }

    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Takes the lock, waiting as `wait` says.
    ///
    /// # Errors
    /// [`Held`](ErrorKind::Held), [`Timeout`](ErrorKind::Timeout) or [`Cancelled`](ErrorKind::Cancelled) as `wait` has
    /// it; [`Io`](ErrorKind::Io) when the file cannot be opened, made or locked;
    /// [`RogueDeletion`](ErrorKind::RogueDeletion) when somebody replaces it all the time.
    pub fn acquire(&self, wait: &Wait) -> Result<FileGuard> {
        self.acquire_as(wait, &*self.0)
    }

    /// As [`acquire`](Self::acquire), with errors that speak of `subject`.
    pub(crate) fn acquire_as(&self, wait: &Wait, subject: &dyn Subject) -> Result<FileGuard> {
        let file = self.0.acquire(wait, subject)?;
        Ok(FileGuard { file: Some(file), generation: fork::generation(), lock: self.0.clone() })
    }
}

lock_methods!(FileLock, FileGuard);

impl Subject for Inner {
    fn describe(&self) -> String {
        format!("the lock on {}", self.path.display())
    }

    /// The kernel does not say.
    fn holder(&self) -> Option<Owner> {
        None
    }
}

impl Inner {
    fn acquire(&self, wait: &Wait, subject: &dyn Subject) -> Result<Shielded<File>> {
        wait.check(subject)?;
        for _ in 0..MOST_REPLACEMENTS {
            let file = match self.take_spare() {
                Some(file) => file,
                None => self.open()?,
            };
            self.flock(&file, wait, subject)?;
            if self.is_still_at_path(&file)? {
                return Ok(file);
            }
        }
        Err(ErrorKind::RogueDeletion { path: self.path.clone() }.into())
    }

    fn flock(&self, file: &File, wait: &Wait, subject: &dyn Subject) -> Result<()> {
        let failed = |error| Error::io("lock", &self.path, error);
        if flock::try_lock(file, Mode::Exclusive).map_err(failed)? {
            return Ok(());
        }
        let Some(patience) = wait.patience()? else {
            return Err(subject.held());
        };
        if patience.is_endless() {
            return flock::lock(file, Mode::Exclusive).map_err(failed);
        }
        let mut backoff = Backoff::new();
        loop {
            if let Err(gave_up) = patience.sleep(backoff.next())? {
                return Err(patience.error(gave_up, subject));
            }
            if flock::try_lock(file, Mode::Exclusive).map_err(failed)? {
                return Ok(());
            }
        }
    }

    fn is_still_at_path(&self, file: &File) -> Result<bool> {
        let failed = |error| Error::io("look at", &self.path, error);
        let open = file.metadata().map_err(failed)?;
        match std::fs::metadata(&self.path) {
            Ok(named) => Ok((named.dev(), named.ino()) == (open.dev(), open.ino())),
            Err(error) if error.kind() == Io::NotFound => Ok(false),
            Err(error) => Err(failed(error)),
        }
    }

    /// Opens the file, or makes it: never both in one step, which the kernel refuses for another user's file in a
    /// sticky folder (`fs.protected_regular`).
    fn open(&self) -> Result<Shielded<File>> {
        for _ in 0..MOST_REPLACEMENTS {
            match self.open_existing() {
                Err(error) if error.kind() == Io::NotFound => {}
                opened => return opened.map_err(|error| Error::io("open", &self.path, error)),
            }
            let mut options = OpenOptions::new();
            options.read(true).write(true).create_new(true).mode(self.mode);
            match Shielded::new(|| options.open(&self.path)) {
                Err(error) if error.kind() == Io::AlreadyExists => continue,
                Ok(file) if self.wary => {
                    step("file made");
                    // The umask is not ours to change, but the file's mode is.
                    fchmod(&*file, Permissions::from_raw_mode(self.mode as RawMode))
                        .map_err(|error| Error::io("change the mode of", &self.path, error))?;
                    return Ok(file);
                }
                Ok(file) => {
                    step("file made");
                    return Ok(file);
                }
                Err(error) => return Err(Error::io("create", &self.path, error)),
            }
        }
        Err(ErrorKind::RogueDeletion { path: self.path.clone() }.into())
    }

    /// For writing where that is allowed, as some file systems want it for an exclusive lock; else for reading.
    fn open_existing(&self) -> io::Result<Shielded<File>> {
        // A FIFO must not keep the call waiting for its other end.
        let flags = OFlags::NONBLOCK | if self.wary { OFlags::NOFOLLOW } else { OFlags::empty() };
        let open = |writing| {
            let mut options = OpenOptions::new();
            options.read(true).write(writing).custom_flags(flags.bits() as i32);
            Shielded::new(|| options.open(&self.path))
        };
        let file = match open(true) {
            Err(error) if matches!(error.kind(), Io::PermissionDenied | Io::ReadOnlyFilesystem | Io::IsADirectory) => {
                open(false)
            }
            opened => opened,
        }?;
        let found = file.metadata()?;
        // One without a name was deleted just now, which shows once it is locked.
        if self.wary && !(found.is_file() && found.nlink() <= 1) {
            return Err(io::Error::new(Io::InvalidInput, "not a plain file of its own"));
        }
        match found.is_file() || found.is_dir() {
            true => Ok(file),
            false => Err(io::Error::new(Io::InvalidInput, "neither a file nor a folder")),
        }
    }

    fn take_spare(&self) -> Option<Shielded<File>> {
        let mut spare = self.spare.lock();
        if spare.0 != fork::generation() {
            *spare = (fork::generation(), Vec::new());
        }
        spare.1.pop()
    }

    fn keep(&self, file: Shielded<File>) {
        let mut spare = self.spare.lock();
        if spare.0 == fork::generation() {
            spare.1.push(file);
        }
    }
}

/// A held [`FileLock`]; dropping it releases.
#[must_use = "a guard that is dropped at once releases its lock at once; bind it to a name such as `_guard`"]
#[derive(Debug)]
pub struct FileGuard {
    /// Taken by the release.
    file: Option<Shielded<File>>,
    generation: u32,
    lock: Arc<Inner>,
}

impl FileGuard {
    /// The locked file, for reading, and for writing where its permissions allow it.
    pub fn file(&self) -> &File {
        self.file.as_ref().expect("a guard has its file until it releases").deref()
    }

    /// Releases now and says what went wrong.
    ///
    /// # Errors
    /// [`Io`](ErrorKind::Io) when the kernel refuses to unlock, which it does for no known reason.
    pub fn release(mut self) -> Result<()> {
        self.give_back()
    }

    /// Always `None`: the file's content is the caller's own, so nothing tells how the previous holder ended.
    pub fn recovered(&self) -> Option<&Recovered> {
        None
    }

    /// As [`release`](Self::release), and looks at the file once it is unlocked.
    pub(crate) fn release_and<T>(mut self, look: impl FnOnce(&File) -> T) -> Result<T> {
        let Some(file) = self.file.take() else { unreachable!("a guard has its file until it releases") };
        self.unlock(&file)?;
        let seen = look(&file);
        self.keep(file);
        Ok(seen)
    }

    fn give_back(&mut self) -> Result<()> {
        let Some(file) = self.file.take() else { return Ok(()) };
        self.unlock(&file)?;
        self.keep(file);
        Ok(())
    }

    fn unlock(&self, file: &File) -> Result<()> {
        // In a forked child the lock is the parent's, and the descriptor here an inert one.
        match self.generation == fork::generation() {
            true => flock::unlock(file).map_err(|error| Error::io("unlock", &self.lock.path, error)),
            false => Ok(()),
        }
    }

    fn keep(&self, file: Shielded<File>) {
        if self.generation == fork::generation() {
            self.lock.keep(file);
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
        // Closing the file releases, too, so a failure here leaves nothing locked.
        let _ = self.give_back();
    }
}
