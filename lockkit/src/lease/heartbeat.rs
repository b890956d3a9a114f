//! Renews all leases of a process from one thread.
//!
//! # Guarantees
//! - A renewal runs at most [`SLACK`] after it is due (1/20 of the shortest heartbeat interval if that is less). A slow
//!   or hanging request adds to that.
//! - A store that hangs delays the renewals of other failure domains by at most a quarter of the shortest ttl, or 10 ms
//!   if that is more, and at most half a second.
//! - Each failure domain that hangs costs one thread.
//!
//! # Implementation
//! The queue is an ordered map from due time to lease, one map per clock. Most renewals are taken from one end and put
//! in at the other, so a renewal touches little memory however long the queue is. Renewals that are due within
//! [`SLACK`] run in one pass. A released lease stays in the queue until it is due, or until released leases are more
//! than half of the queue. A release never searches the queue.
//!
//! One request runs at a time. A second thread, the watchdog, checks the running request four times per second, or more
//! often if a served ttl is shorter than two seconds. If the request is stuck, the watchdog takes over the queue and
//! starts a new watchdog. The stuck thread exits when its request returns. Until then the scheduler sends no request to
//! the same failure domain (a store, or the file system of a lease file). The ends of its leases are still reported.
//!
//! After a slow request that returned in time, the failure domain gets no request for as long as the request took. So
//! other domains get at least half of the time. This back-off is no longer than a release waits for the store. A longer
//! request may mean that this process was stopped, and its leases cannot wait.
//!
//! # Fork
//! A forked child starts its own scheduler with its first lease, without the leases of its parent. The mutex is the
//! standard library's: parking_lot keeps a process-wide table that a fork can leave locked.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

use super::Loss;
use super::builder::OnLost;
use super::clock::Clock;
use super::shared::Held;
use crate::sys::process_local::ProcessLocal;

/// The maximum delay of a renewal after it is due, so that renewals run together. If a lease has a short heartbeat
/// interval, the maximum is one part in [`SLACKS_IN_A_HEARTBEAT`] of that interval. With a wake-up every 3 ms, ten
/// thousand renewals per second cost a seventh more.
const SLACK: Duration = Duration::from_millis(10);
const SLACKS_IN_A_HEARTBEAT: u32 = 20;

/// How long the thread pauses after a panic.
const PAUSE: Duration = Duration::from_millis(3);

/// A longer request makes its domain back off. A request to a file whose flock another process keeps is shorter.
const SLOW: Duration = Duration::from_millis(25);

/// How often the watchdog checks for a stuck request. If a lease has a short ttl, the interval is a part of that ttl.
const LOOK: Duration = Duration::from_millis(250);
const SOONEST_LOOK: Duration = Duration::from_millis(5);
const LOOKS_IN_A_TTL: u32 = 8;

/// The maximum number of domains whose shortest ttl is remembered.
const MOST_PLACES: usize = 64;

/// Up to this number, released leases in the queue are not worth a clean-up.
const FEW: usize = 64;

/// The heartbeat scheduler of this process.
#[derive(Default)]
pub(super) struct HeartbeatScheduler {
    queue: Mutex<Queue>,
    /// Wakes the active worker.
    changed: Condvar,
    /// Wakes an idle watchdog.
    served: Condvar,
    losses: Mutex<Losses>,
}

/// The losses that are not yet reported to `on_lost`.
#[derive(Default)]
struct Losses {
    /// A thread reports the losses, or the active worker will.
    told: bool,
    queue: VecDeque<(OnLost, Loss)>,
}

#[derive(Default)]
struct Queue {
    /// The number of the active worker, the thread that renews; 0 before the first.
    active_worker: u64,
    has_deputy: bool,
    /// A watchdog must be started at the next heartbeat.
    wants_deputy: bool,
    /// The active worker must report losses, because no other thread could be started.
    owes_telling: bool,
    /// The watchdog sleeps until a lease is served.
    deputy_idles: bool,
    /// The request of the active worker.
    request: Option<Request>,
    rests: Vec<DomainBackoff>,
    /// No served lease has a shorter ttl.
    shortest: Option<Duration>,
    /// The same for each domain, as far as it is remembered.
    shortest_at: Vec<(FailureDomain, Duration)>,
    /// No served lease has a shorter heartbeat interval.
    soonest: Option<Duration>,
    rings: Vec<ClockQueue>,
    /// How many heartbeats have been put in.
    pushed: u64,
    /// How many of the heartbeats are of released leases.
    ended: usize,
}

/// A heartbeat under way.
struct Request {
    held: Arc<Held>,
    began: Instant,
}

/// A failure domain: leases that hang together. After one stuck request, further requests of the domain are likely to
/// be stuck.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum FailureDomain {
    /// A store, by its address.
    Store(usize),
    /// The failure domain that several stores report as theirs.
    Common(u64),
}

/// A domain that gets no request now.
struct DomainBackoff {
    domain: FailureDomain,
    until: Until,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Until {
    Moment(Instant),
    /// Until this thread, which is not active any more, has returned. The thread is late after the moment `late`.
    Return {
        thread: u64,
        late: Instant,
    },
}

impl Until {
    fn is_return_of(self, me: u64) -> bool {
        matches!(self, Self::Return { thread, .. } if thread == me)
    }
}

/// The heartbeats by one clock, or by several clocks that show the same time.
struct ClockQueue {
    clock: Arc<dyn Clock>,
    clock_id: Option<u128>,
    beats: BTreeMap<Due, Arc<Held>>,
}

/// The due time of a heartbeat, and a number that distinguishes heartbeats with the same due time.
type Due = (Duration, u64);

struct Beat {
    due: Duration,
    held: Arc<Held>,
}

/// What the active worker does next.
enum Work {
    Beat(Beat),
    /// Nothing for this long; `None` means until something changes.
    Sleep(Option<Duration>),
}

/// The waker of the scheduler for a clock that jumps.
struct Bell(&'static HeartbeatScheduler);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        // Takes the lock, so that the wake-up comes before the scheduler reads the clock, or after it has gone to
        // sleep.
        let _queue = self.0.lock();
        self.0.changed.notify_one();
    }
}

impl HeartbeatScheduler {
    #[cfg(test)]
    pub(super) fn rings(&self) -> usize {
        self.lock().rings.len()
    }

    /// Returns the scheduler of this process, and starts it if it does not run.
    pub(super) fn start() -> io::Result<&'static Self> {
        static SCHEDULER: ProcessLocal<HeartbeatScheduler> = ProcessLocal::new();
        let heart = SCHEDULER.get_or_make(Self::default);
        let mut queue = heart.lock();
        if queue.active_worker == 0 {
            Self::spawn(move || heart.beat_as(1))?;
            queue.active_worker = 1;
        }
        queue.wants_deputy = !queue.has_deputy;
        Ok(heart)
    }

    fn spawn(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        thread::Builder::new().name("lockkit-lease".into()).spawn(work).map(drop)
    }

    /// Starts a watchdog. This happens only at a heartbeat, so that the first lease does not delay a program that is
    /// about to start another program. If no thread can be started, the scheduler runs without a watchdog until the
    /// heartbeat after the next acquisition.
    fn appoint_deputy(&'static self, queue: &mut Queue) {
        queue.has_deputy = Self::spawn(move || self.beat_as(self.stand_by())).is_ok();
    }

    /// Renews `held` from `due` on until it ends.
    pub(super) fn serve(&self, held: Arc<Held>, due: Duration) {
        let domain = held.domain();
        let mut queue = self.lock();
        match queue.shortest_at.iter_mut().find(|(at, _)| *at == domain) {
            Some((_, shortest)) => *shortest = held.ttl().min(*shortest),
            None => {
                // Each store may be a domain of its own, and a program may create any number of stores.
                if queue.shortest_at.len() == MOST_PLACES {
                    queue.shortest_at.clear();
                }
                queue.shortest_at.push((domain, held.ttl()));
            }
        }
        queue.shortest = Some(queue.shortest.map_or(held.ttl(), |shortest| shortest.min(held.ttl())));
        let slack_before = coalescing_window(queue.soonest);
        queue.soonest = Some(queue.soonest.map_or(held.heartbeat(), |soonest| soonest.min(held.heartbeat())));
        let is_shorter = coalescing_window(queue.soonest) < slack_before;
        let is_first = queue.push(Beat { due, held });
        let deputy_idles = mem::take(&mut queue.deputy_idles);
        drop(queue);
        if is_first || is_shorter {
            self.changed.notify_one();
        }
        if deputy_idles {
            self.served.notify_one();
        }
    }

    /// Reports a loss, after earlier losses, on a thread that ends when all losses are reported.
    pub(super) fn tell(&'static self, call: OnLost, loss: Loss) {
        let mut losses = self.losses.lock().unwrap_or_else(PoisonError::into_inner);
        losses.queue.push_back((call, loss));
        if mem::replace(&mut losses.told, true) {
            return;
        }
        drop(losses);
        if thread::Builder::new().name("lockkit-lost".into()).spawn(|| self.tell_all()).is_err() {
            self.lock().owes_telling = true;
            self.changed.notify_one();
        }
    }

    fn tell_all(&self) {
        loop {
            let mut losses = self.losses.lock().unwrap_or_else(PoisonError::into_inner);
            let Some((call, loss)) = losses.queue.pop_front() else {
                losses.told = false;
                return;
            };
            drop(losses);
            // The panic hook has reported the panic, and no other lease depends on it. The callback's own values are
            // dropped in here, too.
            let _ = catch_unwind(AssertUnwindSafe(move || call(&loss)));
        }
    }

    /// Returns a ttl such that no served lease of the domain has a shorter ttl, as far as it is remembered.
    pub(super) fn shortest_at(&self, domain: FailureDomain) -> Option<Duration> {
        self.lock().shortest_at.iter().find(|(at, _)| *at == domain).map(|(_, shortest)| *shortest)
    }

    /// Returns whether a request to the domain hangs that has taken longer than allowed.
    pub(super) fn is_stuck(&self, domain: FailureDomain) -> bool {
        let now = Instant::now();
        let is_stuck = |rest: &DomainBackoff| matches!(rest.until, Until::Return { late, .. } if late <= now);
        self.lock().rests.iter().any(|rest| rest.domain == domain && is_stuck(rest))
    }

    /// Records the release of a served lease.
    pub(super) fn released(&self) {
        let mut over = Vec::new();
        let mut queue = self.lock();
        queue.ended += 1;
        if queue.ended > FEW && queue.ended > queue.rings.iter().map(|ring| ring.beats.len()).sum::<usize>() / 2 {
            for ring in &mut queue.rings {
                let beats = mem::take(&mut ring.beats).into_iter();
                let (ended, going): (BTreeMap<_, _>, _) = beats.partition(|(_, held)| held.is_over());
                ring.beats = going;
                over.push(ended);
            }
            queue.ended = 0;
        }
        // The ended leases are dropped without the lock: a store may be dropped with them, or a callback that holds a
        // lease itself.
        drop(queue);
    }

    /// Runs the thread with the number `me` from when it is active.
    fn beat_as(&'static self, me: u64) {
        // A panic in a program's own clock or store, for example at its drop, must not end the other leases.
        while catch_unwind(AssertUnwindSafe(|| self.run(me))).is_err() {
            thread::sleep(PAUSE);
        }
    }

    /// Runs a watchdog until the active worker is stuck. The watchdog then takes over the queue. Returns its number as
    /// the active worker.
    fn stand_by(&'static self) -> u64 {
        let mut queue = self.lock();
        loop {
            if queue.request.is_none() && queue.rings.iter().all(|ring| ring.beats.is_empty()) {
                queue.deputy_idles = true;
                (queue.shortest, queue.soonest) = (None, None);
                queue.shortest_at.clear();
                queue = self.served.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let look = look_every(queue.shortest);
            if let Some(request) = queue.request.take_if(|request| request.began.elapsed() >= look) {
                let stuck = queue.active_worker;
                queue.active_worker += 1;
                let late = request.began + request.held.longest_release();
                let until = Until::Return { thread: stuck, late };
                queue.rests.push(DomainBackoff { domain: request.held.domain(), until });
                // The end of that lease must be reported, too.
                queue.push(Beat { due: Duration::ZERO, held: request.held });
                self.appoint_deputy(&mut queue);
                return queue.active_worker;
            }
            queue = self.served.wait_timeout(queue, look).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn run(&'static self, me: u64) {
        let bell = Waker::from(Arc::new(Bell(self)));
        let mut queue = self.lock();
        // The back-off of a heartbeat that panicked.
        queue.rests.retain(|rest| !rest.until.is_return_of(me));
        if queue.active_worker == me {
            let request = queue.request.take();
            drop(queue);
            drop(request);
            queue = self.lock();
        }
        while queue.active_worker == me {
            if mem::take(&mut queue.owes_telling) {
                drop(queue);
                self.tell_all();
                queue = self.lock();
                continue;
            }
            match queue.turn(&bell) {
                Work::Beat(mut beat) => {
                    if mem::take(&mut queue.wants_deputy) && !queue.has_deputy {
                        self.appoint_deputy(&mut queue);
                    }
                    let domain = beat.held.domain();
                    let began = Instant::now();
                    queue.request = Some(Request { held: beat.held.clone(), began });
                    let rest = queue.rest_of(domain, began, beat.held.heartbeat());
                    drop(queue);
                    let next = match rest {
                        Some(rest) => beat.held.beat_at_rest(rest),
                        None => beat.held.beat(),
                    };
                    let ended = Instant::now();
                    queue = self.lock();
                    queue.rests.retain(|rest| !rest.until.is_return_of(me));
                    if let Some(rest) = rest_after(ended - began, beat.held.longest_release()) {
                        queue.rests.push(DomainBackoff { domain, until: Until::Moment(ended + rest) });
                    }
                    if queue.active_worker != me {
                        // The watchdog has put in a heartbeat for that lease. This one may hold the last reference to a
                        // store, so it is dropped without the lock.
                        drop(queue);
                        drop(beat);
                        return;
                    }
                    // Not the last reference, because `beat` has one, too.
                    queue.request = None;
                    if let Some(due) = next {
                        beat.due = due;
                        queue.push(beat);
                        continue;
                    }
                    // The heartbeat of an ended lease is dropped without the lock.
                    drop(queue);
                    drop(beat);
                    queue = self.lock();
                    queue.ended = queue.ended.saturating_sub(1);
                }
                Work::Sleep(None) => {
                    queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                }
                Work::Sleep(Some(nap)) => {
                    let nap = nap + coalescing_window(queue.soonest);
                    queue = self.changed.wait_timeout(queue, nap).unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // A panic leaves no partial change in here.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    /// Puts in a heartbeat. Returns whether it is now the first of its queue.
    fn push(&mut self, beat: Beat) -> bool {
        let (clock, clock_id) = (beat.held.clock(), beat.held.clock_id());
        let is_of = |ring: &ClockQueue| match clock_id {
            Some(_) => ring.clock_id == clock_id,
            None => Arc::ptr_eq(&ring.clock, clock),
        };
        let ring = match self.rings.iter().position(is_of) {
            Some(at) => &mut self.rings[at],
            None => {
                self.rings.push(ClockQueue { clock: clock.clone(), clock_id, beats: BTreeMap::new() });
                let last = self.rings.len() - 1;
                &mut self.rings[last]
            }
        };
        let is_first = ring.beats.first_key_value().is_none_or(|(first, _)| beat.due < first.0);
        self.pushed += 1;
        ring.beats.insert((beat.due, self.pushed), beat.held);
        is_first
    }

    /// Returns how long the domain must get no request; a heartbeat interval if that time is unknown.
    fn rest_of(&mut self, domain: FailureDomain, now: Instant, heartbeat: Duration) -> Option<Duration> {
        if self.rests.is_empty() {
            return None;
        }
        self.rests.retain(|rest| !matches!(rest.until, Until::Moment(moment) if moment <= now));
        let rests = self.rests.iter().filter(|rest| rest.domain == domain);
        rests.map(|rest| if let Until::Moment(moment) = rest.until { moment - now } else { heartbeat }).max()
    }

    fn turn(&mut self, bell: &Waker) -> Work {
        let mut nap: Option<Duration> = None;
        let mut chosen = None;
        for (at, ring) in self.rings.iter().enumerate() {
            let Some(((due, _), _)) = ring.beats.first_key_value() else { continue };
            ring.clock.on_jump(bell);
            let left = due.saturating_sub(ring.clock.now());
            if nap.is_none_or(|nap| left < nap) {
                nap = Some(left);
                chosen = Some(at);
            }
        }
        match (nap, chosen) {
            (Some(Duration::ZERO), Some(at)) => {
                let first = self.rings[at].beats.pop_first();
                first.map_or(Work::Sleep(None), |((due, _), held)| Work::Beat(Beat { due, held }))
            }
            _ => {
                // Going to sleep is rare enough for the removal of unused clocks.
                self.rings.retain(|ring| !ring.beats.is_empty());
                Work::Sleep(nap)
            }
        }
    }
}

/// Returns how long a domain backs off after a request that took `took`, at most `longest`.
fn rest_after(took: Duration, longest: Duration) -> Option<Duration> {
    (took > SLOW).then(|| took.min(longest))
}

/// Returns the maximum delay of a renewal after it is due, if no heartbeat interval is shorter than `soonest`.
fn coalescing_window(soonest: Option<Duration>) -> Duration {
    soonest.map_or(SLACK, |soonest| (soonest / SLACKS_IN_A_HEARTBEAT).min(SLACK))
}

/// Returns how often the watchdog checks, if no ttl is shorter than `shortest`.
fn look_every(shortest: Option<Duration>) -> Duration {
    shortest.map_or(LOOK, |shortest| (shortest / LOOKS_IN_A_TTL).clamp(SOONEST_LOOK, LOOK))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_after_slow_request_is_limited() {
        const MS: Duration = Duration::from_millis(1);
        assert_eq!(rest_after(MS, MS * 250), None);
        assert_eq!(rest_after(MS * 40, MS * 250), Some(MS * 40));
        // A lease of 3 s that was renewed just before a stop of 1.6 s has 1.4 s left.
        assert_eq!(rest_after(MS * 1600, MS * 250), Some(MS * 250));
    }

    #[test]
    fn a_beat_is_late_by_a_small_part_of_the_shortest_heartbeat() {
        const MS: Duration = Duration::from_millis(1);
        assert_eq!(coalescing_window(None), SLACK);
        assert_eq!(coalescing_window(Some(MS * 250)), SLACK);
        assert_eq!(coalescing_window(Some(MS * 20)), MS);
    }

    #[test]
    fn watchdog_detects_stuck_request_within_quarter_of_ttl() {
        const MS: Duration = Duration::from_millis(1);
        for ttl in [MS * 40, MS * 100, MS * 1000, MS * 60_000] {
            // The request began before the first check at the latest. By the second check it has lasted for a whole
            // interval.
            assert!(look_every(Some(ttl)) * 2 <= ttl / 4);
        }
        assert_eq!(look_every(Some(MS * 60_000)), LOOK);
    }
}
