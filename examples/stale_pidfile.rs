//! Walks a directory (/run by default), and prints for each pidfile whether its process is alive,
//! and why.
//!
//! ```text
//! $ cargo run --example stale_pidfile -- /run
//! PATH                PID   PROGRAM  STATE   WHY
//! /run/crond.pid      812   cron     alive   runs: pid 812 (cron), since 2026-11-20 17:03:11 UTC (3 h 2 min ago)
//! ```
//! It changes nothing and disturbs no process. It exits with 1 when it finds a pidfile that is not
//! alive, and with 2 when it cannot read the directory.

use std::error::Error;
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use lockkit::{Liveness, Owner, PidFile, PidStatus};

/// One line of the table.
type Row = [String; 5];

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let directory = std::env::args_os()
        .nth(1)
        .map_or("/run".into(), PathBuf::from);
    let mut files = Vec::new();
    if let Err(error) = find(&std::path::absolute(&directory)?, &mut files) {
        eprintln!("{}: {error}", directory.display());
        return Ok(ExitCode::from(2));
    }
    files.sort();
    let rows: Vec<Row> = files.iter().filter_map(|path| row(path)).collect();
    print(&rows)?;
    Ok(ExitCode::from(u8::from(
        rows.iter().any(|[_, _, _, state, _]| state != "alive"),
    )))
}

/// Collects the pidfiles below `directory`, without following links.
fn find(directory: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let Ok(kind) = fs::symlink_metadata(&path) else {
            continue;
        };
        if kind.is_dir() {
            if let Err(error) = find(&path, files) {
                eprintln!("{}: {error}", path.display());
            }
        } else if kind.is_file() && path.extension().is_some_and(|extension| extension == "pid") {
            files.push(path);
        }
    }
    Ok(())
}

/// Returns the row for the pidfile `path`; `None` if the file is gone by now.
fn row(path: &Path) -> Option<Row> {
    let line = |owner: Option<&Owner>, state: &str, why: String| {
        let pid = owner.map_or("-".to_owned(), |owner| owner.pid().to_string());
        let program = owner
            .and_then(Owner::program)
            .unwrap_or("-")
            .escape_debug()
            .to_string();
        Some([
            path.display().to_string().replace(char::is_control, "?"),
            pid,
            program,
            state.to_owned(),
            why,
        ])
    };
    match PidFile::inspect(path) {
        Ok(PidStatus::Absent) => None,
        Ok(PidStatus::Running(owner)) => {
            let why = match owner.liveness() {
                Liveness::Unknown => {
                    "belongs to another host or pid namespace, so it counts as alive".to_owned()
                }
                _ => format!("runs: {}", owner.describe()),
            };
            line(Some(&owner), "alive", why)
        }
        Ok(PidStatus::Stale(owner)) => match Owner::of(owner.pid()) {
            Some(later) => {
                let program = later.program().unwrap_or("another program").escape_debug();
                line(
                    Some(&owner),
                    "reused",
                    format!("its process has ended, and the pid is {program}'s now"),
                )
            }
            None => line(Some(&owner), "stale", "its process has ended".to_owned()),
        },
        Ok(PidStatus::Locked) => line(
            None,
            "alive",
            "a process has it locked that cannot be seen from here".to_owned(),
        ),
        Ok(PidStatus::Blank { age, .. }) => {
            line(None, "blank", format!("written {} s ago", age.as_secs()))
        }
        Ok(PidStatus::Invalid { rule }) => line(
            None,
            "invalid",
            format!("it begins with \"{}\", and {rule}", beginning(path)),
        ),
        Err(error) => {
            let source = error
                .source()
                .map(|source| format!(": {source}"))
                .unwrap_or_default();
            line(None, "unknown", format!("{error}{source}"))
        }
    }
}

/// Returns the first bytes of a file, escaped for a terminal.
fn beginning(path: &Path) -> String {
    let mut bytes = Vec::new();
    // If the file cannot be read any more, the result is empty.
    let _ = fs::File::open(path).and_then(|file| file.take(20).read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).escape_debug().to_string()
}

fn print(rows: &[Row]) -> io::Result<()> {
    let head = ["PATH", "PID", "PROGRAM", "STATE", "WHY"].map(str::to_owned);
    let mut widths = [0; 4];
    for row in [&head].into_iter().chain(rows) {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut out = io::stdout().lock();
    for [path, pid, program, state, why] in [&head].into_iter().chain(rows) {
        let [a, b, c, d] = widths;
        writeln!(
            out,
            "{path:<a$}  {pid:>b$}  {program:<c$}  {state:<d$}  {why}"
        )?;
    }
    Ok(())
}
