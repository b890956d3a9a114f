#[lockkit::single_instance("com.example.app", wait = "5s", scope = "user", wait = "1m")]
fn main() {}
