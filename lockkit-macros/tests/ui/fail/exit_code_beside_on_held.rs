fn handler(_: lockkit::Error) {}

#[lockkit::single_instance("com.example.app", exit_code = 3, on_held = handler)]
fn main() {
    let _: fn(_) = handler;
}
