//! The expansion of the attribute uses the path of the crate that the argument gives.

use lockkit_tests_renamed::{by_name, by_path, forever, program, something, with_handlers};

#[test]
fn c6_renamed_crate_is_named_by_argument() {
    assert_eq!(
        (by_name().unwrap(), by_path(), with_handlers(), something()),
        (1, Some(2), 3, 4)
    );
    forever();
    program::main();
    #[cfg(target_os = "linux")]
    program::second::main();
    let held = lk::NamedLock::new("lockkit-test-renamed")
        .unwrap()
        .try_lock()
        .unwrap();
    assert_eq!(
        (by_name().is_err(), by_path(), with_handlers()),
        (true, None, 0)
    );
    drop(held);
}
