//! Measures processes that contend for a lock, in comparison with flock(2).
//!
//! - *Hand-over*: two processes hold the lock in turns. Each holder waits until the other process
//!   sleeps in its wait. The time runs from just before the release to just after the other
//!   process's acquisition.
//! - *Crowd*: many processes acquire the lock repeatedly and hold it briefly. The results are the
//!   number of acquisitions and the longest wait of any process.
//! - *Timed wait*: the processor time of a waiter that times out.
//! - *Giving up*: the largest delay of a waiter that times out or is cancelled.
//! - *Death*: a holder is killed while another process waits. The time runs from just before the
//!   kill.
//!
//! Blocks of ours and of the peer alternate. To add a lock, add a [`Comparison`]; to add a peer,
//! add a [`Contender`].

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use lockkit::{
    CancelToken, FileLock, FileLockManager, InMemoryLockManager, Lease, Lock, LockManager,
    NamedLock, PidFile, ShmLockManager, Wait,
};
use lockkit_benches::arguments;
use lockkit_benches::process::{self, Peer, now, spin};
use lockkit_benches::table::{self, Bound, Row, Value};
use rustix::fs::{FlockOperation, flock};
use rustix::time::{ClockId, clock_gettime};

const COMPARISONS: &[Comparison] = &[
    Comparison {
        ours: &NAMED_LOCK,
        peer: &FLOCK,
        hand_over: Bound::Ratio(1.5),
        longest_wait: Bound::Time(Duration::from_millis(50)),
    },
    Comparison {
        ours: &FILE_LOCK,
        peer: &FD_LOCK,
        hand_over: Bound::None,
        longest_wait: Bound::None,
    },
    Comparison {
        ours: &PID_FILE,
        peer: &FSLOCK_WITH_PID,
        hand_over: Bound::None,
        longest_wait: Bound::None,
    },
];

const NAMED_LOCK: Contender = Contender {
    name: "NamedLock",
    open: |_| {
        let lock = NamedLock::new("lockkit-bench-contended").unwrap();
        Box::new(move |inside| {
            let _guard = lock.lock().unwrap();
            inside();
        })
    },
};

const FILE_LOCK: Contender = Contender {
    name: "FileLock",
    open: |directory| {
        let lock = FileLock::new(directory.join("file-lock"));
        Box::new(move |inside| {
            let _guard = lock.lock().unwrap();
            inside();
        })
    },
};

const PID_FILE: Contender = Contender {
    name: "PidFile",
    open: |directory| {
        let lock = PidFile::new(directory.join("ours.pid")).unwrap();
        Box::new(move |inside| {
            let _guard = lock.lock().unwrap();
            inside();
        })
    },
};

const FLOCK: Contender = Contender {
    name: "flock",
    open: |directory| {
        let file = File::create(directory.join("flock")).unwrap();
        Box::new(move |inside| {
            flock(&file, FlockOperation::LockExclusive).unwrap();
            inside();
            flock(&file, FlockOperation::Unlock).unwrap();
        })
    },
};

const FD_LOCK: Contender = Contender {
    name: "fd-lock",
    open: |directory| {
        let mut lock = fd_lock::RwLock::new(File::create(directory.join("fd-lock")).unwrap());
        Box::new(move |inside| {
            let _guard = lock.write().unwrap();
            inside();
        })
    },
};

const FSLOCK_WITH_PID: Contender = Contender {
    name: "fslock, with pid",
    open: |directory| {
        let mut lock = fslock::LockFile::open(&directory.join("fslock.pid")).unwrap();
        Box::new(move |inside| {
            lock.lock_with_pid().unwrap();
            inside();
            lock.unlock().unwrap();
        })
    },
};

/// One of our locks, a peer, and the bounds on our lock.
struct Comparison {
    ours: &'static Contender,
    peer: &'static Contender,
    hand_over: Bound,
    /// The bound on the longest wait in the largest crowd.
    longest_wait: Bound,
}

/// A lock that several processes can open and hold.
struct Contender {
    name: &'static str,
    /// Opens the lock, with its files in the given directory.
    open: fn(&Path) -> Hold,
}

/// Waits for the lock, runs the closure as the holder, and releases the lock.
type Hold = Box<dyn FnMut(&mut dyn FnMut())>;

impl Contender {
    fn by_name(name: &str) -> &'static Self {
        let mut all = COMPARISONS
            .iter()
            .flat_map(|comparison| [comparison.ours, comparison.peer]);
        all.find(|contender| contender.name == name)
            .expect("the parent knows the same contenders")
    }

    /// Starts a child that plays `part` with this lock.
    fn spawn(&self, part: &str, directory: &Path, number: u64) -> Peer {
        let directory = directory.to_str().expect("the directory's path is UTF-8");
        Peer::spawn(&[part, self.name, directory, &number.to_string()])
    }
}

/// The amount of work to measure.
struct Length {
    /// The number of hand-over blocks, and the turns of each process in one block.
    hand_over: (u32, u64),
    /// The number of crowd blocks, and the length of one block.
    crowd: (u32, Duration),
    deaths: u32,
    /// The length of a timed wait.
    wait: Duration,
}

const FULL: Length = Length {
    hand_over: (20, 200),
    crowd: (3, Duration::from_millis(700)),
    deaths: 200,
    wait: Duration::from_secs(5),
};
const QUICK: Length = Length {
    hand_over: (2, 50),
    crowd: (1, Duration::from_millis(50)),
    deaths: 10,
    wait: Duration::from_millis(500),
};

/// Measures a comparison, with its files in a directory.
type Experiment = fn(&Comparison, &Path, &Length) -> Vec<Row>;

const EXPERIMENTS: [(&str, Experiment); 3] = [
    ("hand-over", Comparison::hand_over),
    ("crowd", Comparison::crowd),
    ("death", Comparison::death),
];

fn main() {
    if let Some(part) = process::part() {
        return play(&part);
    }
    let filter = arguments::filter();
    let _exclusive = lockkit_benches::exclusive_run();
    let directory = tempfile::tempdir().unwrap();
    let length = if arguments::is_quick() { QUICK } else { FULL };

    let mut rows = Vec::new();
    for comparison in COMPARISONS {
        for (name, experiment) in EXPERIMENTS {
            let name = format!("contended/{}/{name}", comparison.ours.name);
            if name.contains(&filter) {
                println!("{name}");
                rows.extend(experiment(comparison, directory.path(), &length));
            }
        }
    }
    if "contended/FileLock/timed-wait".contains(&filter) {
        println!("contended/FileLock/timed-wait");
        rows.push(timed_wait(directory.path(), length.wait));
    }
    if "contended/giving-up".contains(&filter) {
        println!("contended/giving-up");
        rows.extend(all_giving_up(directory.path()));
    }
    table::print(&rows);
}

/// Plays the part of a child.
fn play(part: &[String]) {
    let [part, contender, directory, number] = part else {
        panic!("a child needs its part")
    };
    let mut hold = (Contender::by_name(contender).open)(directory.as_ref());
    let number = number.parse().expect("the parent sends a number");
    let mut parent = Peer::parent();
    match &**part {
        HAND_OVER => hand_over_child(&mut hold, number, &mut parent),
        CROWD => crowd_child(&mut hold, number, &mut parent),
        WAITER => waiter(&mut hold, &mut parent),
        VICTIM => victim(&mut hold, &mut parent),
        _ => panic!("unknown part of a child: {part}"),
    }
}

impl Comparison {
    fn row(&self, what: &str, ours: Value, theirs: Value, bound: Bound) -> Row {
        Row {
            name: format!("{}, {what}", self.ours.name),
            ours,
            peer: self.peer.name,
            theirs,
            bound,
        }
    }

    /// Measures blocks of ours and of the peer, alternating.
    fn alternate<T>(
        &self,
        blocks: u32,
        mut measure: impl FnMut(&Contender) -> Vec<T>,
    ) -> [Vec<T>; 2] {
        let mut all = [Vec::new(), Vec::new()];
        for _ in 0..blocks {
            for (contender, all) in [self.ours, self.peer].into_iter().zip(&mut all) {
                all.extend(measure(contender));
            }
        }
        all
    }

    fn hand_over(&self, directory: &Path, length: &Length) -> Vec<Row> {
        let (blocks, turns) = length.hand_over;
        let times = self.alternate(blocks, |contender| hand_overs(contender, directory, turns));
        let [[ours, our_tail], [theirs, their_tail]] = times.map(|mut times| {
            [table::median(&mut times), table::quantile(&mut times, 0.99)].map(Value::Time)
        });
        vec![
            self.row("hand-over, median", ours, theirs, self.hand_over),
            self.row("hand-over, p99", our_tail, their_tail, Bound::None),
        ]
    }

    fn crowd(&self, directory: &Path, length: &Length) -> Vec<Row> {
        let (blocks, time) = length.crowd;
        let sum = |shares: Vec<Share>| {
            let acquisitions: u64 = shares.iter().map(|share| share.acquisitions).sum();
            let longest = shares
                .iter()
                .map(|share| share.longest_wait)
                .max()
                .unwrap_or_default();
            [
                Value::Time(longest),
                Value::Rate(acquisitions as f64 / (time * blocks).as_secs_f64()),
            ]
        };
        let mut rows = Vec::new();
        for hold in CROWD_HOLDS {
            for size in CROWD_SIZES {
                let shares = self.alternate(blocks, |contender| {
                    crowd(contender, directory, size, hold, time)
                });
                let [[ours, our_rate], [theirs, their_rate]] = shares.map(sum);
                let what = format!("{size} processes hold {} us", hold.as_micros());
                let bound = if (size, hold) == LARGEST {
                    self.longest_wait
                } else {
                    Bound::None
                };
                rows.push(self.row(&format!("{what}, longest wait"), ours, theirs, bound));
                rows.push(self.row(
                    &format!("{what}, throughput"),
                    our_rate,
                    their_rate,
                    Bound::None,
                ));
            }
        }
        rows
    }

    fn death(&self, directory: &Path, length: &Length) -> Vec<Row> {
        let mut waiters =
            [self.ours, self.peer].map(|contender| contender.spawn(WAITER, directory, 0));
        let mut times = [Vec::new(), Vec::new()];
        for _ in 0..length.deaths {
            for ((contender, waiter), times) in [self.ours, self.peer]
                .iter()
                .zip(&mut waiters)
                .zip(&mut times)
            {
                times.push(death(contender, directory, waiter));
            }
        }
        let [ours, theirs] = times.map(|mut times| Value::Time(table::median(&mut times)));
        vec![self.row(
            "after SIGKILL of the holder, median",
            ours,
            theirs,
            Bound::None,
        )]
    }
}

/// The line of a child that has finished its preparation.
const READY: &str = "ready";
/// The line of a process that has just acquired the lock.
const ACQUIRED: &str = "acquired";

const HAND_OVER: &str = "hand-over";

/// The times just after the acquisition and just before the release.
struct HoldTimes {
    acquired: u64,
    released: u64,
}

fn hand_overs(contender: &Contender, directory: &Path, turns: u64) -> Vec<Duration> {
    let mut hold = (contender.open)(directory);
    let mut child = contender.spawn(HAND_OVER, directory, turns);
    child.expect(READY);
    let mut mine = Vec::new();
    for _ in 0..turns {
        mine.push(hold_once(&mut hold, &mut child));
        child.expect(ACQUIRED);
    }
    let theirs: Vec<HoldTimes> = (0..turns)
        .map(|_| {
            let [acquired, released] = child.receive_numbers();
            HoldTimes { acquired, released }
        })
        .collect();
    // The order is: mine, theirs, mine, theirs. The last of theirs has no successor.
    let order: Vec<HoldTimes> = mine
        .into_iter()
        .zip(theirs)
        .flat_map(|(mine, theirs)| [mine, theirs])
        .collect();
    let time = |from: u64, to: u64| {
        to.checked_sub(from)
            .expect("one process at a time holds the lock")
    };
    order
        .windows(2)
        .map(|pair| Duration::from_nanos(time(pair[0].released, pair[1].acquired)))
        .collect()
}

fn hand_over_child(hold: &mut Hold, turns: u64, parent: &mut Peer) {
    parent.send(READY);
    let mine: Vec<HoldTimes> = (0..turns)
        .map(|_| {
            parent.expect(ACQUIRED);
            hold_once(hold, parent)
        })
        .collect();
    for HoldTimes { acquired, released } in mine {
        parent.send(format_args!("{acquired} {released}"));
    }
}

/// Waits for the lock, and holds it until the other process waits for it. The other process starts
/// to wait only after it hears that the lock is held. Otherwise a lock without a queue would often
/// return to the process that has just released it.
fn hold_once(hold: &mut Hold, other: &mut Peer) -> HoldTimes {
    let mut times = HoldTimes {
        acquired: 0,
        released: 0,
    };
    hold(&mut || {
        times.acquired = now();
        other.send(ACQUIRED);
        other.wait_until_asleep();
        times.released = now();
    });
    times
}

const CROWD: &str = "crowd";
const CROWD_SIZES: [usize; 3] = [2, 8, 64];
/// The hold times of the crowd.
const CROWD_HOLDS: [Duration; 2] = [Duration::ZERO, Duration::from_micros(20)];
/// The crowd with the longest wait.
const LARGEST: (usize, Duration) = (CROWD_SIZES[2], CROWD_HOLDS[1]);

/// The results of one process of the crowd.
struct Share {
    acquisitions: u64,
    longest_wait: Duration,
}

fn crowd(
    contender: &Contender,
    directory: &Path,
    size: usize,
    hold: Duration,
    time: Duration,
) -> Vec<Share> {
    let hold = hold.as_nanos() as u64;
    let mut children: Vec<Peer> = (0..size)
        .map(|_| contender.spawn(CROWD, directory, hold))
        .collect();
    for child in &mut children {
        child.expect(READY);
    }
    // This start is late enough that every process has received the message.
    let start = now() + 20_000_000;
    let end = start + time.as_nanos() as u64;
    for child in &mut children {
        child.send(format_args!("{start} {end}"));
    }
    children
        .iter_mut()
        .map(|child| {
            let [acquisitions, longest_wait] = child.receive_numbers();
            Share {
                acquisitions,
                longest_wait: Duration::from_nanos(longest_wait),
            }
        })
        .collect()
}

/// Acquires the lock repeatedly until the end. An unfinished wait at the end counts with its full
/// length for the longest wait, and does not count for the throughput.
fn crowd_child(hold: &mut Hold, inside: u64, parent: &mut Peer) {
    parent.send(READY);
    let [start, end] = parent.receive_numbers();
    std::thread::sleep(Duration::from_nanos(start.saturating_sub(now())));
    let (mut acquisitions, mut longest_wait) = (0_u64, 0);
    let mut asked = now();
    while asked < end {
        hold(&mut || {
            let acquired = now();
            longest_wait = longest_wait.max(acquired - asked);
            if acquired < end {
                acquisitions += 1;
                spin(Duration::from_nanos(inside));
            }
        });
        asked = now();
    }
    parent.send(format_args!("{acquisitions} {longest_wait}"));
}

/// Measures, for every kind of lock, the largest delay with which a waiter for a held lock gives
/// up.
fn all_giving_up(directory: &Path) -> Vec<Row> {
    let table = ShmLockManager::create(directory.join("table"), 64).unwrap();
    let files = FileLockManager::create(directory.join("table-of-files")).unwrap();
    let memory = InMemoryLockManager::new(64).unwrap();
    let rows = [
        giving_up(
            "NamedLock",
            &NamedLock::new("lockkit-bench-contended").unwrap(),
        ),
        giving_up("FileLock", &FileLock::new(directory.join("giving-up"))),
        giving_up(
            "PidFile",
            &PidFile::new(directory.join("giving-up.pid")).unwrap(),
        ),
        giving_up(
            "Lease",
            &Lease::file(directory.join("giving-up.lease"))
                .build()
                .unwrap(),
        ),
        giving_up("ShmLockManager's lock", &table.allocate().unwrap()),
        giving_up("FileLockManager's lock", &files.allocate().unwrap()),
        giving_up("InMemoryLockManager's lock", &memory.allocate().unwrap()),
    ];
    rows.into_iter().flatten().collect()
}

fn giving_up<L: Lock + Sync>(name: &str, lock: &L) -> [Row; 2] {
    const ROUNDS: usize = 50;
    const LIMIT: Duration = Duration::from_millis(10);
    let _held = lock.lock().unwrap();
    let maximum = |delay: &dyn Fn() -> Duration| {
        Value::Time((0..ROUNDS).map(|_| delay()).max().unwrap_or_default())
    };
    let timed_out = || {
        let start = Instant::now();
        assert!(lock.lock_for(LIMIT).is_err_and(|error| error.is_timeout()));
        start.elapsed().saturating_sub(LIMIT)
    };
    let slept = || {
        let start = Instant::now();
        std::thread::sleep(LIMIT);
        start.elapsed().saturating_sub(LIMIT)
    };
    let cancelled = || {
        let token = CancelToken::new();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                assert!(
                    lock.acquire(&Wait::forever().or_cancelled(&token))
                        .is_err_and(|error| error.is_cancelled())
                );
                Instant::now()
            });
            std::thread::sleep(LIMIT);
            let start = Instant::now();
            token.cancel();
            waiter
                .join()
                .expect("the waiter is well")
                .saturating_duration_since(start)
        })
    };
    let sleep = maximum(&slept);
    let bound = Bound::Time(Duration::from_millis(5));
    [
        ("a timeout", maximum(&timed_out)),
        ("a cancellation", maximum(&cancelled)),
    ]
    .map(|(what, ours)| Row {
        name: format!("{name}, delay at {what}, maximum of {ROUNDS}"),
        ours,
        peer: "a sleep",
        theirs: sleep,
        bound,
    })
}

/// Measures the processor time that this thread spends in a wait for a held lock until the wait
/// times out.
fn timed_wait(directory: &Path, limit: Duration) -> Row {
    let busy = |wait: &dyn Fn()| {
        let used = || {
            Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).expect("it is not negative")
        };
        let before = used();
        wait();
        Value::Time(used() - before)
    };
    let lock = FileLock::new(directory.join("waited-for"));
    let _held = lock.lock().unwrap();
    let file = File::open(lock.path()).unwrap();
    Row {
        name: format!("FileLock, waiting {limit:?}, processor time"),
        ours: busy(&|| assert!(lock.lock_for(limit).is_err_and(|error| error.is_timeout()))),
        peer: "poll every 1 ms",
        theirs: busy(&|| {
            let end = Instant::now() + limit;
            while Instant::now() < end {
                assert!(flock(&file, FlockOperation::NonBlockingLockExclusive).is_err());
                std::thread::sleep(Duration::from_millis(1));
            }
        }),
        bound: Bound::Time(limit / 100),
    }
}

const WAITER: &str = "waiter";
const VICTIM: &str = "victim";

fn death(contender: &Contender, directory: &Path, waiter: &mut Peer) -> Duration {
    let mut holder = contender.spawn(VICTIM, directory, 0);
    holder.expect(ACQUIRED);
    waiter.send("wait");
    waiter.wait_until_asleep();
    let killed = now();
    holder.kill();
    let [acquired] = waiter.receive_numbers();
    Duration::from_nanos(
        acquired
            .checked_sub(killed)
            .expect("the lock was held until the kill"),
    )
}

fn victim(hold: &mut Hold, parent: &mut Peer) {
    hold(&mut || {
        parent.send(ACQUIRED);
        // No line arrives. The child ends by the kill, or with its parent.
        parent.receive();
    });
}

fn waiter(hold: &mut Hold, parent: &mut Peer) -> ! {
    loop {
        parent.receive();
        let mut acquired = 0;
        hold(&mut || acquired = now());
        parent.send(acquired);
    }
}
