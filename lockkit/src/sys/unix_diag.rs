//! All Unix sockets of this network namespace, as the kernel describes them: [sock_diag(7)],
//! `unix_diag`.
//!
//! Unlike `/proc/net/unix` it shows the connections that wait at a listening socket, and whether
//! each of them is still open.
//!
//! [sock_diag(7)]: https://man7.org/linux/man-pages/man7/sock_diag.7.html

use std::collections::HashSet;

use rustix::io::{Errno, Result, retry_on_intr};
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};

/// A socket.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Socket {
    /// `SOCK_STREAM`, `SOCK_SEQPACKET`, …
    pub(crate) kind: u8,
    /// `TCP_ESTABLISHED`, `TCP_LISTEN` or `TCP_CLOSE`.
    pub(crate) state: u8,
    pub(crate) inode: u32,
    /// The user that made it, since Linux 5.3.
    pub(crate) uid: Option<u32>,
    /// The path, or the abstract name after a NUL byte.
    pub(crate) name: Vec<u8>,
    /// The inodes of the connections that wait to be accepted; 0 for a connection whose other end
    /// is closed. `None` if there are too many for a message.
    pub(crate) queue: Option<Vec<u32>>,
    /// For a listener, the number of connections that wait to be accepted; for a connection, the
    /// number of bytes that wait to be read.
    pub(crate) waiting: u32,
    /// The number of bytes that it has sent and its peer has not read, with their overhead.
    pub(crate) unread: u32,
}

/// States of a socket, from the kernel's `tcp_states.h`.
pub(crate) const ESTABLISHED: u8 = 1;
pub(crate) const CLOSE: u8 = 7;
pub(crate) const LISTEN: u8 = 10;

/// The kernel puts no more into one message, and only puts that much if the reader had room for it
/// before.
const MESSAGE: usize = 32 << 10;
const HEADER: usize = 16;

/// Returns every socket that is connected, or listens, or is bound and does not listen yet.
///
/// A queue of more than about 8,000 connections fits into no message, and the kernel silently ends
/// the list at such a socket. (Longer queues exist if `net.core.somaxconn` was raised.) So the list
/// is requested once more without queues. Sockets that only the second list contains are returned
/// without their queues.
///
/// # Errors
/// Returns the errors of the system calls, for example if a filter forbids netlink; `EOPNOTSUPP` if
/// the kernel has no `unix_diag`.
pub(crate) fn dump() -> Result<Vec<Socket>> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let kernel = net::socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        flags,
        Some(netlink::SOCK_DIAG),
    )?;
    let mut sockets = Vec::new();
    let mut buffer = vec![0; MESSAGE];
    let mut request_list = |states, show, sockets: &mut Vec<Socket>| {
        retry_on_intr(|| net::send(&kernel, &request(states, show), SendFlags::empty()))?;
        loop {
            let (length, _) =
                retry_on_intr(|| net::recv(&kernel, &mut buffer[..], RecvFlags::DONTWAIT))?;
            if read_messages(buffer.get(..length).unwrap_or_default(), sockets)? {
                return Ok(());
            }
        }
    };
    // The first answer is empty, and shows the kernel how large a message may be. A full queue does
    // not fit into the kernel's initial size, and would end the list there.
    request_list(0, SHOW, &mut sockets)?;
    request_list(
        1 << ESTABLISHED | 1 << CLOSE | 1 << LISTEN,
        SHOW | SHOW_QUEUE,
        &mut sockets,
    )?;
    let mut all = Vec::new();
    request_list(1 << ESTABLISHED | 1 << CLOSE | 1 << LISTEN, SHOW, &mut all)?;
    let known: HashSet<u32> = sockets.iter().map(|socket| socket.inode).collect();
    sockets.extend(
        all.into_iter()
            .filter(|socket| !known.contains(&socket.inode)),
    );
    Ok(sockets)
}

/// `UDIAG_SHOW_NAME`, `_RQLEN` and `_UID`.
const SHOW: u32 = 0x1 | 0x10 | 0x40;
/// `UDIAG_SHOW_ICONS`.
const SHOW_QUEUE: u32 = 0x8;

/// `struct nlmsghdr` and `struct unix_diag_req`.
fn request(states: u32, show: u32) -> [u8; HEADER + 24] {
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    const REQUEST_AND_DUMP: u16 = 0x1 | 0x300;
    let mut bytes = [0; HEADER + 24];
    let length = bytes.len() as u32;
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &length.to_ne_bytes());
    put(4, &SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    put(6, &REQUEST_AND_DUMP.to_ne_bytes());
    put(HEADER, &[AddressFamily::UNIX.as_raw() as u8]);
    put(HEADER + 4, &states.to_ne_bytes());
    put(HEADER + 12, &show.to_ne_bytes());
    bytes
}

/// Parses messages. Returns whether they end the list.
fn read_messages(mut bytes: &[u8], sockets: &mut Vec<Socket>) -> Result<bool> {
    const ERROR: u16 = 2;
    const DONE: u16 = 3;
    while let (Some(length), Some(kind)) = (u32_at(bytes, 0), u16_at(bytes, 4)) {
        let length = length as usize;
        let body = bytes.get(HEADER..length).ok_or(Errno::BADMSG)?;
        match kind {
            // Every kind of error is the same: the caller has another way to get the list.
            ERROR => return Err(Errno::OPNOTSUPP),
            DONE => return Ok(true),
            _ => sockets.extend(read_socket(body)),
        }
        bytes = bytes.get(align(length)..).unwrap_or_default();
    }
    Ok(false)
}

/// Parses `struct unix_diag_msg` and its attributes.
fn read_socket(body: &[u8]) -> Option<Socket> {
    const NAME: u16 = 0;
    const ICONS: u16 = 3;
    const RQLEN: u16 = 4;
    const UID: u16 = 7;
    let mut socket = Socket {
        kind: *body.get(1)?,
        state: *body.get(2)?,
        inode: u32_at(body, 4)?,
        ..Socket::default()
    };
    let mut rest = body.get(HEADER..)?;
    while let (Some(length), Some(kind)) = (u16_at(rest, 0), u16_at(rest, 2)) {
        let length = usize::from(length);
        let value = rest.get(4..length)?;
        match kind {
            NAME => socket.name = value.to_vec(),
            ICONS => {
                socket.queue = Some(
                    (0..value.len() / 4)
                        .filter_map(|at| u32_at(value, 4 * at))
                        .collect(),
                )
            }
            RQLEN => (socket.waiting, socket.unread) = (u32_at(value, 0)?, u32_at(value, 4)?),
            UID => socket.uid = u32_at(value, 0),
            _ => {}
        }
        rest = rest.get(align(length)..).unwrap_or_default();
    }
    Some(socket)
}

fn align(length: usize) -> usize {
    length.next_multiple_of(4)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn truncated_message_is_error_or_ignored() {
        let mut body = vec![1, 5, LISTEN, 0];
        body.extend(7_u32.to_ne_bytes());
        body.extend([0; 8]);
        body.extend([12, 0, 3, 0].map(|byte: u8| byte));
        body.extend([1_u32, 0].map(u32::to_ne_bytes).concat());
        let whole = [message(20, &body), message(3, &[0; 4])].concat();
        let mut sockets = Vec::new();
        assert_eq!(read_messages(&whole, &mut sockets), Ok(true));
        let expected = Socket {
            kind: 5,
            state: LISTEN,
            inode: 7,
            queue: Some(vec![1, 0]),
            ..Socket::default()
        };
        assert_eq!(sockets, [expected]);
        for end in 0..whole.len() {
            let mut some = Vec::new();
            let _ = read_messages(&whole[..end], &mut some);
            assert!(some.len() <= 1);
        }
        for at in 0..body.len() {
            read_socket(&body[..at]);
        }
        assert_eq!(
            read_messages(&message(2, &(-2_i32).to_ne_bytes()), &mut sockets),
            Err(Errno::OPNOTSUPP)
        );
    }

    #[test]
    fn dump_shows_live_and_closed_connections_of_queue() {
        let socket = || {
            net::socket_with(
                AddressFamily::UNIX,
                SocketType::SEQPACKET,
                SocketFlags::CLOEXEC,
                None,
            )
            .unwrap()
        };
        let name = format!("lockkit-test-diag-{}", std::process::id());
        let address = net::SocketAddrUnix::new_abstract_name(name.as_bytes()).unwrap();
        let listener = socket();
        net::bind(&listener, &address).unwrap();
        net::listen(&listener, 8).unwrap();
        let (live, closed) = (socket(), socket());
        for connection in [&live, &closed] {
            net::connect(connection, &address).unwrap();
        }
        drop(closed);
        net::send(&live, b"waits", SendFlags::empty()).unwrap();
        let Ok(sockets) = dump() else {
            println!("left out: the kernel does not list Unix sockets");
            return;
        };
        let inode = rustix::fs::fstat(live.as_fd()).unwrap().st_ino as u32;
        let name = [b"\0", name.as_bytes()].concat();
        let found = sockets
            .iter()
            .find(|socket| socket.state == LISTEN && socket.name == name)
            .unwrap();
        assert_eq!(
            (found.queue.as_deref(), found.waiting),
            (Some(&[inode, 0][..]), 2)
        );
        let waiter = sockets.iter().find(|socket| socket.inode == inode).unwrap();
        assert!(waiter.state == ESTABLISHED && waiter.unread > 0);
        assert_eq!(waiter.uid, Some(rustix::process::geteuid().as_raw()));
    }
}
