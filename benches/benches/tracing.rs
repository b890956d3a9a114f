//! Measures the cost of the feature `tracing` for a free lock while no subscriber is installed.
//!
//! A build of the library either has the feature or does not. So this bench builds the program
//! `cycle` twice and lets the two processes acquire and release a lock in short alternating blocks.
//! The table shows the medians of the blocks.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use lockkit_benches::arguments;
use lockkit_benches::table::{self, Bound, Row, Value};

fn main() {
    let filter = arguments::filter();
    if !"tracing/cost".contains(&filter) {
        return;
    }
    let _exclusive = lockkit_benches::exclusive_run();
    let blocks = if arguments::is_quick() { 20 } else { 1000 };
    let programs = [built("with"), built("without")];
    let directory = tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .expect("a directory");
    let path = |name: &str| directory.path().join(name).display().to_string();
    let locks = [
        (
            "NamedLock",
            "named",
            "lockkit-bench-tracing".to_owned(),
            200,
        ),
        ("FileLock", "file", path("file"), 1000),
        ("ShmLockManager", "shm", path("table"), 50_000),
    ];
    let rows: Vec<Row> = locks
        .into_iter()
        .map(|(title, kind, place, count)| {
            // Each process has the processor to itself while the other process waits for its turn.
            let mut cycles = programs
                .each_ref()
                .map(|program| Cycle::start(program, kind, &place));
            let mut times = [Vec::new(), Vec::new()];
            for block in 0..blocks {
                // The first side changes with each block, because a machine may slow down in step
                // with the turns.
                for side in [block % 2, 1 - block % 2] {
                    times[side].push(cycles[side].block(count));
                }
            }
            let [ours, theirs] = times.map(|mut times| Value::Time(table::median(&mut times)));
            let name = format!("{title}, 1000 times, with the feature tracing and no subscriber");
            Row {
                name,
                ours,
                peer: "without the feature",
                theirs,
                bound: Bound::Ratio(1.03),
            }
        })
        .collect();
    table::print(&rows);
}

/// A process that acquires and releases a lock.
struct Cycle {
    child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Cycle {
    fn start(program: &Path, kind: &str, place: &str) -> Self {
        let mut command = Command::new(program);
        command
            .args([kind, place])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().expect("the program starts");
        let commands = child.stdin.take().expect("a pipe");
        let answers = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut cycle = Self {
            child,
            commands,
            answers,
        };
        cycle.block(10);
        cycle
    }

    /// Returns the duration of a thousand cycles, measured on `count` cycles.
    fn block(&mut self, count: u32) -> Duration {
        writeln!(self.commands, "{count}").expect("it reads");
        let mut answer = String::new();
        self.answers.read_line(&mut answer).expect("it answers");
        Duration::from_nanos(answer.trim().parse().expect("nanoseconds"))
            .mul_f64(1000.0 / f64::from(count))
    }
}

impl Drop for Cycle {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Builds the program `cycle`, `with` the feature or `without`.
fn built(how: &str) -> PathBuf {
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
        "lockkit-benches",
        "--bin",
        "cycle",
    ]);
    if how == "with" {
        cargo.args(["--features", "tracing"]);
    }
    cargo
        .arg("--target-dir")
        .arg(target)
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    assert!(
        cargo.status().expect("cargo is there").success(),
        "the program could not be built"
    );
    // The next build overwrites the program.
    let copy = target.join(format!("release/cycle-{how}"));
    std::fs::copy(target.join("release/cycle"), &copy).expect("the program can be copied");
    copy
}
