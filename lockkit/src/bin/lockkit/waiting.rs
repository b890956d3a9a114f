//! What is shown while a lock is waited for: which one, who holds it, and for how long it has been waited for.
//!
//! The wait itself is one call on the main thread, so that it keeps its place in the queue. A second thread shows it,
//! and has ended before anything is forked.

use std::io::{IsTerminal, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use crate::failure::note;
use crate::paint::{ODD, paint};

/// For whom to show a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Audience {
    /// A line that is rewritten.
    Terminal,
    /// One line when a wait begins and when the holder changes.
    Log,
    Nobody,
}

impl Audience {
    pub(crate) fn of(quiet: bool, verbose: bool) -> Self {
        match std::io::stderr().is_terminal() {
            _ if quiet => Self::Nobody,
            true => Self::Terminal,
            false if verbose => Self::Log,
            false => Self::Nobody,
        }
    }
}

/// A lock that is taken sooner is not worth a word.
const AT_ONCE: Duration = Duration::from_millis(150);
const NEXT: Duration = Duration::from_millis(500);

/// Runs `acquire`, and meanwhile shows that `lock` is waited for, and by whom it is held as `holder` says.
pub(crate) fn shown<T>(
    audience: Audience,
    lock: &str,
    holder: impl Fn() -> Option<String> + Send,
    acquire: impl FnOnce() -> T,
) -> T {
    if audience == Audience::Nobody {
        return acquire();
    }
    std::thread::scope(|scope| {
        let (done, is_done) = channel::<()>();
        // Without a thread nothing is shown, and nothing else is amiss.
        let _ = std::thread::Builder::new().spawn_scoped(scope, move || show(audience, lock, &holder, &is_done));
        let acquired = acquire();
        drop(done);
        acquired
    })
}

fn show(audience: Audience, lock: &str, holder: &dyn Fn() -> Option<String>, done: &Receiver<()>) {
    let since = Instant::now();
    let mut pause = AT_ONCE;
    let mut last = None;
    let coloured = anstream::AutoStream::choice(&std::io::stderr()) != anstream::ColorChoice::Never;
    while let Err(RecvTimeoutError::Timeout) = done.recv_timeout(pause) {
        pause = NEXT;
        let mut held = holder();
        if let (Some(who), Audience::Terminal, true) = (&mut held, audience, coloured) {
            *who = paint(ODD, &*who);
        }
        let held = held.map(|who| format!(", held by {who}")).unwrap_or_default();
        match audience {
            Audience::Terminal => {
                let waited = humantime::format_duration(Duration::from_secs(since.elapsed().as_secs()));
                // Cleared to its end; one that is longer than the terminal is wide is wrapped off and on again by ?7.
                let mut terminal = std::io::stderr().lock();
                let _ = write!(terminal, "\r\x1b[2K\x1b[?7lWaiting for {lock} for {waited}{held}\x1b[?7h");
                let _ = terminal.flush();
                last = Some(held);
            }
            _ if last.as_ref() != Some(&held) => {
                note(format_args!("lockkit: waiting for {lock}{held}"));
                last = Some(held);
            }
            _ => {}
        }
    }
    if audience == Audience::Terminal && last.is_some() {
        let _ = write!(std::io::stderr(), "\r\x1b[2K");
    }
}
