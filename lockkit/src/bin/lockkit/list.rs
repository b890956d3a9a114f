//! `lockkit list`: every lock that somebody holds, as far as this user may see.
//!
//! Named locks and locked files are found by themselves; of pidfiles those in the system's folders for them. A lease
//! leaves no trace in the kernel while nobody touches it, so `lockkit run` keeps its file open for this; those that
//! other programs hold are found by path only. A table in shared memory is open, and locked in its own way, in each
//! process that uses it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lockkit::{FileLock, NamedLock, Scope};
use serde::Serialize;

use crate::failure::{Failure, Outcome, code};
use crate::look::{self, Kind, Sight, State};
use crate::paint::{TITLE, paint};
use crate::place;
#[cfg(target_os = "linux")]
use crate::supervise::KEEPER;

/// List the locks that are held: kind, name, state, waiters and holders.
///
/// Shown are the named locks of this user and of the machine; of the processes of this user, or of everybody for root,
/// the files that they have locked, the leases under which lockkit runs programs, and the tables in shared memory that
/// they use; the pidfiles in /run, and the tables in /dev/shm. What else there is, such as the leases of other
/// programs, is found in the files and folders that are given.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  lockkit list
  lockkit list /srv/shared             Also what is in this folder.
  lockkit list --json | jq -r '.locks[] | select(.kind == \"named\") | .name'")]
pub(crate) struct List {
    /// Files and folders in which to look for leases, pidfiles and tables, too; also for free ones.
    paths: Vec<PathBuf>,
    /// Write JSON: {"version":1,"locks":[…]}, as docs/CLI.md has it.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Form<'l> {
    version: u32,
    locks: &'l [Sight],
}

impl List {
    pub(crate) fn carry_out(self) -> Outcome {
        let mut locks = Vec::new();
        for scope in [Scope::User, Scope::Machine] {
            for lock in NamedLock::list(scope)? {
                locks.extend(look::named(&lock).ok().filter(|sight| sight.state != State::Free));
            }
        }
        let mut by_path = BTreeMap::new();
        for lock in FileLock::list() {
            let path = lock.path();
            if !is_own(path) {
                by_path.insert(path.to_owned(), look::recognised(path).unwrap_or_else(|| look::file(path)));
            }
        }
        let usual = usual_folders().into_iter().flat_map(|folder| entries(&folder)).filter(|path| is_usual(path));
        for path in usual.chain(kept_open()) {
            match look::recognised(&path) {
                Some(Ok(sight)) if sight.state != State::Free => drop(by_path.insert(path, Ok(sight))),
                _ => {}
            }
        }
        for given in &self.paths {
            let given = place::absolute(given)?;
            match look::recognised(&given) {
                Some(sight) => by_path.insert(given, sight),
                None if given.is_dir() => {
                    for path in entries(&given) {
                        // Many a file begins with a number.
                        let fits = |sight: &Sight| sight.kind != Kind::Pidfile || has_pid_extension(&path);
                        if let Some(sight) = look::recognised(&path).filter(|sight| sight.as_ref().map_or(true, fits)) {
                            by_path.insert(path, sight);
                        }
                    }
                    None
                }
                None => by_path.insert(given.clone(), look::file(&given)),
            };
        }
        for (path, sight) in by_path {
            match sight {
                Ok(sight) => locks.push(sight),
                Err(failure) if self.paths.iter().any(|given| path.ends_with(given)) => return Err(failure),
                Err(_) => {}
            }
        }
        match self.json {
            true => look::json(&Form { version: look::VERSION, locks: &locks })?,
            false => show(&locks)?,
        }
        Ok(code::OK)
    }
}

/// The files by which named locks are kept, which are in the list by their names.
fn is_own(path: &Path) -> bool {
    let text = path.to_string_lossy();
    ["/tmp/lockkit-u", "/tmp/lockkit-machine-", "/dev/shm/lockkit-u"].iter().any(|own| text.starts_with(own))
}

/// None, as nothing is usual here.
#[cfg(not(target_os = "linux"))]
fn usual_folders() -> [PathBuf; 0] {
    []
}

#[cfg(target_os = "linux")]
fn usual_folders() -> [PathBuf; 3] {
    let uid = rustix::process::geteuid().as_raw();
    ["/run".into(), format!("/run/user/{uid}").into(), "/dev/shm".into()]
}

/// Nobody tells which files processes keep open here.
#[cfg(not(target_os = "linux"))]
fn kept_open() -> [PathBuf; 0] {
    []
}

/// The files that may be leases or tables by how processes keep them open: those of lockkit itself, and those with a
/// lock on a byte.
#[cfg(target_os = "linux")]
fn kept_open() -> impl Iterator<Item = PathBuf> {
    let pids = entries(Path::new("/proc")).into_iter().filter(|path| {
        path.file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
    });
    pids.flat_map(|process| {
        let program = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
        let is_lockkit = program.trim_end().as_bytes() == KEEPER.to_bytes();
        entries(&process.join("fdinfo")).into_iter().filter_map(move |info| {
            let locked = || std::fs::read_to_string(&info).is_ok_and(|info| info.contains(" OFDLCK "));
            (is_lockkit || locked()).then_some(())?;
            let path = std::fs::read_link(process.join("fd").join(info.file_name()?)).ok()?;
            // Not a pipe or a socket, whose links are no paths.
            path.is_absolute().then_some(path)
        })
    })
}

/// Whether a file in a usual folder is worth opening.
fn is_usual(path: &Path) -> bool {
    path.starts_with("/dev/shm") || has_pid_extension(path)
}

fn has_pid_extension(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "pid")
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> =
        std::fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort_unstable();
    paths
}

fn show(locks: &[Sight]) -> Result<(), Failure> {
    let rows: Vec<_> = locks.iter().map(Sight::row).collect();
    let titles = ["KIND", "NAME", "STATE", "WAITERS", "HELD BY"].map(str::to_owned);
    let widths: Vec<usize> = (0..titles.len())
        .map(|column| rows.iter().chain([&titles]).map(|row| row[column].chars().count()).max().unwrap_or_default())
        .collect();
    let line = |row: &[String]| {
        let cells: Vec<_> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    look::say(|out| {
        writeln!(out, "{}", paint(TITLE, line(&titles)))?;
        rows.iter().try_for_each(|row| writeln!(out, "{}", line(row)))
    })
}
