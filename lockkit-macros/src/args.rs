//! The arguments of the attribute: the name, then `key = value` in any order.

use std::time::Duration;

use proc_macro2::Span;
use syn::ext::IdentExt;
use syn::parse::{Parse, ParseStream};
use syn::{Error, Expr, ExprLit, ExprPath, Ident, Lit, Path, Result, Token};

/// The arguments of the attribute.
pub(crate) struct Args {
    /// A constant expression, checked where it is used.
    pub(crate) name: Expr,
    pub(crate) scope: Option<Scope>,
    pub(crate) wait: Option<Wait>,
    pub(crate) exit_code: Option<ExitCode>,
    /// `fn(lockkit::Error) -> R`, where `R` is the function's return type.
    pub(crate) on_held: Option<ExprPath>,
    /// `fn(&lockkit::Recovered)`.
    pub(crate) on_recovered: Option<ExprPath>,
    /// `fn(lockkit::Activation)`.
    pub(crate) on_second: Option<ExprPath>,
    /// The path of `lockkit`, if the user's crate has another name for it.
    pub(crate) lockkit: Option<Path>,
}

/// `scope = ...`
pub(crate) enum Scope {
    User,
    Machine,
}

/// `wait = ...`
#[derive(Clone, Copy)]
pub(crate) enum Wait {
    Forever,
    AtMost(Duration),
}

/// `exit_code = ...`
pub(crate) struct ExitCode {
    /// The position of the key: `exit_code` does not fit every function.
    pub(crate) key: Ident,
    pub(crate) code: u8,
}

impl Parse for Args {
    fn parse(input: ParseStream) -> Result<Self> {
        let mut args = Self {
            name: name(input)?,
            scope: None,
            wait: None,
            exit_code: None,
            on_held: None,
            on_recovered: None,
            on_second: None,
            lockkit: None,
        };
        while !input.is_empty() {
            input.parse::<Token![,]>()?;
            if !input.is_empty() {
                args.read(input)?;
            }
        }
        match &args {
            Self {
                exit_code: Some(ExitCode { key, .. }),
                on_held: Some(_),
                ..
            } => Err(Error::new_spanned(
                key,
                "`exit_code` has no effect beside `on_held`, whose handler decides; drop one",
            )),
            Self {
                on_second: Some(handler),
                scope: Some(Scope::Machine),
                ..
            } => Err(Error::new_spanned(
                handler,
                "`on_second` goes with the scope \"user\" alone: instances talk only to those of the same user",
            )),
            Self {
                on_second: Some(handler),
                wait: Some(Wait::AtMost(Duration::ZERO)),
                ..
            } => Err(Error::new_spanned(
                handler,
                "beside `on_second`, `wait` is how long the first instance may take to answer; no time is too little",
            )),
            _ => Ok(args),
        }
    }
}

impl Args {
    /// Parses one `key = value`.
    fn read(&mut self, input: ParseStream) -> Result<()> {
        if !input.peek(Ident::peek_any) {
            return Err(input.error(format!("after the name, {KEYS}")));
        }
        let key = Ident::parse_any(input)?;
        match key.to_string().as_str() {
            "scope" => set(&mut self.scope, &key, scope(&value(&key, input)?)?),
            "wait" => set(&mut self.wait, &key, wait(&value(&key, input)?)?),
            "exit_code" => {
                let code = exit_code(&value(&key, input)?)?;
                set(
                    &mut self.exit_code,
                    &key,
                    ExitCode {
                        key: key.clone(),
                        code,
                    },
                )
            }
            "on_held" => set(
                &mut self.on_held,
                &key,
                handler(
                    &key,
                    value(&key, input)?,
                    "fn(lockkit::Error) -> R` with the `R` that this function returns",
                )?,
            ),
            "on_recovered" => set(
                &mut self.on_recovered,
                &key,
                handler(&key, value(&key, input)?, "fn(&lockkit::Recovered)`")?,
            ),
            "on_second" => set(
                &mut self.on_second,
                &key,
                handler(&key, value(&key, input)?, "fn(lockkit::Activation)`")?,
            ),
            "crate" => set(&mut self.lockkit, &key, path(value(&key, input)?)?),
            _ => Err(Error::new_spanned(
                &key,
                format!("there is no argument `{key}`; {KEYS}"),
            )),
        }
    }
}

const KEYS: &str = "the arguments are `scope`, `wait`, `exit_code`, `on_held`, `on_recovered`, `on_second` and `crate`, each as `key = value`";

fn name(input: ParseStream) -> Result<Expr> {
    const MISSING: &str =
        "the name to hold comes first, as in `#[single_instance(\"com.example.app\")]`";
    if input.is_empty() {
        return Err(Error::new(Span::call_site(), MISSING));
    }
    if input.peek(Ident::peek_any) && input.peek2(Token![=]) {
        return Err(input.error(MISSING));
    }
    match ungrouped(input.parse()?) {
        Expr::Lit(ExprLit { lit, .. }) if !matches!(lit, Lit::Str(_)) => Err(Error::new_spanned(
            lit,
            "the name is a string, or a constant that is one",
        )),
        name => Ok(name),
    }
}

fn value(key: &Ident, input: ParseStream) -> Result<Expr> {
    let equals = input.parse::<Option<Token![=]>>()?;
    if equals.is_none() || input.is_empty() || input.peek(Token![,]) {
        return Err(Error::new_spanned(
            key,
            format!("`{key}` needs a value: `{key} = ...`"),
        ));
    }
    Ok(ungrouped(input.parse()?))
}

fn set<T>(slot: &mut Option<T>, key: &Ident, value: T) -> Result<()> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(Error::new_spanned(key, format!("`{key}` is given twice"))),
    }
}

fn scope(value: &Expr) -> Result<Scope> {
    match text(value).as_deref() {
        Some("user") => Ok(Scope::User),
        Some("machine") => Ok(Scope::Machine),
        _ => Err(Error::new_spanned(
            value,
            "`scope` is \"user\" or \"machine\"",
        )),
    }
}

fn wait(value: &Expr) -> Result<Wait> {
    const ALLOWED: &str = "`wait` is \"forever\", or a time such as \"5s\", \"250ms\" or \"2m\"";
    match text(value).as_deref() {
        Some("forever") => Ok(Wait::Forever),
        Some(time) => match humantime::parse_duration(time) {
            Ok(limit) => Ok(Wait::AtMost(limit)),
            Err(error) => Err(Error::new_spanned(value, format!("{ALLOWED}: {error}"))),
        },
        None => Err(Error::new_spanned(value, ALLOWED)),
    }
}

fn exit_code(value: &Expr) -> Result<u8> {
    let code = match value {
        Expr::Lit(ExprLit {
            lit: Lit::Int(number),
            ..
        }) => number.base10_parse().ok(),
        _ => None,
    };
    code.ok_or_else(|| Error::new_spanned(value, "`exit_code` is a whole number from 0 to 255"))
}

fn handler(key: &Ident, value: Expr, kind: &str) -> Result<ExprPath> {
    match value {
        Expr::Path(path) => Ok(path),
        value => Err(Error::new_spanned(
            value,
            format!("`{key}` takes the path of a function, `{kind}"),
        )),
    }
}

/// Returns the path of `lockkit`, given as a string or as a path.
fn path(value: Expr) -> Result<Path> {
    const ALLOWED: &str =
        "`crate` is the path by which this crate knows lockkit, as in `crate = \"lk\"`";
    let path = match &value {
        Expr::Lit(ExprLit {
            lit: Lit::Str(text),
            ..
        }) => text.parse_with(Path::parse_mod_style).ok(),
        Expr::Path(ExprPath {
            qself: None, path, ..
        }) => Some(path.clone()),
        _ => None,
    };
    let is_plain = |path: &Path| {
        path.segments
            .iter()
            .all(|segment| segment.arguments.is_none())
    };
    path.filter(is_plain)
        .ok_or_else(|| Error::new_spanned(value, ALLOWED))
}

fn text(value: &Expr) -> Option<String> {
    match value {
        Expr::Lit(ExprLit {
            lit: Lit::Str(text),
            ..
        }) => Some(text.value()),
        _ => None,
    }
}

/// Removes the invisible delimiters around a value that a `macro_rules!` macro passed in.
fn ungrouped(mut value: Expr) -> Expr {
    while let Expr::Group(group) = value {
        value = *group.expr;
    }
    value
}
