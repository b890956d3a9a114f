//! Extended attributes of a file: [xattr(7)].
//!
//! [xattr(7)]: https://man7.org/linux/man-pages/man7/xattr.7.html

use std::fs::File;
use std::io;

/// Reads the attribute `name`, if the file has it and it fits into `buffer`. Returns `None` if the file has none,
/// or a longer one, or if the file system has no attributes.
#[cfg(any(target_os = "linux", target_vendor = "apple"))]
pub(crate) fn get<'b>(file: &File, name: &str, buffer: &'b mut [u8]) -> io::Result<Option<&'b [u8]>> {
    use rustix::io::Errno;
    #[cfg(target_os = "linux")]
    const ABSENT: Errno = Errno::NODATA;
    #[cfg(not(target_os = "linux"))]
    const ABSENT: Errno = Errno::from_raw_os_error(libc::ENOATTR);
    match rustix::fs::fgetxattr(file, name, &mut *buffer) {
        Ok(length) => Ok(buffer.get(..length)),
        Err(ABSENT | Errno::OPNOTSUPP | Errno::NOSYS | Errno::RANGE) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Sets the attribute `name` of the file, or replaces it.
#[cfg(any(target_os = "linux", target_vendor = "apple"))]
pub(crate) fn set(file: &File, name: &str, value: &[u8]) -> io::Result<()> {
    rustix::fs::fsetxattr(file, name, value, rustix::fs::XattrFlags::empty())?;
    crate::sys::failpoint::step("attribute set");
    Ok(())
}

#[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
pub(crate) fn get<'b>(_: &File, _: &str, _: &'b mut [u8]) -> io::Result<Option<&'b [u8]>> {
    Ok(None)
}

#[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
pub(crate) fn set(_: &File, _: &str, _: &[u8]) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
