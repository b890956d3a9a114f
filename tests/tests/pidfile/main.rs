//! PidFile: every case of the suite, and cases of its own.

mod holder;
mod other_programs;
mod permissions;
mod support;
mod takeover;

lockkit_tests::conformance!(pidfile, lockkit_tests::Kind::PIDFILE);
