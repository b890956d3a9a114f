//! Keeps a server for a test: `warden FOLDER PROGRAM ARGUMENTS…`, see `lockkit_tests::servers`.

#[cfg(target_os = "linux")]
fn main() {
    let mut arguments = std::env::args_os().skip(1);
    let folder = arguments.next().expect("warden FOLDER PROGRAM ARGUMENTS…");
    lockkit_tests::servers::watch_over(folder.as_ref(), arguments);
}

#[cfg(not(target_os = "linux"))]
fn main() {}
