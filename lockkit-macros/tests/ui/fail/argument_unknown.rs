#[lockkit::single_instance("com.example.app", timeout = "5s")]
fn main() {}
