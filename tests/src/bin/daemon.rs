//! A daemon: acquires the pidfile PATH, forks, and lets the child continue as the owner.
//!
//! One command per line, one answer per line: `fork`, then `rewrite` for the child, then `release`.
//! ORDER says which process acts first. With `parent` the parent exits immediately, as daemon(3)
//! does. With `child` the parent waits for a message from the child, and then drops its copy of the
//! guard. `closes` is as `child`, and the child closes all inherited descriptors before it
//! rewrites.

#[cfg(unix)]
use std::io::{Read, Write};

#[cfg(unix)]
use lockkit::PidFile;
#[cfg(unix)]
use rustix::process::getppid;

#[cfg(unix)]
fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, path, order] = &arguments[..] else {
        panic!("daemon PATH ORDER")
    };
    let mut lines = std::io::stdin().lines().map_while(Result::ok);
    let mut expect = |command: &str| match lines.next() {
        Some(line) => assert_eq!(line, command),
        None => std::process::exit(0),
    };
    let mut guard = PidFile::new(path)
        .and_then(|file| file.try_lock())
        .expect("free");
    println!("held");
    expect("fork");
    let parent = std::process::id();
    let (mut word, mut tell) = std::io::pipe().expect("a pipe");
    match fork::fork().expect("a child") {
        fork::Fork::Parent(_) => {
            drop(tell);
            if order != "parent" {
                word.read_exact(&mut [0]).expect("word from the child");
                drop(guard);
            }
            std::process::exit(0);
        }
        fork::Fork::Child => {
            let orphaned = || {
                while getppid().is_some_and(|now| now.as_raw_nonzero().get() as u32 == parent) {
                    std::thread::yield_now();
                }
            };
            if order == "parent" {
                orphaned();
            }
            println!("forked {}", std::process::id());
            expect("rewrite");
            #[cfg(target_os = "linux")]
            if order == "closes" {
                use std::os::fd::AsRawFd;
                for descriptor in (3..1024).filter(|descriptor| *descriptor != tell.as_raw_fd()) {
                    let _ = nix::unistd::close(descriptor);
                }
            }
            guard.verify().expect("it is the parent's");
            guard.rewrite().expect("it is ours");
            if order != "parent" {
                tell.write_all(&[0]).expect("the parent listens");
                orphaned();
            }
            println!("rewritten");
            expect("release");
            guard.verify().expect("it is ours");
            guard.release().expect("it is ours");
            println!("released");
            expect("end");
        }
    }
}

#[cfg(not(unix))]
fn main() {}
