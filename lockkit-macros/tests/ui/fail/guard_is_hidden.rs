#[lockkit::single_instance("com.example.app")]
fn main() {
    drop(__guard);
    println!("{}", __LOCKKIT_NAME);
}
