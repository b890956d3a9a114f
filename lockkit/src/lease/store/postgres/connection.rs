//! One connection to a PostgreSQL server. Its user sends a request and waits for the answer, no
//! longer than a deadline.
//!
//! tokio-postgres implements the protocol, as futures over any stream of bytes. The futures need no
//! runtime: the calling thread polls them, and when they can make no progress sleeps in poll(2) for
//! their one socket. So a request costs a write, a sleep and a read. Its deadline holds even when
//! the server is frozen. There is no thread, no further descriptor, and nothing that must not be
//! used within a program's own runtime. A connection cannot be used after a missed deadline,
//! because the answer may still arrive.
//!
//! A forked child gets inert descriptors in place of the sockets.

use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker, ready};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect, TlsStream};
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{AsyncMessage, Client, Config, Error, Row, Statement};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::lease::store::lease_store::Deadline;
use crate::sys::event;
use crate::sys::failpoint::step;
use crate::sys::fork::{self, ForkGuarded};

/// A statement of the store, with the types of its parameters.
pub(super) struct Sql {
    /// The index under which a connection keeps the prepared statement.
    pub(super) slot: usize,
    pub(super) text: &'static str,
    pub(super) types: &'static [Type],
}

/// The number of statements.
pub(super) const STATEMENT_COUNT: usize = 8;

/// The reason why a request has no answer.
#[derive(Debug)]
pub(super) enum QueryError {
    /// The deadline passed.
    TimedOut,
    /// The server reported the error, or the connection broke.
    Driver(Error),
    /// This machine reported the error.
    Io(io::Error),
}

impl From<Error> for QueryError {
    fn from(error: Error) -> Self {
        Self::Driver(error)
    }
}

/// An open connection.
pub(super) struct Connection {
    transport: Transport,
    client: Client,
    statements: [Option<Statement>; STATEMENT_COUNT],
    /// Statements can be prepared: no proxy in between gives each transaction another session.
    pub(super) is_direct: bool,
}

/// The part of a connection that sends and receives the bytes.
struct Transport {
    socket: Arc<Socket>,
    driver:
        tokio_postgres::Connection<Stream, <MakeRustlsConnect as MakeTlsConnect<Stream>>::Stream>,
    /// The payloads that the server has sent and no caller has taken yet: the names of leases.
    notifications: Vec<String>,
}

impl Connection {
    /// Opens the session on a connected socket.
    pub(super) fn open(
        socket: ForkGuarded<OwnedFd>,
        host: Option<&str>,
        config: &Config,
        tls: &MakeRustlsConnect,
        by: Deadline,
    ) -> Result<Self, QueryError> {
        let socket = Arc::new(Socket {
            descriptor: socket,
            is_full: AtomicBool::new(false),
        });
        let connector =
            MakeTlsConnect::<Stream>::make_tls_connect(&mut tls.clone(), host.unwrap_or_default());
        let connector = connector.unwrap_or_else(|never| match never {});
        let opening = config.connect_raw(Stream(socket.clone()), connector);
        let (client, driver) = run(&socket, |_| Ok(()), opening, by)??;
        step("session opened");
        let transport = Transport {
            socket,
            driver,
            notifications: Vec::new(),
        };
        Ok(Self {
            transport,
            client,
            statements: [const { None }; STATEMENT_COUNT],
            is_direct: false,
        })
    }

    /// Returns the number of the server's process at the other end, as the server or a proxy in
    /// between reported it at first.
    pub(super) fn server_process(&self) -> Option<i32> {
        // Only a cancel request reveals the number; it is captured here and not sent.
        let mut captured = Vec::new();
        let token = self.client.cancel_token();
        let sent = {
            let sending = pin!(token.cancel_query_raw(CapturedStream(&mut captured), CapturedTls));
            sending.poll(&mut Context::from_waker(Waker::noop()))
        };
        // The request ends with the number and a key.
        let number = captured.last_chunk::<8>()?.first_chunk::<4>()?;
        matches!(sent, Poll::Ready(Ok(()))).then(|| i32::from_be_bytes(*number))
    }

    /// Runs a statement, which is prepared at its first use if possible.
    pub(super) fn query(
        &mut self,
        sql: &Sql,
        values: &[&(dyn ToSql + Sync)],
        by: Deadline,
    ) -> Result<Vec<Row>, QueryError> {
        if !self.is_direct {
            return self.query_unprepared(sql, values, by);
        }
        let Self {
            transport,
            client,
            statements,
            ..
        } = self;
        let statement = match &mut statements[sql.slot] {
            Some(statement) => statement,
            none => none.insert(transport.run(client.prepare_typed(sql.text, sql.types), by)??),
        };
        Ok(transport.run(client.query(statement, values), by)??)
    }

    /// Runs a statement without keeping it prepared.
    pub(super) fn query_unprepared(
        &mut self,
        sql: &Sql,
        values: &[&(dyn ToSql + Sync)],
        by: Deadline,
    ) -> Result<Vec<Row>, QueryError> {
        let typed: Vec<_> = values
            .iter()
            .copied()
            .zip(sql.types.iter().cloned())
            .collect();
        let Self {
            transport, client, ..
        } = self;
        Ok(transport.run(client.query_typed(sql.text, &typed), by)??)
    }

    /// Executes statements without values.
    pub(super) fn execute(&mut self, sql: &str, by: Deadline) -> Result<(), QueryError> {
        let Self {
            transport, client, ..
        } = self;
        Ok(transport.run(client.batch_execute(sql), by)??)
    }

    /// Forgets the prepared statements.
    pub(super) fn forget_statements(&mut self) {
        self.statements = [const { None }; STATEMENT_COUNT];
    }

    /// Returns the payloads of the notifications that the server has sent. Waits for the first
    /// until `by`.
    pub(super) fn listen(&mut self, by: Deadline) -> Result<Vec<String>, QueryError> {
        if self.transport.notifications.is_empty() {
            let Transport {
                socket,
                driver,
                notifications,
            } = &mut self.transport;
            let received = std::future::poll_fn(|cx| {
                let received = receive(driver, notifications, cx);
                if received.is_ok() && notifications.is_empty() {
                    Poll::Pending
                } else {
                    Poll::Ready(received)
                }
            });
            match run(socket, |_| Ok(()), received, by) {
                Ok(received) => received?,
                Err(QueryError::TimedOut) => {}
                Err(cut) => return Err(cut),
            }
        }
        Ok(std::mem::take(&mut self.transport.notifications))
    }
}

impl Transport {
    /// Polls `work` until it is ready, and sends and receives the bytes that it waits for.
    fn run<F: Future>(&mut self, work: F, by: Deadline) -> Result<F::Output, QueryError> {
        let Self {
            socket,
            driver,
            notifications,
        } = self;
        run(socket, |cx| receive(driver, notifications, cx), work, by)
    }
}

/// Sends and receives as much as is possible without waiting.
fn receive<T: AsyncRead + AsyncWrite + Unpin>(
    driver: &mut tokio_postgres::Connection<Stream, T>,
    notifications: &mut Vec<String>,
    cx: &mut Context<'_>,
) -> Result<(), QueryError> {
    loop {
        match driver.poll_message(cx) {
            Poll::Ready(Some(Ok(AsyncMessage::Notification(notification)))) => {
                notifications.push(notification.payload().to_owned())
            }
            Poll::Ready(Some(Ok(_))) => {}
            Poll::Ready(Some(Err(error))) => return Err(error.into()),
            Poll::Ready(None) => {
                return Err(QueryError::Io(io::ErrorKind::ConnectionAborted.into()));
            }
            Poll::Pending => return Ok(()),
        }
    }
}

/// Polls `work` until it is ready or `by` has come. `driver` sends and receives the bytes that
/// `work` waits for, unless `work` does that itself.
fn run<F: Future>(
    socket: &Socket,
    mut driver: impl FnMut(&mut Context<'_>) -> Result<(), QueryError>,
    work: F,
    by: Deadline,
) -> Result<F::Output, QueryError> {
    // The program may have closed the socket, and another file may have its number.
    if !socket.descriptor.is_own() {
        return Err(QueryError::Io(fork::closed_by_program()));
    }
    let woken = Arc::new(Woken(AtomicBool::new(false)));
    let waker = Waker::from(woken.clone());
    let mut cx = Context::from_waker(&waker);
    let mut work = pin!(work);
    loop {
        woken.0.store(false, Ordering::Relaxed);
        let driven = driver(&mut cx);
        // Polls even if the connection broke: the server's last message may have arrived.
        if let Poll::Ready(done) = work.as_mut().poll(&mut cx) {
            return Ok(done);
        }
        driven?;
        // A request or an answer was queued: there is more to do before the socket changes.
        if woken.0.load(Ordering::Relaxed) {
            continue;
        }
        let is_full = socket.is_full.swap(false, Ordering::Relaxed);
        if !event::wait_for_traffic(socket.descriptor.as_fd(), is_full, by.moment())
            .map_err(QueryError::Io)?
        {
            return Err(QueryError::TimedOut);
        }
    }
}

/// Set when a future is to be polled again, at once.
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A connected socket that does not block.
struct Socket {
    descriptor: ForkGuarded<OwnedFd>,
    /// The socket accepted no more bytes at the last write.
    is_full: AtomicBool,
}

impl Socket {
    /// Converts the result of a non-blocking call. It registers no waker: [`run`] sleeps for the
    /// socket itself.
    fn poll<T>(result: Result<T, Errno>) -> Poll<io::Result<T>> {
        match result {
            Ok(done) => Poll::Ready(Ok(done)),
            Err(Errno::AGAIN) => Poll::Pending,
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }
}

/// The socket as tokio-postgres reads and writes it.
pub(super) struct Stream(Arc<Socket>);

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let room = buffer.initialize_unfilled();
        let read = rustix::io::retry_on_intr(|| {
            rustix::net::recv(&*self.0.descriptor, &mut *room, RecvFlags::empty())
        });
        let (read, _) = ready!(Socket::poll(read))?;
        buffer.advance(read);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let sent = rustix::io::retry_on_intr(|| {
            rustix::net::send(&*self.0.descriptor, bytes, SendFlags::NOSIGNAL)
        });
        let sent = Socket::poll(sent);
        self.0.is_full.store(sent.is_pending(), Ordering::Relaxed);
        sent
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(
            rustix::net::shutdown(&*self.0.descriptor, Shutdown::Write).map_err(io::Error::from),
        )
    }
}

/// A stream that keeps the written bytes, and accepts every request for TLS.
struct CapturedStream<'c>(&'c mut Vec<u8>);

impl AsyncRead for CapturedStream<'_> {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        buffer.put_slice(b"S");
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for CapturedStream<'_> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.0.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl TlsStream for CapturedStream<'_> {
    fn channel_binding(&self) -> ChannelBinding {
        ChannelBinding::none()
    }
}

/// A TLS connector for [`CapturedStream`] that does nothing.
struct CapturedTls;

impl<'c> TlsConnect<CapturedStream<'c>> for CapturedTls {
    type Stream = CapturedStream<'c>;
    type Error = io::Error;
    type Future = std::future::Ready<io::Result<CapturedStream<'c>>>;

    fn connect(self, stream: CapturedStream<'c>) -> Self::Future {
        std::future::ready(Ok(stream))
    }
}
