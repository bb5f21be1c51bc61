//! `tier0 drill`: things are broken on purpose under load, and what was promised is checked. Every drill runs on
//! servers of its own; nothing of `up` is touched.

pub mod failover;
pub mod outages;

use std::process::ExitCode;

use clap::Subcommand;

/// Which drill.
#[derive(Debug, Subcommand)]
pub enum Drill {
    /// Make each component unavailable for a while under load; nothing acknowledged may be lost or stored
    /// twice
    #[command(
        after_help = "Each scenario has fresh servers on free ports. With the defaults all of them take about half \
an hour.
Exit status 1 when a ledger does not match a node's tables, when the consumer took more memory than stated, or when it
lost the broker although only Postgres was away.
Examples:
  tier0 drill outages
  tier0 drill outages --only postgres-away --outage 60s --json target/outages.json
  tier0 drill outages --only cut-consumer-primary --after-cut reset --rate 5000 --outage 15s"
    )]
    Outages(outages::OutageArgs),
    /// Kill, freeze, cut and restart processes of two regions at random; nothing acknowledged may be lost
    #[command(
        after_help = "After each round both nodes must become whole by themselves, and everything acknowledged must be on both.
Exit status 1 when something does not hold; the message names the seed and the round.
Examples:
  tier0 drill failover --for 10m
  tier0 drill failover --seed 42 --rounds 20"
    )]
    Failover(failover::FaultArgs),
}

/// Runs it; the exit status says whether everything held.
///
/// # Errors
/// When a server cannot be started or asked.
pub async fn run(drill: Drill) -> anyhow::Result<ExitCode> {
    match drill {
        Drill::Outages(args) => outages::run(args).await,
        Drill::Failover(args) => failover::run(args).await,
    }
}
