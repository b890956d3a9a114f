//! `lockkit wait`: returns when a lock is free.
//!
//! It checks the lock repeatedly instead of acquiring it. Acquiring it would block other processes,
//! and consume the report of a death that belongs to the next owner. A check costs microseconds
//! however many processes and locks there are. A name is tried with bind(2), a file with a
//! nonblocking flock(2) and with `F_OFD_GETLK`. For pidfiles and leases the record is read.

use std::ffi::OsString;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::failure::{Failure, Outcome, code};
use crate::locks::FileLocks;
use crate::progress::{self, Audience};
use crate::report::{self, State, Watched};
use crate::target::{self, ScopeArgument, Target};

/// Waits until a lock is free, without acquiring it.
///
/// A stale lock also ends the wait, because the next process can acquire it. The exit code is 0
/// after the wait, 75 after the timeout, and 77 if this user may not read the state. Another
/// process may acquire the lock before the command returns. To run a program under the lock, use
/// lockkit run.
#[derive(clap::Args)]
#[command(after_help = "Example: lockkit wait backup --timeout 1h && shutdown")]
pub(crate) struct WaitFor {
    /// The name or the path of the lock, or the URL of a lease.
    #[arg(value_name = "NAME|PATH|URL")]
    place: OsString,
    /// The processes that share the name.
    #[arg(long, value_enum, default_value_t)]
    scope: ScopeArgument,
    /// Gives up after this time, such as 5s or "1m 30s".
    #[arg(long, value_name = "TIME", value_parser = target::duration)]
    timeout: Option<Duration>,
    /// Prints nothing.
    #[arg(long, short)]
    quiet: bool,
    /// Reports the wait also without a terminal.
    #[arg(long, short, conflicts_with = "quiet")]
    verbose: bool,
}

impl WaitFor {
    pub(crate) fn carry_out(self) -> Outcome {
        let place = Target::parse(&self.place)?;
        target::note_file_of_name(&place, self.quiet);
        let until = self
            .timeout
            .and_then(|limit| Instant::now().checked_add(limit));
        let audience = Audience::of(self.quiet, self.verbose);
        let holders = || match self.look(&place) {
            Ok(sight) => sight
                .holders
                .into_iter()
                .map(|holder| holder.owner)
                .collect(),
            Err(_) => Vec::new(),
        };
        progress::shown(audience, &self.place.to_string_lossy(), holders, || {
            self.watch(&place, until)
        })
    }

    fn look(&self, place: &Target) -> Result<report::Report, Failure> {
        // The holder of a file, as /proc/locks shows it: a pass over all descriptors would delay
        // the end of the wait.
        report::at(place, self.scope, FileLocks::read_table)
    }

    fn watch(&self, place: &Target, until: Option<Instant>) -> Outcome {
        const FIRST: Duration = Duration::from_millis(1);
        /// The maximum delay until the end of a wait is noticed, without the check itself.
        const LONGEST: Duration = Duration::from_millis(20);
        let given = Path::new(&self.place);
        let mut watched = Watched::new(place, self.scope);
        let mut pause = FIRST;
        loop {
            let state = watched.state().map_err(|failure| {
                let quiet = self.quiet && report::is_unknown(&failure);
                failure.quiet(quiet)
            })?;
            if state != State::Held {
                return Ok(code::OK);
            }
            let left = until.map_or(Duration::MAX, |until| {
                until.saturating_duration_since(Instant::now())
            });
            if left.is_zero() {
                let holders = self
                    .look(place)
                    .map(|sight| sight.holders)
                    .unwrap_or_default();
                let holder = holders
                    .first()
                    .map(|holder| format!(" by {}", holder.text()))
                    .unwrap_or_default();
                let message = format!("{} is still held{holder}", given.display());
                let failure = Failure::new(code::TEMPORARY, message).quiet(self.quiet);
                return Err(
                    failure.example(format!("lockkit wait {} --timeout 1h", given.display()))
                );
            }
            std::thread::sleep(pause.min(left));
            pause = (pause * 2).min(LONGEST);
        }
    }
}
