//! A lock on a path whose file names its holder: the pidfile of a daemon.
//!
//! The holder of a pidfile has a write lock on the file's open file
//! ([`write_lock`](crate::sys::write_lock)) for as long as it lives, and the file contains its pid.
//! [`verdict`] judges an existing file; [`record`] defines the content of a file.
//!
//! # Implementation
//! No acquisition locks an existing pidfile: any user with read permission could also hold a lock
//! on it. A holder has its own file, which is complete and locked before the path names it.
//!
//! - Absent path: the file is created without a name (`O_TMPFILE`), and link(2) names it if no
//!   other file has the name.
//! - Blank or stale file: the file is created as `.NAME.lockkit` in the same directory, with
//!   permissions only for users that may write the pidfile. The write lock on it serializes takers:
//!   the taker judges the pidfile again and renames its own file over it. A crash leaves
//!   `.NAME.lockkit`, which the next taker uses.
//! - The second procedure also applies to an absent path if the file system has no nameless files,
//!   or if the taker finds a `.NAME.lockkit`.
//!
//! A release removes the file, then releases the lock. A wait without a limit sleeps in the kernel
//! until the write lock of the file is released (`F_OFD_SETLKW` for a read lock). Then it judges
//! the path again.
//!
//! | module, each uses those above it | contents |
//! |---|---|
//! | [`record`] | the content of a file, and the identity of its owner |
//! | [`foreign_flock`] | the flock of another program on a pidfile |
//! | [`verdict`] | whether a file is held |
//! | [`inspect`] | [`PidStatus`] |
//! | [`pid_file`] | [`PidFile`] |
//! | [`existing`] | the file that the path names |
//! | [`mod@write`] | writes the owner into a file |
//! | [`guard`] | [`PidGuard`] |
//! | [`taker`] | the taker file `.NAME.lockkit` |
//! | [`acquire`], [`stale`] | acquisitions, and removals of stale files |
//!
//! # Fork
//! Forked children share the open file, as in FreeBSD's pidfile(3): a daemon's parent may end
//! before the child calls `rewrite`, and no other process can acquire the lock in between. So if
//! the parent is killed, a child that has not dropped its copy of the guard holds the lock until
//! the child ends. A release by the parent frees it all the same.

mod acquire;
mod existing;
#[cfg_attr(not(target_os = "linux"), path = "foreign_flock_unsupported.rs")]
mod foreign_flock;
mod guard;
mod inspect;
mod pid_file;
mod record;
mod stale;
mod taker;
mod verdict;
mod write;

pub use guard::PidGuard;
pub use inspect::PidStatus;
pub use pid_file::PidFile;
