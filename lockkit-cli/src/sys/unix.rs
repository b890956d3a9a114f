//! The Unix version of [`sys`](super).

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Pid;

/// Forks. Returns `None` in the child, and the child's pid in the parent.
///
/// The child of a process with threads has only the thread that forked. It should do no more than
/// it must before it starts a program or exits. (glibc nevertheless lets it allocate memory.)
pub(crate) fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: the call itself has no preconditions. The child runs safe code. A mutex that another
    // thread had locked at the fork can block the child, which does not violate memory safety.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(Pid::from_raw(pid)),
    }
}

/// Makes a pipe: the reader and the writer. No started program inherits either.
pub(crate) fn pipe() -> io::Result<(File, File)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    Ok((reader.into(), writer.into()))
}

/// The descriptors 0, 1 and 2 that the parent left closed: a bit for each.
static CLOSED: AtomicU8 = AtomicU8::new(0);
/// Whether the parent ignored SIGPIPE.
static PIPE_IGNORED: AtomicBool = AtomicBool::new(false);

/// Reads the state before Rust's runtime opens closed standard descriptors on /dev/null and ignores
/// SIGPIPE.
#[cfg(any(target_os = "linux", target_os = "android"))]
extern "C" fn look() {
    for number in 0..3 {
        // SAFETY: the call only queries, and fails if nothing is open.
        if unsafe { libc::fcntl(number, libc::F_GETFD) } == -1 {
            CLOSED.fetch_or(1 << number, Ordering::Relaxed);
        }
    }
    let mut pipe = std::mem::MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: the call only queries. It fills in its argument, which is read only if the call
    // succeeded.
    let asked = unsafe {
        (libc::sigaction(libc::SIGPIPE, std::ptr::null(), pipe.as_mut_ptr()) == 0)
            .then(|| pipe.assume_init())
    };
    PIPE_IGNORED.store(
        asked.is_some_and(|action| action.sa_sigaction == libc::SIG_IGN),
        Ordering::Relaxed,
    );
}

// SAFETY: the C library calls the entries of this section once, before `main`, on the only thread;
// `look` needs nothing of Rust's runtime.
#[cfg(any(target_os = "linux", target_os = "android"))]
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK: extern "C" fn() = look;

/// Makes `command` start by fork and exec with the SIGPIPE disposition and standard descriptors
/// that this process got. Rust's library would reset SIGPIPE to its default and open the closed
/// descriptors. The shell runs a script without a first line that names its interpreter.
pub(crate) fn as_given(command: &mut Command) -> &mut Command {
    let restore = || {
        for number in (0..3).filter(|number| CLOSED.load(Ordering::Relaxed) & (1 << number) != 0) {
            // SAFETY: the descriptor belongs to this process, in the child before exec replaces the
            // program.
            unsafe { libc::close(number) };
        }
        if PIPE_IGNORED.load(Ordering::Relaxed) {
            // SAFETY: no handler is installed, so no code runs at a signal.
            unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
        }
        Ok(())
    };
    // SAFETY: `restore` only reads atomics and calls close(2) and signal(2), all of which a forked
    // child may do.
    unsafe { command.pre_exec(restore) }
}

/// Returns another descriptor for the open file that the parent left under this number, as shells
/// do with `9>file`. A close-on-exec descriptor works too.
///
/// # Errors
/// `EBADF` if the parent left no file open under the number.
pub(crate) fn inherited(number: RawFd) -> io::Result<File> {
    if (0..3).contains(&number) && CLOSED.load(Ordering::Relaxed) & (1 << number) != 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: dup makes a new descriptor or fails, for any number.
    match unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: the call has just made the descriptor, and it has no other owner.
        copy => Ok(File::from(unsafe { OwnedFd::from_raw_fd(copy) })),
    }
}

/// Renames this process, also in the command line that `ps` shows and `pkill -f` matches. The new
/// command line is cut to the length of the old one. Without write access through /proc, the
/// command line does not change.
pub(crate) fn rename_process(name: &CStr) {
    let _ = rustix::thread::set_name(name);
    let _ = rewrite_command_line(name.to_bytes());
}

/// Overwrites the command line in the place where the kernel reads it: the words that the C library
/// got as `argv`. The words stay terminated. No code here keeps references to them (the standard
/// library copies them when it is asked). After a fork the words belong to this process.
fn rewrite_command_line(name: &[u8]) -> io::Result<()> {
    // Longer than any such line. One read returns the whole line.
    let mut stat = [0; 1024];
    let length = File::open("/proc/self/stat")?.read(&mut stat)?;
    let stat = String::from_utf8_lossy(&stat[..length]);
    // The name may contain anything. After it the fields count from the third; these are the 48th
    // and the 49th.
    let mut fields = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_ascii_whitespace()
        .skip(48 - 3);
    let mut address = || {
        fields
            .next()
            .and_then(|field| field.parse::<u64>().ok())
            .ok_or(io::ErrorKind::InvalidData)
    };
    let (start, end) = (address()?, address()?);
    let room = usize::try_from(end.saturating_sub(start)).unwrap_or_default();
    let mut words = vec![0; room];
    let length = name.len().min(room.saturating_sub(1));
    words[..length].copy_from_slice(&name[..length]);
    File::options()
        .write(true)
        .open("/proc/self/mem")?
        .write_all_at(&words, start)
}

/// Keeps ended children until they are waited for, also if the parent of this process set SIGCHLD
/// to be ignored.
pub(crate) fn wait_for_children() {
    // SAFETY: no handler is installed, so no code runs at a signal.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// Makes a write to a closed pipe end this process, as in C programs. Rust's runtime turns such a
/// write into an error.
pub(crate) fn end_at_a_closed_pipe() {
    // SAFETY: as above.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}
