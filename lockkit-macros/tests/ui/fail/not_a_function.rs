use lockkit::single_instance;

#[single_instance("com.example.app")]
pub struct App;

#[single_instance("com.example.app")]
impl App {}

#[single_instance("com.example.app")]
mod app {}

#[single_instance("com.example.app")]
/// Not even one that holds a function.
static RUN: fn() = main;

fn main() {}
