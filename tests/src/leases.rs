//! Leases: a second process that works on one on command, a chaos in which holders lose their
//! leases, and forged records.
//!
//! The second process is started with [`Actor::start_lease`]:
//!
//! | command | answer |
//! |---|---|
//! | `try`, `lock`, `lock-for MS` | `held TOKEN`, or `held TOKEN recovered PID` |
//! | `status` | `free`, `damaged NANOSECONDS`, or `held NANOSECONDS`: the time until it expires |
//! | `release` | `released` |
//! | `is-held` | `yes`, or `no: REASON` |
//! | `remaining` | `remaining MICROSECONDS` |
//! | `wait-lost` | `lost REASON`, once it is |
//! | `losses` | `losses`, and for each call of `on_lost` the reason and the name of the thread |
//! | `progress` | `noted` |
//! | `hold-many N DIRECTORY` | `holds N`: the leases 0 to N - 1 in a directory; `drop-many` drops them all: `dropped` |
//! | `fork OTHER` | `parted`: a forked child does not hold its copy, took another lease and kept it, and is gone |
//! | `limit-threads N`, or `all` | `limited`: its user may have no more threads from now on; has no effect for root |
//! | `kill-at STEP` | `armed`: see [`crate::failpoint`] |
//! | `go DIRECTORY` | `gone there`: that is its working directory now |
//!
//! or `error KIND: text`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use lockkit::{ErrorKind, Lease, LeaseBuilder, LeaseGuard, LeaseStatus, LossReason, Wait};

use crate::chaos::{ACQUIRED, Event, Log, RELEASED, Random, now, read};
use crate::errors::describe;
use crate::helper_process::announce;
#[cfg(unix)]
use crate::helper_process::child_succeeds;
use crate::{Actor, Belongings, LIVELY, program};

/// A lease and its options, as text: `TTL HEARTBEAT PROGRESS PANICS MODE PATH`, in milliseconds.
/// Missing directories of a file are created.
#[derive(Clone, Debug)]
pub struct Terms {
    /// The place of its record: the path of a file, or a URL.
    pub path: PathBuf,
    /// Its TTL, in milliseconds.
    pub ttl: u64,
    /// Its heartbeat interval, in milliseconds.
    pub heartbeat: u64,
    /// The limit within which progress is required, in milliseconds; 0 without a limit.
    pub progress: u64,
    /// Whether `on_lost` panics.
    pub panics: bool,
    /// The mode of its file; 0 is the default of the library.
    pub mode: u32,
}

impl Terms {
    /// Returns the terms of a lease that expires soon, but not so soon that a slow machine loses
    /// it.
    pub fn of(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            ttl: 1000,
            heartbeat: 100,
            progress: 0,
            panics: false,
            mode: 0,
        }
    }

    /// Parses the output of `Display`.
    pub fn parse(text: &str) -> Self {
        let mut parts = text.splitn(6, ' ');
        let mut next = || {
            parts
                .next()
                .expect("TTL HEARTBEAT PROGRESS PANICS MODE PATH")
        };
        let [ttl, heartbeat, progress] = [(); 3].map(|()| next().parse().expect("milliseconds"));
        let (panics, mode) = (next() == "true", next().parse().expect("a mode"));
        Self {
            ttl,
            heartbeat,
            progress,
            panics,
            mode,
            path: next().into(),
        }
    }

    /// Returns the builder of the lease with these options.
    pub fn builder(&self) -> LeaseBuilder {
        let [ttl, heartbeat, progress] =
            [self.ttl, self.heartbeat, self.progress].map(Duration::from_millis);
        let builder = match self.path.to_str() {
            Some(url) if url.contains("://") => Lease::connect(url),
            _ => Lease::file(&self.path).create_parents(),
        };
        let builder = if self.mode == 0 {
            builder
        } else {
            builder.file_write_mode(self.mode)
        };
        let builder = builder.ttl(ttl).heartbeat(heartbeat);
        if self.progress == 0 {
            builder
        } else {
            builder.require_progress(progress)
        }
    }

    /// Builds the lease.
    pub fn open(&self) -> Lease {
        self.builder().build().expect("valid options")
    }
}

impl fmt::Display for Terms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            path,
            ttl,
            heartbeat,
            progress,
            panics,
            mode,
        } = self;
        write!(
            f,
            "{ttl} {heartbeat} {progress} {panics} {mode} {}",
            path.display()
        )
    }
}

/// Formats a reason as the actor answers it.
pub fn describe_reason(reason: &LossReason) -> String {
    match reason {
        LossReason::Expired => "expired".to_owned(),
        LossReason::TakenOver { by: Some(by) } => format!("taken over by {}", by.pid()),
        LossReason::TakenOver { by: None } => "taken over".to_owned(),
        other => other.to_string(),
    }
}

/// Returns the reasons of all losses so far, and the thread of each.
fn losses() -> MutexGuard<'static, Vec<String>> {
    static LOSSES: Mutex<Vec<String>> = Mutex::new(Vec::new());
    LOSSES.lock().expect("no panic while locked")
}

/// Acts as the actor: executes commands until there are no more.
pub fn serve(terms: &Terms) {
    let panics = terms.panics;
    let lease = terms.builder().on_lost(move |loss| {
        let thread = std::thread::current().name().unwrap_or_default().to_owned();
        losses().push(format!(" ({} on {thread})", describe_reason(&loss.reason)));
        if panics {
            std::panic::resume_unwind(Box::new("on purpose"));
        }
    });
    let lease = lease.build().expect("valid options");
    let mut guard = None;
    let mut many = Vec::new();
    for line in crate::commands() {
        let (command, argument) = line.split_once(' ').unwrap_or((&line, ""));
        let answer = use_lease(command, argument, &lease, &mut guard)
            .or_else(|| use_process(command, argument, terms, &mut many))
            .or_else(|| use_guard(command, argument, terms, guard.as_ref()));
        println!(
            "{}",
            answer.unwrap_or_else(|| format!("error unknown command {line:?}"))
        );
    }
}

/// Executes a command on the lease.
fn use_lease(
    command: &str,
    argument: &str,
    lease: &Lease,
    guard: &mut Option<LeaseGuard>,
) -> Option<String> {
    let mut acquire = |wait: &Wait| match (announce(), lease.acquire(wait)).1 {
        Ok(acquired) => {
            let died = acquired
                .recovered()
                .map(|died| died.owner().map_or(0, |owner| owner.pid()));
            let died = died.map_or(String::new(), |pid| format!(" recovered {pid}"));
            let answer = format!("held {}{died}", acquired.token());
            *guard = Some(acquired);
            answer
        }
        Err(error) => describe(&error),
    };
    Some(match command {
        "try" => acquire(&Wait::none()),
        "lock" => acquire(&Wait::forever()),
        "lock-for" => acquire(&Wait::at_most(Duration::from_millis(
            argument.parse().expect("milliseconds"),
        ))),
        "release" => match guard.take().map(LeaseGuard::release) {
            Some(Ok(())) => "released".to_owned(),
            Some(Err(error)) => describe(&error),
            None => "error NotHeld".to_owned(),
        },
        "status" => match lease.status() {
            Ok(LeaseStatus::Held(seen)) => {
                let what = if seen.claim().is_some() {
                    "held"
                } else {
                    "damaged"
                };
                format!(
                    "{what} {}",
                    seen.expires_in().unwrap_or_default().as_nanos()
                )
            }
            Ok(_) => "free".to_owned(),
            Err(error) => describe(&error),
        },
        _ => return None,
    })
}

/// Executes a command on the process, or on `many` leases.
fn use_process(
    command: &str,
    argument: &str,
    terms: &Terms,
    many: &mut Vec<LeaseGuard>,
) -> Option<String> {
    Some(match command {
        "losses" => format!("losses{}", losses().concat()),
        "hold-many" => {
            let (count, directory) = argument.split_once(' ').expect("N DIRECTORY");
            let open = |n: usize| {
                Terms {
                    path: Path::new(directory).join(n.to_string()),
                    ..terms.clone()
                }
                .open()
            };
            *many = (0..count.parse().expect("N"))
                .map(|n| open(n).try_lock().expect("free"))
                .collect();
            format!("holds {}", many.len())
        }
        "drop-many" => {
            many.clear();
            "dropped".to_owned()
        }
        "kill-at" => {
            crate::failpoint::kill_at(argument.parse().expect("the number of a step"));
            "armed".to_owned()
        }
        "go" => {
            std::env::set_current_dir(argument).expect("a directory");
            "gone there".to_owned()
        }
        #[cfg(target_os = "linux")]
        "limit-threads" => {
            crate::fault_injection::limit_threads(argument);
            "limited".to_owned()
        }
        _ => return None,
    })
}

/// Executes a command on the guard.
#[cfg_attr(not(unix), allow(unused_variables))]
fn use_guard(
    command: &str,
    argument: &str,
    terms: &Terms,
    guard: Option<&LeaseGuard>,
) -> Option<String> {
    let Some(guard) = guard else {
        return Some("error NotHeld".to_owned());
    };
    Some(match command {
        "is-held" => match guard.lost().reason() {
            None => "yes".to_owned(),
            Some(reason) => format!("no: {}", describe_reason(&reason)),
        },
        "remaining" => format!("remaining {}", guard.remaining().as_micros()),
        "wait-lost" => match guard.lost().wait(&Wait::forever()) {
            Ok(reason) => format!("lost {}", describe_reason(&reason)),
            Err(error) => describe(&error),
        },
        "progress" => {
            guard.progress();
            "noted".to_owned()
        }
        #[cfg(unix)]
        "fork" => {
            let other = Terms {
                path: argument.into(),
                ..terms.clone()
            };
            check_forked_child(guard, &other, || losses().is_empty())
        }
        _ => return None,
    })
}

/// Checks that a forked child's copy of `guard` is not held, and that the child acquires and keeps
/// the lease `other`.
#[cfg(unix)]
fn check_forked_child(
    guard: &LeaseGuard,
    other: &Terms,
    reports_no_loss: impl Fn() -> bool,
) -> String {
    match fork::fork().expect("a process can be forked") {
        fork::Fork::Child => {
            let mut is_correct = matches!(guard.lost().reason(), Some(LossReason::Forked));
            is_correct &= !guard.is_held()
                && guard.remaining().is_zero()
                && guard.lost().token().is_cancelled();
            let own = other.open().try_lock();
            let end = Instant::now() + Duration::from_millis(3 * other.ttl);
            while Instant::now() < end {
                is_correct &= own.as_ref().is_ok_and(LeaseGuard::is_held);
                std::thread::sleep(Duration::from_millis(1));
            }
            drop(own);
            // Neither the drop nor the end of the process is a loss, and both leave the parent's
            // record unchanged.
            std::process::exit(if is_correct && reports_no_loss() {
                0
            } else {
                1
            });
        }
        fork::Fork::Parent(pid) => {
            if child_succeeds(pid) {
                "parted".to_owned()
            } else {
                "error fork: the child failed a check".to_owned()
            }
        }
    }
}

/// The lease was still held just before this record.
const STILL_HELD: u32 = 3;

/// Acts as one process in the chaos of leases: acquires the lease and holds it for a while, or
/// until it is lost.
pub fn run_chaos_worker(terms: &Terms, logs: &Path, seed: u64) {
    let lease = terms.open();
    let mut log = Log::open(logs);
    let mut random = Random::new(seed);
    loop {
        match lease.lock_for(Duration::from_micros(random.below(20_000))) {
            Ok(guard) => {
                log.append(now(), ACQUIRED, guard.token());
                let end = Instant::now() + Duration::from_millis(random.below(terms.ttl));
                loop {
                    let asked = now();
                    if !guard.is_held() {
                        log.append(asked, RELEASED, guard.token());
                        break;
                    }
                    // The lease was held at the check, and so at every moment before.
                    log.append(asked, STILL_HELD, guard.token());
                    if Instant::now() > end {
                        break;
                    }
                    std::thread::sleep(Duration::from_micros(200));
                }
            }
            // A server may not answer within so short a wait.
            Err(error) => assert!(
                error.is_temporary() || matches!(error.kind(), ErrorKind::Store { .. }),
                "{error:?}"
            ),
        }
    }
}

/// The result of a run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// The number of holds that were confirmed at some moment.
    pub holds: usize,
    /// The number of detected losses.
    pub losses: usize,
    /// The number of kills.
    pub kills: usize,
}

/// Kills a process, and checks that it has not failed before.
fn kill(child: &mut Child) {
    child.kill().expect("a child can be killed");
    let status = child.wait().expect("a child can be waited for");
    assert!(
        crate::was_killed(status),
        "a process failed on its own: {status}"
    );
}

/// Runs processes on one lease for `span`, stops them for up to three times its TTL, and kills
/// them. Checks that a process that saw itself as the holder was never one of two holders, and that
/// the tokens grew with each hold.
///
/// An otherwise idle process has the same belongings afterwards as before, and so has the directory
/// of the lease.
pub fn run(terms: &Terms, span: Duration) -> Tally {
    let mut observer = Actor::start_lease(terms);
    let mut use_once = || {
        assert!(observer.ask("lock-for 30000").starts_with("held "));
        observer.expect("release", "released");
        // A server's lease has no directory.
        let directory = terms
            .path
            .parent()
            .expect("a directory")
            .read_dir()
            .into_iter()
            .flatten();
        let files: BTreeSet<_> = directory
            .map(|entry| entry.expect("an entry").file_name())
            .collect();
        (Belongings::of(observer.pid()), files)
    };
    let before = use_once();
    let directory = tempfile::tempdir().expect("a directory");
    let mut random = Random::new(now());
    let start = |random: &mut Random| {
        let mut command = Command::new(program("actor"));
        command
            .arg("lease")
            .arg(terms.to_string())
            .arg("chaos")
            .arg(directory.path())
            .arg(random.below(u64::MAX).to_string());
        crate::wine::spawn(command.stdin(Stdio::null())).expect("a process starts")
    };
    let mut processes: Vec<Child> = (0..6).map(|_| start(&mut random)).collect();
    let mut resumes: BTreeMap<Instant, u32> = BTreeMap::new();
    let lease = terms.open();
    let mut kills = processes.len();
    let end = Instant::now() + span;
    while Instant::now() < end {
        std::thread::sleep(Duration::from_millis(random.below(terms.ttl)));
        while let Some(entry) = resumes
            .first_entry()
            .filter(|entry| *entry.key() < Instant::now())
        {
            let pid = entry.remove();
            // A killed process has a successor at its index, and its pid is not reused yet.
            if processes.iter().any(|process| process.id() == pid) {
                crate::resume(pid);
            }
        }
        // The victim is often the holder.
        let owner = lease.owner().ok().flatten().map(|owner| owner.pid());
        let holder = processes
            .iter()
            .position(|process| Some(process.id()) == owner);
        let victim = holder
            .filter(|_| random.below(2) == 0)
            .unwrap_or(random.below(6) as usize);
        if random.below(6) == 0 {
            kill(&mut processes[victim]);
            kills += 1;
            processes[victim] = start(&mut random);
        } else {
            crate::stop(processes[victim].id());
            resumes.insert(
                Instant::now() + Duration::from_millis(random.below(3 * terms.ttl)),
                processes[victim].id(),
            );
        }
    }
    processes.iter_mut().for_each(kill);
    drop(
        terms
            .open()
            .lock_for(LIVELY)
            .expect("no live process holds it"),
    );
    assert_eq!(
        use_once(),
        before,
        "the belongings of a process, and the files of the directory"
    );
    let (holds, losses) = check(&read(directory.path()));
    Tally {
        holds,
        losses,
        kills,
    }
}

/// Checks the records of all processes. Returns the number of confirmed holds, and of detected
/// losses.
fn check(events: &[Event]) -> (usize, usize) {
    let mut holds: HashMap<u64, (u32, u64, u64)> = HashMap::new();
    let mut losses = 0;
    for event in events {
        match event.what {
            ACQUIRED => {
                let before = holds.insert(event.number, (event.pid, event.nanos, 0));
                assert_eq!(before, None, "a token was given twice: {event:?}");
            }
            STILL_HELD => {
                let (pid, _, until) = holds
                    .get_mut(&event.number)
                    .expect("a check follows an acquisition");
                assert_eq!(*pid, event.pid, "two processes have one token: {event:?}");
                *until = event.nanos;
            }
            _ => losses += 1,
        }
    }
    // A process that was stopped before its first check never saw itself as the holder.
    let mut holds: Vec<_> = holds
        .into_iter()
        .filter(|(_, (_, _, until))| *until > 0)
        .collect();
    holds.sort_by_key(|(_, (_, from, _))| *from);
    for pair in holds.windows(2) {
        let [(token, (pid, _, until)), (next, (after, from, _))] = pair else {
            unreachable!("windows of two")
        };
        assert!(
            until <= from,
            "process {pid} held at {until}, but process {after} acquired at {from}"
        );
        assert!(
            token < next,
            "process {after} acquired after {pid} with the token {next}, which is not greater than {token}"
        );
    }
    (holds.len(), losses)
}

/// Changes some lines of a record, and corrects its checksum. The results include times an hour
/// off, other hosts and other boots.
pub fn forge(record: &[u8], changes: &[(&str, &str)]) -> Vec<u8> {
    /// The number of lines at fixed places, and the column at which their values begin.
    const FIXED: (usize, usize) = (12, 8);
    const SIZE: usize = 1024;
    const SUM: std::ops::Range<usize> = 24..40;
    const NOTES: std::ops::Range<usize> = 217..533;
    let text = std::str::from_utf8(record).expect("text");
    let mut forged = String::new();
    for (at, line) in text.trim_end().lines().enumerate() {
        let (key, _) = line.split_once(' ').expect("a key and a value");
        match changes.iter().find(|(changed, _)| *changed == key) {
            None => forged += line,
            Some((_, value)) if at < FIXED.0 => {
                forged += &format!("{key:<0$}{value}", FIXED.1);
                assert!(
                    forged.ends_with(value) && value.len() == line.len() - FIXED.1,
                    "as long as it was"
                );
            }
            Some((_, value)) => forged += &format!("{key} {value}"),
        }
        forged.push('\n');
    }
    let mut forged = forged.into_bytes();
    forged.resize(SIZE, b'\n');
    let summed = [
        &forged[..SUM.start],
        &forged[SUM.end..NOTES.start],
        &forged[NOTES.end..],
    ];
    let sum = summed.into_iter().flat_map(|part| part.chunks(8)).fold(
        0xcbf2_9ce4_8422_2325_u64,
        |sum, word| {
            let mut whole = [0; 8];
            whole[..word.len()].copy_from_slice(word);
            (sum ^ u64::from_le_bytes(whole)).wrapping_mul(0x0000_0100_0000_01b3)
        },
    );
    forged[SUM].copy_from_slice(format!("{sum:016x}").as_bytes());
    forged
}

/// Returns the value of the line `key` of a record.
pub fn line(record: &[u8], key: &str) -> String {
    let text = String::from_utf8_lossy(record);
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {key} in {text}"))
        .trim()
        .to_owned()
}

/// Returns the record that a killed holder left, under the `terms`.
pub fn left_by_the_dead(terms: &Terms) -> Vec<u8> {
    let mut actor = Actor::start_lease(terms);
    assert!(actor.ask("try").starts_with("held "));
    actor.kill();
    std::fs::read(&terms.path).expect("a record")
}

impl Actor {
    /// Starts an actor that works on a lease; see [`serve`].
    pub fn start_lease(terms: &Terms) -> Self {
        Self::start_lease_with(terms, |_| {})
    }

    /// As [`start_lease`](Self::start_lease), with its command changed by `change`.
    pub fn start_lease_with(terms: &Terms, change: impl FnOnce(&mut Command)) -> Self {
        Self::start_part(["lease".to_owned(), terms.to_string()], change)
    }

    /// As [`start_lease`](Self::start_lease), as another user, which only root can.
    #[cfg(target_os = "linux")]
    pub fn start_lease_as(terms: &Terms, uid: u32) -> Self {
        Self::run(crate::helper_process::as_user(
            uid,
            ["lease".to_owned(), terms.to_string()],
        ))
    }

    /// As [`start_lease_as`](Self::start_lease_as), as a member of the group `gid`.
    #[cfg(target_os = "linux")]
    pub fn start_lease_in_group(terms: &Terms, uid: u32, gid: u32) -> Self {
        use std::os::unix::process::CommandExt;
        let mut command =
            crate::helper_process::as_user(uid, ["lease".to_owned(), terms.to_string()]);
        command.gid(gid);
        Self::run(command)
    }
}
