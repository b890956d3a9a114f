use lockkit::single_instance;

fn held() {}

#[single_instance("com.example.app", on_held = held)]
fn takes_nothing() {}

fn held_returning(_: lockkit::Error) -> &'static str {
    "held"
}

#[single_instance("com.example.app", on_held = held_returning)]
fn returns_another_type() -> u32 {
    1
}

fn recovered(_: lockkit::Recovered) {}

#[single_instance("com.example.app", on_recovered = recovered)]
fn takes_by_value() -> Option<()> {
    None
}

#[single_instance("com.example.app", on_held = no::such::handler)]
fn unknown() {}

fn main() {}
