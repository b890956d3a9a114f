//! The trait of lock managers, and the entries of their lists.

use super::managed_lock::ManagedLock;
use crate::base::error::Result;
use crate::base::owner::Owner;

/// A table of numbered locks, from 0 on, which allocates and frees them.
///
/// Modelled on podman's [libpod/lock]: a number is allocated for an object and stored with it.
/// Every process that works on the object retrieves the lock by that number.
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
    /// [`Exhausted`](crate::ErrorKind::Exhausted) if all are allocated, and the errors of the
    /// manager.
    fn allocate(&self) -> Result<ManagedLock>;

    /// Returns the lock with the number `id`: the same lock for every process, allocated or not.
    ///
    /// # Errors
    /// [`NoSuchLock`](crate::ErrorKind::NoSuchLock) beyond the end of the table, and the errors of
    /// the manager.
    fn retrieve(&self, id: u32) -> Result<ManagedLock>;

    /// Allocates the lock with the number `id`, for programs that have stored numbers and begin
    /// with a new table, for example after a restart.
    ///
    /// # Errors
    /// - [`AlreadyAllocated`](crate::ErrorKind::AlreadyAllocated) if it was allocated.
    /// - [`NoSuchLock`](crate::ErrorKind::NoSuchLock) beyond the end of the table.
    /// - The errors of the manager.
    fn allocate_at(&self, id: u32) -> Result<ManagedLock>;

    /// Returns how many locks are left to allocate, and `None` without a limit. The result is a
    /// snapshot.
    ///
    /// The call reads a counter and scans nothing. There is one exception: the first call after a
    /// process has begun to use a table in shared memory recounts. Until then, a process killed
    /// during an allocation leaves the counter wrong by one.
    ///
    /// # Errors
    /// The errors of the manager.
    fn available(&self) -> Result<Option<u32>>;

    /// Returns the locks that are held now, by number. The call never waits for any of them. While
    /// other processes work, the list is not a snapshot of one moment: each entry was true at some
    /// time during the call.
    ///
    /// # Errors
    /// The errors of the manager.
    fn held(&self) -> Result<Vec<HeldLock>>;

    /// Frees every lock.
    ///
    /// Dangerous: a process that has stored a number continues to use it, while the next allocation
    /// gives it to another process. Call it only from a program that runs alone, and that then
    /// allocates all stored numbers again ([`allocate_at`](Self::allocate_at)). Held locks stay
    /// held.
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

/// A held lock; see [`LockManager::held`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldLock {
    pub(super) id: u32,
    pub(super) owner: Owner,
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
