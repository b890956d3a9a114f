//! The content of an `etcd://` URL: the endpoints, the credentials, and the certificates.

use std::path::Path;
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

use crate::lease::store::server::Result;
use crate::lease::url::{self, Parts, text};

const DEFAULT_PORT: u16 = 2379;

#[derive(Clone)]
pub(super) struct Login {
    pub(super) user: String,
    pub(super) password: String,
}

/// The content of a URL, checked as far as is possible without a connection.
#[derive(Clone)]
pub(super) struct Config {
    pub(super) hosts: Vec<(Arc<str>, u16)>,
    pub(super) tls: Option<Arc<ClientConfig>>,
    pub(super) login: Option<Login>,
    /// The prefix of all keys.
    pub(super) prefix: String,
}

impl Config {
    pub(super) fn parse(url: &str) -> crate::Result<Self> {
        let wrong = |problem: String| url::invalid(url, problem);
        let parts = Parts::of(url);
        if !matches!(parts.path, "" | "/") {
            return Err(wrong("the path must be only the name of the lease".into()));
        }
        let (login, hosts) = match parts.authority.rsplit_once('@') {
            None => (None, parts.authority),
            Some((login, hosts)) => {
                let both = login
                    .split_once(':')
                    .and_then(|(user, password)| Some((text(user)?, text(password)?)));
                let (user, password) =
                    both.ok_or_else(|| wrong("the part before @ must be user:password".into()))?;
                (Some(Login { user, password }), hosts)
            }
        };
        // The text is not quoted: it may be the first part of a password with a slash in it.
        let no_host = || {
            wrong(
                "the endpoints must be host:port,host:port; in a user or password write %2F for /"
                    .into(),
            )
        };
        let hosts = hosts
            .split(',')
            .map(|host| endpoint(host).ok_or_else(no_host));
        let hosts = hosts.collect::<crate::Result<_>>()?;
        let mut prefix = "lockkit/".to_owned();
        let (mut ca, mut cert, mut key) = (None, None, None);
        for (name, value) in parts.parameters() {
            let value =
                value.ok_or_else(|| wrong(format!("the parameter {name} must be UTF-8")))?;
            match name {
                "ca" => ca = Some(value),
                "cert" => cert = Some(value),
                "key" => key = Some(value),
                "prefix" => prefix = value,
                _ => {
                    return Err(wrong(format!(
                        "unknown parameter {name:?}; use ca, cert, key or prefix"
                    )));
                }
            }
        }
        let tls = match parts.scheme.eq_ignore_ascii_case("etcds") {
            true => Some(tls(ca.as_deref(), cert.as_deref(), key.as_deref()).map_err(wrong)?),
            false if ca.is_some() || cert.is_some() || key.is_some() => {
                return Err(wrong("ca, cert and key need TLS; write etcds://".into()));
            }
            false => None,
        };
        Ok(Self {
            hosts,
            tls,
            login,
            prefix,
        })
    }
}

/// `host`, `host:port`, `[address]` or `[address]:port`.
fn endpoint(text: &str) -> Option<(Arc<str>, u16)> {
    let (host, port) = match text.rfind(':') {
        Some(at) if !text[at..].contains(']') => (&text[..at], text[at + 1..].parse().ok()?),
        _ => (text, DEFAULT_PORT),
    };
    let is_bracketed = host.starts_with('[') && host.ends_with(']');
    (!host.is_empty() && (is_bracketed || !host.contains(':'))).then(|| (host.into(), port))
}

/// Returns the TLS configuration: the trusted roots and the client's certificate.
fn tls(
    ca: Option<&str>,
    cert: Option<&str>,
    key: Option<&str>,
) -> Result<Arc<ClientConfig>, String> {
    let certificates = |file: &str| -> Result<Vec<CertificateDer<'static>>, String> {
        let read = CertificateDer::pem_file_iter(Path::new(file))
            .and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let read =
            read.map_err(|error| format!("cannot read a certificate from {file}: {error}"))?;
        if read.is_empty() {
            Err(format!("{file} contains no certificate"))
        } else {
            Ok(read)
        }
    };
    let mut roots = RootCertStore::empty();
    match ca {
        Some(file) => {
            for certificate in certificates(file)? {
                roots.add(certificate).map_err(|error| {
                    format!("cannot use {file} as the certificate of an authority: {error}")
                })?;
            }
        }
        // System certificates that cannot be read are left out; a server that needs one of them is
        // then not trusted.
        None => _ = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs),
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder =
        ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots);
    let mut config = match (cert, key) {
        (None, None) => builder.with_no_client_auth(),
        (Some(cert), Some(key)) => {
            let secret = PrivateKeyDer::from_pem_file(key)
                .map_err(|error| format!("cannot read a private key from {key}: {error}"))?;
            builder
                .with_client_auth_cert(certificates(cert)?, secret)
                .map_err(|error| format!("{cert} and {key} do not match: {error}"))?
        }
        _ => return Err("cert and key must be given together".into()),
    };
    // A mutex guards the sessions for resumption, and a fork could leave it locked.
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_url_returns_endpoints_or_rule() {
        let hosts = |url| {
            Config::parse(url)
                .map(|config| config.hosts)
                .map_err(|error| error.to_string())
        };
        let pairs = |pairs: &[(&str, u16)]| {
            Ok(pairs
                .iter()
                .map(|(host, port)| ((*host).into(), *port))
                .collect())
        };
        assert_eq!(
            hosts("etcd://a:1,b,[::1]:3"),
            pairs(&[("a", 1), ("b", 2379), ("[::1]", 3)])
        );
        assert_eq!(hosts("etcd://u:p@a/?prefix=x"), pairs(&[("a", 2379)]));
        for wrong in [
            "etcd://",
            "etcd://a:b",
            "etcd://a,",
            "etcd://::1",
            "etcd://a/b",
            "etcd://u@a",
            "etcd://a?x=y",
        ] {
            assert!(hosts(wrong).is_err(), "{wrong}");
        }
        let leaky = hosts("etcd://u:pa/ss@h/x").unwrap_err() + &hosts("etcd://u:pa").unwrap_err();
        assert!(
            !leaky.contains("pa/") && !leaky.contains("\"pa") && !leaky.contains("u:pa\""),
            "{leaky}"
        );
        assert!(hosts("etcd://a?ca=/x").unwrap_err().contains("etcds://"));
        assert!(
            hosts("etcds://a?cert=/x")
                .unwrap_err()
                .contains("given together")
        );
        assert!(
            hosts("etcds://a?ca=/no/such/file")
                .unwrap_err()
                .contains("/no/such/file")
        );
    }
}
