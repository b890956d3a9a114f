//! Measures leases in files: without contention, hand-over, and many leases.
//!
//! - *Uncontended*: acquire and release, compared with `SoftFileLease` of Python's filelock in the
//!   same directory.
//! - *Renewal*: one heartbeat out of a thousand that are due at once, compared with its system
//!   calls: open a file, lock it, read and write the same number of bytes, unlock and close it. The
//!   leases use a clock that jumps from one heartbeat to the next.
//! - *Is held*: a check of the guard, compared with a read of the clock.
//! - *Hand-over*: a process releases, and a waiting process acquires. The time runs from just
//!   before the release.
//! - *Thousand*: acquire and drop a thousand leases of new files, compared with filelock.
//! - *Many*: the processor share of the heartbeat of ten thousand leases, and whether the heartbeat
//!   keeps the leases.
//!
//! Ours and the peer alternate, so that both see the same machine. Files are in memory, except in
//! one row. The column of filelock stays empty if filelock cannot be installed, for want of
//! python3, venv, pip or a package index.

use std::fs::{self, File};
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use lockkit::lease::{Clock, ManualClock, SystemClock};
use lockkit::{Lease, LeaseGuard};
use lockkit_benches::Experiment;
use lockkit_benches::process::{self, Peer, now};
use lockkit_benches::table::{self, Bound, Row, Value};
use rustix::fs::{FlockOperation, flock};
use rustix::time::{ClockId, clock_gettime};
use tempfile::TempDir;

/// The amount of work to measure.
struct Length {
    /// The number of blocks of alternating operations, and the operations in one block.
    blocks: (u32, u32),
    hand_overs: u32,
    /// The rounds of acquire and drop, and the number of leases.
    thousand: (u32, usize),
    /// The number of leases under heartbeat, and the span.
    many: (usize, Duration),
}

const FULL: Length = Length {
    blocks: (15, 500),
    hand_overs: 500,
    thousand: (5, 1000),
    many: (10_000, Duration::from_secs(10)),
};
const QUICK: Length = Length {
    blocks: (3, 20),
    hand_overs: 10,
    thousand: (1, 100),
    many: (1000, Duration::from_millis(1500)),
};

const EXPERIMENTS: [Experiment<Length>; 6] = [
    ("leases/uncontended", uncontended),
    ("leases/renewal", renewal),
    ("leases/is-held", is_held),
    ("leases/hand-over", hand_over),
    ("leases/thousand", thousand),
    ("leases/many", many),
];

fn main() {
    if let Some(part) = process::part() {
        return waiter(&part);
    }
    lockkit_benches::run(&EXPERIMENTS, &FULL, &QUICK);
}

/// Creates a directory in memory, so that no disk is measured. The directory is removed at the end.
fn in_memory() -> TempDir {
    tempfile::tempdir_in("/dev/shm").expect("a directory")
}

fn lease(path: impl AsRef<Path>) -> Lease {
    Lease::file(path.as_ref())
        .build()
        .expect("the options are valid")
}

fn acquire(lease: &Lease) -> LeaseGuard {
    lease.try_lock().expect("no other process holds it")
}

/// Returns the medians of two kinds of alternating blocks.
fn alternate(
    blocks: u32,
    mut ours: impl FnMut() -> Duration,
    mut theirs: impl FnMut() -> Option<Duration>,
) -> [Value; 2] {
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..blocks {
        times[0].push(ours());
        times[1].extend(theirs());
    }
    times.map(|mut times| {
        if times.is_empty() {
            Value::None
        } else {
            Value::Time(table::median(&mut times))
        }
    })
}

/// Returns the average duration of one operation.
fn each(count: u32, mut work: impl FnMut()) -> Duration {
    let start = Instant::now();
    for _ in 0..count {
        work();
    }
    start.elapsed() / count
}

/// A Python process that acquires leases of filelock.
struct Filelock(Peer);

impl Filelock {
    const NAME: &str = "filelock lease";

    /// Starts the process, and installs filelock if necessary. Returns `None`, and prints the
    /// reason, if that is not possible.
    fn start() -> Option<Self> {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("filelock");
        let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("filelock");
        let install = Command::new(directory.join("install.sh"))
            .arg(place)
            .output();
        let python = install
            .map_err(|error| error.to_string())
            .and_then(|output| match output.status.success() {
                true => Ok(String::from_utf8_lossy(&output.stdout)
                    .trim_end()
                    .to_owned()),
                false => Err(String::from_utf8_lossy(&output.stderr)
                    .trim_end()
                    .to_owned()),
            });
        match python {
            Ok(python) => {
                let mut peer = Peer::start(Command::new(python).arg(directory.join("peer.py")));
                println!(
                    "  compared with SoftFileLease of filelock {}",
                    peer.receive()
                );
                Some(Self(peer))
            }
            Err(problem) => {
                println!("  without filelock, which cannot be installed: {problem}");
                None
            }
        }
    }

    fn cycles(&mut self, path: &Path, count: u32) -> Duration {
        self.0
            .send(format_args!("cycles {count} {}", path.display()));
        let [all] = self.0.receive_numbers();
        Duration::from_nanos(all) / count
    }

    /// Returns the durations of `count` acquisitions and of `count` releases.
    fn many(&mut self, directory: &Path, count: usize) -> [Duration; 2] {
        self.0
            .send(format_args!("many {count} {}", directory.display()));
        self.0.receive_numbers().map(Duration::from_nanos)
    }
}

fn uncontended(length: &Length) -> Vec<Row> {
    let (blocks, count) = length.blocks;
    let mut filelock = Filelock::start();
    [
        ("in memory", in_memory()),
        ("on disk", tempfile::tempdir().expect("a directory")),
    ]
    .into_iter()
    .map(|(place, directory)| {
        let one = lease(directory.path().join("ours"));
        let path = directory.path().join("theirs");
        let [ours, theirs] = alternate(
            blocks,
            || each(count, || drop(acquire(&one))),
            || {
                filelock
                    .as_mut()
                    .map(|filelock| filelock.cycles(&path, count))
            },
        );
        let name = format!("acquire and release, {place}");
        Row {
            name,
            ours,
            peer: Filelock::NAME,
            theirs,
            bound: Bound::Ratio(0.25),
        }
    })
    .collect()
}

fn renewal(length: &Length) -> Vec<Row> {
    const COUNT: u32 = 1000;
    /// As long as the record of a lease.
    const RECORD: [u8; 1024] = [b'x'; 1024];
    const HEARTBEAT: Duration = Duration::from_millis(250);
    const LONG: Duration = Duration::from_millis(30);
    let directory = in_memory();
    let manual_clock = ManualClock::new();
    let clock: Arc<dyn Clock> = Arc::new(manual_clock.clone());
    let guards: Vec<LeaseGuard> = (0..COUNT)
        .map(|number| {
            let lease = Lease::file(directory.path().join(number.to_string()))
                .heartbeat(HEARTBEAT)
                .clock(clock.clone());
            acquire(&lease.build().expect("the options are valid"))
        })
        .collect();
    let fresh = guards[0].remaining() - HEARTBEAT / 2;
    let paths: Vec<_> = (0..COUNT)
        .map(|number| directory.path().join(format!("bare-{number}")))
        .collect();
    paths
        .iter()
        .for_each(|path| std::fs::write(path, RECORD).expect("there is room"));
    let [ours, theirs] = alternate(
        length.blocks.0,
        || {
            let start = Instant::now();
            manual_clock.advance(HEARTBEAT);
            for guard in &guards {
                while guard.remaining() < fresh {
                    // The loop polls rarely, because polling disturbs the measurement.
                    thread::sleep(Duration::from_micros(100));
                    // After a slow request the heartbeat skips the store for a time, which must
                    // pass.
                    if start.elapsed() > LONG {
                        manual_clock.advance(Duration::from_micros(50));
                    }
                }
            }
            start.elapsed() / COUNT
        },
        || {
            let mut files = paths.iter();
            Some(each(COUNT, || {
                let path = files.next().expect("as many as turns");
                let file = File::options()
                    .read(true)
                    .write(true)
                    .open(path)
                    .expect("a file");
                flock(&file, FlockOperation::NonBlockingLockExclusive)
                    .expect("no process has locked it");
                let mut record = [0; RECORD.len()];
                file.read_exact_at(&mut record, 0).expect("it has as much");
                file.write_all_at(&record, 0).expect("there is room");
                flock(&file, FlockOperation::Unlock).expect("it is held");
            }))
        },
    );
    let bound = Bound::Time(Duration::from_micros(10));
    vec![Row {
        name: "renewal, one of 1000".to_owned(),
        ours,
        peer: "its system calls alone",
        theirs,
        bound,
    }]
}

fn is_held(length: &Length) -> Vec<Row> {
    let (blocks, count) = length.blocks;
    let directory = in_memory();
    let guard = acquire(&lease(directory.path().join("lease")));
    let [ours, theirs] = alternate(
        blocks,
        || each(count, || assert!((0..1000).all(|_| guard.is_held()))),
        || {
            Some(each(count, || {
                (0..1000).for_each(|_| _ = black_box(clock_gettime(ClockId::Boottime)))
            }))
        },
    );
    vec![Row {
        name: "1000 times is_held".to_owned(),
        ours,
        peer: "reading the clock",
        theirs,
        bound: Bound::None,
    }]
}

/// Acquires, runs the closure as the holder, and releases.
type Hold = Box<dyn FnMut(&mut dyn FnMut())>;

/// Opens the lock in the directory.
type Open = fn(&Path) -> Hold;

/// The locks to hand over: our lease, and a lock whose waiter the kernel wakes.
const HAND_OVER: [(&str, Open); 2] = [
    ("lease", |directory| {
        let lease = lease(directory.join("lease"));
        Box::new(move |inside| {
            let guard = lease.lock().expect("the lease");
            inside();
            guard.release().expect("it is still held");
        })
    }),
    ("flock", |directory| {
        let file = File::create(directory.join("flock")).expect("a file");
        Box::new(move |inside| {
            flock(&file, FlockOperation::LockExclusive).expect("the lock");
            inside();
            flock(&file, FlockOperation::Unlock).expect("it is held");
        })
    }),
];

/// Acts as a child: acquires on each line from the parent, and reports the time of the acquisition.
fn waiter(part: &[String]) {
    let [kind, directory] = part else {
        panic!("a child needs its part")
    };
    let (_, open) = HAND_OVER
        .iter()
        .find(|(name, _)| name == kind)
        .expect("the parent knows the same kinds");
    let mut hold = open(directory.as_ref());
    let mut parent = Peer::parent();
    loop {
        parent.receive();
        let mut acquired = 0;
        hold(&mut || acquired = now());
        parent.send(acquired);
    }
}

fn hand_over(length: &Length) -> Vec<Row> {
    let directory = in_memory();
    let path = directory
        .path()
        .to_str()
        .expect("the directory's path is UTF-8");
    let mut contenders = HAND_OVER.map(|(kind, open)| {
        (
            open(directory.path()),
            Peer::spawn(&[kind, path]),
            Vec::<Duration>::new(),
        )
    });
    for round in 0..length.hand_overs {
        for (hold, waiter, times) in &mut contenders {
            let mut released = 0;
            hold(&mut || {
                waiter.send("wait");
                waiter.wait_until_asleep();
                // The waiters have different ages.
                thread::sleep(Duration::from_micros(u64::from(round % 100) * 37));
                released = now();
            });
            let [acquired] = waiter.receive_numbers();
            times.push(Duration::from_nanos(
                acquired
                    .checked_sub(released)
                    .expect("one at a time holds it"),
            ));
        }
    }
    let [[ours, our_longest], [theirs, their_longest]] = contenders.map(|(.., mut times)| {
        [table::median(&mut times), table::quantile(&mut times, 1.0)].map(Value::Time)
    });
    let bound = Bound::Time(Duration::from_millis(5));
    let row = |what, ours, theirs| Row {
        name: format!("hand-over, {what}"),
        ours,
        peer: "flock",
        theirs,
        bound,
    };
    vec![
        row("median", ours, theirs),
        row("longest", our_longest, their_longest),
    ]
}

fn thousand(length: &Length) -> Vec<Row> {
    let (rounds, count) = length.thousand;
    let mut filelock = Filelock::start();
    let (mut ours, mut theirs) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    let note = |all: &mut [Vec<Duration>; 2], times: [Duration; 2]| {
        all.iter_mut()
            .zip(times)
            .for_each(|(all, time)| all.push(time));
    };
    for _ in 0..rounds {
        let directory = in_memory();
        let leases: Vec<Lease> = (0..count)
            .map(|number| lease(directory.path().join(format!("ours-{number}"))))
            .collect();
        let start = Instant::now();
        let guards: Vec<LeaseGuard> = leases.iter().map(acquire).collect();
        let acquired = start.elapsed();
        drop(guards);
        note(&mut ours, [acquired, start.elapsed() - acquired]);
        if let Some(filelock) = &mut filelock {
            note(&mut theirs, filelock.many(directory.path(), count));
        }
    }
    let names = [
        format!("acquire {count} leases, new files"),
        format!("drop {count} leases"),
    ];
    let value = |mut times: Vec<Duration>| match times.is_empty() {
        true => Value::None,
        false => Value::Time(table::median(&mut times)),
    };
    let rows = names
        .into_iter()
        .zip(ours.map(value))
        .zip(theirs.map(value));
    rows.map(|((name, ours), theirs)| Row {
        name,
        ours,
        peer: Filelock::NAME,
        theirs,
        bound: Bound::None,
    })
    .collect()
}

/// Sleeps for `span`, and returns the longest time that this program did not run, by the clock that
/// leases use.
fn longest_stop(span: Duration) -> Duration {
    const CHECK_INTERVAL: Duration = Duration::from_millis(50);
    let start = SystemClock.now();
    let (mut last, mut longest) = (start, Duration::ZERO);
    while last - start < span {
        thread::sleep(CHECK_INTERVAL);
        let now = SystemClock.now();
        longest = longest.max((now - last).saturating_sub(CHECK_INTERVAL));
        last = now;
    }
    longest
}

fn many(length: &Length) -> Vec<Row> {
    const HEARTBEAT: Duration = Duration::from_secs(1);
    let (count, span) = length.many;
    let directory = in_memory();
    let guards: Vec<LeaseGuard> = (0..count)
        .map(|number| {
            let lease = Lease::file(directory.path().join(number.to_string())).heartbeat(HEARTBEAT);
            acquire(&lease.build().expect("the options are valid"))
        })
        .collect();
    // From here on every lease has a heartbeat.
    thread::sleep(HEARTBEAT);
    let used =
        || Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).expect("it is not negative");
    let (start, before) = (Instant::now(), used());
    let stopped = longest_stop(span);
    let share = (used() - before).as_secs_f64() / start.elapsed().as_secs_f64();
    // This thread is not counted.
    let threads = fs::read_dir("/proc/self/task")
        .expect("/proc shows the threads")
        .count()
        - 1;
    let lost: Vec<_> = guards
        .iter()
        .filter_map(|guard| guard.check().err())
        .collect();
    if let Some(first) = lost.first() {
        println!("  {first}");
    }
    if stopped > HEARTBEAT {
        println!(
            "  this program was stopped for {stopped:?}; leases expire after 3 s without a renewal, as they should"
        );
    }
    let row = |what: &str, ours, bound| {
        let name = format!("{count} leases renewed each second, {what}");
        Row {
            name,
            ours,
            peer: "-",
            theirs: Value::None,
            bound,
        }
    };
    vec![
        row("processor", Value::Share(share), Bound::Share(0.15)),
        // One thread renews. The watchdog sleeps, and checks periodically whether the first is
        // stuck in a request.
        row(
            "threads with the watchdog",
            Value::Count(threads),
            Bound::Count(2),
        ),
        row("lost", Value::Count(lost.len()), Bound::Count(0)),
    ]
}
