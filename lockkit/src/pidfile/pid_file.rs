//! The description of a pidfile: its path, and how the file is created.

use std::fs::{DirBuilder, File};
use std::io::{self, ErrorKind as Io};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::inspect::{self, PidStatus};
use super::record;
use crate::base::error::{ErrorKind, Result};
use crate::base::lock_info::LockInfo;
use crate::base::owner::Owner;
use crate::sys::failpoint::step;
use crate::sys::files::DirBuilderExt;
use crate::sys::xattr;

/// A lock on a path whose file contains the holder's pid.
///
/// For daemons: `kill $(cat /run/app.pid)`, systemd's `PIDFile=` and other readers find the pid and
/// a line end, nothing else. Dropping the guard releases the lock and removes the file. Exactly one
/// later acquisition takes over a file that a crash left behind. A pidfile that another program
/// wrote, without any lock, counts as held while its process lives.
///
/// The extended attribute `user.lockkit` of the file contains the identity of the holder, beyond
/// the pid. On a file system without such attributes, the file's time and the start time of the
/// process show whether a later process has the pid. This method has two limits:
/// - A pid that was reused within a minute of the file's last write counts as the holder's.
/// - A clock that was set forward by more than a minute makes a process without a lock on its file
///   look like a later one.
///
/// A program that closes descriptors which it did not open, as close_range(2) does, keeps this
/// lock: the file still names it. No other file of the program is closed. See [the crate
/// page](crate#descriptors-that-the-program-closes).
///
/// Do not use it to guard data (use [`FileLock`](crate::FileLock)), or for a single instance that
/// needs no visible file (use [`NamedLock`](crate::NamedLock)).
///
/// # Files of other programs
///
/// A file contains one or more pids if it begins with a decimal number. Only white space or blank
/// lines may come before the number, and white space, a NUL or the end of the file must follow.
/// Such a file is held while any of the processes may live, and taken over when all are proven
/// dead. A blank file is taken over when it is 2 s old, and a line end alone at once. Every other
/// file is [`NotAPidFile`](ErrorKind::NotAPidFile) and is not changed, and neither is a file longer
/// than 4096 bytes.
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
/// A number after the pid is taken for another pid, so a file with the time or a port there may
/// count as held.
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
/// Another user that has only read permission cannot delay an acquisition or a release, whatever
/// locks that user takes. There are two exceptions:
/// - On systems without locks of open files, such as macOS, FreeBSD and Windows, a reader's flock
///   can.
/// - A flock counts on a blank file, and on a file that has no identity and names a dead process,
///   if the holder of the flock may be hidden from this process. The holder may be hidden from a
///   process in a container, and from users other than root and the file's owner.
///
/// Keep pidfiles in a directory that others cannot write to. In a directory such as `/tmp`, they
/// can create the file first, and block you or give a false pid.
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
    pub(super) path: Arc<Path>,
    pub(super) mode: Option<u32>,
    create_parents: bool,
}

impl PidFile {
    /// Creates a lock on the pidfile at `path`. Nothing happens to the file until it is locked.
    ///
    /// # Errors
    /// [`RelativePath`](ErrorKind::RelativePath) unless the path is absolute, because daemons
    /// change their working directory.
    pub fn new(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        check_absolute(&path)?;
        Ok(Self {
            path: path.into(),
            mode: None,
            create_parents: false,
        })
    }

    /// Sets exactly these permissions for the file, whatever the process's umask is. Without this
    /// call they are 0644 less the umask, so that others can read the file.
    ///
    /// Several users of a shared directory can take over each other's files, as long as they may
    /// read the file and write the directory. With permissions that let a group or all others
    /// write, these users may also use what a killed taker left (`.NAME.lockkit`). Without such
    /// permissions, only its owner or root can.
    ///
    /// The mode must let the owner read. An acquisition fails with
    /// [`InvalidOption`](ErrorKind::InvalidOption) otherwise.
    pub fn create_with_mode(mut self, mode: u32) -> Self {
        self.mode = Some(mode);
        self
    }

    /// Creates missing parent directories, too, with mode 0755 less the umask. A release does not
    /// remove them.
    pub fn create_parents(mut self) -> Self {
        self.create_parents = true;
        self
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns whether the open file has the extended attribute in which lockkit keeps the identity
    /// of a pidfile's owner.
    ///
    /// The attribute distinguishes a pidfile from another file that contains just a number. `false`
    /// does not prove that the file is no pidfile: other programs write none, and some file systems
    /// have no attributes.
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
        xattr::get(file, record::ATTRIBUTE, &mut [0; record::MAX_IDENTITY])
            .is_ok_and(|found| found.is_some())
    }

    /// Returns the state of the file at `path`: a snapshot.
    ///
    /// Changes nothing and waits for no process. It reads at most 4 KiB, and judges as an
    /// acquisition does. If the file is blank, or names a dead process of another program, it
    /// briefly takes a shared flock, to check for another process's flock. It follows a symbolic
    /// link, which an acquisition refuses.
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
    /// - [`Io`](ErrorKind::Io) if the file cannot be read, for example without permission, if it is
    ///   no plain file, or if it is a symbolic link to a file that does not exist.
    pub fn inspect(path: impl AsRef<Path>) -> Result<PidStatus> {
        let path = path.as_ref();
        check_absolute(path)?;
        inspect::inspect(path)
    }

    /// Calls `make`. If the directory is missing and [`create_parents`](Self::create_parents) is
    /// set, creates the directory and calls `make` again.
    pub(super) fn with_parents<T>(&self, make: impl Fn() -> io::Result<T>) -> io::Result<T> {
        match (make(), self.path.parent()) {
            (Err(error), Some(directory))
                if error.kind() == Io::NotFound && self.create_parents =>
            {
                DirBuilder::new()
                    .recursive(true)
                    .mode(0o755)
                    .create(directory)?;
                step("directories created");
                make()
            }
            (made, _) => made,
        }
    }

    /// Returns the directory of the file.
    pub(super) fn directory(&self) -> &Path {
        self.path.parent().unwrap_or(&self.path)
    }
}

impl LockInfo for PidFile {
    fn describe(&self) -> String {
        describe(&self.path)
    }

    #[cfg(feature = "tracing")]
    fn label(&self) -> (&'static str, String) {
        label(&self.path)
    }

    fn holder(&self) -> Option<Owner> {
        match Self::inspect(&self.path) {
            Ok(PidStatus::Running(owner)) => Some(owner),
            _ => None,
        }
    }
}

/// Describes the lock in errors.
pub(super) fn describe(path: &Path) -> String {
    format!("the pidfile {}", path.display())
}

/// Returns the kind and the name of the lock, for events.
#[cfg(feature = "tracing")]
pub(super) fn label(path: &Path) -> (&'static str, String) {
    ("pidfile", path.display().to_string())
}

fn check_absolute(path: &Path) -> Result<()> {
    match path.is_absolute() {
        true => Ok(()),
        false => Err(ErrorKind::RelativePath {
            path: path.to_owned(),
        }
        .into()),
    }
}
