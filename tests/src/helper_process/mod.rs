//! A second process that acquires and releases locks on command: one command per line, one answer
//! per line.
//!
//! | command | answer |
//! |---|---|
//! | `try`, `lock`, `lock-for MS` | `held`, `held recovered PID`, or `error KIND: text` |
//! | `lock-cancelled MS` | the same of a wait that is cancelled after so long |
//! | `release` | `released`, or an error |
//! | `owner` | `owner PID` or `owner none` |
//! | `fork` | `forked PID`: a forked child, alive until it is killed, or for a while |
//! | `fork-drop` | `dropped`: a forked child has dropped its copy of the guard and ended |
//! | `fork-often` | `free`: live children, forked while threads acquired and released the lock, do not keep it |
//! | `spawn` | `spawned PID`: a program started in the ordinary way, alive until it is killed |
//! | `exec` | none: the actor has become another program |
//! | `panic` | `panicked`: a thread acquired the lock and panicked as holder |
//! | `hold-name NAME`, `time-out-name NAME`, `clean-name NAME` | `done`: the same with any named lock |
//! | `use-names N`, `hold-names N` | `done`; `bytes N`: the memory that each of so many locks needs |
//! | `list-behind N` | `listed M`: the locks of `hold-names`, listed with sockets of N waiting connections about |
//! | `close-all` | `closed`: every descriptor from 3 on is closed; other, locked files have those numbers |
//! | `others` | `kept`: those are open and locked; `fork-others` asks a forked child, `spare-others` closes them |
//! | `reopen` | `open`: the lock is opened again |
//! | `set-aside`, `drop-aside` | `aside`, `dropped`: the guard is kept during another acquisition, and dropped |
//! | `use-descriptors` | `used`: no descriptor is left; `free-descriptors` closes those: `freed` |
//! | `limit-threads N`, or `all` | `limited`: its user may have no more threads from now on; has no effect for root |

mod actor;
mod session;

pub use actor::Actor;
pub(crate) use actor::announce;
#[cfg(target_os = "linux")]
pub(crate) use actor::as_user;
#[cfg(unix)]
pub(crate) use session::child_succeeds;
pub use session::serve;

#[cfg(unix)]
pub use crate::process::signal_pid;
