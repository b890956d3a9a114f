//! Guarantees of Wait and CancelToken among processes.

#[cfg(target_os = "linux")]
use std::process::exit;

#[cfg(target_os = "linux")]
use lockkit::{CancelToken, NamedLock, Wait};
#[cfg(target_os = "linux")]
use lockkit_tests::{fresh_name, sleeps, thread_id, until};
#[cfg(target_os = "linux")]
use rustix::process::{Pid, WaitOptions, waitpid};

#[cfg(target_os = "linux")]
#[test]
fn cancel_in_forked_child_does_not_cancel_parent() {
    let lock = NamedLock::new(&fresh_name("lockkit-test")).unwrap();
    let _held = lock.lock().unwrap();
    let token = CancelToken::new();
    std::thread::scope(|scope| {
        let (send, thread) = std::sync::mpsc::channel();
        let waiter = scope.spawn({
            let (lock, token) = (&lock, &token);
            move || {
                send.send(thread_id()).unwrap();
                lock.acquire(&Wait::forever().or_cancelled(token))
                    .unwrap_err()
            }
        });
        let thread = thread.recv().unwrap();
        until("the waiter sleeps", || sleeps(std::process::id(), thread));
        match fork::fork().unwrap() {
            fork::Fork::Child => {
                token.cancel();
                exit(0);
            }
            fork::Fork::Parent(child) => {
                waitpid(Pid::from_raw(child), WaitOptions::empty()).unwrap();
            }
        }
        assert!(!token.is_cancelled() && !waiter.is_finished());
        token.cancel();
        assert!(waiter.join().unwrap().is_cancelled());
    });
}

lockkit_tests::left_out! { "there is no fork on this system":
    cancel_in_forked_child_does_not_cancel_parent,
}
