//! Files that have no name at first, so that one can be complete before anybody sees it: `O_TMPFILE` of [open(2)].
//!
//! [open(2)]: https://man7.org/linux/man-pages/man2/open.2.html

use std::fs::File;
use std::io;
use std::path::Path;

#[cfg(target_os = "linux")]
use crate::failpoint::step;

/// Makes a file without a name on the file system of `directory`, with `mode` less the umask. Where there is no such
/// thing the error is of the kind `Unsupported`.
#[cfg(target_os = "linux")]
pub(crate) fn file_in(directory: &Path, mode: u32) -> io::Result<File> {
    use rustix::fs::{Mode, OFlags, open};
    use rustix::io::Errno;
    match open(directory, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::from_raw_mode(mode)) {
        // The last two are what systems say that do not know the flag.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => Err(io::ErrorKind::Unsupported.into()),
        made => {
            let file = made?.into();
            step("nameless file made");
            Ok(file)
        }
    }
}

/// Names it, unless something has that name. Where /proc is not there to do it through, the error is of the kind
/// `Unsupported`.
#[cfg(target_os = "linux")]
pub(crate) fn name(file: &File, path: &Path) -> io::Result<()> {
    use rustix::fs::{AtFlags, CWD, linkat};
    use rustix::io::Errno;
    use std::os::fd::AsRawFd;
    let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
    match linkat(CWD, &unnamed, CWD, path, AtFlags::SYMLINK_FOLLOW) {
        Err(Errno::NOENT | Errno::XDEV | Errno::PERM) => Err(io::ErrorKind::Unsupported.into()),
        named => Ok(named?),
    }
}

/// Whether it is on a file system in memory, which is empty when the system starts.
#[cfg(target_os = "linux")]
pub(crate) fn is_in_memory(file: &File) -> bool {
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    rustix::fs::fstatfs(file).is_ok_and(|system| system.f_type as u64 == TMPFS_MAGIC)
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn file_in(directory: &Path, _: u32) -> io::Result<File> {
    // A directory that is not there is told first, as where there is such a thing.
    directory.metadata()?;
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn name(_: &File, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn is_in_memory(_: &File) -> bool {
    false
}
