use lockkit::single_instance;

#[single_instance("com.example.app", scope = "global")]
fn unknown() -> Option<()> {
    None
}

#[single_instance("com.example.app", scope = machine)]
fn not_a_string() -> Option<()> {
    None
}

fn main() {}
