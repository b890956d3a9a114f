//! The function that the attribute stands on, and the statement that goes in front of its body.

use std::time::Duration;

use proc_macro2::{Span, TokenStream};
use quote::{ToTokens, quote, quote_spanned};
use syn::ext::IdentExt;
use syn::parse::{Parse, ParseStream};
use syn::{Attribute, Error, Ident, Lit, Result, ReturnType, Signature, Token, Type, Visibility, braced, token};

use crate::args::{Args, Scope, Wait};

/// A function with a body. The body stays unread, so that whatever Rust allows there is passed on.
pub(crate) struct Function {
    attributes: Vec<Attribute>,
    visibility: Visibility,
    signature: Signature,
    braces: token::Brace,
    inner_attributes: Vec<Attribute>,
    body: TokenStream,
}

impl Parse for Function {
    fn parse(input: ParseStream) -> Result<Self> {
        let attributes = input.call(Attribute::parse_outer)?;
        let visibility = input.parse()?;
        if !at_function(input) {
            return Err(input.error("`#[single_instance]` goes on a function"));
        }
        let signature: Signature = input.parse()?;
        if let Some(constness) = &signature.constness {
            return Err(Error::new_spanned(constness, "a `const fn` cannot take a lock"));
        }
        if input.peek(Token![;]) {
            return Err(input.error("`#[single_instance]` goes on a function with a body"));
        }
        let content;
        Ok(Self {
            attributes,
            visibility,
            signature,
            braces: braced!(content in input),
            inner_attributes: content.call(Attribute::parse_inner)?,
            body: content.parse()?,
        })
    }
}

/// Whether `fn` comes next, after any `const`, `async`, `unsafe` and `extern "C"`.
fn at_function(input: ParseStream) -> bool {
    let ahead = input.fork();
    while !ahead.peek(Token![fn]) {
        if ahead.call(Ident::parse_any).is_err() && ahead.parse::<Lit>().is_err() {
            return false;
        }
    }
    true
}

impl Function {
    /// The function with the name held around its body.
    pub(crate) fn holding(&self, args: &Args) -> Result<TokenStream> {
        let hold = self.hold(args)?;
        let Self { attributes, visibility, signature, braces, inner_attributes, body } = self;
        let mut tokens = quote! { #(#attributes)* #visibility #signature };
        braces.surround(&mut tokens, |tokens| {
            tokens.extend(quote! { #(#inner_attributes)* #hold #body });
        });
        Ok(tokens)
    }

    /// `let` the guard live as long as the body. The body cannot name it, thanks to the hygiene of `mixed_site`.
    fn hold(&self, args: &Args) -> Result<TokenStream> {
        let name = &args.name;
        let (first, last) = ends(name);
        let checked = quote_spanned!(first=> ::lockkit::instance::checked_name);
        let name = quote_spanned!(last=> (#name));
        let scope = match args.scope {
            None | Some(Scope::User) => quote!(User),
            Some(Scope::Machine) => quote!(Machine),
        };
        let wait = match args.wait {
            Some(Wait::Forever) => quote!(::core::option::Option::None),
            None if args.on_second.is_some() => {
                quote!(::core::option::Option::Some(::lockkit::instance::ANSWER_WITHIN))
            }
            None => at_most(Duration::ZERO),
            Some(Wait::AtMost(limit)) => at_most(limit),
        };
        let recovered = self.recovered(args);
        // With `on_second` it comes first: what the dead left behind is put right before anybody asks for it.
        let (enter, recovered) = match &args.on_second {
            None => {
                let enter = quote_spanned! {Span::mixed_site()=>
                    ::lockkit::instance::enter(__LOCKKIT_NAME, ::lockkit::Scope::#scope, #wait)
                };
                (enter, recovered)
            }
            Some(_) if !self.is_main() => {
                let message = "`on_second` is for `main`, whose second start ends when the first has answered it";
                return Err(Error::new_spanned(&args.on_second, message));
            }
            Some(handler) => {
                let enter = quote_spanned! {Span::mixed_site()=>
                    ::lockkit::instance::enter_or_activate(__LOCKKIT_NAME, #wait, |__guard| { #recovered }, #handler)
                };
                (enter, None)
            }
        };
        let refuse = self.refuse(args)?;
        Ok(quote_spanned! {Span::mixed_site()=>
            let __guard = {
                // An item, not a `const` block, so that the name is checked even if a generic function is never called.
                const __LOCKKIT_NAME: &::core::primitive::str = #checked #name;
                match #enter {
                    ::core::result::Result::Ok(__guard) => {
                        #recovered
                        __guard
                    }
                    // What is returned may be the call of a function that never returns.
                    #[allow(unreachable_code, clippy::diverging_sub_expression)]
                    ::core::result::Result::Err(__error) => { #refuse }
                }
            };
        })
    }

    /// Tells that the previous owner died.
    fn recovered(&self, args: &Args) -> Option<TokenStream> {
        let tell = match &args.on_recovered {
            Some(handler) => {
                let (_, last) = ends(handler);
                let argument = quote_spanned!(last=> (__recovered));
                quote!(#handler #argument;)
            }
            None if self.is_main() => quote_spanned! {Span::mixed_site()=>
                ::lockkit::instance::tell_recovered(__LOCKKIT_NAME, __recovered)
            },
            None => return None,
        };
        let recovered = match &args.on_second {
            None => quote_spanned!(Span::mixed_site()=> NamedGuard::recovered(&__guard)),
            Some(_) => quote_spanned!(Span::mixed_site()=> FirstInstance::recovered(__guard)),
        };
        Some(quote_spanned! {Span::mixed_site()=>
            if let ::core::option::Option::Some(__recovered) = ::lockkit::#recovered {
                #tell
            }
        })
    }

    /// Leaves the function because the name was not taken.
    fn refuse(&self, args: &Args) -> Result<TokenStream> {
        let here = Span::mixed_site();
        if let Some(handler) = &args.on_held {
            let (first, last) = ends(handler);
            let leave = quote_spanned!(first=> return);
            let argument = quote_spanned!(last=> (__error));
            return Ok(quote!(#leave #handler #argument;));
        }
        if self.is_main() {
            let code = match &args.exit_code {
                Some(given) => i32::from(given.code).to_token_stream(),
                None => quote!(::lockkit::instance::EXIT_HELD),
            };
            return Ok(quote_spanned!(here=> ::lockkit::instance::exit(__LOCKKIT_NAME, &__error, #code)));
        }
        if let Some(given) = &args.exit_code {
            let message = "`exit_code` is for `main`; another function returns the error, or takes `on_held`";
            return Err(Error::new_spanned(&given.key, message));
        }
        match (&self.signature.output, args.wait) {
            // See `Returns`: the first `return` tells it the type, the second one returns or gives up.
            (ReturnType::Type(_, kind), Some(Wait::Forever)) if !is_opaque(kind) => Ok(quote_spanned! {here=>
                use ::lockkit::instance::OrGiveUp as _;
                let __returns = ::lockkit::instance::Returns::new();
                if false {
                    return __returns.value();
                }
                return __returns.refuse(__error);
            }),
            (_, Some(Wait::Forever)) => Ok(quote_spanned!(here=> ::lockkit::instance::give_up(&__error))),
            (ReturnType::Type(_, kind), _) => {
                let (first, last) = ends(kind);
                let refusal = quote_spanned!(first=> return ::lockkit::instance::Refusal);
                let refused = quote_spanned!(last=> ::refused(__error));
                Ok(quote!(#refusal #refused;))
            }
            (ReturnType::Default, _) => Err(Error::new_spanned(
                &self.signature.ident,
                "a function with `#[single_instance]` must be able to return that the name is held: return \
                 `Result<_, E>` where `E: From<lockkit::Error>`, or `Option<_>`; or wait for the name with \
                 `wait = \"forever\"`, or say what to do with `on_held = path::to::handler`",
            )),
        }
    }

    fn is_main(&self) -> bool {
        self.signature.ident == "main" && self.signature.inputs.is_empty()
    }
}

/// A limit as the attribute passes it on.
fn at_most(limit: Duration) -> TokenStream {
    let (seconds, nanos) = (limit.as_secs(), limit.subsec_nanos());
    quote!(::core::option::Option::Some(::core::time::Duration::new(#seconds, #nanos)))
}

/// Whether `kind` is `impl Trait`, of which nothing is known before the body says more.
fn is_opaque(kind: &Type) -> bool {
    match kind {
        Type::ImplTrait(_) => true,
        Type::Group(group) => is_opaque(&group.elem),
        Type::Paren(paren) => is_opaque(&paren.elem),
        _ => false,
    }
}

/// Where `tokens` begin and end. Code of ours that stands there as far as the compiler is concerned makes it point at
/// what the user can mend, when the types do not fit. Names in it are resolved as in the rest of the statement.
fn ends(tokens: &impl ToTokens) -> (Span, Span) {
    let mut spans = tokens.to_token_stream().into_iter().map(|token| Span::mixed_site().located_at(token.span()));
    let first = spans.next().unwrap_or_else(Span::mixed_site);
    (first, spans.last().unwrap_or(first))
}
