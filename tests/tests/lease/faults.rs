//! Full disks, failing system calls, kills and stops at any step.

use std::fs;
#[cfg(target_os = "linux")]
use std::os::unix::fs::chown;
use std::time::{Duration, Instant};

use lockkit::ErrorKind;
#[cfg(target_os = "linux")]
use lockkit::FileLock;
#[cfg(target_os = "linux")]
use lockkit_tests::fault_injection::{Strace, calls_can_fail};
#[cfg(target_os = "linux")]
use lockkit_tests::leases::line;
use lockkit_tests::leases::{Terms, left_by_the_dead};
use lockkit_tests::small_disk::SmallDisk;
use lockkit_tests::{Actor, LIVELY, until};
#[cfg(target_os = "linux")]
use lockkit_tests::{another_user, is_stopped};

use crate::fixture::{acquire, heartbeat_number, remaining, temp_lease, terms_on, write};
#[cfg(target_os = "linux")]
use crate::fixture::{inotify_watches, is_held, record_of_other_host, token, wait_for_heartbeats};

#[test]
fn full_disk_leaves_no_partial_file_and_keeps_held_lease() {
    let Some(disk) = SmallDisk::mount("size=64k") else {
        return;
    };
    let terms = terms_on(&disk);
    disk.fill();
    for _ in 0..2 {
        let error = terms.open().try_lock().unwrap_err();
        assert_eq!(
            std::io::Error::from(error).kind(),
            std::io::ErrorKind::StorageFull
        );
        assert_eq!(
            disk.path().read_dir().unwrap().count(),
            1,
            "only the filler is there"
        );
    }
    // The retries do not delay a waiter's deadline.
    let lease = terms
        .builder()
        .acquire_retry_limit(u32::MAX)
        .build()
        .unwrap();
    let error = lease.lock_for(Duration::from_millis(200)).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Io { .. }), "{error}");
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| lease.lock_for(LIVELY));
        disk.make_room();
        drop(waiter.join().unwrap().unwrap());
    });
    let mut holder = Actor::start_lease(&terms);
    acquire(&mut holder, "try");
    disk.fill();
    let (start, from) = (Instant::now(), heartbeat_number(&terms));
    until("twice the TTL has passed", || {
        holder.expect("is-held", "yes");
        start.elapsed() > Duration::from_millis(2 * terms.ttl)
    });
    assert!(heartbeat_number(&terms) > from);
    holder.expect("release", "released");
    acquire(&mut holder, "try");
}

#[test]
fn acquire_without_free_inode_reports_storage_full() {
    let Some(disk) = SmallDisk::mount("size=64k,nr_inodes=1") else {
        return;
    };
    let error = terms_on(&disk).open().try_lock().unwrap_err();
    assert!(
        matches!(
            error.kind(),
            ErrorKind::Io {
                action: "create",
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(
        std::io::Error::from(error).kind(),
        std::io::ErrorKind::StorageFull
    );
}

/// Runs `break_store`, after which a holder cannot renew; `repair` undoes it. The holder must keep
/// its lease until its deadline. If the store is repaired before, the holder continues. Otherwise
/// the holder loses the lease at its deadline, for a reason that contains `because`.
fn check_kept_until_deadline(
    terms: &Terms,
    break_store: impl Fn(&Actor),
    repair: impl Fn(),
    because: &str,
) {
    for repairs in [true, false] {
        let mut holder = Actor::start_lease(&Terms {
            ttl: if repairs { 10_000 } else { terms.ttl },
            ..terms.clone()
        });
        acquire(&mut holder, "try");
        break_store(&holder);
        let asked = Instant::now();
        let left = remaining(&mut holder);
        if repairs {
            until("some renewals are missing", || {
                asked.elapsed() > Duration::from_millis(5 * terms.heartbeat)
            });
            holder.expect("is-held", "yes");
            repair();
            until("the TTL was extended", || {
                let now = asked.elapsed();
                // The gain must exceed that of a heartbeat that was in progress when the store
                // broke.
                now + remaining(&mut holder) > left + Duration::from_millis(3 * terms.heartbeat)
            });
            holder.expect("losses", "losses");
            holder.expect("release", "released");
        } else {
            holder.tell("wait-lost");
            let answer = holder.answer();
            assert!(
                asked.elapsed() >= left,
                "{:?} of {left:?}: {answer}",
                asked.elapsed()
            );
            let answer = answer
                .strip_prefix("lost it could not be renewed in time: ")
                .expect(&answer);
            assert!(answer.contains(because), "{answer}");
            until("the loss is reported", || {
                holder.ask("losses").matches(because).count() == 1
            });
            repair();
        }
    }
}

#[test]
fn renew_deleted_record_on_full_disk_retries_until_deadline() {
    let Some(disk) = SmallDisk::mount("size=64k") else {
        return;
    };
    let aside = disk.path().join("aside");
    check_kept_until_deadline(
        &terms_on(&disk),
        |_| {
            disk.fill();
            // The file still occupies its space there.
            fs::rename(terms_on(&disk).path, &aside).unwrap();
        },
        || {
            disk.make_room();
            fs::remove_file(&aside).unwrap();
        },
        "No space left",
    );
}

#[test]
fn renew_on_read_only_file_system_retries_until_deadline() {
    let Some(disk) = SmallDisk::mount("size=64k") else {
        return;
    };
    check_kept_until_deadline(
        &terms_on(&disk),
        |_| {
            disk.remount("ro");
            let error = terms_on(&disk).open().try_lock().unwrap_err();
            assert!(
                matches!(error.kind(), ErrorKind::Io { action: "open", .. }),
                "{error}"
            );
            assert_eq!(
                std::io::Error::from(error).kind(),
                std::io::ErrorKind::ReadOnlyFilesystem
            );
        },
        || disk.remount("rw"),
        "Read-only file system",
    );
}

/// Makes system calls of a process fail until it is dropped, by strace(1) on all its threads.
#[cfg(target_os = "linux")]
struct Fault(Strace);

#[cfg(target_os = "linux")]
impl Fault {
    /// Injects each of these faults: the name of a system call, a colon, and its failure as
    /// strace(1) defines it.
    fn inject(actor: &Actor, faults: &[&str]) -> Self {
        let calls: Vec<&str> = faults
            .iter()
            .map(|fault| fault.split_once(':').unwrap().0)
            .collect();
        let trace = format!("-etrace={}", calls.join(","));
        let inject = faults.iter().map(|fault| format!("-einject={fault}"));
        Self(Strace::attach(
            actor,
            &std::iter::once(trace).chain(inject).collect::<Vec<_>>(),
        ))
    }
}

#[cfg(target_os = "linux")]
impl Drop for Fault {
    fn drop(&mut self) {
        self.0.end();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn renew_with_io_errors_retries_until_deadline() {
    if !calls_can_fail() {
        return;
    }
    std::thread::scope(|scope| {
        for (fault, because) in [
            // The text is the error number, because each C library has error texts of its own.
            ("pread64:error=EIO", "(os error 5)"),
            ("pwrite64:error=EDQUOT", "(os error 122)"),
            ("?open,openat:error=EMFILE", "(os error 24)"),
            ("flock:error=ENOLCK", "(os error 37)"),
        ] {
            scope.spawn(move || {
                let (_directory, terms) = temp_lease();
                let broken = std::cell::Cell::new(None);
                let break_store =
                    |holder: &Actor| broken.set(Some(Fault::inject(holder, &[fault])));
                check_kept_until_deadline(&terms, break_store, || drop(broken.take()), because);
            });
        }
    });
}

#[cfg(target_os = "linux")]
#[test]
fn lease_waiter_without_inotify_polls() {
    if !calls_can_fail() {
        return;
    }
    let (_directory, terms) = temp_lease();
    let [mut holder, mut waiter] = [(); 2].map(|()| Actor::start_lease(&terms));
    acquire(&mut waiter, "try");
    waiter.expect("release", "released");
    acquire(&mut holder, "try");
    let _fault = Fault::inject(&waiter, &["inotify_init1:error=EMFILE"]);
    waiter.tell_to_wait("lock");
    assert_eq!(inotify_watches(waiter.pid()), 0);
    holder.expect("release", "released");
    token(&waiter.answer());
}

#[test]
fn lease_crash_at_any_step_does_not_block_next_holder() {
    /// The preparation before the steps.
    type Prepare<'a> = &'a dyn Fn(&mut Actor, &Terms);

    if !lockkit_tests::failpoint::are_enabled() {
        return;
    }
    let (_directory, other) = temp_lease();
    let dead = left_by_the_dead(&other);
    let cases: [(&str, Prepare<'_>); 4] = [
        ("record of a dead holder", &|_, terms| {
            fs::create_dir_all(terms.path.parent().unwrap()).unwrap();
            write(terms, &dead);
        }),
        ("missing directory", &|_, _| {}),
        ("renewal", &|victim, _| _ = acquire(victim, "try")),
        ("renewal of a deleted record", &|victim, terms| {
            acquire(victim, "try");
            fs::remove_file(&terms.path).unwrap();
        }),
    ];
    for (case, prepare) in cases {
        for step in 1.. {
            let directory = tempfile::tempdir().unwrap();
            let terms = Terms {
                heartbeat: 10,
                ..Terms::of(directory.path().join("a/b/lease"))
            };
            let mut victim = Actor::start_lease(&terms);
            prepare(&mut victim, &terms);
            let renews = case.contains("renewal");
            // A heartbeat may reach the step before the actor has answered.
            let armed = victim.ask(&format!("kill-at {step}"));
            assert!(armed == "armed" || (renews && armed == "gone"), "{armed}");
            let answer = victim.ask(if renews { "wait-lost" } else { "try" });
            victim.kill();
            let mut next = Actor::start_lease(&terms);
            // Where a record is created in place, an empty record of a dead process counts as held
            // for some seconds.
            let command = if cfg!(target_os = "linux") {
                "lock-for 5000"
            } else {
                "lock-for 20000"
            };
            let answer_of_next = next.ask(command);
            assert!(
                answer_of_next.starts_with("held "),
                "{case}, killed at step {step}: {answer_of_next}"
            );
            next.expect("release", "released");
            acquire(&mut next, "try");
            assert_eq!(
                terms.path.parent().unwrap().read_dir().unwrap().count(),
                1,
                "{case}: files left after a kill at step {step}"
            );
            // Heartbeats continue until the step comes.
            if answer != "gone" || (renews && step == 8) {
                assert!(step > 2, "{case}: only {step} steps");
                break;
            }
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn create_race_without_linkat_has_one_winner() {
    if !calls_can_fail() {
        return;
    }
    // This is the case on NFS, and without a /proc through which to link them.
    let (directory, terms) = temp_lease();
    let mut contenders: Vec<Actor> = (0..6).map(|_| Actor::start_lease(&terms)).collect();
    // The heartbeat threads start before the trace.
    for contender in &mut contenders {
        acquire(contender, "lock");
        contender.expect("release", "released");
    }
    // Some contenders are slower than others between the creation and the lock of the file.
    let faults = contenders.iter().zip(0..).map(|(actor, at)| {
        Fault::inject(
            actor,
            &[
                "linkat:error=EPERM",
                &format!("flock:delay_enter={}", 500 * at),
            ],
        )
    });
    let _faults: Vec<Fault> = faults.collect();
    for round in 0..200 {
        fs::remove_file(&terms.path).unwrap();
        contenders
            .iter_mut()
            .for_each(|contender| contender.tell("try"));
        let answers: Vec<String> = contenders.iter_mut().map(Actor::answer).collect();
        let winners: Vec<usize> = (0..contenders.len())
            .filter(|at| answers[*at].starts_with("held "))
            .collect();
        assert_eq!(winners.len(), 1, "round {round}: {answers:?}");
        assert_eq!(
            answers.iter().filter(|answer| is_held(answer)).count(),
            5,
            "round {round}: {answers:?}"
        );
        contenders[winners[0]].expect("release", "released");
    }
    assert_eq!(
        directory.path().read_dir().unwrap().count(),
        1,
        "only the record is left"
    );
}

#[cfg(target_os = "linux")]
#[test]
fn failed_record_write_without_tmpfile_leaves_no_file() {
    if !calls_can_fail() {
        return;
    }
    let (directory, terms) = temp_lease();
    let mut actor = Actor::start_lease(&terms);
    // The heartbeat thread starts before the trace.
    acquire(&mut actor, "try");
    actor.expect("release", "released");
    fs::remove_file(&terms.path).unwrap();
    let fault = Fault::inject(
        &actor,
        &["linkat:error=EPERM", "pwrite64:error=ENOSPC:when=2+2"],
    );
    for command in ["try", "lock"] {
        let answer = actor.ask(command);
        assert!(
            answer.starts_with("error Io: cannot write") && answer.contains("No space left"),
            "{answer}"
        );
        assert_eq!(directory.path().read_dir().unwrap().count(), 0);
    }
    drop(fault);
    acquire(&mut actor, "try");
}

#[cfg(target_os = "linux")]
#[test]
fn acquire_without_heartbeat_thread_fails_and_holds_nothing() {
    let Some(user) = another_user() else { return };
    let (directory, terms) = temp_lease();
    chown(directory.path(), Some(user.uid), None).unwrap();
    let mut limited = Actor::start_lease_as(&terms, user.uid);
    limited.expect("limit-threads 1", "limited");
    for command in ["try", "lock", "lock-for 1000"] {
        let answer = limited.ask(command);
        let said = format!(
            "error Io: cannot start the heartbeat thread for {}",
            terms.path.display()
        );
        assert!(
            answer.starts_with(&said) && answer.contains("Resource temporarily unavailable"),
            "{answer}"
        );
        assert_eq!(
            directory.path().read_dir().unwrap().count(),
            0,
            "the store received no request"
        );
    }
    limited.expect("limit-threads all", "limited");
    acquire(&mut limited, "try");
    wait_for_heartbeats(&terms);
    limited.expect("release", "released");
}

#[cfg(target_os = "linux")]
#[test]
fn on_lost_without_own_thread_is_called_once_by_heartbeat() {
    let Some(user) = another_user() else { return };
    let (directory, terms) = temp_lease();
    chown(directory.path(), Some(user.uid), None).unwrap();
    let foreign = record_of_other_host(&terms);
    let mut holder = Actor::start_lease_as(&terms, user.uid);
    acquire(&mut holder, "try");
    holder.expect("limit-threads 2", "limited");
    write(&terms, &foreign);
    let by = line(&foreign, "pid");
    holder.expect("wait-lost", &format!("lost taken over by {by}"));
    let one_loss = format!("losses (taken over by {by} on lockkit-lease)");
    until("the loss is reported", || holder.ask("losses") == one_loss);
    // The heartbeat continues.
    assert!(holder.ask("lock").starts_with("held "));
    wait_for_heartbeats(&terms);
    holder.expect("losses", &one_loss);
}

/// The system calls on files that an acquisition and a status query make.
#[cfg(target_os = "linux")]
const FILE_CALLS: [&str; 8] = [
    "openat",
    "statx",
    "newfstatat",
    "fstat",
    "pread64",
    "pwrite64",
    "flock",
    "close",
];

/// Stops a process at each system call of `command` in turn, while another process holds the lease.
/// Returns the number of system calls.
#[cfg(target_os = "linux")]
fn stop_at_every_call_of(command: &str) -> usize {
    // strace counts each call by itself.
    FILE_CALLS
        .iter()
        .map(|call| stop_at_each(call, command))
        .sum()
}

#[cfg(target_os = "linux")]
fn stop_at_each(call: &str, command: &str) -> usize {
    /// A waiter never stops making calls.
    const MAX_STOPS: usize = 3;
    /// After so many sleeps a waiter has made each call of one check.
    const MAX_SLEEPS: usize = 4;
    for at in 1..=MAX_STOPS {
        let (_directory, mut terms) = temp_lease();
        (terms.ttl, terms.heartbeat) = (500, 50);
        let [mut holder, mut victim, mut next] = [(); 3].map(|()| Actor::start_lease(&terms));
        acquire(&mut holder, "lock");
        // In every other round the reader has noted its observation in the record before.
        if at % 2 == 0 {
            assert!(is_held(&victim.ask("try")));
        }
        let stop = [
            format!("trace={call},ppoll"),
            format!("inject={call}:signal=STOP:when={at}"),
        ];
        let mut strace = Strace::attach(&victim, &stop.map(|option| format!("-e{option}")));
        victim.tell(command);
        let mut is_over = false;
        until(
            "the reader is stopped, or answers, or waits without such a call",
            || {
                let calls = strace.so_far();
                if calls.contains("stopped by SIGSTOP") {
                    return true;
                }
                is_over =
                    victim.answered().is_some() || calls.matches("ppoll(").count() > MAX_SLEEPS;
                is_over
            },
        );
        strace.end();
        if is_over {
            return at - 1;
        }
        until("the reader stays stopped", || is_stopped(victim.pid()));
        let start = Instant::now();
        until("twice the TTL has passed", || {
            holder.expect("is-held", "yes");
            start.elapsed() > Duration::from_millis(2 * terms.ttl)
        });
        holder.expect("losses", "losses");
        holder.expect("release", "released");
        token(&next.ask("lock-for 2000"));
        assert!(is_stopped(victim.pid()));
    }
    MAX_STOPS
}

#[cfg(target_os = "linux")]
#[test]
fn a9_reader_stopped_at_any_call_keeps_lease() {
    if !calls_can_fail() {
        return;
    }
    let stops: usize = std::thread::scope(|scope| {
        let stopped = ["try", "status", "lock"]
            .map(|command| scope.spawn(move || stop_at_every_call_of(command)));
        stopped.into_iter().map(|stops| stops.join().unwrap()).sum()
    });
    assert!(stops > 10, "only {stops} calls were stopped");
}

#[cfg(target_os = "linux")]
#[test]
fn a9_read_of_held_lease_takes_no_flock() {
    if !calls_can_fail() {
        return;
    }
    let (_directory, terms) = temp_lease();
    let [mut holder, mut reader] = [(); 2].map(|()| Actor::start_lease(&terms));
    acquire(&mut holder, "lock");
    assert!(is_held(&reader.ask("try")));
    let mut strace = Strace::attach(&reader, &[]);
    for command in ["try", "status", "lock-for 300", "try"] {
        let answer = reader.ask(command);
        assert!(
            answer.starts_with("held ") || answer.starts_with("error "),
            "{answer}"
        );
    }
    let calls = strace.end();
    assert!(
        calls.contains("pread64("),
        "the reader has read the record: {calls}"
    );
    assert!(!calls.contains("flock("), "{calls}");
}

#[cfg(target_os = "linux")]
#[test]
fn a9_status_during_stopped_write_answers() {
    let (_directory, terms) = temp_lease();
    let mut holder = Actor::start_lease(&terms);
    acquire(&mut holder, "lock");
    let mut reader = Actor::start_lease(&terms);
    let writer = FileLock::new(&terms.path).lock().unwrap();
    assert!(reader.ask("status").starts_with("held "));
    assert!(is_held(&reader.ask("try")));
    drop(writer);
    holder.expect("release", "released");
    // A process that is stopped just before it takes the lease delays others until it continues.
    let writer = FileLock::new(&terms.path).lock().unwrap();
    assert_eq!(reader.ask("status"), "free");
    assert!(reader.ask("lock-for 100").starts_with("error Timeout"));
    reader.tell_to_wait("lock");
    drop(writer);
    token(&reader.answer());
}
