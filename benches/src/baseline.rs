//! The minimum cost of a lease on a server: only its requests, by the engine's plain client on open
//! connections.
//!
//! The requests give other processes the same guarantees as ours. An acquisition succeeds if the
//! name is free or its claim has expired, and returns a token that grows. A renewal extends the
//! claim. A release frees the name and wakes the waiters. Renewal and release take effect only if
//! the name still belongs to this claim. But no claim id distinguishes a repeated request from a
//! new one. No record names the holder or its death. No wait has a limit. Only the waiting thread
//! listens.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use postgres::fallible_iterator::FallibleIterator;
use postgres::{Client, NoTls, Statement};
use redis::{Connection, PubSub, Script};

/// A client that acquires a name by bare requests. All its methods panic when the server refuses.
pub trait BaselineClient: Send {
    /// Sends one request, and returns whether the name is granted.
    fn acquire(&mut self) -> bool;
    /// Extends the held name by another TTL.
    fn renew(&mut self);
    /// Releases the held name.
    fn release(&mut self);
    /// Subscribes to releases, on a connection of its own.
    fn listen(&mut self);
    /// Requests the name. While another client holds it, waits for the notification of a release
    /// and requests again.
    fn wait(&mut self);
}

/// The TTL of a name, in microseconds.
const TTL: u32 = 30_000_000;

/// Returns a claim id that differs from all others.
fn claim() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!(
        "{:016x}{:016x}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    )
}

/// On Redis: three scripts, and a channel.
pub struct Redis {
    port: u16,
    connection: Connection,
    scripts: [Script; 3],
    name: String,
    claim: String,
    token: u64,
    subscription: Option<PubSub<'static>>,
}

impl Redis {
    /// Creates a client for this name on the server at this port.
    ///
    /// # Panics
    /// If the server cannot be reached.
    pub fn new(port: u16, name: &str) -> Self {
        let scripts = [
            "local time = redis.call('TIME') local now = time[1] * 1000000 + time[2]
             local record = redis.call('HMGET', KEYS[1], 'token', 'claim', 'until')
             if record[2] and record[2] ~= '' and tonumber(record[3]) > now then return false end
             local token = string.format('%.0f', math.max(tonumber(record[1] or '0') + 1, now))
             redis.call('HSET', KEYS[1], 'token', token, 'claim', ARGV[1],
                 'until', string.format('%.0f', now + ARGV[2]))
             return token",
            "local record = redis.call('HMGET', KEYS[1], 'token', 'claim')
             if record[1] ~= ARGV[2] or record[2] ~= ARGV[1] then return false end
             local time = redis.call('TIME')
             redis.call('HSET', KEYS[1], 'until', string.format('%.0f', time[1] * 1000000 + time[2] + ARGV[3]))
             return 1",
            "local record = redis.call('HMGET', KEYS[1], 'token', 'claim')
             if record[1] ~= ARGV[2] or record[2] ~= ARGV[1] then return false end
             redis.call('HSET', KEYS[1], 'claim', '')
             redis.call('PUBLISH', KEYS[1], '')
             return 1",
        ];
        let (scripts, name) = (scripts.map(Script::new), format!("bare:{{{name}}}"));
        Self {
            port,
            connection: redis_at(port),
            scripts,
            name,
            claim: claim(),
            token: 0,
            subscription: None,
        }
    }
}

fn redis_at(port: u16) -> Connection {
    let client = redis::Client::open((Ipv4Addr::LOCALHOST.to_string(), port)).expect("an address");
    client.get_connection().expect("it runs")
}

impl BaselineClient for Redis {
    fn acquire(&mut self) -> bool {
        let mut call = self.scripts[0].key(&self.name);
        let token: Option<u64> = call
            .arg(&self.claim)
            .arg(TTL)
            .invoke(&mut self.connection)
            .expect("it answers");
        self.token = token.unwrap_or(self.token);
        token.is_some()
    }

    fn renew(&mut self) {
        let mut call = self.scripts[1].key(&self.name);
        let done = call
            .arg(&self.claim)
            .arg(self.token)
            .arg(TTL)
            .invoke::<Option<u8>>(&mut self.connection);
        done.expect("it answers").expect("it is held");
    }

    fn release(&mut self) {
        let mut call = self.scripts[2].key(&self.name);
        let done = call
            .arg(&self.claim)
            .arg(self.token)
            .invoke::<Option<u8>>(&mut self.connection);
        done.expect("it answers").expect("it is held");
    }

    fn listen(&mut self) {
        // The connection lives as long as the program runs.
        let mut subscription = Box::leak(Box::new(redis_at(self.port))).as_pubsub();
        subscription.subscribe(&self.name).expect("it answers");
        self.subscription = Some(subscription);
    }

    fn wait(&mut self) {
        while !self.acquire() {
            self.subscription
                .as_mut()
                .expect("it listens")
                .get_message()
                .expect("it runs");
        }
    }
}

/// On PostgreSQL: a row, four statements and a notification.
pub struct Postgres {
    client: Client,
    statements: [Statement; 4],
    name: String,
    claim: String,
    token: i64,
}

impl Postgres {
    /// Creates a client for this name on the server at this port.
    ///
    /// # Panics
    /// If the server cannot be reached.
    pub fn new(port: u16, name: &str) -> Self {
        let url = format!("postgres://postgres@127.0.0.1:{port}/postgres");
        let mut client = Client::connect(&url, NoTls).expect("it runs");
        let table = "CREATE TABLE IF NOT EXISTS bare (name text PRIMARY KEY, token bigint NOT NULL, \
                     claim text, until timestamptz NOT NULL, waited boolean NOT NULL) WITH (fillfactor = 50)";
        // Of several concurrent attempts, one creates the table.
        while client.batch_execute(table).is_err() {}
        let statements = [
            "INSERT INTO bare AS b (name, token, claim, until, waited) \
             VALUES ($1, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, $2, \
             clock_timestamp() + $3 * interval '1 microsecond', false) ON CONFLICT (name) DO UPDATE SET \
             token = greatest(b.token + 1, excluded.token), claim = excluded.claim, until = excluded.until, \
             waited = false WHERE b.claim IS NULL OR b.until <= clock_timestamp() RETURNING token",
            "UPDATE bare SET until = clock_timestamp() + $4 * interval '1 microsecond' \
             WHERE name = $1 AND claim = $2 AND token = $3",
            "UPDATE bare SET claim = NULL WHERE name = $1 AND claim = $2 AND token = $3 \
             RETURNING CASE WHEN waited THEN pg_notify('bare', name) END",
            "UPDATE bare SET waited = true WHERE name = $1 AND claim IS NOT NULL",
        ];
        let statements = statements.map(|text| client.prepare(text).expect("a statement"));
        Self {
            client,
            statements,
            name: name.to_owned(),
            claim: claim(),
            token: 0,
        }
    }
}

impl BaselineClient for Postgres {
    fn acquire(&mut self) -> bool {
        let rows = self.client.query(
            &self.statements[0],
            &[&self.name, &self.claim, &f64::from(TTL)],
        );
        let rows = rows.expect("it answers");
        self.token = rows.first().map_or(self.token, |row| row.get(0));
        !rows.is_empty()
    }

    fn renew(&mut self) {
        let values: [&(dyn postgres::types::ToSql + Sync); 4] =
            [&self.name, &self.claim, &self.token, &f64::from(TTL)];
        assert_eq!(
            self.client
                .execute(&self.statements[1], &values)
                .expect("it answers"),
            1,
            "it is held"
        );
    }

    fn release(&mut self) {
        let rows = self
            .client
            .query(&self.statements[2], &[&self.name, &self.claim, &self.token]);
        assert_eq!(rows.expect("it answers").len(), 1, "it is held");
    }

    fn listen(&mut self) {
        self.client
            .batch_execute("LISTEN bare")
            .expect("it answers");
    }

    fn wait(&mut self) {
        while !self.acquire() {
            // Without this statement a release sends no notification.
            if self
                .client
                .execute(&self.statements[3], &[&self.name])
                .expect("it answers")
                == 1
            {
                self.client
                    .notifications()
                    .blocking_iter()
                    .next()
                    .expect("it runs");
            }
        }
    }
}

/// On etcd: two transactions of one key, attached to a lease that stays, and a watch from the
/// present revision.
pub struct Etcd {
    gateway: Gateway,
    port: u16,
    session: String,
    key: String,
    claim: String,
    revision: String,
    subscription: Option<Gateway>,
}

impl Etcd {
    /// Creates a client for this name on the server at this port.
    ///
    /// # Panics
    /// If the server cannot be reached.
    pub fn new(port: u16, name: &str) -> Self {
        let mut gateway = Gateway::open(port);
        let session = field(&gateway.ask("lease/grant", r#"{"TTL":"600"}"#), "ID").to_owned();
        let [key, claim] = [format!("bare/{name}"), claim()].map(|text| STANDARD.encode(text));
        Self {
            gateway,
            port,
            session,
            key,
            claim,
            revision: String::new(),
            subscription: None,
        }
    }
}

impl BaselineClient for Etcd {
    fn acquire(&mut self) -> bool {
        let Self {
            key,
            claim,
            session,
            ..
        } = self;
        let body = format!(
            r#"{{"compare":[{{"key":"{key}","target":"CREATE","create_revision":"0"}}],"success":[{{"request_put":{{"key":"{key}","value":"{claim}","lease":"{session}"}}}}],"failure":[{{"request_range":{{"key":"{key}"}}}}]}}"#
        );
        let answer = self.gateway.ask("kv/txn", &body);
        field(&answer, "revision").clone_into(&mut self.revision);
        answer.contains(r#""succeeded":true"#)
    }

    fn renew(&mut self) {
        let answer = self.gateway.ask(
            "lease/keepalive",
            &format!(r#"{{"ID":"{}"}}"#, self.session),
        );
        assert_eq!(field(&answer, "TTL"), "600", "it is there");
    }

    fn release(&mut self) {
        let Self { key, revision, .. } = self;
        let body = format!(
            r#"{{"compare":[{{"key":"{key}","target":"MOD","mod_revision":"{revision}"}}],"success":[{{"request_delete_range":{{"key":"{key}"}}}}]}}"#
        );
        assert!(
            self.gateway
                .ask("kv/txn", &body)
                .contains(r#""succeeded":true"#),
            "it is held"
        );
    }

    fn listen(&mut self) {
        let mut watch = Gateway::open(self.port);
        watch.send(
            "watch",
            &format!(
                r#"{{"create_request":{{"key":"{}","filters":["NOPUT"]}}}}"#,
                self.key
            ),
        );
        assert!(
            watch.head() == Body::Chunks && watch.chunk().contains(r#""created":true"#),
            "it watches"
        );
        self.subscription = Some(watch);
    }

    fn wait(&mut self) {
        while !self.acquire() {
            self.subscription.as_mut().expect("it listens").chunk();
        }
    }
}

/// A connection to the JSON gateway of etcd.
pub struct Gateway {
    stream: BufReader<TcpStream>,
}

/// The framing of an answer's body.
#[derive(PartialEq, Eq)]
enum Body {
    Chunks,
    Bytes(usize),
}

impl Gateway {
    /// Connects.
    ///
    /// # Panics
    /// If the gateway cannot be reached.
    pub fn open(port: u16) -> Self {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("it runs");
        stream.set_nodelay(true).expect("a connection");
        Self {
            stream: BufReader::new(stream),
        }
    }

    /// Sends a request and returns its answer.
    ///
    /// # Panics
    /// If no answer arrives.
    pub fn ask(&mut self, path: &str, body: &str) -> String {
        self.send(path, body);
        match self.head() {
            Body::Bytes(length) => self.bytes(length),
            Body::Chunks => {
                let mut answer = String::new();
                loop {
                    match self.chunk() {
                        chunk if chunk.is_empty() => return answer,
                        chunk => answer += &chunk,
                    }
                }
            }
        }
    }

    fn send(&mut self, path: &str, body: &str) {
        let length = body.len();
        let request = format!(
            "POST /v3/{path} HTTP/1.1\r\nHost: etcd\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        self.stream
            .get_mut()
            .write_all(request.as_bytes())
            .expect("it runs");
    }

    fn head(&mut self) -> Body {
        let mut body = Body::Bytes(0);
        loop {
            let line = self.line().to_ascii_lowercase();
            match line.split_once(": ") {
                Some(("content-length", length)) => {
                    body = Body::Bytes(length.parse().expect("a length"))
                }
                Some(("transfer-encoding", _)) => body = Body::Chunks,
                _ if line.is_empty() => return body,
                _ => {}
            }
        }
    }

    /// Reads the next chunk; the last chunk is empty.
    fn chunk(&mut self) -> String {
        let length = usize::from_str_radix(&self.line(), 16).expect("a length");
        let chunk = self.bytes(length);
        // After the last chunk come trailing headers, if any.
        while !self.line().is_empty() {}
        chunk
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        assert!(
            self.stream.read_line(&mut line).expect("it runs") > 0,
            "it answers"
        );
        line.trim_end().to_owned()
    }

    fn bytes(&mut self, length: usize) -> String {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes).expect("it runs");
        String::from_utf8(bytes).expect("JSON")
    }
}

/// Returns the value of a text field in an answer.
///
/// # Panics
/// If the field is missing.
pub fn field<'a>(answer: &'a str, name: &str) -> &'a str {
    let rest = answer
        .split_once(&format!("\"{name}\":\""))
        .map(|(_, rest)| rest);
    rest.and_then(|rest| rest.split('"').next())
        .unwrap_or_else(|| panic!("no {name} in {answer}"))
}
