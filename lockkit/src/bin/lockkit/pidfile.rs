//! `lockkit pidfile`: looks at pidfiles, and removes those that are proven stale.

use std::path::{Path, PathBuf};

use lockkit::{PidFile, PidStatus};
use serde::Serialize;

use crate::failure::{Failure, Outcome, code};
use crate::look::{self, Sight, State};
use crate::place;

/// Look at pidfiles, and remove stale ones.
#[derive(clap::Subcommand)]
#[command(after_help = "Example: lockkit pidfile check /run")]
pub(crate) enum Pidfile {
    /// Show whose pidfiles these are, and whether those processes live.
    ///
    /// The exit code is 0 when no pidfile is there, 1 when the process of one lives, and else 2: all are stale.
    #[command(after_help = "Example: lockkit pidfile check /run/sshd.pid /run/crond.pid")]
    Check {
        /// Pidfiles, and folders, of which those files count whose names end with .pid.
        #[arg(required = true, value_name = "PATH|DIR")]
        paths: Vec<PathBuf>,
        /// Write JSON: {"version":1,"locks":[…]}, as docs/CLI.md has it.
        #[arg(long)]
        json: bool,
    },
    /// Remove the pidfiles whose processes are proven dead, and no others.
    ///
    /// What names a process of another host, or none at all, stays. Each file is locked while it is judged and removed,
    /// so no new owner loses its own.
    #[command(after_help = "Example: lockkit pidfile clean --dry-run /var/run/app")]
    Clean {
        /// Pidfiles, and folders, of which those files count whose names end with .pid.
        #[arg(required = true, value_name = "PATH|DIR")]
        paths: Vec<PathBuf>,
        /// Only say what would be removed.
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(Serialize)]
struct Form<'l> {
    version: u32,
    locks: &'l [Sight],
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
    let sights: Vec<Sight> = all(paths)?.iter().map(|path| look::pidfile(path)).collect::<Result<_, _>>()?;
    match json {
        true => look::json(&Form { version: look::VERSION, locks: &sights })?,
        false => look::say(|mut out| sights.iter().try_for_each(|sight| sight.show(&mut out)))?,
    }
    let any = |state| sights.iter().any(|sight| sight.state == state);
    Ok(match (any(State::Held), any(State::Stale)) {
        (true, _) => State::Held.code(),
        (_, true) => State::Stale.code(),
        _ => State::Free.code(),
    })
}

fn clean(paths: &[PathBuf], dry_run: bool) -> Outcome {
    let mut worst = code::OK;
    for path in all(paths)? {
        let said = match PidFile::inspect(&path) {
            Ok(PidStatus::Stale(_)) if path.is_symlink() => {
                let message = format!("{} is a symbolic link to a stale pidfile, and stays", shown(&path));
                Failure::new(code::NO_PERMISSION, message).show();
                worst = code::NO_PERMISSION;
                continue;
            }
            Ok(PidStatus::Stale(owner)) if dry_run => {
                Ok(Some(format!("would remove {}, left by {}", shown(&path), owner.describe())))
            }
            Ok(PidStatus::Stale(owner)) => PidFile::remove_stale(&path)
                .map(|removed| removed.then(|| format!("removed {}, left by {}", shown(&path), owner.describe()))),
            other => other.map(|_| None),
        };
        match said {
            Ok(Some(text)) => look::say(|out| writeln!(out, "{text}"))?,
            Ok(None) => {}
            // The others are to be looked at all the same.
            Err(error) => {
                let failure = Failure::from(error);
                failure.show();
                worst = failure.code();
            }
        }
    }
    Ok(worst)
}

fn shown(path: &Path) -> String {
    look::plain(&path.display().to_string())
}

/// The files among `paths`, and in the folders among them.
fn all(paths: &[PathBuf]) -> Result<Vec<PathBuf>, Failure> {
    let mut found = Vec::new();
    for path in paths {
        let path = place::absolute(path)?;
        if !path.is_dir() {
            found.push(path);
            continue;
        }
        let entries =
            std::fs::read_dir(&path).map_err(|error| Failure::io(format!("list {}", path.display()), error))?;
        let mut inside: Vec<_> =
            entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| is_pidfile(path)).collect();
        inside.sort_unstable();
        found.extend(inside);
    }
    Ok(found)
}

fn is_pidfile(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "pid") && path.is_file()
}
