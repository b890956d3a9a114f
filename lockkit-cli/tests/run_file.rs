//! Tests of `lockkit run` on files: files of other programs, modes, missing directories, and paths
//! of any bytes.

#![cfg(target_os = "linux")]

mod common;

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::{Command, Stdio};
use std::time::Duration;

use lockkit::Lease;
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use common::{
    Ended, PROGRAM, Program, Running, Site, code_of, json, lockkit, output, signal, until,
};

#[test]
fn a1_lease_on_other_file_is_refused_and_leaves_it() {
    let site = Site::new();
    let contents: [(&str, &[u8]); 4] = [
        ("notes.txt", b"one\ntwo\n"),
        ("data.db", b"SQLite format 3\0and more"),
        ("table", b"lockkitT but no table"),
        ("script", b"#!/bin/sh\nexit 0\n"),
    ];
    for (name, content) in contents {
        let path = site.write_old(name, content);
        let ended = site.run(&[
            "run",
            "--timeout",
            "4s",
            "--lease",
            name,
            "--",
            "echo",
            "RAN",
        ]);
        assert_eq!((ended.code, &*ended.out), (65, ""), "{name}: {ended:?}");
        assert_eq!(fs::read(&path).expect("a file"), content, "{name}");
        assert_eq!(site.run(&["lease", "show", name]).code, 65, "{name}");
    }
}

#[test]
fn a2_pidfile_on_other_file_is_refused_and_leaves_it() {
    let site = Site::new();
    let lease = Lease::file(site.path("free.pid")).build().expect("a lease");
    lease
        .try_lock()
        .expect("a free lease")
        .release()
        .expect("a release");
    let free = fs::read(site.path("free.pid")).expect("a file");
    let contents: [(&str, &[u8]); 4] = [
        ("app.conf", b"key = value\n"),
        ("app.pid", b"not a pid\n"),
        ("zero.pid", b"0\n"),
        ("free.pid", &free),
    ];
    for (name, content) in contents {
        let path = site.write_old(name, content);
        let ended = site.run(&[
            "run",
            "--try",
            "--pidfile",
            &site.text(name),
            "--",
            "echo",
            "RAN",
        ]);
        assert_eq!((ended.code, &*ended.out), (65, ""), "{name}: {ended:?}");
        assert_eq!(fs::read(&path).expect("a file"), content, "{name}");
    }
}

#[test]
fn a4_pidfile_is_one_word_for_kill() {
    let site = Site::new();
    let mut running = site.command(&[
        "run",
        "--pidfile",
        "app.pid",
        "--",
        "sh",
        "-c",
        "echo $$; exec sleep 60",
    ]);
    running.current_dir(site.directory());
    let mut running = Program::start(running);
    let pid = running.line();
    until("it names the program", || {
        fs::read_to_string(site.path("app.pid")).unwrap_or_default() == format!("{pid}\n")
    });
    running.signal(Signal::TERM);
    assert_eq!(running.code(), 128 + 15);
}

#[test]
fn a8_old_damaged_lease_is_healed_by_try() {
    let site = Site::new();
    let zeros: [&[u8]; 3] = [b"", &[0; 1024], b"lockkit lease 1"];
    for content in zeros {
        site.write_old("empty.lease", content);
        // One attempt may be needed to observe that the file does not change.
        let ran = (0..3).any(|_| {
            let ended = site.run(&[
                "run",
                "--try",
                "--lease",
                "empty.lease",
                "--",
                "echo",
                "RAN",
            ]);
            if ended.code != 0 {
                std::thread::sleep(Duration::from_secs(1));
            }
            ended.out == "RAN\n"
        });
        assert!(ran, "{} bytes", content.len());
        assert_eq!(site.run(&["status", "./empty.lease"]).code, 0);
        assert_eq!(site.run(&["lease", "show", "empty.lease"]).code, 0);
    }
}

#[test]
fn a10_mode_is_exact_whatever_the_umask_is() {
    let site = Site::new();
    for (kind, name) in [
        ("--file", "a.lock"),
        ("--pidfile", "a.pid"),
        ("--lease", "a.lease"),
    ] {
        for (umask, mode) in [
            ("077", "664"),
            ("000", "600"),
            ("022", "666"),
            ("027", "640"),
        ] {
            let _ = fs::remove_file(site.path(name));
            let script = format!(
                "umask {umask}; exec {PROGRAM} run {kind} {name} --mode {mode} -- stat -c %a {name}"
            );
            let mut command = Command::new("sh");
            command
                .args(["-c", &script])
                .current_dir(site.directory())
                .stdin(Stdio::null());
            let ended = Ended::of(&mut command);
            assert_eq!(
                (ended.code, ended.out.trim()),
                (0, mode),
                "{kind}, umask {umask}: {ended:?}"
            );
        }
    }
    // Without the option, the mode of the file is as with flock(1).
    let mut command = Command::new("sh");
    command.args([
        "-c",
        &format!("umask 027; exec {PROGRAM} run --file b.lock -- stat -c %a b.lock"),
    ]);
    command.current_dir(site.directory()).stdin(Stdio::null());
    assert_eq!(Ended::of(&mut command).out.trim(), "640");
}

#[test]
fn a11_parents_created_only_on_request() {
    let site = Site::new();
    for kind in ["--file", "--pidfile", "--lease"] {
        let path = site.text(&format!("{kind}/deep/lock"));
        let refused = site.run(&["run", kind, &path, "--", "true"]);
        assert_eq!(refused.code, 66, "{kind}: {refused:?}");
        assert!(!site.path(kind).exists(), "{kind}");
        let made = site.run(&["run", kind, &path, "--create-parents", "--", "true"]);
        assert_eq!(made.code, 0, "{kind}: {made:?}");
        assert!(site.path(&format!("{kind}/deep")).is_dir(), "{kind}");
    }
}

#[test]
fn a10_mode_and_create_parents_need_a_file() {
    let site = Site::new();
    let cases: [&[&str]; 8] = [
        &["--name", "a", "--mode", "600"],
        &["--name", "a", "--create-parents"],
        &["--lease", "redis://host/x", "--mode", "600"],
        &["--lease", "etcd://host/x", "--create-parents"],
        &["--file", "a", "--mode", "rw"],
        &["--file", "a", "--mode", "1777"],
        &["--file", "a", "--mode", "0o600"],
        &["--pidfile", "a", "--mode", "444"],
    ];
    for options in cases {
        let mut command = site.command(&["run"]);
        let ended = Ended::of(command.args(options).args(["--", "true"]));
        assert_eq!(ended.code, 64, "{options:?}: {ended:?}");
        assert!(
            ended.err.contains("For example: lockkit "),
            "{options:?}: {ended:?}"
        );
    }
}

#[test]
fn a10_existing_file_keeps_its_mode() {
    let site = Site::new();
    let path = site.write("a.lock", "");
    fs::set_permissions(&path, Permissions::from_mode(0o604)).expect("a file");
    assert_eq!(
        site.run(&["run", "--file", "a.lock", "--mode", "660", "--", "true"])
            .code,
        0
    );
    assert_eq!(fs::metadata(&path).expect("a file").mode() & 0o7777, 0o604);
}

#[test]
fn run_and_status_accept_non_utf8_paths() {
    let directory = TempDir::new().expect("a directory");
    for kind in ["--file", "--pidfile", "--lease"] {
        let path = directory
            .path()
            .join(OsStr::from_bytes(&[kind.as_bytes(), b"-\xff.pid"].concat()));
        let on_path = |arguments: &[&str]| {
            let mut command = lockkit([]);
            command.args(arguments).arg(&path);
            command
        };
        let mut run = on_path(&["run", kind]);
        run.args(["--", "sh", "-c", "echo held; exec sleep 60"]);
        let mut running = Running::start(run);
        assert_eq!(running.line(), "held", "{kind}");
        assert!(path.exists(), "{kind}");
        let status = on_path(&["status", "--json"])
            .output()
            .expect("lockkit starts");
        assert_eq!(code_of(&status), 1, "{kind}");
        let bytes = Value::from(path.as_os_str().as_bytes().to_vec());
        assert_eq!(json(&status)["lock"]["name_bytes"], bytes, "{kind}");
        assert_ne!(json(&status)["lock"]["holders"][0]["pid"], 0, "{kind}");
        let listed = json(&output([
            "list",
            "--json",
            &directory.path().display().to_string(),
        ]));
        let locks = listed["locks"].as_array().expect("locks");
        assert!(
            locks.iter().any(|lock| lock["name_bytes"] == bytes),
            "{kind}: {listed}"
        );
        let code = |mut command: Command| code_of(&command.output().expect("lockkit starts"));
        assert_eq!(code(on_path(&["wait", "--timeout", "50ms"])), 75, "{kind}");
        let mut refused = on_path(&["run", "--try", kind]);
        refused.args(["--", "true"]);
        assert_eq!(code(refused), 75, "{kind}");
        match kind {
            "--lease" => {
                assert_eq!(code(on_path(&["lease", "show"])), 1);
                assert_eq!(code(on_path(&["lease", "steal", "--yes"])), 0);
                running.code();
            }
            "--pidfile" => assert_eq!(code(on_path(&["pidfile", "check"])), 1),
            _ => {}
        }
        signal(running.pid(), Signal::TERM);
        running.code();
        assert_eq!(code(on_path(&["wait"])), 0, "{kind}");
    }
    let mut name = lockkit(["status"]);
    assert_eq!(
        name.arg(OsStr::from_bytes(b"a\xff"))
            .output()
            .expect("lockkit starts")
            .status
            .code(),
        Some(64)
    );
}
