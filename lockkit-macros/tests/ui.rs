//! Checks the compiler's output: every error message, and code that must compile without a warning.
//!
//! The expected output is that of the current stable compiler.
//! `TRYBUILD=overwrite cargo test -p lockkit-macros --test ui` regenerates it; review the changes.

#[test]
fn compile_error_points_at_invalid_token() {
    trybuild::TestCases::new().compile_fail("tests/ui/fail/*.rs");
}

#[test]
fn attribute_preserves_function_parts() {
    trybuild::TestCases::new().pass("tests/ui/pass/*.rs");
}

#[test]
fn c6_items_of_module_keep_their_names() {
    trybuild::TestCases::new().pass("tests/ui/names/*.rs");
}
