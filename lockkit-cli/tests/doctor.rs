//! Tests of `lockkit doctor`.

#![cfg(target_os = "linux")]

mod common;

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use rustix::process::Signal;
use tempfile::TempDir;

use common::{Running, code, code_of, json, lives, lockkit, output, signal, text, until};

#[test]
fn doctor_on_tmpfs_passes_all_checks() {
    let directory = TempDir::new_in("/dev/shm").expect("a directory");
    let path = directory.path().display().to_string();
    let report = output(["doctor", &path, "--json"]);
    assert_eq!(code_of(&report), 0, "{report:?}");
    let report = json(&report);
    assert_eq!(
        (&report["version"], &report["filesystem"]["kind"]),
        (&1.into(), &"tmpfs".into())
    );
    assert_eq!(report["folder"], path.as_str());
    assert!(report["checks"].as_array().is_some_and(
        |checks| checks.len() == 8 && checks.iter().all(|check| check["passed"] == true)
    ));
    assert!(
        report["advice"]
            .as_array()
            .is_some_and(|advice| advice.iter().all(|lock| lock["usable"] == true))
    );
    assert_eq!(
        fs::read_dir(directory.path()).expect("a directory").count(),
        0,
        "nothing stays behind"
    );
    let shown = text(&output(["doctor", &path]).stdout);
    assert!(
        shown.contains("tmpfs") && shown.contains("What to use here"),
        "{shown}"
    );
    assert_eq!(code(["doctor", "/no/such/directory"]), 66);
}

#[test]
fn doctor_on_proc_exits_nonzero() {
    assert_ne!(code(["doctor", "/proc/self"]), 0);
}

#[test]
fn doctor_interrupted_or_killed_is_cleaned_up() {
    let directory = TempDir::new_in("/dev/shm").expect("a directory");
    let left = || -> Vec<PathBuf> {
        fs::read_dir(directory.path())
            .expect("a directory")
            .map(|entry| entry.expect("an entry").path())
            .collect()
    };
    let path = directory.path().display().to_string();
    let begin = || {
        let mut doctor = lockkit(["doctor", &path]);
        doctor.stderr(Stdio::null());
        let running = Running::start(doctor);
        // Or the command has ended already.
        until("it has begun", || {
            !left().is_empty() || !lives(running.pid())
        });
        running
    };
    for number in [Signal::INT, Signal::TERM, Signal::HUP] {
        // On a busy machine a run may end before the signal, and then it shows nothing.
        let interrupted = (0..50).any(|_| {
            let mut running = begin();
            signal(running.pid(), number);
            let code = running.code();
            // Or the signal arrived after the work was done.
            assert!(
                [0, 128 + number.as_raw(), -number.as_raw()].contains(&code),
                "{code}"
            );
            assert!(left().is_empty(), "{:?}", left());
            code == 128 + number.as_raw()
        });
        assert!(interrupted, "{number:?}");
    }
    let killed = || {
        let mut running = begin();
        signal(running.pid(), Signal::KILL);
        running.code();
        running
    };
    let running = (0..50)
        .map(|_| killed())
        .find(|_| !left().is_empty())
        .expect("one that has not ended first");
    let [abandoned] = &left()[..] else {
        panic!("{:?}", left())
    };
    let name = abandoned
        .file_name()
        .expect("a name")
        .to_string_lossy()
        .into_owned();
    assert_eq!(
        name,
        format!(".lockkit-doctor-{}", running.pid()),
        "as the documentation has it"
    );
    // The directory may belong to a running doctor, so it stays until it is old.
    assert_eq!(code(["doctor", &path]), 0);
    assert!(abandoned.exists());
    let hour_ago = SystemTime::now() - Duration::from_secs(3600);
    File::open(abandoned)
        .and_then(|directory| directory.set_modified(hour_ago))
        .expect("a directory");
    assert_eq!(code(["doctor", &path]), 0);
    assert!(left().is_empty(), "{:?}", left());
}
