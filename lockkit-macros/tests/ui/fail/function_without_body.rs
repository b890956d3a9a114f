trait Job {
    #[lockkit::single_instance("com.example.job")]
    fn run(&self) -> lockkit::Result<()>;
}

fn main() {}
