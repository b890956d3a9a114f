//! Replaces the table in shared memory on systems without futexes: a manager that cannot be
//! created.

pub(in crate::manager) mod lock;
pub(in crate::manager) mod manager;
