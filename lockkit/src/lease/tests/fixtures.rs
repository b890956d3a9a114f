//! The fixtures of the tests: a directory for lease files, and records.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::base::owner::Owner;
use crate::lease::store::file::format::{self, Content, Record};
use crate::lease::{ClaimId, Lease, LeaseBuilder};

pub(in crate::lease) const MS: Duration = Duration::from_millis(1);

/// A path below a new directory in memory, which is removed at the end.
pub(super) struct TestDir(pub(super) PathBuf);

impl TestDir {
    pub(super) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let base = if cfg!(target_os = "linux") {
            PathBuf::from("/dev/shm")
        } else {
            std::env::temp_dir()
        };
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = base.join(format!("lockkit-lease-{}-{count}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(super) fn path(&self) -> PathBuf {
        self.0.join("lease")
    }

    pub(super) fn lease(&self) -> LeaseBuilder {
        Lease::file(self.path()).ttl(MS * 1000).heartbeat(MS * 50)
    }

    pub(super) fn record(&self) -> Record {
        match format::parse(&fs::read(self.path()).unwrap()) {
            Content::Ours(record) => *record,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn write(&self, mut record: Record) {
        fs::write(self.path(), record.seal()).unwrap();
    }
}

impl Drop for TestDir {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// Returns an owner on another host, whose liveness is unknown here.
pub(super) fn remote_owner() -> Owner {
    Owner {
        host: Some("elsewhere".into()),
        boot: Some(7),
        ..Owner::current()
    }
}

/// Creates the record of a holder with a ttl of 300 ms.
pub(super) fn held_by(owner: &Owner, token: u64) -> Record {
    Record::held(&ClaimId::random(), token, MS * 300, MS * 50, owner)
}

/// Waits until `is_so` returns true; panics after 5 s.
pub(in crate::lease) fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < MS * 5000, "{what}");
        thread::sleep(MS);
    }
}
