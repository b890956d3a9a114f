//! Tables of numbered locks.
//!
//! A [`LockManager`] allocates numbers; each is a [`ManagedLock`], the same for every process that retrieves it. Three
//! managers have the same rules. `shm` is in shared memory, for thousands of fine-grained locks at nanoseconds each.
//! `file` has a file for each lock, for use without shared memory. `memory` is inside one process, for tests.
//!
//! Allocation and locking are independent: a lock that is not allocated works all the same, because a process may still
//! use a number that was freed.

mod file;
mod memory;
mod shm;

use std::fmt;

#[cfg(feature = "tokio")]
use crate::base::blocking;
use crate::base::error::Result;
use crate::base::guard::{Guard, Recovered};
use crate::base::lock::lock_methods;
use crate::base::lock_info::LockInfo;
use crate::base::owner::Owner;
use crate::base::telemetry;
use crate::base::wait::Wait;
use crate::sys::fork::ProcessId;

pub use file::FileLockManager;
pub use memory::InMemoryLockManager;
pub use shm::ShmLockManager;

/// A table of numbered locks, from 0 on, which allocates and frees them.
///
/// Modelled on podman's [libpod/lock]: a number is allocated for an object and stored with it. Every process that works
/// on the object retrieves the lock by that number.
///
/// ```
/// use lockkit::{InMemoryLockManager, LockManager};
/// # fn main() -> lockkit::Result<()> {
/// let manager: Box<dyn LockManager> = Box::new(InMemoryLockManager::new(2048)?);
/// let lock = manager.allocate()?;
/// {
///     let _guard = manager.retrieve(lock.id())?.lock()?;
///     assert_eq!(manager.held()?[0].id(), lock.id());
/// }
/// lock.free()?;
/// assert_eq!(manager.available()?, Some(2048));
/// # Ok(()) }
/// ```
///
/// [libpod/lock]: https://github.com/containers/podman/tree/main/libpod/lock
pub trait LockManager: Send + Sync {
    /// Allocates a free lock, with its new number.
    ///
    /// # Errors
    /// [`Exhausted`](crate::ErrorKind::Exhausted) if all are allocated, and the errors of the manager.
    fn allocate(&self) -> Result<ManagedLock>;

    /// Returns the lock with the number `id`: the same lock for every process, allocated or not.
    ///
    /// # Errors
    /// [`NoSuchLock`](crate::ErrorKind::NoSuchLock) beyond the end of the table, and the errors of the manager.
    fn retrieve(&self, id: u32) -> Result<ManagedLock>;

    /// Allocates the lock with the number `id`, for programs that have stored numbers and begin with a new table, for
    /// example after a restart.
    ///
    /// # Errors
    /// - [`AlreadyAllocated`](crate::ErrorKind::AlreadyAllocated) if it was allocated.
    /// - [`NoSuchLock`](crate::ErrorKind::NoSuchLock) beyond the end of the table.
    /// - The errors of the manager.
    fn allocate_at(&self, id: u32) -> Result<ManagedLock>;

    /// Returns how many locks are left to allocate, and `None` without a limit. The result is a snapshot.
    ///
    /// The call reads a counter and scans nothing. There is one exception: the first call after a process has begun to
    /// use a table in shared memory recounts. Until then, a process killed during an allocation leaves the counter
    /// wrong by one.
    ///
    /// # Errors
    /// The errors of the manager.
    fn available(&self) -> Result<Option<u32>>;

    /// Returns the locks that are held now, by number. The call never waits for any of them. While other processes
    /// work, the list is not a snapshot of one moment: each entry was true at some time during the call.
    ///
    /// # Errors
    /// The errors of the manager.
    fn held(&self) -> Result<Vec<HeldLock>>;

    /// Frees every lock.
    ///
    /// Dangerous: a process that has stored a number continues to use it, while the next allocation gives it to another
    /// process. Call it only from a program that runs alone, and that then allocates all stored numbers again
    /// ([`allocate_at`](Self::allocate_at)). Held locks stay held.
    ///
    /// # Errors
    /// The errors of the manager.
    ///
    /// ```
    /// use lockkit::{InMemoryLockManager, LockManager};
    /// # fn main() -> lockkit::Result<()> {
    /// let manager = InMemoryLockManager::new(8)?;
    /// manager.allocate()?;
    /// manager.free_all()?;
    /// assert_eq!(manager.available()?, Some(8));
    /// # Ok(()) }
    /// ```
    fn free_all(&self) -> Result<()>;
}

/// A lock of a [`LockManager`]. A clone is another handle on the same lock.
///
/// Not reentrant: locking twice from the same thread deadlocks. Not strictly fair: an acquisition may barge, that is
/// overtake waiters. In shared memory the wait of an overtaken waiter is bounded; in a directory and in memory it is
/// not.
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
pub struct ManagedLock(Handle);

#[derive(Clone, Debug)]
#[cfg_attr(not(all(target_os = "linux", not(loom))), allow(dead_code))]
enum Handle {
    Shm(shm::ShmLock),
    File(file::TableFileLock),
    Memory(memory::MemoryLock),
}

/// The part of a guard that a drop releases. Each variant does so in its own drop, so that a guard can be destructured.
#[derive(Debug)]
enum Hold {
    /// In shared memory, without a dead predecessor. It is small, because a guard is moved while others wait for its
    /// lock.
    Lean(shm::ShmHold),
    Full(Box<dyn AnyHold>),
}

/// A hold of any manager, and its dead predecessor, if any.
trait AnyHold: fmt::Debug + Send + Sync {
    fn release(&mut self) -> Result<()>;
    fn recovered(&self) -> Option<&Recovered>;
}

#[derive(Debug)]
struct Full<H: Releases> {
    hold: H,
    recovered: Option<Box<Recovered>>,
    /// Identifies the process that holds the lock, because a forked child has a copy; `None` after the release.
    process: Option<ProcessId>,
}

impl<H: Releases + 'static> Full<H> {
    fn hold((hold, recovered): (H, Option<Box<Recovered>>)) -> Hold {
        Hold::Full(Box::new(Self { hold, recovered, process: Some(ProcessId::current()) }))
    }
}

impl<H: Releases> Drop for Full<H> {
    fn drop(&mut self) {
        // On a failure the lock was released already, or closing its file releases it.
        let _ = AnyHold::release(self);
    }
}

impl<H: Releases> AnyHold for Full<H> {
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
    /// Identifies the process that holds the lock, because a forked child has a copy; `None` after the release.
    process: Option<ProcessId>,
}

#[cfg(feature = "tracing")]
impl Drop for Traced {
    fn drop(&mut self) {
        let _ = AnyHold::release(self);
    }
}

#[cfg(feature = "tracing")]
impl AnyHold for Traced {
    fn release(&mut self) -> Result<()> {
        let released = self.guard.give_back();
        if self.process.take().is_some_and(ProcessId::is_current) {
            telemetry::released(self.lock.subject());
        }
        released
    }

    fn recovered(&self) -> Option<&Recovered> {
        self.guard.recovered()
    }
}

/// A hold of one manager, to be released once.
trait Releases: fmt::Debug + Send + Sync {
    fn release(&mut self) -> Result<()>;
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

    /// Frees the number, so that it can be allocated again, whether the lock is held or not. The lock itself continues
    /// to work for processes that still use it.
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
    /// A forked child opens a shared table again when it first acquires a lock. That adds these errors:
    /// - [`TooManyProcesses`](crate::ErrorKind::TooManyProcesses) if the table has no free slot.
    /// - [`RogueDeletion`](crate::ErrorKind::RogueDeletion) if the table's file was replaced.
    /// - [`Io`](crate::ErrorKind::Io) if it was deleted or the process may no longer open it.
    #[inline]
    pub fn acquire(&self, wait: &Wait) -> Result<ManagedGuard> {
        // The common case, a free lock in shared memory, is inlined into the caller.
        if let (false, Handle::Shm(lock)) = (telemetry::is_on(), &self.0) {
            if let Some(taken) = lock.acquire_free(wait) {
                return Ok(ManagedGuard(Hold::Lean(taken)));
            }
        }
        // Destructured and rebuilt, so that the result above need not be built at the place where this writes its
        // result.
        #[allow(clippy::needless_match)]
        match self.acquire_traced(wait) {
            Ok(ManagedGuard(Hold::Lean(hold))) => Ok(ManagedGuard(Hold::Lean(hold))),
            Ok(ManagedGuard(Hold::Full(hold))) => Ok(ManagedGuard(Hold::Full(hold))),
            Err(error) => Err(error),
        }
    }

    #[cold]
    #[inline(never)]
    fn acquire_traced(&self, wait: &Wait) -> Result<ManagedGuard> {
        telemetry::acquire(self.subject(), || self.take(wait))
    }

    #[cfg(feature = "tokio")]
    async fn take_async(&self, wait: &Wait) -> Result<ManagedGuard> {
        let lock = self.clone();
        let taking = blocking::at_once_or_on_a_thread(wait, self.subject(), move |wait| lock.take(wait));
        telemetry::acquire_async(self.subject(), taking).await
    }

    fn subject(&self) -> &dyn LockInfo {
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
            let traced = Traced { lock: self.clone(), guard, process: Some(ProcessId::current()) };
            return Ok(ManagedGuard(Hold::Full(Box::new(traced))));
        }
        Ok(guard)
    }

    #[inline(never)]
    fn acquire_any(&self, wait: &Wait) -> Result<Hold> {
        match &self.0 {
            Handle::Shm(lock) => Ok(match lock.acquire(wait)? {
                (hold, None) => Hold::Lean(hold),
                told => Full::hold(told),
            }),
            Handle::File(lock) => Ok(Full::hold(lock.acquire(wait)?)),
            Handle::Memory(lock) => Ok(Full::hold((lock.acquire(wait)?, None))),
        }
    }

    /// Releases a lock that this process holds and whose guard it gave to [`std::mem::forget`]. It is for programs that
    /// offer `lock` and `unlock` to others and cannot keep a guard in between. All other programs drop the guard.
    ///
    /// A guard that still exists releases nothing after this. Do not call this while another thread drops the guard: in
    /// shared memory one of the two might release what a third thread has just acquired.
    ///
    /// # Errors
    /// [`NotLocked`](crate::ErrorKind::NotLocked) if this process does not hold the lock. With a [`FileLockManager`] or
    /// an [`InMemoryLockManager`] also if the lock was not acquired through this manager or a clone of it.
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
pub struct ManagedGuard(Hold);

impl ManagedGuard {
    /// Releases the lock now and returns any failure.
    ///
    /// # Errors
    /// - [`NotLocked`](crate::ErrorKind::NotLocked) if [`ManagedLock::unlock`] has already released the lock.
    /// - [`Io`](crate::ErrorKind::Io) from a [`FileLockManager`] if a system call fails.
    pub fn release(mut self) -> Result<()> {
        self.give_back()
    }

    /// Returns a report, with the previous owner, if that owner died while it held the lock. Every death is reported,
    /// however the lock was acquired. The owner is unknown only if its slot in the table was given to another process
    /// in between, or if its record is damaged.
    ///
    /// With an [`InMemoryLockManager`] the result is always `None`, because no holder can die.
    pub fn recovered(&self) -> Option<&Recovered> {
        match &self.0 {
            Hold::Lean(_) => None,
            Hold::Full(full) => full.recovered(),
        }
    }

    #[inline]
    fn give_back(&mut self) -> Result<()> {
        match &mut self.0 {
            Hold::Lean(hold) => hold.release(),
            Hold::Full(full) => full.release(),
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

/// A held lock; see [`LockManager::held`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldLock {
    id: u32,
    owner: Owner,
}

impl HeldLock {
    /// Returns its number.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Returns the holder of the lock; [`Owner::acquired`] is the time of the acquisition.
    pub fn owner(&self) -> &Owner {
        &self.owner
    }
}
