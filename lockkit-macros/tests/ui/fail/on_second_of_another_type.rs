fn opened(_: &lockkit::Activation) {}

#[lockkit::single_instance("com.example.app", on_second = opened)]
fn main() {}

mod returns {
    fn opened(_: lockkit::Activation) -> u8 {
        1
    }

    #[lockkit::single_instance("com.example.app", on_second = opened)]
    fn main() {}
}
