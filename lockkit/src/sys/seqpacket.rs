//! Abstract Unix sockets that listen, queue and hand themselves over: [unix(7)].
//!
//! The kernel gives an abstract name to one socket at a time and takes it back when the last descriptor of that socket
//! is closed, however its process ended. No file is involved.
//!
//! [unix(7)]: https://man7.org/linux/man-pages/man7/unix.7.html

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::cmsg_space;
use rustix::io::{Errno, Result, retry_on_intr};
use rustix::net::sockopt::socket_acceptconn;
use rustix::net::{
    self, AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use super::fork::Shielded;
use crate::steps::step;

pub(crate) type Address = SocketAddrUnix;

/// How many connections may wait to be accepted; the kernel's own bound, `net.core.somaxconn`, is as large by default.
pub(crate) const BACKLOG: i32 = 4096;

/// What the socket is sent with, for it cannot be sent alone.
const MESSAGE: [u8; 1] = *b"L";

/// The process at the other end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) uid: u32,
    /// 0 when it lives in a pid namespace that this process does not see.
    pub(crate) pid: u32,
}

/// The address of the abstract socket `name`.
pub(crate) fn address(name: &str) -> Result<Address> {
    SocketAddrUnix::new_abstract_name(name.as_bytes())
}

fn socket(kind: SocketType) -> Result<OwnedFd> {
    net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)
}

/// A listening socket with the address, or `None` when somebody else has it.
pub(crate) fn listen_at(address: &Address) -> Result<Option<Shielded>> {
    listen_as(SocketType::SEQPACKET, address)
}

pub(super) fn listen_as(kind: SocketType, address: &Address) -> Result<Option<Shielded>> {
    let bound = Shielded::named(|| {
        let socket = socket(kind)?;
        retry_on_intr(|| net::bind(&socket, address))?;
        step("name bound");
        Ok(socket)
    });
    match bound {
        Ok(socket) => {
            listen(&socket)?;
            Ok(Some(socket))
        }
        Err(Errno::ADDRINUSE) => Ok(None),
        Err(error) => Err(error),
    }
}

/// How every name of a socket of lockkit's begins, those that listen and no others.
pub(crate) const PREFIX: &str = "lockkit/";

/// Whether it is a socket that listens, or is to listen, for a lock. A connection that such a socket has accepted has
/// the name, too.
pub(super) fn has_name_of_lock(descriptor: BorrowedFd<'_>) -> bool {
    let found = net::getsockname(descriptor).and_then(Address::try_from);
    found.is_ok_and(|found| found.abstract_name().is_some_and(|name| name.starts_with(PREFIX.as_bytes())))
}

/// Makes this process the one that [`peer`] names to whoever connects.
pub(crate) fn listen(socket: &Shielded) -> Result<()> {
    net::listen(&**socket, BACKLOG)?;
    step("socket listens");
    Ok(())
}

/// Whether nobody has the address. Takes it for a moment, in which nobody else can.
pub(crate) fn is_free(address: &Address) -> Result<bool> {
    let bound = Shielded::named(|| {
        let socket = socket(SocketType::SEQPACKET)?;
        retry_on_intr(|| net::bind(&socket, address)).map(|()| socket)
    });
    match bound {
        Ok(_) => Ok(true),
        Err(Errno::ADDRINUSE) => Ok(false),
        Err(error) => Err(error),
    }
}

/// What became of an attempt to connect.
pub(crate) enum Reached {
    /// In the queue of whoever listens at the address.
    Queue(Shielded),
    /// The address is taken but nobody listens, as while its owner is starting or ending; or it is free.
    Nobody,
    /// The queue has no room.
    Full,
}

/// Queues up at the socket that listens at `address`.
pub(crate) fn connect(address: &Address) -> Result<Reached> {
    connect_as(SocketType::SEQPACKET, address)
}

pub(super) fn connect_as(kind: SocketType, address: &Address) -> Result<Reached> {
    let connection = Shielded::new(|| socket(kind))?;
    match retry_on_intr(|| net::connect(&*connection, address)) {
        Ok(()) => {
            step("queued up");
            Ok(Reached::Queue(connection.know()))
        }
        Err(Errno::CONNREFUSED) => Ok(Reached::Nobody),
        Err(Errno::AGAIN) => Ok(Reached::Full),
        Err(error) => Err(error),
    }
}

/// Who is at the other end: for a connection the process that last called `listen`, for an accepted one the process
/// that connected.
///
/// Not rustix's `socket_peercred`, whose type says that a pid is never 0: that is what the kernel writes for a process
/// of a pid namespace that this one does not see.
pub(crate) fn peer(connection: impl AsFd) -> Result<Peer> {
    let mut found = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    let descriptor = connection.as_fd().as_raw_fd();
    // SAFETY: the kernel writes at most `length` bytes to `found`, which has as many, and any bytes are a value of it.
    let status = unsafe {
        libc::getsockopt(descriptor, libc::SOL_SOCKET, libc::SO_PEERCRED, (&raw mut found).cast(), &raw mut length)
    };
    match status {
        0 => Ok(Peer { uid: found.uid, pid: found.pid.unsigned_abs() }),
        _ => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}

/// Takes the next connection out of the queue; `None` when nothing can be taken.
pub(crate) fn accept(socket: &Shielded) -> Option<OwnedFd> {
    loop {
        match net::accept_with(&**socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(connection) => {
                step("waiter accepted");
                return Some(connection);
            }
            Err(Errno::INTR | Errno::CONNABORTED) => {}
            Err(_) => return None,
        }
    }
}

/// Gives the socket itself to the peer; fails when the peer is gone.
pub(crate) fn hand_over(connection: &OwnedFd, socket: &Shielded) -> Result<()> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [socket.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    retry_on_intr(|| net::sendmsg(connection, &[IoSlice::new(&MESSAGE)], &mut control, flags))?;
    step("socket sent");
    Ok(())
}

/// What a connection brought.
pub(crate) enum Received {
    /// The listening socket of the address: the lock.
    Lock(Shielded),
    /// The end: the holder died, or released without seeing this waiter.
    HungUp,
    /// Nothing yet.
    Nothing,
}

/// Reads what the holder sent through `connection`, without waiting for it.
pub(crate) fn receive(connection: &Shielded) -> Result<Received> {
    // Shielded from its first moment on, for it may be the lock.
    let brought = Shielded::new(|| {
        let mut message = MESSAGE;
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received =
            retry_on_intr(|| net::recvmsg(&**connection, &mut [IoSliceMut::new(&mut message)], &mut control, flags));
        received.map_err(Some)?;
        step("socket received");
        let descriptor = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        descriptor.ok_or(None)
    });
    match brought {
        Ok(socket) => Ok(Received::Lock(socket.know())),
        Err(None | Some(Errno::CONNRESET)) => Ok(Received::HungUp),
        Err(Some(Errno::AGAIN)) => Ok(Received::Nothing),
        Err(Some(error)) => Err(error),
    }
}

/// Whether the socket is the one that listens at `address`.
pub(crate) fn listens_at(socket: &Shielded, address: &Address) -> bool {
    socket_acceptconn(&**socket) == Ok(true)
        && net::getsockname(&**socket).and_then(Address::try_from).is_ok_and(|found| found == *address)
}
