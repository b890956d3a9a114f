//! The server of one drill, and what the drills share.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lockkit::{ErrorKind, Lease, LeaseStatus};

use super::clock::Clock;
use super::engine::{Access, Engine, Security};
use super::proxy::{Direction, Proxy};
use crate::errors::with_causes;
use crate::leases::Terms;
use crate::{Actor, LIVELY, until};

/// A server that ends with the drill, and the access to it.
pub(super) struct TestServer<E> {
    pub(super) security: Security,
    pub(super) engine: E,
}

impl<E: Engine> TestServer<E> {
    pub(super) fn open() -> Result<Self, String> {
        Self::with(Security::None)
    }

    pub(super) fn with(security: Security) -> Result<Self, String> {
        Ok(Self {
            engine: E::start(&security, None)?,
            security,
        })
    }

    /// Starts a server that uses a wall clock that the drill steps.
    pub(super) fn with_clock() -> Result<(Self, Clock), String> {
        if !E::goes_by_a_wall_clock() {
            return Err("this engine goes by no wall clock".to_owned());
        }
        let clock = Clock::new()?;
        let security = Security::None;
        Ok((
            Self {
                engine: E::start(&security, Some(&clock))?,
                security,
            },
            clock,
        ))
    }

    /// Returns the terms of a lease that only this drill uses, with the engine's short TTL.
    pub(super) fn terms(&self) -> Terms {
        self.terms_through(self.engine.port())
    }

    pub(super) fn terms_through(&self, port: u16) -> Terms {
        let access = Access::Right(&self.security);
        let url = self
            .engine
            .url(port, access, "drill")
            .expect("the right way is always there");
        Terms {
            ttl: E::TTL,
            heartbeat: E::TTL / 10,
            ..Terms::of(url)
        }
    }

    /// Returns the error of a client with `access`, with all its causes.
    pub(super) fn refusal(&self, port: u16, access: Access) -> Result<String, String> {
        let url = self
            .engine
            .url(port, access, "drill")
            .ok_or("this engine has nothing of that sort")?;
        let terms = Terms {
            ttl: E::TTL,
            ..Terms::of(url)
        };
        let error = terms.open().lock_for(LIVELY).expect_err("it is refused");
        let text = with_causes(&error);
        println!("{access:?}: {text}");
        Ok(text)
    }

    /// As [`cut_everywhere_then`](Self::cut_everywhere_then), all of it over a connection that is
    /// cut.
    pub(super) fn cut_everywhere(&self, mut action: impl FnMut(&Proxy)) {
        self.cut_everywhere_then(|_| (), |proxy, ()| action(proxy));
    }

    /// Plays a scene repeatedly behind a proxy that cuts the connection: after the first byte of
    /// each direction, after others that are spread evenly over the length of a scene, and after
    /// its last byte. The preparation of a scene is not cut.
    pub(super) fn cut_everywhere_then<T>(
        &self,
        prepare: impl Fn(&Proxy) -> T,
        mut scene: impl FnMut(&Proxy, T),
    ) {
        /// The number of cuts in each direction.
        const CUTS: u64 = 40;
        let proxy = Proxy::to(self.engine.port());
        let prepared = prepare(&proxy);
        let passed = || [Direction::Request, Direction::Answer].map(|way| proxy.passed(way));
        let before = passed();
        scene(&proxy, prepared);
        let lengths = passed()
            .into_iter()
            .zip(before)
            .map(|(after, before)| after - before);
        for (direction, length) in [Direction::Request, Direction::Answer]
            .into_iter()
            .zip(lengths.collect::<Vec<_>>())
        {
            assert!(length > 0, "nothing went {direction:?}");
            let mut cuts: Vec<u64> = (0..=CUTS)
                .map(|cut| length * cut / CUTS)
                .chain([1, length - 1])
                .collect();
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
pub(super) fn lease_with_fast_retries(terms: &Terms) -> Lease {
    let builder = terms
        .builder()
        .acquire_retry_limit(100)
        .acquire_retry_delay(Duration::from_millis(1));
    builder.build().expect("options that go together")
}

/// Returns the token under which it is held.
pub(super) fn token_of(lease: &Lease) -> Option<u64> {
    match lease.status().expect("the server answers") {
        LeaseStatus::Held(seen) => seen.token(),
        _ => None,
    }
}

/// Checks that an answer reports the death of the holder with this pid and token.
pub(super) fn assert_reports_death(answer: &str, pid: u32, before: u64) {
    let (token, recovered) = parse_held(answer);
    assert!(token > before, "{answer} after {before}");
    assert_eq!(recovered, format!("recovered {pid}"));
}

pub(super) fn remaining(holder: &mut Actor) -> Duration {
    let answer = holder.ask("remaining");
    let micros = answer
        .strip_prefix("remaining ")
        .and_then(|micros| micros.parse().ok());
    Duration::from_micros(micros.unwrap_or_else(|| panic!("{answer}")))
}

/// Waits until the client of the proxy has sent a request, and sends none any more.
pub fn until_quiet(proxy: &Proxy) {
    const QUIET: Duration = Duration::from_millis(500);
    let (mut asked, mut since) = (0, Instant::now());
    until("the waiter sends no more requests", || {
        let now = proxy.passed(Direction::Request);
        if now != asked || now == 0 {
            (asked, since) = (now, Instant::now());
        }
        since.elapsed() > QUIET
    });
}

/// Waits until the lease with this remaining time is renewed.
pub(super) fn until_renewed(mut remaining: impl FnMut() -> Duration) {
    let before = remaining();
    let start = Instant::now();
    until("the lease is renewed", || {
        // The elapsed time is read first. So the sum is at most the earlier remaining time, unless
        // a renewal adds to it.
        let elapsed = start.elapsed();
        remaining() + elapsed > before + Duration::from_millis(1)
    });
}

/// Starts an actor whose liveness no outside process can determine.
pub(super) fn start_in_pid_namespace(terms: &Terms) -> Option<Actor> {
    let unshare = || {
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
        command
    };
    let is_allowed = unshare()
        .arg("true")
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
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
pub(super) fn with_long_ttl(terms: Terms) -> Terms {
    Terms {
        ttl: 10 * LIVELY.as_millis() as u64,
        heartbeat: 1000,
        ..terms
    }
}

pub(super) type Drill = Result<(), String>;

/// Parses an answer `parse_held TOKEN …` into the token and the rest.
pub(super) fn parse_held(answer: &str) -> (u64, &str) {
    let rest = answer
        .strip_prefix("held ")
        .unwrap_or_else(|| panic!("{answer}"));
    let (token, rest) = rest.split_once(' ').unwrap_or((rest, ""));
    (token.parse().expect("a token"), rest)
}

/// Returns the final result of a request whose connection may be cut once.
pub(super) fn retry_once<T>(mut ask: impl FnMut() -> lockkit::Result<T>) -> T {
    ask()
        .or_else(|error| match error.kind() {
            ErrorKind::Store { .. } => ask(),
            _ => Err(error),
        })
        .expect("it is cut once")
}
