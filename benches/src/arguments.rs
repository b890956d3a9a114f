//! What a bench program is asked to do, in the words of `cargo bench` and criterion.

use std::env;

/// Whether to run little: to see that everything works, not to believe the numbers.
///
/// Only `cargo bench` says `--bench`. Whatever else runs the program, such as `cargo test --benches`, wants to see that
/// it works; criterion takes it the same way.
pub fn is_quick() -> bool {
    let is_given = |wanted: &str| env::args().any(|argument| argument == wanted);
    !is_given("--bench") || is_given("--quick") || is_given("--test")
}

/// The part of a benchmark's name that those to run contain; empty when all run. For programs that criterion, which has
/// many more options, does not run.
///
/// # Panics
/// When there is an option that is not known here.
pub fn filter() -> String {
    let mut filter = String::new();
    for argument in env::args().skip(1) {
        match &*argument {
            "--bench" | "--quick" | "--test" => {}
            option if option.starts_with('-') => panic!("unknown option {option}: known are --quick and a filter"),
            _ => filter = argument,
        }
    }
    filter
}
