//! Leases on files: every case of the suite, and cases of their own.

mod acquire;
mod clock;
mod damage;
mod faults;
#[cfg(target_os = "linux")]
mod files;
mod fixture;
mod store;
mod takeover;

lockkit_tests::conformance!(file_lease, lockkit_tests::Kind::LEASE);

lockkit_tests::left_out! { "needs other users, file modes, links, inotify or a failing disk, as on Linux":
    wait_after_timeout_leaves_no_inotify_watch,
    forked_child_does_not_inherit_lease,
    holder_stopped_longer_than_ttl_finds_lease_lost_at_once,
    holder_stopped_shorter_than_ttl_keeps_lease,
    lease_file_deleted_goes_to_waiter_with_greater_token,
    renew_with_io_errors_retries_until_deadline,
    lease_waiter_without_inotify_polls,
    create_race_without_linkat_has_one_winner,
    failed_record_write_without_tmpfile_leaves_no_file,
    acquire_without_heartbeat_thread_fails_and_holds_nothing,
    on_lost_without_own_thread_is_called_once_by_heartbeat,
    record_link_refused_directory_link_is_same_lease,
    acquire_file_of_other_user_refused_of_root_allowed,
    create_with_modes_applies_them_to_file_and_parents,
    a1_acquire_of_foreign_file_refused_and_keeps_it,
    a8_status_and_try_agree_on_damaged_record,
    a9_reader_stopped_at_any_call_keeps_lease,
    a9_read_of_held_lease_takes_no_flock,
    a9_status_during_stopped_write_answers,
    a10_group_mode_shares_lease_between_users,
    a11_create_parents_only_on_request,
    c13_acquire_by_200_threads_is_quick_and_exclusive,
    c13_waiters_of_one_process_served_in_order,
    c13_wait_after_timeout_or_cancel_leaks_nothing,
}
