//! Every case of fault injection, for every kind of lock that processes share.

#![cfg(target_os = "linux")]

use std::time::Duration;

use lockkit::NamedLock;
use lockkit_tests::leases::Terms;
use lockkit_tests::realtime::RealTime;
use lockkit_tests::{Actor, Spec, crash_points, fault_injection};

fault_injection!(named_socket, lockkit_tests::Kind::NAMED_SOCKET);
fault_injection!(machine_socket, lockkit_tests::Kind::MACHINE_SOCKET);
fault_injection!(named_file, lockkit_tests::Kind::NAMED_FILE);
fault_injection!(machine_file, lockkit_tests::Kind::MACHINE_FILE);
fault_injection!(file, lockkit_tests::Kind::FILE);
fault_injection!(file_shared, lockkit_tests::Kind::FILE_SHARED);
fault_injection!(pidfile, lockkit_tests::Kind::PIDFILE);
fault_injection!(lease, lockkit_tests::Kind::LEASE);
fault_injection!(shm_lock, lockkit_tests::Kind::SHM);
fault_injection!(directory_lock, lockkit_tests::Kind::DIRECTORY);

// The suite's own cases of this sort, for the kind that the suite leaves out.
lockkit_tests::conformance!(machine_file_of_the_suite, lockkit_tests::Kind::MACHINE_FILE;
    acquire_without_free_descriptor_fails_then_recovers,
    crash_at_any_step_does_not_block_next_holder,
    chaos_of_kills_and_stops_keeps_exclusion,
);

#[test]
fn manager_has_crash_point_between_any_two_changes() {
    use lockkit_tests::managers::Kind::{Directory, Shm};
    for kind in [Shm, Directory] {
        let table = kind.fresh();
        let mut player = Actor::start_at(&table);
        player.expect(&format!("kill-at {}", usize::MAX), "armed");
        crash_points::stand_between_changes_of(
            &mut player,
            &["open", "allocate", "try 0", "release 0", "free 0"],
        );
        let mut taker = Actor::start_at(&table);
        taker.expect("allocate-at 3", "allocated 3");
        taker.expect("lock 3", "held");
        taker.kill();
        crash_points::stand_between_changes_of(&mut player, &["lock 3", "free 3", "release 3"]);
        table.clean();
    }
}

#[test]
fn takeover_and_renewal_have_crash_points_between_changes() {
    let directory = tempfile::tempdir().unwrap();
    let terms = Terms::of(directory.path().join("deep").join("lease"));
    let mut player = Actor::start_lease(&terms);
    player.expect(&format!("kill-at {}", usize::MAX), "armed");
    crash_points::stand_between_changes_of(&mut player, &["try", "release"]);
    let mut dies = Actor::start_lease(&terms);
    assert!(dies.ask("try").starts_with("held "));
    dies.kill();
    crash_points::stand_between_changes_of(&mut player, &["lock"]);
    // Heartbeats continue meanwhile, as many as fall into this time.
    crash_points::stand_between_changes_of_the_others(&mut player);

    let spec = Spec::parse(&format!(
        "pidfile:{}",
        directory.path().join("pid").display()
    ));
    let mut dies = Actor::start(&spec);
    dies.expect("lock", "held");
    dies.kill();
    crash_points::stand_between_changes_at(&spec, "alone");
}

#[test]
fn failed_system_call_of_table_use_recovers() {
    use lockkit_tests::managers::Kind::{Directory, Shm};
    for kind in [Shm, Directory] {
        fault_injection::fail_each_call_of_a_table(kind);
    }
}

#[test]
fn failed_system_call_of_takeover_recovers() {
    fault_injection::fail_each_call_of_a_takeover();
}

#[test]
fn c4_fork_on_one_processor_waits_for_claims() {
    let name = lockkit_tests::fresh_name("lockkit-test-realtime");
    let Some(mut process) = RealTime::start("fork", &name) else {
        return;
    };
    let longest = process.longest();
    assert!(longest < Duration::from_secs(1), "a fork took {longest:?}");
    // Its children live.
    let lock = NamedLock::new(&name).unwrap();
    lock.try_lock().unwrap().release().unwrap();
    drop(process);
    Spec::parse(&format!("named-socket:{name}")).clean();
}

#[test]
fn c4_lock_on_one_processor_waits_for_forks() {
    let name = lockkit_tests::fresh_name("lockkit-test-realtime");
    let Some(mut process) = RealTime::start("lock", &name) else {
        return;
    };
    let longest = process.longest();
    assert!(
        longest < Duration::from_secs(1),
        "a free lock took {longest:?}"
    );
    drop(process);
    Spec::parse(&format!("named-socket:{name}")).clean();
}

#[test]
fn a7_failed_flock_keeps_file_of_other_holder() {
    for error in ["ENOLCK", "ENOMEM", "EIO", "EPERM", "EINVAL", "EBADF"] {
        fault_injection::fail_flock_with_other_holder(error);
    }
}

#[test]
fn a7_unsupported_flock_removes_own_new_file() {
    for error in ["ENOSYS", "EOPNOTSUPP"] {
        fault_injection::fail_flock_on_a_new_file(error);
    }
}

#[test]
fn failed_system_call_of_heartbeat_recovers() {
    fault_injection::fail_each_call_of_a_heartbeat();
}
