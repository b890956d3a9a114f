//! How those who wait for a name are woken.
//!
//! Whoever waits hangs up a bell for the name, sees that it is still held, and sleeps. One thread of the store has a
//! connection of its own to the server, the [`Listener`], and rings the bells of the names that it hears of; when the
//! connection breaks it rings them all and ends, so nobody sleeps through a change, and the next waiter starts it anew.
//! It also ends when nobody has waited for [`IDLE`]. A waiter that gives up takes its bell away and leaves nothing.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::{Result, is_dead};
use crate::lease::store::{Deadline, LeaseName, StoreError};
use crate::owner::{Liveness, Owner};
use crate::sys::event::{self, Event, Woke};
use crate::wait::CancelToken;

/// How long the thread stays when nobody waits.
const IDLE: Duration = Duration::from_secs(10);
/// How long it listens until it looks whether it is still needed.
const LISTEN: Duration = Duration::from_secs(1);
/// How long the thread tries to connect, however soon the waiter gives up that needs it, and however late: the next one
/// may need it, too, and one that waits for long can look by itself meanwhile.
const CONNECT: Duration = Duration::from_secs(5);
/// After it could not connect, nobody has it try again for so long.
const REST: Duration = Duration::from_millis(250);
/// How often a waiter looks whether an owner lives that it can look up; nothing wakes it when that dies.
const LOOK: Duration = Duration::from_millis(50);

/// A connection that hears of changes, of every name or at least of those that may have been waited for.
pub(in crate::lease) trait Listener: Send {
    /// Waits for news, at most so long, and rings the names that have changed. An error says that the connection is of
    /// no use any more.
    fn listen(&mut self, at_most: Duration, ring: &mut dyn FnMut(&str)) -> Result<()>;
}

/// The bells of a store.
pub(in crate::lease) struct Subscriptions {
    connect: Box<dyn Fn(Deadline) -> Result<Box<dyn Listener>> + Send + Sync>,
    state: Mutex<State>,
}

struct State {
    hung: HashMap<LeaseName, Vec<Arc<Event>>>,
    thread: Thread,
    last_waited: Instant,
}

/// The one that listens.
enum Thread {
    /// There is none. Why the last one ended, if it was not for want of waiters.
    None(Option<Failure>),
    /// It connects.
    Starting,
    Listening,
}

/// Why there is nobody who listens.
struct Failure {
    text: String,
    /// The next one will fail as well.
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
    /// For a store that can be listened to over what `connect` returns by its deadline, which has then registered for
    /// all that happens from now on.
    pub(in crate::lease) fn new(
        connect: impl Fn(Deadline) -> Result<Box<dyn Listener>> + Send + Sync + 'static,
    ) -> Arc<Self> {
        let state = State { hung: HashMap::new(), thread: Thread::None(None), last_waited: Instant::now() };
        Arc::new(Self { connect: Box::new(connect), state: Mutex::new(state) })
    }

    /// Hangs up a bell: from when this returns it is rung for every change of `name`. Look once more whether there has
    /// been one, then [`wait`](Bell::wait).
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
            // It rings when it listens, and when it cannot.
            match bell.sleep(by.moment(), stop)? {
                Woke::Ready => {}
                Woke::TimedOut => return Err(StoreError::not_applied("the server could not be listened to in time")),
                // The lease finds out that it is to stop.
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
        // Whoever wakes takes down its bell, and is not to wait for this.
        drop(state);
        events.into_iter().flatten().for_each(|event| event.set());
    }
}

impl State {
    fn ring_all(&self) {
        self.hung.values().flatten().for_each(|event| event.set());
    }
}

/// What the thread leaves behind however it ends: no waiter that counts on it.
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
        // They look once more, for they have not been listened for until now.
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
                // Under the lock: whoever hangs up a bell from here on starts another.
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

/// A bell that hangs for a name.
pub(in crate::lease) struct Bell {
    bells: Arc<Subscriptions>,
    name: LeaseName,
    event: Arc<Event>,
}

impl Bell {
    /// Sleeps until it rings, `by` has come, `stop` is cancelled, or `owner`, whom the caller waits for, is dead.
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

    /// A server that says what it is told to.
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

    /// Subscriptions over connections that come out of a channel.
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
        // The next one listens anew.
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
            // It is not asked again at once, but some time.
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
