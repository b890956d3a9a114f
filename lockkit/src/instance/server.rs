//! The receiver of the first instance: one descriptor to wait for, with many connections behind it.
//!
//! [`Server::poll`] never waits. It accepts connections of this user's processes, reads the bytes
//! that have arrived so far, and returns one complete request at a time. It reads nothing more
//! before that. [`Server::next`] adds the wait that every lock has. An async runtime waits for the
//! descriptor itself, for as long as `poll` says.
//!
//! The cost of clients is bounded. A connection of another user is closed at once. At most
//! [`MAX_CLIENTS`] are read at a time, and the others wait in the kernel. Each client has
//! [`REQUEST_TIMEOUT`] to send its whole request. If other clients wait for a place, a client that
//! has been silent for [`IDLE_TIMEOUT`] is dismissed, the longest silent first. Memory is allocated
//! for bytes that have arrived, never for an announced length. One request at a time is parsed,
//! which may take six times its length in memory if all its texts are empty. A dismissed client
//! sees its connection closed, as at the end of the first instance, and may connect again.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::io::{Errno, Result as Io};

use super::protocol::{self, Inbox, Kind, Request};
#[cfg(feature = "tokio")]
use crate::base::blocking;
use crate::base::error::{Error, Result};
use crate::base::wait::{Wait, WaitState};
use crate::sys::event::{self, Event};
use crate::sys::fork::{ForkGuarded, ProcessId};
use crate::sys::unix_socket::socket::{self, Peer};
use crate::sys::unix_socket::stream::{self, Epoll, Transferred};

/// The number of connections that are read at a time.
const MAX_CLIENTS: usize = 32;
/// The time that a request may take to arrive.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// The time that a silent client keeps its place when all places are taken and another client
/// waits.
const IDLE_TIMEOUT: Duration = Duration::from_millis(50);
/// The pause before the next accept after the system refused one.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// The number of bytes that are read from one client before the next.
const READ_SIZE: usize = 64 << 10;
/// The number of further polls without a wait, or after its end, while data is arriving: enough for
/// the longest request.
const MAX_EXTRA_POLLS: usize = 4 * protocol::MAX_REQUEST_BYTES / READ_SIZE;

/// The names of the watched descriptors; those of clients come after them.
const LISTENER: u64 = 0;
const CLOSED: u64 = 1;

/// A request that has arrived, with the connection on which it is answered.
#[derive(Debug)]
pub(super) struct ReceivedRequest {
    pub(super) connection: ForkGuarded,
    pub(super) sender: Peer,
    pub(super) request: Request,
}

/// The result of a poll.
pub(super) enum Polled {
    Request(Box<ReceivedRequest>),
    /// No request yet, but some data or connection arrived.
    Progress,
    /// Nothing, until the descriptor is readable or the time has passed.
    Nothing(Duration),
    /// The server is closed.
    Closed,
}

pub(super) struct Server {
    epoll: Epoll,
    /// Wakes the waiters when the server closes.
    closed: Event,
    connections: Mutex<Option<Connections>>,
    /// The process that receives. A forked child has a copy, possibly with a locked mutex.
    process: ProcessId,
}

struct Connections {
    listener: ForkGuarded,
    /// The user whose processes may call.
    user: u32,
    /// The listener is not watched until this time.
    accept_paused_until: Option<Instant>,
    /// In the order of arrival, and so of their ids.
    clients: Vec<Client>,
    next_id: u64,
}

struct Client {
    id: u64,
    since: Instant,
    /// The time of the last data from the client.
    last_data: Instant,
    connection: ForkGuarded,
    sender: Peer,
    inbox: Inbox,
}

impl Server {
    /// Receives the processes of `user` at `listener`.
    pub(super) fn open(listener: ForkGuarded, user: u32) -> Io<Self> {
        let closed =
            Event::new().map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::MFILE))?;
        let epoll = Epoll::new()?;
        epoll.add(&*listener, LISTENER)?;
        epoll.add(&closed, CLOSED)?;
        let clients = Vec::with_capacity(MAX_CLIENTS);
        let connections = Connections {
            listener,
            user,
            accept_paused_until: None,
            clients,
            next_id: CLOSED + 1,
        };
        Ok(Self {
            epoll,
            closed,
            connections: Mutex::new(Some(connections)),
            process: ProcessId::current(),
        })
    }

    /// Returns whether this process is a child of the one that receives.
    pub(super) fn is_forked_copy(&self) -> bool {
        !self.process.is_current()
    }

    /// Closes every connection that was not given out, and wakes the waiters.
    pub(super) fn close(&self) {
        if !self.is_forked_copy() {
            drop(self.connections.lock().take());
            self.closed.set();
        }
    }

    /// Returns the next request whose sender still waits for an answer, or `None` if `wait` is over
    /// or the server closed.
    pub(super) fn next(&self, wait: &Wait) -> Result<Option<ReceivedRequest>> {
        let mut receiver = Receiver::new(self, wait);
        loop {
            match receiver.poll()? {
                Found::Request(request) => return Ok(Some(*request)),
                Found::Nothing => return Ok(None),
                Found::More => {}
                Found::Later(wait_state, pause) => {
                    // At the deadline, the data that has arrived meanwhile is still read.
                    let _ = wait_state.wait(Some(self.as_fd()), pause)?;
                }
            }
        }
    }

    /// Returns the next request as [`next`](Self::next) does, in a task. Dropping the future loses
    /// nothing: requests that were not given out are still here.
    #[cfg(feature = "tokio")]
    pub(super) async fn next_async(&self, wait: &Wait) -> Result<Option<ReceivedRequest>> {
        let mut receiver = Receiver::new(self, wait);
        loop {
            match receiver.poll()? {
                Found::Request(request) => return Ok(Some(*request)),
                Found::Nothing => return Ok(None),
                // Other tasks must run, however much data arrives.
                Found::More => tokio::task::yield_now().await,
                Found::Later(wait_state, pause) => {
                    // A separate descriptor: a reactor registers a descriptor once, and several
                    // tasks may wait here.
                    let own = ForkGuarded::new(|| rustix::io::fcntl_dupfd_cloexec(self.as_fd(), 0));
                    let own = own.map_err(|error| Error::io("wait for", "activations", error))?;
                    let _ = wait_state
                        .wait_async(blocking::readable(Some(own.as_fd())), pause)
                        .await?;
                }
            }
        }
    }

    /// Does the work that needs no waiting.
    pub(super) fn poll(&self) -> Result<Polled> {
        if self.is_forked_copy() {
            return Ok(Polled::Closed);
        }
        let mut connections = self.connections.lock();
        let Some(connections) = connections.as_mut() else {
            return Ok(Polled::Closed);
        };
        connections
            .receive(&self.epoll)
            .map_err(|error| Error::io("receive", "activations", error))
    }

    /// Watches the listener in any case: a remaining waiter does not know of a pause that has begun
    /// since.
    fn stop_waiting(&self) {
        if self.is_forked_copy() {
            return;
        }
        if let Some(connections) = self.connections.lock().as_mut() {
            // If it fails, the next poll reports it.
            let _ = connections.resume_accepting(&self.epoll);
        }
    }
}

/// Readable when [`Server::poll`] has work to do.
impl AsFd for Server {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

/// Polls the server repeatedly, for as long as a [`Wait`] says.
struct Receiver<'w> {
    server: &'w Server,
    wait: &'w Wait,
    wait_state: Option<WaitState>,
    /// The number of further polls after the deadline, because data was arriving.
    extra_polls: usize,
}

enum Found<'l> {
    Request(Box<ReceivedRequest>),
    /// There is nothing, and nothing to wait for.
    Nothing,
    /// Poll again at once.
    More,
    /// Poll again after a pause, or when the descriptor is readable.
    Later(&'l WaitState, Duration),
}

impl<'w> Receiver<'w> {
    fn new(server: &'w Server, wait: &'w Wait) -> Self {
        Self {
            server,
            wait,
            wait_state: wait.state(),
            extra_polls: 0,
        }
    }

    fn poll(&mut self) -> Result<Found<'_>> {
        if self.wait.is_cancelled() {
            return Ok(Found::Nothing);
        }
        let is_over = match &self.wait_state {
            None => true,
            Some(wait_state) => wait_state
                .until()
                .is_some_and(|until| Instant::now() >= until),
        };
        Ok(match (self.server.poll()?, &self.wait_state) {
            (Polled::Request(request), _) => Found::Request(request),
            (Polled::Progress, _) if !is_over || self.extra_polls < MAX_EXTRA_POLLS => {
                self.extra_polls += usize::from(is_over);
                Found::More
            }
            (Polled::Nothing(pause), Some(wait_state)) if !is_over => {
                Found::Later(wait_state, pause)
            }
            (Polled::Closed | Polled::Nothing(_) | Polled::Progress, _) => Found::Nothing,
        })
    }
}

/// Also runs when the future is dropped.
impl Drop for Receiver<'_> {
    fn drop(&mut self) {
        self.server.stop_waiting();
    }
}

impl Connections {
    /// Reads the arrived data, at most [`READ_SIZE`] bytes from each client, until one request is
    /// complete. The other data stays in the kernel, so that the descriptor stays readable for
    /// other waiters.
    fn receive(&mut self, epoll: &Epoll) -> Io<Polled> {
        let now = Instant::now();
        if self.accept_paused_until.is_some_and(|until| now >= until) {
            self.resume_accepting(epoll)?;
        }
        let (mut has_progress, mut has_clients) = (false, false);
        // Data of the present clients comes before timeouts and new clients.
        for id in epoll.ready()? {
            match id {
                LISTENER => has_clients = true,
                CLOSED => {}
                client => {
                    has_progress = true;
                    if let Some(request) = self.read(epoll, client, now) {
                        return Ok(Polled::Request(Box::new(request)));
                    }
                }
            }
        }
        while self
            .clients
            .first()
            .is_some_and(|oldest| now >= oldest.since + REQUEST_TIMEOUT)
        {
            self.dismiss(epoll, 0);
        }
        if has_clients {
            has_progress |= self.accept(epoll, now)?;
        }
        Ok(if has_progress {
            Polled::Progress
        } else {
            Polled::Nothing(self.pause())
        })
    }

    /// Accepts clients. Returns whether one was admitted: connections of other users must not keep
    /// the receiver busy.
    fn accept(&mut self, epoll: &Epoll, now: Instant) -> Io<bool> {
        let mut is_admitted = false;
        for _ in 0..MAX_CLIENTS {
            if self.clients.len() >= MAX_CLIENTS {
                if let Some(idle_until) = self.make_room(epoll, now) {
                    self.pause_accepting(epoll, idle_until)?;
                    break;
                }
            }
            match stream::accept(&self.listener) {
                Ok(Some(connection)) => is_admitted |= self.admit(epoll, connection, now),
                Ok(None) => break,
                // Usually no descriptor is left.
                Err(_) => {
                    self.pause_accepting(epoll, now + ACCEPT_RETRY_INTERVAL)?;
                    break;
                }
            }
        }
        Ok(is_admitted)
    }

    /// Dismisses the client that has been silent for longest. Returns when to try again if none has
    /// been silent for long enough.
    fn make_room(&mut self, epoll: &Epoll, now: Instant) -> Option<Instant> {
        loop {
            let (at, idle) = self
                .clients
                .iter_mut()
                .enumerate()
                .min_by_key(|(_, client)| client.last_data)?;
            let idle_until = idle.last_data + IDLE_TIMEOUT;
            if now < idle_until {
                return Some(idle_until);
            }
            if !event::is_readable(idle.connection.as_fd()) {
                self.dismiss(epoll, at);
                return None;
            }
            // The data of this client was not read yet, so it does not count as silent.
            idle.last_data = now;
        }
    }

    fn admit(&mut self, epoll: &Epoll, connection: ForkGuarded, now: Instant) -> bool {
        let Ok(sender) = socket::peer(&*connection) else {
            return false;
        };
        let id = self.next_id;
        let is_admitted =
            socket::is_own(&*connection, sender, self.user) && epoll.add(&*connection, id).is_ok();
        if is_admitted {
            self.next_id += 1;
            let inbox = Inbox::new(protocol::MAX_REQUEST_BYTES);
            self.clients.push(Client {
                id,
                since: now,
                last_data: now,
                connection,
                sender,
                inbox,
            });
        }
        is_admitted
    }

    fn resume_accepting(&mut self, epoll: &Epoll) -> Io<()> {
        if self.accept_paused_until.is_some() {
            epoll.pause(&*self.listener, LISTENER, false)?;
            self.accept_paused_until = None;
        }
        Ok(())
    }

    fn pause_accepting(&mut self, epoll: &Epoll, until: Instant) -> Io<()> {
        self.accept_paused_until = Some(until);
        epoll.pause(&*self.listener, LISTENER, true)
    }

    /// Returns the request that is complete with the data from this client, if its sender is still
    /// there: a sender that has given up has already reported that to its user.
    fn read(&mut self, epoll: &Epoll, id: u64, now: Instant) -> Option<ReceivedRequest> {
        let at = self
            .clients
            .binary_search_by_key(&id, |client| client.id)
            .ok()?;
        let Client {
            connection,
            inbox,
            last_data,
            ..
        } = &mut self.clients[at];
        *last_data = now;
        let mut left = READ_SIZE;
        let request = loop {
            match inbox.missing() {
                Ok(0) => break inbox.request(),
                Ok(_) if left == 0 => return None,
                Ok(missing) => match stream::receive(connection, inbox.buffer(), missing.min(left))
                {
                    Ok(Transferred::Bytes(received)) => left -= received,
                    Ok(Transferred::WouldBlock) => return None,
                    Ok(Transferred::Closed) | Err(_) => {
                        self.dismiss(epoll, at);
                        return None;
                    }
                },
                Err(malformed) => break Err(malformed),
            }
        };
        match request {
            Ok(request) => {
                let Client {
                    connection, sender, ..
                } = self.dismiss(epoll, at)?;
                (!event::is_readable(connection.as_fd())).then_some(ReceivedRequest {
                    connection,
                    sender,
                    request,
                })
            }
            Err(_) => {
                let _ = stream::send(connection, &protocol::empty_frame(Kind::NotUnderstood));
                self.dismiss(epoll, at);
                None
            }
        }
    }

    /// Removes a client; dropping it closes the connection.
    fn dismiss(&mut self, epoll: &Epoll, at: usize) -> Option<Client> {
        let client = self.clients.remove(at);
        // Another client may wait for the place or the descriptor of this one.
        self.accept_paused_until = self.accept_paused_until.map(|_| Instant::now());
        // Explicitly, because a program that is being started may briefly have a copy of the
        // descriptor.
        epoll.remove(&*client.connection).is_ok().then_some(client)
    }

    /// Returns how long no work is due unless data arrives.
    fn pause(&self) -> Duration {
        let late = self
            .clients
            .first()
            .map(|oldest| oldest.since + REQUEST_TIMEOUT);
        let next = late.into_iter().chain(self.accept_paused_until).min();
        next.map_or(Duration::MAX, |next| {
            next.saturating_duration_since(Instant::now())
        })
    }
}
