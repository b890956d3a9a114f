//! Leases on servers: what they cost when nobody else wants them, what a beat costs, and how fast they change hands,
//! beside what else there is for the same server.
//!
//! - *Uncontended*: acquiring and releasing.
//! - *Renewal*: one beat of the heartbeat, out of some that are due at once. The leases go by a clock that jumps.
//! - *Hand-over*: a process releases, and another that waits acquires. The time runs from just before the release.
//!
//! Each engine is an [`Engine`] in [`ENGINES`]: how to start a server, its peers, and what ours may take there. Ours and
//! the peers' turns alternate, on the same server. What is not installed is left out, with a line that says so.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use lockkit::lease::{Clock, ManualClock};
use lockkit::{Lease, LeaseGuard};
use lockkit_benches::Experiment;
use lockkit_benches::process::{self, Peer, now};
use lockkit_benches::table::{self, Bound, Row, Value};
use tempfile::TempDir;

/// How much is measured: blocks of operations that take turns, and operations in one; hand-overs.
struct Length {
    blocks: (u32, u32),
    hand_overs: u32,
}

const FULL: Length = Length { blocks: (15, 500), hand_overs: 200 };
const QUICK: Length = Length { blocks: (3, 20), hand_overs: 5 };

const EXPERIMENTS: [Experiment<Length>; 3] =
    [("engines/uncontended", uncontended), ("engines/renewal", renewal), ("engines/hand-over", hand_over)];

/// What is measured of an engine.
struct Engine {
    name: &'static str,
    /// Starts a server on a loopback port in a folder; or says why it cannot.
    start: fn(&Path, u16) -> Result<Command, String>,
    /// The URL of a lease on the server at this port.
    url: fn(u16, &str) -> String,
    peers: &'static [Recipe],
    /// What acquiring and releasing, a beat and a hand-over may take.
    bounds: [Duration; 3],
}

/// A peer: a program that speaks the lines of `redis/peer.py`, with the server at this port.
struct Recipe {
    name: &'static str,
    start: fn(u16) -> Result<Command, String>,
    /// So many times faster than this our hand-over must be.
    behind: Option<f64>,
}

static ENGINES: [Engine; 1] = [Engine {
    name: "redis",
    start: |folder, port| {
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--daemonize", "no", "--save", "", "--appendonly", "no", "--dir"]);
        command.arg(folder).arg("--port").arg(port.to_string());
        Ok(command)
    },
    url: |port, name| format!("redis://127.0.0.1:{port}/{name}"),
    peers: &[
        Recipe { name: "redis-py Lock", start: |port| redis_peer("redis", port), behind: Some(20.0) },
        Recipe { name: "python-redis-lock", start: |port| redis_peer("redis_lock", port), behind: None },
    ],
    bounds: [Duration::from_micros(142), Duration::from_micros(65), Duration::from_micros(432)],
}];

fn redis_peer(package: &str, port: u16) -> Result<Command, String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("redis");
    let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("redis");
    let install = Command::new(folder.join("install.sh")).arg(place).output().map_err(|error| error.to_string())?;
    if !install.status.success() {
        return Err(String::from_utf8_lossy(&install.stderr).trim_end().to_owned());
    }
    let mut command = Command::new(String::from_utf8_lossy(&install.stdout).trim_end());
    command.arg(folder.join("peer.py")).arg(package).arg(port.to_string());
    Ok(command)
}

fn main() {
    if let Some(part) = process::part() {
        return waiter(&part);
    }
    lockkit_benches::run(&EXPERIMENTS, &FULL, &QUICK);
}

/// A server, gone when it is dropped.
struct Server {
    engine: &'static Engine,
    port: u16,
    process: Child,
    _folder: TempDir,
}

impl Server {
    /// Starts those that can be, and says which cannot.
    fn all() -> impl Iterator<Item = Self> {
        ENGINES.iter().filter_map(|engine| match Self::start(engine) {
            Ok(server) => Some(server),
            Err(problem) => {
                println!("  without {}: {problem}", engine.name);
                None
            }
        })
    }

    fn start(engine: &'static Engine) -> Result<Self, String> {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let port = listener.local_addr().expect("an address").port();
        drop(listener);
        let mut command = (engine.start)(folder.path(), port)?;
        let process = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().map_err(|error| error.to_string())?;
        let mut server = Self { engine, port, process, _folder: folder };
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            if let Ok(Some(status)) = server.process.try_wait() {
                return Err(format!("its server ended: {status}"));
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }

    fn lease(&self, name: &str) -> Lease {
        Lease::connect((self.engine.url)(self.port, name)).build().expect("a URL that is right")
    }

    /// The peers that can be had here.
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
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// How long one takes, on average.
fn each(count: u32, mut work: impl FnMut()) -> Duration {
    let start = Instant::now();
    for _ in 0..count {
        work();
    }
    start.elapsed() / count
}

/// A row of ours with its bound, and beside it one for each peer.
fn rows(
    name: &str,
    bound: Duration,
    ours: Duration,
    theirs: impl IntoIterator<Item = (&'static str, Duration, Bound)>,
) -> Vec<Row> {
    let row = |peer, theirs, bound| Row { name: name.to_owned(), ours: Value::Time(ours), peer, theirs, bound };
    let own = row("-", Value::None, Bound::Time(bound));
    std::iter::once(own)
        .chain(theirs.into_iter().map(|(peer, time, bound)| row(peer, Value::Time(time), bound)))
        .collect()
}

fn uncontended(length: &Length) -> Vec<Row> {
    let (blocks, count) = length.blocks;
    let measure = |server: Server| {
        let lease = server.lease("cycles");
        let mut peers = server.peers();
        let (mut ours, mut theirs) = (Vec::new(), vec![Vec::new(); peers.len()]);
        for _ in 0..blocks {
            ours.push(each(count, || drop(lease.try_lock().expect("nobody else takes it"))));
            for ((_, peer), times) in peers.iter_mut().zip(&mut theirs) {
                peer.say(format_args!("cycles {count}"));
                let [all] = peer.hear_numbers();
                times.push(Duration::from_nanos(all) / count);
            }
        }
        let theirs = peers.iter().zip(&mut theirs);
        let theirs = theirs.map(|((recipe, _), times)| (recipe.name, table::median(times), Bound::None));
        let name = format!("{}: acquire and release", server.engine.name);
        rows(&name, server.engine.bounds[0], table::median(&mut ours), theirs)
    };
    Server::all().flat_map(measure).collect()
}

fn renewal(length: &Length) -> Vec<Row> {
    const COUNT: u32 = 200;
    const HEARTBEAT: Duration = Duration::from_millis(250);
    let measure = |server: Server| {
        let jumping = ManualClock::new();
        let clock: Arc<dyn Clock> = Arc::new(jumping.clone());
        let guards: Vec<LeaseGuard> = (0..COUNT)
            .map(|number| {
                let url = (server.engine.url)(server.port, &format!("beats-{number}"));
                let lease = Lease::connect(url).ttl(Duration::from_secs(30)).heartbeat(HEARTBEAT).clock(clock.clone());
                lease.build().expect("the options go together").try_lock().expect("nobody else takes it")
            })
            .collect();
        let fresh = guards[0].remaining() - HEARTBEAT / 2;
        let mut times = Vec::new();
        for _ in 0..length.blocks.0 {
            let start = Instant::now();
            jumping.advance(HEARTBEAT);
            for guard in &guards {
                while guard.remaining() < fresh {
                    thread::sleep(Duration::from_micros(50));
                    // What is late is tried again later, which must come.
                    jumping.advance(Duration::from_micros(50));
                }
            }
            times.push(start.elapsed() / COUNT);
        }
        let name = format!("{}: renewal, one of {COUNT}", server.engine.name);
        rows(&name, server.engine.bounds[1], table::median(&mut times), [])
    };
    Server::all().flat_map(measure).collect()
}

/// A child: acquires whenever it is told to, and says when it had it.
fn waiter(part: &[String]) {
    let [url] = part else { panic!("a child needs its part") };
    let lease = Lease::connect(url.as_str()).build().expect("a URL that is right");
    let mut parent = Peer::parent();
    loop {
        parent.hear();
        let guard = lease.lock().expect("the lease");
        let acquired = now();
        drop(guard);
        parent.say(acquired);
    }
}

fn hand_over(length: &Length) -> Vec<Row> {
    // Waiters of all ages; each sleeps by then, or asks as often as it does.
    let let_wait = |round: u32| thread::sleep(Duration::from_micros(10_000 + u64::from(round % 100) * 997));
    let measure = |server: Server| {
        let url = (server.engine.url)(server.port, "hand-over");
        let lease = server.lease("hand-over");
        let mut ours = (Peer::spawn(&[&url]), Vec::new());
        let mut theirs: Vec<_> =
            server.peers().into_iter().zip(server.peers()).map(|pair| (pair, Vec::new())).collect();
        let note = |times: &mut Vec<Duration>, released: u64, acquired: u64| {
            times.push(Duration::from_nanos(acquired.checked_sub(released).expect("one at a time holds it")));
        };
        for round in 0..length.hand_overs {
            let guard = lease.lock().expect("the lease");
            ours.0.say("wait");
            let_wait(round);
            let released = now();
            guard.release().expect("it is still held");
            let [acquired] = ours.0.hear_numbers();
            note(&mut ours.1, released, acquired);
            for (((_, holder), (_, waiter)), times) in &mut theirs {
                holder.say("hold");
                holder.expect("held");
                waiter.say("wait");
                let_wait(round);
                holder.say("release");
                let ([released], [acquired]) = (holder.hear_numbers(), waiter.hear_numbers());
                note(times, released, acquired);
            }
        }
        let theirs = theirs.iter_mut().map(|(((recipe, _), _), times)| {
            let bound = recipe.behind.map_or(Bound::None, |behind| Bound::Ratio(1.0 / behind));
            (recipe.name, table::median(times), bound)
        });
        let name = format!("{}: hand-over", server.engine.name);
        rows(&name, server.engine.bounds[2], table::median(&mut ours.1), theirs)
    };
    Server::all().flat_map(measure).collect()
}
