//! Runs the example: its first worker dies inside account 2, and a later guard must report it.

mod common;

use common::output_of;

#[test]
fn lock_table_example_reports_death_and_ends_unlocked() {
    let output = output_of("lock_table", &[]);
    let lines = |part: &str| output.lines().filter(|line| line.contains(part)).count();
    assert_eq!(
        lines("checks account 2: the last holder died inside: pid "),
        1,
        "{output}"
    );
    assert_eq!(lines("checks account"), 1, "{output}");
    assert_eq!(lines("a worker ended: exit status: 0"), 2, "{output}");
    assert_eq!(
        output.lines().last(),
        Some("1020 of 1024 locks are left, 0 are held"),
        "{output}"
    );
}
