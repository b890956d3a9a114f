//! The display of a wait for a lock: which lock, its holders, and the time since the wait began.
//!
//! The wait itself is one call on the main thread, so that it keeps its place in the queue. A
//! second thread shows the wait, and has ended before any fork.
//!
//! One write(2) writes the line on a terminal, with no escape sequence. The line begins with a
//! carriage return, is cut before the last column, and covers the previous line with spaces. So a
//! stop or a kill at any point leaves the terminal as before.

use std::io::{IsTerminal, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use lockkit::Owner;

use crate::failure::note;
use crate::style::plain;

/// The audience of the display.
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
            true if is_dumb() => Self::Log,
            true => Self::Terminal,
            false if verbose => Self::Log,
            false => Self::Nobody,
        }
    }
}

/// Whether the terminal may not support a carriage return.
fn is_dumb() -> bool {
    let name = std::env::var_os("TERM");
    cfg!(unix) && name.is_none_or(|name| name.is_empty() || name == "dumb")
}

/// A lock that is acquired sooner is not reported.
const AT_ONCE: Duration = Duration::from_millis(150);
const NEXT: Duration = Duration::from_millis(500);

/// Runs `acquire`. Meanwhile shows that `lock` is waited for, and its holders, which `holders`
/// returns.
pub(crate) fn shown<T>(
    audience: Audience,
    lock: &str,
    holders: impl Fn() -> Vec<Owner> + Send,
    acquire: impl FnOnce() -> T,
) -> T {
    if audience == Audience::Nobody {
        return acquire();
    }
    std::thread::scope(|scope| {
        let (done, is_done) = channel::<()>();
        // Without a thread the wait is not shown; everything else works.
        let _ = std::thread::Builder::new().spawn_scoped(scope, move || match audience {
            Audience::Terminal => show(&plain(lock), &holders, &is_done),
            _ => log(&plain(lock), &holders, &is_done),
        });
        let acquired = acquire();
        drop(done);
        acquired
    })
}

/// Returns the holders as text for people.
pub(crate) fn described(holders: &[Owner]) -> String {
    holders
        .iter()
        .map(Owner::describe)
        .collect::<Vec<_>>()
        .join("; ")
}

fn held_by(holders: &[Owner]) -> String {
    match holders {
        [] => String::new(),
        holders => format!(", held by {}", plain(&described(holders))),
    }
}

/// Waits for the first, or the next, moment to show the wait. Returns false when there is nothing
/// more to show.
fn is_time(done: &Receiver<()>, pause: &mut Duration) -> bool {
    let waits = done.recv_timeout(*pause) == Err(RecvTimeoutError::Timeout);
    *pause = NEXT;
    waits
}

/// Rewrites a line on a terminal.
fn show(lock: &str, holders: &dyn Fn() -> Vec<Owner>, done: &Receiver<()>) {
    let since = Instant::now();
    let mut pause = AT_ONCE;
    let mut before = 0;
    while is_time(done, &mut pause) {
        let holders = holders();
        let waited = humantime::format_duration(Duration::from_secs(since.elapsed().as_secs()));
        let width = terminal_width();
        let (line, columns) = cut(
            &format!("Waiting for {lock} for {waited}{}", held_by(&holders)),
            width - 1,
        );
        let rest = before.min(width - 1).saturating_sub(columns);
        write(&format!("\r{line}{:rest$}", ""));
        before = columns;
    }
    if before > 0 {
        write(&format!("\r{:1$}\r", "", before.min(terminal_width() - 1)));
    }
}

fn write(text: &str) {
    // Without a macro, which writes each piece separately.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Writes a line when the wait begins, and when another process becomes the holder. A short gap
/// without a holder, or another program of the same holder, is not reported.
fn log(lock: &str, holders: &dyn Fn() -> Vec<Owner>, done: &Receiver<()>) {
    let mut pause = AT_ONCE;
    let mut last: Option<Vec<Owner>> = None;
    while is_time(done, &mut pause) {
        let now = holders();
        let is_news = match &last {
            None => true,
            Some(last) => !now.is_empty() && !are_same(last, &now),
        };
        if is_news {
            note(format_args!("lockkit: waiting for {lock}{}", held_by(&now)));
            last = Some(now);
        }
    }
}

fn are_same(some: &[Owner], others: &[Owner]) -> bool {
    some.len() == others.len()
        && some
            .iter()
            .all(|one| others.iter().any(|other| one.is_same_process(other)))
}

/// Returns the number of columns of the terminal, at least 2.
fn terminal_width() -> usize {
    const USUAL: usize = 80;
    #[cfg(unix)]
    let width =
        rustix::termios::tcgetwinsize(std::io::stderr()).map_or(0, |size| usize::from(size.ws_col));
    #[cfg(not(unix))]
    let width = 0;
    match width {
        0 => USUAL,
        width => width.max(2),
    }
}

/// Returns the beginning of `line` that fits into so many columns, with an ellipsis at a cut, and
/// its number of columns.
fn cut(line: &str, columns: usize) -> (String, usize) {
    let whole: usize = line.chars().map(width_of).sum();
    if whole <= columns {
        return (line.to_owned(), whole);
    }
    let (mut shown, mut taken) = (String::new(), 1);
    for letter in line.chars() {
        taken += width_of(letter);
        if taken > columns {
            taken -= width_of(letter);
            break;
        }
        shown.push(letter);
    }
    shown.push('…');
    (shown, taken)
}

/// Returns the number of columns of a letter on a terminal: 2 for East Asian letters and for
/// pictures. If terminals differ, it is the larger number, because a line that is too long is
/// wrapped.
fn width_of(letter: char) -> usize {
    match u32::from(letter) {
        // Combining marks, and selectors for the form of the previous letter.
        0x300..=0x36f | 0x20d0..=0x20ff | 0xfe00..=0xfe0f => 0,
        0x1100..=0x115f
        | 0x231a..=0x231b
        | 0x2329..=0x232a
        | 0x23e9..=0x23fa
        | 0x25fd..=0x25fe
        | 0x2600..=0x27bf
        | 0x2b1b..=0x2b55
        | 0x2e80..=0x303e
        | 0x3041..=0xa4cf
        | 0xa960..=0xa97c
        | 0xac00..=0xd7a3
        | 0xf900..=0xfaff
        | 0xfe10..=0xfe19
        | 0xfe30..=0xfe6f
        | 0xff00..=0xff60
        | 0xffe0..=0xffe6
        | 0x16fe0..=0x18dff
        | 0x1aff0..=0x1b2ff
        | 0x1f000..=0x1faff
        | 0x20000..=0x3fffd => 2,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cut_line_fits_its_columns() {
        assert_eq!(cut("abc", 3), ("abc".to_owned(), 3));
        assert_eq!(cut("abcd", 3), ("ab…".to_owned(), 3));
        assert_eq!(cut("abc", 1), ("…".to_owned(), 1));
        assert_eq!(cut("日本語", 6), ("日本語".to_owned(), 6));
        assert_eq!(cut("日本語", 5), ("日本…".to_owned(), 5));
        assert_eq!(cut("日本語", 4), ("日…".to_owned(), 3));
        assert_eq!(
            cut("e\u{301}e\u{301}", 2),
            ("e\u{301}e\u{301}".to_owned(), 2)
        );
    }
}
