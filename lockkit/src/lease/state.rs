//! The state of a held lease: events go in, and the actions to take come out.
//!
//! This module has no thread, no clock and no store. Tests of every rule of time pass the time as
//! an argument. All times are those of the lease's clock.

use std::sync::Arc;
use std::time::Duration;

use super::store::lease_store::Renewal;
use crate::base::error::{LossReason, StoreError};

/// The safety margins of a grant: one part in [`DRIFT_DIVISOR`] of the ttl, and [`SAFETY_MARGIN`].
/// The holder's clock may be read late. It may run slow against the clock of the store or of an
/// observer, by up to one part in a hundred.
const DRIFT_DIVISOR: u32 = 100;
const SAFETY_MARGIN: Duration = Duration::from_millis(2);

/// A failed renewal is repeated after a quarter of a heartbeat, but no sooner than this.
const MIN_RETRY_INTERVAL: Duration = Duration::from_millis(10);

/// The options of a lease that determine its timing.
#[derive(Clone, Copy, Debug)]
pub(super) struct LeaseTiming {
    pub(super) ttl: Duration,
    pub(super) heartbeat: Duration,
    /// How long the holder may go without progress before the renewals stop.
    pub(super) progress: Option<Duration>,
}

impl LeaseTiming {
    /// Returns until when a request sent at `sent` makes the lease valid, if the store granted
    /// `granted`.
    pub(super) fn valid_until(&self, sent: Duration, granted: Duration) -> Duration {
        let ttl = self.ttl.min(granted);
        sent + (ttl - ttl / DRIFT_DIVISOR).saturating_sub(SAFETY_MARGIN)
    }
}

/// A lease from its grant to its end.
#[derive(Debug)]
pub(super) struct LeaseState {
    timing: LeaseTiming,
    /// When the lease expires. Only a renewal moves this time.
    valid_until: Duration,
    /// Set when the lease ends, and never cleared. Only a release that came too late replaces the
    /// reason.
    ended: Option<LossReason>,
    /// The last error of the store since the last renewal.
    last_error: Option<Arc<StoreError>>,
    /// When the holder last reported progress.
    last_progress: Duration,
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
    ReportLoss(LossReason),
    /// Nothing, ever.
    Nothing,
}

impl LeaseState {
    /// Creates a lease that was granted by a request sent at `sent`. Its first heartbeat is due at
    /// `due`.
    pub(super) fn new(
        timing: LeaseTiming,
        sent: Duration,
        granted: Duration,
        now: Duration,
        due: Duration,
    ) -> Self {
        let valid_until = timing.valid_until(sent, granted);
        Self {
            timing,
            valid_until,
            ended: None,
            last_error: None,
            last_progress: now,
            due,
        }
    }

    /// Returns why the lease is not held any more.
    pub(super) fn ended(&self) -> Option<&LossReason> {
        self.ended.as_ref()
    }

    /// Returns until when the last renewal is valid, also if the lease has ended since.
    pub(super) fn valid_until(&self) -> Duration {
        self.valid_until
    }

    /// Returns how long the lease lasts if it is not renewed.
    pub(super) fn remaining(&self, now: Duration) -> Duration {
        if self.ended.is_some() {
            Duration::ZERO
        } else {
            self.valid_until.saturating_sub(now)
        }
    }

    /// Ends the lease if its time is over. Returns the reason if this call ended the lease.
    pub(super) fn expire(&mut self, now: Duration) -> Option<LossReason> {
        let over = self.ended.is_none() && now >= self.valid_until;
        over.then(|| {
            let reason = self
                .last_error
                .take()
                .map_or(LossReason::Expired, LossReason::Store);
            self.ended.insert(reason).clone()
        })
    }

    /// Records that the holder's work makes progress.
    pub(super) fn progress(&mut self, now: Duration) {
        self.last_progress = now;
    }

    /// Ends the lease, because its guard releases it.
    pub(super) fn release(&mut self) {
        self.ended.get_or_insert(LossReason::Released);
    }

    /// Ends the lease as taken over: the store had granted it to another holder before the release,
    /// and no check noticed that.
    pub(super) fn release_was_too_late(&mut self) -> LossReason {
        self.ended
            .insert(LossReason::TakenOver { by: None })
            .clone()
    }

    /// Returns what the heartbeat does now.
    pub(super) fn next_action(&mut self, now: Duration) -> Action {
        if let Some(reason) = self.expire(now) {
            return Action::ReportLoss(reason);
        }
        if self.ended.is_some() {
            return Action::Nothing;
        }
        if now < self.due {
            return self.sleep();
        }
        match self.timing.progress {
            Some(within) if now.saturating_sub(self.last_progress) > within => {
                self.due = now + self.timing.heartbeat;
                self.sleep()
            }
            _ => Action::Renew,
        }
    }

    /// Processes the answer of the store to a renewal that was sent at `sent`.
    pub(super) fn record_answer(
        &mut self,
        sent: Duration,
        now: Duration,
        answer: std::result::Result<Renewal, StoreError>,
    ) -> Action {
        if self.ended.is_some() {
            return Action::Nothing;
        }
        let heartbeat = self.timing.heartbeat;
        match answer {
            Ok(Renewal::Extended { ttl }) => {
                // The lease is also valid if its time was over before the answer came and no check
                // noticed that. The claim was in force all along, or the store would not have
                // renewed it.
                self.valid_until = self.timing.valid_until(sent, ttl);
                self.last_error = None;
                // Keeps the phase of the heartbeat, so that heartbeats that were spread stay
                // spread.
                self.due = (self.due + heartbeat).max(now + heartbeat / 2);
            }
            Ok(Renewal::Lost { by }) => {
                return Action::ReportLoss(
                    self.ended
                        .insert(LossReason::TakenOver {
                            by: by.map(Box::new),
                        })
                        .clone(),
                );
            }
            Err(error) => {
                self.last_error = Some(Arc::new(error));
                self.due = now + (heartbeat / 4).max(MIN_RETRY_INTERVAL.min(heartbeat));
            }
        }
        match self.expire(now) {
            Some(reason) => Action::ReportLoss(reason),
            None => self.sleep(),
        }
    }

    /// Sleeps until the next heartbeat or the end of the lease. The end must be noticed even
    /// without a check by the caller.
    fn sleep(&self) -> Action {
        Action::Sleep(self.due.min(self.valid_until))
    }
}

#[cfg(test)]
mod tests {
    use super::super::clock::{Clock, ManualClock};
    use super::*;
    use crate::base::owner::Owner;

    const MS: Duration = Duration::from_millis(1);
    const TIMING: LeaseTiming = LeaseTiming {
        ttl: Duration::from_secs(3),
        heartbeat: Duration::from_millis(250),
        progress: None,
    };
    /// 99 hundredths of the ttl, less 2 ms.
    const VALID_FOR: Duration = Duration::from_millis(2968);

    fn state(timing: LeaseTiming, clock: &ManualClock) -> LeaseState {
        let now = clock.now();
        LeaseState::new(timing, now, timing.ttl, now, now + timing.heartbeat)
    }

    fn renewed() -> std::result::Result<Renewal, StoreError> {
        Ok(Renewal::Extended { ttl: TIMING.ttl })
    }

    fn renew(state: &mut LeaseState, now: Duration) {
        assert!(matches!(state.next_action(now), Action::Renew));
        assert!(matches!(
            state.record_answer(now, now, renewed()),
            Action::Sleep(_)
        ));
    }

    #[test]
    fn lease_expires_at_its_deadline_and_reports_once() {
        let clock = ManualClock::new();
        let mut state = state(TIMING, &clock);
        assert_eq!(state.remaining(clock.now()), VALID_FOR);
        clock.advance(VALID_FOR - Duration::from_nanos(1));
        assert!(state.expire(clock.now()).is_none() && state.ended().is_none());
        clock.advance(Duration::from_nanos(1));
        assert!(matches!(
            state.expire(clock.now()),
            Some(LossReason::Expired)
        ));
        assert!(
            state.expire(clock.now()).is_none(),
            "a loss is reported once"
        );
        assert!(matches!(state.ended(), Some(LossReason::Expired)));
        assert_eq!(state.remaining(clock.now()), Duration::ZERO);
    }

    #[test]
    fn deadline_counts_from_request_by_shorter_ttl() {
        assert_eq!(
            TIMING.valid_until(MS * 100, TIMING.ttl),
            MS * 100 + VALID_FOR
        );
        assert_eq!(TIMING.valid_until(MS * 100, MS * 1000), MS * (100 + 988));
        assert_eq!(
            TIMING.valid_until(MS * 100, MS * 9000),
            MS * 100 + VALID_FOR
        );
        assert_eq!(TIMING.valid_until(MS * 100, MS), MS * 100);
    }

    #[test]
    fn renewal_with_shorter_ttl_shortens_lease() {
        let clock = ManualClock::new();
        let mut state = state(TIMING, &clock);
        clock.advance(TIMING.heartbeat);
        assert!(matches!(state.next_action(clock.now()), Action::Renew));
        state.record_answer(
            clock.now(),
            clock.now(),
            Ok(Renewal::Extended { ttl: MS * 1000 }),
        );
        assert_eq!(state.remaining(clock.now()), MS * 988);
    }

    #[test]
    fn renewals_on_schedule_keep_lease() {
        let clock = ManualClock::new();
        let mut state = state(TIMING, &clock);
        for count in 1..=1000_u32 {
            assert!(
                matches!(state.next_action(clock.now()), Action::Sleep(due) if due == TIMING.heartbeat * count)
            );
            clock.advance(TIMING.heartbeat);
            renew(&mut state, clock.now());
            assert_eq!(state.remaining(clock.now()), VALID_FOR);
        }
        assert!(state.ended().is_none());
    }

    #[test]
    fn late_renewal_keeps_phase_and_minimum_gap() {
        let clock = ManualClock::new();
        let mut state = state(TIMING, &clock);
        clock.advance(MS * 300);
        renew(&mut state, clock.now());
        assert!(matches!(state.next_action(clock.now()), Action::Sleep(due) if due == MS * 500));
        clock.advance(MS * 400);
        renew(&mut state, clock.now());
        assert!(matches!(state.next_action(clock.now()), Action::Sleep(due) if due == MS * 825));
    }

    #[test]
    fn failed_renewals_retry_until_expiry_with_reason() {
        let clock = ManualClock::new();
        let mut state = state(TIMING, &clock);
        clock.advance(TIMING.heartbeat);
        let mut tries = 0;
        let reason = loop {
            match state.next_action(clock.now()) {
                Action::Renew => {
                    tries += 1;
                    let answer = Err(StoreError::not_applied("no space left"));
                    assert!(matches!(
                        state.record_answer(clock.now(), clock.now(), answer),
                        Action::Sleep(_)
                    ));
                }
                Action::Sleep(until) => clock.advance(until - clock.now()),
                Action::ReportLoss(reason) => break reason,
                Action::Nothing => panic!("the loss was not reported"),
            }
        };
        assert_eq!(clock.now(), VALID_FOR);
        assert!(
            (40..50).contains(&tries),
            "every 62.5 ms of 2718, not {tries} times"
        );
        assert!(matches!(reason, LossReason::Store(_)));
        assert!(reason.to_string().ends_with("no space left"), "{reason}");
        assert!(matches!(state.next_action(clock.now()), Action::Nothing));
    }

    #[test]
    fn renewal_after_failure_clears_last_error() {
        let clock = ManualClock::new();
        let mut state = state(TIMING, &clock);
        clock.advance(MS * 2900);
        assert!(matches!(state.next_action(clock.now()), Action::Renew));
        let answer = Err(StoreError::unknown("no answer"));
        assert!(matches!(
            state.record_answer(clock.now(), clock.now(), answer),
            Action::Sleep(_)
        ));
        clock.advance(MS * 65);
        renew(&mut state, clock.now());
        assert_eq!(state.remaining(clock.now()), VALID_FOR);
        clock.advance(VALID_FOR);
        assert!(matches!(
            state.expire(clock.now()),
            Some(LossReason::Expired)
        ));
    }

    #[test]
    fn renewal_finding_new_owner_loses_lease_at_once() {
        let clock = ManualClock::new();
        let mut state = state(TIMING, &clock);
        clock.advance(TIMING.heartbeat);
        assert!(matches!(state.next_action(clock.now()), Action::Renew));
        let answer = Ok(Renewal::Lost {
            by: Some(Owner::current()),
        });
        assert!(matches!(
            state.record_answer(clock.now(), clock.now(), answer),
            Action::ReportLoss(LossReason::TakenOver { by: Some(_) })
        ));
        assert_eq!(state.remaining(clock.now()), Duration::ZERO);
    }

    #[test]
    fn late_answer_after_expiry_keeps_lease_lost() {
        let clock = ManualClock::new();
        let mut state = state(TIMING, &clock);
        clock.advance(MS * 2900);
        let sent = clock.now();
        assert!(matches!(state.next_action(sent), Action::Renew));
        clock.advance(MS * 100);
        assert!(
            state.expire(clock.now()).is_some(),
            "a check came before the answer"
        );
        assert!(matches!(
            state.record_answer(sent, clock.now(), renewed()),
            Action::Nothing
        ));
        state.release();
        assert!(matches!(state.ended(), Some(LossReason::Expired)));
    }

    #[test]
    fn renewal_answer_after_unnoticed_expiry_counts() {
        let clock = ManualClock::new();
        let mut state = state(TIMING, &clock);
        clock.advance(MS * 2900);
        let sent = clock.now();
        assert!(matches!(state.next_action(sent), Action::Renew));
        clock.advance(MS * 100);
        assert!(matches!(
            state.record_answer(sent, clock.now(), renewed()),
            Action::Sleep(_)
        ));
        assert_eq!(state.remaining(clock.now()), VALID_FOR - MS * 100);
    }

    #[test]
    fn renewal_answer_after_whole_ttl_expires_lease() {
        let clock = ManualClock::new();
        let mut state = state(TIMING, &clock);
        clock.advance(TIMING.heartbeat);
        let sent = clock.now();
        assert!(matches!(state.next_action(sent), Action::Renew));
        clock.advance(TIMING.ttl);
        assert!(matches!(
            state.record_answer(sent, clock.now(), renewed()),
            Action::ReportLoss(LossReason::Expired)
        ));
    }

    #[test]
    fn released_lease_does_not_expire() {
        let clock = ManualClock::new();
        let mut state = state(TIMING, &clock);
        state.release();
        clock.advance(TIMING.ttl);
        assert!(state.expire(clock.now()).is_none());
        assert!(matches!(state.next_action(clock.now()), Action::Nothing));
        assert!(matches!(state.ended(), Some(LossReason::Released)));
    }

    #[test]
    fn missing_progress_stops_renewals_until_expiry() {
        let clock = ManualClock::new();
        let timing = LeaseTiming {
            progress: Some(MS * 1000),
            ..TIMING
        };
        let mut state = state(timing, &clock);
        let mut renewals = 0;
        while state.ended().is_none() {
            match state.next_action(clock.now()) {
                Action::Renew => {
                    renewals += 1;
                    state.record_answer(clock.now(), clock.now(), renewed());
                }
                Action::Sleep(until) => clock.advance(until - clock.now()),
                Action::ReportLoss(_) | Action::Nothing => {}
            }
        }
        assert_eq!(renewals, 4, "at 250, 500, 750 and 1000 ms");
        assert_eq!(clock.now(), MS * 1000 + VALID_FOR);
        assert!(matches!(state.ended(), Some(LossReason::Expired)));
    }

    #[test]
    fn progress_before_expiry_resumes_renewals() {
        let clock = ManualClock::new();
        let mut state = state(
            LeaseTiming {
                progress: Some(MS * 1000),
                ..TIMING
            },
            &clock,
        );
        clock.advance(MS * 2000);
        assert!(matches!(state.next_action(clock.now()), Action::Sleep(due) if due == MS * 2250));
        state.progress(clock.now());
        clock.advance(MS * 250);
        renew(&mut state, clock.now());
        assert_eq!(state.remaining(clock.now()), VALID_FOR);
    }
}
