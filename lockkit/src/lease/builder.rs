//! The options of a lease, and which of them go together.

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use parking_lot::Mutex;

use super::clock::{Clock, SystemClock};
use super::state::LeaseTiming;
use super::store::file::FileStore;
use super::store::lease_store::{LeaseName, LeaseStore};
use super::{Inner, Lease, Loss, connect, url, waiters};
use crate::base::error::{Error, ErrorKind, Result};

const TTL: Duration = Duration::from_secs(3);
const HEARTBEAT: Duration = Duration::from_millis(250);
const UNREADABLE: Duration = Duration::from_secs(2);
const RETRY_LIMIT: u32 = 4;
const RETRY_DELAY: Duration = Duration::from_millis(25);

/// A store that keeps a shorter ttl than this can process a request every [`HEARTBEAT`].
const QUICK: Duration = Duration::from_secs(1);

/// The shortest ttl. Below it, the safety margin and the time of a request leave nothing.
pub(super) const SMALLEST_TTL: Duration = Duration::from_millis(30);
/// The shortest interval of a repeated action. A shorter interval would use a whole processor.
const SMALLEST_PERIOD: Duration = Duration::from_millis(1);
/// The longest ttl. A lock that needs a longer ttl does not need a lease.
pub(super) const LONGEST_TTL: Duration = Duration::from_secs(365 * 86_400);

/// An error of the program's own, created for each use.
pub(super) type HeldError = Arc<dyn Fn() -> Box<dyn std::error::Error + Send + Sync> + Send + Sync>;
pub(super) type OnLost = Arc<dyn Fn(&Loss) + Send + Sync>;

/// The options of a lease, which passed the checks of [`LeaseBuilder::build`].
pub(super) struct Options {
    pub(super) ttl: Duration,
    pub(super) heartbeat: Duration,
    pub(super) progress: Option<Duration>,
    pub(super) on_lost: Option<OnLost>,
    pub(super) held_error: Option<HeldError>,
    pub(super) retry_limit: u32,
    pub(super) retry_delay: Duration,
    pub(super) clock: Arc<dyn Clock>,
    /// The [`shared_id`](Clock::shared_id) of the clock, kept here because a call costs system calls.
    pub(super) clock_id: Option<u128>,
}

impl Options {
    pub(super) fn terms(&self) -> LeaseTiming {
        LeaseTiming { ttl: self.ttl, heartbeat: self.heartbeat, progress: self.progress }
    }
}

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
    place: Location,
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
    directory_mode: Option<u32>,
    create_parents: bool,
}

/// The location of the record.
pub(super) enum Location {
    File(PathBuf),
    Store(Arc<dyn LeaseStore>, String),
    /// A URL that leads to one of these.
    Url(String),
}

impl LeaseBuilder {
    pub(super) fn of_file(path: PathBuf) -> Self {
        Self::at(Location::File(path))
    }

    pub(super) fn of_store(store: Arc<dyn LeaseStore>, key: String) -> Self {
        Self::at(Location::Store(store, key))
    }

    pub(super) fn of_url(url: String) -> Self {
        Self::at(Location::Url(url))
    }

    fn at(place: Location) -> Self {
        Self {
            place,
            ttl: None,
            heartbeat: None,
            progress: None,
            on_lost: None,
            held_error: None,
            retry_limit: RETRY_LIMIT,
            retry_delay: RETRY_DELAY,
            clock: system_clock(),
            unreadable: None,
            file_mode: None,
            directory_mode: None,
            create_parents: false,
        }
    }

    /// Sets how long the lease lasts after its last renewal. The default is 3 seconds, or the shortest ttl of the store
    /// if that is longer. A waiter waits this long for a silent holder.
    ///
    /// If another store of this process hangs, renewals may stop for a quarter of the shortest ttl, at most half a
    /// second. With a ttl below some 50 ms they stop for longer. If several stores hang at once, each of them adds this
    /// time.
    #[doc(alias = "lease_stale_threshold")]
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// Sets the interval between renewals: at least 1 ms, at most a third of the ttl. The default is 250 ms. It is a
    /// quarter of the ttl if that is shorter, or if the store keeps no ttl below one second.
    #[doc(alias = "lease_heartbeat_interval")]
    pub fn heartbeat(mut self, heartbeat: Duration) -> Self {
        self.heartbeat = Some(heartbeat);
        self
    }

    /// Sets the callback for the loss of a held lease. It runs once for each loss, and not at a release. A thread that
    /// is started for losses reports the losses of a process one after the other; if no thread can be started, the
    /// heartbeat thread does. So the callback may take its time, but the next loss is reported only when the callback
    /// returns. A panic in the callback is caught and has no further effect.
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

    /// Renews the lease only while [`progress`](super::LeaseGuard::progress) has been called within this time, which
    /// first counts from the acquisition. A worker that hangs then loses its lease a ttl after the last renewal, and
    /// does not keep it for as long as its process lives.
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

    /// Sets an error of the program's own, for a lease that another owner holds when the caller does not wait. That
    /// error becomes the source of the [`Held`](ErrorKind::Held) error; the kind stays `Held`.
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

    /// Sets how often in a row an attempt is repeated that the store refused or did not answer, before acquiring fails.
    /// The default is 4 times. Finding the lease held is no failure.
    pub fn acquire_retry_limit(mut self, limit: u32) -> Self {
        self.retry_limit = limit;
        self
    }

    /// Sets the pause between such attempts, and the poll interval at a held lease if nothing wakes the waiter: at
    /// least 1 ms, by default 25 ms.
    pub fn acquire_retry_delay(mut self, delay: Duration) -> Self {
        self.retry_delay = delay;
        self
    }

    /// Sets, for a file, how long a blank file (empty, or zeros) or a damaged lease counts as held. At least a
    /// heartbeat; the default is 2 seconds, or two heartbeats if that is longer.
    ///
    /// The file must be unchanged for this time. The process observes that on its own clock. The times of the file are
    /// evidence, too, less an hour on a file system of another machine. A live holder repairs the record at its next
    /// heartbeat. A holder that is stopped when the record is damaged can overlap with the next holder, by the
    /// difference of its ttl and this time.
    pub fn invalid_pid_lock_stale_threshold(mut self, age: Duration) -> Self {
        self.unreadable = Some(age);
        self
    }

    /// Sets, for a file, the exact permissions of a new file, independent of the umask. The default is 0600, less the
    /// umask. The mode must let the owner read and write.
    ///
    /// A mode that lets the group or others write shares the lease between users: this lease then also accepts the file
    /// of another user, if that file lets the same class write. Otherwise the file of another user than this one or
    /// root is [`ForeignOwner`](ErrorKind::ForeignOwner). Share a lease only with users that you trust: they can write
    /// any record. A user with only read permission can lock the file, which prevents renewals.
    ///
    /// ```
    /// # fn main() -> lockkit::Result<()> {
    /// // In a directory of a group, such as one made by `install -d -m 2775 -g staff /srv/shared`.
    /// let lease = lockkit::Lease::file("/srv/shared/leader").file_write_mode(0o664).build()?;
    /// # Ok(()) }
    /// ```
    pub fn file_write_mode(mut self, mode: u32) -> Self {
        self.file_mode = Some(mode);
        self
    }

    /// Sets, for a file, the exact permissions of the directories that [`create_parents`](Self::create_parents)
    /// creates, independent of the umask. The default is 0700, less the umask.
    pub fn directory_write_mode(mut self, mode: u32) -> Self {
        self.directory_mode = Some(mode);
        self
    }

    /// Creates, for a file, missing parent directories. A release does not remove them. By default a missing directory
    /// is an [`Io`](ErrorKind::Io) error of the kind `NotFound` that names the directory.
    pub fn create_parents(mut self) -> Self {
        self.create_parents = true;
        self
    }

    /// Sets the clock of the lease; by default [`SystemClock`].
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// Builds the lease. Acquires and creates nothing yet.
    ///
    /// # Errors
    /// - [`InvalidOption`](ErrorKind::InvalidOption) with the reason if the options do not go together.
    /// - [`InvalidName`](ErrorKind::InvalidName) for a key that is empty, longer than 200 bytes or has control
    ///   characters.
    /// - [`InvalidUrl`](ErrorKind::InvalidUrl) for an invalid URL.
    /// - [`Unsupported`](ErrorKind::Unsupported) for the URL of an engine that this build of lockkit does not have.
    /// - [`Io`](ErrorKind::Io) if the path of a file is empty, or if it is relative and the working directory is gone.
    pub fn build(mut self) -> Result<Lease> {
        if let Location::Url(url) = &self.place {
            self.place = connect::place(url)?;
        }
        let (smallest, step) = match &self.place {
            Location::File(_) | Location::Url(_) => (SMALLEST_TTL, Duration::from_nanos(1)),
            Location::Store(store, _) => {
                let profile = store.profile();
                (profile.smallest_ttl.max(SMALLEST_TTL), profile.ttl_step)
            }
        };
        let ttl = self.ttl.unwrap_or(TTL.max(smallest));
        refuse_if(ttl < smallest, "ttl", || {
            format!("{ttl:?} is shorter than {smallest:?}, the shortest that can be kept")
        })?;
        refuse_if(ttl > LONGEST_TTL, "ttl", || format!("{ttl:?} is longer than a year"))?;
        let ttl = whole_steps(ttl, step);
        let usual = if smallest < QUICK { HEARTBEAT } else { ttl };
        let heartbeat = self.heartbeat.unwrap_or(usual.min(ttl / 4));
        refuse_if(heartbeat < SMALLEST_PERIOD, "heartbeat", || {
            format!("{heartbeat:?} is shorter than 1ms, the shortest heartbeat that leaves the processor to others")
        })?;
        refuse_if(heartbeat > ttl / 3, "heartbeat", || {
            format!("{heartbeat:?} is more than a third of the ttl, {ttl:?}, so that one late beat may lose the lease")
        })?;
        if let Some(within) = self.progress {
            refuse_if(within < heartbeat, "require_progress", || {
                format!(
                    "{within:?} is shorter than a heartbeat, {heartbeat:?}, so that the loss would be noticed too late"
                )
            })?;
        }
        refuse_if(self.retry_delay < SMALLEST_PERIOD, "acquire_retry_delay", || {
            format!(
                "{:?} is shorter than 1ms, the shortest pause that leaves the processor to others",
                self.retry_delay
            )
        })?;
        let unreadable = self.unreadable.unwrap_or(UNREADABLE.max(heartbeat * 2));
        refuse_if(unreadable < heartbeat, "invalid_pid_lock_stale_threshold", || {
            format!("{unreadable:?} is shorter than a heartbeat, {heartbeat:?}, at which its holder repairs it")
        })?;
        for (option, mode, least) in
            [("file_write_mode", self.file_mode, 0o600), ("directory_write_mode", self.directory_mode, 0o700)]
        {
            let Some(mode) = mode else { continue };
            refuse_if(mode & !0o7777 != 0, option, || format!("{mode:#o} is no mode"))?;
            refuse_if(mode & least != least, option, || format!("{mode:#o} would shut its own maker out"))?;
        }
        let clock_id = self.clock.shared_id();
        let (name, store, location): (_, Arc<dyn LeaseStore>, _) = match self.place {
            Location::Url(url) => return Err(url::invalid(&url, "it leads to another URL")),
            Location::File(path) => {
                let path = std::path::absolute(&path).map_err(|error| Error::io("make absolute", &path, error))?;
                let store = FileStore {
                    heartbeat,
                    unreadable,
                    retry_delay: self.retry_delay,
                    file_mode: self.file_mode,
                    directory_mode: self.directory_mode,
                    create_parents: self.create_parents,
                    clock: self.clock.clone(),
                    clock_id,
                    device: AtomicU64::default(),
                    is_remote: AtomicBool::default(),
                    observer: Mutex::default(),
                    path,
                };
                let location = waiters::Location::File { path: store.path.clone(), unreadable };
                (LeaseName::of_path(&store.path), Arc::new(store), location)
            }
            Location::Store(store, key) => {
                for (option, given) in [
                    ("invalid_pid_lock_stale_threshold", self.unreadable.is_some()),
                    ("file_write_mode", self.file_mode.is_some()),
                    ("directory_write_mode", self.directory_mode.is_some()),
                    ("create_parents", self.create_parents),
                ] {
                    refuse_if(given, option, || "this lease is not kept in a file".into())?;
                }
                let name = LeaseName::new(&key)?;
                let location = waiters::Location::Store(Arc::as_ptr(&store).cast::<()>() as usize, name.clone());
                (name, store, location)
            }
        };
        let clock = clock_id.ok_or(Arc::as_ptr(&self.clock).cast::<()>() as usize);
        let (retry_delay, retry_limit) = (self.retry_delay, self.retry_limit);
        let waiters = waiters::Key { location, clock, retry_delay, retry_limit };
        let options = Options {
            ttl,
            heartbeat,
            progress: self.progress,
            on_lost: self.on_lost,
            held_error: self.held_error,
            retry_limit: self.retry_limit,
            retry_delay: self.retry_delay,
            clock_id,
            clock: self.clock,
        };
        Ok(Lease(Arc::new(Inner { name, store, waiters, options })))
    }
}

impl fmt::Debug for LeaseBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place: &dyn fmt::Debug = match &self.place {
            Location::File(path) => path,
            Location::Store(_, key) => key,
            // The URL is not shown, because it may contain a password.
            Location::Url(_) => &"a URL",
        };
        let mut shown = f.debug_struct("LeaseBuilder");
        shown.field("place", place).field("ttl", &self.ttl).field("heartbeat", &self.heartbeat).finish_non_exhaustive()
    }
}

fn refuse_if(wrong: bool, option: &'static str, problem: impl FnOnce() -> String) -> Result<()> {
    if wrong { Err(ErrorKind::InvalidOption { option, problem: problem() }.into()) } else { Ok(()) }
}

/// Rounds `ttl` up to a whole multiple of `step`.
fn whole_steps(ttl: Duration, step: Duration) -> Duration {
    let step = step.as_nanos().max(1);
    u64::try_from(ttl.as_nanos().div_ceil(step) * step).map_or(ttl, Duration::from_nanos)
}

/// Returns one clock for all leases, so that all leases count by the same clock.
fn system_clock() -> Arc<dyn Clock> {
    static CLOCK: LazyLock<Arc<dyn Clock>> = LazyLock::new(|| Arc::new(SystemClock));
    CLOCK.clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn refused(builder: LeaseBuilder) -> &'static str {
        match builder.build().unwrap_err().kind() {
            ErrorKind::InvalidOption { option, problem } => {
                assert!(!problem.is_empty());
                option
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_does_not_go_together_is_refused_by_name() {
        let file = || Lease::file("/nowhere/lease");
        assert_eq!(refused(file().ttl(MS)), "ttl");
        assert_eq!(refused(file().ttl(Duration::MAX)), "ttl");
        for too_short in [Duration::ZERO, Duration::from_nanos(1), MS - Duration::from_nanos(1)] {
            assert_eq!(refused(file().heartbeat(too_short)), "heartbeat");
            assert_eq!(refused(file().acquire_retry_delay(too_short)), "acquire_retry_delay");
        }
        assert_eq!(refused(file().ttl(MS * 300).heartbeat(MS * 101)), "heartbeat");
        assert_eq!(refused(file().require_progress(MS * 249)), "require_progress");
        assert_eq!(
            refused(file().heartbeat(MS * 250).invalid_pid_lock_stale_threshold(MS * 249)),
            "invalid_pid_lock_stale_threshold"
        );
        assert_eq!(refused(file().file_write_mode(0o444)), "file_write_mode");
        assert_eq!(refused(file().directory_write_mode(0o10700)), "directory_write_mode");
        assert!(file().ttl(MS * 300).heartbeat(MS * 100).require_progress(MS * 100).build().is_ok());
        assert!(file().heartbeat(MS).acquire_retry_delay(MS).require_progress(MS).build().is_ok());
        assert!(Lease::file("").build().is_err());
    }

    #[test]
    fn default_heartbeat_is_at_most_a_quarter_of_ttl() {
        let heartbeat = |ttl| Lease::file("/nowhere/lease").ttl(ttl).build().unwrap().0.options.heartbeat;
        assert_eq!(heartbeat(MS * 100), MS * 25);
        assert_eq!(heartbeat(TTL), HEARTBEAT);
        assert_eq!(heartbeat(TTL * 100), HEARTBEAT);
    }

    #[test]
    fn a_ttl_is_asked_for_in_whole_steps() {
        assert_eq!(whole_steps(MS * 1001, MS * 1000), MS * 2000);
        assert_eq!(whole_steps(MS * 2000, MS * 1000), MS * 2000);
        assert_eq!(whole_steps(MS, Duration::ZERO), MS);
    }
}
