//! The lease table: its layout, its statements, and how it is created.
//!
//! A row is never deleted, because it keeps the token. Its columns:
//!
//! | column | content |
//! |---|---|
//! | `name` | the lease |
//! | `state` | `held`; or how its last holder left it: `released`, `lost` (the holder knew of the expiry), `evicted` |
//! | `token` | of the last grant |
//! | `claim` | of the last grant, 32 hexadecimal digits |
//! | `until` | when a held lease expires, by the server's clock |
//! | `owner` | the present or last holder; in a `lost` row whose grant no caller received, the earlier dead holder |
//! | `died` | the previous holder, if it did not release; empty if that holder is unknown |
//! | `waited` | a waiter waits for this holder or for the dead one before it; the end of the grant notifies it |
//!
//! The claim and the token stay when a lease is freed, so a repeated release finds that it has been done. Each step is
//! one statement and so one transaction. If the step did not take place, another statement asks why. Each transaction
//! is committed with `synchronous_commit` at `on` at least, whatever the server's default is: a grant that a crash
//! undoes would be given again.

use tokio_postgres::types::Type;

use super::connection::{Cut, Link, Sql};
use super::errors::{self, Said, of_request};
use crate::base::error::StoreError;
use crate::lease::store::lease_store::Deadline;
use crate::sys::failpoint::step;

/// Creates the table. Its pages keep free space, so that a renewal is written next to the row that it replaces.
pub(super) const CREATE: &str = "CREATE TABLE IF NOT EXISTS lockkit_leases (\
     name text COLLATE \"C\" PRIMARY KEY, \
     state text NOT NULL, \
     token bigint NOT NULL, \
     claim text NOT NULL, \
     until timestamp with time zone NOT NULL, \
     owner text NOT NULL, \
     died text, \
     waited boolean NOT NULL\
     ) WITH (fillfactor = 50)";

/// The columns of the table, as [`HELLO`] reports them.
const LAYOUT: &str = "name text, state text, token bigint, claim text, until timestamp with time zone, owner text, \
     died text, waited boolean";

/// Reports the server, the table, and the reason not to trust the table, if any. On a server that is too old, the
/// statement fails or reports the version.
///
/// The code attached to a table, such as triggers and rules, runs with the rights of the user that writes to it. So the
/// table's owner must be able to act as this user anyway (this user or a superuser), or own the schema or database of
/// this user's table. A role of which this user is a member may own the table too, unless this user is a superuser. A
/// user that only created the table first in a schema for all is not trusted. All types match the functions and
/// operators in this statement exactly. An overload that matches better than the system's may belong to another user as
/// well.
const HELLO: Sql = Sql {
    slot: 0,
    text: "SELECT pg_backend_pid(), current_setting('server_version_num')::int, current_setting('server_version'), \
         current_setting('transaction_read_only') = 'on', \
         (SELECT string_agg(attname::text || ' ' || format_type(atttypid, atttypmod), ', ' ORDER BY attnum) \
         FROM pg_attribute WHERE attrelid = pg_catalog.to_regclass('lockkit_leases')::oid AND attnum > 0 \
         AND NOT attisdropped), \
         (SELECT CASE WHEN relkind <> 'r' THEN 'it is no plain table' \
         WHEN EXISTS (SELECT 1 FROM pg_trigger WHERE tgrelid = pg_class.oid AND NOT tgisinternal) \
         OR EXISTS (SELECT 1 FROM pg_rewrite WHERE ev_class = pg_class.oid) THEN 'it has a trigger or a rule' \
         WHEN NOT (owner.rolsuper OR owner.rolname = current_user OR relowner = nspowner OR relowner = datdba \
         OR (NOT me.rolsuper AND pg_has_role(relowner, 'MEMBER'))) \
         THEN 'it is of the user ' || quote_ident(owner.rolname::text) END \
         FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace JOIN pg_roles owner ON owner.oid = relowner \
         JOIN pg_database ON datname = current_database() JOIN pg_roles me ON me.rolname = current_user \
         WHERE pg_class.oid = pg_catalog.to_regclass('lockkit_leases')::oid)",
    types: &[],
};

/// The oldest version with the feature used here: `INSERT … ON CONFLICT`.
const OLDEST: i32 = 90_500;

/// Limits the duration of a session's statements, unless a shorter limit is set. The server continues a statement whose
/// client has given up, for example one that waits for a lock of the table. Only afterwards does the server see that
/// the client is gone. The limit is longer than any request may take. It does not limit how long a commit waits for a
/// standby. Behind a proxy that gives each transaction another session the limit is not set, because it would apply to
/// the sessions of others.
const BOUNDED: &str = "SELECT set_config('statement_timeout', least(nullif(setting::int, 0), 3000)::text, false) \
     FROM pg_settings WHERE name = 'statement_timeout'";

/// Raises `synchronous_commit` to `on` within a statement, if it is lower.
macro_rules! durably {
    () => {
        "CASE WHEN current_setting('synchronous_commit') NOT IN ('on', 'remote_apply') \
         THEN set_config('synchronous_commit', 'on', true) END"
    };
}

/// Parameters: the name, the claim, the TTL in microseconds, the owner, and the claim and the token of a dead holder.
/// Returns a row if the lease is granted: the token, and the holder that died. Returns no row if another claim has the
/// lease.
///
/// A request that arrives after the end of its own grant gets no row, except after an eviction. A waiter for a holder
/// that is taken over continues to wait for the next holder, so the mark stays.
///
/// The statement reads first: INSERT locks an existing row even if it then changes nothing, and that lock is written to
/// disk.
pub(super) const ACQUIRE: Sql = Sql {
    slot: 1,
    text: concat!(
        "INSERT INTO lockkit_leases AS l (name, state, token, claim, until, owner, died, waited) \
         SELECT $1, 'held', (extract(epoch FROM clock_timestamp())::float8 * 1000000::float8)::bigint, $2, \
         clock_timestamp() + $3 * interval '1 microsecond', $4, NULL, false WHERE NOT EXISTS \
         (SELECT FROM lockkit_leases WHERE name = $1 AND state = 'held' AND until > clock_timestamp() \
         AND claim <> $2 AND NOT (claim = $5 AND token = $6)) \
         ON CONFLICT (name) DO UPDATE SET state = 'held', claim = excluded.claim, until = excluded.until, \
         owner = excluded.owner, \
         token = CASE WHEN l.state = 'held' AND l.claim = excluded.claim THEN l.token \
         ELSE greatest(l.token + 1, excluded.token) END, \
         died = CASE WHEN l.state = 'held' AND l.claim = excluded.claim THEN l.died \
         WHEN l.state IN ('held', 'lost') THEN l.owner END, \
         waited = l.waited AND l.state = 'held' \
         WHERE (l.state <> 'held' OR l.until <= clock_timestamp() OR l.claim = excluded.claim \
         OR (l.claim = $5 AND l.token = $6)) \
         AND NOT (l.state IN ('released', 'lost') AND l.claim = excluded.claim) RETURNING token, died, ",
        durably!()
    ),
    types: &[Type::TEXT, Type::TEXT, Type::FLOAT8, Type::TEXT, Type::TEXT, Type::INT8],
};

/// Parameters: the name, the claim, the token and the TTL. Returns a row if the lease is renewed.
pub(super) const RENEW: Sql = Sql {
    slot: 2,
    text: concat!(
        "UPDATE lockkit_leases SET until = clock_timestamp() + $4 * interval '1 microsecond' \
         WHERE name = $1 AND claim = $2 AND token = $3 AND state = 'held' RETURNING ",
        durably!()
    ),
    types: &[Type::TEXT, Type::TEXT, Type::INT8, Type::FLOAT8],
};

/// Parameters: the name, the claim, the token, the state to leave the lease in, and the owner to record as its holder,
/// if another. Returns a row if the lease was held until now.
pub(super) const LEAVE: Sql = Sql {
    slot: 3,
    text: concat!(
        "UPDATE lockkit_leases SET state = $4, owner = coalesce($5, owner) \
         WHERE name = $1 AND claim = $2 AND token = $3 AND state = 'held' \
         RETURNING CASE WHEN waited THEN pg_notify('lockkit_leases', $1) END, ",
        durably!()
    ),
    types: &[Type::TEXT, Type::TEXT, Type::INT8, Type::TEXT, Type::TEXT],
};

/// Parameters: as the first four of [`LEAVE`]. Returns a row if the lease was left in this state before.
pub(super) const LEFT: Sql = Sql {
    slot: 7,
    text: "SELECT FROM lockkit_leases WHERE name = $1 AND claim = $2 AND token = $3 AND state = $4",
    types: &[Type::TEXT, Type::TEXT, Type::INT8, Type::TEXT],
};

/// Parameter: the name. Returns a row if the lease is held, even if it has expired.
pub(super) const LOOK: Sql = Sql {
    slot: 4,
    text: "SELECT token, owner, claim, extract(epoch FROM until - clock_timestamp())::float8, \
         (extract(epoch FROM until)::float8 * 1000000::float8)::bigint FROM lockkit_leases WHERE name = $1 AND state = 'held'",
    types: &[Type::TEXT],
};

/// Parameters: the name, and the claim and the token of its holder. Returns a row if the holder is still the same, and
/// then marks the row as having a waiter.
pub(super) const MARK: Sql = Sql {
    slot: 5,
    text: "WITH holds AS (SELECT waited FROM lockkit_leases \
         WHERE name = $1 AND claim = $2 AND token = $3 AND state = 'held'), \
         marked AS (UPDATE lockkit_leases SET waited = true \
         WHERE name = $1 AND claim = $2 AND token = $3 AND state = 'held' AND NOT waited RETURNING true) \
         SELECT true FROM marked UNION ALL SELECT true FROM holds WHERE waited",
    types: &[Type::TEXT, Type::TEXT, Type::INT8],
};

/// Sends a text to all listeners.
pub(super) const NOTIFY: Sql = Sql { slot: 6, text: "SELECT pg_notify('lockkit_leases', $1)", types: &[Type::TEXT] };

/// Subscribes a connection to these texts.
pub(super) const LISTEN: &str = "LISTEN lockkit_leases";

/// Checks that the server and its table are usable, and creates the table if there is none.
pub(super) fn check(link: &mut Link, by: Deadline) -> Result<(), StoreError> {
    /// The maximum number of tries: other processes may be creating the table, too.
    const MOST_TRIES: usize = 5;
    for _ in 0..MOST_TRIES {
        let row = match link.ask_once(&HELLO, &[], by) {
            Ok(rows) => {
                rows.into_iter().next().ok_or_else(|| StoreError::not_applied("the server answered nothing"))?
            }
            Err(Cut::By(error)) if error.code() == Some(&tokio_postgres::error::SqlState::UNDEFINED_FUNCTION) => {
                return Err(StoreError::permanent(Said::new(too_old("this server"), error)));
            }
            // The statement has changed nothing.
            Err(cut) => return Err(StoreError::not_applied(Said::new("greet the server", of_request(cut)))),
        };
        let strange = |error| StoreError::permanent(Said::new("this is no PostgreSQL server", error));
        let (process, version): (i32, i32) = (row.try_get(0).map_err(strange)?, row.try_get(1).map_err(strange)?);
        if version < OLDEST {
            let version: &str = row.try_get(2).map_err(strange)?;
            return Err(StoreError::permanent(too_old(&format!("PostgreSQL {version}"))));
        }
        if row.try_get(3).map_err(strange)? {
            return Err(StoreError::not_applied(errors::read_only()));
        }
        link.is_direct = link.process() == Some(process);
        if let Some(why) = row.try_get::<_, Option<&str>>(5).map_err(strange)? {
            return Err(StoreError::permanent(not_trusted(why)));
        }
        match row.try_get(4).map_err(strange)? {
            Some(LAYOUT) if link.is_direct => {
                return link.execute(BOUNDED, by).map_err(|cut| match of_request(cut) {
                    StoreError::Unknown(cause) => StoreError::NotApplied(cause),
                    error => error,
                });
            }
            Some(LAYOUT) => return Ok(()),
            Some(_) => return Err(StoreError::permanent(of_another_layout())),
            None => make(link, by)?,
        }
    }
    Err(StoreError::not_applied("the table lockkit_leases cannot be found in the search_path after it was made"))
}

fn make(link: &mut Link, by: Deadline) -> Result<(), StoreError> {
    use tokio_postgres::error::SqlState;
    match link.execute(CREATE, by) {
        Ok(()) => {
            step("table made");
            Ok(())
        }
        Err(Cut::By(error)) => match error.code() {
            // Another process is creating the table at this moment, which IF NOT EXISTS does not see.
            Some(&(SqlState::UNIQUE_VIOLATION | SqlState::DUPLICATE_TABLE | SqlState::DUPLICATE_OBJECT)) => Ok(()),
            Some(&(SqlState::INSUFFICIENT_PRIVILEGE | SqlState::INVALID_SCHEMA_NAME)) => {
                let what = format!(
                    "there is no table lockkit_leases, and this user may not make it; let somebody run: {CREATE}; {}",
                    grant()
                );
                Err(StoreError::permanent(Said::new(what, error)))
            }
            _ => Err(of_request(error.into())),
        },
        Err(cut) => Err(of_request(cut)),
    }
}

fn too_old(server: &str) -> String {
    format!("{server} is too old: leases need PostgreSQL 9.5 or later, for INSERT … ON CONFLICT")
}

fn grant() -> &'static str {
    "GRANT SELECT, INSERT, UPDATE ON lockkit_leases TO …;"
}

/// Returns the message for a user without the privileges to use the table.
pub(super) fn no_privilege() -> String {
    format!("this user may not use the table lockkit_leases; let its owner run: {}", grant())
}

fn not_trusted(why: &str) -> String {
    format!(
        "the table lockkit_leases may do as another user wants: {why}; have another schema come first in the search_path, \
         or let the owner of the schema or the database, or this user, make it"
    )
}

/// Returns the message for a table of another layout.
pub(super) fn of_another_layout() -> String {
    format!(
        "the table lockkit_leases is of another layout than this version of lockkit's ({LAYOUT}, with name as primary \
         key); have another schema come first in the search_path, or drop it when nobody holds a lease in it"
    )
}
