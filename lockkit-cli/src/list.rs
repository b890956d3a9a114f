//! `lockkit list`: every lock that is held, as far as this user may see.
//!
//! Named locks and locked files are found without a path. Pidfiles are found in the system's
//! directories for them. A lease leaves no trace in the kernel while no process accesses it, so
//! `lockkit run` keeps its file open for this. Leases that other programs hold are found by path
//! only. A table in shared memory is open, and locked in its own way, in each process that uses it.
//!
//! The list is one pass over the sockets, over /proc, and over each directory. Locks that were
//! released meanwhile are left out.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use lockkit::{NamedLock, Scope};
use serde::Serialize;

use crate::failure::{Failure, Outcome, code};
use crate::locks::{FileLocks, Owners};
use crate::report::{self, Kind, Report, State};
use crate::style::{TITLE, paint};
#[cfg(target_os = "linux")]
use crate::supervise::KEEPER;
use crate::target;

/// Lists the locks that are held: kind, name, state, waiters and holders.
///
/// The list has the named locks of this user and of the machine, the pidfiles in /run, and the
/// tables in /dev/shm. Of the processes of this user, or of all users for root, it has the files
/// locked by flock(2) or fcntl(2), the leases under which lockkit runs programs, and the tables in
/// use in shared memory. Other locks, such as the leases of other programs, are found only in the
/// given files and directories.
///
/// For a given directory the list also has stale locks, and shows files that this user may not read
/// as unknown. A given file is listed in any state. The exit code is 77 if a given file or
/// directory may not be read.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  lockkit list
  lockkit list /srv/shared             Also lists the locks in this directory.
  lockkit list --json | jq -r '.locks[] | select(.kind == \"named\") | .name'")]
pub(crate) struct List {
    /// Files to list in any state, and directories to search for leases, pidfiles and tables.
    paths: Vec<PathBuf>,
    /// Writes JSON: {"version":1,"locks":[…]}; see docs/CLI.md.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Form<'l> {
    version: u32,
    locks: &'l [Report],
}

/// The results by path, and by kind if a file has locks of two kinds. The path is text: comparing
/// paths part by part is slow.
#[derive(Default)]
struct Found(BTreeMap<(OsString, Kind), Report>);

impl Found {
    fn add(&mut self, path: &Path, sight: Report) {
        self.0.insert((path.into(), sight.kind), sight);
    }

    fn has(&self, path: &Path) -> bool {
        self.0
            .range((path.into(), Kind::Named)..)
            .next()
            .is_some_and(|((found, _), _)| found == path.as_os_str())
    }

    /// Adds the lock at an entry of a directory. Files that are no lock, and free locks, are left
    /// out.
    fn add_entry(&mut self, path: &Path, locks: &FileLocks) {
        match report::recognised(path, locks, false) {
            Ok(Some(sight)) if sight.state != State::Free => self.add(path, sight),
            Ok(_) => {}
            // The file is gone, or is a link that leads nowhere.
            Err(failure) if failure.code() == code::NO_INPUT => {}
            // A file with the name of a pidfile and other content.
            Err(failure) if failure.code() == code::DATA && report::has_pid_extension(path) => {}
            // Its lock is known already.
            Err(_) if self.has(path) => {}
            Err(failure) => self.add(path, Report::unknown(path, &failure)),
        }
    }
}

impl List {
    pub(crate) fn carry_out(self) -> Outcome {
        let mut locks = Vec::new();
        for scope in [Scope::User, Scope::Machine] {
            locks.extend(NamedLock::held(scope)?.iter().filter_map(report::of_held));
        }
        let (found, failures) = self.by_path();
        locks.extend(found.0.into_values());
        match self.json {
            true => report::json(&Form {
                version: report::VERSION,
                locks: &locks,
            })?,
            false => show(&locks)?,
        }
        let mut failures = failures.into_iter();
        let last = failures.next_back();
        failures.for_each(|failure| failure.show());
        last.map_or(Ok(code::OK), Err)
    }

    /// Returns the locks at paths, and the failures for some of the given paths.
    fn by_path(&self) -> (Found, Vec<Failure>) {
        let locks = file_locks();
        let (mut found, mut failures, owners) = (Found::default(), Vec::new(), Owners::default());
        for (path, on) in locks.files().filter(|(path, _)| !is_own(path)) {
            match report::recognised(path, &locks, true) {
                Ok(Some(sight)) if sight.state == State::Held => found.add(path, sight),
                // Every process locks them briefly while it reads or writes them.
                Ok(Some(Report {
                    kind: Kind::Lease | Kind::Table,
                    ..
                })) => {}
                _ => report::locked(path, &on, &owners).for_each(|sight| found.add(path, sight)),
            }
        }
        let usual = usual_directories()
            .into_iter()
            .flat_map(|directory| entries(&directory).unwrap_or_default());
        for path in usual
            .filter(|path| is_usual(path))
            .chain(locks.open_files().iter().cloned())
        {
            match report::recognised(&path, &locks, false) {
                Ok(Some(sight)) if sight.state == State::Held => found.add(&path, sight),
                _ => {}
            }
        }
        for given in &self.paths {
            if let Err(failure) = add_given(given, &locks, &mut found) {
                failures.push(failure);
            }
        }
        (found, failures)
    }
}

fn add_given(given: &Path, locks: &FileLocks, found: &mut Found) -> Result<(), Failure> {
    let given = target::absolute(given)?;
    match report::at_path(&given, locks) {
        // A directory is listed; its own lock is known already.
        Ok(sight) if sight.kind == Kind::File && given.is_dir() => {
            let paths = entries(&given)
                .map_err(|error| Failure::io(format!("list {}", given.display()), error))?;
            paths.iter().for_each(|path| found.add_entry(path, locks));
            Ok(())
        }
        Ok(sight) => {
            found.add(&given, sight);
            Ok(())
        }
        Err(failure) => {
            if report::is_unknown(&failure) && !given.is_dir() {
                found.add(&given, Report::unknown(&given, &failure));
            }
            Err(failure)
        }
    }
}

/// Whether the file belongs to a named lock, which is in the list by its name.
fn is_own(path: &Path) -> bool {
    let text = path.to_string_lossy();
    [
        "/tmp/lockkit-u",
        "/tmp/lockkit-machine",
        "/dev/shm/lockkit-",
    ]
    .iter()
    .any(|own| text.starts_with(own))
}

/// Returns none: there are no usual directories here.
#[cfg(not(target_os = "linux"))]
fn usual_directories() -> [PathBuf; 0] {
    []
}

#[cfg(target_os = "linux")]
fn usual_directories() -> [PathBuf; 3] {
    let uid = rustix::process::geteuid().as_raw();
    [
        "/run".into(),
        format!("/run/user/{uid}").into(),
        "/dev/shm".into(),
    ]
}

/// Reads the locks on files, and the open files of the processes that hold leases for
/// `lockkit run`.
fn file_locks() -> FileLocks {
    #[cfg(target_os = "linux")]
    return FileLocks::read_with_open_files(KEEPER.to_str().unwrap_or_default());
    #[cfg(not(target_os = "linux"))]
    FileLocks::read()
}

/// Whether a file in a usual directory is worth opening.
fn is_usual(path: &Path) -> bool {
    match path
        .as_os_str()
        .as_encoded_bytes()
        .starts_with(b"/dev/shm/")
    {
        true => !is_own(path),
        false => report::has_pid_extension(path),
    }
}

fn entries(directory: &Path) -> std::io::Result<Vec<PathBuf>> {
    std::fs::read_dir(directory)?
        .map(|entry| Ok(entry?.path()))
        .collect()
}

fn show(locks: &[Report]) -> Result<(), Failure> {
    let rows: Vec<_> = locks.iter().map(Report::row).collect();
    let titles = ["KIND", "NAME", "STATE", "WAITERS", "HELD BY"].map(str::to_owned);
    let widths: Vec<usize> = (0..titles.len())
        .map(|column| {
            rows.iter()
                .chain([&titles])
                .map(|row| row[column].chars().count())
                .max()
                .unwrap_or_default()
        })
        .collect();
    let line = |row: &[String]| {
        let cells: Vec<_> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        cells.join("  ").trim_end().to_owned()
    };
    let mut text = format!("{}\n", paint(TITLE, line(&titles)));
    for row in &rows {
        let _ = writeln!(text, "{}", line(row));
    }
    // One write: the standard output flushes at every end of a line, which costs a system call
    // each.
    report::say(|out| out.write_all(text.as_bytes()))
}
