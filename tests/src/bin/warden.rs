//! Supervises a server for a test: `warden DIRECTORY PROGRAM ARGUMENTS…`, see
//! `lockkit_tests::servers`.

#[cfg(target_os = "linux")]
fn main() {
    let mut arguments = std::env::args_os().skip(1);
    let directory = arguments
        .next()
        .expect("warden DIRECTORY PROGRAM ARGUMENTS…");
    lockkit_tests::servers::watch_over(directory.as_ref(), arguments);
}

#[cfg(not(target_os = "linux"))]
fn main() {}
