//! A file that several processes read and write: writers one at a time, readers together.
//!
//! Four processes increment a number in a file, 50 times each. Each reads the number and writes the
//! next one under an exclusive lock on the file itself. Meanwhile the first process reads it under
//! a shared lock, and never sees half a number.
//!
//! Run with `cargo run --example shared_file`. [`add`] and [`read`] are the parts to copy. flock(1)
//! on the same file interoperates.

use std::error::Error;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use lockkit::{FileGuard, FileLock};

const WRITERS: u64 = 4;
const ROUNDS: u64 = 50;

fn main() -> Result<(), Box<dyn Error>> {
    if let Some(path) = std::env::args_os().nth(1) {
        let lock = FileLock::new(path);
        return (0..ROUNDS).try_for_each(|_| add(&lock));
    }
    let path = std::env::temp_dir().join(format!("lockkit-example-number-{}", std::process::id()));
    let result = coordinate(&path);
    std::fs::remove_file(&path)?;
    result
}

fn coordinate(path: &Path) -> Result<(), Box<dyn Error>> {
    let lock = FileLock::new(path);
    let mut last = read(&lock)?;
    println!("the number is {last}");
    let start = || Command::new(std::env::current_exe()?).arg(path).spawn();
    let mut writers = (0..WRITERS)
        .map(|_| start())
        .collect::<Result<Vec<_>, _>>()?;
    while writers
        .iter_mut()
        .any(|writer| matches!(writer.try_wait(), Ok(None)))
    {
        let now = read(&lock)?;
        if now < last {
            return Err(format!("the number went from {last} back to {now}").into());
        }
        last = now;
    }
    for mut writer in writers {
        println!("a writer ended: {}", writer.wait()?);
    }
    println!(
        "the number is {}: no writer lost a number, no reader saw a partial number",
        read(&lock)?
    );
    Ok(())
}

/// Reads and writes in one step that is atomic among all processes.
fn add(lock: &FileLock) -> Result<(), Box<dyn Error>> {
    let guard = lock.lock()?;
    let next = number(&guard)? + 1;
    guard.file().write_all_at(next.to_string().as_bytes(), 0)?;
    Ok(guard.release()?)
}

/// Reads while no writer is active.
fn read(lock: &FileLock) -> Result<u64, Box<dyn Error>> {
    number(&lock.lock_shared()?)
}

/// Reads the number in the locked file. A new file has no number yet.
fn number(guard: &FileGuard) -> Result<u64, Box<dyn Error>> {
    let mut bytes = [0; 20];
    let length = guard.file().read_at(&mut bytes, 0)?;
    match std::str::from_utf8(&bytes[..length])? {
        "" => Ok(0),
        text => Ok(text.parse()?),
    }
}
