//! The Windows version of [`sys`](super), module by module, with the same names for the same needs.
//!
//! | module | mechanism |
//! |---|---|
//! | [`clock`] | the interrupt time, which continues during sleep |
//! | [`event`] | events, and one wait for handles, cancellation and time |
//! | [`fd`] | handles by the names of descriptors |
//! | [`files`] | the identity of files, by volume and id; files that are being deleted |
//! | [`flock`] | `LockFileEx` on a byte that no file reaches |
//! | [`known_folder`] | the directories for application data, as the shell knows them |
//! | [`fork`] | nothing: there is no fork |
//! | [`mutex`] | named mutexes |
//! | [`process`] | pid and creation time |
//! | [`security`] | the user of this process, and the access that it gives to others |

pub(crate) mod clock;
pub(crate) mod event;
pub(crate) mod fd;
pub(crate) mod files;
pub(crate) mod flock;
pub(crate) mod fork;
pub(crate) mod known_folder;
pub(crate) mod mutex;
pub(crate) mod process;
pub(crate) mod security;

use std::time::Duration;

/// Ticks of 100 ns, in which Windows counts time.
const TICKS: u64 = 10_000_000;

fn span(ticks: u64) -> Duration {
    Duration::new(ticks / TICKS, (ticks % TICKS) as u32 * 100)
}

/// Converts text to Windows's encoding, with a zero at the end.
fn wide(text: &str) -> Vec<u16> {
    text.encode_utf16().chain([0]).collect()
}
