use lockkit::single_instance;

const WITH_SLASH: &str = "com/example";

#[single_instance("")]
fn empty() -> Option<()> {
    None
}

#[single_instance("my app")]
fn space() -> Option<()> {
    None
}

#[single_instance("42")]
fn digit() -> Option<()> {
    None
}

#[single_instance(WITH_SLASH)]
fn slash() -> Option<()> {
    None
}

#[single_instance("nul\0")]
fn nul() -> Option<()> {
    None
}

#[single_instance("naïve")]
fn letter() -> Option<()> {
    None
}

#[single_instance("a-name-that-goes-on-and-on-until-it-is-longer-than-the-eighty-bytes-which-are-allowed")]
fn long() -> Option<()> {
    None
}

#[single_instance("in a generic function that nobody calls")]
fn generic<T>() -> Option<T> {
    None
}

fn main() {}
