//! Failpoints: places in the code at which a test can have this process killed.
//!
//! Every place in the library that has just changed something outside the process calls `step`. A
//! test can let the process kill itself at one of these places. That needs a build with debug
//! assertions and the flag `--cfg lockkit_failpoints`, which only lockkit's own workspace sets. In
//! all other builds a step does nothing, and this module is private.

/// Whether this build has steps.
#[cfg(lockkit_failpoints)]
pub const ENABLED: bool = cfg!(debug_assertions);

/// A function that receives the steps that a process has passed, just before it kills itself.
#[cfg(lockkit_failpoints)]
pub type BeforeKill = fn(&[&'static str]);

#[cfg(all(lockkit_failpoints, debug_assertions))]
mod armed {
    use std::sync::atomic::{AtomicBool, Ordering};

    use parking_lot::Mutex;

    use super::{BeforeKill, this_process};

    /// Whether a test has armed the steps: forked children could find a mutex locked that every
    /// step locks.
    static ARMED: AtomicBool = AtomicBool::new(false);
    static PASSED: Mutex<(usize, Vec<&'static str>)> = Mutex::new((usize::MAX, Vec::new()));
    /// Whether the process is stopped at the step, instead of killed.
    static STOPS: AtomicBool = AtomicBool::new(false);
    static BEFORE_KILL: Mutex<Option<BeforeKill>> = Mutex::new(None);

    pub(crate) fn step(what: &'static str) {
        if !ARMED.load(Ordering::Relaxed) {
            return;
        }
        this_process::make_step_visible();
        let mut passed = PASSED.lock();
        passed.1.push(what);
        if passed.1.len() == passed.0 {
            match STOPS.load(Ordering::Relaxed) {
                true => this_process::stop(),
                false => {
                    if let Some(before_kill) = *BEFORE_KILL.lock() {
                        before_kill(&passed.1);
                    }
                    this_process::kill()
                }
            }
        }
    }

    pub(super) fn arm(at: usize, stops: bool) {
        *PASSED.lock() = (at, Vec::new());
        STOPS.store(stops, Ordering::Relaxed);
        ARMED.store(true, Ordering::Relaxed);
    }

    pub(super) fn call_before_kill(before_kill: BeforeKill) {
        *BEFORE_KILL.lock() = Some(before_kill);
    }

    pub(super) fn passed() -> Vec<&'static str> {
        PASSED.lock().1.clone()
    }
}

#[cfg(all(lockkit_failpoints, debug_assertions, unix))]
mod this_process {
    use rustix::process::{Signal, getpid, getppid, kill_process};

    /// Changes nothing, and shows a tracer of this process where a step is.
    pub(super) fn make_step_visible() {
        let _ = getppid();
    }

    /// SIGKILL.
    pub(super) fn kill() {
        let _ = kill_process(getpid(), Signal::KILL);
    }

    /// SIGSTOP.
    pub(super) fn stop() {
        let _ = kill_process(getpid(), Signal::STOP);
    }
}

#[cfg(all(lockkit_failpoints, debug_assertions, windows))]
mod this_process {
    use windows_sys::Win32::System::Threading::{GetCurrentProcess, TerminateProcess};

    /// Does nothing: Windows has no way to show it.
    pub(super) fn make_step_visible() {}

    /// Ends this process at once, as an external kill does.
    pub(super) fn kill() {
        // SAFETY: the call ends the process, so no code follows.
        unsafe { TerminateProcess(GetCurrentProcess(), 1) };
    }

    /// Does nothing: no test stops a process at a step on Windows.
    pub(super) fn stop() {}
}

#[cfg(all(lockkit_failpoints, debug_assertions))]
pub(crate) use armed::step;

/// Marks a change outside the process.
#[cfg(not(all(lockkit_failpoints, debug_assertions)))]
#[inline(always)]
pub(crate) fn step(_what: &'static str) {}

/// Kills this process at the step numbered `at`, counted from 1 from here on.
#[cfg(lockkit_failpoints)]
pub fn kill_at(at: usize) {
    #[cfg(debug_assertions)]
    armed::arm(at, false);
    #[cfg(not(debug_assertions))]
    let _ = at;
}

/// Kills like [`kill_at`], and passes the steps to `before_kill` just before the kill.
#[cfg(lockkit_failpoints)]
pub fn kill_at_after(at: usize, before_kill: BeforeKill) {
    #[cfg(debug_assertions)]
    armed::call_before_kill(before_kill);
    #[cfg(not(debug_assertions))]
    let _ = before_kill;
    kill_at(at);
}

/// Stops this process at the step numbered `at`, counted from 1 from here on, until it is
/// continued. Only on Unix.
#[cfg(lockkit_failpoints)]
pub fn stop_at(at: usize) {
    #[cfg(debug_assertions)]
    armed::arm(at, true);
    #[cfg(not(debug_assertions))]
    let _ = at;
}

/// Returns the steps passed since [`kill_at`].
#[cfg(lockkit_failpoints)]
pub fn passed() -> Vec<&'static str> {
    #[cfg(debug_assertions)]
    return armed::passed();
    #[cfg(not(debug_assertions))]
    Vec::new()
}

#[cfg(all(test, lockkit_failpoints))]
mod tests {
    #[test]
    fn failpoints_in_release_build_are_disabled() {
        if super::ENABLED {
            println!("left out: this build has debug assertions");
            return;
        }
        super::kill_at(1);
        super::step("alive");
        assert!(super::passed().is_empty());
    }
}
