//! Descriptors that belong to locks: a forked child does not keep them, and another file is never
//! mistaken for one.
//!
//! # Forks
//! A lock lives in a descriptor, and `fork` copies descriptors. A child that outlives its parent
//! would keep the parent's lock, and a name would stay taken after its release while the child
//! lives. Programs started with exec are no problem, because every descriptor here is
//! close-on-exec. For a plain fork, a handler registered with [pthread_atfork(3)] runs in the child
//! and replaces every [`ForkGuarded`] descriptor with an inert pipe end. The child's copies of the
//! guards stay valid objects. Their descriptors close as usual and lock nothing.
//!
//! A thread that makes or closes such a descriptor has a *claim* meanwhile. A fork waits until no
//! other thread has a claim, and a claim waits until no other thread forks. A thread never waits
//! for itself: a signal handler may fork while its thread has a claim. Both waits sleep after some
//! yields, because the other thread may need this processor. A process made with a raw `clone`
//! system call runs no handlers and is not covered.
//!
//! # Foreign closes
//! A program may close descriptors that it did not open, with close_range(2) or in a loop. It may
//! then open files that get the same numbers. So lockkit notes each descriptor by its number, and
//! each note of a number has its own sequence number. If a descriptor outlives the call that made
//! it, its note also has the device and inode of its file, or the name of its socket.
//! [`ForkGuarded::is_own`] compares all of these. A descriptor that is not its owner's any more is
//! not closed, not used, and not replaced in a forked child. A close during a call of lockkit is
//! not always noticed.
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

/// The number of forks between the first process that used lockkit and this process.
static GENERATION: AtomicU32 = AtomicU32::new(0);

/// Claims, in multiples of [`CLAIM`], and forks in progress, in multiples of [`FORK`].
static COUNTS: AtomicU64 = AtomicU64::new(0);
const CLAIM: u64 = 1;
const FORK: u64 = 1 << 32;

thread_local! {
    /// This thread's part of [`COUNTS`]. It has no destructor, so it exists in every handler.
    static OWN: Cell<u64> = const { Cell::new(0) };
}

const fn claims(counts: u64) -> u64 {
    counts % FORK
}

const fn forks(counts: u64) -> u64 {
    counts / FORK
}

/// Delays forks of other threads.
#[derive(Debug)]
struct Claim(PhantomData<*const ()>);

impl Claim {
    fn take() -> Self {
        install();
        // This thread's part is never too small: a fork from a signal handler at any point here
        // must not wait for a claim of its own thread.
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

/// Subtracts a claim from [`COUNTS`], unless there is none: a forked child starts with none, even
/// if its thread has one.
fn uncount_claim() {
    let without = |counts: u64| (claims(counts) > 0).then_some(counts.wrapping_sub(CLAIM));
    let _ = COUNTS.fetch_update(Ordering::SeqCst, Ordering::Relaxed, without);
}

/// The pause with which threads wait for each other here. It uses only what a fork handler may use.
#[derive(Default)]
struct Pause(u32);

impl Pause {
    /// The number of pauses that only yield: usually the other thread is almost done.
    const YIELDS: u32 = 50;

    /// A real-time thread that only yields would keep a thread of a lower class off its processor.
    fn sleep(&mut self) {
        match self.0.checked_sub(Self::YIELDS) {
            None => std::thread::yield_now(),
            Some(slept) => std::thread::sleep(Duration::from_micros(50 << slept.min(4))),
        }
        self.0 = self.0.saturating_add(1);
    }
}

/// The information about a descriptor number.
struct Note {
    /// The number of notes so far, in multiples of [`SEQUENCE`], and the kind of the latest note:
    /// [`FREE`], [`GUARDED`] or [`KEPT`].
    state: AtomicU64,
    device: AtomicU64,
    inode: AtomicU64,
}

const SEQUENCE: u64 = 4;
/// The number belongs to no lock.
const FREE: u64 = 0;
/// A forked child gets an inert descriptor instead.
const GUARDED: u64 = 1;
/// A forked child keeps it.
const KEPT: u64 = 2;

/// In less than this many nanoseconds no program closes a file and opens another: that takes two
/// system calls, and the second one looks up a name.
#[cfg(target_os = "linux")]
const MIN_REPLACEMENT_NANOS: u64 = 200;

/// The identity of a file: its device and inode.
type Identity = (u64, u64);
/// The identity of a descriptor that does not outlive the call that made it, or that the system did
/// not describe. Such a descriptor counts as its owner's.
const UNKNOWN: Identity = (0, 0);
/// Replaces the device for a socket that is identified by its name, which takes no system call to
/// note. The hash of the name replaces the inode.
#[cfg(target_os = "linux")]
const BY_NAME: u64 = u64::MAX;

impl Note {
    fn identity(&self) -> Identity {
        (
            self.device.load(Ordering::Relaxed),
            self.inode.load(Ordering::Relaxed),
        )
    }

    fn set_identity(&self, (device, inode): Identity) {
        self.device.store(device, Ordering::Relaxed);
        self.inode.store(inode, Ordering::Relaxed);
    }

    /// Notes a descriptor that the kernel has just given to this thread, and returns its sequence
    /// number.
    fn begin(&self, identity: Identity) -> u64 {
        self.set_identity(identity);
        let sequence = self.state.load(Ordering::Relaxed) / SEQUENCE + 1;
        self.state
            .store(sequence * SEQUENCE + GUARDED, Ordering::Release);
        sequence
    }

    /// Whether the number still belongs to a lock, and its note has this sequence number.
    fn is_of(&self, sequence: u64) -> bool {
        let state = self.state.load(Ordering::Acquire);
        state / SEQUENCE == sequence && state % SEQUENCE != FREE
    }

    /// Changes the kind, unless the number has been noted again.
    fn set(&self, sequence: u64, kind: u64) {
        let set = |state: u64| (state / SEQUENCE == sequence).then_some(sequence * SEQUENCE + kind);
        let _ = self
            .state
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, set);
    }
}

/// The notes by number, in tables of growing length. The first table has [`FIRST`] notes, and each
/// further table has twice as many as the one before. Tables are made on demand and never freed.
static NOTES: [AtomicPtr<Note>; TABLES] = [const { AtomicPtr::new(ptr::null_mut()) }; TABLES];
const FIRST: usize = 64;
/// Enough tables for every number.
const TABLES: usize = (RawFd::BITS - FIRST.ilog2()) as usize;

/// Returns the length of a table.
const fn length(table: usize) -> usize {
    FIRST << table
}

/// Returns the notes of a table, if the table is made.
fn notes(table: usize) -> Option<&'static [Note]> {
    let start = NOTES[table].load(Ordering::Acquire);
    // SAFETY: the pointer is not null, so `make` stored it: the table has this length and is never
    // freed. A `Note` consists of atomic integers, for which all zeros is a value.
    (!start.is_null()).then(|| unsafe { slice::from_raw_parts(start, length(table)) })
}

#[cold]
fn make(table: usize) -> &'static [Note] {
    let Ok(layout) = Layout::array::<Note>(length(table)) else {
        unreachable!("the longest table fits the memory")
    };
    // SAFETY: a table has at least one note, so the layout is not empty.
    let fresh = unsafe { alloc_zeroed(layout) }.cast::<Note>();
    if fresh.is_null() {
        handle_alloc_error(layout);
    }
    let swapped =
        NOTES[table].compare_exchange(ptr::null_mut(), fresh, Ordering::AcqRel, Ordering::Acquire);
    if swapped.is_err() {
        // SAFETY: `fresh` is from `alloc_zeroed` with this layout, and no other thread knows it.
        unsafe { dealloc(fresh.cast(), layout) };
    }
    match notes(table) {
        Some(made) => made,
        None => unreachable!("the exchange has put a table there, or found one"),
    }
}

/// Returns the note of a number.
fn note(descriptor: BorrowedFd<'_>) -> &'static Note {
    let at = descriptor.as_raw_fd() as usize + FIRST;
    let table = (at.ilog2() - FIRST.ilog2()) as usize;
    let notes = notes(table).unwrap_or_else(|| make(table));
    &notes[at - length(table)]
}

/// Returns every note of a number that belongs to a lock, with the number.
fn noted() -> impl Iterator<Item = (RawFd, &'static Note)> {
    let tables = (0..TABLES).filter_map(|table| Some((table, notes(table)?)));
    let all = tables.flat_map(|(table, notes)| (length(table) - FIRST..).zip(notes));
    all.map(|(number, note)| (number as RawFd, note))
}

/// Returns the identity of an open file, or the error of the system.
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

/// The inode of a file without its own inode (an event, an epoll, an inotify) that does not have
/// lockkit's mark. All files of this kind share an inode.
#[cfg(target_os = "linux")]
const ANONYMOUS: u64 = u64::MAX;
/// The signal number that marks the file (`F_SETSIG`). The kernel sends no signal: that also takes
/// `O_ASYNC`, and then no program has use for this signal.
#[cfg(target_os = "linux")]
const MARK: i32 = libc::SIGSYS;
/// From [fcntl(2)](https://man7.org/linux/man-pages/man2/fcntl.2.html); `libc` does not have them.
#[cfg(target_os = "linux")]
const F_SETSIG: i32 = 10;
#[cfg(target_os = "linux")]
const F_GETSIG: i32 = 11;

#[cfg(target_os = "linux")]
fn is_marked(descriptor: BorrowedFd<'_>) -> bool {
    // SAFETY: the call reads a number of the open file, for any descriptor.
    unsafe { libc::fcntl(descriptor.as_raw_fd(), F_GETSIG) == MARK }
}

#[cfg(target_os = "linux")]
fn mark(descriptor: BorrowedFd<'_>) {
    // SAFETY: the call sets a number of the open file, which belongs to lockkit.
    unsafe { libc::fcntl(descriptor.as_raw_fd(), F_SETSIG, MARK) };
}

/// Whether the descriptor is open and has that identity. If the system does not report it, the
/// answer is yes, because leaving the descriptor open would keep a lock.
fn is(descriptor: BorrowedFd<'_>, noted: Identity) -> bool {
    match noted {
        UNKNOWN => true,
        #[cfg(target_os = "linux")]
        (BY_NAME, hash) => super::socket_name::has_name(descriptor, hash),
        noted => {
            identity(descriptor).map_or_else(|error| error != Errno::BADF, |found| found == noted)
        }
    }
}

/// A descriptor that holds a lock, or a place in the queue for a lock. A forked child gets an inert
/// descriptor instead.
///
/// Dropping it closes the descriptor, unless its number refers to another file by then.
#[derive(Debug)]
pub(crate) struct ForkGuarded<T: AsFd = OwnedFd> {
    descriptor: ManuallyDrop<T>,
    note: &'static Note,
    sequence: u64,
}

impl std::fmt::Debug for Note {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Note").finish_non_exhaustive()
    }
}

impl<T: AsFd> ForkGuarded<T> {
    /// Makes a descriptor with `make` and guards it, with no fork in between.
    pub(crate) fn new<E>(make: impl FnOnce() -> Result<T, E>) -> Result<Self, E> {
        Self::known_as(make, UNKNOWN)
    }

    fn known_as<E>(make: impl FnOnce() -> Result<T, E>, identity: Identity) -> Result<Self, E> {
        let _claim = Claim::take();
        let descriptor = make()?;
        let note = note(descriptor.as_fd());
        let sequence = note.begin(identity);
        Ok(Self {
            descriptor: ManuallyDrop::new(descriptor),
            note,
            sequence,
        })
    }

    /// Notes the identity of the file, for a descriptor that outlives the call that made it.
    pub(crate) fn know(self) -> Self {
        #[cfg(target_os = "linux")]
        if identity(self.as_fd()).is_ok_and(|(_, inode)| inode == ANONYMOUS) {
            mark(self.as_fd());
        }
        let identity = identity(self.as_fd()).unwrap_or(UNKNOWN);
        self.know_as(identity)
    }

    /// Notes the given device and inode, as [`know`](Self::know) does, for a caller that has
    /// already read them.
    pub(crate) fn know_as(self, identity: Identity) -> Self {
        self.note.set_identity(identity);
        self
    }

    /// Lets forked children keep the descriptor from now on.
    pub(crate) fn keep_across_fork(self) -> Self {
        self.note.set(self.sequence, KEPT);
        self
    }

    /// Whether the number still refers to the file that was opened under it. The program may have
    /// closed the file, and the kernel may have given the number to another file.
    pub(crate) fn is_own(&self) -> bool {
        self.note.is_of(self.sequence) && is(self.descriptor.as_fd(), self.note.identity())
    }

    /// Checks [`is_own`](Self::is_own) at `now`, for a descriptor that was this lock's at `then`.
    /// Both times are [`nanos`](super::clock::nanos).
    #[cfg(target_os = "linux")]
    #[inline]
    pub(crate) fn is_own_since(&self, then: u64, now: u64) -> bool {
        now.wrapping_sub(then) < MIN_REPLACEMENT_NANOS || self.is_own()
    }

    /// Closes the descriptor as a drop does, just after [`is_own`](Self::is_own) was true.
    #[cfg(target_os = "linux")]
    pub(crate) fn close(self) {
        ManuallyDrop::new(self).close_unless_noted_again();
    }

    fn close_unless_noted_again(&mut self) {
        let _claim = Claim::take();
        if self.note.is_of(self.sequence) {
            // SAFETY: dropped once, for `self` is not used afterwards.
            unsafe { ManuallyDrop::drop(&mut self.descriptor) };
            // After the close, so that a child that a signal handler forks in between finds the
            // note.
            self.note.set(self.sequence, FREE);
        }
    }
}

#[cfg(target_os = "linux")]
impl ForkGuarded {
    /// Makes a socket as [`new`](Self::new) does. `make` has given it the name with this hash,
    /// which identifies it from then on.
    pub(crate) fn named<E>(
        hash: u64,
        make: impl FnOnce() -> Result<OwnedFd, E>,
    ) -> Result<Self, E> {
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
            false => self.note.set(self.sequence, FREE),
        }
    }
}

/// Makes a descriptor for the caller's own use. If the program closed a guard's descriptor that had
/// this number, that guard no longer counts the number as its own, whatever the new descriptor
/// refers to.
pub(crate) fn unguarded<T: AsFd, E>(make: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    let _claim = Claim::take();
    let descriptor = make()?;
    let note = note(descriptor.as_fd());
    let sequence = note.begin(UNKNOWN);
    note.set(sequence, FREE);
    Ok(descriptor)
}

/// Returns the error of a release whose descriptor is not [its own](ForkGuarded::is_own) any more.
pub(crate) fn closed_by_program() -> io::Error {
    io::Error::other(
        "this process has closed the descriptor of the lock, and so released it earlier",
    )
}

/// Delays forks of other threads until it is dropped. It protects a mutex that a forked child
/// needs: the child must not inherit it locked by a thread that the child does not have. The caller
/// makes it before it locks the mutex. No guarded descriptor should be made or dropped meanwhile,
/// because that makes forks wait longer.
#[derive(Debug)]
pub(crate) struct NoFork(#[allow(dead_code)] Claim);

impl NoFork {
    pub(crate) fn hold() -> Self {
        Self(Claim::take())
    }
}

/// A process, as distinguished from the processes that it is forked from and that are forked from
/// it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ProcessId(u32);

impl ProcessId {
    /// Returns this process.
    #[inline]
    pub(crate) fn current() -> Self {
        install();
        Self(GENERATION.load(Ordering::Relaxed))
    }

    /// Returns this process, for code that runs after a first call of [`current`](Self::current).
    #[cfg(target_os = "linux")]
    #[inline]
    pub(crate) fn known() -> Self {
        Self(GENERATION.load(Ordering::Relaxed))
    }

    /// Returns the number of forks between the first process that used lockkit and this one.
    #[cfg(target_os = "linux")]
    #[inline]
    pub(crate) fn number(self) -> u32 {
        self.0
    }

    /// Returns whether it is this process. The handlers that count forks were installed when the
    /// value was made.
    #[inline]
    pub(crate) fn is_current(self) -> bool {
        self.0 == GENERATION.load(Ordering::Relaxed)
    }
}

#[inline]
fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // Registration fails only without memory for the list of handlers. Then a forked child
        // keeps inherited descriptors, as with every other lock library. SAFETY: the three handlers
        // are functions of this program, sound to call at any time.
        let _ = unsafe {
            libc::pthread_atfork(
                Some(before_fork),
                Some(after_fork_in_parent),
                Some(after_fork_in_child),
            )
        };
    });
}

/// Waits until no other thread has a claim. It does not wait for this thread, whose signal handler
/// may be forking.
unsafe extern "C" fn before_fork() {
    OWN.set(OWN.get() + FORK);
    COUNTS.fetch_add(FORK, Ordering::SeqCst);
    let mut pause = Pause::default();
    while claims(COUNTS.load(Ordering::SeqCst)) > claims(OWN.get()) {
        pause.sleep();
    }
}

unsafe extern "C" fn after_fork_in_parent() {
    // None was counted if the handlers were registered during this fork.
    if forks(OWN.get()) > 0 {
        COUNTS.fetch_sub(FORK, Ordering::SeqCst);
        OWN.set(OWN.get() - FORK);
    }
}

/// Calls only what POSIX allows after a fork of a process with threads: atomics, `pipe`, `fstat`,
/// `getsockname`, `dup2`, `fcntl`, `close`.
unsafe extern "C" fn after_fork_in_child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
    if forks(OWN.get()) > 0 {
        OWN.set(OWN.get() - FORK);
    }
    // Only this thread exists in the child. If a signal handler forks, its thread may be about to
    // count its claim, or may have just subtracted it. So the claims of this thread count as none.
    COUNTS.store(0, Ordering::SeqCst);
    let inert = rustix::pipe::pipe().ok().map(|(reader, _writer)| reader);
    let inert_identity = inert
        .as_ref()
        .and_then(|inert| identity(inert.as_fd()).ok())
        .unwrap_or(UNKNOWN);
    for (number, note) in noted() {
        let state = note.state.load(Ordering::Relaxed);
        if state % SEQUENCE != GUARDED {
            continue;
        }
        // SAFETY: the number is only inspected, which harms no file, whatever the number refers to.
        let is_own = is(unsafe { BorrowedFd::borrow_raw(number) }, note.identity());
        if is_own && replace_with_inert(number, inert.as_ref()) {
            note.set_identity(inert_identity);
        } else {
            note.set(state / SEQUENCE, FREE);
        }
    }
}

/// Replaces a lock's descriptor with the inert one, or closes it. Returns whether it was replaced.
fn replace_with_inert(number: RawFd, inert: Option<&OwnedFd>) -> bool {
    // SAFETY: the number is noted as a lock's, and refers to its file. The guard that owns it is a
    // copy, and this handler, the only code that runs, may act for the guard. The descriptor stays
    // open unless no inert one could be made: then it is closed here and noted as free, so that the
    // guard does not close it again.
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
    use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketType};

    use super::super::socket_name::hash_of;
    use super::*;

    fn listener(name: &str) -> ForkGuarded {
        let name = format!("lockkit-test-fork-{name}-{}", std::process::id());
        let address = SocketAddrUnix::new_abstract_name(name.as_bytes()).unwrap();
        let listening = ForkGuarded::named(hash_of(&address), || {
            let socket = net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None)?;
            net::bind(&socket, &address)?;
            net::listen(&socket, 1).map(|()| socket)
        });
        listening.unwrap()
    }

    /// Runs `what` in a child without other threads, which would take the numbers of descriptors
    /// that it closes.
    fn in_child(what: impl FnOnce()) {
        // SAFETY: the child allocates. In glibc no other thread of this process keeps the
        // allocator's lock over a fork.
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
    fn reused_number_of_closed_lock_is_not_own() {
        in_child(|| {
            let (one, other) = (listener("one"), listener("other"));
            let replace = |make: &dyn Fn() -> OwnedFd| {
                // SAFETY: the test closes the descriptor that the guard owns, and the guard's code
                // must handle that.
                drop(unsafe { OwnedFd::from_raw_fd(one.as_raw_fd()) });
                let made = make();
                assert_eq!(made.as_raw_fd(), one.as_raw_fd());
                made
            };
            // A socket of another lock.
            let copy = replace(&|| other.try_clone().unwrap());
            assert!(!one.is_own());
            drop(copy);
            // A socket of the same name, for another guard.
            let copy = unguarded(|| other.try_clone()).unwrap();
            assert_eq!(copy.as_raw_fd(), one.as_raw_fd());
            assert!(!one.note.is_of(one.sequence));
            drop(one);
            assert!(rustix::fs::fstat(&copy).is_ok(), "it is still open");
            assert!(other.is_own());
        });
    }

    #[test]
    fn child_forked_during_claim_can_fork_again() {
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
