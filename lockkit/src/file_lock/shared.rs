//! What all handles on one lock share, and the acquisition.

use std::fs::File;

use super::open_file::OpenFile;
use super::recheck::{MAX_COMPARISON_AGE, RECHECK_WINDOW};
use super::spec::{FileSpec, check_mode};
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::lock_info::LockInfo;
use crate::base::owner::Owner;
use crate::base::wait::{Backoff, Wait, WaitState};
use crate::sys::atomic_box::AtomicBox;
use crate::sys::clock::nanos;
use crate::sys::failpoint::step;
use crate::sys::flock::{self, Mode};
use crate::sys::fork::ProcessId;
use crate::sys::{file_id, files};

/// How often a file may be replaced under an acquisition before that is an error. Processes that
/// contend for a freed numbered lock each remove its file; the limit is far above the number of
/// such replacements.
const MAX_REPLACEMENTS: u32 = 10_000;

/// What the clones of a handle share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) spec: FileSpec,
    /// An open file that an earlier acquisition used.
    pub(super) spare: AtomicBox<OpenFile>,
}

impl LockInfo for Shared {
    fn describe(&self) -> String {
        format!("the lock on {}", self.spec.path.display())
    }

    #[cfg(feature = "tracing")]
    fn label(&self) -> (&'static str, String) {
        ("file", self.spec.path.display().to_string())
    }

    /// Always `None`: the kernel does not name the holder.
    fn holder(&self) -> Option<Owner> {
        None
    }
}

impl Shared {
    pub(super) fn acquire(
        &self,
        mode: Mode,
        wait: &Wait,
        subject: &dyn LockInfo,
    ) -> Result<Box<OpenFile>> {
        wait.check(subject)?;
        let mut wait_state = None;
        for _ in 0..MAX_REPLACEMENTS {
            let mut open = match self.spare.take() {
                Some(open)
                    if open.process.is_current()
                        && open.is_own(nanos(), OpenFile::IDLE_DIVISOR) =>
                {
                    open
                }
                _ => self.open()?,
            };
            let is_new = std::mem::take(&mut open.is_new);
            if let Err(error) = self.lock(&open.file, mode, wait, &mut wait_state, subject) {
                if is_new {
                    self.remove_if_unlockable(&open, &error);
                }
                return Err(error);
            }
            let now = nanos();
            open.used_at = now;
            let previous = std::mem::replace(&mut open.held_at, now);
            let since = |moment| now.wrapping_sub(moment);
            if RECHECK_WINDOW.covers(since(previous))
                && since(open.compared_at) < MAX_COMPARISON_AGE
                && !self.spec.hardened
            {
                return Ok(open);
            }
            // The descriptor may have been closed during a wait.
            if self.spec.leads_to(open.id)? && (wait_state.is_none() || open.file.is_own()) {
                let compared = nanos();
                // A time that includes a wait does not show how fast this process is.
                if previous != 0 && wait_state.is_none() {
                    RECHECK_WINDOW.add_sample(compared.wrapping_sub(previous));
                }
                (open.compared_at, open.used_at, open.held_at) = (now, compared, compared);
                return Ok(open);
            }
        }
        Err(ErrorKind::RogueDeletion {
            path: self.spec.path.clone(),
        }
        .into())
    }

    /// Removes a new file after this error. On a file system without flock no process can hold the
    /// lock, and the file serves no purpose. After any other error another process may hold it.
    #[cold]
    fn remove_if_unlockable(&self, open: &OpenFile, error: &Error) {
        let cannot_lock = match error.kind() {
            ErrorKind::Io {
                action: "lock",
                source,
                ..
            } => flock::is_unsupported(source),
            _ => false,
        };
        if cannot_lock && self.spec.leads_to(open.id).unwrap_or(false) {
            let _ = std::fs::remove_file(&self.spec.path);
            step("file without flock removed");
        }
    }

    fn open(&self) -> Result<Box<OpenFile>> {
        let process = ProcessId::current();
        check_mode(self.spec.mode)?;
        let (file, is_new) = self.spec.open()?;
        let found = files::metadata_of(&file)
            .map_err(|error| Error::io("look at", &self.spec.path, error))?;
        let id = file_id::of(&found);
        let file = file.know_as(id);
        Ok(Box::new(OpenFile {
            file,
            id,
            process,
            is_new,
            compared_at: 0,
            used_at: 0,
            held_at: 0,
        }))
    }

    /// Locks the open file. `wait_state` is shared by all the files that the path names during the
    /// acquisition.
    fn lock(
        &self,
        file: &File,
        mode: Mode,
        wait: &Wait,
        wait_state: &mut Option<WaitState>,
        subject: &dyn LockInfo,
    ) -> Result<()> {
        let failed = |error| Error::io("lock", &self.spec.path, error);
        if flock::try_lock(file, mode).map_err(failed)? {
            return Ok(());
        }
        if wait_state.is_none() {
            *wait_state = wait.state_for(subject);
        }
        let Some(wait_state) = wait_state else {
            return Err(subject.held());
        };
        if wait_state.is_endless() {
            return flock::lock(file, mode).map_err(failed);
        }
        let mut backoff = Backoff::new();
        loop {
            if let Err(ended) = wait_state.sleep(backoff.next())? {
                return Err(wait_state.error(ended, subject));
            }
            if flock::try_lock(file, mode).map_err(failed)? {
                return Ok(());
            }
        }
    }
}
