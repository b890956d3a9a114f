//! The cases of fault injection, for any kind of lock.

#![allow(missing_docs)] // The names of the cases are sentences.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Resource;

use super::acquire::{
    ACQUIRE_COMMANDS, ACQUIRE_IN_TIME, acquire_in_every_way, assert_each_acquires,
    assert_released_or_error, files, files_of_ordinary_use,
};
use super::resources::{
    MountNamespace, command_under_signals, is_renewed, limit, start_without_sigxfsz,
};
use super::system_calls::{
    acquire_without_contention, fail_each_call, hand_over, run_lock_scenario,
};
use crate::{Actor, Belongings, Kind, another_user, conformance, crash_points, program, until};

pub fn file_size_limit_fails_or_has_no_effect(kind: Kind) {
    for limit_bytes in [0, 50] {
        let spec = kind.fresh();
        let mut limited = start_without_sigxfsz(&spec);
        let mut other = Actor::start(&spec);
        limited.expect("owner", "owner none");
        limit(&limited, Resource::Fsize, Some(limit_bytes));
        let held = acquire_in_every_way(&mut limited, &["File too large"]);
        println!(
            "{kind:?}, no file longer than {limit_bytes}: held {held} times of {}",
            ACQUIRE_COMMANDS.len()
        );
        assert_each_acquires(&mut [&mut other]);
        limit(&limited, Resource::Fsize, None);
        assert_each_acquires(&mut [&mut limited, &mut other]);
        // This also holds for a process that holds the lock already.
        limited.expect("lock", "held");
        limit(&limited, Resource::Fsize, Some(limit_bytes));
        assert_released_or_error(&limited.ask("release"), &["File too large"]);
        limit(&limited, Resource::Fsize, None);
        assert_each_acquires(&mut [&mut other, &mut limited]);
        assert_eq!(
            files(&spec, Path::new("/")),
            files_of_ordinary_use(kind, &spec)
        );
        spec.clean();
    }
}

pub fn process_killed_by_file_size_limit_holds_nothing(kind: Kind) {
    let spec = kind.fresh();
    let [mut limited, mut other] = [(); 2].map(|()| Actor::start(&spec));
    limited.expect("owner", "owner none");
    limit(&limited, Resource::Fsize, Some(0));
    let answer = limited.ask("try");
    println!("{kind:?}, SIGXFSZ as it is by default: {answer}");
    assert!(answer == "held" || answer == "gone", "{answer}");
    limited.kill();
    let next = other.ask(ACQUIRE_IN_TIME);
    assert!(
        next == "held" || next == conformance::told(kind, limited.pid()),
        "{next}"
    );
    other.expect("release", "released");
    assert_each_acquires(&mut [&mut other, &mut Actor::start(&spec)]);
    spec.clean();
}

pub fn process_limit_fails_or_has_no_effect(kind: Kind) {
    let Some(user) = another_user() else { return };
    let spec = kind.fresh();
    let [mut limited, mut other] = [(); 2].map(|()| Actor::start_as(&spec, user.uid));
    limited.expect("owner", "owner none");
    other.expect("owner", "owner none");
    limited.expect("limit-threads 0", "limited");
    let held = acquire_in_every_way(&mut limited, &["Resource temporarily unavailable"]);
    println!(
        "{kind:?}, no further process: held {held} times of {}",
        ACQUIRE_COMMANDS.len()
    );
    assert_each_acquires(&mut [&mut other]);
    limited.expect("limit-threads all", "limited");
    assert_each_acquires(&mut [&mut limited, &mut other]);
    limited.expect("lock", "held");
    limited.expect("limit-threads 0", "limited");
    limited.expect("release", "released");
    assert_each_acquires(&mut [&mut other]);
    spec.clean();
}

pub fn full_file_system_fails_or_has_no_effect(kind: Kind) {
    let Some(namespace) = MountNamespace::new() else {
        return;
    };
    let spec = kind.fresh();
    // The processes of a table have it open. All others have yet to create their files.
    let [mut one, mut other] = [(); 2].map(|()| namespace.start(&spec, 0));
    one.expect("owner", "owner none");
    other.expect("owner", "owner none");
    let before = files(&spec, &namespace.root());
    namespace.fill();
    let full = &["No space left on device"];
    let held = acquire_in_every_way(&mut one, full);
    println!(
        "{kind:?}, no room: held {held} times of {}",
        ACQUIRE_COMMANDS.len()
    );
    if held == 0 {
        assert_eq!(
            files(&spec, &namespace.root()),
            before,
            "no incomplete file is left"
        );
    }
    namespace.make_room();
    assert_each_acquires(&mut [&mut one, &mut other]);
    one.expect("lock", "held");
    namespace.fill();
    assert_released_or_error(&one.ask("release"), full);
    acquire_in_every_way(&mut other, full);
    namespace.make_room();
    assert_each_acquires(&mut [&mut other, &mut one]);
}

pub fn read_only_file_system_fails_or_has_no_effect(kind: Kind) {
    let Some(namespace) = MountNamespace::new() else {
        return;
    };
    unwritable(
        kind,
        &namespace,
        0,
        || namespace.remount("ro"),
        || namespace.remount("rw"),
        "Read-only file system",
    );
}

pub fn unwritable_directory_fails_or_has_no_effect(kind: Kind) {
    let (Some(namespace), Some(user)) = (MountNamespace::new(), another_user()) else {
        return;
    };
    let (close, open) = (
        || namespace.set_modes(0o755),
        || namespace.set_modes(0o1777),
    );
    unwritable(kind, &namespace, user.uid, close, open, "Permission denied");
}

/// Checks that an actor that starts when no file can be created gets an error, if it needs a file,
/// and acquires afterwards.
fn unwritable(
    kind: Kind,
    namespace: &MountNamespace,
    uid: u32,
    remove_access: impl Fn(),
    restore_access: impl Fn(),
    cause: &str,
) {
    let spec = kind.fresh();
    remove_access();
    let mut early = namespace.start(&spec, uid);
    let opened = early.ask("owner");
    if opened == "gone" {
        // The actor must have its table from the start.
        assert!(
            ["shm", "directory"].contains(&kind.name()),
            "{kind:?} is opened without files"
        );
    } else {
        let held = acquire_in_every_way(&mut early, &[cause]);
        println!(
            "{kind:?}, {cause}: held {held} times of {}",
            ACQUIRE_COMMANDS.len()
        );
        assert!(
            held == ACQUIRE_COMMANDS.len() || held == 0,
            "all requests have the same result"
        );
    }
    // Its open files would prevent the remount of the file system.
    drop(early);
    restore_access();
    let [mut one, mut other] = [(); 2].map(|()| namespace.start(&spec, uid));
    assert_each_acquires(&mut [&mut one, &mut other]);
    drop((one, other));
    // The existing state is unchanged. Whether it can be locked is a separate question.
    remove_access();
    let mut late = namespace.start(&spec, uid);
    if late.ask("owner") != "gone" {
        let held = acquire_in_every_way(&mut late, &[cause]);
        println!(
            "{kind:?}, {cause}, all made before: held {held} times of {}",
            ACQUIRE_COMMANDS.len()
        );
    }
    drop(late);
    restore_access();
    let [mut one, mut other] = [(); 2].map(|()| namespace.start(&spec, uid));
    assert_each_acquires(&mut [&mut one, &mut other]);
}

pub fn waiter_under_signals_acquires_times_out_and_recovers(kind: Kind) {
    let spec = kind.fresh();
    let mut holder = Actor::start(&spec);
    let mut waiter = Actor::start_with(&spec, |command| {
        *command = command_under_signals(&spec, &[])
    });
    assert_each_acquires(&mut [&mut holder, &mut waiter]);
    holder.expect("lock", "held");
    let mut before = None;
    for span in [1, 30, 300] {
        let start = Instant::now();
        let answer = waiter.ask(&format!("lock-for {span}"));
        assert!(answer.starts_with("error Timeout"), "{answer}");
        assert!(
            start.elapsed() >= Duration::from_millis(span),
            "the waiter timed out too early"
        );
    }
    for command in ["lock", "lock-for 20000", "lock"] {
        waiter.tell_to_wait(command);
        holder.expect("release", "released");
        assert_eq!(waiter.answer(), "held");
        assert!(holder.ask("try").starts_with("error Held"));
        holder.tell_to_wait("lock");
        waiter.expect("release", "released");
        assert_eq!(holder.answer(), "held");
        let now = Belongings::of(waiter.pid());
        assert_eq!(
            before.get_or_insert_with(|| Belongings::of(waiter.pid())),
            &now
        );
    }
    for command in ["lock", "lock-for 20000"] {
        waiter.tell_to_wait(command);
        holder.kill();
        assert_eq!(waiter.answer(), conformance::told(kind, holder.pid()));
        waiter.expect("release", "released");
        holder = Actor::start(&spec);
        holder.expect("lock", "held");
    }
    spec.clean();
}

pub fn processes_under_signals_lose_no_count(kind: Kind) {
    let spec = kind.fresh();
    let directory = tempfile::tempdir().unwrap();
    let counter = directory.path().join("counter");
    fs::write(&counter, "0").unwrap();
    let counter_text = counter.display().to_string();
    let workers: Vec<_> = (0..5)
        .map(|_| {
            command_under_signals(&spec, &["stress", &counter_text, "60"])
                .spawn()
                .unwrap()
        })
        .collect();
    for mut worker in workers {
        assert!(worker.wait().unwrap().success());
    }
    assert_eq!(fs::read_to_string(counter).unwrap(), "300");
    assert_eq!(
        files(&spec, Path::new("/")),
        files_of_ordinary_use(kind, &spec)
    );
    spec.clean();
}

pub fn lock_on_standard_descriptors_excludes_others(kind: Kind) {
    let spec = kind.fresh();
    let directory = tempfile::tempdir().unwrap();
    let go = directory.path().join("go");
    let mut closed = Command::new(program("actor"));
    closed.arg(spec.invite()).arg("closed").arg(&go);
    let mut closed = closed
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut other = Actor::start(&spec);
    until("the process holds the lock", || {
        let ended = closed.try_wait().unwrap();
        assert_eq!(
            ended, None,
            "the process ended before the file `go` existed"
        );
        match other.ask("try") {
            held if held == "held" => {
                other.expect("release", "released");
                false
            }
            answer => answer.starts_with("error Held"),
        }
    });
    fs::write(&go, "").unwrap();
    assert!(closed.wait().unwrap().success());
    assert_each_acquires(&mut [&mut other]);
    assert_eq!(
        files(&spec, Path::new("/")),
        files_of_ordinary_use(kind, &spec)
    );
    spec.clean();
}

pub fn c7_drop_after_close_range_keeps_other_files(kind: Kind) {
    if is_renewed(kind) {
        return;
    }
    for end in ["release", "drop"] {
        let spec = kind.fresh();
        let mut victim = Actor::start(&spec);
        // The second round uses the resources that the first one kept.
        for _ in 0..2 {
            victim.expect("lock", "held");
            victim.expect("release", "released");
        }
        victim.expect("lock", "held");
        victim.expect("close-all", "closed");
        victim.expect("fork-others", "kept");
        match end {
            "release" => {
                let answer = victim.ask("release");
                assert!(
                    answer == "released" || answer.contains("closed the descriptor"),
                    "{answer}"
                );
            }
            _ => {
                victim.expect("set-aside", "aside");
                victim.expect("drop-aside", "dropped");
            }
        }
        victim.expect("others", "kept");
        victim.expect("fork-others", "kept");
        assert!(victim.finish().success());
        spec.clean();
    }
}

pub fn c7_lock_after_close_range_excludes_others(kind: Kind) {
    if is_renewed(kind) {
        return;
    }
    for is_held in [false, true] {
        let spec = kind.fresh();
        let [mut victim, mut other] = [(); 2].map(|()| Actor::start(&spec));
        victim.expect("lock", "held");
        if !is_held {
            victim.expect("release", "released");
        }
        victim.expect("close-all", "closed");
        victim.ask("release");
        if kind.name() == "shm" {
            // A process that has closed the descriptor of its slot looks dead to others until it
            // attaches again.
            victim.expect("reopen", "open");
        }
        for command in ACQUIRE_COMMANDS {
            assert!(victim.ask(command).starts_with("held"), "{command}");
            let answer = other.ask("try");
            assert!(answer.starts_with("error Held"), "{answer}");
            victim.expect("others", "kept");
            victim.expect("release", "released");
            victim.expect("others", "kept");
        }
        assert_each_acquires(&mut [&mut other, &mut victim]);
        // Another holder's lock does not prevent the detection, and no wait ends through another
        // file.
        other.expect("lock", "held");
        victim.expect("close-all", "closed");
        if kind.name() == "shm" {
            victim.expect("reopen", "open");
        }
        let answer = victim.ask("lock-for 50");
        assert!(answer.starts_with("error Timeout"), "{answer}");
        other.expect("release", "released");
        assert_each_acquires(&mut [&mut victim, &mut other]);
        victim.expect("others", "kept");
        spec.clean();
    }
}

pub fn c7_token_after_close_range_still_cancels(kind: Kind) {
    // A process that has closed the descriptor of its slot looks dead to others.
    if is_renewed(kind) || kind.name() == "shm" {
        return;
    }
    let spec = kind.fresh();
    let [mut holder, mut waiter] = [(); 2].map(|()| Actor::start(&spec));
    holder.expect("lock", "held");
    waiter.expect(
        "close-token",
        "error Timeout, error Timeout, error Cancelled",
    );
    waiter.expect("others", "kept");
    holder.expect("release", "released");
    spec.clean();
}

pub fn c7_drop_of_closed_guard_keeps_next_lock(kind: Kind) {
    // These belong to the process for as long as it lives, whatever it closes.
    if is_renewed(kind) || ["pidfile", "shm"].contains(&kind.name()) {
        return;
    }
    let spec = kind.fresh();
    let [mut victim, mut other] = [(); 2].map(|()| Actor::start(&spec));
    victim.expect("lock", "held");
    victim.expect("close-all", "closed");
    victim.expect("spare-others", "spared");
    victim.expect("set-aside", "aside");
    // Mostly by the same numbers.
    assert!(victim.ask(ACQUIRE_IN_TIME).starts_with("held"));
    victim.expect("drop-aside", "dropped");
    let answer = other.ask("try");
    assert!(answer.starts_with("error Held"), "{answer}");
    victim.expect("release", "released");
    assert_each_acquires(&mut [&mut other, &mut victim]);
    spec.clean();
}

pub fn lock_has_crash_point_between_any_two_changes(kind: Kind) {
    crash_points::stand_between_changes(kind);
}

pub fn failed_system_call_without_contention_recovers(kind: Kind) {
    fail_each_call(kind.name(), |fault| {
        run_lock_scenario(kind, acquire_without_contention, fault)
    });
}

pub fn failed_system_call_during_handover_recovers(kind: Kind) {
    fail_each_call(kind.name(), |fault| {
        run_lock_scenario(kind, hand_over, fault)
    });
}
