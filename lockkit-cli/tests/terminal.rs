//! Tests of the command on a terminal and in a log: the display of a wait, signals of the terminal,
//! and colours.

#![cfg(target_os = "linux")]

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;

use common::{
    Ended, Lock, PROGRAM, Program, Running, Site, code_of, fresh_name, left_out, lockkit,
    read_until, signal, terminal, text, until, with_usual_signals,
};

#[test]
fn run_waiting_on_terminal_shows_lock_holder_and_time() {
    let lock = Lock::new("--name");
    let (mut running, pid) = lock.hold([]);
    let (end, mut screen) = terminal(160);
    let mut waiting = lock.run([], "true");
    let mut waiter = Running::start({
        waiting
            .stderr(end.try_clone().expect("a terminal"))
            .env("TERM", "xterm");
        waiting
    });
    let held = format!("pid {pid} (sh), since ");
    let shown = read_until(&mut screen, |shown| {
        shown.contains(&held) && shown.contains("for 1s")
    });
    assert!(
        shown.contains(&format!("Waiting for the named lock {:?}", lock.place)),
        "{shown}"
    );
    running.child.kill().expect("it runs");
    signal(pid, Signal::KILL);
    assert_eq!(waiter.code(), 0);
    // The line is erased at the end.
    read_until(&mut screen, |shown| shown.ends_with(" \r"));
}

#[test]
fn run_terminal_interrupt_reaches_program_once() {
    for kind in ["--name", "--lease"] {
        let lock = Lock::new(kind);
        let (end, mut screen) = terminal(160);
        let script = "trap 'echo interrupted' INT; echo ready; i=0; while [ $i -lt 40 ]; do sleep 0.02; i=$((i+1)); \
                      done; echo ended";
        let run = with_usual_signals(&lock.run([], script));
        // The terminal becomes the controlling terminal, so that it sends signals.
        let mut session = Command::new("setsid");
        session
            .args(["--ctty", "--wait"])
            .arg(run.get_program())
            .args(run.get_args());
        session
            .stdin(end.try_clone().expect("a terminal"))
            .stderr(end.try_clone().expect("a terminal"));
        session.stdout(end);
        let mut session = session.spawn().expect("setsid starts");
        read_until(&mut screen, |shown| shown.contains("ready"));
        screen.write_all(b"\x03").expect("a terminal");
        let shown = read_until(&mut screen, |shown| shown.contains("ended"));
        assert_eq!(shown.matches("interrupted").count(), 1, "{kind}: {shown}");
        assert!(session.wait().expect("a child").success(), "{kind}");
    }
}

#[test]
fn run_program_in_other_group_receives_interrupt_and_hangup() {
    for kind in ["--name", "--lease"] {
        // With setsid(1) the program leaves the session. Without it, lockkit leads the session and
        // alone receives the signal.
        for (begin, signal) in [("exec setsid sh -c", "INT"), ("exec sh -c", "HUP")] {
            let lock = Lock::new(kind);
            let (end, mut screen) = terminal(160);
            let heard = lock.directory.path().join("heard");
            let script = format!(
                "{begin} 'trap \"echo > {}; exit\" {signal}; echo ready; while :; do sleep 0.02; done'",
                heard.display()
            );
            let run = with_usual_signals(&lock.run([], &script));
            let mut session = Command::new("setsid");
            session
                .args(["--ctty", "--fork"])
                .arg(run.get_program())
                .args(run.get_args());
            session
                .stdin(end.try_clone().expect("a terminal"))
                .stderr(end.try_clone().expect("a terminal"));
            session.stdout(end);
            session.status().expect("setsid starts");
            drop(session);
            read_until(&mut screen, |shown| shown.contains("ready"));
            match signal {
                "INT" => screen.write_all(b"\x03").expect("a terminal"),
                _ => drop(screen),
            }
            until("the program has heard of it", || heard.exists());
            until("the lock is free", || lock.status() == 0);
        }
    }
}

#[test]
fn status_no_color_on_terminal_prints_no_colours() {
    let lock = Lock::new("--name");
    let (_running, _) = lock.hold([]);
    for no_color in [false, true] {
        let (end, mut screen) = terminal(160);
        let mut status = lockkit(["status", &lock.place]);
        status
            .env("TERM", "xterm")
            .stdout(end.try_clone().expect("a terminal"));
        if no_color {
            status.env("NO_COLOR", "1");
        }
        assert_eq!(status.status().expect("lockkit starts").code(), Some(1));
        let shown = read_until(&mut screen, |shown| {
            shown.contains("waiters") || shown.contains("held by")
        });
        assert_eq!(shown.contains("\x1b[33mheld"), !no_color, "{shown:?}");
    }
}

#[test]
fn run_waiting_on_pipe_prints_only_with_verbose() {
    let lock = Lock::new("--name");
    let (_running, pid) = lock.hold([]);
    let wait = |option: &str| {
        let waited = lock
            .run(["--timeout", "400ms", option], "true")
            .output()
            .expect("lockkit starts");
        assert_eq!(code_of(&waited), 75);
        text(&waited.stderr)
    };
    let plain = lock
        .run(["--timeout", "400ms"], "true")
        .output()
        .expect("lockkit starts");
    assert!(
        !text(&plain.stderr).to_lowercase().contains("waiting for"),
        "{plain:?}"
    );
    assert_eq!(wait("--quiet"), "");
    assert!(wait("--verbose").contains(&format!(
        "waiting for the named lock {:?}, held by pid {pid}",
        lock.place
    )));
}

#[test]
fn b10_log_of_wait_has_line_per_holder() {
    let site = Site::new();
    let name = fresh_name();
    for (kind, place) in [
        ("--name", &*name),
        ("--file", "a.lock"),
        ("--pidfile", "a.pid"),
        ("--lease", "a.lease"),
    ] {
        let first = site.hold(&[kind, place]);
        let mut waiting = site.command(&[
            "run",
            "--verbose",
            "--timeout",
            "3s",
            kind,
            place,
            "--",
            "true",
        ]);
        let waited = Ended::of(&mut waiting);
        drop(first);
        let lines: Vec<_> = waited
            .err
            .lines()
            .filter(|line| line.contains("waiting for"))
            .collect();
        assert!(waited.code == 75 && lines.len() == 1, "{kind}: {waited:?}");
        assert!(lines[0].contains("held by pid"), "{kind}: {waited:?}");
        until("it is free", || {
            site.run(&["run", "--try", "--quiet", kind, place, "--", "true"])
                .code
                == 0
        });
    }
}

#[test]
fn b10_log_of_wait_names_next_holder() {
    let site = Site::new();
    let name = fresh_name();
    let mut first = site.hold(&["--name", &name]);
    let second = site.command(&[
        "run",
        "--quiet",
        "--name",
        &name,
        "--",
        "sh",
        "-c",
        "echo held; exec sleep 60",
    ]);
    let mut second = Program::start(second);
    let waiters = || {
        site.run(&["status", "--json", &name]).json()["lock"]["waiters"]
            .as_u64()
            .unwrap_or_default()
    };
    until("the second waits", || waiters() == 1);
    let log = site.path("log");
    let mut third = site.command(&["run", "--verbose", "--name", &name, "--", "true"]);
    third.stderr(File::create(&log).expect("a file"));
    let _third = Program::start(third);
    let lines = || {
        fs::read_to_string(&log)
            .expect("a file")
            .matches("waiting for")
            .count()
    };
    until("the wait has begun", || lines() == 1);
    first.signal(Signal::TERM);
    first.code();
    assert_eq!(second.line(), "held");
    until("the next holder is told of", || lines() == 2);
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(lines(), 2, "{}", fs::read_to_string(&log).expect("a file"));
}

#[test]
fn c10_waiting_line_is_cut_by_the_width_without_escapes() {
    let site = Site::new();
    let name = fresh_name();
    let _holder = site.hold(&["--name", &name]);
    for columns in [200, 80, 40, 20, 5, 2] {
        let (end, mut screen) = terminal(columns);
        let mut waiting = site.command(&["run", "--name", &name, "--", "true"]);
        waiting
            .env("TERM", "xterm-256color")
            .stderr(end.try_clone().expect("a terminal"));
        let _waiting = Program::start(waiting);
        let shown = read_until(&mut screen, |shown| shown.matches('\r').count() > 2);
        assert!(
            !shown.contains('\x1b') && !shown.contains('\n'),
            "{columns}: {shown:?}"
        );
        // The last line may have been read in part.
        let lines: Vec<_> = shown.split('\r').filter(|line| !line.is_empty()).collect();
        let (_, whole) = lines.split_last().expect("lines");
        for line in whole {
            assert!(
                line.chars().count() < usize::from(columns),
                "{columns}: {line:?}"
            );
            assert_eq!(
                line.trim_end().ends_with('…'),
                columns < 200,
                "{columns}: {line:?}"
            );
        }
    }
}

#[test]
fn c10_waiting_line_counts_wide_letters_twice() {
    let site = Site::new();
    let path = "日本語日本語日本語日本語.lock";
    let _holder = site.hold(&["--file", path]);
    let (end, mut screen) = terminal(30);
    let mut waiting = site.command(&["run", "--file", path, "--", "true"]);
    waiting
        .env("TERM", "xterm")
        .stderr(end.try_clone().expect("a terminal"));
    let _waiting = Program::start(waiting);
    let shown = read_until(&mut screen, |shown| shown.contains('…'));
    let line = shown
        .split('\r')
        .find(|line| line.contains('…'))
        .expect("a line");
    let columns: usize = line
        .chars()
        .map(|letter| {
            if ('\u{3000}'..'\u{a000}').contains(&letter) {
                2
            } else {
                1
            }
        })
        .sum();
    assert!((28..30).contains(&columns), "{line:?}");
}

#[test]
fn c10_dumb_terminal_gets_plain_lines() {
    let site = Site::new();
    let name = fresh_name();
    let _holder = site.hold(&["--name", &name]);
    for kind in [Some("dumb"), Some(""), None] {
        let (end, mut screen) = terminal(80);
        let mut waiting =
            site.command(&["run", "--timeout", "1500ms", "--name", &name, "--", "true"]);
        match kind {
            Some(kind) => waiting.env("TERM", kind),
            None => waiting.env_remove("TERM"),
        };
        waiting
            .env("NO_COLOR", "1")
            .stderr(end.try_clone().expect("a terminal"));
        let mut waiting = Program::start(waiting);
        assert_eq!(waiting.code(), 75);
        drop(end);
        let shown = read_until(&mut screen, |shown| shown.contains("lockkit: The"));
        // The terminal itself turns each line end into two characters.
        let shown = shown.replace("\r\n", "\n");
        assert!(
            !shown.contains('\x1b') && !shown.contains('\r'),
            "{kind:?}: {shown:?}"
        );
        assert_eq!(
            shown.matches("waiting for").count(),
            1,
            "{kind:?}: {shown:?}"
        );
    }
}

#[test]
fn c10_waiting_line_is_one_write() {
    if Command::new("strace")
        .arg("-V")
        .stdout(Stdio::null())
        .status()
        .is_err()
    {
        left_out("strace is not installed");
        return;
    }
    let site = Site::new();
    let name = fresh_name();
    let _holder = site.hold(&["--name", &name]);
    let (end, screen) = terminal(100);
    let trace = site.path("trace");
    let mut command = Command::new("strace");
    command
        .args(["-f", "-s", "300", "-e", "trace=write,writev", "-o"])
        .arg(&trace)
        .arg(PROGRAM);
    command
        .args(["run", "--timeout", "1200ms", "--name", &name, "--", "true"])
        .env("TERM", "xterm");
    command.stdin(Stdio::null()).stderr(end);
    assert_eq!(command.status().expect("strace starts").code(), Some(75));
    drop(screen);
    let trace = fs::read_to_string(trace).expect("a trace");
    let lines: Vec<_> = trace
        .lines()
        .filter(|line| line.contains("write(2, \"\\r"))
        .collect();
    // Several updates of the line, and its erasure.
    assert!(lines.len() >= 2, "{trace}");
    let (last, shown) = lines.split_last().expect("lines");
    assert!(
        shown
            .iter()
            .all(|line| line.contains("\"\\rWaiting for the named lock")),
        "{trace}"
    );
    assert!(
        last.contains("\"\\r ") && last.contains(" \\r\""),
        "{trace}"
    );
    assert!(!trace.contains("[?7"), "{trace}");
}
