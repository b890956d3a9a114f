//! The one thread that renews all leases of a process.
//!
//! It sleeps until the first beat is due and then a moment longer ([`SLACK`]), so that beats which come close are done
//! in one go. Beats stand in a heap by the time they are due, one heap for each clock. That of a lease which has ended
//! stays there until it comes up, or until such ones are more than half of all; a release never searches.
//!
//! One request at a time is under way, so a store that hangs delays the beats of others, by as long as a request may
//! take: a quarter of its ttl, and at most 250 ms. Afterwards that store rests for as long as it took, whatever is due
//! there, so others get half of the time at least. It rests no longer than a request may take: what takes longer than
//! that is rather a process that was stopped, and its leases have no time to lose.
//!
//! A forked child has a heart of its own, without the beats of its parent's leases, once it takes a lease. The mutex is
//! the standard library's, because parking_lot's waits go through a table of the whole process, which a fork could leave
//! locked.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::io;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

use super::clock::Clock;
use super::held::Held;
use crate::sys::per_process::PerProcess;

/// How much later than due a beat may be done, to be done together with the next.
const SLACK: Duration = Duration::from_millis(3);

/// A request that takes longer makes its store rest.
const SLOW: Duration = Duration::from_millis(10);

/// As many beats of ended leases are not worth a clearance.
const FEW: usize = 64;

/// The heartbeat of this process.
#[derive(Default)]
pub(super) struct Heart {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    runs: bool,
    rings: Vec<Ring>,
    /// How many of the beats are of leases that have been released.
    ended: usize,
}

/// The beats by one clock.
struct Ring {
    clock: Arc<dyn Clock>,
    beats: BinaryHeap<Beat>,
}

struct Beat {
    due: Duration,
    held: Arc<Held>,
}

/// The heap gives the greatest first, which is to be the one that is due first.
impl Ord for Beat {
    fn cmp(&self, other: &Self) -> Ordering {
        other.due.cmp(&self.due)
    }
}

impl PartialOrd for Beat {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Beat {
    fn eq(&self, other: &Self) -> bool {
        self.due == other.due
    }
}

impl Eq for Beat {}

/// What is to be done now.
enum Turn {
    Beat(Beat),
    /// Nothing for so long; `None` is until something changes.
    Sleep(Option<Duration>),
}

/// Wakes the heart when a clock jumps.
struct Bell(&'static Heart);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        // With the lock, so that it falls before the heart reads the clock, or after it has gone to sleep.
        let _queue = self.0.lock();
        self.0.changed.notify_one();
    }
}

impl Heart {
    /// That of this process, which beats from now on if it has not before.
    pub(super) fn start() -> io::Result<&'static Self> {
        static HEART: PerProcess<Heart> = PerProcess::new();
        let heart = HEART.get(Self::default);
        let mut queue = heart.lock();
        if !queue.runs {
            thread::Builder::new().name("lockkit-lease".into()).spawn(move || {
                // What a program's own clock or store panics with, as when it is dropped, must not end the other leases.
                while catch_unwind(AssertUnwindSafe(|| heart.run())).is_err() {
                    thread::sleep(SLOW);
                }
            })?;
            queue.runs = true;
        }
        Ok(heart)
    }

    /// Beats for `held` from `due` on until it ends.
    pub(super) fn serve(&self, held: Arc<Held>, due: Duration) {
        let mut queue = self.lock();
        if queue.push(Beat { due, held }) {
            drop(queue);
            self.changed.notify_one();
        }
    }

    /// A lease that it serves was released.
    pub(super) fn released(&self) {
        let mut over = Vec::new();
        let mut queue = self.lock();
        queue.ended += 1;
        if queue.ended > FEW && queue.ended > queue.rings.iter().map(|ring| ring.beats.len()).sum::<usize>() / 2 {
            for ring in &mut queue.rings {
                let beats = mem::take(&mut ring.beats).into_vec();
                let (ended, going): (Vec<_>, Vec<_>) = beats.into_iter().partition(|beat| beat.held.is_over());
                ring.beats = going.into();
                over.push(ended);
            }
            queue.ended = 0;
        }
        // They go without the lock: with them may go a store, or a callback that holds a lease itself.
        drop(queue);
    }

    fn run(&'static self) {
        let bell = Waker::from(Arc::new(Bell(self)));
        // Stores at rest, by their address, and until when.
        let mut resting: Vec<(usize, Instant)> = Vec::new();
        let mut queue = self.lock();
        loop {
            match queue.turn(&bell) {
                Turn::Beat(mut beat) => {
                    drop(queue);
                    let next = match rest(&mut resting, beat.held.store_id()) {
                        Some(rest) => Some(beat.held.now() + rest),
                        None => {
                            let began = Instant::now();
                            let next = beat.held.beat();
                            let took = began.elapsed();
                            if let Some(rest) = rest_after(took, beat.held.longest_request()) {
                                resting.push((beat.held.store_id(), Instant::now() + rest));
                            }
                            next
                        }
                    };
                    // An ended one goes without the lock: it may be the last to hold a store.
                    let ended = match next {
                        Some(due) => {
                            beat.due = due;
                            queue = self.lock();
                            queue.push(beat);
                            continue;
                        }
                        None => beat,
                    };
                    drop(ended);
                    queue = self.lock();
                    queue.ended = queue.ended.saturating_sub(1);
                }
                Turn::Sleep(None) => {
                    queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                }
                Turn::Sleep(Some(nap)) => {
                    queue = self.changed.wait_timeout(queue, nap + SLACK).unwrap_or_else(PoisonError::into_inner).0;
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
        let clock = beat.held.clock();
        let ring = match self.rings.iter().position(|ring| Arc::ptr_eq(&ring.clock, clock)) {
            Some(at) => &mut self.rings[at],
            None => {
                self.rings.push(Ring { clock: clock.clone(), beats: BinaryHeap::new() });
                let last = self.rings.len() - 1;
                &mut self.rings[last]
            }
        };
        let first = ring.beats.peek().is_none_or(|first| beat.due < first.due);
        ring.beats.push(beat);
        first
    }

    fn turn(&mut self, bell: &Waker) -> Turn {
        let mut nap: Option<Duration> = None;
        let mut chosen = None;
        for (at, ring) in self.rings.iter().enumerate() {
            let Some(first) = ring.beats.peek() else { continue };
            ring.clock.on_jump(bell);
            let left = first.due.saturating_sub(ring.clock.now());
            if nap.is_none_or(|nap| left < nap) {
                nap = Some(left);
                chosen = Some(at);
            }
        }
        match (nap, chosen) {
            (Some(Duration::ZERO), Some(at)) => {
                let beat = self.rings[at].beats.pop();
                beat.map_or(Turn::Sleep(None), Turn::Beat)
            }
            _ => {
                // Going to sleep is seldom enough to forget the clocks that nobody uses any more.
                self.rings.retain(|ring| !ring.beats.is_empty());
                Turn::Sleep(nap)
            }
        }
    }
}

/// How long a store rests after a request that took so long, where one may take `longest`.
fn rest_after(took: Duration, longest: Duration) -> Option<Duration> {
    (took > SLOW).then(|| took.min(longest))
}

/// How long the store is still to rest.
fn rest(resting: &mut Vec<(usize, Instant)>, store: usize) -> Option<Duration> {
    if resting.is_empty() {
        return None;
    }
    let now = Instant::now();
    resting.retain(|(_, until)| *until > now);
    resting.iter().find(|(resting, _)| *resting == store).map(|(_, until)| *until - now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_rests_for_as_long_as_it_took_but_not_for_as_long_as_the_process_was_stopped() {
        const MS: Duration = Duration::from_millis(1);
        assert_eq!(rest_after(MS, MS * 250), None);
        assert_eq!(rest_after(MS * 40, MS * 250), Some(MS * 40));
        // A lease of 3 s that was renewed just before a stop of 1.6 s has 1.4 s left.
        assert_eq!(rest_after(MS * 1600, MS * 250), Some(MS * 250));
    }
}
