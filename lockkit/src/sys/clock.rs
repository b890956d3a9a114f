//! The time since the system started, that asleep included.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Linux and Android have a clock for it. On macOS the raw monotonic one counts sleep (it is `mach_continuous_time`),
/// and nobody sets it, which can be said of the plain one there only in later versions. OpenBSD's monotonic clock counts
/// sleep. FreeBSD's and NetBSD's may stand still while the machine is suspended, as servers are not.
#[cfg(any(target_os = "linux", target_os = "android"))]
const CLOCK: ClockId = ClockId::Boottime;
#[cfg(target_vendor = "apple")]
const CLOCK: ClockId = ClockId::MonotonicRaw;
#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
const CLOCK: ClockId = ClockId::Monotonic;

#[inline]
pub(crate) fn now() -> Duration {
    let now = clock_gettime(CLOCK);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}
