//! Whole-file locks, over `LockFileEx`.
//!
//! Windows locks ranges of bytes, and lets no other handle read or write a locked range. So lockkit
//! locks one byte that no file reaches, and the content stays readable. Another program that locks
//! the whole file excludes lockkit and is excluded.
//!
//! A lock belongs to the handle, which no child inherits, and ends with it. All handles here are
//! for synchronous use: with a handle for overlapped use the calls would return before they are
//! done.

use std::fs::File;
use std::io;
use std::os::windows::io::AsRawHandle;

use windows_sys::Win32::Foundation::{
    ERROR_INVALID_FUNCTION, ERROR_IO_PENDING, ERROR_LOCK_VIOLATION, ERROR_NOT_SUPPORTED,
};
use windows_sys::Win32::Storage::FileSystem::{
    LOCKFILE_EXCLUSIVE_LOCK, LOCKFILE_FAIL_IMMEDIATELY, LockFileEx, UnlockFileEx,
};
use windows_sys::Win32::System::IO::{OVERLAPPED, OVERLAPPED_0, OVERLAPPED_0_0};
use windows_sys::core::BOOL;

use crate::sys::failpoint::step;

/// How much a lock on a file excludes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Allows other shared locks.
    Shared,
    /// Allows no other lock.
    Exclusive,
}

/// The offset of the locked byte. It is half of the largest offset, so that no code mistakes it for
/// a negative one.
const LOCKED_BYTE: u64 = 1 << 62;

/// Acquires the lock. Waits in the kernel without a limit.
pub(crate) fn lock(file: &File, mode: Mode) -> io::Result<()> {
    call(file, mode, 0)
}

/// Acquires the lock if it is free. Returns whether it was.
pub(crate) fn try_lock(file: &File, mode: Mode) -> io::Result<bool> {
    match call(file, mode, LOCKFILE_FAIL_IMMEDIATELY) {
        Ok(()) => Ok(true),
        Err(error) if is_contended(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Releases the lock.
pub(crate) fn unlock(file: &File) -> io::Result<()> {
    let mut range = locked_byte();
    // SAFETY: the handle is open as long as `file` is, and for synchronous use, so `range` is read
    // during the call only.
    let done = unsafe { UnlockFileEx(file.as_raw_handle(), 0, 1, 0, &raw mut range) };
    to_result(done)
}

/// Whether the error says that the file system has no locks at all, so that no process can hold one
/// on the file.
pub(crate) fn is_unsupported(error: &io::Error) -> bool {
    let code = error.raw_os_error().map(|code| code as u32);
    matches!(code, Some(ERROR_INVALID_FUNCTION | ERROR_NOT_SUPPORTED))
}

fn call(file: &File, mode: Mode, flags: u32) -> io::Result<()> {
    let flags = flags
        | if mode == Mode::Exclusive {
            LOCKFILE_EXCLUSIVE_LOCK
        } else {
            0
        };
    let mut range = locked_byte();
    // SAFETY: as in `unlock`.
    let done = unsafe { LockFileEx(file.as_raw_handle(), flags, 0, 1, 0, &raw mut range) };
    to_result(done)
}

fn to_result(done: BOOL) -> io::Result<()> {
    if done == 0 {
        return Err(io::Error::last_os_error());
    }
    step("flock called");
    Ok(())
}

/// Returns the locked byte as the system calls take it.
fn locked_byte() -> OVERLAPPED {
    let at = OVERLAPPED_0_0 {
        Offset: LOCKED_BYTE as u32,
        OffsetHigh: (LOCKED_BYTE >> 32) as u32,
    };
    OVERLAPPED {
        Anonymous: OVERLAPPED_0 { Anonymous: at },
        ..OVERLAPPED::default()
    }
}

/// Whether the error is a file system's report of a lock that another handle has. The second code
/// is the one that file systems return instead of waiting.
fn is_contended(error: &io::Error) -> bool {
    let code = error.raw_os_error().map(|code| code as u32);
    matches!(code, Some(ERROR_LOCK_VIOLATION | ERROR_IO_PENDING))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn locked_file_is_readable_and_writable_by_other_handle() {
        let path = std::env::temp_dir().join(format!("lockkit-flock-{}", std::process::id()));
        let one = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .unwrap();
        let mut other = File::options().read(true).write(true).open(&path).unwrap();
        assert!(try_lock(&one, Mode::Exclusive).unwrap());
        assert!(!try_lock(&other, Mode::Shared).unwrap());
        (&one).write_all(b"one").unwrap();
        let mut text = String::new();
        other.read_to_string(&mut text).unwrap();
        assert_eq!(text, "one");
        other.write_all(b"other").unwrap();
        unlock(&one).unwrap();
        assert!(try_lock(&other, Mode::Shared).unwrap() && try_lock(&one, Mode::Shared).unwrap());
        drop((one, other));
        std::fs::remove_file(path).unwrap();
    }
}
