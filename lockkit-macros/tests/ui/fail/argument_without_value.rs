use lockkit::single_instance;

#[single_instance("com.example.app", wait)]
fn alone() -> Option<()> {
    None
}

#[single_instance("com.example.app", wait = , scope = "user")]
fn empty() -> Option<()> {
    None
}

#[single_instance("com.example.app", wait("5s"))]
fn call() -> Option<()> {
    None
}

fn main() {}
