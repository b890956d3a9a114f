#[lockkit::single_instance("com.example.app", exit_code = 3)]
fn job() -> lockkit::Result<()> {
    Ok(())
}

fn main() {}
