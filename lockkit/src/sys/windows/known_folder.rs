//! The directories for application data, as the shell knows them, whatever the environment says.

use std::io;
use std::path::PathBuf;
use std::ptr;

use windows_sys::Win32::System::Com::CoTaskMemFree;
use windows_sys::Win32::UI::Shell::{
    FOLDERID_LocalAppData, FOLDERID_ProgramData, SHGetKnownFolderPath,
};

/// Returns the user's directory, which does not roam.
pub(crate) fn local_app_data() -> io::Result<PathBuf> {
    known(&FOLDERID_LocalAppData)
}

/// Returns the directory for all users.
pub(crate) fn program_data() -> io::Result<PathBuf> {
    known(&FOLDERID_ProgramData)
}

fn known(id: &windows_sys::core::GUID) -> io::Result<PathBuf> {
    let mut text = ptr::null_mut();
    // SAFETY: the call queries a path of this process's user, and the answer has a place.
    let status = unsafe { SHGetKnownFolderPath(id, 0, ptr::null_mut(), &raw mut text) };
    if text.is_null() {
        return Err(io::Error::other(format!(
            "the shell does not report the directory (0x{status:08x})"
        )));
    }
    // SAFETY: the shell has written a text that ends with a zero.
    let letters = unsafe {
        let length = (0..).take_while(|&at| *text.add(at) != 0).count();
        std::slice::from_raw_parts(text, length)
    };
    let path = String::from_utf16(letters);
    // SAFETY: this is the required way to free it, once, also without a path; `letters` is not used
    // any more.
    unsafe { CoTaskMemFree(text.cast()) };
    path.map(PathBuf::from).map_err(io::Error::other)
}
