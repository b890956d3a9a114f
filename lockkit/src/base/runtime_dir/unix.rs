//! lockkit's own files: at fixed places, checked before use.
//!
//! Two processes with different environments must still exclude each other, so no environment variable counts. The
//! files of one user lie in their own directory, which admits no other user. The files of the whole machine lie in the
//! system's directory for all users. That directory belongs to root and is sticky. So no user removes another's files,
//! and no user can create it first and lock the others out.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

#[cfg(target_os = "linux")]
use rustix::fs::FileType;
use rustix::fs::{Mode, OFlags, RawMode, fchmod, fstat, mkdir, open as open_at};
use rustix::io::Errno;

use super::{MACHINE, Sharing};
use crate::base::error::{Error, ErrorKind, Result};
use crate::sys::failpoint::step;

/// Returns the parent of the directories of named locks. The system empties it when it starts, or removes what is old
/// and not locked. It is private to a container, which has its own names anyway.
#[cfg(not(target_vendor = "apple"))]
fn base(_: Sharing) -> io::Result<PathBuf> {
    Ok("/tmp".into())
}

/// macOS removes old files from /tmp, locked or not. The user's Darwin directory is not cleaned: the system makes it
/// for each user at its own place, whatever the environment says. Of the directories for all users that belong to root
/// and are sticky, `/Users/Shared` is not cleaned.
#[cfg(target_vendor = "apple")]
fn base(sharing: Sharing) -> io::Result<PathBuf> {
    match sharing {
        Sharing::User(_) => crate::sys::darwin::user_directory(),
        Sharing::Machine => Ok("/Users/Shared".into()),
    }
}

/// Returns the mode of lockkit's own files.
pub(crate) fn file_mode(sharing: Sharing) -> u32 {
    match sharing {
        Sharing::User(_) => 0o600,
        // The sticky bit of a file makes systemd-tmpfiles never remove it, however old it is. Other systems do not let
        // every user set it.
        Sharing::Machine if cfg!(target_os = "linux") => 0o1666,
        Sharing::Machine => 0o666,
    }
}

/// A directory that was found safe.
#[derive(Debug)]
pub(crate) struct RuntimeDir {
    pub(crate) fd: OwnedFd,
    path: PathBuf,
    sharing: Sharing,
}

impl RuntimeDir {
    /// Returns the path of lockkit's file `name`.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        match self.sharing {
            Sharing::User(_) => self.path.join(name),
            Sharing::Machine => self.path.join(format!("{MACHINE}{name}")),
        }
    }

    /// Opens lockkit's file `name` for reading and writing, or creates it. It must be a file of its own, not a link to
    /// another one.
    #[cfg(target_os = "linux")]
    pub(crate) fn open_file(&self, name: &str) -> Result<File> {
        let path = self.file(name);
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let failed = |error| Error::io("open", &path, error);
        let mode = Mode::from_raw_mode(file_mode(self.sharing) as RawMode);
        // Opening and creating are separate steps: the kernel refuses both in one step for another user's file in a
        // sticky directory.
        let file = match open_at(&path, flags, Mode::empty()) {
            Err(Errno::NOENT) => match open_at(&path, flags | OFlags::CREATE | OFlags::EXCL, mode) {
                // Another process has just created it.
                Err(Errno::EXIST) => open_at(&path, flags, Mode::empty()),
                made => made.inspect(|_| step("file made")),
            },
            opened => opened,
        }
        .map_err(failed)?;
        let found = fstat(&file).map_err(failed)?;
        if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile || found.st_nlink != 1 {
            return Err(ErrorKind::Insecure { path, problem: "it is not a plain file of its own" }.into());
        }
        // The umask removed bits at the creation, perhaps by a process that was killed then.
        if found.st_uid == effective_uid() && found.st_mode as RawMode & 0o7777 != mode.as_raw_mode() {
            fchmod(&file, mode).map_err(failed)?;
            step("mode of the file set");
        }
        Ok(File::from(file))
    }
}

/// Returns the effective user of this process.
pub(crate) fn effective_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Whether the file or directory belongs to this process's user, by its metadata. If the uid may mean several users,
/// the kernel decides: it lets only the owner set a mode, here the present one.
pub(crate) fn is_own(file: impl AsFd, found: &Metadata) -> bool {
    let mode = Mode::from_raw_mode(found.mode() as RawMode & 0o7777);
    found.uid() == effective_uid() && (is_one_user(found.uid()) || fchmod(file, mode).is_ok())
}

/// Checks the directory at the path, as [`is_own`] does.
pub(crate) fn is_own_at(path: &Path, found: &Metadata) -> bool {
    let is_it =
        |opened: &File| opened.metadata().is_ok_and(|seen| (seen.dev(), seen.ino()) == (found.dev(), found.ino()));
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

/// Returns the directory for `sharing`, if it exists, for callers that only read.
pub(crate) fn path(sharing: Sharing) -> Option<PathBuf> {
    let base = base(sharing).ok()?;
    let path = match sharing {
        Sharing::User(uid) => base.join(format!("lockkit-u{uid}")),
        Sharing::Machine => base,
    };
    path.is_dir().then_some(path)
}

/// Returns the lock name of a file in the directory, without the prefix.
pub(crate) fn name_of(file: &str, sharing: Sharing) -> Option<String> {
    match sharing {
        Sharing::User(_) => Some(file.to_owned()),
        Sharing::Machine => file.strip_prefix(MACHINE).map(str::to_owned),
    }
}

/// Opens the directory as [`open_in`] does, at the place that this system has for it.
pub(crate) fn open(sharing: Sharing) -> Result<RuntimeDir> {
    let base = base(sharing).map_err(|error| Error::io("find the directory for", "named locks", error))?;
    open_in(&base, sharing)
}

/// Opens the directory for `sharing` below `base`, and creates a user's directory if it is missing.
///
/// # Errors
/// - `ForeignOwner` if it belongs to a user that is not trusted with it.
/// - `Insecure` if others could tamper with it.
/// - `Io` if it cannot be created or opened (a symlink in the place of a user's directory is `ELOOP` or `ENOTDIR`).
pub(crate) fn open_in(base: &Path, sharing: Sharing) -> Result<RuntimeDir> {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    let (path, flags) = match sharing {
        Sharing::User(uid) => (base.join(format!("lockkit-u{uid}")), flags | OFlags::NOFOLLOW),
        Sharing::Machine => (base.to_owned(), flags),
    };
    let private = Mode::from_raw_mode(0o700);
    let fd = match (open_at(&path, flags, Mode::empty()), sharing) {
        (Err(Errno::NOENT), Sharing::User(_)) => match mkdir(&path, private) {
            Ok(()) | Err(Errno::EXIST) => {
                step("directory made");
                open_at(&path, flags, Mode::empty())
            }
            Err(error) => return Err(Error::io("create the directory", &path, error)),
        },
        (opened, _) => opened,
    }
    .map_err(|error| Error::io("open the directory", &path, error))?;
    let found = fstat(&fd).map_err(|error| Error::io("look at the directory", &path, error))?;
    let (uid, mode) = (found.st_uid, found.st_mode as RawMode & 0o7777);
    // As in `is_own`, for the user that the lock was built for.
    let is_owner = |own| uid == own && (is_one_user(own) || fchmod(&fd, Mode::from_raw_mode(mode)).is_ok());
    let (trusted, problem) = match sharing {
        Sharing::User(own) => {
            (is_owner(own), (mode & 0o077 != 0).then_some("other users have access to it; make it mode 0700"))
        }
        Sharing::Machine => {
            let removable = mode & 0o022 != 0 && mode & 0o1000 == 0;
            (uid == 0, removable.then_some("others can remove files from it; set its sticky bit"))
        }
    };
    if !trusted {
        return Err(
            ErrorKind::ForeignOwner { lock: format!("the directory {}", path.display()), uid, pid: None }.into()
        );
    }
    if let Some(problem) = problem {
        return Err(ErrorKind::Insecure { path, problem }.into());
    }
    if sharing != Sharing::Machine && mode != 0o700 {
        // The umask removed bits at the creation.
        fchmod(&fd, private).map_err(|error| Error::io("change the mode of the directory", &path, error))?;
        step("mode of the directory set");
    }
    Ok(RuntimeDir { fd, path, sharing })
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn file_whose_maker_was_killed_gets_its_mode_from_the_next_opener() {
        let base = std::env::temp_dir().join(format!("lockkit-runtime-dir-{}", std::process::id()));
        fs::create_dir_all(&base).unwrap();
        let directory = open_in(&base, Sharing::User(effective_uid())).unwrap();
        let mode = || fs::metadata(directory.file("table")).unwrap().permissions().mode() & 0o7777;
        for left in [0o644, 0o600, 0o640] {
            drop(directory.open_file("table").unwrap());
            assert_eq!(mode(), 0o600);
            fs::set_permissions(directory.file("table"), fs::Permissions::from_mode(left)).unwrap();
        }
        drop(directory.open_file("table").unwrap());
        assert_eq!(mode(), 0o600);
        fs::remove_dir_all(base).unwrap();
    }
}
