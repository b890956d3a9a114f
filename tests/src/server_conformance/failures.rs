//! Drills for servers that freeze, restart, fail over, or have a stepped clock.

#![allow(missing_docs, clippy::missing_errors_doc)] // Their names are sentences; an error is why one is left out.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::engine::{Engine, Security};
use super::fixture::{Drill, TestServer, parse_held, remaining, until_renewed};
use super::proxy::Proxy;
use crate::leases::Terms;
use crate::{Actor, LIVELY, until};

pub fn server_frozen_within_ttl_keeps_lease<E: Engine>() -> Drill {
    let server = TestServer::<E>::open()?;
    let terms = Terms {
        ttl: 2 * LIVELY.as_millis() as u64,
        ..server.terms()
    };
    let mut holder = Actor::start_lease(&terms);
    parse_held(&holder.ask("try"));
    let before = remaining(&mut holder);
    server.engine.signal(Signal::STOP);
    // A request times out meanwhile.
    until("some renewals are late", || {
        remaining(&mut holder) + Duration::from_secs(3) < before
    });
    server.engine.signal(Signal::CONT);
    until_renewed(|| remaining(&mut holder));
    holder.expect("is-held", "yes");
    holder.expect("losses", "losses");
    assert!(
        Actor::start_lease(&terms)
            .ask("try")
            .starts_with("error Held")
    );
    Ok(())
}

pub fn server_frozen_beyond_ttl_reports_one_loss_in_time<E: Engine>() -> Drill {
    let server = TestServer::<E>::open()?;
    let terms = server.terms();
    let (mut holder, mut next) = (Actor::start_lease(&terms), Actor::start_lease(&terms));
    let (first, _) = parse_held(&holder.ask("try"));
    server.engine.signal(Signal::STOP);
    let frozen = Instant::now();
    until("it is lost", || holder.ask("is-held") != "yes");
    assert!(
        frozen.elapsed() < LIVELY / 2,
        "the deadline is the lease's, not the server's"
    );
    until("the loss is reported", || holder.ask("losses") != "losses");
    assert!(
        next.ask("try").starts_with("error Store"),
        "a request to a frozen server times out"
    );
    server.engine.signal(Signal::CONT);
    let (token, _) = parse_held(&next.ask("lock"));
    assert!(token > first);
    assert_eq!(holder.ask("losses").matches('(').count(), 1);
    Ok(())
}

pub fn server_restart_keeps_leases_and_growing_tokens<E: Engine>() -> Drill {
    let mut server = TestServer::<E>::open()?;
    let terms = Terms {
        ttl: LIVELY.as_millis() as u64,
        ..server.terms()
    };
    let (mut holder, mut next) = (Actor::start_lease(&terms), Actor::start_lease(&terms));
    let (first, _) = parse_held(&holder.ask("try"));
    server.engine.kill();
    server.engine.restart();
    until_renewed(|| remaining(&mut holder));
    holder.expect("is-held", "yes");
    next.tell_to_wait("lock");
    next.expect_silence();
    holder.expect("release", "released");
    let answer = next.answer();
    let (second, recovered) = parse_held(&answer);
    assert!(second > first && recovered.is_empty(), "{answer}");
    next.expect("release", "released");
    server.engine.kill();
    server.engine.restart();
    let (third, _) = parse_held(&next.ask("lock"));
    assert!(third > second);
    Ok(())
}

pub fn failover_without_grant_gives_second_greater_token<E: Engine>() -> Drill {
    let server = TestServer::<E>::open()?;
    // The holder connects through an address that moves to the granting server.
    let front = Proxy::to(server.engine.port());
    let terms = Terms {
        ttl: 2 * LIVELY.as_millis() as u64,
        heartbeat: 200,
        ..server.terms_through(front.port())
    };
    let mut holder = Actor::start_lease(&terms);
    // Both sides then know a token.
    parse_held(&holder.ask("try"));
    holder.expect("release", "released");
    let copies = Proxy::to(server.engine.port());
    let follower = server.engine.follower(copies.port())?;
    copies.stop();
    let (first, _) = parse_held(&holder.ask("try"));
    follower.promote();

    let follower = TestServer {
        security: Security::None,
        engine: follower,
    };
    let mut next = Actor::start_lease(&Terms {
        ttl: terms.ttl,
        heartbeat: 200,
        ..follower.terms()
    });
    let answer = next.ask("lock-for 30000");
    let (second, recovered) = parse_held(&answer);
    assert!(
        second > first,
        "a resource that checks tokens is safe: {second} after {first}"
    );
    assert_eq!(recovered, "", "there is nothing there of the first");
    until_renewed(|| remaining(&mut holder));
    until_renewed(|| remaining(&mut next));
    holder.expect("is-held", "yes");
    next.expect("is-held", "yes");

    // The holder's next heartbeat that reaches the server which grants now ends the lease.
    front.move_to(follower.engine.port());
    assert!(holder.ask("wait-lost").starts_with("lost taken over"));
    next.expect("is-held", "yes");
    assert!(holder.ask("try").starts_with("error Held"));
    next.expect("release", "released");
    let (third, _) = parse_held(&holder.ask("lock-for 30000"));
    assert!(third > second);
    Ok(())
}

pub fn stepped_server_clock_keeps_tokens_growing<E: Engine>() -> Drill {
    let (server, clock) = TestServer::<E>::with_clock()?;
    let terms = Terms {
        ttl: LIVELY.as_millis() as u64,
        ..server.terms()
    };
    let (mut one, mut other) = (Actor::start_lease(&terms), Actor::start_lease(&terms));
    let mut last = 0;
    for step in [0, 3600, -3600, 0] {
        let (token, _) = parse_held(&one.ask("lock-for 30000"));
        assert!(token > last);
        last = token;
        clock.set(step);
        until_renewed(|| remaining(&mut one));
        // When the clock was ahead, the lease was expired for a moment. The heartbeat has renewed
        // it, because no other process acquired it.
        one.expect("is-held", "yes");
        assert!(other.ask("try").starts_with("error Held"));
        one.expect("release", "released");
        let answer = other.ask("lock-for 30000");
        let (token, recovered) = parse_held(&answer);
        assert!(token > last && recovered.is_empty(), "{answer}");
        last = token;
        other.expect("release", "released");
    }
    Ok(())
}

pub fn clock_stepped_ahead_grants_with_greater_token<E: Engine>() -> Drill {
    let (server, clock) = TestServer::<E>::with_clock()?;
    // No lease is renewed before the drill is over.
    let terms = Terms {
        ttl: 300_000,
        heartbeat: 60_000,
        ..server.terms()
    };
    let (mut holder, mut next) = (Actor::start_lease(&terms), Actor::start_lease(&terms));
    let (first, _) = parse_held(&holder.ask("try"));
    assert!(next.ask("try").starts_with("error Held"));
    clock.set(3600);
    let answer = next.ask("lock-for 30000");
    let (second, recovered) = parse_held(&answer);
    assert!(
        second > first && recovered == format!("recovered {}", holder.pid()),
        "{answer}"
    );
    assert!(holder.ask("release").starts_with("error LeaseLost"));
    next.expect("release", "released");
    // After the clock is set back, the tokens continue to grow.
    clock.set(-3600);
    let (third, _) = parse_held(&holder.ask("lock-for 30000"));
    assert!(third > second);
    Ok(())
}
