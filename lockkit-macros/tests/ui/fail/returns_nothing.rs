#[lockkit::single_instance("com.example.job", wait = "5s")]
fn job() {}

fn main() {}
