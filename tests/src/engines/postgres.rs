//! PostgreSQL for tests.
//!
//! It refuses to run as root, so there it runs as the user `postgres`, who owns its folder.

use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use lockkit::Lease;
use rustix::process::Signal;

use crate::servers::{Folder, Server, Shared, free_port};
use crate::until;

/// The server that the tests of a process share.
pub static SHARED: Shared<Postgres> = Shared::new(|| {
    let server = Postgres::start(&[])?;
    // With its table made, so that those who come first find it as all others do.
    drop(Lease::connect(server.url("first")).build().expect("a URL").try_lock().expect("nobody has it"));
    Ok(server)
});

/// The URL of a lease on the [`SHARED`] server.
///
/// # Errors
/// Why there is none.
pub fn shared_url(name: &str) -> Result<String, &'static str> {
    SHARED.get().map(|server| server.url(name))
}

/// A server with its folder.
pub struct Postgres {
    server: Option<Server>,
    settings: Vec<String>,
    /// Where it listens on 127.0.0.1.
    pub port: u16,
    folder: Folder,
}

impl Postgres {
    /// One with these settings, each as `name=value`, beside those that a test needs.
    ///
    /// # Errors
    /// What this machine lacks.
    pub fn start(settings: &[&str]) -> Result<Self, String> {
        Self::start_with(settings, |_| {})
    }

    /// As [`start`](Self::start), of a folder that has been `prepared`.
    ///
    /// # Errors
    /// What this machine lacks.
    pub fn start_with(settings: &[&str], prepare: impl FnOnce(&Path)) -> Result<Self, String> {
        let folder = new_folder()?;
        let data = folder.path().join("data");
        let mut init = as_its_user(&installed("initdb")?);
        init.arg("-D").arg(&data).args(["-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C", "--no-sync"]);
        run(&mut init)?;
        prepare(&data);
        Self::run_in(folder, settings)
    }

    /// A standby of this server, which only reads.
    ///
    /// # Errors
    /// What this machine lacks.
    pub fn start_standby(&self) -> Result<Self, String> {
        let folder = new_folder()?;
        let mut copy = as_its_user(&installed("pg_basebackup")?);
        copy.arg("-D").arg(folder.path().join("data")).args(["-R", "-c", "fast", "-h", "127.0.0.1", "-U", "postgres"]);
        run(copy.arg("-p").arg(self.port.to_string()))?;
        Self::run_in(folder, &[])
    }

    fn run_in(folder: Folder, settings: &[&str]) -> Result<Self, String> {
        let settings = settings.iter().map(|&setting| setting.to_owned()).collect();
        let mut postgres = Self { server: None, settings, port: free_port(), folder };
        postgres.start_again()?;
        Ok(postgres)
    }

    /// Starts the server in its folder, where it does not run.
    ///
    /// # Errors
    /// What it said.
    pub fn start_again(&mut self) -> Result<(), String> {
        let command = self.command(&installed("postgres")?);
        self.start_as(&command)
    }

    /// As [`start_again`](Self::start_again), by a command made from [`command`](Self::command).
    ///
    /// # Errors
    /// What it said.
    pub fn start_as(&mut self, command: &Command) -> Result<(), String> {
        self.server = None;
        self.server = Some(Server::start(&self.folder, command, self.port)?);
        let ready = installed("pg_isready")?;
        until("PostgreSQL is ready", || {
            let mut ask = Command::new(&ready);
            ask.args(["-q", "-h", "127.0.0.1", "-p", &self.port.to_string()]).status().is_ok_and(|said| said.success())
        });
        Ok(())
    }

    /// What starts the server: `program` with its arguments.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = as_its_user(program);
        command.arg("-D").arg(self.folder.path().join("data")).arg("-p").arg(self.port.to_string());
        command.arg("-k").arg(self.folder.path());
        let settings = ["listen_addresses=127.0.0.1", "fsync=off", "max_connections=200", "log_min_messages=warning"];
        for setting in settings.into_iter().chain(self.settings.iter().map(String::as_str)) {
            command.args(["-c", setting]);
        }
        command
    }

    /// The URL of a lease.
    pub fn url(&self, name: &str) -> String {
        self.url_of("postgres", "postgres", name)
    }

    /// The URL of a lease as this user (and password, behind a colon) on this database (and parameters, with `?`).
    pub fn url_of(&self, user: &str, database: &str, name: &str) -> String {
        let join = if database.contains('?') { '&' } else { '?' };
        format!("postgres://{user}@127.0.0.1:{}/{database}{join}lease={name}", self.port)
    }

    /// Runs statements as the superuser; returns what they say, unaligned and without headings.
    pub fn sql(&self, statements: &str) -> String {
        let mut psql = Command::new(installed("psql").expect("it is beside the server"));
        psql.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-U", "postgres"]);
        psql.args(["-p", &self.port.to_string(), "-d", "postgres", "-c", statements]);
        run(&mut psql).expect("SQL that works").trim().to_owned()
    }

    /// Its folder, with the Unix socket in it.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What it has written to its log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.log()).unwrap_or_default()
    }

    /// Sends a signal to all its processes.
    pub fn signal(&self, signal: Signal) {
        self.server.as_ref().expect("it runs").signal(signal);
    }

    /// Kills it, all processes at once, and waits until it is gone.
    pub fn kill(&mut self) {
        self.server.take().expect("it runs").kill();
        // Who was killed cannot have removed it, and its number may be another process's soon.
        let _ = std::fs::remove_file(self.folder.path().join("data/postmaster.pid"));
    }
}

/// A folder of the server's user.
fn new_folder() -> Result<Folder, String> {
    let folder = Folder::new("postgres");
    if rustix::process::geteuid().is_root() {
        let ids = ["-u", "-g"].map(|which| run(Command::new("id").args([which, "postgres"])));
        let [user, group] = ids.map(|id| id.and_then(|id| id.trim().parse().map_err(|_| format!("{id} is no number"))));
        chown(folder.path(), Some(user?), Some(group?)).map_err(|error| error.to_string())?;
    }
    Ok(folder)
}

/// A command that root runs as the user `postgres`.
pub fn as_its_user(program: &Path) -> Command {
    if !rustix::process::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]).arg(program);
    command.current_dir("/");
    command
}

/// A program of PostgreSQL's, of the newest version that is installed.
///
/// # Errors
/// That none is.
pub fn installed(program: &str) -> Result<PathBuf, String> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let found = versions.map(|version| version.path().join("bin").join(program)).filter(|path| path.is_file());
    let number = |path: &PathBuf| path.ancestors().nth(2)?.file_name()?.to_str()?.parse::<u32>().ok();
    found.max_by_key(number).map_or_else(|| crate::servers::installed(&[program]), Ok)
}

/// What the command writes to its standard output.
fn run(command: &mut Command) -> Result<String, String> {
    let program = command.get_program().display().to_string();
    let done = command.stdin(Stdio::null()).output().map_err(|error| format!("{program}: {error}"))?;
    match done.status.success() {
        true => Ok(String::from_utf8_lossy(&done.stdout).into_owned()),
        false => Err(format!("{program}: {}", String::from_utf8_lossy(&done.stderr).trim())),
    }
}
