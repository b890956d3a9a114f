//! The second process of the tests; see `lockkit_tests::actor`, `chaos` and `steps`.

#[cfg(unix)]
use lockkit_tests::{Spec, actor, chaos, faults, leases, managers, rogue, steps};

#[cfg(unix)]
fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if arguments.first() == Some(&"stormed") {
        faults::raise_a_storm();
        arguments.remove(0);
    }
    match arguments[..] {
        ["squat", name] => rogue::squat(name),
        ["queue", name] => rogue::queue(name),
        [spec] => actor::serve(&Spec::parse(spec)),
        [spec, "chaos", log, seed] => chaos::take_part(&Spec::parse(spec), log.as_ref(), seed.parse().expect("a seed")),
        [spec, "stress", counter, rounds] => {
            lockkit_tests::suite::count_up(&Spec::parse(spec), counter.as_ref(), rounds.parse().expect("a number"));
        }
        ["table", table] => managers::serve(&managers::Table::parse(table)),
        ["lease", terms] => leases::serve(&leases::Terms::parse(terms)),
        ["lease", terms, "chaos", log, seed] => {
            leases::take_part(&leases::Terms::parse(terms), log.as_ref(), seed.parse().expect("a seed"));
        }
        [spec, "closed", go] => faults::lock_on_the_standard_descriptors(&Spec::parse(spec), go.as_ref()),
        [spec, "closed-input"] => lockkit_tests::suite::lock_on_descriptor_zero(&Spec::parse(spec)),
        [spec, "steps", scenario] => steps::play(&Spec::parse(spec), scenario),
        _ => panic!(
            "actor [stormed] squat NAME | queue NAME | table TABLE | lease TERMS [chaos LOG SEED] | SPEC [chaos LOG SEED | stress COUNTER ROUNDS | closed-input | closed FILE | steps SCENARIO]"
        ),
    }
}

#[cfg(not(unix))]
fn main() {}
