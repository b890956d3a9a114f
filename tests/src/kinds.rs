//! The kinds of lock under test.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use lockkit::{
    Backend, FileLock, Guard, Lease, Lock, LockManager, ManagedLock, NamedLock, PidFile, PidStatus, Result, Scope, Wait,
};

use crate::managers::{self, Table};

/// A lock of any kind.
pub trait AnyLock: Send + Sync {
    /// As [`Lock::acquire`].
    fn acquire(&self, wait: &Wait) -> Result<Box<dyn AnyGuard>>;
    /// The owner's pid, for kinds that know it.
    fn owner(&self) -> Option<u32>;
}

/// A held lock of any kind.
pub trait AnyGuard: Send {
    /// The pid of the owner that died before, 0 for an unknown one, `None` when none died.
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

impl<L: Lock<Guard: 'static> + Send + Sync> AnyLock for Any<L> {
    fn acquire(&self, wait: &Wait) -> Result<Box<dyn AnyGuard>> {
        Ok(Box::new(self.lock.acquire(wait)?))
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

    fn owner(&self) -> Option<u32> {
        let held = self.manager.held().expect("held locks can be listed");
        held.iter().find(|held| held.id() == self.lock.id()).map(|held| held.owner().pid())
    }
}

/// A kind of lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// [`NamedLock`] on a socket.
    NamedSocket,
    /// [`NamedLock`] on a socket, for the whole machine.
    MachineSocket,
    /// [`NamedLock`] on a file.
    NamedFile,
    /// [`NamedLock`] on a file, for the whole machine.
    MachineFile,
    /// [`FileLock`], exclusive.
    File,
    /// [`PidFile`].
    PidFile,
    /// [`Lease`] on a file.
    ///
    /// Its ttl is longer than anybody in the suite is ever stopped. So it is a lock like any other there: what frees it
    /// is a release, or that its owner is seen dead, and nobody is taken over alive. What becomes of a holder that is
    /// silent for longer is judged by the tokens, in the tests of leases. The heartbeat is long enough that hardly one
    /// falls into a scenario of [`steps`](crate::steps).
    Lease,
    /// The first lock of a table, allocated.
    Managed(managers::Kind),
}

const KINDS: [(Kind, &str); 10] = [
    (Kind::Managed(managers::Kind::Shm), "shm"),
    (Kind::Managed(managers::Kind::Folder), "folder"),
    (Kind::Managed(managers::Kind::Memory), "memory"),
    (Kind::NamedSocket, "named-socket"),
    (Kind::MachineSocket, "machine-socket"),
    (Kind::NamedFile, "named-file"),
    (Kind::MachineFile, "machine-file"),
    (Kind::File, "file"),
    (Kind::PidFile, "pidfile"),
    (Kind::Lease, "lease"),
];

impl Kind {
    /// A lock that nobody else uses.
    pub fn fresh(self) -> Spec {
        let name = crate::fresh_name("lockkit-test");
        let at = match self {
            Self::Managed(kind) => kind.fresh().name().to_owned(),
            Self::File => std::env::temp_dir().join(format!("{name}.lock")).display().to_string(),
            Self::PidFile => std::env::temp_dir().join(format!("{name}.pid")).display().to_string(),
            Self::Lease => std::env::temp_dir().join(format!("{name}.lease")).display().to_string(),
            _ => name,
        };
        Spec { kind: self, at }
    }

    /// Whether the next owner is told of a death.
    pub fn tells_deaths(self) -> bool {
        self != Self::File
    }

    /// Whether taking the lock may need a descriptor.
    pub fn needs_descriptors(self) -> bool {
        self != Self::Managed(managers::Kind::Shm)
    }

    /// Whether a held lock has a descriptor of its own. A lease has none, so it needs one to be given back.
    pub fn keeps_a_descriptor(self) -> bool {
        self != Self::Lease
    }

    /// Whether a forked child keeps what its killed parent held. Of a pidfile it does, for it may be a daemon that has
    /// yet to say so.
    pub fn survives_in_a_forked_child(self) -> bool {
        self == Self::PidFile
    }

    /// Whether waiters are served first come, first served.
    pub fn is_fair(self) -> bool {
        matches!(self, Self::NamedSocket | Self::MachineSocket)
    }
}

/// One lock, as text: `KIND:WHERE`.
#[derive(Clone, Debug)]
pub struct Spec {
    kind: Kind,
    at: String,
}

impl Spec {
    /// Reads what `Display` wrote.
    pub fn parse(text: &str) -> Self {
        let (name, at) = text.split_once(':').expect("KIND:WHERE");
        let (kind, _) = KINDS.into_iter().find(|(_, known)| *known == name).expect("a known kind");
        Self { kind, at: at.to_owned() }
    }

    /// Its kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its name or path.
    pub fn at(&self) -> &str {
        &self.at
    }

    /// A handle on the lock.
    pub fn open(&self) -> Box<dyn AnyLock> {
        let named = |scope, backend| {
            let lock = NamedLock::builder(&self.at).scope(scope).backend(backend).build().expect("a valid name");
            let owner = |lock: &NamedLock| lock.owner().expect("an owner can be asked for").map(|owner| owner.pid());
            Box::new(Any { lock, owner }) as Box<dyn AnyLock>
        };
        match self.kind {
            Kind::NamedSocket => named(Scope::User, Backend::Socket),
            Kind::MachineSocket => named(Scope::Machine, Backend::Socket),
            Kind::NamedFile => named(Scope::User, Backend::File),
            Kind::MachineFile => named(Scope::Machine, Backend::File),
            Kind::File => Box::new(Any { lock: FileLock::new(&self.at), owner: |_| None }),
            Kind::Lease => {
                let builder = Lease::file(&self.at).ttl(crate::LIVELY).heartbeat(Duration::from_secs(2));
                let owner = |lease: &Lease| lease.owner().expect("an owner can be asked for").map(|owner| owner.pid());
                Box::new(Any { lock: builder.build().expect("options that go together"), owner })
            }
            Kind::Managed(kind) => {
                let manager = Table::at(kind, &self.at).open();
                // Whoever comes first allocates it.
                let lock = manager.allocate_at(0).or_else(|_| manager.retrieve(0)).expect("a first lock");
                Box::new(Managed { manager, lock })
            }
            Kind::PidFile => {
                let owner = |lock: &PidFile| match PidFile::inspect(lock.path()) {
                    Ok(PidStatus::Running(owner)) => Some(owner.pid()),
                    _ => None,
                };
                Box::new(Any { lock: PidFile::new(&self.at).expect("an absolute path"), owner })
            }
        }
    }

    /// The files that a lock leaves on disk or in memory by design, which a test takes away.
    pub fn files(&self) -> Vec<PathBuf> {
        let uid = rustix::process::geteuid().as_raw();
        match self.kind {
            Kind::NamedSocket => vec![format!("/dev/shm/lockkit-u{uid}/{}.record", self.at).into()],
            Kind::MachineSocket => vec![format!("/dev/shm/lockkit-machine-{}.record", self.at).into()],
            Kind::NamedFile => vec![format!("/tmp/lockkit-u{uid}/{}.lock", self.at).into()],
            Kind::MachineFile => vec![format!("/tmp/lockkit-machine-{}.lock", self.at).into()],
            Kind::File | Kind::PidFile | Kind::Lease => vec![PathBuf::from(&self.at)],
            Kind::Managed(kind) => {
                Table::at(kind, &self.at).clean();
                vec![]
            }
        }
    }

    /// Takes away what the lock left; call it when nobody uses it any more.
    pub fn clean(&self) {
        for file in self.files() {
            let _ = std::fs::remove_file(file);
        }
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (_, name) = KINDS.into_iter().find(|(kind, _)| *kind == self.kind).expect("every kind has a name");
        write!(f, "{name}:{}", self.at)
    }
}
