//! A table of locks in shared memory: [`ShmLockManager`].
//!
//! `raw_lock` is the lock word in shared memory and `bitmap` the allocation. Both are free of system calls, so that
//! [loom] can check them. `table` combines them with files, processes and futexes, on Linux. `unsupported` replaces it
//! on other systems.
//!
//! [loom]: https://docs.rs/loom

mod atomic;
#[cfg_attr(not(all(target_os = "linux", not(loom))), allow(dead_code))]
mod bitmap;
#[cfg_attr(not(all(target_os = "linux", not(loom))), allow(dead_code))]
mod raw_lock;
#[cfg(all(target_os = "linux", not(loom)))]
mod table;
#[cfg(not(all(target_os = "linux", not(loom))))]
#[path = "unsupported.rs"]
mod table;

pub use table::ShmLockManager;
pub(super) use table::{ShmHold, ShmLock};
