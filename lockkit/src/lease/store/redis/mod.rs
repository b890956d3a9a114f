//! Leases on Redis and Valkey.
//!
//! The record of a lease is the hash `lockkit:{name}`. The record is never deleted, because it keeps the token: the
//! greater of the previous token plus one and the microseconds since the epoch. Each step is one Lua script, and so
//! atomic.
//!
//! - **Time** is the server's wall clock, the only clock that the server has: a record is valid until a moment on it.
//!   If the clock is stepped ahead, it ends the leases of others too early by as much. If it is stepped back, leases
//!   without renewals last longer by as much. A holder counts by its own clock, and keeps a lease that its next
//!   heartbeat finds untaken. The tokens grow in both cases.
//! - **A restart** keeps what the server has written to its disk, with `appendonly yes`. If a record is lost or older
//!   afterwards, the holder's next heartbeat restores it, unless another claim has acquired the lease first.
//! - **A failover** may lose writes that were not yet copied, and so grant the lease twice. The later holder's token is
//!   greater if the new primary's clock is not behind. Only the token makes a failover safe.
//! - **A request** ends by its deadline. Only over TLS the client looks up the host name once more, without a limit.
//!   The look-up takes no time for an address, or for a name in `/etc/hosts`.
//! - **Waiters** leave a mark in the record. A release that finds the mark publishes to the channel `lockkit:{name}`;
//!   one connection of the process listens to all these channels.

use std::cell::Cell;
use std::collections::hash_map::DefaultHasher;
use std::error::Error as _;
use std::fs;
use std::hash::{Hash, Hasher};
use std::io;
use std::mem::ManuallyDrop;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use redis::io::tcp::{TcpSettings, socket2::TcpKeepalive};
use redis::{
    Client, ClientTlsConfig, Cmd, Connection, ConnectionAddr, ConnectionInfo, ConnectionLike, ErrorKind as Kind,
    IntoConnectionInfo, RedisConnectionInfo, RedisError, ServerErrorKind, TlsCertificates, Value,
};
use rustls::crypto::CryptoProvider;

use crate::base::cancel::CancelToken;
use crate::base::error::StoreError;
use crate::base::error::{Error, Result as AnyResult};
use crate::lease::store::lease_store::{
    Attempt, ClaimId, Deadline, Durability, Grant, LeaseName, LeaseSnapshot, LeaseStore, Released, Renewal,
    StoreProfile,
};
use crate::lease::store::server::{
    Listener, Pool, Subscriptions, addresses, attempt, not_connected, own_text, owner_of, passed_on, shown,
};
use crate::lease::url::{Parts, invalid};
use crate::sys::failpoint::step;
use crate::sys::process_local::ProcessLocal;

type Result<T, E = StoreError> = std::result::Result<T, E>;

/// The minimum TTL, which one slow answer should not use up.
const SMALLEST_TTL: Duration = Duration::from_millis(100);
/// The oldest version in which a script that reads the time may write.
const OLDEST: u32 = 5;
/// The timeout of a waiter's own requests.
const LONGEST_LOOK: Duration = Duration::from_secs(2);
/// The shortest timeout that a socket accepts, for a deadline that has passed.
const MOMENT: Duration = Duration::from_micros(1);

/// A script. The server gets its text only if the server does not know its hash.
struct Script {
    code: &'static str,
    hash: String,
}

macro_rules! script {
    ($file:literal) => {
        LazyLock::new(|| {
            let code = concat!(include_str!("record.lua"), include_str!($file));
            Script { code, hash: redis::Script::new(code).get_hash().to_owned() }
        })
    };
}

static ACQUIRE: LazyLock<Script> = script!("acquire.lua");
static RENEW: LazyLock<Script> = script!("renew.lua");
static FREE: LazyLock<Script> = script!("free.lua");
static LOOK: LazyLock<Script> = script!("look.lua");

/// Returns the store on the server at `url`, without connecting.
pub(in crate::lease) fn open(url: &str) -> AnyResult<Arc<dyn LeaseStore>> {
    Ok(Arc::new(RedisStore { server: Arc::new(Server::of(url)?), own: ProcessLocal::new() }))
}

struct RedisStore {
    server: Arc<Server>,
    own: ProcessLocal<Arc<Own>>,
}

/// The state of the store in one process.
struct Own {
    pool: Pool<Connection>,
    bells: Arc<Subscriptions>,
}

/// The way in which a lease was left, or is left now.
#[derive(Clone, Copy)]
enum Left {
    /// Its holder released it.
    Released,
    /// Its holder gave it up.
    Lost,
    /// The holder was evicted.
    Evicted,
}

impl RedisStore {
    fn own(&self) -> Arc<Own> {
        let own = self.own.get_or_make(|| {
            let server = self.server.clone();
            let connect = move |by| Ok(Box::new(RedisListener::to(&server, by)?) as Box<dyn Listener>);
            Arc::new(Own { pool: Pool::new(), bells: Subscriptions::new(connect) })
        });
        own.clone()
    }

    /// Runs a script on the record of `name`, and returns the words of its answer.
    fn run(&self, script: &Script, name: &LeaseName, arguments: &[&str], by: Deadline) -> Result<Vec<String>> {
        self.run_in_doubt(script, name, arguments, by).map(|(words, _)| words)
    }

    /// Like [`run`](Self::run), and also returns whether an earlier attempt got no answer. Every script may run more
    /// than once.
    fn run_in_doubt(
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
        let server = &self.server;
        let is_in_doubt = Cell::new(false);
        let ask = |connection: &mut Connection, command: &Cmd| {
            ask(connection, command, by).map_err(|error| {
                is_in_doubt.set(true);
                server.unknown(&error)
            })
        };
        let run = || {
            self.own().pool.ask(
                || server.connect(by),
                |connection| match ask(connection, &call("EVALSHA", &script.hash))? {
                    Err(error) if error.kind() == Kind::Server(ServerErrorKind::NoScript) => {
                        ask(connection, &call("EVAL", script.code))
                    }
                    // The server was the primary. Its name may now lead to the new primary.
                    Err(error) if is_of_replica(&error) => Err(server.refused(&error)),
                    answer => Ok(answer),
                },
            )
        };
        let answer = loop {
            match run() {
                Err(error) if Interrupted::is(&error) && !by.is_past() => {}
                answer => break answer.and_then(|answer| answer.map_err(|error| server.refused(&error))),
            }
        };
        let answer = answer.map_err(|error| match error {
            // The first of several requests got no answer and may have taken effect.
            StoreError::NotApplied(cause) | StoreError::Permanent(cause) if is_in_doubt.get() => {
                StoreError::Unknown(cause)
            }
            error => error,
        });
        let words = redis::from_redis_value(answer?);
        Ok((words.map_err(|_| self.garbled())?, is_in_doubt.get()))
    }

    fn free(
        &self,
        name: &LeaseName,
        [claim, token]: [String; 2],
        left: Left,
        owner: Option<&str>,
        by: Deadline,
    ) -> Result<Released> {
        let (state, whose) = match left {
            Left::Released => ("released", "holder"),
            Left::Lost => ("lost", "holder"),
            Left::Evicted => ("evicted", ""),
        };
        let mut arguments = vec![&*claim, &*token, state, whose];
        arguments.extend(owner);
        let (words, is_in_doubt) = self.run_in_doubt(&FREE, name, &arguments, by)?;
        match words.first().map(String::as_str) {
            Some("done") => {
                step("record freed");
                Ok(Released::Done)
            }
            // The first of several requests got no answer but freed the name, and another claim acquired the name.
            Some("not mine") if matches!(left, Left::Released) && is_in_doubt => Ok(Released::Done),
            Some("not mine") => Ok(Released::NotMine),
            _ => Err(self.garbled()),
        }
    }

    /// Returns the holder of the name; with `mark`, also leaves the mark of a waiter.
    fn get(&self, name: &LeaseName, mark: bool, by: Deadline) -> Result<Option<LeaseSnapshot>> {
        let words = self.run(&LOOK, name, &[if mark { "waits" } else { "" }], by)?;
        match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["free"] => Ok(None),
            ["held", ref holder @ ..] => seen(holder).map(Some).ok_or_else(|| self.garbled()),
            _ => Err(self.garbled()),
        }
    }

    #[cold]
    fn garbled(&self) -> StoreError {
        StoreError::permanent(format!("what {} keeps for the lease is not lockkit's", self.server.place))
    }
}

impl LeaseStore for RedisStore {
    fn profile(&self) -> StoreProfile {
        StoreProfile {
            smallest_ttl: SMALLEST_TTL,
            ttl_step: Duration::from_micros(1),
            wakes_waiters: true,
            failure_domain: Some(self.server.number),
            ..StoreProfile::new(Durability::Primary)
        }
    }

    fn try_acquire(&self, name: &LeaseName, claim: &ClaimId, ttl: Duration, by: Deadline) -> Result<Attempt> {
        let (id, micros, owner) = (claim.to_string(), ttl.as_micros().to_string(), own_text());
        attempt(|dead| {
            let [dead_claim, dead_token] = dead.and_then(of_seen).unwrap_or_default();
            let words = self.run(&ACQUIRE, name, &[&id, &micros, &owner, &dead_claim, &dead_token], by)?;
            match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
                ["granted", token, before] => {
                    step("record written");
                    let token = token.parse().map_err(|_| self.garbled())?;
                    let grant = Grant::new(name, claim, token, ttl).with_handle(owner.clone());
                    Ok(Attempt::Granted(match before.strip_prefix(' ') {
                        Some(died) => grant.recovered_from(owner_of(died)),
                        None => grant,
                    }))
                }
                ["busy", ref holder @ ..] => seen(holder).map(Attempt::Busy).ok_or_else(|| self.garbled()),
                ["over"] => Err(StoreError::not_applied("the claim has ended already")),
                _ => Err(self.garbled()),
            }
        })
    }

    fn renew(&self, grant: &Grant, by: Deadline) -> Result<Renewal> {
        let [claim, token] = of_grant(grant);
        let owner = grant.handle::<String>().map_or("", |owner| owner);
        let words =
            self.run(&RENEW, grant.name(), &[&claim, &token, &grant.ttl().as_micros().to_string(), owner], by)?;
        match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["extended"] => Ok(Renewal::Extended { ttl: grant.ttl() }),
            ["lost", by] => Ok(Renewal::Lost { by: owner_of(by) }),
            _ => Err(self.garbled()),
        }
    }

    fn release(&self, grant: &Grant, by: Deadline) -> Result<Released> {
        self.free(grant.name(), of_grant(grant), Left::Released, None, by)
    }

    fn abandon(&self, grant: &Grant, by: Deadline) -> Result<Released> {
        let owner = passed_on(grant).or_else(|| grant.handle::<String>().cloned());
        self.free(grant.name(), of_grant(grant), Left::Lost, owner.as_deref(), by)
    }

    fn get(&self, name: &LeaseName, by: Deadline) -> Result<Option<LeaseSnapshot>> {
        Ok(self.get(name, false, by)?.map(shown))
    }

    fn evict(&self, name: &LeaseName, seen: &LeaseSnapshot, by: Deadline) -> Result<Released> {
        match of_seen(seen) {
            Some(holder) => self.free(name, holder, Left::Evicted, None, by),
            None => Ok(Released::NotMine),
        }
    }

    fn wait_for_change(&self, name: &LeaseName, seen: &LeaseSnapshot, by: Deadline, stop: &CancelToken) -> Result<()> {
        let soon = by.min(Deadline::after(LONGEST_LOOK));
        let bell = self.own().bells.subscribe(name, soon, stop)?;
        step("bell hung");
        if stop.is_cancelled() {
            return Ok(());
        }
        match self.get(name, true, soon)? {
            Some(now) if now.is_same_holder(seen) => bell.wait(seen.owner(), by, stop),
            _ => Ok(()),
        }
    }
}

fn key(name: &LeaseName) -> String {
    format!("{PREFIX}{name}{SUFFIX}")
}

/// The text before and after the name of a lease in its key and its channel.
const PREFIX: &str = "lockkit:{";
const SUFFIX: &str = "}";

fn of_grant(grant: &Grant) -> [String; 2] {
    [grant.claim().to_string(), grant.token().to_string()]
}

fn of_seen(seen: &LeaseSnapshot) -> Option<[String; 2]> {
    Some([seen.claim()?.to_string(), seen.token()?.to_string()])
}

/// Returns the holder in a script's answer: token, claim, time left in microseconds, owner.
fn seen(words: &[&str]) -> Option<LeaseSnapshot> {
    let [token, claim, left, owner] = *words else { return None };
    let left: u64 = left.parse().ok()?;
    let mut hasher = DefaultHasher::new();
    (token, claim, left).hash(&mut hasher);
    let seen = LeaseSnapshot::new(hasher.finish())
        .with_token(token.parse().ok()?)
        .with_claim(ClaimId::from_number(u128::from_str_radix(claim, 16).ok()?))
        .with_expires_in(Duration::from_micros(left));
    Some(match owner_of(owner) {
        Some(owner) => seen.with_owner(owner),
        None => seen,
    })
}

/// The address of a server and the settings for connecting to it.
struct Server {
    /// The address without user, password and database. This module sends those itself, so that each answer has the
    /// remaining time as its limit, and each error gets its own message.
    address: ConnectionInfo,
    settings: RedisConnectionInfo,
    ca: Option<PathBuf>,
    /// A client's certificate and its key.
    certificate: Option<[PathBuf; 2]>,
    /// The address in messages.
    place: String,
    number: u64,
}

impl Server {
    fn of(url: &str) -> AnyResult<Self> {
        let wrong = |problem: &str| invalid(url, problem);
        let [mut ca, mut certificate, mut key] = [const { None }; 3];
        for (parameter, value) in Parts::of(url).parameters() {
            let value = value.ok_or_else(|| wrong("the value of a parameter is no UTF-8, or a % in it is wrong"))?;
            let file = match parameter {
                "ca" => &mut ca,
                "cert" => &mut certificate,
                "key" => &mut key,
                "db" | "user" | "pass" if Parts::of(url).scheme.ends_with("unix") => continue,
                _ => return Err(invalid(url, format!("lockkit knows no parameter `{parameter}` of redis:// URLs"))),
            };
            if file.replace(PathBuf::from(value)).is_some() {
                return Err(invalid(url, format!("it has `{parameter}` twice")));
            }
        }
        if url.contains('#') {
            return Err(wrong("it has a # in it; write %23 where one is meant"));
        }
        let parsed = url.into_connection_info().map_err(|error| invalid(url, error.to_string()))?;
        let certificate = match (certificate, key) {
            (Some(certificate), Some(key)) => Some([certificate, key]),
            (None, None) => None,
            _ => return Err(wrong("`cert` and `key` go together")),
        };
        let is_tls = matches!(parsed.addr(), ConnectionAddr::TcpTls { .. });
        if !is_tls && (ca.is_some() || certificate.is_some()) {
            return Err(wrong("`ca`, `cert` and `key` are for TLS, with rediss:// or valkeys://"));
        }
        // So that a waiter learns of a server that vanished without a notice.
        let keepalive = TcpKeepalive::new().with_time(Duration::from_secs(10)).with_interval(Duration::from_secs(5));
        let tcp = TcpSettings::default().set_nodelay(true).set_keepalive(keepalive);
        let place = format!("{}", parsed.addr());
        let mut hasher = DefaultHasher::new();
        place.hash(&mut hasher);
        Ok(Self {
            settings: parsed.redis_settings().clone(),
            address: parsed
                .set_redis_settings(RedisConnectionInfo::default().set_skip_set_lib_name())
                .set_tcp_settings(tcp),
            ca,
            certificate,
            place,
            number: hasher.finish(),
        })
    }

    fn is_tls(&self) -> bool {
        matches!(self.address.addr(), ConnectionAddr::TcpTls { .. })
    }

    /// Opens a connection that is ready for requests.
    fn connect(&self, by: Deadline) -> Result<Connection> {
        let mut connection = self.open(by)?;
        // Set once: a request is far smaller than the socket's buffer, which is empty whenever a request is sent.
        let limited = connection.set_write_timeout(Some(by.remaining().max(MOMENT)));
        limited.map_err(|error| self.unreachable(&error))?;
        // A failure here has changed nothing, whatever the answer.
        let mut ask = |command: &Cmd| match ask(&mut connection, command, by) {
            Err(error) => Err(self.unreachable(&error)),
            // The server gives this answer to any request when it has no room for the client.
            Ok(Err(error)) if said(&error).contains("max number of clients") => Err(self.refused(&error)),
            Ok(answer) => Ok(answer),
        };
        if let Some(password) = self.settings.password() {
            let mut auth = redis::cmd("AUTH");
            self.settings.username().into_iter().for_each(|user| _ = auth.arg(user));
            if let Err(error) = ask(auth.arg(password))? {
                return Err(self.misuse("does not accept the user and password of the URL", &error));
            }
        }
        let database = self.settings.db();
        if database != 0
            && let Err(error) = ask(redis::cmd("SELECT").arg(database))?
        {
            return Err(match error.kind() {
                Kind::Server(ServerErrorKind::ResponseError) => {
                    self.misuse(&format!("has no database {database}"), &error)
                }
                _ => self.refused(&error),
            });
        }
        match ask(redis::cmd("INFO").arg("server"))? {
            Ok(Value::BulkString(told)) => self.check_version(&String::from_utf8_lossy(&told))?,
            // The user may lack the permission for INFO.
            Ok(_) => {}
            Err(error) if error.kind() == Kind::Server(ServerErrorKind::NoPerm) => {}
            Err(error) => return Err(self.refused(&error)),
        }
        step("connected");
        Ok(connection)
    }

    /// Opens a connection to the first address of the host that answers; each address gets an equal part of the time
    /// that is left.
    fn open(&self, by: Deadline) -> Result<Connection> {
        let open = |client: Client, part: u32| {
            let limit = (by.remaining() / part.max(1)).max(MOMENT);
            client.get_connection_with_timeout(limit)
        };
        let look_up = |host, port| addresses(host, port, by).map_err(|error| not_connected(&self.place, &error));
        let count = |left: usize| u32::try_from(left).unwrap_or(u32::MAX);
        let opened = match self.address.addr() {
            ConnectionAddr::Tcp(host, port) => {
                let found = look_up(host, *port)?;
                let mut opened = Err(io::Error::from(io::ErrorKind::NotFound).into());
                for (at, address) in found.iter().enumerate() {
                    let address = ConnectionAddr::Tcp(address.ip().to_string(), *port);
                    opened = Client::open(self.address.clone().set_addr(address))
                        .and_then(|client| open(client, count(found.len() - at)));
                    if opened.is_ok() {
                        break;
                    }
                }
                opened
            }
            // The client must know the name for TLS, so the client itself tries all addresses, each for this time.
            ConnectionAddr::TcpTls { host, port, .. } => open(self.tls_client()?, count(look_up(host, *port)?.len())),
            _ => Client::open(self.address.clone()).and_then(|client| open(client, 1)),
        };
        opened.map_err(|error| self.unreachable(&error))
    }

    fn tls_client(&self) -> Result<Client> {
        // The client takes the provider of the process, and panics if there is none and several are possible.
        if CryptoProvider::get_default().is_none() {
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        // Read for each connection, because certificates are replaced while programs run. During the replacement a file
        // may be missing or incomplete.
        let read = |path: &PathBuf| {
            fs::read(path)
                .map_err(|error| StoreError::not_applied(Error::io("read the certificate or key", path, error)))
        };
        let client_tls = match &self.certificate {
            Some([certificate, key]) => {
                Some(ClientTlsConfig { client_cert: read(certificate)?, client_key: read(key)? })
            }
            None => None,
        };
        let root_cert = self.ca.as_ref().map(read).transpose()?;
        Client::build_with_tls(self.address.clone(), TlsCertificates { client_tls, root_cert }).map_err(|error| {
            StoreError::not_applied(format!(
                "{} cannot be reached with these certificates: {}",
                self.place,
                said(&error)
            ))
        })
    }

    fn check_version(&self, told: &str) -> Result<()> {
        let version = told.lines().find_map(|line| line.strip_prefix("redis_version:")).unwrap_or_default().trim();
        match version.split('.').next().map(str::parse::<u32>) {
            Some(Ok(major)) if major < OLDEST => {
                let place = &self.place;
                Err(StoreError::permanent(format!(
                    "{place} is version {version}, which is too old: {OLDEST} is needed"
                )))
            }
            _ => Ok(()),
        }
    }

    /// Returns the error for a failed connection.
    #[cold]
    fn unreachable(&self, error: &RedisError) -> StoreError {
        let place = &self.place;
        // The certificate and the key do not match, for example when only one of them has been replaced so far.
        if error.kind() == Kind::InvalidClientConfig {
            return StoreError::not_applied(format!(
                "{place} cannot be reached with this certificate and key: {error}"
            ));
        }
        if let Some(error) = inner::<rustls::Error>(error) {
            return StoreError::permanent(match error {
                rustls::Error::InvalidCertificate(_) => format!(
                    "the certificate of {place} cannot be trusted ({error}); `?ca=` in the URL names its authority"
                ),
                rustls::Error::InvalidMessage(_) => {
                    format!("{place} does not speak TLS ({error}); without it, the URL begins with redis://")
                }
                rustls::Error::AlertReceived(_) => format!(
                    "{place} refuses the TLS connection ({error}); `?cert=` and `key=` in the URL name a certificate"
                ),
                _ => format!("no TLS connection to {place} comes about: {error}"),
            });
        }
        let Some(found) = inner::<io::Error>(error) else {
            return StoreError::permanent(format!("{place} cannot be reached: {error}"));
        };
        use io::ErrorKind::{ConnectionReset, TimedOut, UnexpectedEof, WouldBlock};
        let asks = match self.is_tls() {
            true => "if it does not speak TLS, the URL begins with redis://",
            false => "if it speaks TLS, the URL begins with rediss://",
        };
        match found.kind() {
            io::ErrorKind::Interrupted => StoreError::not_applied(Interrupted),
            UnexpectedEof | ConnectionReset => {
                StoreError::not_applied(format!("{place} closed the connection before it answered; {asks}"))
            }
            TimedOut | WouldBlock => StoreError::not_applied(format!("{place} did not answer in time; {asks}")),
            _ => not_connected(place, found),
        }
    }

    /// Returns the meaning of an error answer.
    #[cold]
    fn refused(&self, error: &RedisError) -> StoreError {
        let place = &self.place;
        let problem = match error.code().unwrap_or_default() {
            _ if is_of_replica(error) => "is a replica, and the lease is with its primary",
            "NOAUTH" => return self.misuse("asks for a password, as in redis://:password@host", error),
            "NOPERM" => {
                let what = "does not allow this user what leases need: +@hash +@scripting +@pubsub +time ~lockkit:* \
                            &lockkit:*, and +select where the URL has the number of a database";
                return self.misuse(what, error);
            }
            "WRONGTYPE" => return self.misuse("keeps something else under the key of the lease", error),
            "MOVED" | "ASK" | "CROSSSLOT" => {
                return self.misuse("is one of a cluster, and has the lease elsewhere", error);
            }
            "LOADING" => "is reading what it has kept, and soon ready",
            "OOM" => "has no memory left",
            "BUSY" => "is busy with a script",
            _ => "refused",
        };
        StoreError::not_applied(format!("{place} {problem}: {}", said(error)))
    }

    fn misuse(&self, problem: &str, error: &RedisError) -> StoreError {
        StoreError::permanent(format!("{} {problem}: {}", self.place, said(error)))
    }

    /// Returns the error for a request that may have taken effect.
    #[cold]
    fn unknown(&self, error: &RedisError) -> StoreError {
        let place = &self.place;
        if is_interrupted(error) {
            return StoreError::unknown(Interrupted);
        }
        StoreError::unknown(match error.is_timeout() {
            true => format!("{place} did not answer in time"),
            false => format!("the connection to {place} broke off: {error}"),
        })
    }
}

/// Sends a request. The outer error is a failed connection, the inner error an error answer of the server.
fn ask(connection: &mut Connection, command: &Cmd, by: Deadline) -> Result<Result<Value, RedisError>, RedisError> {
    connection.set_read_timeout(Some(by.remaining().max(MOMENT)))?;
    match connection.req_command(command).and_then(Value::extract_error) {
        Err(error) if !matches!(error.kind(), Kind::Server(_) | Kind::Extension) => Err(error),
        answer => Ok(answer),
    }
}

/// Returns whether only a primary may run the request. Before Redis 7 the error code is within the message of the
/// script's failure.
fn is_of_replica(error: &RedisError) -> bool {
    said(error).contains("READONLY")
}

/// Returns the server's message.
fn said(error: &RedisError) -> String {
    match (error.code(), error.detail()) {
        (Some(code), Some(detail)) => format!("{code} {detail}"),
        _ => error.to_string(),
    }
}

/// Returns the error of this type at the bottom of the client's error.
fn inner<E: std::error::Error + 'static>(error: &RedisError) -> Option<&E> {
    let shared: &Arc<dyn std::error::Error + Send + Sync> = error.source()?.downcast_ref()?;
    let error: &(dyn std::error::Error + 'static) = &**shared;
    error.downcast_ref().or_else(|| error.downcast_ref::<io::Error>()?.get_ref()?.downcast_ref())
}

/// A signal or a stop interrupted a wait for the server. The client treats that as a failure, so the request must be
/// repeated over another connection.
#[derive(Debug, thiserror::Error)]
#[error("the wait for the server was interrupted")]
struct Interrupted;

impl Interrupted {
    fn is(error: &StoreError) -> bool {
        matches!(error, StoreError::NotApplied(cause) | StoreError::Unknown(cause) if cause.is::<Self>())
    }
}

fn is_interrupted(error: &RedisError) -> bool {
    inner::<io::Error>(error).is_some_and(|error| error.kind() == io::ErrorKind::Interrupted)
}

/// A connection that receives every release that has a waiter.
struct RedisListener {
    connection: Connection,
    server: Arc<Server>,
}

impl RedisListener {
    fn to(server: &Arc<Server>, by: Deadline) -> Result<Self> {
        let mut connection = server.connect(by)?;
        let mut subscribe = redis::cmd("PSUBSCRIBE");
        // Exactly the pattern in the user's ACL: Redis compares the text of patterns, not what they match.
        subscribe.arg("lockkit:*");
        match ask(&mut connection, &subscribe, by) {
            Ok(Ok(_)) => Ok(Self { connection, server: server.clone() }),
            Ok(Err(error)) => Err(server.refused(&error)),
            Err(error) => Err(server.unreachable(&error)),
        }
    }
}

impl Listener for RedisListener {
    fn listen(&mut self, at_most: Duration, ring: &mut dyn FnMut(&str)) -> Result<()> {
        let listening = self.connection.set_read_timeout(Some(at_most)).and_then(|()| {
            // Dropping it would unsubscribe. It owns nothing as long as it is only read from.
            ManuallyDrop::new(self.connection.as_pubsub()).get_message()
        });
        match listening {
            Ok(message) => {
                let channel = message.get_channel_name();
                if let Some(name) = channel.strip_prefix(PREFIX).and_then(|rest| rest.strip_suffix(SUFFIX)) {
                    ring(name);
                }
                Ok(())
            }
            Err(error) if error.is_timeout() || is_interrupted(&error) => Ok(()),
            Err(error) => Err(self.server.unknown(&error)),
        }
    }
}
