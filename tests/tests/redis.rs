//! Leases on Redis: every case of the suite, every drill, and what is its own.

use lockkit_tests::{drills, suite};

suite!(redis_lease, lockkit_tests::Kind::REDIS);
drills!(redis_drills, lockkit_tests::engines::redis::Redis);
