//! Leases on PostgreSQL: every case of the suite, every drill of the engines, and what is its own.

use lockkit_tests::engines::postgres::Postgres;
use lockkit_tests::{Kind, drills, suite};

suite!(on_postgres, Kind::POSTGRES);
drills!(drills_on_postgres, Postgres);
