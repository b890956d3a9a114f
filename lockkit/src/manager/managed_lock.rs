//! A numbered lock of any manager, and its guard.
//!
//! The guard is small and moves by value: in shared memory a lock changes hands in nanoseconds. A
//! guard with a report, of a file, or of an acquisition that tracing saw is boxed.

use std::fmt;

use super::file_table::TableFileLock;
use super::hold::Hold;
use super::memory_table::MemoryLock;
use super::shm::lock::{ShmHold, ShmLock};
#[cfg(feature = "tokio")]
use crate::base::blocking;
use crate::base::error::Result;
use crate::base::guard::{Guard, Recovered};
use crate::base::lock::lock_methods;
use crate::base::lock_info::LockInfo;
use crate::base::telemetry;
use crate::base::wait::Wait;
use crate::sys::fork::ProcessId;

/// A lock of a [`LockManager`](crate::LockManager). A clone is another handle on the same lock.
///
/// Not reentrant: locking twice from the same thread deadlocks. Not strictly fair: an acquisition
/// may barge, that is overtake waiters. In shared memory the wait of an overtaken waiter is
/// bounded; in a directory and in memory it is not.
///
/// ```
/// # fn main() -> lockkit::Result<()> {
/// use std::time::Duration;
/// use lockkit::{InMemoryLockManager, LockManager, Wait};
/// let lock = InMemoryLockManager::new(8)?.allocate()?;
/// let guard = lock.acquire(&Wait::at_most(Duration::from_secs(5)))?;
/// assert!(lock.try_lock().unwrap_err().is_held());
/// guard.release()?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct ManagedLock(pub(super) Handle);

#[derive(Clone, Debug)]
#[cfg_attr(not(all(target_os = "linux", not(loom))), allow(dead_code))]
pub(super) enum Handle {
    Shm(ShmLock),
    File(TableFileLock),
    Memory(MemoryLock),
}

/// The part of a guard that a drop releases. Each variant does so in its own drop, so that a guard
/// can be destructured.
#[derive(Debug)]
enum GuardHold {
    /// In shared memory, without a dead predecessor. It is small, because a guard is moved while
    /// others wait for its lock.
    Inline(ShmHold),
    Boxed(Box<dyn BoxedHold>),
}

/// A hold of any manager, and its dead predecessor, if any.
trait BoxedHold: fmt::Debug + Send + Sync {
    fn release(&mut self) -> Result<()>;
    fn recovered(&self) -> Option<&Recovered>;
}

#[derive(Debug)]
struct ReportingHold<H: Hold> {
    hold: H,
    recovered: Option<Box<Recovered>>,
    /// Identifies the process that holds the lock, because a forked child has a copy; `None` after
    /// the release.
    process: Option<ProcessId>,
}

impl<H: Hold + 'static> ReportingHold<H> {
    fn boxed((hold, recovered): (H, Option<Box<Recovered>>)) -> GuardHold {
        GuardHold::Boxed(Box::new(Self {
            hold,
            recovered,
            process: Some(ProcessId::current()),
        }))
    }
}

impl<H: Hold> Drop for ReportingHold<H> {
    fn drop(&mut self) {
        // On a failure the lock was released already, or closing its file releases it.
        let _ = BoxedHold::release(self);
    }
}

impl<H: Hold> BoxedHold for ReportingHold<H> {
    fn release(&mut self) -> Result<()> {
        match self.process.take().is_some_and(ProcessId::is_current) {
            true => self.hold.release(),
            false => Ok(()),
        }
    }

    fn recovered(&self) -> Option<&Recovered> {
        self.recovered.as_deref()
    }
}

/// The hold of an acquisition that was reported to tracing.
#[cfg(feature = "tracing")]
#[derive(Debug)]
struct Traced {
    lock: ManagedLock,
    guard: ManagedGuard,
    /// Identifies the process that holds the lock, because a forked child has a copy; `None` after
    /// the release.
    process: Option<ProcessId>,
}

#[cfg(feature = "tracing")]
impl Drop for Traced {
    fn drop(&mut self) {
        let _ = BoxedHold::release(self);
    }
}

#[cfg(feature = "tracing")]
impl BoxedHold for Traced {
    fn release(&mut self) -> Result<()> {
        let released = self.guard.release_once();
        if self.process.take().is_some_and(ProcessId::is_current) {
            telemetry::released(self.lock.info());
        }
        released
    }

    fn recovered(&self) -> Option<&Recovered> {
        self.guard.recovered()
    }
}

impl ManagedLock {
    /// Returns its number.
    pub fn id(&self) -> u32 {
        match &self.0 {
            Handle::Shm(lock) => lock.id(),
            Handle::File(lock) => lock.id(),
            Handle::Memory(lock) => lock.id(),
        }
    }

    /// Frees the number, so that it can be allocated again, whether the lock is held or not. The
    /// lock itself continues to work for processes that still use it.
    ///
    /// # Errors
    /// - [`NotAllocated`](crate::ErrorKind::NotAllocated) if it is not allocated.
    /// - [`Io`](crate::ErrorKind::Io) if a system call fails.
    pub fn free(&self) -> Result<()> {
        match &self.0 {
            Handle::Shm(lock) => lock.free(),
            Handle::File(lock) => lock.free(),
            Handle::Memory(lock) => lock.free(),
        }
    }

    /// Acquires the lock, waiting as `wait` says.
    ///
    /// # Errors
    /// - [`Held`](crate::ErrorKind::Held), [`Timeout`](crate::ErrorKind::Timeout) or
    ///   [`Cancelled`](crate::ErrorKind::Cancelled), as `wait` says.
    /// - [`Io`](crate::ErrorKind::Io) if a system call fails.
    ///
    /// A forked child opens a shared table again when it first acquires a lock. That adds these
    /// errors:
    /// - [`TooManyProcesses`](crate::ErrorKind::TooManyProcesses) if the table has no free slot.
    /// - [`RogueDeletion`](crate::ErrorKind::RogueDeletion) if the table's file was replaced.
    /// - [`Io`](crate::ErrorKind::Io) if it was deleted or the process may no longer open it.
    #[inline]
    pub fn acquire(&self, wait: &Wait) -> Result<ManagedGuard> {
        // The common case, a free lock in shared memory, is inlined into the caller.
        if let (false, Handle::Shm(lock)) = (telemetry::is_on(), &self.0) {
            if let Some(hold) = lock.acquire_free(wait) {
                return Ok(ManagedGuard(GuardHold::Inline(hold)));
            }
        }
        // Destructured and rebuilt, so that the result above need not be built at the place where
        // this writes its result.
        #[allow(clippy::needless_match)]
        match self.acquire_traced(wait) {
            Ok(ManagedGuard(GuardHold::Inline(hold))) => Ok(ManagedGuard(GuardHold::Inline(hold))),
            Ok(ManagedGuard(GuardHold::Boxed(hold))) => Ok(ManagedGuard(GuardHold::Boxed(hold))),
            Err(error) => Err(error),
        }
    }

    #[cold]
    #[inline(never)]
    fn acquire_traced(&self, wait: &Wait) -> Result<ManagedGuard> {
        telemetry::acquire(self.info(), || self.take(wait))
    }

    #[cfg(feature = "tokio")]
    async fn take_async(&self, wait: &Wait) -> Result<ManagedGuard> {
        let lock = self.clone();
        let taking =
            blocking::at_once_or_on_a_thread(wait, self.info(), move |wait| lock.take(wait));
        telemetry::acquire_async(self.info(), taking).await
    }

    fn info(&self) -> &dyn LockInfo {
        match &self.0 {
            Handle::Shm(lock) => lock,
            Handle::File(lock) => lock,
            Handle::Memory(lock) => lock,
        }
    }

    fn take(&self, wait: &Wait) -> Result<ManagedGuard> {
        let guard = ManagedGuard(self.acquire_any(wait)?);
        // So a release without tracing has nothing to check.
        #[cfg(feature = "tracing")]
        if telemetry::is_on() {
            let traced = Traced {
                lock: self.clone(),
                guard,
                process: Some(ProcessId::current()),
            };
            return Ok(ManagedGuard(GuardHold::Boxed(Box::new(traced))));
        }
        Ok(guard)
    }

    #[inline(never)]
    fn acquire_any(&self, wait: &Wait) -> Result<GuardHold> {
        match &self.0 {
            Handle::Shm(lock) => Ok(match lock.acquire(wait)? {
                (hold, None) => GuardHold::Inline(hold),
                reported => ReportingHold::boxed(reported),
            }),
            Handle::File(lock) => Ok(ReportingHold::boxed(lock.acquire(wait)?)),
            Handle::Memory(lock) => Ok(ReportingHold::boxed((lock.acquire(wait)?, None))),
        }
    }

    /// Releases a lock that this process holds and whose guard it gave to [`std::mem::forget`]. It
    /// is for programs that offer `lock` and `unlock` to others and cannot keep a guard in between.
    /// All other programs drop the guard.
    ///
    /// A guard that still exists releases nothing after this. Do not call this while another thread
    /// drops the guard: in shared memory one of the two might release what a third thread has just
    /// acquired.
    ///
    /// # Errors
    /// [`NotLocked`](crate::ErrorKind::NotLocked) if this process does not hold the lock. With a
    /// [`FileLockManager`](crate::FileLockManager) or an
    /// [`InMemoryLockManager`](crate::InMemoryLockManager) also if the lock was not acquired
    /// through this manager or a clone of it.
    ///
    /// ```
    /// use lockkit::{InMemoryLockManager, LockManager};
    /// # fn main() -> lockkit::Result<()> {
    /// let lock = InMemoryLockManager::new(1)?.allocate()?;
    /// std::mem::forget(lock.lock()?);
    /// lock.unlock()?;
    /// assert!(lock.unlock().is_err());
    /// # Ok(()) }
    /// ```
    pub fn unlock(&self) -> Result<()> {
        match &self.0 {
            Handle::Shm(lock) => lock.unlock(),
            Handle::File(lock) => lock.unlock(),
            Handle::Memory(lock) => lock.unlock(),
        }
    }
}

lock_methods!(
    ManagedLock, ManagedGuard,
    in_tasks: "A free lock is acquired in the call. A thread of its own waits for a lock that is held, under any \
               runtime ([`Io`](crate::ErrorKind::Io) if none can be started). When the future is dropped, the \
               thread ends within 2 ms in shared memory and in process memory, and at once in a directory. It \
               releases a lock that it acquires until then."
);

/// A held [`ManagedLock`]; dropping it releases.
///
/// A forked child's copy of a guard holds nothing: the lock stays with the parent.
#[must_use = "a guard that is dropped at once releases its lock at once; bind it to a name such as `_guard`"]
#[derive(Debug)]
pub struct ManagedGuard(GuardHold);

impl ManagedGuard {
    /// Releases the lock now and returns any failure.
    ///
    /// # Errors
    /// - [`NotLocked`](crate::ErrorKind::NotLocked) if [`ManagedLock::unlock`] has already released
    ///   the lock.
    /// - [`Io`](crate::ErrorKind::Io) from a [`FileLockManager`](crate::FileLockManager) if a
    ///   system call fails.
    pub fn release(mut self) -> Result<()> {
        self.release_once()
    }

    /// Returns a report, with the previous owner, if that owner died while it held the lock. Every
    /// death is reported, however the lock was acquired. The owner is unknown only if its slot in
    /// the table was given to another process in between, or if its record is damaged.
    ///
    /// With an [`InMemoryLockManager`](crate::InMemoryLockManager) the result is always `None`,
    /// because no holder can die.
    pub fn recovered(&self) -> Option<&Recovered> {
        match &self.0 {
            GuardHold::Inline(_) => None,
            GuardHold::Boxed(hold) => hold.recovered(),
        }
    }

    #[inline]
    fn release_once(&mut self) -> Result<()> {
        match &mut self.0 {
            GuardHold::Inline(hold) => hold.release(),
            GuardHold::Boxed(hold) => hold.release(),
        }
    }
}

impl Guard for ManagedGuard {
    fn release(self) -> Result<()> {
        self.release()
    }

    fn recovered(&self) -> Option<&Recovered> {
        self.recovered()
    }
}
