//! Opening the file of a lease, and the checks of the file.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind as Io;
use std::sync::atomic::Ordering;

use super::file_store::{FileStore, Result};
use crate::base::error::{Error, ErrorKind, StoreError};
use crate::base::runtime_dir;
use crate::sys::file_id;
use crate::sys::files::{self, Metadata, MetadataExt, OpenOptionsExt};
use crate::sys::fork::ForkGuarded;

/// The purpose of an open.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To hold the lease. The file must not belong to another user, because that user could take it
    /// back at any time.
    Hold,
    /// To free the lease, which root may do for any user.
    Free,
}

impl FileStore {
    /// Opens the file that the path names, if there is one.
    pub(super) fn open(&self) -> Result<Option<ForkGuarded<File>>> {
        self.check_path()?;
        // Non-blocking, so that a FIFO does not block the call; and a terminal must not become this
        // process's own.
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .custom_flags(files::NOFOLLOW | files::NONBLOCK | files::NOCTTY);
        match ForkGuarded::new(|| files::open(&options, &self.spec.path)) {
            Err(error) if error.kind() == Io::NotFound => Ok(None),
            Err(error) if files::is_symlink_refused(&error) => Err(self.link_error()),
            opened => opened
                .map(Some)
                .map_err(|error| self.io_error("open", error)),
        }
    }

    pub(super) fn open_for_reading(&self) -> Result<Option<File>> {
        self.check_path()?;
        let mut options = OpenOptions::new();
        options
            .read(true)
            .custom_flags(files::NOFOLLOW | files::NONBLOCK | files::NOCTTY);
        match files::open(&options, &self.spec.path) {
            Err(error) if error.kind() == Io::NotFound => Ok(None),
            Err(error) if files::is_symlink_refused(&error) => Err(self.link_error()),
            opened => {
                let file = opened.map_err(|error| self.io_error("open", error))?;
                let metadata = self.check(&file)?;
                self.record_file_system(&file, &metadata);
                Ok(Some(file))
            }
        }
    }

    /// Checks the type of the file before the first open, because opening a device can have side
    /// effects.
    fn check_path(&self) -> Result<()> {
        if self.device.load(Ordering::Relaxed) != 0 {
            return Ok(());
        }
        match files::symlink_metadata(&self.spec.path) {
            Err(error) if error.kind() == Io::NotFound => Ok(()),
            metadata => self.check_type(&metadata.map_err(|error| self.io_error("open", error))?),
        }
    }

    /// Returns the metadata of the file, if the file may be written to.
    pub(super) fn check_writable(&self, file: &File, purpose: Purpose) -> Result<Metadata> {
        let metadata = self.check(file)?;
        // A lease is shared if both its file and this caller's mode let the same class of users
        // write.
        let is_shared =
            files::group_other_write_bits(&metadata) & self.spec.file_mode.unwrap_or_default() != 0;
        let may_free = || purpose == Purpose::Free && runtime_dir::effective_uid() == 0;
        if metadata.uid() != 0 && !is_shared && !runtime_dir::is_own(file, &metadata) && !may_free()
        {
            let lock = format!("the lease {}", self.spec.path.display());
            return Err(StoreError::permanent(Error::from(
                ErrorKind::ForeignOwner {
                    lock,
                    uid: metadata.uid(),
                    pid: None,
                },
            )));
        }
        self.record_file_system(file, &metadata);
        Ok(metadata)
    }

    /// Returns the metadata of the file, if it is a plain file without other names.
    fn check(&self, file: &File) -> Result<Metadata> {
        let metadata = files::metadata_of(file).map_err(|error| self.io_error("inspect", error))?;
        self.check_type(&metadata)?;
        Ok(metadata)
    }

    fn check_type(&self, metadata: &Metadata) -> Result<()> {
        if metadata.is_symlink() {
            return Err(self.link_error());
        }
        if !metadata.is_file() {
            return Err(self.insecure_error("it is not a plain file"));
        }
        if metadata.nlink() > 1 {
            return Err(self.insecure_error("it is a hard link to a file that has other names"));
        }
        Ok(())
    }

    /// Returns whether the path names the file with this metadata.
    pub(super) fn is_path_of(&self, metadata: &Metadata) -> Result<bool> {
        let named = files::symlink_metadata(&self.spec.path);
        file_id::is_named(named, |named| file_id::of(named) == file_id::of(metadata))
            .map_err(|error| self.io_error("inspect", error))
    }

    /// Records the file system of the file. For a new file system, checks whether it is this
    /// machine's own.
    pub(super) fn record_file_system(&self, file: &File, metadata: &Metadata) {
        if self.device.load(Ordering::Relaxed) != metadata.dev() {
            self.is_remote.store(!is_local(file), Ordering::Relaxed);
            self.device.store(metadata.dev(), Ordering::Relaxed);
        }
    }
}

/// Returns whether the file is on a file system of this machine. An unknown file system is not.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(super) fn is_local(file: &File) -> bool {
    /// tmpfs, ramfs, ext2 to 4, xfs, btrfs, overlayfs, zfs, f2fs, bcachefs, jfs, fat, exfat: the
    /// numbers of [statfs(2)].
    ///
    /// [statfs(2)]: https://man7.org/linux/man-pages/man2/statfs.2.html
    const LOCAL: [u64; 12] = [
        0x0102_1994,
        0x8584_58f6,
        0xef53,
        0x5846_5342,
        0x9123_683e,
        0x794c_7630,
        0x2fc1_2fc1,
        0xf2f5_2010,
        0xca45_1a4e,
        0x3153_464a,
        0x4d44,
        0x2011_bab0,
    ];
    // The type of `f_type` differs between systems, and its sign.
    rustix::fs::fstatfs(file)
        .is_ok_and(|found| LOCAL.contains(&(found.f_type as u64 & 0xffff_ffff)))
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(super) fn is_local(file: &File) -> bool {
    files::is_local(file)
}
