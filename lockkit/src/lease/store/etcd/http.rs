//! HTTP/1.1 as far as etcd's gateway speaks it: a request with a length, an answer in pieces, over
//! TCP or TLS.
//!
//! No call waits past the request's deadline: each read and write sets the socket's own timeout to
//! the time that is left. A watch reads its answer piece by piece, with a timeout for each piece.
//! The caller learns whether a failure came before any part of the request was sent
//! ([`Connection::open`]), or after.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt::{
    set_socket_keepalive, set_tcp_keepcnt, set_tcp_keepidle, set_tcp_keepintvl,
};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};

use crate::lease::store::lease_store::Deadline;
use crate::lease::store::server::{addresses, equal_part};

/// The maximum length of an answer, of a piece of a watch, and of a head, in bytes.
const MAX_PIECE_LENGTH: usize = 64 << 20;
const MAX_HEADERS: usize = 64;
/// How long a peer is silent before TCP probes it, and how often in a row TCP probes.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const MAX_KEEPALIVE_PROBES: u32 = 3;

/// A socket whose calls last until `by` at most.
struct Socket {
    tcp: TcpStream,
    by: Deadline,
}

impl Socket {
    /// Returns the time that is left; an error if there is none.
    fn remaining(&self) -> io::Result<Option<Duration>> {
        match self.by.remaining() {
            Duration::ZERO => Err(ErrorKind::TimedOut.into()),
            remaining => Ok(Some(remaining)),
        }
    }
}

/// Converts `WouldBlock`, by which a socket reports its timeout, to `TimedOut`.
fn map_timeout(error: io::Error) -> io::Error {
    if error.kind() == ErrorKind::WouldBlock {
        ErrorKind::TimedOut.into()
    } else {
        error
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.tcp.set_read_timeout(self.remaining()?)?;
        self.tcp.read(buffer).map_err(map_timeout)
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tcp.set_write_timeout(self.remaining()?)?;
        self.tcp.write(bytes).map_err(map_timeout)
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
    fn set_deadline(&mut self, by: Deadline) {
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
    /// Connects to `host:port`, and with `tls` performs the handshake. Whatever fails here, no
    /// request has been sent.
    pub(super) fn open(
        host: &Arc<str>,
        port: u16,
        tls: Option<&Arc<ClientConfig>>,
        by: Deadline,
    ) -> io::Result<Self> {
        let tcp = connect(host, port, by)?;
        tcp.set_nodelay(true)?;
        set_socket_keepalive(&tcp, true)?;
        set_tcp_keepidle(&tcp, KEEPALIVE_INTERVAL)?;
        set_tcp_keepintvl(&tcp, KEEPALIVE_INTERVAL)?;
        set_tcp_keepcnt(&tcp, MAX_KEEPALIVE_PROBES)?;
        let mut socket = Socket { tcp, by };
        let stream = match tls {
            None => Stream::Plain(socket),
            Some(config) => {
                let server_name = host
                    .trim_start_matches('[')
                    .trim_end_matches(']')
                    .to_owned();
                let name = ServerName::try_from(server_name)
                    .map_err(|error| io::Error::new(ErrorKind::InvalidInput, error))?;
                let mut tls =
                    ClientConnection::new(config.clone(), name).map_err(io::Error::other)?;
                while tls.is_handshaking() {
                    tls.complete_io(&mut socket)?;
                }
                Stream::Tls(Box::new(StreamOwned::new(tls, socket)))
            }
        };
        let authority = format!("{host}:{port}").into();
        Ok(Self {
            stream,
            host: authority,
            input: Vec::new(),
            framing: Framing::Length(0),
        })
    }

    /// Sends a request and returns the status of its answer; [`piece`](Self::piece) reads the body.
    /// Without a body the request is a GET.
    pub(super) fn begin(
        &mut self,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&[u8]>,
        by: Deadline,
    ) -> io::Result<u16> {
        self.stream.set_deadline(by);
        let method = if body.is_some() { "POST" } else { "GET" };
        let mut request =
            format!("{method} {path} HTTP/1.1\r\nHost: {}\r\n", self.host).into_bytes();
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
    pub(super) fn send(
        &mut self,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&[u8]>,
        by: Deadline,
    ) -> io::Result<(u16, Vec<u8>)> {
        let status = self.begin(path, headers, body, by)?;
        let mut received = Vec::new();
        while let Some(piece) = self.piece(by)? {
            received.extend_from_slice(&piece);
            if received.len() > MAX_PIECE_LENGTH {
                return Err(invalid_data(format!(
                    "the answer is longer than {MAX_PIECE_LENGTH} bytes"
                )));
            }
        }
        Ok((status, received))
    }

    fn read_head(&mut self) -> io::Result<u16> {
        loop {
            let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
            let mut head = httparse::Response::new(&mut headers);
            let httparse::Status::Complete(length) =
                head.parse(&self.input).map_err(invalid_data)?
            else {
                self.fill()?;
                continue;
            };
            let status = head.code.unwrap_or_default();
            let value = |name: &str| {
                let header = head
                    .headers
                    .iter()
                    .find(|header| header.name.eq_ignore_ascii_case(name))?;
                std::str::from_utf8(header.value).ok()
            };
            let is_chunked = value("transfer-encoding")
                .is_some_and(|value| value.eq_ignore_ascii_case("chunked"));
            let announced = value("content-length")
                .map(|length| length.trim().parse().map_err(invalid_data))
                .transpose()?;
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

    /// Returns the next piece of the body, in whole chunks if the server sends chunks; `None` at
    /// the end. After a timeout the caller can wait for the same piece again.
    pub(super) fn piece(&mut self, by: Deadline) -> io::Result<Option<Vec<u8>>> {
        self.stream.set_deadline(by);
        loop {
            match self.framing {
                Framing::Length(0) => return Ok(None),
                Framing::Length(remaining) if !self.input.is_empty() => {
                    let piece: Vec<u8> = self
                        .input
                        .drain(..remaining.min(self.input.len()))
                        .collect();
                    self.framing = Framing::Length(remaining - piece.len());
                    return Ok(Some(piece));
                }
                Framing::Chunked => match self.chunk()? {
                    Some(piece) => return Ok(Some(piece)),
                    None if self.framing == Framing::Length(0) => return Ok(None),
                    None => {}
                },
                Framing::Close if !self.input.is_empty() => {
                    return Ok(Some(std::mem::take(&mut self.input)));
                }
                Framing::Length(_) | Framing::Close => {}
            }
            match self.fill() {
                Err(error)
                    if error.kind() == ErrorKind::UnexpectedEof
                        && self.framing == Framing::Close =>
                {
                    self.framing = Framing::Length(0);
                }
                filled => filled?,
            }
        }
    }

    /// Takes the next chunk out of the input, if it has arrived. After the last chunk, sets the
    /// framing to no further bytes.
    fn chunk(&mut self) -> io::Result<Option<Vec<u8>>> {
        let size = httparse::parse_chunk_size(&self.input)
            .map_err(|_| invalid_data("a chunk has no size"))?;
        match size {
            httparse::Status::Complete((from, 0)) => {
                // Trailers end with an empty line and are ignored.
                let rest = &self.input[from..];
                let end = match rest.starts_with(b"\r\n") {
                    true => Some(2),
                    false => rest
                        .windows(4)
                        .position(|window| window == b"\r\n\r\n")
                        .map(|at| at + 4),
                };
                if let Some(end) = end {
                    self.input.drain(..from + end);
                    self.framing = Framing::Length(0);
                }
                Ok(None)
            }
            httparse::Status::Complete((from, size)) => {
                let size = usize::try_from(size)
                    .ok()
                    .filter(|size| *size <= MAX_PIECE_LENGTH);
                let too_long =
                    || invalid_data(format!("a chunk is longer than {MAX_PIECE_LENGTH} bytes"));
                let to = from + size.ok_or_else(too_long)?;
                if self.input.len() < to + 2 {
                    return Ok(None);
                }
                let piece = self.input[from..to].to_vec();
                self.input.drain(..to + 2);
                Ok(Some(piece))
            }
            httparse::Status::Partial => Ok(None),
        }
    }

    fn fill(&mut self) -> io::Result<()> {
        if self.input.len() > MAX_PIECE_LENGTH {
            return Err(invalid_data(format!(
                "a line is longer than {MAX_PIECE_LENGTH} bytes"
            )));
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

fn invalid_data(what: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

/// Connects to the first of the host's addresses that answers.
fn connect(host: &Arc<str>, port: u16, by: Deadline) -> io::Result<TcpStream> {
    let addresses = addresses(host, port, by)?;
    let mut failure = ErrorKind::NotFound.into();
    for (at, address) in addresses.iter().enumerate() {
        // A silent address leaves the others their part of the time.
        let part = equal_part(by, addresses.len() - at);
        if part.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        match TcpStream::connect_timeout(address, part) {
            Ok(tcp) => return Ok(tcp),
            Err(error) => failure = map_timeout(error),
        }
    }
    Err(failure)
}
