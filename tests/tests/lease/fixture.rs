//! What the cases share: a lease in a directory of its own, and the answers of the processes that
//! use it.

use std::fs;
use std::fs::File;
use std::path::Path;
use std::time::{Duration, SystemTime};

use lockkit::FileLock;
#[cfg(target_os = "linux")]
use lockkit_tests::is_stopped;
use lockkit_tests::leases::{Terms, forge, left_by_the_dead, line};
use lockkit_tests::small_disk::SmallDisk;
use lockkit_tests::{Actor, until};
#[cfg(target_os = "linux")]
use rustix::process::Signal;
use tempfile::TempDir;

/// An age of a record that is longer than a damaged record counts as held.
pub(crate) const OLD_AGE: Duration = Duration::from_secs(10);

pub(crate) const HOUR: Duration = Duration::from_secs(3600);

/// Creates a directory for one test, and the options of a lease in it.
pub(crate) fn temp_lease() -> (TempDir, Terms) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("lease");
    (directory, Terms::of(path))
}

pub(crate) fn read(terms: &Terms) -> Vec<u8> {
    fs::read(&terms.path).unwrap()
}

/// Changes a file in place, but not between another process's read and write.
pub(crate) fn write(terms: &Terms, bytes: impl AsRef<[u8]>) {
    let _locked = FileLock::new(&terms.path).lock().unwrap();
    fs::write(&terms.path, bytes).unwrap();
}

/// Replaces the file by another one.
pub(crate) fn replace(terms: &Terms, bytes: impl AsRef<[u8]>) {
    let new = terms.path.with_extension("new");
    fs::write(&new, bytes).unwrap();
    fs::rename(new, &terms.path).unwrap();
}

pub(crate) fn set_modified(path: &Path, modified: SystemTime) {
    File::options()
        .write(true)
        .open(path)
        .unwrap()
        .set_modified(modified)
        .unwrap();
}

/// Returns a held record of a holder on another host. This host can determine only that the holder
/// is silent.
pub(crate) fn record_of_other_host(terms: &Terms) -> Vec<u8> {
    let (_directory, mut other) = temp_lease();
    other.ttl = terms.ttl;
    let record = left_by_the_dead(&other);
    forge(&record, &[("host", "elsewhere"), ("boot", &"7".repeat(32))])
}

/// Sends the command, and returns the token of the answer `held TOKEN`, which must have nothing
/// after it.
pub(crate) fn acquire(actor: &mut Actor, command: &str) -> u64 {
    token(&actor.ask(command))
}

pub(crate) fn token(answer: &str) -> u64 {
    let token = answer.strip_prefix("held ").expect(answer);
    token.parse().unwrap_or_else(|_| panic!("{answer}"))
}

/// As [`token`], for an answer that reports the death of an owner.
pub(crate) fn token_after(answer: &str, died: u32) -> u64 {
    token(
        answer
            .strip_suffix(&format!(" recovered {died}"))
            .expect(answer),
    )
}

/// Returns how long the lease of `actor` lasts without a renewal.
pub(crate) fn remaining(actor: &mut Actor) -> Duration {
    let left = actor.ask("remaining");
    Duration::from_micros(
        left.strip_prefix("remaining ")
            .expect(&left)
            .parse()
            .unwrap(),
    )
}

pub(crate) fn is_held(answer: &str) -> bool {
    answer.starts_with("error Held")
}

/// Returns the heartbeat number in the record, and 0 without a valid one, as while the record is
/// damaged.
pub(crate) fn heartbeat_number(terms: &Terms) -> u64 {
    let record = fs::read(&terms.path).unwrap_or_default();
    if record.len() < 1024 || !record.starts_with(b"lockkit lease 1\n") {
        return 0;
    }
    line(&record, "beat").parse().unwrap()
}

pub(crate) fn wait_for_heartbeats(terms: &Terms) {
    let before = heartbeat_number(terms);
    until("the holder renews", || heartbeat_number(terms) > before + 1);
}

/// Stops a holder, but not in the middle of a step, because that would block the steps of other
/// processes for as long.
#[cfg(target_os = "linux")]
pub(crate) fn stop(actor: &Actor, terms: &Terms) {
    until("the holder is stopped between two steps", || {
        actor.signal(Signal::STOP);
        until("the holder is stopped", || is_stopped(actor.pid()));
        let is_between = FileLock::new(&terms.path).try_lock().is_ok();
        if !is_between {
            actor.signal(Signal::CONT);
        }
        is_between
    });
}

/// Contents of blank and damaged leases.
pub(crate) const DAMAGED: [&str; 5] = [
    "",
    "lockkit lease 1\n",
    "lockkit lease 1\nsum     8c1b",
    "lock",
    "\0\0\0\0",
];

/// Returns the options of a lease on this file system.
pub(crate) fn terms_on(disk: &SmallDisk) -> Terms {
    Terms::of(disk.path().join("lease"))
}

/// Returns how many files the process `pid` watches for changes.
#[cfg(target_os = "linux")]
pub(crate) fn inotify_watches(pid: u32) -> usize {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap();
    let about =
        descriptors.filter_map(|descriptor| fs::read_to_string(descriptor.ok()?.path()).ok());
    about
        .map(|text| {
            text.lines()
                .filter(|line| line.starts_with("inotify "))
                .count()
        })
        .sum()
}
