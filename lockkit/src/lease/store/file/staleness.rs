//! The rule by which a record without renewals expires.
//!
//! An observer never uses the time at which the record was written. It only measures, on its own clock, how long it has
//! seen the record unchanged. The owner counts from before it sent the renewal. When an observer has seen that renewal
//! for a whole ttl, the owner's time is over, whatever either clock shows.

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
    /// Returns how long the record, whose fingerprint is `print` now, has been seen unchanged. `noted` is the time at
    /// which an earlier observer by the same clock saw this fingerprint.
    pub(super) fn unchanged_for(&mut self, print: u64, now: Duration, noted: Option<Duration>) -> Duration {
        let since = match self.seen {
            Some((seen, since)) if seen == print => since,
            _ => now,
        };
        // A note from the future is damaged, or forged.
        let since = noted.filter(|noted| *noted <= now).map_or(since, |noted| noted.min(since));
        self.seen = Some((print, since));
        now.saturating_sub(since)
    }

    /// Returns whether this observer must leave a note for later observers. Returns true once: from then on the
    /// observer uses its own observation, so waiters do not wake each other with notes.
    pub(super) fn is_to_note(&mut self) -> bool {
        !std::mem::replace(&mut self.has_noted, true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::clock::{Clock, ManualClock};

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn a_record_is_as_old_as_it_has_been_seen_unchanged() {
        let (clock, mut observer) = (ManualClock::new(), Observer::default());
        clock.advance(S * 1000);
        assert_eq!(observer.unchanged_for(1, clock.now(), None), Duration::ZERO, "however old it may be");
        clock.advance(S * 2);
        assert_eq!(observer.unchanged_for(1, clock.now(), None), S * 2);
        clock.advance(S);
        assert_eq!(observer.unchanged_for(2, clock.now(), None), Duration::ZERO, "it beat in between");
        clock.advance(S);
        assert_eq!(observer.unchanged_for(1, clock.now(), None), Duration::ZERO, "and so it did if it went back");
    }

    #[test]
    fn a_note_by_the_same_clock_counts_as_ones_own_sight() {
        let (clock, mut observer) = (ManualClock::new(), Observer::default());
        clock.advance(S * 10);
        assert_eq!(observer.unchanged_for(1, clock.now(), Some(S * 4)), S * 6);
        clock.advance(S);
        assert_eq!(observer.unchanged_for(1, clock.now(), None), S * 7, "and is remembered");
        assert_eq!(observer.unchanged_for(1, clock.now(), Some(S * 9)), S * 7, "one's own was earlier");
        assert_eq!(observer.unchanged_for(3, clock.now(), Some(S * 99)), Duration::ZERO, "from the future");
    }
}
