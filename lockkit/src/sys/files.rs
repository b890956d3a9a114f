//! The operations on files that differ between systems, under common names.
//!
//! Here they come from the standard library's Unix extensions. Windows lacks half of them
//! (`windows/files.rs`).

pub(crate) use std::fs::Metadata;
pub(crate) use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, RawMode, fchmod};
use rustix::io::Errno;

/// For `custom_flags`: does not follow a symbolic link.
pub(crate) const NOFOLLOW: i32 = OFlags::NOFOLLOW.bits() as i32;
/// For `custom_flags`: does not wait for the other end of a FIFO.
pub(crate) const NONBLOCK: i32 = OFlags::NONBLOCK.bits() as i32;
/// For `custom_flags`: does not make a terminal the controlling terminal of this process.
pub(crate) const NOCTTY: i32 = OFlags::NOCTTY.bits() as i32;

/// Opens an existing file.
pub(crate) fn open(options: &OpenOptions, path: &Path) -> io::Result<File> {
    options.open(path)
}

/// Creates a file; `options` must request that.
pub(crate) fn create(options: &OpenOptions, path: &Path) -> io::Result<File> {
    options.open(path)
}

/// Returns the metadata of the open file.
pub(crate) fn metadata_of(file: &File) -> io::Result<Metadata> {
    file.metadata()
}

/// Returns the metadata of the file that the path leads to.
pub(crate) fn metadata(path: &Path) -> io::Result<Metadata> {
    fs::metadata(path)
}

/// Returns the metadata of the path itself, which may be a symbolic link.
pub(crate) fn symlink_metadata(path: &Path) -> io::Result<Metadata> {
    fs::symlink_metadata(path)
}

/// Sets exactly this mode on the file, whatever the umask is.
pub(crate) fn set_mode(file: &File, mode: u32) -> io::Result<()> {
    Ok(fchmod(file, Mode::from_raw_mode(mode as RawMode))?)
}

/// Returns the permissions of the file.
pub(crate) fn mode_of(file: &File) -> io::Result<u32> {
    Ok(metadata_of(file)?.mode() & 0o777)
}

/// Returns the part of `mode` that a file gets if this process creates it now: `mode` less the
/// umask. This assumes a file system of which nothing else is known. Reading the umask sets it, so
/// another thread may create a file in the meantime that others cannot read.
pub(crate) fn new_file_mode(mode: u32) -> u32 {
    use parking_lot::Mutex;
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _no_fork = super::fork::NoFork::hold();
    let _one = ONE_AT_A_TIME.lock();
    let umask = rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    rustix::process::umask(umask);
    mode & !(umask.as_raw_mode() as u32)
}

/// Checks whether this process may remove a file like `found` from the directory, as far as
/// permissions show.
pub(crate) fn check_removable(directory: &Path, found: &Metadata) -> io::Result<()> {
    use rustix::fs::{Access, AtFlags, CWD, accessat};
    accessat(
        CWD,
        directory,
        Access::WRITE_OK | Access::EXEC_OK,
        AtFlags::EACCESS,
    )?;
    let parent = metadata(directory)?;
    let user = rustix::process::geteuid().as_raw();
    // In a sticky directory only these users may remove the file (`EPERM`).
    let is_sticky = parent.mode() & 0o1000 != 0;
    match !is_sticky || [0, found.uid(), parent.uid()].contains(&user) {
        true => Ok(()),
        false => Err(Errno::PERM.into()),
    }
}

/// Renames the file at `from` to `to`, which must not exist: `AlreadyExists` otherwise, on systems
/// that can check this.
pub(crate) fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(any(target_os = "linux", target_vendor = "apple"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            // The file system or the kernel has no such call.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
            renamed => return Ok(renamed?),
        }
    }
    fs::rename(from, to)
}

/// Whether the file belongs to the user of this process.
pub(crate) fn is_owned_by_user(found: &Metadata) -> bool {
    found.uid() == rustix::process::geteuid().as_raw()
}

/// Sets the mode of a directory, as [`set_mode`] does.
pub(crate) fn set_directory_mode(path: &Path, mode: u32) -> io::Result<()> {
    fs::set_permissions(path, Permissions::from_mode(mode))
}

/// Whether the mode of the directory lets its group or others write to it, so that this process may
/// not trust it.
pub(crate) fn is_writable_by_others(directory: &Metadata) -> bool {
    directory.mode() & 0o022 != 0
}

/// Returns the permission bits that let the group and others write to the file.
pub(crate) fn group_other_write_bits(found: &Metadata) -> u32 {
    found.mode() & 0o022
}

/// Whether the error is due to a name that the file system cannot store.
// `ErrorKind::InvalidFilename` would say so, but is newer than lockkit's oldest supported compiler.
pub(crate) fn is_name_too_long(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::NAMETOOLONG)
}

/// Whether opening failed because the path is a symbolic link that must not be followed. POSIX
/// specifies `ELOOP`; FreeBSD and NetBSD use other errnos.
pub(crate) fn is_symlink_refused(error: &io::Error) -> bool {
    #[cfg(target_os = "netbsd")]
    const NOT_FOLLOWED: i32 = libc::EFTYPE;
    #[cfg(not(target_os = "netbsd"))]
    const NOT_FOLLOWED: i32 = libc::EMLINK;
    matches!(error.raw_os_error(), Some(libc::ELOOP | NOT_FOLLOWED))
}

/// Whether the file is on a local file system, as the system reports.
#[cfg(any(target_vendor = "apple", target_os = "freebsd"))]
#[allow(clippy::unnecessary_cast)] // The types differ from system to system.
pub(crate) fn is_local(file: &File) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|found| found.f_flags as u64 & libc::MNT_LOCAL as u64 != 0)
}

/// The other systems do not report it.
#[cfg(not(any(
    target_os = "linux",
    target_os = "android",
    target_vendor = "apple",
    target_os = "freebsd"
)))]
pub(crate) fn is_local(_: &File) -> bool {
    false
}

/// Returns the path in the decoded path of a `file:` URL.
pub(crate) fn path_of_url(path: Vec<u8>) -> Option<PathBuf> {
    Some(OsString::from_vec(path).into())
}
