//! Runs the example: no writer may lose a number, and no reader may see half of one.

mod common;

use common::output_of;

#[test]
fn shared_file_example_loses_no_number_to_four_writers() {
    let output = output_of("shared_file", &[]);
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(lines[0], "the number is 0");
    assert_eq!(lines[1..5], ["a writer ended: exit status: 0"; 4]);
    assert_eq!(
        lines[5],
        "the number is 200: no writer lost a number, no reader saw a partial number"
    );
    assert_eq!(lines.len(), 6, "{output}");
}
