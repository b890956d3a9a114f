//! Leases on PostgreSQL: one row per lease in the table `lockkit_leases`. The table is in the database that the URL
//! names, in the first schema of the user's search_path.
//!
//! Each step is one statement and one round trip (see `schema`), on a connection that no other request uses meanwhile
//! (see `connection`). The row decides; LISTEN and NOTIFY only wake. A waiter leaves a mark in the row. A release
//! notifies only if there is a mark, because NOTIFY makes all commits of a server wait for each other.
//!
//! The time is the server's: only its clock sets and compares `until`, so the clients' clocks have no effect. If the
//! server's clock is set forward, a held lease goes to the next request, and its holder learns of that at its next
//! heartbeat. If the clock is set back, a lease without renewals stays held for longer. The token grows in both cases.
//!
//! Behind a proxy that gives each transaction another session no statement is prepared. Where notifications do not get
//! through, waiters poll at their retry delay.

mod config;
mod connection;
mod errors;
mod schema;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use self::config::Target;
use self::connection::{Cut, Link, Sql};
use crate::base::cancel::CancelToken;
use crate::base::error;
use crate::base::error::StoreError;
use crate::lease::LeaseStore;
use crate::lease::store::lease_store::{
    Attempt, ClaimId, Deadline, Durability, Grant, LeaseName, LeaseSnapshot, Released, Renewal, StoreProfile, sleep,
};
use crate::lease::store::server::{
    Listener, Pool, Semaphore, Subscriptions, attempt, own_text, owner_of, passed_on, shown,
};
use crate::sys::failpoint::step;
use crate::sys::process_local::ProcessLocal;

type Result<T, E = StoreError> = std::result::Result<T, E>;

/// The minimum TTL: a checkpoint or a lock of the server may use up a shorter one.
const SMALLEST_TTL: Duration = Duration::from_millis(250);
/// The unit of TTLs.
const TTL_STEP: Duration = Duration::from_micros(1);
/// The timeout of a waiter's request.
const LONGEST_MARK: Duration = Duration::from_secs(2);
/// The time without news after which a listener asks whether the server is alive. The listener waits half as long for
/// the answer.
const QUIET: Duration = Duration::from_secs(10);
/// How long a notification from this process to itself may take, through any proxy in between.
const ECHO: Duration = Duration::from_secs(2);

/// Returns the store on the server at `url`, without connecting.
pub(in crate::lease) fn open(url: &str) -> error::Result<Arc<dyn LeaseStore>> {
    let target = Arc::new(Target::of(url)?);
    Ok(Arc::new(Postgres { place: target.place(), target, own: ProcessLocal::new() }))
}

struct Postgres {
    target: Arc<Target>,
    place: u64,
    own: ProcessLocal<Arc<Own>>,
}

/// The state of the store in one process.
struct Own {
    idle: Pool<Link>,
    turns: Semaphore,
    bells: Arc<Subscriptions>,
    /// Notifications do not get through.
    is_deaf: Arc<AtomicBool>,
}

/// The state in which a holder leaves a lease, as in the row.
#[derive(Clone, Copy)]
enum State {
    Released,
    Lost,
    Evicted,
}

impl State {
    fn text(self) -> &'static str {
        match self {
            Self::Released => "released",
            Self::Lost => "lost",
            Self::Evicted => "evicted",
        }
    }
}

impl LeaseStore for Postgres {
    fn profile(&self) -> StoreProfile {
        StoreProfile {
            smallest_ttl: SMALLEST_TTL,
            ttl_step: TTL_STEP,
            wakes_waiters: !self.own().is_deaf.load(Ordering::Relaxed),
            failure_domain: Some(self.place),
            ..StoreProfile::new(Durability::Primary)
        }
    }

    fn try_acquire(&self, name: &LeaseName, claim: &ClaimId, ttl: Duration, by: Deadline) -> Result<Attempt> {
        let (claim_text, micros, owner) = (claim.to_string(), micros(ttl), own_text());
        attempt(|dead| {
            let dead_claim = dead.and_then(LeaseSnapshot::claim).map(|claim| claim.to_string()).unwrap_or_default();
            let dead_token = dead.and_then(LeaseSnapshot::token).map_or(0, u64::cast_signed);
            let values: [&(dyn ToSql + Sync); 6] =
                [&name.as_str(), &claim_text, &micros, &owner, &dead_claim, &dead_token];
            /// The maximum number of attempts; the next attempt sees a holder that came in between.
            const MOST_TURNS: u32 = 8;
            for _ in 0..MOST_TURNS {
                let rows = self.ask(&schema::ACQUIRE, &values, by)?;
                let Some(row) = rows.first() else {
                    match self.holder(name, by)? {
                        // An earlier request of the same claim may have taken effect only now.
                        Some(seen) if seen.claim() != Some(*claim) => return Ok(Attempt::Busy(seen)),
                        _ => continue,
                    }
                };
                let (token, died): (i64, Option<&str>) = (get(row, 0)?, get(row, 1)?);
                step("record written");
                let grant = Grant::new(name, claim, token.cast_unsigned(), ttl);
                return Ok(Attempt::Granted(match died {
                    Some(died) => grant.recovered_from(owner_of(died)),
                    None => grant,
                }));
            }
            Err(StoreError::not_applied("others took it too fast to see, or the claim has ended already"))
        })
    }

    fn renew(&self, grant: &Grant, by: Deadline) -> Result<Renewal> {
        let (claim, token, ttl) = (grant.claim().to_string(), grant.token().cast_signed(), micros(grant.ttl()));
        // Without a permit: a renewal waits for no other request.
        let rows = self.ask_now(&schema::RENEW, &[&grant.name().as_str(), &claim, &token, &ttl], by)?;
        if !rows.is_empty() {
            return Ok(Renewal::Extended { ttl: grant.ttl() });
        }
        let rows = self.ask_now(&schema::LOOK, &[&grant.name().as_str()], by)?;
        let holder = rows.first().map(seen).transpose()?;
        let other = holder.filter(|holder| holder.claim() != Some(*grant.claim()));
        Ok(Renewal::Lost { by: other.and_then(|other| other.owner().cloned()) })
    }

    fn release(&self, grant: &Grant, by: Deadline) -> Result<Released> {
        self.leave(grant.name(), *grant.claim(), grant.token(), State::Released, None, by)
    }

    fn abandon(&self, grant: &Grant, by: Deadline) -> Result<Released> {
        self.leave(grant.name(), *grant.claim(), grant.token(), State::Lost, passed_on(grant), by)
    }

    fn get(&self, name: &LeaseName, by: Deadline) -> Result<Option<LeaseSnapshot>> {
        Ok(self.holder(name, by)?.map(shown))
    }

    fn evict(&self, name: &LeaseName, seen: &LeaseSnapshot, by: Deadline) -> Result<Released> {
        match (seen.claim(), seen.token()) {
            (Some(claim), Some(token)) => self.leave(name, claim, token, State::Evicted, None, by),
            _ => Ok(Released::NotMine),
        }
    }

    fn wait_for_change(&self, name: &LeaseName, seen: &LeaseSnapshot, by: Deadline, stop: &CancelToken) -> Result<()> {
        let own = self.own();
        let (Some(claim), Some(token)) = (seen.claim(), seen.token()) else { return sleep(by, stop) };
        if own.is_deaf.load(Ordering::Relaxed) {
            return sleep(by, stop);
        }
        let bell = own.bells.subscribe(name, by, stop)?;
        if stop.is_cancelled() {
            return Ok(());
        }
        // The subscription exists already, so a change after the mark is not missed.
        let values: [&(dyn ToSql + Sync); 3] = [&name.as_str(), &claim.to_string(), &token.cast_signed()];
        if self.ask(&schema::MARK, &values, by.min(Deadline::after(LONGEST_MARK)))?.is_empty() {
            return Ok(());
        }
        step("waiter marked");
        bell.wait(seen.owner(), by, stop)
    }
}

impl Postgres {
    fn own(&self) -> Arc<Own> {
        let own = self.own.get_or_make(|| {
            let is_deaf = Arc::new(AtomicBool::new(false));
            let (target, deaf) = (self.target.clone(), is_deaf.clone());
            let listen = move |by| listen(&target, by, &deaf);
            Arc::new(Own { idle: Pool::new(), turns: Semaphore::new(), bells: Subscriptions::new(listen), is_deaf })
        });
        own.clone()
    }

    /// Returns the holder of the name, even if its lease has expired.
    fn holder(&self, name: &LeaseName, by: Deadline) -> Result<Option<LeaseSnapshot>> {
        let rows = self.ask(&schema::LOOK, &[&name.as_str()], by)?;
        rows.first().map(seen).transpose()
    }

    /// Runs a statement with a permit: a process limits its connections to the server.
    fn ask(&self, sql: &Sql, values: &[&(dyn ToSql + Sync)], by: Deadline) -> Result<Vec<Row>> {
        let own = self.own();
        let _turn = own.turns.take(by)?;
        self.ask_now(sql, values, by)
    }

    fn ask_now(&self, sql: &Sql, values: &[&(dyn ToSql + Sync)], by: Deadline) -> Result<Vec<Row>> {
        self.ask_in_doubt(sql, values, by).map(|(rows, _)| rows)
    }

    /// Like [`ask_now`](Self::ask_now), and also returns whether an earlier attempt got no answer.
    fn ask_in_doubt(&self, sql: &Sql, values: &[&(dyn ToSql + Sync)], by: Deadline) -> Result<(Vec<Row>, bool)> {
        let connect = || self.target.connect(by, schema::check);
        let mut is_in_doubt = false;
        let asked = self.own().idle.ask(connect, |link| {
            loop {
                let cut = match link.ask(sql, values, by) {
                    Ok(rows) => return Ok(rows),
                    Err(cut) => cut,
                };
                match cut {
                    Cut::By(error) if errors::is_of_meeting(&error) && !by.is_past() => {}
                    Cut::By(error) if errors::is_of_statements(&error) && link.is_direct => {
                        link.forget();
                        link.is_direct = false;
                    }
                    cut => {
                        let error = errors::of_request(cut);
                        is_in_doubt |= matches!(error, StoreError::Unknown(_));
                        return Err(error);
                    }
                }
            }
        });
        asked.map(|rows| (rows, is_in_doubt))
    }

    fn leave(
        &self,
        name: &LeaseName,
        claim: ClaimId,
        token: u64,
        state: State,
        passed_on: Option<String>,
        by: Deadline,
    ) -> Result<Released> {
        let values: [&(dyn ToSql + Sync); 5] =
            [&name.as_str(), &claim.to_string(), &token.cast_signed(), &state.text(), &passed_on];
        let own = self.own();
        let _turn = own.turns.take(by)?;
        let (rows, is_in_doubt) = self.ask_in_doubt(&schema::LEAVE, &values, by)?;
        if !rows.is_empty() || !self.ask_now(&schema::LEFT, &values[..4], by)?.is_empty() {
            step("record freed");
            return Ok(Released::Done);
        }
        // The first of two requests got no answer but freed the name, and another claim acquired the name.
        let is_release = matches!(state, State::Released);
        Ok(if is_release && is_in_doubt { Released::Done } else { Released::NotMine })
    }
}

/// Returns the snapshot of a holder from a row of [`schema::LOOK`].
fn seen(row: &Row) -> Result<LeaseSnapshot> {
    let (token, owner, claim): (i64, &str, &str) = (get(row, 0)?, get(row, 1)?, get(row, 2)?);
    let (left, until): (f64, i64) = (get(row, 3)?, get(row, 4)?);
    let seen = LeaseSnapshot::new(until.cast_unsigned())
        .with_token(token.cast_unsigned())
        .with_expires_in(Duration::try_from_secs_f64(left.max(0.0)).unwrap_or(Duration::MAX));
    let seen = match u128::from_str_radix(claim, 16) {
        Ok(number) => seen.with_claim(ClaimId::from_number(number)),
        Err(_) => seen,
    };
    Ok(match owner_of(owner) {
        Some(owner) => seen.with_owner(owner),
        None => seen,
    })
}

fn get<'r, T: tokio_postgres::types::FromSql<'r>>(row: &'r Row, at: usize) -> Result<T> {
    row.try_get(at).map_err(|error| StoreError::permanent(errors::Said::new(schema::of_another_layout(), error)))
}

fn micros(ttl: Duration) -> f64 {
    ttl.as_secs_f64() * 1e6
}

/// Opens a connection that receives all later notifications. Through a proxy they may not arrive: then this returns an
/// error and sets `is_deaf`.
fn listen(target: &Target, by: Deadline, is_deaf: &AtomicBool) -> Result<Box<dyn Listener>> {
    let mut link = target.connect(by, schema::check)?;
    link.execute(schema::LISTEN, by).map_err(errors::of_request)?;
    step("listens");
    if !link.is_direct {
        // Another connection sends, because a proxy may return to the listening connection what that connection itself
        // sends.
        let mut other = target.connect(by, schema::check)?;
        let word = format!("\u{1}{}", ClaimId::random());
        other.ask(&schema::NOTIFY, &[&word], by).map_err(errors::of_request)?;
        let echo = Deadline::after(ECHO);
        loop {
            let news = link.listen(echo).map_err(errors::of_request)?;
            if news.contains(&word) {
                break;
            }
            if echo.is_past() {
                // A server or proxy that was only frozen delivers the notification no later than this answer.
                link.execute("", Deadline::after(ECHO)).map_err(errors::of_request)?;
                if link.listen(Deadline::after(Duration::ZERO)).map_err(errors::of_request)?.contains(&word) {
                    break;
                }
                is_deaf.store(true, Ordering::Relaxed);
                return Err(StoreError::not_applied("notifications do not get through the proxy before the server"));
            }
        }
    }
    Ok(Box::new(PgListener { link, heard: Instant::now() }))
}

/// The connection that listens.
struct PgListener {
    link: Link,
    /// When the server last sent anything.
    heard: Instant,
}

impl Listener for PgListener {
    fn listen(&mut self, at_most: Duration, ring: &mut dyn FnMut(&str)) -> Result<()> {
        if self.heard.elapsed() > QUIET {
            // A connection that was cut without a notice looks like a quiet connection.
            self.link.execute("", Deadline::after(QUIET / 2)).map_err(errors::of_request)?;
            self.heard = Instant::now();
        }
        for name in self.link.listen(Deadline::after(at_most)).map_err(errors::of_request)? {
            self.heard = Instant::now();
            ring(&name);
        }
        Ok(())
    }
}
