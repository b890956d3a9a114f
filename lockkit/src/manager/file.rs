//! A table of locks as files in a directory, one for each lock.
//!
//! ```text
//! next        what kind of directory this is, and the number that the next allocation tries first; locked while anything
//!             is allocated or freed
//! 17.lock     lock 17: its holder (see `named::holder_record`), and behind that whether it is allocated
//! ```
//! A process holds lock 17 if it holds flock on the file `17.lock`. A byte in the file says whether the lock is
//! allocated, so a freed lock still has its file as long as it is held. A process removes a file only if it holds both
//! the file and `next`, and only if the number is not allocated. So the path leads to the same file for every process.
//! If a file is removed while a process waits for it, the waiter notices and starts again ([`FileLock`]).
//!
//! Locking a freed number creates a file that is not allocated, and the release removes it. A process that is killed in
//! between leaves the file to the next user of the number.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Handle, HeldLock, LockManager, ManagedLock, Releases};
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::guard::Recovered;
use crate::base::holder_record::{self, RecordStorage};
use crate::base::lock_info::LockInfo;
use crate::base::owner::{Liveness, Owner};
use crate::base::runtime_dir;
use crate::base::wait::Wait;
use crate::file_lock::{FileGuard, FileLock};
use crate::sys::failpoint::step;
use crate::sys::files::{self, DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use crate::sys::fork::{NoFork, ProcessId};

/// A table of locks as files in a directory, for the processes of one machine. A clone is another handle on it.
///
/// For systems without shared memory, or for a few locks that should be visible in the file system. Only the file
/// system limits the number of locks. A lock costs a few microseconds, and a [`ShmLockManager`](crate::ShmLockManager)
/// lock nanoseconds. Do not use it on a file system that several machines share. Only the managers of the table should
/// touch the directory, which belongs to one user.
///
/// Each held lock takes a descriptor, and each [`ManagedLock`] that was ever locked keeps one for the next time: keep
/// numbers rather than thousands of handles.
///
/// A process that is stopped while it allocates or frees blocks all other allocations and frees, and releases of freed
/// locks, until it continues or dies. Freeing a lock whose owner died in it discards the report of that death.
/// [`held`](LockManager::held) uses the records of the owners. Two kinds of owners stay listed until the next owner
/// comes:
/// - An owner that has executed another program (exec), which ended its hold.
/// - An owner that died in another pid namespace.
///
/// ```
/// use lockkit::{FileLockManager, LockManager};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = std::env::temp_dir().join(format!("lockkit-doc-locks-{}", std::process::id()));
/// let manager = FileLockManager::create(&directory)?;
/// let lock = manager.allocate()?;
/// drop(FileLockManager::open(&directory)?.retrieve(lock.id())?.lock()?);
/// lock.free()?;
/// # std::fs::remove_dir_all(directory)?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct FileLockManager(Arc<Directory>);

#[derive(Debug)]
struct Directory {
    path: PathBuf,
    /// Held during each allocation and each free.
    next: FileLock,
    /// The locks that this process holds through this manager. They are here and not in the guards, so that `unlock`
    /// finds them. The mutex is locked with forks held off.
    held: Mutex<Holds>,
}

#[derive(Debug, Default)]
struct Holds {
    guards: BTreeMap<u32, Entry>,
    turns: u64,
}

#[derive(Debug)]
struct Entry {
    guard: FileGuard,
    turn: u64,
    /// Identifies the process that holds the lock, because a forked child has a copy.
    process: ProcessId,
}

/// The offset of the byte in a lock's file that says whether it is allocated.
const ALLOCATED_AT: u64 = holder_record::BYTES as u64;
/// The value of the byte for an allocated lock; any other value means free.
const ALLOCATED: u8 = b'A';

impl FileLockManager {
    /// Creates the directory `directory`, which must not exist yet, with mode 0700, and a table in it.
    ///
    /// # Errors
    /// [`Io`](ErrorKind::Io) if the path exists (`AlreadyExists`), or a system call fails.
    pub fn create(directory: impl AsRef<Path>) -> Result<Self> {
        let directory = directory.as_ref();
        let failed = |error| Error::io("create", directory, error);
        fs::DirBuilder::new().mode(0o700).create(directory).map_err(failed)?;
        step("directory made");
        // The umask belongs to the program, so the mode is set here.
        files::set_directory_mode(directory, 0o700).map_err(failed)?;
        step("mode of the directory set");
        Self::open(directory)
    }

    /// Opens the table in the directory `directory`.
    ///
    /// # Errors
    /// - [`Io`](ErrorKind::Io) if there is no such directory, or a system call fails.
    /// - [`LayoutMismatch`](ErrorKind::LayoutMismatch) if the directory contains anything other than a table of this
    ///   version. An empty directory becomes a table.
    /// - [`ForeignOwner`](ErrorKind::ForeignOwner) if it belongs to another user, other than root.
    /// - [`Insecure`](ErrorKind::Insecure) if other users can create files in it.
    pub fn open(directory: impl AsRef<Path>) -> Result<Self> {
        let failed = |error| Error::io("open", directory.as_ref(), error);
        let path = directory.as_ref().canonicalize().map_err(failed)?;
        if !path.is_dir() {
            return Err(failed(io::ErrorKind::NotADirectory.into()));
        }
        let next = FileLock::own(path.join("next"), 0o600);
        let directory = Directory { path, next, held: Mutex::default() };
        directory.check()?;
        Ok(Self(Arc::new(directory)))
    }

    /// Returns the directory.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    fn lock(&self, id: u32) -> TableFileLock {
        TableFileLock { directory: self.0.clone(), id, file: FileLock::own(self.0.file(id), 0o600) }
    }
}

impl LockManager for FileLockManager {
    fn allocate(&self) -> Result<ManagedLock> {
        let next = self.0.next.lock()?;
        let first = read_next(next.file());
        for id in (first..=u32::MAX).chain(0..first) {
            if self.0.claim(id)? {
                // The number is allocated in any case. If this write fails, the next allocation only searches a little
                // longer.
                let _ = self.0.write_next(next.file(), id.wrapping_add(1));
                return Ok(ManagedLock(Handle::File(self.lock(id))));
            }
        }
        let table = format!("the lock table {}", self.0.path.display());
        Err(ErrorKind::Exhausted { table, capacity: u32::MAX, allocated: u32::MAX }.into())
    }

    fn retrieve(&self, id: u32) -> Result<ManagedLock> {
        Ok(ManagedLock(Handle::File(self.lock(id))))
    }

    fn allocate_at(&self, id: u32) -> Result<ManagedLock> {
        let _next = self.0.next.lock()?;
        let lock = self.lock(id);
        match self.0.claim(id)? {
            true => Ok(ManagedLock(Handle::File(lock))),
            false => Err(ErrorKind::AlreadyAllocated { lock: lock.describe() }.into()),
        }
    }

    fn available(&self) -> Result<Option<u32>> {
        Ok(None)
    }

    fn held(&self) -> Result<Vec<HeldLock>> {
        let mut held = Vec::new();
        for id in self.0.ids()? {
            held.extend(self.lock(id).holder().map(|owner| HeldLock { id, owner }));
        }
        Ok(held)
    }

    fn free_all(&self) -> Result<()> {
        let next = self.0.next.lock()?;
        for id in self.0.ids()? {
            self.lock(id).free_locked()?;
        }
        self.0.write_next(next.file(), 0)
    }
}

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
    fn file(&self, id: u32) -> PathBuf {
        self.path.join(format!("{id}.lock"))
    }

    /// Checks the directory before anything in it is changed. Creates a table in an empty directory, which a killed
    /// `create` leaves.
    fn check(&self) -> Result<()> {
        let failed = |error| Error::io("open", &self.path, error);
        let found = files::metadata(&self.path).map_err(failed)?;
        if found.uid() != 0 && !runtime_dir::is_own_at(&self.path, &found) {
            let lock = format!("the lock table {}", self.path.display());
            return Err(ErrorKind::ForeignOwner { lock, uid: found.uid(), pid: None }.into());
        }
        if files::is_writable_by_others(&found) {
            let problem = "others than its owner may write to it; take that permission away (mode 0700)";
            return Err(ErrorKind::Insecure { path: self.path.clone(), problem }.into());
        }
        let mismatch = |problem| Err(ErrorKind::LayoutMismatch { path: self.path.clone(), problem }.into());
        let is_made = || File::open(self.path.join("next")).is_ok_and(|next| is_table(&next));
        if is_made() {
            return Ok(());
        }
        for entry in fs::read_dir(&self.path).map_err(failed)? {
            // Another process may have just created the table.
            if entry.map_err(failed)?.file_name() != "next" && !is_made() {
                return mismatch("there are other things in it");
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
    fn ids(&self) -> Result<Vec<u32>> {
        let failed = |error| Error::io("list", &self.path, error);
        let mut ids = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            ids.extend(name.to_str().and_then(|name| name.strip_suffix(".lock")?.parse::<u32>().ok()));
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
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        options.custom_flags(files::NOFOLLOW | files::NOCTTY);
        let file = files::open(&options, &path).map_err(failed)?;
        step("lock file made");
        if is_allocated(&file) {
            return Ok(false);
        }
        // The umask belongs to the program, so the mode is set here.
        files::set_mode(&file, 0o600).map_err(failed)?;
        step("mode of the lock file set");
        file.write_all_at(&[ALLOCATED], ALLOCATED_AT).map_err(failed)?;
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
    turn: u64,
}

impl TableFileLock {
    pub(super) fn id(&self) -> u32 {
        self.id
    }

    pub(super) fn acquire(&self, wait: &Wait) -> Result<(TableFileHold, Option<Box<Recovered>>)> {
        let mut guard = self.file.acquire_as(wait, self)?;
        let recovered = guard.write(holder_record::take)?;
        let no_fork = NoFork::hold();
        let mut held = self.directory.held.lock();
        held.turns += 1;
        let turn = held.turns;
        // A forked child may have inherited an entry of its parent here. It is closed after forks are allowed again.
        let inherited = held.guards.insert(self.id, Entry { guard, turn, process: ProcessId::current() });
        drop((held, no_fork, inherited));
        Ok((TableFileHold { lock: self.clone(), turn }, recovered))
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
            return Err(ErrorKind::NotLocked { lock: self.describe() }.into());
        };
        guard.write(|file| {
            file.clear();
            step("record wiped");
        })?;
        // Checked after the unlock: a process that frees the number later finds the file unlocked and removes it; a
        // process that freed the number before has left the removal to this process.
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
            false => Err(ErrorKind::NotAllocated { lock: self.describe() }.into()),
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

    /// Removes the file unless it is allocated or held. A holder does this after its release. The caller must hold
    /// `next`.
    fn remove_if_free(&self) -> Result<()> {
        let path = self.file.path();
        // Locking the file would create it. No other process can remove it meanwhile.
        if !path.exists() {
            return Ok(());
        }
        match self.file.try_lock() {
            // This also discards the record of a dead owner: it does not concern the next user of the number.
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

impl Releases for TableFileHold {
    fn release(&mut self) -> Result<()> {
        self.lock.release(|entry| entry.turn == self.turn)
    }
}

impl LockInfo for TableFileLock {
    fn describe(&self) -> String {
        format!("lock {} of the lock table {}", self.id, self.directory.path.display())
    }

    #[cfg(feature = "tracing")]
    fn label(&self) -> (&'static str, String) {
        ("directory", format!("{}#{}", self.directory.path.display(), self.id))
    }

    fn holder(&self) -> Option<Owner> {
        let owner = holder_record::holder(&File::open(self.file.path()).ok()?)?;
        (owner.liveness_by_name() != Liveness::Dead).then_some(owner)
    }
}
