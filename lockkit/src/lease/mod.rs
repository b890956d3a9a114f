//! Leases: a lock with a time to live, a fencing token, and an honest answer to "do I still hold it?".
//!
//! A lease is a record that names the holder of a key, and says how long the lease lasts after its last renewal. One
//! heartbeat thread renews all leases of a process. A holder that is stopped, cut off or hung cannot renew. Such a
//! holder loses the lease when its time is over, and **knows it**: [`LeaseGuard::is_held`] uses the holder's own clock.
//! It counts the ttl, less one part in a hundred and 2 ms, from before the granted request was sent. So `is_held` turns
//! false before another process can acquire the lease, whether or not a heartbeat has run since. This holds as long as
//! no clock runs wrong by more than that margin. lockkit compares no two clocks.
//!
//! No lease can stop a holder between its call of `is_held` and its next action. No lease can notice that the virtual
//! machine of the holder was paused or put back to a snapshot, where its clock stops. The [`token`](LeaseGuard::token)
//! covers these cases: it is greater with every owner. The resource that the lease guards must refuse a token lower
//! than the highest token that it has seen.
//!
//! Leases are from C. Gray and D. Cheriton, *Leases: An Efficient Fault-Tolerant Mechanism for Distributed File Cache
//! Consistency* (SOSP 1989). Why they need fencing: M. Kleppmann, [How to do distributed locking] (2016).
//!
//! # Implementation
//! `state` is the state of a held lease, without side effects. `shared` is a held lease as its guard, its watchers and
//! the heartbeat share it. `heartbeat` is the heartbeat thread. `waiters` is the queue of the threads that wait for a
//! lease. `store` is the interface of a lease store, and `file` the built-in store. `format` is the format of its file.
//! `staleness` is the rule by which an unchanged record expires. `clock` is the time.
//!
//! [How to do distributed locking]: https://martin.kleppmann.com/2016/02/08/how-to-do-distributed-locking.html

mod builder;
mod clock;
mod connect;
mod heartbeat;
mod shared;
mod state;
mod store;
#[cfg(test)]
mod tests;
mod url;
mod waiters;

use std::fmt;
use std::mem;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use crate::base::error::{LossReason, StoreError};
pub use builder::LeaseBuilder;
use builder::Options;
pub use clock::{Clock, ManualClock, SystemClock};
use heartbeat::HeartbeatScheduler;
pub use shared::LostSignal;
use shared::{Held, PendingClaim, SHORTEST_REQUEST};
pub use store::lease_store::{
    Attempt, ClaimId, Deadline, Durability, Grant, LeaseName, LeaseSnapshot, LeaseStore, Released, Renewal,
    StoreProfile,
};
use waiters::Waiter;

#[cfg(feature = "tokio")]
use crate::base::blocking;
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::guard::{Guard, Recovered};
use crate::base::lock::lock_methods;
use crate::base::lock_info::LockInfo;
use crate::base::owner::Owner;
use crate::base::telemetry;
use crate::base::wait::{Wait, WaitError, WaitState};

/// The maximum time of a request that a caller waits for. A quarter of the ttl applies if it is shorter.
const LONGEST_ATTEMPT: Duration = Duration::from_secs(2);

/// A lock with a time to live: one owner at a time among all processes that reach its record, on one host or several.
///
/// Use it for leader election, and for work on a shared disk. If its holder is dead, stopped, hung or cut off for
/// longer than its ttl, the lease becomes free. Every other lock of this crate waits for a live holder. The price is
/// that a holder can lose the lease. Call [`is_held`](LeaseGuard::is_held) or [`check`](LeaseGuard::check) before each
/// important action, watch [`lost`](LeaseGuard::lost), and send the [`token`](LeaseGuard::token) with every write.
///
/// Do not use it on a single machine where a stopped holder should keep its lock: use [`NamedLock`](crate::NamedLock)
/// or [`FileLock`](crate::FileLock). Do not use it where losing the lease half-way does harm and no resource checks the
/// token.
///
/// [`file`](Self::file) keeps the record in a file; [`with_store`](Self::with_store) in any [`LeaseStore`]. A clone is
/// another handle on the same lease.
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
pub struct Lease(Arc<Inner>);

struct Inner {
    name: LeaseName,
    store: Arc<dyn LeaseStore>,
    /// Identifies the queue of its waiters in this process.
    waiters: waiters::Key,
    options: Options,
}

/// The state of a lease; see [`Lease::status`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LeaseStatus {
    /// No process holds the lease.
    Free,
    /// The record names a holder, or the file is blank or damaged and counts as held; then there is no
    /// [claim](LeaseSnapshot::claim). If [`LeaseSnapshot::expires_in`] is zero the lease is stale: the next process to
    /// ask takes it over.
    Held(LeaseSnapshot),
}

/// The loss of a lease: the argument of the [`on_lost`](LeaseBuilder::on_lost) callback.
///
/// ```
/// # fn main() -> lockkit::Result<()> {
/// let builder = lockkit::Lease::file("/srv/shared/leader");
/// let lease = builder.on_lost(|loss| eprintln!("{}, under {}: {}", loss.lock, loss.token, loss.reason)).build()?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Loss {
    /// The lease, described for people.
    pub lock: String,
    /// The token under which the lease was held.
    pub token: u64,
    /// The reason of the loss.
    pub reason: LossReason,
}

impl Lease {
    /// Returns a builder for a lease whose record is a file. The file is on this machine, or on a file system that
    /// several machines share and whose flock(2) reaches all of them.
    ///
    /// The first acquisition creates the file. lockkit never deletes it, because it contains the token; do not delete
    /// it either. Its directory must exist, unless [`create_parents`](LeaseBuilder::create_parents) is given. After a
    /// deletion the next process to ask gets the lease at once, and the holder learns of it at its next heartbeat. If
    /// no process has asked until then, the heartbeat creates the file again. [`build`](LeaseBuilder::build) makes the
    /// path absolute, so a later change of the working directory has no effect.
    ///
    /// lockkit never writes to a file that is not a lease, for any user and in any method: the error is
    /// [`NotALease`](ErrorKind::NotALease). It reclaims only a blank file (empty, or at most 1024 zeros) and a lease
    /// that was truncated or damaged. If another program's file replaces the file of a held lease, the holder keeps the
    /// lease until its deadline. The record may be restored by then.
    ///
    /// Each heartbeat opens, locks, rewrites and closes the file, which takes some microseconds in memory. lockkit
    /// keeps no descriptor open, so ten thousand leases need no more descriptors than one. On file systems of this
    /// machine (tmpfs, ext4, xfs, btrfs and similar) a step does not sync the file. A power cut, a deletion and a
    /// restored backup do no harm to the order of tokens: each new token is at least the microseconds since the epoch.
    /// That holds unless the wall clock is set back along with the file. With several hosts, no host's clock may be
    /// ahead of the others by as much time as such a loss takes back. On all other file systems, such as NFS, CIFS
    /// and FUSE, each step is synced, so that a heartbeat has reached the server before it counts.
    ///
    /// The price: a process without free descriptors cannot renew, and loses its file leases after a ttl. A holder that
    /// is stopped in the middle of a heartbeat, or killed but not yet gone, keeps the file locked until it continues or
    /// is gone. Until then no other process can take the lease. (The host of an NFS client that is cut off keeps the
    /// file locked until the server frees the lock: 90 s on Linux.) Other processes lock the file only to take a lease
    /// that is free or expired. Any user with permission to open the file can lock it. Give that permission only to the
    /// users that share the lease.
    ///
    /// A process takes over a held lease in two cases:
    /// - The owner is dead by its identity. It ran on this host, or on an earlier boot of this host if
    ///   `/etc/machine-id` identifies the host.
    /// - The owner's heartbeat has not changed for the ttl in the record, by the clock of the process that takes the
    ///   lease over.
    ///
    /// A program that tries only once per start, for example from cron, succeeds too. It leaves a note of the time at
    /// which it first saw that heartbeat. The next program on the same machine continues from the note.
    ///
    /// A blank or damaged file counts as held for
    /// [`invalid_pid_lock_stale_threshold`](LeaseBuilder::invalid_pid_lock_stale_threshold). After that the next
    /// process to ask takes it, also a program that tries only once: the times of the file show how long it has been
    /// unchanged. (On a file system of another machine, an hour of that does not count, because the clocks may differ.)
    /// [`status`](Self::status) reports the same. lockkit does not change a file of a later version of the format.
    ///
    /// ```
    /// # fn main() -> lockkit::Result<()> {
    /// # let directory = std::env::temp_dir().join(format!("lockkit-doc-leases-{}", std::process::id()));
    /// use std::time::Duration;
    /// use lockkit::Lease;
    ///
    /// let lease = Lease::file(directory.join("leader"))
    ///     .create_parents()
    ///     .ttl(Duration::from_secs(5))
    ///     .on_lost(|loss| eprintln!("{} is lost: {}", loss.lock, loss.reason))
    ///     .build()?;
    /// let guard = lease.try_lock()?;
    /// assert!(lease.try_lock().unwrap_err().is_held());
    /// # drop(guard);
    /// # std::fs::remove_dir_all(directory).unwrap();
    /// # Ok(()) }
    /// ```
    pub fn file(path: impl Into<PathBuf>) -> LeaseBuilder {
        LeaseBuilder::of_file(path.into())
    }

    /// Returns a builder for a lease at a URL: in a file, or on a server.
    ///
    /// | URL | needs the feature |
    /// |---|---|
    /// | `file:///path` | |
    /// | `etcd://host:2379/name` | `etcd` |
    /// | `postgres://user@host/database?lease=name` | `postgres` |
    /// | `redis://host:6379/name` | `redis` |
    ///
    /// **Redis and Valkey**, from version 5 on: `redis://user:password@host:port/database/name`. All parts but the host
    /// and the name are optional. `rediss://` uses TLS, with the system's authorities or those of `?ca=/path`.
    /// `?cert=/path&key=/path` adds a client certificate. These are PEM files, and each connection reads them again.
    /// `valkey://` and `valkeys://` mean the same. For a socket: `redis+unix:///path/of/socket?lease=name`, with `db`,
    /// `user` and `pass` as parameters.
    ///
    /// A server that fails over, or restarts without its last writes, can grant a lease twice, so there the
    /// [`token`](LeaseGuard::token) must be checked. Configure the server to keep its data (`appendonly yes`) and to
    /// evict nothing: `maxmemory-policy noeviction`, or one of the volatile policies. The volatile policies are safe
    /// because the keys `lockkit:{name}` never expire: these keys keep the tokens. The server uses its wall clock. If
    /// that clock is set forward, leases end that much too soon for other processes; if it is set back, that much too
    /// late. The shortest ttl is 100 ms. With access lists, the user needs
    /// `~lockkit:* &lockkit:* +@hash +@scripting +@pubsub +time`. Do not use a server of a cluster, because it may
    /// redirect the lease to another server.
    ///
    /// The name is the end of the path, or the parameter `lease`. Characters with another meaning in a URL are escaped,
    /// such as `%2F`. All leases of a process on one server share its connections. lockkit connects when the lease is
    /// first used. An invalid URL is an error of [`build`](LeaseBuilder::build).
    ///
    /// **etcd**, 3.4 or later, with its gateway on: several nodes are written as `host:2379,host:2379`, after an
    /// optional `user:password@`. `etcds://` uses TLS. The parameters are:
    /// - `ca`: a file with the certificates to trust instead of the system's;
    /// - `cert` and `key`: the files of a client certificate, which must have no common name if etcd has authentication
    ///   on;
    /// - `prefix`: the beginning of all keys, by default `lockkit/`.
    ///
    /// The user needs to read and write all keys with that prefix. If etcd requires client certificates, etcd's own
    /// certificate must be valid for clients, too, because its gateway connects to it as a client.
    ///
    /// ```
    /// # fn main() -> lockkit::Result<()> {
    /// # let path = std::env::temp_dir().join(format!("lockkit-doc-lease-url-{}", std::process::id()));
    /// use lockkit::Lease;
    /// let guard = Lease::connect(format!("file://{}", path.display())).build()?.try_lock()?;
    /// # drop(guard);
    /// # std::fs::remove_file(path).unwrap();
    /// # Ok(()) }
    /// ```
    pub fn connect(url: impl Into<String>) -> LeaseBuilder {
        LeaseBuilder::of_url(url.into())
    }

    /// Returns a builder for a lease on `key` in `store`. Share one store among all its leases.
    ///
    /// [`LeaseStore`] has an example.
    pub fn with_store(store: Arc<dyn LeaseStore>, key: impl Into<String>) -> LeaseBuilder {
        LeaseBuilder::of_store(store, key.into())
    }

    /// Returns the name under which the store keeps the lease. For a file this is its path.
    pub fn name(&self) -> &str {
        self.0.name.as_str()
    }

    /// Acquires the lease, waiting as `wait` says.
    ///
    /// The first call in a process starts the heartbeat thread. A waiter for a file is woken by the release, by
    /// inotify(7) on Linux; elsewhere the waiter polls at its [retry delay](LeaseBuilder::acquire_retry_delay). Every
    /// 50 ms that waiter checks whether an owner on this host is alive. The waiting threads of a process form a queue
    /// (FIFO), and only the first thread waits at the store; each other thread needs a descriptor. After the wait no
    /// thread remains, except a thread that looks up the host name of a server for longer than the wait lasts. On Linux
    /// the process keeps one descriptor from its first wait on, for the next.
    ///
    /// A call that does not wait for a holder still waits for the store. Each attempt may take a quarter of the ttl, at
    /// most 2 seconds, and no longer than the limit of the wait.
    ///
    /// # Errors
    /// - [`Held`](ErrorKind::Held), [`Timeout`](ErrorKind::Timeout) or [`Cancelled`](ErrorKind::Cancelled), as `wait`
    ///   says.
    /// - [`Io`](ErrorKind::Io) if the heartbeat thread cannot be started, or if the file cannot be created, opened,
    ///   locked or written.
    /// - [`Store`](ErrorKind::Store) if a store other than a file fails more often than
    ///   [`acquire_retry_limit`](LeaseBuilder::acquire_retry_limit) allows, or never answered within the limit of the
    ///   wait. A request without an answer may still take effect; the heartbeat frees such a grant as soon as the store
    ///   answers.
    ///
    /// For a file also:
    /// - [`NotALease`](ErrorKind::NotALease) if the file is not a lease.
    /// - [`LayoutMismatch`](ErrorKind::LayoutMismatch) if a later version wrote the file, or no greater token can
    ///   follow.
    /// - [`ForeignOwner`](ErrorKind::ForeignOwner) if a user other than this one or root owns the file, and the lease
    ///   is not [shared](LeaseBuilder::file_write_mode).
    /// - [`Insecure`](ErrorKind::Insecure) if the file is a link or not a plain file.
    pub fn acquire(&self, wait: &Wait) -> Result<LeaseGuard> {
        let found = Found { lease: &self.0, owner: None };
        telemetry::acquire(&found, || self.0.acquire(wait))
    }

    #[cfg(feature = "tokio")]
    async fn take_async(&self, wait: &Wait) -> Result<LeaseGuard> {
        let (lease, found) = (self.0.clone(), Found { lease: &self.0, owner: None });
        telemetry::acquire_async(&found, blocking::on_a_thread(wait, &found, move |wait| lease.acquire(wait))).await
    }

    /// Returns the holder of the lease; `None` if the lease is free, or if the record does not identify the holder. The
    /// result is a snapshot.
    ///
    /// # Errors
    /// As [`status`](Self::status).
    pub fn owner(&self) -> Result<Option<Owner>> {
        Ok(self.0.look()?.and_then(|seen| seen.owner().cloned()))
    }

    /// Returns what the record says now. Changes nothing and waits for no holder.
    ///
    /// ```
    /// # fn main() -> lockkit::Result<()> {
    /// # let path = std::env::temp_dir().join(format!("lockkit-doc-lease-status-{}", std::process::id()));
    /// use lockkit::{Lease, LeaseStatus};
    /// match Lease::file(&path).build()?.status()? {
    ///     LeaseStatus::Held(seen) => println!("token {:?}, held by {:?}", seen.token(), seen.owner()),
    ///     _ => println!("free"),
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// - [`Io`](ErrorKind::Io) or [`Store`](ErrorKind::Store) if the record cannot be read.
    /// - [`NotALease`](ErrorKind::NotALease) if the file is not a lease.
    /// - [`LayoutMismatch`](ErrorKind::LayoutMismatch) if a later version wrote the file.
    /// - [`Insecure`](ErrorKind::Insecure) if the file is a link or not a plain file.
    pub fn status(&self) -> Result<LeaseStatus> {
        Ok(self.0.look()?.map_or(LeaseStatus::Free, LeaseStatus::Held))
    }

    /// Takes the lease from the holder in `seen`, and from no other holder. Returns false if the lease has since been
    /// released, or taken by another holder. lockkit does not ask the holder. The holder learns of the eviction at its
    /// next heartbeat, and until then believes that it holds the lease. Make sure that the holder is gone, or that its
    /// token is checked.
    ///
    /// ```
    /// # fn main() -> lockkit::Result<()> {
    /// # let path = std::env::temp_dir().join(format!("lockkit-doc-lease-evict-{}", std::process::id()));
    /// # use lockkit::{Lease, LeaseStatus};
    /// # let lease = Lease::file(&path).build()?;
    /// let guard = lease.lock()?;
    /// if let LeaseStatus::Held(seen) = lease.status()? {
    ///     assert!(lease.evict(&seen)?);
    /// }
    /// assert_eq!(lease.status()?, LeaseStatus::Free);
    /// # drop(guard);
    /// # std::fs::remove_file(path).unwrap();
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire), without the errors of the wait.
    pub fn evict(&self, seen: &LeaseSnapshot) -> Result<bool> {
        let evicted = self.0.store.evict(&self.0.name, seen, self.0.request());
        evicted.map(|done| done == Released::Done).map_err(|error| self.0.failed(error))
    }
}

impl Inner {
    fn acquire(self: &Arc<Self>, wait: &Wait) -> Result<LeaseGuard> {
        let mut waiter = None;
        let acquired = self.acquire_in_turn(wait, &mut waiter);
        let is_told = |error: &Error| error.is_held() || error.is_timeout() || error.is_cancelled();
        if let (Err(error), Some(waiter)) = (&acquired, waiter) {
            if !is_told(error) {
                // The store failed for this thread only: the other threads ask for themselves.
                waiter.dissolve();
            }
        }
        acquired
    }

    fn acquire_in_turn(self: &Arc<Self>, wait: &Wait, waiter: &mut Option<Waiter>) -> Result<LeaseGuard> {
        let options = &self.options;
        let mut found = Found { lease: self, owner: None };
        wait.check(&found)?;
        let heart = HeartbeatScheduler::start()
            .map_err(|error| Error::io("start the heartbeat thread for", self.name.as_str(), error))?;
        let mut asking = PendingClaim::begin(self.clone(), heart);
        // The time limit starts here, so that it also bounds a store that does not answer.
        let patience = wait.patience();
        let mut recovered = None;
        let mut failures = 0;
        let mut is_answered = false;
        let mut waits = false;
        if let Some(patience) = patience.as_ref().filter(|_| self.waiters.is_awaited()) {
            found.owner = self.waiters.holder();
            waits = true;
            telemetry::waiting(&found);
            self.queue_up(waiter, patience, &mut found)?;
        }
        loop {
            let by = match patience.as_ref().and_then(WaitState::until) {
                Some(until) => self.request().min(Deadline::from(until).max(Deadline::after(self.shortest_request()))),
                None => self.request(),
            };
            let sent = options.clock.now();
            let failure = match self.store.try_acquire(&self.name, &asking.claim, options.ttl, by) {
                Ok(Attempt::Granted(mut grant)) => {
                    if options.clock.now() < options.terms().valid_until(sent, grant.ttl()) {
                        recovered = grant.take_recovered().or(recovered);
                        return Ok(LeaseGuard { held: asking.granted(grant, sent), recovered });
                    }
                    match self.give_back_untold(&grant, self.request()) {
                        Ok(is_passed_on) => {
                            // If the store does not pass this report on, this acquisition is the last that can make it.
                            recovered = grant.take_recovered().filter(|_| !is_passed_on).or(recovered);
                            asking.renew_claim();
                        }
                        // The heartbeat gives the grant back, and passes the report of the dead owner on.
                        Err(_) => asking.abandon_claim(sent),
                    }
                    is_answered = true;
                    StoreError::not_applied("its answer came too late")
                }
                Ok(Attempt::Busy(seen)) => {
                    (failures, is_answered) = (0, true);
                    found.owner = seen.owner().cloned();
                    match &patience {
                        Some(patience) => {
                            if !mem::replace(&mut waits, true) {
                                telemetry::waiting(&found);
                            }
                            if self.queue_up(waiter, patience, &mut found)? {
                                self.wait_for_change(&seen, patience, &found)?;
                            }
                        }
                        None => return Err(found.held()),
                    }
                    continue;
                }
                Err(error @ StoreError::Permanent(_)) => return Err(self.failed(error)),
                Err(error) => {
                    if matches!(error, StoreError::Unknown(_)) {
                        asking.is_unanswered(sent);
                    }
                    error
                }
            };
            // The next attempt repeats the claim. If the store carried out this attempt, it returns the same grant.
            failures += 1;
            if failures > options.retry_limit {
                return Err(self.failed(failure));
            }
            // A call that does not wait for a holder still waits for the store.
            match &patience {
                Some(patience) => match patience.sleep(options.retry_delay)? {
                    Ok(()) => {}
                    // The store never answered that the lease is held, so this is not a timeout of the lock.
                    Err(WaitError::TimedOut) if !is_answered => return Err(self.failed(failure)),
                    Err(gave_up) => return Err(patience.error(gave_up, &found)),
                },
                None => {
                    std::thread::sleep(options.retry_delay);
                    wait.check(&found)?;
                }
            }
        }
    }

    /// Gives back a grant that no caller received. Returns whether the store reports the owner that the grant was
    /// recovered from to the next owner.
    fn give_back_untold(&self, grant: &Grant, by: Deadline) -> std::result::Result<bool, StoreError> {
        let is_passed_on = grant.recovered().is_some() && self.store.abandon(grant, by)? == Released::Done;
        if !is_passed_on {
            self.store.release(grant, by)?;
        }
        Ok(is_passed_on)
    }

    /// Waits until this thread is first in the queue of the process. Returns true if it was first already and may wait
    /// at the store, and false if the lease may have changed in the meantime.
    fn queue_up(&self, waiter: &mut Option<Waiter>, patience: &WaitState, found: &mut Found<'_>) -> Result<bool> {
        if !waiter.as_ref().is_some_and(Waiter::is_first) {
            // Without a free descriptor the thread asks the store out of order.
            *waiter = self.waiters.join().ok();
        }
        let Some(place) = waiter else { return Ok(true) };
        let event = match place.as_fd() {
            Some(event) if !place.is_first() => event,
            _ => {
                self.waiters.set_holder(found.owner.as_ref());
                return Ok(true);
            }
        };
        let woken = patience.wait(Some(event), Duration::MAX)?;
        woken.map(|()| false).map_err(|gave_up| {
            found.owner = self.waiters.holder();
            patience.error(gave_up, found)
        })
    }

    /// Waits until the lease differs from `seen`, until `seen` expires, or until the wait ends.
    fn wait_for_change(&self, seen: &LeaseSnapshot, patience: &WaitState, found: &Found<'_>) -> Result<()> {
        /// The shortest wait: a lease that expires now is requested again after this time.
        const MOMENT: Duration = Duration::from_millis(1);
        /// The longest wait with a clock that no other process reads, because such a clock may run at any speed.
        const PRIVATE: Duration = Duration::from_millis(5);

        let options = &self.options;
        let mut limit = seen.expires_in().unwrap_or(options.ttl).max(MOMENT);
        if !self.store.profile().wakes_waiters {
            limit = limit.min(options.retry_delay);
        }
        if options.clock.shared_id().is_none() {
            limit = limit.min(PRIVATE);
        }
        let by = patience.until().map_or(Deadline::after(limit), |until| Deadline::after(limit).min(until.into()));
        let stop = patience.token().cloned().unwrap_or_default();
        let failed = match self.store.wait_for_change(&self.name, seen, by, &stop) {
            Err(error @ StoreError::Permanent(_)) => return Err(self.failed(error)),
            parked => parked.is_err(),
        };
        let pause = if failed { patience.sleep(options.retry_delay)? } else { Ok(()) };
        pause.and_then(|()| patience.portion(Duration::MAX).map(drop)).map_err(|gave_up| patience.error(gave_up, found))
    }

    fn look(&self) -> Result<Option<LeaseSnapshot>> {
        self.store.get(&self.name, self.request()).map_err(|error| self.failed(error))
    }

    /// Returns the deadline of a request that starts now: well within a ttl, and while the caller still waits.
    fn request(&self) -> Deadline {
        Deadline::after((self.options.ttl / 4).min(LONGEST_ATTEMPT))
    }

    /// Returns the minimum time of an attempt, even if the waiter gives up sooner. Without an answer the outcome would
    /// be unknown, and an orphaned grant could hold the name for a moment. A store that keeps no short ttls is slow.
    fn shortest_request(&self) -> Duration {
        (self.store.profile().smallest_ttl / 8).clamp(SHORTEST_REQUEST, Duration::from_millis(250))
    }

    fn describe(&self) -> String {
        format!("the lease {}", self.name)
    }

    fn failed(&self, error: StoreError) -> Error {
        error.into_error(|| self.describe())
    }
}

/// A lease that was found held.
struct Found<'l> {
    lease: &'l Inner,
    owner: Option<Owner>,
}

impl LockInfo for Found<'_> {
    fn describe(&self) -> String {
        self.lease.describe()
    }

    #[cfg(feature = "tracing")]
    fn label(&self) -> (&'static str, String) {
        ("lease", self.lease.name.as_str().to_owned())
    }

    fn holder(&self) -> Option<Owner> {
        self.owner.clone()
    }

    fn held(&self) -> Error {
        let source = self.lease.options.held_error.as_ref().map(|error| error());
        ErrorKind::Held { lock: self.describe(), owner: self.holder().map(Box::new), source }.into()
    }
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
        let Options { ttl, heartbeat, progress, .. } = &self.0.options;
        let mut shown = f.debug_struct("Lease");
        shown.field("name", &self.0.name.as_str()).field("ttl", ttl).field("heartbeat", heartbeat);
        shown.field("require_progress", progress).finish_non_exhaustive()
    }
}

/// A held [`Lease`]. Dropping the guard releases the lease, and waits for the store for a quarter of the ttl, at most
/// 250 ms. A file on a mount that hangs has no such limit. But if a request is known to hang already, the drop leaves
/// the release to the heartbeat.
///
/// A guard is held until its lease is lost, and a lost lease stays lost. When the guard of a lost lease is dropped, it
/// frees the name as far as that is possible at once, so that waiters stop waiting. The next owner then learns that the
/// lease was not released. A forked child's copy of a guard is not held, and dropping it does nothing. The lease of a
/// leaked guard (`mem::forget`) is renewed until the process ends.
///
/// All methods may be called from any thread. Only dropping and releasing access the store.
///
/// ```
/// # fn main() -> lockkit::Result<()> {
/// # let path = std::env::temp_dir().join(format!("lockkit-doc-lease-guard-{}", std::process::id()));
/// let guard = lockkit::Lease::file(&path).build()?.lock()?;
/// guard.check()?; // Returns the reason as an error if the lease is lost.
/// assert!(guard.is_held() && guard.remaining() <= std::time::Duration::from_secs(3)); // The default ttl.
/// guard.release()?;
/// # std::fs::remove_file(path).unwrap();
/// # Ok(()) }
/// ```
#[must_use = "a guard that is dropped at once releases its lock at once; bind it to a name such as `_guard`"]
pub struct LeaseGuard {
    held: Arc<Held>,
    recovered: Option<Box<Recovered>>,
}

impl LeaseGuard {
    /// Returns the fencing token: greater than the token of every earlier owner of this lease. Send it with each write
    /// to the resource that the lease guards. That resource must refuse a token lower than the highest token that it
    /// has seen.
    pub fn token(&self) -> u64 {
        self.held.token()
    }

    /// Returns whether the lease is held now. The result depends on the clock and not only on the last heartbeat: the
    /// first call after the time is over finds the lease lost. A call takes some 50 ns.
    pub fn is_held(&self) -> bool {
        self.held.check().is_ok()
    }

    /// Returns how long the lease lasts if it is not renewed; zero once it is lost.
    pub fn remaining(&self) -> Duration {
        self.held.remaining()
    }

    /// Checks [`is_held`](Self::is_held), for use with `?`.
    ///
    /// # Errors
    /// [`LeaseLost`](ErrorKind::LeaseLost) with the reason if the lease is not held any more.
    pub fn check(&self) -> Result<()> {
        self.held.check().map_err(|reason| self.held.lost(reason))
    }

    /// Returns a signal of the loss, which other code can watch. The signal outlives the guard.
    ///
    /// ```
    /// # fn main() -> lockkit::Result<()> {
    /// # let path = std::env::temp_dir().join(format!("lockkit-doc-lease-lost-{}", std::process::id()));
    /// use lockkit::{Lease, LossReason, Wait};
    /// let guard = Lease::file(&path).build()?.lock()?;
    /// let lost = guard.lost();
    /// let watcher = std::thread::spawn(move || lost.wait(&Wait::forever()));
    /// drop(guard);
    /// assert!(matches!(watcher.join().unwrap()?, LossReason::Released));
    /// # std::fs::remove_file(path).unwrap();
    /// # Ok(()) }
    /// ```
    pub fn lost(&self) -> LostSignal {
        LostSignal::new(self.held.clone())
    }

    /// Reports that the work makes progress. With [`require_progress`](LeaseBuilder::require_progress) the lease is
    /// renewed only while this is called often enough.
    pub fn progress(&self) {
        self.held.progress();
    }

    /// Releases the lease now, and returns an error if that fails.
    ///
    /// # Errors
    /// - [`LeaseLost`](ErrorKind::LeaseLost) if the lease was lost before.
    /// - [`Io`](ErrorKind::Io) or [`Store`](ErrorKind::Store) if the release at the store failed. The heartbeat then
    ///   repeats the release until the lease expires.
    pub fn release(self) -> Result<()> {
        self.held.release()
    }

    /// Releases the lease as [`release`](Self::release) does, without blocking the thread. Dropping the guard in a task
    /// blocks the task for as long as the store takes: a quarter of the ttl or 250 ms at most. The limit also holds
    /// when a renewal is under way. The release runs on a thread of its own. The release also completes when the future
    /// is dropped after its first poll.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> lockkit::Result<()> {
    /// # let path = std::env::temp_dir().join(format!("lockkit-doc-lease-async-{}", std::process::id()));
    /// use lockkit::{Lease, Wait};
    /// let guard = Lease::file(&path).build()?.acquire_async(&Wait::forever()).await?;
    /// guard.release_async().await?;
    /// # std::fs::remove_file(path).unwrap();
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`release`](Self::release), and [`Io`](ErrorKind::Io) if no thread can be started. In that case the calling
    /// thread releases the lease.
    #[cfg(feature = "tokio")]
    #[cfg_attr(docsrs, doc(cfg(feature = "tokio")))]
    pub async fn release_async(self) -> Result<()> {
        let held = self.held.clone();
        blocking::elsewhere_do(&*held, move || self.release()).await
    }

    /// Returns `Some` if the previous owner did not release: it died, was silent for its ttl, or its record was
    /// damaged. The value names that owner, if it is known. That owner may be alive, and may never have learned that it
    /// had the lease.
    pub fn recovered(&self) -> Option<&Recovered> {
        self.recovered.as_deref()
    }
}

impl Guard for LeaseGuard {
    fn release(self) -> Result<()> {
        self.release()
    }

    fn recovered(&self) -> Option<&Recovered> {
        self.recovered()
    }
}

impl Drop for LeaseGuard {
    fn drop(&mut self) {
        // A lease that could not be released expires.
        let _ = self.held.release();
    }
}

impl fmt::Debug for LeaseGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("LeaseGuard");
        shown.field("name", &self.held.name()).field("token", &self.token()).field("remaining", &self.remaining());
        shown.field("recovered", &self.recovered).finish_non_exhaustive()
    }
}
