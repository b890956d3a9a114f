//! etcd for tests: one node or several, with TLS and authentication or without.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use lockkit::Lease;
use rustix::process::Signal;

use super::{Access, Clock, Engine, PASSWORD, Security, USER};
use crate::servers::{Server, ServerDir, Shared, free_port, installed};
use crate::until;

/// The server that the tests of a process share.
pub static SHARED: Shared<Etcd> = Shared::new(|| Etcd::start_nodes(1, &Security::None, &[]));

/// Returns the URL of a lease on the [`SHARED`] server.
///
/// # Errors
/// The reason why there is no server.
pub fn shared_url(name: &str) -> Result<String, &'static str> {
    SHARED
        .get()
        .map(|server| server.url_of(&server.endpoints(), "", name, ""))
}

/// A cluster of some nodes.
pub struct Etcd {
    nodes: Vec<Node>,
    speaks_tls: bool,
}

struct Node {
    directory: ServerDir,
    /// The port for clients, on 127.0.0.1.
    port: u16,
    command: Command,
    server: Option<Server>,
}

impl Etcd {
    /// Starts a cluster of so many nodes, with these options of etcd in addition to the necessary
    /// ones. It has users only where a password is required: [`USER`] may use the keys of leases,
    /// `guest` with the password `guest` none, and `root` is `root`.
    ///
    /// # Errors
    /// The missing resource of this machine.
    pub fn start_nodes(
        count: usize,
        security: &Security,
        options: &[&str],
    ) -> Result<Self, String> {
        let program = installed(&["etcd"])?;
        let speaks_tls = matches!(security, Security::Tls(_) | Security::ClientCertificate(_));
        let scheme = if speaks_tls { "https" } else { "http" };
        let ports: Vec<[u16; 2]> = (0..count).map(|_| [free_port(), free_port()]).collect();
        let member = |(at, [_, peer]): (usize, &[u16; 2])| format!("n{at}=http://127.0.0.1:{peer}");
        let cluster = ports
            .iter()
            .enumerate()
            .map(member)
            .collect::<Vec<_>>()
            .join(",");
        let mut etcd = Self {
            nodes: Vec::new(),
            speaks_tls,
        };
        for (at, [client, peer]) in ports.iter().enumerate() {
            let directory = ServerDir::in_memory("etcd");
            let mut command = Command::new(&program);
            command
                .arg("--data-dir")
                .arg(directory.path().join("data"))
                .args(["--name", &format!("n{at}")]);
            let [client_url, peer_url] = [
                format!("{scheme}://127.0.0.1:{client}"),
                format!("http://127.0.0.1:{peer}"),
            ];
            command.args([
                "--listen-client-urls",
                &client_url,
                "--advertise-client-urls",
                &client_url,
            ]);
            command.args([
                "--listen-peer-urls",
                &peer_url,
                "--initial-advertise-peer-urls",
                &peer_url,
            ]);
            command
                .args(["--initial-cluster", &cluster, "--log-level", "error"])
                .args(options);
            if let Security::Tls(certificates) | Security::ClientCertificate(certificates) =
                security
            {
                let [certificate, key] = certificates.server();
                command
                    .arg("--cert-file")
                    .arg(certificate)
                    .arg("--key-file")
                    .arg(key);
            }
            if let Security::ClientCertificate(certificates) = security {
                command
                    .arg("--client-cert-auth")
                    .arg("--trusted-ca-file")
                    .arg(certificates.ca());
            }
            etcd.nodes.push(Node {
                directory,
                port: *client,
                command,
                server: None,
            });
        }
        for node in &mut etcd.nodes {
            node.launch()?;
        }
        etcd.wait_until_it_serves();
        if let Security::Password = security {
            etcd.turn_on_authentication()?;
        }
        Ok(etcd)
    }

    /// Starts the node with its data, if it does not run, and waits until it serves.
    pub fn start_again(&mut self, at: usize) {
        self.launch_node(at);
        self.wait_until_it_serves();
    }

    /// Starts the node again. It may have to wait for other nodes.
    pub fn launch_node(&mut self, at: usize) {
        self.nodes[at].launch().expect("it did before");
    }

    /// Waits until all running nodes serve.
    pub fn wait_until_it_serves(&self) {
        // With TLS there is no check here. The test's own requests are repeated.
        let serves = |node: &Node| match self.speaks_tls {
            false => node
                .get("/health")
                .is_some_and(|answer| answer.contains(r#""health":"true""#)),
            true => true,
        };
        until("every node serves", || {
            self.nodes
                .iter()
                .filter(|node| node.server.is_some())
                .all(serves)
        });
    }

    /// Returns the URL of a lease on these endpoints as this user, as `user:password@`, and with
    /// these parameters, as `?name=value`.
    pub fn url_of(&self, endpoints: &str, user: &str, name: &str, parameters: &str) -> String {
        let scheme = if self.speaks_tls { "etcds" } else { "etcd" };
        format!("{scheme}://{user}{endpoints}/{name}{parameters}")
    }

    /// Returns the URL of a lease, with all nodes as endpoints.
    pub fn plain_url(&self, name: &str) -> String {
        self.url_of(&self.endpoints(), "", name, "")
    }

    /// Returns all nodes, as `host:port` with commas between.
    pub fn endpoints(&self) -> String {
        self.endpoints_of(0..self.nodes.len())
    }

    /// Returns these nodes, in this order, as `host:port` with commas between.
    pub fn endpoints_of(&self, nodes: impl IntoIterator<Item = usize>) -> String {
        let endpoint = |at: usize| format!("127.0.0.1:{}", self.nodes[at].port);
        nodes
            .into_iter()
            .map(endpoint)
            .collect::<Vec<_>>()
            .join(",")
    }

    /// Sends a signal to a node.
    pub fn signal_node(&self, at: usize, signal: Signal) {
        self.nodes[at]
            .server
            .as_ref()
            .expect("it runs")
            .signal(signal);
    }

    /// Kills a node. Its data stays.
    pub fn kill_node(&mut self, at: usize) {
        self.nodes[at]
            .server
            .take()
            .into_iter()
            .for_each(Server::kill);
    }

    /// Returns the node that leads, as soon as there is a leader.
    pub fn leader(&self) -> usize {
        let mut leader = None;
        until("there is a leader", || {
            let leads = |node: &Node| {
                let metrics = node.server.as_ref().and_then(|_| node.get("/metrics"));
                metrics.is_some_and(|text| text.contains("\netcd_server_is_leader 1\n"))
            };
            leader = self.nodes.iter().position(leads);
            leader.is_some()
        });
        leader.expect("it was found")
    }

    /// Returns the number of leases in etcd, each the session of a process.
    pub fn sessions(&self) -> usize {
        self.post("/v3/lease/leases", "{}")
            .matches(r#""ID""#)
            .count()
    }

    /// Returns the first node's answer to a request of its gateway.
    pub fn post(&self, path: &str, body: &str) -> String {
        let request = format!(
            "POST {path} HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        self.nodes[0].http(&request).expect("it answers")
    }

    /// Runs etcdctl as root. Returns its output.
    ///
    /// # Errors
    /// If etcdctl is not installed.
    pub fn ctl(&self, arguments: &[&str]) -> Result<String, String> {
        let mut ctl = Command::new(installed(&["etcdctl"])?);
        ctl.env("ETCDCTL_API", "3")
            .args(["--endpoints", &self.endpoints()])
            .args(arguments);
        let said = ctl.stdin(Stdio::null()).output().expect("etcdctl runs");
        assert!(
            said.status.success(),
            "etcdctl {arguments:?}: {}",
            String::from_utf8_lossy(&said.stderr)
        );
        Ok(String::from_utf8_lossy(&said.stdout).into_owned())
    }

    fn turn_on_authentication(&self) -> Result<(), String> {
        let user = format!("{USER}:{PASSWORD}");
        for arguments in [
            &["user", "add", "root:root"][..],
            &["role", "add", "root"],
            &["user", "grant-role", "root", "root"],
            &["role", "add", "leases"],
            &[
                "role",
                "grant-permission",
                "--prefix=true",
                "leases",
                "readwrite",
                "lockkit/",
            ],
            &["user", "add", &user],
            &["user", "grant-role", USER, "leases"],
            &["user", "add", "guest:guest"],
            &["auth", "enable"],
        ] {
            self.ctl(arguments)?;
        }
        Ok(())
    }
}

impl Node {
    fn launch(&mut self) -> Result<(), String> {
        self.server = Some(Server::start(&self.directory, &self.command, self.port)?);
        Ok(())
    }

    fn get(&self, path: &str) -> Option<String> {
        self.http(&format!("GET {path} HTTP/1.0\r\n\r\n"))
    }

    fn http(&self, request: &str) -> Option<String> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).ok()?;
        // The timeout also applies to a stopped node.
        stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
        stream.write_all(request.as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    }
}

/// A single node.
impl Engine for Etcd {
    const TTL: u64 = 2000;

    const OLD: Option<fn(TcpStream)> = Some(answer_as_an_old_version);

    /// No clock of etcd can be set.
    fn start(security: &Security, _: Option<&Clock>) -> Result<Self, String> {
        let etcd = Self::start_nodes(1, security, &[])?;
        let url = etcd
            .url(etcd.port(), Access::Right(security), "ready")
            .expect("the right way is always there");
        let lease = Lease::connect(url).build().expect("a URL");
        until("it serves", || lease.status().is_ok());
        Ok(etcd)
    }

    fn port(&self) -> u16 {
        self.nodes[0].port
    }

    fn url(&self, port: u16, access: Access, name: &str) -> Option<String> {
        let plain = |user: &str| format!("etcd://{user}127.0.0.1:{port}/{name}");
        let secure = |parameters: &str| format!("etcds://127.0.0.1:{port}/{name}?{parameters}");
        match access {
            Access::Right(Security::None) => Some(plain("")),
            Access::Right(Security::Password) => Some(plain(&format!("{USER}:{PASSWORD}@"))),
            Access::WrongPassword => Some(plain(&format!("{USER}:open-barley@"))),
            Access::WrongDatabase => None,
            Access::Right(Security::Tls(certificates)) => {
                Some(secure(&format!("ca={}", certificates.ca().display())))
            }
            Access::Right(Security::ClientCertificate(certificates)) => {
                let [certificate, key] =
                    certificates.client().map(|path| path.display().to_string());
                let ca = certificates.ca();
                Some(secure(&format!(
                    "ca={}&cert={certificate}&key={key}",
                    ca.display()
                )))
            }
            Access::Tls(ca) => Some(secure(&format!("ca={}", ca.display()))),
        }
    }

    fn signal(&self, signal: Signal) {
        self.signal_node(0, signal);
    }

    fn kill(&mut self) {
        self.kill_node(0);
    }

    fn restart(&mut self) {
        self.kill_node(0);
        self.start_again(0);
    }
}

/// Answers as etcd 3.3 does, whose gateway has another path.
fn answer_as_an_old_version(mut client: TcpStream) {
    let mut asked = Vec::new();
    let mut bytes = [0; 4096];
    while let Ok(length @ 1..) = client.read(&mut bytes) {
        asked.extend_from_slice(&bytes[..length]);
        if !asked.windows(4).any(|window| window == b"\r\n\r\n") {
            continue;
        }
        let (status, body) = match asked.starts_with(b"GET /version ") {
            true => ("200 OK", r#"{"etcdserver":"3.3.25","etcdcluster":"3.3.0"}"#),
            false => ("404 Not Found", "404 page not found\n"),
        };
        let answer = format!(
            "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let _ = client.write_all(answer.as_bytes());
        return;
    }
}
