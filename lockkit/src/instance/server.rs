//! Where the first instance receives: one descriptor to wait for, whatever happens on many connections.
//!
//! [`Reception::look`] never waits. It takes connections of this user's processes, reads what each has sent so far, and
//! gives out one complete request at a time; nothing more is read before that. [`Reception::next`] is it with the wait
//! of every lock around it; a runtime waits for the descriptor itself, for as long as `look` says.
//!
//! What callers can cost is bounded. Another user's is closed at once. At most [`MOST_CALLERS`] are being read at a
//! time, the others wait in the kernel; each has [`DELIVERY`] to say all it has to say, and when others wait for its
//! place, who has been silent for [`GRACE`] yields it, the longest silent first. Memory is taken for what has arrived,
//! never for what a length promises, and one request at a time is taken apart, which may take six times its length, in
//! texts that are all empty. Whoever is dismissed sees its connection closed, as it does when the first ends, and comes
//! again if it still wants to.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::io::{Errno, Result as Io};

use super::protocol::{self, Inbox, Kind, Request};
#[cfg(feature = "tokio")]
use crate::blocking;
use crate::error::{Error, Result};
use crate::sys::event::{self, Event};
use crate::sys::fork::{self, ForkGuarded};
use crate::sys::seqpacket::{self, Peer};
use crate::sys::stream::{self, Moved, Watched};
use crate::wait::{Wait, WaitState};

/// How many connections are read at a time.
const MOST_CALLERS: usize = 32;
/// How long a request may take to arrive.
const DELIVERY: Duration = Duration::from_secs(5);
/// How long a caller that says nothing keeps its place when all are taken and another one waits.
const GRACE: Duration = Duration::from_millis(50);
/// How long nobody is accepted after the system refused to.
const REST: Duration = Duration::from_millis(100);
/// How much is read from one caller before it is another's turn.
const PORTION: usize = 64 << 10;
/// How often somebody who does not want to wait looks again as long as something is coming in: enough for the longest
/// request.
const ROUNDS: usize = 4 * protocol::MOST_REQUEST / PORTION;

/// The names of what is watched; those of callers come after them.
const LISTENER: u64 = 0;
const CLOSED: u64 = 1;

/// A request that has arrived, with the connection on which it is answered.
#[derive(Debug)]
pub(super) struct Arrived {
    pub(super) connection: ForkGuarded,
    pub(super) sender: Peer,
    pub(super) request: Request,
}

/// What a look at the reception brought.
pub(super) enum Look {
    Arrived(Box<Arrived>),
    /// Nothing yet, though something moved.
    Moved,
    /// Nothing, until the descriptor can be read or the time has passed.
    Nothing(Duration),
    /// The reception is closed.
    Closed,
}

pub(super) struct Reception {
    watched: Watched,
    /// Wakes whoever waits when the reception closes.
    closed: Event,
    desk: Mutex<Option<Desk>>,
    /// The process that receives: a forked child has a copy, and perhaps of a locked mutex.
    generation: u32,
}

struct Desk {
    listener: ForkGuarded,
    /// The user whose processes may call.
    user: u32,
    /// Until when the listener is not watched.
    rests_until: Option<Instant>,
    /// In the order in which they came, and so of their ids.
    callers: Vec<Caller>,
    next_id: u64,
}

struct Caller {
    id: u64,
    since: Instant,
    /// When something came from it last.
    heard: Instant,
    connection: ForkGuarded,
    sender: Peer,
    inbox: Inbox,
}

impl Reception {
    /// Receives the processes of `user` at `listener`.
    pub(super) fn open(listener: ForkGuarded, user: u32) -> Io<Self> {
        let closed = Event::new().map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::MFILE))?;
        let watched = Watched::new()?;
        watched.add(&*listener, LISTENER)?;
        watched.add(&closed, CLOSED)?;
        let callers = Vec::with_capacity(MOST_CALLERS);
        let desk = Desk { listener, user, rests_until: None, callers, next_id: CLOSED + 1 };
        Ok(Self { watched, closed, desk: Mutex::new(Some(desk)), generation: fork::generation() })
    }

    /// Whether this process is a child of the one that receives.
    pub(super) fn is_copy(&self) -> bool {
        self.generation != fork::generation()
    }

    /// Closes every connection that was not given out, and wakes whoever waits here.
    pub(super) fn close(&self) {
        if !self.is_copy() {
            drop(self.desk.lock().take());
            self.closed.set();
        }
    }

    /// The next request that somebody still waits to have answered; `None` when `wait` is over or the reception closed.
    pub(super) fn next(&self, wait: &Wait) -> Result<Option<Arrived>> {
        let mut looking = Looking::new(self, wait);
        loop {
            match looking.again()? {
                Found::Arrived(arrived) => return Ok(Some(*arrived)),
                Found::Nothing => return Ok(None),
                Found::More => {}
                Found::Later(patience, pause) => {
                    // When the time is over, what has come meanwhile is still looked at.
                    let _ = patience.wait(Some(self.as_fd()), pause)?;
                }
            }
        }
    }

    /// As [`next`](Self::next), in a task. Dropping the future loses nothing: what was not given out is still here.
    #[cfg(feature = "tokio")]
    pub(super) async fn next_async(&self, wait: &Wait) -> Result<Option<Arrived>> {
        let mut looking = Looking::new(self, wait);
        loop {
            match looking.again()? {
                Found::Arrived(arrived) => return Ok(Some(*arrived)),
                Found::Nothing => return Ok(None),
                // However much comes in, it is the other tasks' turn.
                Found::More => tokio::task::yield_now().await,
                Found::Later(patience, pause) => {
                    // One of its own: a reactor takes a descriptor once, and several tasks may wait here.
                    let own = ForkGuarded::new(|| rustix::io::fcntl_dupfd_cloexec(self.as_fd(), 0));
                    let own = own.map_err(|error| Error::io("wait for", "activations", error))?;
                    let _ = patience.wait_async(blocking::readable(Some(own.as_fd())), pause).await?;
                }
            }
        }
    }

    /// Does what can be done without waiting.
    pub(super) fn look(&self) -> Result<Look> {
        if self.is_copy() {
            return Ok(Look::Closed);
        }
        let mut desk = self.desk.lock();
        let Some(desk) = desk.as_mut() else { return Ok(Look::Closed) };
        desk.work(&self.watched).map_err(|error| Error::io("receive", "activations", error))
    }

    /// Watches the listener in any case. Whoever sleeps on here knows nothing of a rest that has begun since.
    fn leave(&self) {
        if self.is_copy() {
            return;
        }
        if let Some(desk) = self.desk.lock().as_mut() {
            // Where that fails, the next look says so.
            let _ = desk.end_rest(&self.watched);
        }
    }
}

/// Can be read when [`Reception::look`] has something to do.
impl AsFd for Reception {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.watched.as_fd()
    }
}

/// Looking again and again, for as long as a [`Wait`] says.
struct Looking<'w> {
    reception: &'w Reception,
    wait: &'w Wait,
    patience: Option<WaitState>,
    /// How often it has looked again although the time was over, because something was coming in.
    rounds: usize,
}

enum Found<'l> {
    Arrived(Box<Arrived>),
    /// And nothing will be waited for.
    Nothing,
    /// To be looked at again at once.
    More,
    /// To be looked at again after a pause, or when the descriptor can be read.
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

/// Also when its future is dropped.
impl Drop for Looking<'_> {
    fn drop(&mut self) {
        self.reception.leave();
    }
}

impl Desk {
    /// Takes what has come in, a portion from each, until one request is complete. The others stay in the kernel, so
    /// that the descriptor can still be read by whoever else waits for it.
    fn work(&mut self, watched: &Watched) -> Io<Look> {
        let now = Instant::now();
        if self.rests_until.is_some_and(|until| now >= until) {
            self.end_rest(watched)?;
        }
        let (mut moved, mut is_called) = (false, false);
        // What has come from those who are here goes before what time and others want of them.
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

    /// Whether anybody was let in: strangers shall not keep it busy.
    fn accept(&mut self, watched: &Watched, now: Instant) -> Io<bool> {
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
                // No descriptor is left, mostly.
                Err(_) => {
                    self.rest(watched, now + REST)?;
                    break;
                }
            }
        }
        Ok(is_admitted)
    }

    /// Dismisses who has been silent for longest; or says when to try again, if nobody has been for long enough.
    fn make_room(&mut self, watched: &Watched, now: Instant) -> Option<Instant> {
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
            // It is not its fault that nobody has listened.
            silent.heard = now;
        }
    }

    fn admit(&mut self, watched: &Watched, connection: ForkGuarded, now: Instant) -> bool {
        let Ok(sender) = seqpacket::peer(&*connection) else { return false };
        let id = self.next_id;
        let is_admitted = seqpacket::is_own(&*connection, sender, self.user) && watched.add(&*connection, id).is_ok();
        if is_admitted {
            self.next_id += 1;
            let inbox = Inbox::new(protocol::MOST_REQUEST);
            self.callers.push(Caller { id, since: now, heard: now, connection, sender, inbox });
        }
        is_admitted
    }

    fn end_rest(&mut self, watched: &Watched) -> Io<()> {
        if self.rests_until.is_some() {
            watched.pause(&*self.listener, LISTENER, false)?;
            self.rests_until = None;
        }
        Ok(())
    }

    fn rest(&mut self, watched: &Watched, until: Instant) -> Io<()> {
        self.rests_until = Some(until);
        watched.pause(&*self.listener, LISTENER, true)
    }

    /// The request that is complete with what has come from this caller, if its sender is still there: one that has
    /// given up has told its user so.
    fn read(&mut self, watched: &Watched, id: u64, now: Instant) -> Option<Arrived> {
        let at = self.callers.binary_search_by_key(&id, |caller| caller.id).ok()?;
        let Caller { connection, inbox, heard, .. } = &mut self.callers[at];
        *heard = now;
        let mut portion = PORTION;
        let request = loop {
            match inbox.missing() {
                Ok(0) => break inbox.request(),
                Ok(_) if portion == 0 => return None,
                Ok(missing) => match stream::receive(connection, inbox.arrived(), missing.min(portion)) {
                    Ok(Moved::Bytes(received)) => portion -= received,
                    Ok(Moved::Nothing) => return None,
                    Ok(Moved::End) | Err(_) => {
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

    /// Takes a caller from its place; dropping it closes the connection.
    fn dismiss(&mut self, watched: &Watched, at: usize) -> Option<Caller> {
        let caller = self.callers.remove(at);
        // Its place, and its descriptor, may be what another one waits for.
        self.rests_until = self.rests_until.map(|_| Instant::now());
        // By hand, for a program that is being started may have a copy of the descriptor for a moment.
        watched.leave_out(&*caller.connection).is_ok().then_some(caller)
    }

    /// How long nothing needs to be done unless something comes.
    fn pause(&self) -> Duration {
        let late = self.callers.first().map(|oldest| oldest.since + DELIVERY);
        let next = late.into_iter().chain(self.rests_until).min();
        next.map_or(Duration::MAX, |next| next.saturating_duration_since(Instant::now()))
    }
}
