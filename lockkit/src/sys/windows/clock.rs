//! The time since the system started, including the time asleep. Setting the clock does not move
//! it. It is the interrupt time, read to less than a microsecond.
//!
//! Systems older than the call (before Windows 10) and Wine use the performance counter instead.
//! The coarse readings of the interrupt time are not precise enough: a tick of 16 ms is longer than
//! the margin by which a lease's holder gives up early.

use std::mem;
use std::sync::OnceLock;
use std::time::Duration;

use windows_sys::Win32::System::LibraryLoader::{GetModuleHandleA, GetProcAddress};
use windows_sys::Win32::System::Performance::{QueryPerformanceCounter, QueryPerformanceFrequency};

type Query = unsafe extern "system" fn(*mut u64);

pub(crate) fn now() -> Duration {
    static QUERY: OnceLock<Option<Query>> = OnceLock::new();
    match QUERY.get_or_init(find) {
        Some(query) => {
            let mut ticks = 0;
            // SAFETY: the call writes the number to the given address.
            unsafe { query(&raw mut ticks) };
            super::span(ticks)
        }
        None => counted(),
    }
}

/// Returns the nanoseconds of a steady clock, for short spans.
pub(crate) fn nanos() -> u64 {
    counted().as_nanos() as u64
}

fn find() -> Option<Query> {
    // SAFETY: both names end with a zero, and the module is loaded in every process for ever.
    let found = unsafe {
        let module = GetModuleHandleA(c"kernelbase.dll".as_ptr().cast());
        GetProcAddress(module, c"QueryInterruptTimePrecise".as_ptr().cast())
    };
    // SAFETY: this is how the function of that name is declared.
    found.map(|found| unsafe {
        mem::transmute::<unsafe extern "system" fn() -> isize, Query>(found)
    })
}

fn counted() -> Duration {
    let (mut count, mut frequency) = (0, 0);
    // SAFETY: each call writes the number to the given address. They do not fail.
    unsafe {
        QueryPerformanceCounter(&raw mut count);
        QueryPerformanceFrequency(&raw mut frequency);
    }
    let (count, frequency) = (count.unsigned_abs(), frequency.unsigned_abs().max(1));
    let rest = u128::from(count % frequency) * 1_000_000_000 / u128::from(frequency);
    Duration::new(count / frequency, rest as u32)
}
