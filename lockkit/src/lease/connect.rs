//! Leases by URL: the engine of a URL, the name of the lease in it, and one store for all leases on
//! a server.
//!
//! lockkit itself reads only the lease's name from a URL; the rest has the engine's own form. The
//! name is the parameter `lease`, or else the path, less a first part that the engine takes for
//! itself.

#[cfg(any(feature = "etcd", feature = "postgres", feature = "redis"))]
use std::collections::HashMap;
#[cfg(any(feature = "etcd", feature = "postgres", feature = "redis"))]
use std::sync::{Arc, Weak};

#[cfg(any(feature = "etcd", feature = "postgres", feature = "redis"))]
use parking_lot::Mutex;

use super::location::Location;
#[cfg(any(feature = "etcd", feature = "postgres", feature = "redis"))]
use super::store;
#[cfg(any(feature = "etcd", feature = "postgres", feature = "redis"))]
use super::store::lease_store::LeaseStore;
#[cfg(any(feature = "etcd", feature = "postgres", feature = "redis"))]
use super::url::{Parts, text};
use super::url::{invalid, path};
use crate::base::error::Result;
#[cfg(not(all(feature = "etcd", feature = "postgres", feature = "redis")))]
use crate::base::error::{Error, ErrorKind};
#[cfg(any(feature = "etcd", feature = "postgres", feature = "redis"))]
use crate::sys::process_local::ProcessLocal;

/// Returns where the lease at `url` is kept. Opens no connection.
pub(super) fn locate(url: &str) -> Result<Location> {
    let Some((scheme, rest)) = url.split_once("://") else {
        return Err(invalid(
            url,
            "it has no scheme; write it as file:///path, etcd://…, postgres://… or redis://…",
        ));
    };
    match &*scheme.to_ascii_lowercase() {
        "file" => Ok(Location::File(path(url, rest)?)),
        #[cfg(feature = "etcd")]
        "etcd" | "etcds" => in_store(url, 0, store::etcd::open),
        #[cfg(not(feature = "etcd"))]
        "etcd" | "etcds" => Err(unsupported(
            "an etcd:// lease in a build of lockkit without its feature `etcd`",
        )),
        // The first part of the path is the database.
        #[cfg(feature = "postgres")]
        "postgres" | "postgresql" => in_store(url, 1, store::postgres::open),
        #[cfg(not(feature = "postgres"))]
        "postgres" | "postgresql" => Err(unsupported(
            "a postgres:// lease in a build of lockkit without its feature `postgres`",
        )),
        // The first part of the path is the database here, too, if it is a number and more follows.
        #[cfg(feature = "redis")]
        "redis" | "rediss" | "valkey" | "valkeys" => {
            let first = Parts::of(url).path.split('/').nth(1).unwrap_or_default();
            let has_database = !first.is_empty() && first.bytes().all(|byte| byte.is_ascii_digit());
            in_store(url, usize::from(has_database), store::redis::open)
        }
        // The whole path is the socket's.
        #[cfg(feature = "redis")]
        "redis+unix" | "valkey+unix" => in_store(url, usize::MAX, store::redis::open),
        #[cfg(not(feature = "redis"))]
        "redis" | "rediss" | "valkey" | "valkeys" | "redis+unix" | "valkey+unix" => Err(
            unsupported("a redis:// lease in a build of lockkit without its feature `redis`"),
        ),
        _ => Err(invalid(
            url,
            "lockkit knows file://, etcd://, postgres:// and redis:// leases",
        )),
    }
}

#[cfg(not(all(feature = "etcd", feature = "postgres", feature = "redis")))]
fn unsupported(what: &'static str) -> Error {
    ErrorKind::Unsupported { what }.into()
}

/// Returns the name of a lease, and the URL of its server without the name. The first
/// `server_parts` parts of the path are the server's.
#[cfg(any(feature = "etcd", feature = "postgres", feature = "redis"))]
fn split(url: &str, server_parts: usize) -> Result<(String, String)> {
    let parts = Parts::of(url);
    // With a slash in a password, a part of it would be shown as the host, and the rest as the name
    // of the lease.
    if !parts.authority.is_empty() && parts.path.contains('@') {
        let problem = "there is an @ after a /: write %40, and in a user or password %2F for the /";
        return Err(invalid(&format!("{}://…", parts.scheme), problem));
    }
    let slash = parts
        .path
        .match_indices('/')
        .nth(server_parts)
        .map_or(parts.path.len(), |(at, _)| at);
    let (path, name) = parts.path.split_at(slash);
    let mut names: Vec<_> = parts
        .raw_parameters()
        .filter(|(key, _)| *key == "lease")
        .map(|(_, value)| value)
        .collect();
    names.extend(name.strip_prefix('/').filter(|name| !name.is_empty()));
    let [name] = names[..] else {
        let problem =
            "it must name the lease once, at the end of its path or as the parameter `lease`";
        return Err(invalid(url, problem));
    };
    let name = text(name).ok_or_else(|| {
        invalid(
            url,
            "the name of the lease is not UTF-8, or a % in it is not followed by two digits",
        )
    })?;
    let query: Vec<_> = parts
        .query
        .split('&')
        .filter(|pair| !pair.is_empty() && !pair.starts_with("lease="))
        .collect();
    let mark = if query.is_empty() { "" } else { "?" };
    Ok((
        name,
        format!(
            "{}://{}{path}{mark}{}",
            parts.scheme,
            parts.authority,
            query.join("&")
        ),
    ))
}

/// Returns a lease in this process's store for the server at `url`.
#[cfg(any(feature = "etcd", feature = "postgres", feature = "redis"))]
fn in_store(
    url: &str,
    server_parts: usize,
    open: fn(&str) -> Result<Arc<dyn LeaseStore>>,
) -> Result<Location> {
    static STORES: ProcessLocal<Mutex<HashMap<String, Weak<dyn LeaseStore>>>> = ProcessLocal::new();
    let (name, server) = split(url, server_parts)?;
    let mut stores = STORES.get_or_make(Mutex::default).lock();
    if let Some(store) = stores.get(&server).and_then(Weak::upgrade) {
        return Ok(Location::Store(store, name));
    }
    stores.retain(|_, store| store.strong_count() > 0);
    let store = open(&server)?;
    stores.insert(server, Arc::downgrade(&store));
    Ok(Location::Store(store, name))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::base::error::ErrorKind;

    fn file(url: &str) -> Option<PathBuf> {
        match locate(url) {
            Ok(Location::File(path)) => Some(path),
            _ => None,
        }
    }

    #[test]
    fn locate_file_url_decodes_absolute_path() {
        let root = if cfg!(windows) { "C:/" } else { "" };
        assert_eq!(
            file(&format!("file:///{root}srv/a%20b")),
            Some(format!("{}/srv/a b", root.trim_end_matches('/')).into())
        );
        let leader = format!("{}/srv/leader", root.trim_end_matches('/'));
        assert_eq!(
            file(&format!("FILE://localhost/{root}srv/leader")),
            Some(leader.into())
        );
        for wrong in [
            "file://elsewhere/srv",
            "file://",
            "file:///a%2",
            "file:///a%zz",
            "/srv/leader",
            "ftp://a/b",
        ] {
            let error = locate(wrong).err().unwrap();
            assert!(
                matches!(error.kind(), ErrorKind::InvalidUrl { .. }),
                "{error}"
            );
        }
    }

    #[test]
    fn locate_invalid_url_error_hides_password() {
        let error = locate("ftp://me:secret@host/b?password=hidden")
            .err()
            .unwrap()
            .to_string();
        assert!(
            error.contains("ftp://host/b")
                && !error.contains("secret")
                && !error.contains("hidden"),
            "{error}"
        );
        for url in [
            "ftp://:se?cret@host/x",
            "ftp://me:se#cret@host/x",
            "ftp://me:s@se?cret@host",
        ] {
            let error = invalid(url, "\"cret@host\" is no parameter").to_string();
            assert!(
                !error.contains("se?") && !error.contains("/se") && !error.contains("cret"),
                "{error}"
            );
        }
    }

    #[cfg(any(feature = "etcd", feature = "postgres", feature = "redis"))]
    #[test]
    fn split_url_takes_name_from_path_or_parameter() {
        let both = |url, server_parts| split(url, server_parts).map_err(|error| error.to_string());
        let pair = |name: &str, server: &str| Ok((name.to_owned(), server.to_owned()));
        assert_eq!(
            both("etcd://a:1,b:2/x/y%20z", 0),
            pair("x/y z", "etcd://a:1,b:2")
        );
        assert_eq!(both("etcd://a/x?ca=/p", 0), pair("x", "etcd://a?ca=/p"));
        assert_eq!(
            both("postgres://u:p@h/db?lease=n&sslmode=require", 1),
            pair("n", "postgres://u:p@h/db?sslmode=require")
        );
        assert_eq!(both("postgres://h/db/n", 1), pair("n", "postgres://h/db"));
        assert_eq!(both("redis://h/2/n", 1), pair("n", "redis://h/2"));
        assert_eq!(both("redis://h/me%40here", 0), pair("me@here", "redis://h"));
        assert_eq!(
            both("redis+unix:///run/a@b?lease=n", usize::MAX),
            pair("n", "redis+unix:///run/a@b")
        );
        for wrong in [
            "etcd://a",
            "etcd://a/",
            "etcd://a/x?lease=y",
            "etcd://a/%ff",
        ] {
            assert!(both(wrong, 0).is_err(), "{wrong}");
        }
        for leaky in [
            "etcd://u:pa/ss@h/x",
            "redis://:pa/ss@h/x",
            "etcd://u:12/ss@h/x",
            "postgres://u:pa/ss@h/db/x",
        ] {
            let error = both(leaky, 0).unwrap_err();
            assert!(
                error.contains("%2F")
                    && ["ss@", "u:", ":pa", "12"]
                        .iter()
                        .all(|part| !error.contains(part)),
                "{error}"
            );
        }
    }
}
