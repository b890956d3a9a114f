//! Drills for connections: their number, credentials, TLS, and addresses without an answer.

#![allow(missing_docs, clippy::missing_errors_doc)] // Their names are sentences; an error is why one is left out.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use lockkit::{ErrorKind, Wait};

use super::certificates::Certificates;
use super::engine::{Access, Engine, PASSWORD, Security};
use super::fixture::{Drill, TestServer, parse_held, remaining, until_renewed, with_long_ttl};
use super::proxy::Proxy;
use crate::leases::Terms;
use crate::{Actor, LIVELY, until};

pub fn many_leases_share_few_connections<E: Engine>() -> Drill {
    const MANY: usize = 100;
    let server = TestServer::<E>::open()?;
    let proxy = Proxy::to(server.engine.port());
    let url = |n: usize| {
        let url = server.engine.url(
            proxy.port(),
            Access::Right(&server.security),
            &format!("many-{n}"),
        );
        url.expect("the right way is always there")
    };
    let ttl = LIVELY.as_millis() as u64;
    let open = |n| {
        Terms {
            ttl,
            heartbeat: 100,
            ..Terms::of(url(n))
        }
        .open()
    };
    let guards: Vec<_> = (0..MANY)
        .map(|n| open(n).lock_for(LIVELY).expect("free"))
        .collect();
    let before: Vec<_> = guards.iter().map(|guard| guard.remaining()).collect();
    let start = Instant::now();
    until("all leases are renewed", || {
        guards.iter().zip(&before).all(|(guard, before)| {
            guard.remaining() + start.elapsed() > *before + Duration::from_millis(50)
        })
    });
    assert!(
        proxy.connections() <= 10,
        "{} connections",
        proxy.connections()
    );
    assert!(guards.iter().all(|guard| guard.is_held()));
    Ok(())
}

pub fn forked_child_opens_own_connections<E: Engine>() -> Drill {
    let server = TestServer::<E>::open()?;
    let terms = server.terms();
    let mut holder = Actor::start_lease(&terms);
    parse_held(&holder.ask("try"));
    let other = server
        .engine
        .url(
            server.engine.port(),
            Access::Right(&server.security),
            "other",
        )
        .expect("a URL");
    holder.expect(&format!("fork {other}"), "parted");
    holder.expect("is-held", "yes");
    until_renewed(|| remaining(&mut holder));
    assert!(
        Actor::start_lease(&terms)
            .ask("try")
            .starts_with("error Held")
    );
    holder.expect("release", "released");
    Ok(())
}

pub fn wrong_password_error_names_password<E: Engine>() -> Drill {
    let server = TestServer::<E>::with(Security::Password)?;
    drop(
        server
            .terms()
            .open()
            .lock_for(LIVELY)
            .expect("the right one opens"),
    );
    let error = server.refusal(server.engine.port(), Access::WrongPassword)?;
    assert!(error.contains("password"), "{error}");
    assert!(
        !error.contains("barley") && !error.contains(PASSWORD),
        "{error}"
    );
    Ok(())
}

pub fn wrong_database_error_names_database<E: Engine>() -> Drill {
    let server = TestServer::<E>::open()?;
    let error = server.refusal(server.engine.port(), Access::WrongDatabase)?;
    assert!(error.contains("database"), "{error}");
    Ok(())
}

pub fn lease_over_tls_with_or_without_certificate_works<E: Engine>() -> Drill {
    for security in [Security::Tls, Security::ClientCertificate] {
        let server = TestServer::<E>::with(security(Certificates::new()?))?;
        let terms = with_long_ttl(server.terms());
        let (mut holder, mut next) = (Actor::start_lease(&terms), Actor::start_lease(&terms));
        let (first, _) = parse_held(&holder.ask("lock-for 30000"));
        next.tell_to_wait("lock");
        holder.expect("release", "released");
        assert!(parse_held(&next.answer()).0 > first);
    }
    Ok(())
}

pub fn tls_mismatch_error_names_cause<E: Engine>() -> Drill {
    let assert_contains =
        |error: String, word: &str| assert!(error.contains(word), "no {word} in {error}");
    let plain = TestServer::<E>::open()?;
    let certificates = Certificates::new()?;
    assert_contains(
        plain.refusal(plain.engine.port(), Access::Tls(&certificates.ca()))?,
        "TLS",
    );
    let stranger = certificates.stranger();
    let secure = TestServer::<E>::with(Security::Tls(certificates))?;
    assert_contains(
        secure.refusal(secure.engine.port(), Access::Right(&Security::None))?,
        "TLS",
    );
    assert_contains(
        secure.refusal(secure.engine.port(), Access::Tls(&stranger))?,
        "certificate",
    );
    let mutual = TestServer::<E>::with(Security::ClientCertificate(Certificates::new()?))?;
    let Security::ClientCertificate(certificates) = &mutual.security else {
        unreachable!("just made")
    };
    assert_contains(
        mutual.refusal(mutual.engine.port(), Access::Tls(&certificates.ca()))?,
        "certificate",
    );
    Ok(())
}

pub fn too_old_server_error_names_cause<E: Engine>() -> Drill {
    let answer = E::OLD.ok_or("this engine has no imitation of an old version")?;
    let server = TestServer::<E>::open()?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let port = listener.local_addr().expect("an address").port();
    // The thread ends with the process.
    std::thread::spawn(move || listener.incoming().flatten().for_each(answer));
    let error = server.refusal(port, Access::Right(&Security::None))?;
    assert!(error.contains("too old"), "{error}");
    Ok(())
}

pub fn silent_address_fails_within_time_limit<E: Engine>() -> Drill {
    let server = TestServer::<E>::open()?;
    // The first listener accepts connections and never answers. The second listener's queue is
    // full, so it does not even accept: the kernel drops the first packet of a connection.
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let full = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    rustix::net::listen(&full, 0).expect("it listens");
    let address = full.local_addr().expect("an address");
    let soon = Duration::from_millis(200);
    let mut queue = Vec::new();
    while let Ok(connection) = TcpStream::connect_timeout(&address, soon) {
        queue.push(connection);
    }
    for listener in [&silent, &full] {
        let port = listener.local_addr().expect("an address").port();
        let lease = server.terms_through(port).open();
        let waits = [
            Wait::none(),
            Wait::at_most(Duration::from_millis(100)),
            Wait::at_most(LIVELY),
        ];
        for wait in waits {
            let start = Instant::now();
            let error = lease
                .acquire(&wait)
                .expect_err("the address does not answer");
            assert!(matches!(error.kind(), ErrorKind::Store { .. }), "{error}");
            // Each of five attempts has a quarter of the TTL.
            assert!(start.elapsed() < LIVELY, "{:?}", start.elapsed());
        }
        assert!(lease.status().is_err());
    }
    Ok(())
}
