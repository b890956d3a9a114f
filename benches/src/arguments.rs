//! The command-line arguments of a bench program, as `cargo bench` and criterion define them.

use std::env;

/// Returns whether to run a short check that everything works. The numbers of such a run are not
/// meaningful.
///
/// Only `cargo bench` passes `--bench`. Every other caller, such as `cargo test --benches`, wants
/// to check that the program works. Criterion interprets it in the same way.
pub fn is_quick() -> bool {
    let is_given = |wanted: &str| env::args().any(|argument| argument == wanted);
    !is_given("--bench") || is_given("--quick") || is_given("--test")
}

/// Returns the text that the names of the benchmarks to run contain. The text is empty if all run.
/// For programs that do not use criterion, which has many more options.
///
/// # Panics
/// If an option is unknown here.
pub fn filter() -> String {
    let mut filter = String::new();
    for argument in env::args().skip(1) {
        match &*argument {
            "--bench" | "--quick" | "--test" => {}
            option if option.starts_with('-') => {
                panic!("unknown option {option}: known are --quick and a filter")
            }
            _ => filter = argument,
        }
    }
    filter
}
