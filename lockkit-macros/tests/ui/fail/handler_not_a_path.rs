use lockkit::single_instance;

#[single_instance("com.example.app", on_held = "handler")]
fn text() -> Option<()> {
    None
}

#[single_instance("com.example.app", on_recovered = |_| ())]
fn closure() -> Option<()> {
    None
}

fn main() {}
