//! Wakes the waiters of lease names.
//!
//! A waiter subscribes to the name, checks that the name is still held, and sleeps. One thread of the store has its own
//! connection to the server, the [`Listener`], and notifies the subscriptions of the names that the server reports.
//! When the connection breaks, the thread notifies all subscriptions and ends, so that no waiter sleeps through a
//! change. The next waiter starts the thread again. The thread also ends when no waiter has been subscribed for
//! [`IDLE`]. A waiter that gives up removes its subscription and leaves nothing.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::{Result, is_dead};
use crate::base::cancel::CancelToken;
use crate::base::error::StoreError;
use crate::base::owner::{Liveness, Owner};
use crate::lease::store::lease_store::{Deadline, LeaseName};
use crate::sys::event::{self, Event, Woke};

/// How long the thread stays without waiters.
const IDLE: Duration = Duration::from_secs(10);
/// How long the thread listens before it checks whether it is still needed.
const LISTEN: Duration = Duration::from_secs(1);
/// How long the thread tries to connect, whether the waiter that needs it gives up earlier or later. The next waiter
/// may need the connection, too. A waiter with a later deadline can poll meanwhile.
const CONNECT: Duration = Duration::from_secs(5);
/// The pause after a failed connection before the next attempt.
const REST: Duration = Duration::from_millis(250);
/// How often a waiter checks that an owner is alive, if the waiter can look it up; the death of an owner wakes no
/// waiter.
const LOOK: Duration = Duration::from_millis(50);

/// A connection that reports changes, of every name or at least of the names that may have waiters.
pub(in crate::lease) trait Listener: Send {
    /// Waits for news, at most `at_most`, and calls `ring` with each name that has changed. An error means that the
    /// connection cannot be used any more.
    fn listen(&mut self, at_most: Duration, ring: &mut dyn FnMut(&str)) -> Result<()>;
}

/// The subscriptions of a store's waiters.
pub(in crate::lease) struct Subscriptions {
    connect: Box<dyn Fn(Deadline) -> Result<Box<dyn Listener>> + Send + Sync>,
    state: Mutex<State>,
}

struct State {
    hung: HashMap<LeaseName, Vec<Arc<Event>>>,
    thread: Thread,
    last_waited: Instant,
}

/// The thread that listens.
enum Thread {
    /// No thread runs. The reason why the last one ended, unless it was the lack of waiters.
    None(Option<Failure>),
    /// The thread connects.
    Starting,
    Listening,
}

/// The reason why no thread listens.
struct Failure {
    text: String,
    /// The next attempt will fail as well.
    is_misuse: bool,
    rests_until: Instant,
}

impl Failure {
    fn new(error: &StoreError, rest: Duration) -> Self {
        let is_misuse = matches!(error, StoreError::Permanent(_));
        Self { text: error.to_string(), is_misuse, rests_until: Instant::now() + rest }
    }

    fn error(&self) -> StoreError {
        let error = if self.is_misuse { StoreError::permanent } else { StoreError::not_applied };
        error(self.text.clone())
    }
}

impl Subscriptions {
    /// Returns the subscriptions of a store. `connect` returns, by its deadline, a listener that is registered for all
    /// later changes.
    pub(in crate::lease) fn new(
        connect: impl Fn(Deadline) -> Result<Box<dyn Listener>> + Send + Sync + 'static,
    ) -> Arc<Self> {
        let state = State { hung: HashMap::new(), thread: Thread::None(None), last_waited: Instant::now() };
        Arc::new(Self { connect: Box::new(connect), state: Mutex::new(state) })
    }

    /// Subscribes to `name`. From the return of this call, every change of `name` notifies the subscription. The caller
    /// checks once more for a change and then calls [`Bell::wait`].
    pub(in crate::lease) fn subscribe(
        self: &Arc<Self>,
        name: &LeaseName,
        by: Deadline,
        stop: &CancelToken,
    ) -> Result<Bell> {
        let by = by.min(Deadline::after(CONNECT));
        loop {
            let event = Arc::new(Event::new().map_err(StoreError::not_applied)?);
            let bell = Bell { bells: self.clone(), name: name.clone(), event };
            let mut state = self.state.lock();
            state.last_waited = Instant::now();
            state.hung.entry(name.clone()).or_default().push(bell.event.clone());
            let is_listening = match &state.thread {
                Thread::Listening => true,
                Thread::Starting => false,
                Thread::None(Some(failure)) if Instant::now() < failure.rests_until => return Err(failure.error()),
                Thread::None(_) => {
                    self.start(&mut state)?;
                    false
                }
            };
            drop(state);
            if is_listening {
                return Ok(bell);
            }
            // The thread notifies this subscription when it listens, and when it cannot.
            match bell.sleep(by.moment(), stop)? {
                Woke::Ready => {}
                Woke::TimedOut => return Err(StoreError::not_applied("the server could not be listened to in time")),
                // The lease itself checks for the cancellation.
                Woke::Cancelled => return Ok(bell),
            }
            if let Thread::None(Some(failure)) = &self.state.lock().thread {
                return Err(failure.error());
            }
        }
    }

    fn start(self: &Arc<Self>, state: &mut State) -> Result<()> {
        let bells = Arc::downgrade(self);
        let run = move || {
            let panicked = StoreError::not_applied("the thread that listens to the server panicked");
            let mut ended = Ended { bells, failure: Some(Failure::new(&panicked, REST)) };
            ended.failure = ended.listen().err();
        };
        thread::Builder::new().name("lockkit-listen".to_owned()).spawn(run).map_err(StoreError::not_applied)?;
        state.thread = Thread::Starting;
        Ok(())
    }

    fn notify(&self, name: &str) {
        let state = self.state.lock();
        let found = state.hung.iter().find(|(hung, _)| hung.as_str() == name);
        let events = found.map(|(_, events)| events.clone());
        // A woken waiter needs the lock to remove its subscription, and must not wait for this loop.
        drop(state);
        events.into_iter().flatten().for_each(|event| event.set());
    }
}

impl State {
    fn ring_all(&self) {
        self.hung.values().flatten().for_each(|event| event.set());
    }
}

/// The drop guard of the thread: however the thread ends, no waiter continues to rely on it.
struct Ended {
    bells: Weak<Subscriptions>,
    failure: Option<Failure>,
}

impl Ended {
    fn listen(&self) -> Result<(), Failure> {
        let Some(bells) = self.bells.upgrade() else { return Ok(()) };
        let mut ear = (bells.connect)(Deadline::after(CONNECT)).map_err(|error| Failure::new(&error, REST))?;
        let mut state = bells.state.lock();
        state.thread = Thread::Listening;
        // The waiters check once more, because no connection listened for them until now.
        state.ring_all();
        drop(state);
        drop(bells);
        loop {
            let mut ring = |name: &str| {
                if let Some(bells) = self.bells.upgrade() {
                    bells.notify(name);
                }
            };
            ear.listen(LISTEN, &mut ring).map_err(|error| Failure::new(&error, Duration::ZERO))?;
            let Some(bells) = self.bells.upgrade() else { return Ok(()) };
            let mut state = bells.state.lock();
            if !state.hung.is_empty() {
                state.last_waited = Instant::now();
            } else if state.last_waited.elapsed() > IDLE {
                // Under the lock: the next subscriber starts another thread.
                state.thread = Thread::None(None);
                return Ok(());
            }
        }
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        if let Some(bells) = self.bells.upgrade() {
            let mut state = bells.state.lock();
            if let Some(failure) = self.failure.take() {
                state.thread = Thread::None(Some(failure));
                state.ring_all();
            }
        }
    }
}

/// A subscription to a name.
pub(in crate::lease) struct Bell {
    bells: Arc<Subscriptions>,
    name: LeaseName,
    event: Arc<Event>,
}

impl Bell {
    /// Sleeps until the subscription is notified, `by` has come, `stop` is cancelled, or `owner`, the holder that the
    /// caller waits for, is dead.
    pub(in crate::lease) fn wait(&self, owner: Option<&Owner>, by: Deadline, stop: &CancelToken) -> Result<()> {
        let can_be_seen = owner.is_some_and(|owner| owner.is_of_this_boot() && owner.liveness() != Liveness::Unknown);
        loop {
            let until = if can_be_seen { by.min(Deadline::after(LOOK)) } else { by };
            match self.sleep(until.moment(), stop)? {
                Woke::TimedOut if !by.is_past() && !is_dead(owner) => {}
                _ => return Ok(()),
            }
        }
    }

    fn sleep(&self, until: Instant, stop: &CancelToken) -> Result<Woke> {
        let stop = stop.event().map_err(StoreError::not_applied)?;
        event::wait(Some(self.event.as_fd()), Some(stop.as_fd()), Some(until)).map_err(StoreError::not_applied)
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        let mut state = self.bells.state.lock();
        if let Some(events) = state.hung.get_mut(&self.name) {
            events.retain(|event| !Arc::ptr_eq(event, &self.event));
            if events.is_empty() {
                state.hung.remove(&self.name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};

    use super::*;

    /// A server that sends what the test scripts.
    struct Script(Receiver<Option<&'static str>>);

    impl Listener for Script {
        fn listen(&mut self, at_most: Duration, ring: &mut dyn FnMut(&str)) -> Result<()> {
            match self.0.recv_timeout(at_most) {
                Ok(Some(name)) => ring(name),
                Ok(None) | Err(RecvTimeoutError::Disconnected) => return Err(StoreError::not_applied("cut")),
                Err(RecvTimeoutError::Timeout) => {}
            }
            Ok(())
        }
    }

    /// Returns subscriptions over connections from a channel.
    fn bells() -> (Arc<Subscriptions>, Sender<Script>) {
        let (send, scripts) = mpsc::channel();
        let scripts = Mutex::new(scripts);
        let connect = move |by: Deadline| -> Result<Box<dyn Listener>> {
            let script: Script = scripts.lock().recv_timeout(by.remaining()).map_err(StoreError::not_applied)?;
            Ok(Box::new(script))
        };
        (Subscriptions::new(connect), send)
    }

    fn name(text: &str) -> LeaseName {
        LeaseName::new(text).unwrap()
    }

    const LIVELY: Duration = Duration::from_secs(30);

    #[test]
    fn a_bell_rings_for_its_name_and_when_the_connection_breaks() {
        let (bells, connect) = bells();
        let (server, script) = mpsc::channel();
        connect.send(Script(script)).unwrap();
        let (by, stop) = (Deadline::after(LIVELY), CancelToken::new());
        let [one, other] = ["one", "other"].map(|text| bells.subscribe(&name(text), by, &stop).unwrap());
        server.send(Some("one")).unwrap();
        one.wait(None, by, &stop).unwrap();
        assert!(!by.is_past() && !event::is_readable(other.event.as_fd()));
        server.send(None).unwrap();
        other.wait(None, by, &stop).unwrap();
        assert!(!by.is_past());
        // The next subscriber starts a thread that listens again.
        let (server, script) = mpsc::channel();
        connect.send(Script(script)).unwrap();
        let again = bells.subscribe(&name("one"), by, &stop).unwrap();
        server.send(Some("one")).unwrap();
        again.wait(None, by, &stop).unwrap();
        drop((one, other, again));
        assert!(bells.state.lock().hung.is_empty());
    }

    #[test]
    fn subscribe_failure_keeps_error_kind_and_delays_retry() {
        for is_misuse in [false, true] {
            let tries = Arc::new(AtomicUsize::new(0));
            let counted = tries.clone();
            let bells = Subscriptions::new(move |_| {
                counted.fetch_add(1, Ordering::SeqCst);
                Err(if is_misuse { StoreError::permanent("never") } else { StoreError::not_applied("not now") })
            });
            let hang = || bells.subscribe(&name("one"), Deadline::after(LIVELY), &CancelToken::new()).err().unwrap();
            let began = Instant::now();
            assert_eq!(matches!(hang(), StoreError::Permanent(_)), is_misuse);
            // The connection is not retried at once, but eventually.
            while tries.load(Ordering::SeqCst) == 1 {
                assert_eq!(matches!(hang(), StoreError::Permanent(_)), is_misuse);
            }
            assert!(began.elapsed() >= REST && began.elapsed() < LIVELY);
            assert!(bells.state.lock().hung.is_empty());
        }
    }

    #[test]
    fn a_cancelled_wait_ends_at_once() {
        let (bells, connect) = bells();
        let (_server, script) = mpsc::channel();
        connect.send(Script(script)).unwrap();
        let (by, stop) = (Deadline::after(LIVELY), CancelToken::new());
        let bell = bells.subscribe(&name("one"), by, &stop).unwrap();
        thread::scope(|scope| {
            let waiter = scope.spawn(|| bell.wait(Some(&Owner::current()), by, &stop));
            stop.cancel();
            waiter.join().unwrap().unwrap();
        });
        assert!(!by.is_past());
    }
}
