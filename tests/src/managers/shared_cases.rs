//! The cases of managers whose tables several processes share.

#![allow(missing_docs)] // Each name states the operation, the condition and the result.

use std::collections::BTreeSet;
#[cfg(unix)]
use std::path::Path;

use lockkit::ErrorKind;

use super::table::{CAPACITY, Kind};
use crate::Actor;
use crate::conformance::processes_fork;
use crate::wine::{DELETED, is_wine, wine_cannot_judge};

/// Makes tests of the cases of managers that processes share.
#[macro_export]
macro_rules! shared_managers {
    ($module:ident, $kind:expr) => {
        $crate::managers!($module, $kind;
            retrieve_in_other_process_is_same_lock,
            create_with_any_umask_gives_same_modes,
            freed_lock_excludes_other_processes,
            kill_with_many_held_locks_recovers_all,
            fork_child_holds_locks_of_its_own,
            fork_at_any_moment_child_can_acquire,
            crash_at_any_step_of_allocate_keeps_table_valid,
            available_after_crash_matches_free_locks,
            free_and_allocate_while_held_keeps_exclusion,
        );
    };
}

pub fn retrieve_in_other_process_is_same_lock(kind: Kind) {
    let table = kind.fresh();
    let manager = table.open();
    let mut other = Actor::start_at(&table);
    let lock = manager.allocate().unwrap();
    let id = lock.id();
    let held = lock.lock().unwrap();
    assert!(other.ask(&format!("try {id}")).starts_with("error Held"));
    assert!(
        other
            .ask(&format!("unlock {id}"))
            .starts_with("error NotLocked"),
        "another process holds it"
    );
    other.tell_to_wait(&format!("lock {id}"));
    held.release().unwrap();
    assert_eq!(other.answer(), "held");
    assert_eq!(manager.held().unwrap()[0].owner().pid(), other.pid());
    assert_eq!(
        lock.try_lock().unwrap_err().owner().unwrap().pid(),
        other.pid()
    );
    other.expect(&format!("release {id}"), "ok");
    let next = other.ask("allocate");
    assert!(
        next.starts_with("allocated ") && next != format!("allocated {id}"),
        "{next}"
    );
    other.expect(&format!("free {id}"), "ok");
    assert!(matches!(
        lock.free().unwrap_err().kind(),
        ErrorKind::NotAllocated { .. }
    ));
    table.clean();
}

#[cfg(not(unix))]
pub fn create_with_any_umask_gives_same_modes(_: Kind) {
    crate::left_out("files have no modes on this system");
}

#[cfg(unix)]
pub fn create_with_any_umask_gives_same_modes(kind: Kind) {
    use std::os::unix::fs::PermissionsExt;
    use std::process::{Command, Stdio};
    let table = kind.fresh();
    let mut other = Actor::start_at_with(&table, |command| {
        let (program, table) = (command.get_program().to_owned(), table.to_string());
        *command = Command::new("sh");
        command
            .args(["-c", "umask 777 && exec \"$0\" table \"$1\""])
            .arg(program)
            .arg(table);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
    });
    for command in ["allocate-at 0", "try 0"] {
        let answer = other.ask(command);
        assert!(!answer.starts_with("error"), "{answer}");
    }
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    if kind == Kind::Directory {
        assert_eq!(mode(&table.path()), 0o700);
        for file in std::fs::read_dir(table.path()).unwrap() {
            assert_eq!(mode(&file.unwrap().path()), 0o600);
        }
    } else {
        assert_eq!(mode(&table.path()), 0o600);
    }
    table.clean();
}

pub fn freed_lock_excludes_other_processes(kind: Kind) {
    if kind == Kind::Directory && wine_cannot_judge(DELETED) {
        return;
    }
    let table = kind.fresh();
    let manager = table.open();
    let mut other = Actor::start_at(&table);
    let lock = manager.allocate_at(5).unwrap();
    other.expect("lock 5", "held");
    lock.free().unwrap();
    assert!(lock.try_lock().unwrap_err().is_held());
    other.expect("release 5", "ok");
    let held = lock.lock().unwrap();
    assert!(other.ask("try 5").starts_with("error Held"));
    other.tell_to_wait("lock 5");
    held.release().unwrap();
    assert_eq!(other.answer(), "held");
    other.kill();
    let guard = lock.lock().unwrap();
    assert_eq!(
        guard.recovered().unwrap().owner().unwrap().pid(),
        other.pid()
    );
    drop(guard);
    if kind == Kind::Directory {
        assert!(table.has_no_lock_files());
    }
    table.clean();
}

pub fn kill_with_many_held_locks_recovers_all(kind: Kind) {
    // Each lock of a directory costs a descriptor.
    let count = if kind == Kind::Shm { 4096 } else { 500 };
    // Under Wine each lock takes milliseconds.
    let count = if is_wine() { 50 } else { count };
    let table = kind.fresh();
    let manager = table.open_with(count);
    let mut holder = Actor::start_at(&table);
    holder.expect(&format!("hold {count}"), &format!("holds {count}"));
    assert_eq!(manager.held().unwrap().len(), count as usize);
    holder.kill();
    assert_eq!(manager.held().unwrap(), [], "a dead process holds no lock");
    for id in 0..count {
        let guard = manager.retrieve(id).unwrap().try_lock().unwrap();
        assert_eq!(
            guard.recovered().expect("recovered").owner().unwrap().pid(),
            holder.pid(),
            "{id}"
        );
        guard.release().unwrap();
        assert_eq!(
            manager
                .retrieve(id)
                .unwrap()
                .try_lock()
                .unwrap()
                .recovered(),
            None
        );
    }
    table.clean();
}

pub fn fork_child_holds_locks_of_its_own(kind: Kind) {
    if !processes_fork() {
        return;
    }
    let table = kind.fresh();
    let _manager = table.open();
    let mut parent = Actor::start_at(&table);
    parent.expect("lock 1", "held");
    let died = parent.ask("fork-die 2");
    let child = died.strip_prefix("died ").expect(&died).to_owned();
    parent.expect("try 2", &format!("held recovered {child}"));
    parent.expect("release 2", "ok");
    parent.expect("release 1", "ok");
    parent.expect("try 1", "held");
    table.clean();
}

pub fn fork_at_any_moment_child_can_acquire(kind: Kind) {
    if !processes_fork() {
        return;
    }
    let table = kind.fresh();
    let manager = table.open();
    for held in [true, false] {
        // A process that finds a lock held checks whether its owner lives. A process that finds it
        // free acquires it.
        let _guard = held.then(|| manager.retrieve(1).unwrap().lock().unwrap());
        Actor::start_at(&table).expect("fork-often 1 2", "forked");
    }
    table.clean();
}

pub fn crash_at_any_step_of_allocate_keeps_table_valid(kind: Kind) {
    if kind == Kind::Directory
        && wine_cannot_judge("it starts hundreds of processes, each of which takes too long")
    {
        return;
    }
    if !crate::failpoint::are_enabled() {
        return;
    }
    for command in ["allocate", "allocate-at 65", "free 0"] {
        for step in 1.. {
            let table = kind.fresh();
            // One word of 64 locks, whose fullness is not recorded yet, and another word.
            let manager = table.open_with(66);
            for id in 0..64 {
                manager.allocate_at(id).unwrap();
            }
            let mut victim = Actor::start_at(&table);
            victim.expect("open", "opened");
            victim.expect(&format!("kill-at {step}"), "armed");
            let answer = victim.ask(command);
            // A process that finds the table full counts again.
            let table_now = table.clone();
            drop(manager);
            let mut other = Actor::start_at(&table_now);
            let mut seen = BTreeSet::new();
            for _ in 0..66 {
                let next = other.ask("allocate");
                match next.strip_prefix("allocated ") {
                    Some(id) => assert!(seen.insert(id.to_owned()), "{id} twice"),
                    None => assert!(next.starts_with("error Exhausted"), "{next}"),
                }
            }
            if kind.is_limited() {
                // All free locks have been allocated: 2, less those of the victim, more those that
                // it freed.
                assert!(
                    (1..=3).contains(&seen.len()),
                    "{command} killed at {step}: {seen:?}"
                );
                assert_eq!(
                    table.open().available().unwrap(),
                    Some(0),
                    "{command} killed at {step}"
                );
            }
            table.clean();
            if answer != "gone" {
                assert!(step > 2, "{kind:?}: only {step} steps to {command}");
                break;
            }
        }
    }
}

pub fn available_after_crash_matches_free_locks(kind: Kind) {
    if !crate::failpoint::are_enabled() {
        return;
    }
    if !kind.is_limited() {
        return;
    }
    for command in ["allocate", "free 0"] {
        for step in 1.. {
            let table = kind.fresh();
            // A process that uses the table all the time, so that the table is never initialised
            // again.
            let mut attached = Actor::start_at(&table);
            attached.expect("allocate-at 65", "allocated 65");
            let mut victim = Actor::start_at(&table);
            victim.expect("allocate", "allocated 0");
            victim.expect(&format!("kill-at {step}"), "armed");
            let answer = victim.ask(command);
            victim.kill();
            let manager = table.open();
            let available = manager.available().unwrap();
            let free = (0..CAPACITY)
                .filter(|id| manager.allocate_at(*id).is_ok())
                .count();
            assert_eq!(
                available,
                u32::try_from(free).ok(),
                "{command} killed at {step}"
            );
            table.clean();
            if answer != "gone" {
                assert!(step > 2, "{kind:?}: only {step} steps to {command}");
                break;
            }
        }
    }
}

pub fn free_and_allocate_while_held_keeps_exclusion(kind: Kind) {
    if kind == Kind::Directory && wine_cannot_judge(DELETED) {
        return;
    }
    let table = kind.fresh();
    let _manager = table.open();
    let directory = tempfile::tempdir().unwrap();
    let inside = directory.path().join("inside");
    let mut workers: Vec<_> = (0..4).map(|_| Actor::start_at(&table)).collect();
    for worker in &mut workers {
        worker.tell(&format!("churn 9 300 {}", inside.display()));
    }
    for worker in &mut workers {
        assert_eq!(worker.answer(), "churned");
    }
    let _ = table.open().retrieve(9).unwrap().free();
    if kind == Kind::Directory {
        assert!(table.has_no_lock_files());
    }
    table.clean();
}
