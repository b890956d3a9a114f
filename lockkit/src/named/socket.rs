//! A named lock as a listening socket: who listens at the name holds it, and releasing passes the socket on.
//!
//! - *Acquire*: bind the abstract name and listen; that is holding. If the name is taken, connect to the holder and
//!   wait on the connection: the queue of connections that the holder has not accepted is the queue of waiters, first
//!   come, first served.
//! - *Release*: accept the first connection whose peer is trusted and still there, and send it the listening socket.
//!   The name is taken throughout, so nobody barges in. With no waiter left, close the socket.
//! - *Death* of the holder closes its socket: each waiter sees its connection hang up and goes back to bind. A waiter
//!   that dies, also with the lock on its way to it, is closed and skipped in the same manner.
//!
//! The new owner listens again, so that the credentials which the kernel shows to whoever connects are its own. What a
//! dead holder leaves behind is told by a record in memory (see [`mark`](super::mark)). The same record says whether
//! anybody waits, which saves the holder from asking the kernel at every release; a waiter that it does not know of
//! sees its connection hang up, as at a death, and goes back to bind.

use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::time::Duration;

use rustix::io::Errno;

use super::abstracts;
use super::mark::Mark;
#[cfg(feature = "tokio")]
use crate::awaiting;
use crate::error::{Error, ErrorKind, Result};
use crate::lock::Recovered;
use crate::owner::{Liveness, Owner};
use crate::steps::step;
use crate::sys::event;
use crate::sys::folder::Sharing;
use crate::sys::fork::Shielded;
use crate::sys::seqpacket::{self, Address, Peer, Reached, Received};
use crate::wait::{Backoff, Patience, Subject, Wait, Waited};

/// For how long somebody who does not want to wait looks again at a lock that seems to be held by nobody alive: its
/// holder is about to begin or to end, or its socket is still open in a child that is about to start a program.
const MOMENT: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct SocketLock {
    name: String,
    sharing: Sharing,
    address: Address,
    mark: OnceLock<Mark>,
}

/// What is held, and who died with it.
type Taken = (Hold, Option<Box<Recovered>>);

/// A lock that is held.
#[derive(Debug)]
pub(super) struct Hold {
    /// The listening socket: the lock.
    pub(super) socket: Shielded,
    /// What it came through, if it was handed over. It is closed after the release, for which others may wait, and not
    /// between the hand-over and the work: closing a connection takes a tenth of a hand-over.
    _connection: Option<Shielded>,
}

/// An acquisition that has found the lock held: what it does between its sleeps, whoever sleeps, a thread or a task.
struct Turn<'l> {
    lock: &'l SocketLock,
    subject: &'l dyn Subject,
    patience: Patience,
    /// Who does not want to wait waits for a [`MOMENT`] all the same, unless somebody holds the lock who lives.
    is_brief: bool,
    backoff: Backoff,
    /// In the holder's queue, if it could be reached.
    connection: Option<Shielded>,
}

/// What came of one attempt.
enum Attempt {
    Taken(Taken),
    /// It is held. Sleep until the connection brings something, if there is one, but no longer than this; then
    /// [`wake`](Turn::wake).
    Sleep(Duration),
}

impl<'l> Turn<'l> {
    #[cold]
    fn begin(lock: &'l SocketLock, wait: &Wait, subject: &'l dyn Subject) -> Self {
        let patience = wait.patience_for(subject);
        let is_brief = patience.is_none();
        let moment = if lock.mark().is_some() { MOMENT } else { Duration::ZERO };
        let patience = patience.unwrap_or_else(|| Patience::brief(moment));
        Self { lock, subject, patience, is_brief, backoff: Backoff::new(), connection: None }
    }

    /// Binds the name, or queues up at its holder.
    fn attempt(&mut self) -> Result<Attempt> {
        if self.is_brief && self.lock.living_holder().is_some() {
            return Err(self.subject.held());
        }
        if self.connection.is_none() {
            if let Some(socket) = self.lock.listen()? {
                return Ok(Attempt::Taken(self.lock.begin(socket)));
            }
            self.connection = self.lock.queue_up(self.subject)?;
            if !self.is_brief && self.connection.is_some() {
                if let Some(mark) = self.lock.mark() {
                    mark.set_waited_for();
                    step("waiter written down");
                }
                self.backoff = Backoff::new();
            }
        }
        Ok(Attempt::Sleep(match &self.connection {
            Some(_) if !self.is_brief => Duration::MAX,
            _ => self.backoff.next(),
        }))
    }

    /// Takes what has arrived, also when the time is over.
    fn wake(&mut self, waited: Waited) -> Result<Option<Taken>> {
        if let Some(connection) = &self.connection {
            match self.lock.receive(connection)? {
                Received::Lock(socket) => return self.lock.take_over(socket, self.connection.take()).map(Some),
                Received::HungUp => self.connection = None,
                Received::Nothing => {}
            }
        }
        match waited {
            Ok(()) => Ok(None),
            Err(_) if self.is_brief => Err(self.subject.held()),
            Err(gave_up) => Err(self.patience.error(gave_up, self.subject)),
        }
    }
}

impl SocketLock {
    /// The names of the locks that somebody holds now.
    pub(super) fn list(sharing: Sharing) -> Result<Vec<String>> {
        let prefix = prefix(sharing);
        let held = |socket: abstracts::Abstract| Some(socket.name.strip_prefix(&prefix)?.to_owned());
        Ok(abstracts::all()?.into_iter().filter(|socket| !socket.queued).filter_map(held).collect())
    }

    pub(super) fn new(name: &str, sharing: Sharing) -> Result<Self> {
        let socket = prefix(sharing) + name;
        let address = seqpacket::address(&socket).map_err(|error| Error::io("name", format!("@{socket}"), error))?;
        Ok(Self { name: name.to_owned(), sharing, address, mark: OnceLock::new() })
    }

    pub(super) fn acquire(&self, wait: &Wait, subject: &dyn Subject) -> Result<Taken> {
        if let Some(taken) = self.acquire_free(wait, subject)? {
            return Ok(taken);
        }
        let mut turn = Turn::begin(self, wait, subject);
        loop {
            let pause = match turn.attempt()? {
                Attempt::Taken(taken) => return Ok(taken),
                Attempt::Sleep(pause) => pause,
            };
            let waited = turn.patience.wait(turn.connection.as_ref().map(|queued| queued.as_fd()), pause)?;
            if let Some(taken) = turn.wake(waited)? {
                return Ok(taken);
            }
        }
    }

    /// As [`acquire`](Self::acquire), asleep on the reactor. Dropping the future closes the connection, so the holder
    /// passes this waiter over, or the kernel closes the socket that was on its way here.
    #[cfg(feature = "tokio")]
    pub(super) async fn acquire_async(&self, wait: &Wait, subject: &dyn Subject) -> Result<Taken> {
        awaiting::check_runtime()?;
        if let Some(taken) = self.acquire_free(wait, subject)? {
            return Ok(taken);
        }
        let mut turn = Turn::begin(self, wait, subject);
        loop {
            let pause = match turn.attempt()? {
                Attempt::Taken(taken) => return Ok(taken),
                Attempt::Sleep(pause) => pause,
            };
            let readable = awaiting::readable(turn.connection.as_ref().map(|queued| queued.as_fd()));
            let waited = turn.patience.wait_async(readable, pause).await?;
            if let Some(taken) = turn.wake(waited)? {
                return Ok(taken);
            }
        }
    }

    fn acquire_free(&self, wait: &Wait, subject: &dyn Subject) -> Result<Option<Taken>> {
        wait.check(subject)?;
        Ok(self.listen()?.map(|socket| self.begin(socket)))
    }

    /// Queues up at the holder; `None` when it cannot be reached.
    fn queue_up(&self, subject: &dyn Subject) -> Result<Option<Shielded>> {
        match seqpacket::connect(&self.address).map_err(|error| self.io("connect to", error))? {
            Reached::Nobody | Reached::Full => Ok(None),
            Reached::Queue(connection) => {
                let Peer { uid, pid } = self.peer(&connection)?;
                if self.trusts(uid) {
                    return Ok(Some(connection));
                }
                let pid = (pid != 0).then_some(pid);
                Err(ErrorKind::ForeignOwner { lock: subject.describe(), uid, pid }.into())
            }
        }
    }

    fn listen(&self) -> Result<Option<Shielded>> {
        seqpacket::listen_at(&self.address).map_err(|error| self.io("bind", error))
    }

    /// Makes the socket that the holder before handed over this process's own.
    fn take_over(&self, socket: Shielded, connection: Option<Shielded>) -> Result<Taken> {
        seqpacket::listen(&socket).map_err(|error| self.io("listen on", error))?;
        // A record that is still there is older than the holder before, who released.
        self.mark().map(Mark::take);
        Ok((Hold { socket, _connection: connection }, None))
    }

    fn receive(&self, connection: &Shielded) -> Result<Received> {
        let received = seqpacket::receive(connection).map_err(|error| self.io("receive", error))?;
        match (received, self.sharing) {
            // Anybody may have sent it.
            (Received::Lock(socket), Sharing::Machine) if !seqpacket::listens_at(&socket, &self.address) => {
                Ok(Received::HungUp)
            }
            (received, _) => Ok(received),
        }
    }

    fn peer(&self, connection: &Shielded) -> Result<Peer> {
        seqpacket::peer(&**connection).map_err(|error| self.io("ask who holds", error))
    }

    /// Passes the lock on to the first waiter, or frees it.
    pub(super) fn release(&self, hold: Hold) {
        let socket = &hold.socket;
        let Some(mark) = self.mark() else {
            self.pass_on(socket);
            return;
        };
        mark.wipe();
        step("record wiped");
        let waited_for = match mark.is_waited_for() {
            Some(waited_for) => waited_for,
            // Looking is cheap, accepting is not, and mostly nobody waits.
            None => event::is_readable(socket.as_fd()),
        };
        if waited_for && !self.pass_on(socket) {
            mark.clear_waited_for();
        }
    }

    fn pass_on(&self, socket: &Shielded) -> bool {
        // More can only have come while these were looked at; they will see the socket close and bind.
        for _ in 0..=seqpacket::BACKLOG {
            let Some(waiter) = seqpacket::accept(socket) else { return false };
            let trusted = seqpacket::peer(&waiter).is_ok_and(|peer| self.trusts(peer.uid));
            if trusted && seqpacket::hand_over(&waiter, socket).is_ok() {
                return true;
            }
        }
        false
    }

    /// Writes down that `owner` holds the lock.
    pub(super) fn name_holder(&self, owner: &Owner) {
        if let Some(mark) = self.mark() {
            mark.name(owner);
        }
    }

    /// The connections in the queue of whoever listens at the name.
    pub(super) fn waiters(&self) -> Result<u32> {
        let queued = abstracts::all()?.into_iter().filter(|socket| socket.queued && self.is_at(&socket.name)).count();
        Ok(queued as u32)
    }

    /// Whether the name is taken. While it is, asking disturbs nobody; a free one is taken for a moment.
    #[cfg(feature = "cli")]
    pub(super) fn is_held(&self) -> Result<bool> {
        let free = seqpacket::is_free(&self.address).map_err(|error| self.io("bind", error))?;
        Ok(!free)
    }

    fn is_at(&self, name: &str) -> bool {
        self.address.abstract_name() == Some(name.as_bytes())
    }

    fn trusts(&self, uid: u32) -> bool {
        match self.sharing {
            Sharing::User(own) => uid == own || uid == 0,
            Sharing::Machine => true,
        }
    }

    pub(super) fn owner(&self) -> Result<Option<Owner>> {
        if let Some(owner) = self.living_holder() {
            // A holder that starts another program in its place leaves its record, and the name.
            let free = seqpacket::is_free(&self.address).map_err(|error| self.io("bind", error))?;
            return Ok((!free).then_some(owner));
        }
        match seqpacket::connect(&self.address).map_err(|error| self.io("connect to", error))? {
            Reached::Nobody => Ok(None),
            Reached::Full => Err(self.io("ask who holds", Errno::AGAIN)),
            Reached::Queue(connection) => Ok(owner_of(self.peer(&connection)?)),
        }
    }

    /// The holder by the record, unless it has died since. Asking costs the holder nothing, where a connection would
    /// take a place in its queue until it releases.
    fn living_holder(&self) -> Option<Owner> {
        let owner = self.mark()?.holder()?;
        (owner.liveness_by_name() != Liveness::Dead).then_some(owner)
    }

    /// Writes down who holds now, and says whether the holder before died.
    fn begin(&self, socket: Shielded) -> Taken {
        (Hold { socket, _connection: None }, self.mark().and_then(Mark::take))
    }

    /// The record, as soon as it could be opened: what prevents that may pass.
    fn mark(&self) -> Option<&Mark> {
        match self.mark.get() {
            None => {
                let mark = Mark::open(&self.name, self.sharing).ok()?;
                Some(self.mark.get_or_init(|| mark))
            }
            opened => opened,
        }
    }

    fn io(&self, action: &'static str, error: Errno) -> Error {
        Error::io(action, self.path(), error)
    }

    fn path(&self) -> String {
        format!("@{}", String::from_utf8_lossy(self.address.abstract_name().unwrap_or_default()))
    }
}

/// What stands before the name of a lock in that of its socket.
fn prefix(sharing: Sharing) -> String {
    match sharing {
        Sharing::User(uid) => format!("lockkit/u{uid}/"),
        Sharing::Machine => "lockkit/machine/".to_owned(),
    }
}

fn owner_of(peer: Peer) -> Option<Owner> {
    match peer.pid {
        0 => Some(Owner::hidden()),
        pid => Owner::of(pid),
    }
}
