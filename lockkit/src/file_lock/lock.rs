//! The handle on a lock.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::guard::FileGuard;
use super::kernel_locks;
use super::shared::Shared;
use super::spec::FileSpec;
#[cfg(feature = "tokio")]
use crate::base::blocking;
use crate::base::error::{Error, Result};
use crate::base::lock::lock_methods;
use crate::base::lock_info::LockInfo;
use crate::base::owner::Owner;
use crate::base::telemetry;
use crate::base::wait::Wait;
use crate::sys::atomic_box::AtomicBox;
use crate::sys::flock::Mode;

/// A lock on a file or directory, exclusive or shared.
///
/// It excludes every process that locks the same file with flock(2), for example the `flock`
/// command. A clone is another handle on the same lock.
///
/// It does not exclude a program that locks the file with fcntl(2): POSIX locks (`F_SETLK`,
/// lockf(3), as apt, dpkg, SQLite and Python's `fcntl.lockf` take them) and `F_OFD_SETLK`. The
/// kernel keeps the two kinds of lock apart, except on NFS and SMB. [`holders`](Self::holders),
/// [`waiters`](Self::waiters) and [`list`](Self::list) report locks of flock(2) only; the command
/// `lockkit status` shows both kinds.
///
/// The file may have any content; locking does not change it. A missing file is created, and never
/// deleted. To delete the file, a process must hold its exclusive lock; waiters then continue with
/// the next file of that name. A deletion without the lock ends the protection of the holder,
/// because the next process creates a new file.
///
/// A lock is shared or exclusive from its acquisition to its release. There is no upgrade and no
/// downgrade, because flock does not promise to convert a lock atomically: another process may
/// acquire it in between ([flock(2)], "Converting a lock").
///
/// A program that closes descriptors which it did not open, as close_range(2) does, ends this lock.
/// [`release`](FileGuard::release) then returns an error, and no other file of the program is
/// unlocked or closed. See [the crate page](crate#descriptors-that-the-program-closes).
///
/// Do not use it on a file system that other machines write to, unless the file system passes flock
/// on to them. NFS does since Linux 2.6.12, and 9p does not; there, use a lease. Do not use it if a
/// waiter must not starve: the kernel serves waiters in order, but a waiter with a limit or a token
/// only polls every few milliseconds.
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
pub struct FileLock(Arc<Shared>);

impl FileLock {
    /// Creates a lock on the file or directory at `path`. Nothing happens there until the first
    /// acquisition, which creates a missing file.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self::with_spec(FileSpec {
            path: path.into(),
            mode: None,
            create_parents: false,
            hardened: false,
        })
    }

    /// Creates a lock on a file of lockkit's own. The file has exactly `mode`, and must not be a
    /// symlink, a hard link or a special file.
    pub(crate) fn own(path: PathBuf, mode: u32) -> Self {
        Self::with_spec(FileSpec {
            path,
            mode: Some(mode),
            create_parents: false,
            hardened: true,
        })
    }

    fn with_spec(spec: FileSpec) -> Self {
        Self(Arc::new(Shared {
            spec,
            spare: AtomicBox::empty(),
        }))
    }

    /// Sets the exact permissions of a file that locking creates, whatever the process's umask is.
    /// Without this option they are 0600 less the umask.
    ///
    /// The mode must let the owner read. Otherwise an acquisition fails with
    /// [`InvalidOption`](crate::ErrorKind::InvalidOption).
    pub fn create_with_mode(self, mode: u32) -> Self {
        Self::with_spec(FileSpec {
            mode: Some(mode),
            ..self.0.spec.clone()
        })
    }

    /// Creates missing parent directories, too, with the permissions that the process's umask
    /// leaves.
    pub fn create_parents(self) -> Self {
        Self::with_spec(FileSpec {
            create_parents: true,
            ..self.0.spec.clone()
        })
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.0.spec.path
    }

    /// Returns the locks on files that are held now, as far as this process may see them: those of
    /// its own user's processes, and all for root. The result does not include files that are
    /// deleted meanwhile, or locks other than those of flock(2). The result is a snapshot. It is
    /// empty outside Linux.
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
        kernel_locks::locked_files()
            .into_iter()
            .map(Self::new)
            .collect()
    }

    /// Returns the holders of the lock now, exclusive or shared: each process with a descriptor
    /// that keeps the lock, or at least the process that acquired it. Locks of fcntl(2) do not
    /// count, because they do not exclude this one.
    ///
    /// The result is empty if the lock is free, if the holder is hidden (a process of another pid
    /// namespace), and outside Linux. The call locks and opens nothing, so it disturbs no process.
    /// It reads the descriptors of all processes, which takes milliseconds.
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
    /// [`Io`](crate::ErrorKind::Io) if the file cannot be checked, except that a missing file has
    /// no holders.
    pub fn holders(&self) -> Result<Vec<Owner>> {
        Ok(self
            .holders_and_waiters()?
            .0
            .into_iter()
            .filter_map(Owner::of)
            .collect())
    }

    /// Returns how many waiters wait in the kernel for the lock now. A waiter with a limit or a
    /// token polls and does not count. The result is 0 outside Linux.
    ///
    /// # Errors
    /// As [`holders`](Self::holders).
    pub fn waiters(&self) -> Result<u32> {
        Ok(self.holders_and_waiters()?.1)
    }

    fn holders_and_waiters(&self) -> Result<(Vec<u32>, u32)> {
        kernel_locks::holders_and_waiters(self.path())
            .map_err(|error| Error::io("look at", self.path(), error))
    }

    /// Acquires the lock exclusively, waiting as `wait` says.
    ///
    /// A wait without a limit sleeps in the kernel. A wait with a limit or a token polls, with
    /// pauses that grow from 50 microseconds to 5 milliseconds.
    ///
    /// # Errors
    /// - [`Held`], [`Timeout`] or [`Cancelled`], as `wait` says.
    /// - [`Io`] if the file cannot be opened, created or locked, or is neither a file nor a
    ///   directory.
    /// - [`RogueDeletion`] if another process replaces the file all the time.
    ///
    /// [`Held`]: crate::ErrorKind::Held
    /// [`Timeout`]: crate::ErrorKind::Timeout
    /// [`Cancelled`]: crate::ErrorKind::Cancelled
    /// [`Io`]: crate::ErrorKind::Io
    /// [`RogueDeletion`]: crate::ErrorKind::RogueDeletion
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

    /// Acquires as [`acquire_shared`](Self::acquire_shared), in a task; see
    /// [`acquire_async`](Self::acquire_async).
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
    /// [`Held`](crate::ErrorKind::Held) if it is held exclusively, and those that
    /// [`acquire`](Self::acquire) adds.
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
    /// [`Timeout`](crate::ErrorKind::Timeout) if it was still held exclusively then, and those that
    /// [`acquire`](Self::acquire) adds.
    pub fn lock_shared_for(&self, limit: Duration) -> Result<FileGuard> {
        self.acquire_shared(&Wait::at_most(limit))
    }

    /// Acquires as [`acquire`](Self::acquire), with errors that name `subject`.
    pub(crate) fn acquire_as(&self, wait: &Wait, subject: &dyn LockInfo) -> Result<FileGuard> {
        self.guard(Mode::Exclusive, wait, subject)
    }

    #[inline]
    fn acquire_in(&self, mode: Mode, wait: &Wait) -> Result<FileGuard> {
        let acquire = || self.guard(mode, wait, &*self.0);
        // A file of lockkit's own belongs to another lock, which reports its own events.
        if self.0.spec.hardened {
            acquire()
        } else {
            telemetry::acquire(&*self.0, acquire)
        }
    }

    #[cfg(feature = "tokio")]
    async fn acquire_in_async(&self, mode: Mode, wait: &Wait) -> Result<FileGuard> {
        let lock = self.clone();
        let acquire = move |wait: &Wait| lock.guard(mode, wait, &*lock.0);
        telemetry::acquire_async(
            &*self.0,
            blocking::at_once_or_on_a_thread(wait, &*self.0, acquire),
        )
        .await
    }

    #[cfg(feature = "tokio")]
    async fn take_async(&self, wait: &Wait) -> Result<FileGuard> {
        self.acquire_in_async(Mode::Exclusive, wait).await
    }

    fn guard(&self, mode: Mode, wait: &Wait, subject: &dyn LockInfo) -> Result<FileGuard> {
        let open = self.0.acquire(mode, wait, subject)?;
        Ok(FileGuard::new(open, mode, self.0.clone()))
    }
}

lock_methods!(
    FileLock, FileGuard,
    in_tasks: "A free lock is acquired in the call, which blocks for as long as the file system needs to open and \
               lock the file. A thread of its own waits for a lock that is held, under any runtime \
               ([`Io`](crate::ErrorKind::Io) if none can be started). When the future is dropped, that thread wakes \
               at once, closes its file and ends. It releases a lock that it acquires at the same moment."
);
