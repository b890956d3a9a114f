//! What the system owes a lock, and does not give it: room, files, processes, a sleep that nothing interrupts, and each
//! single system call.
//!
//! In every case whoever asks is answered, with the lock or with an error that says what is missing; nobody is inside
//! beside the holder; and once all is well again the same process gets in, and another, which is told of no death, for
//! nobody died. [`fault_injection!`](crate::fault_injection!) makes a test of each case for one kind.

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

/// Every way of asking for a lock that nobody has.
const WAYS: [&str; 3] = ["try", "lock", "lock-for 1000"];

/// How long a taker gets: also a lease that could not be given back is given back by then.
const TAKE: &str = "lock-for 10000";

/// Asks in every way, and sees that each is answered with the lock or an error that says one of `because`. Says how
/// often it was the lock.
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

/// Each gets in, in turn, and keeps the others out. Nobody died, so nobody is told of a death.
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

/// The files of a lock, of whatever kind: all whose names have that of the lock in it, where locks leave files, and all
/// that are in the directory that it is. Below `root`, which is another one in another mount namespace.
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

/// The files that one ordinary use of such a lock leaves, with the name of `spec` for its own.
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

/// Files of a program that has closed all descriptors from 3 on, with these numbers: each locked through the descriptor.
#[derive(Default)]
pub struct Others(Vec<(fs::File, u64)>);

impl Others {
    /// So many numbers that a lock had are among them.
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

    /// Leaves the numbers to whatever takes them.
    pub fn forget(self) {
        self.0.into_iter().for_each(|(file, _)| std::mem::forget(file));
    }

    /// Whether they are still what the numbers mean, and say the same.
    pub fn are_open(&self) -> &'static str {
        let is_open = |(file, inode): &(fs::File, u64)| {
            let mut bytes = [0; 7];
            let read = file.read_at(&mut bytes, 0);
            file.metadata().is_ok_and(|found| found.ino() == *inode)
                && read.is_ok_and(|read| &bytes[..read] == b"others")
        };
        if self.0.iter().all(is_open) { "kept" } else { "error another file, or another text" }
    }

    /// Whether they are also still locked.
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

/// Lets the user of this process have no more than `most` threads, or `all` that are allowed. Means nothing to root.
pub fn limit_threads(most: &str) {
    let mut limit = getrlimit(Resource::Nproc);
    limit.current = most.parse().ok().or(limit.maximum);
    setrlimit(Resource::Nproc, limit).expect("not above the highest");
}

/// An actor that is not killed by a write beyond the limit, but told.
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
    /// Ends it.
    _stays: ChildStdin,
    places: Vec<PathBuf>,
}

impl World {
    /// Makes one, or says why that cannot be.
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

    /// An actor in there, as root or another user.
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

    /// What is `/` in there, seen from here.
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
            // Somebody who has just ended may still have a file open.
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

/// Whether a thread of the holder uses descriptors at any moment, so that closing them is never safe.
fn is_renewed(kind: Kind) -> bool {
    let is_renewed = kind.name().starts_with("lease");
    if is_renewed {
        crate::left_out("the heartbeat may be using the descriptors that are closed");
    }
    is_renewed
}

/// How often a second the storm comes.
const GUSTS: u32 = 1000;

/// Signals this process at `GUSTS`, for as long as it lives. Each interrupts the system call that it falls into: its
/// handler is set without `SA_RESTART`.
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
    // Dropping it would end it.
    std::mem::forget(timer);
    until("the storm is felt", || FELT.load(Ordering::Relaxed) > 10);
}

fn stormed(spec: &Spec, arguments: &[&str]) -> Command {
    let mut command = Command::new(program("actor"));
    command.arg("stormed").arg(spec.invite()).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
    command
}

/// Takes the lock with none of the three standard descriptors open, so that the lock has them; keeps it until there is
/// a file `go`; and takes it again.
pub fn lock_on_the_standard_descriptors(spec: &Spec, go: &Path) {
    for descriptor in 0..3 {
        nix::unistd::close(descriptor).expect("it was open");
    }
    let lock = spec.open();
    // Whoever looks whether it is inside takes it for a moment.
    let guard = lock.acquire(&Wait::at_most(crate::LIVELY)).expect("free");
    until("it may go on", || go.exists());
    assert!(spec.rival().acquire(&Wait::at_most(Duration::from_millis(5))).err().expect("held").is_timeout());
    guard.release().expect("it can be released");
    for wait in [Wait::none(), Wait::forever(), Wait::at_most(crate::LIVELY)] {
        drop(spec.open().acquire(&wait).expect("free again"));
    }
}

/// The errors that the manual pages list for the system calls of locks, as far as they can happen there: not those that
/// speak of wrong arguments, nor those that say that nothing is there which is. A `close` that fails is left out, for
/// strace can only keep it from being done, and the kernel closes whatever it says of it. Actors get their commands with
/// `readv` and answer with `write`, which locks do not use.
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

/// Of how many calls of one name each fails once, counted from the first.
const CALLS: usize = 6;

/// strace(1) at an actor, at all its threads.
pub struct Strace {
    strace: Child,
    log: PathBuf,
    _directory: tempfile::TempDir,
}

impl Strace {
    /// Attaches it; `options` say what fails.
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

    /// What it has seen.
    pub fn so_far(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Detaches it, and gives what it saw.
    pub fn end(&mut self) -> String {
        signal_pid(self.strace.id(), Signal::TERM);
        // It may wait for the rest of a process that has ended, and that nobody but us can take away.
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

/// Whether there is strace(1), and it may make system calls fail; with a word on it where not.
pub fn calls_can_fail() -> bool {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-o", "/dev/null", "-e", "inject=flock:error=EINTR", "true"]).stderr(Stdio::null());
    let can = strace.status().is_ok_and(|status| status.success());
    if !can {
        crate::left_out("strace is not here, or may not trace");
    }
    can
}

/// The system calls of the thread `thread` in `log` that are a lock's: name, and which of that name.
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
            // Memory of the process is not the lock's affair.
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

/// Which call of a name fails once, counted from the first, and with what.
type Fault = (String, usize, &'static str);

/// What strace is to do for a fault.
fn injection(fault: Option<&Fault>) -> Vec<String> {
    fault.map_or(vec![], |(name, at, error)| {
        vec!["-e".to_owned(), format!("trace={name}"), format!("-einject={name}:error={error}:when={at}")]
    })
}

/// A file lock's first flock fails, on a file that its process has just made, while another process holds the lock. That
/// one keeps it.
pub fn fail_flock_with_other_holder(error: &str) {
    if !calls_can_fail() {
        return;
    }
    let spec = Kind::FILE.fresh();
    let [mut victim, mut holder] = [(); 2].map(|()| Actor::start(&spec));
    // The delay is for the holder to come in between.
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

/// A file lock's flock fails as on a file system that has none: the file that was made for it goes.
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

/// What came of playing once.
struct Round<L> {
    /// What strace saw.
    log: String,
    /// The thread whose calls are to fail.
    thread: u32,
    /// What is left afterwards.
    left: L,
}

/// Plays once and all goes well, and then once for each error of each system call that was seen: it sees to what must
/// hold anyway, and what is left must be the same each time.
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
    // Between processes a lock in shared memory may need none.
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

/// What an actor has, and what files there are.
type Left = (Belongings, BTreeSet<String>);

/// What a victim does while it is traced, and another process beside it. Whatever it is told, it answers.
type Play = fn(victim: &mut Actor, other: &mut Actor);

fn play_with_a_lock(kind: Kind, play: Play, fault: Option<&Fault>) -> Round<Left> {
    play_with(&kind.fresh(), play, fault)
}

fn play_with(spec: &Spec, play: Play, fault: Option<&Fault>) -> Round<Left> {
    let [mut victim, mut other] = [(); 2].map(|()| Actor::start(spec));
    // It has read this, so it is where it reads the next command.
    for actor in [&mut victim, &mut other] {
        actor.expect("owner", "owner none");
    }
    let mut strace = Strace::attach(&victim, &injection(fault));
    play(&mut victim, &mut other);
    let log = strace.end();
    all_get_in(&mut [&mut other, &mut victim]);
    // Some keep a descriptor from one wait for the next.
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

/// A victim makes a table, or opens it where `is_there`, and allocates, locks, unlocks and frees.
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
    // Nobody has it any more. What could not be freed can be now, and what was not allocated is not.
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

/// A victim holds a lease while the calls of its heartbeat thread fail: that costs nobody anything.
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

/// Lets each system call by which a table is made, opened, and its locks allocated and freed fail once.
pub fn fail_each_call_of_a_table(kind: managers::Kind) {
    for is_there in [false, true] {
        fail_each_call(&format!("{kind:?}, a table that is there: {is_there}"), |fault| {
            play_with_a_table(kind, is_there, fault)
        });
    }
}

/// Lets each system call of an acquisition fail once that takes over a stale pidfile.
pub fn fail_each_call_of_a_takeover() {
    let play = |victim: &mut Actor, other: &mut Actor| {
        if victim.ask("try").starts_with("held") {
            assert!(other.ask("try").starts_with("error Held"));
            let answer = victim.ask("release");
            assert!(answer == "released" || answer.starts_with("error "), "{answer}");
        }
        // It is taken over now, if it was not before.
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

/// Lets each system call of a heartbeat fail once.
pub fn fail_each_call_of_a_heartbeat() {
    fail_each_call("a heartbeat", play_with_a_heartbeat);
}

/// Sees that the victim has answered that it holds the lock, and does; or with an error.
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
            // Also for who has it already.
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
        // Those of a table have it open; all others have yet to make their files.
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

    /// An actor that comes when nothing can be made is told so, if it needs anything, and gets in afterwards.
    fn unwritable(kind: Kind, world: &World, uid: u32, harm: impl Fn(), heal: impl Fn(), because: &str) {
        let spec = kind.fresh();
        harm();
        let mut early = world.start(&spec, uid);
        let opened = early.ask("owner");
        if opened == "gone" {
            // The actor must have its table to begin with.
            assert!(["shm", "directory"].contains(&kind.name()), "{kind:?} is opened without files");
        } else {
            let held = ask_in_every_way(&mut early, &[because]);
            println!("{kind:?}, {because}: held {held} times of {}", WAYS.len());
            assert!(held == WAYS.len() || held == 0, "each time the same");
        }
        // What it keeps open would keep the file system from being mounted anew.
        drop(early);
        heal();
        let [mut one, mut other] = [(); 2].map(|()| world.start(&spec, uid));
        all_get_in(&mut [&mut one, &mut other]);
        drop((one, other));
        // What is there stays as it is; whether it can be locked is another question.
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
            // The second time with what the first one kept.
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
            // Another holder's lock is no obstacle to noticing, and no wait ends through another file.
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
        // These are the process's own for as long as it lives, whatever it closes.
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
