//! `lockkit status`: one lock.

use std::ffi::OsString;

use serde::Serialize;

use crate::failure::Outcome;
use crate::look::{self, Sight};
use crate::place::{Place, ScopeArgument};

/// Show whether a lock is held, and by whom.
///
/// The exit code is 0 when it is free, 1 when it is held, and 2 when it is stale: whoever had it died or ran out of
/// time, and the next to come takes it over. What has :// in it is the URL of a lease, what has a slash a path, anything else a name. Whether a path is
/// that of a lease, a pidfile, a table of locks or any other file is told by what stands in it.
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
    pub(crate) lock: &'l Sight,
}

impl Status {
    pub(crate) fn carry_out(self) -> Outcome {
        let sight = look::at(&Place::parse(&self.place)?, self.scope)?;
        match (self.quiet, self.json) {
            (true, _) => {}
            (_, true) => look::json(&Form { version: look::VERSION, lock: &sight })?,
            _ => look::say(|mut out| sight.show(&mut out))?,
        }
        Ok(sight.state.code())
    }
}
