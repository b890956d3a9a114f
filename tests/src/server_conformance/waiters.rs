//! Drills for waiters: they sleep until a release, a restart, or a cancellation.

#![allow(missing_docs, clippy::missing_errors_doc)] // Their names are sentences; an error is why one is left out.

use std::thread;
use std::time::{Duration, Instant};

use lockkit::{CancelToken, ErrorKind, Lease, Wait};

use super::engine::Engine;
use super::fixture::{
    Drill, TestServer, assert_reports_death, lease_with_fast_retries, parse_held,
    start_in_pid_namespace, until_quiet, until_renewed, with_long_ttl,
};
use super::proxy::{Direction, Proxy};
use crate::leases::Terms;
use crate::{Actor, LIVELY, sleeps, thread_id, until};

pub fn waiter_sends_no_request_until_release_wakes_it<E: Engine>() -> Drill {
    let server = TestServer::<E>::open()?;
    let proxy = Proxy::to(server.engine.port());
    let guard = with_long_ttl(server.terms())
        .open()
        .try_lock()
        .expect("free");
    let mut waiter = Actor::start_lease(&with_long_ttl(server.terms_through(proxy.port())));
    waiter.tell("lock");
    until_quiet(&proxy);
    waiter.expect_silence();
    let token = guard.token();
    guard.release().expect("it is held");
    let answer = waiter.answer();
    assert!(
        parse_held(&answer).0 > token && parse_held(&answer).1.is_empty(),
        "{answer}"
    );
    Ok(())
}

pub fn release_after_takeover_wakes_remote_waiter<E: Engine>() -> Drill {
    let server = TestServer::<E>::open()?;
    let terms = with_long_ttl(server.terms());
    let mut holder = Actor::start_lease(&terms);
    let first = parse_held(&holder.ask("try")).0;
    // It cannot see the holder die.
    let proxy = Proxy::to(server.engine.port());
    let Some(mut remote) =
        start_in_pid_namespace(&with_long_ttl(server.terms_through(proxy.port())))
    else {
        return Err("this machine does not let the test make a pid namespace".to_owned());
    };
    remote.tell("lock");
    until_quiet(&proxy);
    let pid = holder.pid();
    holder.kill();
    let mut next = Actor::start_lease(&terms);
    let answer = next.ask("lock");
    assert_reports_death(&answer, pid, first);
    let token = parse_held(&answer).0;
    until_quiet(&proxy);
    remote.expect_silence();
    next.expect("release", "released");
    let answer = remote.answer();
    assert!(
        parse_held(&answer).0 > token && parse_held(&answer).1.is_empty(),
        "{answer}"
    );
    Ok(())
}

pub fn waiter_cut_anywhere_is_woken_by_release<E: Engine>() -> Drill {
    /// A waiter that has been silent for this long has checked the lease, and is parked.
    const QUIET: Duration = Duration::from_millis(30);
    let server = TestServer::<E>::open()?;
    let direct = with_long_ttl(server.terms()).open();
    server.cut_everywhere_then(
        |_| direct.lock_for(LIVELY).expect("the lease is free"),
        |proxy, guard| {
            let waiter =
                lease_with_fast_retries(&with_long_ttl(server.terms_through(proxy.port())));
            let token = guard.token();
            let passed = || [Direction::Request, Direction::Answer].map(|way| proxy.passed(way));
            let before = passed();
            let next = thread::scope(|scope| {
                let next = scope.spawn(|| waiter.lock_for(LIVELY));
                let (mut last, mut since) = (before, Instant::now());
                until("the waiter is parked", || {
                    let now = passed();
                    if now != last || now == before {
                        (last, since) = (now, Instant::now());
                    }
                    since.elapsed() > QUIET
                });
                // The remaining cut may hit this release's notification. If the release fails at
                // first, the heartbeat completes it.
                drop(guard);
                next.join().expect("no panic")
            });
            // The TTL is far longer than the waiter's timeout.
            let next = next.expect("it was woken");
            assert!(next.token() > token && next.recovered().is_none());
            proxy.cut_nothing();
        },
    );
    Ok(())
}

pub fn waiter_with_retries_survives_server_restart<E: Engine>() -> Drill {
    let mut server = TestServer::<E>::open()?;
    let terms = with_long_ttl(Terms {
        heartbeat: 100,
        ..server.terms()
    });
    let guard = terms.open().lock_for(LIVELY).expect("the lease is free");
    let [few_retries, many_retries] = [4, 10_000].map(|limit| {
        let delay = Duration::from_millis(25);
        let builder = terms
            .builder()
            .acquire_retry_limit(limit)
            .acquire_retry_delay(delay);
        builder.build().expect("options that go together")
    });
    let (send, threads) = std::sync::mpsc::channel();
    let wait = |lease: &Lease| {
        send.send(thread_id()).expect("it is waited for");
        lease.acquire(&Wait::at_most(4 * LIVELY))
    };
    thread::scope(|scope| {
        let [few_retries, many_retries] =
            [&few_retries, &many_retries].map(|lease| scope.spawn(move || wait(lease)));
        for thread in threads.iter().take(2) {
            until("the waiter sleeps", || sleeps(std::process::id(), thread));
        }
        server.engine.kill();
        let error = few_retries
            .join()
            .expect("no panic")
            .expect_err("the server is gone");
        assert!(matches!(error.kind(), ErrorKind::Store { .. }), "{error}");
        assert!(!many_retries.is_finished());
        server.engine.restart();
        until_renewed(|| guard.remaining());
        assert!(guard.is_held() && !many_retries.is_finished());
        let token = guard.token();
        guard.release().expect("it is held");
        let next = many_retries
            .join()
            .expect("no panic")
            .expect("the server is back");
        assert!(next.token() > token && next.recovered().is_none());
    });
    Ok(())
}

pub fn cancelled_server_waiter_returns_at_once<E: Engine>() -> Drill {
    let server = TestServer::<E>::open()?;
    let lease = with_long_ttl(server.terms()).open();
    let _guard = lease.try_lock().expect("free");
    let token = CancelToken::new();
    std::thread::scope(|scope| {
        let (send, thread) = std::sync::mpsc::channel();
        let (lease, token) = (&lease, &token);
        let waiter = scope.spawn(move || {
            send.send(thread_id()).expect("it is waited for");
            lease.acquire(&Wait::forever().or_cancelled(token))
        });
        let thread = thread.recv().expect("the thread says who it is");
        until("the waiter sleeps", || sleeps(std::process::id(), thread));
        let start = Instant::now();
        token.cancel();
        assert!(
            waiter
                .join()
                .expect("no panic")
                .expect_err("it is held")
                .is_cancelled()
        );
        assert!(start.elapsed() < LIVELY);
    });
    Ok(())
}
