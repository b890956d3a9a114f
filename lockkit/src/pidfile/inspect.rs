//! The state of a pidfile, for programs that do not acquire it.

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind as Io};
use std::path::Path;
use std::time::Duration;

use super::verdict::{self, Verdict};
use crate::base::error::{Error, Result};
use crate::base::owner::Owner;
use crate::sys::files::{self, OpenOptionsExt};
use crate::sys::fork::ForkGuarded;

/// The state of a pidfile; see [`PidFile::inspect`](crate::PidFile::inspect).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PidStatus {
    /// There is no file.
    Absent,
    /// It names a process that lives, that may live, or that has the file locked. For a file that
    /// another program wrote, the owner's `acquired` is the time of that write.
    Running(Owner),
    /// A process has it locked, and neither the file nor the system identifies that process.
    Locked,
    /// It names only processes that are proven dead, though a later process may have the pid. This
    /// is the first of them. The next acquisition takes the file over.
    Stale(Owner),
    /// It is blank. An acquisition takes it over when it is 2 s old: until then a program may be
    /// about to write it. A line end alone is what lockkit leaves in a file that it cannot remove,
    /// and is taken over at once.
    Blank {
        /// The time since its last write, by the wall clock; zero for a time in the future.
        age: Duration,
        /// Whether an acquisition would take it over now.
        is_free: bool,
    },
    /// It contains something other than a pid. No acquisition changes it.
    Invalid {
        /// The rule of pidfiles that it violates.
        rule: &'static str,
    },
}

/// Returns the state of the file at `path`, which is absolute.
pub(super) fn inspect(path: &Path) -> Result<PidStatus> {
    let failed = |error| Error::io("read", path, error);
    let open = || {
        // The check comes first, because the open of a FIFO or a device may have effects.
        if !fs::metadata(path)?.is_file() {
            return Err(not_a_plain_file());
        }
        ForkGuarded::new(|| {
            files::open(
                OpenOptions::new().read(true).custom_flags(files::NONBLOCK),
                path,
            )
        })
    };
    let file = match open() {
        Err(error) if error.kind() == Io::NotFound => {
            // Some programs keep the pid in the target of such a link.
            if path.is_symlink() {
                return Err(failed(io::Error::new(
                    Io::NotFound,
                    "it is a symbolic link to a file that does not exist",
                )));
            }
            return Ok(PidStatus::Absent);
        }
        opened => opened.map_err(failed)?,
    };
    let (verdict, _) = verdict::judge(path, &file).map_err(failed)?;
    Ok(match verdict {
        Verdict::Held {
            owner: Some(owner), ..
        }
        | Verdict::Own(owner) => PidStatus::Running(owner),
        Verdict::Held { owner: None, .. } => PidStatus::Locked,
        Verdict::Stale(owner) => PidStatus::Stale(owner),
        Verdict::Blank { age, is_young } => PidStatus::Blank {
            age,
            is_free: !is_young,
        },
        Verdict::Other(rule) => PidStatus::Invalid { rule },
    })
}

pub(super) fn not_a_plain_file() -> io::Error {
    io::Error::new(Io::InvalidInput, "it is no plain file")
}
