//! What the command `lockkit` asks of the system that no crate offers without `unsafe`.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

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

/// Which of the descriptors 0, 1 and 2 the parent left closed: a bit for each.
static CLOSED: AtomicU8 = AtomicU8::new(0);
/// Whether the parent had SIGPIPE ignored.
static PIPE_IGNORED: AtomicBool = AtomicBool::new(false);

/// Looks before Rust's runtime opens closed standard descriptors on /dev/null and ignores SIGPIPE.
#[cfg(any(target_os = "linux", target_os = "android"))]
extern "C" fn look() {
    for number in 0..3 {
        // SAFETY: asks only, and fails where nothing is open.
        if unsafe { libc::fcntl(number, libc::F_GETFD) } == -1 {
            CLOSED.fetch_or(1 << number, Ordering::Relaxed);
        }
    }
    let mut pipe = std::mem::MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: asks only, and fills in what it is given, which is read only if it did.
    let asked = unsafe {
        (libc::sigaction(libc::SIGPIPE, std::ptr::null(), pipe.as_mut_ptr()) == 0).then(|| pipe.assume_init())
    };
    PIPE_IGNORED.store(asked.is_some_and(|action| action.sa_sigaction == libc::SIG_IGN), Ordering::Relaxed);
}

// SAFETY: the C library calls what stands in this section once, before `main`, on the only thread; `look` needs nothing
// of Rust's runtime.
#[cfg(any(target_os = "linux", target_os = "android"))]
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK: extern "C" fn() = look;

/// Has `command` started by fork and exec with SIGPIPE as this process was given it, where Rust's library would set it
/// to its default; and a script without a first line that names its interpreter, by the shell.
pub fn as_given(command: &mut Command) -> &mut Command {
    let restore = || {
        if PIPE_IGNORED.load(Ordering::Relaxed) {
            // SAFETY: no handler is installed, so no code runs at a signal.
            unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
        }
        Ok(())
    };
    // SAFETY: `restore` only reads an atomic and calls signal(2), both of which a forked child may do.
    unsafe { command.pre_exec(restore) }
}

/// Another descriptor for the open file that the parent left under this number, as shells do with `9>file`. Also of
/// one that is close-on-exec.
///
/// # Errors
/// `EBADF` when the parent left nothing open under it.
pub fn inherited(number: RawFd) -> io::Result<File> {
    if (0..3).contains(&number) && CLOSED.load(Ordering::Relaxed) & (1 << number) != 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
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
