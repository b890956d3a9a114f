//! The thread that renews all leases of a process.
//!
//! It sleeps until the first beat is due and then a moment longer ([`SLACK`]), so that beats which come close are done
//! in one go. Beats stand in a tree by the time they are due, one tree for each clock: most are taken from its one end and
//! put in at the other, so a beat touches little memory however many there are. That of a lease which has ended stays
//! there until it comes up, or until such ones are more than half of all; a release never searches.
//!
//! One request at a time is under way. A second thread, the watchdog, sleeps beside it and looks four times a second, or
//! more often where a served ttl is shorter than two seconds, whether the request still is. If so it beats from then
//! on, and starts another watchdog; the thread whose request it was ends when that returns. Until then nothing is asked
//! of that request's *domain* (a store, or the file system of a file), though the ends of its leases are told. So
//! whatever hangs, and for how long, delays the beats of other places by a quarter of the shortest ttl, at most by half
//! a second, and costs one thread for each domain that hangs.
//!
//! A domain that took long but returned in time rests for as long as it took, whatever is due there, so others get half
//! of the time at least. It rests no longer than whoever releases waits: what took longer than that may be a process that
//! was stopped, and its leases have no time to lose.
//!
//! A forked child has a heart of its own, without the beats of its parent's leases, once it takes a lease. The mutex is
//! the standard library's, because parking_lot's waits go through a table of the whole process, which a fork could
//! leave locked.

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
use crate::sys::per_process::PerProcess;

/// How much later than due a beat may be done, to be done together with those that come next; where a lease beats often,
/// this part of its heartbeat. Ten thousand beats a second cost a seventh more where the thread wakes up every 3 ms.
const SLACK: Duration = Duration::from_millis(10);
const SLACKS_IN_A_HEARTBEAT: u32 = 20;

/// How long the thread pauses after a panic.
const PAUSE: Duration = Duration::from_millis(3);

/// A request that takes longer makes its domain rest. A file's that meets a kept flock is shorter.
const SLOW: Duration = Duration::from_millis(25);

/// How often the watchdog looks whether a request is stuck, unless a lease has so short a ttl that it must do so within a
/// part of that.
const LOOK: Duration = Duration::from_millis(250);
const SOONEST_LOOK: Duration = Duration::from_millis(5);
const LOOKS_IN_A_TTL: u32 = 8;

/// The shortest ttls of so many places are remembered.
const MOST_PLACES: usize = 64;

/// As many beats of ended leases are not worth a clearance.
const FEW: usize = 64;

/// The heartbeat of this process.
#[derive(Default)]
pub(super) struct HeartbeatScheduler {
    queue: Mutex<Queue>,
    /// Wakes the thread that beats.
    changed: Condvar,
    /// Wakes a watchdog that idles.
    served: Condvar,
    losses: Mutex<Losses>,
}

/// The losses that `on_lost` is still to be told of.
#[derive(Default)]
struct Losses {
    /// A thread is at it, or the heartbeat will be.
    told: bool,
    queue: VecDeque<(OnLost, Loss)>,
}

#[derive(Default)]
struct Queue {
    /// Which thread beats, as they are numbered; 0 before there is one.
    active_worker: u64,
    has_deputy: bool,
    /// One is to be appointed at the next beat.
    wants_deputy: bool,
    /// Losses are to be told by the thread that beats, for want of another.
    owes_telling: bool,
    /// The watchdog sleeps until a lease is served.
    deputy_idles: bool,
    /// What the thread that beats is busy with.
    request: Option<Request>,
    rests: Vec<DomainBackoff>,
    /// No lease that is served has a shorter ttl.
    shortest: Option<Duration>,
    /// The same for each domain, as far as is remembered.
    shortest_at: Vec<(FailureDomain, Duration)>,
    /// None beats more often.
    soonest: Option<Duration>,
    rings: Vec<ClockQueue>,
    /// How many beats have been put in.
    pushed: u64,
    /// How many of the beats are of leases that have been released.
    ended: usize,
}

/// A beat under way.
struct Request {
    held: Arc<Held>,
    began: Instant,
}

/// What hangs as one: leases whose requests one stuck request is likely to be followed by more stuck ones of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum FailureDomain {
    /// A store, by its address.
    Store(usize),
    /// What several stores have in common, as they say.
    Common(u64),
}

/// A domain of which nothing is asked now.
struct DomainBackoff {
    domain: FailureDomain,
    until: Until,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Until {
    Moment(Instant),
    /// This thread, which beats no more, has returned. It should have by the moment at which it is late.
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

/// The beats by one clock, or by several that show the same.
struct ClockQueue {
    clock: Arc<dyn Clock>,
    clock_id: Option<u128>,
    beats: BTreeMap<Due, Arc<Held>>,
}

/// When a beat is due, and which one of those that are due then.
type Due = (Duration, u64);

struct Beat {
    due: Duration,
    held: Arc<Held>,
}

/// What is to be done now.
enum Work {
    Beat(Beat),
    /// Nothing for so long; `None` is until something changes.
    Sleep(Option<Duration>),
}

/// Wakes the heart when a clock jumps.
struct Bell(&'static HeartbeatScheduler);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        // With the lock, so that it falls before the heart reads the clock, or after it has gone to sleep.
        let _queue = self.0.lock();
        self.0.changed.notify_one();
    }
}

impl HeartbeatScheduler {
    #[cfg(test)]
    pub(super) fn rings(&self) -> usize {
        self.lock().rings.len()
    }

    /// That of this process, which beats from now on if it has not before.
    pub(super) fn start() -> io::Result<&'static Self> {
        static SCHEDULER: PerProcess<HeartbeatScheduler> = PerProcess::new();
        let heart = SCHEDULER.get(Self::default);
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

    /// Only at a beat, for a program that is about to start another one has better things to do at its first lease. Where
    /// no thread can be had, the heart does without until the beat after the next acquisition.
    fn appoint_deputy(&'static self, queue: &mut Queue) {
        queue.has_deputy = Self::spawn(move || self.beat_as(self.stand_by())).is_ok();
    }

    /// Beats for `held` from `due` on until it ends.
    pub(super) fn serve(&self, held: Arc<Held>, due: Duration) {
        let domain = held.domain();
        let mut queue = self.lock();
        match queue.shortest_at.iter_mut().find(|(at, _)| *at == domain) {
            Some((_, shortest)) => *shortest = held.ttl().min(*shortest),
            None => {
                // Each store may be a domain of its own, and a program may go on making stores.
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

    /// Has a loss told, after those before it and on a thread that ends when all are.
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
            // A panic has been reported by its hook, and concerns nobody else. What the callback owns goes in here,
            // too.
            let _ = catch_unwind(AssertUnwindSafe(move || call(&loss)));
        }
    }

    /// No lease there that is served has a shorter ttl, as far as is remembered.
    pub(super) fn shortest_at(&self, domain: FailureDomain) -> Option<Duration> {
        self.lock().shortest_at.iter().find(|(at, _)| *at == domain).map(|(_, shortest)| *shortest)
    }

    /// Whether a request hangs there that has taken longer than it may.
    pub(super) fn is_stuck(&self, domain: FailureDomain) -> bool {
        let now = Instant::now();
        let is_stuck = |rest: &DomainBackoff| matches!(rest.until, Until::Return { late, .. } if late <= now);
        self.lock().rests.iter().any(|rest| rest.domain == domain && is_stuck(rest))
    }

    /// A lease that it serves was released.
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
        // They go without the lock: with them may go a store, or a callback that holds a lease itself.
        drop(queue);
    }

    /// The life of the thread of that number from when it beats.
    fn beat_as(&'static self, me: u64) {
        // What a program's own clock or store panics with, as when it is dropped, must not end the other leases.
        while catch_unwind(AssertUnwindSafe(|| self.run(me))).is_err() {
            thread::sleep(PAUSE);
        }
    }

    /// The life of a watchdog: until the thread that beats is stuck, whose number and beats it then takes.
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
                // The end of that lease is to be told, too.
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
        // Those of a beat that panicked.
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
                        // The watchdog has a beat of its own for that lease. This one may be the last to hold a store.
                        drop(queue);
                        drop(beat);
                        return;
                    }
                    // Not the last to hold anything.
                    queue.request = None;
                    if let Some(due) = next {
                        beat.due = due;
                        queue.push(beat);
                        continue;
                    }
                    // An ended one goes without the lock.
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
        // Nothing in here is left half done by a panic.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    /// Says whether it is now the first of its ring.
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

    /// How long nothing is to be asked of a domain; a heartbeat, where nobody knows.
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
                // Going to sleep is seldom enough to forget the clocks that nobody uses any more.
                self.rings.retain(|ring| !ring.beats.is_empty());
                Work::Sleep(nap)
            }
        }
    }
}

/// How long a domain rests after a request that took so long, and at most.
fn rest_after(took: Duration, longest: Duration) -> Option<Duration> {
    (took > SLOW).then(|| took.min(longest))
}

/// How much later than due a beat may be done, where no heartbeat is shorter than that.
fn coalescing_window(soonest: Option<Duration>) -> Duration {
    soonest.map_or(SLACK, |soonest| (soonest / SLACKS_IN_A_HEARTBEAT).min(SLACK))
}

/// How often the watchdog looks, where no ttl is shorter than that.
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
            // Somewhere within the first look, it began; by the second it has lasted for a whole one.
            assert!(look_every(Some(ttl)) * 2 <= ttl / 4);
        }
        assert_eq!(look_every(Some(MS * 60_000)), LOOK);
    }
}
