//! Abstract sockets that carry bytes both ways, without ever waiting: `SOCK_STREAM`.
//!
//! Descriptors that a peer sends are never received: the reads leave no room for them, so the
//! kernel closes them. Every socket is fork-guarded, so that a forked child neither keeps the
//! address nor keeps a peer waiting.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::Timespec;
use rustix::event::epoll::{self, Event, EventData, EventFlags};
use rustix::io::{Errno, Result, retry_on_intr};
use rustix::net::{self, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::socket::{Address, Reached, connect_as, listen_as};
use crate::sys::failpoint::step;
use crate::sys::fork::ForkGuarded;

/// Returns a listening socket with the address, or `None` if another process has it.
pub(crate) fn listen_at(address: &Address) -> Result<Option<ForkGuarded>> {
    listen_as(SocketType::STREAM, address)
}

/// Connects to the listener at the address.
pub(crate) fn connect(address: &Address) -> Result<Reached> {
    connect_as(SocketType::STREAM, address)
}

/// Accepts the next connection of the queue. Returns `None` if there is none.
pub(crate) fn accept(listener: &ForkGuarded) -> Result<Option<ForkGuarded>> {
    loop {
        match ForkGuarded::new(|| {
            net::accept_with(&**listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
        }) {
            Ok(connection) => {
                step("client accepted");
                return Ok(Some(connection.know()));
            }
            Err(Errno::INTR | Errno::CONNABORTED) => {}
            Err(Errno::AGAIN) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
}

/// The outcome of an attempt to write or to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transferred {
    /// This many bytes, at least one.
    Bytes(usize),
    /// No bytes now.
    WouldBlock,
    /// No bytes ever: the other end is closed.
    Closed,
}

/// Writes as much of `bytes` as fits.
pub(crate) fn send(connection: &ForkGuarded, bytes: &[u8]) -> Result<Transferred> {
    if !connection.is_own() {
        return Ok(Transferred::Closed);
    }
    match retry_on_intr(|| {
        net::send(
            &**connection,
            bytes,
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        )
    }) {
        Ok(sent) => {
            step("bytes sent");
            Ok(Transferred::Bytes(sent))
        }
        Err(Errno::AGAIN) => Ok(Transferred::WouldBlock),
        Err(Errno::PIPE | Errno::CONNRESET) => Ok(Transferred::Closed),
        Err(error) => Err(error),
    }
}

/// Appends the arrived bytes to `to`, at most `max`.
pub(crate) fn receive(
    connection: &ForkGuarded,
    to: &mut Vec<u8>,
    max: usize,
) -> Result<Transferred> {
    let before = to.len();
    to.resize(before + max, 0);
    let received =
        retry_on_intr(|| net::recv(&**connection, &mut to[before..], RecvFlags::DONTWAIT));
    to.truncate(before + received.map_or(0, |(received, _)| received));
    match received {
        Ok((0, _)) | Err(Errno::CONNRESET) => Ok(Transferred::Closed),
        Ok((received, _)) => {
            step("bytes received");
            Ok(Transferred::Bytes(received))
        }
        Err(Errno::AGAIN) => Ok(Transferred::WouldBlock),
        Err(error) => Err(error),
    }
}

/// Many descriptors watched as one, which is readable if one of them is: [epoll(7)].
///
/// [epoll(7)]: https://man7.org/linux/man-pages/man7/epoll.7.html
#[derive(Debug)]
pub(crate) struct Epoll(ForkGuarded);

impl Epoll {
    pub(crate) fn new() -> Result<Self> {
        ForkGuarded::new(|| epoll::create(epoll::CreateFlags::CLOEXEC))
            .map(|made| Self(made.know()))
    }

    /// Watches `fd`, under the name `id`, until it is closed or removed.
    pub(crate) fn add(&self, fd: impl AsFd, id: u64) -> Result<()> {
        epoll::add(&*self.0, fd, EventData::new_u64(id), EventFlags::IN)
    }

    /// Pauses the watch on `fd`, or resumes it.
    pub(crate) fn pause(&self, fd: impl AsFd, id: u64, pause: bool) -> Result<()> {
        let flags = if pause {
            EventFlags::empty()
        } else {
            EventFlags::IN
        };
        epoll::modify(&*self.0, fd, EventData::new_u64(id), flags)
    }

    pub(crate) fn remove(&self, fd: impl AsFd) -> Result<()> {
        epoll::delete(&*self.0, fd)
    }

    /// Returns the names of the descriptors that are readable now or have hung up; only some of
    /// them, if there are many.
    pub(crate) fn ready(&self) -> Result<impl Iterator<Item = u64> + use<>> {
        const MAX_EVENTS: usize = 32;
        if !self.0.is_own() {
            return Err(Errno::BADF);
        }
        let mut events = [Event {
            flags: EventFlags::empty(),
            data: EventData::new_u64(0),
        }; MAX_EVENTS];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let count = retry_on_intr(|| epoll::wait(&*self.0, &mut events, Some(&now)))?;
        Ok(events.into_iter().take(count).map(|event| event.data.u64()))
    }
}

impl AsFd for Epoll {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        let descriptor: &OwnedFd = &self.0;
        descriptor.as_fd()
    }
}
