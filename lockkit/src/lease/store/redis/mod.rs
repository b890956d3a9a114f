//! Leases on Redis and Valkey.
//!
//! The record of a lease is the hash `lockkit:{name}`. The record is never deleted, because it
//! keeps the token: the greater of the previous token plus one and the microseconds since the
//! epoch. Each step is one Lua script, and so atomic.
//!
//! - **Time** is the server's wall clock, the only clock that the server has: a record is valid
//!   until a moment on it. If the clock is stepped ahead, it ends the leases of others too early by
//!   as much. If it is stepped back, leases without renewals last longer by as much. A holder
//!   counts by its own clock, and keeps a lease that its next heartbeat finds untaken. The tokens
//!   grow in both cases.
//! - **A restart** keeps what the server has written to its disk, with `appendonly yes`. If a
//!   record is lost or older afterwards, the holder's next heartbeat restores it, unless another
//!   claim has acquired the lease first.
//! - **A failover** may lose writes that were not yet copied, and so grant the lease twice. The
//!   later holder's token is greater if the new primary's clock is not behind. Only the token makes
//!   a failover safe.
//! - **A request** ends by its deadline. Only over TLS the client looks up the host name once more,
//!   without a limit. The look-up takes no time for an address, or for a name in `/etc/hosts`.
//! - **Waiters** leave a mark in the record. A release that finds the mark publishes to the channel
//!   `lockkit:{name}`; one connection of the process listens to all these channels.

mod config;
mod connection;
mod error;
mod key;

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use redis::{Cmd, Connection, ErrorKind, ServerErrorKind};

use self::config::ServerConfig;
use self::connection::{RedisListener, send};
use self::error::{Interrupted, is_of_replica};
use self::key::key;
use crate::base::cancel::CancelToken;
use crate::base::error::StoreError;
use crate::lease::store::lease_store::{
    Attempt, ClaimId, Deadline, Durability, Grant, LeaseName, LeaseSnapshot, LeaseStore, Released,
    Renewal, StoreProfile,
};
use crate::lease::store::server::{
    EndState, Listener, Outcome, Pool, Result, Subscriptions, acquire_or_take_over, expire_if_dead,
    format_current_owner, format_recovered_owner, parse_claim, parse_owner, release_not_found,
};
use crate::sys::failpoint::step;
use crate::sys::process_local::ProcessLocal;

/// The minimum TTL, which one slow answer should not use up.
const MIN_TTL: Duration = Duration::from_millis(100);
/// The timeout of a waiter's own requests.
const WAITER_REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// A script. The server gets its text only if the server does not know its hash.
struct Script {
    code: &'static str,
    hash: String,
}

macro_rules! script {
    ($file:literal) => {
        LazyLock::new(|| {
            let code = concat!(include_str!("record.lua"), include_str!($file));
            Script {
                code,
                hash: redis::Script::new(code).get_hash().to_owned(),
            }
        })
    };
}

static ACQUIRE: LazyLock<Script> = script!("acquire.lua");
static RENEW: LazyLock<Script> = script!("renew.lua");
static FREE: LazyLock<Script> = script!("free.lua");
static GET: LazyLock<Script> = script!("get.lua");

/// Returns the store on the server at `url`, without connecting.
pub(in crate::lease) fn open(url: &str) -> crate::Result<Arc<dyn LeaseStore>> {
    Ok(Arc::new(RedisStore {
        config: Arc::new(ServerConfig::parse(url)?),
        state: ProcessLocal::new(),
    }))
}

struct RedisStore {
    config: Arc<ServerConfig>,
    state: ProcessLocal<Arc<ProcessState>>,
}

/// The state of the store in one process.
struct ProcessState {
    pool: Pool<Connection>,
    subscriptions: Arc<Subscriptions>,
}

impl RedisStore {
    fn state(&self) -> Arc<ProcessState> {
        let state = self.state.get_or_make(|| {
            let config = self.config.clone();
            let listen =
                move |by| Ok(Box::new(RedisListener::open(&config, by)?) as Box<dyn Listener>);
            Arc::new(ProcessState {
                pool: Pool::new(),
                subscriptions: Subscriptions::new(listen),
            })
        });
        state.clone()
    }

    /// Runs a script on the record of `name`, and returns the words of its answer.
    fn run(
        &self,
        script: &Script,
        name: &LeaseName,
        arguments: &[&str],
        by: Deadline,
    ) -> Result<Vec<String>> {
        self.run_observed(script, name, arguments, by)
            .map(|(words, _)| words)
    }

    /// Like [`run`](Self::run), and also returns whether an earlier attempt got no answer. Every
    /// script may run more than once.
    fn run_observed(
        &self,
        script: &Script,
        name: &LeaseName,
        arguments: &[&str],
        by: Deadline,
    ) -> Result<(Vec<String>, bool)> {
        let call = |command: &str, script: &str| {
            let mut call = redis::cmd(command);
            call.arg(script).arg(1).arg(key(name)).arg(arguments);
            call
        };
        let config = &self.config;
        let outcome = Outcome::default();
        let send = |connection: &mut Connection, command: &Cmd| {
            send(connection, command, by).map_err(|error| config.unanswered(&error))
        };
        let run = || {
            self.state().pool.run(
                &outcome,
                || config.connect(by),
                |connection| match send(connection, &call("EVALSHA", &script.hash))? {
                    Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                        send(connection, &call("EVAL", script.code))
                    }
                    // The server was the primary. Its name may now lead to the new primary.
                    Err(error) if is_of_replica(&error) => Err(config.refused(&error)),
                    answer => Ok(answer),
                },
            )
        };
        let answer = loop {
            match run() {
                Err(error) if Interrupted::is(&error) && !by.is_past() => {}
                answer => {
                    break answer.and_then(|answer| answer.map_err(|error| config.refused(&error)));
                }
            }
        };
        let answer = answer.map_err(|error| outcome.resolve(error))?;
        let words = redis::from_redis_value(answer).map_err(|_| self.foreign_record())?;
        Ok((words, outcome.is_indeterminate()))
    }

    fn free(
        &self,
        name: &LeaseName,
        [claim, token]: [String; 2],
        state: EndState,
        owner: Option<&str>,
        by: Deadline,
    ) -> Result<Released> {
        let caller = if state == EndState::Evicted {
            ""
        } else {
            "holder"
        };
        let mut arguments = vec![&*claim, &*token, state.text(), caller];
        arguments.extend(owner);
        let (words, is_indeterminate) = self.run_observed(&FREE, name, &arguments, by)?;
        match words.first().map(String::as_str) {
            Some("done") => {
                step("record freed");
                Ok(Released::Done)
            }
            Some("not mine") if state == EndState::Released => {
                Ok(release_not_found(is_indeterminate))
            }
            Some("not mine") => Ok(Released::NotMine),
            _ => Err(self.foreign_record()),
        }
    }

    /// Returns the holder of the name; with `mark`, also leaves the mark of a waiter.
    fn get(&self, name: &LeaseName, mark: bool, by: Deadline) -> Result<Option<LeaseSnapshot>> {
        let words = self.run(&GET, name, &[if mark { "waits" } else { "" }], by)?;
        match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["free"] => Ok(None),
            ["held", ref holder @ ..] => parse_snapshot(holder)
                .map(Some)
                .ok_or_else(|| self.foreign_record()),
            _ => Err(self.foreign_record()),
        }
    }

    #[cold]
    fn foreign_record(&self) -> StoreError {
        StoreError::permanent(format!(
            "cannot use the record of the lease at {}: lockkit did not write it; use another name or database",
            self.config.server
        ))
    }
}

impl LeaseStore for RedisStore {
    fn profile(&self) -> StoreProfile {
        StoreProfile {
            smallest_ttl: MIN_TTL,
            ttl_step: Duration::from_micros(1),
            wakes_waiters: true,
            failure_domain: Some(self.config.failure_domain),
            ..StoreProfile::new(Durability::Primary)
        }
    }

    fn try_acquire(
        &self,
        name: &LeaseName,
        claim: &ClaimId,
        ttl: Duration,
        by: Deadline,
    ) -> Result<Attempt> {
        let (id, micros, owner) = (
            claim.to_string(),
            ttl.as_micros().to_string(),
            format_current_owner(),
        );
        acquire_or_take_over(|dead| {
            let [dead_claim, dead_token] = dead.and_then(arguments_of_snapshot).unwrap_or_default();
            let words = self.run(
                &ACQUIRE,
                name,
                &[&id, &micros, &owner, &dead_claim, &dead_token],
                by,
            )?;
            match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
                ["granted", token, before] => {
                    step("record written");
                    let token = token.parse().map_err(|_| self.foreign_record())?;
                    let grant = Grant::new(name, claim, token, ttl).with_handle(owner.clone());
                    Ok(Attempt::Granted(match before.strip_prefix(' ') {
                        Some(dead) => grant.recovered_from(parse_owner(dead)),
                        None => grant,
                    }))
                }
                ["busy", ref holder @ ..] => parse_snapshot(holder)
                    .map(Attempt::Busy)
                    .ok_or_else(|| self.foreign_record()),
                ["over"] => Err(StoreError::not_applied(
                    "cannot acquire with this claim: its grant has already ended",
                )),
                _ => Err(self.foreign_record()),
            }
        })
    }

    fn renew(&self, grant: &Grant, by: Deadline) -> Result<Renewal> {
        let [claim, token] = arguments_of_grant(grant);
        let owner = grant.handle::<String>().map_or("", |owner| owner);
        let words = self.run(
            &RENEW,
            grant.name(),
            &[&claim, &token, &grant.ttl().as_micros().to_string(), owner],
            by,
        )?;
        match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["extended"] => Ok(Renewal::Extended { ttl: grant.ttl() }),
            ["lost", by] => Ok(Renewal::Lost {
                by: parse_owner(by),
            }),
            _ => Err(self.foreign_record()),
        }
    }

    fn release(&self, grant: &Grant, by: Deadline) -> Result<Released> {
        self.free(
            grant.name(),
            arguments_of_grant(grant),
            EndState::Released,
            None,
            by,
        )
    }

    fn abandon(&self, grant: &Grant, by: Deadline) -> Result<Released> {
        let owner = format_recovered_owner(grant).or_else(|| grant.handle::<String>().cloned());
        self.free(
            grant.name(),
            arguments_of_grant(grant),
            EndState::Lost,
            owner.as_deref(),
            by,
        )
    }

    fn get(&self, name: &LeaseName, by: Deadline) -> Result<Option<LeaseSnapshot>> {
        Ok(self.get(name, false, by)?.map(expire_if_dead))
    }

    fn evict(&self, name: &LeaseName, seen: &LeaseSnapshot, by: Deadline) -> Result<Released> {
        match arguments_of_snapshot(seen) {
            Some(holder) => self.free(name, holder, EndState::Evicted, None, by),
            None => Ok(Released::NotMine),
        }
    }

    fn wait_for_change(
        &self,
        name: &LeaseName,
        seen: &LeaseSnapshot,
        by: Deadline,
        stop: &CancelToken,
    ) -> Result<()> {
        let request_by = by.min(Deadline::after(WAITER_REQUEST_TIMEOUT));
        let subscription = self
            .state()
            .subscriptions
            .subscribe(name, request_by, stop)?;
        step("subscribed");
        if stop.is_cancelled() {
            return Ok(());
        }
        match self.get(name, true, request_by)? {
            Some(current) if current.is_same_holder(seen) => {
                subscription.wait(seen.owner(), by, stop)
            }
            _ => Ok(()),
        }
    }
}

fn arguments_of_grant(grant: &Grant) -> [String; 2] {
    [grant.claim().to_string(), grant.token().to_string()]
}

fn arguments_of_snapshot(seen: &LeaseSnapshot) -> Option<[String; 2]> {
    Some([seen.claim()?.to_string(), seen.token()?.to_string()])
}

/// Returns the holder in a script's answer: token, claim, time left in microseconds, owner.
fn parse_snapshot(words: &[&str]) -> Option<LeaseSnapshot> {
    let [token, claim, left, owner] = *words else {
        return None;
    };
    let left: u64 = left.parse().ok()?;
    let mut hasher = DefaultHasher::new();
    (token, claim, left).hash(&mut hasher);
    let seen = LeaseSnapshot::new(hasher.finish())
        .with_token(token.parse().ok()?)
        .with_claim(parse_claim(claim)?)
        .with_expires_in(Duration::from_micros(left));
    Some(match parse_owner(owner) {
        Some(owner) => seen.with_owner(owner),
        None => seen,
    })
}
