//! Requests of a lock under a fault, and the files that a lock leaves.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::{Actor, Kind, Spec};

/// Every command that requests a free lock.
pub(super) const ACQUIRE_COMMANDS: [&str; 3] = ["try", "lock", "lock-for 1000"];

/// The time limit of an acquisition. By then even a lease whose release failed is released.
pub(super) const ACQUIRE_IN_TIME: &str = "lock-for 10000";

/// Requests the lock in every way. Checks that each answer is the lock or an error that contains
/// one of `causes`. Returns how often the answer was the lock.
pub(super) fn acquire_in_every_way(actor: &mut Actor, causes: &[&str]) -> usize {
    let mut held = 0;
    for command in ACQUIRE_COMMANDS {
        let answer = actor.ask(command);
        if answer == "held" {
            held += 1;
            assert_released_or_error(&actor.ask("release"), causes);
        } else {
            assert!(answer.starts_with("error "), "{answer}");
            assert_released_or_error(&answer, causes);
        }
    }
    held
}

pub(super) fn assert_released_or_error(answer: &str, causes: &[&str]) {
    let names_cause = causes.iter().any(|cause| answer.contains(cause));
    assert!(
        answer == "released" || (answer.starts_with("error ") && names_cause),
        "{answer}, not for {causes:?}"
    );
}

/// Checks that each actor acquires in turn, and excludes the others. No holder died, so no guard
/// reports a death.
pub(super) fn assert_each_acquires(actors: &mut [&mut Actor]) {
    for at in 0..actors.len() {
        actors[at].expect(ACQUIRE_IN_TIME, "held");
        let other = (at + 1) % actors.len();
        if other != at {
            let answer = actors[other].ask("try");
            assert!(answer.starts_with("error Held"), "{answer}");
        }
        actors[at].expect("release", "released");
    }
}

/// Returns the files of a lock of any kind: all files whose names contain the lock's, where locks
/// leave files, and all files in the lock's own directory. The files are below `root`, which
/// differs in another mount namespace.
pub fn files(spec: &Spec, root: &Path) -> BTreeSet<String> {
    let name = Path::new(spec.at())
        .file_name()
        .expect("a name")
        .to_string_lossy()
        .into_owned();
    let below = |path: &Path| root.join(path.strip_prefix("/").expect("absolute"));
    let list = |directory: &Path| -> Vec<String> {
        let entries = fs::read_dir(below(directory))
            .into_iter()
            .flatten()
            .flatten();
        entries
            .map(|entry| directory.join(entry.file_name()).display().to_string())
            .collect()
    };
    let users = ["/tmp", "/dev/shm"].into_iter().flat_map(|base| {
        let directories = list(Path::new(base))
            .into_iter()
            .filter(|path| path.contains("/lockkit-u"));
        directories.map(PathBuf::from).collect::<Vec<_>>()
    });
    let directories: BTreeSet<PathBuf> = [
        PathBuf::from("/tmp"),
        "/dev/shm".into(),
        std::env::temp_dir(),
    ]
    .into_iter()
    .chain(users)
    .collect();
    let named = directories
        .iter()
        .flat_map(|directory| list(directory))
        .filter(|path| path.contains(&name));
    let within = Path::new(spec.at())
        .is_absolute()
        .then(|| list(Path::new(spec.at())))
        .into_iter()
        .flatten();
    named.chain(within).collect()
}

/// Returns the files that one ordinary use of such a lock leaves, with the name of `spec` for its
/// own.
pub(super) fn files_of_ordinary_use(kind: Kind, spec: &Spec) -> BTreeSet<String> {
    let other = kind.fresh();
    Actor::start(&other).expect("try", "held");
    let mut actor = Actor::start(&other);
    assert!(actor.ask(ACQUIRE_IN_TIME).starts_with("held"));
    actor.expect("release", "released");
    let remainder = files(&other, Path::new("/"));
    other.clean();
    let name = |spec: &Spec| {
        Path::new(spec.at())
            .file_name()
            .expect("a name")
            .to_string_lossy()
            .into_owned()
    };
    remainder
        .into_iter()
        .map(|path| path.replace(&name(&other), &name(spec)))
        .collect()
}
