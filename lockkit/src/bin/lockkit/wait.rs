//! `lockkit wait`: returns when a lock is free.
//!
//! It looks again and again instead of taking the lock: taking it would keep others out, and eat the news of a death
//! that belongs to the next owner.

use std::ffi::OsString;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::failure::{Failure, Outcome, code};
use crate::look::{self, State};
use crate::place::{self, Place, ScopeArgument};
use crate::waiting::{self, Audience};

/// Wait until a lock is free, without taking it.
///
/// A stale lock is free for whoever comes next, so that ends the wait, too. The exit code is 0, or 75 when the time was
/// over first. By the time it returns somebody else may have taken the lock: lockkit run runs something under it.
#[derive(clap::Args)]
#[command(after_help = "Example: lockkit wait backup --timeout 1h && shutdown")]
pub(crate) struct WaitFor {
    /// The name or the path of the lock, or the URL of a lease.
    #[arg(value_name = "NAME|PATH|URL")]
    place: OsString,
    /// Who shares the name.
    #[arg(long, value_enum, default_value_t)]
    scope: ScopeArgument,
    /// Give up after this time, such as 5s or "1m 30s".
    #[arg(long, value_name = "TIME", value_parser = place::duration)]
    timeout: Option<Duration>,
    /// Say nothing.
    #[arg(long, short)]
    quiet: bool,
    /// Tell of the wait also where no terminal is.
    #[arg(long, short, conflicts_with = "quiet")]
    verbose: bool,
}

impl WaitFor {
    pub(crate) fn carry_out(self) -> Outcome {
        let place = Place::parse(&self.place)?;
        let until = self.timeout.and_then(|limit| Instant::now().checked_add(limit));
        let audience = Audience::of(self.quiet, self.verbose);
        let holder = || look::at(&place, self.scope).ok()?.holders.first().map(look::Holder::text);
        waiting::shown(audience, &look::plain(&self.place.to_string_lossy()), holder, || self.watch(&place, until))
    }

    fn watch(&self, place: &Place, until: Option<Instant>) -> Outcome {
        const FIRST: Duration = Duration::from_millis(1);
        const LONGEST: Duration = Duration::from_millis(50);
        let given = Path::new(&self.place);
        let mut pause = FIRST;
        loop {
            let begun = Instant::now();
            let state = look::state(place, self.scope)?;
            // Looking at a file reads the descriptors of all processes, and is not to take more than a tenth of the
            // time.
            let looked = begun.elapsed();
            if state != State::Held {
                return Ok(code::OK);
            }
            let left = until.map_or(Duration::MAX, |until| until.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                let sight = look::at(place, self.scope)?;
                let holder = sight.holders.first().map(|holder| format!(" by {}", holder.text())).unwrap_or_default();
                let message = format!("{} is still held{holder}", given.display());
                let failure = Failure::new(code::TEMPORARY, message).quiet(self.quiet);
                return Err(failure.example(format!("lockkit wait {} --timeout 1h", given.display())));
            }
            std::thread::sleep(pause.max(looked * 10).min(left));
            pause = (pause * 2).min(LONGEST);
        }
    }
}
