//! What every system must pass: the core of the suite, with nothing that only one system has.
//!
//! The other modules of this package look into `/proc`, fork, send signals and trace system calls, so they are Linux's.
//! What is here asks the standard library and lockkit alone: locks of every kind, a second process (the program
//! `second`) that takes and releases them as it is told, one command a line and one answer a line, and a chaos in which
//! processes are killed at random. It runs on Linux, on other Unix systems, and on Windows.
//!
//! | command | answer |
//! |---|---|
//! | `try`, `lock`, `lock-for MS` | `held`, `held recovered PID`, or `error: text` |
//! | `release` | `released`, or an error |
//! | `spawn` | `spawned`: a program was started that outlives this one for a while |
//! | `panic` | `panicked`: a thread took the lock and panicked holding it |

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use lockkit::lease::{Clock, SystemClock};
use lockkit::{
    Backend, FileLock, FileLockManager, Guard, Lease, LockManager, NamedLock, NamedLockBuilder, PidFile, Result, Scope,
    Wait,
};

use crate::LIVELY;

/// A held lock of any kind; dropping it releases.
pub struct Held {
    /// The pid of the owner that died before, 0 for an unknown one.
    pub recovered: Option<u32>,
    release: Box<dyn FnOnce() -> Result<()> + Send>,
}

impl Held {
    fn new<G: Guard + 'static>(guard: G) -> Self {
        let recovered = guard.recovered().map(|died| died.owner().map_or(0, |owner| owner.pid()));
        Self { recovered, release: Box::new(move || guard.release()) }
    }

    /// As [`Guard::release`].
    pub fn release(self) -> Result<()> {
        (self.release)()
    }
}

/// Takes a lock.
pub type Take = Box<dyn Fn(&Wait) -> Result<Held> + Send + Sync>;

/// One lock: its kind, and where it is.
#[derive(Clone, Debug)]
pub struct Place {
    kind: String,
    at: String,
}

impl Place {
    /// A lock of `kind` that nobody else uses.
    pub fn fresh(kind: &str) -> Self {
        let name = crate::fresh_name("lockkit-everywhere");
        let at = match kind {
            "named" | "machine" | "named-file" => name,
            _ => std::env::temp_dir().join(name).display().to_string(),
        };
        Self { kind: kind.to_owned(), at }
    }

    /// Whether the next owner is told of a death.
    pub fn tells_deaths(&self) -> bool {
        self.kind != "file"
    }

    /// A handle on it.
    pub fn open(&self) -> Take {
        let named = |set: fn(NamedLockBuilder<'_>) -> NamedLockBuilder<'_>| -> Take {
            let lock = set(NamedLock::builder(&self.at)).build().expect("a valid name");
            Box::new(move |wait| lock.acquire(wait).map(Held::new))
        };
        match &*self.kind {
            "named" => named(|builder| builder),
            "machine" => named(|builder| builder.scope(Scope::Machine)),
            "named-file" => named(|builder| builder.backend(Backend::File)),
            "file" => {
                let lock = FileLock::new(&self.at);
                Box::new(move |wait| lock.acquire(wait).map(Held::new))
            }
            "pidfile" => {
                let lock = PidFile::new(&self.at).expect("an absolute path");
                Box::new(move |wait| lock.acquire(wait).map(Held::new))
            }
            "lease" => {
                let lease = Lease::file(&self.at).ttl(LIVELY).heartbeat(Duration::from_secs(2));
                let lock = lease.build().expect("options that go together");
                Box::new(move |wait| lock.acquire(wait).map(Held::new))
            }
            "folder" => {
                let made = FileLockManager::create(&self.at).or_else(|_| FileLockManager::open(&self.at));
                let manager = made.expect("a table");
                let lock = manager.allocate_at(0).or_else(|_| manager.retrieve(0)).expect("a first lock");
                Box::new(move |wait| lock.acquire(wait).map(Held::new))
            }
            other => panic!("no kind {other}"),
        }
    }

    /// Takes away what the lock left in the folder for temporary files.
    pub fn clean(&self) {
        let _ = std::fs::remove_file(&self.at).or_else(|_| std::fs::remove_dir_all(&self.at));
    }

    fn command(&self) -> Command {
        let mut command = Command::new(program());
        command.args([&self.kind, &self.at]);
        command
    }

    /// What a taker after the death of `died` answers.
    fn told(&self, died: u32) -> String {
        if self.tells_deaths() { format!("held recovered {died}") } else { "held".to_owned() }
    }
}

/// The program `second`, beside the test that runs.
fn program() -> PathBuf {
    crate::program("second")
}

/// The handle on a second process; dropping it kills the process.
pub struct Second {
    child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Second {
    /// Starts one for the lock at `place`.
    pub fn start(place: &Place) -> Self {
        let mut child = place.command().stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
        let commands = child.stdin.take().expect("a pipe");
        let answers = BufReader::new(child.stdout.take().expect("a pipe"));
        Self { child, commands, answers }
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Gives a command without waiting for the answer.
    pub fn tell(&mut self, command: &str) {
        writeln!(self.commands, "{command}").expect("it listens");
    }

    /// The next answer. It ends itself when it has lived for too long, so this does not wait for ever.
    pub fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("text");
        line.trim_end().to_owned()
    }

    /// Gives a command and waits for the answer.
    pub fn ask(&mut self, command: &str) -> String {
        self.tell(command);
        self.answer()
    }

    /// Asks, and expects exactly `answer`.
    pub fn expect(&mut self, command: &str, answer: &str) {
        assert_eq!(self.ask(command), answer, "to {command:?}");
    }

    /// Kills it, and waits for its end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What the program `second` does.
pub fn second(arguments: &[&str]) {
    // One that is left over must not stay.
    std::thread::spawn(|| {
        std::thread::sleep(LIVELY * 10);
        std::process::exit(1);
    });
    let place = |kind: &str, at: &str| Place { kind: kind.to_owned(), at: at.to_owned() };
    match *arguments {
        ["sleep"] => std::thread::sleep(LIVELY / 3),
        [kind, at] => serve(&place(kind, at)),
        [kind, at, "count", counter, rounds] => {
            count_up(&place(kind, at), counter.as_ref(), rounds.parse().expect("a number"));
        }
        [kind, at, "chaos", log, seat] => take_part(&place(kind, at), log.as_ref(), seat.parse().expect("a number")),
        _ => panic!("second sleep | KIND PLACE [count FILE ROUNDS | chaos LOG SEAT]"),
    }
}

fn serve(place: &Place) {
    let take = place.open();
    let mut held = None;
    // They outlive this process, as what a program starts may.
    let mut started = Vec::new();
    for line in std::io::stdin().lines().map_while(std::result::Result::ok) {
        let mut take = |wait: &Wait| match take(wait) {
            Ok(taken) => {
                let answer = taken.recovered.map_or("held".to_owned(), |died| format!("held recovered {died}"));
                held = Some(taken);
                answer
            }
            Err(error) => describe(&error),
        };
        let (command, argument) = line.split_once(' ').unwrap_or((&line, ""));
        let answer = match command {
            "try" => take(&Wait::none()),
            "lock" => take(&Wait::forever()),
            "lock-for" => take(&Wait::at_most(Duration::from_millis(argument.parse().expect("milliseconds")))),
            "release" => match held.take().map(Held::release) {
                Some(Ok(())) => "released".to_owned(),
                Some(Err(error)) => describe(&error),
                None => "error: not held".to_owned(),
            },
            "spawn" => {
                let null = [(); 3].map(|()| Stdio::null());
                let [input, output, errors] = null;
                let mut command = Command::new(program());
                command.arg("sleep").stdin(input).stdout(output).stderr(errors);
                started.push(command.spawn().expect("it starts"));
                "spawned".to_owned()
            }
            "panic" => {
                let panics = std::thread::scope(|scope| {
                    let work = || {
                        let _held = place.open()(&Wait::none()).expect("free");
                        std::panic::resume_unwind(Box::new("on purpose"));
                    };
                    scope.spawn(work).join().is_err()
                });
                if panics { "panicked".to_owned() } else { "error: no panic".to_owned() }
            }
            _ => format!("error: no command {line:?}"),
        };
        println!("{answer}");
    }
}

fn describe(error: &lockkit::Error) -> String {
    let source = std::error::Error::source(error).map(|source| format!(": {source}"));
    format!("error: {error}{}", source.unwrap_or_default())
}

fn count_up(place: &Place, counter: &Path, rounds: u32) {
    let take = place.open();
    for _ in 0..rounds {
        let _held = take(&Wait::forever()).expect("the lock");
        let count: u32 = std::fs::read_to_string(counter).expect("a counter").parse().expect("a number");
        File::create(counter).expect("a counter").write_all((count + 1).to_string().as_bytes()).expect("room");
    }
}

/// A record of the chaos: when, by which process, whether it came in or goes out, and the pid of who died before.
#[derive(Clone, Copy, Debug)]
struct Event {
    nanos: u64,
    seat: u64,
    comes_in: bool,
    recovered: Option<u32>,
}

const RECORD: usize = 32;

fn now() -> u64 {
    u64::try_from(SystemClock.now().as_nanos()).expect("not so long ago")
}

impl Event {
    /// Appends it to the log, which only who is inside does.
    fn append(self, log: &mut File) {
        let recovered = self.recovered.map_or(u64::MAX, u64::from);
        let words = [self.nanos, self.seat, self.comes_in.into(), recovered];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        log.write_all(&bytes).expect("the log takes a record");
    }

    fn read(record: &[u8]) -> Self {
        let word = |at: usize| u64::from_ne_bytes(std::array::from_fn(|byte| record[at * 8 + byte]));
        Self { nanos: word(0), seat: word(1), comes_in: word(2) == 1, recovered: u32::try_from(word(3)).ok() }
    }
}

fn take_part(place: &Place, log: &Path, seat: u64) {
    let take = place.open();
    let mut log = OpenOptions::new().append(true).open(log).expect("the log");
    for round in seat.. {
        let wait = match round % 3 {
            0 => Wait::none(),
            1 => Wait::at_most(Duration::from_micros(round * 977 % 20_000)),
            _ => Wait::forever(),
        };
        match take(&wait) {
            Ok(held) => {
                Event { nanos: now(), seat, comes_in: true, recovered: held.recovered }.append(&mut log);
                let end = Instant::now() + Duration::from_micros(round * 131 % 300);
                while Instant::now() < end {
                    std::hint::spin_loop();
                }
                Event { nanos: now(), seat, comes_in: false, recovered: None }.append(&mut log);
                // Of a lease whose record somebody else keeps locked, as one does that is not let run, the heartbeat makes
                // up for it.
                if let Err(error) = held.release() {
                    assert!(place.kind == "lease", "{}", describe(&error));
                }
            }
            Err(error) => assert!(error.is_temporary(), "{error}"),
        }
    }
}

/// Whether this runs under Wine, which does some things not as Windows does.
pub fn is_wine() -> bool {
    #[cfg(windows)]
    {
        use std::ffi::{c_char, c_void};
        #[link(name = "kernel32")]
        unsafe extern "system" {
            fn GetModuleHandleA(name: *const c_char) -> *mut c_void;
            fn GetProcAddress(module: *mut c_void, name: *const c_char) -> *mut c_void;
        }
        // SAFETY: both names end with a zero, and that module is loaded in every process for ever.
        unsafe { !GetProcAddress(GetModuleHandleA(c"ntdll".as_ptr()), c"wine_get_version".as_ptr()).is_null() }
    }
    #[cfg(not(windows))]
    false
}

/// Whether this runs under Wine, and says that a case is left out there, and why. On Windows it runs.
pub fn wine_cannot_judge(why: &str) -> bool {
    if is_wine() {
        println!("left out under Wine: {why}");
    }
    is_wine()
}

/// What Wine does otherwise with files that are deleted.
pub const DELETED: &str = "a file that is deleted while it is open keeps its name there";

/// Makes a module `$module` with a test for every case, for one kind of lock.
#[macro_export]
macro_rules! everywhere {
    ($module:ident, $kind:literal) => {
        $crate::everywhere!($module, $kind;
            a_lock_is_taken_refused_and_taken_again,
            a_waiter_is_cancelled_wherever_it_is,
            a_waiter_goes_on_when_another_process_releases,
            a_killed_holder_frees_the_lock_for_a_waiter_and_for_a_newcomer,
            a_killed_waiter_does_not_hold_up_others,
            workers_count_without_losing_one,
            what_a_holder_starts_does_not_inherit_the_lock,
            a_panic_releases_and_so_does_a_drop_elsewhere,
            kills_at_random_never_let_two_in,
        );
    };
    ($module:ident, $kind:literal; $($case:ident,)*) => {
        mod $module {
            $(#[test]
            fn $case() {
                $crate::everywhere::cases::$case($kind);
            })*
        }
    };
}

/// The cases. Each is a function of the kind of lock.
#[allow(missing_docs)] // Their names are sentences.
pub mod cases {
    use lockkit::CancelToken;

    use super::*;

    const SHORT: Wait = Wait::at_most(Duration::from_millis(20));

    pub fn a_lock_is_taken_refused_and_taken_again(kind: &str) {
        let place = Place::fresh(kind);
        let (take, other) = (place.open(), place.open());
        for wait in [Wait::none(), Wait::forever(), Wait::at_most(LIVELY), SHORT] {
            let held = take(&wait).unwrap();
            assert_eq!(held.recovered, None);
            for taker in [&take, &other] {
                assert!(taker(&Wait::none()).err().unwrap().is_held());
                assert!(taker(&SHORT).err().unwrap().is_timeout());
            }
            held.release().unwrap();
        }
        drop(other(&Wait::none()).unwrap());
        place.clean();
    }

    pub fn a_waiter_is_cancelled_wherever_it_is(kind: &str) {
        let place = Place::fresh(kind);
        let take = place.open();
        let held = take(&Wait::none()).unwrap();
        for pause in [0, 1, 30] {
            let token = CancelToken::new();
            let wait = Wait::forever().or_cancelled(&token);
            std::thread::scope(|scope| {
                let waiter = scope.spawn(|| take(&wait).err().unwrap());
                // Only to come at another moment of the other thread.
                std::thread::sleep(Duration::from_millis(pause));
                token.cancel();
                assert!(waiter.join().unwrap().is_cancelled());
            });
            assert!(take(&wait).err().unwrap().is_cancelled());
        }
        held.release().unwrap();
        drop(take(&Wait::none()).unwrap());
        place.clean();
    }

    pub fn a_waiter_goes_on_when_another_process_releases(kind: &str) {
        let place = Place::fresh(kind);
        let (mut holder, mut waiter) = (Second::start(&place), Second::start(&place));
        for command in ["lock", "lock-for 30000"] {
            holder.expect("try", "held");
            waiter.tell(command);
            holder.expect("release", "released");
            assert_eq!(waiter.answer(), "held");
            assert!(holder.ask("try").starts_with("error: "));
            waiter.expect("release", "released");
        }
        place.clean();
    }

    pub fn a_killed_holder_frees_the_lock_for_a_waiter_and_for_a_newcomer(kind: &str) {
        let place = Place::fresh(kind);
        let (mut holder, mut waiter) = (Second::start(&place), Second::start(&place));
        holder.expect("lock", "held");
        waiter.tell("lock");
        holder.kill();
        assert_eq!(waiter.answer(), place.told(holder.pid()));
        // Nobody else has it open when this one dies.
        waiter.kill();
        let mut next = Second::start(&place);
        next.expect("try", &place.told(waiter.pid()));
        next.expect("release", "released");
        next.expect("try", "held");
        next.expect("release", "released");
        drop(next);
        place.clean();
    }

    pub fn a_killed_waiter_does_not_hold_up_others(kind: &str) {
        let place = Place::fresh(kind);
        let [mut holder, mut dies, mut next] = [(); 3].map(|()| Second::start(&place));
        holder.expect("lock", "held");
        dies.tell("lock");
        next.tell("lock");
        dies.kill();
        holder.expect("release", "released");
        // The one that was killed may have come in before, if it was quick.
        assert!(next.answer().starts_with("held"));
        next.expect("release", "released");
        place.clean();
    }

    pub fn workers_count_without_losing_one(kind: &str) {
        let place = Place::fresh(kind);
        let folder = tempfile::tempdir().unwrap();
        let counter = folder.path().join("counter");
        std::fs::write(&counter, "0").unwrap();
        // Under Wine all takes much longer.
        let rounds = if is_wine() { 20 } else { 100 };
        let start = |_| {
            let mut command = place.command();
            command.arg("count").arg(&counter).arg(rounds.to_string()).stdin(Stdio::null()).spawn().unwrap()
        };
        let workers: Vec<Child> = (0..6).map(start).collect();
        for mut worker in workers {
            assert!(worker.wait().unwrap().success());
        }
        assert_eq!(std::fs::read_to_string(counter).unwrap(), (6 * rounds).to_string());
        place.clean();
    }

    pub fn what_a_holder_starts_does_not_inherit_the_lock(kind: &str) {
        let place = Place::fresh(kind);
        let (mut holder, mut next) = (Second::start(&place), Second::start(&place));
        holder.expect("lock", "held");
        holder.expect("spawn", "spawned");
        holder.expect("release", "released");
        next.expect("try", "held");
        next.expect("spawn", "spawned");
        next.kill();
        // A program is told to be started a moment before the system has closed what it is not to have.
        holder.expect("lock", &place.told(next.pid()));
        holder.expect("release", "released");
        place.clean();
    }

    pub fn a_panic_releases_and_so_does_a_drop_elsewhere(kind: &str) {
        let place = Place::fresh(kind);
        let mut panics = Second::start(&place);
        panics.expect("panic", "panicked");
        let take = place.open();
        let held = take(&Wait::none()).unwrap();
        assert_eq!(held.recovered, None);
        std::thread::spawn(move || drop(held)).join().unwrap();
        drop(take(&Wait::none()).unwrap());
        place.clean();
    }

    /// Six processes take the lock in every manner, and one after the other is killed and started anew. No two may be
    /// inside at once; who comes after one that died inside is told, and nobody is told of the living.
    pub fn kills_at_random_never_let_two_in(kind: &str) {
        // The suite has a longer one for each of these kinds.
        let seconds = std::env::var("LOCKKIT_CHAOS_SECONDS").map_or(5, |text| text.parse().expect("whole seconds"));
        let place = Place::fresh(kind);
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        File::create(&log).unwrap();
        let mut seats = 0_u64;
        // Of each seat, when it was killed, and when it was known to be dead.
        let mut deaths: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
        let mut pids: HashMap<u32, Vec<u64>> = HashMap::new();
        let mut start = || {
            seats += 1;
            let mut command = place.command();
            command.arg("chaos").arg(&log).arg(seats.to_string()).stdin(Stdio::null());
            (seats, command.spawn().expect("a process starts"))
        };
        let mut kill = |(seat, mut child): (u64, Child)| {
            let called = now();
            assert!(child.try_wait().unwrap().is_none(), "a process ended on its own");
            child.kill().unwrap();
            child.wait().unwrap();
            deaths.insert(seat, (called, now()));
            pids.entry(child.id()).or_default().push(seat);
        };
        let mut processes: Vec<(u64, Child)> = (0..6).map(|_| start()).collect();
        let end = Instant::now() + Duration::from_secs(seconds);
        let mut victim = 0;
        let mut kills = 0;
        let length = || std::fs::metadata(&log).unwrap().len();
        while Instant::now() < end || kills < 20 || length() < 60 * RECORD as u64 {
            // However slow the machine is, somebody comes in between two kills.
            let (before, patience) = (length(), Instant::now() + LIVELY);
            while length() == before {
                assert!(Instant::now() < patience, "nobody comes in");
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_micros(now() % 4_000));
            kills += 1;
            victim = (victim + 1) % processes.len();
            let killed = std::mem::replace(&mut processes[victim], start());
            kill(killed);
        }
        processes.into_iter().for_each(&mut kill);
        let held = place.open()(&Wait::at_most(Duration::from_secs(5))).expect("free soon after the last death");
        let last = Event { nanos: now(), seat: 0, comes_in: true, recovered: held.recovered };
        drop(held);

        let bytes = std::fs::read(&log).unwrap();
        assert_eq!(bytes.len() % RECORD, 0, "whole records only");
        let mut events: Vec<Event> = bytes.chunks_exact(RECORD).map(Event::read).collect();
        events.push(last);
        let mut holds: Vec<(Event, Option<u64>)> = Vec::new();
        for event in events {
            match event.comes_in {
                true => holds.push((event, None)),
                false => {
                    let (hold, out) = holds.last_mut().expect("who goes out came in");
                    assert_eq!(hold.seat, event.seat, "somebody came in while another was inside");
                    *out = Some(event.nanos);
                }
            }
        }
        let mut died_inside = 0;
        for pair in holds.windows(2) {
            let [(before, out), (after, _)] = pair else { unreachable!("windows of two") };
            let until = out.unwrap_or_else(|| deaths[&before.seat].0.max(before.nanos));
            assert!(until <= after.nanos, "{before:?} was inside until {until}, and then came {after:?}");
            died_inside += u32::from(out.is_none());
            if !place.tells_deaths() {
                continue;
            }
            match after.recovered {
                None => assert!(out.is_some(), "{after:?} was not told that {before:?} died inside"),
                // It, or one that had just taken the lock, or was just giving it back.
                Some(died) => assert!(
                    pids.get(&died).is_some_and(|seats| {
                        seats.iter().any(|seat| before.nanos <= deaths[seat].1 && deaths[seat].0 <= after.nanos)
                    }),
                    "{after:?} was told that {died} died, after {before:?}"
                ),
            }
        }
        println!("{kind}: {} holds, {} kills, {died_inside} inside", holds.len(), deaths.len());
        place.clean();
    }
}
