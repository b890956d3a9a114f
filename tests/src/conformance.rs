//! The cases that every kind of lock must pass.
//!
//! Each case is a function of the [`Kind`]. [`conformance!`](crate::conformance!) makes a test of
//! each for one kind. A new kind gets all cases through a [`Fixture`](crate::fixtures::Fixture).

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use lockkit::{CancelToken, Wait};

use crate::fixtures::AnyGuard;
use crate::wine::{DELETED, is_wine, wine_cannot_judge};
use crate::{
    Actor, Belongings, Kind, LIVELY, Spec, chaos, crash_points, kill_pid, program, resume, sleeps,
    stop, thread_id, until,
};

/// Makes a module `$module` with a test for every case of the suite, for one kind of lock.
#[macro_export]
macro_rules! conformance {
    ($module:ident, $kind:expr) => {
        $crate::conformance!($module, $kind;
            acquire_after_release_succeeds_for_every_wait,
            acquire_held_in_same_process_refused_until_release,
            acquire_after_timeout_succeeds_once_released,
            cancel_during_wait_ends_wait_at_once,
            acquire_free_lock_with_cancelled_token_is_cancelled,
            acquire_of_second_lock_is_independent,
            release_by_other_process_serves_waiter,
            kill_of_holder_serves_waiter_and_reports_death,
            acquire_after_kill_of_holder_reports_death,
            kill_of_waiter_does_not_delay_next_waiter,
            stopped_waiter_after_timeout_never_acquires,
            count_under_lock_by_ten_processes_loses_nothing,
            spawn_while_held_child_does_not_inherit_lock,
            fork_while_held_child_does_not_inherit_lock,
            fork_at_any_moment_child_does_not_keep_lock,
            guard_drop_in_forked_child_does_not_release,
            wait_after_timeout_or_cancel_leaks_nothing,
            release_during_spawn_frees_lock,
            panic_of_holder_thread_releases,
            guard_drop_on_other_thread_releases,
            acquire_with_descriptor_zero_works_as_usual,
            acquire_without_free_descriptor_fails_then_recovers,
            crash_at_any_step_does_not_block_next_holder,
            chaos_of_kills_and_stops_keeps_exclusion,
        );
    };
    ($module:ident, $kind:expr; $($case:ident,)*) => {
        mod $module {
            $(#[test]
            fn $case() {
                $crate::fixtures::run_or_leave_out($kind, $crate::conformance::$case);
            })*
        }
    };
}

/// Returns whether processes can be forked. Reports a case as left out where they cannot.
pub(crate) fn processes_fork() -> bool {
    if !cfg!(unix) {
        crate::left_out("there is no fork on this system");
    }
    cfg!(unix)
}

/// Returns whether descriptors have numbers and a limit that a test can set. Reports a case as left
/// out where they have not.
fn descriptors_are_numbers() -> bool {
    if !cfg!(target_os = "linux") {
        crate::left_out(
            "this system has no descriptor 0, and no limit of descriptors that a test can set",
        );
    }
    cfg!(target_os = "linux")
}

/// A short wait, for waiters that are meant to time out.
const SHORT: Wait = Wait::at_most(Duration::from_millis(20));

#[allow(missing_docs)] // Each name states the operation, the condition and the result.
mod cases {
    use super::*;

    pub fn acquire_after_release_succeeds_for_every_wait(kind: Kind) {
        let spec = kind.fresh();
        let lock = spec.open();
        for wait in [Wait::none(), Wait::forever(), Wait::at_most(LIVELY), SHORT] {
            let guard = lock.acquire(&wait).unwrap();
            assert_eq!(guard.recovered(), None);
            guard.release().unwrap();
        }
        spec.clean();
    }

    pub fn acquire_held_in_same_process_refused_until_release(kind: Kind) {
        let spec = kind.fresh();
        let lock = spec.open();
        let guard = lock.acquire(&Wait::none()).unwrap();
        for contender in [&lock, &spec.open()] {
            let error = contender.acquire(&Wait::none()).err().unwrap();
            assert!(error.is_held() && error.is_temporary(), "{error}");
            assert!(contender.acquire(&SHORT).err().unwrap().is_timeout());
        }
        drop(guard);
        lock.acquire(&Wait::none()).unwrap();
        spec.clean();
    }

    pub fn acquire_after_timeout_succeeds_once_released(kind: Kind) {
        let spec = kind.fresh();
        let mut holder = Actor::start(&spec);
        holder.expect("lock", "held");
        let lock = spec.open();
        for _ in 0..3 {
            assert!(lock.acquire(&SHORT).err().unwrap().is_timeout());
        }
        holder.expect("release", "released");
        lock.acquire(&Wait::none()).unwrap();
        spec.clean();
    }

    pub fn cancel_during_wait_ends_wait_at_once(kind: Kind) {
        let spec = kind.fresh();
        let lock = spec.open();
        let guard = lock.acquire(&Wait::none()).unwrap();
        for wait in [Wait::forever(), Wait::at_most(LIVELY)] {
            let token = CancelToken::new();
            let wait = wait.or_cancelled(&token);
            std::thread::scope(|scope| {
                let (send, thread) = std::sync::mpsc::channel();
                let waiter = scope.spawn(|| {
                    send.send(thread_id()).unwrap();
                    drop(send);
                    lock.acquire(&wait).err().unwrap()
                });
                let thread = thread.recv().unwrap();
                until("the waiter sleeps", || sleeps(std::process::id(), thread));
                token.cancel();
                assert!(waiter.join().unwrap().is_cancelled());
            });
        }
        drop(guard);
        lock.acquire(&Wait::none()).unwrap();
        spec.clean();
    }

    pub fn acquire_free_lock_with_cancelled_token_is_cancelled(kind: Kind) {
        let spec = kind.fresh();
        let token = CancelToken::new();
        token.cancel();
        let lock = spec.open();
        assert!(
            lock.acquire(&Wait::none().or_cancelled(&token))
                .err()
                .unwrap()
                .is_cancelled()
        );
        lock.acquire(&Wait::none()).unwrap();
        spec.clean();
    }

    pub fn acquire_of_second_lock_is_independent(kind: Kind) {
        let (one, other) = (kind.fresh(), kind.fresh());
        let _first = one.open().acquire(&Wait::none()).unwrap();
        let _second = other.open().acquire(&Wait::none()).unwrap();
        one.clean();
        other.clean();
    }

    pub fn release_by_other_process_serves_waiter(kind: Kind) {
        let spec = kind.fresh();
        let (mut holder, mut waiter) = (Actor::start(&spec), Actor::start(&spec));
        for command in ["lock", "lock-for 30000"] {
            holder.expect("try", "held");
            waiter.tell_to_wait(command);
            waiter.expect_silence();
            holder.expect("release", "released");
            assert_eq!(waiter.answer(), "held");
            assert!(holder.ask("try").starts_with("error Held"));
            waiter.expect("release", "released");
        }
        spec.clean();
    }

    pub fn kill_of_holder_serves_waiter_and_reports_death(kind: Kind) {
        let spec = kind.fresh();
        let (mut holder, mut waiter) = (Actor::start(&spec), Actor::start(&spec));
        holder.expect("lock", "held");
        waiter.tell_to_wait("lock");
        holder.kill();
        assert_eq!(waiter.answer(), told(kind, holder.pid()));
        waiter.expect("release", "released");
        Actor::start(&spec).expect("try", "held");
        spec.clean();
    }

    pub fn acquire_after_kill_of_holder_reports_death(kind: Kind) {
        let spec = kind.fresh();
        let mut holder = Actor::start(&spec);
        holder.expect("lock", "held");
        holder.kill();
        let mut next = Actor::start(&spec);
        next.expect("try", &told(kind, holder.pid()));
        next.expect("release", "released");
        next.expect("try", "held");
        spec.clean();
    }

    pub fn kill_of_waiter_does_not_delay_next_waiter(kind: Kind) {
        let spec = kind.fresh();
        let [mut holder, mut killed_waiter, mut next] = [(); 3].map(|()| Actor::start(&spec));
        holder.expect("lock", "held");
        killed_waiter.tell_to_wait("lock");
        next.tell_to_wait("lock");
        killed_waiter.kill();
        holder.expect("release", "released");
        assert_eq!(next.answer(), "held");
        spec.clean();
    }

    pub fn stopped_waiter_after_timeout_never_acquires(kind: Kind) {
        let spec = kind.fresh();
        let [mut holder, mut stopped, mut next] = [(); 3].map(|()| Actor::start(&spec));
        holder.expect("lock", "held");
        time_out(&mut stopped);
        stop(stopped.pid());
        next.tell_to_wait("lock");
        holder.expect("release", "released");
        assert_eq!(next.answer(), "held");
        resume(stopped.pid());
        assert!(stopped.ask("try").starts_with("error Held"));
        spec.clean();
    }

    /// Waits for a moment and times out. A server may take longer than that to report that the lock
    /// is held.
    fn time_out(waiter: &mut Actor) {
        let answer = waiter.ask("lock-for 1");
        assert!(
            answer.starts_with("error Timeout") || answer.starts_with("error Store"),
            "{answer}"
        );
    }

    pub fn count_under_lock_by_ten_processes_loses_nothing(kind: Kind) {
        let spec = kind.fresh();
        let directory = tempfile::tempdir().unwrap();
        let counter = directory.path().join("counter");
        std::fs::write(&counter, "0").unwrap();
        // Under Wine each round takes many times as long.
        let rounds = if is_wine() { 20 } else { 200 };
        let workers: Vec<_> = (0..10)
            .map(|_| {
                let mut command = Command::new(program("actor"));
                command
                    .arg(spec.invite())
                    .arg("stress")
                    .arg(&counter)
                    .arg(rounds.to_string());
                crate::wine::spawn(command.stdin(Stdio::null())).unwrap()
            })
            .collect();
        for mut worker in workers {
            assert!(worker.wait().unwrap().success());
        }
        assert_eq!(
            std::fs::read_to_string(counter).unwrap(),
            (10 * rounds).to_string()
        );
        spec.clean();
    }

    pub fn spawn_while_held_child_does_not_inherit_lock(kind: Kind) {
        check_child_does_not_inherit("spawn", "spawned ", kind);
    }

    pub fn fork_while_held_child_does_not_inherit_lock(kind: Kind) {
        if processes_fork() {
            check_child_does_not_inherit("fork", "forked ", kind);
        }
    }

    /// The child outlives the release once, and its killed parent once.
    fn check_child_does_not_inherit(command: &str, answer: &str, kind: Kind) {
        let spec = kind.fresh();
        for killed in [false, true] {
            let mut holder = Actor::start(&spec);
            holder.expect("lock", "held");
            let child = holder.ask(command);
            let child: u32 = child.strip_prefix(answer).expect(&child).parse().unwrap();
            let mut next = Actor::start(&spec);
            assert!(next.ask("try").starts_with("error Held"));
            if killed {
                holder.kill();
                if command == "fork" && kind.is_kept_by_forked_child() {
                    assert!(next.ask("try").starts_with("error Held"));
                    kill_pid(child);
                    next.tell("lock");
                    assert_eq!(next.answer(), told(kind, holder.pid()));
                    next.expect("release", "released");
                    continue;
                }
                next.expect("try", &told(kind, holder.pid()));
            } else {
                holder.expect("release", "released");
                next.expect("try", "held");
            }
            next.expect("release", "released");
            kill_pid(child);
        }
        spec.clean();
    }

    pub fn fork_at_any_moment_child_does_not_keep_lock(kind: Kind) {
        if !processes_fork() {
            return;
        }
        let spec = kind.fresh();
        Actor::start(&spec).expect("fork-often", "free");
        spec.clean();
    }

    pub fn guard_drop_in_forked_child_does_not_release(kind: Kind) {
        if !processes_fork() {
            return;
        }
        let spec = kind.fresh();
        let (mut holder, mut next) = (Actor::start(&spec), Actor::start(&spec));
        holder.expect("lock", "held");
        holder.expect("fork-drop", "dropped");
        assert!(next.ask("try").starts_with("error Held"));
        next.tell_to_wait("lock");
        holder.expect("release", "released");
        assert_eq!(next.answer(), "held");
        spec.clean();
    }

    pub fn wait_after_timeout_or_cancel_leaks_nothing(kind: Kind) {
        let spec = kind.fresh();
        let mut holder = Actor::start(&spec);
        holder.expect("lock", "held");
        let mut waiter = Actor::start(&spec);
        let mut give_up = || {
            time_out(&mut waiter);
            let answer = waiter.ask("lock-cancelled 1");
            assert!(
                answer.starts_with("error Cancelled") || answer.starts_with("error Store"),
                "{answer}"
            );
            Belongings::of(waiter.pid())
        };
        // The first waits create resources for all later waits. These exist after some waits.
        let mut before = give_up();
        for _ in 0..200 {
            before = give_up();
        }
        for _ in 0..200 {
            give_up();
        }
        until("the waiter has the same belongings as before", || {
            give_up() == before
        });
        holder.expect("release", "released");
        waiter.expect("try", "held");
        spec.clean();
    }

    pub fn release_during_spawn_frees_lock(kind: Kind) {
        let spec = kind.fresh();
        let lock = spec.open();
        std::thread::scope(|scope| {
            let starter = scope.spawn(|| {
                for _ in 0..if is_wine() { 10 } else { 100 } {
                    let mut started = Command::new(if cfg!(windows) { "cmd" } else { "true" });
                    started.args(if cfg!(windows) {
                        &["/c", "exit"][..]
                    } else {
                        &[]
                    });
                    assert!(started.status().unwrap().success());
                }
            });
            while !starter.is_finished() {
                drop(lock.acquire(&Wait::none()).unwrap());
            }
        });
        spec.clean();
    }

    pub fn panic_of_holder_thread_releases(kind: Kind) {
        let spec = kind.fresh();
        let mut panics = Actor::start(&spec);
        panics.expect("panic", "panicked");
        Actor::start(&spec).expect("try", "held");
        spec.clean();
    }

    pub fn guard_drop_on_other_thread_releases(kind: Kind) {
        let spec = kind.fresh();
        let lock = spec.open();
        let guard: Box<dyn AnyGuard> = lock.acquire(&Wait::none()).unwrap();
        std::thread::spawn(move || drop(guard)).join().unwrap();
        lock.acquire(&Wait::none()).unwrap();
        spec.clean();
    }

    pub fn acquire_with_descriptor_zero_works_as_usual(kind: Kind) {
        if !descriptors_are_numbers() {
            return;
        }
        let spec = kind.fresh();
        let mut command = Command::new(program("actor"));
        command
            .arg(spec.invite())
            .arg("closed-input")
            .stdin(Stdio::null());
        assert!(command.status().unwrap().success());
        spec.clean();
    }

    pub fn acquire_without_free_descriptor_fails_then_recovers(kind: Kind) {
        if !descriptors_are_numbers() {
            return;
        }
        let spec = kind.fresh();
        let mut limited = Actor::start_with(&spec, |command| {
            // The limit is low, so that it is reached soon.
            let program = command.get_program().to_owned();
            let spec = spec.invite();
            *command = Command::new("sh");
            command
                .args(["-c", "ulimit -n 64 && exec \"$0\" \"$1\""])
                .arg(program)
                .arg(spec);
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
        });
        limited.expect("use-descriptors", "used");
        for command in ["try", "lock", "lock-for 1000"] {
            let answer = limited.ask(command);
            if !kind.needs_descriptors() {
                assert_eq!(answer, "held");
                limited.expect("release", "released");
                continue;
            }
            assert!(
                answer.starts_with("error Io") && answer.contains("(os error 24)"),
                "{answer}"
            );
        }
        let mut other = Actor::start(&spec);
        other.expect("try", "held");
        other.expect("release", "released");
        limited.expect("free-descriptors", "freed");
        limited.expect("lock", "held");
        limited.expect("use-descriptors", "used");
        if !kind.has_descriptor_while_held() {
            // The heartbeat releases the lock once descriptors are available again.
            let answer = limited.ask("release");
            assert!(
                answer.starts_with("error Io") && answer.contains("(os error 24)"),
                "{answer}"
            );
            limited.expect("free-descriptors", "freed");
            other.expect("lock", "held");
            spec.clean();
            return;
        }
        limited.expect("release", "released");
        other.expect("try", "held");
        spec.clean();
    }

    pub fn crash_at_any_step_does_not_block_next_holder(kind: Kind) {
        crash_points::kill_at_every_step(kind);
    }

    pub fn chaos_of_kills_and_stops_keeps_exclusion(kind: Kind) {
        let seconds = std::env::var("LOCKKIT_CHAOS_SECONDS")
            .map_or(20, |text| text.parse().expect("whole seconds"));
        if kind.name() == "pidfile" && wine_cannot_judge(DELETED) {
            return;
        }
        let tally = chaos::run(kind, Duration::from_secs(seconds));
        println!("{kind:?}: {tally:?}");
        // Under Wine the start of a process takes so long that all counts are lower.
        let minimum = if is_wine() { 10 } else { 100 };
        let is_enough =
            tally.holds > minimum && tally.kills > 10 && (tally.died_as_holder > 0 || is_wine());
        assert!(is_enough, "too few kills: {tally:?}");
    }
}
pub use cases::*;

/// Returns the expected answer of the owner after a killed one.
pub(crate) fn told(kind: Kind, died: u32) -> String {
    match kind.reports_deaths() {
        true => format!("held recovered {died}"),
        false => "held".to_owned(),
    }
}

/// Acts as a worker of the counting case: reads a number and writes the next one, which requires
/// exclusion.
pub fn count_up(spec: &Spec, counter: &Path, rounds: u32) {
    let lock = spec.open();
    for _ in 0..rounds {
        let _guard = lock.acquire(&Wait::forever()).expect("the lock");
        let count: u32 = std::fs::read_to_string(counter)
            .expect("a counter")
            .parse()
            .expect("a number");
        std::fs::File::create(counter)
            .expect("a counter")
            .write_all((count + 1).to_string().as_bytes())
            .expect("room");
    }
}

#[cfg(target_os = "linux")]
/// Closes standard input, so that the lock gets descriptor 0, and checks that everything works as
/// usual.
pub fn lock_on_descriptor_zero(spec: &Spec) {
    nix::unistd::close(0).expect("standard input was open");
    let lock = spec.open();
    let guard = lock.acquire(&Wait::none()).expect("free");
    assert_eq!(
        std::fs::symlink_metadata("/proc/self/fd/0").is_ok(),
        spec.kind().has_descriptor_while_held()
    );
    assert!(
        spec.rival()
            .acquire(&Wait::none())
            .err()
            .expect("held")
            .is_held()
    );
    drop(guard);
    drop(spec.open().acquire(&Wait::none()).expect("free again"));
}
