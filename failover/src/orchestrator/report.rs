//! What callers are told: status, reports of operations, alarms. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::decide::Rules;
use crate::history::{Entry, Verification};
use crate::lsn::Lsn;
use crate::operation::{Kind, StepRecord};
use crate::protocol::{Node, NodeStatus, Postmaster, Upstream, millis};
use crate::state::{Copies, Mode, State};
use crate::view::{Condition, View};

/// The goal of the product.
pub const TIER0_LIMIT_MS: f64 = 5000.0;

/// `GET /status`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Status {
    pub current_region: Node,
    /// `alive`, `gone`, `lost`, `standby` or why it is uncertain.
    pub primary_condition: String,
    pub epoch: u64,
    pub mode: Mode,
    pub copies: Copies,
    /// Standbys that hold every acknowledged commit.
    pub sync_set: BTreeSet<Node>,
    /// Standbys each commit waits for.
    pub wait_for: BTreeSet<Node>,
    pub nodes: Vec<NodeReport>,
    pub redis: RedisReport,
    pub deployment_version: String,
    pub failover_count: u64,
    pub failover_under_way: bool,
    pub last_failover: Option<Report>,
    /// What a person must know. Empty when all is well.
    pub alarms: Vec<String>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct RedisReport {
    pub configured: bool,
    /// `host:port` as Sentinel says.
    pub master: Option<String>,
    pub region: Option<Node>,
    pub error: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct NodeReport {
    pub region: Node,
    pub address: String,
    /// `primary`, `standby`, `stopped`, `starting`, `stopping`, `rebuilding` or `unknown`.
    pub role: String,
    pub timeline: Option<u32>,
    pub lsn: Option<Lsn>,
    pub lag_bytes: Option<u64>,
    pub lag_seconds: Option<f64>,
    /// `sync`: holds every acknowledged commit. `catching_up`: waited for, not confirmed yet. `async`: streams. `none`.
    pub sync_state: String,
    /// Streams from the primary, by its own words. False for the primary; a switchover needs it of its target.
    pub streaming: bool,
    pub agent_last_seen_ms: Option<u64>,
    pub postgres_last_seen_ms: Option<u64>,
}

/// Answer of `POST /failover/{region}` and an entry of `GET /history`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Report {
    pub id: String,
    pub number: u64,
    pub kind: Kind,
    pub success: bool,
    #[schema(value_type = String)]
    pub start_time: Timestamp,
    #[schema(value_type = String)]
    pub end_time: Timestamp,
    pub source_region: Node,
    pub target_region: Node,
    pub actor: String,
    pub reason: String,
    pub steps: Vec<StepRecord>,
    pub total_duration_ms: f64,
    /// Below 5 s, and done.
    pub tier0_compliant: bool,
    /// From the moment the source was known to be down, or was asked to stop, to the first commit on the target.
    pub write_gap_ms: Option<f64>,
    pub error: Option<StepError>,
    pub epoch: u64,
    pub timeline_before: u32,
    pub timeline_after: u32,
    pub source_lsn: Option<Lsn>,
    pub target_lsn: Option<Lsn>,
    /// Of WAL that the target may have lacked. Null: not known.
    pub bytes_at_risk: Option<u64>,
    /// How many copies the target's commits have at first.
    pub copies_after: usize,
    pub hash: String,
    pub previous_hash: String,
}

/// The step that failed and what was undone.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct StepError {
    pub code: String,
    pub step: String,
    pub message: String,
    pub rolled_back: String,
}

/// `GET /history`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct HistoryReport {
    /// Newest first.
    pub failovers: Vec<Report>,
    /// With `?verify=true`.
    pub verification: Option<Verification>,
}

/// An entry of the history as callers see it.
#[must_use]
pub fn report(entry: &Entry) -> Report {
    let operation = &entry.operation;
    Report {
        id: operation.id.clone(),
        number: entry.number,
        kind: operation.kind,
        success: entry.success,
        start_time: operation.started_at,
        end_time: entry.ended_at,
        source_region: operation.source.clone(),
        target_region: operation.target.clone(),
        actor: operation.actor.clone(),
        reason: operation.reason.clone(),
        steps: operation.steps.clone(),
        total_duration_ms: entry.total_duration_ms,
        tier0_compliant: entry.success && entry.total_duration_ms < TIER0_LIMIT_MS,
        write_gap_ms: operation.write_gap_ms,
        error: entry.failure.as_ref().map(|failure| StepError {
            code: "step_failed".into(),
            step: failure.step.name().into(),
            message: failure.error.clone(),
            rolled_back: failure.rolled_back.clone(),
        }),
        epoch: operation.epoch,
        timeline_before: operation.timeline_before,
        timeline_after: operation.timeline_after,
        source_lsn: operation.source_lsn,
        target_lsn: operation.target_lsn,
        bytes_at_risk: operation.bytes_at_risk,
        copies_after: operation.wait_for_after.len() + 1,
        hash: entry.hash.clone(),
        previous_hash: entry.previous.clone(),
    }
}

/// One word, or the reason for having none.
#[must_use]
pub fn condition(condition: &Condition) -> String {
    match condition {
        Condition::Alive => "alive".into(),
        Condition::Gone => "gone".into(),
        Condition::Lost => "lost".into(),
        Condition::Standby => "standby".into(),
        Condition::Uncertain(reason) => reason.clone(),
    }
}

/// One row per node.
#[must_use]
pub fn nodes(state: &State, view: &View, rules: &Rules, now: Duration) -> Vec<NodeReport> {
    let primary = view.node(&state.primary).and_then(|seen| seen.sample(now, &rules.policy));
    let upstream = rules.addresses.get(&state.primary);
    let ago = |at: Option<Duration>| at.map(|at| millis(now.saturating_sub(at)));
    view.nodes
        .iter()
        .map(|(node, seen)| {
            let status = seen.fresh(now, &rules.policy);
            let sample = status.and_then(|status| status.sample.as_ref());
            let attached =
                primary.and_then(|primary| primary.standbys.iter().find(|standby| standby.node == *node));
            let lag = attached.zip(primary).map(|(standby, primary)| primary.lsn.since(standby.flushed));
            let sync_state = if *node == state.primary {
                "none"
            } else if state.sync_set.contains(node) {
                "sync"
            } else if state.wait_for.contains(node) {
                "catching_up"
            } else if attached.is_some_and(|standby| standby.streaming) {
                "async"
            } else {
                "none"
            };
            NodeReport {
                region: node.clone(),
                address: rules.addresses.get(node).map(address).unwrap_or_default(),
                role: role(status).into(),
                timeline: sample.map(|sample| sample.timeline),
                lsn: sample.map(|sample| sample.lsn),
                lag_bytes: lag,
                lag_seconds: sample.filter(|sample| sample.in_recovery).map(|sample| sample.lag_seconds),
                sync_state: sync_state.into(),
                streaming: seen.sample(now, &rules.policy).is_some()
                    && upstream.is_some_and(|upstream| seen.streams_from(upstream)),
                agent_last_seen_ms: ago(seen.heard),
                postgres_last_seen_ms: ago(seen.probed),
            }
        })
        .collect()
}

/// `host:port`.
#[must_use]
pub fn address(upstream: &Upstream) -> String {
    format!("{}:{}", upstream.host, upstream.port)
}

/// What a node is now.
#[must_use]
pub fn role(status: Option<&NodeStatus>) -> &'static str {
    match status.map(|status| (&status.postmaster, status)) {
        None => "unknown",
        Some((Postmaster::Stopped { .. }, _)) => "stopped",
        Some((Postmaster::Starting, _)) => "starting",
        Some((Postmaster::Stopping, _)) => "stopping",
        Some((Postmaster::Rebuilding { .. }, _)) => "rebuilding",
        Some((Postmaster::Running, status)) if status.is_writable() => "primary",
        Some((Postmaster::Running, status)) if status.is_standby() => "standby",
        Some((Postmaster::Running, _)) => "unknown",
    }
}

/// What a person must know now.
#[must_use]
pub fn alarms(state: &State, view: &View, rules: &Rules, now: Duration) -> Vec<String> {
    let mut alarms = Vec::new();
    let policy = &rules.policy;
    let primary = &state.primary;
    match view.condition(primary, now, policy) {
        Condition::Alive => {}
        Condition::Uncertain(reason) => alarms.push(format!("the primary is uncertain: {reason}")),
        Condition::Standby => alarms.push(format!("the primary {primary} is not writable yet")),
        found @ (Condition::Gone | Condition::Lost) => {
            let candidates = view.candidates(&state.sync_set, &state.system_id, now, policy);
            let hint = if state.mode == Mode::Paused {
                "automatic failover is paused: POST /mode to resume, or POST /failover/{region}?while_paused=true"
            } else if candidates.is_empty() {
                "no node of the sync set can be promoted; POST /failover/{region}?allow_data_loss=true if it does not come back"
            } else {
                "a failover follows"
            };
            alarms.push(format!("the primary {primary} is {}: {hint}", condition(&found)));
        }
    }
    if state.sync_set.is_empty() {
        alarms.push(match rules.copies {
            Copies::Available if state.mode == Mode::Paused => {
                "ONE COPY: no standby holds every acknowledged commit, and while paused none is started or rebuilt: POST /mode to resume"
                    .into()
            }
            Copies::Available => {
                "ONE COPY: no standby holds every acknowledged commit; automatic failover is not possible"
                    .into()
            }
            Copies::TwoCopies => "no standby is in sync: commits wait until one is".into(),
        });
    }
    for (node, seen) in view.nodes.iter().filter(|(node, _)| *node != primary) {
        if seen.fresh(now, policy).is_none() {
            alarms.push(format!("the agent of {node} is not heard"));
        } else if let Some(since) = seen.absent_since
            && now.saturating_sub(since) > policy.degrade_after
        {
            alarms.push(format!("standby {node} does not stream from {primary}"));
        }
    }
    alarms
}

/// Bytes of lag by node, for metrics.
#[must_use]
pub fn lags(reports: &[NodeReport]) -> BTreeMap<Node, u64> {
    reports.iter().filter_map(|node| Some((node.region.clone(), node.lag_bytes?))).collect()
}
