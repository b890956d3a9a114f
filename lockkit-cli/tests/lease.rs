//! Tests of `lockkit lease`, and of leases by URL.

#![cfg(target_os = "linux")]

mod common;

use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use tempfile::TempDir;

use common::{
    Lock, PROGRAM, Running, code, code_of, json, left_out, lockkit, output, read_until, terminal,
    text, until,
};

#[test]
fn lease_held_is_shown_released_and_stolen() {
    let lock = Lock::new("--lease");
    let url = format!("file://{}", lock.place);
    assert_eq!(code(["lease", "show", &url]), 0);
    let (_running, _) = lock.hold([]);
    let shown = json(&output(["lease", "show", &url, "--json"]));
    let (token, holder) = (&shown["lock"]["token"], &shown["lock"]["holders"][0]["pid"]);
    assert_eq!(code(["lease", "show", &url]), 1);
    let refused = output(["lease", "release", &url]);
    assert_eq!(code_of(&refused), 75);
    assert!(
        text(&refused.stderr).contains(&format!("pid {holder}")),
        "{refused:?}"
    );
    assert_eq!(code(["lease", "release", &url, "--token", "1"]), 75);
    assert_eq!(code(["lease", "steal", &url]), 64, "nobody to ask");
    assert_eq!(code(["lease", "show", &url]), 1);
    assert_eq!(
        code(["lease", "release", &url, "--token", &token.to_string()]),
        0
    );
    assert_eq!(code(["lease", "show", &url]), 0);
}

#[test]
fn lease_steal_on_terminal_asks_and_names_owner() {
    for (answer, code, after) in [("n\n", 75, 1), ("yes\n", 0, 0)] {
        let lock = Lock::new("--lease");
        let (_running, _) = lock.hold([]);
        let shown = json(&output(["lease", "show", &lock.place, "--json"]));
        let (end, mut screen) = terminal(160);
        let mut steal = lockkit(["lease", "steal", &lock.place]);
        steal
            .stdin(end.try_clone().expect("a terminal"))
            .stderr(end.try_clone().expect("a terminal"));
        let mut steal = Running::start(steal);
        let asked = read_until(&mut screen, |shown| shown.contains("[y/N]"));
        assert!(
            asked.contains(&format!(
                "from pid {} (lockkit)",
                shown["lock"]["holders"][0]["pid"]
            )),
            "{asked}"
        );
        screen.write_all(answer.as_bytes()).expect("a terminal");
        assert_eq!(steal.code(), code);
        assert_eq!(lock.status(), after);
    }
}

#[test]
fn steal_lease_of_other_user_requires_root() {
    if !rustix::process::geteuid().is_root() {
        left_out("only root can act as another user");
        return;
    }
    let as_user = |uid: u32, arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid", &uid.to_string(), "--clear-groups", PROGRAM])
            .args(arguments);
        command.stdin(Stdio::null());
        command
    };
    // Users have to reach the directory.
    let directory = TempDir::new_in("/tmp").expect("a directory");
    fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).expect("a directory");
    let lease = directory.path().join("lease").display().to_string();
    let (owner, other) = (1_900_001, 1_900_002);
    if as_user(owner, &["lease", "show", &lease])
        .status()
        .expect("setpriv starts")
        .code()
        != Some(0)
    {
        left_out("another user cannot run what was built here");
        return;
    }
    let mut running = Running::start(as_user(
        owner,
        &[
            "run",
            "--lease",
            &lease,
            "--",
            "sh",
            "-c",
            "echo held; exec sleep 60",
        ],
    ));
    assert_eq!(running.line(), "held");
    for readable in [false, true] {
        let mode = if readable { 0o666 } else { 0o600 };
        fs::set_permissions(&lease, Permissions::from_mode(mode)).expect("a file");
        let refused = as_user(other, &["lease", "steal", "--yes", &lease])
            .output()
            .expect("setpriv starts");
        assert_eq!(code_of(&refused), 77, "{refused:?}");
    }
    assert_eq!(code(["lease", "show", &lease]), 1);
    let stolen = output(["lease", "steal", "--yes", &lease]);
    assert_eq!(code_of(&stolen), 0, "{stolen:?}");
    assert_eq!(running.code(), 128 + 15, "it lost the lease");
    assert_eq!(code(["lease", "show", &lease]), 0);
    // Root may not hold it there either, because that user could take it back.
    let refused = output(["run", "--lease", &lease, "--", "true"]);
    assert_eq!(code_of(&refused), 77);
    assert!(
        text(&refused.stderr).contains("another user"),
        "{refused:?}"
    );
    let again = as_user(owner, &["run", "--lease", &lease, "--", "true"])
        .status()
        .expect("setpriv starts");
    assert!(again.success());
}

#[test]
fn lease_file_url_is_lease_at_path() {
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("my leader").display().to_string();
    let url = format!("file://{}", path.replace(' ', "%20"));
    assert_eq!((code(["status", &url]), code(["wait", &url])), (0, 0));
    let mut run = lockkit(["run", "--lease", &url, "--", "sh", "-c"]);
    run.arg("echo $LOCKKIT_TOKEN; read end")
        .stdin(Stdio::piped());
    let mut running = Running::start(run);
    let token: u64 = running.line().parse().expect("a token");
    for place in [&url, &path] {
        for shown in [
            output(["status", place, "--json"]),
            output(["lease", "show", place, "--json"]),
        ] {
            assert_eq!(code_of(&shown), 1);
            assert_eq!(json(&shown)["lock"]["token"], token);
        }
        assert_eq!(code(["wait", place, "--timeout", "50ms"]), 75);
        assert_eq!(code(["run", "--try", "--lease", place, "--", "true"]), 75);
    }
    let listed = json(&output(["list", "--json"]));
    let locks = listed["locks"].as_array().expect("locks");
    assert!(
        locks
            .iter()
            .any(|lock| lock["name"] == path.as_str() && lock["kind"] == "lease"),
        "{listed}"
    );
    drop(running.child.stdin.take());
    assert_eq!(code(["wait", &url, "--timeout", "30s"]), 0);
    assert_eq!(code(["status", &url]), 0);
}

/// Returns whether this build has the store of this URL. Another package of the workspace may have
/// enabled its feature.
fn is_built_in(url: &str) -> bool {
    lockkit::Lease::connect(url).build().is_ok()
}

#[test]
fn missing_server_store_error_names_cargo_feature() {
    let servers = [
        ("redis://user:secret@localhost:1/leader", "redis"),
        ("postgres://user:secret@localhost:1/db/leader", "postgres"),
        ("etcd://user:secret@localhost:1/leader", "etcd"),
    ];
    for (url, feature) in servers {
        if is_built_in(url) {
            left_out(&format!("a build without {feature}"));
            continue;
        }
        let refused = [
            output(["run", "--lease", url, "--", "true"]),
            output(["status", url]),
            output(["wait", url]),
            output(["lease", "show", url]),
            output(["lease", "release", url]),
            output(["lease", "steal", url]),
        ];
        for refused in refused {
            assert_eq!(code_of(&refused), 69, "{refused:?}");
            let said = text(&refused.stderr);
            assert!(
                said.contains(&format!("feature `{feature}`")) && !said.contains("secret"),
                "{said}"
            );
            assert!(
                said.contains("For example: cargo install lockkit-cli --features "),
                "{said}"
            );
        }
    }
    for wrong in [
        "gopher://host/leader",
        "file://elsewhere/leader",
        "file:///a%zz",
    ] {
        assert_eq!(code(["run", "--lease", wrong, "--", "true"]), 64, "{wrong}");
        assert_eq!(code(["status", wrong]), 64, "{wrong}");
    }
}

/// Starts a Redis server that is killed at the end of the test. Returns it with the URL of a lease
/// on it. Returns `None`, and prints the reason, if that is impossible.
fn redis() -> Option<(TempDir, Running, String)> {
    if !is_built_in("redis://localhost/leader") {
        left_out("this build has no redis");
        return None;
    }
    let directory = TempDir::new().expect("a directory");
    let socket = directory.path().join("socket").display().to_string();
    let mut server = Command::new("redis-server");
    server.args([
        "--port",
        "0",
        "--unixsocket",
        &socket,
        "--save",
        "",
        "--appendonly",
        "no",
        "--dir",
    ]);
    let started = server
        .arg(directory.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn();
    let Ok(child) = started else {
        left_out("redis-server is not installed");
        return None;
    };
    until("the server listens", || {
        std::os::unix::net::UnixStream::connect(&socket).is_ok()
    });
    let url = format!("redis+unix://{socket}?lease=leader");
    Some((directory, Running { child, lines: None }, url))
}

#[test]
fn lease_on_redis_works_and_is_lost_with_server() {
    let Some((_directory, mut server, url)) = redis() else {
        return;
    };
    assert_eq!((code(["status", &url]), code(["wait", &url])), (0, 0));
    let run = || {
        let mut run = lockkit(["run", "--lease", &url, "--ttl", "3s", "--", "sh", "-c"]);
        run.arg("echo $LOCKKIT_TOKEN; exec sleep 60");
        let mut running = Running::start(run);
        let token: u64 = running.line().parse().expect("a token");
        (running, token)
    };
    let (mut running, token) = run();
    for shown in [
        output(["status", &url, "--json"]),
        output(["lease", "show", &url, "--json"]),
    ] {
        assert_eq!(code_of(&shown), 1);
        assert_eq!(json(&shown)["lock"]["token"], token);
    }
    assert_eq!(code(["run", "--try", "--lease", &url, "--", "true"]), 75);
    assert_eq!(code(["wait", &url, "--timeout", "50ms"]), 75);
    let waiting = Running::start(lockkit(["wait", &url, "--timeout", "30s"]));
    assert_eq!(code(["lease", "steal", "--yes", &url]), 0);
    assert_eq!(running.code(), 128 + 15, "its program is ended");
    assert_eq!({ waiting }.code(), 0);
    let (mut running, next) = run();
    assert!(next > token);
    assert_eq!(
        code(["lease", "release", &url, "--token", &token.to_string()]),
        75,
        "that was another one"
    );
    server.child.kill().expect("it runs");
    assert_eq!(running.code(), 128 + 15, "it could not be renewed");
    let refused = output(["run", "--try", "--lease", &url, "--", "true"]);
    assert!(
        code_of(&refused) != 0 && text(&refused.stderr).contains("cannot connect to"),
        "{refused:?}"
    );
}
