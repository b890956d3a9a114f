#[lockkit::single_instance("com.example.app")]
fn main() {
    drop(__lockkit_guard_f81d4fae);
    println!("{}", __LOCKKIT_NAME_F81D4FAE);
}
