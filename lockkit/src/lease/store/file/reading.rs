//! Reading the file of a lease.

use std::fs::File;
use std::io::{self, ErrorKind as Io};

use super::file_store::{FileStore, Result};
use super::format::{self, Content, SIZE};
use crate::sys::files::FileExt;

/// How often a reader without the flock reads again if a write is in progress.
const MAX_UNLOCKED_READS: u32 = 8;

/// The content of a file at one moment.
pub(super) struct Reading {
    /// The first bytes of the file, at most one more than a record has.
    pub(super) bytes: Vec<u8>,
    pub(super) content: Content,
}

impl Reading {
    pub(super) fn of(bytes: Vec<u8>) -> Self {
        Self {
            content: format::parse(&bytes),
            bytes,
        }
    }
}

impl FileStore {
    /// Reads the file without a lock. Another process may be writing, so content that is not a
    /// complete record is read again until two readings are equal.
    pub(super) fn read_unlocked(&self, file: &File) -> Result<Reading> {
        let mut reading = self.read(file)?;
        for _ in 0..MAX_UNLOCKED_READS {
            if matches!(reading.content, Content::Ours(_) | Content::Newer) {
                break;
            }
            let before = std::mem::replace(&mut reading, self.read(file)?);
            if before.bytes == reading.bytes {
                break;
            }
        }
        Ok(reading)
    }

    pub(super) fn read(&self, file: &File) -> Result<Reading> {
        read_bytes(file)
            .map(Reading::of)
            .map_err(|error| self.io_error("read", error))
    }
}

/// Reads the first bytes of a file: a record, and one more byte if the file is longer.
pub(super) fn read_bytes(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; SIZE + 1];
    let mut filled = 0;
    // The buffer is longer than a record, so a read that returns exactly a record has reached the
    // end of the file.
    while filled < SIZE {
        match file.read_at(&mut bytes[filled..], filled as u64) {
            Ok(0) => break,
            Ok(more) => filled += more,
            Err(error) if error.kind() == Io::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}
