//! The threads of this process that wait for one lease, first come, first served.
//!
//! Only the first of them asks the store; the others sleep until they are first. So however many threads wait, the store
//! serves one waiter of this process, and a release wakes one thread.
//!
//! A thread joins when it has found the lease held, or finds that others wait already. It leaves when it has the lease
//! or gives up, which wakes the next one. If the store fails all are let go, and each asks for itself: nobody waits for
//! the failures of others. A thread that has no descriptor left to sleep with asks for itself, too.
//!
//! Waiters belong to a process: a forked child begins without any. The mutex is the standard library's: parking_lot's
//! waits go through a table of the whole process, which a fork could leave locked.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::store::LeaseName;
use crate::owner::Owner;
use crate::sys::event::Event;
use crate::sys::fd::{AsFd, BorrowedFd};
use crate::sys::per_process::PerProcess;

/// Which waiters wait for the same: those whose leases are kept at one place and are judged by the same rules. Each
/// waits for the first one's judgement, so that must be its own.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) place: Place,
    /// The clock's shared id, or its address.
    pub(super) clock: Result<u128, usize>,
    /// How long a damaged file counts as held.
    pub(super) unreadable: Option<Duration>,
    pub(super) retry_delay: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Place {
    File(PathBuf),
    /// The store, by its address, and the name in it.
    Store(usize, LeaseName),
}

/// The waiters for one lease. There is always one.
#[derive(Default)]
struct Line {
    waiters: VecDeque<Arc<Spot>>,
    /// Who holds the lease, as the first one was told.
    owner: Option<Owner>,
}

struct Spot {
    /// Set when this waiter is first, or is let go. One that was first at once needs none.
    event: Option<Event>,
}

impl Spot {
    fn wake(&self) {
        if let Some(event) = &self.event {
            event.set();
        }
    }
}

type Lines = HashMap<Key, Line>;

fn lines() -> MutexGuard<'static, Lines> {
    static LINES: PerProcess<Mutex<Lines>> = PerProcess::new();
    // Nothing in here is left half done by a panic.
    LINES.get(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

impl Key {
    /// Whether a thread waits. The next one is to come behind it.
    pub(super) fn is_awaited(&self) -> bool {
        let lines = lines();
        !lines.is_empty() && lines.contains_key(self)
    }

    /// Tells the waiters who holds the lease, for their errors.
    pub(super) fn tell(&self, owner: Option<&Owner>) {
        if let Some(line) = lines().get_mut(self) {
            line.owner = owner.cloned();
        }
    }

    /// Who holds the lease, as far as the waiters have been told.
    pub(super) fn holder(&self) -> Option<Owner> {
        lines().get(self)?.owner.clone()
    }

    /// Joins the waiters, as the last.
    pub(super) fn join(&self) -> io::Result<Waiter> {
        let mut lines = lines();
        let line = lines.entry(self.clone()).or_default();
        let event = if line.waiters.is_empty() { None } else { Some(Event::new()?) };
        let spot = Arc::new(Spot { event });
        line.waiters.push_back(spot.clone());
        Ok(Waiter { key: self.clone(), spot })
    }
}

/// A place among the waiters, which is left when it is dropped.
pub(super) struct Waiter {
    key: Key,
    spot: Arc<Spot>,
}

impl Waiter {
    /// Whether it is this one's turn to ask the store.
    pub(super) fn is_first(&self) -> bool {
        lines().get(&self.key).and_then(|line| line.waiters.front()).is_some_and(|first| Arc::ptr_eq(first, &self.spot))
    }

    /// What can be read once it is first, or is let go.
    pub(super) fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        self.spot.event.as_ref().map(|event| event.as_fd())
    }

    /// Has every waiter ask for itself, if this is the first.
    pub(super) fn let_all_go(self) {
        let line = if self.is_first() { lines().remove(&self.key) } else { None };
        line.into_iter().flat_map(|line| line.waiters).for_each(|spot| spot.wake());
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let mut lines = lines();
        // One that was let go has left already, and perhaps others have come.
        let Some(line) = lines.get_mut(&self.key) else { return };
        let Some(at) = line.waiters.iter().position(|spot| Arc::ptr_eq(spot, &self.spot)) else { return };
        line.waiters.remove(at);
        match line.waiters.front() {
            None => _ = lines.remove(&self.key),
            Some(first) if at == 0 => first.wake(),
            Some(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::event;

    fn key(path: &str) -> Key {
        let place = Place::File(path.into());
        Key { place, clock: Ok(1), unreadable: None, retry_delay: Duration::from_millis(25) }
    }

    fn is_woken(waiter: &Waiter) -> bool {
        event::is_readable(waiter.as_fd().unwrap())
    }

    #[test]
    fn waiters_are_first_in_the_order_in_which_they_came() {
        let key = key("order");
        assert!(!key.is_awaited());
        let [first, second, third, fourth] = [(); 4].map(|()| key.join().unwrap());
        assert!(first.is_first() && first.as_fd().is_none() && key.is_awaited());
        assert!(!second.is_first() && !is_woken(&second));
        drop(third);
        assert!(!is_woken(&second) && !is_woken(&fourth), "one that gives up wakes nobody");
        drop(first);
        assert!(second.is_first() && is_woken(&second) && !is_woken(&fourth));
        drop(second);
        assert!(fourth.is_first() && is_woken(&fourth));
        drop(fourth);
        assert!(!key.is_awaited(), "nothing is left");
    }

    #[test]
    fn waiters_of_other_leases_and_rules_are_others() {
        let one = key("one");
        let _waiter = one.join().unwrap();
        assert!(!key("other").is_awaited());
        assert!(!Key { clock: Err(1), ..one.clone() }.is_awaited());
        assert!(key("one").is_awaited());
    }

    #[test]
    fn let_go_waiters_leave_the_line_to_newcomers() {
        let key = key("let go");
        let [first, second] = [(); 2].map(|()| key.join().unwrap());
        first.let_all_go();
        assert!(is_woken(&second) && !second.is_first() && !key.is_awaited());
        let newcomer = key.join().unwrap();
        drop(second);
        assert!(newcomer.is_first());
    }
}
