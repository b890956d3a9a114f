//! Tables of locks in shared memory: [`ShmLockManager`](manager::ShmLockManager).
//!
//! A process takes a *slot* of the table and keeps a kernel lock on the slot's first byte for as
//! long as it lives. A lock word names its owner by slot and generation of the slot. So an owner is
//! dead when its slot has a later generation or its byte is not locked. The kernel decides this,
//! not a pid, so it also works across pid namespaces. The next user of a slot raises its generation
//! first, so that it is never mistaken for the dead one.
//!
//! A process attaches to a table once and for its life, whatever the number of managers it opens.
//! The memory is never unmapped, so a guard is a plain reference without a reference count.
//!
//! A page of cells is reserved in the file before its first lock is handed out. So a full file
//! system is an error there, and not a SIGBUS later.
//!
//! # Implementation
//! | module | contents |
//! |---|---|
//! | [`layout`](crate::sys::layout) | the file format |
//! | `raw_lock` | the lock word |
//! | `bitmap` | the allocation of numbers |
//! | `create` | a new table file |
//! | `slots` | the slots of processes |
//! | `attach` | the tables that this process uses |
//! | `waiter` | sleeping on a futex, and the times of hand-offs |
//! | `lock`, `manager` | the locks, and the manager that returns them |
//! | `unsupported` | `lock` and `manager` for systems other than Linux |
//!
//! `raw_lock` and `bitmap` are free of system calls, so that [loom] can check them.
//!
//! [loom]: https://docs.rs/loom

mod atomic;
#[cfg_attr(not(all(target_os = "linux", not(loom))), allow(dead_code))]
mod bitmap;
#[cfg_attr(not(all(target_os = "linux", not(loom))), allow(dead_code))]
mod raw_lock;

#[cfg(all(target_os = "linux", not(loom)))]
mod attach;
#[cfg(all(target_os = "linux", not(loom)))]
mod create;
#[cfg(all(target_os = "linux", not(loom)))]
pub(super) mod lock;
#[cfg(all(target_os = "linux", not(loom)))]
pub(super) mod manager;
#[cfg(all(target_os = "linux", not(loom)))]
mod slots;
#[cfg(all(target_os = "linux", not(loom), test))]
mod tests;
#[cfg(all(target_os = "linux", not(loom)))]
mod waiter;

#[cfg(not(all(target_os = "linux", not(loom))))]
mod unsupported;
#[cfg(not(all(target_os = "linux", not(loom))))]
pub(super) use unsupported::{lock, manager};
