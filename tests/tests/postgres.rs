//! Leases on PostgreSQL: every case of the suite, every drill of the engines, and cases of
//! PostgreSQL alone.

#![cfg(target_os = "linux")]

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lockkit::{ErrorKind, Lease, LeaseGuard, LeaseStatus, Wait};
use lockkit_tests::errors::with_causes;
use lockkit_tests::leases::Terms;
use lockkit_tests::server_conformance::postgres::{Postgres, Setup, as_its_user};
use lockkit_tests::server_conformance::{Certificates, Direction, Engine, PASSWORD, Proxy};
use lockkit_tests::servers::{Server, ServerDir, free_port, installed};
use lockkit_tests::{Actor, LIVELY, conformance, drills, left_out, until};
use rustix::process::Signal;

conformance!(on_postgres, lockkit_tests::Kind::POSTGRES);
drills!(
    drills_on_postgres,
    lockkit_tests::server_conformance::postgres::Postgres
);

/// Starts a server for one test. The test ends here, and reports the reason, where this machine has
/// no PostgreSQL.
macro_rules! server {
    ($($field:ident: $value:expr),*) => {
        match Postgres::set_up(&Setup { $($field: $value,)* ..Setup::default() }) {
            Ok(server) => server,
            Err(why) => return left_out(why),
        }
    };
}

/// Builds a lease that outlasts every wait of these tests, so that only a test's own action ends
/// it.
fn lease(url: String) -> Lease {
    Lease::connect(url)
        .ttl(10 * LIVELY)
        .heartbeat(LIVELY)
        .build()
        .unwrap()
}

/// Returns the permanent error of an acquisition. The request is not repeated: it took no effect
/// and never will.
#[track_caller]
fn refusal(lease: &Lease) -> String {
    let error = lease.try_lock().unwrap_err();
    let is_misuse = matches!(
        error.kind(),
        ErrorKind::Store {
            source: lockkit::lease::StoreError::Permanent(_),
            ..
        }
    );
    let text = with_causes(&error);
    assert!(is_misuse && !text.contains(PASSWORD), "{text}");
    text
}

#[test]
fn postgres_user_without_create_right_gets_sufficient_sql() {
    let server = server!();
    server.sql("CREATE ROLE poor LOGIN; REVOKE CREATE ON SCHEMA public FROM PUBLIC");
    let lease = lease(server.lease_of("poor", "", "x"));
    let message = refusal(&lease);
    let (_, create) = message
        .split_once("let a user with the privilege run: ")
        .expect(&message);
    let (create, rest) = create.split_once("; GRANT").expect(&message);
    server.sql(create);
    assert!(refusal(&lease).contains("GRANT SELECT, INSERT, UPDATE ON lockkit_leases"));
    let grant = format!("GRANT{}", rest.split_once('…').expect(&message).0);
    server.sql(&format!("{grant} poor"));
    let guard = lease.try_lock().unwrap();
    assert!(lease.try_lock().unwrap_err().is_held());
    guard.release().unwrap();
    assert_eq!(lease.status().unwrap(), LeaseStatus::Free);
}

#[test]
fn concurrent_first_acquires_create_one_table() {
    let server = server!();
    for round in 0..3 {
        let name = |n: usize| Terms {
            ttl: 60_000,
            heartbeat: 10_000,
            ..Terms::of(server.lease(&n.to_string()))
        };
        let mut racers: Vec<_> = (0..12).map(|n| Actor::start_lease(&name(n))).collect();
        racers.iter_mut().for_each(|racer| racer.tell("lock"));
        for racer in &mut racers {
            let answer = racer.answer();
            assert!(answer.starts_with("held "), "round {round}: {answer}");
        }
        assert_eq!(server.sql("SELECT count(*) FROM lockkit_leases"), "12");
        drop(racers);
        server.sql("DROP TABLE lockkit_leases");
    }
}

#[test]
fn table_of_other_layout_refused_and_unchanged() {
    let server = server!();
    server.sql(
        "CREATE TABLE lockkit_leases (name text PRIMARY KEY, holder text); INSERT INTO lockkit_leases VALUES ('x')",
    );
    assert!(refusal(&lease(server.lease("x"))).contains("needs the layout"));
    assert_eq!(server.sql("SELECT * FROM lockkit_leases"), "x|");
    // Another schema has its own table.
    server.sql("CREATE SCHEMA locks");
    drop(
        lease(server.lease_of("postgres", "options=-c%20search_path%3Dlocks", "x"))
            .try_lock()
            .unwrap(),
    );
    assert_eq!(
        server.sql("SELECT state FROM locks.lockkit_leases"),
        "released"
    );
}

#[test]
fn postgres_table_of_untrusted_owner_refused() {
    let server = server!();
    server.sql("CREATE ROLE mallory LOGIN; CREATE ROLE app LOGIN; GRANT CREATE ON SCHEMA public TO mallory");
    drop(
        lease(server.lease_of("mallory", "", "x"))
            .try_lock()
            .unwrap(),
    );
    server.sql("GRANT ALL ON lockkit_leases TO PUBLIC");
    let app = lease(server.lease_of("app", "", "x"));
    for lease in [&app, &lease(server.lease("x"))] {
        assert!(refusal(lease).contains("it is of the user mallory"));
    }
    // A user that could act as the owner anyway trusts the owner. All users trust the owner of the
    // database.
    server.sql("GRANT mallory TO app");
    drop(app.try_lock().unwrap());
    server.sql("REVOKE mallory FROM app; ALTER DATABASE postgres OWNER TO mallory");
    drop(
        lease(server.lease_of("app", "connect_timeout=8", "x"))
            .try_lock()
            .unwrap(),
    );
    server.sql(
        "CREATE FUNCTION trap() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; \
         CREATE TRIGGER trap BEFORE UPDATE ON lockkit_leases FOR EACH ROW EXECUTE PROCEDURE trap()",
    );
    assert!(
        refusal(&lease(server.lease_of("app", "connect_timeout=9", "x")))
            .contains("it has a trigger or a rule")
    );
    server.sql("DROP TRIGGER trap ON lockkit_leases");
    drop(
        lease(server.lease_of("app", "connect_timeout=9", "x"))
            .try_lock()
            .unwrap(),
    );
    // PostgreSQL would prefer an operator that fits better than the system's.
    server.sql(
        "CREATE FUNCTION public.spring(oid, regclass) RETURNS boolean LANGUAGE plpgsql AS \
         'BEGIN RAISE EXCEPTION ''sprung''; END'; \
         CREATE OPERATOR public.= (LEFTARG = oid, RIGHTARG = regclass, PROCEDURE = public.spring)",
    );
    drop(
        lease(server.lease_of("app", "connect_timeout=7", "x"))
            .try_lock()
            .unwrap(),
    );
}

#[test]
fn postgres_table_dropped_is_recreated_with_growing_tokens() {
    let server = server!();
    let lease = lease(server.lease("x"));
    let before = lease.try_lock().unwrap();
    let token = before.token();
    server.sql("DROP TABLE lockkit_leases");
    let after = lease.try_lock().expect("the grant was lost with the table");
    assert!(after.token() > token);
    assert!(matches!(
        before.release().unwrap_err().kind(),
        ErrorKind::LeaseLost { .. }
    ));
    after.release().unwrap();
}

#[test]
fn postgres_standby_is_skipped_until_promoted() {
    let mut server = server!();
    let standby = match server.standby() {
        Ok(standby) => standby,
        Err(why) => return left_out(why),
    };
    let alone = lease(standby.lease("x"));
    let error = alone.try_lock().unwrap_err();
    assert!(
        with_causes(&error).contains("the server is a standby"),
        "{error:?}"
    );
    let both = format!("127.0.0.1:{},127.0.0.1:{}", standby.port(), server.port());
    let both = lease(format!("postgres://postgres@{both}/postgres?lease=x"));
    let guard = both.try_lock().unwrap();
    let token = guard.token();
    until("the table has reached the standby", || {
        standby.sql("SELECT to_regclass('lockkit_leases') IS NOT NULL") == "t"
    });
    until("the grant has reached the standby", || {
        standby.sql("SELECT coalesce(max(token), 0) FROM lockkit_leases") == token.to_string()
    });
    server.kill();
    standby.sql("SELECT pg_promote()");
    // The data that the standby had received is in force there, and so is the holder's claim.
    assert!(both.try_lock().unwrap_err().is_held());
    guard.release().unwrap();
    let next = both.try_lock().unwrap();
    assert!(next.token() > token && next.recovered().is_none());
}

#[test]
fn read_only_server_error_names_setting() {
    let server = server!(settings: &["default_transaction_read_only=on"]);
    let error = lease(server.lease("x")).try_lock().unwrap_err();
    assert!(
        with_causes(&error).contains("default_transaction_read_only"),
        "{error:?}"
    );
    // The URL can override the setting.
    let options = "options=-c%20default_transaction_read_only%3Doff";
    drop(
        lease(server.lease_of("postgres", options, "x"))
            .try_lock()
            .unwrap(),
    );
}

#[test]
fn grant_survives_crash_with_synchronous_commit_off() {
    let mut server =
        server!(settings: &["synchronous_commit=off", "wal_writer_delay=10s", "autovacuum=off"]);
    server.sql("CREATE TABLE other (what text)");
    let lease = lease(server.lease("x"));
    drop(lease.try_lock().unwrap());
    let guard = lease.try_lock().unwrap();
    // A row with the server's default commit setting is lost with the server. Otherwise this test
    // would prove nothing.
    server.sql("INSERT INTO other VALUES ('lost')");
    server.restart();
    assert_eq!(server.sql("SELECT * FROM other"), "");
    match lease.status().unwrap() {
        LeaseStatus::Held(seen) => assert_eq!(seen.token(), Some(guard.token())),
        other => panic!("{other:?}"),
    }
    guard.release().unwrap();
}

#[test]
fn serialization_conflict_is_retried() {
    let server = server!(settings: &["default_transaction_isolation=serializable"]);
    let at_work = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let lease = lease(server.lease("x"));
                for _ in 0..25 {
                    let guard = lease.lock().unwrap();
                    assert!(!at_work.swap(true, Ordering::SeqCst));
                    at_work.store(false, Ordering::SeqCst);
                    guard.release().unwrap();
                }
            });
        }
    });
}

#[test]
fn many_threads_open_at_most_ten_postgres_connections() {
    let server = server!();
    let (is_over, most) = (AtomicBool::new(false), std::sync::Mutex::new(0));
    let count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'lockkit'";
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::SeqCst) {
                let now: u32 = server.sql(count).parse().unwrap();
                let mut most = most.lock().unwrap();
                *most = now.max(*most);
            }
        });
        let crowd: Vec<_> = (0..24)
            .map(|n| {
                let server = &server;
                // All threads share one lease, and each has a lease of its own with a heartbeat.
                scope.spawn(move || {
                    let common = lease(server.lease("common"));
                    let url = server.lease(&n.to_string());
                    let own = Lease::connect(url)
                        .ttl(LIVELY)
                        .heartbeat(Duration::from_millis(20))
                        .build()
                        .unwrap();
                    let _own = own.lock().unwrap();
                    for _ in 0..3 {
                        // If the crowd exceeds an acquisition's time limit, the error says so. That
                        // is not the subject of this test.
                        until("the thread acquires the common lease", || {
                            common.lock().is_ok()
                        });
                    }
                })
            })
            .collect();
        let ended: Vec<_> = crowd.into_iter().map(|thread| thread.join()).collect();
        is_over.store(true, Ordering::SeqCst);
        assert!(ended.into_iter().all(|end| end.is_ok()));
    });
    let most = most.into_inner().unwrap();
    println!("{most} at once");
    assert!((2..=10).contains(&most), "{most} connections");
}

#[test]
fn abandoned_request_is_cancelled_by_server() {
    let server = server!();
    let lease = lease(server.lease("x"));
    drop(lease.try_lock().unwrap());
    // VACUUM FULL holds such a lock, and so does a session with a forgotten commit.
    let mut psql =
        as_its_user(&lockkit_tests::server_conformance::postgres::installed("psql").unwrap());
    psql.args([
        "-h",
        "127.0.0.1",
        "-p",
        &server.port().to_string(),
        "-U",
        "postgres",
        "-d",
        "postgres",
        "-c",
    ]);
    psql.arg("BEGIN; LOCK TABLE lockkit_leases; SELECT pg_sleep(600)")
        .stdout(std::process::Stdio::null());
    let mut locker = psql.spawn().unwrap();
    let stuck = || {
        server.sql(
            "SELECT coalesce(min(pid), 0) FROM pg_stat_activity \
             WHERE application_name = 'lockkit' AND wait_event_type = 'Lock'",
        )
    };
    until("the table is locked", || {
        server.sql("SELECT count(*) FROM pg_locks WHERE mode = 'AccessExclusiveLock'") != "0"
    });
    assert!(lease.try_lock().is_err());
    let pid = stuck();
    until("the server has ended it", || {
        server.sql(&format!(
            "SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}"
        )) == "0"
    });
    assert!(
        locker.try_wait().unwrap().is_none(),
        "the table is locked yet"
    );
    server.sql("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE mode = 'AccessExclusiveLock'");
    let _ = (locker.kill(), locker.wait());
    drop(lease.lock_for(LIVELY).unwrap());
}

#[test]
fn connect_without_free_connection_error_says_so() {
    let server = server!();
    drop(lease(server.lease("x")).try_lock().unwrap());
    server.sql("CREATE ROLE poor LOGIN CONNECTION LIMIT 0; GRANT ALL ON lockkit_leases TO poor");
    let error = lease(server.lease_of("poor", "", "x"))
        .try_lock()
        .unwrap_err();
    assert!(
        with_causes(&error).contains("it has no connection left"),
        "{error:?}"
    );
}

#[test]
fn scram_password_checked_and_absent_from_errors() {
    let server = server!(lets_in: Some("host all all all scram-sha-256"));
    drop(
        lease(server.lease_of(&format!("postgres:{PASSWORD}"), "", "x"))
            .try_lock()
            .unwrap(),
    );
    let wrong = format!("{PASSWORD}!");
    for user in [
        format!("postgres:{wrong}"),
        format!("nobody:{PASSWORD}"),
        "postgres".to_owned(),
    ] {
        let message = refusal(&lease(server.lease_of(&user, "", "x")));
        assert!(message.contains("cannot log in"), "{message}");
    }
    let url = server.lease_of(&format!("postgres:{PASSWORD}"), "sslmode=sometimes", "x");
    let error = Lease::connect(url).build().unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::InvalidUrl { .. })
            && !with_causes(&error).contains(PASSWORD),
        "{error}"
    );
    for unescaped in ['@', '/', '?'] {
        let url = format!("postgres://me:first{unescaped}second@127.0.0.1:1/postgres?lease=x");
        let error = Lease::connect(url).build().unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::InvalidUrl { .. }),
            "{error}"
        );
        let message = with_causes(&error);
        assert!(
            !message.contains("first") && !message.contains("second"),
            "{message}"
        );
    }
}

#[test]
fn tls_verification_follows_sslmode() {
    let certificates = match Certificates::new() {
        Ok(certificates) => certificates,
        Err(why) => return left_out(why),
    };
    let server = server!(certificates: Some(&certificates), lets_in: Some("hostssl all all all scram-sha-256"));
    let user = format!("postgres:{PASSWORD}");
    let (ca, stranger) = (
        certificates.ca().display().to_string(),
        certificates.stranger().display().to_string(),
    );
    let lease = |parameters: &str| lease(server.lease_of(&user, parameters, "x"));
    // The certificate is for localhost and 127.0.0.1.
    let elsewhere = "host=elsewhere.example&hostaddr=127.0.0.1";
    let at = |host: &str, parameters: &str| {
        let url = format!(
            "postgres:///postgres?user=postgres&password={PASSWORD}&port={}&{host}",
            server.port()
        );
        self::lease(format!("{url}&{parameters}&lease=x"))
    };
    for right in [
        "".to_owned(),
        "sslmode=require".to_owned(),
        "sslmode=require&channel_binding=require".to_owned(),
        format!("sslmode=require&sslrootcert={ca}"),
        format!("sslmode=verify-ca&sslrootcert={ca}"),
        format!("sslmode=verify-full&sslrootcert={ca}"),
    ] {
        drop(
            lease(&right)
                .try_lock()
                .unwrap_or_else(|error| panic!("{right}: {}", with_causes(&error))),
        );
    }
    drop(
        at(elsewhere, &format!("sslmode=verify-ca&sslrootcert={ca}"))
            .try_lock()
            .unwrap(),
    );
    for wrong in [
        format!("sslmode=require&sslrootcert={stranger}"),
        format!("sslmode=verify-ca&sslrootcert={stranger}"),
        format!("sslmode=verify-full&sslrootcert={stranger}"),
    ] {
        let message = refusal(&lease(&wrong));
        assert!(message.contains("cannot use TLS"), "{wrong}: {message}");
    }
    let message = refusal(&at(
        elsewhere,
        &format!("sslmode=verify-full&sslrootcert={ca}"),
    ));
    assert!(message.contains("cannot use TLS"), "{message}");
    assert!(refusal(&lease("sslmode=disable")).contains("cannot log in"));
    // This server has no certificate.
    let plain = server!();
    let message = refusal(&self::lease(plain.lease_of(
        "postgres",
        "sslmode=require",
        "x",
    )));
    assert!(message.contains("does not support TLS"), "{message}");
}

#[test]
fn unix_socket_and_application_name_of_url_are_used() {
    let server = server!();
    let directory = server.directory().display().to_string().replace('/', "%2F");
    let url = |rest: &str| {
        format!(
            "postgresql://postgres@{directory}:{}/postgres?lease=x&{rest}",
            server.port()
        )
    };
    let guard = lease(url("")).try_lock().unwrap();
    let own = "SELECT application_name FROM pg_stat_activity WHERE client_port = -1 AND pid <> pg_backend_pid() \
               AND backend_type = 'client backend'";
    assert_eq!(server.sql(own), "lockkit");
    guard.release().unwrap();
    let _named = lease(url("application_name=nightly")).try_lock().unwrap();
    assert!(server.sql(own).contains("nightly"));
    // The address is a parameter, as in libpq.
    let host = format!(
        "postgres:///postgres?user=postgres&host={directory}&port={}&lease=y",
        server.port()
    );
    drop(lease(host).try_lock().unwrap());
}

#[test]
fn connect_with_hanging_host_uses_next_host() {
    let server = server!();
    // The kernel accepts connections into its queue, and no process answers.
    let hangs = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let hosts = format!(
        "127.0.0.1:{},127.0.0.1:{}",
        hangs.local_addr().unwrap().port(),
        server.port()
    );
    let lease = lease(format!("postgres://postgres@{hosts}/postgres?lease=x"));
    drop(lease.try_lock().unwrap());
    let limited = self::lease(format!(
        "postgres://postgres@{hosts}/postgres?lease=x&connect_timeout=1"
    ));
    drop(limited.try_lock().unwrap());
}

#[test]
fn release_and_eviction_succeed_when_answer_is_lost() {
    let server = server!();
    let proxy = Proxy::to(server.port());
    let url = |name: &str| {
        format!(
            "postgres://postgres@127.0.0.1:{}/postgres?sslmode=disable&lease={name}",
            proxy.port()
        )
    };
    let leases = [lease(url("x")), lease(server.lease("x"))];
    let [through, direct] = &leases;
    let guard = through.try_lock().unwrap();
    let cuts = proxy.cuts();
    proxy.cut_after(Direction::Answer, 0);
    guard
        .release()
        .expect("it is asked again, and had been done");
    assert_eq!(proxy.cuts(), cuts + 1);
    let held = direct.try_lock().unwrap();
    assert!(held.recovered().is_none());
    let LeaseStatus::Held(seen) = through.status().unwrap() else {
        panic!("it is held")
    };
    proxy.cut_after(Direction::Answer, 0);
    assert!(
        through.evict(&seen).unwrap(),
        "it is asked again, and had been done"
    );
    assert_eq!(proxy.cuts(), cuts + 2);
    assert!(matches!(
        held.release().unwrap_err().kind(),
        ErrorKind::LeaseLost { .. }
    ));
}

/// A pooling proxy in front of `server`.
struct Pooler {
    port: u16,
    _server: Server,
    _directory: ServerDir,
}

fn pooler(server: &Postgres, mode: &str, size: u32) -> Result<Pooler, String> {
    let program: PathBuf = installed(&["pgbouncer", "/usr/sbin/pgbouncer"])?;
    let (directory, port) = (ServerDir::new("pgbouncer"), free_port());
    let config = directory.path().join("pgbouncer.ini");
    let text = format!(
        "[databases]\n* = host=127.0.0.1 port={} user=postgres\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
         listen_port = {port}\nunix_socket_dir =\nauth_type = any\npool_mode = {mode}\ndefault_pool_size = {size}\n",
        server.port()
    );
    std::fs::write(&config, text).unwrap();
    let mut command: Command = as_its_user(&program);
    command.arg(config);
    let server = Server::start(&directory, &command, port)?;
    Ok(Pooler {
        port,
        _server: server,
        _directory: directory,
    })
}

#[test]
fn lease_works_behind_postgres_transaction_pooler() {
    let server = server!();
    // The first has fewer sessions than clients, and the second one session per client.
    for (mode, size) in [("transaction", 3), ("session", 30)] {
        let proxy = match pooler(&server, mode, size) {
            Ok(proxy) => proxy,
            Err(why) => return left_out(why),
        };
        let url = format!(
            "postgres://postgres@127.0.0.1:{}/postgres?lease={mode}",
            proxy.port
        );
        let terms = Terms {
            ttl: 300_000,
            heartbeat: 50,
            ..Terms::of(url)
        };
        let (mut one, mut other) = (Actor::start_lease(&terms), Actor::start_lease(&terms));
        let mut last = 0;
        for _ in 0..10 {
            for _ in 0..2 {
                let answer = one.ask("lock");
                let token: u64 = answer
                    .strip_prefix("held ")
                    .expect(&answer)
                    .parse()
                    .expect(&answer);
                assert!(token > last);
                last = token;
                assert!(other.ask("try").starts_with("error Held"));
                other.tell_to_wait("lock");
                one.expect("is-held", "yes");
                one.expect("release", "released");
                let answer = other.answer();
                let token: u64 = answer
                    .strip_prefix("held ")
                    .expect(&answer)
                    .parse()
                    .expect(&answer);
                assert!(token > last);
                last = token;
                other.expect("release", "released");
            }
            std::mem::swap(&mut one, &mut other);
        }
        // Prepared statements of one client would conflict with those of another there.
        assert!(
            !server.log().contains("prepared statement"),
            "{}",
            server.log()
        );
    }
}

#[test]
fn names_differing_in_case_or_spaces_are_separate_leases() {
    let server = server!();
    let names = ["x", "X", "x%20", "%20x", "%C3%A9", "e%CC%81"];
    let guards: Vec<LeaseGuard> = names
        .iter()
        .map(|name| lease(server.lease(name)).try_lock().unwrap())
        .collect();
    assert_eq!(
        server.sql("SELECT count(*) FROM lockkit_leases"),
        names.len().to_string()
    );
    drop(guards);
}

#[test]
fn waiter_with_cut_listener_is_woken_by_release() {
    let server = server!();
    let lease = lease(server.lease("x"));
    let guard = lease.try_lock().unwrap();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| lease.acquire(&Wait::at_most(2 * LIVELY)).unwrap());
        let listeners = "FROM pg_stat_activity WHERE query = 'LISTEN lockkit_leases'";
        for _ in 0..2 {
            let mark = "SELECT waited FROM lockkit_leases WHERE name = 'x'";
            until("it waits", || {
                server.sql(mark) == "t"
                    && server.sql(&format!("SELECT count(*) {listeners}")) == "1"
            });
            server.sql(&format!("SELECT pg_terminate_backend(pid) {listeners}"));
            until("it has noticed", || {
                server.sql(&format!("SELECT count(*) {listeners}")) == "1"
            });
        }
        let before = std::time::Instant::now();
        guard.release().unwrap();
        drop(waiter.join().unwrap());
        assert!(
            before.elapsed() < LIVELY,
            "it was woken, and did not wait for the end of the ttl"
        );
    });
}

#[test]
fn frozen_server_fails_requests_in_time_and_loses_lease() {
    let server = server!();
    let terms = Terms {
        ttl: 2000,
        heartbeat: 200,
        ..Terms::of(server.lease("x"))
    };
    let (mut holder, mut next) = (Actor::start_lease(&terms), Actor::start_lease(&terms));
    assert!(holder.ask("try").starts_with("held "));
    // The second process then has a connection, too.
    assert!(next.ask("try").starts_with("error Held"));
    server.signal(Signal::STOP);
    assert!(next.ask("try").starts_with("error Store"));
    assert!(next.ask("lock-for 100").starts_with("error Store"));
    assert!(holder.ask("wait-lost").starts_with("lost "));
    server.signal(Signal::CONT);
    let answer = next.ask("lock-for 30000");
    assert!(
        answer.starts_with("held ") && answer.contains(" recovered "),
        "{answer}"
    );
    next.expect("release", "released");
}

#[test]
fn lease_survives_postgres_restart() {
    let mut server = server!();
    let terms = Terms {
        ttl: 60_000,
        heartbeat: 50,
        ..Terms::of(server.lease("x"))
    };
    let (mut holder, mut waiter) = (Actor::start_lease(&terms), Actor::start_lease(&terms));
    assert!(holder.ask("try").starts_with("held "));
    assert!(waiter.ask("try").starts_with("error Held"));
    server.restart();
    let until_then = || server.sql("SELECT extract(epoch FROM until) FROM lockkit_leases");
    let before = until_then();
    until("it is renewed again", || until_then() != before);
    holder.expect("is-held", "yes");
    waiter.tell_to_wait("lock");
    holder.expect("release", "released");
    assert!(waiter.answer().starts_with("held "));
    waiter.expect("release", "released");
}

#[test]
fn postgres_request_replayed_after_next_holder_blocks_no_client() {
    let server = server!();
    let (proxy, direct) = (Proxy::to(server.port()), server.port());
    let both = |name: &str| {
        let hosts = format!("127.0.0.1:{},127.0.0.1:{direct}", proxy.port());
        lease(format!(
            "postgres://postgres@{hosts}/postgres?sslmode=disable&lease={name}"
        ))
    };
    let others = lease(server.lease("late"));
    // This acquisition opens a connection through the proxy.
    drop(both("early").lock_for(LIVELY).unwrap());
    proxy.hold_at(b"late");
    let first = both("late").lock_for(LIVELY).unwrap();
    first.release().unwrap();
    let second = others.lock_for(LIVELY).unwrap();
    let token = second.token();
    second.release().unwrap();
    proxy.let_go();
    until("it is carried out once more", || {
        let token_now: u64 = server
            .sql("SELECT token FROM lockkit_leases WHERE name = 'late'")
            .parse()
            .unwrap();
        token_now > token
    });
    drop(others.lock_for(LIVELY).unwrap());
}

#[test]
fn connection_cut_mid_request_is_recovered() {
    let server = server!();
    let proxy = Proxy::to(server.port());
    let url = format!(
        "postgres://postgres@127.0.0.1:{}/postgres?sslmode=disable&lease=x",
        proxy.port()
    );
    let lease = lease(url);
    let mut last = 0;
    for direction in [Direction::Request, Direction::Answer] {
        let before = proxy.passed(direction);
        drop(lease.try_lock().unwrap());
        let bytes = proxy.passed(direction) - before;
        assert!(bytes > 50, "{bytes}");
        for at in (0..bytes).step_by(7) {
            proxy.cut_after(direction, at);
            let guard = lease.lock_for(LIVELY).unwrap();
            assert!(
                guard.token() > last && guard.recovered().is_none(),
                "cut at {at} of {bytes} {direction:?}"
            );
            last = guard.token();
            guard.release().unwrap_or_else(|error| {
                panic!("cut at {at} {direction:?}: {}", with_causes(&error))
            });
        }
        proxy.cut_nothing();
    }
    assert!(proxy.cuts() > 50);
}
