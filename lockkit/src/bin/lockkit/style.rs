//! Colours: only on a terminal, and never with `NO_COLOR`, which `anstream` sees to.

use anstyle::{AnsiColor, Color, Style};
use clap::builder::Styles;

const fn coloured(colour: AnsiColor) -> Style {
    Style::new().fg_color(Some(Color::Ansi(colour)))
}

/// What is wrong.
pub(crate) const BAD: Style = coloured(AnsiColor::Red).bold();
/// What is as it should be.
pub(crate) const GOOD: Style = coloured(AnsiColor::Green);
/// What deserves a look.
pub(crate) const ODD: Style = coloured(AnsiColor::Yellow);
/// Titles.
pub(crate) const TITLE: Style = Style::new().bold();

pub(crate) const HELP: Styles =
    Styles::styled().header(TITLE).usage(TITLE).literal(coloured(AnsiColor::Cyan)).placeholder(Style::new());

/// `text` in that style.
pub(crate) fn paint(style: Style, text: impl std::fmt::Display) -> String {
    format!("{}{text}{}", style.render(), style.render_reset())
}
