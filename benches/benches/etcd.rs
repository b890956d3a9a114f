//! Leases on etcd: what they cost, how fast they change hands, and what a thousand take.
//!
//! - *Uncontended*: acquiring and releasing, one after the other and by eight threads at once.
//! - *Hand-over*: a process releases, and another that waits acquires; beside the lock that etcd itself offers, over the
//!   same gateway, with waiters of the same ages. The time runs from just before the release.
//! - *Thousand*: what the heartbeat of a thousand leases with a ttl of 2 s takes of a processor, and whether it keeps
//!   them.
//!
//! All on one node of etcd that is started for this, its data in memory. Where etcd is not installed nothing is
//! measured.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use lockkit::{Lease, LeaseGuard};
use lockkit_benches::Experiment;
use lockkit_benches::process::{self, Peer, now};
use lockkit_benches::table::{self, Bound, Row, Value};
use rustix::time::{ClockId, clock_gettime};
use tempfile::TempDir;

/// How much is measured.
struct Length {
    /// Blocks of operations, and operations in one.
    blocks: (u32, u32),
    hand_overs: u32,
    peers: u32,
    /// How many beat, and for how long.
    thousand: (usize, Duration),
}

const FULL: Length =
    Length { blocks: (15, 100), hand_overs: 500, peers: 20, thousand: (1000, Duration::from_secs(10)) };
const QUICK: Length =
    Length { blocks: (3, 20), hand_overs: 10, peers: 2, thousand: (100, Duration::from_millis(2500)) };

const EXPERIMENTS: [Experiment<Length>; 3] =
    [("etcd/uncontended", uncontended), ("etcd/hand-over", hand_over), ("etcd/thousand", thousand)];

const PEER: &str = "etcd's own lock";

fn main() {
    if let Some(part) = process::part() {
        return waiter(&part);
    }
    lockkit_benches::run(&EXPERIMENTS, &FULL, &QUICK);
}

/// A node of etcd, gone when it is dropped.
struct Etcd {
    child: Child,
    port: u16,
    _folder: TempDir,
}

impl Etcd {
    fn start() -> Option<Self> {
        let folder = tempfile::tempdir_in("/dev/shm").expect("a folder");
        let [port, peer] = [(); 2].map(|()| {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
            listener.local_addr().expect("an address").port()
        });
        let [client, peer] = [port, peer].map(|port| format!("http://127.0.0.1:{port}"));
        let mut command = Command::new("etcd");
        command.args(["--name", "bench", "--log-level", "error", "--data-dir"]).arg(folder.path().join("data"));
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.arg("--initial-cluster").arg(format!("bench={peer}"));
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let Ok(child) = child else {
            println!("  without etcd, which is not installed");
            return None;
        };
        // What it is asked before that is answered when it is ready.
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            thread::sleep(Duration::from_millis(1));
        }
        let etcd = Self { child, port, _folder: folder };
        drop(etcd.lease("first").lock().expect("nobody else takes it"));
        Some(etcd)
    }

    fn url(&self, name: &str) -> String {
        format!("etcd://127.0.0.1:{}/{name}", self.port)
    }

    /// The answer to a request of the gateway.
    fn post(&self, path: &str, body: &str) -> String {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).expect("it runs");
        let request = format!("POST /v3/{path} HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        stream.write_all(request.as_bytes()).expect("it runs");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("it answers");
        answer
    }

    fn lease(&self, name: &str) -> Lease {
        lease(&self.url(name))
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lease(url: &str) -> Lease {
    Lease::connect(url).build().expect("the options go together")
}

fn uncontended(length: &Length) -> Vec<Row> {
    let Some(etcd) = Etcd::start() else { return Vec::new() };
    let (blocks, count) = length.blocks;
    let one = etcd.lease("uncontended");
    let cycle = |lease: &Lease| lease.try_lock().expect("nobody else takes it").release().expect("it is held");
    let mut times: Vec<_> = (0..blocks)
        .map(|_| {
            let start = Instant::now();
            (0..count).for_each(|_| cycle(&one));
            start.elapsed() / count
        })
        .collect();
    const THREADS: u32 = 8;
    let leases: Vec<_> = (0..THREADS).map(|n| etcd.lease(&format!("thread-{n}"))).collect();
    let start = Instant::now();
    thread::scope(|scope| {
        for lease in &leases {
            scope.spawn(move || (0..count * 2).for_each(|_| cycle(lease)));
        }
    });
    let rate = f64::from(THREADS * count * 2) / start.elapsed().as_secs_f64();
    let row = |name: &str, ours, bound| Row { name: name.to_owned(), ours, peer: "-", theirs: Value::None, bound };
    vec![
        row(
            "etcd: acquire and release",
            Value::Time(table::median(&mut times)),
            Bound::Time(Duration::from_micros(908)),
        ),
        row("etcd: acquire and release, 8 threads", Value::Rate(rate), Bound::None),
    ]
}

/// A child: acquires whenever it is told to, and says when it had it.
fn waiter(part: &[String]) {
    let [url] = part else { panic!("a child needs its part") };
    let lease = lease(url);
    let mut parent = Peer::parent();
    loop {
        parent.hear();
        let guard = lease.lock().expect("the lease");
        let acquired = now();
        guard.release().expect("it is held");
        parent.say(acquired);
    }
}

/// For how long a waiter waits: it has looked, and watches.
fn age(round: u32) -> Duration {
    Duration::from_micros(10_000 + u64::from(round % 100) * 370)
}

fn hand_over(length: &Length) -> Vec<Row> {
    let Some(etcd) = Etcd::start() else { return Vec::new() };
    let one = etcd.lease("hand-over");
    let mut waiter = Peer::spawn(&[&etcd.url("hand-over")]);
    let mut times: Vec<_> = (0..length.hand_overs)
        .map(|round| {
            let guard = one.lock().expect("the lease");
            waiter.say("wait");
            waiter.wait_until_asleep();
            thread::sleep(age(round));
            let released = now();
            guard.release().expect("it is held");
            let [acquired] = waiter.hear_numbers();
            Duration::from_nanos(acquired.checked_sub(released).expect("one at a time holds it"))
        })
        .collect();
    waiter.kill();
    let ours = Value::Time(table::median(&mut times));
    let sessions = [(); 2].map(|()| field(&etcd.post("lease/grant", r#"{"TTL":"600"}"#), "ID"));
    let theirs = (0..length.peers).map(|round| own_hand_over(&etcd, &sessions, age(round * 5)));
    let theirs = Value::Time(table::median(&mut theirs.collect::<Vec<_>>()));
    let row = |bound| Row { name: "etcd: hand-over".to_owned(), ours, peer: PEER, theirs, bound };
    vec![row(Bound::Time(Duration::from_micros(1617))), row(Bound::Ratio(0.05))]
}

/// One hand-over of the lock that etcd itself offers, between two sessions, to a waiter of this age.
fn own_hand_over(etcd: &Etcd, sessions: &[String; 2], age: Duration) -> Duration {
    let lock =
        |session: &str| field(&etcd.post("lock/lock", &format!(r#"{{"name":"YmVuY2g=","lease":"{session}"}}"#)), "key");
    let unlock = |key: &str| drop(etcd.post("lock/unlock", &format!(r#"{{"key":"{key}"}}"#)));
    let first = lock(&sessions[0]);
    let (time, second) = thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            let key = lock(&sessions[1]);
            (Instant::now(), key)
        });
        thread::sleep(age);
        let released = Instant::now();
        unlock(&first);
        let (acquired, key) = waiter.join().expect("it gets the lock");
        (acquired - released, key)
    });
    unlock(&second);
    time
}

/// The value of a text field in an answer.
fn field(answer: &str, name: &str) -> String {
    let rest = answer.split(&format!("\"{name}\":\"")).nth(1);
    rest.and_then(|rest| rest.split('"').next()).unwrap_or_else(|| panic!("no {name} in {answer}")).to_owned()
}

fn thousand(length: &Length) -> Vec<Row> {
    let Some(etcd) = Etcd::start() else { return Vec::new() };
    let (count, span) = length.thousand;
    let guards: Vec<LeaseGuard> = (0..count)
        .map(|number| {
            let lease = Lease::connect(etcd.url(&number.to_string())).ttl(Duration::from_secs(2));
            lease.build().expect("the options go together").try_lock().expect("nobody else takes it")
        })
        .collect();
    let used = || Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).expect("it is not negative");
    let (start, before) = (Instant::now(), used());
    thread::sleep(span);
    let share = (used() - before).as_secs_f64() / start.elapsed().as_secs_f64();
    let lost: Vec<_> = guards.iter().filter_map(|guard| guard.check().err()).collect();
    if let Some(first) = lost.first() {
        println!("  {first}");
    }
    let row = |what: &str, ours, bound| {
        let name = format!("etcd: {count} leases of 2 s, {what}");
        Row { name, ours, peer: "-", theirs: Value::None, bound }
    };
    vec![
        row("processor", Value::Share(share), Bound::Share(0.2)),
        row("lost", Value::Count(lost.len()), Bound::Count(0)),
    ]
}
