//! An event that wakes its waiters, and the one wait function of this crate.
//!
//! Waits with a handle end at a tick of the system's clock. The ticks come 16 ms apart unless some
//! program has asked for more. Sleeps without a handle are exact to less than a millisecond.

use std::io;
use std::os::windows::io::{AsHandle, AsRawHandle, BorrowedHandle, FromRawHandle, OwnedHandle};
use std::ptr;
use std::time::Instant;

use windows_sys::Win32::Foundation::{
    HANDLE, WAIT_ABANDONED_0, WAIT_FAILED, WAIT_OBJECT_0, WAIT_TIMEOUT,
};
use windows_sys::Win32::System::Threading::{
    CreateEventW, INFINITE, SetEvent, WaitForMultipleObjects,
};

/// An event: once set, it stays set.
pub(crate) struct Event(OwnedHandle);

impl Event {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: the call makes a new event, which has no name, is reset by no thread and is not
        // inherited.
        let handle = unsafe { CreateEventW(ptr::null(), 1, 0, ptr::null()) };
        match handle.is_null() {
            true => Err(io::Error::last_os_error()),
            // SAFETY: the call has just made the handle, and it has no other owner.
            false => Ok(Self(unsafe { OwnedHandle::from_raw_handle(handle) })),
        }
    }

    /// Wakes all waiters, now and later.
    pub(crate) fn set(&self) {
        // SAFETY: the handle belongs to an open event.
        unsafe { SetEvent(self.0.as_raw_handle()) };
    }
}

impl Event {
    /// A program that closes lockkit's handle is at fault.
    pub(crate) fn is_own(&self) -> bool {
        true
    }
}

impl AsHandle for Event {
    fn as_handle(&self) -> BorrowedHandle<'_> {
        self.0.as_handle()
    }
}

/// What ended a [`wait`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Woke {
    /// The handle is signalled.
    Ready,
    /// The event was set.
    Cancelled,
    /// The deadline passed.
    TimedOut,
}

/// Sleeps until `handle` is signalled, `cancel` is set or `until` passes, whichever is first. If
/// two happen together, the handle wins: its result would be lost otherwise.
pub(crate) fn wait(
    handle: Option<BorrowedHandle<'_>>,
    cancel: Option<BorrowedHandle<'_>>,
    until: Option<Instant>,
) -> io::Result<Woke> {
    match (handle, cancel) {
        (None, None) => loop {
            match until.map(|until| until.saturating_duration_since(Instant::now())) {
                Some(left) if left.is_zero() => return Ok(Woke::TimedOut),
                Some(left) => std::thread::sleep(left),
                None => std::thread::park(),
            }
        },
        (Some(only), None) => Ok(any(&[only], until)?.map_or(Woke::TimedOut, |_| Woke::Ready)),
        (None, Some(only)) => Ok(any(&[only], until)?.map_or(Woke::TimedOut, |_| Woke::Cancelled)),
        (Some(handle), Some(cancel)) => Ok(match any(&[handle, cancel], until)? {
            Some(Signalled { at: 0, .. }) => Woke::Ready,
            Some(_) => Woke::Cancelled,
            None => Woke::TimedOut,
        }),
    }
}

/// The handle that ended a wait for several handles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Signalled {
    /// The index of the first signalled handle.
    pub(crate) at: usize,
    /// The handle is a mutex whose owner ended without releasing it.
    pub(crate) abandoned: bool,
}

/// Sleeps until one of `handles` is signalled. Returns `None` if `until` passed first.
pub(crate) fn any(
    handles: &[BorrowedHandle<'_>],
    until: Option<Instant>,
) -> io::Result<Option<Signalled>> {
    let raw: Vec<HANDLE> = handles.iter().map(AsRawHandle::as_raw_handle).collect();
    let count = raw.len() as u32;
    loop {
        // Rounded up to the next millisecond, and never so many that they mean for ever.
        let left = until.map(|until| {
            until
                .saturating_duration_since(Instant::now())
                .as_micros()
                .div_ceil(1000)
        });
        let limit = left.map_or(INFINITE, |left| left.min(u128::from(INFINITE - 1)) as u32);
        // SAFETY: the array has the given number of handles, which are all open as long as they are
        // borrowed.
        match unsafe { WaitForMultipleObjects(count, raw.as_ptr(), 0, limit) } {
            WAIT_FAILED => return Err(io::Error::last_os_error()),
            WAIT_TIMEOUT if until.is_some_and(|until| Instant::now() >= until) => return Ok(None),
            WAIT_TIMEOUT => {}
            at if at < WAIT_OBJECT_0 + count => {
                return Ok(Some(Signalled {
                    at: (at - WAIT_OBJECT_0) as usize,
                    abandoned: false,
                }));
            }
            at => {
                return Ok(Some(Signalled {
                    at: (at - WAIT_ABANDONED_0) as usize,
                    abandoned: true,
                }));
            }
        }
    }
}

/// Whether `handle` is signalled now.
#[allow(dead_code)] // Asked by tests of what only some features bring.
pub(crate) fn is_readable(handle: BorrowedHandle<'_>) -> bool {
    any(&[handle], Some(Instant::now())).is_ok_and(|signalled| signalled.is_some())
}
