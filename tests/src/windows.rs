//! Windows functions that the tests need and the standard library does not offer.

#![allow(unsafe_code)]

use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};

use windows_sys::Win32::Foundation::{HANDLE, INVALID_HANDLE_VALUE, LocalFree};
use windows_sys::Win32::System::Diagnostics::ToolHelp::{
    CreateToolhelp32Snapshot, TH32CS_SNAPTHREAD, THREADENTRY32, Thread32First, Thread32Next,
};
use windows_sys::Win32::System::Threading::{
    GetProcessHandleCount, GetThreadDescription, OpenProcess, OpenThread,
    PROCESS_QUERY_INFORMATION, PROCESS_SUSPEND_RESUME, THREAD_QUERY_LIMITED_INFORMATION,
};

/// Opens a handle on the process `pid`, with the rights `access`.
fn open(pid: u32, access: u32) -> OwnedHandle {
    // SAFETY: only queries.
    let process = unsafe { OpenProcess(access, 0, pid) };
    assert!(
        !process.is_null(),
        "the process {pid} is there: {}",
        std::io::Error::last_os_error()
    );
    // SAFETY: just created, and without another owner.
    unsafe { OwnedHandle::from_raw_handle(process) }
}

/// Returns the number of the process's handles.
pub(crate) fn handles(pid: u32) -> usize {
    let process = open(pid, PROCESS_QUERY_INFORMATION);
    let mut count = 0_u32;
    // SAFETY: the handle is open, and the answer has a place.
    let counted = unsafe { GetProcessHandleCount(process.as_raw_handle(), &raw mut count) };
    assert!(
        counted != 0,
        "handles can be counted: {}",
        std::io::Error::last_os_error()
    );
    count as usize
}

/// Returns the names of its threads. The name of an unnamed thread is empty.
pub(crate) fn threads(pid: u32) -> Vec<String> {
    // SAFETY: takes a snapshot of all threads, which is a handle of its own.
    let picture = unsafe { CreateToolhelp32Snapshot(TH32CS_SNAPTHREAD, 0) };
    assert!(
        picture != INVALID_HANDLE_VALUE,
        "threads can be listed: {}",
        std::io::Error::last_os_error()
    );
    // SAFETY: just created, and without another owner.
    let picture = unsafe { OwnedHandle::from_raw_handle(picture) };
    let mut entry = THREADENTRY32 {
        dwSize: size_of::<THREADENTRY32>() as u32,
        ..Default::default()
    };
    // SAFETY: the handle is open, and the entry says how long it is.
    let mut found = unsafe { Thread32First(picture.as_raw_handle(), &raw mut entry) } != 0;
    let mut names = Vec::new();
    while found {
        if entry.th32OwnerProcessID == pid {
            names.push(name_of(entry.th32ThreadID).unwrap_or_default());
        }
        // SAFETY: as above.
        found = unsafe { Thread32Next(picture.as_raw_handle(), &raw mut entry) } != 0;
    }
    names
}

/// Returns the name of a thread, if the thread still exists.
fn name_of(thread: u32) -> Option<String> {
    // SAFETY: only queries.
    let handle = unsafe { OpenThread(THREAD_QUERY_LIMITED_INFORMATION, 0, thread) };
    // SAFETY: just created, and without another owner.
    let handle = (!handle.is_null()).then(|| unsafe { OwnedHandle::from_raw_handle(handle) })?;
    let mut name = std::ptr::null_mut();
    // SAFETY: the handle is open, and the answer has a place.
    let found = unsafe { GetThreadDescription(handle.as_raw_handle(), &raw mut name) };
    if found < 0 || name.is_null() {
        return None;
    }
    // SAFETY: the text ends with a zero, and this function must free it.
    unsafe {
        let length = (0..).take_while(|at| *name.add(*at) != 0).count();
        let text = String::from_utf16_lossy(std::slice::from_raw_parts(name, length));
        LocalFree(name.cast());
        Some(text)
    }
}

#[link(name = "ntdll")]
unsafe extern "system" {
    fn NtSuspendProcess(process: HANDLE) -> i32;
    fn NtResumeProcess(process: HANDLE) -> i32;
}

/// Stops all threads of the process, or lets them run again.
pub(crate) fn suspend(pid: u32, stop: bool) {
    let process = open(pid, PROCESS_SUSPEND_RESUME);
    // SAFETY: the handle is open, and has the right that this call requires.
    let status = unsafe {
        match stop {
            true => NtSuspendProcess(process.as_raw_handle()),
            false => NtResumeProcess(process.as_raw_handle()),
        }
    };
    assert!(status >= 0, "a process can be stopped: 0x{status:08x}");
}
