//! Tests of the lease and its file store together, within one process.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use super::store::file::format::{self, Content, Record, SIZE};
use super::*;
use crate::base::cancel::CancelToken;
use crate::sys::flock;

const MS: Duration = Duration::from_millis(1);

/// A path below a new directory in memory, which is removed at the end.
struct TestDir(PathBuf);

impl TestDir {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let base = if cfg!(target_os = "linux") { PathBuf::from("/dev/shm") } else { std::env::temp_dir() };
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = base.join(format!("lockkit-lease-{}-{count}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn path(&self) -> PathBuf {
        self.0.join("lease")
    }

    fn lease(&self) -> LeaseBuilder {
        Lease::file(self.path()).ttl(MS * 1000).heartbeat(MS * 50)
    }

    fn record(&self) -> Record {
        match format::parse(&fs::read(self.path()).unwrap()) {
            Content::Ours(record) => *record,
            other => panic!("{other:?}"),
        }
    }

    fn write(&self, mut record: Record) {
        fs::write(self.path(), record.seal()).unwrap();
    }
}

impl Drop for TestDir {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// Returns an owner on another host, whose liveness is unknown here.
fn stranger() -> Owner {
    Owner { host: Some("elsewhere".into()), boot: Some(7), ..Owner::current() }
}

fn held_by(owner: &Owner, token: u64) -> Record {
    Record::held(&ClaimId::random(), token, MS * 300, MS * 50, owner)
}

fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < MS * 5000, "{what}");
        thread::sleep(MS);
    }
}

#[test]
fn tokens_grow_and_the_file_stays() {
    let directory = TestDir::new();
    let lease = directory.lease().build().unwrap();
    let mut last = lease.try_lock().unwrap().token();
    assert!(last > 1_700_000_000_000_000, "it begins at the time");
    for _ in 0..100 {
        let guard = lease.try_lock().unwrap();
        assert!(guard.token() > last);
        assert!(guard.recovered().is_none());
        last = guard.token();
        guard.release().unwrap();
    }
    assert_eq!(lease.status().unwrap(), LeaseStatus::Free);
    assert_eq!(fs::read(directory.path()).unwrap().len(), SIZE);
}

#[test]
fn no_deletion_and_no_restored_backup_takes_tokens_back() {
    let directory = TestDir::new();
    let lease = directory.lease().build().unwrap();
    let token = || lease.try_lock().unwrap().token();
    let mut last = token();
    let backup = fs::read(directory.path()).unwrap();
    for harm in [0, 1, 2] {
        for _ in 0..harm * 5 {
            let next = token();
            assert!(next > last, "{next} after {last}");
            last = next;
        }
        fs::write(directory.path(), &backup).unwrap();
        let next = token();
        assert!(next > last, "{next} after {last} and a restored backup");
        fs::remove_file(directory.path()).unwrap();
        let after = token();
        assert!(after > next, "{after} after {next} and a deletion");
        last = after;
    }
    // A token below the time, of an owner of this boot.
    directory.write(held_by(&Owner::ended(1), 41));
    assert!(token() > last);
}

#[test]
fn token_ahead_of_clock_still_grows() {
    let directory = TestDir::new();
    let ahead = 1 << 53;
    directory.write(held_by(&Owner::ended(1), ahead));
    let lease = directory.lease().build().unwrap();
    assert_eq!(lease.try_lock().unwrap().token(), ahead + 1);
    assert_eq!(lease.try_lock().unwrap().token(), ahead + 2);
    directory.write(held_by(&Owner::ended(1), 1 << 54));
    let error = lease.try_lock().unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::LayoutMismatch { .. }), "{error}");
    assert!(error.to_string().contains("centuries ahead"), "{error}");
}

#[test]
fn beats_keep_it_beyond_its_ttl_and_a_second_taker_out() {
    let directory = TestDir::new();
    let lease = directory.lease().build().unwrap();
    let guard = lease.lock().unwrap();
    let error = lease.lock_for(MS * 1500).unwrap_err();
    assert!(error.is_timeout());
    assert_eq!(error.owner().unwrap().pid(), std::process::id());
    guard.check().unwrap();
    assert!(guard.remaining() > Duration::ZERO);
    assert!(directory.record().beat() >= 5);
}

#[test]
fn silent_remote_holder_taken_over_after_ttl() {
    let directory = TestDir::new();
    directory.write(held_by(&stranger(), 41));
    let began = Instant::now();
    let lease = directory.lease().build().unwrap();
    assert!(lease.try_lock().unwrap_err().is_held());
    let guard = lease.lock_for(MS * 5000).unwrap();
    let took = began.elapsed();
    assert!(took >= MS * 300 && took < MS * 600, "{took:?}");
    assert!(guard.token() > 1_700_000_000_000_000);
    assert_eq!(guard.recovered().unwrap().owner().unwrap().host(), Some("elsewhere"));
}

#[test]
fn programs_that_try_once_take_over_in_the_end() {
    let directory = TestDir::new();
    directory.write(held_by(&stranger(), 41));
    let try_once = || {
        let lease = directory.lease().build().unwrap();
        assert!(matches!(lease.status().unwrap(), LeaseStatus::Held(_)));
        lease.try_lock()
    };
    let began = Instant::now();
    let mut tries = 0;
    let _guard = loop {
        match try_once() {
            Ok(guard) => break guard,
            Err(error) => assert!(error.is_held()),
        }
        tries += 1;
        thread::sleep(MS * 20);
    };
    let took = began.elapsed();
    assert!(took >= MS * 300 && took < MS * 600 && tries > 3, "{took:?}, {tries}");
}

#[test]
fn a_dead_owner_is_taken_over_at_once() {
    let directory = TestDir::new();
    directory.write(held_by(&Owner::ended(1), 41));
    let guard = directory.lease().build().unwrap().try_lock().unwrap();
    assert_eq!(guard.recovered().unwrap().owner().unwrap().pid(), 1);
}

#[test]
fn damage_is_held_while_fresh_and_then_reclaimed() {
    let zeros = "\0".repeat(SIZE);
    for damaged in ["", &zeros, "lockkit lease 1\n", "lockkit"] {
        let directory = TestDir::new();
        fs::write(directory.path(), damaged).unwrap();
        let lease = directory.lease().invalid_pid_lock_stale_threshold(MS * 200).build().unwrap();
        assert!(lease.try_lock().unwrap_err().is_held());
        assert_eq!(fs::read(directory.path()).unwrap(), damaged.as_bytes(), "it is left as it is");
        let began = Instant::now();
        let guard = lease.lock_for(MS * 5000).unwrap();
        assert!(began.elapsed() < MS * 500);
        assert!(guard.recovered().is_some() && guard.token() > 1_700_000_000_000_000);
    }
}

#[test]
fn foreign_file_is_refused_at_once_and_stays() {
    let directory = TestDir::new();
    let lease = directory.lease().invalid_pid_lock_stale_threshold(MS * 50).build().unwrap();
    let seen = LeaseSnapshot::new(format::fingerprint(b"4242\n"));
    for foreign in ["4242\n", "\n", "{}", &"x".repeat(3000), &"\0".repeat(SIZE + 1)] {
        fs::write(directory.path(), foreign).unwrap();
        let began = Instant::now();
        let refused = [lease.lock().err(), lease.try_lock().err(), lease.status().err(), lease.evict(&seen).err()]
            .map(Option::unwrap);
        assert!(began.elapsed() < MS * 1000);
        for error in refused {
            assert!(matches!(error.kind(), ErrorKind::NotALease { .. }), "{error}");
        }
        assert_eq!(fs::read(directory.path()).unwrap(), foreign.as_bytes());
    }
}

#[test]
fn foreign_file_in_place_of_a_held_lease_is_not_written() {
    let directory = TestDir::new();
    let (tell, told) = mpsc::channel();
    let lease = directory.lease().ttl(MS * 400).on_lost(move |loss| tell.send(loss.reason.to_string()).unwrap());
    let lease = lease.build().unwrap();
    for releases in [true, false] {
        let guard = lease.lock().unwrap();
        fs::write(directory.path(), "notes").unwrap();
        if releases {
            let error = guard.release().unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::NotALease { .. }), "{error}");
        } else {
            let reason = told.recv_timeout(MS * 5000).unwrap();
            assert!(reason.contains("is not a lease"), "{reason}");
            assert!(!guard.is_held());
        }
        assert_eq!(fs::read(directory.path()).unwrap(), b"notes");
        fs::remove_file(directory.path()).unwrap();
    }
}

#[test]
fn damage_is_held_for_longer_than_its_holder_takes_to_mend_it() {
    let directory = TestDir::new();
    let lease = Lease::file(directory.path()).ttl(MS * 30_000).heartbeat(MS * 10_000).build().unwrap();
    let guard = lease.lock().unwrap();
    fs::write(directory.path(), "lockkit lease 1\n").unwrap();
    assert!(lease.lock_for(MS * 2300).unwrap_err().is_timeout());
    assert!(guard.is_held());
}

#[test]
fn a_record_of_a_later_version_is_left_alone() {
    let directory = TestDir::new();
    fs::write(directory.path(), "lockkit lease 2\n").unwrap();
    let lease = directory.lease().build().unwrap();
    for error in [lease.try_lock().unwrap_err(), lease.status().unwrap_err()] {
        assert!(matches!(error.kind(), ErrorKind::LayoutMismatch { .. }), "{error:?}");
    }
    assert_eq!(fs::read(directory.path()).unwrap(), b"lockkit lease 2\n");
}

#[test]
fn a_holder_mends_a_record_that_was_spoilt_or_deleted() {
    let directory = TestDir::new();
    let guard = directory.lease().build().unwrap().lock().unwrap();
    let spoil: [&dyn Fn(); 4] = [
        &|| fs::write(directory.path(), "lockkit lease 1\nsum").unwrap(),
        &|| fs::write(directory.path(), "").unwrap(),
        &|| fs::remove_file(directory.path()).unwrap(),
        &|| {
            fs::write(directory.0.join("other"), "\0\0").unwrap();
            fs::rename(directory.0.join("other"), directory.path()).unwrap();
        },
    ];
    for spoil in spoil {
        spoil();
        eventually("it is mended", || {
            fs::read(directory.path()).is_ok_and(|bytes| matches!(format::parse(&bytes), Content::Ours(_)))
        });
        assert_eq!(directory.record().token(), guard.token());
    }
    guard.release().unwrap();
}

#[test]
fn a_beat_is_never_written_twice() {
    let directory = TestDir::new();
    let guard = directory.lease().build().unwrap().lock().unwrap();
    let old = directory.record();
    eventually("it beats", || directory.record().beat() > old.beat() + 2);
    let last = directory.record().beat();
    directory.write(old);
    eventually("it beats", || directory.record().beat() > last);
    drop(guard);
}

#[test]
fn a_foreign_record_ends_it_once_and_is_not_touched() {
    let directory = TestDir::new();
    let (tell, told) = mpsc::channel();
    let lease = directory.lease().on_lost(move |loss| tell.send(loss.clone()).unwrap()).build().unwrap();
    let guard = lease.lock().unwrap();
    let signal = guard.lost();
    let mut foreign = held_by(&stranger(), 3);
    let foreign_bytes = *foreign.seal();
    directory.write(foreign);
    let loss = told.recv_timeout(MS * 2000).unwrap();
    assert!(matches!(&loss.reason, LossReason::TakenOver { by: Some(by) } if by.host() == Some("elsewhere")));
    assert_eq!(loss.token, guard.token());
    assert!(!guard.is_held() && signal.is_lost() && signal.token().is_cancelled());
    assert_eq!(guard.remaining(), Duration::ZERO);
    assert!(matches!(guard.check().unwrap_err().kind(), ErrorKind::LeaseLost { .. }));
    assert!(matches!(guard.release().unwrap_err().kind(), ErrorKind::LeaseLost { .. }));
    assert!(matches!(signal.reason(), Some(LossReason::TakenOver { .. })), "for ever");
    assert_eq!(fs::read(directory.path()).unwrap(), foreign_bytes);
    assert!(told.recv_timeout(MS * 100).is_err(), "told twice");
}

#[test]
fn a_release_reaches_a_waiter_at_once() {
    let directory = TestDir::new();
    let lease = directory.lease().build().unwrap();
    let mut fastest = Duration::MAX;
    for _ in 0..10 {
        let guard = lease.lock().unwrap();
        let waiter = thread::spawn({
            let lease = lease.clone();
            move || lease.lock().map(|guard| (Instant::now(), guard))
        });
        thread::sleep(MS * 20);
        let released = Instant::now();
        guard.release().unwrap();
        let (taken, _guard) = waiter.join().unwrap().unwrap();
        fastest = fastest.min(taken - released);
    }
    // A waiter that only polls would take up to 50 ms; on an idle machine the hand-over takes less than one.
    assert!(!cfg!(target_os = "linux") || fastest < MS * 20, "{fastest:?}");
}

#[test]
fn a_cancelled_wait_ends_at_once() {
    let directory = TestDir::new();
    let lease = directory.lease().build().unwrap();
    let _guard = lease.lock().unwrap();
    let stop = CancelToken::new();
    let waiter = thread::spawn({
        let (lease, wait) = (lease.clone(), Wait::forever().or_cancelled(&stop));
        move || lease.acquire(&wait).map(drop).map_err(|error| (error.is_cancelled(), Instant::now()))
    });
    thread::sleep(MS * 30);
    let cancelled = Instant::now();
    stop.cancel();
    let (is_cancelled, ended) = waiter.join().unwrap().unwrap_err();
    assert!(is_cancelled && ended - cancelled < MS * 100);
}

#[test]
fn only_the_holder_that_was_seen_is_evicted() {
    let directory = TestDir::new();
    let lease = directory.lease().build().unwrap();
    let first = lease.lock().unwrap();
    let LeaseStatus::Held(seen) = lease.status().unwrap() else { panic!("it is held") };
    assert_eq!((seen.token(), seen.owner().unwrap().pid()), (Some(first.token()), std::process::id()));
    drop(first);
    let second = lease.lock().unwrap();
    assert!(!lease.evict(&seen).unwrap());
    let LeaseStatus::Held(seen) = lease.status().unwrap() else { panic!("it is held") };
    assert!(lease.evict(&seen).unwrap());
    let third = lease.try_lock().unwrap();
    assert!(third.token() > second.token());
    let reason = second.lost().wait(&Wait::at_most(MS * 2000)).unwrap();
    assert!(matches!(reason, LossReason::TakenOver { by: Some(_) }));
    assert!(third.is_held());
    drop(third);
    fs::write(directory.path(), "lock").unwrap();
    let LeaseStatus::Held(seen) = lease.status().unwrap() else { panic!("it counts as held") };
    assert!(lease.evict(&seen).unwrap());
    assert!(lease.try_lock().is_ok());
}

#[test]
fn without_progress_it_is_lost_and_on_lost_may_panic() {
    let directory = TestDir::new();
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    let lease = directory.lease().require_progress(MS * 100).on_lost(|_| {
        CALLS.fetch_add(1, Ordering::Relaxed);
        std::panic::resume_unwind(Box::new(()));
    });
    let guard = lease.build().unwrap().lock().unwrap();
    let began = Instant::now();
    while began.elapsed() < MS * 600 {
        guard.progress();
        guard.check().unwrap();
        thread::sleep(MS * 10);
    }
    let reason = guard.lost().wait(&Wait::at_most(MS * 2000)).unwrap();
    assert!(matches!(reason, LossReason::Expired));
    eventually("on_lost is called", || CALLS.load(Ordering::Relaxed) == 1);
    assert!(directory.lease().build().unwrap().lock_for(MS * 2000).is_ok(), "the heartbeat goes on");
}

#[test]
fn a_callback_may_hold_another_lease() {
    let directory = TestDir::new();
    let path = directory.0.clone();
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        for n in 0..200 {
            let inner = Lease::file(path.join(format!("inner-{n}"))).build().unwrap();
            let inner = (n % 3 == 0).then(|| inner.lock().unwrap());
            let outer = Lease::file(path.join(format!("outer-{n}"))).ttl(MS * 60_000).heartbeat(MS * 20_000);
            let outer = outer.on_lost(move |_| assert!(inner.as_ref().is_none_or(LeaseGuard::is_held)));
            drop(outer.build().unwrap().lock().unwrap());
        }
        tell.send(()).unwrap();
    });
    told.recv_timeout(MS * 10_000).expect("the beats of ended leases go without a lock that a release needs");
}

#[test]
fn what_panics_when_it_is_dropped_costs_no_other_lease() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            assert!(thread::current().name() == Some("lockkit-lease"), "it is the heartbeat that drops it last");
            std::panic::resume_unwind(Box::new(()));
        }
    }
    let directory = TestDir::new();
    let bomb = Bomb;
    let lease = Lease::file(directory.0.join("bomb")).heartbeat(MS * 10).on_lost(move |_| _ = &bomb).build().unwrap();
    let guard = lease.lock().unwrap();
    drop(lease);
    drop(guard);
    thread::sleep(MS * 50);
    let guard = directory.lease().build().unwrap().lock().unwrap();
    thread::sleep(MS * 1200);
    guard.check().unwrap();
}

#[test]
#[cfg(unix)]
fn a_link_is_refused_and_so_is_what_is_no_file() {
    let directory = TestDir::new();
    let lease = directory.lease().build().unwrap();
    drop(lease.lock().unwrap());
    fs::hard_link(directory.path(), directory.0.join("second")).unwrap();
    assert!(matches!(lease.try_lock().unwrap_err().kind(), ErrorKind::Insecure { .. }));
    fs::remove_file(directory.path()).unwrap();
    std::os::unix::fs::symlink("second", directory.path()).unwrap();
    assert!(matches!(lease.try_lock().unwrap_err().kind(), ErrorKind::Insecure { .. }));
    assert!(matches!(lease.status().unwrap_err().kind(), ErrorKind::Insecure { .. }));
    fs::remove_file(directory.path()).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(directory.path()).status().unwrap().success());
    for error in [lease.try_lock().unwrap_err(), lease.status().unwrap_err(), lease.owner().unwrap_err()] {
        assert!(matches!(error.kind(), ErrorKind::Insecure { .. }), "{error:?}");
    }
    let directory_itself = Lease::file(&directory.0).build().unwrap();
    assert!(directory_itself.try_lock().is_err());
}

#[test]
fn stuck_record_flock_fails_acquire_and_release_in_time() {
    let directory = TestDir::new();
    let lease = directory.lease().build().unwrap();
    drop(lease.lock().unwrap());
    let stuck = fs::File::options().read(true).write(true).open(directory.path()).unwrap();
    flock::lock(&stuck, flock::Mode::Exclusive).unwrap();
    let began = Instant::now();
    assert!(lease.try_lock().unwrap_err().is_held());
    assert!(lease.lock_for(MS * 50).unwrap_err().is_timeout());
    assert!(began.elapsed() < MS * 300);
    drop(stuck);
    let guard = lease.lock_for(MS * 500).unwrap();
    let stuck = fs::File::options().read(true).write(true).open(directory.path()).unwrap();
    flock::lock(&stuck, flock::Mode::Exclusive).unwrap();
    let error = guard.release().unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Io { .. }), "{error:?}");
    drop(stuck);
    assert!(lease.lock_for(MS * 500).is_ok(), "the heartbeat made up for it");
}

#[test]
fn an_eviction_does_not_wait_longer_for_a_longer_ttl() {
    let directory = TestDir::new();
    let lease = directory.lease().ttl(MS * 60_000).build().unwrap();
    let _guard = lease.lock().unwrap();
    let LeaseStatus::Held(seen) = lease.status().unwrap() else { panic!("it is held") };
    let stuck = fs::File::options().read(true).write(true).open(directory.path()).unwrap();
    flock::lock(&stuck, flock::Mode::Exclusive).unwrap();
    let began = Instant::now();
    assert!(lease.evict(&seen).is_err());
    assert!(began.elapsed() < MS * 5000);
}

#[test]
#[cfg(unix)]
fn directories_are_made_on_request_with_their_modes() {
    use std::os::unix::fs::PermissionsExt;
    let directory = TestDir::new();
    let path = directory.0.join("a/b/lease");
    let error = Lease::file(&path).build().unwrap().lock().unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::Io { path, source, .. }
        if *path == directory.0.join("a/b") && source.kind() == std::io::ErrorKind::NotFound),
        "{error}"
    );
    assert!(!directory.0.join("a").exists());
    drop(Lease::file(&path).create_parents().build().unwrap().lock().unwrap());
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
}

/// A store in memory with a clock of its own, which fails as these fields say.
struct Faulty {
    clock: ManualClock,
    record: parking_lot::Mutex<(u64, Option<(ClaimId, Duration)>)>,
    fails: AtomicBool,
    panics: AtomicBool,
    /// The next grant is made, but its answer is lost.
    swallows: AtomicBool,
    /// The next grant follows an owner that died, and the answer comes a ttl late.
    stalls: AtomicBool,
    /// Attempts and renewals take as long as their deadline allows, and get no answer.
    hangs: AtomicBool,
    /// While this is set, renewals and releases do not return, whatever their deadline.
    freezes: AtomicBool,
    renewals: AtomicUsize,
    /// The claim of the last attempt.
    last: parking_lot::Mutex<Option<ClaimId>>,
    /// The last grant was abandoned, and an owner had died before.
    passes_on: AtomicBool,
}

impl Faulty {
    fn new(clock: &ManualClock) -> Arc<Self> {
        Arc::new(Self {
            clock: clock.clone(),
            record: Default::default(),
            fails: Default::default(),
            panics: Default::default(),
            swallows: Default::default(),
            stalls: Default::default(),
            hangs: Default::default(),
            freezes: Default::default(),
            renewals: Default::default(),
            last: Default::default(),
            passes_on: Default::default(),
        })
    }

    fn lease(self: &Arc<Self>) -> LeaseBuilder {
        Lease::with_store(self.clone(), "faulty").clock(Arc::new(self.clock.clone())).acquire_retry_delay(MS)
    }
}

impl Faulty {
    /// Does not return while `freezes` is set.
    fn is_asked(&self) {
        while self.freezes.load(Ordering::Relaxed) {
            thread::sleep(MS);
        }
    }
}

impl LeaseStore for Faulty {
    fn profile(&self) -> StoreProfile {
        StoreProfile::new(Durability::Memory)
    }

    fn try_acquire(
        &self,
        name: &LeaseName,
        claim: &ClaimId,
        ttl: Duration,
        by: Deadline,
    ) -> Result<Attempt, StoreError> {
        *self.last.lock() = Some(*claim);
        if self.hangs.load(Ordering::Relaxed) {
            thread::sleep(by.remaining());
            return Err(StoreError::unknown("no answer"));
        }
        if self.fails.load(Ordering::Relaxed) {
            return Err(StoreError::not_applied("told to"));
        }
        let (token, holder) = &mut *self.record.lock();
        let now = self.clock.now();
        match holder {
            Some((held, until)) if held != claim && *until > now => {
                return Ok(Attempt::Busy(LeaseSnapshot::new(*token).with_expires_in(*until - now)));
            }
            Some((held, _)) if held == claim => {}
            _ => *token += 1,
        }
        *holder = Some((*claim, now + ttl));
        let grant = Grant::new(name, claim, *token, ttl);
        let grant = if self.passes_on.swap(false, Ordering::Relaxed) { grant.recovered_from(None) } else { grant };
        if self.stalls.swap(false, Ordering::Relaxed) {
            self.clock.advance(ttl);
            return Ok(Attempt::Granted(grant.recovered_from(None)));
        }
        match self.swallows.swap(false, Ordering::Relaxed) {
            true => Err(StoreError::unknown("no answer")),
            false => Ok(Attempt::Granted(grant)),
        }
    }

    fn renew(&self, grant: &Grant, by: Deadline) -> Result<Renewal, StoreError> {
        self.renewals.fetch_add(1, Ordering::Relaxed);
        self.is_asked();
        if self.hangs.load(Ordering::Relaxed) {
            thread::sleep(by.remaining());
            return Err(StoreError::unknown("no answer"));
        }
        if self.panics.swap(false, Ordering::Relaxed) {
            std::panic::resume_unwind(Box::new(()));
        }
        if self.fails.load(Ordering::Relaxed) {
            return Err(StoreError::not_applied("told to"));
        }
        match &mut self.record.lock().1 {
            Some((claim, until)) if claim == grant.claim() => {
                *until = self.clock.now() + grant.ttl();
                Ok(Renewal::Extended { ttl: grant.ttl() })
            }
            _ => Ok(Renewal::Lost { by: None }),
        }
    }

    fn release(&self, grant: &Grant, _: Deadline) -> Result<Released, StoreError> {
        self.is_asked();
        let holder = &mut self.record.lock().1;
        match holder.take_if(|(claim, _)| claim == grant.claim()) {
            Some(_) => Ok(Released::Done),
            None => Ok(Released::NotMine),
        }
    }

    fn abandon(&self, grant: &Grant, by: Deadline) -> Result<Released, StoreError> {
        self.passes_on.store(grant.recovered().is_some(), Ordering::Relaxed);
        self.release(grant, by)
    }

    fn get(&self, _: &LeaseName, _: Deadline) -> Result<Option<LeaseSnapshot>, StoreError> {
        let (token, holder) = &*self.record.lock();
        Ok(holder.map(|(claim, _)| LeaseSnapshot::new(*token).with_claim(claim).with_token(*token)))
    }

    fn evict(&self, _: &LeaseName, seen: &LeaseSnapshot, _: Deadline) -> Result<Released, StoreError> {
        match self.record.lock().1.take_if(|(claim, _)| Some(*claim) == seen.claim()) {
            Some(_) => Ok(Released::Done),
            None => Ok(Released::NotMine),
        }
    }
}

#[test]
fn what_a_request_without_an_answer_has_taken_is_free_again() {
    let clock = ManualClock::new();
    let store = Faulty::new(&clock);
    let lease = store.lease().acquire_retry_limit(0).build().unwrap();
    let is_free = || store.record.lock().1.is_none();
    store.swallows.store(true, Ordering::Relaxed);
    assert!(matches!(lease.try_lock().unwrap_err().kind(), ErrorKind::Store { .. }));
    // By this clock the name would be held for ever.
    eventually("it is taken back", is_free);

    store.hangs.store(true, Ordering::Relaxed);
    assert!(matches!(lease.lock_for(MS).unwrap_err().kind(), ErrorKind::Store { .. }));
    store.hangs.store(false, Ordering::Relaxed);
    let claim = store.last.lock().unwrap();
    let late = store.try_acquire(&LeaseName::new("faulty").unwrap(), &claim, MS * 3000, Deadline::after(MS));
    assert!(matches!(late, Ok(Attempt::Granted(_))));
    clock.advance(MS * 250);
    eventually("it is taken back, though it was carried out late", is_free);

    let guard = lease.try_lock().unwrap();
    clock.advance(MS * 2900);
    eventually("it is renewed", || guard.remaining() > MS * 2900);
    assert!(guard.is_held() && !is_free(), "what was granted is left alone");
}

#[test]
fn retry_after_lost_answer_returns_same_grant() {
    let clock = ManualClock::new();
    let store = Faulty::new(&clock);
    store.swallows.store(true, Ordering::Relaxed);
    assert_eq!(store.lease().build().unwrap().try_lock().unwrap().token(), 1);
}

#[test]
fn acquire_after_late_answer_reports_recovery_once() {
    let clock = ManualClock::new();
    let store = Faulty::new(&clock);
    store.stalls.store(true, Ordering::Relaxed);
    let guard = store.lease().build().unwrap().lock().unwrap();
    assert!(guard.recovered().is_some() && guard.token() == 2);
    guard.release().unwrap();

    // If that is the last try, the next holder gets the report, once.
    store.stalls.store(true, Ordering::Relaxed);
    let error = store.lease().acquire_retry_limit(0).build().unwrap().try_lock().unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Store { .. }), "{error:?}");
    for is_told in [true, false] {
        let guard = store.lease().build().unwrap().try_lock().unwrap();
        assert_eq!(guard.recovered().is_some(), is_told);
        guard.release().unwrap();
    }
}

#[test]
fn a_limit_bounds_also_a_store_that_does_not_answer() {
    let store = Faulty::new(&ManualClock::new());
    store.hangs.store(true, Ordering::Relaxed);
    let lease = store.lease().ttl(MS * 60_000).build().unwrap();
    let began = Instant::now();
    let error = lease.lock_for(MS * 100).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Store { .. }), "nobody said that it is held: {error:?}");
    assert!(began.elapsed() >= MS * 100 && began.elapsed() < MS * 500, "{:?}", began.elapsed());
}

#[test]
fn a_store_that_fails_is_asked_again_and_then_given_up() {
    let clock = ManualClock::new();
    let store = Faulty::new(&clock);
    store.fails.store(true, Ordering::Relaxed);
    let error = store.lease().acquire_retry_limit(2).build().unwrap().try_lock().unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Store { .. }), "{error:?}");
}

#[test]
fn the_heartbeat_goes_by_the_clock_of_the_lease() {
    let clock = ManualClock::new();
    let store = Faulty::new(&clock);
    let guard = store.lease().build().unwrap().lock().unwrap();
    for beat in 1..=10 {
        clock.advance(MS * 250);
        eventually("it beats", || store.renewals.load(Ordering::Relaxed) >= beat);
        eventually("it is renewed", || guard.remaining() == MS * 2968);
    }
    store.panics.store(true, Ordering::Relaxed);
    clock.advance(MS * 250);
    eventually("it is asked again after a panic", || {
        clock.advance(MS);
        store.renewals.load(Ordering::Relaxed) >= 12
    });
    assert!(guard.is_held());
    clock.advance(MS * 3000);
    assert!(!guard.is_held(), "the first to ask after a jump finds it lost, or the heartbeat before");
    assert!(matches!(guard.lost().reason(), Some(LossReason::Expired)));
}

#[test]
fn doubt_lasts_to_the_deadline_and_then_has_a_reason() {
    let clock = ManualClock::new();
    let store = Faulty::new(&clock);
    let guard = store.lease().build().unwrap().lock().unwrap();
    store.fails.store(true, Ordering::Relaxed);
    clock.advance(MS * 300);
    eventually("it is asked", || store.renewals.load(Ordering::Relaxed) >= 1);
    clock.advance(MS * 2600);
    eventually("it is asked", || store.renewals.load(Ordering::Relaxed) >= 2);
    assert!(guard.is_held());
    clock.advance(MS * 100);
    assert!(matches!(guard.lost().reason(), Some(LossReason::Store(_))));
    let error = guard.check().unwrap_err().to_string();
    assert!(error.ends_with("told to"), "{error}");
}

#[test]
fn a_store_that_hangs_costs_no_other_store_its_leases() {
    let directory = TestDir::new();
    let guard = Lease::file(directory.path()).ttl(MS * 1000).heartbeat(MS * 100).build().unwrap().lock().unwrap();
    let store = Faulty::new(&ManualClock::new());
    let hung: Vec<_> = (0..50)
        .map(|n| Lease::with_store(store.clone(), n.to_string()).build().unwrap())
        .map(|lease| {
            store.record.lock().1 = None;
            lease.lock().unwrap()
        })
        .collect();
    store.hangs.store(true, Ordering::Relaxed);
    let (began, beat) = (Instant::now(), directory.record().beat());
    while began.elapsed() < MS * 3500 {
        guard.check().unwrap();
        thread::sleep(MS * 10);
    }
    assert!(directory.record().beat() - beat >= 10, "{}", directory.record().beat() - beat);
    assert!(hung.iter().all(|guard| !guard.is_held()));
    let began = Instant::now();
    drop(hung);
    assert!(began.elapsed() < MS * 1000);
}

#[test]
fn stuck_request_delays_no_other_renewal_or_loss_report() {
    let directory = TestDir::new();
    let guard = Lease::file(directory.path()).ttl(MS * 400).heartbeat(MS * 50).build().unwrap().lock().unwrap();
    let frozen = Faulty::new(&ManualClock::new());
    let mut stuck: Vec<_> = (0..10)
        .map(|n| {
            frozen.record.lock().1 = None;
            let (tell, told) = mpsc::channel();
            let lease = Lease::with_store(frozen.clone(), n.to_string()).ttl(MS * 600).heartbeat(MS * 50);
            (lease.on_lost(move |loss| _ = tell.send(loss.token)).build().unwrap().lock().unwrap(), told)
        })
        .collect();
    frozen.freezes.store(true, Ordering::Relaxed);
    eventually("it is asked", || frozen.renewals.load(Ordering::Relaxed) > 0);
    // Another lease, of another store, expires meanwhile.
    let clock = ManualClock::new();
    let (tell, told) = mpsc::channel();
    let other = Faulty::new(&clock).lease().on_lost(move |_| _ = tell.send(())).build().unwrap().lock().unwrap();
    let signal = other.lost().token();
    clock.advance(MS * 10_000);
    told.recv_timeout(MS * 1500).expect("its loss is told");
    assert!(signal.is_cancelled());
    for (guard, told) in &stuck {
        assert_eq!(told.recv_timeout(MS * 2000).expect("so is that of each lease of the frozen one"), guard.token());
    }
    let (began, beat) = (Instant::now(), directory.record().beat());
    while began.elapsed() < MS * 1000 {
        guard.check().unwrap();
        thread::sleep(MS * 5);
    }
    assert!(directory.record().beat() - beat > 10);
    assert_eq!(frozen.renewals.load(Ordering::Relaxed), 1, "one stuck request of one place");
    let (lost, _) = stuck.swap_remove(5);
    let dropping = thread::spawn(move || drop(lost));
    eventually("whoever steps down does not hang with it", || dropping.is_finished());
    frozen.freezes.store(false, Ordering::Relaxed);
    drop(stuck);
    frozen.record.lock().1 = None;
    let again = frozen.lease().heartbeat(MS * 50).build().unwrap().lock().unwrap();
    eventually("it is asked again", || {
        frozen.clock.advance(MS);
        frozen.renewals.load(Ordering::Relaxed) > 3
    });
    again.check().unwrap();
}

#[test]
fn a_store_that_hangs_costs_no_other_store_its_short_leases() {
    let directory = TestDir::new();
    let guard = Lease::file(directory.path()).ttl(MS * 200).heartbeat(MS * 20).build().unwrap().lock().unwrap();
    let hung = Faulty::new(&ManualClock::new());
    // Each request of this store may take 2 s.
    let _slow = Lease::with_store(hung.clone(), "hung").ttl(MS * 60_000).build().unwrap().lock().unwrap();
    hung.hangs.store(true, Ordering::Relaxed);
    let began = Instant::now();
    while hung.renewals.load(Ordering::Relaxed) < 2 {
        guard.check().unwrap();
        thread::sleep(MS * 5);
        assert!(began.elapsed() < MS * 60_000, "it is asked again");
    }
}

#[test]
fn files_of_one_file_system_hang_as_one() {
    let directory = TestDir::new();
    let lease = |name: &str| Lease::file(directory.0.join(name)).build().unwrap();
    let (first, second) = (lease("first"), lease("second"));
    assert_eq!(first.0.store.profile().failure_domain, None);
    let _guards = (first.lock().unwrap(), second.lock().unwrap());
    let place = first.0.store.profile().failure_domain;
    assert!(place.is_some() && place == second.0.store.profile().failure_domain);
}

#[test]
fn loss_found_at_release_is_reported_once() {
    let directory = TestDir::new();
    let (tell, told) = mpsc::channel();
    let lease = directory.lease().ttl(MS * 60_000).heartbeat(MS * 20_000);
    let lease = lease.on_lost(move |loss| tell.send(loss.clone()).unwrap()).build().unwrap();
    let guard = lease.lock().unwrap();
    let (signal, token) = (guard.lost(), guard.token());
    directory.write(held_by(&stranger(), token + 1));
    assert!(matches!(guard.release().unwrap_err().kind(), ErrorKind::LeaseLost { .. }));
    assert!(matches!(signal.reason(), Some(LossReason::TakenOver { .. })) && signal.token().is_cancelled());
    let loss = told.recv_timeout(MS * 2000).unwrap();
    assert!(matches!(loss.reason, LossReason::TakenOver { .. }) && loss.token == token);
    assert!(told.recv_timeout(MS * 50).is_err(), "told twice");
}

#[test]
fn drop_of_expired_guard_frees_lease_as_lost() {
    let directory = TestDir::new();
    let clock = ManualClock::new();
    let lease = Lease::file(directory.path()).ttl(MS * 60_000).heartbeat(MS * 20_000).clock(Arc::new(clock.clone()));
    let lease = lease.require_progress(MS * 20_000).build().unwrap();
    let guard = lease.lock().unwrap();
    let token = guard.token();
    let signal = guard.lost();
    let other = Lease::file(directory.path()).ttl(MS * 60_000).heartbeat(MS * 20_000).build().unwrap();
    let mine = directory.record();
    clock.advance(MS * 200_000);
    assert!(!guard.is_held());
    directory.write(mine);
    drop(guard);
    assert!(directory.record().is_lost());
    assert_eq!(other.status().unwrap(), LeaseStatus::Free);
    let next = other.try_lock().expect("nobody waits for another ttl");
    assert!(next.token() > token);
    assert_eq!(next.recovered().unwrap().owner().unwrap().pid(), std::process::id());
    assert!(matches!(signal.reason(), Some(LossReason::Expired)), "it stays lost");
}

#[test]
fn system_clocks_are_one_clock_however_many_there_are() {
    let directory = TestDir::new();
    let lease = |n: u32| Lease::file(directory.0.join(n.to_string())).clock(Arc::new(SystemClock)).build().unwrap();
    let _guards: Vec<_> = (0..200).map(|n| lease(n).lock().unwrap()).collect();
    // Other tests run at the same time, with clocks of their own.
    assert!(HeartbeatScheduler::start().unwrap().rings() < 100);
}

#[test]
fn on_lost_callbacks_run_serially_on_one_thread() {
    let clock = ManualClock::new();
    let store = Faulty::new(&clock);
    let (tell, told) = mpsc::channel();
    let (inside, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let guards: Vec<_> = (0..200)
        .map(|n| {
            store.record.lock().1 = None;
            let (tell, inside, most) = (tell.clone(), inside.clone(), most.clone());
            let lease = Lease::with_store(store.clone(), n.to_string()).clock(Arc::new(clock.clone()));
            let lease = lease.on_lost(move |_| {
                most.fetch_max(inside.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
                thread::sleep(MS / 2);
                assert!(thread::current().name() == Some("lockkit-lost"));
                inside.fetch_sub(1, Ordering::Relaxed);
                tell.send(n).unwrap();
            });
            lease.build().unwrap().lock().unwrap()
        })
        .collect();
    clock.advance(MS * 10_000);
    assert!(guards.iter().all(|guard| !guard.is_held()));
    let mut all: Vec<_> = guards.iter().map(|_| told.recv_timeout(MS * 5000).unwrap()).collect();
    all.sort_unstable();
    assert!(all.into_iter().eq(0..200) && told.try_recv().is_err());
    assert_eq!(most.load(Ordering::Relaxed), 1);
}

#[test]
fn a_lease_and_all_that_belongs_to_it_may_go_to_any_thread() {
    fn check<T: Send + Sync + 'static>() {}
    check::<Lease>();
    check::<LeaseGuard>();
    check::<LostSignal>();
}

#[test]
fn a_thousand_leases_dropped_at_once_are_all_free() {
    let directory = TestDir::new();
    let leases: Vec<_> = (0..1000).map(|n| Lease::file(directory.0.join(n.to_string())).build().unwrap()).collect();
    let guards: Vec<_> = leases.iter().map(|lease| lease.try_lock().unwrap()).collect();
    drop(guards);
    assert!(leases.iter().all(|lease| lease.try_lock().is_ok()));
}
