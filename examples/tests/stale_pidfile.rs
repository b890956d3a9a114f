//! Runs the example on a directory with one pidfile of each sort.

mod common;

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use common::example;
use lockkit::PidFile;

/// Sets the time further back than the clocks of a file and a process may differ.
fn set_old_time(path: &Path) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(120))
        .unwrap();
}

#[test]
fn stale_pidfile_example_explains_each_file() {
    let directory = std::env::temp_dir().join(format!(
        "lockkit-example-stale-pidfile-{}",
        std::process::id()
    ));
    fs::create_dir_all(directory.join("below")).unwrap();
    let mut daemon = Command::new("sleep")
        .arg("600")
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let write = |name: &str, text: String| fs::write(directory.join(name), text).unwrap();
    let held = PidFile::new(directory.join("below/held.pid"))
        .unwrap()
        .lock()
        .unwrap();
    write("alive.pid", format!("{}\n", daemon.id()));
    write("dead.pid", "4194304\n".to_owned());
    write("reused.pid", format!("{}\n", daemon.id()));
    set_old_time(&directory.join("reused.pid"));
    write("invalid.pid", "x12 \u{1b}x\n".to_owned());
    write("notes.txt", "1\n".to_owned());
    write("blank\u{1b}.pid", "\n".to_owned());

    let output = Command::new(example("stale_pidfile"))
        .arg(&directory)
        .output()
        .unwrap();
    let table = String::from_utf8(output.stdout).unwrap();
    println!("{table}");
    let lines: Vec<Vec<&str>> = table
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let (me, daemon_pid) = (std::process::id().to_string(), daemon.id().to_string());
    let line = |name: &str| {
        let path = directory.join(name).display().to_string();
        lines
            .iter()
            .find(|line| line[0] == path)
            .unwrap_or_else(|| panic!("no line for {name}"))
    };
    assert_eq!(lines[0], ["PATH", "PID", "PROGRAM", "STATE", "WHY"]);
    assert_eq!(line("below/held.pid")[1], me);
    assert_eq!(line("below/held.pid")[3], "alive");
    assert_eq!(
        line("alive.pid")[1..4],
        [daemon_pid.as_str(), "sleep", "alive"]
    );
    assert_eq!(line("dead.pid")[1..4], ["4194304", "-", "stale"]);
    assert_eq!(line("invalid.pid")[1..4], ["-", "-", "invalid"]);
    assert_eq!(line("blank?.pid")[1..4], ["-", "-", "blank"]);
    assert!(!table.contains('\u{1b}') && !table.contains("notes.txt"));
    let uptime = fs::read_to_string("/proc/uptime").unwrap();
    match uptime.split('.').next().unwrap().parse::<u64>().unwrap() {
        0..300 => common::left_out("the system started so recently that the file would seem older"),
        _ => assert_eq!(
            line("reused.pid")[1..4],
            [daemon_pid.as_str(), "-", "reused"]
        ),
    }
    assert_eq!(lines.len(), 7);
    assert_eq!(output.status.code(), Some(1));

    daemon.kill().unwrap();
    daemon.wait().unwrap();
    drop(held);
    fs::remove_dir_all(directory).unwrap();
}
