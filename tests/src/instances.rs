//! A second process that is an instance of a program, and peers that attack the first instance.
//!
//! The process, started with [`Actor::start_instance`], executes commands:
//!
//! | command | answer |
//! |---|---|
//! | `enter` | `first`, `first recovered PID`, or `second of PID` |
//! | `activate MS` | `answered TEXT`, `became first`, or an error; `activate-with MS BYTES` sends as many bytes, too |
//! | `start MS` | both, in sequence; a first instance then serves |
//! | `serve` | `serving`: answers every activation with [`summary`] on a thread of its own |
//! | `panic` | `serving`: every handler panics |
//! | `take MS` | `taken` and the [`summary`], or `none` |
//! | `answer TEXT`, `drop` | `done`: to the activation taken first |
//! | `release` | `released` |
//! | `fork` | `forked PID`: a forked child, which has dropped its copy of all and lives |
//! | `spawn` | `spawned PID`: a program started in the ordinary way, alive until it is killed |
//! | `kill-at STEP` | `armed`; `passed` says which steps it has passed since |
//!
//! or `error KIND: text`.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use lockkit::instance::Outcome;
use lockkit::{Activation, FirstInstance, Instance, SecondInstance, Wait};

use crate::errors::describe;
use crate::helper_process::Actor;

/// The variable that instances send.
pub const VARIABLE: &str = "LOCKKIT_TEST_VARIABLE";

/// Formats an activation as one line: uid, pid (or 0), the arguments after `actor instance NAME`,
/// the number of bytes.
pub fn summary(activation: &Activation) -> String {
    let arguments = activation.arguments().get(3..).unwrap_or_default();
    let (uid, pid) = (activation.uid(), activation.pid().unwrap_or_default());
    format!("{uid} {pid} {arguments:?} {}", activation.bytes().len())
}

/// Acts as the process: executes commands until there are no more.
pub fn serve(name: &OsStr) {
    let mut session = Session {
        name: name.to_str().expect("a name").to_owned(),
        first: None,
        second: None,
        received: VecDeque::new(),
    };
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let (command, argument) = line.split_once(' ').unwrap_or((&line, ""));
        let answer = session
            .use_instance(command, argument)
            .or_else(|| session.use_activation(command, argument));
        let answer = answer.or_else(|| session.use_process(command, argument));
        println!(
            "{}",
            answer.unwrap_or_else(|| format!("error unknown command {line:?}"))
        );
    }
}

/// Parses the first word.
fn number(argument: &str) -> u64 {
    argument
        .split(' ')
        .next()
        .and_then(|number| number.parse().ok())
        .expect("a number")
}

/// What the commands so far have left.
struct Session {
    name: String,
    first: Option<FirstInstance>,
    second: Option<SecondInstance>,
    received: VecDeque<Activation>,
}

impl Session {
    fn first(&self) -> &FirstInstance {
        self.first.as_ref().expect("a first")
    }

    fn enter(&mut self) -> String {
        enter(&self.name, &mut self.first, &mut self.second)
    }

    /// Executes a command on the instance.
    fn use_instance(&mut self, command: &str, argument: &str) -> Option<String> {
        Some(match command {
            "enter" => self.enter(),
            "activate" => activate(
                self.second.take().expect("a second"),
                number(argument),
                &mut self.first,
            ),
            "activate-with" => {
                let bytes: usize = argument
                    .split(' ')
                    .nth(1)
                    .and_then(|bytes| bytes.parse().ok())
                    .expect("bytes");
                let second = self
                    .second
                    .take()
                    .expect("a second")
                    .bytes(vec![b'x'; bytes]);
                activate(second, number(argument), &mut self.first)
            }
            "start" => {
                let mut answer = self.enter();
                if let Some(second) = self.second.take() {
                    answer = activate(second, number(argument), &mut self.first);
                }
                if let Some(first) = &self.first {
                    first.on_activation(answer_with_summary).expect("a thread");
                }
                answer
            }
            "serve" => {
                self.first()
                    .on_activation(answer_with_summary)
                    .expect("a thread");
                "serving".to_owned()
            }
            "panic" => {
                self.first()
                    .on_activation(|_| panic!("on purpose"))
                    .expect("a thread");
                "serving".to_owned()
            }
            "release" => match self.first.take().map(FirstInstance::release) {
                Some(Ok(())) => "released".to_owned(),
                Some(Err(error)) => describe(&error),
                None => "error NotFirst".to_owned(),
            },
            _ => return None,
        })
    }

    /// Executes a command on received activations.
    fn use_activation(&mut self, command: &str, argument: &str) -> Option<String> {
        Some(match command {
            "take" => {
                let wait = Wait::at_most(Duration::from_millis(number(argument)));
                match self.first().next_activation(&wait) {
                    Ok(Some(activation)) => {
                        let answer = format!("taken {}", summary(&activation));
                        self.received.push_back(activation);
                        answer
                    }
                    Ok(None) => "none".to_owned(),
                    Err(error) => describe(&error),
                }
            }
            "answer" => {
                let activation = self.received.pop_front().expect("an activation");
                activation
                    .answer(argument.as_bytes())
                    .map_or_else(|error| describe(&error), |()| "done".to_owned())
            }
            "drop" => {
                drop(self.received.pop_front());
                "done".to_owned()
            }
            _ => return None,
        })
    }

    /// Executes a command on processes and failpoints.
    fn use_process(&mut self, command: &str, argument: &str) -> Option<String> {
        Some(match command {
            "fork" => self.fork(),
            "spawn" => {
                let child = Command::new("sleep")
                    .arg("60")
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .spawn();
                format!("spawned {}", child.expect("a program").id())
            }
            "kill-at" => {
                crate::failpoint::kill_at(number(argument) as usize);
                "armed".to_owned()
            }
            "passed" => format!("passed {}", crate::failpoint::passed().join(", ")),
            _ => return None,
        })
    }

    /// Forks a child that drops its copy of everything and sleeps. Returns once the child has done
    /// so.
    fn fork(&mut self) -> String {
        let (mut ready, child) = std::io::pipe().expect("a pipe");
        match fork::fork().expect("a child") {
            fork::Fork::Child => {
                drop(ready);
                assert!(
                    self.first()
                        .next_activation(&Wait::forever())
                        .is_ok_and(|none| none.is_none())
                );
                self.received.clear();
                drop(self.first.take());
                drop(child);
                std::thread::sleep(2 * crate::LIVELY);
                std::process::exit(0);
            }
            fork::Fork::Parent(pid) => {
                drop(child);
                let _ = ready.read(&mut [0]);
                format!("forked {pid}")
            }
        }
    }
}

fn answer_with_summary(activation: Activation) {
    let answer = summary(&activation);
    // A sender that has given up meanwhile is one of the cases.
    let _ = activation.answer(answer.as_bytes());
}

fn enter(
    name: &str,
    first: &mut Option<FirstInstance>,
    second: &mut Option<SecondInstance>,
) -> String {
    match Instance::enter(name) {
        Ok(Instance::First(entered)) => {
            let answer = match entered
                .recovered()
                .map(|died| died.owner().map_or(0, |owner| owner.pid()))
            {
                Some(pid) => format!("first recovered {pid}"),
                None => "first".to_owned(),
            };
            *first = Some(entered);
            answer
        }
        Ok(Instance::Second(entered)) => {
            let answer = format!(
                "second of {}",
                entered.owner().map_or(0, |owner| owner.pid())
            );
            *second = Some(entered.variables([VARIABLE]));
            answer
        }
        Err(error) => describe(&error),
    }
}

fn activate(second: SecondInstance, millis: u64, first: &mut Option<FirstInstance>) -> String {
    match second.activate(&Wait::at_most(Duration::from_millis(millis))) {
        Ok(Outcome::Answered(bytes)) => format!("answered {}", String::from_utf8_lossy(&bytes)),
        Ok(Outcome::BecameFirst(became)) => {
            *first = Some(became);
            "became first".to_owned()
        }
        Err(error) => describe(&error),
    }
}

/// Returns the address at which the first instance of the user `uid` receives.
pub fn address(uid: u32, name: &str) -> SocketAddr {
    SocketAddr::from_abstract_name(format!("lockkit/first/u{uid}/{name}")).expect("a short name")
}

/// Connects to the listener there, as any program can.
pub fn call(uid: u32, name: &str) -> UnixStream {
    UnixStream::connect_addr(&address(uid, name)).expect("a process listens there")
}

/// Builds a frame by hand, as the documentation of the wire protocol defines it.
pub fn frame(version: u16, kind: u16, length: u32, content: &[u8]) -> Vec<u8> {
    let mut frame = b"lkin".to_vec();
    frame.extend(version.to_le_bytes());
    frame.extend(kind.to_le_bytes());
    frame.extend(length.to_le_bytes());
    frame.extend(content);
    frame
}

/// Returns a request without content.
pub fn empty_request() -> Vec<u8> {
    frame(1, 1, 16, &[0; 16])
}

/// As another user: sends a request to the first instance of the user `uid`, and reports the
/// result.
pub fn send_as_other_user(place: &str) {
    let (uid, name) = place.split_once('/').expect("UID/NAME");
    let mut connection = call(uid.parse().expect("a uid"), name);
    println!("connected");
    let _ = connection.write_all(&empty_request());
    let mut answer = Vec::new();
    let _ = connection.read_to_end(&mut answer);
    println!("was given {} bytes", answer.len());
}

/// As another user: listens in place of the first instance of the user `uid`, and reports the
/// received request.
pub fn listen_as_other_user(place: &str) {
    let (uid, name) = place.split_once('/').expect("UID/NAME");
    let listener = UnixListener::bind_addr(&address(uid.parse().expect("a uid"), name))
        .expect("a free address");
    println!("listening");
    for connection in listener.incoming() {
        let mut told = Vec::new();
        let _ = connection.expect("a connection").read_to_end(&mut told);
        println!("was told {} bytes", told.len());
    }
}

impl Actor {
    /// Starts an instance of `name`; see [`serve`].
    pub fn start_instance(name: &str) -> Self {
        Self::start_instance_with(name, |_| {})
    }

    /// As [`start_instance`](Self::start_instance), as another user, which only root can.
    pub fn start_instance_as(name: &str, uid: u32) -> Self {
        Self::run(crate::helper_process::as_user(uid, ["instance", name]))
    }

    /// As [`start_instance`](Self::start_instance), with its command changed by `change`.
    pub fn start_instance_with(name: &str, change: impl FnOnce(&mut Command)) -> Self {
        let mut command = Command::new(crate::program("actor"));
        command
            .arg("instance")
            .arg(name)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        change(&mut command);
        Self::run(command)
    }
}
