//! Wakes the waiters of lease names.
//!
//! A waiter subscribes to the name, checks that the name is still held, and sleeps. One thread of
//! the store has its own connection to the server, the [`Listener`], and notifies the subscriptions
//! of the names that the server reports. When the connection breaks, the thread notifies all
//! subscriptions and ends, so that no waiter sleeps through a change. The next waiter starts the
//! thread again. The thread also ends when no waiter has been subscribed for [`IDLE_TIMEOUT`]. A
//! waiter that gives up removes its subscription and leaves nothing.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::outcome::{Result, is_dead};
use crate::base::cancel::CancelToken;
use crate::base::error::StoreError;
use crate::base::owner::{Liveness, Owner};
use crate::lease::store::lease_store::{Deadline, LeaseName};
use crate::sys::event::{self, Event, Woke};

/// How long the thread stays without waiters.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the thread listens before it checks whether it is still needed.
const LISTEN_INTERVAL: Duration = Duration::from_secs(1);
/// How long the thread tries to connect, whether the waiter that needs it gives up earlier or
/// later. The next waiter may need the connection, too. A waiter with a later deadline can poll
/// meanwhile.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause after a failed connection before the next attempt to connect.
const RETRY_DELAY: Duration = Duration::from_millis(250);
/// How often a waiter checks that an owner is alive, if the waiter can look it up; the death of an
/// owner wakes no waiter.
const OWNER_CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// A connection that reports changes, of every name or at least of the names that may have waiters.
pub(in crate::lease::store) trait Listener: Send {
    /// Waits for changes, at most `at_most`, and calls `notify` with each name that has changed. An
    /// error means that the connection cannot be used any more.
    fn listen(&mut self, at_most: Duration, notify: &mut dyn FnMut(&str)) -> Result<()>;
}

/// The subscriptions of a store's waiters.
pub(in crate::lease::store) struct Subscriptions {
    connect: Box<dyn Fn(Deadline) -> Result<Box<dyn Listener>> + Send + Sync>,
    state: Mutex<State>,
}

struct State {
    subscribed: HashMap<LeaseName, Vec<Arc<Event>>>,
    thread: ThreadState,
    last_waited: Instant,
}

/// The thread that listens.
enum ThreadState {
    /// No thread runs. Contains the reason why the last thread ended, unless it ended because there
    /// were no waiters.
    Stopped(Option<Failure>),
    /// The thread connects.
    Connecting,
    Listening,
}

/// The reason why no thread listens.
struct Failure {
    text: String,
    /// The next attempt to connect will fail as well.
    is_permanent: bool,
    retry_after: Instant,
}

impl Failure {
    fn new(error: &StoreError, retry_delay: Duration) -> Self {
        let is_permanent = matches!(error, StoreError::Permanent(_));
        Self {
            text: error.to_string(),
            is_permanent,
            retry_after: Instant::now() + retry_delay,
        }
    }

    fn error(&self) -> StoreError {
        let error = if self.is_permanent {
            StoreError::permanent
        } else {
            StoreError::not_applied
        };
        error(self.text.clone())
    }
}

impl Subscriptions {
    /// Returns the subscriptions of a store. `connect` returns, by its deadline, a listener that is
    /// registered for all later changes.
    pub(in crate::lease::store) fn new(
        connect: impl Fn(Deadline) -> Result<Box<dyn Listener>> + Send + Sync + 'static,
    ) -> Arc<Self> {
        let state = State {
            subscribed: HashMap::new(),
            thread: ThreadState::Stopped(None),
            last_waited: Instant::now(),
        };
        Arc::new(Self {
            connect: Box::new(connect),
            state: Mutex::new(state),
        })
    }

    /// Subscribes to `name`. From the return of this call, every change of `name` notifies the
    /// subscription. The caller checks once more for a change and then calls
    /// [`Subscription::wait`].
    pub(in crate::lease::store) fn subscribe(
        self: &Arc<Self>,
        name: &LeaseName,
        by: Deadline,
        stop: &CancelToken,
    ) -> Result<Subscription> {
        let by = by.min(Deadline::after(CONNECT_TIMEOUT));
        loop {
            let event = Arc::new(Event::new().map_err(StoreError::not_applied)?);
            let subscription = Subscription {
                subscriptions: self.clone(),
                name: name.clone(),
                event,
            };
            let mut state = self.state.lock();
            state.last_waited = Instant::now();
            state
                .subscribed
                .entry(name.clone())
                .or_default()
                .push(subscription.event.clone());
            let is_listening = match &state.thread {
                ThreadState::Listening => true,
                ThreadState::Connecting => false,
                ThreadState::Stopped(Some(failure)) if Instant::now() < failure.retry_after => {
                    return Err(failure.error());
                }
                ThreadState::Stopped(_) => {
                    self.start(&mut state)?;
                    false
                }
            };
            drop(state);
            if is_listening {
                return Ok(subscription);
            }
            // The thread notifies this subscription when it listens, and when it cannot.
            match subscription.sleep(by.moment(), stop)? {
                Woke::Ready => {}
                Woke::TimedOut => {
                    return Err(StoreError::not_applied(
                        "cannot listen to the server: no connection came about in time",
                    ));
                }
                // The lease itself checks for the cancellation.
                Woke::Cancelled => return Ok(subscription),
            }
            if let ThreadState::Stopped(Some(failure)) = &self.state.lock().thread {
                return Err(failure.error());
            }
        }
    }

    fn start(self: &Arc<Self>, state: &mut State) -> Result<()> {
        let subscriptions = Arc::downgrade(self);
        let run = move || {
            let panicked = StoreError::not_applied(
                "cannot listen to the server: the thread that listens panicked",
            );
            let mut thread = ListenerThread {
                subscriptions,
                failure: Some(Failure::new(&panicked, RETRY_DELAY)),
            };
            thread.failure = thread.listen().err();
        };
        thread::Builder::new()
            .name("lockkit-listen".to_owned())
            .spawn(run)
            .map_err(StoreError::not_applied)?;
        state.thread = ThreadState::Connecting;
        Ok(())
    }

    fn notify(&self, name: &str) {
        let state = self.state.lock();
        let found = state
            .subscribed
            .iter()
            .find(|(subscribed, _)| subscribed.as_str() == name);
        let events = found.map(|(_, events)| events.clone());
        // A woken waiter needs the lock to remove its subscription, and must not wait for this
        // loop.
        drop(state);
        events.into_iter().flatten().for_each(|event| event.set());
    }
}

impl State {
    fn notify_all(&self) {
        self.subscribed
            .values()
            .flatten()
            .for_each(|event| event.set());
    }
}

/// The drop guard of the thread: however the thread ends, no waiter continues to rely on it.
struct ListenerThread {
    subscriptions: Weak<Subscriptions>,
    failure: Option<Failure>,
}

impl ListenerThread {
    fn listen(&self) -> Result<(), Failure> {
        let Some(subscriptions) = self.subscriptions.upgrade() else {
            return Ok(());
        };
        let mut listener = (subscriptions.connect)(Deadline::after(CONNECT_TIMEOUT))
            .map_err(|error| Failure::new(&error, RETRY_DELAY))?;
        let mut state = subscriptions.state.lock();
        state.thread = ThreadState::Listening;
        // The waiters check once more, because no connection listened for them until now.
        state.notify_all();
        drop(state);
        drop(subscriptions);
        loop {
            let mut notify = |name: &str| {
                if let Some(subscriptions) = self.subscriptions.upgrade() {
                    subscriptions.notify(name);
                }
            };
            listener
                .listen(LISTEN_INTERVAL, &mut notify)
                .map_err(|error| Failure::new(&error, Duration::ZERO))?;
            let Some(subscriptions) = self.subscriptions.upgrade() else {
                return Ok(());
            };
            let mut state = subscriptions.state.lock();
            if !state.subscribed.is_empty() {
                state.last_waited = Instant::now();
            } else if state.last_waited.elapsed() > IDLE_TIMEOUT {
                // Under the lock: the next subscriber starts another thread.
                state.thread = ThreadState::Stopped(None);
                return Ok(());
            }
        }
    }
}

impl Drop for ListenerThread {
    fn drop(&mut self) {
        if let Some(subscriptions) = self.subscriptions.upgrade() {
            let mut state = subscriptions.state.lock();
            if let Some(failure) = self.failure.take() {
                state.thread = ThreadState::Stopped(Some(failure));
                state.notify_all();
            }
        }
    }
}

/// A subscription to a name.
pub(in crate::lease::store) struct Subscription {
    subscriptions: Arc<Subscriptions>,
    name: LeaseName,
    event: Arc<Event>,
}

impl Subscription {
    /// Sleeps until the subscription is notified, `by` has come, `stop` is cancelled, or `owner`,
    /// the holder that the caller waits for, is dead.
    pub(in crate::lease::store) fn wait(
        &self,
        owner: Option<&Owner>,
        by: Deadline,
        stop: &CancelToken,
    ) -> Result<()> {
        let is_observable = owner
            .is_some_and(|owner| owner.is_of_this_boot() && owner.liveness() != Liveness::Unknown);
        loop {
            let until = if is_observable {
                by.min(Deadline::after(OWNER_CHECK_INTERVAL))
            } else {
                by
            };
            match self.sleep(until.moment(), stop)? {
                Woke::TimedOut if !by.is_past() && !is_dead(owner) => {}
                _ => return Ok(()),
            }
        }
    }

    fn sleep(&self, until: Instant, stop: &CancelToken) -> Result<Woke> {
        let stop = stop.event().map_err(StoreError::not_applied)?;
        event::wait(Some(self.event.as_fd()), Some(stop.as_fd()), Some(until))
            .map_err(StoreError::not_applied)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut state = self.subscriptions.state.lock();
        if let Some(events) = state.subscribed.get_mut(&self.name) {
            events.retain(|event| !Arc::ptr_eq(event, &self.event));
            if events.is_empty() {
                state.subscribed.remove(&self.name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};

    use super::*;

    /// A server that sends the changes of a test.
    struct Script(Receiver<Option<&'static str>>);

    impl Listener for Script {
        fn listen(&mut self, at_most: Duration, notify: &mut dyn FnMut(&str)) -> Result<()> {
            match self.0.recv_timeout(at_most) {
                Ok(Some(name)) => notify(name),
                Ok(None) | Err(RecvTimeoutError::Disconnected) => {
                    return Err(StoreError::not_applied("cut"));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            Ok(())
        }
    }

    /// Returns subscriptions over connections from a channel.
    fn subscriptions() -> (Arc<Subscriptions>, Sender<Script>) {
        let (send, scripts) = mpsc::channel();
        let scripts = Mutex::new(scripts);
        let connect = move |by: Deadline| -> Result<Box<dyn Listener>> {
            let script: Script = scripts
                .lock()
                .recv_timeout(by.remaining())
                .map_err(StoreError::not_applied)?;
            Ok(Box::new(script))
        };
        (Subscriptions::new(connect), send)
    }

    fn name(text: &str) -> LeaseName {
        LeaseName::new(text).unwrap()
    }

    const TEST_TIMEOUT: Duration = Duration::from_secs(30);

    #[test]
    fn change_or_disconnect_notifies_subscription() {
        let (subscriptions, connect) = subscriptions();
        let (server, script) = mpsc::channel();
        connect.send(Script(script)).unwrap();
        let (by, stop) = (Deadline::after(TEST_TIMEOUT), CancelToken::new());
        let [one, other] =
            ["one", "other"].map(|text| subscriptions.subscribe(&name(text), by, &stop).unwrap());
        server.send(Some("one")).unwrap();
        one.wait(None, by, &stop).unwrap();
        assert!(!by.is_past() && !event::is_readable(other.event.as_fd()));
        server.send(None).unwrap();
        other.wait(None, by, &stop).unwrap();
        assert!(!by.is_past());
        // The next subscriber starts a thread that listens again.
        let (server, script) = mpsc::channel();
        connect.send(Script(script)).unwrap();
        let again = subscriptions.subscribe(&name("one"), by, &stop).unwrap();
        server.send(Some("one")).unwrap();
        again.wait(None, by, &stop).unwrap();
        drop((one, other, again));
        assert!(subscriptions.state.lock().subscribed.is_empty());
    }

    #[test]
    fn subscribe_failure_keeps_error_kind_and_delays_retry() {
        for is_permanent in [false, true] {
            let attempts = Arc::new(AtomicUsize::new(0));
            let counter = attempts.clone();
            let subscriptions = Subscriptions::new(move |_| {
                counter.fetch_add(1, Ordering::SeqCst);
                Err(if is_permanent {
                    StoreError::permanent("never")
                } else {
                    StoreError::not_applied("not now")
                })
            });
            let subscribe = || {
                subscriptions
                    .subscribe(
                        &name("one"),
                        Deadline::after(TEST_TIMEOUT),
                        &CancelToken::new(),
                    )
                    .err()
                    .unwrap()
            };
            let start = Instant::now();
            assert_eq!(
                matches!(subscribe(), StoreError::Permanent(_)),
                is_permanent
            );
            // The connection is not retried at once, but eventually.
            while attempts.load(Ordering::SeqCst) == 1 {
                assert_eq!(
                    matches!(subscribe(), StoreError::Permanent(_)),
                    is_permanent
                );
            }
            assert!(start.elapsed() >= RETRY_DELAY && start.elapsed() < TEST_TIMEOUT);
            assert!(subscriptions.state.lock().subscribed.is_empty());
        }
    }

    #[test]
    fn cancelled_subscription_wait_returns_at_once() {
        let (subscriptions, connect) = subscriptions();
        let (_server, script) = mpsc::channel();
        connect.send(Script(script)).unwrap();
        let (by, stop) = (Deadline::after(TEST_TIMEOUT), CancelToken::new());
        let subscription = subscriptions.subscribe(&name("one"), by, &stop).unwrap();
        thread::scope(|scope| {
            let waiter = scope.spawn(|| subscription.wait(Some(&Owner::current()), by, &stop));
            stop.cancel();
            waiter.join().unwrap().unwrap();
        });
        assert!(!by.is_past());
    }
}
