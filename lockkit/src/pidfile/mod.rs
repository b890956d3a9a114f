//! A lock on a path whose file names its holder: the pidfile of a daemon.
//!
//! The holder of a pidfile has a write lock on the file's open file ([`write_lock`]) for as long as it lives, and the
//! file contains its pid. [`verdict`] judges an existing file; [`record`] defines the content of a file.
//!
//! # Implementation
//! No acquisition locks an existing pidfile: any user with read permission could also hold a lock on it. A holder has
//! its own file, which is complete and locked before the path names it.
//!
//! - Absent path: the file is created without a name (`O_TMPFILE`), and link(2) names it if no other file has the name.
//! - Blank or stale file: the file is created as `.NAME.lockkit` in the same directory, with permissions only for users
//!   that may write the pidfile. The write lock on it serializes takers: the taker judges the pidfile again and renames
//!   its own file over it. A crash leaves `.NAME.lockkit`, which the next taker uses.
//! - The second procedure also applies to an absent path if the file system has no nameless files, or if the taker
//!   finds a `.NAME.lockkit`.
//!
//! A release removes the file, then releases the lock. A wait without a limit sleeps in the kernel until the write lock
//! of the file is released (`F_OFD_SETLKW` for a read lock). Then it judges the path again.
//!
//! # Fork
//! Forked children share the open file, as in FreeBSD's pidfile(3): a daemon's parent may end before the child calls
//! `rewrite`, and no other process can acquire the lock in between. So if the parent is killed, a child that has not
//! dropped its copy of the guard holds the lock until the child ends. A release by the parent frees it all the same.

mod record;
mod verdict;

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind as Io};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

#[cfg(feature = "tokio")]
use crate::base::blocking;
use crate::base::error::{self, Error, ErrorKind, Result};
use crate::base::guard::{Guard, Recovered};
use crate::base::lock::lock_methods;
use crate::base::lock_info::LockInfo;
use crate::base::owner::{Liveness, Owner};
use crate::base::telemetry;
use crate::base::wait::{Backoff, Wait};
use crate::file_lock;
use crate::sys::failpoint::step;
use crate::sys::files::{self, DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, Seen};
use crate::sys::flock::{self, Mode as FlockMode};
use crate::sys::fnv;
use crate::sys::fork::{ForkGuarded, ProcessId};
use crate::sys::process_local::ProcessLocal;
use crate::sys::{tmpfile, write_lock, xattr};
use record::Content;
use verdict::Verdict;

/// How often in a row the file may be replaced during an attempt before the attempt counts it as held.
const MAX_REPLACEMENTS: u32 = 100;

/// How long a call that does not wait for the lock waits for another taker. A taker that is not stopped needs
/// microseconds.
const TAKER_TIMEOUT: Duration = Duration::from_secs(1);

/// The permissions of a new file, less the umask.
const DEFAULT_MODE: u32 = 0o644;

/// A lock on a path whose file contains the holder's pid.
///
/// For daemons: `kill $(cat /run/app.pid)`, systemd's `PIDFile=` and other readers find the pid and a line end, nothing
/// else. Dropping the guard releases the lock and removes the file. Exactly one later acquisition takes over a file
/// that a crash left behind. A pidfile that another program wrote, without any lock, counts as held while its process
/// lives.
///
/// The extended attribute `user.lockkit` of the file contains the identity of the holder, beyond the pid. On a file
/// system without such attributes, the file's time and the start time of the process show whether a later process has
/// the pid. This method has two limits:
/// - A pid that was reused within a minute of the file's last write counts as the holder's.
/// - A clock that was set forward by more than a minute makes a process without a lock on its file look like a later
///   one.
///
/// A program that closes descriptors which it did not open, as close_range(2) does, keeps this lock: the file still
/// names it. No other file of the program is closed. See [the crate page](crate#descriptors-that-the-program-closes).
///
/// Do not use it to guard data (use [`FileLock`](crate::FileLock)), or for a single instance that needs no visible file
/// (use [`NamedLock`](crate::NamedLock)).
///
/// # Files of other programs
///
/// A file contains one or more pids if it begins with a decimal number. Only white space or blank lines may come before
/// the number, and white space, a NUL or the end of the file must follow. Such a file is held while any of the
/// processes may live, and taken over when all are proven dead. A blank file is taken over when it is 2 s old, and a
/// line end alone at once. Every other file is [`NotAPidFile`](ErrorKind::NotAPidFile) and is not changed, and neither
/// is a file longer than 4096 bytes.
///
/// | program | what it writes | how `PidFile` reads it |
/// |---|---|---|
/// | nginx, redis, mysqld, cron, exim, start-stop-daemon | `4242\n` | pid 4242 |
/// | pidfile(3) of BSD, Python scripts, a shell | `4242` or `4242\n` | pid 4242 |
/// | X server, UUCP, postfix | `      4242\n` | pid 4242 |
/// | minicom, gammu | `      4242 minicom root\n`, `04242 minicom root\n`, `      4242 gammu\n` | pid 4242 |
/// | PostgreSQL (`postmaster.pid`) | `4242\n`, then a path, times and a port by line | pid 4242 |
/// | PostgreSQL in single-user mode | `-4242\n`, then the same | no pidfile |
/// | sendmail | `4242\n`, then the command line | pid 4242 |
/// | haproxy before 2.5, with `nbproc` | `4242\n4243\n`, a pid for each process | each of them |
/// | scripts for RHEL and LSB | `4242 4243\n` | each of them |
/// | git (`gc.pid`), shell scripts | `4242 HOST`, and no blank before it | pid 4242, if it is this host; else held, because this host cannot tell. Git itself takes it over after 12 hours |
/// | QLockFile of Qt | `4242\nPROGRAM\nHOST\n`, then two lines more | the same |
/// | C programs that write their buffer | `4242\0` | pid 4242 |
/// | old UUCP programs | the pid as four binary bytes | no pidfile; where the bytes read as a number, both pids |
/// | pidfile(3) of BSD, before its program writes | nothing, with a flock | held while the flock is |
/// | apt, dpkg | nothing, with an fcntl lock while they run | held while they run, and then blank |
/// | Emacs, Chromium, Firefox | a symbolic link to `user@host.4242:170000`, `host-4242`, `127.0.0.1:+4242` | refused; where a file has this text, no pidfile |
///
/// A number after the pid is taken for another pid, so a file with the time or a port there may count as held.
///
/// | reader | what it finds in a file of lockkit's |
/// |---|---|
/// | `kill $(cat FILE)`, `read pid < FILE` | one word, the pid |
/// | systemd `PIDFile=` | one line, the pid. It removes the file after the service has ended |
/// | start-stop-daemon, `pgrep -F`, `pkill -F` | the pid. start-stop-daemon refuses a file that all users may write, and by itself one of another user's or group's |
/// | `pgrep -L -F` | a locked file, and the pid |
/// | pidofproc (LSB), `__pids_var_run` (RHEL) | the pid |
/// | flock(1), pidfile(3) of BSD, the crate fslock | a locked file |
/// | the crate pidlock, nightlyone's lockfile | the pid of a live process |
///
/// # Security
///
/// Another user that has only read permission cannot delay an acquisition or a release, whatever locks that user takes.
/// There are two exceptions:
/// - On systems without locks of open files, such as macOS, FreeBSD and Windows, a reader's flock can.
/// - A flock counts on a blank file, and on a file that has no identity and names a dead process, if the holder of the
///   flock may be hidden from this process. The holder may be hidden from a process in a container, and from users
///   other than root and the file's owner.
///
/// Keep pidfiles in a directory that others cannot write to. In a directory such as `/tmp`, they can create the file
/// first, and block you or give a false pid.
///
/// # Examples
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = std::env::temp_dir().join(format!("lockkit-doc-pidfile-{}", std::process::id()));
/// # std::fs::create_dir_all(&directory)?;
/// # let path = directory.join("app.pid");
/// use lockkit::{PidFile, PidStatus};
///
/// let guard = PidFile::new(&path)?.try_lock()?;
/// assert_eq!(std::fs::read_to_string(&path)?, format!("{}\n", std::process::id()));
/// assert!(matches!(PidFile::inspect(&path)?, PidStatus::Running(owner) if owner.pid() == std::process::id()));
/// guard.release()?;
/// assert!(matches!(PidFile::inspect(&path)?, PidStatus::Absent));
/// # std::fs::remove_dir_all(directory)?;
/// # Ok(()) }
/// ```
///
/// With its own directory, for a daemon whose files its group may read:
///
/// ```
/// use lockkit::{PidFile, Wait};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = std::env::temp_dir().join(format!("lockkit-doc-pidfile-directory-{}", std::process::id()));
/// let pidfile = PidFile::new(directory.join("app/app.pid"))?.create_parents().create_with_mode(0o640);
/// let guard = pidfile.acquire(&Wait::none())?;
/// # drop(guard);
/// # std::fs::remove_dir_all(directory)?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct PidFile {
    path: Arc<Path>,
    mode: Option<u32>,
    create_parents: bool,
}

/// The state of a pidfile; see [`PidFile::inspect`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PidStatus {
    /// There is no file.
    Absent,
    /// It names a process that lives, that may live, or that has the file locked. For a file that another program
    /// wrote, the owner's `acquired` is the time of that write.
    Running(Owner),
    /// A process has it locked, and neither the file nor the system identifies that process.
    Locked,
    /// It names only processes that are proven dead, though a later process may have the pid. This is the first of
    /// them. The next acquisition takes the file over.
    Stale(Owner),
    /// It is blank. An acquisition takes it over when it is 2 s old: until then a program may be about to write it. A
    /// line end alone is what lockkit leaves in a file that it cannot remove, and is taken over at once.
    Blank {
        /// The time since its last write, by the wall clock; zero for a time in the future.
        age: Duration,
        /// Whether an acquisition would take it over now.
        is_free: bool,
    },
    /// It contains something other than a pid. No acquisition changes it.
    Invalid {
        /// The rule of pidfiles that it violates.
        rule: &'static str,
    },
}

/// The result of one attempt.
enum Attempt {
    Taken(PidGuard),
    /// A process has the write lock on this file.
    Locked(ForkGuarded<File>),
    /// The content of the file counts as held, without a write lock.
    Claimed,
    /// Another taker is at work, or the file has just been replaced. The error is the one to return if that lasts.
    Busy(Option<Error>),
}

/// Whether this process excludes all other takers.
enum Begun {
    Alone(Taking),
    /// Another taker is at work. The error is the one to return if that lasts.
    Busy(Option<Error>),
}

/// The files of this process's guards, by device and inode. Any other file that names this process is from before an
/// exec, or from a supervisor.
fn held_files() -> &'static Mutex<HashSet<(u64, u64)>> {
    static HELD: ProcessLocal<Mutex<HashSet<(u64, u64)>>> = ProcessLocal::new();
    HELD.get_or_make(Mutex::default)
}

/// The meaning of a file for an attempt.
enum Claim {
    Kept(Attempt),
    /// The file can be taken over. It contains the dead owner that left the file, if any.
    Free(ForkGuarded<File>, Option<Box<Owner>>),
}

/// An existing file, and its meaning.
struct Judged {
    file: ForkGuarded<File>,
    seen: Seen,
    verdict: Verdict,
    bytes: Vec<u8>,
}

impl PidFile {
    /// Creates a lock on the pidfile at `path`. Nothing happens to the file until it is locked.
    ///
    /// # Errors
    /// [`RelativePath`](ErrorKind::RelativePath) unless the path is absolute, because daemons change their working
    /// directory.
    pub fn new(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        check_absolute(&path)?;
        Ok(Self { path: path.into(), mode: None, create_parents: false })
    }

    /// Sets exactly these permissions for the file, whatever the process's umask is. Without this call they are 0644
    /// less the umask, so that others can read the file.
    ///
    /// Several users of a shared directory can take over each other's files, as long as they may read the file and
    /// write the directory. With permissions that let a group or all others write, these users may also use what a
    /// killed taker left (`.NAME.lockkit`). Without such permissions, only its owner or root can.
    ///
    /// The mode must let the owner read. An acquisition fails with [`InvalidOption`](ErrorKind::InvalidOption)
    /// otherwise.
    pub fn create_with_mode(mut self, mode: u32) -> Self {
        self.mode = Some(mode);
        self
    }

    /// Creates missing parent directories, too, with mode 0755 less the umask. A release does not remove them.
    pub fn create_parents(mut self) -> Self {
        self.create_parents = true;
        self
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Acquires the lock, waiting as `wait` says.
    ///
    /// A wait without a limit for a holder that has the file locked sleeps in the kernel. A wait with a limit or a
    /// token, and any wait for a process without a lock, polls every few milliseconds. Waiters have no order.
    ///
    /// `Wait::none()` never waits for a holder. If another process is taking over a stale file, the call waits up to 1
    /// s for the result.
    ///
    /// # Errors
    /// - [`Held`](ErrorKind::Held), [`Timeout`](ErrorKind::Timeout) or [`Cancelled`](ErrorKind::Cancelled), as `wait`
    ///   says.
    /// - [`NotAPidFile`](ErrorKind::NotAPidFile) for a file that contains something other than a pid; also while
    ///   waiting.
    /// - [`Insecure`](ErrorKind::Insecure) for a symbolic or hard link.
    /// - [`InvalidOption`](ErrorKind::InvalidOption) for a [mode](Self::create_with_mode) that denies the owner access.
    /// - [`Io`](ErrorKind::Io) if the file cannot be read, created, locked or written.
    ///
    /// On an error an existing file is unchanged, and an absent file stays absent. There is one exception: if the file
    /// has replaced a stale one and its permissions cannot be set, the file is removed.
    pub fn acquire(&self, wait: &Wait) -> Result<PidGuard> {
        telemetry::acquire(self, || self.take(wait))
    }

    #[cfg(feature = "tokio")]
    async fn take_async(&self, wait: &Wait) -> Result<PidGuard> {
        let lock = self.clone();
        let taking = blocking::at_once_or_on_a_thread(wait, self, move |wait| lock.take(wait));
        telemetry::acquire_async(self, taking).await
    }

    fn take(&self, wait: &Wait) -> Result<PidGuard> {
        wait.check(self)?;
        file_lock::check_mode(self.mode)?;
        let mut backoff = Backoff::new();
        let mut patience = None;
        let mut busy_since: Option<Instant> = None;
        loop {
            let attempt = self.attempt()?;
            if !matches!(attempt, Attempt::Busy(_)) {
                busy_since = None;
            }
            let locked = match attempt {
                Attempt::Taken(guard) => return Ok(guard),
                Attempt::Locked(file) => Some(file),
                Attempt::Claimed => None,
                Attempt::Busy(why) => {
                    // A live taker needs only a moment. A call that does not wait allows that time, too.
                    let is_over = busy_since.get_or_insert_with(Instant::now).elapsed() >= TAKER_TIMEOUT;
                    match why {
                        Some(error) if is_over => return Err(error),
                        _ if is_over || patience.is_some() => None,
                        _ => {
                            wait.check(self)?;
                            std::thread::sleep(backoff.next());
                            continue;
                        }
                    }
                }
            };
            let patience = match &mut patience {
                Some(patience) => patience,
                none => match wait.state_for(self) {
                    Some(patience) => none.insert(patience),
                    None => return Err(self.held()),
                },
            };
            match locked {
                Some(file) if patience.is_endless() => {
                    write_lock::wait(&file).map_err(|error| Error::io("wait for", &self.path, error))?;
                }
                _ => {
                    if let Err(gave_up) = patience.sleep(backoff.next())? {
                        return Err(patience.error(gave_up, self));
                    }
                }
            }
        }
    }

    /// Returns whether the open file has the extended attribute in which lockkit keeps the identity of a pidfile's owner.
    ///
    /// The attribute distinguishes a pidfile from another file that contains just a number. `false` does not prove that
    /// the file is no pidfile: other programs write none, and some file systems have no attributes.
    ///
    /// ```
    /// # fn main() -> std::io::Result<()> {
    /// # let path = std::env::temp_dir().join(format!("lockkit-doc-counter-{}", std::process::id()));
    /// std::fs::write(&path, "42\n")?;
    /// assert!(!lockkit::PidFile::has_owner_identity(&std::fs::File::open(&path)?));
    /// # std::fs::remove_file(path)
    /// # }
    /// ```
    pub fn has_owner_identity(file: &File) -> bool {
        xattr::get(file, record::NAME, &mut [0; record::MAX_IDENTITY]).is_ok_and(|found| found.is_some())
    }

    /// Returns the state of the file at `path`: a snapshot.
    ///
    /// Changes nothing and waits for no process. It reads at most 4 KiB, and judges as an acquisition does. If the
    /// file is blank, or names a dead process of another program, it briefly takes a shared flock, to check for another
    /// process's flock. It follows a symbolic link, which an acquisition refuses.
    ///
    /// ```
    /// use lockkit::{PidFile, PidStatus};
    /// # fn main() -> lockkit::Result<()> {
    /// match PidFile::inspect("/run/sshd.pid")? {
    ///     PidStatus::Running(owner) => println!("{}", owner.describe()),
    ///     PidStatus::Locked => println!("a process that cannot be seen from here"),
    ///     PidStatus::Stale(owner) => println!("{} died", owner.describe()),
    ///     PidStatus::Absent | PidStatus::Blank { .. } => println!("no process"),
    ///     PidStatus::Invalid { rule } => println!("the file is no pidfile: {rule}"),
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// - [`RelativePath`](ErrorKind::RelativePath) unless the path is absolute.
    /// - [`Io`](ErrorKind::Io) if the file cannot be read, for example without permission, if it is no plain file, or
    ///   if it is a symbolic link to a file that does not exist.
    pub fn inspect(path: impl AsRef<Path>) -> Result<PidStatus> {
        let path = path.as_ref();
        check_absolute(path)?;
        let failed = |error| Error::io("read", path, error);
        let open = || {
            // The check comes first, because the open of a FIFO or a device may have effects.
            if !fs::metadata(path)?.is_file() {
                return Err(not_a_plain_file());
            }
            ForkGuarded::new(|| files::open(OpenOptions::new().read(true).custom_flags(files::NONBLOCK), path))
        };
        let file = match open() {
            Err(error) if error.kind() == Io::NotFound => {
                // Some programs keep the pid in the target of such a link.
                if path.is_symlink() {
                    return Err(failed(io::Error::new(
                        Io::NotFound,
                        "it is a symbolic link to a file that does not exist",
                    )));
                }
                return Ok(PidStatus::Absent);
            }
            opened => opened.map_err(failed)?,
        };
        let (verdict, _) = verdict::judge(path, &file).map_err(failed)?;
        Ok(match verdict {
            Verdict::Held { owner: Some(owner), .. } | Verdict::Own(owner) => PidStatus::Running(owner),
            Verdict::Held { owner: None, .. } => PidStatus::Locked,
            Verdict::Stale(owner) => PidStatus::Stale(owner),
            Verdict::Blank { age, young } => PidStatus::Blank { age, is_free: !young },
            Verdict::Other(rule) => PidStatus::Invalid { rule },
        })
    }

    /// Removes the file at `path` if it is stale, and returns whether it did. It excludes other takers meanwhile, so it
    /// never removes the file of a process that has just taken it over.
    ///
    /// ```
    /// # fn main() -> lockkit::Result<()> {
    /// if lockkit::PidFile::remove_stale("/run/lockkit-doc-app.pid")? {
    ///     println!("it was stale");
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// - [`RelativePath`](ErrorKind::RelativePath) unless the path is absolute.
    /// - [`NotAPidFile`](ErrorKind::NotAPidFile) for a file that contains something other than a pid.
    /// - [`Insecure`](ErrorKind::Insecure) for a symbolic or hard link.
    /// - [`Io`](ErrorKind::Io) if the file cannot be read or removed.
    pub fn remove_stale(path: impl Into<PathBuf>) -> Result<bool> {
        let pid_file = Self::new(path)?;
        let path = &*pid_file.path;
        let failed = |error| Error::io("remove", path, error);
        let (mut backoff, since) = (Backoff::new(), Instant::now());
        while pid_file.stale()?.is_some() {
            let taking = match pid_file.begin("remove")? {
                Begun::Alone(taking) => taking,
                Begun::Busy(_) if since.elapsed() < TAKER_TIMEOUT => {
                    std::thread::sleep(backoff.next());
                    continue;
                }
                Begun::Busy(Some(error)) => return Err(error),
                Begun::Busy(None) => break,
            };
            let Some(judged) = pid_file.stale()? else { break };
            if is_at(path, &judged.file)? {
                fs::remove_file(path).map_err(failed)?;
                step("stale file removed");
                drop(taking);
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Returns whether [`remove_stale`](Self::remove_stale) would remove the file at `path` now. Changes nothing.
    ///
    /// ```
    /// # fn main() -> lockkit::Result<()> {
    /// assert!(!lockkit::PidFile::is_stale("/run/lockkit-doc-none.pid")?);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`remove_stale`](Self::remove_stale); also [`Io`](ErrorKind::Io) if this process may not remove the file.
    pub fn is_stale(path: impl Into<PathBuf>) -> Result<bool> {
        let pid_file = Self::new(path)?;
        let Some(judged) = pid_file.stale()? else { return Ok(false) };
        let may = files::check_removable(pid_file.directory(), &judged.seen);
        may.map_err(|error| Error::io("remove", &pid_file.path, error))?;
        let taker = pid_file.taker_path();
        let Some(file) = pid_file.open_taker(&taker)? else { return Ok(true) };
        let failed = |error| Error::io("look at", &taker, error);
        // A taker that holds its file for so long is stopped.
        let (mut backoff, since) = (Backoff::new(), Instant::now());
        while write_lock::holder(&file).map_err(failed)?.is_some() {
            if since.elapsed() >= TAKER_TIMEOUT {
                return Ok(false);
            }
            std::thread::sleep(backoff.next());
        }
        pid_file.check_taker(&taker, &file).map(|_| true)
    }

    /// Returns the existing file, if it is stale.
    fn stale(&self) -> Result<Option<Judged>> {
        let Some(judged) = self.judge()? else { return Ok(None) };
        match judged.verdict {
            Verdict::Stale(_) => Ok(Some(judged)),
            Verdict::Other(rule) => Err(self.not_a_pidfile(&judged.bytes, rule)),
            Verdict::Held { .. } | Verdict::Own(_) | Verdict::Blank { .. } => Ok(None),
        }
    }

    fn attempt(&self) -> Result<Attempt> {
        for _ in 0..MAX_REPLACEMENTS {
            let attempt = match self.judge()? {
                // An acquisition that finds a live or killed taker's file becomes a taker itself. So a taker that is
                // stopped over a stale file still excludes others after that file was removed by hand.
                None if !self.has_taker() => match self.create()? {
                    Some(attempt) => attempt,
                    None => continue,
                },
                None => self.take_over()?,
                Some(judged) => match self.claim(judged)? {
                    Claim::Kept(attempt) => attempt,
                    // Closed first, for Windows replaces no file that is open.
                    Claim::Free(file, _) => {
                        drop(file);
                        self.take_over()?
                    }
                },
            };
            return Ok(attempt);
        }
        Ok(Attempt::Busy(None))
    }

    fn claim(&self, judged: Judged) -> Result<Claim> {
        match judged.verdict {
            Verdict::Held { by_lock: true, .. } => Ok(Claim::Kept(Attempt::Locked(judged.file))),
            Verdict::Held { .. } | Verdict::Blank { young: true, .. } => Ok(Claim::Kept(Attempt::Claimed)),
            Verdict::Other(rule) => Err(self.not_a_pidfile(&judged.bytes, rule)),
            // The program has closed the descriptor of a guard, and with it the lock.
            Verdict::Own(_) if held_files().lock().contains(&file_id(&judged.seen)) => {
                Ok(Claim::Kept(Attempt::Claimed))
            }
            Verdict::Stale(owner) => Ok(Claim::Free(judged.file, Some(Box::new(owner)))),
            Verdict::Own(_) | Verdict::Blank { .. } => Ok(Claim::Free(judged.file, None)),
        }
    }

    /// Judges the file that the path names. Returns `None` if there is none.
    fn judge(&self) -> Result<Option<Judged>> {
        let path = &*self.path;
        // The check comes first, because the open of a FIFO or a device may have effects.
        match files::look_at_link(path) {
            Err(error) if error.kind() == Io::NotFound => return Ok(None),
            seen => self.check_plain(&seen.map_err(|error| Error::io("look at", path, error))?)?,
        }
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(files::NOFOLLOW | files::NONBLOCK);
        let file = match ForkGuarded::new(|| files::open(&options, path)) {
            Err(error) if error.kind() == Io::NotFound => return Ok(None),
            opened => opened.map_err(|error| Error::io("open", path, error))?,
        };
        // Checked again, because another file may have been put there in between.
        let seen = files::look(&file).map_err(|error| Error::io("look at", path, error))?;
        self.check_plain(&seen)?;
        let (verdict, bytes) = verdict::judge(path, &file).map_err(|error| Error::io("read", path, error))?;
        Ok(Some(Judged { file, seen, verdict, bytes }))
    }

    /// Rejects files that must not be replaced.
    fn check_plain(&self, seen: &Seen) -> Result<()> {
        let problem = match seen {
            seen if seen.is_symlink() => "it is a symbolic link; use the path that it leads to",
            seen if !seen.is_file() => return Err(Error::io("lock", &self.path, not_a_plain_file())),
            seen if seen.nlink() > 1 => "it is a hard link to a file that has other names",
            _ => return Ok(()),
        };
        Err(ErrorKind::Insecure { path: self.path.to_path_buf(), problem }.into())
    }

    /// Creates the file, complete and locked before the path names it. Returns `None` if another file has the name by
    /// now.
    fn create(&self) -> Result<Option<Attempt>> {
        let failed = |error| Error::io("create", &self.path, error);
        // Read before the file is created, which may take the last descriptor.
        let me = Owner::current();
        // Without a name no other process can open it, whatever its permissions are.
        let mode = self.mode.map_or(DEFAULT_MODE, |_| 0o600);
        let file = self.with_parents(|| ForkGuarded::new(|| tmpfile::file_in(self.directory(), mode)));
        let file = match file {
            Err(error) if error.kind() == Io::Unsupported => return self.take_over().map(Some),
            file => file.map_err(failed)?,
        };
        if !write_lock::try_lock(&file).map_err(|error| Error::io("lock", &self.path, error))? {
            return Err(Error::io("lock", &self.path, io::Error::from(Io::WouldBlock)));
        }
        let written = self.fill(&file, &me)?;
        if let Some(mode) = self.mode {
            files::set_mode(&file, mode).map_err(|error| Error::io("set the mode of", &self.path, error))?;
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
        Ok(Some(self.guard(file, written, None)))
    }

    /// Writes the owner into a new file whose write lock this process holds.
    fn fill(&self, file: &File, owner: &Owner) -> Result<Written> {
        // The file is new, so no other process can have a flock on it.
        lock_for_others(file).map_err(|error| Error::io("lock", &self.path, error))?;
        let text = record::content(owner.pid);
        file.write_all_at(text.as_bytes(), 0).map_err(|error| Error::io("write", &self.path, error))?;
        step("pid written");
        let seen = files::look(file).map_err(|error| Error::io("look at", &self.path, error))?;
        Ok(Written { text, identified: identify(file, &seen, owner), numbers: file_id(&seen) })
    }

    /// Calls `make`. If the directory is missing and [`create_parents`](Self::create_parents) is set, creates the
    /// directory and calls `make` again.
    fn with_parents<T>(&self, make: impl Fn() -> io::Result<T>) -> io::Result<T> {
        match (make(), self.path.parent()) {
            (Err(error), Some(directory)) if error.kind() == Io::NotFound && self.create_parents => {
                DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
                step("directories made");
                make()
            }
            (made, _) => made,
        }
    }

    /// Replaces a free file by a file of this process.
    fn take_over(&self) -> Result<Attempt> {
        let me = Owner::current();
        let taking = match self.begin("replace")? {
            Begun::Alone(taking) => taking,
            Begun::Busy(why) => return Ok(Attempt::Busy(why)),
        };
        let (judged, died) = match self.judge()? {
            None => (None, None),
            Some(judged) => match self.claim(judged)? {
                Claim::Kept(attempt) => return Ok(attempt),
                Claim::Free(file, died) => (Some(file), died),
            },
        };
        let written = self.fill(&taking.file, &me)?;
        let failed = |error| Error::io("replace", &self.path, error);
        // Only a program that ignores the takers' protocol can have changed what the path names.
        let renamed = match judged {
            Some(file) => {
                if !is_at(&self.path, &file)? {
                    return Ok(Attempt::Busy(None));
                }
                // Windows does not always replace an open file.
                drop(file);
                fs::rename(&taking.name.path, &self.path)
            }
            None => files::rename_new(&taking.name.path, &self.path),
        };
        match renamed {
            // `NotFound`: the taker file was removed by hand.
            Err(error) if matches!(error.kind(), Io::AlreadyExists | Io::NotFound) => return Ok(Attempt::Busy(None)),
            // Windows replaces no file that another process has open, as to look at it.
            Err(error) if cfg!(windows) && error.kind() == Io::PermissionDenied => return Ok(Attempt::Busy(None)),
            renamed => renamed.map_err(failed)?,
        }
        step("file named");
        let file = taking.finish();
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
        Ok(self.guard(file, written, died))
    }

    fn set_final_mode(&self, file: &File) -> io::Result<()> {
        let mode = match self.mode {
            Some(mode) => mode,
            // The permissions that the file system sets, which may depend on more than the umask.
            None => match tmpfile::file_in(self.directory(), DEFAULT_MODE) {
                Ok(like) => files::mode_of(&like)?,
                Err(error) if error.kind() == Io::Unsupported => files::mode_of_new(DEFAULT_MODE),
                Err(error) => return Err(error),
            },
        };
        files::set_mode(file, mode)?;
        step("mode set");
        Ok(())
    }

    /// Excludes all other takers. `action` is what the taker is about to do to the file, for errors.
    ///
    /// A process changes, moves and removes the taker file only if it has the write lock and the name leads to that
    /// file. Only users that may write the pidfile can open the taker file, so no other user can have a lock on it.
    fn begin(&self, action: &'static str) -> Result<Begun> {
        let path = self.taker_path();
        let shared = self.mode.unwrap_or_default() & 0o022;
        // A user that may write the pidfile may read and write the taker file.
        let mode = 0o600 | shared | shared << 1;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(mode).custom_flags(files::NOFOLLOW | files::NONBLOCK);
        let made = self.with_parents(|| ForkGuarded::new(|| files::create(&options, &path)));
        let (file, made) = match made {
            Ok(file) => {
                step("file of takers made");
                (file, true)
            }
            Err(error) if error.kind() == Io::AlreadyExists => match self.open_taker(&path) {
                Ok(Some(file)) => (file, false),
                Ok(None) => return Ok(Begun::Busy(None)),
                // The file belongs to another user's taker, which will finish soon or was killed.
                Err(error) if error.is_io(Io::PermissionDenied) => return Ok(Begun::Busy(Some(error))),
                Err(error) => return Err(error),
            },
            Err(error) => return Err(Error::io(action, &self.path, error)),
        };
        match write_lock::try_lock(&file) {
            Ok(true) => {}
            Ok(false) => return Ok(Begun::Busy(None)),
            Err(error) => {
                // If it was not made here, another process may have locked it already.
                if made && flock::is_unsupported(&error) {
                    let _ = fs::remove_file(&path);
                    step("file of takers removed");
                }
                return Err(Error::io("lock", &self.path, error));
            }
        }
        if !is_at(&path, &file)? {
            return Ok(Begun::Busy(None));
        }
        let seen = self.check_taker(&path, &file)?;
        let taking = Taking { name: TakerName { path, is_gone: false }, file };
        if !files::is_own(&seen) {
            // It was left by another user's process. Dropping `taking` removes it.
            return Ok(Begun::Busy(None));
        }
        let failed = |error| Error::io(action, &self.path, error);
        if seen.len() > 0 {
            taking.file.set_len(0).map_err(failed)?;
            step("file of takers emptied");
        }
        if shared != 0 {
            files::set_mode(&taking.file, mode).map_err(failed)?;
            step("file of takers shared");
        }
        Ok(Begun::Alone(taking))
    }

    /// Opens an existing taker file. Returns `None` if there is none.
    fn open_taker(&self, path: &Path) -> Result<Option<ForkGuarded<File>>> {
        // The check comes first, because the open of a FIFO or a device may have effects.
        match files::look_at_link(path) {
            Err(error) if error.kind() == Io::NotFound => return Ok(None),
            seen => check_plain_taker(path, &seen.map_err(|error| Error::io("look at", path, error))?)?,
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(files::NOFOLLOW | files::NONBLOCK);
        match ForkGuarded::new(|| files::open(&options, path)) {
            Err(error) if error.kind() == Io::NotFound => Ok(None),
            opened => opened.map(Some).map_err(|error| Error::io("open", path, error)),
        }
    }

    /// Rejects a file with the name of the taker file that no taker has created.
    fn check_taker(&self, path: &Path, file: &File) -> Result<Seen> {
        let seen = files::look(file).map_err(|error| Error::io("look at", path, error))?;
        check_plain_taker(path, &seen)?;
        let bytes = verdict::read(file).map_err(|error| Error::io("read", path, error))?;
        match record::parse(&bytes) {
            Content::Blank | Content::Pids { alone: true, .. } => Ok(seen),
            _ => {
                let problem = "it contains something else than a pid, and its name is that of the file by which takers of a \
                               pidfile keep each other out; move it away";
                Err(ErrorKind::Insecure { path: path.to_owned(), problem }.into())
            }
        }
    }

    /// Returns whether a taker is at work, or was killed.
    fn has_taker(&self) -> bool {
        files::look_at_link(&self.taker_path()).is_ok()
    }

    /// Returns `.NAME.lockkit` in the directory of the file; a hash replaces a name that would be too long.
    fn taker_path(&self) -> PathBuf {
        /// The limit of Linux and most other systems, in bytes.
        const NAME_MAX: usize = 255;
        let name = self.path.file_name().unwrap_or_default();
        let mut own = OsString::from(".");
        own.push(name);
        own.push(".lockkit");
        if own.len() > NAME_MAX {
            own = format!(".{:016x}.lockkit", fnv::of_bytes(name.to_string_lossy().as_bytes())).into();
        }
        self.directory().join(own)
    }

    fn directory(&self) -> &Path {
        self.path.parent().unwrap_or(&self.path)
    }

    fn guard(&self, file: ForkGuarded<File>, written: Written, died: Option<Box<Owner>>) -> Attempt {
        held_files().lock().insert(written.numbers);
        Attempt::Taken(PidGuard {
            file: Some(file.know_as(written.numbers).keep_across_fork()),
            path: self.path.clone(),
            written,
            process: ProcessId::current(),
            recovered: died.map(|owner| Box::new(Recovered::new(Some(*owner)))),
        })
    }

    fn not_a_pidfile(&self, bytes: &[u8], rule: &'static str) -> Error {
        ErrorKind::NotAPidFile { path: self.path.to_path_buf(), text: error::first_line(bytes), rule }.into()
    }
}

lock_methods!(
    PidFile, PidGuard,
    in_tasks: "A free pidfile is acquired in the call, which blocks for as long as the file system needs. A thread \
               of its own waits for a pidfile that is held, under any runtime ([`Io`](crate::ErrorKind::Io) if none \
               can be started). When the future is dropped, that thread wakes at once, closes its file and ends. It \
               releases a lock that it acquires at the same moment."
);

impl LockInfo for PidFile {
    fn describe(&self) -> String {
        format!("the pidfile {}", self.path.display())
    }

    #[cfg(feature = "tracing")]
    fn label(&self) -> (&'static str, String) {
        ("pidfile", self.path.display().to_string())
    }

    fn holder(&self) -> Option<Owner> {
        match Self::inspect(&self.path) {
            Ok(PidStatus::Running(owner)) => Some(owner),
            _ => None,
        }
    }
}

/// The taker file, whose write lock excludes all other takers. A drop removes the file while it is still locked.
struct Taking {
    name: TakerName,
    file: ForkGuarded<File>,
}

impl Taking {
    /// Returns the file, which has become the pidfile.
    fn finish(self) -> ForkGuarded<File> {
        let Self { mut name, file } = self;
        name.is_gone = true;
        file
    }
}

struct TakerName {
    path: PathBuf,
    is_gone: bool,
}

impl Drop for TakerName {
    fn drop(&mut self) {
        if !self.is_gone {
            let _ = fs::remove_file(&self.path);
            step("file of takers removed");
        }
    }
}

/// The content and the identity of the file that a holder has written.
#[derive(Debug)]
struct Written {
    /// The whole content of the file.
    text: String,
    /// Whether the file also has the identity of the owner.
    identified: bool,
    /// The device and the inode of the file.
    numbers: (u64, u64),
}

/// Takes the flock, if it is free, for programs that use no other lock.
fn lock_for_others(file: &File) -> io::Result<()> {
    match flock::try_lock(file, FlockMode::Exclusive) {
        Err(error) if !flock::is_unsupported(&error) => Err(error),
        _ => Ok(()),
    }
}

/// Writes the identity of `owner` to a file that was just written, as `seen` shows, and returns whether that succeeded.
/// Without an identity the file is judged by its pid and its time, so a full or unsupported attribute does no harm.
fn identify(file: &File, seen: &Seen, owner: &Owner) -> bool {
    let identity = seen.modified().ok().and_then(|written| record::identity(owner, written));
    identity.is_some_and(|identity| xattr::set(file, record::NAME, &identity).is_ok())
}

fn check_plain_taker(path: &Path, seen: &Seen) -> Result<()> {
    let problem = "it is no plain file, or has other names, and its name is that of the file by which takers of a pidfile \
                   keep each other out; remove it";
    match seen.is_file() && seen.nlink() <= 1 {
        true => Ok(()),
        false => Err(ErrorKind::Insecure { path: path.to_owned(), problem }.into()),
    }
}

fn check_absolute(path: &Path) -> Result<()> {
    match path.is_absolute() {
        true => Ok(()),
        false => Err(ErrorKind::RelativePath { path: path.to_owned() }.into()),
    }
}

fn not_a_plain_file() -> io::Error {
    io::Error::new(Io::InvalidInput, "it is no plain file")
}

/// By which a file is known: its device and inode. On Windows by its id alone, for Wine forgets the volume of an open file
/// that is renamed.
fn file_id(seen: &Seen) -> (u64, u64) {
    (if cfg!(windows) { 0 } else { seen.dev() }, seen.ino())
}

/// Returns whether `path` names the open `file`.
fn is_at(path: &Path, file: &File) -> Result<bool> {
    let open = files::look(file).map_err(|error| Error::io("look at", path, error))?;
    names(path, file_id(&open))
}

/// Returns whether `path` names the file with this device and inode.
fn names(path: &Path, numbers: (u64, u64)) -> Result<bool> {
    match files::look_at_link(path) {
        Ok(named) => Ok(file_id(&named) == numbers),
        Err(error) if error.kind() == Io::NotFound => Ok(false),
        Err(error) => Err(Error::io("look at", path, error)),
    }
}

/// Replaces `old`, the whole content of the file, with `new`. A single write covers all of `old`, so no kill leaves a
/// mixture. If the write fails, `old` is restored.
fn overwrite(file: &File, new: &str, old: &[u8]) -> io::Result<()> {
    let before = file.metadata()?.modified()?;
    let mut bytes = new.as_bytes().to_vec();
    bytes.resize(new.len().max(old.len()), b'\n');
    let written = file.write_all_at(&bytes, 0).and_then(|()| {
        step("record written");
        match new.len() < old.len() {
            true => file.set_len(new.len() as u64).map(|()| step("rest cut off")),
            false => Ok(()),
        }
    });
    if written.is_err() && !verdict::read(file).is_ok_and(|bytes| bytes == old) {
        let _ = file.write_all_at(old, 0);
        step("old record put back");
        let _ = file.set_len(old.len() as u64);
        step("old length put back");
        let _ = file.set_modified(before);
    }
    written
}

/// A held [`PidFile`]; dropping it removes the file and releases.
///
/// **A fork** copies the guard. As long as the child does not call [`rewrite`](Self::rewrite), the parent is the owner,
/// and dropping the child's copy releases nothing. A child that does not become the owner should drop it. If it keeps
/// the copy and the parent is killed, the file stays locked until the child ends. A program started with exec
/// inherits nothing.
///
/// ```
/// # fn main() -> lockkit::Result<()> {
/// # let path = std::env::temp_dir().join(format!("lockkit-doc-pidguard-{}", std::process::id()));
/// let guard = lockkit::PidFile::new(&path)?.try_lock()?;
/// guard.verify()?; // From time to time, in a daemon that wants to know whether its file is still there.
/// guard.release()?;
/// # Ok(()) }
/// ```
#[must_use = "a guard that is dropped at once releases its lock at once; bind it to a name such as `_guard`"]
#[derive(Debug)]
pub struct PidGuard {
    /// `None` after the release has taken it.
    file: Option<ForkGuarded<File>>,
    path: Arc<Path>,
    written: Written,
    /// Identifies the process that holds the lock, because a forked child has a copy.
    process: ProcessId,
    recovered: Option<Box<Recovered>>,
}

impl PidGuard {
    /// Verifies that the file still exists and has the written content. Until a forked child has called
    /// [`rewrite`](Self::rewrite), that content names its parent; otherwise it names this process.
    ///
    /// # Errors
    /// - [`RogueDeletion`](ErrorKind::RogueDeletion) if another process removed, replaced or rewrote the file.
    /// - [`Io`](ErrorKind::Io) if the file cannot be checked.
    pub fn verify(&self) -> Result<()> {
        let Some(file) = &self.file else { return Err(self.rogue()) };
        let opened = self.open_again(file)?;
        self.verify_open(opened.as_ref().unwrap_or(file))
    }

    fn verify_open(&self, file: &File) -> Result<()> {
        match self.says(file)? == self.written.text.as_bytes() && is_at(&self.path, file)? {
            true => Ok(()),
            false => Err(self.rogue()),
        }
    }

    /// Opens the file through another descriptor, if the program has closed the guard's. The lock is still held,
    /// because the file names a live process. A daemon that closes all inherited descriptors is such a program.
    fn open_again(&self, file: &ForkGuarded<File>) -> Result<Option<ForkGuarded<File>>> {
        if file.is_own() {
            return Ok(None);
        }
        let open = |writing| {
            let mut options = OpenOptions::new();
            options.read(true).write(writing).custom_flags(files::NOFOLLOW | files::NONBLOCK | files::NOCTTY);
            ForkGuarded::new(|| files::open(&options, &self.path))
        };
        let opened = match open(true) {
            // A removal or a check of the file does not need permission to write it.
            Err(error) if error.kind() == Io::PermissionDenied => open(false),
            opened => opened,
        };
        let opened = match opened {
            Err(error) if error.kind() == Io::NotFound || files::is_of_a_link(&error) => return Err(self.rogue()),
            opened => opened.map_err(|error| Error::io("open", &self.path, error))?,
        };
        let seen = files::look(&opened).map_err(|error| Error::io("look at", &self.path, error))?;
        match file_id(&seen) == self.written.numbers {
            true => Ok(Some(opened.know_as(self.written.numbers).keep_across_fork())),
            false => Err(self.rogue()),
        }
    }

    /// Makes this process the owner, and writes its pid: for the child after a daemon's fork. No other process can
    /// acquire the lock before, during or after the call, whether the parent still lives or not.
    ///
    /// After this the parent's copy of the guard releases nothing. Before, it does: the parent should end with
    /// [`process::exit`](std::process::exit), which drops nothing, or wait for a message from the child. A child that
    /// closes all inherited descriptors must call this first, or while the parent lives. A file that has no lock, and
    /// names a process that has ended, is free.
    ///
    /// ```no_run
    /// # fn fork() -> u32 { 0 }
    /// # fn main() -> lockkit::Result<()> {
    /// let mut guard = lockkit::PidFile::new("/run/app.pid")?.try_lock()?;
    /// if fork() != 0 {
    ///     std::process::exit(0); // the parent
    /// }
    /// guard.rewrite()?; // the daemon
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// - [`RogueDeletion`](ErrorKind::RogueDeletion) if the file was removed or has another content, for example after
    ///   a release by the parent.
    /// - [`Io`](ErrorKind::Io) if the file cannot be written.
    ///
    /// On an error the owner is the same as before.
    pub fn rewrite(&mut self) -> Result<()> {
        self.write(&Owner::current())?;
        self.process = ProcessId::current();
        held_files().lock().insert(self.written.numbers);
        Ok(())
    }

    /// Writes another process into the file as its holder, for a supervisor that acquires the lock for a child. The
    /// guard stays here, and dropping it releases as before. If this process dies first, no other process can acquire
    /// the lock as long as the named process lives.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let path = std::env::temp_dir().join(format!("lockkit-doc-rewrite-for-{}.pid", std::process::id()));
    /// use lockkit::{Owner, PidFile, PidStatus};
    /// let mut guard = PidFile::new(&path)?.try_lock()?;
    /// let mut child = std::process::Command::new("sleep").arg("60").spawn()?;
    /// guard.rewrite_for(&Owner::of(child.id()).expect("it runs"))?;
    /// assert!(matches!(PidFile::inspect(&path)?, PidStatus::Running(owner) if owner.pid() == child.id()));
    /// child.kill()?;
    /// child.wait()?;
    /// guard.release()?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`rewrite`](Self::rewrite).
    pub fn rewrite_for(&mut self, owner: &Owner) -> Result<()> {
        self.write(owner)
    }

    /// Verifies the file, and writes `owner`. The pid is written first, which invalidates the previous owner's
    /// identity. If this process is killed in between, it leaves a file that is judged by its pid and its time.
    fn write(&mut self, owner: &Owner) -> Result<()> {
        let failed = |error| Error::io("write", &self.path, error);
        let Some(file) = &self.file else { return Err(self.rogue()) };
        let opened = self.open_again(file)?;
        let file = opened.as_ref().unwrap_or(file);
        self.verify_open(file)?;
        if opened.is_some() {
            // A parent that still lives has the locks, and then the content is enough.
            write_lock::try_lock(file).and_then(|_| lock_for_others(file)).map_err(failed)?;
        }
        let text = record::content(owner.pid);
        overwrite(file, &text, self.written.text.as_bytes()).map_err(failed)?;
        self.written.text = text;
        // The file already names the owner, so a failure here is ignored.
        self.written.identified = files::look(file).is_ok_and(|seen| identify(file, &seen, owner));
        self.file = opened.or(self.file.take());
        Ok(())
    }

    /// Removes the file, releases the lock, and returns any failure.
    ///
    /// A process may have given up the rights with which it created the file, and so cannot remove it. Then it leaves a
    /// blank line in the file, which the next owner takes over at once.
    ///
    /// # Errors
    /// - [`RogueDeletion`](ErrorKind::RogueDeletion) if another process removed, replaced or rewrote the file; a new
    ///   file in its place stays.
    /// - [`Io`](ErrorKind::Io) if the file cannot be removed.
    ///
    /// The lock is released all the same, unless the file cannot be read. Then it is unknown whether a forked child has
    /// taken it over, and the lock stays held until this process ends.
    pub fn release(mut self) -> Result<()> {
        self.give_back()
    }

    /// Returns the owner that died without a release, if the file named one.
    pub fn recovered(&self) -> Option<&Recovered> {
        self.recovered.as_deref()
    }

    fn give_back(&mut self) -> Result<()> {
        let Some(mut file) = self.file.take() else { return Ok(()) };
        // The copy shares the open file with the parent's, so closing the copy of a forked child releases nothing.
        if !self.process.is_current() {
            return Ok(());
        }
        // This comes first, because another file of this process may get the same numbers.
        held_files().lock().remove(&self.written.numbers);
        if let Some(opened) = self.open_again(&file)? {
            file = opened;
        }
        // A file that stayed would exclude others for as long as this process lives, so a failed read is repeated once.
        let removed = match self.says(&file).or_else(|_| self.says(&file)) {
            Ok(bytes) if bytes == self.written.text.as_bytes() => self.remove(&file),
            Ok(bytes) => match self.successor(&file, &bytes) {
                None => Err(self.rogue()),
                // An unlock would take the lock from a child that owns it now; closing the file does not.
                Some(is_child) if is_child => return Ok(()),
                Some(_) => return Err(self.rogue()),
            },
            Err(error) => Err(error),
        };
        // Closing is not enough, because forked children may have the open file, too.
        let unlocked = write_lock::unlock(&file).and_then(|()| match flock::unlock(&file) {
            // They are one lock there, and it is unlocked.
            _ if cfg!(windows) => Ok(()),
            Err(error) if flock::is_unsupported(&error) => Ok(()),
            unlocked => unlocked,
        });
        telemetry::released(self);
        removed.and(unlocked.map_err(|error| Error::io("unlock", &self.path, error)))
    }

    /// Returns `None` unless a live process has written its pid into the file. Otherwise returns whether that is a
    /// forked child that has called [`rewrite`](Self::rewrite). Without an identity it counts as such a child.
    fn successor(&self, file: &File, bytes: &[u8]) -> Option<bool> {
        let Content::Pids { pids, alone: true, .. } = record::parse(bytes) else { return None };
        let seen = files::look(file).ok()?;
        match verdict::identity(file, pids[0], &seen) {
            Ok(Some(owner)) => (owner.liveness_by_name() != Liveness::Dead).then_some(true),
            _ => verdict::living(pids[0], file, &seen).map(|_| !self.written.identified),
        }
    }

    fn remove(&self, file: &File) -> Result<()> {
        // The descriptor is known to be this file's.
        let removed = match names(&self.path, self.written.numbers) {
            Ok(true) => match fs::remove_file(&self.path) {
                Err(error) if error.kind() == Io::NotFound => return Err(self.rogue()),
                removed => removed.map_err(|error| Error::io("remove", &self.path, error)),
            },
            Ok(false) => return Err(self.rogue()),
            Err(error) => Err(error),
        };
        if removed.is_err() {
            let _ = overwrite(file, record::BLANK, self.written.text.as_bytes());
        }
        step("file removed");
        removed
    }

    fn says(&self, file: &File) -> Result<Vec<u8>> {
        verdict::read(file).map_err(|error| Error::io("read", &self.path, error))
    }

    fn rogue(&self) -> Error {
        ErrorKind::RogueDeletion { path: self.path.to_path_buf() }.into()
    }
}

impl LockInfo for PidGuard {
    fn describe(&self) -> String {
        format!("the pidfile {}", self.path.display())
    }

    #[cfg(feature = "tracing")]
    fn label(&self) -> (&'static str, String) {
        ("pidfile", self.path.display().to_string())
    }

    fn holder(&self) -> Option<Owner> {
        Some(Owner::current())
    }
}

impl Guard for PidGuard {
    fn release(self) -> Result<()> {
        self.release()
    }

    fn recovered(&self) -> Option<&Recovered> {
        self.recovered()
    }
}

impl Drop for PidGuard {
    fn drop(&mut self) {
        // Closing the file also releases, so a failure here leaves nothing locked.
        let _ = self.give_back();
    }
}
