//! Compares lockkit's locks with their peers. Linux only.
//!
//! `cargo bench -p lockkit-benches` runs these programs. Each ends with a [`table`] that shows
//! which bounds held:
//! - `uncontended`: acquire and release of a lock without contention. Criterion runs every
//!   contender.
//! - `contended`: processes that contend for a lock. It times events in several processes, which
//!   criterion cannot, so it is a plain program.
//! - `managers`: tables of locks in shared memory, compared with a robust pthread mutex. Also a
//!   plain program.
//! - `leases`: file leases, compared with those of Python's filelock, which it installs below
//!   `target`. Also plain.
//! - `engines`: leases on servers, compared with the bare requests and with the equivalents of etcd
//!   and Python. Also plain.
//! - `command`: how soon `lockkit run` starts a program, compared with flock(1).
//! - `memory`: bytes and descriptors of a lock.
//! - `tracing`: the cost of the feature of this name without a subscriber.
//! - `summary`: one table of all results, each row with its best peer. It also writes
//!   `docs/BENCHMARKS.md`.
//!
//! Every ratio is between numbers of one run, measured in alternation, so that a noisy machine
//! disturbs both sides alike. A row that misses its bound fails nothing. On a machine that does
//! other things as well the table informs, it does not judge.
//!
//! After `--`, all programs accept a part of a benchmark's name, to run only the benchmarks that
//! contain it. They also accept `--quick`, to check within seconds that everything runs.
//!
//! This library contains the shared parts of the programs: their [`arguments`], the child
//! [`process`]es, the table, and the [`baseline`] requests with which leases on servers are
//! compared.

pub mod arguments;
pub mod baseline;
pub mod process;
pub mod table;

use lockkit::NamedGuard;

use crate::table::Row;

/// Waits until no other run is in progress, which would distort this measurement. The runs of a
/// user can therefore all use the same lock names. A lock leaves a small record behind for every
/// name.
pub fn exclusive_run() -> NamedGuard {
    let lock = lockkit::NamedLock::new("lockkit-benches").expect("the name is valid");
    lock.lock().expect("the lock on the benches can be taken")
}

/// A measurement, by name. `L` says how much to measure.
pub type Experiment<L> = (&'static str, fn(&L) -> Vec<Row>);

/// Runs the requested experiments with the requested length, and prints their rows.
pub fn run<L>(experiments: &[Experiment<L>], full: &L, quick: &L) {
    let filter = arguments::filter();
    let _exclusive = exclusive_run();
    let length = if arguments::is_quick() { quick } else { full };
    let mut rows = Vec::new();
    for (name, experiment) in experiments {
        if name.contains(&filter) {
            println!("{name}");
            rows.extend(experiment(length));
        }
    }
    table::print(&rows);
}
