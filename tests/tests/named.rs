//! NamedLock: every case of the suite on each backend, and cases of its own.

use std::env::consts::EXE_SUFFIX;
#[cfg(target_os = "linux")]
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
#[cfg(target_os = "linux")]
use std::process::{Command, Stdio};
#[cfg(target_os = "linux")]
use std::time::Duration;

use lockkit::{Backend, ErrorKind, NamedLock, Scope, Wait};
use lockkit_tests::helper_process::Actor;
use lockkit_tests::{Belongings, Kind, Spec, conformance, fresh_name, until};
#[cfg(target_os = "linux")]
use lockkit_tests::{another_user, hostile, namespaces::UserNamespace};

#[cfg(target_os = "linux")]
conformance!(socket, lockkit_tests::Kind::NAMED_SOCKET);
#[cfg(target_os = "linux")]
conformance!(machine, lockkit_tests::Kind::MACHINE_SOCKET);
#[cfg(windows)]
conformance!(mutex, lockkit_tests::Kind::NAMED_MUTEX);
#[cfg(windows)]
conformance!(machine, lockkit_tests::Kind::MACHINE_MUTEX);
conformance!(file, lockkit_tests::Kind::NAMED_FILE);
#[cfg(not(target_os = "linux"))]
conformance!(machine_file, lockkit_tests::Kind::MACHINE_FILE);

/// The kinds for one user, and for the whole machine.
const OWN: [Kind; 2] = [Kind::NAMED, Kind::NAMED_FILE];
#[cfg(target_os = "linux")]
const MACHINE: [Kind; 2] = [Kind::MACHINE_SOCKET, Kind::MACHINE_FILE];

/// The backend of the first of [`OWN`].
const NATIVE: Backend = match () {
    _ if cfg!(target_os = "linux") => Backend::Socket,
    _ if cfg!(windows) => Backend::Mutex,
    _ => Backend::File,
};

/// Returns the abstract name of a lock of the user `uid`.
#[cfg(target_os = "linux")]
fn abstract_name(uid: u32, name: &str) -> String {
    format!("lockkit/u{uid}/{name}")
}

#[cfg(target_os = "linux")]
fn my_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

#[test]
fn new_with_invalid_name_fails_with_its_rule() {
    for (name, rule) in [
        ("", "empty"),
        ("42", "letter"),
        ("9lives", "letter"),
        ("a b", "space"),
        ("a\0b", "NUL"),
        ("a/b", "slash"),
        (&*"x".repeat(81), "80 bytes"),
    ] {
        let error = NamedLock::new(name).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::InvalidName { .. }));
        assert!(error.to_string().contains(rule), "{error}");
    }
    NamedLock::new("a").unwrap();
    NamedLock::new("test-42").unwrap();
}

#[test]
fn longest_name_works_on_every_backend() {
    let backends = [NATIVE, Backend::File];
    for (scope, backend) in [Scope::User, Scope::Machine]
        .into_iter()
        .flat_map(|scope| backends.map(|b| (scope, b)))
    {
        let name = format!("{:x<80}", fresh_name("lockkit-test"));
        let lock = NamedLock::builder(&name)
            .scope(scope)
            .backend(backend)
            .build()
            .unwrap();
        let guard = lock.lock().unwrap();
        assert!(lock.try_lock().unwrap_err().is_held());
        drop(guard);
        for kind in [
            Kind::NAMED_SOCKET,
            Kind::NAMED_FILE,
            Kind::MACHINE_SOCKET,
            Kind::MACHINE_FILE,
        ]
        .map(|kind| kind.name())
        {
            Spec::parse(&format!("{kind}:{name}")).clean();
        }
    }
}

#[test]
fn owner_is_known_while_held_and_named_in_error() {
    for kind in OWN {
        let spec = kind.fresh();
        let [mut holder, mut other] = [(); 2].map(|()| Actor::start(&spec));
        other.expect("owner", "owner none");
        holder.expect("lock", "held");
        other.expect("owner", &format!("owner {}", holder.pid()));
        let held = other.ask("try");
        assert!(
            held.contains(&format!(
                "is held by pid {} (actor{EXE_SUFFIX}), since ",
                holder.pid()
            )),
            "{held}"
        );
        let timeout = other.ask("lock-for 1");
        assert!(
            timeout.contains(&format!("by pid {} (actor{EXE_SUFFIX})", holder.pid())),
            "{timeout}"
        );
        other.tell_to_wait("lock");
        holder.expect("release", "released");
        assert_eq!(other.answer(), "held");
        holder.expect("owner", &format!("owner {}", other.pid()));
        other.expect("release", "released");
        holder.expect("owner", "owner none");
        spec.clean();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn waiters_are_served_in_order_of_arrival() {
    let spec = Kind::NAMED_SOCKET.fresh();
    let mut holder = Actor::start(&spec);
    holder.expect("lock", "held");
    let mut waiters: Vec<Actor> = (0..8).map(|_| Actor::start(&spec)).collect();
    for waiter in &mut waiters {
        waiter.tell_to_wait("lock");
    }
    for waiter in &mut waiters {
        holder.expect("release", "released");
        assert_eq!(waiter.answer(), "held");
        std::mem::swap(&mut holder, waiter);
    }
    spec.clean();
}

#[test]
fn list_reports_held_names_with_waiters() {
    for (kind, backend) in OWN.into_iter().zip([NATIVE, Backend::File]) {
        let spec = kind.fresh();
        let listed = || {
            NamedLock::list(Scope::User)
                .unwrap()
                .into_iter()
                .find(|found| found.name() == spec.at())
        };
        assert!(listed().is_none(), "free");
        let mut holder = Actor::start(&spec);
        holder.expect("lock", "held");
        let mut waiters = [0; 3].map(|_| Actor::start(&spec));
        waiters
            .iter_mut()
            .for_each(|waiter| waiter.tell_to_wait("lock"));
        let found = listed().unwrap();
        assert_eq!((found.backend(), found.scope()), (backend, Scope::User));
        assert_eq!(found.owner().unwrap().unwrap().pid(), holder.pid());
        // Only the system knows the waiters of a mutex or of flock, and Windows does not report
        // them.
        assert_eq!(
            found.waiters().unwrap(),
            if cfg!(target_os = "linux") { 3 } else { 0 }
        );
        drop((holder, waiters));
        until("nobody holds it", || listed().is_none());
    }
}

#[cfg(target_os = "linux")]
#[test]
fn name_holder_records_supervised_child() {
    for (kind, backend) in OWN.into_iter().zip([NATIVE, Backend::File]) {
        let spec = kind.fresh();
        let lock = NamedLock::builder(spec.at())
            .backend(backend)
            .build()
            .unwrap();
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let guard = lock.lock().unwrap();
        guard.name_holder(&lockkit::Owner::of(child.id()).unwrap().with_program("work"));
        let owner = lock.owner().unwrap().unwrap();
        assert_eq!((owner.pid(), owner.program()), (child.id(), Some("work")));
        drop(guard.descriptor().unwrap());
        assert!(
            lock.try_lock().unwrap_err().is_held(),
            "closing the copy frees nothing"
        );
        child.kill().unwrap();
        child.wait().unwrap();
        guard.release().unwrap();
        assert!(lock.try_lock().unwrap().recovered().is_none());
    }
}

#[test]
fn environment_variables_do_not_change_lock() {
    for kind in OWN {
        let spec = kind.fresh();
        let directory = tempfile::tempdir().unwrap();
        let mut holder = Actor::start(&spec);
        holder.expect("lock", "held");
        let mut other = Actor::start_with(&spec, |command| {
            for variable in [
                "TMPDIR",
                "TMP",
                "LOCALAPPDATA",
                "APPDATA",
                "HOME",
                "XDG_RUNTIME_DIR",
                "XDG_STATE_HOME",
                "XDG_CACHE_HOME",
            ] {
                command.env(variable, directory.path());
            }
        });
        assert!(other.ask("try").starts_with("error Held"));
        assert_eq!(directory.path().read_dir().unwrap().count(), 0);
        spec.clean();
    }
}

#[test]
fn waits_for_200_names_leak_no_thread_or_descriptor() {
    let [mut holder, mut waiter] = [(); 2].map(|()| Actor::start(&Kind::NAMED.fresh()));
    let names: Vec<String> = (0..200).map(|_| fresh_name("lockkit-test")).collect();
    let mut all = |command: &str| {
        for name in &names {
            holder.expect(&format!("{command} {name}"), "done");
        }
    };
    all("hold-name");
    waiter.expect(&format!("time-out-name {}", names[0]), "done");
    let before = Belongings::of(waiter.pid());
    for name in &names {
        waiter.expect(&format!("time-out-name {name}"), "done");
    }
    assert_eq!(Belongings::of(waiter.pid()), before);
    all("clean-name");
}

#[cfg(target_os = "linux")]
#[test]
fn release_with_queue_full_of_dead_waiters_serves_next_waiter() {
    let spec = Kind::NAMED_SOCKET.fresh();
    let [mut holder, mut waiter] = [(); 2].map(|()| Actor::start(&spec));
    holder.expect("lock", "held");
    let mut dead = 0;
    while hostile::connect(&abstract_name(my_uid(), spec.at())).is_some() {
        dead += 1;
    }
    // The queue holds net.core.somaxconn connections, but at most 4,096.
    assert!(dead >= 128, "the queue took only {dead}");
    assert!(waiter.ask("try").starts_with("error Held"));
    assert!(waiter.ask("lock-for 10").starts_with("error Timeout"));
    waiter.tell_to_wait("lock");
    holder.expect("release", "released");
    assert_eq!(waiter.answer(), "held");
    // Its own queue is empty again.
    assert!(hostile::connect(&abstract_name(my_uid(), spec.at())).is_some());
    spec.clean();
}

#[cfg(target_os = "linux")]
#[test]
fn acquire_name_of_other_user_fails_with_foreign_owner() {
    let Some(stranger) = another_user() else {
        return;
    };
    let spec = Kind::NAMED_SOCKET.fresh();
    let mut squatter =
        Actor::start_rogue(["squat", &abstract_name(my_uid(), spec.at())], stranger.uid);
    assert_eq!(squatter.answer(), "squatting");
    let lock = spec.open();
    for wait in [
        Wait::none(),
        Wait::forever(),
        Wait::at_most(Duration::from_secs(10)),
    ] {
        let error = lock.acquire(&wait).err().unwrap();
        match error.kind() {
            ErrorKind::ForeignOwner { uid, pid, .. } => {
                assert_eq!((*uid, *pid), (stranger.uid, Some(squatter.pid())));
            }
            _ => panic!("{error}"),
        }
    }
    squatter.kill();
    drop(lock.acquire(&Wait::none()).unwrap());
    spec.clean();
}

#[cfg(target_os = "linux")]
#[test]
fn release_skips_connection_of_other_user() {
    let Some(stranger) = another_user() else {
        return;
    };
    let spec = Kind::NAMED_SOCKET.fresh();
    let [mut holder, mut waiter] = [(); 2].map(|()| Actor::start(&spec));
    holder.expect("lock", "held");
    let mut rogue =
        Actor::start_rogue(["queue", &abstract_name(my_uid(), spec.at())], stranger.uid);
    assert_eq!(rogue.answer(), "queued");
    waiter.tell_to_wait("lock");
    holder.expect("release", "released");
    assert_eq!(waiter.answer(), "held");
    assert_eq!(rogue.answer(), "turned away");
    spec.clean();
}

#[cfg(target_os = "linux")]
#[test]
fn user_names_are_separate_and_machine_names_shared() {
    let Some(user) = another_user() else { return };
    for (kind, own) in OWN
        .map(|kind| (kind, true))
        .into_iter()
        .chain(MACHINE.map(|kind| (kind, false)))
    {
        let spec = kind.fresh();
        let mut mine = Actor::start(&spec);
        let mut theirs = Actor::start_as(&spec, user.uid);
        mine.expect("try", "held");
        if own {
            theirs.expect("try", "held");
        } else {
            assert!(theirs.ask("try").starts_with("error Held"));
            theirs.tell_to_wait("lock");
            mine.expect("release", "released");
            assert_eq!(theirs.answer(), "held");
            let held = mine.ask("try");
            assert!(held.contains(&format!("by pid {}", theirs.pid())), "{held}");
            theirs.kill();
            mine.expect("lock", &format!("held recovered {}", theirs.pid()));
        }
        spec.clean();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn machine_wide_lock_of_any_first_user_is_open_to_all() {
    let (Some(first), Some(second)) = (another_user(), another_user()) else {
        return;
    };
    for kind in MACHINE {
        let spec = kind.fresh();
        let mut died = Actor::start_as(&spec, first.uid);
        died.expect("lock", "held");
        let [mut other, mut root] = [second.uid, 0].map(|uid| Actor::start_as(&spec, uid));
        for actor in [&mut other, &mut root] {
            assert!(actor.ask("try").starts_with("error Held"));
        }
        died.kill();
        other.expect("lock", &format!("held recovered {}", died.pid()));
        other.expect("release", "released");
        root.expect("lock", "held");
        spec.clean();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn processes_in_separate_pid_namespaces_share_name() {
    let isolated = |spec: &Spec| {
        Actor::start_with(spec, |command| {
            let (program, spec) = (command.get_program().to_owned(), spec.invite());
            *command = Command::new("unshare");
            command
                .args(["--pid", "--fork", "--kill-child"])
                .arg(program)
                .arg(spec);
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
        })
    };
    if !Command::new("unshare")
        .args(["--pid", "--fork", "true"])
        .status()
        .is_ok_and(|status| status.success())
    {
        lockkit_tests::left_out("this machine makes no pid namespaces for the test");
        return;
    }
    let user = another_user();
    for kind in OWN {
        let spec = kind.fresh();
        let (mut here, mut there) = (Actor::start(&spec), isolated(&spec));
        there.expect("lock", "held");
        assert!(here.ask("try").starts_with("error Held"));
        assert!(here.ask("lock-for 1").starts_with("error Timeout"));
        here.tell("lock");
        there.expect("release", "released");
        assert_eq!(here.answer(), "held");
        assert!(there.ask("try").starts_with("error Held"));
        assert!(there.ask("owner").starts_with("owner "));
        there.tell("lock");
        here.expect("release", "released");
        assert_eq!(there.answer(), "held");
        spec.clean();
    }
    // Without records there is only the kernel's information, which contains no pid.
    let Some(user) = user else { return };
    for directory in user.directories() {
        std::fs::create_dir(directory).unwrap();
    }
    let spec = Kind::NAMED_SOCKET.fresh();
    let mut there = Actor::start_with(&spec, |command| {
        let (program, spec) = (command.get_program().to_owned(), spec.invite());
        *command = Command::new("unshare");
        command.args([
            "--pid",
            "--fork",
            "--kill-child",
            "setpriv",
            "--clear-groups",
        ]);
        command
            .args([
                "--reuid",
                &user.uid.to_string(),
                "--regid",
                &user.uid.to_string(),
            ])
            .arg(program)
            .arg(spec);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
    });
    let mut here = Actor::start_as(&spec, user.uid);
    here.expect("lock", "held");
    let held = there.ask("try");
    assert!(
        held.contains("is held by a process of another pid namespace"),
        "{held}"
    );
    there.tell("lock");
    here.expect("release", "released");
    assert_eq!(there.answer(), "held");
}

#[cfg(target_os = "linux")]
#[test]
fn exec_in_holder_frees_lock() {
    let spec = Kind::NAMED_SOCKET.fresh();
    let (mut holder, mut other) = (Actor::start(&spec), Actor::start(&spec));
    holder.expect("lock", "held");
    other.expect("owner", &format!("owner {}", holder.pid()));
    holder.tell("exec");
    until("nobody holds it", || other.ask("owner") == "owner none");
    other.expect("try", &format!("held recovered {}", holder.pid()));
    spec.clean();
}

#[cfg(target_os = "linux")]
#[test]
fn acquire_after_directory_deletion_works() {
    let Some(user) = another_user() else { return };
    let spec = Kind::NAMED_FILE.fresh();
    let mut actor = Actor::start_as(&spec, user.uid);
    for _ in 0..3 {
        actor.expect("lock", "held");
        actor.expect("release", "released");
        std::fs::remove_dir_all(&user.directories()[0]).unwrap();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn record_of_one_lock_is_not_file_of_another() {
    let Some(user) = another_user() else { return };
    let [_, memory] = user.directories();
    std::fs::create_dir(&memory).unwrap();
    let file = Kind::NAMED_FILE.fresh();
    let mut holder = Actor::start_as(&file, user.uid);
    holder.expect("lock", "held");
    for suffix in ["lock", "record"] {
        let socket = Spec::parse(&format!("named-socket:{}.{suffix}", file.at()));
        let mut other = Actor::start_as(&socket, user.uid);
        other.expect("lock", "held");
        other.expect("release", "released");
    }
    holder.expect("owner", &format!("owner {}", holder.pid()));
}

#[cfg(target_os = "linux")]
#[test]
fn named_lock_file_is_private_to_effective_user() {
    let Some(user) = another_user() else { return };
    let spec = Kind::NAMED_FILE.fresh();
    let mut actor = Actor::start_as(&spec, user.uid);
    actor.expect("try", "held");
    let [directory, _] = user.directories();
    for (path, mode) in [
        (directory.clone(), 0o700),
        (directory.join(format!("{}.lock", spec.at())), 0o600),
    ] {
        let found = path.symlink_metadata().unwrap();
        assert_eq!(
            (found.uid(), found.mode() & 0o7777),
            (user.uid, mode),
            "{}",
            path.display()
        );
    }
}

#[cfg(target_os = "linux")]
#[test]
fn acquire_in_untrusted_directory_fails() {
    let elsewhere = tempfile::tempdir().unwrap();
    let Some(user) = another_user() else { return };
    let [directory, _] = user.directories();
    let spec = Kind::NAMED_FILE.fresh();
    let refuses = |expected: &str, because: &str| {
        let answer = Actor::start_as(&spec, user.uid).ask("try");
        assert!(answer.starts_with(&format!("error {expected}")), "{answer}");
        assert!(answer.contains(because), "{answer}");
    };

    std::fs::create_dir(&directory).unwrap();
    refuses("ForeignOwner", "uid 0");
    std::os::unix::fs::chown(&directory, Some(user.uid), None).unwrap();
    std::fs::set_permissions(&directory, PermissionsExt::from_mode(0o770)).unwrap();
    refuses("Insecure", "0700");
    std::fs::remove_dir(&directory).unwrap();

    symlink(elsewhere.path(), &directory).unwrap();
    refuses("Io", "open the directory");
    std::fs::remove_file(&directory).unwrap();

    std::fs::write(&directory, "").unwrap();
    refuses("Io", "open the directory");
    std::fs::remove_file(&directory).unwrap();
    assert_eq!(elsewhere.path().read_dir().unwrap().count(), 0);
}

#[cfg(target_os = "linux")]
#[test]
fn acquire_with_linked_lock_file_fails() {
    let victim = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(victim.path(), "precious").unwrap();
    let spec = Kind::NAMED_FILE.fresh();
    let [path] = &spec.files()[..] else {
        panic!("one file")
    };
    drop(spec.open().acquire(&Wait::none()).unwrap());
    std::fs::remove_file(path).unwrap();
    symlink(victim.path(), path).unwrap();
    let error = spec.open().acquire(&Wait::none()).err().unwrap();
    assert!(
        matches!(error.kind(), ErrorKind::Io { action: "open", .. }),
        "{error}"
    );
    std::fs::remove_file(path).unwrap();
    std::fs::hard_link(victim.path(), path).unwrap();
    let error = spec.open().acquire(&Wait::none()).err().unwrap();
    assert!(
        matches!(error.kind(), ErrorKind::Io { action: "open", .. }),
        "{error}"
    );
    assert_eq!(std::fs::read_to_string(victim.path()).unwrap(), "precious");
    spec.clean();
}

#[cfg(target_os = "linux")]
#[test]
fn owner_query_on_fifo_does_not_block() {
    let spec = Kind::MACHINE_FILE.fresh();
    let [path] = &spec.files()[..] else {
        panic!("one file")
    };
    drop(spec.open().acquire(&Wait::none()).unwrap());
    std::fs::remove_file(path).unwrap();
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    Actor::start(&spec).expect("owner", "owner none");
    spec.clean();
}

#[cfg(target_os = "linux")]
#[test]
fn death_without_shared_memory_is_reported_by_file() {
    let Some(user) = another_user() else { return };
    let [_, memory] = user.directories();
    // It belongs to root, so this user does not trust it.
    std::fs::create_dir(&memory).unwrap();
    let spec = Kind::NAMED_SOCKET.fresh();
    let mut first = Actor::start_as(&spec, user.uid);
    first.expect("lock", "held");
    first.kill();
    Actor::start_as(&spec, user.uid).expect("try", &format!("held recovered {}", first.pid()));
}

#[cfg(target_os = "linux")]
#[test]
fn lock_without_record_storage_works_and_reports_no_death() {
    let Some(user) = another_user() else { return };
    for directory in user.directories() {
        std::fs::create_dir(&directory).unwrap();
    }
    let spec = Kind::NAMED_SOCKET.fresh();
    let [mut first, mut second, mut third] = [(); 3].map(|()| Actor::start_as(&spec, user.uid));
    first.expect("lock", "held");
    second.expect("owner", &format!("owner {}", first.pid()));
    second.tell_to_wait("lock");
    first.kill();
    assert_eq!(second.answer(), "held");
    third.tell_to_wait("lock");
    second.expect("release", "released");
    assert_eq!(third.answer(), "held");
    third.kill();
    Actor::start_as(&spec, user.uid).expect("try", "held");
}

#[test]
fn acquire_after_lock_file_deletion_opens_new_file() {
    let spec = Kind::NAMED_FILE.fresh();
    let lock = spec.open();
    let guard = lock.acquire(&Wait::none()).unwrap();
    spec.clean();
    drop(guard);
    // The kept descriptor refers to the deleted file, so it is not used again.
    let guard = lock.acquire(&Wait::none()).unwrap();
    assert!(spec.open().acquire(&Wait::none()).err().unwrap().is_held());
    drop(guard);
    spec.clean();
}

/// Takes several measurements. The best must be within `limit`, because other tests run at the same
/// time.
#[cfg(target_os = "linux")]
fn best_within(limit: Duration, mut measured: impl FnMut() -> Duration) {
    let times: Vec<Duration> = (0..5).map(|_| measured()).collect();
    assert!(times.iter().any(|time| *time <= limit), "{times:?}");
}

#[cfg(target_os = "linux")]
#[test]
fn a13_names_used_once_leave_no_growth() {
    let Some(user) = another_user() else { return };
    let mut actor = Actor::start_as(&Kind::NAMED_SOCKET.fresh(), user.uid);
    actor.expect("use-names 10000", "done");
    let [files, memory] = user.directories();
    assert!(!files.exists(), "records are in memory");
    let left: Vec<_> = memory
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap())
        .collect();
    assert_eq!(left.len(), 1, "{left:?}");
    assert!(left[0].metadata().unwrap().len() <= 8192);
}

#[cfg(target_os = "linux")]
#[test]
fn a13_held_lock_takes_at_most_one_kibibyte() {
    let Some(user) = another_user() else { return };
    let mut actor = Actor::start_as(&Kind::NAMED_SOCKET.fresh(), user.uid);
    let answer = actor.ask("hold-names 900");
    let bytes: u64 = answer.strip_prefix("bytes ").unwrap().parse().unwrap();
    assert!(bytes <= 1024, "{bytes} bytes each");
    let mut other = Actor::start_as(&Kind::NAMED_SOCKET.fresh(), user.uid);
    let again = Spec::parse("named-socket:held-899");
    assert!(
        Actor::start_as(&again, user.uid)
            .ask("try")
            .contains(&format!("by pid {}", actor.pid()))
    );
    actor.kill();
    // The records of dead holders remain for the next owners, and the other names find room.
    other.expect("use-names 2000", "done");
    for number in [0, 450, 899] {
        let spec = Spec::parse(&format!("named-socket:held-{number}"));
        Actor::start_as(&spec, user.uid).expect("try", &format!("held recovered {}", actor.pid()));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a13_damaged_table_of_records_breaks_no_lock() {
    let Some(user) = another_user() else { return };
    let [_, memory] = user.directories();
    let spec = Kind::NAMED_SOCKET.fresh();
    let table = memory.join("records-1");
    for damage in [
        vec![],
        vec![0xff; 3],
        vec![0xff; 8192],
        b"another format".repeat(1000),
        vec![0xff; 100_000],
    ] {
        let mut first = Actor::start_as(&spec, user.uid);
        first.expect("lock", "held");
        first.expect("release", "released");
        // A process that has the table mapped must not find it shorter.
        first.kill();
        std::fs::remove_file(&table).unwrap();
        std::fs::write(&table, &damage).unwrap();
        std::os::unix::fs::chown(&table, Some(user.uid), Some(user.uid)).unwrap();
        std::fs::set_permissions(&table, PermissionsExt::from_mode(0o600)).unwrap();
        let [mut holder, mut waiter, mut other] =
            [(); 3].map(|()| Actor::start_as(&spec, user.uid));
        holder.expect("lock", "held");
        assert!(other.ask("try").starts_with("error Held"));
        waiter.tell_to_wait("lock");
        holder.expect("release", "released");
        assert_eq!(waiter.answer(), "held");
        waiter.expect("release", "released");
        other.expect("try", "held");
        other.expect("release", "released");
        drop((holder, waiter, other));
        let _ = std::fs::remove_file(&table);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn b4_waiters_are_live_and_of_this_user_only() {
    let spec = Kind::NAMED_SOCKET.fresh();
    let lock = NamedLock::new(spec.at()).unwrap();
    let guard = lock.lock().unwrap();
    let mut waiters = [0; 4].map(|_| Actor::start(&spec));
    waiters
        .iter_mut()
        .for_each(|waiter| waiter.tell_to_wait("lock"));
    assert_eq!(lock.waiters().unwrap(), 4);
    // The waiters are: dead, given up, stopped, of another user, and a process that only queries.
    waiters[0].kill();
    assert!(
        Actor::start(&spec)
            .ask("lock-for 10")
            .starts_with("error Timeout")
    );
    lockkit_tests::stop(waiters[1].pid());
    let stranger = another_user().map(|user| {
        let mut stranger =
            Actor::start_rogue(["queue", &abstract_name(my_uid(), spec.at())], user.uid);
        assert_eq!(stranger.answer(), "queued");
        (user, stranger)
    });
    let looks = hostile::connect(&abstract_name(my_uid(), spec.at()));
    assert_eq!(lock.waiters().unwrap(), 3);
    let held = NamedLock::held(Scope::User).unwrap();
    let held = held
        .iter()
        .find(|held| held.lock().name() == spec.at())
        .unwrap();
    assert_eq!(
        (held.waiters(), held.owner().unwrap().pid()),
        (3, std::process::id())
    );
    drop((looks, stranger, waiters));
    assert_eq!(lock.waiters().unwrap(), 0);
    drop(guard);
}

#[cfg(target_os = "linux")]
#[test]
fn b4_waiters_are_exact_behind_a_full_queue_of_dead() {
    let spec = Kind::NAMED_SOCKET.fresh();
    let lock = NamedLock::new(spec.at()).unwrap();
    let _guard = lock.lock().unwrap();
    let mut waiter = Actor::start(&spec);
    waiter.tell_to_wait("lock");
    while hostile::connect(&abstract_name(my_uid(), spec.at())).is_some() {}
    assert_eq!(lock.waiters().unwrap(), 1);
}

#[cfg(target_os = "linux")]
#[test]
fn b8_receiver_that_is_stopped_is_the_owner() {
    for kind in [Kind::NAMED_SOCKET, Kind::MACHINE_SOCKET] {
        let spec = kind.fresh();
        let scope = if kind.name() == "named-socket" {
            Scope::User
        } else {
            Scope::Machine
        };
        let lock = NamedLock::builder(spec.at()).scope(scope).build().unwrap();
        let guard = lock.lock().unwrap();
        let mut waiter = Actor::start(&spec);
        waiter.tell_to_wait("lock");
        lockkit_tests::stop(waiter.pid());
        until("it is stopped", || lockkit_tests::is_stopped(waiter.pid()));
        drop(guard);
        let owner = lock.owner().unwrap().expect("the receiver");
        assert_eq!(
            (owner.pid(), owner.program(), owner.is_stopped()),
            (waiter.pid(), Some("actor"), true)
        );
        assert!(
            lock.try_lock()
                .unwrap_err()
                .to_string()
                .contains(&format!("by pid {}", waiter.pid()))
        );
        // The waiter dies before it runs as the holder, so its death is not reported.
        waiter.kill();
        let guard = lock.lock_for(lockkit_tests::LIVELY).unwrap();
        assert!(guard.recovered().is_none());
        assert!(!lock.owner().unwrap().unwrap().is_stopped());
        drop(guard);
        assert!(lock.owner().unwrap().is_none());
    }
}

#[cfg(target_os = "linux")]
#[test]
fn b8_waiter_with_invalid_announcement_is_named_by_pid() {
    let spec = Kind::NAMED_SOCKET.fresh();
    let lock = NamedLock::new(spec.at()).unwrap();
    let guard = lock.lock().unwrap();
    let queued = hostile::connect(&abstract_name(my_uid(), spec.at())).unwrap();
    rustix::net::send(&queued, b"nonsense", rustix::net::SendFlags::NOSIGNAL).unwrap();
    // This waiter counts itself, so that the release checks the queue.
    assert!(lock.lock_for(Duration::from_millis(1)).is_err());
    drop(guard);
    assert_eq!(
        lock.owner().unwrap().map(|owner| owner.pid()),
        Some(std::process::id())
    );
    drop(queued);
    drop(lock.lock_for(lockkit_tests::LIVELY).unwrap());
}

#[cfg(target_os = "linux")]
#[test]
fn b8_owner_query_gets_no_lock() {
    let spec = Kind::NAMED_SOCKET.fresh();
    let lock = NamedLock::new(spec.at()).unwrap();
    let guard = lock.lock().unwrap();
    let queued = hostile::connect(&abstract_name(my_uid(), spec.at())).unwrap();
    let mut waiter = Actor::start(&spec);
    waiter.tell_to_wait("lock");
    drop(guard);
    assert_eq!(waiter.answer(), "held");
    drop(queued);
    waiter.expect("release", "released");
}

#[cfg(target_os = "linux")]
#[test]
fn c3_holder_stopped_in_release_keeps_no_socket() {
    for kind in [Kind::NAMED_SOCKET, Kind::MACHINE_SOCKET] {
        lockkit_tests::crash_points::stop_at_every_step_of_a_release(kind);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn c3_holder_killed_with_live_forked_child_frees_lock() {
    for kind in [Kind::NAMED_SOCKET, Kind::MACHINE_SOCKET] {
        lockkit_tests::crash_points::kill_holder_with_forked_child(kind);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a13_acquire_with_file_size_limit_still_excludes() {
    for kind in [Kind::NAMED_SOCKET, Kind::MACHINE_SOCKET] {
        let spec = kind.fresh();
        let mut whole = Actor::start(&spec);
        for blocks in ["4", "1", "0"] {
            let mut limited = Actor::start_with(&spec, |command| {
                let script = format!("ulimit -f {blocks} && exec \"$0\" \"$1\"");
                let (program, spec) = (
                    command.get_program().to_owned(),
                    command.get_args().next().unwrap().to_owned(),
                );
                *command = Command::new("bash");
                command
                    .args(["-c", &script])
                    .arg(program)
                    .arg(spec)
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped());
            });
            for _ in 0..2 {
                limited.expect("try", "held");
                assert!(whole.ask("try").starts_with("error Held"));
                limited.expect("release", "released");
                whole.expect("try", "held");
                whole.expect("release", "released");
            }
        }
        spec.clean();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn c2_socket_that_blocks_does_not_block_release() {
    let Some(user) = another_user() else { return };
    let spec = Kind::MACHINE_SOCKET.fresh();
    let mut rogue = Actor::start_rogue(
        ["hand-over", &format!("lockkit/machine/{}", spec.at())],
        user.uid,
    );
    assert_eq!(rogue.answer(), "holds");
    let [mut victim, mut next] = [(); 2].map(|()| Actor::start(&spec));
    victim.tell("lock");
    assert_eq!(rogue.answer(), "handed over");
    assert_eq!(victim.answer(), "held");
    next.tell_to_wait("lock");
    victim.expect("release", "released");
    // The copy keeps the name taken, and has no other effect.
    next.expect_silence();
    rogue.kill();
    assert_eq!(next.answer(), "held");
    next.expect("release", "released");
    victim.expect("try", "held");
}

#[cfg(target_os = "linux")]
#[test]
fn c2_lock_goes_from_user_to_user_in_turns() {
    let Some(user) = another_user() else { return };
    let spec = Kind::MACHINE_SOCKET.fresh();
    let mut actors = [0, user.uid, 0, user.uid, 0].map(|uid| Actor::start_as(&spec, uid));
    actors[0].expect("lock", "held");
    actors[1..]
        .iter_mut()
        .for_each(|actor| actor.tell_to_wait("lock"));
    let mut holder = 0;
    for _ in 1..5 {
        actors[holder].expect("release", "released");
        let mut next = None;
        until("one of the others holds", || {
            next = (0..5).find(|at| {
                *at != holder && actors[*at].is_busy() && actors[*at].answered().is_some()
            });
            next.is_some()
        });
        holder = next.unwrap();
    }
    actors[holder].expect("release", "released");
    actors[0].expect("try", "held");
}

#[cfg(target_os = "linux")]
#[test]
fn c1_socket_of_another_type_is_not_the_lock() {
    for (kind, prefix) in [
        (Kind::NAMED_SOCKET, format!("lockkit/u{}", my_uid())),
        (Kind::MACHINE_SOCKET, "lockkit/machine".to_owned()),
    ] {
        let spec = kind.fresh();
        let mut rogue = Actor::start_rogue(
            ["hand-over-stream", &format!("{prefix}/{}", spec.at())],
            my_uid(),
        );
        assert_eq!(rogue.answer(), "holds");
        let mut victim = Actor::start(&spec);
        victim.tell("lock-for 200");
        assert_eq!(rogue.answer(), "handed over");
        assert!(victim.answer().starts_with("error Timeout"));
        rogue.kill();
        victim.expect("lock-for 5000", "held");
    }
}

/// This is one test, because the directories of a user with this number are the same for all.
#[cfg(target_os = "linux")]
#[test]
fn c1_overflow_uid_is_not_trusted_as_own_uid() {
    let Some(stranger) = another_user() else {
        return;
    };
    let Some(inside) = UserNamespace::new(2_000_000) else {
        return;
    };
    const LAST: u32 = UserNamespace::LAST;
    let spec = Kind::NAMED_SOCKET.fresh();
    let socket = abstract_name(LAST, spec.at());

    // Two processes of the user inside share the lock.
    let [mut one, mut other] = [(); 2].map(|()| inside.start(LAST, &[spec.invite()]));
    one.expect("lock", "held");
    assert!(other.ask("try").starts_with("error Held"));
    other.tell_to_wait("lock");
    // A stranger in the queue looks like the same user, and is skipped.
    let mut queued = Actor::start_rogue(["queue", &socket], stranger.uid);
    assert_eq!(queued.answer(), "queued");
    one.expect("release", "released");
    assert_eq!(other.answer(), "held");
    other.expect("release", "released");
    assert_eq!(queued.answer(), "turned away");
    one.expect("try", "held");
    one.kill();
    other.expect("try", &format!("held recovered {}", one.pid()));
    other.expect("release", "released");

    // A stranger outside, and a user of another namespace with the same number, do not count as
    // holders to wait for.
    let elsewhere = UserNamespace::new(3_000_000).unwrap();
    let outside = |socket: &str| Actor::start_rogue(["squat", socket], stranger.uid);
    let same_number = |socket: &str| elsewhere.start(LAST, &["squat", socket]);
    for squat in [&outside as &dyn Fn(&str) -> Actor, &same_number] {
        let mut squatter = squat(&socket);
        assert_eq!(squatter.answer(), "squatting");
        let answer = other.ask("lock-for 1000");
        assert!(answer.starts_with("error ForeignOwner"), "{answer}");
        squatter.kill();
    }
    other.expect("try", "held");
    drop(other);

    // A directory of another user looks like the user's own.
    for base in ["/tmp", "/dev/shm"] {
        let directory = format!("{base}/lockkit-u{LAST}");
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::create_dir(&directory).unwrap();
        std::fs::set_permissions(&directory, PermissionsExt::from_mode(0o755)).unwrap();
        std::os::unix::fs::chown(&directory, Some(stranger.uid), Some(stranger.uid)).unwrap();
    }
    let answer = inside
        .start(LAST, &[Kind::NAMED_FILE.fresh().invite()])
        .ask("try");
    assert!(answer.starts_with("error ForeignOwner"), "{answer}");
    // Without records the lock works.
    inside.start(LAST, &[spec.invite()]).expect("try", "held");
}

#[cfg(target_os = "linux")]
#[test]
fn c8_release_behind_dead_waiters_is_quick() {
    let spec = Kind::NAMED_SOCKET.fresh();
    let lock = NamedLock::new(spec.at()).unwrap();
    best_within(Duration::from_millis(20), || {
        let guard = lock.lock().unwrap();
        while hostile::connect(&abstract_name(my_uid(), spec.at())).is_some() {}
        let start = std::time::Instant::now();
        drop(guard);
        start.elapsed()
    });
    // A live waiter behind more waiters than are skipped acquires.
    let guard = lock.lock().unwrap();
    let mut waiter = Actor::start(&spec);
    for _ in 0..100 {
        drop(hostile::connect(&abstract_name(my_uid(), spec.at())).unwrap());
    }
    waiter.tell_to_wait("lock");
    drop(guard);
    assert_eq!(waiter.answer(), "held");
}

#[cfg(target_os = "linux")]
#[test]
fn b9_list_is_complete_despite_queues_too_long_for_a_message() {
    if !rustix::process::geteuid().is_root() {
        return lockkit_tests::left_out("a network namespace and so many descriptors need root");
    }
    let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    if descriptors.is_some_and(|most| most < 18_000) {
        return lockkit_tests::left_out("too few descriptors are allowed here");
    }
    // The length of queues belongs to the network namespace, as names do.
    let script = "echo 65535 > /proc/sys/net/core/somaxconn && exec \"$0\" \"$1\"";
    let allowed = Command::new("unshare")
        .args(["--net", "sh", "-c", script, "true"])
        .stderr(Stdio::null())
        .status();
    if !allowed.is_ok_and(|status| status.success()) {
        return lockkit_tests::left_out("a network namespace is not allowed here");
    }
    let mut actor = Actor::start_with(&Kind::NAMED_SOCKET.fresh(), |command| {
        let (program, spec) = (
            command.get_program().to_owned(),
            command.get_args().next().unwrap().to_owned(),
        );
        *command = Command::new("unshare");
        command
            .args(["--net", "sh", "-c", script])
            .arg(program)
            .arg(spec);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
    });
    assert!(actor.ask("hold-names 100").starts_with("bytes "));
    actor.expect("list-behind 8450", "listed 100");
}

#[cfg(target_os = "linux")]
#[test]
fn b12_all_held_names_are_listed_in_one_pass() {
    let guards: Vec<_> = (0..400)
        .map(|number| {
            NamedLock::new(&format!(
                "lockkit-test-many-{}-{number}",
                std::process::id()
            ))
            .unwrap()
        })
        .map(|lock| lock.try_lock().unwrap())
        .collect();
    best_within(Duration::from_millis(100), || {
        let start = std::time::Instant::now();
        let held = NamedLock::held(Scope::User).unwrap();
        let elapsed = start.elapsed();
        let mine = format!("lockkit-test-many-{}-", std::process::id());
        let mine = held
            .iter()
            .filter(|held| held.lock().name().starts_with(&mine));
        let owned = mine.filter(|held| {
            held.owner()
                .is_some_and(|owner| owner.pid() == std::process::id())
        });
        assert_eq!(owned.count(), guards.len());
        elapsed
    });
}

#[cfg(target_os = "linux")]
#[test]
fn c11_cleaner_leaves_files_of_machine_wide_locks() {
    let Some(_) = another_user() else { return };
    let spec = Kind::MACHINE_FILE.fresh();
    let mut holder = Actor::start(&spec);
    holder.expect("lock", "held");
    let [path] = &spec.files()[..] else {
        panic!("one file")
    };
    assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o1666);
    let directory = tempfile::tempdir().unwrap();
    let [rules, age] = ["rules.conf", "aged"].map(|name| directory.path().join(name));
    std::fs::create_dir(&age).unwrap();
    // The test uses a directory of its own, because other tests need the rest of /tmp.
    let (kept, removed) = (age.join("kept"), age.join("removed"));
    std::fs::copy(path, &kept).unwrap();
    std::fs::set_permissions(&kept, path.metadata().unwrap().permissions()).unwrap();
    std::fs::write(&removed, "").unwrap();
    std::fs::write(&rules, format!("e {} - - - 1ms\n", age.display())).unwrap();
    let clean = || {
        Command::new("systemd-tmpfiles")
            .arg("--clean")
            .arg(&rules)
            .stderr(Stdio::null())
            .status()
    };
    if clean().is_err() {
        lockkit_tests::left_out("systemd-tmpfiles is not here");
        return;
    }
    until("the other file is old enough to be removed", || {
        clean().unwrap();
        !removed.exists()
    });
    assert!(kept.exists());
    spec.clean();
}

lockkit_tests::left_out! { "it takes other users, modes of files, links, namespaces, or sockets, as Linux has them":
    exec_in_holder_frees_lock,
    waiters_are_served_in_order_of_arrival,
    name_holder_records_supervised_child,
    release_with_queue_full_of_dead_waiters_serves_next_waiter,
    acquire_name_of_other_user_fails_with_foreign_owner,
    release_skips_connection_of_other_user,
    user_names_are_separate_and_machine_names_shared,
    machine_wide_lock_of_any_first_user_is_open_to_all,
    processes_in_separate_pid_namespaces_share_name,
    acquire_after_directory_deletion_works,
    record_of_one_lock_is_not_file_of_another,
    named_lock_file_is_private_to_effective_user,
    acquire_in_untrusted_directory_fails,
    acquire_with_linked_lock_file_fails,
    owner_query_on_fifo_does_not_block,
    death_without_shared_memory_is_reported_by_file,
    lock_without_record_storage_works_and_reports_no_death,
    a13_names_used_once_leave_no_growth,
    a13_held_lock_takes_at_most_one_kibibyte,
    a13_damaged_table_of_records_breaks_no_lock,
    b4_waiters_are_live_and_of_this_user_only,
    b4_waiters_are_exact_behind_a_full_queue_of_dead,
    b8_receiver_that_is_stopped_is_the_owner,
    b8_waiter_with_invalid_announcement_is_named_by_pid,
    b8_owner_query_gets_no_lock,
    b9_list_is_complete_despite_queues_too_long_for_a_message,
    a13_acquire_with_file_size_limit_still_excludes,
    c3_holder_killed_with_live_forked_child_frees_lock,
    c3_holder_stopped_in_release_keeps_no_socket,
    c2_socket_that_blocks_does_not_block_release,
    c2_lock_goes_from_user_to_user_in_turns,
    c1_socket_of_another_type_is_not_the_lock,
    c1_overflow_uid_is_not_trusted_as_own_uid,
    c8_release_behind_dead_waiters_is_quick,
    b12_all_held_names_are_listed_in_one_pass,
    c11_cleaner_leaves_files_of_machine_wide_locks,
}
