//! Prints one table of the last results of the other bench programs. Each row has the best peer,
//! and whether its bound held. `cargo bench` runs this program after the others, because its name
//! is the last.
//!
//! With `--write` it also writes `docs/BENCHMARKS.md` and the cost table in `README.md`. Run all
//! programs before, on an otherwise idle machine.

use std::fs;
use std::path::Path;
use std::process::Command;

use lockkit_benches::table;

const PROGRAMS: [&str; 8] = [
    "uncontended",
    "contended",
    "managers",
    "leases",
    "engines",
    "command",
    "memory",
    "tracing",
];

/// The rows that README.md shows, and the name of each operation there.
const COSTS: [(&str, &str); 14] = [
    ("Instance", "`Instance`, the first"),
    ("NamedLock", "`NamedLock`"),
    ("FileLock", "`FileLock`"),
    ("PidFile", "`PidFile`"),
    ("acquire and release, on disk", "`Lease::file`"),
    ("etcd: acquire and release", "`Lease` on etcd"),
    ("postgres: acquire and release", "`Lease` on PostgreSQL"),
    ("redis: acquire and release", "`Lease` on Redis"),
    (
        "1000 times lock and unlock",
        "`ShmLockManager`'s lock, 1000 times",
    ),
    ("FileLockManager's lock", "`FileLockManager`'s lock"),
    ("InMemoryLockManager's lock", "`InMemoryLockManager`'s lock"),
    (
        "NamedLock, hand-over, median",
        "`NamedLock`, given to a waiting process",
    ),
    (
        "NamedLock, after SIGKILL of the holder, median",
        "`NamedLock`, taken over from a killed process",
    ),
    (
        "lockkit run --name, start of the program",
        "`lockkit run --name`, until the program has run",
    ),
];
/// The markers around the table in README.md.
const COST_MARKERS: [&str; 2] = [
    "<!-- Costs, written by the bench `summary`. -->\n",
    "<!-- End of the costs. -->\n",
];
/// The beginning of the first of these markers. `--write` replaces the rest of its line.
const COST_MARKER: &str = "<!-- Costs,";
/// The markers around the handwritten reading notes in docs/BENCHMARKS.md, which are preserved.
const HANDWRITTEN_MARKERS: [&str; 2] = [
    "<!-- Written by hand. -->\n",
    "<!-- End of what is written by hand. -->\n",
];

fn main() {
    let rows: Vec<_> = PROGRAMS.into_iter().flat_map(table::stored_rows).collect();
    if rows.is_empty() {
        println!("no rows are stored yet; run `cargo bench -p lockkit-benches`");
        return;
    }
    println!("\n{}", table::plain(&rows));
    let count = |verdict: &str| rows.iter().filter(|row| row[6] == verdict).count();
    println!(
        "{} bounds held, {} behind, {} rows without a bound\n",
        count("held"),
        count("behind"),
        count("-")
    );
    if std::env::args().any(|argument| argument == "--write") {
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/BENCHMARKS.md");
        let text = fs::read_to_string(&page).expect("BENCHMARKS.md exists");
        let by_hand = text
            .split_once(HANDWRITTEN_MARKERS[0])
            .and_then(|(_, after)| after.split_once(HANDWRITTEN_MARKERS[1]));
        let by_hand = by_hand.expect("BENCHMARKS.md has its markers").0;
        let written = format!(
            "{}{}{by_hand}{}\n{}",
            introduction(),
            HANDWRITTEN_MARKERS[0],
            HANDWRITTEN_MARKERS[1],
            table::markdown(&rows)
        );
        fs::write(&page, written).expect("BENCHMARKS.md can be written");
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
        let text = fs::read_to_string(&page).expect("README.md exists");
        let (before, _) = text
            .split_once(COST_MARKER)
            .expect("README.md has its markers");
        let (_, after) = text
            .split_once(COST_MARKERS[1])
            .expect("README.md has its markers");
        let written = format!(
            "{before}{}{}{}{after}",
            COST_MARKERS[0],
            costs(&rows),
            COST_MARKERS[1]
        );
        fs::write(&page, written).expect("README.md can be written");
    }
}

/// Returns the table for README.md: for each row our time, and its ratio to each peer's time.
fn costs(rows: &[[String; 7]]) -> String {
    let mut table = "| what | time | ratio | row |\n|---|--:|---|---|\n".to_owned();
    for (name, what) in COSTS {
        let named = || rows.iter().filter(move |row| row[0] == name);
        let Some([_, ours, ..]) = named().next() else {
            continue;
        };
        let peers = named()
            .filter(|row| row[4] != "-")
            .map(|row| format!("{} × {}", row[4], row[2]));
        table += &format!(
            "| {what} | {ours} | {} | {name} |\n",
            peers.collect::<Vec<_>>().join("; ")
        );
    }
    table
}

fn introduction() -> String {
    let first = |path: &str, key: &str| {
        let text = fs::read_to_string(path).unwrap_or_default();
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(key))
            .unwrap_or("?");
        value.trim_start_matches(['\t', ' ', ':']).to_owned()
    };
    let output = |program: &str, argument: &[&str]| {
        let output = Command::new(program).args(argument).output();
        output.map_or("?".to_owned(), |output| {
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        })
    };
    format!(
        "# Benchmarks\n\n\
         The output of `cargo bench -p lockkit-benches` on {}, on {} cores of {} with Linux {} and {}. Both numbers of a \
         ratio are from one run, measured in alternation. A bound applies to the ratio, or to our number if the bound \
         has a unit. Rows without a bound are for information. To measure again and rewrite this page, run\n\n\
         ```\ncargo bench -p lockkit-benches\ncargo bench -p lockkit-benches --bench summary -- --write\n```\n\n\
         on an otherwise idle machine. The head of each program in `benches/benches` describes what it measures.\n\n",
        output("date", &["-u", "+%Y-%m-%d"]),
        std::thread::available_parallelism().map_or(1, usize::from),
        first("/proc/cpuinfo", "model name"),
        // The builder's suffix is removed.
        first("/proc/sys/kernel/osrelease", "")
            .splitn(3, '.')
            .take(2)
            .collect::<Vec<_>>()
            .join("."),
        output("rustc", &["--version"]),
    )
}
