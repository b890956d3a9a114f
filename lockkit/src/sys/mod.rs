//! Everything that differs between systems, and everything `unsafe`. Nothing here uses another
//! module of the library.
//!
//! One small module per mechanism, each a safe interface to what the kernel offers:
//!
//! | module | mechanism | used by |
//! |---|---|---|
//! | [`clock`] | the time that continues during sleep | leases |
//! | [`event`] | an event to wait for together with a descriptor | cancellation |
//! | [`fd`] | descriptors, and handles on Windows, by one set of names | the same |
//! | [`file_id`] | the identity of a file, and whether a path still names it | pidfiles, file locks |
//! | [`files`] | operations on files that differ between systems | every lock on a file |
//! | [`flock`] | whole-file locks, through `fs2` | file locks |
//! | [`failpoint`] | places at which a test can have the process killed | tests |
//! | [`fnv`] | the hash FNV-1a | records, names of sockets |
//! | [`fork`] | descriptors that a forked child does not keep | every held lock |
//! | `futex` | sleeping until a shared word changes | waiting for a lock in shared memory |
//! | `mapping` | shared memory as atomic words | the records that remain after a crash |
//! | [`ofd`] | locks that belong to an open file | which processes still use a lock table, pidfiles |
//! | `proc_locks` | the kernel's lists of locks on files | the holders of locks on files |
//! | `proc_net_unix` | the abstract sockets and their queues | the list of named locks |
//! | [`probe`] | the system's answer about a pid | `process` |
//! | [`process`] | the identity of processes, and whether they live | owners |
//! | [`process_local`] | a value that a forked child does not inherit | the heartbeat of leases, cancel tokens |
//! | [`atomic_box`] | a value that one thread at a time takes | kept descriptors |
//! | [`sharing`] | the users that share a lock | named locks |
//! | `socket_name` | the name of a socket as the identity of its descriptor | descriptors of named locks |
//! | `layout` | the layout of a lock table in shared memory | numbered locks |
//! | `unix_socket` | abstract sockets: those that can be handed over, and those that carry bytes | named locks on Linux, instances |
//! | `unix_diag` | the existing sockets, from the kernel | the waiters of a named lock |
//! | `user` | whether a uid means one user | trust between processes |
//! | [`tmpfile`] | files that are complete before they have a name | pidfiles, leases |
//! | [`inotify`] | wake-ups when a file changes | waiting for a lease |
//! | [`write_lock`] | a lock that a mere reader of the file cannot acquire | pidfiles |
//! | [`xattr`] | extended attributes | the holder of a pidfile |

#![allow(unsafe_code)]

pub(crate) mod atomic_box;
#[cfg(unix)]
pub(crate) mod clock;
#[cfg(target_vendor = "apple")]
pub(crate) mod darwin;
#[cfg(unix)]
pub(crate) mod event;
#[cfg(lockkit_failpoints)]
pub mod failpoint;
#[cfg(not(lockkit_failpoints))]
pub(crate) mod failpoint;
#[cfg(unix)]
pub(crate) mod fd;
pub(crate) mod file_id;
#[cfg(unix)]
pub(crate) mod files;
#[cfg(unix)]
pub(crate) mod flock;
pub(crate) mod fnv;
#[cfg(unix)]
pub(crate) mod fork;
#[cfg(target_os = "freebsd")]
pub(crate) mod freebsd;
#[cfg(all(target_os = "linux", not(loom)))]
pub(crate) mod futex;
pub(crate) mod inotify;
#[cfg(all(target_os = "linux", not(loom)))]
pub(crate) mod layout;
#[cfg(target_os = "linux")]
pub(crate) mod mapping;
#[cfg_attr(not(target_os = "linux"), path = "ofd_unsupported.rs")]
pub(crate) mod ofd;
pub(crate) mod probe;
#[cfg(target_os = "linux")]
pub mod proc_locks;
#[cfg(target_os = "linux")]
pub(crate) mod proc_net_unix;
#[cfg(unix)]
pub(crate) mod process;
pub(crate) mod process_local;
pub(crate) mod sharing;
#[cfg(target_os = "linux")]
pub(crate) mod socket_name;
#[cfg_attr(not(target_os = "linux"), path = "tmpfile_unsupported.rs")]
pub(crate) mod tmpfile;
#[cfg(target_os = "linux")]
pub(crate) mod unix_diag;
#[cfg(target_os = "linux")]
pub(crate) mod unix_socket;
#[cfg(target_os = "linux")]
pub(crate) mod user;
#[cfg(windows)]
mod windows;
pub(crate) mod write_lock;
#[cfg_attr(
    not(any(target_os = "linux", target_vendor = "apple")),
    path = "xattr_unsupported.rs"
)]
pub(crate) mod xattr;
#[cfg(windows)]
pub(crate) use windows::{
    clock, event, fd, files, flock, fork, known_folder, mutex, process, security,
};
