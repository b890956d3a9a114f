//! Prints one table of the last results of the other bench programs. Each row has the best peer, and whether its bound
//! held. `cargo bench` runs this program after the others, because its name is the last.
//!
//! With `--write` it also writes `docs/BENCHMARKS.md` and the cost table in `README.md`. Run all programs before, on an
//! otherwise idle machine.

use std::fs;
use std::path::Path;
use std::process::Command;

use lockkit_benches::table;

const PROGRAMS: [&str; 8] =
    ["uncontended", "contended", "managers", "leases", "engines", "command", "memory", "tracing"];

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
    ("1000 times lock and unlock", "`ShmLockManager`'s lock, 1000 times"),
    ("FileLockManager's lock", "`FileLockManager`'s lock"),
    ("InMemoryLockManager's lock", "`InMemoryLockManager`'s lock"),
    ("NamedLock, hand-over, median", "`NamedLock`, given to a waiting process"),
    ("NamedLock, after SIGKILL of the holder, median", "`NamedLock`, taken over from a killed process"),
    ("lockkit run --name, start of the program", "`lockkit run --name`, until the program has run"),
];
/// The markers around the table in README.md.
const MARKS: [&str; 2] = ["<!-- Costs, written by the bench `verdict`. -->\n", "<!-- End of the costs. -->\n"];
/// The markers around the handwritten reading notes in docs/BENCHMARKS.md, which are preserved.
const KEPT: [&str; 2] = ["<!-- Written by hand. -->\n", "<!-- End of what is written by hand. -->\n"];

fn main() {
    let rows: Vec<_> = PROGRAMS.into_iter().flat_map(table::kept).collect();
    if rows.is_empty() {
        println!("no program has kept rows yet; run `cargo bench -p lockkit-benches`");
        return;
    }
    println!("\n{}", table::plain(&rows));
    let count = |verdict: &str| rows.iter().filter(|row| row[6] == verdict).count();
    println!("{} bounds held, {} behind, {} rows without a bound\n", count("held"), count("behind"), count("-"));
    if std::env::args().any(|argument| argument == "--write") {
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/BENCHMARKS.md");
        let text = fs::read_to_string(&page).expect("BENCHMARKS.md is there");
        let by_hand = text.split_once(KEPT[0]).and_then(|(_, behind)| behind.split_once(KEPT[1]));
        let by_hand = by_hand.expect("BENCHMARKS.md has its marks").0;
        let written = format!("{}{}{by_hand}{}\n{}", introduction(), KEPT[0], KEPT[1], table::markdown(&rows));
        fs::write(&page, written).expect("the page can be written");
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
        let text = fs::read_to_string(&page).expect("README.md is there");
        let [before, behind] = MARKS.map(|mark| text.split_once(mark).expect("README.md has its marks"));
        let written = format!("{}{}{}{}{}", before.0, MARKS[0], costs(&rows), MARKS[1], behind.1);
        fs::write(&page, written).expect("README.md can be written");
    }
}

/// Returns the table for README.md: for each row our time, and its ratio to each peer's time.
fn costs(rows: &[[String; 7]]) -> String {
    let mut table = "| what | time | beside | row |\n|---|--:|---|---|\n".to_owned();
    for (name, what) in COSTS {
        let named = || rows.iter().filter(move |row| row[0] == name);
        let Some([_, ours, ..]) = named().next() else { continue };
        let peers = named().filter(|row| row[4] != "-").map(|row| format!("{} × {}", row[4], row[2]));
        table += &format!("| {what} | {ours} | {} | {name} |\n", peers.collect::<Vec<_>>().join("; "));
    }
    table
}

fn introduction() -> String {
    let first = |path: &str, key: &str| {
        let text = fs::read_to_string(path).unwrap_or_default();
        let value = text.lines().find_map(|line| line.strip_prefix(key)).unwrap_or("?");
        value.trim_start_matches(['\t', ' ', ':']).to_owned()
    };
    let output = |program: &str, argument: &[&str]| {
        let output = Command::new(program).args(argument).output();
        output.map_or("?".to_owned(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    format!(
        "# Benchmarks\n\n\
         What `cargo bench -p lockkit-benches` printed on {}, on {} cores of {} with Linux {} and {}. Each ratio is \
         between numbers of one run, taken in turns; a bound is on the ratio, or on ours where it has a unit. Rows \
         without a bound are there for the picture. Run it again, and write this page anew, with\n\n\
         ```\ncargo bench -p lockkit-benches\ncargo bench -p lockkit-benches --bench verdict -- --write\n```\n\n\
         on a machine that does nothing else. What is measured how stands at the top of each program in \
         `benches/benches`.\n\n",
        output("date", &["-u", "+%Y-%m-%d"]),
        std::thread::available_parallelism().map_or(1, usize::from),
        first("/proc/cpuinfo", "model name"),
        // The builder's suffix is removed.
        first("/proc/sys/kernel/osrelease", "").splitn(3, '.').take(2).collect::<Vec<_>>().join("."),
        output("rustc", &["--version"]),
    )
}
