//! The watch over the `held` keys, which wakes the waiters.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::client::Client;
use super::json::{decode, encode};
use super::watch_stream::WatchStream;
use crate::base::error::StoreError;
use crate::lease::store::lease_store::Deadline;
use crate::lease::store::server::{Listener, Result};

/// The time without an answer after which a watch checks that its endpoint is alive.
const MAX_SILENCE: Duration = Duration::from_secs(4);

/// A watch over the `held` keys.
pub(super) struct EtcdListener {
    client: Arc<Client>,
    stream: WatchStream,
    prefix: String,
    /// When the endpoint last sent anything.
    last_answer: Instant,
}

impl EtcdListener {
    pub(super) fn open(client: &Arc<Client>, prefix: &str, by: Deadline) -> Result<Self> {
        // The prefix ends with a slash. The range ends at the prefix with this last byte
        // incremented.
        let mut end = prefix.as_bytes().to_vec();
        if let Some(last) = end.last_mut() {
            *last += 1;
        }
        let request = json!({ "create_request": {
            "key": encode(prefix), "range_end": encode(end), "filters": ["NOPUT"],
        } });
        let stream = client.watch(&request, by)?;
        Ok(Self {
            client: client.clone(),
            stream,
            prefix: prefix.to_owned(),
            last_answer: Instant::now(),
        })
    }
}

impl Listener for EtcdListener {
    fn listen(&mut self, at_most: Duration, notify: &mut dyn FnMut(&str)) -> Result<()> {
        let Some(line) = self.stream.next(Deadline::after(at_most))? else {
            if self.last_answer.elapsed() > MAX_SILENCE {
                // A frozen endpoint looks like an endpoint without changes to report.
                self.client
                    .check_alive(self.stream.endpoint(), Deadline::after(MAX_SILENCE / 2))?;
                self.last_answer = Instant::now();
            }
            return Ok(());
        };
        self.last_answer = Instant::now();
        let answer: Value = serde_json::from_slice(&line).map_err(StoreError::not_applied)?;
        let result = &answer["result"];
        // etcd ends the watch if it has no leader, or if it has compacted the revision that the
        // watch had reached.
        if !result.is_object() || result["canceled"] == true {
            return Err(StoreError::not_applied(format!(
                "cannot watch the leases: etcd ended the watch: {answer}"
            )));
        }
        for event in result["events"].as_array().into_iter().flatten() {
            if let Some(name) = decode(&event["kv"]["key"]).strip_prefix(&self.prefix) {
                notify(name);
            }
        }
        Ok(())
    }
}
