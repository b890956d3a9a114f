use lockkit::single_instance;

#[single_instance(format!("job-{}", 1))]
fn made_at_run_time() -> lockkit::Result<()> {
    Ok(())
}

#[single_instance(name)]
fn parameter(name: &'static str) -> lockkit::Result<()> {
    println!("{name}");
    Ok(())
}

fn from_environment() -> &'static str {
    "com.example.job"
}

#[single_instance(from_environment())]
fn call() -> lockkit::Result<()> {
    Ok(())
}

struct Job;

impl Job {
    const NAME: &str = "com.example.job";

    #[single_instance(Self::NAME)]
    fn run(&self) -> lockkit::Result<()> {
        Ok(())
    }
}

fn main() {}
