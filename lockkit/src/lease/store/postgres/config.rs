//! The content of a `postgres://` URL: the address of the server and the credentials.
//!
//! The URL is libpq's, as far as tokio-postgres reads it. This module reads the TLS parameters that
//! tokio-postgres does not know (`verify-ca`, `verify-full`, `sslrootcert`, `sslcert`, `sslkey`).
//! Values that the URL omits are not taken from the environment or from files. Of several hosts,
//! the one that answered last is asked first. Each host gets an equal part of the time that is
//! left, so that a hanging host does not use up all of it. A server that is read-only is skipped.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};
use tokio_postgres::Config;
use tokio_postgres::config::{Host, SslMode, SslNegotiation, TargetSessionAttrs};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::connection::Connection;
use super::error::of_connecting;
use crate::base::error::StoreError;
use crate::base::error::{self, chain};
use crate::lease::store::lease_store::Deadline;
use crate::lease::store::server::{addresses, connect_error, equal_part};
use crate::lease::url::{Parts, invalid};
use crate::sys::event;
use crate::sys::fork::ForkGuarded;

/// The default port of libpq.
const DEFAULT_PORT: u16 = 5432;

pub(super) struct ServerConfig {
    config: Config,
    tls: MakeRustlsConnect,
    hosts: Vec<(HostAddress, u16)>,
    /// The index of the host that answered last.
    answered: AtomicUsize,
}

/// A host.
enum HostAddress {
    /// A name to look up.
    Name(String),
    /// An address, and the name that a certificate must be for.
    Address(IpAddr, String),
    /// The directory of a Unix socket.
    Unix(std::path::PathBuf),
}

impl ServerConfig {
    /// Parses the URL. Reads the files that it names, and connects to nothing.
    pub(super) fn parse(url: &str) -> error::Result<Self> {
        let wrong = |problem: &str| invalid(url, problem);
        let mut tls = TlsParameters::default();
        let parts = Parts::of(url);
        // The builder below would take the part before the second @ for the host.
        if parts.authority.matches('@').count() > 1 {
            return Err(wrong(
                "only one @ is allowed before the path; in a user or password write %40",
            ));
        }
        let mut other_parameters = Vec::new();
        for (key, value) in parts.parameters() {
            let value = value.ok_or_else(|| {
                wrong("the value of a parameter must be UTF-8, and two hexadecimal digits must follow each %")
            })?;
            match key {
                "sslmode" => tls.mode = Some(value),
                "sslrootcert" => tls.roots = Some(value),
                "sslcert" => tls.certificate = Some(value),
                "sslkey" => tls.key = Some(value),
                _ => other_parameters.push((key, value)),
            }
        }
        let mut config: Config = without_tls(&parts, &other_parameters)
            .parse()
            .map_err(|error| wrong(&chain(&error)))?;
        config.ssl_mode(tls.ssl_mode().map_err(|problem| wrong(&problem))?);
        if config.get_application_name().is_none() {
            config.application_name("lockkit");
        }
        if config.get_target_session_attrs() == TargetSessionAttrs::ReadOnly {
            return Err(wrong(
                "target_session_attrs=read-only is not allowed, because a lease is written",
            ));
        }
        let hosts = hosts(&config).map_err(wrong)?;
        let mut tls = tls.config().map_err(|problem| wrong(&problem))?;
        if config.get_ssl_negotiation() == SslNegotiation::Direct {
            tls.alpn_protocols.push(b"postgresql".to_vec());
        }
        Ok(Self {
            config,
            tls: MakeRustlsConnect::new(tls),
            hosts,
            answered: AtomicUsize::new(0),
        })
    }

    /// Returns a number that stores on the same servers have in common.
    pub(super) fn failure_domain(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for (host, port) in &self.hosts {
            match host {
                HostAddress::Name(name) => name.hash(&mut hasher),
                HostAddress::Address(address, _) => address.hash(&mut hasher),
                HostAddress::Unix(directory) => directory.hash(&mut hasher),
            }
            port.hash(&mut hasher);
        }
        hasher.finish()
    }

    /// Returns the user, as error messages name it.
    pub(super) fn user(&self) -> &str {
        self.config.get_user().unwrap_or("this system's user")
    }

    /// Connects to the first host that accepts the credentials and passes `check`.
    pub(super) fn connect(
        &self,
        by: Deadline,
        check: impl Fn(&mut Connection, Deadline) -> Result<(), StoreError>,
    ) -> Result<Connection, StoreError> {
        let (count, first) = (self.hosts.len(), self.answered.load(Ordering::Relaxed));
        let mut failure: Option<StoreError> = None;
        for attempt in 0..count {
            let at = (first + attempt) % count;
            let part = equal_part(by, count - attempt);
            let limit = self
                .config
                .get_connect_timeout()
                .filter(|limit| !limit.is_zero());
            let by = by.min(Deadline::after(
                limit.map_or(part, |limit| part.min(*limit)),
            ));
            let connected = self
                .connect_to(at, by)
                .and_then(|mut connection| check(&mut connection, by).map(|()| connection));
            match connected {
                Ok(connection) => {
                    self.answered.store(at, Ordering::Relaxed);
                    return Ok(connection);
                }
                // A permanent error explains more than a host that is down.
                Err(error) => match failure {
                    Some(StoreError::Permanent(_)) => {}
                    _ => failure = Some(error),
                },
            }
        }
        Err(failure.unwrap_or_else(|| StoreError::not_applied("the URL names no host")))
    }

    fn connect_to(&self, at: usize, by: Deadline) -> Result<Connection, StoreError> {
        let (host, port) = &self.hosts[at];
        let timeout = || {
            StoreError::not_applied(format!(
                "cannot connect to {}: no answer came in time",
                host_text(host, *port)
            ))
        };
        let failure = |error: io::Error| match error.kind() {
            io::ErrorKind::TimedOut => timeout(),
            _ => connect_error(&host_text(host, *port), &error),
        };
        let (socket, name) = match host {
            HostAddress::Unix(directory) => (self.connect_unix(directory, *port, by), None),
            HostAddress::Address(address, name) => (
                self.connect_tcp(&[(*address, *port).into()], by),
                Some(&**name),
            ),
            HostAddress::Name(name) => (
                addresses(name, *port, by).and_then(|found| self.connect_tcp(&found, by)),
                Some(&**name),
            ),
        };
        let opened = Connection::open(socket.map_err(failure)?, name, &self.config, &self.tls, by);
        opened.map_err(|error| of_connecting(error, &host_text(host, *port), self.user(), timeout))
    }

    fn connect_unix(
        &self,
        directory: &std::path::Path,
        port: u16,
        by: Deadline,
    ) -> io::Result<ForkGuarded<OwnedFd>> {
        let address = SocketAddrUnix::new(directory.join(format!(".s.PGSQL.{port}")))?;
        let socket = socket(AddressFamily::UNIX)?;
        loop {
            match connect(&*socket, &address) {
                // The accept queue of a stopped server is full.
                Err(Errno::AGAIN) if !by.is_past() => thread::sleep(Duration::from_millis(1)),
                Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                done => return done.map(|()| socket).map_err(io::Error::from),
            }
        }
    }

    /// Connects to the first address of a host that answers; each address gets an equal part of the
    /// time that is left.
    fn connect_tcp(
        &self,
        addresses: &[SocketAddr],
        by: Deadline,
    ) -> io::Result<ForkGuarded<OwnedFd>> {
        let mut failure = io::ErrorKind::NotFound.into();
        for (at, address) in addresses.iter().enumerate() {
            let part = equal_part(by, addresses.len() - at);
            match self.connect_tcp_address(address, by.min(Deadline::after(part))) {
                Ok(socket) => return Ok(socket),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    fn connect_tcp_address(
        &self,
        address: &SocketAddr,
        by: Deadline,
    ) -> io::Result<ForkGuarded<OwnedFd>> {
        let family = if address.is_ipv4() {
            AddressFamily::INET
        } else {
            AddressFamily::INET6
        };
        let socket = socket(family)?;
        match connect(&*socket, address) {
            Ok(()) => {}
            Err(Errno::INPROGRESS) => {
                if !event::wait_for_traffic(socket.as_fd(), true, by.moment())? {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                sockopt::socket_error(&*socket)??;
            }
            Err(error) => return Err(error.into()),
        }
        sockopt::set_tcp_nodelay(&*socket, true)?;
        if self.config.get_keepalives() {
            sockopt::set_socket_keepalive(&*socket, true)?;
            sockopt::set_tcp_keepidle(&*socket, self.config.get_keepalives_idle())?;
            if let Some(interval) = self.config.get_keepalives_interval() {
                sockopt::set_tcp_keepintvl(&*socket, interval)?;
            }
            if let Some(retries) = self.config.get_keepalives_retries() {
                sockopt::set_tcp_keepcnt(&*socket, retries)?;
            }
        }
        Ok(socket)
    }
}

/// Returns the URL without the TLS parameters. The others are escaped one by one for the client's
/// own parser.
fn without_tls(parts: &Parts<'_>, other_parameters: &[(&str, String)]) -> String {
    let escape = |text: &str| {
        text.bytes()
            .map(|byte| format!("%{byte:02X}"))
            .collect::<String>()
    };
    let query: Vec<_> = other_parameters
        .iter()
        .map(|(key, value)| format!("{key}={}", escape(value)))
        .collect();
    format!(
        "postgres://{}{}?{}",
        parts.authority,
        parts.path,
        query.join("&")
    )
}

fn socket(family: AddressFamily) -> io::Result<ForkGuarded<OwnedFd>> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    Ok(ForkGuarded::new(|| socket_with(family, SocketType::STREAM, flags, None))?.know())
}

/// Returns the hosts and their ports, as libpq pairs them.
fn hosts(config: &Config) -> Result<Vec<(HostAddress, u16)>, &'static str> {
    let (names, addresses, ports) = (
        config.get_hosts(),
        config.get_hostaddrs(),
        config.get_ports(),
    );
    let count = names.len().max(addresses.len());
    if count == 0 {
        return Err(
            "a host is missing; write the directory of a Unix socket as %2Fvar%2Frun%2Fpostgresql or as host=/…",
        );
    }
    if !names.is_empty() && !addresses.is_empty() && names.len() != addresses.len() {
        return Err("the number of addresses (hostaddr) must be the number of hosts");
    }
    if ports.len() > 1 && ports.len() != count {
        return Err("the number of ports must be one, or the number of hosts");
    }
    let host = |at: usize| match (names.get(at), addresses.get(at)) {
        (Some(Host::Unix(directory)), _) => HostAddress::Unix(directory.clone()),
        (Some(Host::Tcp(name)), Some(address)) => HostAddress::Address(*address, name.clone()),
        (Some(Host::Tcp(name)), None) => match name.trim_matches(['[', ']']).parse() {
            Ok(address) => HostAddress::Address(address, name.trim_matches(['[', ']']).to_owned()),
            Err(_) => HostAddress::Name(name.clone()),
        },
        (None, Some(address)) => HostAddress::Address(*address, address.to_string()),
        (None, None) => HostAddress::Name(String::new()),
    };
    Ok((0..count)
        .map(|at| {
            (
                host(at),
                ports
                    .get(at)
                    .or(ports.first())
                    .copied()
                    .unwrap_or(DEFAULT_PORT),
            )
        })
        .collect())
}

fn host_text(host: &HostAddress, port: u16) -> String {
    match host {
        HostAddress::Name(name) | HostAddress::Address(_, name) => format!("{name}:{port}"),
        HostAddress::Unix(directory) => format!("{}/.s.PGSQL.{port}", directory.display()),
    }
}

/// The TLS parameters of a URL.
#[derive(Default)]
struct TlsParameters {
    mode: Option<String>,
    roots: Option<String>,
    certificate: Option<String>,
    key: Option<String>,
}

impl TlsParameters {
    fn ssl_mode(&self) -> Result<SslMode, String> {
        match self.mode.as_deref() {
            None | Some("prefer") => Ok(SslMode::Prefer),
            Some("disable") => Ok(SslMode::Disable),
            Some("require" | "verify-ca" | "verify-full") => Ok(SslMode::Require),
            Some(_) => {
                Err("sslmode must be disable, prefer, require, verify-ca or verify-full".to_owned())
            }
        }
    }

    /// Returns the TLS configuration. It checks the server's certificate as libpq does.
    /// `verify-full` checks the chain and the name. `verify-ca`, and `require` with given roots,
    /// check the chain. Other modes check nothing.
    fn config(&self) -> Result<ClientConfig, String> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let schemes = provider
            .signature_verification_algorithms
            .supported_schemes();
        let chain = match (self.mode.as_deref(), self.roots.as_deref()) {
            (Some("verify-full"), None | Some("system")) => Some(system_roots()?),
            (Some("verify-ca"), None | Some("system")) => {
                return Err(
                    "sslmode=verify-ca needs sslrootcert with the file of your own authority, because anybody gets a \
                            certificate from the system's authorities; or use verify-full"
                        .to_owned(),
                );
            }
            (Some("verify-full" | "verify-ca" | "require"), Some(path)) => Some(roots_in(path)?),
            _ => None,
        };
        let chain = match chain {
            Some(roots) => {
                let verifier =
                    WebPkiServerVerifier::builder_with_provider(roots.into(), provider.clone())
                        .build();
                Some(verifier.map_err(|error| format!("cannot use sslrootcert: {error}"))?)
            }
            None => None,
        };
        let is_named = self.mode.as_deref() == Some("verify-full");
        let verifier = Arc::new(SslModeVerifier {
            chain,
            is_named,
            schemes,
        });
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match (&self.certificate, &self.key) {
            (None, None) => builder.with_no_client_auth(),
            (Some(certificate), Some(key)) => {
                let read = CertificateDer::pem_file_iter(certificate).and_then(Iterator::collect);
                let chain: Vec<_> =
                    read.map_err(|error| format!("cannot read sslcert {certificate}: {error}"))?;
                let key = PrivateKeyDer::from_pem_file(key)
                    .map_err(|error| format!("cannot read sslkey {key}: {error}"))?;
                builder
                    .with_client_auth_cert(chain, key)
                    .map_err(|error| format!("cannot use sslcert and sslkey: {error}"))?
            }
            _ => return Err("sslcert and sslkey must be given together".to_owned()),
        };
        // A mutex guards the sessions for resumption, and a fork could leave it locked.
        config.resumption = Resumption::disabled();
        Ok(config)
    }
}

fn roots_in(path: &str) -> Result<RootCertStore, String> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    let certificates: Vec<_> =
        read.map_err(|error| format!("cannot read sslrootcert {path}: {error}"))?;
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(certificates);
    if roots.is_empty() {
        Err(format!("sslrootcert {path} contains no certificate"))
    } else {
        Ok(roots)
    }
}

fn system_roots() -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        Err("cannot verify certificates: this system has no certificates of authorities".to_owned())
    } else {
        Ok(roots)
    }
}

/// A verifier that checks as much of a server's certificate as sslmode requires.
#[derive(Debug)]
struct SslModeVerifier {
    /// The authorities that the certificate must come from, if any.
    chain: Option<Arc<WebPkiServerVerifier>>,
    /// The certificate must be for the host of the connection.
    is_named: bool,
    schemes: Vec<SignatureScheme>,
}

impl ServerCertVerifier for SslModeVerifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        use CertificateError::{NotValidForName, NotValidForNameContext};
        let Some(chain) = &self.chain else {
            return Ok(ServerCertVerified::assertion());
        };
        match chain.verify_server_cert(certificate, intermediates, name, ocsp, now) {
            Err(rustls::Error::InvalidCertificate(
                NotValidForName | NotValidForNameContext { .. },
            )) if !self.is_named => Ok(ServerCertVerified::assertion()),
            checked => checked,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        match &self.chain {
            Some(chain) => chain.verify_tls12_signature(message, certificate, signed),
            None => Ok(HandshakeSignatureValid::assertion()),
        }
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        match &self.chain {
            Some(chain) => chain.verify_tls13_signature(message, certificate, signed),
            None => Ok(HandshakeSignatureValid::assertion()),
        }
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts_of(url: &str) -> Vec<String> {
        let target = ServerConfig::parse(url).unwrap_or_else(|error| panic!("{url}: {error}"));
        target
            .hosts
            .iter()
            .map(|(host, port)| host_text(host, *port))
            .collect()
    }

    #[test]
    fn hosts_are_paired_with_ports_as_libpq_does() {
        assert_eq!(hosts_of("postgres://u@a.example/db"), ["a.example:5432"]);
        assert_eq!(
            hosts_of("postgres://u:p@a:1,b,[::1]:3/db?sslmode=disable"),
            ["a:1", "b:5432", "::1:3"]
        );
        assert_eq!(
            hosts_of("postgres://u@%2Fvar%2Frun/db"),
            ["/var/run/.s.PGSQL.5432"]
        );
        assert_eq!(
            hosts_of("postgres:///db?host=/var/run&port=7"),
            ["/var/run/.s.PGSQL.7"]
        );
        assert_eq!(
            hosts_of("postgres:///db?host=a&hostaddr=127.0.0.1&port=7"),
            ["a:7"]
        );
    }

    #[test]
    fn invalid_postgres_url_error_names_cause_and_no_password() {
        for (url, says) in [
            ("postgres:///db", "a host is missing"),
            ("postgres://u:secret@a,b/db?port=1,2,3", "ports"),
            ("postgres://u:secret@a/db?sslmode=allow", "sslmode must be"),
            ("postgres://u:secret@a/db?sslmode=verify-ca", "sslrootcert"),
            (
                "postgres://u:secret@a/db?sslrootcert=/nowhere&sslmode=verify-full",
                "cannot read sslrootcert /nowhere",
            ),
            (
                "postgres://u:secret@a/db?sslcert=/nowhere",
                "given together",
            ),
            (
                "postgres://u:secret@a/db?target_session_attrs=read-only",
                "because a lease is written",
            ),
            ("postgres://u:secret@a/db?nonsense=secret", "nonsense"),
            (
                "postgres://u:secret@a/db?connect_timeout=secret",
                "connect_timeout",
            ),
        ] {
            let error = ServerConfig::parse(url)
                .err()
                .unwrap_or_else(|| panic!("{url} is accepted"))
                .to_string();
            assert!(
                error.contains(says) && !error.contains("secret"),
                "{url}: {error}"
            );
        }
    }
}
