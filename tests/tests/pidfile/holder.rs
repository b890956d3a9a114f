//! Held pidfiles: acquisition, release, and daemons that fork.

use std::env::consts::EXE_SUFFIX;
use std::fs;
use std::path::Path;
#[cfg(target_os = "linux")]
use std::process::{Command, Stdio};
use std::time::Duration;

use lockkit::{ErrorKind, PidFile, PidStatus};
use lockkit_tests::Actor;
use lockkit_tests::wine::{DELETED, wine_cannot_judge};
#[cfg(target_os = "linux")]
use lockkit_tests::{program, until};

use crate::support::*;

#[test]
fn new_pidfile_with_relative_path_is_refused() {
    for path in ["app.pid", "", "./app.pid", "../run/app.pid"] {
        for error in [
            PidFile::new(path).unwrap_err(),
            PidFile::inspect(path).unwrap_err(),
            PidFile::remove_stale(path).unwrap_err(),
        ] {
            assert!(
                matches!(error.kind(), ErrorKind::RelativePath { path: named } if named == Path::new(path))
            );
            assert_eq!(
                std::io::Error::from(error).kind(),
                std::io::ErrorKind::InvalidInput
            );
        }
    }
}

#[test]
fn held_pidfile_names_holder_and_release_removes_it() {
    let (directory, path) = fresh_path();
    let guard = lock(&path).try_lock().unwrap();
    assert_eq!(first_line(&path), my_pid());
    let PidStatus::Running(owner) = PidFile::inspect(&path).unwrap() else {
        panic!("it runs")
    };
    assert_eq!(owner.pid(), std::process::id());
    assert!(
        owner
            .program()
            .is_some_and(|program| program.starts_with("pidfile")),
        "{owner:?}"
    );
    assert!(
        owner
            .acquired()
            .is_some_and(|acquired| acquired.elapsed().unwrap() < Duration::from_secs(60))
    );
    guard.verify().unwrap();
    guard.release().unwrap();
    assert_eq!(PidFile::inspect(&path).unwrap(), PidStatus::Absent);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn try_lock_of_held_pidfile_names_holder_and_time() {
    let (_directory, path) = fresh_path();
    let mut holder = Actor::start(&spec(&path));
    holder.expect("try", "held");
    let error = lock(&path).try_lock().unwrap_err();
    assert!(error.is_held());
    assert_eq!(error.owner().unwrap().pid(), holder.pid());
    let message = error.to_string();
    let expected = format!(
        "the pidfile {} is held by pid {} (actor{EXE_SUFFIX}), since ",
        path.display(),
        holder.pid()
    );
    assert!(message.starts_with(&expected), "{message}");
}

#[cfg(target_os = "linux")]
#[test]
fn acquire_pidfile_that_names_own_process_succeeds() {
    // A supervisor writes the file for the program that it starts, or the program itself writes it
    // before an exec.
    let (_directory, path) = fresh_path();
    let script = format!("echo $$ > {} && exec \"$0\" \"$1\"", path.display());
    let mut actor = start_through(&spec(&path), "sh", &["-c", &script]);
    until("the file is written", || {
        fs::read_to_string(&path).is_ok_and(|text| text.trim() == actor.pid().to_string())
    });
    assert!(lock(&path).try_lock().unwrap_err().is_held());
    actor.expect("try", "held");
    assert!(actor.ask("try").starts_with("error Held"));
}

#[test]
fn replaced_pidfile_reports_rogue_deletion_and_is_kept() {
    if wine_cannot_judge(DELETED) {
        return;
    }
    let (_directory, path) = fresh_path();
    let dead = format!("{DEAD}\n");
    let daemon = Foreign::start();
    let living = format!("{}\n", daemon.pid());
    let changes: [(&dyn Fn(), Option<&str>); 5] = [
        (&|| fs::remove_file(&path).unwrap(), None),
        (&|| write(&path, &dead), Some(&dead)),
        (
            &|| {
                fs::remove_file(&path).unwrap();
                write(&path, &dead);
            },
            Some(&dead),
        ),
        (&|| write(&path, ""), Some("")),
        (&|| write(&path, &living), Some(&living)),
    ];
    for (change, left) in changes {
        for drops in [false, true] {
            let mut guard = lock(&path).try_lock().unwrap();
            change();
            for error in [guard.verify().unwrap_err(), guard.rewrite().unwrap_err()] {
                assert!(
                    matches!(error.kind(), ErrorKind::RogueDeletion { path: named } if *named == path),
                    "{error}"
                );
            }
            match drops {
                true => drop(guard),
                false => {
                    let error = guard.release().unwrap_err();
                    assert!(
                        matches!(error.kind(), ErrorKind::RogueDeletion { .. }),
                        "{error}"
                    );
                }
            }
            assert_eq!(fs::read_to_string(&path).ok().as_deref(), left);
            let _ = fs::remove_file(&path);
        }
    }
}

#[test]
fn release_keeps_replaced_file_of_other_owner() {
    if wine_cannot_judge(DELETED) {
        return;
    }
    let (_directory, path) = fresh_path();
    let guard = lock(&path).try_lock().unwrap();
    fs::remove_file(&path).unwrap();
    let mut other = Actor::start(&spec(&path));
    other.expect("try", "held");
    assert!(guard.release().is_err());
    assert_eq!(first_line(&path), other.pid().to_string());
    assert!(lock(&path).try_lock().unwrap_err().is_held());
    other.expect("release", "released");
}

#[test]
fn acquire_pidfile_creates_directories_only_on_request() {
    let (directory, _) = fresh_path();
    let path = directory.path().join("a/b/app.pid");
    let error = lock(&path).try_lock().unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::Io { action: "create", path: named, .. } if *named == path),
        "{error}"
    );
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    lock(&path)
        .create_parents()
        .try_lock()
        .unwrap()
        .verify()
        .unwrap();
    assert!(path.parent().unwrap().is_dir() && !path.exists());
}

#[test]
fn pidfile_without_proc_is_created_in_place() {
    let (directory, path) = fresh_path();
    let Some(mut without) = start_without_proc(&spec(&path)) else {
        return lockkit_tests::left_out("mounting a file system is not allowed here");
    };
    let mut waiter = Actor::start(&spec(&path));
    for _ in 0..20 {
        without.expect("try", "held");
        assert_eq!(first_line(&path), without.pid().to_string());
        assert!(lock(&path).try_lock().unwrap_err().is_held());
        waiter.tell_to_wait("lock");
        without.expect("release", "released");
        assert_eq!(waiter.answer(), "held");
        waiter.expect("release", "released");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}

#[test]
fn acquire_with_live_owner_without_lock_is_refused() {
    // This is the case when a daemon closes all its descriptors.
    let (_directory, path) = fresh_path();
    let elsewhere = path.with_file_name("elsewhere.pid");
    let mut owner = Actor::start(&spec(&elsewhere));
    owner.expect("try", "held");
    LeftFile::at(&elsewhere).restore(&path);
    let error = lock(&path).try_lock().unwrap_err();
    assert!(error.is_held());
    assert_eq!(error.owner().unwrap().pid(), owner.pid());
    let mut waiter = Actor::start(&spec(&path));
    waiter.tell_to_wait("lock");
    waiter.expect_silence();
    owner.kill();
    assert_eq!(waiter.answer(), format!("held recovered {}", owner.pid()));
}

#[test]
fn inspect_during_changes_sees_no_partial_record() {
    if wine_cannot_judge(DELETED) {
        return;
    }
    let (_directory, path) = fresh_path();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let inspect = || {
            let mut inspections = 0;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                match PidFile::inspect(&path).unwrap() {
                    PidStatus::Running(owner) => assert_eq!(owner.pid(), std::process::id()),
                    PidStatus::Stale(owner) => assert_eq!(owner.pid(), DEAD),
                    PidStatus::Absent => {}
                    other => panic!("half a record: {other:?}"),
                }
                inspections += 1;
            }
            inspections
        };
        let inspector = scope.spawn(inspect);
        for _ in 0..5000 {
            let guard = lock(&path).try_lock().unwrap();
            guard.release().unwrap();
            // The file is written under another name first, because a file that is written in place
            // may be seen empty.
            let ready = path.with_extension("new");
            write(&ready, format!("{DEAD}\n"));
            fs::rename(&ready, &path).unwrap();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        println!("{} inspections", inspector.join().unwrap());
    });
}

/// Tests a daemon that forks, and contenders that wait for its pidfile all the time.
#[cfg(target_os = "linux")]
fn check_daemon(order: &str) {
    let (_directory, path) = fresh_path();
    let mut daemon = Actor::start_with(&spec(&path), |command| {
        *command = Command::new(program("daemon"));
        command
            .arg(&path)
            .arg(order)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
    });
    assert_eq!(daemon.answer(), "held");
    let parent = daemon.pid().to_string();
    assert_eq!(first_line(&path), parent);
    let [mut waits, mut polls] = [(); 2].map(|()| Actor::start(&spec(&path)));
    waits.tell_to_wait("lock");
    polls.tell_to_wait("lock-for 30000");

    let child = daemon.ask("fork");
    let child = child.strip_prefix("forked ").expect(&child).to_owned();
    assert!(child != parent && first_line(&path) == parent);
    assert!(lock(&path).try_lock().unwrap_err().is_held());
    daemon.expect("rewrite", "rewritten");
    assert_eq!(first_line(&path), child);
    assert_eq!(
        lock(&path)
            .try_lock()
            .unwrap_err()
            .owner()
            .unwrap()
            .pid()
            .to_string(),
        child
    );
    waits.expect_silence();
    polls.expect_silence();
    // The proof is not the record alone: the parent's end has not unlocked the file either, unless
    // the child had closed it.
    if let Some(flock) = installed("flock").filter(|_| order != "closes") {
        let free = Command::new(flock)
            .arg("--nonblock")
            .arg(&path)
            .arg("true")
            .status()
            .unwrap();
        assert_eq!(free.code(), Some(1));
    }

    daemon.expect("release", "released");
    // Neither guard reports a death, and each waiter acquires in turn.
    let (mut first, mut second) = (waits, polls);
    until("one of them is in", || first_line_if_any(&path).is_some());
    if first_line_if_any(&path) != Some(first.pid().to_string()) {
        std::mem::swap(&mut first, &mut second);
    }
    assert_eq!(first.answer(), "held");
    first.expect("release", "released");
    assert_eq!(second.answer(), "held");
}

#[cfg(target_os = "linux")]
fn first_line_if_any(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.lines().next()?.to_owned())
}

#[cfg(target_os = "linux")]
#[test]
fn daemon_keeps_pidfile_when_parent_exits_before_rewrite() {
    for _ in 0..10 {
        check_daemon("parent");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn daemon_keeps_pidfile_when_parent_exits_after_rewrite() {
    for _ in 0..10 {
        check_daemon("child");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn c7_daemon_that_closes_all_descriptors_keeps_its_file() {
    for _ in 0..10 {
        check_daemon("closes");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn acquire_after_killed_daemon_reports_its_death() {
    let (_directory, path) = fresh_path();
    let mut daemon = Actor::start_with(&spec(&path), |command| {
        *command = Command::new(program("daemon"));
        command
            .arg(&path)
            .arg("parent")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
    });
    assert_eq!(daemon.answer(), "held");
    let child = daemon.ask("fork");
    let child: u32 = child
        .strip_prefix("forked ")
        .expect(&child)
        .parse()
        .unwrap();
    daemon.expect("rewrite", "rewritten");
    let mut waiter = Actor::start(&spec(&path));
    waiter.tell_to_wait("lock");
    lockkit_tests::helper_process::signal_pid(child, rustix::process::Signal::KILL);
    assert_eq!(waiter.answer(), format!("held recovered {child}"));
}

#[test]
fn a4_file_is_the_pid_and_a_line_end() {
    let (_directory, path) = fresh_path();
    let mut guard = lock(&path).try_lock().unwrap();
    assert_eq!(text(&path), format!("{}\n", my_pid()));
    guard.rewrite().unwrap();
    assert_eq!(text(&path), format!("{}\n", my_pid()));
    let child = Foreign::start();
    guard
        .rewrite_for(&lockkit::Owner::of(child.pid()).unwrap())
        .unwrap();
    assert_eq!(text(&path), format!("{}\n", child.pid()));
    drop(guard);
    write_ago(
        &path,
        format!("{DEAD}\n{}", "a long line\n".repeat(100)),
        OLD,
    );
    let _guard = lock(&path).try_lock().unwrap();
    assert_eq!(text(&path), format!("{}\n", my_pid()));
}

#[cfg(target_os = "linux")]
#[test]
fn c7_process_that_closed_the_descriptor_holds_once() {
    let (_directory, path) = fresh_path();
    let mut victim = Actor::start(&spec(&path));
    victim.expect("lock", "held");
    victim.expect("close-all", "closed");
    victim.expect("set-aside", "aside");
    let answer = victim.ask("try");
    assert!(answer.starts_with("error Held"), "{answer}");
    victim.expect("drop-aside", "dropped");
    assert!(!path.exists());
    victim.expect("try", "held");
    victim.expect("others", "kept");
    // A program that replaces the process by exec has the pid, and no guard.
    victim.expect("close-all", "closed");
    assert_eq!(first_line(&path), victim.pid().to_string());
}

#[cfg(target_os = "linux")]
#[test]
fn a6_owner_with_one_descriptor_left_is_judged_after_its_death() {
    let (_directory, path) = fresh_path();
    // Each victim has one spare descriptor fewer than the one before.
    for spare in (0..6).rev() {
        let mut victim = Actor::start(&spec(&path));
        victim.expect("owner", "owner none");
        let open = lockkit_tests::Belongings::of(victim.pid()).descriptors() as u64;
        let pid = rustix::process::Pid::from_raw(victim.pid().cast_signed());
        let limit = rustix::process::Rlimit {
            current: Some(open + spare),
            maximum: rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum,
        };
        rustix::process::prlimit(pid, rustix::process::Resource::Nofile, limit).unwrap();
        let answer = victim.ask("try");
        if answer != "held" {
            assert!(answer.contains("(os error 24)"), "{answer}");
            assert!(!path.exists());
            continue;
        }
        assert!(
            lock(&path).try_lock().unwrap_err().is_held(),
            "{spare} left"
        );
        victim.kill();
        let guard = lock(&path).try_lock().unwrap();
        assert_eq!(
            guard.recovered().unwrap().owner().unwrap().pid(),
            victim.pid(),
            "{spare} left"
        );
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a6_owner_without_proc_is_judged_after_its_death() {
    let (_directory, path) = fresh_path();
    let Some(mut victim) = start_without_proc(&spec(&path)) else {
        return lockkit_tests::left_out("mounting a file system is not allowed here");
    };
    victim.expect("try", "held");
    assert_eq!(identity(&path), None, "half an identity");
    assert!(lock(&path).try_lock().unwrap_err().is_held());
    victim.kill();
    let guard = lock(&path).try_lock().unwrap();
    assert_eq!(
        guard.recovered().unwrap().owner().unwrap().pid(),
        victim.pid()
    );
    // A process without /proc does not treat a possibly live owner as dead.
    let mut blind = start_without_proc(&spec(&path)).unwrap();
    assert!(blind.ask("try").starts_with("error Held"));
}

lockkit_tests::left_out! { "it takes other users, modes of files, links, signals or small disks, as Linux has them":
    acquire_pidfile_that_names_own_process_succeeds,
    daemon_keeps_pidfile_when_parent_exits_after_rewrite,
    daemon_keeps_pidfile_when_parent_exits_before_rewrite,
    acquire_after_killed_daemon_reports_its_death,
    a6_owner_with_one_descriptor_left_is_judged_after_its_death,
    a6_owner_without_proc_is_judged_after_its_death,
    c7_daemon_that_closes_all_descriptors_keeps_its_file,
    c7_process_that_closed_the_descriptor_holds_once,
}
