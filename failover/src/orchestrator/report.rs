//! What callers are told: status, reports of operations, alarms. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use failover_api::{Copies, Mode, Node, NodeReport, Report, Role, StepError, SyncState};

use crate::decide::{FENCES, Rules};
use crate::history::Entry;
use crate::orchestrator::checks::in_doubt;
use crate::protocol::{NodeStatus, Postmaster, Upstream, millis};
use crate::state::State;
use crate::view::{Condition, View};

/// The goal of the product.
pub const TIER0_LIMIT_MS: f64 = 5000.0;

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
                SyncState::None
            } else if state.sync_set.contains(node) {
                SyncState::Sync
            } else if state.wait_for.contains(node) {
                SyncState::CatchingUp
            } else if attached.is_some_and(|standby| standby.streaming) {
                SyncState::Async
            } else {
                SyncState::None
            };
            NodeReport {
                region: node.clone(),
                address: rules.addresses.get(node).map(address).unwrap_or_default(),
                role: role(status),
                timeline: sample.map(|sample| sample.timeline),
                lsn: sample.map(|sample| sample.lsn),
                lag_bytes: lag,
                lag_seconds: sample.filter(|sample| sample.in_recovery).map(|sample| sample.lag_seconds),
                sync_state,
                replay_bytes: sample
                    .filter(|sample| sample.in_recovery)
                    .and_then(|sample| sample.replayed.map(|replayed| sample.lsn.since(replayed))),
                kept: state.kept.get(node).map(|kept| kept.reason.clone()),
                trouble: seen.trouble.clone().or_else(|| status.and_then(|status| status.trouble.clone())),
                epoch: seen.status.as_ref().map(|status| status.epoch),
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
pub fn role(status: Option<&NodeStatus>) -> Role {
    let Some(status) = status else { return Role::Unknown };
    match status.postmaster {
        _ if status.foreign.is_some() => Role::Foreign,
        Postmaster::Stopped { .. } => Role::Stopped,
        Postmaster::Starting => Role::Starting,
        Postmaster::Stopping => Role::Stopping,
        Postmaster::Rebuilding { .. } => Role::Rebuilding,
        Postmaster::Running if status.is_writable() => Role::Primary,
        Postmaster::Running if status.is_standby() => Role::Standby,
        Postmaster::Running => Role::Unknown,
    }
}

/// Where writers go: to the writable node with the highest timeline.
#[must_use]
pub fn writers_see(view: &View, rules: &Rules, now: Duration) -> Option<Node> {
    let writable = view.nodes.iter().filter_map(|(node, seen)| {
        let status = seen.fresh(now, &rules.policy).filter(|status| status.is_writable())?;
        Some((status.timeline(), node))
    });
    writable.max().map(|(_, node)| node.clone())
}

/// What a person must know now.
#[must_use]
pub fn alarms(state: &State, view: &View, rules: &Rules, now: Duration) -> Vec<String> {
    let mut alarms = Vec::new();
    let policy = &rules.policy;
    let primary = &state.primary;
    let doubts = view.doubts(state, now, policy);
    if !doubts.is_empty() {
        alarms.push(in_doubt(&doubts));
    }
    if let Some(seen) = writers_see(view, rules, now)
        && seen != *primary
    {
        alarms.push(format!("writers see {seen} as the primary, not {primary}: they go by the timeline"));
    }
    let candidates = view.candidates(&state.sync_set, &state.system_id, now, policy);
    // What is said changes only when a fact does: each change is a line of the log.
    for node in view.nodes.keys().filter(|node| view.full(node, now).is_some()) {
        alarms.push(format!("the disk of {node} is full: make room"));
    }
    // Commits may wait for somebody who was given up.
    if let Some(trouble) = view.node(primary).and_then(|seen| seen.trouble.as_ref()) {
        alarms.push(format!(
            "{primary} does not carry out an order, and commits may wait until it does: {trouble}"
        ));
    }
    match view.condition(primary, now, policy) {
        Condition::Alive => {
            if view.stalled(primary, &state.wait_for, now, policy).is_some() {
                let next = if candidates.is_empty() || state.mode == Mode::Paused {
                    "look at its disk, or POST /failover/{region}".to_owned()
                } else {
                    format!("a failover follows after {} s", policy.stall_after.as_secs())
                };
                alarms.push(format!(
                    "the primary {primary} commits nothing, although its standbys have all that it has written: {next}"
                ));
            }
        }
        Condition::Uncertain(reason) => alarms.push(format!("the primary is uncertain: {reason}")),
        Condition::Standby => alarms.push(format!("the primary {primary} is not writable yet")),
        found @ (Condition::Gone | Condition::Lost) => {
            let hint = if !doubts.is_empty() {
                "nothing is done, see above"
            } else if state.mode == Mode::Paused {
                "automatic failover is paused: POST /mode to resume, or POST /failover/{region}?while_paused=true"
            } else if candidates.is_empty() {
                "no node of the sync set can be promoted; POST /failover/{region}?allow_data_loss=true if it does not come back"
            } else if view.failed_fences >= FENCES {
                "its failover fails, see the history; POST /failover/{region}?allow_data_loss=true, if it does not come back"
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
    for (node, kept) in &state.kept {
        alarms.push(format!(
            "the data of {node} is kept and not rewritten: {}. Take out what is missing (runbook kept-source), then POST /discard/{node}",
            kept.reason
        ));
    }
    let leader = view.node(primary).and_then(|seen| seen.sample(now, policy));
    for (node, seen) in view.nodes.iter().filter(|(node, _)| *node != primary) {
        let Some(status) = seen.fresh(now, policy) else {
            alarms.push(format!("the agent of {node} is not heard"));
            continue;
        };
        if let Some(pid) = status.foreign {
            alarms.push(format!(
                "a postmaster (process {pid}) that its agent has not started runs on the data of {node}: stop it (pg_ctl stop -m fast -W)"
            ));
        }
        let because = seen.trouble.as_ref().or(status.trouble.as_ref());
        let because = because.map(|trouble| format!(": {trouble}")).unwrap_or_default();
        if seen.absent_since.is_some_and(|since| now.saturating_sub(since) > policy.degrade_after) {
            alarms.push(format!("standby {node} does not stream from {primary}{because}"));
        } else if state.sync_set.contains(node) && !candidates.contains(&node) {
            alarms.push(format!("{node} holds every acknowledged commit and could not be promoted{because}"));
        } else if seen.is_unsteady(now) {
            alarms.push(format!("standby {node} comes and goes; commits wait for it again when it stays"));
        }
        let held = status.sample.as_ref().and_then(|sample| Some(sample.lsn.since(sample.replayed?)));
        if held.is_some_and(|held| held > policy.max_lag_bytes) {
            let most = policy.max_lag_bytes;
            alarms.push(format!(
                "{node} has more than {most} bytes that it has not replayed: a failover to it waits for them; look for long queries on it"
            ));
        }
        let strangers = leader.iter().flat_map(|sample| &sample.standbys);
        if strangers
            .filter(|standby| standby.node == *node && standby.streaming && !standby.is_genuine())
            .count()
            > 0
        {
            alarms.push(format!(
                "somebody else receives WAL from {primary} under the name {node}: {node} does not count as in sync; end it (SELECT pid, \
                 client_addr FROM pg_stat_replication WHERE application_name = '{node}')"
            ));
        }
    }
    alarms
}

/// Bytes of lag by node, for metrics.
#[must_use]
pub fn lags(reports: &[NodeReport]) -> BTreeMap<Node, u64> {
    reports.iter().filter_map(|node| Some((node.region.clone(), node.lag_bytes?))).collect()
}
