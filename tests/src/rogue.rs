//! Processes that mean ill with the abstract socket of a named lock.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{self, AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};

fn socket() -> OwnedFd {
    net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("a socket")
}

fn address(name: &str) -> SocketAddrUnix {
    SocketAddrUnix::new_abstract_name(name.as_bytes()).expect("a short name")
}

/// A connection in the queue of whoever listens at the abstract `name`; `None` when the queue is full.
pub fn connect(name: &str) -> Option<OwnedFd> {
    let socket = socket();
    rustix::io::ioctl_fionbio(&socket, true).expect("a socket");
    match net::connect(&socket, &address(name)) {
        Ok(()) => Some(socket),
        Err(Errno::AGAIN) => None,
        Err(error) => panic!("cannot connect to {name}: {error}"),
    }
}

/// Sits on the abstract `name` until it is killed.
pub fn squat(name: &str) {
    let socket = socket();
    net::bind(&socket, &address(name)).expect("a free name");
    net::listen(&socket, 16).expect("a bound socket");
    println!("squatting");
    let _ = std::io::stdin().lines().count();
}

/// Queues up at the abstract `name`, and says what came of it.
pub fn queue(name: &str) {
    let socket = socket();
    net::connect(&socket, &address(name)).expect("somebody listens");
    println!("queued");
    let mut message = [0; 16];
    match net::recv(&socket, &mut message, RecvFlags::empty()) {
        Ok((0, _)) | Err(_) => println!("turned away"),
        Ok((read, _)) => println!("was given {read} bytes"),
    }
}
