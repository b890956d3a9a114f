//! The handle of a lease.

use std::fmt;
use std::sync::Arc;

use super::acquisition::{self, FoundLease};
use super::guard::LeaseGuard;
use super::options::Options;
use super::spec::LeaseSpec;
use super::store::lease_store::{LeaseSnapshot, Released};
#[cfg(feature = "tokio")]
use crate::base::blocking;
use crate::base::error::Result;
use crate::base::lock::lock_methods;
use crate::base::owner::Owner;
use crate::base::telemetry;
use crate::base::wait::Wait;

/// A lock with a time to live: one owner at a time among all processes that reach its record, on
/// one host or several.
///
/// Use it for leader election, and for work on a shared disk. If its holder is dead, stopped, hung
/// or cut off for longer than its ttl, the lease becomes free. Every other lock of this crate waits
/// for a live holder. The price is that a holder can lose the lease. Call
/// [`is_held`](LeaseGuard::is_held) or [`check`](LeaseGuard::check) before each important action,
/// watch [`lost`](LeaseGuard::lost), and send the [`token`](LeaseGuard::token) with every write.
///
/// Do not use it on a single machine where a stopped holder should keep its lock: use
/// [`NamedLock`](crate::NamedLock) or [`FileLock`](crate::FileLock). Do not use it where losing the
/// lease half-way does harm and no resource checks the token.
///
/// [`file`](Self::file) keeps the record in a file; [`with_store`](Self::with_store) in any
/// [`LeaseStore`](super::LeaseStore). A clone is another handle on the same lease.
///
/// ```
/// # fn main() -> lockkit::Result<()> {
/// # let path = std::env::temp_dir().join(format!("lockkit-doc-lease-{}", std::process::id()));
/// use lockkit::Lease;
///
/// let lease = Lease::file(&path).build()?;
/// let guard = lease.lock()?;
/// while guard.is_held() {
///     // Lead, and write with guard.token().
/// #   break;
/// }
/// guard.release()?;
/// # std::fs::remove_file(path).unwrap();
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Lease(pub(super) Arc<LeaseSpec>);

/// The state of a lease; see [`Lease::status`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LeaseStatus {
    /// No process holds the lease.
    Free,
    /// The record names a holder, or the file is blank or damaged and counts as held; then there is
    /// no [claim](LeaseSnapshot::claim). If [`LeaseSnapshot::expires_in`] is zero the lease is
    /// stale: the next process to ask takes it over.
    Held(LeaseSnapshot),
}

impl Lease {
    pub(super) fn new(spec: LeaseSpec) -> Self {
        Self(Arc::new(spec))
    }

    /// Returns the name under which the store keeps the lease. For a file this is its path.
    pub fn name(&self) -> &str {
        self.0.name.as_str()
    }

    /// Acquires the lease, waiting as `wait` says.
    ///
    /// The first call in a process starts the heartbeat thread. A waiter for a file is woken by the
    /// release, by inotify(7) on Linux; elsewhere the waiter polls at its [retry
    /// delay](super::LeaseBuilder::acquire_retry_delay). Every 50 ms that waiter checks whether an
    /// owner on this host is alive. The waiting threads of a process form a queue (FIFO), and only
    /// the first thread waits at the store; each other thread needs a descriptor. After the wait no
    /// thread remains, except a thread that looks up the host name of a server for longer than the
    /// wait lasts. On Linux the process keeps one descriptor from its first wait on, for the next.
    ///
    /// A call that does not wait for a holder still waits for the store. Each attempt may take a
    /// quarter of the ttl, at most 2 seconds, and no longer than the limit of the wait.
    ///
    /// # Errors
    /// - [`Held`](crate::ErrorKind::Held), [`Timeout`](crate::ErrorKind::Timeout) or
    ///   [`Cancelled`](crate::ErrorKind::Cancelled), as `wait` says.
    /// - [`Io`](crate::ErrorKind::Io) if the heartbeat thread cannot be started, or if the file
    ///   cannot be created, opened, locked or written.
    /// - [`Store`](crate::ErrorKind::Store) if a store other than a file fails more often than
    ///   [`acquire_retry_limit`](super::LeaseBuilder::acquire_retry_limit) allows, or never
    ///   answered within the limit of the wait. A request without an answer may still take effect;
    ///   the heartbeat frees such a grant as soon as the store answers.
    ///
    /// For a file also:
    /// - [`NotALease`](crate::ErrorKind::NotALease) if the file is not a lease.
    /// - [`LayoutMismatch`](crate::ErrorKind::LayoutMismatch) if a later version wrote the file, or
    ///   no greater token can follow.
    /// - [`ForeignOwner`](crate::ErrorKind::ForeignOwner) if a user other than this one or root
    ///   owns the file, and the lease is not [shared](super::LeaseBuilder::file_write_mode).
    /// - [`Insecure`](crate::ErrorKind::Insecure) if the file is a link or not a plain file.
    pub fn acquire(&self, wait: &Wait) -> Result<LeaseGuard> {
        telemetry::acquire(&FoundLease::new(&self.0), || acquire(&self.0, wait))
    }

    #[cfg(feature = "tokio")]
    async fn take_async(&self, wait: &Wait) -> Result<LeaseGuard> {
        let (lease, found) = (self.0.clone(), FoundLease::new(&self.0));
        telemetry::acquire_async(
            &found,
            blocking::on_a_thread(wait, &found, move |wait| acquire(&lease, wait)),
        )
        .await
    }

    /// Returns the holder of the lease; `None` if the lease is free, or if the record does not
    /// identify the holder. The result is a snapshot.
    ///
    /// # Errors
    /// As [`status`](Self::status).
    pub fn owner(&self) -> Result<Option<Owner>> {
        Ok(self
            .snapshot()?
            .and_then(|snapshot| snapshot.owner().cloned()))
    }

    /// Returns what the record says now. Changes nothing and waits for no holder.
    ///
    /// ```
    /// # fn main() -> lockkit::Result<()> {
    /// # let path = std::env::temp_dir().join(format!("lockkit-doc-lease-status-{}", std::process::id()));
    /// use lockkit::{Lease, LeaseStatus};
    /// match Lease::file(&path).build()?.status()? {
    ///     LeaseStatus::Held(snapshot) => println!("token {:?}, held by {:?}", snapshot.token(), snapshot.owner()),
    ///     _ => println!("free"),
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// - [`Io`](crate::ErrorKind::Io) or [`Store`](crate::ErrorKind::Store) if the record cannot be
    ///   read.
    /// - [`NotALease`](crate::ErrorKind::NotALease) if the file is not a lease.
    /// - [`LayoutMismatch`](crate::ErrorKind::LayoutMismatch) if a later version wrote the file.
    /// - [`Insecure`](crate::ErrorKind::Insecure) if the file is a link or not a plain file.
    pub fn status(&self) -> Result<LeaseStatus> {
        Ok(self
            .snapshot()?
            .map_or(LeaseStatus::Free, LeaseStatus::Held))
    }

    /// Takes the lease from the holder in `snapshot`, and from no other holder. Returns false if
    /// the lease has since been released, or taken by another holder. lockkit does not ask the
    /// holder. The holder learns of the eviction at its next heartbeat, and until then believes
    /// that it holds the lease. Make sure that the holder is gone, or that its token is checked.
    ///
    /// ```
    /// # fn main() -> lockkit::Result<()> {
    /// # let path = std::env::temp_dir().join(format!("lockkit-doc-lease-evict-{}", std::process::id()));
    /// # use lockkit::{Lease, LeaseStatus};
    /// # let lease = Lease::file(&path).build()?;
    /// let guard = lease.lock()?;
    /// if let LeaseStatus::Held(snapshot) = lease.status()? {
    ///     assert!(lease.evict(&snapshot)?);
    /// }
    /// assert_eq!(lease.status()?, LeaseStatus::Free);
    /// # drop(guard);
    /// # std::fs::remove_file(path).unwrap();
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire), without the errors of the wait.
    pub fn evict(&self, snapshot: &LeaseSnapshot) -> Result<bool> {
        let evicted = self
            .0
            .store
            .evict(&self.0.name, snapshot, self.0.request_deadline());
        evicted
            .map(|done| done == Released::Done)
            .map_err(|error| self.0.error(error))
    }

    fn snapshot(&self) -> Result<Option<LeaseSnapshot>> {
        self.0
            .store
            .get(&self.0.name, self.0.request_deadline())
            .map_err(|error| self.0.error(error))
    }
}

fn acquire(lease: &Arc<LeaseSpec>, wait: &Wait) -> Result<LeaseGuard> {
    acquisition::acquire(lease, wait).map(|(held, recovered)| LeaseGuard::new(held, recovered))
}

lock_methods!(
    Lease, LeaseGuard,
    in_tasks: "The acquisition runs on a thread of its own, under any runtime ([`Io`](crate::ErrorKind::Io) if none \
               can be started), because stores may block. When the future is dropped, that thread stops waiting at \
               once and ends. If a request is under way, the thread ends when the store has answered or the \
               request's time is over: a quarter of the TTL, or 2 s at most. It releases a lease that is granted \
               until then. A guard that is dropped in a task blocks the task for a moment: see \
               [`LeaseGuard::release_async`]."
);

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Options {
            ttl,
            heartbeat,
            progress,
            ..
        } = &self.0.options;
        let mut shown = f.debug_struct("Lease");
        shown
            .field("name", &self.0.name.as_str())
            .field("ttl", ttl)
            .field("heartbeat", heartbeat);
        shown
            .field("require_progress", progress)
            .finish_non_exhaustive()
    }
}
