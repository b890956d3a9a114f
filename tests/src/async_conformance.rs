//! The cases of asynchronous waits that every kind of lock must pass, on runtimes with one thread
//! and with several.
//!
//! Each case is a function of the [`Kind`] and of a [`Runtime`].
//! [`task_suite!`](crate::task_suite!) makes tests of all cases for one kind.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use lockkit::{CancelToken, Wait};
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

use crate::chaos::Random;
use crate::conformance::told;
use crate::fixtures::{AnyGuard, AnyLock};
use crate::wine::{DELETED, is_wine, wine_cannot_judge};
use crate::{Actor, Belongings, Kind, LIVELY, Spec, until};

/// Makes a module `$module` with a test for every case, for one kind of lock and both kinds of
/// runtime. With `alone` it contains only the cases that need no other process.
#[macro_export]
macro_rules! task_suite {
    ($module:ident, $kind:expr) => {
        $crate::task_suite!(@near $module, $kind;
            release_by_other_process_serves_async_waiter,
            kill_of_holder_serves_async_waiter,
            acquire_async_dropped_at_any_moment_leaks_nothing,
        );
    };
    ($module:ident, $kind:expr, alone) => {
        $crate::task_suite!(@near $module, $kind;);
    };
    // A server needs time for its answers, which the other cases count.
    ($module:ident, $kind:expr, far) => {
        $crate::task_suite!(@every $module, $kind;
            release_by_other_process_serves_async_waiter,
            kill_of_holder_serves_async_waiter,
        );
    };
    (@near $module:ident, $kind:expr; $($case:ident,)*) => {
        $crate::task_suite!(@every $module, $kind; acquire_async_after_timeout_succeeds_once_released, $($case,)*);
    };
    (@every $module:ident, $kind:expr; $($case:ident,)*) => {
        $crate::task_suite!($module, $kind;
            acquire_async_after_release_succeeds_for_every_wait,
            cancel_during_async_wait_ends_wait_at_once,
            acquire_async_of_held_lock_blocks_no_thread,
            guard_held_across_await_keeps_exclusion,
            $($case,)*
        );
    };
    ($module:ident, $kind:expr; $($case:ident,)*) => {
        mod $module {
            mod on_one_thread {
                $(#[test]
                fn $case() {
                    $crate::fixtures::run_or_leave_out($kind, |kind| $crate::async_conformance::$case(kind, "one"));
                })*
            }
            mod on_several_threads {
                $(#[test]
                fn $case() {
                    $crate::fixtures::run_or_leave_out($kind, |kind| $crate::async_conformance::$case(kind, "several"));
                })*
            }
        }
    };
}

/// A short wait, for waiters that are meant to time out.
const SHORT: Wait = Wait::at_most(Duration::from_millis(20));

/// Creates a runtime with `one` thread or with `several`.
pub fn runtime(flavor: &str) -> Runtime {
    let mut builder = match flavor {
        "one" => Builder::new_current_thread(),
        _ => Builder::new_multi_thread(),
    };
    builder
        .worker_threads(3)
        .enable_all()
        .build()
        .expect("a runtime")
}

/// Lets the runtime continue until the future waits for something that is not ready.
async fn expect_pending<T>(acquiring: &mut (impl Future<Output = T> + Unpin)) {
    assert!(
        timeout(Duration::from_millis(20), acquiring).await.is_err(),
        "the acquisition did not wait"
    );
}

#[allow(missing_docs)] // Each name states the operation, the condition and the result.
mod cases {
    use super::*;

    pub fn acquire_async_after_release_succeeds_for_every_wait(kind: Kind, flavor: &str) {
        let spec = kind.fresh();
        let lock = spec.open();
        runtime(flavor).block_on(async {
            for wait in [Wait::none(), Wait::forever(), Wait::at_most(LIVELY), SHORT] {
                let guard = lock.acquire_async(&wait).await.unwrap();
                assert_eq!(guard.recovered(), None);
                guard.release().unwrap();
            }
        });
        spec.clean();
    }

    pub fn acquire_async_after_timeout_succeeds_once_released(kind: Kind, flavor: &str) {
        let spec = kind.fresh();
        let (lock, holder) = (spec.open(), spec.rival());
        runtime(flavor).block_on(async {
            let guard = holder.acquire_async(&Wait::none()).await.unwrap();
            let error = lock.acquire_async(&Wait::none()).await.err().unwrap();
            assert!(error.is_held(), "{error}");
            for wait in [
                SHORT,
                Wait::at_most(Duration::ZERO),
                Wait::until(std::time::Instant::now()),
            ] {
                let error = lock.acquire_async(&wait).await.err().unwrap();
                assert!(error.is_timeout(), "{error}");
            }
            drop(guard);
            lock.acquire_async(&Wait::none()).await.unwrap();
        });
        spec.clean();
    }

    pub fn cancel_during_async_wait_ends_wait_at_once(kind: Kind, flavor: &str) {
        let spec = kind.fresh();
        let lock = spec.open();
        runtime(flavor).block_on(async {
            let guard = lock.acquire_async(&Wait::none()).await.unwrap();
            let token = CancelToken::new();
            for wait in [Wait::forever(), Wait::at_most(LIVELY * 4)] {
                let wait = wait.or_cancelled(&token);
                let mut futures = [lock.acquire_async(&wait), lock.acquire_async(&wait)];
                if !token.is_cancelled() {
                    for acquiring in &mut futures {
                        expect_pending(acquiring).await;
                    }
                    token.cancel();
                }
                for acquiring in futures {
                    let error = timeout(LIVELY, acquiring)
                        .await
                        .expect("the wait ends")
                        .err()
                        .unwrap();
                    assert!(error.is_cancelled(), "{error}");
                }
            }
            drop(guard);
            // A cancelled token refuses even a free lock.
            let refused = lock.acquire_async(&Wait::none().or_cancelled(&token)).await;
            assert!(refused.err().unwrap().is_cancelled());
            lock.acquire_async(&Wait::none()).await.unwrap();
        });
        spec.clean();
    }

    pub fn acquire_async_of_held_lock_blocks_no_thread(kind: Kind, flavor: &str) {
        let spec = kind.fresh();
        let lock: Arc<dyn AnyLock> = spec.open().into();
        runtime(flavor).block_on(async {
            let guard = lock.acquire_async(&Wait::none()).await.unwrap();
            let waiters: Vec<_> = (0..4)
                .map(|_| {
                    let lock = lock.clone();
                    tokio::spawn(async move {
                        lock.acquire_async(&Wait::at_most(LIVELY)).await.map(drop)
                    })
                })
                .collect();
            // On one thread none of this could happen if a waiter blocked the thread.
            for _ in 0..20 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            assert!(waiters.iter().all(|waiter| !waiter.is_finished()));
            drop(guard);
            for waiter in waiters {
                waiter.await.unwrap().unwrap();
            }
        });
        spec.clean();
    }

    pub fn guard_held_across_await_keeps_exclusion(kind: Kind, flavor: &str) {
        // Each of eight tasks keeps the file open while it looks at it, so a release takes seconds.
        if kind.name() == "pidfile" && wine_cannot_judge(DELETED) {
            return;
        }
        let spec = kind.fresh();
        let lock: Arc<dyn AnyLock> = spec.open().into();
        let (inside, count) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        runtime(flavor).block_on(async {
            let workers: Vec<_> = (0..8)
                .map(|_| {
                    let (lock, inside, count) = (lock.clone(), inside.clone(), count.clone());
                    tokio::spawn(async move {
                        for _ in 0..5 {
                            let guard = lock.acquire_async(&Wait::at_most(LIVELY)).await.unwrap();
                            assert_eq!(
                                inside.fetch_add(1, Ordering::SeqCst),
                                0,
                                "two tasks hold the lock"
                            );
                            tokio::task::yield_now().await;
                            tokio::time::sleep(Duration::from_micros(100)).await;
                            assert_eq!(
                                inside.fetch_sub(1, Ordering::SeqCst),
                                1,
                                "two tasks hold the lock"
                            );
                            count.fetch_add(1, Ordering::SeqCst);
                            drop(guard);
                        }
                    })
                })
                .collect();
            for worker in workers {
                worker.await.unwrap();
            }
        });
        assert_eq!(count.load(Ordering::SeqCst), 40);
        spec.clean();
    }

    pub fn release_by_other_process_serves_async_waiter(kind: Kind, flavor: &str) {
        let spec = kind.fresh();
        let mut holder = Actor::start(&spec);
        let lock = spec.open();
        runtime(flavor).block_on(async {
            for wait in [Wait::forever(), Wait::at_most(LIVELY)] {
                holder.expect("try", "held");
                let mut acquiring = lock.acquire_async(&wait);
                expect_pending(&mut acquiring).await;
                holder.expect("release", "released");
                let guard: Box<dyn AnyGuard> = timeout(LIVELY, acquiring)
                    .await
                    .expect("the task acquires")
                    .unwrap();
                assert_eq!(guard.recovered(), None);
                assert!(holder.ask("try").starts_with("error Held"));
                guard.release().unwrap();
            }
        });
        spec.clean();
    }

    pub fn kill_of_holder_serves_async_waiter(kind: Kind, flavor: &str) {
        let spec = kind.fresh();
        let mut holder = Actor::start(&spec);
        holder.expect("lock", "held");
        let lock = spec.open();
        runtime(flavor).block_on(async {
            let wait = Wait::forever();
            let mut acquiring = lock.acquire_async(&wait);
            expect_pending(&mut acquiring).await;
            holder.kill();
            let guard: Box<dyn AnyGuard> = timeout(LIVELY, acquiring)
                .await
                .expect("the task acquires")
                .unwrap();
            let answer = guard
                .recovered()
                .map_or("held".to_owned(), |died| format!("held recovered {died}"));
            assert_eq!(answer, told(kind, holder.pid()));
        });
        spec.clean();
    }

    pub fn acquire_async_dropped_at_any_moment_leaks_nothing(kind: Kind, flavor: &str) {
        if kind.name() == "pidfile" && wine_cannot_judge(DELETED) {
            return;
        }
        let spec = kind.fresh();
        let mut other = Actor::start(&spec);
        let mut drops = Actor::start_tasks(&spec, flavor, if is_wine() { 50 } else { 1000 });
        let answer = loop {
            // However many waiters have just given up, none of them keeps the lock from others.
            other.expect("lock-for 30000", "held");
            if let Some(answer) = drops.answered() {
                break answer;
            }
            other.expect("release", "released");
        };
        assert_eq!(answer, "dropped");
        other.expect("release", "released");
        // And none acquires it later.
        assert!(drops.finish().success());
        other.expect("try", "held");
        spec.clean();
    }
}
pub use cases::*;

/// Waits for the lock in tasks and drops the futures at random moments, alone and together with
/// another future. Afterwards this process has the same descriptors and threads as before. Answers
/// `dropped`.
pub fn drop_futures_at_random(spec: &Spec, flavor: &str, rounds: u32) {
    let lock: Arc<dyn AnyLock> = spec.open().into();
    let mut random = Random::new(std::process::id().into());
    let runtime = runtime(flavor);
    let round = async |random: &mut Random| {
        let pause = Duration::from_micros(random.below(1500));
        let waiter = tokio::spawn({
            let lock = lock.clone();
            let pause = Duration::from_micros(random.below(1500));
            async move {
                timeout(pause, lock.acquire_async(&Wait::forever()))
                    .await
                    .map(|acquired| acquired.map(drop))
            }
        });
        let wait = Wait::at_most(LIVELY);
        tokio::select! {
            acquired = lock.acquire_async(&wait) => drop(acquired.expect("the lock")),
            () = tokio::time::sleep(pause) => {}
        }
        // Sockets are waited for on the reactor.
        assert!(!spec.kind().is_fair() || waiting_threads() == 0);
        if random.below(4) == 0 {
            waiter.abort();
        }
        match waiter.await {
            Ok(Ok(acquired)) => acquired.expect("the lock"),
            Ok(Err(_)) => {}
            Err(ended) => assert!(ended.is_cancelled(), "{ended}"),
        }
    };
    runtime.block_on(async {
        // Resources that a process keeps after its first wait exist after a few rounds.
        for _ in 0..10 {
            round(&mut random).await;
        }
        drop(
            lock.acquire_async(&Wait::at_most(LIVELY))
                .await
                .expect("the lock"),
        );
    });
    let before = belongings_after_waits();
    runtime.block_on(async {
        for _ in 0..rounds {
            round(&mut random).await;
        }
        drop(
            lock.acquire_async(&Wait::at_most(LIVELY))
                .await
                .expect("the lock"),
        );
    });
    assert_eq!(belongings_after_waits(), before);
    println!("dropped");
}

/// Returns the belongings of this process when no thread waits for a lock any more. A thread that
/// has just begun has no name of its own yet, and a thread that ends remains visible for a moment.
/// So the result must be stable for a while.
fn belongings_after_waits() -> Belongings {
    const STABLE_CHECKS: u32 = 100;
    let own = || Belongings::of(std::process::id());
    let (mut last, mut seen) = (own(), 0);
    until("all waits have ended", || {
        let now = own();
        seen = if now == last && waiting_threads() == 0 {
            seen + 1
        } else {
            0
        };
        last = now;
        seen == STABLE_CHECKS
    });
    last
}

/// Counts the threads that wait for locks on behalf of tasks.
fn waiting_threads() -> usize {
    // On Linux a thread without a name is just beginning or ending.
    let waits =
        |name: &&String| *name == "lockkit-wait" || (cfg!(target_os = "linux") && name.is_empty());
    crate::thread_names(std::process::id())
        .iter()
        .filter(waits)
        .count()
}
