//! Leases on PostgreSQL: every case of the suite, every drill of the engines, and what is its own.

use lockkit_tests::{drills, suite};

suite!(on_postgres, lockkit_tests::Kind::POSTGRES);
drills!(drills_on_postgres, lockkit_tests::engines::postgres::Postgres);

#[test]
fn dbg_times() {
    use lockkit::Lease;
    let server = lockkit_tests::engines::postgres::Postgres::open().unwrap();
    for n in 0..6 {
        let extra = if n % 2 == 0 { "sslmode=disable" } else { "" };
        let lease = Lease::connect(server.lease_of("postgres", extra, "x")).build().unwrap();
        let t = std::time::Instant::now();
        let g = lease.try_lock().unwrap();
        let a = t.elapsed();
        let t = std::time::Instant::now();
        g.release().unwrap();
        let b = t.elapsed();
        let t = std::time::Instant::now();
        let g = lease.try_lock().unwrap();
        let c = t.elapsed();
        let t = std::time::Instant::now();
        g.release().unwrap();
        eprintln!("{extra} first {a:?} rel {b:?} again {c:?} rel {:?}", t.elapsed());
    }
}
