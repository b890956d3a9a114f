//! The second process of the tests for every system; see `lockkit_tests::everywhere`.

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    lockkit_tests::everywhere::second(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
}
