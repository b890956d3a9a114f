//! The queue of the threads of this process that wait for one lease, first come, first served.
//!
//! Only the first thread of the queue asks the store; the others sleep until they are first. So the
//! store serves one waiter per process, and a release wakes one thread.
//!
//! # Implementation
//! A thread joins the queue if the lease is held, or if the queue is not empty. It leaves the queue
//! when it acquires the lease or gives up, and wakes the next thread. If the store fails for the
//! first thread, the queue is dissolved: every thread asks the store for itself, so no thread waits
//! for the failures of others. A thread without a free descriptor for its event asks the store out
//! of order.
//!
//! A forked child has an empty queue. The mutex is the standard library's: parking_lot keeps a
//! process-wide table that a fork can leave locked.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::store::lease_store::LeaseName;
use crate::base::owner::Owner;
use crate::sys::event::Event;
use crate::sys::fd::{AsFd, BorrowedFd};
use crate::sys::process_local::ProcessLocal;

/// Identifies a queue: the leases of one record that are acquired by the same rules. A thread
/// relies on the first thread, which must therefore judge the lease, repeat its requests and fail
/// as the thread itself would.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct QueueKey {
    pub(super) record: RecordId,
    /// The shared id of the clock, or its address.
    pub(super) clock: Result<u128, usize>,
    pub(super) retry_delay: Duration,
    pub(super) retry_limit: u32,
}

/// Identifies the record of a lease in this process.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum RecordId {
    File {
        path: PathBuf,
        /// How long a damaged file counts as held.
        damage_timeout: Duration,
    },
    /// The address of the store, and the name in it.
    Store(usize, LeaseName),
}

/// The waiters for one lease, at least one.
#[derive(Default)]
struct Queue {
    waiters: VecDeque<Arc<Entry>>,
    /// The holder of the lease, as the first thread last saw it.
    holder: Option<Owner>,
}

struct Entry {
    /// Set when this waiter becomes first, or the queue is dissolved. A waiter that joins an empty
    /// queue needs none.
    event: Option<Event>,
}

impl Entry {
    fn wake(&self) {
        if let Some(event) = &self.event {
            event.set();
        }
    }
}

type Queues = HashMap<QueueKey, Queue>;

fn queues() -> MutexGuard<'static, Queues> {
    static QUEUES: ProcessLocal<Mutex<Queues>> = ProcessLocal::new();
    // A panic leaves no partial change in here.
    QUEUES
        .get_or_make(Mutex::default)
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
}

impl QueueKey {
    /// Returns whether a thread waits, so that the next one must join.
    pub(super) fn has_waiters(&self) -> bool {
        let queues = queues();
        !queues.is_empty() && queues.contains_key(self)
    }

    /// Records the holder of the lease, for the errors of the waiters.
    pub(super) fn set_holder(&self, holder: Option<&Owner>) {
        if let Some(queue) = queues().get_mut(self) {
            queue.holder = holder.cloned();
        }
    }

    /// Returns the holder of the lease, as the first thread last saw it.
    pub(super) fn holder(&self) -> Option<Owner> {
        queues().get(self)?.holder.clone()
    }

    /// Joins the queue at its end.
    ///
    /// # Errors
    /// If no event can be created, for example without a free descriptor.
    pub(super) fn join(&self) -> io::Result<Waiter> {
        let mut queues = queues();
        let queue = queues.entry(self.clone()).or_default();
        let event = if queue.waiters.is_empty() {
            None
        } else {
            Some(Event::new()?)
        };
        let entry = Arc::new(Entry { event });
        queue.waiters.push_back(entry.clone());
        Ok(Waiter {
            key: self.clone(),
            entry,
        })
    }
}

/// A place in the queue. Dropping it leaves the queue and wakes the next thread.
pub(super) struct Waiter {
    key: QueueKey,
    entry: Arc<Entry>,
}

impl Waiter {
    /// Returns whether this thread is first, and may ask the store.
    pub(super) fn is_first(&self) -> bool {
        queues()
            .get(&self.key)
            .and_then(|queue| queue.waiters.front())
            .is_some_and(|first| Arc::ptr_eq(first, &self.entry))
    }

    /// Returns a descriptor that is readable when this thread becomes first, or the queue is
    /// dissolved.
    pub(super) fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        self.entry.event.as_ref().map(|event| event.as_fd())
    }

    /// Dissolves the queue if this thread is first: every thread asks the store for itself.
    pub(super) fn dissolve(self) {
        let queue = if self.is_first() {
            queues().remove(&self.key)
        } else {
            None
        };
        queue
            .into_iter()
            .flat_map(|queue| queue.waiters)
            .for_each(|entry| entry.wake());
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let mut queues = queues();
        // After the queue was dissolved there may be a new one without this thread.
        let Some(queue) = queues.get_mut(&self.key) else {
            return;
        };
        let Some(at) = queue
            .waiters
            .iter()
            .position(|entry| Arc::ptr_eq(entry, &self.entry))
        else {
            return;
        };
        queue.waiters.remove(at);
        match queue.waiters.front() {
            None => _ = queues.remove(&self.key),
            Some(first) if at == 0 => first.wake(),
            Some(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::event;

    fn key(path: &str) -> QueueKey {
        let record = RecordId::File {
            path: path.into(),
            damage_timeout: Duration::from_secs(2),
        };
        QueueKey {
            record,
            clock: Ok(1),
            retry_delay: Duration::from_millis(25),
            retry_limit: 4,
        }
    }

    fn is_woken(waiter: &Waiter) -> bool {
        event::is_readable(waiter.as_fd().unwrap())
    }

    #[test]
    fn join_in_order_makes_first_in_order() {
        let key = key("order");
        assert!(!key.has_waiters());
        let [first, second, third, fourth] = [(); 4].map(|()| key.join().unwrap());
        assert!(first.is_first() && first.as_fd().is_none() && key.has_waiters());
        assert!(!second.is_first() && !is_woken(&second));
        drop(third);
        assert!(
            !is_woken(&second) && !is_woken(&fourth),
            "giving up wakes no other waiter"
        );
        drop(first);
        assert!(second.is_first() && is_woken(&second) && !is_woken(&fourth));
        drop(second);
        assert!(fourth.is_first() && is_woken(&fourth));
        drop(fourth);
        assert!(!key.has_waiters(), "nothing is left");
    }

    #[test]
    fn join_affects_only_the_same_lease_and_rules() {
        let one = key("one");
        let _waiter = one.join().unwrap();
        assert!(!key("other").has_waiters());
        assert!(
            !QueueKey {
                clock: Err(1),
                ..one.clone()
            }
            .has_waiters()
        );
        assert!(key("one").has_waiters());
    }

    #[test]
    fn dissolve_lets_new_waiter_be_first() {
        let key = key("dissolved");
        let [first, second] = [(); 2].map(|()| key.join().unwrap());
        first.dissolve();
        assert!(is_woken(&second) && !second.is_first() && !key.has_waiters());
        let newcomer = key.join().unwrap();
        drop(second);
        assert!(newcomer.is_first());
    }
}
