//! Real servers for tests: started from the installed software, on a free loopback port, in a
//! temporary directory. They end with the test, whatever its result.
//!
//! Each server runs in a process group of its own under a *warden* (a program of this package). The
//! warden's standard input is a pipe whose other end only the test's process has. The pipe closes
//! when the test is done with the server, or when its process ends for any reason. Then the warden
//! kills the group, and in the second case removes the directory.
//!
//! The tests of a process share a server in a `static` [`Shared`]. A drill that kills or freezes
//! its server starts one of its own.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use rustix::process::{
    Pid, Signal, WaitOptions, getpid, kill_process, kill_process_group, set_child_subreaper,
    waitpid,
};

use crate::{program, until, wait_until_stopped};

/// A running program under a warden. Dropping it kills the program. The directory is removed when
/// the last [`ServerDir`] is dropped.
pub struct Server {
    warden: Child,
    group: Pid,
}

impl Server {
    /// Starts `command` under a warden and waits until a process listens on `port`.
    ///
    /// # Errors
    /// The program's standard error, if it ended instead.
    pub fn start(directory: &ServerDir, command: &Command, port: u16) -> Result<Self, String> {
        let mut warden = Command::new(program("warden"));
        warden
            .arg(&directory.0)
            .arg(command.get_program())
            .args(command.get_args());
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => warden.env(key, value),
                None => warden.env_remove(key),
            };
        }
        let mut warden = warden
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("warden");
        let mut line = String::new();
        BufReader::new(warden.stdout.as_mut().expect("a pipe"))
            .read_line(&mut line)
            .expect("the warden says who it is");
        let group = line
            .trim()
            .parse()
            .ok()
            .and_then(Pid::from_raw)
            .expect("a process");
        let mut server = Self { warden, group };
        until("the server listens", || {
            TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok() || server.has_ended()
        });
        match server.has_ended() {
            true => Err(std::fs::read_to_string(directory.log()).unwrap_or_default()),
            false => Ok(server),
        }
    }

    /// Sends a signal to all its processes. A server that gets `STOP` runs no code any more when
    /// this returns.
    pub fn signal(&self, signal: Signal) {
        kill_process_group(self.group, signal).expect("the server runs");
        if signal == Signal::STOP {
            wait_until_stopped(self.group.as_raw_nonzero().get().unsigned_abs());
        }
    }

    /// Kills it and waits until it is gone. Its directory stays.
    pub fn kill(mut self) {
        self.signal(Signal::KILL);
        self.end();
    }

    fn end(&mut self) {
        // The message says that the test's process still exists and cleans up itself. It must
        // precede the wait, which closes the pipe.
        if let Some(mut farewell) = self.warden.stdin.take() {
            let _ = farewell.write_all(b"bye");
        }
        let _ = self.warden.wait();
    }

    fn has_ended(&mut self) -> bool {
        self.warden.try_wait().expect("a child").is_some()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// A directory of a server, below the temporary directory, which every user may enter, because some
/// servers run as a user of their own. Its wardens remove it if the test's process ends before the
/// drop.
pub struct ServerDir(PathBuf);

impl ServerDir {
    /// Creates a directory.
    pub fn new(name: &str) -> Self {
        Self::within(&std::env::temp_dir(), name)
    }

    /// Creates a directory in memory, if there is plenty of it, for a server that writes each
    /// change to disk before it answers.
    pub fn in_memory(name: &str) -> Self {
        const PLENTY: u64 = 1 << 30;
        const MEMORY: &str = "/dev/shm";
        match rustix::fs::statvfs(MEMORY) {
            Ok(memory) if memory.f_bavail * memory.f_frsize >= PLENTY => {
                Self::within(MEMORY.as_ref(), name)
            }
            _ => Self::new(name),
        }
    }

    fn within(base: &Path, name: &str) -> Self {
        let directory = base.join(crate::fresh_name(&format!("lockkit-{name}")));
        std::fs::create_dir(&directory).expect("a temporary directory");
        Self(directory)
    }

    /// Returns its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Returns the file with the server's standard output and standard error.
    pub fn log(&self) -> PathBuf {
        self.0.join("log")
    }
}

impl Drop for ServerDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A server for all tests of a process, started at its first use.
pub struct Shared<S: 'static>(OnceLock<Result<S, String>>, fn() -> Result<S, String>);

impl<S> Shared<S> {
    /// Creates a shared server. `start` starts it, or returns the reason why it cannot.
    pub const fn new(start: fn() -> Result<S, String>) -> Self {
        Self(OnceLock::new(), start)
    }

    /// Returns the server, or the reason why there is none.
    ///
    /// # Errors
    /// The missing resource of this machine.
    pub fn get(&self) -> Result<&S, &str> {
        self.0.get_or_init(self.1).as_ref().map_err(String::as_str)
    }
}

/// Returns the first of these programs that is installed; each is a name to be looked up, or an
/// absolute path.
///
/// # Errors
/// A sentence that names them.
pub fn installed(programs: &[&str]) -> Result<PathBuf, String> {
    let directories: Vec<_> =
        std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).collect();
    let found = programs.iter().flat_map(|name| {
        directories
            .iter()
            .map(move |directory| directory.join(name))
    });
    found
        .into_iter()
        .find(|path| path.is_file())
        .ok_or_else(|| format!("{} is not installed", programs.join(" or ")))
}

/// Returns a loopback port without a listener. If another process listens there before the server
/// does, the server fails to start.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("an address").port()
}

/// Returns the children of a process.
///
/// # Panics
/// If there is no `/proc`.
pub fn children_of(parent: u32) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").expect("/proc").flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let after_name = stat.rsplit(')').next().unwrap_or_default();
        after_name.split_whitespace().nth(1) == Some(&parent.to_string())
    })
    .collect()
}

/// Removes the System V memory that a process has made. It outlives the kill of a PostgreSQL
/// server.
fn remove_shared_memory_of(maker: Pid) {
    let all = std::fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
    // key, id, permissions, size, maker, last user, attached
    let columns = all
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>());
    let made =
        columns.filter(|columns| columns.get(4) == Some(&&*maker.as_raw_nonzero().to_string()));
    for columns in made.filter(|columns| columns.get(6) == Some(&"0")) {
        let _ = Command::new("ipcrm")
            .args(["-m", columns[1]])
            .stderr(Stdio::null())
            .status();
    }
}

/// Acts as the warden: starts the program in a group of its own, prints its number, and ensures its
/// end.
pub fn watch_over(directory: &Path, mut program: impl Iterator<Item = OsString>) {
    // The server's orphans become children of the warden, even from a group of their own.
    set_child_subreaper(Some(getpid())).expect("it is allowed");
    let log = std::fs::File::create(directory.join("log")).expect("a log");
    let mut command = Command::new(program.next().expect("a program"));
    command
        .args(program)
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a descriptor"))
        .stderr(log);
    let mut server = command
        .process_group(0)
        .spawn()
        .expect("the program starts");
    let group = Pid::from_child(&server);
    println!("{}", group.as_raw_nonzero());
    let (send, is_silent) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut said = Vec::new();
        let _ = std::io::stdin().read_to_end(&mut said);
        // The message precedes the kill, because the waiting thread reads it as soon as the server
        // is gone.
        let _ = send.send(said.is_empty());
        let _ = kill_process_group(group, Signal::KILL);
    });
    server.wait().expect("a child");
    // The server's children are killed with it, and so are all further descendants.
    let _ = kill_process_group(group, Signal::KILL);
    while let children @ [_, ..] = &*children_of(std::process::id()) {
        for child in children
            .iter()
            .filter_map(|child| Pid::from_raw(child.cast_signed()))
        {
            let _ = kill_process(child, Signal::KILL);
            let _ = waitpid(Some(child), WaitOptions::empty());
        }
    }
    remove_shared_memory_of(group);
    if is_silent.try_recv().unwrap_or(false) {
        // The test's process ended without a message, and left the directory.
        let _ = std::fs::remove_dir_all(directory);
    }
}
