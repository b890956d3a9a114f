//! Measures acquire and release of a lock without contention, and status queries, compared with the
//! peers.
//!
//! Criterion runs every contender separately. On a machine whose speed changes from second to
//! second, numbers that were measured in sequence give no ratio. So the contenders of a comparison
//! are then measured again in short alternating blocks, and the table shows the medians of these
//! blocks.
//!
//! To add a row, add a contender or a comparison in [`comparisons`].

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use criterion::{BenchmarkGroup, Criterion, measurement::WallTime};
use lockkit::instance::Instance;
use lockkit::{
    Backend, FileLock, FileLockManager, InMemoryLockManager, LockManager, NamedLock, PidFile,
};
use lockkit_benches::arguments;
use lockkit_benches::table::{self, Bound, Row, Value};
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

const NAME: &str = "lockkit-bench-uncontended";

/// A comparison of one of our locks with peers that do the same, or less.
struct Comparison {
    ours: Contender,
    peers: Vec<(Contender, Bound)>,
}

fn comparisons(directory: &Path) -> Vec<Comparison> {
    let file = |name: &str| directory.join(name);
    vec![
        Comparison {
            ours: named("NamedLock", Backend::Auto),
            peers: vec![
                (bare_socket(), Bound::Ratio(1.2)),
                (single_instance(), Bound::Ratio(1.2)),
            ],
        },
        Comparison {
            ours: file_lock(&file("file-lock")),
            peers: vec![
                (named_lock(&file("named-lock")), Bound::Ratio(1.25)),
                (fd_lock(&file("fd-lock")), Bound::Ratio(1.35)),
                (fs4(&file("fs4")), Bound::None),
                (std_file(&file("std")), Bound::None),
            ],
        },
        Comparison {
            ours: pid_file(&file("ours.pid")),
            peers: vec![
                (fslock_with_pid(&file("fslock.pid")), Bound::Ratio(0.2)),
                (pidlock(&file("pidlock.pid")), Bound::None),
                (gix_lock(&file("gix-lock")), Bound::None),
                (
                    file_written_and_removed(&file("bare.pid")),
                    Bound::Time(Duration::from_micros(40)),
                ),
            ],
        },
        Comparison {
            ours: inspect(&file("held.pid")),
            peers: vec![(
                file_read(&file("read.pid")),
                Bound::Time(Duration::from_micros(60)),
            )],
        },
        Comparison {
            ours: in_directory(&file("directory")),
            peers: vec![
                (fd_lock(&file("fd-lock")), Bound::None),
                (fslock(&file("fslock")), Bound::None),
            ],
        },
        Comparison {
            ours: first_instance(),
            peers: vec![(single_instance(), Bound::None)],
        },
        Comparison {
            ours: in_memory(),
            peers: vec![(parking_lot(), Bound::None)],
        },
        Comparison {
            ours: named("NamedLock, Backend::File", Backend::File),
            peers: vec![
                (named_lock(&file("named-lock")), Bound::None),
                (fd_lock(&file("fd-lock")), Bound::None),
                (fslock(&file("fslock")), Bound::None),
            ],
        },
    ]
}

fn named(title: &'static str, backend: Backend) -> Contender {
    let lock = NamedLock::builder(NAME).backend(backend).build().unwrap();
    Contender::new(title, move || drop(lock.lock().unwrap()))
}

fn file_lock(path: &Path) -> Contender {
    let lock = FileLock::new(path);
    Contender::new("FileLock", move || drop(lock.lock().unwrap()))
}

fn pid_file(path: &Path) -> Contender {
    let lock = PidFile::new(path).unwrap();
    Contender::new("PidFile", move || drop(lock.lock().unwrap()))
}

fn in_directory(path: &Path) -> Contender {
    let lock = FileLockManager::create(path).unwrap().allocate().unwrap();
    Contender::new("FileLockManager's lock", move || drop(lock.lock().unwrap()))
}

/// Becomes the first instance and ends it. The peer accepts no calls.
fn first_instance() -> Contender {
    Contender::new("Instance", || {
        let Instance::First(first) = Instance::enter("lockkit-bench-instance").unwrap() else {
            panic!("another process is the first instance")
        };
        drop(first);
    })
}

/// The cost for a test that uses this manager instead of a table in shared memory. The manager
/// records the holder of each lock.
fn in_memory() -> Contender {
    let lock = InMemoryLockManager::new(8).unwrap().allocate().unwrap();
    Contender::new("InMemoryLockManager's lock", move || {
        drop(lock.lock().unwrap())
    })
}

fn parking_lot() -> Contender {
    let lock = parking_lot::Mutex::new(());
    Contender::new("parking_lot", move || {
        drop(std::hint::black_box(&lock).lock())
    })
}

/// Inspects a file that a living process wrote without lockkit, which is the most expensive case.
fn inspect(path: &Path) -> Contender {
    std::fs::write(path, format!("{}\n", std::process::id())).unwrap();
    let path = path.to_owned();
    Contender::new("PidFile::inspect", move || {
        drop(PidFile::inspect(&path).unwrap())
    })
}

fn file_read(path: &Path) -> Contender {
    std::fs::write(path, format!("{}\n", std::process::id())).unwrap();
    let path = path.to_owned();
    Contender::new("reading a file", move || {
        drop(std::fs::read(&path).unwrap())
    })
}

/// Measures a pidfile without any lock.
fn file_written_and_removed(path: &Path) -> Contender {
    let path = path.to_owned();
    Contender::new("file made, removed", move || {
        std::fs::write(&path, "12345\n").unwrap();
        std::fs::remove_file(&path).unwrap();
    })
}

/// Measures the minimum cost of binding a name and listening there.
fn bare_socket() -> Contender {
    let address = SocketAddrUnix::new_abstract_name(b"lockkit-bench-bare-socket").unwrap();
    Contender::new("bare socket", move || {
        let flags = SocketFlags::CLOEXEC;
        let socket =
            net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        net::bind(&socket, &address).unwrap();
        net::listen(&socket, 4096).unwrap();
    })
}

fn single_instance() -> Contender {
    Contender::new("single-instance", || {
        let instance =
            single_instance::SingleInstance::new("lockkit-bench-single-instance").unwrap();
        assert!(instance.is_single());
    })
}

fn named_lock(path: &Path) -> Contender {
    let lock = named_lock::NamedLock::with_path(path).unwrap();
    Contender::new("named-lock", move || drop(lock.lock().unwrap()))
}

fn fd_lock(path: &Path) -> Contender {
    let mut lock = fd_lock::RwLock::new(File::create(path).unwrap());
    Contender::new("fd-lock", move || drop(lock.write().unwrap()))
}

fn fs4(path: &Path) -> Contender {
    let file = File::create(path).unwrap();
    Contender::new("fs4", move || {
        fs4::FileExt::lock(&file).unwrap();
        fs4::FileExt::unlock(&file).unwrap();
    })
}

fn std_file(path: &Path) -> Contender {
    let file = File::create(path).unwrap();
    Contender::new("std File::lock", move || {
        file.lock().unwrap();
        file.unlock().unwrap();
    })
}

/// Measures a file whose existence is the lock, without a lock on the file itself.
fn pidlock(path: &Path) -> Contender {
    let path = path.to_owned();
    Contender::new("pidlock", move || {
        let mut lock = pidlock::Pidlock::new_validated(&path).unwrap();
        lock.acquire().unwrap();
        lock.release().unwrap();
    })
}

/// Measures the same, with another behaviour if the process dies without a release.
fn gix_lock(path: &Path) -> Contender {
    let path = path.to_owned();
    Contender::new("gix-lock", move || {
        drop(
            gix_lock::Marker::acquire_to_hold_resource(
                &path,
                gix_lock::acquire::Fail::Immediately,
                None,
                0,
            )
            .unwrap(),
        );
    })
}

fn fslock_with_pid(path: &Path) -> Contender {
    let mut lock = fslock::LockFile::open(path).unwrap();
    Contender::new("fslock, with pid", move || {
        lock.lock_with_pid().unwrap();
        lock.unlock().unwrap();
    })
}

fn fslock(path: &Path) -> Contender {
    let mut lock = fslock::LockFile::open(path).unwrap();
    Contender::new("fslock", move || {
        lock.lock().unwrap();
        lock.unlock().unwrap();
    })
}

/// A lock to acquire and release.
struct Contender {
    name: &'static str,
    /// Runs so many cycles. The loop is inside the closure, so that the cost of the call does not
    /// count per cycle.
    repeat: Box<dyn FnMut(u64)>,
}

impl Contender {
    fn new(name: &'static str, mut cycle: impl FnMut() + 'static) -> Self {
        let repeat = move |times| {
            for _ in 0..times {
                cycle();
            }
        };
        Self {
            name,
            repeat: Box::new(repeat),
        }
    }

    fn time(&mut self, cycles: u64) -> Duration {
        let start = Instant::now();
        (self.repeat)(cycles);
        start.elapsed()
    }

    /// Lets criterion measure the contender. Returns whether criterion was asked to.
    fn bench(&mut self, group: &mut BenchmarkGroup<'_, WallTime>) -> bool {
        let mut asked = false;
        group.bench_function(self.name, |bencher| {
            asked = true;
            bencher.iter_custom(|cycles| self.time(cycles));
        });
        asked
    }
}

impl Comparison {
    /// Returns the rows for our lock and each of its peers, from blocks that alternate among all of
    /// them.
    fn rows(mut self, length: Length) -> Vec<Row> {
        let mut contenders: Vec<&mut Contender> = std::iter::once(&mut self.ours)
            .chain(self.peers.iter_mut().map(|(peer, _)| peer))
            .collect();
        let mut blocks = vec![Vec::new(); contenders.len()];
        let slowest = contenders
            .iter_mut()
            .map(|contender| contender.time(8) / 8)
            .max()
            .unwrap_or_default();
        let cycles = (length.block.as_nanos() / slowest.as_nanos().max(1)).max(1) as u64;
        for _ in 0..length.blocks {
            for (contender, blocks) in contenders.iter_mut().zip(&mut blocks) {
                blocks.push(contender.time(cycles));
            }
        }
        let mut cycles = blocks
            .iter_mut()
            .map(|blocks| Value::Time(table::median(blocks) / cycles as u32));
        let ours = cycles.next().expect("there is one of ours");
        self.peers
            .iter()
            .zip(cycles)
            .map(|((peer, bound), theirs)| Row {
                name: self.ours.name.to_owned(),
                ours,
                peer: peer.name,
                theirs,
                bound: *bound,
            })
            .collect()
    }
}

/// The length and the number of blocks.
#[derive(Clone, Copy)]
struct Length {
    blocks: u32,
    /// The maximum block length of the slowest contender.
    block: Duration,
}

fn main() {
    let _exclusive = lockkit_benches::exclusive_run();
    let directory = tempfile::tempdir().unwrap();
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    let length = match arguments::is_quick() {
        true => Length {
            blocks: 5,
            block: Duration::from_millis(1),
        },
        false => Length {
            blocks: 150,
            block: Duration::from_millis(6),
        },
    };

    let mut rows = Vec::new();
    for mut comparison in comparisons(directory.path()) {
        let mut group = criterion.benchmark_group("uncontended");
        let ours = comparison.ours.bench(&mut group);
        comparison
            .peers
            .retain_mut(|(peer, _)| peer.bench(&mut group));
        group.finish();
        if ours {
            rows.extend(comparison.rows(length));
        }
    }
    criterion.final_summary();
    table::print(&rows);
}
