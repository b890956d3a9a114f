//! The user of this process, and the access that this process gives to the objects that it makes.

use std::io;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};
use std::ptr;

use windows_sys::Win32::Foundation::{HANDLE, LocalFree};
use windows_sys::Win32::Security::Authorization::{
    ConvertSidToStringSidW, ConvertStringSecurityDescriptorToSecurityDescriptorW, GetSecurityInfo,
    SDDL_REVISION_1, SE_KERNEL_OBJECT,
};
use windows_sys::Win32::Security::{
    GetTokenInformation, OWNER_SECURITY_INFORMATION, PSECURITY_DESCRIPTOR, PSID,
    SECURITY_ATTRIBUTES, TOKEN_QUERY, TOKEN_USER, TokenUser,
};
use windows_sys::Win32::System::Threading::{GetCurrentProcess, OpenProcessToken};

/// Memory that the system has allocated for an answer.
struct Local(*mut core::ffi::c_void);

impl Drop for Local {
    fn drop(&mut self) {
        // SAFETY: the memory came from a call that requires this way to free it, and is freed once.
        unsafe { LocalFree(self.0) };
    }
}

/// The access of others to an object that is made with it.
pub(crate) struct Descriptor(Local);

impl Descriptor {
    /// Converts text in the [security descriptor definition language].
    ///
    /// [security descriptor definition language]: https://learn.microsoft.com/windows/win32/secauthz/security-descriptor-string-format
    pub(crate) fn new(text: &str) -> io::Result<Self> {
        let text = super::wide(text);
        let mut made: PSECURITY_DESCRIPTOR = ptr::null_mut();
        // SAFETY: the text ends with a zero, and the answer has a place.
        let done = unsafe {
            ConvertStringSecurityDescriptorToSecurityDescriptorW(
                text.as_ptr(),
                SDDL_REVISION_1,
                &raw mut made,
                ptr::null_mut(),
            )
        };
        if done == 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(Self(Local(made)))
        }
    }

    /// Returns the form that calls which make an object need; valid as long as `self` lives.
    pub(crate) fn attributes(&self) -> SECURITY_ATTRIBUTES {
        let length = size_of::<SECURITY_ATTRIBUTES>() as u32;
        SECURITY_ATTRIBUTES {
            nLength: length,
            lpSecurityDescriptor: self.0.0,
            bInheritHandle: 0,
        }
    }
}

/// Returns the user of this process, as text: `S-1-5-21-…`.
pub(crate) fn user() -> io::Result<String> {
    let mut token: HANDLE = ptr::null_mut();
    // SAFETY: the answer has a place.
    if unsafe { OpenProcessToken(GetCurrentProcess(), TOKEN_QUERY, &raw mut token) } == 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just made the handle, and it has no other owner.
    let token = unsafe { OwnedHandle::from_raw_handle(token) };
    // The largest SID has 68 bytes; in words, so that the structure is aligned.
    let mut found = [0_u64; 32];
    let mut length = size_of_val(&found) as u32;
    // SAFETY: the call writes at most the given number of bytes.
    let done = unsafe {
        GetTokenInformation(
            token.as_raw_handle(),
            TokenUser,
            found.as_mut_ptr().cast(),
            length,
            &raw mut length,
        )
    };
    if done == 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has filled in this structure, and it is aligned. The SID that it points to
    // lies after it.
    text_of(unsafe { (*found.as_ptr().cast::<TOKEN_USER>()).User.Sid })
}

/// Returns the owner of a kernel object, by a handle that may read it.
pub(crate) fn owner_of(object: &OwnedHandle) -> io::Result<String> {
    let (mut owner, mut descriptor): (PSID, PSECURITY_DESCRIPTOR) =
        (ptr::null_mut(), ptr::null_mut());
    // SAFETY: the handle is open as long as it is borrowed, and each requested answer has a place.
    let status = unsafe {
        GetSecurityInfo(
            object.as_raw_handle(),
            SE_KERNEL_OBJECT,
            OWNER_SECURITY_INFORMATION,
            &raw mut owner,
            ptr::null_mut(),
            ptr::null_mut(),
            ptr::null_mut(),
            &raw mut descriptor,
        )
    };
    if status != 0 {
        return Err(io::Error::from_raw_os_error(status as i32));
    }
    // The descriptor contains the owner.
    let _descriptor = Local(descriptor);
    text_of(owner)
}

fn text_of(sid: PSID) -> io::Result<String> {
    let mut text = ptr::null_mut();
    // SAFETY: a SID from the system, and the answer has a place.
    if unsafe { ConvertSidToStringSidW(sid, &raw mut text) } == 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the system has written a text that ends with a zero, and requires this way to free
    // it.
    Ok(unsafe { read(text) })
}

/// Reads a text that the system has allocated, and frees it.
///
/// # Safety
/// The text ends with a zero, has no other owner, and must be freed by `LocalFree`.
unsafe fn read(text: *mut u16) -> String {
    let _owner = Local(text.cast());
    // SAFETY: the text ends with a zero, and is freed at the end of this function.
    let letters = unsafe {
        let length = (0..).take_while(|&at| *text.add(at) != 0).count();
        std::slice::from_raw_parts(text, length)
    };
    String::from_utf16_lossy(letters)
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;

    use windows_sys::Win32::Security::Authorization::{
        ConvertSecurityDescriptorToStringSecurityDescriptorW, ConvertStringSidToSidW,
        SetSecurityInfo,
    };
    use windows_sys::Win32::Security::{
        AdjustTokenPrivileges, CreateRestrictedToken, DACL_SECURITY_INFORMATION,
        DISABLE_MAX_PRIVILEGE, GetSecurityDescriptorDacl, ImpersonateLoggedOnUser, ImpersonateSelf,
        RevertToSelf, SID_AND_ATTRIBUTES, SecurityImpersonation, TOKEN_ADJUST_PRIVILEGES,
        TOKEN_DUPLICATE, TOKEN_IMPERSONATE,
    };
    use windows_sys::Win32::System::LibraryLoader::{GetModuleHandleW, GetProcAddress};
    use windows_sys::Win32::System::Threading::{GetCurrentThread, OpenThreadToken};

    use super::*;

    /// Ends the impersonation of this thread.
    struct Revert;

    impl Drop for Revert {
        fn drop(&mut self) {
            // SAFETY: the call ends the impersonation that this thread began.
            let reverted = unsafe { RevertToSelf() };
            assert!(
                reverted != 0 || std::thread::panicking(),
                "{}",
                io::Error::last_os_error()
            );
        }
    }

    /// Calls `act` without the privileges that let administrators query every process.
    pub(in super::super) fn without_privileges<T>(act: impl FnOnce() -> T) -> T {
        let mut token: HANDLE = ptr::null_mut();
        // SAFETY: the call gives this thread a token of its own.
        let done = unsafe { ImpersonateSelf(SecurityImpersonation) };
        assert!(done != 0, "{}", io::Error::last_os_error());
        let _revert = Revert;
        // SAFETY: the answer has a place.
        let opened = unsafe {
            OpenThreadToken(
                GetCurrentThread(),
                TOKEN_ADJUST_PRIVILEGES,
                1,
                &raw mut token,
            )
        };
        assert!(opened != 0, "{}", io::Error::last_os_error());
        // SAFETY: the call has just made the handle, and it has no other owner.
        let token = unsafe { OwnedHandle::from_raw_handle(token) };
        // SAFETY: the handle is open, and all privileges need no list.
        let done = unsafe {
            AdjustTokenPrivileges(
                token.as_raw_handle(),
                1,
                ptr::null(),
                0,
                ptr::null_mut(),
                ptr::null_mut(),
            )
        };
        assert!(done != 0, "{}", io::Error::last_os_error());
        act()
    }

    /// Removes all access to the object, also for its owner.
    pub(in super::super) fn deny_all_access(object: &OwnedHandle) {
        let descriptor = Descriptor::new("D:P").unwrap();
        let (mut is_there, mut list, mut by_default) = (0, ptr::null_mut(), 0);
        // SAFETY: the descriptor is complete, and each answer has a place.
        let found = unsafe {
            GetSecurityDescriptorDacl(
                descriptor.0.0,
                &raw mut is_there,
                &raw mut list,
                &raw mut by_default,
            )
        };
        assert!(found != 0 && is_there != 0 && !list.is_null());
        // SAFETY: the handle is open, and the list lives as long as its descriptor.
        let status = unsafe {
            SetSecurityInfo(
                object.as_raw_handle(),
                SE_KERNEL_OBJECT,
                DACL_SECURITY_INFORMATION,
                ptr::null_mut(),
                ptr::null_mut(),
                list,
                ptr::null(),
            )
        };
        assert_eq!(status, 0);
    }

    /// Returns the access control list of a kernel object, as text.
    pub(in super::super) fn list_of(object: &OwnedHandle) -> String {
        let mut descriptor: PSECURITY_DESCRIPTOR = ptr::null_mut();
        // SAFETY: the handle is open, and the requested answer has a place.
        let status = unsafe {
            GetSecurityInfo(
                object.as_raw_handle(),
                SE_KERNEL_OBJECT,
                DACL_SECURITY_INFORMATION,
                ptr::null_mut(),
                ptr::null_mut(),
                ptr::null_mut(),
                ptr::null_mut(),
                &raw mut descriptor,
            )
        };
        assert_eq!(status, 0);
        Descriptor(Local(descriptor)).list()
    }

    impl Descriptor {
        /// Returns its list, as the system writes it.
        pub(in super::super) fn list(&self) -> String {
            let mut text = ptr::null_mut();
            // SAFETY: the descriptor came from the system, and the answer has a place.
            let told = unsafe {
                ConvertSecurityDescriptorToStringSecurityDescriptorW(
                    self.0.0,
                    SDDL_REVISION_1,
                    DACL_SECURITY_INFORMATION,
                    &raw mut text,
                    ptr::null_mut(),
                )
            };
            assert!(told != 0, "{}", io::Error::last_os_error());
            // SAFETY: the system has written a text that ends with a zero, and requires this way to
            // free it.
            unsafe { read(text) }
        }
    }

    /// Calls `act` as a user that is neither this user nor an administrator. Returns `None` under
    /// Wine, where no process can give up its user.
    pub(in super::super) fn as_another<T>(act: impl FnOnce() -> T) -> Option<T> {
        let ntdll = super::super::wide("ntdll.dll");
        // SAFETY: both names end with a zero, and that module is loaded in every process for ever.
        if unsafe {
            GetProcAddress(
                GetModuleHandleW(ntdll.as_ptr()),
                c"wine_get_version".as_ptr().cast(),
            )
        }
        .is_some()
        {
            let _ = writeln!(
                io::stderr(),
                "left out: under Wine: what another user is refused"
            );
            return None;
        }
        let restricted = restricted_token();
        // SAFETY: the handle is open.
        let done = unsafe { ImpersonateLoggedOnUser(restricted.as_raw_handle()) };
        assert!(done != 0, "{}", io::Error::last_os_error());
        let _revert = Revert;
        Some(act())
    }

    /// Returns a token of this user without the groups and rights by which it owns its files.
    fn restricted_token() -> OwnedHandle {
        let mut token: HANDLE = ptr::null_mut();
        let access = TOKEN_QUERY | TOKEN_DUPLICATE | TOKEN_IMPERSONATE;
        // SAFETY: the answer has a place.
        let opened = unsafe { OpenProcessToken(GetCurrentProcess(), access, &raw mut token) };
        assert!(opened != 0, "{}", io::Error::last_os_error());
        // SAFETY: the call has just made the handle, and it has no other owner.
        let token = unsafe { OwnedHandle::from_raw_handle(token) };
        let sids = [
            user().unwrap(),
            "S-1-5-32-544".to_owned(),
            "S-1-5-18".to_owned(),
        ]
        .map(|text| Sid::new(&text));
        let without = sids.each_ref().map(|sid| SID_AND_ATTRIBUTES {
            Sid: sid.0.0,
            Attributes: 0,
        });
        let mut made: HANDLE = ptr::null_mut();
        // SAFETY: the handle is open, the list has as many entries as it says, whose SIDs exist,
        // and the answer has a place.
        let done = unsafe {
            CreateRestrictedToken(
                token.as_raw_handle(),
                DISABLE_MAX_PRIVILEGE,
                without.len() as u32,
                without.as_ptr(),
                0,
                ptr::null(),
                0,
                ptr::null(),
                &raw mut made,
            )
        };
        assert!(done != 0, "{}", io::Error::last_os_error());
        // SAFETY: the call has just made the handle, and it has no other owner.
        unsafe { OwnedHandle::from_raw_handle(made) }
    }

    struct Sid(Local);

    impl Sid {
        fn new(text: &str) -> Self {
            let text = super::super::wide(text);
            let mut sid: PSID = ptr::null_mut();
            // SAFETY: the text ends with a zero, and the answer has a place.
            let made = unsafe { ConvertStringSidToSidW(text.as_ptr(), &raw mut sid) };
            assert!(made != 0, "{}", io::Error::last_os_error());
            Self(Local(sid))
        }
    }
}
