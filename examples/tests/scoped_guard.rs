//! Runs the example: the second process must name the holder, and the third must enter.

mod common;

use common::output_of;

#[test]
fn scoped_guard_example_names_holder_and_admits_next() {
    let output = output_of("scoped_guard", &[]);
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(lines.len(), 5, "{output}");
    let pid = |line: &str, does: &str| {
        let pid = line
            .strip_prefix("pid ")
            .and_then(|rest| rest.strip_suffix(does));
        pid.unwrap_or_else(|| panic!("{line:?} does not end with {does:?}"))
            .parse::<u32>()
            .unwrap()
    };
    let (first, last) = (pid(lines[0], " is inside"), pid(lines[3], " is inside"));
    let refusal = format!(
        " gives up: the named lock \"lockkit-example-section\" was still held by pid {first} (scoped_guard), since "
    );
    assert!(lines[1].contains(&refusal), "{output}");
    assert!(lines[1].contains(" after waiting "), "{output}");
    assert_eq!(pid(lines[2], " leaves"), first);
    assert_eq!(pid(lines[4], " leaves"), last);
    assert!(first != last);
}
