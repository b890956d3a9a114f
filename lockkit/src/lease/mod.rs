//! Leases: a lock with a time to live, a fencing token, and an honest answer to "do I still hold it?".
//!
//! A lease is a record that says who holds a key, and for how long from its last renewal. One heartbeat thread renews
//! all leases of a process. A holder that cannot renew, because it was stopped, cut off or is hung, loses the lease
//! when its time is over, and **knows it**: [`LeaseGuard::is_held`] counts by the holder's own clock, from before the
//! request that was granted, less one part in a hundred and 2 ms. So it turns false before anybody else can get in, as
//! long as no clock runs wrong by more than that, and whether or not a heartbeat has run since. No two clocks are
//! compared.
//!
//! What no lease can do is stop a holder between asking `is_held` and what it then does; nor tell it that the virtual
//! machine in which it runs was paused or put back to a snapshot, where its clock stands still. For that there is the
//! [`token`](LeaseGuard::token), greater with every owner: let what the lease guards refuse a lower one than it has
//! seen.
//!
//! Implementation: `tenure` is the state of a held lease, without side effects; `heart` is the heartbeat thread; `waiters`
//! is the queue of the threads that wait for a lease; `store` is the interface of a lease store, `file` the built-in
//! store, `record` the format of its file, `observer` the rule by which an unchanged record expires, and `clock` the time.
//!
//! Leases are from C. Gray and D. Cheriton, *Leases: An Efficient Fault-Tolerant Mechanism for Distributed File Cache
//! Consistency* (SOSP 1989). Why they need fencing: M. Kleppmann, [How to do distributed locking] (2016).
//!
//! [How to do distributed locking]: https://martin.kleppmann.com/2016/02/08/how-to-do-distributed-locking.html

mod builder;
mod clock;
mod connect;
#[cfg(any(feature = "etcd", feature = "postgres", feature = "redis"))]
mod engine;
mod file;
mod format;
mod heartbeat;
mod shared;
mod staleness;
mod state;
mod store;
#[cfg(test)]
mod tests;
mod waiters;

use std::fmt;
use std::mem;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use builder::LeaseBuilder;
use builder::Options;
pub use clock::{Clock, ManualClock, SystemClock};
use heartbeat::HeartbeatScheduler;
pub use shared::LostSignal;
use shared::{Held, PendingClaim, SHORTEST_REQUEST};
pub use state::LossReason;
pub use store::{
    Attempt, ClaimId, Deadline, Durability, Grant, LeaseName, LeaseSnapshot, LeaseStore, Released, Renewal, StoreError,
    StoreProfile,
};
use waiters::Waiter;

#[cfg(feature = "tokio")]
use crate::blocking;
use crate::error::{Error, ErrorKind, Result};
use crate::lock::{Guard, Recovered, lock_methods};
use crate::owner::Owner;
use crate::telemetry;
use crate::wait::{LockInfo, Wait, WaitError, WaitState};

/// The longest that a request may take which somebody waits for, besides a quarter of the ttl.
const LONGEST_ATTEMPT: Duration = Duration::from_secs(2);

/// A lock with a time to live: one owner at a time among all processes that reach its record, on one host or several.
///
/// For leaders, and for work on a shared disk. It frees itself when its holder is dead, stopped, hung or cut off for
/// longer than its ttl, where every other lock of this crate waits for a holder that lives. The price is that a holder
/// can lose it: ask [`is_held`](LeaseGuard::is_held) or [`check`](LeaseGuard::check) before each thing that matters,
/// watch [`lost`](LeaseGuard::lost), and give the [`token`](LeaseGuard::token) along with every write.
///
/// Not for a single machine where a holder that is stopped should keep its lock
/// ([`NamedLock`](crate::NamedLock), [`FileLock`](crate::FileLock)), nor where losing it half-way through does harm
/// and nothing checks the token.
///
/// [`file`](Self::file) keeps the record in a file; [`with_store`](Self::with_store) wherever a [`LeaseStore`] can.
/// Cloning gives another handle on the same lease.
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

/// Who holds a lease; see [`Lease::status`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LeaseStatus {
    /// Nobody.
    Free,
    /// A holder has it by its record, or the file is blank or damaged and counts as held; then there is no
    /// [claim](LeaseSnapshot::claim). If [`LeaseSnapshot::expires_in`] is zero the lease is stale: the next process to ask takes it over.
    Held(LeaseSnapshot),
}

/// How a lease was lost; what [`on_lost`](LeaseBuilder::on_lost) is told.
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
    /// Which lease, for people.
    pub lock: String,
    /// The token under which it was held.
    pub token: u64,
    /// Why.
    pub reason: LossReason,
}

impl Lease {
    /// A lease whose record is a file, on this machine or on a file system that several share and whose flock(2)
    /// reaches all of them.
    ///
    /// The first acquisition creates the file. lockkit never deletes it, because it contains the token; do not delete it
    /// either. Its directory must exist, unless [`create_parents`](LeaseBuilder::create_parents) is given. After a deletion
    /// the next process to ask gets the lease at once, and the holder learns of it at its next heartbeat. If no process has
    /// asked until then, the heartbeat creates the file again. [`build`](LeaseBuilder::build) makes the path absolute, so a
    /// later change of the working directory has no effect.
    ///
    /// lockkit never writes to a file that is not a lease, for any user and in any method: the error is
    /// [`NotALease`](ErrorKind::NotALease). It reclaims only a blank file (empty, or at most 1024 zeros) and a lease that
    /// was truncated or damaged. If the file of a held lease is replaced by another program's file, the holder keeps the
    /// lease until its deadline, in case the record is restored.
    ///
    /// Each heartbeat opens, locks, rewrites and closes the file, some microseconds in memory: no descriptor
    /// is kept, so ten thousand leases need no more of them than one. On file systems of
    /// this machine (tmpfs, ext4, xfs, btrfs and their like) the file is not synced at each step: what a power
    /// cut takes back is allowed for, and so is a deletion or a restored backup, because each new token is at least the
    /// microseconds since the epoch. The wall clock must only not be set back along with the file, and of several hosts
    /// none may be ahead of the others for as long as such a loss takes back. On all other file systems, such as NFS,
    /// CIFS and FUSE, each step is synced, so that a beat has reached the server before it counts.
    ///
    /// The price: a process without free descriptors cannot renew, and loses its file leases after a ttl. A
    /// holder that is stopped in the middle of a heartbeat, or killed but not yet gone, keeps the file locked until it
    /// continues or is gone, and no other process can take the lease. (The host of an NFS client that is cut off keeps the
    /// file locked until the server frees the lock: 90 s on Linux.) Other processes lock the file only to take a lease that
    /// is free or expired. Any user who can open the file can lock it, so let only those users open it that share the lease.
    ///
    /// Who wants a held lease takes it over when its owner is dead by its identity (the same host, or an earlier boot
    /// of it, where `/etc/machine-id` tells which host that is), or when its beat has not changed for the ttl that
    /// stands in the record, by the clock of who wants it. A program that tries only once each time it is started, as
    /// from cron, gets there too: it leaves a note of when it first saw that beat, which the next one on the same
    /// machine goes on from.
    ///
    /// A blank or damaged file counts as held for
    /// [`invalid_pid_lock_stale_threshold`](LeaseBuilder::invalid_pid_lock_stale_threshold). After that the next process to
    /// ask takes it, also a program that tries only once: the times of the file show how long it has been unchanged. (On a
    /// file system of another machine, an hour of that does not count, for the clocks may differ.)
    /// [`status`](Self::status) reports the same. A file of a later version of the format stays unchanged.
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

    /// A lease at a URL: in a file, or on a server.
    ///
    /// | URL | needs the feature |
    /// |---|---|
    /// | `file:///path` | |
    /// | `etcd://host:2379/name` | `etcd` |
    /// | `postgres://user@host/database?lease=name` | `postgres` |
    /// | `redis://host:6379/name` | `redis` |
    ///
    /// **Redis and Valkey**, from version 5 on: `redis://user:password@host:port/database/name`, where all but the host
    /// and the name can be left out; `rediss://` for TLS, by the authorities of the system or `?ca=/path`, with a
    /// certificate of the client's own by `?cert=/path&key=/path`, all PEM files, which are read anew for each
    /// connection; `valkey://` and `valkeys://` mean the same; `redis+unix:///path/of/socket?lease=name`, with `db`,
    /// `user` and `pass` as parameters, for a socket. A server that fails over, or comes back without what it was told
    /// last, can give a lease twice, so there the [`token`](LeaseGuard::token) must be checked. Have it keep its data
    /// with `appendonly yes`, and evict nothing (`maxmemory-policy noeviction`, or one of the volatile ones: the keys
    /// `lockkit:{name}` never expire, because they keep the tokens). It goes by its wall clock: if that is set forward,
    /// leases end that much too soon for others, and that much too late if it is set back. The shortest ttl is 100 ms.
    /// Where there are access lists, the user needs `~lockkit:* &lockkit:* +@hash +@scripting +@pubsub +time`. No
    /// server of a cluster, for that may send the lease elsewhere.
    ///
    /// The name is the end of the path, or the parameter `lease`, with `%2F` and its like for what means something else
    /// in a URL. All leases of a process on one server share its connections. Nothing is connected to until the lease is
    /// first used; a URL that is not right is an error of [`build`](LeaseBuilder::build).
    ///
    /// Of etcd (3.4 or later, its gateway on): several nodes stand as `host:2379,host:2379`, and `user:password@` before
    /// them; `etcds://` speaks TLS. Parameters are `ca`, a file with the certificates to trust instead of the system's;
    /// `cert` and `key`, the files of a client's certificate, which must have no common name where etcd has
    /// authentication on; and `prefix`, what all keys begin with, `lockkit/` unless told otherwise. A user needs to read
    /// and write all keys with that prefix. Where etcd asks for certificates of clients, its own must be one for clients,
    /// too, because its gateway comes to it as one.
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

    /// A lease on `key` in `store`. Share one store among all its leases.
    ///
    /// [`LeaseStore`] has an example.
    pub fn with_store(store: Arc<dyn LeaseStore>, key: impl Into<String>) -> LeaseBuilder {
        LeaseBuilder::of_store(store, key.into())
    }

    /// The name under which the store keeps it; of a file, its path.
    pub fn name(&self) -> &str {
        self.0.name.as_str()
    }

    /// Takes the lease, waiting as `wait` says.
    ///
    /// The heartbeat thread is started first, once for the process. A waiter for a file is woken by the release (by
    /// inotify(7) on Linux; elsewhere it looks at its [retry delay](LeaseBuilder::acquire_retry_delay)), and looks
    /// every 50 ms whether an owner of this host still lives. The waiting threads of a process form a queue (FIFO),
    /// and only the first thread waits at the store; each other thread needs a descriptor. The wait leaves no thread behind, but what looks up the name of an
    /// engine's host for longer than the wait lasts. On Linux the process
    /// keeps one descriptor from its first wait on, for the next.
    ///
    /// Also who does not wait for a holder waits for the store: each attempt may take a quarter of the ttl, at most 2
    /// seconds, and no longer than the limit of the wait.
    ///
    /// # Errors
    /// [`Held`](ErrorKind::Held), [`Timeout`](ErrorKind::Timeout) or [`Cancelled`](ErrorKind::Cancelled) as `wait` has
    /// it; [`Io`](ErrorKind::Io) when the heartbeat thread cannot be started, or the file not be made, opened, locked
    /// or written; [`Store`](ErrorKind::Store) when another store fails as often as
    /// [`acquire_retry_limit`](LeaseBuilder::acquire_retry_limit) has it, or never answered within the limit of the
    /// wait: then the request may yet take effect, and the heartbeat frees what it has taken as soon as the store
    /// answers. Of a file also
    /// [`NotALease`](ErrorKind::NotALease) when it is something else,
    /// [`LayoutMismatch`](ErrorKind::LayoutMismatch) when a later version wrote it or no greater token can follow,
    /// [`ForeignOwner`](ErrorKind::ForeignOwner) when another user than this one or root owns it and the lease is not
    /// [shared](LeaseBuilder::file_write_mode), and [`Insecure`](ErrorKind::Insecure) when it is a link or no plain file.
    pub fn acquire(&self, wait: &Wait) -> Result<LeaseGuard> {
        let found = Found { lease: &self.0, owner: None };
        telemetry::acquire(&found, || self.0.acquire(wait))
    }

    #[cfg(feature = "tokio")]
    async fn take_async(&self, wait: &Wait) -> Result<LeaseGuard> {
        let (lease, found) = (self.0.clone(), Found { lease: &self.0, owner: None });
        telemetry::acquire_async(&found, blocking::on_a_thread(wait, &found, move |wait| lease.acquire(wait))).await
    }

    /// Who holds the lease now; `None` when nobody does, or nothing tells who. By the time it returns it may already
    /// be past.
    ///
    /// # Errors
    /// As [`status`](Self::status).
    pub fn owner(&self) -> Result<Option<Owner>> {
        Ok(self.0.look()?.and_then(|seen| seen.owner().cloned()))
    }

    /// What the record says now. Changes nothing and waits for nobody.
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
    /// [`Io`](ErrorKind::Io) or [`Store`](ErrorKind::Store) when the record cannot be read;
    /// [`NotALease`](ErrorKind::NotALease) when the file is something else; [`LayoutMismatch`](ErrorKind::LayoutMismatch) when a later version wrote it;
    /// [`Insecure`](ErrorKind::Insecure) when its file is a link or no plain file.
    pub fn status(&self) -> Result<LeaseStatus> {
        Ok(self.0.look()?.map_or(LeaseStatus::Free, LeaseStatus::Held))
    }

    /// Takes the lease from the holder that was seen, and from no other: says whether it did, which is not when it has
    /// been released or taken by somebody else since. The holder is not asked. It learns of it at its next beat, and
    /// until then believes that it holds: make sure that it is gone, or that its token is checked.
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
    /// As [`acquire`](Self::acquire), without those of the wait.
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
        // From here on, so that a limit also bounds a store that does not answer.
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
                            // What nobody else will be told of.
                            recovered = grant.take_recovered().filter(|_| !is_passed_on).or(recovered);
                            asking.renew_claim();
                        }
                        // The heartbeat gives it back, and passes on who died.
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
            // The same claim again: if the store did it after all, it gives the same grant.
            failures += 1;
            if failures > options.retry_limit {
                return Err(self.failed(failure));
            }
            // Also who does not wait for a holder waits for the store.
            match &patience {
                Some(patience) => match patience.sleep(options.retry_delay)? {
                    Ok(()) => {}
                    // Nobody said that it is held.
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

    /// Gives back a grant that nobody was told of. Whether the next owner will be told of whom it was recovered from.
    fn give_back_untold(&self, grant: &Grant, by: Deadline) -> std::result::Result<bool, StoreError> {
        let is_passed_on = grant.recovered().is_some() && self.store.abandon(grant, by)? == Released::Done;
        if !is_passed_on {
            self.store.release(grant, by)?;
        }
        Ok(is_passed_on)
    }

    /// Waits until this thread is first in the queue of the process. Returns true if it was first already and may wait at
    /// the store, and false if the lease may have changed in the meantime.
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

    /// Waits for a change of what was seen, until it runs out or the patience does.
    fn wait_for_change(&self, seen: &LeaseSnapshot, patience: &WaitState, found: &Found<'_>) -> Result<()> {
        /// What is said to run out now is asked for again a moment later.
        const MOMENT: Duration = Duration::from_millis(1);
        /// A clock that no other process reads may run as it likes.
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

    /// By when a request must have ended that is asked for now: well within a ttl, and while somebody still waits.
    fn request(&self) -> Deadline {
        Deadline::after((self.options.ttl / 4).min(LONGEST_ATTEMPT))
    }

    /// What an attempt is given at least, however soon the waiter gives up: without an answer nobody would know whether
    /// it took effect, and the name might be held by nobody for a moment. A store that keeps no short ttls is a slow one.
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
    in_tasks: "It is done on a thread of its own, under any runtime ([`Io`](crate::ErrorKind::Io) when none can be started), for \
               stores may block. When the future is dropped that thread stops waiting at once and ends; if a request is \
               under way, when the store has answered or the request's time is over: a quarter of the ttl, or 2 seconds \
               at most. What was granted until then it releases. A guard that is dropped in a task blocks it for a \
               moment: see [`LeaseGuard::release_async`]."
);

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Options { ttl, heartbeat, progress, .. } = &self.0.options;
        let mut shown = f.debug_struct("Lease");
        shown.field("name", &self.0.name.as_str()).field("ttl", ttl).field("heartbeat", heartbeat);
        shown.field("require_progress", progress).finish_non_exhaustive()
    }
}

/// A held [`Lease`]; dropping it releases, and waits for that for a quarter of the ttl or 250 ms at most. A file on a mount
/// that hangs knows no such limit; but where a request is seen to hang already, the heartbeat is left to release.
///
/// A guard is held until its lease is lost, and a lost lease stays lost; when its guard goes the name is given free, as far
/// as that can be done at once, so that nobody waits any longer, and the next owner is told that it was not released. A
/// forked child's copy of a guard is not held, and dropping it does nothing. A guard that is leaked (`mem::forget`) goes on
/// being renewed until the process ends.
///
/// All methods may be called from any thread. None but dropping and releasing touches the store.
///
/// ```
/// # fn main() -> lockkit::Result<()> {
/// # let path = std::env::temp_dir().join(format!("lockkit-doc-lease-guard-{}", std::process::id()));
/// let guard = lockkit::Lease::file(&path).build()?.lock()?;
/// guard.check()?; // An error that says why, if it were lost.
/// assert!(guard.is_held() && guard.remaining() <= std::time::Duration::from_secs(3)); // The ttl, unless told otherwise.
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
    /// The fencing token: greater than that of every earlier owner of this lease. Give it along with each write to what
    /// the lease guards, and have that refuse a lower one than it has seen.
    pub fn token(&self) -> u64 {
        self.held.token()
    }

    /// Whether the lease is held now, by the clock and not only by the last heartbeat: the first to ask after the time
    /// is over finds it lost. Some 50 ns.
    pub fn is_held(&self) -> bool {
        self.held.check().is_ok()
    }

    /// How long the lease lasts if it is not renewed; nothing once it is lost.
    pub fn remaining(&self) -> Duration {
        self.held.remaining()
    }

    /// As [`is_held`](Self::is_held), to be used with `?`.
    ///
    /// # Errors
    /// [`LeaseLost`](ErrorKind::LeaseLost) with the reason when it is not held any more.
    pub fn check(&self) -> Result<()> {
        self.held.check().map_err(|reason| self.held.lost(reason))
    }

    /// What tells of the loss, to be watched elsewhere. It outlives the guard.
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

    /// Says that the work goes on. Where [`require_progress`](LeaseBuilder::require_progress) asks for it, the lease is
    /// only renewed while this is called often enough.
    pub fn progress(&self) {
        self.held.progress();
    }

    /// Releases now and says what went wrong.
    ///
    /// # Errors
    /// [`LeaseLost`](ErrorKind::LeaseLost) when it had been lost before; [`Io`](ErrorKind::Io) or
    /// [`Store`](ErrorKind::Store) when the store could not be told: the heartbeat then tries on, until the lease has run
    /// out by itself.
    pub fn release(self) -> Result<()> {
        self.held.release()
    }

    /// As [`release`](Self::release), without blocking the thread: dropping the guard in a task blocks it for as long
    /// as the store takes, a quarter of the ttl or 250 ms at most, also when a renewal is under way. It is done on a
    /// thread of its own, and also when the future is dropped after its first poll.
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
    /// As [`release`](Self::release), and [`Io`](ErrorKind::Io) when no thread can be started: the lease is released all
    /// the same, by this one.
    #[cfg(feature = "tokio")]
    #[cfg_attr(docsrs, doc(cfg(feature = "tokio")))]
    pub async fn release_async(self) -> Result<()> {
        let held = self.held.clone();
        blocking::elsewhere_do(&*held, move || self.release()).await
    }

    /// Whether the previous owner did not release: it died, or was silent for its ttl, or its record was damaged.
    /// Who that was, where it is known; it may live, and may never have learned that it had the lease.
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
        // What could not be released runs out by itself.
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
