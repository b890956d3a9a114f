//! PidFile: every case of the suite, and what is its own.

use lockkit_tests::suite;

suite!(pidfile, lockkit_tests::Kind::PidFile);
