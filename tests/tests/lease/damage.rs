//! Damaged records, records of other versions, and files that are not leases.

use std::fs;
#[cfg(target_os = "linux")]
use std::fs::Permissions;
#[cfg(target_os = "linux")]
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
#[cfg(target_os = "linux")]
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use lockkit::ErrorKind;
#[cfg(target_os = "linux")]
use lockkit::lease::LeaseSnapshot;
#[cfg(target_os = "linux")]
use lockkit::{Lease, LeaseStatus};
use lockkit_tests::leases::{Terms, forge, left_by_the_dead, line};
use lockkit_tests::wine::wine_cannot_judge;
use lockkit_tests::{Actor, LIVELY, until};

use crate::fixture::{
    DAMAGED, HOUR, acquire, heartbeat_number, is_held, read, record_of_other_host, replace,
    set_modified, temp_lease, token, wait_for_heartbeats, write,
};

#[test]
fn damaged_record_reclaimed_after_two_seconds() {
    std::thread::scope(|scope| {
        for damaged in DAMAGED {
            scope.spawn(move || {
                let (_directory, terms) = temp_lease();
                write(&terms, damaged);
                let start = Instant::now();
                let lease = terms.open();
                let error = lease.try_lock().unwrap_err();
                assert!(
                    error.is_held() && error.owner().is_none(),
                    "{damaged:?}: {error}"
                );
                assert_eq!(
                    read(&terms),
                    damaged.as_bytes(),
                    "a holder may be about to repair it"
                );
                let guard = lease.lock_for(LIVELY).unwrap();
                assert!(
                    start.elapsed() >= Duration::from_millis(1990),
                    "{damaged:?}"
                );
                assert!(guard.recovered().is_some_and(|died| died.owner().is_none()));
                assert_eq!(line(&read(&terms), "pid"), std::process::id().to_string());
            });
        }
    });
}

#[test]
fn acquire_damaged_record_waits_for_chosen_age() {
    let (_directory, terms) = temp_lease();
    for (age, acquires) in [(HOUR, false), (Duration::from_millis(100), true)] {
        write(&terms, "lockkit lease 1\n");
        let lease = terms
            .builder()
            .invalid_pid_lock_stale_threshold(age)
            .build()
            .unwrap();
        let limit = if acquires {
            LIVELY
        } else {
            Duration::from_millis(2500)
        };
        assert_eq!(lease.lock_for(limit).is_ok(), acquires);
    }
}

#[test]
fn damaged_or_deleted_record_repaired_by_live_holder() {
    if wine_cannot_judge("a file that is open cannot be replaced there") {
        return;
    }
    let (_directory, terms) = temp_lease();
    let mut holder = Actor::start_lease(&terms);
    let first = acquire(&mut holder, "try");
    let old = read(&terms);
    let changes: [&dyn Fn(); 6] = [
        &|| fs::remove_file(&terms.path).unwrap(),
        &|| write(&terms, ""),
        &|| write(&terms, &old[..old.len() / 2]),
        &|| write(&terms, "\0".repeat(1024)),
        &|| replace(&terms, "lockkit lease 1\n"),
        &|| replace(&terms, &old),
    ];
    for change in changes {
        wait_for_heartbeats(&terms);
        let before = heartbeat_number(&terms);
        change();
        until("the record is repaired and renewed", || {
            heartbeat_number(&terms) > before + 2
        });
        assert_eq!(line(&read(&terms), "token").parse(), Ok(first));
        assert!(terms.open().try_lock().unwrap_err().is_held());
        holder.expect("is-held", "yes");
    }
    holder.expect("losses", "losses");
    holder.expect("release", "released");
    assert!(acquire(&mut holder, "try") > first);
}

#[test]
fn wait_for_damaged_record_of_live_holder_continues() {
    if wine_cannot_judge("a file that is open cannot be replaced there") {
        return;
    }
    let (_directory, terms) = temp_lease();
    let [mut holder, mut waiter] = [(); 2].map(|()| Actor::start_lease(&terms));
    let first = acquire(&mut holder, "try");
    let damages: [&dyn Fn(); 3] = [&|| write(&terms, ""), &|| write(&terms, "lock"), &|| {
        replace(&terms, "lock")
    }];
    for damage in damages {
        waiter.tell_to_wait("lock");
        damage();
        wait_for_heartbeats(&terms);
        waiter.expect_silence();
        holder.expect("is-held", "yes");
        holder.expect("release", "released");
        assert!(token(&waiter.answer()) > first);
        waiter.expect("release", "released");
        acquire(&mut holder, "lock");
    }
}

#[test]
fn later_record_version_kept_by_holder_and_waiter() {
    if wine_cannot_judge("a file that is open cannot be replaced there") {
        return;
    }
    let (_directory, terms) = temp_lease();
    let newer = "lockkit lease 2\nflavour sour\n";
    let [mut holder, mut waiter] = [(); 2].map(|()| Actor::start_lease(&terms));
    acquire(&mut holder, "try");
    waiter.tell_to_wait("lock");
    replace(&terms, newer);
    assert!(waiter.answer().starts_with("error LayoutMismatch"));
    holder.expect("wait-lost", "lost taken over");
    for command in ["try", "lock", "lock-for 100"] {
        assert!(waiter.ask(command).starts_with("error LayoutMismatch"));
    }
    for error in [
        terms.open().status().unwrap_err(),
        terms.open().owner().unwrap_err(),
    ] {
        assert!(
            matches!(error.kind(), ErrorKind::LayoutMismatch { .. }),
            "{error}"
        );
    }
    assert!(holder.ask("release").starts_with("error LeaseLost"));
    assert_eq!(read(&terms), newer.as_bytes());
}

/// Returns all properties of a file that a program can change.
#[cfg(target_os = "linux")]
fn file_properties(path: &Path) -> (Option<Vec<u8>>, Option<PathBuf>, u64, u32, i64, i64, u64) {
    let seen = fs::symlink_metadata(path).unwrap();
    let content = seen.is_file().then(|| fs::read(path).unwrap());
    let at = (seen.mtime(), seen.mtime_nsec());
    (
        content,
        fs::read_link(path).ok(),
        seen.ino(),
        seen.mode(),
        at.0,
        at.1,
        seen.len(),
    )
}

/// Creates files that are not leases, and paths that are no files of their own: links, a directory
/// and a FIFO.
#[cfg(target_os = "linux")]
fn create_foreign_files(directory: &Path, record: &[u8]) -> (Vec<PathBuf>, [PathBuf; 6]) {
    let at = |name: &str| directory.join(name);
    let file = |name: &str, bytes: &[u8]| {
        fs::write(at(name), bytes).unwrap();
        at(name)
    };
    let program = fs::read(std::env::current_exe().unwrap()).unwrap();
    let database = [b"SQLite format 3\0", &[0; 4080][..]].concat();
    lockkit::ShmLockManager::create(at("table"), 64).unwrap();
    let files = vec![
        file("notes", b"one\ntwo\n"),
        file("newline", b"\n"),
        file("nul then text", b"\0\0\0\0text"),
        file("database", &database),
        file("head of a database", &database[..1024]),
        file("program", &program[..8192]),
        file("pidfile", b"4242\n"),
        file("json", b"{\"owner\":1}"),
        file("zeros", &[0; 1 << 20]),
        file("one zero too many", &[0; 1025]),
        file(
            "magic and a long tail",
            &[b"lockkit lease 1\nabout leases\n", &[b'x'; 2000][..]].concat(),
        ),
        file(
            "cut record with a tail",
            &[&record[..600], &[b'x'; 600]].concat(),
        ),
        file("family", b"lockkit lease notes\n"),
        file("first letters in capitals", b"Lockkit lease 1\n"),
        file("behind a line", &[b"# copied\n", &record[..900]].concat()),
        at("table"),
    ];
    fs::set_permissions(at("notes"), Permissions::from_mode(0o444)).unwrap();
    for path in &files {
        set_modified(path, SystemTime::now() - HOUR);
    }
    symlink("newline", at("link")).unwrap();
    symlink("nowhere", at("dangling")).unwrap();
    fs::hard_link(at("json"), at("json again")).unwrap();
    fs::create_dir(at("directory")).unwrap();
    rustix::fs::mkfifoat(
        rustix::fs::CWD,
        at("fifo"),
        rustix::fs::Mode::from_raw_mode(0o600),
    )
    .unwrap();
    let special = [
        "link",
        "dangling",
        "json",
        "json again",
        "directory",
        "fifo",
    ]
    .map(at);
    (files, special)
}

#[cfg(target_os = "linux")]
#[test]
fn a1_acquire_of_foreign_file_refused_and_keeps_it() {
    let (directory, terms) = temp_lease();
    drop(terms.open().lock().unwrap());
    let (files, special) = create_foreign_files(directory.path(), &read(&terms));
    let at = |name: &str| directory.path().join(name);
    let damaged = LeaseStatus::Held(LeaseSnapshot::new(0).with_expires_in(Duration::ZERO));
    let LeaseStatus::Held(any) = damaged else {
        unreachable!()
    };
    let is_refused = |path: &Path, error: lockkit::Error| match error.kind() {
        ErrorKind::NotALease { path: named, text } => {
            assert!(
                named == path && error.to_string().contains(text.as_str()),
                "{error}"
            );
            !special.iter().any(|special| special == path)
        }
        ErrorKind::Insecure { .. } => special.iter().any(|special| special == path),
        // A read-only file, for a user other than root.
        ErrorKind::Io { source, .. } => {
            source.kind() == std::io::ErrorKind::PermissionDenied && path == at("notes")
        }
        _ => false,
    };
    std::thread::scope(|scope| {
        for path in files
            .iter()
            .chain(&special)
            .filter(|path| **path != at("json"))
        {
            let (any, is_refused) = (&any, &is_refused);
            scope.spawn(move || {
                let before = file_properties(path);
                let lease = Lease::file(path).build().unwrap();
                let start = Instant::now();
                let attempts: [&dyn Fn() -> lockkit::Result<()>; 7] = [
                    &|| lease.lock_for(Duration::from_secs(3)).map(drop),
                    &|| lease.lock().map(drop),
                    &|| lease.try_lock().map(drop),
                    &|| lease.status().map(drop),
                    &|| lease.owner().map(drop),
                    &|| lease.evict(any).map(drop),
                    &|| {
                        Lease::file(path)
                            .file_write_mode(0o666)
                            .create_parents()
                            .build()
                            .unwrap()
                            .lock()
                            .map(drop)
                    },
                ];
                for (at, attempt) in attempts.iter().enumerate() {
                    let error = attempt().expect_err("the file is not a lease");
                    assert!(
                        is_refused(path, error),
                        "attempt {at} at {}",
                        path.display()
                    );
                }
                assert!(
                    start.elapsed() < Duration::from_secs(3),
                    "every attempt fails at once"
                );
                assert_eq!(file_properties(path), before, "{}", path.display());
            });
        }
    });
}

#[test]
fn a1_holder_never_writes_into_a_foreign_file() {
    if wine_cannot_judge("a file that is open cannot be replaced there") {
        return;
    }
    let foreign = ["one\ntwo\n".to_owned(), "\0".repeat(5000)];
    for (text, replaces) in foreign
        .iter()
        .flat_map(|text| [(text, false), (text, true)])
    {
        let (_directory, terms) = temp_lease();
        let put = || {
            if replaces {
                replace(&terms, text)
            } else {
                write(&terms, text)
            }
        };
        // A holder that keeps the lease until its deadline.
        let mut holder = Actor::start_lease(&terms);
        acquire(&mut holder, "try");
        put();
        let modified = || fs::metadata(&terms.path).unwrap().modified().unwrap();
        let at = modified();
        let lost = holder.ask("wait-lost");
        assert!(lost.contains("is not a lease"), "{lost}");
        assert!(holder.ask("release").starts_with("error LeaseLost"));
        assert!(holder.ask("lock-for 3000").starts_with("error NotALease"));
        assert_eq!((read(&terms), modified()), (text.clone().into_bytes(), at));
        fs::remove_file(&terms.path).unwrap();

        // A holder that releases, and another one that dies.
        let long = Terms {
            ttl: 60_000,
            heartbeat: 20_000,
            ..terms.clone()
        };
        let mut holder = Actor::start_lease(&long);
        acquire(&mut holder, "try");
        put();
        assert!(holder.ask("release").starts_with("error NotALease"));
        acquire(
            &mut Actor::start_lease(&Terms {
                path: terms.path.with_extension("other"),
                ..long
            }),
            "try",
        );
        holder.kill();
        assert_eq!(read(&terms), text.as_bytes());
    }
}

#[test]
fn a1_record_restored_before_deadline_keeps_lease() {
    if wine_cannot_judge("a file that is open cannot be replaced there") {
        return;
    }
    let (_directory, mut terms) = temp_lease();
    terms.ttl = LIVELY.as_millis() as u64;
    let mut holder = Actor::start_lease(&terms);
    acquire(&mut holder, "try");
    let aside = terms.path.with_extension("aside");
    fs::rename(&terms.path, &aside).unwrap();
    fs::write(terms.path.with_extension("new"), "notes").unwrap();
    // A heartbeat may have restored the record just before.
    until("the record is replaced", || {
        fs::rename(terms.path.with_extension("new"), &terms.path).is_ok()
    });
    let start = Instant::now();
    until("some renewals have failed", || {
        start.elapsed() > Duration::from_millis(5 * terms.heartbeat)
    });
    holder.expect("is-held", "yes");
    fs::rename(&aside, &terms.path).unwrap();
    wait_for_heartbeats(&terms);
    holder.expect("is-held", "yes");
    holder.expect("losses", "losses");
    holder.expect("release", "released");
}

#[cfg(target_os = "linux")]
#[test]
fn a8_status_and_try_agree_on_damaged_record() {
    std::thread::scope(|scope| {
        for damaged in DAMAGED {
            scope.spawn(move || {
                let (_directory, terms) = temp_lease();
                write(&terms, damaged);
                let start = Instant::now();
                // Each question comes from a new process, without an earlier observation.
                let mut is_young = true;
                while is_young {
                    let asked = Instant::now();
                    let status = Actor::start_lease(&terms).ask("status");
                    let tried = Actor::start_lease(&terms).ask("try");
                    let took = asked.elapsed();
                    let left = status
                        .strip_prefix("damaged ")
                        .expect(&status)
                        .parse()
                        .map(Duration::from_nanos)
                        .unwrap();
                    is_young = is_held(&tried);
                    match is_young {
                        true => assert!(!left.is_zero(), "{damaged:?}: {status}, {tried}"),
                        false => assert!(
                            left <= took && tried.starts_with("held "),
                            "{damaged:?}: {status}, {tried}"
                        ),
                    }
                }
                assert!(
                    start.elapsed() >= Duration::from_millis(1990),
                    "{damaged:?}"
                );
            });
            scope.spawn(move || {
                // Old damage is reclaimed by the first process that asks.
                let (_directory, terms) = temp_lease();
                write(&terms, damaged);
                let [mut first, mut second] = [(); 2].map(|()| Actor::start_lease(&terms));
                until("the damage is old enough to be reclaimed", || {
                    first.ask("status") == "damaged 0"
                });
                assert!(second.ask("try").starts_with("held "));
                assert!(is_held(&first.ask("try")));
            });
        }
    });
}

#[test]
fn a8_try_of_old_damaged_record_reclaims_it() {
    for damaged in DAMAGED {
        let (_directory, terms) = temp_lease();
        write(&terms, damaged);
        // A time in the future says nothing about the age.
        set_modified(&terms.path, SystemTime::now() + HOUR);
        assert!(
            is_held(&Actor::start_lease(&terms).ask("try")),
            "{damaged:?}"
        );
        // On a file system of another machine the first hour does not count.
        set_modified(&terms.path, SystemTime::now() - 2 * HOUR);
        assert_eq!(
            Actor::start_lease(&terms).ask("status"),
            "damaged 0",
            "{damaged:?}"
        );
        assert!(
            Actor::start_lease(&terms).ask("try").starts_with("held "),
            "{damaged:?}"
        );
    }
}

#[test]
fn c12_acquire_of_forged_numbers_fails_or_is_safe() {
    let (_directory, terms) = temp_lease();
    let maximum = u64::MAX.to_string();
    let dead = left_by_the_dead(&terms);
    let free = forge(&dead, &[("state", "free")]);
    for (record, token) in [
        (&dead, u64::MAX),
        (&dead, u64::MAX - 1),
        (&free, u64::MAX),
        (&free, u64::MAX / 2),
    ] {
        let forged = forge(record, &[("token", &format!("{token:020}"))]);
        write(&terms, forged.clone());
        let lease = terms.open();
        for error in [
            lease.try_lock().unwrap_err(),
            lease.lock_for(LIVELY).unwrap_err(),
            lease.status().unwrap_err(),
        ] {
            let text = error.to_string();
            let first = text.lines().next().unwrap();
            assert!(
                first.contains(terms.path.to_str().unwrap())
                    && first.contains("fencing token is centuries ahead"),
                "{first}"
            );
        }
        assert_eq!(read(&terms), forged);
    }
    // With any other number the lease continues, and tokens never decrease.
    let soon = i64::MAX as u64 / 1024;
    write(&terms, forge(&dead, &[("token", &format!("{soon:020}"))]));
    for next in 1..4 {
        assert_eq!(terms.open().try_lock().unwrap().token(), soon + next);
    }

    // A waiter does not wait for a TTL that no lease can have.
    for ttl in [u64::MAX, 366 * 86_400 * 1_000_000_000] {
        write(
            &terms,
            forge(
                &record_of_other_host(&terms),
                &[
                    ("ttl", &format!("{ttl:020} ns")),
                    ("every", &format!("{maximum} ns")),
                ],
            ),
        );
        let start = Instant::now();
        drop(terms.open().lock_for(LIVELY).unwrap());
        assert!(start.elapsed() >= Duration::from_millis(1990));
    }

    // The heartbeat numbers of a holder continue after the largest number.
    let mut holder = Actor::start_lease(&terms);
    acquire(&mut holder, "lock");
    write(&terms, forge(&read(&terms), &[("beat", &maximum)]));
    let mut waiter = Actor::start_lease(&terms);
    let answer = waiter.ask(&format!("lock-for {}", 3 * terms.ttl));
    assert!(answer.starts_with("error Timeout"), "{answer}");
    holder.expect("is-held", "yes");
}
