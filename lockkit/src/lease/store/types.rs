//! The values that a lease and its store exchange.

use std::any::Any;
use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::base::error::{ErrorKind, Result};
use crate::base::guard::Recovered;
use crate::base::owner::Owner;
use crate::lease::clock::{Clock, SystemClock};
use crate::sys::fork::ProcessId;

/// The capabilities of a [`LeaseStore`](crate::lease::LeaseStore).
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
    /// The shortest ttl that the store can keep; zero by default.
    pub smallest_ttl: Duration,
    /// The step of the ttl: every ttl is a whole multiple of this, so a lease asks for a longer ttl
    /// if needed. A nanosecond by default.
    pub ttl_step: Duration,
    /// What the records survive.
    pub durability: Durability,
    /// Whether [`wait_for_change`](crate::lease::LeaseStore::wait_for_change) wakes at a change;
    /// false by default.
    pub wakes_waiters: bool,
    /// The failure domain: identifies what stores that hang together have in common, such as their
    /// server. While a request to one of these stores hangs, the heartbeat sends no request to any
    /// of them. By default each store is on its own.
    pub failure_domain: Option<u64>,
}

impl StoreProfile {
    /// Creates a profile of a store that keeps any ttl and wakes no waiter.
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

/// What the records of a store survive, and so how far its leases and their tokens can be relied
/// on. A part of its [`StoreProfile`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Durability {
    /// The records last as long as the process: for tests.
    Memory,
    /// The records survive what a file survives: the end of every process, and as a rule of the
    /// machine.
    Local,
    /// The records survive the restart of the one primary server, but not the failover to another
    /// server.
    Primary,
    /// The records survive the loss of any minority of the servers.
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

    /// Creates a name that every store can keep.
    ///
    /// # Errors
    /// [`InvalidName`](ErrorKind::InvalidName) unless it has 1 to 200 bytes and no control
    /// characters.
    pub fn new(name: &str) -> Result<Self> {
        let rule = match name {
            "" => "it is empty",
            name if name.len() > Self::LONGEST => "it is longer than 200 bytes",
            name if name.contains(char::is_control) => "it has control characters",
            name => return Ok(Self(name.into())),
        };
        Err(ErrorKind::InvalidName {
            name: name.chars().take(80).collect(),
            rule,
        }
        .into())
    }

    /// Creates the name of a file's lease, which the store knows by itself.
    pub(in crate::lease) fn of_path(path: &std::path::Path) -> Self {
        Self(path.to_string_lossy().into())
    }

    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for LeaseName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The id of one acquisition, different from every other id: 128 random bits.
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
    /// Creates a new id.
    pub fn random() -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        // The keys are random, but a forked child has its parent's keys. So the hashed value
        // differs between any two calls that may have the same keys.
        let call = (
            std::process::id(),
            ProcessId::current(),
            COUNT.fetch_add(1, Ordering::Relaxed),
            SystemClock.now(),
        );
        let keys = RandomState::new();
        Self(u128::from(keys.hash_one((0, call))) << 64 | u128::from(keys.hash_one((1, call))))
    }

    /// Creates the claim of this number, as [`number`](Self::number) returned it.
    pub const fn from_number(number: u128) -> Self {
        Self(number)
    }

    /// Returns the claim as a number, for a store to keep.
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

/// The result of an attempt to acquire,
/// [`LeaseStore::try_acquire`](crate::lease::LeaseStore::try_acquire). The example of
/// [`LeaseStore`](crate::lease::LeaseStore) makes both.
#[derive(Debug)]
pub enum Attempt {
    /// The name is the claim's.
    Granted(Grant),
    /// Another claim has the name.
    Busy(LeaseSnapshot),
}

/// The grant of a name to a claim.
///
/// ```
/// # fn main() -> lockkit::Result<()> {
/// use std::time::Duration;
/// use lockkit::Owner;
/// use lockkit::lease::{ClaimId, Grant, LeaseName};
///
/// struct Session(u64); // What a store needs to know of the grant.
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
    /// Creates the grant of `name` to `claim` for `ttl` from when the store got the request.
    pub fn new(name: &LeaseName, claim: &ClaimId, token: u64, ttl: Duration) -> Self {
        Self {
            name: name.clone(),
            claim: *claim,
            token,
            ttl,
            handle: None,
            recovered: None,
        }
    }

    /// Adds what the store needs to find the grant again, such as the number of a session.
    pub fn with_handle(mut self, handle: impl Any + Send + Sync) -> Self {
        self.handle = Some(Arc::new(handle));
        self
    }

    /// Records that the previous owner did not release, and the identity of that owner, if it is
    /// known.
    pub fn recovered_from(mut self, owner: Option<Owner>) -> Self {
        self.recovered = Some(Box::new(Recovered::new(owner)));
        self
    }

    /// Returns the name.
    pub fn name(&self) -> &LeaseName {
        &self.name
    }

    /// Returns the claim.
    pub fn claim(&self) -> &ClaimId {
        &self.claim
    }

    /// Returns the fencing token: greater than the token of every earlier grant of the name.
    pub fn token(&self) -> u64 {
        self.token
    }

    /// Returns how long the grant is valid.
    pub fn ttl(&self) -> Duration {
        self.ttl
    }

    /// Returns what the store added, if it is of this type.
    pub fn handle<T: Any>(&self) -> Option<&T> {
        self.handle.as_deref()?.downcast_ref()
    }

    /// Returns from which owner the grant was recovered, if the previous owner did not release. The
    /// grant of a held lease does not contain this any more, because the guard does.
    pub fn recovered(&self) -> Option<&Recovered> {
        self.recovered.as_deref()
    }

    pub(in crate::lease) fn take_recovered(&mut self) -> Option<Box<Recovered>> {
        self.recovered.take()
    }
}

/// The holder of a name, as a store saw it at one moment.
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
    /// Creates a snapshot of a holder. Every change of the record must change `revision`.
    pub const fn new(revision: u64) -> Self {
        Self {
            revision,
            claim: None,
            token: None,
            owner: None,
            expires_in: None,
        }
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

    /// Adds the identity of the holder.
    pub fn with_owner(mut self, owner: Owner) -> Self {
        self.owner = Some(Box::new(owner));
        self
    }

    /// Adds the time from now to the expiry, if no renewal comes.
    pub fn with_expires_in(mut self, left: Duration) -> Self {
        self.expires_in = Some(left);
        self
    }

    /// Returns the revision, which changes with every change of the record.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Returns the claim of the holder, if the record is readable.
    pub fn claim(&self) -> Option<ClaimId> {
        self.claim
    }

    /// Returns the token of the holder, if the record is readable.
    pub fn token(&self) -> Option<u64> {
        self.token
    }

    /// Returns the holder, if it is known.
    pub fn owner(&self) -> Option<&Owner> {
        self.owner.as_deref()
    }

    /// Returns the time from the snapshot to the expiry if no renewal comes, if that is known. Zero
    /// means that the lease has expired, or that its owner is dead: the next process to ask takes
    /// it over.
    pub fn expires_in(&self) -> Option<Duration> {
        self.expires_in
    }

    /// Returns whether both snapshots show the same holder, however often the holder renewed in
    /// between. For unreadable records: whether both show the very same record.
    pub fn is_same_holder(&self, other: &Self) -> bool {
        match (self.claim, other.claim) {
            (None, None) => self.revision == other.revision,
            _ => (self.claim, self.token) == (other.claim, other.token),
        }
    }
}

/// The result of a renewal, [`LeaseStore::renew`](crate::lease::LeaseStore::renew). The example of
/// [`LeaseStore`](crate::lease::LeaseStore) makes both.
#[derive(Debug)]
pub enum Renewal {
    /// The grant is valid for this long from when the lease sent the request.
    Extended {
        /// The ttl that the store granted; for a session that keeps many names, what is left of the
        /// session's ttl.
        ttl: Duration,
    },
    /// The name is not the claim's any more.
    Lost {
        /// The new holder, if it is known.
        by: Option<Owner>,
    },
}

/// The result of a release or an eviction. The example of [`LeaseStore`](crate::lease::LeaseStore)
/// makes both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Released {
    /// The name is free.
    Done,
    /// The name was not that claim's any more, and nothing was changed.
    NotMine,
}

/// The moment by which a request must have ended.
///
/// ```
/// use std::time::{Duration, Instant};
/// use lockkit::lease::Deadline;
/// let by = Deadline::after(Duration::from_secs(2));
/// assert!(!by.is_past() && by.remaining() <= Duration::from_secs(2)); // The timeout of a socket.
/// assert!(by.moment() > Instant::now());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

impl Deadline {
    /// The maximum time of one wait for a store.
    const MAX_TIMEOUT: Duration = Duration::from_secs(3600);

    /// Creates a deadline `limit` from now, at most an hour from now.
    pub fn after(limit: Duration) -> Self {
        Self(Instant::now() + limit.min(Self::MAX_TIMEOUT))
    }

    /// Returns the moment.
    pub fn moment(self) -> Instant {
        self.0
    }

    /// Returns the time until the deadline; zero once the deadline is past.
    pub fn remaining(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// Returns whether the deadline has come.
    pub fn is_past(self) -> bool {
        self.remaining().is_zero()
    }
}

/// Creates a deadline at that moment.
impl From<Instant> for Deadline {
    fn from(moment: Instant) -> Self {
        Self(moment)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_claims_are_distinct() {
        let claims: std::collections::HashSet<_> = (0..1000).map(|_| ClaimId::random()).collect();
        assert_eq!(claims.len(), 1000);
    }

    #[test]
    fn new_name_checks_length_and_characters() {
        assert_eq!(LeaseName::new("a/b c").unwrap().as_str(), "a/b c");
        for bad in ["", "a\n", &"x".repeat(201)] {
            assert!(matches!(
                LeaseName::new(bad).unwrap_err().kind(),
                ErrorKind::InvalidName { .. }
            ));
        }
    }
}
