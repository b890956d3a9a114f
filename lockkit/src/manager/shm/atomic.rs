//! The atomics of the algorithms here: the standard ones, or those of [loom], which explores every
//! order of events.
//!
//! [loom]: https://docs.rs/loom

#[cfg(all(loom, test))]
pub(super) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};
#[cfg(not(all(loom, test)))]
pub(super) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
