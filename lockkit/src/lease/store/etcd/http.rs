//! HTTP/1.1 as far as etcd's gateway speaks it: a request with a length, an answer in pieces, over TCP or TLS.
//!
//! No call waits past the request's deadline: each read and write sets the socket's own timeout to the time that is
//! left. A watch reads its answer piece by piece, with a timeout for each piece. The caller learns whether a failure
//! came before any part of the request was sent ([`Connection::open`]), or after.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt::{set_socket_keepalive, set_tcp_keepcnt, set_tcp_keepidle, set_tcp_keepintvl};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};

use crate::lease::store::lease_store::Deadline;
use crate::lease::store::server::addresses;

/// The maximum length of a piece of an answer, and of a head.
const LONGEST_PIECE: usize = 64 << 20;
const MOST_HEADERS: usize = 64;
/// How long a peer is silent before TCP probes it, and how often in a row TCP probes.
const SILENT: Duration = Duration::from_secs(5);
const MOST_PROBES: u32 = 3;

/// A socket whose calls last until `by` at most.
struct Socket {
    tcp: TcpStream,
    by: Deadline,
}

impl Socket {
    /// Returns the time that is left; an error if there is none.
    fn left(&self) -> io::Result<Option<Duration>> {
        match self.by.remaining() {
            Duration::ZERO => Err(ErrorKind::TimedOut.into()),
            left => Ok(Some(left)),
        }
    }
}

/// Converts `WouldBlock`, by which a socket reports its timeout, to `TimedOut`.
fn timed(error: io::Error) -> io::Error {
    if error.kind() == ErrorKind::WouldBlock { ErrorKind::TimedOut.into() } else { error }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.tcp.set_read_timeout(self.left()?)?;
        self.tcp.read(buffer).map_err(timed)
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tcp.set_write_timeout(self.left()?)?;
        self.tcp.write(bytes).map_err(timed)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.tcp.flush()
    }
}

enum Stream {
    Plain(Socket),
    Tls(Box<StreamOwned<ClientConnection, Socket>>),
}

impl Stream {
    fn until(&mut self, by: Deadline) {
        match self {
            Self::Plain(socket) => socket.by = by,
            Self::Tls(stream) => stream.sock.by = by,
        }
    }

    fn io(&mut self) -> &mut dyn ReadWrite {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => &mut **stream,
        }
    }
}

trait ReadWrite: Read + Write {}
impl<T: Read + Write> ReadWrite for T {}

/// The way in which an answer ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Framing {
    /// After so many more bytes.
    Length(usize),
    Chunked,
    /// When the server closes.
    Close,
}

/// A connection for one request at a time.
pub(super) struct Connection {
    stream: Stream,
    host: Arc<str>,
    /// The bytes that have arrived and are not used yet.
    input: Vec<u8>,
    framing: Framing,
}

impl Connection {
    /// Connects to `host:port`, and with `tls` performs the handshake. Whatever fails here, no request has been sent.
    pub(super) fn open(host: &Arc<str>, port: u16, tls: Option<&Arc<ClientConfig>>, by: Deadline) -> io::Result<Self> {
        let tcp = dial(host, port, by)?;
        tcp.set_nodelay(true)?;
        set_socket_keepalive(&tcp, true)?;
        set_tcp_keepidle(&tcp, SILENT)?;
        set_tcp_keepintvl(&tcp, SILENT)?;
        set_tcp_keepcnt(&tcp, MOST_PROBES)?;
        let mut socket = Socket { tcp, by };
        let stream = match tls {
            None => Stream::Plain(socket),
            Some(config) => {
                let bare = host.trim_start_matches('[').trim_end_matches(']').to_owned();
                let name =
                    ServerName::try_from(bare).map_err(|error| io::Error::new(ErrorKind::InvalidInput, error))?;
                let mut tls = ClientConnection::new(config.clone(), name).map_err(io::Error::other)?;
                while tls.is_handshaking() {
                    tls.complete_io(&mut socket)?;
                }
                Stream::Tls(Box::new(StreamOwned::new(tls, socket)))
            }
        };
        let authority = format!("{host}:{port}").into();
        Ok(Self { stream, host: authority, input: Vec::new(), framing: Framing::Length(0) })
    }

    /// Sends a request and returns the status of its answer; [`piece`](Self::piece) reads the body. Without a body the
    /// request is a GET.
    pub(super) fn begin(
        &mut self,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&[u8]>,
        by: Deadline,
    ) -> io::Result<u16> {
        self.stream.until(by);
        let method = if body.is_some() { "POST" } else { "GET" };
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: {}\r\n", self.host).into_bytes();
        for (name, value) in headers {
            write!(request, "{name}: {value}\r\n")?;
        }
        let body = body.unwrap_or_default();
        write!(request, "Content-Length: {}\r\n\r\n", body.len())?;
        request.extend_from_slice(body);
        self.stream.io().write_all(&request)?;
        self.stream.io().flush()?;
        self.read_head()
    }

    /// Sends a request and returns the status and the whole body.
    pub(super) fn ask(
        &mut self,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&[u8]>,
        by: Deadline,
    ) -> io::Result<(u16, Vec<u8>)> {
        let status = self.begin(path, headers, body, by)?;
        let mut whole = Vec::new();
        while let Some(piece) = self.piece(by)? {
            whole.extend_from_slice(&piece);
            if whole.len() > LONGEST_PIECE {
                return Err(garbled("an answer without end"));
            }
        }
        Ok((status, whole))
    }

    fn read_head(&mut self) -> io::Result<u16> {
        loop {
            let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
            let mut head = httparse::Response::new(&mut headers);
            let httparse::Status::Complete(length) = head.parse(&self.input).map_err(garbled)? else {
                self.fill()?;
                continue;
            };
            let status = head.code.unwrap_or_default();
            let value = |name: &str| {
                let header = head.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name))?;
                std::str::from_utf8(header.value).ok()
            };
            let is_chunked = value("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked"));
            let announced = value("content-length").map(|length| length.trim().parse().map_err(garbled)).transpose()?;
            let framing = match announced {
                _ if is_chunked => Framing::Chunked,
                Some(length) => Framing::Length(length),
                None => Framing::Close,
            };
            self.input.drain(..length);
            // An interim answer, such as 100, has no body.
            if status >= 200 {
                self.framing = framing;
                return Ok(status);
            }
        }
    }

    /// Returns the next piece of the body, in whole chunks if the server sends chunks; `None` at the end. After a
    /// timeout the caller can wait for the same piece again.
    pub(super) fn piece(&mut self, by: Deadline) -> io::Result<Option<Vec<u8>>> {
        self.stream.until(by);
        loop {
            match self.framing {
                Framing::Length(0) => return Ok(None),
                Framing::Length(left) if !self.input.is_empty() => {
                    let piece: Vec<u8> = self.input.drain(..left.min(self.input.len())).collect();
                    self.framing = Framing::Length(left - piece.len());
                    return Ok(Some(piece));
                }
                Framing::Chunked => {
                    let size =
                        httparse::parse_chunk_size(&self.input).map_err(|_| garbled("a chunk without a size"))?;
                    match size {
                        httparse::Status::Complete((from, 0)) => {
                            // Trailers end with an empty line and are ignored.
                            let rest = &self.input[from..];
                            let end = if rest.starts_with(b"\r\n") {
                                Some(2)
                            } else {
                                rest.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4)
                            };
                            if let Some(end) = end {
                                self.input.drain(..from + end);
                                self.framing = Framing::Length(0);
                                continue;
                            }
                        }
                        httparse::Status::Complete((from, size)) => {
                            let size = usize::try_from(size).ok().filter(|size| *size <= LONGEST_PIECE);
                            let to = from + size.ok_or_else(|| garbled("a chunk without end"))?;
                            if self.input.len() >= to + 2 {
                                let piece = self.input[from..to].to_vec();
                                self.input.drain(..to + 2);
                                return Ok(Some(piece));
                            }
                        }
                        httparse::Status::Partial => {}
                    }
                }
                Framing::Close if !self.input.is_empty() => return Ok(Some(std::mem::take(&mut self.input))),
                Framing::Length(_) | Framing::Close => {}
            }
            match self.fill() {
                Err(error) if error.kind() == ErrorKind::UnexpectedEof && self.framing == Framing::Close => {
                    self.framing = Framing::Length(0);
                }
                filled => filled?,
            }
        }
    }

    fn fill(&mut self) -> io::Result<()> {
        if self.input.len() > LONGEST_PIECE {
            return Err(garbled("a line without end"));
        }
        let mut buffer = [0; 16 << 10];
        loop {
            match self.stream.io().read(&mut buffer) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    self.input.extend_from_slice(&buffer[..count]);
                    return Ok(());
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn garbled(what: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

/// Connects to the first of the host's addresses that answers.
fn dial(host: &Arc<str>, port: u16, by: Deadline) -> io::Result<TcpStream> {
    let addresses = addresses(host, port, by)?;
    let mut failure = ErrorKind::NotFound.into();
    for (at, address) in addresses.iter().enumerate() {
        // A silent address leaves the others their part of the time.
        let left = by.remaining() / u32::try_from(addresses.len() - at).unwrap_or(u32::MAX);
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        match TcpStream::connect_timeout(address, left) {
            Ok(tcp) => return Ok(tcp),
            Err(error) => failure = timed(error),
        }
    }
    Err(failure)
}
