//! Locks on a name, valid for all processes of a user or of the machine.
//!
//! [`NamedLock`] is the public face; how the lock is held is a [`Backend`]: a listening socket (`socket`, Linux), a
//! named mutex (`windows`), or a locked file in a private directory (`file`, everywhere else, and on request). What a holder
//! that dies leaves for the next one to find is the same small record for all of them (`mark`).

mod file;
pub(crate) mod holder_record;
#[cfg(target_os = "linux")]
mod proc_net_unix;
#[cfg(target_os = "linux")]
mod records;
#[cfg(target_os = "linux")]
mod socket;
#[cfg(windows)]
mod windows;

#[cfg(unix)]
use std::os::fd::OwnedFd;
use std::sync::Arc;

#[cfg(feature = "tokio")]
use crate::blocking;
#[cfg(unix)]
use crate::error::Error;
use crate::error::Result;
use crate::lock::{Guard, Recovered, lock_methods};
use crate::name;
use crate::owner::Owner;
use crate::sys::fork;
use crate::sys::runtime_dir::{self, Sharing};
use crate::telemetry;
use crate::wait::{LockInfo, Wait};

/// Who shares a name.
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
    /// The processes of one user, by effective uid. Only that user and root are ever handed the lock.
    #[default]
    User,
    /// All processes of the machine. Every user can take such a lock, so every user can keep the others waiting, and hand
    /// a lock that it has taken to two others: use it among users that trust each other. No release waits for another
    /// user. (One can be slowed down, by milliseconds, by a user that keeps the memory file system busy.)
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

/// How a [`NamedLock`] is held. Locks with different backends know nothing of each other: all processes that share a
/// name must use the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Backend {
    /// The best that the system has: [`Socket`](Self::Socket) on Linux, [`Mutex`](Self::Mutex) on Windows,
    /// [`File`](Self::File) elsewhere.
    #[default]
    Auto,
    /// An abstract Unix socket, Linux only. Waiters are served first come, first served, and woken by the kernel. The
    /// name belongs to the network namespace, so containers with a network of their own have names of their own.
    Socket,
    /// A named mutex, Windows only, valid in all sessions. Waiters are woken by the kernel. Each lock that is held, and
    /// each that is waited for, has a thread of its own, because a mutex belongs to a thread. Who holds it is known by a
    /// file in the user's local application data, or with [`Scope::Machine`] in that of all users.
    Mutex,
    /// A locked file in a private directory below `/tmp`, or with [`Scope::Machine`] in `/tmp` itself. The name belongs to
    /// the file system, so processes that see another `/tmp` have names of their own. On macOS it is the user's Darwin
    /// directory (`DARWIN_USER_DIR` of confstr(3)), and `/Users/Shared`, because `/tmp` is cleaned there; on Windows the
    /// user's local application data, and that of all users. Waiters with a limit look again
    /// every few milliseconds. Deleting the file of a lock that is held, which only its user and root can, lets a
    /// second holder in.
    File,
}

/// A lock on a name: one owner at a time among all processes of a user, or of the machine.
///
/// For single-instance programs, cron jobs and daemons. It needs no cleaning up: the kernel frees the name when its
/// holder ends, however it ends. Cloning gives another handle on the same lock.
///
/// A program that closes descriptors which it did not open, as close_range(2) does, ends this lock.
/// [`release`](NamedGuard::release) then returns an error, and no other file of the program is closed. See
/// [the crate page](crate#descriptors-that-the-program-closes).
///
/// Not for guarding data on a file system that several machines share (use a lease), nor against other users who know
/// the name and mean ill with [`Scope::Machine`].
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
/// WaitResult for, and looked at from outside:
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
    File(crate::file::FileGuard),
}

impl NamedLock {
    /// A lock on `name` for the processes of this user. Nothing is taken or made yet.
    ///
    /// # Errors
    /// [`InvalidName`](crate::ErrorKind::InvalidName) unless the name starts with an ASCII letter and goes on with
    /// ASCII letters, digits, `-`, `_` and `.`, in 1 to 80 bytes.
    pub fn new(name: &str) -> Result<Self> {
        Self::builder(name).build()
    }

    /// A lock on `name` with a choice of [`Scope`] and [`Backend`].
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

    /// The locks of this user, or of the machine, that somebody holds now, by name, of every backend. By the time it
    /// returns it may already be past. Takes and makes nothing.
    ///
    /// Of the socket backend those of this network namespace, of the file backend those below this process's `/tmp`,
    /// as far as their holders are known (see [`owner`](Self::owner)).
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
    /// [`Io`](crate::ErrorKind::Io) when the system does not say which sockets there are.
    pub fn list(scope: Scope) -> Result<Vec<Self>> {
        Ok(Self::held(scope)?.into_iter().map(|held| held.lock).collect())
    }

    /// The locks of this user, or of the machine, that are held now, by name, of every backend, with their owners and
    /// the number of their waiters. It looks at all of them at once, which is much faster than asking each lock. The
    /// result is a snapshot. Takes and makes nothing.
    ///
    /// Found are the same locks as by [`list`](Self::list).
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
    /// [`Io`](crate::ErrorKind::Io) when the system does not say which sockets there are.
    pub fn held(scope: Scope) -> Result<Vec<HeldNamedLock>> {
        let sharing = scope.sharing();
        #[cfg(target_os = "linux")]
        let found = socket::SocketLock::list(sharing)?;
        #[cfg(windows)]
        let found = windows::MutexLock::list(sharing);
        #[cfg(not(any(target_os = "linux", windows)))]
        let found: Vec<(String, Option<Owner>, u32)> = Vec::new();
        let found = found.into_iter().map(|found| (found, Backend::Auto));
        let files = file::NamedFileLock::list(sharing).into_iter().map(|found| (found, Backend::File));
        // A process that binds a name which breaks the rule holds no lock of lockkit's.
        let build = |((name, owner, waiters), backend): ((String, _, _), Backend)| {
            let lock = Self::builder(&name).scope(scope).backend(backend).build().ok()?;
            Some(HeldNamedLock { lock, owner, waiters })
        };
        let mut held: Vec<_> = found.chain(files).filter_map(build).collect();
        held.sort_by(|one, other| one.lock.name().cmp(other.lock.name()));
        Ok(held)
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Who shares the name.
    pub fn scope(&self) -> Scope {
        self.0.scope
    }

    /// How it is held: never [`Backend::Auto`], but what that means here.
    pub fn backend(&self) -> Backend {
        match &self.0.engine {
            #[cfg(target_os = "linux")]
            Engine::Socket(_) => Backend::Socket,
            #[cfg(windows)]
            Engine::Mutex(_) => Backend::Mutex,
            Engine::File(_) => Backend::File,
        }
    }

    /// How many wait for the lock now. The result is a snapshot.
    ///
    /// With the socket backend the number is exact: waiters that have died or given up, and connections of other users to a
    /// lock of [`Scope::User`], do not count. Where the process may not use netlink ([sock_diag(7)]), they do, and so do
    /// processes that only ask for the owner. With the file backend waiters without a limit count, and only on Linux. Of a
    /// mutex no waiter is known.
    ///
    /// [sock_diag(7)]: https://man7.org/linux/man-pages/man7/sock_diag.7.html
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io) when the system does not say.
    pub fn waiters(&self) -> Result<u32> {
        match &self.0.engine {
            #[cfg(target_os = "linux")]
            Engine::Socket(engine) => engine.waiters(),
            #[cfg(windows)]
            Engine::Mutex(_) => Ok(0),
            Engine::File(engine) => engine.waiters(),
        }
    }

    /// Takes the lock, waiting as `wait` says.
    ///
    /// Not waiting means not waiting for a holder that lives. A lock that the last holder's record says is nobody's,
    /// but whose name is still taken, as while a killed process is taken apart or a program is being started, is given
    /// up to a second to come free.
    ///
    /// Waiting costs no polling on the socket backend: the kernel wakes the waiter when the lock is handed to it, when
    /// the holder dies, at its deadline and at its cancellation. Only while the holder's queue of 4,096 (or
    /// `net.core.somaxconn`) is full of waiters, living or not, does a further one look again every few milliseconds;
    /// each waiter that gave up keeps its place there until the next release. A release skips at most 64 of those in a
    /// row; behind more, and between processes of different users that share a lock of [`Scope::Machine`], waiters get in
    /// in any order.
    ///
    /// A waiter holds the lock when the holder before has closed its own copy of it. A holder that is stopped in the middle
    /// of its release goes on holding.
    ///
    /// # Errors
    /// [`Held`](crate::ErrorKind::Held), [`Timeout`](crate::ErrorKind::Timeout) or
    /// [`Cancelled`](crate::ErrorKind::Cancelled) as `wait` has it;
    /// [`ForeignOwner`](crate::ErrorKind::ForeignOwner) when a user who is not trusted with a [`Scope::User`] lock sits
    /// on its name, or owns the directory where the file backend must keep it (one that has bound the name without
    /// listening there cannot be told from a holder that is just starting, so that is `Held` by nobody known);
    /// [`Insecure`](crate::ErrorKind::Insecure) when that directory is open to others;
    /// [`Io`](crate::ErrorKind::Io) when the system refuses, as when no descriptor is left.
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
        NamedGuard { named: self.0.clone(), hold: Some(hold), recovered, generation: fork::generation() }
    }

    /// Whether the lock is held now, for a caller that asks again and again.
    #[cfg(all(any(target_os = "linux", windows), feature = "cli"))]
    pub(crate) fn is_held(&self) -> Result<bool> {
        match &self.0.engine {
            #[cfg(target_os = "linux")]
            Engine::Socket(engine) => engine.is_held(),
            #[cfg(windows)]
            Engine::Mutex(engine) => Ok(engine.owner().is_some()),
            Engine::File(engine) => engine.is_held(),
        }
    }

    /// Who holds the lock now; `None` when nobody does. By the time it returns it may already be past.
    ///
    /// Where the holder has left no record (see [`NamedGuard::recovered`]) the socket backend asks the kernel, which
    /// takes one place in the holder's queue of waiters until the next release. The file backend knows only the record,
    /// and so names a holder that has started another program in its place (exec) until the next one takes the lock.
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io) when the holder cannot be asked because its queue is full.
    pub fn owner(&self) -> Result<Option<Owner>> {
        self.0.owner()
    }
}

lock_methods!(
    NamedLock, NamedGuard,
    in_tasks: "With the socket backend the wait is the runtime's own, woken by the kernel through its reactor: no thread, and \
               one descriptor, which is closed with the future or the guard. It must be a tokio runtime \
               ([`Unsupported`](crate::ErrorKind::Unsupported) otherwise) with I/O and time (`enable_all`, or tokio \
               panics). With the other backends a lock that is held is waited for on a thread of its own, as with \
               [`FileLock::acquire_async`](crate::FileLock::acquire_async)."
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

/// A [`NamedLock`] that was held when [`NamedLock::held`] looked.
#[derive(Clone, Debug)]
pub struct HeldNamedLock {
    lock: NamedLock,
    owner: Option<Owner>,
    waiters: u32,
}

impl HeldNamedLock {
    /// The lock.
    pub fn lock(&self) -> &NamedLock {
        &self.lock
    }

    /// The holder, as far as its record tells; unlike [`NamedLock::owner`] this never asks the kernel.
    pub fn owner(&self) -> Option<&Owner> {
        self.owner.as_ref()
    }

    /// How many wait, as [`NamedLock::waiters`] counts.
    pub fn waiters(&self) -> u32 {
        self.waiters
    }
}

/// Makes a [`NamedLock`]; see [`NamedLock::builder`].
#[derive(Clone, Copy, Debug)]
#[must_use = "a builder makes nothing until `build`"]
pub struct NamedLockBuilder<'n> {
    name: &'n str,
    scope: Scope,
    backend: Backend,
}

impl NamedLockBuilder<'_> {
    /// Who shares the name; [`Scope::User`] unless told otherwise.
    pub fn scope(mut self, scope: Scope) -> Self {
        self.scope = scope;
        self
    }

    /// How the lock is held; [`Backend::Auto`] unless told otherwise.
    pub fn backend(mut self, backend: Backend) -> Self {
        self.backend = backend;
        self
    }

    /// The lock. Nothing is taken or made yet.
    ///
    /// # Errors
    /// [`InvalidName`](crate::ErrorKind::InvalidName) as in [`NamedLock::new`];
    /// [`Unsupported`](crate::ErrorKind::Unsupported) for [`Backend::Socket`] outside Linux, and for
    /// [`Backend::Mutex`] outside Windows.
    pub fn build(self) -> Result<NamedLock> {
        let name = name::checked(self.name)?;
        let sharing = self.scope.sharing();
        let engine = match self.backend {
            Backend::File => Engine::File(file::NamedFileLock::new(name, sharing)),
            #[cfg(target_os = "linux")]
            Backend::Auto | Backend::Socket => Engine::Socket(socket::SocketLock::new(name, sharing)?),
            #[cfg(windows)]
            Backend::Auto | Backend::Mutex => Engine::Mutex(windows::MutexLock::new(name, sharing)),
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
    /// Acquired by the release.
    hold: Option<Hold>,
    recovered: Option<Box<Recovered>>,
    /// The process that holds, for a forked child has a copy.
    generation: u32,
}

impl NamedGuard {
    /// Releases now and says what went wrong.
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io) when the program has closed the descriptor, and so released the lock earlier; from the
    /// file backend also when the kernel refuses to unlock, and the lock is released all the same.
    pub fn release(mut self) -> Result<()> {
        self.give_back()
    }

    /// Whether the previous owner died holding the lock, and who that was.
    ///
    /// The file backend keeps the record in the lock file: every death is reported, with its owner, but for one between
    /// the start of the machine and the first lock, or after somebody deleted the file. The socket backend keeps it in
    /// memory, below `/dev/shm`, or below `/tmp` where that cannot be used: every death is reported, with its owner, as
    /// long as both processes see the same directory and nobody deletes the table of records (systemd does at a user's last
    /// logout, with `RemoveIPC`), and until the records of thousands of other dead holders make room for new ones. A process that cannot open it, because another user has occupied both directories or it has no
    /// descriptor left, reports none, and leaves none to report. With [`Scope::Machine`] the record is open to all
    /// users, and may lie.
    pub fn recovered(&self) -> Option<&Recovered> {
        self.recovered.as_deref()
    }

    /// Writes down another process as the one that holds: for a supervisor that takes the lock for a child, whom
    /// [`owner`](NamedLock::owner) then names. The guard stays here, and dropping it releases as before.
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

    /// Another descriptor of what holds the lock, close-on-exec, which a forked child keeps: nobody else gets the lock
    /// as long as one is open, also when this process is killed. Close all copies before the guard is released, or the
    /// lock stays taken: a release cannot close them.
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
    /// [`Io`](crate::ErrorKind::Io) when no descriptor is left.
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
        if self.generation != fork::generation() {
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
        // Closing the descriptor releases, too, so a failure here leaves nothing locked.
        let _ = self.give_back();
    }
}
