//! The addresses of a host, and the time and the error of a connection attempt.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::io::Errno;

use crate::base::error::{Error, StoreError};
use crate::lease::store::lease_store::Deadline;
use crate::sys::process_local::ProcessLocal;

/// The maximum number of look-ups of one host that the callers have given up and that still run. If
/// no look-up ended, each attempt would leave one more thread.
const MAX_ABANDONED_LOOKUPS: u32 = 4;

/// Returns the addresses of a host. The system's look-up has no timeout, so a thread runs it, and
/// ends with it.
pub(in crate::lease::store) fn addresses(
    host: &str,
    port: u16,
    by: Deadline,
) -> io::Result<Vec<SocketAddr>> {
    static ABANDONED: ProcessLocal<Mutex<HashMap<String, u32>>> = ProcessLocal::new();
    if let Ok(address) = host.trim_matches(['[', ']']).parse::<IpAddr>() {
        return Ok(vec![(address, port).into()]);
    }
    let abandoned = ABANDONED.get_or_make(Mutex::default);
    let timeout = || {
        io::Error::new(
            io::ErrorKind::TimedOut,
            format!("the look-up of {host:?} takes too long"),
        )
    };
    if abandoned
        .lock()
        .get(host)
        .is_some_and(|count| *count >= MAX_ABANDONED_LOOKUPS)
    {
        return Err(timeout());
    }
    let (send, result) = mpsc::sync_channel(1);
    let name = host.to_owned();
    let look_up = move || {
        let addresses = (&*name, port).to_socket_addrs().map(Iterator::collect);
        let mut abandoned = abandoned.lock();
        // The caller has given up.
        if send.send(addresses).is_err()
            && let Some(count) = abandoned.get_mut(&name)
        {
            *count -= 1;
            if *count == 0 {
                abandoned.remove(&name);
            }
        }
    };
    thread::Builder::new()
        .name("lockkit-lookup".to_owned())
        .spawn(look_up)?;
    if let Ok(addresses) = result.recv_timeout(by.remaining()) {
        return addresses;
    }
    // Under the lock, because the look-up may end just now.
    let mut abandoned = abandoned.lock();
    let last = result.try_recv();
    drop(result);
    last.unwrap_or_else(|_| {
        *abandoned.entry(host.to_owned()).or_default() += 1;
        Err(timeout())
    })
}

/// Returns an equal part of the time that is left, if it is divided among so many attempts. So one
/// attempt without an answer leaves time for the others.
pub(in crate::lease::store) fn equal_part(by: Deadline, attempts: usize) -> Duration {
    by.remaining() / u32::try_from(attempts.max(1)).unwrap_or(u32::MAX)
}

/// Returns the error for a failed connection to `server`. If this process lacks a resource, the
/// error says so by itself.
#[cold]
pub(in crate::lease::store) fn connect_error(server: &str, error: &io::Error) -> StoreError {
    match error.raw_os_error() {
        Some(code) if [Errno::MFILE, Errno::NFILE].contains(&Errno::from_raw_os_error(code)) => {
            StoreError::not_applied(Error::io(
                "connect to",
                server,
                io::Error::from_raw_os_error(code),
            ))
        }
        _ => StoreError::not_applied(format!("cannot connect to {server}: {error}")),
    }
}
