//! A small file system in memory, for the cases of a full or read-only disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::{left_out, succeeds, until};

/// A small file system in memory. Dropping it unmounts it.
pub struct SmallDisk(TempDir);

impl SmallDisk {
    /// Mounts the file system with these options of mount(8). Returns `None`, and reports the
    /// reason, where this machine does not allow it.
    pub fn mount(options: &str) -> Option<Self> {
        let directory = tempfile::tempdir().expect("a directory");
        let mut mount = Command::new("mount");
        if succeeds(
            mount
                .args(["-t", "tmpfs", "-o", options, "lockkit-test"])
                .arg(directory.path()),
        ) {
            return Some(Self(directory));
        }
        left_out("this machine does not let the test mount a small file system");
        None
    }

    /// Returns the path of its root directory.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    fn filler(&self) -> PathBuf {
        self.path().join("filler")
    }

    /// Fills the file system completely.
    pub fn fill(&self) {
        let error =
            fs::write(self.filler(), vec![0; 1 << 20]).expect_err("the file system is small");
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    }

    /// Ends a [`fill`](Self::fill).
    pub fn make_room(&self) {
        fs::remove_file(self.filler()).expect("the file system is full");
    }

    /// Remounts the file system read-only (`ro`) or writable (`rw`). No process may be writing at
    /// that moment.
    pub fn remount(&self, option: &str) {
        let mut mount = Command::new("mount");
        mount
            .arg("-o")
            .arg(format!("remount,{option}"))
            .arg(self.path());
        until("the file system is remounted", || succeeds(&mut mount));
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        assert!(
            succeeds(Command::new("umount").arg("-l").arg(self.path())),
            "cannot unmount {}",
            self.path().display()
        );
    }
}
