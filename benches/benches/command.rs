//! Measures how soon the command `lockkit` starts a program under a lock, in comparison with
//! flock(1). The time runs from just before the start of the command to the time that `date`
//! prints. Our starts and the peer's starts alternate.
//!
//! The bench builds the command first, because this package cannot depend on a program.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use lockkit_benches::arguments;
use lockkit_benches::table::{self, Bound, Row, Value};

fn main() {
    let filter = arguments::filter();
    if !"command/start".contains(&filter) {
        return;
    }
    let _exclusive = lockkit_benches::exclusive_run();
    let rounds = if arguments::is_quick() { 5 } else { 300 };
    let (lockkit, directory) = (built(), tempfile::tempdir().expect("a directory"));
    let file = |name: &str| directory.path().join(name).display().to_string();
    let flock = run("flock", &[&file("file")]);
    if start(&flock).is_none() {
        println!("left out: there is no flock(1) on this machine");
        return;
    }
    let run_under = |lock: &[&str]| {
        let arguments: Vec<&str> = ["run"].iter().chain(lock).chain(&["--"]).copied().collect();
        run(lockkit.to_str().expect("its path is text"), &arguments)
    };
    let ours = [
        (
            "lockkit flock FILE",
            run(
                lockkit.to_str().expect("its path is text"),
                &["flock", &file("file")],
            ),
        ),
        ("lockkit run --file", run_under(&["--file", &file("file")])),
        (
            "lockkit run --name",
            run_under(&["--name", "lockkit-bench-command"]),
        ),
        (
            "lockkit run --pidfile",
            run_under(&["--pidfile", &file("pid")]),
        ),
        (
            "lockkit run --lease",
            run_under(&["--lease", &file("lease")]),
        ),
    ];
    let mut times: Vec<[Vec<Duration>; 2]> =
        ours.iter().map(|_| [Vec::new(), Vec::new()]).collect();
    for _ in 0..rounds {
        for ((_, ours), [mine, theirs]) in ours.iter().zip(&mut times) {
            mine.push(start(ours).expect("it starts"));
            theirs.push(start(&flock).expect("it starts"));
        }
    }
    let rows: Vec<Row> = ours
        .iter()
        .zip(times)
        .map(|((name, _), times)| {
            let [ours, theirs] = times.map(|mut times| Value::Time(table::median(&mut times)));
            let name = format!("{name}, start of the program");
            Row {
                name,
                ours,
                peer: "flock(1)",
                theirs,
                bound: Bound::Ratio(1.5),
            }
        })
        .collect();
    table::print(&rows);
}

/// Builds the command with the same profile as for users, and returns its path.
fn built() -> PathBuf {
    let program = std::env::current_exe().expect("the program has a path");
    let target = program
        .ancestors()
        .find(|directory| directory.ends_with("release"))
        .and_then(Path::parent);
    let target = target.expect("benches are built in release mode");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args([
        "build",
        "--quiet",
        "--release",
        "--package",
        "lockkit-cli",
        "--bin",
        "lockkit",
    ]);
    cargo
        .arg("--target-dir")
        .arg(target)
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    assert!(
        cargo.status().expect("cargo is there").success(),
        "the command could not be built"
    );
    target.join("release/lockkit")
}

/// Returns the words of a command: the program, its arguments, and the program that it starts.
fn run(program: &str, arguments: &[&str]) -> Vec<String> {
    [program]
        .iter()
        .chain(arguments)
        .chain(&["date", "+%s%N"])
        .map(|&word| word.to_owned())
        .collect()
}

/// Measures the time until `date` runs. Returns `None` if the program is not installed.
fn start(words: &[String]) -> Option<Duration> {
    let begun = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .expect("a clock after 1970");
    let output = Command::new(&words[0]).args(&words[1..]).output().ok()?;
    let said = String::from_utf8(output.stdout).expect("digits");
    let ran = Duration::from_nanos(
        said.trim()
            .parse()
            .unwrap_or_else(|_| panic!("{words:?} said {said:?}")),
    );
    Some(ran.saturating_sub(begun))
}
