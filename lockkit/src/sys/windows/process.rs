//! The identity of processes, and whether they still live.
//!
//! The creation time distinguishes a process from a later one with the same pid. It is in ticks of
//! 100 ns of the wall clock as it was set then. The system records it once, and it does not move
//! any more. The process itself is queried for its end, because its exit code may be any number,
//! 259 (`STILL_ACTIVE`) among them.

use std::io;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};
use std::path::Path;
use std::ptr;
use std::sync::OnceLock;
use std::time::SystemTime;

use windows_sys::Win32::Foundation::{ERROR_INVALID_PARAMETER, FILETIME, WAIT_OBJECT_0};
use windows_sys::Win32::System::Registry::{
    HKEY_LOCAL_MACHINE, RRF_RT_REG_SZ, RRF_SUBKEY_WOW6464KEY, RegGetValueW,
};
use windows_sys::Win32::System::SystemInformation::{
    ComputerNamePhysicalDnsHostname, GetComputerNameExW,
};
use windows_sys::Win32::System::Threading::{
    GetProcessId, GetProcessTimes, OpenProcess, PROCESS_NAME_WIN32,
    PROCESS_QUERY_LIMITED_INFORMATION, PROCESS_SYNCHRONIZE, QueryFullProcessImageNameW,
    WaitForSingleObject,
};

pub(crate) use crate::sys::probe::Probe;

/// Probes `pid`. A process that cannot be seen counts as running.
pub(crate) fn probe(pid: u32) -> Probe {
    let process = match open(pid, PROCESS_QUERY_LIMITED_INFORMATION | PROCESS_SYNCHRONIZE) {
        Ok(process) => process,
        Err(error) if error.raw_os_error() == Some(ERROR_INVALID_PARAMETER as i32) => {
            return Probe::Gone;
        }
        // Access denied also proves a process: one of another user, or a protected one.
        Err(_) => return Probe::Running(None),
    };
    let handle = process.as_raw_handle();
    // SAFETY: the handle belongs to an open process. Windows rounds a number between pids down to
    // the pid below.
    if unsafe { GetProcessId(handle) } != pid {
        return Probe::Gone;
    }
    // SAFETY: the handle is open, and may be waited for.
    if unsafe { WaitForSingleObject(handle, 0) } == WAIT_OBJECT_0 {
        return Probe::Ended;
    }
    let mut times = [FILETIME::default(); 4];
    let [created, ended, kernel, user] = &mut times;
    // SAFETY: the handle is open, and each answer has a place.
    let seen = unsafe { GetProcessTimes(handle, created, ended, kernel, user) } != 0;
    let created = u64::from(created.dwHighDateTime) << 32 | u64::from(created.dwLowDateTime);
    Probe::Running(seen.then_some(created))
}

fn open(pid: u32, access: u32) -> io::Result<OwnedHandle> {
    // SAFETY: the call only queries.
    let handle = unsafe { OpenProcess(access, 0, pid) };
    match handle.is_null() {
        true => Err(io::Error::last_os_error()),
        // SAFETY: the call has just made the handle, and it has no other owner.
        false => Ok(unsafe { OwnedHandle::from_raw_handle(handle) }),
    }
}

/// This system does not report it.
pub(crate) fn is_stopped(_: u32) -> bool {
    false
}

/// Returns the wall clock by its cheapest reading.
pub(crate) fn cheap_time() -> SystemTime {
    SystemTime::now()
}

/// The highest possible pid: pids are multiples of 4.
pub(crate) const MAX_PID: u32 = u32::MAX - 3;

/// Returns when the system started, by the wall clock as it is set now.
pub(crate) fn booted_at() -> Option<SystemTime> {
    SystemTime::now().checked_sub(super::clock::now())
}

/// Converts the `start` of a [`Probe`] to the wall clock as it was set then.
pub(crate) fn started_at(start: u64) -> Option<SystemTime> {
    /// From 1601, the start of Windows time, to 1970.
    const EPOCH: u64 = 11_644_473_600 * super::TICKS;
    SystemTime::UNIX_EPOCH.checked_add(super::span(start.checked_sub(EPOCH)?))
}

/// Returns the program that `pid` runs, for people: its file's name.
pub(crate) fn program(pid: u32) -> Option<String> {
    let process = open(pid, PROCESS_QUERY_LIMITED_INFORMATION).ok()?;
    let mut path = [0_u16; 1024];
    let mut length = path.len() as u32;
    // SAFETY: the handle is open, and the call writes at most the given number of letters.
    let found = unsafe {
        QueryFullProcessImageNameW(
            process.as_raw_handle(),
            PROCESS_NAME_WIN32,
            path.as_mut_ptr(),
            &raw mut length,
        )
    };
    let path = (found != 0).then(|| String::from_utf16_lossy(&path[..length as usize]))?;
    Some(Path::new(&path).file_name()?.to_string_lossy().into_owned())
}

/// Returns the identity of this boot of this machine: the number of boots, as the kernel shows it
/// to every process, and the machine. If the kernel does not count boots (before Windows 10), all
/// boots are the same. Then only the creation times distinguish processes.
pub(crate) fn boot_id() -> Option<u128> {
    /// `KUSER_SHARED_DATA`, which is mapped at the same place in every process, and its field
    /// `BootId`.
    const BOOT_ID: *const u32 = (0x7ffe_0000_usize + 0x2c4) as *const u32;
    // SAFETY: the page is mapped for reading in every process; the field is four bytes, aligned.
    let count = unsafe { BOOT_ID.read_volatile() };
    Some(u128::from(crate::sys::fnv::of_bytes(host()?.as_bytes())) << 32 | u128::from(count))
}

/// There is one pid space for all processes.
pub(crate) fn pid_namespace() -> Option<u64> {
    Some(1)
}

/// Whether processes of that namespace belong to the host itself.
pub(crate) fn is_of_the_host(namespace: u64) -> bool {
    namespace == 1
}

/// Returns the identity of the clock that counts from the start of the system.
pub(crate) fn clock_id() -> Option<u128> {
    boot_id().filter(|boot| *boot as u32 != 0)
}

/// Returns this host: its name, and the id of its installation if there is one. So two hosts with
/// the same name differ, unless they were cloned from one image with their names.
pub(crate) fn host() -> Option<&'static str> {
    static HOST: OnceLock<String> = OnceLock::new();
    Some(HOST.get_or_init(|| match installation() {
        Some(id) => format!("{}/{id}", host_name()),
        None => host_name(),
    }))
}

/// Returns the name of this host.
pub(crate) fn host_name() -> String {
    let mut name = [0_u16; 256];
    let mut length = name.len() as u32;
    // SAFETY: the call writes at most the given number of letters.
    let found = unsafe {
        GetComputerNameExW(
            ComputerNamePhysicalDnsHostname,
            name.as_mut_ptr(),
            &raw mut length,
        )
    };
    let name = if found == 0 {
        String::new()
    } else {
        String::from_utf16_lossy(&name[..length as usize])
    };
    name.replace(char::is_control, "?")
}

fn installation() -> Option<String> {
    let (key, value) = (
        super::wide("SOFTWARE\\Microsoft\\Cryptography"),
        super::wide("MachineGuid"),
    );
    let mut id = [0_u16; 64];
    let mut length = size_of_val(&id) as u32;
    // SAFETY: both names end with a zero, and the call writes at most the given number of bytes.
    let status = unsafe {
        RegGetValueW(
            HKEY_LOCAL_MACHINE,
            key.as_ptr(),
            value.as_ptr(),
            RRF_RT_REG_SZ | RRF_SUBKEY_WOW6464KEY,
            ptr::null_mut(),
            id.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    let end = id.iter().position(|letter| *letter == 0)?;
    (status == 0 && end > 0).then(|| String::from_utf16_lossy(&id[..end]))
}

/// Whether the result of [`host`] contains the id of an installation in addition to the name.
pub(crate) fn has_installation_id(host: &str) -> bool {
    // No host name has a slash.
    host.contains('/')
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use windows_sys::Win32::Storage::FileSystem::WRITE_DAC;

    use super::super::security;
    use super::*;

    #[test]
    fn probe_of_this_process_returns_same_creation_time() {
        let now = probe(std::process::id());
        let Probe::Running(Some(start)) = now else {
            panic!("{now:?}")
        };
        assert_eq!(probe(std::process::id()), now);
        let age = SystemTime::now()
            .duration_since(started_at(start).unwrap())
            .unwrap_or_default();
        assert!(age < Duration::from_secs(3600), "{age:?}");
        assert!(program(std::process::id()).unwrap().ends_with(".exe"));
    }

    #[test]
    fn probe_of_adjacent_or_extreme_pid_is_gone() {
        let me = std::process::id();
        for beside in 1..4 {
            assert_eq!(probe(me + beside), Probe::Gone);
        }
        assert_eq!(probe(0), Probe::Gone);
        assert_eq!(probe(MAX_PID), Probe::Gone);
    }

    #[test]
    fn probe_of_process_exited_with_259_is_ended() {
        let mut child = Command::new("cmd")
            .args(["/c", "exit 259"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(259));
        // The handle on it is still open.
        assert_eq!(probe(child.id()), Probe::Ended);
    }

    #[test]
    fn probe_of_inaccessible_process_is_running() {
        let mut pause = Command::new("cmd");
        pause
            .args(["/c", "pause"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null());
        let mut child = pause.spawn().unwrap();
        assert!(matches!(probe(child.id()), Probe::Running(Some(_))));
        // As for a user without debug rights that queries another user's process.
        security::tests::deny_all_access(&open(child.id(), WRITE_DAC).unwrap());
        security::tests::without_privileges(|| {
            let refused = open(child.id(), PROCESS_QUERY_LIMITED_INFORMATION).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
            assert_eq!(probe(child.id()), Probe::Running(None));
        });
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
