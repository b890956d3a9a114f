//! Descriptors that belong to locks: a forked child does not keep them, and another file is never taken for one.
//!
//! # Forks
//! A lock lives in a descriptor, and `fork` copies descriptors: a child that outlives its parent would keep the
//! parent's lock, and a name would stay taken after its release for as long as the child lives. Programs started with
//! exec are no concern, for every descriptor here is close-on-exec. For a plain fork, a handler registered with
//! [pthread_atfork(3)] runs in the child and puts an inert pipe end in the place of every [`ForkGuarded`] descriptor. The
//! child's copies of the guards stay valid objects, whose descriptors close as usual and lock nothing.
//!
//! A thread that makes or closes such a descriptor has a *claim* meanwhile. A fork waits until no other thread has a
//! claim, and a claim waits until no other thread forks. A thread never waits for itself: a signal handler may fork
//! while its thread has a claim. Both waits sleep after some turns, because the other thread may need this processor.
//! A process made with a raw `clone` system call runs no handlers and is not covered.
//!
//! # Foreign closes
//! A program may close descriptors that it did not open, with close_range(2) or in a loop, and open files that get the
//! same numbers. So each descriptor is noted by its number, and each note of a number has a turn of its own. The note of
//! a descriptor that outlives the call which made it also has the device and inode of its file, or the name of
//! its socket. [`ForkGuarded::is_own`] compares all that. A descriptor that is not its owner's any more
//! is not closed, not used, and not replaced in a forked child. What a program closes while a call of lockkit is under
//! way is not always noticed.
//!
//! [pthread_atfork(3)]: https://man7.org/linux/man-pages/man3/pthread_atfork.3.html

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::Cell;
use std::io;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::slice;
use std::sync::Once;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use rustix::io::Errno;

/// How many forks lie between the first process to use lockkit and this one.
static GENERATION: AtomicU32 = AtomicU32::new(0);

/// Claims, in multiples of [`CLAIM`], and forks under way, in multiples of [`FORK`].
static COUNTS: AtomicU64 = AtomicU64::new(0);
const CLAIM: u64 = 1;
const FORK: u64 = 1 << 32;

thread_local! {
    /// This thread's part of [`COUNTS`]. Without a destructor, so that it is there in every handler.
    static OWN: Cell<u64> = const { Cell::new(0) };
}

const fn claims(counts: u64) -> u64 {
    counts % FORK
}

const fn forks(counts: u64) -> u64 {
    counts / FORK
}

/// Holds forks of other threads off.
#[derive(Debug)]
struct Claim(PhantomData<*const ()>);

impl Claim {
    fn take() -> Self {
        install();
        // This thread's part is never too small: a fork from a signal handler at any point here must not wait for a
        // claim of its own thread.
        OWN.set(OWN.get() + CLAIM);
        let mut pause = Pause::default();
        while forks(COUNTS.fetch_add(CLAIM, Ordering::SeqCst)) > forks(OWN.get()) {
            uncount_claim();
            pause.sleep();
        }
        Self(PhantomData)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        uncount_claim();
        OWN.set(OWN.get() - CLAIM);
    }
}

/// Takes a claim out of [`COUNTS`], unless there is none: a forked child begins without, also where its thread has one.
fn uncount_claim() {
    let without = |counts: u64| (claims(counts) > 0).then_some(counts.wrapping_sub(CLAIM));
    let _ = COUNTS.fetch_update(Ordering::SeqCst, Ordering::Relaxed, without);
}

/// How threads wait for each other here. Uses nothing that a handler of a fork may not.
#[derive(Default)]
struct Pause(u32);

impl Pause {
    /// So often the thread only yields: mostly the other one is about to be done.
    const YIELDS: u32 = 50;

    /// A thread of a real-time class that only yields would keep a thread of a lower class off its processor.
    fn sleep(&mut self) {
        match self.0.checked_sub(Self::YIELDS) {
            None => std::thread::yield_now(),
            Some(slept) => std::thread::sleep(Duration::from_micros(50 << slept.min(4))),
        }
        self.0 = self.0.saturating_add(1);
    }
}

/// What is known of a descriptor number.
struct Note {
    /// How often the number was noted, in multiples of [`TURN`], and what the latest note says: one of [`FREE`],
    /// [`SHIELDED`], [`KEPT`].
    state: AtomicU64,
    device: AtomicU64,
    inode: AtomicU64,
}

const TURN: u64 = 4;
/// The number is no lock's.
const FREE: u64 = 0;
/// A forked child gets an inert descriptor in its place.
const SHIELDED: u64 = 1;
/// A forked child keeps it.
const KEPT: u64 = 2;

/// In fewer nanoseconds than these no program closes a file and opens another: that takes two system calls, and the second looks
/// for a name.
#[cfg(target_os = "linux")]
const TOO_SHORT_TO_REPLACE: u64 = 200;

/// By which a file is known: its device and inode.
type Identity = (u64, u64);
/// That of a descriptor which does not outlive the call that made it, or which the system did not describe. It is taken
/// for its owner's.
const UNKNOWN: Identity = (0, 0);
/// What stands for the device of a socket that is known by its name, which takes no system call to note. The hash of the
/// name stands for the inode.
#[cfg(target_os = "linux")]
const BY_NAME: u64 = u64::MAX;

impl Note {
    fn identity(&self) -> Identity {
        (self.device.load(Ordering::Relaxed), self.inode.load(Ordering::Relaxed))
    }

    fn set_identity(&self, (device, inode): Identity) {
        self.device.store(device, Ordering::Relaxed);
        self.inode.store(inode, Ordering::Relaxed);
    }

    /// Begins the next turn, of a descriptor that the kernel has just given to this thread.
    fn begin(&self, identity: Identity) -> u64 {
        self.set_identity(identity);
        let turn = self.state.load(Ordering::Relaxed) / TURN + 1;
        self.state.store(turn * TURN + SHIELDED, Ordering::Release);
        turn
    }

    /// Whether the number is still a lock's, and of this turn.
    fn is_of(&self, turn: u64) -> bool {
        let state = self.state.load(Ordering::Acquire);
        state / TURN == turn && state % TURN != FREE
    }

    /// Says something else, unless the number has been noted again.
    fn set(&self, turn: u64, kind: u64) {
        let set = |state: u64| (state / TURN == turn).then_some(turn * TURN + kind);
        let _ = self.state.fetch_update(Ordering::AcqRel, Ordering::Relaxed, set);
    }
}

/// The notes by number, in tables of growing length: the first has [`FIRST`] notes, each further one twice as many as
/// the one before. They are made when they are needed, and never freed.
static NOTES: [AtomicPtr<Note>; TABLES] = [const { AtomicPtr::new(ptr::null_mut()) }; TABLES];
const FIRST: usize = 64;
/// Enough for every number.
const TABLES: usize = (RawFd::BITS - FIRST.ilog2()) as usize;

/// The length of a table.
const fn length(table: usize) -> usize {
    FIRST << table
}

/// The notes of a table, if it is made.
fn notes(table: usize) -> Option<&'static [Note]> {
    let start = NOTES[table].load(Ordering::Acquire);
    // SAFETY: not null, so `make` put it there: it has this length and is never freed. A `Note` consists of atomic
    // integers, for which all zeros is a value.
    (!start.is_null()).then(|| unsafe { slice::from_raw_parts(start, length(table)) })
}

#[cold]
fn make(table: usize) -> &'static [Note] {
    let Ok(layout) = Layout::array::<Note>(length(table)) else { unreachable!("the longest table fits the memory") };
    // SAFETY: a table has at least one note, so the layout is not empty.
    let fresh = unsafe { alloc_zeroed(layout) }.cast::<Note>();
    if fresh.is_null() {
        handle_alloc_error(layout);
    }
    let swapped = NOTES[table].compare_exchange(ptr::null_mut(), fresh, Ordering::AcqRel, Ordering::Acquire);
    if swapped.is_err() {
        // SAFETY: `fresh` is from `alloc_zeroed` with this layout, and no other thread knows it.
        unsafe { dealloc(fresh.cast(), layout) };
    }
    match notes(table) {
        Some(made) => made,
        None => unreachable!("the exchange has put a table there, or found one"),
    }
}

/// The note of a number.
fn note(descriptor: BorrowedFd<'_>) -> &'static Note {
    let at = descriptor.as_raw_fd() as usize + FIRST;
    let table = (at.ilog2() - FIRST.ilog2()) as usize;
    let notes = notes(table).unwrap_or_else(|| make(table));
    &notes[at - length(table)]
}

/// Every note of a number that a lock has, with the number.
fn noted() -> impl Iterator<Item = (RawFd, &'static Note)> {
    let tables = (0..TABLES).filter_map(|table| Some((table, notes(table)?)));
    let all = tables.flat_map(|(table, notes)| (length(table) - FIRST..).zip(notes));
    all.map(|(number, note)| (number as RawFd, note))
}

/// The identity of an open file, or why the system does not say it.
#[allow(clippy::unnecessary_cast)] // The types differ from system to system.
fn identity(descriptor: BorrowedFd<'_>) -> Result<Identity, Errno> {
    let found = rustix::fs::fstat(descriptor)?;
    let identity = (found.st_dev as u64, found.st_ino as u64);
    #[cfg(target_os = "linux")]
    if found.st_mode & libc::S_IFMT == 0 && !is_marked(descriptor) {
        return Ok((identity.0, ANONYMOUS));
    }
    Ok(identity)
}

/// The inode of a file without one of its own (an event, an epoll, an inotify) that is not marked as lockkit's. Files of
/// this kind share an inode.
#[cfg(target_os = "linux")]
const ANONYMOUS: u64 = u64::MAX;
/// The signal of the mark (`F_SETSIG`). No signal is sent, for that takes `O_ASYNC`, too, and then no program has use for
/// this one.
#[cfg(target_os = "linux")]
const MARK: i32 = libc::SIGSYS;
/// Of [fcntl(2)](https://man7.org/linux/man-pages/man2/fcntl.2.html); `libc` does not have them.
#[cfg(target_os = "linux")]
const F_SETSIG: i32 = 10;
#[cfg(target_os = "linux")]
const F_GETSIG: i32 = 11;

#[cfg(target_os = "linux")]
fn is_marked(descriptor: BorrowedFd<'_>) -> bool {
    // SAFETY: the call reads a number of the open file, whatever the descriptor is.
    unsafe { libc::fcntl(descriptor.as_raw_fd(), F_GETSIG) == MARK }
}

#[cfg(target_os = "linux")]
fn mark(descriptor: BorrowedFd<'_>) {
    // SAFETY: the call sets a number of the open file, which is lockkit's.
    unsafe { libc::fcntl(descriptor.as_raw_fd(), F_SETSIG, MARK) };
}

/// Whether the descriptor is open and of that identity. Where the system does not say, it is, for not closing it would
/// keep a lock.
fn is(descriptor: BorrowedFd<'_>, noted: Identity) -> bool {
    match noted {
        UNKNOWN => true,
        #[cfg(target_os = "linux")]
        (BY_NAME, hash) => super::seqpacket::has_name(descriptor, hash),
        noted => identity(descriptor).map_or_else(|error| error != Errno::BADF, |found| found == noted),
    }
}

/// A descriptor that holds a lock, or a place in the queue for one: a forked child gets an inert one instead.
///
/// It is closed when it is dropped, unless its number means another file by then.
#[derive(Debug)]
pub(crate) struct ForkGuarded<T: AsFd = OwnedFd> {
    descriptor: ManuallyDrop<T>,
    note: &'static Note,
    turn: u64,
}

impl std::fmt::Debug for Note {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Note").finish_non_exhaustive()
    }
}

impl<T: AsFd> ForkGuarded<T> {
    /// Makes a descriptor with `make` and shields it, with no fork in between.
    pub(crate) fn new<E>(make: impl FnOnce() -> Result<T, E>) -> Result<Self, E> {
        Self::known_as(make, UNKNOWN)
    }

    fn known_as<E>(make: impl FnOnce() -> Result<T, E>, identity: Identity) -> Result<Self, E> {
        let _claim = Claim::take();
        let descriptor = make()?;
        let note = note(descriptor.as_fd());
        let turn = note.begin(identity);
        Ok(Self { descriptor: ManuallyDrop::new(descriptor), note, turn })
    }

    /// Notes which file it is, for a descriptor that outlives the call that has made it.
    pub(crate) fn know(self) -> Self {
        #[cfg(target_os = "linux")]
        if identity(self.as_fd()).is_ok_and(|(_, inode)| inode == ANONYMOUS) {
            mark(self.as_fd());
        }
        let identity = identity(self.as_fd()).unwrap_or(UNKNOWN);
        self.know_as(identity)
    }

    /// As [`know`](Self::know), where the caller has looked at the file: by its device and inode.
    pub(crate) fn know_as(self, identity: Identity) -> Self {
        self.note.set_identity(identity);
        self
    }

    /// Lets forked children keep the descriptor from here on.
    pub(crate) fn keep_across_fork(self) -> Self {
        self.note.set(self.turn, KEPT);
        self
    }

    /// Whether the number still means the file that was opened for it. The program may have closed that, and the kernel
    /// may have given the number to another file.
    pub(crate) fn is_own(&self) -> bool {
        self.note.is_of(self.turn) && is(self.descriptor.as_fd(), self.note.identity())
    }

    /// As [`is_own`](Self::is_own) at `now`, for a descriptor that was this lock's at `then`: both are
    /// [`nanos`](super::clock::nanos).
    #[cfg(target_os = "linux")]
    #[inline]
    pub(crate) fn is_own_since(&self, then: u64, now: u64) -> bool {
        now.wrapping_sub(then) < TOO_SHORT_TO_REPLACE || self.is_own()
    }

    /// As dropping it, just after [`is_own`](Self::is_own) was true.
    #[cfg(target_os = "linux")]
    pub(crate) fn close(self) {
        ManuallyDrop::new(self).close_unless_noted_again();
    }

    fn close_unless_noted_again(&mut self) {
        let _claim = Claim::take();
        if self.note.is_of(self.turn) {
            // SAFETY: dropped once, for `self` is not used afterwards.
            unsafe { ManuallyDrop::drop(&mut self.descriptor) };
            // Afterwards, so that a child which a signal handler forks in between finds the note.
            self.note.set(self.turn, FREE);
        }
    }
}

#[cfg(target_os = "linux")]
impl ForkGuarded {
    /// As [`new`](Self::new), of a socket that `make` has given the name with this hash, by which it is known from then on.
    pub(crate) fn named<E>(hash: u64, make: impl FnOnce() -> Result<OwnedFd, E>) -> Result<Self, E> {
        Self::known_as(make, (BY_NAME, hash))
    }
}

impl<T: AsFd> Deref for ForkGuarded<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.descriptor
    }
}

impl<T: AsFd> Drop for ForkGuarded<T> {
    fn drop(&mut self) {
        match self.is_own() {
            true => self.close_unless_noted_again(),
            false => self.note.set(self.turn, FREE),
        }
    }
}

/// Makes a descriptor for the caller's own use. A guard whose descriptor had the number, and was closed by the program, no
/// longer takes the number for its own, whatever the new descriptor means.
pub(crate) fn unguarded<T: AsFd, E>(make: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    let _claim = Claim::take();
    let descriptor = make()?;
    let note = note(descriptor.as_fd());
    let turn = note.begin(UNKNOWN);
    note.set(turn, FREE);
    Ok(descriptor)
}

/// What a release says of a descriptor that is not [its own](ForkGuarded::is_own) any more.
pub(crate) fn closed_by_program() -> io::Error {
    io::Error::other("this process has closed the descriptor of the lock, and so released it earlier")
}

/// Holds forks of other threads off until it is dropped: for a mutex that a forked child needs, and must not find
/// locked by a thread that it does not have. Made before the mutex is locked. No shielded descriptor should be made or
/// dropped meanwhile, for that makes forks wait longer.
#[derive(Debug)]
pub(crate) struct NoFork(#[allow(dead_code)] Claim);

impl NoFork {
    pub(crate) fn hold() -> Self {
        Self(Claim::take())
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

/// Waits until no other thread has a claim. It does not wait for this thread, whose signal handler may be forking.
unsafe extern "C" fn before_fork() {
    OWN.set(OWN.get() + FORK);
    COUNTS.fetch_add(FORK, Ordering::SeqCst);
    let mut pause = Pause::default();
    while claims(COUNTS.load(Ordering::SeqCst)) > claims(OWN.get()) {
        pause.sleep();
    }
}

unsafe extern "C" fn after_fork_in_parent() {
    // None was counted where the handlers were registered during this very fork.
    if forks(OWN.get()) > 0 {
        COUNTS.fetch_sub(FORK, Ordering::SeqCst);
        OWN.set(OWN.get() - FORK);
    }
}

/// Only what POSIX allows after a fork of a process with threads: atomics, `pipe`, `fstat`, `getsockname`, `dup2`,
/// `fcntl`, `close`.
unsafe extern "C" fn after_fork_in_child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
    if forks(OWN.get()) > 0 {
        OWN.set(OWN.get() - FORK);
    }
    // Of the threads only this one is here. If a signal handler forks, the thread may be about to count its claim, or may
    // just have uncounted it, so its claims are counted as none.
    COUNTS.store(0, Ordering::SeqCst);
    let inert = rustix::pipe::pipe().ok().map(|(reader, _writer)| reader);
    let inert_identity = inert.as_ref().and_then(|inert| identity(inert.as_fd()).ok()).unwrap_or(UNKNOWN);
    for (number, note) in noted() {
        let state = note.state.load(Ordering::Relaxed);
        if state % TURN != SHIELDED {
            continue;
        }
        // SAFETY: only looked at, which harms no file, whatever the number means.
        let is_own = is(unsafe { BorrowedFd::borrow_raw(number) }, note.identity());
        if is_own && disarm(number, inert.as_ref()) {
            note.set_identity(inert_identity);
        } else {
            note.set(state / TURN, FREE);
        }
    }
}

/// Puts the inert descriptor in the place of a lock's, or closes the lock's; says whether it is replaced.
fn disarm(number: RawFd, inert: Option<&OwnedFd>) -> bool {
    // SAFETY: the number is noted as a lock's, and means its file; the guard that owns it is a copy which this handler,
    // the only code that runs, may act for. It stays open unless no inert one could be made: then it is closed here,
    // and noted as free, so that the guard does not close it again.
    let mut lock = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(number) });
    let replaced = inert.is_some_and(|inert| {
        rustix::io::dup2(inert, &mut lock).is_ok()
            && rustix::io::fcntl_setfd(&*lock, rustix::io::FdFlags::CLOEXEC).is_ok()
    });
    if !replaced {
        drop(ManuallyDrop::into_inner(lock));
    }
    replaced
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::super::seqpacket;
    use super::*;

    fn listener(name: &str) -> ForkGuarded {
        let name = format!("lockkit-test-fork-{name}-{}", std::process::id());
        seqpacket::listen_at(&seqpacket::address(&name).unwrap()).unwrap().unwrap()
    }

    /// Does it in a child without other threads, which would take the numbers of descriptors that it closes.
    fn in_child(what: impl FnOnce()) {
        // SAFETY: the child allocates, and no other thread of this process keeps the allocator's lock over a fork in glibc.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let is_right = std::panic::catch_unwind(std::panic::AssertUnwindSafe(what)).is_ok();
            // SAFETY: the call ends the process.
            unsafe { libc::_exit(i32::from(!is_right)) };
        }
        let mut status = 0;
        // SAFETY: the call writes one number.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0);
    }

    #[test]
    fn number_of_closed_lock_is_not_taken_for_another_socket() {
        in_child(|| {
            let (one, other) = (listener("one"), listener("other"));
            let replace = |make: &dyn Fn() -> OwnedFd| {
                // SAFETY: the test closes what the guard owns, whose code is to cope with that.
                drop(unsafe { OwnedFd::from_raw_fd(one.as_raw_fd()) });
                let made = make();
                assert_eq!(made.as_raw_fd(), one.as_raw_fd());
                made
            };
            // A socket of another lock.
            let copy = replace(&|| other.try_clone().unwrap());
            assert!(!one.is_own());
            drop(copy);
            // And one of the same name, for another guard.
            let copy = unguarded(|| other.try_clone()).unwrap();
            assert_eq!(copy.as_raw_fd(), one.as_raw_fd());
            assert!(!one.note.is_of(one.turn));
            drop(one);
            assert!(rustix::fs::fstat(&copy).is_ok(), "it is still open");
            assert!(other.is_own());
        });
    }

    #[test]
    fn child_forked_while_its_thread_begins_a_claim_can_fork_again() {
        install();
        // As in a signal handler, between the two steps of a claim.
        OWN.set(OWN.get() + CLAIM);
        in_child(|| {
            // SAFETY: the alarm ends a child that waits for ever.
            unsafe { libc::alarm(20) };
            COUNTS.fetch_add(CLAIM, Ordering::SeqCst);
            drop(Claim(PhantomData));
            in_child(|| {});
        });
        OWN.set(OWN.get() - CLAIM);
    }
}
