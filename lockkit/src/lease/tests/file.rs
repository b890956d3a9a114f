//! Tests of a lease and its file: tokens, takeovers, damage, and files of other programs.

use std::fs;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use super::fixtures::{MS, TestDir, eventually, held_by, remote_owner};
use crate::base::error::ErrorKind;
use crate::base::owner::Owner;
use crate::lease::store::file::format::{self, Content, SIZE};
use crate::lease::{Lease, LeaseSnapshot, LeaseStatus, LossReason};

#[test]
fn acquire_repeatedly_grows_token_and_keeps_file() {
    let directory = TestDir::new();
    let lease = directory.lease().build().unwrap();
    let mut last = lease.try_lock().unwrap().token();
    assert!(last > 1_700_000_000_000_000, "the first token is the time");
    for _ in 0..100 {
        let guard = lease.try_lock().unwrap();
        assert!(guard.token() > last);
        assert!(guard.recovered().is_none());
        last = guard.token();
        guard.release().unwrap();
    }
    assert_eq!(lease.status().unwrap(), LeaseStatus::Free);
    assert_eq!(fs::read(directory.path()).unwrap().len(), SIZE);
}

#[test]
fn acquire_after_deletion_or_backup_grows_token() {
    let directory = TestDir::new();
    let lease = directory.lease().build().unwrap();
    let token = || lease.try_lock().unwrap().token();
    let mut last = token();
    let backup = fs::read(directory.path()).unwrap();
    for harm in [0, 1, 2] {
        for _ in 0..harm * 5 {
            let next = token();
            assert!(next > last, "{next} after {last}");
            last = next;
        }
        fs::write(directory.path(), &backup).unwrap();
        let next = token();
        assert!(next > last, "{next} after {last} and a restored backup");
        fs::remove_file(directory.path()).unwrap();
        let after = token();
        assert!(after > next, "{after} after {next} and a deletion");
        last = after;
    }
    // A token below the time, of an owner of this boot.
    directory.write(held_by(&Owner::ended(1), 41));
    assert!(token() > last);
}

#[test]
fn token_ahead_of_clock_still_grows() {
    let directory = TestDir::new();
    let ahead = 1 << 53;
    directory.write(held_by(&Owner::ended(1), ahead));
    let lease = directory.lease().build().unwrap();
    assert_eq!(lease.try_lock().unwrap().token(), ahead + 1);
    assert_eq!(lease.try_lock().unwrap().token(), ahead + 2);
    directory.write(held_by(&Owner::ended(1), 1 << 54));
    let error = lease.try_lock().unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::LayoutMismatch { .. }),
        "{error}"
    );
    assert!(error.to_string().contains("centuries ahead"), "{error}");
}

#[test]
fn silent_remote_holder_taken_over_after_ttl() {
    let directory = TestDir::new();
    directory.write(held_by(&remote_owner(), 41));
    let began = Instant::now();
    let lease = directory.lease().build().unwrap();
    assert!(lease.try_lock().unwrap_err().is_held());
    let guard = lease.lock_for(MS * 5000).unwrap();
    let took = began.elapsed();
    assert!(took >= MS * 300 && took < MS * 600, "{took:?}");
    assert!(guard.token() > 1_700_000_000_000_000);
    assert_eq!(
        guard.recovered().unwrap().owner().unwrap().host(),
        Some("elsewhere")
    );
}

#[test]
fn repeated_single_tries_take_over_silent_holder() {
    let directory = TestDir::new();
    directory.write(held_by(&remote_owner(), 41));
    let try_once = || {
        let lease = directory.lease().build().unwrap();
        assert!(matches!(lease.status().unwrap(), LeaseStatus::Held(_)));
        lease.try_lock()
    };
    let began = Instant::now();
    let mut tries = 0;
    let _guard = loop {
        match try_once() {
            Ok(guard) => break guard,
            Err(error) => assert!(error.is_held()),
        }
        tries += 1;
        thread::sleep(MS * 20);
    };
    let took = began.elapsed();
    assert!(
        took >= MS * 300 && took < MS * 600 && tries > 3,
        "{took:?}, {tries}"
    );
}

#[test]
fn acquire_from_dead_owner_succeeds_at_once() {
    let directory = TestDir::new();
    directory.write(held_by(&Owner::ended(1), 41));
    let guard = directory.lease().build().unwrap().try_lock().unwrap();
    assert_eq!(guard.recovered().unwrap().owner().unwrap().pid(), 1);
}

#[test]
fn damaged_record_is_held_then_reclaimed() {
    let zeros = "\0".repeat(SIZE);
    for damaged in ["", &zeros, "lockkit lease 1\n", "lockkit"] {
        let directory = TestDir::new();
        fs::write(directory.path(), damaged).unwrap();
        let lease = directory
            .lease()
            .invalid_pid_lock_stale_threshold(MS * 200)
            .build()
            .unwrap();
        assert!(lease.try_lock().unwrap_err().is_held());
        assert_eq!(
            fs::read(directory.path()).unwrap(),
            damaged.as_bytes(),
            "a fresh file is not written"
        );
        let began = Instant::now();
        let guard = lease.lock_for(MS * 5000).unwrap();
        assert!(began.elapsed() < MS * 500);
        assert!(guard.recovered().is_some() && guard.token() > 1_700_000_000_000_000);
    }
}

#[test]
fn acquire_foreign_file_fails_and_keeps_it() {
    let directory = TestDir::new();
    let lease = directory
        .lease()
        .invalid_pid_lock_stale_threshold(MS * 50)
        .build()
        .unwrap();
    let snapshot = LeaseSnapshot::new(format::fingerprint(b"4242\n"));
    for foreign in [
        "4242\n",
        "\n",
        "{}",
        &"x".repeat(3000),
        &"\0".repeat(SIZE + 1),
    ] {
        fs::write(directory.path(), foreign).unwrap();
        let began = Instant::now();
        let refused = [
            lease.lock().err(),
            lease.try_lock().err(),
            lease.status().err(),
            lease.evict(&snapshot).err(),
        ]
        .map(Option::unwrap);
        assert!(began.elapsed() < MS * 1000);
        for error in refused {
            assert!(
                matches!(error.kind(), ErrorKind::NotALease { .. }),
                "{error}"
            );
        }
        assert_eq!(fs::read(directory.path()).unwrap(), foreign.as_bytes());
    }
}

#[test]
fn holder_of_foreign_file_never_writes_it() {
    let directory = TestDir::new();
    let (report, reports) = mpsc::channel();
    let lease = directory
        .lease()
        .ttl(MS * 400)
        .on_lost(move |loss| report.send(loss.reason.to_string()).unwrap());
    let lease = lease.build().unwrap();
    for releases in [true, false] {
        let guard = lease.lock().unwrap();
        fs::write(directory.path(), "notes").unwrap();
        if releases {
            let error = guard.release().unwrap_err();
            assert!(
                matches!(error.kind(), ErrorKind::NotALease { .. }),
                "{error}"
            );
        } else {
            let reason = reports.recv_timeout(MS * 5000).unwrap();
            assert!(reason.contains("is not a lease"), "{reason}");
            assert!(!guard.is_held());
        }
        assert_eq!(fs::read(directory.path()).unwrap(), b"notes");
        fs::remove_file(directory.path()).unwrap();
    }
}

#[test]
fn damaged_record_stays_held_until_holder_repairs_it() {
    let directory = TestDir::new();
    let lease = Lease::file(directory.path())
        .ttl(MS * 30_000)
        .heartbeat(MS * 10_000)
        .build()
        .unwrap();
    let guard = lease.lock().unwrap();
    fs::write(directory.path(), "lockkit lease 1\n").unwrap();
    assert!(lease.lock_for(MS * 2300).unwrap_err().is_timeout());
    assert!(guard.is_held());
}

#[test]
fn acquire_record_of_later_version_fails_and_keeps_it() {
    let directory = TestDir::new();
    fs::write(directory.path(), "lockkit lease 2\n").unwrap();
    let lease = directory.lease().build().unwrap();
    for error in [lease.try_lock().unwrap_err(), lease.status().unwrap_err()] {
        assert!(
            matches!(error.kind(), ErrorKind::LayoutMismatch { .. }),
            "{error:?}"
        );
    }
    assert_eq!(fs::read(directory.path()).unwrap(), b"lockkit lease 2\n");
}

#[test]
fn holder_repairs_damaged_or_deleted_record() {
    let directory = TestDir::new();
    let guard = directory.lease().build().unwrap().lock().unwrap();
    let damages: [&dyn Fn(); 4] = [
        &|| fs::write(directory.path(), "lockkit lease 1\nsum").unwrap(),
        &|| fs::write(directory.path(), "").unwrap(),
        &|| fs::remove_file(directory.path()).unwrap(),
        &|| {
            fs::write(directory.0.join("other"), "\0\0").unwrap();
            fs::rename(directory.0.join("other"), directory.path()).unwrap();
        },
    ];
    for damage in damages {
        damage();
        eventually("the record is repaired", || {
            fs::read(directory.path())
                .is_ok_and(|bytes| matches!(format::parse(&bytes), Content::Ours(_)))
        });
        assert_eq!(directory.record().token(), guard.token());
    }
    guard.release().unwrap();
}

#[test]
fn heartbeat_number_is_never_repeated() {
    let directory = TestDir::new();
    let guard = directory.lease().build().unwrap().lock().unwrap();
    let old = directory.record();
    eventually("the lease is renewed", || {
        directory.record().heartbeat_number() > old.heartbeat_number() + 2
    });
    let last = directory.record().heartbeat_number();
    directory.write(old);
    eventually("the lease is renewed", || {
        directory.record().heartbeat_number() > last
    });
    drop(guard);
}

#[test]
fn renewal_finding_foreign_record_loses_lease_once() {
    let directory = TestDir::new();
    let (report, reports) = mpsc::channel();
    let lease = directory
        .lease()
        .on_lost(move |loss| report.send(loss.clone()).unwrap())
        .build()
        .unwrap();
    let guard = lease.lock().unwrap();
    let signal = guard.lost();
    let mut foreign = held_by(&remote_owner(), 3);
    let foreign_bytes = *foreign.seal();
    directory.write(foreign);
    let loss = reports.recv_timeout(MS * 2000).unwrap();
    assert!(
        matches!(&loss.reason, LossReason::TakenOver { by: Some(by) } if by.host() == Some("elsewhere"))
    );
    assert_eq!(loss.token, guard.token());
    assert!(!guard.is_held() && signal.is_lost() && signal.token().is_cancelled());
    assert_eq!(guard.remaining(), Duration::ZERO);
    assert!(matches!(
        guard.check().unwrap_err().kind(),
        ErrorKind::LeaseLost { .. }
    ));
    assert!(matches!(
        guard.release().unwrap_err().kind(),
        ErrorKind::LeaseLost { .. }
    ));
    assert!(
        matches!(signal.reason(), Some(LossReason::TakenOver { .. })),
        "the reason stays"
    );
    assert_eq!(fs::read(directory.path()).unwrap(), foreign_bytes);
    assert!(
        reports.recv_timeout(MS * 100).is_err(),
        "the loss is reported once"
    );
}

#[test]
#[cfg(unix)]
fn acquire_link_or_special_file_fails_as_insecure() {
    let directory = TestDir::new();
    let lease = directory.lease().build().unwrap();
    drop(lease.lock().unwrap());
    fs::hard_link(directory.path(), directory.0.join("second")).unwrap();
    assert!(matches!(
        lease.try_lock().unwrap_err().kind(),
        ErrorKind::Insecure { .. }
    ));
    fs::remove_file(directory.path()).unwrap();
    std::os::unix::fs::symlink("second", directory.path()).unwrap();
    assert!(matches!(
        lease.try_lock().unwrap_err().kind(),
        ErrorKind::Insecure { .. }
    ));
    assert!(matches!(
        lease.status().unwrap_err().kind(),
        ErrorKind::Insecure { .. }
    ));
    fs::remove_file(directory.path()).unwrap();
    assert!(
        std::process::Command::new("mkfifo")
            .arg(directory.path())
            .status()
            .unwrap()
            .success()
    );
    for error in [
        lease.try_lock().unwrap_err(),
        lease.status().unwrap_err(),
        lease.owner().unwrap_err(),
    ] {
        assert!(
            matches!(error.kind(), ErrorKind::Insecure { .. }),
            "{error:?}"
        );
    }
    let directory_itself = Lease::file(&directory.0).build().unwrap();
    assert!(directory_itself.try_lock().is_err());
}

#[test]
#[cfg(unix)]
fn create_parents_creates_directories_with_modes() {
    use std::os::unix::fs::PermissionsExt;
    let directory = TestDir::new();
    let path = directory.0.join("a/b/lease");
    let error = Lease::file(&path).build().unwrap().lock().unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::Io { path, source, .. }
        if *path == directory.0.join("a/b") && source.kind() == std::io::ErrorKind::NotFound),
        "{error}"
    );
    assert!(!directory.0.join("a").exists());
    drop(
        Lease::file(&path)
            .create_parents()
            .build()
            .unwrap()
            .lock()
            .unwrap(),
    );
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
}

#[test]
fn files_of_one_file_system_share_failure_domain() {
    let directory = TestDir::new();
    let lease = |name: &str| Lease::file(directory.0.join(name)).build().unwrap();
    let (first, second) = (lease("first"), lease("second"));
    assert_eq!(first.0.store.profile().failure_domain, None);
    let _guards = (first.lock().unwrap(), second.lock().unwrap());
    let domain = first.0.store.profile().failure_domain;
    assert!(domain.is_some() && domain == second.0.store.profile().failure_domain);
}
