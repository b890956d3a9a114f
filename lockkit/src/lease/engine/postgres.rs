//! Leases on PostgreSQL: a row for each in the table `lockkit_leases`, of the database that the URL names and the first
//! schema of the user's search_path.
//!
//! Each step is one statement and one round trip (see `table`), on a connection that nobody else uses meanwhile (see
//! `link`). The row decides; LISTEN and NOTIFY only wake. Who waits leaves a mark in the row, and who releases notifies
//! only where there is one, because NOTIFY makes all commits of a server wait for each other.
//!
//! The time is the server's: `until` is set and compared by its clock alone, so the clients' clocks mean nothing. Set
//! forward, that clock gives a held lease to whoever asks, and its holder learns of it at its next beat; set back, what
//! nobody renews stays held for longer. The token is greater all the same.
//!
//! Behind a proxy that gives each transaction another session nothing is prepared, and where notifications do not get
//! through, waiters look at their retry delay.

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
use super::{Listener, OfProcess, Pool, Semaphore, Subscriptions, attempt, own_text, owner_of, passed_on, shown};
use crate::error;
use crate::failpoint::step;
use crate::lease::LeaseStore;
use crate::lease::store::{
    Attempt, ClaimId, Deadline, Durability, Grant, LeaseName, LeaseSnapshot, Released, Renewal, StoreError,
    StoreProfile, sleep,
};
use crate::wait::CancelToken;

type Result<T, E = StoreError> = std::result::Result<T, E>;

/// The shortest ttl: of a shorter one a checkpoint or a lock of the server's may take all.
const SMALLEST_TTL: Duration = Duration::from_millis(250);
/// Ttls are counted in these.
const TTL_STEP: Duration = Duration::from_micros(1);
/// How long what a waiter asks may take.
const LONGEST_MARK: Duration = Duration::from_secs(2);
/// After so long without news a listener asks whether the server is there, and for how long.
const QUIET: Duration = Duration::from_secs(10);
/// How long a notification may be under way to ourselves, through whatever stands between.
const ECHO: Duration = Duration::from_secs(2);

/// The store on the server at `url`. Connects to nothing yet.
pub(in crate::lease) fn open(url: &str) -> error::Result<Arc<dyn LeaseStore>> {
    let target = Arc::new(Target::of(url)?);
    Ok(Arc::new(Postgres { place: target.place(), target, own: OfProcess::new() }))
}

struct Postgres {
    target: Arc<Target>,
    place: u64,
    own: OfProcess<Own>,
}

/// What a process has of it.
struct Own {
    idle: Pool<Link>,
    turns: Semaphore,
    bells: Arc<Subscriptions>,
    /// Notifications do not get through.
    is_deaf: Arc<AtomicBool>,
}

/// How a holder leaves a lease, as the row says.
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
            /// Whoever came in between is there when it is asked again.
            const MOST_TURNS: u32 = 8;
            for _ in 0..MOST_TURNS {
                let rows = self.ask(&schema::ACQUIRE, &values, by)?;
                let Some(row) = rows.first() else {
                    match self.holder(name, by)? {
                        // An earlier request of the same claim may have been carried out only now.
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
        // Without a turn: it waits for nobody.
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
        // Listened to already, so what happens after the mark is heard of.
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
        self.own.get(|| {
            let is_deaf = Arc::new(AtomicBool::new(false));
            let (target, deaf) = (self.target.clone(), is_deaf.clone());
            let listen = move |by| listen(&target, by, &deaf);
            Own { idle: Pool::new(), turns: Semaphore::new(), bells: Subscriptions::new(listen), is_deaf }
        })
    }

    /// Who has the name, whether or not that has run out.
    fn holder(&self, name: &LeaseName, by: Deadline) -> Result<Option<LeaseSnapshot>> {
        let rows = self.ask(&schema::LOOK, &[&name.as_str()], by)?;
        rows.first().map(seen).transpose()
    }

    /// Asks when it is this request's turn: a process keeps its server's connections to so many.
    fn ask(&self, sql: &Sql, values: &[&(dyn ToSql + Sync)], by: Deadline) -> Result<Vec<Row>> {
        let own = self.own();
        let _turn = own.turns.take(by)?;
        self.ask_now(sql, values, by)
    }

    fn ask_now(&self, sql: &Sql, values: &[&(dyn ToSql + Sync)], by: Deadline) -> Result<Vec<Row>> {
        self.ask_in_doubt(sql, values, by).map(|(rows, _)| rows)
    }

    /// As [`ask_now`](Self::ask_now), and says whether it had been asked before without an answer.
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
        // No answer came to the first of two requests, and somebody took what it had freed.
        let is_release = matches!(state, State::Released);
        Ok(if is_release && is_in_doubt { Released::Done } else { Released::NotMine })
    }
}

/// A holder, in a row of [`schema::LOOK`].
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

/// A connection that hears of what happens from now on. Through a proxy it may not: then it says so, and sets `is_deaf`.
fn listen(target: &Target, by: Deadline, is_deaf: &AtomicBool) -> Result<Box<dyn Listener>> {
    let mut link = target.connect(by, schema::check)?;
    link.execute(schema::LISTEN, by).map_err(errors::of_request)?;
    step("listens");
    if !link.is_direct {
        // Another connection, for a proxy may bring back to this one what it says itself.
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
                // Whoever was only frozen brings it no later than this answer.
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
    /// When the server was last heard of.
    heard: Instant,
}

impl Listener for PgListener {
    fn listen(&mut self, at_most: Duration, ring: &mut dyn FnMut(&str)) -> Result<()> {
        if self.heard.elapsed() > QUIET {
            // A connection that was cut without a word looks like a quiet one.
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
