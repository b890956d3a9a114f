//! The checked directories of lockkit's own files. They are at fixed places, whatever the environment says.

#[cfg(unix)]
mod unix;
#[cfg(windows)]
mod windows;

pub(crate) use crate::sys::sharing::Sharing;
#[cfg(unix)]
pub(crate) use unix::*;
#[cfg(windows)]
pub(crate) use windows::*;

/// The prefix of the names of the machine's files.
const MACHINE: &str = "lockkit-machine-";
