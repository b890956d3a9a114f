//! Creating the file of a lease, and its directories.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind as Io};
use std::path::Path;
use std::time::Duration;

use super::file_store::{
    DEFAULT_DIRECTORY_MODE, DEFAULT_FILE_MODE, FileStore, Result, io_error_at,
};
use super::format::Record;
use super::locked::LockedPath;
use crate::base::error::{Error, StoreError};
use crate::lease::store::lease_store::Deadline;
use crate::sys::failpoint::step;
use crate::sys::files::{self, DirBuilderExt, FileExt, OpenOptionsExt};
use crate::sys::fork::ForkGuarded;
use crate::sys::tmpfile;

/// How long the creator of a file tries to get the flock. Other processes only look into such a new
/// file, but such a process may be interrupted.
const CREATION_FLOCK_TIMEOUT: Duration = Duration::from_millis(500);

impl FileStore {
    /// Creates the file with this record, complete before the path names it. Returns false if
    /// another process created the file first.
    #[cold]
    pub(super) fn create(&self, mut record: Record) -> Result<bool> {
        let directory = self.spec.path.parent().unwrap_or(&self.spec.path);
        let failed = |error| self.io_error("create", error);
        let create = || {
            ForkGuarded::new(|| {
                tmpfile::file_in(directory, self.spec.file_mode.unwrap_or(DEFAULT_FILE_MODE))
            })
        };
        let file = match create() {
            Err(error) if error.kind() == Io::NotFound => {
                self.create_directories(directory, error)?;
                create()
            }
            created => created,
        };
        let file = match file {
            Err(error) if error.kind() == Io::Unsupported => {
                return self.create_in_place(&mut record);
            }
            file => file.map_err(failed)?,
        };
        let metadata =
            files::metadata_of(&file).map_err(|error| self.io_error("inspect", error))?;
        self.record_file_system(&file, &metadata);
        self.set_mode(&file)?;
        file.write_all_at(record.seal(), 0)
            .map_err(|error| self.io_error("write", error))?;
        step("nameless file written");
        // Once in the life of a file, so that no power cut leaves an empty file. Programs that try
        // only once would find such a file held for ever.
        file.sync_data()
            .map_err(|error| self.io_error("write", error))?;
        step("nameless file synced");
        match tmpfile::name(&file, &self.spec.path) {
            Ok(()) => {
                step("file named");
                Ok(true)
            }
            Err(error) if error.kind() == Io::AlreadyExists => Ok(false),
            Err(error) if error.kind() == Io::Unsupported => self.create_in_place(&mut record),
            Err(error) => Err(failed(error)),
        }
    }

    /// Creates the file as [`create`](Self::create) does, for a file system without nameless files.
    /// Other processes may see the file empty, which counts as held for a while, also if the
    /// creator is killed at that moment.
    #[cold]
    pub(super) fn create_in_place(&self, record: &mut Record) -> Result<bool> {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .create_new(true)
            .mode(self.spec.file_mode.unwrap_or(DEFAULT_FILE_MODE));
        let file = match ForkGuarded::new(|| files::create(&options, &self.spec.path)) {
            Err(error) if error.kind() == Io::AlreadyExists => return Ok(false),
            created => created.map_err(|error| self.io_error("create", error))?,
        };
        step("file made");
        self.set_mode(&file)?;
        drop(file);
        match self.lock(Deadline::after(CREATION_FLOCK_TIMEOUT))? {
            // No process takes such a new file. Only a holder whose own record was deleted may have
            // written into it.
            LockedPath::Locked(locked) if locked.read()?.bytes.is_empty() => {
                let synced = || {
                    locked
                        .file
                        .sync_data()
                        .map_err(|error| self.io_error("write", error))
                };
                let written = locked.write(record, &[]).and_then(|()| synced());
                if written.is_err() {
                    // An empty file would count as held. While it is locked, no other process uses
                    // it.
                    let _ = fs::remove_file(&self.spec.path);
                }
                written.map(|()| true)
            }
            _ => Ok(false),
        }
    }

    /// Gives a new file its exact mode, independent of the umask.
    fn set_mode(&self, file: &File) -> Result<()> {
        let Some(mode) = self.spec.file_mode else {
            return Ok(());
        };
        files::set_mode(file, mode).map_err(|error| self.io_error("set the mode of", error))?;
        step("mode of the file set");
        Ok(())
    }

    /// Creates the missing directories down to `directory` if the caller wants that; otherwise the
    /// error is `missing`.
    fn create_directories(&self, directory: &Path, missing: io::Error) -> Result<()> {
        if !self.spec.create_parents {
            return Err(StoreError::permanent(Error::io(
                "open the directory",
                directory,
                missing,
            )));
        }
        let is_missing = |directory: &&Path| {
            files::metadata(directory).is_err_and(|error| error.kind() == Io::NotFound)
        };
        let missing: Vec<_> = directory.ancestors().take_while(is_missing).collect();
        for directory in missing.into_iter().rev() {
            match DirBuilder::new()
                .mode(self.spec.directory_mode.unwrap_or(DEFAULT_DIRECTORY_MODE))
                .create(directory)
            {
                Err(error) if error.kind() == Io::AlreadyExists => continue,
                created => created
                    .map_err(|error| io_error_at("create the directory", directory, error))?,
            }
            step("directory made");
            if let Some(mode) = self.spec.directory_mode {
                let set = files::set_directory_mode(directory, mode);
                set.map_err(|error| {
                    io_error_at("set the mode of the directory", directory, error)
                })?;
                step("mode of the directory set");
            }
        }
        Ok(())
    }
}
