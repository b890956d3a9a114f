//! The options of a lease, and which of them go together.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::clock::{Clock, SystemClock};
use super::file::FileStore;
use super::store::{LeaseName, LeaseStore};
use super::{Inner, Lease, Loss};
use crate::error::{Error, ErrorKind, Result};

const TTL: Duration = Duration::from_secs(3);
const HEARTBEAT: Duration = Duration::from_millis(250);
const UNREADABLE: Duration = Duration::from_secs(2);
const RETRY_LIMIT: u32 = 4;
const RETRY_DELAY: Duration = Duration::from_millis(25);

/// The shortest ttl: below it, what is taken off for safety and the time of a request leave nothing.
const SMALLEST_TTL: Duration = Duration::from_millis(30);
/// The longest ttl: whoever needs a longer one does not need a lease.
const LONGEST_TTL: Duration = Duration::from_secs(365 * 86_400);

/// An error of the program's own, made anew for each time that it is needed.
pub(super) type HeldError = Arc<dyn Fn() -> Box<dyn std::error::Error + Send + Sync> + Send + Sync>;
pub(super) type OnLost = Arc<dyn Fn(&Loss) + Send + Sync>;

/// What a lease was built with, found consistent.
pub(super) struct Options {
    pub(super) ttl: Duration,
    pub(super) heartbeat: Duration,
    pub(super) progress: Option<Duration>,
    pub(super) on_lost: Option<OnLost>,
    pub(super) held_error: Option<HeldError>,
    pub(super) retry_limit: u32,
    pub(super) retry_delay: Duration,
    pub(super) clock: Arc<dyn Clock>,
}

/// Makes a [`Lease`]; see [`Lease::file`] and [`Lease::with_store`].
#[must_use = "a builder makes nothing until `build`"]
pub struct LeaseBuilder {
    place: Place,
    ttl: Option<Duration>,
    heartbeat: Option<Duration>,
    progress: Option<Duration>,
    on_lost: Option<OnLost>,
    held_error: Option<HeldError>,
    retry_limit: u32,
    retry_delay: Duration,
    clock: Arc<dyn Clock>,
    unreadable: Option<Duration>,
    file_mode: Option<u32>,
    folder_mode: Option<u32>,
}

enum Place {
    File(PathBuf),
    Store(Arc<dyn LeaseStore>, String),
}

impl LeaseBuilder {
    pub(super) fn of_file(path: PathBuf) -> Self {
        Self::at(Place::File(path))
    }

    pub(super) fn of_store(store: Arc<dyn LeaseStore>, key: String) -> Self {
        Self::at(Place::Store(store, key))
    }

    fn at(place: Place) -> Self {
        Self {
            place,
            ttl: None,
            heartbeat: None,
            progress: None,
            on_lost: None,
            held_error: None,
            retry_limit: RETRY_LIMIT,
            retry_delay: RETRY_DELAY,
            clock: Arc::new(SystemClock),
            unreadable: None,
            file_mode: None,
            folder_mode: None,
        }
    }

    /// How long the lease lasts after its last renewal; 3 seconds unless told otherwise, or the shortest that the store
    /// can keep, if that is longer. Who wants the lease waits as long for a holder that is silent.
    #[doc(alias = "lease_stale_threshold")]
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// How often it is renewed, at most a third of the ttl. Unless told otherwise every 250 ms, or a quarter of the ttl
    /// where that is shorter, or the store keeps no ttl below a second.
    #[doc(alias = "lease_heartbeat_interval")]
    pub fn heartbeat(mut self, heartbeat: Duration) -> Self {
        self.heartbeat = Some(heartbeat);
        self
    }

    /// What to call when a held lease is lost: once for each loss, and not at a release. It runs on a thread of its
    /// own, so it may take its time; on the heartbeat thread if none can be started. A panic in it is caught and ends
    /// there.
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
        self.on_lost = Some(Arc::new(call));
        self
    }

    /// Renews the lease only while [`progress`](super::LeaseGuard::progress) has been called within this time, first
    /// counted from the acquisition. So a worker that hangs loses its lease, a ttl after it stopped being renewed,
    /// instead of keeping it for as long as its process lives.
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
        self.progress = Some(within);
        self
    }

    /// An error of the program's own, for when the lease is held by somebody else and the caller does not wait. It
    /// becomes the source of the [`Held`](ErrorKind::Held) error, which stays one.
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
        self.held_error = Some(Arc::new(move || Box::new(error())));
        self
    }

    /// How often in a row an attempt is repeated that the store refused, or did not answer, before acquiring fails; 4
    /// times unless told otherwise. Finding the lease held is no failure.
    pub fn acquire_retry_limit(mut self, limit: u32) -> Self {
        self.retry_limit = limit;
        self
    }

    /// The pause between such attempts, and between looks at a held lease where nothing wakes the waiter; 25 ms unless
    /// told otherwise.
    pub fn acquire_retry_delay(mut self, delay: Duration) -> Self {
        self.retry_delay = delay;
        self
    }

    /// For a file: how long a record that cannot be read must have been seen unchanged before it is reclaimed; 2
    /// seconds unless told otherwise. Its holder, if it lives, writes it anew at its next beat. One that is stopped
    /// just when its record is spoilt may overlap with the next owner by what its ttl is longer than this.
    pub fn invalid_pid_lock_stale_threshold(mut self, age: Duration) -> Self {
        self.unreadable = Some(age);
        self
    }

    /// For a file: its permissions when it is made, less the process's umask; 0600 unless told otherwise.
    pub fn file_write_mode(mut self, mode: u32) -> Self {
        self.file_mode = Some(mode);
        self
    }

    /// For a file: the permissions of folders that are made for it, less the process's umask; 0700 unless told
    /// otherwise.
    pub fn directory_write_mode(mut self, mode: u32) -> Self {
        self.folder_mode = Some(mode);
        self
    }

    /// The clock to count by; [`SystemClock`] unless told otherwise.
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// The lease. Nothing is taken or made yet.
    ///
    /// # Errors
    /// [`InvalidOption`](ErrorKind::InvalidOption) when the options do not go together, with the reason;
    /// [`InvalidName`](ErrorKind::InvalidName) for a key that is empty, longer than 200 bytes or has control
    /// characters; [`Io`](ErrorKind::Io) when the path of a file is empty, or the working folder of a relative one is
    /// gone.
    pub fn build(self) -> Result<Lease> {
        todo!("the next commit")
    }
}
