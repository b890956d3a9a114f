//! `lockkit table`: tables of numbered locks, in shared memory or in a directory.

use std::collections::BTreeMap;
use std::io::BufRead;
use std::path::{Path, PathBuf};

use lockkit::{FileLockManager, LockManager, ShmLockManager};

use crate::failure::{Failure, Outcome, code};
use crate::lease::confirmed;
use crate::locks::FileLocks;
use crate::report;
use crate::status::Form;
use crate::target::Target;

/// Creates tables of numbered locks, and allocates their numbers.
#[derive(clap::Subcommand)]
#[command(after_help = "\
Examples:
  lockkit table create /dev/shm/app.locks --capacity 2048
  id=$(lockkit table allocate /dev/shm/app.locks)
  lockkit table free /dev/shm/app.locks \"$id\"")]
pub(crate) enum Table {
    /// Creates a table at a path that does not exist.
    #[command(after_help = "Example: lockkit table create /dev/shm/app.locks --capacity 2048")]
    Create {
        /// The path of the table, preferably in a file system in memory.
        path: PathBuf,
        /// The number of locks in the table.
        #[arg(long, value_name = "N", default_value_t = 2048)]
        capacity: u32,
        /// Creates a directory with a file for each lock, instead of shared memory. It has no
        /// capacity.
        #[arg(long, conflicts_with = "capacity")]
        directory: bool,
    },
    /// Shows the holders of the locks, and how many locks are left to allocate.
    #[command(after_help = "Example: lockkit table list /dev/shm/app.locks --json")]
    List {
        /// The table.
        path: PathBuf,
        /// Writes JSON: {"version":1,"lock":{…}}; see docs/CLI.md.
        #[arg(long)]
        json: bool,
    },
    /// Allocates a lock, and prints its number.
    #[command(after_help = "Example: id=$(lockkit table allocate /dev/shm/app.locks)")]
    Allocate {
        /// The table.
        path: PathBuf,
        /// The number of the lock to allocate. It must be free.
        #[arg(long, value_name = "ID")]
        at: Option<u32>,
    },
    /// Frees numbers, so that they can be allocated again.
    #[command(after_help = "Example: lockkit table free /dev/shm/app.locks 17 18")]
    Free {
        /// The table.
        path: PathBuf,
        /// The numbers.
        #[arg(required_unless_present = "all", value_name = "ID")]
        ids: Vec<u32>,
        /// Frees all numbers. A program that still uses an old number then shares it with the next
        /// program that gets it.
        #[arg(long, conflicts_with = "ids")]
        all: bool,
        /// Frees all numbers without asking for a confirmation.
        #[arg(long, short)]
        yes: bool,
    },
    /// Frees all locks, and gives each number that is in use a new one.
    ///
    /// This repairs a table whose numbers were given out twice, or were not freed by programs that
    /// have ended. The command reads the numbers in use, one for each object that has a lock, from
    /// the arguments or the standard input. It prints each with its new number. A number that
    /// appears twice gets two new numbers. No program may use the table meanwhile: the command
    /// fails while a lock is held.
    #[command(after_help = "Example: lockkit table renumber /dev/shm/app.locks --yes 17 18 18")]
    Renumber {
        /// The table.
        path: PathBuf,
        /// The numbers in use. Without numbers, the command reads them from the standard input.
        #[arg(value_name = "ID")]
        ids: Vec<u32>,
        /// Does not ask for a confirmation.
        #[arg(long, short)]
        yes: bool,
    },
}

fn open(path: &Path) -> Result<Box<dyn LockManager>, Failure> {
    let example = |error: lockkit::Error| {
        Failure::from(error).example(format!(
            "lockkit table create {} --capacity 2048",
            path.display()
        ))
    };
    Ok(match path.is_dir() {
        true => Box::new(FileLockManager::open(path).map_err(example)?),
        false => Box::new(ShmLockManager::open(path).map_err(example)?),
    })
}

impl Table {
    pub(crate) fn carry_out(self) -> Outcome {
        match self {
            Self::Create {
                path,
                directory: true,
                ..
            } => {
                FileLockManager::create(path)?;
                Ok(code::OK)
            }
            Self::Create {
                path,
                capacity,
                directory: false,
            } => {
                ShmLockManager::create(path, capacity)?;
                Ok(code::OK)
            }
            Self::List { path, json } => list(path, json),
            Self::Allocate { path, at } => {
                let table = open(&path)?;
                let lock = match at {
                    Some(id) => table.allocate_at(id)?,
                    None => table.allocate()?,
                };
                // A number that was not printed is freed again.
                report::say(|out| writeln!(out, "{}", lock.id()))
                    .inspect_err(|_| drop(lock.free()))?;
                Ok(code::OK)
            }
            Self::Free {
                path,
                all: true,
                yes,
                ..
            } => {
                let table = open(&path)?;
                agreed(yes, &format!("Free all locks of {}?", path.display()))?;
                table.free_all()?;
                Ok(code::OK)
            }
            Self::Free { path, ids, .. } => {
                let table = open(&path)?;
                for id in ids {
                    table.retrieve(id)?.free()?;
                }
                Ok(code::OK)
            }
            Self::Renumber { path, ids, yes } => renumber(&path, ids, yes),
        }
    }
}

fn list(path: PathBuf, json: bool) -> Outcome {
    // Distinguishes a file that is no table from a locked file.
    drop(open(&path)?);
    let report = report::at(&Target::Path(path), Default::default(), FileLocks::read)?;
    match json {
        true => report::json(&Form {
            version: report::VERSION,
            lock: &report,
        })?,
        false => report::say(|mut out| report.show(&mut out))?,
    }
    Ok(code::OK)
}

fn agreed(yes: bool, question: &str) -> Result<(), Failure> {
    match yes || confirmed(question)? {
        true => Ok(()),
        false => Err(Failure::new(code::TEMPORARY, "the table was left as it is")),
    }
}

fn renumber(path: &Path, mut ids: Vec<u32>, yes: bool) -> Outcome {
    let table = open(path)?;
    if ids.is_empty() {
        ids = read_ids()?;
    }
    if let Some(held) = table.held()?.first() {
        let message = format!(
            "lock {} of {} is held by {}",
            held.id(),
            path.display(),
            held.owner().describe()
        );
        return Err(Failure::new(code::TEMPORARY, message));
    }
    check_capacity(path, ids.len())?;
    agreed(
        yes,
        &format!(
            "Free all locks of {}, and give {} numbers anew?",
            path.display(),
            ids.len()
        ),
    )?;
    table.free_all()?;
    let renumbered = allocate_all(&*table, ids)?;
    // Printed only now: a reader that stops reading ends this command, which must not happen
    // halfway.
    report::say(|out| {
        renumbered
            .iter()
            .try_for_each(|(id, new)| writeln!(out, "{id} {new}"))
    })?;
    Ok(code::OK)
}

fn read_ids() -> Result<Vec<u32>, Failure> {
    let mut ids = Vec::new();
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|error| Failure::io("read the numbers", error))?;
        let wrong = |_| {
            Failure::usage(format!("{line:?} is no number of a lock"))
                .example("echo 17 | lockkit …")
        };
        ids.extend(
            line.split_whitespace()
                .map(|id| id.parse().map_err(wrong))
                .collect::<Result<Vec<u32>, _>>()?,
        );
    }
    Ok(ids)
}

/// Checks before any lock is freed that the table has room. Halfway through, the old numbers would
/// be gone and the new ones not yet printed.
fn check_capacity(path: &Path, count: usize) -> Result<(), Failure> {
    if path.is_dir() {
        return Ok(());
    }
    let capacity = ShmLockManager::open(path)?.capacity();
    if count > capacity as usize {
        let message = format!(
            "{} has room for {capacity} locks, and {count} were given",
            path.display()
        );
        let example = format!(
            "lockkit table create {}.new --capacity {count}",
            path.display()
        );
        return Err(Failure::new(code::UNAVAILABLE, message).example(example));
    }
    Ok(())
}

/// Allocates a number for each use. Returns each number with its new one. The first use of a number
/// keeps it. Further uses get new numbers afterwards, so that none of them takes a kept number.
fn allocate_all(table: &dyn LockManager, ids: Vec<u32>) -> Result<Vec<(u32, u32)>, Failure> {
    let mut kept: BTreeMap<u32, bool> = ids.iter().map(|id| (*id, false)).collect();
    for (id, is_kept) in &mut kept {
        // A number beyond the end of a new table is replaced.
        *is_kept = table.allocate_at(*id).is_ok();
    }
    let mut renumbered = Vec::with_capacity(ids.len());
    for id in ids {
        let is_first = kept.insert(id, false) == Some(true);
        renumbered.push((id, if is_first { id } else { table.allocate()?.id() }));
    }
    Ok(renumbered)
}
