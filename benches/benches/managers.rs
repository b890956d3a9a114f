//! Lock managers beside a robust, process-shared pthread mutex, in one run: `cargo bench -p lockkit-benches --bench
//! managers [uncontended | allocate | open | killed | contended]`.
//!
//! Both sides alternate, so that both see the same machine. Workers are forked; each counts in shared memory.

use std::hint::black_box;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lockkit::{LockManager, ManagedLock, ShmLockManager};

fn main() {
    let which: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let wanted = |name: &str| which.is_empty() || which.iter().any(|argument| argument == name);
    for (name, bench) in [
        ("uncontended", uncontended as fn()),
        ("allocate", allocate),
        ("open", open),
        ("killed", killed),
        ("contended", contended),
    ] {
        if wanted(name) {
            bench();
        }
    }
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

/// Memory that forked children share.
fn shared<T>() -> &'static T {
    // SAFETY: a fresh, zeroed mapping of the right length, aligned to a page, never unmapped; every `T` here is made of
    // atomics or initialised through its pointer before use.
    unsafe {
        let length = size_of::<T>();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let start = libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0);
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
        // SAFETY: the attributes are initialised before they are used, the mutex by `pthread_mutex_init`.
        unsafe {
            libc::pthread_mutexattr_init(attributes.as_mut_ptr());
            libc::pthread_mutexattr_setpshared(attributes.as_mut_ptr(), libc::PTHREAD_PROCESS_SHARED);
            libc::pthread_mutexattr_setrobust(attributes.as_mut_ptr(), libc::PTHREAD_MUTEX_ROBUST);
            assert_eq!(libc::pthread_mutex_init(mutex, attributes.as_ptr()), 0);
        }
        Self(mutex)
    }
}

const ROBUST: &str = "robust pthread mutex";

/// What is measured.
trait Mutex: Copy {
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

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn per_operation(count: u32, mut work: impl FnMut()) -> f64 {
    let start = Instant::now();
    for _ in 0..count {
        work();
    }
    start.elapsed().as_nanos() as f64 / f64::from(count)
}

fn uncontended() {
    let table = Table::new(64);
    let (lock, robust) = (table.0.allocate().expect("a lock"), Robust::new());
    let (mut ours, mut theirs) = (vec![], vec![]);
    for _ in 0..15 {
        ours.push(per_operation(1_000_000, || (&lock).with(|| _ = black_box(0))));
        theirs.push(per_operation(1_000_000, || robust.with(|| _ = black_box(0))));
    }
    let (ours, theirs) = (median(ours), median(theirs));
    println!("lock + unlock: {ours:.1} ns; {} {theirs:.1} ns; {:.2}x", ROBUST, ours / theirs);
}

fn allocate() {
    for capacity in [2048, 1_000_000] {
        let table = Table::new(capacity);
        let cycle = || table.0.allocate().expect("a lock").free().expect("allocated");
        let empty = median((0..9).map(|_| per_operation(300_000, cycle)).collect());
        for _ in 1..capacity {
            table.0.allocate().expect("a lock");
        }
        let full = median((0..9).map(|_| per_operation(300_000, cycle)).collect());
        // Two that lie far apart, so that the hint is wrong each time.
        let far = [capacity - 1, 7].map(|id| table.0.retrieve(id).expect("a lock"));
        let _ = far[0].free();
        let apart = median(
            (0..9)
                .map(|_| {
                    per_operation(300_000, || {
                        let _ = far[1].free();
                        let first = table.0.allocate().expect("a lock");
                        let second = table.0.allocate().expect("a lock");
                        let _ = (black_box(first), second.free());
                    })
                })
                .collect(),
        );
        println!(
            "allocate + free of {capacity}: empty {empty:.1} ns, all but one taken {full:.1} ns; \
             two of each with room at both ends {apart:.1} ns"
        );
    }
}

fn open() {
    for capacity in [2048, 1_000_000] {
        let table = Table::new(capacity);
        let first: &AtomicU64 = shared();
        let (mut cold, mut warm) = (vec![], vec![]);
        for _ in 0..50 {
            fork(|| {
                // It must attach anew, and find out anew who it is.
                let start = Instant::now();
                table.0.held().expect("attached");
                first.store(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
            })
            .join();
            cold.push(first.load(Ordering::Relaxed) as f64 / 1000.0);
        }
        for _ in 0..50 {
            // Made by another process, for this one must not have it open.
            let path = format!("/dev/shm/lockkit-bench-{}-open", std::process::id());
            fork(|| drop(ShmLockManager::create(&path, capacity))).join();
            let start = Instant::now();
            ShmLockManager::open(&path).expect("a table");
            warm.push(start.elapsed().as_nanos() as f64 / 1000.0);
            std::fs::remove_file(path).expect("it is there");
        }
        println!(
            "open an existing table of {capacity}: {:.1} us; attach a forked child to it: {:.1} us",
            median(warm),
            median(cold)
        );
    }
}

/// A forked child.
struct Child(libc::pid_t);

fn fork(work: impl FnOnce()) -> Child {
    // SAFETY: this program has one thread; the child runs `work` and ends without unwinding into the parent's frames.
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
        // SAFETY: a child of this process that nobody has waited for.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
    }
}

/// How long after the holder's death the waiter has the lock.
fn killed() {
    fn rounds(mutex: impl Mutex) -> Vec<f64> {
        let holds: &AtomicBool = shared();
        let got: &AtomicU64 = shared();
        let waits: &AtomicBool = shared();
        let epoch = Instant::now();
        let mut times: Vec<f64> = (0..200)
            .map(|round| {
                holds.store(false, Ordering::SeqCst);
                waits.store(false, Ordering::SeqCst);
                let holder = fork(|| {
                    mutex.with(|| {
                        holds.store(true, Ordering::SeqCst);
                        std::thread::sleep(Duration::from_secs(600));
                    });
                });
                while !holds.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
                let waiter = fork(|| {
                    waits.store(true, Ordering::SeqCst);
                    mutex.with(|| got.store(epoch.elapsed().as_nanos() as u64, Ordering::SeqCst));
                });
                while !waits.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
                // Waiters of all ages.
                std::thread::sleep(Duration::from_micros(5_000 + round * 137));
                let killed = epoch.elapsed().as_nanos() as u64;
                holder.kill();
                waiter.join();
                holder.join();
                (got.load(Ordering::SeqCst) - killed) as f64 / 1e6
            })
            .collect();
        times.sort_by(f64::total_cmp);
        times
    }
    let table = Table::new(64);
    let lock = table.0.allocate().expect("a lock");
    for (name, times) in [("lockkit shared memory", rounds(&lock)), (ROBUST, rounds(Robust::new()))] {
        let (middle, longest) = (times[times.len() / 2], times[times.len() - 1]);
        println!("after SIGKILL of the holder: {name}: median {middle:.2} ms, longest {longest:.2} ms");
    }
}

/// What workers did.
struct Counters {
    start: AtomicBool,
    stop: AtomicBool,
    done: AtomicU64,
    longest: AtomicU64,
}

fn contend(mutex: impl Mutex, processes: usize, hold: Duration, span: Duration) -> (f64, f64) {
    let counters: &Counters = shared();
    let workers: Vec<Child> = (0..processes)
        .map(|_| {
            fork(|| {
                while !counters.start.load(Ordering::Relaxed) {
                    std::thread::yield_now();
                }
                let (mut done, mut longest) = (0, 0);
                let mut since = Instant::now();
                while !counters.stop.load(Ordering::Relaxed) {
                    mutex.with(|| {
                        let now = Instant::now();
                        longest = longest.max(now.duration_since(since).as_nanos() as u64);
                        while now.elapsed() < hold {
                            std::hint::spin_loop();
                        }
                    });
                    done += 1;
                    since = Instant::now();
                }
                counters.done.fetch_add(done, Ordering::Relaxed);
                counters.longest.fetch_max(longest, Ordering::Relaxed);
            })
        })
        .collect();
    let start = Instant::now();
    counters.start.store(true, Ordering::Relaxed);
    std::thread::sleep(span);
    counters.stop.store(true, Ordering::Relaxed);
    let elapsed = start.elapsed();
    for worker in workers {
        worker.join();
    }
    let done = counters.done.load(Ordering::Relaxed) as f64 / elapsed.as_secs_f64();
    (done, counters.longest.load(Ordering::Relaxed) as f64 / 1e6)
}

fn contended() {
    let span = Duration::from_secs(2);
    for hold in [0, 20].map(Duration::from_micros) {
        for processes in [2, 8, 64] {
            let table = Table::new(64);
            let lock = table.0.allocate().expect("a lock");
            let robust = Robust::new();
            let (mut ours, mut theirs) = (vec![], vec![]);
            for _ in 0..3 {
                ours.push(contend(&lock, processes, hold, span));
                theirs.push(contend(robust, processes, hold, span));
            }
            let middle = |runs: &[(f64, f64)]| {
                let pick = |which: fn(&(f64, f64)) -> f64| median(runs.iter().map(which).collect());
                (pick(|run| run.0), pick(|run| run.1))
            };
            let ((our_rate, our_wait), (rate, wait)) = (middle(&ours), middle(&theirs));
            println!(
                "{processes} processes, holds of {} us: {:.0}/s, longest wait {:.1} ms; {} {:.0}/s, {:.1} ms; \
                 rate {:.2}x, wait {:.2}x",
                hold.as_micros(),
                our_rate,
                our_wait,
                ROBUST,
                rate,
                wait,
                our_rate / rate,
                our_wait / wait
            );
        }
    }
}
