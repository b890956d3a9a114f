//! etcd for tests: one node or several, with TLS or without.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use lockkit::Lease;
use rustix::process::Signal;

use crate::servers::{Folder, Server, Shared, free_port, installed};
use crate::until;

/// The server that the tests of a process share.
pub static SHARED: Shared<Etcd> = Shared::new(|| Etcd::start(&[]));

/// The URL of a lease on the [`SHARED`] server.
///
/// # Errors
/// Why there is none.
pub fn shared_url(name: &str) -> Result<String, &'static str> {
    SHARED.get().map(|server| server.url(name))
}

/// A cluster of some nodes.
pub struct Etcd {
    nodes: Vec<Node>,
    cluster: String,
    options: Vec<String>,
    /// Certificates, where it speaks TLS.
    tls: Option<Folder>,
}

struct Node {
    server: Option<Server>,
    folder: Folder,
    /// Where it listens on 127.0.0.1, to clients and to its peers.
    ports: [u16; 2],
}

/// What [`Etcd::start_tls`] makes, in PEM: a CA, a certificate of the server's, and one for clients.
const MAKE_CERTIFICATES: &str = "
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj '/O=CA of a test' \
    -keyout ca.key -out ca.pem
for who in server client stranger; do
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj \"/O=$who of a test\" \
        -keyout $who.key -out $who.csr
done
printf 'subjectAltName=IP:127.0.0.1\\nextendedKeyUsage=serverAuth,clientAuth' > server.ext
printf 'extendedKeyUsage=clientAuth' > client.ext
for who in server client; do
    openssl x509 -req -in $who.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile $who.ext -out $who.pem
done
openssl x509 -req -in stranger.csr -signkey stranger.key -days 2 -out stranger.pem
";

impl Etcd {
    /// One node with these options of etcd's beside those that it needs.
    ///
    /// # Errors
    /// What this machine lacks.
    pub fn start(options: &[&str]) -> Result<Self, String> {
        Self::start_nodes(1, options)
    }

    /// A cluster of so many nodes.
    ///
    /// # Errors
    /// What this machine lacks.
    pub fn start_nodes(count: usize, options: &[&str]) -> Result<Self, String> {
        Self::start_with(count, options, None)
    }

    /// One node that speaks TLS. Its [`certificate`](Self::certificate) files are `ca.pem`, `client.pem` and
    /// `client.key`, and `stranger.pem`, which nobody trusts.
    ///
    /// # Errors
    /// What this machine lacks.
    pub fn start_tls(options: &[&str]) -> Result<Self, String> {
        installed(&["openssl"])?;
        let folder = Folder::new("certificates");
        let mut make = Command::new("sh");
        make.args(["-e", "-c", MAKE_CERTIFICATES]).current_dir(folder.path()).stdin(Stdio::null());
        let made = make.output().expect("a shell");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        Self::start_with(1, options, Some(folder))
    }

    fn start_with(count: usize, options: &[&str], tls: Option<Folder>) -> Result<Self, String> {
        installed(&["etcd"])?;
        let node = |_| Node { server: None, folder: Folder::new("etcd"), ports: [(); 2].map(|()| free_port()) };
        let nodes: Vec<Node> = (0..count).map(node).collect();
        let member = |(at, node): (usize, &Node)| format!("n{at}=http://127.0.0.1:{}", node.ports[1]);
        let cluster = nodes.iter().enumerate().map(member).collect::<Vec<_>>().join(",");
        let options = options.iter().map(|&option| option.to_owned()).collect();
        let mut etcd = Self { nodes, cluster, options, tls };
        for at in 0..count {
            etcd.launch(at)?;
        }
        etcd.wait_until_it_serves();
        Ok(etcd)
    }

    /// Starts the node in its folder, where it does not run, and waits until it serves.
    pub fn start_again(&mut self, at: usize) {
        self.launch(at).expect("it did before");
        self.wait_until_it_serves();
    }

    fn launch(&mut self, at: usize) -> Result<(), String> {
        let node = &mut self.nodes[at];
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let [client, peer] = node.ports;
        let (client, peer) = (format!("{scheme}://127.0.0.1:{client}"), format!("http://127.0.0.1:{peer}"));
        let mut command = Command::new(installed(&["etcd"])?);
        command.arg("--data-dir").arg(node.folder.path().join("data")).args(["--name", &format!("n{at}")]);
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &self.cluster, "--log-level", "error"]).args(&self.options);
        if let Some(tls) = &self.tls {
            let file = |name| tls.path().join(name);
            command.arg("--cert-file").arg(file("server.pem")).arg("--key-file").arg(file("server.key"));
            command.arg("--trusted-ca-file").arg(file("ca.pem"));
        }
        node.server = Some(Server::start(&node.folder, &command, node.ports[0])?);
        Ok(())
    }

    fn wait_until_it_serves(&self) {
        let healthy = |node: &Node| match &self.tls {
            None => node.get("/health").is_some_and(|answer| answer.contains(r#""health":"true""#)),
            // Whoever it is meant for asks anew.
            Some(_) => TcpStream::connect((Ipv4Addr::LOCALHOST, node.ports[0])).is_ok(),
        };
        until("every node serves", || self.nodes.iter().filter(|node| node.server.is_some()).all(healthy));
    }

    /// The URL of a lease, with all nodes as endpoints.
    pub fn url(&self, name: &str) -> String {
        self.url_as("", name, "")
    }

    /// The URL of a lease as this user, as `user:password@`, and with these parameters, as `?name=value`.
    pub fn url_as(&self, user: &str, name: &str, parameters: &str) -> String {
        let (scheme, ca) = match &self.tls {
            None => ("etcd", String::new()),
            Some(_) => {
                let mark = if parameters.is_empty() { '?' } else { '&' };
                ("etcds", format!("{mark}ca={}", self.certificate("ca.pem")))
            }
        };
        format!("{scheme}://{user}{}/{name}{parameters}{ca}", self.endpoints())
    }

    /// All nodes, as `host:port` with commas between.
    pub fn endpoints(&self) -> String {
        let endpoint = |node: &Node| format!("127.0.0.1:{}", node.ports[0]);
        self.nodes.iter().map(endpoint).collect::<Vec<_>>().join(",")
    }

    /// The port on which a node listens to clients.
    pub fn port(&self, at: usize) -> u16 {
        self.nodes[at].ports[0]
    }

    /// Where the file of this name stands.
    pub fn certificate(&self, name: &str) -> String {
        let tls = self.tls.as_ref().expect("it speaks TLS");
        tls.path().join(name).to_str().expect("text").to_owned()
    }

    /// Sends a signal to a node.
    pub fn signal(&self, at: usize, signal: Signal) {
        self.nodes[at].server.as_ref().expect("it runs").signal(signal);
    }

    /// Kills a node. Its data stays.
    pub fn kill(&mut self, at: usize) {
        self.nodes[at].server.take().expect("it runs").kill();
    }

    /// The node that leads, as soon as one does.
    pub fn leader(&self) -> usize {
        let mut leader = 0;
        until("there is a leader", || {
            let leads = |node: &Node| node.get("/metrics").is_some_and(|text| text.contains("\netcd_server_is_leader 1\n"));
            let found = self.nodes.iter().position(leads);
            leader = found.unwrap_or_default();
            found.is_some()
        });
        leader
    }

    /// How many leases etcd counts: its own, each the session of a process.
    pub fn leases(&self) -> usize {
        self.post("/v3/lease/leases", "{}").matches(r#""ID""#).count()
    }

    /// What the first node answers to a request of its gateway.
    pub fn post(&self, path: &str, body: &str) -> String {
        let request = format!("POST {path} HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        self.nodes[0].http(&request).expect("it answers")
    }

    /// Runs etcdctl; returns what it says.
    ///
    /// # Errors
    /// That it is not installed.
    pub fn ctl(&self, arguments: &[&str]) -> Result<String, String> {
        let mut ctl = Command::new(installed(&["etcdctl"])?);
        ctl.env("ETCDCTL_API", "3").args(["--endpoints", &self.endpoints()]).args(arguments);
        let said = ctl.stdin(Stdio::null()).output().expect("etcdctl runs");
        assert!(said.status.success(), "etcdctl {arguments:?}: {}", String::from_utf8_lossy(&said.stderr));
        Ok(String::from_utf8_lossy(&said.stdout).into_owned())
    }

    /// Turns on its authentication: `root` with the password `secret`, and `me` with `pass:word` who may use the keys
    /// with the prefix of leases, and `guest` with `guest`, who may use none.
    ///
    /// # Errors
    /// That etcdctl is not installed.
    pub fn turn_on_authentication(&self) -> Result<(), String> {
        for arguments in [
            &["user", "add", "root:secret"][..],
            &["role", "add", "root"],
            &["user", "grant-role", "root", "root"],
            &["role", "add", "leases"],
            &["role", "grant-permission", "--prefix=true", "leases", "readwrite", "lockkit/"],
            &["user", "add", "me", "--new-user-password", "pass:word"],
            &["user", "grant-role", "me", "leases"],
            &["user", "add", "guest:guest"],
            &["auth", "enable"],
        ] {
            self.ctl(arguments)?;
        }
        Ok(())
    }

    /// Waits until a lease at `url` can be asked for.
    pub fn wait_for(&self, url: &str) {
        let lease = Lease::connect(url).build().expect("a URL");
        until("it answers", || lease.status().is_ok());
    }

    /// Its folder.
    pub fn folder(&self, at: usize) -> &Path {
        self.nodes[at].folder.path()
    }
}

impl Node {
    fn get(&self, path: &str) -> Option<String> {
        self.http(&format!("GET {path} HTTP/1.0\r\n\r\n"))
    }

    fn http(&self, request: &str) -> Option<String> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.ports[0])).ok()?;
        // Also of one that is stopped.
        stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
        stream.write_all(request.as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    }
}
