//! Wake-ups when a file changes: [inotify(7)].
//!
//! The kernel takes milliseconds, often more than ten, to close an inotify descriptor: it waits
//! until no code on the whole machine still looks at the removed watches. A woken waiter has no
//! time for that. So a process keeps one descriptor for its next watch, and closes only those that
//! are used in addition.
//!
//! [inotify(7)]: https://man7.org/linux/man-pages/man7/inotify.7.html

#[cfg(target_os = "linux")]
pub(crate) use linux::changes_of;

#[cfg(not(target_os = "linux"))]
pub(crate) fn changes_of(_: &std::path::Path) -> std::io::Result<super::fd::OwnedFd> {
    Err(std::io::ErrorKind::Unsupported.into())
}

#[cfg(target_os = "linux")]
mod linux {
    use std::io;
    use std::os::fd::{AsFd, BorrowedFd};
    use std::path::Path;
    use std::sync::{Mutex, PoisonError};

    use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init, remove_watch};

    use crate::sys::fork::ForkGuarded;
    use crate::sys::process_local::ProcessLocal;

    /// The descriptor for the next watch of this process: without a watch, and with nothing to
    /// read.
    static SPARE: ProcessLocal<Mutex<Option<ForkGuarded>>> = ProcessLocal::new();

    fn exchange_spare(with: Option<ForkGuarded>) -> Option<ForkGuarded> {
        let mut spare = SPARE
            .get_or_make(Mutex::default)
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut spare, with)
    }

    /// A watch on a file, until it is dropped. It is readable once the file has changed.
    pub(crate) struct Watch {
        /// Present until the drop.
        inotify: Option<ForkGuarded>,
        number: i32,
    }

    /// Returns a watch that becomes readable once the file at `path` is written, truncated,
    /// replaced, moved or removed from now on. Spurious wake-ups happen. The watch sees only
    /// changes by this machine. Fails if the system has no inotify, or no more instances are
    /// available.
    pub(crate) fn changes_of(path: &Path) -> io::Result<Watch> {
        let inotify = match exchange_spare(None) {
            Some(spare) if spare.is_own() => spare,
            _ => ForkGuarded::new(|| init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK))?
                .know()
                .keep_across_fork(),
        };
        // A file that is removed or replaced while a process has it open changes its link count at
        // once (`ATTRIB`). It is gone (`DELETE_SELF`) only when that process has closed it.
        let changes = WatchFlags::MODIFY
            | WatchFlags::ATTRIB
            | WatchFlags::MOVE_SELF
            | WatchFlags::DELETE_SELF;
        match add_watch(&*inotify, path, changes | WatchFlags::DONT_FOLLOW) {
            Ok(number) => Ok(Watch {
                inotify: Some(inotify),
                number,
            }),
            Err(error) => {
                drop(exchange_spare(Some(inotify)));
                Err(error.into())
            }
        }
    }

    impl AsFd for Watch {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.inotify
                .as_ref()
                .expect("it is not dropped yet")
                .as_fd()
        }
    }

    impl Drop for Watch {
        fn drop(&mut self) {
            let Some(inotify) = self.inotify.take().filter(ForkGuarded::is_own) else {
                return;
            };
            // It fails if the file is gone.
            let _ = remove_watch(&*inotify, self.number);
            // The removal queues an event of its own, after the changes. The read does not block.
            while rustix::io::read(&*inotify, &mut [0; 1024]).is_ok_and(|length| length > 0) {}
            drop(exchange_spare(Some(inotify)));
        }
    }

    #[cfg(test)]
    mod tests {
        use std::fs;
        use std::time::{Duration, Instant};

        use super::*;
        use crate::sys::event::{self, Woke};

        #[test]
        fn watch_reports_only_changes_since_its_start() {
            let path = std::env::temp_dir().join(format!("lockkit-watch-{}", std::process::id()));
            let is_woken = |watch: &Watch| {
                let soon = Instant::now() + Duration::from_millis(20);
                matches!(
                    event::wait(Some(watch.as_fd()), None, Some(soon)).unwrap(),
                    Woke::Ready
                )
            };
            for _ in 0..3 {
                fs::write(&path, "before").unwrap();
                let watch = changes_of(&path).unwrap();
                assert!(!is_woken(&watch));
                fs::write(&path, "now").unwrap();
                assert!(is_woken(&watch));
                drop(watch);
                let watch = changes_of(&path).unwrap();
                fs::remove_file(&path).unwrap();
                assert!(is_woken(&watch));
            }
            assert!(changes_of(&path).is_err());
        }
    }
}
