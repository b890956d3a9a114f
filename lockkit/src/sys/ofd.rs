//! Locks on bytes of a file that belong to an open file, not to a process: `F_OFD_SETLK` in [fcntl(2)].
//!
//! The kernel drops them when the last descriptor of the open file is closed, however that comes about, and tells
//! anyone who has the file whether one is there. Through `libc`, for rustix has no such call.
//!
//! [fcntl(2)]: https://man7.org/linux/man-pages/man2/fcntl.2.html

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Locks the byte at `offset` for this open file; `false` when another open file has it.
pub(crate) fn try_lock(file: &File, offset: u32) -> io::Result<bool> {
    match call(file, libc::F_OFD_SETLK, offset) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether another open file has a lock on the byte at `offset`.
pub(crate) fn is_locked(file: &File, offset: u32) -> io::Result<bool> {
    Ok(call(file, libc::F_OFD_GETLK, offset)?.l_type != libc::F_UNLCK as libc::c_short)
}

/// Whether another open file or another process has a lock on any byte; with the pid, which only a lock of a process has.
#[cfg(feature = "cli")]
pub(crate) fn holder(file: &File) -> io::Result<Option<Option<u32>>> {
    // From the first byte, a length of 0 reaches beyond every end.
    let found = call_on(file, libc::F_OFD_GETLK, 0, 0)?;
    let is_locked = found.l_type != libc::F_UNLCK as libc::c_short;
    Ok(is_locked.then(|| u32::try_from(found.l_pid).ok().filter(|pid| *pid != 0)))
}

fn call(file: &File, command: libc::c_int, offset: u32) -> io::Result<libc::flock> {
    call_on(file, command, offset, 1)
}

fn call_on(file: &File, command: libc::c_int, offset: u32, length: u32) -> io::Result<libc::flock> {
    // SAFETY: a C struct of integers, for which all zeros is a value. Its pid must be 0 for these commands.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    // Slots stand in the first megabyte, which every `off_t` reaches.
    lock.l_start = offset as libc::off_t;
    lock.l_len = length as libc::off_t;
    loop {
        // SAFETY: the descriptor is open as long as `file` lives, and these commands read and write one `flock`.
        if unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) } != -1 {
            return Ok(lock);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_belongs_to_one_open_file_until_that_is_closed() {
        let path = std::env::temp_dir().join(format!("lockkit-ofd-{}", std::process::id()));
        let one = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        let other = File::options().read(true).write(true).open(&path).unwrap();
        assert!(try_lock(&one, 7).unwrap());
        assert!(try_lock(&one, 7).unwrap(), "its own lock is no obstacle");
        assert!((0..100).all(|at| !is_locked(&one, at).unwrap()), "nor is it seen from inside");
        assert!(!try_lock(&other, 7).unwrap());
        assert!(is_locked(&other, 7).unwrap());
        assert!(!is_locked(&other, 8).unwrap());
        drop(one);
        assert!((0..100).all(|at| !is_locked(&other, at).unwrap()));
        std::fs::remove_file(path).unwrap();
    }
}
