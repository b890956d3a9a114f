//! The rule by which a record without renewals expires.
//!
//! An observer never uses the time at which the record was written. It only measures, on its own
//! clock, how long it has seen the record unchanged. The owner counts from before it sent the
//! renewal. When an observer has seen that renewal for a whole ttl, the owner's time is over,
//! whatever either clock shows.

use std::time::Duration;

/// What one observer has seen of one record.
#[derive(Debug, Default)]
pub(in crate::lease) struct Observer {
    /// The last fingerprint of the record, and since when the observer has seen it.
    seen: Option<(u64, Duration)>,
    /// Whether this observer has left a note for others.
    has_noted: bool,
}

impl Observer {
    /// Returns how long the record, whose fingerprint is `fingerprint` now, has been seen
    /// unchanged. `first_seen` is the time at which an earlier observer by the same clock saw this
    /// fingerprint.
    pub(super) fn unchanged_for(
        &mut self,
        fingerprint: u64,
        now: Duration,
        first_seen: Option<Duration>,
    ) -> Duration {
        let since = match self.seen {
            Some((seen, since)) if seen == fingerprint => since,
            _ => now,
        };
        // A note from the future is damaged, or forged.
        let since = first_seen
            .filter(|first_seen| *first_seen <= now)
            .map_or(since, |first_seen| first_seen.min(since));
        self.seen = Some((fingerprint, since));
        now.saturating_sub(since)
    }

    /// Returns whether this observer must leave a note for later observers. Returns true once: from
    /// then on the observer uses its own observation, so waiters do not wake each other with notes.
    pub(super) fn must_leave_note(&mut self) -> bool {
        !std::mem::replace(&mut self.has_noted, true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::clock::{Clock, ManualClock};

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn record_age_counts_from_first_sight() {
        let (clock, mut observer) = (ManualClock::new(), Observer::default());
        clock.advance(S * 1000);
        assert_eq!(
            observer.unchanged_for(1, clock.now(), None),
            Duration::ZERO,
            "the age before the first sight does not count"
        );
        clock.advance(S * 2);
        assert_eq!(observer.unchanged_for(1, clock.now(), None), S * 2);
        clock.advance(S);
        assert_eq!(
            observer.unchanged_for(2, clock.now(), None),
            Duration::ZERO,
            "the record was renewed in between"
        );
        clock.advance(S);
        assert_eq!(
            observer.unchanged_for(1, clock.now(), None),
            Duration::ZERO,
            "a record that returns was changed in between, too"
        );
    }

    #[test]
    fn note_of_same_clock_counts_as_own_observation() {
        let (clock, mut observer) = (ManualClock::new(), Observer::default());
        clock.advance(S * 10);
        assert_eq!(observer.unchanged_for(1, clock.now(), Some(S * 4)), S * 6);
        clock.advance(S);
        assert_eq!(
            observer.unchanged_for(1, clock.now(), None),
            S * 7,
            "the earlier sight is remembered"
        );
        assert_eq!(
            observer.unchanged_for(1, clock.now(), Some(S * 9)),
            S * 7,
            "the own observation was earlier"
        );
        assert_eq!(
            observer.unchanged_for(3, clock.now(), Some(S * 99)),
            Duration::ZERO,
            "a note from the future does not count"
        );
    }
}
