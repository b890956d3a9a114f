//! Runs the example on a lease in a file; on servers the same lease is tested in the package `tests`.

mod common;

use std::process::{Command, Output};

use common::example;

fn run(arguments: &[&str]) -> Output {
    Command::new(example("leader_engine")).args(arguments).output().unwrap()
}

#[test]
fn leaders_follow_each_other_with_greater_tokens() {
    let lease = std::env::temp_dir().join(format!("lockkit-example-leader-engine-{}", std::process::id()));
    let url = format!("file://{}", lease.display());
    let tokens = [(); 2].map(|()| {
        let output = run(&[&url, "20ms"]);
        let said = String::from_utf8(output.stdout.clone()).unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        let lines: Vec<&str> = said.lines().collect();
        let [leads, releases] = lines[..] else { panic!("{said}") };
        assert!(releases.ends_with(" releases"), "{said}");
        leads.rsplit_once(" leads with token ").unwrap().1.parse::<u64>().unwrap()
    });
    std::fs::remove_file(lease).unwrap();
    assert!(tokens[0] < tokens[1], "{tokens:?}");
}

#[test]
fn a_url_that_is_not_right_gets_a_clear_error() {
    for (url, problem) in [("gopher://there/leader", "lockkit knows file://"), ("leader", "it has no scheme")] {
        let output = run(&[url]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains(problem), "{said}");
    }
}
