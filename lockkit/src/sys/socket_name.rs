//! The name of an abstract socket as the identity of its descriptor. The identity is a hash of the
//! name.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::net::{self, SocketAddrUnix};

use super::fnv;

/// Returns a hash of the name: FNV-1a over words.
pub(super) fn hash_of(address: &SocketAddrUnix) -> u64 {
    let add = |sum: u64, word: &[u8]| {
        let mut bytes = [0; 8];
        bytes[..word.len()].copy_from_slice(word);
        fnv::add(sum, u64::from_ne_bytes(bytes))
    };
    address
        .abstract_name()
        .unwrap_or_default()
        .chunks(8)
        .fold(fnv::BASIS, add)
}

/// Whether the descriptor is a socket with the name of this hash. A connection that such a socket
/// has accepted has the name, too.
pub(super) fn has_name(descriptor: BorrowedFd<'_>, hash: u64) -> bool {
    match net::getsockname(descriptor) {
        Ok(found) => SocketAddrUnix::try_from(found).is_ok_and(|found| hash_of(&found) == hash),
        // Any other error does not prove that the descriptor was closed.
        Err(error) => !matches!(error, Errno::BADF | Errno::NOTSOCK),
    }
}
