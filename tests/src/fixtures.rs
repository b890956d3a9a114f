//! The kinds of lock under test.
//!
//! A new kind, or a new store of leases, gets every case of the suite by four additions:
//! - a [`Fixture`],
//! - a constant in [`Kind`],
//! - an entry in [`KINDS`],
//! - a line `conformance!(name, Kind::NAME);` in a file of `tests/tests`.

use std::fmt;
use std::ops::Deref;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use lockkit::{
    AsyncLock, Backend, FileLock, Guard, Lease, LeaseBuilder, LockManager, ManagedLock, NamedLock,
    PidFile, PidStatus, Result, Scope, Wait,
};

use crate::managers::{self, Table};
#[cfg(target_os = "linux")]
use crate::server_conformance;

/// A lock of any kind.
pub trait AnyLock: Send + Sync {
    /// As [`lockkit::Lock::acquire`].
    fn acquire(&self, wait: &Wait) -> Result<Box<dyn AnyGuard>>;
    /// As [`AsyncLock::acquire_async`].
    fn acquire_async<'w>(&'w self, wait: &'w Wait) -> AcquireFuture<'w>;
    /// Returns the owner's pid, for kinds that know it.
    fn owner(&self) -> Option<u32>;
}

/// An acquisition by a task.
pub type AcquireFuture<'w> = Pin<Box<dyn Future<Output = Result<Box<dyn AnyGuard>>> + Send + 'w>>;

/// Boxes the future of a lock's own method.
fn box_acquire<'w, G: Guard + 'static>(
    future: impl Future<Output = Result<G>> + Send + 'w,
) -> AcquireFuture<'w> {
    Box::pin(async { Ok(Box::new(future.await?) as Box<dyn AnyGuard>) })
}

/// A held lock of any kind.
pub trait AnyGuard: Send {
    /// The pid of the dead previous owner, 0 for an unknown owner, `None` without a death.
    fn recovered(&self) -> Option<u32>;
    /// As [`Guard::release`].
    fn release(self: Box<Self>) -> Result<()>;
}

impl<G: Guard + 'static> AnyGuard for G {
    fn recovered(&self) -> Option<u32> {
        let died = Guard::recovered(self)?;
        Some(died.owner().map_or(0, |owner| owner.pid()))
    }

    fn release(self: Box<Self>) -> Result<()> {
        Guard::release(*self)
    }
}

struct Any<L> {
    lock: L,
    owner: fn(&L) -> Option<u32>,
}

impl<L: AsyncLock<Guard: 'static> + Send + Sync> AnyLock for Any<L> {
    fn acquire(&self, wait: &Wait) -> Result<Box<dyn AnyGuard>> {
        Ok(Box::new(self.lock.acquire(wait)?))
    }

    fn acquire_async<'w>(&'w self, wait: &'w Wait) -> AcquireFuture<'w> {
        box_acquire(self.lock.acquire_async(wait))
    }

    fn owner(&self) -> Option<u32> {
        (self.owner)(&self.lock)
    }
}

/// A lock of a manager.
struct Managed {
    manager: Box<dyn LockManager>,
    lock: ManagedLock,
}

impl AnyLock for Managed {
    fn acquire(&self, wait: &Wait) -> Result<Box<dyn AnyGuard>> {
        Ok(Box::new(self.lock.acquire(wait)?))
    }

    fn acquire_async<'w>(&'w self, wait: &'w Wait) -> AcquireFuture<'w> {
        box_acquire(self.lock.acquire_async(wait))
    }

    fn owner(&self) -> Option<u32> {
        let held = self.manager.held().expect("held locks can be listed");
        held.iter()
            .find(|held| held.id() == self.lock.id())
            .map(|held| held.owner().pid())
    }
}

/// The suite's description of a kind of lock: how any process opens it, and what it guarantees.
pub trait Fixture: Sync {
    /// Returns the name of the kind, as processes exchange it.
    fn name(&self) -> &'static str;

    /// Returns the reason why this machine cannot have the kind, if it cannot.
    fn left_out(&self) -> Option<String> {
        None
    }

    /// Returns the address of a lock with a fresh name: a path, a URL, or the name itself.
    fn address(&self, name: &str) -> String {
        name.to_owned()
    }

    /// Opens the lock at `at` in the invited process `number`. The test's own process has no
    /// number.
    fn open(&self, at: &str, number: Option<usize>) -> Box<dyn AnyLock>;

    /// Returns the files that the lock leaves on disk or in memory by design. The test removes
    /// them.
    fn files(&self, at: &str) -> Vec<PathBuf> {
        vec![at.into()]
    }

    /// Returns whether the next guard reports a death.
    fn reports_deaths(&self) -> bool {
        true
    }

    /// Returns whether an acquisition may need a descriptor.
    fn needs_descriptors(&self) -> bool {
        true
    }

    /// Returns whether a held lock has a descriptor of its own. Without one, the release needs a
    /// descriptor.
    fn has_descriptor_while_held(&self) -> bool {
        true
    }

    /// Returns whether a forked child keeps the lock of its killed parent.
    fn is_kept_by_forked_child(&self) -> bool {
        false
    }

    /// Returns the longest hold in the chaos, in microseconds. It is long enough that some
    /// processes die as holders.
    fn longest_hold(&self) -> u64 {
        300
    }

    /// Returns how long after the death of a process its requests may still take effect, in
    /// nanoseconds.
    fn late_request_limit(&self) -> u64 {
        0
    }

    /// Returns whether waiters are served first come, first served.
    fn is_fair(&self) -> bool {
        false
    }
}

/// A [`NamedLock`].
struct Named(&'static str, Scope, Backend);

impl Fixture for Named {
    fn name(&self) -> &'static str {
        self.0
    }

    fn left_out(&self) -> Option<String> {
        let made = NamedLock::builder("any")
            .scope(self.1)
            .backend(self.2)
            .build();
        made.err().map(|error| error.to_string())
    }

    fn open(&self, at: &str, _: Option<usize>) -> Box<dyn AnyLock> {
        let lock = NamedLock::builder(at)
            .scope(self.1)
            .backend(self.2)
            .build()
            .expect("a valid name");
        let owner = |lock: &NamedLock| {
            lock.owner()
                .expect("the owner can be read")
                .map(|owner| owner.pid())
        };
        Box::new(Any { lock, owner })
    }

    #[cfg(not(target_os = "linux"))]
    fn files(&self, _: &str) -> Vec<PathBuf> {
        vec![]
    }

    #[cfg(target_os = "linux")]
    fn files(&self, at: &str) -> Vec<PathBuf> {
        let user = format!("lockkit-u{}/", rustix::process::geteuid().as_raw());
        let sharing = if self.1 == Scope::User {
            &*user
        } else {
            "lockkit-machine-"
        };
        match self.2 {
            Backend::File => vec![format!("/tmp/{sharing}{at}.lock").into()],
            // The record is in a table.
            _ => vec![],
        }
    }

    fn is_fair(&self) -> bool {
        self.2 == Backend::Socket
    }
}

/// A [`FileLock`]. In shared mode the first process acquires it shared and all others exclusively,
/// so that any two exclude each other, as everywhere in the suite.
struct File {
    shared: bool,
}

/// A [`FileLock`] that is acquired shared.
struct Shared(FileLock);

impl AnyLock for Shared {
    fn acquire(&self, wait: &Wait) -> Result<Box<dyn AnyGuard>> {
        Ok(Box::new(self.0.acquire_shared(wait)?))
    }

    fn acquire_async<'w>(&'w self, wait: &'w Wait) -> AcquireFuture<'w> {
        box_acquire(self.0.acquire_shared_async(wait))
    }

    fn owner(&self) -> Option<u32> {
        None
    }
}

impl Fixture for File {
    fn name(&self) -> &'static str {
        if self.shared { "file-shared" } else { "file" }
    }

    fn address(&self, name: &str) -> String {
        std::env::temp_dir()
            .join(format!("{name}.lock"))
            .display()
            .to_string()
    }

    fn open(&self, at: &str, number: Option<usize>) -> Box<dyn AnyLock> {
        let lock = FileLock::new(at);
        match (self.shared, number) {
            (true, Some(0)) => Box::new(Shared(lock)),
            _ => Box::new(Any {
                lock,
                owner: |_| None,
            }),
        }
    }

    fn reports_deaths(&self) -> bool {
        false
    }
}

/// A [`PidFile`].
struct Pid;

impl Fixture for Pid {
    fn name(&self) -> &'static str {
        "pidfile"
    }

    fn address(&self, name: &str) -> String {
        std::env::temp_dir()
            .join(format!("{name}.pid"))
            .display()
            .to_string()
    }

    fn open(&self, at: &str, _: Option<usize>) -> Box<dyn AnyLock> {
        let owner = |lock: &PidFile| match PidFile::inspect(lock.path()) {
            Ok(PidStatus::Running(owner)) => Some(owner.pid()),
            _ => None,
        };
        Box::new(Any {
            lock: PidFile::new(at).expect("an absolute path"),
            owner,
        })
    }

    /// It may be a daemon that has yet to rewrite the pidfile.
    fn is_kept_by_forked_child(&self) -> bool {
        true
    }
}

/// A [`Lease`] on a file.
///
/// Its TTL is longer than any process in the suite is ever stopped. So it behaves like every other
/// lock of the suite: only a release or the observed death of its owner frees it, and no live
/// holder is taken over. The tests of leases use the tokens to check holders that are silent for
/// longer. The heartbeat interval is so long that hardly any heartbeat falls into a scenario of
/// [`crash_points`](crate::crash_points).
struct FileLease;

impl Fixture for FileLease {
    fn name(&self) -> &'static str {
        "lease"
    }

    fn address(&self, name: &str) -> String {
        std::env::temp_dir()
            .join(format!("{name}.lease"))
            .display()
            .to_string()
    }

    fn open(&self, at: &str, _: Option<usize>) -> Box<dyn AnyLock> {
        lease(Lease::file(at))
    }

    fn has_descriptor_while_held(&self) -> bool {
        false
    }
}

/// A [`Lease`] on a server. Its TTL is as long as that of a [`FileLease`], for the same reason. Its
/// descriptor is a connection.
#[cfg(target_os = "linux")]
struct ServerLease {
    name: &'static str,
    /// Returns the URL of a lease with this name on the process's shared server, which it starts;
    /// or the reason why there is none.
    url: fn(name: &str) -> std::result::Result<String, &'static str>,
}

#[cfg(target_os = "linux")]
impl Fixture for ServerLease {
    fn name(&self) -> &'static str {
        self.name
    }

    fn left_out(&self) -> Option<String> {
        (self.url)("any").err().map(str::to_owned)
    }

    fn address(&self, name: &str) -> String {
        (self.url)(name).expect("the case is left out without a server")
    }

    fn open(&self, at: &str, _: Option<usize>) -> Box<dyn AnyLock> {
        lease(Lease::connect(at))
    }

    fn files(&self, _: &str) -> Vec<PathBuf> {
        vec![]
    }

    fn longest_hold(&self) -> u64 {
        3_000
    }

    /// A request may be on its way to the server, or wait there for others.
    fn late_request_limit(&self) -> u64 {
        1_000_000_000
    }
}

fn lease(builder: LeaseBuilder) -> Box<dyn AnyLock> {
    let builder = builder.ttl(crate::LIVELY).heartbeat(crate::LIVELY / 4);
    let owner = |lease: &Lease| {
        lease
            .owner()
            .expect("the owner can be read")
            .map(|owner| owner.pid())
    };
    Box::new(Any {
        lock: builder.build().expect("valid options"),
        owner,
    })
}

/// The first lock of a table, allocated.
struct TableLock(managers::Kind);

impl Fixture for TableLock {
    fn name(&self) -> &'static str {
        match self.0 {
            managers::Kind::Shm => "shm",
            managers::Kind::Directory => "directory",
            managers::Kind::Memory => "memory",
        }
    }

    fn left_out(&self) -> Option<String> {
        let is_missing = self.0 == managers::Kind::Shm && !cfg!(target_os = "linux");
        is_missing.then(|| "tables in shared memory need Linux".to_owned())
    }

    fn address(&self, _: &str) -> String {
        self.0.fresh().name().to_owned()
    }

    fn open(&self, at: &str, _: Option<usize>) -> Box<dyn AnyLock> {
        let manager = Table::at(self.0, at).open();
        // The first process allocates it.
        let lock = manager
            .allocate_at(0)
            .or_else(|_| manager.retrieve(0))
            .expect("a first lock");
        Box::new(Managed { manager, lock })
    }

    fn files(&self, at: &str) -> Vec<PathBuf> {
        Table::at(self.0, at).clean();
        vec![]
    }

    fn needs_descriptors(&self) -> bool {
        self.0 != managers::Kind::Shm
    }
}

/// A kind of lock.
#[derive(Clone, Copy)]
pub struct Kind(&'static dyn Fixture);

#[allow(missing_docs)] // The names need no documentation.
impl Kind {
    pub const NAMED_SOCKET: Self = Self(&Named("named-socket", Scope::User, Backend::Socket));
    pub const MACHINE_SOCKET: Self =
        Self(&Named("machine-socket", Scope::Machine, Backend::Socket));
    pub const NAMED_MUTEX: Self = Self(&Named("named-mutex", Scope::User, Backend::Mutex));
    pub const MACHINE_MUTEX: Self = Self(&Named("machine-mutex", Scope::Machine, Backend::Mutex));
    pub const NAMED_FILE: Self = Self(&Named("named-file", Scope::User, Backend::File));
    pub const MACHINE_FILE: Self = Self(&Named("machine-file", Scope::Machine, Backend::File));
    /// The default kind of named lock on this system.
    pub const NAMED: Self = match () {
        _ if cfg!(target_os = "linux") => Self::NAMED_SOCKET,
        _ if cfg!(windows) => Self::NAMED_MUTEX,
        _ => Self::NAMED_FILE,
    };
    pub const FILE: Self = Self(&File { shared: false });
    pub const FILE_SHARED: Self = Self(&File { shared: true });
    pub const PIDFILE: Self = Self(&Pid);
    pub const LEASE: Self = Self(&FileLease);
    #[cfg(target_os = "linux")]
    pub const ETCD: Self = Self(&ServerLease {
        name: "etcd",
        url: server_conformance::etcd::shared_url,
    });
    #[cfg(target_os = "linux")]
    pub const POSTGRES: Self = Self(&ServerLease {
        name: "postgres",
        url: server_conformance::postgres::shared_url,
    });
    #[cfg(target_os = "linux")]
    pub const REDIS: Self = Self(&ServerLease {
        name: "redis",
        url: server_conformance::redis::shared,
    });
    pub const SHM: Self = Self(&TableLock(managers::Kind::Shm));
    pub const DIRECTORY: Self = Self(&TableLock(managers::Kind::Directory));
    pub const MEMORY: Self = Self(&TableLock(managers::Kind::Memory));
}

/// All kinds.
pub const KINDS: &[Kind] = &[
    Kind::NAMED_SOCKET,
    Kind::MACHINE_SOCKET,
    Kind::NAMED_MUTEX,
    Kind::MACHINE_MUTEX,
    Kind::NAMED_FILE,
    Kind::MACHINE_FILE,
    Kind::FILE,
    Kind::FILE_SHARED,
    Kind::PIDFILE,
    Kind::LEASE,
    #[cfg(target_os = "linux")]
    Kind::ETCD,
    #[cfg(target_os = "linux")]
    Kind::POSTGRES,
    #[cfg(target_os = "linux")]
    Kind::REDIS,
    Kind::SHM,
    Kind::DIRECTORY,
    Kind::MEMORY,
];

impl Kind {
    /// Creates a spec for a lock that no other test uses.
    pub fn fresh(self) -> Spec {
        Spec {
            kind: self,
            at: self.address(&crate::fresh_name("lockkit-test")),
            number: None,
            invitations: Arc::default(),
        }
    }
}

impl Deref for Kind {
    type Target = dyn Fixture;

    fn deref(&self) -> &Self::Target {
        self.0
    }
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One lock, which other processes open from the text of an [invitation](Self::invite).
#[derive(Clone, Debug)]
pub struct Spec {
    kind: Kind,
    at: String,
    number: Option<usize>,
    /// The number of invited processes.
    invitations: Arc<AtomicUsize>,
}

impl Spec {
    /// Returns the invitation for the next process: `KIND#NUMBER:WHERE`.
    pub fn invite(&self) -> String {
        format!(
            "{:?}#{}:{}",
            self.kind,
            self.invitations.fetch_add(1, Ordering::Relaxed),
            self.at
        )
    }

    /// Parses an invitation, or `KIND:WHERE`.
    pub fn parse(text: &str) -> Self {
        let (kind, at) = text.split_once(':').expect("KIND#NUMBER:WHERE");
        let (name, number) = kind
            .split_once('#')
            .map_or((kind, None), |(name, number)| (name, number.parse().ok()));
        let kind = KINDS
            .iter()
            .find(|known| known.name() == name)
            .copied()
            .expect("a known kind");
        Self {
            kind,
            at: at.to_owned(),
            number,
            invitations: Arc::default(),
        }
    }

    /// Returns its kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Returns its name or path.
    pub fn at(&self) -> &str {
        &self.at
    }

    /// Opens the lock.
    pub fn open(&self) -> Box<dyn AnyLock> {
        self.kind.open(&self.at, self.number)
    }

    /// Opens a handle that those of [`open`](Self::open) exclude, in this process as in any other.
    pub fn rival(&self) -> Box<dyn AnyLock> {
        self.kind.open(&self.at, None)
    }

    /// See [`Fixture::files`].
    pub fn files(&self) -> Vec<PathBuf> {
        self.kind.files(&self.at)
    }

    /// Removes the files that the lock left. The caller calls it when no process uses the lock any
    /// more.
    pub fn clean(&self) {
        for file in self.files() {
            let _ = std::fs::remove_file(file);
        }
    }
}

/// Runs a case for a kind of lock, or reports why this machine cannot.
pub fn run_or_leave_out(kind: Kind, case: impl FnOnce(Kind)) {
    match kind.left_out() {
        None => case(kind),
        Some(why) => crate::left_out(why),
    }
}
