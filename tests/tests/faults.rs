//! Every case of faults, for every kind of lock that processes share.

use lockkit_tests::faults;

faults!(named_socket, lockkit_tests::Kind::NamedSocket);
faults!(machine_socket, lockkit_tests::Kind::MachineSocket);
faults!(named_file, lockkit_tests::Kind::NamedFile);
faults!(machine_file, lockkit_tests::Kind::MachineFile);
faults!(file, lockkit_tests::Kind::File);
faults!(pidfile, lockkit_tests::Kind::PidFile);
faults!(lease, lockkit_tests::Kind::Lease);
faults!(shm_lock, lockkit_tests::Kind::Managed(lockkit_tests::managers::Kind::Shm));
faults!(folder_lock, lockkit_tests::Kind::Managed(lockkit_tests::managers::Kind::Folder));
