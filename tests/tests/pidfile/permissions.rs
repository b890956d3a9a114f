//! Permissions, users, links and full disks.

#[cfg(unix)]
use std::fs;
#[cfg(target_os = "linux")]
use std::fs::Permissions;
#[cfg(target_os = "linux")]
use std::os::unix::fs::{PermissionsExt, chown, symlink};
#[cfg(target_os = "linux")]
use std::os::unix::process::CommandExt;
#[cfg(target_os = "linux")]
use std::path::Path;
#[cfg(target_os = "linux")]
use std::process::{Child, Command, Stdio};
#[cfg(target_os = "linux")]
use std::time::Instant;

#[cfg(unix)]
use lockkit::ErrorKind;
#[cfg(target_os = "linux")]
use lockkit::{PidFile, PidStatus};
#[cfg(target_os = "linux")]
use lockkit_tests::{Actor, until};

#[cfg(unix)]
use crate::support::*;

#[cfg(target_os = "linux")]
#[test]
fn pidfile_mode_is_at_most_0644_unless_set() {
    let (_directory, path) = fresh_path();
    let mode = |lock: PidFile| {
        let _guard = lock.try_lock().unwrap();
        fs::metadata(&path).unwrap().permissions().mode() & 0o777
    };
    assert_eq!(mode(lock(&path)) & 0o600, 0o600);
    assert_eq!(mode(lock(&path)) & !0o644, 0);
    assert_eq!(mode(lock(&path).create_with_mode(0o600)), 0o600);
}

#[cfg(target_os = "linux")]
#[test]
fn pidfile_of_pid_1_is_held_for_unprivileged_user() {
    if !is_root() {
        return lockkit_tests::left_out("acting as another user needs root");
    }
    let (directory, path) = fresh_path();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
    write(&path, "1\n");
    // The result is the same if the file is writable.
    for mode in [0o644, 0o666] {
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        let mut actor = Actor::start_as(&spec(&path), NOBODY);
        for command in ["try", "lock-for 20"] {
            let answer = actor.ask(command);
            assert!(
                answer.starts_with("error Held") || answer.starts_with("error Timeout"),
                "{answer}"
            );
            assert!(answer.contains("by pid 1"), "{answer}");
        }
        assert_eq!(text(&path), "1\n");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn acquire_without_permission_fails_and_keeps_file() {
    if !is_root() {
        return lockkit_tests::left_out(
            "root may write everything, and acting as another user needs root",
        );
    }
    let (directory, path) = fresh_path();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
    let mut actor = Actor::start_as(&spec(&path), NOBODY);
    // An unreadable file cannot be judged.
    write(&path, "1\n");
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    let answer = actor.ask("try");
    assert!(
        answer.starts_with(&format!("error Io: cannot open {}", path.display())),
        "{answer}"
    );
    assert!(answer.contains("Permission denied"), "{answer}");
    assert_eq!(text(&path), "1\n");
    // A readable file is replaced, if the directory allows it.
    let dead = format!("{DEAD}\n");
    write(&path, &dead);
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    for mode in [0o755, 0o1777] {
        fs::set_permissions(directory.path(), Permissions::from_mode(mode)).unwrap();
        let answer = actor.ask("try");
        assert!(
            answer.starts_with(&format!("error Io: cannot replace {}", path.display())),
            "{answer}"
        );
        assert_eq!(text(&path), dead);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
    fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
    actor.expect("try", &format!("held recovered {DEAD}"));
    actor.expect("release", "released");
    let _guard = lock(&path).try_lock().unwrap();
    let answer = actor.ask("try");
    assert!(
        answer.starts_with("error Held") && answer.contains(&format!("by pid {}", my_pid())),
        "{answer}"
    );
}

#[cfg(target_os = "linux")]
#[test]
fn acquire_in_unwritable_directory_error_names_path() {
    if !is_root() {
        return lockkit_tests::left_out(
            "root may write everything, and acting as another user needs root",
        );
    }
    let (directory, path) = fresh_path();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let answer = Actor::start_as(&spec(&path), NOBODY).ask("try");
    assert!(
        answer.starts_with(&format!("error Io: cannot create {}", path.display())),
        "{answer}"
    );
    assert!(answer.contains("Permission denied"), "{answer}");
}

#[cfg(target_os = "linux")]
#[test]
fn pidfile_release_without_directory_permission_blanks_file() {
    if !is_root() {
        return lockkit_tests::left_out("acting as another user needs root");
    }
    let (directory, path) = fresh_path();
    chown(directory.path(), Some(NOBODY), None).unwrap();
    let mut actor = Actor::start_as(&spec(&path), NOBODY);
    actor.expect("try", "held");
    chown(directory.path(), Some(0), Some(0)).unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let answer = actor.ask("release");
    assert!(
        answer.starts_with(&format!("error Io: cannot remove {}", path.display())),
        "{answer}"
    );
    assert_eq!(text(&path), "\n");
    // This process may not replace the file, but the user that started it may.
    assert!(actor.ask("try").contains("Permission denied"));
    assert_eq!(text(&path), "\n");
    let guard = lock(&path).try_lock().unwrap();
    assert_eq!((guard.recovered(), first_line(&path)), (None, my_pid()));
}

#[cfg(target_os = "linux")]
#[test]
fn acquire_of_special_file_is_refused_at_once() {
    let (directory, path) = fresh_path();
    let fifo = directory.path().join("fifo");
    let made = Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    for special in [
        directory.path(),
        &fifo,
        Path::new("/dev/null"),
        Path::new("/"),
    ] {
        for error in [
            lock(special).lock().unwrap_err(),
            PidFile::inspect(special).unwrap_err(),
            PidFile::remove_stale(special).unwrap_err(),
        ] {
            let ErrorKind::Io { path, source, .. } = error.kind() else {
                panic!("{error}")
            };
            assert_eq!(
                (path.as_path(), source.to_string().as_str()),
                (special, "it is no plain file")
            );
        }
    }
    let below = path.join("below");
    write(&path, "");
    assert!(matches!(
        lock(&below).try_lock().unwrap_err().kind(),
        ErrorKind::Io { .. }
    ));
}

#[cfg(target_os = "linux")]
#[test]
fn acquire_of_link_is_refused_and_keeps_its_target() {
    let (directory, path) = fresh_path();
    let target = directory.path().join("precious");
    write_ago(&target, "precious", OLD);
    let refused = |path: &Path| {
        for error in [
            lock(path).try_lock().unwrap_err(),
            PidFile::remove_stale(path).unwrap_err(),
        ] {
            assert!(
                matches!(error.kind(), ErrorKind::Insecure { path: named, .. } if named == path),
                "{error}"
            );
        }
    };
    // Emacs, Chromium and Firefox keep pids in such links.
    for leads_to in [
        target.as_path(),
        Path::new("user@host.4242:1700000000"),
        Path::new("host-4242"),
        &path,
    ] {
        symlink(leads_to, &path).unwrap();
        refused(&path);
        if leads_to != target {
            let error = PidFile::inspect(&path).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Io { .. }), "{error}");
        }
        fs::remove_file(&path).unwrap();
    }
    fs::hard_link(&target, &path).unwrap();
    refused(&path);
    assert_eq!(text(&target), "precious");
    // For a loop in the parent directories the error is the system's.
    symlink("loop", directory.path().join("loop")).unwrap();
    let error = lock(&directory.path().join("loop/app.pid"))
        .try_lock()
        .unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Io { .. }), "{error}");
}

#[cfg(target_os = "linux")]
#[test]
fn acquire_pidfile_on_full_disk_fails_and_changes_nothing() {
    let (directory, path) = fresh_path();
    // The file size limit simulates a full disk, with its signal ignored.
    let start = |blocks: &str| {
        let script = format!("trap '' XFSZ && ulimit -f {blocks} && exec \"$0\" \"$1\"");
        start_through(&spec(&path), "bash", &["-c", &script])
    };
    let mut full = start("0");
    let answer = full.ask("try");
    assert!(
        answer.starts_with(&format!("error Io: cannot write {}", path.display())),
        "{answer}"
    );
    assert!(answer.contains("File too large"), "{answer}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    for stale in [format!("{DEAD}\n"), String::new()] {
        write_ago(&path, &stale, OLD);
        let answer = full.ask("try");
        assert!(
            answer.starts_with(&format!("error Io: cannot write {}", path.display())),
            "{answer}"
        );
        assert_eq!(text(&path), stale);
        lock(&path).try_lock().unwrap().release().unwrap();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn acquire_on_full_file_system_fails_and_leaves_no_file() {
    let (directory, path) = fresh_path();
    let script = format!(
        "mount -t tmpfs -o size=4k,nr_inodes=8 none {0} && head -c 4096 /dev/zero > {0}/full && exec \"$0\" \"$1\"",
        directory.path().display()
    );
    let allowed = Command::new("unshare")
        .args(["-m", "true"])
        .stderr(Stdio::null())
        .status();
    if !is_root() || !allowed.is_ok_and(|status| status.success()) {
        return lockkit_tests::left_out("mounting a file system is not allowed here");
    }
    let mut actor = start_through(&spec(&path), "unshare", &["-m", "sh", "-c", &script]);
    let answer = actor.ask("try");
    assert!(answer.contains("No space left on device"), "{answer}");
    let seen = format!("/proc/{}/root{}", actor.pid(), directory.path().display());
    let left: Vec<_> = fs::read_dir(seen)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["full"]);
}

/// Starts processes of a user that hold and wait for every lock that a reader of the file can
/// request.
#[cfg(target_os = "linux")]
fn reader_with_all_locks(path: &Path, uid: u32) -> Option<Vec<Child>> {
    let Some(python) = python() else {
        lockkit_tests::left_out("there is no python3 here");
        return None;
    };
    let program = "\
import fcntl,os,sys
f=open(sys.argv[1]); how=sys.argv[2]; kind=fcntl.LOCK_SH if how.endswith('sh') else fcntl.LOCK_EX
print(1, flush=True)
if how.startswith('flock'):
    fcntl.flock(f, kind)
elif how == 'fcntl':
    fcntl.lockf(f, fcntl.LOCK_SH)
elif how == 'ofd':
    import struct
    fcntl.fcntl(f, 38, struct.pack('hhqqi4x', fcntl.F_RDLCK, 0, 0, 0, 0))
print(2, flush=True)
sys.stdin.read()";
    let start = |how: &str| {
        let mut command = Command::new(&python);
        command
            .args(["-c", program])
            .arg(path)
            .arg(how)
            .uid(uid)
            .gid(uid)
            .current_dir("/");
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let out = child.stdout.as_mut().unwrap();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line).unwrap();
        assert_eq!(line, "1\n", "{how} opens the file");
        child
    };
    let children: Vec<_> = [
        "flock-ex", "flock-sh", "fcntl", "ofd", "flock-ex", "flock-sh",
    ]
    .map(start)
    .into();
    let asleep = |child: &Child| lockkit_tests::sleeps(child.id(), child.id());
    until("they have their locks, or wait for them", || {
        children.iter().all(asleep)
    });
    Some(children)
}

#[cfg(target_os = "linux")]
#[test]
fn a5_reader_of_pidfile_cannot_delay_restart() {
    let Some(user) = lockkit_tests::another_user() else {
        return;
    };
    let (directory, path) = fresh_path();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    for with_identity in [true, false] {
        let mut daemon = Actor::start(&spec(&path));
        daemon.expect("try", "held");
        if !with_identity {
            rustix::fs::removexattr(&path, IDENTITY).unwrap();
        }
        let Some(mut readers) = reader_with_all_locks(&path, user.uid) else {
            return;
        };
        let mut waiter = Actor::start(&spec(&path));
        waiter.tell_to_wait("lock");
        assert!(lock(&path).try_lock().unwrap_err().is_held());
        daemon.kill();
        assert_eq!(waiter.answer(), format!("held recovered {}", daemon.pid()));
        waiter.kill();

        let Some(more) = reader_with_all_locks(&path, user.uid) else {
            return;
        };
        readers.extend(more);
        assert!(
            matches!(PidFile::inspect(&path).unwrap(), PidStatus::Stale(owner) if owner.pid() == waiter.pid())
        );
        assert!(PidFile::is_stale(&path).unwrap());
        let start = Instant::now();
        let guard = lock(&path).try_lock().unwrap();
        println!("the restart took {:?}", start.elapsed());
        assert_eq!(
            guard.recovered().unwrap().owner().unwrap().pid(),
            waiter.pid()
        );
        drop(guard);

        let mut daemon = Actor::start(&spec(&path));
        daemon.expect("try", "held");
        let Some(more) = reader_with_all_locks(&path, user.uid) else {
            return;
        };
        readers.extend(more);
        daemon.kill();
        assert!(PidFile::remove_stale(&path).unwrap() && !path.exists());
        for mut reader in readers {
            reader.kill().unwrap();
            reader.wait().unwrap();
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}

#[cfg(unix)]
#[test]
fn a10_mode_that_denies_owner_read_is_refused() {
    let (directory, path) = fresh_path();
    for mode in [0o044, 0, 0o200, 0o100_644] {
        let errors = [
            lock(&path).create_with_mode(mode).try_lock().unwrap_err(),
            lockkit::FileLock::new(&path)
                .create_with_mode(mode)
                .try_lock()
                .unwrap_err(),
        ];
        for error in errors {
            assert!(
                matches!(
                    error.kind(),
                    ErrorKind::InvalidOption {
                        option: "create_with_mode",
                        ..
                    }
                ),
                "{error}"
            );
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a10_mode_is_exact_and_default_is_less_the_umask() {
    let (_directory, path) = fresh_path();
    let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
    for content in [None, Some(format!("{DEAD}\n"))] {
        let prepare = || content.iter().for_each(|content| write(&path, content));
        for wanted in [0o600, 0o640, 0o644, 0o664, 0o666] {
            prepare();
            let _guard = lock(&path).create_with_mode(wanted).try_lock().unwrap();
            assert_eq!(mode(), wanted);
        }
        for (umask, wanted) in [
            ("000", 0o644),
            ("022", 0o644),
            ("027", 0o640),
            ("077", 0o600),
        ] {
            prepare();
            let mut actor = start_through(
                &spec(&path),
                "sh",
                &["-c", &format!("umask {umask} && exec \"$0\" \"$1\"")],
            );
            assert!(actor.ask("try").starts_with("held"));
            assert_eq!(mode(), wanted, "umask {umask}");
            actor.expect("release", "released");
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a10_users_of_a_shared_directory_take_over_in_turn() {
    let (Some(one), Some(other)) = (lockkit_tests::another_user(), lockkit_tests::another_user())
    else {
        return;
    };
    let (directory, path) = fresh_path();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
    let mut before = None;
    for uid in [one.uid, other.uid, one.uid] {
        let mut actor = Actor::start_as(&spec(&path), uid);
        let expected = before.map_or("held".to_owned(), |pid| format!("held recovered {pid}"));
        actor.expect("try", &expected);
        assert!(lock(&path).try_lock().unwrap_err().is_held());
        actor.kill();
        before = Some(actor.pid());
    }
    // The taker file of another user's killed process is removed, if this user may open it.
    let taker = directory.path().join(".app.pid.lockkit");
    write(&taker, "4242\n");
    chown(&taker, Some(one.uid), None).unwrap();
    fs::set_permissions(&taker, Permissions::from_mode(0o666)).unwrap();
    Actor::start_as(&spec(&path), other.uid)
        .expect("try", &format!("held recovered {}", before.unwrap()));
    assert!(!taker.exists());
}

lockkit_tests::left_out! { "it takes other users, modes of files, links, signals or small disks, as Linux has them":
    acquire_of_special_file_is_refused_at_once,
    acquire_pidfile_on_full_disk_fails_and_changes_nothing,
    pidfile_mode_is_at_most_0644_unless_set,
    pidfile_of_pid_1_is_held_for_unprivileged_user,
    acquire_without_permission_fails_and_keeps_file,
    acquire_in_unwritable_directory_error_names_path,
    pidfile_release_without_directory_permission_blanks_file,
    acquire_of_link_is_refused_and_keeps_its_target,
    acquire_on_full_file_system_fails_and_leaves_no_file,
    a5_reader_of_pidfile_cannot_delay_restart,
    a10_mode_is_exact_and_default_is_less_the_umask,
    a10_users_of_a_shared_directory_take_over_in_turn,
}
