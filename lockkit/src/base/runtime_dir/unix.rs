//! The directories on Unix.
//!
//! The files of one user lie in their own directory, which admits no other user. The files of the
//! whole machine lie in the system's directory for all users. That directory belongs to root and is
//! sticky. So no user removes another's files, and no user can create it first and lock the others
//! out.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, RawMode, fchmod, fstat, mkdir, open as open_at};
use rustix::io::Errno;

use crate::base::error::{Error, ErrorKind, Result};
use crate::sys::failpoint::step;
use crate::sys::file_id;
use crate::sys::sharing::Sharing;

/// Returns the parent of the directories of named locks. The system empties it when it starts, or
/// removes what is old and not locked. It is private to a container, which has its own names
/// anyway.
#[cfg(not(target_vendor = "apple"))]
pub(super) fn base(_: Sharing) -> io::Result<PathBuf> {
    Ok("/tmp".into())
}

/// macOS removes old files from /tmp, locked or not. The user's Darwin directory is not cleaned:
/// the system makes it for each user at its own path, whatever the environment says. Of the
/// directories for all users that belong to root and are sticky, `/Users/Shared` is not cleaned.
#[cfg(target_vendor = "apple")]
pub(super) fn base(sharing: Sharing) -> io::Result<PathBuf> {
    match sharing {
        Sharing::User(_) => crate::sys::darwin::user_directory(),
        Sharing::Machine => Ok("/Users/Shared".into()),
    }
}

/// Returns the mode of lockkit's own files.
pub(crate) fn file_mode(sharing: Sharing) -> u32 {
    match sharing {
        Sharing::User(_) => 0o600,
        // The sticky bit of a file makes systemd-tmpfiles never remove it, however old it is. Other
        // systems do not let every user set it.
        Sharing::Machine if cfg!(target_os = "linux") => 0o1666,
        Sharing::Machine => 0o666,
    }
}

/// Nothing precedes the name of a file in the directory of one user.
pub(super) const USER_PREFIX: &str = "";

/// Returns the form of a lock's name in a file name: the name itself.
pub(super) fn encode(name: &str) -> String {
    name.to_owned()
}

/// Returns the lock name with this form.
#[allow(clippy::unnecessary_wraps)] // On Windows not every file name is such a form.
pub(super) fn decode(name: &str) -> Option<String> {
    Some(name.to_owned())
}

/// Opens a file for reading and writing, or creates it. Does not follow a symbolic link.
#[cfg(target_os = "linux")]
pub(super) fn open_or_create(path: &Path, sharing: Sharing) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let mode = Mode::from_raw_mode(file_mode(sharing) as RawMode);
    // Opening and creating are separate steps: the kernel refuses both in one step for another
    // user's file in a sticky directory.
    let file = match open_at(path, flags, Mode::empty()) {
        Err(Errno::NOENT) => match open_at(path, flags | OFlags::CREATE | OFlags::EXCL, mode) {
            // Another process has just created it.
            Err(Errno::EXIST) => open_at(path, flags, Mode::empty()),
            created => created.inspect(|_| step("file made")),
        },
        opened => opened,
    };
    Ok(File::from(file?))
}

/// Sets the mode again if the umask removed bits at the creation, perhaps by a process that was
/// killed then.
#[cfg(target_os = "linux")]
pub(super) fn repair_mode(file: &File, found: &Metadata, sharing: Sharing) -> io::Result<()> {
    let mode = file_mode(sharing);
    if found.uid() == effective_uid() && found.mode() & 0o7777 != mode {
        fchmod(file, Mode::from_raw_mode(mode as RawMode))?;
        step("mode of the file set");
    }
    Ok(())
}

/// Returns the effective user of this process.
pub(crate) fn effective_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Whether the file or directory belongs to this process's user, by its metadata. If the uid may
/// mean several users, the kernel decides: it lets only the owner set a mode, here the present one.
pub(crate) fn is_own(file: impl AsFd, found: &Metadata) -> bool {
    let mode = Mode::from_raw_mode(found.mode() as RawMode & 0o7777);
    found.uid() == effective_uid() && (is_one_user(found.uid()) || fchmod(file, mode).is_ok())
}

/// Checks the directory at the path, as [`is_own`] does.
pub(crate) fn is_own_at(path: &Path, found: &Metadata) -> bool {
    let is_it = |opened: &File| {
        opened
            .metadata()
            .is_ok_and(|seen| file_id::of(&seen) == file_id::of(found))
    };
    match is_one_user(found.uid()) {
        true => found.uid() == effective_uid(),
        false => File::open(path).is_ok_and(|opened| is_it(&opened) && is_own(&opened, found)),
    }
}

#[cfg(target_os = "linux")]
use crate::sys::user::is_one as is_one_user;

/// Only Linux has user namespaces.
#[cfg(not(target_os = "linux"))]
fn is_one_user(_: u32) -> bool {
    true
}

/// Returns the directory for `sharing` below `base`.
pub(super) fn directory(base: &Path, sharing: Sharing) -> PathBuf {
    match sharing {
        Sharing::User(uid) => base.join(format!("lockkit-u{uid}")),
        Sharing::Machine => base.to_owned(),
    }
}

/// Opens the directory, and creates a user's directory if it is missing. Checks the owner and the
/// mode.
pub(super) fn open_directory(path: &Path, sharing: Sharing) -> Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    let flags = if sharing == Sharing::Machine {
        flags
    } else {
        flags | OFlags::NOFOLLOW
    };
    let private = Mode::from_raw_mode(0o700);
    let fd = match (open_at(path, flags, Mode::empty()), sharing) {
        (Err(Errno::NOENT), Sharing::User(_)) => match mkdir(path, private) {
            Ok(()) | Err(Errno::EXIST) => {
                step("directory made");
                open_at(path, flags, Mode::empty())
            }
            Err(error) => return Err(Error::io("create the directory", path, error)),
        },
        (opened, _) => opened,
    }
    .map_err(|error| Error::io("open the directory", path, error))?;
    check_directory(&fd, path, sharing)?;
    Ok(fd)
}

/// Checks that other users cannot tamper with the directory, and that its owner is trusted with it.
fn check_directory(fd: &OwnedFd, path: &Path, sharing: Sharing) -> Result<()> {
    let found = fstat(fd).map_err(|error| Error::io("inspect the directory", path, error))?;
    let (uid, mode) = (found.st_uid, found.st_mode as RawMode & 0o7777);
    // As in `is_own`, for the user that the lock was built for.
    let is_owner =
        |own| uid == own && (is_one_user(own) || fchmod(fd, Mode::from_raw_mode(mode)).is_ok());
    let (trusted, problem) = match sharing {
        Sharing::User(own) => (
            is_owner(own),
            (mode & 0o077 != 0).then_some("other users have access to it; make it mode 0700"),
        ),
        Sharing::Machine => {
            let removable = mode & 0o022 != 0 && mode & 0o1000 == 0;
            (
                uid == 0,
                removable.then_some("others can remove files from it; set its sticky bit"),
            )
        }
    };
    if !trusted {
        return Err(ErrorKind::ForeignOwner {
            lock: format!("the directory {}", path.display()),
            uid,
            pid: None,
        }
        .into());
    }
    if let Some(problem) = problem {
        return Err(ErrorKind::Insecure {
            path: path.to_owned(),
            problem,
        }
        .into());
    }
    if sharing != Sharing::Machine && mode != 0o700 {
        // The umask removed bits at the creation.
        fchmod(fd, Mode::from_raw_mode(0o700))
            .map_err(|error| Error::io("change the mode of the directory", path, error))?;
        step("mode of the directory set");
    }
    Ok(())
}
