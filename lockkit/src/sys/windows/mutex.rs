//! Named mutexes: what the kernel frees when the thread that has it ends, and then says so.
//!
//! All names are `Global\`: those that are `Local\` differ from session to session, and a user may have several, as one
//! at the screen, one of each remote login, and that of services, in which scheduled tasks run. What belongs to one
//! user has that user's SID in its name, and lets nobody else in.

use std::io;
use std::os::windows::io::{AsHandle, AsRawHandle, BorrowedHandle, FromRawHandle, OwnedHandle};
use std::time::Instant;

use windows_sys::Win32::Foundation::{ERROR_ALREADY_EXISTS, GetLastError};
use windows_sys::Win32::Storage::FileSystem::{READ_CONTROL, SYNCHRONIZE};
use windows_sys::Win32::System::Threading::{CreateMutexExW, MUTEX_MODIFY_STATE, ReleaseMutex};

use super::event;
use super::folder::Sharing;
use super::security::{self, Descriptor};

/// A mutex, opened. Taken by a thread, and given back by the same.
#[derive(Debug)]
pub(crate) struct Mutex(OwnedHandle);

/// What ended a wait for a mutex.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// This thread has it.
    Free,
    /// This thread has it, and the one before ended without giving it back.
    Abandoned,
    /// The event was set.
    Cancelled,
    /// The moment came.
    TimedOut,
}

/// The name of the kernel's object for the lock `name`.
pub(crate) fn object(name: &str, sharing: Sharing) -> io::Result<String> {
    Ok(match sharing {
        Sharing::User(_) => format!("Global\\lockkit-{}-{name}", security::user()?),
        Sharing::Machine => format!("Global\\lockkit-machine-{name}"),
    })
}

impl Mutex {
    /// Opens or makes it.
    ///
    /// # Errors
    /// `PermissionDenied` when another user has made it, whatever that one lets us do.
    pub(crate) fn open(object: &str, sharing: Sharing) -> io::Result<Self> {
        let (text, access) = match sharing {
            // All of it for the user, the system and its administrators; nothing for anybody else. The owner is the user
            // also where it would be a group, as with administrators.
            Sharing::User(_) => {
                let user = security::user()?;
                let text = format!("O:{user}D:P(A;;0x1F0001;;;{user})(A;;0x1F0001;;;SY)(A;;0x1F0001;;;BA)");
                (text, SYNCHRONIZE | MUTEX_MODIFY_STATE | READ_CONTROL)
            }
            // To wait for it and to give it back for everybody, its maker among them (`OW`), who could otherwise change
            // what others may.
            Sharing::Machine => {
                let text = "D:P(A;;0x100001;;;WD)(A;;0x120001;;;OW)(A;;0x1F0001;;;SY)(A;;0x1F0001;;;BA)".to_owned();
                (text, SYNCHRONIZE | MUTEX_MODIFY_STATE)
            }
        };
        let descriptor = Descriptor::new(&text)?;
        let attributes = descriptor.attributes();
        let wide = super::wide(object);
        // SAFETY: the name ends with a zero, and the attributes' descriptor is there until the end of this call.
        let (handle, existed) = unsafe {
            let handle = CreateMutexExW(&raw const attributes, wide.as_ptr(), 0, access);
            (handle, GetLastError() == ERROR_ALREADY_EXISTS)
        };
        if handle.is_null() {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, and owned by nobody else.
        let mutex = Self(unsafe { OwnedHandle::from_raw_handle(handle) });
        if existed && matches!(sharing, Sharing::User(_)) {
            let owner = security::owner_of(&mutex.0)?;
            if owner != security::user()? {
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("{owner} has made it")));
            }
        }
        Ok(mutex)
    }

    /// Takes it for this thread, unless `cancel` is set or `until` comes first.
    pub(crate) fn take(&self, cancel: Option<BorrowedHandle<'_>>, until: Option<Instant>) -> io::Result<Taken> {
        let mutex = self.0.as_handle();
        let signalled = match cancel {
            Some(cancel) => event::any(&[mutex, cancel], until)?,
            None => event::any(&[mutex], until)?,
        };
        Ok(match signalled {
            None => Taken::TimedOut,
            Some(event::Signalled { at: 0, abandoned: true }) => Taken::Abandoned,
            Some(event::Signalled { at: 0, .. }) => Taken::Free,
            Some(_) => Taken::Cancelled,
        })
    }

    /// Gives it back, on the thread that took it.
    pub(crate) fn give_back(&self) -> io::Result<()> {
        // SAFETY: the handle is an open mutex's. On a thread that does not have it the call fails.
        if unsafe { ReleaseMutex(self.0.as_raw_handle()) } == 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
