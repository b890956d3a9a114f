//! Measures the memory cost of a lock: heap bytes and descriptors of this process, for a free lock
//! and for a held lock. The kernel's memory for a descriptor is not counted.
//!
//! The peers are the same libraries as in `uncontended`. The result is the average over a thousand
//! locks.

use std::alloc::{GlobalAlloc, Layout, System};
use std::any::Any;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use lockkit::{FileLock, Lease, LockManager, NamedLock, PidFile, ShmLockManager};
use lockkit_benches::arguments;
use lockkit_benches::table::{self, Bound, Row, Value};

/// An allocator that counts the bytes in use.
struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: it passes every call to the system's allocator, and counts.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        IN_USE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are those that the system's allocator requires.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const MANY: usize = 200;

/// The average cost of one lock.
struct Cost {
    bytes: usize,
    descriptors: usize,
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd")
        .expect("the process has descriptors")
        .count()
}

/// Measures the average cost of the values that `make` returns.
fn cost(make: &mut dyn FnMut(usize) -> Box<dyn Any>) -> Cost {
    // The first value has one-time costs.
    drop(make(MANY));
    let mut kept = Vec::with_capacity(MANY);
    let before = (IN_USE.load(Ordering::Relaxed), descriptors());
    kept.extend((0..MANY).map(make));
    let after = (IN_USE.load(Ordering::Relaxed), descriptors());
    Cost {
        bytes: (after.0 - before.0) / MANY,
        descriptors: (after.1 - before.1) / MANY,
    }
}

/// A lock, free and held.
struct Contender {
    name: &'static str,
    free: Box<dyn FnMut(usize) -> Box<dyn Any>>,
    held: Box<dyn FnMut(usize) -> Box<dyn Any>>,
}

fn contender<L: 'static, G: 'static>(
    name: &'static str,
    new: impl Fn(usize) -> L + Clone + 'static,
    hold: impl Fn(L) -> G + 'static,
) -> Contender {
    let make = new.clone();
    Contender {
        name,
        free: Box::new(move |at| Box::new(make(at))),
        held: Box::new(move |at| Box::new(hold(new(at)))),
    }
}

/// Returns a function from a number to a path in the directory.
fn numbered_path(
    directory: &Path,
    name: &'static str,
) -> impl Fn(usize) -> PathBuf + Clone + use<> {
    let directory = directory.to_owned();
    move |at| directory.join(format!("{name}-{at}"))
}

fn names_and_files(directory: &Path) -> Vec<(Contender, Contender)> {
    let path = |name| numbered_path(directory, name);
    let (file, fd) = (path("file"), path("fd"));
    vec![
        (
            contender(
                "NamedLock",
                |at| NamedLock::new(&format!("lockkit-bench-memory-{at}")).expect("a name"),
                |lock| (lock.lock().expect("free"), lock),
            ),
            contender(
                "single-instance",
                |_| (),
                |()| {
                    single_instance::SingleInstance::new(&format!(
                        "lockkit-{}",
                        IN_USE.fetch_add(0, Ordering::Relaxed)
                    ))
                },
            ),
        ),
        (
            contender(
                "FileLock",
                move |at| FileLock::new(file(at)),
                |lock| (lock.lock().expect("free"), lock),
            ),
            contender(
                "fd-lock",
                move |at| fd_lock::RwLock::new(File::create(fd(at)).expect("room")),
                |lock| {
                    let mut lock = Box::new(lock);
                    std::mem::forget(lock.write().expect("free"));
                    lock
                },
            ),
        ),
    ]
}

fn pidfiles_leases_and_tables(directory: &Path) -> Vec<(Contender, Contender)> {
    let path = |name| numbered_path(directory, name);
    let (pid, fslock, lease) = (path("pid"), path("fslock"), path("lease"));
    let table = ShmLockManager::create(directory.join("table"), 1024).expect("a table");
    vec![
        (
            contender(
                "PidFile",
                move |at| PidFile::new(pid(at)).expect("a path"),
                |lock| (lock.lock().expect("free"), lock),
            ),
            contender(
                "fslock, with pid",
                move |at| fslock::LockFile::open(&fslock(at)).expect("room"),
                |mut lock| {
                    lock.lock_with_pid().expect("free");
                    lock
                },
            ),
        ),
        (
            contender(
                "Lease",
                move |at| Lease::file(lease(at)).build().expect("a path"),
                |lease| (lease.lock().expect("free"), lease),
            ),
            contender("nothing", |_| (), |()| ()),
        ),
        (
            contender(
                "ShmLockManager's lock",
                move |_| table.allocate().expect("a lock"),
                |lock| (lock.lock().expect("free"), lock),
            ),
            contender(
                "parking_lot",
                |_| parking_lot::Mutex::new(0_u8),
                |lock| lock,
            ),
        ),
    ]
}

fn main() {
    if !"memory".contains(&arguments::filter()) {
        return;
    }
    let _exclusive = lockkit_benches::exclusive_run();
    let directory = tempfile::tempdir_in("/dev/shm").expect("memory to make files in");
    let mut rows = Vec::new();
    for (mut ours, mut peer) in names_and_files(directory.path())
        .into_iter()
        .chain(pidfiles_leases_and_tables(directory.path()))
    {
        for (state, ours_cost, peer_cost) in [
            ("free", cost(&mut ours.free), cost(&mut peer.free)),
            ("held", cost(&mut ours.held), cost(&mut peer.held)),
        ] {
            let row = |what: &str, ours_value, theirs| Row {
                name: format!("{}, {state}, {what}", ours.name),
                ours: ours_value,
                peer: peer.name,
                theirs,
                bound: Bound::None,
            };
            rows.push(row(
                "bytes",
                Value::Count(ours_cost.bytes),
                Value::Count(peer_cost.bytes),
            ));
            rows.push(row(
                "descriptors",
                Value::Count(ours_cost.descriptors),
                Value::Count(peer_cost.descriptors),
            ));
        }
    }
    table::print(&rows);
}
