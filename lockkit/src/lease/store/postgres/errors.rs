//! The errors as sentences, and whether the request may have taken effect.
//!
//! An `ERROR` of the server undid the transaction, so the request took no effect. A `FATAL` error ended the session and
//! may have come after the commit. No sentence contains a password: neither the server's messages nor tokio-postgres's
//! do.

use std::fmt;
use std::io;

use tokio_postgres::Error;
use tokio_postgres::error::{Severity, SqlState};

use super::connection::Cut;
use super::schema;
use crate::base::error::StoreError;

/// The failed attempt or the fault, and the error under it.
#[derive(Debug)]
pub(super) struct Said {
    what: String,
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl Said {
    pub(super) fn new(what: impl Into<String>, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self { what: what.into(), source: source.into() }
    }
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Said {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.source)
    }
}

/// Returns the error for a failed connection to `place`. The attempt has taken no effect, whatever the error is.
pub(super) fn of_connecting(cut: Cut, place: &str, user: &str, late: impl FnOnce() -> StoreError) -> StoreError {
    let error = match cut {
        Cut::Late => return late(),
        Cut::Here(error) => return StoreError::not_applied(Said::new(format!("connect to {place}"), error)),
        Cut::By(error) => error,
    };
    let refused = |what: String, error| StoreError::not_applied(Said::new(what, error));
    let misuse = |what: String, error| StoreError::permanent(Said::new(what, error));
    let Some(code) = error.code() else {
        let source = std::error::Error::source(&error);
        let broken = source.and_then(|source| source.downcast_ref::<io::Error>());
        let is_tls = broken.and_then(io::Error::get_ref).is_some_and(|inner| inner.is::<rustls::Error>());
        return match broken {
            Some(_) if is_tls => misuse(format!("{place} and this URL do not agree on TLS"), error),
            Some(_) => refused(format!("connect to {place}"), error),
            None if error.is_closed() => refused(format!("connect to {place}"), error),
            None => misuse(format!("{place} and this URL do not agree on how to get in"), error),
        };
    };
    match *code {
        SqlState::INVALID_PASSWORD | SqlState::INVALID_AUTHORIZATION_SPECIFICATION => {
            let what = "its user, password, certificate, and sslmode, for the server may ask for TLS or refuse it";
            misuse(format!("{place} does not let {user} in with what this URL says ({what})"), error)
        }
        SqlState::INVALID_CATALOG_NAME => misuse(format!("{place} has no such database"), error),
        SqlState::INSUFFICIENT_PRIVILEGE => misuse(format!("{user} may not use this database of {place}"), error),
        SqlState::INVALID_PARAMETER_VALUE | SqlState::UNDEFINED_OBJECT | SqlState::CANT_CHANGE_RUNTIME_PARAM => {
            misuse(format!("{place} does not take the options of this URL"), error)
        }
        SqlState::TOO_MANY_CONNECTIONS => {
            refused(format!("{place} has no connection left; a process needs up to ten, see max_connections"), error)
        }
        SqlState::CANNOT_CONNECT_NOW => refused(format!("{place} is starting, stopping or recovering"), error),
        _ => refused(format!("connect to {place}"), error),
    }
}

/// Returns the error of a failed request.
pub(super) fn of_request(cut: Cut) -> StoreError {
    let error = match cut {
        Cut::Late => return StoreError::unknown("the server did not answer in time"),
        Cut::Here(error) => return StoreError::unknown(Said::new("the connection broke", error)),
        Cut::By(error) => error,
    };
    let Some(said) = error.as_db_error().filter(|said| said.parsed_severity() == Some(Severity::Error)) else {
        return StoreError::unknown(Said::new("the connection broke", error));
    };
    let (is_misuse, what) = match *said.code() {
        SqlState::INSUFFICIENT_PRIVILEGE => (true, schema::no_privilege()),
        SqlState::UNDEFINED_COLUMN
        | SqlState::UNDEFINED_FUNCTION
        | SqlState::DATATYPE_MISMATCH
        | SqlState::WRONG_OBJECT_TYPE
        | SqlState::INVALID_COLUMN_REFERENCE
        | SqlState::NOT_NULL_VIOLATION
        | SqlState::CHECK_VIOLATION => (true, schema::of_another_layout()),
        SqlState::SYNTAX_ERROR => (true, "the server does not know what PostgreSQL 9.5 does".to_owned()),
        SqlState::UNTRANSLATABLE_CHARACTER | SqlState::CHARACTER_NOT_IN_REPERTOIRE => {
            (true, "the encoding of the database has no such characters as are in the lease's name".to_owned())
        }
        SqlState::READ_ONLY_SQL_TRANSACTION => (false, read_only()),
        SqlState::DISK_FULL => (false, "the server's disk is full".to_owned()),
        SqlState::QUERY_CANCELED => (false, "the server cancelled the request, see statement_timeout".to_owned()),
        _ => (false, "the server refused".to_owned()),
    };
    if is_misuse {
        StoreError::permanent(Said::new(what, error))
    } else {
        StoreError::not_applied(Said::new(what, error))
    }
}

/// Returns the message for a read-only server.
pub(super) fn read_only() -> String {
    "the server only reads: it is a standby, or default_transaction_read_only is on; where there are several, name them \
     all in the URL"
        .to_owned()
}

/// Returns whether the session's history differs from what this process assumes. A proxy that gives each transaction
/// another session causes that, and so does a re-created table.
pub(super) fn is_of_statements(error: &Error) -> bool {
    let Some(said) = error.as_db_error() else { return false };
    matches!(
        *said.code(),
        SqlState::INVALID_SQL_STATEMENT_NAME
            | SqlState::DUPLICATE_PSTATEMENT
            | SqlState::FEATURE_NOT_SUPPORTED
            | SqlState::PROTOCOL_VIOLATION
    ) && said.parsed_severity() == Some(Severity::Error)
}

/// Returns whether the request should be repeated at once, because two transactions conflicted.
pub(super) fn is_of_meeting(error: &Error) -> bool {
    matches!(error.code(), Some(&SqlState::T_R_SERIALIZATION_FAILURE | &SqlState::T_R_DEADLOCK_DETECTED))
}
