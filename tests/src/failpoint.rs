//! The failpoints of the library (`lockkit::failpoint`), at which a test kills or stops a process.
//!
//! The library has this module only under `--cfg lockkit_failpoints`, which the repository's
//! `.cargo/config.toml` sets. The variable `RUSTFLAGS` replaces that setting. The functions here
//! then panic, and a test that asks [`are_enabled`] first is left out.

#[cfg(lockkit_failpoints)]
pub use lockkit::failpoint::{BeforeKill, ENABLED, kill_at, kill_at_after, passed, stop_at};

#[cfg(not(lockkit_failpoints))]
pub use absent::{BeforeKill, ENABLED, kill_at, kill_at_after, passed, stop_at};

/// Returns whether a process can be killed at a failpoint. Reports the test as left out if it
/// cannot.
pub fn are_enabled() -> bool {
    if !ENABLED {
        crate::left_out(
            "this build has no failpoints; they need debug assertions and `--cfg lockkit_failpoints`",
        );
    }
    ENABLED
}

/// The same names for a build without failpoints.
#[cfg(not(lockkit_failpoints))]
mod absent {
    const WHY: &str = "this build has no failpoints";

    /// Whether this build has failpoints.
    pub const ENABLED: bool = false;

    /// A function that receives the failpoints that a process has passed.
    pub type BeforeKill = fn(&[&'static str]);

    /// Panics.
    pub fn kill_at(_at: usize) {
        panic!("{WHY}");
    }

    /// Panics.
    pub fn kill_at_after(_at: usize, _before_kill: BeforeKill) {
        panic!("{WHY}");
    }

    /// Panics.
    pub fn stop_at(_at: usize) {
        panic!("{WHY}");
    }

    /// Panics.
    pub fn passed() -> Vec<&'static str> {
        panic!("{WHY}");
    }
}
