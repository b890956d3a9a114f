//! The time since the system started, including the time asleep.
//!
//! Linux and Android have a clock for it, and macOS (`darwin`). OpenBSD's monotonic clock counts
//! sleep. FreeBSD's and NetBSD's clocks may stop while the machine is suspended; servers are not
//! suspended.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

#[cfg(any(target_os = "linux", target_os = "android"))]
const CLOCK: ClockId = ClockId::Boottime;
#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
const CLOCK: ClockId = ClockId::Monotonic;

#[cfg(not(target_vendor = "apple"))]
#[inline]
pub(crate) fn now() -> Duration {
    let now = clock_gettime(CLOCK);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

#[cfg(target_vendor = "apple")]
pub(crate) fn now() -> Duration {
    super::darwin::time_since_start()
}

/// Returns the nanoseconds of the monotonic clock, for short spans. A number costs less to keep and
/// compare than an `Instant`.
#[inline]
pub(crate) fn nanos() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    (now.tv_sec as u64)
        .wrapping_mul(1_000_000_000)
        .wrapping_add(now.tv_nsec as u64)
}
