//! Locks on a name, valid for all processes of a user or of the machine.
//!
//! [`NamedLock`] is the public type. A [`Backend`] says how the lock is held: a listening socket (`socket`, Linux), a
//! named mutex (`mutex_windows`), or a locked file in a private directory (`file`, on all other systems, and on request). All
//! backends report a dead holder to the next one with the same small record (`holder_record`).

mod file;
#[cfg(windows)]
mod mutex_windows;
#[cfg(target_os = "linux")]
mod records;
#[cfg(target_os = "linux")]
mod socket;

#[cfg(unix)]
use std::os::fd::OwnedFd;
use std::sync::Arc;

#[cfg(feature = "tokio")]
use crate::base::blocking;
#[cfg(unix)]
use crate::base::error::Error;
use crate::base::error::Result;
use crate::base::guard::{Guard, Recovered};
use crate::base::holder_record;
use crate::base::lock::lock_methods;
use crate::base::lock_info::LockInfo;
use crate::base::name;
use crate::base::owner::Owner;
use crate::base::runtime_dir::{self, Sharing};
use crate::base::telemetry;
use crate::base::wait::Wait;
use crate::sys::fork::{self, ProcessId};

/// The processes that share a name.
///
/// ```
/// # fn main() -> lockkit::Result<()> {
/// use lockkit::{NamedLock, Scope};
/// let mine = NamedLock::new("lockkit-doc-scope")?.try_lock()?; // `Scope::User`
/// let everybodys = NamedLock::builder("lockkit-doc-scope").scope(Scope::Machine).build()?;
/// let both = everybodys.try_lock()?; // Another lock.
/// # drop((mine, both));
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Scope {
    /// The processes of one user, by effective uid. The lock is handed over only to that user and root.
    #[default]
    User,
    /// All processes of the machine. Every user can acquire such a lock. So every user can keep the others waiting, and
    /// can give an acquired lock to two processes: use this scope among users that trust each other. No release waits
    /// for another user. (A user that keeps the memory file system busy can slow a release down by milliseconds.)
    Machine,
}

impl Scope {
    fn sharing(self) -> Sharing {
        match self {
            Self::User => Sharing::User(runtime_dir::effective_uid()),
            Self::Machine => Sharing::Machine,
        }
    }
}

/// How a [`NamedLock`] is held. Locks with different backends do not exclude each other: all processes that share a
/// name must use the same backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Backend {
    /// The best backend of the system: [`Socket`](Self::Socket) on Linux, [`Mutex`](Self::Mutex) on Windows,
    /// [`File`](Self::File) elsewhere.
    #[default]
    Auto,
    /// An abstract Unix socket, Linux only. Waiters are served first come, first served, and woken by the kernel. The
    /// name belongs to the network namespace, so containers with their own network have their own names.
    Socket,
    /// A named mutex, Windows only, valid in all sessions. The kernel wakes the waiters. Each held lock and each
    /// waiting acquisition has its own thread, because a mutex belongs to a thread. A file in the user's local
    /// application data names the holder; with [`Scope::Machine`] the file is in the application data of all users.
    Mutex,
    /// A locked file in a private directory below `/tmp`, or with [`Scope::Machine`] in `/tmp` itself. The name belongs
    /// to the file system, so processes that see another `/tmp` have their own names. On macOS the directory is the
    /// user's Darwin directory (`DARWIN_USER_DIR` of confstr(3)), or with [`Scope::Machine`] `/Users/Shared`, because
    /// macOS cleans `/tmp`. On Windows it is the local application data of the user, or with [`Scope::Machine`] that of
    /// all users. Waiters with a limit poll every few milliseconds. Deleting the file of a held lock, which only its
    /// user and root can do, lets a second holder in.
    File,
}

/// A lock on a name: one owner at a time among all processes of a user, or of the machine.
///
/// For single-instance programs, cron jobs and daemons. The lock needs no clean-up: the kernel frees the name when its
/// holder ends, for any reason. A clone is another handle on the same lock.
///
/// A program that closes descriptors which it did not open, as close_range(2) does, ends this lock.
/// [`release`](NamedGuard::release) then returns an error, and no other file of the program is closed. See
/// [the crate page](crate#descriptors-that-the-program-closes).
///
/// Do not use it to guard data on a file system that several machines share (use a lease). [`Scope::Machine`] does not
/// protect against hostile users that know the name.
///
/// ```
/// use lockkit::NamedLock;
/// # fn main() -> lockkit::Result<()> {
/// let lock = NamedLock::new("lockkit-doc-named")?;
/// let guard = lock.lock()?;
/// if let Some(died) = guard.recovered() {
///     eprintln!("the previous owner died inside: {died}");
/// }
/// # Ok(()) }
/// ```
///
/// Waiting with a limit, and asking for the owner and the waiters:
///
/// ```
/// use std::time::Duration;
/// use lockkit::{NamedLock, Wait};
/// # fn main() -> lockkit::Result<()> {
/// let lock = NamedLock::new("lockkit-doc-named-look")?;
/// let guard = lock.acquire(&Wait::at_most(Duration::from_secs(5)))?;
/// assert_eq!(lock.owner()?.map(|owner| owner.pid()), Some(std::process::id()));
/// assert_eq!(lock.waiters()?, 0);
/// # drop(guard);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct NamedLock(Arc<Named>);

#[derive(Debug)]
struct Named {
    name: String,
    scope: Scope,
    engine: Engine,
}

#[derive(Debug)]
enum Engine {
    #[cfg(target_os = "linux")]
    Socket(socket::SocketLock),
    #[cfg(windows)]
    Mutex(windows::MutexLock),
    File(file::NamedFileLock),
}

#[derive(Debug)]
enum Hold {
    #[cfg(target_os = "linux")]
    Socket(socket::Hold),
    #[cfg(windows)]
    Mutex(windows::Hold),
    File(crate::file_lock::FileGuard),
}

impl NamedLock {
    /// Creates a lock on `name` for the processes of this user. It acquires and creates nothing in the system yet.
    ///
    /// # Errors
    /// [`InvalidName`](crate::ErrorKind::InvalidName) unless the name is an ASCII letter followed by ASCII letters,
    /// digits, `-`, `_` and `.`, in 1 to 80 bytes.
    pub fn new(name: &str) -> Result<Self> {
        Self::builder(name).build()
    }

    /// Returns a builder for a lock on `name` with a choice of [`Scope`] and [`Backend`].
    ///
    /// ```
    /// use lockkit::{NamedLock, Scope};
    /// # fn main() -> lockkit::Result<()> {
    /// let lock = NamedLock::builder("lockkit-doc-builder").scope(Scope::Machine).build()?;
    /// # Ok(()) }
    /// ```
    pub fn builder(name: &str) -> NamedLockBuilder<'_> {
        NamedLockBuilder { name, scope: Scope::default(), backend: Backend::default() }
    }

    /// Returns the locks of this user, or of the machine, that are held now, sorted by name, of every backend. The
    /// result is a snapshot. Acquires and creates nothing.
    ///
    /// The result has the socket locks of this network namespace and the file locks below this process's `/tmp`, as far
    /// as their holders are known (see [`owner`](Self::owner)).
    ///
    /// ```
    /// use lockkit::{NamedLock, Scope};
    /// # fn main() -> lockkit::Result<()> {
    /// let _guard = NamedLock::new("lockkit-doc-list")?.lock()?;
    /// assert!(NamedLock::list(Scope::User)?.iter().any(|lock| lock.name() == "lockkit-doc-list"));
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io) if the system does not list its sockets.
    pub fn list(scope: Scope) -> Result<Vec<Self>> {
        Ok(Self::held(scope)?.into_iter().map(|held| held.lock).collect())
    }

    /// Returns the locks of this user, or of the machine, that are held now, with their owners and numbers of waiters.
    /// They are sorted by name, and of every backend. One call reads all of them, which is much faster than asking each
    /// lock. The result is a snapshot. Acquires and creates nothing.
    ///
    /// The locks are those of [`list`](Self::list).
    ///
    /// ```
    /// use lockkit::{NamedLock, Scope};
    /// # fn main() -> lockkit::Result<()> {
    /// let _guard = NamedLock::new("lockkit-doc-held")?.lock()?;
    /// for held in NamedLock::held(Scope::User)? {
    ///     let owner = held.owner().map_or("an unknown process".to_owned(), |owner| owner.describe());
    ///     println!("{}: {owner}, {} wait", held.lock().name(), held.waiters());
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io) if the system does not list its sockets.
    pub fn held(scope: Scope) -> Result<Vec<HeldNamedLock>> {
        let sharing = scope.sharing();
        #[cfg(target_os = "linux")]
        let found = socket::SocketLock::list(sharing)?;
        #[cfg(windows)]
        let found = mutex_windows::MutexLock::list(sharing);
        #[cfg(not(any(target_os = "linux", windows)))]
        let found: Vec<(String, Option<Owner>, u32)> = Vec::new();
        let found = found.into_iter().map(|found| (found, Backend::Auto));
        let files = file::NamedFileLock::list(sharing).into_iter().map(|found| (found, Backend::File));
        // A process that binds an invalid name holds no lock of lockkit's.
        let build = |((name, owner, waiters), backend): ((String, _, _), Backend)| {
            let lock = Self::builder(&name).scope(scope).backend(backend).build().ok()?;
            Some(HeldNamedLock { lock, owner, waiters })
        };
        let mut held: Vec<_> = found.chain(files).filter_map(build).collect();
        held.sort_by(|one, other| one.lock.name().cmp(other.lock.name()));
        Ok(held)
    }

    /// Returns the name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Returns which processes share the name.
    pub fn scope(&self) -> Scope {
        self.0.scope
    }

    /// Returns how the lock is held: never [`Backend::Auto`], but the backend that it selects here.
    pub fn backend(&self) -> Backend {
        match &self.0.engine {
            #[cfg(target_os = "linux")]
            Engine::Socket(_) => Backend::Socket,
            #[cfg(windows)]
            Engine::Mutex(_) => Backend::Mutex,
            Engine::File(_) => Backend::File,
        }
    }

    /// Returns how many waiters the lock has now. The result is a snapshot.
    ///
    /// With the socket backend the number is exact: waiters that have died or given up do not count, nor do connections
    /// of other users to a lock of [`Scope::User`]. Where the process may not use netlink ([sock_diag(7)]), these
    /// count, and so do processes that only ask for the owner. With the file backend only waiters without a limit
    /// count, and only on Linux. For a mutex the number is always 0.
    ///
    /// [sock_diag(7)]: https://man7.org/linux/man-pages/man7/sock_diag.7.html
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io) if the system does not report the waiters.
    pub fn waiters(&self) -> Result<u32> {
        match &self.0.engine {
            #[cfg(target_os = "linux")]
            Engine::Socket(engine) => engine.waiters(),
            #[cfg(windows)]
            Engine::Mutex(_) => Ok(0),
            Engine::File(engine) => engine.waiters(),
        }
    }

    /// Acquires the lock, waiting as `wait` says.
    ///
    /// `Wait::none()` never waits for a live holder. If the record names no live holder but the name is still bound,
    /// the call waits up to 1 s for the name. This happens while the kernel ends a killed process, or while a program
    /// starts.
    ///
    /// The socket backend waits without polling: the kernel wakes the waiter when the lock is handed over, when the
    /// holder dies, at the deadline, and on cancellation. The queue of a holder has 4,096 places (or
    /// `net.core.somaxconn`). While it is full of waiters, live or not, a further waiter polls every few milliseconds.
    /// A waiter that gave up keeps its place until the next release. A release skips at most 64 such places in a row.
    /// Waiters behind more of them acquire in any order, as do processes of different users that share a lock of
    /// [`Scope::Machine`].
    ///
    /// A waiter holds the lock when the previous holder has closed its copy of the socket. A holder that is stopped
    /// during its release still holds the lock.
    ///
    /// # Errors
    /// - [`Held`](crate::ErrorKind::Held), [`Timeout`](crate::ErrorKind::Timeout) or
    ///   [`Cancelled`](crate::ErrorKind::Cancelled), as `wait` says.
    /// - [`ForeignOwner`](crate::ErrorKind::ForeignOwner) if a user that is not trusted with a [`Scope::User`] lock
    ///   occupies its name, or owns the directory where the file backend must keep it. A foreign process that has bound
    ///   the name without listening looks like a holder that is starting: the error is then `Held`, without a holder.
    /// - [`Insecure`](crate::ErrorKind::Insecure) if that directory is open to other users.
    /// - [`Io`](crate::ErrorKind::Io) if a system call fails, for example without a free file descriptor.
    pub fn acquire(&self, wait: &Wait) -> Result<NamedGuard> {
        telemetry::acquire(&*self.0, || self.take(wait))
    }

    #[cfg(feature = "tokio")]
    async fn take_async(&self, wait: &Wait) -> Result<NamedGuard> {
        telemetry::acquire_async(&*self.0, async {
            match &self.0.engine {
                #[cfg(target_os = "linux")]
                Engine::Socket(engine) => {
                    let (hold, recovered) = engine.acquire_async(wait, &*self.0).await?;
                    Ok(self.guard(Hold::Socket(hold), recovered))
                }
                _ => {
                    let lock = self.clone();
                    blocking::at_once_or_on_a_thread(wait, &*self.0, move |wait| lock.take(wait)).await
                }
            }
        })
        .await
    }

    fn take(&self, wait: &Wait) -> Result<NamedGuard> {
        let (hold, recovered) = match &self.0.engine {
            #[cfg(target_os = "linux")]
            Engine::Socket(engine) => {
                let (hold, recovered) = engine.acquire(wait, &*self.0)?;
                (Hold::Socket(hold), recovered)
            }
            #[cfg(windows)]
            Engine::Mutex(engine) => {
                let (mutex, recovered) = engine.acquire(wait, &*self.0)?;
                (Hold::Mutex(mutex), recovered)
            }
            Engine::File(engine) => {
                let (file, recovered) = engine.acquire(wait, &*self.0)?;
                (Hold::File(file), recovered)
            }
        };
        Ok(self.guard(hold, recovered))
    }

    fn guard(&self, hold: Hold, recovered: Option<Box<Recovered>>) -> NamedGuard {
        NamedGuard { named: self.0.clone(), hold: Some(hold), recovered, process: ProcessId::current() }
    }

    /// Returns whether a process holds the lock. The result is a snapshot, and can be out of date by the time the caller
    /// acts. To exclude other processes, acquire the lock instead, for example with [`Wait::none`].
    ///
    /// The cost is a few system calls, however many locks are held. The call takes no place in the holder's queue of
    /// waiters, unlike [`owner`](Self::owner). It can therefore be repeated often.
    ///
    /// ```
    /// # fn main() -> lockkit::Result<()> {
    /// let lock = lockkit::NamedLock::new("lockkit-doc-is-held")?;
    /// let guard = lock.lock()?;
    /// assert!(lock.is_held()?);
    /// drop(guard);
    /// assert!(!lock.is_held()?);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io) if the system does not report the state, for example because the lock directory or
    /// its file cannot be read.
    ///
    /// # Platform
    /// - The socket backend (Linux) binds a free name for a moment. An acquisition in this moment tries again, also with
    ///   [`Wait::none`].
    /// - The file backend on Linux asks the kernel if there is no record. Elsewhere, and on Windows, only the record
    ///   counts: a holder that has not written its record yet is not seen.
    pub fn is_held(&self) -> Result<bool> {
        match &self.0.engine {
            #[cfg(target_os = "linux")]
            Engine::Socket(engine) => engine.is_held(),
            #[cfg(windows)]
            Engine::Mutex(engine) => Ok(engine.owner().is_some()),
            Engine::File(engine) => engine.is_held(),
        }
    }

    /// Returns the holder of the lock, or `None` if the lock is free. The result is a snapshot.
    ///
    /// If the holder has left no record (see [`NamedGuard::recovered`]), the socket backend asks the kernel. That
    /// occupies one place in the holder's queue of waiters until the next release. The file backend knows only the
    /// record. It still names a holder that has executed another program (exec), until the next process acquires the
    /// lock.
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io) if the holder's queue is full, so that it cannot be asked.
    pub fn owner(&self) -> Result<Option<Owner>> {
        self.0.owner()
    }
}

lock_methods!(
    NamedLock, NamedGuard,
    in_tasks: "With the socket backend the runtime waits, and the kernel wakes the task through the reactor. The \
               wait takes no thread and one descriptor, which is closed with the future or the guard. The runtime \
               must be tokio ([`Unsupported`](crate::ErrorKind::Unsupported) otherwise) with I/O and time \
               (`enable_all`, or tokio panics). With the other backends a thread of its own waits for a lock that \
               is held, as with [`FileLock::acquire_async`](crate::FileLock::acquire_async)."
);

impl Named {
    fn owner(&self) -> Result<Option<Owner>> {
        match &self.engine {
            #[cfg(target_os = "linux")]
            Engine::Socket(engine) => engine.owner(),
            #[cfg(windows)]
            Engine::Mutex(engine) => Ok(engine.owner()),
            Engine::File(engine) => engine.owner(),
        }
    }
}

impl LockInfo for Named {
    fn describe(&self) -> String {
        match self.scope {
            Scope::User => format!("the named lock {:?}", self.name),
            Scope::Machine => format!("the machine-wide named lock {:?}", self.name),
        }
    }

    #[cfg(feature = "tracing")]
    fn label(&self) -> (&'static str, String) {
        ("named", self.name.clone())
    }

    fn holder(&self) -> Option<Owner> {
        self.owner().unwrap_or_default()
    }
}

/// A [`NamedLock`] that was held during a call of [`NamedLock::held`].
#[derive(Clone, Debug)]
pub struct HeldNamedLock {
    lock: NamedLock,
    owner: Option<Owner>,
    waiters: u32,
}

impl HeldNamedLock {
    /// Returns the lock.
    pub fn lock(&self) -> &NamedLock {
        &self.lock
    }

    /// Returns the holder from its record; unlike [`NamedLock::owner`] this never asks the kernel.
    pub fn owner(&self) -> Option<&Owner> {
        self.owner.as_ref()
    }

    /// Returns how many waiters the lock has, as [`NamedLock::waiters`] counts them.
    pub fn waiters(&self) -> u32 {
        self.waiters
    }
}

/// A builder of a [`NamedLock`]; see [`NamedLock::builder`].
#[derive(Clone, Copy, Debug)]
#[must_use = "a builder makes nothing until `build`"]
pub struct NamedLockBuilder<'n> {
    name: &'n str,
    scope: Scope,
    backend: Backend,
}

impl NamedLockBuilder<'_> {
    /// Sets which processes share the name. The default is [`Scope::User`].
    pub fn scope(mut self, scope: Scope) -> Self {
        self.scope = scope;
        self
    }

    /// Sets how the lock is held. The default is [`Backend::Auto`].
    pub fn backend(mut self, backend: Backend) -> Self {
        self.backend = backend;
        self
    }

    /// Builds the lock. It acquires and creates nothing in the system yet.
    ///
    /// # Errors
    /// - [`InvalidName`](crate::ErrorKind::InvalidName) as in [`NamedLock::new`].
    /// - [`Unsupported`](crate::ErrorKind::Unsupported) for [`Backend::Socket`] outside Linux, and for
    ///   [`Backend::Mutex`] outside Windows.
    pub fn build(self) -> Result<NamedLock> {
        let name = name::checked(self.name)?;
        let sharing = self.scope.sharing();
        let engine = match self.backend {
            Backend::File => Engine::File(file::NamedFileLock::new(name, sharing)),
            #[cfg(target_os = "linux")]
            Backend::Auto | Backend::Socket => Engine::Socket(socket::SocketLock::new(name, sharing)?),
            #[cfg(windows)]
            Backend::Auto | Backend::Mutex => Engine::Mutex(mutex_windows::MutexLock::new(name, sharing)),
            #[cfg(not(windows))]
            Backend::Mutex => {
                return Err(crate::ErrorKind::Unsupported { what: "the mutex backend of named locks" }.into());
            }
            #[cfg(not(any(target_os = "linux", windows)))]
            Backend::Auto => Engine::File(file::NamedFileLock::new(name, sharing)),
            #[cfg(not(target_os = "linux"))]
            Backend::Socket => {
                return Err(crate::ErrorKind::Unsupported { what: "the socket backend of named locks" }.into());
            }
        };
        Ok(NamedLock(Arc::new(Named { name: name.to_owned(), scope: self.scope, engine })))
    }
}

/// A held [`NamedLock`]; dropping it releases.
///
/// A forked child's copy of a guard holds nothing: the lock stays with the parent.
#[must_use = "a guard that is dropped at once releases its lock at once; bind it to a name such as `_guard`"]
#[derive(Debug)]
pub struct NamedGuard {
    named: Arc<Named>,
    /// `None` after the release has taken it.
    hold: Option<Hold>,
    recovered: Option<Box<Recovered>>,
    /// Identifies the process that holds the lock, because a forked child has a copy of the guard.
    process: ProcessId,
}

impl NamedGuard {
    /// Releases the lock now and returns any failure.
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io) if the program has closed the descriptor, and so released the lock earlier. With
    /// the file backend also if the kernel refuses to unlock; the lock is released all the same.
    pub fn release(mut self) -> Result<()> {
        self.give_back()
    }

    /// Returns a report if the previous owner died while it held the lock. The report names that owner, where it is
    /// known.
    ///
    /// The file backend keeps the record in the lock file. It reports every death, with the owner, except for one
    /// between the start of the machine and the first lock, or after the file was deleted.
    ///
    /// The socket backend keeps the record in memory, below `/dev/shm`, or below `/tmp` where that cannot be used. It
    /// reports every death, with the owner, as long as these conditions hold:
    /// - Both processes see the same directory.
    /// - The table of records is not deleted (systemd does that at a user's last logout, with `RemoveIPC`).
    /// - The records of thousands of other dead holders have not made room for new ones.
    ///
    /// A process that cannot open the record reports no death, and its own death is not reported. This happens when
    /// another user has occupied both directories, or without a free file descriptor. With [`Scope::Machine`] all users
    /// can write the record, so it may be wrong.
    pub fn recovered(&self) -> Option<&Recovered> {
        self.recovered.as_deref()
    }

    /// Records another process as the holder, for a supervisor that acquires the lock for a child.
    /// [`owner`](NamedLock::owner) then returns that process. The guard stays here, and dropping it releases as before.
    ///
    /// ```no_run
    /// # use lockkit::{NamedLock, Owner};
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let guard = NamedLock::new("com.example.supervised")?.try_lock()?;
    /// let mut child = std::process::Command::new("server").spawn()?;
    /// if let Some(server) = Owner::of(child.id()) {
    ///     guard.name_holder(&server);
    /// }
    /// child.wait()?;
    /// # Ok(()) }
    /// ```
    pub fn name_holder(&self, owner: &Owner) {
        match (&self.named.engine, &self.hold) {
            #[cfg(target_os = "linux")]
            (Engine::Socket(engine), _) => engine.name_holder(owner),
            #[cfg(windows)]
            (Engine::Mutex(engine), _) => engine.name_holder(owner),
            (Engine::File(_), Some(Hold::File(file))) => holder_record::name(file.file(), owner),
            (Engine::File(_), _) => {}
        }
    }

    /// Returns another descriptor of the lock, close-on-exec, which a forked child keeps. No other process can acquire
    /// the lock as long as such a descriptor is open, even if this process is killed. Close all copies before the guard
    /// is released: a release cannot close them, and the lock stays held.
    ///
    /// ```
    /// use lockkit::NamedLock;
    /// # fn main() -> lockkit::Result<()> {
    /// let guard = NamedLock::new("lockkit-doc-descriptor")?.lock()?;
    /// let for_a_child = guard.descriptor()?;
    /// drop(for_a_child);
    /// guard.release()?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io) without a free file descriptor.
    #[cfg(unix)]
    pub fn descriptor(&self) -> Result<OwnedFd> {
        let copy = match &self.hold {
            #[cfg(target_os = "linux")]
            Some(Hold::Socket(hold)) if !hold.socket.is_own() => Err(fork::closed_by_program()),
            #[cfg(target_os = "linux")]
            Some(Hold::Socket(hold)) => fork::unguarded(|| hold.socket.try_clone()),
            Some(Hold::File(file)) => file.copy().map(OwnedFd::from),
            None => unreachable!("only the release takes it, and ends the guard"),
        };
        copy.map_err(|error| Error::io("copy the descriptor of", &self.named.name, error))
    }

    fn give_back(&mut self) -> Result<()> {
        let Some(hold) = self.hold.take() else { return Ok(()) };
        if !self.process.is_current() {
            return Ok(());
        }
        let released = match (&self.named.engine, hold) {
            #[cfg(target_os = "linux")]
            (Engine::Socket(engine), Hold::Socket(hold)) => engine.release(hold),
            #[cfg(windows)]
            (Engine::Mutex(engine), Hold::Mutex(mutex)) => engine.release(mutex),
            (Engine::File(engine), Hold::File(file)) => engine.release(file),
            #[cfg(any(target_os = "linux", windows))]
            _ => unreachable!("a hold belongs to the engine that made it"),
        };
        telemetry::released(&*self.named);
        released
    }
}

impl Guard for NamedGuard {
    fn release(self) -> Result<()> {
        self.release()
    }

    fn recovered(&self) -> Option<&Recovered> {
        self.recovered()
    }
}

impl Drop for NamedGuard {
    fn drop(&mut self) {
        // Closing the descriptor also releases, so a failure here leaves nothing locked.
        let _ = self.give_back();
    }
}
