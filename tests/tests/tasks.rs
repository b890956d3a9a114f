//! Locks that tasks wait for, and the other events that tasks can wait for.

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use lockkit::{
    AsyncLock, Backend, CancelToken, ErrorKind, FileLock, InMemoryLockManager, Lease, LeaseGuard,
    LeaseStatus, LockManager, LossReason, NamedLock, PidFile, Wait,
};
use lockkit_tests::async_conformance::runtime;
use lockkit_tests::{Kind, LIVELY, fresh_name, task_suite};
use tokio::time::timeout;

task_suite!(socket, lockkit_tests::Kind::NAMED_SOCKET);
task_suite!(machine, lockkit_tests::Kind::MACHINE_SOCKET);
#[cfg(windows)]
task_suite!(mutex, lockkit_tests::Kind::NAMED_MUTEX);
#[cfg(windows)]
task_suite!(machine_mutex, lockkit_tests::Kind::MACHINE_MUTEX);
task_suite!(named_file, lockkit_tests::Kind::NAMED_FILE);
task_suite!(file, lockkit_tests::Kind::FILE);
task_suite!(shared, lockkit_tests::Kind::FILE_SHARED);
task_suite!(pidfile, lockkit_tests::Kind::PIDFILE);
task_suite!(lease, lockkit_tests::Kind::LEASE);
#[cfg(target_os = "linux")]
task_suite!(etcd, lockkit_tests::Kind::ETCD, far);
#[cfg(target_os = "linux")]
task_suite!(postgres, lockkit_tests::Kind::POSTGRES, far);
#[cfg(target_os = "linux")]
task_suite!(redis, lockkit_tests::Kind::REDIS, far);
task_suite!(shm, lockkit_tests::Kind::SHM);
task_suite!(directory, lockkit_tests::Kind::DIRECTORY);
task_suite!(memory, lockkit_tests::Kind::MEMORY, alone);

/// A waker that needs no runtime: it unparks the waiting thread.
struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(result) => return result,
            Poll::Pending => std::thread::park(),
        }
    }
}

/// Builds a lease in a directory that lives as long as the test.
fn lease(directory: &tempfile::TempDir) -> Lease {
    Lease::file(directory.path().join("leader"))
        .build()
        .unwrap()
}

#[test]
fn acquire_async_future_and_guard_are_send() {
    fn check<L: AsyncLock<Guard: Send + 'static> + Send + Sync + 'static>(lock: L) {
        let name = std::any::type_name::<L>();
        let taken = runtime("several").block_on(async {
            let task =
                tokio::spawn(async move { lock.acquire_async(&Wait::at_most(LIVELY)).await });
            task.await.unwrap().map(drop)
        });
        assert!(taken.is_ok(), "{name}: {taken:?}");
    }
    let directory = tempfile::tempdir().unwrap();
    check(NamedLock::new(&fresh_name("lockkit-test")).unwrap());
    check(FileLock::new(directory.path().join("file")));
    check(PidFile::new(directory.path().join("pid")).unwrap());
    check(lease(&directory));
    check(InMemoryLockManager::new(1).unwrap().allocate().unwrap());
}

#[test]
fn file_waiters_keep_runtime_blocking_threads_free() {
    let directory = tempfile::tempdir().unwrap();
    let lock = FileLock::new(directory.path().join("file"));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .max_blocking_threads(1)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let guard = lock.acquire_async(&Wait::none()).await.unwrap();
        let waiters: Vec<_> = (0..8)
            .map(|_| {
                let lock = lock.clone();
                tokio::spawn(
                    async move { lock.acquire_async(&Wait::at_most(LIVELY)).await.map(drop) },
                )
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(20)).await;
        let done = timeout(LIVELY, tokio::task::spawn_blocking(|| 42)).await;
        assert_eq!(done.expect("a blocking thread is free").unwrap(), 42);
        drop(guard);
        for waiter in waiters {
            waiter.await.unwrap().unwrap();
        }
    });
}

#[test]
fn acquire_async_without_runtime_fails_only_for_sockets() {
    if Kind::NAMED_SOCKET.left_out().is_none() {
        let spec = Kind::NAMED_SOCKET.fresh();
        let lock = NamedLock::builder(spec.at())
            .backend(Backend::Socket)
            .build()
            .unwrap();
        let error = block_on(lock.acquire_async(&Wait::none())).unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::Unsupported { .. }),
            "{error}"
        );
        spec.clean();
    }
    let others = [
        Kind::NAMED_FILE,
        Kind::FILE,
        Kind::PIDFILE,
        Kind::LEASE,
        Kind::SHM,
        Kind::DIRECTORY,
        Kind::MEMORY,
    ];
    for kind in others.into_iter().filter(|kind| kind.left_out().is_none()) {
        let spec = kind.fresh();
        let (lock, rival) = (spec.open(), spec.rival());
        // A table in memory belongs to its handle.
        let rival = if kind.name() == "memory" {
            &lock
        } else {
            &rival
        };
        let guard = rival.acquire(&Wait::none()).unwrap();
        std::thread::scope(|scope| {
            let waiter =
                scope.spawn(|| block_on(lock.acquire_async(&Wait::at_most(LIVELY))).map(drop));
            std::thread::sleep(Duration::from_millis(5));
            assert!(!waiter.is_finished());
            drop(guard);
            waiter.join().unwrap().unwrap();
        });
        let token = CancelToken::new();
        token.cancel();
        assert!(
            block_on(lock.acquire_async(&Wait::forever().or_cancelled(&token)))
                .err()
                .unwrap()
                .is_cancelled()
        );
        spec.clean();
    }
}

#[test]
fn dropped_acquire_future_leaves_lock_free() {
    for flavor in ["one", "several"] {
        let kinds = [Kind::NAMED, Kind::FILE, Kind::LEASE, Kind::SHM];
        for kind in kinds.into_iter().filter(|kind| kind.left_out().is_none()) {
            let spec = kind.fresh();
            let (lock, rival) = (spec.open(), spec.rival());
            runtime(flavor).block_on(async {
                let forever = Wait::forever();
                drop(lock.acquire_async(&forever));
                let guard = rival.acquire(&Wait::none()).unwrap();
                let mut acquiring = lock.acquire_async(&forever);
                std::future::poll_fn(|context| {
                    assert!(acquiring.as_mut().poll(context).is_pending());
                    Poll::Ready(())
                })
                .await;
                drop(acquiring);
                drop(guard);
                drop(rival.acquire_async(&Wait::at_most(LIVELY)).await.unwrap());
            });
            spec.clean();
        }
    }
}

async fn acquire(lease: &Lease) -> LeaseGuard {
    lease.acquire_async(&Wait::at_most(LIVELY)).await.unwrap()
}

#[test]
fn lost_awaited_by_task_reports_reason() {
    let directory = tempfile::tempdir().unwrap();
    let lease = lease(&directory);
    for flavor in ["one", "several"] {
        runtime(flavor).block_on(async {
            let guard = acquire(&lease).await;
            let watchers = [(); 3].map(|()| tokio::spawn(guard.lost().into_future()));
            let LeaseStatus::Held(seen) = lease.status().unwrap() else {
                panic!("the lease is held")
            };
            assert!(lease.evict(&seen).unwrap());
            let reason = timeout(LIVELY, guard.lost())
                .await
                .expect("the loss is reported");
            assert!(!matches!(reason, LossReason::Released), "{reason}");
            for watcher in watchers {
                assert_eq!(
                    timeout(LIVELY, watcher).await.unwrap().unwrap().to_string(),
                    reason.to_string()
                );
            }
            // A later wait returns immediately.
            assert_eq!(guard.lost().await.to_string(), reason.to_string());
            assert!(!guard.is_held());
        });
    }
}

#[test]
fn lost_wait_async_ends_at_limit_or_cancellation() {
    let directory = tempfile::tempdir().unwrap();
    let lease = lease(&directory);
    runtime("one").block_on(async {
        let guard = acquire(&lease).await;
        let lost = guard.lost();
        assert!(lost.wait_async(&Wait::none()).await.unwrap_err().is_held());
        assert!(
            lost.wait_async(&Wait::at_most(Duration::from_millis(5)))
                .await
                .unwrap_err()
                .is_timeout()
        );
        let token = CancelToken::new();
        let wait = Wait::forever().or_cancelled(&token);
        let (ended, ()) = tokio::join!(lost.wait_async(&wait), async { token.cancel() });
        assert!(ended.unwrap_err().is_cancelled());
        guard.release_async().await.unwrap();
        let reason = lost.wait_async(&Wait::forever()).await.unwrap();
        assert!(matches!(reason, LossReason::Released), "{reason}");
    });
    let error = block_on(
        runtime("one")
            .block_on(acquire(&lease))
            .lost()
            .wait_async(&Wait::forever()),
    )
    .unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::Unsupported { .. }),
        "{error}"
    );
}

#[test]
fn release_async_frees_lease_and_reports_loss() {
    let directory = tempfile::tempdir().unwrap();
    let lease = lease(&directory);
    runtime("one").block_on(async {
        acquire(&lease).await.release_async().await.unwrap();
        assert_eq!(lease.status().unwrap(), LeaseStatus::Free);
        // The release completes even if its future is dropped after the first poll.
        let mut releasing = Box::pin(acquire(&lease).await.release_async());
        std::future::poll_fn(|context| {
            let _ = releasing.as_mut().poll(context);
            Poll::Ready(())
        })
        .await;
        drop(releasing);
        let guard = acquire(&lease).await;
        let LeaseStatus::Held(seen) = lease.status().unwrap() else {
            panic!("the lease is held")
        };
        lease.evict(&seen).unwrap();
        let error = guard.release_async().await.unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::LeaseLost { .. }),
            "{error}"
        );
    });
}

#[test]
fn cancel_token_wakes_every_waiting_task() {
    for flavor in ["one", "several"] {
        runtime(flavor).block_on(async {
            let token = CancelToken::new();
            let waiters = [(); 20].map(|()| {
                let token = token.clone();
                tokio::spawn(async move { token.cancelled().await })
            });
            assert!(
                timeout(Duration::from_millis(5), token.cancelled())
                    .await
                    .is_err()
            );
            token.cancel();
            for waiter in waiters {
                timeout(LIVELY, waiter)
                    .await
                    .expect("the waiter is woken")
                    .unwrap();
            }
            token.cancelled().await;
        });
    }
}

#[test]
fn single_instance_async_function_runs_once() {
    #[lockkit::single_instance("lockkit-test-under-a-runtime")]
    async fn work(meanwhile: impl Future<Output = ()>) -> Result<(), lockkit::Error> {
        meanwhile.await;
        Ok(())
    }
    runtime("several").block_on(async {
        let first = work(async {
            let second = work(async {}).await;
            assert!(second.unwrap_err().is_held());
            let lock = NamedLock::new("lockkit-test-under-a-runtime").unwrap();
            assert!(
                lock.acquire_async(&Wait::none())
                    .await
                    .unwrap_err()
                    .is_held()
            );
        });
        first.await.unwrap();
        work(async {}).await.unwrap();
    });
}
