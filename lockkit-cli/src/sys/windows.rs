//! The Windows version of [`sys`](super): the program ends with the command, and Ctrl-C does not
//! end the command first.

use std::io;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};
use std::ptr;

use windows_sys::Win32::System::Console::{CTRL_BREAK_EVENT, CTRL_C_EVENT, SetConsoleCtrlHandler};
use windows_sys::Win32::System::JobObjects::{
    AssignProcessToJobObject, CreateJobObjectW, JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE,
    JOBOBJECT_EXTENDED_LIMIT_INFORMATION, JobObjectExtendedLimitInformation,
    SetInformationJobObject, TerminateJobObject,
};
use windows_sys::Win32::System::Threading::GetCurrentProcess;

/// A job object that contains this process and every process that it starts from then on. When this
/// process ends, the system ends all others in the job, unless the job was opened.
#[derive(Debug)]
pub(crate) struct Cage(OwnedHandle);

impl Cage {
    /// Makes the job.
    ///
    /// # Errors
    /// Returns the system's error, for example if a job that already contains this process allows
    /// no other job (before Windows 8).
    pub(crate) fn around_this_process() -> io::Result<Self> {
        // SAFETY: the call makes a new job, which has no name and is not inherited.
        let job = unsafe { CreateJobObjectW(ptr::null(), ptr::null()) };
        if job.is_null() {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call has just made the handle, and it has no other owner.
        let cage = Self(unsafe { OwnedHandle::from_raw_handle(job) });
        cage.limit(JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE)?;
        // SAFETY: the job is open, and this process exists.
        match unsafe { AssignProcessToJobObject(cage.0.as_raw_handle(), GetCurrentProcess()) } {
            0 => Err(io::Error::last_os_error()),
            _ => Ok(cage),
        }
    }

    fn limit(&self, flags: u32) -> io::Result<()> {
        let mut limits = JOBOBJECT_EXTENDED_LIMIT_INFORMATION::default();
        limits.BasicLimitInformation.LimitFlags = flags;
        // SAFETY: the job is open, and the structure has the named type and its length.
        let done = unsafe {
            SetInformationJobObject(
                self.0.as_raw_handle(),
                JobObjectExtendedLimitInformation,
                (&raw const limits).cast(),
                size_of_val(&limits) as u32,
            )
        };
        if done == 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// Lets the processes in the job outlive this process.
    pub(crate) fn open(&self) {
        let _ = self.limit(0);
    }

    /// Ends all processes in the job, including this one, with this exit code.
    pub(crate) fn end_all(&self, code: u32) {
        // SAFETY: the job is open. This process may end before the call returns.
        unsafe { TerminateJobObject(self.0.as_raw_handle(), code) };
    }
}

/// Makes this process ignore Ctrl-C and Ctrl-Break: the console also sends them to the program.
/// When the console is closed or the user logs off, this process stays for as long as the system
/// permits.
///
/// # Errors
/// Returns the system's error.
pub(crate) fn pass_over_interrupts() -> io::Result<()> {
    unsafe extern "system" fn handler(event: u32) -> i32 {
        if event != CTRL_C_EVENT && event != CTRL_BREAK_EVENT {
            // Returning would end the process at once.
            loop {
                std::thread::park();
            }
        }
        1
    }
    // SAFETY: the handler lives as long as the process. It runs on its own thread, and needs
    // nothing there.
    if unsafe { SetConsoleCtrlHandler(Some(handler), 1) } == 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Does nothing: a write to a closed pipe is an error on Windows, and no signal.
pub(crate) fn end_at_a_closed_pipe() {}
