//! Colours, and text that is safe to print. Colours appear only on a terminal, and never with
//! `NO_COLOR`; `anstream` ensures both.

use anstyle::{AnsiColor, Color, Style};
use clap::builder::Styles;

const fn coloured(colour: AnsiColor) -> Style {
    Style::new().fg_color(Some(Color::Ansi(colour)))
}

/// For errors.
pub(crate) const BAD: Style = coloured(AnsiColor::Red).bold();
/// For good states.
pub(crate) const GOOD: Style = coloured(AnsiColor::Green);
/// For states that need attention.
pub(crate) const ODD: Style = coloured(AnsiColor::Yellow);
/// For titles.
pub(crate) const TITLE: Style = Style::new().bold();

pub(crate) const HELP: Styles = Styles::styled()
    .header(TITLE)
    .usage(TITLE)
    .literal(coloured(AnsiColor::Cyan))
    .placeholder(Style::new());

/// Returns `text` in that style.
pub(crate) fn paint(style: Style, text: impl std::fmt::Display) -> String {
    format!("{}{text}{}", style.render(), style.render_reset())
}

/// Escapes control characters, which any user can put into a file's name, because they would reach
/// the terminal. Also escapes the marks that reverse or hide text.
pub(crate) fn plain(text: &str) -> String {
    let misleads = |letter: char| matches!(letter, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
    let mut shown = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter.is_control() || misleads(letter) {
            true => shown.extend(letter.escape_default()),
            false => shown.push(letter),
        }
    }
    shown
}
