//! Requests to etcd's JSON gateway: the choice of the endpoint, the credentials, and the meaning of the answers.
//!
//! - **Endpoints**: the endpoint that answered last is asked first. The next one is asked if an endpoint cannot be
//!   reached, has no leader, or takes longer than its part of the time. All of this ends by the request's deadline.
//!   While a leader is being elected, the first endpoint follows the last. Every request here can be repeated: see
//!   [`Store`](super::Store).
//! - **Credentials**: a token is requested with the first request, and again when the server no longer knows it.
//! - **JSON**: numbers of 64 bits are strings, zero or empty values are omitted, bytes are base64.
//!
//! The HTTP client is [`http`](super::http), on the crates that parse HTTP and speak TLS. The reason: a store must know
//! whether a request was sent, limit each read of a watch, and start no thread for a request.

use std::cell::Cell;
use std::fmt;
use std::io::{self, ErrorKind as Io};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use parking_lot::Mutex;
use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{AlertDescription, ClientConfig, RootCertStore};
use serde_json::{Value, json};

use super::http::Connection;
use crate::base::error::StoreError;
use crate::lease::store::lease_store::Deadline;
use crate::lease::store::server::{Pool, Result, not_connected};
use crate::lease::url::{self, Parts, text};

/// The oldest etcd with its gateway under `/v3/`.
const OLDEST: &str = "3.4";
const PORT: u16 = 2379;
/// The timeout for beginning a watch, and for finding out what is wrong.
const ASIDE: Duration = Duration::from_secs(2);
/// The pause before all endpoints are asked again whether they have a leader.
const ELECTED: Duration = Duration::from_millis(50);

pub(super) struct Gateway {
    endpoints: Vec<Endpoint>,
    /// The endpoint that answered last.
    good: AtomicUsize,
    tls: Option<Arc<ClientConfig>>,
    login: Option<Login>,
    token: Mutex<Option<Arc<str>>>,
}

struct Endpoint {
    host: Arc<str>,
    port: u16,
    idle: Pool<Connection>,
}

#[derive(Clone)]
struct Login {
    user: String,
    password: String,
}

/// The content of a URL, checked as far as is possible without a connection.
#[derive(Clone)]
pub(super) struct Address {
    hosts: Vec<(Arc<str>, u16)>,
    tls: Option<Arc<ClientConfig>>,
    login: Option<Login>,
    /// The prefix of all keys.
    pub(super) prefix: String,
}

impl Address {
    pub(super) fn parse(url: &str) -> crate::Result<Self> {
        let wrong = |problem: String| url::invalid(url, problem);
        let parts = Parts::of(url);
        if !matches!(parts.path, "" | "/") {
            return Err(wrong("there is more in its path than the name of the lease".into()));
        }
        let (login, hosts) = match parts.authority.rsplit_once('@') {
            None => (None, parts.authority),
            Some((login, hosts)) => {
                let both = login.split_once(':').and_then(|(user, password)| Some((text(user)?, text(password)?)));
                let (user, password) = both.ok_or_else(|| wrong("what stands before @ is user:password".into()))?;
                (Some(Login { user, password }), hosts)
            }
        };
        // The text is not quoted: it may be the first part of a password with a slash in it.
        let no_host =
            || wrong("what names its endpoints is no host:port,host:port; in a user or password / is %2F".into());
        let hosts = hosts.split(',').map(|host| endpoint(host).ok_or_else(no_host));
        let hosts = hosts.collect::<crate::Result<_>>()?;
        let mut prefix = "lockkit/".to_owned();
        let (mut ca, mut cert, mut key) = (None, None, None);
        for (name, value) in parts.parameters() {
            let value = value.ok_or_else(|| wrong(format!("the parameter {name} is no UTF-8")))?;
            match name {
                "ca" => ca = Some(value),
                "cert" => cert = Some(value),
                "key" => key = Some(value),
                "prefix" => prefix = value,
                _ => return Err(wrong(format!("{name:?} is no parameter of it: those are ca, cert, key and prefix"))),
            }
        }
        let tls = match parts.scheme.eq_ignore_ascii_case("etcds") {
            true => Some(tls(ca.as_deref(), cert.as_deref(), key.as_deref()).map_err(wrong)?),
            false if ca.is_some() || cert.is_some() || key.is_some() => {
                return Err(wrong("ca, cert and key are for TLS: write it as etcds://".into()));
            }
            false => None,
        };
        Ok(Self { hosts, tls, login, prefix })
    }

    pub(super) fn hosts(&self) -> &[(Arc<str>, u16)] {
        &self.hosts
    }
}

/// `host`, `host:port`, `[address]` or `[address]:port`.
fn endpoint(text: &str) -> Option<(Arc<str>, u16)> {
    let (host, port) = match text.rfind(':') {
        Some(at) if !text[at..].contains(']') => (&text[..at], text[at + 1..].parse().ok()?),
        _ => (text, PORT),
    };
    let is_bracketed = host.starts_with('[') && host.ends_with(']');
    (!host.is_empty() && (is_bracketed || !host.contains(':'))).then(|| (host.into(), port))
}

/// Returns the TLS configuration: the trusted roots and the client's certificate.
fn tls(ca: Option<&str>, cert: Option<&str>, key: Option<&str>) -> Result<Arc<ClientConfig>, String> {
    let certificates = |file: &str| -> Result<Vec<CertificateDer<'static>>, String> {
        let read = CertificateDer::pem_file_iter(Path::new(file)).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let read = read.map_err(|error| format!("no certificate can be read from {file}: {error}"))?;
        if read.is_empty() { Err(format!("there is no certificate in {file}")) } else { Ok(read) }
    };
    let mut roots = RootCertStore::empty();
    match ca {
        Some(file) => {
            for certificate in certificates(file)? {
                roots.add(certificate).map_err(|error| format!("{file} has no certificate of a CA: {error}"))?;
            }
        }
        // System certificates that cannot be read are left out; a server that needs one of them is then not trusted.
        None => drop(roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs)),
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| error.to_string())?.with_root_certificates(roots);
    let mut config = match (cert, key) {
        (None, None) => builder.with_no_client_auth(),
        (Some(cert), Some(key)) => {
            let secret = PrivateKeyDer::from_pem_file(key)
                .map_err(|error| format!("no private key can be read from {key}: {error}"))?;
            builder
                .with_client_auth_cert(certificates(cert)?, secret)
                .map_err(|error| format!("{cert} and {key} do not go together: {error}"))?
        }
        _ => return Err("the parameters cert and key go together".into()),
    };
    // A mutex guards the sessions for resumption, and a fork could leave it locked.
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// The error message of etcd in place of an answer.
#[derive(Debug)]
struct Refusal(String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "etcd says: {}", self.0)
    }
}

impl std::error::Error for Refusal {}

/// Returns whether a request failed because its session no longer exists.
pub(super) fn is_session_gone(error: &StoreError) -> bool {
    says(error, "requested lease not found")
}

/// Returns whether a request failed because etcd has compacted the revision that it asked for.
pub(super) fn is_compacted(error: &StoreError) -> bool {
    says(error, "required revision has been compacted")
}

fn says(error: &StoreError, part: &str) -> bool {
    let refusal = error.cause().downcast_ref::<Refusal>();
    refusal.is_some_and(|refusal| refusal.0.contains(part))
}

/// The reason why an endpoint gave no answer.
enum Failed {
    /// The token is no longer known.
    Token(StoreError),
    /// Another endpoint may succeed.
    Here(StoreError),
    /// Another endpoint may succeed, or this one after a leader has been elected.
    Leaderless(StoreError),
    /// All endpoints would answer the same.
    Everywhere(StoreError),
}

impl Gateway {
    pub(super) fn new(address: &Address) -> Self {
        let endpoint = |(host, port): &(Arc<str>, u16)| Endpoint { host: host.clone(), port: *port, idle: Pool::new() };
        Self {
            endpoints: address.hosts.iter().map(endpoint).collect(),
            good: AtomicUsize::new(0),
            tls: address.tls.clone(),
            login: address.login.clone(),
            token: Mutex::default(),
        }
    }

    /// Sends a request and returns the answer.
    pub(super) fn ask(&self, path: &str, body: &Value, by: Deadline) -> Result<Value> {
        self.ask_in_doubt(path, body, by).map(|(answer, _)| answer)
    }

    /// Like [`ask`](Self::ask), and also returns whether an earlier attempt got no answer.
    pub(super) fn ask_in_doubt(&self, path: &str, body: &Value, by: Deadline) -> Result<(Value, bool)> {
        let is_in_doubt = Cell::new(false);
        let answer = self.with_token(by, |token| {
            self.anywhere(by, |endpoint, by| {
                let pooled = endpoint.idle.ask(
                    || self.connect(endpoint, by),
                    |connection| {
                        let headers = headers(token);
                        connection
                            .ask(path, &headers, Some(body.to_string().as_bytes()), by)
                            .inspect_err(|_| is_in_doubt.set(true))
                            .map_err(|error| self.silent(endpoint, &error))
                    },
                );
                let (status, body) = pooled.map_err(Failed::Here)?;
                self.judge(endpoint, status, &body, by).inspect_err(|failed| {
                    let is_unknown = matches!(failed, Failed::Here(StoreError::Unknown(_)));
                    is_in_doubt.set(is_in_doubt.get() || is_unknown);
                })
            })
        });
        match answer {
            Ok(answer) => Ok((answer, is_in_doubt.get())),
            // A request that is refused in the end, for example without a token, may have taken effect before.
            Err(StoreError::NotApplied(cause)) if is_in_doubt.get() => Err(StoreError::Unknown(cause)),
            Err(error) => Err(error),
        }
    }

    /// Begins a watch, on a connection of its own, and waits until it has begun.
    pub(super) fn watch(&self, request: &Value, by: Deadline) -> Result<Stream> {
        let by = by.min(Deadline::after(ASIDE));
        self.with_token(by, |token| {
            self.anywhere(by, |endpoint, by| {
                let mut connection = self.connect(endpoint, by).map_err(Failed::Here)?;
                let sent = Some(request.to_string().into_bytes());
                let status = connection.begin("/v3/watch", &headers(token), sent.as_deref(), by);
                let status = status.map_err(|error| Failed::Here(self.silent(endpoint, &error)))?;
                let mut stream = Stream { connection, line: Vec::new(), place: endpoint.to_string() };
                if status != 200 {
                    let mut body = Vec::new();
                    while let Ok(Some(piece)) = stream.connection.piece(by) {
                        body.extend_from_slice(&piece);
                    }
                    self.judge(endpoint, status, &body, by)?;
                }
                match stream.next(by).map_err(Failed::Here)? {
                    Some(line) => match self.judge(endpoint, status, &line, by)? {
                        first if first["created"] == true && first["canceled"] != true => Ok(stream),
                        first => {
                            Err(Failed::Here(StoreError::not_applied(format!("{endpoint} does not watch: {first}"))))
                        }
                    },
                    None => {
                        Err(Failed::Here(StoreError::not_applied(format!("{endpoint} did not begin to watch in time"))))
                    }
                }
            })
        })
    }

    /// Asks the endpoint of this address for a sign of life. An error means that the endpoint accepts the request and
    /// does not answer. A failure that prevents the request proves nothing about the endpoint.
    pub(super) fn greet(&self, place: &str, by: Deadline) -> Result<()> {
        let Some(endpoint) = self.endpoints.iter().find(|endpoint| endpoint.to_string() == place) else {
            return Ok(());
        };
        let silent = Cell::new(false);
        let asked = endpoint.idle.ask(
            || self.connect(endpoint, by),
            |connection| {
                let answer = connection.ask("/version", &[], None, by);
                silent.set(answer.as_ref().is_err_and(|error| error.kind() == Io::TimedOut));
                answer.map_err(|error| self.silent(endpoint, &error))
            },
        );
        match asked {
            Err(error) if silent.get() => Err(error),
            _ => Ok(()),
        }
    }

    /// Sends a request with the known token, and once more with a new token if the server no longer knows the first.
    fn with_token<T>(&self, by: Deadline, ask: impl Fn(Option<&str>) -> Result<T, Failed>) -> Result<T> {
        let Some(login) = &self.login else {
            return ask(None).map_err(Failed::into_error);
        };
        let known = self.token.lock().clone();
        let known = match known {
            Some(token) => match ask(Some(&token)) {
                Err(Failed::Token(_)) => Some(token),
                answer => return answer.map_err(Failed::into_error),
            },
            None => None,
        };
        // Outside the lock: a request that has a token must not wait for one that has none.
        let request = json!({ "name": login.user, "password": login.password });
        let answer = self.anywhere(by, |endpoint, by| {
            let body = request.to_string();
            let pooled = endpoint.idle.ask(
                || self.connect(endpoint, by),
                |connection| {
                    connection
                        .ask("/v3/auth/authenticate", &headers(None), Some(body.as_bytes()), by)
                        .map_err(|error| self.silent(endpoint, &error))
                },
            );
            let (status, body) = pooled.map_err(Failed::Here)?;
            self.judge(endpoint, status, &body, by)
        });
        // Only the login was requested, and a login has no effect.
        let answer = answer.map_err(|failed| match failed.into_error() {
            StoreError::Unknown(cause) => StoreError::NotApplied(cause),
            error => error,
        })?;
        let token: Arc<str> = answer["token"].as_str().unwrap_or_default().into();
        let mut current = self.token.lock();
        if *current == known || current.is_none() {
            *current = Some(token.clone());
        }
        drop(current);
        ask(Some(&token)).map_err(Failed::into_error)
    }

    /// Asks one endpoint after another. While an endpoint waits for a leader and there is time, asks all of them again.
    /// An election takes a second or two, which is no reason to fail.
    fn anywhere<T>(&self, by: Deadline, ask: impl Fn(&Endpoint, Deadline) -> Result<T, Failed>) -> Result<T, Failed> {
        let count = self.endpoints.len();
        let mut in_doubt = false;
        loop {
            let first = self.good.load(Ordering::Relaxed);
            let mut elects = false;
            let mut failure = None;
            for turn in 0..count {
                if turn > 0 && by.is_past() {
                    break;
                }
                let at = (first + turn) % count;
                let left = by.remaining() / u32::try_from(count - turn).unwrap_or(u32::MAX);
                let failed = match ask(&self.endpoints[at], Deadline::after(left)) {
                    Ok(answer) => {
                        self.good.store(at, Ordering::Relaxed);
                        return Ok(answer);
                    }
                    Err(failed) => failed,
                };
                elects |= matches!(failed, Failed::Leaderless(_));
                match failed {
                    Failed::Here(error) | Failed::Leaderless(error) => {
                        in_doubt |= matches!(error, StoreError::Unknown(_));
                        // A permanent error explains more than an endpoint that is down.
                        if !matches!(failure, Some(StoreError::Permanent(_))) {
                            failure = Some(error);
                        }
                    }
                    Failed::Everywhere(StoreError::NotApplied(cause)) if in_doubt => {
                        return Err(Failed::Everywhere(StoreError::Unknown(cause)));
                    }
                    failed => return Err(failed),
                }
            }
            if elects && by.remaining() > ELECTED {
                std::thread::sleep(ELECTED);
                continue;
            }
            let failure = failure.unwrap_or_else(|| StoreError::not_applied("there is no endpoint"));
            return Err(Failed::Here(match failure {
                StoreError::NotApplied(cause) | StoreError::Permanent(cause) if in_doubt => StoreError::Unknown(cause),
                failure => failure,
            }));
        }
    }

    fn connect(&self, endpoint: &Endpoint, by: Deadline) -> Result<Connection> {
        Connection::open(&endpoint.host, endpoint.port, self.tls.as_ref(), by).map_err(|error| {
            if let Some(error) = tls_trouble(endpoint, &error) {
                return error;
            }
            if self.tls.is_some() && is_cut(&error) {
                return StoreError::not_applied(format!(
                    "{endpoint} ended the connection instead of beginning TLS; if it speaks none, write etcd://"
                ));
            }
            not_connected(&endpoint.to_string(), &error)
        })
    }

    /// Returns the error for a request that was sent, or may have been.
    fn silent(&self, endpoint: &Endpoint, error: &io::Error) -> StoreError {
        match tls_trouble(endpoint, error) {
            Some(error) => error,
            None if error.kind() == Io::InvalidData => {
                StoreError::unknown(format!("{endpoint} answers, but not as etcd does: {error}"))
            }
            None if self.tls.is_none() && is_cut(error) => StoreError::unknown(format!(
                "{endpoint} ended the connection instead of answering; if it does so always, it may speak TLS: write etcds://"
            )),
            None => StoreError::unknown(format!("{endpoint} did not answer: {error}")),
        }
    }

    /// Returns the result in an answer, or the meaning of its error.
    fn judge(&self, endpoint: &Endpoint, status: u16, body: &[u8], by: Deadline) -> Result<Value, Failed> {
        let Ok(mut answer) = serde_json::from_slice::<Value>(body) else {
            return Err(self.foreign(endpoint, status, body, by));
        };
        // The result or the error of a stream is one level deeper.
        let error = match &answer["error"] {
            Value::Null if status == 200 => {
                return Ok(if answer["result"].is_object() { answer["result"].take() } else { answer });
            }
            Value::Null => return Err(self.foreign(endpoint, status, body, by)),
            of_stream @ Value::Object(_) => of_stream,
            _ => &answer,
        };
        let code = error["code"].as_i64().or_else(|| error["grpc_code"].as_i64()).unwrap_or_default();
        let message = error["message"].as_str().or_else(|| error["error"].as_str()).unwrap_or_default();
        Err(self.refusal(endpoint, code, message))
    }

    fn refusal(&self, endpoint: &Endpoint, code: i64, message: &str) -> Failed {
        let refusal = Refusal(message.to_owned());
        let says = |part: &str| message.contains(part);
        let user = self.login.as_ref().map_or("", |login| &login.user);
        let misuse = |text: String| Failed::Everywhere(StoreError::permanent(text));
        match code {
            _ if says("user name is empty") => {
                misuse(format!("{endpoint} wants a user and a password: write etcd://user:password@{endpoint}"))
            }
            _ if says("authentication failed") => misuse(format!("{endpoint} knows no user {user:?} of this password")),
            _ if says("authentication is not enabled") => misuse(format!(
                "{endpoint} asks nobody for a password: leave the user {user:?} out of the URL, or turn on its authentication"
            )),
            _ if says("invalid auth token") || says("revision of auth store is old") => {
                Failed::Token(StoreError::not_applied(refusal))
            }
            UNAUTHENTICATED => Failed::Token(StoreError::not_applied(refusal)),
            PERMISSION_DENIED => misuse(format!(
                "{endpoint} does not let the user {user:?} use the keys of leases: give it a role that may read and write all with their prefix"
            )),
            _ if says("CommonName") => misuse(format!(
                "{endpoint} refuses a client certificate with a common name as long as it has authentication on: use one without"
            )),
            UNAVAILABLE if says("no leader") => Failed::Leaderless(StoreError::not_applied(refusal)),
            CANCELLED | UNKNOWN | DEADLINE_EXCEEDED | ABORTED | INTERNAL | UNAVAILABLE | DATA_LOSS => {
                Failed::Here(StoreError::unknown(refusal))
            }
            INVALID_ARGUMENT | UNIMPLEMENTED => Failed::Everywhere(StoreError::permanent(refusal)),
            _ => Failed::Everywhere(StoreError::not_applied(refusal)),
        }
    }

    /// Returns the error for an answer that is not from etcd's gateway; it names the server that answers, if that can
    /// be found out.
    fn foreign(&self, endpoint: &Endpoint, status: u16, body: &[u8], by: Deadline) -> Failed {
        let shown: String = String::from_utf8_lossy(body).chars().filter(|c| !c.is_control()).take(80).collect();
        if self.tls.is_none() && shown.contains("HTTP request to an HTTPS server") {
            return Failed::Everywhere(StoreError::permanent(format!("{endpoint} speaks TLS: write etcds://")));
        }
        if status != 404 {
            return Failed::Here(StoreError::unknown(format!(
                "{endpoint} answers {status}, as etcd does not: {shown}"
            )));
        }
        let by = by.min(Deadline::after(ASIDE));
        let version = self.connect(endpoint, by).ok().and_then(|mut connection| {
            let (_, body) = connection.ask("/version", &[], None, by).ok()?;
            let version = serde_json::from_slice::<Value>(&body).ok()?;
            Some(version["etcdserver"].as_str()?.to_owned())
        });
        Failed::Everywhere(StoreError::permanent(match version {
            None => format!("there is no etcd at {endpoint}"),
            Some(version) if is_older(&version) => {
                format!("etcd {version} at {endpoint} is too old: {OLDEST} or later is needed")
            }
            Some(version) => format!(
                "etcd {version} at {endpoint} has its gateway turned off: start it without --enable-grpc-gateway=false"
            ),
        }))
    }
}

// gRPC's codes.
const CANCELLED: i64 = 1;
const UNKNOWN: i64 = 2;
const INVALID_ARGUMENT: i64 = 3;
const DEADLINE_EXCEEDED: i64 = 4;
const PERMISSION_DENIED: i64 = 7;
const ABORTED: i64 = 10;
const UNIMPLEMENTED: i64 = 12;
const INTERNAL: i64 = 13;
const UNAVAILABLE: i64 = 14;
const DATA_LOSS: i64 = 15;
const UNAUTHENTICATED: i64 = 16;

/// Returns the headers of a request. Every request must fail, not wait, if its server knows no leader.
fn headers(token: Option<&str>) -> Vec<(&'static str, &str)> {
    let mut headers = vec![("Content-Type", "application/json"), ("Grpc-Metadata-hasleader", "true")];
    headers.extend(token.map(|token| ("Authorization", token)));
    headers
}

fn is_older(version: &str) -> bool {
    let parts = |text: &str| -> Vec<u32> { text.split('.').take(2).map_while(|part| part.parse().ok()).collect() };
    parts(version) < parts(OLDEST)
}

fn is_cut(error: &io::Error) -> bool {
    matches!(error.kind(), Io::UnexpectedEof | Io::ConnectionReset)
}

/// Returns the TLS error of a connection, if there is one.
fn tls_trouble(endpoint: &Endpoint, error: &io::Error) -> Option<StoreError> {
    use rustls::Error as Tls;
    let trouble = error.get_ref()?.downcast_ref::<Tls>()?;
    Some(StoreError::permanent(match trouble {
        Tls::InvalidMessage(_) => format!("{endpoint} speaks no TLS: write etcd://"),
        Tls::AlertReceived(AlertDescription::CertificateRequired | AlertDescription::BadCertificate) => format!(
            "{endpoint} wants a certificate of a CA that it trusts: add the parameters cert and key ({trouble})"
        ),
        Tls::InvalidCertificate(_) => format!(
            "the certificate of {endpoint} is not to be trusted: {trouble}; of a CA of your own add the parameter ca"
        ),
        _ => format!("TLS with {endpoint} failed: {trouble}"),
    }))
}

impl Failed {
    fn into_error(self) -> StoreError {
        let (Self::Token(error) | Self::Here(error) | Self::Leaderless(error) | Self::Everywhere(error)) = self;
        error
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// The answers of a watch, each a line.
pub(super) struct Stream {
    connection: Connection,
    line: Vec<u8>,
    place: String,
}

impl Stream {
    /// Returns the endpoint that sends the answers.
    pub(super) fn place(&self) -> &str {
        &self.place
    }

    /// Returns the next line, or `None` if none came in time.
    pub(super) fn next(&mut self, by: Deadline) -> Result<Option<Vec<u8>>> {
        loop {
            if let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
                let rest = self.line.split_off(end + 1);
                return Ok(Some(std::mem::replace(&mut self.line, rest)));
            }
            match self.connection.piece(by) {
                Ok(Some(piece)) => self.line.extend_from_slice(&piece),
                Ok(None) => return Err(StoreError::not_applied(format!("{} ended its watch", self.place))),
                Err(error) if error.kind() == Io::TimedOut => return Ok(None),
                Err(error) => return Err(StoreError::not_applied(format!("{} is cut off: {error}", self.place))),
            }
        }
    }
}

/// Returns bytes as JSON contains them.
pub(super) fn encoded(bytes: impl AsRef<[u8]>) -> String {
    STANDARD.encode(bytes)
}

/// Returns the text of bytes in JSON; empty if there are none.
pub(super) fn decoded(value: &Value) -> String {
    let bytes = value.as_str().and_then(|text| STANDARD.decode(text).ok());
    String::from_utf8(bytes.unwrap_or_default()).unwrap_or_default()
}

/// Returns a number, which JSON may contain as a string, or omit if it is zero.
pub(super) fn number(value: &Value) -> u64 {
    value.as_str().and_then(|text| text.parse().ok()).or_else(|| value.as_u64()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_names_its_endpoints() {
        let hosts = |url| Address::parse(url).map(|address| address.hosts).map_err(|error| error.to_string());
        let pairs = |pairs: &[(&str, u16)]| Ok(pairs.iter().map(|(host, port)| ((*host).into(), *port)).collect());
        assert_eq!(hosts("etcd://a:1,b,[::1]:3"), pairs(&[("a", 1), ("b", 2379), ("[::1]", 3)]));
        assert_eq!(hosts("etcd://u:p@a/?prefix=x"), pairs(&[("a", 2379)]));
        for wrong in ["etcd://", "etcd://a:b", "etcd://a,", "etcd://::1", "etcd://a/b", "etcd://u@a", "etcd://a?x=y"] {
            assert!(hosts(wrong).is_err(), "{wrong}");
        }
        let leaky = hosts("etcd://u:pa/ss@h/x").unwrap_err() + &hosts("etcd://u:pa").unwrap_err();
        assert!(!leaky.contains("pa/") && !leaky.contains("\"pa") && !leaky.contains("u:pa\""), "{leaky}");
        assert!(hosts("etcd://a?ca=/x").unwrap_err().contains("etcds://"));
        assert!(hosts("etcds://a?cert=/x").unwrap_err().contains("go together"));
        assert!(hosts("etcds://a?ca=/no/such/file").unwrap_err().contains("/no/such/file"));
    }

    #[test]
    fn an_endpoint_that_is_of_no_use_does_not_take_the_others_away() {
        let gateway = Gateway::new(&Address::parse("etcd://bad,good").unwrap());
        let ask = |good: fn() -> Result<(), Failed>| {
            let asked =
                gateway.anywhere(Deadline::after(Duration::from_secs(60)), |endpoint, _| match &*endpoint.host {
                    "bad" => Err(Failed::Here(StoreError::permanent("its certificate is not to be trusted"))),
                    _ => good(),
                });
            gateway.good.store(0, Ordering::Relaxed);
            asked.map_err(Failed::into_error)
        };
        assert!(ask(|| Ok(())).is_ok());
        assert!(matches!(ask(|| Err(Failed::Here(StoreError::not_applied("down")))), Err(StoreError::Permanent(_))));
        assert!(matches!(ask(|| Err(Failed::Here(StoreError::unknown("cut")))), Err(StoreError::Unknown(_))));
    }

    #[test]
    fn leaderless_request_is_retried_until_deadline() {
        let gateway = Gateway::new(&Address::parse("etcd://one,other").unwrap());
        let asked = Cell::new(0);
        let elected_after = |most: u32, limit| {
            asked.set(0);
            let answer = gateway.anywhere(Deadline::after(limit), |_, _| {
                asked.set(asked.get() + 1);
                match asked.get() > most {
                    true => Ok(()),
                    false => Err(Failed::Leaderless(StoreError::not_applied("no leader"))),
                }
            });
            answer.map_err(Failed::into_error)
        };
        assert!(elected_after(5, Duration::from_secs(60)).is_ok());
        assert_eq!(asked.get(), 6);
        assert!(matches!(elected_after(u32::MAX, ELECTED * 3), Err(StoreError::NotApplied(_))));
        assert!((2..=8).contains(&asked.get()));
    }

    #[test]
    fn versions_are_compared_by_their_numbers() {
        assert!(is_older("3.3.27") && is_older("2.3.8"));
        assert!(!is_older("3.4.0") && !is_older("3.10.1") && !is_older("4.0.0"));
    }

    #[test]
    fn json_is_read_as_the_gateway_writes_it() {
        assert_eq!((number(&json!("12")), number(&json!(12)), number(&Value::Null)), (12, 12, 0));
        assert_eq!(decoded(&json!(encoded("held"))), "held");
        assert_eq!(decoded(&Value::Null), "");
    }
}
