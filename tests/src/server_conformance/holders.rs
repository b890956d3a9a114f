//! Drills for holders: death, silence, a stop, and an answer that never came.

#![allow(missing_docs, clippy::missing_errors_doc)] // Their names are sentences; an error is why one is left out.

use std::time::Duration;

use lockkit::{LeaseGuard, LeaseStatus, Owner};
use rustix::process::Signal;

use super::engine::Engine;
use super::fixture::{
    Drill, TestServer, assert_reports_death, parse_held, start_in_pid_namespace, with_long_ttl,
};
use super::proxy::{Direction, Proxy};
use crate::leases::Terms;
use crate::{Actor, LIVELY, leases};

pub fn killed_local_holder_is_taken_over_at_once<E: Engine>() -> Drill {
    let server = TestServer::<E>::open()?;
    let terms = with_long_ttl(server.terms());
    let (mut holder, mut next) = (Actor::start_lease(&terms), Actor::start_lease(&terms));
    let (first, _) = parse_held(&holder.ask("try"));
    next.tell_to_wait("lock");
    holder.kill();
    assert_reports_death(&next.answer(), holder.pid(), first);
    Ok(())
}

pub fn status_of_dead_holder_reports_no_time_left<E: Engine>() -> Drill {
    let server = TestServer::<E>::open()?;
    let terms = with_long_ttl(server.terms());
    let (lease, mut holder) = (terms.open(), Actor::start_lease(&terms));
    parse_held(&holder.ask("try"));
    let is_over = || match lease.status().expect("the server answers") {
        LeaseStatus::Held(seen) => seen.expires_in() == Some(Duration::ZERO),
        other => panic!("no holder released the lease: {other:?}"),
    };
    assert!(!is_over());
    holder.kill();
    assert!(is_over());
    Ok(())
}

pub fn silent_remote_holder_expires_and_next_guard_reports_it<E: Engine>() -> Drill {
    let server = TestServer::<E>::open()?;
    let terms = server.terms();
    let Some(mut remote) = start_in_pid_namespace(&terms) else {
        return Err("this machine does not let the test make a pid namespace".to_owned());
    };
    let mut next = Actor::start_lease(&terms);
    let (first, _) = parse_held(&remote.ask("try"));
    remote.kill();
    assert!(
        next.ask("try").starts_with("error Held"),
        "no local process can determine that the holder is dead"
    );
    let answer = next.ask("lock");
    let (token, recovered) = parse_held(&answer);
    assert!(
        token > first && recovered.starts_with("recovered "),
        "{answer}"
    );
    next.expect("release", "released");
    assert_eq!(parse_held(&next.ask("lock")).1, "", "once");
    Ok(())
}

pub fn holder_stopped_beyond_ttl_sees_loss_on_resume<E: Engine>() -> Drill {
    let server = TestServer::<E>::open()?;
    let terms = server.terms();
    let (mut holder, mut next) = (Actor::start_lease(&terms), Actor::start_lease(&terms));
    let (first, _) = parse_held(&holder.ask("try"));
    holder.signal(Signal::STOP);
    assert_reports_death(&next.ask("lock"), holder.pid(), first);
    holder.tell("is-held");
    holder.signal(Signal::CONT);
    assert!(holder.answer().starts_with("no: "));
    next.expect("is-held", "yes");
    Ok(())
}

pub fn late_grant_of_timed_out_waiter_is_freed<E: Engine>() -> Drill {
    let server = TestServer::<E>::open()?;
    let terms = with_long_ttl(server.terms());
    let (mut waiter, mut next) = (Actor::start_lease(&terms), Actor::start_lease(&terms));
    for _ in 0..3 {
        // The connection then exists, so only the request is missing.
        parse_held(&waiter.ask("try"));
        waiter.expect("release", "released");
        server.engine.signal(Signal::STOP);
        let answer = waiter.ask("lock-for 50");
        assert!(
            answer.starts_with("error Store"),
            "the server did not report a holder: {answer}"
        );
        server.engine.signal(Signal::CONT);
        // The first waiter lives. So only it can release the name before the TTL has passed, which
        // is long after this waiter's timeout.
        let answer = next.ask(&format!("lock-for {}", LIVELY.as_millis() / 2));
        let (_, recovered) = parse_held(&answer);
        assert!(recovered.is_empty(), "no holder died: {answer}");
        next.expect("release", "released");
    }
    waiter.expect("is-held", "error NotHeld");
    Ok(())
}

pub fn acquire_after_timed_out_waiter_reports_dead_holder<E: Engine>() -> Drill {
    const CUTS: u64 = 24;
    let server = TestServer::<E>::open()?;
    let (terms, proxy) = (
        with_long_ttl(server.terms()),
        Proxy::to(server.engine.port()),
    );
    let through = with_long_ttl(server.terms_through(proxy.port()));
    let (direct, waiter) = (
        terms.open(),
        through
            .builder()
            .acquire_retry_limit(0)
            .build()
            .expect("they go together"),
    );
    let leave_dead_holder = || {
        let mut holder = Actor::start_lease(&terms);
        parse_held(&holder.ask("try"));
        holder.kill();
        holder.pid()
    };
    let recovered = |guard: &LeaseGuard| {
        guard
            .recovered()
            .and_then(|recovered| recovered.owner())
            .map(Owner::pid)
    };
    // The first round opens the connection, and the second measures the length of the answers.
    let mut length = 0;
    for _ in 0..2 {
        let (died, before) = (leave_dead_holder(), proxy.passed(Direction::Answer));
        let guard = waiter.try_lock().expect("its holder is dead");
        length = proxy.passed(Direction::Answer) - before;
        assert_eq!(recovered(&guard), Some(died));
        guard.release().expect("it is held");
    }
    let mut timed_out_count = 0;
    for cut in 1..=CUTS {
        let died = leave_dead_holder();
        let cut_next = || proxy.cut_off_after(Direction::Answer, length * cut / CUTS);
        cut_next();
        let acquired = waiter.try_lock().or_else(|_| {
            // The second attempt may find the name held by the waiter's own unknown grant.
            cut_next();
            waiter.try_lock()
        });
        proxy.cut_nothing();
        // The waiter lives, so only it can release the name before the TTL has passed.
        timed_out_count += u64::from(acquired.is_err());
        let guard = acquired
            .or_else(|_| direct.lock_for(LIVELY / 2))
            .expect("it is free, or given back");
        assert_eq!(
            recovered(&guard),
            Some(died),
            "after {cut} of {CUTS} parts of the answers"
        );
        guard.release().expect("it is held");
    }
    assert!(timed_out_count > CUTS / 8, "{timed_out_count} of {CUTS}");
    Ok(())
}

pub fn stopped_holder_never_overlaps_next_holder<E: Engine>() -> Drill {
    let server = TestServer::<E>::open()?;
    let seconds = std::env::var("LOCKKIT_CHAOS_SECONDS")
        .map_or(10, |text| text.parse().expect("whole seconds"));
    let ttl = if E::TTL < 2000 { 300 } else { E::TTL };
    // A hold lasts for a TTL if its holder is stopped or killed, or half of one.
    let span = Duration::from_secs(seconds).max(Duration::from_millis(12 * ttl));
    let tally = leases::run(
        &Terms {
            ttl,
            heartbeat: ttl / 10,
            ..server.terms()
        },
        span,
    );
    println!("{tally:?}");
    assert!(
        tally.holds > 4 && tally.kills > 4,
        "it was no chaos: {tally:?}"
    );
    Ok(())
}
