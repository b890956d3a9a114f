//! Leases: a lock with a time to live, a fencing token, and an honest answer to "do I still hold
//! it?".
//!
//! A lease is a record that names the holder of a key, and says how long the lease lasts after its
//! last renewal. One heartbeat thread renews all leases of a process. A holder that is stopped, cut
//! off or hung cannot renew. Such a holder loses the lease when its time is over, and **knows it**:
//! [`LeaseGuard::is_held`] uses the holder's own clock. It counts the ttl, less one part in a
//! hundred and 2 ms, from before the granted request was sent. So `is_held` turns false before
//! another process can acquire the lease, whether or not a heartbeat has run since. This holds as
//! long as no clock runs wrong by more than that margin. lockkit compares no two clocks.
//!
//! No lease can stop a holder between its call of `is_held` and its next action. No lease can
//! notice that the virtual machine of the holder was paused or put back to a snapshot, where its
//! clock stops. The [`token`](LeaseGuard::token) covers these cases: it is greater with every
//! owner. The resource that the lease guards must refuse a token lower than the highest token that
//! it has seen.
//!
//! Leases are from C. Gray and D. Cheriton, *Leases: An Efficient Fault-Tolerant Mechanism for
//! Distributed File Cache Consistency* (SOSP 1989). Why they need fencing: M. Kleppmann, [How to do
//! distributed locking] (2016).
//!
//! # Implementation
//! | module | contents |
//! |---|---|
//! | `handle`, `builder`, `guard`, `lost_signal` | the lease, its builder, its guard, and the signal of its loss |
//! | `settings`, `options` | the options as given, with their rules, and as checked |
//! | `connect`, `location`, `url` | where the record is: a file, a store, or a URL that leads to one of them |
//! | `acquisition` | the attempts of an acquisition, and the waits between them |
//! | `waiters` | the queue of the threads that wait for a lease |
//! | `shared` | a held lease as its guard, its watchers and the heartbeat share it |
//! | `spec` | a lease as its handles, guards and acquisitions share it |
//! | `heartbeat` | the heartbeat scheduler |
//! | `state` | the state of a held lease, without side effects |
//! | `store` | the interface of a lease store, and the stores |
//! | `clock` | the time |
//!
//! [How to do distributed locking]: https://martin.kleppmann.com/2016/02/08/how-to-do-distributed-locking.html

mod acquisition;
mod builder;
mod clock;
mod connect;
mod guard;
mod handle;
mod heartbeat;
mod location;
mod lost_signal;
mod options;
mod settings;
mod shared;
mod spec;
mod state;
mod store;
#[cfg(test)]
mod tests;
mod url;
mod waiters;

pub use crate::base::error::{LossReason, StoreError};
pub use builder::LeaseBuilder;
pub use clock::{Clock, ManualClock, SystemClock};
pub use guard::LeaseGuard;
pub use handle::{Lease, LeaseStatus};
pub use lost_signal::LostSignal;
pub use options::Loss;
pub use store::lease_store::{
    Attempt, ClaimId, Deadline, Durability, Grant, LeaseName, LeaseSnapshot, LeaseStore, Released,
    Renewal, StoreProfile,
};
