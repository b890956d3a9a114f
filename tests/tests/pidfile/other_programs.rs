//! Pidfiles of other programs, and other programs that read those of lockkit.

#[cfg(target_os = "linux")]
use std::fs::Permissions;
use std::fs::{self, File};
#[cfg(target_os = "linux")]
use std::os::unix::fs::PermissionsExt;
#[cfg(target_os = "linux")]
use std::os::unix::process::CommandExt;
#[cfg(target_os = "linux")]
use std::process::{Command, Stdio};
use std::time::Duration;
#[cfg(target_os = "linux")]
use std::time::Instant;

use lockkit::{ErrorKind, PidFile, PidStatus};
#[cfg(target_os = "linux")]
use lockkit_tests::until;
use lockkit_tests::{Actor, LIVELY};

use crate::support::*;

#[test]
fn foreign_pidfile_is_held_until_its_process_dies() {
    let (_directory, path) = fresh_path();
    let mut daemon = Foreign::start();
    let content = format!("{}\n", daemon.pid());
    write(&path, &content);
    for _ in 0..2 {
        let error = lock(&path).try_lock().unwrap_err();
        assert!(error.is_held(), "{error}");
        assert_eq!(error.owner().unwrap().pid(), daemon.pid());
        assert_eq!(
            error.owner().unwrap().program(),
            Some(if cfg!(windows) { "actor.exe" } else { "sleep" })
        );
    }
    assert!(
        lock(&path)
            .lock_for(Duration::from_millis(30))
            .unwrap_err()
            .is_timeout()
    );
    assert!(!PidFile::remove_stale(&path).unwrap());
    assert_eq!(text(&path), content);
    daemon.end();
    assert!(
        matches!(PidFile::inspect(&path).unwrap(), PidStatus::Stale(owner) if owner.pid() == daemon.pid())
    );
    let guard = lock(&path).try_lock().unwrap();
    assert_eq!(
        guard.recovered().unwrap().owner().unwrap().pid(),
        daemon.pid()
    );
    assert_eq!(first_line(&path), my_pid());
}

#[cfg(target_os = "linux")]
#[test]
fn pidfile_waiter_of_foreign_process_sleeps_until_its_exit() {
    let (_directory, path) = fresh_path();
    for command in ["lock", "lock-for 30000"] {
        let mut daemon = Foreign::start();
        write(&path, daemon.pid().to_string());
        let mut waiter = Actor::start(&spec(&path));
        waiter.tell_to_wait(command);
        let computed = || {
            let stat = fs::read_to_string(format!("/proc/{}/schedstat", waiter.pid())).unwrap();
            Duration::from_nanos(stat.split(' ').next().unwrap().parse().unwrap())
        };
        let (before, start) = (computed(), Instant::now());
        std::thread::sleep(Duration::from_millis(500));
        let share = (computed() - before).as_secs_f64() / start.elapsed().as_secs_f64();
        println!("{command}: {:.2} % of a core", share * 100.0);
        // A waiter that does not sleep uses a whole core. One that sleeps uses 1 to 8 %, depending
        // on the machine.
        assert!(share < 0.5, "{share}");
        waiter.expect_silence();
        daemon.end();
        assert_eq!(waiter.answer(), format!("held recovered {}", daemon.pid()));
        waiter.expect("release", "released");
    }
}

#[test]
fn acquire_of_too_long_file_is_refused_and_keeps_it() {
    let (_directory, path) = fresh_path();
    write(
        &path,
        format!("{}\n{}", std::process::id(), "x".repeat(5000)),
    );
    let long = text(&path);
    set_age(&path, OLD);
    let gigabyte = path.with_file_name("huge.pid");
    File::create(&gigabyte).unwrap().set_len(1 << 30).unwrap();
    set_age(&gigabyte, OLD);
    for path in [&path, &gigabyte] {
        assert!(matches!(
            PidFile::inspect(path).unwrap(),
            PidStatus::Invalid { .. }
        ));
        let removed = PidFile::remove_stale(path).unwrap_err();
        for error in [
            lock(path).try_lock().unwrap_err(),
            removed,
            PidFile::is_stale(path).unwrap_err(),
        ] {
            assert!(
                matches!(error.kind(), ErrorKind::NotAPidFile { .. }),
                "{error}"
            );
            assert!(
                error.to_string().contains("longer than 4096 bytes"),
                "{error}"
            );
            assert!(error.to_string().len() < 500);
        }
    }
    assert_eq!(text(&path), long);
    assert_eq!(fs::metadata(&gigabyte).unwrap().len(), 1 << 30);
}

#[cfg(target_os = "linux")]
#[test]
fn first_line_of_pidfile_is_pid_for_service_managers() {
    let (_directory, path) = fresh_path();
    let _guard = lock(&path).try_lock().unwrap();
    // systemd reads one line, strips spaces and wants a number; a shell reads a word.
    let read = |script: &str| {
        let output = Command::new("sh")
            .args(["-c", script])
            .arg(&path)
            .output()
            .unwrap();
        assert!(output.status.success(), "{script}: {output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(read("head -n 1 \"$0\""), my_pid());
    assert_eq!(read("read pid < \"$0\" && echo $pid"), my_pid());
    assert_eq!(
        read("read pid < \"$0\" && kill -0 $pid && echo alive"),
        "alive"
    );
}

#[cfg(target_os = "linux")]
#[test]
fn start_stop_daemon_and_lockkit_honour_each_other() {
    let Some(tool) = installed("start-stop-daemon") else {
        return lockkit_tests::left_out("there is no start-stop-daemon here");
    };
    let (_directory, path) = fresh_path();
    let run = |arguments: &[&str]| {
        let mut command = Command::new(&tool);
        command
            .args(arguments)
            .arg("--pidfile")
            .arg(&path)
            .args(["--exec", "/bin/sleep"]);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command
    };
    let started = run(&["--start", "--background", "--make-pidfile"])
        .args(["--", "600"])
        .status()
        .unwrap();
    assert!(started.success());
    // The program writes the file in place, so for a moment the file may be empty.
    let pid = || match PidFile::inspect(&path).unwrap() {
        PidStatus::Running(owner) => Some(owner.pid()),
        _ => None,
    };
    until("it has written its file", || pid().is_some());
    let daemon = pid().unwrap();
    println!("start-stop-daemon wrote {:?}", text(&path));
    until("it runs the program", || {
        fs::read_to_string(format!("/proc/{daemon}/comm")).is_ok_and(|name| name.trim() == "sleep")
    });
    let error = lock(&path).try_lock().unwrap_err();
    assert_eq!(error.owner().map(|owner| owner.pid()), Some(daemon));
    assert!(
        run(&["--stop", "--retry", "10"])
            .status()
            .unwrap()
            .success()
    );
    let guard = lock(&path).lock_for(lockkit_tests::LIVELY).unwrap();
    assert_eq!(guard.recovered().unwrap().owner().unwrap().pid(), daemon);
    // The tool reads our pidfile.
    let mut status = Command::new(&tool);
    status.arg("--status").arg("--pidfile").arg(&path);
    assert_eq!(status.status().unwrap().code(), Some(0), "running");
    drop(guard);
    assert_eq!(status.status().unwrap().code(), Some(3), "not running");
}

#[cfg(target_os = "linux")]
#[test]
fn acquire_pidfile_of_nginx_is_refused_until_it_stops() {
    let Some(nginx) = installed("nginx") else {
        return lockkit_tests::left_out("there is no nginx here");
    };
    let (directory, path) = fresh_path();
    let config = directory.path().join("nginx.conf");
    let at = directory.path().display();
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|what| format!("{what}_temp_path {at}/{what};\n"))
        .concat();
    write(
        &config,
        format!(
            "pid {at}/app.pid;\nerror_log {at}/error.log;\nevents {{}}\n\
             http {{\n{temporary}access_log off;\nserver {{ listen unix:{at}/socket; }}\n}}\n"
        ),
    );
    let run = |extra: &[&str]| {
        let status = Command::new(&nginx)
            .arg("-p")
            .arg(directory.path())
            .arg("-c")
            .arg(&config)
            .args(extra)
            .status();
        assert!(status.unwrap().success());
    };
    run(&[]);
    until("nginx has written its file", || {
        matches!(PidFile::inspect(&path).unwrap(), PidStatus::Running(_))
    });
    println!("nginx wrote {:?}", text(&path));
    // A signal that arrives before nginx has workers may be lost.
    let master = text(&path).trim().to_owned();
    until("nginx has a worker", || {
        fs::read_to_string(format!("/proc/{master}/task/{master}/children"))
            .is_ok_and(|children| !children.is_empty())
    });
    let error = lock(&path).try_lock().unwrap_err();
    assert_eq!(error.owner().unwrap().program(), Some("nginx"));
    assert_eq!(error.owner().unwrap().pid().to_string(), text(&path).trim());
    run(&["-s", "stop"]);
    lock(&path)
        .lock_for(lockkit_tests::LIVELY)
        .unwrap()
        .release()
        .unwrap();
}

/// Contents of files that are not pidfiles, each with its name.
const NO_PIDFILES: [(&str, &[u8]); 16] = [
    ("a configuration", b"key = value\n"),
    ("a negative number", b"-1"),
    ("zero", b"0\n"),
    ("a letter", b"a"),
    ("hexadecimal", b"0x1"),
    ("an underscore", b"1_0"),
    ("a letter behind the number", b"12x\n"),
    ("beyond all pids", b"99999999999999999999\n"),
    ("a lock file of Emacs", b"user@host.4242:1700000000"),
    ("a free lease", b"lockkit lease 1\n"),
    ("binary UUCP", &10_000_u32.to_ne_bytes()),
    (
        "binary UUCP that reads as white space",
        &8224_u32.to_ne_bytes(),
    ),
    (
        "PostgreSQL in single-user mode",
        b"-4242\n/var/lib/postgresql/17/main\n1700000000\n",
    ),
    ("a lock file of Chromium", b"host-4242"),
    ("an escape sequence", b"\x1b[2J"),
    ("a script", b"#!/bin/sh\necho 1\n"),
];

#[test]
fn a2_file_without_pid_is_refused_and_kept() {
    let (directory, path) = fresh_path();
    for (case, content) in NO_PIDFILES {
        for age in [Duration::ZERO, OLD, LONG_AGO * 100] {
            write_ago(&path, content, age);
            assert!(
                matches!(PidFile::inspect(&path).unwrap(), PidStatus::Invalid { .. }),
                "{case}"
            );
            for error in [
                lock(&path).try_lock().unwrap_err(),
                lock(&path).lock().unwrap_err(),
                lock(&path).lock_for(LIVELY).unwrap_err(),
                PidFile::is_stale(&path).unwrap_err(),
                PidFile::remove_stale(&path).unwrap_err(),
            ] {
                assert!(
                    matches!(error.kind(), ErrorKind::NotAPidFile { path: named, .. } if *named == path),
                    "{error}"
                );
                assert!(
                    !error.to_string().contains(char::is_control),
                    "{case}: {error}"
                );
            }
            assert_eq!(fs::read(&path).unwrap(), content, "{case}");
            assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "{case}");
        }
    }
}

#[test]
fn a2_wait_file_stops_being_pidfile_fails() {
    let (_directory, path) = fresh_path();
    let daemon = Foreign::start();
    write(&path, daemon.pid().to_string());
    for command in ["lock", "lock-for 30000"] {
        let mut waiter = Actor::start(&spec(&path));
        waiter.tell_to_wait(command);
        write(&path, "key = value\n");
        let answer = waiter.answer();
        assert!(answer.starts_with("error NotAPidFile"), "{answer}");
        assert_eq!(text(&path), "key = value\n");
        write(&path, daemon.pid().to_string());
    }
}

/// The forms in which programs write the pid `{}`.
const FORMS: [(&str, &str); 18] = [
    ("nginx, redis, mysqld, cron", "{}\n"),
    ("a program that writes no line end", "{}"),
    ("the X server, UUCP", "{:>10}\n"),
    ("minicom", "{:>10} minicom root\n"),
    ("minicom of another version", "{:>05} minicom root\n"),
    ("gammu", "{:>10} gammu\n"),
    ("a script that writes the date", "{} 2026-01-01\n"),
    ("postfix", "              {}\n"),
    ("leading zeros", "000{}\n"),
    ("a blank line first", "\n{}\n"),
    ("blank lines of Windows first", "\r\n \t\r\n{}\r\n"),
    (
        "PostgreSQL",
        "{}\n/var/lib/postgresql/17/main\n1700000000\n5432\n/run/postgresql\n*\n",
    ),
    ("sendmail", "{}\n/usr/sbin/sendmail -bd -q30m\n"),
    ("haproxy", "4194304\n{}\n4194303\n"),
    ("RHEL and LSB", "4194304 {}\n"),
    ("a C string with its end", "{}\0"),
    ("a C buffer", "{}\n\0\0\0\0\0\0\0"),
    ("words behind it", "{} started by init\n"),
];

/// Returns the form with the pid inserted.
fn written_by(form: &str, pid: u32) -> String {
    let padded = form
        .replace("{:>10}", &format!("{pid:>10}"))
        .replace("{:>05}", &format!("{pid:05}"));
    padded.replace("{}", &pid.to_string())
}

#[test]
fn a3_forms_of_other_programs_are_read() {
    let (_directory, path) = fresh_path();
    let daemon = Foreign::start();
    for (program, form) in FORMS {
        let content = written_by(form, daemon.pid());
        write_ago(&path, &content, OLD);
        let status = PidFile::inspect(&path).unwrap();
        assert!(
            matches!(&status, PidStatus::Running(owner) if owner.pid() == daemon.pid()),
            "{program}: {status:?}"
        );
        let error = lock(&path).try_lock().expect_err(program);
        assert_eq!(
            error.owner().map(|owner| owner.pid()),
            Some(daemon.pid()),
            "{program}: {error}"
        );
        assert!(
            !PidFile::is_stale(&path).unwrap() && !PidFile::remove_stale(&path).unwrap(),
            "{program}"
        );
        assert_eq!(text(&path), content, "{program}");

        write_ago(&path, written_by(form, DEAD), OLD);
        assert!(PidFile::is_stale(&path).unwrap(), "{program}");
        let guard = lock(&path).try_lock().expect(program);
        assert!(guard.recovered().is_some(), "{program}");
        assert_eq!(text(&path), format!("{}\n", my_pid()), "{program}");
    }
}

#[cfg(unix)]
#[test]
fn a3_pid_and_name_of_this_host_is_read() {
    let (_directory, path) = fresh_path();
    let host = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    let daemon = Foreign::start();
    write_ago(&path, format!("{} {host}", daemon.pid()), OLD);
    let error = lock(&path).try_lock().unwrap_err();
    assert_eq!(
        error.owner().map(|owner| owner.pid()),
        Some(daemon.pid()),
        "{error}"
    );
    write_ago(&path, format!("{DEAD} {host}"), OLD);
    assert!(lock(&path).try_lock().unwrap().recovered().is_some());
}

#[test]
fn a3_pid_of_perhaps_another_host_is_held() {
    let (_directory, path) = fresh_path();
    for content in [
        format!("{DEAD} elsewhere.example.org"),
        format!("{DEAD} elsewhere\n"),
        // The format of QLockFile.
        format!("{DEAD}\nkate\nelsewhere\nabcdef0123456789\n0f0f-1e1e\n"),
    ] {
        write_ago(&path, &content, LONG_AGO);
        let error = lock(&path).try_lock().unwrap_err();
        assert!(
            error.is_held()
                && error
                    .owner()
                    .unwrap()
                    .host()
                    .unwrap()
                    .starts_with("elsewhere"),
            "{error}"
        );
        assert!(!PidFile::is_stale(&path).unwrap() && !PidFile::remove_stale(&path).unwrap());
        assert_eq!(text(&path), content);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a3_blank_file_with_lock_of_another_program_is_held() {
    let (_directory, path) = fresh_path();
    let Some(python) = python() else {
        return lockkit_tests::left_out("there is no python3 here");
    };
    // apt and dpkg lock in this way, and so does pidfile(3) of BSD before it writes.
    for (kind, program) in [
        (
            "fcntl",
            "import fcntl,sys; f=open(sys.argv[1],'r+'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); sys.stdin.read()",
        ),
        (
            "flock",
            "import fcntl,sys; f=open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); sys.stdin.read()",
        ),
    ] {
        for content in [String::new(), "\n".to_owned(), format!("{DEAD}\n")] {
            write_ago(&path, &content, LONG_AGO);
            let mut holder = Command::new(&python)
                .args(["-c", program])
                .arg(&path)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut line = String::new();
            std::io::BufRead::read_line(
                &mut std::io::BufReader::new(holder.stdout.as_mut().unwrap()),
                &mut line,
            )
            .unwrap();
            let status = PidFile::inspect(&path).unwrap();
            let error = lock(&path).try_lock().unwrap_err();
            let stale = PidFile::remove_stale(&path).unwrap();
            let pid = holder.id();
            holder.kill().unwrap();
            holder.wait().unwrap();
            assert!(
                matches!(&status, PidStatus::Running(owner) if owner.pid() == pid),
                "{kind} {content:?}: {status:?}"
            );
            assert!(error.is_held() && !stale, "{kind} {content:?}: {error}");
            assert_eq!(text(&path), content);
            drop(lock(&path).try_lock().unwrap());
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a4_readers_find_the_pid_alone() {
    let (_directory, path) = fresh_path();
    let mut guard = lock(&path).try_lock().unwrap();
    let child = Foreign::start();
    guard
        .rewrite_for(&lockkit::Owner::of(child.pid()).unwrap())
        .unwrap();
    let pid = child.pid().to_string();
    // The last two read as LSB and RHEL do, and as the crates that compare the whole file with a
    // number.
    for (reader, script) in [
        (
            "a shell",
            "cat \"$0\" | wc -w | grep -qx 1 && for p in $(cat \"$0\"); do echo $p; done",
        ),
        ("kill", "kill -0 $(cat \"$0\") && cat \"$0\""),
        ("pgrep", "pgrep -F \"$0\""),
        ("pgrep", "pgrep -L -F \"$0\""),
        ("systemd", "head -n 1 \"$0\""),
        (
            "LSB",
            "read line < \"$0\"; for p in $line; do [ -z \"${p##*[!0-9]*}\" ] || [ ! -d \"/proc/$p\" ] || echo $p; done",
        ),
        (
            "nightlyone",
            "[ \"$(wc -l < \"$0\")\" -eq 1 ] && tr -d '\\n' < \"$0\"",
        ),
    ] {
        let output = Command::new("sh")
            .args(["-c", script])
            .arg(&path)
            .output()
            .unwrap();
        assert_eq!(
            String::from_utf8_lossy(&output.stdout).trim(),
            pid,
            "{reader}: {output:?}"
        );
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a3_flock_of_hidden_process_counts_of_other_user_does_not() {
    let Some(user) = lockkit_tests::another_user() else {
        return;
    };
    if !Command::new("unshare")
        .args(["--pid", "--fork", "true"])
        .status()
        .is_ok_and(|status| status.success())
    {
        return lockkit_tests::left_out("a pid namespace is not allowed here");
    }
    let (directory, path) = fresh_path();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    for content in [String::new(), format!("{DEAD}\n")] {
        write_ago(&path, &content, OLD);
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        // The lock belongs to root, outside the namespace of the process that asks.
        let daemon = File::open(&path).unwrap();
        rustix::fs::flock(&daemon, rustix::fs::FlockOperation::LockExclusive).unwrap();
        let mut inside = start_through(
            &spec(&path),
            "unshare",
            &["--pid", "--fork", "--kill-child", "--mount-proc"],
        );
        let answer = inside.ask("try");
        assert!(answer.starts_with("error Held"), "{content:?}: {answer}");
        assert_eq!(text(&path), content);
        drop(daemon);
        // The lock belongs to another user. The process that acquired it has ended, and another
        // process that root can see holds it.
        let mut other_user = Command::new("sh");
        other_user
            .args(["-c", "exec 9<\"$0\"; flock 9 && echo 1 && exec sleep 600"])
            .arg(&path);
        let mut other_user = other_user
            .uid(user.uid)
            .gid(user.uid)
            .current_dir("/")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(
            &mut std::io::BufReader::new(other_user.stdout.take().unwrap()),
            &mut line,
        )
        .unwrap();
        assert_eq!(line, "1\n");
        lock(&path).try_lock().unwrap().release().unwrap();
        other_user.kill().unwrap();
        other_user.wait().unwrap();
    }
}

lockkit_tests::left_out! { "it takes other users, modes of files, links, signals or small disks, as Linux has them":
    pidfile_waiter_of_foreign_process_sleeps_until_its_exit,
    first_line_of_pidfile_is_pid_for_service_managers,
    acquire_pidfile_of_nginx_is_refused_until_it_stops,
    start_stop_daemon_and_lockkit_honour_each_other,
    a3_blank_file_with_lock_of_another_program_is_held,
    a3_flock_of_hidden_process_counts_of_other_user_does_not,
    a4_readers_find_the_pid_alone,
}
