//! Other users, for tests that run as root.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::{kill_pid, left_out, until};

/// Returns a user that exists in no other test, for tests that need another user. Returns `None`,
/// and reports the reason, where this process may not act as others. Dropping it removes the files
/// that lockkit made for that user.
pub fn another_user() -> Option<AnotherUser> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    if !rustix::process::geteuid().is_root() {
        left_out("only root can act as another user");
        return None;
    }
    let uid = 1_000_000 + std::process::id() * 100 + COUNT.fetch_add(1, Ordering::Relaxed);
    Some(AnotherUser { uid })
}

/// See [`another_user`].
#[derive(Debug)]
pub struct AnotherUser {
    /// Its uid.
    pub uid: u32,
}

impl AnotherUser {
    /// Returns the directories that lockkit uses for this user: that of the file backend, and that
    /// of the records in memory.
    pub fn directories(&self) -> [PathBuf; 2] {
        ["/tmp", "/dev/shm"].map(|base| PathBuf::from(format!("{base}/lockkit-u{}", self.uid)))
    }
}

impl Drop for AnotherUser {
    fn drop(&mut self) {
        // An actor that lived on could create them again.
        let is_its_own =
            |entry: &std::fs::DirEntry| entry.metadata().is_ok_and(|found| found.uid() == self.uid);
        let pids = || {
            let entries = std::fs::read_dir("/proc")
                .into_iter()
                .flatten()
                .flatten()
                .filter(is_its_own);
            entries
                .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
                .collect::<Vec<_>>()
        };
        let is_dead = |pid: &u32| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            status.is_empty() || status.contains("State:\tZ")
        };
        let pids = pids();
        pids.iter().for_each(|pid| kill_pid(*pid));
        until("the processes of the user have ended", || {
            pids.iter().all(is_dead)
        });
        for directory in self.directories() {
            let _ =
                std::fs::remove_dir_all(&directory).or_else(|_| std::fs::remove_file(&directory));
        }
    }
}
