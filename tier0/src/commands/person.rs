//! `tier0 adopt REGION` and `tier0 discard REGION`: what only a person may decide.

use std::process::ExitCode;

use anyhow::bail;
use clap::Args;
use failover_api::{AdoptPlan, Problem, Report, word};

use super::failover::{check_name, post};
use crate::home::Home;
use crate::terminal::say;

/// Options of `adopt`.
#[derive(Debug, Clone, Args)]
pub struct AdoptArgs {
    /// Region whose data is right
    pub region: String,
    /// Only show the findings and the checks
    #[arg(long)]
    pub dry_run: bool,
    /// Run even if another region may have readings that this one lacks: its data is kept but not used
    #[arg(long)]
    pub allow_data_loss: bool,
    /// Run even if the agent of another region does not answer: that region may be writable
    #[arg(long)]
    pub while_unheard: bool,
    /// Reason for the history: letters, digits, spaces and . , : - _
    #[arg(long, default_value = "")]
    pub reason: String,
    /// Print the orchestrator's answer unchanged
    #[arg(long)]
    pub json: bool,
}

/// Options of `discard`.
#[derive(Debug, Clone, Args)]
pub struct DiscardArgs {
    /// Region whose data is kept
    pub region: String,
    /// Only show what would be discarded
    #[arg(long)]
    pub dry_run: bool,
    /// Reason for the history: letters, digits, spaces and . , : - _
    #[arg(long, default_value = "")]
    pub reason: String,
    /// Print the orchestrator's answer unchanged
    #[arg(long)]
    pub json: bool,
}

/// Takes the world as it is for the truth.
///
/// # Errors
/// When there is no orchestrator, or it does not answer.
pub async fn adopt(home: &Home, args: &AdoptArgs) -> anyhow::Result<ExitCode> {
    check_name(&args.region)?;
    let path = format!(
        "/adopt/{}?dry_run={}&allow_data_loss={}&while_unheard={}&reason={}",
        args.region,
        args.dry_run,
        args.allow_data_loss,
        args.while_unheard,
        encoded(&args.reason)?
    );
    let (code, body) = post(home, &path).await?;
    if !args.json
        && let Ok(plan) = serde_json::from_str::<AdoptPlan>(&body)
    {
        show_plan(&plan);
        return Ok(if plan.possible { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let adopted = format!(
        "{} is the primary of record now, and every agent obeys this orchestrator; see tier0 status",
        args.region
    );
    show(code, &body, args.json, &adopted)
}

/// Gives up what was kept.
///
/// # Errors
/// When there is no orchestrator, or it does not answer.
pub async fn discard(home: &Home, args: &DiscardArgs) -> anyhow::Result<ExitCode> {
    check_name(&args.region)?;
    let path = format!("/discard/{}?dry_run={}&reason={}", args.region, args.dry_run, encoded(&args.reason)?);
    let (code, body) = post(home, &path).await?;
    if !args.json
        && let Ok(plan) = serde_json::from_str::<serde_json::Value>(&body)
        && let Some(kept) = plan.get("gives_up").and_then(serde_json::Value::as_str)
    {
        say(format!("{} would be rewritten. Nothing was changed. It is kept because {kept}", args.region));
        return Ok(ExitCode::SUCCESS);
    }
    let given_up = format!("{} is rewritten from the primary like any other from now on", args.region);
    show(code, &body, args.json, &given_up)
}

fn show(code: u16, body: &str, json: bool, done: &str) -> anyhow::Result<ExitCode> {
    if json {
        say(body.trim());
    } else if let Ok(report) = serde_json::from_str::<Report>(body) {
        say(format!("{done} (epoch {}, history entry {})", report.epoch, report.number));
    } else if let Ok(problem) = serde_json::from_str::<Problem>(body) {
        say(format!("refused ({code} {}): {}", problem.error.code, problem.error.message));
    } else {
        bail!("the orchestrator answered {code}: {}", body.trim());
    }
    Ok(if code == 200 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn show_plan(plan: &AdoptPlan) {
    let verdict = if plan.possible { "possible" } else { "NOT possible" };
    say(format!("adopt {}: {verdict}. Nothing was changed.", plan.region));
    for node in &plan.nodes {
        let heard = if node.heard { "" } else { ", NOT HEARD" };
        say(format!(
            "  {:<16}{:<11}timeline {:<4}{:<14}epoch {:<6}of {}{heard}",
            node.region,
            word(&node.role),
            node.timeline,
            node.lsn.to_string(),
            node.epoch,
            if node.orchestrator.is_empty() { "nobody" } else { &node.orchestrator }
        ));
        if let Some(kept) = &node.kept {
            say(format!("    would be kept: {kept}"));
        }
    }
    for check in &plan.checks {
        say(format!("  {:<5}{:<20}{}", if check.ok { "ok" } else { "NO" }, check.name, check.detail));
    }
    if let Some(refusal) = &plan.refusal {
        say(format!("  {}: {}", refusal.code, refusal.message));
    }
}

/// For a URL.
fn encoded(reason: &str) -> anyhow::Result<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || " .,:-_".contains(c);
    if !reason.chars().all(plain) {
        bail!("--reason may consist of letters, digits, spaces and . , : - _");
    }
    Ok(reason.replace(' ', "%20").replace(',', "%2C").replace(':', "%3A"))
}
