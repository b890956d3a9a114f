//! NamedLock: every case of the suite on each backend, and what is its own.

use lockkit_tests::suite;

suite!(socket, lockkit_tests::Kind::NamedSocket);
suite!(machine, lockkit_tests::Kind::MachineSocket);
suite!(file, lockkit_tests::Kind::NamedFile);
