//! The builder of a lease.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::clock::Clock;
use super::connect;
use super::handle::Lease;
use super::location::Location;
use super::options::{Loss, Options};
use super::settings::{CheckedTiming, Settings, reject_if};
use super::spec::LeaseSpec;
use super::store::file::{FileSpec, FileStore};
use super::store::lease_store::{LeaseName, LeaseStore};
use super::waiters::{QueueKey, RecordId};
use crate::base::error::{Error, Result};

/// A builder of a [`Lease`]; see [`Lease::file`], [`Lease::connect`] and [`Lease::with_store`].
///
/// All options for a file:
///
/// ```
/// # fn main() -> lockkit::Result<()> {
/// # let path = std::env::temp_dir().join(format!("lockkit-doc-lease-builder-{}", std::process::id()));
/// use std::sync::Arc;
/// use std::time::Duration;
/// use lockkit::Lease;
/// use lockkit::lease::SystemClock;
///
/// let lease = Lease::file(&path)
///     .ttl(Duration::from_secs(10)) // Another process may take over this long after the last renewal.
///     .heartbeat(Duration::from_secs(2)) // The interval between renewals.
///     .acquire_retry_limit(5) // Repeats a failed request this often,
///     .acquire_retry_delay(Duration::from_millis(100)) // with this pause in between.
///     .invalid_pid_lock_stale_threshold(Duration::from_secs(2)) // A damaged record is reclaimed after this time.
///     .file_write_mode(0o640)
///     .create_parents()
///     .directory_write_mode(0o750)
///     .clock(Arc::new(SystemClock))
///     .build()?;
/// let guard = lease.lock()?;
/// # drop(guard);
/// # std::fs::remove_file(path).unwrap();
/// # Ok(()) }
/// ```
#[must_use = "a builder makes nothing until `build`"]
pub struct LeaseBuilder {
    target: Target,
    settings: Settings,
}

/// The lease that a builder builds.
enum Target {
    Location(Location),
    Url(String),
}

impl Lease {
    /// Returns a builder for a lease whose record is a file. The file is on this machine, or on a
    /// file system that several machines share and whose flock(2) reaches all of them.
    ///
    /// The first acquisition creates the file. lockkit never deletes it, because it contains the
    /// token; do not delete it either. Its directory must exist, unless
    /// [`create_parents`](LeaseBuilder::create_parents) is given. After a deletion the next process
    /// to ask gets the lease at once, and the holder learns of it at its next heartbeat. If no
    /// process has asked until then, the heartbeat creates the file again.
    /// [`build`](LeaseBuilder::build) makes the path absolute, so a later change of the working
    /// directory has no effect.
    ///
    /// lockkit never writes to a file that is not a lease, for any user and in any method: the
    /// error is [`NotALease`](crate::ErrorKind::NotALease). It reclaims only a blank file (empty,
    /// or at most 1024 zeros) and a lease that was truncated or damaged. If another program's file
    /// replaces the file of a held lease, the holder keeps the lease until its deadline. The record
    /// may be restored by then.
    ///
    /// Each heartbeat opens, locks, rewrites and closes the file, which takes some microseconds in
    /// memory. lockkit keeps no descriptor open, so ten thousand leases need no more descriptors
    /// than one. On file systems of this machine (tmpfs, ext4, xfs, btrfs and similar) a step does
    /// not sync the file. A power cut, a deletion and a restored backup do no harm to the order of
    /// tokens: each new token is at least the microseconds since the epoch. That holds unless the
    /// wall clock is set back along with the file. With several hosts, no host's clock may be ahead
    /// of the others by as much time as such a loss takes back. On all other file systems, such as
    /// NFS, CIFS and FUSE, each step is synced, so that a heartbeat has reached the server before
    /// it counts.
    ///
    /// The price: a process without free descriptors cannot renew, and loses its file leases after
    /// a ttl. A holder that is stopped in the middle of a heartbeat, or killed but not yet gone,
    /// keeps the file locked until it continues or is gone. Until then no other process can take
    /// the lease. (The host of an NFS client that is cut off keeps the file locked until the server
    /// frees the lock: 90 s on Linux.) Other processes lock the file only to take a lease that is
    /// free or expired. Any user with permission to open the file can lock it. Give that permission
    /// only to the users that share the lease.
    ///
    /// A process takes over a held lease in two cases:
    /// - The owner is dead by its identity. It ran on this host, or on an earlier boot of this host
    ///   if `/etc/machine-id` identifies the host.
    /// - The owner's heartbeat has not changed for the ttl in the record, by the clock of the
    ///   process that takes the lease over.
    ///
    /// A program that tries only once per start, for example from cron, succeeds too. It leaves a
    /// note of the time at which it first saw that heartbeat. The next program on the same machine
    /// continues from the note.
    ///
    /// A blank or damaged file counts as held for
    /// [`invalid_pid_lock_stale_threshold`](LeaseBuilder::invalid_pid_lock_stale_threshold). After
    /// that the next process to ask takes it, also a program that tries only once: the times of the
    /// file show how long it has been unchanged. (On a file system of another machine, an hour of
    /// that does not count, because the clocks may differ.) [`status`](Self::status) reports the
    /// same. lockkit does not change a file of a later version of the format.
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
        LeaseBuilder::new(Target::Location(Location::File(path.into())))
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
    /// **Redis and Valkey**, from version 5 on: `redis://user:password@host:port/database/name`.
    /// All parts but the host and the name are optional. `rediss://` uses TLS, with the system's
    /// authorities or those of `?ca=/path`. `?cert=/path&key=/path` adds a client certificate.
    /// These are PEM files, and each connection reads them again. `valkey://` and `valkeys://` mean
    /// the same. For a socket: `redis+unix:///path/of/socket?lease=name`, with `db`, `user` and
    /// `pass` as parameters.
    ///
    /// A server that fails over, or restarts without its last writes, can grant a lease twice, so
    /// there the [`token`](super::LeaseGuard::token) must be checked. Configure the server to keep
    /// its data (`appendonly yes`) and to evict nothing: `maxmemory-policy noeviction`, or one of
    /// the volatile policies. The volatile policies are safe because the keys `lockkit:{name}`
    /// never expire: these keys keep the tokens. The server uses its wall clock. If that clock is
    /// set forward, leases end that much too soon for other processes; if it is set back, that much
    /// too late. The shortest ttl is 100 ms. With access lists, the user needs
    /// `~lockkit:* &lockkit:* +@hash +@scripting +@pubsub +time`. Do not use a server of a cluster,
    /// because it may redirect the lease to another server.
    ///
    /// The name is the end of the path, or the parameter `lease`. Characters with another meaning
    /// in a URL are escaped, such as `%2F`. All leases of a process on one server share its
    /// connections. lockkit connects when the lease is first used. An invalid URL is an error of
    /// [`build`](LeaseBuilder::build).
    ///
    /// **etcd**, 3.4 or later, with its gateway on: several nodes are written as
    /// `host:2379,host:2379`, after an optional `user:password@`. `etcds://` uses TLS. The
    /// parameters are:
    /// - `ca`: a file with the certificates to trust instead of the system's;
    /// - `cert` and `key`: the files of a client certificate, which must have no common name if
    ///   etcd has authentication on;
    /// - `prefix`: the beginning of all keys, by default `lockkit/`.
    ///
    /// The user needs to read and write all keys with that prefix. If etcd requires client
    /// certificates, etcd's own certificate must be valid for clients, too, because its gateway
    /// connects to it as a client.
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
        LeaseBuilder::new(Target::Url(url.into()))
    }

    /// Returns a builder for a lease on `key` in `store`. Share one store among all its leases.
    ///
    /// [`LeaseStore`] has an example.
    pub fn with_store(store: Arc<dyn LeaseStore>, key: impl Into<String>) -> LeaseBuilder {
        LeaseBuilder::new(Target::Location(Location::Store(store, key.into())))
    }
}

impl LeaseBuilder {
    fn new(target: Target) -> Self {
        Self {
            target,
            settings: Settings::default(),
        }
    }

    /// Sets how long the lease lasts after its last renewal. The default is 3 seconds, or the
    /// shortest ttl of the store if that is longer. A waiter waits this long for a silent holder.
    ///
    /// If another store of this process hangs, renewals may stop for a quarter of the shortest ttl,
    /// at most half a second. With a ttl below some 50 ms they stop for longer. If several stores
    /// hang at once, each of them adds this time.
    #[doc(alias = "lease_stale_threshold")]
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.settings.ttl = Some(ttl);
        self
    }

    /// Sets the interval between renewals: at least 1 ms, at most a third of the ttl. The default
    /// is 250 ms. It is a quarter of the ttl if that is shorter, or if the store keeps no ttl below
    /// one second.
    #[doc(alias = "lease_heartbeat_interval")]
    pub fn heartbeat(mut self, heartbeat: Duration) -> Self {
        self.settings.heartbeat = Some(heartbeat);
        self
    }

    /// Sets the callback for the loss of a held lease. It runs once for each loss, and not at a
    /// release. A thread that is started for losses reports the losses of a process one after the
    /// other; if no thread can be started, the heartbeat thread does. So the callback may take its
    /// time, but the next loss is reported only when the callback returns. A panic in the callback
    /// is caught and has no further effect.
    ///
    /// ```
    /// # fn main() -> lockkit::Result<()> {
    /// let lease = lockkit::Lease::file("/tmp/lockkit-doc-on-lost")
    ///     .on_lost(|loss| {
    ///         eprintln!("{} is lost: {}", loss.lock, loss.reason);
    ///         std::process::exit(75);
    ///     })
    ///     .build()?;
    /// # Ok(()) }
    /// ```
    #[doc(alias = "on_lease_lost")]
    pub fn on_lost(mut self, call: impl Fn(&Loss) + Send + Sync + 'static) -> Self {
        self.settings.on_lost = Some(Arc::new(call));
        self
    }

    /// Renews the lease only while [`progress`](super::LeaseGuard::progress) has been called within
    /// this time, which first counts from the acquisition. A worker that hangs then loses its lease
    /// a ttl after the last renewal, and does not keep it for as long as its process lives.
    ///
    /// ```
    /// # fn main() -> lockkit::Result<()> {
    /// # let path = std::env::temp_dir().join(format!("lockkit-doc-lease-progress-{}", std::process::id()));
    /// use std::time::Duration;
    /// let lease = lockkit::Lease::file(&path).require_progress(Duration::from_secs(30)).build()?;
    /// let guard = lease.lock()?;
    /// for item in ["one", "two"] {
    ///     guard.check()?;
    ///     // Work on it.
    ///     guard.progress();
    /// }
    /// # drop(guard);
    /// # std::fs::remove_file(path).unwrap();
    /// # Ok(()) }
    /// ```
    pub fn require_progress(mut self, within: Duration) -> Self {
        self.settings.progress = Some(within);
        self
    }

    /// Sets an error of the program's own, for a lease that another owner holds when the caller
    /// does not wait. That error becomes the source of the [`Held`](crate::ErrorKind::Held) error;
    /// the kind stays `Held`.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let path = std::env::temp_dir().join(format!("lockkit-doc-lease-held-{}", std::process::id()));
    /// use std::error::Error;
    ///
    /// #[derive(Debug, PartialEq)]
    /// struct BuildRuns;
    /// impl std::fmt::Display for BuildRuns {
    ///     fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
    ///         f.write_str("a build is running already")
    ///     }
    /// }
    /// impl Error for BuildRuns {}
    ///
    /// let lease = lockkit::Lease::file(&path).held_error(|| BuildRuns).build()?;
    /// let guard = lease.try_lock()?;
    /// let error = lease.try_lock().unwrap_err();
    /// assert!(error.is_held());
    /// assert_eq!(error.source().and_then(|source| source.downcast_ref()), Some(&BuildRuns));
    /// # drop(guard);
    /// # std::fs::remove_file(path)?;
    /// # Ok(()) }
    /// ```
    pub fn held_error<E>(mut self, error: impl Fn() -> E + Send + Sync + 'static) -> Self
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        self.settings.held_error = Some(Arc::new(move || Box::new(error())));
        self
    }

    /// Sets how often in a row an attempt is repeated that the store refused or did not answer,
    /// before acquiring fails. The default is 4 times. Finding the lease held is no failure.
    pub fn acquire_retry_limit(mut self, limit: u32) -> Self {
        self.settings.retry_limit = limit;
        self
    }

    /// Sets the pause between such attempts, and the poll interval at a held lease if nothing wakes
    /// the waiter: at least 1 ms, by default 25 ms.
    pub fn acquire_retry_delay(mut self, delay: Duration) -> Self {
        self.settings.retry_delay = delay;
        self
    }

    /// Sets, for a file, how long a blank file (empty, or zeros) or a damaged lease counts as held.
    /// At least a heartbeat; the default is 2 seconds, or two heartbeats if that is longer.
    ///
    /// The file must be unchanged for this time. The process observes that on its own clock. The
    /// times of the file are evidence, too, less an hour on a file system of another machine. A
    /// live holder repairs the record at its next heartbeat. A holder that is stopped when the
    /// record is damaged can overlap with the next holder, by the difference of its ttl and this
    /// time.
    pub fn invalid_pid_lock_stale_threshold(mut self, age: Duration) -> Self {
        self.settings.damage_timeout = Some(age);
        self
    }

    /// Sets, for a file, the exact permissions of a new file, independent of the umask. The default
    /// is 0600, less the umask. The mode must let the owner read and write.
    ///
    /// A mode that lets the group or others write shares the lease between users: this lease then
    /// also accepts the file of another user, if that file lets the same class write. Otherwise the
    /// file of another user than this one or root is
    /// [`ForeignOwner`](crate::ErrorKind::ForeignOwner). Share a lease only with users that you
    /// trust: they can write any record. A user with only read permission can lock the file, which
    /// prevents renewals.
    ///
    /// ```
    /// # fn main() -> lockkit::Result<()> {
    /// // In a directory of a group, such as one made by `install -d -m 2775 -g staff /srv/shared`.
    /// let lease = lockkit::Lease::file("/srv/shared/leader").file_write_mode(0o664).build()?;
    /// # Ok(()) }
    /// ```
    pub fn file_write_mode(mut self, mode: u32) -> Self {
        self.settings.file_mode = Some(mode);
        self
    }

    /// Sets, for a file, the exact permissions of the directories that
    /// [`create_parents`](Self::create_parents) creates, independent of the umask. The default is
    /// 0700, less the umask.
    pub fn directory_write_mode(mut self, mode: u32) -> Self {
        self.settings.directory_mode = Some(mode);
        self
    }

    /// Creates, for a file, missing parent directories. A release does not remove them. By default
    /// a missing directory is an [`Io`](crate::ErrorKind::Io) error of the kind `NotFound` that
    /// names the directory.
    pub fn create_parents(mut self) -> Self {
        self.settings.create_parents = true;
        self
    }

    /// Sets the clock of the lease; by default [`SystemClock`](super::SystemClock).
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.settings.clock = clock;
        self
    }

    /// Builds the lease. Acquires and creates nothing yet.
    ///
    /// # Errors
    /// - [`InvalidOption`](crate::ErrorKind::InvalidOption) with the reason if the options do not
    ///   go together.
    /// - [`InvalidName`](crate::ErrorKind::InvalidName) for a key that is empty, longer than 200
    ///   bytes or has control characters.
    /// - [`InvalidUrl`](crate::ErrorKind::InvalidUrl) for an invalid URL.
    /// - [`Unsupported`](crate::ErrorKind::Unsupported) for the URL of an engine that this build of
    ///   lockkit does not have.
    /// - [`Io`](crate::ErrorKind::Io) if the path of a file is empty, or if it is relative and the
    ///   working directory is gone.
    pub fn build(self) -> Result<Lease> {
        let Self { target, settings } = self;
        let location = match target {
            Target::Location(location) => location,
            Target::Url(url) => connect::locate(&url)?,
        };
        let timing = settings.checked_timing(&location)?;
        settings.check_modes()?;
        let clock_id = settings.clock.shared_id();
        let (name, store, record) = match location {
            Location::File(path) => record_in_file(&path, &settings, &timing, clock_id)?,
            Location::Store(store, key) => record_in_store(store, &key, &settings)?,
        };
        let clock = clock_id.ok_or(Arc::as_ptr(&settings.clock).cast::<()>() as usize);
        let (retry_delay, retry_limit) = (settings.retry_delay, settings.retry_limit);
        let options = Options {
            ttl: timing.ttl,
            heartbeat: timing.heartbeat,
            progress: settings.progress,
            on_lost: settings.on_lost,
            held_error: settings.held_error,
            retry_limit,
            retry_delay,
            clock_id,
            clock: settings.clock,
        };
        let queue = QueueKey {
            record,
            clock,
            retry_delay,
            retry_limit,
        };
        Ok(Lease::new(LeaseSpec {
            name,
            store,
            queue,
            options,
        }))
    }
}

/// The name of a lease, the store that keeps it, and what identifies its record.
type LeaseParts = (LeaseName, Arc<dyn LeaseStore>, RecordId);

/// Returns the parts of a lease in a file.
fn record_in_file(
    path: &Path,
    settings: &Settings,
    timing: &CheckedTiming,
    clock_id: Option<u128>,
) -> Result<LeaseParts> {
    let path =
        std::path::absolute(path).map_err(|error| Error::io("make absolute", path, error))?;
    let store = FileStore::new(FileSpec {
        heartbeat: timing.heartbeat,
        damage_timeout: timing.damage_timeout,
        retry_delay: settings.retry_delay,
        file_mode: settings.file_mode,
        directory_mode: settings.directory_mode,
        create_parents: settings.create_parents,
        clock: settings.clock.clone(),
        clock_id,
        path: path.clone(),
    });
    let name = LeaseName::of_path(&path);
    Ok((
        name,
        Arc::new(store),
        RecordId::File {
            path,
            damage_timeout: timing.damage_timeout,
        },
    ))
}

/// Returns the parts of a lease in a store.
fn record_in_store(
    store: Arc<dyn LeaseStore>,
    key: &str,
    settings: &Settings,
) -> Result<LeaseParts> {
    for option in settings.file_options() {
        reject_if(true, option, || "this lease is not kept in a file".into())?;
    }
    let name = LeaseName::new(key)?;
    let record = RecordId::Store(Arc::as_ptr(&store).cast::<()>() as usize, name.clone());
    Ok((name, store, record))
}

impl fmt::Debug for LeaseBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let location: &dyn fmt::Debug = match &self.target {
            Target::Location(Location::File(path)) => path,
            Target::Location(Location::Store(_, key)) => key,
            // The URL is not shown, because it may contain a password.
            Target::Url(_) => &"a URL",
        };
        let Settings { ttl, heartbeat, .. } = &self.settings;
        let mut shown = f.debug_struct("LeaseBuilder");
        shown
            .field("location", location)
            .field("ttl", ttl)
            .field("heartbeat", heartbeat)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::super::settings::{DEFAULT_HEARTBEAT_INTERVAL, DEFAULT_TTL};
    use super::*;
    use crate::base::error::ErrorKind;

    const MS: Duration = Duration::from_millis(1);

    fn rejected_option(builder: LeaseBuilder) -> &'static str {
        match builder.build().unwrap_err().kind() {
            ErrorKind::InvalidOption { option, problem } => {
                assert!(!problem.is_empty());
                option
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn build_with_invalid_option_names_option() {
        let file = || Lease::file("/nowhere/lease");
        assert_eq!(rejected_option(file().ttl(MS)), "ttl");
        assert_eq!(rejected_option(file().ttl(Duration::MAX)), "ttl");
        for too_short in [
            Duration::ZERO,
            Duration::from_nanos(1),
            MS - Duration::from_nanos(1),
        ] {
            assert_eq!(rejected_option(file().heartbeat(too_short)), "heartbeat");
            assert_eq!(
                rejected_option(file().acquire_retry_delay(too_short)),
                "acquire_retry_delay"
            );
        }
        assert_eq!(
            rejected_option(file().ttl(MS * 300).heartbeat(MS * 101)),
            "heartbeat"
        );
        assert_eq!(
            rejected_option(file().require_progress(MS * 249)),
            "require_progress"
        );
        assert_eq!(
            rejected_option(
                file()
                    .heartbeat(MS * 250)
                    .invalid_pid_lock_stale_threshold(MS * 249)
            ),
            "invalid_pid_lock_stale_threshold"
        );
        assert_eq!(
            rejected_option(file().file_write_mode(0o444)),
            "file_write_mode"
        );
        assert_eq!(
            rejected_option(file().directory_write_mode(0o10700)),
            "directory_write_mode"
        );
        assert!(
            file()
                .ttl(MS * 300)
                .heartbeat(MS * 100)
                .require_progress(MS * 100)
                .build()
                .is_ok()
        );
        assert!(
            file()
                .heartbeat(MS)
                .acquire_retry_delay(MS)
                .require_progress(MS)
                .build()
                .is_ok()
        );
        assert!(Lease::file("").build().is_err());
    }

    #[test]
    fn default_heartbeat_is_at_most_a_quarter_of_ttl() {
        let heartbeat = |ttl| {
            Lease::file("/nowhere/lease")
                .ttl(ttl)
                .build()
                .unwrap()
                .0
                .options
                .heartbeat
        };
        assert_eq!(heartbeat(MS * 100), MS * 25);
        assert_eq!(heartbeat(DEFAULT_TTL), DEFAULT_HEARTBEAT_INTERVAL);
        assert_eq!(heartbeat(DEFAULT_TTL * 100), DEFAULT_HEARTBEAT_INTERVAL);
    }
}
