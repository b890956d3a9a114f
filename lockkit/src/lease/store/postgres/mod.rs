//! Leases on PostgreSQL: one row per lease in the table `lockkit_leases`. The table is in the
//! database that the URL names, in the first schema of the user's search_path.
//!
//! Each step is one statement and one round trip (see `schema`), on a connection that no other
//! request uses meanwhile (see `connection`). The row decides; LISTEN and NOTIFY only wake. A
//! waiter leaves a mark in the row. A release notifies only if there is a mark, because NOTIFY
//! makes all commits of a server wait for each other.
//!
//! The time is the server's: only its clock sets and compares `until`, so the clients' clocks have
//! no effect. If the server's clock is set forward, a held lease goes to the next request, and its
//! holder learns of that at its next heartbeat. If the clock is set back, a lease without renewals
//! stays held for longer. The token grows in both cases.
//!
//! Behind a proxy that gives each transaction another session no statement is prepared. Where
//! notifications do not get through, waiters poll at their retry delay.

mod check;
mod config;
mod connection;
mod error;
mod listener;
mod schema;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use self::check::check;
use self::config::ServerConfig;
use self::connection::{Connection, QueryError, Sql};
use self::error::{ErrorContext, is_of_conflict, is_of_statements, of_another_layout, of_request};
use self::listener::listen;
use crate::base::cancel::CancelToken;
use crate::base::error::StoreError;
use crate::lease::LeaseStore;
use crate::lease::store::lease_store::{
    Attempt, ClaimId, Deadline, Durability, Grant, LeaseName, LeaseSnapshot, Released, Renewal,
    StoreProfile, sleep,
};
use crate::lease::store::server::{
    EndState, Outcome, Pool, Result, Semaphore, Subscriptions, acquire_or_take_over,
    expire_if_dead, format_current_owner, format_recovered_owner, parse_claim, parse_owner,
    release_not_found,
};
use crate::sys::failpoint::step;
use crate::sys::process_local::ProcessLocal;

/// The minimum TTL: a checkpoint or a lock of the server may use up a shorter one.
const MIN_TTL: Duration = Duration::from_millis(250);
/// The unit of TTLs.
const TTL_STEP: Duration = Duration::from_micros(1);
/// The timeout of a waiter's request.
const WAITER_REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// The maximum number of attempts of an acquisition that finds neither a grant nor a holder.
const MAX_ACQUIRE_ATTEMPTS: u32 = 8;

/// Returns the store on the server at `url`, without connecting.
pub(in crate::lease) fn open(url: &str) -> crate::Result<Arc<dyn LeaseStore>> {
    let config = Arc::new(ServerConfig::parse(url)?);
    Ok(Arc::new(PostgresStore {
        failure_domain: config.failure_domain(),
        config,
        state: ProcessLocal::new(),
    }))
}

struct PostgresStore {
    config: Arc<ServerConfig>,
    failure_domain: u64,
    state: ProcessLocal<Arc<ProcessState>>,
}

/// The state of the store in one process.
struct ProcessState {
    pool: Pool<Connection>,
    semaphore: Semaphore,
    subscriptions: Arc<Subscriptions>,
    /// Notifications do not arrive, because of a proxy.
    lacks_notifications: Arc<AtomicBool>,
}

impl LeaseStore for PostgresStore {
    fn profile(&self) -> StoreProfile {
        StoreProfile {
            smallest_ttl: MIN_TTL,
            ttl_step: TTL_STEP,
            wakes_waiters: !self.state().lacks_notifications.load(Ordering::Relaxed),
            failure_domain: Some(self.failure_domain),
            ..StoreProfile::new(Durability::Primary)
        }
    }

    fn try_acquire(
        &self,
        name: &LeaseName,
        claim: &ClaimId,
        ttl: Duration,
        by: Deadline,
    ) -> Result<Attempt> {
        let (claim_text, micros, owner) = (claim.to_string(), micros(ttl), format_current_owner());
        acquire_or_take_over(|dead| {
            let dead_claim = dead
                .and_then(LeaseSnapshot::claim)
                .map(|claim| claim.to_string())
                .unwrap_or_default();
            let dead_token = dead
                .and_then(LeaseSnapshot::token)
                .map_or(0, u64::cast_signed);
            let values: [&(dyn ToSql + Sync); 6] = [
                &name.as_str(),
                &claim_text,
                &micros,
                &owner,
                &dead_claim,
                &dead_token,
            ];
            // After a miss, the next attempt sees a holder that came in between.
            for _ in 0..MAX_ACQUIRE_ATTEMPTS {
                let rows = self.query(&schema::ACQUIRE, &values, by)?;
                let Some(row) = rows.first() else {
                    match self.holder(name, by)? {
                        // An earlier request of the same claim may have taken effect only now.
                        Some(seen) if seen.claim() != Some(*claim) => {
                            return Ok(Attempt::Busy(seen));
                        }
                        _ => continue,
                    }
                };
                let (token, dead): (i64, Option<&str>) = (get(row, 0)?, get(row, 1)?);
                step("record written");
                let grant = Grant::new(name, claim, token.cast_unsigned(), ttl);
                return Ok(Attempt::Granted(match dead {
                    Some(dead) => grant.recovered_from(parse_owner(dead)),
                    None => grant,
                }));
            }
            Err(StoreError::not_applied(
                "cannot acquire the lease: other clients held it too shortly to be seen, or the grant of this claim \
                 has already ended",
            ))
        })
    }

    fn renew(&self, grant: &Grant, by: Deadline) -> Result<Renewal> {
        let (claim, token, ttl) = (
            grant.claim().to_string(),
            grant.token().cast_signed(),
            micros(grant.ttl()),
        );
        // Without a permit: a renewal waits for no other request.
        let rows = self.query_without_permit(
            &schema::RENEW,
            &[&grant.name().as_str(), &claim, &token, &ttl],
            by,
        )?;
        if !rows.is_empty() {
            return Ok(Renewal::Extended { ttl: grant.ttl() });
        }
        let rows = self.query_without_permit(&schema::GET, &[&grant.name().as_str()], by)?;
        let holder = rows.first().map(snapshot).transpose()?;
        let other = holder.filter(|holder| holder.claim() != Some(*grant.claim()));
        Ok(Renewal::Lost {
            by: other.and_then(|other| other.owner().cloned()),
        })
    }

    fn release(&self, grant: &Grant, by: Deadline) -> Result<Released> {
        self.free(
            grant.name(),
            *grant.claim(),
            grant.token(),
            EndState::Released,
            None,
            by,
        )
    }

    fn abandon(&self, grant: &Grant, by: Deadline) -> Result<Released> {
        self.free(
            grant.name(),
            *grant.claim(),
            grant.token(),
            EndState::Lost,
            format_recovered_owner(grant),
            by,
        )
    }

    fn get(&self, name: &LeaseName, by: Deadline) -> Result<Option<LeaseSnapshot>> {
        Ok(self.holder(name, by)?.map(expire_if_dead))
    }

    fn evict(&self, name: &LeaseName, seen: &LeaseSnapshot, by: Deadline) -> Result<Released> {
        match (seen.claim(), seen.token()) {
            (Some(claim), Some(token)) => {
                self.free(name, claim, token, EndState::Evicted, None, by)
            }
            _ => Ok(Released::NotMine),
        }
    }

    fn wait_for_change(
        &self,
        name: &LeaseName,
        seen: &LeaseSnapshot,
        by: Deadline,
        stop: &CancelToken,
    ) -> Result<()> {
        let state = self.state();
        let (Some(claim), Some(token)) = (seen.claim(), seen.token()) else {
            return sleep(by, stop);
        };
        if state.lacks_notifications.load(Ordering::Relaxed) {
            return sleep(by, stop);
        }
        let subscription = state.subscriptions.subscribe(name, by, stop)?;
        if stop.is_cancelled() {
            return Ok(());
        }
        // The subscription exists already, so a change after the mark is not missed.
        let values: [&(dyn ToSql + Sync); 3] =
            [&name.as_str(), &claim.to_string(), &token.cast_signed()];
        if self
            .query(
                &schema::MARK,
                &values,
                by.min(Deadline::after(WAITER_REQUEST_TIMEOUT)),
            )?
            .is_empty()
        {
            return Ok(());
        }
        step("waiter marked");
        subscription.wait(seen.owner(), by, stop)
    }
}

impl PostgresStore {
    fn state(&self) -> Arc<ProcessState> {
        let state = self.state.get_or_make(|| {
            let lacks_notifications = Arc::new(AtomicBool::new(false));
            let (config, lacks) = (self.config.clone(), lacks_notifications.clone());
            Arc::new(ProcessState {
                pool: Pool::new(),
                semaphore: Semaphore::new(),
                subscriptions: Subscriptions::new(move |by| listen(&config, by, &lacks)),
                lacks_notifications,
            })
        });
        state.clone()
    }

    /// Returns the holder of the name, even if its lease has expired.
    fn holder(&self, name: &LeaseName, by: Deadline) -> Result<Option<LeaseSnapshot>> {
        let rows = self.query(&schema::GET, &[&name.as_str()], by)?;
        rows.first().map(snapshot).transpose()
    }

    /// Runs a statement with a permit: a process limits its connections to the server.
    fn query(&self, sql: &Sql, values: &[&(dyn ToSql + Sync)], by: Deadline) -> Result<Vec<Row>> {
        let state = self.state();
        let _permit = state.semaphore.acquire(by)?;
        self.query_without_permit(sql, values, by)
    }

    fn query_without_permit(
        &self,
        sql: &Sql,
        values: &[&(dyn ToSql + Sync)],
        by: Deadline,
    ) -> Result<Vec<Row>> {
        self.query_observed(sql, values, by).map(|(rows, _)| rows)
    }

    /// Like [`query_without_permit`](Self::query_without_permit), and also returns whether an
    /// earlier attempt got no answer.
    fn query_observed(
        &self,
        sql: &Sql,
        values: &[&(dyn ToSql + Sync)],
        by: Deadline,
    ) -> Result<(Vec<Row>, bool)> {
        let connect = || self.config.connect(by, check);
        let outcome = Outcome::default();
        let answer = self.state().pool.run(&outcome, connect, |connection| {
            loop {
                let error = match connection.query(sql, values, by) {
                    Ok(rows) => return Ok(rows),
                    Err(error) => error,
                };
                match error {
                    QueryError::Driver(error) if is_of_conflict(&error) && !by.is_past() => {}
                    QueryError::Driver(error)
                        if is_of_statements(&error) && connection.is_direct =>
                    {
                        connection.forget_statements();
                        connection.is_direct = false;
                    }
                    error => return Err(of_request(error)),
                }
            }
        });
        answer.map(|rows| (rows, outcome.is_indeterminate()))
    }

    fn free(
        &self,
        name: &LeaseName,
        claim: ClaimId,
        token: u64,
        end: EndState,
        owner: Option<String>,
        by: Deadline,
    ) -> Result<Released> {
        let values: [&(dyn ToSql + Sync); 5] = [
            &name.as_str(),
            &claim.to_string(),
            &token.cast_signed(),
            &end.text(),
            &owner,
        ];
        let state = self.state();
        let _permit = state.semaphore.acquire(by)?;
        let (rows, is_indeterminate) = self.query_observed(&schema::FREE, &values, by)?;
        if !rows.is_empty()
            || !self
                .query_without_permit(&schema::IS_FREED, &values[..4], by)?
                .is_empty()
        {
            step("record freed");
            return Ok(Released::Done);
        }
        Ok(if end == EndState::Released {
            release_not_found(is_indeterminate)
        } else {
            Released::NotMine
        })
    }
}

/// Returns the snapshot of a holder from a row of [`schema::GET`].
fn snapshot(row: &Row) -> Result<LeaseSnapshot> {
    let (token, owner, claim): (i64, &str, &str) = (get(row, 0)?, get(row, 1)?, get(row, 2)?);
    let (left, until): (f64, i64) = (get(row, 3)?, get(row, 4)?);
    let snapshot = LeaseSnapshot::new(until.cast_unsigned())
        .with_token(token.cast_unsigned())
        .with_expires_in(Duration::try_from_secs_f64(left.max(0.0)).unwrap_or(Duration::MAX));
    let snapshot = match parse_claim(claim) {
        Some(claim) => snapshot.with_claim(claim),
        None => snapshot,
    };
    Ok(match parse_owner(owner) {
        Some(owner) => snapshot.with_owner(owner),
        None => snapshot,
    })
}

fn get<'r, T: tokio_postgres::types::FromSql<'r>>(row: &'r Row, at: usize) -> Result<T> {
    row.try_get(at)
        .map_err(|error| StoreError::permanent(ErrorContext::new(of_another_layout(), error)))
}

fn micros(ttl: Duration) -> f64 {
    ttl.as_secs_f64() * 1e6
}
