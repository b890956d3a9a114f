//! The kernel's information about locked files, on every system: none outside Linux.

#[cfg(target_os = "linux")]
pub(crate) use lockkit::command::{FileLocks, Locked, OnFile};

#[cfg(not(target_os = "linux"))]
pub(crate) use absent::{FileLocks, Locked, OnFile};

/// The same names for systems whose kernel has no such lists.
#[cfg(not(target_os = "linux"))]
mod absent {
    use std::io;
    use std::path::{Path, PathBuf};

    pub(crate) struct Locked {
        pub(crate) pids: Vec<u32>,
        pub(crate) waiters: u32,
    }

    #[derive(Default)]
    pub(crate) struct OnFile {
        pub(crate) flock: Option<Locked>,
        pub(crate) fcntl: Option<Locked>,
    }

    pub(crate) struct FileLocks;

    impl FileLocks {
        pub(crate) fn read(_: &str) -> Self {
            Self
        }

        pub(crate) fn of_table() -> Self {
            Self
        }

        pub(crate) fn unread(&self) -> Option<&io::Error> {
            None
        }

        pub(crate) fn files(&self) -> impl Iterator<Item = (&Path, OnFile)> {
            std::iter::empty()
        }

        pub(crate) fn open(&self) -> &[PathBuf] {
            &[]
        }

        pub(crate) fn owner(&self, pid: u32) -> Option<lockkit::Owner> {
            lockkit::Owner::of(pid)
        }

        pub(crate) fn on(&self, path: &Path) -> io::Result<OnFile> {
            std::fs::metadata(path).map(|_| OnFile::default())
        }
    }
}
