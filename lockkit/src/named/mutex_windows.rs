//! Named locks on Windows: a named mutex.
//!
//! A mutex belongs to the thread that acquired it, but a guard can move to another thread. So each
//! hold has its own thread, which acquires the mutex, sleeps, and releases it. The thread also does
//! the waiting, on the mutex, the cancel event and the limit; if the waiter gives up, its thread
//! ends. The kernel wakes waiters, mostly first come, first served. It gives a waiter the mutex of
//! a dead thread, with the result `WAIT_ABANDONED`. When no process has the mutex open, the mutex
//! is deleted, and the report of a death is lost. So the record ([`holder_record`]) is in a file,
//! and reports a death in any case.

use std::fs::File;
use std::os::windows::io::AsHandle;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, OnceLock};
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

use super::options::Backend;
use crate::base::cancel::CancelToken;
use crate::base::error::{Error, Result};
use crate::base::guard::Recovered;
use crate::base::holder_record::{self, RecordStorage};
use crate::base::lock_info::LockInfo;
use crate::base::owner::{Liveness, Owner};
use crate::base::runtime_dir::{self, Sharing};
use crate::base::wait::{Wait, WaitError};
use crate::sys::event::{self, Event};
use crate::sys::failpoint::step;
use crate::sys::mutex::{self, Acquired, Mutex};

/// The backend that [`Backend::Auto`] selects.
pub(super) const NATIVE: Backend = Backend::Mutex;
pub(super) type NativeLock = MutexLock;
pub(super) type NativeHold = MutexHold;

#[derive(Debug)]
pub(super) struct MutexLock {
    name: String,
    sharing: Sharing,
    record: OnceLock<File>,
}

/// The held mutex: its thread sleeps until it has to release the mutex.
pub(super) struct MutexHold {
    release_event: Arc<Event>,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

impl std::fmt::Debug for MutexHold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MutexHold").finish_non_exhaustive()
    }
}

impl MutexHold {
    /// Releases the mutex, and returns when that is done.
    fn release(&mut self) -> std::io::Result<()> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        self.release_event.set();
        thread
            .join()
            .unwrap_or_else(|_| Err(std::io::Error::other("its thread panicked")))
    }
}

impl Drop for MutexHold {
    fn drop(&mut self) {
        // On a failure the thread has ended, and with it the hold.
        let _ = self.release();
    }
}

impl MutexLock {
    pub(super) fn new(name: &str, sharing: Sharing) -> Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            sharing,
            record: OnceLock::new(),
        })
    }

    pub(super) fn acquire(
        &self,
        wait: &Wait,
        info: &dyn LockInfo,
    ) -> Result<(MutexHold, Option<Box<Recovered>>)> {
        wait.check(info)?;
        // A first attempt: only a held mutex needs the wait state and the cancel event.
        let (mut acquired, mut hold) = self.start_hold(None, Some(Instant::now()))?;
        if acquired == Acquired::TimedOut {
            let Some(wait_state) = wait.state_for(info) else {
                return Err(info.held());
            };
            (acquired, hold) = self.start_hold(wait_state.token().cloned(), wait_state.until())?;
            match acquired {
                Acquired::Free | Acquired::Abandoned => {}
                Acquired::TimedOut => return Err(wait_state.error(WaitError::TimedOut, info)),
                Acquired::Cancelled => return Err(wait_state.error(WaitError::Cancelled, info)),
            }
        }
        step("mutex acquired");
        let recovered = self.record().and_then(holder_record::record_current);
        // A dead holder may have died before it wrote its record, or may have had no record to
        // write to.
        let unknown = || (acquired == Acquired::Abandoned).then(|| Box::new(Recovered::new(None)));
        Ok((hold, recovered.or_else(unknown)))
    }

    /// Starts a thread that acquires the mutex and holds it, if it succeeds.
    fn start_hold(
        &self,
        cancel: Option<CancelToken>,
        until: Option<Instant>,
    ) -> Result<(Acquired, MutexHold)> {
        let object = mutex::object(&self.name, self.sharing)
            .map_err(|error| Error::io("name", &self.name, error))?;
        let mutex = Mutex::open(&object, self.sharing)
            .map_err(|error| Error::io("open", &object, error))?;
        let failed = |action, error| Error::io(action, &object, error);
        let release_event =
            Arc::new(Event::new().map_err(|error| failed("create an event for", error))?);
        // Reports a failure to create the cancel event here. The thread then gets the same event.
        cancel.as_ref().map(CancelToken::event).transpose()?;
        let (sender, receiver) = sync_channel(1);
        let hold_mutex = {
            let release_event = release_event.clone();
            move || {
                let cancel = cancel.as_ref().and_then(|token| token.event().ok());
                let acquired = mutex.acquire(cancel.map(|event| event.as_handle()), until);
                let is_held = matches!(acquired, Ok(Acquired::Free | Acquired::Abandoned));
                // The receiver always waits for this message.
                let _ = sender.send(acquired);
                if !is_held {
                    return Ok(());
                }
                event::wait(Some(release_event.as_handle()), None, None)?;
                let released = mutex.release();
                step("mutex released");
                released
            }
        };
        let thread = Builder::new()
            .name("lockkit-named".into())
            .spawn(hold_mutex);
        let thread = thread.map_err(|error| failed("start a thread for", error))?;
        let hold = MutexHold {
            release_event,
            thread: Some(thread),
        };
        let acquired = receiver
            .recv()
            .unwrap_or_else(|_| Err(std::io::Error::other("its thread panicked")));
        Ok((acquired.map_err(|error| failed("wait for", error))?, hold))
    }

    pub(super) fn release(&self, mut hold: MutexHold) -> Result<()> {
        if let Some(record) = self.record() {
            record.clear();
            step("record cleared");
        }
        hold.release()
            .map_err(|error| Error::io("release", &self.name, error))
    }

    /// Records `owner` as the holder of the lock.
    pub(super) fn name_holder(&self, owner: &Owner) {
        if let Some(record) = self.record() {
            holder_record::record_owner(record, owner);
        }
    }

    /// Returns whether a record names a live holder.
    pub(super) fn is_held(&self) -> Result<bool> {
        Ok(self.live_owner().is_some())
    }

    /// Returns 0: the kernel does not report the waiters.
    #[allow(clippy::unused_self)] // As in the other backends.
    pub(super) fn waiters(&self) -> Result<u32> {
        Ok(0)
    }

    pub(super) fn owner(&self) -> Result<Option<Owner>> {
        Ok(self.live_owner())
    }

    fn live_owner(&self) -> Option<Owner> {
        let path = runtime_dir::path(self.sharing)
            .map(|_| runtime_dir::open(self.sharing).ok())??
            .file(&record_of(&self.name));
        let owner = holder_record::holder(&File::open(path).ok()?)?;
        (owner.liveness_by_name() != Liveness::Dead).then_some(owner)
    }

    /// Returns the names of the locks that are held now according to their records. Creates
    /// nothing.
    pub(super) fn list(sharing: Sharing) -> Result<Vec<(String, Option<Owner>, u32)>> {
        let Some(directory) = runtime_dir::path(sharing) else {
            return Ok(Vec::new());
        };
        let held = |entry: std::io::Result<std::fs::DirEntry>| {
            let file = entry.ok()?.file_name().into_string().ok()?;
            let name = runtime_dir::name_of(&file, sharing)?
                .strip_suffix(".record")?
                .to_owned();
            let owner = Self::new(&name, sharing).ok()?.live_owner()?;
            Some((name, Some(owner), 0))
        };
        Ok(std::fs::read_dir(directory)
            .into_iter()
            .flatten()
            .filter_map(held)
            .collect())
    }

    /// Returns the record once it could be opened. A failed attempt is repeated, because its cause
    /// may be temporary.
    fn record(&self) -> Option<&File> {
        match self.record.get() {
            None => {
                let directory = runtime_dir::open(self.sharing).ok()?;
                let record = directory.open_file(&record_of(&self.name)).ok()?;
                Some(self.record.get_or_init(|| record))
            }
            opened => opened,
        }
    }
}

fn record_of(name: &str) -> String {
    format!("{name}.record")
}

#[cfg(test)]
mod tests {
    use crate::NamedLock;

    use super::*;

    #[test]
    fn abandoned_mutex_without_record_reports_unknown_owner() {
        let name = format!("lockkit-test-{}-abandoned", std::process::id());
        let sharing = Sharing::User(0);
        let object = mutex::object(&name, sharing).unwrap();
        // The kernel remembers that the mutex was abandoned as long as a handle to it is open.
        let _open = Mutex::open(&object, sharing).unwrap();
        std::thread::scope(|scope| {
            let holder = scope.spawn(|| {
                Mutex::open(&object, sharing)
                    .unwrap()
                    .acquire(None, None)
                    .unwrap()
            });
            // Joins until the thread has ended, and not only its closure.
            assert_eq!(holder.join().unwrap(), Acquired::Free);
        });
        let lock = NamedLock::new(&name).unwrap();
        let guard = lock.try_lock().unwrap();
        assert!(
            guard
                .recovered()
                .is_some_and(|recovered| recovered.owner().is_none())
        );
        guard.release().unwrap();
        assert!(lock.try_lock().unwrap().recovered().is_none());
    }
}
