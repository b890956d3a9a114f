//! A proxy on a loopback port that counts what it passes on, and cuts connections.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

/// How often what is held looks whether it may go on.
const MOMENT: Duration = Duration::from_millis(1);

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the server.
    Request,
    /// From the server to the client.
    Answer,
}

/// Stands between a client and a server, and cuts where it is told to. It ends when it is dropped, and its connections with it.
pub struct Proxy {
    port: u16,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    /// Where the server is.
    server: AtomicU16,
    /// Cut the connection that passes on the last of so many more bytes this way.
    cut: Mutex<Option<(Direction, u64)>>,
    /// Let nobody in once that has been cut.
    stays_cut: AtomicBool,
    cuts: AtomicUsize,
    passed: [AtomicU64; 2],
    connections: AtomicUsize,
    open: AtomicUsize,
    /// How often all connections have been cut at once.
    moves: AtomicUsize,
    /// What comes is taken, and passed on when this is over.
    holds: AtomicBool,
    /// Hold from the request on in which these bytes stand.
    hold_at: Mutex<Option<Vec<u8>>>,
    /// What everything takes to be passed on, in microseconds.
    delay: AtomicU64,
    /// A request is passed on, and the server may answer, though the client has gone.
    lingers: AtomicBool,
    is_over: AtomicBool,
}

impl Proxy {
    /// One to the server at this port.
    pub fn to(server: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let port = listener.local_addr().expect("an address").port();
        let state = Arc::new(State { server: server.into(), ..State::default() });
        let shared = state.clone();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if shared.is_over.load(Ordering::SeqCst) {
                    return;
                }
                // Where there is no server, the client is turned away as the server would.
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

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Cuts the connection over which the last of so many bytes goes this way, from now on counted over all connections,
    /// right after that byte; after none: as soon as any would go.
    pub fn cut_after(&self, direction: Direction, bytes: u64) {
        *self.state.cut() = Some((direction, bytes));
    }

    /// As [`cut_after`](Self::cut_after), and lets nobody in from then on until it is to [cut nothing](Self::cut_nothing).
    pub fn cut_off_after(&self, direction: Direction, bytes: u64) {
        self.cut_after(direction, bytes);
        self.state.stays_cut.store(true, Ordering::SeqCst);
    }

    /// From now on it is one to the server at this port; no connection to the one before passes on anything any more.
    pub fn move_to(&self, server: u16) {
        self.lead_to(server);
        self.state.moves.fetch_add(1, Ordering::SeqCst);
    }

    /// Passes on nothing until it is to [let go](Self::let_go): as a server that is frozen, or a network that is slow.
    pub fn hold(&self) {
        self.state.holds.store(true, Ordering::SeqCst);
    }

    /// As [`hold`](Self::hold), from the first request on in which these bytes stand.
    pub fn hold_at(&self, bytes: &[u8]) {
        *self.state.hold_at.lock().expect("nobody panics with it") = Some(bytes.to_vec());
    }

    /// Whether it is holding something, or would.
    pub fn is_holding(&self) -> bool {
        self.state.holds.load(Ordering::SeqCst)
    }

    /// From now on everything takes so long to be passed on, either way, as over a long distance.
    pub fn slow_down(&self, delay: Duration) {
        self.state.delay.store(delay.as_micros() as u64, Ordering::SeqCst);
    }

    /// Leads to the server at this port whoever comes from now on. The connections that there are stay.
    pub fn lead_to(&self, server: u16) {
        self.state.server.store(server, Ordering::SeqCst);
    }

    /// Passes on what it has held, also that of clients which have gone since, whose connections stay.
    pub fn let_go(&self) {
        self.state.lingers.store(true, Ordering::SeqCst);
        self.state.holds.store(false, Ordering::SeqCst);
    }

    /// Passes on nothing any more, and lets nobody in.
    pub fn stop(&self) {
        self.state.is_over.store(true, Ordering::SeqCst);
    }

    /// Cuts nothing any more.
    pub fn cut_nothing(&self) {
        self.state.stays_cut.store(false, Ordering::SeqCst);
        *self.state.cut() = None;
    }

    /// Whether it is to cut a connection yet.
    pub fn is_to_cut(&self) -> bool {
        self.state.cut().is_some()
    }

    /// How often it has cut.
    pub fn cuts(&self) -> usize {
        self.state.cuts.load(Ordering::SeqCst)
    }

    /// How many bytes have gone this way.
    pub fn passed(&self, direction: Direction) -> u64 {
        self.state.passed[direction as usize].load(Ordering::SeqCst)
    }

    /// How many connections there have been.
    pub fn connections(&self) -> usize {
        self.state.connections.load(Ordering::SeqCst)
    }

    /// How many there are.
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
        self.cut.lock().expect("nobody panics with it")
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

    /// Whether connections are not to end.
    fn keeps_on(&self) -> bool {
        let keeps_on = [&self.holds, &self.lingers].iter().any(|flag| flag.load(Ordering::SeqCst));
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
        let mut at = self.hold_at.lock().expect("nobody panics with it");
        if at.take_if(|bytes| request.windows(bytes.len()).any(|window| window == *bytes)).is_some() {
            self.holds.store(true, Ordering::SeqCst);
        }
    }

    /// How many of these bytes may go this way, and whether the connection is cut then.
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
