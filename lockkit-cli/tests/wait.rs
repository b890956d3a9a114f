//! Tests of `lockkit wait`.

#![cfg(target_os = "linux")]

mod common;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{KINDS, Lock, Program, Running, Site, code, fresh_name};

#[test]
fn wait_released_lock_returns_without_acquiring() {
    for kind in KINDS {
        let lock = Lock::new(kind);
        assert_eq!(code(["wait", &lock.place]), 0, "{kind}");
        let mut running = Running::start(lock.run([], "echo held; sleep 0.4"));
        assert_eq!(running.line(), "held");
        assert_eq!(
            code(["wait", &lock.place, "--timeout", "50ms"]),
            75,
            "{kind}"
        );
        assert_eq!(code(["wait", &lock.place, "--timeout", "30s"]), 0, "{kind}");
        assert_eq!(running.code(), 0, "{kind}");
    }
}

/// Starts programs that keep every processor busy until they are dropped.
fn busy() -> Vec<Program> {
    let hog = || {
        let mut command = Command::new("sh");
        command.args(["-c", "while :; do :; done"]);
        Program::start(command)
    };
    let processors = std::thread::available_parallelism().map_or(2, |number| number.get());
    (0..2 * processors).map(|_| hog()).collect()
}

#[test]
fn b3_wait_reads_no_processes_and_is_not_late() {
    let site = Site::new();
    let _busy = busy();
    for kind in ["--file", "--name", "--pidfile", "--lease"] {
        let place = match kind {
            "--name" => fresh_name(),
            _ => format!("./{kind}.lock"),
        };
        let late: Vec<_> = (0..3)
            .map(|_| {
                let mut holder =
                    site.command(&["run", kind, &place, "--", "sh", "-c", "echo held; cat"]);
                let mut holder = Program::start({
                    holder.stdin(Stdio::piped());
                    holder
                });
                assert_eq!(holder.line(), "held");
                let mut waiting = Program::start(site.command(&["wait", &place]));
                // The wait lasts longer than the time in which its pauses grow.
                std::thread::sleep(Duration::from_millis(300));
                assert!(
                    waiting.child.try_wait().expect("a child").is_none(),
                    "{kind}"
                );
                drop(holder.child.stdin.take());
                assert_eq!(holder.code(), 0);
                let free = Instant::now();
                assert_eq!(waiting.code(), 0, "{kind}");
                free.elapsed()
            })
            .collect();
        println!("{kind}: {late:?}");
        // 50 ms, and the time that a machine with four programs per processor needs to schedule
        // this test again.
        assert!(
            late.iter().min() < Some(&Duration::from_millis(250)),
            "{kind}: {late:?}"
        );
    }
}

#[test]
fn b3_wait_for_a_shared_holder_waits() {
    let site = Site::new();
    let holder = site.hold(&["--file", "a.lock", "--shared"]);
    assert_eq!(
        site.run(&["wait", "--timeout", "100ms", "./a.lock"]).code,
        75
    );
    // A query does not affect the other holders.
    assert_eq!(
        site.run(&["run", "--try", "--file", "a.lock", "--shared", "--", "true"])
            .code,
        0
    );
    drop(holder);
    assert_eq!(site.run(&["wait", "--timeout", "30s", "./a.lock"]).code, 0);
}

#[test]
fn b3_wait_for_name_takes_no_place_in_queue() {
    let site = Site::new();
    let name = fresh_name();
    let _holder = site.hold(&["--name", &name]);
    let waiting: Vec<_> = (0..3)
        .map(|_| Program::start(site.command(&["wait", &name])))
        .collect();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(
        site.run(&["status", "--json", &name]).json()["lock"]["waiters"],
        0
    );
    drop(waiting);
}
