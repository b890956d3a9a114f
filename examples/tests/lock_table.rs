//! Runs the example: its first worker dies inside account 2, and a later guard must report it.

mod common;

use common::said_by;

#[test]
fn lock_table_example_reports_death_and_ends_unlocked() {
    let told = said_by("lock_table", &[]);
    let lines = |part: &str| told.lines().filter(|line| line.contains(part)).count();
    assert_eq!(lines("checks account 2, for its last owner died inside: pid "), 1, "{told}");
    assert_eq!(lines("checks account"), 1, "{told}");
    assert_eq!(lines("a worker ended: exit status: 0"), 2, "{told}");
    assert_eq!(told.lines().last(), Some("1020 of 1024 locks are left, 0 are held"), "{told}");
}
