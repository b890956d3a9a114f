//! Tables of numbered locks.
//!
//! A [`LockManager`] allocates numbers; each is a [`ManagedLock`], the same for every process that
//! retrieves it. Three managers have the same rules. `shm` is in shared memory, for thousands of
//! fine-grained locks at nanoseconds each. `file` has a file for each lock, for use without shared
//! memory. `memory` is inside one process, for tests.
//!
//! Allocation and locking are independent: a lock that is not allocated works all the same, because
//! a process may still use a number that was freed.
//!
//! # Implementation
//! `file_table`, `memory_table` and `shm/lock` have the locks of one manager each. `managed_lock`
//! combines them into one type of lock and guard. `file`, `memory` and `shm/manager` have the
//! managers, which return that type.

mod file;
mod file_table;
mod hold;
mod lock_manager;
mod managed_lock;
mod memory;
mod memory_table;
mod shm;

pub use file::FileLockManager;
pub use lock_manager::{HeldLock, LockManager};
pub use managed_lock::{ManagedGuard, ManagedLock};
pub use memory::InMemoryLockManager;
pub use shm::manager::ShmLockManager;
