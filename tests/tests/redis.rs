//! Leases on Redis: every case of the suite, every drill, and cases of Redis alone.

#![cfg(target_os = "linux")]

use std::io::{Read, Write};
use std::net::TcpStream;

use lockkit::lease::StoreError;
use lockkit::{ErrorKind, Lease, LeaseStatus, LossReason, Wait};
use lockkit_tests::errors::with_causes;
use lockkit_tests::server_conformance::redis::Redis;
use lockkit_tests::server_conformance::{Access, Engine, Proxy, Security};
use lockkit_tests::{LIVELY, conformance, drills, left_out, until};

conformance!(redis_lease, lockkit_tests::Kind::REDIS);
drills!(
    redis_drills,
    lockkit_tests::server_conformance::redis::Redis
);

/// Starts a server for this test. Returns `None` if none is available.
fn server() -> Option<Redis> {
    Redis::start(&Security::None, None).map_err(left_out).ok()
}

fn url(server: &Redis) -> String {
    server
        .url(server.port(), Access::Right(&Security::None), "own")
        .unwrap()
}

fn lease(url: &str) -> Lease {
    Lease::connect(url)
        .ttl(LIVELY)
        .heartbeat(std::time::Duration::from_millis(20))
        .build()
        .unwrap()
}

#[test]
fn holder_restores_lost_record_unless_taken_over() {
    let Some(server) = server() else { return };
    let (holder, next) = (lease(&url(&server)), lease(&url(&server)));
    let guard = holder.try_lock().unwrap();
    assert_eq!(server.tell("FLUSHALL"), "+OK");
    until("the holder has put it back", || {
        server.tell("EXISTS lockkit:{own}") == ":1"
    });
    assert!(next.try_lock().unwrap_err().is_held());
    assert!(guard.is_held());
    let token = guard.token();
    // The same holds if the release comes first.
    assert_eq!(server.tell("FLUSHALL"), "+OK");
    guard.release().unwrap();
    let second = next.try_lock().unwrap();
    assert!(second.token() > token && second.recovered().is_none());
    // Another process was faster.
    let slow = Lease::connect(url(&server)).ttl(LIVELY).build().unwrap();
    drop(second);
    let guard = slow.lock().unwrap();
    let script = "EVAL \"redis.call('DEL', KEYS[1]) redis.call('HSET', KEYS[1], 'token', '9000000000000000', 'claim', \
                  '1', 'state', 'held', 'until', '9000000000000000', 'owner', '')\" 1 lockkit:{own}";
    server.tell(script);
    let reason = guard.lost().wait(&Wait::at_most(LIVELY)).unwrap();
    assert!(matches!(reason, LossReason::TakenOver { .. }), "{reason}");
}

#[test]
fn foreign_value_under_key_refused_and_unchanged() {
    let Some(server) = server() else { return };
    server.tell("SET lockkit:{own} treasure");
    let error = with_causes(&lease(&url(&server)).try_lock().unwrap_err());
    assert!(error.contains("contains something else"), "{error}");
    assert!(server.tell("GET lockkit:{own}").ends_with("treasure"));
}

#[test]
fn acquire_on_replica_error_names_primary() {
    let (Some(primary), Some(replica)) = (server(), server()) else {
        return;
    };
    assert_eq!(
        replica.tell(&format!("REPLICAOF 127.0.0.1 {}", primary.port())),
        "+OK"
    );
    until("it is in step", || {
        replica
            .tell("INFO replication")
            .contains("master_link_status:up")
    });
    let error = with_causes(&lease(&url(&replica)).try_lock().unwrap_err());
    assert!(
        error.contains("replica") && error.contains("primary"),
        "{error}"
    );
    assert!(
        matches!(
            lease(&url(&replica)).status(),
            Ok(lockkit::LeaseStatus::Free)
        ),
        "it can be asked"
    );
}

#[test]
fn renew_after_failover_moves_to_new_primary() {
    let (Some(before), Some(after)) = (server(), server()) else {
        return;
    };
    assert_eq!(
        after.tell(&format!("REPLICAOF 127.0.0.1 {}", before.port())),
        "+OK"
    );
    until("it is in step", || {
        after
            .tell("INFO replication")
            .contains("master_link_status:up")
    });
    let proxy = Proxy::to(before.port());
    let guard = lease(
        &before
            .url(proxy.port(), Access::Right(&Security::None), "own")
            .unwrap(),
    )
    .try_lock()
    .unwrap();
    until("it is copied", || {
        after.tell("EXISTS lockkit:{own}") == ":1"
    });
    // The test cuts no connection.
    proxy.lead_to(after.port());
    assert_eq!(after.tell("REPLICAOF NO ONE"), "+OK");
    assert_eq!(
        before.tell(&format!("REPLICAOF 127.0.0.1 {}", after.port())),
        "+OK"
    );
    let ends = || after.tell("HGET lockkit:{own} until");
    let first = ends();
    until("the holder renews there", || ends() != first);
    assert!(guard.is_held());
}

#[test]
fn redis_acquire_without_free_client_fails_then_recovers() {
    let Some(server) = server() else { return };
    if !server
        .tell("ACL SETUSER leases on >secret +@all ~* &*")
        .starts_with("+OK")
    {
        return left_out("this version has no rules for users");
    }
    assert_eq!(server.tell("CONFIG SET maxclients 1"), "+OK");
    let mut other = None;
    until("the only one is another", || {
        let mut connection = TcpStream::connect(("127.0.0.1", server.port())).unwrap();
        let mut answer = [0; 7];
        let asked = connection
            .write_all(b"PING\r\n")
            .and_then(|()| connection.read_exact(&mut answer));
        other = Some(connection);
        asked.is_ok() && answer == *b"+PONG\r\n"
    });
    let lease = lease(&format!(
        "redis://leases:secret@127.0.0.1:{}/own",
        server.port()
    ));
    let error = lease.try_lock().unwrap_err();
    let is_refused = matches!(
        error.kind(),
        ErrorKind::Store {
            source: StoreError::NotApplied(_),
            ..
        }
    );
    assert!(
        is_refused && with_causes(&error).contains("max number of clients"),
        "{}",
        with_causes(&error)
    );
    drop(other);
    until("there is room", || lease.try_lock().is_ok());
}

#[test]
fn redis_acquire_after_script_flush_succeeds() {
    let Some(server) = server() else { return };
    let lease = lease(&url(&server));
    for _ in 0..2 {
        lease.try_lock().unwrap().release().unwrap();
        assert_eq!(server.tell("SCRIPT FLUSH"), "+OK");
    }
}

#[test]
fn lease_over_unix_socket_is_same_lease() {
    let Some(server) = server() else { return };
    let socket = server.socket();
    let through = lease(&format!("redis+unix://{}?lease=own", socket.display()));
    let guard = through.try_lock().unwrap();
    assert!(lease(&url(&server)).try_lock().unwrap_err().is_held());
    guard.release().unwrap();
    assert!(lease(&url(&server)).try_lock().is_ok());
}

#[test]
fn same_name_in_other_database_is_separate_lease() {
    let Some(server) = server() else { return };
    let of = |database: u32| {
        lease(&format!(
            "redis://127.0.0.1:{}/{database}/own",
            server.port()
        ))
    };
    let (_one, _other) = (of(1).try_lock().unwrap(), of(2).try_lock().unwrap());
    assert!(of(1).try_lock().unwrap_err().is_held());
}

#[test]
fn user_with_documented_permissions_can_use_lease() {
    let Some(server) = server() else { return };
    let rules = "+@hash +@scripting +@pubsub +time ~lockkit:* &lockkit:*";
    if !server
        .tell(&format!("ACL SETUSER leases on >secret {rules}"))
        .starts_with("+OK")
    {
        return left_out("this version has no rules for users");
    }
    let url = |database| {
        format!(
            "redis://leases:secret@127.0.0.1:{}{database}/own",
            server.port()
        )
    };
    let guard = lease(&url("")).try_lock().unwrap();
    let waiter = lease(&url(""));
    let waiter = std::thread::spawn(move || waiter.lock_for(LIVELY).map(|guard| guard.token()));
    until("it listens", || server.tell("PUBSUB NUMPAT") == ":1");
    let token = guard.token();
    guard.release().unwrap();
    assert!(waiter.join().unwrap().unwrap() > token);
    // A user that may not subscribe gets an error immediately, without a wait.
    assert!(
        server
            .tell(&format!(
                "ACL SETUSER deaf on >secret {rules} resetchannels"
            ))
            .starts_with("+OK")
    );
    let deaf = lease(&format!(
        "redis://deaf:secret@127.0.0.1:{}/own",
        server.port()
    ));
    let guard = deaf.try_lock().unwrap();
    let error = with_causes(&deaf.lock_for(LIVELY).unwrap_err());
    assert!(
        error.contains("leases need the permissions") && error.contains("&lockkit:*"),
        "{error}"
    );
    guard.release().unwrap();
    let error = with_causes(&lease(&url("/1")).try_lock().unwrap_err());
    assert!(
        error.contains(rules) && error.contains("+select"),
        "{error}"
    );
    assert_eq!(server.tell("ACL SETUSER leases +select"), "+OK");
    drop(lease(&url("/1")).try_lock().unwrap());
}

#[test]
fn acquire_after_evict_reports_no_recovery() {
    let Some(server) = server() else { return };
    let (holder, next) = (lease(&url(&server)), lease(&url(&server)));
    let guard = holder.try_lock().unwrap();
    let LeaseStatus::Held(seen) = next.status().unwrap() else {
        panic!("it is held")
    };
    assert!(next.evict(&seen).unwrap());
    let reason = guard.lost().wait(&Wait::at_most(LIVELY)).unwrap();
    assert!(matches!(reason, LossReason::TakenOver { .. }), "{reason}");
    let second = next.try_lock().unwrap();
    assert!(second.token() > guard.token() && second.recovered().is_none());
}

#[test]
fn invalid_redis_url_is_refused_without_showing_password() {
    for wrong in [
        "redis://:secret@host/x?ca=/p",
        "rediss://:secret@host/x?cert=/p",
        "rediss://:secret@host/x?ca=/p&ca=/q",
        "redis://:secret@host/x?colour=blue",
        "rediss://:secret@host#insecure/x",
        "redis://:secret@host:port/x",
        "redis://:secret?x@host/x",
        "redis://:x?secret@host/x",
    ] {
        let error = Lease::connect(wrong).build().unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::InvalidUrl { .. }),
            "{wrong}: {error}"
        );
        assert!(!error.to_string().contains("secret"), "{error}");
    }
}
