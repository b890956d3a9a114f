//! The processes of a bench: a program starts itself again as its own children, and exchanges lines
//! with them.
//!
//! A child receives its part in its arguments: [`Peer::spawn`] in the parent corresponds to
//! [`part`] in the child. From then on the two ends are alike: each is a [`Peer`] of the other. A
//! child does not outlive its parent by much. The parent's ends of the pipes close with it, and the
//! child ends when it next sends or receives a line.

use std::env;
use std::fmt::Display;
use std::fs::File;
use std::io::{BufRead, BufReader, Write, stdin, stdout};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::FileExt;
use std::os::unix::process::parent_id;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The argument before a child's part.
pub const CHILD: &str = "--child";

/// The extra wait after a process is seen to sleep. The kernel reports the sleep shortly before it
/// begins.
const SETTLE_TIME: Duration = Duration::from_micros(50);

/// The process at the other end of a pair of pipes.
pub struct Peer {
    reader: Box<dyn BufRead>,
    writer: Box<dyn Write>,
    /// The kernel's report of its state.
    stat: File,
    /// `None` for the parent.
    child: Option<Child>,
}

impl Peer {
    /// Starts this program again, as a child with the given part.
    ///
    /// # Panics
    /// If the system has no room for a process.
    pub fn spawn(part: &[&str]) -> Self {
        let program = env::current_exe().expect("the program has a path");
        Self::start(Command::new(program).arg(CHILD).args(part))
    }

    /// Starts another program as a child, which then exchanges lines as well.
    ///
    /// # Panics
    /// If the program cannot be started.
    pub fn start(program: &mut Command) -> Self {
        let mut child = program
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a child can be started");
        let reader = Box::new(BufReader::new(child.stdout.take().expect("it is piped")));
        let writer = Box::new(child.stdin.take().expect("it is piped"));
        Self {
            reader,
            writer,
            stat: stat(child.id()),
            child: Some(child),
        }
    }

    /// Returns the parent of this child.
    pub fn parent() -> Self {
        let reader = Box::new(BufReader::new(stdin()));
        Self {
            reader,
            writer: Box::new(stdout()),
            stat: stat(parent_id()),
            child: None,
        }
    }

    /// Sends a line.
    ///
    /// # Panics
    /// If the peer is a child and has ended. A child whose parent has ended exits here.
    pub fn send(&mut self, line: impl Display) {
        if writeln!(self.writer, "{line}")
            .and_then(|()| self.writer.flush())
            .is_err()
        {
            self.has_ended();
        }
    }

    /// Waits for a line.
    ///
    /// # Panics
    /// As [`send`](Self::send).
    pub fn receive(&mut self) -> String {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(length) if length > 0 => line.trim_end().to_owned(),
            _ => self.has_ended(),
        }
    }

    /// Waits for exactly this line.
    ///
    /// # Panics
    /// If another line arrives, and as [`send`](Self::send).
    pub fn expect(&mut self, line: &str) {
        assert_eq!(self.receive(), line, "the other process sent another line");
    }

    fn has_ended(&self) -> ! {
        match &self.child {
            Some(child) => panic!("the child {} has ended early", child.id()),
            // The exit is silent: the parent has reported the cause of its end, or the cause
            // applied to all processes.
            None => std::process::exit(1),
        }
    }

    /// Waits for a line of numbers.
    ///
    /// # Panics
    /// If anything else arrives, and as [`send`](Self::send).
    pub fn receive_numbers<const N: usize>(&mut self) -> [u64; N] {
        let line = self.receive();
        let numbers: Vec<u64> = line
            .split(' ')
            .map(|word| word.parse().expect("a number"))
            .collect();
        numbers.try_into().expect("as many numbers as were agreed")
    }

    /// Waits until the other process sleeps, in a pipe or in a lock, and a moment longer. It also
    /// returns when the other process has ended.
    pub fn wait_until_asleep(&self) {
        while self.is_awake() {
            std::hint::spin_loop();
        }
        spin(SETTLE_TIME);
    }

    /// Reads the third field of proc_pid_stat(5). The second field, the name in parentheses, may
    /// contain any character.
    fn is_awake(&self) -> bool {
        let mut line = [0; 512];
        let Ok(length) = self.stat.read_at(&mut line, 0) else {
            return false;
        };
        let name_ends = line[..length]
            .iter()
            .rposition(|byte| *byte == b')')
            .unwrap_or_default();
        // D is a wait that ends by itself, such as for a page.
        matches!(line.get(name_ends + 2), Some(b'R' | b'D'))
    }

    /// Sends SIGKILL to a child. Does nothing to a parent.
    pub fn kill(&mut self) {
        if let Some(child) = &mut self.child {
            // The kill fails if the child was waited for and so is gone.
            let _ = child.kill();
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.kill();
        if let Some(child) = &mut self.child {
            let _ = child.wait();
        }
    }
}

fn stat(pid: u32) -> File {
    File::open(format!("/proc/{pid}/stat")).expect("/proc shows the processes")
}

/// Returns a loopback port without a listener at this moment.
///
/// # Panics
/// If there is none.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("an address").port()
}

/// Returns the part from [`Peer::spawn`], if this process is a child.
pub fn part() -> Option<Vec<String>> {
    let mut arguments = env::args().skip(1);
    (arguments.next()? == CHILD).then(|| arguments.collect())
}

/// Returns nanoseconds on a clock that all processes share.
pub fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Keeps the processor busy, because a sleep this short would take far longer.
pub fn spin(time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time {
        std::hint::spin_loop();
    }
}
