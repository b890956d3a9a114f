//! Named locks on Linux: a listening socket in the abstract namespace. The process that listens at
//! the name holds the lock, and a release passes the socket on.
//!
//! | event | mechanism |
//! |---|---|
//! | acquire, free | `bind` and `listen` succeed. The listener is the holder. |
//! | acquire, held | `connect` to the holder, then `poll` the connection. The accept queue is the FIFO queue of waiters. |
//! | release | Accept the first live, trusted waiter, record it, and send it the listening socket (SCM_RIGHTS). Close the own copy, then end the stream. The address stays bound. Without waiters, close the socket. |
//! | the holder dies | The kernel closes the socket. Every waiter sees a hang-up and binds again. |
//! | a waiter dies or gives up | Its connection is closed, and the release skips it. A socket in flight to it is closed by the kernel. |
//!
//! # Guarantees
//! - A waiter holds the lock when it has received the socket and the end of the stream. At that
//!   point no earlier holder has a copy of the socket, wherever that holder is stopped. Until then
//!   the earlier holder holds the lock.
//! - If another user has had a socket, this process never accepts from it and never passes it on:
//!   that user could make `accept` block, or give copies to other processes. The release closes the
//!   socket, and its waiters bind again.
//! - A release skips at most [`MAX_SKIPPED`] connections in a row. If none of them is a live
//!   waiter, the release closes the socket, and the waiters behind them bind again in any order.
//!
//! The new holder calls `listen` again, so that the kernel shows its credentials to a process that
//! connects. A record in memory (see [`records`](super::records)) names the holder and reports its
//! death to the next holder. The table of records also counts the waiters that have queued up,
//! which saves the holder a system call per release. A waiter that is not counted sees a hang-up
//! and binds again.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::time::Duration;

use rustix::io::Errno;

use super::options::Backend;
use super::records::{HolderRecord, Holders};
#[cfg(feature = "tokio")]
use crate::base::blocking;
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::guard::Recovered;
use crate::base::holder_record::{self, IDENTITY, SUM, Words};
use crate::base::lock_info::LockInfo;
use crate::base::owner::{Liveness, Owner};
use crate::base::runtime_dir::{self, Sharing};
use crate::base::wait::{Backoff, Wait, WaitResult, WaitState};
use crate::sys::clock::nanos;
use crate::sys::failpoint::step;
use crate::sys::fork::{self, ForkGuarded};
use crate::sys::proc_net_unix::{LIST, Sockets};
use crate::sys::unix_socket::seqpacket::{self, Received};
use crate::sys::unix_socket::socket::{self, Address, Peer, Reached};
use crate::sys::{event, user};

/// How long a caller that does not wait retries a lock without a known live holder: the holder is
/// about to start or to end, or its socket is still open in a child that is about to start a
/// program.
const UNKNOWN_HOLDER_TIMEOUT: Duration = Duration::from_secs(1);

/// The number of connections in a row without a live waiter after which a release closes the
/// socket. Skipping one connection costs some tens of microseconds; the kernel drops all of them in
/// a fraction of that.
const MAX_SKIPPED: usize = 64;

/// The backend that [`Backend::Auto`] selects.
pub(super) const NATIVE: Backend = Backend::Socket;
pub(super) type NativeLock = SocketLock;
pub(super) type NativeHold = SocketHold;

#[derive(Debug)]
pub(super) struct SocketLock {
    sharing: Sharing,
    address: Address,
    record: OnceLock<HolderRecord>,
}

/// The acquired lock, and the holder that died with it.
type Acquired = (SocketHold, Option<Box<Recovered>>);

/// A lock that this process holds.
#[derive(Debug)]
pub(super) struct SocketHold {
    /// The listening socket: the lock.
    socket: ForkGuarded,
    /// The connection that the socket came through, if it was handed over. It is closed after the
    /// release, for which others may wait, and not between the hand-over and the work: closing a
    /// connection takes a tenth of a hand-over.
    connection: Option<ForkGuarded>,
    origin: Origin,
    /// When the socket was last seen to be this lock's, from [`nanos`].
    since: u64,
}

impl SocketHold {
    /// Returns another descriptor of the socket.
    pub(super) fn descriptor(&self) -> std::io::Result<OwnedFd> {
        match self.socket.is_own() {
            true => fork::unguarded(|| self.socket.try_clone()),
            false => Err(fork::closed_by_program()),
        }
    }
}

/// What this process knows about the queue of a held socket.
#[derive(Debug)]
enum Origin {
    /// This process bound the name. The value is the waiter count of the table at that time, if the
    /// table counts.
    Bound(Option<u64>),
    /// An earlier holder handed the socket over, so more processes may wait.
    HandedOver,
    /// Another user has had the socket.
    Foreign,
}

/// An acquisition that found the lock held: its steps between two sleeps, for a thread or a task.
struct Acquisition<'l> {
    lock: &'l SocketLock,
    info: &'l dyn LockInfo,
    wait_state: WaitState,
    /// Whether the caller does not wait. It still waits for [`UNKNOWN_HOLDER_TIMEOUT`], unless a
    /// live process holds the lock.
    is_brief: bool,
    backoff: Backoff,
    /// The place in the holder's queue, if the holder could be reached.
    queued: Option<Queued>,
}

/// A connection in a holder's queue.
struct Queued {
    connection: ForkGuarded,
    /// Whether the holder belonged to this process's user when this connection queued up.
    is_own: bool,
    /// What the connection has received before the end of the stream.
    received: Option<Received>,
}

/// The result of one attempt.
enum Attempt {
    Acquired(Acquired),
    /// The lock is held. Sleep until the connection is readable, if there is a connection, but no
    /// longer than this; then call [`wake`](Acquisition::wake).
    Sleep(Duration),
}

impl<'l> Acquisition<'l> {
    #[cold]
    fn begin(lock: &'l SocketLock, wait: &Wait, info: &'l dyn LockInfo) -> Self {
        let wait_state = wait.state_for(info);
        let is_brief = wait_state.is_none();
        let retry_for = if lock.record().is_some() {
            UNKNOWN_HOLDER_TIMEOUT
        } else {
            Duration::ZERO
        };
        let wait_state = wait_state.unwrap_or_else(|| WaitState::brief(retry_for));
        Self {
            lock,
            info,
            wait_state,
            is_brief,
            backoff: Backoff::new(),
            queued: None,
        }
    }

    /// Binds the name, or queues up at its holder.
    fn attempt(&mut self) -> Result<Attempt> {
        if self.is_brief && self.lock.live_holder().is_some() {
            return Err(self.info.held());
        }
        if self.queued.is_none() {
            if let Some(acquired) = self.lock.bind()? {
                return Ok(Attempt::Acquired(acquired));
            }
            self.queued = self.lock.queue_up(self.info)?;
            if let Some(queued) = self.queued.as_ref().filter(|_| !self.is_brief) {
                holder_record::with_current(|record| {
                    seqpacket::announce(&queued.connection, &announcement(record))
                });
                if let Some(record) = self.lock.record() {
                    record.count_waiter();
                }
                self.backoff = Backoff::new();
            }
        }
        Ok(Attempt::Sleep(match &self.queued {
            Some(_) if !self.is_brief => Duration::MAX,
            _ => self.backoff.next(),
        }))
    }

    /// Returns the descriptor to sleep on.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.queued.as_ref().map(|queued| queued.connection.as_fd())
    }

    /// Takes over a socket that was received, also after the timeout.
    fn wake(&mut self, waited: WaitResult) -> Result<Option<Acquired>> {
        if let Some(queued) = &mut self.queued {
            let has_ended = seqpacket::receive(&queued.connection, &mut queued.received);
            if has_ended.map_err(|error| self.lock.io("receive", error))? {
                if let Some(hold) = self
                    .queued
                    .take()
                    .map(|queued| self.lock.take_over(queued))
                    .transpose()?
                    .flatten()
                {
                    return Ok(Some((hold, None)));
                }
            }
        }
        match waited {
            Ok(()) => Ok(None),
            Err(_) if self.is_brief => Err(self.info.held()),
            Err(reason) => Err(self.wait_state.error(reason, self.info)),
        }
    }
}

impl Drop for Acquisition<'_> {
    /// Shuts the connection down. A program that another thread is starting may have a copy of the
    /// connection. Then a close alone would not show the holder at once that this waiter has given
    /// up.
    fn drop(&mut self) {
        if let Some(queued) = &self.queued {
            seqpacket::hang_up(&queued.connection);
        }
    }
}

impl SocketLock {
    /// Returns the locks that are held now: name, owner and number of waiters.
    pub(super) fn list(sharing: Sharing) -> Result<Vec<(String, Option<Owner>, u32)>> {
        let prefix = prefix(sharing);
        let sockets = sockets()?;
        let mut holders = Holders::read(sharing);
        let mut living = holder_record::LivenessCache::default();
        let held = sockets.bound().filter_map(|(address, queue)| {
            let name = address.strip_prefix(&prefix)?;
            let owner = holders.of(name).filter(|owner| living.may_live(owner));
            Some((
                name.to_owned(),
                owner,
                sockets.waiters(queue, user_of(sharing)),
            ))
        });
        Ok(held.collect())
    }

    pub(super) fn new(name: &str, sharing: Sharing) -> Result<Self> {
        let socket = prefix(sharing) + name;
        let address = socket::address(&socket)
            .map_err(|error| Error::io("name", format!("@{socket}"), error))?;
        Ok(Self {
            sharing,
            address,
            record: OnceLock::new(),
        })
    }

    pub(super) fn acquire(&self, wait: &Wait, info: &dyn LockInfo) -> Result<Acquired> {
        if let Some(acquired) = self.acquire_free(wait, info)? {
            return Ok(acquired);
        }
        let mut acquisition = Acquisition::begin(self, wait, info);
        loop {
            let pause = match acquisition.attempt()? {
                Attempt::Acquired(acquired) => return Ok(acquired),
                Attempt::Sleep(pause) => pause,
            };
            let waited = acquisition
                .wait_state
                .wait_for_end(acquisition.descriptor(), pause)?;
            if let Some(acquired) = acquisition.wake(waited)? {
                return Ok(acquired);
            }
        }
    }

    /// Acquires like [`acquire`](Self::acquire), but sleeps on the reactor. Dropping the future
    /// closes the connection, so the holder skips this waiter, or the kernel closes the socket that
    /// was in flight to it.
    #[cfg(feature = "tokio")]
    pub(super) async fn acquire_async(&self, wait: &Wait, info: &dyn LockInfo) -> Result<Acquired> {
        blocking::check_runtime()?;
        if let Some(acquired) = self.acquire_free(wait, info)? {
            return Ok(acquired);
        }
        let mut acquisition = Acquisition::begin(self, wait, info);
        loop {
            let pause = match acquisition.attempt()? {
                Attempt::Acquired(acquired) => return Ok(acquired),
                Attempt::Sleep(pause) => pause,
            };
            let readable = blocking::readable(acquisition.descriptor());
            let waited = acquisition.wait_state.wait_async(readable, pause).await?;
            if let Some(acquired) = acquisition.wake(waited)? {
                return Ok(acquired);
            }
        }
    }

    fn acquire_free(&self, wait: &Wait, info: &dyn LockInfo) -> Result<Option<Acquired>> {
        wait.check(info)?;
        self.bind()
    }

    /// Binds the name, if no process has it.
    fn bind(&self) -> Result<Option<Acquired>> {
        let record = self.record();
        // Waiters can queue up as soon as the socket listens.
        let waits = record.and_then(HolderRecord::waiter_count);
        let Some(socket) =
            seqpacket::listen_at(&self.address).map_err(|error| self.io("bind", error))?
        else {
            return Ok(None);
        };
        let died = self.record().and_then(|record| record.record_current(true));
        Ok(Some((
            SocketHold {
                socket,
                connection: None,
                origin: Origin::Bound(waits),
                since: nanos(),
            },
            died,
        )))
    }

    /// Queues up at the holder. Returns `None` if the holder cannot be reached.
    fn queue_up(&self, info: &dyn LockInfo) -> Result<Option<Queued>> {
        let is_shared = self.sharing == Sharing::Machine;
        match seqpacket::connect(&self.address, is_shared)
            .map_err(|error| self.io("connect to", error))?
        {
            Reached::NoListener | Reached::Full => Ok(None),
            Reached::Queue(connection) => {
                let Peer { uid, pid } = self.peer(&connection)?;
                let Some(is_own) = self.trusts(&connection, Peer { uid, pid }) else {
                    let pid = (pid != 0).then_some(pid);
                    return Err(ErrorKind::ForeignOwner {
                        lock: info.describe(),
                        uid,
                        pid,
                    }
                    .into());
                };
                Ok(Some(Queued {
                    connection,
                    is_own,
                    received: None,
                }))
            }
        }
    }

    /// Takes over the socket that the previous holder handed over. Returns `None` if it is not the
    /// lock's socket.
    fn take_over(&self, queued: Queued) -> Result<Option<SocketHold>> {
        let Queued {
            connection,
            is_own,
            received,
        } = queued;
        let Some(Received { socket, sender }) = received else {
            return Ok(None);
        };
        if !seqpacket::is_bound_to(&socket, &self.address) {
            return Ok(None);
        }
        let is_own = match sender {
            // The message shows its sender, which may be another process than the holder at which
            // this process queued up.
            Some(sender) => {
                let own = runtime_dir::effective_uid();
                sender.uid == own && user::is_one(own)
            }
            // Only holders of one user have had the socket since this process queued up.
            None => is_own,
        };
        let origin = match is_own {
            true => Origin::HandedOver,
            // The same address in another network namespace is another lock.
            false if !seqpacket::are_of_one_network(&socket, &connection) => return Ok(None),
            false => Origin::Foreign,
        };
        seqpacket::set_nonblocking(&socket).map_err(|error| self.io("set up", error))?;
        match socket::listen(&socket) {
            Ok(()) => {}
            // A connection has the name of its listener, too.
            Err(Errno::INVAL) => return Ok(None),
            Err(error) => return Err(self.io("listen on", error)),
        }
        // A record that is still there is older than the previous holder, which released.
        self.record().map(|record| record.record_current(false));
        Ok(Some(SocketHold {
            socket,
            connection: Some(connection),
            origin,
            since: nanos(),
        }))
    }

    fn peer(&self, connection: &ForkGuarded) -> Result<Peer> {
        socket::peer(&**connection).map_err(|error| self.io("query the holder of", error))
    }

    /// Passes the lock on to the first waiter, or frees it.
    ///
    /// # Errors
    /// [`Io`](ErrorKind::Io) if the program has already released the lock by closing the
    /// descriptor.
    pub(super) fn release(&self, hold: SocketHold) -> Result<()> {
        let SocketHold {
            socket,
            connection,
            origin,
            since,
        } = hold;
        // The program may have closed the descriptor and thereby released the lock. Then the record
        // belongs to another holder.
        if !socket.is_own_since(since, nanos()) {
            return Err(Error::io("release", self.path(), fork::closed_by_program()));
        }
        let record = self.record();
        let is_waited_for = match (origin, record.and_then(HolderRecord::waiter_count)) {
            (Origin::Foreign, _) => false,
            (Origin::Bound(Some(before)), Some(now)) => before != now,
            (Origin::HandedOver, _) => true,
            // Polling is cheap, `accept` is not, and usually no process waits.
            (Origin::Bound(_), _) => event::is_readable(socket.as_fd()),
        };
        let unsent = if is_waited_for {
            self.hand_over(socket, record)
        } else {
            Some(socket)
        };
        if let Some(socket) = unsent {
            if let Some(record) = record {
                record.clear();
                step("record cleared");
            }
            socket.close();
        }
        drop(connection);
        Ok(())
    }

    /// Hands the socket over to the first live waiter. Returns the socket if there is none, or if
    /// too many other connections come first.
    fn hand_over(&self, socket: ForkGuarded, record: Option<&HolderRecord>) -> Option<ForkGuarded> {
        for _ in 0..MAX_SKIPPED {
            let Some(waiter) = seqpacket::accept(&socket) else {
                return Some(socket);
            };
            let Some(receiver) = self.receiver(&waiter) else {
                continue;
            };
            if let Some(record) = record {
                record.record_receiver(&receiver);
            }
            if seqpacket::hand_over(&waiter, &socket).is_ok() {
                // At the end of the stream the receiver holds the lock, and by then this process
                // must not have a copy.
                socket.close();
                step("own copy closed");
                seqpacket::complete(&waiter);
                return None;
            }
        }
        Some(socket)
    }

    /// Returns the record of a waiter that may have the lock, and `None` for every other
    /// connection.
    fn receiver(&self, waiter: &ForkGuarded) -> Option<Words> {
        let peer = socket::peer(&**waiter).ok()?;
        let is_eligible = match self.sharing {
            // Exactly this user: the process that gets the socket later may trust no other user.
            Sharing::User(_) => socket::is_own(&**waiter, peer, runtime_dir::effective_uid()),
            Sharing::Machine => true,
        };
        is_eligible.then_some(())?;
        let mut announced = [0; ANNOUNCEMENT];
        // A process that only asks for the owner announces nothing, and would keep the lock if it
        // were stopped.
        let length = seqpacket::announced(waiter, &mut announced).filter(|length| *length > 0)?;
        let record = (length == ANNOUNCEMENT).then(|| record_of(&announced));
        let is_whole = |record: &Words| record[SUM] == holder_record::sum(record);
        // The pid that the kernel reports decides, if both processes are in the same pid namespace.
        let is_right = |record: &Words| {
            holder_record::with_current(|own| {
                let [pid, namespace] =
                    [holder_record::PID, holder_record::NAMESPACE].map(|at| (record[at], own[at]));
                (pid.0 == u64::from(peer.pid)) == (namespace.0 == namespace.1)
            })
        };
        let record = record.filter(|record| is_whole(record) && is_right(record));
        Some(record.unwrap_or_else(|| holder_record::encode(&Owner::by_pid(peer.pid))))
    }

    /// Records `owner` as the holder of the lock.
    pub(super) fn name_holder(&self, owner: &Owner) {
        if let Some(record) = self.record() {
            record.record_owner(owner);
        }
    }

    /// Returns the number of live waiters in the holder's queue.
    pub(super) fn waiters(&self) -> Result<u32> {
        let sockets = sockets()?;
        Ok(sockets
            .at(self.name())
            .map_or(0, |queue| sockets.waiters(queue, user_of(self.sharing))))
    }

    /// Returns whether the name is bound. The check has no effect on a holder; it binds a free name
    /// for a moment.
    pub(super) fn is_held(&self) -> Result<bool> {
        let free = seqpacket::is_free(&self.address).map_err(|error| self.io("bind", error))?;
        Ok(!free)
    }

    /// Returns the abstract name.
    fn name(&self) -> &str {
        std::str::from_utf8(self.address.abstract_name().unwrap_or_default()).unwrap_or_default()
    }

    /// Returns whether a process that holds the lock belongs to this process's user, and `None` if
    /// the process may not hold it. Root has all rights, and holds locks of other users when it
    /// acts for them.
    fn trusts(&self, connection: &ForkGuarded, peer: Peer) -> Option<bool> {
        match self.sharing {
            Sharing::User(own) => {
                let is_trusted = peer.uid == 0 || socket::is_own(&**connection, peer, own);
                // The effective user of this process may have changed since the lock was built.
                is_trusted.then(|| peer.uid == own && own == runtime_dir::effective_uid())
            }
            // Each message shows its sender.
            Sharing::Machine => Some(false),
        }
    }

    pub(super) fn owner(&self) -> Result<Option<Owner>> {
        if let Some(owner) = self.live_holder() {
            // A holder that executes another program (exec) leaves its record, and the name becomes
            // free.
            let free = seqpacket::is_free(&self.address).map_err(|error| self.io("bind", error))?;
            return Ok((!free).then_some(owner));
        }
        match seqpacket::connect(&self.address, false)
            .map_err(|error| self.io("connect to", error))?
        {
            Reached::NoListener => Ok(None),
            Reached::Full => Err(self.io("query the holder of", Errno::AGAIN)),
            Reached::Queue(connection) => Ok(owner_of(self.peer(&connection)?)),
        }
    }

    /// Returns the holder from the record, unless it has died since. Reading the record costs the
    /// holder nothing; a connection would occupy a place in its queue until it releases.
    fn live_holder(&self) -> Option<Owner> {
        let owner = self.record()?.holder()?;
        (owner.liveness_by_name() != Liveness::Dead).then_some(owner)
    }

    /// Returns the record once it could be opened. A failed attempt is repeated, because its cause
    /// may be temporary.
    fn record(&self) -> Option<&HolderRecord> {
        match self.record.get() {
            None => {
                let record = HolderRecord::open(
                    self.name().strip_prefix(&prefix(self.sharing))?,
                    self.sharing,
                )
                .ok()?;
                Some(self.record.get_or_init(|| record))
            }
            opened => opened,
        }
    }

    fn io(&self, action: &'static str, error: Errno) -> Error {
        Error::io(action, self.path(), error)
    }

    fn path(&self) -> String {
        format!("@{}", self.name())
    }
}

/// Returns the prefix of a lock's name in the name of its socket.
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

/// The size of a waiter's announcement: the words of its record that identify a process, and their
/// sum.
const ANNOUNCEMENT: usize = (SUM + 1 - IDENTITY.start) * size_of::<u64>();

fn announcement(record: &Words) -> [u8; ANNOUNCEMENT] {
    let mut bytes = [0; ANNOUNCEMENT];
    for (bytes, word) in bytes
        .chunks_exact_mut(size_of::<u64>())
        .zip(&record[IDENTITY.start..=SUM])
    {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    bytes
}

fn record_of(announcement: &[u8; ANNOUNCEMENT]) -> Words {
    let mut record = Words::default();
    for (word, bytes) in record[IDENTITY.start..=SUM]
        .iter_mut()
        .zip(announcement.chunks_exact(size_of::<u64>()))
    {
        *word = u64::from_ne_bytes(std::array::from_fn(|at| bytes[at]));
    }
    record
}

/// Returns the user whose connections are waiters, if there is only one such user.
fn user_of(sharing: Sharing) -> Option<u32> {
    match sharing {
        Sharing::User(uid) => Some(uid),
        Sharing::Machine => None,
    }
}

/// Returns the sockets of this network namespace.
fn sockets() -> Result<Sockets> {
    Sockets::read().map_err(|error| Error::io("read", LIST, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct TestInfo;

    impl LockInfo for TestInfo {
        fn describe(&self) -> String {
            "a lock".to_owned()
        }

        #[cfg(feature = "tracing")]
        fn label(&self) -> (&'static str, String) {
            ("named", String::new())
        }

        fn holder(&self) -> Option<Owner> {
            None
        }
    }

    #[test]
    fn release_skips_cancelled_waiter_with_duplicated_socket() {
        for sharing in [
            Sharing::User(runtime_dir::effective_uid()),
            Sharing::Machine,
        ] {
            let lock =
                SocketLock::new(&format!("test-gave-up-{}", std::process::id()), sharing).unwrap();
            let (hold, _) = lock.bind().unwrap().unwrap();
            let mut acquisition = Acquisition::begin(&lock, &Wait::forever(), &TestInfo);
            assert!(matches!(
                acquisition.attempt(),
                Ok(Attempt::Sleep(Duration::MAX))
            ));
            let copy = acquisition
                .descriptor()
                .unwrap()
                .try_clone_to_owned()
                .unwrap();
            drop(acquisition);
            lock.release(hold).unwrap();
            let (hold, died) = lock.bind().unwrap().expect("the lock is free");
            assert_eq!(died, None);
            lock.release(hold).unwrap();
            drop(copy);
        }
    }
}
