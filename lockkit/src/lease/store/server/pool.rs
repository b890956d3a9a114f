//! The idle connections of a store, and the limit of concurrent requests.

use parking_lot::Mutex;

use super::outcome::{Outcome, Result};
use crate::base::error::StoreError;
#[cfg(feature = "postgres")]
use crate::lease::store::lease_store::Deadline;

/// The idle connections, which wait for their next request.
pub(in crate::lease::store) struct Pool<C>(Mutex<Vec<C>>);

/// The maximum number of idle connections. More are needed at once only if as many threads send
/// requests at once.
const MAX_IDLE_CONNECTIONS: usize = 8;

impl<C> Pool<C> {
    pub(in crate::lease::store) const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// Sends a request on a connection of its own, and records in `outcome` an attempt without an
    /// answer. The server may have closed an idle connection meanwhile. So a request that fails
    /// there is sent once more on a new connection, unless its error is permanent. Every request of
    /// an engine can be repeated.
    pub(in crate::lease::store) fn run<R>(
        &self,
        outcome: &Outcome,
        connect: impl Fn() -> Result<C>,
        mut request: impl FnMut(&mut C) -> Result<R>,
    ) -> Result<R> {
        let mut attempt = |mut connection: C| {
            let answer = request(&mut connection).inspect_err(|error| outcome.observe(error))?;
            self.keep(connection);
            Ok(answer)
        };
        let idle = self.0.lock().pop();
        if let Some(connection) = idle {
            match attempt(connection) {
                Err(error) if !matches!(error, StoreError::Permanent(_)) => self.0.lock().clear(),
                answer => return answer,
            }
        }
        // A permanent error comes back with the next request.
        connect()
            .and_then(attempt)
            .map_err(|error| outcome.resolve(error))
    }

    fn keep(&self, connection: C) {
        let mut idle = self.0.lock();
        if idle.len() < MAX_IDLE_CONNECTIONS {
            idle.push(connection);
        }
    }
}

/// Limits the concurrent requests of a process, because a server has a limited number of
/// connections. A request that must not wait for others takes no permit.
#[cfg(feature = "postgres")]
pub(in crate::lease::store) struct Semaphore {
    available: Mutex<usize>,
    released: parking_lot::Condvar,
}

#[cfg(feature = "postgres")]
impl Semaphore {
    /// Returns a semaphore with as many permits as the pool keeps idle connections.
    pub(in crate::lease::store) const fn new() -> Self {
        Self {
            available: Mutex::new(MAX_IDLE_CONNECTIONS),
            released: parking_lot::Condvar::new(),
        }
    }

    /// Takes a permit, which is given back when it is dropped.
    pub(in crate::lease::store) fn acquire(&self, by: Deadline) -> Result<Permit<'_>> {
        let mut available = self.available.lock();
        while *available == 0 {
            if self
                .released
                .wait_until(&mut available, by.moment())
                .timed_out()
            {
                return Err(StoreError::not_applied(
                    "the time limit passed before other requests of this process ended",
                ));
            }
        }
        *available -= 1;
        Ok(Permit(self))
    }
}

/// See [`Semaphore`].
#[cfg(feature = "postgres")]
pub(in crate::lease::store) struct Permit<'s>(&'s Semaphore);

#[cfg(feature = "postgres")]
impl Drop for Permit<'_> {
    fn drop(&mut self) {
        *self.0.available.lock() += 1;
        self.0.released.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pool_closed_connection_retries_once() {
        let pool = Pool::new();
        let opened = std::cell::Cell::new(0);
        let connect = || {
            opened.set(opened.get() + 1);
            Ok(opened.get())
        };
        assert_eq!(
            pool.run(&Outcome::default(), connect, |number| Ok(*number))
                .unwrap(),
            1
        );
        assert_eq!(
            pool.run(&Outcome::default(), connect, |number| Ok(*number))
                .unwrap(),
            1,
            "the connection is kept"
        );
        let answer = pool.run(&Outcome::default(), connect, |number| {
            if *number == 1 {
                Err(StoreError::unknown("cut"))
            } else {
                Ok(*number)
            }
        });
        assert_eq!(answer.unwrap(), 2);
        assert!(
            pool.run(&Outcome::default(), connect, |_| Err::<(), _>(
                StoreError::not_applied("down")
            ))
            .is_err()
        );
        assert_eq!(
            opened.get(),
            3,
            "the request is sent once more, and not again"
        );
        pool.run(&Outcome::default(), connect, |_| Ok(())).unwrap();
        for is_permanent in [false, true] {
            pool.run(&Outcome::default(), connect, |_| Ok(())).unwrap();
            let down = || {
                Err(if is_permanent {
                    StoreError::permanent("never")
                } else {
                    StoreError::not_applied("down")
                })
            };
            let answer = pool.run(&Outcome::default(), down, |_| {
                Err::<(), _>(StoreError::unknown("cut"))
            });
            assert!(
                matches!(answer, Err(StoreError::Unknown(_))),
                "the first request may have taken effect"
            );
        }
    }
}
