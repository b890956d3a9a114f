//! Locks on a byte of a file, or on the whole file, that belong to an open file, not to a process:
//! `F_OFD_SETLK` in [fcntl(2)].
//!
//! The kernel releases them when the last descriptor of the open file is closed, for any reason. It
//! shows them to every process that has the file open. This module uses `libc`, because rustix has
//! no such call.
//!
//! [fcntl(2)]: https://man7.org/linux/man-pages/man2/fcntl.2.html

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Locks the byte at `offset` for this open file. Returns `false` if another open file has it.
#[cfg_attr(loom, allow(dead_code))]
pub(crate) fn try_lock(file: &File, offset: u32) -> io::Result<bool> {
    is_granted(call(file, libc::F_OFD_SETLK, libc::F_WRLCK, byte(offset)))
}

/// Whether another open file has a lock on the byte at `offset`.
#[cfg_attr(loom, allow(dead_code))]
pub(crate) fn is_locked(file: &File, offset: u32) -> io::Result<bool> {
    let found = call(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte(offset))?;
    Ok(found.l_type != libc::F_UNLCK as libc::c_short)
}

/// Acquires the write lock on the whole file for this open file, which must be open for writing.
/// Returns `false` if another open file or a process has any lock on it.
pub(crate) fn try_write_lock(file: &File) -> io::Result<bool> {
    is_granted(call(file, libc::F_OFD_SETLK, libc::F_WRLCK, WHOLE_FILE))
}

/// Releases the lock on the whole file, also if a forked child shares the open file.
pub(crate) fn unlock(file: &File) -> io::Result<()> {
    call(file, libc::F_OFD_SETLK, libc::F_UNLCK, WHOLE_FILE).map(drop)
}

/// Returns the process that has a write lock on the file through another open file, or 0 if the
/// kernel does not name it. Returns `None` if none has. Read locks do not matter.
pub(crate) fn writer(file: &File) -> io::Result<Option<u32>> {
    // A read lock conflicts with write locks only.
    let found = call(file, libc::F_OFD_GETLK, libc::F_RDLCK, WHOLE_FILE)?;
    // The kernel reports -1 for a lock of an open file, and 0 for a process of another pid
    // namespace.
    let pid = u32::try_from(found.l_pid).unwrap_or_default();
    Ok((found.l_type != libc::F_UNLCK as libc::c_short).then_some(pid))
}

/// Sleeps until no other open file and no process has a write lock on the file, which must be open
/// for reading.
pub(crate) fn wait_for_writers(file: &File) -> io::Result<()> {
    call(file, libc::F_OFD_SETLKW, libc::F_RDLCK, WHOLE_FILE).map(drop)
}

/// First byte and length; the length 0 extends to the end of the file, wherever that is.
type Range = (libc::off_t, libc::off_t);

const WHOLE_FILE: Range = (0, 0);

/// Slots lie in the first megabyte, which every `off_t` can address.
#[cfg_attr(loom, allow(dead_code))]
fn byte(offset: u32) -> Range {
    (offset as libc::off_t, 1)
}

fn is_granted(answer: io::Result<libc::flock>) -> io::Result<bool> {
    match answer {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

fn call(
    file: &File,
    command: libc::c_int,
    kind: libc::c_int,
    range: Range,
) -> io::Result<libc::flock> {
    // SAFETY: a C struct of integers, for which all zeros is a value. Its pid must be 0 for these
    // commands.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    (lock.l_start, lock.l_len) = range;
    loop {
        // SAFETY: the descriptor is open as long as `file` lives, and these commands read and write
        // one `flock`.
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
    fn lock_of_byte_released_when_open_file_is_closed() {
        let path = std::env::temp_dir().join(format!("lockkit-ofd-{}", std::process::id()));
        let one = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .unwrap();
        let other = File::options().read(true).write(true).open(&path).unwrap();
        assert!(try_lock(&one, 7).unwrap());
        assert!(
            try_lock(&one, 7).unwrap(),
            "the holder's own lock does not conflict"
        );
        assert!(
            (0..100).all(|at| !is_locked(&one, at).unwrap()),
            "the holder does not see its own lock"
        );
        assert!(!try_lock(&other, 7).unwrap());
        assert!(is_locked(&other, 7).unwrap());
        assert!(!is_locked(&other, 8).unwrap());
        drop(one);
        assert!((0..100).all(|at| !is_locked(&other, at).unwrap()));
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn writer_with_only_read_locks_present_is_none() {
        let path = std::env::temp_dir().join(format!("lockkit-ofd-writer-{}", std::process::id()));
        let one = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .unwrap();
        let reader = File::open(&path).unwrap();
        assert_eq!(writer(&reader).unwrap(), None);
        wait_for_writers(&reader).unwrap();
        let third = File::open(&path).unwrap();
        assert_eq!(writer(&third).unwrap(), None, "a read lock is no writer");
        assert!(
            !try_write_lock(&one).unwrap(),
            "the read lock excludes writers"
        );
        drop(reader);
        assert!(try_write_lock(&one).unwrap());
        assert_eq!(writer(&third).unwrap(), Some(0));
        assert_eq!(
            writer(&one).unwrap(),
            None,
            "the holder does not see its own lock"
        );
        assert!(
            try_write_lock(&third).is_err(),
            "a file open for reading only cannot have one"
        );
        unlock(&one).unwrap();
        assert_eq!(writer(&third).unwrap(), None);
        std::fs::remove_file(path).unwrap();
    }
}
