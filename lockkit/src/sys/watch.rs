//! Being woken when a file changes: [inotify(7)].
//!
//! [inotify(7)]: https://man7.org/linux/man-pages/man7/inotify.7.html

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

/// A descriptor that can be read once the file at `path` has been written, cut, replaced, moved or removed from now on.
/// It sees only what this machine does to it. An error where there is no such thing, or no more of them to be had.
#[cfg(target_os = "linux")]
pub(crate) fn changes_of(path: &Path) -> io::Result<OwnedFd> {
    use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init};
    let watch = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    // A file that is removed or replaced while somebody has it open changes its link count at once (`ATTRIB`), and is
    // gone (`DELETE_SELF`) only when that one has closed it.
    let changes = WatchFlags::MODIFY | WatchFlags::ATTRIB | WatchFlags::MOVE_SELF | WatchFlags::DELETE_SELF;
    add_watch(&watch, path, changes | WatchFlags::DONT_FOLLOW)?;
    Ok(watch)
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn changes_of(_: &Path) -> io::Result<OwnedFd> {
    Err(io::ErrorKind::Unsupported.into())
}
