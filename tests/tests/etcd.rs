//! Leases on etcd: every case of the suite, every drill of the engines, and cases of etcd alone.

#![cfg(target_os = "linux")]

use std::net::{Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use lockkit::{Lease, LeaseGuard, LeaseStatus, LossReason, Wait};
use lockkit_tests::errors::with_causes;
use lockkit_tests::leases::Terms;
use lockkit_tests::server_conformance::etcd::Etcd;
use lockkit_tests::server_conformance::{
    Access, Certificates, Engine, PASSWORD, Proxy, Security, USER, until_quiet,
};
use lockkit_tests::{Actor, LIVELY, conformance, crash_points, drills, left_out, until};
use rustix::process::Signal;

conformance!(etcd, lockkit_tests::Kind::ETCD);
drills!(etcd_drills, lockkit_tests::server_conformance::etcd::Etcd);

/// Reports what the machine lacks, and lets the test pass.
macro_rules! or_left_out {
    ($server:expr) => {
        match $server {
            Ok(server) => server,
            Err(why) => return left_out(why),
        }
    };
}

/// The TTL is long enough that no holder loses the lease during a leader election on a busy
/// machine.
const TTL: Duration = Duration::from_secs(12);

fn lease(url: impl Into<String>) -> Lease {
    Lease::connect(url).ttl(TTL).build().unwrap()
}

/// Waits until a request that was sent from now on has renewed the lease.
fn wait_for_a_renewal(guard: &LeaseGuard) {
    wait_for_renewals(std::slice::from_ref(guard));
}

fn wait_for_renewals(guards: &[LeaseGuard]) {
    let start = Instant::now();
    for guard in guards {
        until("it is renewed", || {
            let elapsed = start.elapsed();
            assert!(guard.is_held(), "{:?}", guard.lost().reason());
            // The right side is the largest remaining time after an earlier renewal.
            guard.remaining() + elapsed > TTL
        });
    }
}

/// Returns the error of building or acquiring the lease at `url`, with all its causes.
fn refusal(url: impl Into<String>) -> String {
    let lease = Lease::connect(url)
        .build()
        .and_then(|lease| lease.try_lock());
    let text = with_causes(&lease.unwrap_err());
    assert!(
        !text.contains(PASSWORD) && !text.contains("barley"),
        "{text}"
    );
    text
}

#[test]
fn etcd_leader_loss_keeps_lease() {
    let mut etcd = or_left_out!(Etcd::start_nodes(3, &Security::None, &[]));
    let lease = lease(etcd.plain_url("leader"));
    let guard = lease.try_lock().unwrap();
    for _ in 0..2 {
        let leader = etcd.leader();
        etcd.kill_node(leader);
        wait_for_a_renewal(&guard);
        assert!(lease.try_lock().unwrap_err().is_held());
        etcd.start_again(leader);
    }
    let token = guard.token();
    guard.release().unwrap();
    assert!(lease.lock_for(LIVELY).unwrap().token() > token);
}

#[test]
fn stopped_etcd_leader_keeps_leases_exclusive() {
    const SHORT: Duration = Duration::from_secs(4);
    let etcd = or_left_out!(Etcd::start_nodes(3, &Security::None, &[]));
    let leader = etcd.leader();
    let only_it = etcd.endpoints_of([leader]);
    let others = etcd.endpoints_of((0..3).filter(|node| *node != leader));
    let url = |endpoints: &str, name: &str| etcd.url_of(endpoints, "", name, "");
    let terms = |endpoints: &str, name: &str, ttl: Duration| Terms {
        ttl: ttl.as_millis() as u64,
        heartbeat: 400,
        ..Terms::of(url(endpoints, name))
    };
    // The client tries the leader first, and then the others.
    let kept = lease(url(&format!("{only_it},{others}"), "kept"))
        .try_lock()
        .unwrap();
    // These processes know only the leader. The TTL of the first is longer than the leader's stop,
    // and that of the second is not.
    let mut asleep = Actor::start_lease(&terms(&only_it, "asleep", 10 * LIVELY));
    let mut alone = Actor::start_lease(&terms(&only_it, "alone", SHORT));
    let mut next = Actor::start_lease(&terms(&others, "alone", SHORT));
    let asleep_token = asleep.ask("try");
    assert!(asleep_token.starts_with("held "), "{asleep_token}");
    let first = alone.ask("try");
    assert!(first.starts_with("held ") && next.ask("try").starts_with("error Held"));

    etcd.signal_node(leader, Signal::STOP);
    next.tell("lock-for 60000");
    assert!(alone.ask("wait-lost").starts_with("lost "));
    let second = next.answer();
    let recovered = format!(" recovered {}", alone.pid());
    assert!(
        second.ends_with(&recovered) && second > first,
        "{second} after {first}"
    );
    wait_for_a_renewal(&kept);
    // The old leader believes that it leads until it hears from the new leader. Its answers in
    // between have no effect.
    etcd.signal_node(leader, Signal::CONT);
    assert!(alone.ask("is-held").starts_with("no"));
    next.expect("is-held", "yes");
    until("the old leader knows the new leader", || {
        alone.ask("try").starts_with("error Held")
    });
    asleep.expect("is-held", "yes");
    // A renewal to the stopped leader may still lack its answer. In that case the heartbeat
    // releases.
    let released = asleep.ask("release");
    assert!(
        released == "released" || released.contains("still busy"),
        "{released}"
    );
    drop(lease(url(&others, "asleep")).lock_for(LIVELY).unwrap());
    wait_for_a_renewal(&kept);
    next.expect("is-held", "yes");
    next.expect("losses", "losses");
}

#[test]
fn request_skips_dead_or_frozen_endpoint() {
    let mut etcd = or_left_out!(Etcd::start_nodes(3, &Security::None, &[]));
    let closed_port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let url = etcd.url_of(
        &format!("127.0.0.1:{closed_port},{}", etcd.endpoints()),
        "",
        "dead",
        "",
    );
    lease(url).try_lock().unwrap().release().unwrap();

    let lease = lease(etcd.plain_url("frozen"));
    let guard = lease.try_lock().unwrap();
    // Node 0 answered before. If it leads, all nodes must first hear from another leader.
    etcd.signal_node(0, Signal::STOP);
    wait_for_a_renewal(&guard);
    etcd.signal_node(0, Signal::CONT);
    guard.release().unwrap();
    etcd.kill_node(0);
    drop(lease.lock_for(LIVELY).unwrap());
}

#[test]
fn waiter_with_frozen_endpoint_acquires_before_holder_expires() {
    let etcd = or_left_out!(Etcd::start_nodes(1, &Security::None, &[]));
    let proxy = Proxy::to(etcd.port());
    let lasting = |url: String| {
        Lease::connect(url)
            .ttl(10 * LIVELY)
            .heartbeat(LIVELY)
            .build()
            .unwrap()
    };
    let guard = lasting(etcd.plain_url("x")).try_lock().unwrap();
    let both = format!("127.0.0.1:{},{}", proxy.port(), etcd.endpoints());
    let waiter = lasting(etcd.url_of(&both, "", "x", ""));
    std::thread::scope(|scope| {
        // When its watch has been silent for too long, the waiter asks once more, and then uses
        // another endpoint.
        let waiting = scope.spawn(move || waiter.lock_for(4 * LIVELY));
        until_quiet(&proxy);
        proxy.hold();
        let token = guard.token();
        guard.release().unwrap();
        let start = Instant::now();
        assert!(waiting.join().unwrap().unwrap().token() > token);
        assert!(start.elapsed() < 2 * LIVELY);
    });
}

#[test]
fn etcd_request_replayed_after_release_blocks_no_client() {
    const SHORT: Duration = Duration::from_secs(4);
    let etcd = or_left_out!(Etcd::start_nodes(1, &Security::None, &[]));
    let lease = |url: String| Lease::connect(url).ttl(SHORT).build().unwrap();
    let others = lease(etcd.plain_url("late"));
    let (proxy, kept) = loop {
        let proxy = Proxy::to(etcd.port());
        let both = format!("127.0.0.1:{},{}", proxy.port(), etcd.endpoints());
        // This lease keeps the session of both alive.
        let kept = lease(etcd.url_of(&both, "", "kept", ""))
            .lock_for(LIVELY)
            .unwrap();
        proxy.hold_at(b"request_put");
        let guard = lease(etcd.url_of(&both, "", "late", ""))
            .lock_for(LIVELY)
            .unwrap();
        guard.release().unwrap();
        // On a slow machine all requests may have used the other endpoint.
        if proxy.is_holding() {
            break (proxy, kept);
        }
    };
    proxy.let_go();
    until("it is carried out once more", || {
        matches!(others.status().unwrap(), LeaseStatus::Held(_))
    });
    let start = Instant::now();
    drop(others.lock_for(LIVELY).unwrap());
    assert!(start.elapsed() < 4 * SHORT && kept.is_held());
}

#[test]
fn quorum_loss_ends_lease_and_next_guard_reports_it() {
    let mut etcd = or_left_out!(Etcd::start_nodes(3, &Security::None, &[]));
    let lease = Lease::connect(etcd.plain_url("quorum"))
        .ttl(Duration::from_secs(4))
        .build()
        .unwrap();
    let guard = lease.try_lock().unwrap();
    [0, 1].into_iter().for_each(|node| etcd.kill_node(node));
    let reason = guard.lost().wait(&Wait::at_most(LIVELY)).unwrap();
    assert!(matches!(reason, LossReason::Store(_)), "{reason}");
    assert!(
        lease.try_lock().is_err(),
        "no client can acquire without a quorum"
    );
    [0, 1].into_iter().for_each(|node| etcd.launch_node(node));
    etcd.wait_until_it_serves();
    let token = guard.token();
    // The release abandons the lost claim at the store, and fails, because the lease is lost.
    assert!(guard.release().is_err());
    let next = lease.lock_for(LIVELY).unwrap();
    assert!(next.token() > token && next.recovered().is_some());
}

#[test]
fn leases_with_same_ttl_share_one_etcd_session() {
    let etcd = or_left_out!(Etcd::start_nodes(1, &Security::None, &[]));
    let take = |ttl: Duration| {
        let lease = |n| {
            Lease::connect(etcd.plain_url(&format!("{}-{n}", ttl.as_secs())))
                .ttl(ttl)
                .build()
                .unwrap()
        };
        (0..100)
            .map(|n| lease(n).try_lock().unwrap())
            .collect::<Vec<_>>()
    };
    let first = take(TTL);
    assert_eq!(etcd.sessions(), 1);
    let second = take(TTL * 2);
    assert_eq!(etcd.sessions(), 2);
    first
        .iter()
        .chain(&second)
        .for_each(|guard| guard.check().unwrap());
    // Another process has its own session.
    let mut other = Actor::start_lease(&Terms {
        ttl: 12_000,
        ..Terms::of(etcd.plain_url("another"))
    });
    assert!(other.ask("try").starts_with("held "));
    assert_eq!(etcd.sessions(), 3);
}

#[test]
fn unused_etcd_session_expires() {
    let etcd = or_left_out!(Etcd::start_nodes(1, &Security::None, &[]));
    let lease = Lease::connect(etcd.plain_url("short"))
        .ttl(Duration::from_secs(2))
        .build()
        .unwrap();
    lease.try_lock().unwrap().release().unwrap();
    assert_eq!(etcd.sessions(), 1);
    until("the session is gone", || etcd.sessions() == 0);
    // A later acquisition gets a new session.
    lease.try_lock().unwrap().release().unwrap();
}

#[test]
fn thousand_etcd_leases_renew_with_few_requests() {
    let etcd = or_left_out!(Etcd::start_nodes(1, &Security::None, &[]));
    let lost = Arc::new(AtomicUsize::new(0));
    let guards: Vec<_> = (0..1000)
        .map(|n| {
            let lost = lost.clone();
            let lease = Lease::connect(etcd.plain_url(&n.to_string()))
                .ttl(TTL)
                .on_lost(move |_| {
                    lost.fetch_add(1, Ordering::Relaxed);
                });
            lease.build().unwrap().try_lock().unwrap()
        })
        .collect();
    wait_for_renewals(&guards);
    wait_for_renewals(&guards);
    assert_eq!(lost.load(Ordering::Relaxed), 0);
    assert_eq!(etcd.sessions(), 1);
}

#[test]
fn lease_without_progress_is_freed_while_session_lives() {
    let etcd = or_left_out!(Etcd::start_nodes(1, &Security::None, &[]));
    let short = |name| Lease::connect(etcd.plain_url(name)).ttl(Duration::from_secs(2));
    let goes_on = short("goes-on").build().unwrap().try_lock().unwrap();
    let hangs = short("hangs")
        .require_progress(Duration::from_secs(1))
        .build()
        .unwrap()
        .try_lock()
        .unwrap();
    let mut next = Actor::start_lease(&Terms {
        ttl: 30_000,
        ..Terms::of(etcd.plain_url("hangs"))
    });
    let answer = next.ask("lock");
    assert!(
        answer.ends_with(&format!("recovered {}", std::process::id())),
        "{answer}"
    );
    assert!(!hangs.is_held());
    goes_on.check().unwrap();
}

#[test]
fn etcd_eviction_reported_only_to_evicted_holder() {
    let etcd = or_left_out!(Etcd::start_nodes(1, &Security::None, &[]));
    let [evicted, stays] = ["evicted", "stays"].map(|name| lease(etcd.plain_url(name)));
    let guards = [&evicted, &stays].map(|lease| lease.try_lock().unwrap());
    let LeaseStatus::Held(seen) = evicted.status().unwrap() else {
        panic!("it is held")
    };
    assert_eq!(seen.token(), Some(guards[0].token()));
    assert!(evicted.evict(&seen).unwrap());
    assert_eq!(evicted.status().unwrap(), LeaseStatus::Free);
    assert!(
        !stays.evict(&seen).unwrap(),
        "the snapshot shows the holder of another lease"
    );
    let reason = guards[0].lost().wait(&Wait::at_most(LIVELY)).unwrap();
    assert!(
        matches!(reason, LossReason::TakenOver { by: None }),
        "{reason}"
    );
    wait_for_a_renewal(&guards[1]);
    let next = evicted.try_lock().unwrap();
    assert!(next.recovered().is_none() && next.token() > guards[0].token());
}

#[test]
fn waiter_survives_etcd_compaction() {
    let etcd = or_left_out!(Etcd::start_nodes(1, &Security::None, &[]));
    let terms = Terms {
        ttl: 30_000,
        ..Terms::of(etcd.plain_url("compacted"))
    };
    let [mut holder, mut waiter] = [(); 2].map(|()| Actor::start_lease(&terms));
    let first = holder.ask("try");
    waiter.tell_to_wait("lock");
    let other = lease(etcd.plain_url("other"));
    (0..20).for_each(|_| other.try_lock().unwrap().release().unwrap());
    let guard = other.try_lock().unwrap();
    let compacted = etcd.post(
        "/v3/kv/compaction",
        &format!(r#"{{"revision":"{}","physical":true}}"#, guard.token()),
    );
    assert!(!compacted.contains("error"), "{compacted}");
    waiter.expect_silence();
    holder.expect("release", "released");
    let second = waiter.answer();
    assert!(
        second.starts_with("held ") && second > first,
        "{second} after {first}"
    );
}

#[test]
fn forked_child_creates_own_etcd_session() {
    let etcd = or_left_out!(Etcd::start_nodes(1, &Security::None, &[]));
    let terms = |name| Terms {
        ttl: 3000,
        heartbeat: 500,
        ..Terms::of(etcd.plain_url(name))
    };
    let mut parent = Actor::start_lease(&terms("parent"));
    let token = parent.ask("try");
    parent.expect(&format!("fork {}", etcd.plain_url("child")), "parted");
    parent.expect("is-held", "yes");
    parent.expect("release", "released");
    assert!(parent.ask("try") > token);
}

#[test]
fn expired_etcd_auth_token_is_requested_again() {
    let mut etcd = or_left_out!(Etcd::start_nodes(
        1,
        &Security::Password,
        &["--auth-token-ttl", "1"]
    ));
    let user = format!("{USER}:{PASSWORD}@");
    let lease = lease(etcd.url_of(&etcd.endpoints(), &user, "expires", ""));
    let guard = lease.try_lock().unwrap();
    // The heartbeat interval is longer than the lifetime of the authentication token.
    wait_for_a_renewal(&guard);
    wait_for_a_renewal(&guard);
    // After the restart the server does not know the authentication token either.
    etcd.restart();
    wait_for_a_renewal(&guard);
    guard.release().unwrap();
}

#[test]
fn etcd_access_denied_error_names_cause() {
    let etcd = or_left_out!(Etcd::start_nodes(1, &Security::Password, &[]));
    let assert_message = |user: &str, text: &str| {
        let message = refusal(etcd.url_of(&etcd.endpoints(), user, "denied", ""));
        assert!(message.contains(text), "{message}");
    };
    assert_message("", "without a user and a password");
    assert_message("guest:guest@", "the user \"guest\" lacks the permission");
    assert_message(
        &format!("{USER}:open-barley@"),
        &format!("as {USER:?}: no such user has this password"),
    );
    let open = or_left_out!(Etcd::start_nodes(1, &Security::None, &[]));
    let message = refusal(open.url_of(
        &open.endpoints(),
        &format!("{USER}:{PASSWORD}@"),
        "open",
        "",
    ));
    assert!(message.contains("its authentication is off"), "{message}");
}

#[test]
fn connect_with_gateway_disabled_error_says_so() {
    let etcd = or_left_out!(Etcd::start_nodes(
        1,
        &Security::None,
        &["--enable-grpc-gateway=false"]
    ));
    let message = refusal(etcd.plain_url("off"));
    assert!(message.contains("the gateway of etcd"), "{message}");
}

#[test]
fn etcd_tls_misconfiguration_error_names_cause() {
    let certificates = or_left_out!(Certificates::new());
    let [ca, stranger] =
        [certificates.ca(), certificates.stranger()].map(|path| path.display().to_string());
    let [cert, key] = certificates.client().map(|path| path.display().to_string());
    let [_, other_key] = certificates.server().map(|path| path.display().to_string());
    let security = Security::ClientCertificate(certificates);
    let etcd = or_left_out!(Etcd::start(&security, None));
    let right = etcd
        .url(etcd.port(), Access::Right(&security), "tls")
        .unwrap();
    lease(&right).try_lock().unwrap().release().unwrap();

    let port = etcd.port();
    let assert_message = |url: String, text: &str| {
        let message = refusal(&url);
        assert!(message.contains(text), "{url} says: {message}");
    };
    assert_message(
        format!("etcds://127.0.0.1:{port}/tls?ca={ca}"),
        "with the parameters cert and key",
    );
    assert_message(
        format!("etcds://127.0.0.1:{port}/tls?ca={stranger}&cert={cert}&key={key}"),
        "cannot trust the certificate",
    );
    assert_message(
        format!("etcds://127.0.0.1:{port}/tls?ca={ca}&cert={cert}&key={other_key}"),
        "do not match",
    );
    assert_message(
        format!("etcds://127.0.0.1:{port}/tls?ca=/no/such/file"),
        "/no/such/file",
    );
    assert_message(
        format!("etcds://127.0.0.1:{port}/tls?ca={key}"),
        "contains no certificate",
    );
    assert_message(format!("etcd://127.0.0.1:{port}/tls"), "etcds://");
    let plain = or_left_out!(Etcd::start_nodes(1, &Security::None, &[]));
    assert_message(
        format!("etcds://{}/tls?ca={ca}", plain.endpoints()),
        "write etcd://",
    );
}

#[test]
fn etcd_lease_has_crash_point_between_any_two_changes() {
    match lockkit_tests::Kind::ETCD.left_out() {
        None => crash_points::stand_between_changes(lockkit_tests::Kind::ETCD),
        Some(why) => left_out(why),
    }
}

#[test]
fn etcdctl_reads_lease_below_prefix() {
    let etcd = or_left_out!(Etcd::start_nodes(1, &Security::None, &[]));
    let guard = lease(format!("{}?prefix=mine/", etcd.plain_url("shown")))
        .try_lock()
        .unwrap();
    let record = or_left_out!(etcd.ctl(&["get", "--print-value-only", "mine/record/shown"]));
    let own = format!("pid {}", std::process::id());
    assert!(
        record.starts_with("held ") && record.lines().any(|line| line == own),
        "{record}"
    );
    assert!(
        or_left_out!(etcd.ctl(&["get", "--keys-only", "--prefix", "lockkit/"]))
            .trim()
            .is_empty()
    );
    guard.release().unwrap();
    assert!(
        or_left_out!(etcd.ctl(&["get", "mine/held/shown"]))
            .trim()
            .is_empty()
    );
}
