//! The message of a second start to the first instance.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::protocol::{self, Kind, Request};
use super::server::ReceivedRequest;
use crate::base::error::{Error, ErrorKind, Result};
use crate::sys::event::{self, Woke};
use crate::sys::fork::ForkGuarded;
use crate::sys::unix_socket::socket::Peer;
use crate::sys::unix_socket::stream::{self, Transferred};

/// The time that a sender may take to read its answer. Only an answer larger than the kernel's
/// buffer, about 200 KiB, waits.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// A second start, as the first instance sees it: its arguments, and the identity of its sender.
///
/// The sender waits for the answer, within its limit. Dropping the activation answers with no
/// bytes. During a panic, or after an answer that was too large, dropping it reports to the sender
/// that it was not handled. It can be kept, sent to another thread, and answered later, also after
/// the [`FirstInstance`](super::FirstInstance) is gone.
///
/// The sender's identity comes from the kernel ([unix(7)], `SO_PEERCRED`, as of when it connected),
/// never from the sender. Everything else comes from the sender, unchanged, and not necessarily in
/// UTF-8. The sender is a process of the same user, and its message is still input: parse the
/// arguments like those of a start.
///
/// ```
/// # use lockkit::{Activation, Instance, Wait};
/// fn open(activation: Activation) -> lockkit::Result<()> {
///     for file in activation.arguments().iter().skip(1) {
///         println!("{} for pid {:?}", activation.resolve(file).display(), activation.pid());
///     }
///     activation.answer(b"opened")
/// }
/// # fn main() -> lockkit::Result<()> {
/// # let Instance::First(first) = Instance::enter("lockkit-doc-activation")? else { panic!() };
/// # for activation in first.activations(&Wait::none()) { open(activation)?; }
/// # Ok(()) }
/// ```
///
/// [unix(7)]: https://man7.org/linux/man-pages/man7/unix.7.html
///
/// The other parts of the message:
///
/// ```
/// fn describe(again: &lockkit::Activation) {
///     println!("user {} sent {} bytes along", again.uid(), again.bytes().len());
///     if let Some(token) = again.variable("XDG_ACTIVATION_TOKEN") {
///         println!("a window may be raised with {token:?}");
///     }
///     for (name, value) in again.variables() {
///         println!("{name:?} is {value:?}");
///     }
/// }
/// ```
#[must_use = "dropping an activation answers it, with no bytes"]
pub struct Activation {
    /// `None` after the answer.
    connection: Option<ForkGuarded>,
    sender: Peer,
    request: Request,
    /// The frame that a drop sends.
    answer_on_drop: Kind,
}

impl Activation {
    pub(super) fn new(
        ReceivedRequest {
            connection,
            sender,
            request,
        }: ReceivedRequest,
    ) -> Self {
        Self {
            connection: Some(connection),
            sender,
            request,
            answer_on_drop: Kind::Answer,
        }
    }

    /// Returns the arguments of the second start. The first of them is the program, as in
    /// [`std::env::args_os`], unless the sender chose [others](super::SecondInstance::arguments).
    pub fn arguments(&self) -> &[OsString] {
        &self.request.arguments
    }

    /// Returns the working directory of the sender, or `None` if it was deleted or cannot be named.
    pub fn directory(&self) -> Option<&Path> {
        self.request.directory.as_deref()
    }

    /// Resolves `path` as the sender means it: a relative path starts at the sender's working
    /// directory, not at that of this process.
    pub fn resolve(&self, path: impl AsRef<Path>) -> PathBuf {
        self.directory().map_or_else(
            || path.as_ref().to_owned(),
            |directory| directory.join(path.as_ref()),
        )
    }

    /// Returns the environment variables that the sender [chose](super::SecondInstance::variables),
    /// with their values.
    pub fn variables(&self) -> &[(OsString, OsString)] {
        &self.request.variables
    }

    /// Returns the value of one of them.
    pub fn variable(&self, name: impl AsRef<OsStr>) -> Option<&OsStr> {
        let found = self
            .request
            .variables
            .iter()
            .find(|(found, _)| found == name.as_ref());
        found.map(|(_, value)| &**value)
    }

    /// Returns the [bytes](super::SecondInstance::bytes) that the sender added.
    pub fn bytes(&self) -> &[u8] {
        &self.request.bytes
    }

    /// Returns the effective user of the sender, from the kernel: that of this process.
    pub fn uid(&self) -> u32 {
        self.sender.uid
    }

    /// Returns the pid of the sender, from the kernel, or `None` if the sender is in a pid
    /// namespace that this process does not see. Once the sender has ended, another process may
    /// have the pid.
    pub fn pid(&self) -> Option<u32> {
        (self.sender.pid != 0).then_some(self.sender.pid)
    }

    /// Answers the sender, with up to [`MOST_BYTES`](super::MOST_BYTES).
    ///
    /// A small answer is written at once. An answer of more than about 200 KiB waits for the sender
    /// to read it, 5 s at most.
    ///
    /// # Errors
    /// - [`TooLarge`](ErrorKind::TooLarge); the sender gets the report that it was not handled.
    /// - [`Io`](ErrorKind::Io) if the sender does not wait any more (`BrokenPipe`), or does not
    ///   read (`TimedOut`).
    pub fn answer(mut self, bytes: &[u8]) -> Result<()> {
        let frame = match protocol::answer(bytes) {
            Ok(frame) => frame,
            Err(protocol::TooLarge { what, size, max }) => {
                self.answer_on_drop = Kind::Failed;
                return Err(ErrorKind::TooLarge {
                    what,
                    size,
                    most: max,
                }
                .into());
            }
        };
        let Some(connection) = self.connection.take() else {
            return Ok(());
        };
        let failed = |error| Error::io("answer", format!("pid {}", self.sender.pid), error);
        let until = Instant::now() + ANSWER_TIMEOUT;
        let mut rest = &*frame;
        while !rest.is_empty() {
            match stream::send(&connection, rest).map_err(failed)? {
                Transferred::Bytes(sent) => rest = &rest[sent..],
                Transferred::Closed => return Err(failed(Errno::PIPE)),
                Transferred::WouldBlock => {
                    match event::wait_for_room(connection.as_fd(), None, Some(until)) {
                        Ok(Woke::TimedOut) => return Err(failed(Errno::TIMEDOUT)),
                        Ok(_) => {}
                        Err(error) => {
                            return Err(Error::io(
                                "answer",
                                format!("pid {}", self.sender.pid),
                                error,
                            ));
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

impl Drop for Activation {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            let kind = if std::thread::panicking() {
                Kind::Failed
            } else {
                self.answer_on_drop
            };
            // A header always fits on a connection without earlier writes.
            let _ = stream::send(&connection, &protocol::empty_frame(kind));
        }
    }
}

impl fmt::Debug for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Activation")
            .field("sender", &self.sender)
            .field("request", &self.request)
            .finish_non_exhaustive()
    }
}
