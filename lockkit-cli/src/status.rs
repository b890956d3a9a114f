//! `lockkit status`: one lock.

use std::ffi::OsString;

use serde::Serialize;

use crate::failure::Outcome;
use crate::locks::FileLocks;
use crate::report::{self, Report};
use crate::target::{self, ScopeArgument, Target};

/// Shows whether a lock is held, and its holders.
///
/// The exit code is 0 if the lock is free, 1 if it is held, and 2 if it is stale. The owner of a
/// stale lock died or its time ran out, and the next acquisition takes the lock over. The exit code
/// is 77 if this user may not read the state, which leaves the state unknown.
///
/// An argument with :// is the URL of a lease, an argument with a slash is a path, and any other
/// argument is a name. The content of a file shows whether it is a lease, a pidfile or a table of
/// locks; the extension .pid also marks a pidfile. For any other file the locks of flock(2) are
/// shown, and if there are none, the locks of fcntl(2).
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
    /// The processes that share the name.
    #[arg(long, value_enum, default_value_t)]
    scope: ScopeArgument,
    /// Prints nothing; the exit code shows the state.
    #[arg(long, short, conflicts_with = "json")]
    quiet: bool,
    /// Writes JSON: {"version":1,"lock":{…}}; see docs/CLI.md.
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
                report::json(&Form {
                    version: report::VERSION,
                    lock: &Report::unknown(&path, &failure),
                })?;
                return Err(failure);
            }
            (Err(failure), _) => {
                let quiet = self.quiet && report::is_unknown(&failure);
                return Err(failure.quiet(quiet));
            }
        };
        match (self.quiet, self.json) {
            (true, _) => {}
            (_, true) => report::json(&Form {
                version: report::VERSION,
                lock: &sight,
            })?,
            _ => report::say(|mut out| sight.show(&mut out))?,
        }
        Ok(sight.state.code())
    }
}
