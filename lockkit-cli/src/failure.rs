//! Failures: a sentence that says what the user can do, and the exit code for scripts.
//!
//! The codes are those of [sysexits.h(3head)], so that none is mistaken for an answer: `status`
//! uses 0, 1 and 2 for answers.
//!
//! [sysexits.h(3head)]: https://man7.org/linux/man-pages/man3/sysexits.h.3head.html

use std::error::Error;
use std::io::{self, Write};

use lockkit::ErrorKind;

use crate::style::{self, plain};

/// The exit code of a command that worked, or the failure.
pub(crate) type Outcome = Result<u8, Failure>;

/// Exit codes.
pub(crate) mod code {
    /// Success.
    pub(crate) const OK: u8 = 0;
    /// The arguments are invalid.
    pub(crate) const USAGE: u8 = 64;
    /// A file is not what it should be.
    pub(crate) const DATA: u8 = 65;
    /// A file is missing.
    pub(crate) const NO_INPUT: u8 = 66;
    /// This build or this system cannot do it.
    pub(crate) const UNAVAILABLE: u8 = 69;
    /// The system refused.
    #[cfg_attr(
        windows,
        expect(dead_code, reason = "of processes that cannot be made or waited for")
    )]
    pub(crate) const OS: u8 = 71;
    /// A file cannot be made.
    pub(crate) const CANNOT_CREATE: u8 = 73;
    /// The system refused to read or write.
    pub(crate) const IO: u8 = 74;
    /// Another process holds it; a later try may work.
    pub(crate) const TEMPORARY: u8 = 75;
    /// This user lacks the permission.
    pub(crate) const NO_PERMISSION: u8 = 77;
    /// The program was found, and cannot be run.
    pub(crate) const CANNOT_RUN: u8 = 126;
    /// There is no such program.
    pub(crate) const NOT_FOUND: u8 = 127;
    /// Added to the number of the signal that ended a program.
    pub(crate) const SIGNALLED: u8 = 128;
}

/// The failure of a command.
#[derive(Debug)]
pub(crate) struct Failure {
    code: u8,
    message: String,
    example: Option<String>,
    quiet: bool,
}

impl Failure {
    pub(crate) fn new(code: u8, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            example: None,
            quiet: false,
        }
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(code::USAGE, message)
    }

    pub(crate) fn io(what: impl std::fmt::Display, error: impl Into<io::Error>) -> Self {
        let error = error.into();
        Self::new(of_io(error.kind()), format!("cannot {what}: {error}"))
    }

    /// Adds a command line that helps.
    pub(crate) fn example(mut self, example: impl Into<String>) -> Self {
        self.example = Some(example.into());
        self
    }

    /// Appends to the message.
    pub(crate) fn with_more(mut self, more: impl std::fmt::Display) -> Self {
        self.message += &more.to_string();
        self
    }

    /// Replaces the exit code.
    pub(crate) fn with_code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }

    /// Prints nothing, if `quiet` is set.
    pub(crate) fn quiet(mut self, quiet: bool) -> Self {
        self.quiet |= quiet;
        self
    }

    pub(crate) fn code(&self) -> u8 {
        self.code
    }

    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    pub(crate) fn show(&self) {
        if self.quiet {
            return;
        }
        let mut stderr = anstream::stderr().lock();
        let (bad, end) = (style::BAD.render(), style::BAD.render_reset());
        // Paths and the text of a store may contain any characters.
        let _ = writeln!(
            stderr,
            "{bad}lockkit:{end} {}",
            plain(&sentence(&self.message))
        );
        if let Some(example) = &self.example {
            let _ = writeln!(stderr, "For example: {}", plain(example));
        }
    }
}

/// Writes a line to the standard error, if it is writable: unlike the macro it never panics.
pub(crate) fn note(line: impl std::fmt::Display) {
    // In one write, so that lines of several processes do not mix.
    let _ = io::stderr().write_all(format!("{}\n", plain(&line.to_string())).as_bytes());
}

/// Adds a full stop.
fn sentence(message: &str) -> String {
    let mut letters = message.chars();
    let first = letters
        .next()
        .map(|first| first.to_uppercase().to_string())
        .unwrap_or_default();
    let stop = if message.ends_with(['.', '!', '?']) {
        ""
    } else {
        "."
    };
    format!("{first}{}{stop}", letters.as_str())
}

pub(crate) fn of_io(kind: io::ErrorKind) -> u8 {
    match kind {
        io::ErrorKind::NotFound => code::NO_INPUT,
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => code::NO_PERMISSION,
        io::ErrorKind::AlreadyExists => code::CANNOT_CREATE,
        io::ErrorKind::Unsupported => code::UNAVAILABLE,
        _ => code::IO,
    }
}

impl From<lockkit::Error> for Failure {
    fn from(error: lockkit::Error) -> Self {
        let code = match error.kind() {
            ErrorKind::Held { .. } | ErrorKind::Timeout { .. } | ErrorKind::Cancelled { .. } => {
                code::TEMPORARY
            }
            ErrorKind::InvalidName { .. }
            | ErrorKind::RelativePath { .. }
            | ErrorKind::InvalidOption { .. }
            | ErrorKind::InvalidUrl { .. }
            | ErrorKind::InvalidCapacity { .. }
            | ErrorKind::NoSuchLock { .. } => code::USAGE,
            ErrorKind::NotAPidFile { .. }
            | ErrorKind::NotALease { .. }
            | ErrorKind::LayoutMismatch { .. } => code::DATA,
            ErrorKind::ForeignOwner { .. } | ErrorKind::Insecure { .. } => code::NO_PERMISSION,
            ErrorKind::Io { source, .. } => of_io(source.kind()),
            _ => code::UNAVAILABLE,
        };
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            message += &format!(": {error}");
            cause = error.source();
        }
        Self::new(code, message)
    }
}
