//! Redis and Valkey for the drills.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;

use rustix::process::Signal;

use super::{Access, Clock, Engine, PASSWORD, Security};
use crate::servers::{Server, ServerDir, Shared, free_port, installed};
use crate::until;

/// A server that writes each change to disk before it answers.
pub struct Redis {
    directory: ServerDir,
    command: Command,
    port: u16,
    server: Option<Server>,
}

/// Returns the URL of a lease with this name on the server that all tests of this process share.
/// That server stores nothing on disk.
///
/// # Errors
/// The reason why there is no server.
pub fn shared(name: &str) -> Result<String, &'static str> {
    static SERVER: Shared<Redis> =
        Shared::new(|| Redis::with(&Security::None, None, &["--appendonly", "no"]));
    let server = SERVER.get()?;
    Ok(server
        .url(server.port, Access::Right(&Security::None), name)
        .expect("the right way is always there"))
}

impl Redis {
    /// Returns its Unix socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    /// Sends a command, and returns the answer.
    pub fn tell(&self, command: &str) -> String {
        let mut connection = TcpStream::connect(("127.0.0.1", self.port)).expect("it runs");
        connection
            .write_all(format!("{command}\r\n").as_bytes())
            .expect("it runs");
        let mut answer = [0; 4096];
        let length = connection.read(&mut answer).expect("it answers");
        String::from_utf8_lossy(&answer[..length])
            .trim_end()
            .to_owned()
    }

    fn with(
        security: &Security,
        clock: Option<&Clock>,
        durability: &[&str],
    ) -> Result<Self, String> {
        let program = installed(&["redis-server", "valkey-server"])?;
        let (directory, port) = (ServerDir::new("redis"), free_port());
        let mut command = Command::new(program);
        command
            .arg("--unixsocket")
            .arg(directory.path().join("socket"));
        command.args([
            "--bind",
            "127.0.0.1",
            "--daemonize",
            "no",
            "--save",
            "",
            "--databases",
            "4",
            "--dir",
        ]);
        command.arg(directory.path()).args(durability);
        match security {
            Security::None => {}
            Security::Password => {
                command.args(["--requirepass", PASSWORD]);
            }
            Security::Tls(certificates) | Security::ClientCertificate(certificates) => {
                let [certificate, key] = certificates.server();
                let asks = matches!(security, Security::ClientCertificate(_));
                command
                    .arg("--tls-port")
                    .arg(port.to_string())
                    .arg("--tls-ca-cert-file")
                    .arg(certificates.ca());
                command
                    .arg("--tls-cert-file")
                    .arg(certificate)
                    .arg("--tls-key-file")
                    .arg(key);
                command.args([
                    "--tls-auth-clients",
                    if asks { "yes" } else { "no" },
                    "--port",
                    "0",
                ]);
            }
        }
        if !matches!(security, Security::Tls(_) | Security::ClientCertificate(_)) {
            command.arg("--port").arg(port.to_string());
        }
        command.envs(clock.into_iter().flat_map(Clock::variables));
        let server = Server::start(&directory, &command, port)?;
        Ok(Self {
            directory,
            command,
            port,
            server: Some(server),
        })
    }
}

impl Engine for Redis {
    const OLD: Option<fn(TcpStream)> = Some(answer_as_an_old_version);

    fn start(security: &Security, clock: Option<&Clock>) -> Result<Self, String> {
        Self::with(
            security,
            clock,
            &["--appendonly", "yes", "--appendfsync", "always"],
        )
    }

    fn port(&self) -> u16 {
        self.port
    }

    fn url(&self, port: u16, access: Access, name: &str) -> Option<String> {
        let plain = |user: &str, path: &str| format!("redis://{user}127.0.0.1:{port}/{path}{name}");
        Some(match access {
            Access::Right(Security::None) => plain("", ""),
            Access::Right(Security::Password) => plain(&format!(":{PASSWORD}@"), ""),
            Access::WrongPassword => plain(":open-barley@", ""),
            Access::WrongDatabase => plain("", "9/"),
            Access::Right(Security::Tls(certificates)) => {
                format!(
                    "rediss://127.0.0.1:{port}/{name}?ca={}",
                    certificates.ca().display()
                )
            }
            Access::Right(Security::ClientCertificate(certificates)) => {
                let [certificate, key] =
                    certificates.client().map(|path| path.display().to_string());
                let ca = certificates.ca();
                format!(
                    "rediss://127.0.0.1:{port}/{name}?ca={}&cert={certificate}&key={key}",
                    ca.display()
                )
            }
            Access::Tls(ca) => format!("rediss://127.0.0.1:{port}/{name}?ca={}", ca.display()),
        })
    }

    fn signal(&self, signal: Signal) {
        self.server.as_ref().expect("it runs").signal(signal);
    }

    fn kill(&mut self) {
        self.server.take().into_iter().for_each(Server::kill);
    }

    fn restart(&mut self) {
        self.kill();
        self.server = Some(
            Server::start(&self.directory, &self.command, self.port).expect("it starts again"),
        );
    }

    fn follower(&self, port: u16) -> Result<Self, String> {
        let follower = Self::start(&Security::None, None)?;
        assert_eq!(follower.tell(&format!("REPLICAOF 127.0.0.1 {port}")), "+OK");
        until("it is in step", || {
            follower
                .tell("INFO replication")
                .contains("master_link_status:up")
        });
        Ok(follower)
    }

    fn promote(&self) {
        assert_eq!(self.tell("REPLICAOF NO ONE"), "+OK");
    }

    fn goes_by_a_wall_clock() -> bool {
        true
    }
}

/// Answers each command with the version of a Redis of 2013.
fn answer_as_an_old_version(mut client: TcpStream) {
    const SAYS: &str = "# Server\r\nredis_version:2.8.3\r\n";
    let mut bytes = [0; 4096];
    while let Ok(length @ 1..) = client.read(&mut bytes) {
        // Each command is an array.
        let commands = bytes[..length].iter().filter(|byte| **byte == b'*').count();
        let answer = format!("${}\r\n{SAYS}\r\n", SAYS.len()).repeat(commands);
        if client.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}
