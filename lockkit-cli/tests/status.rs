//! Tests of `lockkit status`, and of the JSON forms that it shares with `lockkit list`.

#![cfg(target_os = "linux")]

mod common;

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::SystemTime;

use lockkit::FileLock;
use serde_json::Value;
use tempfile::TempDir;

use common::{
    Ended, FORMS, KINDS, Lock, PROGRAM, Running, Site, code, code_of, dead, fresh_name, json,
    left_out, lockkit, output, sleeper, text, until,
};

#[test]
fn schema_accepts_only_documented_forms() {
    let schema = serde_json::from_str(FORMS).expect("JSON");
    assert!(jsonschema::meta::is_valid(&schema), "it is a schema");
    let schema = jsonschema::validator_for(&schema).expect("a schema");
    let lock = serde_json::json!({"kind": "file", "name": "/a", "state": "free", "holders": [], "waiters": 0});
    let with = |field: &str, value: Value| {
        let mut lock = lock.clone();
        lock[field] = value;
        schema.is_valid(&serde_json::json!({"version": 1, "lock": lock}))
    };
    assert!(with("waiters", Value::Null) && with("of a later release", true.into()));
    assert!(
        with("kind", "fcntl".into()) && !with("state", "unknown".into()),
        "an unknown state has a reason"
    );
    let wrong: [(&str, Value); 8] = [
        ("kind", "mutex".into()),
        ("state", "busy".into()),
        ("waiters", (-1).into()),
        ("name", Value::Null),
        ("holders", serde_json::json!([{"pid": 1}])),
        ("scope", "user".into()),
        ("token", 7.into()),
        ("reason", "of a free lock".into()),
    ];
    for (field, value) in wrong {
        assert!(!with(field, value), "{field}");
    }
    assert!(!schema.is_valid(&serde_json::json!({"version": 2, "lock": lock})));
    assert!(!schema.is_valid(&serde_json::json!({"version": 1})));
}

#[test]
fn status_and_list_json_agree() {
    let locks = KINDS.map(Lock::new);
    let _held: Vec<_> = locks.iter().map(|lock| lock.hold([])).collect();
    let list = output(["list", "--json", &locks[2].place]);
    let list = json(&list);
    assert_eq!(list["version"], 1);
    let listed = list["locks"].as_array().expect("locks");
    for (lock, kind) in locks.iter().zip(["named", "file", "pidfile", "lease"]) {
        let status = output(["status", &lock.place, "--json"]);
        assert_eq!(code_of(&status), 1);
        let status = json(&status);
        assert_eq!(
            (
                &status["version"],
                &status["lock"]["kind"],
                &status["lock"]["state"]
            ),
            (&1.into(), &kind.into(), &"held".into())
        );
        assert_ne!(status["lock"]["holders"][0]["pid"], 0);
        let found: Vec<_> = listed
            .iter()
            .filter(|found| found["name"] == lock.place.as_str())
            .collect();
        assert_eq!(found.len(), 1, "{kind} in {list}");
        assert_eq!(
            found[0]["holders"][0]["pid"],
            status["lock"]["holders"][0]["pid"]
        );
    }
    let table = text(&output(["list"]).stdout);
    assert!(
        table.starts_with("KIND") && table.contains(&locks[0].place),
        "{table}"
    );
    assert!(!table.contains('\x1b'));
}

#[test]
fn status_escapes_file_names_and_does_not_block_on_fifo() {
    let directory = TempDir::new().expect("a directory");
    let odd = directory.path().join("a\x1b[31m\nb").display().to_string();
    let _holder = Running::start(lockkit(["run", "--file", &odd, "--", "sleep", "60"]));
    until("it is held", || code(["status", &odd]) == 1);
    for shown in [output(["status", &odd]), output(["list"])] {
        let shown = text(&shown.stdout);
        assert!(
            shown.contains(r"a\u{1b}[31m\nb") && !shown.contains('\x1b'),
            "{shown:?}"
        );
    }
    let fifo = directory.path().join("fifo").display().to_string();
    assert!(
        Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .expect("mkfifo starts")
            .success()
    );
    assert_eq!(code(["status", &fifo]), 0);
}

#[test]
fn status_with_waiters_counts_them() {
    for kind in ["--name", "--file"] {
        let lock = Lock::new(kind);
        let (_running, _) = lock.hold([]);
        let _waiters = [0; 3].map(|_| Running::start(lock.run(["--quiet"], "true")));
        until("three wait", || {
            json(&output(["status", &lock.place, "--json"]))["lock"]["waiters"] == 3
        });
    }
}

#[test]
fn a3_pidfile_of_live_program_is_held_in_every_form() {
    let site = Site::new();
    let program = sleeper();
    let pid = program.pid();
    let forms = [
        format!("{pid}\n"),
        format!("{pid}"),
        format!("{pid} host.example"),
        format!("\n{pid}\n"),
        format!("\n\n  {pid}\n"),
        format!("{pid}\nhost.example\n"),
        format!("{pid}\0"),
        format!("{pid}\r\n"),
    ];
    for form in forms {
        let path = site.write_old("gc.pid", &form);
        // A file that is older than the process would belong to an earlier process.
        File::options()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_modified(SystemTime::now()))
            .expect("a file");
        assert_eq!(
            site.run(&["pidfile", "check", "gc.pid"]).code,
            1,
            "{form:?}"
        );
        assert_eq!(site.run(&["status", "./gc.pid"]).code, 1, "{form:?}");
        let ended = site.run(&["run", "--try", "--pidfile", "gc.pid", "--", "echo", "RAN"]);
        assert_eq!((ended.code, &*ended.out), (75, ""), "{form:?}: {ended:?}");
        assert_eq!(fs::read_to_string(&path).expect("a file"), form);
        assert_eq!(
            site.run(&["wait", "--timeout", "50ms", "./gc.pid"]).code,
            75,
            "{form:?}"
        );
    }
}

#[test]
fn a8_status_and_lease_show_agree_on_damaged_lease() {
    let site = Site::new();
    for content in [&b""[..], &[0; 1024], &[0; 100], b"lockkit lease 1"] {
        for old in [false, true] {
            match old {
                true => site.write_old("x.lease", content),
                false => site.write("x.lease", content),
            };
            let [status, show] = [
                ["status", "./x.lease"].as_slice(),
                &["lease", "show", "x.lease"],
            ]
            .map(|arguments| site.run(arguments).code);
            assert_eq!(status, show, "{} bytes, old: {old}", content.len());
        }
    }
}

#[test]
fn b1_unreadable_lock_is_unknown_never_free() {
    let site = Site::new();
    let _lease = site.hold(&["--lease", "held.lease"]);
    let _pidfile = site.hold(&["--pidfile", &site.text("held.pid")]);
    let _file = site.hold(&["--file", "held.lock"]);
    site.write("free", "");
    let table = site.text("table");
    assert_eq!(site.run(&["table", "create", &table]).code, 0);
    fs::create_dir(site.path("closed")).expect("a directory");
    site.write("closed/x.lease", "");
    symlink("closed/x.lease", site.path("link")).expect("a link");
    for name in ["held.lease", "held.pid", "held.lock", "free", "table"] {
        fs::set_permissions(site.path(name), Permissions::from_mode(0o600)).expect("a file");
    }
    fs::set_permissions(site.path("closed"), Permissions::from_mode(0o700)).expect("a directory");
    let names = [
        "held.lease",
        "held.pid",
        "held.lock",
        "free",
        "table",
        "closed",
        "closed/x.lease",
        "closed/none",
        "link",
    ];
    for name in names {
        let path = format!("./{name}");
        let Some(status) = site.run_as_other(&["status", &path]) else {
            return;
        };
        assert_eq!((status.code, &*status.out), (77, ""), "{name}: {status:?}");
        let told = status.err.contains(name) && status.err.contains("ask as its owner or as root");
        assert!(
            told && status.err.lines().count() == 1,
            "{name}: {status:?}"
        );
        let wait = site
            .run_as_other(&["wait", "--timeout", "1s", &path])
            .expect("another user");
        assert_eq!((wait.code, &wait.err), (77, &status.err), "{name}");
        let quiet = site
            .run_as_other(&["status", "--quiet", &path])
            .expect("another user");
        assert_eq!((quiet.code, &*quiet.err), (77, ""), "{name}");
        let json = site
            .run_as_other(&["status", "--json", &path])
            .expect("another user");
        assert_eq!(
            (json.code, &json.json()["lock"]["state"]),
            (77, &"unknown".into()),
            "{name}: {json:?}"
        );
    }
    let url = format!("file://{}", site.text("held.lease"));
    assert_eq!(
        site.run_as_other(&["status", &url])
            .expect("another user")
            .code,
        77
    );
    assert_eq!(
        site.run_as_other(&["lease", "show", "held.lease"])
            .expect("another user")
            .code,
        77
    );
}

#[test]
fn b1_named_lock_in_unreadable_file_is_unknown() {
    let site = Site::new();
    let name = fresh_name();
    let path = PathBuf::from(format!("/tmp/lockkit-machine-{name}.lock"));
    let file = File::create(&path).expect("a file");
    fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("a file");
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).expect("a free lock");
    for command in [&["status"][..], &["wait", "--timeout", "1s"]] {
        let arguments: Vec<&str> = command
            .iter()
            .copied()
            .chain(["--scope", "machine", &name])
            .collect();
        let asked = site.run_as_other(&arguments);
        // A user that may read it finds no record, and the kernel reports the lock.
        let seen = site.run(&arguments);
        if let Some(asked) = asked {
            assert!(
                asked.code == 77 && asked.err.contains(&*path.to_string_lossy()),
                "{asked:?}"
            );
        }
        assert_eq!(
            seen.code,
            if command[0] == "status" { 1 } else { 75 },
            "{seen:?}"
        );
    }
    drop(file);
    fs::remove_file(&path).expect("it is there");
    assert_eq!(site.run(&["status", "--scope", "machine", &name]).code, 0);
}

#[test]
fn b1_dangling_link_is_error() {
    let site = Site::new();
    symlink("nowhere", site.path("dangling")).expect("a link");
    symlink("loop", site.path("loop")).expect("a link");
    assert_eq!(site.run(&["status", "./dangling"]).code, 66);
    assert_eq!(site.run(&["wait", "./dangling"]).code, 66);
    assert_eq!(site.run(&["status", "./loop"]).code, 74);
    assert_eq!(
        site.run(&["status", "./nosuch"]).code,
        0,
        "nobody can hold what is not there"
    );
    assert_eq!(site.run(&["status", "./nosuch/file"]).code, 0);
}

#[test]
fn b1_without_proc_held_locks_are_still_held() {
    if !rustix::process::geteuid().is_root() {
        left_out("only root can hide /proc");
        return;
    }
    let site = Site::new();
    let _file = site.hold(&["--file", "held.lock"]);
    let _shared = site.hold(&["--file", "shared.lock", "--shared"]);
    let _lease = site.hold(&["--lease", "held.lease"]);
    let name = fresh_name();
    let _named = site.hold(&["--name", &name]);
    site.write("free.lock", "");
    for (place, code) in [
        ("./held.lock", 1),
        ("./shared.lock", 1),
        ("./held.lease", 1),
        (&*name, 1),
        ("./free.lock", 0),
    ] {
        let script = format!("mount -t tmpfs none /proc && exec {PROGRAM} status {place}");
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-c", &script])
            .current_dir(site.directory())
            .stdin(Stdio::null());
        let ended = Ended::of(&mut command);
        assert_eq!(ended.code, code, "{place}: {ended:?}");
    }
}

#[test]
fn b2_status_of_name_tells_of_file_with_that_name() {
    let site = Site::new();
    let name = fresh_name();
    let none = site.run(&["status", &name]);
    assert_eq!((none.code, &*none.err), (0, ""));
    let _file = site.hold(&["--file", &name]);
    let status = site.run(&["status", &name]);
    assert_eq!(status.code, 0, "the named lock is free: {status:?}");
    assert!(
        status.err.contains(&format!("./{name}")) && status.out.contains("is free"),
        "{status:?}"
    );
    let json = site.run(&["status", "--json", &name]);
    assert_eq!(json.json()["lock"]["kind"], "named");
    assert!(json.err.contains(&format!("./{name}")));
    let quiet = site.run(&["status", "--quiet", &name]);
    assert_eq!((&*quiet.out, &*quiet.err), ("", ""));
    let wait = site.run(&["wait", &name]);
    assert!(
        wait.code == 0 && wait.err.contains(&format!("./{name}")),
        "{wait:?}"
    );
    assert_eq!(site.run(&["wait", "--quiet", &name]).err, "");
    assert_eq!(site.run(&["status", &format!("./{name}")]).code, 1);
    // The same holds for text that cannot be a name.
    site.write("1.lock", "");
    let refused = site.run(&["status", "1.lock"]);
    assert!(
        refused.code == 64 && refused.err.contains("./1.lock"),
        "{refused:?}"
    );
}

#[test]
fn status_of_locked_counter_file_is_held() {
    let site = Site::new();
    for number in [1, dead()] {
        site.write_old("counter", format!("{number}\n"));
        let lock = FileLock::new(site.path("counter"));
        let guard = lock.lock().expect("a free lock");
        let status = site.run(&["status", "--json", "./counter"]);
        let lock = &status.json()["lock"];
        let me = std::process::id();
        assert_eq!(
            (status.code, &lock["kind"], &lock["holders"][0]["pid"]),
            (1, &"file".into(), &me.into()),
            "{lock}"
        );
        drop(guard);
    }
}

#[test]
fn b7_messages_escape_file_names() {
    let site = Site::new();
    let odd = "a\x1b[31m\nb\u{202e}";
    let cases: [&[&str]; 9] = [
        &["run", "--file", &format!("{odd}/x"), "--", "true"],
        &["run", "--pidfile", &format!("{odd}/x"), "--", "true"],
        &["run", "--lease", &format!("file://{odd}"), "--", "true"],
        &["status", &format!("./{odd}")],
        &["status", &format!("{odd}/../x://")],
        &["list", &format!("./{odd}")],
        &["lease", "show", &format!("./{odd}")],
        &["table", "list", &format!("./{odd}")],
        &["doctor", &format!("./{odd}")],
    ];
    for arguments in cases {
        let ended = site.run(arguments);
        for text in [&ended.out, &ended.err] {
            assert!(
                !text.contains('\x1b') && !text.contains('\u{202e}') && !text.contains("\nb"),
                "{arguments:?}: {ended:?}"
            );
        }
    }
}
