//! What the second process does: it executes commands on its lock.

#[cfg(unix)]
use std::process::Command;
use std::process::Stdio;
#[cfg(unix)]
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lockkit::{CancelToken, NamedGuard, NamedLock, Wait};

use super::actor::announce;
use crate::LIVELY;
use crate::errors::describe;
use crate::fixtures::{AnyGuard, AnyLock, Spec};

/// Acts as the actor: executes commands until there are no more.
pub fn serve(spec: &Spec) {
    let mut session = Session::new(spec);
    for line in crate::commands() {
        let (command, argument) = line.split_once(' ').unwrap_or((&line, ""));
        let answer = session
            .use_lock(command, argument)
            .or_else(|| session.start_child(command))
            .or_else(|| session.use_names(command, argument))
            .or_else(|| session.use_resources(command, argument));
        println!(
            "{}",
            answer.unwrap_or_else(|| format!("error unknown command {line:?}"))
        );
    }
}

/// The lock, and what the commands so far have left.
struct Session {
    spec: Spec,
    lock: Box<dyn AnyLock>,
    guard: Option<Box<dyn AnyGuard>>,
    /// The guard that is kept during another acquisition.
    kept_guard: Option<Box<dyn AnyGuard>>,
    /// Held named locks.
    names: Vec<NamedGuard>,
    /// Files that use up all descriptors.
    open_files: Vec<std::fs::File>,
    #[cfg(target_os = "linux")]
    others: crate::fault_injection::Others,
}

impl Session {
    fn new(spec: &Spec) -> Self {
        Self {
            spec: spec.clone(),
            lock: spec.open(),
            guard: None,
            kept_guard: None,
            names: Vec::new(),
            open_files: Vec::new(),
            #[cfg(target_os = "linux")]
            others: crate::fault_injection::Others::default(),
        }
    }

    fn acquire(&mut self, wait: &Wait) -> String {
        announce();
        match self.lock.acquire(wait) {
            Ok(acquired) => {
                let answer = match acquired.recovered() {
                    Some(pid) => format!("held recovered {pid}"),
                    None => "held".to_owned(),
                };
                self.guard = Some(acquired);
                answer
            }
            Err(error) => describe(&error),
        }
    }

    /// Executes a command on the lock.
    fn use_lock(&mut self, command: &str, argument: &str) -> Option<String> {
        let milliseconds = || Duration::from_millis(argument.parse().expect("milliseconds"));
        Some(match command {
            "try" => self.acquire(&Wait::none()),
            "lock" => self.acquire(&Wait::forever()),
            "lock-for" => self.acquire(&Wait::at_most(milliseconds())),
            "lock-cancelled" => {
                let (stop, delay) = (CancelToken::new(), milliseconds());
                std::thread::scope(|scope| {
                    scope.spawn(|| {
                        std::thread::sleep(delay);
                        stop.cancel();
                    });
                    self.acquire(&Wait::forever().or_cancelled(&stop))
                })
            }
            "release" => match self.guard.take().map(AnyGuard::release) {
                Some(Ok(())) => "released".to_owned(),
                Some(Err(error)) => describe(&error),
                None => "error NotHeld".to_owned(),
            },
            "owner" => self
                .lock
                .owner()
                .map_or("owner none".to_owned(), |pid| format!("owner {pid}")),
            "reopen" => {
                self.lock = self.spec.open();
                "open".to_owned()
            }
            "set-aside" => {
                self.kept_guard = self.guard.take();
                "aside".to_owned()
            }
            "drop-aside" => {
                drop(self.kept_guard.take());
                "dropped".to_owned()
            }
            "panic" => {
                let result = std::thread::scope(|scope| {
                    scope
                        .spawn(|| {
                            let _guard = self.lock.acquire(&Wait::none()).expect("free");
                            std::panic::resume_unwind(Box::new("on purpose"));
                        })
                        .join()
                });
                assert!(result.is_err());
                "panicked".to_owned()
            }
            _ => return None,
        })
    }

    /// Executes a command that starts a process.
    fn start_child(&mut self, command: &str) -> Option<String> {
        Some(match command {
            #[cfg(unix)]
            "fork" => fork_child(),
            #[cfg(unix)]
            "fork-drop" => match fork::fork() {
                Ok(fork::Fork::Child) => {
                    drop(self.guard.take());
                    std::process::exit(0);
                }
                Ok(fork::Fork::Parent(pid)) => {
                    assert!(child_succeeds(pid));
                    "dropped".to_owned()
                }
                Err(error) => format!("error fork: {error}"),
            },
            #[cfg(unix)]
            "fork-often" => fork_often(&*self.lock),
            #[cfg(target_os = "linux")]
            "fork-others" => match fork::fork() {
                Ok(fork::Fork::Child) => {
                    std::process::exit(i32::from(self.others.are_open() != "kept"))
                }
                Ok(fork::Fork::Parent(pid)) if child_succeeds(pid) => "kept".to_owned(),
                Ok(fork::Fork::Parent(_)) => "error replaced in the child".to_owned(),
                Err(error) => format!("error fork: {error}"),
            },
            "spawn" => {
                let child = crate::sleeper(LIVELY)
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn();
                format!("spawned {}", child.expect("sleep starts").id())
            }
            #[cfg(unix)]
            "exec" => {
                use std::os::unix::process::CommandExt;
                let mut sleep = Command::new("sleep");
                format!(
                    "error exec: {}",
                    sleep
                        .arg(LIVELY.as_secs().to_string())
                        .stdin(Stdio::null())
                        .exec()
                )
            }
            _ => return None,
        })
    }

    /// Executes a command on named locks.
    fn use_names(&mut self, command: &str, argument: &str) -> Option<String> {
        let named = |name: &str| NamedLock::new(name).expect("a name");
        match command {
            "hold-name" => self
                .names
                .push(named(argument).lock().expect("a free name")),
            "time-out-name" => {
                let lock = named(argument);
                assert!(
                    lock.lock_for(Duration::from_micros(100))
                        .is_err_and(|error| error.is_timeout())
                );
            }
            "use-names" => {
                for number in 0..argument.parse().expect("a number") {
                    drop(
                        named(&format!("used-{number}"))
                            .try_lock()
                            .expect("a free name"),
                    );
                }
            }
            "clean-name" => Spec::parse(&format!("named-socket:{argument}")).clean(),
            #[cfg(target_os = "linux")]
            "hold-names" => {
                let number = argument.parse().expect("a number");
                // The first lock has one-time costs.
                drop(named("first").try_lock().expect("a free name"));
                let before = resident();
                self.names.reserve(number);
                for number in 0..number {
                    self.names.push(
                        named(&format!("held-{number}"))
                            .try_lock()
                            .expect("a free name"),
                    );
                }
                return Some(format!("bytes {}", (resident() - before) / number as u64));
            }
            #[cfg(target_os = "linux")]
            "list-behind" => {
                let queues = crate::hostile::full_queues(argument.parse().expect("a number"));
                let listed = NamedLock::held(lockkit::Scope::User).expect("a list");
                let held = listed
                    .iter()
                    .filter(|held| held.lock().name().starts_with("held-"))
                    .count();
                drop(queues);
                return Some(format!("listed {held}"));
            }
            _ => return None,
        }
        Some("done".to_owned())
    }

    /// Executes a command on descriptors and limits.
    fn use_resources(&mut self, command: &str, argument: &str) -> Option<String> {
        #[cfg(not(target_os = "linux"))]
        let _ = argument;
        Some(match command {
            "use-descriptors" => {
                while let Ok(file) = std::fs::File::open("/dev/null") {
                    self.open_files.push(file);
                }
                "used".to_owned()
            }
            "free-descriptors" => {
                self.open_files.clear();
                "freed".to_owned()
            }
            #[cfg(target_os = "linux")]
            "limit-threads" => {
                crate::fault_injection::limit_threads(argument);
                "limited".to_owned()
            }
            #[cfg(target_os = "linux")]
            "close-all" => {
                self.close_all();
                "closed".to_owned()
            }
            #[cfg(target_os = "linux")]
            "close-token" => self.cancel_after_close(),
            #[cfg(target_os = "linux")]
            "others" => self.others.are_kept(),
            #[cfg(target_os = "linux")]
            "spare-others" => {
                self.others = crate::fault_injection::Others::default();
                "spared".to_owned()
            }
            _ => return None,
        })
    }

    #[cfg(target_os = "linux")]
    fn close_all(&mut self) {
        std::mem::take(&mut self.others).forget();
        self.others = crate::fault_injection::Others::in_place_of_all();
    }

    /// Waits with one token before and after all descriptors are closed, and returns the kinds of
    /// the three errors.
    #[cfg(target_os = "linux")]
    fn cancel_after_close(&mut self) -> String {
        let token = CancelToken::new();
        let wait = |lock: &dyn AnyLock, limit: Duration| match lock
            .acquire(&Wait::at_most(limit).or_cancelled(&token))
        {
            Ok(_) => "held".to_owned(),
            Err(error) => describe(&error)
                .split(':')
                .next()
                .unwrap_or_default()
                .to_owned(),
        };
        let before = wait(&*self.lock, Duration::from_millis(50));
        self.close_all();
        let after = wait(&*self.lock, Duration::from_millis(50));
        let cancelled = std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(50));
                token.cancel();
            });
            wait(&*self.lock, LIVELY)
        });
        format!("{before}, {after}, {cancelled}")
    }
}

/// Forks a child that sleeps, and returns once the child's part of the fork is done.
#[cfg(unix)]
fn fork_child() -> String {
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

/// Waits for the end of a forked child, and returns whether it exited with 0.
#[cfg(unix)]
pub(crate) fn child_succeeds(pid: i32) -> bool {
    let ended = rustix::process::waitpid(
        rustix::process::Pid::from_raw(pid),
        rustix::process::WaitOptions::empty(),
    );
    ended.is_ok_and(|ended| ended.is_some_and(|(_, status)| status.exit_status() == Some(0)))
}

/// Returns the memory of this process that does not belong to a program file, in bytes.
#[cfg(target_os = "linux")]
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc");
    let sizes = status.lines().filter_map(|line| {
        line.strip_prefix("RssAnon:")
            .or(line.strip_prefix("RssShmem:"))
    });
    sizes
        .filter_map(|size| size.split_ascii_whitespace().next()?.parse::<u64>().ok())
        .sum::<u64>()
        * 1024
}

/// Forks at many moments of an acquisition and a release. Afterwards the lock must be free, though
/// the children live.
#[cfg(unix)]
fn fork_often(lock: &dyn AnyLock) -> String {
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
    let answer = lock
        .acquire(&Wait::at_most(LIVELY / 10))
        .map_or_else(|error| describe(&error), |_| "free".to_owned());
    for pid in children
        .into_iter()
        .filter_map(rustix::process::Pid::from_raw)
    {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
    }
    answer
}
