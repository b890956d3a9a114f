//! Acquires and releases a free lock: each input line gives the number of cycles of a block, and
//! each answer its nanoseconds. The bench `tracing` builds it with and without the feature of that
//! name.

use std::hint::black_box;
use std::time::Instant;

use lockkit::{FileLock, LockManager, NamedLock, ShmLockManager};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kind, place] = &arguments[..] else {
        panic!("cycle named NAME | file PATH | shm PATH")
    };
    match &**kind {
        "named" => {
            let lock = NamedLock::new(place).expect("a name");
            serve(|| drop(black_box(lock.lock().expect("the lock is free"))));
        }
        "file" => {
            let lock = FileLock::new(place);
            serve(|| drop(black_box(lock.lock().expect("the lock is free"))));
        }
        "shm" => {
            let table = ShmLockManager::open_or_create(place, 16).expect("a table");
            let lock = table.allocate().expect("a lock");
            serve(|| drop(black_box(lock.lock().expect("the lock is free"))));
        }
        _ => panic!("{kind:?} is none of named, file and shm"),
    }
}

fn serve(cycle: impl Fn()) {
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let count: u32 = line.parse().expect("how often");
        let start = Instant::now();
        for _ in 0..count {
            cycle();
        }
        println!("{}", start.elapsed().as_nanos());
    }
}
