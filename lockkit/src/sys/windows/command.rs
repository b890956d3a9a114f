//! What the command `lockkit` asks of Windows: that a program ends with it, and that Ctrl-C does not end it first.

use std::io;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};
use std::ptr;

use windows_sys::Win32::System::Console::{CTRL_BREAK_EVENT, CTRL_C_EVENT, SetConsoleCtrlHandler};
use windows_sys::Win32::System::JobObjects::{
    AssignProcessToJobObject, CreateJobObjectW, JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE,
    JOBOBJECT_EXTENDED_LIMIT_INFORMATION, JobObjectExtendedLimitInformation, SetInformationJobObject,
    TerminateJobObject,
};
use windows_sys::Win32::System::Threading::GetCurrentProcess;

/// A job object with this process in it, and all that it starts from here on. When this process ends, all others in it
/// are ended by the system, unless it was opened.
#[derive(Debug)]
pub struct Cage(OwnedHandle);

impl Cage {
    /// Makes one.
    ///
    /// # Errors
    /// What the system says, as where a job that this process is in already allows no other (before Windows 8).
    pub fn around_this_process() -> io::Result<Self> {
        // SAFETY: asks for a job of its own: without a name, inherited by nobody.
        let job = unsafe { CreateJobObjectW(ptr::null(), ptr::null()) };
        if job.is_null() {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, and owned by nobody else.
        let cage = Self(unsafe { OwnedHandle::from_raw_handle(job) });
        cage.limit(JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE)?;
        // SAFETY: the job is open, and this process is there.
        match unsafe { AssignProcessToJobObject(cage.0.as_raw_handle(), GetCurrentProcess()) } {
            0 => Err(io::Error::last_os_error()),
            _ => Ok(cage),
        }
    }

    fn limit(&self, flags: u32) -> io::Result<()> {
        let mut limits = JOBOBJECT_EXTENDED_LIMIT_INFORMATION::default();
        limits.BasicLimitInformation.LimitFlags = flags;
        // SAFETY: the job is open, and the structure is the one that is named, with its length.
        let done = unsafe {
            SetInformationJobObject(
                self.0.as_raw_handle(),
                JobObjectExtendedLimitInformation,
                (&raw const limits).cast(),
                size_of_val(&limits) as u32,
            )
        };
        if done == 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Lets what is in it outlive this process.
    pub fn open(&self) {
        let _ = self.limit(0);
    }

    /// Ends all that is in it, this process too, with this exit code.
    pub fn end_all(&self, code: u32) {
        // SAFETY: the job is open. This process may end before the call returns.
        unsafe { TerminateJobObject(self.0.as_raw_handle(), code) };
    }
}

/// Has Ctrl-C and Ctrl-Break go by this process: the console gives them to the program as well. When the console is
/// closed, or the user logs off, this process stays for as long as the system lets it.
///
/// # Errors
/// What the system says.
pub fn pass_over_interrupts() -> io::Result<()> {
    unsafe extern "system" fn handler(event: u32) -> i32 {
        if event != CTRL_C_EVENT && event != CTRL_BREAK_EVENT {
            // To return is to end at once.
            loop {
                std::thread::park();
            }
        }
        1
    }
    // SAFETY: the handler lives as long as the process, and runs on a thread of its own, in which it needs nothing.
    if unsafe { SetConsoleCtrlHandler(Some(handler), 1) } == 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Writing to a pipe that nobody reads is an error here, and no signal.
pub fn end_at_a_closed_pipe() {}
