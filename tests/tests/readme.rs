//! Checks that the table of cases in this package's README is correct.

use std::fs;
use std::path::Path;

#[test]
fn readme_table_names_existing_tests() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut code = String::new();
    let directories = [
        "src",
        "tests",
        "../lockkit/src",
        "../lockkit-cli",
        "renamed",
        "../lockkit-macros",
        "../examples/tests",
    ];
    let mut directories: Vec<_> = directories.map(|directory| package.join(directory)).into();
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                code += &fs::read_to_string(path).unwrap();
            }
        }
    }
    let table = fs::read_to_string(package.join("README.md")).unwrap();
    let rows = table
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.split(" | ").nth(1));
    let names = rows
        .flat_map(|tests| tests.split(['`', '*']))
        .filter(|name| name.contains('_'));
    let mut count = 0;
    for name in names {
        let is_there = ["(", "<"]
            .iter()
            .any(|next| code.contains(&format!("fn {name}{next}")));
        assert!(is_there, "there is no test {name}");
        count += 1;
    }
    assert!(count > 50, "only {count} tests in the table");
}
