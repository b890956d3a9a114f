//! The function with the attribute, and the statement that is put in front of its body.

use std::time::Duration;

use proc_macro2::{Span, TokenStream};
use quote::{ToTokens, quote, quote_spanned};
use syn::ext::IdentExt;
use syn::parse::{Parse, ParseStream};
use syn::{
    Attribute, Error, Ident, Lit, Result, ReturnType, Signature, Token, Type, Visibility, braced,
    token,
};

use crate::args::{Args, Scope, Wait};

/// A function with a body. The body is not parsed, so that everything that Rust allows there is
/// passed on.
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
            return Err(Error::new_spanned(
                constness,
                "a `const fn` cannot take a lock",
            ));
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
    /// Returns the function with the name held around its body.
    pub(crate) fn holding(&self, args: &Args) -> Result<TokenStream> {
        let hold = self.hold(args)?;
        let Self {
            attributes,
            visibility,
            signature,
            braces,
            inner_attributes,
            body,
        } = self;
        let mut tokens = quote! { #(#attributes)* #visibility #signature };
        braces.surround(&mut tokens, |tokens| {
            tokens.extend(quote! { #(#inner_attributes)* #hold #body });
        });
        Ok(tokens)
    }

    /// Writes a `let` that makes the guard live as long as the body. The body cannot name the
    /// guard, because of the hygiene of `mixed_site`.
    fn hold(&self, args: &Args) -> Result<TokenStream> {
        let Names {
            lockkit,
            std,
            guard,
            error,
            name,
            ..
        } = &Names::of(args);
        let (first, last) = ends(&args.name);
        let called = args.lockkit.as_ref().map_or_else(
            || quote_spanned!(first=> ::lockkit),
            ToTokens::to_token_stream,
        );
        let checked = quote_spanned!(first=> #called::instance::checked_name);
        let given = &args.name;
        let given = quote_spanned!(last=> (#given));
        let scope = match args.scope {
            None | Some(Scope::User) => quote!(User),
            Some(Scope::Machine) => quote!(Machine),
        };
        let wait = match args.wait {
            Some(Wait::Forever) => quote!(#std::None),
            None if args.on_second.is_some() => {
                quote!(#std::Some(#lockkit::instance::ANSWER_WITHIN))
            }
            None => at_most(std, Duration::ZERO),
            Some(Wait::AtMost(limit)) => at_most(std, limit),
        };
        let (enter, recovered) = self.enter(args, &scope, &wait)?;
        let refuse = self.refuse(args)?;
        Ok(quote_spanned! {Span::mixed_site()=>
            let #guard = {
                // An item, not a `const` block, so that the name is checked even if a generic
                // function is never called.
                const #name: &#std::str = #checked #given;
                match #enter {
                    #std::Ok(#guard) => {
                        #recovered
                        #guard
                    }
                    // The returned expression may be the call of a function that never returns.
                    #[allow(unreachable_code, clippy::diverging_sub_expression)]
                    #std::Err(#error) => { #refuse }
                }
            };
        })
    }

    /// Writes the acquisition of the name, and the report of a death that follows it. With
    /// `on_second` the report comes first: the repair after the dead owner precedes every request.
    fn enter(
        &self,
        args: &Args,
        scope: &TokenStream,
        wait: &TokenStream,
    ) -> Result<(TokenStream, Option<TokenStream>)> {
        let Names {
            lockkit,
            guard,
            name,
            ..
        } = &Names::of(args);
        let recovered = self.recovered(args);
        match &args.on_second {
            None => {
                let enter = quote_spanned! {Span::mixed_site()=>
                    #lockkit::instance::enter(#name, #lockkit::Scope::#scope, #wait)
                };
                Ok((enter, recovered))
            }
            Some(_) if !self.is_main() => {
                let message = "`on_second` is for `main`, whose second start ends when the first has answered it";
                Err(Error::new_spanned(&args.on_second, message))
            }
            Some(handler) => {
                let enter = quote_spanned! {Span::mixed_site()=>
                    #lockkit::instance::enter_or_activate(#name, #wait, |#guard| { #recovered }, #handler)
                };
                Ok((enter, None))
            }
        }
    }

    /// Writes the report that the previous owner died.
    fn recovered(&self, args: &Args) -> Option<TokenStream> {
        let Names {
            lockkit,
            std,
            guard,
            recovered,
            name,
            ..
        } = &Names::of(args);
        let tell = match &args.on_recovered {
            Some(handler) => {
                let (_, last) = ends(handler);
                let recovered = at(recovered, last);
                let argument = quote_spanned!(last=> (#recovered));
                quote!(#handler #argument;)
            }
            None if self.is_main() => quote_spanned! {Span::mixed_site()=>
                #lockkit::instance::tell_recovered(#name, #recovered)
            },
            None => return None,
        };
        let found = match &args.on_second {
            None => quote_spanned!(Span::mixed_site()=> NamedGuard::recovered(&#guard)),
            Some(_) => quote_spanned!(Span::mixed_site()=> FirstInstance::recovered(#guard)),
        };
        Some(quote_spanned! {Span::mixed_site()=>
            if let #std::Some(#recovered) = #lockkit::#found {
                #tell
            }
        })
    }

    /// Writes the exit from the function if the name was not acquired.
    fn refuse(&self, args: &Args) -> Result<TokenStream> {
        let here = Span::mixed_site();
        let Names {
            lockkit,
            error,
            name,
            ..
        } = &Names::of(args);
        if let Some(handler) = &args.on_held {
            let (first, last) = ends(handler);
            let leave = quote_spanned!(first=> return);
            let error = at(error, last);
            let argument = quote_spanned!(last=> (#error));
            return Ok(quote!(#leave #handler #argument;));
        }
        if self.is_main() {
            let code = match &args.exit_code {
                Some(given) => i32::from(given.code).to_token_stream(),
                None => quote!(#lockkit::instance::EXIT_HELD),
            };
            return Ok(quote_spanned!(here=> #lockkit::instance::exit(#name, &#error, #code)));
        }
        if let Some(given) = &args.exit_code {
            let message =
                "`exit_code` is for `main`; another function returns the error, or takes `on_held`";
            return Err(Error::new_spanned(&given.key, message));
        }
        self.return_error(args)
    }

    /// Writes the return of the error from a function other than `main`.
    fn return_error(&self, args: &Args) -> Result<TokenStream> {
        let here = Span::mixed_site();
        let Names {
            lockkit,
            error,
            returns,
            ..
        } = &Names::of(args);
        match (&self.signature.output, args.wait) {
            // See `Returns`: the first `return` lets it infer the type, the second one returns or
            // gives up.
            (ReturnType::Type(_, kind), Some(Wait::Forever)) if !is_opaque(kind) => {
                Ok(quote_spanned! {here=>
                    use #lockkit::instance::OrGiveUp as _;
                    let #returns = #lockkit::instance::Returns::new();
                    if false {
                        return #returns.value();
                    }
                    return #returns.refuse(#error);
                })
            }
            (_, Some(Wait::Forever)) => {
                Ok(quote_spanned!(here=> #lockkit::instance::give_up(&#error)))
            }
            (ReturnType::Type(_, kind), _) => {
                let (first, last) = ends(kind);
                let called = args.lockkit.as_ref().map_or_else(
                    || quote_spanned!(first=> ::lockkit),
                    ToTokens::to_token_stream,
                );
                let refusal = quote_spanned!(first=> return #called::instance::Refusal);
                let error = at(error, last);
                let refused = quote_spanned!(last=> ::refused(#error));
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

/// The names in the statement.
///
/// The only path is that of `lockkit`, which contains the names of the standard library, too: the
/// user's crate may call another crate `core`. The hygiene of `mixed_site` separates locals from
/// other locals, but not from items: a `const` or `static` of the user's gives a pattern with its
/// name another meaning. So the locals have names that no item has.
struct Names {
    /// The path of the crate.
    lockkit: TokenStream,
    /// The path of the names of the standard library.
    std: TokenStream,
    guard: Ident,
    error: Ident,
    recovered: Ident,
    returns: Ident,
    /// A constant: the name to hold.
    name: Ident,
}

impl Names {
    fn of(args: &Args) -> Self {
        let own = |name| Ident::new(name, Span::mixed_site());
        let here = || quote_spanned!(Span::mixed_site()=> ::lockkit);
        let lockkit = args
            .lockkit
            .as_ref()
            .map_or_else(here, ToTokens::to_token_stream);
        Self {
            std: quote!(#lockkit::instance::standard),
            lockkit,
            guard: own("__lockkit_guard_f81d4fae"),
            error: own("__lockkit_error_f81d4fae"),
            recovered: own("__lockkit_recovered_f81d4fae"),
            returns: own("__lockkit_returns_f81d4fae"),
            name: own("__LOCKKIT_NAME_F81D4FAE"),
        }
    }
}

/// Returns the same name with the position for a message.
fn at(name: &Ident, span: Span) -> Ident {
    Ident::new(&name.to_string(), span)
}

/// Returns a limit as the attribute passes it on.
fn at_most(std: &TokenStream, limit: Duration) -> TokenStream {
    let (seconds, nanos) = (limit.as_secs(), limit.subsec_nanos());
    quote!(#std::Some(#std::Duration::new(#seconds, #nanos)))
}

/// Whether `kind` is `impl Trait`, which is unknown before the body determines it.
fn is_opaque(kind: &Type) -> bool {
    match kind {
        Type::ImplTrait(_) => true,
        Type::Group(group) => is_opaque(&group.elem),
        Type::Paren(paren) => is_opaque(&paren.elem),
        _ => false,
    }
}

/// Returns the positions where `tokens` begin and end. With such a position on generated code, the
/// compiler points at what the user can correct if the types do not fit. Names in that code are
/// resolved as in the rest of the statement.
fn ends(tokens: &impl ToTokens) -> (Span, Span) {
    let mut spans = tokens
        .to_token_stream()
        .into_iter()
        .map(|token| Span::mixed_site().located_at(token.span()));
    let first = spans.next().unwrap_or_else(Span::mixed_site);
    (first, spans.last().unwrap_or(first))
}
