//! `lockkit doctor`: can this file system be trusted with locks?
//!
//! It does not rely on the name of the file system, but tests it. It works in its own directory
//! below the given one, with a second process that it forks and kills. The behaviour with other
//! hosts, which it cannot test, it derives from the kind.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use lockkit::{CancelToken, LockManager, ShmLockManager, Wait};
use rustix::fs::{AtFlags, CWD, FlockOperation, OFlags, flock, linkat, statfs};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::{
    Pid, Signal, WaitOptions, kill_process, set_parent_process_death_signal, waitpid,
};
use serde::Serialize;

use crate::failure::{Failure, Outcome, code};
use crate::report;
use crate::style::{BAD, GOOD, ODD, TITLE, paint, plain};
use crate::supervise::Signals;
use crate::sys;

/// Tests which kinds of lock are reliable on the file system of a directory.
///
/// The test runs two processes. It checks whether flock excludes the other process, whether a kill
/// releases the lock, and whether links and renames are atomic. It measures the resolution of the
/// file clock, and checks whether tables of locks work. The exit code is 0 if every kind of lock
/// can be used, 1 if some kinds cannot, and 2 if no kind on files can.
#[derive(clap::Args)]
#[command(after_help = "Example: lockkit doctor /srv/shared")]
pub(crate) struct Doctor {
    /// The directory. The test creates a directory in it, and removes it at the end.
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Writes JSON: {"version":1,"folder":…,"filesystem":{…},"checks":[…],"advice":[…]}; see
    /// docs/CLI.md.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    version: u32,
    /// The name of the field is older than the word.
    #[serde(rename = "folder")]
    directory: String,
    filesystem: FileSystem,
    checks: Vec<Check>,
    advice: Vec<Advice>,
}

#[derive(Clone, Copy, Serialize)]
struct FileSystem {
    kind: &'static str,
    /// The number that statfs(2) returns.
    magic: u64,
    place: Reach,
}

/// The other users of the same files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Reach {
    /// This kernel alone.
    Local,
    /// This kernel alone, and the files do not outlive a restart.
    Memory,
    /// Other hosts.
    Network,
    /// Only a program outside the kernel, or another kernel, knows which of these it is.
    Foreign,
}

#[derive(Serialize)]
struct Check {
    name: &'static str,
    passed: bool,
    detail: String,
}

#[derive(Serialize)]
struct Advice {
    /// The kind of lock.
    lock: &'static str,
    usable: bool,
    reason: String,
}

/// The kinds by the numbers of statfs(2).
const KINDS: [(u64, &str, Reach); 25] = [
    (0x6969, "nfs", Reach::Network),
    (0x517b, "smb", Reach::Network),
    (0xff53_4d42, "cifs", Reach::Network),
    (0xfe53_4d42, "smb2", Reach::Network),
    (0x5346_414f, "afs", Reach::Network),
    (0x00c3_6400, "ceph", Reach::Network),
    (0x0bd0_0bd0, "lustre", Reach::Network),
    (0x4750_4653, "gpfs", Reach::Network),
    (0x0116_1970, "gfs2", Reach::Network),
    (0x7461_636f, "ocfs2", Reach::Network),
    (0x0102_1997, "9p", Reach::Foreign),
    (0x6573_5546, "fuse", Reach::Foreign),
    (0x786f_4256, "vboxsf", Reach::Foreign),
    (0x794c_7630, "overlay", Reach::Local),
    (0x0102_1994, "tmpfs", Reach::Memory),
    (0x8584_58f6, "ramfs", Reach::Memory),
    (0xef53, "ext4", Reach::Local),
    (0x5846_5342, "xfs", Reach::Local),
    (0x9123_683e, "btrfs", Reach::Local),
    (0xf2f5_2010, "f2fs", Reach::Local),
    (0x2fc1_2fc1, "zfs", Reach::Local),
    (0xca45_1a4e, "bcachefs", Reach::Local),
    (0x4d44, "vfat", Reach::Local),
    (0x2011_bab0, "exfat", Reach::Local),
    (0x7366_746e, "ntfs3", Reach::Local),
];

impl Doctor {
    pub(crate) fn carry_out(self) -> Outcome {
        let directory = self.directory.canonicalize().map_err(|error| {
            Failure::io(format!("look at {}", self.directory.display()), error)
                .example("lockkit doctor /srv/shared")
        })?;
        let filesystem = FileSystem::of(&directory)?;
        // First, so that no signal can arrive between the creation of the directory and its
        // cleanup.
        let (signals, stop) = (Signals::block()?, CancelToken::new());
        let bench = Bench::new(&directory)?;
        let checks = signals.cancelling(&stop, || bench.checks(&stop))?;
        drop(bench);
        if let Some(signal) = signals.first_if(stop.is_cancelled()) {
            return Ok(code::SIGNALLED + signal);
        }
        let advice = advise(filesystem, &checks);
        let directory = directory.display().to_string();
        let report = Report {
            version: report::VERSION,
            directory,
            filesystem,
            checks,
            advice,
        };
        match self.json {
            true => report::json(&report)?,
            false => report.show()?,
        }
        let unusable = report.advice.iter().filter(|lock| !lock.usable).count();
        Ok(match unusable {
            0 => code::OK,
            // All but the lock that needs no files.
            all if all + 1 == report.advice.len() => 2,
            _ => 1,
        })
    }
}

impl FileSystem {
    fn of(directory: &Path) -> Result<Self, Failure> {
        let found = statfs(directory)
            .map_err(|error| Failure::io(format!("look at {}", directory.display()), error))?;
        // Some numbers have their highest bit set, and are negative if the type is signed.
        let magic = u64::from(found.f_type as u32);
        let known = KINDS.iter().find(|(number, ..)| *number == magic);
        let (kind, place) = known.map_or(("unknown", Reach::Foreign), |(_, kind, place)| {
            (*kind, *place)
        });
        Ok(Self { kind, magic, place })
    }
}

/// A directory for the tests, which is removed at the end, also at a signal. A directory that a
/// killed doctor has left is removed by the next doctor once it is [`OLD`].
struct Bench(PathBuf);

/// The prefix of the name of such a directory.
const NAME: &str = ".lockkit-doctor-";
/// By the file system's own clock, because the directory may belong to another host: far longer
/// than any doctor needs it.
const OLD: Duration = Duration::from_secs(600);

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const FLOCK: &str = "flock excludes another process";
const SHARED: &str = "shared flocks go together";
const KILL: &str = "a killed process lets go";
const LINK: &str = "one of two processes wins a link";
const RENAME: &str = "a rename is never seen half done";
const NAMELESS: &str = "a file can be complete before it has a name";
const CLOCK: &str = "the clock of files";
const TABLE: &str = "locks in shared memory exclude another process";

/// The finding of a check, or the reason why it did not pass.
type Found = Result<String, String>;

/// A check.
type Try = fn(&Bench) -> Found;

/// The time limit for a second process, for what should happen at once.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// The number of races between two processes.
const ROUNDS: u32 = 200;

fn as_text(error: impl Into<io::Error>) -> String {
    error.into().to_string()
}

/// A second process, which is killed at the end.
struct Second(Pid);

impl Second {
    /// Starts it, and returns once it has reported that it is ready.
    fn start(work: impl FnOnce(&mut File) -> io::Result<()>) -> Result<Self, String> {
        let (mut ready, mut word) = sys::pipe().map_err(as_text)?;
        match sys::fork().map_err(as_text)? {
            None => {
                drop(ready);
                // It ends together with a killed doctor.
                let _ = set_parent_process_death_signal(Some(Signal::KILL));
                let done = work(&mut word).is_ok();
                std::process::exit(i32::from(!done))
            }
            Some(pid) => {
                drop(word);
                let second = Self(pid);
                match ready.read_exact(&mut [0]) {
                    Ok(()) => Ok(second),
                    Err(_) => Err("the second process could not do its part".to_owned()),
                }
            }
        }
    }

    fn ends_well(self) -> bool {
        let ended = retry_on_intr(|| waitpid(Some(self.0), WaitOptions::empty()));
        std::mem::forget(self);
        ended.is_ok_and(|ended| ended.is_some_and(|(_, status)| status.exit_status() == Some(0)))
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::KILL);
        let _ = retry_on_intr(|| waitpid(Some(self.0), WaitOptions::empty()));
    }
}

/// Sleeps until it is killed.
fn stay() -> io::Result<()> {
    std::thread::sleep(ANSWER_TIMEOUT * 4);
    Ok(())
}

impl Bench {
    fn new(directory: &Path) -> Result<Self, Failure> {
        let path = directory.join(format!("{NAME}{}", std::process::id()));
        let made = fs::DirBuilder::new().mode(0o700).create(&path);
        made.map_err(|error| {
            Failure::io(format!("make anything in {}", directory.display()), error)
        })?;
        let bench = Self(path);
        bench.clear_old(directory);
        Ok(bench)
    }

    /// Removes the directories that killed doctors have left.
    fn clear_old(&self, directory: &Path) {
        let written = |path: &Path| {
            let found = fs::symlink_metadata(path)
                .ok()
                .filter(fs::Metadata::is_dir)?;
            (found.uid() == rustix::process::geteuid().as_raw())
                .then(|| found.modified().ok())
                .flatten()
        };
        let Some(now) = written(&self.0) else { return };
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let is_one = entry
                .file_name()
                .as_encoded_bytes()
                .starts_with(NAME.as_bytes());
            let path = entry.path();
            let age = is_one
                .then(|| written(&path))
                .flatten()
                .and_then(|then| now.duration_since(then).ok());
            if age.is_some_and(|age| age > OLD) {
                let _ = fs::remove_dir_all(&path);
            }
        }
    }

    /// Runs the checks. Stops between two of them when `stop` is cancelled.
    fn checks(&self, stop: &CancelToken) -> Vec<Check> {
        let all: [(&'static str, Try); 8] = [
            (FLOCK, Self::flock),
            (SHARED, Self::shared),
            (KILL, Self::kill),
            (LINK, Self::link),
            (RENAME, Self::rename),
            (NAMELESS, Self::nameless),
            (CLOCK, Self::clock),
            (TABLE, Self::table),
        ];
        all.into_iter()
            .take_while(|_| !stop.is_cancelled())
            .map(|(name, check)| match check(self) {
                Ok(detail) => Check {
                    name,
                    passed: true,
                    detail,
                },
                Err(detail) => Check {
                    name,
                    passed: false,
                    detail,
                },
            })
            .collect()
    }

    fn open(&self, name: &str) -> io::Result<File> {
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(self.0.join(name))
    }

    /// Starts a second process that holds a flock on `name`.
    fn holder(&self, name: &str, operation: FlockOperation) -> Result<Second, String> {
        Second::start(|word| {
            let file = self.open(name)?;
            flock(&file, operation)?;
            word.write_all(b"!")?;
            stay()
        })
    }

    fn flock(&self) -> Found {
        let _second = self.holder("flock", FlockOperation::NonBlockingLockExclusive)?;
        let file = self.open("flock").map_err(as_text)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => Ok("it was kept out".to_owned()),
            Err(error) => Err(as_text(error)),
            Ok(()) => Err("both had the lock at once".to_owned()),
        }
    }

    fn shared(&self) -> Found {
        let _second = self.holder("shared", FlockOperation::NonBlockingLockShared)?;
        let file = self.open("shared").map_err(as_text)?;
        flock(&file, FlockOperation::NonBlockingLockShared).map_err(as_text)?;
        match flock(
            &self.open("shared").map_err(as_text)?,
            FlockOperation::NonBlockingLockExclusive,
        ) {
            Err(Errno::WOULDBLOCK) => Ok("and keep an exclusive one out".to_owned()),
            Err(error) => Err(as_text(error)),
            Ok(()) => Err("they do not keep an exclusive one out".to_owned()),
        }
    }

    fn kill(&self) -> Found {
        let second = self.holder("kill", FlockOperation::NonBlockingLockExclusive)?;
        let file = self.open("kill").map_err(as_text)?;
        let begun = Instant::now();
        kill_process(second.0, Signal::KILL).map_err(as_text)?;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(format!("after {} µs", begun.elapsed().as_micros())),
                Err(Errno::WOULDBLOCK) if begun.elapsed() < ANSWER_TIMEOUT => {
                    std::thread::sleep(Duration::from_micros(100));
                }
                Err(Errno::WOULDBLOCK) => {
                    return Err("its lock was still there after 5 s".to_owned());
                }
                Err(error) => return Err(as_text(error)),
            }
        }
    }

    fn link(&self) -> Found {
        let wins = |own: &Path| -> io::Result<u32> {
            fs::write(own, "")?;
            let mut won = 0;
            for round in 0..ROUNDS {
                match fs::hard_link(own, self.0.join(format!("link-{round}"))) {
                    Ok(()) => won += 1,
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(won)
        };
        let second = Second::start(|word| {
            word.write_all(b"!")?;
            let won = wins(&self.0.join("second"))?;
            fs::write(self.0.join("won"), won.to_string())
        })?;
        let won = wins(&self.0.join("first")).map_err(as_text)?;
        if !second.ends_well() {
            return Err("the second process could not link".to_owned());
        }
        let others: u32 = fs::read_to_string(self.0.join("won"))
            .ok()
            .and_then(|won| won.parse().ok())
            .unwrap_or_default();
        match won + others == ROUNDS {
            true => Ok(format!("{ROUNDS} times out of {ROUNDS}")),
            false => Err(format!(
                "in {ROUNDS} rounds there were {} winners",
                won + others
            )),
        }
    }

    fn rename(&self) -> Found {
        const TEXT: &str = "whole";
        let target = self.0.join("target");
        fs::write(&target, TEXT).map_err(as_text)?;
        let second = Second::start(|word| {
            word.write_all(b"!")?;
            for _ in 0..ROUNDS {
                let fresh = self.0.join("fresh");
                fs::write(&fresh, TEXT)?;
                fs::rename(&fresh, &target)?;
            }
            Ok(())
        })?;
        for _ in 0..ROUNDS {
            match fs::read_to_string(&target) {
                Ok(text) if text == TEXT => {}
                Ok(_) => return Err("a reader saw half a file".to_owned()),
                Err(error) => return Err(format!("a reader saw no file: {error}")),
            }
        }
        match second.ends_well() {
            true => Ok(format!("{ROUNDS} times out of {ROUNDS}")),
            false => Err("the second process could not rename".to_owned()),
        }
    }

    fn nameless(&self) -> Found {
        let mut options = File::options();
        let made = options
            .write(true)
            .custom_flags(OFlags::TMPFILE.bits() as i32)
            .open(&self.0)
            .map_err(as_text)?;
        let own = format!("/proc/self/fd/{}", made.as_raw_fd());
        linkat(CWD, own, CWD, self.0.join("named"), AtFlags::SYMLINK_FOLLOW).map_err(as_text)?;
        Ok("by O_TMPFILE and linkat".to_owned())
    }

    fn clock(&self) -> Found {
        let file = self.open("clock").map_err(as_text)?;
        let begun = Instant::now();
        let (mut last, mut finest) = (None, Duration::MAX);
        while begun.elapsed() < Duration::from_millis(60) {
            (&file).write_all(b".").map_err(as_text)?;
            let written = file
                .metadata()
                .and_then(|found| found.modified())
                .map_err(as_text)?;
            let step = last
                .replace(written)
                .and_then(|last| written.duration_since(last).ok());
            finest = step
                .filter(|step| !step.is_zero())
                .map_or(finest, |step| step.min(finest));
        }
        let ahead = last.map(|written| match written.duration_since(SystemTime::now()) {
            Ok(ahead) => (ahead, "ahead of"),
            Err(behind) => (behind.duration(), "behind"),
        });
        let offset = match ahead {
            Some((apart, side)) if apart > Duration::from_millis(100) => {
                format!("; it is {} ms {side} this machine's", apart.as_millis())
            }
            _ => String::new(),
        };
        match finest {
            Duration::MAX => Ok(format!("steps of more than 60 ms{offset}")),
            finest if finest < Duration::from_micros(10) => {
                Ok(format!("steps of {} ns{offset}", finest.as_nanos()))
            }
            finest => Ok(format!("steps of {} µs{offset}", finest.as_micros())),
        }
    }

    fn table(&self) -> Found {
        let path = self.0.join("table");
        let message = |error: lockkit::Error| Failure::from(error).message().to_owned();
        let table = ShmLockManager::create(&path, 64).map_err(message)?;
        let lock = table.allocate().map_err(message)?;
        let second = Second::start(|word| {
            let lock = ShmLockManager::open(&path).and_then(|table| table.retrieve(lock.id()));
            let _guard = lock.and_then(|lock| lock.try_lock())?;
            word.write_all(b"!")?;
            stay()
        })?;
        match lock.try_lock() {
            Err(error) if error.is_held() => {}
            Err(error) => return Err(message(error)),
            Ok(_) => return Err("both had the lock at once".to_owned()),
        }
        drop(second);
        let guard = lock
            .acquire(&Wait::at_most(ANSWER_TIMEOUT))
            .map_err(message)?;
        match guard.recovered() {
            Some(_) => Ok("and a killed one's is handed on".to_owned()),
            None => Err("the death of its holder went unnoticed".to_owned()),
        }
    }
}

const NAMED: &str = "named lock";

fn advise(filesystem: FileSystem, checks: &[Check]) -> Vec<Advice> {
    let kind = filesystem.kind;
    let advice = |lock, needed: &[&str], good: &str, elsewhere| {
        advice_on(lock, checks, needed, good, elsewhere)
    };
    let foreign = format!(
        "{kind} decides outside this kernel what a lock is, and may keep it on this host only"
    );
    let beyond = (filesystem.place == Reach::Foreign).then_some(foreign.as_str());
    let other_hosts = matches!(filesystem.place, Reach::Network | Reach::Foreign);
    let one_machine =
        other_hosts.then_some("other hosts may have the file, too, and do not share this memory");
    let pids = other_hosts.then_some(
        "a pid means nothing on another host: use a directory of this machine, such as /run",
    );
    vec![
        Advice {
            lock: NAMED,
            usable: true,
            reason: "it needs no directory at all: the kernel of this machine keeps it".to_owned(),
        },
        advice(
            "file lock",
            &[FLOCK, SHARED, KILL],
            file_reason(filesystem.place),
            beyond,
        ),
        advice(
            "pidfile",
            &[FLOCK, KILL],
            "the lock and the identity of the owner both hold",
            pids,
        ),
        advice(
            "lease",
            &[FLOCK, KILL],
            lease_reason(filesystem.place),
            beyond,
        ),
        advice(
            "table in shared memory",
            &[TABLE, NAMELESS],
            "locks of it take nanoseconds",
            one_machine,
        ),
        advice(
            "table in a directory",
            &[FLOCK, KILL],
            "flock excludes and is released by a kill",
            one_machine,
        ),
    ]
}

/// Returns the advice on a lock that needs these checks to pass. `good` is the reason for it, and
/// `elsewhere` a reason against it that no check shows.
fn advice_on(
    lock: &'static str,
    checks: &[Check],
    needed: &[&str],
    good: &str,
    elsewhere: Option<&str>,
) -> Advice {
    let failed = checks
        .iter()
        .find(|check| !check.passed && needed.contains(&check.name));
    match (failed, elsewhere) {
        (Some(check), _) => Advice {
            lock,
            usable: false,
            reason: format!("not so: {} ({})", check.name, check.detail),
        },
        (None, Some(why)) => Advice {
            lock,
            usable: false,
            reason: why.to_owned(),
        },
        (None, None) => Advice {
            lock,
            usable: true,
            reason: good.to_owned(),
        },
    }
}

/// Returns why file locks are usable.
fn file_reason(reach: Reach) -> &'static str {
    match reach {
        Reach::Network => {
            "flock works here; that it reaches other hosts, try with lockkit doctor's two processes there"
        }
        _ => "flock excludes and is released by a kill",
    }
}

/// Returns why leases are usable.
fn lease_reason(reach: Reach) -> &'static str {
    match reach {
        Reach::Network => {
            "what is held runs out by itself, also when a host is gone; give its token to what it guards"
        }
        Reach::Memory => {
            "flock works here, but a restart forgets its tokens: keep it on a disk if they must grow"
        }
        _ => "each step is whole, and what is held runs out by itself",
    }
}

impl Report {
    fn show(&self) -> Result<(), Failure> {
        report::say(|out| {
            let FileSystem { kind, magic, place } = self.filesystem;
            let reach = match place {
                Reach::Local => "of this machine",
                Reach::Memory => "in memory",
                Reach::Network => "that other hosts may share",
                Reach::Foreign => "that a program or a kernel outside this one answers for",
            };
            writeln!(
                out,
                "{} is on {} ({magic:#x}), a file system {reach}.",
                plain(&self.directory),
                paint(TITLE, kind)
            )?;
            for check in &self.checks {
                let mark = if check.passed {
                    paint(GOOD, "yes")
                } else {
                    paint(BAD, "no ")
                };
                writeln!(out, "  {mark}  {}: {}", check.name, check.detail)?;
            }
            writeln!(out, "{}", paint(TITLE, "What to use here:"))?;
            self.advice.iter().try_for_each(|advice| {
                let mark = if advice.usable {
                    paint(GOOD, "yes")
                } else {
                    paint(ODD, "no ")
                };
                writeln!(out, "  {mark}  {}: {}", advice.lock, advice.reason)
            })
        })
    }
}
