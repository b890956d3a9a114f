//! Guarantees that the tests of servers depend on.

#![cfg(target_os = "linux")]

use std::path::Path;
use std::process::{Command, Stdio};

use lockkit_tests::{program, until};

#[test]
fn warden_removes_processes_and_directory_when_test_ends() {
    let base = tempfile::tempdir().unwrap();
    let directory = base.path().join("server");
    std::fs::create_dir(&directory).unwrap();
    // This process is like one of PostgreSQL: in a session of its own, and stopped by a test that
    // ended before it continued the process.
    let pid = directory.join("pid");
    let script = format!(
        "setsid sh -c 'echo $$ >{}; kill -STOP $$' & exec sleep 600",
        pid.display()
    );
    let mut warden = Command::new(program("warden"));
    warden
        .arg(&directory)
        .args(["sh", "-c", &script])
        .stdin(Stdio::piped())
        .stdout(Stdio::null());
    let mut warden = warden.spawn().unwrap();
    let mut stopped = String::new();
    until("it is stopped", || {
        stopped = std::fs::read_to_string(&pid)
            .unwrap_or_default()
            .trim()
            .to_owned();
        let stat = std::fs::read_to_string(format!("/proc/{stopped}/stat")).unwrap_or_default();
        stat.rsplit(')')
            .next()
            .is_some_and(|rest| rest.starts_with(" T"))
    });
    // The pipe closes in the same way when the test's process ends for any reason.
    drop(warden.stdin.take());
    assert!(warden.wait().unwrap().success());
    assert!(!Path::new("/proc").join(&stopped).exists());
    assert!(!directory.exists());
}
