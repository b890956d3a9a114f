use lockkit::single_instance;

#[single_instance("com.example.job")]
fn unit() -> () {}

#[single_instance("com.example.job")]
fn number() -> u32 {
    1
}

#[single_instance("com.example.job")]
fn vector() -> Vec<Option<u8>> {
    Vec::new()
}

#[single_instance("com.example.job")]
async fn future() -> u32 {
    1
}

#[single_instance("com.example.job")]
fn generic<T: Default>() -> T {
    T::default()
}

#[single_instance("com.example.job")]
fn opaque() -> impl Iterator<Item = u8> {
    [1].into_iter()
}

fn main() {}
