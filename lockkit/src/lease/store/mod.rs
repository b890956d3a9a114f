//! Lease stores: the interface, and the stores of this crate.
//!
//! | module | contents |
//! |---|---|
//! | [`lease_store`] | the interface between a lease and its store |
//! | [`types`] | the values that they exchange |
//! | [`mod@file`] | the store in a file |
//! | `server` | what the stores on servers share |
//! | `etcd`, `postgres`, `redis` | the stores on servers, behind features of their names |

#[cfg(feature = "etcd")]
pub(super) mod etcd;
pub(super) mod file;
pub(super) mod lease_store;
#[cfg(feature = "postgres")]
#[allow(
    clippy::incompatible_msrv,
    reason = "its client needs a younger compiler than the rest of lockkit"
)]
pub(super) mod postgres;
#[cfg(feature = "redis")]
pub(super) mod redis;
#[cfg(any(feature = "etcd", feature = "postgres", feature = "redis"))]
pub(super) mod server;
pub(super) mod types;
