//! Information that FreeBSD gives only through its own calls.

use std::ffi::CString;
use std::mem::MaybeUninit;
use std::ptr;

/// The kernel's description of a process.
pub(crate) struct Process {
    /// Microseconds from the start of the system to the start of the process.
    pub(crate) start: u64,
    pub(crate) is_zombie: bool,
    /// The jail of the process, 0 for none.
    pub(crate) jail: u64,
}

/// Looks up the process `pid`. Returns `None` if this process may not see it.
///
/// The kernel reports the start by the wall clock as it is set now. The kernel reports the start of
/// the system by the same clock. So the difference of both does not change when the clock is set.
pub(crate) fn process(pid: i32) -> Option<Process> {
    let mut found = MaybeUninit::<libc::kinfo_proc>::uninit();
    let mut length = size_of::<libc::kinfo_proc>();
    let name = [libc::CTL_KERN, libc::KERN_PROC, libc::KERN_PROC_PID, pid];
    // SAFETY: the name has as many numbers as it says, and the call writes at most the given number
    // of bytes.
    let status = unsafe {
        let to = found.as_mut_ptr().cast();
        libc::sysctl(
            name.as_ptr(),
            name.len() as u32,
            to,
            &raw mut length,
            ptr::null(),
            0,
        )
    };
    if status != 0 || length != size_of::<libc::kinfo_proc>() {
        return None;
    }
    // SAFETY: the kernel has filled in all of it.
    let found = unsafe { found.assume_init() };
    let mut booted = libc::timeval {
        tv_sec: 0,
        tv_usec: 0,
    };
    let mut length = size_of::<libc::timeval>();
    let name = [libc::CTL_KERN, libc::KERN_BOOTTIME];
    // SAFETY: as above.
    let status = unsafe {
        let to = (&raw mut booted).cast();
        libc::sysctl(
            name.as_ptr(),
            name.len() as u32,
            to,
            &raw mut length,
            ptr::null(),
            0,
        )
    };
    let micros =
        |time: libc::timeval| i128::from(time.tv_sec) * 1_000_000 + i128::from(time.tv_usec);
    let start = u64::try_from(micros(found.ki_start) - micros(booted))
        .ok()
        .filter(|_| status == 0)?;
    Some(Process {
        start,
        is_zombie: found.ki_stat == libc::SZOMB,
        jail: u64::try_from(found.ki_jid).ok()?,
    })
}

/// Returns the id of this machine's installation.
pub(crate) fn machine() -> Option<String> {
    let name = CString::new("kern.hostuuid").ok()?;
    let mut id = [0_u8; 64];
    let mut length = id.len();
    // SAFETY: the name ends with a zero, and the call writes at most the given number of bytes.
    let status = unsafe {
        libc::sysctlbyname(
            name.as_ptr(),
            id.as_mut_ptr().cast(),
            &raw mut length,
            ptr::null(),
            0,
        )
    };
    let end = id.iter().position(|byte| *byte == 0)?;
    let text = std::str::from_utf8(&id[..end]).ok()?;
    (status == 0
        && text
            .bytes()
            .any(|byte| byte.is_ascii_hexdigit() && byte != b'0'))
    .then(|| text.to_owned())
}
