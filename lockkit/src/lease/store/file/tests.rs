//! Tests of the parts of the file store.

use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use super::file_store::{FileSpec, FileStore};
use super::judgement::MAX_CLOCK_DIFFERENCE;
#[cfg(target_os = "linux")]
use super::open::is_local;
use crate::lease::clock::{ManualClock, SystemClock};
use crate::lease::store::lease_store::{ClaimId, Deadline};
use crate::sys::files;

#[test]
#[cfg(target_os = "linux")]
fn is_local_of_unknown_file_system_returns_false() {
    assert!(is_local(&File::open("/dev/shm").unwrap()));
    assert!(
        !is_local(&File::open("/proc/self/stat").unwrap()),
        "procfs is not in the list"
    );
}

fn store(name: &str, ttl: Duration) -> FileStore {
    let base = if cfg!(target_os = "linux") {
        PathBuf::from("/dev/shm")
    } else {
        std::env::temp_dir()
    };
    FileStore::new(FileSpec {
        path: base.join(format!("lockkit-lease-{name}-{}", std::process::id())),
        heartbeat: ttl / 4,
        damage_timeout: ttl,
        retry_delay: ttl,
        file_mode: None,
        directory_mode: None,
        create_parents: false,
        clock: Arc::new(SystemClock),
        clock_id: None,
    })
}

#[test]
fn age_on_remote_file_system_counts_less_an_hour() {
    let store = store("aged", Duration::from_secs(1));
    let minute = Duration::from_secs(60);
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&store.spec.path)
        .unwrap();
    for (is_remote, age, least) in [
        (false, minute, minute),
        (true, minute, Duration::ZERO),
        (true, MAX_CLOCK_DIFFERENCE + minute, minute),
        (false, Duration::ZERO, Duration::ZERO),
    ] {
        store.is_remote.store(is_remote, Ordering::Relaxed);
        file.set_modified(SystemTime::now() - age).unwrap();
        let found = store.unchanged_for(&files::metadata_of(&file).unwrap());
        assert!(
            (least..least + minute / 2).contains(&found),
            "{is_remote} {age:?}: {found:?}"
        );
    }
    file.set_modified(SystemTime::now() + minute).unwrap();
    assert_eq!(
        store.unchanged_for(&files::metadata_of(&file).unwrap()),
        Duration::ZERO
    );
    fs::remove_file(&store.spec.path).unwrap();
}

#[test]
fn file_blank_again_counts_as_held_for_whole_timeout() {
    let clock = ManualClock::new();
    let mut store = store("blank", Duration::from_secs(60));
    store.spec.clock = Arc::new(clock.clone());
    let blank_since = |age| {
        let file = File::create(&store.spec.path).unwrap();
        file.set_modified(SystemTime::now() - age).unwrap();
    };
    let second = Duration::from_secs(1);
    let left = || {
        store
            .read_snapshot()
            .unwrap()
            .unwrap()
            .expires_in()
            .unwrap()
    };
    blank_since(second * 2);
    assert!(left() > second * 50);
    clock.advance(second * 70);
    assert_eq!(left(), Duration::ZERO);
    blank_since(second);
    assert!(left() > second * 50, "{:?}", left());
    fs::remove_file(&store.spec.path).unwrap();
}

#[test]
fn reader_does_not_disturb_create_in_place() {
    let ttl = Duration::from_secs(1);
    let store = store("created", ttl);
    let path = store.spec.path.clone();
    let is_over = AtomicBool::new(false);
    let disturbed = thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                // The file may also have been deleted again.
                let _ = store.lock(Deadline::after(Duration::ZERO));
            }
        });
        let create = || store.create_in_place(&mut store.own_record(&ClaimId::random(), 1, ttl));
        let is_disturbed = |_: &u32| {
            let is_created = create().unwrap();
            fs::remove_file(&path).unwrap();
            !is_created
        };
        let disturbed = (0..2000).filter(is_disturbed).count();
        is_over.store(true, Ordering::Relaxed);
        disturbed
    });
    assert_eq!(disturbed, 0);
}
