//! Leases on etcd: every case of the suite, every drill of the engines, and what is its own.

use lockkit_tests::{drills, suite};

suite!(etcd, lockkit_tests::Kind::ETCD);
drills!(etcd_drills, lockkit_tests::engines::etcd::Etcd);
