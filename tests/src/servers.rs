//! Real servers for tests: started from what is installed, on a free loopback port, in a temporary directory, and gone
//! whatever becomes of the test.
//!
//! Each server runs in a process group of its own under a *warden* (a program of this package), whose standard input is
//! a pipe that only the test's process has the other end of. When that closes, because the test is done with the server
//! or because its process is gone for whatever reason, the warden kills the group, and in the second case removes the
//! directory.
//!
//! A server that is shared by the tests of a process is a `static` [`Shared`]; a drill that kills or freezes its server
//! starts one of its own.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use rustix::process::{
    Pid, Signal, WaitOptions, getpid, kill_process, kill_process_group, set_child_subreaper, waitpid,
};

use crate::{program, until};

/// A running program under a warden. Dropping it kills the program; the directory goes when the last [`ServerDir`] does.
pub struct Server {
    warden: Child,
    group: Pid,
}

impl Server {
    /// Starts `command` under a warden and waits until something listens on `port`.
    ///
    /// # Errors
    /// What it wrote to standard error, if it ended instead.
    pub fn start(directory: &ServerDir, command: &Command, port: u16) -> Result<Self, String> {
        let mut warden = Command::new(program("warden"));
        warden.arg(&directory.0).arg(command.get_program()).args(command.get_args());
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => warden.env(key, value),
                None => warden.env_remove(key),
            };
        }
        let mut warden =
            warden.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("warden");
        let mut line = String::new();
        BufReader::new(warden.stdout.as_mut().expect("a pipe"))
            .read_line(&mut line)
            .expect("the warden says who it is");
        let group = line.trim().parse().ok().and_then(Pid::from_raw).expect("a process");
        let mut server = Self { warden, group };
        until("the server listens", || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok() || server.has_ended());
        match server.has_ended() {
            true => Err(std::fs::read_to_string(directory.log()).unwrap_or_default()),
            false => Ok(server),
        }
    }

    /// Sends a signal to all its processes.
    pub fn signal(&self, signal: Signal) {
        kill_process_group(self.group, signal).expect("the server runs");
    }

    /// Kills it and waits until it is gone. Its directory stays.
    pub fn kill(mut self) {
        self.signal(Signal::KILL);
        self.end();
    }

    fn end(&mut self) {
        // A word of farewell: the test's process is there yet, and cleans up itself. Before the wait, which closes the
        // pipe.
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

/// A directory of a server's, below the temporary one, which every user may enter: some servers run as one of their own.
/// Its wardens remove it when the test's process is gone before it is dropped.
pub struct ServerDir(PathBuf);

impl ServerDir {
    /// A new one.
    pub fn new(name: &str) -> Self {
        Self::within(&std::env::temp_dir(), name)
    }

    /// A new one in memory, where there is plenty of it, for a server that has each change on disk before it answers.
    pub fn in_memory(name: &str) -> Self {
        const PLENTY: u64 = 1 << 30;
        const MEMORY: &str = "/dev/shm";
        match rustix::fs::statvfs(MEMORY) {
            Ok(memory) if memory.f_bavail * memory.f_frsize >= PLENTY => Self::within(MEMORY.as_ref(), name),
            _ => Self::new(name),
        }
    }

    fn within(base: &Path, name: &str) -> Self {
        let directory = base.join(crate::fresh_name(&format!("lockkit-{name}")));
        std::fs::create_dir(&directory).expect("a temporary directory");
        Self(directory)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// What the server writes to its standard output and standard error.
    pub fn log(&self) -> PathBuf {
        self.0.join("log")
    }
}

impl Drop for ServerDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A server for all tests of a process, started when it is first asked for.
pub struct Shared<S: 'static>(OnceLock<Result<S, String>>, fn() -> Result<S, String>);

impl<S> Shared<S> {
    /// One that `start` starts, or says why it cannot.
    pub const fn new(start: fn() -> Result<S, String>) -> Self {
        Self(OnceLock::new(), start)
    }

    /// The server, or why there is none.
    ///
    /// # Errors
    /// What this machine lacks.
    pub fn get(&self) -> Result<&S, &str> {
        self.0.get_or_init(self.1).as_ref().map_err(String::as_str)
    }
}

/// The first of these programs that is installed; each is a name to be looked for, or an absolute path.
///
/// # Errors
/// A sentence that names them.
pub fn installed(programs: &[&str]) -> Result<PathBuf, String> {
    let directories: Vec<_> = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).collect();
    let found = programs.iter().flat_map(|name| directories.iter().map(move |directory| directory.join(name)));
    found.into_iter().find(|path| path.is_file()).ok_or_else(|| format!("{} is not installed", programs.join(" or ")))
}

/// A loopback port that nobody listens on. Somebody may before the server does: then it fails to start.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("an address").port()
}

/// The children of a process.
///
/// # Panics
/// Where there is no `/proc`.
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

/// Removes the System V memory that a process has made, and which outlives the kill of a PostgreSQL.
fn remove_shared_memory_of(maker: Pid) {
    let all = std::fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
    // key, id, permissions, size, maker, last user, attached
    let columns = all.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let made = columns.filter(|columns| columns.get(4) == Some(&&*maker.as_raw_nonzero().to_string()));
    for columns in made.filter(|columns| columns.get(6) == Some(&"0")) {
        let _ = Command::new("ipcrm").args(["-m", columns[1]]).stderr(Stdio::null()).status();
    }
}

/// The warden's side: starts the program in a group of its own, says its number, and sees to its end.
pub fn watch_over(directory: &Path, mut program: impl Iterator<Item = OsString>) {
    // What the server leaves behind becomes the warden's, also where it has a group of its own.
    set_child_subreaper(Some(getpid())).expect("it is allowed");
    let log = std::fs::File::create(directory.join("log")).expect("a log");
    let mut command = Command::new(program.next().expect("a program"));
    command.args(program).stdin(Stdio::null()).stdout(log.try_clone().expect("a descriptor")).stderr(log);
    let mut server = command.process_group(0).spawn().expect("the program starts");
    let group = Pid::from_child(&server);
    println!("{}", group.as_raw_nonzero());
    let (send, is_silent) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut said = Vec::new();
        let _ = std::io::stdin().read_to_end(&mut said);
        // First, for whoever waits for the server looks as soon as it is gone.
        let _ = send.send(said.is_empty());
        let _ = kill_process_group(group, Signal::KILL);
    });
    server.wait().expect("a child");
    // What it has started goes with it, and so does what that has started.
    let _ = kill_process_group(group, Signal::KILL);
    while let children @ [_, ..] = &*children_of(std::process::id()) {
        for child in children.iter().filter_map(|child| Pid::from_raw(child.cast_signed())) {
            let _ = kill_process(child, Signal::KILL);
            let _ = waitpid(Some(child), WaitOptions::empty());
        }
    }
    remove_shared_memory_of(group);
    if is_silent.try_recv().unwrap_or(false) {
        // The test's process went without a word, and left the directory.
        let _ = std::fs::remove_dir_all(directory);
    }
}
