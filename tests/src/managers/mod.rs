//! Tables of locks under test, and the cases that every manager must pass.
//!
//! A second process, started with [`Actor::start_at`](crate::Actor::start_at), works on a table on
//! command:
//!
//! | command | answer |
//! |---|---|
//! | `open` | `opened`; every other command opens the table, too, if necessary |
//! | `allocate`, `allocate-at ID` | `allocated ID` |
//! | `try ID`, `lock ID` | `held`, `held recovered PID` |
//! | `release ID`, `unlock ID`, `free ID` | `ok` |
//! | `hold N` | `holds N`: the locks 0 to N - 1 |
//! | `fork-die ID` | `died PID`: a forked child acquired the lock and ended without a release |
//! | `fork-often ID OTHER` | `forked`: while threads tried ID, forked children acquired OTHER, in sequence |
//! | `churn ID ROUNDS LOG` | `churned`: acquired a lock that others free and allocate, and saw no second holder |
//! | `grab-all ROUNDS` | `grabbed`: allocated every available lock, and freed it, repeatedly |
//! | `kill-at STEP` | `armed` |
//!
//! or `error KIND: text`.

mod cases;
mod process;
mod shared_cases;
mod table;

pub use cases::*;
pub use process::serve;
pub use shared_cases::*;
pub use table::{CAPACITY, Kind, Table};
