//! Kills a process at every step of taking and releasing a lock, and sees that nobody is blocked and nobody misled.
//!
//! The steps stand in the library (`lockkit::steps`), so the list is what a run really passes: a scenario is played
//! once to count them, and then once more for each, with a kill there.

use lockkit::Wait;

use crate::{Actor, Kind, Spec};

/// What the victim does. In each it takes the lock and releases it.
///
/// - `alone`: nobody else is there.
/// - `waiting`: the lock is held at first, and handed over.
/// - `followed`: another process waits when it releases.
const SCENARIOS: [&str; 3] = ["alone", "waiting", "followed"];

/// The victim's side: plays `scenario`, is killed at the step that it is told, and prints the steps that it passed.
pub fn play(spec: &Spec, scenario: &str) {
    let mut lines = std::io::stdin().lines().map_while(Result::ok);
    let mut next = || lines.next().expect("a command");
    let kill_at: usize = next().parse().expect("the number of a step");
    let lock = spec.open();
    println!("ready");
    assert_eq!(next(), "go");
    lockkit::steps::kill_at(kill_at);
    let guard = lock.acquire(&Wait::forever()).expect("the lock");
    if scenario == "followed" {
        println!("held");
        assert_eq!(next(), "go");
    }
    drop(guard);
    let passed = lockkit::steps::passed();
    println!("passed {} {}", passed.len(), passed.join(", "));
}

/// Kills a process at every step in every scenario.
pub fn kill_at_every_step(kind: Kind) {
    if !lockkit::steps::ENABLED {
        println!("left out: this build has no steps to be killed at; they need debug assertions");
        return;
    }
    for scenario in SCENARIOS {
        let mut at = 1;
        // The first run that gets through to the end has passed fewer steps than it was to be killed at.
        while kill_at(kind, scenario, at) {
            at += 1;
        }
        assert!(at > 3, "{kind:?} {scenario}: only {} steps", at - 1);
    }
}

/// Whether the victim died at step `at`, which is false when there are not so many.
fn kill_at(kind: Kind, scenario: &str, at: usize) -> bool {
    let spec = kind.fresh();
    let mut other = Actor::start(&spec);
    let mut victim = Actor::start_with(&spec, |command| {
        command.arg("steps").arg(scenario);
    });
    victim.expect(&at.to_string(), "ready");
    let last = match scenario {
        "waiting" => {
            other.expect("lock", "held");
            victim.tell("go");
            victim.wait_until_it_waits_or_ends();
            other.expect("release", "released");
            victim.answer()
        }
        "followed" => match victim.ask("go") {
            held if held == "held" => {
                other.tell_to_wait("lock");
                victim.tell("go");
                victim.answer()
            }
            gone => gone,
        },
        _ => victim.ask("go"),
    };
    let died = last == "gone";
    if !died {
        let passed = last.split(' ').nth(1).and_then(|count| count.parse::<usize>().ok()).expect(&last);
        assert!(passed < at, "it was to be killed at step {at}, but: {last}");
        println!("{kind:?} {scenario}: {last}");
    }
    victim.kill();
    let answer = match scenario {
        "followed" if other.is_busy() => other.answer(),
        _ => other.ask("lock-for 5000"),
    };
    let told = format!("held recovered {}", victim.pid());
    assert!(
        answer == "held" || (died && kind.tells_deaths() && answer == told),
        "{kind:?} {scenario}, killed at step {at}: {answer}"
    );
    other.expect("release", "released");
    Actor::start(&spec).expect("try", "held");
    spec.clean();
    died
}
