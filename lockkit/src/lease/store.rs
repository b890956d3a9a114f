//! What a lease asks of the place where its record is kept.
//!
//! A [`LeaseStore`] takes steps that are each one whole for everybody who uses the store, and says how to wait for a
//! change. Everything else is the lease's business: how long a grant is good for, when to beat, what a failure means,
//! when it is lost. So a store for another engine is five requests long, and cannot get the timing wrong.

use std::any::Any;
use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::clock::{Clock, SystemClock};
use crate::error::{ErrorKind, Result, chain};
use crate::lock::Recovered;
use crate::owner::Owner;
use crate::sys::fork;
use crate::wait::{CancelToken, Wait};

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Keeps the records of leases.
///
/// What every store owes:
/// - [`try_acquire`](Self::try_acquire) is one indivisible step: a name that is absent, free, expired, or already of
///   the same claim becomes the claim's, with a token above every earlier one of that name (a claim that has it
///   already keeps its token).
/// - [`renew`](Self::renew), [`release`](Self::release) and [`evict`](Self::evict) compare the claim and the token
///   in the step in which they change the record.
/// - No request takes longer than its [`Deadline`]. One heartbeat thread serves all leases of a process, so what hangs
///   holds up the beats of other leases until another thread has noticed, and costs a thread for as long. A renewal
///   that queues behind the requests of other threads, or behind who waits in [`wait_for_change`](Self::wait_for_change), as for a connection
///   that they share, may come too late.
/// - A request that may have taken effect, though no answer came, is [`StoreError::Unknown`].
///
/// A store needs no clock of its own that anybody compares: it promises to keep a record for the ttl from when it got
/// the request, and the lease counts from before it sent it.
///
/// A store in memory, for the threads of one process:
/// ```
/// use std::collections::HashMap;
/// use std::sync::{Arc, Condvar, Mutex};
/// use std::time::{Duration, Instant};
/// use lockkit::lease::{
///     Attempt, ClaimId, Deadline, Durability, Grant, LeaseName, LeaseStore, Released, Renewal, LeaseSnapshot, StoreError,
///     StoreProfile,
/// };
/// use lockkit::{CancelToken, Lease};
///
/// #[derive(Default)]
/// struct Memory(Mutex<HashMap<String, Record>>);
///
/// #[derive(Default)]
/// struct Record { holder: Option<(ClaimId, Instant, Duration)>, token: u64 }
///
/// impl Record {
///     fn seen(&self) -> Option<LeaseSnapshot> {
///         let (claim, until, _) = self.holder?;
///         let left = until.saturating_duration_since(Instant::now());
///         Some(LeaseSnapshot::new(self.token).with_claim(claim).with_token(self.token).with_expires_in(left))
///     }
///     fn is_of(&self, grant: &Grant) -> bool {
///         self.token == grant.token() && self.holder.is_some_and(|(claim, ..)| claim == *grant.claim())
///     }
/// }
///
/// impl LeaseStore for Memory {
///     fn profile(&self) -> StoreProfile {
///         StoreProfile::new(Durability::Memory)
///     }
///     fn try_acquire(&self, name: &LeaseName, claim: &ClaimId, ttl: Duration, _: Deadline)
///         -> Result<Attempt, StoreError> {
///         let mut records = self.0.lock().unwrap();
///         let record = records.entry(name.as_str().to_owned()).or_default();
///         let (now, old) = (Instant::now(), record.holder);
///         match old {
///             Some((holder, until, _)) if holder != *claim && until > now => {
///                 return Ok(Attempt::Busy(record.seen().expect("it is held")));
///             }
///             Some((holder, ..)) if holder == *claim => {}
///             _ => record.token += 1,
///         }
///         record.holder = Some((*claim, now + ttl, ttl));
///         Ok(Attempt::Granted(Grant::new(name, claim, record.token, ttl)))
///     }
///     fn renew(&self, grant: &Grant, _: Deadline) -> Result<Renewal, StoreError> {
///         match self.0.lock().unwrap().get_mut(grant.name().as_str()) {
///             Some(record) if record.is_of(grant) => {
///                 record.holder = Some((*grant.claim(), Instant::now() + grant.ttl(), grant.ttl()));
///                 Ok(Renewal::Extended { ttl: grant.ttl() })
///             }
///             _ => Ok(Renewal::Lost { by: None }),
///         }
///     }
///     fn release(&self, grant: &Grant, _: Deadline) -> Result<Released, StoreError> {
///         match self.0.lock().unwrap().get_mut(grant.name().as_str()) {
///             Some(record) if record.is_of(grant) => {
///                 record.holder = None;
///                 Ok(Released::Done)
///             }
///             _ => Ok(Released::NotMine),
///         }
///     }
///     fn get(&self, name: &LeaseName, _: Deadline) -> Result<Option<LeaseSnapshot>, StoreError> {
///         Ok(self.0.lock().unwrap().get(name.as_str()).and_then(Record::seen))
///     }
///     fn evict(&self, name: &LeaseName, seen: &LeaseSnapshot, _: Deadline) -> Result<Released, StoreError> {
///         match self.0.lock().unwrap().get_mut(name.as_str()) {
///             Some(record) if record.seen().is_some_and(|now| now.is_same_holder(seen)) => {
///                 record.holder = None;
///                 Ok(Released::Done)
///             }
///             _ => Ok(Released::NotMine),
///         }
///     }
/// }
///
/// # fn main() -> lockkit::Result<()> {
/// let store = Arc::new(Memory::default());
/// let first = Lease::with_store(store.clone(), "nightly").build()?.lock()?;
/// assert!(Lease::with_store(store.clone(), "nightly").build()?.try_lock().unwrap_err().is_held());
/// let token = first.token();
/// first.release()?;
/// assert!(Lease::with_store(store, "nightly").build()?.lock()?.token() > token);
/// # Ok(()) }
/// ```
pub trait LeaseStore: Send + Sync {
    /// What it can do. Always the same, but that its place may be found out by the first request. It is asked often.
    fn profile(&self) -> StoreProfile;

    /// Makes the name `claim`'s for `ttl`, unless somebody else has it. Repeated with the same claim after
    /// [`StoreError::Unknown`], it returns the grant that the earlier request may have made.
    ///
    /// # Errors
    /// As [`StoreError`] has them, here and below.
    fn try_acquire(
        &self,
        name: &LeaseName,
        claim: &ClaimId,
        ttl: Duration,
        by: Deadline,
    ) -> Result<Attempt, StoreError>;

    /// Makes the grant good for another ttl from now, if it is still in force.
    ///
    /// # Errors
    /// An error is doubt, which the lease removes by asking again until the grant has run out.
    fn renew(&self, grant: &Grant, by: Deadline) -> Result<Renewal, StoreError>;

    /// Gives the name free, if it is still the grant's. The token stays, so that the next one is greater.
    ///
    /// # Errors
    /// After an error the grant runs out by itself.
    fn release(&self, grant: &Grant, by: Deadline) -> Result<Released, StoreError>;

    /// As [`release`](Self::release), of a grant that was not released by its holder, which the next owner is told:
    /// - one that has run out by its holder's count;
    /// - one that nobody was told of, because its request went unanswered, and that was
    ///   [recovered](Grant::recovered) from somebody else: the next owner is told of that one.
    ///
    /// Only stores need it where others would go on waiting for what has run out, or that answer [`StoreError::Unknown`];
    /// unless told otherwise it does nothing.
    ///
    /// # Errors
    /// As [`release`](Self::release).
    fn abandon(&self, grant: &Grant, by: Deadline) -> Result<Released, StoreError> {
        let _ = (grant, by);
        Ok(Released::NotMine)
    }

    /// Who has the name now; `None` when it is free. Changes nothing.
    ///
    /// # Errors
    /// As [`StoreError`] has them.
    fn get(&self, name: &LeaseName, by: Deadline) -> Result<Option<LeaseSnapshot>, StoreError>;

    /// Takes the name from the holder that was `seen`, and from no other.
    ///
    /// # Errors
    /// As [`StoreError`] has them.
    fn evict(&self, name: &LeaseName, seen: &LeaseSnapshot, by: Deadline) -> Result<Released, StoreError>;

    /// Waits until something has changed since `seen`, `by` has come or `stop` is cancelled. It may return for nothing
    /// at all; the lease then tries again, and bounds each wait by [`LeaseSnapshot::expires_in`].
    ///
    /// A store that can be told of changes registers for them before it looks whether anything has changed already.
    /// Unless told otherwise, it only lets the time pass: the lease then keeps `by` to
    /// [`acquire_retry_delay`](super::LeaseBuilder::acquire_retry_delay), because
    /// [`wakes_waiters`](StoreProfile::wakes_waiters) is false.
    ///
    /// # Errors
    /// After an error the lease tries again at its retry delay; a [`Permanent`](StoreError::Permanent) ends the acquisition.
    ///
    /// One in memory, whose every change is told on a condition:
    ///
    /// ```
    /// # use std::sync::{Condvar, Mutex};
    /// # use lockkit::lease::Deadline;
    /// # struct Memory { version: Mutex<u64>, changed: Condvar }
    /// # impl Memory {
    /// fn wait_for_change(&self, seen: u64, by: Deadline) {
    ///     let version = self.version.lock().unwrap();
    ///     drop(self.changed.wait_timeout_while(version, by.remaining(), |version| *version == seen));
    /// }
    /// # }
    /// # let memory = Memory { version: Mutex::new(1), changed: Condvar::new() };
    /// # memory.wait_for_change(0, Deadline::after(std::time::Duration::from_secs(9)));
    /// ```
    fn wait_for_change(
        &self,
        name: &LeaseName,
        seen: &LeaseSnapshot,
        by: Deadline,
        stop: &CancelToken,
    ) -> Result<(), StoreError> {
        let _ = (name, seen);
        sleep(by, stop)
    }
}

/// Lets the time pass until `by` or `stop`.
pub(super) fn sleep(by: Deadline, stop: &CancelToken) -> Result<(), StoreError> {
    match Wait::until(by.moment()).or_cancelled(stop).patience() {
        Some(patience) => patience.sleep(by.remaining()).map(drop).map_err(StoreError::not_applied),
        None => Ok(()),
    }
}

/// What a [`LeaseStore`] can do.
///
/// ```
/// use std::time::Duration;
/// use lockkit::lease::{Durability, StoreProfile};
/// let mut profile = StoreProfile::new(Durability::Quorum);
/// profile.smallest_ttl = Duration::from_secs(2);
/// profile.ttl_step = Duration::from_secs(1);
/// profile.wakes_waiters = true;
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreProfile {
    /// The shortest ttl that it can keep; nothing, unless told otherwise.
    pub smallest_ttl: Duration,
    /// Ttls are whole multiples of this, so longer ones are asked for where needed; a nanosecond, unless told
    /// otherwise.
    pub ttl_step: Duration,
    /// What its records last through.
    pub durability: Durability,
    /// Whether [`wait_for_change`](LeaseStore::wait_for_change) wakes at a change; not, unless told otherwise.
    pub wakes_waiters: bool,
    /// What stores have in common that hang as one, such as the server that they reach: while a request to one of them
    /// hangs, the heartbeat asks none. Each is for itself, unless told otherwise.
    pub failure_domain: Option<u64>,
}

impl StoreProfile {
    /// One that keeps any ttl and wakes nobody.
    pub const fn new(durability: Durability) -> Self {
        Self {
            smallest_ttl: Duration::ZERO,
            ttl_step: Duration::from_nanos(1),
            durability,
            wakes_waiters: false,
            failure_domain: None,
        }
    }
}

/// What the records of a store last through, and so how far its leases and their tokens can be relied on; a part of its
/// [`StoreProfile`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Durability {
    /// The process: for tests.
    Memory,
    /// What a file lasts through: the end of every process, and as a rule of the machine.
    Local,
    /// The restart of its one primary server, but not the failover to another.
    Primary,
    /// The loss of any minority of its servers.
    Quorum,
}

/// The name under which a store keeps a lease.
///
/// ```
/// # fn main() -> lockkit::Result<()> {
/// use lockkit::lease::LeaseName;
/// assert_eq!(LeaseName::new("nightly")?.as_str(), "nightly");
/// assert!(LeaseName::new("two\nlines").is_err());
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LeaseName(Arc<str>);

impl LeaseName {
    /// The longest name, in bytes.
    pub const LONGEST: usize = 200;

    /// A name that every store can keep.
    ///
    /// # Errors
    /// [`InvalidName`](ErrorKind::InvalidName) unless it has 1 to 200 bytes and no control characters.
    pub fn new(name: &str) -> Result<Self> {
        let rule = match name {
            "" => "it is empty",
            name if name.len() > Self::LONGEST => "it is longer than 200 bytes",
            name if name.contains(char::is_control) => "it has control characters",
            name => return Ok(Self(name.into())),
        };
        Err(ErrorKind::InvalidName { name: name.chars().take(80).collect(), rule }.into())
    }

    /// The name of a file's lease, which the store knows by itself.
    pub(super) fn of_path(path: &std::path::Path) -> Self {
        Self(path.to_string_lossy().into())
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for LeaseName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One acquisition, told from every other one: 128 bits by chance.
///
/// ```
/// use lockkit::lease::ClaimId;
/// let claim = ClaimId::random();
/// assert_ne!(claim, ClaimId::random());
/// assert_eq!(claim, ClaimId::from_number(claim.number())); // As a store keeps it.
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClaimId(u128);

impl ClaimId {
    /// A new one.
    pub fn random() -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        // The keys are random, but a forked child has its parent's: what is hashed differs for any two calls that may
        // have the same keys.
        let call = (std::process::id(), fork::generation(), COUNT.fetch_add(1, Ordering::Relaxed), SystemClock.now());
        let keys = RandomState::new();
        Self(u128::from(keys.hash_one((0, call))) << 64 | u128::from(keys.hash_one((1, call))))
    }

    /// The claim of this number, as [`number`](Self::number) gave it.
    pub const fn from_number(number: u128) -> Self {
        Self(number)
    }

    /// As a number, for a store to keep.
    pub const fn number(self) -> u128 {
        self.0
    }
}

/// 32 hexadecimal digits.
impl fmt::Display for ClaimId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// What came of an attempt to acquire: of [`LeaseStore::try_acquire`]. The example of [`LeaseStore`] makes both.
#[derive(Debug)]
pub enum Attempt {
    /// The name is the claim's.
    Granted(Grant),
    /// Somebody else has it.
    Busy(LeaseSnapshot),
}

/// A name that was given to a claim.
///
/// ```
/// # fn main() -> lockkit::Result<()> {
/// use std::time::Duration;
/// use lockkit::Owner;
/// use lockkit::lease::{ClaimId, Grant, LeaseName};
///
/// struct Session(u64); // Whatever a store wants to know of it.
///
/// let (name, claim, ttl) = (LeaseName::new("nightly")?, ClaimId::random(), Duration::from_secs(10));
/// let grant = Grant::new(&name, &claim, 7, ttl).with_handle(Session(42)).recovered_from(Some(Owner::current()));
/// assert_eq!((grant.name(), grant.claim(), grant.token(), grant.ttl()), (&name, &claim, 7, ttl));
/// assert_eq!(grant.handle::<Session>().map(|session| session.0), Some(42));
/// assert_eq!(grant.recovered().and_then(|recovered| recovered.owner()).map(Owner::pid), Some(std::process::id()));
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Grant {
    name: LeaseName,
    claim: ClaimId,
    token: u64,
    ttl: Duration,
    handle: Option<Arc<dyn Any + Send + Sync>>,
    recovered: Option<Box<Recovered>>,
}

impl Grant {
    /// The grant of `name` to `claim` for `ttl` from when the store got the request.
    pub fn new(name: &LeaseName, claim: &ClaimId, token: u64, ttl: Duration) -> Self {
        Self { name: name.clone(), claim: *claim, token, ttl, handle: None, recovered: None }
    }

    /// Adds what the store needs to find it again, such as the number of a session.
    pub fn with_handle(mut self, handle: impl Any + Send + Sync) -> Self {
        self.handle = Some(Arc::new(handle));
        self
    }

    /// Says that the previous owner did not release, and who that was where it is known.
    pub fn recovered_from(mut self, owner: Option<Owner>) -> Self {
        self.recovered = Some(Box::new(Recovered::new(owner)));
        self
    }

    /// The name.
    pub fn name(&self) -> &LeaseName {
        &self.name
    }

    /// The claim.
    pub fn claim(&self) -> &ClaimId {
        &self.claim
    }

    /// The fencing token: greater than that of every earlier grant of the name.
    pub fn token(&self) -> u64 {
        self.token
    }

    /// How long it is good for.
    pub fn ttl(&self) -> Duration {
        self.ttl
    }

    /// What the store added, if it is of this type.
    pub fn handle<T: Any>(&self) -> Option<&T> {
        self.handle.as_deref()?.downcast_ref()
    }

    /// From whom it was recovered, if the previous owner did not release. A grant that is held does not say it any more,
    /// for its guard does.
    pub fn recovered(&self) -> Option<&Recovered> {
        self.recovered.as_deref()
    }

    pub(super) fn take_recovered(&mut self) -> Option<Box<Recovered>> {
        self.recovered.take()
    }
}

/// Who has a name, as a store saw it at one moment.
///
/// ```
/// use std::time::Duration;
/// use lockkit::Owner;
/// use lockkit::lease::{ClaimId, LeaseSnapshot};
///
/// let (claim, left) = (ClaimId::random(), Duration::from_secs(3));
/// let seen = LeaseSnapshot::new(1).with_claim(claim).with_token(7).with_owner(Owner::current()).with_expires_in(left);
/// assert_eq!((seen.revision(), seen.claim(), seen.token(), seen.expires_in()), (1, Some(claim), Some(7), Some(left)));
/// assert_eq!(seen.owner().map(Owner::pid), Some(std::process::id()));
///
/// let renewed = LeaseSnapshot::new(2).with_claim(claim).with_token(7);
/// assert!(renewed.is_same_holder(&seen));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseSnapshot {
    revision: u64,
    claim: Option<ClaimId>,
    token: Option<u64>,
    owner: Option<Box<Owner>>,
    expires_in: Option<Duration>,
}

impl LeaseSnapshot {
    /// A holder, in a record whose every change changes `revision`.
    pub const fn new(revision: u64) -> Self {
        Self { revision, claim: None, token: None, owner: None, expires_in: None }
    }

    /// Adds the claim of the holder.
    pub fn with_claim(mut self, claim: ClaimId) -> Self {
        self.claim = Some(claim);
        self
    }

    /// Adds the token of the holder.
    pub fn with_token(mut self, token: u64) -> Self {
        self.token = Some(token);
        self
    }

    /// Adds who holds it.
    pub fn with_owner(mut self, owner: Owner) -> Self {
        self.owner = Some(Box::new(owner));
        self
    }

    /// Adds how long from now it has until it runs out, unless it is renewed.
    pub fn with_expires_in(mut self, left: Duration) -> Self {
        self.expires_in = Some(left);
        self
    }

    /// What changes with every change of the record.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// The claim of the holder, where there is a record that can be read.
    pub fn claim(&self) -> Option<ClaimId> {
        self.claim
    }

    /// The token of the holder, where there is a record that can be read.
    pub fn token(&self) -> Option<u64> {
        self.token
    }

    /// Who holds it, where that is known.
    pub fn owner(&self) -> Option<&Owner> {
        self.owner.as_deref()
    }

    /// How long it had, then, until it runs out unless it is renewed, where that is known. Nothing at all means that it
    /// has run out, or that its owner is dead, and the next to come will take it over.
    pub fn expires_in(&self) -> Option<Duration> {
        self.expires_in
    }

    /// Whether the other one is of the same holder, however often that has renewed in between. Of records that nobody
    /// can read: whether it is the very same.
    pub fn is_same_holder(&self, other: &Self) -> bool {
        match (self.claim, other.claim) {
            (None, None) => self.revision == other.revision,
            _ => (self.claim, self.token) == (other.claim, other.token),
        }
    }
}

/// What came of a renewal: of [`LeaseStore::renew`]. The example of [`LeaseStore`] makes both.
#[derive(Debug)]
pub enum Renewal {
    /// It is good for this long from when the lease asked.
    Extended {
        /// The ttl that the store granted; of a session that keeps many names, what is left of its own.
        ttl: Duration,
    },
    /// The name is not the claim's any more.
    Lost {
        /// Who has it now, where that is known.
        by: Option<Owner>,
    },
}

/// What came of a release or an eviction. The example of [`LeaseStore`] makes both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Released {
    /// The name is free.
    Done,
    /// It was not that claim's any more, and nothing was changed.
    NotMine,
}

/// Why a store did not do what it was asked.
///
/// What a store makes of what its connection says:
///
/// ```
/// use std::io::{Error, ErrorKind};
/// use lockkit::lease::StoreError;
///
/// fn failed(error: Error, is_sent: bool) -> StoreError {
///     match error.kind() {
///         ErrorKind::PermissionDenied => StoreError::permanent(error), // No waiting heals that.
///         _ if is_sent => StoreError::unknown(error), // It may be done.
///         _ => StoreError::not_applied(error),
///     }
/// }
/// # assert!(matches!(failed(ErrorKind::TimedOut.into(), true), StoreError::Unknown(_)));
/// ```
#[derive(Debug)]
pub enum StoreError {
    /// It took no effect; the same may work later.
    NotApplied(Cause),
    /// It may have taken effect: no answer came, or it broke off. Where an acquisition ends so, or a later attempt of it
    /// has been granted and released since, the heartbeat [looks](LeaseStore::get) for its claim from then on, until a ttl
    /// after the request, and gives back what that was given.
    Unknown(Cause),
    /// It took no effect, and never will: the request, the name or the store's place is not right. A lockkit
    /// [`Error`](crate::Error) as cause is what acquiring then fails with.
    Permanent(Cause),
}

impl StoreError {
    /// [`NotApplied`](Self::NotApplied), by this.
    pub fn not_applied(cause: impl Into<Cause>) -> Self {
        Self::NotApplied(cause.into())
    }

    /// [`Unknown`](Self::Unknown), by this.
    pub fn unknown(cause: impl Into<Cause>) -> Self {
        Self::Unknown(cause.into())
    }

    /// [`Permanent`](Self::Permanent), by this.
    pub fn permanent(cause: impl Into<Cause>) -> Self {
        Self::Permanent(cause.into())
    }

    /// The cause.
    pub(super) fn cause(&self) -> &(dyn std::error::Error + Send + Sync + 'static) {
        let (Self::NotApplied(cause) | Self::Unknown(cause) | Self::Permanent(cause)) = self;
        &**cause
    }

    /// The error of an operation on `lock` that ends with this one.
    pub(super) fn into_error(self, lock: impl FnOnce() -> String) -> crate::Error {
        let (cause, kind): (Cause, fn(Cause) -> Self) = match self {
            Self::NotApplied(cause) => (cause, Self::NotApplied),
            Self::Unknown(cause) => (cause, Self::Unknown),
            Self::Permanent(cause) => (cause, Self::Permanent),
        };
        match cause.downcast::<crate::Error>() {
            Ok(error) => *error,
            Err(cause) => ErrorKind::Store { lock: lock(), source: kind(cause) }.into(),
        }
    }
}

/// Includes the causes, so `source()` has none.
impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let outcome = match self {
            // The error of a built-in store is a complete sentence.
            Self::NotApplied(cause) | Self::Permanent(cause) if cause.is::<crate::Error>() => return cause.fmt(f),
            Self::NotApplied(_) => "the store refused",
            Self::Unknown(_) => "the store may or may not have done it",
            Self::Permanent(_) => "the store cannot do this",
        };
        write!(f, "{outcome}: {}", chain(self.cause()))
    }
}

impl std::error::Error for StoreError {}

/// The moment by which a request must have ended.
///
/// ```
/// use std::time::{Duration, Instant};
/// use lockkit::lease::Deadline;
/// let by = Deadline::after(Duration::from_secs(2));
/// assert!(!by.is_past() && by.remaining() <= Duration::from_secs(2)); // What a socket gets as its limit.
/// assert!(by.moment() > Instant::now());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

impl Deadline {
    /// The longest that anything here waits in one go.
    const FAR: Duration = Duration::from_secs(3600);

    /// As long from now; at most an hour.
    pub fn after(limit: Duration) -> Self {
        Self(Instant::now() + limit.min(Self::FAR))
    }

    /// The moment.
    pub fn moment(self) -> Instant {
        self.0
    }

    /// How long it is until then; nothing, once it is past.
    pub fn remaining(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// Whether it has come.
    pub fn is_past(self) -> bool {
        self.remaining().is_zero()
    }
}

/// That moment.
impl From<Instant> for Deadline {
    fn from(moment: Instant) -> Self {
        Self(moment)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_claims_are_the_same() {
        let claims: std::collections::HashSet<_> = (0..1000).map(|_| ClaimId::random()).collect();
        assert_eq!(claims.len(), 1000);
    }

    #[test]
    fn a_name_fits_every_store() {
        assert_eq!(LeaseName::new("a/b c").unwrap().as_str(), "a/b c");
        for bad in ["", "a\n", &"x".repeat(201)] {
            assert!(matches!(LeaseName::new(bad).unwrap_err().kind(), ErrorKind::InvalidName { .. }));
        }
    }
}
