//! Tables of locks under test, and the cases that every manager must pass.
//!
//! A second process, started with [`Actor::start_at`], works on a table on command:
//!
//! | command | answer |
//! |---|---|
//! | `open` | `opened`; every other command opens the table, too, if necessary |
//! | `allocate`, `allocate-at ID` | `allocated ID` |
//! | `try ID`, `lock ID` | `held`, `held recovered PID` |
//! | `release ID`, `unlock ID`, `free ID` | `ok` |
//! | `hold N` | `holds N`: the locks 0 to N - 1 |
//! | `fork-die ID` | `died PID`: a forked child acquired the lock and ended without a release |
//! | `fork-often ID OTHER` | `forked`: while threads tried ID, forked children acquired OTHER, in sequence |
//! | `churn ID ROUNDS LOG` | `churned`: acquired a lock that others free and allocate, and saw no second holder |
//! | `grab-all ROUNDS` | `grabbed`: allocated every available lock, and freed it, repeatedly |
//! | `kill-at STEP` | `armed` |
//!
//! or `error KIND: text`.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lockkit::{
    ErrorKind, FileLockManager, InMemoryLockManager, Liveness, LockManager, ManagedGuard, Owner, ShmLockManager, Wait,
};

use crate::helper_process::{announce, describe};
use crate::wine::{DELETED, is_wine, wine_cannot_judge};
use crate::{Actor, LIVELY};

/// A kind of table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// [`ShmLockManager`]
    Shm,
    /// [`FileLockManager`]
    Directory,
    /// [`InMemoryLockManager`]
    Memory,
}

/// The number of locks of a table under test, where it has a limit.
pub const CAPACITY: u32 = 128;

impl Kind {
    /// Creates a table that no other test uses.
    pub fn fresh(self) -> Table {
        let name = crate::fresh_name("lockkit-table");
        let at = match self {
            Self::Shm => format!("/dev/shm/{name}"),
            Self::Directory => std::env::temp_dir().join(name).display().to_string(),
            Self::Memory => name,
        };
        Table { kind: self, at }
    }

    fn is_limited(self) -> bool {
        self != Self::Directory
    }
}

/// One table, as text: `KIND:WHERE`.
#[derive(Clone, Debug)]
pub struct Table {
    kind: Kind,
    at: String,
}

impl Table {
    /// Returns the table of `kind` at a path, or with a name.
    pub fn at(kind: Kind, at: &str) -> Self {
        Self { kind, at: at.to_owned() }
    }

    /// Parses the output of `Display`.
    pub fn parse(text: &str) -> Self {
        let (kind, at) = text.split_once(':').expect("KIND:WHERE");
        let kind = [Kind::Shm, Kind::Directory, Kind::Memory].into_iter().find(|known| format!("{known:?}") == kind);
        Self { kind: kind.expect("a known kind"), at: at.to_owned() }
    }

    /// Returns its path.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(&self.at)
    }

    /// Returns its path or name, as text.
    pub fn name(&self) -> &str {
        &self.at
    }

    /// Opens a manager of the table. The first call creates the table.
    pub fn open(&self) -> Box<dyn LockManager> {
        self.open_with(CAPACITY)
    }

    /// Opens a manager of the table. The first call creates the table with `capacity`.
    pub fn open_with(&self, capacity: u32) -> Box<dyn LockManager> {
        self.try_open(capacity).expect("a table")
    }

    /// As [`open_with`](Self::open_with), for cases in which it may fail.
    pub fn try_open(&self, capacity: u32) -> lockkit::Result<Box<dyn LockManager>> {
        static IN_MEMORY: Mutex<Option<HashMap<String, InMemoryLockManager>>> = Mutex::new(None);
        Ok(match self.kind {
            Kind::Shm => Box::new(ShmLockManager::open_or_create(&self.at, capacity)?),
            Kind::Directory => {
                Box::new(FileLockManager::create(&self.at).or_else(|_| FileLockManager::open(&self.at))?)
            }
            Kind::Memory => {
                let mut tables = IN_MEMORY.lock().expect("no panic inside");
                let tables = tables.get_or_insert_default();
                let new = InMemoryLockManager::new(capacity)?;
                Box::new(tables.entry(self.at.clone()).or_insert(new).clone())
            }
        })
    }

    /// Removes the remaining files. The caller calls it when no process uses the table any more.
    pub fn clean(&self) {
        let _ = match self.kind {
            Kind::Shm => std::fs::remove_file(&self.at),
            Kind::Directory => std::fs::remove_dir_all(&self.at),
            Kind::Memory => Ok(()),
        };
    }

    /// Returns whether the locks have no files, for a directory. Under Wine a file that is deleted while it is open
    /// keeps its name, so the check is impossible there.
    pub fn has_no_lock_files(&self) -> bool {
        is_wine() || self.lock_files().is_empty()
    }

    /// Returns the files of the locks, for a directory.
    pub fn lock_files(&self) -> BTreeSet<String> {
        let names = std::fs::read_dir(&self.at).expect("a directory").map(|entry| entry.expect("an entry").file_name());
        names.map(|name| name.into_string().expect("text")).filter(|name| name.ends_with(".lock")).collect()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}:{}", self.kind, self.at)
    }
}

/// Acts as the second process: works on the table until there are no more commands.
pub fn serve(table: &Table) {
    let mut manager: Option<Box<dyn LockManager>> = None;
    let mut guards = HashMap::new();
    for line in crate::commands() {
        let answer = match line.split_once(' ') {
            Some(("kill-at", step)) => {
                crate::failpoint::kill_at(step.parse().expect("a number"));
                Ok("armed".to_owned())
            }
            _ => match &manager {
                Some(manager) => execute(&line, &**manager, &mut guards),
                None => {
                    table.try_open(CAPACITY).and_then(|opened| execute(&line, &**manager.insert(opened), &mut guards))
                }
            },
        };
        println!("{}", answer.unwrap_or_else(|error| describe(&error)));
    }
}

fn execute(
    line: &str,
    manager: &dyn LockManager,
    guards: &mut HashMap<u32, ManagedGuard>,
) -> Result<String, lockkit::Error> {
    let words: Vec<&str> = line.split(' ').collect();
    let number = |at: usize| words[at].parse::<u32>().expect("a number");
    let mut take = |id: u32, wait: &Wait| {
        announce();
        let guard = manager.retrieve(id)?.acquire(wait)?;
        let died = guard.recovered().map(|died| died.owner().map_or(0, Owner::pid));
        guards.insert(id, guard);
        Ok(died.map_or("held".to_owned(), |died| format!("held recovered {died}")))
    };
    match words[0] {
        "allocate" => manager.allocate().map(|lock| format!("allocated {}", lock.id())),
        "allocate-at" => manager.allocate_at(number(1)).map(|lock| format!("allocated {}", lock.id())),
        "try" => take(number(1), &Wait::none()),
        "lock" => take(number(1), &Wait::forever()),
        "release" => {
            guards.remove(&number(1)).expect("a guard").release()?;
            Ok("ok".to_owned())
        }
        "unlock" => manager.retrieve(number(1))?.unlock().map(|()| "ok".to_owned()),
        "free" => manager.retrieve(number(1))?.free().map(|()| "ok".to_owned()),
        "hold" => {
            for id in 0..number(1) {
                take(id, &Wait::none())?;
            }
            Ok(format!("holds {}", number(1)))
        }
        #[cfg(unix)]
        "fork-die" => match fork::fork().expect("a fork") {
            fork::Fork::Child => {
                // The child has a slot of its own, because the parent's slot is the parent's.
                std::mem::forget(manager.retrieve(number(1))?.try_lock()?);
                rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
                    .expect("a process can kill itself");
                unreachable!("the process has killed itself");
            }
            fork::Fork::Parent(child) => {
                let pid = rustix::process::Pid::from_raw(child);
                rustix::process::waitpid(pid, rustix::process::WaitOptions::empty()).expect("a child");
                Ok(format!("died {child}"))
            }
        },
        #[cfg(unix)]
        "fork-often" => {
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| {
                        while !stop.load(Ordering::Relaxed) {
                            drop(manager.retrieve(number(1)).and_then(|lock| lock.try_lock()));
                        }
                    });
                }
                let taken = (0..200).all(|_| match fork::fork().expect("a fork") {
                    fork::Fork::Child => {
                        // A child that hangs must not outlive the test.
                        #[cfg(target_os = "linux")]
                        let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
                        let taken = manager.retrieve(number(2)).and_then(|lock| lock.try_lock()?.release());
                        std::process::exit(taken.is_err().into());
                    }
                    fork::Fork::Parent(child) => {
                        let pid = rustix::process::Pid::from_raw(child);
                        let ended = rustix::process::waitpid(pid, rustix::process::WaitOptions::empty());
                        ended.is_ok_and(|ended| ended.is_some_and(|(_, status)| status.exit_status() == Some(0)))
                    }
                });
                stop.store(true, Ordering::Relaxed);
                Ok(if taken { "forked".to_owned() } else { "error in a child".to_owned() })
            })
        }
        "churn" => {
            let inside = Path::new(words[3]);
            for round in 0..number(2) {
                let lock = manager.retrieve(number(1))?;
                let guard = lock.lock()?;
                File::options().write(true).create_new(true).open(inside).expect("no other process holds the lock");
                // The lock excludes, whether or not it is freed.
                let _ = if round % 2 == 0 { lock.free() } else { manager.allocate_at(number(1)).map(drop) };
                std::fs::remove_file(inside).expect("it is there");
                guard.release()?;
            }
            Ok("churned".to_owned())
        }
        "grab-all" => {
            for _ in 0..number(1) {
                let grabbed: Vec<_> = std::iter::from_fn(|| manager.allocate().ok()).collect();
                grabbed.iter().try_for_each(|lock| lock.free())?;
            }
            Ok("grabbed".to_owned())
        }
        "open" => Ok("opened".to_owned()),
        _ => Ok(format!("error unknown command {line:?}")),
    }
}

/// Makes a module `$module` with a test for every case that holds for all managers.
#[macro_export]
macro_rules! managers {
    ($module:ident, $kind:expr) => {
        $crate::managers!($module, $kind;
            allocate_lock_unlock_free_each_succeed,
            allocate_until_full_gives_distinct_numbers,
            allocate_after_free_reuses_number,
            free_of_unallocated_lock_fails,
            unlock_of_unlocked_lock_fails,
            release_after_unlock_keeps_next_holder,
            allocate_at_same_number_twice_fails,
            free_all_makes_first_number_available,
            release_in_other_order_serves_waiter,
            lock_of_freed_number_still_excludes,
            held_lists_owner_and_time_without_waiting,
            allocate_by_many_threads_gives_distinct_numbers,
            panic_of_holder_thread_releases,
            freed_lock_under_contention_stays_exclusive,
        );
    };
    ($module:ident, $kind:expr; $($case:ident,)*) => {
        mod $module {
            $(#[test]
            fn $case() {
                $crate::managers::$case($kind);
            })*
        }
    };
}

#[allow(missing_docs)] // Each name states the operation, the condition and the result.
mod cases {
    use super::*;

    pub fn allocate_lock_unlock_free_each_succeed(kind: Kind) {
        let table = kind.fresh();
        let manager = table.open();
        let lock = manager.allocate().unwrap();
        let guard = lock.lock().unwrap();
        assert_eq!(guard.recovered(), None);
        assert!(lock.try_lock().unwrap_err().is_held());
        guard.release().unwrap();
        std::mem::forget(lock.lock().unwrap());
        lock.unlock().unwrap();
        lock.try_lock().unwrap().release().unwrap();
        lock.free().unwrap();
        table.clean();
    }

    pub fn allocate_until_full_gives_distinct_numbers(kind: Kind) {
        let table = kind.fresh();
        let manager = table.open();
        let ids: BTreeSet<u32> = (0..CAPACITY).map(|_| manager.allocate().unwrap().id()).collect();
        assert_eq!(ids.len(), CAPACITY as usize);
        if kind.is_limited() {
            assert_eq!(manager.available().unwrap(), Some(0));
            let error = manager.allocate().unwrap_err();
            let is_exhausted =
                matches!(error.kind(), ErrorKind::Exhausted { capacity: CAPACITY, allocated: CAPACITY, .. });
            assert!(is_exhausted, "{error}");
        } else {
            assert_eq!(manager.available().unwrap(), None);
        }
        table.clean();
    }

    pub fn allocate_after_free_reuses_number(kind: Kind) {
        let table = kind.fresh();
        let manager = table.open();
        let locks: Vec<_> = (0..CAPACITY).map(|_| manager.allocate().unwrap()).collect();
        for lock in [&locks[77], &locks[0], &locks[127]] {
            lock.free().unwrap();
            let next = manager.allocate().unwrap();
            if kind.is_limited() {
                assert_eq!(next.id(), lock.id());
            }
        }
        table.clean();
    }

    pub fn free_of_unallocated_lock_fails(kind: Kind) {
        let table = kind.fresh();
        let manager = table.open();
        let lock = manager.retrieve(7).unwrap();
        let refused = || matches!(lock.free().unwrap_err().kind(), ErrorKind::NotAllocated { .. });
        assert!(refused());
        manager.allocate_at(7).unwrap();
        lock.free().unwrap();
        assert!(refused());
        if kind.is_limited() {
            assert_eq!(manager.available().unwrap(), Some(CAPACITY));
        }
        table.clean();
    }

    pub fn unlock_of_unlocked_lock_fails(kind: Kind) {
        let table = kind.fresh();
        let lock = table.open().allocate().unwrap();
        let refused = || matches!(lock.unlock().unwrap_err().kind(), ErrorKind::NotLocked { .. });
        assert!(refused());
        std::mem::forget(lock.lock().unwrap());
        lock.unlock().unwrap();
        assert!(refused());
        table.clean();
    }

    pub fn release_after_unlock_keeps_next_holder(kind: Kind) {
        let table = kind.fresh();
        let lock = table.open().allocate().unwrap();
        let (first, second) = (lock.lock().unwrap(), {
            lock.unlock().unwrap();
            lock.lock().unwrap()
        });
        assert!(matches!(first.release().unwrap_err().kind(), ErrorKind::NotLocked { .. }));
        assert!(lock.try_lock().unwrap_err().is_held());
        second.release().unwrap();
        table.clean();
    }

    pub fn allocate_at_same_number_twice_fails(kind: Kind) {
        let table = kind.fresh();
        let manager = table.open();
        assert_eq!(manager.allocate_at(42).unwrap().id(), 42);
        let taken = |id| matches!(manager.allocate_at(id).unwrap_err().kind(), ErrorKind::AlreadyAllocated { .. });
        assert!(taken(42));
        assert!(taken(manager.allocate().unwrap().id()));
        if kind.is_limited() {
            let absent = |error: lockkit::Error| {
                matches!(error.kind(), ErrorKind::NoSuchLock { id: CAPACITY, capacity: CAPACITY, .. })
            };
            assert!(absent(manager.allocate_at(CAPACITY).unwrap_err()));
            assert!(absent(manager.retrieve(CAPACITY).unwrap_err()));
            assert!(manager.retrieve(u32::MAX).is_err());
            assert_eq!(manager.available().unwrap(), Some(CAPACITY - 2));
        }
        for id in 0..CAPACITY {
            let _ = manager.allocate_at(id);
        }
        assert!((0..CAPACITY).all(taken));
        table.clean();
    }

    pub fn free_all_makes_first_number_available(kind: Kind) {
        let table = kind.fresh();
        let manager = table.open();
        let first = manager.allocate().unwrap();
        for _ in 1..100 {
            manager.allocate().unwrap();
        }
        let held = first.lock().unwrap();
        manager.free_all().unwrap();
        assert!(first.try_lock().unwrap_err().is_held(), "locks that are held stay held");
        if kind.is_limited() {
            assert_eq!(manager.available().unwrap(), Some(CAPACITY));
        }
        assert_eq!(manager.allocate().unwrap().id(), first.id());
        held.release().unwrap();
        table.clean();
    }

    pub fn release_in_other_order_serves_waiter(kind: Kind) {
        let table = kind.fresh();
        let manager = table.open();
        let (a, b) = (manager.allocate().unwrap(), manager.allocate().unwrap());
        let (held_a, held_b) = (a.lock().unwrap(), b.lock().unwrap());
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| manager.retrieve(a.id()).unwrap().lock_for(LIVELY).unwrap().release().unwrap());
            held_b.release().unwrap();
            b.lock().unwrap().release().unwrap();
            assert!(!waiter.is_finished());
            held_a.release().unwrap();
            waiter.join().unwrap();
        });
        table.clean();
    }

    pub fn lock_of_freed_number_still_excludes(kind: Kind) {
        if kind == Kind::Directory && wine_cannot_judge(DELETED) {
            return;
        }
        let table = kind.fresh();
        let manager = table.open();
        let lock = manager.allocate().unwrap();
        let held = lock.lock().unwrap();
        lock.free().unwrap();
        assert!(manager.retrieve(lock.id()).unwrap().try_lock().unwrap_err().is_held(), "freed while held");
        held.release().unwrap();
        let held = lock.lock().unwrap();
        assert!(lock.try_lock().unwrap_err().is_held(), "locked while free");
        assert_eq!(manager.allocate_at(lock.id()).unwrap().id(), lock.id(), "locking does not allocate");
        assert!(lock.try_lock().unwrap_err().is_held(), "allocated while held");
        held.release().unwrap();
        lock.free().unwrap();
        drop(lock.lock().unwrap());
        if kind == Kind::Directory {
            assert!(table.has_no_lock_files());
        }
        table.clean();
    }

    pub fn held_lists_owner_and_time_without_waiting(kind: Kind) {
        let table = kind.fresh();
        let manager = table.open();
        assert_eq!(manager.held().unwrap(), []);
        let before = std::time::SystemTime::now() - Duration::from_secs(1);
        let guards = [3, 77].map(|id| manager.retrieve(id).unwrap().lock().unwrap());
        let held = manager.held().unwrap();
        assert_eq!(held.iter().map(|held| held.id()).collect::<Vec<_>>(), [3, 77]);
        for lock in &held {
            assert_eq!(lock.owner().pid(), std::process::id());
            assert_eq!(lock.owner().liveness(), Liveness::Alive);
            assert!(lock.owner().acquired().unwrap() >= before);
        }
        let error = manager.retrieve(77).unwrap().try_lock().unwrap_err();
        assert_eq!(error.owner().unwrap().pid(), std::process::id());
        drop(guards);
        assert_eq!(manager.held().unwrap(), []);
        table.clean();
    }

    pub fn allocate_by_many_threads_gives_distinct_numbers(kind: Kind) {
        if kind == Kind::Directory && wine_cannot_judge(DELETED) {
            return;
        }
        let table = kind.fresh();
        let manager = table.open();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        let locks: Vec<_> = (0..8).map(|_| manager.allocate().unwrap()).collect();
                        for lock in &locks {
                            drop(lock.try_lock().expect("no other thread holds it"));
                            lock.free().unwrap();
                        }
                    }
                });
            }
        });
        if kind.is_limited() {
            assert_eq!(manager.available().unwrap(), Some(CAPACITY));
        }
        table.clean();
    }

    pub fn panic_of_holder_thread_releases(kind: Kind) {
        let table = kind.fresh();
        let lock = table.open().allocate().unwrap();
        let inside = lock.clone();
        let panicked = std::thread::spawn(move || {
            let _guard = inside.lock().unwrap();
            std::panic::resume_unwind(Box::new("on purpose"));
        });
        assert!(panicked.join().is_err());
        drop(lock.try_lock().unwrap());
        table.clean();
    }

    pub fn freed_lock_under_contention_stays_exclusive(kind: Kind) {
        // Each release of a freed lock may remove its representation, such as its file.
        let (threads, rounds) = if is_wine() { (4, 10) } else { (48, 40) };
        let table = kind.fresh();
        let manager = table.open();
        let lock = manager.allocate().unwrap();
        lock.free().unwrap();
        let (inside, all) = (AtomicBool::new(false), std::sync::Barrier::new(threads));
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    all.wait();
                    for _ in 0..rounds {
                        let guard = lock.lock().unwrap();
                        assert!(!inside.swap(true, Ordering::SeqCst));
                        std::thread::yield_now();
                        inside.store(false, Ordering::SeqCst);
                        guard.release().unwrap();
                    }
                });
            }
        });
        table.clean();
    }
}
pub use cases::*;

/// Makes tests of the cases of managers that processes share.
#[macro_export]
macro_rules! shared_managers {
    ($module:ident, $kind:expr) => {
        $crate::managers!($module, $kind;
            retrieve_in_other_process_is_same_lock,
            create_with_any_umask_gives_same_modes,
            freed_lock_excludes_other_processes,
            kill_with_many_held_locks_recovers_all,
            fork_child_holds_locks_of_its_own,
            fork_at_any_moment_child_can_acquire,
            crash_at_any_step_of_allocate_keeps_table_valid,
            available_after_crash_matches_free_locks,
            free_and_allocate_while_held_keeps_exclusion,
        );
    };
}

#[allow(missing_docs)] // Each name states the operation, the condition and the result.
mod shared_cases {
    use super::*;
    use crate::conformance::processes_fork;

    pub fn retrieve_in_other_process_is_same_lock(kind: Kind) {
        let table = kind.fresh();
        let manager = table.open();
        let mut other = Actor::start_at(&table);
        let lock = manager.allocate().unwrap();
        let id = lock.id();
        let held = lock.lock().unwrap();
        assert!(other.ask(&format!("try {id}")).starts_with("error Held"));
        assert!(other.ask(&format!("unlock {id}")).starts_with("error NotLocked"), "another process holds it");
        other.tell_to_wait(&format!("lock {id}"));
        held.release().unwrap();
        assert_eq!(other.answer(), "held");
        assert_eq!(manager.held().unwrap()[0].owner().pid(), other.pid());
        assert_eq!(lock.try_lock().unwrap_err().owner().unwrap().pid(), other.pid());
        other.expect(&format!("release {id}"), "ok");
        let next = other.ask("allocate");
        assert!(next.starts_with("allocated ") && next != format!("allocated {id}"), "{next}");
        other.expect(&format!("free {id}"), "ok");
        assert!(matches!(lock.free().unwrap_err().kind(), ErrorKind::NotAllocated { .. }));
        table.clean();
    }

    #[cfg(not(unix))]
    pub fn create_with_any_umask_gives_same_modes(_: Kind) {
        crate::left_out("files have no modes on this system");
    }

    #[cfg(unix)]
    pub fn create_with_any_umask_gives_same_modes(kind: Kind) {
        use std::os::unix::fs::PermissionsExt;
        use std::process::{Command, Stdio};
        let table = kind.fresh();
        let mut other = Actor::start_at_with(&table, |command| {
            let (program, table) = (command.get_program().to_owned(), table.to_string());
            *command = Command::new("sh");
            command.args(["-c", "umask 777 && exec \"$0\" table \"$1\""]).arg(program).arg(table);
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
        });
        for command in ["allocate-at 0", "try 0"] {
            let answer = other.ask(command);
            assert!(!answer.starts_with("error"), "{answer}");
        }
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        if kind == Kind::Directory {
            assert_eq!(mode(&table.path()), 0o700);
            for file in std::fs::read_dir(table.path()).unwrap() {
                assert_eq!(mode(&file.unwrap().path()), 0o600);
            }
        } else {
            assert_eq!(mode(&table.path()), 0o600);
        }
        table.clean();
    }

    pub fn freed_lock_excludes_other_processes(kind: Kind) {
        if kind == Kind::Directory && wine_cannot_judge(DELETED) {
            return;
        }
        let table = kind.fresh();
        let manager = table.open();
        let mut other = Actor::start_at(&table);
        let lock = manager.allocate_at(5).unwrap();
        other.expect("lock 5", "held");
        lock.free().unwrap();
        assert!(lock.try_lock().unwrap_err().is_held());
        other.expect("release 5", "ok");
        let held = lock.lock().unwrap();
        assert!(other.ask("try 5").starts_with("error Held"));
        other.tell_to_wait("lock 5");
        held.release().unwrap();
        assert_eq!(other.answer(), "held");
        other.kill();
        let guard = lock.lock().unwrap();
        assert_eq!(guard.recovered().unwrap().owner().unwrap().pid(), other.pid());
        drop(guard);
        if kind == Kind::Directory {
            assert!(table.has_no_lock_files());
        }
        table.clean();
    }

    pub fn kill_with_many_held_locks_recovers_all(kind: Kind) {
        // Each lock of a directory costs a descriptor.
        let count = if kind == Kind::Shm { 4096 } else { 500 };
        // Under Wine each lock takes milliseconds.
        let count = if is_wine() { 50 } else { count };
        let table = kind.fresh();
        let manager = table.open_with(count);
        let mut holder = Actor::start_at(&table);
        holder.expect(&format!("hold {count}"), &format!("holds {count}"));
        assert_eq!(manager.held().unwrap().len(), count as usize);
        holder.kill();
        assert_eq!(manager.held().unwrap(), [], "a dead process holds no lock");
        for id in 0..count {
            let guard = manager.retrieve(id).unwrap().try_lock().unwrap();
            assert_eq!(guard.recovered().expect("recovered").owner().unwrap().pid(), holder.pid(), "{id}");
            guard.release().unwrap();
            assert_eq!(manager.retrieve(id).unwrap().try_lock().unwrap().recovered(), None);
        }
        table.clean();
    }

    pub fn fork_child_holds_locks_of_its_own(kind: Kind) {
        if !processes_fork() {
            return;
        }
        let table = kind.fresh();
        let _manager = table.open();
        let mut parent = Actor::start_at(&table);
        parent.expect("lock 1", "held");
        let died = parent.ask("fork-die 2");
        let child = died.strip_prefix("died ").expect(&died).to_owned();
        parent.expect("try 2", &format!("held recovered {child}"));
        parent.expect("release 2", "ok");
        parent.expect("release 1", "ok");
        parent.expect("try 1", "held");
        table.clean();
    }

    pub fn fork_at_any_moment_child_can_acquire(kind: Kind) {
        if !processes_fork() {
            return;
        }
        let table = kind.fresh();
        let manager = table.open();
        for held in [true, false] {
            // A process that finds a lock held checks whether its owner lives. A process that finds it free acquires
            // it.
            let _guard = held.then(|| manager.retrieve(1).unwrap().lock().unwrap());
            Actor::start_at(&table).expect("fork-often 1 2", "forked");
        }
        table.clean();
    }

    pub fn crash_at_any_step_of_allocate_keeps_table_valid(kind: Kind) {
        if kind == Kind::Directory && wine_cannot_judge("it starts hundreds of processes, each of which takes too long")
        {
            return;
        }
        if !crate::failpoint::are_enabled() {
            return;
        }
        for command in ["allocate", "allocate-at 65", "free 0"] {
            for step in 1.. {
                let table = kind.fresh();
                // One word of 64 locks, whose fullness is not recorded yet, and another word.
                let manager = table.open_with(66);
                for id in 0..64 {
                    manager.allocate_at(id).unwrap();
                }
                let mut victim = Actor::start_at(&table);
                victim.expect("open", "opened");
                victim.expect(&format!("kill-at {step}"), "armed");
                let answer = victim.ask(command);
                // A process that finds the table full counts again.
                let table_now = table.clone();
                drop(manager);
                let mut other = Actor::start_at(&table_now);
                let mut seen = BTreeSet::new();
                for _ in 0..66 {
                    let next = other.ask("allocate");
                    match next.strip_prefix("allocated ") {
                        Some(id) => assert!(seen.insert(id.to_owned()), "{id} twice"),
                        None => assert!(next.starts_with("error Exhausted"), "{next}"),
                    }
                }
                if kind.is_limited() {
                    // All free locks have been allocated: 2, less those of the victim, more those that it freed.
                    assert!((1..=3).contains(&seen.len()), "{command} killed at {step}: {seen:?}");
                    assert_eq!(table.open().available().unwrap(), Some(0), "{command} killed at {step}");
                }
                table.clean();
                if answer != "gone" {
                    assert!(step > 2, "{kind:?}: only {step} steps to {command}");
                    break;
                }
            }
        }
    }

    pub fn available_after_crash_matches_free_locks(kind: Kind) {
        if !crate::failpoint::are_enabled() {
            return;
        }
        if !kind.is_limited() {
            return;
        }
        for command in ["allocate", "free 0"] {
            for step in 1.. {
                let table = kind.fresh();
                // A process that uses the table all the time, so that the table is never initialised again.
                let mut attached = Actor::start_at(&table);
                attached.expect("allocate-at 65", "allocated 65");
                let mut victim = Actor::start_at(&table);
                victim.expect("allocate", "allocated 0");
                victim.expect(&format!("kill-at {step}"), "armed");
                let answer = victim.ask(command);
                victim.kill();
                let manager = table.open();
                let available = manager.available().unwrap();
                let free = (0..CAPACITY).filter(|id| manager.allocate_at(*id).is_ok()).count();
                assert_eq!(available, u32::try_from(free).ok(), "{command} killed at {step}");
                table.clean();
                if answer != "gone" {
                    assert!(step > 2, "{kind:?}: only {step} steps to {command}");
                    break;
                }
            }
        }
    }

    pub fn free_and_allocate_while_held_keeps_exclusion(kind: Kind) {
        if kind == Kind::Directory && wine_cannot_judge(DELETED) {
            return;
        }
        let table = kind.fresh();
        let _manager = table.open();
        let directory = tempfile::tempdir().unwrap();
        let inside = directory.path().join("inside");
        let mut workers: Vec<_> = (0..4).map(|_| Actor::start_at(&table)).collect();
        for worker in &mut workers {
            worker.tell(&format!("churn 9 300 {}", inside.display()));
        }
        for worker in &mut workers {
            assert_eq!(worker.answer(), "churned");
        }
        let _ = table.open().retrieve(9).unwrap().free();
        if kind == Kind::Directory {
            assert!(table.has_no_lock_files());
        }
        table.clean();
    }
}
pub use shared_cases::*;
