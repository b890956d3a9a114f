//! The engines of leases under test.

pub mod postgres;
