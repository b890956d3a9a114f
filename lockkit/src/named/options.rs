//! The choices of a named lock: which processes share it, and how it is held.

use crate::base::runtime_dir::{self, Sharing};

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
    /// The processes of one user, by effective uid. The lock is handed over only to that user and
    /// root.
    #[default]
    User,
    /// All processes of the machine. Every user can acquire such a lock. So every user can keep the
    /// others waiting, and can give an acquired lock to two processes: use this scope among users
    /// that trust each other. No release waits for another user. (A user that keeps the memory file
    /// system busy can slow a release down by milliseconds.)
    Machine,
}

impl Scope {
    pub(super) fn sharing(self) -> Sharing {
        match self {
            Self::User => Sharing::User(runtime_dir::effective_uid()),
            Self::Machine => Sharing::Machine,
        }
    }
}

/// How a [`NamedLock`](crate::NamedLock) is held. Locks with different backends do not exclude each
/// other: all processes that share a name must use the same backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Backend {
    /// The best backend of the system: [`Socket`](Self::Socket) on Linux, [`Mutex`](Self::Mutex) on
    /// Windows, [`File`](Self::File) elsewhere.
    #[default]
    Auto,
    /// An abstract Unix socket, Linux only. Waiters are served first come, first served, and woken
    /// by the kernel. The name belongs to the network namespace, so containers with their own
    /// network have their own names.
    Socket,
    /// A named mutex, Windows only, valid in all sessions. The kernel wakes the waiters. Each held
    /// lock and each waiting acquisition has its own thread, because a mutex belongs to a thread. A
    /// file in the user's local application data names the holder; with [`Scope::Machine`] the file
    /// is in the application data of all users.
    Mutex,
    /// A locked file in a private directory below `/tmp`, or with [`Scope::Machine`] in `/tmp`
    /// itself. The name belongs to the file system, so processes that see another `/tmp` have their
    /// own names. On macOS the directory is the user's Darwin directory (`DARWIN_USER_DIR` of
    /// confstr(3)), or with [`Scope::Machine`] `/Users/Shared`, because macOS cleans `/tmp`. On
    /// Windows it is the local application data of the user, or with [`Scope::Machine`] that of all
    /// users. Waiters with a limit poll every few milliseconds. Deleting the file of a held lock,
    /// which only its user and root can do, lets a second holder in.
    File,
}
