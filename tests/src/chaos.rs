//! Many processes take one lock at random while a conductor kills and stops them; the log of who held when is checked.
//!
//! Each process appends a record to its own log when it has come in and before it goes out, for not every system appends
//! for several at once. Records have a size that divides a page, so an append is whole or not there, kill or no kill.
//! Times are those of [`SystemClock`], which all share.

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
pub(crate) const IN: u32 = 1;
pub(crate) const OUT: u32 = 2;

/// Nobody died before.
const NOBODY: u64 = u64::MAX;
/// Somebody died before, and nobody knows who.
const SOMEBODY: u64 = 0;

/// A record of the log.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Event {
    pub(crate) nanos: u64,
    pub(crate) pid: u32,
    pub(crate) what: u32,
    /// Who died before; of a lease, the token.
    pub(crate) number: u64,
}

pub(crate) fn now() -> u64 {
    u64::try_from(SystemClock.now().as_nanos()).expect("not so long ago")
}

/// What this process writes down, in a directory that all share.
pub(crate) struct Log(File);

impl Log {
    pub(crate) fn open(directory: &Path) -> Self {
        let path = directory.join(std::process::id().to_string());
        Self(OpenOptions::new().create(true).append(true).open(path).expect("a log"))
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

/// What all have written down, in the order of time.
pub(crate) fn read(directory: &Path) -> Vec<Event> {
    let mut events = Vec::new();
    for log in directory.read_dir().expect("a directory") {
        let bytes = std::fs::read(log.expect("an entry").path()).expect("a log");
        assert_eq!(bytes.len() % RECORD, 0, "the log has whole records only");
        events.extend(bytes.chunks_exact(RECORD).map(|record| {
            let word = |at: usize| u32::from_ne_bytes(std::array::from_fn(|byte| record[at + byte]));
            let long = |at: usize| u64::from_ne_bytes(std::array::from_fn(|byte| record[at + byte]));
            Event { nanos: long(0), number: long(8), pid: word(16), what: word(20) }
        }));
    }
    events.sort_by_key(|event| event.nanos);
    events
}

/// Numbers that look random, the same for the same seed (xorshift).
pub struct Dice(u64);

impl Dice {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// From 0 to `sides` - 1.
    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// The part of one process: locks in every manner until it is killed.
pub fn take_part(spec: &Spec, logs: &Path, seed: u64) {
    let lock = spec.open();
    let mut log = Log::open(logs);
    let mut dice = Dice::new(seed);
    loop {
        let wait = match dice.roll(3) {
            0 => Wait::none(),
            1 => Wait::at_most(Duration::from_micros(dice.roll(20_000))),
            _ => Wait::forever(),
        };
        match lock.acquire(&wait) {
            Ok(guard) => {
                log.append(now(), IN, guard.recovered().map_or(NOBODY, u64::from));
                let hold = Instant::now() + Duration::from_micros(dice.roll(spec.kind().longest_hold()));
                while Instant::now() < hold {
                    std::hint::spin_loop();
                }
                log.append(now(), OUT, NOBODY);
                // A server that does not answer in time is asked again by the heartbeat.
                if let Err(error) = guard.release() {
                    assert!(matches!(error.kind(), ErrorKind::Store { .. }), "{error:?}");
                }
            }
            // A server may not answer within so short a wait.
            Err(error) => assert!(error.is_temporary() || matches!(error.kind(), ErrorKind::Store { .. }), "{error:?}"),
        }
    }
}

/// When a process died: between the call that killed it and the moment at which its end was known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Death {
    called: u64,
    known: u64,
}

/// What a run came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// How often somebody came in.
    pub holds: usize,
    /// How many were killed.
    pub kills: usize,
    /// How many of those were inside.
    pub died_inside: usize,
}

/// What a process that stands by has once it has used the lock, and the files of the lock then.
fn belongings_after_a_use(witness: &mut Actor, spec: &Spec) -> (Belongings, BTreeSet<String>) {
    if spec.kind().afterlife() == 0 {
        witness.expect("try", "held");
        witness.expect("release", "released");
    } else {
        // On a server that was too busy to answer in time it is the heartbeat that releases.
        until("it is taken and released", || witness.ask("try") == "held" && witness.ask("release") == "released");
    }
    #[cfg(target_os = "linux")]
    let files = crate::fault_injection::files(spec, Path::new("/"));
    #[cfg(not(target_os = "linux"))]
    let files = spec.files().iter().filter(|path| path.exists()).map(|path| path.display().to_string()).collect();
    (Belongings::of(witness.pid()), files)
}

/// Lets 12 processes loose on a lock of `kind` for `span`, kills and stops them at random, and checks that no two were
/// ever inside, that the lock is free within a second of the last death, and that the next owner was told of a death
/// exactly when its predecessor died inside. Threads, descriptors and files must be as many afterwards as before.
pub fn run(kind: Kind, span: Duration) -> Tally {
    let spec = kind.fresh();
    let mut witness = Actor::start(&spec);
    let before = belongings_after_a_use(&mut witness, &spec);
    let directory = tempfile::tempdir().expect("a directory");
    let mut dice = Dice::new(now());
    let mut deaths: HashMap<u32, Death> = HashMap::new();
    let start = |dice: &mut Dice| {
        let seed = dice.roll(u64::MAX).to_string();
        let mut command = Command::new(program("actor"));
        command.arg(spec.invite()).arg("chaos").arg(directory.path()).arg(seed).stdin(Stdio::null());
        crate::wine::spawn(&mut command).expect("a process starts")
    };
    let kill = |child: &mut Child, deaths: &mut HashMap<u32, Death>| {
        let called = now();
        child.kill().expect("a child can be killed");
        let status = child.wait().expect("a child can be waited for");
        assert!(crate::was_killed(status), "a process failed on its own: {status}");
        assert_eq!(deaths.insert(child.id(), Death { called, known: now() }), None, "a pid came twice");
    };

    let mut processes: Vec<Child> = (0..12).map(|_| start(&mut dice)).collect();
    let mut buried = Vec::new();
    let end = Instant::now() + span;
    while Instant::now() < end {
        let victim = dice.roll(12) as usize;
        if dice.roll(3) == 0 {
            crate::stop(processes[victim].id());
            std::thread::sleep(Duration::from_micros(dice.roll(20_000)));
            crate::let_go_on(processes[victim].id());
        } else {
            std::thread::sleep(Duration::from_micros(dice.roll(4_000)));
            kill(&mut processes[victim], &mut deaths);
            // Kept, for on Windows a pid is given to another process once nobody has a handle on the dead one.
            buried.push(std::mem::replace(&mut processes[victim], start(&mut dice)));
        }
    }
    for process in &mut processes {
        kill(process, &mut deaths);
    }
    let lock = spec.open();
    let guard = lock.acquire(&Wait::at_most(Duration::from_secs(1))).expect("free within a second of the last death");
    Log::open(directory.path()).append(now(), IN, guard.recovered().map_or(NOBODY, u64::from));
    drop(guard);
    drop(lock);
    assert_eq!(belongings_after_a_use(&mut witness, &spec), before, "what a process and the lock have");
    let tally = check(&read(directory.path()), &deaths, kind);
    spec.clean();
    tally
}

fn check(events: &[Event], deaths: &HashMap<u32, Death>, kind: Kind) -> Tally {
    /// One stay inside.
    struct Hold {
        pid: u32,
        from: u64,
        until: u64,
        died: bool,
        recovered: u64,
    }
    let mut holds: Vec<Hold> = Vec::new();
    let mut inside: HashMap<u32, usize> = HashMap::new();
    for event in events {
        if event.what == IN {
            assert!(!inside.contains_key(&event.pid), "{event:?} came in twice");
            inside.insert(event.pid, holds.len());
            let until = deaths.get(&event.pid).map_or(u64::MAX, |death| death.called.max(event.nanos));
            holds.push(Hold { pid: event.pid, from: event.nanos, until, died: true, recovered: event.number });
        } else {
            let at = inside.remove(&event.pid).expect("who goes out came in");
            (holds[at].until, holds[at].died) = (event.nanos, false);
        }
    }
    for pair in holds.windows(2) {
        let [before, after] = pair else { unreachable!("windows of two") };
        assert!(
            before.until <= after.from,
            "{} was inside until {} when {} came in at {}",
            before.pid,
            before.until,
            after.pid,
            after.from
        );
        if !kind.tells_deaths() {
            continue;
        }
        match after.recovered {
            NOBODY => assert!(!before.died, "{} was not told that {} died inside", after.pid, before.pid),
            died => {
                // Its predecessor, or one that had just taken the lock, or was just giving it back, and was killed
                // before it could write so; or whose request came about when it was dead.
                let death = u32::try_from(died).ok().and_then(|died| deaths.get(&died)).copied();
                let fits = |death: &Death| before.from <= death.known + kind.afterlife() && death.called <= after.from;
                assert!(
                    match died {
                        // The kernel tells of a death before which nothing was written down.
                        SOMEBODY => cfg!(windows) && deaths.values().any(fits),
                        _ => death.as_ref().is_some_and(fits),
                    },
                    "{} was told that {died} died, which it did at {death:?}, after {} was inside from {}",
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
        died_inside: holds.iter().filter(|hold| hold.died && hold.until != u64::MAX).count(),
    }
}
