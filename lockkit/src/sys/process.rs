//! The identity of processes, and whether they still live.
//!
//! On Linux the start time in kernel ticks since boot ([proc_pid_stat(5)], field 22) distinguishes
//! a process from a later one with the same pid. Setting the clock does not move it. On FreeBSD the
//! start time is in microseconds since boot. Elsewhere it is what `sysinfo` gives, in seconds: on
//! macOS the kernel records it once. `sysinfo` also gives the program's name for people.
//!
//! [proc_pid_stat(5)]: https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html

#[cfg(not(any(target_vendor = "apple", target_os = "freebsd")))]
use std::fs;
#[cfg(target_os = "linux")]
use std::io::Read;
#[cfg(target_os = "linux")]
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use rustix::process::{Pid, test_kill_process};
#[cfg(target_os = "linux")]
use rustix::time::{ClockId, clock_gettime};
use sysinfo::{ProcessRefreshKind, ProcessesToUpdate, System, UpdateKind};

pub(crate) use super::probe::Probe;
#[cfg(target_os = "linux")]
use super::process_local::ProcessLocal;

/// Probes `pid`, as a number of this process's own pid namespace. A process that cannot be seen
/// counts as running.
pub(crate) fn probe(pid: u32) -> Probe {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return Probe::Gone;
    };
    // EPERM also proves a process: one of another user. /proc may be mounted so that it hides
    // those.
    if test_kill_process(pid) == Err(rustix::io::Errno::SRCH) {
        return Probe::Gone;
    }
    started(pid)
}

#[cfg(target_os = "linux")]
fn started(pid: Pid) -> Probe {
    if !proc_is_of_this_namespace() {
        return Probe::Running(None);
    }
    let stat = read_line(&format!("/proc/{}/stat", pid.as_raw_nonzero()));
    stat.ok()
        .and_then(|stat| parse_stat(&stat))
        .unwrap_or(Probe::Running(None))
}

/// Reads the one line of a file below /proc, which the kernel returns whole if the buffer is large
/// enough.
#[cfg(target_os = "linux")]
fn read_line(path: &str) -> std::io::Result<String> {
    let mut line = [0; 2048];
    let length = fs::File::open(path)?.read(&mut line)?;
    // A program's name may contain any bytes.
    Ok(String::from_utf8_lossy(&line[..length]).into_owned())
}

/// Returns the real and the effective user of a process. The owner of its directory below /proc is
/// no substitute: that is root for every process that may not be dumped. Nor is the effective user
/// alone, which a setuid program changes for the user that starts it.
#[cfg(target_os = "linux")]
pub(crate) fn users(pid: u32) -> Option<[u32; 2]> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let mut ids = status
        .lines()
        .find_map(|line| line.strip_prefix("Uid:"))?
        .split_ascii_whitespace();
    let mut next = || ids.next()?.parse().ok();
    Some([next()?, next()?])
}

/// A process in a pid namespace without its own /proc sees that of an outer namespace, where its
/// pids belong to other processes.
#[cfg(target_os = "linux")]
fn proc_is_of_this_namespace() -> bool {
    let me = fs::read_link("/proc/self").ok();
    me.and_then(|me| me.to_str()?.parse().ok()) == Some(std::process::id())
}

/// Whether the process is stopped by a signal or by a debugger, and so runs no code until it is
/// continued.
#[cfg(target_os = "linux")]
pub(crate) fn is_stopped(pid: u32) -> bool {
    let stat = proc_is_of_this_namespace()
        .then(|| read_line(&format!("/proc/{pid}/stat")).ok())
        .flatten();
    stat.is_some_and(|stat| stops(&stat))
}

#[cfg(target_os = "linux")]
fn stops(stat: &str) -> bool {
    stat.rsplit(')')
        .next()
        .is_some_and(|rest| rest.trim_start().starts_with(['T', 't']))
}

/// This system does not report it.
#[cfg(not(target_os = "linux"))]
pub(crate) fn is_stopped(_: u32) -> bool {
    false
}

/// Whether the process is in this process's user namespace, and of the same user. The kernel shows
/// the link only to a process with the same kernel uid, or with privileges over the other's
/// namespace, which here is the same.
#[cfg(target_os = "linux")]
pub(crate) fn is_of_same_user(pid: u32) -> bool {
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/user")).ok();
    let own = namespace("self");
    own.is_some() && proc_is_of_this_namespace() && namespace(&pid.to_string()) == own
}

#[cfg(target_os = "freebsd")]
fn started(pid: Pid) -> Probe {
    match super::freebsd::process(pid.as_raw_nonzero().get()) {
        Some(process) if process.is_zombie => Probe::Ended,
        Some(process) => Probe::Running(Some(process.start)),
        None => Probe::Running(None),
    }
}

#[cfg(not(any(target_os = "linux", target_os = "freebsd")))]
fn started(pid: Pid) -> Probe {
    let pid = pid.as_raw_nonzero().get() as u32;
    match read_process(pid, ProcessRefreshKind::nothing(), |process| {
        (process.status(), process.start_time())
    }) {
        Some((sysinfo::ProcessStatus::Zombie | sysinfo::ProcessStatus::Dead, _)) => Probe::Ended,
        Some((_, start)) => Probe::Running(Some(start)),
        None => Probe::Running(None),
    }
}

/// Parses a line of `/proc/<pid>/stat`. The program's name, in parentheses, may itself contain
/// spaces and parentheses.
#[cfg(target_os = "linux")]
fn parse_stat(stat: &str) -> Option<Probe> {
    /// The number of the first field after the name, the state, in the manual page.
    const STATE: usize = 3;
    const THREADS: usize = 20;
    const START: usize = 22;
    const EXIT_CODE: usize = 52;

    let fields: Vec<&str> = stat
        .get(stat.rfind(')')? + 1..)?
        .split_ascii_whitespace()
        .collect();
    let field = |number: usize| fields.get(number - STATE).copied();
    let start = field(START)?.parse().ok()?;
    let threads: i64 = field(THREADS)?.parse().ok()?;
    let ended = match field(STATE)? {
        // The first thread may have ended while the process continues in others.
        "Z" | "X" | "x" => threads <= 1,
        // The exit code of a traced process shows whatever its tracer stopped it at.
        "t" => false,
        // A killed process looks alive until it is torn down, but its exit code is set. A stopped
        // process shows the signal that stopped it in the same field, and may continue.
        _ => field(EXIT_CODE)
            .and_then(|code| code.parse().ok())
            .is_some_and(is_fatal),
    };
    Some(if ended {
        Probe::Ended
    } else {
        Probe::Running(Some(start))
    })
}

#[cfg(target_os = "linux")]
fn is_fatal(exit_code: i32) -> bool {
    use rustix::process::Signal;
    let stops = [Signal::STOP, Signal::TSTP, Signal::TTIN, Signal::TTOU];
    exit_code != 0 && !stops.iter().any(|stop| stop.as_raw() == exit_code)
}

/// Returns the wall clock by its cheapest reading: a few milliseconds do not matter to people.
#[cfg(target_os = "linux")]
pub(crate) fn cheap_time() -> SystemTime {
    let now = clock_gettime(ClockId::RealtimeCoarse);
    SystemTime::UNIX_EPOCH + Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn cheap_time() -> SystemTime {
    SystemTime::now()
}

/// The highest pid that the kernel gives out: `PID_MAX_LIMIT` on Linux.
pub(crate) const MAX_PID: u32 = if cfg!(target_os = "linux") {
    1 << 22
} else {
    i32::MAX as u32
};

/// Returns when the system started, by the wall clock as it is set now, or `None` if nothing
/// reports it.
#[cfg(target_os = "linux")]
pub(crate) fn booted_at() -> Option<SystemTime> {
    let up = clock_gettime(ClockId::Boottime);
    SystemTime::now().checked_sub(Duration::try_from(up).ok()?)
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn booted_at() -> Option<SystemTime> {
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(System::boot_time()))
}

/// Converts the `start` of a [`Probe`] to the wall clock as it is set now.
#[cfg(target_os = "linux")]
pub(crate) fn started_at(start: u64) -> Option<SystemTime> {
    let since_boot =
        Duration::from_secs_f64(start as f64 / rustix::param::clock_ticks_per_second() as f64);
    booted_at()?.checked_add(since_boot)
}

#[cfg(target_os = "freebsd")]
pub(crate) fn started_at(start: u64) -> Option<SystemTime> {
    booted_at()?.checked_add(Duration::from_micros(start))
}

#[cfg(not(any(target_os = "linux", target_os = "freebsd")))]
pub(crate) fn started_at(start: u64) -> Option<SystemTime> {
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(start))
}

/// Returns the program that `pid` runs, for people: its file's name, or the system's name for it.
pub(crate) fn program(pid: u32) -> Option<String> {
    // The link is enough, and costs a tenth of what sysinfo reads.
    #[cfg(target_os = "linux")]
    if let Some(name) = fs::read_link(format!("/proc/{pid}/exe"))
        .ok()
        .as_deref()
        .and_then(Path::file_name)
    {
        let name = name.to_string_lossy();
        return Some(name.strip_suffix(" (deleted)").unwrap_or(&name).to_owned());
    }
    read_process(
        pid,
        ProcessRefreshKind::nothing().with_exe(UpdateKind::Always),
        |process| {
            let file = process
                .exe()
                .and_then(Path::file_name)
                .filter(|name| !name.is_empty());
            file.unwrap_or(process.name())
                .to_string_lossy()
                .into_owned()
        },
    )
}

fn read_process<T>(
    pid: u32,
    what: ProcessRefreshKind,
    read: impl FnOnce(&sysinfo::Process) -> T,
) -> Option<T> {
    let pid = sysinfo::Pid::from_u32(pid);
    let mut system = System::new();
    system.refresh_processes_specifics(
        ProcessesToUpdate::Some(&[pid]),
        false,
        what.without_tasks(),
    );
    system.process(pid).map(read)
}

/// Returns the identity of this boot of this kernel, or `None` if the system does not report it.
pub(crate) fn boot_id() -> Option<u128> {
    static BOOT: OnceLock<u128> = OnceLock::new();
    // A failed read, perhaps for lack of a descriptor, is repeated at the next call.
    BOOT.get()
        .copied()
        .or_else(|| read_boot_id().map(|boot| *BOOT.get_or_init(|| boot)))
}

#[cfg(target_os = "linux")]
fn read_boot_id() -> Option<u128> {
    let text = read_line("/proc/sys/kernel/random/boot_id").ok()?;
    u128::from_str_radix(&text.trim().replace('-', ""), 16).ok()
}

#[cfg(target_vendor = "apple")]
fn read_boot_id() -> Option<u128> {
    super::darwin::boot_session()
}

/// The system's start time would move whenever the clock is set, and living processes would look
/// dead. So all boots of a host are the same here, and only the start times distinguish processes.
#[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
fn read_boot_id() -> Option<u128> {
    Some(u128::from(crate::sys::fnv::of_bytes(host()?.as_bytes())))
}

/// Returns the namespaces of this process in which pids and start times count, as one number. The
/// lower half is the pid namespace, as `/proc/self/ns/pid` shows it. The upper half is the time
/// namespace, if there is one.
///
/// They are read once. A process stays in its pid namespace, and in its time namespace unless it
/// joins another one by setns(2). [`Owner::current`](crate::Owner::current) does not notice that
/// either.
#[cfg(target_os = "linux")]
pub(crate) fn pid_namespace() -> Option<u64> {
    static KNOWN: ProcessLocal<OnceLock<u64>> = ProcessLocal::new();
    let known = KNOWN.get_or_make(OnceLock::new);
    if let Some(known) = known.get() {
        return Some(*known);
    }
    let number =
        |name: &str| fs::metadata(format!("/proc/self/ns/{name}")).map(|found| found.ino());
    let time = match number("time") {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return None,
        time => time.unwrap_or_default(),
    };
    let read = number("pid").ok()? | time << 32;
    Some(*known.get_or_init(|| read))
}

/// Returns the jail of this process plus 1, because 0 means unknown. The jail hides the processes
/// of others from this process.
#[cfg(target_os = "freebsd")]
pub(crate) fn pid_namespace() -> Option<u64> {
    let me = rustix::process::getpid().as_raw_nonzero().get();
    Some(super::freebsd::process(me)?.jail + 1)
}

/// There is one namespace for all processes.
#[cfg(not(any(target_os = "linux", target_os = "freebsd")))]
pub(crate) fn pid_namespace() -> Option<u64> {
    Some(1)
}

/// Whether processes of these namespaces belong to the host itself, not to a container on it.
#[cfg(target_os = "linux")]
pub(crate) fn is_of_the_host(namespace: u64) -> bool {
    /// `PROC_PID_INIT_INO`, which is the same on every Linux.
    const FIRST: u32 = 0xEFFF_FFFC;
    namespace as u32 == FIRST
}

/// Whether processes of this jail belong to the host itself. True on other systems, which have no
/// jails.
#[cfg(not(target_os = "linux"))]
pub(crate) fn is_of_the_host(namespace: u64) -> bool {
    namespace == 1
}

/// Returns the identity of the clock that counts from the start of the system, as this process sees
/// it: the boot, and the time namespace, which shifts the clock. `None` if boots cannot be
/// distinguished.
#[cfg(any(target_os = "linux", target_vendor = "apple"))]
pub(crate) fn clock_id() -> Option<u128> {
    Some(boot_id()? ^ u128::from(pid_namespace()? >> 32))
}

#[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
pub(crate) fn clock_id() -> Option<u128> {
    None
}

/// Returns this host: its name, and the id of its installation if there is one. So two hosts with
/// the same name differ, unless they were cloned from one image with their names. `None` if the id
/// cannot be read for now, as without a free descriptor: the name alone would be another host.
pub(crate) fn host() -> Option<&'static str> {
    static HOST: OnceLock<String> = OnceLock::new();
    if let Some(host) = HOST.get() {
        return Some(host);
    }
    let id = installation().ok()?;
    Some(HOST.get_or_init(|| match id {
        Some(id) => format!("{}/{id}", host_name()),
        None => host_name(),
    }))
}

/// Returns the name of this host, as the system reports it to its processes.
pub(crate) fn host_name() -> String {
    rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .replace(char::is_control, "?")
}

#[cfg(target_vendor = "apple")]
fn installation() -> std::io::Result<Option<String>> {
    Ok(super::darwin::machine())
}

#[cfg(target_os = "freebsd")]
fn installation() -> std::io::Result<Option<String>> {
    Ok(super::freebsd::machine())
}

/// Returns `None` if the host has no such id, and never will: temporary errors are errors.
#[cfg(not(any(target_vendor = "apple", target_os = "freebsd")))]
fn installation() -> std::io::Result<Option<String>> {
    use std::io::ErrorKind;
    let id = match fs::read_to_string("/etc/machine-id") {
        Ok(id) => id,
        Err(error) => match error.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::InvalidData => {
                return Ok(None);
            }
            _ => return Err(error),
        },
    };
    let id = id.trim();
    // machine-id(5): until the system has chosen an id, the file contains words instead.
    Ok((id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit())).then(|| id.to_owned()))
}

/// Whether the result of [`host`] contains the id of an installation in addition to the name.
pub(crate) fn has_installation_id(host: &str) -> bool {
    // No host name has a slash.
    host.contains('/')
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    fn stat(state: &str, threads: u32, exit_code: i32) -> String {
        let middle = "1 1 1 0 -1 4194304 1 1 0 0 1 1 0 0 20 0";
        let tail = "0 ".repeat(29);
        format!("42 (a) b ( c)) {state} {middle} {threads} 0 777 {tail}{exit_code}\n")
    }

    #[test]
    fn stat_line_shows_whether_process_ended() {
        let running = Some(Probe::Running(Some(777)));
        assert_eq!(parse_stat(&stat("R", 1, 0)), running);
        assert_eq!(
            parse_stat(&stat("T", 1, 19)),
            running,
            "stopped, not killed"
        );
        assert_eq!(parse_stat(&stat("t", 1, 5)), running, "in a debugger");
        assert_eq!(
            parse_stat(&stat("Z", 3, 0)),
            running,
            "only the first thread has ended"
        );
        assert_eq!(parse_stat(&stat("Z", 1, 0)), Some(Probe::Ended));
        assert_eq!(
            parse_stat(&stat("R", 1, 9)),
            Some(Probe::Ended),
            "killed, not yet gone"
        );
        assert_eq!(parse_stat("42 (cut"), None);
        assert_eq!(parse_stat("42 (cut) R 1 1"), None);
    }

    #[test]
    fn stat_line_shows_whether_process_is_stopped() {
        assert!(stops(&stat("T", 1, 19)) && stops(&stat("t", 1, 5)));
        assert!(!stops(&stat("S", 1, 0)) && !stops(""));
    }

    #[test]
    fn probe_of_this_process_returns_same_start() {
        let now = probe(std::process::id());
        assert!(matches!(now, Probe::Running(Some(_))));
        assert_eq!(probe(std::process::id()), now);
    }

    #[test]
    fn probe_of_impossible_pid_is_gone() {
        assert_eq!(probe(0), Probe::Gone);
        assert_eq!(probe(i32::MAX as u32), Probe::Gone);
        assert_eq!(probe(u32::MAX), Probe::Gone);
    }
}
