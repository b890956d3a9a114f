//! The kernel's information about locked files, on every system: none outside Linux.

use std::cell::RefCell;
use std::collections::HashMap;
#[cfg(target_os = "linux")]
use std::{fs::File, io};

use lockkit::Owner;
#[cfg(target_os = "linux")]
pub(crate) use lockkit::proc_locks::{FileLocks, LockHolders, LocksOnFile};

#[cfg(not(target_os = "linux"))]
pub(crate) use absent::{FileLocks, LockHolders, LocksOnFile};

/// Looks up processes, each pid once: many locks may have one holder.
#[derive(Default)]
pub(crate) struct Owners(RefCell<HashMap<u32, Option<Owner>>>);

impl Owners {
    /// Returns the process with this pid, or `None` if it has ended.
    pub(crate) fn of(&self, pid: u32) -> Option<Owner> {
        self.0
            .borrow_mut()
            .entry(pid)
            .or_insert_with(|| Owner::of(pid))
            .clone()
    }
}

/// Returns whether a process has an fcntl lock on any byte of the file, with its pid if the kernel
/// reports it, which it does only for a lock of a process. Locks nothing.
///
/// # Errors
/// Fails if the file system has no such locks.
#[cfg(target_os = "linux")]
pub(crate) fn fcntl_holder(file: &File) -> io::Result<Option<Option<u32>>> {
    use nix::errno::Errno;
    use nix::fcntl::{FcntlArg, fcntl};

    // A write lock on the whole file conflicts with every lock. The pid must be 0 for this command.
    let mut lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    loop {
        match fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)) {
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let is_locked = lock.l_type != libc::F_UNLCK as libc::c_short;
    Ok(is_locked.then(|| u32::try_from(lock.l_pid).ok().filter(|pid| *pid != 0)))
}

/// The same names for systems whose kernel has no such lists.
#[cfg(not(target_os = "linux"))]
mod absent {
    use std::io;
    use std::path::{Path, PathBuf};

    pub(crate) struct LockHolders {
        pub(crate) pids: Vec<u32>,
        pub(crate) waiters: u32,
    }

    #[derive(Default)]
    pub(crate) struct LocksOnFile {
        pub(crate) flock: Option<LockHolders>,
        pub(crate) fcntl: Option<LockHolders>,
    }

    pub(crate) struct FileLocks;

    impl FileLocks {
        pub(crate) fn read() -> Self {
            Self
        }

        pub(crate) fn read_table() -> Self {
            Self
        }

        pub(crate) fn table_error(&self) -> Option<&io::Error> {
            None
        }

        pub(crate) fn files(&self) -> impl Iterator<Item = (&Path, LocksOnFile)> {
            std::iter::empty()
        }

        pub(crate) fn open_files(&self) -> &[PathBuf] {
            &[]
        }

        pub(crate) fn on(&self, path: &Path) -> io::Result<LocksOnFile> {
            std::fs::metadata(path).map(|_| LocksOnFile::default())
        }
    }
}
