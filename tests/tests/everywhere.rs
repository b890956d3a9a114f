//! Cases that hold on every system, in addition to the suite.

use std::time::Duration;

use lockkit::{Backend, ErrorKind, NamedLock, PidFile, PidStatus, Scope};
use lockkit_tests::wine::is_wine;
use lockkit_tests::{Actor, Kind, fresh_name, until};

#[test]
fn held_pidfile_is_readable_and_release_removes_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("app.pid");
    let guard = PidFile::new(&path).unwrap().try_lock().unwrap();
    if is_wine() {
        lockkit_tests::left_out(
            "under Wine: Windows refuses to read a part of a locked file, and Wine does not",
        );
    }
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().next(), Some(&*std::process::id().to_string()));
    assert!(
        matches!(PidFile::inspect(&path).unwrap(), PidStatus::Running(owner) if owner.pid() == std::process::id())
    );
    guard.verify().unwrap();
    guard.release().unwrap();
    assert!(matches!(
        PidFile::inspect(&path).unwrap(),
        PidStatus::Absent
    ));
}

#[test]
fn pidfile_of_dead_process_is_stale_of_live_one_is_held() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("app.pid");
    let mut other = Actor::start(&Kind::FILE.fresh());
    std::fs::write(&path, format!("{}\n", other.pid())).unwrap();
    assert!(
        matches!(PidFile::inspect(&path).unwrap(), PidStatus::Running(owner) if owner.pid() == other.pid())
    );
    assert!(
        PidFile::new(&path)
            .unwrap()
            .try_lock()
            .unwrap_err()
            .is_held()
    );
    assert!(!PidFile::remove_stale(&path).unwrap());
    other.kill();
    assert!(
        matches!(PidFile::inspect(&path).unwrap(), PidStatus::Stale(owner) if owner.pid() == other.pid())
    );
    let guard = PidFile::new(&path)
        .unwrap()
        .lock_for(Duration::from_secs(10))
        .unwrap();
    assert_eq!(
        guard.recovered().unwrap().owner().unwrap().pid(),
        other.pid()
    );
}

#[test]
fn named_lock_owner_reported_only_while_held() {
    for backend in [Backend::Auto, Backend::File] {
        let name = fresh_name("lockkit-Everywhere");
        let lock = NamedLock::builder(&name).backend(backend).build().unwrap();
        assert_eq!(lock.owner().unwrap(), None);
        let guard = lock.try_lock().unwrap();
        assert_eq!(lock.owner().unwrap().unwrap().pid(), std::process::id());
        assert!(
            NamedLock::list(Scope::User)
                .unwrap()
                .iter()
                .any(|held| held.name() == name)
        );
        let other = NamedLock::builder(&name.to_ascii_lowercase())
            .backend(backend)
            .build()
            .unwrap();
        drop(other.try_lock().expect("names are case-sensitive"));
        drop(guard);
        // A process that another test is starting has a copy of the descriptor until its exec.
        until("no owner is reported", || lock.owner().unwrap().is_none());
    }
}

#[test]
fn missing_feature_of_system_is_unsupported() {
    let unsupported = |error: lockkit::Error| matches!(error.kind(), ErrorKind::Unsupported { .. });
    let built = |backend| {
        NamedLock::builder("lockkit-everywhere")
            .backend(backend)
            .build()
    };
    assert_eq!(
        built(Backend::Socket).map_or_else(unsupported, |_| false),
        !cfg!(target_os = "linux")
    );
    assert_eq!(
        built(Backend::Mutex).map_or_else(unsupported, |_| false),
        !cfg!(windows)
    );
    let directory = tempfile::tempdir().unwrap();
    let table = lockkit::ShmLockManager::create(directory.path().join("table"), 1);
    assert_eq!(
        table.map_or_else(unsupported, |_| false),
        !cfg!(target_os = "linux")
    );
}
