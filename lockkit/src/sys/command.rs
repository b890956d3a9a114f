//! What the command `lockkit` asks of the system that no crate offers without `unsafe`.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use rustix::process::Pid;

/// Forks: `None` in the child, its pid in the parent.
///
/// The child of a process with threads has only the one that forked, so it should do no more than it must before it
/// starts a program or exits. (glibc lets it allocate memory all the same.)
pub fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: the call itself has no preconditions. What the child does is safe code: a mutex that another thread had
    // locked at that moment can stop it, which is no breach of memory safety.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(Pid::from_raw(pid)),
    }
}

/// Another descriptor for the open file that the parent left under this number, as shells do with `9>file`. Also of
/// one that is close-on-exec.
///
/// # Errors
/// `EBADF` when nothing is open under it.
pub fn inherited(number: RawFd) -> io::Result<File> {
    // SAFETY: dup makes a descriptor of its own or fails, whatever the number.
    match unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: just made, and owned by nobody else.
        copy => Ok(File::from(unsafe { OwnedFd::from_raw_fd(copy) })),
    }
}

/// Lets children that end stay to be waited for, also when the parent of this process has told it to ignore them.
pub fn wait_for_children() {
    // SAFETY: no handler is installed, so no code runs at a signal.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// Has a write to a pipe that nobody reads end this process, as it does with programs of C, where Rust's runtime has
/// turned it into an error.
pub fn end_at_a_closed_pipe() {
    // SAFETY: as above.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}
