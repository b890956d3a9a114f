//! Leases on etcd: every case of the suite, and what is its own.

use lockkit_tests::suite;

suite!(etcd, lockkit_tests::Kind::ETCD);
