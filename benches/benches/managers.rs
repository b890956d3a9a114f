//! Measures lock managers in shared memory, compared with a robust, process-shared pthread mutex,
//! the closest equivalent in C.
//!
//! - *Uncontended*: acquire and release a lock without contention.
//! - *Allocate*: allocate and free a lock, in a table that is nearly full and in an empty table.
//! - *Open*: open an existing table and attach a forked child to it, for a large and a small table.
//! - *Death*: a holder is killed while another process waits. The time runs from just before the
//!   kill.
//! - *Contended*: many processes acquire one lock repeatedly. The results are the number of
//!   acquisitions and the longest wait of any process. The measurement starts when all processes
//!   have run for a moment and the kernel has spread them over the processors.
//!
//! Two processes have a processor each, and still the system pauses each of them now and then. The
//! longest pause is measured with two processes that take no lock. No process gets a lock whose
//! holder is paused, or while it is paused itself. So no lock's longest wait is shorter than such a
//! pause. The mutex's wait is hardly longer if the hold time is zero. So for two processes the
//! bound applies to the part of our wait beyond such a pause.
//!
//! Ours and the peer alternate, so that both see the same machine. Workers are forked and not
//! started as new programs, because the mutex is in memory without a name. Each worker counts in
//! shared memory.

use std::hint::black_box;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lockkit::{FileLockManager, LockManager, ManagedLock, ShmLockManager};
use lockkit_benches::Experiment;
use lockkit_benches::process::{now, spin};
use lockkit_benches::table::{self, Bound, Row, Value};

/// The amount of work to measure.
struct Length {
    /// The number of blocks of alternating operations, and thousands of operations in one block.
    blocks: (u32, u32),
    opens: u32,
    deaths: u32,
    /// The number of blocks of each crowd, and the length of one block.
    crowd: (u32, Duration),
}

const FULL: Length = Length {
    blocks: (15, 300),
    opens: 50,
    deaths: 200,
    crowd: (7, Duration::from_secs(2)),
};
const QUICK: Length = Length {
    blocks: (3, 20),
    opens: 5,
    deaths: 10,
    crowd: (1, Duration::from_millis(100)),
};

const EXPERIMENTS: [Experiment<Length>; 5] = [
    ("managers/uncontended", uncontended),
    ("managers/allocate", allocate),
    ("managers/open", open),
    ("managers/death", death),
    ("managers/contended", contended),
];

fn main() {
    lockkit_benches::run(&EXPERIMENTS, &FULL, &QUICK);
}

/// A table that is removed at the end.
struct Table(ShmLockManager);

impl Table {
    fn new(capacity: u32) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = format!("/dev/shm/lockkit-bench-{}-{count}", std::process::id());
        Self(ShmLockManager::create(path, capacity).expect("a table"))
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.0.path());
    }
}

/// Maps memory that forked children share.
fn shared<T>() -> &'static T {
    // SAFETY: a fresh, zeroed mapping of the right length, aligned to a page, never unmapped; every
    // `T` here is made of atomics or initialised through its pointer before use.
    unsafe {
        let length = size_of::<T>();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let start = libc::mmap(
            std::ptr::null_mut(),
            length,
            protection,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        assert_ne!(start, libc::MAP_FAILED);
        &*start.cast::<T>()
    }
}

/// A robust mutex that processes share.
#[derive(Clone, Copy)]
struct Robust(*mut libc::pthread_mutex_t);

impl Robust {
    fn new() -> Self {
        let mutex: &MaybeUninit<libc::pthread_mutex_t> = shared();
        let mutex = mutex.as_ptr().cast_mut();
        let mut attributes = MaybeUninit::uninit();
        // SAFETY: the attributes are initialised before they are used, the mutex by
        // `pthread_mutex_init`.
        unsafe {
            libc::pthread_mutexattr_init(attributes.as_mut_ptr());
            libc::pthread_mutexattr_setpshared(
                attributes.as_mut_ptr(),
                libc::PTHREAD_PROCESS_SHARED,
            );
            libc::pthread_mutexattr_setrobust(attributes.as_mut_ptr(), libc::PTHREAD_MUTEX_ROBUST);
            assert_eq!(libc::pthread_mutex_init(mutex, attributes.as_ptr()), 0);
        }
        Self(mutex)
    }
}

const ROBUST: &str = "robust pthread";

/// A mutex, or a stand-in, to measure.
trait Mutex: Copy {
    /// Whether a whole turn, minus the hold time, counts as waiting.
    const IS_NOTHING: bool = false;

    fn with(self, inside: impl FnOnce());
}

impl Mutex for Robust {
    #[inline]
    fn with(self, inside: impl FnOnce()) {
        // SAFETY: initialised, and never moved or unmapped.
        unsafe {
            if libc::pthread_mutex_lock(self.0) == libc::EOWNERDEAD {
                libc::pthread_mutex_consistent(self.0);
            }
            inside();
            libc::pthread_mutex_unlock(self.0);
        }
    }
}

impl Mutex for &ManagedLock {
    #[inline]
    fn with(self, inside: impl FnOnce()) {
        let guard = self.lock().expect("the lock");
        inside();
        drop(guard);
    }
}

/// No lock at all.
#[derive(Clone, Copy)]
struct Nothing;

impl Mutex for Nothing {
    const IS_NOTHING: bool = true;

    #[inline]
    fn with(self, inside: impl FnOnce()) {
        inside();
    }
}

/// Returns the duration of a thousand operations, averaged over `count` thousands. A `Duration` is
/// too coarse for one operation.
fn thousand(count: u32, mut work: impl FnMut()) -> Duration {
    let start = Instant::now();
    for _ in 0..count * 1000 {
        work();
    }
    start.elapsed() / count
}

/// Returns the medians of two kinds of alternating blocks.
fn alternate(
    blocks: u32,
    mut ours: impl FnMut() -> Duration,
    mut theirs: impl FnMut() -> Duration,
) -> [Value; 2] {
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..blocks {
        times[0].push(ours());
        times[1].push(theirs());
    }
    times.map(|mut times| Value::Time(table::median(&mut times)))
}

fn uncontended(length: &Length) -> Vec<Row> {
    let table = Table::new(64);
    let (lock, robust) = (table.0.allocate().expect("a lock"), Robust::new());
    let (blocks, count) = length.blocks;
    let [ours, theirs] = alternate(
        blocks,
        || thousand(count, || (&lock).with(|| _ = black_box(0))),
        || thousand(count, || robust.with(|| _ = black_box(0))),
    );
    let name = "1000 times lock and unlock".to_owned();
    vec![Row {
        name,
        ours,
        peer: ROBUST,
        theirs,
        bound: Bound::Ratio(1.5),
    }]
}

fn allocate(length: &Length) -> Vec<Row> {
    let (blocks, count) = length.blocks;
    let mut rows = Vec::new();
    for capacity in [2048, 1_000_000] {
        let (table, empty) = (Table::new(capacity), Table::new(capacity));
        let cycle = |table: &Table| {
            thousand(count, || {
                table
                    .0
                    .allocate()
                    .expect("a lock")
                    .free()
                    .expect("allocated")
            })
        };
        for _ in 1..capacity {
            table.0.allocate().expect("a lock");
        }
        let [full, fresh] = alternate(blocks, || cycle(&table), || cycle(&empty));
        let bound = Bound::Time(Duration::from_micros(60));
        let name = format!("1000 allocate and free of {capacity}, empty");
        rows.push(Row {
            name,
            ours: fresh,
            peer: "nearly full table",
            theirs: full,
            bound,
        });
        // The two locks are far apart, so that the allocation hint is wrong each time.
        let far = [capacity - 1, 7].map(|id| table.0.retrieve(id).expect("a lock"));
        let _ = far[0].free();
        let apart = || {
            thousand(count, || {
                let _ = far[1].free();
                let first = table.0.allocate().expect("a lock");
                let second = table.0.allocate().expect("a lock");
                let _ = (black_box(first), second.free());
            })
        };
        let [apart, fresh_again] = alternate(blocks, apart, || cycle(&empty));
        for (what, ours, theirs, bound) in [
            ("1 left", full, fresh, bound),
            ("2 far apart", apart, fresh_again, Bound::None),
        ] {
            let name = format!("1000 allocate and free of {capacity}, {what}");
            rows.push(Row {
                name,
                ours,
                peer: "empty table",
                theirs,
                bound,
            });
        }
    }
    rows.push(allocate_in_directories(blocks, count));
    rows
}

/// Measures the same for locks in files: with a newly opened manager, in a directory with many
/// allocated locks and in an empty one.
fn allocate_in_directories(blocks: u32, count: u32) -> Row {
    const MANY: u32 = 10_000;
    let directories = [MANY, 0].map(|allocated| {
        let directory = tempfile::tempdir_in("/dev/shm").expect("a directory");
        let manager = FileLockManager::create(directory.path().join("table")).expect("a table");
        (0..allocated).for_each(|_| _ = manager.allocate().expect("a lock"));
        directory
    });
    let cycle = |at: usize| {
        let start = Instant::now();
        for _ in 0..count {
            let manager =
                FileLockManager::open(directories[at].path().join("table")).expect("a table");
            manager
                .allocate()
                .expect("a lock")
                .free()
                .expect("allocated");
        }
        start.elapsed() / count
    };
    let [ours, theirs] = alternate(blocks, || cycle(0), || cycle(1));
    let name = format!("open, allocate and free in a directory of {MANY}");
    Row {
        name,
        ours,
        peer: "an empty one",
        theirs,
        bound: Bound::Ratio(1.5),
    }
}

fn open(length: &Length) -> Vec<Row> {
    let opened = |capacity| {
        // Another process creates the table, because this process must not have it open.
        let path = format!("/dev/shm/lockkit-bench-{}-open", std::process::id());
        fork(|| drop(ShmLockManager::create(&path, capacity))).join();
        let start = Instant::now();
        ShmLockManager::open(&path).expect("a table");
        let elapsed = start.elapsed();
        std::fs::remove_file(path).expect("the file exists");
        elapsed
    };
    let attached = |table: &Table| {
        let first: &AtomicU64 = shared();
        fork(|| {
            // The child must attach again, and determine its own identity again.
            let start = Instant::now();
            table.0.held().expect("attached");
            first.store(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        })
        .join();
        Duration::from_nanos(first.load(Ordering::Relaxed))
    };
    let (large, small) = (1_000_000, 2048);
    let row = |what: &str, [ours, theirs]: [Value; 2], bound| {
        let name = format!("{what} a table of {large}");
        Row {
            name,
            ours,
            peer: "one of 2048",
            theirs,
            bound,
        }
    };
    let (large_table, small_table) = (Table::new(large), Table::new(small));
    let open = alternate(length.opens, || opened(large), || opened(small));
    let attach = alternate(
        length.opens,
        || attached(&large_table),
        || attached(&small_table),
    );
    vec![
        row("open", open, Bound::Time(Duration::from_micros(60))),
        row("attach a forked child to", attach, Bound::None),
    ]
}

/// A forked child.
struct Child(libc::pid_t);

fn fork(work: impl FnOnce()) -> Child {
    // SAFETY: this program has one thread; the child runs `work` and ends without unwinding into
    // the parent's frames.
    match unsafe { libc::fork() } {
        0 => {
            work();
            // SAFETY: always sound.
            unsafe { libc::_exit(0) }
        }
        pid => Child(pid),
    }
}

impl Child {
    fn join(self) {
        // SAFETY: a child of this process, waited for once.
        unsafe { libc::waitpid(self.0, std::ptr::null_mut(), 0) };
    }

    fn kill(&self) {
        // SAFETY: a child of this process that has not been waited for.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
    }
}

/// The progress flags of the processes in a death test.
struct Stages {
    holds: AtomicBool,
    waits: AtomicBool,
    /// The time at which the waiter acquired the lock.
    acquired: AtomicU64,
}

/// Measures the time from the holder's death to the waiter's acquisition. The waiter has waited for
/// `age` at the kill.
fn takeover(mutex: impl Mutex, stages: &Stages, age: Duration) -> Duration {
    let until = |stage: &AtomicBool| {
        while !stage.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
    };
    stages.holds.store(false, Ordering::SeqCst);
    stages.waits.store(false, Ordering::SeqCst);
    let holder = fork(|| {
        mutex.with(|| {
            stages.holds.store(true, Ordering::SeqCst);
            std::thread::sleep(Duration::from_secs(600));
        });
    });
    until(&stages.holds);
    let waiter = fork(|| {
        stages.waits.store(true, Ordering::SeqCst);
        mutex.with(|| stages.acquired.store(now(), Ordering::SeqCst));
    });
    until(&stages.waits);
    std::thread::sleep(age);
    let killed = now();
    holder.kill();
    waiter.join();
    holder.join();
    Duration::from_nanos(stages.acquired.load(Ordering::SeqCst) - killed)
}

fn death(length: &Length) -> Vec<Row> {
    let table = Table::new(64);
    let (lock, robust) = (table.0.allocate().expect("a lock"), Robust::new());
    let stages = shared();
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..length.deaths {
        // The waiters have different ages.
        let age = Duration::from_micros(5_000 + u64::from(round) * 137);
        times[0].push(takeover(&lock, stages, age));
        times[1].push(takeover(robust, stages, age));
    }
    let [[ours, our_longest], [theirs, their_longest]] = times.map(|mut times| {
        [table::median(&mut times), table::quantile(&mut times, 1.0)].map(Value::Time)
    });
    let row = |what, ours, theirs, bound| {
        let name = format!("after SIGKILL of the holder, {what}");
        Row {
            name,
            ours,
            peer: ROBUST,
            theirs,
            bound,
        }
    };
    vec![
        row(
            "median",
            ours,
            theirs,
            Bound::Time(Duration::from_millis(3)),
        ),
        row(
            "longest",
            our_longest,
            their_longest,
            Bound::Time(Duration::from_millis(10)),
        ),
    ]
}

/// The stage that the workers must reach, and the work that they did.
struct Counters {
    start: AtomicBool,
    count: AtomicBool,
    stop: AtomicBool,
    done: AtomicU64,
    longest: AtomicU64,
}

/// Returns the acquisitions per second, and the longest wait.
fn contend<M: Mutex>(
    mutex: M,
    processes: usize,
    hold: Duration,
    span: Duration,
) -> (f64, Duration) {
    /// The crowd first runs for this fraction (1/`SETTLE_FRACTION`) of the span. Meanwhile the
    /// kernel moves processes that it has put on one processor.
    const SETTLE_FRACTION: u32 = 10;
    let counters: &Counters = shared();
    let workers: Vec<Child> = (0..processes)
        .map(|_| {
            fork(|| {
                while !counters.start.load(Ordering::Relaxed) {
                    std::thread::yield_now();
                }
                while !counters.count.load(Ordering::Relaxed) {
                    mutex.with(|| spin(hold));
                }
                let (mut done, mut longest) = (0, 0);
                let mut since = now();
                while !counters.stop.load(Ordering::Relaxed) {
                    mutex.with(|| {
                        longest = longest.max(now() - since);
                        spin(hold);
                    });
                    done += 1;
                    let then = now();
                    if M::IS_NOTHING {
                        longest =
                            longest.max((then - since).saturating_sub(hold.as_nanos() as u64));
                    }
                    since = then;
                }
                counters.done.fetch_add(done, Ordering::Relaxed);
                counters.longest.fetch_max(longest, Ordering::Relaxed);
            })
        })
        .collect();
    counters.start.store(true, Ordering::Relaxed);
    std::thread::sleep(span / SETTLE_FRACTION);
    let start = Instant::now();
    counters.count.store(true, Ordering::Relaxed);
    std::thread::sleep(span);
    counters.stop.store(true, Ordering::Relaxed);
    let elapsed = start.elapsed();
    for worker in workers {
        worker.join();
    }
    let rate = counters.done.load(Ordering::Relaxed) as f64 / elapsed.as_secs_f64();
    (
        rate,
        Duration::from_nanos(counters.longest.load(Ordering::Relaxed)),
    )
}

fn contended(length: &Length) -> Vec<Row> {
    let (blocks, span) = length.crowd;
    let mut rows = Vec::new();
    for hold in [0, 20].map(Duration::from_micros) {
        for processes in [2, 8, 64] {
            let table = Table::new(64);
            let (lock, robust) = (table.0.allocate().expect("a lock"), Robust::new());
            let mut runs = [Vec::new(), Vec::new(), Vec::new()];
            for _ in 0..blocks {
                runs[0].push(contend(&lock, processes, hold, span));
                runs[1].push(contend(robust, processes, hold, span));
                if processes == 2 {
                    runs[2].push(contend(Nothing, processes, hold, span));
                }
            }
            let medians = |runs: Vec<(f64, Duration)>| {
                let (mut rates, mut waits): (Vec<f64>, Vec<Duration>) = runs.into_iter().unzip();
                rates.sort_by(f64::total_cmp);
                (
                    Value::Rate(rates[rates.len() / 2]),
                    table::median(&mut waits),
                )
            };
            let [ours, theirs, alone] = runs;
            let ((our_rate, our_wait), (rate, wait)) = (medians(ours), medians(theirs));
            let mut row = |what, ours, peer, theirs, bound| {
                let name = format!("{processes} processes hold {} us, {what}", hold.as_micros());
                rows.push(Row {
                    name,
                    ours,
                    peer,
                    theirs,
                    bound,
                });
            };
            row("throughput", our_rate, ROBUST, rate, Bound::AtLeast(0.8));
            let half = Bound::Ratio(0.5);
            let waits = [our_wait, wait].map(Value::Time);
            if alone.is_empty() {
                row("longest wait", waits[0], ROBUST, waits[1], half);
            } else {
                let pause = medians(alone).1;
                row("longest wait", waits[0], ROBUST, waits[1], Bound::None);
                row(
                    "longest wait compared with a pause",
                    waits[0],
                    "no lock",
                    Value::Time(pause),
                    Bound::None,
                );
                let beyond = Value::Time(our_wait.saturating_sub(pause));
                row(
                    "longest wait beyond a pause",
                    beyond,
                    ROBUST,
                    waits[1],
                    half,
                );
            }
        }
    }
    rows
}
