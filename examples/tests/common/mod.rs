//! The shared parts of the tests of examples.

// Not every test needs all of it.
#![allow(dead_code)]

use std::path::PathBuf;
use std::process::Command;

/// Returns the path of the example `name`. Test programs are in `target/<profile>/deps`, examples
/// in `target/<profile>/examples`.
pub(crate) fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let file = format!("{name}{}", std::env::consts::EXE_SUFFIX);
    let mut examples = test
        .ancestors()
        .map(|directory| directory.join("examples").join(&file));
    examples
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("cargo build --example {name}"))
}

/// Runs the example `name` to its end, and returns its output. Nothing may be on standard error.
pub(crate) fn output_of(name: &str, arguments: &[&str]) -> String {
    let output = Command::new(example(name))
        .args(arguments)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    println!("{text}");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert!(output.status.success(), "{}", output.status);
    text
}

/// Reports what a test leaves out, and why. A print macro cannot do this, because test runners
/// capture its output.
pub(crate) fn left_out(what: &str) {
    use std::io::Write;
    // A closed standard error has no reader.
    let _ = writeln!(std::io::stderr(), "left out: {what}");
}
