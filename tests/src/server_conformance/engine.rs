//! The interface to the servers of one engine.

use std::net::TcpStream;
use std::path::Path;

use rustix::process::Signal;

use super::certificates::Certificates;
use super::clock::Clock;

/// A server of an engine, for one drill. Its data outlasts a kill and a restart.
pub trait Engine: Sized {
    /// A TTL that expires soon, but not so soon that a busy machine loses the lease, in
    /// milliseconds. It is at least the minimum of the store.
    const TTL: u64 = 1000;

    /// Answers one connection as a version of the engine that is too old, up to where it shows.
    const OLD: Option<fn(TcpStream)> = None;

    /// Starts a server on 127.0.0.1 that requires `security` of its clients, with the clock of its
    /// machine, or the given clock.
    ///
    /// # Errors
    /// The missing resource of this machine.
    fn start(security: &Security, clock: Option<&Clock>) -> Result<Self, String>;

    /// Returns the port on which it listens, before and after a restart.
    fn port(&self) -> u16;

    /// Returns the URL of a lease with this name on such a server at 127.0.0.1:`port`, for a client
    /// with `access`. Returns `None` where the engine has no such access.
    fn url(&self, port: u16, access: Access, name: &str) -> Option<String>;

    /// Sends a signal to all its processes.
    fn signal(&self, signal: Signal);

    /// Kills it, if it runs, and waits until it is gone.
    fn kill(&mut self);

    /// Starts it again with its data.
    fn restart(&mut self);

    /// Starts a server that copies from this one through `port`, and waits until it has all data of
    /// this one. This server does not wait for it.
    ///
    /// # Errors
    /// The engine has no followers, or this machine lacks a resource.
    fn follower(&self, _port: u16) -> Result<Self, String> {
        Err("this engine has no servers that are behind and can be promoted".to_owned())
    }

    /// Makes a follower the server that grants.
    fn promote(&self) {}

    /// Returns whether the state of a lease depends on the wall clock of the server.
    fn goes_by_a_wall_clock() -> bool {
        false
    }
}

/// The requirements of a server on its clients.
#[derive(Debug)]
pub enum Security {
    /// None.
    None,
    /// The password [`PASSWORD`], for the engine's usual user or for [`USER`].
    Password,
    /// TLS. Clients need no certificate.
    Tls(Certificates),
    /// TLS with a client certificate.
    ClientCertificate(Certificates),
}

/// The password of servers that require one.
pub const PASSWORD: &str = "open-sesame";
/// The user with that password, where the engine's usual user has none.
pub const USER: &str = "ali";

/// The credentials of a client.
#[derive(Clone, Copy, Debug)]
pub enum Access<'s> {
    /// Everything that the server requires.
    Right(&'s Security),
    /// Another password.
    WrongPassword,
    /// The right password, or none, for a database that does not exist.
    WrongDatabase,
    /// TLS, with trust in the authority in this file, and without a certificate of its own.
    Tls(&'s Path),
}
