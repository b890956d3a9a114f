//! The time since the system started, that asleep included: the interrupt time, which nobody sets.

use std::time::Duration;

use windows_sys::Win32::System::WindowsProgramming::QueryInterruptTimePrecise;

#[inline]
pub(crate) fn now() -> Duration {
    let mut ticks = 0;
    // SAFETY: writes the number that it is given a place for.
    unsafe { QueryInterruptTimePrecise(&raw mut ticks) };
    super::span(ticks)
}
