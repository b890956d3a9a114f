//! Operations on processes that differ between systems, and what a process has.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Returns the path of the program `name` of this package, next to the running test.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the test has a path");
    let name = format!("{name}{}", std::env::consts::EXE_SUFFIX);
    let directory = test
        .ancestors()
        .find(|directory| directory.join(&name).is_file());
    directory
        .unwrap_or_else(|| {
            panic!(
                "cannot find {name} near {}: build the package first",
                test.display()
            )
        })
        .join(name)
}

/// Runs a command without output, and returns whether it succeeds.
pub fn succeeds(command: &mut Command) -> bool {
    command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Returns a program that sleeps for `time`.
pub fn sleeper(time: Duration) -> Command {
    let mut command = if cfg!(unix) {
        Command::new("sleep")
    } else {
        Command::new(program("actor"))
    };
    command
        .args((!cfg!(unix)).then_some("sleep"))
        .arg(time.as_secs().to_string())
        .stdin(Stdio::null());
    command
}

/// Returns the lines of standard input, as the commands of a second process. On Linux they are read
/// with `readv`, so that a test can make each `read` of a lock fail, and no other.
pub fn commands() -> impl Iterator<Item = String> {
    struct Input;
    impl Read for Input {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            #[cfg(target_os = "linux")]
            return Ok(rustix::io::readv(
                std::io::stdin(),
                &mut [std::io::IoSliceMut::new(buffer)],
            )?);
            #[cfg(not(target_os = "linux"))]
            std::io::stdin().read(buffer)
        }
    }
    BufReader::new(Input).lines().map_while(Result::ok)
}

/// The open files and threads of a process, to check that nothing is left behind.
#[derive(Debug, PartialEq, Eq)]
pub struct Belongings {
    descriptors: usize,
    threads: usize,
}

impl Belongings {
    /// Counts them now, for the process `pid`. The heartbeat and its watchdog, which starts at the
    /// first heartbeat, count as one. Where the system does not show them (neither Linux nor
    /// Windows), all counts are equal.
    pub fn of(pid: u32) -> Self {
        let names = thread_names(pid);
        let of_leases = names.iter().filter(|name| *name == "lockkit-lease").count();
        Self {
            descriptors: descriptors(pid),
            threads: names.len() - usize::from(of_leases == 2),
        }
    }

    /// Returns the number of open descriptors, or handles.
    pub fn descriptors(&self) -> usize {
        self.descriptors
    }

    /// Returns the number of threads.
    pub fn threads(&self) -> usize {
        self.threads
    }
}

#[cfg(target_os = "linux")]
fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("/proc")
        .count()
}

#[cfg(windows)]
use crate::windows::handles as descriptors;

#[cfg(not(any(target_os = "linux", windows)))]
fn descriptors(_pid: u32) -> usize {
    0
}

/// Returns the names of the threads of the process `pid`. A thread that is just beginning or ending
/// may have no name. Where the system does not show them, the list is empty.
#[cfg(target_os = "linux")]
pub(crate) fn thread_names(pid: u32) -> Vec<String> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task"))
        .expect("/proc")
        .flatten();
    let name = |thread: std::fs::DirEntry| {
        std::fs::read_to_string(thread.path().join("comm")).unwrap_or_default()
    };
    threads
        .map(|thread| name(thread).trim_end().to_owned())
        .collect()
}

#[cfg(windows)]
pub(crate) use crate::windows::threads as thread_names;

#[cfg(not(any(target_os = "linux", windows)))]
pub(crate) fn thread_names(_pid: u32) -> Vec<String> {
    Vec::new()
}

/// Returns whether a thread of the process `pid` sleeps, as a waiter does.
#[cfg(target_os = "linux")]
pub fn sleeps(pid: u32, thread: u32) -> bool {
    let stat =
        std::fs::read_to_string(format!("/proc/{pid}/task/{thread}/stat")).unwrap_or_default();
    stat.rsplit(')')
        .next()
        .unwrap_or_default()
        .trim_start()
        .starts_with('S')
}

/// Returns true after a moment, because this system does not show it. Most waiters sleep by then. A
/// test's later assertions must hold at any moment of the waiter.
#[cfg(not(target_os = "linux"))]
pub fn sleeps(_pid: u32, _thread: u32) -> bool {
    std::thread::sleep(Duration::from_millis(10));
    true
}

/// Returns this thread's id, as [`sleeps`] expects it.
pub fn thread_id() -> u32 {
    #[cfg(target_os = "linux")]
    return rustix::thread::gettid()
        .as_raw_nonzero()
        .get()
        .unsigned_abs();
    #[cfg(not(target_os = "linux"))]
    0
}

/// Stops the process `pid` until [`resume`].
pub fn stop(pid: u32) {
    #[cfg(unix)]
    signal_pid(pid, rustix::process::Signal::STOP);
    #[cfg(windows)]
    crate::windows::suspend(pid, true);
}

/// Ends a [`stop`].
pub fn resume(pid: u32) {
    #[cfg(unix)]
    signal_pid(pid, rustix::process::Signal::CONT);
    #[cfg(windows)]
    crate::windows::suspend(pid, false);
}

/// Kills a grandchild process. Ignores a process that is already gone. Where a kill needs a handle,
/// which no process has on it, it ends by itself.
pub fn kill_pid(pid: u32) {
    #[cfg(unix)]
    signal_pid(pid, rustix::process::Signal::KILL);
    #[cfg(not(unix))]
    let _ = pid;
}

/// Returns whether a child that has been waited for was killed, and did not end by itself.
pub fn was_killed(status: std::process::ExitStatus) -> bool {
    #[cfg(unix)]
    return std::os::unix::process::ExitStatusExt::signal(&status) == Some(9);
    // A panic exits with 101.
    #[cfg(not(unix))]
    return status.code() == Some(1);
}

/// Returns whether the process `pid` is stopped.
#[cfg(target_os = "linux")]
pub fn is_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')')
        .next()
        .unwrap_or_default()
        .trim_start()
        .starts_with('T')
}

/// Sends a signal to any process. Ignores a process that is already gone. On Linux a process that
/// gets `STOP` runs no code any more when this returns.
#[cfg(unix)]
pub fn signal_pid(pid: u32, signal: rustix::process::Signal) {
    let Some(target) = i32::try_from(pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw)
    else {
        return;
    };
    let _ = rustix::process::kill_process(target, signal);
    #[cfg(target_os = "linux")]
    if signal == rustix::process::Signal::STOP {
        wait_until_stopped(pid);
    }
}

/// Waits until no thread of the process `pid` runs code. The signal reaches one thread, and the
/// others continue until that thread is scheduled, which takes time on a busy machine.
#[cfg(target_os = "linux")]
pub fn wait_until_stopped(pid: u32) {
    let is_stopped = |task: std::io::Result<std::fs::DirEntry>| {
        let stat = task
            .and_then(|task| std::fs::read_to_string(task.path().join("stat")))
            .unwrap_or_default();
        let state = stat
            .rsplit(')')
            .next()
            .and_then(|rest| rest.trim_start().chars().next());
        // A thread that has ended has no state.
        state.is_none_or(|state| "TtZX".contains(state))
    };
    let all_stopped = || {
        std::fs::read_dir(format!("/proc/{pid}/task"))
            .is_ok_and(|tasks| tasks.into_iter().all(is_stopped))
    };
    crate::until("the process is stopped", || {
        !std::path::Path::new(&format!("/proc/{pid}")).exists() || all_stopped()
    });
}
