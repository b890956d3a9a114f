//! What [`sys`](super) is on Windows, module by module, by the same names where there is the same need.
//!
//! | module | mechanism |
//! |---|---|
//! | [`clock`] | the interrupt time, which goes on during sleep |
//! | `command` | a job object, and what becomes of Ctrl-C, for the command `lockkit` |
//! | [`event`] | events, and one wait for handles, cancellation and time |
//! | [`fd`] | handles by the names of descriptors |
//! | [`files`] | which file is which, by volume and id; what is being deleted |
//! | [`flock`] | `LockFileEx` on a byte that no file reaches |
//! | [`runtime_dir`] | the directories for lockkit's own files, as the shell knows them |
//! | [`fork`] | nothing: there is no fork |
//! | [`mutex`] | named mutexes |
//! | [`process`] | pid and moment of creation |
//! | [`security`] | who this process is, and what it lets others do |

pub(crate) mod clock;
#[cfg(feature = "cli")]
pub(crate) mod command;
pub(crate) mod event;
pub(crate) mod fd;
pub(crate) mod files;
pub(crate) mod flock;
pub(crate) mod fork;
pub(crate) mod mutex;
pub(crate) mod process;
pub(crate) mod runtime_dir;
pub(crate) mod security;

use std::time::Duration;

/// Ticks of 100 ns, in which Windows counts time.
const TICKS: u64 = 10_000_000;

fn span(ticks: u64) -> Duration {
    Duration::new(ticks / TICKS, (ticks % TICKS) as u32 * 100)
}

/// Text as Windows wants it, with a zero behind it.
fn wide(text: &str) -> Vec<u16> {
    text.encode_utf16().chain([0]).collect()
}
