//! A section of a program that only one process at a time executes: a guard in a block.
//!
//! The first process enters the section and starts a second one. The second waits briefly, gives up
//! and names the holder. When the block of the first one ends, the next process can enter.
//!
//! Run with `cargo run --example scoped_guard`. [`section`] is the part to copy.

use std::error::Error;
use std::process::{Command, id};
use std::time::Duration;

use lockkit::NamedLock;

fn main() -> Result<(), Box<dyn Error>> {
    if std::env::args_os().len() > 1 {
        return section(|| Ok(()));
    }
    section(start_another)?;
    start_another()
}

/// Does `work` inside the section, unless another process stays there too long.
fn section(work: impl FnOnce() -> Result<(), Box<dyn Error>>) -> Result<(), Box<dyn Error>> {
    let lock = NamedLock::new("lockkit-example-section")?;
    {
        let guard = match lock.lock_for(Duration::from_millis(100)) {
            Ok(guard) => guard,
            Err(error) if error.is_timeout() => {
                println!("pid {} gives up: {error}", id());
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        if let Some(died) = guard.recovered() {
            println!(
                "pid {} first checks what is incomplete: the last holder died inside: {died}",
                id()
            );
        }
        println!("pid {} is inside", id());
        work()?;
        println!("pid {} leaves", id());
    } // Here the guard is dropped, on whatever way the block is left.
    Ok(())
}

/// Starts a second process, which tries to enter.
fn start_another() -> Result<(), Box<dyn Error>> {
    let status = Command::new(std::env::current_exe()?)
        .arg("once")
        .status()?;
    if !status.success() {
        return Err(format!("the second process failed: {status}").into());
    }
    Ok(())
}
