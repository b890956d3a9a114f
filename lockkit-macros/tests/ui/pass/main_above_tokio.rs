#![deny(warnings)]

#[lockkit::single_instance("lockkit-ui-main-above-tokio")]
#[tokio::main(flavor = "current_thread")]
async fn main() {
    tokio::task::yield_now().await;
    let lock = lockkit::NamedLock::new("lockkit-ui-main-above-tokio").unwrap();
    assert!(lock.try_lock().is_err_and(|error| error.is_held()));
}
