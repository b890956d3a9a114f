//! Judges whether a pidfile is held. Acquisitions, [`PidFile::inspect`] and removals share this
//! code.
//!
//! | the file | verdict |
//! |---|---|
//! | a process has the write lock | held |
//! | it has an identity that counts ([`record`]) | held while its owner lives; an owner of another pid namespace of this boot, which had the write lock for life, is gone; any other owner that cannot be looked up may live |
//! | it contains pids of other programs | held while one of them lives that did not start after the file was written |
//! | it contains a pid and the name of another host | held: this host cannot tell |
//! | it names this very process, and no other live process | free: it is from before an exec, or from a supervisor |
//! | it is blank | held for [`BLANK_GRACE_PERIOD`], because a program may be about to write; then free. One line end is free at once |
//! | it contains anything else | no pidfile |
//!
//! A flock of a trusted process counts on a blank file, and on a file that names only dead
//! processes of other programs: the file is held. The reason: pidfile(3) of BSD creates and locks
//! the file long before it writes the pid, and children keep the lock.
//!
//! The write lock is checked before the content. A holder acquires it only on a new file. So once
//! it is free, no owner of lockkit's changes the file any more.
//!
//! [`PidFile::inspect`]: crate::PidFile::inspect

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::foreign_flock;
use super::record::{self, Content};
use crate::base::owner::{Liveness, Owner};
use crate::sys::files::{self, FileExt, Metadata};
use crate::sys::process::{self, Probe};
use crate::sys::{tmpfile, write_lock, xattr};

/// For this long after its last write, a blank file may be about to be written.
const BLANK_GRACE_PERIOD: Duration = Duration::from_secs(2);

/// A pid counts as reused if its process started at least this long after the last write of the
/// file. The two times come from different clocks, and one of these clocks is set from time to
/// time.
const REUSE_MARGIN: Duration = Duration::from_secs(60);

/// The meaning of a file for a process that wants the lock.
#[derive(Debug)]
pub(super) enum Verdict {
    Held {
        /// The holder, as far as it is known.
        owner: Option<Owner>,
        /// Whether the file is held by the write lock: then the kernel wakes waiters.
        by_lock: bool,
    },
    /// It names only processes that are proven dead. This is the first of them.
    Stale(Owner),
    /// It names this very process.
    Own(Owner),
    Blank {
        /// The time since its last write, by the wall clock.
        age: Duration,
        /// Whether a program may be about to write it.
        is_young: bool,
    },
    /// It is no pidfile. The value is the rule that it violates.
    Other(&'static str),
}

/// Judges the open file, which `path` named a moment ago. Also returns its content.
pub(super) fn judge(path: &Path, file: &File) -> io::Result<(Verdict, Vec<u8>)> {
    let lock = write_lock::holder(file)?;
    let bytes = read_settled(file)?;
    let found = files::metadata_of(file)?;
    let verdict = match record::parse(&bytes) {
        content if lock.is_some() => {
            let owner = owner_of_locked(lock.unwrap_or_default(), &content, file, &found)?;
            Verdict::Held {
                owner,
                by_lock: true,
            }
        }
        Content::Other(rule) => Verdict::Other(rule),
        Content::Blank => match foreign_flock::holder(path, file, &found)? {
            Some(owner) => Verdict::Held {
                owner,
                by_lock: false,
            },
            None => Verdict::Blank {
                age: age(&found).unwrap_or_default(),
                is_young: bytes != record::BLANK.as_bytes() && is_young(&found),
            },
        },
        Content::Pids {
            pids,
            is_single,
            foreign_host,
        } => {
            let identity = if is_single {
                identity(file, pids[0], &found)?
            } else {
                None
            };
            match (identity, foreign_host) {
                (Some(owner), _) => judge_owner(owner),
                (None, Some(host)) => {
                    let owner = Owner {
                        host: Some(host),
                        ..Owner::unknown(pids[0])
                    };
                    Verdict::Held {
                        owner: Some(with_time_of_write(owner, &found)),
                        by_lock: false,
                    }
                }
                (None, None) => judge_pids(&pids, path, file, &found)?,
            }
        }
    };
    Ok((verdict, bytes))
}

/// Judges a file with an identity and without a write lock. An owner that has executed another
/// program (exec), or has closed its descriptors, has lost the lock and holds the file all the
/// same.
fn judge_owner(owner: Owner) -> Verdict {
    if owner.is_this_process() {
        return Verdict::Own(owner);
    }
    match owner.liveness_by_name() {
        Liveness::Dead => Verdict::Stale(owner),
        // Such an owner had the write lock on this kernel, and the lock is free: a container was
        // killed.
        Liveness::Unknown if owner.is_of_another_namespace() => Verdict::Stale(owner),
        Liveness::Alive | Liveness::Unknown => Verdict::Held {
            owner: Some(with_whole_program(owner)),
            by_lock: false,
        },
    }
}

/// Judges a file that names processes by their pids alone.
fn judge_pids(pids: &[u32], path: &Path, file: &File, found: &Metadata) -> io::Result<Verdict> {
    let own = std::process::id();
    let others = pids.iter().filter(|pid| **pid != own);
    if let Some(owner) = others.filter_map(|pid| living(*pid, file, found)).next() {
        return Ok(Verdict::Held {
            owner: Some(with_time_of_write(owner, found)),
            by_lock: false,
        });
    }
    if pids.contains(&own) {
        return Ok(Verdict::Own(with_time_of_write(Owner::current(), found)));
    }
    Ok(match foreign_flock::holder(path, file, found)? {
        Some(owner) => Verdict::Held {
            owner,
            by_lock: false,
        },
        None => Verdict::Stale(with_time_of_write(Owner::ended(pids[0]), found)),
    })
}

/// Returns the holder of a write-locked file. The process `pid` has the lock; the kernel may not
/// name the process.
fn owner_of_locked(
    pid: u32,
    content: &Content,
    file: &File,
    found: &Metadata,
) -> io::Result<Option<Owner>> {
    if let Content::Pids {
        pids, is_single, ..
    } = content
    {
        let identity = if *is_single {
            identity(file, pids[0], found)?
        } else {
            None
        };
        if let Some(owner) = identity {
            return Ok(Some(with_whole_program(owner)));
        }
        if let Some(owner) = pids.iter().find_map(|pid| Owner::of(*pid)) {
            return Ok(Some(with_time_of_write(owner, found)));
        }
    }
    Ok(Owner::of(pid))
}

/// Returns the owner from the attribute of a file that contains `pid`.
pub(super) fn identity(file: &File, pid: u32, found: &Metadata) -> io::Result<Option<Owner>> {
    let mut buffer = [0; record::MAX_IDENTITY];
    let Some(bytes) = xattr::get(file, record::ATTRIBUTE, &mut buffer)? else {
        return Ok(None);
    };
    Ok(found
        .modified()
        .ok()
        .and_then(|written| record::read_identity(bytes, pid, written)))
}

/// Returns the owner, with the whole name of its program while it lives.
fn with_whole_program(mut owner: Owner) -> Owner {
    if record::is_program_cut(&owner) && owner.liveness_by_name() == Liveness::Alive {
        owner.program = process::program(owner.pid).or(owner.program);
    }
    owner
}

/// Returns the time since the last write of the file, and `None` for a time in the future.
fn age(found: &Metadata) -> Option<Duration> {
    SystemTime::now()
        .duration_since(found.modified().ok()?)
        .ok()
}

/// Returns whether the file was written less than [`BLANK_GRACE_PERIOD`] ago. A file server's clock
/// may be ahead of this one by the same time. A time further in the future is a fault of a clock,
/// and does not count.
fn is_young(found: &Metadata) -> bool {
    let Ok(written) = found.modified() else {
        return false;
    };
    let distance = SystemTime::now()
        .duration_since(written)
        .unwrap_or_else(|ahead| ahead.duration());
    distance < BLANK_GRACE_PERIOD
}

/// Returns the process that another program's file names, if the file may have been written for it.
pub(super) fn living(pid: u32, file: &File, found: &Metadata) -> Option<Owner> {
    let start = match process::probe(pid) {
        Probe::Gone | Probe::Ended => return None,
        Probe::Running(start) => start,
    };
    let is_later = start.is_some_and(|start| started_later(start, file, found).unwrap_or(false));
    (!is_later).then(|| Owner::read(pid, start))
}

/// Returns whether a process with this start time is later than the file, as far as the clocks
/// show.
fn started_later(start: u64, file: &File, found: &Metadata) -> Option<bool> {
    let written = found.modified().ok()?;
    // No file in memory is older than the boot: the clock was set forward since, and proves
    // nothing.
    let clock_was_set = written < process::booted_at()? && tmpfile::is_in_memory(file);
    Some(!clock_was_set && process::started_at(start)? > written.checked_add(REUSE_MARGIN)?)
}

/// Returns the owner of a file that another program wrote. Its time of acquisition is that of the
/// write.
fn with_time_of_write(owner: Owner, found: &Metadata) -> Owner {
    Owner {
        acquired: found.modified().ok(),
        ..owner
    }
}

/// Returns the beginning of a file, up to a byte more than [`record::MAX_LENGTH`].
pub(super) fn read(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; record::MAX_LENGTH + 1];
    let mut filled = 0;
    while filled < bytes.len() {
        match file.read_at(&mut bytes[filled..], filled as u64) {
            Ok(0) => break,
            Ok(more) => filled += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}

/// Reads like [`read`], until two reads are equal: not every file system makes a read and a write
/// atomic.
fn read_settled(file: &File) -> io::Result<Vec<u8>> {
    const MAX_READS: u32 = 8;
    let mut bytes = read(file)?;
    for _ in 0..MAX_READS {
        let before = std::mem::replace(&mut bytes, read(file)?);
        if bytes == before {
            break;
        }
    }
    Ok(bytes)
}
