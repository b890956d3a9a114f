//! PostgreSQL for tests.
//!
//! It refuses to run as root, so there it runs as the user `postgres`, which owns its directory.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use lockkit::Lease;
use rustix::process::Signal;

use super::{Access, Certificates, Clock, Engine, PASSWORD, Security};
use crate::helper_process::signal_pid;
use crate::servers::{Server, ServerDir, Shared, children_of, free_port};
use crate::until;

/// The server that the tests of a process share.
pub static SHARED: Shared<Postgres> = Shared::new(|| {
    let server = Postgres::open()?;
    // The table is created here, so that the first tests find the same state as all others.
    drop(
        Lease::connect(server.lease("first"))
            .build()
            .expect("a URL")
            .try_lock()
            .expect("the lease is free"),
    );
    Ok(server)
});

/// Returns the URL of a lease on the [`SHARED`] server.
///
/// # Errors
/// The reason why there is no server.
pub fn shared_url(name: &str) -> Result<String, &'static str> {
    SHARED.get().map(|server| server.lease(name))
}

/// A server with its directory.
pub struct Postgres {
    server: Option<Server>,
    command: Command,
    port: u16,
    directory: ServerDir,
}

/// The configuration of a server.
#[derive(Default)]
pub struct Setup<'s> {
    /// Settings as `name=value`, in addition to those that every test needs.
    pub settings: &'s [&'s str],
    /// The access rules for TCP, as lines of `pg_hba.conf`. The default admits every user.
    pub lets_in: Option<&'s str>,
    /// Certificates for TLS.
    pub certificates: Option<&'s Certificates>,
    /// Another wall clock.
    pub clock: Option<&'s Clock>,
}

impl Postgres {
    /// Starts a server that every user may use.
    ///
    /// # Errors
    /// The missing resource of this machine.
    pub fn open() -> Result<Self, String> {
        Self::set_up(&Setup::default())
    }

    /// Starts a server with this configuration. The superuser `postgres` has the drills' password.
    ///
    /// # Errors
    /// The missing resource of this machine.
    pub fn set_up(setup: &Setup<'_>) -> Result<Self, String> {
        let directory = new_directory()?;
        let (data, password) = (
            directory.path().join("data"),
            directory.path().join("password"),
        );
        std::fs::write(&password, PASSWORD).expect("room");
        let mut init = as_its_user(&installed("initdb")?);
        init.arg("-D").arg(&data).arg("--pwfile").arg(&password);
        run(init.args([
            "-A",
            "trust",
            "-U",
            "postgres",
            "-E",
            "UTF8",
            "--locale=C",
            "--no-sync",
        ]))?;
        if let Some(lines) = setup.lets_in {
            std::fs::write(
                data.join("pg_hba.conf"),
                format!("local all all trust\n{lines}\n"),
            )
            .expect("room");
        }
        let mut postgres = Self::in_directory(directory, setup)?;
        if let Some(certificates) = setup.certificates {
            let [certificate, key] = certificates.server();
            // PostgreSQL requires a key that no other user can read.
            let own = data.join("server.key");
            std::fs::write(&own, std::fs::read(key).expect("a key")).expect("room");
            std::fs::set_permissions(&own, PermissionsExt::from_mode(0o600)).expect("a file");
            give_to_its_user(&own)?;
            for (setting, path) in [
                ("ssl_cert_file", certificate),
                ("ssl_key_file", own),
                ("ssl_ca_file", certificates.ca()),
            ] {
                postgres
                    .command
                    .arg("-c")
                    .arg(format!("{setting}={}", path.display()));
            }
            postgres.command.args(["-c", "ssl=on"]);
        }
        postgres.run()?;
        Ok(postgres)
    }

    /// Starts a standby of this server, which only reads.
    ///
    /// # Errors
    /// The missing resource of this machine.
    pub fn standby(&self) -> Result<Self, String> {
        self.standby_through(self.port)
    }

    fn standby_through(&self, port: u16) -> Result<Self, String> {
        let directory = new_directory()?;
        let mut copy = as_its_user(&installed("pg_basebackup")?);
        copy.arg("-D").arg(directory.path().join("data")).args([
            "-R",
            "-c",
            "fast",
            "-h",
            "127.0.0.1",
            "-U",
            "postgres",
        ]);
        run(copy.arg("-p").arg(port.to_string()))?;
        let mut standby = Self::in_directory(directory, &Setup::default())?;
        standby.run()?;
        Ok(standby)
    }

    fn in_directory(directory: ServerDir, setup: &Setup<'_>) -> Result<Self, String> {
        let port = free_port();
        let mut command = as_its_user(&installed("postgres")?);
        command
            .arg("-D")
            .arg(directory.path().join("data"))
            .arg("-k")
            .arg(directory.path())
            .arg("-p")
            .arg(port.to_string());
        // A killed server leaves its shared memory behind: in its directory, which is removed, and
        // not in /dev/shm.
        let memory = "dynamic_shared_memory_type=mmap";
        let usual = [
            "listen_addresses=127.0.0.1",
            "fsync=off",
            "max_connections=200",
            memory,
        ];
        command.args(
            usual
                .iter()
                .chain(setup.settings)
                .flat_map(|setting| ["-c", setting]),
        );
        command.envs(setup.clock.into_iter().flat_map(Clock::variables));
        Ok(Self {
            server: None,
            command,
            port,
            directory,
        })
    }

    fn run(&mut self) -> Result<(), String> {
        self.server = Some(Server::start(&self.directory, &self.command, self.port)?);
        let ready = installed("pg_isready")?;
        until("PostgreSQL is ready", || {
            let mut ask = Command::new(&ready);
            ask.args(["-q", "-h", "127.0.0.1", "-p", &self.port.to_string()])
                .status()
                .is_ok_and(|said| said.success())
        });
        Ok(())
    }

    /// Returns the URL of a lease.
    pub fn lease(&self, name: &str) -> String {
        self.lease_of("postgres", "", name)
    }

    /// Returns the URL of a lease as another user, and with further parameters.
    pub fn lease_of(&self, user: &str, parameters: &str, name: &str) -> String {
        format!(
            "postgres://{user}@127.0.0.1:{}/postgres?{parameters}&lease={name}",
            self.port
        )
    }

    /// Runs statements as the superuser. Returns their output, unaligned and without headings.
    pub fn sql(&self, statements: &str) -> String {
        let mut psql = Command::new(installed("psql").expect("it is beside the server"));
        psql.args([
            "-X",
            "-q",
            "-A",
            "-t",
            "-v",
            "ON_ERROR_STOP=1",
            "-U",
            "postgres",
            "-h",
        ])
        .arg(self.directory.path());
        psql.args([
            "-p",
            &self.port.to_string(),
            "-d",
            "postgres",
            "-c",
            statements,
        ]);
        run(&mut psql).expect("SQL that works").trim().to_owned()
    }

    /// Returns the pid of the process that starts all others.
    fn first_process(&self) -> u32 {
        let file = std::fs::read_to_string(self.directory.path().join("data/postmaster.pid"))
            .expect("it runs");
        file.lines()
            .next()
            .and_then(|pid| pid.trim().parse().ok())
            .expect("a pid")
    }

    /// Returns its directory, which contains the Unix socket.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Returns the contents of its log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.log()).unwrap_or_default()
    }
}

impl Engine for Postgres {
    const OLD: Option<fn(TcpStream)> = Some(answer_as_an_old_version);

    fn start(security: &Security, clock: Option<&Clock>) -> Result<Self, String> {
        let (lets_in, certificates) = match security {
            Security::None => (
                "host all all all trust\nhost replication all all trust",
                None,
            ),
            Security::Password => ("host all all all scram-sha-256", None),
            Security::Tls(certificates) => ("hostssl all all all trust", Some(certificates)),
            Security::ClientCertificate(certificates) => (
                "hostssl all all all trust clientcert=verify-ca",
                Some(certificates),
            ),
        };
        Self::set_up(&Setup {
            lets_in: Some(lets_in),
            certificates,
            clock,
            settings: &[],
        })
    }

    fn port(&self) -> u16 {
        self.port
    }

    fn url(&self, port: u16, access: Access, name: &str) -> Option<String> {
        let with = |user: &str, rest: &str| {
            format!("postgres://{user}@127.0.0.1:{port}/{rest}lease={name}")
        };
        Some(match access {
            // By default the client would use TLS if the server offers it.
            Access::Right(Security::None) => with("postgres", "postgres?sslmode=disable&"),
            Access::Right(Security::Password) => with(&format!("postgres:{PASSWORD}"), "postgres?"),
            Access::WrongPassword => with("postgres:open-barley", "postgres?"),
            Access::WrongDatabase => with("postgres", "nowhere?"),
            Access::Right(Security::Tls(certificates)) => with(
                "postgres",
                &format!("postgres?{}", checked_by(&certificates.ca())),
            ),
            Access::Right(Security::ClientCertificate(certificates)) => {
                let [certificate, key] =
                    certificates.client().map(|path| path.display().to_string());
                let ca = checked_by(&certificates.ca());
                with(
                    "postgres",
                    &format!("postgres?{ca}sslcert={certificate}&sslkey={key}&"),
                )
            }
            Access::Tls(ca) => with("postgres", &format!("postgres?{}", checked_by(ca))),
        })
    }

    fn signal(&self, signal: Signal) {
        let first = self.first_process();
        // While the first process is stopped, it starts no more children.
        signal_pid(first, Signal::STOP);
        // Each child is in a process group of its own.
        children_of(first)
            .into_iter()
            .for_each(|child| signal_pid(child, signal));
        signal_pid(first, signal);
        if ![Signal::STOP, Signal::KILL].contains(&signal) {
            signal_pid(first, Signal::CONT);
        }
    }

    fn kill(&mut self) {
        let Some(server) = self.server.take() else {
            return;
        };
        let first = self.first_process();
        signal_pid(first, Signal::STOP);
        let children = children_of(first);
        children
            .iter()
            .for_each(|child| signal_pid(*child, Signal::KILL));
        server.kill();
        // Otherwise the next server finds their shared memory in use.
        until("all are gone", || {
            children
                .iter()
                .all(|child| !Path::new(&format!("/proc/{child}")).exists())
        });
        // A killed server cannot have removed the file, and another process may soon have its pid.
        let _ = std::fs::remove_file(self.directory.path().join("data/postmaster.pid"));
    }

    fn restart(&mut self) {
        self.kill();
        self.run().expect("it starts again");
    }

    fn follower(&self, port: u16) -> Result<Self, String> {
        let follower = self.standby_through(port)?;
        let here = self.sql("SELECT pg_current_wal_lsn()");
        until("it is in step", || {
            follower.sql(&format!("SELECT pg_last_wal_replay_lsn() >= '{here}'")) == "t"
        });
        Ok(follower)
    }

    fn promote(&self) {
        assert_eq!(self.sql("SELECT pg_promote()"), "t");
    }

    fn goes_by_a_wall_clock() -> bool {
        true
    }
}

/// Returns the parameters with which a client fully checks the server's certificate.
fn checked_by(ca: &Path) -> String {
    format!("sslmode=verify-full&sslrootcert={}&", ca.display())
}

/// Admits every client, and knows nothing that PostgreSQL 9.3 did not know.
fn answer_as_an_old_version(mut client: TcpStream) {
    let message = |kind: u8, body: &[u8]| {
        [&[kind], &(body.len() as u32 + 4).to_be_bytes()[..], body].concat()
    };
    let ready = message(b'Z', b"I");
    let unknown = message(
        b'E',
        b"SERROR\0VERROR\0C42883\0Mfunction to_regclass(unknown) does not exist\0\0",
    );
    let mut bytes = [0; 4096];
    while let Ok(length @ 1..) = client.read(&mut bytes) {
        let answer = match (bytes[0], bytes.get(4..8)) {
            // A request for TLS, and the startup message.
            (0, Some([0x04, 0xd2, 0x16, 0x2f])) => b"N".to_vec(),
            (0, _) => [
                message(b'R', &[0; 4]),
                message(b'K', &[1; 8]),
                ready.clone(),
            ]
            .concat(),
            // Messages that end with a Sync.
            _ if bytes[..length].ends_with(b"S\0\0\0\x04") => [&unknown[..], &ready[..]].concat(),
            _ => return,
        };
        if client.write_all(&answer).is_err() {
            return;
        }
    }
}

/// Creates a directory that belongs to the server's user.
fn new_directory() -> Result<ServerDir, String> {
    let directory = ServerDir::new("postgres");
    give_to_its_user(directory.path())?;
    Ok(directory)
}

fn give_to_its_user(path: &Path) -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let ids = ["-u", "-g"].map(|which| run(Command::new("id").args([which, "postgres"])));
    let [user, group] =
        ids.map(|id| id.and_then(|id| id.trim().parse().map_err(|_| format!("{id} is no number"))));
    chown(path, Some(user?), Some(group?)).map_err(|error| error.to_string())
}

/// Returns a command that root runs as the user `postgres`.
pub fn as_its_user(program: &Path) -> Command {
    if !rustix::process::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command
        .args([
            "--reuid=postgres",
            "--regid=postgres",
            "--clear-groups",
            "--",
        ])
        .arg(program);
    command.current_dir("/");
    command
}

/// Returns the path of a PostgreSQL program, of the newest installed version.
///
/// # Errors
/// If no version is installed.
pub fn installed(program: &str) -> Result<PathBuf, String> {
    let versions = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten();
    let found = versions
        .map(|version| version.path().join("bin").join(program))
        .filter(|path| path.is_file());
    let number = |path: &PathBuf| {
        path.ancestors()
            .nth(2)?
            .file_name()?
            .to_str()?
            .parse::<u32>()
            .ok()
    };
    found
        .max_by_key(number)
        .map_or_else(|| crate::servers::installed(&[program]), Ok)
}

/// Returns the standard output of the command.
fn run(command: &mut Command) -> Result<String, String> {
    let program = command.get_program().display().to_string();
    let done = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    match done.status.success() {
        true => Ok(String::from_utf8_lossy(&done.stdout).into_owned()),
        false => Err(format!(
            "{program}: {}",
            String::from_utf8_lossy(&done.stderr).trim()
        )),
    }
}
