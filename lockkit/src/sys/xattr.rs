//! Extended attributes of a file: [xattr(7)].
//!
//! [xattr(7)]: https://man7.org/linux/man-pages/man7/xattr.7.html

use std::fs::File;
use std::io;

use rustix::fs::{XattrFlags, fgetxattr, fsetxattr};
use rustix::io::Errno;

use super::failpoint::step;

/// The error for a file without the attribute.
#[cfg(target_os = "linux")]
const ABSENT: Errno = Errno::NODATA;
#[cfg(not(target_os = "linux"))]
const ABSENT: Errno = Errno::from_raw_os_error(libc::ENOATTR);

/// Reads the attribute `name`, if the file has it and it fits into `buffer`. Returns `None` if the
/// file has none, or a longer one, or if the file system has no attributes.
pub(crate) fn get<'b>(
    file: &File,
    name: &str,
    buffer: &'b mut [u8],
) -> io::Result<Option<&'b [u8]>> {
    match fgetxattr(file, name, &mut *buffer) {
        Ok(length) => Ok(buffer.get(..length)),
        Err(ABSENT | Errno::OPNOTSUPP | Errno::NOSYS | Errno::RANGE) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Sets the attribute `name` of the file, or replaces it.
pub(crate) fn set(file: &File, name: &str, value: &[u8]) -> io::Result<()> {
    fsetxattr(file, name, value, XattrFlags::empty())?;
    step("attribute set");
    Ok(())
}
