//! Named mutexes: the kernel frees a mutex when its owning thread ends, and reports that to the
//! next owner.
//!
//! All names are `Global\`. `Local\` names differ from session to session, and a user may have
//! several sessions: one at the screen, one for each remote login, and that of services, in which
//! scheduled tasks run. The mutex of one user has that user's SID in its name, and admits no other
//! user.

use std::io;
use std::os::windows::io::{AsHandle, AsRawHandle, BorrowedHandle, FromRawHandle, OwnedHandle};
use std::time::Instant;

use windows_sys::Win32::Foundation::{ERROR_ALREADY_EXISTS, GetLastError};
use windows_sys::Win32::Storage::FileSystem::{READ_CONTROL, SYNCHRONIZE};
use windows_sys::Win32::System::Threading::{CreateMutexExW, MUTEX_MODIFY_STATE, ReleaseMutex};

use super::event;
use super::security::{self, Descriptor};
use crate::sys::sharing::Sharing;

/// An open mutex. The thread that acquires it must release it.
#[derive(Debug)]
pub(crate) struct Mutex(OwnedHandle);

/// What ended a wait for a mutex.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Acquired {
    /// This thread has it.
    Free,
    /// This thread has it, and the previous owner ended without releasing it.
    Abandoned,
    /// The event was set.
    Cancelled,
    /// The deadline passed.
    TimedOut,
}

/// Returns the name of the kernel's object for the lock `name`.
pub(crate) fn object(name: &str, sharing: Sharing) -> io::Result<String> {
    Ok(match sharing {
        Sharing::User(_) => format!("Global\\lockkit-{}-{name}", security::user()?),
        Sharing::Machine => format!("Global\\lockkit-machine-{name}"),
    })
}

/// Returns the access that users get, and the access that lockkit requests.
fn rights(sharing: Sharing) -> io::Result<(Descriptor, u32)> {
    let (text, access) = match sharing {
        // All access for the user, the system and its administrators; none for others. The owner is
        // the user also if the default owner is a group, as with administrators.
        Sharing::User(_) => {
            let user = security::user()?;
            let text =
                format!("O:{user}D:P(A;;0x1F0001;;;{user})(A;;0x1F0001;;;SY)(A;;0x1F0001;;;BA)");
            (text, SYNCHRONIZE | MUTEX_MODIFY_STATE | READ_CONTROL)
        }
        // All users may wait for the mutex and release it. That includes its maker (`OW`), which
        // could otherwise change the access of others.
        Sharing::Machine => {
            let text =
                "D:P(A;;0x100001;;;WD)(A;;0x120001;;;OW)(A;;0x1F0001;;;SY)(A;;0x1F0001;;;BA)"
                    .to_owned();
            (text, SYNCHRONIZE | MUTEX_MODIFY_STATE)
        }
    };
    Ok((Descriptor::new(&text)?, access))
}

impl Mutex {
    /// Opens or creates the mutex.
    ///
    /// # Errors
    /// `PermissionDenied` if another user has created it, whatever access that user gives.
    pub(crate) fn open(object: &str, sharing: Sharing) -> io::Result<Self> {
        let (descriptor, access) = rights(sharing)?;
        let attributes = descriptor.attributes();
        let wide = super::wide(object);
        // SAFETY: the name ends with a zero, and the attributes' descriptor lives until the end of
        // this call.
        let (handle, existed) = unsafe {
            let handle = CreateMutexExW(&raw const attributes, wide.as_ptr(), 0, access);
            (handle, GetLastError() == ERROR_ALREADY_EXISTS)
        };
        if handle.is_null() {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call has just made the handle, and it has no other owner.
        let mutex = Self(unsafe { OwnedHandle::from_raw_handle(handle) });
        if existed && matches!(sharing, Sharing::User(_)) {
            let owner = security::owner_of(&mutex.0)?;
            if owner != security::user()? {
                return Err(io::Error::new(
                    io::ErrorKind::PermissionDenied,
                    format!("{owner} created it"),
                ));
            }
        }
        Ok(mutex)
    }

    /// Acquires the mutex for this thread, unless `cancel` is set or `until` passes first.
    pub(crate) fn acquire(
        &self,
        cancel: Option<BorrowedHandle<'_>>,
        until: Option<Instant>,
    ) -> io::Result<Acquired> {
        let mutex = self.0.as_handle();
        let signalled = match cancel {
            Some(cancel) => event::any(&[mutex, cancel], until)?,
            None => event::any(&[mutex], until)?,
        };
        Ok(match signalled {
            None => Acquired::TimedOut,
            Some(event::Signalled {
                at: 0,
                abandoned: true,
            }) => Acquired::Abandoned,
            Some(event::Signalled { at: 0, .. }) => Acquired::Free,
            Some(_) => Acquired::Cancelled,
        })
    }

    /// Releases the mutex, on the thread that acquired it.
    pub(crate) fn release(&self) -> io::Result<()> {
        // SAFETY: the handle belongs to an open mutex. On a thread that does not own it the call
        // fails.
        if unsafe { ReleaseMutex(self.0.as_raw_handle()) } == 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use windows_sys::Win32::Storage::FileSystem::{DELETE, WRITE_DAC, WRITE_OWNER};
    use windows_sys::Win32::System::Threading::{MUTEX_ALL_ACCESS, OpenMutexW};

    use super::super::security::tests::{as_another, list_of};
    use super::*;

    const SHARINGS: [Sharing; 2] = [Sharing::User(0), Sharing::Machine];

    fn fresh(sharing: Sharing) -> String {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        object(&format!("test-{}-{count}", std::process::id()), sharing).unwrap()
    }

    fn opened(object: &str, access: u32) -> io::Result<OwnedHandle> {
        let wide = super::super::wide(object);
        // SAFETY: the name ends with a zero.
        let handle = unsafe { OpenMutexW(access, 0, wide.as_ptr()) };
        match handle.is_null() {
            true => Err(io::Error::last_os_error()),
            // SAFETY: the call has just made the handle, and it has no other owner.
            false => Ok(unsafe { OwnedHandle::from_raw_handle(handle) }),
        }
    }

    fn is_denied<T>(opened: &io::Result<T>) -> bool {
        opened
            .as_ref()
            .is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
    }

    #[test]
    fn user_mutex_denies_other_users() {
        let name = fresh(Sharing::User(0));
        let _mutex = Mutex::open(&name, Sharing::User(0)).unwrap();
        let list = list_of(&opened(&name, READ_CONTROL).unwrap());
        assert_eq!(list, rights(Sharing::User(0)).unwrap().0.list());
        assert!(
            list.starts_with("D:P(") && list.matches('(').count() == 3 && !list.contains(";WD)"),
            "{list}"
        );
        as_another(|| {
            for access in [
                SYNCHRONIZE,
                MUTEX_MODIFY_STATE,
                READ_CONTROL,
                WRITE_DAC,
                WRITE_OWNER,
                DELETE,
            ] {
                let open = opened(&name, access);
                assert!(is_denied(&open), "{access:x}: {open:?}");
            }
        });
    }

    #[test]
    fn machine_mutex_allows_others_to_acquire_not_to_modify() {
        let name = fresh(Sharing::Machine);
        let mutex = Mutex::open(&name, Sharing::Machine).unwrap();
        let list = list_of(&opened(&name, READ_CONTROL).unwrap());
        assert_eq!(list, rights(Sharing::Machine).unwrap().0.list());
        assert!(
            list.to_ascii_lowercase()
                .starts_with("d:p(a;;0x100001;;;wd)(a;;0x120001;;;ow)"),
            "{list}"
        );
        as_another(|| {
            let same = Mutex::open(&name, Sharing::Machine).unwrap();
            assert_eq!(
                same.acquire(None, Some(Instant::now())).unwrap(),
                Acquired::Free
            );
            same.release().unwrap();
            for access in [
                READ_CONTROL,
                WRITE_DAC,
                WRITE_OWNER,
                DELETE,
                MUTEX_ALL_ACCESS,
            ] {
                let open = opened(&name, access);
                assert!(is_denied(&open), "{access:x}: {open:?}");
            }
        });
        assert_eq!(
            mutex.acquire(None, Some(Instant::now())).unwrap(),
            Acquired::Free
        );
        mutex.release().unwrap();
    }

    #[test]
    fn open_mutex_of_another_owner_fails() {
        let name = fresh(Sharing::User(0));
        // Without administrator rights a process cannot create an object that administrators own.
        let descriptor = Descriptor::new("O:BAD:P(A;;0x1F0001;;;WD)").unwrap();
        let attributes = descriptor.attributes();
        let wide = super::super::wide(&name);
        // SAFETY: the name ends with a zero, and the attributes' descriptor lives until the end of
        // this call.
        let handle =
            unsafe { CreateMutexExW(&raw const attributes, wide.as_ptr(), 0, SYNCHRONIZE) };
        if handle.is_null() {
            let _ = writeln!(
                io::stderr(),
                "left out: only an administrator can act as another user"
            );
            return;
        }
        // SAFETY: the call has just made the handle, and it has no other owner.
        let _theirs = unsafe { OwnedHandle::from_raw_handle(handle) };
        let refused = Mutex::open(&name, Sharing::User(0));
        assert!(is_denied(&refused), "{refused:?}");
        assert!(
            refused
                .unwrap_err()
                .to_string()
                .contains("S-1-5-32-544 created it")
        );
    }

    #[test]
    fn mutex_of_ended_thread_is_abandoned_once() {
        for sharing in SHARINGS {
            let name = fresh(sharing);
            let mutex = Mutex::open(&name, sharing).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    Mutex::open(&name, sharing)
                        .unwrap()
                        .acquire(None, None)
                        .unwrap()
                });
            });
            let until = Some(Instant::now() + Duration::from_secs(30));
            assert_eq!(mutex.acquire(None, until).unwrap(), Acquired::Abandoned);
            mutex.release().unwrap();
            assert_eq!(mutex.acquire(None, until).unwrap(), Acquired::Free);
            mutex.release().unwrap();
        }
    }
}
