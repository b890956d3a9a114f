//! Tests of `lockkit run` as the first process of a container.

#![cfg(target_os = "linux")]

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};

use common::{Ended, LIVELY, PROGRAM, Program, Site, fresh_name, left_out, until};

/// Starts `lockkit run` as the first process of a pid namespace. Returns `None` if that is
/// impossible.
fn as_first(site: &Site, options: &[&str], script: &str) -> Option<Program> {
    if !rustix::process::geteuid().is_root() {
        left_out("only root can make a pid namespace");
        return None;
    }
    let mut command = Command::new("unshare");
    command
        .args([
            "--pid",
            "--fork",
            "--mount-proc",
            "--kill-child",
            PROGRAM,
            "run",
        ])
        .args(options);
    command
        .args(["--", "sh", "-c", script])
        .current_dir(site.directory())
        .stdin(Stdio::null());
    Some(Program::start(command))
}

/// Returns the first process of the namespace that `unshare`, with this pid, has made.
fn child_of(pid: u32) -> i32 {
    let mut child = None;
    until("it has a child", || {
        let list =
            fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        child = list
            .split_ascii_whitespace()
            .next()
            .and_then(|pid| pid.parse().ok());
        child.is_some()
    });
    child.expect("a child")
}

#[test]
fn c9_run_as_first_process_reaps_orphans() {
    let site = Site::new();
    let name = fresh_name();
    for (kind, place) in [
        ("--name", &*name),
        ("--file", "a.lock"),
        ("--pidfile", "a.pid"),
        ("--lease", "a.lease"),
    ] {
        // Each `sleep` outlives the shell that started it, so the first process becomes its parent.
        let script = "for i in 1 2 3 4 5; do (sleep 0.1 &); done; i=0; \
                      while [ $i -lt 200 ]; do sleep 0.1; i=$((i+1)); \
                      grep -l '^State:.Z' /proc/[0-9]*/status > zombies 2> /dev/null || { [ $i -gt 5 ] && break; }; done; \
                      cat zombies; echo end; exit 7";
        let Some(mut running) = as_first(&site, &[kind, place], script) else {
            return;
        };
        assert_eq!(running.line(), "end", "{kind}: zombies are left");
        assert_eq!(running.code(), 7, "{kind}");
        assert_eq!(
            site.run(&["run", "--timeout", "20s", kind, place, "--", "true"])
                .code,
            0,
            "{kind}"
        );
    }
}

#[test]
fn c9_run_as_first_process_reaps_orphans_while_it_waits() {
    let site = Site::new();
    let name = fresh_name();
    for (kind, place) in [
        ("--name", &*name),
        ("--file", "a.lock"),
        ("--pidfile", "a.pid"),
        ("--lease", "a.lease"),
    ] {
        let holder = site.hold(&[kind, place]);
        let Some(mut running) = as_first(&site, &[kind, place], "echo ready") else {
            return;
        };
        let first = child_of(running.pid());
        // `docker exec` starts a process in this way: its parent is outside, and ends before it.
        let mut command = Command::new("nsenter");
        command.args([
            "--target",
            &first.to_string(),
            "--pid",
            "--mount",
            "sh",
            "-c",
            "(sleep 0.2 & echo $!)",
        ]);
        let orphan = Ended::of(command.stdin(Stdio::null()));
        assert_eq!(orphan.code, 0, "{kind}: {orphan:?}");
        let path = format!("/proc/{first}/root/proc/{}", orphan.out.trim());
        until("the orphan is reaped", || !Path::new(&path).exists());
        drop(holder);
        assert_eq!(running.line(), "ready", "{kind}");
        assert_eq!(running.code(), 0, "{kind}");
    }
}

#[test]
fn c9_signals_to_run_as_first_process_end_it() {
    let site = Site::new();
    let name = fresh_name();
    for (kind, place) in [
        ("--name", &*name),
        ("--file", "a.lock"),
        ("--pidfile", "a.pid"),
        ("--lease", "a.lease"),
    ] {
        let Some(mut running) = as_first(&site, &[kind, place], "echo ready; exec sleep 60") else {
            return;
        };
        assert_eq!(running.line(), "ready", "{kind}");
        let first = Pid::from_raw(child_of(running.pid())).expect("a pid");
        kill_process(first, Signal::TERM).expect("it runs");
        assert_eq!(running.code(), 128 + 15, "{kind}");
        // The same holds while it waits for the lock. Here the signal comes from inside, and the
        // kernel does not force such signals on a first process.
        let holder = site.hold(&[kind, place]);
        let mut command = Command::new("unshare");
        let inner =
            format!("(sleep 0.7; kill -TERM 1) & exec {PROGRAM} run {kind} {place} -- true");
        command.args([
            "--pid",
            "--fork",
            "--mount-proc",
            "--kill-child",
            "sh",
            "-c",
            &inner,
        ]);
        let begun = Instant::now();
        let ended = Ended::of(command.current_dir(site.directory()).stdin(Stdio::null()));
        assert_eq!(ended.code, 128 + 15, "{kind}: {ended:?}");
        assert!(begun.elapsed() < LIVELY, "{kind}");
        drop(holder);
        until("it is free", || {
            site.run(&["run", "--try", "--quiet", kind, place, "--", "true"])
                .code
                == 0
        });
    }
}
