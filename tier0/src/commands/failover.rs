//! `tier0 failover REGION` and the regions' part of `tier0 status`: what the orchestrator says, as a person reads it.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use failover_api::{Copies, Mode, Plan, Problem, Report, Role, Status, SyncState, word};
use jiff::Timestamp;

use crate::home::Home;
use crate::terminal::say;
use playground::process::Process;
use playground::{http, regions};

pub(super) const ORCHESTRATOR: &str = "failover-orchestrator";
/// A switchover may have to wait for a checkpoint.
const ANSWER: Duration = Duration::from_secs(180);

/// Options of `failover`.
#[derive(Debug, Clone, Args)]
pub struct FailoverArgs {
    /// Region that becomes the primary
    pub region: String,
    /// Only show the checks and the plan
    #[arg(long)]
    pub dry_run: bool,
    /// Accept the loss of commits that the region does not have
    #[arg(long)]
    pub allow_data_loss: bool,
    /// Switch over to a standby that lags; its data is checked after the stop
    #[arg(long)]
    pub force: bool,
    /// Run even if automatic failover is paused
    #[arg(long)]
    pub while_paused: bool,
    /// Refuse unless this region is the primary
    #[arg(long, value_name = "REGION")]
    pub expected_primary: Option<String>,
    /// Print the orchestrator's answer unchanged
    #[arg(long)]
    pub json: bool,
}

impl FailoverArgs {
    fn path(&self) -> String {
        let mut path = format!("/failover/{}?dry_run={}", self.region, self.dry_run);
        for (name, on) in [
            ("allow_data_loss", self.allow_data_loss),
            ("force", self.force),
            ("while_paused", self.while_paused),
        ] {
            if on {
                path.push_str(&format!("&{name}=true"));
            }
        }
        if let Some(expected) = &self.expected_primary {
            path.push_str(&format!("&expected_primary={expected}"));
        }
        path
    }
}

/// Makes a region the primary. Exit status 0 when it is, or when the plan is possible; 1 otherwise.
///
/// # Errors
/// When there is no orchestrator, or it does not answer.
pub async fn failover(home: &Home, args: &FailoverArgs) -> anyhow::Result<ExitCode> {
    let names = [Some(&args.region), args.expected_primary.as_ref()];
    names.into_iter().flatten().try_for_each(|name| check_name(name))?;
    let (code, body) = post(home, &args.path()).await?;
    if args.json {
        say(body.trim());
    } else if let Ok(plan) = serde_json::from_str::<Plan>(&body) {
        show_plan(&plan);
        return Ok(if plan.possible { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    } else if let Ok(report) = serde_json::from_str::<Report>(&body) {
        show_report(&report);
    } else if let Ok(problem) = serde_json::from_str::<Problem>(&body) {
        say(format!("refused ({code} {}): {}", problem.error.code, problem.error.message));
    } else {
        bail!("the orchestrator answered {code}: {}", body.trim());
    }
    Ok(if code == 200 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

pub(super) fn check_name(name: &str) -> anyhow::Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if name.is_empty() || !name.chars().all(plain) {
        bail!("a region's name consists of letters, digits, _ and -");
    }
    Ok(())
}

/// Asks the orchestrator that runs here to do something.
pub(super) async fn post(home: &Home, path: &str) -> anyhow::Result<(u16, String)> {
    let state = home.state()?;
    let orchestrator = state.processes.iter().find(|process| process.name == ORCHESTRATOR);
    let orchestrator = orchestrator.context("no orchestrator runs here (tier0 up starts one)")?;
    let token = regions::read_token(home.data())?;
    http::post(orchestrator.port, path, &token, "", ANSWER).await
}

fn show_plan(plan: &Plan) {
    let verdict = if plan.possible { "possible" } else { "NOT possible" };
    say(format!("{} -> {}: {verdict}. Nothing was changed.", plan.source_region, plan.target_region));
    for check in &plan.checks {
        say(format!("  {:<5}{:<20}{}", if check.ok { "ok" } else { "NO" }, check.name, check.detail));
    }
    say(format!("  steps: {}", plan.plan.join(", ")));
    say(format!(
        "  about {:.1} s; {} at risk; {} right afterwards",
        plan.estimated_ms / 1000.0,
        plan.bytes_at_risk.map_or_else(|| "not known what is".into(), |bytes| format!("{bytes} bytes")),
        if plan.copies_after > 1 { "two copies of each commit" } else { "one copy of each commit" }
    ));
    if let Some(refusal) = &plan.refusal {
        say(format!("  {}: {}", refusal.code, refusal.message));
    }
}

pub(super) fn show_report(report: &Report) {
    for step in &report.steps {
        say(format!(
            "  {:>2} {:<10}{:>8.0} ms  {:<12}{}",
            step.number,
            step.action,
            step.duration_ms,
            word(&step.status),
            step.detail
        ));
    }
    match &report.error {
        None => say(format!(
            "{} is the primary: {:.2} s in all, nobody could write for {:.2} s",
            report.target_region,
            report.total_duration_ms / 1000.0,
            report.write_gap_ms.unwrap_or_default() / 1000.0
        )),
        Some(error) => {
            say(format!("FAILED at {}: {}. Undone: {}", error.step, error.message, error.rolled_back))
        }
    }
}

/// The regions, when an orchestrator runs. False when something is wrong with them.
pub(super) async fn show(processes: &[Process]) -> bool {
    let Some(orchestrator) = processes.iter().find(|process| process.name == ORCHESTRATOR) else {
        return true;
    };
    match regions::status_at(orchestrator.port).await {
        Ok(status) => {
            lines(&status, Timestamp::now()).iter().for_each(say);
            status.alarms.is_empty()
        }
        Err(error) => {
            say(format!("regions: the orchestrator does not say: {error:#}"));
            false
        }
    }
}

fn lines(status: &Status, now: Timestamp) -> Vec<String> {
    let mode = match status.mode {
        Mode::Auto => "automatic failover is on",
        Mode::Paused => "automatic failover is PAUSED",
    };
    let mut lines = vec![format!("regions: {} is the primary; {mode}", status.current_region)];
    for node in &status.nodes {
        let what = match (node.role, node.sync_state) {
            _ if node.kept.is_some() => "KEPT: is not rewritten until tier0 discard",
            (Role::Standby, SyncState::Sync) if node.streaming => "holds every acknowledged commit",
            (Role::Standby, SyncState::Sync) => "holds every acknowledged commit, DOES NOT STREAM",
            (Role::Standby, SyncState::CatchingUp) => "is catching up, commits wait for it",
            (Role::Standby, SyncState::Async) => "streams, commits do not wait for it",
            (Role::Standby, SyncState::None) => "DOES NOT STREAM",
            (Role::Foreign, _) => "runs, but not as its agent's",
            _ => "",
        };
        let lag = match (node.lag_bytes, node.lag_seconds) {
            (Some(bytes), Some(seconds)) => format!("{bytes} B, {seconds:.1} s behind"),
            _ => String::new(),
        };
        let role = if node.role == Role::Primary { "PRIMARY".into() } else { word(&node.role) };
        let timeline = node.timeline.map_or_else(|| "-".into(), |timeline| timeline.to_string());
        lines.push(
            format!(
                "  {:<26}{:<20}{role:<10} timeline {timeline:<4} {what}  {lag}",
                node.region, node.address
            )
            .trim_end()
            .to_owned(),
        );
    }
    let copies = match (status.wait_for.is_empty(), status.copies) {
        (false, _) => format!(
            "commits wait for {}",
            status.wait_for.iter().map(String::as_str).collect::<Vec<_>>().join(" and ")
        ),
        (true, Copies::Available) => "commits wait for NO standby: one copy".into(),
        (true, Copies::TwoCopies) => "commits wait until there is a standby".into(),
    };
    lines.push(format!("  {copies}"));
    if status.redis.configured {
        lines.push(match (&status.redis.region, &status.redis.master, &status.redis.error) {
            (Some(region), Some(master), _) => format!("  Redis master in {region} ({master})"),
            (None, Some(master), _) => format!("  Redis master at {master}, of no region"),
            (.., error) => format!("  Redis: {}", error.as_deref().unwrap_or("not seen yet")),
        });
    }
    lines.push(match &status.last_failover {
        None => "  no failover yet".into(),
        Some(last) => format!(
            "  last of {} failovers: {} -> {} {} ago, {} ({}): {}",
            status.failover_count,
            last.source_region,
            last.target_region,
            ago(now.duration_since(last.end_time).as_secs()),
            if last.success {
                format!(
                    "{:.2} s in all, {:.2} s without writes",
                    last.total_duration_ms / 1000.0,
                    last.write_gap_ms.unwrap_or_default() / 1000.0
                )
            } else {
                "FAILED".into()
            },
            last.actor,
            last.reason
        ),
    });
    lines.extend(status.alarms.iter().map(|alarm| format!("  ALARM: {alarm}")));
    lines
}

fn ago(seconds: i64) -> String {
    match seconds {
        ..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        _ => format!("{} h", seconds / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_person_reads_roles_lag_redis_and_alarms() {
        let status: Status = serde_json::from_value(serde_json::json!({
            "current_region": "region2", "primary_condition": "alive", "epoch": 7, "orchestrator": "o", "doubts": [], "writers_see": "region2", "mode": "paused",
            "copies": "available", "sync_set": ["region1"], "wait_for": ["region1"],
            "nodes": [
                {"region": "region1", "address": "h:1", "role": "standby", "timeline": 3, "lsn": "0/10",
                 "lag_bytes": 12, "lag_seconds": 0.1, "sync_state": "sync", "streaming": true, "replay_bytes": 0, "kept": null, "trouble": null, "epoch": 7, "agent_last_seen_ms": 1, "postgres_last_seen_ms": 1},
                {"region": "region2", "address": "h:2", "role": "primary", "timeline": 3, "lsn": "0/10",
                 "lag_bytes": null, "lag_seconds": null, "sync_state": "none", "streaming": false, "replay_bytes": null, "kept": null, "trouble": null, "epoch": 7, "agent_last_seen_ms": 1, "postgres_last_seen_ms": 1}],
            "redis": {"configured": true, "master": "h:3", "region": "region2", "error": null},
            "deployment_version": "1", "failover_count": 1, "failover_under_way": false, "last_failover": null,
            "alarms": ["look here"]
        }))
        .unwrap();
        let text = lines(&status, Timestamp::UNIX_EPOCH).join("\n");
        for wanted in [
            "region2 is the primary; automatic failover is PAUSED",
            "standby    timeline 3    holds every acknowledged commit  12 B, 0.1 s behind",
            "PRIMARY",
            "commits wait for region1",
            "Redis master in region2",
            "no failover yet",
            "ALARM: look here",
        ] {
            assert!(text.contains(wanted), "{wanted} not in\n{text}");
        }
        assert_eq!((ago(5), ago(600), ago(10_000)), ("5 s".into(), "10 min".into(), "2 h".into()));
    }
}
