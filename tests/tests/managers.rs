//! Lock managers: the cases of all of them, every case of the suite for their locks, and what is their own.

use lockkit_tests::{managers, shared_managers, suite};

managers!(shm, lockkit_tests::managers::Kind::Shm);
managers!(folder, lockkit_tests::managers::Kind::Folder);
managers!(memory, lockkit_tests::managers::Kind::Memory);
shared_managers!(shared_shm, lockkit_tests::managers::Kind::Shm);
shared_managers!(shared_folder, lockkit_tests::managers::Kind::Folder);
suite!(shm_lock, lockkit_tests::Kind::Managed(lockkit_tests::managers::Kind::Shm));
suite!(folder_lock, lockkit_tests::Kind::Managed(lockkit_tests::managers::Kind::Folder));
