//! `lockkit run`: runs a program under a lock.
//!
//! The lock is taken here, in one wait; the program is then started and looked after by [`supervise`].

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lockkit::{CancelToken, FileLock, Owner, PidFile, PidStatus, Wait};

use crate::failure::{Failure, Outcome, code, note};
use crate::hold::{Hold, Job};
use crate::place::{self, ScopeArgument};
use crate::supervise::{self, Signals};
use crate::waiting::{self, Audience};

/// Run a program while holding a lock.
///
/// The exit status is the program's own, or 128 and the number of the signal that ended it. SIGINT, SIGTERM, SIGHUP,
/// SIGQUIT, SIGUSR1 and SIGUSR2 are passed on to it. The lock is released when the program ends, whatever it leaves
/// running, and not before: it stays held while the program lives even if lockkit is killed. (On Windows Ctrl-C reaches
/// the program by itself, and when lockkit is killed the program and all that it started end with it.)
///
/// While it waits on a terminal it shows what it waits for and who holds it.
///
/// The program finds in LOCKKIT_TOKEN the fencing token of a lease, and in LOCKKIT_RECOVERED who died holding the lock
/// before, if anybody did.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  lockkit run --name backup -- rsync -a /home /mnt        Waits for its turn.
  lockkit run --try --quiet --name backup -- rsync …      Gives up with 75 while another one runs.
  lockkit run --file /srv/data --shared -- tar cf - /srv  Reads while nobody writes.
  lockkit run --pidfile /run/app.pid -- app --foreground  Keeps a pidfile with the pid of app.
  lockkit run --lease /srv/shared/leader -- lead          Ends lead when the lease is lost.")]
#[command(group = clap::ArgGroup::new("lock").required(true))]
pub(crate) struct Run {
    /// The lock with this name.
    #[arg(long, value_name = "NAME", group = "lock")]
    name: Option<String>,
    /// The lock on this file or folder, as flock(1) takes it.
    #[arg(long, value_name = "PATH", group = "lock")]
    file: Option<PathBuf>,
    /// The pidfile at this path, which then names the program.
    #[arg(long, value_name = "PATH", group = "lock")]
    pidfile: Option<PathBuf>,
    /// The lease at this path or URL: file:///path, and with the engines of this build etcd://…, postgres://… and
    /// redis://…. When it is lost the program is ended.
    #[arg(long, value_name = "PATH|URL", group = "lock")]
    lease: Option<OsString>,
    /// Who shares the name.
    #[arg(long, value_enum)]
    scope: Option<ScopeArgument>,
    /// Share the lock on the file with others who share it.
    #[arg(long)]
    shared: bool,
    /// Give up at once when the lock is held.
    #[arg(long = "try", conflicts_with = "timeout")]
    try_once: bool,
    /// Give up after this time, such as 5s or "1m 30s".
    #[arg(long, value_name = "TIME", value_parser = place::duration)]
    timeout: Option<Duration>,
    /// The exit code after giving up.
    #[arg(long, value_name = "N", default_value_t = code::TEMPORARY)]
    exit_code: u8,
    /// How long the lease lasts without a renewal.
    #[arg(long, value_name = "TIME", value_parser = place::duration)]
    ttl: Option<Duration>,
    /// How long a program may take to end after its lease was lost, before it is killed; 5s unless told otherwise.
    #[arg(long, value_name = "TIME", value_parser = place::duration)]
    grace: Option<Duration>,
    /// Say nothing when the lock is not taken, and while waiting for it.
    #[arg(long, short)]
    quiet: bool,
    /// Tell of waits also where no terminal is, and of a previous owner that died.
    #[arg(long, short, conflicts_with = "quiet")]
    verbose: bool,
    /// The program and its arguments.
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// How long a program may take to end after its lease was lost, unless told otherwise.
const GRACE: Duration = Duration::from_secs(5);

impl Run {
    pub(crate) fn carry_out(self) -> Outcome {
        self.check()?;
        let wait = match self.timeout {
            _ if self.try_once => Wait::none(),
            Some(limit) => Wait::at_most(limit),
            None => Wait::forever(),
        };
        if let Some(name) = &self.name {
            let lock = place::named(name, self.scope.unwrap_or_default())?;
            let looked = lock.clone();
            let holder = move || looked.owner().ok().flatten().map(|owner| owner.describe());
            return self.hold(&format!("the named lock {name:?}"), holder, || lock.acquire(&wait).map(Hold::Named));
        }
        if let Some(path) = &self.file {
            // A mode as flock(1) has it, for both may be used on the same file.
            let lock = FileLock::new(path).create_with_mode(0o666);
            let looked = lock.clone();
            let holder = move || {
                let holders = looked.holders().ok()?;
                let described: Vec<_> = holders.iter().map(Owner::describe).collect();
                (!described.is_empty()).then(|| described.join("; "))
            };
            let acquire = || if self.shared { lock.acquire_shared(&wait) } else { lock.acquire(&wait) };
            return self.hold(&format!("the lock on {}", path.display()), holder, || acquire().map(Hold::File));
        }
        if let Some(path) = &self.pidfile {
            let path = place::absolute(path)?;
            let lock = PidFile::new(&path)?;
            let text = format!("the pidfile {}", path.display());
            let holder = move || match PidFile::inspect(&path) {
                Ok(PidStatus::Running(owner)) => Some(owner.describe()),
                _ => None,
            };
            return self.hold(&text, holder, || lock.acquire(&wait).map(Hold::Pidfile));
        }
        if let Some(given) = &self.lease {
            return self.lead(given, &wait);
        }
        Err(Failure::usage("a lock is missing").example("lockkit run --name backup -- CMD"))
    }

    /// Refuses options that mean nothing for the kind of lock. Clap's own `requires` lets them pass where what they
    /// require is excluded by another kind.
    fn check(&self) -> Result<(), Failure> {
        let misplaced = [
            ("--scope", self.scope.is_some(), "--name", self.name.is_some()),
            ("--shared", self.shared, "--file", self.file.is_some()),
            ("--ttl", self.ttl.is_some(), "--lease", self.lease.is_some()),
            ("--grace", self.grace.is_some(), "--lease", self.lease.is_some()),
        ];
        match misplaced.into_iter().find(|(_, given, _, fits)| *given && !fits) {
            Some((option, _, kind, _)) => {
                let message = format!("{option} goes together with {kind} only");
                Err(Failure::usage(message).example(format!("lockkit run {kind} … {option} … -- CMD")))
            }
            None => Ok(()),
        }
    }

    /// Takes the lock and runs the program.
    fn hold(
        &self,
        lock: &str,
        holder: impl Fn() -> Option<String> + Send + Sync,
        acquire: impl FnOnce() -> lockkit::Result<Hold>,
    ) -> Outcome {
        let hold = self.acquire(lock, holder, acquire)?;
        supervise::run(hold, Signals::block()?, self.job())
    }

    /// As [`hold`](Self::hold), for a lease: by a process of its own, which goes on when this one is killed.
    fn lead(&self, given: &OsStr, wait: &Wait) -> Outcome {
        let (loss, on_lost) = supervise::loss()?;
        let lease = place::lease(given, |builder| {
            let builder = builder.on_lost(on_lost);
            match self.ttl {
                Some(ttl) => builder.ttl(ttl),
                None => builder,
            }
        })?;
        supervise::behind(|| {
            let looked = lease.clone();
            let holder = move || looked.owner().ok().flatten().map(|owner| owner.describe());
            let lock = format!("the lease {}", lease.name());
            // Before the first thread, the heartbeat's: whichever does not block a signal is who gets it.
            let signals = Signals::block()?;
            let stop = CancelToken::new();
            let wait = wait.clone().or_cancelled(&stop);
            // One in a file is tried first, which takes no time, and saves the thread that watches for signals.
            let tried = Path::new(lease.name()).is_absolute().then(|| lease.try_lock());
            let hold = match tried {
                Some(Err(error)) if error.is_held() && !self.try_once => None,
                tried => tried,
            };
            let hold = match hold {
                Some(tried) => self.acquire(&lock, holder, || tried.map(|guard| Hold::Lease(guard, loss))),
                None => {
                    let acquire = || lease.acquire(&wait).map(|guard| Hold::Lease(guard, loss));
                    signals.cancelling(&stop, || self.acquire(&lock, holder, acquire))?
                }
            };
            match hold {
                // A signal that came too late to cancel the wait is the program's.
                Ok(hold) => {
                    // For `lockkit list`, which finds a lease by who has its file open.
                    let _found_by = File::open(given).or_else(|_| File::open(lease.name()));
                    supervise::run(hold, signals, self.job())
                }
                Err(failure) => match signals.first_if(stop.is_cancelled()) {
                    Some(signal) => Ok(code::SIGNALLED + signal),
                    None => Err(failure),
                },
            }
        })
    }

    fn acquire(
        &self,
        lock: &str,
        holder: impl Fn() -> Option<String> + Send + Sync,
        acquire: impl FnOnce() -> lockkit::Result<Hold>,
    ) -> Result<Hold, Failure> {
        let audience = Audience::of(self.quiet, self.verbose);
        let hold = waiting::shown(audience, lock, &holder, acquire).map_err(|error| {
            let gave_up = error.is_temporary();
            // The library does not look for the holder of a file, for that takes milliseconds.
            let unnamed = gave_up && !self.quiet && error.owner().is_none();
            let found = unnamed.then(holder).flatten();
            let failure = Failure::from(error);
            let failure = match found {
                Some(who) => failure.with_more(format_args!(", by {who}")),
                None => failure,
            };
            match gave_up {
                true => failure.with_code(self.exit_code).quiet(self.quiet),
                false => failure,
            }
        })?;
        if let (true, Some(died)) = (self.verbose, hold.recovered()) {
            note(format_args!("lockkit: the previous owner died holding {lock}: {died}"));
        }
        Ok(hold)
    }

    fn job(&self) -> Job<'_> {
        Job { command: &self.command, grace: self.grace.unwrap_or(GRACE), quiet: self.quiet }
    }
}
