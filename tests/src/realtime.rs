//! A process of a real-time class with two threads on one processor. If the higher thread waits for
//! the lower one, it must leave the processor to the lower one.
//!
//! Its two parts differ in the action of the higher thread: `fork` while the lower one acquires and
//! releases a lock, or `lock` while the lower one forks. The higher thread prints its id, and
//! continues on a command, after which it has its class.

use std::io::BufRead;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lockkit::NamedLock;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use crate::{LIVELY, program, thread_id};

/// How often the higher thread does its part, each time from a sleep, so that it interrupts the
/// lower one anywhere.
const ROUNDS: usize = 200;

/// Acts as the process: answers with the longest time that its part took, in milliseconds.
pub fn serve(part: &str, name: &str) {
    let lock = NamedLock::new(name).expect("a name");
    let stop = AtomicBool::new(false);
    let mut lines = std::io::stdin().lock().lines();
    println!("{}", thread_id());
    lines.next();
    let mut children = Vec::new();
    let longest = std::thread::scope(|scope| {
        scope.spawn(|| {
            println!("{}", thread_id());
            while !stop.load(Ordering::Relaxed) {
                match part {
                    "fork" => drop(lock.lock().expect("only this process takes it")),
                    _ => drop(waitpid(fork_child(Duration::ZERO), WaitOptions::empty())),
                }
            }
        });
        lines.next();
        let mut longest = Duration::ZERO;
        for _ in 0..ROUNDS {
            std::thread::sleep(Duration::from_micros(500));
            let start = Instant::now();
            match part {
                "fork" => children.push(fork_child(LIVELY)),
                _ => drop(lock.lock().expect("only this process takes it")),
            }
            longest = longest.max(start.elapsed());
        }
        stop.store(true, Ordering::Relaxed);
        longest
    });
    println!("{}", longest.as_millis());
    // Its children live until the command to end them.
    lines.next();
    for child in children.into_iter().flatten() {
        let _ = kill_process(child, Signal::KILL);
        let _ = waitpid(Some(child), WaitOptions::empty());
    }
}

fn fork_child(lives: Duration) -> Option<Pid> {
    match fork::fork().expect("a process can be forked") {
        fork::Fork::Child => {
            std::thread::sleep(lives);
            std::process::exit(0);
        }
        fork::Fork::Parent(pid) => Pid::from_raw(pid),
    }
}

/// Such a process, on one processor. Dropping it kills it.
pub struct RealTime {
    _alone: MutexGuard<'static, ()>,
    child: Child,
    lines: std::io::Lines<std::io::BufReader<std::process::ChildStdout>>,
}

impl RealTime {
    /// Starts the process. Returns `None`, and reports the reason, where this machine does not
    /// allow it.
    pub fn start(part: &str, name: &str) -> Option<Self> {
        if !Command::new("chrt")
            .args(["-f", "1", "true"])
            .status()
            .is_ok_and(|status| status.success())
        {
            crate::left_out("this process may not have a real-time class");
            return None;
        }
        // Two such processes on one processor would wait for each other.
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let allowed = rustix::thread::sched_getaffinity(None).expect("a mask");
        let processor = (0..1024)
            .find(|number| allowed.is_set(*number))
            .expect("a processor")
            .to_string();
        // If it spins nevertheless, this limit ends it soon.
        let mut command = Command::new("prlimit");
        command.args([
            "--rttime=20000000",
            "taskset",
            "-c",
            &processor,
            "chrt",
            "-f",
            "1",
        ]);
        command.arg(program("actor")).args(["realtime", part, name]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("util-linux");
        let lines = std::io::BufReader::new(child.stdout.take().expect("a pipe")).lines();
        let mut this = Self {
            _alone: alone,
            child,
            lines,
        };
        let higher = this.line();
        let raised = Command::new("chrt")
            .args(["-f", "-p", "2", &higher])
            .status();
        assert!(raised.is_ok_and(|status| status.success()));
        this.tell();
        // A thread inherits the priority of its creator.
        let lower = this.line();
        let lowered = Command::new("chrt")
            .args(["-f", "-p", "1", &lower])
            .status();
        assert!(lowered.is_ok_and(|status| status.success()));
        this.tell();
        Some(this)
    }

    /// Returns the longest time that the part of its higher thread took.
    pub fn longest(&mut self) -> Duration {
        Duration::from_millis(self.line().parse().expect("milliseconds"))
    }

    fn line(&mut self) -> String {
        self.lines.next().expect("it lives").expect("text")
    }

    fn tell(&mut self) {
        use std::io::Write;
        self.child
            .stdin
            .as_mut()
            .expect("a pipe")
            .write_all(b"\n")
            .expect("it lives");
    }
}

impl Drop for RealTime {
    fn drop(&mut self) {
        if let Some(pipe) = self.child.stdin.take() {
            drop(pipe);
        }
        let _ = self.child.wait();
    }
}
