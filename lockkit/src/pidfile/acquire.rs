//! Acquires a pidfile: creates the file, or takes over a blank or stale one.

use std::fs::{self, File};
use std::io::{self, ErrorKind as Io};
use std::time::Instant;

use super::existing::{ExistingFile, is_at};
use super::guard::{PidGuard, is_held_here};
use super::pid_file::PidFile;
use super::taker::{TAKER_TIMEOUT, TakerLock};
use super::verdict::Verdict;
use super::write::write_owner;
#[cfg(feature = "tokio")]
use crate::base::blocking;
use crate::base::error::{Error, Result};
use crate::base::lock::lock_methods;
use crate::base::lock_info::LockInfo;
use crate::base::owner::Owner;
use crate::base::telemetry;
use crate::base::wait::{Backoff, Wait};
use crate::file_lock;
use crate::sys::failpoint::step;
use crate::sys::fork::ForkGuarded;
use crate::sys::{files, tmpfile, write_lock};

/// How often in a row the file may be replaced during an attempt before the attempt counts it as
/// held.
const MAX_REPLACEMENTS: u32 = 100;

/// The permissions of a new file, less the umask.
const DEFAULT_MODE: u32 = 0o644;

/// The result of one attempt.
enum Attempt {
    Acquired(PidGuard),
    /// A process has the write lock on this file.
    Locked(ForkGuarded<File>),
    /// The content of the file counts as held, without a write lock.
    HeldByContent,
    /// Another taker is at work, or the file has just been replaced. The error is the one to return
    /// if that lasts.
    Busy(Option<Error>),
}

/// Whether an attempt can take over a file.
enum Availability {
    /// It cannot. This is the result of the attempt.
    Unavailable(Attempt),
    /// The file can be taken over. It contains the dead owner that left the file, if any.
    Free(ForkGuarded<File>, Option<Box<Owner>>),
}

impl PidFile {
    /// Acquires the lock, waiting as `wait` says.
    ///
    /// A wait without a limit for a holder that has the file locked sleeps in the kernel. A wait
    /// with a limit or a token, and any wait for a process without a lock, polls every few
    /// milliseconds. Waiters have no order.
    ///
    /// `Wait::none()` never waits for a holder. If another process is taking over a stale file, the
    /// call waits up to 1 s for the result.
    ///
    /// # Errors
    /// - [`Held`], [`Timeout`] or [`Cancelled`], as `wait` says.
    /// - [`NotAPidFile`] for a file that contains something other than a pid; also while waiting.
    /// - [`Insecure`] for a symbolic or hard link.
    /// - [`InvalidOption`] for a [mode](Self::create_with_mode) that denies the owner access.
    /// - [`Io`] if the file cannot be read, created, locked or written.
    ///
    /// On an error an existing file is unchanged, and an absent file stays absent. There is one
    /// exception: if the file has replaced a stale one and its permissions cannot be set, the file
    /// is removed.
    ///
    /// [`Held`]: crate::ErrorKind::Held
    /// [`Timeout`]: crate::ErrorKind::Timeout
    /// [`Cancelled`]: crate::ErrorKind::Cancelled
    /// [`NotAPidFile`]: crate::ErrorKind::NotAPidFile
    /// [`Insecure`]: crate::ErrorKind::Insecure
    /// [`InvalidOption`]: crate::ErrorKind::InvalidOption
    /// [`Io`]: crate::ErrorKind::Io
    pub fn acquire(&self, wait: &Wait) -> Result<PidGuard> {
        telemetry::acquire(self, || self.acquire_unreported(wait))
    }

    #[cfg(feature = "tokio")]
    async fn take_async(&self, wait: &Wait) -> Result<PidGuard> {
        let lock = self.clone();
        let acquiring =
            blocking::at_once_or_on_a_thread(wait, self, move |wait| lock.acquire_unreported(wait));
        telemetry::acquire_async(self, acquiring).await
    }

    /// Acquires the lock without events for subscribers of tracing.
    fn acquire_unreported(&self, wait: &Wait) -> Result<PidGuard> {
        wait.check(self)?;
        file_lock::check_mode(self.mode)?;
        let mut backoff = Backoff::new();
        let mut wait_state = None;
        let mut busy_since: Option<Instant> = None;
        loop {
            let attempt = self.attempt()?;
            if !matches!(attempt, Attempt::Busy(_)) {
                busy_since = None;
            }
            let locked = match attempt {
                Attempt::Acquired(guard) => return Ok(guard),
                Attempt::Locked(file) => Some(file),
                Attempt::HeldByContent => None,
                Attempt::Busy(error) => {
                    // A live taker needs only a moment. A call that does not wait allows that time,
                    // too.
                    let is_over =
                        busy_since.get_or_insert_with(Instant::now).elapsed() >= TAKER_TIMEOUT;
                    match error {
                        Some(error) if is_over => return Err(error),
                        _ if is_over || wait_state.is_some() => None,
                        _ => {
                            wait.check(self)?;
                            std::thread::sleep(backoff.next());
                            continue;
                        }
                    }
                }
            };
            let wait_state = match &mut wait_state {
                Some(wait_state) => wait_state,
                none => match wait.state_for(self) {
                    Some(wait_state) => none.insert(wait_state),
                    None => return Err(self.held()),
                },
            };
            match locked {
                Some(file) if wait_state.is_endless() => {
                    write_lock::wait(&file)
                        .map_err(|error| Error::io("wait for", &self.path, error))?;
                }
                _ => {
                    if let Err(ended) = wait_state.sleep(backoff.next())? {
                        return Err(wait_state.error(ended, self));
                    }
                }
            }
        }
    }

    fn attempt(&self) -> Result<Attempt> {
        for _ in 0..MAX_REPLACEMENTS {
            let attempt = match self.judge()? {
                // An acquisition that finds a live or killed taker's file becomes a taker itself.
                // So a taker that is stopped over a stale file still excludes others after that
                // file was removed by hand.
                None if !self.has_taker() => match self.create()? {
                    Some(attempt) => attempt,
                    None => continue,
                },
                None => self.take_over()?,
                Some(existing) => match self.availability(existing)? {
                    Availability::Unavailable(attempt) => attempt,
                    // Closed first, because Windows replaces no open file.
                    Availability::Free(file, _) => {
                        drop(file);
                        self.take_over()?
                    }
                },
            };
            return Ok(attempt);
        }
        Ok(Attempt::Busy(None))
    }

    fn availability(&self, existing: ExistingFile) -> Result<Availability> {
        match existing.verdict {
            Verdict::Held { by_lock: true, .. } => {
                Ok(Availability::Unavailable(Attempt::Locked(existing.file)))
            }
            Verdict::Held { .. } | Verdict::Blank { is_young: true, .. } => {
                Ok(Availability::Unavailable(Attempt::HeldByContent))
            }
            Verdict::Other(rule) => Err(self.not_a_pidfile(&existing.bytes, rule)),
            // The program has closed the descriptor of a guard, and with it the lock.
            Verdict::Own(_) if is_held_here(&existing.metadata) => {
                Ok(Availability::Unavailable(Attempt::HeldByContent))
            }
            Verdict::Stale(owner) => Ok(Availability::Free(existing.file, Some(Box::new(owner)))),
            Verdict::Own(_) | Verdict::Blank { .. } => Ok(Availability::Free(existing.file, None)),
        }
    }

    /// Creates the file, complete and locked before the path names it. Returns `None` if another
    /// file has the name by now.
    fn create(&self) -> Result<Option<Attempt>> {
        let failed = |error| Error::io("create", &self.path, error);
        // Read before the file is created, which may take the last descriptor.
        let owner = Owner::current();
        // Without a name no other process can open it, whatever its permissions are.
        let mode = self.mode.map_or(DEFAULT_MODE, |_| 0o600);
        let file =
            self.with_parents(|| ForkGuarded::new(|| tmpfile::file_in(self.directory(), mode)));
        let file = match file {
            Err(error) if error.kind() == Io::Unsupported => return self.take_over().map(Some),
            file => file.map_err(failed)?,
        };
        if !write_lock::try_lock(&file).map_err(|error| Error::io("lock", &self.path, error))? {
            return Err(Error::io(
                "lock",
                &self.path,
                io::Error::from(Io::WouldBlock),
            ));
        }
        let written = write_owner(&self.path, &file, &owner)?;
        if let Some(mode) = self.mode {
            files::set_mode(&file, mode)
                .map_err(|error| Error::io("set the mode of", &self.path, error))?;
            step("mode set");
        }
        match tmpfile::name(&file, &self.path) {
            Ok(()) => {}
            Err(error) if error.kind() == Io::AlreadyExists => return Ok(None),
            Err(error) if error.kind() == Io::Unsupported => {
                drop(file);
                return self.take_over().map(Some);
            }
            Err(error) => return Err(failed(error)),
        }
        step("file named");
        Ok(Some(Attempt::Acquired(PidGuard::new(
            &self.path, file, written, None,
        ))))
    }

    /// Replaces a free file by a file of this process.
    fn take_over(&self) -> Result<Attempt> {
        let owner = Owner::current();
        let taker_file = match self.lock_taker_file("replace")? {
            TakerLock::Acquired(taker_file) => taker_file,
            TakerLock::Busy(error) => return Ok(Attempt::Busy(error)),
        };
        let (existing, predecessor) = match self.judge()? {
            None => (None, None),
            Some(existing) => match self.availability(existing)? {
                Availability::Unavailable(attempt) => return Ok(attempt),
                Availability::Free(file, predecessor) => (Some(file), predecessor),
            },
        };
        let written = write_owner(&self.path, &taker_file.file, &owner)?;
        let failed = |error| Error::io("replace", &self.path, error);
        // Only a program that ignores the takers' protocol can have changed what the path names.
        let renamed = match existing {
            Some(file) => {
                if !is_at(&self.path, &file)? {
                    return Ok(Attempt::Busy(None));
                }
                // Windows does not always replace an open file.
                drop(file);
                fs::rename(taker_file.path(), &self.path)
            }
            None => files::rename_new(taker_file.path(), &self.path),
        };
        match renamed {
            // `NotFound`: the taker file was removed by hand.
            Err(error) if matches!(error.kind(), Io::AlreadyExists | Io::NotFound) => {
                return Ok(Attempt::Busy(None));
            }
            // Windows replaces no file that another process has open, for example to inspect it.
            Err(error) if cfg!(windows) && error.kind() == Io::PermissionDenied => {
                return Ok(Attempt::Busy(None));
            }
            renamed => renamed.map_err(failed)?,
        }
        step("file named");
        let file = taker_file.into_pidfile();
        if !is_at(&self.path, &file)? {
            // The taker file was removed by hand, and the renamed file was that of the next taker.
            return Ok(Attempt::Busy(None));
        }
        // Not earlier: others could lock a taker file that a crash left and that they may read.
        if let Err(error) = self.set_final_mode(&file) {
            let _ = fs::remove_file(&self.path);
            step("file removed");
            return Err(Error::io("set the mode of", &self.path, error));
        }
        Ok(Attempt::Acquired(PidGuard::new(
            &self.path,
            file,
            written,
            predecessor,
        )))
    }

    fn set_final_mode(&self, file: &File) -> io::Result<()> {
        let mode = match self.mode {
            Some(mode) => mode,
            // The permissions that the file system sets, which may depend on more than the umask.
            None => match tmpfile::file_in(self.directory(), DEFAULT_MODE) {
                Ok(like) => files::mode_of(&like)?,
                Err(error) if error.kind() == Io::Unsupported => files::new_file_mode(DEFAULT_MODE),
                Err(error) => return Err(error),
            },
        };
        files::set_mode(file, mode)?;
        step("mode set");
        Ok(())
    }
}

lock_methods!(
    PidFile, PidGuard,
    in_tasks: "A free pidfile is acquired in the call, which blocks for as long as the file system needs. A thread \
               of its own waits for a pidfile that is held, under any runtime ([`Io`](crate::ErrorKind::Io) if none \
               can be started). When the future is dropped, that thread wakes at once, closes its file and ends. It \
               releases a lock that it acquires at the same moment."
);
