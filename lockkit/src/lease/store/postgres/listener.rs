//! The connection that listens to notifications, and the test whether they arrive.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::check::check;
use super::config::ServerConfig;
use super::connection::Connection;
use super::error::of_request;
use super::schema::{LISTEN, NOTIFY};
use crate::base::error::StoreError;
use crate::lease::store::lease_store::{ClaimId, Deadline};
use crate::lease::store::server::{Listener, Result};
use crate::sys::failpoint::step;

/// The time without an answer after which a listener asks whether the server is alive. The listener
/// waits half as long for the answer.
const MAX_SILENCE: Duration = Duration::from_secs(10);
/// How long a notification from this process to itself may take, through any proxy in between.
const ECHO_TIMEOUT: Duration = Duration::from_secs(2);

/// Opens a connection that receives all later notifications. Through a proxy they may not arrive:
/// then this returns an error and sets `lacks_notifications`.
pub(super) fn listen(
    config: &ServerConfig,
    by: Deadline,
    lacks_notifications: &AtomicBool,
) -> Result<Box<dyn Listener>> {
    let mut connection = config.connect(by, check)?;
    connection.execute(LISTEN, by).map_err(of_request)?;
    step("listening");
    if !connection.is_direct {
        // Another connection sends, because a proxy may return to the listening connection what
        // that connection itself sends.
        let mut other = config.connect(by, check)?;
        let probe = format!("\u{1}{}", ClaimId::random());
        other.query(&NOTIFY, &[&probe], by).map_err(of_request)?;
        let echo_by = Deadline::after(ECHO_TIMEOUT);
        loop {
            let received = connection.listen(echo_by).map_err(of_request)?;
            if received.contains(&probe) {
                break;
            }
            if echo_by.is_past() {
                // A server or proxy that was only frozen delivers the notification no later than
                // this answer.
                connection
                    .execute("", Deadline::after(ECHO_TIMEOUT))
                    .map_err(of_request)?;
                if connection
                    .listen(Deadline::after(Duration::ZERO))
                    .map_err(of_request)?
                    .contains(&probe)
                {
                    break;
                }
                lacks_notifications.store(true, Ordering::Relaxed);
                return Err(StoreError::not_applied(
                    "cannot listen to the server: the proxy in between does not forward notifications",
                ));
            }
        }
    }
    Ok(Box::new(PostgresListener {
        connection,
        last_answer: Instant::now(),
    }))
}

/// The connection that listens.
struct PostgresListener {
    connection: Connection,
    /// When the server last sent anything.
    last_answer: Instant,
}

impl Listener for PostgresListener {
    fn listen(&mut self, at_most: Duration, notify: &mut dyn FnMut(&str)) -> Result<()> {
        if self.last_answer.elapsed() > MAX_SILENCE {
            // A connection that was cut without a notice looks like a quiet connection.
            self.connection
                .execute("", Deadline::after(MAX_SILENCE / 2))
                .map_err(of_request)?;
            self.last_answer = Instant::now();
        }
        for name in self
            .connection
            .listen(Deadline::after(at_most))
            .map_err(of_request)?
        {
            self.last_answer = Instant::now();
            notify(&name);
        }
        Ok(())
    }
}
