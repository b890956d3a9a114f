//! Connections to the server: opened by a deadline, logged in, and checked.

use std::fs;
use std::io;
use std::mem::ManuallyDrop;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use redis::{
    Client, ClientTlsConfig, Cmd, Connection, ConnectionAddr, ConnectionLike, ErrorKind,
    RedisError, ServerErrorKind, TlsCertificates, Value,
};
use rustls::crypto::CryptoProvider;

use super::config::ServerConfig;
use super::error::{is_interrupted, message};
use super::key::name_in_channel;
use crate::base::error::{Error, StoreError};
use crate::lease::store::lease_store::Deadline;
use crate::lease::store::server::{Listener, Result, addresses, connect_error, equal_part};
use crate::sys::failpoint::step;

/// The oldest major version in which a script that reads the time may write.
const MIN_VERSION: u32 = 5;
/// The shortest timeout that a socket accepts, for a deadline that has passed.
const MIN_SOCKET_TIMEOUT: Duration = Duration::from_micros(1);

impl ServerConfig {
    /// Opens a connection that is ready for requests.
    pub(super) fn connect(&self, by: Deadline) -> Result<Connection> {
        let server = &self.server;
        let mut connection = self.open(by)?;
        // Set once: a request is far smaller than the socket's buffer, which is empty whenever a
        // request is sent.
        let limited = connection.set_write_timeout(Some(by.remaining().max(MIN_SOCKET_TIMEOUT)));
        limited.map_err(|error| self.connect_failed(&error))?;
        // A failure here has changed nothing, whatever the answer.
        let mut send = |command: &Cmd| match send(&mut connection, command, by) {
            Err(error) => Err(self.connect_failed(&error)),
            // The server gives this answer to any request when it has no room for the client.
            Ok(Err(error)) if message(&error).contains("max number of clients") => {
                Err(self.refused(&error))
            }
            Ok(answer) => Ok(answer),
        };
        if let Some(password) = self.settings.password() {
            let mut auth = redis::cmd("AUTH");
            self.settings
                .username()
                .into_iter()
                .for_each(|user| _ = auth.arg(user));
            if let Err(error) = send(auth.arg(password))? {
                return Err(StoreError::permanent(format!(
                    "cannot log in to {server}: {}; check the user and the password of the URL",
                    message(&error)
                )));
            }
        }
        let database = self.settings.db();
        if database != 0
            && let Err(error) = send(redis::cmd("SELECT").arg(database))?
        {
            return Err(match error.kind() {
                ErrorKind::Server(ServerErrorKind::ResponseError) => {
                    StoreError::permanent(format!(
                        "cannot use database {database} of {server}: {}; check the number in the URL",
                        message(&error)
                    ))
                }
                _ => self.refused(&error),
            });
        }
        match send(redis::cmd("INFO").arg("server"))? {
            Ok(Value::BulkString(info)) => self.check_version(&String::from_utf8_lossy(&info))?,
            // The user may lack the permission for INFO.
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoPerm) => {}
            Err(error) => return Err(self.refused(&error)),
        }
        step("connected");
        Ok(connection)
    }

    /// Opens a connection to the first address of the host that answers; each address gets an equal
    /// part of the time that is left.
    fn open(&self, by: Deadline) -> Result<Connection> {
        let open = |client: Client, attempts: usize| {
            client.get_connection_with_timeout(equal_part(by, attempts).max(MIN_SOCKET_TIMEOUT))
        };
        let look_up = |host, port| {
            addresses(host, port, by).map_err(|error| connect_error(&self.server, &error))
        };
        let opened = match self.address.addr() {
            ConnectionAddr::Tcp(host, port) => {
                let found = look_up(host, *port)?;
                let mut opened = Err(io::Error::from(io::ErrorKind::NotFound).into());
                for (at, address) in found.iter().enumerate() {
                    let address = ConnectionAddr::Tcp(address.ip().to_string(), *port);
                    opened = Client::open(self.address.clone().set_addr(address))
                        .and_then(|client| open(client, found.len() - at));
                    if opened.is_ok() {
                        break;
                    }
                }
                opened
            }
            // The client must know the name for TLS, so the client itself tries all addresses, each
            // for this time.
            ConnectionAddr::TcpTls { host, port, .. } => {
                open(self.tls_client()?, look_up(host, *port)?.len())
            }
            _ => Client::open(self.address.clone()).and_then(|client| open(client, 1)),
        };
        opened.map_err(|error| self.connect_failed(&error))
    }

    fn tls_client(&self) -> Result<Client> {
        // The client takes the provider of the process, and panics if there is none and several are
        // possible.
        if CryptoProvider::get_default().is_none() {
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        // Read for each connection, because certificates are replaced while programs run. During
        // the replacement a file may be missing or incomplete.
        let read = |path: &PathBuf| {
            fs::read(path).map_err(|error| {
                StoreError::not_applied(Error::io("read the certificate or key", path, error))
            })
        };
        let client_tls = match &self.certificate {
            Some([certificate, key]) => Some(ClientTlsConfig {
                client_cert: read(certificate)?,
                client_key: read(key)?,
            }),
            None => None,
        };
        let root_cert = self.ca.as_ref().map(read).transpose()?;
        Client::build_with_tls(
            self.address.clone(),
            TlsCertificates {
                client_tls,
                root_cert,
            },
        )
        .map_err(|error| {
            let (server, error) = (&self.server, message(&error));
            StoreError::not_applied(format!(
                "cannot use these certificates for {server}: {error}"
            ))
        })
    }

    fn check_version(&self, info: &str) -> Result<()> {
        let version = info
            .lines()
            .find_map(|line| line.strip_prefix("redis_version:"))
            .unwrap_or_default()
            .trim();
        match version.split('.').next().map(str::parse::<u32>) {
            Some(Ok(major)) if major < MIN_VERSION => {
                let server = &self.server;
                Err(StoreError::permanent(format!(
                    "cannot use {server} for the lease: version {version} is too old; use version {MIN_VERSION} or \
                     later"
                )))
            }
            _ => Ok(()),
        }
    }
}

/// Sends a request. The outer error is a failed connection, the inner error an error answer of the
/// server.
pub(super) fn send(
    connection: &mut Connection,
    command: &Cmd,
    by: Deadline,
) -> Result<Result<Value, RedisError>, RedisError> {
    connection.set_read_timeout(Some(by.remaining().max(MIN_SOCKET_TIMEOUT)))?;
    match connection
        .req_command(command)
        .and_then(Value::extract_error)
    {
        Err(error) if !matches!(error.kind(), ErrorKind::Server(_) | ErrorKind::Extension) => {
            Err(error)
        }
        answer => Ok(answer),
    }
}

/// A connection that receives every release that has a waiter.
pub(super) struct RedisListener {
    connection: Connection,
    config: Arc<ServerConfig>,
}

impl RedisListener {
    pub(super) fn open(config: &Arc<ServerConfig>, by: Deadline) -> Result<Self> {
        let mut connection = config.connect(by)?;
        let mut subscribe = redis::cmd("PSUBSCRIBE");
        // Exactly the pattern in the user's ACL: Redis compares the text of patterns, not what they
        // match.
        subscribe.arg("lockkit:*");
        match send(&mut connection, &subscribe, by) {
            Ok(Ok(_)) => Ok(Self {
                connection,
                config: config.clone(),
            }),
            Ok(Err(error)) => Err(config.refused(&error)),
            Err(error) => Err(config.connect_failed(&error)),
        }
    }
}

impl Listener for RedisListener {
    fn listen(&mut self, at_most: Duration, notify: &mut dyn FnMut(&str)) -> Result<()> {
        let received = self
            .connection
            .set_read_timeout(Some(at_most))
            .and_then(|()| {
                // Dropping it would unsubscribe. It owns nothing as long as it is only read from.
                ManuallyDrop::new(self.connection.as_pubsub()).get_message()
            });
        match received {
            Ok(message) => {
                name_in_channel(message.get_channel_name())
                    .into_iter()
                    .for_each(notify);
                Ok(())
            }
            Err(error) if error.is_timeout() || is_interrupted(&error) => Ok(()),
            Err(error) => Err(self.config.unanswered(&error)),
        }
    }
}
