//! An event that wakes its waiters, and the one wait function of this crate.

use std::io;
#[cfg(not(target_os = "linux"))]
use std::os::fd::OwnedFd;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;

use super::fork::ForkGuarded;

/// An event: once set, it stays set.
pub(crate) struct Event {
    /// Readable once the event is set.
    fd: ForkGuarded,
    /// Writing to it sets the event, on systems without `eventfd`.
    #[cfg(not(target_os = "linux"))]
    writer: ForkGuarded,
}

impl Event {
    #[cfg(target_os = "linux")]
    pub(crate) fn new() -> io::Result<Self> {
        use rustix::event::{EventfdFlags, eventfd};
        let fd = ForkGuarded::new(|| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK))?;
        Ok(Self {
            fd: fd.know().keep_across_fork(),
        })
    }

    #[cfg(not(target_os = "linux"))]
    pub(crate) fn new() -> io::Result<Self> {
        let (fd, writer) = rustix::pipe::pipe()?;
        for end in [&fd, &writer] {
            rustix::io::fcntl_setfd(end, rustix::io::FdFlags::CLOEXEC)?;
        }
        rustix::io::ioctl_fionbio(&writer, true)?;
        let note = |end: OwnedFd| {
            let Ok(noted) = ForkGuarded::new(|| Ok::<_, std::convert::Infallible>(end));
            noted.know().keep_across_fork()
        };
        Ok(Self {
            fd: note(fd),
            writer: note(writer),
        })
    }

    /// Whether the descriptor still refers to the event: a program that closed it may have its own
    /// file under the number.
    pub(crate) fn is_own(&self) -> bool {
        self.fd.is_own()
    }

    /// Wakes all waiters, now and later.
    pub(crate) fn set(&self) {
        #[cfg(target_os = "linux")]
        let writer = &self.fd;
        #[cfg(not(target_os = "linux"))]
        let writer = &self.writer;
        // A program that closed the descriptor may have its own file under this number.
        if writer.is_own() {
            // A write can only fail because the event is already set many times.
            let _ = rustix::io::write(&**writer, &1_u64.to_ne_bytes());
        }
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What ended a [`wait`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Woke {
    /// The descriptor has something to read, or has hung up.
    Ready,
    /// The event was set.
    Cancelled,
    /// The deadline passed.
    TimedOut,
}

/// Sleeps until `fd` is readable, `cancel` is set or `until` passes, whichever is first. If two
/// happen together, the descriptor wins: its data would be lost otherwise.
///
/// Uses poll(2); signals do not end the wait.
pub(crate) fn wait(
    fd: Option<BorrowedFd<'_>>,
    cancel: Option<BorrowedFd<'_>>,
    until: Option<Instant>,
) -> io::Result<Woke> {
    wait_as(fd.map(watch), cancel, until)
}

/// Waits as [`wait`] does, until `fd` is writable or its other end is closed.
#[cfg(target_os = "linux")]
pub(crate) fn wait_for_room(
    fd: BorrowedFd<'_>,
    cancel: Option<BorrowedFd<'_>>,
    until: Option<Instant>,
) -> io::Result<Woke> {
    wait_as(
        Some(PollFd::from_borrowed_fd(fd, PollFlags::OUT)),
        cancel,
        until,
    )
}

/// Waits as [`wait`] does, until the other end of `fd` has ended its stream or has hung up. Data
/// alone does not wake: the kernel wakes a sleeper in poll(2) only for the requested events.
#[cfg(target_os = "linux")]
pub(crate) fn wait_for_end(
    fd: Option<BorrowedFd<'_>>,
    cancel: Option<BorrowedFd<'_>>,
    until: Option<Instant>,
) -> io::Result<Woke> {
    let end = |fd| PollFd::from_borrowed_fd(fd, PollFlags::RDHUP);
    wait_as(fd.map(end), cancel, until)
}

fn wait_as(
    fd: Option<PollFd<'_>>,
    cancel: Option<BorrowedFd<'_>>,
    until: Option<Instant>,
) -> io::Result<Woke> {
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        let mut polled: [PollFd<'_>; 2];
        let mut only: [PollFd<'_>; 1];
        let polled: &mut [PollFd<'_>] = match (fd.clone(), cancel.map(watch)) {
            (Some(fd), Some(cancel)) => {
                polled = [fd, cancel];
                &mut polled
            }
            (Some(one), None) | (None, Some(one)) => {
                only = [one];
                &mut only
            }
            (None, None) => &mut [],
        };
        match poll(polled, timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
            Ok(0) if until.is_some_and(|until| Instant::now() >= until) => {
                return Ok(Woke::TimedOut);
            }
            Ok(0) => continue,
            Ok(_) if fd.is_some() && !polled[0].revents().is_empty() => return Ok(Woke::Ready),
            Ok(_) => return Ok(Woke::Cancelled),
        }
    }
}

/// Sleeps until `fd` is readable or has hung up, or is writable if `to_write` is set. Returns false
/// if `until` passed first. Otherwise waits as [`wait`] does.
#[cfg(feature = "postgres")]
pub(crate) fn wait_for_traffic(
    fd: BorrowedFd<'_>,
    to_write: bool,
    until: Instant,
) -> io::Result<bool> {
    let flags = if to_write {
        PollFlags::IN | PollFlags::OUT
    } else {
        PollFlags::IN
    };
    loop {
        let left = Timespec::try_from(until.saturating_duration_since(Instant::now())).ok();
        match poll(&mut [PollFd::from_borrowed_fd(fd, flags)], left.as_ref()) {
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(0) if Instant::now() >= until => return Ok(false),
            Ok(0) => {}
            Ok(_) => return Ok(true),
        }
    }
}

/// Whether `fd` is readable now.
#[cfg_attr(not(target_os = "linux"), allow(dead_code))]
pub(crate) fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let mut polled = [watch(fd)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    matches!(retry_on_intr(|| poll(&mut polled, Some(&now))), Ok(1))
}

fn watch(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::from_borrowed_fd(fd, PollFlags::IN)
}
