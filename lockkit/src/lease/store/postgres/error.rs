//! The errors as messages, and whether the request may have taken effect.
//!
//! An `ERROR` of the server undid the transaction, so the request took no effect. A `FATAL` error
//! ended the session and may have come after the commit. No message contains a password: neither
//! the server's messages nor tokio-postgres's do.

use std::fmt;
use std::io;

use tokio_postgres::Error;
use tokio_postgres::error::{Severity, SqlState};

use super::connection::QueryError;
use super::schema::{CREATE, LAYOUT};
use crate::base::error::StoreError;

/// The failed operation, and the error that is its cause.
#[derive(Debug)]
pub(super) struct ErrorContext {
    text: String,
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl ErrorContext {
    pub(super) fn new(
        text: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self {
            text: text.into(),
            source: source.into(),
        }
    }
}

impl fmt::Display for ErrorContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for ErrorContext {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.source)
    }
}

/// Returns the error for a failed connection to `server`. The attempt has taken no effect, whatever
/// the error is.
pub(super) fn of_connecting(
    error: QueryError,
    server: &str,
    user: &str,
    timeout: impl FnOnce() -> StoreError,
) -> StoreError {
    let not_applied = |text: String, error| StoreError::not_applied(ErrorContext::new(text, error));
    let permanent = |text: String, error| StoreError::permanent(ErrorContext::new(text, error));
    let error = match error {
        QueryError::TimedOut => return timeout(),
        QueryError::Io(error) => {
            return StoreError::not_applied(ErrorContext::new(
                format!("cannot connect to {server}"),
                error,
            ));
        }
        QueryError::Driver(error) => error,
    };
    let Some(code) = error.code() else {
        return without_code(error, server);
    };
    match *code {
        SqlState::INVALID_PASSWORD | SqlState::INVALID_AUTHORIZATION_SPECIFICATION => permanent(
            format!(
                "cannot log in to {server} as {user}; check the user, the password, the certificate, and sslmode in \
                 the URL, because the server may require or refuse TLS"
            ),
            error,
        ),
        SqlState::INVALID_CATALOG_NAME => permanent(
            format!("cannot use the database of the URL at {server}"),
            error,
        ),
        SqlState::INSUFFICIENT_PRIVILEGE => permanent(
            format!("cannot use the database of the URL at {server} as {user}"),
            error,
        ),
        SqlState::INVALID_PARAMETER_VALUE
        | SqlState::UNDEFINED_OBJECT
        | SqlState::CANT_CHANGE_RUNTIME_PARAM => permanent(
            format!("cannot use the options of the URL at {server}"),
            error,
        ),
        SqlState::TOO_MANY_CONNECTIONS => not_applied(
            format!(
                "cannot connect to {server}: it has no connection left; a process needs up to ten, see max_connections"
            ),
            error,
        ),
        SqlState::CANNOT_CONNECT_NOW => not_applied(
            format!("cannot connect to {server}: it is starting, stopping or recovering"),
            error,
        ),
        _ => not_applied(format!("cannot connect to {server}"), error),
    }
}

/// Converts an error of connecting that is not the server's answer.
fn without_code(error: tokio_postgres::Error, server: &str) -> StoreError {
    let source = std::error::Error::source(&error);
    let io_error = source.and_then(|source| source.downcast_ref::<io::Error>());
    let is_tls = io_error
        .and_then(io::Error::get_ref)
        .is_some_and(|inner| inner.is::<rustls::Error>());
    let is_connection = io_error.is_some() || error.is_closed();
    if is_tls {
        let text = format!("cannot use TLS with {server}; check sslmode in the URL");
        StoreError::permanent(ErrorContext::new(text, error))
    } else if is_connection {
        StoreError::not_applied(ErrorContext::new(
            format!("cannot connect to {server}"),
            error,
        ))
    } else {
        let text =
            format!("cannot log in to {server}; check the credentials and sslmode in the URL");
        StoreError::permanent(ErrorContext::new(text, error))
    }
}

/// Returns the error of a failed request.
pub(super) fn of_request(error: QueryError) -> StoreError {
    let broken = "cannot get an answer: the connection broke";
    let error = match error {
        QueryError::TimedOut => {
            return StoreError::unknown("cannot get an answer: the time limit passed");
        }
        QueryError::Io(error) => return StoreError::unknown(ErrorContext::new(broken, error)),
        QueryError::Driver(error) => error,
    };
    let Some(answer) = error
        .as_db_error()
        .filter(|answer| answer.parsed_severity() == Some(Severity::Error))
    else {
        return StoreError::unknown(ErrorContext::new(broken, error));
    };
    let (is_permanent, text) = match *answer.code() {
        SqlState::INSUFFICIENT_PRIVILEGE => (true, no_privilege()),
        SqlState::UNDEFINED_COLUMN
        | SqlState::UNDEFINED_FUNCTION
        | SqlState::DATATYPE_MISMATCH
        | SqlState::WRONG_OBJECT_TYPE
        | SqlState::INVALID_COLUMN_REFERENCE
        | SqlState::NOT_NULL_VIOLATION
        | SqlState::CHECK_VIOLATION => (true, of_another_layout()),
        SqlState::SYNTAX_ERROR => (
            true,
            "cannot use the server: it does not know a statement of PostgreSQL 9.5".to_owned(),
        ),
        SqlState::UNTRANSLATABLE_CHARACTER | SqlState::CHARACTER_NOT_IN_REPERTOIRE => (
            true,
            "cannot write the name of the lease: the encoding of the database lacks a character"
                .to_owned(),
        ),
        SqlState::READ_ONLY_SQL_TRANSACTION => (false, read_only()),
        SqlState::DISK_FULL => (
            false,
            "cannot write the lease: the server's disk is full".to_owned(),
        ),
        SqlState::QUERY_CANCELED => (
            false,
            "cannot complete the request: the server cancelled it, see statement_timeout"
                .to_owned(),
        ),
        _ => (
            false,
            "cannot complete the request: the server refused it".to_owned(),
        ),
    };
    if is_permanent {
        StoreError::permanent(ErrorContext::new(text, error))
    } else {
        StoreError::not_applied(ErrorContext::new(text, error))
    }
}

/// Returns whether the session's history differs from what this process assumes. A proxy that gives
/// each transaction another session causes that, and so does a re-created table.
pub(super) fn is_of_statements(error: &Error) -> bool {
    let Some(answer) = error.as_db_error() else {
        return false;
    };
    matches!(
        *answer.code(),
        SqlState::INVALID_SQL_STATEMENT_NAME
            | SqlState::DUPLICATE_PSTATEMENT
            | SqlState::FEATURE_NOT_SUPPORTED
            | SqlState::PROTOCOL_VIOLATION
    ) && answer.parsed_severity() == Some(Severity::Error)
}

/// Returns whether the request should be repeated at once, because two transactions conflicted.
pub(super) fn is_of_conflict(error: &Error) -> bool {
    matches!(
        error.code(),
        Some(&SqlState::T_R_SERIALIZATION_FAILURE | &SqlState::T_R_DEADLOCK_DETECTED)
    )
}

const GRANT: &str = "GRANT SELECT, INSERT, UPDATE ON lockkit_leases TO …;";

/// Returns the message for a read-only server.
pub(super) fn read_only() -> String {
    "cannot write the lease: the server is a standby, or default_transaction_read_only is on; if there are several \
     servers, name all of them in the URL"
        .to_owned()
}

/// Returns the message for a server that is too old.
pub(super) fn too_old(version: &str) -> String {
    format!(
        "cannot use the server: {version} is too old; leases need PostgreSQL 9.5 or later, for INSERT … ON CONFLICT"
    )
}

/// Returns the message for a user that may not create the missing table.
pub(super) fn no_table() -> String {
    format!(
        "cannot create the table lockkit_leases; let a user with the privilege run: {CREATE}; {GRANT}"
    )
}

/// Returns the message for a user without the privileges to use the table.
pub(super) fn no_privilege() -> String {
    format!("cannot use the table lockkit_leases; let its owner run: {GRANT}")
}

/// Returns the message for a table that may run the code of another user.
pub(super) fn not_trusted(reason: &str) -> String {
    format!(
        "cannot trust the table lockkit_leases: {reason}, so it may run the code of another user; put another schema \
         first in the search_path, or let the owner of the schema or the database, or this user, create it"
    )
}

/// Returns the message for a table of another layout.
pub(super) fn of_another_layout() -> String {
    format!(
        "cannot use the table lockkit_leases: this version of lockkit needs the layout {LAYOUT}, with name as primary \
         key; put another schema first in the search_path, or drop the table when no lease in it is held"
    )
}
