//! A named lock as a file in a private directory, locked with flock.
//!
//! The directory has a fixed path (see [`runtime_dir`](crate::base::runtime_dir)). The file
//! contains the record of its holder (see [`holder_record`]), and is never deleted. While one of
//! its locks is in use, a user's directory itself has a shared lock: it makes [systemd-tmpfiles]
//! leave the files of the directory alone.
//!
//! [systemd-tmpfiles]: https://systemd.io/TEMPORARY_DIRECTORIES/

use std::fs::{File, OpenOptions};
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::base::error::{Error, Result};
use crate::base::guard::Recovered;
use crate::base::holder_record::{self, RecordStorage};
use crate::base::lock_info::LockInfo;
use crate::base::owner::{Liveness, Owner};
use crate::base::runtime_dir::{self, Sharing};
use crate::base::wait::Wait;
use crate::file_lock::{FileGuard, FileLock};
use crate::sys::failpoint::step;
use crate::sys::files::{self, OpenOptionsExt};
use crate::sys::flock;
use crate::sys::fork::ForkGuarded;

#[derive(Debug)]
pub(super) struct NamedFileLock {
    name: String,
    sharing: Sharing,
    opened: Mutex<Option<Arc<Opened>>>,
}

#[derive(Debug)]
struct Opened {
    /// A user's directory has a shared lock, against cleaners.
    _directory: ForkGuarded<File>,
    lock: FileLock,
}

impl NamedFileLock {
    pub(super) fn new(name: &str, sharing: Sharing) -> Self {
        Self {
            name: name.to_owned(),
            sharing,
            opened: Mutex::default(),
        }
    }

    pub(super) fn acquire(
        &self,
        wait: &Wait,
        info: &dyn LockInfo,
    ) -> Result<(FileGuard, Option<Box<Recovered>>)> {
        let mut guard = match self.open()?.lock.acquire_as(wait, info) {
            // The directory has been deleted since.
            Err(error) if error.is_io(io::ErrorKind::NotFound) => {
                *self.opened.lock() = None;
                self.open()?.lock.acquire_as(wait, info)?
            }
            acquired => acquired?,
        };
        let recovered = guard.write(holder_record::record_current)?;
        Ok((guard, recovered))
    }

    /// Returns the locks that are held now: name, owner and number of waiters. Creates nothing.
    pub(super) fn list(sharing: Sharing) -> Vec<(String, Option<Owner>, u32)> {
        let Some(directory) = runtime_dir::path(sharing) else {
            return Vec::new();
        };
        let mut living = holder_record::LivenessCache::default();
        #[cfg(target_os = "linux")]
        let table = crate::sys::proc_locks::FileLocks::read_table();
        let mut held = |entry: std::io::Result<std::fs::DirEntry>| {
            let entry = entry.ok()?;
            let file = entry.file_name().into_string().ok()?;
            let name = runtime_dir::name_of(&file, sharing)?
                .strip_suffix(".lock")?
                .to_owned();
            let lock = Self::new(&name, sharing);
            let owner = lock
                .recorded()
                .ok()
                .flatten()
                .filter(|owner| living.may_live(owner));
            // The table of locks is read once for all files.
            #[cfg(target_os = "linux")]
            let waiters = table
                .on(&entry.path())
                .ok()
                .and_then(|on| on.flock)
                .map(|locked| locked.waiters);
            #[cfg(not(target_os = "linux"))]
            let waiters = owner.as_ref().map(|_| lock.waiters().unwrap_or_default());
            (owner.is_some() || waiters.is_some())
                .then(|| (name, owner, waiters.unwrap_or_default()))
        };
        std::fs::read_dir(directory)
            .into_iter()
            .flatten()
            .filter_map(&mut held)
            .collect()
    }

    /// Returns how many waiters the lock has in the kernel.
    pub(super) fn waiters(&self) -> Result<u32> {
        match runtime_dir::path(self.sharing) {
            Some(_) => FileLock::own(self.path()?, runtime_dir::file_mode(self.sharing)).waiters(),
            None => Ok(0),
        }
    }

    fn path(&self) -> Result<std::path::PathBuf> {
        Ok(runtime_dir::open(self.sharing)?.file(&self.file()))
    }

    pub(super) fn release(&self, mut guard: FileGuard) -> Result<()> {
        guard.write(|file| {
            file.clear();
            step("record cleared");
        })?;
        guard.release()
    }

    /// Returns the holder from the record. Creates nothing.
    ///
    /// # Errors
    /// Those of the directory and of the file, except that a missing one means no holder.
    pub(super) fn owner(&self) -> Result<Option<Owner>> {
        Ok(self
            .recorded()?
            .filter(|owner| owner.liveness_by_name() != Liveness::Dead))
    }

    /// Returns the holder from the record in the file; it may have died.
    fn recorded(&self) -> Result<Option<Owner>> {
        if runtime_dir::path(self.sharing).is_none() {
            return Ok(None);
        }
        let path = self.path()?;
        // Another process may have put a link or a FIFO there. A link must not be followed, and a
        // FIFO must not block.
        let mut options = OpenOptions::new();
        options
            .read(true)
            .custom_flags(files::NOFOLLOW | files::NONBLOCK);
        match files::open(&options, &path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Ok(file) => Ok(holder_record::holder(&file)),
            Err(error) => Err(Error::io("open", &path, error)),
        }
    }

    /// Returns whether a record names a live holder, or the kernel shows a holder that has not
    /// written its record yet. Creates nothing.
    ///
    /// # Errors
    /// As [`owner`](Self::owner).
    pub(super) fn is_held(&self) -> Result<bool> {
        if self.owner()?.is_some() {
            return Ok(true);
        }
        #[cfg(target_os = "linux")]
        if runtime_dir::path(self.sharing).is_some() {
            let on = crate::sys::proc_locks::FileLocks::read_table().on(&self.path()?);
            return Ok(on.is_ok_and(|on| on.flock.is_some()));
        }
        Ok(false)
    }

    fn open(&self) -> Result<Arc<Opened>> {
        let mut opened = self.opened.lock();
        if let Some(opened) = &*opened {
            return Ok(opened.clone());
        }
        let directory = runtime_dir::open(self.sharing)?;
        #[cfg(windows)]
        if self.sharing == Sharing::Machine {
            // Creates the file here, where it gets permissions for all users.
            directory.open_file(&self.file())?;
        }
        let lock = FileLock::own(
            directory.file(&self.file()),
            runtime_dir::file_mode(self.sharing),
        );
        let Ok(directory) =
            ForkGuarded::new(|| Ok::<_, std::convert::Infallible>(File::from(directory.fd)));
        let directory = directory.know().keep_across_fork();
        if let Sharing::User(_) = self.sharing {
            // A cleaner may hold it exclusively for a while. An acquisition does not fail for that.
            let _ = flock::try_lock(&directory, flock::Mode::Shared);
        }
        Ok(opened
            .insert(Arc::new(Opened {
                _directory: directory,
                lock,
            }))
            .clone())
    }

    fn file(&self) -> String {
        format!("{}.lock", self.name)
    }
}
