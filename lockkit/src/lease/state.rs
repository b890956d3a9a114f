//! The state of a held lease: events go in, and the actions to take come out.
//!
//! This module has no thread, no clock and no store. Tests of every rule of time pass the time as an argument. All
//! times are those of the lease's clock.

use std::sync::Arc;
use std::time::Duration;

use super::store::lease_store::Renewal;
use crate::base::error::{LossReason, StoreError};

/// The safety margins of a grant: one part in [`DRIFT`] of the ttl, and [`MARGIN`]. The holder's clock may be read
/// late. It may run slow against the clock of the store or of an observer, by up to one part in a hundred.
const DRIFT: u32 = 100;
const MARGIN: Duration = Duration::from_millis(2);

/// A failed renewal is repeated after a quarter of a heartbeat, but no sooner than this.
const SOONEST_RETRY: Duration = Duration::from_millis(10);

/// The options of a lease that determine its timing.
#[derive(Clone, Copy, Debug)]
pub(super) struct LeaseTiming {
    pub(super) ttl: Duration,
    pub(super) heartbeat: Duration,
    /// How long the holder may go without progress before the renewals stop.
    pub(super) progress: Option<Duration>,
}

impl LeaseTiming {
    /// Returns until when a request sent at `sent` makes the lease valid, if the store granted `granted`.
    pub(super) fn valid_until(&self, sent: Duration, granted: Duration) -> Duration {
        let ttl = self.ttl.min(granted);
        sent + (ttl - ttl / DRIFT).saturating_sub(MARGIN)
    }
}

/// A lease from its grant to its end.
#[derive(Debug)]
pub(super) struct LeaseState {
    terms: LeaseTiming,
    /// When the lease expires. Only a renewal moves this time.
    until: Duration,
    /// Set when the lease ends, and never cleared. Only a release that came too late replaces the reason.
    ended: Option<LossReason>,
    /// The last error of the store since the last renewal.
    doubt: Option<Arc<StoreError>>,
    /// When the holder last reported progress.
    progressed: Duration,
    /// When the next heartbeat is due.
    due: Duration,
}

/// What the heartbeat does next.
#[derive(Debug)]
pub(super) enum Action {
    /// Send a renewal to the store, and report its answer.
    Renew,
    /// Nothing until this time.
    Sleep(Duration),
    /// Report the loss, which was found just now.
    Tell(LossReason),
    /// Nothing, ever.
    Nothing,
}

impl LeaseState {
    /// Creates a lease that was granted by a request sent at `sent`. Its first heartbeat is due at `due`.
    pub(super) fn new(terms: LeaseTiming, sent: Duration, granted: Duration, now: Duration, due: Duration) -> Self {
        let until = terms.valid_until(sent, granted);
        Self { terms, until, ended: None, doubt: None, progressed: now, due }
    }

    /// Returns why the lease is not held any more.
    pub(super) fn ended(&self) -> Option<&LossReason> {
        self.ended.as_ref()
    }

    /// Returns until when the last renewal is valid, also if the lease has ended since.
    pub(super) fn until(&self) -> Duration {
        self.until
    }

    /// Returns how long the lease lasts if it is not renewed.
    pub(super) fn remaining(&self, now: Duration) -> Duration {
        if self.ended.is_some() { Duration::ZERO } else { self.until.saturating_sub(now) }
    }

    /// Ends the lease if its time is over. Returns the reason if this call ended the lease.
    pub(super) fn expire(&mut self, now: Duration) -> Option<LossReason> {
        let over = self.ended.is_none() && now >= self.until;
        over.then(|| {
            let reason = self.doubt.take().map_or(LossReason::Expired, LossReason::Store);
            self.ended.insert(reason).clone()
        })
    }

    /// Records that the holder's work makes progress.
    pub(super) fn progress(&mut self, now: Duration) {
        self.progressed = now;
    }

    /// Ends the lease, because its guard releases it.
    pub(super) fn release(&mut self) {
        self.ended.get_or_insert(LossReason::Released);
    }

    /// Ends the lease as taken over: the store had granted it to another holder before the release, and no check
    /// noticed that.
    pub(super) fn release_was_too_late(&mut self) -> LossReason {
        self.ended.insert(LossReason::TakenOver { by: None }).clone()
    }

    /// Returns what the heartbeat does now.
    pub(super) fn beat(&mut self, now: Duration) -> Action {
        if let Some(reason) = self.expire(now) {
            return Action::Tell(reason);
        }
        if self.ended.is_some() {
            return Action::Nothing;
        }
        if now < self.due {
            return self.sleep();
        }
        match self.terms.progress {
            Some(within) if now.saturating_sub(self.progressed) > within => {
                self.due = now + self.terms.heartbeat;
                self.sleep()
            }
            _ => Action::Renew,
        }
    }

    /// Processes the answer of the store to a renewal that was sent at `sent`.
    pub(super) fn answered(
        &mut self,
        sent: Duration,
        now: Duration,
        answer: std::result::Result<Renewal, StoreError>,
    ) -> Action {
        if self.ended.is_some() {
            return Action::Nothing;
        }
        let heartbeat = self.terms.heartbeat;
        match answer {
            Ok(Renewal::Extended { ttl }) => {
                // The lease is also valid if its time was over before the answer came and no check noticed that. The
                // claim was in force all along, or the store would not have renewed it.
                self.until = self.terms.valid_until(sent, ttl);
                self.doubt = None;
                // Keeps the phase of the heartbeat, so that heartbeats that were spread stay spread.
                self.due = (self.due + heartbeat).max(now + heartbeat / 2);
            }
            Ok(Renewal::Lost { by }) => {
                return Action::Tell(self.ended.insert(LossReason::TakenOver { by: by.map(Box::new) }).clone());
            }
            Err(error) => {
                self.doubt = Some(Arc::new(error));
                self.due = now + (heartbeat / 4).max(SOONEST_RETRY.min(heartbeat));
            }
        }
        match self.expire(now) {
            Some(reason) => Action::Tell(reason),
            None => self.sleep(),
        }
    }

    /// Sleeps until the next heartbeat or the end of the lease. The end must be noticed even without a check by the
    /// caller.
    fn sleep(&self) -> Action {
        Action::Sleep(self.due.min(self.until))
    }
}

#[cfg(test)]
mod tests {
    use super::super::clock::{Clock, ManualClock};
    use super::*;
    use crate::base::owner::Owner;

    const MS: Duration = Duration::from_millis(1);
    const TERMS: LeaseTiming =
        LeaseTiming { ttl: Duration::from_secs(3), heartbeat: Duration::from_millis(250), progress: None };
    /// 99 hundredths of the ttl, less 2 ms.
    const GOOD_FOR: Duration = Duration::from_millis(2968);

    fn tenure(terms: LeaseTiming, clock: &ManualClock) -> LeaseState {
        let now = clock.now();
        LeaseState::new(terms, now, terms.ttl, now, now + terms.heartbeat)
    }

    fn renewed() -> std::result::Result<Renewal, StoreError> {
        Ok(Renewal::Extended { ttl: TERMS.ttl })
    }

    fn renew(tenure: &mut LeaseState, now: Duration) {
        assert!(matches!(tenure.beat(now), Action::Renew));
        assert!(matches!(tenure.answered(now, now, renewed()), Action::Sleep(_)));
    }

    #[test]
    fn it_is_held_to_the_moment_and_not_beyond() {
        let clock = ManualClock::new();
        let mut tenure = tenure(TERMS, &clock);
        assert_eq!(tenure.remaining(clock.now()), GOOD_FOR);
        clock.advance(GOOD_FOR - Duration::from_nanos(1));
        assert!(tenure.expire(clock.now()).is_none() && tenure.ended().is_none());
        clock.advance(Duration::from_nanos(1));
        assert!(matches!(tenure.expire(clock.now()), Some(LossReason::Expired)));
        assert!(tenure.expire(clock.now()).is_none(), "it is told once");
        assert!(matches!(tenure.ended(), Some(LossReason::Expired)));
        assert_eq!(tenure.remaining(clock.now()), Duration::ZERO);
    }

    #[test]
    fn it_counts_from_before_the_request_and_by_the_shorter_ttl() {
        assert_eq!(TERMS.valid_until(MS * 100, TERMS.ttl), MS * 100 + GOOD_FOR);
        assert_eq!(TERMS.valid_until(MS * 100, MS * 1000), MS * (100 + 988));
        assert_eq!(TERMS.valid_until(MS * 100, MS * 9000), MS * 100 + GOOD_FOR);
        assert_eq!(TERMS.valid_until(MS * 100, MS), MS * 100);
    }

    #[test]
    fn a_store_that_grants_less_at_a_renewal_is_believed() {
        let clock = ManualClock::new();
        let mut tenure = tenure(TERMS, &clock);
        clock.advance(TERMS.heartbeat);
        assert!(matches!(tenure.beat(clock.now()), Action::Renew));
        tenure.answered(clock.now(), clock.now(), Ok(Renewal::Extended { ttl: MS * 1000 }));
        assert_eq!(tenure.remaining(clock.now()), MS * 988);
    }

    #[test]
    fn beats_keep_it_for_as_long_as_they_come() {
        let clock = ManualClock::new();
        let mut tenure = tenure(TERMS, &clock);
        for beat in 1..=1000_u32 {
            assert!(matches!(tenure.beat(clock.now()), Action::Sleep(due) if due == TERMS.heartbeat * beat));
            clock.advance(TERMS.heartbeat);
            renew(&mut tenure, clock.now());
            assert_eq!(tenure.remaining(clock.now()), GOOD_FOR);
        }
        assert!(tenure.ended().is_none());
    }

    #[test]
    fn a_late_beat_does_not_shift_the_next_and_two_never_come_close() {
        let clock = ManualClock::new();
        let mut tenure = tenure(TERMS, &clock);
        clock.advance(MS * 300);
        renew(&mut tenure, clock.now());
        assert!(matches!(tenure.beat(clock.now()), Action::Sleep(due) if due == MS * 500));
        clock.advance(MS * 400);
        renew(&mut tenure, clock.now());
        assert!(matches!(tenure.beat(clock.now()), Action::Sleep(due) if due == MS * 825));
    }

    #[test]
    fn failures_are_repeated_to_the_end_and_then_named() {
        let clock = ManualClock::new();
        let mut tenure = tenure(TERMS, &clock);
        clock.advance(TERMS.heartbeat);
        let mut tries = 0;
        let reason = loop {
            match tenure.beat(clock.now()) {
                Action::Renew => {
                    tries += 1;
                    let answer = Err(StoreError::not_applied("no space left"));
                    assert!(matches!(tenure.answered(clock.now(), clock.now(), answer), Action::Sleep(_)));
                }
                Action::Sleep(until) => clock.advance(until - clock.now()),
                Action::Tell(reason) => break reason,
                Action::Nothing => panic!("it was not told"),
            }
        };
        assert_eq!(clock.now(), GOOD_FOR);
        assert!((40..50).contains(&tries), "every 62.5 ms of 2718, not {tries} times");
        assert!(matches!(reason, LossReason::Store(_)));
        assert!(reason.to_string().ends_with("no space left"), "{reason}");
        assert!(matches!(tenure.beat(clock.now()), Action::Nothing));
    }

    #[test]
    fn a_failure_that_heals_leaves_no_doubt() {
        let clock = ManualClock::new();
        let mut tenure = tenure(TERMS, &clock);
        clock.advance(MS * 2900);
        assert!(matches!(tenure.beat(clock.now()), Action::Renew));
        let answer = Err(StoreError::unknown("no answer"));
        assert!(matches!(tenure.answered(clock.now(), clock.now(), answer), Action::Sleep(_)));
        clock.advance(MS * 65);
        renew(&mut tenure, clock.now());
        assert_eq!(tenure.remaining(clock.now()), GOOD_FOR);
        clock.advance(GOOD_FOR);
        assert!(matches!(tenure.expire(clock.now()), Some(LossReason::Expired)));
    }

    #[test]
    fn renewal_finding_new_owner_loses_lease_at_once() {
        let clock = ManualClock::new();
        let mut tenure = tenure(TERMS, &clock);
        clock.advance(TERMS.heartbeat);
        assert!(matches!(tenure.beat(clock.now()), Action::Renew));
        let answer = Ok(Renewal::Lost { by: Some(Owner::current()) });
        assert!(matches!(
            tenure.answered(clock.now(), clock.now(), answer),
            Action::Tell(LossReason::TakenOver { by: Some(_) })
        ));
        assert_eq!(tenure.remaining(clock.now()), Duration::ZERO);
    }

    #[test]
    fn what_is_lost_stays_lost_whatever_the_store_then_says() {
        let clock = ManualClock::new();
        let mut tenure = tenure(TERMS, &clock);
        clock.advance(MS * 2900);
        let sent = clock.now();
        assert!(matches!(tenure.beat(sent), Action::Renew));
        clock.advance(MS * 100);
        assert!(tenure.expire(clock.now()).is_some(), "somebody asked before the answer came");
        assert!(matches!(tenure.answered(sent, clock.now(), renewed()), Action::Nothing));
        tenure.release();
        assert!(matches!(tenure.ended(), Some(LossReason::Expired)));
    }

    #[test]
    fn renewal_answer_after_unnoticed_expiry_counts() {
        let clock = ManualClock::new();
        let mut tenure = tenure(TERMS, &clock);
        clock.advance(MS * 2900);
        let sent = clock.now();
        assert!(matches!(tenure.beat(sent), Action::Renew));
        clock.advance(MS * 100);
        assert!(matches!(tenure.answered(sent, clock.now(), renewed()), Action::Sleep(_)));
        assert_eq!(tenure.remaining(clock.now()), GOOD_FOR - MS * 100);
    }

    #[test]
    fn an_answer_that_comes_a_ttl_late_does_not() {
        let clock = ManualClock::new();
        let mut tenure = tenure(TERMS, &clock);
        clock.advance(TERMS.heartbeat);
        let sent = clock.now();
        assert!(matches!(tenure.beat(sent), Action::Renew));
        clock.advance(TERMS.ttl);
        assert!(matches!(tenure.answered(sent, clock.now(), renewed()), Action::Tell(LossReason::Expired)));
    }

    #[test]
    fn released_lease_does_not_expire() {
        let clock = ManualClock::new();
        let mut tenure = tenure(TERMS, &clock);
        tenure.release();
        clock.advance(TERMS.ttl);
        assert!(tenure.expire(clock.now()).is_none());
        assert!(matches!(tenure.beat(clock.now()), Action::Nothing));
        assert!(matches!(tenure.ended(), Some(LossReason::Released)));
    }

    #[test]
    fn without_progress_the_beats_stop_and_it_runs_out() {
        let clock = ManualClock::new();
        let terms = LeaseTiming { progress: Some(MS * 1000), ..TERMS };
        let mut tenure = tenure(terms, &clock);
        let mut renewals = 0;
        while tenure.ended().is_none() {
            match tenure.beat(clock.now()) {
                Action::Renew => {
                    renewals += 1;
                    tenure.answered(clock.now(), clock.now(), renewed());
                }
                Action::Sleep(until) => clock.advance(until - clock.now()),
                Action::Tell(_) | Action::Nothing => {}
            }
        }
        assert_eq!(renewals, 4, "at 250, 500, 750 and 1000 ms");
        assert_eq!(clock.now(), MS * 1000 + GOOD_FOR);
        assert!(matches!(tenure.ended(), Some(LossReason::Expired)));
    }

    #[test]
    fn progress_in_time_starts_the_beats_again() {
        let clock = ManualClock::new();
        let mut tenure = tenure(LeaseTiming { progress: Some(MS * 1000), ..TERMS }, &clock);
        clock.advance(MS * 2000);
        assert!(matches!(tenure.beat(clock.now()), Action::Sleep(due) if due == MS * 2250));
        tenure.progress(clock.now());
        clock.advance(MS * 250);
        renew(&mut tenure, clock.now());
        assert_eq!(tenure.remaining(clock.now()), GOOD_FOR);
    }
}
