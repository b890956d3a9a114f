//! The content of a `redis://` URL: the address of the server, the credentials, and the
//! certificates.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::PathBuf;
use std::time::Duration;

use redis::io::tcp::{TcpSettings, socket2::TcpKeepalive};
use redis::{ConnectionAddr, ConnectionInfo, IntoConnectionInfo, RedisConnectionInfo};

use crate::base::error;
use crate::lease::url::{Parts, invalid};

/// The time without traffic after which TCP probes the server, and the time between two probes. So
/// a waiter learns of a server that vanished without a notice.
const KEEPALIVE_TIME: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);

/// The address of a server and the settings for connecting to it.
pub(super) struct ServerConfig {
    /// The address without user, password and database. The connection sends those itself, so that
    /// each answer has the remaining time as its limit, and each error gets its own message.
    pub(super) address: ConnectionInfo,
    pub(super) settings: RedisConnectionInfo,
    pub(super) ca: Option<PathBuf>,
    /// A client's certificate and its key.
    pub(super) certificate: Option<[PathBuf; 2]>,
    /// The address in messages.
    pub(super) server: String,
    pub(super) failure_domain: u64,
}

impl ServerConfig {
    pub(super) fn parse(url: &str) -> error::Result<Self> {
        let wrong = |problem: &str| invalid(url, problem);
        let [ca, certificate, key] = tls_files(url)?;
        if url.contains('#') {
            return Err(wrong("a # is not allowed; write %23"));
        }
        let parsed = url
            .into_connection_info()
            .map_err(|error| invalid(url, error.to_string()))?;
        let certificate = match (certificate, key) {
            (Some(certificate), Some(key)) => Some([certificate, key]),
            (None, None) => None,
            _ => return Err(wrong("`cert` and `key` must be given together")),
        };
        let is_tls = matches!(parsed.addr(), ConnectionAddr::TcpTls { .. });
        if !is_tls && (ca.is_some() || certificate.is_some()) {
            return Err(wrong(
                "`ca`, `cert` and `key` need TLS; write rediss:// or valkeys://",
            ));
        }
        let keepalive = TcpKeepalive::new()
            .with_time(KEEPALIVE_TIME)
            .with_interval(KEEPALIVE_INTERVAL);
        let tcp = TcpSettings::default()
            .set_nodelay(true)
            .set_keepalive(keepalive);
        let server = format!("{}", parsed.addr());
        let mut hasher = DefaultHasher::new();
        server.hash(&mut hasher);
        Ok(Self {
            settings: parsed.redis_settings().clone(),
            address: parsed
                .set_redis_settings(RedisConnectionInfo::default().set_skip_set_lib_name())
                .set_tcp_settings(tcp),
            ca,
            certificate,
            server,
            failure_domain: hasher.finish(),
        })
    }

    pub(super) fn is_tls(&self) -> bool {
        matches!(self.address.addr(), ConnectionAddr::TcpTls { .. })
    }
}

/// Returns the files that the parameters of the URL name: `ca`, `cert` and `key`.
fn tls_files(url: &str) -> error::Result<[Option<PathBuf>; 3]> {
    let parts = Parts::of(url);
    let mut files = [const { None }; 3];
    for (parameter, value) in parts.parameters() {
        let value = value.ok_or_else(|| {
            invalid(url, "the value of a parameter must be UTF-8, and two hexadecimal digits must follow each %")
        })?;
        let [ca, certificate, key] = &mut files;
        let file = match parameter {
            "ca" => ca,
            "cert" => certificate,
            "key" => key,
            "db" | "user" | "pass" if parts.scheme.ends_with("unix") => continue,
            _ => {
                return Err(invalid(
                    url,
                    format!("unknown parameter `{parameter}`; use `ca`, `cert` or `key`"),
                ));
            }
        };
        if file.replace(PathBuf::from(value)).is_some() {
            return Err(invalid(
                url,
                format!("the parameter `{parameter}` must be given once"),
            ));
        }
    }
    Ok(files)
}
