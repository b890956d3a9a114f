//! Judges whether a pidfile is held. Acquisitions, [`PidFile::inspect`] and removals share this code.
//!
//! | the file | verdict |
//! |---|---|
//! | a process has the write lock | held |
//! | it has an identity that counts ([`record`]) | held while its owner lives; an owner of another pid namespace of this boot, which had the write lock for life, is gone; any other owner that cannot be looked up may live |
//! | it contains pids of other programs | held while one of them lives that did not start after the file was written |
//! | it contains a pid and the name of another host | held: this host cannot tell |
//! | it names this very process, and no other live process | free: it is from before an exec, or from a supervisor |
//! | it is blank | held for [`YOUNG`], because a program may be about to write; then free. One line end is free at once |
//! | it contains anything else | no pidfile |
//!
//! A flock of a trusted process counts on a blank file, and on a file that names only dead processes of other programs:
//! the file is held. The reason: pidfile(3) of BSD creates and locks the file long before it writes the
//! pid, and children keep the lock.
//!
//! The write lock is checked before the content. It is only ever taken on a new file, so once it is seen free, no owner
//! of lockkit's changes the file any more.
//!
//! [`PidFile::inspect`]: super::PidFile::inspect

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::record::{self, Content};
use crate::base::owner::{Liveness, Owner};
use crate::file_lock::beginning;
use crate::sys::files::{self, Seen};
use crate::sys::process::{self, Probe};
use crate::sys::{tmpfile, write_lock, xattr};

/// For this long after its last write, a blank file may be about to be written.
const YOUNG: Duration = Duration::from_secs(2);

/// A pid counts as reused if its process started at least this long after the last write of the file. The two times
/// come from different clocks, and one of these clocks is set from time to time.
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
        young: bool,
    },
    /// It is no pidfile. The value is the rule that it violates.
    Other(&'static str),
}

/// Judges the open file, which `path` named a moment ago. Also returns its content.
pub(super) fn judge(path: &Path, file: &File) -> io::Result<(Verdict, Vec<u8>)> {
    let lock = write_lock::holder(file)?;
    let bytes = read_settled(file)?;
    let seen = files::look(file)?;
    let verdict = match record::parse(&bytes) {
        content if lock.is_some() => {
            let owner = owner_of_locked(lock.unwrap_or_default(), &content, file, &seen)?;
            Verdict::Held { owner, by_lock: true }
        }
        Content::Other(rule) => Verdict::Other(rule),
        Content::Blank => match flock_holder(path, file, &seen)? {
            Some(owner) => Verdict::Held { owner, by_lock: false },
            None => Verdict::Blank {
                age: age(&seen).unwrap_or_default(),
                young: bytes != record::BLANK.as_bytes() && is_young(&seen),
            },
        },
        Content::Pids { pids, alone, elsewhere } => {
            let identity = if alone { identity(file, pids[0], &seen)? } else { None };
            match (identity, elsewhere) {
                (Some(owner), _) => of_owner(owner),
                (None, Some(host)) => {
                    let owner = Owner { host: Some(host), ..Owner::unknown(pids[0]) };
                    Verdict::Held { owner: Some(writer(owner, &seen)), by_lock: false }
                }
                (None, None) => of_program(&pids, path, file, &seen)?,
            }
        }
    };
    Ok((verdict, bytes))
}

/// Judges a file with an identity and without a write lock. An owner that has executed another program (exec), or has
/// closed its descriptors, has lost the lock and holds the file all the same.
fn of_owner(owner: Owner) -> Verdict {
    if owner.is_this_process() {
        return Verdict::Own(owner);
    }
    match owner.liveness_by_name() {
        Liveness::Dead => Verdict::Stale(owner),
        // Such an owner had the write lock on this kernel, and the lock is free: a container was killed.
        Liveness::Unknown if owner.is_of_another_namespace() => Verdict::Stale(owner),
        Liveness::Alive | Liveness::Unknown => Verdict::Held { owner: Some(shown(owner)), by_lock: false },
    }
}

/// Judges a file that names processes by their pids alone.
fn of_program(pids: &[u32], path: &Path, file: &File, seen: &Seen) -> io::Result<Verdict> {
    let me = std::process::id();
    let others = pids.iter().filter(|pid| **pid != me);
    if let Some(owner) = others.filter_map(|pid| living(*pid, file, seen)).next() {
        return Ok(Verdict::Held { owner: Some(writer(owner, seen)), by_lock: false });
    }
    if pids.contains(&me) {
        return Ok(Verdict::Own(writer(Owner::current(), seen)));
    }
    Ok(match flock_holder(path, file, seen)? {
        Some(owner) => Verdict::Held { owner, by_lock: false },
        None => Verdict::Stale(writer(Owner::ended(pids[0]), seen)),
    })
}

/// Returns the holder of a write-locked file. The process `pid` has the lock; the kernel may not name the process.
fn owner_of_locked(pid: u32, content: &Content, file: &File, seen: &Seen) -> io::Result<Option<Owner>> {
    if let Content::Pids { pids, alone, .. } = content {
        let identity = if *alone { identity(file, pids[0], seen)? } else { None };
        if let Some(owner) = identity {
            return Ok(Some(shown(owner)));
        }
        if let Some(owner) = pids.iter().find_map(|pid| Owner::of(*pid)) {
            return Ok(Some(writer(owner, seen)));
        }
    }
    Ok(Owner::of(pid))
}

/// Returns the owner from the attribute of a file that contains `pid`.
pub(super) fn identity(file: &File, pid: u32, seen: &Seen) -> io::Result<Option<Owner>> {
    let mut room = [0; record::MAX_IDENTITY];
    let Some(bytes) = xattr::get(file, record::NAME, &mut room)? else { return Ok(None) };
    Ok(seen.modified().ok().and_then(|written| record::read_identity(bytes, pid, written)))
}

/// Returns the owner, with the whole name of its program while it lives.
fn shown(mut owner: Owner) -> Owner {
    if record::is_program_cut(&owner) && owner.liveness_by_name() == Liveness::Alive {
        owner.program = process::program(owner.pid).or(owner.program);
    }
    owner
}

/// Returns the time since the last write of the file, and `None` for a time in the future.
fn age(seen: &Seen) -> Option<Duration> {
    SystemTime::now().duration_since(seen.modified().ok()?).ok()
}

/// Returns whether the file was written less than [`YOUNG`] ago. A file server's clock may be ahead of this one by the
/// same time. A time further in the future is a fault of a clock, and does not count.
fn is_young(seen: &Seen) -> bool {
    let Ok(written) = seen.modified() else { return false };
    let apart = SystemTime::now().duration_since(written).unwrap_or_else(|ahead| ahead.duration());
    apart < YOUNG
}

/// Returns the process that another program's file names, if the file may have been written for it.
pub(super) fn living(pid: u32, file: &File, seen: &Seen) -> Option<Owner> {
    let start = match process::probe(pid) {
        Probe::Gone | Probe::Ended => return None,
        Probe::Running(start) => start,
    };
    let is_later = start.is_some_and(|start| started_later(start, file, seen).unwrap_or(false));
    (!is_later).then(|| Owner::read(pid, start))
}

/// Returns whether a process with this start time is later than the file, as far as the clocks show.
fn started_later(start: u64, file: &File, seen: &Seen) -> Option<bool> {
    let written = seen.modified().ok()?;
    // No file in memory is older than the boot: the clock was set forward since, and proves nothing.
    let clock_was_set = written < process::booted_at()? && tmpfile::is_in_memory(file);
    Some(!clock_was_set && process::started_at(start)? > written.checked_add(REUSE_MARGIN)?)
}

/// Returns the owner of a file that another program wrote. Its time of acquisition is that of the write.
fn writer(owner: Owner, seen: &Seen) -> Owner {
    Owner { acquired: seen.modified().ok(), ..owner }
}

/// Returns the beginning of a file, up to a byte more than [`record::MAX_LENGTH`].
pub(super) fn read(file: &File) -> io::Result<Vec<u8>> {
    beginning(file, record::MAX_LENGTH + 1)
}

/// Reads like [`read`], until two reads are equal: not every file system makes a read and a write atomic.
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

/// Returns the process that has a flock on another program's file, if it is trusted: root's, this user's, or the
/// file owner's. Any other user with read permission can lock the file, so that lock is ignored. `Some(None)` is
/// a process that cannot be looked up, and that may be trusted.
#[cfg(target_os = "linux")]
fn flock_holder(path: &Path, file: &File, seen: &Seen) -> io::Result<Option<Option<Owner>>> {
    use crate::sys::files::MetadataExt;
    use crate::sys::flock::{self, Mode};
    use crate::sys::proc_locks::FileLocks;

    // The kernel's table has no locks of processes that a pid namespace hides.
    let sees_all = process::pid_namespace().is_some_and(process::is_of_the_host);
    let shown = |locks: &FileLocks| match locks.on(path) {
        // The file was removed just now.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        on => on.map(|on| on.flock),
    };
    let table = FileLocks::read_table();
    if sees_all && table.table_error().is_none() && shown(&table)?.is_none() {
        return Ok(None);
    }
    // A try disturbs a program that takes the lock at this moment, so it comes last.
    match flock::try_lock(file, Mode::Shared) {
        Ok(true) => return flock::unlock(file).map(|()| None),
        Ok(false) => {}
        Err(error) if flock::is_unsupported(&error) => return Ok(None),
        Err(error) => return Err(error),
    }
    let me = rustix::process::geteuid().as_raw();
    let is_trusted = |uid: u32| [0, me, seen.uid()].contains(&uid);
    let pids = shown(&FileLocks::read())?.map(|locked| locked.pids).unwrap_or_default();
    // A process that ends meanwhile has neither users nor a lock.
    let users: Vec<_> = pids.iter().filter_map(|pid| Some((*pid, process::users(*pid)?))).collect();
    if let Some((pid, _)) = users.iter().find(|(_, users)| users.iter().all(|uid| is_trusted(*uid))) {
        return Ok(Some(Owner::of(*pid)));
    }
    if !users.is_empty() {
        return Ok(None);
    }
    // A user sees its own processes, and root sees all, unless a pid namespace or an option of /proc hides them.
    let has_proc = process::users(std::process::id()).is_some();
    let is_hidden = |pid: &u32| matches!(process::probe(*pid), Probe::Running(_));
    let may_be_hidden = !sees_all || !has_proc || (me != 0 && me != seen.uid()) || pids.iter().any(is_hidden);
    Ok(may_be_hidden.then_some(None))
}

/// Always `None`: the write lock is a flock here.
#[cfg(not(target_os = "linux"))]
fn flock_holder(_: &Path, _: &File, _: &Seen) -> io::Result<Option<Option<Owner>>> {
    Ok(None)
}
