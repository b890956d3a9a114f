//! PidFile: every case of the suite, and cases of its own.

use std::env::consts::EXE_SUFFIX;
#[cfg(target_os = "linux")]
use std::fs::Permissions;
use std::fs::{self, File};
#[cfg(target_os = "linux")]
use std::os::unix::fs::{PermissionsExt, chown, symlink};
#[cfg(target_os = "linux")]
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use lockkit::{ErrorKind, PidFile, PidStatus};
use lockkit_tests::wine::{DELETED, wine_cannot_judge};
use lockkit_tests::{Actor, LIVELY, Spec, conformance, sleeper};
#[cfg(target_os = "linux")]
use lockkit_tests::{program, until};
use tempfile::TempDir;

conformance!(pidfile, lockkit_tests::Kind::PIDFILE);

/// A pid that the kernel never assigns: its highest is one less.
const DEAD: u32 = 4_194_304;
/// The user that the tests act as when they have the choice.
#[cfg(target_os = "linux")]
const NOBODY: u32 = 65_534;
/// Longer than a file counts as young.
const OLD: Duration = Duration::from_secs(10);
/// Clearly longer than the margin between the clocks and the granularity of both.
const LONG_AGO: Duration = Duration::from_secs(120);

/// Creates a directory for one test, and returns the path of a pidfile in it.
fn place() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("app.pid");
    (directory, path)
}

fn spec(path: &Path) -> Spec {
    Spec::parse(&format!("pidfile:{}", path.display()))
}

fn lock(path: &Path) -> PidFile {
    PidFile::new(path).unwrap()
}

fn write(path: &Path, text: impl AsRef<[u8]>) {
    fs::write(path, text).unwrap();
}

fn write_ago(path: &Path, text: impl AsRef<[u8]>, ago: Duration) {
    write(path, text);
    set_age(path, ago);
}

fn set_age(path: &Path, ago: Duration) {
    File::options().write(true).open(path).unwrap().set_modified(SystemTime::now() - ago).unwrap();
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

fn first_line(path: &Path) -> String {
    text(path).lines().next().unwrap().to_owned()
}

fn my_pid() -> String {
    std::process::id().to_string()
}

/// A lockkit pidfile as a killed owner left it: its content, its time and its identity.
struct Left {
    pid: u32,
    text: String,
    written: SystemTime,
    #[cfg(target_os = "linux")]
    identity: Vec<u8>,
}

/// The extended attribute of the identity, and the offsets of its fields.
#[cfg(target_os = "linux")]
const IDENTITY: &str = "user.lockkit";
#[cfg(target_os = "linux")]
const START: usize = 5;
#[cfg(target_os = "linux")]
const BOOT: usize = 13;
#[cfg(target_os = "linux")]
const NAMESPACE: usize = 29;
#[cfg(target_os = "linux")]
const HOST: usize = 37;

impl Left {
    fn by_the_killed() -> Self {
        let (_directory, path) = place();
        let mut actor = Actor::start(&spec(&path));
        actor.expect("try", "held");
        actor.kill();
        Self::at(&path)
    }

    fn at(path: &Path) -> Self {
        let text = text(path);
        Self {
            pid: text.trim_end().parse().unwrap(),
            text,
            written: fs::metadata(path).unwrap().modified().unwrap(),
            #[cfg(target_os = "linux")]
            identity: identity(path).unwrap(),
        }
    }

    /// Returns a copy with the byte at `at` of the identity changed.
    #[cfg(target_os = "linux")]
    fn with_other(&self, at: usize) -> Self {
        let mut identity = self.identity.clone();
        identity[at] ^= 0x55;
        Self { pid: self.pid, text: self.text.clone(), written: self.written, identity }
    }

    fn put(&self, path: &Path) {
        write(path, &self.text);
        File::options().write(true).open(path).unwrap().set_modified(self.written).unwrap();
        #[cfg(target_os = "linux")]
        rustix::fs::setxattr(path, IDENTITY, &self.identity, rustix::fs::XattrFlags::empty()).unwrap();
    }
}

#[cfg(target_os = "linux")]
fn identity(path: &Path) -> Option<Vec<u8>> {
    let mut room = [0; 256];
    let length = rustix::fs::getxattr(path, IDENTITY, &mut room).ok()?;
    Some(room[..length].to_vec())
}

/// A process of another program, killed at the end.
struct Foreign(Child);

impl Foreign {
    fn start() -> Self {
        Self(sleeper(LIVELY * 20).spawn().unwrap())
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }

    fn end(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(target_os = "linux")]
fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn a_relative_path_is_refused_everywhere() {
    for path in ["app.pid", "", "./app.pid", "../run/app.pid"] {
        for error in [
            PidFile::new(path).unwrap_err(),
            PidFile::inspect(path).unwrap_err(),
            PidFile::remove_stale(path).unwrap_err(),
        ] {
            assert!(matches!(error.kind(), ErrorKind::RelativePath { path: told } if told == Path::new(path)));
            assert_eq!(std::io::Error::from(error).kind(), std::io::ErrorKind::InvalidInput);
        }
    }
}

#[test]
fn held_pidfile_names_holder_and_release_removes_it() {
    let (directory, path) = place();
    let guard = lock(&path).try_lock().unwrap();
    assert_eq!(first_line(&path), my_pid());
    let PidStatus::Running(owner) = PidFile::inspect(&path).unwrap() else { panic!("it runs") };
    assert_eq!(owner.pid(), std::process::id());
    assert!(owner.program().is_some_and(|program| program.starts_with("pidfile")), "{owner:?}");
    assert!(owner.acquired().is_some_and(|acquired| acquired.elapsed().unwrap() < Duration::from_secs(60)));
    guard.verify().unwrap();
    guard.release().unwrap();
    assert_eq!(PidFile::inspect(&path).unwrap(), PidStatus::Absent);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[cfg(target_os = "linux")]
#[test]
fn pidfile_mode_is_at_most_0644_unless_set() {
    let (_directory, path) = place();
    let mode = |lock: PidFile| {
        let _guard = lock.try_lock().unwrap();
        fs::metadata(&path).unwrap().permissions().mode() & 0o777
    };
    assert_eq!(mode(lock(&path)) & 0o600, 0o600);
    assert_eq!(mode(lock(&path)) & !0o644, 0);
    assert_eq!(mode(lock(&path).create_with_mode(0o600)), 0o600);
}

#[test]
fn try_lock_of_held_pidfile_names_holder_and_time() {
    let (_directory, path) = place();
    let mut holder = Actor::start(&spec(&path));
    holder.expect("try", "held");
    let error = lock(&path).try_lock().unwrap_err();
    assert!(error.is_held());
    assert_eq!(error.owner().unwrap().pid(), holder.pid());
    let message = error.to_string();
    let expected =
        format!("the pidfile {} is held by pid {} (actor{EXE_SUFFIX}), since ", path.display(), holder.pid());
    assert!(message.starts_with(&expected), "{message}");
}

#[test]
fn foreign_pidfile_is_held_until_its_process_dies() {
    let (_directory, path) = place();
    let mut daemon = Foreign::start();
    let said = format!("{}\n", daemon.pid());
    write(&path, &said);
    for _ in 0..2 {
        let error = lock(&path).try_lock().unwrap_err();
        assert!(error.is_held(), "{error}");
        assert_eq!(error.owner().unwrap().pid(), daemon.pid());
        assert_eq!(error.owner().unwrap().program(), Some(if cfg!(windows) { "actor.exe" } else { "sleep" }));
    }
    assert!(lock(&path).lock_for(Duration::from_millis(30)).unwrap_err().is_timeout());
    assert!(!PidFile::remove_stale(&path).unwrap());
    assert_eq!(text(&path), said);
    daemon.end();
    assert!(matches!(PidFile::inspect(&path).unwrap(), PidStatus::Stale(owner) if owner.pid() == daemon.pid()));
    let guard = lock(&path).try_lock().unwrap();
    assert_eq!(guard.recovered().unwrap().owner().unwrap().pid(), daemon.pid());
    assert_eq!(first_line(&path), my_pid());
}

#[cfg(target_os = "linux")]
#[test]
fn pidfile_waiter_of_foreign_process_sleeps_until_its_exit() {
    let (_directory, path) = place();
    for command in ["lock", "lock-for 30000"] {
        let mut daemon = Foreign::start();
        write(&path, daemon.pid().to_string());
        let mut waiter = Actor::start(&spec(&path));
        waiter.tell_to_wait(command);
        let computed = || {
            let stat = fs::read_to_string(format!("/proc/{}/schedstat", waiter.pid())).unwrap();
            Duration::from_nanos(stat.split(' ').next().unwrap().parse().unwrap())
        };
        let (before, start) = (computed(), Instant::now());
        std::thread::sleep(Duration::from_millis(500));
        let share = (computed() - before).as_secs_f64() / start.elapsed().as_secs_f64();
        println!("{command}: {:.2} % of a core", share * 100.0);
        // A waiter that does not sleep uses a whole core. One that sleeps uses 1 to 8 %, depending on the machine.
        assert!(share < 0.5, "{share}");
        waiter.expect_silence();
        daemon.end();
        assert_eq!(waiter.answer(), format!("held recovered {}", daemon.pid()));
        waiter.expect("release", "released");
    }
}

#[test]
fn foreign_pidfile_with_reused_pid_is_stale() {
    let (_directory, path) = place();
    if has_just_booted() {
        return lockkit_tests::left_out("the system started so recently that the file would seem older");
    }
    let later = Foreign::start();
    for (ago, reused) in [(Duration::ZERO, false), (Duration::from_secs(5), false), (LONG_AGO, true)] {
        write_ago(&path, later.pid().to_string(), ago);
        let status = PidFile::inspect(&path).unwrap();
        match reused {
            true => assert!(matches!(&status, PidStatus::Stale(owner) if owner.pid() == later.pid()), "{status:?}"),
            false => assert!(matches!(&status, PidStatus::Running(owner) if owner.pid() == later.pid()), "{status:?}"),
        }
        assert_eq!(lock(&path).try_lock().is_ok(), reused);
    }
}

fn has_just_booted() -> bool {
    let uptime = fs::read_to_string("/proc/uptime").unwrap();
    uptime.split('.').next().unwrap().parse::<u64>().unwrap() < 2 * LONG_AGO.as_secs()
}

#[cfg(target_os = "linux")]
#[test]
fn pidfile_on_tmpfs_older_than_boot_is_not_stale() {
    let Ok(directory) = tempfile::tempdir_in("/dev/shm") else {
        return lockkit_tests::left_out("there is no /dev/shm to write to");
    };
    let path = directory.path().join("app.pid");
    let daemon = Foreign::start();
    write_ago(&path, daemon.pid().to_string(), Duration::from_secs(20 * 365 * 86_400));
    assert!(matches!(PidFile::inspect(&path).unwrap(), PidStatus::Running(_)));
    assert!(lock(&path).try_lock().unwrap_err().is_held());
}

#[cfg(target_os = "linux")]
#[test]
fn a_file_that_names_this_very_process_is_free_for_it() {
    // A supervisor writes the file for the program that it starts, or the program itself writes it before an exec.
    let (_directory, path) = place();
    let mut actor = Actor::start_with(&spec(&path), |command| {
        let script = format!("echo $$ > {} && exec \"$0\" \"$1\"", path.display());
        let (program, spec) = (command.get_program().to_owned(), command.get_args().next().unwrap().to_owned());
        *command = Command::new("sh");
        command.args(["-c", &script]).arg(program).arg(spec).stdin(Stdio::piped()).stdout(Stdio::piped());
    });
    until("the file is written", || fs::read_to_string(&path).is_ok_and(|text| text.trim() == actor.pid().to_string()));
    assert!(lock(&path).try_lock().unwrap_err().is_held());
    actor.expect("try", "held");
    assert!(actor.ask("try").starts_with("error Held"));
}

#[test]
fn replaced_pidfile_reports_rogue_deletion_and_is_kept() {
    if wine_cannot_judge(DELETED) {
        return;
    }
    let (_directory, path) = place();
    let dead = format!("{DEAD}\n");
    let daemon = Foreign::start();
    let living = format!("{}\n", daemon.pid());
    let changes: [(&dyn Fn(), Option<&str>); 5] = [
        (&|| fs::remove_file(&path).unwrap(), None),
        (&|| write(&path, &dead), Some(&dead)),
        (
            &|| {
                fs::remove_file(&path).unwrap();
                write(&path, &dead);
            },
            Some(&dead),
        ),
        (&|| write(&path, ""), Some("")),
        (&|| write(&path, &living), Some(&living)),
    ];
    for (change, left) in changes {
        for drops in [false, true] {
            let mut guard = lock(&path).try_lock().unwrap();
            change();
            for error in [guard.verify().unwrap_err(), guard.rewrite().unwrap_err()] {
                assert!(matches!(error.kind(), ErrorKind::RogueDeletion { path: told } if *told == path), "{error}");
            }
            match drops {
                true => drop(guard),
                false => {
                    let error = guard.release().unwrap_err();
                    assert!(matches!(error.kind(), ErrorKind::RogueDeletion { .. }), "{error}");
                }
            }
            assert_eq!(fs::read_to_string(&path).ok().as_deref(), left);
            let _ = fs::remove_file(&path);
        }
    }
}

#[test]
fn a_replaced_file_of_another_owner_stays() {
    if wine_cannot_judge(DELETED) {
        return;
    }
    let (_directory, path) = place();
    let guard = lock(&path).try_lock().unwrap();
    fs::remove_file(&path).unwrap();
    let mut other = Actor::start(&spec(&path));
    other.expect("try", "held");
    assert!(guard.release().is_err());
    assert_eq!(first_line(&path), other.pid().to_string());
    assert!(lock(&path).try_lock().unwrap_err().is_held());
    other.expect("release", "released");
}

#[test]
fn a_stale_file_is_taken_over_by_exactly_one_of_eight_racers() {
    if wine_cannot_judge(DELETED) {
        return;
    }
    let (_directory, path) = place();
    let left = Left::by_the_killed();
    let mut racers: Vec<Actor> = (0..8).map(|_| Actor::start(&spec(&path))).collect();
    for round in 0..3000 {
        match round % 2 {
            0 => left.put(&path),
            _ => write(&path, format!("{DEAD}\n")),
        }
        racers.iter_mut().for_each(|racer| racer.tell("try"));
        let answers: Vec<String> = racers.iter_mut().map(Actor::answer).collect();
        let winners: Vec<usize> = (0..8).filter(|at| answers[*at].starts_with("held recovered")).collect();
        assert_eq!(winners.len(), 1, "round {round}: {answers:?}");
        assert_eq!(answers.iter().filter(|answer| answer.starts_with("error Held")).count(), 7, "{answers:?}");
        let winner = &mut racers[winners[0]];
        assert_eq!(first_line(&path), winner.pid().to_string());
        winner.expect("release", "released");
    }
}

#[test]
fn crash_during_pidfile_takeover_leaves_stale_file() {
    if !lockkit_tests::failpoint::are_enabled() {
        return;
    }
    let (directory, path) = place();
    let left_by = Left::by_the_killed();
    for at in 1.. {
        left_by.put(&path);
        let mut victim = Actor::start_with(&spec(&path), |command| {
            command.arg("steps").arg("alone");
        });
        victim.expect(&at.to_string(), "ready");
        let last = victim.ask("go");
        let pid = victim.pid();
        victim.kill();
        match PidFile::inspect(&path).unwrap() {
            PidStatus::Stale(owner) => assert!([pid, left_by.pid].contains(&owner.pid()), "step {at}: {owner:?}"),
            PidStatus::Absent => {}
            other => panic!("step {at}: {other:?}"),
        }
        let left = fs::read_to_string(&path).ok();
        let guard = lock(&path).try_lock().unwrap();
        let recovered = guard.recovered().and_then(|died| died.owner()).map(|owner| owner.pid().to_string());
        assert_eq!(recovered, left.and_then(|text| text.lines().next().map(str::to_owned)), "step {at}");
        guard.release().unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        if last.starts_with("passed ") {
            println!("{last}");
            assert!(last.contains("taker file created") && last.contains("mode set"), "{last}");
            break;
        }
    }
}

#[test]
fn a_blank_line_is_replaced_at_once() {
    let (_directory, path) = place();
    write(&path, "\n");
    assert!(matches!(PidFile::inspect(&path).unwrap(), PidStatus::Blank { is_free: true, .. }));
    let guard = lock(&path).try_lock().unwrap();
    assert_eq!(text(&path), format!("{}\n", my_pid()));
    assert_eq!(guard.recovered(), None);
}

#[test]
fn a_young_blank_file_is_held_and_an_old_one_taken_over() {
    let (_directory, path) = place();
    for blank in ["", " \n", "\0\0\0\0", "\n\n"] {
        write(&path, blank);
        let status = PidFile::inspect(&path).unwrap();
        assert!(matches!(status, PidStatus::Blank { age, is_free: false } if age < OLD), "{blank:?}: {status:?}");
        let error = lock(&path).try_lock().unwrap_err();
        assert!(error.is_held() && error.owner().is_none(), "{blank:?}: {error}");
        assert_eq!(text(&path), blank);

        set_age(&path, OLD);
        assert!(!PidFile::is_stale(&path).unwrap() && !PidFile::remove_stale(&path).unwrap(), "{blank:?}");
        let status = PidFile::inspect(&path).unwrap();
        assert!(matches!(status, PidStatus::Blank { age, is_free: true } if age >= OLD), "{blank:?}: {status:?}");
        let guard = lock(&path).try_lock().unwrap();
        assert_eq!((guard.recovered(), text(&path)), (None, format!("{}\n", my_pid())));
        guard.release().unwrap();
        assert!(!path.exists());
    }
}

#[test]
fn a_waiter_for_a_young_blank_file_gets_in_once_it_is_old() {
    let (_directory, path) = place();
    write(&path, "");
    let start = Instant::now();
    lock(&path).lock_for(Duration::from_secs(20)).unwrap().release().unwrap();
    assert!(start.elapsed() >= Duration::from_secs(1), "it was young");
}

#[test]
fn acquire_blank_pidfile_with_future_mtime_succeeds() {
    let (_directory, path) = place();
    write(&path, "");
    let future = SystemTime::now() + Duration::from_secs(3600);
    File::options().write(true).open(&path).unwrap().set_modified(future).unwrap();
    lock(&path).try_lock().unwrap().release().unwrap();
}

#[test]
fn new_empty_pidfile_held_despite_clock_slightly_ahead() {
    let (_directory, path) = place();
    write(&path, "");
    let ahead = SystemTime::now() + Duration::from_secs(1);
    File::options().write(true).open(&path).unwrap().set_modified(ahead).unwrap();
    assert!(lock(&path).try_lock().unwrap_err().is_held());
    assert_eq!(text(&path), "");
}

#[test]
fn a_file_too_long_to_be_a_pidfile_is_refused_and_not_touched() {
    let (_directory, path) = place();
    write(&path, format!("{}\n{}", std::process::id(), "x".repeat(5000)));
    let long = text(&path);
    set_age(&path, OLD);
    let gigabyte = path.with_file_name("huge.pid");
    File::create(&gigabyte).unwrap().set_len(1 << 30).unwrap();
    set_age(&gigabyte, OLD);
    for path in [&path, &gigabyte] {
        assert!(matches!(PidFile::inspect(path).unwrap(), PidStatus::Invalid { .. }));
        let removed = PidFile::remove_stale(path).unwrap_err();
        for error in [lock(path).try_lock().unwrap_err(), removed, PidFile::is_stale(path).unwrap_err()] {
            assert!(matches!(error.kind(), ErrorKind::NotAPidFile { .. }), "{error}");
            assert!(error.to_string().contains("longer than 4096 bytes"), "{error}");
            assert!(error.to_string().len() < 500);
        }
    }
    assert_eq!(text(&path), long);
    assert_eq!(fs::metadata(&gigabyte).unwrap().len(), 1 << 30);
}

#[cfg(target_os = "linux")]
#[test]
fn pidfile_of_pid_1_is_held_for_unprivileged_user() {
    if !is_root() {
        return lockkit_tests::left_out("acting as another user needs root");
    }
    let (directory, path) = place();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
    write(&path, "1\n");
    // The result is the same if the file is writable.
    for mode in [0o644, 0o666] {
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        let mut actor = Actor::start_as(&spec(&path), NOBODY);
        for command in ["try", "lock-for 20"] {
            let answer = actor.ask(command);
            assert!(answer.starts_with("error Held") || answer.starts_with("error Timeout"), "{answer}");
            assert!(answer.contains("by pid 1"), "{answer}");
        }
        assert_eq!(text(&path), "1\n");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_file_that_may_not_be_read_or_replaced_is_an_error() {
    if !is_root() {
        return lockkit_tests::left_out("root may write everything, and acting as another user needs root");
    }
    let (directory, path) = place();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
    let mut actor = Actor::start_as(&spec(&path), NOBODY);
    // An unreadable file cannot be judged.
    write(&path, "1\n");
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    let answer = actor.ask("try");
    assert!(answer.starts_with(&format!("error Io: cannot open {}", path.display())), "{answer}");
    assert!(answer.contains("Permission denied"), "{answer}");
    assert_eq!(text(&path), "1\n");
    // A readable file is replaced, if the directory allows it.
    let dead = format!("{DEAD}\n");
    write(&path, &dead);
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    for mode in [0o755, 0o1777] {
        fs::set_permissions(directory.path(), Permissions::from_mode(mode)).unwrap();
        let answer = actor.ask("try");
        assert!(answer.starts_with(&format!("error Io: cannot replace {}", path.display())), "{answer}");
        assert_eq!(text(&path), dead);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
    fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
    actor.expect("try", &format!("held recovered {DEAD}"));
    actor.expect("release", "released");
    let _guard = lock(&path).try_lock().unwrap();
    let answer = actor.ask("try");
    assert!(answer.starts_with("error Held") && answer.contains(&format!("by pid {}", my_pid())), "{answer}");
}

#[cfg(target_os = "linux")]
#[test]
fn acquire_in_unwritable_directory_error_names_path() {
    if !is_root() {
        return lockkit_tests::left_out("root may write everything, and acting as another user needs root");
    }
    let (directory, path) = place();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let answer = Actor::start_as(&spec(&path), NOBODY).ask("try");
    assert!(answer.starts_with(&format!("error Io: cannot create {}", path.display())), "{answer}");
    assert!(answer.contains("Permission denied"), "{answer}");
}

#[cfg(target_os = "linux")]
#[test]
fn pidfile_release_without_directory_permission_blanks_file() {
    if !is_root() {
        return lockkit_tests::left_out("acting as another user needs root");
    }
    let (directory, path) = place();
    chown(directory.path(), Some(NOBODY), None).unwrap();
    let mut actor = Actor::start_as(&spec(&path), NOBODY);
    actor.expect("try", "held");
    chown(directory.path(), Some(0), Some(0)).unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let answer = actor.ask("release");
    assert!(answer.starts_with(&format!("error Io: cannot remove {}", path.display())), "{answer}");
    assert_eq!(text(&path), "\n");
    // This process may not replace the file, but the user that started it may.
    assert!(actor.ask("try").contains("Permission denied"));
    assert_eq!(text(&path), "\n");
    let guard = lock(&path).try_lock().unwrap();
    assert_eq!((guard.recovered(), first_line(&path)), (None, my_pid()));
}

#[test]
fn missing_directories_are_made_only_when_asked_for() {
    let (directory, _) = place();
    let path = directory.path().join("a/b/app.pid");
    let error = lock(&path).try_lock().unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Io { action: "create", path: told, .. } if *told == path), "{error}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    lock(&path).create_parents().try_lock().unwrap().verify().unwrap();
    assert!(path.parent().unwrap().is_dir() && !path.exists());
}

#[cfg(target_os = "linux")]
#[test]
fn what_is_no_plain_file_is_refused_at_once() {
    let (directory, path) = place();
    let fifo = directory.path().join("fifo");
    let made = Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    for strange in [directory.path(), &fifo, Path::new("/dev/null"), Path::new("/")] {
        for error in [
            lock(strange).lock().unwrap_err(),
            PidFile::inspect(strange).unwrap_err(),
            PidFile::remove_stale(strange).unwrap_err(),
        ] {
            let ErrorKind::Io { path, source, .. } = error.kind() else { panic!("{error}") };
            assert_eq!((path.as_path(), source.to_string().as_str()), (strange, "it is no plain file"));
        }
    }
    let below = path.join("below");
    write(&path, "");
    assert!(matches!(lock(&below).try_lock().unwrap_err().kind(), ErrorKind::Io { .. }));
}

#[cfg(target_os = "linux")]
#[test]
fn a_link_is_refused_and_what_it_leads_to_is_not_touched() {
    let (directory, path) = place();
    let target = directory.path().join("precious");
    write_ago(&target, "precious", OLD);
    let refused = |path: &Path| {
        for error in [lock(path).try_lock().unwrap_err(), PidFile::remove_stale(path).unwrap_err()] {
            assert!(matches!(error.kind(), ErrorKind::Insecure { path: told, .. } if told == path), "{error}");
        }
    };
    // Emacs, Chromium and Firefox keep pids in such links.
    for leads_to in [target.as_path(), Path::new("user@host.4242:1700000000"), Path::new("host-4242"), &path] {
        symlink(leads_to, &path).unwrap();
        refused(&path);
        if leads_to != target {
            let error = PidFile::inspect(&path).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Io { .. }), "{error}");
        }
        fs::remove_file(&path).unwrap();
    }
    fs::hard_link(&target, &path).unwrap();
    refused(&path);
    assert_eq!(text(&target), "precious");
    // For a loop in the parent directories the error is the system's.
    symlink("loop", directory.path().join("loop")).unwrap();
    let error = lock(&directory.path().join("loop/app.pid")).try_lock().unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Io { .. }), "{error}");
}

#[cfg(target_os = "linux")]
#[test]
fn acquire_pidfile_on_full_disk_fails_and_changes_nothing() {
    let (directory, path) = place();
    // The file size limit simulates a full disk, with its signal ignored.
    let start = |blocks: &str| {
        Actor::start_with(&spec(&path), |command| {
            let script = format!("trap '' XFSZ && ulimit -f {blocks} && exec \"$0\" \"$1\"");
            let (program, spec) = (command.get_program().to_owned(), command.get_args().next().unwrap().to_owned());
            *command = Command::new("bash");
            command.args(["-c", &script]).arg(program).arg(spec).stdin(Stdio::piped()).stdout(Stdio::piped());
        })
    };
    let mut full = start("0");
    let answer = full.ask("try");
    assert!(answer.starts_with(&format!("error Io: cannot write {}", path.display())), "{answer}");
    assert!(answer.contains("File too large"), "{answer}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    for stale in [format!("{DEAD}\n"), String::new()] {
        write_ago(&path, &stale, OLD);
        let answer = full.ask("try");
        assert!(answer.starts_with(&format!("error Io: cannot write {}", path.display())), "{answer}");
        assert_eq!(text(&path), stale);
        lock(&path).try_lock().unwrap().release().unwrap();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_small_full_file_system_is_an_error_that_leaves_nothing() {
    let (directory, path) = place();
    let script = format!(
        "mount -t tmpfs -o size=4k,nr_inodes=8 none {0} && head -c 4096 /dev/zero > {0}/full && exec \"$0\" \"$1\"",
        directory.path().display()
    );
    let allowed = Command::new("unshare").args(["-m", "true"]).stderr(Stdio::null()).status();
    if !is_root() || !allowed.is_ok_and(|status| status.success()) {
        return lockkit_tests::left_out("mounting a file system is not allowed here");
    }
    let mut actor = Actor::start_with(&spec(&path), |command| {
        let (program, spec) = (command.get_program().to_owned(), command.get_args().next().unwrap().to_owned());
        *command = Command::new("unshare");
        command.args(["-m", "sh", "-c", &script]).arg(program).arg(spec);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
    });
    let answer = actor.ask("try");
    assert!(answer.contains("No space left on device"), "{answer}");
    let seen = format!("/proc/{}/root{}", actor.pid(), directory.path().display());
    let left: Vec<_> = fs::read_dir(seen).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["full"]);
}

/// Starts an actor that sees no /proc, if the machine allows that.
fn start_without_proc(spec: &Spec) -> Option<Actor> {
    let script = "mount -t tmpfs none /proc";
    let allowed = Command::new("unshare").args(["-m", "sh", "-c", script]).stderr(Stdio::null()).status();
    allowed.is_ok_and(|status| status.success()).then(|| {
        Actor::start_with(spec, |command| {
            let (program, spec) = (command.get_program().to_owned(), command.get_args().next().unwrap().to_owned());
            *command = Command::new("unshare");
            command.args(["-m", "sh", "-c", &format!("{script} && exec \"$0\" \"$1\"")]).arg(program).arg(spec);
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
        })
    })
}

#[test]
fn pidfile_without_proc_is_created_in_place() {
    let (directory, path) = place();
    let Some(mut without) = start_without_proc(&spec(&path)) else {
        return lockkit_tests::left_out("mounting a file system is not allowed here");
    };
    let mut waiter = Actor::start(&spec(&path));
    for _ in 0..20 {
        without.expect("try", "held");
        assert_eq!(first_line(&path), without.pid().to_string());
        assert!(lock(&path).try_lock().unwrap_err().is_held());
        waiter.tell_to_wait("lock");
        without.expect("release", "released");
        assert_eq!(waiter.answer(), "held");
        waiter.expect("release", "released");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}

#[test]
fn a_record_is_held_while_its_owner_lives_even_without_the_lock() {
    // This is the case when a daemon closes all its descriptors.
    let (_directory, path) = place();
    let elsewhere = path.with_file_name("elsewhere.pid");
    let mut owner = Actor::start(&spec(&elsewhere));
    owner.expect("try", "held");
    Left::at(&elsewhere).put(&path);
    let error = lock(&path).try_lock().unwrap_err();
    assert!(error.is_held());
    assert_eq!(error.owner().unwrap().pid(), owner.pid());
    let mut waiter = Actor::start(&spec(&path));
    waiter.tell_to_wait("lock");
    waiter.expect_silence();
    owner.kill();
    assert_eq!(waiter.answer(), format!("held recovered {}", owner.pid()));
}

#[cfg(target_os = "linux")]
#[test]
fn pidfile_of_other_host_kept_and_of_this_machine_taken_over() {
    let (_directory, path) = place();
    let left = Left::by_the_killed();
    let another_boot = left.with_other(BOOT);
    for (case, record, taken) in [
        ("as it was left", &left, true),
        ("a later process has the pid", &left.with_other(START), true),
        ("before a reboot", &another_boot, true),
        // The write lock that its owner held for life is free, on this same kernel.
        ("in a container that was killed", &left.with_other(NAMESPACE), true),
        ("on another host", &another_boot.with_other(HOST), false),
    ] {
        record.put(&path);
        match taken {
            true => {
                assert!(PidFile::is_stale(&path).unwrap(), "{case}");
                let guard = lock(&path).try_lock().expect(case);
                assert_eq!(guard.recovered().unwrap().owner().unwrap().pid(), left.pid);
            }
            false => {
                assert!(lock(&path).try_lock().unwrap_err().is_held(), "{case}");
                assert!(!PidFile::is_stale(&path).unwrap() && !PidFile::remove_stale(&path).unwrap(), "{case}");
                assert!(matches!(PidFile::inspect(&path).unwrap(), PidStatus::Running(_)), "{case}");
                assert_eq!(text(&path), record.text);
            }
        }
    }
}

#[test]
fn only_a_stale_file_is_removed() {
    let (_directory, path) = place();
    assert!(!PidFile::remove_stale(&path).unwrap());
    for left in [None, Some(Left::by_the_killed())] {
        match left {
            Some(left) => left.put(&path),
            None => write(&path, format!("{DEAD}\n")),
        }
        assert!(PidFile::is_stale(&path).unwrap() && path.exists());
        assert!(PidFile::remove_stale(&path).unwrap());
        assert!(!path.exists());
    }
    let mut holder = Actor::start(&spec(&path));
    holder.expect("try", "held");
    assert!(!PidFile::remove_stale(&path).unwrap());
    assert_eq!(first_line(&path), holder.pid().to_string());
}

#[test]
fn inspect_during_changes_sees_no_partial_record() {
    if wine_cannot_judge(DELETED) {
        return;
    }
    let (_directory, path) = place();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let look = || {
            let mut looks = 0;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                match PidFile::inspect(&path).unwrap() {
                    PidStatus::Running(owner) => assert_eq!(owner.pid(), std::process::id()),
                    PidStatus::Stale(owner) => assert_eq!(owner.pid(), DEAD),
                    PidStatus::Absent => {}
                    other => panic!("half a record: {other:?}"),
                }
                looks += 1;
            }
            looks
        };
        let looker = scope.spawn(look);
        for _ in 0..5000 {
            let guard = lock(&path).try_lock().unwrap();
            guard.release().unwrap();
            // The file is written under another name first, because a file that is written in place may be seen empty.
            let ready = path.with_extension("new");
            write(&ready, format!("{DEAD}\n"));
            fs::rename(&ready, &path).unwrap();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        println!("{} looks", looker.join().unwrap());
    });
}

/// Tests a daemon that forks, and contenders that wait for its pidfile all the time.
#[cfg(target_os = "linux")]
fn daemonized(order: &str) {
    let (_directory, path) = place();
    let mut daemon = Actor::start_with(&spec(&path), |command| {
        *command = Command::new(program("daemon"));
        command.arg(&path).arg(order).stdin(Stdio::piped()).stdout(Stdio::piped());
    });
    assert_eq!(daemon.answer(), "held");
    let parent = daemon.pid().to_string();
    assert_eq!(first_line(&path), parent);
    let [mut waits, mut polls] = [(); 2].map(|()| Actor::start(&spec(&path)));
    waits.tell_to_wait("lock");
    polls.tell_to_wait("lock-for 30000");

    let child = daemon.ask("fork");
    let child = child.strip_prefix("forked ").expect(&child).to_owned();
    assert!(child != parent && first_line(&path) == parent);
    assert!(lock(&path).try_lock().unwrap_err().is_held());
    daemon.expect("rewrite", "rewritten");
    assert_eq!(first_line(&path), child);
    assert_eq!(lock(&path).try_lock().unwrap_err().owner().unwrap().pid().to_string(), child);
    waits.expect_silence();
    polls.expect_silence();
    // The proof is not the record alone: the parent's end has not unlocked the file either, unless the child had closed
    // it.
    if let Some(flock) = installed("flock").filter(|_| order != "closes") {
        let free = Command::new(flock).arg("--nonblock").arg(&path).arg("true").status().unwrap();
        assert_eq!(free.code(), Some(1));
    }

    daemon.expect("release", "released");
    // Neither guard reports a death, and each waiter acquires in turn.
    let (mut first, mut second) = (waits, polls);
    until("one of them is in", || first_line_if_any(&path).is_some());
    if first_line_if_any(&path) != Some(first.pid().to_string()) {
        std::mem::swap(&mut first, &mut second);
    }
    assert_eq!(first.answer(), "held");
    first.expect("release", "released");
    assert_eq!(second.answer(), "held");
}

#[cfg(target_os = "linux")]
fn first_line_if_any(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.lines().next()?.to_owned())
}

#[cfg(target_os = "linux")]
#[test]
fn daemon_keeps_pidfile_when_parent_exits_before_rewrite() {
    for _ in 0..10 {
        daemonized("parent");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn daemon_keeps_pidfile_when_parent_exits_after_rewrite() {
    for _ in 0..10 {
        daemonized("child");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn c7_daemon_that_closes_all_descriptors_keeps_its_file() {
    for _ in 0..10 {
        daemonized("closes");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_daemon_that_is_killed_after_its_fork_is_recovered_from() {
    let (_directory, path) = place();
    let mut daemon = Actor::start_with(&spec(&path), |command| {
        *command = Command::new(program("daemon"));
        command.arg(&path).arg("parent").stdin(Stdio::piped()).stdout(Stdio::piped());
    });
    assert_eq!(daemon.answer(), "held");
    let child = daemon.ask("fork");
    let child: u32 = child.strip_prefix("forked ").expect(&child).parse().unwrap();
    daemon.expect("rewrite", "rewritten");
    let mut waiter = Actor::start(&spec(&path));
    waiter.tell_to_wait("lock");
    lockkit_tests::helper_process::signal_pid(child, rustix::process::Signal::KILL);
    assert_eq!(waiter.answer(), format!("held recovered {child}"));
}

#[cfg(target_os = "linux")]
#[test]
fn service_managers_read_the_pid_out_of_the_first_line() {
    let (_directory, path) = place();
    let _guard = lock(&path).try_lock().unwrap();
    // systemd reads one line, strips spaces and wants a number; a shell reads a word.
    let read = |script: &str| {
        let output = Command::new("sh").args(["-c", script]).arg(&path).output().unwrap();
        assert!(output.status.success(), "{script}: {output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(read("head -n 1 \"$0\""), my_pid());
    assert_eq!(read("read pid < \"$0\" && echo $pid"), my_pid());
    assert_eq!(read("read pid < \"$0\" && kill -0 $pid && echo alive"), "alive");
}

/// Returns the program, if it is installed.
#[cfg(target_os = "linux")]
fn installed(name: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin";
    path.split(':').map(|directory| Path::new(directory).join(name)).find(|path| path.is_file())
}

#[cfg(target_os = "linux")]
#[test]
fn start_stop_daemon_and_lockkit_understand_each_other() {
    let Some(tool) = installed("start-stop-daemon") else {
        return lockkit_tests::left_out("there is no start-stop-daemon here");
    };
    let (_directory, path) = place();
    let run = |arguments: &[&str]| {
        let mut command = Command::new(&tool);
        command.args(arguments).arg("--pidfile").arg(&path).args(["--exec", "/bin/sleep"]);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command
    };
    let started = run(&["--start", "--background", "--make-pidfile"]).args(["--", "600"]).status().unwrap();
    assert!(started.success());
    // The program writes the file in place, so for a moment the file may be empty.
    let pid = || match PidFile::inspect(&path).unwrap() {
        PidStatus::Running(owner) => Some(owner.pid()),
        _ => None,
    };
    until("it has written its file", || pid().is_some());
    let daemon = pid().unwrap();
    println!("start-stop-daemon wrote {:?}", text(&path));
    until("it runs the program", || {
        fs::read_to_string(format!("/proc/{daemon}/comm")).is_ok_and(|name| name.trim() == "sleep")
    });
    let error = lock(&path).try_lock().unwrap_err();
    assert_eq!(error.owner().map(|owner| owner.pid()), Some(daemon));
    assert!(run(&["--stop", "--retry", "10"]).status().unwrap().success());
    let guard = lock(&path).lock_for(lockkit_tests::LIVELY).unwrap();
    assert_eq!(guard.recovered().unwrap().owner().unwrap().pid(), daemon);
    // The tool reads our pidfile.
    let mut status = Command::new(&tool);
    status.arg("--status").arg("--pidfile").arg(&path);
    assert_eq!(status.status().unwrap().code(), Some(0), "running");
    drop(guard);
    assert_eq!(status.status().unwrap().code(), Some(3), "not running");
}

#[cfg(target_os = "linux")]
#[test]
fn the_pidfile_of_nginx_is_honoured() {
    let Some(nginx) = installed("nginx") else {
        return lockkit_tests::left_out("there is no nginx here");
    };
    let (directory, path) = place();
    let config = directory.path().join("nginx.conf");
    let at = directory.path().display();
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|what| format!("{what}_temp_path {at}/{what};\n"))
        .concat();
    write(
        &config,
        format!(
            "pid {at}/app.pid;\nerror_log {at}/error.log;\nevents {{}}\n\
             http {{\n{temporary}access_log off;\nserver {{ listen unix:{at}/socket; }}\n}}\n"
        ),
    );
    let run = |extra: &[&str]| {
        let status = Command::new(&nginx).arg("-p").arg(directory.path()).arg("-c").arg(&config).args(extra).status();
        assert!(status.unwrap().success());
    };
    run(&[]);
    until("nginx has written its file", || matches!(PidFile::inspect(&path).unwrap(), PidStatus::Running(_)));
    println!("nginx wrote {:?}", text(&path));
    // A signal that arrives before nginx has workers may be lost.
    let master = text(&path).trim().to_owned();
    until("nginx has a worker", || {
        fs::read_to_string(format!("/proc/{master}/task/{master}/children")).is_ok_and(|children| !children.is_empty())
    });
    let error = lock(&path).try_lock().unwrap_err();
    assert_eq!(error.owner().unwrap().program(), Some("nginx"));
    assert_eq!(error.owner().unwrap().pid().to_string(), text(&path).trim());
    run(&["-s", "stop"]);
    lock(&path).lock_for(lockkit_tests::LIVELY).unwrap().release().unwrap();
}

/// Contents of files that are not pidfiles, each with its name.
const NO_PIDFILES: [(&str, &[u8]); 16] = [
    ("a configuration", b"key = value\n"),
    ("a negative number", b"-1"),
    ("zero", b"0\n"),
    ("a letter", b"a"),
    ("hexadecimal", b"0x1"),
    ("an underscore", b"1_0"),
    ("a letter behind the number", b"12x\n"),
    ("beyond all pids", b"99999999999999999999\n"),
    ("a lock file of Emacs", b"user@host.4242:1700000000"),
    ("a free lease", b"lockkit lease 1\n"),
    ("binary UUCP", &10_000_u32.to_ne_bytes()),
    ("binary UUCP that reads as white space", &8224_u32.to_ne_bytes()),
    ("PostgreSQL in single-user mode", b"-4242\n/var/lib/postgresql/17/main\n1700000000\n"),
    ("a lock file of Chromium", b"host-4242"),
    ("an escape sequence", b"\x1b[2J"),
    ("a script", b"#!/bin/sh\necho 1\n"),
];

#[test]
fn a2_file_without_pid_is_refused_and_kept() {
    let (directory, path) = place();
    for (case, said) in NO_PIDFILES {
        for age in [Duration::ZERO, OLD, LONG_AGO * 100] {
            write_ago(&path, said, age);
            assert!(matches!(PidFile::inspect(&path).unwrap(), PidStatus::Invalid { .. }), "{case}");
            for error in [
                lock(&path).try_lock().unwrap_err(),
                lock(&path).lock().unwrap_err(),
                lock(&path).lock_for(LIVELY).unwrap_err(),
                PidFile::is_stale(&path).unwrap_err(),
                PidFile::remove_stale(&path).unwrap_err(),
            ] {
                assert!(matches!(error.kind(), ErrorKind::NotAPidFile { path: told, .. } if *told == path), "{error}");
                assert!(!error.to_string().contains(char::is_control), "{case}: {error}");
            }
            assert_eq!(fs::read(&path).unwrap(), said, "{case}");
            assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "{case}");
        }
    }
}

#[test]
fn a2_wait_file_stops_being_pidfile_fails() {
    let (_directory, path) = place();
    let daemon = Foreign::start();
    write(&path, daemon.pid().to_string());
    for command in ["lock", "lock-for 30000"] {
        let mut waiter = Actor::start(&spec(&path));
        waiter.tell_to_wait(command);
        write(&path, "key = value\n");
        let answer = waiter.answer();
        assert!(answer.starts_with("error NotAPidFile"), "{answer}");
        assert_eq!(text(&path), "key = value\n");
        write(&path, daemon.pid().to_string());
    }
}

/// The forms in which programs write the pid `{}`.
const FORMS: [(&str, &str); 18] = [
    ("nginx, redis, mysqld, cron", "{}\n"),
    ("a program that writes no line end", "{}"),
    ("the X server, UUCP", "{:>10}\n"),
    ("minicom", "{:>10} minicom root\n"),
    ("minicom of another version", "{:>05} minicom root\n"),
    ("gammu", "{:>10} gammu\n"),
    ("a script that writes the date", "{} 2026-01-01\n"),
    ("postfix", "              {}\n"),
    ("leading zeros", "000{}\n"),
    ("a blank line first", "\n{}\n"),
    ("blank lines of Windows first", "\r\n \t\r\n{}\r\n"),
    ("PostgreSQL", "{}\n/var/lib/postgresql/17/main\n1700000000\n5432\n/run/postgresql\n*\n"),
    ("sendmail", "{}\n/usr/sbin/sendmail -bd -q30m\n"),
    ("haproxy", "4194304\n{}\n4194303\n"),
    ("RHEL and LSB", "4194304 {}\n"),
    ("a C string with its end", "{}\0"),
    ("a C buffer", "{}\n\0\0\0\0\0\0\0"),
    ("words behind it", "{} started by init\n"),
];

/// Returns the form with the pid inserted.
fn written_by(form: &str, pid: u32) -> String {
    let padded = form.replace("{:>10}", &format!("{pid:>10}")).replace("{:>05}", &format!("{pid:05}"));
    padded.replace("{}", &pid.to_string())
}

#[test]
fn a3_forms_of_other_programs_are_read() {
    let (_directory, path) = place();
    let daemon = Foreign::start();
    for (program, form) in FORMS {
        let said = written_by(form, daemon.pid());
        write_ago(&path, &said, OLD);
        let status = PidFile::inspect(&path).unwrap();
        assert!(matches!(&status, PidStatus::Running(owner) if owner.pid() == daemon.pid()), "{program}: {status:?}");
        let error = lock(&path).try_lock().expect_err(program);
        assert_eq!(error.owner().map(|owner| owner.pid()), Some(daemon.pid()), "{program}: {error}");
        assert!(!PidFile::is_stale(&path).unwrap() && !PidFile::remove_stale(&path).unwrap(), "{program}");
        assert_eq!(text(&path), said, "{program}");

        write_ago(&path, written_by(form, DEAD), OLD);
        assert!(PidFile::is_stale(&path).unwrap(), "{program}");
        let guard = lock(&path).try_lock().expect(program);
        assert!(guard.recovered().is_some(), "{program}");
        assert_eq!(text(&path), format!("{}\n", my_pid()), "{program}");
    }
}

#[cfg(unix)]
#[test]
fn a3_pid_and_name_of_this_host_is_read() {
    let (_directory, path) = place();
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let daemon = Foreign::start();
    write_ago(&path, format!("{} {host}", daemon.pid()), OLD);
    let error = lock(&path).try_lock().unwrap_err();
    assert_eq!(error.owner().map(|owner| owner.pid()), Some(daemon.pid()), "{error}");
    write_ago(&path, format!("{DEAD} {host}"), OLD);
    assert!(lock(&path).try_lock().unwrap().recovered().is_some());
}

#[test]
fn a3_pid_of_perhaps_another_host_is_held() {
    let (_directory, path) = place();
    for said in [
        format!("{DEAD} elsewhere.example.org"),
        format!("{DEAD} elsewhere\n"),
        // The format of QLockFile.
        format!("{DEAD}\nkate\nelsewhere\nabcdef0123456789\n0f0f-1e1e\n"),
    ] {
        write_ago(&path, &said, LONG_AGO);
        let error = lock(&path).try_lock().unwrap_err();
        assert!(error.is_held() && error.owner().unwrap().host().unwrap().starts_with("elsewhere"), "{error}");
        assert!(!PidFile::is_stale(&path).unwrap() && !PidFile::remove_stale(&path).unwrap());
        assert_eq!(text(&path), said);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a3_blank_file_with_lock_of_another_program_is_held() {
    let (_directory, path) = place();
    let Some(python) = python() else { return lockkit_tests::left_out("there is no python3 here") };
    // apt and dpkg lock in this way, and so does pidfile(3) of BSD before it writes.
    for (kind, program) in [
        (
            "fcntl",
            "import fcntl,sys; f=open(sys.argv[1],'r+'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); sys.stdin.read()",
        ),
        (
            "flock",
            "import fcntl,sys; f=open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); sys.stdin.read()",
        ),
    ] {
        for said in [String::new(), "\n".to_owned(), format!("{DEAD}\n")] {
            write_ago(&path, &said, LONG_AGO);
            let mut holder = Command::new(&python)
                .args(["-c", program])
                .arg(&path)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut line = String::new();
            std::io::BufRead::read_line(&mut std::io::BufReader::new(holder.stdout.as_mut().unwrap()), &mut line)
                .unwrap();
            let status = PidFile::inspect(&path).unwrap();
            let error = lock(&path).try_lock().unwrap_err();
            let stale = PidFile::remove_stale(&path).unwrap();
            let pid = holder.id();
            holder.kill().unwrap();
            holder.wait().unwrap();
            assert!(matches!(&status, PidStatus::Running(owner) if owner.pid() == pid), "{kind} {said:?}: {status:?}");
            assert!(error.is_held() && !stale, "{kind} {said:?}: {error}");
            assert_eq!(text(&path), said);
            drop(lock(&path).try_lock().unwrap());
        }
    }
}

#[test]
fn a4_file_is_the_pid_and_a_line_end() {
    let (_directory, path) = place();
    let mut guard = lock(&path).try_lock().unwrap();
    assert_eq!(text(&path), format!("{}\n", my_pid()));
    guard.rewrite().unwrap();
    assert_eq!(text(&path), format!("{}\n", my_pid()));
    let child = Foreign::start();
    guard.rewrite_for(&lockkit::Owner::of(child.pid()).unwrap()).unwrap();
    assert_eq!(text(&path), format!("{}\n", child.pid()));
    drop(guard);
    write_ago(&path, format!("{DEAD}\n{}", "a long line\n".repeat(100)), OLD);
    let _guard = lock(&path).try_lock().unwrap();
    assert_eq!(text(&path), format!("{}\n", my_pid()));
}

#[cfg(target_os = "linux")]
#[test]
fn a4_readers_find_the_pid_alone() {
    let (_directory, path) = place();
    let mut guard = lock(&path).try_lock().unwrap();
    let child = Foreign::start();
    guard.rewrite_for(&lockkit::Owner::of(child.pid()).unwrap()).unwrap();
    let pid = child.pid().to_string();
    // The last two read as LSB and RHEL do, and as the crates that compare the whole file with a number.
    for (reader, script) in [
        ("a shell", "cat \"$0\" | wc -w | grep -qx 1 && for p in $(cat \"$0\"); do echo $p; done"),
        ("kill", "kill -0 $(cat \"$0\") && cat \"$0\""),
        ("pgrep", "pgrep -F \"$0\""),
        ("pgrep", "pgrep -L -F \"$0\""),
        ("systemd", "head -n 1 \"$0\""),
        (
            "LSB",
            "read line < \"$0\"; for p in $line; do [ -z \"${p##*[!0-9]*}\" ] || [ ! -d \"/proc/$p\" ] || echo $p; done",
        ),
        ("nightlyone", "[ \"$(wc -l < \"$0\")\" -eq 1 ] && tr -d '\\n' < \"$0\""),
    ] {
        let output = Command::new("sh").args(["-c", script]).arg(&path).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), pid, "{reader}: {output:?}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a4_file_without_identity_is_judged_by_its_time() {
    let (_directory, path) = place();
    let mut holder = Actor::start(&spec(&path));
    holder.expect("try", "held");
    assert!(identity(&path).is_some_and(|identity| identity.len() <= 64));
    rustix::fs::removexattr(&path, IDENTITY).unwrap();
    assert!(lock(&path).try_lock().unwrap_err().is_held());
    let mut waiter = Actor::start(&spec(&path));
    waiter.tell_to_wait("lock");
    holder.kill();
    assert_eq!(waiter.answer(), format!("held recovered {}", holder.pid()));
    waiter.expect("release", "released");
}

#[cfg(target_os = "linux")]
#[test]
fn a4_identity_counts_only_for_what_it_was_set_for() {
    let (_directory, path) = place();
    // A program of a later process with the same pid writes into the file that a killed process left.
    let daemon = Foreign::start();
    let mut guard = lock(&path).try_lock().unwrap();
    guard.rewrite_for(&lockkit::Owner::of(daemon.pid()).unwrap()).unwrap();
    let left = Left::at(&path).with_other(START);
    drop(guard);
    left.put(&path);
    assert!(matches!(PidFile::inspect(&path).unwrap(), PidStatus::Stale(_)));
    write(&path, &left.text);
    assert!(identity(&path).is_some(), "writing leaves it there");
    assert!(matches!(PidFile::inspect(&path).unwrap(), PidStatus::Running(owner) if owner.pid() == daemon.pid()));
    assert!(lock(&path).try_lock().unwrap_err().is_held());
}

/// Returns a Python that every user may run.
#[cfg(target_os = "linux")]
fn python() -> Option<PathBuf> {
    Some(PathBuf::from("/usr/bin/python3")).filter(|path| path.is_file())
}

/// Starts processes of a user that hold and wait for every lock that a reader of the file can request.
#[cfg(target_os = "linux")]
fn reader_with_all_locks(path: &Path, uid: u32) -> Option<Vec<Child>> {
    let Some(python) = python() else {
        lockkit_tests::left_out("there is no python3 here");
        return None;
    };
    let program = "\
import fcntl,os,sys
f=open(sys.argv[1]); how=sys.argv[2]; kind=fcntl.LOCK_SH if how.endswith('sh') else fcntl.LOCK_EX
print(1, flush=True)
if how.startswith('flock'):
    fcntl.flock(f, kind)
elif how == 'fcntl':
    fcntl.lockf(f, fcntl.LOCK_SH)
elif how == 'ofd':
    import struct
    fcntl.fcntl(f, 38, struct.pack('hhqqi4x', fcntl.F_RDLCK, 0, 0, 0, 0))
print(2, flush=True)
sys.stdin.read()";
    let start = |how: &str| {
        let mut command = Command::new(&python);
        command.args(["-c", program]).arg(path).arg(how).uid(uid).gid(uid).current_dir("/");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        let out = child.stdout.as_mut().unwrap();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line).unwrap();
        assert_eq!(line, "1\n", "{how} opens the file");
        child
    };
    let children: Vec<_> = ["flock-ex", "flock-sh", "fcntl", "ofd", "flock-ex", "flock-sh"].map(start).into();
    let asleep = |child: &Child| lockkit_tests::sleeps(child.id(), child.id());
    until("they have their locks, or wait for them", || children.iter().all(asleep));
    Some(children)
}

#[cfg(target_os = "linux")]
#[test]
fn a5_reader_of_pidfile_cannot_delay_restart() {
    let Some(user) = lockkit_tests::another_user() else { return };
    let (directory, path) = place();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    for with_identity in [true, false] {
        let mut daemon = Actor::start(&spec(&path));
        daemon.expect("try", "held");
        if !with_identity {
            rustix::fs::removexattr(&path, IDENTITY).unwrap();
        }
        let Some(mut readers) = reader_with_all_locks(&path, user.uid) else { return };
        let mut waiter = Actor::start(&spec(&path));
        waiter.tell_to_wait("lock");
        assert!(lock(&path).try_lock().unwrap_err().is_held());
        daemon.kill();
        assert_eq!(waiter.answer(), format!("held recovered {}", daemon.pid()));
        waiter.kill();

        let Some(more) = reader_with_all_locks(&path, user.uid) else { return };
        readers.extend(more);
        assert!(matches!(PidFile::inspect(&path).unwrap(), PidStatus::Stale(owner) if owner.pid() == waiter.pid()));
        assert!(PidFile::is_stale(&path).unwrap());
        let start = Instant::now();
        let guard = lock(&path).try_lock().unwrap();
        println!("the restart took {:?}", start.elapsed());
        assert_eq!(guard.recovered().unwrap().owner().unwrap().pid(), waiter.pid());
        drop(guard);

        let mut daemon = Actor::start(&spec(&path));
        daemon.expect("try", "held");
        let Some(more) = reader_with_all_locks(&path, user.uid) else { return };
        readers.extend(more);
        daemon.kill();
        assert!(PidFile::remove_stale(&path).unwrap() && !path.exists());
        for mut reader in readers {
            reader.kill().unwrap();
            reader.wait().unwrap();
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a5_file_of_takers_is_closed_to_readers() {
    if !lockkit_tests::failpoint::are_enabled() {
        return;
    }
    let (directory, path) = place();
    let taker = directory.path().join(".app.pid.lockkit");
    let mut seen = 0;
    for at in 1.. {
        write(&path, format!("{DEAD}\n"));
        let mut victim = Actor::start_with(&spec(&path), |command| {
            command.arg("steps").arg("alone");
        });
        victim.expect(&at.to_string(), "ready");
        let last = victim.ask("go");
        victim.kill();
        if let Ok(found) = fs::metadata(&taker) {
            seen += 1;
            assert_eq!(found.permissions().mode() & 0o777, 0o600, "killed at step {at}");
        }
        // The round also covers an acquisition without a pidfile.
        if at % 2 == 0 {
            let _ = fs::remove_file(&path);
        }
        lock(&path).try_lock().unwrap().release().unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "killed at step {at}");
        if last.starts_with("passed ") {
            break;
        }
    }
    assert!(seen > 0, "it was never left");
}

#[test]
fn a2_file_by_the_name_of_the_file_of_takers_is_kept() {
    let (directory, path) = place();
    let taker = directory.path().join(".app.pid.lockkit");
    for (said, left) in
        [("precious notes", Some(format!("{DEAD}\n"))), ("4242 and more", None), ("12x", Some(String::new()))]
    {
        fs::write(&taker, said).unwrap();
        set_age(&taker, LONG_AGO);
        let _ = fs::remove_file(&path);
        if let Some(left) = &left {
            write_ago(&path, left, OLD);
        }
        let mut errors = vec![lock(&path).try_lock().unwrap_err(), lock(&path).lock_for(LIVELY).unwrap_err()];
        if left.as_ref().is_some_and(|left| !left.is_empty()) {
            errors.extend([PidFile::is_stale(&path).unwrap_err(), PidFile::remove_stale(&path).unwrap_err()]);
        }
        for error in errors {
            assert!(matches!(error.kind(), ErrorKind::Insecure { path: told, .. } if *told == taker), "{error}");
        }
        assert_eq!((text(&taker), fs::read_to_string(&path).ok()), (said.to_owned(), left));
    }
    // The content that a killed process left.
    for said in ["", "\n", "4194304\n"] {
        fs::write(&taker, said).unwrap();
        write(&path, format!("{DEAD}\n"));
        assert!(PidFile::is_stale(&path).unwrap());
        lock(&path).try_lock().unwrap().release().unwrap();
        assert!(!taker.exists());
    }
}

#[cfg(target_os = "linux")]
#[test]
fn b6_is_stale_and_remove_stale_agree_on_the_file_of_takers() {
    let Some(user) = lockkit_tests::another_user() else { return };
    let (directory, path) = place();
    let taker = directory.path().join(".app.pid.lockkit");
    fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
    write(&path, format!("{DEAD}\n"));
    fs::create_dir(&taker).unwrap();
    for error in [PidFile::is_stale(&path).unwrap_err(), PidFile::remove_stale(&path).unwrap_err()] {
        assert!(matches!(error.kind(), ErrorKind::Insecure { .. }), "{error}");
    }
    fs::remove_dir(&taker).unwrap();
    // The taker file belongs to root, and no other user may open it. The result is an error, after a short time in
    // which another process could remove the file.
    write(&taker, "");
    fs::set_permissions(&taker, Permissions::from_mode(0o600)).unwrap();
    let mut other = Actor::start_as(&spec(&path), user.uid);
    let answer = other.ask("try");
    assert!(answer.starts_with("error Io") && answer.contains(".app.pid.lockkit"), "{answer}");
    other.tell_to_wait("lock");
    fs::remove_file(&taker).unwrap();
    assert_eq!(other.answer(), format!("held recovered {DEAD}"));
}

#[cfg(target_os = "linux")]
#[test]
fn c7_process_that_closed_the_descriptor_holds_once() {
    let (_directory, path) = place();
    let mut victim = Actor::start(&spec(&path));
    victim.expect("lock", "held");
    victim.expect("close-all", "closed");
    victim.expect("set-aside", "aside");
    let answer = victim.ask("try");
    assert!(answer.starts_with("error Held"), "{answer}");
    victim.expect("drop-aside", "dropped");
    assert!(!path.exists());
    victim.expect("try", "held");
    victim.expect("others", "kept");
    // A program that replaces the process by exec has the pid, and no guard.
    victim.expect("close-all", "closed");
    assert_eq!(first_line(&path), victim.pid().to_string());
}

#[cfg(unix)]
#[test]
fn a10_mode_that_shuts_the_owner_out_is_refused() {
    let (directory, path) = place();
    for mode in [0o044, 0, 0o200, 0o100_644] {
        let errors = [
            lock(&path).create_with_mode(mode).try_lock().unwrap_err(),
            lockkit::FileLock::new(&path).create_with_mode(mode).try_lock().unwrap_err(),
        ];
        for error in errors {
            assert!(matches!(error.kind(), ErrorKind::InvalidOption { option: "create_with_mode", .. }), "{error}");
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a3_flock_of_a_hidden_process_counts_and_a_strangers_does_not() {
    let Some(user) = lockkit_tests::another_user() else { return };
    if !Command::new("unshare").args(["--pid", "--fork", "true"]).status().is_ok_and(|status| status.success()) {
        return lockkit_tests::left_out("a pid namespace is not allowed here");
    }
    let (directory, path) = place();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    for said in [String::new(), format!("{DEAD}\n")] {
        write_ago(&path, &said, OLD);
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        // The lock belongs to root, outside the namespace of the process that asks.
        let daemon = File::open(&path).unwrap();
        rustix::fs::flock(&daemon, rustix::fs::FlockOperation::LockExclusive).unwrap();
        let mut inside = Actor::start_with(&spec(&path), |command| {
            let (program, spec) = (command.get_program().to_owned(), command.get_args().next().unwrap().to_owned());
            *command = Command::new("unshare");
            command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]).arg(program).arg(spec);
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
        });
        let answer = inside.ask("try");
        assert!(answer.starts_with("error Held"), "{said:?}: {answer}");
        assert_eq!(text(&path), said);
        drop(daemon);
        // The lock belongs to another user. The process that acquired it has ended, and another process that root can
        // see holds it.
        let mut stranger = Command::new("sh");
        stranger.args(["-c", "exec 9<\"$0\"; flock 9 && echo 1 && exec sleep 600"]).arg(&path);
        let mut stranger =
            stranger.uid(user.uid).gid(user.uid).current_dir("/").stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stranger.stdout.take().unwrap()), &mut line).unwrap();
        assert_eq!(line, "1\n");
        lock(&path).try_lock().unwrap().release().unwrap();
        stranger.kill().unwrap();
        stranger.wait().unwrap();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a5_stopped_taker_is_held_and_no_wait_for_ever() {
    let (directory, path) = place();
    let taker = directory.path().join(".app.pid.lockkit");
    let stopped = File::create(&taker).unwrap();
    let mut holder = Actor::start(&spec(&taker.with_file_name("other.pid")));
    holder.expect("try", "held");
    // A stopped taker has this lock: the write lock on the taker file.
    assert!(
        nix::fcntl::fcntl(
            &stopped,
            nix::fcntl::FcntlArg::F_OFD_SETLK(&nix::libc::flock {
                l_type: nix::libc::F_WRLCK as i16,
                l_whence: 0,
                l_start: 0,
                l_len: 0,
                l_pid: 0,
            })
        )
        .is_ok()
    );
    for said in [Some(format!("{DEAD}\n")), None] {
        match &said {
            Some(said) => write(&path, said),
            None => fs::remove_file(&path).unwrap(),
        }
        let start = Instant::now();
        let error = lock(&path).try_lock().unwrap_err();
        assert!(error.is_held() && error.owner().is_none(), "{error}");
        assert!(lock(&path).lock_for(Duration::from_millis(50)).unwrap_err().is_timeout());
        assert!(!PidFile::remove_stale(&path).unwrap());
        assert!(start.elapsed() < LIVELY / 2);
        assert_eq!(fs::read_to_string(&path).ok(), said);
    }
    drop(stopped);
    lock(&path).try_lock().unwrap().release().unwrap();
    assert!(!taker.exists());
}

#[cfg(target_os = "linux")]
#[test]
fn a6_owner_with_one_descriptor_left_is_judged_after_its_death() {
    let (_directory, path) = place();
    // Each victim has one spare descriptor fewer than the one before.
    for spare in (0..6).rev() {
        let mut victim = Actor::start(&spec(&path));
        victim.expect("owner", "owner none");
        let open = lockkit_tests::Belongings::of(victim.pid()).descriptors() as u64;
        let pid = rustix::process::Pid::from_raw(victim.pid().cast_signed());
        let limit = rustix::process::Rlimit {
            current: Some(open + spare),
            maximum: rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum,
        };
        rustix::process::prlimit(pid, rustix::process::Resource::Nofile, limit).unwrap();
        let answer = victim.ask("try");
        if answer != "held" {
            assert!(answer.contains("(os error 24)"), "{answer}");
            assert!(!path.exists());
            continue;
        }
        assert!(lock(&path).try_lock().unwrap_err().is_held(), "{spare} left");
        victim.kill();
        let guard = lock(&path).try_lock().unwrap();
        assert_eq!(guard.recovered().unwrap().owner().unwrap().pid(), victim.pid(), "{spare} left");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a6_owner_without_proc_is_judged_after_its_death() {
    let (_directory, path) = place();
    let Some(mut victim) = start_without_proc(&spec(&path)) else {
        return lockkit_tests::left_out("mounting a file system is not allowed here");
    };
    victim.expect("try", "held");
    assert_eq!(identity(&path), None, "half an identity");
    assert!(lock(&path).try_lock().unwrap_err().is_held());
    victim.kill();
    let guard = lock(&path).try_lock().unwrap();
    assert_eq!(guard.recovered().unwrap().owner().unwrap().pid(), victim.pid());
    // A process without /proc does not treat a possibly live owner as dead.
    let mut blind = start_without_proc(&spec(&path)).unwrap();
    assert!(blind.ask("try").starts_with("error Held"));
}

#[cfg(target_os = "linux")]
#[test]
fn a7_failed_lock_leaves_file_of_holder() {
    if !lockkit_tests::fault_injection::calls_can_fail() {
        return;
    }
    let (directory, path) = place();
    let taker = directory.path().join(".app.pid.lockkit");
    for error in ["ENOLCK", "ENOMEM", "EIO"] {
        for call in ["flock", "fcntl"] {
            let mut holder = Actor::start(&spec(&path));
            holder.expect("try", "held");
            let mut victim = Actor::start(&spec(&path));
            victim.expect("owner", &format!("owner {}", holder.pid()));
            let mut strace = lockkit_tests::fault_injection::Strace::attach(
                &victim,
                &["-e".to_owned(), format!("inject={call}:error={error}")],
            );
            assert!(victim.ask("try").starts_with("error "), "{call} {error}");
            assert_eq!(first_line(&path), holder.pid().to_string());
            // The taker file shows that another taker is at work.
            holder.kill();
            write(&taker, "");
            assert!(victim.ask("try").starts_with("error "), "{call} {error}");
            strace.end();
            assert!(path.exists(), "{call} {error}");
            // A process with the write lock may remove it, and no other process may.
            assert!(call == "flock" || taker.exists(), "{error}");
            lock(&path).try_lock().unwrap().release().unwrap();
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a10_mode_is_exact_and_default_is_less_the_umask() {
    let (_directory, path) = place();
    let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
    for said in [None, Some(format!("{DEAD}\n"))] {
        let prepare = || said.iter().for_each(|said| write(&path, said));
        for wanted in [0o600, 0o640, 0o644, 0o664, 0o666] {
            prepare();
            let _guard = lock(&path).create_with_mode(wanted).try_lock().unwrap();
            assert_eq!(mode(), wanted);
        }
        for (umask, wanted) in [("000", 0o644), ("022", 0o644), ("027", 0o640), ("077", 0o600)] {
            prepare();
            let mut actor = Actor::start_with(&spec(&path), |command| {
                let (program, spec) = (command.get_program().to_owned(), command.get_args().next().unwrap().to_owned());
                *command = Command::new("sh");
                command.args(["-c", &format!("umask {umask} && exec \"$0\" \"$1\"")]).arg(program).arg(spec);
                command.stdin(Stdio::piped()).stdout(Stdio::piped());
            });
            assert!(actor.ask("try").starts_with("held"));
            assert_eq!(mode(), wanted, "umask {umask}");
            actor.expect("release", "released");
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a10_users_of_a_shared_directory_take_over_in_turn() {
    let (Some(one), Some(other)) = (lockkit_tests::another_user(), lockkit_tests::another_user()) else { return };
    let (directory, path) = place();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
    let mut before = None;
    for uid in [one.uid, other.uid, one.uid] {
        let mut actor = Actor::start_as(&spec(&path), uid);
        let expected = before.map_or("held".to_owned(), |pid| format!("held recovered {pid}"));
        actor.expect("try", &expected);
        assert!(lock(&path).try_lock().unwrap_err().is_held());
        actor.kill();
        before = Some(actor.pid());
    }
    // The taker file of another user's killed process is removed, if this user may open it.
    let taker = directory.path().join(".app.pid.lockkit");
    write(&taker, "4242\n");
    chown(&taker, Some(one.uid), None).unwrap();
    fs::set_permissions(&taker, Permissions::from_mode(0o666)).unwrap();
    Actor::start_as(&spec(&path), other.uid).expect("try", &format!("held recovered {}", before.unwrap()));
    assert!(!taker.exists());
}

lockkit_tests::left_out! { "it takes other users, modes of files, links, signals or small disks, as Linux has them":
    pidfile_waiter_of_foreign_process_sleeps_until_its_exit,
    what_is_no_plain_file_is_refused_at_once,
    service_managers_read_the_pid_out_of_the_first_line,
    the_pidfile_of_nginx_is_honoured,
    start_stop_daemon_and_lockkit_understand_each_other,
    acquire_pidfile_on_full_disk_fails_and_changes_nothing,
    a_file_that_names_this_very_process_is_free_for_it,
    daemon_keeps_pidfile_when_parent_exits_after_rewrite,
    daemon_keeps_pidfile_when_parent_exits_before_rewrite,
    pidfile_on_tmpfs_older_than_boot_is_not_stale,
    pidfile_mode_is_at_most_0644_unless_set,
    pidfile_of_pid_1_is_held_for_unprivileged_user,
    a_file_that_may_not_be_read_or_replaced_is_an_error,
    acquire_in_unwritable_directory_error_names_path,
    pidfile_release_without_directory_permission_blanks_file,
    a_link_is_refused_and_what_it_leads_to_is_not_touched,
    a_small_full_file_system_is_an_error_that_leaves_nothing,
    a_daemon_that_is_killed_after_its_fork_is_recovered_from,
    pidfile_of_other_host_kept_and_of_this_machine_taken_over,
    a3_blank_file_with_lock_of_another_program_is_held,
    a3_flock_of_a_hidden_process_counts_and_a_strangers_does_not,
    a4_readers_find_the_pid_alone,
    a4_file_without_identity_is_judged_by_its_time,
    a4_identity_counts_only_for_what_it_was_set_for,
    a5_reader_of_pidfile_cannot_delay_restart,
    a5_file_of_takers_is_closed_to_readers,
    a5_stopped_taker_is_held_and_no_wait_for_ever,
    a6_owner_with_one_descriptor_left_is_judged_after_its_death,
    a6_owner_without_proc_is_judged_after_its_death,
    a7_failed_lock_leaves_file_of_holder,
    a10_mode_is_exact_and_default_is_less_the_umask,
    a10_users_of_a_shared_directory_take_over_in_turn,
    b6_is_stale_and_remove_stale_agree_on_the_file_of_takers,
    c7_daemon_that_closes_all_descriptors_keeps_its_file,
    c7_process_that_closed_the_descriptor_holds_once,
}
