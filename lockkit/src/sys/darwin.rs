//! Information that macOS and its relatives give only through their own calls.

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::ptr;
use std::time::Duration;

/// Returns the directory that the system makes for the files of each user: `DARWIN_USER_DIR` of
/// [confstr(3)]. No environment variable moves it, and no process cleans it.
///
/// [confstr(3)]: https://developer.apple.com/library/archive/documentation/System/Conceptual/ManPages_iPhoneOS/man3/confstr.3.html
pub(crate) fn user_directory() -> io::Result<PathBuf> {
    let mut path = [0_u8; libc::PATH_MAX as usize];
    // SAFETY: the call writes at most the given number of bytes, including the zero.
    let length = unsafe {
        libc::confstr(
            libc::_CS_DARWIN_USER_DIR,
            path.as_mut_ptr().cast(),
            path.len(),
        )
    };
    match CStr::from_bytes_until_nul(&path) {
        Ok(path) if (1..=libc::PATH_MAX as usize).contains(&length) => {
            Ok(OsStr::from_bytes(path.to_bytes()).into())
        }
        _ => Err(io::Error::other(
            "confstr(3) does not report DARWIN_USER_DIR",
        )),
    }
}

/// Returns the identity of this boot: a UUID that the kernel makes when it starts.
pub(crate) fn boot_session() -> Option<u128> {
    let text = sysctl("kern.bootsessionuuid")?;
    let text = std::str::from_utf8(&text).ok()?.trim_end_matches('\0');
    u128::from_str_radix(&text.replace('-', ""), 16).ok()
}

/// Returns the id of this machine: the id of its hardware, if the system reports one.
pub(crate) fn machine() -> Option<String> {
    let mut id = [0_u8; 16];
    let wait = libc::timespec {
        tv_sec: 1,
        tv_nsec: 0,
    };
    // SAFETY: writes the 16 bytes of a UUID, and reads the time.
    let status = unsafe { libc::gethostuuid(id.as_mut_ptr(), &raw const wait) };
    (status == 0 && id != [0; 16]).then(|| format!("{:032x}", u128::from_be_bytes(id)))
}

fn sysctl(name: &str) -> Option<Vec<u8>> {
    let name = CString::new(name).ok()?;
    let mut value = vec![0_u8; 128];
    let mut length = value.len();
    // SAFETY: the name ends with a zero, and the call writes at most the given number of bytes.
    let status = unsafe {
        libc::sysctlbyname(
            name.as_ptr(),
            value.as_mut_ptr().cast(),
            &raw mut length,
            ptr::null_mut(),
            0,
        )
    };
    value.truncate(length);
    (status == 0).then_some(value)
}

/// Returns the time since the machine started, including the time asleep: `CLOCK_MONOTONIC_RAW`,
/// which is `mach_continuous_time`. Unlike `CLOCK_MONOTONIC` in earlier versions, setting the clock
/// does not move it.
pub(crate) fn time_since_start() -> Duration {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the call writes the time to the given address. It does not fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_RAW, &raw mut now) };
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}
