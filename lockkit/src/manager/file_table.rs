//! A table of locks as files in a directory, one for each lock.
//!
//! ```text
//! next        the kind of directory, and the number that the next allocation tries first; locked during each allocation
//!             and each free
//! 17.lock     lock 17: its holder (see [`holder_record`]), and behind that whether it is allocated
//! ```
//! A process holds lock 17 if it holds flock on the file `17.lock`. A byte in the file says whether
//! the lock is allocated, so a freed lock still has its file as long as it is held. A process
//! removes a file only if it holds both the file and `next`, and only if the number is not
//! allocated. So the path leads to the same file for every process. If a file is removed while a
//! process waits for it, the waiter notices and starts again ([`FileLock`]).
//!
//! Locking a freed number creates a file that is not allocated, and the release removes it. A
//! process that is killed in between leaves the file to the next user of the number.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::hold::Hold;
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::guard::Recovered;
use crate::base::holder_record::{self, RecordStorage};
use crate::base::lock_info::LockInfo;
use crate::base::owner::{Liveness, Owner};
use crate::base::runtime_dir;
use crate::base::wait::Wait;
use crate::file_lock::{FileGuard, FileLock};
use crate::sys::failpoint::step;
use crate::sys::files::{self, FileExt, MetadataExt, OpenOptionsExt};
use crate::sys::fork::{NoFork, ProcessId};

/// The directory of a table.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    /// Held during each allocation and each free.
    next: FileLock,
    /// The locks that this process holds through this manager. They are here and not in the guards,
    /// so that `unlock` finds them. The mutex is locked with forks held off.
    held: Mutex<HeldFiles>,
}

#[derive(Debug, Default)]
struct HeldFiles {
    guards: BTreeMap<u32, Entry>,
    /// The number of acquisitions so far.
    acquisitions: u64,
}

#[derive(Debug)]
struct Entry {
    guard: FileGuard,
    acquisition: u64,
    /// Identifies the process that holds the lock, because a forked child has a copy.
    process: ProcessId,
}

/// The offset of the byte in a lock's file that says whether it is allocated.
const ALLOCATED_AT: u64 = holder_record::BYTES as u64;
/// The value of the byte for an allocated lock; any other value means free.
const ALLOCATED: u8 = b'A';

/// The start of the file `next`, with the version last; the number follows.
const HEADER: [u8; 12] = *b"lockkitF\0\0\0\x01";

fn is_table(next: &File) -> bool {
    let mut bytes = [0; HEADER.len()];
    next.read_exact_at(&mut bytes, 0).is_ok() && bytes == HEADER
}

fn read_next(file: &File) -> u32 {
    let mut bytes = [0; 4];
    match file.read_exact_at(&mut bytes, HEADER.len() as u64) {
        Ok(()) => u32::from_ne_bytes(bytes),
        Err(_) => 0,
    }
}

fn is_allocated(file: &File) -> bool {
    let mut byte = [0];
    file.read_exact_at(&mut byte, ALLOCATED_AT).is_ok() && byte == [ALLOCATED]
}

impl Directory {
    /// Opens the table in the directory at `path`, or creates it there if the directory is empty.
    ///
    /// # Errors
    /// As [`FileLockManager::open`](super::FileLockManager::open).
    pub(super) fn open(path: PathBuf) -> Result<Self> {
        let next = FileLock::own(path.join("next"), 0o600);
        let directory = Self {
            path,
            next,
            held: Mutex::default(),
        };
        directory.check()?;
        Ok(directory)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Allocates the next number. Returns `None` if every number is allocated.
    pub(super) fn allocate(&self) -> Result<Option<u32>> {
        let next = self.next.lock()?;
        let first = read_next(next.file());
        for id in (first..=u32::MAX).chain(0..first) {
            if self.claim(id)? {
                // The number is allocated in any case. If this write fails, the next allocation
                // only searches a little longer.
                let _ = self.write_next(next.file(), id.wrapping_add(1));
                return Ok(Some(id));
            }
        }
        Ok(None)
    }

    /// Allocates `id`. Returns `false` if it is allocated already.
    pub(super) fn allocate_at(&self, id: u32) -> Result<bool> {
        let _next = self.next.lock()?;
        self.claim(id)
    }

    /// Returns the lock with the number `id`.
    pub(super) fn lock(self: &Arc<Self>, id: u32) -> TableFileLock {
        TableFileLock {
            directory: self.clone(),
            id,
            file: FileLock::own(self.file(id), 0o600),
        }
    }

    /// Frees every number.
    pub(super) fn free_all(self: &Arc<Self>) -> Result<()> {
        let next = self.next.lock()?;
        for id in self.ids()? {
            self.lock(id).free_locked()?;
        }
        self.write_next(next.file(), 0)
    }

    fn file(&self, id: u32) -> PathBuf {
        self.path.join(format!("{id}.lock"))
    }

    /// Checks the directory before anything in it is changed. Creates a table in an empty
    /// directory, which a killed `create` leaves.
    fn check(&self) -> Result<()> {
        let failed = |error| Error::io("open", &self.path, error);
        let found = files::metadata(&self.path).map_err(failed)?;
        if found.uid() != 0 && !runtime_dir::is_own_at(&self.path, &found) {
            let lock = format!("the lock table {}", self.path.display());
            return Err(ErrorKind::ForeignOwner {
                lock,
                uid: found.uid(),
                pid: None,
            }
            .into());
        }
        if files::is_writable_by_others(&found) {
            let problem =
                "others than its owner may write to it; take that permission away (mode 0700)";
            return Err(ErrorKind::Insecure {
                path: self.path.clone(),
                problem,
            }
            .into());
        }
        let mismatch = |problem| {
            Err(ErrorKind::LayoutMismatch {
                path: self.path.clone(),
                problem,
            }
            .into())
        };
        let is_made = || File::open(self.path.join("next")).is_ok_and(|next| is_table(&next));
        if is_made() {
            return Ok(());
        }
        for entry in fs::read_dir(&self.path).map_err(failed)? {
            // Another process may have just created the table.
            if entry.map_err(failed)?.file_name() != "next" && !is_made() {
                return mismatch("it contains other files");
            }
        }
        let next = self.next.lock()?;
        match next.file().metadata().map_err(failed)?.len() {
            0 => self.write_next(next.file(), 0),
            _ if is_table(next.file()) => Ok(()),
            _ => mismatch("its file `next` does not start as that of a lock table does"),
        }
    }

    /// Returns the numbers that have files.
    pub(super) fn ids(&self) -> Result<Vec<u32>> {
        let failed = |error| Error::io("list", &self.path, error);
        let mut ids = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            ids.extend(
                name.to_str()
                    .and_then(|name| name.strip_suffix(".lock")?.parse::<u32>().ok()),
            );
        }
        ids.sort_unstable();
        Ok(ids)
    }

    fn write_next(&self, file: &File, next: u32) -> Result<()> {
        let failed = |error| Error::io("write", self.path.join("next"), error);
        let mut bytes = [0; HEADER.len() + 4];
        bytes[..HEADER.len()].copy_from_slice(&HEADER);
        bytes[HEADER.len()..].copy_from_slice(&next.to_ne_bytes());
        file.write_all_at(&bytes, 0).map_err(failed)?;
        step("next number written");
        Ok(())
    }

    /// Allocates `id`. Returns `false` if it is allocated already. The caller must hold `next`.
    fn claim(&self, id: u32) -> Result<bool> {
        let path = self.file(id);
        let failed = |error| Error::io("allocate", &path, error);
        let mut options = File::options();
        options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600);
        options.custom_flags(files::NOFOLLOW | files::NOCTTY);
        let file = files::open(&options, &path).map_err(failed)?;
        step("lock file made");
        if is_allocated(&file) {
            return Ok(false);
        }
        // The umask belongs to the program, so the mode is set here.
        files::set_mode(&file, 0o600).map_err(failed)?;
        step("mode of the lock file set");
        file.write_all_at(&[ALLOCATED], ALLOCATED_AT)
            .map_err(failed)?;
        step("marked allocated");
        Ok(true)
    }
}

/// A lock of the table.
#[derive(Clone, Debug)]
pub(super) struct TableFileLock {
    directory: Arc<Directory>,
    id: u32,
    file: FileLock,
}

/// A held lock of the table.
#[derive(Debug)]
pub(super) struct TableFileHold {
    lock: TableFileLock,
    acquisition: u64,
}

impl TableFileLock {
    pub(super) fn id(&self) -> u32 {
        self.id
    }

    pub(super) fn acquire(&self, wait: &Wait) -> Result<(TableFileHold, Option<Box<Recovered>>)> {
        let mut guard = self.file.acquire_as(wait, self)?;
        let recovered = guard.write(holder_record::record_current)?;
        let no_fork = NoFork::hold();
        let mut held = self.directory.held.lock();
        held.acquisitions += 1;
        let acquisition = held.acquisitions;
        // A forked child may have inherited an entry of its parent here. It is closed after forks
        // are allowed again.
        let inherited = held.guards.insert(
            self.id,
            Entry {
                guard,
                acquisition,
                process: ProcessId::current(),
            },
        );
        drop((held, no_fork, inherited));
        Ok((
            TableFileHold {
                lock: self.clone(),
                acquisition,
            },
            recovered,
        ))
    }

    pub(super) fn unlock(&self) -> Result<()> {
        self.release(|_| true)
    }

    fn release(&self, which: impl FnOnce(&Entry) -> bool) -> Result<()> {
        let no_fork = NoFork::hold();
        let mut held = self.directory.held.lock();
        let mine = |entry: &Entry| entry.process.is_current();
        let entry = match held.guards.get(&self.id) {
            Some(entry) if mine(entry) && which(entry) => held.guards.remove(&self.id),
            _ => None,
        };
        drop((held, no_fork));
        let Some(Entry { mut guard, .. }) = entry else {
            return Err(ErrorKind::NotLocked {
                lock: self.describe(),
            }
            .into());
        };
        guard.write(|file| {
            file.clear();
            step("record cleared");
        })?;
        // Checked after the unlock: a process that frees the number later finds the file unlocked
        // and removes it; a process that freed the number before has left the removal to this
        // process.
        let allocated = guard.release_and(is_allocated)?;
        if !allocated {
            let _next = self.directory.next.lock()?;
            self.remove_if_free()?;
        }
        Ok(())
    }

    pub(super) fn free(&self) -> Result<()> {
        let _next = self.directory.next.lock()?;
        match self.free_locked()? {
            true => Ok(()),
            false => Err(ErrorKind::NotAllocated {
                lock: self.describe(),
            }
            .into()),
        }
    }

    /// Frees the lock, unless it is free. The caller must hold `next`.
    fn free_locked(&self) -> Result<bool> {
        let path = self.file.path();
        let failed = |error| Error::io("free", path, error);
        let file = match File::options().read(true).write(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(failed(error)),
        };
        let was = is_allocated(&file);
        if was {
            file.write_all_at(&[0], ALLOCATED_AT).map_err(failed)?;
            step("marked free");
        }
        self.remove_if_free()?;
        Ok(was)
    }

    /// Removes the file unless it is allocated or held. A holder does this after its release. The
    /// caller must hold `next`.
    fn remove_if_free(&self) -> Result<()> {
        let path = self.file.path();
        // Locking the file would create it. No other process can remove it meanwhile.
        if !path.exists() {
            return Ok(());
        }
        match self.file.try_lock() {
            // This also discards the record of a dead owner: it does not concern the next user of
            // the number.
            Ok(guard) if !is_allocated(guard.file()) => {
                fs::remove_file(path).map_err(|error| Error::io("remove", path, error))?;
                step("lock file removed");
                Ok(())
            }
            Err(error) if !error.is_held() => Err(error),
            _ => Ok(()),
        }
    }
}

impl Hold for TableFileHold {
    fn release(&mut self) -> Result<()> {
        self.lock
            .release(|entry| entry.acquisition == self.acquisition)
    }
}

impl LockInfo for TableFileLock {
    fn describe(&self) -> String {
        format!(
            "lock {} of the lock table {}",
            self.id,
            self.directory.path.display()
        )
    }

    #[cfg(feature = "tracing")]
    fn label(&self) -> (&'static str, String) {
        (
            "directory",
            format!("{}#{}", self.directory.path.display(), self.id),
        )
    }

    fn holder(&self) -> Option<Owner> {
        let owner = holder_record::holder(&File::open(self.file.path()).ok()?)?;
        (owner.liveness_by_name() != Liveness::Dead).then_some(owner)
    }
}
