//! Every case of faults, for every kind of lock that processes share.

use lockkit_tests::faults;

faults!(named_socket, lockkit_tests::Kind::NAMED_SOCKET);
faults!(machine_socket, lockkit_tests::Kind::MACHINE_SOCKET);
faults!(named_file, lockkit_tests::Kind::NAMED_FILE);
faults!(machine_file, lockkit_tests::Kind::MACHINE_FILE);
faults!(file, lockkit_tests::Kind::FILE);
faults!(file_shared, lockkit_tests::Kind::FILE_SHARED);
faults!(pidfile, lockkit_tests::Kind::PIDFILE);
faults!(lease, lockkit_tests::Kind::LEASE);
faults!(shm_lock, lockkit_tests::Kind::SHM);
faults!(folder_lock, lockkit_tests::Kind::FOLDER);
