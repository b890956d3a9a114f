//! Processes that elect a leader, and a resource that refuses writes of former leaders.
//!
//! Three workers compete for one lease. The holder counts: it reads a number from a resource and
//! writes the next one, with its token. The first leader is killed, and the next guard reports it.
//! The second leader is stopped between read and write, for longer than its TTL, and another worker
//! takes over. When the second leader continues, it finishes its write, because it checked its
//! lease before. But the resource has seen a later token by then, and refuses the write.
//!
//! Run with `cargo run --example leader`. [`work`] is the part to copy. [`Resource::write`] is the
//! check that a guarded resource needs: a database, a disk, a service.

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command};
use std::thread;
use std::time::Duration;

use lockkit::Lease;
use rustix::process::{Pid, Signal, kill_process};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    if let Some(directory) = std::env::args_os().nth(1) {
        return work(Path::new(&directory));
    }
    let directory =
        std::env::temp_dir().join(format!("lockkit-example-leader-{}", std::process::id()));
    std::fs::create_dir(&directory)?;
    let result = coordinate(&directory);
    std::fs::remove_dir_all(&directory)?;
    result
}

/// Acts as a worker: waits until it leads, leads until it loses the lease, and waits again.
fn work(directory: &Path) -> Result<()> {
    let me = std::process::id();
    let lease = Lease::file(directory.join("lease"))
        .ttl(Duration::from_secs(2))
        .heartbeat(Duration::from_millis(200))
        .build()?;
    loop {
        let guard = lease.lock()?;
        match guard.recovered() {
            Some(before) => {
                println!(
                    "{me} leads with token {}; the previous leader did not release: {before}",
                    guard.token()
                )
            }
            None => println!("{me} leads with token {}", guard.token()),
        }
        let mut resource = Connection::new(UnixStream::connect(directory.join("resource"))?);
        resource.send(&me.to_string())?;
        // The check saves work. It can be out of date a moment later, so each write carries the
        // token.
        while guard.is_held() {
            let number: u64 = resource.ask("read")?.parse()?;
            thread::sleep(Duration::from_millis(20));
            if resource.ask(&format!("write {} {}", guard.token(), number + 1))? == "refused" {
                println!("{me} is refused");
            }
        }
        if let Err(lost) = guard.release() {
            println!("{me} does not lead any more: {lost}");
        }
    }
}

/// The resource that the lease guards. It knows nothing of leases.
#[derive(Default)]
struct Resource {
    number: u64,
    /// The highest token that it has seen.
    token: u64,
}

impl Resource {
    /// Stores the number, unless the resource has seen a later token. Returns whether it stored the
    /// number.
    fn write(&mut self, token: u64, number: u64) -> bool {
        if token < self.token {
            println!(
                "the resource refuses {number} with token {token}: it has seen {}",
                self.token
            );
            return false;
        }
        (self.number, self.token) = (number, token);
        println!("the resource accepts {number} with token {token}");
        true
    }

    /// Answers a leader until the leader has requested so many writes, or has closed its
    /// connection.
    fn serve(&mut self, leader: &mut Connection, writes: usize) -> Result<()> {
        let mut writes_done = 0;
        while writes_done < writes {
            let Some(request) = leader.receive()? else {
                break;
            };
            match request.split(' ').collect::<Vec<_>>().as_slice() {
                ["read"] => leader.send(&self.number.to_string())?,
                ["write", token, number] => {
                    writes_done += 1;
                    leader.send(if self.write(token.parse()?, number.parse()?) {
                        "accepted"
                    } else {
                        "refused"
                    })?;
                }
                _ => return Err(format!("unknown request: {request:?}").into()),
            }
        }
        Ok(())
    }
}

/// Starts the workers, acts as the resource, and kills and stops leaders.
fn coordinate(directory: &Path) -> Result<()> {
    let leaders = UnixListener::bind(directory.join("resource"))?;
    let mut resource = Resource::default();
    let mut workers = Workers::start(3, directory)?;

    let (pid, mut first) = next(&leaders)?;
    resource.serve(&mut first, 3)?;
    println!("{pid} is killed");
    let killed = workers.get(pid)?;
    killed.kill()?;
    killed.wait()?;

    let (pid, mut second) = next(&leaders)?;
    resource.serve(&mut second, 3)?;
    // It has requested the number, so it believes that it leads, and waits for the answer.
    second.receive()?;
    println!("{pid} is stopped");
    let stopped = Pid::from_child(workers.get(pid)?);
    kill_process(stopped, Signal::STOP)?;
    second.send(&resource.number.to_string())?;

    let (_, mut third) = next(&leaders)?;
    resource.serve(&mut third, 3)?;
    println!("{pid} continues");
    kill_process(stopped, Signal::CONT)?;
    resource.serve(&mut second, usize::MAX)?;
    println!("the number is {}, and no count was lost", resource.number);
    // The worker waits again, and would lead once more if the leader were killed first.
    workers.get(pid)?.kill()?;
    drop(workers);
    Ok(())
}

/// Waits for the next leader. Returns its pid and its connection.
fn next(leaders: &UnixListener) -> Result<(u32, Connection)> {
    let mut leader = Connection::new(leaders.accept()?.0);
    let pid = leader
        .receive()?
        .ok_or("a leader closed its connection at once")?;
    Ok((pid.parse()?, leader))
}

/// The workers. All are killed at the end, in whatever state they are.
struct Workers(Vec<Child>);

impl Workers {
    fn start(count: usize, directory: &Path) -> Result<Self> {
        let mut workers = Self(Vec::new());
        for _ in 0..count {
            workers.0.push(
                Command::new(std::env::current_exe()?)
                    .arg(directory)
                    .spawn()?,
            );
        }
        Ok(workers)
    }

    fn get(&mut self, pid: u32) -> Result<&mut Child> {
        self.0
            .iter_mut()
            .find(|worker| worker.id() == pid)
            .ok_or_else(|| format!("no worker has the pid {pid}").into())
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for worker in &mut self.0 {
            // Some were killed before.
            let _ = worker.kill();
            let _ = worker.wait();
        }
    }
}

/// Lines to and from another process.
struct Connection(BufReader<UnixStream>);

impl Connection {
    fn new(stream: UnixStream) -> Self {
        Self(BufReader::new(stream))
    }

    fn send(&mut self, line: &str) -> Result<()> {
        Ok(writeln!(self.0.get_mut(), "{line}")?)
    }

    /// Reads the next line. Returns `None` if the peer has closed its connection.
    fn receive(&mut self) -> Result<Option<String>> {
        let mut line = String::new();
        let length = self.0.read_line(&mut line)?;
        Ok((length > 0).then(|| line.trim_end().to_owned()))
    }

    fn ask(&mut self, question: &str) -> Result<String> {
        self.send(question)?;
        self.receive()?
            .ok_or_else(|| "the resource has closed the connection".into())
    }
}
