//! Abstract sockets of any kind: addresses, listening, connecting, and the process at the other
//! end.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use rustix::io::{Errno, Result, retry_on_intr};
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::sys::failpoint::step;
use crate::sys::fork::ForkGuarded;
use crate::sys::socket_name::hash_of;
use crate::sys::{event, process, user};

pub(crate) type Address = SocketAddrUnix;

/// The number of connections that may wait to be accepted; the kernel's own limit,
/// `net.core.somaxconn`, is as large by default.
const BACKLOG: i32 = 4096;

/// The process at the other end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) uid: u32,
    /// 0 if the process is in a pid namespace that this process does not see.
    pub(crate) pid: u32,
}

/// Returns the address of the abstract socket `name`.
pub(crate) fn address(name: &str) -> Result<Address> {
    SocketAddrUnix::new_abstract_name(name.as_bytes())
}

pub(super) fn socket(kind: SocketType) -> Result<OwnedFd> {
    net::socket_with(
        AddressFamily::UNIX,
        kind,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
}

pub(super) fn listen_as(kind: SocketType, address: &Address) -> Result<Option<ForkGuarded>> {
    let bound = ForkGuarded::named(hash_of(address), || {
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

/// Makes this process the one that [`peer`] names to connecting processes.
pub(crate) fn listen(socket: &ForkGuarded) -> Result<()> {
    net::listen(&**socket, BACKLOG)?;
    step("socket listens");
    Ok(())
}

/// The outcome of an attempt to connect.
pub(crate) enum Reached {
    /// The connection is in the queue of the listener at the address.
    Queue(ForkGuarded),
    /// The address is taken but has no listener, as while its owner is starting or ending; or the
    /// address is free.
    NoListener,
    /// The queue is full.
    Full,
}

pub(super) fn connect_as(kind: SocketType, address: &Address) -> Result<Reached> {
    connect_by(ForkGuarded::new(|| socket(kind))?, address)
}

pub(super) fn connect_by(connection: ForkGuarded, address: &Address) -> Result<Reached> {
    match retry_on_intr(|| net::connect(&*connection, address)) {
        Ok(()) => {
            step("queued up");
            Ok(Reached::Queue(connection.know()))
        }
        Err(Errno::CONNREFUSED) => Ok(Reached::NoListener),
        Err(Errno::AGAIN) => Ok(Reached::Full),
        Err(error) => Err(error),
    }
}

/// Returns the process at the other end: for a connection the process that last called `listen`,
/// for an accepted one the process that connected.
///
/// rustix's `socket_peercred` does not fit: its type says that a pid is never 0. The kernel writes
/// 0 for a process of a pid namespace that this process does not see.
pub(crate) fn peer(connection: impl AsFd) -> Result<Peer> {
    let found = option(
        connection,
        libc::SO_PEERCRED,
        libc::ucred {
            pid: 0,
            uid: 0,
            gid: 0,
        },
    )?;
    Ok(found.into())
}

/// Types for which any bytes are a value, as the kernel writes them for a socket option.
pub(super) trait Plain: Copy {}
impl Plain for libc::ucred {}
impl Plain for u64 {}
impl Plain for i32 {}

pub(super) fn option<T: Plain>(socket: impl AsFd, option: i32, mut value: T) -> Result<T> {
    let mut length = size_of::<T>() as libc::socklen_t;
    let descriptor = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel writes at most `length` bytes to `value`, which has as many, and any bytes
    // are a value of it.
    let status = unsafe {
        libc::getsockopt(
            descriptor,
            libc::SOL_SOCKET,
            option,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    match status {
        0 => Ok(value),
        _ => Err(last_error()),
    }
}

pub(super) fn last_error() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

impl From<libc::ucred> for Peer {
    fn from(found: libc::ucred) -> Self {
        Self {
            uid: found.uid,
            pid: found.pid.unsigned_abs(),
        }
    }
}

/// Whether `peer`, the process at the other end of `connection`, belongs to the user `own` of this
/// process.
///
/// Equal uids are not enough if the uid may mean several users (see [`user`]). Then the process
/// must be in this process's user namespace, and the kernel must show it to this process as one of
/// the same user.
pub(crate) fn is_own(connection: impl AsFd, peer: Peer, own: u32) -> bool {
    if peer.uid != own || user::is_one(own) {
        return peer.uid == own;
    }
    // `SO_PEERPIDFD`, which differs on one architecture.
    const PEERPIDFD: i32 = if cfg!(any(target_arch = "sparc", target_arch = "sparc64")) {
        0x56
    } else {
        77
    };
    let Ok(process) = option(connection, PEERPIDFD, -1_i32) else {
        return false;
    };
    if process < 0 {
        return false;
    }
    // SAFETY: the kernel has just made the descriptor for this call, and no other owner knows it.
    let process = unsafe { OwnedFd::from_raw_fd(process) };
    // The pid belongs to the peer until the peer ends, which the pidfd shows afterwards.
    process::is_of_same_user(peer.pid) && !event::is_readable(process.as_fd())
}
