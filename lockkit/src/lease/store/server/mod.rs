//! Lease stores on existing servers, and what they share.
//!
//! Each engine is a [`LeaseStore`](crate::lease::LeaseStore) in its own module, and contains only its requests. All leases of
//! a process on one server share a store (see [`connect`](crate::lease::connect)), and with it:
//! - **Connections** ([`Pool`]): each request uses a connection of its own, so no request waits for the answer to
//!   another. A failed connection is closed together with all idle connections, because a restarted server has
//!   forgotten those as well.
//! - **Waiters** ([`notify`]): one thread listens to the server for all waiters, and notifies those that a change
//!   concerns.
//! - **A forked child** ([`ProcessLocal`]) opens its own connections, and does not touch its parent's.
//! - **Dead holders** ([`attempt`]): a holder of this boot of this host is taken over at once if its identity proves it
//!   dead. All other holders expire by the server's rule.

mod notify;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use rustix::io::Errno;

pub(super) use notify::{Listener, Subscriptions};

use super::lease_store::{Attempt, Deadline, Grant, LeaseSnapshot};
use crate::base::error::{Error, StoreError};
use crate::base::owner::{Liveness, Owner};
use crate::base::owner_text;
use crate::sys::process_local::ProcessLocal;

pub(super) type Result<T, E = StoreError> = std::result::Result<T, E>;

/// The idle connections, which wait for their next request.
pub(super) struct Pool<C>(Mutex<Vec<C>>);

/// The maximum number of idle connections. More are needed at once only if as many threads send requests at once.
const MOST_IDLE: usize = 8;

impl<C> Pool<C> {
    pub(super) const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// Sends a request on a connection of its own. The server may have closed an idle connection meanwhile. So a
    /// request that fails there is sent once more on a new connection, unless its error is permanent. Every request of
    /// an engine can be repeated.
    pub(super) fn ask<R>(
        &self,
        connect: impl Fn() -> Result<C>,
        mut request: impl FnMut(&mut C) -> Result<R>,
    ) -> Result<R> {
        let idle = self.0.lock().pop();
        let mut is_unknown = false;
        if let Some(mut connection) = idle {
            match request(&mut connection) {
                Ok(answer) => {
                    self.keep(connection);
                    return Ok(answer);
                }
                Err(StoreError::Permanent(cause)) => return Err(StoreError::Permanent(cause)),
                Err(error) => {
                    is_unknown = matches!(error, StoreError::Unknown(_));
                    self.0.lock().clear();
                }
            }
        }
        let asked = connect().and_then(|mut connection| {
            let answer = request(&mut connection)?;
            self.keep(connection);
            Ok(answer)
        });
        match asked {
            // The first request may have taken effect. A permanent error comes back with the next request.
            Err(StoreError::NotApplied(cause) | StoreError::Permanent(cause)) if is_unknown => {
                Err(StoreError::Unknown(cause))
            }
            asked => asked,
        }
    }

    fn keep(&self, connection: C) {
        let mut idle = self.0.lock();
        if idle.len() < MOST_IDLE {
            idle.push(connection);
        }
    }
}

/// Limits the concurrent requests of a process, because a server has a limited number of connections. A request that
/// must not wait for others takes no permit.
#[cfg(feature = "postgres")]
pub(super) struct Semaphore {
    left: Mutex<usize>,
    freed: parking_lot::Condvar,
}

#[cfg(feature = "postgres")]
impl Semaphore {
    /// Returns a semaphore with as many permits as the pool keeps idle connections.
    pub(super) const fn new() -> Self {
        Self { left: Mutex::new(MOST_IDLE), freed: parking_lot::Condvar::new() }
    }

    /// Takes a permit, which is given back when it is dropped.
    pub(super) fn take(&self, by: Deadline) -> Result<Permit<'_>> {
        let mut left = self.left.lock();
        while *left == 0 {
            if self.freed.wait_until(&mut left, by.moment()).timed_out() {
                return Err(StoreError::not_applied("other requests of this process took too long"));
            }
        }
        *left -= 1;
        Ok(Permit(self))
    }
}

/// See [`Semaphore`].
#[cfg(feature = "postgres")]
pub(super) struct Permit<'t>(&'t Semaphore);

#[cfg(feature = "postgres")]
impl Drop for Permit<'_> {
    fn drop(&mut self) {
        *self.0.left.lock() += 1;
        self.0.freed.notify_one();
    }
}

/// Returns the error for a failed connection to `place`. If this process lacks a resource, the error says so by itself.
#[cold]
pub(super) fn not_connected(place: &str, error: &io::Error) -> StoreError {
    match error.raw_os_error() {
        Some(code) if [Errno::MFILE, Errno::NFILE].contains(&Errno::from_raw_os_error(code)) => {
            StoreError::not_applied(Error::io("connect to", place, io::Error::from_raw_os_error(code)))
        }
        _ => StoreError::not_applied(format!("{place} cannot be reached: {error}")),
    }
}

/// Returns the addresses of a host. The system's look-up has no timeout, so a thread runs it, and ends with it.
pub(super) fn addresses(host: &str, port: u16, by: Deadline) -> io::Result<Vec<SocketAddr>> {
    /// The maximum number of look-ups of one host that the callers have given up and that still run. If no look-up
    /// ended, each attempt would leave one more thread.
    const MOST_LEFT: u32 = 4;
    static LEFT: ProcessLocal<Mutex<HashMap<String, u32>>> = ProcessLocal::new();
    if let Ok(address) = host.trim_matches(['[', ']']).parse::<IpAddr>() {
        return Ok(vec![(address, port).into()]);
    }
    let left = LEFT.get_or_make(Mutex::default);
    let late = || io::Error::new(io::ErrorKind::TimedOut, format!("looking up {host:?} takes too long"));
    if left.lock().get(host).is_some_and(|count| *count >= MOST_LEFT) {
        return Err(late());
    }
    let (send, found) = mpsc::sync_channel(1);
    let name = host.to_owned();
    let look_up = move || {
        let addresses = (&*name, port).to_socket_addrs().map(Iterator::collect);
        let mut left = left.lock();
        // The caller has given up.
        if send.send(addresses).is_err()
            && let Some(count) = left.get_mut(&name)
        {
            *count -= 1;
            if *count == 0 {
                left.remove(&name);
            }
        }
    };
    thread::Builder::new().name("lockkit-lookup".to_owned()).spawn(look_up)?;
    if let Ok(addresses) = found.recv_timeout(by.remaining()) {
        return addresses;
    }
    // Under the lock, because the look-up may end just now.
    let mut left = left.lock();
    let last = found.try_recv();
    drop(found);
    last.unwrap_or_else(|_| {
        *left.entry(host.to_owned()).or_default() += 1;
        Err(late())
    })
}

/// Tries to acquire. `ask` makes the request; its argument is the holder whose grant counts as expired, if any. The
/// request itself compares the claim and the token of that holder, so a holder that acquired the name meanwhile is not
/// affected.
pub(super) fn attempt(mut ask: impl FnMut(Option<&LeaseSnapshot>) -> Result<Attempt>) -> Result<Attempt> {
    match ask(None)? {
        Attempt::Busy(seen) if is_dead(seen.owner()) => ask(Some(&seen)),
        attempt => Ok(attempt),
    }
}

/// Returns whether the owner is certainly dead. A reboot of this host is no proof. Another host of the same name and
/// installation, such as a machine from the same image, may share the server.
fn is_dead(owner: Option<&Owner>) -> bool {
    owner.is_some_and(|owner| owner.is_of_this_boot() && owner.liveness() == Liveness::Dead)
}

/// Returns a holder as callers see it: a dead holder has no time left.
pub(super) fn shown(seen: LeaseSnapshot) -> LeaseSnapshot {
    if is_dead(seen.owner()) { seen.with_expires_in(Duration::ZERO) } else { seen }
}

/// Returns whether the owner is this process.
#[cfg(feature = "etcd")]
pub(super) fn is_own(owner: &Owner) -> bool {
    let identity = |owner: &Owner| (owner.pid, owner.start, owner.boot, owner.namespace);
    identity(owner) == identity(&Owner::current())
}

/// Returns this process, as text for a record.
pub(super) fn own_text() -> String {
    text_of(&Owner { acquired: Some(SystemTime::now()), ..Owner::current() })
}

/// Returns the owner that the next grant reports instead of the holder when the grant is given up, as text for a
/// record.
pub(super) fn passed_on(grant: &Grant) -> Option<String> {
    Some(grant.recovered()?.owner().map(text_of).unwrap_or_default())
}

/// Returns an owner, as text for a record.
pub(super) fn text_of(owner: &Owner) -> String {
    let mut text = format!("pid {}\n", owner.pid());
    owner_text::write(owner, &mut text);
    text
}

/// Returns the owner in the text of a record, if there is one.
pub(super) fn owner_of(text: &str) -> Option<Owner> {
    let (first, rest) = text.split_once('\n')?;
    Some(owner_text::read(first.strip_prefix("pid ")?.parse().ok()?, rest.lines()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_is_read_as_it_was_written() {
        let owner = owner_of(&own_text()).unwrap();
        assert_eq!(owner.pid(), std::process::id());
        assert_eq!(owner.liveness(), Liveness::Alive);
        assert!(owner_of("").is_none() && owner_of("pid x\n").is_none() && owner_of("pid 1").is_none());
    }

    #[test]
    fn pool_closed_connection_retries_once() {
        let pool = Pool::new();
        let made = std::cell::Cell::new(0);
        let connect = || {
            made.set(made.get() + 1);
            Ok(made.get())
        };
        assert_eq!(pool.ask(connect, |number| Ok(*number)).unwrap(), 1);
        assert_eq!(pool.ask(connect, |number| Ok(*number)).unwrap(), 1, "it is kept");
        let answer =
            pool.ask(connect, |number| if *number == 1 { Err(StoreError::unknown("cut")) } else { Ok(*number) });
        assert_eq!(answer.unwrap(), 2);
        assert!(pool.ask(connect, |_| Err::<(), _>(StoreError::not_applied("down"))).is_err());
        assert_eq!(made.get(), 3, "once more, and no more than that");
        pool.ask(connect, |_| Ok(())).unwrap();
        for is_misuse in [false, true] {
            pool.ask(connect, |_| Ok(())).unwrap();
            let down = || Err(if is_misuse { StoreError::permanent("never") } else { StoreError::not_applied("down") });
            let answer = pool.ask(down, |_| Err::<(), _>(StoreError::unknown("cut")));
            assert!(matches!(answer, Err(StoreError::Unknown(_))), "the first one may have been carried out");
        }
    }

    #[test]
    fn only_the_dead_are_taken_over() {
        let seen = |owner: Owner| Attempt::Busy(LeaseSnapshot::new(7).with_token(7).with_owner(owner));
        let mut dead = Owner::current();
        dead.start = dead.start.map(|start| start + 1);
        let mut before = dead.clone();
        before.boot = before.boot.map(|boot| boot ^ 1);
        let mut over = Vec::new();
        for owner in [Owner::current(), before, dead] {
            let _ = attempt(|whom| {
                over.push(whom.map(LeaseSnapshot::revision));
                Ok(seen(owner.clone()))
            });
        }
        assert_eq!(over, [None, None, None, Some(7)]);
    }
}
