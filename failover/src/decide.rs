//! What to do next, as a pure function of what is durable and what was seen.
//!
//! Level-triggered: it compares the state that should be with what is, so that it does not matter which orders were
//! lost and how often we died in between. It never names a target outside the sync set.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::protocol::{Node, Postmaster, Rejoin, Upstream};
use crate::state::{Copies, Mode, State};
use crate::view::{Condition, Policy, Seen, View};

/// The next thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    Nothing,
    /// A journaled operation comes before everything else.
    Resume,
    /// Unplanned failover.
    FailOver {
        target: Node,
        reason: String,
    },
    /// Make the primary of record writable: start it where it is, or promote it.
    Lead {
        node: Node,
        reason: String,
    },
    /// A node that is writable and is not the primary.
    HaltStray {
        node: Node,
    },
    /// Tell the primary which standbys to wait for.
    WaitFor,
    /// Give a standby up, durably.
    Shrink {
        node: Node,
    },
    /// Wait for a standby from now on, durably.
    Widen {
        node: Node,
    },
    /// Have the primary confirm a standby, then count it as in sync, durably.
    Confirm {
        node: Node,
    },
    /// Start a former primary as a standby of nobody, so that an operator can see what it has, and promote it.
    Wake {
        node: Node,
    },
    /// Bring a standby back.
    Rejoin {
        node: Node,
        how: Rejoin,
    },
}

/// What `decide` needs beside state and view.
#[derive(Debug, Clone)]
pub struct Rules {
    pub policy: Policy,
    pub copies: Copies,
    /// Where each node's Postgres is.
    pub addresses: BTreeMap<Node, Upstream>,
}

impl Rules {
    /// Whether a promoted standby will have to wait for somebody from its first commit on.
    #[must_use]
    pub fn guards(&self) -> bool {
        self.copies == Copies::TwoCopies || self.addresses.len() > 2
    }
}

/// The most urgent thing to do. Nodes with an order under way are left alone.
#[must_use]
pub fn decide(state: &State, view: &View, rules: &Rules, now: Duration) -> Action {
    let policy = &rules.policy;
    if state.operation.is_some() {
        return Action::Resume;
    }
    let idle = |node: &str| view.node(node).is_some_and(|seen| !seen.busy && now >= seen.not_before);
    for (node, seen) in &view.nodes {
        let writable = seen.fresh(now, policy).is_some_and(crate::protocol::NodeStatus::is_writable);
        if *node != state.primary && writable && idle(node) {
            return Action::HaltStray { node: node.clone() };
        }
    }
    let primary = &state.primary;
    let condition = view.condition(primary, now, policy);
    let reason = match &condition {
        Condition::Alive => return upkeep(state, view, rules, now),
        _ if state.mode == Mode::Paused => return Action::Nothing,
        Condition::Uncertain(_) => return revive(state, view, rules, now, false),
        Condition::Standby if idle(primary) => {
            return Action::Lead {
                node: primary.clone(),
                reason: "the primary of record is a standby".into(),
            };
        }
        Condition::Standby => return Action::Nothing,
        Condition::Gone => exit_reason(view, primary),
        Condition::Lost => format!("{primary} is not reachable and no standby streams from it"),
    };
    match view.candidates(&state.sync_set, &state.system_id, now, policy).first() {
        Some(target) => Action::FailOver { target: (*target).clone(), reason },
        // We have only just started: a standby in sync that will be heard in a moment is quicker than crash recovery.
        None if now < policy.agent_silence && state.sync_set.iter().any(|node| view.is_unheard(node)) => {
            Action::Nothing
        }
        // Nobody else has everything. If its machine is there, its own data is what is safe.
        None if condition == Condition::Gone && !has_no_data(view, primary) && idle(primary) => {
            Action::Lead { node: primary.clone(), reason: format!("{reason}; no standby is in sync") }
        }
        None => {
            // Its data does not start: the last order failed a moment ago.
            let failed = view.node(primary).is_some_and(|seen| !seen.busy && now < seen.not_before);
            let forsaken = condition == Condition::Lost || failed || has_no_data(view, primary);
            revive(state, view, rules, now, forsaken)
        }
    }
}

/// Its agent has looked and found nothing to start.
fn has_no_data(view: &View, node: &str) -> bool {
    view.node(node).and_then(|seen| seen.status.as_ref()).is_some_and(|status| {
        matches!(status.postmaster, Postmaster::Stopped { settled: true, .. }) && status.control.is_none()
    })
}

/// Without a primary, a stopped standby is started all the same: what it has can then be seen, and promoted when an
/// operator says so. Nothing is rewritten, since there is nothing to copy from. A former primary may be the last one left
/// with data when the primary is `forsaken`: it is woken as a standby of nobody, and acknowledges nothing.
fn revive(state: &State, view: &View, rules: &Rules, now: Duration, forsaken: bool) -> Action {
    for (node, seen) in &view.nodes {
        let Some(status) = seen.fresh(now, &rules.policy) else { continue };
        let Some(control) = &status.control else { continue };
        let settled = matches!(status.postmaster, Postmaster::Stopped { settled: true, .. });
        if *node == state.primary || !settled || seen.busy || now < seen.not_before {
            continue;
        }
        if control.standby && !status.estranged {
            return Action::Rejoin { node: node.clone(), how: Rejoin::Follow };
        }
        if forsaken {
            return Action::Wake { node: node.clone() };
        }
    }
    Action::Nothing
}

/// Why a primary is replaced whose agent says that it does not run: how it ended, as far as that is known.
pub(crate) fn exit_reason(view: &View, primary: &str) -> String {
    match view.node(primary).and_then(|seen| seen.status.as_ref()).map(|status| &status.postmaster) {
        Some(Postmaster::Stopped { exit: Some(exit), .. }) => {
            format!("postmaster of {primary} ended: {exit}")
        }
        _ => not_running(primary),
    }
}

/// The same while it is not known.
pub(crate) fn not_running(primary: &str) -> String {
    format!("postmaster of {primary} is not running")
}

/// The primary lives: keep the sync set true and as large as it can be.
fn upkeep(state: &State, view: &View, rules: &Rules, now: Duration) -> Action {
    let policy = &rules.policy;
    let primary = &state.primary;
    let Some(seen) = view.node(primary).filter(|seen| !seen.busy && now >= seen.not_before) else {
        return rejoin(state, view, rules, now);
    };
    let Some(sample) = seen.sample(now, policy) else { return Action::Nothing };
    if sample.wait_for != state.wait_for {
        return Action::WaitFor;
    }
    for node in &state.wait_for {
        let absent = view.node(node).is_none_or(|seen| {
            seen.absent_since.is_some_and(|since| now.saturating_sub(since) >= policy.degrade_after)
        });
        // With two copies wanted, the last one is waited for, however long.
        if absent && (rules.copies == Copies::Available || state.wait_for.len() > 1) {
            return Action::Shrink { node: node.clone() };
        }
    }
    for standby in sample.standbys.iter().filter(|standby| standby.streaming) {
        let node = &standby.node;
        if !view.nodes.contains_key(node) || node == primary {
            continue;
        }
        if !state.wait_for.contains(node) && sample.lsn.since(standby.flushed) <= policy.max_lag_bytes {
            return Action::Widen { node: node.clone() };
        }
        if state.wait_for.contains(node) && !state.sync_set.contains(node) && standby.sync {
            return Action::Confirm { node: node.clone() };
        }
    }
    rejoin(state, view, rules, now)
}

/// Standbys that run no more or do not stream from the primary.
fn rejoin(state: &State, view: &View, rules: &Rules, now: Duration) -> Action {
    let Some(upstream) = rules.addresses.get(&state.primary) else { return Action::Nothing };
    // Somebody may be at work on a node that is down.
    if state.mode == Mode::Paused {
        return Action::Nothing;
    }
    let leader = view.node(&state.primary).and_then(|seen| seen.sample(now, &rules.policy));
    let leader = leader.map_or(0, |sample| sample.timeline);
    for (node, seen) in &view.nodes {
        if *node == state.primary || seen.busy || now < seen.not_before {
            continue;
        }
        if let Some(how) = way_back(seen, upstream, leader, now, &rules.policy) {
            return Action::Rejoin { node: node.clone(), how };
        }
    }
    Action::Nothing
}

/// How a standby comes back, or `None` when it needs no help. `leader` is the primary's timeline.
fn way_back(seen: &Seen, upstream: &Upstream, leader: u32, now: Duration, policy: &Policy) -> Option<Rejoin> {
    let status = seen.fresh(now, policy)?;
    // Data that was a primary's has WAL of its own, most likely. On a timeline as high as the leader's, it is another
    // history under the same number: pg_rewind would compare nothing and find nothing to do, and streaming would mix the two.
    let parted = if status.timeline() >= leader { Rejoin::Clone } else { Rejoin::Rewind };
    let first = match &status.postmaster {
        Postmaster::Stopping | Postmaster::Rebuilding { .. } => return None,
        // It takes its time; but one whose order has failed would start for ever (the WAL that it needs is gone).
        Postmaster::Starting if seen.failed.is_none() => return None,
        Postmaster::Starting | Postmaster::Running if status.estranged => parted,
        Postmaster::Starting => Rejoin::Follow,
        Postmaster::Running => {
            let waited =
                seen.absent_since.is_some_and(|since| now.saturating_sub(since) >= policy.rejoin_after);
            if seen.streams_from(upstream) {
                return None;
            }
            if status.upstream.as_ref() == Some(upstream) && !waited {
                return None;
            }
            Rejoin::Follow
        }
        Postmaster::Stopped { settled: false, .. } => return None,
        Postmaster::Stopped { .. } => match &status.control {
            None => Rejoin::Clone,
            Some(_) if status.estranged => parted,
            Some(control) if control.standby => Rejoin::Follow,
            Some(control) if control.state == "shut down" && parted != Rejoin::Clone => Rejoin::Follow,
            Some(_) => parted,
        },
    };
    Some(seen.failed.map_or(first, |failed| first.max(failed.next())))
}

#[cfg(test)]
pub(crate) mod tests;
