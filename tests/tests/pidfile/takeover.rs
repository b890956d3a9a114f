//! Takeovers of blank and stale pidfiles.

#[cfg(target_os = "linux")]
use std::fs::Permissions;
use std::fs::{self, File};
#[cfg(target_os = "linux")]
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant, SystemTime};

use lockkit::{ErrorKind, PidFile, PidStatus};
use lockkit_tests::wine::{DELETED, wine_cannot_judge};
use lockkit_tests::{Actor, LIVELY};

use crate::support::*;

#[test]
fn foreign_pidfile_with_reused_pid_is_stale() {
    let (_directory, path) = fresh_path();
    if has_just_booted() {
        return lockkit_tests::left_out(
            "the system started so recently that the file would seem older",
        );
    }
    let later = Foreign::start();
    for (ago, reused) in [
        (Duration::ZERO, false),
        (Duration::from_secs(5), false),
        (LONG_AGO, true),
    ] {
        write_ago(&path, later.pid().to_string(), ago);
        let status = PidFile::inspect(&path).unwrap();
        match reused {
            true => assert!(
                matches!(&status, PidStatus::Stale(owner) if owner.pid() == later.pid()),
                "{status:?}"
            ),
            false => assert!(
                matches!(&status, PidStatus::Running(owner) if owner.pid() == later.pid()),
                "{status:?}"
            ),
        }
        assert_eq!(lock(&path).try_lock().is_ok(), reused);
    }
}

fn has_just_booted() -> bool {
    let uptime = fs::read_to_string("/proc/uptime").unwrap();
    uptime.split('.').next().unwrap().parse::<u64>().unwrap() < 2 * LONG_AGO.as_secs()
}

#[cfg(target_os = "linux")]
#[test]
fn pidfile_on_tmpfs_older_than_boot_is_not_stale() {
    let Ok(directory) = tempfile::tempdir_in("/dev/shm") else {
        return lockkit_tests::left_out("there is no /dev/shm to write to");
    };
    let path = directory.path().join("app.pid");
    let daemon = Foreign::start();
    write_ago(
        &path,
        daemon.pid().to_string(),
        Duration::from_secs(20 * 365 * 86_400),
    );
    assert!(matches!(
        PidFile::inspect(&path).unwrap(),
        PidStatus::Running(_)
    ));
    assert!(lock(&path).try_lock().unwrap_err().is_held());
}

#[test]
fn takeover_of_stale_file_by_eight_racers_has_one_winner() {
    if wine_cannot_judge(DELETED) {
        return;
    }
    let (_directory, path) = fresh_path();
    let left = LeftFile::of_killed_owner();
    let mut racers: Vec<Actor> = (0..8).map(|_| Actor::start(&spec(&path))).collect();
    for round in 0..3000 {
        match round % 2 {
            0 => left.restore(&path),
            _ => write(&path, format!("{DEAD}\n")),
        }
        racers.iter_mut().for_each(|racer| racer.tell("try"));
        let answers: Vec<String> = racers.iter_mut().map(Actor::answer).collect();
        let winners: Vec<usize> = (0..8)
            .filter(|at| answers[*at].starts_with("held recovered"))
            .collect();
        assert_eq!(winners.len(), 1, "round {round}: {answers:?}");
        assert_eq!(
            answers
                .iter()
                .filter(|answer| answer.starts_with("error Held"))
                .count(),
            7,
            "{answers:?}"
        );
        let winner = &mut racers[winners[0]];
        assert_eq!(first_line(&path), winner.pid().to_string());
        winner.expect("release", "released");
    }
}

#[test]
fn crash_during_pidfile_takeover_leaves_stale_file() {
    if !lockkit_tests::failpoint::are_enabled() {
        return;
    }
    let (directory, path) = fresh_path();
    let left_by = LeftFile::of_killed_owner();
    for at in 1.. {
        left_by.restore(&path);
        let mut victim = Actor::start_with(&spec(&path), |command| {
            command.arg("steps").arg("alone");
        });
        victim.expect(&at.to_string(), "ready");
        let last = victim.ask("go");
        let pid = victim.pid();
        victim.kill();
        match PidFile::inspect(&path).unwrap() {
            PidStatus::Stale(owner) => assert!(
                [pid, left_by.pid].contains(&owner.pid()),
                "step {at}: {owner:?}"
            ),
            PidStatus::Absent => {}
            other => panic!("step {at}: {other:?}"),
        }
        let left = fs::read_to_string(&path).ok();
        let guard = lock(&path).try_lock().unwrap();
        let recovered = guard
            .recovered()
            .and_then(|died| died.owner())
            .map(|owner| owner.pid().to_string());
        assert_eq!(
            recovered,
            left.and_then(|text| text.lines().next().map(str::to_owned)),
            "step {at}"
        );
        guard.release().unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        if last.starts_with("passed ") {
            println!("{last}");
            assert!(
                last.contains("taker file created") && last.contains("mode set"),
                "{last}"
            );
            break;
        }
    }
}

#[test]
fn acquire_pidfile_of_one_line_end_succeeds_at_once() {
    let (_directory, path) = fresh_path();
    write(&path, "\n");
    assert!(matches!(
        PidFile::inspect(&path).unwrap(),
        PidStatus::Blank { is_free: true, .. }
    ));
    let guard = lock(&path).try_lock().unwrap();
    assert_eq!(text(&path), format!("{}\n", my_pid()));
    assert_eq!(guard.recovered(), None);
}

#[test]
fn blank_pidfile_is_held_when_young_and_free_when_old() {
    let (_directory, path) = fresh_path();
    for blank in ["", " \n", "\0\0\0\0", "\n\n"] {
        write(&path, blank);
        let status = PidFile::inspect(&path).unwrap();
        assert!(
            matches!(status, PidStatus::Blank { age, is_free: false } if age < OLD),
            "{blank:?}: {status:?}"
        );
        let error = lock(&path).try_lock().unwrap_err();
        assert!(
            error.is_held() && error.owner().is_none(),
            "{blank:?}: {error}"
        );
        assert_eq!(text(&path), blank);

        set_age(&path, OLD);
        assert!(
            !PidFile::is_stale(&path).unwrap() && !PidFile::remove_stale(&path).unwrap(),
            "{blank:?}"
        );
        let status = PidFile::inspect(&path).unwrap();
        assert!(
            matches!(status, PidStatus::Blank { age, is_free: true } if age >= OLD),
            "{blank:?}: {status:?}"
        );
        let guard = lock(&path).try_lock().unwrap();
        assert_eq!(
            (guard.recovered(), text(&path)),
            (None, format!("{}\n", my_pid()))
        );
        guard.release().unwrap();
        assert!(!path.exists());
    }
}

#[test]
fn waiter_for_young_blank_file_acquires_when_it_is_old() {
    let (_directory, path) = fresh_path();
    write(&path, "");
    let start = Instant::now();
    lock(&path)
        .lock_for(Duration::from_secs(20))
        .unwrap()
        .release()
        .unwrap();
    assert!(start.elapsed() >= Duration::from_secs(1), "it was young");
}

#[test]
fn acquire_blank_pidfile_with_future_mtime_succeeds() {
    let (_directory, path) = fresh_path();
    write(&path, "");
    let future = SystemTime::now() + Duration::from_secs(3600);
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_modified(future)
        .unwrap();
    lock(&path).try_lock().unwrap().release().unwrap();
}

#[test]
fn new_empty_pidfile_held_despite_clock_slightly_ahead() {
    let (_directory, path) = fresh_path();
    write(&path, "");
    let ahead = SystemTime::now() + Duration::from_secs(1);
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_modified(ahead)
        .unwrap();
    assert!(lock(&path).try_lock().unwrap_err().is_held());
    assert_eq!(text(&path), "");
}

#[cfg(target_os = "linux")]
#[test]
fn pidfile_of_other_host_kept_and_of_this_machine_taken_over() {
    let (_directory, path) = fresh_path();
    let left = LeftFile::of_killed_owner();
    let another_boot = left.with_changed_byte(BOOT);
    for (case, record, taken) in [
        ("as it was left", &left, true),
        (
            "a later process has the pid",
            &left.with_changed_byte(START),
            true,
        ),
        ("before a reboot", &another_boot, true),
        // The write lock that its owner held for life is free, on this same kernel.
        (
            "in a container that was killed",
            &left.with_changed_byte(NAMESPACE),
            true,
        ),
        (
            "on another host",
            &another_boot.with_changed_byte(HOST),
            false,
        ),
    ] {
        record.restore(&path);
        match taken {
            true => {
                assert!(PidFile::is_stale(&path).unwrap(), "{case}");
                let guard = lock(&path).try_lock().expect(case);
                assert_eq!(guard.recovered().unwrap().owner().unwrap().pid(), left.pid);
            }
            false => {
                assert!(lock(&path).try_lock().unwrap_err().is_held(), "{case}");
                assert!(
                    !PidFile::is_stale(&path).unwrap() && !PidFile::remove_stale(&path).unwrap(),
                    "{case}"
                );
                assert!(
                    matches!(PidFile::inspect(&path).unwrap(), PidStatus::Running(_)),
                    "{case}"
                );
                assert_eq!(text(&path), record.text);
            }
        }
    }
}

#[test]
fn remove_stale_removes_only_stale_file() {
    let (_directory, path) = fresh_path();
    assert!(!PidFile::remove_stale(&path).unwrap());
    for left in [None, Some(LeftFile::of_killed_owner())] {
        match left {
            Some(left) => left.restore(&path),
            None => write(&path, format!("{DEAD}\n")),
        }
        assert!(PidFile::is_stale(&path).unwrap() && path.exists());
        assert!(PidFile::remove_stale(&path).unwrap());
        assert!(!path.exists());
    }
    let mut holder = Actor::start(&spec(&path));
    holder.expect("try", "held");
    assert!(!PidFile::remove_stale(&path).unwrap());
    assert_eq!(first_line(&path), holder.pid().to_string());
}

#[cfg(target_os = "linux")]
#[test]
fn a4_file_without_identity_is_judged_by_its_time() {
    let (_directory, path) = fresh_path();
    let mut holder = Actor::start(&spec(&path));
    holder.expect("try", "held");
    assert!(identity(&path).is_some_and(|identity| identity.len() <= 64));
    rustix::fs::removexattr(&path, IDENTITY).unwrap();
    assert!(lock(&path).try_lock().unwrap_err().is_held());
    let mut waiter = Actor::start(&spec(&path));
    waiter.tell_to_wait("lock");
    holder.kill();
    assert_eq!(waiter.answer(), format!("held recovered {}", holder.pid()));
    waiter.expect("release", "released");
}

#[cfg(target_os = "linux")]
#[test]
fn a4_identity_is_ignored_after_write_by_other_program() {
    let (_directory, path) = fresh_path();
    // A program of a later process with the same pid writes into the file that a killed process
    // left.
    let daemon = Foreign::start();
    let mut guard = lock(&path).try_lock().unwrap();
    guard
        .rewrite_for(&lockkit::Owner::of(daemon.pid()).unwrap())
        .unwrap();
    let left = LeftFile::at(&path).with_changed_byte(START);
    drop(guard);
    left.restore(&path);
    assert!(matches!(
        PidFile::inspect(&path).unwrap(),
        PidStatus::Stale(_)
    ));
    write(&path, &left.text);
    assert!(identity(&path).is_some(), "writing leaves it there");
    assert!(
        matches!(PidFile::inspect(&path).unwrap(), PidStatus::Running(owner) if owner.pid() == daemon.pid())
    );
    assert!(lock(&path).try_lock().unwrap_err().is_held());
}

#[cfg(target_os = "linux")]
#[test]
fn a5_taker_file_is_not_accessible_to_other_users() {
    if !lockkit_tests::failpoint::are_enabled() {
        return;
    }
    let (directory, path) = fresh_path();
    let taker = directory.path().join(".app.pid.lockkit");
    let mut seen = 0;
    for at in 1.. {
        write(&path, format!("{DEAD}\n"));
        let mut victim = Actor::start_with(&spec(&path), |command| {
            command.arg("steps").arg("alone");
        });
        victim.expect(&at.to_string(), "ready");
        let last = victim.ask("go");
        victim.kill();
        if let Ok(found) = fs::metadata(&taker) {
            seen += 1;
            assert_eq!(
                found.permissions().mode() & 0o777,
                0o600,
                "killed at step {at}"
            );
        }
        // The round also covers an acquisition without a pidfile.
        if at % 2 == 0 {
            let _ = fs::remove_file(&path);
        }
        lock(&path).try_lock().unwrap().release().unwrap();
        assert_eq!(
            fs::read_dir(directory.path()).unwrap().count(),
            0,
            "killed at step {at}"
        );
        if last.starts_with("passed ") {
            break;
        }
    }
    assert!(seen > 0, "it was never left");
}

#[test]
fn a2_foreign_file_with_taker_file_name_is_kept() {
    let (directory, path) = fresh_path();
    let taker = directory.path().join(".app.pid.lockkit");
    for (content, left) in [
        ("precious notes", Some(format!("{DEAD}\n"))),
        ("4242 and more", None),
        ("12x", Some(String::new())),
    ] {
        fs::write(&taker, content).unwrap();
        set_age(&taker, LONG_AGO);
        let _ = fs::remove_file(&path);
        if let Some(left) = &left {
            write_ago(&path, left, OLD);
        }
        let mut errors = vec![
            lock(&path).try_lock().unwrap_err(),
            lock(&path).lock_for(LIVELY).unwrap_err(),
        ];
        if left.as_ref().is_some_and(|left| !left.is_empty()) {
            errors.extend([
                PidFile::is_stale(&path).unwrap_err(),
                PidFile::remove_stale(&path).unwrap_err(),
            ]);
        }
        for error in errors {
            assert!(
                matches!(error.kind(), ErrorKind::Insecure { path: named, .. } if *named == taker),
                "{error}"
            );
        }
        assert_eq!(
            (text(&taker), fs::read_to_string(&path).ok()),
            (content.to_owned(), left)
        );
    }
    // The content that a killed process left.
    for content in ["", "\n", "4194304\n"] {
        fs::write(&taker, content).unwrap();
        write(&path, format!("{DEAD}\n"));
        assert!(PidFile::is_stale(&path).unwrap());
        lock(&path).try_lock().unwrap().release().unwrap();
        assert!(!taker.exists());
    }
}

#[cfg(target_os = "linux")]
#[test]
fn b6_is_stale_and_remove_stale_agree_on_taker_file() {
    let Some(user) = lockkit_tests::another_user() else {
        return;
    };
    let (directory, path) = fresh_path();
    let taker = directory.path().join(".app.pid.lockkit");
    fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
    write(&path, format!("{DEAD}\n"));
    fs::create_dir(&taker).unwrap();
    for error in [
        PidFile::is_stale(&path).unwrap_err(),
        PidFile::remove_stale(&path).unwrap_err(),
    ] {
        assert!(
            matches!(error.kind(), ErrorKind::Insecure { .. }),
            "{error}"
        );
    }
    fs::remove_dir(&taker).unwrap();
    // The taker file belongs to root, and no other user may open it. The result is an error, after
    // a short time in which another process could remove the file.
    write(&taker, "");
    fs::set_permissions(&taker, Permissions::from_mode(0o600)).unwrap();
    let mut other = Actor::start_as(&spec(&path), user.uid);
    let answer = other.ask("try");
    assert!(
        answer.starts_with("error Io") && answer.contains(".app.pid.lockkit"),
        "{answer}"
    );
    other.tell_to_wait("lock");
    fs::remove_file(&taker).unwrap();
    assert_eq!(other.answer(), format!("held recovered {DEAD}"));
}

#[cfg(target_os = "linux")]
#[test]
fn a5_stopped_taker_counts_as_held_without_endless_wait() {
    let (directory, path) = fresh_path();
    let taker = directory.path().join(".app.pid.lockkit");
    let stopped = File::create(&taker).unwrap();
    let mut holder = Actor::start(&spec(&taker.with_file_name("other.pid")));
    holder.expect("try", "held");
    // A stopped taker has this lock: the write lock on the taker file.
    assert!(
        nix::fcntl::fcntl(
            &stopped,
            nix::fcntl::FcntlArg::F_OFD_SETLK(&nix::libc::flock {
                l_type: nix::libc::F_WRLCK as i16,
                l_whence: 0,
                l_start: 0,
                l_len: 0,
                l_pid: 0,
            })
        )
        .is_ok()
    );
    for content in [Some(format!("{DEAD}\n")), None] {
        match &content {
            Some(content) => write(&path, content),
            None => fs::remove_file(&path).unwrap(),
        }
        let start = Instant::now();
        let error = lock(&path).try_lock().unwrap_err();
        assert!(error.is_held() && error.owner().is_none(), "{error}");
        assert!(
            lock(&path)
                .lock_for(Duration::from_millis(50))
                .unwrap_err()
                .is_timeout()
        );
        assert!(!PidFile::remove_stale(&path).unwrap());
        assert!(start.elapsed() < LIVELY / 2);
        assert_eq!(fs::read_to_string(&path).ok(), content);
    }
    drop(stopped);
    lock(&path).try_lock().unwrap().release().unwrap();
    assert!(!taker.exists());
}

#[cfg(target_os = "linux")]
#[test]
fn a7_failed_lock_leaves_file_of_holder() {
    if !lockkit_tests::fault_injection::calls_can_fail() {
        return;
    }
    let (directory, path) = fresh_path();
    let taker = directory.path().join(".app.pid.lockkit");
    for error in ["ENOLCK", "ENOMEM", "EIO"] {
        for call in ["flock", "fcntl"] {
            let mut holder = Actor::start(&spec(&path));
            holder.expect("try", "held");
            let mut victim = Actor::start(&spec(&path));
            victim.expect("owner", &format!("owner {}", holder.pid()));
            let mut strace = lockkit_tests::fault_injection::Strace::attach(
                &victim,
                &["-e".to_owned(), format!("inject={call}:error={error}")],
            );
            assert!(victim.ask("try").starts_with("error "), "{call} {error}");
            assert_eq!(first_line(&path), holder.pid().to_string());
            // The taker file shows that another taker is at work.
            holder.kill();
            write(&taker, "");
            assert!(victim.ask("try").starts_with("error "), "{call} {error}");
            strace.end();
            assert!(path.exists(), "{call} {error}");
            // A process with the write lock may remove it, and no other process may.
            assert!(call == "flock" || taker.exists(), "{error}");
            lock(&path).try_lock().unwrap().release().unwrap();
        }
    }
}

lockkit_tests::left_out! { "it takes other users, modes of files, links, signals or small disks, as Linux has them":
    pidfile_on_tmpfs_older_than_boot_is_not_stale,
    pidfile_of_other_host_kept_and_of_this_machine_taken_over,
    a4_file_without_identity_is_judged_by_its_time,
    a4_identity_is_ignored_after_write_by_other_program,
    a5_taker_file_is_not_accessible_to_other_users,
    a5_stopped_taker_counts_as_held_without_endless_wait,
    a7_failed_lock_leaves_file_of_holder,
    b6_is_stale_and_remove_stale_agree_on_taker_file,
}
