//! Runs the example, and checks its output.

mod common;

use std::time::{Duration, Instant};

use common::output_of;

/// The time limit of the example on a busy machine. It takes a little more than its TTL of 2 s.
const MAX_RUN_TIME: Duration = Duration::from_secs(30);

/// Parses a line into the leader, its token, and the rest.
fn leads(line: &str) -> (&str, u64, &str) {
    let (pid, rest) = line
        .split_once(" leads with token ")
        .unwrap_or_else(|| panic!("the line names no leader: {line:?}"));
    let (token, rest) = rest.split_once(';').unwrap_or((rest, ""));
    (pid, token.parse().unwrap(), rest)
}

#[test]
fn killed_leader_is_replaced_and_stopped_leader_is_fenced() {
    let start = Instant::now();
    let output = output_of("leader", &[]);
    assert!(start.elapsed() < MAX_RUN_TIME, "{:?}", start.elapsed());

    let mut lines = output.lines();
    let mut next = || lines.next().expect("the example prints another line");
    let (first, token, recovered) = leads(next());
    assert_eq!(recovered, "", "there was no earlier leader");
    for number in 1..=3 {
        assert_eq!(
            next(),
            format!("the resource accepts {number} with token {token}")
        );
    }
    assert_eq!(next(), format!("{first} is killed"));

    let (second, old, recovered) = leads(next());
    assert!(old > token);
    assert!(
        recovered.starts_with(&format!(
            " the previous leader did not release: pid {first} (leader)"
        )),
        "{recovered:?}"
    );
    for number in 4..=6 {
        assert_eq!(
            next(),
            format!("the resource accepts {number} with token {old}")
        );
    }
    assert_eq!(next(), format!("{second} is stopped"));

    let (third, new, recovered) = leads(next());
    assert!(new > old);
    assert!(third != first && third != second);
    assert!(
        recovered.starts_with(&format!(
            " the previous leader did not release: pid {second} (leader)"
        )),
        "{recovered:?}"
    );
    for number in 7..=9 {
        assert_eq!(
            next(),
            format!("the resource accepts {number} with token {new}")
        );
    }
    assert_eq!(next(), format!("{second} continues"));
    assert_eq!(
        next(),
        format!("the resource refuses 7 with token {old}: it has seen {new}")
    );
    assert_eq!(next(), format!("{second} is refused"));
    let lost = next();
    assert!(
        lost.starts_with(&format!("{second} does not lead any more: ")),
        "{lost:?}"
    );
    assert!(
        lost.ends_with("is lost: it was not renewed in time"),
        "{lost:?}"
    );
    assert_eq!(next(), "the number is 9, and no count was lost");
    assert_eq!(lines.next(), None);
}
