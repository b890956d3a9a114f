//! The handle on a second process.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel};

use crate::fixtures::Spec;
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

/// Announces a request for a lock, where nothing else shows that a process waits. The process calls
/// it before the request.
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

    /// Starts an actor with its command changed by `change`, such as another user or other
    /// variables.
    pub fn start_with(spec: &Spec, change: impl FnOnce(&mut Command)) -> Self {
        Self::start_part([spec.invite()], change)
    }

    /// Starts the program with these arguments, and its command changed by `change`.
    pub(crate) fn start_part<const N: usize>(
        arguments: [String; N],
        change: impl FnOnce(&mut Command),
    ) -> Self {
        let mut command = Command::new(program("actor"));
        command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        change(&mut command);
        Self::run(command)
    }

    /// Starts an actor that waits in tasks and gives up at random; see
    /// [`async_conformance::drop_futures_at_random`](crate::async_conformance::drop_futures_at_random).
    pub fn start_tasks(spec: &Spec, flavor: &str, rounds: u32) -> Self {
        Self::start_with(spec, |command| {
            _ = command.args(["tasks", flavor, &rounds.to_string()])
        })
    }

    /// Starts an actor as another user, which only root can; see
    /// [`another_user`](crate::another_user).
    #[cfg(target_os = "linux")]
    pub fn start_as(spec: &Spec, uid: u32) -> Self {
        Self::run(as_user(uid, [spec.invite()]))
    }

    /// Starts the actor in another part than that of serving a lock: `rogue` is its part. It runs
    /// as the user `uid`.
    #[cfg(target_os = "linux")]
    pub fn start_rogue(rogue: [&str; 2], uid: u32) -> Self {
        Self::run(as_user(uid, rogue))
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
        Self {
            child,
            commands,
            answers,
            open: 0,
            asks,
        }
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

    /// Returns whether the actor sleeps outside of reading a command. Where the system does not
    /// show that, returns whether it has announced a request for a lock a moment ago.
    pub fn waits(&self) -> bool {
        if !cfg!(target_os = "linux") {
            // The pause lets most actors fall asleep.
            return self.asks.load(Ordering::Relaxed) && crate::sleeps(self.pid(), 0);
        }
        let pid = self.pid();
        let call = std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
        // `read` and `readv`, by which the actor reads its commands.
        let reads = if cfg!(target_arch = "x86_64") {
            ["0 0x0 ", "19 0x0 "]
        } else {
            ["63 0x0 ", "65 0x0 "]
        };
        crate::sleeps(pid, pid)
            && !reads.iter().any(|read| call.starts_with(read))
            && !call.starts_with("running")
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
        crate::signal_pid(self.pid(), signal);
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

/// Returns the actor as another user's command. The program may be below a directory that the other
/// user cannot enter, so it is started through a descriptor.
#[cfg(target_os = "linux")]
pub(crate) fn as_user<S: AsRef<std::ffi::OsStr>>(
    uid: u32,
    arguments: impl IntoIterator<Item = S>,
) -> Command {
    static FILE: std::sync::OnceLock<std::fs::File> = std::sync::OnceLock::new();
    let file =
        FILE.get_or_init(|| std::fs::File::open(program("actor")).expect("the actor's file"));
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(file)
    ));
    command
        .args(arguments)
        .uid(uid)
        .gid(uid)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    command
}
