//! Abstract sockets that listen, queue and can be handed over: `SOCK_SEQPACKET`.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

use rustix::cmsg_space;
use rustix::io::{Errno, Result, ioctl_fionbio, retry_on_intr};
use rustix::net::sockopt::{set_socket_passcred, socket_type};
use rustix::net::{
    self, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketFlags,
    SocketType,
};

use super::socket::{Address, Peer, Reached, connect_by, last_error, listen_as, option, socket};
use crate::sys::failpoint::step;
use crate::sys::fork::ForkGuarded;
use crate::sys::socket_name::hash_of;

/// The payload of the socket's message, because a descriptor cannot be sent alone.
const MESSAGE: [u8; 1] = *b"L";

/// Returns a listening socket with the address, or `None` if another process has it.
pub(crate) fn listen_at(address: &Address) -> Result<Option<ForkGuarded>> {
    listen_as(SocketType::SEQPACKET, address)
}

/// Whether the address is free. Takes the address for a moment, in which no other process can take
/// it.
pub(crate) fn is_free(address: &Address) -> Result<bool> {
    let bound = ForkGuarded::named(hash_of(address), || {
        let socket = socket(SocketType::SEQPACKET)?;
        retry_on_intr(|| net::bind(&socket, address)).map(|()| socket)
    });
    match bound {
        Ok(_) => Ok(true),
        Err(Errno::ADDRINUSE) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Joins the queue of the socket that listens at `address`. With `credentials`, each message on the
/// connection shows its sender. [`peer`](super::socket::peer), in contrast, shows the process that
/// listened when this one connected.
pub(crate) fn connect(address: &Address, credentials: bool) -> Result<Reached> {
    let connection = ForkGuarded::new(|| socket(SocketType::SEQPACKET))?;
    if credentials {
        // Before a message can arrive. The kernel gives the connection its own abstract name for
        // this.
        set_socket_passcred(&*connection, true)?;
    }
    connect_by(connection, address)
}

/// Accepts the next connection of the queue. Returns `None` if nothing can be accepted.
pub(crate) fn accept(socket: &ForkGuarded) -> Option<ForkGuarded> {
    loop {
        // ForkGuarded: otherwise a forked child would keep the connection open, and the waiter
        // asleep, after this process is killed.
        match ForkGuarded::new(|| {
            net::accept_with(&**socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
        }) {
            Ok(connection) => {
                step("waiter accepted");
                return Some(connection);
            }
            Err(Errno::INTR | Errno::CONNABORTED) => {}
            Err(_) => return None,
        }
    }
}

/// Sends this waiter's holder record to the holder. Errors do not matter: a holder that has gone
/// needs no answer, and without the message the holder knows only the pid.
pub(crate) fn announce(connection: &ForkGuarded, record: &[u8]) {
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    if retry_on_intr(|| net::send(&**connection, record, flags)).is_ok() {
        step("waiter announced");
    }
}

/// Ends both streams of the connection. The other end sees it at once, whatever copies of the
/// descriptor exist.
pub(crate) fn hang_up(connection: &ForkGuarded) {
    // The program may have closed it, and opened another socket.
    if connection.is_own() && net::shutdown(&**connection, Shutdown::Both).is_ok() {
        step("hung up");
    }
}

/// Reads the announcement of the waiter at the other end. Returns its length in bytes, or `None` if
/// the waiter has hung up.
pub(crate) fn announced(connection: &ForkGuarded, record: &mut [u8]) -> Option<usize> {
    let length = match retry_on_intr(|| net::recv(&**connection, &mut *record, RecvFlags::DONTWAIT))
    {
        Ok((_, length)) => length,
        Err(Errno::AGAIN) => return Some(0),
        Err(_) => return None,
    };
    // The end of the stream comes after the message.
    let rest = retry_on_intr(|| net::recv(&**connection, &mut [0_u8], RecvFlags::DONTWAIT));
    (rest == Err(Errno::AGAIN)).then_some(length)
}

/// Sends the socket itself to the peer. Fails if the peer is gone. The peer has the lock when
/// [`complete`] follows.
pub(crate) fn hand_over(connection: &ForkGuarded, socket: &ForkGuarded) -> Result<()> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [socket.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    retry_on_intr(|| {
        net::sendmsg(
            &**connection,
            &[IoSlice::new(&MESSAGE)],
            &mut control,
            flags,
        )
    })?;
    step("socket sent");
    Ok(())
}

/// Ends the stream to the peer, which tells the peer that no earlier holder has the socket any
/// more. Closing the connection is not enough: a program that is being started may have a copy of
/// it.
pub(crate) fn complete(connection: &ForkGuarded) {
    // If it fails, the peer is gone, and closing the connection has the same effect.
    let _ = net::shutdown(&**connection, Shutdown::Write);
    step("hand-over completed");
}

/// A received listening socket.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) socket: ForkGuarded,
    /// The process that sent it, if the connection shows the senders of messages.
    pub(crate) sender: Option<Peer>,
}

/// Reads what the holder has sent through `connection` into `received_socket`, without waiting.
/// Returns whether the stream has ended. If a socket has arrived by then, the lock is handed over;
/// if not, the holder has died or closed its socket.
pub(crate) fn receive(
    connection: &ForkGuarded,
    received_socket: &mut Option<Received>,
) -> Result<bool> {
    loop {
        match receive_one(connection) {
            Ok(Some(socket)) => {
                step("socket received");
                received_socket.get_or_insert(socket);
            }
            Ok(None) => {
                step("end of stream received");
                return Ok(true);
            }
            Err(Errno::AGAIN) => return Ok(false),
            // Occurs once, if the holder closed the connection before it read all that this process
            // had sent. The data that the holder sent can still be read.
            Err(Errno::INTR | Errno::CONNRESET) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Space for a descriptor and for credentials, with the alignment of their headers.
type Control = [u64; 8];
const _: () = {
    // SAFETY: CMSG_SPACE only computes.
    let needed = unsafe { libc::CMSG_SPACE(4) + libc::CMSG_SPACE(size_of::<libc::ucred>() as u32) };
    assert!(
        needed as usize <= size_of::<Control>() && align_of::<libc::cmsghdr>() <= align_of::<u64>()
    );
};

/// Reads one message. Returns `None` at the end of the stream, or for a message without a
/// descriptor, which no holder sends.
///
/// rustix's `recvmsg` does not fit, for the same reason as in [`peer`](super::socket::peer).
fn receive_one(connection: &ForkGuarded) -> Result<Option<Received>> {
    let mut sender = None;
    let mut failed = None;
    // ForkGuarded from the start, because it may be the lock.
    let socket = ForkGuarded::new(|| {
        let mut message = MESSAGE;
        let mut control: Control = [0; 8];
        let mut part = libc::iovec {
            iov_base: message.as_mut_ptr().cast(),
            iov_len: message.len(),
        };
        // SAFETY: the structure is integers and pointers, for which zeros are a value.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        (header.msg_iov, header.msg_iovlen) = (&raw mut part, 1);
        (header.msg_control, header.msg_controllen) =
            (control.as_mut_ptr().cast(), size_of::<Control>() as _);
        let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
        // SAFETY: the header describes memory of this function, which outlives the call.
        let received = unsafe { libc::recvmsg(connection.as_raw_fd(), &raw mut header, flags) };
        if received < 0 {
            failed = Some(last_error());
            return Err(());
        }
        // SAFETY: the kernel has just filled in the header and `control`, and nothing has taken the
        // descriptors out.
        let (socket, credentials) = unsafe { take_control(&header) };
        sender = credentials;
        socket.ok_or(())
    });
    match (socket, failed) {
        (Ok(socket), _) => Ok(Some(Received {
            socket: socket.know(),
            sender,
        })),
        (Err(()), None) => Ok(None),
        (Err(()), Some(error)) => Err(error),
    }
}

/// Takes the descriptor and the credentials out of a received message.
///
/// # Safety
/// `recvmsg` has filled in the header and its control buffer. This is the first call for the
/// message: it becomes the owner of the descriptors.
unsafe fn take_control(header: &libc::msghdr) -> (Option<OwnedFd>, Option<Peer>) {
    let (mut socket, mut sender) = (None, None);
    // SAFETY: the kernel has written the headers, as long as the message header says, into the
    // control buffer.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !next.is_null() {
        // SAFETY: not null, so it points to a header in the buffer, with as many bytes behind it as
        // it says.
        let (found, data) = unsafe { (&*next, libc::CMSG_DATA(next)) };
        #[allow(clippy::unnecessary_cast)] // The type differs from library to library.
        let length = found.cmsg_len as usize - (data as usize - next as usize);
        match (found.cmsg_level, found.cmsg_type) {
            (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                for at in 0..length / size_of::<i32>() {
                    // SAFETY: these are the numbers of descriptors that the kernel has just made
                    // for this process.
                    let sent = unsafe {
                        OwnedFd::from_raw_fd(ptr::read_unaligned(data.cast::<i32>().add(at)))
                    };
                    // Further descriptors, which no holder sends, are closed.
                    socket.get_or_insert(sent);
                }
            }
            (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) if length >= size_of::<libc::ucred>() => {
                // SAFETY: these are the bytes of a `ucred`, of which any are a value.
                sender = Some(unsafe { ptr::read_unaligned::<libc::ucred>(data.cast()) }.into());
            }
            _ => {}
        }
        // SAFETY: as for the first.
        next = unsafe { libc::CMSG_NXTHDR(header, next) };
    }
    (socket, sender)
}

/// Whether the socket has this address, or is a connection to the socket that has it, on which
/// [`listen`] fails. A stream socket can have the same name.
pub(crate) fn is_bound_to(socket: &ForkGuarded, address: &Address) -> bool {
    socket_type(&**socket) == Ok(SocketType::SEQPACKET)
        && net::getsockname(&**socket)
            .and_then(Address::try_from)
            .is_ok_and(|found| found == *address)
}

/// Whether both sockets belong to the same network namespace, as far as the kernel reports it.
/// Other namespaces have the same names.
pub(crate) fn are_of_one_network(one: &ForkGuarded, other: &ForkGuarded) -> bool {
    // `SO_NETNS_COOKIE`, which differs on one architecture.
    const COOKIE: i32 = if cfg!(any(target_arch = "sparc", target_arch = "sparc64")) {
        0x50
    } else {
        71
    };
    match (
        option(&**one, COOKIE, 0_u64),
        option(&**other, COOKIE, 0_u64),
    ) {
        (Ok(one), Ok(other)) => one == other,
        // Linux before 5.14.
        (Err(Errno::NOPROTOOPT), _) => true,
        _ => false,
    }
}

/// Makes all calls on the socket nonblocking, whatever an earlier holder has set.
pub(crate) fn set_nonblocking(socket: &ForkGuarded) -> Result<()> {
    ioctl_fionbio(&**socket, true)
}
