//! The objects that can be waited for and locked, under common names: descriptors here, handles on
//! Windows.

pub(crate) use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
