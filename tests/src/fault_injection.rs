//! Injects missing resources: room, files, processes, uninterrupted sleep, and every single system
//! call that a lock makes.
//!
//! In every case each request gets an answer: the lock, or an error that names the missing
//! resource. Exclusion holds throughout. When the resource is back, the same process acquires, and
//! so does another. The other process's guard reports no death, because no holder died.
//! [`fault_injection!`](crate::fault_injection!) makes a test of each case for one kind.

mod acquire;
mod cases;
mod resources;
mod system_calls;

pub use acquire::files;
pub use cases::*;
pub use resources::{Others, limit_threads, lock_on_the_standard_descriptors, raise_a_storm};
pub use system_calls::{
    Strace, calls_can_fail, fail_each_call_of_a_heartbeat, fail_each_call_of_a_table,
    fail_each_call_of_a_takeover, fail_flock_on_a_new_file, fail_flock_with_other_holder,
};

/// Makes a module `$module` with a test for every case, for one kind of lock.
#[macro_export]
macro_rules! fault_injection {
    ($module:ident, $kind:expr) => {
        $crate::fault_injection!($module, $kind;
            file_size_limit_fails_or_has_no_effect,
            process_killed_by_file_size_limit_holds_nothing,
            process_limit_fails_or_has_no_effect,
            full_file_system_fails_or_has_no_effect,
            read_only_file_system_fails_or_has_no_effect,
            unwritable_directory_fails_or_has_no_effect,
            waiter_under_signals_acquires_times_out_and_recovers,
            processes_under_signals_lose_no_count,
            lock_on_standard_descriptors_excludes_others,
            lock_has_crash_point_between_any_two_changes,
            c7_drop_after_close_range_keeps_other_files,
            c7_lock_after_close_range_excludes_others,
            c7_token_after_close_range_still_cancels,
            c7_drop_of_closed_guard_keeps_next_lock,
            failed_system_call_without_contention_recovers,
            failed_system_call_during_handover_recovers,
        );
    };
    ($module:ident, $kind:expr; $($case:ident,)*) => {
        mod $module {
            $(#[test]
            fn $case() {
                $crate::fault_injection::$case($kind);
            })*
        }
    };
}
