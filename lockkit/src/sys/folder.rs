//! The folders that hold lockkit's own files: at fixed places, checked before use.
//!
//! Two processes that disagree about an environment variable must still exclude each other, so no variable has a say.
//! A folder of one user lets nobody else in. The folder of the whole machine is open to all, with the sticky bit, so
//! that nobody removes another's files; it must belong to root or to the caller, for its owner could.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, RawMode, fchmod, fstat, mkdir, open, openat};
use rustix::io::Errno;

use crate::error::{Error, ErrorKind, Result};
use crate::steps::step;

/// Where the folders of named locks stand. Emptied when the system starts, or cleaned of what is old and not locked;
/// private to a container, which has its own names anyway.
pub(crate) const BASE: &str = "/tmp";

/// Who shares a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Sharing {
    /// The processes of one user, given by its effective uid.
    User(u32),
    /// Everybody on the machine.
    Machine,
}

impl Sharing {
    fn mode(self) -> RawMode {
        match self {
            Self::User(_) => 0o700,
            Self::Machine => 0o1777,
        }
    }

    /// The mode of the files inside.
    pub(crate) fn file_mode(self) -> RawMode {
        match self {
            Self::User(_) => 0o600,
            Self::Machine => 0o666,
        }
    }
}

/// A folder that was found safe, and its path.
#[derive(Debug)]
pub(crate) struct Folder {
    pub(crate) fd: OwnedFd,
    pub(crate) path: PathBuf,
}

impl Folder {
    /// Opens the file `name` for reading and writing, or makes it: one of its own, not a link to something else.
    pub(crate) fn open_file(&self, name: &str, sharing: Sharing) -> Result<File> {
        let path = self.path.join(name);
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let failed = |error| Error::io("open", &path, error);
        let mode = Mode::from_raw_mode(sharing.file_mode());
        // Never opened and made in one step, which the kernel refuses for another user's file in a sticky folder.
        let file = match openat(&self.fd, name, flags, Mode::empty()) {
            Err(Errno::NOENT) => match openat(&self.fd, name, flags | OFlags::CREATE | OFlags::EXCL, mode) {
                // Made by somebody else just now.
                Err(Errno::EXIST) => openat(&self.fd, name, flags, Mode::empty()),
                // The umask is not ours to change, but the file's mode is.
                Ok(file) => {
                    step("file made");
                    fchmod(&file, mode).map(|()| file)
                }
                failed => failed,
            },
            opened => opened,
        }
        .map_err(failed)?;
        let found = fstat(&file).map_err(failed)?;
        match FileType::from_raw_mode(found.st_mode) == FileType::RegularFile && found.st_nlink == 1 {
            true => Ok(File::from(file)),
            false => Err(ErrorKind::Insecure { path, problem: "it is not a plain file of its own" }.into()),
        }
    }
}

/// The effective user of this process.
pub(crate) fn effective_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Opens lockkit's folder for `sharing` below `base`, making it where it is missing.
///
/// # Errors
/// `ForeignOwner` when it belongs to somebody who is not trusted with it, `Insecure` when others could tamper with it,
/// `Io` when it cannot be made or opened (a symlink in its place is `ELOOP` or `ENOTDIR`).
pub(crate) fn open_in(base: &str, sharing: Sharing) -> Result<Folder> {
    let base = Path::new(base);
    let path = match sharing {
        Sharing::User(uid) => base.join(format!("lockkit-u{uid}")),
        Sharing::Machine => base.join("lockkit-machine"),
    };
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
    let fd = match open(&path, flags, Mode::empty()) {
        Err(Errno::NOENT) => {
            match mkdir(&path, Mode::from_raw_mode(sharing.mode())) {
                Ok(()) | Err(Errno::EXIST) => step("folder made"),
                Err(error) => return Err(Error::io("create the folder", &path, error)),
            }
            open(&path, flags, Mode::empty())
        }
        opened => opened,
    }
    .map_err(|error| Error::io("open the folder", &path, error))?;
    let found = fstat(&fd).map_err(|error| Error::io("look at the folder", &path, error))?;
    let (uid, mode) = (found.st_uid, found.st_mode as RawMode & 0o7777);
    let trusted = uid == effective_uid() || (sharing == Sharing::Machine && uid == 0);
    if !trusted {
        return Err(ErrorKind::ForeignOwner { lock: format!("the folder {}", path.display()), uid, pid: None }.into());
    }
    if mode == sharing.mode() {
        return Ok(Folder { fd, path });
    }
    // The umask took bits away when the folder was made; only its owner can mend that, and only a user's own folder
    // is never too open to begin with.
    match sharing {
        Sharing::User(_) if mode & 0o077 != 0 => {
            Err(ErrorKind::Insecure { path, problem: "other users have access to it; make it mode 0700" }.into())
        }
        Sharing::Machine if mode & 0o1000 == 0 && mode & 0o022 != 0 => {
            Err(ErrorKind::Insecure { path, problem: "others can remove files from it; make it mode 1777" }.into())
        }
        _ if uid == effective_uid() => {
            fchmod(&fd, Mode::from_raw_mode(sharing.mode()))
                .map_err(|error| Error::io("change the mode of the folder", &path, error))?;
            Ok(Folder { fd, path })
        }
        _ => Ok(Folder { fd, path }),
    }
}
