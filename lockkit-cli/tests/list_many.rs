//! Tests of `lockkit list` with many locks of a kind: one pass shows all of them.
//!
//! The bounds are generous, for a build without optimisation on a busy machine. They distinguish
//! one pass from one pass per lock, which takes minutes.

#![cfg(target_os = "linux")]

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lockkit::{Lease, LockManager, NamedLock, ShmLockManager};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::Value;
use tempfile::TempDir;

const MANY: usize = 10_000;
const BOUND: Duration = Duration::from_secs(30);

/// Runs one test at a time, because each test also lists the locks of the others.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns whether this process may have so many descriptors.
fn has_descriptors() -> bool {
    let wanted = MANY as u64 + 1000;
    let limit = getrlimit(Resource::Nofile);
    let maximum = limit.maximum.map_or(wanted, |maximum| maximum.max(wanted));
    let enough = limit.current.is_none_or(|current| current >= wanted)
        || setrlimit(
            Resource::Nofile,
            Rlimit {
                current: Some(wanted),
                maximum: Some(maximum),
            },
        )
        .is_ok();
    if !enough {
        use std::io::Write;
        let thread = std::thread::current();
        let _ = writeln!(
            std::io::stderr(),
            "left out: {}: no more than {:?} descriptors",
            thread.name().unwrap_or_default(),
            limit.maximum
        );
    }
    enough
}

/// Returns the locks of `kind` whose names begin with `name`. `list` must show them in time.
fn listed(given: Option<&Path>, kind: &str, name: &str) -> Vec<Value> {
    let begun = Instant::now();
    let mut command = Command::new(env!("CARGO_BIN_EXE_lockkit"));
    let listed = command
        .args(["list", "--json"])
        .args(given)
        .stdin(Stdio::null())
        .output()
        .expect("lockkit starts");
    let took = begun.elapsed();
    println!("{kind}: {took:?}");
    assert!(listed.status.success(), "{listed:?}");
    assert!(took < BOUND, "{took:?}");
    let form: Value = serde_json::from_slice(&listed.stdout).expect("JSON");
    let locks = form["locks"].as_array().expect("locks").iter();
    let is_wanted = |lock: &&Value| {
        lock["kind"] == kind
            && lock["name"]
                .as_str()
                .is_some_and(|own| own.starts_with(name))
    };
    locks.filter(is_wanted).cloned().collect()
}

fn are_held(locks: &[Value]) -> bool {
    let me = std::process::id();
    locks
        .iter()
        .all(|lock| lock["state"] == "held" && lock["holders"][0]["pid"] == me)
}

fn prefix(directory: &TempDir) -> String {
    format!("{}/", directory.path().display())
}

#[test]
fn b12_ten_thousand_named_locks_are_listed_in_one_pass() {
    let _alone = alone();
    if !has_descriptors() {
        return;
    }
    let name = format!("list-{}-", std::process::id());
    let guards: Vec<_> = (0..MANY)
        .map(|number| {
            NamedLock::new(&format!("{name}{number}"))
                .and_then(|lock| lock.try_lock())
                .expect("a free lock")
        })
        .collect();
    let locks = listed(None, "named", &name);
    assert!(
        locks.len() == guards.len() && are_held(&locks),
        "{}",
        locks.len()
    );
}

#[test]
fn b12_ten_thousand_locked_files_are_listed_in_one_pass() {
    let _alone = alone();
    if !has_descriptors() {
        return;
    }
    let directory = TempDir::new().expect("a directory");
    let files: Vec<_> = (0..MANY)
        .map(|number| {
            let file = File::create(directory.path().join(number.to_string())).expect("a file");
            rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)
                .expect("a free lock");
            file
        })
        .collect();
    let locks = listed(None, "file", &prefix(&directory));
    assert!(
        locks.len() == files.len() && are_held(&locks),
        "{}",
        locks.len()
    );
}

#[test]
fn b12_ten_thousand_leases_are_listed_in_one_pass() {
    let _alone = alone();
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("held");
    // No renewal changes the record while it is copied.
    let lease = Lease::file(&path)
        .ttl(Duration::from_secs(6000))
        .heartbeat(Duration::from_secs(2000));
    let lease = lease.build().expect("a lease");
    let _guard = lease.try_lock().expect("a free lease");
    for number in 1..MANY {
        fs::copy(&path, directory.path().join(number.to_string())).expect("a copy");
    }
    let locks = listed(Some(directory.path()), "lease", &prefix(&directory));
    assert!(locks.len() == MANY && are_held(&locks), "{}", locks.len());
}

#[test]
fn b12_ten_thousand_pidfiles_are_listed_in_one_pass() {
    let _alone = alone();
    let directory = TempDir::new().expect("a directory");
    for number in 0..MANY {
        let path = directory.path().join(format!("{number}.pid"));
        fs::write(path, format!("{}\n", std::process::id())).expect("a file");
    }
    let locks = listed(Some(directory.path()), "pidfile", &prefix(&directory));
    assert!(locks.len() == MANY && are_held(&locks), "{}", locks.len());
}

#[test]
fn b12_table_of_a_million_numbers_is_listed_in_one_pass() {
    let _alone = alone();
    let directory = TempDir::new_in("/dev/shm").expect("a directory");
    let path = directory.path().join("table");
    let table = ShmLockManager::create(&path, 1_000_000).expect("a table");
    let locks: Vec<_> = (0..1_000_000)
        .map(|_| table.allocate().expect("a number"))
        .collect();
    let guards: Vec<_> = locks
        .iter()
        .step_by(100)
        .map(|lock| lock.try_lock().expect("a free lock"))
        .collect();
    let listed = listed(None, "table", &prefix(&directory));
    assert!(listed.len() == 1 && are_held(&listed), "{}", listed.len());
    assert_eq!(
        listed[0]["holders"].as_array().map(Vec::len),
        Some(guards.len())
    );
}
