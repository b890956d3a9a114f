//! One table of what the other bench programs found when they ran last: each row with the best peer, and whether its
//! bound held. `cargo bench` runs it after them, for its name is the last.
//!
//! With `--write` it also writes `docs/BENCHMARKS.md`; run all programs before, on a machine that does nothing else.

use std::fs;
use std::path::Path;
use std::process::Command;

use lockkit_benches::table;

const PROGRAMS: [&str; 8] =
    ["uncontended", "contended", "managers", "leases", "engines", "command", "memory", "tracing"];

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
        fs::write(&page, format!("{}{}", introduction(), table::markdown(&rows))).expect("the page can be written");
    }
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
        first("/proc/sys/kernel/osrelease", ""),
        output("rustc", &["--version"]),
    )
}
