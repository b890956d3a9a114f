//! What the tests of examples share.

// Not every test needs all of it.
#![allow(dead_code)]

use std::path::PathBuf;
use std::process::Command;

/// The example `name`: test programs stand in `target/<profile>/deps`, examples in `target/<profile>/examples`.
pub(crate) fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let file = format!("{name}{}", std::env::consts::EXE_SUFFIX);
    let mut examples = test.ancestors().map(|directory| directory.join("examples").join(&file));
    examples.find(|path| path.is_file()).unwrap_or_else(|| panic!("cargo build --example {name}"))
}

/// What the example `name` prints when it is run to its end, with nothing on standard error.
pub(crate) fn said_by(name: &str, arguments: &[&str]) -> String {
    let output = Command::new(example(name)).args(arguments).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    println!("{said}");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert!(output.status.success(), "{}", output.status);
    said
}

/// Says what of a test is left out, and why. Not by a macro, whose words those who run tests keep to themselves.
pub(crate) fn left_out(what: &str) {
    use std::io::Write;
    // Nobody reads it where it cannot be written.
    let _ = writeln!(std::io::stderr(), "left out: {what}");
}
