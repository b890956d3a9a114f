//! Single-instance programs, whose further starts send their arguments to the running instance.
//!
//! [`Instance::enter`] makes a process the first instance of a name, or a second one. A second
//! instance hands its arguments, working directory, chosen variables and any bytes over to the
//! first, and gets an answer. [`FirstInstance`] describes what the first instance can do with them,
//! [`SecondInstance`] what a second one sends.
//!
//! A [`NamedLock`](crate::NamedLock) of that name decides which process is the first; a second
//! socket only carries messages. So two processes are never both the first. A first instance that
//! hangs stays the first, and delays the others by no more than their limit. When it ends, however
//! it ends, one of the instances that wait for its answer becomes the first. No activation is lost:
//! it is answered, or its sender gets an error, or its sender becomes the first.
//!
//! Only processes of the same effective user meet, in one network namespace. In a user namespace
//! that does not map all users, the overflow uid of the unmapped users does not identify a user.
//! Linux only.
//!
//! [`single_instance`](crate::single_instance) with `on_second` does all of this around `main`.
//! This module contains what the attribute calls, too; programs need only the documented items.
//!
//! # Implementation
//! `endpoint` is the socket at which the first instance listens, and `protocol` has the messages.
//! `server` receives from many connections at once, and no connection delays the others.

#[cfg(target_os = "linux")]
mod activation;
mod attribute;
#[cfg(target_os = "linux")]
mod endpoint;
#[cfg(target_os = "linux")]
mod enter;
#[cfg(target_os = "linux")]
mod first;
#[cfg(target_os = "linux")]
mod protocol;
#[cfg(target_os = "linux")]
mod second;
#[cfg(target_os = "linux")]
mod server;

#[cfg(target_os = "linux")]
pub use activation::Activation;
pub use attribute::*;
#[cfg(target_os = "linux")]
pub use enter::Instance;
#[cfg(all(target_os = "linux", feature = "tokio"))]
pub use first::ActivationStream;
#[cfg(target_os = "linux")]
pub use first::{Activations, FirstInstance};
#[cfg(target_os = "linux")]
pub use protocol::MOST_BYTES;
#[cfg(target_os = "linux")]
pub use second::{Outcome, SecondInstance};
