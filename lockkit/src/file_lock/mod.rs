//! A lock on a path: flock(2), taken so that a deleted or replaced file is noticed.
//!
//! # Guarantees
//! - The holder has its lock on the file that the next process will open.
//! - A deletion of the file by a process that holds the lock, as the rules require, is always
//!   noticed. A deletion without the lock is noticed by the first acquisition after 1 ms
//!   ([`MAX_COMPARISON_AGE`]).
//! - Threads exclude each other exactly as processes do.
//! - The file is never deleted, unless the acquisition has just created it and cannot use it.
//!
//! # Implementation
//! The kernel's lock is on the open file; the path only leads to it. So after locking, the open
//! file is compared with the file that the path names now. If the file was deleted or replaced
//! meanwhile, the acquisition starts again.
//!
//! Each acquisition has its own open file. One open file is kept between acquisitions, so that most
//! acquisitions open none. A wait without a limit blocks in the kernel. A wait with a limit or a
//! token retries on a timer, because nothing could interrupt a thread that is blocked in flock.
//!
//! The comparison costs more than the lock. It is omitted for a file that was locked here less than
//! a [`RecheckWindow`] ago and compared less than [`MAX_COMPARISON_AGE`] ago, as in a tight loop.
//! That window is too short for another process to lock, delete and unlock the file.
//!
//! A program may close descriptors that it did not open, and its next files reuse their numbers. So
//! before a kept descriptor is locked, and before a lock is released, the descriptor is compared
//! with the file that was opened for it (see [`fork`](crate::sys::fork)). That also costs as much
//! as the lock, and is omitted if too little time has passed to close one file and open another.
//!
//! | module, each uses those above it | contents |
//! |---|---|
//! | [`kernel_locks`] | the holders and waiters that the kernel lists |
//! | [`spec`] | where the file is, and how it is opened and created |
//! | [`recheck`] | when the comparison may be omitted |
//! | [`open_file`] | the open file |
//! | [`shared`] | the acquisition |
//! | [`guard`] | [`FileGuard`] |
//! | [`lock`] | [`FileLock`] |
//!
//! [`MAX_COMPARISON_AGE`]: recheck::MAX_COMPARISON_AGE
//! [`RecheckWindow`]: recheck::RecheckWindow

mod guard;
#[cfg_attr(not(target_os = "linux"), path = "kernel_locks_unsupported.rs")]
mod kernel_locks;
mod lock;
mod open_file;
mod recheck;
mod shared;
mod spec;

pub use guard::FileGuard;
pub use lock::FileLock;
pub(crate) use spec::check_mode;
