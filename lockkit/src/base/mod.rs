//! What all kinds of locks share: errors, owners, waiting, events, and the directories of lockkit's
//! own files.
//!
//! | module | contents |
//! |---|---|
//! | [`error`] | the error type of the crate, and the errors of leases that it contains |
//! | [`owner`], [`owner_text`] | the identity of a process, and its form as one line of text |
//! | [`guard`], [`lock`] | the traits of guards and locks |
//! | [`lock_info`] | a lock as error messages and events describe it |
//! | [`wait`], [`cancel`] | how long to wait for a lock, and how to stop early |
//! | `blocking` | waiting in tasks |
//! | [`telemetry`] | events for subscribers of tracing |
//! | [`name`] | the rule of lock names |
//! | [`runtime_dir`] | the checked directories of lockkit's own files |
//! | [`holder_record`] | a record that reports the death of a holder |

#[cfg(feature = "tokio")]
pub(crate) mod blocking;
pub(crate) mod cancel;
pub(crate) mod error;
pub(crate) mod guard;
pub(crate) mod holder_record;
pub(crate) mod lock;
pub(crate) mod lock_info;
pub(crate) mod name;
pub(crate) mod owner;
pub(crate) mod owner_text;
pub(crate) mod runtime_dir;
pub(crate) mod telemetry;
pub(crate) mod wait;
