#[lockkit::single_instance("com.example.app", crate = 1)]
fn number() -> Option<()> {
    None
}

#[lockkit::single_instance("com.example.app", crate = "lk lk")]
fn words() -> Option<()> {
    None
}

#[lockkit::single_instance("com.example.app", crate = Vec::<u8>)]
fn generic() -> Option<()> {
    None
}

fn main() {}
