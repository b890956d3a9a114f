//! The differences between Wine and Windows, because of which Wine cannot judge every case.

/// Returns whether this process runs under Wine, which differs from Windows in some ways.
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
        unsafe {
            !GetProcAddress(
                GetModuleHandleA(c"ntdll".as_ptr()),
                c"wine_get_version".as_ptr(),
            )
            .is_null()
        }
    }
    #[cfg(not(windows))]
    false
}

/// Returns whether this process runs under Wine, and reports a case there as left out with the
/// reason. On Windows the case runs.
pub fn wine_cannot_judge(why: &str) -> bool {
    if is_wine() {
        crate::left_out(format_args!("under Wine: {why}"));
    }
    is_wine()
}

/// Starts a program. Under Wine the start fails occasionally, because Wine's server does not
/// answer; there it is repeated.
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

/// The way in which Wine treats deleted files differently.
pub const DELETED: &str = "a file that is deleted while it is open keeps its name there";
