//! The tables under test.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::path::PathBuf;
use std::sync::Mutex;

use lockkit::{FileLockManager, InMemoryLockManager, LockManager, ShmLockManager};

use crate::wine::is_wine;

/// A kind of table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// [`ShmLockManager`]
    Shm,
    /// [`FileLockManager`]
    Directory,
    /// [`InMemoryLockManager`]
    Memory,
}

/// The number of locks of a table under test, where it has a limit.
pub const CAPACITY: u32 = 128;

impl Kind {
    /// Creates a table that no other test uses.
    pub fn fresh(self) -> Table {
        let name = crate::fresh_name("lockkit-table");
        let at = match self {
            Self::Shm => format!("/dev/shm/{name}"),
            Self::Directory => std::env::temp_dir().join(name).display().to_string(),
            Self::Memory => name,
        };
        Table { kind: self, at }
    }

    pub(super) fn is_limited(self) -> bool {
        self != Self::Directory
    }
}

/// One table, as text: `KIND:WHERE`.
#[derive(Clone, Debug)]
pub struct Table {
    kind: Kind,
    at: String,
}

impl Table {
    /// Returns the table of `kind` at a path, or with a name.
    pub fn at(kind: Kind, at: &str) -> Self {
        Self {
            kind,
            at: at.to_owned(),
        }
    }

    /// Parses the output of `Display`.
    pub fn parse(text: &str) -> Self {
        let (kind, at) = text.split_once(':').expect("KIND:WHERE");
        let kind = [Kind::Shm, Kind::Directory, Kind::Memory]
            .into_iter()
            .find(|known| format!("{known:?}") == kind);
        Self {
            kind: kind.expect("a known kind"),
            at: at.to_owned(),
        }
    }

    /// Returns its path.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(&self.at)
    }

    /// Returns its path or name, as text.
    pub fn name(&self) -> &str {
        &self.at
    }

    /// Opens a manager of the table. The first call creates the table.
    pub fn open(&self) -> Box<dyn LockManager> {
        self.open_with(CAPACITY)
    }

    /// Opens a manager of the table. The first call creates the table with `capacity`.
    pub fn open_with(&self, capacity: u32) -> Box<dyn LockManager> {
        self.try_open(capacity).expect("a table")
    }

    /// As [`open_with`](Self::open_with), for cases in which it may fail.
    pub fn try_open(&self, capacity: u32) -> lockkit::Result<Box<dyn LockManager>> {
        static IN_MEMORY: Mutex<Option<HashMap<String, InMemoryLockManager>>> = Mutex::new(None);
        Ok(match self.kind {
            Kind::Shm => Box::new(ShmLockManager::open_or_create(&self.at, capacity)?),
            Kind::Directory => Box::new(
                FileLockManager::create(&self.at).or_else(|_| FileLockManager::open(&self.at))?,
            ),
            Kind::Memory => {
                let mut tables = IN_MEMORY.lock().expect("no panic inside");
                let tables = tables.get_or_insert_default();
                let new = InMemoryLockManager::new(capacity)?;
                Box::new(tables.entry(self.at.clone()).or_insert(new).clone())
            }
        })
    }

    /// Removes the remaining files. The caller calls it when no process uses the table any more.
    pub fn clean(&self) {
        let _ = match self.kind {
            Kind::Shm => std::fs::remove_file(&self.at),
            Kind::Directory => std::fs::remove_dir_all(&self.at),
            Kind::Memory => Ok(()),
        };
    }

    /// Returns whether the locks have no files, for a directory. Under Wine a file that is deleted
    /// while it is open keeps its name, so the check is impossible there.
    pub fn has_no_lock_files(&self) -> bool {
        is_wine() || self.lock_files().is_empty()
    }

    /// Returns the files of the locks, for a directory.
    pub fn lock_files(&self) -> BTreeSet<String> {
        let names = std::fs::read_dir(&self.at)
            .expect("a directory")
            .map(|entry| entry.expect("an entry").file_name());
        names
            .map(|name| name.into_string().expect("text"))
            .filter(|name| name.ends_with(".lock"))
            .collect()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}:{}", self.kind, self.at)
    }
}
