//! A proxy on a loopback port that counts the bytes that it forwards, and cuts connections.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

/// The poll interval of held data.
const MOMENT: Duration = Duration::from_millis(1);

/// A direction of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the server.
    Request,
    /// From the server to the client.
    Answer,
}

/// A proxy between a client and a server that cuts connections at chosen bytes. It ends when it is
/// dropped, and its connections with it.
pub struct Proxy {
    port: u16,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    /// The port of the server.
    server: AtomicU16,
    /// The pending cut: the connection that forwards the last of so many more bytes in this
    /// direction is cut.
    cut: Mutex<Option<(Direction, u64)>>,
    /// Whether the proxy refuses connections after that cut.
    stays_cut: AtomicBool,
    cuts: AtomicUsize,
    passed: [AtomicU64; 2],
    connections: AtomicUsize,
    open: AtomicUsize,
    /// How often all connections have been cut at once.
    moves: AtomicUsize,
    /// Whether the proxy accepts data and delays it until this flag is false.
    holds: AtomicBool,
    /// The bytes of the request from which on the proxy holds data.
    hold_at: Mutex<Option<Vec<u8>>>,
    /// The delay of all forwarded data, in microseconds.
    delay: AtomicU64,
    /// Whether the proxy forwards a request of a client that has gone, and the server may answer.
    lingers: AtomicBool,
    is_over: AtomicBool,
}

impl Proxy {
    /// Creates a proxy to the server at this port.
    pub fn to(server: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let port = listener.local_addr().expect("an address").port();
        let state = Arc::new(State {
            server: server.into(),
            ..State::default()
        });
        let shared = state.clone();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if shared.is_over.load(Ordering::SeqCst) {
                    return;
                }
                // Without a server, the proxy refuses the client as the server would.
                let port = shared.server.load(Ordering::SeqCst);
                if shared.stays_cut.load(Ordering::SeqCst) && shared.cut().is_none() {
                    continue;
                }
                if let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
                    shared.connect(client, server);
                }
            }
        });
        Self { port, state }
    }

    /// Returns the port on which it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Cuts the connection that carries the last of so many bytes in this direction, right after
    /// that byte. The count starts now and includes all connections. For zero bytes the cut happens
    /// as soon as any byte would go.
    pub fn cut_after(&self, direction: Direction, bytes: u64) {
        *self.state.cut() = Some((direction, bytes));
    }

    /// As [`cut_after`](Self::cut_after), and refuses connections from then on until
    /// [`cut_nothing`](Self::cut_nothing).
    pub fn cut_off_after(&self, direction: Direction, bytes: u64) {
        self.cut_after(direction, bytes);
        self.state.stays_cut.store(true, Ordering::SeqCst);
    }

    /// Directs the proxy to the server at this port from now on. Connections to the previous server
    /// forward nothing any more.
    pub fn move_to(&self, server: u16) {
        self.lead_to(server);
        self.state.moves.fetch_add(1, Ordering::SeqCst);
    }

    /// Forwards nothing until [`let_go`](Self::let_go), as a frozen server or a slow network does.
    pub fn hold(&self) {
        self.state.holds.store(true, Ordering::SeqCst);
    }

    /// As [`hold`](Self::hold), from the first request on that contains these bytes.
    pub fn hold_at(&self, bytes: &[u8]) {
        *self
            .state
            .hold_at
            .lock()
            .expect("no thread panics with the lock") = Some(bytes.to_vec());
    }

    /// Returns whether it holds data, or would hold new data.
    pub fn is_holding(&self) -> bool {
        self.state.holds.load(Ordering::SeqCst)
    }

    /// Delays all data by this time in both directions from now on, as over a long distance.
    pub fn slow_down(&self, delay: Duration) {
        self.state
            .delay
            .store(delay.as_micros() as u64, Ordering::SeqCst);
    }

    /// Directs new connections to the server at this port. Existing connections stay.
    pub fn lead_to(&self, server: u16) {
        self.state.server.store(server, Ordering::SeqCst);
    }

    /// Forwards the held data, including that of clients that have gone since. The connections of
    /// these clients stay.
    pub fn let_go(&self) {
        self.state.lingers.store(true, Ordering::SeqCst);
        self.state.holds.store(false, Ordering::SeqCst);
    }

    /// Forwards nothing any more, and refuses connections.
    pub fn stop(&self) {
        self.state.is_over.store(true, Ordering::SeqCst);
    }

    /// Cuts nothing any more.
    pub fn cut_nothing(&self) {
        self.state.stays_cut.store(false, Ordering::SeqCst);
        *self.state.cut() = None;
    }

    /// Returns whether a cut is pending.
    pub fn is_to_cut(&self) -> bool {
        self.state.cut().is_some()
    }

    /// Returns the number of cuts.
    pub fn cuts(&self) -> usize {
        self.state.cuts.load(Ordering::SeqCst)
    }

    /// Returns the number of bytes that have gone in this direction.
    pub fn passed(&self, direction: Direction) -> u64 {
        self.state.passed[direction as usize].load(Ordering::SeqCst)
    }

    /// Returns the number of connections so far.
    pub fn connections(&self) -> usize {
        self.state.connections.load(Ordering::SeqCst)
    }

    /// Returns the number of open connections.
    pub fn open(&self) -> usize {
        self.state.open.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.state.is_over.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
    }
}

impl State {
    fn cut(&self) -> MutexGuard<'_, Option<(Direction, u64)>> {
        self.cut.lock().expect("no thread panics with the lock")
    }

    fn connect(self: &Arc<Self>, client: TcpStream, server: TcpStream) {
        self.connections.fetch_add(1, Ordering::SeqCst);
        self.open.fetch_add(1, Ordering::SeqCst);
        for stream in [&client, &server] {
            stream.set_nodelay(true).expect("a connection");
        }
        let ends = Arc::new((client, server));
        let [there, back] = [Direction::Request, Direction::Answer].map(|direction| {
            let (state, ends) = (self.clone(), ends.clone());
            thread::spawn(move || {
                let (from, to) = match direction {
                    Direction::Request => (&ends.0, &ends.1),
                    Direction::Answer => (&ends.1, &ends.0),
                };
                state.pass_on(direction, from, to);
                while direction == Direction::Request && state.keeps_on() {
                    thread::sleep(MOMENT);
                }
                for end in [from, to] {
                    let _ = end.shutdown(Shutdown::Both);
                }
            })
        });
        let state = self.clone();
        thread::spawn(move || {
            let _ = (there.join(), back.join());
            state.open.fetch_sub(1, Ordering::SeqCst);
        });
    }

    /// Returns whether connections stay open.
    fn keeps_on(&self) -> bool {
        let keeps_on = [&self.holds, &self.lingers]
            .iter()
            .any(|flag| flag.load(Ordering::SeqCst));
        keeps_on && !self.is_over.load(Ordering::SeqCst)
    }

    fn pass_on(&self, direction: Direction, mut from: &TcpStream, mut to: &TcpStream) {
        let mut bytes = [0; 16384];
        let moves = self.moves.load(Ordering::SeqCst);
        while let Ok(length @ 1..) = from.read(&mut bytes) {
            if direction == Direction::Request {
                self.hold_if_due(&bytes[..length]);
            }
            thread::sleep(Duration::from_micros(self.delay.load(Ordering::SeqCst)));
            while self.holds.load(Ordering::SeqCst) && !self.is_over.load(Ordering::SeqCst) {
                thread::sleep(MOMENT);
            }
            if self.is_over.load(Ordering::SeqCst) || self.moves.load(Ordering::SeqCst) != moves {
                return;
            }
            let (length, is_cut) = self.allowed(direction, length);
            self.passed[direction as usize].fetch_add(length as u64, Ordering::SeqCst);
            if to.write_all(&bytes[..length]).is_err() {
                return;
            }
            if is_cut {
                self.cuts.fetch_add(1, Ordering::SeqCst);
                return;
            }
        }
    }

    fn hold_if_due(&self, request: &[u8]) {
        let mut at = self.hold_at.lock().expect("no thread panics with the lock");
        if at
            .take_if(|bytes| request.windows(bytes.len()).any(|window| window == *bytes))
            .is_some()
        {
            self.holds.store(true, Ordering::SeqCst);
        }
    }

    /// Returns how many of these bytes may go in this direction, and whether the connection is cut
    /// then.
    fn allowed(&self, direction: Direction, length: usize) -> (usize, bool) {
        let mut cut = self.cut();
        match &mut *cut {
            Some((way, left)) if *way == direction => {
                let allowed = length.min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= allowed as u64;
                let is_cut = *left == 0;
                if is_cut {
                    *cut = None;
                }
                (allowed, is_cut)
            }
            _ => (length, false),
        }
    }
}
