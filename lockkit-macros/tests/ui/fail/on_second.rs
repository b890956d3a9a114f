use lockkit::single_instance;

fn opened(_: lockkit::Activation) {}

mod for_the_machine {
    #[lockkit::single_instance("com.example.app", scope = "machine", on_second = super::opened)]
    fn main() {}
}

mod without_time {
    #[lockkit::single_instance("com.example.app", on_second = super::opened, wait = "0s")]
    fn main() {}
}

mod with_a_closure {
    #[lockkit::single_instance("com.example.app", on_second = |activation| drop(activation))]
    fn main() {}
}

mod with_both {
    fn held(_: lockkit::Error) {}

    #[lockkit::single_instance("com.example.app", on_second = super::opened, exit_code = 3, on_held = held)]
    fn main() {
        let _: fn(_) = held;
    }
}

#[single_instance("com.example.app", on_second = opened)]
fn not_main() -> Option<()> {
    None
}

fn main() {}
