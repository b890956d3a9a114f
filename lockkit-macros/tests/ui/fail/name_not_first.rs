#[lockkit::single_instance(scope = "machine")]
fn main() {}
