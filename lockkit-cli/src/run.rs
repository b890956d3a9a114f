//! `lockkit run`: runs a program under a lock.
//!
//! This module acquires the lock, in one wait. [`supervise`] then starts the program and supervises
//! it.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lockkit::{CancelToken, FileLock, Owner, PidFile, PidStatus, Wait};

use crate::failure::{Failure, Outcome, code, note};
use crate::held_lock::{HeldLock, Job};
use crate::locks::FileLocks;
use crate::loss;
use crate::progress::{self, Audience};
use crate::supervise::{self, Signals};
use crate::target::{self, ScopeArgument};

/// Runs a program while holding a lock.
///
/// The exit status is the program's own, or 128 plus the number of the signal that ended it.
/// lockkit passes SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 on to the program. The lock
/// is released when the program ends, even if processes that it started continue. The lock stays
/// held while the program lives, even if lockkit is killed. (On Windows the console sends Ctrl-C to
/// the program, too. If lockkit is killed there, the program and all processes that it started end
/// with it.)
///
/// A wait on a terminal shows the lock and its holder.
///
/// The program gets two variables: LOCKKIT_TOKEN, the fencing token of a lease, and
/// LOCKKIT_RECOVERED, the previous owner, if that died holding the lock.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  lockkit run --name backup -- rsync -a /home /mnt        Waits until the lock is free.
  lockkit run --try --quiet --name backup -- rsync …      Exits with 75 while another one runs.
  lockkit run --file /srv/data --shared -- tar cf - /srv  Reads while no process writes.
  lockkit run --pidfile /run/app.pid -- app --foreground  Keeps a pidfile with the pid of app.
  lockkit run --lease /srv/shared/leader -- lead          Ends lead if the lease is lost.")]
#[command(group = clap::ArgGroup::new("lock").required(true))]
pub(crate) struct Run {
    /// Uses the named lock with this name.
    #[arg(long, value_name = "NAME", group = "lock")]
    name: Option<String>,
    /// Uses the lock on this file or directory, as flock(1) does.
    #[arg(long, value_name = "PATH", group = "lock")]
    file: Option<PathBuf>,
    /// Uses the pidfile at this path, which then contains the program's pid.
    #[arg(long, value_name = "PATH", group = "lock")]
    pidfile: Option<PathBuf>,
    /// Uses the lease at this path or URL: file:///path, and etcd://…, postgres://… or redis://… if
    /// this build has the feature of that name. If the lease is lost, the program is ended.
    #[arg(long, value_name = "PATH|URL", group = "lock")]
    lease: Option<OsString>,
    /// The processes that share the name.
    #[arg(long, value_enum)]
    scope: Option<ScopeArgument>,
    /// Acquires the lock on the file shared, together with other shared holders.
    #[arg(long)]
    shared: bool,
    /// The permissions of a file that is created for the lock, in octal, exactly: the umask does
    /// not apply. The default is 666 for --file and 644 for --pidfile, less the umask, and 600 for
    /// --lease.
    #[arg(long, value_name = "OCTAL", value_parser = mode)]
    mode: Option<u32>,
    /// Creates missing directories above the file, too. They are not removed.
    #[arg(long)]
    create_parents: bool,
    /// Gives up at once if the lock is held.
    #[arg(long = "try", conflicts_with = "timeout")]
    try_once: bool,
    /// Gives up after this time, such as 5s or "1m 30s".
    #[arg(long, value_name = "TIME", value_parser = target::duration)]
    timeout: Option<Duration>,
    /// The exit code after giving up.
    #[arg(long, value_name = "N", default_value_t = code::TEMPORARY)]
    exit_code: u8,
    /// The time after which the lease expires without a renewal.
    #[arg(long, value_name = "TIME", value_parser = target::duration)]
    ttl: Option<Duration>,
    /// The time that the program may take to end after its lease is lost. Then it is killed. The
    /// default is 5s.
    #[arg(long, value_name = "TIME", value_parser = target::duration)]
    grace: Option<Duration>,
    /// Prints nothing during a wait, or if the lock is not acquired.
    #[arg(long, short)]
    quiet: bool,
    /// Reports waits also without a terminal, and a previous owner that died.
    #[arg(long, short, conflicts_with = "quiet")]
    verbose: bool,
    /// The program and its arguments.
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// Parses permissions in octal.
fn mode(text: &str) -> Result<u32, String> {
    // The number alone: neither a sign nor the prefix `0o`.
    let is_octal = text.bytes().all(|byte| matches!(byte, b'0'..=b'7'));
    let mode = u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| is_octal && *mode <= 0o777);
    match mode {
        None => Err("a mode is an octal number of at most 777, such as 664".to_owned()),
        Some(mode) if mode & 0o600 != 0o600 => {
            Err("it must let the file's owner read and write, as 600 does".to_owned())
        }
        Some(mode) => Ok(mode),
    }
}

/// The default time that a program may take to end after its lease was lost.
const GRACE: Duration = Duration::from_secs(5);

impl Run {
    pub(crate) fn carry_out(self) -> Outcome {
        self.check()?;
        let wait = match self.timeout {
            _ if self.try_once => Wait::none(),
            Some(limit) => Wait::at_most(limit),
            None => Wait::forever(),
        };
        match (&self.name, &self.file, &self.pidfile, &self.lease) {
            (Some(name), ..) => self.hold_name(name, &wait),
            (_, Some(path), ..) => self.hold_file(path, &wait),
            (_, _, Some(path), _) => self.hold_pidfile(path, &wait),
            (.., Some(given)) => self.lead(given, &wait),
            _ => {
                Err(Failure::usage("a lock is missing").example("lockkit run --name backup -- CMD"))
            }
        }
    }

    fn hold_name(&self, name: &str, wait: &Wait) -> Outcome {
        let lock = target::named(name, self.scope.unwrap_or_default())?;
        let queried = lock.clone();
        let holders = move || queried.owner().ok().flatten().into_iter().collect();
        let acquire = |wait: &Wait| lock.acquire(wait).map(HeldLock::Named);
        self.hold(&format!("the named lock {name:?}"), wait, holders, acquire)
    }

    fn hold_file(&self, path: &Path, wait: &Wait) -> Outcome {
        // The mode of flock(1), because both may be used on the same file.
        let lock = FileLock::new(path)
            .create_with_mode(self.mode.unwrap_or_else(|| less_the_umask(0o666)));
        let lock = if self.create_parents {
            lock.create_parents()
        } else {
            lock
        };
        let holders = || {
            let on = FileLocks::read_table().on(path).unwrap_or_default();
            on.flock
                .map(|locked| locked.pids)
                .unwrap_or_default()
                .into_iter()
                .filter_map(Owner::of)
                .collect()
        };
        let acquire = |wait: &Wait| {
            if self.shared {
                lock.acquire_shared(wait)
            } else {
                lock.acquire(wait)
            }
        };
        let text = format!("the lock on {}", path.display());
        self.hold(&text, wait, holders, |wait| {
            acquire(wait).map(HeldLock::File)
        })
    }

    fn hold_pidfile(&self, path: &Path, wait: &Wait) -> Outcome {
        let path = target::absolute(path)?;
        let lock = PidFile::new(&path)?;
        let lock = if let Some(mode) = self.mode {
            lock.create_with_mode(mode)
        } else {
            lock
        };
        let lock = if self.create_parents {
            lock.create_parents()
        } else {
            lock
        };
        let text = format!("the pidfile {}", path.display());
        let holders = move || match PidFile::inspect(&path) {
            Ok(PidStatus::Running(owner)) => vec![owner],
            _ => Vec::new(),
        };
        self.hold(&text, wait, holders, |wait| {
            lock.acquire(wait).map(HeldLock::Pidfile)
        })
    }

    /// Rejects options without a meaning for the kind of lock. Clap's own `requires` accepts them
    /// if the required option is excluded by another kind.
    fn check(&self) -> Result<(), Failure> {
        // A lease on a server has no file.
        let is_url = |given: &OsString| {
            target::url(given).is_some_and(|url| !url.to_ascii_lowercase().starts_with("file:"))
        };
        let has_file = self.name.is_none() && !self.lease.as_ref().is_some_and(is_url);
        let misplaced = [
            (
                "--scope",
                self.scope.is_some(),
                "--name",
                self.name.is_some(),
            ),
            ("--shared", self.shared, "--file", self.file.is_some()),
            ("--ttl", self.ttl.is_some(), "--lease", self.lease.is_some()),
            (
                "--grace",
                self.grace.is_some(),
                "--lease",
                self.lease.is_some(),
            ),
            ("--mode", self.mode.is_some(), "--file", has_file),
            ("--create-parents", self.create_parents, "--file", has_file),
        ];
        match misplaced
            .into_iter()
            .find(|(_, given, _, fits)| *given && !fits)
        {
            Some((option @ ("--mode" | "--create-parents"), ..)) => {
                let message = format!(
                    "{option} is for locks in a file: --file, --pidfile, and --lease with a path"
                );
                let value = if option == "--mode" { " 664" } else { "" };
                Err(Failure::usage(message).example(format!(
                    "lockkit run --file backup.lock {option}{value} -- CMD"
                )))
            }
            Some((option, _, kind, _)) => {
                let message = format!("{option} goes together with {kind} only");
                Err(Failure::usage(message)
                    .example(format!("lockkit run {kind} … {option} … -- CMD")))
            }
            None => Ok(()),
        }
    }

    /// Acquires the lock and runs the program.
    fn hold(
        &self,
        lock: &str,
        wait: &Wait,
        holders: impl Fn() -> Vec<Owner> + Send + Sync,
        acquire: impl FnOnce(&Wait) -> lockkit::Result<HeldLock>,
    ) -> Outcome {
        // The first process of a container gets only signals that it handles, so it must read those
        // that end a wait.
        if supervise::is_first() {
            let signals = Signals::block()?;
            return match self.acquire_until_signalled(&signals, lock, wait, holders, acquire)? {
                Ok(hold) => supervise::run(hold, signals, self.job()),
                Err(code) => Ok(code),
            };
        }
        let hold = self.acquire(lock, holders, || acquire(wait))?;
        supervise::run(hold, Signals::block()?, self.job())
    }

    /// Runs the program under a lease, as [`hold`](Self::hold) does for other locks: in a separate
    /// process, which continues when this one is killed.
    fn lead(&self, given: &OsStr, wait: &Wait) -> Outcome {
        let (loss, on_lost) = loss::loss()?;
        let lease = target::lease(given, |builder| {
            let mut builder = builder.on_lost(on_lost);
            if let Some(ttl) = self.ttl {
                builder = builder.ttl(ttl);
            }
            if let Some(mode) = self.mode {
                builder = builder.file_write_mode(mode);
            }
            if self.create_parents {
                builder = builder.create_parents();
            }
            builder
        })?;
        supervise::behind(|| {
            let looked = lease.clone();
            let holders = move || looked.owner().ok().flatten().into_iter().collect();
            let lock = format!("the lease {}", lease.name());
            // Before the first thread, the heartbeat's: the kernel delivers a signal to a thread
            // that does not block it.
            let signals = Signals::block()?;
            // A lease in a file is first tried without waiting, which is fast, and saves the thread
            // that watches for signals.
            let tried = Path::new(lease.name())
                .is_absolute()
                .then(|| lease.try_lock());
            let hold = match tried {
                Some(Err(error)) if error.is_held() && !self.try_once => None,
                tried => tried,
            };
            let hold = match hold {
                Some(tried) => Ok(self.acquire(&lock, holders, || {
                    tried.map(|guard| HeldLock::Lease(guard, loss))
                })?),
                None => {
                    let acquire = |wait: &Wait| {
                        lease
                            .acquire(wait)
                            .map(|guard| HeldLock::Lease(guard, loss))
                    };
                    self.acquire_until_signalled(&signals, &lock, wait, holders, acquire)?
                }
            };
            match hold {
                // A signal that came too late to cancel the wait is for the program.
                Ok(hold) => {
                    // For `lockkit list`, which finds a lease by the processes that have its file
                    // open.
                    let _found_by = File::open(given).or_else(|_| File::open(lease.name()));
                    supervise::run(hold, signals, self.job())
                }
                Err(code) => Ok(code),
            }
        })
    }

    /// Acquires as [`acquire`](Self::acquire) does, until a blocked signal arrives; then returns
    /// the exit code for that signal.
    fn acquire_until_signalled(
        &self,
        signals: &Signals,
        lock: &str,
        wait: &Wait,
        holders: impl Fn() -> Vec<Owner> + Send + Sync,
        acquire: impl FnOnce(&Wait) -> lockkit::Result<HeldLock>,
    ) -> Result<Result<HeldLock, u8>, Failure> {
        let stop = CancelToken::new();
        let wait = wait.clone().or_cancelled(&stop);
        match signals.cancelling(&stop, || self.acquire(lock, holders, || acquire(&wait)))? {
            Ok(hold) => Ok(Ok(hold)),
            Err(failure) => match signals.first_if(stop.is_cancelled()) {
                Some(signal) => Ok(Err(code::SIGNALLED + signal)),
                None => Err(failure),
            },
        }
    }

    fn acquire(
        &self,
        lock: &str,
        holders: impl Fn() -> Vec<Owner> + Send + Sync,
        acquire: impl FnOnce() -> lockkit::Result<HeldLock>,
    ) -> Result<HeldLock, Failure> {
        let audience = Audience::of(self.quiet, self.verbose);
        let hold = progress::shown(audience, lock, &holders, acquire).map_err(|error| {
            let gave_up = error.is_temporary();
            // The library does not search for the holder of a file, because that takes
            // milliseconds.
            let unnamed = gave_up && !self.quiet && error.owner().is_none();
            let found = match &self.file {
                Some(path) if unnamed => FileLock::new(path).holders().unwrap_or_default(),
                _ if unnamed => holders(),
                _ => Vec::new(),
            };
            let failure = Failure::from(error);
            let failure = match &found[..] {
                [] => failure,
                found => failure.with_more(format_args!(", by {}", progress::described(found))),
            };
            match gave_up {
                true => failure.with_code(self.exit_code).quiet(self.quiet),
                false => failure,
            }
        })?;
        if let (true, Some(died)) = (self.verbose, hold.recovered()) {
            note(format_args!(
                "lockkit: the previous owner died holding {lock}: {died}"
            ));
        }
        Ok(hold)
    }

    fn job(&self) -> Job<'_> {
        Job {
            command: &self.command,
            grace: self.grace.unwrap_or(GRACE),
            quiet: self.quiet,
        }
    }
}

/// Returns `mode` as a new file gets it. Reading the umask sets it, so this is for a process with
/// one thread.
#[cfg(unix)]
fn less_the_umask(mode: u32) -> u32 {
    use rustix::fs::Mode;
    let umask = rustix::process::umask(Mode::empty());
    rustix::process::umask(umask);
    mode & !umask.as_raw_mode()
}

#[cfg(not(unix))]
fn less_the_umask(mode: u32) -> u32 {
    mode
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mode_is_octal_and_lets_its_owner_in() {
        for (text, wanted) in [("600", 0o600), ("0664", 0o664), ("777", 0o777)] {
            assert_eq!(mode(text), Ok(wanted));
        }
        for wrong in [
            "",
            "8",
            "0o600",
            "+600",
            "1777",
            "400",
            "rw",
            "060",
            " 600",
            "99999999999",
        ] {
            assert!(mode(wrong).is_err(), "{wrong}");
        }
    }
}
