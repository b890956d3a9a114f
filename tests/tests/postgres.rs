//! Leases on PostgreSQL: every case of the suite, every drill of the engines, and what is its own.

use lockkit_tests::suite;

suite!(postgres, lockkit_tests::Kind::POSTGRES);
