//! Measures leases on servers: without contention, renewal, hand-over, and a thousand leases.
//!
//! - *Uncontended*: acquire and release, in sequence and by eight threads at once.
//! - *Renewal*: one heartbeat out of several that are due at once. The leases use a clock that
//!   jumps. On etcd one request renews all leases.
//! - *Hand-over*: a process releases, and a waiting process acquires. The time runs from just
//!   before the release. Hand-overs follow each other directly, as under contention, or the waiter
//!   has waited for a long time.
//! - *Thousand*: the processor share of the heartbeat of a thousand leases on etcd with a TTL of 2
//!   s, and whether the heartbeat keeps the leases.
//!
//! Each engine is an [`Engine`]: the start of a server, the bare requests on it, and its peers.
//! Ours and the peers alternate on the same server, which keeps its data in memory. The bench
//! leaves out software that is not installed, and prints a line about it.
//!
//! The bounds are the measurements of a prototype of each engine. For hand-overs they are also the
//! factors by which a lease must be faster than the peers' recipes. The duration of a request
//! depends on the machine. On a machine that is slower than the prototype's, compare our numbers
//! with the *bare* requests ([`lockkit_benches::baseline`]). Bare requests have no claim, no owner,
//! no limit on waits, no heartbeat bookkeeping, and no thread that listens for all waiters.

mod peers;

use std::ops::Range;
use std::os::unix::fs::chown;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use lockkit::lease::{Clock, ManualClock};
use lockkit::{Lease, LeaseGuard};
use lockkit_benches::Experiment;
use lockkit_benches::baseline::{self, BaselineClient};
use lockkit_benches::process::{self, Peer, now};
use lockkit_benches::table::{self, Bound, Row, Value};
use rustix::time::{ClockId, clock_gettime};
use tempfile::TempDir;

/// The amount of work to measure: blocks of alternating operations, and operations per block; the
/// same for hand-overs; the number of leases under heartbeat, and the span.
struct Length {
    blocks: (u32, u32),
    hand_overs: (u32, u32),
    late_hand_overs: u32,
    thousand: (usize, Duration),
}

const FULL: Length = Length {
    blocks: (15, 200),
    hand_overs: (20, 10),
    late_hand_overs: 20,
    thousand: (1000, Duration::from_secs(10)),
};
const QUICK: Length = Length {
    blocks: (3, 20),
    hand_overs: (1, 5),
    late_hand_overs: 2,
    thousand: (100, Duration::from_millis(2500)),
};

const EXPERIMENTS: [Experiment<Length>; 10] = [
    ("redis/uncontended", |length| uncontended(&REDIS, length)),
    ("redis/renewal", |length| renewal(&REDIS, length)),
    ("redis/hand-over", |length| hand_over(&REDIS, length)),
    ("postgres/uncontended", |length| {
        uncontended(&POSTGRES, length)
    }),
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
    /// Returns the command that starts a server on a loopback port in a directory, or the reason
    /// why none can start.
    start: fn(&Path, u16) -> Result<Command, String>,
    /// Returns the URL of a lease on the server at this port.
    url: fn(u16, &str) -> String,
    /// Returns the bare requests for a name on the server at this port.
    bare: fn(u16, &str) -> Box<dyn BaselineClient>,
    peers: &'static [PeerProgram],
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

/// A peer: a program that speaks the line protocol of `redis/peer.py`, with the server at this
/// port.
struct PeerProgram {
    name: &'static str,
    start: fn(u16) -> Result<Command, String>,
    /// The factor by which our hand-over must be faster than this peer.
    min_speedup: Option<f64>,
}

static REDIS: Engine = Engine {
    name: "redis",
    start: |directory, port| {
        let mut command = Command::new("redis-server");
        command.args([
            "--bind",
            "127.0.0.1",
            "--daemonize",
            "no",
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
        ]);
        command.arg(directory).arg("--port").arg(port.to_string());
        Ok(command)
    },
    url: |port, name| format!("redis://127.0.0.1:{port}/{name}"),
    bare: |port, name| Box::new(baseline::Redis::new(port, name)),
    peers: &[
        PeerProgram {
            name: "redis-py Lock",
            start: |port| peers::redis_peer("redis", port),
            min_speedup: Some(20.0),
        },
        PeerProgram {
            name: "python-redis-lock",
            start: |port| peers::redis_peer("redis_lock", port),
            min_speedup: None,
        },
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
    url: |port, name| {
        format!("postgres://postgres@127.0.0.1:{port}/postgres?sslmode=disable&lease={name}")
    },
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
        let [client, peer] =
            [port, process::free_port()].map(|port| format!("http://127.0.0.1:{port}"));
        let mut command = Command::new("etcd");
        command
            .args(["--name", "bench", "--log-level", "error", "--data-dir"])
            .arg(directory.join("data"));
        command.args([
            "--listen-client-urls",
            &client,
            "--advertise-client-urls",
            &client,
        ]);
        command.args([
            "--listen-peer-urls",
            &peer,
            "--initial-advertise-peer-urls",
            &peer,
        ]);
        command
            .arg("--initial-cluster")
            .arg(format!("bench={peer}"));
        Ok(command)
    },
    url: |port, name| format!("etcd://127.0.0.1:{port}/{name}"),
    bare: |port, name| Box::new(baseline::Etcd::new(port, name)),
    peers: &[
        PeerProgram {
            name: "etcd's own lock",
            start: peers::own_lock,
            min_speedup: Some(20.0),
        },
        PeerProgram {
            name: "etcdctl lock",
            start: peers::etcdctl,
            min_speedup: Some(20.0),
        },
    ],
    prototype: Prototype {
        uncontended: Duration::from_micros(908),
        renewal: Duration::from_micros(229),
        hand_over: Duration::from_micros(1617),
        rate: 3081.0,
    },
};

/// Returns the command that starts PostgreSQL. PostgreSQL refuses to run as root, so there it runs
/// as the user `postgres`.
fn start_postgres(directory: &Path, port: u16) -> Result<Command, String> {
    let versions = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten();
    let directories: Vec<_> = versions.map(|version| version.path().join("bin")).collect();
    let program = |name: &str| {
        let found = directories
            .iter()
            .map(|directory| directory.join(name))
            .find(|path| path.is_file());
        let program = found.unwrap_or_else(|| name.into());
        if !rustix::process::geteuid().is_root() {
            return Command::new(program);
        }
        let mut command = Command::new("setpriv");
        command
            .args([
                "--reuid=postgres",
                "--regid=postgres",
                "--clear-groups",
                "--",
            ])
            .arg(program)
            .current_dir("/");
        command
    };
    let run = |mut command: Command| match command.output() {
        Ok(done) if done.status.success() => {
            Ok(String::from_utf8_lossy(&done.stdout).trim().to_owned())
        }
        Ok(done) => Err(String::from_utf8_lossy(&done.stderr).trim().to_owned()),
        Err(error) => Err(error.to_string()),
    };
    if rustix::process::geteuid().is_root() {
        let mut who = Command::new("id");
        who.args(["-u", "postgres"]);
        let user = run(who)?
            .parse()
            .map_err(|_| "there is no user `postgres`".to_owned())?;
        chown(directory, Some(user), None).map_err(|error| error.to_string())?;
    }
    let data = directory.join("data");
    let mut init = program("initdb");
    init.arg("-D").arg(&data).args([
        "-A",
        "trust",
        "-U",
        "postgres",
        "-E",
        "UTF8",
        "--locale=C",
        "--no-sync",
    ]);
    run(init)?;
    let mut command = program("postgres");
    command
        .arg("-D")
        .arg(data)
        .arg("-k")
        .arg(directory)
        .arg("-p")
        .arg(port.to_string());
    command.args([
        "-c",
        "listen_addresses=127.0.0.1",
        "-c",
        "log_min_messages=panic",
    ]);
    Ok(command)
}

fn main() {
    match process::part().as_deref() {
        None => lockkit_benches::run(&EXPERIMENTS, &FULL, &QUICK),
        Some([what, port]) if what == "own-lock" => {
            peers::serve_own_lock(port.parse().expect("a port"))
        }
        Some([what, port, version]) if what == "etcdctl" => {
            peers::serve_etcdctl(port.parse().expect("a port"), version)
        }
        Some([engine, port]) => {
            let engine = [&REDIS, &POSTGRES, &ETCD]
                .into_iter()
                .find(|known| known.name == engine);
            run_baseline_waiter(engine.expect("an engine"), port.parse().expect("a port"));
        }
        Some([url]) => run_waiter(url),
        Some(part) => panic!("unknown part of a child: {part:?}"),
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
        started
            .inspect_err(|problem| println!("  without {}: {problem}", engine.name))
            .ok()
    }

    fn try_start(engine: &'static Engine) -> Result<Self, String> {
        let directory = tempfile::tempdir_in("/dev/shm").map_err(|error| error.to_string())?;
        let port = process::free_port();
        let mut command = (engine.start)(directory.path(), port)?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let process = command.spawn().map_err(|error| error.to_string())?;
        let mut server = Self {
            engine,
            port,
            process,
            _directory: directory,
        };
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

    fn bare(&self, name: &str) -> Box<dyn BaselineClient> {
        (self.engine.bare)(self.port, name)
    }

    /// Returns the peers that are available on this machine.
    fn peers(&self) -> Vec<(&'static PeerProgram, Peer)> {
        let start = |program: &'static PeerProgram| match (program.start)(self.port) {
            Ok(mut command) => {
                let mut peer = Peer::start(&mut command);
                println!("  compared with {} {}", program.name, peer.receive());
                Some((program, peer))
            }
            Err(problem) => {
                println!(
                    "  without {}, which cannot be installed: {problem}",
                    program.name
                );
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
        let row = |(peer, theirs, bound)| Row {
            name: name.clone(),
            ours,
            peer,
            theirs,
            bound,
        };
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
    Lease::connect(url).build().expect("a valid URL")
}

/// Returns the average duration of one operation.
fn each(count: u32, work: impl FnMut()) -> Duration {
    let start = Instant::now();
    std::iter::repeat_with(work)
        .take(count as usize)
        .for_each(drop);
    start.elapsed() / count
}

/// Returns the operations per second of all items together. Each item runs `count` operations on a
/// thread of its own.
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
    let Some(server) = Server::start(engine) else {
        return Vec::new();
    };
    let (blocks, count) = length.blocks;
    let (one, mut bare) = (server.lease("cycles"), server.bare("cycles"));
    // On a busy machine a release may fail. The heartbeat or the next acquisition then makes up for
    // it.
    let cycle = |lease: &mut Lease| drop(lease.lock().expect("no other process keeps it"));
    let bare_cycle = |bare: &mut Box<dyn BaselineClient>| {
        assert!(bare.acquire(), "no other process holds it");
        bare.release();
    };
    let mut peers = server.peers();
    let (mut ours, mut bares, mut theirs) = (Vec::new(), Vec::new(), vec![Vec::new(); peers.len()]);
    for _ in 0..blocks {
        ours.push(each(count, || cycle(&mut one.clone())));
        bares.push(each(count, || bare_cycle(&mut bare)));
        for ((_, peer), times) in peers.iter_mut().zip(&mut theirs) {
            peer.send(format_args!("cycles {count}"));
            let [all] = peer.receive_numbers();
            times.push(Duration::from_nanos(all) / count);
        }
    }
    let mut leases: Vec<_> = (0..THREADS)
        .map(|n| server.lease(&format!("thread-{n}")))
        .collect();
    let mut all_bare: Vec<_> = (0..THREADS)
        .map(|n| server.bare(&format!("thread-{n}")))
        .collect();
    let (mut rates, mut bare_rates): (Vec<_>, Vec<_>) = (0..blocks)
        .map(|_| {
            (
                rate(&mut leases, count, cycle),
                rate(&mut all_bare, count, bare_cycle),
            )
        })
        .unzip();
    let middle = |rates: &mut Vec<f64>| {
        rates.sort_by(f64::total_cmp);
        Value::Rate(rates[rates.len() / 2])
    };
    let theirs = peers.iter().zip(&mut theirs);
    let theirs = theirs.map(|((program, _), times)| {
        (program.name, Value::Time(table::median(times)), Bound::None)
    });
    let compared = [
        (BARE, Value::Time(table::median(&mut bares)), Bound::None),
        (
            PROTOTYPE,
            Value::Time(engine.prototype.uncontended),
            Bound::Ratio(1.0),
        ),
    ];
    let alone = server.rows(
        "acquire and release",
        Value::Time(table::median(&mut ours)),
        compared.into_iter().chain(theirs),
    );
    let compared = [
        (BARE, middle(&mut bare_rates), Bound::None),
        (
            PROTOTYPE,
            Value::Rate(engine.prototype.rate),
            Bound::AtLeast(1.0),
        ),
    ];
    let crowd = server.rows(
        "acquire and release, 8 threads",
        middle(&mut rates),
        compared,
    );
    alone.into_iter().chain(crowd).collect()
}

fn renewal(engine: &'static Engine, length: &Length) -> Vec<Row> {
    const COUNT: u32 = 200;
    const HEARTBEAT: Duration = Duration::from_secs(1);
    /// The client trusts etcd's answer about a session for this long, by a clock that does not
    /// jump.
    const KNOWN: Duration = Duration::from_millis(250);
    let Some(server) = Server::start(engine) else {
        return Vec::new();
    };
    let manual_clock = ManualClock::new();
    let clock: Arc<dyn Clock> = Arc::new(manual_clock.clone());
    let guards: Vec<LeaseGuard> = (0..COUNT)
        .map(|number| {
            let url = server.url(&format!("beats-{number}"));
            let lease = Lease::connect(url)
                .ttl(Duration::from_secs(30))
                .heartbeat(HEARTBEAT)
                .clock(clock.clone());
            lease
                .build()
                .expect("the options are valid")
                .try_lock()
                .expect("no other process holds it")
        })
        .collect();
    let mut bare = server.bare("beats");
    assert!(bare.acquire(), "no other process holds it");
    // A renewal gives a lease the remaining time of its session, whose last renewal may be earlier.
    let fresh = guards[0].remaining() - HEARTBEAT + KNOWN;
    let (mut times, mut bares) = (Vec::new(), Vec::new());
    for _ in 0..length.blocks.0 {
        bares.push(each(COUNT, || bare.renew()));
        thread::sleep(KNOWN);
        let start = Instant::now();
        manual_clock.advance(HEARTBEAT);
        for guard in &guards {
            // The loop polls rarely, because polling disturbs the measurement. The time must
            // advance, because a late renewal is retried later.
            while guard.remaining() < fresh {
                thread::sleep(Duration::from_millis(1));
                manual_clock.advance(Duration::from_micros(100));
            }
        }
        times.push(start.elapsed() / COUNT);
    }
    let compared = [
        (BARE, Value::Time(table::median(&mut bares)), Bound::None),
        (
            PROTOTYPE,
            Value::Time(engine.prototype.renewal),
            Bound::Ratio(1.0),
        ),
    ];
    server.rows(
        &format!("renewal, one of {COUNT}"),
        Value::Time(table::median(&mut times)),
        compared,
    )
}

/// Acts as a child: acquires on each line from the parent, and reports the time of the acquisition.
fn run_waiter(url: &str) {
    let lease = lease(url);
    let mut parent = Peer::parent();
    loop {
        parent.receive();
        let guard = lease.lock().expect("the lease");
        let acquired = now();
        guard.release().expect("it is held");
        parent.send(acquired);
    }
}

/// As [`run_waiter`], by bare requests.
fn run_baseline_waiter(engine: &Engine, port: u16) {
    let mut bare = (engine.bare)(port, "hand-over");
    bare.listen();
    let mut parent = Peer::parent();
    loop {
        parent.receive();
        bare.wait();
        let acquired = now();
        bare.release();
        parent.send(acquired);
    }
}

fn hand_over(engine: &'static Engine, length: &Length) -> Vec<Row> {
    let Some(server) = Server::start(engine) else {
        return Vec::new();
    };
    let (blocks, count) = length.hand_overs;
    // Hand-overs follow each other as under contention: the next waiter begins when the previous
    // waiter holds the lock. The waiters have many ages. Each of them sleeps by then, or already
    // polls at its final rate. None is older than 47 ms: etcd serves a waiter of its own lock ten
    // times per second until the waiter is up to date, and immediately from then on.
    let young = (0..blocks)
        .map(|block| block * count..(block + 1) * count)
        .collect();
    let mut rows = handed_over(&server, "hand-over", Duration::from_millis(10), young);
    let mut old = handed_over(
        &server,
        "hand-over after a long wait",
        Duration::from_millis(400),
        {
            (0..length.late_hand_overs)
                .map(|round| round..round + 1)
                .collect()
        },
    );
    old.iter_mut().for_each(|row| row.bound = Bound::None);
    rows.extend(old.into_iter().filter(|row| row.peer != PROTOTYPE));
    rows
}

/// Runs rounds of hand-overs in alternating blocks. Each waiter waits at least for `age`.
fn handed_over(server: &Server, name: &str, age: Duration, rounds: Vec<Range<u32>>) -> Vec<Row> {
    let engine = server.engine;
    let wait_for_age =
        |round: u32| thread::sleep(age + Duration::from_micros(u64::from(round % 100) * 370));
    let between = |released: u64, acquired: u64| {
        Duration::from_nanos(
            acquired
                .checked_sub(released)
                .expect("one at a time holds it"),
        )
    };
    let (lease, mut waiter) = (
        server.lease("hand-over"),
        Peer::spawn(&[&server.url("hand-over")]),
    );
    let mut ours = |round| {
        let guard = lease.lock().expect("the lease");
        waiter.send("wait");
        wait_for_age(round);
        let released = now();
        guard.release().expect("it is still held");
        let [acquired] = waiter.receive_numbers();
        between(released, acquired)
    };
    let mut holder = server.bare("hand-over");
    let mut waiter = Peer::spawn(&[engine.name, &server.port.to_string()]);
    let mut bare = |round| {
        assert!(holder.acquire(), "no other process holds it");
        waiter.send("wait");
        wait_for_age(round);
        let released = now();
        holder.release();
        let [acquired] = waiter.receive_numbers();
        between(released, acquired)
    };
    let theirs = |holder: &mut Peer, waiter: &mut Peer, round| {
        holder.send("hold");
        holder.expect("held");
        waiter.send("wait");
        wait_for_age(round);
        holder.send("release");
        let ([released], [acquired]) = (holder.receive_numbers(), waiter.receive_numbers());
        between(released, acquired)
    };
    let mut peers: Vec<_> = server.peers().into_iter().zip(server.peers()).collect();
    let (mut times, mut bares, mut others) =
        (Vec::new(), Vec::new(), vec![Vec::new(); peers.len()]);
    for rounds in rounds {
        times.extend(rounds.clone().map(&mut ours));
        bares.extend(rounds.clone().map(&mut bare));
        for (((_, holder), (_, waiter)), times) in peers.iter_mut().zip(&mut others) {
            times.extend(rounds.clone().map(|round| theirs(holder, waiter, round)));
        }
    }
    let theirs = peers
        .iter()
        .zip(&mut others)
        .map(|(((program, _), _), times)| {
            let bound = program
                .min_speedup
                .map_or(Bound::None, |factor| Bound::Ratio(1.0 / factor));
            (program.name, Value::Time(table::median(times)), bound)
        });
    let compared = [
        (BARE, Value::Time(table::median(&mut bares)), Bound::None),
        (
            PROTOTYPE,
            Value::Time(engine.prototype.hand_over),
            Bound::Ratio(1.0),
        ),
    ];
    server.rows(
        name,
        Value::Time(table::median(&mut times)),
        compared.into_iter().chain(theirs),
    )
}

fn thousand(length: &Length) -> Vec<Row> {
    let Some(server) = Server::start(&ETCD) else {
        return Vec::new();
    };
    let (count, span) = length.thousand;
    let guards: Vec<LeaseGuard> = (0..count)
        .map(|number| {
            let lease = Lease::connect(server.url(&number.to_string())).ttl(Duration::from_secs(2));
            lease
                .build()
                .expect("the options are valid")
                .try_lock()
                .expect("no other process holds it")
        })
        .collect();
    let used =
        || Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).expect("it is not negative");
    let (start, before) = (Instant::now(), used());
    thread::sleep(span);
    let share = (used() - before).as_secs_f64() / start.elapsed().as_secs_f64();
    let lost: Vec<_> = guards
        .iter()
        .filter_map(|guard| guard.check().err())
        .collect();
    if let Some(first) = lost.first() {
        println!("  {first}");
    }
    let rows = |what: &str, ours, bound| {
        server.rows(
            &format!("{count} leases of 2 s, {what}"),
            ours,
            [("-", Value::None, bound)],
        )
    };
    let lost = rows("lost", Value::Count(lost.len()), Bound::Count(0));
    rows("processor", Value::Share(share), Bound::Share(0.2))
        .into_iter()
        .chain(lost)
        .collect()
}
