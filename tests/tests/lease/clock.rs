//! Clocks that are wrong, and holders whose liveness is not known here: of other hosts and
//! containers.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use lockkit_tests::leases::{Terms, forge, left_by_the_dead, line};
use lockkit_tests::{Actor, LIVELY, succeeds, until};

use crate::fixture::{
    HOUR, acquire, is_held, read, record_of_other_host, remaining, set_modified, temp_lease, token,
    token_after, wait_for_heartbeats, write,
};

#[test]
fn acquire_ignores_times_in_record_and_of_file() {
    // The records show a step of the wall clock in both directions, and another host's wrong clock.
    for step in [-1, 1] {
        let (_directory, terms) = temp_lease();
        let at = |now: SystemTime| if step < 0 { now - HOUR } else { now + HOUR };
        let moment = at(SystemTime::now())
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap();
        let acquired = format!("{}.000000000 (then)", moment.as_secs());

        // A live holder keeps it.
        let mut holder = Actor::start_lease(&terms);
        let first = acquire(&mut holder, "try");
        // This write may revert a heartbeat between its read and its write. The next heartbeat
        // makes up for it.
        write(&terms, forge(&read(&terms), &[("acquired", &acquired)]));
        set_modified(&terms.path, at(SystemTime::now()));
        assert!(terms.open().try_lock().unwrap_err().is_held());
        wait_for_heartbeats(&terms);
        holder.expect("is-held", "yes");
        holder.expect("losses", "losses");
        holder.expect("release", "released");
        assert!(acquire(&mut holder, "try") > first);
        holder.expect("release", "released");

        // The wait for a holder of unknown liveness lasts for a TTL and no longer.
        write(
            &terms,
            forge(&record_of_other_host(&terms), &[("acquired", &acquired)]),
        );
        set_modified(&terms.path, at(SystemTime::now()));
        let start = Instant::now();
        let lease = terms.open();
        assert!(lease.try_lock().unwrap_err().is_held());
        let guard = lease.lock_for(LIVELY).unwrap();
        assert!(
            start.elapsed() >= Duration::from_millis(terms.ttl),
            "{:?}",
            start.elapsed()
        );
        assert_eq!(
            guard.recovered().unwrap().owner().unwrap().host(),
            Some("elsewhere")
        );
        drop(guard);

        // A dead holder is taken over immediately.
        write(
            &terms,
            forge(&left_by_the_dead(&terms), &[("acquired", &acquired)]),
        );
        set_modified(&terms.path, at(SystemTime::now()));
        assert!(terms.open().try_lock().unwrap().recovered().is_some());
    }
}

/// Returns the library of faketime(1), which shows a program a wall clock of its own.
fn faketime() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let program = std::env::split_paths(&path)
        .map(|directory| directory.join("faketime"))
        .find(|path| path.is_file())?;
    let lib = program.parent()?.parent()?.join("lib");
    let directories = fs::read_dir(&lib)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .chain([lib]);
    directories
        .map(|directory| directory.join("faketime/libfaketime.so.1"))
        .find(|path| path.is_file())
}

#[test]
fn wall_clock_step_by_an_hour_keeps_lease() {
    if cfg!(target_env = "musl") {
        lockkit_tests::left_out("a program that is linked statically reads no preloaded clock");
        return;
    }
    let Some(library) = faketime() else {
        return lockkit_tests::left_out(
            "faketime is not installed; another test checks the effect of a clock step on records",
        );
    };
    let (directory, terms) = temp_lease();
    let clock = directory.path().join("clock");
    let set = |offset: &str| {
        // The file must be complete at every moment, because each clock query reads it.
        fs::write(clock.with_extension("new"), offset).unwrap();
        fs::rename(clock.with_extension("new"), &clock).unwrap();
    };
    let start = || {
        Actor::start_lease_with(&terms, |command| {
            command
                .env("LD_PRELOAD", &library)
                .env("FAKETIME_TIMESTAMP_FILE", &clock);
            command
                .env("FAKETIME_NO_CACHE", "1")
                .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        })
    };
    for step in ["+3600s", "-3600s"] {
        set("+0s");
        let [mut holder, mut waiter] = [(); 2].map(|()| start());
        let first = acquire(&mut holder, "lock");
        waiter.tell_to_wait("lock");
        set(step);
        let begun = Instant::now();
        until("twice the TTL has passed", || {
            holder.expect("is-held", "yes");
            begun.elapsed() > Duration::from_millis(2 * terms.ttl)
        });
        waiter.expect_silence();
        holder.expect("losses", "losses");
        holder.expect("release", "released");
        assert!(token(&waiter.answer()) > first);
        let acquired = line(&read(&terms), "acquired");
        let acquired: i64 = acquired.split('.').next().unwrap().parse().unwrap();
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap()
            .as_secs() as i64;
        assert!(
            (3500..3700).contains(&(acquired - now).abs()),
            "the clock of the holder was not stepped"
        );
        waiter.kill();
        assert!(token_after(&holder.ask("try"), waiter.pid()) > first);
        holder.expect("release", "released");
        holder.kill();
        // The library shares a file with the programs that the process starts. A killed process
        // leaves it behind.
        for pid in [holder.pid(), waiter.pid()] {
            let _ = fs::remove_file(format!("/dev/shm/faketime_shm_{pid}"));
            let _ = fs::remove_file(format!("/dev/shm/sem.faketime_sem_{pid}"));
        }
    }
}

/// Starts an actor through `unshare`(1) with these arguments, after the shell commands `first`.
fn start_unshared(terms: &Terms, arguments: &[&str], first: &str) -> Option<Actor> {
    let command = |program: &[&str]| {
        let mut command = Command::new("unshare");
        command
            .args(arguments)
            .args(["sh", "-ec", &format!("{first}\nexec \"$@\""), "sh"])
            .args(program);
        command
    };
    if !succeeds(&mut command(&["true"])) {
        lockkit_tests::left_out("this machine does not let the test simulate another host");
        return None;
    }
    Some(Actor::start_lease_with(terms, |actor| {
        let program = actor.get_program().to_str().unwrap().to_owned();
        *actor = command(&[&program, "lease", &terms.to_string()]);
        actor.stdin(Stdio::piped()).stdout(Stdio::piped());
    }))
}

/// Starts an actor on another host, as far as this system can simulate one: another name and boot
/// id, and a clock since the start of the system that is an hour ahead.
fn start_on_other_host(terms: &Terms) -> Option<Actor> {
    let boot = terms.path.with_file_name("boot_id");
    fs::write(&boot, "01234567-89ab-cdef-0123-456789abcdef\n").unwrap();
    let clock = fs::read_link("/proc/self/ns/time").ok()?;
    let first = format!(
        "echo elsewhere > /proc/sys/kernel/hostname
        mount --bind {} /proc/sys/kernel/random/boot_id
        [ $(readlink /proc/self/ns/time) != '{}' ]",
        boot.display(),
        clock.display()
    );
    start_unshared(
        terms,
        &[
            "-m",
            "-u",
            "-T",
            "--boottime",
            "3600",
            "--monotonic",
            "3600",
        ],
        &first,
    )
}

/// Starts an actor in another pid namespace, as in a container of its own.
fn start_in_container(terms: &Terms) -> Option<Actor> {
    start_unshared(
        terms,
        &["--pid", "--fork", "--kill-child", "--mount-proc"],
        "",
    )
}

#[test]
fn takeover_between_hosts_with_skewed_clocks_waits_ttl() {
    check_takeover_waits_for_ttl(start_on_other_host, |record| {
        assert!(line(record, "host").starts_with("elsewhere"));
        assert_eq!(line(record, "boot"), "0123456789abcdef0123456789abcdef");
    });
}

#[test]
fn takeover_between_containers_waits_ttl() {
    check_takeover_waits_for_ttl(start_in_container, |record| {
        assert_eq!(line(record, "pid"), "1")
    });
}

/// Tests two actors that cannot determine each other's liveness: an ordinary actor, and an actor
/// from `start`, whose record `check_record` checks.
fn check_takeover_waits_for_ttl(start: fn(&Terms) -> Option<Actor>, check_record: fn(&[u8])) {
    for remote_holds in [true, false] {
        let (_directory, terms) = temp_lease();
        let Some(remote) = start(&terms) else { return };
        let here = Actor::start_lease(&terms);
        let (mut holder, mut other) = if remote_holds {
            (remote, here)
        } else {
            (here, remote)
        };
        let first = acquire(&mut holder, "try");
        if remote_holds {
            check_record(&read(&terms));
        }
        // The holder keeps the lease as long as its heartbeat runs.
        let answer = other.ask(&format!("lock-for {}", 2 * terms.ttl));
        assert!(answer.starts_with("error Timeout"), "{answer}");
        holder.expect("is-held", "yes");
        other.tell("lock");
        other.expect_silence();
        holder.expect("release", "released");
        let second = token(&other.answer());
        assert!(second > first);
        other.expect("release", "released");
        let third = acquire(&mut holder, "lock");
        assert!(third > second);
        let died = line(&read(&terms), "pid").parse().unwrap();
        // The death is not visible there. So the other actor waits until the TTL of the dead holder
        // has passed.
        let asked = Instant::now();
        let left = remaining(&mut holder);
        holder.kill();
        assert!(is_held(&other.ask("try")));
        let fourth = token_after(&other.ask("lock"), died);
        assert!(asked.elapsed() >= left, "{:?} of {left:?}", asked.elapsed());
        assert!(fourth > third);
    }
}
