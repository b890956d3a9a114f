//! The word that is a lock in shared memory.
//!
//! An owner or none, and three flags:
//!
//! | flag | meaning |
//! |---|---|
//! | `WAITERS` | somebody may be asleep on the word: a release wakes one |
//! | `WOKEN` | one was woken and has yet to look: until then a release wakes no other |
//! | `HANDOFF` | the lock is for those who have slept, and not for who comes by: now, or from the next release on |
//!
//! Without an owner and without `HANDOFF` the lock is free for all. Whoever comes at the right moment may take it before
//! the woken waiter does, because handing over would cost two context switches for each hold. So that nobody is
//! overtaken for ever, a waiter that was woken in vain *presses*: it has the lock kept, and spins until the release,
//! which is soon where locks are held shortly. It may do so once in a while; until then it naps, and no other is woken.
//! And a release that finds a woken waiter still not there, for it gets no processor, keeps the lock now and then: who
//! would overtake goes to sleep then, and leaves it one. Should a woken waiter die, the others notice within a tick.
//!
//! An owner is dead or alive by what [`Env`] says, asked at first sight and then once a tick. A dead owner's word is
//! taken from it with a compare-and-swap, so one of many wins, and knows that it took over.

use super::atomic::{AtomicU32, Ordering};
use crate::failpoint::step;

/// Nobody holds the lock.
pub(super) const FREE: u32 = 0;
/// Who holds it; 0 for nobody.
pub(super) const OWNER: u32 = WOKEN - 1;
/// A waiter is on its way.
const WOKEN: u32 = 1 << 29;
/// Kept for those who have slept.
const HANDOFF: u32 = 1 << 30;
/// Somebody may be asleep.
const WAITERS: u32 = 1 << 31;

/// What the word does not know: who lives, and how to sleep.
pub(super) trait Env {
    /// Why a waiter stops waiting.
    type WaitError;
    /// Whether the owner has died. Once it has, it stays so.
    fn is_dead(&self, owner: u32) -> bool;
    /// Lets time pass until a waiter that was woken in vain may press, or until it is time to give up, which the next
    /// sleep will say.
    fn back_off(&self);
    /// Looks at the word again and again until it has no owner, but not for long.
    fn spin(&self, word: &AtomicU32);
    /// Sleeps on the word until somebody wakes this thread or a tick is over, unless the word is not `seen` any more;
    /// or says that it is time to give up.
    fn sleep(&mut self, word: &AtomicU32, seen: u32) -> Result<Slept, Self::WaitError>;
}

/// What a release does for waiters.
pub(super) trait Fairness {
    /// Whether the lock should be kept for the one that was woken and has yet to look. May be asked very often.
    fn keeps(&self) -> bool;
    /// Wakes one thread that sleeps on the word; says whether there was one.
    fn wake(&self, word: &AtomicU32) -> bool;
}

/// What ended a sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slept {
    /// Somebody woke this thread, or the word had changed before it slept.
    Woken,
    /// A tick is over, or was cut short by a signal.
    Tick,
}

/// The lock is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// From nobody.
    Clean,
    /// From an owner that died holding it.
    From(u32),
}

/// Takes a lock that is free for all.
#[inline]
pub(super) fn take_free(word: &AtomicU32, owner: u32) -> bool {
    let seen = word.load(Ordering::Relaxed);
    seen & (OWNER | HANDOFF) == 0
        && word.compare_exchange(seen, seen | owner, Ordering::Acquire, Ordering::Relaxed).is_ok()
}

/// Takes the lock unless a living owner holds it.
#[cold]
pub(super) fn take_now(word: &AtomicU32, owner: u32, is_dead: impl Fn(u32) -> bool) -> Option<Taken> {
    attempt(word, owner, Waiter { entitled: true, rested: false, awake: false, look: true }, is_dead).ok()
}

/// Takes the lock as soon as it can be had.
#[cold]
pub(super) fn take<W: Env>(word: &AtomicU32, owner: u32, world: &mut W) -> Result<Taken, W::WaitError> {
    let mut stance = Waiter { entitled: false, rested: false, awake: false, look: true };
    let mut in_vain = false;
    loop {
        let seen = match attempt(word, owner, stance, |owner| world.is_dead(owner)) {
            Ok(taken) => return Ok(taken),
            Err(seen) => seen,
        };
        if std::mem::take(&mut in_vain) {
            world.back_off();
            if request_handoff(word) {
                world.spin(word);
            }
            continue;
        }
        let waiting = stance.arrive(seen);
        if waiting != seen && word.compare_exchange(seen, waiting, Ordering::Relaxed, Ordering::Relaxed).is_err() {
            continue;
        }
        step("waiter announced");
        // Who gives up now, after it was woken, has just seen to it that the next release wakes another.
        let slept = world.sleep(word, waiting)?;
        let tick = slept == Slept::Tick;
        stance = Waiter { entitled: true, rested: true, awake: !tick, look: tick };
        in_vain = !tick;
    }
}

/// Has the next release keep the lock for the one that is awake; `false` when nobody holds it any more.
fn request_handoff(word: &AtomicU32) -> bool {
    let pressed = |seen| (seen & OWNER != 0).then_some(seen | WOKEN | HANDOFF);
    word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, pressed).is_ok()
}

/// How somebody tries to take the lock.
#[derive(Clone, Copy)]
struct Waiter {
    /// Takes also what is kept.
    entitled: bool,
    /// Has slept, as others may, whom nobody counts.
    rested: bool,
    /// Is the one that was woken.
    awake: bool,
    /// Looks whether the owner lives.
    look: bool,
}

impl Waiter {
    /// The word once this one has come, and waits.
    fn arrive(self, seen: u32) -> u32 {
        WAITERS | if self.awake { seen & !WOKEN } else { seen }
    }

    /// The flags once this one has taken the lock. It stands in for the one that was woken, which may have died on its
    /// way.
    fn take(self, seen: u32) -> u32 {
        if self.rested { WAITERS } else { seen & (WAITERS | WOKEN) }
    }
}

/// Takes the lock if it can be had now; else says what the word was.
fn attempt(word: &AtomicU32, owner: u32, stance: Waiter, is_dead: impl Fn(u32) -> bool) -> Result<Taken, u32> {
    let mut seen = word.load(Ordering::Relaxed);
    loop {
        let taken = match seen & OWNER {
            0 if seen & HANDOFF == 0 || stance.entitled => Taken::Clean,
            0 => return Err(seen),
            holder if stance.look && is_dead(holder) => Taken::From(holder),
            _ => return Err(seen),
        };
        match word.compare_exchange(seen, owner | stance.take(seen), Ordering::Acquire, Ordering::Relaxed) {
            Ok(_) => return Ok(taken),
            Err(changed) => seen = changed,
        }
    }
}

/// Gives the lock back; `false` when `owner` does not hold it.
#[inline]
pub(super) fn release(word: &AtomicU32, owner: u32, fairness: &impl Fairness) -> bool {
    // A guess: a processor stalls on looking first at what it has just exchanged.
    match word.compare_exchange(owner, FREE, Ordering::Release, Ordering::Relaxed) {
        Ok(_) => {
            step("lock word given back");
            true
        }
        Err(seen) => release_flagged(word, seen, owner, fairness),
    }
}

#[inline(never)]
fn release_flagged(word: &AtomicU32, mut seen: u32, owner: u32, fairness: &impl Fairness) -> bool {
    let mut keeps = None;
    while seen & OWNER == owner {
        // Whoever is awake will see to those who sleep.
        let to_wake = seen & (WAITERS | WOKEN) == WAITERS;
        let next = match seen & WOKEN {
            0 if to_wake => WOKEN | seen & HANDOFF,
            WOKEN if *keeps.get_or_insert_with(|| fairness.keeps()) => seen & !OWNER | HANDOFF,
            _ => seen & !OWNER,
        };
        match word.compare_exchange(seen, next, Ordering::Release, Ordering::Relaxed) {
            Ok(_) => {
                step("lock word given back");
                if to_wake {
                    wake_one(word, fairness);
                    step("waiter woken");
                }
                return true;
            }
            Err(changed) => seen = changed,
        }
    }
    false
}

/// Wakes one who sleeps on the word, which says so already. If nobody does it takes that back, and looks again for who
/// went to sleep in between.
#[cold]
fn wake_one(word: &AtomicU32, fairness: &impl Fairness) {
    while !fairness.wake(word) {
        let left = word.fetch_and(!(WOKEN | HANDOFF), Ordering::Relaxed) & !(WOKEN | HANDOFF);
        let sleeper = left == WAITERS;
        if !sleeper || word.compare_exchange(left, WOKEN, Ordering::Relaxed, Ordering::Relaxed).is_err() {
            return;
        }
    }
}

#[cfg(all(loom, test))]
mod models {
    use std::sync::Arc;

    use loom::cell::UnsafeCell;
    use loom::sync::atomic::AtomicBool;
    use loom::sync::{Condvar, Mutex};
    use loom::thread;

    use super::*;

    /// A futex without ticks, so that a wake-up that gets lost shows as a deadlock.
    #[derive(Default)]
    struct Futex {
        sleepers: Mutex<(u32, u32)>,
        woken: Condvar,
    }

    impl Futex {
        fn sleep(&self, word: &AtomicU32, seen: u32) {
            let mut sleepers = self.sleepers.lock().unwrap();
            if word.load(Ordering::SeqCst) != seen {
                return;
            }
            sleepers.0 += 1;
            while sleepers.1 == 0 {
                sleepers = self.woken.wait(sleepers).unwrap();
            }
            sleepers.0 -= 1;
            sleepers.1 -= 1;
        }

        fn wake(&self) -> bool {
            let mut sleepers = self.sleepers.lock().unwrap();
            if sleepers.0 == sleepers.1 {
                return false;
            }
            sleepers.1 += 1;
            self.woken.notify_all();
            true
        }
    }

    struct Model {
        word: AtomicU32,
        futex: Futex,
        /// Whether the owner 9 has died.
        dead: AtomicBool,
        /// Whether releases keep the lock for waiters.
        fair: bool,
        /// What the lock protects; loom sees two who touch it at once.
        inside: UnsafeCell<()>,
    }

    impl Model {
        fn new(word: u32, fair: bool) -> Arc<Self> {
            Arc::new(Self {
                fair,
                word: AtomicU32::new(word),
                futex: Futex::default(),
                dead: AtomicBool::new(false),
                inside: UnsafeCell::new(()),
            })
        }

        fn enter(&self) {
            self.inside.with_mut(|_| ());
        }
    }

    impl Fairness for Model {
        fn keeps(&self) -> bool {
            self.fair
        }

        fn wake(&self, _word: &AtomicU32) -> bool {
            self.futex.wake()
        }
    }

    /// How a waiter's sleeps go: the first ones end by a tick, as many as `ticks`; then only waking helps.
    struct Waiter<'m> {
        model: &'m Model,
        ticks: u32,
        gives_up: bool,
    }

    impl Env for Waiter<'_> {
        type WaitError = ();

        fn is_dead(&self, owner: u32) -> bool {
            owner == 9 && self.model.dead.load(Ordering::SeqCst)
        }

        fn back_off(&self) {
            thread::yield_now();
        }

        fn spin(&self, _word: &AtomicU32) {
            thread::yield_now();
        }

        fn sleep(&mut self, word: &AtomicU32, seen: u32) -> Result<Slept, ()> {
            if self.ticks > 0 {
                self.ticks -= 1;
                thread::yield_now();
                return Ok(Slept::Tick);
            }
            if self.gives_up {
                return Err(());
            }
            self.model.futex.sleep(word, seen);
            Ok(Slept::Woken)
        }
    }

    /// Takes and releases once; says from whom it took.
    fn visit(model: &Model, owner: u32, ticks: u32, gives_up: bool) -> Option<Taken> {
        let mut waiter = Waiter { model, ticks, gives_up };
        let taken = match take_free(&model.word, owner) {
            true => Taken::Clean,
            false => take(&model.word, owner, &mut waiter).ok()?,
        };
        model.enter();
        assert!(release(&model.word, owner, model));
        Some(taken)
    }

    fn explore(model: impl Fn() + Send + Sync + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(model);
    }

    #[test]
    fn loom_two_never_hold_it_and_no_wake_up_is_lost() {
        explore(|| {
            let model = Model::new(FREE, false);
            let others: Vec<_> = [2, 3]
                .map(|owner| {
                    let model = model.clone();
                    thread::spawn(move || assert!(visit(&model, owner, 0, false).is_some()))
                })
                .into();
            assert!(visit(&model, 1, 0, false).is_some());
            for other in others {
                other.join().unwrap();
            }
        });
    }

    #[test]
    fn loom_handoff_at_each_release_wakes_all_waiters() {
        explore(|| {
            let model = Model::new(FREE, true);
            let others: Vec<_> = [(2, 1), (3, 0)]
                .map(|(owner, ticks)| {
                    let model = model.clone();
                    thread::spawn(move || assert!(visit(&model, owner, ticks, false).is_some()))
                })
                .into();
            assert!(visit(&model, 1, 0, false).is_some());
            for other in others {
                other.join().unwrap();
            }
        });
    }

    #[test]
    fn loom_a_waiter_that_gives_up_takes_no_wake_up_with_it() {
        explore(|| {
            let model = Model::new(FREE, false);
            let others: Vec<_> = [(2, true), (3, false)]
                .map(|(owner, gives_up)| {
                    let model = model.clone();
                    thread::spawn(move || {
                        assert!(visit(&model, owner, 0, gives_up).is_some() || gives_up);
                    })
                })
                .into();
            assert!(visit(&model, 1, 0, false).is_some());
            for other in others {
                other.join().unwrap();
            }
        });
    }

    #[test]
    fn loom_a_lock_kept_for_one_that_gave_up_goes_to_the_next() {
        explore(|| {
            let model = Model::new(1, true);
            let others: Vec<_> = [(2, 1, true), (3, 0, false)]
                .map(|(owner, ticks, gives_up)| {
                    let model = model.clone();
                    thread::spawn(move || {
                        assert!(visit(&model, owner, ticks, gives_up).is_some() || gives_up);
                    })
                })
                .into();
            assert!(release(&model.word, 1, &*model));
            for other in others {
                other.join().unwrap();
            }
        });
    }

    #[test]
    fn loom_take_now_during_handoff_wakes_all_waiters() {
        explore(|| {
            let model = Model::new(1, true);
            let others: Vec<_> = [(2, 1), (3, 0)]
                .map(|(owner, ticks)| {
                    let model = model.clone();
                    thread::spawn(move || assert!(visit(&model, owner, ticks, false).is_some()))
                })
                .into();
            assert!(release(&model.word, 1, &*model));
            if take_now(&model.word, 1, |_| false).is_some() {
                model.enter();
                assert!(release(&model.word, 1, &*model));
            }
            for other in others {
                other.join().unwrap();
            }
        });
    }

    #[test]
    fn loom_takeover_happens_once_and_wakes_sleepers() {
        explore(|| {
            let model = Model::new(9, false);
            let other = thread::spawn({
                let model = model.clone();
                move || visit(&model, 2, 0, false).unwrap()
            });
            model.dead.store(true, Ordering::SeqCst);
            let mine = visit(&model, 1, 0, false).unwrap();
            let other = other.join().unwrap();
            assert_eq!([mine, other].iter().filter(|taken| **taken == Taken::From(9)).count(), 1);
        });
    }
}
