//! Each part of the pipeline taken away for a while at full load: what the broker acknowledged is stored once on every
//! node, memory stays bounded, and the broker keeps its connection when it is not the broker that is away.

mod outcome;
mod scenario;
mod stage;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};

use crate::terminal::{say, time};
pub use outcome::Outcome;
use outcome::{document, table};
use playground::link::After;
pub use scenario::Scenario;
use stage::Stage;
use watch::Watch;

/// Under load before anything is broken: the live rate is measured here.
const WARM_UP: Duration = Duration::from_secs(5);

/// Options of `drill outages`.
#[derive(Debug, Clone, Args)]
pub struct OutageArgs {
    /// Messages per second that the devices send
    #[arg(long, default_value_t = 20_000, value_name = "N", value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    pub rate: u32,
    /// Duration of each outage
    #[arg(long, default_value = "60s", value_name = "TIME", value_parser = time)]
    pub outage: Duration,
    /// Only these; may be repeated [default: all]
    #[arg(long, value_name = "NAME")]
    pub only: Vec<Scenario>,
    /// How to treat connections affected by a cut when the network is back
    #[arg(long, default_value = "continue", value_name = "HOW")]
    pub after_cut: After,
    /// Extra settings for mqtt-consumer; may be repeated [example: --set ingest.writers=3]
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
    /// Write the outcomes as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

impl OutageArgs {
    /// Everything at this rate for this long.
    #[must_use]
    pub fn new(rate: u32, outage: Duration) -> Self {
        Self { rate, outage, only: Vec::new(), after_cut: After::default(), set: Vec::new(), json: None }
    }
}

/// Runs the scenarios one after the other and prints the table.
///
/// # Errors
/// When a server cannot be started or asked; what a scenario shows to be wrong is no error but its outcome.
pub async fn run(args: OutageArgs) -> anyhow::Result<ExitCode> {
    let chosen = if args.only.is_empty() { Scenario::value_variants() } else { args.only.as_slice() };
    let mut outcomes = Vec::new();
    for scenario in chosen {
        let outcome = one(*scenario, &args).await.with_context(|| format!("drill {}", scenario.name()))?;
        say(&outcome);
        outcomes.push(outcome);
        // Written after each: what has been measured is kept if a later one fails.
        if let Some(path) = &args.json {
            let text = serde_json::to_string_pretty(&document(&args, &outcomes)).context("write the JSON")?;
            std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
        }
    }
    say(table(&outcomes));
    Ok(if outcomes.iter().all(Outcome::holds) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// One scenario on servers of its own.
///
/// # Errors
/// As [`run`].
pub async fn one(scenario: Scenario, args: &OutageArgs) -> anyhow::Result<Outcome> {
    let mut stage = Stage::start(scenario, args).await?;
    let mut watch = Watch::new(&stage).await?;
    watch.until_flowing(&mut stage).await?;
    watch.hold(&mut stage, WARM_UP.min(args.outage)).await;
    watch.live();
    scenario.happen(&mut stage, &mut watch, args).await?;
    watch.until_caught_up(&mut stage).await;
    let report = watch.finish(&mut stage).await?;
    Ok(watch.outcome(scenario, args, &report))
}
