//! The guard of a named lock.

#[cfg(unix)]
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::backend::{Acquired, BackendHold, NamedState};
#[cfg(doc)]
use super::options::Scope;
#[cfg(unix)]
use crate::base::error::Error;
use crate::base::error::Result;
use crate::base::guard::{Guard, Recovered};
use crate::base::owner::Owner;
use crate::base::telemetry;
use crate::sys::fork::ProcessId;

/// A held [`NamedLock`](crate::NamedLock); dropping it releases.
///
/// A forked child's copy of a guard holds nothing: the lock stays with the parent.
#[must_use = "a guard that is dropped at once releases its lock at once; bind it to a name such as `_guard`"]
#[derive(Debug)]
pub struct NamedGuard {
    state: Arc<NamedState>,
    /// `None` after the release.
    hold: Option<BackendHold>,
    recovered: Option<Box<Recovered>>,
    /// Identifies the process that holds the lock, because a forked child has a copy of the guard.
    process: ProcessId,
}

impl NamedGuard {
    pub(super) fn new(state: &Arc<NamedState>, (hold, recovered): Acquired) -> Self {
        Self {
            state: state.clone(),
            hold: Some(hold),
            recovered,
            process: ProcessId::current(),
        }
    }

    /// Releases the lock now and returns any failure.
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io) if the program has closed the descriptor, and so released the
    /// lock earlier. With the file backend also if the kernel refuses to unlock; the lock is
    /// released all the same.
    pub fn release(mut self) -> Result<()> {
        self.release_once()
    }

    /// Returns a report if the previous owner died while it held the lock. The report names that
    /// owner, where it is known.
    ///
    /// The file backend keeps the record in the lock file. It reports every death, with the owner,
    /// except for one between the start of the machine and the first lock, or after the file was
    /// deleted.
    ///
    /// The socket backend keeps the record in memory, below `/dev/shm`, or below `/tmp` where that
    /// cannot be used. It reports every death, with the owner, as long as these conditions hold:
    /// - Both processes see the same directory.
    /// - The table of records is not deleted (systemd does that at a user's last logout, with
    ///   `RemoveIPC`).
    /// - The records of thousands of other dead holders have not made room for new ones.
    ///
    /// A process that cannot open the record reports no death, and its own death is not reported.
    /// This happens when another user has occupied both directories, or without a free file
    /// descriptor. With [`Scope::Machine`] all users can write the record, so it may be wrong.
    pub fn recovered(&self) -> Option<&Recovered> {
        self.recovered.as_deref()
    }

    /// Records another process as the holder, for a supervisor that acquires the lock for a child.
    /// [`owner`](crate::NamedLock::owner) then returns that process. The guard stays here, and
    /// dropping it releases as before.
    ///
    /// ```no_run
    /// # use lockkit::{NamedLock, Owner};
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let guard = NamedLock::new("com.example.supervised")?.try_lock()?;
    /// let mut child = std::process::Command::new("server").spawn()?;
    /// if let Some(server) = Owner::of(child.id()) {
    ///     guard.name_holder(&server);
    /// }
    /// child.wait()?;
    /// # Ok(()) }
    /// ```
    pub fn name_holder(&self, owner: &Owner) {
        self.state.name_holder(self.hold.as_ref(), owner);
    }

    /// Returns another descriptor of the lock, close-on-exec, which a forked child keeps. No other
    /// process can acquire the lock as long as such a descriptor is open, even if this process is
    /// killed. Close all copies before the guard is released: a release cannot close them, and the
    /// lock stays held.
    ///
    /// ```
    /// use lockkit::NamedLock;
    /// # fn main() -> lockkit::Result<()> {
    /// let guard = NamedLock::new("lockkit-doc-descriptor")?.lock()?;
    /// let for_a_child = guard.descriptor()?;
    /// drop(for_a_child);
    /// guard.release()?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io) without a free file descriptor.
    #[cfg(unix)]
    pub fn descriptor(&self) -> Result<OwnedFd> {
        let copy = match &self.hold {
            Some(hold) => hold.descriptor(),
            None => unreachable!("only the release takes the hold, and ends the guard"),
        };
        copy.map_err(|error| Error::io("copy the descriptor of", &self.state.name, error))
    }

    fn release_once(&mut self) -> Result<()> {
        let Some(hold) = self.hold.take() else {
            return Ok(());
        };
        if !self.process.is_current() {
            return Ok(());
        }
        let released = self.state.release(hold);
        telemetry::released(&*self.state);
        released
    }
}

impl Guard for NamedGuard {
    fn release(self) -> Result<()> {
        self.release()
    }

    fn recovered(&self) -> Option<&Recovered> {
        self.recovered()
    }
}

impl Drop for NamedGuard {
    fn drop(&mut self) {
        // Closing the descriptor also releases, so a failure here leaves nothing locked.
        let _ = self.release_once();
    }
}
