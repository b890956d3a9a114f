//! Injects missing resources: room, files, processes, uninterrupted sleep, and every single system call that a lock
//! makes.
//!
//! In every case each request gets an answer: the lock, or an error that names the missing resource. Exclusion holds
//! throughout. When the resource is back, the same process acquires, and so does another. The other process's guard
//! reports no death, because no holder died. [`fault_injection!`](crate::fault_injection!) makes a test of each case
//! for one kind.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use lockkit::{LeaseStatus, Wait};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, prlimit, setrlimit};

use crate::helper_process::signal_pid;
use crate::leases::Terms;
use crate::{Actor, Belongings, Kind, Spec, another_user, conformance, crash_points, managers, program, until};

/// Makes a module `$module` with a test for every case, for one kind of lock.
#[macro_export]
macro_rules! fault_injection {
    ($module:ident, $kind:expr) => {
        $crate::fault_injection!($module, $kind;
            a_limit_of_file_sizes_is_an_error_or_does_not_matter,
            a_process_that_a_limit_of_file_sizes_ends_holds_nothing,
            a_limit_of_processes_is_an_error_or_does_not_matter,
            a_full_file_system_is_an_error_or_does_not_matter,
            a_read_only_file_system_is_an_error_or_does_not_matter,
            unwritable_directory_fails_or_has_no_effect,
            waiters_get_in_give_up_and_see_deaths_in_a_storm_of_signals,
            a_crowd_in_a_storm_of_signals_counts_without_losing_one,
            the_standard_descriptors_are_locks_like_any_other,
            lock_has_crash_point_between_any_two_changes,
            c7_drop_after_close_range_keeps_other_files,
            c7_lock_after_close_range_excludes_others,
            c7_token_after_close_range_still_cancels,
            c7_drop_of_closed_guard_keeps_next_lock,
            any_system_call_may_fail_once_without_contention,
            any_system_call_may_fail_once_when_the_lock_is_passed_on,
        );
    };
    ($module:ident, $kind:expr; $($case:ident,)*) => {
        mod $module {
            $(#[test]
            fn $case() {
                $crate::fault_injection::$case($kind);
            })*
        }
    };
}

/// Every way of requesting a free lock.
const WAYS: [&str; 3] = ["try", "lock", "lock-for 1000"];

/// The time limit of an acquisition. By then even a lease whose release failed is released.
const TAKE: &str = "lock-for 10000";

/// Requests the lock in every way. Checks that each answer is the lock or an error that contains one of `because`.
/// Returns how often the answer was the lock.
fn ask_in_every_way(actor: &mut Actor, because: &[&str]) -> usize {
    let mut held = 0;
    for way in WAYS {
        let answer = actor.ask(way);
        if answer == "held" {
            held += 1;
            is_released_or_says(&actor.ask("release"), because);
        } else {
            assert!(answer.starts_with("error "), "{answer}");
            is_released_or_says(&answer, because);
        }
    }
    held
}

fn is_released_or_says(answer: &str, because: &[&str]) {
    let says = because.iter().any(|because| answer.contains(because));
    assert!(answer == "released" || (answer.starts_with("error ") && says), "{answer}, not for {because:?}");
}

/// Checks that each actor acquires in turn, and excludes the others. No holder died, so no guard reports a death.
fn all_get_in(actors: &mut [&mut Actor]) {
    for at in 0..actors.len() {
        actors[at].expect(TAKE, "held");
        let other = (at + 1) % actors.len();
        if other != at {
            let answer = actors[other].ask("try");
            assert!(answer.starts_with("error Held"), "{answer}");
        }
        actors[at].expect("release", "released");
    }
}

/// Returns the files of a lock of any kind: all files whose names contain the lock's, where locks leave files, and all
/// files in the lock's own directory. The files are below `root`, which differs in another mount namespace.
pub fn files(spec: &Spec, root: &Path) -> BTreeSet<String> {
    let name = Path::new(spec.at()).file_name().expect("a name").to_string_lossy().into_owned();
    let below = |path: &Path| root.join(path.strip_prefix("/").expect("absolute"));
    let list = |directory: &Path| -> Vec<String> {
        let entries = fs::read_dir(below(directory)).into_iter().flatten().flatten();
        entries.map(|entry| directory.join(entry.file_name()).display().to_string()).collect()
    };
    let users = ["/tmp", "/dev/shm"].into_iter().flat_map(|base| {
        let directories = list(Path::new(base)).into_iter().filter(|path| path.contains("/lockkit-u"));
        directories.map(PathBuf::from).collect::<Vec<_>>()
    });
    let directories: BTreeSet<PathBuf> =
        [PathBuf::from("/tmp"), "/dev/shm".into(), std::env::temp_dir()].into_iter().chain(users).collect();
    let named = directories.iter().flat_map(|directory| list(directory)).filter(|path| path.contains(&name));
    let within = Path::new(spec.at()).is_absolute().then(|| list(Path::new(spec.at()))).into_iter().flatten();
    named.chain(within).collect()
}

/// Returns the files that one ordinary use of such a lock leaves, with the name of `spec` for its own.
fn files_of_an_ordinary_use(kind: Kind, spec: &Spec) -> BTreeSet<String> {
    let other = kind.fresh();
    Actor::start(&other).expect("try", "held");
    let mut actor = Actor::start(&other);
    assert!(actor.ask(TAKE).starts_with("held"));
    actor.expect("release", "released");
    let left = files(&other, Path::new("/"));
    other.clean();
    let name = |spec: &Spec| Path::new(spec.at()).file_name().expect("a name").to_string_lossy().into_owned();
    left.into_iter().map(|path| path.replace(&name(&other), &name(spec))).collect()
}

/// Files of a program that has closed all descriptors from 3 on and reused their numbers. Each file is locked through
/// its descriptor.
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
            flock(&file, FlockOperation::NonBlockingLockExclusive).expect("a new file is not locked");
            let inode = file.metadata().expect("it is open").ino();
            (file, inode)
        });
        Self(others.collect())
    }

    /// Leaves the numbers to later opens.
    pub fn forget(self) {
        self.0.into_iter().for_each(|(file, _)| std::mem::forget(file));
    }

    /// Answers whether the numbers still refer to these files, with the same contents.
    pub fn are_open(&self) -> &'static str {
        let is_open = |(file, inode): &(fs::File, u64)| {
            let mut bytes = [0; 7];
            let read = file.read_at(&mut bytes, 0);
            file.metadata().is_ok_and(|found| found.ino() == *inode)
                && read.is_ok_and(|read| &bytes[..read] == b"others")
        };
        if self.0.iter().all(is_open) { "kept" } else { "error another file, or another text" }
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

fn limit(actor: &Actor, resource: Resource, to: Option<u64>) {
    let maximum = getrlimit(resource).maximum;
    let pid = Pid::from_raw(actor.pid().cast_signed());
    prlimit(pid, resource, Rlimit { current: to, maximum }).expect("the limits of a child can be set");
}

/// Limits the threads of this process's user to `most`, or to `all` that are allowed. Has no effect for root.
pub fn limit_threads(most: &str) {
    let mut limit = getrlimit(Resource::Nproc);
    limit.current = most.parse().ok().or(limit.maximum);
    setrlimit(Resource::Nproc, limit).expect("not above the highest");
}

/// Starts an actor that a write beyond the limit does not kill; the write fails with an error instead.
fn start_without_sigxfsz(spec: &Spec) -> Actor {
    Actor::start_with(spec, |command| {
        let program = command.get_program().to_owned();
        *command = Command::new("sh");
        command.args(["-c", "trap '' XFSZ && exec \"$0\" \"$1\""]).arg(program).arg(spec.invite());
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
    })
}

/// A mount namespace with small file systems of its own at every place where locks leave files.
struct World {
    keeper: Child,
    /// Its end closes the namespace.
    _stays: ChildStdin,
    places: Vec<PathBuf>,
}

impl World {
    /// Creates one, or reports why that is impossible.
    fn new() -> Option<Self> {
        let mut places = vec![PathBuf::from("/tmp"), PathBuf::from("/dev/shm")];
        let own = std::env::temp_dir();
        if !places.contains(&own) {
            places.push(own);
        }
        if places.iter().any(|place| program("actor").starts_with(place)) {
            crate::left_out("the programs of the tests lie where this test would mount something else");
            return None;
        }
        let mounts = places.iter().map(|place| {
            format!(
                "mkdir -p '{0}' && mount -t tmpfs -o size=256k,nr_inodes=64,mode=1777 lockkit-test '{0}' && ",
                place.display()
            )
        });
        let script = mounts.collect::<String>() + "echo mounted && exec cat";
        let mut keeper = Command::new("unshare");
        keeper.args(["-m", "--propagation", "private", "sh", "-c", &script]);
        let mut keeper = keeper.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().ok()?;
        let mut line = String::new();
        let _ = BufReader::new(keeper.stdout.take()?).read_line(&mut line);
        let stays = keeper.stdin.take()?;
        if line != "mounted\n" {
            let _ = keeper.wait();
            crate::left_out("this machine does not let the test mount file systems of its own");
            return None;
        }
        Some(Self { keeper, _stays: stays, places })
    }

    /// Starts an actor in the namespace, as root or another user.
    fn start(&self, spec: &Spec, uid: u32) -> Actor {
        Actor::start_with(spec, |command| {
            let program = command.get_program().to_owned();
            *command = self.command(uid);
            command.arg(program).arg(spec.invite()).stdin(Stdio::piped()).stdout(Stdio::piped());
            command.stderr(Stdio::null());
        })
    }

    fn command(&self, uid: u32) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--mount=/proc/{}/ns/mnt", self.keeper.id())).arg("--wd=/");
        if uid != 0 {
            command.args([format!("--setuid={uid}"), format!("--setgid={uid}")]);
        }
        command
    }

    /// Returns the namespace's `/`, as a path of this process.
    fn root(&self) -> PathBuf {
        format!("/proc/{}/root", self.keeper.id()).into()
    }

    fn places(&self) -> impl Iterator<Item = PathBuf> {
        self.places.iter().map(|place| self.root().join(place.strip_prefix("/").expect("absolute")))
    }

    /// Leaves no room for a byte or a file.
    fn fill(&self) {
        for place in self.places() {
            let directory = place.join("filler");
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

    fn make_room(&self) {
        for place in self.places() {
            fs::remove_dir_all(place.join("filler")).expect("it can be removed");
        }
    }

    fn remount(&self, how: &str) {
        for place in &self.places {
            let mut mount = self.command(0);
            mount.args(["mount", "-o"]).arg(format!("remount,{how}")).arg(place);
            // A process that has just ended may still have a file open.
            until("it is mounted anew", || mount.stderr(Stdio::null()).status().is_ok_and(|status| status.success()));
        }
    }

    fn set_modes(&self, mode: u32) {
        for place in self.places() {
            fs::set_permissions(place, Permissions::from_mode(mode)).expect("root may");
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}

/// Returns whether a thread of the holder uses descriptors at any moment, so that closing them is never safe.
fn is_renewed(kind: Kind) -> bool {
    let is_renewed = kind.name().starts_with("lease");
    if is_renewed {
        crate::left_out("the heartbeat may be using the descriptors that are closed");
    }
    is_renewed
}

/// The signals per second.
const GUSTS: u32 = 1000;

/// Signals this process at the rate `GUSTS`, as long as it lives. Each signal interrupts a running system call, because
/// its handler is set without `SA_RESTART`.
pub fn raise_a_storm() {
    use nix::sys::signal::{SaFlags, SigAction, SigEvent, SigHandler, SigSet, SigevNotify, Signal, sigaction};
    use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
    static FELT: AtomicU32 = AtomicU32::new(0);
    extern "C" fn feel(_: i32) {
        FELT.fetch_add(1, Ordering::Relaxed);
    }
    let action = SigAction::new(SigHandler::Handler(feel), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler only counts in an atomic, which is allowed at any moment.
    unsafe { sigaction(Signal::SIGALRM, &action) }.expect("a handler can be set");
    let event = SigEvent::new(SigevNotify::SigevSignal { signal: Signal::SIGALRM, si_value: 0 });
    let mut timer = Timer::new(nix::time::ClockId::CLOCK_MONOTONIC, event).expect("a timer");
    let every = Expiration::Interval((Duration::from_secs(1) / GUSTS).into());
    timer.set(every, TimerSetTimeFlags::empty()).expect("it can be set");
    // A drop would end the timer.
    std::mem::forget(timer);
    until("the storm is felt", || FELT.load(Ordering::Relaxed) > 10);
}

fn stormed(spec: &Spec, arguments: &[&str]) -> Command {
    let mut command = Command::new(program("actor"));
    command.arg("stormed").arg(spec.invite()).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
    command
}

/// Acquires the lock with none of the three standard descriptors open, so that the lock uses their numbers. Keeps it
/// until there is a file `go`, and acquires it again.
pub fn lock_on_the_standard_descriptors(spec: &Spec, go: &Path) {
    for descriptor in 0..3 {
        nix::unistd::close(descriptor).expect("it was open");
    }
    let lock = spec.open();
    // A process that checks whether the lock is held acquires it for a moment.
    let guard = lock.acquire(&Wait::at_most(crate::LIVELY)).expect("free");
    until("it may go on", || go.exists());
    assert!(spec.rival().acquire(&Wait::at_most(Duration::from_millis(5))).err().expect("held").is_timeout());
    guard.release().expect("it can be released");
    for wait in [Wait::none(), Wait::forever(), Wait::at_most(crate::LIVELY)] {
        drop(spec.open().acquire(&wait).expect("free again"));
    }
}

/// The errors that the manual pages list for the system calls of locks, as far as they can happen. The list omits
/// errors about wrong arguments, and errors about missing objects that exist. It also omits a failing `close`: strace
/// can only prevent the call, and the kernel closes in any case. Actors read their commands with `readv` and answer
/// with `write`, which locks do not use.
const ERRORS: [(&str, &str); 41] = [
    ("accept4", "EINTR ECONNABORTED EMFILE ENFILE ENOBUFS ENOMEM EPERM"),
    ("bind", "EACCES EADDRINUSE ENOMEM"),
    ("chmod", "EACCES EIO ENOMEM EPERM EROFS"),
    ("clock_nanosleep", "EINTR"),
    ("clone", "EAGAIN ENOMEM"),
    ("clone3", "EAGAIN ENOMEM"),
    ("connect", "EACCES EAGAIN ECONNREFUSED EINTR EPERM"),
    ("eventfd2", "EMFILE ENFILE ENOMEM"),
    ("fallocate", "EFBIG EINTR EIO ENOSPC EOPNOTSUPP EPERM"),
    ("fchmod", "EIO EPERM EROFS"),
    ("fcntl", "EACCES EAGAIN EINTR ENOLCK"),
    ("fdatasync", "EDQUOT EINTR EIO ENOSPC EROFS"),
    ("flock", "EAGAIN EINTR ENOLCK"),
    ("fstat", "ENOMEM EOVERFLOW"),
    ("fstatfs", "EINTR EIO ENOMEM ENOSYS"),
    ("fsync", "EDQUOT EINTR EIO ENOSPC EROFS"),
    ("ftruncate", "EFBIG EINTR EIO EPERM EROFS"),
    ("futex", "EAGAIN EINTR ETIMEDOUT"),
    ("getdents64", "ENOENT"),
    ("getsockopt", "ENOMEM"),
    ("inotify_add_watch", "ENOMEM ENOSPC"),
    ("inotify_init1", "EMFILE ENFILE ENOMEM"),
    ("inotify_rm_watch", "EINVAL"),
    ("kill", "EPERM"),
    ("linkat", "EACCES EDQUOT EEXIST EIO EMLINK ENOENT ENOMEM ENOSPC EPERM EROFS"),
    ("listen", "EADDRINUSE EOPNOTSUPP"),
    ("lstat", "EACCES ENOMEM"),
    ("mkdir", "EACCES EDQUOT EEXIST EMLINK ENOMEM ENOSPC EPERM EROFS"),
    ("mmap", "EACCES EAGAIN ENFILE ENODEV ENOMEM EPERM"),
    ("newfstatat", "EACCES ENOMEM"),
    ("open", "EACCES EDQUOT EINTR EMFILE ENFILE ENOMEM ENOSPC EROFS"),
    ("openat", "EACCES EDQUOT EINTR EMFILE ENFILE ENOMEM ENOSPC EROFS"),
    ("poll", "EINTR ENOMEM"),
    ("ppoll", "EINTR ENOMEM"),
    ("pread64", "EINTR EIO"),
    ("pwrite64", "EDQUOT EFBIG EINTR EIO ENOSPC EPERM"),
    ("read", "EINTR EIO"),
    ("readlink", "EACCES EIO ENOMEM"),
    ("recvmsg", "EAGAIN ECONNREFUSED EINTR ENOMEM"),
    ("sendmsg", "EAGAIN ECONNRESET EINTR ENOBUFS ENOMEM EPIPE"),
    ("socket", "EACCES EMFILE ENFILE ENOBUFS ENOMEM"),
];
const MORE_ERRORS: [(&str, &str); 13] = [
    ("getsockname", "ENOBUFS"),
    ("ioctl", "ENOTTY"),
    ("recvfrom", "EAGAIN EINTR ENOMEM"),
    ("sendto", "EAGAIN ECONNRESET EINTR ENOBUFS ENOMEM EPIPE"),
    ("setsockopt", "ENOBUFS"),
    ("fgetxattr", "EIO ENODATA ENOMEM EOPNOTSUPP ERANGE"),
    ("fsetxattr", "E2BIG EDQUOT EIO ENOMEM ENOSPC EOPNOTSUPP EPERM ERANGE"),
    ("rename", "EACCES EDQUOT EIO ENOMEM ENOSPC EPERM EROFS"),
    ("renameat2", "EACCES EEXIST EINVAL EIO ENOMEM ENOSPC EPERM EROFS"),
    ("stat", "EACCES ENOMEM"),
    ("statx", "EACCES ENOMEM"),
    ("unlink", "EACCES EBUSY EIO ENOMEM EPERM EROFS"),
    ("unlinkat", "EACCES EBUSY EIO ENOMEM EPERM EROFS"),
];

/// The number of calls with one name that fail once each, counted from the first.
const CALLS: usize = 6;

/// strace(1), attached to all threads of an actor.
pub struct Strace {
    strace: Child,
    log: PathBuf,
    _directory: tempfile::TempDir,
}

impl Strace {
    /// Attaches strace; `options` select the failures.
    pub fn attach(actor: &Actor, options: &[String]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let log = directory.path().join("log");
        let mut strace = Command::new("strace");
        strace.args(["-f", "-qq", "-s", "0", "-o"]).arg(&log).args(options).arg("-p").arg(actor.pid().to_string());
        let strace = strace.stderr(Stdio::null()).spawn().expect("strace");
        let is_traced = |task: fs::DirEntry| {
            let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
            !status.contains("TracerPid:\t0\n")
        };
        until("every thread is traced", || {
            let mut tasks = fs::read_dir(format!("/proc/{}/task", actor.pid())).into_iter().flatten().flatten();
            tasks.all(is_traced)
        });
        Self { strace, log, _directory: directory }
    }

    /// Returns the log so far.
    pub fn so_far(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Detaches strace, and returns the log.
    pub fn end(&mut self) -> String {
        signal_pid(self.strace.id(), Signal::TERM);
        // strace may wait for the remains of an ended process that only this process can reap.
        let end = Instant::now() + Duration::from_secs(2);
        while self.strace.try_wait().is_ok_and(|ended| ended.is_none()) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        let _ = self.strace.kill();
        let _ = self.strace.wait();
        self.so_far()
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        let _ = self.strace.kill();
        let _ = self.strace.wait();
    }
}

/// Returns whether strace(1) is installed and may inject failures. Reports a test as left out where it may not.
pub fn calls_can_fail() -> bool {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-o", "/dev/null", "-e", "inject=flock:error=EINTR", "true"]).stderr(Stdio::null());
    let can = strace.status().is_ok_and(|status| status.success());
    if !can {
        crate::left_out("strace is not here, or may not trace");
    }
    can
}

/// Returns the lock's system calls of the thread `thread` in `log`: the name, and the index among calls with that name.
fn calls(log: &str, thread: u32) -> Vec<(String, usize)> {
    let mut counts = std::collections::HashMap::new();
    let mut calls = Vec::new();
    for line in log.lines() {
        let Some((pid, call)) = line.split_once(' ') else { continue };
        let Some((name, arguments)) = call.trim_start().split_once('(') else { continue };
        if pid != thread.to_string() || name.contains(' ') {
            continue;
        }
        let count = counts.entry(name.to_owned()).or_insert(0);
        *count += 1;
        let is_a_locks = match name {
            // Private memory of the process is not part of the lock.
            "mmap" => arguments.contains("MAP_SHARED"),
            "fcntl" => arguments.contains("F_OFD_"),
            "futex" => arguments.contains("FUTEX_WAIT"),
            _ => true,
        };
        if is_a_locks && *count <= CALLS {
            calls.push((name.to_owned(), *count));
        }
    }
    calls
}

fn errors(name: &str) -> impl Iterator<Item = &'static str> {
    let known = ERRORS.iter().chain(&MORE_ERRORS).filter(move |(known, _)| *known == name);
    known.flat_map(|(_, errors)| errors.split(' '))
}

/// The name of the call that fails once, its index from the first, and the error.
type Fault = (String, usize, &'static str);

/// Returns the strace options for a fault.
fn injection(fault: Option<&Fault>) -> Vec<String> {
    fault.map_or(vec![], |(name, at, error)| {
        vec!["-e".to_owned(), format!("trace={name}"), format!("-einject={name}:error={error}:when={at}")]
    })
}

/// Checks a file lock whose first flock fails on a file that its process has just created, while another process holds
/// the lock. The other process keeps the lock.
pub fn fail_flock_with_other_holder(error: &str) {
    if !calls_can_fail() {
        return;
    }
    let spec = Kind::FILE.fresh();
    let [mut victim, mut holder] = [(); 2].map(|()| Actor::start(&spec));
    // During the delay the holder acquires.
    let options = ["-e".to_owned(), "trace=flock".to_owned(), format!("-einject=flock:error={error}:delay_enter=1s")];
    let mut strace = Strace::attach(&victim, &options);
    victim.tell("try");
    until("the file is there", || Path::new(spec.at()).exists());
    holder.expect("lock", "held");
    let answer = victim.answer();
    assert!(answer.starts_with("error Io"), "{answer}");
    strace.end();
    let answer = victim.ask("try");
    assert!(answer.starts_with("error Held"), "two are inside after {error}: {answer}");
    holder.expect("release", "released");
    all_get_in(&mut [&mut victim, &mut holder]);
    spec.clean();
}

/// Checks a file lock whose flock fails as on a file system without flock. The newly created file is removed.
pub fn fail_flock_on_a_new_file(error: &str) {
    if !calls_can_fail() {
        return;
    }
    let spec = Kind::FILE.fresh();
    let mut victim = Actor::start(&spec);
    let options = ["-e".to_owned(), "trace=flock".to_owned(), format!("-einject=flock:error={error}")];
    let mut strace = Strace::attach(&victim, &options);
    let answer = victim.ask("try");
    assert!(answer.starts_with("error "), "{answer}");
    assert!(!Path::new(spec.at()).exists());
    fs::write(spec.at(), "another's").expect("room");
    let answer = victim.ask("try");
    assert!(answer.starts_with("error "), "{answer}");
    assert_eq!(fs::read_to_string(spec.at()).expect("it stays"), "another's");
    strace.end();
    spec.clean();
}

/// The result of one run.
struct Round<L> {
    /// The strace log.
    log: String,
    /// The thread whose calls fail.
    thread: u32,
    /// The state afterwards.
    left: L,
}

/// Runs the scenario once without a fault, and then once for each error of each system call in the log. The scenario
/// checks its invariants, and the state afterwards must be the same each time.
fn fail_each_call<L: PartialEq + std::fmt::Debug + Sync>(what: &str, play: impl Fn(Option<&Fault>) -> Round<L> + Sync) {
    if !calls_can_fail() {
        return;
    }
    let sound = play(None);
    let calls = calls(&sound.log, sound.thread);
    let faults: Vec<Fault> =
        calls.iter().flat_map(|(name, at)| errors(name).map(|error| (name.clone(), *at, error))).collect();
    let names: BTreeSet<&str> = calls.iter().map(|(name, _)| name.as_str()).collect();
    println!("{what}: {} faults in {}", faults.len(), Vec::from_iter(names).join(" "));
    // Between processes a lock in shared memory may need no system call.
    assert!(!faults.is_empty() || what == "shm", "hardly a system call: {}", sound.log);
    let (next, failures) = (Mutex::new(faults.iter()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let Some(fault) = next.lock().expect("no panic with it").next() else { return };
                    let attempt = || assert_eq!(play(Some(fault)).left, sound.left, "with {fault:?}");
                    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(attempt)).is_err() {
                        failures.lock().expect("no panic with it").push(fault);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().expect("no panic with it");
    assert!(failures.is_empty(), "{what} does not stand these faults: {failures:?}");
}

/// The belongings of an actor, and the files.
type Left = (Belongings, BTreeSet<String>);

/// The actions of a traced victim and of another process. The victim answers every command.
type Play = fn(victim: &mut Actor, other: &mut Actor);

fn play_with_a_lock(kind: Kind, play: Play, fault: Option<&Fault>) -> Round<Left> {
    play_with(&kind.fresh(), play, fault)
}

fn play_with(spec: &Spec, play: Play, fault: Option<&Fault>) -> Round<Left> {
    let [mut victim, mut other] = [(); 2].map(|()| Actor::start(spec));
    // The actor has read this command, so it now waits for the next one.
    for actor in [&mut victim, &mut other] {
        actor.expect("owner", "owner none");
    }
    let mut strace = Strace::attach(&victim, &injection(fault));
    play(&mut victim, &mut other);
    let log = strace.end();
    all_get_in(&mut [&mut other, &mut victim]);
    // Some locks keep a descriptor from one wait for the next.
    other.expect(TAKE, "held");
    victim.tell_to_wait(TAKE);
    other.expect("release", "released");
    assert_eq!(victim.answer(), "held");
    victim.expect("release", "released");
    let name = |path: String| path.replace(&*Path::new(spec.at()).file_name().expect("a name").to_string_lossy(), "*");
    let left = (Belongings::of(victim.pid()), files(spec, Path::new("/")).into_iter().map(name).collect());
    spec.clean();
    Round { log, thread: victim.pid(), left }
}

/// A victim creates a table, or opens it where `is_there`, and allocates, locks, unlocks and frees.
fn play_with_a_table(kind: managers::Kind, is_there: bool, fault: Option<&Fault>) -> Round<(Belongings, Option<u32>)> {
    let table = kind.fresh();
    if is_there {
        drop(table.open());
    }
    let mut victim = Actor::start_at(&table);
    victim.expect(&format!("kill-at {}", usize::MAX), "armed");
    let mut strace = Strace::attach(&victim, &injection(fault));
    let works = |answer: &str| {
        assert!(!answer.is_empty() && answer != "gone", "it answers whatever happens");
        !answer.starts_with("error ")
    };
    let answer = victim.ask("allocate");
    let id = works(&answer).then(|| answer.strip_prefix("allocated ").expect("a number").to_owned());
    if let Some(id) = &id {
        if works(&victim.ask(&format!("try {id}"))) {
            works(&victim.ask(&format!("release {id}")));
        }
        works(&victim.ask(&format!("free {id}")));
    }
    let log = strace.end();
    // No process holds it any more. A lock whose free failed can be freed now, and an unallocated lock does not exist.
    if let Some(id) = &id {
        match victim.ask(&format!("try {id}")) {
            held if held == "held" => victim.expect(&format!("release {id}"), "ok"),
            answer => assert!(answer.starts_with("error NotAllocated"), "{answer}"),
        }
        let answer = victim.ask(&format!("free {id}"));
        assert!(answer == "ok" || answer.starts_with("error NotAllocated"), "{answer}");
    }
    let mut other = Actor::start_at(&table);
    for actor in [&mut victim, &mut other] {
        let answer = actor.ask("allocate");
        let id = answer.strip_prefix("allocated ").unwrap_or_else(|| panic!("{answer}"));
        actor.expect(&format!("try {id}"), "held");
        actor.expect(&format!("release {id}"), "ok");
        actor.expect(&format!("free {id}"), "ok");
    }
    if kind == managers::Kind::Directory {
        assert_eq!(table.lock_files(), BTreeSet::new(), "what is free has no file");
    }
    let left = (Belongings::of(victim.pid()), table.open().available().expect("it can be counted"));
    table.clean();
    Round { log, thread: victim.pid(), left }
}

/// A victim holds a lease while the calls of its heartbeat thread fail. No process loses anything by that.
fn play_with_a_heartbeat(fault: Option<&Fault>) -> Round<Left> {
    let directory = tempfile::tempdir().expect("a directory");
    let mut terms = Terms::of(directory.path().join("lease"));
    (terms.ttl, terms.heartbeat) = (10_000, 20);
    let mut victim = Actor::start_lease(&terms);
    assert!(victim.ask("try").starts_with("held "));
    let lease = terms.open();
    let record = || match lease.status().expect("it can be read") {
        LeaseStatus::Held(seen) => Some(seen.revision()),
        _ => None,
    };
    let mut strace = Strace::attach(&victim, &injection(fault));
    for _ in 0..=CALLS {
        let before = record();
        until("it beats", || record() != before);
    }
    let log = strace.end();
    victim.expect("is-held", "yes");
    assert!(lease.try_lock().expect_err("it is held").is_held());
    victim.expect("release", "released");
    victim.expect("losses", "losses");
    assert!(lease.try_lock().expect("it is free").recovered().is_none());
    assert!(victim.ask("try").starts_with("held "));
    victim.expect("release", "released");
    let beats = |line: &&str| line.contains("pwrite64(") && !line.starts_with(&format!("{} ", victim.pid()));
    let thread = log.lines().find(beats).and_then(|line| line.split(' ').next()?.parse().ok());
    let names = fs::read_dir(directory.path()).expect("a directory").flatten();
    let left = names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    Round { log, thread: thread.unwrap_or_default(), left: (Belongings::of(victim.pid()), left) }
}

/// Makes each system call that creates or opens a table, or allocates or frees its locks, fail once.
pub fn fail_each_call_of_a_table(kind: managers::Kind) {
    for is_there in [false, true] {
        fail_each_call(&format!("{kind:?}, a table that is there: {is_there}"), |fault| {
            play_with_a_table(kind, is_there, fault)
        });
    }
}

/// Makes each system call fail once in an acquisition that takes over a stale pidfile.
pub fn fail_each_call_of_a_takeover() {
    let play = |victim: &mut Actor, other: &mut Actor| {
        if victim.ask("try").starts_with("held") {
            assert!(other.ask("try").starts_with("error Held"));
            let answer = victim.ask("release");
            assert!(answer == "released" || answer.starts_with("error "), "{answer}");
        }
        // The takeover happens now, if it did not happen before.
        assert!(other.ask(TAKE).starts_with("held"));
        other.expect("release", "released");
    };
    for said in ["4194304\n", "\n"] {
        fail_each_call("a takeover", |fault| {
            let spec = Kind::PIDFILE.fresh();
            fs::write(spec.at(), said).expect("a file");
            play_with(&spec, play, fault)
        });
    }
}

/// Makes each system call of a heartbeat fail once.
pub fn fail_each_call_of_a_heartbeat() {
    fail_each_call("a heartbeat", play_with_a_heartbeat);
}

/// Checks that the victim has answered that it holds the lock, and does hold it, or has answered with an error.
fn holds(answer: &str, other: &mut Actor) -> bool {
    if answer == "held" {
        let answer = other.ask("try");
        assert!(answer.starts_with("error Held"), "two are inside: {answer}");
    } else {
        assert!(answer.starts_with("error "), "{answer}");
    }
    answer == "held"
}

fn play_alone(victim: &mut Actor, other: &mut Actor) {
    for way in ["try", "lock"] {
        let answer = victim.ask(way);
        if holds(&answer, other) {
            let answer = victim.ask("release");
            assert!(answer == "released" || answer.starts_with("error "), "{answer}");
        }
    }
}

fn play_passed_on(victim: &mut Actor, other: &mut Actor) {
    other.expect(TAKE, "held");
    victim.tell("lock");
    let mut answer = None;
    until("the victim waits, or has an answer", || {
        answer = victim.answered();
        answer.is_some() || victim.waits()
    });
    other.expect("release", "released");
    let answer = answer.unwrap_or_else(|| victim.answer());
    if holds(&answer, other) {
        other.tell_to_wait(TAKE);
        let answer = victim.ask("release");
        assert!(answer == "released" || answer.starts_with("error "), "{answer}");
        assert_eq!(other.answer(), "held");
        other.expect("release", "released");
    }
}

#[allow(missing_docs)] // Their names are sentences.
mod cases {
    use super::*;

    pub fn a_limit_of_file_sizes_is_an_error_or_does_not_matter(kind: Kind) {
        for most in [0, 50] {
            let spec = kind.fresh();
            let mut limited = start_without_sigxfsz(&spec);
            let mut other = Actor::start(&spec);
            limited.expect("owner", "owner none");
            limit(&limited, Resource::Fsize, Some(most));
            let held = ask_in_every_way(&mut limited, &["File too large"]);
            println!("{kind:?}, no file longer than {most}: held {held} times of {}", WAYS.len());
            all_get_in(&mut [&mut other]);
            limit(&limited, Resource::Fsize, None);
            all_get_in(&mut [&mut limited, &mut other]);
            // This also holds for a process that holds the lock already.
            limited.expect("lock", "held");
            limit(&limited, Resource::Fsize, Some(most));
            is_released_or_says(&limited.ask("release"), &["File too large"]);
            limit(&limited, Resource::Fsize, None);
            all_get_in(&mut [&mut other, &mut limited]);
            assert_eq!(files(&spec, Path::new("/")), files_of_an_ordinary_use(kind, &spec));
            spec.clean();
        }
    }

    pub fn a_process_that_a_limit_of_file_sizes_ends_holds_nothing(kind: Kind) {
        let spec = kind.fresh();
        let [mut limited, mut other] = [(); 2].map(|()| Actor::start(&spec));
        limited.expect("owner", "owner none");
        limit(&limited, Resource::Fsize, Some(0));
        let answer = limited.ask("try");
        println!("{kind:?}, SIGXFSZ as it is by default: {answer}");
        assert!(answer == "held" || answer == "gone", "{answer}");
        limited.kill();
        let next = other.ask(TAKE);
        assert!(next == "held" || next == conformance::told(kind, limited.pid()), "{next}");
        other.expect("release", "released");
        all_get_in(&mut [&mut other, &mut Actor::start(&spec)]);
        spec.clean();
    }

    pub fn a_limit_of_processes_is_an_error_or_does_not_matter(kind: Kind) {
        let Some(user) = another_user() else { return };
        let spec = kind.fresh();
        let [mut limited, mut other] = [(); 2].map(|()| Actor::start_as(&spec, user.uid));
        limited.expect("owner", "owner none");
        other.expect("owner", "owner none");
        limited.expect("limit-threads 0", "limited");
        let held = ask_in_every_way(&mut limited, &["Resource temporarily unavailable"]);
        println!("{kind:?}, no further process: held {held} times of {}", WAYS.len());
        all_get_in(&mut [&mut other]);
        limited.expect("limit-threads all", "limited");
        all_get_in(&mut [&mut limited, &mut other]);
        limited.expect("lock", "held");
        limited.expect("limit-threads 0", "limited");
        limited.expect("release", "released");
        all_get_in(&mut [&mut other]);
        spec.clean();
    }

    pub fn a_full_file_system_is_an_error_or_does_not_matter(kind: Kind) {
        let Some(world) = World::new() else { return };
        let spec = kind.fresh();
        // The processes of a table have it open. All others have yet to create their files.
        let [mut one, mut other] = [(); 2].map(|()| world.start(&spec, 0));
        one.expect("owner", "owner none");
        other.expect("owner", "owner none");
        let before = files(&spec, &world.root());
        world.fill();
        let full = &["No space left on device"];
        let held = ask_in_every_way(&mut one, full);
        println!("{kind:?}, no room: held {held} times of {}", WAYS.len());
        if held == 0 {
            assert_eq!(files(&spec, &world.root()), before, "nothing half made");
        }
        world.make_room();
        all_get_in(&mut [&mut one, &mut other]);
        one.expect("lock", "held");
        world.fill();
        is_released_or_says(&one.ask("release"), full);
        ask_in_every_way(&mut other, full);
        world.make_room();
        all_get_in(&mut [&mut other, &mut one]);
    }

    pub fn a_read_only_file_system_is_an_error_or_does_not_matter(kind: Kind) {
        let Some(world) = World::new() else { return };
        unwritable(kind, &world, 0, || world.remount("ro"), || world.remount("rw"), "Read-only file system");
    }

    pub fn unwritable_directory_fails_or_has_no_effect(kind: Kind) {
        let (Some(world), Some(user)) = (World::new(), another_user()) else { return };
        let (close, open) = (|| world.set_modes(0o755), || world.set_modes(0o1777));
        unwritable(kind, &world, user.uid, close, open, "Permission denied");
    }

    /// Checks that an actor that starts when no file can be created gets an error, if it needs a file, and acquires
    /// afterwards.
    fn unwritable(kind: Kind, world: &World, uid: u32, harm: impl Fn(), heal: impl Fn(), because: &str) {
        let spec = kind.fresh();
        harm();
        let mut early = world.start(&spec, uid);
        let opened = early.ask("owner");
        if opened == "gone" {
            // The actor must have its table from the start.
            assert!(["shm", "directory"].contains(&kind.name()), "{kind:?} is opened without files");
        } else {
            let held = ask_in_every_way(&mut early, &[because]);
            println!("{kind:?}, {because}: held {held} times of {}", WAYS.len());
            assert!(held == WAYS.len() || held == 0, "each time the same");
        }
        // Its open files would prevent the remount of the file system.
        drop(early);
        heal();
        let [mut one, mut other] = [(); 2].map(|()| world.start(&spec, uid));
        all_get_in(&mut [&mut one, &mut other]);
        drop((one, other));
        // The existing state is unchanged. Whether it can be locked is a separate question.
        harm();
        let mut late = world.start(&spec, uid);
        if late.ask("owner") != "gone" {
            let held = ask_in_every_way(&mut late, &[because]);
            println!("{kind:?}, {because}, all made before: held {held} times of {}", WAYS.len());
        }
        drop(late);
        heal();
        let [mut one, mut other] = [(); 2].map(|()| world.start(&spec, uid));
        all_get_in(&mut [&mut one, &mut other]);
    }

    pub fn waiters_get_in_give_up_and_see_deaths_in_a_storm_of_signals(kind: Kind) {
        let spec = kind.fresh();
        let mut holder = Actor::start(&spec);
        let mut waiter = Actor::start_with(&spec, |command| *command = stormed(&spec, &[]));
        all_get_in(&mut [&mut holder, &mut waiter]);
        holder.expect("lock", "held");
        let mut before = None;
        for span in [1, 30, 300] {
            let start = Instant::now();
            let answer = waiter.ask(&format!("lock-for {span}"));
            assert!(answer.starts_with("error Timeout"), "{answer}");
            assert!(start.elapsed() >= Duration::from_millis(span), "it gave up before its time");
        }
        for way in ["lock", "lock-for 20000", "lock"] {
            waiter.tell_to_wait(way);
            holder.expect("release", "released");
            assert_eq!(waiter.answer(), "held");
            assert!(holder.ask("try").starts_with("error Held"));
            holder.tell_to_wait("lock");
            waiter.expect("release", "released");
            assert_eq!(holder.answer(), "held");
            let now = Belongings::of(waiter.pid());
            assert_eq!(before.get_or_insert_with(|| Belongings::of(waiter.pid())), &now);
        }
        for way in ["lock", "lock-for 20000"] {
            waiter.tell_to_wait(way);
            holder.kill();
            assert_eq!(waiter.answer(), conformance::told(kind, holder.pid()));
            waiter.expect("release", "released");
            holder = Actor::start(&spec);
            holder.expect("lock", "held");
        }
        spec.clean();
    }

    pub fn a_crowd_in_a_storm_of_signals_counts_without_losing_one(kind: Kind) {
        let spec = kind.fresh();
        let directory = tempfile::tempdir().unwrap();
        let counter = directory.path().join("counter");
        fs::write(&counter, "0").unwrap();
        let counter_text = counter.display().to_string();
        let workers: Vec<_> =
            (0..5).map(|_| stormed(&spec, &["stress", &counter_text, "60"]).spawn().unwrap()).collect();
        for mut worker in workers {
            assert!(worker.wait().unwrap().success());
        }
        assert_eq!(fs::read_to_string(counter).unwrap(), "300");
        assert_eq!(files(&spec, Path::new("/")), files_of_an_ordinary_use(kind, &spec));
        spec.clean();
    }

    pub fn the_standard_descriptors_are_locks_like_any_other(kind: Kind) {
        let spec = kind.fresh();
        let directory = tempfile::tempdir().unwrap();
        let go = directory.path().join("go");
        let mut closed = Command::new(program("actor"));
        closed.arg(spec.invite()).arg("closed").arg(&go);
        let mut closed = closed.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let mut other = Actor::start(&spec);
        until("it is inside", || {
            let ended = closed.try_wait().unwrap();
            assert_eq!(ended, None, "it ended before it was told to");
            match other.ask("try") {
                held if held == "held" => {
                    other.expect("release", "released");
                    false
                }
                answer => answer.starts_with("error Held"),
            }
        });
        fs::write(&go, "").unwrap();
        assert!(closed.wait().unwrap().success());
        all_get_in(&mut [&mut other]);
        assert_eq!(files(&spec, Path::new("/")), files_of_an_ordinary_use(kind, &spec));
        spec.clean();
    }

    pub fn c7_drop_after_close_range_keeps_other_files(kind: Kind) {
        if is_renewed(kind) {
            return;
        }
        for end in ["release", "drop"] {
            let spec = kind.fresh();
            let mut victim = Actor::start(&spec);
            // The second round uses the resources that the first one kept.
            for _ in 0..2 {
                victim.expect("lock", "held");
                victim.expect("release", "released");
            }
            victim.expect("lock", "held");
            victim.expect("close-all", "closed");
            victim.expect("fork-others", "kept");
            match end {
                "release" => {
                    let answer = victim.ask("release");
                    assert!(answer == "released" || answer.contains("closed the descriptor"), "{answer}");
                }
                _ => {
                    victim.expect("set-aside", "aside");
                    victim.expect("drop-aside", "dropped");
                }
            }
            victim.expect("others", "kept");
            victim.expect("fork-others", "kept");
            assert!(victim.finish().success());
            spec.clean();
        }
    }

    pub fn c7_lock_after_close_range_excludes_others(kind: Kind) {
        if is_renewed(kind) {
            return;
        }
        for is_held in [false, true] {
            let spec = kind.fresh();
            let [mut victim, mut other] = [(); 2].map(|()| Actor::start(&spec));
            victim.expect("lock", "held");
            if !is_held {
                victim.expect("release", "released");
            }
            victim.expect("close-all", "closed");
            victim.ask("release");
            if kind.name() == "shm" {
                // A process that has closed the descriptor of its slot looks dead to others until it attaches again.
                victim.expect("reopen", "open");
            }
            for way in WAYS {
                assert!(victim.ask(way).starts_with("held"), "{way}");
                let answer = other.ask("try");
                assert!(answer.starts_with("error Held"), "{answer}");
                victim.expect("others", "kept");
                victim.expect("release", "released");
                victim.expect("others", "kept");
            }
            all_get_in(&mut [&mut other, &mut victim]);
            // Another holder's lock does not prevent the detection, and no wait ends through another file.
            other.expect("lock", "held");
            victim.expect("close-all", "closed");
            if kind.name() == "shm" {
                victim.expect("reopen", "open");
            }
            let answer = victim.ask("lock-for 50");
            assert!(answer.starts_with("error Timeout"), "{answer}");
            other.expect("release", "released");
            all_get_in(&mut [&mut victim, &mut other]);
            victim.expect("others", "kept");
            spec.clean();
        }
    }

    pub fn c7_token_after_close_range_still_cancels(kind: Kind) {
        // A process that has closed the descriptor of its slot looks dead to others.
        if is_renewed(kind) || kind.name() == "shm" {
            return;
        }
        let spec = kind.fresh();
        let [mut holder, mut waiter] = [(); 2].map(|()| Actor::start(&spec));
        holder.expect("lock", "held");
        waiter.expect("close-token", "error Timeout, error Timeout, error Cancelled");
        waiter.expect("others", "kept");
        holder.expect("release", "released");
        spec.clean();
    }

    pub fn c7_drop_of_closed_guard_keeps_next_lock(kind: Kind) {
        // These belong to the process for as long as it lives, whatever it closes.
        if is_renewed(kind) || ["pidfile", "shm"].contains(&kind.name()) {
            return;
        }
        let spec = kind.fresh();
        let [mut victim, mut other] = [(); 2].map(|()| Actor::start(&spec));
        victim.expect("lock", "held");
        victim.expect("close-all", "closed");
        victim.expect("spare-others", "spared");
        victim.expect("set-aside", "aside");
        // Mostly by the same numbers.
        assert!(victim.ask(TAKE).starts_with("held"));
        victim.expect("drop-aside", "dropped");
        let answer = other.ask("try");
        assert!(answer.starts_with("error Held"), "{answer}");
        victim.expect("release", "released");
        all_get_in(&mut [&mut other, &mut victim]);
        spec.clean();
    }

    pub fn lock_has_crash_point_between_any_two_changes(kind: Kind) {
        crash_points::stand_between_changes(kind);
    }

    pub fn any_system_call_may_fail_once_without_contention(kind: Kind) {
        fail_each_call(kind.name(), |fault| play_with_a_lock(kind, play_alone, fault));
    }

    pub fn any_system_call_may_fail_once_when_the_lock_is_passed_on(kind: Kind) {
        fail_each_call(kind.name(), |fault| play_with_a_lock(kind, play_passed_on, fault));
    }
}
pub use cases::*;
