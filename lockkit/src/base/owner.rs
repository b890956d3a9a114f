//! The holder of a lock, and whether its process still lives.
//!
//! A pid alone is never enough: it is reused, means another process in another container, and means
//! nothing on another host. An [`Owner`] is a pid with the process's start time, boot, pid
//! namespace and host. If these cannot be compared, the result is [`Liveness::Unknown`], and
//! unknown counts as alive.

use std::cell::RefCell;
use std::fmt;
use std::time::{Duration, SystemTime};

use crate::sys::fork::ProcessId;
use crate::sys::process::{self, Probe};

/// A process that holds a lock, or held it.
///
/// Besides the pid it contains the start time of the process, the boot ([random(4)], `boot_id`),
/// the pid namespace ([pid_namespaces(7)]) and the host. On Linux the start time is in ticks of the
/// kernel since boot, field 22 of [proc_pid_stat(5)], which does not change when the clock is set.
/// Two owners are equal if all of these are equal, and also their programs and the times at which
/// they acquired the lock.
///
/// ```
/// use lockkit::{Liveness, Owner};
/// let me = Owner::current();
/// assert_eq!(me.pid(), std::process::id());
/// assert_eq!(me.liveness(), Liveness::Alive);
/// ```
///
/// [proc_pid_stat(5)]: https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
/// [random(4)]: https://man7.org/linux/man-pages/man4/random.4.html
/// [pid_namespaces(7)]: https://man7.org/linux/man-pages/man7/pid_namespaces.7.html
///
/// For people, and for a supervisor that is about to execute another program in its process:
///
/// ```
/// use lockkit::Owner;
/// let me = Owner::current().with_program("backup");
/// assert_eq!(me.program(), Some("backup"));
/// println!("{} on {}", me.describe(), me.host().unwrap_or("a host without a name"));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    pub(crate) pid: u32,
    pub(crate) start: Option<u64>,
    pub(crate) boot: Option<u128>,
    pub(crate) namespace: Option<u64>,
    pub(crate) host: Option<String>,
    pub(crate) program: Option<String>,
    pub(crate) acquired: Option<SystemTime>,
}

/// Whether an [`Owner`] still lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Liveness {
    /// The same process runs.
    Alive,
    /// It has ended: its pid is free, reused by a later process, or left to a zombie, or its host
    /// has booted since.
    Dead,
    /// It cannot be determined, because it belongs to another host or pid namespace. It always
    /// counts as alive.
    Unknown,
}

impl Owner {
    /// Returns this process as the owner of no lock yet. Cheap after the first call of a thread.
    ///
    /// ```
    /// let me = lockkit::Owner::current();
    /// assert_eq!((me.pid(), me.acquired()), (std::process::id(), None));
    /// ```
    pub fn current() -> Self {
        thread_local! {
            /// Reading it costs tens of microseconds, so each thread caches it until a fork
            /// invalidates it.
            static CURRENT: RefCell<Option<(ProcessId, Owner)>> = const { RefCell::new(None) };
        }
        let cached = CURRENT.try_with(|current| match &mut *current.borrow_mut() {
            Some((process, owner)) if process.is_current() => owner.clone(),
            current => {
                let owner = Self::read_current();
                // A part that could not be read, for example without a free descriptor, is read
                // again next time.
                *current = owner
                    .is_complete()
                    .then(|| (ProcessId::current(), owner.clone()));
                owner
            }
        });
        // A thread that is ending no longer has thread-local storage.
        cached.unwrap_or_else(|_| Self::read_current())
    }

    fn read_current() -> Self {
        let pid = std::process::id();
        match process::probe(pid) {
            Probe::Running(start) => Self::read(pid, start),
            Probe::Gone | Probe::Ended => Self::read(pid, None),
        }
    }

    /// Returns the process that has `pid` in this process's pid namespace now. Returns `None` if
    /// there is none, or only a zombie.
    ///
    /// Store the owner rather than the pid: then [`liveness`](Self::liveness) distinguishes this
    /// process from a later one.
    ///
    /// ```
    /// use lockkit::{Liveness, Owner};
    /// # fn main() -> std::io::Result<()> {
    /// let mut child = std::process::Command::new("sleep").arg("60").spawn()?;
    /// let owner = Owner::of(child.id()).expect("it runs");
    /// assert_eq!(owner.liveness(), Liveness::Alive);
    /// child.kill()?;
    /// child.wait()?;
    /// assert_eq!(owner.liveness(), Liveness::Dead);
    /// assert_eq!(Owner::of(0), None);
    /// # Ok(()) }
    /// ```
    pub fn of(pid: u32) -> Option<Self> {
        match process::probe(pid) {
            Probe::Running(start) => Some(Self::read(pid, start)),
            Probe::Gone | Probe::Ended => None,
        }
    }

    /// Returns a process of this host that another pid namespace hides.
    pub(crate) fn hidden() -> Self {
        Self {
            pid: 0,
            start: None,
            boot: process::boot_id(),
            namespace: None,
            host: process::host().map(str::to_owned),
            program: None,
            acquired: None,
        }
    }

    /// Returns the process that has `pid` in an unknown place, and about which nothing else is
    /// known.
    pub(crate) fn unknown(pid: u32) -> Self {
        Self {
            pid,
            start: None,
            boot: None,
            namespace: None,
            host: None,
            program: None,
            acquired: None,
        }
    }

    /// Returns a process of this host by its pid alone, which is 0 if another pid namespace hides
    /// the process. Reading the other fields would take too long.
    #[cfg(target_os = "linux")]
    pub(crate) fn by_pid(pid: u32) -> Self {
        Self {
            pid,
            namespace: (pid != 0).then(process::pid_namespace).flatten(),
            ..Self::hidden()
        }
    }

    /// Returns the process of this pid namespace that had `pid`, and has ended, whatever process
    /// has the pid now.
    pub(crate) fn ended(pid: u32) -> Self {
        /// No process starts at the same tick as the kernel.
        const START_OF_KERNEL: u64 = 0;
        Self {
            pid,
            start: Some(START_OF_KERNEL),
            namespace: process::pid_namespace(),
            ..Self::hidden()
        }
    }

    /// Returns the process that has `pid`, and that was seen to have the start time `start`. The
    /// informative fields may already belong to a later process.
    pub(crate) fn read(pid: u32, start: Option<u64>) -> Self {
        Self {
            pid,
            start,
            boot: process::boot_id(),
            namespace: process::pid_namespace(),
            host: process::host().map(str::to_owned),
            program: process::program(pid),
            acquired: None,
        }
    }

    /// Sets the name of another program, for a process that is about to execute that program
    /// (exec).
    pub fn with_program(mut self, program: impl Into<String>) -> Self {
        self.program = Some(program.into());
        self
    }

    /// Returns its pid, as a number of its own pid namespace; 0 if that namespace hides it from
    /// this process.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Returns the name of the program that it runs, for people, as far as it is known.
    pub fn program(&self) -> Option<&str> {
        self.program.as_deref()
    }

    /// Returns the host that it runs on: the host's name and, where there is one, the id of its
    /// installation.
    pub fn host(&self) -> Option<&str> {
        self.host.as_deref()
    }

    /// Returns when it acquired the lock, by the wall clock, for people. No decision depends on it.
    pub fn acquired(&self) -> Option<SystemTime> {
        self.acquired
    }

    /// Returns whether it still lives. Asks the system at each call.
    ///
    /// A process of another user that must not be signalled (`EPERM`) lives, and so does a stopped
    /// process. A zombie is dead. A process that was recorded in another pid namespace or on
    /// another host is unknown, because its pid means nothing here, unless this host has booted
    /// since. A killed process counts as dead as soon as it can run no more code, even if the
    /// kernel has not cleaned it up yet.
    ///
    /// The id of the installation (`/etc/machine-id`) shows whether the host is this one. Without
    /// that id, an owner from before the last boot is unknown, because another host may have the
    /// same name. So is an owner in a container (with its own pid namespace or jail). Its name and
    /// id may be those of its image, and a copy of the image may run elsewhere.
    pub fn liveness(&self) -> Liveness {
        let is_of_the_host = self.namespace.is_some_and(process::is_of_the_host);
        self.liveness_if(|host| {
            is_of_the_host && Some(host) == process::host() && process::has_installation_id(host)
        })
    }

    /// Returns the liveness as [`liveness`](Self::liveness), but a record with the name of this
    /// host counts as this host's. It is for places that hosts usually do not share, and where
    /// another check decides which process may proceed.
    pub(crate) fn liveness_by_name(&self) -> Liveness {
        self.liveness_if(|host| Some(host) == process::host())
    }

    fn liveness_if(&self, is_here: impl FnOnce(&str) -> bool) -> Liveness {
        match (self.boot, process::boot_id()) {
            (Some(then), Some(now)) if then != now => {
                // The same host has booted since, or it is another host, about which nothing is
                // known.
                return match self.host.as_deref().is_some_and(is_here) {
                    true => Liveness::Dead,
                    false => Liveness::Unknown,
                };
            }
            (Some(_), Some(_)) => {}
            _ => return Liveness::Unknown,
        }
        if self.namespace.is_none() || self.namespace != process::pid_namespace() {
            return Liveness::Unknown;
        }
        match (process::probe(self.pid), self.start) {
            (Probe::Gone | Probe::Ended, _) => Liveness::Dead,
            (Probe::Running(Some(now)), Some(then)) if now != then => Liveness::Dead,
            (Probe::Running(_), _) => Liveness::Alive,
        }
    }

    /// Returns whether it has everything that distinguishes the process from all others.
    pub(crate) fn is_complete(&self) -> bool {
        self.start.is_some()
            && self.boot.is_some()
            && self.namespace.is_some()
            && self.host.is_some()
    }

    /// Returns whether it belongs to this run of this kernel, and to another pid namespace than
    /// this process.
    pub(crate) fn is_of_another_namespace(&self) -> bool {
        let mine = process::pid_namespace();
        self.is_of_this_boot()
            && self.namespace.is_some()
            && mine.is_some()
            && self.namespace != mine
    }

    /// Returns whether the process is alive and stopped, by a signal such as SIGSTOP or by a
    /// debugger. Then it keeps its lock, and does nothing until it is continued. The result is
    /// false where that is unknown: on systems other than Linux, and for a process of another host
    /// or pid namespace. The result is a snapshot.
    ///
    /// ```
    /// assert!(!lockkit::Owner::current().is_stopped());
    /// ```
    pub fn is_stopped(&self) -> bool {
        self.liveness_by_name() == Liveness::Alive && process::is_stopped(self.pid)
    }

    /// Returns whether it belongs to this run of this kernel, so that both share file locks.
    pub(crate) fn is_of_this_boot(&self) -> bool {
        self.boot.is_some() && self.boot == process::boot_id()
    }

    /// Returns whether both are the same process, whatever program it runs and since when it holds
    /// a lock.
    ///
    /// A pid that was given out again is another process: the start time, the boot, the pid
    /// namespace and the host are compared, too. The call compares only the two values, and asks
    /// the system nothing.
    ///
    /// ```
    /// use lockkit::Owner;
    /// let renamed = Owner::current().with_program("backup");
    /// assert!(renamed.is_same_process(&Owner::current()));
    /// ```
    pub fn is_same_process(&self, other: &Self) -> bool {
        (self.pid, self.start, self.boot, self.namespace, &self.host)
            == (
                other.pid,
                other.start,
                other.boot,
                other.namespace,
                &other.host,
            )
    }

    /// Returns whether it is the calling process, or a program that ran in it before an exec.
    pub(crate) fn is_this_process(&self) -> bool {
        let me = Self::current();
        me.start.is_some()
            && (self.pid, self.start, self.boot, self.namespace)
                == (me.pid, me.start, me.boot, me.namespace)
    }

    /// Describes it for people: `pid 4242 (backup), since 2026-11-20 17:03:11 UTC (42 s ago)`, as
    /// far as it is known.
    ///
    /// ```
    /// let text = lockkit::Owner::current().describe();
    /// assert!(text.starts_with(&format!("pid {} (", std::process::id())));
    /// println!("held by {}", lockkit::Owner::current()); // The same.
    /// ```
    pub fn describe(&self) -> String {
        let mut text = match self.pid {
            0 => "a process of another pid namespace".to_owned(),
            pid => format!("pid {pid}"),
        };
        if let Some(program) = &self.program {
            text += &format!(" ({})", program.escape_debug());
        }
        if self.host.is_some()
            && process::host().is_some_and(|host| self.host.as_deref() != Some(host))
        {
            text += &format!(
                " on host {}",
                self.host.as_deref().unwrap_or_default().escape_debug()
            );
        } else if self
            .namespace
            .is_some_and(|namespace| process::pid_namespace() != Some(namespace))
        {
            // A reader must not take it for a pid of this namespace.
            text += " in another pid namespace";
        }
        if let Some(acquired) = self.acquired {
            text += &format!(", since {}", format_utc(acquired));
            if let Ok(ago) = acquired.elapsed() {
                text += &format!(" ({} ago)", format_duration(ago));
            }
        }
        text
    }
}

/// Formats as [`describe`](Owner::describe).
impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.describe())
    }
}

/// Formats a time for people, to the second: `2026-11-20 17:03:11 UTC`.
pub(crate) fn format_utc(moment: SystemTime) -> String {
    /// The last second of the year 9999: a damaged record may claim any number.
    const MAX_SECONDS: u64 = 253_402_300_799;
    let seconds = moment
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
        .min(MAX_SECONDS);
    let (mut days, clock) = (seconds / 86_400, seconds % 86_400);
    let leap = |year: u64| year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    let (hour, minute, second) = (clock / 3600, clock / 60 % 60, clock % 60);
    format!(
        "{year}-{month:02}-{:02} {hour:02}:{minute:02}:{second:02} UTC",
        days + 1
    )
}

/// Formats a span of time for people, in its two largest units: `2 min 5 s`.
pub(crate) fn format_duration(span: Duration) -> String {
    let seconds = span.as_secs();
    match seconds {
        0 => format!("{} ms", span.as_millis()),
        1..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn format_utc_prints_calendar_date() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_709_251_199, "2024-02-29 23:59:59 UTC"),
            (1_735_689_599, "2024-12-31 23:59:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(
                format_utc(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)),
                text
            );
        }
    }

    #[test]
    fn format_duration_prints_two_largest_units() {
        for (span, text) in [
            (Duration::from_micros(2500), "2 ms"),
            (Duration::from_secs(59), "59 s"),
            (Duration::from_secs(125), "2 min 5 s"),
            (Duration::from_secs(7260), "2 h 1 min"),
            (Duration::from_secs(90_000), "1 d 1 h"),
        ] {
            assert_eq!(format_duration(span), text);
        }
    }

    #[test]
    fn owner_with_reused_pid_is_dead() {
        let mut owner = Owner::current();
        owner.start = owner.start.map(|start| start + 1);
        assert_eq!(owner.liveness(), Liveness::Dead);
    }

    #[test]
    fn liveness_is_dead_after_reboot_and_unknown_on_other_host() {
        let mut owner = Owner::current();
        owner.boot = owner.boot.map(|boot| boot ^ 1);
        assert_eq!(owner.liveness_by_name(), Liveness::Dead);
        let is_of_the_host = owner.namespace.is_some_and(process::is_of_the_host);
        let has_id = is_of_the_host && process::host().is_some_and(process::has_installation_id);
        assert_eq!(
            owner.liveness(),
            if has_id {
                Liveness::Dead
            } else {
                Liveness::Unknown
            }
        );
        owner.host = Some("elsewhere".into());
        assert_eq!(owner.liveness(), Liveness::Unknown);
        owner.host = None;
        assert_eq!(owner.liveness(), Liveness::Unknown);
    }

    #[test]
    fn liveness_of_host_without_id_is_unknown() {
        let mut owner = Owner::current();
        owner.boot = owner.boot.map(|boot| boot ^ 1);
        let is_here = |_: &str| true;
        assert_eq!(owner.liveness_if(is_here), Liveness::Dead);
        owner.namespace = owner.namespace.map(|namespace| namespace + 1);
        assert_eq!(owner.liveness(), Liveness::Unknown, "in a container");
        owner.namespace = Owner::current().namespace;
        owner.host = Some("localhost".into());
        assert!(
            !process::has_installation_id("localhost")
                && process::has_installation_id("localhost/1f")
        );
        assert_eq!(owner.liveness(), Liveness::Unknown);
    }

    #[test]
    fn liveness_in_other_pid_namespace_is_unknown() {
        let mut owner = Owner::current();
        owner.pid = i32::MAX as u32;
        assert_eq!(owner.liveness(), Liveness::Dead);
        owner.namespace = owner.namespace.map(|namespace| namespace + 1);
        assert_eq!(owner.liveness(), Liveness::Unknown);
        owner.namespace = None;
        assert_eq!(owner.liveness(), Liveness::Unknown);
    }
}
