//! [`NamedLock`] and its builder.

use std::sync::Arc;

use super::backend::{self, Listed, NamedState};
use super::guard::NamedGuard;
use super::options::{Backend, Scope};
#[cfg(feature = "tokio")]
use crate::base::blocking;
use crate::base::error::Result;
use crate::base::lock::lock_methods;
use crate::base::name;
use crate::base::owner::Owner;
use crate::base::telemetry;
use crate::base::wait::Wait;

/// A lock on a name: one owner at a time among all processes of a user, or of the machine.
///
/// For single-instance programs, cron jobs and daemons. The lock needs no clean-up: the kernel
/// frees the name when its holder ends, for any reason. A clone is another handle on the same lock.
///
/// A program that closes descriptors which it did not open, as close_range(2) does, ends this lock.
/// [`release`](NamedGuard::release) then returns an error, and no other file of the program is
/// closed. See [the crate page](crate#descriptors-that-the-program-closes).
///
/// Do not use it to guard data on a file system that several machines share (use a lease).
/// [`Scope::Machine`] does not protect against hostile users that know the name.
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
pub struct NamedLock(Arc<NamedState>);

impl NamedLock {
    /// Creates a lock on `name` for the processes of this user. It acquires and creates nothing in
    /// the system yet.
    ///
    /// # Errors
    /// [`InvalidName`](crate::ErrorKind::InvalidName) unless the name is an ASCII letter followed
    /// by ASCII letters, digits, `-`, `_` and `.`, in 1 to 80 bytes.
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
        NamedLockBuilder {
            name,
            scope: Scope::default(),
            backend: Backend::default(),
        }
    }

    /// Returns the locks of this user, or of the machine, that are held now, sorted by name, of
    /// every backend. The result is a snapshot. Acquires and creates nothing.
    ///
    /// The result has the socket locks of this network namespace and the file locks below this
    /// process's `/tmp`, as far as their holders are known (see [`owner`](Self::owner)).
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
        Ok(Self::held(scope)?
            .into_iter()
            .map(|held| held.lock)
            .collect())
    }

    /// Returns the locks of this user, or of the machine, that are held now, with their owners and
    /// numbers of waiters. They are sorted by name, and of every backend. One call reads all of
    /// them, which is much faster than asking each lock. The result is a snapshot. Acquires and
    /// creates nothing.
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
        // A process that binds an invalid name holds no lock of lockkit's.
        let build = |((name, owner, waiters), backend): (Listed, Backend)| {
            let lock = Self::builder(&name)
                .scope(scope)
                .backend(backend)
                .build()
                .ok()?;
            Some(HeldNamedLock {
                lock,
                owner,
                waiters,
            })
        };
        let mut held: Vec<_> = backend::list(scope)?
            .into_iter()
            .filter_map(build)
            .collect();
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
        self.0.backend()
    }

    /// Returns how many waiters the lock has now. The result is a snapshot.
    ///
    /// With the socket backend the number is exact: waiters that have died or given up do not
    /// count, nor do connections of other users to a lock of [`Scope::User`]. Where the process may
    /// not use netlink ([sock_diag(7)]), these count, and so do processes that only ask for the
    /// owner. With the file backend only waiters without a limit count, and only on Linux. For a
    /// mutex the number is always 0.
    ///
    /// [sock_diag(7)]: https://man7.org/linux/man-pages/man7/sock_diag.7.html
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io) if the system does not report the waiters.
    pub fn waiters(&self) -> Result<u32> {
        self.0.waiters()
    }

    /// Acquires the lock, waiting as `wait` says.
    ///
    /// `Wait::none()` never waits for a live holder. If the record names no live holder but the
    /// name is still bound, the call waits up to 1 s for the name. This happens while the kernel
    /// ends a killed process, or while a program starts.
    ///
    /// The socket backend waits without polling: the kernel wakes the waiter when the lock is
    /// handed over, when the holder dies, at the deadline, and on cancellation. The queue of a
    /// holder has 4,096 places (or `net.core.somaxconn`). While it is full of waiters, live or not,
    /// a further waiter polls every few milliseconds. A waiter that gave up keeps its place until
    /// the next release. A release skips at most 64 such places in a row. Waiters behind more of
    /// them acquire in any order, as do processes of different users that share a lock of
    /// [`Scope::Machine`].
    ///
    /// A waiter holds the lock when the previous holder has closed its copy of the socket. A holder
    /// that is stopped during its release still holds the lock.
    ///
    /// # Errors
    /// - [`Held`](crate::ErrorKind::Held), [`Timeout`](crate::ErrorKind::Timeout) or
    ///   [`Cancelled`](crate::ErrorKind::Cancelled), as `wait` says.
    /// - [`ForeignOwner`](crate::ErrorKind::ForeignOwner) if a user that is not trusted with a
    ///   [`Scope::User`] lock occupies its name, or owns the directory where the file backend must
    ///   keep it. A foreign process that has bound the name without listening looks like a holder
    ///   that is starting: the error is then `Held`, without a holder.
    /// - [`Insecure`](crate::ErrorKind::Insecure) if that directory is open to other users.
    /// - [`Io`](crate::ErrorKind::Io) if a system call fails, for example without a free file
    ///   descriptor.
    pub fn acquire(&self, wait: &Wait) -> Result<NamedGuard> {
        telemetry::acquire(&*self.0, || self.take(wait))
    }

    #[cfg(feature = "tokio")]
    async fn take_async(&self, wait: &Wait) -> Result<NamedGuard> {
        telemetry::acquire_async(&*self.0, async {
            match self.0.acquire_async(wait).await {
                Some(acquired) => acquired.map(|acquired| NamedGuard::new(&self.0, acquired)),
                None => {
                    let lock = self.clone();
                    blocking::at_once_or_on_a_thread(wait, &*self.0, move |wait| lock.take(wait))
                        .await
                }
            }
        })
        .await
    }

    fn take(&self, wait: &Wait) -> Result<NamedGuard> {
        Ok(NamedGuard::new(&self.0, self.0.acquire(wait)?))
    }

    /// Returns whether a process holds the lock. The result is a snapshot, and can be out of date
    /// by the time the caller acts. To exclude other processes, acquire the lock instead, for
    /// example with [`Wait::none`].
    ///
    /// The cost is a few system calls, however many locks are held. The call takes no place in the
    /// holder's queue of waiters, unlike [`owner`](Self::owner). It can therefore be repeated
    /// often.
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
    /// [`Io`](crate::ErrorKind::Io) if the system does not report the state, for example because
    /// the lock directory or its file cannot be read.
    ///
    /// # Platform
    /// - The socket backend (Linux) binds a free name for a moment. An acquisition in this moment
    ///   tries again, also with [`Wait::none`].
    /// - The file backend on Linux asks the kernel if there is no record. Elsewhere, and on
    ///   Windows, only the record counts: a holder that has not written its record yet is not seen.
    pub fn is_held(&self) -> Result<bool> {
        self.0.is_held()
    }

    /// Returns the holder of the lock, or `None` if the lock is free. The result is a snapshot.
    ///
    /// If the holder has left no record (see [`NamedGuard::recovered`]), the socket backend asks
    /// the kernel. That occupies one place in the holder's queue of waiters until the next release.
    /// The file backend knows only the record. It still names a holder that has executed another
    /// program (exec), until the next process acquires the lock.
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
    /// - [`Unsupported`](crate::ErrorKind::Unsupported) for [`Backend::Socket`] outside Linux, and
    ///   for [`Backend::Mutex`] outside Windows.
    pub fn build(self) -> Result<NamedLock> {
        let name = name::checked(self.name)?;
        Ok(NamedLock(Arc::new(NamedState::new(
            name,
            self.scope,
            self.backend,
        )?)))
    }
}
