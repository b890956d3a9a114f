//! A lock on a path: flock(2), taken so that a deleted or replaced file is noticed.
//!
//! The kernel's lock is on the open file; the path only leads to it. So after locking, the open file is compared with
//! the file that the path names now. If the file was deleted or replaced meanwhile, the acquisition starts again. So
//! the holder has its lock on the file that the next process will open. This module never deletes the file, unless it
//! has just created it and cannot use it.
//!
//! Each acquisition has its own open file, so threads exclude each other exactly as processes do. One open file is kept
//! between acquisitions, so that most acquisitions open none. A wait without a limit blocks in the kernel. A wait with
//! a limit or a token retries on a timer, because nothing could interrupt a thread that is blocked in flock.
//!
//! The comparison costs more than the lock. It is omitted for a file that was locked here less than a
//! [`RECHECK_WINDOW`] ago and compared less than [`SOON`] ago, as in a tight loop. That window is too short for another
//! process to lock, delete and unlock the file. So a deletion by a process that holds the lock, as the rules require,
//! is always noticed. A deletion without the lock is noticed by the first acquisition after [`SOON`].
//!
//! A program may close descriptors that it did not open, and its next files reuse their numbers. So before a kept
//! descriptor is locked, and before a lock is released, the descriptor is compared with the file that was opened for it
//! (see [`fork`]). That also costs as much as the lock, and is omitted if too little time has passed to close one file
//! and open another.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind as Io};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

#[cfg(feature = "tokio")]
use crate::base::blocking;
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::guard::{Guard, Recovered};
use crate::base::lock::lock_methods;
use crate::base::lock_info::LockInfo;
use crate::base::owner::Owner;
use crate::base::telemetry;
use crate::base::wait::{Backoff, Wait, WaitState};
use crate::sys::atomic_box::Slot;
use crate::sys::clock::nanos;
use crate::sys::failpoint::step;
use crate::sys::files::{self, MetadataExt, OpenOptionsExt};
use crate::sys::flock::{self, Mode};
use crate::sys::fork::{self, ForkGuarded, ProcessId};
use crate::sys::tmpfile;

/// How often a file may be replaced under an acquisition before that is an error. Processes that contend for a freed
/// numbered lock each remove its file; the limit is far above the number of such replacements.
const MOST_REPLACEMENTS: u32 = 10_000;
/// How often the file may appear and disappear while it is opened.
const MOST_OPENINGS: u32 = 100;

/// How long a comparison is valid for locks that follow each other in a [`RecheckWindow`], in nanoseconds.
const SOON: u64 = 1_000_000;

/// The time from one lock here to the next, with the unlock in between, in which no other process can have locked,
/// deleted and unlocked. It is at most the shortest time in which this process ever unlocked, locked and looked up the
/// path. A deletion begins with such a look-up and then does more work. So the window fits the speed of the machine.
struct RecheckWindow {
    samples: AtomicU32,
    nanos: AtomicU64,
}

impl RecheckWindow {
    /// The number of measurements that the window needs: any one of them may have been interrupted.
    const ENOUGH: u32 = 32;
    /// The upper bound of the window, whatever was measured.
    const LONGEST: u64 = 2000;

    const fn new() -> Self {
        Self { samples: AtomicU32::new(0), nanos: AtomicU64::new(Self::LONGEST) }
    }

    /// Records a measured time that includes a look-up of the path.
    #[cold]
    fn measured(&self, nanos: u64) {
        self.nanos.fetch_min(nanos, Ordering::Relaxed);
        if self.samples.load(Ordering::Relaxed) < Self::ENOUGH {
            self.samples.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns whether a time without a look-up is in the window. A time of zero means that the clock is too coarse.
    #[inline]
    fn covers(&self, nanos: u64) -> bool {
        nanos != 0 && self.samples.load(Ordering::Relaxed) >= Self::ENOUGH && nanos < self.nanos.load(Ordering::Relaxed)
    }
}

static RECHECK_WINDOW: RecheckWindow = RecheckWindow::new();

/// A lock on a file or directory, exclusive or shared.
///
/// It excludes every process that locks the same file with flock(2), for example the `flock` command. A clone is
/// another handle on the same lock.
///
/// It does not exclude a program that locks the file with fcntl(2): POSIX locks (`F_SETLK`, lockf(3), as apt, dpkg,
/// SQLite and Python's `fcntl.lockf` take them) and `F_OFD_SETLK`. The kernel keeps the two kinds of lock apart, except
/// on NFS and SMB. [`holders`](Self::holders), [`waiters`](Self::waiters) and [`list`](Self::list) report locks of
/// flock(2) only; the command `lockkit status` shows both kinds.
///
/// The file may have any content; locking does not change it. A missing file is created, and never deleted. To delete
/// the file, a process must hold its exclusive lock; waiters then continue with the next file of that name. A deletion
/// without the lock ends the protection of the holder, because the next process creates a new file.
///
/// A lock is shared or exclusive from its acquisition to its release. There is no upgrade and no downgrade, because
/// flock does not promise to convert a lock atomically: another process may acquire it in between ([flock(2)],
/// "Converting a lock").
///
/// A program that closes descriptors which it did not open, as close_range(2) does, ends this lock.
/// [`release`](FileGuard::release) then returns an error, and no other file of the program is unlocked or closed. See
/// [the crate page](crate#descriptors-that-the-program-closes).
///
/// Do not use it on a file system that other machines write to, unless the file system passes flock on to them. NFS
/// does since Linux 2.6.12, and 9p does not; there, use a lease. Do not use it if a waiter must not starve: the kernel
/// serves waiters in order, but a waiter with a limit or a token only polls every few milliseconds.
///
/// [flock(2)]: https://man7.org/linux/man-pages/man2/flock.2.html
///
/// ```
/// use std::io::Write;
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = std::env::temp_dir().join(format!("lockkit-doc-file-{}", std::process::id()));
/// # std::fs::create_dir_all(&directory)?;
/// let lock = lockkit::FileLock::new(directory.join("data.lock"));
/// {
///     let guard = lock.lock()?;
///     guard.file().write_all(b"mine")?;
///     assert!(lock.try_lock_shared().unwrap_err().is_held());
/// }
/// let reader = lock.lock_shared()?;
/// let another = lock.lock_shared()?;
/// # drop((reader, another));
/// # std::fs::remove_dir_all(directory)?;
/// # Ok(()) }
/// ```
///
/// With its directory, its permissions, and a limit:
///
/// ```
/// use std::time::Duration;
/// use lockkit::{FileLock, Wait};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = std::env::temp_dir().join(format!("lockkit-doc-file-made-{}", std::process::id()));
/// let lock = FileLock::new(directory.join("deep/data.lock")).create_parents().create_with_mode(0o640);
/// let one = lock.acquire_shared(&Wait::at_most(Duration::from_secs(5)))?;
/// let two = lock.lock_shared_for(Duration::from_secs(5))?;
/// assert!(two.is_shared() && lock.waiters()? == 0);
/// drop((one, two));
/// let writer = lock.acquire(&Wait::none())?;
/// # drop(writer);
/// # std::fs::remove_dir_all(directory)?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct FileLock(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    place: FileSpec,
    /// An open file that an earlier acquisition used.
    spare: Slot<Open>,
}

/// Where the file is, and how it is created.
#[derive(Clone, Debug)]
struct FileSpec {
    path: PathBuf,
    /// The exact permissions of a file that is created here; without them 0600 less the umask.
    mode: Option<u32>,
    /// Whether missing directories are created.
    parents: bool,
    /// The directory is open to other users, which may have replaced the file by something else.
    hardened: bool,
}

#[derive(Debug)]
struct Open {
    file: ForkGuarded<File>,
    /// Its device and inode, which no other file has while it is open.
    identity: (u64, u64),
    /// Identifies the process that opened it: a forked child's copy is inert.
    process: ProcessId,
    /// Whether this acquisition created it.
    made: bool,
    /// When it was last seen to be the file at the path. This and the next two values are [`nanos`]; 0 means never.
    compared: u64,
    /// When the descriptor was last used, and belonged to the lock.
    used: u64,
    /// When the lock was last known to be held, at the beginning of a hold. A holder that deletes its own file does so
    /// later, so a [`RecheckWindow`] starts here.
    held: u64,
}

impl Open {
    /// The divisor of a [`RecheckWindow`] for a time too short to close a file and open another: an open looks a path
    /// up, and does more.
    const HELD: u64 = 2;
    /// The same divisor for the time between two holds, which includes an unlock.
    const IDLE: u64 = 3;

    /// Returns whether the descriptor still belongs to this lock. `part` divides the [`RecheckWindow`], so that the
    /// result is too short to replace the descriptor.
    #[inline]
    fn is_own(&self, now: u64, part: u64) -> bool {
        RECHECK_WINDOW.covers(now.wrapping_sub(self.used).saturating_mul(part)) || self.file.is_own()
    }
}

impl FileLock {
    /// Creates a lock on the file or directory at `path`. Nothing happens there until the first acquisition, which
    /// creates a missing file.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self::at(FileSpec { path: path.into(), mode: None, parents: false, hardened: false })
    }

    /// Creates a lock on a file of lockkit's own. The file has exactly `mode`, and must not be a symlink, a hard link
    /// or a special file.
    pub(crate) fn own(path: PathBuf, mode: u32) -> Self {
        Self::at(FileSpec { path, mode: Some(mode), parents: false, hardened: true })
    }

    fn at(place: FileSpec) -> Self {
        Self(Arc::new(Inner { place, spare: Slot::empty() }))
    }

    /// Sets the exact permissions of a file that locking creates, whatever the process's umask is. Without this option
    /// they are 0600 less the umask.
    ///
    /// The mode must let the owner read. Otherwise an acquisition fails with
    /// [`InvalidOption`](ErrorKind::InvalidOption).
    pub fn create_with_mode(self, mode: u32) -> Self {
        Self::at(FileSpec { mode: Some(mode), ..self.0.place.clone() })
    }

    /// Creates missing parent directories, too, with the permissions that the process's umask leaves.
    pub fn create_parents(self) -> Self {
        Self::at(FileSpec { parents: true, ..self.0.place.clone() })
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.0.place.path
    }

    /// Returns the locks on files that are held now, as far as this process may see them: those of its own user's
    /// processes, and all for root. The result does not include files that are deleted meanwhile, or locks other than
    /// those of flock(2). The result is a snapshot. It is empty outside Linux.
    ///
    /// ```
    /// # #[cfg(target_os = "linux")]
    /// # fn main() -> lockkit::Result<()> {
    /// # let path = std::env::temp_dir().join(format!("lockkit-doc-list-{}", std::process::id()));
    /// use lockkit::FileLock;
    /// let guard = FileLock::new(&path).lock()?;
    /// assert!(FileLock::list().iter().any(|lock| lock.path() == path));
    /// # std::fs::remove_file(path).unwrap();
    /// # Ok(()) }
    /// # #[cfg(not(target_os = "linux"))] fn main() {}
    /// ```
    pub fn list() -> Vec<Self> {
        #[cfg(target_os = "linux")]
        {
            let locks = crate::sys::proc_locks::FileLocks::read();
            locks.files().filter(|(_, on)| on.flock.is_some()).map(|(path, _)| Self::new(path)).collect()
        }
        #[cfg(not(target_os = "linux"))]
        Vec::new()
    }

    /// Returns the holders of the lock now, exclusive or shared: each process with a descriptor that keeps the lock, or
    /// at least the process that acquired it. Locks of fcntl(2) do not count, because they do not exclude this one.
    ///
    /// The result is empty if the lock is free, if the holder is hidden (a process of another pid namespace), and
    /// outside Linux. The call locks and opens nothing, so it disturbs no process. It reads the descriptors of all
    /// processes, which takes milliseconds.
    ///
    /// ```
    /// # #[cfg(target_os = "linux")]
    /// # fn main() -> lockkit::Result<()> {
    /// # let path = std::env::temp_dir().join(format!("lockkit-doc-holders-{}", std::process::id()));
    /// let lock = lockkit::FileLock::new(&path);
    /// let guard = lock.lock()?;
    /// assert_eq!(lock.holders()?[0].pid(), std::process::id());
    /// # std::fs::remove_file(path).unwrap();
    /// # Ok(()) }
    /// # #[cfg(not(target_os = "linux"))] fn main() {}
    /// ```
    ///
    /// # Errors
    /// [`Io`](ErrorKind::Io) if the file cannot be checked, except that a missing file has no holders.
    pub fn holders(&self) -> Result<Vec<Owner>> {
        Ok(self.locked()?.0.into_iter().filter_map(Owner::of).collect())
    }

    /// Returns how many waiters wait in the kernel for the lock now. A waiter with a limit or a token polls and does
    /// not count. The result is 0 outside Linux.
    ///
    /// # Errors
    /// As [`holders`](Self::holders).
    pub fn waiters(&self) -> Result<u32> {
        Ok(self.locked()?.1)
    }

    fn locked(&self) -> Result<(Vec<u32>, u32)> {
        #[cfg(target_os = "linux")]
        match crate::sys::proc_locks::FileLocks::read().on(self.path()) {
            Ok(on) => {
                if let Some(locked) = on.flock {
                    return Ok((locked.pids, locked.waiters));
                }
            }
            Err(error) if error.kind() != Io::NotFound => return Err(Error::io("look at", self.path(), error)),
            Err(_) => {}
        }
        Ok((Vec::new(), 0))
    }

    /// Acquires the lock exclusively, waiting as `wait` says.
    ///
    /// A wait without a limit sleeps in the kernel. A wait with a limit or a token polls, with pauses that grow from 50
    /// microseconds to 5 milliseconds.
    ///
    /// # Errors
    /// - [`Held`](ErrorKind::Held), [`Timeout`](ErrorKind::Timeout) or [`Cancelled`](ErrorKind::Cancelled), as `wait`
    ///   says.
    /// - [`Io`](ErrorKind::Io) if the file cannot be opened, created or locked, or is neither a file nor a directory.
    /// - [`RogueDeletion`](ErrorKind::RogueDeletion) if another process replaces the file all the time.
    pub fn acquire(&self, wait: &Wait) -> Result<FileGuard> {
        self.acquire_in(Mode::Exclusive, wait)
    }

    /// Acquires the lock shared, together with all other shared holders, waiting as `wait` says.
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire).
    pub fn acquire_shared(&self, wait: &Wait) -> Result<FileGuard> {
        self.acquire_in(Mode::Shared, wait)
    }

    /// Acquires as [`acquire_shared`](Self::acquire_shared), in a task; see [`acquire_async`](Self::acquire_async).
    ///
    /// # Errors
    /// As [`acquire_async`](Self::acquire_async).
    ///
    /// ```no_run
    /// # async fn read() -> lockkit::Result<()> {
    /// let reader = lockkit::FileLock::new("/var/lib/app/data").acquire_shared_async(&lockkit::Wait::forever()).await?;
    /// # Ok(()) }
    /// # fn main() {}
    /// ```
    #[cfg(feature = "tokio")]
    #[cfg_attr(docsrs, doc(cfg(feature = "tokio")))]
    pub async fn acquire_shared_async(&self, wait: &Wait) -> Result<FileGuard> {
        self.acquire_in_async(Mode::Shared, wait).await
    }

    /// Acquires the lock shared if it is not held exclusively now.
    ///
    /// # Errors
    /// [`Held`](ErrorKind::Held) if it is held exclusively, and those that [`acquire`](Self::acquire) adds.
    pub fn try_lock_shared(&self) -> Result<FileGuard> {
        self.acquire_shared(&Wait::none())
    }

    /// Acquires the lock shared, waiting without a limit.
    ///
    /// # Errors
    /// Those that [`acquire`](Self::acquire) adds.
    pub fn lock_shared(&self) -> Result<FileGuard> {
        self.acquire_shared(&Wait::forever())
    }

    /// Acquires the lock shared, waiting at most `limit`.
    ///
    /// # Errors
    /// [`Timeout`](ErrorKind::Timeout) if it was still held exclusively then, and those that [`acquire`](Self::acquire)
    /// adds.
    pub fn lock_shared_for(&self, limit: Duration) -> Result<FileGuard> {
        self.acquire_shared(&Wait::at_most(limit))
    }

    /// Acquires as [`acquire`](Self::acquire), with errors that name `subject`.
    pub(crate) fn acquire_as(&self, wait: &Wait, subject: &dyn LockInfo) -> Result<FileGuard> {
        self.guard(Mode::Exclusive, wait, subject)
    }

    #[inline]
    fn acquire_in(&self, mode: Mode, wait: &Wait) -> Result<FileGuard> {
        let take = || self.guard(mode, wait, &*self.0);
        // A file of lockkit's own belongs to another lock, which reports its own events.
        if self.0.place.hardened { take() } else { telemetry::acquire(&*self.0, take) }
    }

    #[cfg(feature = "tokio")]
    async fn acquire_in_async(&self, mode: Mode, wait: &Wait) -> Result<FileGuard> {
        let lock = self.clone();
        let take = move |wait: &Wait| lock.guard(mode, wait, &*lock.0);
        telemetry::acquire_async(&*self.0, blocking::at_once_or_on_a_thread(wait, &*self.0, take)).await
    }

    #[cfg(feature = "tokio")]
    async fn take_async(&self, wait: &Wait) -> Result<FileGuard> {
        self.acquire_in_async(Mode::Exclusive, wait).await
    }

    fn guard(&self, mode: Mode, wait: &Wait, subject: &dyn LockInfo) -> Result<FileGuard> {
        let open = self.0.acquire(mode, wait, subject)?;
        Ok(FileGuard { open: Some(open), mode, lock: self.0.clone() })
    }
}

lock_methods!(
    FileLock, FileGuard,
    in_tasks: "A free lock is acquired in the call, which blocks for as long as the file system needs to open and \
               lock the file. A thread of its own waits for a lock that is held, under any runtime \
               ([`Io`](crate::ErrorKind::Io) if none can be started). When the future is dropped, that thread wakes \
               at once, closes its file and ends. It releases a lock that it acquires at the same moment."
);

impl LockInfo for Inner {
    fn describe(&self) -> String {
        format!("the lock on {}", self.place.path.display())
    }

    #[cfg(feature = "tracing")]
    fn label(&self) -> (&'static str, String) {
        ("file", self.place.path.display().to_string())
    }

    /// Always `None`: the kernel does not name the holder.
    fn holder(&self) -> Option<Owner> {
        None
    }
}

impl Inner {
    fn acquire(&self, mode: Mode, wait: &Wait, subject: &dyn LockInfo) -> Result<Box<Open>> {
        wait.check(subject)?;
        let mut patience = None;
        for _ in 0..MOST_REPLACEMENTS {
            let mut open = match self.spare.take() {
                Some(open) if open.process.is_current() && open.is_own(nanos(), Open::IDLE) => open,
                _ => {
                    let process = ProcessId::current();
                    check_mode(self.place.mode)?;
                    let (file, made) = self.place.open()?;
                    let found =
                        files::metadata_of(&file).map_err(|error| Error::io("look at", &self.place.path, error))?;
                    let identity = (found.dev(), found.ino());
                    let file = file.know_as(identity);
                    Box::new(Open { file, identity, process, made, compared: 0, used: 0, held: 0 })
                }
            };
            let made = std::mem::take(&mut open.made);
            if let Err(error) = self.lock(&open.file, mode, wait, &mut patience, subject) {
                // On a file system without flock no process can hold the lock, and the new file serves no purpose.
                // After any other error another process may hold it.
                let cannot_lock = |error: &Error| match error.kind() {
                    ErrorKind::Io { action: "lock", source, .. } => flock::is_unsupported(source),
                    _ => false,
                };
                if made && cannot_lock(&error) && self.place.names(open.identity).unwrap_or(false) {
                    let _ = std::fs::remove_file(&self.place.path);
                    step("file that cannot be locked removed");
                }
                return Err(error);
            }
            let now = nanos();
            open.used = now;
            let before = std::mem::replace(&mut open.held, now);
            let since = |moment| now.wrapping_sub(moment);
            if RECHECK_WINDOW.covers(since(before)) && since(open.compared) < SOON && !self.place.hardened {
                return Ok(open);
            }
            // The descriptor may have been closed during a wait.
            if self.place.names(open.identity)? && (patience.is_none() || open.file.is_own()) {
                let seen = nanos();
                // A time that includes a wait does not show how fast this process is.
                if before != 0 && patience.is_none() {
                    RECHECK_WINDOW.measured(seen.wrapping_sub(before));
                }
                (open.compared, open.used, open.held) = (now, seen, seen);
                return Ok(open);
            }
        }
        Err(ErrorKind::RogueDeletion { path: self.place.path.clone() }.into())
    }

    /// Locks the open file. `patience` is shared by all the files that the path names during the acquisition.
    fn lock(
        &self,
        file: &File,
        mode: Mode,
        wait: &Wait,
        patience: &mut Option<WaitState>,
        subject: &dyn LockInfo,
    ) -> Result<()> {
        let failed = |error| Error::io("lock", &self.place.path, error);
        if flock::try_lock(file, mode).map_err(failed)? {
            return Ok(());
        }
        if patience.is_none() {
            *patience = wait.state_for(subject);
        }
        let Some(patience) = patience else {
            return Err(subject.held());
        };
        if patience.is_endless() {
            return flock::lock(file, mode).map_err(failed);
        }
        let mut backoff = Backoff::new();
        loop {
            if let Err(gave_up) = patience.sleep(backoff.next())? {
                return Err(patience.error(gave_up, subject));
            }
            if flock::try_lock(file, mode).map_err(failed)? {
                return Ok(());
            }
        }
    }
}

impl FileSpec {
    /// Returns whether the path still leads to the file of this device and inode.
    fn names(&self, identity: (u64, u64)) -> Result<bool> {
        match files::metadata(&self.path) {
            Ok(named) => Ok((named.dev(), named.ino()) == identity),
            Err(error) if error.kind() == Io::NotFound => Ok(false),
            Err(error) => Err(Error::io("look at", &self.path, error)),
        }
    }

    /// Opens the file, or creates it, and returns whether it was created. It never does both in one step: the kernel
    /// refuses that for another user's file in a sticky directory (`fs.protected_regular`).
    fn open(&self) -> Result<(ForkGuarded<File>, bool)> {
        for _ in 0..MOST_OPENINGS {
            match self.open_existing() {
                Err(error) if error.kind() == Io::NotFound => {}
                opened => {
                    let file = opened.map_err(|error| Error::io("open", &self.path, error))?;
                    return Ok((file, false));
                }
            }
            match self.create() {
                Err(error) if error.kind() == Io::AlreadyExists => {}
                Err(error) if error.kind() == Io::NotFound && self.parents => {
                    let directory = self.path.parent().unwrap_or(&self.path);
                    let made = DirBuilder::new().recursive(true).create(directory);
                    made.map_err(|error| Error::io("create the directory", directory, error))?;
                    step("directories made");
                }
                created => {
                    let file = created.map_err(|error| Error::io("create", &self.path, error))?;
                    return Ok((file, true));
                }
            }
        }
        if self.path.is_symlink() {
            let dangles = io::Error::new(Io::NotFound, "it is a symlink to a file that does not exist");
            return Err(Error::io("open", &self.path, dangles));
        }
        Err(ErrorKind::RogueDeletion { path: self.path.clone() }.into())
    }

    /// Creates the file. A file with an explicit mode gets it before the path names it, so that a kill never leaves a
    /// file with another mode.
    fn create(&self) -> io::Result<ForkGuarded<File>> {
        let Some(mode) = self.mode else { return self.create_at_path(0o600) };
        let directory = match self.path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            Some(_) => Path::new("."),
            None => &self.path,
        };
        let file = match ForkGuarded::new(|| tmpfile::file_in(directory, 0o600)) {
            Err(error) if error.kind() == Io::Unsupported => return self.create_in_place(mode),
            file => file?,
        };
        files::set_mode(&file, mode)?;
        step("mode of the file set");
        match tmpfile::name(&file, &self.path) {
            Err(error) if error.kind() == Io::Unsupported => self.create_in_place(mode),
            named => {
                named?;
                step("lock file named");
                // Opened again, because /proc shows no path for a descriptor that is older than the name.
                self.open_existing().map_err(|error| match error.kind() {
                    // It was removed just now, as if another process had created it.
                    Io::NotFound => Io::AlreadyExists.into(),
                    _ => error,
                })
            }
        }
    }

    fn create_at_path(&self, mode: u32) -> io::Result<ForkGuarded<File>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(mode);
        let file = ForkGuarded::new(|| files::create(&options, &self.path))?;
        step("file made");
        Ok(file)
    }

    /// Creates the file like [`create`](Self::create), on a file system without nameless files.
    fn create_in_place(&self, mode: u32) -> io::Result<ForkGuarded<File>> {
        let file = self.create_at_path(mode)?;
        // The umask belongs to the program, so the mode is set here.
        if let Err(error) = files::set_mode(&file, mode) {
            let _ = std::fs::remove_file(&self.path);
            step("file made for nothing removed");
            return Err(error);
        }
        step("mode of the file set");
        Ok(file)
    }

    /// Opens the file for writing if that is allowed, because some file systems require it for an exclusive lock.
    /// Otherwise opens it for reading.
    fn open_existing(&self) -> io::Result<ForkGuarded<File>> {
        let unfit = || io::Error::new(Io::InvalidInput, "neither a file nor a directory");
        // The check comes first, because the open of a FIFO or a device may have effects.
        if std::fs::metadata(&self.path).is_ok_and(|found| !found.is_file() && !found.is_dir()) {
            return Err(unfit());
        }
        // One that was put there since must not block the open, nor become this process's controlling terminal.
        let flags = files::NONBLOCK | files::NOCTTY | if self.hardened { files::NOFOLLOW } else { 0 };
        let open = |writing| {
            let mut options = OpenOptions::new();
            options.read(true).write(writing).custom_flags(flags);
            ForkGuarded::new(|| files::open(&options, &self.path))
        };
        let file = match open(true) {
            Err(error) if for_reading_only(error.kind()) => open(false),
            opened => opened,
        }?;
        let found = files::metadata_of(&file)?;
        // A file without a name was deleted just now, which is noticed once it is locked.
        if self.hardened && !(found.is_file() && found.nlink() <= 1) {
            return Err(io::Error::new(Io::InvalidInput, "not a plain file of its own"));
        }
        match found.is_file() || found.is_dir() {
            true => Ok(file),
            false => Err(unfit()),
        }
    }
}

/// Rejects an invalid mode, and a mode that does not let the owner read the file.
pub(crate) fn check_mode(mode: Option<u32>) -> Result<()> {
    let problem = match mode.filter(|_| cfg!(unix)) {
        Some(mode) if mode & !0o7777 != 0 => format!("{mode:#o} is no mode"),
        Some(mode) if mode & 0o400 == 0 => format!("with mode {mode:#o} the owner of the file could not read it"),
        _ => return Ok(()),
    };
    Err(ErrorKind::InvalidOption { option: "create_with_mode", problem }.into())
}

/// Returns whether a file that could not be opened for writing for this reason may still be opened for reading. The
/// executable of a running program is such a file.
fn for_reading_only(reason: Io) -> bool {
    use Io::{ExecutableFileBusy, IsADirectory, PermissionDenied, ReadOnlyFilesystem};
    matches!(reason, PermissionDenied | ReadOnlyFilesystem | IsADirectory | ExecutableFileBusy)
}

/// A held [`FileLock`], shared or exclusive; dropping it releases.
///
/// A forked child's copy of a guard holds nothing, and its file is an empty pipe: the lock stays with the parent.
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
    open: Option<Box<Open>>,
    mode: Mode,
    lock: Arc<Inner>,
}

impl FileGuard {
    /// Returns the locked file, for reading, and for writing if its permissions allow it. Its position continues from
    /// one acquisition to the next; seek, or read and write at offsets.
    pub fn file(&self) -> &File {
        match &self.open {
            Some(open) => &open.file,
            None => unreachable!("only the release takes it, and ends the guard"),
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

    /// Returns whether the lock is shared, so that other processes may hold it shared at the same time.
    pub fn is_shared(&self) -> bool {
        self.mode == Mode::Shared
    }

    /// Releases the lock now and returns any failure.
    ///
    /// # Errors
    /// [`Io`](ErrorKind::Io) if the kernel refuses to unlock, or if the program has closed the descriptor and so
    /// released the lock earlier. The lock is released all the same.
    pub fn release(mut self) -> Result<()> {
        self.give_back()
    }

    /// Always `None`: the content of the file belongs to the caller, so nothing shows how the previous holder ended.
    pub fn recovered(&self) -> Option<&Recovered> {
        None
    }

    /// Writes to the file, unless the descriptor no longer belongs to the lock.
    ///
    /// # Errors
    /// [`Io`](ErrorKind::Io) in that case; the lock was released when the descriptor was closed.
    pub(crate) fn write<T>(&mut self, write: impl FnOnce(&File) -> T) -> Result<T> {
        let Some(open) = &mut self.open else { unreachable!("only the release takes it, and ends the guard") };
        if !open.is_own(nanos(), Open::HELD) {
            return Err(Error::io("write to", &self.lock.place.path, fork::closed_by_program()));
        }
        let written = write(&open.file);
        open.used = nanos();
        Ok(written)
    }

    /// Releases as [`release`](Self::release), and calls `look` with the unlocked file.
    pub(crate) fn release_and<T>(mut self, look: impl FnOnce(&File) -> T) -> Result<T> {
        let Some(mut open) = self.open.take() else { unreachable!("only the release takes it, and ends the guard") };
        self.unlock(&mut open)?;
        let seen = look(&open.file);
        open.used = nanos();
        self.keep(open);
        Ok(seen)
    }

    fn give_back(&mut self) -> Result<()> {
        let Some(mut open) = self.open.take() else { return Ok(()) };
        self.unlock(&mut open)?;
        if !self.lock.place.hardened && open.process.is_current() {
            telemetry::released(&*self.lock);
        }
        self.keep(open);
        Ok(())
    }

    fn unlock(&self, open: &mut Open) -> Result<()> {
        // In a forked child the lock belongs to the parent, and the descriptor is inert.
        if !open.process.is_current() {
            return Ok(());
        }
        let failed = |error| Error::io("unlock", &self.lock.place.path, error);
        let now = nanos();
        if !open.is_own(now, Open::HELD) {
            return Err(failed(fork::closed_by_program()));
        }
        open.used = now;
        // If this fails, closing the file releases the lock.
        flock::unlock(&open.file).map_err(failed)
    }

    fn keep(&self, open: Box<Open>) {
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
        let _ = self.give_back();
    }
}
