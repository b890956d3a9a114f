//! The lease table: its layout and its statements.
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
//! The claim and the token stay when a lease is freed, so a repeated release finds that it has been
//! done. Each step is one statement and so one transaction. If the step did not take place, another
//! statement asks why. Each transaction is committed with `synchronous_commit` at `on` at least,
//! whatever the server's default is: a grant that a crash undoes would be given again.

use tokio_postgres::types::Type;

use super::connection::Sql;

/// Creates the table. Its pages keep free space, so that a renewal is written next to the row that
/// it replaces.
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

/// The columns of the table, as [`INSPECT`] reports them.
pub(super) const LAYOUT: &str = "name text, state text, token bigint, claim text, until timestamp with time zone, \
     owner text, died text, waited boolean";

/// Reports the server, the table, and the reason not to trust the table, if any. On a server that
/// is too old, the statement fails or reports the version.
///
/// The code attached to a table, such as triggers and rules, runs with the rights of the user that
/// writes to it. So the table's owner must be able to act as this user anyway (this user or a
/// superuser), or own the schema or database of this user's table. A role of which this user is a
/// member may own the table too, unless this user is a superuser. A user that only created the
/// table first in a schema for all is not trusted. All types match the functions and operators in
/// this statement exactly. An overload that matches better than the system's may belong to another
/// user as well.
pub(super) const INSPECT: Sql = Sql {
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
pub(super) const MIN_VERSION: i32 = 90_500;

/// Limits the duration of a session's statements, unless a shorter limit is set. The server
/// continues a statement whose client has given up, for example one that waits for a lock of the
/// table. Only afterwards does the server see that the client is gone. The limit is longer than any
/// request may take. It does not limit how long a commit waits for a standby. Behind a proxy that
/// gives each transaction another session the limit is not set, because it would apply to the
/// sessions of others.
pub(super) const LIMIT_STATEMENTS: &str = "SELECT \
     set_config('statement_timeout', least(nullif(setting::int, 0), 3000)::text, false) \
     FROM pg_settings WHERE name = 'statement_timeout'";

/// Raises `synchronous_commit` to `on` within a statement, if it is lower.
macro_rules! with_durable_commit {
    () => {
        "CASE WHEN current_setting('synchronous_commit') NOT IN ('on', 'remote_apply') \
         THEN set_config('synchronous_commit', 'on', true) END"
    };
}

/// Parameters: the name, the claim, the TTL in microseconds, the owner, and the claim and the token
/// of a dead holder. Returns a row if the lease is granted: the token, and the holder that died.
/// Returns no row if another claim has the lease.
///
/// A request that arrives after the end of its own grant gets no row, except after an eviction. A
/// waiter for a holder that is taken over continues to wait for the next holder, so the mark stays.
///
/// The statement reads first: INSERT locks an existing row even if it then changes nothing, and
/// that lock is written to disk.
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
        with_durable_commit!()
    ),
    types: &[
        Type::TEXT,
        Type::TEXT,
        Type::FLOAT8,
        Type::TEXT,
        Type::TEXT,
        Type::INT8,
    ],
};

/// Parameters: the name, the claim, the token and the TTL. Returns a row if the lease is renewed.
pub(super) const RENEW: Sql = Sql {
    slot: 2,
    text: concat!(
        "UPDATE lockkit_leases SET until = clock_timestamp() + $4 * interval '1 microsecond' \
         WHERE name = $1 AND claim = $2 AND token = $3 AND state = 'held' RETURNING ",
        with_durable_commit!()
    ),
    types: &[Type::TEXT, Type::TEXT, Type::INT8, Type::FLOAT8],
};

/// Parameters: the name, the claim, the token, the state in which the grant ends, and the owner to
/// record as its holder, if another. Returns a row if the lease was held until now.
pub(super) const FREE: Sql = Sql {
    slot: 3,
    text: concat!(
        "UPDATE lockkit_leases SET state = $4, owner = coalesce($5, owner) \
         WHERE name = $1 AND claim = $2 AND token = $3 AND state = 'held' \
         RETURNING CASE WHEN waited THEN pg_notify('lockkit_leases', $1) END, ",
        with_durable_commit!()
    ),
    types: &[Type::TEXT, Type::TEXT, Type::INT8, Type::TEXT, Type::TEXT],
};

/// Parameters: as the first four of [`FREE`]. Returns a row if the lease was freed in this state
/// before.
pub(super) const IS_FREED: Sql = Sql {
    slot: 7,
    text: "SELECT FROM lockkit_leases WHERE name = $1 AND claim = $2 AND token = $3 AND state = $4",
    types: &[Type::TEXT, Type::TEXT, Type::INT8, Type::TEXT],
};

/// Parameter: the name. Returns a row if the lease is held, even if it has expired.
pub(super) const GET: Sql = Sql {
    slot: 4,
    text: "SELECT token, owner, claim, extract(epoch FROM until - clock_timestamp())::float8, \
         (extract(epoch FROM until)::float8 * 1000000::float8)::bigint FROM lockkit_leases WHERE name = $1 AND state = 'held'",
    types: &[Type::TEXT],
};

/// Parameters: the name, and the claim and the token of its holder. Returns a row if the holder is
/// still the same, and then marks the row as having a waiter.
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
pub(super) const NOTIFY: Sql = Sql {
    slot: 6,
    text: "SELECT pg_notify('lockkit_leases', $1)",
    types: &[Type::TEXT],
};

/// Subscribes a connection to these texts.
pub(super) const LISTEN: &str = "LISTEN lockkit_leases";
