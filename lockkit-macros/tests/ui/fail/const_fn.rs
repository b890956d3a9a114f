#[lockkit::single_instance("com.example.job")]
pub const fn job() -> Option<()> {
    None
}

fn main() {}
