//! The check of a new connection: whether the server and its table are usable. It creates the table
//! if there is none.

use tokio_postgres::Row;

use super::connection::{Connection, QueryError};
use super::error::{self, ErrorContext, of_request};
use super::schema::{CREATE, INSPECT, LAYOUT, LIMIT_STATEMENTS, MIN_VERSION};
use crate::base::error::StoreError;
use crate::lease::store::lease_store::Deadline;
use crate::sys::failpoint::step;

/// Checks that the server and its table are usable, and creates the table if there is none.
pub(super) fn check(connection: &mut Connection, by: Deadline) -> Result<(), StoreError> {
    /// The maximum number of tries: other processes may be creating the table, too.
    const MAX_TRIES: usize = 5;
    for _ in 0..MAX_TRIES {
        let row = inspect(connection, by)?;
        let foreign = |error| {
            StoreError::permanent(ErrorContext::new(
                "cannot use the server: it is not PostgreSQL",
                error,
            ))
        };
        let (server_process, version): (i32, i32) = (
            row.try_get(0).map_err(foreign)?,
            row.try_get(1).map_err(foreign)?,
        );
        if version < MIN_VERSION {
            let version: &str = row.try_get(2).map_err(foreign)?;
            return Err(StoreError::permanent(error::too_old(&format!(
                "version {version}"
            ))));
        }
        if row.try_get(3).map_err(foreign)? {
            return Err(StoreError::not_applied(error::read_only()));
        }
        connection.is_direct = connection.server_process() == Some(server_process);
        if let Some(why) = row.try_get::<_, Option<&str>>(5).map_err(foreign)? {
            return Err(StoreError::permanent(error::not_trusted(why)));
        }
        match row.try_get(4).map_err(foreign)? {
            Some(LAYOUT) if connection.is_direct => {
                return connection
                    .execute(LIMIT_STATEMENTS, by)
                    .map_err(|error| match of_request(error) {
                        StoreError::Unknown(cause) => StoreError::NotApplied(cause),
                        error => error,
                    });
            }
            Some(LAYOUT) => return Ok(()),
            Some(_) => return Err(StoreError::permanent(error::of_another_layout())),
            None => create_table(connection, by)?,
        }
    }
    Err(StoreError::not_applied(
        "cannot find the table lockkit_leases in the search_path after its creation",
    ))
}

/// Returns what the server says of itself and of the table.
fn inspect(connection: &mut Connection, by: Deadline) -> Result<Row, StoreError> {
    match connection.query_unprepared(&INSPECT, &[], by) {
        Ok(rows) => rows
            .into_iter()
            .next()
            .ok_or_else(|| StoreError::not_applied("cannot check the server: its answer is empty")),
        Err(QueryError::Driver(error))
            if error.code() == Some(&tokio_postgres::error::SqlState::UNDEFINED_FUNCTION) =>
        {
            Err(StoreError::permanent(ErrorContext::new(
                error::too_old("this version"),
                error,
            )))
        }
        // The statement has changed nothing.
        Err(error) => Err(StoreError::not_applied(ErrorContext::new(
            "cannot check the server",
            of_request(error),
        ))),
    }
}

/// Creates the table, unless another process creates it at the same time.
fn create_table(connection: &mut Connection, by: Deadline) -> Result<(), StoreError> {
    use tokio_postgres::error::SqlState;
    match connection.execute(CREATE, by) {
        Ok(()) => {
            step("table created");
            Ok(())
        }
        Err(QueryError::Driver(error)) => match error.code() {
            // Another process is creating the table at this moment, which IF NOT EXISTS does not
            // see.
            Some(
                &(SqlState::UNIQUE_VIOLATION
                | SqlState::DUPLICATE_TABLE
                | SqlState::DUPLICATE_OBJECT),
            ) => Ok(()),
            Some(&(SqlState::INSUFFICIENT_PRIVILEGE | SqlState::INVALID_SCHEMA_NAME)) => Err(
                StoreError::permanent(ErrorContext::new(error::no_table(), error)),
            ),
            _ => Err(of_request(error.into())),
        },
        Err(error) => Err(of_request(error)),
    }
}
