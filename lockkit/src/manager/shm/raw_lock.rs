//! The lock word in shared memory.
//!
//! It contains the owner, or 0, and three flags:
//!
//! | flag | meaning |
//! |---|---|
//! | `WAITERS` | Threads may sleep on the word. A release wakes one of them. |
//! | `WOKEN` | A waiter was woken and has not checked the word yet. Until it does, a release wakes no other. |
//! | `HANDOFF` | Only waiters that have slept may acquire the lock: now, or from the next release on. |
//!
//! Without an owner and without `HANDOFF` any thread may acquire the lock. A thread may barge, that
//! is acquire the lock before the woken waiter does, because a hand-over would cost two context
//! switches for each hold.
//!
//! Two rules bound the wait of a waiter:
//! - A waiter that was woken and did not get the lock requests a hand-off: the next release keeps
//!   the lock for waiters that have slept. The waiter spins until that release, which comes soon if
//!   locks are held briefly. A minimum interval separates the requests. Until the next request is
//!   allowed, the waiter backs off, and no other waiter is woken.
//! - A woken waiter may not get a processor. A release that still finds `WOKEN` set keeps the lock
//!   from time to time. A thread that would barge then goes to sleep, and frees a processor for the
//!   waiter.
//!
//! If a woken waiter dies, the other waiters notice within a tick.
//!
//! [`Env`] reports whether an owner is dead. A waiter asks at its first attempt and then once per
//! tick. A dead owner's word is taken over with a compare-and-swap, so exactly one waiter wins, and
//! knows that it took over.

use super::atomic::{AtomicU32, Ordering};
use crate::sys::failpoint::step;

/// The lock is free.
pub(super) const FREE: u32 = 0;
/// The bits of the owner; 0 if the lock is free.
pub(super) const OWNER: u32 = WOKEN - 1;
/// A waiter was woken and has not checked the word yet.
const WOKEN: u32 = 1 << 29;
/// The lock is kept for waiters that have slept.
const HANDOFF: u32 = 1 << 30;
/// Threads may sleep on the word.
const WAITERS: u32 = 1 << 31;

/// The operations that the word does not provide: whether an owner lives, and how to sleep.
pub(super) trait Env {
    /// The reason why a waiter stops waiting.
    type WaitError;
    /// Returns whether the owner has died. Once true, it stays true.
    fn is_dead(&self, owner: u32) -> bool;
    /// Waits until a waiter that was woken and did not get the lock may request a hand-off, or
    /// until its timeout. The next sleep reports the timeout.
    fn back_off(&self);
    /// Polls the word until it has no owner, but only briefly.
    fn spin(&self, word: &AtomicU32);
    /// Sleeps on the word until another thread wakes this one or a tick is over, unless the word is
    /// no longer `seen`. Returns an error if the waiter has to give up.
    fn sleep(&mut self, word: &AtomicU32, seen: u32) -> Result<Slept, Self::WaitError>;
}

/// The operations of a release for waiters.
pub(super) trait Fairness {
    /// Returns whether to keep the lock for the woken waiter that has not checked the word yet. May
    /// be called very often.
    fn hands_off(&self) -> bool;
    /// Wakes one thread that sleeps on the word, and returns whether there was one.
    fn wake(&self, word: &AtomicU32) -> bool;
}

/// The event that ended a sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slept {
    /// Another thread woke this one, or the word had changed before the sleep.
    Woken,
    /// A tick is over, or a signal interrupted it.
    Tick,
}

/// How the lock was acquired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Acquired {
    /// It was free.
    Free,
    /// From an owner that died holding it.
    FromDead(u32),
}

/// Acquires a lock that has neither an owner nor `HANDOFF`.
#[inline]
pub(super) fn acquire_free(word: &AtomicU32, owner: u32) -> bool {
    let seen = word.load(Ordering::Relaxed);
    seen & (OWNER | HANDOFF) == 0
        && word
            .compare_exchange(seen, seen | owner, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
}

/// Acquires the lock unless a live owner holds it.
#[cold]
pub(super) fn acquire_now(
    word: &AtomicU32,
    owner: u32,
    is_dead: impl Fn(u32) -> bool,
) -> Option<Acquired> {
    attempt(
        word,
        owner,
        Waiter {
            may_take_reserved: true,
            has_slept: false,
            was_woken: false,
            checks_owner: true,
        },
        is_dead,
    )
    .ok()
}

/// Acquires the lock, waiting for it.
#[cold]
pub(super) fn acquire<W: Env>(
    word: &AtomicU32,
    owner: u32,
    env: &mut W,
) -> Result<Acquired, W::WaitError> {
    let mut waiter = Waiter {
        may_take_reserved: false,
        has_slept: false,
        was_woken: false,
        checks_owner: true,
    };
    let mut has_lost_race = false;
    loop {
        let seen = match attempt(word, owner, waiter, |owner| env.is_dead(owner)) {
            Ok(acquired) => return Ok(acquired),
            Err(seen) => seen,
        };
        if std::mem::take(&mut has_lost_race) {
            env.back_off();
            if request_handoff(word) {
                env.spin(word);
            }
            continue;
        }
        let waiting_word = waiter.word_while_waiting(seen);
        if waiting_word != seen
            && word
                .compare_exchange(seen, waiting_word, Ordering::Relaxed, Ordering::Relaxed)
                .is_err()
        {
            continue;
        }
        step("waiter announced");
        // A waiter that was woken and gives up now has just cleared `WOKEN`, so that the next
        // release wakes another.
        let slept = env.sleep(word, waiting_word)?;
        let tick = slept == Slept::Tick;
        waiter = Waiter {
            may_take_reserved: true,
            has_slept: true,
            was_woken: !tick,
            checks_owner: tick,
        };
        has_lost_race = !tick;
    }
}

/// Makes the next release keep the lock for the woken waiter. Returns `false` if the lock has no
/// owner any more.
fn request_handoff(word: &AtomicU32) -> bool {
    let request = |seen| (seen & OWNER != 0).then_some(seen | WOKEN | HANDOFF);
    word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, request)
        .is_ok()
}

/// How a thread tries to acquire the lock.
#[derive(Clone, Copy)]
struct Waiter {
    /// May acquire a lock that is kept for waiters.
    may_take_reserved: bool,
    /// Has slept. Other threads may sleep, too, because the word does not count them.
    has_slept: bool,
    /// Was woken by a release.
    was_woken: bool,
    /// Checks whether the owner is alive.
    checks_owner: bool,
}

impl Waiter {
    /// Returns the word after this waiter has arrived to wait.
    fn word_while_waiting(self, seen: u32) -> u32 {
        WAITERS | if self.was_woken { seen & !WOKEN } else { seen }
    }

    /// Returns the flags after this waiter has acquired the lock. A waiter that has slept clears
    /// `WOKEN` for the woken waiter, which may have died before it checked the word.
    fn flags_after_acquire(self, seen: u32) -> u32 {
        if self.has_slept {
            WAITERS
        } else {
            seen & (WAITERS | WOKEN)
        }
    }
}

/// Acquires the lock if that is possible now; otherwise returns the word that it read.
fn attempt(
    word: &AtomicU32,
    owner: u32,
    waiter: Waiter,
    is_dead: impl Fn(u32) -> bool,
) -> Result<Acquired, u32> {
    let mut seen = word.load(Ordering::Relaxed);
    loop {
        let acquired = match seen & OWNER {
            0 if seen & HANDOFF == 0 || waiter.may_take_reserved => Acquired::Free,
            0 => return Err(seen),
            holder if waiter.checks_owner && is_dead(holder) => Acquired::FromDead(holder),
            _ => return Err(seen),
        };
        match word.compare_exchange(
            seen,
            owner | waiter.flags_after_acquire(seen),
            Ordering::Acquire,
            Ordering::Relaxed,
        ) {
            Ok(_) => return Ok(acquired),
            Err(changed) => seen = changed,
        }
    }
}

/// Releases the lock. Returns `false` if `owner` does not hold it.
#[inline]
pub(super) fn release(word: &AtomicU32, owner: u32, fairness: &impl Fairness) -> bool {
    // Expects no flags and does not load the word first: a processor stalls on reading what it has
    // just exchanged.
    match word.compare_exchange(owner, FREE, Ordering::Release, Ordering::Relaxed) {
        Ok(_) => {
            step("lock word released");
            true
        }
        Err(seen) => release_flagged(word, seen, owner, fairness),
    }
}

#[inline(never)]
fn release_flagged(word: &AtomicU32, mut seen: u32, owner: u32, fairness: &impl Fairness) -> bool {
    let mut hands_off = None;
    while seen & OWNER == owner {
        // An awake waiter takes care of the sleeping ones: it sets `WAITERS` when it acquires or
        // sleeps.
        let to_wake = seen & (WAITERS | WOKEN) == WAITERS;
        let next = match seen & WOKEN {
            0 if to_wake => WOKEN | seen & HANDOFF,
            WOKEN if *hands_off.get_or_insert_with(|| fairness.hands_off()) => {
                seen & !OWNER | HANDOFF
            }
            _ => seen & !OWNER,
        };
        match word.compare_exchange(seen, next, Ordering::Release, Ordering::Relaxed) {
            Ok(_) => {
                step("lock word released");
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

/// Wakes a thread that sleeps on the word, in which `WOKEN` is set already. If no thread sleeps,
/// clears `WOKEN` and checks again for a waiter that went to sleep in between.
#[cold]
fn wake_one(word: &AtomicU32, fairness: &impl Fairness) {
    while !fairness.wake(word) {
        let left = word.fetch_and(!(WOKEN | HANDOFF), Ordering::Relaxed) & !(WOKEN | HANDOFF);
        let has_sleeper = left == WAITERS;
        if !has_sleeper
            || word
                .compare_exchange(left, WOKEN, Ordering::Relaxed, Ordering::Relaxed)
                .is_err()
        {
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

    /// A futex without ticks, so that a lost wake-up shows as a deadlock.
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
        hands_off_always: bool,
        /// The protected data; loom detects two threads that access it at once.
        protected: UnsafeCell<()>,
    }

    impl Model {
        fn new(word: u32, hands_off_always: bool) -> Arc<Self> {
            Arc::new(Self {
                hands_off_always,
                word: AtomicU32::new(word),
                futex: Futex::default(),
                dead: AtomicBool::new(false),
                protected: UnsafeCell::new(()),
            })
        }

        fn enter(&self) {
            self.protected.with_mut(|_| ());
        }
    }

    impl Fairness for Model {
        fn hands_off(&self) -> bool {
            self.hands_off_always
        }

        fn wake(&self, _word: &AtomicU32) -> bool {
            self.futex.wake()
        }
    }

    /// How a waiter's sleeps end: the first `ticks` sleeps end by a tick, the others only by a
    /// wake-up.
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

    /// Acquires and releases once, and returns how it acquired.
    fn acquire_and_release(
        model: &Model,
        owner: u32,
        ticks: u32,
        gives_up: bool,
    ) -> Option<Acquired> {
        let mut waiter = Waiter {
            model,
            ticks,
            gives_up,
        };
        let acquired = match acquire_free(&model.word, owner) {
            true => Acquired::Free,
            false => acquire(&model.word, owner, &mut waiter).ok()?,
        };
        model.enter();
        assert!(release(&model.word, owner, model));
        Some(acquired)
    }

    fn check_bounded(model: impl Fn() + Send + Sync + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(model);
    }

    #[test]
    fn loom_exclusion_holds_and_no_wakeup_is_lost() {
        check_bounded(|| {
            let model = Model::new(FREE, false);
            let others: Vec<_> = [2, 3]
                .map(|owner| {
                    let model = model.clone();
                    thread::spawn(move || {
                        assert!(acquire_and_release(&model, owner, 0, false).is_some())
                    })
                })
                .into();
            assert!(acquire_and_release(&model, 1, 0, false).is_some());
            for other in others {
                other.join().unwrap();
            }
        });
    }

    #[test]
    fn loom_handoff_at_each_release_wakes_all_waiters() {
        check_bounded(|| {
            let model = Model::new(FREE, true);
            let others: Vec<_> = [(2, 1), (3, 0)]
                .map(|(owner, ticks)| {
                    let model = model.clone();
                    thread::spawn(move || {
                        assert!(acquire_and_release(&model, owner, ticks, false).is_some())
                    })
                })
                .into();
            assert!(acquire_and_release(&model, 1, 0, false).is_some());
            for other in others {
                other.join().unwrap();
            }
        });
    }

    #[test]
    fn loom_cancelled_waiter_loses_no_wakeup() {
        check_bounded(|| {
            let model = Model::new(FREE, false);
            let others: Vec<_> = [(2, true), (3, false)]
                .map(|(owner, gives_up)| {
                    let model = model.clone();
                    thread::spawn(move || {
                        assert!(
                            acquire_and_release(&model, owner, 0, gives_up).is_some() || gives_up
                        );
                    })
                })
                .into();
            assert!(acquire_and_release(&model, 1, 0, false).is_some());
            for other in others {
                other.join().unwrap();
            }
        });
    }

    #[test]
    fn loom_handoff_to_cancelled_waiter_goes_to_next() {
        check_bounded(|| {
            let model = Model::new(1, true);
            let others: Vec<_> = [(2, 1, true), (3, 0, false)]
                .map(|(owner, ticks, gives_up)| {
                    let model = model.clone();
                    thread::spawn(move || {
                        assert!(
                            acquire_and_release(&model, owner, ticks, gives_up).is_some()
                                || gives_up
                        );
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
    fn loom_acquire_now_during_handoff_wakes_all_waiters() {
        check_bounded(|| {
            let model = Model::new(1, true);
            let others: Vec<_> = [(2, 1), (3, 0)]
                .map(|(owner, ticks)| {
                    let model = model.clone();
                    thread::spawn(move || {
                        assert!(acquire_and_release(&model, owner, ticks, false).is_some())
                    })
                })
                .into();
            assert!(release(&model.word, 1, &*model));
            if acquire_now(&model.word, 1, |_| false).is_some() {
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
        check_bounded(|| {
            let model = Model::new(9, false);
            let other = thread::spawn({
                let model = model.clone();
                move || acquire_and_release(&model, 2, 0, false).unwrap()
            });
            model.dead.store(true, Ordering::SeqCst);
            let mine = acquire_and_release(&model, 1, 0, false).unwrap();
            let other = other.join().unwrap();
            assert_eq!(
                [mine, other]
                    .iter()
                    .filter(|acquired| **acquired == Acquired::FromDead(9))
                    .count(),
                1
            );
        });
    }
}
