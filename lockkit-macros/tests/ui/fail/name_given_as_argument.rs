#[lockkit::single_instance(name = "com.example.app")]
fn main() {}
