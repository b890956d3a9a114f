//! Leases on etcd: what they cost, how fast they change hands, and what a thousand take.
//!
//! - *Uncontended*: acquiring and releasing, one after the other and by eight threads at once.
//! - *Hand-over*: a process releases, and another that waits acquires; beside `etcdctl lock`, which etcd brings along,
//!   from the signal at which one releases to the line that the next one writes. The time runs from just before the
//!   release.
//! - *Thousand*: what the heartbeat of a thousand leases with a ttl of 2 s takes of a processor, and whether it keeps
//!   them.
//!
//! All on one node of etcd that is started for this, its data in memory. Where etcd is not installed nothing is
//! measured.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use lockkit::{Lease, LeaseGuard};
use lockkit_benches::Experiment;
use lockkit_benches::process::{self, Peer, now};
use lockkit_benches::table::{self, Bound, Row, Value};
use rustix::process::{Pid, Signal, kill_process};
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

const PEER: &str = "etcdctl lock";

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

fn hand_over(length: &Length) -> Vec<Row> {
    let Some(etcd) = Etcd::start() else { return Vec::new() };
    let one = etcd.lease("hand-over");
    let mut waiter = Peer::spawn(&[&etcd.url("hand-over")]);
    let mut times: Vec<_> = (0..length.hand_overs)
        .map(|round| {
            let guard = one.lock().expect("the lease");
            waiter.say("wait");
            waiter.wait_until_asleep();
            // It has looked, watches, and waits, at ages of all sorts.
            thread::sleep(Duration::from_micros(10_000 + u64::from(round % 100) * 370));
            let released = now();
            guard.release().expect("it is held");
            let [acquired] = waiter.hear_numbers();
            Duration::from_nanos(acquired.checked_sub(released).expect("one at a time holds it"))
        })
        .collect();
    waiter.kill();
    let ours = Value::Time(table::median(&mut times));
    let theirs = (0..length.peers).map_while(|_| etcdctl_hand_over(&etcd)).collect::<Vec<_>>();
    let theirs = match theirs {
        times if times.is_empty() => Value::None,
        mut times => Value::Time(table::median(&mut times)),
    };
    let row = |bound| Row { name: "etcd: hand-over".to_owned(), ours, peer: PEER, theirs, bound };
    vec![row(Bound::Time(Duration::from_micros(1617))), row(Bound::Ratio(0.05))]
}

/// One hand-over from an `etcdctl lock` that is asked to end to another that waits; `None` where it is not installed.
fn etcdctl_hand_over(etcd: &Etcd) -> Option<Duration> {
    let lock = || {
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--endpoints", &format!("127.0.0.1:{}", etcd.port), "lock", "bench"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().ok()
    };
    // It writes the name of its key once it has the lock.
    let hear = |child: &mut Child| {
        let output = child.stdout.as_mut().expect("it is piped");
        BufReader::new(output).read_line(&mut String::new()).expect("a pipe");
    };
    let mut holder = lock()?;
    hear(&mut holder);
    let mut waiter = lock()?;
    // It says nothing of when it waits.
    thread::sleep(Duration::from_millis(300));
    let start = Instant::now();
    kill_process(Pid::from_child(&holder), Signal::INT).expect("a child");
    hear(&mut waiter);
    let time = start.elapsed();
    holder.wait().expect("a child");
    kill_process(Pid::from_child(&waiter), Signal::INT).expect("a child");
    waiter.wait().expect("a child");
    Some(time)
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
