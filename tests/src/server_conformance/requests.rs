//! Drills for requests whose connection is cut at any byte.

#![allow(missing_docs, clippy::missing_errors_doc)] // Their names are sentences; an error is why one is left out.

use std::cell::OnceCell;
use std::thread;
use std::time::Duration;

use lockkit::{ErrorKind, LeaseGuard, LeaseStatus};

use super::engine::Engine;
use super::fixture::{
    Drill, TestServer, lease_with_fast_retries, retry_once, token_of, until_renewed, with_long_ttl,
};
use super::proxy::{Direction, Proxy};
use crate::leases::Terms;
use crate::{LIVELY, until};

pub fn acquire_cut_anywhere_gets_same_grant<E: Engine>() -> Drill {
    let server = TestServer::<E>::open()?;
    let (direct, mut last) = (with_long_ttl(server.terms()).open(), 0);
    server.cut_everywhere(|proxy| {
        let guard = lease_with_fast_retries(&with_long_ttl(server.terms_through(proxy.port())))
            .lock_for(LIVELY)
            .expect("the lease");
        proxy.cut_nothing();
        assert!(guard.token() > last && guard.recovered().is_none());
        last = guard.token();
        assert!(direct.try_lock().expect_err("it is held").is_held());
        assert_eq!(token_of(&direct), Some(guard.token()), "the same grant");
        guard.release().expect("it is held");
        assert_eq!(token_of(&direct), None);
    });
    Ok(())
}

pub fn renew_cut_anywhere_keeps_lease<E: Engine>() -> Drill {
    let server = TestServer::<E>::open()?;
    let (direct, kept) = (server.terms().open(), OnceCell::new());
    server.cut_everywhere_then(
        |proxy| {
            let terms = server.terms_through(proxy.port());
            let terms = Terms {
                ttl: LIVELY.as_millis() as u64,
                heartbeat: 20,
                ..terms
            };
            let guard: &LeaseGuard = kept.get_or_init(|| terms.open().try_lock().expect("free"));
            until_renewed(|| guard.remaining());
        },
        |proxy, ()| {
            let guard = kept.get().expect("it is prepared");
            until("it was cut, if it is to be", || !proxy.is_to_cut());
            until_renewed(|| guard.remaining());
            assert_eq!(token_of(&direct), Some(guard.token()), "the same grant");
            assert!(direct.try_lock().expect_err("it is held").is_held());
        },
    );
    Ok(())
}

pub fn release_cut_anywhere_frees_name<E: Engine>() -> Drill {
    let server = TestServer::<E>::open()?;
    let (direct, mut last) = (with_long_ttl(server.terms()).open(), 0);
    server.cut_everywhere_then(
        |proxy| {
            lease_with_fast_retries(&with_long_ttl(server.terms_through(proxy.port())))
                .lock_for(LIVELY)
                .expect("the lease")
        },
        |proxy, guard| {
            let token = guard.token();
            // A waiter may acquire before the repeated release.
            let (released, next) = thread::scope(|scope| {
                let waiter = scope.spawn(|| direct.lock_for(LIVELY));
                (guard.release(), waiter.join().expect("no panic"))
            });
            let is_lost =
                |error: &lockkit::Error| matches!(error.kind(), ErrorKind::LeaseLost { .. });
            assert!(
                !released.as_ref().is_err_and(is_lost),
                "no other client acquired before the release: {released:?}"
            );
            // The heartbeat completes a failed release.
            let next = next.expect("the name is free");
            assert!(next.token() > token.max(last) && next.recovered().is_none());
            last = next.token();
            next.release().expect("it is held");
            proxy.cut_nothing();
        },
    );
    Ok(())
}

pub fn status_and_evict_cut_anywhere_can_be_repeated<E: Engine>() -> Drill {
    let server = TestServer::<E>::open()?;
    let (direct, mut last) = (with_long_ttl(server.terms()).open(), 0);
    server.cut_everywhere_then(
        |proxy| {
            (
                with_long_ttl(server.terms_through(proxy.port())).open(),
                direct.lock_for(LIVELY).expect("free"),
            )
        },
        |proxy, (lease, guard)| {
            assert!(guard.token() > last && guard.recovered().is_none());
            last = guard.token();
            let LeaseStatus::Held(seen) = retry_once(|| lease.status()) else {
                panic!("it is held")
            };
            assert_eq!(seen.token(), Some(last));
            assert!(
                retry_once(|| lease.evict(&seen)),
                "it is done, whichever of the two did it"
            );
            proxy.cut_nothing();
            assert_eq!(token_of(&direct), None);
            // A late eviction has no effect on the next holder.
            let next = direct.lock_for(LIVELY).expect("free");
            assert!(!lease.evict(&seen).expect("nothing is cut"));
            assert_eq!(token_of(&direct), Some(next.token()));
            next.release().expect("it is held");
        },
    );
    Ok(())
}

pub fn cut_of_distant_connection_keeps_lease<E: Engine>() -> Drill {
    /// The delay in each direction. A new connection takes several round trips.
    const WAY: Duration = Duration::from_millis(80);
    let server = TestServer::<E>::open()?;
    let proxy = Proxy::to(server.engine.port());
    let terms = Terms {
        ttl: 8000,
        heartbeat: 100,
        ..server.terms_through(proxy.port())
    };
    let guard = terms.open().lock_for(LIVELY).expect("free");
    proxy.slow_down(WAY);
    for _ in 0..2 {
        proxy.cut_after(Direction::Answer, 1);
        until("it was cut", || !proxy.is_to_cut());
        until_renewed(|| guard.remaining());
    }
    assert!(guard.is_held());
    Ok(())
}
