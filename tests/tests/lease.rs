//! Lease: every case of the suite, and what is its own.

use lockkit_tests::suite;

suite!(file_lease, lockkit_tests::Kind::Lease);
