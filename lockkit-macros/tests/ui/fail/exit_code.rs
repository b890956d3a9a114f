mod too_large {
    #[lockkit::single_instance("com.example.app", exit_code = 256)]
    fn main() {}
}

mod negative {
    #[lockkit::single_instance("com.example.app", exit_code = -1)]
    fn main() {}
}

mod text {
    #[lockkit::single_instance("com.example.app", exit_code = "75")]
    fn main() {}
}

fn main() {}
