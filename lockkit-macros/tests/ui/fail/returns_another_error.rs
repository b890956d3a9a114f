use lockkit::single_instance;

struct MyError;

#[single_instance("com.example.job")]
fn own_error() -> Result<(), MyError> {
    Ok(())
}

#[single_instance("com.example.job")]
fn text() -> Result<u8, String> {
    Ok(1)
}

#[single_instance("com.example.job")]
async fn future() -> Result<(), MyError> {
    Ok(())
}

#[single_instance("com.example.job")]
fn generic<E>() -> Result<(), E> {
    Ok(())
}

fn main() {}
