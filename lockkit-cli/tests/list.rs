//! Tests of `lockkit list`.

#![cfg(target_os = "linux")]

mod common;

use std::fs::{self, Permissions};
use std::io::BufReader;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::Ordering;

use lockkit::{FileLock, NamedLock};

use common::{Ended, PROGRAM, Program, Site, dead, fresh_name, json, left_out, output, pidfiles};

#[test]
fn list_shows_directory_on_request_and_tables_in_use_always() {
    use lockkit::{LockManager, ShmLockManager};
    let (directory, paths) = pidfiles();
    let table = directory.path().join("table");
    let manager = ShmLockManager::create(&table, 8).expect("a table");
    let _guard = manager
        .allocate()
        .and_then(|lock| lock.lock())
        .expect("a free lock");
    let kinds = |list: &Output| {
        let list = json(list);
        let locks = list["locks"].as_array().expect("locks").iter();
        let here = locks.filter(|lock| {
            Path::new(lock["name"].as_str().expect("a name")).starts_with(directory.path())
        });
        here.map(|lock| lock["kind"].as_str().expect("a kind").to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(kinds(&output(["list", "--json"])), ["table"]);
    let all = output(["list", "--json", &directory.path().display().to_string()]);
    assert_eq!(kinds(&all), ["pidfile", "pidfile", "table"], "{paths:?}");
}

#[test]
fn b1_list_shows_unreadable_files_as_unknown() {
    let site = Site::new();
    let _lease = site.hold(&["--lease", "held.lease"]);
    site.write("secret.pid", "1\n");
    site.write("open.txt", "text\n");
    symlink("nowhere", site.path("dangling.pid")).expect("a link");
    symlink("loop.pid", site.path("loop.pid")).expect("a link");
    fs::create_dir(site.path("closed")).expect("a directory");
    for name in ["held.lease", "secret.pid"] {
        fs::set_permissions(site.path(name), Permissions::from_mode(0o600)).expect("a file");
    }
    fs::set_permissions(site.path("closed"), Permissions::from_mode(0o700)).expect("a directory");
    let here = site.directory().display().to_string();
    let Some(listed) = site.run_as_other(&["list", "--json", &here]) else {
        return;
    };
    assert_eq!(listed.code, 0, "{listed:?}");
    let form = listed.json();
    let rows: Vec<_> = form["locks"].as_array().expect("locks").iter().collect();
    let state = |name: &str| {
        let path = site.text(name);
        rows.iter()
            .find(|row| row["name"] == *path)
            .map(|row| row["state"].as_str().unwrap_or_default().to_owned())
    };
    for name in ["held.lease", "secret.pid", "closed"] {
        assert_eq!(state(name).as_deref(), Some("unknown"), "{name}: {form}");
    }
    for name in ["open.txt", "dangling.pid"] {
        assert_eq!(state(name), None, "{name}: {form}");
    }
    let text = site.run_as_other(&["list", &here]).expect("another user");
    assert!(
        text.out
            .lines()
            .any(|line| line.contains("held.lease") && line.contains("unknown")),
        "{text:?}"
    );
    // An unreadable argument makes the command fail with that error, after the other rows.
    for name in ["closed", "closed/x", "held.lease"] {
        let refused = site
            .run_as_other(&["list", "--json", name, &here])
            .expect("another user");
        assert_eq!(refused.code, 77, "{name}: {refused:?}");
        assert!(
            refused.err.contains(name)
                && !refused.json()["locks"]
                    .as_array()
                    .expect("locks")
                    .is_empty()
        );
    }
}

/// Starts a Python program that prints `held` after it has run `script`, and keeps running. Returns
/// `None` without Python.
fn python(site: &Site, script: &str) -> Option<Program> {
    let script = format!(
        "import fcntl, struct, sys, time\n{script}\nprint('held', flush=True)\ntime.sleep(60)\n"
    );
    let mut command = Command::new("python3");
    command
        .args(["-c", &script])
        .current_dir(site.directory())
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let Ok(mut child) = command.spawn() else {
        left_out("python3 is not installed");
        return None;
    };
    let lines = BufReader::new(child.stdout.take().expect("a pipe"));
    let mut running = Program { child, lines };
    assert_eq!(running.line(), "held", "{script}");
    Some(running)
}

#[test]
fn b5_files_locked_by_fcntl_are_held() {
    let site = Site::new();
    let open = "file = open('data', 'r+b')";
    // struct flock of 64-bit Linux: type, whence, start, length, pid.
    let ofd = |kind: &str, start: u32, length: u32| {
        format!(
            "{open}\nfcntl.fcntl(file, 37, struct.pack('hhqqi', fcntl.{kind}, 0, {start}, {length}, 0))"
        )
    };
    let cases = [
        (
            "lockf",
            format!("{open}\nfcntl.lockf(file, fcntl.LOCK_EX)"),
            true,
        ),
        (
            "a range",
            format!("{open}\nfcntl.lockf(file, fcntl.LOCK_EX, 512, 0x40000000)"),
            true,
        ),
        (
            "a read lock",
            format!("{open}\nfcntl.lockf(file, fcntl.LOCK_SH)"),
            true,
        ),
        ("OFD", ofd("F_WRLCK", 0, 0), true),
        ("OFD on a byte", ofd("F_RDLCK", 7, 1), true),
    ];
    for (name, script, has_pid) in cases {
        site.write("data", "0123456789");
        let Some(mut holder) = python(&site, &script) else {
            return;
        };
        let status = site.run(&["status", "--json", "./data"]);
        let lock = &status.json()["lock"];
        assert_eq!(
            (status.code, &lock["kind"], &lock["state"]),
            (1, &"fcntl".into(), &"held".into()),
            "{name}: {lock}"
        );
        if has_pid {
            assert_eq!(lock["holders"][0]["pid"], holder.pid(), "{name}: {lock}");
        }
        assert!(
            site.run(&["status", "./data"]).out.starts_with("fcntl "),
            "{name}"
        );
        let listed = site.run(&["list", "--json"]).json();
        let rows: Vec<_> = listed["locks"].as_array().expect("locks").iter().collect();
        let rows: Vec<_> = rows
            .into_iter()
            .filter(|row| row["name"] == *site.text("data"))
            .collect();
        assert!(
            rows.len() == 1 && rows[0]["kind"] == "fcntl",
            "{name}: {rows:?}"
        );
        assert_eq!(
            site.run(&["wait", "--timeout", "50ms", "./data"]).code,
            75,
            "{name}"
        );
        // Each mechanism is independent of the other.
        assert!(
            FileLock::new(site.path("data")).try_lock().is_ok(),
            "{name}"
        );
        assert_eq!(
            FileLock::new(site.path("data")).holders().expect("a file"),
            [],
            "{name}"
        );
        holder.child.kill().expect("it runs");
        assert_eq!(
            site.run(&["wait", "--timeout", "30s", "./data"]).code,
            0,
            "{name}"
        );
        assert_eq!(site.run(&["status", "./data"]).code, 0, "{name}");
    }
}

#[test]
fn b5_sqlite_database_in_use_is_held() {
    let site = Site::new();
    let script = "import sqlite3\nbase = sqlite3.connect('app.db', isolation_level=None)\n\
                  base.execute('create table t (x)')\nbase.execute('begin exclusive')";
    let Some(holder) = python(&site, script) else {
        return;
    };
    let status = site.run(&["status", "./app.db"]);
    assert!(
        status.code == 1
            && status.out.contains("fcntl")
            && status.out.contains(&holder.pid().to_string()),
        "{status:?}"
    );
}

#[test]
fn b5_file_locked_both_ways_has_two_rows() {
    let site = Site::new();
    site.write("both", "");
    let script = "file = open('both', 'r+b')\nfcntl.lockf(file, fcntl.LOCK_EX)\nfcntl.flock(file, fcntl.LOCK_EX)";
    let Some(_holder) = python(&site, script) else {
        return;
    };
    let listed = site.run(&["list", "--json"]).json();
    let rows: Vec<_> = listed["locks"].as_array().expect("locks").iter().collect();
    let kinds: Vec<_> = rows
        .iter()
        .filter(|row| row["name"] == *site.text("both"))
        .map(|row| row["kind"].clone())
        .collect();
    assert_eq!(kinds, ["file", "fcntl"]);
    let status = site.run(&["status", "--json", "./both"]);
    assert_eq!(
        (status.code, &status.json()["lock"]["kind"]),
        (1, &"file".into())
    );
}

#[test]
fn b5_fcntl_lock_of_hidden_process_is_held() {
    if !rustix::process::geteuid().is_root() {
        left_out("only root can make a pid namespace");
        return;
    }
    let site = Site::new();
    site.write("data", "");
    let Some(_holder) = python(
        &site,
        "file = open('data', 'r+b')\nfcntl.lockf(file, fcntl.LOCK_EX)",
    ) else {
        return;
    };
    // The kernel's table hides the locks of processes outside the namespace.
    let mut command = Command::new("unshare");
    command
        .args([
            "--pid",
            "--fork",
            "--mount-proc",
            PROGRAM,
            "status",
            "./data",
        ])
        .current_dir(site.directory());
    let ended = Ended::of(command.stdin(Stdio::null()));
    assert!(
        ended.code == 1 && ended.out.starts_with("fcntl "),
        "{ended:?}"
    );
    let _flock = site.hold(&["--file", "shared.lock", "--shared"]);
    let mut command = Command::new("unshare");
    command
        .args([
            "--pid",
            "--fork",
            "--mount-proc",
            PROGRAM,
            "status",
            "./shared.lock",
        ])
        .current_dir(site.directory());
    let ended = Ended::of(command.stdin(Stdio::null()));
    assert!(
        ended.code == 1 && ended.out.starts_with("file "),
        "{ended:?}"
    );
}

#[test]
fn b5_pidfile_and_table_locks_have_no_own_rows() {
    use lockkit::{LockManager, ShmLockManager};
    let site = Site::new();
    let table = ShmLockManager::create(site.path("table"), 8).expect("a table");
    let _guard = table
        .allocate()
        .and_then(|lock| lock.lock())
        .expect("a free lock");
    let _pidfile = site.hold(&["--pidfile", "app.pid"]);
    let _lease = site.hold(&["--lease", "leader"]);
    let listed = site.run(&["list", "--json"]).json();
    let rows = listed["locks"].as_array().expect("locks").iter();
    let mut kinds: Vec<_> = rows
        .filter(|row| {
            row["name"]
                .as_str()
                .is_some_and(|name| Path::new(name).starts_with(site.directory()))
        })
        .map(|row| row["kind"].as_str().unwrap_or_default().to_owned())
        .collect();
    kinds.sort_unstable();
    kinds.retain(|kind| kind != "pidfile");
    assert_eq!(kinds, ["lease", "table"], "{listed}");
}

#[test]
fn b9_list_omits_free_locks_except_given_files() {
    let site = Site::new();
    assert_eq!(
        site.run(&["run", "--lease", "free.lease", "--", "true"])
            .code,
        0
    );
    site.write("dead.pid", format!("{}\n", dead()));
    let here = site.directory().display().to_string();
    let rows = |arguments: &[&str]| {
        let listed = site.run(&[&["list", "--json"], arguments].concat()).json();
        let rows = listed["locks"].as_array().expect("locks").iter();
        let mine = rows.filter(|row| {
            row["name"]
                .as_str()
                .is_some_and(|name| name.starts_with(&here))
        });
        mine.map(|row| row["state"].as_str().unwrap_or_default().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(rows(&[&here]), ["stale"]);
    assert_eq!(rows(&["free.lease"]), ["free"]);
    // Locks that come and go are shown as held, or not at all.
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for number in 0..2 {
            let (stop, file) = (&stop, FileLock::new(site.path(&format!("{number}.lock"))));
            let named = NamedLock::new(&fresh_name()).expect("a name");
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    drop((file.lock().expect("a lock"), named.lock().expect("a lock")));
                }
            });
        }
        let states: Vec<_> = (0..20)
            .flat_map(|_| {
                let listed = site.run(&["list", "--json"]).json();
                let rows = listed["locks"].as_array().expect("locks").clone();
                rows.into_iter().map(|row| row["state"].clone())
            })
            .collect();
        stop.store(true, Ordering::Relaxed);
        assert!(states.iter().all(|state| state == "held"), "{states:?}");
    });
}
