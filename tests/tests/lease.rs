//! Lease: every case of the suite, and cases of its own.

#[cfg(target_os = "linux")]
use std::fs::Permissions;
use std::fs::{self, File};
#[cfg(target_os = "linux")]
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
#[cfg(target_os = "linux")]
use std::process::Child;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant, SystemTime};

use lockkit::lease::{
    Attempt, ClaimId, Clock, Deadline, Durability, Grant, LeaseName, LeaseSnapshot, LeaseStore, Released, Renewal,
    StoreError, StoreProfile, SystemClock,
};
use lockkit::{CancelToken, ErrorKind, FileLock, Lease, LeaseStatus, LossReason, Wait};
#[cfg(target_os = "linux")]
use lockkit_tests::another_user;
use lockkit_tests::leases::{Terms, forge, left_by_the_dead, line};
use lockkit_tests::wine::{is_wine, wine_cannot_judge};
use lockkit_tests::{Actor, Belongings, LIVELY, conformance, leases, until};
#[cfg(target_os = "linux")]
use rustix::process::Signal;
use tempfile::TempDir;

conformance!(file_lease, lockkit_tests::Kind::LEASE);

/// Longer than an unreadable record counts as held.
const LONG_AGO: Duration = Duration::from_secs(10);
const HOUR: Duration = Duration::from_secs(3600);

/// Creates a directory for one test, and the terms of a lease in it.
fn place() -> (TempDir, Terms) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("lease");
    (directory, Terms::of(path))
}

fn read(terms: &Terms) -> Vec<u8> {
    fs::read(&terms.path).unwrap()
}

/// Changes a file in place, but not between another process's read and write.
fn write(terms: &Terms, bytes: impl AsRef<[u8]>) {
    let _locked = FileLock::new(&terms.path).lock().unwrap();
    fs::write(&terms.path, bytes).unwrap();
}

/// Replaces the file by another one.
fn replace(terms: &Terms, bytes: impl AsRef<[u8]>) {
    let new = terms.path.with_extension("new");
    fs::write(&new, bytes).unwrap();
    fs::rename(new, &terms.path).unwrap();
}

fn set_age(path: &Path, modified: SystemTime) {
    File::options().write(true).open(path).unwrap().set_modified(modified).unwrap();
}

/// Returns a held record of a holder on another host. This host can determine only that the holder is silent.
fn of_a_stranger(terms: &Terms) -> Vec<u8> {
    let (_directory, mut other) = place();
    other.ttl = terms.ttl;
    let record = left_by_the_dead(&other);
    forge(&record, &[("host", "elsewhere"), ("boot", &"7".repeat(32))])
}

/// Sends the command, and returns the token of the answer `held TOKEN`, which must have nothing after it.
fn take(actor: &mut Actor, command: &str) -> u64 {
    token(&actor.ask(command))
}

fn token(answer: &str) -> u64 {
    let token = answer.strip_prefix("held ").expect(answer);
    token.parse().unwrap_or_else(|_| panic!("{answer}"))
}

/// As [`token`], for an answer that reports the death of an owner.
fn token_after(answer: &str, died: u32) -> u64 {
    token(answer.strip_suffix(&format!(" recovered {died}")).expect(answer))
}

/// Returns how long the lease of `actor` lasts without a renewal.
fn remaining(actor: &mut Actor) -> Duration {
    let left = actor.ask("remaining");
    Duration::from_micros(left.strip_prefix("remaining ").expect(&left).parse().unwrap())
}

fn is_held(answer: &str) -> bool {
    answer.starts_with("error Held")
}

/// Returns the heartbeat number in the record, and 0 without a valid one, as while the record is damaged.
fn beat(terms: &Terms) -> u64 {
    let record = fs::read(&terms.path).unwrap_or_default();
    if record.len() < 1024 || !record.starts_with(b"lockkit lease 1\n") {
        return 0;
    }
    line(&record, "beat").parse().unwrap()
}

fn wait_for_beats(terms: &Terms) {
    let before = beat(terms);
    until("it beats", || beat(terms) > before + 1);
}

/// Stops a holder, but not in the middle of a step, because that would block the steps of other processes for as long.
#[cfg(target_os = "linux")]
fn stop(actor: &Actor, terms: &Terms) {
    let is_stopped = || fs::read_to_string(format!("/proc/{}/stat", actor.pid())).unwrap().contains(") T ");
    until("it is stopped between two steps", || {
        actor.signal(Signal::STOP);
        until("it is stopped", is_stopped);
        let is_between = FileLock::new(&terms.path).try_lock().is_ok();
        if !is_between {
            actor.signal(Signal::CONT);
        }
        is_between
    });
}

fn succeeds(command: &mut Command) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

#[test]
fn try_lock_of_held_lease_refused_until_release() {
    #[derive(Debug, PartialEq)]
    struct BuildRuns;
    impl std::fmt::Display for BuildRuns {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a build is running")
        }
    }
    impl std::error::Error for BuildRuns {}

    let (_directory, terms) = place();
    let mut holder = Actor::start_lease(&terms);
    let first = take(&mut holder, "try");
    let lease = terms.builder().held_error(|| BuildRuns).build().unwrap();
    let error = lease.try_lock().unwrap_err();
    assert!(error.is_held());
    assert_eq!(error.owner().unwrap().pid(), holder.pid());
    let own = std::error::Error::source(&error).and_then(|source| source.downcast_ref());
    assert_eq!(own, Some(&BuildRuns), "the error of the user's own");
    holder.expect("release", "released");
    let second = lease.try_lock().unwrap();
    assert!(second.token() > first && second.recovered().is_none());
    assert!(is_held(&holder.ask("try")));
}

#[test]
fn dead_holder_taken_over_with_new_claim_at_any_record_age() {
    for age in [Duration::ZERO, LONG_AGO] {
        let (_directory, terms) = place();
        let record = left_by_the_dead(&terms);
        let died: u32 = line(&record, "pid").parse().unwrap();
        set_age(&terms.path, SystemTime::now() - age);
        let guard = terms.open().try_lock().unwrap();
        assert_eq!(guard.recovered().unwrap().owner().unwrap().pid(), died);
        let now = read(&terms);
        assert_ne!(line(&now, "claim"), line(&record, "claim"));
        assert_eq!(line(&now, "pid"), std::process::id().to_string());
        assert_eq!(line(&now, "token").parse(), Ok(guard.token()));
        assert!(guard.token() > line(&record, "token").parse::<u64>().unwrap());
    }
}

#[test]
fn lease_record_of_earlier_boot_taken_over_at_once() {
    if cfg!(target_os = "linux") && !lockkit_tests::is_on_a_host() {
        return;
    }
    let (_directory, terms) = place();
    let record = forge(&left_by_the_dead(&terms), &[("boot", &"7".repeat(32)), ("pid", "1"), ("start", "1")]);
    write(&terms, &record);
    let before = line(&record, "token").parse::<u64>().unwrap();
    let guard = terms.open().try_lock().unwrap();
    assert!(guard.recovered().is_some() && guard.token() > before);
}

/// Contents of blank and damaged leases.
const DAMAGED: [&str; 5] = ["", "lockkit lease 1\n", "lockkit lease 1\nsum     8c1b", "lock", "\0\0\0\0"];

#[test]
fn damaged_record_reclaimed_after_two_seconds() {
    std::thread::scope(|scope| {
        for damaged in DAMAGED {
            scope.spawn(move || {
                let (_directory, terms) = place();
                write(&terms, damaged);
                let start = Instant::now();
                let lease = terms.open();
                let error = lease.try_lock().unwrap_err();
                assert!(error.is_held() && error.owner().is_none(), "{damaged:?}: {error}");
                assert_eq!(read(&terms), damaged.as_bytes(), "its holder may be about to mend it");
                let guard = lease.lock_for(LIVELY).unwrap();
                assert!(start.elapsed() >= Duration::from_millis(1990), "{damaged:?}");
                assert!(guard.recovered().is_some_and(|died| died.owner().is_none()));
                assert_eq!(line(&read(&terms), "pid"), std::process::id().to_string());
            });
        }
    });
}

#[test]
fn acquire_damaged_record_waits_for_chosen_age() {
    let (_directory, terms) = place();
    for (age, gets_in) in [(HOUR, false), (Duration::from_millis(100), true)] {
        write(&terms, "lockkit lease 1\n");
        let lease = terms.builder().invalid_pid_lock_stale_threshold(age).build().unwrap();
        let limit = if gets_in { LIVELY } else { Duration::from_millis(2500) };
        assert_eq!(lease.lock_for(limit).is_ok(), gets_in);
    }
}

#[test]
fn try_lock_by_twelve_contenders_has_one_winner() {
    let (directory, terms) = place();
    let mut contenders: Vec<Actor> = (0..12).map(|_| Actor::start_lease(&terms)).collect();
    for round in 0..100 {
        // In every other round the record exists, and is free.
        if round % 2 == 0 {
            let _ = fs::remove_file(&terms.path);
        }
        contenders.iter_mut().for_each(|contender| contender.tell("try"));
        let answers: Vec<String> = contenders.iter_mut().map(Actor::answer).collect();
        let winners: Vec<usize> = (0..12).filter(|at| answers[*at].starts_with("held ")).collect();
        assert_eq!(winners.len(), 1, "round {round}: {answers:?}");
        assert_eq!(answers.iter().filter(|answer| is_held(answer)).count(), 11, "round {round}: {answers:?}");
        token(&answers[winners[0]]);
        contenders[winners[0]].expect("release", "released");
    }
    assert_eq!(directory.path().read_dir().unwrap().count(), 1, "nothing is left but the record");
}

#[test]
fn try_lock_of_stale_record_by_eight_has_one_winner() {
    let (_directory, terms) = place();
    let stale = left_by_the_dead(&terms);
    let died = line(&stale, "pid").parse().unwrap();
    let mut racers: Vec<Actor> = (0..8).map(|_| Actor::start_lease(&terms)).collect();
    // Under Wine each round takes many times as long.
    for round in 0..if is_wine() { 50 } else { 2000 } {
        write(&terms, &stale);
        racers.iter_mut().for_each(|racer| racer.tell("try"));
        let answers: Vec<String> = racers.iter_mut().map(Actor::answer).collect();
        let winners: Vec<usize> = (0..8).filter(|at| answers[*at].starts_with("held ")).collect();
        assert_eq!(winners.len(), 1, "round {round}: {answers:?}");
        assert_eq!(answers.iter().filter(|answer| is_held(answer)).count(), 7, "round {round}: {answers:?}");
        token_after(&answers[winners[0]], died);
        let winner = &mut racers[winners[0]];
        assert_eq!(line(&read(&terms), "pid"), winner.pid().to_string());
        winner.expect("release", "released");
    }
}

#[test]
fn release_keeps_foreign_record() {
    let (_directory, mut terms) = place();
    // The interval is so long that no heartbeat comes in between.
    (terms.ttl, terms.heartbeat) = (60_000, 20_000);
    let lease = terms.open();
    let stranger = of_a_stranger(&terms);
    let newer = b"lockkit lease 2\nflavour sour\n";
    let changes: [&dyn Fn(); 3] =
        [&|| write(&terms, &stranger), &|| replace(&terms, &stranger), &|| replace(&terms, newer)];
    for change in changes {
        for drops in [false, true] {
            let _ = fs::remove_file(&terms.path);
            let guard = lease.try_lock().unwrap();
            change();
            let left = fs::read(&terms.path).ok();
            match drops {
                true => drop(guard),
                false => {
                    let error = guard.release().unwrap_err();
                    assert!(matches!(error.kind(), ErrorKind::LeaseLost { .. }), "{error}");
                }
            }
            assert_eq!(fs::read(&terms.path).ok(), left);
        }
    }
}

#[test]
fn release_of_damaged_or_deleted_record_succeeds() {
    let (_directory, mut terms) = place();
    (terms.ttl, terms.heartbeat) = (60_000, 20_000);
    let lease = terms.open();
    let changes: [&dyn Fn(); 3] =
        [&|| write(&terms, "lock"), &|| replace(&terms, ""), &|| fs::remove_file(&terms.path).unwrap()];
    for change in changes {
        for drops in [false, true] {
            let guard = lease.try_lock().unwrap();
            let (token, lost) = (guard.token(), guard.lost());
            change();
            let is_there = terms.path.exists();
            match drops {
                true => drop(guard),
                false => guard.release().unwrap(),
            }
            assert!(matches!(lost.reason(), Some(LossReason::Released)));
            assert_eq!(terms.path.exists(), is_there, "a deleted file is left deleted");
            let next = lease.try_lock().unwrap();
            assert!(next.token() > token && next.recovered().is_none());
            next.release().unwrap();
        }
    }
}

#[test]
fn takeover_is_reported_once_within_two_seconds() {
    let (_directory, mut terms) = place();
    (terms.ttl, terms.heartbeat) = (3000, 250);
    let stranger = of_a_stranger(&terms);
    let mut holder = Actor::start_lease(&terms);
    take(&mut holder, "try");
    holder.tell("wait-lost");
    holder.expect_silence();
    write(&terms, &stranger);
    let start = Instant::now();
    let by = line(&stranger, "pid");
    assert_eq!(holder.answer(), format!("lost taken over by {by}"));
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    holder.expect("is-held", &format!("no: taken over by {by}"));
    holder.expect("remaining", "remaining 0");
    let once = format!("losses (taken over by {by} on lockkit-lost)");
    until("it is told", || holder.ask("losses") == once);
    assert!(holder.ask("release").starts_with("error LeaseLost"));
    holder.expect("losses", &once);
    assert_eq!(read(&terms), stranger);
}

#[cfg(target_os = "linux")]
#[test]
fn holder_stopped_longer_than_ttl_finds_lease_lost_at_once() {
    for taken_over in [false, true] {
        let (_directory, terms) = place();
        let [mut holder, mut next] = [(); 2].map(|()| Actor::start_lease(&terms));
        let old = take(&mut holder, "try");
        stop(&holder, &terms);
        if taken_over {
            let new = token_after(&next.ask("lock"), holder.pid());
            assert!(new > old, "whoever compares tokens refuses a late write");
        } else {
            let start = Instant::now();
            until("its time is over", || start.elapsed() > Duration::from_millis(terms.ttl));
        }
        // The question arrives before the holder runs again.
        holder.tell("is-held");
        holder.tell("losses");
        holder.signal(Signal::CONT);
        let answer = holder.answer();
        // If the heartbeat comes first, the reason may name the new holder.
        assert!(answer.starts_with("no: "), "{answer}");
        let first = holder.answer();
        until("it is told", || holder.ask("losses") == "losses (expired on lockkit-lost)");
        assert!(["losses", "losses (expired on lockkit-lost)"].contains(&&*first), "{first}");
        assert!(holder.ask("release").starts_with("error LeaseLost"));
        match taken_over {
            true => next.expect("is-held", "yes"),
            // The loser lives. So the next process observes the silent record for a TTL first, unless the loser has
            // released it.
            false => assert!(next.ask("lock").starts_with("held ")),
        }
        next.expect("release", "released");
        assert!(take(&mut holder, "lock") > old);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn holder_stopped_shorter_than_ttl_keeps_lease() {
    let (_directory, mut terms) = place();
    terms.ttl = LIVELY.as_millis() as u64;
    let [mut holder, mut next] = [(); 2].map(|()| Actor::start_lease(&terms));
    take(&mut holder, "try");
    next.tell_to_wait("lock");
    for _ in 0..5 {
        stop(&holder, &terms);
        holder.signal(Signal::CONT);
        wait_for_beats(&terms);
        holder.expect("is-held", "yes");
    }
    next.expect_silence();
    holder.expect("release", "released");
    token(&next.answer());
}

#[test]
fn stopped_holder_never_overlaps_next_holder() {
    let (_directory, mut terms) = place();
    (terms.ttl, terms.heartbeat) = (100, 25);
    let seconds = std::env::var("LOCKKIT_CHAOS_SECONDS").map_or(10, |text| text.parse().expect("whole seconds"));
    let tally = leases::run(&terms, Duration::from_secs(seconds));
    println!("{tally:?}");
    // Under Wine the start of a process takes so long that all counts are lower.
    let is_chaos = match is_wine() {
        true => tally.holds > 2 && tally.kills > 1,
        false => tally.holds > 20 && tally.kills > 10 && tally.losses > 3,
    };
    assert!(is_chaos, "it was no chaos: {tally:?}");
}

#[test]
fn acquire_ignores_times_in_record_and_of_file() {
    // The records show a step of the wall clock in both directions, and another host's wrong clock.
    for step in [-1, 1] {
        let (_directory, terms) = place();
        let at = |now: SystemTime| if step < 0 { now - HOUR } else { now + HOUR };
        let moment = at(SystemTime::now()).duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let acquired = format!("{}.000000000 (then)", moment.as_secs());

        // A live holder keeps it.
        let mut holder = Actor::start_lease(&terms);
        let first = take(&mut holder, "try");
        // This write may revert a heartbeat between its read and its write. The next heartbeat makes up for it.
        write(&terms, forge(&read(&terms), &[("acquired", &acquired)]));
        set_age(&terms.path, at(SystemTime::now()));
        assert!(terms.open().try_lock().unwrap_err().is_held());
        wait_for_beats(&terms);
        holder.expect("is-held", "yes");
        holder.expect("losses", "losses");
        holder.expect("release", "released");
        assert!(take(&mut holder, "try") > first);
        holder.expect("release", "released");

        // The wait for a holder of unknown liveness lasts for a TTL and no longer.
        write(&terms, forge(&of_a_stranger(&terms), &[("acquired", &acquired)]));
        set_age(&terms.path, at(SystemTime::now()));
        let start = Instant::now();
        let lease = terms.open();
        assert!(lease.try_lock().unwrap_err().is_held());
        let guard = lease.lock_for(LIVELY).unwrap();
        assert!(start.elapsed() >= Duration::from_millis(terms.ttl), "{:?}", start.elapsed());
        assert_eq!(guard.recovered().unwrap().owner().unwrap().host(), Some("elsewhere"));
        drop(guard);

        // A dead holder is taken over immediately.
        write(&terms, forge(&left_by_the_dead(&terms), &[("acquired", &acquired)]));
        set_age(&terms.path, at(SystemTime::now()));
        assert!(terms.open().try_lock().unwrap().recovered().is_some());
    }
}

/// Returns the library of faketime(1), which shows a program a wall clock of its own.
fn faketime() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let program =
        std::env::split_paths(&path).map(|directory| directory.join("faketime")).find(|path| path.is_file())?;
    let lib = program.parent()?.parent()?.join("lib");
    let directories = fs::read_dir(&lib).ok()?.filter_map(|entry| Some(entry.ok()?.path())).chain([lib]);
    directories.map(|directory| directory.join("faketime/libfaketime.so.1")).find(|path| path.is_file())
}

#[test]
fn wall_clock_step_by_an_hour_keeps_lease() {
    if cfg!(target_env = "musl") {
        lockkit_tests::left_out("a program that is linked statically reads no preloaded clock");
        return;
    }
    let Some(library) = faketime() else {
        return lockkit_tests::left_out("faketime is not here; what a step leaves in files has a test of its own");
    };
    let (directory, terms) = place();
    let clock = directory.path().join("clock");
    let set = |offset: &str| {
        // The file must be complete at every moment, because each clock query reads it.
        fs::write(clock.with_extension("new"), offset).unwrap();
        fs::rename(clock.with_extension("new"), &clock).unwrap();
    };
    let start = || {
        Actor::start_lease_with(&terms, |command| {
            command.env("LD_PRELOAD", &library).env("FAKETIME_TIMESTAMP_FILE", &clock);
            command.env("FAKETIME_NO_CACHE", "1").env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        })
    };
    for step in ["+3600s", "-3600s"] {
        set("+0s");
        let [mut holder, mut waiter] = [(); 2].map(|()| start());
        let first = take(&mut holder, "lock");
        waiter.tell_to_wait("lock");
        set(step);
        let begun = Instant::now();
        until("twice its ttl is over", || {
            holder.expect("is-held", "yes");
            begun.elapsed() > Duration::from_millis(2 * terms.ttl)
        });
        waiter.expect_silence();
        holder.expect("losses", "losses");
        holder.expect("release", "released");
        assert!(token(&waiter.answer()) > first);
        let acquired = line(&read(&terms), "acquired");
        let acquired: i64 = acquired.split('.').next().unwrap().parse().unwrap();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs() as i64;
        assert!((3500..3700).contains(&(acquired - now).abs()), "its clock was not stepped");
        waiter.kill();
        assert!(token_after(&holder.ask("try"), waiter.pid()) > first);
        holder.expect("release", "released");
        holder.kill();
        // The library shares a file with the programs that the process starts. A killed process leaves it behind.
        for pid in [holder.pid(), waiter.pid()] {
            let _ = fs::remove_file(format!("/dev/shm/faketime_shm_{pid}"));
            let _ = fs::remove_file(format!("/dev/shm/sem.faketime_sem_{pid}"));
        }
    }
}

/// Starts an actor through `unshare`(1) with these arguments, after the shell commands `first`.
fn apart(terms: &Terms, arguments: &[&str], first: &str) -> Option<Actor> {
    let command = |program: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(arguments).args(["sh", "-ec", &format!("{first}\nexec \"$@\""), "sh"]).args(program);
        command
    };
    if !succeeds(&mut command(&["true"])) {
        lockkit_tests::left_out("this machine does not let the test make what seems another one");
        return None;
    }
    Some(Actor::start_lease_with(terms, |actor| {
        let program = actor.get_program().to_str().unwrap().to_owned();
        *actor = command(&[&program, "lease", &terms.to_string()]);
        actor.stdin(Stdio::piped()).stdout(Stdio::piped());
    }))
}

/// Starts an actor on another host, as far as this system can simulate one: another name and boot id, and a clock since
/// the start of the system that is an hour ahead.
fn on_another_host(terms: &Terms) -> Option<Actor> {
    let boot = terms.path.with_file_name("boot_id");
    fs::write(&boot, "01234567-89ab-cdef-0123-456789abcdef\n").unwrap();
    let clock = fs::read_link("/proc/self/ns/time").ok()?;
    let first = format!(
        "echo elsewhere > /proc/sys/kernel/hostname
        mount --bind {} /proc/sys/kernel/random/boot_id
        [ $(readlink /proc/self/ns/time) != '{}' ]",
        boot.display(),
        clock.display()
    );
    apart(terms, &["-m", "-u", "-T", "--boottime", "3600", "--monotonic", "3600"], &first)
}

/// Starts an actor in another pid namespace, as in a container of its own.
fn in_a_container(terms: &Terms) -> Option<Actor> {
    apart(terms, &["--pid", "--fork", "--kill-child", "--mount-proc"], "")
}

#[test]
fn takeover_between_hosts_with_skewed_clocks_waits_ttl() {
    wait_for_each_others_ttl(on_another_host, |stranger| {
        assert!(line(stranger, "host").starts_with("elsewhere"));
        assert_eq!(line(stranger, "boot"), "0123456789abcdef0123456789abcdef");
    });
}

#[test]
fn takeover_between_containers_waits_ttl() {
    wait_for_each_others_ttl(in_a_container, |stranger| assert_eq!(line(stranger, "pid"), "1"));
}

/// Tests two actors that cannot determine each other's liveness: an ordinary actor, and an actor from `start`, whose
/// record `is_strange` checks.
fn wait_for_each_others_ttl(start: fn(&Terms) -> Option<Actor>, is_strange: fn(&[u8])) {
    for stranger_holds in [true, false] {
        let (_directory, terms) = place();
        let Some(stranger) = start(&terms) else { return };
        let here = Actor::start_lease(&terms);
        let (mut holder, mut other) = if stranger_holds { (stranger, here) } else { (here, stranger) };
        let first = take(&mut holder, "try");
        if stranger_holds {
            is_strange(&read(&terms));
        }
        // The holder keeps the lease as long as its heartbeat runs.
        let answer = other.ask(&format!("lock-for {}", 2 * terms.ttl));
        assert!(answer.starts_with("error Timeout"), "{answer}");
        holder.expect("is-held", "yes");
        other.tell("lock");
        other.expect_silence();
        holder.expect("release", "released");
        let second = token(&other.answer());
        assert!(second > first);
        other.expect("release", "released");
        let third = take(&mut holder, "lock");
        assert!(third > second);
        let died = line(&read(&terms), "pid").parse().unwrap();
        // The death is not visible there. So the other actor waits until the TTL of the dead holder has passed.
        let asked = Instant::now();
        let left = remaining(&mut holder);
        holder.kill();
        assert!(is_held(&other.ask("try")));
        let fourth = token_after(&other.ask("lock"), died);
        assert!(asked.elapsed() >= left, "{:?} of {left:?}", asked.elapsed());
        assert!(fourth > third);
    }
}

#[test]
fn damaged_or_deleted_record_repaired_by_live_holder() {
    if wine_cannot_judge("a file that is open cannot be replaced there") {
        return;
    }
    let (_directory, terms) = place();
    let mut holder = Actor::start_lease(&terms);
    let first = take(&mut holder, "try");
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
        wait_for_beats(&terms);
        let before = beat(&terms);
        change();
        until("it is mended and beats on", || beat(&terms) > before + 2);
        assert_eq!(line(&read(&terms), "token").parse(), Ok(first));
        assert!(terms.open().try_lock().unwrap_err().is_held());
        holder.expect("is-held", "yes");
    }
    holder.expect("losses", "losses");
    holder.expect("release", "released");
    assert!(take(&mut holder, "try") > first);
}

#[test]
fn wait_for_damaged_record_of_live_holder_continues() {
    if wine_cannot_judge("a file that is open cannot be replaced there") {
        return;
    }
    let (_directory, terms) = place();
    let [mut holder, mut waiter] = [(); 2].map(|()| Actor::start_lease(&terms));
    let first = take(&mut holder, "try");
    let spoils: [&dyn Fn(); 3] = [&|| write(&terms, ""), &|| write(&terms, "lock"), &|| replace(&terms, "lock")];
    for spoil in spoils {
        waiter.tell_to_wait("lock");
        spoil();
        wait_for_beats(&terms);
        waiter.expect_silence();
        holder.expect("is-held", "yes");
        holder.expect("release", "released");
        assert!(token(&waiter.answer()) > first);
        waiter.expect("release", "released");
        take(&mut holder, "lock");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn lease_file_deleted_goes_to_waiter_with_greater_token() {
    let (_directory, terms) = place();
    let [mut holder, mut waiter] = [(); 2].map(|()| Actor::start_lease(&terms));
    let first = take(&mut holder, "try");
    waiter.tell_to_wait("lock");
    // The holder is stopped, so that it cannot be first.
    stop(&holder, &terms);
    fs::remove_file(&terms.path).unwrap();
    let second = token(&waiter.answer());
    assert!(second > first);
    holder.signal(Signal::CONT);
    let answer = holder.ask("wait-lost");
    // On a slow machine the stop may last longer than its TTL.
    assert!([format!("lost taken over by {}", waiter.pid()), "lost expired".into()].contains(&answer), "{answer}");
    waiter.expect("is-held", "yes");
    waiter.expect("release", "released");
    assert!(take(&mut holder, "lock") > second);
}

#[test]
fn later_record_version_kept_by_holder_and_waiter() {
    if wine_cannot_judge("a file that is open cannot be replaced there") {
        return;
    }
    let (_directory, terms) = place();
    let newer = "lockkit lease 2\nflavour sour\n";
    let [mut holder, mut waiter] = [(); 2].map(|()| Actor::start_lease(&terms));
    take(&mut holder, "try");
    waiter.tell_to_wait("lock");
    replace(&terms, newer);
    assert!(waiter.answer().starts_with("error LayoutMismatch"));
    holder.expect("wait-lost", "lost taken over");
    for command in ["try", "lock", "lock-for 100"] {
        assert!(waiter.ask(command).starts_with("error LayoutMismatch"));
    }
    for error in [terms.open().status().unwrap_err(), terms.open().owner().unwrap_err()] {
        assert!(matches!(error.kind(), ErrorKind::LayoutMismatch { .. }), "{error}");
    }
    assert!(holder.ask("release").starts_with("error LeaseLost"));
    assert_eq!(read(&terms), newer.as_bytes());
}

#[test]
fn waiter_of_replaced_record_waits_for_new_holder() {
    if wine_cannot_judge("a file that is open cannot be replaced there") {
        return;
    }
    let (_directory, terms) = place();
    let stranger = of_a_stranger(&terms);
    let [mut holder, mut waiter] = [(); 2].map(|()| Actor::start_lease(&terms));
    take(&mut holder, "try");
    waiter.tell_to_wait("lock");
    let start = Instant::now();
    replace(&terms, &stranger);
    let by: u32 = line(&stranger, "pid").parse().unwrap();
    holder.expect("wait-lost", &format!("lost taken over by {by}"));
    token_after(&waiter.answer(), by);
    assert!(start.elapsed() >= Duration::from_millis(terms.ttl));
}

#[test]
fn takeover_waits_for_ttl_in_record_not_own_ttl() {
    let (_directory, terms) = place();
    write(&terms, of_a_stranger(&terms));
    let hasty = Terms { ttl: 60, heartbeat: 20, ..terms.clone() }.open();
    let start = Instant::now();
    drop(hasty.lock_for(LIVELY).unwrap());
    assert!(start.elapsed() >= Duration::from_millis(terms.ttl), "{:?}", start.elapsed());
}

#[test]
fn try_once_processes_take_over_silent_holder_after_ttl() {
    if SystemClock.shared_id().is_none() {
        let why = "boots are not told apart here, so no program can use what another one has noted by its clock";
        return lockkit_tests::left_out(why);
    }
    let (_directory, terms) = place();
    let stranger = of_a_stranger(&terms);
    write(&terms, &stranger);
    let (start, mut refused) = (Instant::now(), 0);
    until("one gets in", || {
        let answer = Actor::start_lease(&terms).ask("try");
        let gets_in = answer.starts_with("held ");
        if gets_in {
            token_after(&answer, line(&stranger, "pid").parse().unwrap());
        } else {
            assert!(is_held(&answer), "{answer}");
            refused += 1;
        }
        gets_in
    });
    assert!(start.elapsed() >= Duration::from_millis(terms.ttl) && refused > 1, "{:?}", start.elapsed());
}

#[test]
fn evict_removes_only_holder_of_snapshot() {
    let (_directory, terms) = place();
    let lease = terms.open();
    let mut holder = Actor::start_lease(&terms);
    let first = take(&mut holder, "try");
    let LeaseStatus::Held(seen) = lease.status().unwrap() else { panic!("it is held") };
    assert_eq!((seen.token(), seen.owner().unwrap().pid()), (Some(first), holder.pid()));
    holder.expect("release", "released");
    assert!(!lease.evict(&seen).unwrap(), "nobody holds it");
    take(&mut holder, "try");
    assert!(!lease.evict(&seen).unwrap(), "it is another one's");
    let LeaseStatus::Held(seen) = lease.status().unwrap() else { panic!("it is held") };
    wait_for_beats(&terms);
    assert!(lease.evict(&seen).unwrap(), "beats do not make it another one");
    let answer = holder.ask("wait-lost");
    assert_eq!(answer, "lost taken over");
    holder.expect("is-held", "no: taken over");
    until("it is told", || holder.ask("losses") == "losses (taken over on lockkit-lost)");
    assert!(lease.try_lock().unwrap().token() > first);
    // An eviction frees a damaged lease without a wait.
    write(&terms, "lock");
    let LeaseStatus::Held(seen) = lease.status().unwrap() else { panic!("it counts as held") };
    assert!(lease.try_lock().unwrap_err().is_held());
    write(&terms, "lockkit");
    assert!(!lease.evict(&seen).unwrap());
    let LeaseStatus::Held(seen) = lease.status().unwrap() else { panic!("it counts as held") };
    assert!(lease.evict(&seen).unwrap());
    assert!(lease.try_lock().unwrap().token() > first);
}

/// A small file system in memory, removed at the end.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn mount(options: &str) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        if succeeds(mount.args(["-t", "tmpfs", "-o", options, "lockkit-test"]).arg(directory.path())) {
            return Some(Self(directory));
        }
        lockkit_tests::left_out("this machine does not let the test mount a small file system");
        None
    }

    fn terms(&self) -> Terms {
        Terms::of(self.0.path().join("lease"))
    }

    fn filler(&self) -> PathBuf {
        self.0.path().join("filler")
    }

    /// Fills it completely.
    fn fill(&self) {
        let error = fs::write(self.filler(), vec![0; 1 << 20]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    }

    fn make_room(&self) {
        fs::remove_file(self.filler()).unwrap();
    }

    /// Remounts it read-only or writable. No process may be writing at that moment.
    fn remount(&self, how: &str) {
        let mut mount = Command::new("mount");
        mount.arg("-o").arg(format!("remount,{how}")).arg(self.0.path());
        until("it is mounted anew", || succeeds(&mut mount));
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        assert!(succeeds(Command::new("umount").arg("-l").arg(self.0.path())));
    }
}

#[test]
fn full_disk_leaves_no_partial_file_and_keeps_held_lease() {
    let Some(disk) = SmallDisk::mount("size=64k") else { return };
    let terms = disk.terms();
    disk.fill();
    for _ in 0..2 {
        let error = terms.open().try_lock().unwrap_err();
        assert_eq!(std::io::Error::from(error).kind(), std::io::ErrorKind::StorageFull);
        assert_eq!(disk.0.path().read_dir().unwrap().count(), 1, "only what fills it");
    }
    // The retries do not delay a waiter's deadline.
    let lease = terms.builder().acquire_retry_limit(u32::MAX).build().unwrap();
    let error = lease.lock_for(Duration::from_millis(200)).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Io { .. }), "{error}");
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| lease.lock_for(LIVELY));
        disk.make_room();
        drop(waiter.join().unwrap().unwrap());
    });
    let mut holder = Actor::start_lease(&terms);
    take(&mut holder, "try");
    disk.fill();
    let (start, from) = (Instant::now(), beat(&terms));
    until("twice its ttl is over", || {
        holder.expect("is-held", "yes");
        start.elapsed() > Duration::from_millis(2 * terms.ttl)
    });
    assert!(beat(&terms) > from);
    holder.expect("release", "released");
    take(&mut holder, "try");
}

#[test]
fn acquire_without_free_inode_reports_storage_full() {
    let Some(disk) = SmallDisk::mount("size=64k,nr_inodes=1") else { return };
    let error = disk.terms().open().try_lock().unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Io { action: "create", .. }), "{error}");
    assert_eq!(std::io::Error::from(error).kind(), std::io::ErrorKind::StorageFull);
}

/// Runs `harm`, after which a holder cannot renew; `heal` undoes it. The holder must keep its lease until its deadline.
/// If it heals before, the holder continues. Otherwise it loses the lease then, for a reason that contains `because`.
fn is_kept_to_its_deadline(terms: &Terms, harm: impl Fn(&Actor), heal: impl Fn(), because: &str) {
    for heals in [true, false] {
        let mut holder = Actor::start_lease(&Terms { ttl: if heals { 10_000 } else { terms.ttl }, ..terms.clone() });
        take(&mut holder, "try");
        harm(&holder);
        let asked = Instant::now();
        let left = remaining(&mut holder);
        if heals {
            until("some beats are missing", || asked.elapsed() > Duration::from_millis(5 * terms.heartbeat));
            holder.expect("is-held", "yes");
            heal();
            until("its time was prolonged", || {
                let now = asked.elapsed();
                // The gain must exceed that of a heartbeat that was in progress at the time of the harm.
                now + remaining(&mut holder) > left + Duration::from_millis(3 * terms.heartbeat)
            });
            holder.expect("losses", "losses");
            holder.expect("release", "released");
        } else {
            holder.tell("wait-lost");
            let answer = holder.answer();
            assert!(asked.elapsed() >= left, "{:?} of {left:?}: {answer}", asked.elapsed());
            let answer = answer.strip_prefix("lost it could not be renewed in time: ").expect(&answer);
            assert!(answer.contains(because), "{answer}");
            until("it is told", || holder.ask("losses").matches(because).count() == 1);
            heal();
        }
    }
}

#[test]
fn renew_deleted_record_on_full_disk_retries_until_deadline() {
    let Some(disk) = SmallDisk::mount("size=64k") else { return };
    let aside = disk.0.path().join("aside");
    is_kept_to_its_deadline(
        &disk.terms(),
        |_| {
            disk.fill();
            // The file still occupies its space there.
            fs::rename(disk.terms().path, &aside).unwrap();
        },
        || {
            disk.make_room();
            fs::remove_file(&aside).unwrap();
        },
        "No space left",
    );
}

#[test]
fn renew_on_read_only_file_system_retries_until_deadline() {
    let Some(disk) = SmallDisk::mount("size=64k") else { return };
    is_kept_to_its_deadline(
        &disk.terms(),
        |_| {
            disk.remount("ro");
            let error = disk.terms().open().try_lock().unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Io { action: "open", .. }), "{error}");
            assert_eq!(std::io::Error::from(error).kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        },
        || disk.remount("rw"),
        "Read-only file system",
    );
}

/// Makes system calls of a process fail until it is dropped, by strace(1) on all its threads.
#[cfg(target_os = "linux")]
struct Fault {
    strace: Child,
    victim: u32,
}

#[cfg(target_os = "linux")]
impl Fault {
    fn at(victim: u32, what: &[&str]) -> Self {
        let calls: Vec<&str> = what.iter().map(|what| what.split_once(':').unwrap().0).collect();
        let mut strace = Command::new("strace");
        strace.args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={}", calls.join(","))]);
        strace.args(what.iter().flat_map(|what| ["-e".to_owned(), format!("inject={what}")]));
        let strace = strace.arg("-p").arg(victim.to_string()).spawn().unwrap();
        let fault = Self { strace, victim };
        until("every thread is traced", || fault.tracers().all(|traced| traced));
        fault
    }

    fn tracers(&self) -> impl Iterator<Item = bool> {
        let threads = fs::read_dir(format!("/proc/{}/task", self.victim)).unwrap();
        threads
            .filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("status")).ok())
            .map(|status| line(status.replace('\t', " ").as_bytes(), "TracerPid:") != "0")
    }
}

#[cfg(target_os = "linux")]
impl Drop for Fault {
    fn drop(&mut self) {
        lockkit_tests::helper_process::signal_pid(self.strace.id(), Signal::TERM);
        self.strace.wait().unwrap();
    }
}

/// Returns whether strace(1) is installed and may trace. Reports a test as left out where it may not.
#[cfg(target_os = "linux")]
fn faults_can_be_made() -> bool {
    let can = succeeds(Command::new("strace").args(["-f", "-qq", "-o", "/dev/null", "true"]));
    if !can {
        lockkit_tests::left_out("strace is not here, or may not trace");
    }
    can
}

#[cfg(target_os = "linux")]
#[test]
fn renew_with_io_errors_retries_until_deadline() {
    if !faults_can_be_made() {
        return;
    }
    std::thread::scope(|scope| {
        for (fault, because) in [
            // The text is the error number, because each C library has error texts of its own.
            ("pread64:error=EIO", "(os error 5)"),
            ("pwrite64:error=EDQUOT", "(os error 122)"),
            ("?open,openat:error=EMFILE", "(os error 24)"),
            ("flock:error=ENOLCK", "(os error 37)"),
        ] {
            scope.spawn(move || {
                let (_directory, terms) = place();
                let broken = std::cell::Cell::new(None);
                let harm = |holder: &Actor| broken.set(Some(Fault::at(holder.pid(), &[fault])));
                is_kept_to_its_deadline(&terms, harm, || drop(broken.take()), because);
            });
        }
    });
}

#[cfg(target_os = "linux")]
#[test]
fn lease_waiter_without_inotify_polls() {
    if !faults_can_be_made() {
        return;
    }
    let (_directory, terms) = place();
    let [mut holder, mut waiter] = [(); 2].map(|()| Actor::start_lease(&terms));
    take(&mut waiter, "try");
    waiter.expect("release", "released");
    take(&mut holder, "try");
    let _fault = Fault::at(waiter.pid(), &["inotify_init1:error=EMFILE"]);
    waiter.tell_to_wait("lock");
    assert_eq!(watches(waiter.pid()), 0);
    holder.expect("release", "released");
    token(&waiter.answer());
}

#[test]
fn lease_crash_at_any_step_does_not_block_next_holder() {
    /// The preparation before the steps.
    type Prepare<'a> = &'a dyn Fn(&mut Actor, &Terms);

    if !lockkit_tests::failpoint::are_enabled() {
        return;
    }
    let (_directory, elsewhere) = place();
    let dead = left_by_the_dead(&elsewhere);
    let cases: [(&str, Prepare<'_>); 4] = [
        ("the record of the dead", &|_, terms| {
            fs::create_dir_all(terms.path.parent().unwrap()).unwrap();
            write(terms, &dead);
        }),
        ("a directory that is not there", &|_, _| {}),
        ("beats", &|victim, _| _ = take(victim, "try")),
        ("a beat after a deletion", &|victim, terms| {
            take(victim, "try");
            fs::remove_file(&terms.path).unwrap();
        }),
    ];
    for (case, prepare) in cases {
        for step in 1.. {
            let directory = tempfile::tempdir().unwrap();
            let terms = Terms { heartbeat: 10, ..Terms::of(directory.path().join("a/b/lease")) };
            let mut victim = Actor::start_lease(&terms);
            prepare(&mut victim, &terms);
            let beats = case.contains("beat");
            // A heartbeat may reach the step before the actor has answered.
            let armed = victim.ask(&format!("kill-at {step}"));
            assert!(armed == "armed" || (beats && armed == "gone"), "{armed}");
            let answer = victim.ask(if beats { "wait-lost" } else { "try" });
            victim.kill();
            let mut next = Actor::start_lease(&terms);
            // Where a record is created in place, an empty record of a dead process counts as held for some seconds.
            let patience = if cfg!(target_os = "linux") { "lock-for 5000" } else { "lock-for 20000" };
            let followed = next.ask(patience);
            assert!(followed.starts_with("held "), "{case}, killed at step {step}: {followed}");
            next.expect("release", "released");
            take(&mut next, "try");
            assert_eq!(terms.path.parent().unwrap().read_dir().unwrap().count(), 1, "{case}: litter after {step}");
            // Heartbeats continue until the step comes.
            if answer != "gone" || (beats && step == 8) {
                assert!(step > 2, "{case}: only {step} steps");
                break;
            }
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn create_race_without_linkat_has_one_winner() {
    if !faults_can_be_made() {
        return;
    }
    // This is the case on NFS, and without a /proc through which to link them.
    let (directory, terms) = place();
    let mut contenders: Vec<Actor> = (0..6).map(|_| Actor::start_lease(&terms)).collect();
    // The heartbeat threads start before the trace.
    for contender in &mut contenders {
        take(contender, "lock");
        contender.expect("release", "released");
    }
    // Some contenders are slower than others between the creation and the lock of the file.
    let faults = contenders
        .iter()
        .zip(0..)
        .map(|(actor, at)| Fault::at(actor.pid(), &["linkat:error=EPERM", &format!("flock:delay_enter={}", 500 * at)]));
    let _faults: Vec<Fault> = faults.collect();
    for round in 0..200 {
        fs::remove_file(&terms.path).unwrap();
        contenders.iter_mut().for_each(|contender| contender.tell("try"));
        let answers: Vec<String> = contenders.iter_mut().map(Actor::answer).collect();
        let winners: Vec<usize> = (0..contenders.len()).filter(|at| answers[*at].starts_with("held ")).collect();
        assert_eq!(winners.len(), 1, "round {round}: {answers:?}");
        assert_eq!(answers.iter().filter(|answer| is_held(answer)).count(), 5, "round {round}: {answers:?}");
        contenders[winners[0]].expect("release", "released");
    }
    assert_eq!(directory.path().read_dir().unwrap().count(), 1, "nothing is left but the record");
}

#[cfg(target_os = "linux")]
#[test]
fn failed_record_write_without_tmpfile_leaves_no_file() {
    if !faults_can_be_made() {
        return;
    }
    let (directory, terms) = place();
    let mut actor = Actor::start_lease(&terms);
    // The heartbeat thread starts before the trace.
    take(&mut actor, "try");
    actor.expect("release", "released");
    fs::remove_file(&terms.path).unwrap();
    let fault = Fault::at(actor.pid(), &["linkat:error=EPERM", "pwrite64:error=ENOSPC:when=2+2"]);
    for command in ["try", "lock"] {
        let answer = actor.ask(command);
        assert!(answer.starts_with("error Io: cannot write") && answer.contains("No space left"), "{answer}");
        assert_eq!(directory.path().read_dir().unwrap().count(), 0);
    }
    drop(fault);
    take(&mut actor, "try");
}

#[cfg(target_os = "linux")]
#[test]
fn acquire_without_heartbeat_thread_fails_and_holds_nothing() {
    let Some(user) = another_user() else { return };
    let (directory, terms) = place();
    chown(directory.path(), Some(user.uid), None).unwrap();
    let mut poor = Actor::start_lease_as(&terms, user.uid);
    poor.expect("limit-threads 1", "limited");
    for command in ["try", "lock", "lock-for 1000"] {
        let answer = poor.ask(command);
        let said = format!("error Io: cannot start the heartbeat thread for {}", terms.path.display());
        assert!(answer.starts_with(&said) && answer.contains("Resource temporarily unavailable"), "{answer}");
        assert_eq!(directory.path().read_dir().unwrap().count(), 0, "the store was not touched");
    }
    poor.expect("limit-threads all", "limited");
    take(&mut poor, "try");
    wait_for_beats(&terms);
    poor.expect("release", "released");
}

#[cfg(target_os = "linux")]
#[test]
fn on_lost_without_own_thread_is_called_once_by_heartbeat() {
    let Some(user) = another_user() else { return };
    let (directory, terms) = place();
    chown(directory.path(), Some(user.uid), None).unwrap();
    let stranger = of_a_stranger(&terms);
    let mut holder = Actor::start_lease_as(&terms, user.uid);
    take(&mut holder, "try");
    holder.expect("limit-threads 2", "limited");
    write(&terms, &stranger);
    let by = line(&stranger, "pid");
    holder.expect("wait-lost", &format!("lost taken over by {by}"));
    let once = format!("losses (taken over by {by} on lockkit-lease)");
    until("it is told", || holder.ask("losses") == once);
    // The heartbeat continues.
    assert!(holder.ask("lock").starts_with("held "));
    wait_for_beats(&terms);
    holder.expect("losses", &once);
}

#[test]
fn panic_in_on_lost_does_not_stop_heartbeat() {
    let (_directory, mut terms) = place();
    terms.panics = true;
    let mut holder = Actor::start_lease(&terms);
    for loss in 1..=2 {
        write(&terms, of_a_stranger(&terms));
        // The record belongs to a stranger, so the actor waits for its expiry.
        assert!(holder.ask("lock").starts_with("held "));
        wait_for_beats(&terms);
        write(&terms, of_a_stranger(&terms));
        assert!(holder.ask("wait-lost").starts_with("lost taken over"));
        until("it is told", || holder.ask("losses").matches("on lockkit-lost").count() == loss);
    }
    assert!(holder.ask("lock").starts_with("held "));
    wait_for_beats(&terms);
    holder.expect("release", "released");
}

#[test]
fn drop_during_heartbeat_leaves_record_free() {
    if wine_cannot_judge("each step of a lease takes milliseconds there, and it counts them") {
        return;
    }
    let (_directory, terms) = place();
    let lease = terms.builder().ttl(LIVELY).heartbeat(Duration::from_millis(1)).build().unwrap();
    let mut last = 0;
    for round in 0..500 {
        let guard = lease.try_lock().expect("no beat brought it back");
        assert!(guard.token() > last && guard.recovered().is_none());
        last = guard.token();
        // Heartbeats come every millisecond, so the drop comes at another moment each time.
        std::thread::sleep(Duration::from_micros(round * 7 % 3000));
        drop(guard);
        assert_eq!(lease.status().unwrap(), LeaseStatus::Free);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn forked_child_does_not_inherit_lease() {
    let (directory, terms) = place();
    let mut parent = Actor::start_lease(&terms);
    let first = take(&mut parent, "try");
    parent.expect(&format!("fork {}", directory.path().join("other").display()), "parted");
    wait_for_beats(&terms);
    parent.expect("is-held", "yes");
    parent.expect("losses", "losses");
    assert!(terms.open().try_lock().unwrap_err().is_held());
    parent.expect("release", "released");
    assert!(take(&mut parent, "try") > first);
}

#[test]
fn drop_or_kill_with_thousand_leases_frees_all() {
    if wine_cannot_judge("each step of a lease takes milliseconds there, and it counts them") {
        return;
    }
    // The lease is in memory, because each new record is synced.
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut terms = Terms::of(directory.path().join("lease"));
    // A slow machine needs more than a moment for a thousand leases.
    (terms.ttl, terms.heartbeat) = (10_000, 1000);
    let mut holder = Actor::start_lease(&terms);
    take(&mut holder, "try");
    holder.expect("release", "released");
    let before = Belongings::of(holder.pid());
    let leases: Vec<Lease> =
        (0..1000).map(|n| Terms { path: directory.path().join(n.to_string()), ..terms.clone() }.open()).collect();
    let hold = format!("hold-many 1000 {}", directory.path().display());
    holder.expect(&hold, "holds 1000");
    // A heartbeat has the file open for as long as it lasts.
    until("there is one thread for all, and no descriptor", || Belongings::of(holder.pid()) == before);
    assert!(leases.iter().all(|lease| lease.try_lock().is_err_and(|error| error.is_held())));
    holder.expect("drop-many", "dropped");
    assert!(leases.iter().all(|lease| lease.try_lock().unwrap().recovered().is_none()));
    holder.expect("losses", "losses");
    holder.expect(&hold, "holds 1000");
    holder.kill();
    assert!(leases.iter().all(|lease| lease.try_lock().unwrap().recovered().is_some()));
}

#[test]
fn lease_lost_without_progress_and_kept_with_progress() {
    if wine_cannot_judge("each step of a lease takes milliseconds there, so that a waiter may keep a beat out") {
        return;
    }
    let (_directory, mut terms) = place();
    terms.progress = 500;
    let [mut worker, mut next] = [(); 2].map(|()| Actor::start_lease(&terms));
    let first = take(&mut worker, "try");
    next.tell_to_wait("lock");
    let start = Instant::now();
    until("it has worked for long", || {
        worker.expect("progress", "noted");
        worker.expect("is-held", "yes");
        start.elapsed() > Duration::from_millis(3 * terms.ttl)
    });
    next.expect_silence();
    // From here on it hangs, though its process lives.
    assert!(token_after(&next.answer(), worker.pid()) > first);
    worker.expect("progress", "noted");
    worker.expect("is-held", "no: expired");
    until("it is told", || worker.ask("losses") == "losses (expired on lockkit-lost)");
}

#[test]
fn acquire_retries_follow_limit_and_delay() {
    if wine_cannot_judge("each step of a lease takes milliseconds there, and it counts them") {
        return;
    }
    let (directory, terms) = place();
    let pause = Duration::from_millis(20);
    // A file in the place of its directory is a permanent error, which is reported immediately.
    fs::write(directory.path().join("file"), "").unwrap();
    let misplaced = Lease::file(directory.path().join("file/lease")).acquire_retry_limit(u32::MAX).build().unwrap();
    let error = misplaced.lock().unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Io { .. }), "{error}");
    let Some(disk) = SmallDisk::mount("size=64k") else { return };
    disk.fill();
    for limit in [0, 1, 10] {
        let lease =
            Lease::file(disk.terms().path).acquire_retry_limit(limit).acquire_retry_delay(pause).build().unwrap();
        for wait in [Wait::none(), Wait::forever(), Wait::at_most(LIVELY)] {
            let start = Instant::now();
            let error = lease.acquire(&wait).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Io { .. }), "{error}");
            assert!(start.elapsed() >= pause * limit, "{:?}", start.elapsed());
        }
    }
    // A held lease is not a failed attempt.
    let _guard = terms.open().try_lock().unwrap();
    let lease = terms.builder().acquire_retry_limit(0).build().unwrap();
    assert!(lease.lock_for(Duration::from_millis(100)).unwrap_err().is_timeout());
}

/// Returns how many files the process `pid` watches for changes.
#[cfg(target_os = "linux")]
fn watches(pid: u32) -> usize {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap();
    let about = descriptors.filter_map(|descriptor| fs::read_to_string(descriptor.ok()?.path()).ok());
    about.map(|text| text.lines().filter(|line| line.starts_with("inotify ")).count()).sum()
}

#[cfg(target_os = "linux")]
#[test]
fn wait_after_timeout_leaves_no_inotify_watch() {
    let (_directory, terms) = place();
    let mut holder = Actor::start_lease(&terms);
    take(&mut holder, "try");
    let mut waiter = Actor::start_lease(&terms);
    assert!(waiter.ask("lock-for 1").starts_with("error Timeout"));
    let pid = waiter.pid();
    let before = Belongings::of(pid);
    waiter.tell_to_wait("lock-for 500");
    until("it watches", || watches(pid) == 1);
    assert!(waiter.answer().starts_with("error Timeout"));
    assert_eq!((watches(pid), Belongings::of(pid)), (0, before));
}

#[cfg(target_os = "linux")]
#[test]
fn record_link_refused_directory_link_is_same_lease() {
    let (directory, terms) = place();
    let at = |name: &str| Terms::of(directory.path().join(name));
    let mut holder = Actor::start_lease(&terms);
    take(&mut holder, "try");
    symlink(directory.path(), directory.path().join("here")).unwrap();
    assert!(is_held(&Actor::start_lease(&at("here/lease")).ask("try")));
    let name = directory.path().file_name().unwrap().to_str().unwrap();
    assert!(is_held(&Actor::start_lease(&at(&format!("./here/../{name}/lease"))).ask("try")));
    let mut relative = Actor::start_lease_with(&Terms::of("lease"), |command| {
        command.current_dir(directory.path());
    });
    assert!(is_held(&relative.ask("try")));
    relative.expect("go /", "gone there");
    assert!(is_held(&relative.ask("try")));
    relative.tell_to_wait("lock");
    holder.expect("release", "released");
    token(&relative.answer());

    symlink("lease", directory.path().join("soft")).unwrap();
    let refused = Actor::start_lease(&at("soft")).ask("try");
    assert!(refused.starts_with("error Insecure") && refused.contains("symbolic link"), "{refused}");
    fs::hard_link(&terms.path, directory.path().join("hard")).unwrap();
    for name in ["lease", "hard"] {
        let refused = Actor::start_lease(&at(name)).ask("try");
        assert!(refused.starts_with("error Insecure") && refused.contains("hard link"), "{refused}");
    }
    // The holder is uncertain as long as there are two links, and the lease continues when there is one again.
    relative.expect("is-held", "yes");
    fs::remove_file(directory.path().join("hard")).unwrap();
    wait_for_beats(&terms);
    relative.expect("is-held", "yes");
    symlink("nowhere", directory.path().join("dangling")).unwrap();
    assert!(Actor::start_lease(&at("dangling")).ask("try").starts_with("error Insecure"));
    assert!(Actor::start_lease(&at(".")).ask("try").starts_with("error"));
    rustix::fs::mkfifoat(rustix::fs::CWD, directory.path().join("fifo"), rustix::fs::Mode::from_raw_mode(0o600))
        .unwrap();
    assert!(Actor::start_lease(&at("fifo")).ask("try").starts_with("error Insecure"));
}

#[cfg(target_os = "linux")]
#[test]
fn acquire_file_of_other_user_refused_of_root_allowed() {
    let Some(user) = another_user() else { return };
    let Some(third) = another_user() else { return };
    let (directory, terms) = place();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
    let mut theirs = Actor::start_lease_as(&terms, user.uid);
    take(&mut theirs, "try");
    theirs.expect("release", "released");
    assert_eq!(fs::metadata(&terms.path).unwrap().uid(), user.uid);
    let denied = Actor::start_lease_as(&terms, third.uid).ask("try");
    assert!(denied.starts_with("error Io: cannot open") && denied.contains("Permission denied"), "{denied}");
    fs::set_permissions(&terms.path, Permissions::from_mode(0o666)).unwrap();
    let record = read(&terms);
    for refused in [Actor::start_lease_as(&terms, third.uid).ask("try"), Actor::start_lease(&terms).ask("lock")] {
        assert!(refused.starts_with("error ForeignOwner"), "{refused}");
    }
    assert_eq!(read(&terms), record);
    // Root may make it free.
    take(&mut theirs, "try");
    let LeaseStatus::Held(seen) = terms.open().status().unwrap() else { panic!("it is held") };
    assert!(terms.open().evict(&seen).unwrap());
    assert_eq!(terms.open().status().unwrap(), LeaseStatus::Free);
    assert_eq!(fs::metadata(&terms.path).unwrap().uid(), user.uid);
    chown(&terms.path, Some(0), None).unwrap();
    take(&mut Actor::start_lease_as(&terms, third.uid), "try");
}

#[cfg(target_os = "linux")]
#[test]
fn create_with_modes_applies_them_to_file_and_parents() {
    let (directory, terms) = place();
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
    drop(terms.open().lock().unwrap());
    assert_eq!(mode(&terms.path), 0o600);
    let path = directory.path().join("a/b/lease");
    let lease = Lease::file(&path).create_parents().file_write_mode(0o640).directory_write_mode(0o750).build().unwrap();
    assert!(!directory.path().join("a").exists(), "nothing is made before it is taken");
    drop(lease.lock().unwrap());
    let modes = [&path, path.parent().unwrap(), &directory.path().join("a")].map(mode);
    assert_eq!(modes, [0o640, 0o750, 0o750]);
}

/// A store in memory that fails, and blocks renewals, on request.
#[derive(Default)]
struct Board {
    /// The last token, and the claim of the holder.
    record: Mutex<(u64, Option<ClaimId>)>,
    /// Whether every request fails as on a bad disk.
    is_broken: AtomicBool,
    attempts: AtomicUsize,
    /// Whether renewals block.
    is_closed: Mutex<bool>,
    opened: Condvar,
    /// The steps of requests so far, in order.
    log: Mutex<Vec<&'static str>>,
}

impl Board {
    fn note(&self, what: &'static str) {
        self.log.lock().unwrap().push(what);
    }

    fn has_done(&self, what: &str) -> bool {
        self.log.lock().unwrap().contains(&what)
    }

    fn close(&self, is_closed: bool) {
        *self.is_closed.lock().unwrap() = is_closed;
        self.opened.notify_all();
    }

    fn works(&self) -> Result<(), StoreError> {
        match self.is_broken.load(Ordering::Relaxed) {
            true => Err(StoreError::unknown(std::io::Error::other("the disk fails"))),
            false => Ok(()),
        }
    }
}

impl LeaseStore for Board {
    fn profile(&self) -> StoreProfile {
        StoreProfile::new(Durability::Memory)
    }

    fn try_acquire(
        &self,
        name: &LeaseName,
        claim: &ClaimId,
        ttl: Duration,
        _: Deadline,
    ) -> Result<Attempt, StoreError> {
        self.attempts.fetch_add(1, Ordering::Relaxed);
        self.works()?;
        let (token, holder) = &mut *self.record.lock().unwrap();
        if holder.is_some_and(|holder| holder != *claim) {
            return Ok(Attempt::Busy(LeaseSnapshot::new(*token)));
        }
        *token += u64::from(holder.replace(*claim).is_none());
        Ok(Attempt::Granted(Grant::new(name, claim, *token, ttl)))
    }

    fn renew(&self, grant: &Grant, _: Deadline) -> Result<Renewal, StoreError> {
        self.note("asked");
        let is_closed = self.is_closed.lock().unwrap();
        drop(self.opened.wait_while(is_closed, |is_closed| *is_closed).unwrap());
        self.works()?;
        self.note("renewed");
        // This is how a careless store behaves: a renewal restores a released claim.
        self.record.lock().unwrap().1 = Some(*grant.claim());
        Ok(Renewal::Extended { ttl: grant.ttl() })
    }

    fn release(&self, grant: &Grant, _: Deadline) -> Result<Released, StoreError> {
        self.works()?;
        self.note("released");
        match self.record.lock().unwrap().1.take_if(|claim| claim == grant.claim()) {
            Some(_) => Ok(Released::Done),
            None => Ok(Released::NotMine),
        }
    }

    fn get(&self, _: &LeaseName, _: Deadline) -> Result<Option<LeaseSnapshot>, StoreError> {
        self.works()?;
        let (token, holder) = &*self.record.lock().unwrap();
        Ok(holder.map(|claim| LeaseSnapshot::new(*token).with_claim(claim).with_token(*token)))
    }

    fn evict(&self, _: &LeaseName, _: &LeaseSnapshot, _: Deadline) -> Result<Released, StoreError> {
        Err(StoreError::permanent("nobody is evicted here"))
    }
}

#[test]
fn drop_during_renewal_releases_after_it() {
    for opens_first in [true, false] {
        let board = Arc::new(Board::default());
        let lease = Lease::with_store(board.clone(), "key").heartbeat(Duration::from_millis(20)).build().unwrap();
        let guard = lease.lock().unwrap();
        board.close(true);
        board.log.lock().unwrap().clear();
        until("it is asked to renew", || board.has_done("asked"));
        if opens_first {
            let dropper = std::thread::spawn(move || drop(guard));
            board.close(false);
            dropper.join().unwrap();
        } else {
            // The drop does not wait for ever. It leaves the release to the heartbeat.
            drop(guard);
            assert!(!board.has_done("released"));
            board.close(false);
            until("it is released", || board.has_done("released"));
        }
        assert_eq!(board.log.lock().unwrap().last(), Some(&"released"));
        assert_eq!(lease.status().unwrap(), LeaseStatus::Free);
        drop(lease.try_lock().unwrap());
    }
}

#[test]
fn broken_store_is_retried_and_lease_survives() {
    let board = Arc::new(Board::default());
    let builder = || Lease::with_store(board.clone(), "key").acquire_retry_delay(Duration::from_millis(5));
    for limit in [0, 1, 7] {
        board.is_broken.store(true, Ordering::Relaxed);
        board.attempts.store(0, Ordering::Relaxed);
        let error = builder().acquire_retry_limit(limit).build().unwrap().lock().unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Store { .. }), "{error}");
        assert_eq!(board.attempts.load(Ordering::Relaxed), limit as usize + 1);
    }
    let stop = CancelToken::new();
    std::thread::scope(|scope| {
        let lease = builder().acquire_retry_limit(u32::MAX).build().unwrap();
        let wait = Wait::forever().or_cancelled(&stop);
        let waiter = scope.spawn(move || lease.acquire(&wait));
        until("it is asked often", || board.attempts.load(Ordering::Relaxed) > 20);
        stop.cancel();
        assert!(waiter.join().unwrap().unwrap_err().is_cancelled());
    });
    board.is_broken.store(false, Ordering::Relaxed);
    let guard = builder().ttl(Duration::from_secs(10)).heartbeat(Duration::from_millis(20)).build().unwrap().lock();
    let guard = guard.unwrap();
    board.is_broken.store(true, Ordering::Relaxed);
    board.log.lock().unwrap().clear();
    until("it is asked again and again", || board.log.lock().unwrap().len() > 10);
    assert!(guard.is_held() && !board.has_done("renewed"));
    board.is_broken.store(false, Ordering::Relaxed);
    until("it is renewed", || board.has_done("renewed"));
    guard.release().unwrap();
}

/// Returns all properties of a file that a program can change.
#[cfg(target_os = "linux")]
fn appearance(path: &Path) -> (Option<Vec<u8>>, Option<PathBuf>, u64, u32, i64, i64, u64) {
    let seen = fs::symlink_metadata(path).unwrap();
    let content = seen.is_file().then(|| fs::read(path).unwrap());
    let at = (seen.mtime(), seen.mtime_nsec());
    (content, fs::read_link(path).ok(), seen.ino(), seen.mode(), at.0, at.1, seen.len())
}

#[cfg(target_os = "linux")]
#[test]
fn a1_acquire_of_foreign_file_refused_and_keeps_it() {
    let (directory, terms) = place();
    let at = |name: &str| directory.path().join(name);
    let file = |name: &str, bytes: &[u8]| {
        fs::write(at(name), bytes).unwrap();
        at(name)
    };
    let record = {
        drop(terms.open().lock().unwrap());
        read(&terms)
    };
    let program = fs::read(std::env::current_exe().unwrap()).unwrap();
    let database = [b"SQLite format 3\0", &[0; 4080][..]].concat();
    lockkit::ShmLockManager::create(at("table"), 64).unwrap();
    let files = [
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
        file("magic and a long tail", &[b"lockkit lease 1\nabout leases\n", &[b'x'; 2000][..]].concat()),
        file("cut record with a tail", &[&record[..600], &[b'x'; 600]].concat()),
        file("family", b"lockkit lease notes\n"),
        file("first letters in capitals", b"Lockkit lease 1\n"),
        file("behind a line", &[b"# copied\n", &record[..900]].concat()),
        at("table"),
    ];
    fs::set_permissions(at("notes"), Permissions::from_mode(0o444)).unwrap();
    for path in &files {
        set_age(path, SystemTime::now() - HOUR);
    }
    symlink("newline", at("link")).unwrap();
    symlink("nowhere", at("dangling")).unwrap();
    fs::hard_link(at("json"), at("json again")).unwrap();
    fs::create_dir(at("directory")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, at("fifo"), rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
    let special = ["link", "dangling", "json", "json again", "directory", "fifo"].map(at);
    let damaged = LeaseStatus::Held(LeaseSnapshot::new(0).with_expires_in(Duration::ZERO));
    let LeaseStatus::Held(any) = damaged else { unreachable!() };
    let is_refused = |path: &Path, error: lockkit::Error| match error.kind() {
        ErrorKind::NotALease { path: named, text } => {
            assert!(named == path && error.to_string().contains(text.as_str()), "{error}");
            !special.iter().any(|special| special == path)
        }
        ErrorKind::Insecure { .. } => special.iter().any(|special| special == path),
        // A read-only file, for a user other than root.
        ErrorKind::Io { source, .. } => source.kind() == std::io::ErrorKind::PermissionDenied && path == at("notes"),
        _ => false,
    };
    std::thread::scope(|scope| {
        for path in files.iter().chain(&special).filter(|path| **path != at("json")) {
            let (any, is_refused) = (&any, &is_refused);
            scope.spawn(move || {
                let before = appearance(path);
                let lease = Lease::file(path).build().unwrap();
                let start = Instant::now();
                let attempts: [&dyn Fn() -> lockkit::Result<()>; 7] = [
                    &|| lease.lock_for(Duration::from_secs(3)).map(drop),
                    &|| lease.lock().map(drop),
                    &|| lease.try_lock().map(drop),
                    &|| lease.status().map(drop),
                    &|| lease.owner().map(drop),
                    &|| lease.evict(any).map(drop),
                    &|| Lease::file(path).file_write_mode(0o666).create_parents().build().unwrap().lock().map(drop),
                ];
                for (at, attempt) in attempts.iter().enumerate() {
                    let error = attempt().expect_err("it is no lease");
                    assert!(is_refused(path, error), "attempt {at} at {}", path.display());
                }
                assert!(start.elapsed() < Duration::from_secs(3), "it is refused at once");
                assert_eq!(appearance(path), before, "{}", path.display());
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
    for (text, replaces) in foreign.iter().flat_map(|text| [(text, false), (text, true)]) {
        let (_directory, terms) = place();
        let put = || if replaces { replace(&terms, text) } else { write(&terms, text) };
        // A holder that keeps the lease until its deadline.
        let mut holder = Actor::start_lease(&terms);
        take(&mut holder, "try");
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
        let long = Terms { ttl: 60_000, heartbeat: 20_000, ..terms.clone() };
        let mut holder = Actor::start_lease(&long);
        take(&mut holder, "try");
        put();
        assert!(holder.ask("release").starts_with("error NotALease"));
        take(&mut Actor::start_lease(&Terms { path: terms.path.with_extension("other"), ..long }), "try");
        holder.kill();
        assert_eq!(read(&terms), text.as_bytes());
    }
}

#[test]
fn a1_record_restored_before_deadline_keeps_lease() {
    if wine_cannot_judge("a file that is open cannot be replaced there") {
        return;
    }
    let (_directory, mut terms) = place();
    terms.ttl = LIVELY.as_millis() as u64;
    let mut holder = Actor::start_lease(&terms);
    take(&mut holder, "try");
    let aside = terms.path.with_extension("aside");
    fs::rename(&terms.path, &aside).unwrap();
    fs::write(terms.path.with_extension("new"), "notes").unwrap();
    // A heartbeat may have restored the record just before.
    until("another file is there", || fs::rename(terms.path.with_extension("new"), &terms.path).is_ok());
    let start = Instant::now();
    until("some beats have failed", || start.elapsed() > Duration::from_millis(5 * terms.heartbeat));
    holder.expect("is-held", "yes");
    fs::rename(&aside, &terms.path).unwrap();
    wait_for_beats(&terms);
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
                let (_directory, terms) = place();
                write(&terms, damaged);
                let start = Instant::now();
                // Each question comes from a new process, without an earlier observation.
                let mut is_young = true;
                while is_young {
                    let asked = Instant::now();
                    let status = Actor::start_lease(&terms).ask("status");
                    let tried = Actor::start_lease(&terms).ask("try");
                    let took = asked.elapsed();
                    let left =
                        status.strip_prefix("damaged ").expect(&status).parse().map(Duration::from_nanos).unwrap();
                    is_young = is_held(&tried);
                    match is_young {
                        true => assert!(!left.is_zero(), "{damaged:?}: {status}, {tried}"),
                        false => assert!(left <= took && tried.starts_with("held "), "{damaged:?}: {status}, {tried}"),
                    }
                }
                assert!(start.elapsed() >= Duration::from_millis(1990), "{damaged:?}");
            });
            scope.spawn(move || {
                // Old damage is reclaimed by the first process that asks.
                let (_directory, terms) = place();
                write(&terms, damaged);
                let [mut first, mut second] = [(); 2].map(|()| Actor::start_lease(&terms));
                until("it is old", || first.ask("status") == "damaged 0");
                assert!(second.ask("try").starts_with("held "));
                assert!(is_held(&first.ask("try")));
            });
        }
    });
}

#[test]
fn a8_try_of_old_damaged_record_reclaims_it() {
    for damaged in DAMAGED {
        let (_directory, terms) = place();
        write(&terms, damaged);
        // A time in the future says nothing about the age.
        set_age(&terms.path, SystemTime::now() + HOUR);
        assert!(is_held(&Actor::start_lease(&terms).ask("try")), "{damaged:?}");
        // On a file system of another machine the first hour does not count.
        set_age(&terms.path, SystemTime::now() - 2 * HOUR);
        assert_eq!(Actor::start_lease(&terms).ask("status"), "damaged 0", "{damaged:?}");
        assert!(Actor::start_lease(&terms).ask("try").starts_with("held "), "{damaged:?}");
    }
}

/// The system calls on files that an attempt and a look make.
#[cfg(target_os = "linux")]
const FILE_CALLS: [&str; 8] = ["openat", "statx", "newfstatat", "fstat", "pread64", "pwrite64", "flock", "close"];

/// Stops a process at each system call of `command` in turn, while another process holds the lease. Returns the number
/// of system calls.
#[cfg(target_os = "linux")]
fn stop_at_every_call_of(command: &str) -> usize {
    // strace counts each call by itself.
    FILE_CALLS.iter().map(|call| stop_at_each(call, command)).sum()
}

#[cfg(target_os = "linux")]
fn stop_at_each(call: &str, command: &str) -> usize {
    /// A waiter never stops making calls.
    const MOST: usize = 3;
    /// After so many sleeps a waiter has made each call of one check.
    const SLEEPS: usize = 4;
    let is_stopped = |actor: &Actor| {
        let stat = fs::read_to_string(format!("/proc/{}/stat", actor.pid())).unwrap_or_default();
        stat.contains(") T ")
    };
    for at in 1..=MOST {
        let (_directory, mut terms) = place();
        (terms.ttl, terms.heartbeat) = (500, 50);
        let [mut holder, mut victim, mut next] = [(); 3].map(|()| Actor::start_lease(&terms));
        take(&mut holder, "lock");
        // In every other round it has written its note before.
        if at % 2 == 0 {
            assert!(is_held(&victim.ask("try")));
        }
        let stop = [format!("trace={call},ppoll"), format!("inject={call}:signal=STOP:when={at}")];
        let mut strace =
            lockkit_tests::fault_injection::Strace::attach(&victim, &stop.map(|option| format!("-e{option}")));
        victim.tell(command);
        let mut is_over = false;
        until("it is stopped, or answers, or waits without such a call", || {
            let calls = strace.so_far();
            if calls.contains("stopped by SIGSTOP") {
                return true;
            }
            is_over = victim.answered().is_some() || calls.matches("ppoll(").count() > SLEEPS;
            is_over
        });
        strace.end();
        if is_over {
            return at - 1;
        }
        until("it stays stopped", || is_stopped(&victim));
        let start = Instant::now();
        until("twice its ttl is over", || {
            holder.expect("is-held", "yes");
            start.elapsed() > Duration::from_millis(2 * terms.ttl)
        });
        holder.expect("losses", "losses");
        holder.expect("release", "released");
        token(&next.ask("lock-for 2000"));
        assert!(is_stopped(&victim));
    }
    MOST
}

#[cfg(target_os = "linux")]
#[test]
fn a9_reader_stopped_at_any_call_keeps_lease() {
    if !faults_can_be_made() {
        return;
    }
    let stops: usize = std::thread::scope(|scope| {
        let stopped = ["try", "status", "lock"].map(|command| scope.spawn(move || stop_at_every_call_of(command)));
        stopped.into_iter().map(|stops| stops.join().unwrap()).sum()
    });
    assert!(stops > 10, "there were only {stops} calls");
}

#[cfg(target_os = "linux")]
#[test]
fn a9_read_of_held_lease_takes_no_flock() {
    if !faults_can_be_made() {
        return;
    }
    let (_directory, terms) = place();
    let [mut holder, mut reader] = [(); 2].map(|()| Actor::start_lease(&terms));
    take(&mut holder, "lock");
    assert!(is_held(&reader.ask("try")));
    let mut strace = lockkit_tests::fault_injection::Strace::attach(&reader, &[]);
    for command in ["try", "status", "lock-for 300", "try"] {
        let answer = reader.ask(command);
        assert!(answer.starts_with("held ") || answer.starts_with("error "), "{answer}");
    }
    let calls = strace.end();
    assert!(calls.contains("pread64("), "it has read: {calls}");
    assert!(!calls.contains("flock("), "{calls}");
}

#[cfg(target_os = "linux")]
#[test]
fn a9_status_during_stopped_write_answers() {
    let (_directory, terms) = place();
    let mut holder = Actor::start_lease(&terms);
    take(&mut holder, "lock");
    let mut reader = Actor::start_lease(&terms);
    let writer = FileLock::new(&terms.path).lock().unwrap();
    assert!(reader.ask("status").starts_with("held "));
    assert!(is_held(&reader.ask("try")));
    drop(writer);
    holder.expect("release", "released");
    // A process that is stopped just before it takes the lease delays others until it continues.
    let writer = FileLock::new(&terms.path).lock().unwrap();
    assert_eq!(reader.ask("status"), "free");
    assert!(reader.ask("lock-for 100").starts_with("error Timeout"));
    reader.tell_to_wait("lock");
    drop(writer);
    token(&reader.answer());
}

#[cfg(target_os = "linux")]
#[test]
fn a10_group_mode_shares_lease_between_users() {
    let (Some(one), Some(two)) = (another_user(), another_user()) else { return };
    let group = one.uid;
    let (directory, mut terms) = place();
    chown(directory.path(), Some(0), Some(group)).unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o2775)).unwrap();
    let mode = || fs::metadata(&terms.path).unwrap().mode() & 0o7777;
    let start = |terms: &Terms, uid| Actor::start_lease_in_group(terms, uid, group);
    // By default a lease belongs to one user, and the error of another user says why.
    take(&mut start(&terms, one.uid), "try");
    assert_eq!(mode(), 0o600);
    let denied = start(&terms, two.uid).ask("try");
    assert!(denied.starts_with("error Io: cannot open") && denied.contains("Permission denied"), "{denied}");
    let denied = start(&terms, two.uid).ask("status");
    assert!(denied.starts_with("error Io: cannot open") && denied.contains("Permission denied"), "not free: {denied}");
    fs::remove_file(&terms.path).unwrap();

    let path = terms.path.clone();
    terms.mode = 0o664;
    let mut first = start(&terms, one.uid);
    let before = take(&mut first, "try");
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o664, "whatever the umask is");
    let mut second = start(&terms, two.uid);
    assert!(is_held(&second.ask("try")));
    second.tell_to_wait("lock");
    first.expect("release", "released");
    let after = token(&second.answer());
    assert!(after > before);
    second.kill();
    assert!(token_after(&first.ask("lock"), second.pid()) > after);
    wait_for_beats(&terms);
    first.expect("is-held", "yes");
    // A user without a shared mode is refused, and so is a user outside the group.
    let alone = Terms { mode: 0, ..terms.clone() };
    assert!(start(&alone, two.uid).ask("try").starts_with("error ForeignOwner"));
    let stranger = Actor::start_lease_as(&terms, two.uid).ask("try");
    assert!(stranger.contains("Permission denied"), "{stranger}");
    // The owner does not let the group write.
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    let denied = start(&terms, two.uid).ask("try");
    assert!(denied.contains("Permission denied"), "{denied}");
    assert!(Actor::start_lease(&terms).ask("try").starts_with("error ForeignOwner"), "root does not either");
    first.expect("is-held", "yes");
}

#[cfg(target_os = "linux")]
#[test]
fn a11_create_parents_only_on_request() {
    let (directory, _) = place();
    let path = directory.path().join("a/b/lease");
    let lease = Lease::file(&path).build().unwrap();
    let start = Instant::now();
    for error in [lease.try_lock().unwrap_err(), lease.lock().unwrap_err()] {
        let text = error.to_string();
        assert!(
            text.contains(directory.path().join("a/b").to_str().unwrap()) && text.contains("No such file"),
            "{text}"
        );
        assert_eq!(std::io::Error::from(error).kind(), std::io::ErrorKind::NotFound);
    }
    assert!(start.elapsed() < Duration::from_secs(1), "it is told at once");
    assert_eq!(lease.status().unwrap(), LeaseStatus::Free);
    assert_eq!(directory.path().read_dir().unwrap().count(), 0);
    let made = Lease::file(&path).create_parents().build().unwrap();
    let guard = made.lock().unwrap();
    assert!(lease.try_lock().unwrap_err().is_held());
    drop(guard);
    let shared = directory.path().join("shared/leases/lease");
    let builder = Lease::file(&shared).create_parents().file_write_mode(0o666).directory_write_mode(0o2777);
    drop(builder.build().unwrap().lock().unwrap());
    for directory in shared.ancestors().skip(1).take(2) {
        assert_eq!(fs::metadata(directory).unwrap().mode() & 0o7777, 0o2777, "whatever the umask is");
    }
    let elsewhere = Lease::with_store(Arc::new(Board::default()), "key").create_parents().build();
    assert!(matches!(elsewhere.unwrap_err().kind(), ErrorKind::InvalidOption { option: "create_parents", .. }));
}

#[test]
fn c5_build_with_heartbeat_below_1_ms_refused() {
    let (_directory, terms) = place();
    let file = || Lease::file(&terms.path);
    let store = || Lease::with_store(Arc::new(Board::default()), "key");
    let clock = || Arc::new(lockkit::lease::ManualClock::new());
    for short in [0, 1, 999_999].map(Duration::from_nanos) {
        for builder in [
            file().heartbeat(short),
            store().heartbeat(short),
            file().clock(clock()).heartbeat(short),
            file().acquire_retry_delay(short),
            store().acquire_retry_delay(short),
        ] {
            let error = builder.build().unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::InvalidOption { .. }), "{error}");
            assert!(error.to_string().contains("1ms"), "it states the rule: {error}");
        }
    }
    let shortest = Duration::from_millis(1);
    assert!(file().heartbeat(shortest).acquire_retry_delay(shortest).build().is_ok());
}

#[test]
fn c12_acquire_of_forged_numbers_fails_or_is_safe() {
    let (_directory, terms) = place();
    let most = u64::MAX.to_string();
    let dead = left_by_the_dead(&terms);
    let free = forge(&dead, &[("state", "free")]);
    for (record, token) in [(&dead, u64::MAX), (&dead, u64::MAX - 1), (&free, u64::MAX), (&free, u64::MAX / 2)] {
        let planted = forge(record, &[("token", &format!("{token:020}"))]);
        write(&terms, planted.clone());
        let lease = terms.open();
        for error in [lease.try_lock().unwrap_err(), lease.lock_for(LIVELY).unwrap_err(), lease.status().unwrap_err()] {
            let text = error.to_string();
            let first = text.lines().next().unwrap();
            assert!(
                first.contains(terms.path.to_str().unwrap()) && first.contains("fencing token is centuries ahead"),
                "{first}"
            );
        }
        assert_eq!(read(&terms), planted);
    }
    // Whatever else was planted, the lease goes on, and tokens never decrease.
    let soon = i64::MAX as u64 / 1024;
    write(&terms, forge(&dead, &[("token", &format!("{soon:020}"))]));
    for next in 1..4 {
        assert_eq!(terms.open().try_lock().unwrap().token(), soon + next);
    }

    // A waiter does not wait for a TTL that no lease can have.
    for ttl in [u64::MAX, 366 * 86_400 * 1_000_000_000] {
        write(
            &terms,
            forge(&of_a_stranger(&terms), &[("ttl", &format!("{ttl:020} ns")), ("every", &format!("{most} ns"))]),
        );
        let start = Instant::now();
        drop(terms.open().lock_for(LIVELY).unwrap());
        assert!(start.elapsed() >= Duration::from_millis(1990));
    }

    // The heartbeat numbers of a holder continue after the largest number.
    let mut holder = Actor::start_lease(&terms);
    take(&mut holder, "lock");
    write(&terms, forge(&read(&terms), &[("beat", &most)]));
    let mut waiter = Actor::start_lease(&terms);
    let answer = waiter.ask(&format!("lock-for {}", 3 * terms.ttl));
    assert!(answer.starts_with("error Timeout"), "{answer}");
    holder.expect("is-held", "yes");
}

/// Returns how long `threads` threads take to acquire the lease `often` times each.
#[cfg(target_os = "linux")]
fn crowd(threads: usize, often: usize, open: impl Fn() -> Lease + Sync) -> Duration {
    let holders = AtomicUsize::new(0);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let lease = open();
                for _ in 0..often {
                    let guard = lease.lock_for(4 * LIVELY).unwrap();
                    assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0, "two hold it");
                    holders.fetch_sub(1, Ordering::SeqCst);
                    drop(guard);
                }
            });
        }
    });
    start.elapsed()
}

#[cfg(target_os = "linux")]
#[test]
fn c13_acquire_by_200_threads_is_quick_and_exclusive() {
    let (_directory, terms) = place();
    let shared = terms.open();
    let took = crowd(200, 5, || shared.clone());
    println!("200 threads took one lease 1000 times in {took:?}");
    assert!(took < Duration::from_secs(8), "{took:?}");
    // Leases of one path share a queue.
    let took = crowd(200, 5, || terms.open());
    println!("200 leases of one path were taken 1000 times in {took:?}");
    assert!(took < Duration::from_secs(8), "{took:?}");
}

#[cfg(target_os = "linux")]
#[test]
fn c13_waiters_of_one_process_served_in_order() {
    let (_directory, terms) = place();
    let lease = terms.open();
    let order = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        let guard = lease.lock().unwrap();
        for number in 0..20 {
            let (lease, order) = (terms.open(), &order);
            let (tell, told) = std::sync::mpsc::channel();
            scope.spawn(move || {
                tell.send(lockkit_tests::thread_id()).unwrap();
                let guard = lease.lock_for(LIVELY).unwrap();
                order.lock().unwrap().push(number);
                drop(guard);
            });
            let thread = told.recv().unwrap();
            until("it waits", || lockkit_tests::sleeps(std::process::id(), thread));
            // A try does not join the queue.
            let start = Instant::now();
            let error = terms.open().try_lock().unwrap_err();
            assert!(error.is_held() && error.owner().is_some() && start.elapsed() < LIVELY / 10);
        }
        // The error names the holder, although this thread has not asked the store.
        let error = terms.open().lock_for(Duration::from_millis(50)).unwrap_err();
        assert!(error.is_timeout() && error.owner().is_some_and(|owner| owner.pid() == std::process::id()), "{error}");
        drop(guard);
    });
    assert_eq!(order.into_inner().unwrap(), (0..20).collect::<Vec<_>>());
}

#[cfg(target_os = "linux")]
#[test]
fn c13_wait_after_timeout_or_cancel_leaks_nothing() {
    let (_directory, terms) = place();
    let lease = terms.open();
    let guard = lease.lock().unwrap();
    let stop = CancelToken::new();
    // Creates the descriptor that a process keeps for its next wait, and that of the token.
    assert!(lease.acquire(&Wait::at_most(Duration::from_millis(10)).or_cancelled(&stop)).is_err());
    // The events of the waiters. Other tests of this process may have events, too.
    let events = || {
        let open = fs::read_dir("/proc/self/fd").unwrap().flatten();
        open.filter(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str() == "anon_inode:[eventfd]")).count()
    };
    let start = || {
        let (lease, wait) = (lease.clone(), Wait::forever().or_cancelled(&stop));
        std::thread::spawn(move || lease.acquire(&wait).map(drop))
    };
    let waiters: Vec<_> = (0..50).map(|_| start()).collect();
    until("they wait", || events() >= 49);
    let timed: Vec<_> = (0..50)
        .map(|_| {
            let lease = lease.clone();
            std::thread::spawn(move || lease.lock_for(Duration::from_millis(100)).map(drop))
        })
        .collect();
    for waiter in timed {
        assert!(waiter.join().unwrap().unwrap_err().is_timeout());
    }
    let cancelled = Instant::now();
    stop.cancel();
    for waiter in waiters {
        assert!(waiter.join().unwrap().unwrap_err().is_cancelled());
    }
    assert!(cancelled.elapsed() < Duration::from_secs(5), "{:?}", cancelled.elapsed());
    until("no waiter has left a descriptor", || events() < 20);
    drop(guard);
    drop(lease.try_lock().expect("nobody waits any more"));
}

lockkit_tests::left_out! { "it takes other users, modes of files, links, inotify, or a disk that fails, as Linux has them":
    wait_after_timeout_leaves_no_inotify_watch,
    forked_child_does_not_inherit_lease,
    holder_stopped_longer_than_ttl_finds_lease_lost_at_once,
    holder_stopped_shorter_than_ttl_keeps_lease,
    lease_file_deleted_goes_to_waiter_with_greater_token,
    renew_with_io_errors_retries_until_deadline,
    lease_waiter_without_inotify_polls,
    create_race_without_linkat_has_one_winner,
    failed_record_write_without_tmpfile_leaves_no_file,
    acquire_without_heartbeat_thread_fails_and_holds_nothing,
    on_lost_without_own_thread_is_called_once_by_heartbeat,
    record_link_refused_directory_link_is_same_lease,
    acquire_file_of_other_user_refused_of_root_allowed,
    create_with_modes_applies_them_to_file_and_parents,
    a1_acquire_of_foreign_file_refused_and_keeps_it,
    a8_status_and_try_agree_on_damaged_record,
    a9_reader_stopped_at_any_call_keeps_lease,
    a9_read_of_held_lease_takes_no_flock,
    a9_status_during_stopped_write_answers,
    a10_group_mode_shares_lease_between_users,
    a11_create_parents_only_on_request,
    c13_acquire_by_200_threads_is_quick_and_exclusive,
    c13_waiters_of_one_process_served_in_order,
    c13_wait_after_timeout_or_cancel_leaks_nothing,
}
