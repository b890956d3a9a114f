//! The `#[single_instance]` attribute of `lockkit`, which re-exports and documents it.
//!
//! The attribute puts one statement in front of a function's body: a `let` that takes the name, or leaves the function.
//! Everything else of the function is passed on as it stands. What the statement calls is in `lockkit::instance`, the
//! rule of names included, which a constant in the statement applies. Here, `args` reads the attribute's arguments and
//! `function` writes the statement.

#![forbid(unsafe_code)]

mod args;
mod function;

use proc_macro::TokenStream;

use crate::args::Args;
use crate::function::Function;

#[expect(missing_docs, reason = "lockkit documents it, and rustdoc would append to that page what stood here")]
#[proc_macro_attribute]
pub fn single_instance(args: TokenStream, item: TokenStream) -> TokenStream {
    let holding = syn::parse::<Args>(args).and_then(|args| syn::parse::<Function>(item.clone())?.holding(&args));
    match holding {
        Ok(function) => function.into(),
        Err(error) => {
            // The item goes along as it was, so that nothing is reported missing besides.
            let mut tokens = TokenStream::from(error.into_compile_error());
            tokens.extend(item);
            tokens
        }
    }
}
