//! What the command `lockkit` asks of the system that no crate offers without `unsafe`.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
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

/// Has `command` started by fork and exec with SIGPIPE and the standard descriptors as this process was given them, where
/// Rust's library would set the one to its default and open the others; and a script without a first line that names its
/// interpreter, by the shell.
pub fn as_given(command: &mut Command) -> &mut Command {
    let restore = || {
        for number in (0..3).filter(|number| CLOSED.load(Ordering::Relaxed) & (1 << number) != 0) {
            // SAFETY: one of this process's own, which comes before the program that is about to take its place.
            unsafe { libc::close(number) };
        }
        if PIPE_IGNORED.load(Ordering::Relaxed) {
            // SAFETY: no handler is installed, so no code runs at a signal.
            unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
        }
        Ok(())
    };
    // SAFETY: `restore` only reads atomics and calls close(2) and signal(2), all of which a forked child may do.
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

/// Gives this process another name, also in the command line that `ps` shows and `pkill -f` goes by. As much of that is
/// written as the old one had room for; where /proc does not allow it, it stays.
pub fn rename_process(name: &CStr) {
    let _ = rustix::thread::set_name(name);
    let _ = rewrite_command_line(name.to_bytes());
}

/// Writes where the kernel reads the command line: the words that the C library was given as `argv`. They stay words
/// that end, nobody here keeps references to them (the standard library copies them when it is asked), and after a fork
/// they are this process's own.
fn rewrite_command_line(name: &[u8]) -> io::Result<()> {
    // Longer than any such line, which comes in one piece.
    let mut stat = [0; 1024];
    let length = File::open("/proc/self/stat")?.read(&mut stat)?;
    let stat = String::from_utf8_lossy(&stat[..length]);
    // Behind the name, which may hold anything, the fields count from the third; these are the 48th and the 49th.
    let mut fields = stat.rsplit(')').next().unwrap_or_default().split_ascii_whitespace().skip(48 - 3);
    let mut address = || fields.next().and_then(|field| field.parse::<u64>().ok()).ok_or(io::ErrorKind::InvalidData);
    let (start, end) = (address()?, address()?);
    let room = usize::try_from(end.saturating_sub(start)).unwrap_or_default();
    let mut words = vec![0; room];
    let length = name.len().min(room.saturating_sub(1));
    words[..length].copy_from_slice(&name[..length]);
    File::options().write(true).open("/proc/self/mem")?.write_all_at(&words, start)
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
