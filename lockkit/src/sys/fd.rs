//! What can be waited for and locked: descriptors here, handles on Windows, by one set of names.

#[cfg(not(target_os = "linux"))]
pub(crate) use std::os::fd::OwnedFd;
pub(crate) use std::os::fd::{AsFd, BorrowedFd};
