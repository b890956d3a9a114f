//! Tests of `lockkit table`.

#![cfg(target_os = "linux")]

mod common;

use std::fs::File;

use tempfile::TempDir;

use common::{code, code_of, json, lockkit, output, text};

#[test]
fn table_allocate_and_free_reuse_numbers() {
    let directory = TempDir::new_in("/dev/shm").expect("a directory");
    for kind in [["--capacity", "4"].as_slice(), &["--directory"]] {
        let path = directory.path().join(kind[0]).display().to_string();
        let mut create = lockkit(["table", "create", &path]);
        assert!(
            create
                .args(kind)
                .status()
                .expect("lockkit starts")
                .success()
        );
        assert_eq!(code(["table", "create", &path]), 73, "something is there");
        let allocate = || {
            text(&output(["table", "allocate", &path]).stdout)
                .trim()
                .to_owned()
        };
        assert_eq!([allocate(), allocate()], ["0", "1"]);
        assert_eq!(code(["table", "allocate", &path, "--at", "1"]), 69);
        assert_eq!(code(["table", "free", &path, "0"]), 0);
        assert_eq!(code(["table", "free", &path, "0"]), 69);
        let form = json(&output(["table", "list", &path, "--json"]));
        assert_eq!(form["lock"]["kind"], "table");
        let renumbered = output(["table", "renumber", "--yes", &path, "3", "1", "1"]);
        let numbers = text(&renumbered.stdout);
        let numbers: Vec<_> = numbers
            .lines()
            .filter_map(|line| line.split_once(' '))
            .collect();
        assert_eq!(numbers[..2], [("3", "3"), ("1", "1")]);
        assert_eq!(numbers[2].0, "1");
        assert!(
            !["1", "3"].contains(&numbers[2].1),
            "a number of its own: {numbers:?}"
        );
        assert_eq!(code(["table", "free", &path, "--all"]), 64, "nobody to ask");
        assert_eq!(code(["table", "free", &path, "--all", "--yes"]), 0);
    }
}

#[test]
fn table_numbers_kept_when_output_or_renumber_fails() {
    let directory = TempDir::new_in("/dev/shm").expect("a directory");
    let path = directory.path().join("table").display().to_string();
    assert_eq!(code(["table", "create", &path, "--capacity", "2"]), 0);
    assert_eq!(text(&output(["table", "allocate", &path]).stdout), "0\n");
    let left = || json(&output(["table", "list", &path, "--json"]))["lock"]["available"].clone();
    let full = File::options()
        .write(true)
        .open("/dev/full")
        .expect("a device");
    let unread = lockkit(["table", "allocate", &path])
        .stdout(full)
        .status()
        .expect("lockkit starts");
    assert_eq!((unread.code(), left()), (Some(74), 1.into()));
    let refused = output(["table", "renumber", "--yes", &path, "0", "0", "0"]);
    assert_eq!(
        (code_of(&refused), text(&refused.stdout), left()),
        (69, String::new(), 1.into())
    );
}

#[test]
fn table_status_reports_holder_of_each_lock() {
    use lockkit::{LockManager, ShmLockManager};
    let directory = TempDir::new_in("/dev/shm").expect("a directory");
    let path = directory.path().join("table");
    let table = ShmLockManager::create(&path, 8).expect("a table");
    let lock = table.allocate_at(5).expect("a lock");
    let _guard = lock.lock().expect("free");
    let path = path.display().to_string();
    let status = output(["status", &path, "--json"]);
    assert_eq!(code_of(&status), 1);
    let holder = &json(&status)["lock"]["holders"][0];
    assert_eq!(
        (&holder["lock"], &holder["pid"]),
        (&5.into(), &std::process::id().into())
    );
    assert_eq!(
        code(["table", "renumber", "--yes", &path, "5"]),
        75,
        "somebody holds one"
    );
}
