//! The receiver of the first instance: one descriptor to wait for, with many connections behind it.
//!
//! [`Reception::look`] never waits. It accepts connections of this user's processes, reads the bytes that have arrived
//! so far, and returns one complete request at a time. It reads nothing more before that. [`Reception::next`] adds the
//! wait that every lock has. An async runtime waits for the descriptor itself, for as long as `look` says.
//!
//! The cost of callers is bounded. A connection of another user is closed at once. At most [`MOST_CALLERS`] are read at
//! a time, and the others wait in the kernel. Each caller has [`DELIVERY`] to send its whole request. If other callers
//! wait for a place, a caller that has been silent for [`GRACE`] is dismissed, the longest silent first. Memory is
//! allocated for bytes that have arrived, never for an announced length. One request at a time is parsed, which may
//! take six times its length in memory if all its texts are empty. A dismissed caller sees its connection closed, as at
//! the end of the first instance, and may connect again.

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
const MOST_CALLERS: usize = 32;
/// The time that a request may take to arrive.
const DELIVERY: Duration = Duration::from_secs(5);
/// The time that a silent caller keeps its place when all places are taken and another caller waits.
const GRACE: Duration = Duration::from_millis(50);
/// The pause before the next accept after the system refused one.
const REST: Duration = Duration::from_millis(100);
/// The number of bytes that are read from one caller before the next.
const PORTION: usize = 64 << 10;
/// The number of further looks without a wait, or after its end, while data is arriving: enough for the longest
/// request.
const ROUNDS: usize = 4 * protocol::MOST_REQUEST / PORTION;

/// The names of the watched descriptors; those of callers come after them.
const LISTENER: u64 = 0;
const CLOSED: u64 = 1;

/// A request that has arrived, with the connection on which it is answered.
#[derive(Debug)]
pub(super) struct Arrived {
    pub(super) connection: ForkGuarded,
    pub(super) sender: Peer,
    pub(super) request: Request,
}

/// The result of a look at the reception.
pub(super) enum Look {
    Arrived(Box<Arrived>),
    /// No request yet, but some data or connection arrived.
    Moved,
    /// Nothing, until the descriptor is readable or the time has passed.
    Nothing(Duration),
    /// The reception is closed.
    Closed,
}

pub(super) struct Reception {
    watched: Epoll,
    /// Wakes the waiters when the reception closes.
    closed: Event,
    desk: Mutex<Option<Desk>>,
    /// The process that receives. A forked child has a copy, possibly with a locked mutex.
    process: ProcessId,
}

struct Desk {
    listener: ForkGuarded,
    /// The user whose processes may call.
    user: u32,
    /// The listener is not watched until this moment.
    rests_until: Option<Instant>,
    /// In the order of arrival, and so of their ids.
    callers: Vec<Caller>,
    next_id: u64,
}

struct Caller {
    id: u64,
    since: Instant,
    /// The time of the last data from the caller.
    heard: Instant,
    connection: ForkGuarded,
    sender: Peer,
    inbox: Inbox,
}

impl Reception {
    /// Receives the processes of `user` at `listener`.
    pub(super) fn open(listener: ForkGuarded, user: u32) -> Io<Self> {
        let closed = Event::new().map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::MFILE))?;
        let watched = Epoll::new()?;
        watched.add(&*listener, LISTENER)?;
        watched.add(&closed, CLOSED)?;
        let callers = Vec::with_capacity(MOST_CALLERS);
        let desk = Desk { listener, user, rests_until: None, callers, next_id: CLOSED + 1 };
        Ok(Self { watched, closed, desk: Mutex::new(Some(desk)), process: ProcessId::current() })
    }

    /// Whether this process is a child of the one that receives.
    pub(super) fn is_copy(&self) -> bool {
        !self.process.is_current()
    }

    /// Closes every connection that was not given out, and wakes the waiters.
    pub(super) fn close(&self) {
        if !self.is_copy() {
            drop(self.desk.lock().take());
            self.closed.set();
        }
    }

    /// Returns the next request whose sender still waits for an answer, or `None` if `wait` is over or the reception
    /// closed.
    pub(super) fn next(&self, wait: &Wait) -> Result<Option<Arrived>> {
        let mut looking = Looking::new(self, wait);
        loop {
            match looking.again()? {
                Found::Arrived(arrived) => return Ok(Some(*arrived)),
                Found::Nothing => return Ok(None),
                Found::More => {}
                Found::Later(patience, pause) => {
                    // At the deadline, the data that has arrived meanwhile is still read.
                    let _ = patience.wait(Some(self.as_fd()), pause)?;
                }
            }
        }
    }

    /// Returns the next request as [`next`](Self::next) does, in a task. Dropping the future loses nothing: requests
    /// that were not given out are still here.
    #[cfg(feature = "tokio")]
    pub(super) async fn next_async(&self, wait: &Wait) -> Result<Option<Arrived>> {
        let mut looking = Looking::new(self, wait);
        loop {
            match looking.again()? {
                Found::Arrived(arrived) => return Ok(Some(*arrived)),
                Found::Nothing => return Ok(None),
                // Other tasks must run, however much data arrives.
                Found::More => tokio::task::yield_now().await,
                Found::Later(patience, pause) => {
                    // A separate descriptor: a reactor registers a descriptor once, and several tasks may wait here.
                    let own = ForkGuarded::new(|| rustix::io::fcntl_dupfd_cloexec(self.as_fd(), 0));
                    let own = own.map_err(|error| Error::io("wait for", "activations", error))?;
                    let _ = patience.wait_async(blocking::readable(Some(own.as_fd())), pause).await?;
                }
            }
        }
    }

    /// Does the work that needs no waiting.
    pub(super) fn look(&self) -> Result<Look> {
        if self.is_copy() {
            return Ok(Look::Closed);
        }
        let mut desk = self.desk.lock();
        let Some(desk) = desk.as_mut() else { return Ok(Look::Closed) };
        desk.work(&self.watched).map_err(|error| Error::io("receive", "activations", error))
    }

    /// Watches the listener in any case: a remaining waiter does not know of a pause that has begun since.
    fn leave(&self) {
        if self.is_copy() {
            return;
        }
        if let Some(desk) = self.desk.lock().as_mut() {
            // If it fails, the next look reports it.
            let _ = desk.end_rest(&self.watched);
        }
    }
}

/// Readable when [`Reception::look`] has work to do.
impl AsFd for Reception {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.watched.as_fd()
    }
}

/// Repeated looks, for as long as a [`Wait`] says.
struct Looking<'w> {
    reception: &'w Reception,
    wait: &'w Wait,
    patience: Option<WaitState>,
    /// The number of further looks after the deadline, because data was arriving.
    rounds: usize,
}

enum Found<'l> {
    Arrived(Box<Arrived>),
    /// There is nothing, and nothing to wait for.
    Nothing,
    /// Look again at once.
    More,
    /// Look again after a pause, or when the descriptor is readable.
    Later(&'l WaitState, Duration),
}

impl<'w> Looking<'w> {
    fn new(reception: &'w Reception, wait: &'w Wait) -> Self {
        Self { reception, wait, patience: wait.patience(), rounds: 0 }
    }

    fn again(&mut self) -> Result<Found<'_>> {
        if self.wait.is_cancelled() {
            return Ok(Found::Nothing);
        }
        let is_over = match &self.patience {
            None => true,
            Some(patience) => patience.until().is_some_and(|until| Instant::now() >= until),
        };
        Ok(match (self.reception.look()?, &self.patience) {
            (Look::Arrived(arrived), _) => Found::Arrived(arrived),
            (Look::Moved, _) if !is_over || self.rounds < ROUNDS => {
                self.rounds += usize::from(is_over);
                Found::More
            }
            (Look::Nothing(pause), Some(patience)) if !is_over => Found::Later(patience, pause),
            (Look::Closed | Look::Nothing(_) | Look::Moved, _) => Found::Nothing,
        })
    }
}

/// Also runs when the future is dropped.
impl Drop for Looking<'_> {
    fn drop(&mut self) {
        self.reception.leave();
    }
}

impl Desk {
    /// Reads the arrived data, a portion from each caller, until one request is complete. The other data stays in the
    /// kernel, so that the descriptor stays readable for other waiters.
    fn work(&mut self, watched: &Epoll) -> Io<Look> {
        let now = Instant::now();
        if self.rests_until.is_some_and(|until| now >= until) {
            self.end_rest(watched)?;
        }
        let (mut moved, mut is_called) = (false, false);
        // Data of the present callers comes before timeouts and new callers.
        for id in watched.ready()? {
            match id {
                LISTENER => is_called = true,
                CLOSED => {}
                caller => {
                    moved = true;
                    if let Some(arrived) = self.read(watched, caller, now) {
                        return Ok(Look::Arrived(Box::new(arrived)));
                    }
                }
            }
        }
        while self.callers.first().is_some_and(|oldest| now >= oldest.since + DELIVERY) {
            self.dismiss(watched, 0);
        }
        if is_called {
            moved |= self.accept(watched, now)?;
        }
        Ok(if moved { Look::Moved } else { Look::Nothing(self.pause()) })
    }

    /// Accepts callers. Returns whether one was admitted: connections of other users must not keep the receiver busy.
    fn accept(&mut self, watched: &Epoll, now: Instant) -> Io<bool> {
        let mut is_admitted = false;
        for _ in 0..MOST_CALLERS {
            if self.callers.len() >= MOST_CALLERS {
                if let Some(yields) = self.make_room(watched, now) {
                    self.rest(watched, yields)?;
                    break;
                }
            }
            match stream::accept(&self.listener) {
                Ok(Some(connection)) => is_admitted |= self.admit(watched, connection, now),
                Ok(None) => break,
                // Usually no descriptor is left.
                Err(_) => {
                    self.rest(watched, now + REST)?;
                    break;
                }
            }
        }
        Ok(is_admitted)
    }

    /// Dismisses the caller that has been silent for longest. Returns when to try again if none has been silent for
    /// long enough.
    fn make_room(&mut self, watched: &Epoll, now: Instant) -> Option<Instant> {
        loop {
            let (at, silent) = self.callers.iter_mut().enumerate().min_by_key(|(_, caller)| caller.heard)?;
            let yields = silent.heard + GRACE;
            if now < yields {
                return Some(yields);
            }
            if !event::is_readable(silent.connection.as_fd()) {
                self.dismiss(watched, at);
                return None;
            }
            // The data of this caller was not read yet, so it does not count as silent.
            silent.heard = now;
        }
    }

    fn admit(&mut self, watched: &Epoll, connection: ForkGuarded, now: Instant) -> bool {
        let Ok(sender) = socket::peer(&*connection) else { return false };
        let id = self.next_id;
        let is_admitted = socket::is_own(&*connection, sender, self.user) && watched.add(&*connection, id).is_ok();
        if is_admitted {
            self.next_id += 1;
            let inbox = Inbox::new(protocol::MOST_REQUEST);
            self.callers.push(Caller { id, since: now, heard: now, connection, sender, inbox });
        }
        is_admitted
    }

    fn end_rest(&mut self, watched: &Epoll) -> Io<()> {
        if self.rests_until.is_some() {
            watched.pause(&*self.listener, LISTENER, false)?;
            self.rests_until = None;
        }
        Ok(())
    }

    fn rest(&mut self, watched: &Epoll, until: Instant) -> Io<()> {
        self.rests_until = Some(until);
        watched.pause(&*self.listener, LISTENER, true)
    }

    /// Returns the request that is complete with the data from this caller, if its sender is still there: a sender that
    /// has given up has already reported that to its user.
    fn read(&mut self, watched: &Epoll, id: u64, now: Instant) -> Option<Arrived> {
        let at = self.callers.binary_search_by_key(&id, |caller| caller.id).ok()?;
        let Caller { connection, inbox, heard, .. } = &mut self.callers[at];
        *heard = now;
        let mut portion = PORTION;
        let request = loop {
            match inbox.missing() {
                Ok(0) => break inbox.request(),
                Ok(_) if portion == 0 => return None,
                Ok(missing) => match stream::receive(connection, inbox.arrived(), missing.min(portion)) {
                    Ok(Transferred::Bytes(received)) => portion -= received,
                    Ok(Transferred::WouldBlock) => return None,
                    Ok(Transferred::Closed) | Err(_) => {
                        self.dismiss(watched, at);
                        return None;
                    }
                },
                Err(malformed) => break Err(malformed),
            }
        };
        match request {
            Ok(request) => {
                let Caller { connection, sender, .. } = self.dismiss(watched, at)?;
                (!event::is_readable(connection.as_fd())).then_some(Arrived { connection, sender, request })
            }
            Err(_) => {
                let _ = stream::send(connection, &protocol::note(Kind::NotUnderstood));
                self.dismiss(watched, at);
                None
            }
        }
    }

    /// Removes a caller; dropping it closes the connection.
    fn dismiss(&mut self, watched: &Epoll, at: usize) -> Option<Caller> {
        let caller = self.callers.remove(at);
        // Another caller may wait for the place or the descriptor of this one.
        self.rests_until = self.rests_until.map(|_| Instant::now());
        // Explicitly, because a program that is being started may briefly have a copy of the descriptor.
        watched.remove(&*caller.connection).is_ok().then_some(caller)
    }

    /// Returns how long no work is due unless data arrives.
    fn pause(&self) -> Duration {
        let late = self.callers.first().map(|oldest| oldest.since + DELIVERY);
        let next = late.into_iter().chain(self.rests_until).min();
        next.map_or(Duration::MAX, |next| next.saturating_duration_since(Instant::now()))
    }
}
