//! What a forked child must not keep.
//!
//! A lock lives in a descriptor, and `fork` copies descriptors: a child that outlives its parent would keep the
//! parent's lock, and a name would stay taken after its release for as long as the child lives. Programs started with
//! exec are no concern, for every descriptor here is close-on-exec. For a plain fork, a handler registered with
//! [pthread_atfork(3)] runs in the child and puts an inert pipe end in the place of every [`Shielded`] descriptor. The
//! child's copies of the guards stay valid objects, whose descriptors close as usual and lock nothing.
//!
//! Making a descriptor and noting it down happens with forks held off, so no child slips in between. A process made
//! with a raw `clone` system call runs no handlers and is not covered.
//!
//! [pthread_atfork(3)]: https://man7.org/linux/man-pages/man3/pthread_atfork.3.html

use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, Ordering};

/// How many forks lie between the first process to use lockkit and this one.
static GENERATION: AtomicU32 = AtomicU32::new(0);
/// Forks under way right now.
static FORKING: AtomicU32 = AtomicU32::new(0);
/// The shielded descriptors. Never shrinks: as many chunks as were ever needed at once.
static DESCRIPTORS: Chunk = Chunk::new();

/// A slot without a descriptor.
const EMPTY: RawFd = -1;
/// The highest [`claim`]: all from here down are claims.
const CLAIMED: RawFd = -2;

/// What stands in a slot while its thread makes or closes the descriptor; forks wait for that. It tells what stood
/// there before, for a thread that finds a fork under way puts that back, and the child must find it, too. It is its
/// own inverse.
const fn claim(slot: RawFd) -> RawFd {
    CLAIMED + EMPTY - slot
}

struct Chunk {
    slots: [AtomicI32; 62],
    next: AtomicPtr<Chunk>,
}

impl Chunk {
    const fn new() -> Self {
        Self { slots: [const { AtomicI32::new(EMPTY) }; 62], next: AtomicPtr::new(ptr::null_mut()) }
    }

    fn next(&self) -> Option<&'static Self> {
        // SAFETY: `next` is null or a chunk that `grow` leaked, and so lives for ever.
        unsafe { self.next.load(Ordering::Acquire).as_ref() }
    }

    fn grow(&self) -> &'static Self {
        let fresh = Box::into_raw(Box::new(Self::new()));
        match self.next.compare_exchange(ptr::null_mut(), fresh, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: just made by `Box::into_raw`, and from here on only reachable through `next`, which nobody frees.
            Ok(_) => unsafe { &*fresh },
            Err(first) => {
                // SAFETY: `fresh` comes from `Box::into_raw` above and was shared with nobody.
                drop(unsafe { Box::from_raw(fresh) });
                // SAFETY: not null, or the exchange had worked; leaked like every chunk in `next`.
                unsafe { &*first }
            }
        }
    }
}

/// Every slot there is.
fn slots() -> impl Iterator<Item = &'static AtomicI32> {
    std::iter::successors(Some(&DESCRIPTORS), |chunk| chunk.next()).flat_map(|chunk| &chunk.slots)
}

/// A slot of this thread's own, claimed.
fn occupy() -> &'static AtomicI32 {
    install();
    let mut chunk: &'static Chunk = &DESCRIPTORS;
    loop {
        let free = |slot: &&AtomicI32| slot.load(Ordering::Relaxed) == EMPTY && take_claim(slot, EMPTY);
        if let Some(slot) = chunk.slots.iter().find(free) {
            return slot;
        }
        chunk = match chunk.next() {
            Some(next) => next,
            None => chunk.grow(),
        };
    }
}

/// Claims the slot if it is `from`, and says whether it was. From then on no fork is under way, and none begins, until
/// the slot is something else: either the fork sees the claim, or this thread sees the fork.
fn take_claim(slot: &AtomicI32, from: RawFd) -> bool {
    while slot.compare_exchange(from, claim(from), Ordering::SeqCst, Ordering::Relaxed).is_ok() {
        if FORKING.load(Ordering::SeqCst) == 0 {
            return true;
        }
        slot.store(from, Ordering::SeqCst);
        std::thread::yield_now();
    }
    false
}

/// A descriptor that holds a lock, or a place in the queue for one: a forked child gets an inert one instead.
#[derive(Debug)]
pub(crate) struct Shielded<T: AsFd = OwnedFd> {
    descriptor: ManuallyDrop<T>,
    slot: &'static AtomicI32,
}

impl<T: AsFd> Shielded<T> {
    /// Makes a descriptor with `make` and shields it, with no fork in between.
    pub(crate) fn new<E>(make: impl FnOnce() -> Result<T, E>) -> Result<Self, E> {
        let slot = occupy();
        let made = make();
        slot.store(made.as_ref().map_or(EMPTY, |descriptor| descriptor.as_fd().as_raw_fd()), Ordering::Release);
        Ok(Self { descriptor: ManuallyDrop::new(made?), slot })
    }

    /// Lets forked children keep the descriptor from here on.
    pub(crate) fn unshield(self) -> T {
        let mut shielded = ManuallyDrop::new(self);
        shielded.slot.store(EMPTY, Ordering::SeqCst);
        // SAFETY: taken once, here; `shielded` is never dropped nor used afterwards.
        unsafe { ManuallyDrop::take(&mut shielded.descriptor) }
    }
}

impl<T: AsFd> Deref for Shielded<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.descriptor
    }
}

impl<T: AsFd> Drop for Shielded<T> {
    fn drop(&mut self) {
        take_claim(self.slot, self.descriptor.as_fd().as_raw_fd());
        // SAFETY: dropped once, here, and not used afterwards.
        unsafe { ManuallyDrop::drop(&mut self.descriptor) };
        self.slot.store(EMPTY, Ordering::Release);
    }
}

/// Holds forks off until it is dropped: for a mutex that a forked child needs, and must not find locked by a thread
/// that it does not have. Made before the mutex is locked. No shielded descriptor may be made or dropped meanwhile, for
/// that waits for forks.
#[derive(Debug)]
pub(crate) struct NoFork(&'static AtomicI32);

impl NoFork {
    pub(crate) fn hold() -> Self {
        Self(occupy())
    }
}

impl Drop for NoFork {
    fn drop(&mut self) {
        self.0.store(EMPTY, Ordering::Release);
    }
}

/// Which process this is, counted in forks. Two equal numbers in one process image mean that no fork lies between.
#[inline]
pub(crate) fn generation() -> u32 {
    install();
    noted_generation()
}

/// What [`generation`] says, for code that comes after a first call of it.
#[inline]
pub(crate) fn noted_generation() -> u32 {
    GENERATION.load(Ordering::Relaxed)
}

#[inline]
fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // It fails only without memory for its list; then a forked child keeps what it inherits, as it does with
        // every other lock library.
        // SAFETY: the three handlers are functions of this program, sound to call at any time.
        let _ =
            unsafe { libc::pthread_atfork(Some(before_fork), Some(after_fork_in_parent), Some(after_fork_in_child)) };
    });
}

/// Waits until no slot is claimed. Not for ever: a fork from a signal handler may have interrupted the very thread that
/// keeps the claim.
unsafe extern "C" fn before_fork() {
    FORKING.fetch_add(1, Ordering::SeqCst);
    for _ in 0..100_000 {
        if slots().all(|slot| slot.load(Ordering::SeqCst) > CLAIMED) {
            return;
        }
        std::thread::yield_now();
    }
}

unsafe extern "C" fn after_fork_in_parent() {
    FORKING.fetch_sub(1, Ordering::SeqCst);
}

/// Only what POSIX allows after a fork of a process with threads: atomics, `pipe`, `dup2`, `fcntl`, `close`.
unsafe extern "C" fn after_fork_in_child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
    FORKING.store(0, Ordering::SeqCst);
    let inert = rustix::pipe::pipe().ok().map(|(reader, _writer)| reader);
    for slot in slots() {
        // A thread that claimed it is not here to put back what stood there.
        let held = match slot.load(Ordering::Relaxed) {
            claimed @ ..=CLAIMED => claim(claimed),
            held => held,
        };
        slot.store(held, Ordering::Relaxed);
        if held != EMPTY {
            disarm(held, inert.as_ref());
        }
    }
}

fn disarm(fd: RawFd, inert: Option<&OwnedFd>) {
    // SAFETY: the slot holds a descriptor that this process image owns; the guard that owns it is a copy which this
    // handler, the only code that runs, may act for. It stays open unless no inert one could be made: then it is
    // closed here, because a lock that nobody can release is worse than a number closed twice.
    let mut lock = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(fd) });
    let replaced = inert.is_some_and(|inert| {
        rustix::io::dup2(inert, &mut lock).is_ok()
            && rustix::io::fcntl_setfd(&*lock, rustix::io::FdFlags::CLOEXEC).is_ok()
    });
    if !replaced {
        drop(ManuallyDrop::into_inner(lock));
    }
}
