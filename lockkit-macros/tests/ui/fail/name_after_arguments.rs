#[lockkit::single_instance("com.example.app", "com.example.other")]
fn main() {}
