//! Worker processes share a table of locks. One worker is killed in the middle of its work, and the
//! next guard reports it.
//!
//! Each worker updates the accounts in order, each under the lock with its number. The first worker
//! dies inside account 2 (`abort`). The next holder learns of the death, checks the account before
//! using it, and continues.
//!
//! Run with `cargo run -p lockkit-examples --example lock_table`.

use std::process::Command;
use std::time::Duration;

use lockkit::{LockManager, ManagedGuard, ShmLockManager};

const ACCOUNTS: u32 = 4;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    match std::env::args().collect::<Vec<_>>().as_slice() {
        [_, table, worker] => work(table, worker.parse()?),
        _ => coordinate(),
    }
}

fn coordinate() -> Result<(), Box<dyn std::error::Error>> {
    let path = format!("/dev/shm/lockkit-example-{}", std::process::id());
    let table = ShmLockManager::create(&path, 1024)?;
    for _ in 0..ACCOUNTS {
        println!("account {} has a lock", table.allocate()?.id());
    }
    let workers: Result<Vec<_>, _> = (0..3)
        .map(|worker| {
            Command::new(std::env::current_exe()?)
                .arg(&path)
                .arg(worker.to_string())
                .spawn()
        })
        .collect();
    for mut worker in workers? {
        println!("a worker ended: {}", worker.wait()?);
    }
    // The next holder of account 2 has checked it. If no worker acquired it after the death, the
    // parent checks it here.
    check(&table.retrieve(2)?.lock()?, "the parent", 2);
    println!(
        "{} of 1024 locks are left, {} are held",
        table.available()?.unwrap_or_default(),
        table.held()?.len()
    );
    std::fs::remove_file(path)?;
    Ok(())
}

fn work(table: &str, worker: u32) -> Result<(), Box<dyn std::error::Error>> {
    let table = ShmLockManager::open(table)?;
    for account in 0..ACCOUNTS {
        let guard = table.retrieve(account)?.lock()?;
        check(&guard, &format!("worker {worker}"), account);
        std::thread::sleep(Duration::from_millis(5));
        if (worker, account) == (0, 2) {
            std::process::abort();
        }
        guard.release()?;
    }
    Ok(())
}

fn check(guard: &ManagedGuard, process: &str, account: u32) {
    if let Some(died) = guard.recovered() {
        println!("{process} checks account {account}: the last holder died inside: {died}");
    }
}
