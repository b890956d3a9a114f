#![deny(warnings)]

#[tokio::main]
#[lockkit::single_instance("lockkit-ui-main-tokio-outside")]
async fn main() -> Result<(), String> {
    tokio::task::yield_now().await;
    let lock = lockkit::NamedLock::new("lockkit-ui-main-tokio-outside").unwrap();
    assert!(lock.try_lock().is_err_and(|error| error.is_held()));
    Ok(())
}
