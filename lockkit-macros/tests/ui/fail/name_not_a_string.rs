use lockkit::single_instance;

#[single_instance(42)]
fn number() -> lockkit::Result<()> {
    Ok(())
}

#[single_instance(b"bytes")]
fn bytes() -> lockkit::Result<()> {
    Ok(())
}

const PORT: u16 = 8080;

#[single_instance(PORT)]
fn constant() -> lockkit::Result<()> {
    Ok(())
}

fn main() {}
