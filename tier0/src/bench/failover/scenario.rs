//! How each scenario is played and measured.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use failover_api::{Report, StepStatus};

use super::{FailoverBenchArgs, Scenario};
use crate::stage::Stage;
use crate::terminal::say;
use crate::verify;
use playground::regions::{Plan, kill_postmaster};

/// Nothing takes as long unless it is broken.
const LIMIT: Duration = Duration::from_secs(60);
/// Commits seen before a round begins and after it: a steady stream.
const STEADY: usize = 20;

/// What one round took.
#[derive(Debug, Clone, Default)]
pub(super) struct Round {
    pub(super) gap_s: Option<f64>,
    pub(super) total_s: Option<f64>,
    pub(super) redis_s: Option<f64>,
    pub(super) rejoin_s: Option<f64>,
    /// Of the operation, with their milliseconds: where the time went.
    pub(super) steps: Vec<(String, f64)>,
}

/// All rounds of a scenario; readings lost and stored twice.
pub(super) async fn play(
    scenario: Scenario,
    args: &FailoverBenchArgs,
) -> anyhow::Result<(Vec<Round>, u64, u64)> {
    let mut rounds = Vec::new();
    if scenario == Scenario::Floor {
        let (mut lost, mut duplicated) = (0, 0);
        for number in 1..=args.rounds {
            let (round, report) = floor(args.rate).await?;
            show(number, &round);
            rounds.push(round);
            lost += lost_in(&report);
            duplicated += duplicated_in(&report);
        }
        return Ok((rounds, lost, duplicated));
    }
    let plan = Plan { redis: true, ..Plan::default() };
    let mut stage = Stage::start(args.rate, Some(plan)).await?;
    for number in 1..=args.rounds {
        let round = round(&mut stage, scenario).await.with_context(|| format!("round {number}"))?;
        show(number, &round);
        rounds.push(round);
    }
    let report = stage.finish().await?;
    Ok((rounds, lost_in(&report), duplicated_in(&report)))
}

fn show(number: u32, round: &Round) {
    let text = |value: Option<f64>| value.map_or_else(|| "-".into(), |value| format!("{value:.3}"));
    let steps: String = round.steps.iter().map(|(step, took)| format!(", {step} {took:.0} ms")).collect();
    say(format!(
        "  {number:>2}: gap {} s, total {} s, Redis {} s, rejoin {} s{steps}",
        text(round.gap_s),
        text(round.total_s),
        text(round.redis_s),
        text(round.rejoin_s)
    ));
}

fn lost_in(report: &verify::Report) -> u64 {
    report.nodes.iter().map(|node| node.lost + node.dead_letters_lost).max().unwrap_or(0)
}

fn duplicated_in(report: &verify::Report) -> u64 {
    report.nodes.iter().map(|node| node.rows.saturating_sub(node.distinct) + node.extra).max().unwrap_or(0)
}

/// A rejoin copies gigabytes of WAL; until they are on disk a promotion's fsync waits for them. One round must not pay for
/// the one before.
async fn flushed() -> anyhow::Result<()> {
    tokio::task::spawn_blocking(nix::unistd::sync).await.context("wait for the disk")
}

/// What Postgres needs by itself: nobody decides, nobody fences.
async fn floor(rate: u32) -> anyhow::Result<(Round, verify::Report)> {
    let mut stage = Stage::start(rate, None).await?;
    let standby = stage.cluster.standby().admin().await?;
    flushed().await?;
    stage.commits.after(Instant::now(), STEADY, LIMIT).await?;
    let began = Instant::now();
    kill_postmaster(stage.cluster.primary())?;
    standby.batch_execute("SELECT pg_promote(false)").await.context("promote")?;
    let gap = gap(&stage, began).await?;
    stage.cluster.led_by("region2")?;
    let report = stage.finish().await?;
    Ok((Round { gap_s: Some(gap), ..Round::default() }, report))
}

/// Waits for the commits to flow again, then says how long they did not.
async fn gap(stage: &Stage, began: Instant) -> anyhow::Result<f64> {
    // A commit seen just after the blow may be one from just before it: the stream has to be there for a while.
    stage.commits.after(began + Duration::from_millis(20), 3, LIMIT).await?;
    stage.commits.after(Instant::now(), STEADY, LIMIT).await?;
    Ok(stage.commits.gap_since(began).as_secs_f64())
}

async fn round(stage: &mut Stage, scenario: Scenario) -> anyhow::Result<Round> {
    let from = stage.regions()?.whole(LIMIT).await?.current_region;
    let to = if from == "region1" { "region2" } else { "region1" };
    stage.cluster.led_by(&from)?;
    // After a round that killed its master the orchestrator leads it back.
    stage.regions()?.until("Redis follows", LIMIT, |status| status.redis.follows).await?;
    let redis = stage.regions()?.redis.as_mut().context("a stage with Redis")?;
    redis.settled(LIMIT).await?;
    flushed().await?;
    stage.commits.after(Instant::now(), STEADY, LIMIT).await?;
    if scenario == Scenario::RedisKill {
        return redis_kill(stage).await;
    }
    let began = Instant::now();
    match scenario {
        Scenario::Planned => {
            let (code, body) = stage.regions()?.failover(to, "").await?;
            ensure!(code == 200, "refused: {code} {body}");
        }
        Scenario::PostmasterKill => kill_postmaster(stage.cluster.primary())?,
        Scenario::NodeKill => stage.regions()?.agent(&from)?.kill9().await?,
        Scenario::NodeFreeze => stage.regions()?.agent(&from)?.pause(),
        Scenario::Floor | Scenario::RedisKill => {}
    }
    let failed_over = |status: &failover_api::Status| {
        status.current_region == to && !status.failover_under_way && status.last_failover.is_some()
    };
    let status = stage.regions()?.until("failed over", LIMIT, failed_over).await?;
    let report = status.last_failover.context("an entry in the history")?;
    ensure!(report.success && report.source_region == from, "not a success: {report:#?}");
    let gap = gap(stage, began).await?;
    let mut returned = began;
    match scenario {
        Scenario::NodeKill => {
            returned = Instant::now();
            stage.regions()?.agent(&from)?.restart().await?;
        }
        Scenario::NodeFreeze => {
            returned = Instant::now();
            stage.regions()?.agent(&from)?.resume();
        }
        _ => {}
    }
    stage.regions()?.whole(LIMIT).await?;
    Ok(Round {
        gap_s: Some(gap),
        total_s: Some(report.total_duration_ms / 1000.0),
        redis_s: redis_seconds(&report),
        rejoin_s: Some(returned.elapsed().as_secs_f64()),
        steps: work(report),
    })
}

/// Those that somebody carries out before the first commit; journal and decision only write down.
fn work(report: Report) -> Vec<(String, f64)> {
    let steps = report.steps.into_iter().map(|step| (step.action, step.duration_ms));
    steps.filter(|(step, _)| ["prepare", "fence", "promote", "mark"].contains(&step.as_str())).collect()
}

fn redis_seconds(report: &Report) -> Option<f64> {
    let step = report.steps.iter().find(|step| step.action == "redis")?;
    (step.status == StepStatus::Done).then_some(step.duration_ms / 1000.0)
}

async fn redis_kill(stage: &mut Stage) -> anyhow::Result<Round> {
    let redis = stage.regions()?.redis.as_mut().context("a stage with Redis")?;
    let began = Instant::now();
    let killed = redis.kill_master().await?;
    redis.replaced(killed, LIMIT).await?;
    let took = began.elapsed();
    redis.restart(killed).await?;
    Ok(Round { redis_s: Some(took.as_secs_f64()), ..Round::default() })
}
