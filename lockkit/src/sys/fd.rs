//! The objects that can be waited for and locked, under common names: descriptors here, handles on Windows.

#[cfg(not(target_os = "linux"))]
pub(crate) use std::os::fd::OwnedFd;
pub(crate) use std::os::fd::{AsFd, BorrowedFd};
