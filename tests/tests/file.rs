//! FileLock: every case of the suite, and cases of its own.

#[cfg(target_os = "linux")]
use std::fs::File;
use std::fs::{self};
use std::io::{Read, Seek, Write};
#[cfg(target_os = "linux")]
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
#[cfg(target_os = "linux")]
use std::process::Child;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use lockkit::{CancelToken, Error, ErrorKind, FileLock, Wait};
#[cfg(target_os = "linux")]
use lockkit_tests::another_user;
use lockkit_tests::small_disk::SmallDisk;
use lockkit_tests::wine::{DELETED, wine_cannot_judge};
use lockkit_tests::{Actor, Belongings, LIVELY, Spec, conformance, sleeps, thread_id, until};
use tempfile::TempDir;

conformance!(exclusive, lockkit_tests::Kind::FILE);
conformance!(shared, lockkit_tests::Kind::FILE_SHARED);

fn directory() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// Runs `work` while another thread waits with `take`, which must acquire afterwards.
fn run_while_waiter_sleeps(take: impl FnOnce() + Send, work: impl FnOnce()) {
    std::thread::scope(|scope| {
        let (send, thread) = std::sync::mpsc::channel();
        let waiter = scope.spawn(move || {
            send.send(thread_id()).unwrap();
            drop(send);
            take();
        });
        let thread = thread.recv().unwrap();
        until("the waiter sleeps", || sleeps(std::process::id(), thread));
        work();
        waiter.join().unwrap();
    });
}

#[test]
fn exclusive_waiter_acquires_after_last_shared_release() {
    let directory = directory();
    let lock = FileLock::new(directory.path().join("lock"));
    let first = lock.lock_shared().unwrap();
    let second = lock.try_lock_shared().unwrap();
    let third = FileLock::new(lock.path()).lock_shared_for(LIVELY).unwrap();
    assert!(first.is_shared());
    for reader in [first, second] {
        assert!(lock.try_lock().unwrap_err().is_held());
        reader.release().unwrap();
    }
    assert!(
        lock.lock_for(Duration::from_millis(5))
            .unwrap_err()
            .is_timeout()
    );
    run_while_waiter_sleeps(
        || assert!(!lock.lock().unwrap().is_shared()),
        || drop(third),
    );
}

#[test]
fn acquire_shared_of_exclusive_lock_waits_or_fails() {
    let directory = directory();
    let lock = FileLock::new(directory.path().join("lock"));
    let writer = lock.lock().unwrap();
    assert!(lock.try_lock_shared().unwrap_err().is_held());
    assert!(
        lock.lock_shared_for(Duration::from_millis(5))
            .unwrap_err()
            .is_timeout()
    );
    let token = CancelToken::new();
    run_while_waiter_sleeps(
        || {
            let wait = Wait::forever().or_cancelled(&token);
            assert!(lock.acquire_shared(&wait).unwrap_err().is_cancelled());
        },
        || token.cancel(),
    );
    run_while_waiter_sleeps(|| drop(lock.lock_shared().unwrap()), || drop(writer));
}

#[test]
fn release_by_one_of_two_readers_excludes_writers() {
    let directory = directory();
    let spec = Spec::parse(&format!("file:{}", directory.path().join("lock").display()));
    let lock = FileLock::new(spec.at());
    let (one, other) = (lock.lock_shared().unwrap(), lock.lock_shared().unwrap());
    let mut writer = Actor::start(&spec);
    drop(one);
    assert!(writer.ask("try").starts_with("error Held"));
    drop(other);
    writer.expect("try", "held");
}

/// Starts flock(1) on `path`, with `options`, running `command`.
#[cfg(target_os = "linux")]
fn flock(options: &[&str], path: &Path, command: &[&str]) -> Child {
    let mut flock = Command::new("flock");
    flock
        .args(options)
        .arg(path)
        .args(command)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    flock.spawn().expect("flock(1), of util-linux")
}

#[cfg(target_os = "linux")]
fn succeeds(mut child: Child) -> bool {
    child.wait().unwrap().success()
}

#[cfg(target_os = "linux")]
#[test]
fn file_lock_and_flock_command_exclude_each_other() {
    let directory = directory();
    let path = directory.path().join("lock");
    let lock = FileLock::new(&path);
    let guard = lock.lock().unwrap();
    assert!(!succeeds(flock(&["-n"], &path, &["true"])));
    assert!(!succeeds(flock(&["-n", "-s"], &path, &["true"])));
    drop(guard);
    let guard = lock.lock_shared().unwrap();
    assert!(!succeeds(flock(&["-n"], &path, &["true"])));
    assert!(succeeds(flock(&["-n", "-s"], &path, &["true"])));
    drop(guard);
    assert!(succeeds(flock(&["-n"], &path, &["true"])));

    for (options, shared_is_free) in [(&["-x"][..], false), (&["-s"][..], true)] {
        // The command reports that it runs, and keeps running until its input ends.
        let mut holder = flock(options, &path, &["sh", "-c", "echo inside; cat"]);
        let mut output = holder.stdout.take().unwrap();
        output.read_exact(&mut [0; 7]).unwrap();
        assert!(lock.try_lock().unwrap_err().is_held());
        assert_eq!(lock.try_lock_shared().is_ok(), shared_is_free);
        run_while_waiter_sleeps(|| drop(lock.lock().unwrap()), || drop(holder.stdin.take()));
        assert!(succeeds(holder));
    }
}

#[test]
fn guard_file_reads_and_writes_locked_file() {
    let directory = directory();
    let lock = FileLock::new(directory.path().join("lock"));
    lock.lock().unwrap().file().write_all(b"mine").unwrap();
    let guard = lock.lock_shared().unwrap();
    let mut text = String::new();
    guard.file().rewind().unwrap();
    guard.file().read_to_string(&mut text).unwrap();
    assert_eq!(text, "mine");
}

#[cfg(target_os = "linux")]
#[test]
fn create_with_mode_applies_only_to_new_file() {
    let directory = directory();
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
    let path = directory.path().join("private");
    drop(FileLock::new(&path).lock().unwrap());
    assert_eq!(mode(&path), 0o600);
    let path = directory.path().join("open");
    drop(FileLock::new(&path).create_with_mode(0o640).lock().unwrap());
    assert_eq!(mode(&path), 0o640);
    drop(FileLock::new(&path).create_with_mode(0o600).lock().unwrap());
    assert_eq!(mode(&path), 0o640);
}

#[test]
fn acquire_file_creates_directories_only_on_request() {
    let directory = directory();
    let path = directory.path().join("a/b/lock");
    let error = FileLock::new(&path).lock().unwrap_err();
    assert!(
        matches!(
            error.kind(),
            ErrorKind::Io {
                action: "create",
                ..
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("a/b/lock"), "{error}");
    assert_eq!(directory.path().read_dir().unwrap().count(), 0);
    drop(FileLock::new(&path).create_parents().lock().unwrap());
    assert!(path.is_file());
}

#[cfg(target_os = "linux")]
#[test]
fn acquire_of_directory_excludes_others() {
    let directory = directory();
    let lock = FileLock::new(directory.path());
    let guard = lock.lock().unwrap();
    assert!(lock.try_lock_shared().unwrap_err().is_held());
    drop(guard);
    assert!(succeeds(flock(&["-n"], directory.path(), &["true"])));
}

#[cfg(target_os = "linux")]
#[test]
fn file_lock_of_fifo_does_not_disturb_its_reader() {
    let directory = directory();
    let fifo = directory.path().join("fifo");
    rustix::fs::mkfifoat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
    )
    .unwrap();
    let mut reader = Command::new("cat")
        .arg(&fifo)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    until("it waits for a writer", || {
        let stat =
            |what| fs::read_to_string(format!("/proc/{}/{what}", reader.id())).unwrap_or_default();
        stat("comm").trim() == "cat" && sleeps(reader.id(), reader.id())
    });
    assert!(FileLock::new(&fifo).lock().is_err());
    // A disturbed reader would see the end of the file immediately.
    std::thread::sleep(Duration::from_millis(100));
    let ended = reader.try_wait().unwrap();
    reader.kill().unwrap();
    reader.wait().unwrap();
    assert_eq!(ended, None);
}

#[cfg(target_os = "linux")]
#[test]
fn acquire_of_running_executable_succeeds() {
    let lock = FileLock::new(std::env::current_exe().unwrap());
    let guard = lock.lock().unwrap();
    assert!(lock.try_lock_shared().unwrap_err().is_held());
    drop(guard);
}

/// Returns the error's message with that of the system.
#[cfg(target_os = "linux")]
fn text(error: &Error) -> String {
    format!(
        "{error}: {}",
        std::error::Error::source(error)
            .map(ToString::to_string)
            .unwrap_or_default()
    )
}

#[cfg(target_os = "linux")]
#[test]
fn file_lock_of_unlockable_path_names_path_and_cause() {
    let directory = directory();
    let at = |name: &str| directory.path().join(name);
    rustix::fs::mkfifoat(
        rustix::fs::CWD,
        at("fifo"),
        rustix::fs::Mode::from_raw_mode(0o600),
    )
    .unwrap();
    symlink("loop", at("loop")).unwrap();
    fs::write(at("file"), "").unwrap();
    symlink("nowhere/at/all", at("dangling")).unwrap();
    for (path, action, because) in [
        (at("fifo"), "open", "neither a file nor a directory"),
        ("/dev/null".into(), "open", "neither a file nor a directory"),
        (at("loop"), "open", "ymbolic link"),
        (at("file/lock"), "open", "Not a directory"),
        (
            at("dangling"),
            "open",
            "a symlink to a file that does not exist",
        ),
        (at("missing/lock"), "create", "No such file"),
        (at(&"x".repeat(300)), "open", "too long"),
        (at("nul\0byte"), "open", "NUL byte"),
    ] {
        let lock = FileLock::new(&path);
        let error = [lock.lock(), lock.try_lock_shared()]
            .map(Result::unwrap_err)
            .map(|error| text(&error));
        for error in error {
            assert!(
                error.starts_with(&format!("cannot {action} {}", path.display())),
                "{error}"
            );
            assert!(error.contains(because), "{error}");
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn file_lock_needs_read_permission_and_reports_denial() {
    let Some(user) = another_user() else { return };
    let directory = directory();
    fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let file = |name: &str, mode| {
        let path = directory.path().join(name);
        drop(File::create(&path).unwrap());
        fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        Spec::parse(&format!("file:{}", path.display()))
    };
    let mut actor = Actor::start_as(&file("readable", 0o644), user.uid);
    actor.expect("try", "held");
    let denied = Actor::start_as(&file("private", 0o600), user.uid).ask("try");
    assert!(
        denied.starts_with("error Io: cannot open") && denied.contains("Permission denied"),
        "{denied}"
    );
    let spec = Spec::parse(&format!("file:{}", directory.path().join("new").display()));
    let denied = Actor::start_as(&spec, user.uid).ask("try");
    assert!(
        denied.starts_with("error Io: cannot create") && denied.contains("Permission denied"),
        "{denied}"
    );
    assert!(!Path::new(spec.at()).exists());
}

#[cfg(target_os = "linux")]
#[test]
fn waiter_of_replaced_file_acquires_new_file() {
    let directory = directory();
    for wait in [Wait::forever(), Wait::at_most(LIVELY)] {
        for replace in [
            (|path| fs::remove_file(path).unwrap()) as fn(&Path),
            |path| fs::rename(path, path.with_extension("old")).unwrap(),
            |path| {
                let new = path.with_extension("new");
                fs::write(&new, "").unwrap();
                fs::rename(new, path).unwrap();
            },
            |path| {
                let directory = path.parent().unwrap();
                fs::rename(directory, directory.with_extension("old")).unwrap();
                fs::create_dir(directory).unwrap();
            },
        ] {
            let path = directory.path().join("inner/lock");
            let lock = FileLock::new(&path).create_parents();
            let holder = FileLock::new(&path).create_parents().lock().unwrap();
            run_while_waiter_sleeps(
                || {
                    let guard = lock.acquire(&wait).unwrap();
                    let (open, named) = (
                        guard.file().metadata().unwrap(),
                        fs::metadata(&path).unwrap(),
                    );
                    assert_eq!(open.ino(), named.ino());
                    assert!(FileLock::new(&path).try_lock().unwrap_err().is_held());
                },
                || {
                    replace(&path);
                    drop(holder);
                },
            );
            fs::remove_dir_all(directory.path().join("inner")).unwrap();
            let _ = fs::remove_dir_all(directory.path().join("inner.old"));
        }
    }
}

#[test]
fn deadline_is_not_restarted_when_file_is_replaced() {
    if wine_cannot_judge("a file that is open cannot be renamed there") {
        return;
    }
    let directory = directory();
    let path = directory.path().join("lock");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let held = FileLock::new(&path).lock().unwrap();
        scope.spawn(|| {
            // Whenever the waiter gets the old file, a new one is already held.
            let mut held = held;
            while !stop.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(20));
                fs::rename(&path, path.with_extension("old")).unwrap();
                held = FileLock::new(&path).lock().unwrap();
            }
            drop(held);
        });
        let result = FileLock::new(&path).lock_for(Duration::from_millis(100));
        stop.store(true, Ordering::Relaxed);
        // A deadline that restarted with each file would end only after too many files.
        assert!(
            result.as_ref().err().is_none_or(Error::is_timeout),
            "{result:?}"
        );
    });
}

#[test]
fn deletion_under_lock_never_admits_two_holders() {
    if wine_cannot_judge(DELETED) {
        return;
    }
    let directory = directory();
    let path = directory.path().join("lock");
    let (inside, holds) = (AtomicBool::new(false), AtomicU32::new(0));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for worker in 0..4 {
            let (path, inside, holds, stop) = (&path, &inside, &holds, &stop);
            scope.spawn(move || {
                let lock = FileLock::new(path);
                let mut round = worker;
                while !stop.load(Ordering::Relaxed) {
                    let guard = lock.lock().unwrap();
                    assert!(!inside.swap(true, Ordering::SeqCst), "two are inside");
                    round += 1;
                    holds.fetch_add(1, Ordering::Relaxed);
                    inside.store(false, Ordering::SeqCst);
                    // The removal is the last action under the lock, because the next holder may
                    // create a new file immediately.
                    if round % 5 == 0 {
                        fs::remove_file(path).unwrap();
                    }
                    drop(guard);
                }
            });
        }
        until("there were enough rounds", || {
            holds.load(Ordering::Relaxed) > 200_000
        });
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn deletion_without_lock_is_noticed_soon() {
    let directory = directory();
    let path = directory.path().join("lock");
    let lock = FileLock::new(&path);
    for _ in 0..1000 {
        drop(lock.lock().unwrap());
    }
    fs::remove_file(&path).unwrap();
    until("the loop has noticed", || {
        for _ in 0..100 {
            drop(lock.lock().unwrap());
        }
        path.exists()
    });
    assert!(FileLock::new(&path).try_lock().is_ok());
}

#[test]
fn repeated_acquire_leaks_no_descriptor() {
    let directory = directory();
    let spec = Spec::parse(&format!("file:{}", directory.path().join("lock").display()));
    let mut actor = Actor::start(&spec);
    actor.expect("lock", "held");
    actor.expect("release", "released");
    let before = Belongings::of(actor.pid());
    for _ in 0..100 {
        actor.expect("lock", "held");
        actor.expect("release", "released");
    }
    assert_eq!(Belongings::of(actor.pid()), before);
}

#[test]
fn flock_unsupported_error_leaves_no_file() {
    let directory = directory();
    let spec = Spec::parse(&format!("file:{}", directory.path().join("lock").display()));
    let strace = || {
        let mut strace = Command::new("strace");
        strace.args([
            "-f",
            "-qq",
            "-o",
            "/dev/null",
            "-e",
            "trace=flock",
            "-e",
            "inject=flock:error=EOPNOTSUPP",
        ]);
        strace
    };
    if !strace()
        .arg("true")
        .status()
        .is_ok_and(|status| status.success())
    {
        lockkit_tests::left_out("strace is not here, or may not trace");
        return;
    }
    let mut actor = Actor::start_with(&spec, |command| {
        let program = command.get_program().to_owned();
        *command = strace();
        command
            .arg(program)
            .arg(spec.invite())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
    });
    for command in ["try", "lock", "lock-for 10"] {
        let answer = actor.ask(command);
        assert!(
            answer.starts_with("error Io: cannot lock") && answer.contains("not supported"),
            "{answer}"
        );
        assert!(!Path::new(spec.at()).exists());
    }
}

#[test]
fn acquire_on_full_disk_needs_space_only_to_create() {
    let Some(disk) = SmallDisk::mount("size=4k,nr_inodes=2") else {
        return;
    };
    let path = disk.path().join("lock");
    let full = FileLock::new(&path).lock().and_then(|guard| {
        let error = guard.file().write_all(&[0; 8192]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
        guard.release()
    });
    // The only file that fits exists now.
    let second = FileLock::new(disk.path().join("second")).lock();
    let again = FileLock::new(&path).lock();
    let files = disk.path().read_dir().unwrap().count();
    full.unwrap();
    drop(again.unwrap());
    let error = second.unwrap_err();
    assert!(
        matches!(
            error.kind(),
            ErrorKind::Io {
                action: "create",
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(files, 1);
}

#[cfg(target_os = "linux")]
#[test]
fn list_reports_locked_file_with_holders_and_waiters() {
    let spec = lockkit_tests::Kind::FILE.fresh();
    let lock = FileLock::new(spec.at());
    assert_eq!(
        (lock.holders().unwrap().len(), lock.waiters().unwrap()),
        (0, 0),
        "nothing is there"
    );
    let mut holder = Actor::start(&spec);
    holder.expect("lock", "held");
    let mut waiter = Actor::start(&spec);
    waiter.tell_to_wait("lock");
    assert_eq!(
        lock.holders()
            .unwrap()
            .iter()
            .map(lockkit::Owner::pid)
            .collect::<Vec<_>>(),
        [holder.pid()]
    );
    assert_eq!(lock.waiters().unwrap(), 1);
    assert!(
        FileLock::list()
            .iter()
            .any(|found| found.path() == lock.path())
    );
    drop((holder, waiter));
    assert!(lock.holders().unwrap().is_empty());
    assert!(
        !FileLock::list()
            .iter()
            .any(|found| found.path() == lock.path())
    );
    spec.clean();
}

lockkit_tests::left_out! { "it takes other users, modes of files, links, FIFOs or forks, as Linux has them":
    acquire_of_running_executable_succeeds,
    file_lock_and_flock_command_exclude_each_other,
    list_reports_locked_file_with_holders_and_waiters,
    acquire_of_directory_excludes_others,
    create_with_mode_applies_only_to_new_file,
    file_lock_of_fifo_does_not_disturb_its_reader,
    file_lock_of_unlockable_path_names_path_and_cause,
    file_lock_needs_read_permission_and_reports_denial,
    waiter_of_replaced_file_acquires_new_file,
}
