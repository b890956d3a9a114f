//! Errors as text.

use std::error::Error as _;

use lockkit::ErrorKind;

/// Returns the error and all its causes, as one line.
pub fn with_causes(error: &lockkit::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

/// Formats an error as the actor answers it, with its kind first.
pub fn describe(error: &lockkit::Error) -> String {
    let kind = match error.kind() {
        ErrorKind::Held { .. } => "Held",
        ErrorKind::Timeout { .. } => "Timeout",
        ErrorKind::Cancelled { .. } => "Cancelled",
        ErrorKind::ForeignOwner { .. } => "ForeignOwner",
        ErrorKind::Insecure { .. } => "Insecure",
        ErrorKind::RogueDeletion { .. } => "RogueDeletion",
        ErrorKind::Exhausted { .. } => "Exhausted",
        ErrorKind::NoSuchLock { .. } => "NoSuchLock",
        ErrorKind::AlreadyAllocated { .. } => "AlreadyAllocated",
        ErrorKind::NotAllocated { .. } => "NotAllocated",
        ErrorKind::NotLocked { .. } => "NotLocked",
        ErrorKind::LayoutMismatch { .. } => "LayoutMismatch",
        ErrorKind::TooManyProcesses { .. } => "TooManyProcesses",
        ErrorKind::NotAPidFile { .. } => "NotAPidFile",
        ErrorKind::NotALease { .. } => "NotALease",
        ErrorKind::LeaseLost { .. } => "LeaseLost",
        ErrorKind::Store { .. } => "Store",
        ErrorKind::NoAnswer { .. } => "NoAnswer",
        ErrorKind::NotHandled { .. } => "NotHandled",
        ErrorKind::TooLarge { .. } => "TooLarge",
        ErrorKind::Io { .. } => "Io",
        _ => "Other",
    };
    let source = error.source().map(|source| format!(": {source}"));
    format!("error {kind}: {error}{}", source.unwrap_or_default())
}
