use lockkit::single_instance;

#[single_instance("com.example.app", wait = 5)]
fn number() -> Option<()> {
    None
}

#[single_instance("com.example.app", wait = "5")]
fn no_unit() -> Option<()> {
    None
}

#[single_instance("com.example.app", wait = "5 parsecs")]
fn unknown_unit() -> Option<()> {
    None
}

#[single_instance("com.example.app", wait = "-5s")]
fn negative() -> Option<()> {
    None
}

#[single_instance("com.example.app", wait = "")]
fn empty() -> Option<()> {
    None
}

#[single_instance("com.example.app", wait = "99999999999999999999s")]
fn too_long() -> Option<()> {
    None
}

#[single_instance("com.example.app", wait = std::time::Duration::from_secs(5))]
fn expression() -> Option<()> {
    None
}

fn main() {}
