//! The table at the end of a bench program: our number next to a peer's, and whether its bound
//! held. The table is also stored next to the program, for the bench `summary`, which combines all
//! tables.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// A measured number.
#[derive(Clone, Copy, Debug)]
pub enum Value {
    /// A duration; less is better.
    Time(Duration),
    /// Operations per second; more is better.
    Rate(f64),
    /// A share of a processor's time; less is better.
    Share(f64),
    /// A count; less is better.
    Count(usize),
    /// No measurement: there is no peer, or none that runs on this machine.
    None,
}

impl Value {
    fn number(self) -> Option<f64> {
        match self {
            Self::Time(time) => Some(time.as_secs_f64()),
            Self::Rate(number) | Self::Share(number) => Some(number),
            Self::Count(count) => Some(count as f64),
            Self::None => None,
        }
    }

    fn is_at_most(self, most: f64) -> Option<bool> {
        self.number().map(|number| number <= most)
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (number, unit) = match *self {
            Self::Time(time) => match time.as_secs_f64() {
                seconds if seconds < 1e-6 => (seconds * 1e9, "ns"),
                seconds if seconds < 1e-3 => (seconds * 1e6, "us"),
                seconds if seconds < 1.0 => (seconds * 1e3, "ms"),
                seconds => (seconds, "s"),
            },
            Self::Rate(rate) => (rate, "/s"),
            Self::Share(share) => (share * 100.0, "%"),
            Self::Count(count) => return f.pad(&count.to_string()),
            Self::None => return f.pad("-"),
        };
        let decimals = match number {
            ..10.0 => 2,
            ..100.0 => 1,
            _ => 0,
        };
        f.pad(&format!("{number:.decimals$} {unit}"))
    }
}

/// The bound on our number.
#[derive(Clone, Copy, Debug)]
pub enum Bound {
    /// At most this many times the peer's number.
    Ratio(f64),
    /// At least this many times the peer's number.
    AtLeast(f64),
    /// At most this long, independently of the peer.
    Time(Duration),
    /// At most this share of a processor.
    Share(f64),
    /// At most so many.
    Count(usize),
    /// No bound: the row is for information.
    None,
}

/// One line of the table.
#[derive(Debug)]
pub struct Row {
    /// The name of the measurement.
    pub name: String,
    /// Our number.
    pub ours: Value,
    /// The name of the peer.
    pub peer: &'static str,
    /// The peer's number.
    pub theirs: Value,
    /// The bound on our number.
    pub bound: Bound,
}

impl Row {
    fn ratio(&self) -> Option<f64> {
        Some(self.ours.number()? / self.theirs.number()?)
    }

    fn held(&self) -> Option<bool> {
        match self.bound {
            Bound::Ratio(most) => self.ratio().map(|ratio| ratio <= most),
            Bound::AtLeast(least) => self.ratio().map(|ratio| ratio >= least),
            Bound::Time(most) => self.ours.is_at_most(most.as_secs_f64()),
            Bound::Share(most) => self.ours.is_at_most(most),
            Bound::Count(most) => self.ours.is_at_most(most as f64),
            Bound::None => None,
        }
    }
}

/// The cells of a line, column by column.
type Cells = [String; 7];

const HEADING: [&str; 7] = ["row", "ours", "peer", "", "ratio", "bound", "verdict"];

impl Row {
    fn cells(&self) -> Cells {
        let bound = match self.bound {
            Bound::Ratio(most) => format!("{most:.2}"),
            Bound::AtLeast(least) => format!("> {least:.2}"),
            Bound::Time(most) => Value::Time(most).to_string(),
            Bound::Share(most) => Value::Share(most).to_string(),
            Bound::Count(most) => Value::Count(most).to_string(),
            Bound::None => "-".to_owned(),
        };
        let verdict = match self.held() {
            Some(true) => "held",
            Some(false) => "behind",
            None => "-",
        };
        let Self {
            name,
            ours,
            peer,
            theirs,
            ..
        } = self;
        let ratio = self
            .ratio()
            .filter(|ratio| ratio.is_finite())
            .map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
        [
            name.clone(),
            ours.to_string(),
            (*peer).to_owned(),
            theirs.to_string(),
            ratio,
            bound,
            verdict.to_owned(),
        ]
    }

    /// Returns the rank of the peer; a better peer has a greater rank.
    fn rank(&self) -> f64 {
        match self.theirs {
            Value::Rate(rate) => rate,
            Value::None => f64::NEG_INFINITY,
            other => -other.number().unwrap_or(f64::INFINITY),
        }
    }
}

fn line([row, ours, peer, theirs, ratio, bound, verdict]: &[impl fmt::Display; 7]) -> String {
    format!("{row:<47} {ours:>10}   {peer:<17} {theirs:>10}   {ratio:>6}   {bound:>7}   {verdict}")
}

/// Prints the rows, if there are any, and stores them for [`stored_rows`].
///
/// # Panics
/// If the rows cannot be stored.
pub fn print(rows: &[Row]) {
    if rows.is_empty() {
        return;
    }
    println!("\n{}", line(&HEADING));
    let mut stored = String::new();
    for row in rows {
        let cells = row.cells();
        println!("{}", line(&cells));
        stored += &format!("{}\t{}\n", row.rank(), cells.join("\t"));
    }
    println!();
    let program = std::env::current_exe().expect("the program has a path");
    // The program's name ends in a hash.
    let program = program
        .file_stem()
        .and_then(|name| name.to_str()?.split('-').next())
        .expect("it has a name");
    std::fs::create_dir_all(directory()).expect("the build's directory can be written to");
    std::fs::write(directory().join(program), stored)
        .expect("the build's directory can be written to");
}

/// Returns the directory of the stored rows. It is next to the program, so that the rows belong to
/// the same build.
fn directory() -> PathBuf {
    let program = std::env::current_exe().expect("the program has a path");
    program
        .parent()
        .expect("it is in a directory")
        .join("lockkit-bench-rows")
}

/// Returns the stored rows of a program's last run. Of the rows about one measurement without a
/// bound, only the row with the best peer is returned.
///
/// # Panics
/// If the stored rows cannot be read.
pub fn stored_rows(program: &str) -> Vec<Cells> {
    let text = match std::fs::read_to_string(directory().join(program)) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => panic!("cannot read the stored rows of {program}: {error}"),
    };
    let rows: Vec<(f64, Cells)> = text
        .lines()
        .map(|line| {
            let (rank, cells) = line.split_once('\t').expect("a rank");
            let cells: Vec<String> = cells.split('\t').map(str::to_owned).collect();
            (
                rank.parse().expect("a number"),
                cells.try_into().expect("seven cells"),
            )
        })
        .collect();
    let is_best = |rank: f64, name: &str| {
        rows.iter()
            .all(|(other, cells)| cells[0] != name || *other <= rank)
    };
    rows.iter()
        .filter(|(rank, cells)| cells[5] != "-" || is_best(*rank, &cells[0]))
        .map(|(_, cells)| cells.clone())
        .collect()
}

/// Formats rows as a Markdown table.
pub fn markdown(rows: &[Cells]) -> String {
    let heading = ["row", "ours", "best peer", "", "ratio", "bound", "verdict"];
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let mut text = line(&heading.map(str::to_owned))
        + &line(&["---", "--:", "---", "--:", "--:", "--:", "---"].map(str::to_owned));
    for row in rows {
        text += &line(row);
    }
    text
}

/// Formats rows as a table for a terminal.
pub fn plain(rows: &[Cells]) -> String {
    rows.iter()
        .fold(line(&HEADING) + "\n", |text, row| text + &line(row) + "\n")
}

/// Returns the median of `times`.
///
/// # Panics
/// If `times` is empty.
pub fn median(times: &mut [Duration]) -> Duration {
    quantile(times, 0.5)
}

/// Returns the time below which the fraction `part` of `times` lies, such as 0.99.
///
/// # Panics
/// If `times` is empty.
pub fn quantile(times: &mut [Duration], part: f64) -> Duration {
    let at = ((times.len() - 1) as f64 * part) as usize;
    *times.select_nth_unstable(at).1
}
