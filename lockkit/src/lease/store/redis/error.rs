//! The errors of the client and the server as messages, and whether the request may have taken
//! effect.

use std::error::Error as _;
use std::io;
use std::sync::Arc;

use redis::{ErrorKind, RedisError};

use super::config::ServerConfig;
use crate::base::error::StoreError;
use crate::lease::store::server::connect_error;

impl ServerConfig {
    /// Returns the error for a failed connection.
    #[cold]
    pub(super) fn connect_failed(&self, error: &RedisError) -> StoreError {
        use io::ErrorKind::{ConnectionReset, TimedOut, UnexpectedEof, WouldBlock};
        let server = &self.server;
        // The certificate and the key do not match, for example when only one of them has been
        // replaced so far.
        if error.kind() == ErrorKind::InvalidClientConfig {
            return StoreError::not_applied(format!(
                "cannot connect to {server} with this certificate and key: {error}"
            ));
        }
        if let Some(error) = inner::<rustls::Error>(error) {
            return self.tls_failed(error);
        }
        let Some(found) = inner::<io::Error>(error) else {
            return StoreError::permanent(format!("cannot connect to {server}: {error}"));
        };
        let advice = match self.is_tls() {
            true => "if the server does not speak TLS, write redis://",
            false => "if the server speaks TLS, write rediss://",
        };
        match found.kind() {
            io::ErrorKind::Interrupted => StoreError::not_applied(Interrupted),
            UnexpectedEof | ConnectionReset => StoreError::not_applied(format!(
                "cannot connect to {server}: the server closed the connection before it answered; {advice}"
            )),
            TimedOut | WouldBlock => StoreError::not_applied(format!(
                "cannot connect to {server}: no answer came in time; {advice}"
            )),
            _ => connect_error(server, found),
        }
    }

    fn tls_failed(&self, error: &rustls::Error) -> StoreError {
        let server = &self.server;
        StoreError::permanent(match error {
            rustls::Error::InvalidCertificate(_) => {
                format!(
                    "cannot trust the certificate of {server}: {error}; name its authority with `?ca=` in the URL"
                )
            }
            rustls::Error::InvalidMessage(_) => {
                format!(
                    "cannot use TLS with {server}: {error}; if the server does not speak TLS, write redis://"
                )
            }
            rustls::Error::AlertReceived(_) => format!(
                "cannot use TLS with {server}: {error}; name a client certificate with `?cert=` and `key=` in the URL"
            ),
            _ => format!("cannot use TLS with {server}: {error}"),
        })
    }

    /// Returns the meaning of an error answer.
    #[cold]
    pub(super) fn refused(&self, error: &RedisError) -> StoreError {
        let (server, answer) = (&self.server, message(error));
        let permanent = |advice: &str| {
            StoreError::permanent(format!(
                "cannot use {server} for the lease: {answer}; {advice}"
            ))
        };
        let advice = match error.code().unwrap_or_default() {
            _ if is_of_replica(error) => "; the server is a replica, so use its primary",
            "NOAUTH" => return permanent("write the password as in redis://:password@host"),
            "NOPERM" => {
                return permanent(
                    "leases need the permissions +@hash +@scripting +@pubsub +time ~lockkit:* &lockkit:*, and +select \
                     if the URL has the number of a database",
                );
            }
            "WRONGTYPE" => {
                return permanent(
                    "the key of the lease contains something else, so use another name or database",
                );
            }
            "MOVED" | "ASK" | "CROSSSLOT" => {
                return permanent(
                    "the server belongs to a cluster that keeps the lease on another node",
                );
            }
            "LOADING" => "; the server is still loading its data",
            "OOM" => "; the server has no free memory",
            "BUSY" => "; the server is running a script",
            _ => "",
        };
        StoreError::not_applied(format!(
            "cannot use {server} for the lease: {answer}{advice}"
        ))
    }

    /// Returns the error for a request that may have taken effect.
    #[cold]
    pub(super) fn unanswered(&self, error: &RedisError) -> StoreError {
        let server = &self.server;
        if is_interrupted(error) {
            return StoreError::unknown(Interrupted);
        }
        StoreError::unknown(match error.is_timeout() {
            true => format!("cannot get an answer from {server}: the time limit passed"),
            false => format!("cannot get an answer from {server}: {error}"),
        })
    }
}

/// Returns whether only a primary may run the request. Before Redis 7 the error code is within the
/// message of the script's failure.
pub(super) fn is_of_replica(error: &RedisError) -> bool {
    message(error).contains("READONLY")
}

/// Returns the server's message.
pub(super) fn message(error: &RedisError) -> String {
    match (error.code(), error.detail()) {
        (Some(code), Some(detail)) => format!("{code} {detail}"),
        _ => error.to_string(),
    }
}

/// Returns the error of this type at the bottom of the client's error.
fn inner<E: std::error::Error + 'static>(error: &RedisError) -> Option<&E> {
    let shared: &Arc<dyn std::error::Error + Send + Sync> = error.source()?.downcast_ref()?;
    let error: &(dyn std::error::Error + 'static) = &**shared;
    error
        .downcast_ref()
        .or_else(|| error.downcast_ref::<io::Error>()?.get_ref()?.downcast_ref())
}

/// A signal or a stop interrupted a wait for the server. The client treats that as a failure, so
/// the request must be repeated over another connection.
#[derive(Debug, thiserror::Error)]
#[error("cannot wait for the server: a signal interrupted the wait")]
pub(super) struct Interrupted;

impl Interrupted {
    pub(super) fn is(error: &StoreError) -> bool {
        matches!(error, StoreError::NotApplied(cause) | StoreError::Unknown(cause) if cause.is::<Self>())
    }
}

pub(super) fn is_interrupted(error: &RedisError) -> bool {
    inner::<io::Error>(error).is_some_and(|error| error.kind() == io::ErrorKind::Interrupted)
}
