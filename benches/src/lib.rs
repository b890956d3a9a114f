//! Lockkit's locks beside their peers. Linux only.
//!
//! `cargo bench -p lockkit-benches` runs these programs, and each ends in a [`table`] that says which bounds held:
//! - `uncontended`: taking and giving back a lock that nobody else wants. Criterion runs every contender.
//! - `contended`: what processes see that want a lock which another one has. It times events in several processes,
//!   which criterion cannot, so it is a plain program.
//! - `managers`: tables of locks in shared memory, beside a robust pthread mutex. A plain program as well.
//! - `leases`: file leases, beside those of Python's filelock, which it installs below `target`. Plain as well.
//! - `engines`: leases on servers, beside the bare requests, and beside what etcd and Python have for them. Plain as well.
//! - `command`: how soon a program runs that `lockkit run` starts, beside flock(1).
//! - `memory`: bytes and descriptors of a lock.
//! - `tracing`: what the feature of this name costs while nobody listens.
//! - `verdict`: one table of all that, each row with its best peer; it also writes `docs/BENCHMARKS.md`.
//!
//! Every ratio is between numbers of one run, taken in turns, so that a noisy machine disturbs both sides alike. A row
//! that is behind fails nothing: on a machine that does other things as well the table informs, it does not judge.
//!
//! Behind `--`, all programs take a part of a benchmark's name, to run only what contains it, and `--quick`, to see
//! in seconds that everything runs.
//!
//! This library is what the programs share: their [`arguments`], the [`process`]es that they start, the table; and the
//! [`baseline`] requests that leases on servers are measured by.

pub mod arguments;
pub mod baseline;
pub mod process;
pub mod table;

use lockkit::NamedGuard;

use crate::table::Row;

/// Waits until no other run is under way, which would measure this one as much as itself. The runs of a user can
/// therefore all use the same lock names; a lock leaves a small record behind for every name.
pub fn alone() -> NamedGuard {
    let lock = lockkit::NamedLock::new("lockkit-benches").expect("the name is valid");
    lock.lock().expect("the lock on the benches can be taken")
}

/// What a program measures, by name, as much of it as `L` says.
pub type Experiment<L> = (&'static str, fn(&L) -> Vec<Row>);

/// Runs the experiments that were asked for, as much of them as was asked for, and prints their rows.
pub fn run<L>(experiments: &[Experiment<L>], full: &L, quick: &L) {
    let filter = arguments::filter();
    let _alone = alone();
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
