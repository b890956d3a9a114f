//! What the second process does: it executes commands on a table.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::process::Command;
#[cfg(unix)]
use std::sync::atomic::{AtomicBool, Ordering};

use lockkit::{LockManager, ManagedGuard, Owner, Result, Wait};

use super::table::{CAPACITY, Table};
use crate::Actor;
use crate::errors::describe;
use crate::helper_process::announce;
#[cfg(unix)]
use crate::helper_process::child_succeeds;

/// Acts as the second process: works on the table until there are no more commands.
pub fn serve(table: &Table) {
    let mut manager: Option<Box<dyn LockManager>> = None;
    let mut guards = HashMap::new();
    for line in crate::commands() {
        let answer = match line.split_once(' ') {
            Some(("kill-at", step)) => {
                crate::failpoint::kill_at(step.parse().expect("a number"));
                Ok("armed".to_owned())
            }
            _ => match &manager {
                Some(manager) => execute(&line, &**manager, &mut guards),
                None => table
                    .try_open(CAPACITY)
                    .and_then(|opened| execute(&line, &**manager.insert(opened), &mut guards)),
            },
        };
        println!("{}", answer.unwrap_or_else(|error| describe(&error)));
    }
}

fn execute(
    line: &str,
    manager: &dyn LockManager,
    guards: &mut HashMap<u32, ManagedGuard>,
) -> Result<String> {
    let words: Vec<&str> = line.split(' ').collect();
    let number = |at: usize| number_at(&words, at);
    let mut take = |id: u32, wait: &Wait| {
        announce();
        let guard = manager.retrieve(id)?.acquire(wait)?;
        let died = guard
            .recovered()
            .map(|died| died.owner().map_or(0, Owner::pid));
        guards.insert(id, guard);
        Ok(died.map_or("held".to_owned(), |died| format!("held recovered {died}")))
    };
    match words[0] {
        "allocate" => manager
            .allocate()
            .map(|lock| format!("allocated {}", lock.id())),
        "allocate-at" => manager
            .allocate_at(number(1))
            .map(|lock| format!("allocated {}", lock.id())),
        "try" => take(number(1), &Wait::none()),
        "lock" => take(number(1), &Wait::forever()),
        "release" => {
            guards.remove(&number(1)).expect("a guard").release()?;
            Ok("ok".to_owned())
        }
        "unlock" => manager
            .retrieve(number(1))?
            .unlock()
            .map(|()| "ok".to_owned()),
        "free" => manager
            .retrieve(number(1))?
            .free()
            .map(|()| "ok".to_owned()),
        "hold" => {
            for id in 0..number(1) {
                take(id, &Wait::none())?;
            }
            Ok(format!("holds {}", number(1)))
        }
        "open" => Ok("opened".to_owned()),
        #[cfg(unix)]
        "fork-die" | "fork-often" => fork_children(&words, manager),
        "churn" | "grab-all" => repeat(&words, manager),
        _ => Ok(format!("error unknown command {line:?}")),
    }
}

/// Parses the word at this index.
fn number_at(words: &[&str], at: usize) -> u32 {
    words[at].parse().expect("a number")
}

/// Executes a command that forks.
#[cfg(unix)]
fn fork_children(words: &[&str], manager: &dyn LockManager) -> Result<String> {
    let number = |at: usize| number_at(words, at);
    if words[0] == "fork-die" {
        return match fork::fork().expect("a fork") {
            fork::Fork::Child => {
                // The child has a slot of its own, because the parent's slot is the parent's.
                std::mem::forget(manager.retrieve(number(1))?.try_lock()?);
                rustix::process::kill_process(
                    rustix::process::getpid(),
                    rustix::process::Signal::KILL,
                )
                .expect("a process can kill itself");
                unreachable!("the process has killed itself");
            }
            fork::Fork::Parent(child) => {
                // The child has killed itself. Only its end matters.
                let _ = child_succeeds(child);
                Ok(format!("died {child}"))
            }
        };
    }

    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    drop(manager.retrieve(number(1)).and_then(|lock| lock.try_lock()));
                }
            });
        }
        let all_succeed = (0..200).all(|_| match fork::fork().expect("a fork") {
            fork::Fork::Child => {
                // A child that hangs must not outlive the test.
                #[cfg(target_os = "linux")]
                let _ = rustix::process::set_parent_process_death_signal(Some(
                    rustix::process::Signal::KILL,
                ));
                let result = manager
                    .retrieve(number(2))
                    .and_then(|lock| lock.try_lock()?.release());
                std::process::exit(result.is_err().into());
            }
            fork::Fork::Parent(child) => child_succeeds(child),
        });
        stop.store(true, Ordering::Relaxed);
        Ok(if all_succeed {
            "forked".to_owned()
        } else {
            "error in a child".to_owned()
        })
    })
}

/// Executes a command that repeats an operation.
fn repeat(words: &[&str], manager: &dyn LockManager) -> Result<String> {
    let number = |at: usize| number_at(words, at);
    match words[0] {
        "churn" => {
            let inside = Path::new(words[3]);
            for round in 0..number(2) {
                let lock = manager.retrieve(number(1))?;
                let guard = lock.lock()?;
                File::options()
                    .write(true)
                    .create_new(true)
                    .open(inside)
                    .expect("no other process holds the lock");
                // The lock excludes, whether or not it is freed.
                let _ = if round % 2 == 0 {
                    lock.free()
                } else {
                    manager.allocate_at(number(1)).map(drop)
                };
                std::fs::remove_file(inside).expect("the file exists");
                guard.release()?;
            }
            Ok("churned".to_owned())
        }
        "grab-all" => {
            for _ in 0..number(1) {
                let grabbed: Vec<_> = std::iter::from_fn(|| manager.allocate().ok()).collect();
                grabbed.iter().try_for_each(|lock| lock.free())?;
            }
            Ok("grabbed".to_owned())
        }
        _ => unreachable!("the caller passes only these commands"),
    }
}

impl Actor {
    /// Starts an actor that works on a table of locks; see [`serve`].
    pub fn start_at(table: &Table) -> Self {
        Self::start_at_with(table, |_| {})
    }

    /// As [`start_at`](Self::start_at), with its command changed by `change`.
    pub fn start_at_with(table: &Table, change: impl FnOnce(&mut Command)) -> Self {
        Self::start_part(["table".to_owned(), table.to_string()], change)
    }
}
