//! The meaning of etcd's refusals and of failed connections: the message, whether the request may
//! have taken effect, and whether another endpoint may succeed.

use std::fmt::{self, Display};
use std::io;

use rustls::AlertDescription;

use crate::base::error::StoreError;

/// The error message of etcd in place of an answer.
#[derive(Debug)]
struct Refusal(String);

impl Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "etcd refused the request: {}", self.0)
    }
}

impl std::error::Error for Refusal {}

/// Returns whether a request failed because its session no longer exists.
pub(super) fn is_session_gone(error: &StoreError) -> bool {
    has_message(error, "requested lease not found")
}

/// Returns whether a request failed because etcd has compacted the revision that it asked for.
pub(super) fn is_compacted(error: &StoreError) -> bool {
    has_message(error, "required revision has been compacted")
}

fn has_message(error: &StoreError, part: &str) -> bool {
    let refusal = error.cause().downcast_ref::<Refusal>();
    refusal.is_some_and(|refusal| refusal.0.contains(part))
}

/// The reason why an endpoint gave no answer.
pub(super) enum AttemptError {
    /// The token is no longer known.
    Token(StoreError),
    /// Another endpoint may succeed.
    Endpoint(StoreError),
    /// Another endpoint may succeed, or this one after a leader has been elected.
    Leaderless(StoreError),
    /// All endpoints would answer the same.
    Cluster(StoreError),
}

impl AttemptError {
    pub(super) fn into_error(self) -> StoreError {
        let (Self::Token(error)
        | Self::Endpoint(error)
        | Self::Leaderless(error)
        | Self::Cluster(error)) = self;
        error
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

/// Returns the meaning of a refusal with this code and message.
pub(super) fn refusal(
    endpoint: &impl Display,
    user: &str,
    code: i64,
    message: &str,
) -> AttemptError {
    let refusal = Refusal(message.to_owned());
    let has = |part: &str| message.contains(part);
    let permanent = |text: String| AttemptError::Cluster(StoreError::permanent(text));
    match code {
        _ if has("user name is empty") => permanent(format!(
            "cannot use {endpoint} without a user and a password; write etcd://user:password@{endpoint}"
        )),
        _ if has("authentication failed") => permanent(format!(
            "cannot log in to {endpoint} as {user:?}: no such user has this password; check the user and the password \
             of the URL"
        )),
        _ if has("authentication is not enabled") => permanent(format!(
            "cannot log in to {endpoint} as {user:?}: its authentication is off; remove the user from the URL, or turn \
             authentication on"
        )),
        _ if has("invalid auth token") || has("revision of auth store is old") => {
            AttemptError::Token(StoreError::not_applied(refusal))
        }
        UNAUTHENTICATED => AttemptError::Token(StoreError::not_applied(refusal)),
        PERMISSION_DENIED => permanent(format!(
            "cannot use the keys of leases at {endpoint}: the user {user:?} lacks the permission; give it a role that \
             may read and write all keys with their prefix"
        )),
        _ if has("CommonName") => permanent(format!(
            "cannot use {endpoint} with a client certificate that has a common name while its authentication is on; \
             use a certificate without a common name"
        )),
        UNAVAILABLE if has("no leader") => {
            AttemptError::Leaderless(StoreError::not_applied(refusal))
        }
        CANCELLED | UNKNOWN | DEADLINE_EXCEEDED | ABORTED | INTERNAL | UNAVAILABLE | DATA_LOSS => {
            AttemptError::Endpoint(StoreError::unknown(refusal))
        }
        INVALID_ARGUMENT | UNIMPLEMENTED => AttemptError::Cluster(StoreError::permanent(refusal)),
        _ => AttemptError::Cluster(StoreError::not_applied(refusal)),
    }
}

/// Returns whether the other side ended the connection.
pub(super) fn is_disconnected(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
    )
}

/// Returns the TLS error of a connection, if there is one.
pub(super) fn tls_error(endpoint: &impl Display, error: &io::Error) -> Option<StoreError> {
    use rustls::Error as Tls;
    let error = error.get_ref()?.downcast_ref::<Tls>()?;
    Some(StoreError::permanent(match error {
        Tls::InvalidMessage(_) => {
            format!("cannot use TLS with {endpoint}: the server does not speak TLS; write etcd://")
        }
        Tls::AlertReceived(
            AlertDescription::CertificateRequired | AlertDescription::BadCertificate,
        ) => format!(
            "cannot use TLS with {endpoint}: {error}; name a client certificate of a trusted authority with the \
             parameters cert and key"
        ),
        Tls::InvalidCertificate(_) => {
            format!(
                "cannot trust the certificate of {endpoint}: {error}; name its authority with the parameter ca"
            )
        }
        _ => format!("cannot use TLS with {endpoint}: {error}"),
    }))
}
