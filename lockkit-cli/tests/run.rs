//! Tests of `lockkit run`: exit codes, signals, and locks that are held exactly as long as the
//! program lives.

#![cfg(target_os = "linux")]

mod common;

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use common::{
    KINDS, Lock, Orphan, Program, Running, Site, code, code_of, fresh_name, json, lives, lockkit,
    output, signal, text, until, with_usual_signals,
};

#[test]
fn run_ends_as_its_program_ends() {
    for kind in KINDS {
        let lock = Lock::new(kind);
        let run = |script| code_of(&lock.run([], script).output().expect("lockkit starts"));
        assert_eq!(run("exit 7"), 7, "{kind}");
        assert_eq!(run("kill -9 $$"), 128 + 9, "{kind}");
        assert_eq!(run("kill -TERM $$"), 128 + 15, "{kind}");
        assert_eq!(lock.status(), 0, "{kind}");
        let [option, place] = &lock.run;
        assert_eq!(
            code(["run", option, place, "--", "/no/such/program"]),
            127,
            "{kind}"
        );
        assert_eq!(
            code(["run", option, place, "--", "/etc/passwd"]),
            126,
            "{kind}"
        );
        assert_eq!(lock.try_once(), 0, "{kind}");
    }
}

#[test]
fn run_held_lock_exits_with_conflict_code() {
    for kind in KINDS {
        let lock = Lock::new(kind);
        let (running, pid) = lock.hold([]);
        let refused = lock
            .run(["--try"], "true")
            .output()
            .expect("lockkit starts");
        assert_eq!(code_of(&refused), 75, "{kind}");
        let said = text(&refused.stderr);
        assert!(
            said.contains("is held") && said.ends_with(".\n"),
            "{kind}: {said}"
        );
        let waited = lock
            .run(["--timeout", "50ms"], "true")
            .output()
            .expect("lockkit starts");
        assert_eq!(code_of(&waited), 75, "{kind}");
        // The holder of a lease is lockkit's keeper; the holders of a file are lockkit and its
        // keeper.
        let (holder, program) = match kind {
            "--lease" => (keeper(running.pid()), "lockkit"),
            "--file" => (running.pid(), "lockkit"),
            _ => (pid, "s"),
        };
        for said in [said, text(&waited.stderr)] {
            assert!(
                said.contains(&format!("by pid {holder} ({program}")),
                "{kind}: {said}"
            );
        }
        let refused = lock
            .run(["--timeout", "50ms", "--exit-code", "3", "--quiet"], "true")
            .output()
            .expect("it starts");
        assert_eq!(
            (code_of(&refused), text(&refused.stderr)),
            (3, String::new()),
            "{kind}"
        );
        assert_eq!(lock.status(), 1, "{kind}");
    }
}

#[test]
fn run_machine_scope_is_separate_from_user_scope() {
    let users = Lock::new("--name");
    let name = users.place.clone();
    let mut machine = lockkit(["run", "--name", &name, "--scope", "machine", "--"]);
    machine.args(["sh", "-c", "echo held; exec sleep 60"]);
    let mut machine = Running::start(machine);
    assert_eq!(machine.line(), "held");
    assert_eq!(code(["status", &name]), 0);
    assert_eq!(code(["status", &name, "--scope", "machine"]), 1);
    assert_eq!(code(["run", "--try", "--name", &name, "--", "true"]), 0);
    let _ = fs::remove_file(format!("/dev/shm/lockkit-machine-{name}.record"));
}

#[test]
fn run_shared_file_lock_admits_shared_refuses_exclusive() {
    let lock = Lock::new("--file");
    let (_running, _) = lock.hold(["--shared"]);
    let run =
        |options: [&str; 2]| code_of(&lock.run(options, "true").output().expect("lockkit starts"));
    assert_eq!(run(["--try", "--shared"]), 0);
    assert_eq!(run(["--try", "--quiet"]), 75);
}

#[test]
fn run_killed_leaves_lock_held_by_program() {
    for kind in KINDS {
        let lock = Lock::new(kind);
        let (mut running, pid) = lock.hold([]);
        let program = Orphan(pid);
        running.child.kill().expect("it runs");
        running.child.wait().expect("a child");
        // The pause is longer than any pending action would take.
        std::thread::sleep(Duration::from_millis(200));
        assert!(lives(program.0), "{kind}");
        assert_eq!(lock.status(), 1, "{kind}");
        assert_eq!(lock.try_once(), 75, "{kind}");
        let waiter = Running::start(lock.run(["--quiet"], "true"));
        std::thread::sleep(Duration::from_millis(100));
        assert!(lives(waiter.pid()), "{kind}: somebody got in");
        signal(program.0, Signal::KILL);
        let mut waiter = waiter;
        assert_eq!(waiter.code(), 0, "{kind}");
        until("it is free", || lock.status() == 0);
    }
}

/// Returns the live children of `pid`.
fn children(pid: u32) -> Vec<u32> {
    let all = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    all.split_ascii_whitespace()
        .filter_map(|child| child.parse().ok())
        .collect()
}

/// Returns the process that keeps `lock` when lockkit, with that pid, is killed.
fn keeper(lockkit: u32) -> u32 {
    let name = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let mut found = None;
    until("its keeper has its name", || {
        found = children(lockkit)
            .into_iter()
            .find(|pid| name(pid) == "lock-keeper\n");
        found.is_some()
    });
    found.expect("a keeper")
}

#[test]
fn run_and_keeper_killed_lock_held_until_program_ends() {
    for kind in ["--name", "--file"] {
        for keeper_first in [false, true] {
            let lock = Lock::new(kind);
            let (running, pid) = lock.hold([]);
            let (program, lockkit) = (Orphan(pid), running.pid());
            let keeper = keeper(lockkit);
            for killed in if keeper_first {
                [keeper, lockkit]
            } else {
                [lockkit, keeper]
            } {
                signal(killed, Signal::KILL);
                until("it is dead", || !lives(killed));
                assert!(lives(program.0), "{kind}");
                assert_eq!(
                    (lock.status(), lock.try_once()),
                    (1, 75),
                    "{kind}, the keeper first: {keeper_first}"
                );
            }
            signal(program.0, Signal::KILL);
            until("it is free", || lock.try_once() == 0);
        }
    }
}

#[test]
fn run_killed_pidfile_names_program() {
    let lock = Lock::new("--pidfile");
    let (mut running, pid) = lock.hold([]);
    let program = Orphan(pid);
    assert_eq!(children(running.pid()), [pid], "nothing else keeps it");
    running.child.kill().expect("it runs");
    running.child.wait().expect("a child");
    assert_eq!((lock.status(), lock.try_once()), (1, 75));
    assert_eq!(
        json(&output(["status", &lock.place, "--json"]))["lock"]["holders"][0]["pid"],
        pid
    );
    signal(program.0, Signal::KILL);
    until("it is stale", || lock.status() == 2);
    assert_eq!(lock.try_once(), 0);
}

#[test]
fn run_killed_by_name_keeper_survives() {
    for kind in ["--name", "--file", "--lease"] {
        let lock = Lock::new(kind);
        let (running, pid) = lock.hold([]);
        let (program, keeper) = (Orphan(pid), Orphan(keeper(running.pid())));
        let line = fs::read_to_string(format!("/proc/{}/cmdline", keeper.0)).expect("a process");
        assert_eq!(line.trim_end_matches('\0'), "lock-keeper", "{kind}");
        // `pkill -9 -f lockkit` would do the same, but it would also kill other tests' processes.
        let killed = Command::new("pkill")
            .args(["-9", "-f", &format!("lockkit.*{}", lock.place)])
            .status();
        assert!(killed.expect("pkill starts").success(), "{kind}");
        until("lockkit is dead", || !lives(running.pid()));
        assert!(lives(keeper.0) && lives(program.0), "{kind}");
        assert_eq!((lock.status(), lock.try_once()), (1, 75), "{kind}");
        signal(program.0, Signal::KILL);
        until("the keeper has left", || !lives(keeper.0));
        assert_eq!(lock.try_once(), 0, "{kind}");
    }
}

#[test]
fn run_or_keeper_killed_program_never_outlives_lease() {
    for (lockkit_first, keeper_too) in [(true, false), (true, true), (false, true), (false, false)]
    {
        let lock = Lock::new("--lease");
        // The script starts a process that it waits for, a process whose parent has ended, and a
        // process in a session of its own.
        let script = "sleep 60 > /dev/null & echo $!; (sleep 60 > /dev/null & echo $!); \
                      setsid sleep 60 > /dev/null & echo $!; echo $$; wait";
        let mut running = Running::start(lock.run(["--ttl", "1s"], script));
        let below: Vec<Orphan> = (0..4)
            .map(|_| Orphan(running.line().parse().expect("a pid")))
            .collect();
        let keeper = Orphan(keeper(running.pid()));
        if lockkit_first {
            signal(running.pid(), Signal::KILL);
            running.child.wait().expect("a child");
            // The loop runs for longer than the lease lasts without a renewal.
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_millis(1500) {
                assert_eq!(lock.status(), 1);
                std::thread::sleep(Duration::from_millis(50));
            }
            assert!(below.iter().all(|process| lives(process.0)));
            assert_eq!(lock.try_once(), 75);
        }
        if keeper_too {
            signal(keeper.0, Signal::KILL);
            until("the program has ended", || !lives(below[3].0));
            if !lockkit_first {
                assert_eq!(running.code(), 128 + 9);
                assert!(
                    below.iter().all(|process| !lives(process.0)),
                    "something is left of it"
                );
            }
        } else {
            // A loss also ends all of it, whether or not lockkit still runs.
            assert_eq!(code(["lease", "steal", "--yes", &lock.place]), 0);
            until("all has ended", || {
                below.iter().all(|process| !lives(process.0))
            });
        }
        until("the lease is free", || lock.try_once() == 0);
    }
}

#[test]
fn run_killed_leftover_child_does_not_keep_lock() {
    for kind in ["--name", "--file"] {
        let lock = Lock::new(kind);
        let script = "sleep 60 > /dev/null & echo $!; echo $$; exec sleep 60";
        let mut running = Running::start(lock.run([], script));
        let left = Orphan(running.line().parse().expect("a pid"));
        let program = Orphan(running.line().parse().expect("a pid"));
        running.child.kill().expect("it runs");
        running.child.wait().expect("a child");
        signal(program.0, Signal::KILL);
        until("it is free", || lock.try_once() == 0);
        assert!(lives(left.0), "{kind}");
    }
}

#[test]
fn run_killed_while_waiting_starts_no_program() {
    for kind in KINDS {
        let lock = Lock::new(kind);
        let (mut running, pid) = lock.hold([]);
        let ran = lock.directory.path().join("ran");
        let mut waiter = Running::start(lock.run([], &format!("echo > {}", ran.display())));
        match kind {
            "--lease" => until("it waits", || !children(waiter.pid()).is_empty()),
            // Its place in a queue is not visible. So the kill may also come before the wait.
            "--pidfile" => {}
            _ => until("it waits", || {
                json(&output(["status", &lock.place, "--json"]))["lock"]["waiters"] == 1
            }),
        }
        let behind: Vec<_> = children(waiter.pid()).into_iter().map(Orphan).collect();
        waiter.child.kill().expect("it runs");
        waiter.child.wait().expect("a child");
        until("nothing is left of it", || {
            behind.iter().all(|process| !lives(process.0))
        });
        signal(pid, Signal::KILL);
        running.code();
        assert_eq!(lock.try_once(), 0, "{kind}");
        assert!(!ran.exists(), "{kind}");
    }
}

#[test]
fn run_killed_at_any_moment_lock_held_while_program_lives() {
    // At whatever moment the kill comes, no other process gets the lock as long as the program
    // lives.
    for kind in ["--name", "--file", "--pidfile"] {
        let lock = Lock::new(kind);
        for round in 0..30 {
            let pid_file = lock.directory.path().join(format!("program-{round}"));
            let script = format!(
                "echo $$ > {0}.new; mv {0}.new {0}; exec sleep 60",
                pid_file.display()
            );
            let mut running = Running::start(lock.run([], &script));
            std::thread::sleep(Duration::from_micros(700 * round));
            running.child.kill().expect("it runs");
            running.child.wait().expect("a child");
            // Either the program runs, however late on a busy machine, or the lock comes free.
            let mut program = None;
            until("the program runs or the lock is free", || {
                let free = lock.try_once() == 0;
                program = fs::read_to_string(&pid_file)
                    .ok()
                    .and_then(|pid| pid.trim().parse().ok())
                    .map(Orphan);
                assert!(
                    !free || program.is_none(),
                    "{kind}, round {round}: free under its program"
                );
                free || program.is_some()
            });
            if let Some(program) = program {
                assert!(lives(program.0), "{kind}, round {round}");
                assert_eq!(lock.try_once(), 75, "{kind}, round {round}");
            }
            until("it is free again", || lock.try_once() == 0);
        }
    }
}

#[test]
fn run_program_leftovers_do_not_keep_lock() {
    for kind in KINDS {
        let lock = Lock::new(kind);
        let mut running = Running::start(lock.run([], "sleep 60 > /dev/null & echo $!"));
        let left = Orphan(running.line().parse().expect("a pid"));
        assert_eq!(running.code(), 0);
        assert!(lives(left.0), "{kind}");
        assert_eq!(lock.try_once(), 0, "{kind}");
    }
}

#[test]
fn run_keeper_does_not_keep_program_output_open() {
    let lock = Lock::new("--name");
    let (mut running, pid) = lock.hold([]);
    let _program = Orphan(pid);
    running.child.kill().expect("it runs");
    signal(pid, Signal::KILL);
    let mut rest = String::new();
    running
        .lines
        .as_mut()
        .expect("a pipe")
        .read_to_string(&mut rest)
        .expect("its end");
    assert_eq!(rest, "");
}

#[test]
fn run_signalled_passes_signals_to_program() {
    let script = "for s in INT TERM HUP QUIT USR1 USR2; do trap \"exit 4\\$(echo $s | wc -c)\" $s; done; echo ready; \
                  while :; do sleep 0.01; done";
    for kind in KINDS {
        let lock = Lock::new(kind);
        for (number, code) in [
            (Signal::INT, 44),
            (Signal::TERM, 45),
            (Signal::HUP, 44),
            (Signal::USR1, 45),
        ] {
            let mut running = Running::start(with_usual_signals(&lock.run([], script)));
            assert_eq!(running.line(), "ready");
            signal(running.pid(), number);
            assert_eq!(running.code(), code, "{kind} {number:?}");
        }
    }
}

#[test]
fn run_signalled_while_waiting_ends_wait() {
    for kind in KINDS {
        let lock = Lock::new(kind);
        let (_running, _) = lock.hold([]);
        let mut waiter = Running::start(lock.run([], "true"));
        std::thread::sleep(Duration::from_millis(100));
        signal(waiter.pid(), Signal::TERM);
        let code = waiter.code();
        assert!(code == -15 || code == 128 + 15, "{kind}: {code}");
        assert_eq!(lock.status(), 1, "{kind}");
    }
}

#[test]
fn run_lease_lost_ends_program() {
    let lock = Lock::new("--lease");
    let mut running =
        Running::start(lock.run(["--ttl", "1s"], "echo $LOCKKIT_TOKEN; exec sleep 60"));
    let token: u64 = running.line().parse().expect("a token");
    assert_eq!(
        json(&output(["lease", "show", &lock.place, "--json"]))["lock"]["token"],
        token
    );
    assert_eq!(code(["lease", "steal", "--yes", &lock.place]), 0);
    assert_eq!(running.code(), 128 + 15);
}

#[test]
fn run_lease_lost_kills_unresponsive_program_and_descendants() {
    let lock = Lock::new("--lease");
    let script = "trap '' TERM; sleep 60 > /dev/null & echo $!; wait; while :; do sleep 0.05; done";
    let mut running = Running::start(lock.run(["--grace", "300ms"], script));
    let below = Orphan(running.line().parse().expect("a pid"));
    let begun = Instant::now();
    assert_eq!(code(["lease", "steal", "--yes", &lock.place]), 0);
    assert_eq!(running.code(), 128 + 9);
    assert!(begun.elapsed() >= Duration::from_millis(300));
    until("what it started has ended", || !lives(below.0));
}

#[test]
fn run_lease_program_leftovers_are_reaped() {
    let lock = Lock::new("--lease");
    let mut running = Running::start(lock.run([], "(sleep 0.2 & echo $!) ; exec sleep 60"));
    let left: u32 = running.line().parse().expect("a pid");
    until("nothing is left of it", || {
        !Path::new(&format!("/proc/{left}")).exists()
    });
    assert_eq!(lock.status(), 1);
    signal(running.pid(), Signal::TERM);
    assert_eq!(running.code(), 128 + 15);
}

#[test]
fn run_lease_holder_killed_ends_program() {
    let lock = Lock::new("--lease");
    let (mut running, pid) = lock.hold([]);
    let program = Orphan(pid);
    let shown = json(&output(["lease", "show", &lock.place, "--json"]));
    let holder = shown["lock"]["holders"][0]["pid"].as_u64().expect("a pid");
    signal(holder as u32, Signal::KILL);
    until("the program has ended", || !lives(program.0));
    assert_eq!(running.code(), 128 + 9);
}

#[test]
fn run_after_death_reports_dead_holder_to_program() {
    let lock = Lock::new("--pidfile");
    let (mut running, pid) = lock.hold([]);
    running.child.kill().expect("it runs");
    signal(pid, Signal::KILL);
    until("it is stale", || lock.status() == 2);
    let told = lock
        .run(["--verbose"], "echo \"$LOCKKIT_RECOVERED\"")
        .output()
        .expect("lockkit starts");
    assert!(
        text(&told.stdout).starts_with(&format!("pid {pid} (s")),
        "{told:?}"
    );
    assert!(text(&told.stderr).contains("died"), "{told:?}");
}

#[test]
fn b7_recovered_variable_escapes_control_characters() {
    let site = Site::new();
    let odd = "sl\ne\x1b[31mep\u{202e}";
    fs::copy("/bin/sh", site.path(odd)).expect("a copy");
    let name = fresh_name();
    for (kind, place) in [("--name", &*name), ("--pidfile", "odd.pid")] {
        let program = format!("./{odd}");
        let mut command = site.command(&[
            "run",
            kind,
            place,
            "--",
            &program,
            "-c",
            "echo $$; while :; do read x; done",
        ]);
        let mut running = Program::start({
            command.stdin(Stdio::piped());
            command
        });
        let pid: i32 = running.line().parse().expect("a pid");
        until("the program is named", || {
            let shown = site
                .run(&[
                    "status",
                    "--json",
                    if kind == "--name" { place } else { "./odd.pid" },
                ])
                .json();
            shown["lock"]["holders"][0]["pid"] == pid
        });
        running.child.kill().expect("it runs");
        running.child.wait().expect("a child");
        kill_process(Pid::from_raw(pid).expect("a pid"), Signal::KILL).expect("it runs");
        let next = site.run(&[
            "run",
            "--verbose",
            "--timeout",
            "20s",
            kind,
            place,
            "--",
            "printenv",
            "LOCKKIT_RECOVERED",
        ]);
        let raw = |text: &str| {
            text.trim_end()
                .chars()
                .any(|letter| letter.is_control() || letter == '\u{202e}')
        };
        assert!(
            next.code == 0 && next.out.contains(&format!("pid {pid}")),
            "{kind}: {next:?}"
        );
        assert!(!raw(&next.out) && !raw(&next.err), "{kind}: {next:?}");
    }
}
