#[lockkit::single_instance]
fn main() {}
