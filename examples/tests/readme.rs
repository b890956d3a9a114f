//! Checks that the list of examples in this directory's README is complete, and that a test with
//! its name runs each.

use std::fs;
use std::path::Path;

#[test]
fn readme_lists_every_example_with_a_test() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"));
    let list = fs::read_to_string(directory.join("README.md")).unwrap();
    let mut count = 0;
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        let name = path.file_stem().unwrap().to_str().unwrap();
        assert!(
            list.contains(&format!("\n## {name}\n")),
            "README.md says nothing of {name}"
        );
        assert!(
            list.contains(&format!("\n$ cargo run --example {name}")),
            "README.md does not say how {name} is run"
        );
        assert!(
            directory.join(format!("tests/{name}.rs")).is_file(),
            "no test runs {name}"
        );
        count += 1;
    }
    assert_eq!(
        count,
        list.matches("\n## ").count(),
        "README.md lists what is not there"
    );
}
