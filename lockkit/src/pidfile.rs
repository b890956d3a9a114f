//! A lock on a path that says who holds it: the pidfile of a daemon.
//!
//! Two things hold a pidfile: flock(2) on the file that the path names, and the identity that stands in it
//! ([`mod@record`]). Whoever wants it takes the flock first, sees that the path still names that file, and only then
//! judges what it says ([`claim`]), so two never take over one stale file, and one that waits for another program's
//! process holds no lock.
//!
//! A new file is written and locked before the path names it (`O_TMPFILE`), so nobody sees half of one. An existing one
//! is overwritten with a single write that leaves nothing of it. The release removes the file, still locked; whoever
//! waited for that file finds that the path names it no more, and starts again.
//!
//! The open file is shared with forked children, as FreeBSD's pidfile(3) has it: a daemon's parent may be gone before
//! the child calls `rewrite`, and in between nobody must get in. So a child that does not drop its copy of the guard
//! holds on when its parent is killed, until it ends. A release by the parent frees it all the same.

mod record;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind as Io};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

#[cfg(feature = "tokio")]
use crate::awaiting;
use crate::error::{Error, ErrorKind, Result};
use crate::file::beginning;
use crate::lock::{Guard, Recovered, lock_methods};
use crate::owner::{Liveness, Owner};
use crate::steps::step;
use crate::sys::files::{self, DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, Seen};
use crate::sys::flock::{self, Mode};
use crate::sys::fork::{self, Shielded};
use crate::sys::process::{self, Probe};
use crate::sys::unnamed;
use crate::trace;
use crate::wait::{Backoff, Subject, Wait};
use record::{Content, MOST_READ};

/// As long after its last write, a file that says nothing valid may yet be in the middle of being written.
const YOUNG: Duration = Duration::from_secs(2);

/// A process must have started as long after the last write of a file for its pid to count as reused. The two moments
/// come from different clocks, of which one is set from time to time.
const REUSE_MARGIN: Duration = Duration::from_secs(60);

/// How often in a row the file may be replaced under an attempt before that counts as finding it held.
const MOST_REPLACEMENTS: u32 = 100;

/// A lock on a path whose file says who holds it.
///
/// For daemons: `kill $(cat /run/app.pid)` and systemd's `PIDFile=` read the first line, which is the pid alone. It is
/// released by dropping the guard, which removes the file; a file that a crash left behind is taken over by the next
/// one to come, exactly one. A pidfile that another program wrote, without any lock, is honoured while its process
/// lives.
///
/// A program that closes descriptors which it did not open, as close_range(2) does, keeps this lock: the file still names
/// it. No other file of the program is closed. See [the crate page](crate#descriptors-that-the-program-closes).
///
/// Not for guarding data (use [`FileLock`](crate::FileLock)), nor for a single instance without a file to show for it
/// (use [`NamedLock`](crate::NamedLock)). Keep pidfiles in a folder that others cannot write to: in one that they can,
/// such as `/tmp`, they can put a file there first, and keep you waiting or lie about the pid.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = std::env::temp_dir().join(format!("lockkit-doc-pidfile-{}", std::process::id()));
/// # std::fs::create_dir_all(&folder)?;
/// # let path = folder.join("app.pid");
/// use lockkit::{PidFile, PidStatus};
///
/// let guard = PidFile::new(&path)?.try_lock()?;
/// assert!(matches!(PidFile::inspect(&path)?, PidStatus::Running(owner) if owner.pid() == std::process::id()));
/// guard.release()?;
/// assert!(matches!(PidFile::inspect(&path)?, PidStatus::Absent));
/// # std::fs::remove_dir_all(folder)?;
/// # Ok(()) }
/// ```
///
/// With a folder of its own, for a daemon whose files its group may read:
///
/// ```
/// use lockkit::{PidFile, Wait};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = std::env::temp_dir().join(format!("lockkit-doc-pidfile-folder-{}", std::process::id()));
/// let pidfile = PidFile::new(folder.join("app/app.pid"))?.create_parents().create_with_mode(0o640);
/// let guard = pidfile.acquire(&Wait::none())?;
/// # drop(guard);
/// # std::fs::remove_dir_all(folder)?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct PidFile {
    path: Arc<Path>,
    mode: u32,
    create_parents: bool,
}

/// What a pidfile says; see [`PidFile::inspect`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PidStatus {
    /// There is no file.
    Absent,
    /// It names a process that lives, or of which that cannot be told from here. Of a file that another program wrote,
    /// the owner's `acquired` is when it did.
    Running(Owner),
    /// It names a process that has ended, though its pid may have been given to a later one.
    Stale(Owner),
    /// It names no process.
    Invalid {
        /// How long ago it was last written, by the wall clock. A young one may be in the middle of being written.
        age: Duration,
    },
}

/// What came of one attempt.
enum Attempt {
    Taken(PidGuard),
    /// Somebody has the flock on this file.
    Locked(Shielded<File>),
    /// What the file says holds it.
    Claimed,
    /// The path names another file by now, or none.
    Replaced,
}

/// What a file that we have flocked means to a taker.
enum Claim {
    Held,
    /// Free, and left by an owner that died, if any.
    Free(Option<Owner>),
}

impl PidFile {
    /// A lock on the pidfile at `path`. Nothing happens to the file until it is locked.
    ///
    /// # Errors
    /// [`RelativePath`](ErrorKind::RelativePath) unless the path starts at the root, because daemons change their
    /// working folder.
    pub fn new(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        check_absolute(&path)?;
        Ok(Self { path: path.into(), mode: 0o644, create_parents: false })
    }

    /// The permissions of the file, less the process's umask; 0644 unless told otherwise, so that others can read it.
    pub fn create_with_mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    /// Makes missing parent folders, too, with mode 0755 less the umask. They stay.
    pub fn create_parents(mut self) -> Self {
        self.create_parents = true;
        self
    }

    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the lock, waiting as `wait` says.
    ///
    /// A wait without an end for another owner of lockkit's sits in the kernel. One with a limit or a token, and any
    /// wait for another program's process, looks again every few milliseconds.
    ///
    /// # Errors
    /// [`Held`](ErrorKind::Held), [`Timeout`](ErrorKind::Timeout) or [`Cancelled`](ErrorKind::Cancelled) as `wait` has
    /// it; [`NotAPidFile`](ErrorKind::NotAPidFile) for a file longer than 4096 bytes, which is somebody's, but no
    /// pidfile; [`Insecure`](ErrorKind::Insecure) for a symbolic or hard link; [`Io`](ErrorKind::Io) when the file
    /// cannot be made, opened, locked or written. Each leaves the file as it was, and none where there was none.
    pub fn acquire(&self, wait: &Wait) -> Result<PidGuard> {
        trace::acquire(self, || self.take(wait))
    }

    #[cfg(feature = "tokio")]
    async fn take_async(&self, wait: &Wait) -> Result<PidGuard> {
        let lock = self.clone();
        let taking = awaiting::at_once_or_on_a_thread(wait, self, move |wait| lock.take(wait));
        trace::acquire_async(self, taking).await
    }

    fn take(&self, wait: &Wait) -> Result<PidGuard> {
        wait.check(self)?;
        let mut backoff = Backoff::new();
        let mut patience = None;
        let mut attempt = self.attempt()?;
        loop {
            let locked = match attempt {
                Attempt::Taken(guard) => return Ok(guard),
                Attempt::Locked(file) => Some(file),
                Attempt::Claimed | Attempt::Replaced => None,
            };
            let patience = match &mut patience {
                Some(patience) => patience,
                none => match wait.patience_for(self) {
                    Some(patience) => none.insert(patience),
                    None => return Err(self.held()),
                },
            };
            attempt = match locked {
                Some(file) if patience.is_endless() => {
                    flock::lock(&file, Mode::Exclusive).map_err(|error| Error::io("lock", &self.path, error))?;
                    match self.settle(file, false)? {
                        Attempt::Replaced => self.attempt()?,
                        settled => settled,
                    }
                }
                _ => {
                    if let Err(gave_up) = patience.sleep(backoff.next())? {
                        return Err(patience.error(gave_up, self));
                    }
                    self.attempt()?
                }
            };
        }
    }

    /// What the file at `path` says now. By the time it returns it may already be past.
    ///
    /// Changes nothing, waits for nobody and disturbs nobody: it only reads, at most 4 KiB. It does not ask who has the
    /// file locked, so of an owner in another pid namespace it says that it runs, where taking the lock may find out
    /// more.
    ///
    /// ```
    /// use lockkit::{PidFile, PidStatus};
    /// # fn main() -> lockkit::Result<()> {
    /// match PidFile::inspect("/run/sshd.pid")? {
    ///     PidStatus::Running(owner) => println!("{}", owner.describe()),
    ///     PidStatus::Stale(owner) => println!("{} died", owner.describe()),
    ///     PidStatus::Absent | PidStatus::Invalid { .. } => println!("nobody"),
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`RelativePath`](ErrorKind::RelativePath); [`Io`](ErrorKind::Io) when it cannot be read, or is no plain file.
    pub fn inspect(path: impl AsRef<Path>) -> Result<PidStatus> {
        let path = path.as_ref();
        check_absolute(path)?;
        let failed = |error| Error::io("read", path, error);
        let open = || {
            // Looked at first, because merely opening a FIFO or a device may do something.
            if !fs::metadata(path)?.is_file() {
                return Err(not_a_plain_file());
            }
            files::open(OpenOptions::new().read(true).custom_flags(files::NONBLOCK), path)
        };
        let file = match open() {
            Err(error) if error.kind() == Io::NotFound => return Ok(PidStatus::Absent),
            opened => opened.map_err(failed)?,
        };
        let bytes = read_settled(&file).map_err(failed)?;
        let found = files::look(&file).map_err(failed)?;
        Ok(match record::parse(&bytes) {
            Content::Blank | Content::Invalid(_) => PidStatus::Invalid { age: age(&found).unwrap_or_default() },
            Content::Ours(owner) => match owner.liveness_by_name() {
                Liveness::Dead => PidStatus::Stale(*owner),
                Liveness::Alive | Liveness::Unknown => PidStatus::Running(*owner),
            },
            Content::Foreign(pid) => match foreign_lives(pid, &file, &found) {
                true => PidStatus::Running(writer(Owner::of(pid).unwrap_or_else(|| Owner::ended(pid)), &found)),
                false => PidStatus::Stale(writer(Owner::ended(pid), &found)),
            },
        })
    }

    /// Removes the file at `path` if it is stale; says whether it did. It takes the lock for that moment, so it never
    /// removes the file of somebody who has just taken it over.
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
    /// [`RelativePath`](ErrorKind::RelativePath); [`NotAPidFile`](ErrorKind::NotAPidFile) for a file that names no
    /// process, unless it is so young that somebody may be writing it; [`Insecure`](ErrorKind::Insecure) for a symbolic
    /// or hard link; [`Io`](ErrorKind::Io) when it cannot be opened, locked or removed.
    pub fn remove_stale(path: impl Into<PathBuf>) -> Result<bool> {
        let pid_file = Self::new(path)?;
        let path = &*pid_file.path;
        let file = match pid_file.open() {
            Ok(Some((file, _))) => file,
            Ok(None) => return Ok(false),
            // One that we must not write to may still be seen to be none of our business.
            Err(error) if is_denied(&error) && pid_file.holder().is_some() => return Ok(false),
            Err(error) => return Err(error),
        };
        if !flock::try_lock(&file, Mode::Exclusive).map_err(|error| Error::io("lock", path, error))?
            || !is_at(path, &file)?
        {
            return Ok(false);
        }
        let (bytes, found) = pid_file.read(&file)?;
        match (claim(&bytes, &file, &found), record::parse(&bytes)) {
            (Claim::Free(Some(_)), _) => {
                fs::remove_file(path).map_err(|error| Error::io("remove", path, error))?;
                step("stale file removed");
                Ok(true)
            }
            (Claim::Free(None), Content::Invalid(rule)) => Err(pid_file.invalid(&bytes, rule)),
            _ => Ok(false),
        }
    }

    fn attempt(&self) -> Result<Attempt> {
        for _ in 0..MOST_REPLACEMENTS {
            let attempt = match self.open() {
                // Whoever makes a file in place must get the lock on it, so nobody else tries while it is empty.
                Ok(Some((_, found))) if found.len() == 0 && is_young(&found) => Attempt::Claimed,
                Ok(Some((file, _))) => self.lock_existing(file, false)?,
                Ok(None) => self.create()?,
                // A file that we must not write to may still say who holds it.
                Err(error) if is_denied(&error) && self.holder().is_some() => Attempt::Claimed,
                Err(error) => return Err(error),
            };
            if !matches!(attempt, Attempt::Replaced) {
                return Ok(attempt);
            }
        }
        Ok(Attempt::Replaced)
    }

    /// The file that the path names, for reading and writing; `None` when there is none.
    fn open(&self) -> Result<Option<(Shielded<File>, Seen)>> {
        let path = &*self.path;
        // Looked at first, because merely opening a FIFO or a device may do something.
        match files::look_at_link(path) {
            Err(error) if error.kind() == Io::NotFound => return Ok(None),
            seen => self.check_plain(&seen.map_err(|error| Error::io("look at", path, error))?)?,
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(files::NOFOLLOW | files::NONBLOCK);
        let file = match Shielded::new(|| files::open(&options, path)) {
            Err(error) if error.kind() == Io::NotFound => return Ok(None),
            opened => opened.map_err(|error| Error::io("open", path, error))?,
        };
        // And again, because somebody may have put something else there in between.
        let found = files::look(&file).map_err(|error| Error::io("look at", path, error))?;
        self.check_plain(&found)?;
        Ok(Some((file, found)))
    }

    /// Refuses what is better not written to.
    fn check_plain(&self, found: &Seen) -> Result<()> {
        let problem = match found {
            found if found.is_symlink() => "it is a symbolic link; use the path that it leads to",
            found if !found.is_file() => return Err(Error::io("lock", &self.path, not_a_plain_file())),
            found if found.nlink() > 1 => "it is a hard link to a file that has other names",
            _ => return Ok(()),
        };
        Err(ErrorKind::Insecure { path: self.path.to_path_buf(), problem }.into())
    }

    fn lock_existing(&self, file: Shielded<File>, made: bool) -> Result<Attempt> {
        match flock::try_lock(&file, Mode::Exclusive) {
            Ok(true) => self.settle(file, made),
            Ok(false) => Ok(Attempt::Locked(file)),
            Err(error) => {
                // Where flock does not work nobody else has it locked, and nothing is to stay behind.
                if made {
                    let _ = fs::remove_file(&self.path);
                }
                Err(Error::io("lock", &self.path, error))
            }
        }
    }

    /// Takes over what has just been locked, if it may be. A file that we have `made` in place is still empty.
    fn settle(&self, file: Shielded<File>, made: bool) -> Result<Attempt> {
        if !is_at(&self.path, &file)? {
            return Ok(Attempt::Replaced);
        }
        let (bytes, found) = self.read(&file)?;
        if bytes.len() > MOST_READ {
            return Err(self.invalid(&bytes, "it is longer than 4096 bytes"));
        }
        let died = match claim(&bytes, &file, &found) {
            _ if made && bytes.is_empty() => None,
            Claim::Held => return Ok(Attempt::Claimed),
            Claim::Free(died) => died,
        };
        let record = own_record();
        if let Err(error) = overwrite(&file, &record, &bytes) {
            if made {
                let _ = fs::remove_file(&self.path);
            }
            return Err(Error::io("write", &self.path, error));
        }
        Ok(self.guard(file, record, died))
    }

    /// Makes the file, complete and locked before the path names it.
    fn create(&self) -> Result<Attempt> {
        let failed = |error| Error::io("create", &self.path, error);
        let folder = self.path.parent().unwrap_or(&self.path);
        let file = self.with_parents(|| Shielded::new(|| unnamed::file_in(folder, self.mode)));
        let file = match file {
            Err(error) if error.kind() == Io::Unsupported => return self.create_in_place(),
            file => file.map_err(failed)?,
        };
        // Does not wait: nobody else has it open.
        flock::lock(&file, Mode::Exclusive).map_err(|error| Error::io("lock", &self.path, error))?;
        let record = own_record();
        file.write_all_at(record.as_bytes(), 0).map_err(|error| Error::io("write", &self.path, error))?;
        step("nameless file written");
        match unnamed::name(&file, &self.path) {
            Ok(()) => {}
            Err(error) if error.kind() == Io::AlreadyExists => return Ok(Attempt::Replaced),
            Err(error) if error.kind() == Io::Unsupported => return self.create_in_place(),
            Err(error) => return Err(failed(error)),
        }
        step("file named");
        Ok(self.guard(file, record, None))
    }

    /// What `make` gives; where the folder is missing and is to be made, after making it.
    fn with_parents<T>(&self, make: impl Fn() -> io::Result<T>) -> io::Result<T> {
        match (make(), self.path.parent()) {
            (Err(error), Some(folder)) if error.kind() == Io::NotFound && self.create_parents => {
                DirBuilder::new().recursive(true).mode(0o755).create(folder)?;
                step("folders made");
                make()
            }
            (made, _) => made,
        }
    }

    /// As [`create`](Self::create), where a file system has no files without a name: others may see it empty, and
    /// killed at that moment the maker leaves it so, which keeps them waiting until it is not [`YOUNG`] any more.
    #[cold]
    fn create_in_place(&self) -> Result<Attempt> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(self.mode);
        match self.with_parents(|| Shielded::new(|| files::create(&options, &self.path))) {
            Err(error) if error.kind() == Io::AlreadyExists => Ok(Attempt::Replaced),
            Err(error) => Err(Error::io("create", &self.path, error)),
            Ok(file) => {
                step("file made");
                self.lock_existing(file, true)
            }
        }
    }

    fn guard(&self, file: Shielded<File>, record: String, died: Option<Owner>) -> Attempt {
        Attempt::Taken(PidGuard {
            file: Some(file.know().keep_across_fork()),
            path: self.path.clone(),
            record,
            generation: fork::generation(),
            recovered: died.map(|owner| Box::new(Recovered::new(Some(owner)))),
        })
    }

    fn read(&self, file: &File) -> Result<(Vec<u8>, Seen)> {
        let failed = |error| Error::io("read", &self.path, error);
        Ok((read(file).map_err(failed)?, files::look(file).map_err(failed)?))
    }

    fn invalid(&self, bytes: &[u8], rule: &'static str) -> Error {
        ErrorKind::NotAPidFile { path: self.path.to_path_buf(), text: record::shown(bytes), rule }.into()
    }
}

lock_methods!(
    PidFile, PidGuard,
    in_tasks: "A pidfile that is free is taken here, which blocks for as long as the file system needs. One that is held is waited \
               for on a thread of its own, under any runtime ([`Io`](crate::ErrorKind::Io) when none can be started). \
               That is woken at once when the future is dropped, closes its file and ends; a lock that it gets at the \
               same moment it releases."
);

impl Subject for PidFile {
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

fn check_absolute(path: &Path) -> Result<()> {
    match path.is_absolute() {
        true => Ok(()),
        false => Err(ErrorKind::RelativePath { path: path.to_owned() }.into()),
    }
}

fn not_a_plain_file() -> io::Error {
    io::Error::new(Io::InvalidInput, "it is no plain file")
}

fn is_denied(error: &Error) -> bool {
    let denied = |source: &io::Error| matches!(source.kind(), Io::PermissionDenied | Io::ReadOnlyFilesystem);
    matches!(error.kind(), ErrorKind::Io { source, .. } if denied(source))
}

/// Whether `path` names the open `file`.
fn is_at(path: &Path, file: &File) -> Result<bool> {
    let failed = |error| Error::io("look at", path, error);
    let open = files::look(file).map_err(failed)?;
    match files::look_at_link(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (open.dev(), open.ino())),
        Err(error) if error.kind() == Io::NotFound => Ok(false),
        Err(error) => Err(failed(error)),
    }
}

/// The beginning of a file, up to a byte more than [`MOST_READ`].
fn read(file: &File) -> io::Result<Vec<u8>> {
    beginning(file, MOST_READ + 1)
}

/// As [`read`], for a reader without the lock: not every file system keeps a read and a write apart, so it reads until
/// it sees the same twice.
fn read_settled(file: &File) -> io::Result<Vec<u8>> {
    const MOST_READS: u32 = 8;
    let mut bytes = read(file)?;
    for _ in 0..MOST_READS {
        let before = std::mem::replace(&mut bytes, read(file)?);
        if bytes == before {
            break;
        }
    }
    Ok(bytes)
}

/// Replaces `old`, all that the file says, with `new`. One write does it, which covers all of `old`, so no kill leaves
/// a mixture. If that fails `old` is put back.
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
    if written.is_err() && !read(file).is_ok_and(|bytes| bytes == old) {
        let _ = file.write_all_at(old, 0);
        step("old record put back");
        let _ = file.set_len(old.len() as u64);
        step("old length put back");
        let _ = file.set_modified(before);
    }
    written
}

/// The record of this process, which takes the lock now.
fn own_record() -> String {
    record::write(&Owner { acquired: Some(SystemTime::now()), ..Owner::current() })
}

/// Who may still hold a file that says `bytes`, and whose flock is ours. Unknown is never stolen:
/// - A record of lockkit's: held while its owner lives, also without the flock, which an exec or a closed descriptor
///   loses. An owner that cannot be looked up from here, in another pid namespace, is gone if it belongs to this boot
///   of this kernel, which has just given us the flock that it held for life. One of another host, or one that does not
///   say, may hold a flock that does not reach us: held.
/// - A bare pid, another program's: held while a process has it that did not start after the file was written.
/// - Either of this very process: free, since nobody else is us. It is from before an exec, or from a supervisor that
///   wrote it for us, or from an earlier container in which the same pid ran.
/// - Neither: somebody may be in the middle of writing; held until it is [`YOUNG`] no more. A blank line is free.
fn claim(bytes: &[u8], file: &File, found: &Seen) -> Claim {
    match record::parse(bytes) {
        Content::Blank => Claim::Free(None),
        Content::Invalid(_) if is_young(found) => Claim::Held,
        Content::Invalid(_) => Claim::Free(None),
        Content::Foreign(pid) if pid == std::process::id() => Claim::Free(None),
        Content::Foreign(pid) if foreign_lives(pid, file, found) => Claim::Held,
        Content::Foreign(pid) => Claim::Free(Some(writer(Owner::ended(pid), found))),
        Content::Ours(owner) if owner.is_this_process() => Claim::Free(None),
        Content::Ours(owner) => match owner.liveness_by_name() {
            Liveness::Alive => Claim::Held,
            Liveness::Unknown if !owner.is_of_this_boot() => Claim::Held,
            Liveness::Unknown | Liveness::Dead => Claim::Free(Some(*owner)),
        },
    }
}

/// Whether it is a record of lockkit's whose owner may live.
fn names_a_live_owner(bytes: &[u8]) -> bool {
    matches!(record::parse(bytes), Content::Ours(owner) if owner.liveness_by_name() != Liveness::Dead)
}

/// How long ago the file was last written; `None` when that lies in the future.
fn age(found: &Seen) -> Option<Duration> {
    SystemTime::now().duration_since(found.modified().ok()?).ok()
}

/// Whether the file was written just now, by a clock that may run as far ahead of ours, as a file server's does. A time
/// further in the future, which is the clock's fault, is not just now.
fn is_young(found: &Seen) -> bool {
    let Ok(written) = found.modified() else { return false };
    let apart = SystemTime::now().duration_since(written).unwrap_or_else(|ahead| ahead.duration());
    apart < YOUNG
}

/// Whether the process that another program's file names may be the one that it was written for.
fn foreign_lives(pid: u32, file: &File, found: &Seen) -> bool {
    match process::probe(pid) {
        Probe::Gone | Probe::Ended => false,
        Probe::Running(None) => true,
        Probe::Running(Some(start)) => !started_later(start, file, found).unwrap_or(false),
    }
}

/// Whether a process that started then is later than the file, as far as the clocks can tell.
fn started_later(start: u64, file: &File, found: &Seen) -> Option<bool> {
    let written = found.modified().ok()?;
    // Nothing in memory is older than the boot: the clock was set forward since, and tells nothing.
    let clock_was_set = written < process::booted_at()? && unnamed::is_in_memory(file);
    Some(!clock_was_set && process::started_at(start)? > written.checked_add(REUSE_MARGIN)?)
}

/// The owner of a file that another program wrote: it took the lock, as far as it is one, when it did.
fn writer(owner: Owner, found: &Seen) -> Owner {
    Owner { acquired: found.modified().ok(), ..owner }
}

/// A held [`PidFile`]; dropping it removes the file and releases.
///
/// **A fork** copies the guard. As long as the child does not call [`rewrite`](Self::rewrite), the parent is the owner,
/// and dropping the child's copy releases nothing. A child that is not to become the owner should drop it: while it
/// keeps it, and the parent is killed, the file stays locked until the child ends. A program started with exec
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
    /// Taken by the release.
    file: Option<Shielded<File>>,
    path: Arc<Path>,
    /// What the file says while the lock is held.
    record: String,
    /// The process that holds, for a forked child has a copy.
    generation: u32,
    recovered: Option<Box<Recovered>>,
}

impl PidGuard {
    /// Whether the file is still there and still says what was written: that the parent of a forked child, until the
    /// child has called [`rewrite`](Self::rewrite), else that this process holds it.
    ///
    /// # Errors
    /// [`RogueDeletion`](ErrorKind::RogueDeletion) when somebody removed, replaced or rewrote it;
    /// [`Io`](ErrorKind::Io) when it cannot be looked at.
    pub fn verify(&self) -> Result<()> {
        let Some(file) = &self.file else { return Err(self.rogue()) };
        match self.says(file)? == self.record.as_bytes() && is_at(&self.path, file)? {
            true => Ok(()),
            false => Err(self.rogue()),
        }
    }

    /// Makes this process the owner, and writes its pid: for the child after a daemon's fork. Nobody gets in before,
    /// in between or after, whether the parent still lives or not.
    ///
    /// The parent's copy of the guard then releases nothing any more. Until then it does: the parent should leave with
    /// [`process::exit`](std::process::exit), which drops nothing, or wait for word from the child.
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
    /// [`RogueDeletion`](ErrorKind::RogueDeletion) when the file is not there any more or says something else, as after
    /// a release by the parent; [`Io`](ErrorKind::Io) when it cannot be written. The owner is then who it was before.
    pub fn rewrite(&mut self) -> Result<()> {
        self.verify()?;
        let Some(file) = &self.file else { return Err(self.rogue()) };
        let record = own_record();
        overwrite(file, &record, self.record.as_bytes()).map_err(|error| Error::io("write", &self.path, error))?;
        (self.record, self.generation) = (record, fork::generation());
        Ok(())
    }

    /// Writes another process into the file as the one that holds it: for a supervisor that takes the lock for a child.
    /// The guard stays here, and dropping it releases as before. Should this process die first, then nobody else gets
    /// in as long as the process lives that the file names.
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
        self.verify()?;
        let Some(file) = &self.file else { return Err(self.rogue()) };
        let record = record::write(&Owner { acquired: Some(SystemTime::now()), ..owner.clone() });
        overwrite(file, &record, self.record.as_bytes()).map_err(|error| Error::io("write", &self.path, error))?;
        self.record = record;
        Ok(())
    }

    /// Removes the file, releases, and says what went wrong.
    ///
    /// A process that has given up the rights that it took to make the file cannot remove it. Then it leaves a blank
    /// line in it, which the next owner takes over at once.
    ///
    /// # Errors
    /// [`RogueDeletion`](ErrorKind::RogueDeletion) when somebody removed, replaced or rewrote the file; what stands in
    /// its place stays. [`Io`](ErrorKind::Io) when it cannot be removed. It is released all the same, unless it cannot
    /// be read: then nothing tells whether a forked child has taken it over, and it stays until this process ends.
    pub fn release(mut self) -> Result<()> {
        self.give_back()
    }

    /// The owner that died without releasing, where the file named one.
    pub fn recovered(&self) -> Option<&Recovered> {
        self.recovered.as_deref()
    }

    fn give_back(&mut self) -> Result<()> {
        let Some(mut file) = self.file.take() else { return Ok(()) };
        // The open file is one with the parent's, so closing the copy of a forked child releases nothing.
        if self.generation != fork::generation() {
            return Ok(());
        }
        // The program has closed the descriptor. The record has kept the lock, for this process lives.
        if !file.is_own() {
            let mut options = OpenOptions::new();
            options.read(true).write(true).custom_flags(files::NOFOLLOW | files::NONBLOCK | files::NOCTTY);
            file = Shielded::new(|| files::open(&options, &self.path)).map_err(|_| self.rogue())?;
        }
        // A record that stayed would keep others out for as long as this process lives, so a read that failed is not
        // the last word.
        let removed = match self.says(&file).or_else(|_| self.says(&file)) {
            Ok(bytes) if bytes == self.record.as_bytes() => self.remove(&file),
            // Written through the same open file, by a child that owns it now: unlocking would take it from the child.
            Ok(bytes) if names_a_live_owner(&bytes) => return Ok(()),
            Ok(_) => Err(self.rogue()),
            Err(error) => Err(error),
        };
        // Not left to closing, since forked children may have the open file, too.
        let unlocked = flock::unlock(&file).map_err(|error| Error::io("unlock", &self.path, error));
        trace::released(self);
        removed.and(unlocked)
    }

    fn remove(&self, file: &File) -> Result<()> {
        let removed = match is_at(&self.path, file) {
            Ok(true) => match fs::remove_file(&self.path) {
                Err(error) if error.kind() == Io::NotFound => return Err(self.rogue()),
                removed => removed.map_err(|error| Error::io("remove", &self.path, error)),
            },
            Ok(false) => return Err(self.rogue()),
            Err(error) => Err(error),
        };
        if removed.is_err() {
            let _ = overwrite(file, record::BLANK, self.record.as_bytes());
        }
        step("file removed");
        removed
    }

    fn says(&self, file: &File) -> Result<Vec<u8>> {
        read(file).map_err(|error| Error::io("read", &self.path, error))
    }

    fn rogue(&self) -> Error {
        ErrorKind::RogueDeletion { path: self.path.to_path_buf() }.into()
    }
}

impl Subject for PidGuard {
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
        // Closing the file releases, too, so a failure here leaves nothing locked.
        let _ = self.give_back();
    }
}
