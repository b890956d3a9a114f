//! The backends of named locks as one type: [`NamedState`] is a lock, and [`BackendHold`] a held
//! one.

#[cfg(unix)]
use std::os::fd::OwnedFd;

use super::file::NamedFileLock;
use super::native::{NATIVE, NativeHold, NativeLock};
use super::options::{Backend, Scope};
use crate::base::error::{ErrorKind, Result};
use crate::base::guard::Recovered;
use crate::base::holder_record;
use crate::base::lock_info::LockInfo;
use crate::base::owner::Owner;
use crate::base::wait::Wait;
use crate::file_lock::FileGuard;

/// A lock that was held during a listing: its name, its holder, and its number of waiters.
pub(super) type Listed = (String, Option<Owner>, u32);

/// The state of a named lock, which all handles and guards share.
#[derive(Debug)]
pub(super) struct NamedState {
    pub(super) name: String,
    pub(super) scope: Scope,
    lock: BackendLock,
}

#[derive(Debug)]
enum BackendLock {
    #[cfg_attr(not(any(target_os = "linux", windows)), allow(dead_code))]
    Native(NativeLock),
    File(NamedFileLock),
}

/// A named lock that this process holds.
#[derive(Debug)]
pub(super) enum BackendHold {
    #[cfg_attr(not(any(target_os = "linux", windows)), allow(dead_code))]
    Native(NativeHold),
    File(FileGuard),
}

/// The acquired lock, and the report if its previous holder died.
pub(super) type Acquired = (BackendHold, Option<Box<Recovered>>);

/// Returns the held locks of the native backend and of the file backend.
pub(super) fn list(scope: Scope) -> Result<Vec<(Listed, Backend)>> {
    let native = NativeLock::list(scope.sharing())?
        .into_iter()
        .map(|listed| (listed, Backend::Auto));
    let files = NamedFileLock::list(scope.sharing())
        .into_iter()
        .map(|listed| (listed, Backend::File));
    Ok(native.chain(files).collect())
}

impl NamedState {
    /// Returns the state of a lock on `name`, which is valid.
    ///
    /// # Errors
    /// `Unsupported` if the system does not have the backend.
    pub(super) fn new(name: &str, scope: Scope, backend: Backend) -> Result<Self> {
        let sharing = scope.sharing();
        let unsupported = |what| Err(ErrorKind::Unsupported { what }.into());
        let lock = match if backend == Backend::Auto {
            NATIVE
        } else {
            backend
        } {
            Backend::Auto | Backend::File => BackendLock::File(NamedFileLock::new(name, sharing)),
            native if native == NATIVE => BackendLock::Native(NativeLock::new(name, sharing)?),
            Backend::Socket => return unsupported("the socket backend of named locks"),
            Backend::Mutex => return unsupported("the mutex backend of named locks"),
        };
        Ok(Self {
            name: name.to_owned(),
            scope,
            lock,
        })
    }

    pub(super) fn backend(&self) -> Backend {
        match &self.lock {
            BackendLock::Native(_) => NATIVE,
            BackendLock::File(_) => Backend::File,
        }
    }

    pub(super) fn waiters(&self) -> Result<u32> {
        match &self.lock {
            BackendLock::Native(lock) => lock.waiters(),
            BackendLock::File(lock) => lock.waiters(),
        }
    }

    pub(super) fn is_held(&self) -> Result<bool> {
        match &self.lock {
            BackendLock::Native(lock) => lock.is_held(),
            BackendLock::File(lock) => lock.is_held(),
        }
    }

    pub(super) fn owner(&self) -> Result<Option<Owner>> {
        match &self.lock {
            BackendLock::Native(lock) => lock.owner(),
            BackendLock::File(lock) => lock.owner(),
        }
    }

    pub(super) fn acquire(&self, wait: &Wait) -> Result<Acquired> {
        match &self.lock {
            BackendLock::Native(lock) => {
                let (hold, recovered) = lock.acquire(wait, self)?;
                Ok((BackendHold::Native(hold), recovered))
            }
            BackendLock::File(lock) => {
                let (file, recovered) = lock.acquire(wait, self)?;
                Ok((BackendHold::File(file), recovered))
            }
        }
    }

    /// Acquires like [`acquire`](Self::acquire), in a task. Returns `None` if only a thread can
    /// wait for this backend.
    #[cfg(all(feature = "tokio", target_os = "linux"))]
    pub(super) async fn acquire_async(&self, wait: &Wait) -> Option<Result<Acquired>> {
        let BackendLock::Native(lock) = &self.lock else {
            return None;
        };
        let acquired = lock.acquire_async(wait, self).await;
        Some(acquired.map(|(hold, recovered)| (BackendHold::Native(hold), recovered)))
    }

    /// Acquires nothing: only a thread can wait for the backends of this system.
    #[cfg(all(feature = "tokio", not(target_os = "linux")))]
    #[allow(clippy::unused_async)] // As on Linux.
    pub(super) async fn acquire_async(&self, _: &Wait) -> Option<Result<Acquired>> {
        None
    }

    pub(super) fn release(&self, hold: BackendHold) -> Result<()> {
        match (&self.lock, hold) {
            (BackendLock::Native(lock), BackendHold::Native(hold)) => lock.release(hold),
            (BackendLock::File(lock), BackendHold::File(file)) => lock.release(file),
            _ => unreachable!("a hold belongs to the backend that made it"),
        }
    }

    /// Records `owner` as the holder of the lock.
    pub(super) fn name_holder(&self, hold: Option<&BackendHold>, owner: &Owner) {
        match (&self.lock, hold) {
            (BackendLock::Native(lock), _) => lock.name_holder(owner),
            (BackendLock::File(_), Some(BackendHold::File(file))) => {
                holder_record::record_owner(file.file(), owner)
            }
            (BackendLock::File(_), _) => {}
        }
    }
}

impl BackendHold {
    /// Returns another descriptor of the lock.
    #[cfg(unix)]
    pub(super) fn descriptor(&self) -> std::io::Result<OwnedFd> {
        match self {
            Self::Native(hold) => hold.descriptor(),
            Self::File(file) => file.copy().map(OwnedFd::from),
        }
    }
}

impl LockInfo for NamedState {
    fn describe(&self) -> String {
        match self.scope {
            Scope::User => format!("the named lock {:?}", self.name),
            Scope::Machine => format!("the machine-wide named lock {:?}", self.name),
        }
    }

    #[cfg(feature = "tracing")]
    fn label(&self) -> (&'static str, String) {
        ("named", self.name.clone())
    }

    fn holder(&self) -> Option<Owner> {
        self.owner().unwrap_or_default()
    }
}
