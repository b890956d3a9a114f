//! `lockkit pidfile`: checks pidfiles, and removes those that are proven stale.

use std::path::{Path, PathBuf};

use lockkit::{PidFile, PidStatus};
use serde::Serialize;

use crate::failure::{Failure, Outcome, code};
use crate::report::{self, Report, State};
use crate::style::plain;
use crate::target;

/// Checks pidfiles, and removes stale ones.
#[derive(clap::Subcommand)]
#[command(after_help = "Example: lockkit pidfile check /run")]
pub(crate) enum Pidfile {
    /// Shows the processes of pidfiles, and whether they are alive.
    ///
    /// The exit code is 1 if the process of a pidfile is alive or may be alive. Otherwise it is 2
    /// if a pidfile is stale, and 0 if there is no pidfile or all are blank. It is 65 if a file is
    /// no pidfile, 66 for a path that does not exist, and 77 if a file cannot be read.
    #[command(after_help = "Example: lockkit pidfile check /run/sshd.pid /run/crond.pid")]
    Check {
        /// Pidfiles, and directories. In a directory only files whose names end with .pid count.
        #[arg(required = true, value_name = "PATH|DIR")]
        paths: Vec<PathBuf>,
        /// Writes JSON: {"version":1,"locks":[…]}; see docs/CLI.md.
        #[arg(long)]
        json: bool,
    },
    /// Removes the pidfiles whose processes are proven dead, and no others.
    ///
    /// A blank file stays, and so does a file that names a process of another host. A file that is
    /// no pidfile stays, with exit code 65. A symbolic or hard link stays, with exit code 77. No
    /// other process can acquire a pidfile during its check and removal, so no new owner loses its
    /// file.
    #[command(after_help = "Example: lockkit pidfile clean --dry-run /var/run/app")]
    Clean {
        /// Pidfiles, and directories. In a directory only files whose names end with .pid count.
        #[arg(required = true, value_name = "PATH|DIR")]
        paths: Vec<PathBuf>,
        /// Only checks the files, and prints which would be removed or refused.
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(Serialize)]
struct Form<'l> {
    version: u32,
    locks: &'l [Report],
}

impl Pidfile {
    pub(crate) fn carry_out(self) -> Outcome {
        match self {
            Self::Check { paths, json } => check(&paths, json),
            Self::Clean { paths, dry_run } => clean(&paths, dry_run),
        }
    }
}

fn check(paths: &[PathBuf], json: bool) -> Outcome {
    let (mut sights, mut worst) = (Vec::new(), None);
    for path in all(paths, &mut worst)? {
        match report::pidfile(&path) {
            Ok(sight) => sights.push(sight),
            Err(failure) => report(failure, &mut worst),
        }
    }
    match json {
        true => report::json(&Form {
            version: report::VERSION,
            locks: &sights,
        })?,
        false => report::say(|mut out| sights.iter().try_for_each(|sight| sight.show(&mut out)))?,
    }
    let any = |state| sights.iter().any(|sight| sight.state == state);
    Ok(
        worst.unwrap_or(match (any(State::Held), any(State::Stale)) {
            (true, _) => State::Held.code(),
            (_, true) => State::Stale.code(),
            _ => State::Free.code(),
        }),
    )
}

fn clean(paths: &[PathBuf], dry_run: bool) -> Outcome {
    let mut worst = None;
    for path in all(paths, &mut worst)? {
        match clean_one(&path, dry_run) {
            Ok(Some(text)) => report::say(|out| writeln!(out, "{text}"))?,
            Ok(None) => {}
            Err(error) => report(error.into(), &mut worst),
        }
    }
    Ok(worst.unwrap_or(code::OK))
}

/// Removes the file at `path` if it is stale, or only judges it. Returns a description of the
/// action.
fn clean_one(path: &Path, dry_run: bool) -> lockkit::Result<Option<String>> {
    // Read before the file is gone. A file whose lock is held needs no check of links and
    // permissions.
    let left_by = match PidFile::inspect(path)? {
        PidStatus::Stale(owner) => format!(", left by {}", owner.describe()),
        PidStatus::Invalid { .. } => String::new(),
        _ => return Ok(None),
    };
    let (stale, done) = match dry_run {
        true => (PidFile::is_stale(path)?, "would remove"),
        false => (PidFile::remove_stale(path)?, "removed"),
    };
    Ok(stale.then(|| format!("{done} {}{left_by}", plain(&path.display().to_string()))))
}

/// Prints why one of the files was not judged. The others are judged nevertheless.
fn report(failure: Failure, worst: &mut Option<u8>) {
    failure.show();
    *worst = Some(failure.code());
}

/// Returns the files among `paths`, and in the directories among them. Reports a path that leads
/// nowhere.
fn all(paths: &[PathBuf], worst: &mut Option<u8>) -> Result<Vec<PathBuf>, Failure> {
    let mut found = Vec::new();
    for path in paths {
        let path = target::absolute(path)?;
        if !path.is_dir() {
            match path.symlink_metadata() {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    let text = plain(&path.display().to_string());
                    report(
                        Failure::new(code::NO_INPUT, format!("cannot look at {text}: {error}")),
                        worst,
                    );
                }
                // Other problems are reported when the file is judged.
                _ => found.push(path),
            }
            continue;
        }
        let entries = std::fs::read_dir(&path)
            .map_err(|error| Failure::io(format!("list {}", path.display()), error))?;
        let mut inside: Vec<_> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| is_pidfile(path))
            .collect();
        inside.sort_unstable();
        found.extend(inside);
    }
    Ok(found)
}

fn is_pidfile(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "pid") && path.is_file()
}
