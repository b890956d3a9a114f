//! Takeovers, evictions, and how a holder learns of its loss.

#[cfg(target_os = "linux")]
use std::fs;
use std::time::{Duration, Instant, SystemTime};

use lockkit::LeaseStatus;
use lockkit::lease::{Clock, SystemClock};
use lockkit_tests::leases::{Terms, forge, left_by_the_dead, line};
use lockkit_tests::wine::{is_wine, wine_cannot_judge};
use lockkit_tests::{Actor, LIVELY, leases, until};
#[cfg(target_os = "linux")]
use rustix::process::Signal;

use crate::fixture::{
    OLD_AGE, acquire, is_held, read, record_of_other_host, replace, set_modified, temp_lease,
    token_after, wait_for_heartbeats, write,
};
#[cfg(target_os = "linux")]
use crate::fixture::{stop, token};

#[test]
fn dead_holder_taken_over_with_new_claim_at_any_record_age() {
    for age in [Duration::ZERO, OLD_AGE] {
        let (_directory, terms) = temp_lease();
        let record = left_by_the_dead(&terms);
        let died: u32 = line(&record, "pid").parse().unwrap();
        set_modified(&terms.path, SystemTime::now() - age);
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
    let (_directory, terms) = temp_lease();
    let record = forge(
        &left_by_the_dead(&terms),
        &[("boot", &"7".repeat(32)), ("pid", "1"), ("start", "1")],
    );
    write(&terms, &record);
    let before = line(&record, "token").parse::<u64>().unwrap();
    let guard = terms.open().try_lock().unwrap();
    assert!(guard.recovered().is_some() && guard.token() > before);
}

#[test]
fn takeover_is_reported_once_within_two_seconds() {
    let (_directory, mut terms) = temp_lease();
    (terms.ttl, terms.heartbeat) = (3000, 250);
    let foreign = record_of_other_host(&terms);
    let mut holder = Actor::start_lease(&terms);
    acquire(&mut holder, "try");
    holder.tell("wait-lost");
    holder.expect_silence();
    write(&terms, &foreign);
    let start = Instant::now();
    let by = line(&foreign, "pid");
    assert_eq!(holder.answer(), format!("lost taken over by {by}"));
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "{:?}",
        start.elapsed()
    );
    holder.expect("is-held", &format!("no: taken over by {by}"));
    holder.expect("remaining", "remaining 0");
    let one_loss = format!("losses (taken over by {by} on lockkit-lost)");
    until("the loss is reported", || holder.ask("losses") == one_loss);
    assert!(holder.ask("release").starts_with("error LeaseLost"));
    holder.expect("losses", &one_loss);
    assert_eq!(read(&terms), foreign);
}

#[cfg(target_os = "linux")]
#[test]
fn holder_stopped_longer_than_ttl_finds_lease_lost_at_once() {
    for taken_over in [false, true] {
        let (_directory, terms) = temp_lease();
        let [mut holder, mut next] = [(); 2].map(|()| Actor::start_lease(&terms));
        let old = acquire(&mut holder, "try");
        stop(&holder, &terms);
        if taken_over {
            let new = token_after(&next.ask("lock"), holder.pid());
            assert!(
                new > old,
                "a resource that compares tokens refuses a late write"
            );
        } else {
            let start = Instant::now();
            until("the TTL has passed", || {
                start.elapsed() > Duration::from_millis(terms.ttl)
            });
        }
        // The question arrives before the holder runs again.
        holder.tell("is-held");
        holder.tell("losses");
        holder.signal(Signal::CONT);
        let answer = holder.answer();
        // If the heartbeat comes first, the reason may name the new holder.
        assert!(answer.starts_with("no: "), "{answer}");
        let first = holder.answer();
        until("the loss is reported", || {
            holder.ask("losses") == "losses (expired on lockkit-lost)"
        });
        assert!(
            ["losses", "losses (expired on lockkit-lost)"].contains(&&*first),
            "{first}"
        );
        assert!(holder.ask("release").starts_with("error LeaseLost"));
        match taken_over {
            true => next.expect("is-held", "yes"),
            // The loser lives. So the next process observes the silent record for a TTL first,
            // unless the loser has released it.
            false => assert!(next.ask("lock").starts_with("held ")),
        }
        next.expect("release", "released");
        assert!(acquire(&mut holder, "lock") > old);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn holder_stopped_shorter_than_ttl_keeps_lease() {
    let (_directory, mut terms) = temp_lease();
    terms.ttl = LIVELY.as_millis() as u64;
    let [mut holder, mut next] = [(); 2].map(|()| Actor::start_lease(&terms));
    acquire(&mut holder, "try");
    next.tell_to_wait("lock");
    for _ in 0..5 {
        stop(&holder, &terms);
        holder.signal(Signal::CONT);
        wait_for_heartbeats(&terms);
        holder.expect("is-held", "yes");
    }
    next.expect_silence();
    holder.expect("release", "released");
    token(&next.answer());
}

#[test]
fn stopped_holder_never_overlaps_next_holder() {
    let (_directory, mut terms) = temp_lease();
    (terms.ttl, terms.heartbeat) = (100, 25);
    let seconds = std::env::var("LOCKKIT_CHAOS_SECONDS")
        .map_or(10, |text| text.parse().expect("whole seconds"));
    let tally = leases::run(&terms, Duration::from_secs(seconds));
    println!("{tally:?}");
    // Under Wine the start of a process takes so long that all counts are lower.
    let is_enough = match is_wine() {
        true => tally.holds > 2 && tally.kills > 1,
        false => tally.holds > 20 && tally.kills > 10 && tally.losses > 3,
    };
    assert!(is_enough, "too few kills and losses: {tally:?}");
}

#[cfg(target_os = "linux")]
#[test]
fn lease_file_deleted_goes_to_waiter_with_greater_token() {
    let (_directory, terms) = temp_lease();
    let [mut holder, mut waiter] = [(); 2].map(|()| Actor::start_lease(&terms));
    let first = acquire(&mut holder, "try");
    waiter.tell_to_wait("lock");
    // The holder is stopped, so that it cannot be first.
    stop(&holder, &terms);
    fs::remove_file(&terms.path).unwrap();
    let second = token(&waiter.answer());
    assert!(second > first);
    holder.signal(Signal::CONT);
    let answer = holder.ask("wait-lost");
    // On a slow machine the stop may last longer than its TTL.
    assert!(
        [
            format!("lost taken over by {}", waiter.pid()),
            "lost expired".into()
        ]
        .contains(&answer),
        "{answer}"
    );
    waiter.expect("is-held", "yes");
    waiter.expect("release", "released");
    assert!(acquire(&mut holder, "lock") > second);
}

#[test]
fn waiter_of_replaced_record_waits_for_new_holder() {
    if wine_cannot_judge("a file that is open cannot be replaced there") {
        return;
    }
    let (_directory, terms) = temp_lease();
    let foreign = record_of_other_host(&terms);
    let [mut holder, mut waiter] = [(); 2].map(|()| Actor::start_lease(&terms));
    acquire(&mut holder, "try");
    waiter.tell_to_wait("lock");
    let start = Instant::now();
    replace(&terms, &foreign);
    let by: u32 = line(&foreign, "pid").parse().unwrap();
    holder.expect("wait-lost", &format!("lost taken over by {by}"));
    token_after(&waiter.answer(), by);
    assert!(start.elapsed() >= Duration::from_millis(terms.ttl));
}

#[test]
fn takeover_waits_for_ttl_in_record_not_own_ttl() {
    let (_directory, terms) = temp_lease();
    write(&terms, record_of_other_host(&terms));
    let short = Terms {
        ttl: 60,
        heartbeat: 20,
        ..terms.clone()
    }
    .open();
    let start = Instant::now();
    drop(short.lock_for(LIVELY).unwrap());
    assert!(
        start.elapsed() >= Duration::from_millis(terms.ttl),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn try_once_processes_take_over_silent_holder_after_ttl() {
    if SystemClock.shared_id().is_none() {
        let why = "boots are not told apart here, so no program can use what another one has noted by its clock";
        return lockkit_tests::left_out(why);
    }
    let (_directory, terms) = temp_lease();
    let foreign = record_of_other_host(&terms);
    write(&terms, &foreign);
    let (start, mut refused) = (Instant::now(), 0);
    until("one process acquires", || {
        let answer = Actor::start_lease(&terms).ask("try");
        let acquires = answer.starts_with("held ");
        if acquires {
            token_after(&answer, line(&foreign, "pid").parse().unwrap());
        } else {
            assert!(is_held(&answer), "{answer}");
            refused += 1;
        }
        acquires
    });
    assert!(
        start.elapsed() >= Duration::from_millis(terms.ttl) && refused > 1,
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn evict_removes_only_holder_of_snapshot() {
    let (_directory, terms) = temp_lease();
    let lease = terms.open();
    let mut holder = Actor::start_lease(&terms);
    let first = acquire(&mut holder, "try");
    let LeaseStatus::Held(seen) = lease.status().unwrap() else {
        panic!("the lease is held")
    };
    assert_eq!(
        (seen.token(), seen.owner().unwrap().pid()),
        (Some(first), holder.pid())
    );
    holder.expect("release", "released");
    assert!(!lease.evict(&seen).unwrap(), "the lease is free");
    acquire(&mut holder, "try");
    assert!(
        !lease.evict(&seen).unwrap(),
        "another acquisition holds the lease"
    );
    let LeaseStatus::Held(seen) = lease.status().unwrap() else {
        panic!("the lease is held")
    };
    wait_for_heartbeats(&terms);
    assert!(
        lease.evict(&seen).unwrap(),
        "a renewal does not change the holder"
    );
    let answer = holder.ask("wait-lost");
    assert_eq!(answer, "lost taken over");
    holder.expect("is-held", "no: taken over");
    until("the loss is reported", || {
        holder.ask("losses") == "losses (taken over on lockkit-lost)"
    });
    assert!(lease.try_lock().unwrap().token() > first);
    // An eviction frees a damaged lease without a wait.
    write(&terms, "lock");
    let LeaseStatus::Held(seen) = lease.status().unwrap() else {
        panic!("a damaged lease counts as held")
    };
    assert!(lease.try_lock().unwrap_err().is_held());
    write(&terms, "lockkit");
    assert!(!lease.evict(&seen).unwrap());
    let LeaseStatus::Held(seen) = lease.status().unwrap() else {
        panic!("a damaged lease counts as held")
    };
    assert!(lease.evict(&seen).unwrap());
    assert!(lease.try_lock().unwrap().token() > first);
}

#[test]
fn panic_in_on_lost_does_not_stop_heartbeat() {
    let (_directory, mut terms) = temp_lease();
    terms.panics = true;
    let mut holder = Actor::start_lease(&terms);
    for loss in 1..=2 {
        write(&terms, record_of_other_host(&terms));
        // The record names a holder on another host, so the actor waits for its expiry.
        assert!(holder.ask("lock").starts_with("held "));
        wait_for_heartbeats(&terms);
        write(&terms, record_of_other_host(&terms));
        assert!(holder.ask("wait-lost").starts_with("lost taken over"));
        until("the loss is reported", || {
            holder.ask("losses").matches("on lockkit-lost").count() == loss
        });
    }
    assert!(holder.ask("lock").starts_with("held "));
    wait_for_heartbeats(&terms);
    holder.expect("release", "released");
}

#[test]
fn lease_lost_without_progress_and_kept_with_progress() {
    if wine_cannot_judge(
        "each step of a lease takes milliseconds there, so that a waiter may delay a renewal",
    ) {
        return;
    }
    let (_directory, mut terms) = temp_lease();
    terms.progress = 500;
    let [mut worker, mut next] = [(); 2].map(|()| Actor::start_lease(&terms));
    let first = acquire(&mut worker, "try");
    next.tell_to_wait("lock");
    let start = Instant::now();
    until("three TTLs have passed with progress", || {
        worker.expect("progress", "noted");
        worker.expect("is-held", "yes");
        start.elapsed() > Duration::from_millis(3 * terms.ttl)
    });
    next.expect_silence();
    // From here on it hangs, though its process lives.
    assert!(token_after(&next.answer(), worker.pid()) > first);
    worker.expect("progress", "noted");
    worker.expect("is-held", "no: expired");
    until("the loss is reported", || {
        worker.ask("losses") == "losses (expired on lockkit-lost)"
    });
}
