//! Requests to etcd's JSON gateway: the choice of the endpoint, and the credentials.
//!
//! - **Endpoints**: the endpoint that answered last is asked first. The next one is asked if an
//!   endpoint cannot be reached, has no leader, or takes longer than its part of the time. All of
//!   this ends by the request's deadline. While a leader is being elected, the first endpoint
//!   follows the last. Every request here can be repeated: see [the store](super).
//! - **Credentials**: a token is requested with the first request, and again when the server no
//!   longer knows it.
//!
//! The HTTP client is [`http`](super::http), on the crates that parse HTTP and speak TLS. The
//! reason: a store must know whether a request was sent, limit each read of a watch, and start no
//! thread for a request.

use std::cell::Cell;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use rustls::ClientConfig;
use serde_json::{Value, json};

use super::config::{Config, Login};
use super::error::{AttemptError, is_disconnected, refusal, tls_error};
use super::http::Connection;
use super::watch_stream::WatchStream;
use crate::base::error::StoreError;
use crate::lease::store::lease_store::Deadline;
use crate::lease::store::server::{Outcome, Pool, Result, connect_error, equal_part};

/// The oldest etcd with its gateway under `/v3/`.
const MIN_VERSION: &str = "3.4";
/// The timeout for beginning a watch, and for finding out the server at an endpoint.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// The pause before all endpoints are asked again whether they have a leader.
const ELECTION_RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// A client of a cluster.
pub(super) struct Client {
    endpoints: Vec<Endpoint>,
    /// The index of the endpoint that answered last.
    last_answered: AtomicUsize,
    tls: Option<Arc<ClientConfig>>,
    login: Option<Login>,
    token: Mutex<Option<Arc<str>>>,
}

struct Endpoint {
    host: Arc<str>,
    port: u16,
    pool: Pool<Connection>,
}

impl Client {
    pub(super) fn new(config: &Config) -> Self {
        let endpoint = |(host, port): &(Arc<str>, u16)| Endpoint {
            host: host.clone(),
            port: *port,
            pool: Pool::new(),
        };
        Self {
            endpoints: config.hosts.iter().map(endpoint).collect(),
            last_answered: AtomicUsize::new(0),
            tls: config.tls.clone(),
            login: config.login.clone(),
            token: Mutex::default(),
        }
    }

    /// Sends a request and returns the answer.
    pub(super) fn send(&self, path: &str, body: &Value, by: Deadline) -> Result<Value> {
        self.send_observed(path, body, by).map(|(answer, _)| answer)
    }

    /// Like [`send`](Self::send), and also returns whether an earlier attempt got no answer.
    ///
    /// The rule of [`Outcome`] has two exceptions here. A permanent refusal stays permanent after
    /// an attempt without an answer, so that the caller stops and sees the cause. The session looks
    /// after the possible grant of an acquisition that failed with any error. A TLS error of a sent
    /// request is permanent, but the request counts as indeterminate.
    pub(super) fn send_observed(
        &self,
        path: &str,
        body: &Value,
        by: Deadline,
    ) -> Result<(Value, bool)> {
        let outcome = Outcome::default();
        let answer = self.with_token(by, |token| {
            self.at_any_endpoint(by, |endpoint, by| {
                let pooled = endpoint.pool.run(
                    &Outcome::default(),
                    || self.connect(endpoint, by),
                    |connection| {
                        let headers = headers(token);
                        connection
                            .send(path, &headers, Some(body.to_string().as_bytes()), by)
                            .inspect_err(|_| outcome.set_indeterminate())
                            .map_err(|error| self.unanswered(endpoint, &error))
                    },
                );
                let (status, body) = pooled.map_err(AttemptError::Endpoint)?;
                self.parse(endpoint, status, &body, by)
                    .inspect_err(|error| {
                        if let AttemptError::Endpoint(error) = error {
                            outcome.observe(error);
                        }
                    })
            })
        });
        match answer {
            Ok(answer) => Ok((answer, outcome.is_indeterminate())),
            Err(error @ StoreError::Permanent(_)) => Err(error),
            // A request that is refused in the end, for example without a token, may have taken
            // effect before.
            Err(error) => Err(outcome.resolve(error)),
        }
    }

    /// Begins a watch, on a connection of its own, and waits until it has begun.
    pub(super) fn watch(&self, request: &Value, by: Deadline) -> Result<WatchStream> {
        let by = by.min(Deadline::after(PROBE_TIMEOUT));
        self.with_token(by, |token| {
            self.at_any_endpoint(by, |endpoint, by| {
                let mut connection = self.connect(endpoint, by).map_err(AttemptError::Endpoint)?;
                let body = Some(request.to_string().into_bytes());
                let status = connection.begin("/v3/watch", &headers(token), body.as_deref(), by);
                let status = status
                    .map_err(|error| AttemptError::Endpoint(self.unanswered(endpoint, &error)))?;
                let mut stream = WatchStream::new(connection, endpoint.to_string());
                if status != 200 {
                    let body = stream.read_rest(by);
                    self.parse(endpoint, status, &body, by)?;
                }
                let failed = |cause: String| {
                    let text = format!("cannot watch the leases at {endpoint}: {cause}");
                    Err(AttemptError::Endpoint(StoreError::not_applied(text)))
                };
                match stream.next(by).map_err(AttemptError::Endpoint)? {
                    Some(line) => match self.parse(endpoint, status, &line, by)? {
                        first if first["created"] == true && first["canceled"] != true => {
                            Ok(stream)
                        }
                        first => failed(first.to_string()),
                    },
                    None => failed("the watch did not begin in time".to_owned()),
                }
            })
        })
    }

    /// Asks the endpoint of this name for a sign of life. An error means that the endpoint accepts
    /// the request and does not answer. A failure that prevents the request proves nothing about
    /// the endpoint.
    pub(super) fn check_alive(&self, name: &str, by: Deadline) -> Result<()> {
        let Some(endpoint) = self
            .endpoints
            .iter()
            .find(|endpoint| endpoint.to_string() == name)
        else {
            return Ok(());
        };
        let is_silent = Cell::new(false);
        let asked = endpoint.pool.run(
            &Outcome::default(),
            || self.connect(endpoint, by),
            |connection| {
                let answer = connection.send("/version", &[], None, by);
                is_silent.set(
                    answer
                        .as_ref()
                        .is_err_and(|error| error.kind() == io::ErrorKind::TimedOut),
                );
                answer.map_err(|error| self.unanswered(endpoint, &error))
            },
        );
        match asked {
            Err(error) if is_silent.get() => Err(error),
            _ => Ok(()),
        }
    }

    /// Sends a request with the known token, and once more with a new token if the server no longer
    /// knows the first.
    fn with_token<T>(
        &self,
        by: Deadline,
        send: impl Fn(Option<&str>) -> Result<T, AttemptError>,
    ) -> Result<T> {
        let Some(login) = &self.login else {
            return send(None).map_err(AttemptError::into_error);
        };
        let known = self.token.lock().clone();
        let known = match known {
            Some(token) => match send(Some(&token)) {
                Err(AttemptError::Token(_)) => Some(token),
                answer => return answer.map_err(AttemptError::into_error),
            },
            None => None,
        };
        // Outside the lock: a request that has a token must not wait for one that has none.
        let token = self.log_in(login, by)?;
        let mut current = self.token.lock();
        if *current == known || current.is_none() {
            *current = Some(token.clone());
        }
        drop(current);
        send(Some(&token)).map_err(AttemptError::into_error)
    }

    /// Requests a token.
    fn log_in(&self, login: &Login, by: Deadline) -> Result<Arc<str>> {
        let request = json!({ "name": login.user, "password": login.password });
        let answer = self.at_any_endpoint(by, |endpoint, by| {
            let body = request.to_string();
            let pooled = endpoint.pool.run(
                &Outcome::default(),
                || self.connect(endpoint, by),
                |connection| {
                    connection
                        .send(
                            "/v3/auth/authenticate",
                            &headers(None),
                            Some(body.as_bytes()),
                            by,
                        )
                        .map_err(|error| self.unanswered(endpoint, &error))
                },
            );
            let (status, body) = pooled.map_err(AttemptError::Endpoint)?;
            self.parse(endpoint, status, &body, by)
        });
        // Only the login was requested, and a login has no effect.
        let answer = answer.map_err(|error| match error.into_error() {
            StoreError::Unknown(cause) => StoreError::NotApplied(cause),
            error => error,
        })?;
        Ok(answer["token"].as_str().unwrap_or_default().into())
    }

    /// Sends a request to one endpoint after another. While an endpoint waits for a leader and
    /// there is time, all of them are asked again. An election takes a second or two, which is no
    /// reason to fail.
    fn at_any_endpoint<T>(
        &self,
        by: Deadline,
        send: impl Fn(&Endpoint, Deadline) -> Result<T, AttemptError>,
    ) -> Result<T, AttemptError> {
        let count = self.endpoints.len();
        let outcome = Outcome::default();
        loop {
            let first = self.last_answered.load(Ordering::Relaxed);
            let mut is_electing = false;
            let mut failure = None;
            for attempt in 0..count {
                if attempt > 0 && by.is_past() {
                    break;
                }
                let at = (first + attempt) % count;
                let part = Deadline::after(equal_part(by, count - attempt));
                let error = match send(&self.endpoints[at], part) {
                    Ok(answer) => {
                        self.last_answered.store(at, Ordering::Relaxed);
                        return Ok(answer);
                    }
                    Err(error) => error,
                };
                is_electing |= matches!(error, AttemptError::Leaderless(_));
                match error {
                    AttemptError::Endpoint(error) | AttemptError::Leaderless(error) => {
                        outcome.observe(&error);
                        // A permanent error explains more than an endpoint that is down.
                        if !matches!(failure, Some(StoreError::Permanent(_))) {
                            failure = Some(error);
                        }
                    }
                    AttemptError::Cluster(error @ StoreError::NotApplied(_)) => {
                        return Err(AttemptError::Cluster(outcome.resolve(error)));
                    }
                    // Permanent for all endpoints, or the token is to be renewed.
                    error => return Err(error),
                }
            }
            if is_electing && by.remaining() > ELECTION_RETRY_INTERVAL {
                std::thread::sleep(ELECTION_RETRY_INTERVAL);
                continue;
            }
            let failure =
                failure.unwrap_or_else(|| StoreError::not_applied("the URL names no endpoint"));
            return Err(AttemptError::Endpoint(outcome.resolve(failure)));
        }
    }

    fn connect(&self, endpoint: &Endpoint, by: Deadline) -> Result<Connection> {
        Connection::open(&endpoint.host, endpoint.port, self.tls.as_ref(), by).map_err(|error| {
            if let Some(error) = tls_error(endpoint, &error) {
                return error;
            }
            if self.tls.is_some() && is_disconnected(&error) {
                return StoreError::not_applied(format!(
                    "cannot use TLS with {endpoint}: the server ended the connection; if it does not speak TLS, write \
                     etcd://"
                ));
            }
            connect_error(&endpoint.to_string(), &error)
        })
    }

    /// Returns the error for a request that was sent, or may have been.
    fn unanswered(&self, endpoint: &Endpoint, error: &io::Error) -> StoreError {
        match tls_error(endpoint, error) {
            Some(error) => error,
            None if error.kind() == io::ErrorKind::InvalidData => StoreError::unknown(format!(
                "cannot read the answer of {endpoint}: it is not an answer of etcd: {error}"
            )),
            None if self.tls.is_none() && is_disconnected(error) => StoreError::unknown(format!(
                "cannot get an answer from {endpoint}: the server ended the connection; if it speaks TLS, write \
                 etcds://"
            )),
            None => StoreError::unknown(format!("cannot get an answer from {endpoint}: {error}")),
        }
    }

    /// Returns the result in an answer, or the meaning of its error.
    fn parse(
        &self,
        endpoint: &Endpoint,
        status: u16,
        body: &[u8],
        by: Deadline,
    ) -> Result<Value, AttemptError> {
        let Ok(mut answer) = serde_json::from_slice::<Value>(body) else {
            return Err(self.foreign(endpoint, status, body, by));
        };
        // The result or the error of a stream is one level deeper.
        let error = match &answer["error"] {
            Value::Null if status == 200 => {
                return Ok(if answer["result"].is_object() {
                    answer["result"].take()
                } else {
                    answer
                });
            }
            Value::Null => return Err(self.foreign(endpoint, status, body, by)),
            of_stream @ Value::Object(_) => of_stream,
            _ => &answer,
        };
        let code = error["code"]
            .as_i64()
            .or_else(|| error["grpc_code"].as_i64())
            .unwrap_or_default();
        let message = error["message"]
            .as_str()
            .or_else(|| error["error"].as_str())
            .unwrap_or_default();
        let user = self.login.as_ref().map_or("", |login| &login.user);
        Err(refusal(endpoint, user, code, message))
    }

    /// Returns the error for an answer that is not from etcd's gateway; it names the server that
    /// answers, if that can be found out.
    fn foreign(&self, endpoint: &Endpoint, status: u16, body: &[u8], by: Deadline) -> AttemptError {
        let excerpt: String = String::from_utf8_lossy(body)
            .chars()
            .filter(|c| !c.is_control())
            .take(80)
            .collect();
        if self.tls.is_none() && excerpt.contains("HTTP request to an HTTPS server") {
            let text =
                format!("cannot use {endpoint} without TLS: the server speaks TLS; write etcds://");
            return AttemptError::Cluster(StoreError::permanent(text));
        }
        if status != 404 {
            return AttemptError::Endpoint(StoreError::unknown(format!(
                "cannot read the answer of {endpoint}: it is not an answer of etcd: status {status}: {excerpt}"
            )));
        }
        let by = by.min(Deadline::after(PROBE_TIMEOUT));
        let version = self.connect(endpoint, by).ok().and_then(|mut connection| {
            let (_, body) = connection.send("/version", &[], None, by).ok()?;
            let version = serde_json::from_slice::<Value>(&body).ok()?;
            Some(version["etcdserver"].as_str()?.to_owned())
        });
        AttemptError::Cluster(StoreError::permanent(match version {
            None => format!("cannot use {endpoint}: the server is not etcd"),
            Some(version) if is_older(&version) => {
                format!(
                    "cannot use {endpoint}: etcd {version} is too old; use version {MIN_VERSION} or later"
                )
            }
            Some(version) => format!(
                "cannot use {endpoint}: the gateway of etcd {version} is off; start it without \
                 --enable-grpc-gateway=false"
            ),
        }))
    }
}

/// Returns the headers of a request. Every request must fail, not wait, if its server knows no
/// leader.
fn headers(token: Option<&str>) -> Vec<(&'static str, &str)> {
    let mut headers = vec![
        ("Content-Type", "application/json"),
        ("Grpc-Metadata-hasleader", "true"),
    ];
    headers.extend(token.map(|token| ("Authorization", token)));
    headers
}

fn is_older(version: &str) -> bool {
    let parts = |text: &str| -> Vec<u32> {
        text.split('.')
            .take(2)
            .map_while(|part| part.parse().ok())
            .collect()
    };
    parts(version) < parts(MIN_VERSION)
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(url: &str) -> Client {
        Client::new(&Config::parse(url).unwrap())
    }

    #[test]
    fn request_skips_endpoint_with_permanent_error() {
        let client = client("etcd://bad,good");
        let send = |good: fn() -> Result<(), AttemptError>| {
            let by = Deadline::after(Duration::from_secs(60));
            let answer = client.at_any_endpoint(by, |endpoint, _| match &*endpoint.host {
                "bad" => Err(AttemptError::Endpoint(StoreError::permanent(
                    "invalid certificate",
                ))),
                _ => good(),
            });
            client.last_answered.store(0, Ordering::Relaxed);
            answer.map_err(AttemptError::into_error)
        };
        assert!(send(|| Ok(())).is_ok());
        let down = send(|| Err(AttemptError::Endpoint(StoreError::not_applied("down"))));
        assert!(matches!(down, Err(StoreError::Permanent(_))));
        let cut = send(|| Err(AttemptError::Endpoint(StoreError::unknown("cut"))));
        assert!(matches!(cut, Err(StoreError::Unknown(_))));
    }

    #[test]
    fn leaderless_request_is_retried_until_deadline() {
        let client = client("etcd://one,other");
        let requests = Cell::new(0);
        let elected_after = |refusals: u32, limit| {
            requests.set(0);
            let answer = client.at_any_endpoint(Deadline::after(limit), |_, _| {
                requests.set(requests.get() + 1);
                match requests.get() > refusals {
                    true => Ok(()),
                    false => Err(AttemptError::Leaderless(StoreError::not_applied(
                        "no leader",
                    ))),
                }
            });
            answer.map_err(AttemptError::into_error)
        };
        assert!(elected_after(5, Duration::from_secs(60)).is_ok());
        assert_eq!(requests.get(), 6);
        assert!(matches!(
            elected_after(u32::MAX, ELECTION_RETRY_INTERVAL * 3),
            Err(StoreError::NotApplied(_))
        ));
        assert!((2..=8).contains(&requests.get()));
    }

    #[test]
    fn compare_versions_orders_by_number() {
        assert!(is_older("3.3.27") && is_older("2.3.8"));
        assert!(!is_older("3.4.0") && !is_older("3.10.1") && !is_older("4.0.0"));
    }
}
