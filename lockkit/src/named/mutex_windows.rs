//! Named locks on Windows: a named mutex.
//!
//! A mutex belongs to the thread that acquired it, but a guard can move to another thread. So each hold has its own
//! thread, which acquires the mutex, sleeps, and releases it. The thread also does the waiting, on the mutex, the
//! cancel event and the limit; if the waiter gives up, its thread ends. The kernel wakes waiters, mostly first come,
//! first served. It gives a waiter the mutex of a dead thread, with the result `WAIT_ABANDONED`. When no process has
//! the mutex open, the mutex is deleted, and the report of a death is lost. So the record ([`holder_record`]) is in a
//! file, and reports a death in any case.

use std::fs::File;
use std::os::windows::io::AsHandle;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, OnceLock};
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

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

#[derive(Debug)]
pub(super) struct MutexLock {
    name: String,
    sharing: Sharing,
    record: OnceLock<File>,
}

/// The held mutex: its thread sleeps until it has to release the mutex.
pub(super) struct Hold {
    give_back: Arc<Event>,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

impl std::fmt::Debug for Hold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hold").finish_non_exhaustive()
    }
}

impl Hold {
    /// Releases the mutex, and returns when that is done.
    fn end(&mut self) -> std::io::Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        self.give_back.set();
        thread.join().unwrap_or_else(|_| Err(std::io::Error::other("its thread panicked")))
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // On a failure the thread has ended, and with it the hold.
        let _ = self.end();
    }
}

impl MutexLock {
    pub(super) fn new(name: &str, sharing: Sharing) -> Self {
        Self { name: name.to_owned(), sharing, record: OnceLock::new() }
    }

    pub(super) fn acquire(&self, wait: &Wait, subject: &dyn LockInfo) -> Result<(Hold, Option<Box<Recovered>>)> {
        wait.check(subject)?;
        // A first attempt: only a held mutex needs the wait state and the cancel event.
        let (mut taken, mut hold) = self.take(None, Some(Instant::now()))?;
        if taken == Acquired::TimedOut {
            let Some(patience) = wait.state_for(subject) else { return Err(subject.held()) };
            let cancel = patience.token().map(CancelToken::event).transpose()?;
            (taken, hold) = self.take(cancel, patience.until())?;
            match taken {
                Acquired::Free | Acquired::Abandoned => {}
                Acquired::TimedOut => return Err(patience.error(WaitError::TimedOut, subject)),
                Acquired::Cancelled => return Err(patience.error(WaitError::Cancelled, subject)),
            }
        }
        step("mutex acquired");
        let recovered = self.record().and_then(holder_record::take);
        // A dead holder may have died before it wrote its record, or may have had no record to write to.
        let somebody = || (taken == Acquired::Abandoned).then(|| Box::new(Recovered::new(None)));
        Ok((hold, recovered.or_else(somebody)))
    }

    /// Starts a thread that acquires the mutex and holds it, if it succeeds.
    fn take(&self, cancel: Option<Arc<Event>>, until: Option<Instant>) -> Result<(Acquired, Hold)> {
        let object = mutex::object(&self.name, self.sharing).map_err(|error| Error::io("name", &self.name, error))?;
        let mutex = Mutex::open(&object, self.sharing).map_err(|error| Error::io("open", &object, error))?;
        let failed = |action, error| Error::io(action, &object, error);
        let give_back = Arc::new(Event::new().map_err(|error| failed("create an event for", error))?);
        let (tell, told) = sync_channel(1);
        let keep = {
            let give_back = give_back.clone();
            move || {
                let taken = mutex.take(cancel.as_ref().map(|cancel| cancel.as_handle()), until);
                let holds = matches!(taken, Ok(Acquired::Free | Acquired::Abandoned));
                // The receiver always waits for this message.
                let _ = tell.send(taken);
                if !holds {
                    return Ok(());
                }
                event::wait(Some(give_back.as_handle()), None, None)?;
                let given_back = mutex.give_back();
                step("mutex released");
                given_back
            }
        };
        let thread = Builder::new().name("lockkit-named".into()).spawn(keep);
        let thread = thread.map_err(|error| failed("start a thread for", error))?;
        let hold = Hold { give_back, thread: Some(thread) };
        let taken = told.recv().unwrap_or_else(|_| Err(std::io::Error::other("its thread panicked")));
        Ok((taken.map_err(|error| failed("wait for", error))?, hold))
    }

    pub(super) fn release(&self, mut hold: Hold) -> Result<()> {
        if let Some(record) = self.record() {
            record.clear();
            step("record cleared");
        }
        hold.end().map_err(|error| Error::io("give back", &self.name, error))
    }

    /// Records `owner` as the holder of the lock.
    pub(super) fn name_holder(&self, owner: &Owner) {
        if let Some(record) = self.record() {
            holder_record::name(record, owner);
        }
    }

    pub(super) fn owner(&self) -> Option<Owner> {
        let path = runtime_dir::path(self.sharing)
            .map(|_| runtime_dir::open(self.sharing).ok())??
            .file(&record_of(&self.name));
        let owner = holder_record::holder(&File::open(path).ok()?)?;
        (owner.liveness_by_name() != Liveness::Dead).then_some(owner)
    }

    /// Returns the names of the locks that are held now according to their records. Creates nothing.
    pub(super) fn list(sharing: Sharing) -> Vec<(String, Option<Owner>, u32)> {
        let Some(directory) = runtime_dir::path(sharing) else { return Vec::new() };
        let held = |entry: std::io::Result<std::fs::DirEntry>| {
            let file = entry.ok()?.file_name().into_string().ok()?;
            let name = runtime_dir::name_of(&file, sharing)?.strip_suffix(".record")?.to_owned();
            Self::new(&name, sharing).owner().map(|owner| (name, Some(owner), 0))
        };
        std::fs::read_dir(directory).into_iter().flatten().filter_map(held).collect()
    }

    /// Returns the record once it could be opened. A failed attempt is repeated, because its cause may be temporary.
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
            let holder = scope.spawn(|| Mutex::open(&object, sharing).unwrap().take(None, None).unwrap());
            // Joins until the thread has ended, and not only its closure.
            assert_eq!(holder.join().unwrap(), Acquired::Free);
        });
        let lock = NamedLock::new(&name).unwrap();
        let guard = lock.try_lock().unwrap();
        assert!(guard.recovered().is_some_and(|recovered| recovered.owner().is_none()));
        guard.release().unwrap();
        assert!(lock.try_lock().unwrap().recovered().is_none());
    }
}
