//! Processes that attack the abstract socket of a named lock.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{
    self, AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown,
    SocketAddrUnix, SocketFlags, SocketType,
};

fn socket() -> OwnedFd {
    socket_of(SocketType::SEQPACKET)
}

fn socket_of(kind: SocketType) -> OwnedFd {
    net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).expect("a socket")
}

fn bound(kind: SocketType, name: &str) -> OwnedFd {
    let socket = socket_of(kind);
    net::bind(&socket, &address(name)).expect("a free name");
    net::listen(&socket, 16).expect("a bound socket");
    socket
}

/// Sockets that listen at names of their own, each with a queue of so many connections, and these
/// connections.
pub fn full_queues(connections: usize) -> Vec<OwnedFd> {
    const SOCKETS: usize = 2;
    let maximum = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    let limit = rustix::process::Rlimit {
        current: maximum,
        maximum,
    };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit)
        .expect("as many descriptors as allowed");
    let mut sockets = Vec::new();
    for number in 0..SOCKETS {
        let name = format!("lockkit-test-queue-{}-{number}", std::process::id());
        let listener = bound(SocketType::STREAM, &name);
        net::listen(&listener, i32::MAX).expect("a bound socket");
        for _ in 0..connections {
            let connection = socket_of(SocketType::STREAM);
            net::connect(&connection, &address(&name)).expect("room in the queue");
            sockets.push(connection);
        }
        sockets.push(listener);
    }
    sockets
}

/// Holds the abstract `name` as a lock does, and hands it over to the first waiter. Then keeps a
/// copy of the socket, on which calls block however often the receiver sets it to non-blocking.
pub fn hand_over(name: &str) {
    let socket = bound(SocketType::SEQPACKET, name);
    println!("holds");
    let waiter = net::accept(&socket).expect("a waiter");
    send(&waiter, &socket);
    println!("handed over");
    loop {
        rustix::io::ioctl_fionbio(&socket, false).expect("a socket");
    }
}

/// Holds the abstract `name`, and repeatedly hands over a socket of another type with the same
/// name.
pub fn hand_over_another_type(name: &str) {
    let socket = bound(SocketType::SEQPACKET, name);
    let stream = bound(SocketType::STREAM, name);
    println!("holds");
    for round in 0.. {
        let waiter = net::accept(&socket).expect("a waiter");
        send(&waiter, &stream);
        if round == 0 {
            println!("handed over");
        }
    }
}

fn send(waiter: &OwnedFd, socket: &OwnedFd) {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [socket.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    // A process that only queries the lock is gone by then.
    let _ = net::sendmsg(
        waiter,
        &[IoSlice::new(b"L")],
        &mut control,
        SendFlags::NOSIGNAL,
    );
    let _ = net::shutdown(waiter, Shutdown::Write);
}

fn address(name: &str) -> SocketAddrUnix {
    SocketAddrUnix::new_abstract_name(name.as_bytes()).expect("a short name")
}

/// Connects to the listener at the abstract `name`; `None` when its queue is full.
pub fn connect(name: &str) -> Option<OwnedFd> {
    let socket = socket();
    rustix::io::ioctl_fionbio(&socket, true).expect("a socket");
    match net::connect(&socket, &address(name)) {
        Ok(()) => Some(socket),
        Err(Errno::AGAIN) => None,
        Err(error) => panic!("cannot connect to {name}: {error}"),
    }
}

/// Occupies the abstract `name` until the process is killed.
pub fn occupy_name(name: &str) {
    let _socket = bound(SocketType::SEQPACKET, name);
    println!("squatting");
    let _ = std::io::stdin().lines().count();
}

/// Joins the queue at the abstract `name`, and reports the result.
pub fn join_queue(name: &str) {
    let socket = socket();
    net::connect(&socket, &address(name)).expect("a process listens there");
    println!("queued");
    let mut message = [0; 16];
    match net::recv(&socket, &mut message, RecvFlags::empty()) {
        Ok((0, _)) | Err(_) => println!("turned away"),
        Ok((read, _)) => println!("was given {read} bytes"),
    }
}
