//! `lockkit status`: one lock.

use std::ffi::OsString;

use serde::Serialize;

use crate::failure::Outcome;
use crate::locks::FileLocks;
use crate::report::{self, Report};
use crate::target::{self, ScopeArgument, Target};

/// Show whether a lock is held, and by whom.
///
/// The exit code is 0 when it is free, 1 when it is held, and 2 when it is stale: its owner died or its time ran out,
/// and the next process to come takes it over. It is 77 when this user may not read what would tell, and then says
/// nothing of the lock.
///
/// What has :// in it is the URL of a lease, what has a slash a path, anything else a name. Whether a path is that of a
/// lease, a pidfile, a table of locks or any other file is told by its content, and of a pidfile by the extension .pid.
/// Of any other file it tells the locks of flock(2), and if there are none, those of fcntl(2).
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  lockkit status backup
  lockkit status /run/sshd.pid --quiet || echo 'sshd runs, or has crashed'
  lockkit status ./leader --json | jq .lock.token")]
pub(crate) struct Status {
    /// The name or the path of the lock, or the URL of a lease.
    #[arg(value_name = "NAME|PATH|URL")]
    place: OsString,
    /// Who shares the name.
    #[arg(long, value_enum, default_value_t)]
    scope: ScopeArgument,
    /// Say nothing; the exit code tells.
    #[arg(long, short, conflicts_with = "json")]
    quiet: bool,
    /// Write JSON: {"version":1,"lock":{…}}, as docs/CLI.md has it.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
pub(crate) struct Form<'l> {
    pub(crate) version: u32,
    pub(crate) lock: &'l Report,
}

impl Status {
    pub(crate) fn carry_out(self) -> Outcome {
        let place = Target::parse(&self.place)?;
        let sight = report::at(&place, self.scope, FileLocks::read);
        target::note_file_of_name(&place, self.quiet || sight.is_err());
        let sight = match (sight, &place) {
            (Ok(sight), _) => sight,
            (Err(failure), Target::Path(path)) if self.json && report::is_unknown(&failure) => {
                let path = target::absolute(path)?;
                report::json(&Form { version: report::VERSION, lock: &Report::unknown(&path, &failure) })?;
                return Err(failure);
            }
            (Err(failure), _) => {
                let quiet = self.quiet && report::is_unknown(&failure);
                return Err(failure.quiet(quiet));
            }
        };
        match (self.quiet, self.json) {
            (true, _) => {}
            (_, true) => report::json(&Form { version: report::VERSION, lock: &sight })?,
            _ => report::say(|mut out| sight.show(&mut out))?,
        }
        Ok(sight.state.code())
    }
}
