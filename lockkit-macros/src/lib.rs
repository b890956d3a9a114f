//! The `#[single_instance]` attribute of `lockkit`, which re-exports and documents it.
//!
//! The attribute puts one statement in front of a function's body: a `let` that acquires the name,
//! or leaves the function. The rest of the function is passed on unchanged. `lockkit::instance`
//! contains what the statement calls, including the rule of names, which a constant in the
//! statement applies. Here, `args` parses the attribute's arguments and `function` writes the
//! statement.

#![forbid(unsafe_code)]

mod args;
mod function;

use proc_macro::TokenStream;

use crate::args::Args;
use crate::function::Function;

#[expect(
    missing_docs,
    reason = "lockkit documents it, and rustdoc would append to that page what stood here"
)]
#[proc_macro_attribute]
pub fn single_instance(args: TokenStream, item: TokenStream) -> TokenStream {
    let holding = syn::parse::<Args>(args)
        .and_then(|args| syn::parse::<Function>(item.clone())?.holding(&args));
    match holding {
        Ok(function) => function.into(),
        Err(error) => {
            // The item is emitted unchanged, so that the compiler reports no missing item in
            // addition.
            let mut tokens = TokenStream::from(error.into_compile_error());
            tokens.extend(item);
            tokens
        }
    }
}
