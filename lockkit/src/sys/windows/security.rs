//! Who this process is, and what it lets others do with what it makes.

use std::io;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};
use std::ptr;

use windows_sys::Win32::Foundation::{HANDLE, LocalFree};
use windows_sys::Win32::Security::Authorization::{
    ConvertSidToStringSidW, ConvertStringSecurityDescriptorToSecurityDescriptorW, GetSecurityInfo, SDDL_REVISION_1,
    SE_KERNEL_OBJECT,
};
use windows_sys::Win32::Security::{
    GetTokenInformation, OWNER_SECURITY_INFORMATION, PSECURITY_DESCRIPTOR, PSID, SECURITY_ATTRIBUTES, TOKEN_QUERY,
    TOKEN_USER, TokenUser,
};
use windows_sys::Win32::System::Threading::{GetCurrentProcess, OpenProcessToken};

/// Memory that the system has allocated for an answer.
struct Local(*mut core::ffi::c_void);

impl Drop for Local {
    fn drop(&mut self) {
        // SAFETY: it came from a call that says to free it so, and is freed once.
        unsafe { LocalFree(self.0) };
    }
}

/// What others may do with an object that is made with it.
pub(crate) struct Descriptor(Local);

impl Descriptor {
    /// From its text in the [security descriptor definition language].
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
        if done == 0 { Err(io::Error::last_os_error()) } else { Ok(Self(Local(made))) }
    }

    /// As calls that make an object want it; good as long as `self` is there.
    pub(crate) fn attributes(&self) -> SECURITY_ATTRIBUTES {
        let length = size_of::<SECURITY_ATTRIBUTES>() as u32;
        SECURITY_ATTRIBUTES { nLength: length, lpSecurityDescriptor: self.0.0, bInheritHandle: 0 }
    }
}

/// The user of this process, as text: `S-1-5-21-…`.
pub(crate) fn user() -> io::Result<String> {
    let mut token: HANDLE = ptr::null_mut();
    // SAFETY: the answer has a place.
    if unsafe { OpenProcessToken(GetCurrentProcess(), TOKEN_QUERY, &raw mut token) } == 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, and owned by nobody else.
    let token = unsafe { OwnedHandle::from_raw_handle(token) };
    // The largest SID has 68 bytes; in words, so that the structure is aligned.
    let mut found = [0_u64; 32];
    let mut length = size_of_val(&found) as u32;
    // SAFETY: the call writes no more than it is told there is room for.
    let done = unsafe {
        GetTokenInformation(token.as_raw_handle(), TokenUser, found.as_mut_ptr().cast(), length, &raw mut length)
    };
    if done == 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has filled in this structure, and it is aligned. The SID that it points to stands behind it.
    text_of(unsafe { (*found.as_ptr().cast::<TOKEN_USER>()).User.Sid })
}

/// The owner of a kernel object, by a handle that may read that.
pub(crate) fn owner_of(object: &OwnedHandle) -> io::Result<String> {
    let (mut owner, mut descriptor): (PSID, PSECURITY_DESCRIPTOR) = (ptr::null_mut(), ptr::null_mut());
    // SAFETY: the handle is open as long as it is borrowed, and each answer that is asked for has a place.
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
    // The owner stands in it.
    let _descriptor = Local(descriptor);
    text_of(owner)
}

fn text_of(sid: PSID) -> io::Result<String> {
    let mut text = ptr::null_mut();
    // SAFETY: a SID from the system, and the answer has a place.
    if unsafe { ConvertSidToStringSidW(sid, &raw mut text) } == 0 {
        return Err(io::Error::last_os_error());
    }
    let text_owner = Local(text.cast());
    // SAFETY: the system has written a text that ends with a zero.
    let letters = unsafe {
        let length = (0..).take_while(|&at| *text.add(at) != 0).count();
        std::slice::from_raw_parts(text, length)
    };
    let read = String::from_utf16_lossy(letters);
    drop(text_owner);
    Ok(read)
}
