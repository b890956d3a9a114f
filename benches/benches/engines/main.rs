//! Measures leases on servers: without contention, renewal, hand-over, and a thousand leases.
//!
//! - *Uncontended*: acquire and release, in sequence and by eight threads at once.
//! - *Renewal*: one heartbeat out of several that are due at once. The leases use a clock that jumps. On etcd one
//!   request renews all leases.
//! - *Hand-over*: a process releases, and a waiting process acquires. The time runs from just before the release.
//!   Hand-overs follow each other directly, as under contention, or the waiter has waited for a long time.
//! - *Thousand*: the processor share of the heartbeat of a thousand leases on etcd with a TTL of 2 s, and whether the
//!   heartbeat keeps the leases.
//!
//! Each engine is an [`Engine`]: the start of a server, the bare requests on it, and its peers. Ours and the peers
//! alternate on the same server, which keeps its data in memory. The bench leaves out software that is not installed,
//! and prints a line about it.
//!
//! The bounds are the measurements of a prototype of each engine. For hand-overs they are also the factors by which a
//! lease must be faster than the peers' recipes. The duration of a request depends on the machine. On a machine that is
//! slower than the prototype's, compare our numbers with the *bare* requests ([`lockkit_benches::baseline`]). Bare
//! requests have no claim, no owner, no limit on waits, no heartbeat bookkeeping, and no thread that listens for all
//! waiters.

use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::os::unix::fs::chown;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use lockkit::lease::{Clock, ManualClock};
use lockkit::{Lease, LeaseGuard};
use lockkit_benches::Experiment;
use lockkit_benches::baseline::{self, Bare, Gateway, field};
use lockkit_benches::process::{self, CHILD, Peer, now};
use lockkit_benches::table::{self, Bound, Row, Value};
use rustix::process::{Pid, Signal, kill_process};
use rustix::time::{ClockId, clock_gettime};
use tempfile::TempDir;

/// The amount of work to measure: blocks of alternating operations, and operations per block; the same for hand-overs;
/// the number of leases under heartbeat, and the span.
struct Length {
    blocks: (u32, u32),
    hand_overs: (u32, u32),
    late_hand_overs: u32,
    thousand: (usize, Duration),
}

const FULL: Length =
    Length { blocks: (15, 200), hand_overs: (20, 10), late_hand_overs: 20, thousand: (1000, Duration::from_secs(10)) };
const QUICK: Length =
    Length { blocks: (3, 20), hand_overs: (1, 5), late_hand_overs: 2, thousand: (100, Duration::from_millis(2500)) };

const EXPERIMENTS: [Experiment<Length>; 10] = [
    ("redis/uncontended", |length| uncontended(&REDIS, length)),
    ("redis/renewal", |length| renewal(&REDIS, length)),
    ("redis/hand-over", |length| hand_over(&REDIS, length)),
    ("postgres/uncontended", |length| uncontended(&POSTGRES, length)),
    ("postgres/renewal", |length| renewal(&POSTGRES, length)),
    ("postgres/hand-over", |length| hand_over(&POSTGRES, length)),
    ("etcd/uncontended", |length| uncontended(&ETCD, length)),
    ("etcd/renewal", |length| renewal(&ETCD, length)),
    ("etcd/hand-over", |length| hand_over(&ETCD, length)),
    ("etcd/thousand", thousand),
];

/// The parameters of an engine.
struct Engine {
    name: &'static str,
    /// Returns the command that starts a server on a loopback port in a directory, or the reason why none can start.
    start: fn(&Path, u16) -> Result<Command, String>,
    /// Returns the URL of a lease on the server at this port.
    url: fn(u16, &str) -> String,
    /// Returns the bare requests for a name on the server at this port.
    bare: fn(u16, &str) -> Box<dyn Bare>,
    peers: &'static [Recipe],
    prototype: Prototype,
}

/// The measurements of a prototype.
struct Prototype {
    uncontended: Duration,
    renewal: Duration,
    hand_over: Duration,
    /// Cycles of acquire and release per second by eight threads.
    rate: f64,
}

/// A peer: a program that speaks the line protocol of `redis/peer.py`, with the server at this port.
struct Recipe {
    name: &'static str,
    start: fn(u16) -> Result<Command, String>,
    /// The factor by which our hand-over must be faster than this peer.
    behind: Option<f64>,
}

static REDIS: Engine = Engine {
    name: "redis",
    start: |directory, port| {
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--daemonize", "no", "--save", "", "--appendonly", "no", "--dir"]);
        command.arg(directory).arg("--port").arg(port.to_string());
        Ok(command)
    },
    url: |port, name| format!("redis://127.0.0.1:{port}/{name}"),
    bare: |port, name| Box::new(baseline::Redis::new(port, name)),
    peers: &[
        Recipe { name: "redis-py Lock", start: |port| redis_peer("redis", port), behind: Some(20.0) },
        Recipe { name: "python-redis-lock", start: |port| redis_peer("redis_lock", port), behind: None },
    ],
    prototype: Prototype {
        uncontended: Duration::from_micros(142),
        renewal: Duration::from_micros(65),
        hand_over: Duration::from_micros(432),
        rate: 32741.0,
    },
};

static POSTGRES: Engine = Engine {
    name: "postgres",
    start: start_postgres,
    url: |port, name| format!("postgres://postgres@127.0.0.1:{port}/postgres?sslmode=disable&lease={name}"),
    bare: |port, name| Box::new(baseline::Postgres::new(port, name)),
    peers: &[],
    prototype: Prototype {
        uncontended: Duration::from_micros(321),
        renewal: Duration::from_micros(148),
        hand_over: Duration::from_micros(1015),
        rate: 3973.0,
    },
};

static ETCD: Engine = Engine {
    name: "etcd",
    start: |directory, port| {
        let [client, peer] = [port, process::free_port()].map(|port| format!("http://127.0.0.1:{port}"));
        let mut command = Command::new("etcd");
        command.args(["--name", "bench", "--log-level", "error", "--data-dir"]).arg(directory.join("data"));
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.arg("--initial-cluster").arg(format!("bench={peer}"));
        Ok(command)
    },
    url: |port, name| format!("etcd://127.0.0.1:{port}/{name}"),
    bare: |port, name| Box::new(baseline::Etcd::new(port, name)),
    peers: &[
        Recipe { name: "etcd's own lock", start: own_lock, behind: Some(20.0) },
        Recipe { name: "etcdctl lock", start: etcdctl, behind: Some(20.0) },
    ],
    prototype: Prototype {
        uncontended: Duration::from_micros(908),
        renewal: Duration::from_micros(229),
        hand_over: Duration::from_micros(1617),
        rate: 3081.0,
    },
};

/// Returns the command that starts PostgreSQL. PostgreSQL refuses to run as root, so there it runs as the user
/// `postgres`.
fn start_postgres(directory: &Path, port: u16) -> Result<Command, String> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let directories: Vec<_> = versions.map(|version| version.path().join("bin")).collect();
    let program = |name: &str| {
        let found = directories.iter().map(|directory| directory.join(name)).find(|path| path.is_file());
        let program = found.unwrap_or_else(|| name.into());
        if !rustix::process::geteuid().is_root() {
            return Command::new(program);
        }
        let mut command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]).arg(program).current_dir("/");
        command
    };
    let run = |mut command: Command| match command.output() {
        Ok(done) if done.status.success() => Ok(String::from_utf8_lossy(&done.stdout).trim().to_owned()),
        Ok(done) => Err(String::from_utf8_lossy(&done.stderr).trim().to_owned()),
        Err(error) => Err(error.to_string()),
    };
    if rustix::process::geteuid().is_root() {
        let mut who = Command::new("id");
        who.args(["-u", "postgres"]);
        let user = run(who)?.parse().map_err(|_| "there is no user `postgres`".to_owned())?;
        chown(directory, Some(user), None).map_err(|error| error.to_string())?;
    }
    let data = directory.join("data");
    let mut init = program("initdb");
    init.arg("-D").arg(&data).args(["-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C", "--no-sync"]);
    run(init)?;
    let mut command = program("postgres");
    command.arg("-D").arg(data).arg("-k").arg(directory).arg("-p").arg(port.to_string());
    command.args(["-c", "listen_addresses=127.0.0.1", "-c", "log_min_messages=panic"]);
    Ok(command)
}

fn redis_peer(package: &str, port: u16) -> Result<Command, String> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("redis");
    let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("redis");
    let install = Command::new(directory.join("install.sh")).arg(place).output().map_err(|error| error.to_string())?;
    if !install.status.success() {
        return Err(String::from_utf8_lossy(&install.stderr).trim_end().to_owned());
    }
    let mut command = Command::new(String::from_utf8_lossy(&install.stdout).trim_end());
    command.arg(directory.join("peer.py")).arg(package).arg(port.to_string());
    Ok(command)
}

fn own_lock(port: u16) -> Result<Command, String> {
    let mut command = Command::new(std::env::current_exe().map_err(|error| error.to_string())?);
    command.args([CHILD, "own-lock", &port.to_string()]);
    Ok(command)
}

fn etcdctl(port: u16) -> Result<Command, String> {
    let version = Command::new("etcdctl").arg("version").output().map_err(|error| error.to_string())?;
    let mut command = Command::new(std::env::current_exe().map_err(|error| error.to_string())?);
    let version = String::from_utf8_lossy(&version.stdout);
    let version = version.lines().next().and_then(|line| line.rsplit(' ').next()).unwrap_or_default().to_owned();
    command.args([CHILD, "etcdctl", &port.to_string(), &version]);
    Ok(command)
}

/// Acts as a child: acquires etcd's lock through etcd's command-line program, which holds the lock until an interrupt.
fn takes_by_etcdctl(port: u16, version: &str) {
    /// The child starts a program for each cycle, so it does only a part of the cycles.
    const PART: u32 = 20;
    let lock = |name: &str| {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "etcdctl"]);
        // The other peer uses the same recipe, so this lock needs another name.
        command.args(["--endpoints", &format!("127.0.0.1:{port}"), "lock", &format!("etcdctl-{name}")]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut holder = command.spawn().expect("it is installed");
        let mut key = String::new();
        let said = holder.stdout.as_mut().expect("it is piped");
        BufReader::new(said).read_line(&mut key).expect("it says what it holds");
        assert!(!key.is_empty(), "it says what it holds");
        holder
    };
    let unlock = |mut holder: Child| {
        kill_process(Pid::from_child(&holder), Signal::INT).expect("it runs");
        holder.wait().expect("it ends");
    };
    serve(version, PART, lock, unlock);
}

/// Serves the requests to a peer, with a lock that is acquired by name. Runs only one in `part` cycles.
fn serve<H>(version: &str, part: u32, mut lock: impl FnMut(&str) -> H, mut unlock: impl FnMut(H)) {
    let mut parent = Peer::parent();
    parent.say(version);
    let mut held = None;
    loop {
        let line = parent.hear();
        match line.split_once(' ').unwrap_or((&line, "")) {
            ("cycles", count) => {
                let start = now();
                (0..count.parse::<u32>().expect("a number") / part).for_each(|_| unlock(lock("cycles")));
                parent.say((now() - start) * u64::from(part));
            }
            ("hold", _) => {
                held = Some(lock("hand-over"));
                parent.say("held");
            }
            ("release", _) => {
                let before = now();
                held.take().into_iter().for_each(&mut unlock);
                parent.say(before);
            }
            ("wait", _) => {
                let holder = lock("hand-over");
                let acquired = now();
                unlock(holder);
                parent.say(acquired);
            }
            _ => panic!("{line} is not what a peer is asked for"),
        }
    }
}

/// Acts as a child: acquires etcd's own lock when the bench asks for it.
fn takes_own_lock(port: u16) {
    let mut gateway = Gateway::open(port);
    let version = gateway.ask("maintenance/status", "{}");
    let session = field(&gateway.ask("lease/grant", r#"{"TTL":"600"}"#), "ID").to_owned();
    let lock = |name: &str| {
        let name = format!(r#"{{"name":"{}","lease":"{session}"}}"#, STANDARD.encode(name));
        field(&gateway.ask("lock/lock", &name), "key").to_owned()
    };
    let mut second = Gateway::open(port);
    let unlock = |key: String| drop(second.ask("lock/unlock", &format!(r#"{{"key":"{key}"}}"#)));
    serve(field(&version, "version"), 1, lock, unlock);
}

fn main() {
    match process::part().as_deref() {
        None => lockkit_benches::run(&EXPERIMENTS, &FULL, &QUICK),
        Some([what, port]) if what == "own-lock" => takes_own_lock(port.parse().expect("a port")),
        Some([what, port, version]) if what == "etcdctl" => takes_by_etcdctl(port.parse().expect("a port"), version),
        Some([engine, port]) => {
            let engine = [&REDIS, &POSTGRES, &ETCD].into_iter().find(|known| known.name == engine);
            waits_bare(engine.expect("an engine"), port.parse().expect("a port"));
        }
        Some([url]) => waits(url),
        Some(part) => panic!("{part:?} is no part for a child"),
    }
}

/// A server that ends when it is dropped.
struct Server {
    engine: &'static Engine,
    port: u16,
    process: Child,
    _directory: TempDir,
}

impl Server {
    /// Starts a server, or prints why it cannot.
    fn start(engine: &'static Engine) -> Option<Self> {
        let started = Self::try_start(engine);
        started.inspect_err(|problem| println!("  without {}: {problem}", engine.name)).ok()
    }

    fn try_start(engine: &'static Engine) -> Result<Self, String> {
        let directory = tempfile::tempdir_in("/dev/shm").map_err(|error| error.to_string())?;
        let port = process::free_port();
        let mut command = (engine.start)(directory.path(), port)?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let process = command.spawn().map_err(|error| error.to_string())?;
        let mut server = Self { engine, port, process, _directory: directory };
        while server.lease("first").try_lock().is_err() {
            if let Ok(Some(status)) = server.process.try_wait() {
                return Err(format!("its server ended: {status}"));
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }

    fn url(&self, name: &str) -> String {
        (self.engine.url)(self.port, name)
    }

    fn lease(&self, name: &str) -> Lease {
        lease(&self.url(name))
    }

    fn bare(&self, name: &str) -> Box<dyn Bare> {
        (self.engine.bare)(self.port, name)
    }

    /// Returns the peers that are available on this machine.
    fn peers(&self) -> Vec<(&'static Recipe, Peer)> {
        let start = |recipe: &'static Recipe| match (recipe.start)(self.port) {
            Ok(mut command) => {
                let mut peer = Peer::start(&mut command);
                println!("  beside {} {}", recipe.name, peer.hear());
                Some((recipe, peer))
            }
            Err(problem) => {
                println!("  without {}, which cannot be installed: {problem}", recipe.name);
                None
            }
        };
        self.engine.peers.iter().filter_map(start).collect()
    }

    /// Returns a row that compares ours with each of these peers.
    fn rows(
        &self,
        name: &str,
        ours: Value,
        theirs: impl IntoIterator<Item = (&'static str, Value, Bound)>,
    ) -> Vec<Row> {
        let name = format!("{}: {name}", self.engine.name);
        let row = |(peer, theirs, bound)| Row { name: name.clone(), ours, peer, theirs, bound };
        theirs.into_iter().map(row).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn lease(url: &str) -> Lease {
    Lease::connect(url).build().expect("a URL that is right")
}

/// Returns the average duration of one operation.
fn each(count: u32, work: impl FnMut()) -> Duration {
    let start = Instant::now();
    std::iter::repeat_with(work).take(count as usize).for_each(drop);
    start.elapsed() / count
}

/// Returns the operations per second of all items together. Each item runs `count` operations on a thread of its own.
fn rate<T: Send>(all: &mut [T], count: u32, work: impl Fn(&mut T) + Sync) -> f64 {
    let start = Instant::now();
    thread::scope(|scope| {
        for one in &mut *all {
            scope.spawn(|| (0..count).for_each(|_| work(one)));
        }
    });
    f64::from(count) * all.len() as f64 / start.elapsed().as_secs_f64()
}

const BARE: &str = "bare requests";
const PROTOTYPE: &str = "a prototype, once";

fn uncontended(engine: &'static Engine, length: &Length) -> Vec<Row> {
    const THREADS: usize = 8;
    let Some(server) = Server::start(engine) else { return Vec::new() };
    let (blocks, count) = length.blocks;
    let (one, mut bare) = (server.lease("cycles"), server.bare("cycles"));
    // On a busy machine a release may fail. The heartbeat or the next acquisition then makes up for it.
    let cycle = |lease: &mut Lease| drop(lease.lock().expect("nobody else keeps it"));
    let bare_cycle = |bare: &mut Box<dyn Bare>| {
        assert!(bare.acquire(), "nobody else takes it");
        bare.release();
    };
    let mut peers = server.peers();
    let (mut ours, mut bares, mut theirs) = (Vec::new(), Vec::new(), vec![Vec::new(); peers.len()]);
    for _ in 0..blocks {
        ours.push(each(count, || cycle(&mut one.clone())));
        bares.push(each(count, || bare_cycle(&mut bare)));
        for ((_, peer), times) in peers.iter_mut().zip(&mut theirs) {
            peer.say(format_args!("cycles {count}"));
            let [all] = peer.hear_numbers();
            times.push(Duration::from_nanos(all) / count);
        }
    }
    let mut leases: Vec<_> = (0..THREADS).map(|n| server.lease(&format!("thread-{n}"))).collect();
    let mut all_bare: Vec<_> = (0..THREADS).map(|n| server.bare(&format!("thread-{n}"))).collect();
    let (mut rates, mut bare_rates): (Vec<_>, Vec<_>) =
        (0..blocks).map(|_| (rate(&mut leases, count, cycle), rate(&mut all_bare, count, bare_cycle))).unzip();
    let middle = |rates: &mut Vec<f64>| {
        rates.sort_by(f64::total_cmp);
        Value::Rate(rates[rates.len() / 2])
    };
    let theirs = peers.iter().zip(&mut theirs);
    let theirs = theirs.map(|((recipe, _), times)| (recipe.name, Value::Time(table::median(times)), Bound::None));
    let compared = [
        (BARE, Value::Time(table::median(&mut bares)), Bound::None),
        (PROTOTYPE, Value::Time(engine.prototype.uncontended), Bound::Ratio(1.0)),
    ];
    let alone =
        server.rows("acquire and release", Value::Time(table::median(&mut ours)), compared.into_iter().chain(theirs));
    let compared = [
        (BARE, middle(&mut bare_rates), Bound::None),
        (PROTOTYPE, Value::Rate(engine.prototype.rate), Bound::AtLeast(1.0)),
    ];
    let crowd = server.rows("acquire and release, 8 threads", middle(&mut rates), compared);
    alone.into_iter().chain(crowd).collect()
}

fn renewal(engine: &'static Engine, length: &Length) -> Vec<Row> {
    const COUNT: u32 = 200;
    const HEARTBEAT: Duration = Duration::from_secs(1);
    /// The client trusts etcd's answer about a session for this long, by a clock that does not jump.
    const KNOWN: Duration = Duration::from_millis(250);
    let Some(server) = Server::start(engine) else { return Vec::new() };
    let jumping = ManualClock::new();
    let clock: Arc<dyn Clock> = Arc::new(jumping.clone());
    let guards: Vec<LeaseGuard> = (0..COUNT)
        .map(|number| {
            let url = server.url(&format!("beats-{number}"));
            let lease = Lease::connect(url).ttl(Duration::from_secs(30)).heartbeat(HEARTBEAT).clock(clock.clone());
            lease.build().expect("the options go together").try_lock().expect("nobody else takes it")
        })
        .collect();
    let mut bare = server.bare("beats");
    assert!(bare.acquire(), "nobody else takes it");
    // A renewal gives a lease the remaining time of its session, whose last renewal may be earlier.
    let fresh = guards[0].remaining() - HEARTBEAT + KNOWN;
    let (mut times, mut bares) = (Vec::new(), Vec::new());
    for _ in 0..length.blocks.0 {
        bares.push(each(COUNT, || bare.renew()));
        thread::sleep(KNOWN);
        let start = Instant::now();
        jumping.advance(HEARTBEAT);
        for guard in &guards {
            // The loop polls rarely, because polling disturbs the measurement. The time must advance, because a late
            // renewal is retried later.
            while guard.remaining() < fresh {
                thread::sleep(Duration::from_millis(1));
                jumping.advance(Duration::from_micros(100));
            }
        }
        times.push(start.elapsed() / COUNT);
    }
    let compared = [
        (BARE, Value::Time(table::median(&mut bares)), Bound::None),
        (PROTOTYPE, Value::Time(engine.prototype.renewal), Bound::Ratio(1.0)),
    ];
    server.rows(&format!("renewal, one of {COUNT}"), Value::Time(table::median(&mut times)), compared)
}

/// Acts as a child: acquires on each line from the parent, and reports the time of the acquisition.
fn waits(url: &str) {
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

/// As [`waits`], by bare requests.
fn waits_bare(engine: &Engine, port: u16) {
    let mut bare = (engine.bare)(port, "hand-over");
    bare.listen();
    let mut parent = Peer::parent();
    loop {
        parent.hear();
        bare.wait();
        let acquired = now();
        bare.release();
        parent.say(acquired);
    }
}

fn hand_over(engine: &'static Engine, length: &Length) -> Vec<Row> {
    let Some(server) = Server::start(engine) else { return Vec::new() };
    let (blocks, count) = length.hand_overs;
    // Hand-overs follow each other as under contention: the next waiter begins when the previous waiter holds the lock.
    // The waiters have many ages. Each of them sleeps by then, or already polls at its final rate. None is older than
    // 47 ms: etcd serves a waiter of its own lock ten times per second until the waiter is up to date, and immediately
    // from then on.
    let young = (0..blocks).map(|block| block * count..(block + 1) * count).collect();
    let mut rows = handed_over(&server, "hand-over", Duration::from_millis(10), young);
    let mut old = handed_over(&server, "hand-over to who has waited long", Duration::from_millis(400), {
        (0..length.late_hand_overs).map(|round| round..round + 1).collect()
    });
    old.iter_mut().for_each(|row| row.bound = Bound::None);
    rows.extend(old.into_iter().filter(|row| row.peer != PROTOTYPE));
    rows
}

/// Runs rounds of hand-overs in alternating blocks. Each waiter waits at least for `age`.
fn handed_over(server: &Server, name: &str, age: Duration, rounds: Vec<Range<u32>>) -> Vec<Row> {
    let engine = server.engine;
    let let_wait = |round: u32| thread::sleep(age + Duration::from_micros(u64::from(round % 100) * 370));
    let between = |released: u64, acquired: u64| {
        Duration::from_nanos(acquired.checked_sub(released).expect("one at a time holds it"))
    };
    let (lease, mut waiter) = (server.lease("hand-over"), Peer::spawn(&[&server.url("hand-over")]));
    let mut ours = |round| {
        let guard = lease.lock().expect("the lease");
        waiter.say("wait");
        let_wait(round);
        let released = now();
        guard.release().expect("it is still held");
        let [acquired] = waiter.hear_numbers();
        between(released, acquired)
    };
    let mut holder = server.bare("hand-over");
    let mut waiter = Peer::spawn(&[engine.name, &server.port.to_string()]);
    let mut bare = |round| {
        assert!(holder.acquire(), "nobody else takes it");
        waiter.say("wait");
        let_wait(round);
        let released = now();
        holder.release();
        let [acquired] = waiter.hear_numbers();
        between(released, acquired)
    };
    let theirs = |holder: &mut Peer, waiter: &mut Peer, round| {
        holder.say("hold");
        holder.expect("held");
        waiter.say("wait");
        let_wait(round);
        holder.say("release");
        let ([released], [acquired]) = (holder.hear_numbers(), waiter.hear_numbers());
        between(released, acquired)
    };
    let mut peers: Vec<_> = server.peers().into_iter().zip(server.peers()).collect();
    let (mut times, mut bares, mut others) = (Vec::new(), Vec::new(), vec![Vec::new(); peers.len()]);
    for rounds in rounds {
        times.extend(rounds.clone().map(&mut ours));
        bares.extend(rounds.clone().map(&mut bare));
        for (((_, holder), (_, waiter)), times) in peers.iter_mut().zip(&mut others) {
            times.extend(rounds.clone().map(|round| theirs(holder, waiter, round)));
        }
    }
    let theirs = peers.iter().zip(&mut others).map(|(((recipe, _), _), times)| {
        let bound = recipe.behind.map_or(Bound::None, |behind| Bound::Ratio(1.0 / behind));
        (recipe.name, Value::Time(table::median(times)), bound)
    });
    let compared = [
        (BARE, Value::Time(table::median(&mut bares)), Bound::None),
        (PROTOTYPE, Value::Time(engine.prototype.hand_over), Bound::Ratio(1.0)),
    ];
    server.rows(name, Value::Time(table::median(&mut times)), compared.into_iter().chain(theirs))
}

fn thousand(length: &Length) -> Vec<Row> {
    let Some(server) = Server::start(&ETCD) else { return Vec::new() };
    let (count, span) = length.thousand;
    let guards: Vec<LeaseGuard> = (0..count)
        .map(|number| {
            let lease = Lease::connect(server.url(&number.to_string())).ttl(Duration::from_secs(2));
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
    let rows = |what: &str, ours, bound| {
        server.rows(&format!("{count} leases of 2 s, {what}"), ours, [("-", Value::None, bound)])
    };
    let lost = rows("lost", Value::Count(lost.len()), Bound::Count(0));
    rows("processor", Value::Share(share), Bound::Share(0.2)).into_iter().chain(lost).collect()
}
