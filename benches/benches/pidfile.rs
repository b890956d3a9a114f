//! PidFile beside `fslock`'s lock with a pid, both in the temp folder and in the same run; and what a look costs.
//!
//! Every figure is the median of many rounds, the two sides taking turns, so that a busy machine slows down both.

use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use lockkit::{PidFile, PidStatus};

const ROUNDS: usize = 300;

/// The most that a cycle may take.
const CYCLE: Duration = Duration::from_micros(40);
/// The most that a cycle may take of the peer's.
const SHARE: f64 = 0.2;
/// The most that a look may take.
const LOOK: Duration = Duration::from_micros(60);

fn main() {
    let folder = std::env::temp_dir().join(format!("lockkit-bench-{}", std::process::id()));
    std::fs::create_dir(&folder).expect("a folder");
    println!("{:<44} {:>10} {:>10} {:>7} {:>10}", "", "ours", "peer", "ratio", "bound");
    let held = [cycle(&folder), looks(&folder)].concat().into_iter().all(|held| held);
    std::fs::remove_dir_all(&folder).expect("the folder goes");
    std::process::exit(i32::from(!held));
}

fn cycle(folder: &Path) -> Vec<bool> {
    let ours = PidFile::new(folder.join("ours.pid")).expect("an absolute path");
    let mut theirs = fslock::LockFile::open(&folder.join("theirs.pid")).expect("a file");
    let [ours, theirs] = medians([&mut || ours.lock().expect("free").release().expect("ours"), &mut || {
        theirs.lock_with_pid().expect("free");
        theirs.unlock().expect("ours");
    }]);
    let ratio = ours.as_secs_f64() / theirs.as_secs_f64();
    vec![
        row("PidFile cycle", ours, None, CYCLE, ours <= CYCLE),
        row("PidFile cycle, beside fslock lock_with_pid", ours, Some(theirs), theirs.mul_f64(SHARE), ratio <= SHARE),
    ]
}

fn looks(folder: &Path) -> Vec<bool> {
    let [own, bare, stale, absent] = ["own", "bare", "stale", "absent"].map(|name| folder.join(name));
    let _held = PidFile::new(&own).expect("an absolute path").lock().expect("free");
    std::fs::write(&bare, "1\n").expect("room");
    std::fs::write(&stale, "4194304\n").expect("room");
    let look = |path: &Path| PidFile::inspect(path).expect("readable");
    assert!(matches!(look(&own), PidStatus::Running(_)) && matches!(look(&bare), PidStatus::Running(_)));
    assert!(matches!(look(&stale), PidStatus::Stale(_)) && matches!(look(&absent), PidStatus::Absent));
    let took = medians([
        &mut || drop(black_box(look(&own))),
        &mut || drop(black_box(look(&bare))),
        &mut || drop(black_box(look(&stale))),
        &mut || drop(black_box(look(&absent))),
    ]);
    ["lockkit's, held", "a bare pid, alive", "a bare pid, dead", "no file"]
        .into_iter()
        .zip(took)
        .map(|(what, took)| row(&format!("inspect: {what}"), took, None, LOOK, took <= LOOK))
        .collect()
}

/// The median time of each, taking turns.
fn medians<const N: usize>(mut sides: [&mut dyn FnMut(); N]) -> [Duration; N] {
    let mut times = [const { Vec::new() }; N];
    for _ in 0..ROUNDS {
        for (side, times) in sides.iter_mut().zip(&mut times) {
            side();
            let start = Instant::now();
            side();
            times.push(start.elapsed());
        }
    }
    times.map(|mut times| {
        times.sort_unstable();
        times[times.len() / 2]
    })
}

fn row(what: &str, ours: Duration, peer: Option<Duration>, bound: Duration, held: bool) -> bool {
    let peer_and_ratio = peer.map_or(format!("{:>10} {:>7}", "-", "-"), |peer| {
        format!("{:>10.1?} {:>7.3}", peer, ours.as_secs_f64() / peer.as_secs_f64())
    });
    let verdict = if held { "held" } else { "behind" };
    println!("{what:<44} {ours:>10.1?} {peer_and_ratio} {bound:>10.1?}  {verdict}");
    held
}
