//! The resources that the cases take away: descriptors, room, files, processes, and uninterrupted
//! sleep.

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use lockkit::Wait;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit, setrlimit};

use crate::{Actor, Kind, Spec, program, until};

/// Files of a program that has closed all descriptors from 3 on and reused their numbers. Each file
/// is locked through its descriptor.
#[derive(Default)]
pub struct Others(Vec<(fs::File, u64)>);

impl Others {
    /// So many descriptor numbers include those of the lock.
    const MANY: usize = 64;

    /// Closes every descriptor, as some daemons do at their start, and opens other files.
    pub fn in_place_of_all() -> Self {
        for descriptor in 3..1024 {
            let _ = nix::unistd::close(descriptor);
        }
        let others = (0..Self::MANY).map(|_| {
            let mut file = tempfile::tempfile().expect("a file");
            file.write_all(b"others").expect("room");
            flock(&file, FlockOperation::NonBlockingLockExclusive)
                .expect("a new file is not locked");
            let inode = file.metadata().expect("it is open").ino();
            (file, inode)
        });
        Self(others.collect())
    }

    /// Leaves the numbers to later opens.
    pub fn forget(self) {
        self.0
            .into_iter()
            .for_each(|(file, _)| std::mem::forget(file));
    }

    /// Answers whether the numbers still refer to these files, with the same contents.
    pub fn are_open(&self) -> &'static str {
        let is_open = |(file, inode): &(fs::File, u64)| {
            let mut bytes = [0; 7];
            let read = file.read_at(&mut bytes, 0);
            file.metadata().is_ok_and(|found| found.ino() == *inode)
                && read.is_ok_and(|read| &bytes[..read] == b"others")
        };
        if self.0.iter().all(is_open) {
            "kept"
        } else {
            "error another file, or another text"
        }
    }

    /// Answers whether the files are also still locked.
    pub fn are_kept(&self) -> String {
        let is_locked = |(file, _): &(fs::File, u64)| {
            let own = format!("/proc/self/fd/{}", file.as_raw_fd());
            let again = fs::File::open(own).expect("it is open");
            flock(again, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK)
        };
        match self.are_open() {
            "kept" if !self.0.iter().all(is_locked) => "error not locked".to_owned(),
            answer => answer.to_owned(),
        }
    }
}

pub(super) fn limit(actor: &Actor, resource: Resource, to: Option<u64>) {
    let maximum = getrlimit(resource).maximum;
    let pid = Pid::from_raw(actor.pid().cast_signed());
    prlimit(
        pid,
        resource,
        Rlimit {
            current: to,
            maximum,
        },
    )
    .expect("the limits of a child can be set");
}

/// Limits the threads of this process's user to `maximum`, or to `all` that are allowed. Has no
/// effect for root.
pub fn limit_threads(maximum: &str) {
    let mut limit = getrlimit(Resource::Nproc);
    limit.current = maximum.parse().ok().or(limit.maximum);
    setrlimit(Resource::Nproc, limit).expect("not above the highest");
}

/// Starts an actor that a write beyond the limit does not kill; the write fails with an error
/// instead.
pub(super) fn start_without_sigxfsz(spec: &Spec) -> Actor {
    Actor::start_with(spec, |command| {
        let program = command.get_program().to_owned();
        *command = Command::new("sh");
        command
            .args(["-c", "trap '' XFSZ && exec \"$0\" \"$1\""])
            .arg(program)
            .arg(spec.invite());
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
    })
}

/// A mount namespace with small file systems of its own at every place where locks leave files.
pub(super) struct MountNamespace {
    process: Child,
    /// Its end closes the namespace.
    _stdin: ChildStdin,
    directories: Vec<PathBuf>,
}

impl MountNamespace {
    /// Creates one, or reports why that is impossible.
    pub(super) fn new() -> Option<Self> {
        let mut directories = vec![PathBuf::from("/tmp"), PathBuf::from("/dev/shm")];
        let own = std::env::temp_dir();
        if !directories.contains(&own) {
            directories.push(own);
        }
        if directories
            .iter()
            .any(|directory| program("actor").starts_with(directory))
        {
            crate::left_out(
                "the programs of the tests are in a directory that this test would mount over",
            );
            return None;
        }
        let mounts = directories.iter().map(|directory| {
            format!(
                "mkdir -p '{0}' && mount -t tmpfs -o size=256k,nr_inodes=64,mode=1777 lockkit-test '{0}' && ",
                directory.display()
            )
        });
        let script = mounts.collect::<String>() + "echo mounted && exec cat";
        let mut process = Command::new("unshare");
        process.args(["-m", "--propagation", "private", "sh", "-c", &script]);
        let mut process = process
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let mut line = String::new();
        let _ = BufReader::new(process.stdout.take()?).read_line(&mut line);
        let stdin = process.stdin.take()?;
        if line != "mounted\n" {
            let _ = process.wait();
            crate::left_out("this machine does not let the test mount file systems of its own");
            return None;
        }
        Some(Self {
            process,
            _stdin: stdin,
            directories,
        })
    }

    /// Starts an actor in the namespace, as root or another user.
    pub(super) fn start(&self, spec: &Spec, uid: u32) -> Actor {
        Actor::start_with(spec, |command| {
            let program = command.get_program().to_owned();
            *command = self.command(uid);
            command
                .arg(program)
                .arg(spec.invite())
                .stdin(Stdio::piped())
                .stdout(Stdio::piped());
            command.stderr(Stdio::null());
        })
    }

    fn command(&self, uid: u32) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--mount=/proc/{}/ns/mnt", self.process.id()))
            .arg("--wd=/");
        if uid != 0 {
            command.args([format!("--setuid={uid}"), format!("--setgid={uid}")]);
        }
        command
    }

    /// Returns the namespace's `/`, as a path of this process.
    pub(super) fn root(&self) -> PathBuf {
        format!("/proc/{}/root", self.process.id()).into()
    }

    fn directories(&self) -> impl Iterator<Item = PathBuf> {
        self.directories.iter().map(|directory| {
            self.root()
                .join(directory.strip_prefix("/").expect("absolute"))
        })
    }

    /// Leaves no room for a byte or a file.
    pub(super) fn fill(&self) {
        for directory in self.directories() {
            let directory = directory.join("filler");
            fs::create_dir(&directory).expect("room for a directory");
            let mut file = fs::File::create(directory.join("bytes")).expect("room for a file");
            while file.write_all(&[0; 4096]).is_ok() {}
            for number in 0.. {
                if fs::File::create(directory.join(number.to_string())).is_err() {
                    break;
                }
            }
        }
    }

    pub(super) fn make_room(&self) {
        for directory in self.directories() {
            fs::remove_dir_all(directory.join("filler")).expect("it can be removed");
        }
    }

    pub(super) fn remount(&self, how: &str) {
        for directory in &self.directories {
            let mut mount = self.command(0);
            mount
                .args(["mount", "-o"])
                .arg(format!("remount,{how}"))
                .arg(directory);
            // A process that has just ended may still have a file open.
            until("the file system is remounted", || {
                mount
                    .stderr(Stdio::null())
                    .status()
                    .is_ok_and(|status| status.success())
            });
        }
    }

    pub(super) fn set_modes(&self, mode: u32) {
        for directory in self.directories() {
            fs::set_permissions(directory, Permissions::from_mode(mode)).expect("root may");
        }
    }
}

impl Drop for MountNamespace {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Returns whether a thread of the holder uses descriptors at any moment, so that closing them is
/// never safe.
pub(super) fn is_renewed(kind: Kind) -> bool {
    let is_renewed = kind.name().starts_with("lease");
    if is_renewed {
        crate::left_out("the heartbeat may be using the descriptors that are closed");
    }
    is_renewed
}

/// The signals per second.
pub(super) const SIGNALS_PER_SECOND: u32 = 1000;

/// Signals this process at the rate `SIGNALS_PER_SECOND`, as long as it lives. Each signal
/// interrupts a running system call, because its handler is set without `SA_RESTART`.
pub fn raise_a_storm() {
    use nix::sys::signal::{
        SaFlags, SigAction, SigEvent, SigHandler, SigSet, SigevNotify, Signal, sigaction,
    };
    use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
    static RECEIVED: AtomicU32 = AtomicU32::new(0);
    extern "C" fn receive(_: i32) {
        RECEIVED.fetch_add(1, Ordering::Relaxed);
    }
    let action = SigAction::new(
        SigHandler::Handler(receive),
        SaFlags::empty(),
        SigSet::empty(),
    );
    // SAFETY: the handler only counts in an atomic, which is allowed at any moment.
    unsafe { sigaction(Signal::SIGALRM, &action) }.expect("a handler can be set");
    let event = SigEvent::new(SigevNotify::SigevSignal {
        signal: Signal::SIGALRM,
        si_value: 0,
    });
    let mut timer = Timer::new(nix::time::ClockId::CLOCK_MONOTONIC, event).expect("a timer");
    let every = Expiration::Interval((Duration::from_secs(1) / SIGNALS_PER_SECOND).into());
    timer
        .set(every, TimerSetTimeFlags::empty())
        .expect("it can be set");
    // A drop would end the timer.
    std::mem::forget(timer);
    until("the process receives signals", || {
        RECEIVED.load(Ordering::Relaxed) > 10
    });
}

pub(super) fn command_under_signals(spec: &Spec, arguments: &[&str]) -> Command {
    let mut command = Command::new(program("actor"));
    command
        .arg("stormed")
        .arg(spec.invite())
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    command
}

/// Acquires the lock with none of the three standard descriptors open, so that the lock uses their
/// numbers. Keeps it until there is a file `go`, and acquires it again.
pub fn lock_on_the_standard_descriptors(spec: &Spec, go: &Path) {
    for descriptor in 0..3 {
        nix::unistd::close(descriptor).expect("it was open");
    }
    let lock = spec.open();
    // A process that checks whether the lock is held acquires it for a moment.
    let guard = lock.acquire(&Wait::at_most(crate::LIVELY)).expect("free");
    until("the file `go` exists", || go.exists());
    assert!(
        spec.rival()
            .acquire(&Wait::at_most(Duration::from_millis(5)))
            .err()
            .expect("held")
            .is_timeout()
    );
    guard.release().expect("it can be released");
    for wait in [Wait::none(), Wait::forever(), Wait::at_most(crate::LIVELY)] {
        drop(spec.open().acquire(&wait).expect("free again"));
    }
}
