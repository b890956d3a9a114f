//! Tests of the lease with its stores, within one process.

mod faults;
mod faulty_store;
mod file;
pub(super) mod fixtures;
mod holding;
mod waiting;
