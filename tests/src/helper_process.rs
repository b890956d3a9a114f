//! A second process that acquires and releases locks on command: one command per line, one answer per line.
//!
//! | command | answer |
//! |---|---|
//! | `try`, `lock`, `lock-for MS` | `held`, `held recovered PID`, or `error KIND: text` |
//! | `lock-cancelled MS` | the same of a wait that is cancelled after so long |
//! | `release` | `released`, or an error |
//! | `owner` | `owner PID` or `owner none` |
//! | `fork` | `forked PID`: a forked child, alive until it is killed, or for a while |
//! | `fork-drop` | `dropped`: a forked child has dropped its copy of the guard and ended |
//! | `fork-often` | `free`: live children, forked while threads acquired and released the lock, do not keep it |
//! | `spawn` | `spawned PID`: a program started in the ordinary way, alive until it is killed |
//! | `exec` | none: the actor has become another program |
//! | `panic` | `panicked`: a thread acquired the lock and panicked as holder |
//! | `hold-name NAME`, `time-out-name NAME`, `clean-name NAME` | `done`: the same with any named lock |
//! | `use-names N`, `hold-names N` | `done`; `bytes N`: the memory that each of so many locks needs |
//! | `list-behind N` | `listed M`: the locks of `hold-names`, listed with sockets of N waiting connections about |
//! | `close-all` | `closed`: every descriptor from 3 on is closed; other, locked files have those numbers |
//! | `others` | `kept`: those are open and locked; `fork-others` asks a forked child, `spare-others` closes them |
//! | `reopen` | `open`: the lock is opened again |
//! | `set-aside`, `drop-aside` | `aside`, `dropped`: the guard is kept during another acquisition, and dropped |
//! | `use-descriptors` | `used`: no descriptor is left; `free-descriptors` closes those: `freed` |
//! | `limit-threads N`, or `all` | `limited`: its user may have no more threads from now on; has no effect for root |

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel};
use std::time::Duration;

use lockkit::{CancelToken, ErrorKind, Wait};

use crate::fixtures::{AnyGuard, Spec};
use crate::{LIVELY, program};

/// The handle on an actor. Dropping it kills the actor and waits for its end.
pub struct Actor {
    child: Child,
    commands: Option<ChildStdin>,
    answers: Receiver<String>,
    /// The number of commands without an answer so far.
    open: usize,
    /// Whether the actor has announced a request for a lock, and has not yet answered its result.
    asks: Arc<AtomicBool>,
}

/// The line before a request for a lock, where nothing else shows that the process waits.
const ASKS: &str = "asks";

/// Announces a request for a lock, where nothing else shows that a process waits. The process calls it before the
/// request.
pub(crate) fn announce() {
    if !cfg!(target_os = "linux") {
        println!("{ASKS}");
    }
}

impl Actor {
    /// Starts an actor for the lock `spec`.
    pub fn start(spec: &Spec) -> Self {
        Self::start_with(spec, |_| {})
    }

    /// Starts an actor with its command changed by `change`, such as another user or other variables.
    pub fn start_with(spec: &Spec, change: impl FnOnce(&mut Command)) -> Self {
        let mut command = Command::new(program("actor"));
        command.arg(spec.invite()).stdin(Stdio::piped()).stdout(Stdio::piped());
        change(&mut command);
        Self::run(command)
    }

    /// Starts an actor that waits in tasks and gives up at random; see
    /// [`async_conformance::drop_futures_at_random`](crate::async_conformance::drop_futures_at_random).
    pub fn start_tasks(spec: &Spec, flavor: &str, rounds: u32) -> Self {
        Self::start_with(spec, |command| _ = command.args(["tasks", flavor, &rounds.to_string()]))
    }

    /// Starts an actor as another user, which only root can; see [`another_user`](crate::another_user).
    #[cfg(target_os = "linux")]
    pub fn start_as(spec: &Spec, uid: u32) -> Self {
        Self::run(as_user(uid, [spec.invite()]))
    }

    /// Starts the actor in another part than that of serving a lock: `rogue` is its part. It runs as the user `uid`.
    #[cfg(target_os = "linux")]
    pub fn start_rogue(rogue: [&str; 2], uid: u32) -> Self {
        Self::run(as_user(uid, rogue))
    }

    /// Starts an actor that works on a table of locks; see [`managers::serve`](crate::managers::serve).
    pub fn start_at(table: &crate::managers::Table) -> Self {
        Self::start_at_with(table, |_| {})
    }

    /// As [`start_at`](Self::start_at), with its command changed by `change`.
    pub fn start_at_with(table: &crate::managers::Table, change: impl FnOnce(&mut Command)) -> Self {
        let mut command = Command::new(program("actor"));
        command.arg("table").arg(table.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
        change(&mut command);
        Self::run(command)
    }

    /// Starts an actor that works on a lease; see [`leases::serve`](crate::leases::serve).
    pub fn start_lease(terms: &crate::leases::Terms) -> Self {
        Self::start_lease_with(terms, |_| {})
    }

    /// As [`start_lease`](Self::start_lease), with its command changed by `change`.
    pub fn start_lease_with(terms: &crate::leases::Terms, change: impl FnOnce(&mut Command)) -> Self {
        let mut command = Command::new(program("actor"));
        command.arg("lease").arg(terms.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
        change(&mut command);
        Self::run(command)
    }

    /// As [`start_lease`](Self::start_lease), as another user, which only root can.
    #[cfg(target_os = "linux")]
    pub fn start_lease_as(terms: &crate::leases::Terms, uid: u32) -> Self {
        Self::run(as_user(uid, ["lease".to_owned(), terms.to_string()]))
    }

    /// As [`start_lease_as`](Self::start_lease_as), as a member of the group `gid`.
    #[cfg(target_os = "linux")]
    pub fn start_lease_in_group(terms: &crate::leases::Terms, uid: u32, gid: u32) -> Self {
        use std::os::unix::process::CommandExt;
        let mut command = as_user(uid, ["lease".to_owned(), terms.to_string()]);
        command.gid(gid);
        Self::run(command)
    }

    pub(crate) fn run(mut command: Command) -> Self {
        let mut child = crate::wine::spawn(&mut command).expect("the actor starts");
        let commands = child.stdin.take();
        let output = BufReader::new(child.stdout.take().expect("a pipe"));
        let (send, answers) = channel();
        let asks = Arc::new(AtomicBool::new(false));
        let said = asks.clone();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                said.store(line == ASKS, Ordering::Relaxed);
                if line != ASKS && send.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, commands, answers, open: 0, asks }
    }

    /// Returns its pid.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a command without waiting for the answer.
    pub fn tell(&mut self, command: &str) {
        // An ended actor gives no answer, which is a better report than a failed write.
        let _ = writeln!(self.commands.as_mut().expect("a pipe"), "{command}");
        self.open += 1;
    }

    /// Waits for the next answer.
    pub fn answer(&mut self) -> String {
        match self.answers.recv_timeout(LIVELY) {
            Ok(answer) => {
                self.open = self.open.saturating_sub(1);
                answer
            }
            Err(RecvTimeoutError::Disconnected) => "gone".to_owned(),
            Err(RecvTimeoutError::Timeout) => panic!("the actor {} does not answer", self.pid()),
        }
    }

    /// Returns the next answer, if it has arrived.
    pub fn answered(&mut self) -> Option<String> {
        let answer = match self.answers.try_recv() {
            Ok(answer) => answer,
            Err(TryRecvError::Disconnected) => "gone".to_owned(),
            Err(TryRecvError::Empty) => return None,
        };
        self.open = self.open.saturating_sub(1);
        Some(answer)
    }

    /// Returns whether the actor sleeps outside of reading a command. Where the system does not show that, returns
    /// whether it has announced a request for a lock a moment ago.
    pub fn waits(&self) -> bool {
        if !cfg!(target_os = "linux") {
            // The pause lets most actors fall asleep.
            return self.asks.load(Ordering::Relaxed) && crate::sleeps(self.pid(), 0);
        }
        let pid = self.pid();
        let call = std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
        // `read` and `readv`, by which the actor reads its commands.
        let reads = if cfg!(target_arch = "x86_64") { ["0 0x0 ", "19 0x0 "] } else { ["63 0x0 ", "65 0x0 "] };
        crate::sleeps(pid, pid) && !reads.iter().any(|read| call.starts_with(read)) && !call.starts_with("running")
    }

    /// Checks that the last command has no answer yet.
    pub fn expect_silence(&mut self) {
        assert_eq!(self.answers.try_recv().ok(), None);
    }

    /// Returns whether a command was sent whose answer the test has not read.
    pub fn is_busy(&self) -> bool {
        self.open > 0
    }

    /// Sends a command and waits for the answer.
    pub fn ask(&mut self, command: &str) -> String {
        self.tell(command);
        self.answer()
    }

    /// Sends a command, and expects exactly `answer`.
    pub fn expect(&mut self, command: &str, answer: &str) {
        assert_eq!(self.ask(command), answer, "to {command:?}");
    }

    /// Sends a command that makes it wait for a lock, and returns once it sleeps.
    pub fn tell_to_wait(&mut self, command: &str) {
        self.tell(command);
        self.wait_until_it_waits_or_ends();
    }

    /// Returns once it sleeps in a wait for a lock, or has ended.
    pub fn wait_until_it_waits_or_ends(&mut self) {
        // Reading a command is a sleep, too, so the proof is that it sleeps elsewhere.
        crate::until("the actor waits for the lock", || {
            self.waits() || self.child.try_wait().is_ok_and(|ended| ended.is_some())
        });
    }

    /// Sends SIGKILL, and waits for the end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Sends a signal.
    #[cfg(unix)]
    pub fn signal(&self, signal: rustix::process::Signal) {
        signal_pid(self.pid(), signal);
    }

    /// Lets it end after its commands, and returns its exit status.
    pub fn finish(mut self) -> std::process::ExitStatus {
        self.commands = None;
        self.child.wait().expect("a child can be waited for")
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Returns the actor as another user's command. The program may be below a directory that the other user cannot enter,
/// so it is started through a descriptor.
#[cfg(target_os = "linux")]
pub(crate) fn as_user<S: AsRef<std::ffi::OsStr>>(uid: u32, arguments: impl IntoIterator<Item = S>) -> Command {
    static FILE: std::sync::OnceLock<std::fs::File> = std::sync::OnceLock::new();
    let file = FILE.get_or_init(|| std::fs::File::open(program("actor")).expect("the actor's file"));
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file)));
    command.args(arguments).uid(uid).gid(uid).current_dir("/").stdin(Stdio::piped()).stdout(Stdio::piped());
    command
}

/// Sends a signal to any process. Ignores a process that is already gone.
#[cfg(unix)]
pub fn signal_pid(pid: u32, signal: rustix::process::Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// Acts as the actor: executes commands until there are no more.
pub fn serve(spec: &Spec) {
    let mut lock = spec.open();
    let mut guard: Option<Box<dyn AnyGuard>> = None;
    let mut open_files = Vec::new();
    let mut names = Vec::new();
    let mut kept_guard = None;
    #[cfg(target_os = "linux")]
    let mut others = crate::fault_injection::Others::default();
    for line in crate::commands() {
        let mut take = |wait: &Wait| {
            announce();
            match lock.acquire(wait) {
                Ok(taken) => {
                    let answer = match taken.recovered() {
                        Some(pid) => format!("held recovered {pid}"),
                        None => "held".to_owned(),
                    };
                    guard = Some(taken);
                    answer
                }
                Err(error) => describe(&error),
            }
        };
        let (command, argument) = line.split_once(' ').unwrap_or((&line, ""));
        let answer = match command {
            "try" => take(&Wait::none()),
            "lock" => take(&Wait::forever()),
            "lock-for" => take(&Wait::at_most(Duration::from_millis(argument.parse().expect("milliseconds")))),
            "lock-cancelled" => {
                let (stop, moment) =
                    (CancelToken::new(), Duration::from_millis(argument.parse().expect("milliseconds")));
                std::thread::scope(|scope| {
                    scope.spawn(|| {
                        std::thread::sleep(moment);
                        stop.cancel();
                    });
                    take(&Wait::forever().or_cancelled(&stop))
                })
            }
            "release" => match guard.take().map(AnyGuard::release) {
                Some(Ok(())) => "released".to_owned(),
                Some(Err(error)) => describe(&error),
                None => "error NotHeld".to_owned(),
            },
            "owner" => lock.owner().map_or("owner none".to_owned(), |pid| format!("owner {pid}")),
            #[cfg(unix)]
            "fork" => {
                use std::io::Read;
                let (mut ready, child) = std::io::pipe().expect("a pipe");
                match fork::fork() {
                    Ok(fork::Fork::Child) => {
                        drop(child);
                        std::thread::sleep(LIVELY);
                        std::process::exit(0);
                    }
                    Ok(fork::Fork::Parent(pid)) => {
                        drop(child);
                        // The child's part of the fork is done once the child has closed its end.
                        assert_eq!(ready.read(&mut [0]).ok(), Some(0));
                        format!("forked {pid}")
                    }
                    Err(error) => format!("error fork: {error}"),
                }
            }
            #[cfg(unix)]
            "fork-drop" => match fork::fork() {
                Ok(fork::Fork::Child) => {
                    drop(guard.take());
                    std::process::exit(0);
                }
                Ok(fork::Fork::Parent(pid)) => {
                    let pid = rustix::process::Pid::from_raw(pid);
                    let ended = rustix::process::waitpid(pid, rustix::process::WaitOptions::empty());
                    assert!(ended.is_ok_and(|ended| ended.is_some_and(|(_, status)| status.exit_status() == Some(0))));
                    "dropped".to_owned()
                }
                Err(error) => format!("error fork: {error}"),
            },
            #[cfg(unix)]
            "fork-often" => fork_often(&*lock),
            "spawn" => {
                let child = crate::sleeper(LIVELY).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
                format!("spawned {}", child.expect("sleep starts").id())
            }
            #[cfg(unix)]
            "exec" => {
                use std::os::unix::process::CommandExt;
                let mut sleep = Command::new("sleep");
                format!("error exec: {}", sleep.arg(LIVELY.as_secs().to_string()).stdin(Stdio::null()).exec())
            }
            "panic" => {
                let result = std::thread::scope(|scope| {
                    scope
                        .spawn(|| {
                            let _guard = lock.acquire(&Wait::none()).expect("free");
                            std::panic::resume_unwind(Box::new("on purpose"));
                        })
                        .join()
                });
                assert!(result.is_err());
                "panicked".to_owned()
            }
            "hold-name" => {
                names.push(lockkit::NamedLock::new(argument).and_then(|lock| lock.lock()).expect("a free name"));
                "done".to_owned()
            }
            "time-out-name" => {
                let lock = lockkit::NamedLock::new(argument).expect("a name");
                assert!(lock.lock_for(Duration::from_micros(100)).is_err_and(|error| error.is_timeout()));
                "done".to_owned()
            }
            "use-names" => {
                for number in 0..argument.parse().expect("a number") {
                    let lock = lockkit::NamedLock::new(&format!("used-{number}")).expect("a name");
                    drop(lock.try_lock().expect("a free name"));
                }
                "done".to_owned()
            }
            #[cfg(target_os = "linux")]
            "hold-names" => {
                let number = argument.parse().expect("a number");
                // The first lock has one-time costs.
                drop(lockkit::NamedLock::new("first").and_then(|lock| lock.try_lock()).expect("a free name"));
                let before = resident();
                names.reserve(number);
                for number in 0..number {
                    let lock = lockkit::NamedLock::new(&format!("held-{number}")).expect("a name");
                    names.push(lock.try_lock().expect("a free name"));
                }
                format!("bytes {}", (resident() - before) / number as u64)
            }
            #[cfg(target_os = "linux")]
            "list-behind" => {
                let queues = crate::hostile::full_queues(argument.parse().expect("a number"));
                let listed = lockkit::NamedLock::held(lockkit::Scope::User).expect("a list");
                let held = listed.iter().filter(|held| held.lock().name().starts_with("held-")).count();
                drop(queues);
                format!("listed {held}")
            }
            "clean-name" => {
                Spec::parse(&format!("named-socket:{argument}")).clean();
                "done".to_owned()
            }
            #[cfg(target_os = "linux")]
            "close-all" => {
                std::mem::take(&mut others).forget();
                others = crate::fault_injection::Others::in_place_of_all();
                "closed".to_owned()
            }
            #[cfg(target_os = "linux")]
            "close-token" => {
                let token = CancelToken::new();
                let wait = |limit: Duration| match lock.acquire(&Wait::at_most(limit).or_cancelled(&token)) {
                    Ok(_) => "held".to_owned(),
                    Err(error) => describe(&error).split(':').next().unwrap_or_default().to_owned(),
                };
                let before = wait(Duration::from_millis(50));
                std::mem::take(&mut others).forget();
                others = crate::fault_injection::Others::in_place_of_all();
                let after = wait(Duration::from_millis(50));
                let cancelled = std::thread::scope(|scope| {
                    scope.spawn(|| {
                        std::thread::sleep(Duration::from_millis(50));
                        token.cancel();
                    });
                    wait(crate::LIVELY)
                });
                format!("{before}, {after}, {cancelled}")
            }
            #[cfg(target_os = "linux")]
            "others" => others.are_kept(),
            #[cfg(target_os = "linux")]
            "spare-others" => {
                others = crate::fault_injection::Others::default();
                "spared".to_owned()
            }
            #[cfg(target_os = "linux")]
            "fork-others" => match fork::fork() {
                Ok(fork::Fork::Child) => std::process::exit(i32::from(others.are_open() != "kept")),
                Ok(fork::Fork::Parent(pid)) => {
                    let pid = rustix::process::Pid::from_raw(pid);
                    let ended = rustix::process::waitpid(pid, rustix::process::WaitOptions::empty());
                    let status = ended.expect("a child").expect("it has ended").1.exit_status();
                    if status == Some(0) { "kept".to_owned() } else { "error replaced in the child".to_owned() }
                }
                Err(error) => format!("error fork: {error}"),
            },
            "reopen" => {
                lock = spec.open();
                "open".to_owned()
            }
            "set-aside" => {
                kept_guard = guard.take();
                "aside".to_owned()
            }
            "drop-aside" => {
                drop(kept_guard.take());
                "dropped".to_owned()
            }
            "use-descriptors" => {
                while let Ok(file) = std::fs::File::open("/dev/null") {
                    open_files.push(file);
                }
                "used".to_owned()
            }
            #[cfg(target_os = "linux")]
            "limit-threads" => {
                crate::fault_injection::limit_threads(argument);
                "limited".to_owned()
            }
            "free-descriptors" => {
                open_files.clear();
                "freed".to_owned()
            }
            _ => format!("error unknown command {line:?}"),
        };
        println!("{answer}");
    }
}

/// Returns the memory of this process that does not belong to a program file, in bytes.
#[cfg(target_os = "linux")]
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc");
    let sizes = status.lines().filter_map(|line| line.strip_prefix("RssAnon:").or(line.strip_prefix("RssShmem:")));
    sizes.filter_map(|size| size.split_ascii_whitespace().next()?.parse::<u64>().ok()).sum::<u64>() * 1024
}

/// Forks at many moments of an acquisition and a release. Afterwards the lock must be free, though the children live.
#[cfg(unix)]
fn fork_often(lock: &dyn crate::fixtures::AnyLock) -> String {
    let stop = AtomicBool::new(false);
    let children: Vec<i32> = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let _ = lock.acquire(&Wait::at_most(Duration::from_millis(100)));
            }
        });
        let mut random = crate::chaos::Random::new(std::process::id().into());
        let children = (0..400)
            .map(|_| {
                // The pause makes the fork hit another moment of the other thread.
                std::thread::sleep(Duration::from_micros(random.below(3000)));
                match fork::fork().expect("a process can be forked") {
                    fork::Fork::Child => {
                        std::thread::sleep(LIVELY);
                        std::process::exit(0);
                    }
                    fork::Fork::Parent(pid) => pid,
                }
            })
            .collect();
        stop.store(true, Ordering::Relaxed);
        children
    });
    let answer = lock.acquire(&Wait::at_most(LIVELY / 10)).map_or_else(|error| describe(&error), |_| "free".to_owned());
    for pid in children.into_iter().filter_map(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
    }
    answer
}

/// Formats an error as the actor answers it, with its kind first.
pub fn describe(error: &lockkit::Error) -> String {
    let kind = match error.kind() {
        ErrorKind::Held { .. } => "Held",
        ErrorKind::Timeout { .. } => "Timeout",
        ErrorKind::Cancelled { .. } => "Cancelled",
        ErrorKind::ForeignOwner { .. } => "ForeignOwner",
        ErrorKind::Insecure { .. } => "Insecure",
        ErrorKind::RogueDeletion { .. } => "RogueDeletion",
        ErrorKind::Exhausted { .. } => "Exhausted",
        ErrorKind::NoSuchLock { .. } => "NoSuchLock",
        ErrorKind::AlreadyAllocated { .. } => "AlreadyAllocated",
        ErrorKind::NotAllocated { .. } => "NotAllocated",
        ErrorKind::NotLocked { .. } => "NotLocked",
        ErrorKind::LayoutMismatch { .. } => "LayoutMismatch",
        ErrorKind::TooManyProcesses { .. } => "TooManyProcesses",
        ErrorKind::NotAPidFile { .. } => "NotAPidFile",
        ErrorKind::NotALease { .. } => "NotALease",
        ErrorKind::LeaseLost { .. } => "LeaseLost",
        ErrorKind::Store { .. } => "Store",
        ErrorKind::NoAnswer { .. } => "NoAnswer",
        ErrorKind::NotHandled { .. } => "NotHandled",
        ErrorKind::TooLarge { .. } => "TooLarge",
        ErrorKind::Io { .. } => "Io",
        _ => "Other",
    };
    let source = std::error::Error::source(error).map(|source| format!(": {source}"));
    format!("error {kind}: {error}{}", source.unwrap_or_default())
}
