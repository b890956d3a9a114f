//! Drills for leases on servers: everything that can befall the server, the connection or the holder, with real ones.
//!
//! An engine comes to its drills by an [`Engine`], which starts its servers, and a line `drills!(module, Type);` in a
//! file of `tests/tests`. Each drill starts a server of its own, on what is installed; where nothing is, it prints
//! `left out:` and why, and passes.
//!
//! What befalls a connection comes out of a [`Proxy`] between the client and the server, which counts what it passes
//! on and cuts connections wherever it is told to.

pub mod postgres;
mod proxy;
pub mod redis;

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lockkit::{CancelToken, Lease, LeaseStatus, Wait};
pub use proxy::{Direction, Proxy};
use rustix::process::Signal;

use crate::leases::Terms;
use crate::{Actor, LIVELY, chaos, leases, sleeps, thread_id, until};

/// A server of an engine, for one drill. What it keeps outlasts a kill and a restart.
pub trait Engine: Sized {
    /// A ttl that is over soon, yet not so soon that a busy machine loses it, in milliseconds. At least what the store
    /// can keep.
    const TTL: u64 = 1000;

    /// Answers one connection as a version of the engine that is too old, up to where it shows.
    const OLD: Option<fn(TcpStream)> = None;

    /// Starts a server on 127.0.0.1 that clients have to come to in this way, with the clock of its machine, or the one
    /// that is given.
    ///
    /// # Errors
    /// What this machine lacks.
    fn start(security: &Security, clock: Option<&Clock>) -> Result<Self, String>;

    /// The port on which it listens, before and after a restart.
    fn port(&self) -> u16;

    /// The URL of a lease of this name on a server of this kind that listens on 127.0.0.1 at `port`, for a client that
    /// comes with `access`; `None` where the engine has nothing of that sort.
    fn url(&self, port: u16, access: Access, name: &str) -> Option<String>;

    /// Sends a signal to all its processes.
    fn signal(&self, signal: Signal);

    /// Kills it, if it runs, and waits until it is gone.
    fn kill(&mut self);

    /// Starts it again with what it has kept.
    fn restart(&mut self);

    /// Whether what becomes of a lease depends on the wall clock of the server.
    fn goes_by_a_wall_clock() -> bool {
        false
    }
}

/// What a server asks of its clients.
#[derive(Debug)]
pub enum Security {
    /// Nothing.
    None,
    /// The password [`PASSWORD`], for the engine's usual user or the one of [`USER`].
    Password,
    /// That they speak TLS. They need no certificate.
    Tls(Certificates),
    /// That they speak TLS and have a certificate.
    ClientCertificate(Certificates),
}

/// The password of servers that ask for one.
pub const PASSWORD: &str = "open-sesame";
/// The user to whom it belongs, where the engine's usual one has none.
pub const USER: &str = "ali";

/// With what a client comes.
#[derive(Clone, Copy, Debug)]
pub enum Access<'s> {
    /// With all that the server asks for.
    Right(&'s Security),
    /// With another password.
    WrongPassword,
    /// With the right password, or none, for a database that is not there.
    WrongDatabase,
    /// Over TLS, trusting the authority in this file, and without a certificate of its own.
    Tls(&'s Path),
}

/// Certificates, made for one drill.
#[derive(Debug)]
pub struct Certificates(tempfile::TempDir);

impl Certificates {
    /// An authority, and what it has signed for a server at 127.0.0.1 and localhost and for a client.
    ///
    /// # Errors
    /// Where there is no openssl(1).
    pub fn new() -> Result<Self, String> {
        let openssl = crate::servers::installed(&["openssl"])?;
        let folder = tempfile::tempdir().expect("a folder");
        // Servers that run as other users read them, too.
        std::fs::set_permissions(&folder, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("a folder");
        let script = "
            exec 2>openssl.log
            authority() {
                $0 req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj \"/O=lockkit $1\" \
                    -addext basicConstraints=critical,CA:TRUE -keyout $1.key -out $1.pem
            }
            signed() {
                $0 req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj \"/O=lockkit $1\" \
                    -keyout $1.key -out $1.csr
                printf \"subjectAltName=DNS:localhost,IP:127.0.0.1\\nextendedKeyUsage=$2\\n\" >$1.ext
                $0 x509 -req -in $1.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile $1.ext -out $1.pem
            }
            authority ca; authority stranger; signed server serverAuth; signed client clientAuth; chmod 644 *";
        let made = Command::new("sh").args(["-ec", script]).arg(openssl).current_dir(&folder).status();
        assert!(made.is_ok_and(|status| status.success()), "openssl failed in {}", folder.keep().display());
        Ok(Self(folder))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The authority's certificate.
    pub fn ca(&self) -> PathBuf {
        self.file("ca.pem")
    }

    /// That of an authority which has signed nothing here.
    pub fn stranger(&self) -> PathBuf {
        self.file("stranger.pem")
    }

    /// The server's certificate and key.
    pub fn server(&self) -> [PathBuf; 2] {
        ["server.pem", "server.key"].map(|name| self.file(name))
    }

    /// A client's certificate and key.
    pub fn client(&self) -> [PathBuf; 2] {
        ["client.pem", "client.key"].map(|name| self.file(name))
    }
}

/// A wall clock that a drill steps, for the programs that are started with its [`variables`](Self::variables).
pub struct Clock {
    offset: tempfile::NamedTempFile,
    library: PathBuf,
}

impl Clock {
    /// One that shows the time.
    ///
    /// # Errors
    /// Where there is no libfaketime.
    pub fn new() -> Result<Self, String> {
        let folders = std::fs::read_dir("/usr/lib").into_iter().flatten().flatten().map(|entry| entry.path());
        let found = folders.map(|folder| folder.join("faketime/libfaketimeMT.so.1")).find(|path| path.is_file());
        let library = found.ok_or("libfaketime is not installed")?;
        let offset = tempfile::NamedTempFile::new().expect("a file");
        std::fs::set_permissions(&offset, std::os::unix::fs::PermissionsExt::from_mode(0o644)).expect("a file");
        let clock = Self { offset, library };
        clock.set(0);
        Ok(clock)
    }

    /// So many seconds ahead of the time from now on.
    pub fn set(&self, seconds: i64) {
        std::fs::write(&self.offset, format!("{seconds:+}s\n")).expect("room");
    }

    /// What must stand in the environment of a program that goes by this clock.
    pub fn variables(&self) -> [(&'static str, PathBuf); 4] {
        [
            ("LD_PRELOAD", self.library.clone()),
            ("FAKETIME_TIMESTAMP_FILE", self.offset.path().to_owned()),
            ("FAKETIME_NO_CACHE", "1".into()),
            // A server's own waits are not to be stepped.
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".into()),
        ]
    }
}

/// Makes a module `$module` with a test for every drill, for one [`Engine`].
#[macro_export]
macro_rules! drills {
    ($module:ident, $engine:ty) => {
        $crate::drills!($module, $engine;
            a_killed_holder_of_this_host_is_taken_over_at_once,
        );
    };
    ($module:ident, $engine:ty; $($drill:ident,)*) => {
        mod $module {
            $(#[test]
            fn $drill() {
                if let Err(why) = $crate::engines::$drill::<$engine>() {
                    println!("left out: {why}");
                }
            })*
        }
    };
}

/// A server that is gone with the drill, and the way there.
struct Arena<E> {
    security: Security,
    server: E,
}

impl<E: Engine> Arena<E> {
    fn open() -> Result<Self, String> {
        Self::with(Security::None)
    }

    fn with(security: Security) -> Result<Self, String> {
        Ok(Self { server: E::start(&security, None)?, security })
    }

    /// The terms of a lease that only this drill uses, with the engine's short ttl.
    fn terms(&self) -> Terms {
        self.terms_through(self.server.port())
    }

    fn terms_through(&self, port: u16) -> Terms {
        let access = Access::Right(&self.security);
        let url = self.server.url(port, access, "drill").expect("the right way is always there");
        Terms { ttl: E::TTL, heartbeat: E::TTL / 10, ..Terms::of(url) }
    }

    /// As [`terms`](Self::terms), with a ttl that does not pass while anybody is waited for here.
    fn long_terms(&self) -> Terms {
        lasting(self.terms())
    }
}

/// With a ttl that does not pass while anybody is waited for here.
fn lasting(terms: Terms) -> Terms {
    Terms { ttl: 10 * LIVELY.as_millis() as u64, heartbeat: 1000, ..terms }
}

type Drill = Result<(), String>;

/// The token of an answer `held TOKEN …`, and what follows it.
fn held(answer: &str) -> (u64, &str) {
    let rest = answer.strip_prefix("held ").unwrap_or_else(|| panic!("{answer}"));
    let (token, rest) = rest.split_once(' ').unwrap_or((rest, ""));
    (token.parse().expect("a token"), rest)
}

#[allow(missing_docs, clippy::missing_errors_doc)] // Their names are sentences; an error is why one is left out.
mod cases {
    use super::*;

    pub fn a_killed_holder_of_this_host_is_taken_over_at_once<E: Engine>() -> Drill {
        let arena = Arena::<E>::open()?;
        let terms = arena.long_terms();
        let (mut holder, mut next) = (Actor::start_lease(&terms), Actor::start_lease(&terms));
        let (first, _) = held(&holder.ask("try"));
        next.tell_to_wait("lock");
        holder.kill();
        let answer = next.answer();
        let (token, told) = held(&answer);
        assert!(token > first);
        assert_eq!(told, format!("recovered {}", holder.pid()));
        Ok(())
    }
}
pub use cases::*;
