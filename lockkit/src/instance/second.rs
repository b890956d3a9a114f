//! A further instance: it sends its arguments to the first instance, or becomes the first.

use std::ffi::{OsStr, OsString};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use super::endpoint::Endpoint;
use super::first::FirstInstance;
use super::protocol::{self, Inbox, Kind, Malformed, Request};
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::lock_info::LockInfo;
use crate::base::owner::Owner;
use crate::base::wait::{Backoff, Wait, WaitError, WaitState};
use crate::named::NamedLock;
use crate::sys::unix_socket::stream::{self, Transferred};

/// The size of one read of an answer.
const READ_SIZE: usize = 64 << 10;

/// Another start of a program whose first instance runs.
///
/// By default it sends its arguments, including the program itself, and its working directory.
///
/// ```
/// use std::time::Duration;
/// use lockkit::instance::{Instance, Outcome};
/// use lockkit::Wait;
/// # fn main() -> lockkit::Result<()> {
/// let first = match Instance::enter("lockkit-doc-second")? {
///     Instance::First(first) => first,
///     Instance::Second(second) => {
///         let second = second.arguments(std::env::args_os().skip(1)).directory("/");
///         let second = second.variables(["XDG_ACTIVATION_TOKEN"]).bytes(*b"any bytes");
///         match second.activate(&Wait::at_most(Duration::from_secs(5)))? {
///             Outcome::Answered(answer) => {
///                 println!("the first one said {} bytes", answer.len());
///                 return Ok(());
///             }
///             Outcome::BecameFirst(first) => first,
///         }
///     }
/// };
/// # drop(first);
/// # Ok(()) }
/// ```
#[derive(Debug)]
#[must_use = "the first instance knows nothing of this start until `activate`"]
pub struct SecondInstance {
    lock: NamedLock,
    /// As of when it entered, like the lock, whatever this process's user is now.
    endpoint: Box<Endpoint>,
    owner: Option<Owner>,
    request: Request,
}

/// The outcome of an activation by a [`SecondInstance`].
#[derive(Debug)]
#[must_use = "this process may be the first instance now"]
pub enum Outcome {
    /// The first instance has handled it, and answered with these bytes.
    Answered(Vec<u8>),
    /// The first instance has ended in the meantime, and this process is the first one now. This
    /// process must do its own work, even if the previous first instance died while doing it.
    BecameFirst(FirstInstance),
}

/// The outcome of one call.
enum Call {
    Answered(Vec<u8>),
    /// There was no listener, or it hung up without an answer.
    NoAnswer,
    /// The first instance hung up within its answer: it has handled the activation.
    AnswerCut,
}

impl SecondInstance {
    pub(super) fn new(lock: NamedLock, endpoint: Endpoint, owner: Option<Owner>) -> Self {
        let directory = std::env::current_dir().ok();
        let request = Request {
            arguments: std::env::args_os().collect(),
            directory,
            ..Request::default()
        };
        Self {
            lock,
            endpoint: Box::new(endpoint),
            owner,
            request,
        }
    }

    /// Returns the first instance when this one [entered](super::Instance::enter), if it is known.
    pub fn owner(&self) -> Option<&Owner> {
        self.owner.as_ref()
    }

    /// Sends these arguments instead of this process's own. They arrive unchanged, byte by byte.
    pub fn arguments<A: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.request.arguments = arguments.into_iter().map(Into::into).collect();
        self
    }

    /// Sends this working directory instead of this process's own.
    pub fn directory(mut self, directory: impl Into<PathBuf>) -> Self {
        self.request.directory = Some(directory.into());
        self
    }

    /// Sends these variables of this process's environment in addition, if they are set.
    pub fn variables<N: AsRef<OsStr>>(mut self, names: impl IntoIterator<Item = N>) -> Self {
        let set = |name: N| Some((name.as_ref().to_owned(), std::env::var_os(name)?));
        self.request
            .variables
            .extend(names.into_iter().filter_map(set));
        self
    }

    /// Sends these bytes in addition: up to [`MOST_BYTES`](super::MOST_BYTES).
    pub fn bytes(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.request.bytes = bytes.into();
        self
    }

    /// Hands this start over to the first instance, and waits as `wait` says until it has answered.
    /// If the first instance has ended, or ends before it answers, this process becomes the first
    /// itself. While the first is just starting or ending, this process waits for the result.
    /// `Wait::none()` means one try.
    ///
    /// The name decides which process is the first, never the socket: a first instance that is
    /// stopped stays the first. After the end of a first instance, the kernel may take up to a
    /// second to free its name, and 5 s at most to free its socket. Both times may add to the wait.
    ///
    /// A sender that gives up hangs up, and the first instance drops an activation that it has not
    /// begun by then.
    ///
    /// # Errors
    /// - [`NoAnswer`](ErrorKind::NoAnswer) or [`Cancelled`](ErrorKind::Cancelled), as `wait` says.
    /// - [`NotHandled`](ErrorKind::NotHandled) if the first instance panicked over it, or broke off
    ///   its answer because this process did not read it for 5 s. Also if the first instance has
    ///   another version of lockkit that does not understand this one.
    /// - [`TooLarge`](ErrorKind::TooLarge) if the bytes are more than
    ///   [`MOST_BYTES`](super::MOST_BYTES), or everything together more than 8 MiB.
    /// - [`ForeignOwner`](ErrorKind::ForeignOwner) if another user listens at the address of the
    ///   first instance. Nothing is sent to that user.
    /// - Those of [`NamedLock::acquire`].
    pub fn activate(&self, wait: &Wait) -> Result<Outcome> {
        let frame = match self.request.encode() {
            Ok(frame) => frame,
            Err(protocol::TooLarge { what, size, max }) => {
                return Err(ErrorKind::TooLarge {
                    what,
                    size,
                    most: max,
                }
                .into());
            }
        };
        wait.check(self)?;
        let wait_state = wait
            .state()
            .unwrap_or_else(|| WaitState::brief(Duration::ZERO));
        let mut backoff = Backoff::new();
        loop {
            match self.call(&frame, &wait_state)? {
                Call::Answered(bytes) => return Ok(Outcome::Answered(bytes)),
                call => match self.lock.try_lock() {
                    Ok(guard) => {
                        return FirstInstance::open(self.lock.name(), &self.endpoint, guard)
                            .map(Outcome::BecameFirst);
                    }
                    // A second call would make the first instance handle it twice.
                    Err(error) if error.is_held() && matches!(call, Call::AnswerCut) => {
                        return Err(self.problem(
                            "its answer is incomplete, so it may have handled the activation",
                        ));
                    }
                    Err(error) if error.is_held() => {}
                    Err(error) => return Err(error),
                },
            }
            wait_state
                .sleep(backoff.next())?
                .map_err(|reason| self.wait_error(&wait_state, reason))?;
        }
    }

    fn call(&self, frame: &[u8], wait_state: &WaitState) -> Result<Call> {
        let endpoint = &self.endpoint;
        let Some(connection) = endpoint.connect()? else {
            return Ok(Call::NoAnswer);
        };
        let wait_error = |reason| self.wait_error(wait_state, reason);
        let mut rest = frame;
        while !rest.is_empty() {
            match stream::send(&connection, rest).map_err(|error| endpoint.io("send to", error))? {
                Transferred::Bytes(sent) => rest = &rest[sent..],
                Transferred::WouldBlock => wait_state
                    .writable(connection.as_fd())?
                    .map_err(wait_error)?,
                // The first instance may have sent the reason.
                Transferred::Closed => break,
            }
        }
        let mut inbox = Inbox::new(protocol::MOST_BYTES);
        loop {
            let portion = match inbox
                .missing()
                .map_err(|malformed| self.not_handled(malformed))?
            {
                0 => break,
                missing => missing.min(READ_SIZE),
            };
            let transferred = stream::receive(&connection, inbox.buffer(), portion);
            match transferred.map_err(|error| endpoint.io("receive from", error))? {
                Transferred::Bytes(_) => {}
                Transferred::WouldBlock => wait_state
                    .wait(Some(connection.as_fd()), Duration::MAX)?
                    .map_err(wait_error)?,
                Transferred::Closed if inbox.buffer().is_empty() => return Ok(Call::NoAnswer),
                Transferred::Closed => return Ok(Call::AnswerCut),
            }
        }
        match inbox
            .answer()
            .map_err(|malformed| self.not_handled(malformed))?
        {
            (Kind::Answer, bytes) => Ok(Call::Answered(bytes)),
            (Kind::Failed, _) => Err(self.problem("it failed while it handled the activation")),
            (Kind::NotUnderstood | Kind::Request, _) => Err(self.not_handled(Malformed::Version)),
        }
    }

    fn wait_error(&self, wait_state: &WaitState, reason: WaitError) -> Error {
        match reason {
            WaitError::Cancelled => wait_state.error(reason, self),
            WaitError::TimedOut => {
                let owner = self.holder().map(Box::new);
                ErrorKind::NoAnswer {
                    first: self.describe(),
                    waited: wait_state.waited(),
                    owner,
                }
                .into()
            }
        }
    }

    fn not_handled(&self, malformed: Malformed) -> Error {
        self.problem(match malformed {
            Malformed::Version => {
                "it has another version of lockkit, which does not understand this one; restart it"
            }
            Malformed::Garbage | Malformed::TooLong => "its answer is invalid",
        })
    }

    fn problem(&self, problem: &'static str) -> Error {
        ErrorKind::NotHandled {
            first: self.describe(),
            problem,
        }
        .into()
    }
}

impl LockInfo for SecondInstance {
    fn describe(&self) -> String {
        format!("the first instance of {:?}", self.lock.name())
    }

    #[cfg(feature = "tracing")]
    fn label(&self) -> (&'static str, String) {
        ("instance", self.lock.name().to_owned())
    }

    fn holder(&self) -> Option<Owner> {
        self.lock.owner().unwrap_or_default()
    }
}
