//! Lock managers: the cases of all managers, every case of the suite for their locks, and cases of
//! their own.

use lockkit_tests::{conformance, managers, shared_managers};

#[cfg(target_os = "linux")]
managers!(shm, lockkit_tests::managers::Kind::Shm);
managers!(directory, lockkit_tests::managers::Kind::Directory);
managers!(memory, lockkit_tests::managers::Kind::Memory);
#[cfg(target_os = "linux")]
shared_managers!(shared_shm, lockkit_tests::managers::Kind::Shm);
shared_managers!(shared_directory, lockkit_tests::managers::Kind::Directory);
#[cfg(target_os = "linux")]
conformance!(shm_lock, lockkit_tests::Kind::SHM);
conformance!(directory_lock, lockkit_tests::Kind::DIRECTORY);

/// This kind excludes threads only, so it has the cases of the suite that need no second process.
mod in_memory_lock {
    const KIND: lockkit_tests::Kind = lockkit_tests::Kind::MEMORY;

    #[test]
    fn conformance_cases_within_one_process_pass() {
        use lockkit_tests::conformance::*;
        acquire_after_release_succeeds_for_every_wait(KIND);
        acquire_held_in_same_process_refused_until_release(KIND);
        cancel_during_wait_ends_wait_at_once(KIND);
        acquire_free_lock_with_cancelled_token_is_cancelled(KIND);
        acquire_of_second_lock_is_independent(KIND);
        guard_drop_on_other_thread_releases(KIND);
    }

    #[test]
    fn new_with_capacity_zero_fails() {
        assert!(lockkit::InMemoryLockManager::new(0).is_err());
    }
}

mod in_a_directory {
    use lockkit::{ErrorKind, FileLockManager, LockManager};
    use lockkit_tests::Actor;
    use lockkit_tests::managers::{Kind, Table};

    #[test]
    fn open_directory_without_table_fails_and_keeps_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let refused = || {
            let error = FileLockManager::open(directory.path()).unwrap_err();
            assert!(
                matches!(error.kind(), ErrorKind::LayoutMismatch { .. }),
                "{error}"
            );
        };
        std::fs::write(path("17.lock"), "").unwrap();
        refused();
        assert!(!path("next").exists());
        for content in ["", "notes", "lockkitF\0\0\0\x02\0\0\0\0"] {
            std::fs::write(path("next"), content).unwrap();
            refused();
            assert_eq!(std::fs::read_to_string(path("next")).unwrap(), content);
        }
        std::fs::remove_file(path("17.lock")).unwrap();
        refused();
        std::fs::remove_file(path("next")).unwrap();
        // A killed `create` leaves an empty file.
        let first = FileLockManager::open(directory.path()).unwrap();
        assert_eq!(first.allocate().unwrap().id(), 0);
        assert_eq!(
            FileLockManager::open(directory.path())
                .unwrap()
                .allocate()
                .unwrap()
                .id(),
            1
        );
        assert!(FileLockManager::open(path("next")).is_err());
        assert!(FileLockManager::open(path("absent")).is_err());
        assert!(FileLockManager::create(directory.path()).is_err());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn open_directory_writable_by_others_fails() {
        use std::os::unix::fs::PermissionsExt;

        use lockkit_tests::another_user;

        let directory = tempfile::tempdir().unwrap();
        for mode in [0o777, 0o770, 0o1777] {
            std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(mode))
                .unwrap();
            let error = FileLockManager::open(directory.path()).unwrap_err();
            assert!(
                matches!(error.kind(), ErrorKind::Insecure { .. }),
                "{error}"
            );
        }
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        if let Some(other) = another_user() {
            std::os::unix::fs::chown(directory.path(), Some(other.uid), None).unwrap();
            let error = FileLockManager::open(directory.path()).unwrap_err();
            assert!(
                matches!(error.kind(), ErrorKind::ForeignOwner { .. }),
                "{error}"
            );
        }
    }

    #[test]
    fn free_of_dead_owners_lock_leaves_no_file() {
        let table = Kind::Directory.fresh();
        let manager = table.open();
        for all in [false, true] {
            let id = manager.allocate().unwrap().id();
            let mut holder = Actor::start_at(&table);
            holder.expect(&format!("lock {id}"), "held");
            holder.kill();
            if all {
                manager.free_all()
            } else {
                manager.retrieve(id).unwrap().free()
            }
            .unwrap();
            assert!(table.has_no_lock_files());
        }
        table.clean();
    }

    #[test]
    fn crash_creating_directory_table_leaves_it_usable() {
        if !lockkit_tests::failpoint::are_enabled() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        for step in 1.. {
            let table = Table::at(
                Kind::Directory,
                directory.path().join(step.to_string()).to_str().unwrap(),
            );
            let mut victim = Actor::start_at(&table);
            victim.expect(&format!("kill-at {step}"), "armed");
            let answer = victim.ask("open");
            Actor::start_at(&table).expect("allocate", "allocated 0");
            if answer != "gone" {
                assert!(step > 2, "only {step} steps");
                return;
            }
        }
    }
}

#[cfg(target_os = "linux")]
mod shared_memory {
    use std::collections::BTreeSet;
    use std::io::ErrorKind as Io;
    use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
    use std::path::Path;

    use lockkit::{ErrorKind, LockManager, ShmLockManager};
    use lockkit_tests::managers::{Kind, Table};
    use lockkit_tests::small_disk::SmallDisk;
    use lockkit_tests::{Actor, until};

    fn io_kind(error: &lockkit::Error) -> Option<Io> {
        match error.kind() {
            ErrorKind::Io { source, .. } => Some(source.kind()),
            _ => None,
        }
    }

    #[test]
    fn a12_table_on_a_memfd_cannot_be_truncated() {
        use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
        use std::os::fd::AsRawFd;
        let table = Kind::Shm.fresh();
        ShmLockManager::create(table.path(), 100).unwrap();
        let bytes = std::fs::read(table.path()).unwrap();
        for flags in [MemfdFlags::ALLOW_SEALING, MemfdFlags::empty()] {
            let file = std::fs::File::from(
                memfd_create("lockkit-test", flags | MemfdFlags::CLOEXEC).unwrap(),
            );
            file.write_all_at(&bytes, 0).unwrap();
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            let manager = ShmLockManager::open(&path).unwrap();
            let guard = manager.allocate().unwrap().lock().unwrap();
            // On a file that allows no seals these truncations would succeed, and this process
            // would not survive them.
            if flags == MemfdFlags::ALLOW_SEALING {
                for length in [0, bytes.len() as u64 - 1] {
                    assert_eq!(ftruncate(&file, length), Err(rustix::io::Errno::PERM));
                }
            }
            assert_eq!(
                ShmLockManager::open(&path).unwrap().held().unwrap().len(),
                1
            );
            guard.release().unwrap();
        }
        table.clean();
    }

    #[test]
    fn create_existing_path_fails_and_open_missing_path_fails() {
        let table = Kind::Shm.fresh();
        assert_eq!(
            io_kind(&ShmLockManager::open(table.path()).unwrap_err()),
            Some(Io::NotFound)
        );
        let manager = ShmLockManager::create(table.path(), 10).unwrap();
        assert_eq!(manager.path(), table.path());
        assert_eq!(
            io_kind(&ShmLockManager::create(table.path(), 10).unwrap_err()),
            Some(Io::AlreadyExists)
        );
        assert_eq!(
            std::fs::metadata(table.path())
                .unwrap()
                .permissions()
                .mode()
                & 0o7777,
            0o600
        );
        table.clean();
    }

    #[test]
    fn create_with_invalid_capacity_fails() {
        let table = Kind::Shm.fresh();
        for capacity in [0, (1 << 24) + 1, u32::MAX] {
            let error = ShmLockManager::create(table.path(), capacity).unwrap_err();
            assert!(
                matches!(error.kind(), ErrorKind::InvalidCapacity { .. }),
                "{error}"
            );
            assert!(!table.path().exists());
        }
    }

    #[test]
    fn open_returns_capacity_of_creator() {
        let table = Kind::Shm.fresh();
        table.open_with(10);
        assert_eq!(
            ShmLockManager::open_or_create(table.path(), 500)
                .unwrap()
                .capacity(),
            10
        );
        let mut other = Actor::start_at(&table);
        assert!(other.ask("allocate-at 10").starts_with("error NoSuchLock"));
        other.expect("allocate-at 9", "allocated 9");
        table.clean();
    }

    #[test]
    fn concurrent_open_or_create_makes_one_table() {
        for round in 0..60 {
            let table = if round % 2 == 0 {
                Kind::Shm
            } else {
                Kind::Directory
            }
            .fresh();
            let mut racers: Vec<_> = (0..8).map(|_| Actor::start_at(&table)).collect();
            for racer in &mut racers {
                racer.tell("allocate");
            }
            let ids: BTreeSet<String> = racers.iter_mut().map(|racer| racer.answer()).collect();
            assert_eq!(ids.len(), 8, "{ids:?}");
            assert!(
                ids.iter().all(|answer| answer.starts_with("allocated ")),
                "{ids:?}"
            );
            table.clean();
        }
    }

    /// Opens `path` in another process, which has never opened it, and returns the result.
    fn opened_elsewhere(path: &Path) -> String {
        let mut other = Actor::start_at(&Table::at(Kind::Shm, path.to_str().unwrap()));
        other.ask("open")
    }

    #[test]
    fn open_table_with_wrong_size_or_header_is_refused() {
        let table = Kind::Shm.fresh();
        assert_eq!(opened_elsewhere(&table.path()), "opened");
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(table.path())
            .unwrap();
        let size = file.metadata().unwrap().len();
        let mut header = [0; 20];
        file.read_exact_at(&mut header, 0).unwrap();
        let refused = |what: &str| {
            let answer = opened_elsewhere(&table.path());
            assert!(
                answer.starts_with("error LayoutMismatch"),
                "{what}: {answer}"
            );
        };
        for length in [0, 7, 4096, size / 2, size - 1, size + 4096] {
            file.set_len(length).unwrap();
            refused(&format!("{length} bytes"));
            file.set_len(size).unwrap();
            file.write_all_at(&header, 0).unwrap();
        }
        assert_eq!(opened_elsewhere(&table.path()), "opened");
        for at in 0..header.len() {
            file.write_all_at(&[header[at] ^ 0x40], at as u64).unwrap();
            refused(&format!("byte {at}"));
            file.write_all_at(&header, 0).unwrap();
        }
        table.clean();
        std::fs::create_dir(table.path()).unwrap();
        assert!(opened_elsewhere(&table.path()).starts_with("error LayoutMismatch"));
        std::fs::remove_dir(table.path()).unwrap();
    }

    #[test]
    fn open_symlink_fails() {
        let (table, link) = (Kind::Shm.fresh(), Kind::Shm.fresh());
        table.open();
        std::os::unix::fs::symlink(table.path(), link.path()).unwrap();
        assert!(ShmLockManager::open(link.path()).is_err());
        table.clean();
        link.clean();
    }

    #[test]
    fn table_of_a_million_unused_locks_is_sparse() {
        let table = Kind::Shm.fresh();
        let manager = table.open_with(1_000_000);
        let used = || std::fs::metadata(table.path()).unwrap().blocks() * 512;
        assert!(used() < 1 << 20, "{}", used());
        assert_eq!(manager.available().unwrap(), Some(1_000_000));
        for id in [0, 500_000, 999_999] {
            drop(manager.allocate_at(id).unwrap().lock().unwrap());
        }
        assert_eq!(manager.held().unwrap(), []);
        assert!(used() < 1 << 20, "{}", used());
        table.clean();
    }

    #[test]
    fn full_file_system_fails_allocate_and_kills_no_process() {
        let Some(disk) = SmallDisk::mount("size=1m") else {
            return;
        };
        let table = Table::at(Kind::Shm, disk.path().join("table").to_str().unwrap());
        let manager = table.open_with(1_000_000);
        let mut other = Actor::start_at(&table);
        other.expect("try 0", "held");
        let filler = std::fs::File::create(disk.path().join("filler")).unwrap();
        let full = (0..).find(|page| filler.write_all_at(&[1; 4096], page * 4096).is_err());
        assert!(full.is_some_and(|pages| pages > 0));
        let error = manager.retrieve(999_999).unwrap_err();
        assert_eq!(io_kind(&error), Some(Io::StorageFull), "{error}");
        let error = manager.allocate_at(500_000).unwrap_err();
        assert_eq!(io_kind(&error), Some(Io::StorageFull), "{error}");
        assert_eq!(manager.available().unwrap(), Some(1_000_000));
        // A lock that has its file already continues to work.
        assert!(
            manager
                .retrieve(0)
                .unwrap()
                .try_lock()
                .unwrap_err()
                .is_held()
        );
        other.expect("release 0", "ok");
        drop(manager.retrieve(63).unwrap().lock().unwrap());
        filler.set_len(0).unwrap();
        manager
            .allocate_at(500_000)
            .unwrap()
            .lock()
            .unwrap()
            .release()
            .unwrap();
        drop((other, filler));
    }

    #[test]
    fn count_is_exact_after_contention_for_last_locks() {
        let table = Kind::Shm.fresh();
        let manager = table.open_with(8);
        for _ in 0..20 {
            let mut rivals: Vec<_> = (0..4).map(|_| Actor::start_at(&table)).collect();
            for rival in &mut rivals {
                rival.tell("grab-all 300");
            }
            for rival in &mut rivals {
                assert_eq!(rival.answer(), "grabbed");
            }
            assert_eq!(manager.available().unwrap(), Some(8));
        }
        table.clean();
    }

    #[test]
    fn crash_creating_shm_table_leaves_no_partial_file() {
        if !lockkit_tests::failpoint::are_enabled() {
            return;
        }
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        for step in 1.. {
            let path = directory.path().join(format!("table-{step}"));
            let mut victim = Actor::start_at(&Table::at(Kind::Shm, path.to_str().unwrap()));
            victim.expect(&format!("kill-at {step}"), "armed");
            let answer = victim.ask("open");
            if path.exists() {
                assert_eq!(opened_elsewhere(&path), "opened");
                std::fs::remove_file(&path).unwrap();
            }
            assert_eq!(
                std::fs::read_dir(directory.path()).unwrap().count(),
                0,
                "litter after step {step}"
            );
            if answer != "gone" {
                assert!(step > 5, "only {step} steps");
                return;
            }
        }
    }

    #[test]
    fn open_beyond_last_slot_fails_until_slot_is_free() {
        let table = Kind::Shm.fresh();
        ShmLockManager::create(table.path(), 10).unwrap();
        // This locks the other slots, as 4094 processes would.
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(table.path())
            .unwrap();
        let everybody = nix::libc::flock {
            l_type: nix::libc::F_WRLCK as i16,
            l_whence: nix::libc::SEEK_SET as i16,
            l_start: 4096 + 2 * 128,
            l_len: 4092 * 128,
            l_pid: 0,
        };
        nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&everybody)).unwrap();
        // This process has one of the first two slots; one is left.
        let mut last = Actor::start_at(&table);
        last.expect("open", "opened");
        assert!(opened_elsewhere(&table.path()).starts_with("error TooManyProcesses"));
        last.kill();
        assert_eq!(opened_elsewhere(&table.path()), "opened");
        table.clean();
    }

    #[test]
    fn crash_at_generation_wrap_keeps_dead_holder_detectable() {
        if !lockkit_tests::failpoint::are_enabled() {
            return;
        }
        let [first_slot, slot_size, next_slot] = [4096, 128, 192];
        for step in 1.. {
            let table = Kind::Shm.fresh();
            assert_eq!(opened_elsewhere(&table.path()), "opened");
            let file = std::fs::File::options()
                .read(true)
                .write(true)
                .open(table.path())
                .unwrap();
            let write =
                |number: u32, at: u64| file.write_all_at(&number.to_ne_bytes(), at).unwrap();
            // Slot 7 is at its last generation, and its first one still holds a lock of a process
            // that died long ago.
            let cells = file.metadata().unwrap().len() - 2 * 4096;
            Actor::start_at(&table).expect("try 0", "held");
            write((1 << 17) - 1, first_slot + 7 * slot_size);
            write(1 << 12 | 8, cells);
            write(7, next_slot);
            let mut victim = Actor::start_at(&table);
            victim.expect(&format!("kill-at {step}"), "armed");
            let answer = victim.ask("open");
            victim.kill();
            write(7, next_slot);
            assert_eq!(
                Actor::start_at(&table).ask("try 0"),
                "held recovered 0",
                "killed at step {step}"
            );
            table.clean();
            if answer != "gone" {
                assert!(step > 3, "only {step} steps");
                return;
            }
        }
    }

    #[test]
    fn repeated_open_attaches_once() {
        let table = Kind::Shm.fresh();
        let first = ShmLockManager::create(table.path(), 10).unwrap();
        let descriptors = || {
            std::fs::read_dir("/proc/self/fd")
                .unwrap()
                .filter(|fd| {
                    let to = std::fs::read_link(fd.as_ref().unwrap().path()).unwrap_or_default();
                    to == table.path()
                })
                .count()
        };
        assert_eq!(descriptors(), 1);
        let lock = first.allocate().unwrap();
        let guard = lock.lock().unwrap();
        let again = ShmLockManager::open(table.path()).unwrap();
        assert!(
            again
                .retrieve(lock.id())
                .unwrap()
                .try_lock()
                .unwrap_err()
                .is_held()
        );
        assert_eq!(descriptors(), 1);
        drop(guard);
        table.clean();
    }

    #[test]
    fn waiter_acquires_soon_after_holder_death() {
        let table = Kind::Shm.fresh();
        let manager = table.open();
        for _ in 0..20 {
            let (mut holder, mut waiter) = (Actor::start_at(&table), Actor::start_at(&table));
            holder.expect("lock 3", "held");
            waiter.tell_to_wait("lock 3");
            holder.kill();
            until("the waiter holds it", || {
                manager
                    .held()
                    .unwrap()
                    .iter()
                    .any(|held| held.owner().pid() == waiter.pid())
            });
            assert_eq!(waiter.answer(), format!("held recovered {}", holder.pid()));
            waiter.expect("release 3", "ok");
        }
        table.clean();
    }
}
