//! The peers of leases on servers: their commands, and the children that acquire their locks on
//! request.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use lockkit_benches::baseline::{Gateway, field};
use lockkit_benches::process::{CHILD, Peer, now};
use rustix::process::{Pid, Signal, kill_process};

pub(crate) fn redis_peer(package: &str, port: u16) -> Result<Command, String> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("redis");
    let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("redis");
    let install = Command::new(directory.join("install.sh"))
        .arg(place)
        .output()
        .map_err(|error| error.to_string())?;
    if !install.status.success() {
        return Err(String::from_utf8_lossy(&install.stderr)
            .trim_end()
            .to_owned());
    }
    let mut command = Command::new(String::from_utf8_lossy(&install.stdout).trim_end());
    command
        .arg(directory.join("peer.py"))
        .arg(package)
        .arg(port.to_string());
    Ok(command)
}

pub(crate) fn own_lock(port: u16) -> Result<Command, String> {
    let mut command = Command::new(std::env::current_exe().map_err(|error| error.to_string())?);
    command.args([CHILD, "own-lock", &port.to_string()]);
    Ok(command)
}

pub(crate) fn etcdctl(port: u16) -> Result<Command, String> {
    let version = Command::new("etcdctl")
        .arg("version")
        .output()
        .map_err(|error| error.to_string())?;
    let mut command = Command::new(std::env::current_exe().map_err(|error| error.to_string())?);
    let version = String::from_utf8_lossy(&version.stdout);
    let version = version
        .lines()
        .next()
        .and_then(|line| line.rsplit(' ').next())
        .unwrap_or_default()
        .to_owned();
    command.args([CHILD, "etcdctl", &port.to_string(), &version]);
    Ok(command)
}

/// Acts as a child: acquires etcd's lock through etcd's command-line program, which holds the lock
/// until an interrupt.
pub(crate) fn serve_etcdctl(port: u16, version: &str) {
    /// The child starts a program for each cycle, so it does only a part of the cycles.
    const PART: u32 = 20;
    let lock = |name: &str| {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "etcdctl"]);
        // The other peer uses the same program, so this lock needs another name.
        command.args([
            "--endpoints",
            &format!("127.0.0.1:{port}"),
            "lock",
            &format!("etcdctl-{name}"),
        ]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut holder = command.spawn().expect("it is installed");
        let mut key = String::new();
        let said = holder.stdout.as_mut().expect("it is piped");
        BufReader::new(said)
            .read_line(&mut key)
            .expect("etcdctl prints the key of the lock");
        assert!(!key.is_empty(), "etcdctl prints the key of the lock");
        holder
    };
    let unlock = |mut holder: Child| {
        kill_process(Pid::from_child(&holder), Signal::INT).expect("it runs");
        holder.wait().expect("it ends");
    };
    serve(version, PART, lock, unlock);
}

/// Serves the requests to a peer, with a lock that is acquired by name. Runs only one in `part`
/// cycles.
fn serve<H>(version: &str, part: u32, mut lock: impl FnMut(&str) -> H, mut unlock: impl FnMut(H)) {
    let mut parent = Peer::parent();
    parent.send(version);
    let mut held = None;
    loop {
        let line = parent.receive();
        match line.split_once(' ').unwrap_or((&line, "")) {
            ("cycles", count) => {
                let start = now();
                (0..count.parse::<u32>().expect("a number") / part)
                    .for_each(|_| unlock(lock("cycles")));
                parent.send((now() - start) * u64::from(part));
            }
            ("hold", _) => {
                held = Some(lock("hand-over"));
                parent.send("held");
            }
            ("release", _) => {
                let before = now();
                held.take().into_iter().for_each(&mut unlock);
                parent.send(before);
            }
            ("wait", _) => {
                let holder = lock("hand-over");
                let acquired = now();
                unlock(holder);
                parent.send(acquired);
            }
            _ => panic!("unknown request to a peer: {line}"),
        }
    }
}

/// Acts as a child: acquires etcd's own lock when the bench asks for it.
pub(crate) fn serve_own_lock(port: u16) {
    let mut gateway = Gateway::open(port);
    let version = gateway.ask("maintenance/status", "{}");
    let session = field(&gateway.ask("lease/grant", r#"{"TTL":"600"}"#), "ID").to_owned();
    let lock = |name: &str| {
        let name = format!(
            r#"{{"name":"{}","lease":"{session}"}}"#,
            STANDARD.encode(name)
        );
        field(&gateway.ask("lock/lock", &name), "key").to_owned()
    };
    let mut second = Gateway::open(port);
    let unlock = |key: String| drop(second.ask("lock/unlock", &format!(r#"{{"key":"{key}"}}"#)));
    serve(field(&version, "version"), 1, lock, unlock);
}
