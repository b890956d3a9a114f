//! Waiting for a fact, and names for locks.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// The time limit for anything that must happen: far more than it needs, because machines can be
/// slow.
pub const LIVELY: Duration = Duration::from_secs(30);

/// Waits until `fact` holds. Panics with `what` if it does not hold within [`LIVELY`].
pub fn until(what: &str, mut fact: impl FnMut() -> bool) {
    let start = Instant::now();
    while !fact() {
        assert!(start.elapsed() < LIVELY, "timed out waiting until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits for the value of `fact`. Panics with `what` if there is none within [`LIVELY`].
pub fn until_some<T>(what: &str, mut fact: impl FnMut() -> Option<T>) -> T {
    let mut found = None;
    until(what, || {
        found = fact();
        found.is_some()
    });
    found.expect("a value was found")
}

/// Returns a name that no other test and no other run uses.
pub fn fresh_name(prefix: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    // Of one length, so that no name is the beginning of another: tests find the files of a lock by
    // its name.
    format!(
        "{prefix}-{:07}-{:05}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    )
}
