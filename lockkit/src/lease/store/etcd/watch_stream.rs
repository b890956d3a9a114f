//! The answers of a watch, line by line.

use std::io::ErrorKind;

use super::http::Connection;
use crate::base::error::StoreError;
use crate::lease::store::lease_store::Deadline;
use crate::lease::store::server::Result;

/// The answers of a watch, each a line.
pub(super) struct WatchStream {
    connection: Connection,
    buffer: Vec<u8>,
    endpoint: String,
}

impl WatchStream {
    /// Returns the answers on this connection, whose endpoint has begun to answer.
    pub(super) fn new(connection: Connection, endpoint: String) -> Self {
        Self {
            connection,
            buffer: Vec::new(),
            endpoint,
        }
    }

    /// Returns the endpoint that sends the answers.
    pub(super) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Reads all that comes until the end, or until an error.
    pub(super) fn read_rest(&mut self, by: Deadline) -> Vec<u8> {
        let mut body = Vec::new();
        while let Ok(Some(piece)) = self.connection.piece(by) {
            body.extend_from_slice(&piece);
        }
        body
    }

    /// Returns the next line, or `None` if none came in time.
    pub(super) fn next(&mut self, by: Deadline) -> Result<Option<Vec<u8>>> {
        let endpoint = &self.endpoint;
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let rest = self.buffer.split_off(end + 1);
                return Ok(Some(std::mem::replace(&mut self.buffer, rest)));
            }
            match self.connection.piece(by) {
                Ok(Some(piece)) => self.buffer.extend_from_slice(&piece),
                Ok(None) => {
                    return Err(StoreError::not_applied(format!(
                        "cannot watch the leases: {endpoint} ended the watch"
                    )));
                }
                Err(error) if error.kind() == ErrorKind::TimedOut => return Ok(None),
                Err(error) => {
                    return Err(StoreError::not_applied(format!(
                        "cannot watch the leases at {endpoint}: {error}"
                    )));
                }
            }
        }
    }
}
