#![deny(warnings)]

#[tokio::main]
#[lockkit::single_instance("lockkit-ui-main-below-tokio")]
async fn main() -> Result<(), String> {
    tokio::task::yield_now().await;
    let lock = lockkit::NamedLock::new("lockkit-ui-main-below-tokio").unwrap();
    assert!(lock.try_lock().is_err_and(|error| error.is_held()));
    Ok(())
}
