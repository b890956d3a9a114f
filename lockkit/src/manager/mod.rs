//! Tables of numbered locks.
//!
//! A [`LockManager`] gives out numbers; each is a [`ManagedLock`], the same for every process that retrieves it. Three
//! managers keep the same rules: `shm` in shared memory, for thousands of fine locks at nanoseconds each; `file` with a
//! file for each lock, where there is no shared memory; `memory` inside one process, for tests.
//!
//! `word` is the lock word in shared memory and `bitmap` the allocation, both free of system calls, so that [loom] can
//! check them. Allocating and locking know nothing of each other: a lock that is not allocated works all the same, for
//! somebody may still hold on to a number that was freed.
//!
//! [loom]: https://docs.rs/loom

mod atomic;
#[cfg_attr(not(all(target_os = "linux", not(loom))), allow(dead_code))]
mod bitmap;
mod file;
mod memory;
#[cfg_attr(not(all(target_os = "linux", not(loom))), allow(dead_code))]
mod raw_lock;
#[cfg(all(target_os = "linux", not(loom)))]
mod shm;
#[cfg(not(all(target_os = "linux", not(loom))))]
#[path = "unsupported.rs"]
mod shm;

use std::fmt;

#[cfg(feature = "tokio")]
use crate::blocking;
use crate::error::Result;
use crate::lock::{Guard, Recovered, lock_methods};
use crate::owner::Owner;
use crate::sys::fork;
use crate::telemetry;
use crate::wait::{LockInfo, Wait};

pub use file::FileLockManager;
pub use memory::InMemoryLockManager;
pub use shm::ShmLockManager;

/// A table of locks with numbers from 0 on, which gives them out and takes them back.
///
/// After podman's [libpod/lock]: a number is allocated to something, written down with it, and retrieved by every
/// process that works on the thing.
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
    /// A lock that was free so far, with its new number.
    ///
    /// # Errors
    /// [`Exhausted`](crate::ErrorKind::Exhausted) when all are allocated; what else the manager says.
    fn allocate(&self) -> Result<ManagedLock>;

    /// The lock with the number `id`: the same one for every process, allocated or not.
    ///
    /// # Errors
    /// [`NoSuchLock`](crate::ErrorKind::NoSuchLock) beyond the end of the table; what else the manager says.
    fn retrieve(&self, id: u32) -> Result<ManagedLock>;

    /// The lock with the number `id`, allocated by this call: for those who have numbers written down and begin with a
    /// new table, as after a restart.
    ///
    /// # Errors
    /// [`AlreadyAllocated`](crate::ErrorKind::AlreadyAllocated) when it was;
    /// [`NoSuchLock`](crate::ErrorKind::NoSuchLock) beyond the end of the table; what else the manager says.
    fn allocate_at(&self, id: u32) -> Result<ManagedLock>;

    /// How many locks are left to allocate; `None` where there is no limit. It is a counter, not a scan, except that a
    /// table in shared memory is counted by whoever asks first after a process has begun to use it. A process that is
    /// killed in the midst of an allocation leaves it wrong by one until then. By the time it returns it may be past.
    ///
    /// # Errors
    /// What the manager says.
    fn available(&self) -> Result<Option<u32>>;

    /// The locks that somebody holds now, by number. Never waits for any of them, so with others at work it is no
    /// snapshot: each entry was true at some moment of the call.
    ///
    /// # Errors
    /// What the manager says.
    fn held(&self) -> Result<Vec<HeldLock>>;

    /// Frees every lock.
    ///
    /// Dangerous: whoever has a number written down goes on using it, while the next allocation gives it to somebody
    /// else. Only for a program that knows to be alone, and gives out all numbers anew afterwards
    /// ([`allocate_at`](Self::allocate_at)). Locks that are held stay held.
    ///
    /// # Errors
    /// What the manager says.
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

/// A lock of a [`LockManager`]. Cloning gives another handle on the same lock.
///
/// Not reentrant: a thread that takes it twice waits for itself. Not fair to the last: who comes at the right moment
/// may overtake those who wait; in shared memory none of them for long, in a directory and in memory there is no limit.
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

/// What a guard gives back when it is dropped. Each sort sees to that itself, so that a guard can be taken apart.
#[derive(Debug)]
enum Hold {
    /// In shared memory, from nobody who died: small, for a guard is moved about while others wait for its lock.
    Lean(shm::ShmHold),
    Full(Box<dyn AnyHold>),
}

/// A hold of any manager, and who died before it.
trait AnyHold: fmt::Debug + Send + Sync {
    fn release(&mut self) -> Result<()>;
    fn recovered(&self) -> Option<&Recovered>;
}

#[derive(Debug)]
struct Full<H: Releases> {
    hold: H,
    recovered: Option<Box<Recovered>>,
    /// The process that holds, for a forked child has a copy; `None` once released.
    generation: Option<u32>,
}

impl<H: Releases + 'static> Full<H> {
    fn hold((hold, recovered): (H, Option<Box<Recovered>>)) -> Hold {
        Hold::Full(Box::new(Self { hold, recovered, generation: Some(fork::generation()) }))
    }
}

impl<H: Releases> Drop for Full<H> {
    fn drop(&mut self) {
        // What fails here was given back already, or is freed when its file is closed.
        let _ = AnyHold::release(self);
    }
}

impl<H: Releases> AnyHold for Full<H> {
    fn release(&mut self) -> Result<()> {
        match self.generation.take() == Some(fork::generation()) {
            true => self.hold.release(),
            false => Ok(()),
        }
    }

    fn recovered(&self) -> Option<&Recovered> {
        self.recovered.as_deref()
    }
}

/// The hold of an acquisition that was told of.
#[cfg(feature = "tracing")]
#[derive(Debug)]
struct Traced {
    lock: ManagedLock,
    guard: ManagedGuard,
    /// The process that holds, for a forked child has a copy; `None` once released.
    generation: Option<u32>,
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
        if self.generation.take() == Some(fork::generation()) {
            telemetry::released(self.lock.subject());
        }
        released
    }

    fn recovered(&self) -> Option<&Recovered> {
        self.guard.recovered()
    }
}

/// What one manager gives back, once.
trait Releases: fmt::Debug + Send + Sync {
    fn release(&mut self) -> Result<()>;
}

impl ManagedLock {
    /// Its number.
    pub fn id(&self) -> u32 {
        match &self.0 {
            Handle::Shm(lock) => lock.id(),
            Handle::File(lock) => lock.id(),
            Handle::Memory(lock) => lock.id(),
        }
    }

    /// Gives the number back, so that it can be allocated again. The lock itself goes on working, for those who still
    /// have it; whether somebody holds it makes no difference.
    ///
    /// # Errors
    /// [`NotAllocated`](crate::ErrorKind::NotAllocated) when it is not allocated;
    /// [`Io`](crate::ErrorKind::Io) when the system refuses.
    pub fn free(&self) -> Result<()> {
        match &self.0 {
            Handle::Shm(lock) => lock.free(),
            Handle::File(lock) => lock.free(),
            Handle::Memory(lock) => lock.free(),
        }
    }

    /// Takes the lock, waiting as `wait` says.
    ///
    /// # Errors
    /// [`Held`](crate::ErrorKind::Held), [`Timeout`](crate::ErrorKind::Timeout) or
    /// [`Cancelled`](crate::ErrorKind::Cancelled) as `wait` has it; [`Io`](crate::ErrorKind::Io) when the system
    /// refuses. A forked child opens a shared table anew when it first takes a lock, so there it may also be
    /// [`TooManyProcesses`](crate::ErrorKind::TooManyProcesses) when the table has no place for it,
    /// [`RogueDeletion`](crate::ErrorKind::RogueDeletion) when the table's file was replaced, and
    /// [`Io`](crate::ErrorKind::Io) when it was deleted or the process may not open it any more.
    #[inline]
    pub fn acquire(&self, wait: &Wait) -> Result<ManagedGuard> {
        // What thousands of locks mostly are, in shared memory and free, is worth a few instructions in the caller.
        if let (false, Handle::Shm(lock)) = (telemetry::is_on(), &self.0) {
            if let Some(taken) = lock.acquire_free(wait) {
                return Ok(ManagedGuard(Hold::Lean(taken)));
            }
        }
        // Taken apart and put together, so that what was taken above need not be built where this writes its result.
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
        // So the release, where nobody listens, has nothing to ask.
        #[cfg(feature = "tracing")]
        if telemetry::is_on() {
            let traced = Traced { lock: self.clone(), guard, generation: Some(fork::generation()) };
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

    /// Gives back what this process took and whose guard it gave away to [`std::mem::forget`]: for programs that offer
    /// `lock` and `unlock` to others and cannot keep a guard in between. Everybody else drops the guard.
    ///
    /// A guard that is still there gives nothing back after this. Not to be called while the guard is being dropped in
    /// another thread: in shared memory one of the two might give back what a third thread has just taken.
    ///
    /// # Errors
    /// [`NotLocked`](crate::ErrorKind::NotLocked) when this process does not hold the lock; with a
    /// [`FileLockManager`] or an [`InMemoryLockManager`], when it was not taken through this manager or a clone of it.
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
    in_tasks: "A lock that is free is taken here. One that is held is waited for on a thread of its own, under any runtime \
               ([`Io`](crate::ErrorKind::Io) when none can be started). When the future is dropped the thread ends \
               within some 2 ms in shared memory and at once in a directory, and releases what it may get until then; in \
               memory it is 2 ms, too."
);

/// A held [`ManagedLock`]; dropping it releases.
///
/// A forked child's copy of a guard holds nothing: the lock stays with the parent.
#[must_use = "a guard that is dropped at once releases its lock at once; bind it to a name such as `_guard`"]
#[derive(Debug)]
pub struct ManagedGuard(Hold);

impl ManagedGuard {
    /// Releases now and says what went wrong.
    ///
    /// # Errors
    /// [`NotLocked`](crate::ErrorKind::NotLocked) when [`ManagedLock::unlock`] has given the lock back already;
    /// [`Io`](crate::ErrorKind::Io) from a [`FileLockManager`] when the system refuses.
    pub fn release(mut self) -> Result<()> {
        self.give_back()
    }

    /// Whether the previous owner died holding the lock, and who that was. Every death is told, whichever way the lock
    /// was taken; the owner is unknown only when its place in the table was given to another process in between, or its
    /// record is damaged.
    ///
    /// In an [`InMemoryLockManager`] nobody dies, so it is always `None`.
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

/// A lock that somebody holds; see [`LockManager::held`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldLock {
    id: u32,
    owner: Owner,
}

impl HeldLock {
    /// Its number.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Who holds it; [`Owner::acquired`] says since when.
    pub fn owner(&self) -> &Owner {
        &self.owner
    }
}
