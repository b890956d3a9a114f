//! Drills for leases on servers: faults of the server, the connection and the holder, with real
//! ones of each.
//!
//! An engine gets its drills by an [`Engine`], which starts its servers, and a line
//! `drills!(module, Type);` in a file of `tests/tests`. Each drill starts a server of its own from
//! the installed software. Where none is installed, the drill prints `left out:`, its name and the
//! reason, and passes.
//!
//! A [`Proxy`] between the client and the server causes the faults of a connection. It counts the
//! bytes that it forwards, and cuts connections at any chosen byte.

mod certificates;
mod clock;
mod connections;
mod engine;
pub mod etcd;
mod failures;
mod fixture;
mod holders;
pub mod postgres;
mod proxy;
pub mod redis;
mod requests;
mod waiters;

pub use certificates::Certificates;
pub use clock::Clock;
pub use connections::*;
pub use engine::{Access, Engine, PASSWORD, Security, USER};
pub use failures::*;
pub use fixture::until_quiet;
pub use holders::*;
pub use proxy::{Direction, Proxy};
pub use requests::*;
pub use waiters::*;

/// Makes a module `$module` with a test for every drill, for one [`Engine`].
#[macro_export]
macro_rules! drills {
    ($module:ident, $engine:ty) => {
        $crate::drills!($module, $engine;
            killed_local_holder_is_taken_over_at_once,
            status_of_dead_holder_reports_no_time_left,
            silent_remote_holder_expires_and_next_guard_reports_it,
            release_after_takeover_wakes_remote_waiter,
            holder_stopped_beyond_ttl_sees_loss_on_resume,
            server_frozen_within_ttl_keeps_lease,
            server_frozen_beyond_ttl_reports_one_loss_in_time,
            late_grant_of_timed_out_waiter_is_freed,
            acquire_after_timed_out_waiter_reports_dead_holder,
            server_restart_keeps_leases_and_growing_tokens,
            acquire_cut_anywhere_gets_same_grant,
            renew_cut_anywhere_keeps_lease,
            release_cut_anywhere_frees_name,
            status_and_evict_cut_anywhere_can_be_repeated,
            cut_of_distant_connection_keeps_lease,
            waiter_sends_no_request_until_release_wakes_it,
            waiter_cut_anywhere_is_woken_by_release,
            waiter_with_retries_survives_server_restart,
            cancelled_server_waiter_returns_at_once,
            many_leases_share_few_connections,
            forked_child_opens_own_connections,
            wrong_password_error_names_password,
            wrong_database_error_names_database,
            lease_over_tls_with_or_without_certificate_works,
            tls_mismatch_error_names_cause,
            too_old_server_error_names_cause,
            silent_address_fails_within_time_limit,
            failover_without_grant_gives_second_greater_token,
            stepped_server_clock_keeps_tokens_growing,
            clock_stepped_ahead_grants_with_greater_token,
            stopped_holder_never_overlaps_next_holder,
        );
    };
    ($module:ident, $engine:ty; $($drill:ident,)*) => {
        mod $module {
            $(#[test]
            fn $drill() {
                if let Err(why) = $crate::server_conformance::$drill::<$engine>() {
                    $crate::left_out(why);
                }
            })*
        }
    };
}
