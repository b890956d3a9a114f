//! Files that have no name at first, so that a file is complete before it becomes visible:
//! `O_TMPFILE` of [open(2)].
//!
//! [open(2)]: https://man7.org/linux/man-pages/man2/open.2.html

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, open};
use rustix::io::Errno;

use super::failpoint::step;

/// Creates a file without a name on the file system of `directory`, with `mode` less the umask. If
/// the system cannot do that, the error is of the kind `Unsupported`.
pub(crate) fn file_in(directory: &Path, mode: u32) -> io::Result<File> {
    match open(
        directory,
        OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC,
        Mode::from_raw_mode(mode),
    ) {
        // The last two are the errors of systems that do not know the flag.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
            Err(io::ErrorKind::Unsupported.into())
        }
        opened => {
            let file = opened?.into();
            step("nameless file made");
            Ok(file)
        }
    }
}

/// Names the file, unless the name exists. Without /proc, which this needs, the error is of the
/// kind `Unsupported`.
pub(crate) fn name(file: &File, path: &Path) -> io::Result<()> {
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    match linkat(CWD, &link, CWD, path, AtFlags::SYMLINK_FOLLOW) {
        Err(Errno::NOENT | Errno::XDEV | Errno::PERM) => Err(io::ErrorKind::Unsupported.into()),
        named => Ok(named?),
    }
}

/// Whether the file is on a file system in memory, which is empty when the system starts.
pub(crate) fn is_in_memory(file: &File) -> bool {
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    rustix::fs::fstatfs(file).is_ok_and(|system| system.f_type as u64 == TMPFS_MAGIC)
}
