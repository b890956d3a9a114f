//! Reports of tests that this machine cannot run.

use std::io::Write;
use std::path::Path;

/// Reports that the test on this thread is left out, and why, even when the test runner captures
/// the output of passing tests.
pub fn left_out(why: impl std::fmt::Display) {
    let thread = std::thread::current();
    // A closed standard error has no reader.
    let _ = writeln!(
        std::io::stderr(),
        "left out: {}: {why}",
        thread.name().unwrap_or_default()
    );
}

/// Returns whether the process runs directly on a host, and reports the test as left out where it
/// does not. In a container no process knows whether an earlier boot of the host was of this host.
pub fn is_on_a_host() -> bool {
    let number = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    // The first pid namespace has this number on every Linux.
    let is = number.as_os_str() == "pid:[4026531836]" && Path::new("/etc/machine-id").exists();
    if !is {
        left_out("this is a container, or has no machine-id");
    }
    is
}

/// Makes a test of each name that reports why it is left out, on systems other than Linux. The file
/// has the test itself for Linux only.
#[macro_export]
macro_rules! left_out {
    ($why:literal: $($case:ident,)*) => {
        $(#[test]
        #[cfg(not(target_os = "linux"))]
        fn $case() {
            $crate::left_out($why);
        })*
    };
}
