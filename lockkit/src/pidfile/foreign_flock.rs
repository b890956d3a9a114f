//! The flock of another program on a pidfile.

use std::fs::File;
use std::io;
use std::path::Path;

use crate::base::owner::Owner;
use crate::sys::files::{Metadata, MetadataExt};
use crate::sys::flock::{self, Mode};
use crate::sys::proc_locks::FileLocks;
use crate::sys::process::{self, Probe};

/// Returns the process that has a flock on another program's file, if it is trusted: root's, this
/// user's, or the file owner's. Any other user with read permission can lock the file, so that lock
/// is ignored. `Some(None)` is a process that cannot be looked up, and that may be trusted.
pub(super) fn holder(
    path: &Path,
    file: &File,
    found: &Metadata,
) -> io::Result<Option<Option<Owner>>> {
    // The kernel's table has no locks of processes that a pid namespace hides.
    let sees_all = process::pid_namespace().is_some_and(process::is_of_the_host);
    let flock_in = |locks: &FileLocks| match locks.on(path) {
        // The file was removed just now.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        on => on.map(|on| on.flock),
    };
    let table = FileLocks::read_table();
    if sees_all && table.table_error().is_none() && flock_in(&table)?.is_none() {
        return Ok(None);
    }
    // A try disturbs a program that takes the lock at this moment, so it comes last.
    match flock::try_lock(file, Mode::Shared) {
        Ok(true) => return flock::unlock(file).map(|()| None),
        Ok(false) => {}
        Err(error) if flock::is_unsupported(&error) => return Ok(None),
        Err(error) => return Err(error),
    }
    let user = rustix::process::geteuid().as_raw();
    let is_trusted = |uid: u32| [0, user, found.uid()].contains(&uid);
    let pids = flock_in(&FileLocks::read())?
        .map(|locked| locked.pids)
        .unwrap_or_default();
    // A process that ends meanwhile has neither users nor a lock.
    let users: Vec<_> = pids
        .iter()
        .filter_map(|pid| Some((*pid, process::users(*pid)?)))
        .collect();
    if let Some((pid, _)) = users
        .iter()
        .find(|(_, users)| users.iter().all(|uid| is_trusted(*uid)))
    {
        return Ok(Some(Owner::of(*pid)));
    }
    if !users.is_empty() {
        return Ok(None);
    }
    // A user sees its own processes, and root sees all, unless a pid namespace or an option of
    // /proc hides them.
    let has_proc = process::users(std::process::id()).is_some();
    let is_hidden = |pid: &u32| matches!(process::probe(*pid), Probe::Running(_));
    let may_be_hidden =
        !sees_all || !has_proc || (user != 0 && user != found.uid()) || pids.iter().any(is_hidden);
    Ok(may_be_hidden.then_some(None))
}
