//! Supervises the program of `lockkit run`, so that the lock is held for exactly as long as the
//! program lives.
//!
//! The program is started in a child that first waits for a message (the *gate*). So it never runs
//! before the mechanism that keeps the lock for it is in place, whenever lockkit is killed. The
//! mechanism depends on the lock:
//! - *Named locks and files* live in a descriptor. A third process, the *keeper*, has a copy of it,
//!   and a pidfd of the program. If lockkit is killed, the keeper keeps the lock until the program
//!   ends; otherwise it exits just before the release. For the case that both are killed, the lock
//!   is [`InFlightDescriptor`] with the program. At the program's end lockkit or the keeper takes
//!   the lock out of there, so that the processes that the program leaves running do not keep it.
//! - *Pidfiles* name the program, by pid and start time, and stay held as long as the program
//!   lives.
//! - *Leases* must be renewed, which only a process can do. So a child of the called process holds
//!   the lease ([`behind`]), and continues when its parent is killed. If the holder itself is
//!   killed, the system kills the program with it (`PR_SET_PDEATHSIG`). The parent then inherits
//!   everything else that the program has started, and kills it. The fencing token covers the
//!   moment in between.
//!
//! Keepers and holders of leases have their own name ([`KEEPER`]), also in their command lines: a
//! command that kills every `lockkit` by name is meant for the called processes.
//!
//! Signals are blocked while the program runs, and read from a signalfd in the same poll that sees
//! the program's end. A terminal's signals reach the program anyway while it is in the same process
//! group, so they are not passed on then.

use std::ffi::{CStr, OsString};
use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use lockkit::CancelToken;
use nix::sys::signal::{SigSet, Signal as NixSignal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, FdFlags, fcntl_dupfd_cloexec, fcntl_setfd, retry_on_intr};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, WaitStatus, getpgid, getpgrp, getpid, getppid, getsid,
    kill_process, pidfd_open, pidfd_send_signal, set_child_subreaper,
    set_parent_process_death_signal, setsid, test_kill_process, waitpid,
};

use crate::failure::{Failure, Outcome, code};
use crate::held_lock::{self, HeldLock, Job};
use crate::loss::LossPipe;
use crate::sys;

/// The name of a process that keeps a lock for a program.
pub(crate) const KEEPER: &CStr = c"lock-keeper";

/// Returns a descriptor that keeps the lock, if one does.
fn descriptor_of(hold: &HeldLock) -> Result<Option<OwnedFd>, Failure> {
    match hold {
        HeldLock::Named(guard) => Ok(Some(guard.descriptor()?)),
        HeldLock::File(guard) => {
            let copy = guard
                .file()
                .try_clone()
                .map_err(|error| Failure::io("copy a descriptor", error))?;
            Ok(Some(copy.into()))
        }
        HeldLock::Pidfile(_) | HeldLock::Lease(..) => Ok(None),
    }
}

/// The signals that are passed on to the program.
const PASSED_ON: [NixSignal; 6] = [
    NixSignal::SIGINT,
    NixSignal::SIGTERM,
    NixSignal::SIGHUP,
    NixSignal::SIGQUIT,
    NixSignal::SIGUSR1,
    NixSignal::SIGUSR2,
];

/// Signals that are read instead of delivered.
pub(crate) struct Signals {
    read: SignalFd,
    /// The signals that were blocked before.
    before: SigSet,
}

impl Signals {
    pub(crate) fn block() -> Result<Self, Failure> {
        let failed = |error: nix::Error| Failure::io("block signals", error);
        let set: SigSet = PASSED_ON.into_iter().collect();
        let read = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map_err(failed)?;
        let before = SigSet::thread_get_mask().map_err(failed)?;
        set.thread_block().map_err(failed)?;
        Ok(Self { read, before })
    }

    /// Lets the signals be delivered again.
    fn unblock(&self) {
        let _ = self.before.thread_set_mask();
    }

    /// Calls `wait`, and cancels `stop` when a signal arrives meanwhile; the signal stays to be
    /// read. As the first process of a container it also reaps orphans meanwhile.
    pub(crate) fn cancelling<T>(
        &self,
        stop: &CancelToken,
        wait: impl FnOnce() -> T,
    ) -> Result<T, Failure> {
        let (is_done, done) = pipe()?;
        Ok(std::thread::scope(|scope| {
            // Without a thread a signal must also wait for the lock.
            let _ = std::thread::Builder::new().spawn_scoped(scope, || {
                let timeout = is_first().then(|| timespec(REAPING));
                loop {
                    let mut watched = [
                        PollFd::new(&self.read, PollFlags::IN),
                        PollFd::new(&is_done, PollFlags::IN),
                    ];
                    match retry_on_intr(|| poll(&mut watched, timeout.as_ref())) {
                        Ok(0) => bury_others(None),
                        Ok(_) if !watched[0].revents().is_empty() => return stop.cancel(),
                        _ => return,
                    }
                }
            });
            let done_with = wait();
            drop(done);
            done_with
        }))
    }

    /// Returns the number of the first signal that has arrived, and reads it, if `read` is set.
    pub(crate) fn first_if(&self, read: bool) -> Option<u8> {
        let signal = read
            .then(|| self.read.read_signal().ok().flatten())
            .flatten()?;
        u8::try_from(signal.ssi_signo).ok()
    }

    /// Passes the arrived signals on to `child`, except those that a terminal sent to both.
    fn pass_on(&self, child: &Child) {
        while let Ok(Some(signal)) = self.read.read_signal() {
            let Some(number) = Signal::from_named_raw(signal.ssi_signo as i32) else {
                continue;
            };
            if !child.has_got(number, signal.ssi_code) {
                let _ = pidfd_send_signal(&child.pidfd, number);
            }
        }
    }
}

/// A child, and a descriptor that becomes readable at its end.
struct Child {
    pid: Pid,
    pidfd: OwnedFd,
}

impl Child {
    fn new(pid: Pid) -> Result<Self, Failure> {
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Self { pid, pidfd }),
            Err(error) => {
                let _ = kill_process(pid, Signal::KILL);
                Err(Failure::io(
                    "watch a child (pidfd_open, of Linux 5.3)",
                    error,
                ))
            }
        }
    }

    /// Whether a signal to this process also reached this child. A terminal sends signals to its
    /// foreground process group, but reports its hang-up only to the leader of its session.
    fn has_got(&self, signal: Signal, code: i32) -> bool {
        /// The code of a signal that the kernel itself sent.
        const SI_KERNEL: i32 = 0x80;
        let to_leader_alone =
            || signal == Signal::HUP && getsid(None).is_ok_and(|leader| leader == getpid());
        let same_group = || getpgid(Some(self.pid)).is_ok_and(|group| group == getpgrp());
        code == SI_KERNEL && same_group() && !to_leader_alone()
    }

    /// Waits for the end of the child, which has been seen or must come.
    fn end(&self) -> Option<WaitStatus> {
        let (_, status) =
            retry_on_intr(|| waitpid(Some(self.pid), WaitOptions::empty())).ok()??;
        Some(status)
    }

    /// Waits as [`end`](Self::end) does. Returns the exit code for the status.
    fn status(&self) -> Option<u8> {
        exit_code(self.end()?)
    }
}

fn exit_code(status: WaitStatus) -> Option<u8> {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => u8::try_from(code).ok(),
        (None, Some(signal)) => u8::try_from(signal)
            .ok()
            .map(|signal| signal.saturating_add(code::SIGNALLED)),
        (None, None) => None,
    }
}

fn fork() -> Result<Option<Pid>, Failure> {
    sys::fork().map_err(|error| Failure::io("start a process", error).with_code(code::OS))
}

/// Makes a pipe: the reader and the writer. No started program inherits either.
fn pipe() -> Result<(File, File), Failure> {
    sys::pipe().map_err(|error| Failure::io("make a pipe", error))
}

/// Whether this is the first process of a pid namespace, as of a container: it inherits the
/// orphans, and no signal ends it unless it handles that signal.
pub(crate) fn is_first() -> bool {
    getpid() == Pid::INIT
}

/// Runs the program under the lock, releases the lock, and returns the program's exit status.
pub(crate) fn run(mut hold: HeldLock, signals: Signals, job: Job<'_>) -> Outcome {
    sys::wait_for_children();
    let (wait_at_gate, gate) = pipe()?;
    let descriptor = descriptor_of(&hold)?;
    let in_flight = descriptor
        .as_ref()
        .map(InFlightDescriptor::new)
        .transpose()?;
    let leads = matches!(hold, HeldLock::Lease(..));
    let me = getpid();
    if leads {
        // The processes that the program leaves behind stay below this process, so that a loss can
        // end them, too.
        let _ = set_child_subreaper(Some(me));
    }
    let program = match fork()? {
        None => {
            drop((gate, descriptor));
            if leads {
                let _ = set_parent_process_death_signal(Some(Signal::KILL));
                if getppid() != Some(me) {
                    std::process::exit(code::OS.into());
                }
            }
            std::process::exit(
                become_program(job.command, &hold, in_flight, wait_at_gate, &signals).into(),
            )
        }
        Some(pid) => Child::new(pid)?,
    };
    drop(wait_at_gate);
    hold.name_holder(
        program.pid.as_raw_nonzero().get().unsigned_abs(),
        job.command,
    )?;
    let keeper = start_keeper(descriptor, in_flight.as_ref(), &program, gate, leads)?;
    let status = match &hold {
        HeldLock::Lease(_, loss) => attend(&program, &signals, Some(loss), job),
        _ => attend(&program, &signals, None, job),
    };
    if let Some(keeper) = keeper {
        keeper.dismiss();
    }
    if let Some(in_flight) = in_flight {
        in_flight.receive_and_close();
    }
    match hold.release() {
        Err(error) if !job.quiet && !leads => Failure::from(error).show(),
        _ => {}
    }
    Ok(status)
}

/// Starts the keeper of a lock that is a descriptor, which opens the gate. For other locks opens
/// the gate here. The holder of a lease (`leads`) is then its own keeper.
fn start_keeper(
    descriptor: Option<OwnedFd>,
    in_flight: Option<&InFlightDescriptor>,
    program: &Child,
    gate: File,
    leads: bool,
) -> Result<Option<Keeper>, Failure> {
    let Some(descriptor) = descriptor else {
        if leads {
            // From here on this process is a keeper, and continues when its parent is killed.
            sys::rename_process(KEEPER);
            let _ = set_parent_process_death_signal(None);
        }
        open_gate(gate);
        return Ok(None);
    };
    Keeper::start(descriptor, in_flight, program, gate).map(Some)
}

/// Lets the program start. A failure means that the program is already gone, which shows later.
fn open_gate(mut gate: File) {
    let _ = gate.write_all(b"!");
}

/// Runs the child's part. Returns only if the program could not be started, with the exit code for
/// that.
fn become_program(
    command: &[OsString],
    hold: &HeldLock,
    in_flight: Option<InFlightDescriptor>,
    mut gate: File,
    signals: &Signals,
) -> u8 {
    // The end of the pipe means that no process holds the lock for this child.
    if gate.read_exact(&mut [0]).is_err() {
        return code::OS;
    }
    // Without it the keeper must suffice.
    let _inherited = in_flight.and_then(|in_flight| in_flight.make_inheritable().ok());
    let [program, arguments @ ..] = command else {
        return code::USAGE;
    };
    let mut command = Command::new(program);
    command.args(arguments);
    hold.tell(&mut command);
    signals.unblock();
    let error = sys::as_given(&mut command).exec();
    let failure = held_lock::cannot_run(program, &error);
    failure.show();
    failure.code()
}

/// The interval for reaping adopted processes that have ended.
const REAPING: Duration = Duration::from_millis(500);

/// Waits for the program's end, passes signals on to it, and ends it when its lease is lost.
fn attend(program: &Child, signals: &Signals, mut loss: Option<&LossPipe>, job: Job<'_>) -> u8 {
    // This process adopts the orphans below it.
    let adopts = loss.is_some() || is_first();
    let mut kill_at: Option<Instant> = None;
    loop {
        let mut watched = vec![
            PollFd::new(&program.pidfd, PollFlags::IN),
            PollFd::new(&signals.read, PollFlags::IN),
        ];
        watched.extend(loss.map(|loss| PollFd::new(&loss.0, PollFlags::IN)));
        let left = kill_at.map(|until| until.saturating_duration_since(Instant::now()));
        let timeout = left.or(adopts.then_some(REAPING)).map(timespec);
        match poll(&mut watched, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            // Then the program can only be waited for.
            Err(_) => return program.status().unwrap_or(code::OS),
        }
        let ready: Vec<bool> = watched
            .iter()
            .map(|watched| !watched.revents().is_empty())
            .collect();
        if ready[0] {
            let status = program.status().unwrap_or(code::OS);
            if kill_at.is_some() {
                end_descendants(kill_at);
            }
            return status;
        }
        if ready[1] {
            signals.pass_on(program);
        }
        if adopts {
            bury_others(Some(program.pid));
        }
        if ready.get(2) == Some(&true) {
            let mut reason = [0; 512];
            let read = loss
                .take()
                .and_then(|loss| (&loss.0).read(&mut reason).ok())
                .unwrap_or_default();
            let reason = String::from_utf8_lossy(&reason[..read]).into_owned();
            Failure::new(
                code::TEMPORARY,
                format!("{reason}, so the program is ended"),
            )
            .show();
            signal_descendants(Signal::TERM);
            kill_at = Some(Instant::now() + job.grace);
        }
        if kill_at.is_some_and(|until| until <= Instant::now()) {
            signal_descendants(Signal::KILL);
            kill_at = Some(Instant::now() + Duration::from_millis(100));
        }
    }
}

fn timespec(span: Duration) -> Timespec {
    Timespec {
        tv_sec: span.as_secs() as i64,
        tv_nsec: span.subsec_nanos().into(),
    }
}

/// Reaps ended children, except `program`.
fn bury_others(program: Option<Pid>) {
    let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    while let Ok(Some(ended)) = waitid(Id::All, look).map(|ended| ended.pid()) {
        // `Child::end` reaps the program; the others follow after that.
        if program.is_some_and(|program| ended.as_raw() == program.as_raw_nonzero().get()) {
            return;
        }
        let _ = waitpid(Pid::from_raw(ended.as_raw()), WaitOptions::NOHANG);
    }
}

/// Waits until the processes that the ended program has left behind have ended, too, and kills
/// those that remain at `until`. Processes that may not be signalled, such as a set-uid program,
/// are left.
fn end_descendants(until: Option<Instant>) {
    loop {
        // Signal 0 only checks whether a signal may be sent.
        let mut left = descendants();
        left.retain(|pid| test_kill_process(*pid) != Err(Errno::PERM));
        if left.is_empty() {
            return;
        }
        if until.is_none_or(|until| until <= Instant::now()) {
            signal_descendants(Signal::KILL);
        }
        while let Ok(Some(_)) = waitpid(None, WaitOptions::NOHANG) {}
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn signal_descendants(signal: Signal) {
    for pid in descendants() {
        let _ = kill_process(pid, signal);
    }
}

/// Returns all processes below this one, by /proc.
fn descendants() -> Vec<Pid> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten();
    let parents: Vec<(i32, i32)> = entries
        .filter_map(|entry| {
            let pid = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            // After the name, which may contain anything: the state and the parent.
            let mut fields = stat.rsplit(')').next()?.split_ascii_whitespace();
            let (state, parent) = (fields.next()?, fields.next()?.parse().ok()?);
            (state != "Z").then_some((pid, parent))
        })
        .collect();
    let mut found = vec![getpid().as_raw_nonzero().get()];
    let mut at = 0;
    while at < found.len() {
        let above = found[at];
        found.extend(
            parents
                .iter()
                .filter(|(_, parent)| *parent == above)
                .map(|(pid, _)| *pid),
        );
        at += 1;
    }
    found
        .into_iter()
        .skip(1)
        .filter_map(Pid::from_raw)
        .collect()
}

/// A copy of a lock's descriptor, in transit in a socket that no process reads: it counts as open
/// as long as the socket is. The program and all its children inherit the socket. Any process that
/// has the socket can take the descriptor out, so that the lock is free however many processes
/// still have the socket.
struct InFlightDescriptor(OwnedFd);

impl InFlightDescriptor {
    fn new(descriptor: &OwnedFd) -> Result<Self, Failure> {
        let failed = |error| Failure::io("send a descriptor into a socket", error);
        let (way_in, socket) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(failed)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        let sent = [descriptor.as_fd()];
        rights.push(SendAncillaryMessage::ScmRights(&sent));
        sendmsg(
            &way_in,
            &[IoSlice::new(b"!")],
            &mut rights,
            SendFlags::empty(),
        )
        .map_err(failed)?;
        Ok(Self(socket))
    }

    /// Lets the program inherit it, under a number that scripts do not use for their own files.
    fn make_inheritable(self) -> rustix::io::Result<OwnedFd> {
        const BEYOND_SCRIPTS: i32 = 64;
        let inherited = fcntl_dupfd_cloexec(&self.0, BEYOND_SCRIPTS)?;
        fcntl_setfd(&inherited, FdFlags::empty())?;
        Ok(inherited)
    }

    /// Takes the descriptor out and closes it, unless another process has done so.
    fn receive_and_close(&self) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        // The received descriptor is closed with the buffer.
        let _ = recvmsg(
            &self.0,
            &mut [IoSliceMut::new(&mut [0])],
            &mut rights,
            flags,
        );
    }
}

/// The process that keeps a lock when lockkit is killed.
struct Keeper {
    pid: Pid,
    /// Open as long as this process lives.
    life: File,
}

impl Keeper {
    /// Starts the keeper. The keeper opens the gate itself, once signals for lockkit cannot reach
    /// it. This process closes its end of the gate: otherwise the program would wait for ever if
    /// the keeper were killed before that.
    fn start(
        descriptor: OwnedFd,
        in_flight: Option<&InFlightDescriptor>,
        program: &Child,
        gate: File,
    ) -> Result<Self, Failure> {
        let (life_of_parent, life) = pipe()?;
        match fork()? {
            None => {
                drop(life);
                keep(&program.pidfd, life_of_parent, gate);
                in_flight
                    .iter()
                    .for_each(|in_flight| in_flight.receive_and_close());
                drop(descriptor);
                std::process::exit(0)
            }
            Some(pid) => Ok(Self { pid, life }),
        }
    }

    /// Makes the keeper exit, because the release comes next.
    fn dismiss(self) {
        drop(self.life);
        let _ = retry_on_intr(|| waitpid(Some(self.pid), WaitOptions::empty()));
    }
}

/// Runs the keeper's part. Returns when the parent has closed its pipe or was killed, and the
/// program has ended.
fn keep(program: &OwnedFd, mut parent: File, gate: File) {
    // Detached from the terminal and from signals to the job, none of which is blocked for the
    // program.
    let _ = setsid();
    sys::rename_process(KEEPER);
    open_gate(gate);
    // A reader of the program's output must not wait for the keeper.
    if let Ok(null) = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
    {
        let _ = rustix::stdio::dup2_stdin(&null);
        let _ = rustix::stdio::dup2_stdout(&null);
        let _ = rustix::stdio::dup2_stderr(&null);
    }
    let _ = parent.read_to_end(&mut Vec::new());
    let mut ended = [PollFd::new(program, PollFlags::IN)];
    let _ = retry_on_intr(|| poll(&mut ended, None));
}

/// Runs `lead` in a child, which continues when this process is killed, and returns its exit code.
/// If the child is killed, everything that it has started is killed, too.
pub(crate) fn behind(lead: impl FnOnce() -> Outcome) -> Outcome {
    let signals = Signals::block()?;
    sys::wait_for_children();
    // When the child is killed, this process inherits the processes below it.
    let me = getpid();
    let _ = set_child_subreaper(Some(me));
    let leader = match fork()? {
        None => {
            signals.unblock();
            // Until the child holds the lease: killing a lockkit that waits must end the wait.
            let _ = set_parent_process_death_signal(Some(Signal::KILL));
            if getppid() != Some(me) {
                std::process::exit(code::OS.into());
            }
            let code = lead().unwrap_or_else(|failure| {
                failure.show();
                failure.code()
            });
            std::process::exit(code.into())
        }
        Some(pid) => Child::new(pid)?,
    };
    loop {
        let mut watched = [
            PollFd::new(&leader.pidfd, PollFlags::IN),
            PollFd::new(&signals.read, PollFlags::IN),
        ];
        let timeout = is_first().then(|| timespec(REAPING));
        let polled = retry_on_intr(|| poll(&mut watched, timeout.as_ref()));
        if polled.is_err() || !watched[0].revents().is_empty() {
            let Some(status) = leader.end() else {
                return Ok(code::OS);
            };
            if status.terminating_signal().is_some() {
                end_descendants(None);
            }
            return Ok(exit_code(status).unwrap_or(code::OS));
        }
        signals.pass_on(&leader);
        if is_first() {
            bury_others(Some(leader.pid));
        }
    }
}
