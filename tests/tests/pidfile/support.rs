//! Helpers of the tests.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime};

use lockkit::PidFile;
use lockkit_tests::{Actor, LIVELY, Spec, sleeper};
use tempfile::TempDir;

/// A pid that the kernel never assigns: its highest is one less.
pub(crate) const DEAD: u32 = 4_194_304;

/// The user that the tests act as when they have the choice.
#[cfg(target_os = "linux")]
pub(crate) const NOBODY: u32 = 65_534;

/// Longer than a file counts as young.
pub(crate) const OLD: Duration = Duration::from_secs(10);

/// Clearly longer than the margin between the clocks and the granularity of both.
pub(crate) const LONG_AGO: Duration = Duration::from_secs(120);

/// Creates a directory for one test, and returns the path of a pidfile in it.
pub(crate) fn fresh_path() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("app.pid");
    (directory, path)
}

pub(crate) fn spec(path: &Path) -> Spec {
    Spec::parse(&format!("pidfile:{}", path.display()))
}

pub(crate) fn lock(path: &Path) -> PidFile {
    PidFile::new(path).unwrap()
}

pub(crate) fn write(path: &Path, text: impl AsRef<[u8]>) {
    fs::write(path, text).unwrap();
}

pub(crate) fn write_ago(path: &Path, text: impl AsRef<[u8]>, ago: Duration) {
    write(path, text);
    set_age(path, ago);
}

pub(crate) fn set_age(path: &Path, ago: Duration) {
    File::options()
        .write(true)
        .open(path)
        .unwrap()
        .set_modified(SystemTime::now() - ago)
        .unwrap();
}

pub(crate) fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

pub(crate) fn first_line(path: &Path) -> String {
    text(path).lines().next().unwrap().to_owned()
}

pub(crate) fn my_pid() -> String {
    std::process::id().to_string()
}

/// A lockkit pidfile as a killed owner left it: its content, its time and its identity.
pub(crate) struct LeftFile {
    pub(crate) pid: u32,
    pub(crate) text: String,
    written: SystemTime,
    #[cfg(target_os = "linux")]
    identity: Vec<u8>,
}

/// The extended attribute of the identity, and the offsets of its fields.
#[cfg(target_os = "linux")]
pub(crate) const IDENTITY: &str = "user.lockkit";

#[cfg(target_os = "linux")]
pub(crate) const START: usize = 5;

#[cfg(target_os = "linux")]
pub(crate) const BOOT: usize = 13;

#[cfg(target_os = "linux")]
pub(crate) const NAMESPACE: usize = 29;

#[cfg(target_os = "linux")]
pub(crate) const HOST: usize = 37;

impl LeftFile {
    pub(crate) fn of_killed_owner() -> Self {
        let (_directory, path) = fresh_path();
        let mut actor = Actor::start(&spec(&path));
        actor.expect("try", "held");
        actor.kill();
        Self::at(&path)
    }

    pub(crate) fn at(path: &Path) -> Self {
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
    pub(crate) fn with_changed_byte(&self, at: usize) -> Self {
        let mut identity = self.identity.clone();
        identity[at] ^= 0x55;
        Self {
            pid: self.pid,
            text: self.text.clone(),
            written: self.written,
            identity,
        }
    }

    pub(crate) fn restore(&self, path: &Path) {
        write(path, &self.text);
        File::options()
            .write(true)
            .open(path)
            .unwrap()
            .set_modified(self.written)
            .unwrap();
        #[cfg(target_os = "linux")]
        rustix::fs::setxattr(
            path,
            IDENTITY,
            &self.identity,
            rustix::fs::XattrFlags::empty(),
        )
        .unwrap();
    }
}

#[cfg(target_os = "linux")]
pub(crate) fn identity(path: &Path) -> Option<Vec<u8>> {
    let mut buffer = [0; 256];
    let length = rustix::fs::getxattr(path, IDENTITY, &mut buffer).ok()?;
    Some(buffer[..length].to_vec())
}

/// A process of another program, killed at the end.
pub(crate) struct Foreign(Child);

impl Foreign {
    pub(crate) fn start() -> Self {
        Self(sleeper(LIVELY * 20).spawn().unwrap())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }

    pub(crate) fn end(&mut self) {
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
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Starts an actor through the program `wrapper`, which executes its last two arguments: the actor
/// and its lock.
pub(crate) fn start_through(spec: &Spec, wrapper: &str, arguments: &[&str]) -> Actor {
    Actor::start_with(spec, |command| {
        let (program, spec) = (
            command.get_program().to_owned(),
            command.get_args().next().unwrap().to_owned(),
        );
        *command = Command::new(wrapper);
        command
            .args(arguments)
            .arg(program)
            .arg(spec)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
    })
}

/// Starts an actor that sees no /proc, if the machine allows that.
pub(crate) fn start_without_proc(spec: &Spec) -> Option<Actor> {
    let script = "mount -t tmpfs none /proc";
    let allowed = Command::new("unshare")
        .args(["-m", "sh", "-c", script])
        .stderr(Stdio::null())
        .status();
    allowed.is_ok_and(|status| status.success()).then(|| {
        start_through(
            spec,
            "unshare",
            &["-m", "sh", "-c", &format!("{script} && exec \"$0\" \"$1\"")],
        )
    })
}

/// Returns the program, if it is installed.
#[cfg(target_os = "linux")]
pub(crate) fn installed(name: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin";
    path.split(':')
        .map(|directory| Path::new(directory).join(name))
        .find(|path| path.is_file())
}

/// Returns a Python that every user may run.
#[cfg(target_os = "linux")]
pub(crate) fn python() -> Option<PathBuf> {
    Some(PathBuf::from("/usr/bin/python3")).filter(|path| path.is_file())
}
