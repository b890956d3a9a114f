//! Owner: the identity of real processes, and their liveness.
//!
//! Owners of another machine or another time come out of pidfiles, as they do in practice.

use std::env::consts::EXE_SUFFIX;
#[cfg(target_os = "linux")]
use std::fs;
#[cfg(target_os = "linux")]
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use lockkit::{Liveness, Owner, PidFile, PidStatus};
#[cfg(target_os = "linux")]
use lockkit_tests::helper_process::signal_pid;
#[cfg(target_os = "linux")]
use lockkit_tests::until;
use lockkit_tests::{Actor, LIVELY, Spec};
#[cfg(target_os = "linux")]
use rustix::process::Signal;
use tempfile::TempDir;

/// The user that the tests act as when they have the choice.
#[cfg(target_os = "linux")]
const NOBODY: u32 = 65_534;

fn place() -> (TempDir, PathBuf, Spec) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("app.pid");
    let spec = Spec::parse(&format!("pidfile:{}", path.display()));
    (directory, path, spec)
}

/// Returns the owner that the pidfile names.
fn named(path: &Path) -> Owner {
    match PidFile::inspect(path).unwrap() {
        PidStatus::Running(owner) | PidStatus::Stale(owner) => owner,
        nobody => panic!("{nobody:?}"),
    }
}

/// The extended attribute with the identity of a pidfile's owner, and the offsets of its fields.
#[cfg(target_os = "linux")]
const IDENTITY: &str = "user.lockkit";
#[cfg(target_os = "linux")]
const START: usize = 5;
#[cfg(target_os = "linux")]
const BOOT: usize = 13;
#[cfg(target_os = "linux")]
const HOST: usize = 37;

/// Creates a pidfile that names another owner than that of `path`: the bytes at `places` of its
/// identity differ. No process has locked it.
#[cfg(target_os = "linux")]
fn with_other(path: &Path, places: &[usize]) -> PathBuf {
    let copy = path.with_extension("copy");
    fs::copy(path, &copy).unwrap();
    let written = fs::metadata(path).unwrap().modified().unwrap();
    fs::File::options()
        .write(true)
        .open(&copy)
        .unwrap()
        .set_modified(written)
        .unwrap();
    let mut identity = [0; 256];
    let length = rustix::fs::getxattr(path, IDENTITY, &mut identity).unwrap();
    places.iter().for_each(|at| identity[*at] ^= 0x55);
    rustix::fs::setxattr(
        &copy,
        IDENTITY,
        &identity[..length],
        rustix::fs::XattrFlags::empty(),
    )
    .unwrap();
    copy
}

fn sleeper() -> Child {
    lockkit_tests::sleeper(LIVELY * 20).spawn().unwrap()
}

fn end(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[cfg(target_os = "linux")]
fn state(pid: u32) -> char {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit(") ").next().unwrap().chars().next().unwrap()
}

#[cfg(target_os = "linux")]
fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn owner_liveness_follows_process() {
    let child = sleeper();
    let pid = child.id();
    let owner = Owner::of(pid).unwrap();
    assert_eq!(
        (owner.pid(), owner.liveness(), owner.acquired()),
        (pid, Liveness::Alive, None)
    );
    assert_eq!(owner, Owner::of(pid).unwrap());
    end(child);
    assert_eq!(owner.liveness(), Liveness::Dead);
    assert_eq!(Owner::of(pid), None);
}

#[cfg(target_os = "linux")]
#[test]
fn liveness_of_zombie_is_dead() {
    let mut child = sleeper();
    let owner = Owner::of(child.id()).unwrap();
    child.kill().unwrap();
    until("it is a zombie", || state(child.id()) == 'Z');
    assert_eq!(owner.liveness(), Liveness::Dead);
    assert_eq!(Owner::of(child.id()), None);
    child.wait().unwrap();
}

#[cfg(target_os = "linux")]
#[test]
fn liveness_of_stopped_process_is_alive() {
    let child = sleeper();
    let owner = Owner::of(child.id()).unwrap();
    signal_pid(child.id(), Signal::STOP);
    until("it is stopped", || state(child.id()) == 'T');
    assert_eq!(owner.liveness(), Liveness::Alive);
    signal_pid(child.id(), Signal::CONT);
    end(child);
}

#[cfg(target_os = "linux")]
#[test]
fn liveness_of_killed_process_stays_dead() {
    for _ in 0..200 {
        let mut child = sleeper();
        let owner = Owner::of(child.id()).unwrap();
        child.kill().unwrap();
        let mut died = false;
        until("it is a zombie", || {
            let zombie = state(child.id()) == 'Z';
            let dead = owner.liveness() == Liveness::Dead;
            assert!(dead || !died, "it came to life again");
            assert!(dead || !zombie, "a zombie lives");
            died = dead;
            zombie
        });
        child.wait().unwrap();
        assert_eq!(owner.liveness(), Liveness::Dead);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn liveness_of_other_users_process_is_alive() {
    if !is_root() {
        // The refusal of a signal proves that the process exists.
        assert_eq!(
            Owner::of(1).expect("the first process").liveness(),
            Liveness::Alive
        );
        lockkit_tests::left_out("acting as yet another user needs root");
        return;
    }
    let (directory, _, spec) = place();
    fs::set_permissions(
        directory.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    // Another user checks root's process, by the owner's identity and by a bare pid.
    let mut holder = Actor::start(&spec);
    holder.expect("try", "held");
    let mut stranger = Actor::start_as(&spec, NOBODY);
    stranger.expect("owner", &format!("owner {}", holder.pid()));
    assert!(stranger.ask("try").starts_with("error Held"));
    fs::write(spec.at(), "1\n").unwrap();
    stranger.expect("owner", "owner 1");
    // Root checks another user's process.
    let child = Command::new("sleep")
        .arg("600")
        .uid(NOBODY)
        .spawn()
        .unwrap();
    assert_eq!(Owner::of(child.id()).unwrap().liveness(), Liveness::Alive);
    end(child);
}

#[cfg(target_os = "linux")]
#[test]
fn liveness_of_reused_pid_is_dead() {
    let (_directory, path, spec) = place();
    let mut holder = Actor::start(&spec);
    holder.expect("try", "held");
    assert_eq!(named(&path).liveness(), Liveness::Alive);
    let earlier = with_other(&path, &[START]);
    let owner = named(&earlier);
    assert_eq!(
        (owner.pid(), owner.liveness()),
        (holder.pid(), Liveness::Dead)
    );
    assert!(matches!(
        PidFile::inspect(&earlier).unwrap(),
        PidStatus::Stale(_)
    ));
    assert_eq!(Owner::of(holder.pid()).unwrap().liveness(), Liveness::Alive);
}

#[cfg(target_os = "linux")]
#[test]
fn pidfile_owner_is_dead_after_reboot_and_unknown_elsewhere() {
    if !lockkit_tests::is_on_a_host() {
        return;
    }
    let (_directory, path, spec) = place();
    let mut holder = Actor::start(&spec);
    holder.expect("try", "held");
    assert_eq!(
        named(&with_other(&path, &[BOOT])).liveness(),
        Liveness::Dead
    );
    let owner = named(&with_other(&path, &[BOOT, HOST]));
    assert_eq!(owner.liveness(), Liveness::Unknown);
    assert_ne!(owner.host(), Owner::current().host());
    assert!(
        owner.describe().contains(" on host "),
        "{}",
        owner.describe()
    );
}

#[test]
fn holder_in_other_pid_namespace_is_unknown_and_not_taken_over() {
    let allowed = Command::new("unshare")
        .args(["-p", "-f", "--kill-child", "true"])
        .stderr(Stdio::null())
        .status();
    if !allowed.is_ok_and(|status| status.success()) {
        lockkit_tests::left_out("making a pid namespace is not allowed here");
        return;
    }
    let (_directory, path, spec) = place();
    let mut hidden = Actor::start_with(&spec, |command| {
        let (program, spec) = (
            command.get_program().to_owned(),
            command.get_args().next().unwrap().to_owned(),
        );
        *command = Command::new("unshare");
        command
            .args(["-p", "-f", "--kill-child", "--mount-proc"])
            .arg(program)
            .arg(spec);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
    });
    hidden.expect("try", "held");
    // Here pid 1 is another process.
    let owner = named(&path);
    assert_eq!((owner.pid(), owner.liveness()), (1, Liveness::Unknown));
    let text = owner.describe();
    assert!(
        text.starts_with("pid 1 (actor) in another pid namespace, since "),
        "{text}"
    );
    assert!(!PidFile::remove_stale(&path).unwrap());
    let mut taker = Actor::start(&spec);
    assert!(taker.ask("try").starts_with("error Held"));
    taker.tell_to_wait("lock");
    // After the kill this process still cannot look it up from here, but the kernel releases its
    // lock on the file.
    hidden.kill();
    assert_eq!(taker.answer(), "held recovered 1");
    assert_eq!(owner.liveness(), Liveness::Unknown);
}

#[test]
fn pidfile_of_outer_pid_namespace_not_taken_over_inside() {
    let allowed = Command::new("unshare")
        .args(["-p", "-f", "--kill-child", "true"])
        .stderr(Stdio::null())
        .status();
    if !allowed.is_ok_and(|status| status.success()) {
        lockkit_tests::left_out("making a pid namespace is not allowed here");
        return;
    }
    let (_directory, path, spec) = place();
    let mut holder = Actor::start(&spec);
    holder.expect("try", "held");
    let mut inside = Actor::start_with(&spec, |command| {
        let (program, spec) = (
            command.get_program().to_owned(),
            command.get_args().next().unwrap().to_owned(),
        );
        *command = Command::new("unshare");
        command
            .args(["-p", "-f", "--kill-child", "--mount-proc"])
            .arg(program)
            .arg(spec);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
    });
    // The pid does not exist inside, and still no process there takes over the pidfile.
    inside.expect("owner", &format!("owner {}", holder.pid()));
    assert!(inside.ask("try").starts_with("error Held"));
    holder.expect("release", "released");
    inside.expect("try", "held");
    assert_eq!(named(&path).liveness(), Liveness::Unknown);
}

#[test]
fn describe_includes_pid_program_and_time() {
    let (_directory, path, spec) = place();
    let mut holder = Actor::start(&spec);
    holder.expect("try", "held");
    let text = named(&path).describe();
    assert!(
        text.starts_with(&format!(
            "pid {} (actor{EXE_SUFFIX}), since 2",
            holder.pid()
        )),
        "{text}"
    );
    assert!(text.ends_with(" ago)"), "{text}");
}

#[cfg(target_os = "linux")]
#[test]
fn liveness_ignores_proc_of_another_pid_namespace() {
    // The pid inside is the pid of a zombie outside, which the outer /proc still shows.
    let (_directory, path, spec) = place();
    let mut zombie = sleeper();
    zombie.kill().unwrap();
    until("it is a zombie", || state(zombie.id()) == 'Z');
    let script = format!(
        "echo {} > /proc/sys/kernel/ns_last_pid; sleep 600 < /dev/null > /dev/null & echo $! > {}; exec \"$0\" \"$1\"",
        zombie.id() - 1,
        path.display()
    );
    let allowed = Command::new("unshare")
        .args([
            "-p",
            "-f",
            "--kill-child",
            "sh",
            "-c",
            "echo 100 > /proc/sys/kernel/ns_last_pid",
        ])
        .stderr(Stdio::null())
        .status();
    if !allowed.is_ok_and(|status| status.success()) {
        lockkit_tests::left_out("choosing a pid in a namespace is not allowed here");
        return zombie.wait().map(drop).unwrap();
    }
    let mut inside = Actor::start_with(&spec, |command| {
        let (program, spec) = (
            command.get_program().to_owned(),
            command.get_args().next().unwrap().to_owned(),
        );
        *command = Command::new("unshare");
        command
            .args(["-p", "-f", "--kill-child", "sh", "-c", &script])
            .arg(program)
            .arg(spec);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
    });
    until("the file is written", || {
        fs::read_to_string(&path).is_ok_and(|text| text.ends_with('\n'))
    });
    assert_eq!(
        fs::read_to_string(&path).unwrap(),
        format!("{}\n", zombie.id())
    );
    let answer = inside.ask("try");
    assert!(answer.starts_with("error Held"), "{answer}");
    inside.kill();
    zombie.wait().unwrap();
}

lockkit_tests::left_out! { "it takes signals and other users, as Linux has them":
    liveness_of_reused_pid_is_dead,
    pidfile_owner_is_dead_after_reboot_and_unknown_elsewhere,
    liveness_of_zombie_is_dead,
    liveness_of_killed_process_stays_dead,
    liveness_ignores_proc_of_another_pid_namespace,
    liveness_of_stopped_process_is_alive,
    liveness_of_other_users_process_is_alive,
}
