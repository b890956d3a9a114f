//! Many processes acquire one lock at random while the test kills and stops them. The log of the
//! holders and their times is checked.
//!
//! Each process appends a record to its own log after an acquisition and before the release,
//! because not every system supports concurrent appends of several processes. Records have a size
//! that divides a page, so an append is complete or absent, even after a kill. The times are those
//! of [`SystemClock`], which all processes share.

use std::collections::{BTreeSet, HashMap};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lockkit::lease::{Clock, SystemClock};
use lockkit::{ErrorKind, Wait};

use crate::{Actor, Belongings, Kind, Spec, program, until};

const RECORD: usize = 32;
pub(crate) const ACQUIRED: u32 = 1;
pub(crate) const RELEASED: u32 = 2;

/// The guard reports no death.
const NO_DEATH: u64 = u64::MAX;
/// The guard reports a death, but the dead owner is unknown.
const UNKNOWN_OWNER: u64 = 0;

/// A record of the log.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Event {
    pub(crate) nanos: u64,
    pub(crate) pid: u32,
    pub(crate) what: u32,
    /// The dead previous owner; for a lease, the token.
    pub(crate) number: u64,
}

pub(crate) fn now() -> u64 {
    u64::try_from(SystemClock.now().as_nanos()).expect("not so long ago")
}

/// The log of this process, in a directory that all processes share.
pub(crate) struct Log(File);

impl Log {
    pub(crate) fn open(directory: &Path) -> Self {
        let path = directory.join(std::process::id().to_string());
        Self(
            OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .expect("a log"),
        )
    }

    pub(crate) fn append(&mut self, nanos: u64, what: u32, number: u64) {
        let mut record = [0; RECORD];
        record[..8].copy_from_slice(&nanos.to_ne_bytes());
        record[8..16].copy_from_slice(&number.to_ne_bytes());
        record[16..20].copy_from_slice(&std::process::id().to_ne_bytes());
        record[20..24].copy_from_slice(&what.to_ne_bytes());
        self.0.write_all(&record).expect("the log takes a record");
    }
}

/// Reads the records of all processes, in the order of time.
pub(crate) fn read(directory: &Path) -> Vec<Event> {
    let mut events = Vec::new();
    for log in directory.read_dir().expect("a directory") {
        let bytes = std::fs::read(log.expect("an entry").path()).expect("a log");
        assert_eq!(bytes.len() % RECORD, 0, "the log has whole records only");
        events.extend(bytes.chunks_exact(RECORD).map(|record| {
            let word =
                |at: usize| u32::from_ne_bytes(std::array::from_fn(|byte| record[at + byte]));
            let long =
                |at: usize| u64::from_ne_bytes(std::array::from_fn(|byte| record[at + byte]));
            Event {
                nanos: long(0),
                number: long(8),
                pid: word(16),
                what: word(20),
            }
        }));
    }
    events.sort_by_key(|event| event.nanos);
    events
}

/// Pseudo-random numbers, the same for the same seed (xorshift).
pub struct Random(u64);

impl Random {
    /// Creates the numbers from a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Returns a number from 0 to `limit` - 1.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Acts as one process: acquires in every manner until it is killed.
pub fn run_chaos_worker(spec: &Spec, logs: &Path, seed: u64) {
    let lock = spec.open();
    let mut log = Log::open(logs);
    let mut random = Random::new(seed);
    loop {
        let wait = match random.below(3) {
            0 => Wait::none(),
            1 => Wait::at_most(Duration::from_micros(random.below(20_000))),
            _ => Wait::forever(),
        };
        match lock.acquire(&wait) {
            Ok(guard) => {
                log.append(
                    now(),
                    ACQUIRED,
                    guard.recovered().map_or(NO_DEATH, u64::from),
                );
                let hold = Instant::now()
                    + Duration::from_micros(random.below(spec.kind().longest_hold()));
                while Instant::now() < hold {
                    std::hint::spin_loop();
                }
                log.append(now(), RELEASED, NO_DEATH);
                // If a server does not answer in time, the heartbeat repeats the request.
                if let Err(error) = guard.release() {
                    assert!(matches!(error.kind(), ErrorKind::Store { .. }), "{error:?}");
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

/// The time of a death: between the call that killed the process and the moment at which its end
/// was known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Death {
    called: u64,
    known: u64,
}

/// The result of a run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// The number of acquisitions.
    pub holds: usize,
    /// The number of kills.
    pub kills: usize,
    /// The number of killed holders.
    pub died_as_holder: usize,
}

/// Lets an otherwise idle process use the lock once. Returns its belongings and the files of the
/// lock then.
fn belongings_after_use(observer: &mut Actor, spec: &Spec) -> (Belongings, BTreeSet<String>) {
    if spec.kind().late_request_limit() == 0 {
        observer.expect("try", "held");
        observer.expect("release", "released");
    } else {
        // A server may be too busy to answer in time. In that case the heartbeat releases.
        until("the observer acquires and releases", || {
            observer.ask("try") == "held" && observer.ask("release") == "released"
        });
    }
    #[cfg(target_os = "linux")]
    let files = crate::fault_injection::files(spec, Path::new("/"));
    #[cfg(not(target_os = "linux"))]
    let files = spec
        .files()
        .iter()
        .filter(|path| path.exists())
        .map(|path| path.display().to_string())
        .collect();
    (Belongings::of(observer.pid()), files)
}

/// Runs 12 processes on a lock of `kind` for `span`, and kills and stops them at random. Checks
/// that there were never two holders, and that the lock is free within a second of the last death.
/// Checks that a guard reported a death exactly when its predecessor died as holder. The numbers of
/// threads, descriptors and files must be the same afterwards as before.
pub fn run(kind: Kind, span: Duration) -> Tally {
    let spec = kind.fresh();
    let mut observer = Actor::start(&spec);
    let before = belongings_after_use(&mut observer, &spec);
    let directory = tempfile::tempdir().expect("a directory");
    let mut random = Random::new(now());
    let mut deaths: HashMap<u32, Death> = HashMap::new();
    let start = |random: &mut Random| {
        let seed = random.below(u64::MAX).to_string();
        let mut command = Command::new(program("actor"));
        command
            .arg(spec.invite())
            .arg("chaos")
            .arg(directory.path())
            .arg(seed)
            .stdin(Stdio::null());
        crate::wine::spawn(&mut command).expect("a process starts")
    };
    let kill = |child: &mut Child, deaths: &mut HashMap<u32, Death>| {
        let called = now();
        child.kill().expect("a child can be killed");
        let status = child.wait().expect("a child can be waited for");
        assert!(
            crate::was_killed(status),
            "a process failed on its own: {status}"
        );
        assert_eq!(
            deaths.insert(
                child.id(),
                Death {
                    called,
                    known: now()
                }
            ),
            None,
            "a pid was reused"
        );
    };

    let mut processes: Vec<Child> = (0..12).map(|_| start(&mut random)).collect();
    let mut reaped = Vec::new();
    let end = Instant::now() + span;
    while Instant::now() < end {
        let victim = random.below(12) as usize;
        if random.below(3) == 0 {
            crate::stop(processes[victim].id());
            std::thread::sleep(Duration::from_micros(random.below(20_000)));
            crate::resume(processes[victim].id());
        } else {
            std::thread::sleep(Duration::from_micros(random.below(4_000)));
            kill(&mut processes[victim], &mut deaths);
            // The value keeps a handle on the dead process. Without a handle Windows may reuse its
            // pid.
            reaped.push(std::mem::replace(
                &mut processes[victim],
                start(&mut random),
            ));
        }
    }
    for process in &mut processes {
        kill(process, &mut deaths);
    }
    let lock = spec.open();
    let guard = lock
        .acquire(&Wait::at_most(Duration::from_secs(1)))
        .expect("free within a second of the last death");
    Log::open(directory.path()).append(
        now(),
        ACQUIRED,
        guard.recovered().map_or(NO_DEATH, u64::from),
    );
    drop(guard);
    drop(lock);
    assert_eq!(
        belongings_after_use(&mut observer, &spec),
        before,
        "the belongings of a process, and the files of the lock"
    );
    let tally = check(&read(directory.path()), &deaths, kind);
    spec.clean();
    tally
}

/// One hold of the lock.
struct Hold {
    pid: u32,
    from: u64,
    until: u64,
    died: bool,
    recovered: u64,
}

fn check(events: &[Event], deaths: &HashMap<u32, Death>, kind: Kind) -> Tally {
    let mut holds: Vec<Hold> = Vec::new();
    let mut held_by: HashMap<u32, usize> = HashMap::new();
    for event in events {
        if event.what == ACQUIRED {
            assert!(
                !held_by.contains_key(&event.pid),
                "{event:?}: the process acquired twice without a release"
            );
            held_by.insert(event.pid, holds.len());
            let until = deaths
                .get(&event.pid)
                .map_or(u64::MAX, |death| death.called.max(event.nanos));
            holds.push(Hold {
                pid: event.pid,
                from: event.nanos,
                until,
                died: true,
                recovered: event.number,
            });
        } else {
            let at = held_by
                .remove(&event.pid)
                .expect("a release follows an acquisition");
            (holds[at].until, holds[at].died) = (event.nanos, false);
        }
    }
    for pair in holds.windows(2) {
        let [before, after] = pair else {
            unreachable!("windows of two")
        };
        assert!(
            before.until <= after.from,
            "process {} held until {}, but process {} acquired at {}",
            before.pid,
            before.until,
            after.pid,
            after.from
        );
        if !kind.reports_deaths() {
            continue;
        }
        match after.recovered {
            NO_DEATH => assert!(
                !before.died,
                "the guard of process {} did not report that holder {} died",
                after.pid, before.pid
            ),
            died => {
                // The reported process is the predecessor, or a process that was killed before it
                // could log its acquisition or its release. Or its request took effect after its
                // death.
                let death = u32::try_from(died)
                    .ok()
                    .and_then(|died| deaths.get(&died))
                    .copied();
                let fits = |death: &Death| {
                    before.from <= death.known + kind.late_request_limit()
                        && death.called <= after.from
                };
                assert!(
                    match died {
                        // The kernel reports a death before which no record was written.
                        UNKNOWN_OWNER => cfg!(windows) && deaths.values().any(fits),
                        _ => death.as_ref().is_some_and(fits),
                    },
                    "the guard of process {} reported the death of {died} ({death:?}), but process {} held from {}",
                    after.pid,
                    before.pid,
                    before.from
                );
            }
        }
    }
    Tally {
        holds: holds.len() - 1,
        kills: deaths.len(),
        died_as_holder: holds
            .iter()
            .filter(|hold| hold.died && hold.until != u64::MAX)
            .count(),
    }
}
