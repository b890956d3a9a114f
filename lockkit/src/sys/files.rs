//! What of opening, making and looking at files differs between systems, by one set of names.
//!
//! Here they are the standard library's for Unix; Windows has none for half of it (`windows/files.rs`).

pub(crate) use std::fs::Metadata as Seen;
pub(crate) use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, RawMode, fchmod};
use rustix::io::Errno;

/// For `custom_flags`: a link is not followed.
pub(crate) const NOFOLLOW: i32 = OFlags::NOFOLLOW.bits() as i32;
/// For `custom_flags`: no FIFO keeps the call waiting for its other end.
pub(crate) const NONBLOCK: i32 = OFlags::NONBLOCK.bits() as i32;
/// For `custom_flags`: no terminal becomes this process's.
pub(crate) const NOCTTY: i32 = OFlags::NOCTTY.bits() as i32;

/// Opens a file that is there.
pub(crate) fn open(options: &OpenOptions, path: &Path) -> io::Result<File> {
    options.open(path)
}

/// Makes a file, with `options` that say so.
pub(crate) fn create(options: &OpenOptions, path: &Path) -> io::Result<File> {
    options.open(path)
}

/// What the open file is.
pub(crate) fn look(file: &File) -> io::Result<Seen> {
    file.metadata()
}

/// What the path leads to.
pub(crate) fn look_at(path: &Path) -> io::Result<Seen> {
    fs::metadata(path)
}

/// What stands at the path itself, perhaps a link.
pub(crate) fn look_at_link(path: &Path) -> io::Result<Seen> {
    fs::symlink_metadata(path)
}

/// Gives the file exactly this mode, whatever the umask is.
pub(crate) fn set_mode(file: &File, mode: u32) -> io::Result<()> {
    Ok(fchmod(file, Mode::from_raw_mode(mode as RawMode))?)
}

/// The permissions of the file.
pub(crate) fn mode_of(file: &File) -> io::Result<u32> {
    Ok(look(file)?.mode() & 0o777)
}

/// What is left of `mode` in a file that this process creates now on a file system of which nothing else is known: less
/// the umask. Reading the umask sets it, so another thread may create a file that others cannot read meanwhile.
pub(crate) fn mode_of_new(mode: u32) -> u32 {
    use parking_lot::Mutex;
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _no_fork = super::fork::NoFork::hold();
    let _one = ONE_AT_A_TIME.lock();
    let umask = rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    rustix::process::umask(umask);
    mode & !(umask.as_raw_mode() as u32)
}

/// Whether this process may remove a file like `found` from the directory, as far as permissions tell.
pub(crate) fn check_removable(directory: &Path, found: &Seen) -> io::Result<()> {
    use rustix::fs::{Access, AtFlags, CWD, accessat};
    accessat(CWD, directory, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS)?;
    let parent = look_at(directory)?;
    let me = rustix::process::geteuid().as_raw();
    // In a sticky directory only these may (`EPERM`).
    let is_sticky = parent.mode() & 0o1000 != 0;
    match !is_sticky || [0, found.uid(), parent.uid()].contains(&me) {
        true => Ok(()),
        false => Err(Errno::PERM.into()),
    }
}

/// Gives the file at `from` the name `to`, which no file has: `AlreadyExists` otherwise, on systems that can tell.
pub(crate) fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(any(target_os = "linux", target_vendor = "apple"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            // The file system, or the kernel, has no such call.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
            renamed => return Ok(renamed?),
        }
    }
    fs::rename(from, to)
}

/// Whether the file belongs to the user of this process.
pub(crate) fn is_own(found: &Seen) -> bool {
    found.uid() == rustix::process::geteuid().as_raw()
}

/// As [`set_mode`], for a directory.
pub(crate) fn set_directory_mode(path: &Path, mode: u32) -> io::Result<()> {
    fs::set_permissions(path, Permissions::from_mode(mode))
}

/// Why the directory, whose owner is this `uid`, may not be trusted by this process.
pub(crate) fn is_writable_by_others(directory: &Seen) -> bool {
    directory.mode() & 0o022 != 0
}

/// The permission bits that let the group and others write to the file.
pub(crate) fn group_other_write_bits(found: &Seen) -> u32 {
    found.mode() & 0o022
}

/// Whether the error comes of a name that the file system cannot have.
// `ErrorKind::InvalidFilename` says so, but is younger than the oldest compiler that lockkit is for.
pub(crate) fn is_name_too_long(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::NAMETOOLONG)
}

/// Whether opening failed because a link stands there that is not to be followed. POSIX says `ELOOP`; FreeBSD and
/// NetBSD have words of their own.
pub(crate) fn is_of_a_link(error: &io::Error) -> bool {
    #[cfg(target_os = "netbsd")]
    const NOT_FOLLOWED: i32 = libc::EFTYPE;
    #[cfg(not(target_os = "netbsd"))]
    const NOT_FOLLOWED: i32 = libc::EMLINK;
    matches!(error.raw_os_error(), Some(libc::ELOOP | NOT_FOLLOWED))
}

/// Whether the file is on a file system of this machine's own, as the system has it.
#[cfg(any(target_vendor = "apple", target_os = "freebsd"))]
#[allow(clippy::unnecessary_cast)] // The types differ from system to system.
pub(crate) fn is_local(file: &File) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|found| found.f_flags as u64 & libc::MNT_LOCAL as u64 != 0)
}

/// Nothing is known of the others.
#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple", target_os = "freebsd")))]
pub(crate) fn is_local(_: &File) -> bool {
    false
}

/// The path that a `file:` URL names, decoded.
pub(crate) fn path_of_url(path: Vec<u8>) -> Option<PathBuf> {
    Some(OsString::from_vec(path).into())
}
