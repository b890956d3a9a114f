//! The second process of the tests; see `lockkit_tests::helper_process`, `chaos` and
//! `crash_points`.

use lockkit_tests::{
    Spec, async_conformance, chaos, crash_points, helper_process, leases, managers,
};
#[cfg(target_os = "linux")]
use lockkit_tests::{fault_injection, hostile, instances, realtime};

/// The arguments of the parts.
const USAGE: &str = "actor [stormed] sleep SECONDS | squat NAME | queue NAME | hand-over NAME | hand-over-stream NAME | realtime PART NAME | intrude UID/NAME | pretend UID/NAME | instance NAME … | table TABLE | lease TERMS [chaos LOG SEED] | SPEC [chaos LOG SEED | stress COUNTER ROUNDS | tasks FLAVOR ROUNDS | closed-input | closed FILE | steps SCENARIO]";

fn main() {
    // The arguments of an instance may be any bytes.
    #[cfg(target_os = "linux")]
    if std::env::args_os()
        .nth(1)
        .is_some_and(|part| part == "instance")
    {
        return instances::serve(&std::env::args_os().nth(2).expect("a name"));
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    #[cfg_attr(not(target_os = "linux"), allow(unused_mut))]
    let mut arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    #[cfg(target_os = "linux")]
    if arguments.first() == Some(&"stormed") {
        fault_injection::raise_a_storm();
        arguments.remove(0);
    }
    match arguments[..] {
        #[cfg(target_os = "linux")]
        ["squat", name] => hostile::occupy_name(name),
        #[cfg(target_os = "linux")]
        ["queue", name] => hostile::join_queue(name),
        #[cfg(target_os = "linux")]
        ["hand-over", name] => hostile::hand_over(name),
        #[cfg(target_os = "linux")]
        ["hand-over-stream", name] => hostile::hand_over_another_type(name),
        #[cfg(target_os = "linux")]
        ["realtime", part, name] => realtime::serve(part, name),
        #[cfg(target_os = "linux")]
        ["intrude", place] => instances::send_as_other_user(place),
        #[cfg(target_os = "linux")]
        ["pretend", place] => instances::listen_as_other_user(place),
        [spec] => helper_process::serve(&Spec::parse(spec)),
        [spec, "chaos", logs, seed] => chaos::run_chaos_worker(
            &Spec::parse(spec),
            logs.as_ref(),
            seed.parse().expect("a seed"),
        ),
        [spec, "stress", counter, rounds] => {
            lockkit_tests::conformance::count_up(
                &Spec::parse(spec),
                counter.as_ref(),
                rounds.parse().expect("a number"),
            );
        }
        ["sleep", seconds] => {
            std::thread::sleep(std::time::Duration::from_secs(
                seconds.parse().expect("a number"),
            ));
        }
        ["table", table] => managers::serve(&managers::Table::parse(table)),
        ["lease", terms] => leases::serve(&leases::Terms::parse(terms)),
        ["lease", terms, "chaos", logs, seed] => {
            leases::run_chaos_worker(
                &leases::Terms::parse(terms),
                logs.as_ref(),
                seed.parse().expect("a seed"),
            );
        }
        #[cfg(target_os = "linux")]
        [spec, "closed", go] => {
            fault_injection::lock_on_the_standard_descriptors(&Spec::parse(spec), go.as_ref())
        }
        [spec, "tasks", flavor, rounds] => async_conformance::drop_futures_at_random(
            &Spec::parse(spec),
            flavor,
            rounds.parse().expect("a number"),
        ),
        #[cfg(target_os = "linux")]
        [spec, "closed-input"] => {
            lockkit_tests::conformance::lock_on_descriptor_zero(&Spec::parse(spec))
        }
        [spec, "steps", scenario] => crash_points::run_scenario(&Spec::parse(spec), scenario),
        _ => panic!("{USAGE}"),
    }
}
