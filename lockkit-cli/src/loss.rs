//! The report that a lease is lost, from the thread that finds it out to the one that supervises
//! the program.

#[cfg(unix)]
use std::fs::File;
#[cfg(unix)]
use std::io::Write;
#[cfg(windows)]
use std::sync::mpsc::{Receiver, channel};

use lockkit::Loss;

use crate::failure::Failure;
#[cfg(unix)]
use crate::sys;

/// Delivers the reason of a loss, as text.
#[cfg(unix)]
pub(crate) struct LossPipe(pub(crate) File);

/// Delivers the reason of a loss, as text.
#[cfg(windows)]
pub(crate) struct LossPipe(pub(crate) Receiver<String>);

/// Makes a pipe for the loss of a lease, and the function that writes to it.
#[cfg(unix)]
pub(crate) fn loss() -> Result<(LossPipe, impl Fn(&Loss) + Send + Sync + use<>), Failure> {
    let (reader, writer) = sys::pipe().map_err(|error| Failure::io("make a pipe", error))?;
    Ok((LossPipe(reader), move |loss: &Loss| {
        let _ = (&writer).write_all(text(loss).as_bytes());
    }))
}

/// Makes a channel for the loss of a lease, and the function that writes to it.
#[cfg(windows)]
pub(crate) fn loss() -> Result<(LossPipe, impl Fn(&Loss) + Send + Sync + use<>), Failure> {
    let (send, receive) = channel();
    Ok((LossPipe(receive), move |loss: &Loss| {
        let _ = send.send(text(loss));
    }))
}

fn text(loss: &Loss) -> String {
    format!("{} is lost: {}", loss.lock, loss.reason)
}
