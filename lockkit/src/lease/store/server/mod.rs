//! Lease stores on existing servers, and what they share.
//!
//! Each engine is a [`LeaseStore`](crate::lease::LeaseStore) in its own module, and contains only
//! its requests. All leases of a process on one server share a store (see
//! [`connect`](crate::lease::connect)), and with it:
//! - **Connections** ([`Pool`]): each request uses a connection of its own, so no request waits for
//!   the answer to another. A failed connection is closed together with all idle connections,
//!   because a restarted server has forgotten those as well.
//! - **Waiters** ([`notify`]): one thread listens to the server for all waiters, and notifies those
//!   that a change concerns.
//! - **A forked child** opens its own connections, and does not touch its parent's: see
//!   [`ProcessLocal`](crate::sys::process_local::ProcessLocal).
//! - **Requests that were sent more than once** ([`Outcome`]): if an attempt got no answer, the
//!   request may have taken effect, whatever the later attempts return.
//! - **Dead holders** ([`acquire_or_take_over`]): a holder of this boot of this host is taken over
//!   at once if its identity proves it dead. All other holders expire by the server's rule.

mod notify;
mod outcome;
mod pool;
mod record_text;
mod resolve;

pub(super) use notify::{Listener, Subscriptions};
#[cfg(any(feature = "postgres", feature = "redis"))]
pub(super) use outcome::EndState;
pub(super) use outcome::{
    Outcome, Result, acquire_or_take_over, expire_if_dead, release_not_found,
};
pub(super) use pool::Pool;
#[cfg(feature = "postgres")]
pub(super) use pool::Semaphore;
pub(super) use record_text::{
    format_current_owner, format_recovered_owner, parse_claim, parse_owner,
};
#[cfg(feature = "etcd")]
pub(super) use record_text::{format_owner, is_this_process};
pub(super) use resolve::{addresses, connect_error, equal_part};
