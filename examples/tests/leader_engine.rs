//! Runs the example on a lease in a file, and on a server.

mod common;

use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{example, left_out};

fn run(arguments: &[&str]) -> Output {
    Command::new(example("leader_engine"))
        .args(arguments)
        .output()
        .unwrap()
}

/// Returns the tokens of two successive leaders.
fn leads_twice(url: &str) -> [u64; 2] {
    [(); 2].map(|()| {
        let output = run(&[url, "20ms"]);
        let said = String::from_utf8(output.stdout.clone()).unwrap();
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{output:?}"
        );
        let lines: Vec<&str> = said.lines().collect();
        let [leads, releases] = lines[..] else {
            panic!("{said}")
        };
        assert!(releases.ends_with(" releases"), "{said}");
        leads
            .rsplit_once(" leads with token ")
            .unwrap()
            .1
            .parse::<u64>()
            .unwrap()
    })
}

fn place(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!(
        "lockkit-example-leader-engine-{}-{name}",
        std::process::id()
    ))
}

#[test]
fn next_leader_on_file_gets_greater_token() {
    let lease = place("file");
    let tokens = leads_twice(&format!("file://{}", lease.display()));
    std::fs::remove_file(lease).unwrap();
    assert!(tokens[0] < tokens[1], "{tokens:?}");
}

/// A server with its socket. Both are removed when the value is dropped.
struct Redis(Child, PathBuf);

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = (self.0.kill(), self.0.wait(), std::fs::remove_file(&self.1));
    }
}

#[test]
fn next_leader_on_server_gets_greater_token() {
    let socket = place("socket");
    // The socket may be left by a killed process with the same pid.
    let _ = std::fs::remove_file(&socket);
    let mut server = Command::new("redis-server");
    server
        .args([
            "--port",
            "0",
            "--save",
            "",
            "--appendonly",
            "no",
            "--unixsocket",
        ])
        .arg(&socket);
    let Ok(child) = server.stdin(Stdio::null()).stdout(Stdio::null()).spawn() else {
        return left_out("next_leader_on_server_gets_greater_token: redis-server is not installed");
    };
    let _server = Redis(child, socket.clone());
    let start = Instant::now();
    while !socket.exists() {
        assert!(
            start.elapsed() < Duration::from_secs(30),
            "redis-server does not start"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
    let url = format!("redis+unix://{}?lease=leader", socket.display());
    let error = String::from_utf8(run(&[&url, "1ms"]).stderr).unwrap();
    if error.contains("without its feature") {
        return left_out("next_leader_on_server_gets_greater_token: this build is without redis");
    }
    let tokens = leads_twice(&url);
    assert!(tokens[0] < tokens[1], "{tokens:?}");
}

#[test]
fn invalid_url_gets_clear_error() {
    for (url, problem) in [
        ("gopher://there/leader", "lockkit knows file://"),
        ("leader", "it has no scheme"),
    ] {
        let output = run(&[url]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains(problem), "{said}");
    }
}
