//! Where the file of a lock is, and how it is opened and created.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind as Io};
use std::path::{Path, PathBuf};

use crate::base::error::{Error, ErrorKind, Result};
use crate::sys::failpoint::step;
use crate::sys::file_id::{self, FileId};
use crate::sys::files::{self, MetadataExt, OpenOptionsExt};
use crate::sys::fork::ForkGuarded;
use crate::sys::tmpfile;

/// How often the file may appear and disappear while it is opened, before that is an error.
const MAX_OPEN_ATTEMPTS: u32 = 100;

/// Where the file is, and how it is created.
#[derive(Clone, Debug)]
pub(super) struct FileSpec {
    pub(super) path: PathBuf,
    /// The exact permissions of a file that is created here; without them 0600 less the umask.
    pub(super) mode: Option<u32>,
    /// Whether missing directories are created.
    pub(super) create_parents: bool,
    /// The directory is open to other users, which may have replaced the file by something else.
    pub(super) hardened: bool,
}

impl FileSpec {
    /// Returns whether the path still leads to the file with this identity.
    pub(super) fn leads_to(&self, id: FileId) -> Result<bool> {
        file_id::is_named(files::metadata(&self.path), |named| {
            file_id::of(named) == id
        })
        .map_err(|error| Error::io("look at", &self.path, error))
    }

    /// Opens the file, or creates it, and returns whether it was created. It never does both in one
    /// step: the kernel refuses that for another user's file in a sticky directory
    /// (`fs.protected_regular`).
    pub(super) fn open(&self) -> Result<(ForkGuarded<File>, bool)> {
        for _ in 0..MAX_OPEN_ATTEMPTS {
            match self.open_existing() {
                Err(error) if error.kind() == Io::NotFound => {}
                opened => {
                    let file = opened.map_err(|error| Error::io("open", &self.path, error))?;
                    return Ok((file, false));
                }
            }
            match self.create() {
                Err(error) if error.kind() == Io::AlreadyExists => {}
                Err(error) if error.kind() == Io::NotFound && self.create_parents => {
                    let directory = self.path.parent().unwrap_or(&self.path);
                    let created = DirBuilder::new().recursive(true).create(directory);
                    created.map_err(|error| Error::io("create the directory", directory, error))?;
                    step("directories created");
                }
                created => {
                    let file = created.map_err(|error| Error::io("create", &self.path, error))?;
                    return Ok((file, true));
                }
            }
        }
        if self.path.is_symlink() {
            let dangles = io::Error::new(
                Io::NotFound,
                "it is a symlink to a file that does not exist",
            );
            return Err(Error::io("open", &self.path, dangles));
        }
        Err(ErrorKind::RogueDeletion {
            path: self.path.clone(),
        }
        .into())
    }

    /// Creates the file. A file with an explicit mode gets it before the path names it, so that a
    /// kill never leaves a file with another mode.
    fn create(&self) -> io::Result<ForkGuarded<File>> {
        let Some(mode) = self.mode else {
            return self.create_at_path(0o600);
        };
        let directory = match self.path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            Some(_) => Path::new("."),
            None => &self.path,
        };
        let file = match ForkGuarded::new(|| tmpfile::file_in(directory, 0o600)) {
            Err(error) if error.kind() == Io::Unsupported => return self.create_in_place(mode),
            file => file?,
        };
        files::set_mode(&file, mode)?;
        step("mode of the file set");
        match tmpfile::name(&file, &self.path) {
            Err(error) if error.kind() == Io::Unsupported => self.create_in_place(mode),
            named => {
                named?;
                step("lock file named");
                // Opened again, because /proc shows no path for a descriptor that is older than the
                // name.
                self.open_existing().map_err(|error| match error.kind() {
                    // It was removed just now, as if another process had created it.
                    Io::NotFound => Io::AlreadyExists.into(),
                    _ => error,
                })
            }
        }
    }

    fn create_at_path(&self, mode: u32) -> io::Result<ForkGuarded<File>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(mode);
        let file = ForkGuarded::new(|| files::create(&options, &self.path))?;
        step("file created");
        Ok(file)
    }

    /// Creates the file like [`create`](Self::create), on a file system without nameless files.
    fn create_in_place(&self, mode: u32) -> io::Result<ForkGuarded<File>> {
        let file = self.create_at_path(mode)?;
        // The umask belongs to the program, so the mode is set here.
        if let Err(error) = files::set_mode(&file, mode) {
            let _ = std::fs::remove_file(&self.path);
            step("file with wrong mode removed");
            return Err(error);
        }
        step("mode of the file set");
        Ok(file)
    }

    /// Opens the file for writing if that is allowed, because some file systems require it for an
    /// exclusive lock. Otherwise opens it for reading.
    fn open_existing(&self) -> io::Result<ForkGuarded<File>> {
        let not_lockable = || io::Error::new(Io::InvalidInput, "neither a file nor a directory");
        // The check comes first, because the open of a FIFO or a device may have side effects.
        if std::fs::metadata(&self.path).is_ok_and(|found| !found.is_file() && !found.is_dir()) {
            return Err(not_lockable());
        }
        // A FIFO that was put there since must not block the open, and a terminal must not become
        // this process's controlling terminal.
        let flags =
            files::NONBLOCK | files::NOCTTY | if self.hardened { files::NOFOLLOW } else { 0 };
        let open = |writing| {
            let mut options = OpenOptions::new();
            options.read(true).write(writing).custom_flags(flags);
            ForkGuarded::new(|| files::open(&options, &self.path))
        };
        let file = match open(true) {
            Err(error) if may_open_read_only(error.kind()) => open(false),
            opened => opened,
        }?;
        let found = files::metadata_of(&file)?;
        // A file without a name was deleted just now, which is noticed once it is locked.
        if self.hardened && !(found.is_file() && found.nlink() <= 1) {
            return Err(io::Error::new(
                Io::InvalidInput,
                "not a plain file of its own",
            ));
        }
        match found.is_file() || found.is_dir() {
            true => Ok(file),
            false => Err(not_lockable()),
        }
    }
}

/// Rejects an invalid mode, and a mode that does not let the owner read the file.
pub(crate) fn check_mode(mode: Option<u32>) -> Result<()> {
    let problem = match mode.filter(|_| cfg!(unix)) {
        Some(mode) if mode & !0o7777 != 0 => format!("{mode:#o} is no mode"),
        Some(mode) if mode & 0o400 == 0 => {
            format!("with mode {mode:#o} the owner of the file could not read it")
        }
        _ => return Ok(()),
    };
    Err(ErrorKind::InvalidOption {
        option: "create_with_mode",
        problem,
    }
    .into())
}

/// Returns whether a file that could not be opened for writing for this reason may still be opened
/// for reading. The executable of a running program is such a file.
fn may_open_read_only(reason: Io) -> bool {
    use Io::{ExecutableFileBusy, IsADirectory, PermissionDenied, ReadOnlyFilesystem};
    matches!(
        reason,
        PermissionDenied | ReadOnlyFilesystem | IsADirectory | ExecutableFileBusy
    )
}
