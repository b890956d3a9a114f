//! What the tests of servers count on.

#![cfg(target_os = "linux")]

use std::path::Path;
use std::process::{Command, Stdio};

use lockkit_tests::{program, until};

#[test]
fn warden_removes_processes_and_directory_when_test_ends() {
    let base = tempfile::tempdir().unwrap();
    let directory = base.path().join("server");
    std::fs::create_dir(&directory).unwrap();
    // As a process of PostgreSQL's: in a session of its own, and stopped by a test that did not get to let it go on.
    let pid = directory.join("pid");
    let script = format!("setsid sh -c 'echo $$ >{}; kill -STOP $$' & exec sleep 600", pid.display());
    let mut warden = Command::new(program("warden"));
    warden.arg(&directory).args(["sh", "-c", &script]).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut warden = warden.spawn().unwrap();
    let mut stopped = String::new();
    until("it is stopped", || {
        stopped = std::fs::read_to_string(&pid).unwrap_or_default().trim().to_owned();
        let stat = std::fs::read_to_string(format!("/proc/{stopped}/stat")).unwrap_or_default();
        stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" T"))
    });
    // As when the test's process ends, however it does.
    drop(warden.stdin.take());
    assert!(warden.wait().unwrap().success());
    assert!(!Path::new("/proc").join(&stopped).exists());
    assert!(!directory.exists());
}
