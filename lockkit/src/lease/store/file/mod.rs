//! The store that is built in: a file for each lease.
//!
//! A reader opens the file, checks that it is a plain file, and reads the record. It takes no lock,
//! so a stopped or killed reader has no effect on other processes. The checksum shows whether the
//! record is complete. If not, a write is in progress, and the reader reads again.
//!
//! A writer starts as a reader. If the record lets it write, the writer takes the file's flock and
//! checks that the path still names the file. Then the writer reads the record again, decides
//! again, writes the record in place, unlocks the file and closes it. A heartbeat that finds its
//! own claim does not check the path. The flock makes each step atomic for all processes. A process
//! that is killed in a step has changed everything or nothing. No process waits in flock(2),
//! because the process that has the flock may be stopped: a step tries again until its deadline,
//! and a waiter then counts the lease as held.
//!
//! [`FileStore::judge`] decides whether a process may take a record that says that the lease is
//! held. The token of a new grant:
//! - It is above the previous token, and at least the microseconds since the epoch. Without a
//!   readable record it is exactly those microseconds. So no token is far ahead of the time. A
//!   deletion, a restored backup or a power cut takes the record back, but not the tokens. The only
//!   condition is that the wall clock is not set back at the same time.
//!
//! What a holder does if its record differs from what it wrote:
//! - Another claim, or none: the lease was taken over or evicted, and is lost.
//! - Deleted, blank or damaged, and without another claim: the holder writes the record again. It
//!   has the flock and the path names that file, so no other process can take the lease at that
//!   moment. Until its deadline the lease is its own. After a deletion the first process to create
//!   the file has the lease.
//! - The file of another program: the holder never writes to it. It keeps the lease until its
//!   deadline, in case the record is restored, and then has lost the lease.

mod create;
mod file_store;
pub(in crate::lease) mod format;
mod grant;
mod judgement;
mod locked;
mod open;
mod reading;
mod requests;
mod staleness;
#[cfg(test)]
mod tests;

pub(in crate::lease) use file_store::{FileSpec, FileStore};
