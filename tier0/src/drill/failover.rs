//! `tier0 drill failover`: random faults on real processes, and after each round the promise is checked.
//!
//! A round is one to three faults at random moments: processes killed, stopped and continued, restarted, the road to an
//! agent cut, a switchover asked for in the middle of it. Then everything is let go, and nobody helps beyond starting again
//! what had ended, as a service manager would. What must hold: both nodes become whole again; every reading the broker
//! acknowledged is stored on both; no node ever acknowledged a commit that the primary does not have (which is what two
//! nodes that can acknowledge would do); the history is intact. The seed is printed and repeats the faults, not the
//! moments at which the machine's scheduler lets them strike.

mod fault;
mod probe;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Args;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::stage::Stage;
use crate::terminal::{say, time};
use crate::verify::Report;
use fault::Fault;
use playground::postgres::Role;
use playground::regions::Plan;
use probe::Probes;

/// Until everything is whole again after a round. A clone of a node that was rewound half-way is in it.
const WHOLE: Duration = Duration::from_secs(120);
/// Between two looks at what is stored.
const AGAIN: Duration = Duration::from_millis(200);
/// Faults strike within this time,
const STRIKE_MS: u64 = 1_500;
/// and are let go after at most so long.
const HOLD_MS: u64 = 4_000;

/// Options.
#[derive(Debug, Clone, Args)]
pub struct FaultArgs {
    /// Do not begin a round after this time
    #[arg(long = "for", value_name = "TIME", value_parser = time, default_value = "5m")]
    pub duration: Duration,
    /// Maximum number of rounds
    #[arg(long, value_name = "N", default_value_t = u32::MAX, hide_default_value = true)]
    pub rounds: u32,
    /// Repeat the faults of an earlier run
    #[arg(long, value_name = "N", env = "TIER0_SEED")]
    pub seed: Option<u64>,
    /// Messages a second
    #[arg(long, value_name = "N", default_value_t = 2_000)]
    pub rate: u32,
}

/// Plays until the time is over; the exit status says that everything held.
///
/// # Errors
/// With the seed and the round, when something did not hold.
pub async fn run(args: FaultArgs) -> anyhow::Result<ExitCode> {
    let seed = args.seed.unwrap_or_else(rand::random);
    say(format!("seed {seed} (TIER0_SEED={seed} or --seed {seed} repeats the faults)"));
    let mut random = StdRng::seed_from_u64(seed);
    let plan = Plan { redis: true, linked: true, ..Plan::default() };
    let mut stage = Stage::start(args.rate, Some(plan)).await?;
    let db = stage.cluster.connect(Role::Owner).await?;
    db.batch_execute(probe::TABLE).await.context("make the probes' table")?;
    drop(db);
    let probes = Probes::start(&stage.cluster);
    let began = Instant::now();
    let mut number = 0;
    while number < args.rounds && began.elapsed() < args.duration {
        number += 1;
        let faults = draw(&mut random);
        let names: Vec<String> = faults.iter().map(ToString::to_string).collect();
        let outcome = round(&mut stage, &probes, &faults).await;
        let outcome = outcome.with_context(|| {
            let logs = stage.dir().display();
            format!("round {number} of seed {seed}: {} (logs in {logs} with TIER0_KEEP=1)", names.join(", "))
        })?;
        say(format!("{number:>3}: {} -> {outcome}", names.join(", ")));
    }
    let report = stage.finish().await.with_context(|| format!("the end of seed {seed}"))?;
    say(&report);
    ensure!(report.holds(), "seed {seed}: {}", report.verdict());
    say(format!("{number} rounds held (seed {seed})"));
    Ok(ExitCode::SUCCESS)
}

fn draw(random: &mut StdRng) -> Vec<Fault> {
    let count = random.random_range(1..=3);
    let mut faults: Vec<Fault> = (0..count)
        .map(|_| {
            let at = Duration::from_millis(random.random_range(0..STRIKE_MS));
            let hold = Duration::from_millis(random.random_range(50..HOLD_MS));
            Fault::draw(random, at, hold)
        })
        .collect();
    faults.sort_by_key(|fault| fault.at);
    faults
}

async fn round(stage: &mut Stage, probes: &Probes, faults: &[Fault]) -> anyhow::Result<String> {
    let before = stage.regions()?.whole(WHOLE).await?;
    let (region, failovers) = (before.current_region, before.failover_count);
    stage.cluster.led_by(&region)?;
    let began = Instant::now();
    // What happens next, whichever fault it belongs to.
    let mut events: Vec<(Duration, bool, &Fault)> = Vec::new();
    for fault in faults {
        events.push((fault.at, true, fault));
        events.push((fault.at + fault.hold, false, fault));
    }
    events.sort_by_key(|(at, ..)| *at);
    for (at, strikes, fault) in events {
        tokio::time::sleep(at.saturating_sub(began.elapsed())).await;
        if strikes {
            fault.strike(stage, &region).await?;
        } else {
            fault.let_go(stage, &region).await?;
        }
    }
    let peace = Instant::now();
    stage.regions()?.restart_ended().await?;
    if !stage.consumer.is_running() {
        stage.consumer.restart().await?;
    }
    // A node that was gone for a moment only may look whole until the orchestrator has noticed; then the primary changes after all.
    let status = loop {
        let status = stage.regions()?.whole(WHOLE).await?;
        stage.cluster.led_by(&status.current_region)?;
        stage.commits.after(Instant::now(), 10, WHOLE).await.context("after the round")?;
        let writable = stage.cluster.writable().await;
        ensure!(writable.len() <= 1, "writable are {writable:?}");
        if writable == [status.current_region.clone()] {
            break status;
        }
        let late = peace.elapsed() > WHOLE;
        ensure!(!late, "writable are {writable:?}, the primary is {}", status.current_region);
    };
    let whole = peace.elapsed();
    // What is lost stays lost; a node that does not answer now is asked again.
    let deadline = Instant::now() + WHOLE;
    let acknowledged = loop {
        stage.settle().await?;
        match probes.check(&stage.cluster).await {
            Ok(acknowledged) => break acknowledged,
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => tokio::time::sleep(AGAIN).await,
        }
    };
    // A snapshot: what it counts is acknowledged, so it must be stored, as soon as the consumer has it.
    let ledger = stage.ledger()?;
    let deadline = Instant::now() + WHOLE;
    loop {
        stage.settle().await?;
        let found = stage.compare(&ledger, &["region1", "region2"]).await;
        if found.as_ref().is_ok_and(Report::holds) {
            break;
        }
        if Instant::now() > deadline {
            let report = found?;
            bail!("acknowledged and not stored: {report}");
        }
        tokio::time::sleep(AGAIN).await;
    }
    let history = loop {
        match stage.regions()?.history().await {
            Ok(history) => break history,
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => tokio::time::sleep(AGAIN).await,
        }
    };
    ensure!(history.verification.is_some_and(|found| found.intact), "the history is broken");
    let made = status.failover_count - failovers;
    Ok(format!(
        "{made} failovers, {} leads, whole after {:.1} s; {acknowledged} commits of the probes are all there",
        status.current_region,
        whole.as_secs_f64()
    ))
}
