//! The options of a lease as the caller gave them, and the rules that they must meet.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use super::clock::{Clock, SystemClock};
use super::location::Location;
use super::options::{HeldError, MAX_TTL, MIN_TTL, OnLost};
use crate::base::error::{ErrorKind, Result};

pub(super) const DEFAULT_TTL: Duration = Duration::from_secs(3);
pub(super) const DEFAULT_HEARTBEAT_INTERVAL: Duration = Duration::from_millis(250);
const DEFAULT_DAMAGE_TIMEOUT: Duration = Duration::from_secs(2);
const DEFAULT_RETRY_LIMIT: u32 = 4;
const DEFAULT_RETRY_DELAY: Duration = Duration::from_millis(25);

/// A store that keeps a shorter ttl than this can process a request every
/// [`DEFAULT_HEARTBEAT_INTERVAL`].
const MAX_TTL_OF_FAST_STORE: Duration = Duration::from_secs(1);

/// The minimum interval of a repeated action. A shorter interval would use a whole processor.
const MIN_REPEAT_INTERVAL: Duration = Duration::from_millis(1);

pub(super) struct Settings {
    pub(super) ttl: Option<Duration>,
    pub(super) heartbeat: Option<Duration>,
    pub(super) progress: Option<Duration>,
    pub(super) on_lost: Option<OnLost>,
    pub(super) held_error: Option<HeldError>,
    pub(super) retry_limit: u32,
    pub(super) retry_delay: Duration,
    pub(super) clock: Arc<dyn Clock>,
    /// How long a blank or damaged file counts as held.
    pub(super) damage_timeout: Option<Duration>,
    pub(super) file_mode: Option<u32>,
    pub(super) directory_mode: Option<u32>,
    pub(super) create_parents: bool,
}

/// The times of a lease that meet the rules.
pub(super) struct CheckedTiming {
    pub(super) ttl: Duration,
    pub(super) heartbeat: Duration,
    pub(super) damage_timeout: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            ttl: None,
            heartbeat: None,
            progress: None,
            on_lost: None,
            held_error: None,
            retry_limit: DEFAULT_RETRY_LIMIT,
            retry_delay: DEFAULT_RETRY_DELAY,
            clock: system_clock(),
            damage_timeout: None,
            file_mode: None,
            directory_mode: None,
            create_parents: false,
        }
    }
}

impl Settings {
    /// Returns the times for a lease at this location.
    ///
    /// # Errors
    /// [`InvalidOption`](ErrorKind::InvalidOption) with the rule that an option breaks.
    pub(super) fn checked_timing(&self, location: &Location) -> Result<CheckedTiming> {
        let (min_ttl, step) = match location {
            Location::File(_) => (MIN_TTL, Duration::from_nanos(1)),
            Location::Store(store, _) => {
                let profile = store.profile();
                (profile.smallest_ttl.max(MIN_TTL), profile.ttl_step)
            }
        };
        let ttl = self.ttl.unwrap_or(DEFAULT_TTL.max(min_ttl));
        reject_if(ttl < min_ttl, "ttl", || {
            format!("{ttl:?} is shorter than the minimum, {min_ttl:?}")
        })?;
        reject_if(ttl > MAX_TTL, "ttl", || {
            format!("{ttl:?} is longer than the maximum, a year")
        })?;
        let ttl = round_up(ttl, step);
        let default = if min_ttl < MAX_TTL_OF_FAST_STORE {
            DEFAULT_HEARTBEAT_INTERVAL
        } else {
            ttl
        };
        let heartbeat = self.heartbeat.unwrap_or(default.min(ttl / 4));
        self.check_heartbeat(heartbeat, ttl)?;
        reject_if(
            self.retry_delay < MIN_REPEAT_INTERVAL,
            "acquire_retry_delay",
            || {
                format!(
                    "{:?} is shorter than the minimum, 1ms, and would use a whole processor",
                    self.retry_delay
                )
            },
        )?;
        let damage_timeout = self
            .damage_timeout
            .unwrap_or(DEFAULT_DAMAGE_TIMEOUT.max(heartbeat * 2));
        reject_if(
            damage_timeout < heartbeat,
            "invalid_pid_lock_stale_threshold",
            || {
                format!(
                    "{damage_timeout:?} is shorter than a heartbeat, {heartbeat:?}, at which the holder repairs the file"
                )
            },
        )?;
        Ok(CheckedTiming {
            ttl,
            heartbeat,
            damage_timeout,
        })
    }

    fn check_heartbeat(&self, heartbeat: Duration, ttl: Duration) -> Result<()> {
        reject_if(heartbeat < MIN_REPEAT_INTERVAL, "heartbeat", || {
            format!(
                "{heartbeat:?} is shorter than the minimum, 1ms, and would use a whole processor"
            )
        })?;
        reject_if(heartbeat > ttl / 3, "heartbeat", || {
            format!(
                "{heartbeat:?} is more than a third of the ttl, {ttl:?}, so one late renewal could lose the lease"
            )
        })?;
        if let Some(within) = self.progress {
            reject_if(within < heartbeat, "require_progress", || {
                format!(
                    "{within:?} is shorter than a heartbeat, {heartbeat:?}, so the loss would be noticed too late"
                )
            })?;
        }
        Ok(())
    }

    /// Checks the modes of new files and directories.
    ///
    /// # Errors
    /// As [`checked_timing`](Self::checked_timing).
    pub(super) fn check_modes(&self) -> Result<()> {
        for (option, mode, required, rights) in [
            (
                "file_write_mode",
                self.file_mode,
                0o600,
                "read and write the file",
            ),
            (
                "directory_write_mode",
                self.directory_mode,
                0o700,
                "read, write and enter the directory",
            ),
        ] {
            let Some(mode) = mode else { continue };
            reject_if(mode & !0o7777 != 0, option, || {
                format!("{mode:#o} is not a file mode")
            })?;
            reject_if(mode & required != required, option, || {
                format!("{mode:#o} does not let its owner {rights}")
            })?;
        }
        Ok(())
    }

    /// Returns the given options that only a lease in a file has.
    pub(super) fn file_options(&self) -> impl Iterator<Item = &'static str> {
        let options = [
            (
                "invalid_pid_lock_stale_threshold",
                self.damage_timeout.is_some(),
            ),
            ("file_write_mode", self.file_mode.is_some()),
            ("directory_write_mode", self.directory_mode.is_some()),
            ("create_parents", self.create_parents),
        ];
        options
            .into_iter()
            .filter(|(_, is_given)| *is_given)
            .map(|(option, _)| option)
    }
}

/// Returns an error for `option` if it is wrong.
pub(super) fn reject_if(
    is_wrong: bool,
    option: &'static str,
    problem: impl FnOnce() -> String,
) -> Result<()> {
    if is_wrong {
        Err(ErrorKind::InvalidOption {
            option,
            problem: problem(),
        }
        .into())
    } else {
        Ok(())
    }
}

/// Rounds `ttl` up to a whole multiple of `step`.
fn round_up(ttl: Duration, step: Duration) -> Duration {
    let step = step.as_nanos().max(1);
    u64::try_from(ttl.as_nanos().div_ceil(step) * step).map_or(ttl, Duration::from_nanos)
}

/// Returns one clock for all leases, so that all leases count by the same clock.
fn system_clock() -> Arc<dyn Clock> {
    static CLOCK: LazyLock<Arc<dyn Clock>> = LazyLock::new(|| Arc::new(SystemClock));
    CLOCK.clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_up_returns_whole_steps() {
        const MS: Duration = Duration::from_millis(1);
        assert_eq!(round_up(MS * 1001, MS * 1000), MS * 2000);
        assert_eq!(round_up(MS * 2000, MS * 1000), MS * 2000);
        assert_eq!(round_up(MS, Duration::ZERO), MS);
    }
}
