//! Kills a process at every step of acquiring and releasing a lock. Checks that no process is
//! blocked or misled afterwards.
//!
//! The steps are failpoints in the library (`lockkit::failpoint`), so the list is what a run really
//! passes. A scenario runs once to record the steps, and then once more for each step, with a kill
//! there.

#[cfg(target_os = "linux")]
use std::collections::HashMap;

use lockkit::Wait;

#[cfg(target_os = "linux")]
use crate::fault_injection::{self, Strace};
use crate::wine::{DELETED, wine_cannot_judge};
use crate::{Actor, Kind, Spec};

/// The scenarios of the victim. In each the victim acquires the lock and releases it.
///
/// - `alone`: there is no other process.
/// - `waiting`: the lock is held at first, and handed over.
/// - `followed`: another process waits when the victim releases.
/// - `forked`: as `followed`, and just before the kill the victim forks a child that lives on. Only
///   [`kill_holder_with_forked_child`] uses it.
const SCENARIOS: [&str; 3] = ["alone", "waiting", "followed"];

/// Acts as the victim: plays `scenario`, is killed at the given step, and prints the steps that it
/// passed.
pub fn run_scenario(spec: &Spec, scenario: &str) {
    let mut lines = crate::commands();
    let mut next = || lines.next().expect("a command");
    let command = next();
    let (stop, at) = command
        .strip_prefix("stop ")
        .map_or((false, &*command), |at| (true, at));
    let at: usize = at.parse().expect("the number of a step");
    let lock = spec.open();
    println!("ready");
    assert_eq!(next(), "go");
    match stop {
        true => crate::failpoint::stop_at(at),
        #[cfg(unix)]
        false if scenario == "forked" => {
            crate::failpoint::kill_at_after(at, |passed| match fork_by_thread() {
                Some(child) => println!("left {child}"),
                None => println!("killed after {}", passed.join(", ")),
            })
        }
        false => crate::failpoint::kill_at_after(at, |passed| {
            println!("killed after {}", passed.join(", "))
        }),
    }
    crate::helper_process::announce();
    let guard = lock.acquire(&Wait::forever()).expect("the lock");
    if ["followed", "forked"].contains(&scenario) {
        println!("held");
        assert_eq!(next(), "go");
    }
    drop(guard);
    let passed = crate::failpoint::passed();
    println!("passed {}", passed.join(", "));
}

/// Lets another thread fork a child that lives on for a while. Returns `None` while forks are held
/// off.
#[cfg(unix)]
fn fork_by_thread() -> Option<i32> {
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || match fork::fork() {
        Ok(fork::Fork::Parent(child)) => _ = send.send(child),
        _ => {
            std::thread::sleep(2 * crate::LIVELY);
            std::process::exit(0);
        }
    });
    receive
        .recv_timeout(std::time::Duration::from_millis(200))
        .ok()
}

/// Kills a process at every step in every scenario.
pub fn kill_at_every_step(kind: Kind) {
    if !crate::failpoint::are_enabled() {
        return;
    }
    for scenario in SCENARIOS {
        if scenario == "followed" && kind.name() == "pidfile" && wine_cannot_judge(DELETED) {
            continue;
        }
        let steps = (1..)
            .find_map(|at| kill_at(kind, scenario, at))
            .expect("a run that survives");
        println!("{kind:?} {scenario}: {steps}");
        // The lock is acquired at one step, and released at another.
        assert!(
            steps.contains(", "),
            "the scenario passes fewer than two steps"
        );
    }
}

/// Kills a holder with a waiter at every step, just after another of its threads has forked a child
/// that lives on. The waiter acquires nevertheless.
#[cfg(target_os = "linux")]
pub fn kill_holder_with_forked_child(kind: Kind) {
    if !crate::failpoint::are_enabled() {
        return;
    }
    let mut left = 0;
    for at in 1.. {
        let spec = kind.fresh();
        let mut waiter = Actor::start(&spec);
        let mut victim = Actor::start_with(&spec, |command| _ = command.arg("steps").arg("forked"));
        victim.expect(&at.to_string(), "ready");
        let mut last = victim.ask("go");
        if last == "held" {
            waiter.tell_to_wait("lock");
            victim.tell("go");
            last = victim.answer();
        } else {
            waiter.tell("lock");
        }
        let is_over = last.starts_with("passed ");
        let answer = waiter.answer();
        assert!(answer.starts_with("held"), "killed at step {at}: {answer}");
        waiter.expect("release", "released");
        if let Some(child) = last.strip_prefix("left ") {
            left += 1;
            let child =
                rustix::process::Pid::from_raw(child.parse().expect("a pid")).expect("a pid");
            rustix::process::kill_process(child, rustix::process::Signal::KILL)
                .expect("the child lives");
        } else {
            assert!(is_over || last.starts_with("killed after "), "{last}");
        }
        spec.clean();
        if is_over {
            break;
        }
    }
    assert!(left > 3, "too few children were forked");
}

/// Stops a holder at every step of a release to a waiter. The waiter may hold the lock by then, or
/// acquire it when the holder continues. If the waiter holds it, the waiter can release it, and
/// others acquire it, while the holder stays stopped.
#[cfg(target_os = "linux")]
pub fn stop_at_every_step_of_a_release(kind: Kind) {
    if !crate::failpoint::are_enabled() {
        return;
    }
    let mut handed_over = 0;
    for at in 1.. {
        let spec = kind.fresh();
        let [mut waiter, mut third] = [(); 2].map(|()| Actor::start(&spec));
        let mut victim =
            Actor::start_with(&spec, |command| _ = command.arg("steps").arg("followed"));
        victim.expect(&format!("stop {at}"), "ready");
        victim.tell("go");
        let answer = crate::until_some("the victim holds, or is stopped", || {
            victim
                .answered()
                .or_else(|| crate::is_stopped(victim.pid()).then(|| "stopped".to_owned()))
        });
        if answer == "stopped" {
            // A step of the acquisition.
            victim.signal(rustix::process::Signal::CONT);
            continue;
        }
        assert_eq!(answer, "held");
        waiter.tell_to_wait("lock");
        victim.tell("go");
        let answer = crate::until_some("the victim has released, or is stopped", || {
            victim
                .answered()
                .or_else(|| crate::is_stopped(victim.pid()).then(|| "stopped".to_owned()))
        });
        let is_over = answer != "stopped";
        // Everything that wakes the waiter has happened. So the waiter sleeps on, or is about to
        // acquire.
        let mut held = None;
        crate::until("the waiter sleeps or holds", || {
            held = waiter.answered();
            held.is_some() || waiter.waits()
        });
        if let Some(answer) = held {
            handed_over += 1;
            assert_eq!(answer, "held", "stopped at step {at}");
            waiter.expect("release", "released");
            third.expect("lock-for 5000", "held");
            third.expect("release", "released");
            victim.signal(rustix::process::Signal::CONT);
        } else {
            victim.signal(rustix::process::Signal::CONT);
            assert_eq!(waiter.answer(), "held", "stopped at step {at}");
            waiter.expect("release", "released");
        }
        Actor::start(&spec).expect("try", "held");
        spec.clean();
        if is_over {
            break;
        }
    }
    assert!(
        handed_over >= 1,
        "the waiter never held while the holder was stopped"
    );
}

/// Returns whether a process that died after these steps has left a record that it held the lock.
fn is_written(steps: &str) -> bool {
    const WRITTEN: [&str; 4] = [
        "holder recorded",
        "file named",
        "lock word acquired",
        "record written",
    ];
    const CLEARED: [&str; 6] = [
        "words of a record written",
        "record cleared",
        "receiver recorded",
        "file removed",
        "lock word released",
        "record freed",
    ];
    let last = steps
        .rsplit(", ")
        .find(|step| WRITTEN.contains(step) || CLEARED.contains(step));
    last.is_some_and(|step| WRITTEN.contains(&step))
}

/// Plays `scenario` with a kill at step `at`. Checks that the next process acquires the lock, and
/// that its guard reports the death if the victim held the lock. Returns the steps that the victim
/// passed, if the victim survived.
fn kill_at(kind: Kind, scenario: &str, at: usize) -> Option<String> {
    let spec = kind.fresh();
    let mut other = Actor::start(&spec);
    let mut victim = Actor::start_with(&spec, |command| {
        command.arg("steps").arg(scenario);
    });
    victim.expect(&at.to_string(), "ready");
    let mut last = match scenario {
        "waiting" => {
            other.expect("lock", "held");
            victim.tell("go");
            victim.wait_until_it_waits_or_ends();
            other.expect("release", "released");
            victim.answer()
        }
        _ => victim.ask("go"),
    };
    if scenario == "followed" && last == "held" {
        other.tell_to_wait("lock");
        victim.tell("go");
        last = victim.answer();
    }
    let survived = last.strip_prefix("passed ").map(str::to_owned);
    let is_reported = last
        .strip_prefix("killed after ")
        .map(|steps| kind.reports_deaths() && is_written(steps));
    assert!(survived.is_some() || is_reported.is_some(), "{last}");
    victim.kill();
    let answer = match scenario {
        "followed" if other.is_busy() => other.answer(),
        // Where a file is created in place, an empty file of a dead process counts as held for some
        // seconds.
        _ => other.ask(if cfg!(target_os = "linux") {
            "lock-for 5000"
        } else {
            "lock-for 20000"
        }),
    };
    let is_expected = match is_reported {
        Some(true) => answer == format!("held recovered {}", victim.pid()),
        // Where a record is created in place, an empty record reports a death without the owner.
        Some(false) if !cfg!(target_os = "linux") => {
            ["held", "held recovered 0"].contains(&answer.as_str())
        }
        _ => answer == "held",
    };
    assert!(is_expected, "{kind:?} {scenario}, {last}: {answer}");
    other.expect("release", "released");
    Actor::start(&spec).expect("try", "held");
    spec.clean();
    survived
}

/// Returns whether the steps of a process can be observed. Reports a test as left out where they
/// cannot.
#[cfg(target_os = "linux")]
fn steps_are_observable() -> bool {
    crate::failpoint::are_enabled() && fault_injection::calls_can_fail()
}

/// Checks that a process that acquires and releases a lock passes a step between every two system
/// calls that change something visible to other processes.
#[cfg(target_os = "linux")]
pub fn stand_between_changes(kind: Kind) {
    if !steps_are_observable() {
        return;
    }
    for scenario in SCENARIOS {
        let spec = kind.fresh();
        stand_between_changes_at(&spec, scenario);
        spec.clean();
    }
}

/// As [`stand_between_changes`], with a lock that another process may have left behind, in one
/// scenario.
#[cfg(target_os = "linux")]
pub fn stand_between_changes_at(spec: &Spec, scenario: &str) {
    if !steps_are_observable() {
        return;
    }
    let mut other = Actor::start(spec);
    let mut process = Actor::start_with(spec, |command| {
        command.arg("steps").arg(scenario);
    });
    process.expect(&usize::MAX.to_string(), "ready");
    if scenario == "waiting" {
        other.expect("lock", "held");
    }
    let mut strace = Strace::attach(&process, &[]);
    process.tell("go");
    match scenario {
        "waiting" => {
            process.wait_until_it_waits_or_ends();
            other.expect("release", "released");
        }
        "followed" => {
            assert_eq!(process.answer(), "held");
            other.tell_to_wait("lock");
            process.tell("go");
        }
        _ => {}
    }
    let passed = process.answer();
    check_steps(&format!("{:?} {scenario}", spec.kind()), &strace.end());
    let passed = passed
        .strip_prefix("passed ")
        .expect("the scenario completes");
    println!("{:?} {scenario}: {passed}", spec.kind());
    assert!(
        !passed.is_empty(),
        "{:?} has no steps in {scenario}",
        spec.kind()
    );
}

/// As [`stand_between_changes`], for the commands that `process`, which is armed already, receives.
#[cfg(target_os = "linux")]
pub fn stand_between_changes_of(process: &mut Actor, commands: &[&str]) {
    if !steps_are_observable() {
        return;
    }
    for command in commands {
        let mut strace = Strace::attach(process, &[]);
        let answer = process.ask(command);
        assert!(!answer.starts_with("error"), "{answer}");
        let seen = check_steps(command, &strace.end());
        println!("{command}: {seen} steps");
        assert!(seen > 0, "no step in {command}");
    }
}

/// As [`stand_between_changes_of`], for the background work of a process, such as the renewal of a
/// lease.
#[cfg(target_os = "linux")]
pub fn stand_between_changes_of_the_others(process: &mut Actor) {
    if !steps_are_observable() {
        return;
    }
    let mut strace = Strace::attach(process, &[]);
    crate::until("it has renewed", || {
        strace.so_far().matches("pwrite64(").count() >= 2
    });
    assert!(
        check_steps("a renewal", &strace.end()) > 0,
        "no step in a renewal"
    );
}

/// Checks the strace log of a process with steps. Returns the number of steps.
#[cfg(target_os = "linux")]
fn check_steps(what: &str, log: &str) -> usize {
    const CHANGES: [&str; 23] = [
        "accept4",
        "bind",
        "chmod",
        "connect",
        "fallocate",
        "fchmod",
        "fdatasync",
        "flock",
        "fsetxattr",
        "fsync",
        "ftruncate",
        "linkat",
        "listen",
        "mkdir",
        "pwrite64",
        "recvmsg",
        "rename",
        "renameat2",
        "sendmsg",
        "sendto",
        "shutdown",
        "unlink",
        "utimensat",
    ];
    let mut steps = 0;
    // What each thread has changed since its last step.
    let mut changed: HashMap<&str, String> = HashMap::new();
    let mut unfinished: HashMap<&str, String> = HashMap::new();
    for line in log.lines() {
        let Some((thread, call)) = line.split_once(' ') else {
            continue;
        };
        // A call that another thread's line has split is joined again.
        let whole = match call.split_once(" resumed>") {
            Some((_, end)) => format!("{}{end}", unfinished.remove(thread).unwrap_or_default()),
            None => call.trim_start().to_owned(),
        };
        if let Some((begin, _)) = whole.split_once(" <unfinished") {
            unfinished.insert(thread, begin.to_owned());
            continue;
        }
        let Some((name, rest)) = whole.split_once('(') else {
            continue;
        };
        // A joined call has blanks before the result.
        let failed = rest
            .rsplit_once(" = ")
            .is_some_and(|(_, result)| result.starts_with("-1 "));
        let creates =
            rest.contains("O_CREAT") || rest.contains("O_TMPFILE") || rest.contains("F_OFD_SETLK");
        // A request to a server can take several writes, and changes nothing before it is complete.
        let is_of_request = name == "sendto" && !rest.contains("MSG_DONTWAIT");
        if name == "getppid" {
            steps += 1;
            changed.remove(thread);
        } else if (CHANGES.contains(&name) || creates) && !failed && !is_of_request {
            let before = changed.insert(thread, whole.clone());
            assert!(
                before.is_none(),
                "{what}: no step between {before:?} and {whole}"
            );
        }
    }
    steps
}
