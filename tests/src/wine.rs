//! What Wine does otherwise than Windows, so that it cannot judge every case.

/// Whether this runs under Wine, which does some things not as Windows does.
pub fn is_wine() -> bool {
    #[cfg(windows)]
    {
        use std::ffi::{c_char, c_void};
        #[link(name = "kernel32")]
        unsafe extern "system" {
            fn GetModuleHandleA(name: *const c_char) -> *mut c_void;
            fn GetProcAddress(module: *mut c_void, name: *const c_char) -> *mut c_void;
        }
        // SAFETY: both names end with a zero, and that module is loaded in every process for ever.
        unsafe { !GetProcAddress(GetModuleHandleA(c"ntdll".as_ptr()), c"wine_get_version".as_ptr()).is_null() }
    }
    #[cfg(not(windows))]
    false
}

/// Whether this runs under Wine, and says that a case is left out there, and why. On Windows it runs.
pub fn wine_cannot_judge(why: &str) -> bool {
    if is_wine() {
        crate::left_out(format_args!("under Wine: {why}"));
    }
    is_wine()
}

/// Starts a program. Under Wine that fails now and then, for want of its server's answer; there it is tried again.
pub(crate) fn spawn(command: &mut std::process::Command) -> std::io::Result<std::process::Child> {
    const INTERNAL_ERROR: i32 = 1359;
    for _ in 0..9 {
        match command.spawn() {
            Err(error) if error.raw_os_error() == Some(INTERNAL_ERROR) && is_wine() => {}
            spawned => return spawned,
        }
    }
    command.spawn()
}

/// What Wine does otherwise with files that are deleted.
pub const DELETED: &str = "a file that is deleted while it is open keeps its name there";
