//! The guard of a held pidfile.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind as Io;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use super::existing::{is_at, names};
use super::record::{self, Content};
use super::write::{WrittenFile, lock_for_others, overwrite, set_identity};
use super::{pid_file, verdict};
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::guard::{Guard, Recovered};
use crate::base::lock_info::LockInfo;
use crate::base::owner::{Liveness, Owner};
use crate::base::telemetry;
use crate::sys::failpoint::step;
use crate::sys::file_id::{self, FileId};
use crate::sys::files::{self, Metadata, OpenOptionsExt};
use crate::sys::fork::{ForkGuarded, ProcessId};
use crate::sys::process_local::ProcessLocal;
use crate::sys::{flock, write_lock};

/// The files of this process's guards. Any other file that names this process is from before an
/// exec, or from a supervisor.
fn held_files() -> &'static Mutex<HashSet<FileId>> {
    static HELD: ProcessLocal<Mutex<HashSet<FileId>>> = ProcessLocal::new();
    HELD.get_or_make(Mutex::default)
}

/// Returns whether a guard of this process holds the file.
pub(super) fn is_held_here(found: &Metadata) -> bool {
    held_files().lock().contains(&file_id::of_renamed(found))
}

/// A held [`PidFile`](crate::PidFile); dropping it removes the file and releases.
///
/// **A fork** copies the guard. As long as the child does not call [`rewrite`](Self::rewrite), the
/// parent is the owner, and dropping the child's copy releases nothing. A child that does not
/// become the owner should drop it. If it keeps the copy and the parent is killed, the file stays
/// locked until the child ends. A program started with exec inherits nothing.
///
/// ```
/// # fn main() -> lockkit::Result<()> {
/// # let path = std::env::temp_dir().join(format!("lockkit-doc-pidguard-{}", std::process::id()));
/// let guard = lockkit::PidFile::new(&path)?.try_lock()?;
/// guard.verify()?; // From time to time, in a daemon that wants to know whether its file is still there.
/// guard.release()?;
/// # Ok(()) }
/// ```
#[must_use = "a guard that is dropped at once releases its lock at once; bind it to a name such as `_guard`"]
#[derive(Debug)]
pub struct PidGuard {
    /// `None` after the release has taken it.
    file: Option<ForkGuarded<File>>,
    path: Arc<Path>,
    written: WrittenFile,
    /// Identifies the process that holds the lock, because a forked child has a copy.
    process: ProcessId,
    recovered: Option<Box<Recovered>>,
}

impl PidGuard {
    /// Creates the guard of a file that this process has just acquired from the owner that died, if
    /// there was one.
    pub(super) fn new(
        path: &Arc<Path>,
        file: ForkGuarded<File>,
        written: WrittenFile,
        predecessor: Option<Box<Owner>>,
    ) -> Self {
        held_files().lock().insert(written.id);
        Self {
            file: Some(file.know_as(written.id).keep_across_fork()),
            path: path.clone(),
            written,
            process: ProcessId::current(),
            recovered: predecessor.map(|owner| Box::new(Recovered::new(Some(*owner)))),
        }
    }

    /// Verifies that the file still exists and has the written content. Until a forked child has
    /// called [`rewrite`](Self::rewrite), that content names its parent; otherwise it names this
    /// process.
    ///
    /// # Errors
    /// - [`RogueDeletion`](ErrorKind::RogueDeletion) if another process removed, replaced or
    ///   rewrote the file.
    /// - [`Io`](ErrorKind::Io) if the file cannot be checked.
    pub fn verify(&self) -> Result<()> {
        let Some(file) = &self.file else {
            return Err(self.rogue_deletion());
        };
        let opened = self.reopen_if_closed(file)?;
        self.verify_content(opened.as_ref().unwrap_or(file))
    }

    fn verify_content(&self, file: &File) -> Result<()> {
        match self.read(file)? == self.written.text.as_bytes() && is_at(&self.path, file)? {
            true => Ok(()),
            false => Err(self.rogue_deletion()),
        }
    }

    /// Opens the file through another descriptor, if the program has closed the guard's. The lock
    /// is still held, because the file names a live process. A daemon that closes all inherited
    /// descriptors is such a program.
    fn reopen_if_closed(&self, file: &ForkGuarded<File>) -> Result<Option<ForkGuarded<File>>> {
        if file.is_own() {
            return Ok(None);
        }
        let open = |writing| {
            let mut options = OpenOptions::new();
            options
                .read(true)
                .write(writing)
                .custom_flags(files::NOFOLLOW | files::NONBLOCK | files::NOCTTY);
            ForkGuarded::new(|| files::open(&options, &self.path))
        };
        let opened = match open(true) {
            // A removal or a check of the file does not need permission to write it.
            Err(error) if error.kind() == Io::PermissionDenied => open(false),
            opened => opened,
        };
        let opened = match opened {
            Err(error) if error.kind() == Io::NotFound || files::is_symlink_refused(&error) => {
                return Err(self.rogue_deletion());
            }
            opened => opened.map_err(|error| Error::io("open", &self.path, error))?,
        };
        let found =
            files::metadata_of(&opened).map_err(|error| Error::io("look at", &self.path, error))?;
        match file_id::of_renamed(&found) == self.written.id {
            true => Ok(Some(opened.know_as(self.written.id).keep_across_fork())),
            false => Err(self.rogue_deletion()),
        }
    }

    /// Makes this process the owner, and writes its pid: for the child after a daemon's fork. No
    /// other process can acquire the lock before, during or after the call, whether the parent
    /// still lives or not.
    ///
    /// After this the parent's copy of the guard releases nothing. Before, it does: the parent
    /// should end with [`process::exit`](std::process::exit), which drops nothing, or wait for a
    /// message from the child. A child that closes all inherited descriptors must call this first,
    /// or while the parent lives. A file that has no lock, and names a process that has ended, is
    /// free.
    ///
    /// ```no_run
    /// # fn fork() -> u32 { 0 }
    /// # fn main() -> lockkit::Result<()> {
    /// let mut guard = lockkit::PidFile::new("/run/app.pid")?.try_lock()?;
    /// if fork() != 0 {
    ///     std::process::exit(0); // the parent
    /// }
    /// guard.rewrite()?; // the daemon
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// - [`RogueDeletion`](ErrorKind::RogueDeletion) if the file was removed or has another
    ///   content, for example after a release by the parent.
    /// - [`Io`](ErrorKind::Io) if the file cannot be written.
    ///
    /// On an error the owner is the same as before.
    pub fn rewrite(&mut self) -> Result<()> {
        self.write(&Owner::current())?;
        self.process = ProcessId::current();
        held_files().lock().insert(self.written.id);
        Ok(())
    }

    /// Writes another process into the file as its holder, for a supervisor that acquires the lock
    /// for a child. The guard stays here, and dropping it releases as before. If this process dies
    /// first, no other process can acquire the lock as long as the named process lives.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let path = std::env::temp_dir().join(format!("lockkit-doc-rewrite-for-{}.pid", std::process::id()));
    /// use lockkit::{Owner, PidFile, PidStatus};
    /// let mut guard = PidFile::new(&path)?.try_lock()?;
    /// let mut child = std::process::Command::new("sleep").arg("60").spawn()?;
    /// guard.rewrite_for(&Owner::of(child.id()).expect("it runs"))?;
    /// assert!(matches!(PidFile::inspect(&path)?, PidStatus::Running(owner) if owner.pid() == child.id()));
    /// child.kill()?;
    /// child.wait()?;
    /// guard.release()?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`rewrite`](Self::rewrite).
    pub fn rewrite_for(&mut self, owner: &Owner) -> Result<()> {
        self.write(owner)
    }

    /// Verifies the file, and writes `owner`. The pid is written first, which invalidates the
    /// previous owner's identity. If this process is killed in between, it leaves a file that is
    /// judged by its pid and its time.
    fn write(&mut self, owner: &Owner) -> Result<()> {
        let failed = |error| Error::io("write", &self.path, error);
        let Some(file) = &self.file else {
            return Err(self.rogue_deletion());
        };
        let opened = self.reopen_if_closed(file)?;
        let file = opened.as_ref().unwrap_or(file);
        self.verify_content(file)?;
        if opened.is_some() {
            // A parent that still lives has the locks, and then the content is enough.
            write_lock::try_lock(file)
                .and_then(|_| lock_for_others(file))
                .map_err(failed)?;
        }
        let text = record::content(owner.pid);
        overwrite(file, &text, self.written.text.as_bytes()).map_err(failed)?;
        self.written.text = text;
        // The file already names the owner, so a failure here is ignored.
        self.written.has_identity =
            files::metadata_of(file).is_ok_and(|found| set_identity(file, &found, owner));
        self.file = opened.or(self.file.take());
        Ok(())
    }

    /// Removes the file, releases the lock, and returns any failure.
    ///
    /// A process may have given up the rights with which it created the file, and so cannot remove
    /// it. Then it leaves a blank line in the file, which the next owner takes over at once.
    ///
    /// # Errors
    /// - [`RogueDeletion`](ErrorKind::RogueDeletion) if another process removed, replaced or
    ///   rewrote the file; a new file in its place stays.
    /// - [`Io`](ErrorKind::Io) if the file cannot be removed.
    ///
    /// The lock is released all the same, unless the file cannot be read. Then it is unknown
    /// whether a forked child has taken it over, and the lock stays held until this process ends.
    pub fn release(mut self) -> Result<()> {
        self.release_lock()
    }

    /// Returns the owner that died without a release, if the file named one.
    pub fn recovered(&self) -> Option<&Recovered> {
        self.recovered.as_deref()
    }

    fn release_lock(&mut self) -> Result<()> {
        let Some(mut file) = self.file.take() else {
            return Ok(());
        };
        // The copy shares the open file with the parent's, so closing the copy of a forked child
        // releases nothing.
        if !self.process.is_current() {
            return Ok(());
        }
        // This comes first, because another file of this process may get the same numbers.
        held_files().lock().remove(&self.written.id);
        if let Some(opened) = self.reopen_if_closed(&file)? {
            file = opened;
        }
        // A file that stayed would exclude others for as long as this process lives, so a failed
        // read is repeated once.
        let removed = match self.read(&file).or_else(|_| self.read(&file)) {
            Ok(bytes) if bytes == self.written.text.as_bytes() => self.remove(&file),
            Ok(bytes) => match self.new_owner(&file, &bytes) {
                None => Err(self.rogue_deletion()),
                // An unlock would release the lock of the child; closing the file does not.
                Some(NewOwner::ForkedChild) => return Ok(()),
                Some(NewOwner::OtherProcess) => return Err(self.rogue_deletion()),
            },
            Err(error) => Err(error),
        };
        // Closing is not enough, because forked children may have the open file, too.
        let unlocked = write_lock::unlock(&file).and_then(|()| match flock::unlock(&file) {
            // Both are one lock on Windows, and it is unlocked already.
            _ if cfg!(windows) => Ok(()),
            Err(error) if flock::is_unsupported(&error) => Ok(()),
            unlocked => unlocked,
        });
        telemetry::released(self);
        removed.and(unlocked.map_err(|error| Error::io("unlock", &self.path, error)))
    }

    /// Returns the live process that has written its pid into the file, if there is one. A process
    /// without an identity counts as a forked child, unless this guard wrote an identity.
    fn new_owner(&self, file: &File, bytes: &[u8]) -> Option<NewOwner> {
        let Content::Pids {
            pids,
            is_single: true,
            ..
        } = record::parse(bytes)
        else {
            return None;
        };
        let found = files::metadata_of(file).ok()?;
        match verdict::identity(file, pids[0], &found) {
            Ok(Some(owner)) => {
                (owner.liveness_by_name() != Liveness::Dead).then_some(NewOwner::ForkedChild)
            }
            _ => verdict::living(pids[0], file, &found).map(|_| match self.written.has_identity {
                true => NewOwner::OtherProcess,
                false => NewOwner::ForkedChild,
            }),
        }
    }

    fn remove(&self, file: &File) -> Result<()> {
        // The descriptor is known to be this file's.
        let removed = match names(&self.path, self.written.id) {
            Ok(true) => match fs::remove_file(&self.path) {
                Err(error) if error.kind() == Io::NotFound => return Err(self.rogue_deletion()),
                removed => removed.map_err(|error| Error::io("remove", &self.path, error)),
            },
            Ok(false) => return Err(self.rogue_deletion()),
            Err(error) => Err(error),
        };
        if removed.is_err() {
            let _ = overwrite(file, record::BLANK, self.written.text.as_bytes());
        }
        step("file removed");
        removed
    }

    fn read(&self, file: &File) -> Result<Vec<u8>> {
        verdict::read(file).map_err(|error| Error::io("read", &self.path, error))
    }

    fn rogue_deletion(&self) -> Error {
        ErrorKind::RogueDeletion {
            path: self.path.to_path_buf(),
        }
        .into()
    }
}

/// A live process that has written its pid into the file of a guard.
enum NewOwner {
    /// A forked child that has called [`PidGuard::rewrite`].
    ForkedChild,
    OtherProcess,
}

impl LockInfo for PidGuard {
    fn describe(&self) -> String {
        pid_file::describe(&self.path)
    }

    #[cfg(feature = "tracing")]
    fn label(&self) -> (&'static str, String) {
        pid_file::label(&self.path)
    }

    fn holder(&self) -> Option<Owner> {
        Some(Owner::current())
    }
}

impl Guard for PidGuard {
    fn release(self) -> Result<()> {
        self.release()
    }

    fn recovered(&self) -> Option<&Recovered> {
        self.recovered()
    }
}

impl Drop for PidGuard {
    fn drop(&mut self) {
        // Closing the file also releases, so a failure here leaves nothing locked.
        let _ = self.release_lock();
    }
}
