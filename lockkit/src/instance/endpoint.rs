//! The endpoint where the instances of a program meet: an abstract socket in addition to the socket
//! that is the lock.
//!
//! Its name belongs to the network namespace and to the effective user, exactly as the lock's does,
//! and no environment variable changes it. The kernel identifies both ends of each connection.

use rustix::io::Errno;

use crate::base::error::{Error, ErrorKind, Result};
use crate::base::runtime_dir;
use crate::sys::fork::ForkGuarded;
use crate::sys::unix_socket::socket::{self, Address, Peer, Reached};
use crate::sys::unix_socket::stream;

#[derive(Debug)]
pub(super) struct Endpoint {
    user: u32,
    path: String,
    address: Address,
}

impl Endpoint {
    pub(super) fn of(name: &str) -> Result<Self> {
        let user = runtime_dir::effective_uid();
        // Different from any lock's name, and the longest name still fits into an address.
        let name = format!("lockkit/first/u{user}/{name}");
        let path = format!("@{name}");
        let address = socket::address(&name).map_err(|error| Error::io("name", &path, error))?;
        Ok(Self {
            user,
            path,
            address,
        })
    }

    /// Returns the user whose processes meet here.
    pub(super) fn user(&self) -> u32 {
        self.user
    }

    /// Returns the listening socket, or `None` if there is one already.
    pub(super) fn listen(&self) -> Result<Option<ForkGuarded>> {
        stream::listen_at(&self.address).map_err(|error| self.io("bind", error))
    }

    /// Connects to this user's process that listens here. Returns `None` if there is none, or if
    /// its queue is full.
    ///
    /// # Errors
    /// `ForeignOwner` if another user's process listens here.
    pub(super) fn connect(&self) -> Result<Option<ForkGuarded>> {
        let connection =
            match stream::connect(&self.address).map_err(|error| self.io("connect to", error))? {
                Reached::NoListener | Reached::Full => return Ok(None),
                Reached::Queue(connection) => connection,
            };
        let peer =
            socket::peer(&*connection).map_err(|error| self.io("query the listener at", error))?;
        if !socket::is_own(&*connection, peer, self.user) {
            let Peer { uid, pid } = peer;
            let pid = (pid != 0).then_some(pid);
            return Err(ErrorKind::ForeignOwner {
                lock: self.path.clone(),
                uid,
                pid,
            }
            .into());
        }
        Ok(Some(connection))
    }

    pub(super) fn io(&self, action: &'static str, error: Errno) -> Error {
        Error::io(action, &self.path, error)
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn address_of_longest_name_and_highest_uid_fits() {
        let longest = format!(
            "lockkit/first/u{}/{}",
            u32::MAX,
            "x".repeat(crate::base::name::MAX_LEN)
        );
        assert!(super::socket::address(&longest).is_ok());
    }
}
