//! A leader whose lease is in the store of a URL. Start it on several machines, and one of them
//! leads.
//!
//! ```text
//! cargo run --example leader_engine -- file:///srv/shared/leader 10s
//! cargo run --example leader_engine --features redis -- redis://127.0.0.1:6379/leader 10s
//! cargo run --example leader_engine --features postgres -- 'postgres://app@db.example/app?lease=leader' 10s
//! cargo run --example leader_engine --features etcd -- etcd://a.example:2379,b.example:2379,c.example:2379/leader 10s
//! ```
//!
//! It leads for the time in its second argument (3 s by default) and then releases the lease to the
//! next process. Kill it, stop it, or cut its network: another process takes over with a greater
//! token. The former leader reports the loss when it comes back.

use std::error::Error;
use std::time::{Duration, Instant};

use lockkit::{Lease, Wait};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let url = arguments
        .next()
        .ok_or("usage: leader_engine URL [TIME], such as: redis://127.0.0.1:6379/leader 10s")?;
    let time = arguments
        .next()
        .map_or(Ok(Duration::from_secs(3)), |time| {
            humantime::parse_duration(&time)
        })?;

    let me = std::process::id();
    let lease = Lease::connect(url)
        .on_lost(move |loss| println!("{me} does not lead any more: {}", loss.reason))
        .build()?;
    if let Some(leader) = lease.owner()? {
        println!("{me} waits for {}", leader.describe());
    }
    let guard = lease.lock()?;
    println!("{me} leads with token {}", guard.token());
    if let Some(before) = guard.recovered() {
        println!("{me} learns that the previous leader did not release: {before}");
    }

    let end = Instant::now() + time;
    // Lead here: send the token with every write. The wait ends early when the lease is lost.
    match guard.lost().wait(&Wait::until(end)) {
        Err(still_held) if still_held.is_timeout() => {
            guard.release()?;
            println!("{me} releases");
        }
        lost => println!("{me} stops working: {}", lost?),
    }
    Ok(())
}
