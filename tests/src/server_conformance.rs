//! Drills for leases on servers: faults of the server, the connection and the holder, with real ones of each.
//!
//! An engine gets its drills by an [`Engine`], which starts its servers, and a line `drills!(module, Type);` in a file
//! of `tests/tests`. Each drill starts a server of its own from the installed software. Where none is installed, the
//! drill prints `left out:`, its name and the reason, and passes.
//!
//! A [`Proxy`] between the client and the server causes the faults of a connection. It counts the bytes that it
//! forwards, and cuts connections at any chosen byte.

pub mod etcd;
pub mod postgres;
mod proxy;
pub mod redis;

use std::cell::OnceCell;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use lockkit::{CancelToken, ErrorKind, Lease, LeaseGuard, LeaseStatus, Owner, Wait};
pub use proxy::{Direction, Proxy};
use rustix::process::Signal;

use crate::leases::Terms;
use crate::{Actor, LIVELY, leases, sleeps, thread_id, until};

/// A server of an engine, for one drill. Its data outlasts a kill and a restart.
pub trait Engine: Sized {
    /// A TTL that expires soon, but not so soon that a busy machine loses the lease, in milliseconds. It is at least
    /// the minimum of the store.
    const TTL: u64 = 1000;

    /// Answers one connection as a version of the engine that is too old, up to where it shows.
    const OLD: Option<fn(TcpStream)> = None;

    /// Starts a server on 127.0.0.1 that requires `security` of its clients, with the clock of its machine, or the
    /// given clock.
    ///
    /// # Errors
    /// The missing resource of this machine.
    fn start(security: &Security, clock: Option<&Clock>) -> Result<Self, String>;

    /// Returns the port on which it listens, before and after a restart.
    fn port(&self) -> u16;

    /// Returns the URL of a lease with this name on such a server at 127.0.0.1:`port`, for a client with `access`.
    /// Returns `None` where the engine has no such access.
    fn url(&self, port: u16, access: Access, name: &str) -> Option<String>;

    /// Sends a signal to all its processes.
    fn signal(&self, signal: Signal);

    /// Kills it, if it runs, and waits until it is gone.
    fn kill(&mut self);

    /// Starts it again with its data.
    fn restart(&mut self);

    /// Starts a server that copies from this one through `port`, and waits until it has all data of this one. This
    /// server does not wait for it.
    ///
    /// # Errors
    /// The engine has no followers, or this machine lacks a resource.
    fn follower(&self, _port: u16) -> Result<Self, String> {
        Err("this engine has no servers that are behind and can be promoted".to_owned())
    }

    /// Makes a follower the server that grants.
    fn promote(&self) {}

    /// Returns whether the state of a lease depends on the wall clock of the server.
    fn goes_by_a_wall_clock() -> bool {
        false
    }
}

/// The requirements of a server on its clients.
#[derive(Debug)]
pub enum Security {
    /// None.
    None,
    /// The password [`PASSWORD`], for the engine's usual user or for [`USER`].
    Password,
    /// TLS. Clients need no certificate.
    Tls(Certificates),
    /// TLS with a client certificate.
    ClientCertificate(Certificates),
}

/// The password of servers that require one.
pub const PASSWORD: &str = "open-sesame";
/// The user with that password, where the engine's usual user has none.
pub const USER: &str = "ali";

/// The credentials of a client.
#[derive(Clone, Copy, Debug)]
pub enum Access<'s> {
    /// Everything that the server requires.
    Right(&'s Security),
    /// Another password.
    WrongPassword,
    /// The right password, or none, for a database that does not exist.
    WrongDatabase,
    /// TLS, with trust in the authority in this file, and without a certificate of its own.
    Tls(&'s Path),
}

/// Certificates, made for one drill.
#[derive(Debug)]
pub struct Certificates(tempfile::TempDir);

impl Certificates {
    /// Creates an authority, and its certificates for a server at 127.0.0.1 and localhost and for a client.
    ///
    /// # Errors
    /// If openssl(1) is not installed.
    pub fn new() -> Result<Self, String> {
        let openssl = crate::servers::installed(&["openssl"])?;
        let directory = tempfile::tempdir().expect("a directory");
        // Servers that run as other users read them, too.
        std::fs::set_permissions(&directory, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("a directory");
        let script = "
            exec 2>openssl.log
            authority() {
                $0 req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj \"/O=lockkit $1\" \
                    -addext basicConstraints=critical,CA:TRUE -keyout $1.key -out $1.pem
            }
            signed() {
                $0 req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj \"/O=lockkit $1\" \
                    -keyout $1.key -out $1.csr
                printf \"subjectAltName=DNS:localhost,IP:127.0.0.1\\nextendedKeyUsage=$2\\n\" >$1.ext
                $0 x509 -req -in $1.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile $1.ext -out $1.pem
            }
            authority ca; authority stranger; signed server serverAuth,clientAuth; signed client clientAuth; chmod 644 *";
        let made = Command::new("sh").args(["-ec", script]).arg(openssl).current_dir(&directory).status();
        assert!(made.is_ok_and(|status| status.success()), "openssl failed in {}", directory.keep().display());
        Ok(Self(directory))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Returns the authority's certificate.
    pub fn ca(&self) -> PathBuf {
        self.file("ca.pem")
    }

    /// Returns the certificate of an authority that has signed nothing here.
    pub fn stranger(&self) -> PathBuf {
        self.file("stranger.pem")
    }

    /// Returns the server's certificate and key.
    pub fn server(&self) -> [PathBuf; 2] {
        ["server.pem", "server.key"].map(|name| self.file(name))
    }

    /// Returns a client's certificate and key.
    pub fn client(&self) -> [PathBuf; 2] {
        ["client.pem", "client.key"].map(|name| self.file(name))
    }
}

/// A wall clock that a drill steps, for the programs that are started with its [`variables`](Self::variables).
#[derive(Debug)]
pub struct Clock(tempfile::TempDir);

impl Clock {
    /// Creates a clock that shows the real time.
    ///
    /// # Errors
    /// If there is no compiler for C.
    pub fn new() -> Result<Self, String> {
        let compiler = crate::servers::installed(&["cc", "gcc", "clang"])?;
        let clock = Self(tempfile::tempdir().expect("a directory"));
        // Servers that run as other users read it, too.
        std::fs::set_permissions(&clock.0, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("a directory");
        std::fs::write(clock.file("clock.c"), include_str!("server_conformance/clock.c")).expect("room");
        std::fs::write(clock.file("ahead"), 0_i64.to_ne_bytes()).expect("room");
        let mut compile = Command::new(compiler);
        compile.args(["-shared", "-fPIC", "-O1", "-o"]).args([clock.file("clock.so"), clock.file("clock.c")]);
        match compile.status().is_ok_and(|status| status.success()) {
            true => Ok(clock),
            false => Err("what steps a clock cannot be compiled here".to_owned()),
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Sets the clock this many seconds ahead of the real time from now on.
    pub fn set(&self, seconds: i64) {
        // The write is in place, because the file is mapped.
        let file = std::fs::File::options().write(true).open(self.file("ahead")).expect("it is there");
        std::os::unix::fs::FileExt::write_all_at(&file, &seconds.to_ne_bytes(), 0).expect("room");
    }

    /// Returns the environment variables of a program that uses this clock.
    pub fn variables(&self) -> [(&'static str, PathBuf); 2] {
        [("LD_PRELOAD", self.file("clock.so")), ("LOCKKIT_CLOCK", self.file("ahead"))]
    }
}

/// Makes a module `$module` with a test for every drill, for one [`Engine`].
#[macro_export]
macro_rules! drills {
    ($module:ident, $engine:ty) => {
        $crate::drills!($module, $engine;
            a_killed_holder_of_this_host_is_taken_over_at_once,
            whoever_looks_is_told_that_a_dead_holder_has_no_time_left,
            a_silent_holder_elsewhere_runs_out_and_the_next_is_told,
            a_waiter_elsewhere_is_woken_when_whoever_took_over_from_the_dead_releases,
            a_holder_stopped_for_longer_than_its_ttl_finds_it_lost_the_moment_it_runs_again,
            a_server_frozen_for_less_than_a_ttl_costs_no_lease,
            a_server_frozen_for_longer_than_a_ttl_costs_the_lease_in_time_and_it_is_told_once,
            what_a_taker_that_gave_up_was_given_later_is_free_again,
            whoever_comes_after_a_taker_that_gave_up_is_told_of_the_dead_before_it,
            a_restarted_server_knows_its_leases_and_the_tokens_grow,
            an_acquisition_cut_off_anywhere_gets_the_same_grant,
            a_renewal_cut_off_anywhere_keeps_the_lease,
            a_release_cut_off_anywhere_frees_the_name,
            a_look_and_an_eviction_cut_off_anywhere_can_be_made_once_more,
            a_connection_cut_far_from_the_server_costs_no_lease,
            a_waiter_asks_nothing_of_the_server_and_is_woken_by_the_release,
            a_waiter_that_is_cut_off_anywhere_is_woken_by_the_release,
            a_waiter_outlasts_a_restart_of_the_server_if_it_may_try_so_often,
            cancel_during_wait_ends_wait_at_once,
            many_leases_share_few_connections,
            a_forked_child_has_connections_of_its_own,
            a_wrong_password_is_a_clear_error,
            a_wrong_database_is_a_clear_error,
            over_tls_leases_work_with_and_without_a_certificate,
            a_mismatch_of_tls_is_a_clear_error,
            an_engine_that_is_too_old_is_a_clear_error,
            an_address_that_swallows_all_that_comes_is_given_up_in_time,
            after_a_failover_that_lost_the_grant_two_hold_and_the_later_token_is_greater,
            a_stepped_clock_of_the_server_never_takes_the_tokens_back,
            a_clock_stepped_ahead_gives_away_what_is_held_with_a_greater_token,
            stopped_holder_never_overlaps_next_holder,
        );
    };
    ($module:ident, $engine:ty; $($drill:ident,)*) => {
        mod $module {
            $(#[test]
            fn $drill() {
                if let Err(why) = $crate::server_conformance::$drill::<$engine>() {
                    $crate::left_out(why);
                }
            })*
        }
    };
}

/// A server that ends with the drill, and the access to it.
struct Arena<E> {
    security: Security,
    server: E,
}

impl<E: Engine> Arena<E> {
    fn open() -> Result<Self, String> {
        Self::with(Security::None)
    }

    fn with(security: Security) -> Result<Self, String> {
        Ok(Self { server: E::start(&security, None)?, security })
    }

    /// Opens an arena whose server uses a wall clock that the drill steps.
    fn with_clock() -> Result<(Self, Clock), String> {
        if !E::goes_by_a_wall_clock() {
            return Err("this engine goes by no wall clock".to_owned());
        }
        let clock = Clock::new()?;
        let security = Security::None;
        Ok((Self { server: E::start(&security, Some(&clock))?, security }, clock))
    }

    /// Returns the terms of a lease that only this drill uses, with the engine's short TTL.
    fn terms(&self) -> Terms {
        self.terms_through(self.server.port())
    }

    fn terms_through(&self, port: u16) -> Terms {
        let access = Access::Right(&self.security);
        let url = self.server.url(port, access, "drill").expect("the right way is always there");
        Terms { ttl: E::TTL, heartbeat: E::TTL / 10, ..Terms::of(url) }
    }

    /// Returns the error of a client with `access`, with all its causes.
    fn refusal(&self, port: u16, access: Access) -> Result<String, String> {
        let url = self.server.url(port, access, "drill").ok_or("this engine has nothing of that sort")?;
        let terms = Terms { ttl: E::TTL, ..Terms::of(url) };
        let error = terms.open().lock_for(LIVELY).expect_err("it is refused");
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            text += &format!(": {error}");
            cause = error.source();
        }
        println!("{access:?}: {text}");
        Ok(text)
    }

    /// As [`cut_everywhere_then`](Self::cut_everywhere_then), all of it over a connection that is cut.
    fn cut_everywhere(&self, mut action: impl FnMut(&Proxy)) {
        self.cut_everywhere_then(|_| (), |proxy, ()| action(proxy));
    }

    /// Plays a scene repeatedly behind a proxy that cuts the connection: after the first byte of each direction, after
    /// others that are spread evenly over the length of a scene, and after its last byte. The preparation of a scene is
    /// not cut.
    fn cut_everywhere_then<T>(&self, prepare: impl Fn(&Proxy) -> T, mut scene: impl FnMut(&Proxy, T)) {
        /// The number of cuts in each direction.
        const CUTS: u64 = 40;
        let proxy = Proxy::to(self.server.port());
        let prepared = prepare(&proxy);
        let passed = || [Direction::Request, Direction::Answer].map(|way| proxy.passed(way));
        let before = passed();
        scene(&proxy, prepared);
        let lengths = passed().into_iter().zip(before).map(|(after, before)| after - before);
        for (direction, length) in [Direction::Request, Direction::Answer].into_iter().zip(lengths.collect::<Vec<_>>())
        {
            assert!(length > 0, "nothing went {direction:?}");
            let mut cuts: Vec<u64> = (0..=CUTS).map(|cut| length * cut / CUTS).chain([1, length - 1]).collect();
            cuts.sort_unstable();
            cuts.dedup();
            let cut_before = proxy.cuts();
            for at in cuts {
                let prepared = prepare(&proxy);
                proxy.cut_after(direction, at);
                scene(&proxy, prepared);
            }
            assert!(proxy.cuts() > cut_before, "it was never cut");
        }
    }
}

/// Builds a lease that retries soon.
fn quick(terms: &Terms) -> Lease {
    let builder = terms.builder().acquire_retry_limit(100).acquire_retry_delay(Duration::from_millis(1));
    builder.build().expect("options that go together")
}

/// Returns the token under which it is held.
fn token_of(lease: &Lease) -> Option<u64> {
    match lease.status().expect("the server answers") {
        LeaseStatus::Held(seen) => seen.token(),
        _ => None,
    }
}

/// Checks that an answer reports the death of the holder with this pid and token.
fn told_of(answer: &str, pid: u32, before: u64) {
    let (token, told) = held(answer);
    assert!(token > before, "{answer} after {before}");
    assert_eq!(told, format!("recovered {pid}"));
}

fn remaining(holder: &mut Actor) -> Duration {
    let answer = holder.ask("remaining");
    let micros = answer.strip_prefix("remaining ").and_then(|micros| micros.parse().ok());
    Duration::from_micros(micros.unwrap_or_else(|| panic!("{answer}")))
}

/// Waits until the client of the proxy has sent a request, and sends none any more.
pub fn until_quiet(proxy: &Proxy) {
    const QUIET: Duration = Duration::from_millis(500);
    let (mut asked, mut since) = (0, Instant::now());
    until("the waiter asks nothing any more", || {
        let now = proxy.passed(Direction::Request);
        if now != asked || now == 0 {
            (asked, since) = (now, Instant::now());
        }
        since.elapsed() > QUIET
    });
}

/// Returns once the lease with this remaining time is renewed.
fn until_it_beats(mut remaining: impl FnMut() -> Duration) {
    let before = remaining();
    let start = Instant::now();
    until("it beats", || {
        // The elapsed time is read first. So the sum is at most the earlier remaining time, unless a renewal adds to
        // it.
        let elapsed = start.elapsed();
        remaining() + elapsed > before + Duration::from_millis(1)
    });
}

/// Starts an actor whose liveness no outside process can determine.
fn in_a_container(terms: &Terms) -> Option<Actor> {
    let unshare = || {
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
        command
    };
    let is_allowed = unshare().arg("true").stderr(Stdio::null()).status().is_ok_and(|status| status.success());
    is_allowed.then(|| {
        Actor::start_lease_with(terms, |actor| {
            let mut command = unshare();
            command.arg(actor.get_program()).args(actor.get_args());
            *actor = command;
            actor.stdin(Stdio::piped()).stdout(Stdio::piped());
        })
    })
}

/// Returns terms with a TTL that does not pass during any wait of these drills.
fn lasting(terms: Terms) -> Terms {
    Terms { ttl: 10 * LIVELY.as_millis() as u64, heartbeat: 1000, ..terms }
}

type Drill = Result<(), String>;

/// Parses an answer `held TOKEN …` into the token and the rest.
fn held(answer: &str) -> (u64, &str) {
    let rest = answer.strip_prefix("held ").unwrap_or_else(|| panic!("{answer}"));
    let (token, rest) = rest.split_once(' ').unwrap_or((rest, ""));
    (token.parse().expect("a token"), rest)
}

/// Returns the final result of a request whose connection may be cut once.
fn again<T>(mut ask: impl FnMut() -> lockkit::Result<T>) -> T {
    ask()
        .or_else(|error| match error.kind() {
            ErrorKind::Store { .. } => ask(),
            _ => Err(error),
        })
        .expect("it is cut once")
}

#[allow(missing_docs, clippy::missing_errors_doc)] // Their names are sentences; an error is why one is left out.
mod cases {
    use super::*;

    pub fn a_killed_holder_of_this_host_is_taken_over_at_once<E: Engine>() -> Drill {
        let arena = Arena::<E>::open()?;
        let terms = lasting(arena.terms());
        let (mut holder, mut next) = (Actor::start_lease(&terms), Actor::start_lease(&terms));
        let (first, _) = held(&holder.ask("try"));
        next.tell_to_wait("lock");
        holder.kill();
        told_of(&next.answer(), holder.pid(), first);
        Ok(())
    }

    pub fn whoever_looks_is_told_that_a_dead_holder_has_no_time_left<E: Engine>() -> Drill {
        let arena = Arena::<E>::open()?;
        let terms = lasting(arena.terms());
        let (lease, mut holder) = (terms.open(), Actor::start_lease(&terms));
        held(&holder.ask("try"));
        let is_over = || match lease.status().expect("the server answers") {
            LeaseStatus::Held(seen) => seen.expires_in() == Some(Duration::ZERO),
            other => panic!("nobody has released it: {other:?}"),
        };
        assert!(!is_over());
        holder.kill();
        assert!(is_over());
        Ok(())
    }

    pub fn a_silent_holder_elsewhere_runs_out_and_the_next_is_told<E: Engine>() -> Drill {
        let arena = Arena::<E>::open()?;
        let terms = arena.terms();
        let Some(mut elsewhere) = in_a_container(&terms) else {
            return Err("this machine does not let the test make a pid namespace".to_owned());
        };
        let mut next = Actor::start_lease(&terms);
        let (first, _) = held(&elsewhere.ask("try"));
        elsewhere.kill();
        assert!(next.ask("try").starts_with("error Held"), "nobody here can know that it is dead");
        let answer = next.ask("lock");
        let (token, told) = held(&answer);
        assert!(token > first && told.starts_with("recovered "), "{answer}");
        next.expect("release", "released");
        assert_eq!(held(&next.ask("lock")).1, "", "once");
        Ok(())
    }

    pub fn a_holder_stopped_for_longer_than_its_ttl_finds_it_lost_the_moment_it_runs_again<E: Engine>() -> Drill {
        let arena = Arena::<E>::open()?;
        let terms = arena.terms();
        let (mut holder, mut next) = (Actor::start_lease(&terms), Actor::start_lease(&terms));
        let (first, _) = held(&holder.ask("try"));
        holder.signal(Signal::STOP);
        told_of(&next.ask("lock"), holder.pid(), first);
        holder.tell("is-held");
        holder.signal(Signal::CONT);
        assert!(holder.answer().starts_with("no: "));
        next.expect("is-held", "yes");
        Ok(())
    }

    pub fn a_server_frozen_for_less_than_a_ttl_costs_no_lease<E: Engine>() -> Drill {
        let arena = Arena::<E>::open()?;
        let terms = Terms { ttl: 2 * LIVELY.as_millis() as u64, ..arena.terms() };
        let mut holder = Actor::start_lease(&terms);
        held(&holder.ask("try"));
        let before = remaining(&mut holder);
        arena.server.signal(Signal::STOP);
        // A request times out meanwhile.
        until("some beats are late", || remaining(&mut holder) + Duration::from_secs(3) < before);
        arena.server.signal(Signal::CONT);
        until_it_beats(|| remaining(&mut holder));
        holder.expect("is-held", "yes");
        holder.expect("losses", "losses");
        assert!(Actor::start_lease(&terms).ask("try").starts_with("error Held"));
        Ok(())
    }

    pub fn a_server_frozen_for_longer_than_a_ttl_costs_the_lease_in_time_and_it_is_told_once<E: Engine>() -> Drill {
        let arena = Arena::<E>::open()?;
        let terms = arena.terms();
        let (mut holder, mut next) = (Actor::start_lease(&terms), Actor::start_lease(&terms));
        let (first, _) = held(&holder.ask("try"));
        arena.server.signal(Signal::STOP);
        let frozen = Instant::now();
        until("it is lost", || holder.ask("is-held") != "yes");
        assert!(frozen.elapsed() < LIVELY / 2, "the deadline is the lease's, not the server's");
        until("it was told", || holder.ask("losses") != "losses");
        assert!(next.ask("try").starts_with("error Store"), "a server that hangs holds up nobody for ever");
        arena.server.signal(Signal::CONT);
        let (token, _) = held(&next.ask("lock"));
        assert!(token > first);
        assert_eq!(holder.ask("losses").matches('(').count(), 1);
        Ok(())
    }

    pub fn what_a_taker_that_gave_up_was_given_later_is_free_again<E: Engine>() -> Drill {
        let arena = Arena::<E>::open()?;
        let terms = lasting(arena.terms());
        let (mut taker, mut next) = (Actor::start_lease(&terms), Actor::start_lease(&terms));
        for _ in 0..3 {
            // The connection then exists, so only the request is missing.
            held(&taker.ask("try"));
            taker.expect("release", "released");
            arena.server.signal(Signal::STOP);
            let answer = taker.ask("lock-for 50");
            assert!(answer.starts_with("error Store"), "nobody said that it is held: {answer}");
            arena.server.signal(Signal::CONT);
            // The first waiter lives. So only it can release the name before the TTL has passed, which is long after
            // this waiter's timeout.
            let answer = next.ask(&format!("lock-for {}", LIVELY.as_millis() / 2));
            let (_, told) = held(&answer);
            assert!(told.is_empty(), "nobody died: {answer}");
            next.expect("release", "released");
        }
        taker.expect("is-held", "error NotHeld");
        Ok(())
    }

    pub fn whoever_comes_after_a_taker_that_gave_up_is_told_of_the_dead_before_it<E: Engine>() -> Drill {
        const CUTS: u64 = 24;
        let arena = Arena::<E>::open()?;
        let (terms, proxy) = (lasting(arena.terms()), Proxy::to(arena.server.port()));
        let through = lasting(arena.terms_through(proxy.port()));
        let (direct, taker) =
            (terms.open(), through.builder().acquire_retry_limit(0).build().expect("they go together"));
        let leave_to_the_dead = || {
            let mut holder = Actor::start_lease(&terms);
            held(&holder.ask("try"));
            holder.kill();
            holder.pid()
        };
        let told = |guard: &LeaseGuard| guard.recovered().and_then(|recovered| recovered.owner()).map(Owner::pid);
        // The first round opens the connection, and the second measures the length of the answers.
        let mut length = 0;
        for _ in 0..2 {
            let (died, before) = (leave_to_the_dead(), proxy.passed(Direction::Answer));
            let guard = taker.try_lock().expect("its holder is dead");
            length = proxy.passed(Direction::Answer) - before;
            assert_eq!(told(&guard), Some(died));
            guard.release().expect("it is held");
        }
        let mut gave_up = 0;
        for cut in 1..=CUTS {
            let died = leave_to_the_dead();
            let cut_off = || proxy.cut_off_after(Direction::Answer, length * cut / CUTS);
            cut_off();
            let taken = taker.try_lock().or_else(|_| {
                // The second attempt may find the name held by the waiter's own unknown grant.
                cut_off();
                taker.try_lock()
            });
            proxy.cut_nothing();
            // The waiter lives, so only it can release the name before the TTL has passed.
            gave_up += u64::from(taken.is_err());
            let guard = taken.or_else(|_| direct.lock_for(LIVELY / 2)).expect("it is free, or given back");
            assert_eq!(told(&guard), Some(died), "after {cut} of {CUTS} parts of the answers");
            guard.release().expect("it is held");
        }
        assert!(gave_up > CUTS / 8, "{gave_up} of {CUTS}");
        Ok(())
    }

    pub fn a_restarted_server_knows_its_leases_and_the_tokens_grow<E: Engine>() -> Drill {
        let mut arena = Arena::<E>::open()?;
        let terms = Terms { ttl: LIVELY.as_millis() as u64, ..arena.terms() };
        let (mut holder, mut next) = (Actor::start_lease(&terms), Actor::start_lease(&terms));
        let (first, _) = held(&holder.ask("try"));
        arena.server.kill();
        arena.server.restart();
        until_it_beats(|| remaining(&mut holder));
        holder.expect("is-held", "yes");
        next.tell_to_wait("lock");
        next.expect_silence();
        holder.expect("release", "released");
        let answer = next.answer();
        let (second, told) = held(&answer);
        assert!(second > first && told.is_empty(), "{answer}");
        next.expect("release", "released");
        arena.server.kill();
        arena.server.restart();
        let (third, _) = held(&next.ask("lock"));
        assert!(third > second);
        Ok(())
    }

    pub fn an_acquisition_cut_off_anywhere_gets_the_same_grant<E: Engine>() -> Drill {
        let arena = Arena::<E>::open()?;
        let (direct, mut last) = (lasting(arena.terms()).open(), 0);
        arena.cut_everywhere(|proxy| {
            let guard = quick(&lasting(arena.terms_through(proxy.port()))).lock_for(LIVELY).expect("the lease");
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

    pub fn a_renewal_cut_off_anywhere_keeps_the_lease<E: Engine>() -> Drill {
        let arena = Arena::<E>::open()?;
        let (direct, kept) = (arena.terms().open(), OnceCell::new());
        arena.cut_everywhere_then(
            |proxy| {
                let terms = arena.terms_through(proxy.port());
                let terms = Terms { ttl: LIVELY.as_millis() as u64, heartbeat: 20, ..terms };
                let guard: &LeaseGuard = kept.get_or_init(|| terms.open().try_lock().expect("free"));
                until_it_beats(|| guard.remaining());
            },
            |proxy, ()| {
                let guard = kept.get().expect("it is prepared");
                until("it was cut, if it is to be", || !proxy.is_to_cut());
                until_it_beats(|| guard.remaining());
                assert_eq!(token_of(&direct), Some(guard.token()), "the same grant");
                assert!(direct.try_lock().expect_err("it is held").is_held());
            },
        );
        Ok(())
    }

    pub fn a_release_cut_off_anywhere_frees_the_name<E: Engine>() -> Drill {
        let arena = Arena::<E>::open()?;
        let (direct, mut last) = (lasting(arena.terms()).open(), 0);
        arena.cut_everywhere_then(
            |proxy| quick(&lasting(arena.terms_through(proxy.port()))).lock_for(LIVELY).expect("the lease"),
            |proxy, guard| {
                let token = guard.token();
                // A waiter may acquire before the repeated release.
                let (released, next) = thread::scope(|scope| {
                    let waiter = scope.spawn(|| direct.lock_for(LIVELY));
                    (guard.release(), waiter.join().expect("no panic"))
                });
                let is_lost = |error: &lockkit::Error| matches!(error.kind(), ErrorKind::LeaseLost { .. });
                assert!(!released.as_ref().is_err_and(is_lost), "nobody took it before: {released:?}");
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

    pub fn a_look_and_an_eviction_cut_off_anywhere_can_be_made_once_more<E: Engine>() -> Drill {
        let arena = Arena::<E>::open()?;
        let (direct, mut last) = (lasting(arena.terms()).open(), 0);
        arena.cut_everywhere_then(
            |proxy| (lasting(arena.terms_through(proxy.port())).open(), direct.lock_for(LIVELY).expect("free")),
            |proxy, (lease, guard)| {
                assert!(guard.token() > last && guard.recovered().is_none());
                last = guard.token();
                let LeaseStatus::Held(seen) = again(|| lease.status()) else { panic!("it is held") };
                assert_eq!(seen.token(), Some(last));
                assert!(again(|| lease.evict(&seen)), "it is done, whichever of the two did it");
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

    pub fn a_connection_cut_far_from_the_server_costs_no_lease<E: Engine>() -> Drill {
        /// The delay in each direction. A new connection takes several round trips.
        const WAY: Duration = Duration::from_millis(80);
        let arena = Arena::<E>::open()?;
        let proxy = Proxy::to(arena.server.port());
        let terms = Terms { ttl: 8000, heartbeat: 100, ..arena.terms_through(proxy.port()) };
        let guard = terms.open().lock_for(LIVELY).expect("free");
        proxy.slow_down(WAY);
        for _ in 0..2 {
            proxy.cut_after(Direction::Answer, 1);
            until("it was cut", || !proxy.is_to_cut());
            until_it_beats(|| guard.remaining());
        }
        assert!(guard.is_held());
        Ok(())
    }

    pub fn a_waiter_asks_nothing_of_the_server_and_is_woken_by_the_release<E: Engine>() -> Drill {
        let arena = Arena::<E>::open()?;
        let proxy = Proxy::to(arena.server.port());
        let guard = lasting(arena.terms()).open().try_lock().expect("free");
        let mut waiter = Actor::start_lease(&lasting(arena.terms_through(proxy.port())));
        waiter.tell("lock");
        until_quiet(&proxy);
        waiter.expect_silence();
        let token = guard.token();
        guard.release().expect("it is held");
        let answer = waiter.answer();
        assert!(held(&answer).0 > token && held(&answer).1.is_empty(), "{answer}");
        Ok(())
    }

    pub fn a_waiter_elsewhere_is_woken_when_whoever_took_over_from_the_dead_releases<E: Engine>() -> Drill {
        let arena = Arena::<E>::open()?;
        let terms = lasting(arena.terms());
        let mut holder = Actor::start_lease(&terms);
        let first = held(&holder.ask("try")).0;
        // It cannot see the holder die.
        let proxy = Proxy::to(arena.server.port());
        let Some(mut elsewhere) = in_a_container(&lasting(arena.terms_through(proxy.port()))) else {
            return Err("this machine does not let the test make a pid namespace".to_owned());
        };
        elsewhere.tell("lock");
        until_quiet(&proxy);
        let pid = holder.pid();
        holder.kill();
        let mut next = Actor::start_lease(&terms);
        let answer = next.ask("lock");
        told_of(&answer, pid, first);
        let token = held(&answer).0;
        until_quiet(&proxy);
        elsewhere.expect_silence();
        next.expect("release", "released");
        let answer = elsewhere.answer();
        assert!(held(&answer).0 > token && held(&answer).1.is_empty(), "{answer}");
        Ok(())
    }

    pub fn a_waiter_that_is_cut_off_anywhere_is_woken_by_the_release<E: Engine>() -> Drill {
        /// A waiter that has been silent for this long has checked the lease, and is parked.
        const QUIET: Duration = Duration::from_millis(30);
        let arena = Arena::<E>::open()?;
        let direct = lasting(arena.terms()).open();
        arena.cut_everywhere_then(
            |_| direct.lock_for(LIVELY).expect("nobody keeps it"),
            |proxy, guard| {
                let waiter = quick(&lasting(arena.terms_through(proxy.port())));
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
                    // The remaining cut may hit this release's notification. If the release fails at first, the
                    // heartbeat completes it.
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

    pub fn a_waiter_outlasts_a_restart_of_the_server_if_it_may_try_so_often<E: Engine>() -> Drill {
        let mut arena = Arena::<E>::open()?;
        let terms = lasting(Terms { heartbeat: 100, ..arena.terms() });
        let guard = terms.open().lock_for(LIVELY).expect("nobody has it");
        let [impatient, patient] = [4, 10_000].map(|limit| {
            let delay = Duration::from_millis(25);
            let builder = terms.builder().acquire_retry_limit(limit).acquire_retry_delay(delay);
            builder.build().expect("options that go together")
        });
        let (send, threads) = std::sync::mpsc::channel();
        let wait = |lease: &Lease| {
            send.send(thread_id()).expect("it is waited for");
            lease.acquire(&Wait::at_most(4 * LIVELY))
        };
        thread::scope(|scope| {
            let [impatient, patient] = [&impatient, &patient].map(|lease| scope.spawn(move || wait(lease)));
            for thread in threads.iter().take(2) {
                until("the waiter sleeps", || sleeps(std::process::id(), thread));
            }
            arena.server.kill();
            let error = impatient.join().expect("no panic").expect_err("the server is gone");
            assert!(matches!(error.kind(), ErrorKind::Store { .. }), "{error}");
            assert!(!patient.is_finished());
            arena.server.restart();
            until_it_beats(|| guard.remaining());
            assert!(guard.is_held() && !patient.is_finished());
            let token = guard.token();
            guard.release().expect("it is held");
            let next = patient.join().expect("no panic").expect("the server is back");
            assert!(next.token() > token && next.recovered().is_none());
        });
        Ok(())
    }

    pub fn cancel_during_wait_ends_wait_at_once<E: Engine>() -> Drill {
        let arena = Arena::<E>::open()?;
        let lease = lasting(arena.terms()).open();
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
            assert!(waiter.join().expect("no panic").expect_err("it is held").is_cancelled());
            assert!(start.elapsed() < LIVELY);
        });
        Ok(())
    }

    pub fn many_leases_share_few_connections<E: Engine>() -> Drill {
        const MANY: usize = 100;
        let arena = Arena::<E>::open()?;
        let proxy = Proxy::to(arena.server.port());
        let url = |n: usize| {
            let url = arena.server.url(proxy.port(), Access::Right(&arena.security), &format!("many-{n}"));
            url.expect("the right way is always there")
        };
        let lasts = LIVELY.as_millis() as u64;
        let open = |n| Terms { ttl: lasts, heartbeat: 100, ..Terms::of(url(n)) }.open();
        let guards: Vec<_> = (0..MANY).map(|n| open(n).lock_for(LIVELY).expect("free")).collect();
        let before: Vec<_> = guards.iter().map(|guard| guard.remaining()).collect();
        let start = Instant::now();
        until("all have beaten", || {
            guards
                .iter()
                .zip(&before)
                .all(|(guard, before)| guard.remaining() + start.elapsed() > *before + Duration::from_millis(50))
        });
        assert!(proxy.connections() <= 10, "{} connections", proxy.connections());
        assert!(guards.iter().all(|guard| guard.is_held()));
        Ok(())
    }

    pub fn a_forked_child_has_connections_of_its_own<E: Engine>() -> Drill {
        let arena = Arena::<E>::open()?;
        let terms = arena.terms();
        let mut holder = Actor::start_lease(&terms);
        held(&holder.ask("try"));
        let other = arena.server.url(arena.server.port(), Access::Right(&arena.security), "other").expect("a URL");
        holder.expect(&format!("fork {other}"), "parted");
        holder.expect("is-held", "yes");
        until_it_beats(|| remaining(&mut holder));
        assert!(Actor::start_lease(&terms).ask("try").starts_with("error Held"));
        holder.expect("release", "released");
        Ok(())
    }

    pub fn a_wrong_password_is_a_clear_error<E: Engine>() -> Drill {
        let arena = Arena::<E>::with(Security::Password)?;
        drop(arena.terms().open().lock_for(LIVELY).expect("the right one opens"));
        let error = arena.refusal(arena.server.port(), Access::WrongPassword)?;
        assert!(error.contains("password"), "{error}");
        assert!(!error.contains("barley") && !error.contains(PASSWORD), "{error}");
        Ok(())
    }

    pub fn a_wrong_database_is_a_clear_error<E: Engine>() -> Drill {
        let arena = Arena::<E>::open()?;
        let error = arena.refusal(arena.server.port(), Access::WrongDatabase)?;
        assert!(error.contains("database"), "{error}");
        Ok(())
    }

    pub fn over_tls_leases_work_with_and_without_a_certificate<E: Engine>() -> Drill {
        for security in [Security::Tls, Security::ClientCertificate] {
            let arena = Arena::<E>::with(security(Certificates::new()?))?;
            let terms = lasting(arena.terms());
            let (mut holder, mut next) = (Actor::start_lease(&terms), Actor::start_lease(&terms));
            let (first, _) = held(&holder.ask("lock-for 30000"));
            next.tell_to_wait("lock");
            holder.expect("release", "released");
            assert!(held(&next.answer()).0 > first);
        }
        Ok(())
    }

    pub fn a_mismatch_of_tls_is_a_clear_error<E: Engine>() -> Drill {
        let says = |error: String, word: &str| assert!(error.contains(word), "no {word} in {error}");
        let plain = Arena::<E>::open()?;
        let certificates = Certificates::new()?;
        says(plain.refusal(plain.server.port(), Access::Tls(&certificates.ca()))?, "TLS");
        let stranger = certificates.stranger();
        let secure = Arena::<E>::with(Security::Tls(certificates))?;
        says(secure.refusal(secure.server.port(), Access::Right(&Security::None))?, "TLS");
        says(secure.refusal(secure.server.port(), Access::Tls(&stranger))?, "certificate");
        let mutual = Arena::<E>::with(Security::ClientCertificate(Certificates::new()?))?;
        let Security::ClientCertificate(certificates) = &mutual.security else { unreachable!("just made") };
        says(mutual.refusal(mutual.server.port(), Access::Tls(&certificates.ca()))?, "certificate");
        Ok(())
    }

    pub fn an_engine_that_is_too_old_is_a_clear_error<E: Engine>() -> Drill {
        let answer = E::OLD.ok_or("nobody plays an old version of this engine")?;
        let arena = Arena::<E>::open()?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let port = listener.local_addr().expect("an address").port();
        // The thread ends with the process.
        std::thread::spawn(move || listener.incoming().flatten().for_each(answer));
        let error = arena.refusal(port, Access::Right(&Security::None))?;
        assert!(error.contains("too old"), "{error}");
        Ok(())
    }

    pub fn an_address_that_swallows_all_that_comes_is_given_up_in_time<E: Engine>() -> Drill {
        let arena = Arena::<E>::open()?;
        // The first listener accepts connections and never answers. The second listener's queue is full, so it does not
        // even accept: the kernel drops the first packet of a connection.
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
            let lease = arena.terms_through(port).open();
            let waits = [Wait::none(), Wait::at_most(Duration::from_millis(100)), Wait::at_most(LIVELY)];
            for wait in waits {
                let start = Instant::now();
                let error = lease.acquire(&wait).expect_err("nobody answers");
                assert!(matches!(error.kind(), ErrorKind::Store { .. }), "{error}");
                // Each of five attempts has a quarter of the TTL.
                assert!(start.elapsed() < LIVELY, "{:?}", start.elapsed());
            }
            assert!(lease.status().is_err());
        }
        Ok(())
    }

    pub fn after_a_failover_that_lost_the_grant_two_hold_and_the_later_token_is_greater<E: Engine>() -> Drill {
        let arena = Arena::<E>::open()?;
        // The holder connects through an address that moves to the granting server.
        let front = Proxy::to(arena.server.port());
        let terms = Terms { ttl: 2 * LIVELY.as_millis() as u64, heartbeat: 200, ..arena.terms_through(front.port()) };
        let mut holder = Actor::start_lease(&terms);
        // Both sides then know a token.
        held(&holder.ask("try"));
        holder.expect("release", "released");
        let copies = Proxy::to(arena.server.port());
        let follower = arena.server.follower(copies.port())?;
        copies.stop();
        let (first, _) = held(&holder.ask("try"));
        follower.promote();

        let follower = Arena { security: Security::None, server: follower };
        let mut next = Actor::start_lease(&Terms { ttl: terms.ttl, heartbeat: 200, ..follower.terms() });
        let answer = next.ask("lock-for 30000");
        let (second, told) = held(&answer);
        assert!(second > first, "a resource that checks tokens is safe: {second} after {first}");
        assert_eq!(told, "", "there is nothing there of the first");
        until_it_beats(|| remaining(&mut holder));
        until_it_beats(|| remaining(&mut next));
        holder.expect("is-held", "yes");
        next.expect("is-held", "yes");

        // The holder's next heartbeat that reaches the server which grants now ends the lease.
        front.move_to(follower.server.port());
        assert!(holder.ask("wait-lost").starts_with("lost taken over"));
        next.expect("is-held", "yes");
        assert!(holder.ask("try").starts_with("error Held"));
        next.expect("release", "released");
        let (third, _) = held(&holder.ask("lock-for 30000"));
        assert!(third > second);
        Ok(())
    }

    pub fn a_stepped_clock_of_the_server_never_takes_the_tokens_back<E: Engine>() -> Drill {
        let (arena, clock) = Arena::<E>::with_clock()?;
        let terms = Terms { ttl: LIVELY.as_millis() as u64, ..arena.terms() };
        let (mut one, mut other) = (Actor::start_lease(&terms), Actor::start_lease(&terms));
        let mut last = 0;
        for step in [0, 3600, -3600, 0] {
            let (token, _) = held(&one.ask("lock-for 30000"));
            assert!(token > last);
            last = token;
            clock.set(step);
            until_it_beats(|| remaining(&mut one));
            // When the clock was ahead, the lease was expired for a moment. The heartbeat has renewed it, because no
            // other process acquired it.
            one.expect("is-held", "yes");
            assert!(other.ask("try").starts_with("error Held"));
            one.expect("release", "released");
            let answer = other.ask("lock-for 30000");
            let (token, told) = held(&answer);
            assert!(token > last && told.is_empty(), "{answer}");
            last = token;
            other.expect("release", "released");
        }
        Ok(())
    }

    pub fn a_clock_stepped_ahead_gives_away_what_is_held_with_a_greater_token<E: Engine>() -> Drill {
        let (arena, clock) = Arena::<E>::with_clock()?;
        // No lease is renewed before the drill is over.
        let terms = Terms { ttl: 300_000, heartbeat: 60_000, ..arena.terms() };
        let (mut holder, mut next) = (Actor::start_lease(&terms), Actor::start_lease(&terms));
        let (first, _) = held(&holder.ask("try"));
        assert!(next.ask("try").starts_with("error Held"));
        clock.set(3600);
        let answer = next.ask("lock-for 30000");
        let (second, told) = held(&answer);
        assert!(second > first && told == format!("recovered {}", holder.pid()), "{answer}");
        assert!(holder.ask("release").starts_with("error LeaseLost"));
        next.expect("release", "released");
        // After the clock is set back, the tokens continue to grow.
        clock.set(-3600);
        let (third, _) = held(&holder.ask("lock-for 30000"));
        assert!(third > second);
        Ok(())
    }

    pub fn stopped_holder_never_overlaps_next_holder<E: Engine>() -> Drill {
        let arena = Arena::<E>::open()?;
        let seconds = std::env::var("LOCKKIT_CHAOS_SECONDS").map_or(10, |text| text.parse().expect("whole seconds"));
        let ttl = if E::TTL < 2000 { 300 } else { E::TTL };
        // A hold lasts for a TTL if its holder is stopped or killed, or half of one.
        let span = Duration::from_secs(seconds).max(Duration::from_millis(12 * ttl));
        let tally = leases::run(&Terms { ttl, heartbeat: ttl / 10, ..arena.terms() }, span);
        println!("{tally:?}");
        assert!(tally.holds > 4 && tally.kills > 4, "it was no chaos: {tally:?}");
        Ok(())
    }
}
pub use cases::*;
