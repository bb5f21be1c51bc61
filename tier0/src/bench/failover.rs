//! `tier0 bench-failover`: how long nobody can write, in each way a region can be lost, beside the least that Postgres
//! itself needs. Full telemetry load; the ledger is checked for every scenario.

mod bounds;
mod scenario;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::terminal::say;
use scenario::Round;

/// Options.
#[derive(Debug, Clone, Args)]
pub struct FailoverBenchArgs {
    /// Only this scenario; may be repeated
    #[arg(long)]
    pub only: Vec<Scenario>,
    /// Number of rounds per scenario
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Messages a second
    #[arg(long, default_value_t = 20_000, value_name = "N")]
    pub rate: u32,
    /// File for the figures
    #[arg(long, default_value = "target/bench-failover.json", value_name = "FILE")]
    pub json: PathBuf,
    /// Only report: exit with status 0 regardless of the figures
    #[arg(long)]
    pub no_bounds: bool,
}

/// What happens to the primary's region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Scenario {
    /// kill -9 of the postmaster and pg_promote at once by hand: no agent, no orchestrator, nobody who checks
    Floor,
    /// POST /failover/{region}, back and forth
    Planned,
    /// kill -9 of the postmaster
    PostmasterKill,
    /// kill -9 of the agent and of Postgres with all its processes
    NodeKill,
    /// SIGSTOP of the same
    NodeFreeze,
    /// kill -9 of the Redis master
    RedisKill,
}

/// One line of the table.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    pub scenario: Scenario,
    pub n: usize,
    /// From the last commit before to the first one after, as the consumer sees it.
    pub median_gap_s: Option<f64>,
    pub worst_gap_s: Option<f64>,
    /// The orchestrator's operation, Redis included.
    pub median_total_s: Option<f64>,
    pub worst_total_s: Option<f64>,
    /// Until Sentinel names the other master.
    pub median_redis_s: Option<f64>,
    pub worst_redis_s: Option<f64>,
    /// From the failover, or from the node's return, until both nodes hold everything again.
    pub median_rejoin_s: Option<f64>,
    pub worst_rejoin_s: Option<f64>,
    pub lost: u64,
    pub duplicated: u64,
}

/// Plays all scenarios, prints the table, writes the file. Fails when a promise was not kept, unless it is only to report.
///
/// # Errors
/// When a server does not come up or a failover does not happen.
pub async fn run(args: FailoverBenchArgs) -> anyhow::Result<ExitCode> {
    let all = Scenario::value_variants();
    let mut lines = Vec::new();
    for scenario in all.iter().filter(|scenario| args.only.is_empty() || args.only.contains(scenario)) {
        say(format!("{}: {} rounds at {} messages/s", name(*scenario), args.rounds, args.rate));
        let (rounds, lost, duplicated) =
            scenario::play(*scenario, &args).await.with_context(|| name(*scenario))?;
        lines.push(Line::new(*scenario, &rounds, lost, duplicated));
        write(&args, &lines)?;
    }
    say(table(&lines));
    let broken = bounds::broken(&lines);
    for sentence in &broken {
        say(format!("NOT KEPT  {sentence}"));
    }
    Ok(if broken.is_empty() || args.no_bounds { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn write(args: &FailoverBenchArgs, lines: &[Line]) -> anyhow::Result<()> {
    if let Some(parent) = args.json.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    }
    let text = serde_json::to_string_pretty(lines).context("write the figures")?;
    std::fs::write(&args.json, text).with_context(|| format!("write {}", args.json.display()))
}

fn name(scenario: Scenario) -> String {
    scenario.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

impl Line {
    fn new(scenario: Scenario, rounds: &[Round], lost: u64, duplicated: u64) -> Self {
        let of = |value: fn(&Round) -> Option<f64>| {
            let mut values: Vec<f64> = rounds.iter().filter_map(value).collect();
            values.sort_by(f64::total_cmp);
            (median(&values), values.last().copied())
        };
        let (gap, total) = (of(|round| round.gap_s), of(|round| round.total_s));
        let (redis, rejoin) = (of(|round| round.redis_s), of(|round| round.rejoin_s));
        Self {
            scenario,
            n: rounds.len(),
            median_gap_s: gap.0,
            worst_gap_s: gap.1,
            median_total_s: total.0,
            worst_total_s: total.1,
            median_redis_s: redis.0,
            worst_redis_s: redis.1,
            median_rejoin_s: rejoin.0,
            worst_rejoin_s: rejoin.1,
            lost,
            duplicated,
        }
    }
}

/// Of sorted values.
fn median(values: &[f64]) -> Option<f64> {
    let (low, high) = (values.get((values.len().max(1) - 1) / 2)?, values.get(values.len() / 2)?);
    Some((low + high) / 2.0)
}

fn table(lines: &[Line]) -> String {
    let mut text = format!(
        "\n{:<16}{:>3}  {:>15}  {:>15}  {:>15}  {:>15}  {:>5}  {:>10}\n",
        "scenario", "n", "write gap s", "total s", "Redis s", "rejoin s", "lost", "duplicated"
    );
    let pair = |median: Option<f64>, worst: Option<f64>| match (median, worst) {
        (Some(median), Some(worst)) => format!("{median:.2} ({worst:.2})"),
        _ => "-".into(),
    };
    for line in lines {
        text.push_str(&format!(
            "{:<16}{:>3}  {:>15}  {:>15}  {:>15}  {:>15}  {:>5}  {:>10}\n",
            name(line.scenario),
            line.n,
            pair(line.median_gap_s, line.worst_gap_s),
            pair(line.median_total_s, line.worst_total_s),
            pair(line.median_redis_s, line.worst_redis_s),
            pair(line.median_rejoin_s, line.worst_rejoin_s),
            line.lost,
            line.duplicated
        ));
    }
    text.push_str(
        "median (worst); write gap: last commit before to first commit after, seen at the consumer",
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_holds_median_and_worst() {
        let round = |gap_s| Round { gap_s: Some(gap_s), ..Round::default() };
        let line = Line::new(Scenario::NodeKill, &[round(0.3), round(0.1), round(0.2), round(0.9)], 0, 0);
        assert_eq!((line.n, line.median_gap_s, line.worst_gap_s), (4, Some(0.25), Some(0.9)));
        assert_eq!(line.median_redis_s, None);
        assert!(table(&[line]).contains("node_kill         4      0.25 (0.90)"));
        assert_eq!(median(&[]), None);
    }
}
