//! What to do next, as a pure function of what is durable and what was seen.
//!
//! Level-triggered: it compares the state that should be with what is, so that it does not matter which orders were
//! lost and how often we died in between. It never names a target outside the sync set.

use std::collections::BTreeMap;
use std::time::Duration;

use failover_api::{Copies, Mode, Node};

use crate::protocol::{NodeStatus, Postmaster, Rejoin, Sample, Upstream};
use crate::state::State;
use crate::view::{Condition, Doubt, Policy, Seen, View};

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
    /// Stop counting a standby as in sync, durably: what made it one is not so.
    Distrust {
        node: Node,
    },
    /// Lead on a timeline above that of `stray`, which somebody has promoted and which has acknowledged nothing.
    Outrank {
        stray: Node,
        above: u32,
    },
    /// The primary leads on a higher timeline than is written down, after an order whose answer was lost.
    Note {
        above: u32,
    },
    /// Rewrite a node's data only when a person says so, durably.
    Keep {
        node: Node,
        reason: String,
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

impl Action {
    /// One word for logs and metrics.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Resume => "resume",
            Self::FailOver { .. } => "fail_over",
            Self::Lead { .. } => "lead",
            Self::HaltStray { .. } => "halt_stray",
            Self::WaitFor => "wait_for",
            Self::Shrink { .. } => "shrink",
            Self::Widen { .. } => "widen",
            Self::Confirm { .. } => "confirm",
            Self::Wake { .. } => "wake",
            Self::Distrust { .. } => "distrust",
            Self::Outrank { .. } => "outrank",
            Self::Note { .. } => "note",
            Self::Keep { .. } => "keep",
            Self::Rejoin { .. } => "rejoin",
        }
    }
}

/// Fences that may fail before a stopped primary is started where it is.
pub(crate) const FENCES: u32 = 2;

/// The most urgent thing to do. Nodes with an order under way are left alone.
#[must_use]
pub fn decide(state: &State, view: &View, rules: &Rules, now: Duration) -> Action {
    let policy = &rules.policy;
    let doubts = view.doubts(state, now, policy);
    if !doubts.is_empty() {
        return overtaken(state, view, rules, now, &doubts);
    }
    if state.operation.is_some() {
        return Action::Resume;
    }
    let idle = |node: &str| view.node(node).is_some_and(|seen| !seen.busy && now >= seen.not_before);
    for (node, seen) in &view.nodes {
        let writable = seen.fresh(now, policy).is_some_and(NodeStatus::is_writable);
        if *node != state.primary && writable && idle(node) {
            return Action::HaltStray { node: node.clone() };
        }
    }
    let primary = &state.primary;
    let condition = view.condition(primary, now, policy);
    let reason = match &condition {
        Condition::Alive => {
            let replaced = useless(state, view, rules, now)
                .filter(|(since, _)| *since >= policy.stall_after && state.mode == Mode::Auto)
                .and_then(|(_, reason)| {
                    let candidates = view.candidates(&state.sync_set, &state.system_id, now, policy);
                    let target = candidates.into_iter().find(|node| view.full(node, now).is_none())?.clone();
                    Some(Action::FailOver { target, reason })
                });
            return replaced.unwrap_or_else(|| upkeep(state, view, rules, now));
        }
        _ if state.mode == Mode::Paused => return Action::Nothing,
        Condition::Uncertain(_) => return restart_former(state, view, rules, now, false),
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
    let startable = condition == Condition::Gone && !has_no_data(view, primary);
    let candidates = view.candidates(&state.sync_set, &state.system_id, now, policy);
    // One that has no room could not be brought into office, unless there is nobody else.
    let roomy = candidates.iter().find(|node| view.full(node, now).is_none());
    match roomy.or(candidates.first()) {
        // Whoever would follow cannot be detached; what is stopped and whole can be started.
        Some(_) if view.failed_fences >= FENCES && startable && idle(primary) => Action::Lead {
            node: primary.clone(),
            reason: format!("{reason}; no standby can be detached from it"),
        },
        Some(target) => Action::FailOver { target: (*target).clone(), reason },
        // We have only just started: a standby in sync that will be heard in a moment is quicker than crash recovery.
        None if now < policy.agent_silence && state.sync_set.iter().any(|node| view.is_unheard(node)) => {
            Action::Nothing
        }
        // Nobody else has everything. If its machine is there, its own data is what is safe.
        None if startable && idle(primary) => {
            Action::Lead { node: primary.clone(), reason: format!("{reason}; no standby is in sync") }
        }
        None => {
            // Its data does not start: the last order failed a moment ago.
            let failed = view.node(primary).is_some_and(|seen| !seen.busy && now < seen.not_before);
            let primary_is_lost = condition == Condition::Lost || failed || has_no_data(view, primary);
            restart_former(state, view, rules, now, primary_is_lost)
        }
    }
}

/// What may be done although what is written down may be older than the facts: nothing, unless all that speaks for it is a node
/// that somebody has promoted beside a primary that lives, and that has acknowledged nothing. Writers go by the timeline and
/// would not come back: the primary leads again above it.
fn overtaken(state: &State, view: &View, rules: &Rules, now: Duration, doubts: &[Doubt]) -> Action {
    let primary = &state.primary;
    let alive = view.condition(primary, now, &rules.policy) == Condition::Alive;
    let idle = view.node(primary).is_some_and(|seen| !seen.busy && now >= seen.not_before);
    if !alive || !idle || state.mode == Mode::Paused || state.operation.is_some() {
        return Action::Nothing;
    }
    let [Doubt::Timeline { node: stray, timeline, harmless: true, .. }] = doubts else {
        return Action::Nothing;
    };
    let sample = view.node(primary).and_then(|seen| seen.sample(now, &rules.policy));
    match sample.and_then(|sample| distrusted(state, sample)) {
        Some(node) => Action::Distrust { node: node.clone() },
        None => Action::Outrank { stray: stray.clone(), above: *timeline },
    }
}

/// A member of the sync set that commits do not wait for, or not for it alone, whatever was ordered.
fn distrusted<'a>(state: &'a State, sample: &Sample) -> Option<&'a Node> {
    state.sync_set.iter().find(|node| !holds(sample, node))
}

/// Each commit waits for this one, and for nobody else in its name.
pub(crate) fn holds(sample: &Sample, node: &Node) -> bool {
    sample.wait_for.contains(node) && is_alone(sample, node)
}

/// Nobody else streams under its name: who of two has acknowledged a commit, nobody would know.
fn is_alone(sample: &Sample, node: &Node) -> bool {
    let mut bearing = sample.standbys.iter().filter(|standby| standby.node == *node && standby.streaming);
    bearing.next().is_none_or(|standby| standby.is_genuine() && bearing.next().is_none())
}

/// Why a primary that answers does not work, and for how long.
fn useless(state: &State, view: &View, rules: &Rules, now: Duration) -> Option<(Duration, String)> {
    let primary = &state.primary;
    if let Some(full) = view.full(primary, now) {
        return Some((full, format!("the disk of {primary} has been full for {} s", full.as_secs())));
    }
    let stalled = view.stalled(primary, &state.wait_for, now, &rules.policy)?;
    let seconds = stalled.as_secs();
    let reason = format!(
        "{primary} has committed nothing for {seconds} s, and its standbys have all that it has written"
    );
    Some((stalled, reason))
}

/// Its agent has looked and found nothing to start.
fn has_no_data(view: &View, node: &str) -> bool {
    view.node(node).and_then(|seen| seen.status.as_ref()).is_some_and(|status| {
        matches!(status.postmaster, Postmaster::Stopped { settled: true, .. }) && status.control.is_none()
    })
}

/// Without a primary, a stopped standby is started all the same: what it has can then be seen, and promoted when an
/// operator says so. Nothing is rewritten, since there is nothing to copy from. A former primary may be the last one left
/// with data when the primary is `primary_is_lost`: it is woken as a standby of nobody, and acknowledges nothing.
fn restart_former(state: &State, view: &View, rules: &Rules, now: Duration, primary_is_lost: bool) -> Action {
    for (node, seen) in &view.nodes {
        let Some(status) = seen.fresh(now, &rules.policy) else { continue };
        let Some(control) = &status.control else { continue };
        let settled = matches!(status.postmaster, Postmaster::Stopped { settled: true, .. });
        if *node == state.primary || !settled || seen.busy || now < seen.not_before {
            continue;
        }
        if status.foreign.is_some() {
            continue;
        }
        if control.standby && !status.estranged && !state.kept.contains_key(node) {
            return Action::Rejoin { node: node.clone(), how: Rejoin::Follow };
        }
        if primary_is_lost {
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
    if let Some(node) = distrusted(state, sample) {
        return Action::Distrust { node: node.clone() };
    }
    if sample.timeline > state.above + 1 {
        return Action::Note { above: sample.timeline - 1 };
    }
    if sample.wait_for != state.wait_for {
        return Action::WaitFor;
    }
    for node in &state.wait_for {
        let absent = view
            .node(node)
            .is_none_or(|seen| seen.absent_since.is_some() && seen.absent_for >= policy.degrade_after);
        // With two copies wanted, the last one is waited for, however long.
        if absent && (rules.copies == Copies::Available || state.wait_for.len() > 1) {
            return Action::Shrink { node: node.clone() };
        }
    }
    let Some(upstream) = rules.addresses.get(primary) else { return Action::Nothing };
    for standby in sample.standbys.iter().filter(|standby| standby.is_genuine()) {
        let node = &standby.node;
        // It is in sync by its own word too.
        let agrees = view.node(node).is_some_and(|seen| {
            seen.is_heard(now, policy) && seen.streams_from(upstream) && !seen.is_unsteady(now)
        });
        if !agrees || node == primary || !is_alone(sample, node) {
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
        let kept = state.kept.contains_key(node);
        let Some(status) = seen.fresh(now, &rules.policy).filter(|status| status.foreign.is_none()) else {
            continue;
        };
        let led = status.estranged || status.control.as_ref().is_some_and(|control| !control.standby);
        if led && leader > 0 && !kept && !state.discarded.contains(node) {
            let primary = &state.primary;
            // Two histories under one number: somebody has promoted this one, and what it has nobody else may have.
            let reason = (status.timeline() == leader).then(|| {
                format!(
                    "it was promoted by somebody, to timeline {leader}, which is {primary}'s number too: it may have readings that no other node has"
                )
            });
            let touched = status.touched.then(|| {
                format!(
                    "somebody has started it as a primary beside its agent while {primary} led: it may have readings that no other node has"
                )
            });
            if let Some(reason) = reason.or(touched) {
                return Action::Keep { node: node.clone(), reason };
            }
        }
        if kept && !status.empty {
            continue;
        }
        let misled = misled(status, leader, state, rules);
        if let Some(reason) = misled.clone().filter(|_| !kept && !state.discarded.contains(node)) {
            return Action::Keep { node: node.clone(), reason };
        }
        if let Some(how) = way_back(seen, upstream, leader, now, &rules.policy) {
            let how = if misled.is_some() { Rejoin::Clone } else { how };
            if how != Rejoin::Follow && !status.empty && !state.discarded.contains(node) {
                let primary = &state.primary;
                let reason = if status.touched {
                    Some("somebody has used its data beside its agent: it may have readings that no other node has".into())
                } else {
                    status.alone.then(|| {
                        format!(
                            "it led with commits that waited for nobody, and no standby was confirmed since: {primary} may lack some of them"
                        )
                    })
                };
                if let Some(reason) = reason {
                    return Action::Keep { node: node.clone(), reason };
                }
            }
            return Action::Rejoin { node: node.clone(), how };
        }
    }
    Action::Nothing
}

/// Why the WAL of a standby may be of another history under the primary's number: it has reached that number while it was told
/// to follow somebody else. Postgres compares numbers and positions only, and would mix the two.
fn misled(status: &NodeStatus, leader: u32, state: &State, rules: &Rules) -> Option<String> {
    let followed = status.upstream.as_ref()?;
    let (other, _) = rules.addresses.iter().find(|(_, address)| *address == followed)?;
    let primary = &state.primary;
    (leader > 1 && status.timeline() == leader && other != primary && *other != status.node).then(|| {
        format!("it has followed {other} to timeline {leader}, which is {primary}'s number too: it may have another history")
    })
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
        Postmaster::Starting if seen.tries == 0 => return None,
        Postmaster::Starting | Postmaster::Running if status.estranged => parted,
        Postmaster::Starting => Rejoin::Follow,
        Postmaster::Running => {
            let waited =
                seen.absent_since.is_some_and(|since| now.saturating_sub(since) >= policy.rejoin_after);
            if seen.streams_from(upstream) {
                return None;
            }
            // What the last order failed for is cured by something else than waiting.
            if status.upstream.as_ref() == Some(upstream) && !waited && seen.cure.is_none() {
                return None;
            }
            Rejoin::Follow
        }
        Postmaster::Stopped { settled: false, .. } => return None,
        Postmaster::Stopped { .. } => match &status.control {
            None => Rejoin::Clone,
            Some(_) if status.estranged => parted,
            Some(control) if control.standby => Rejoin::Follow,
            // Also one that was stopped in order: its last record may be past the fork. pg_rewind sees when there is nothing to do.
            Some(_) => parted,
        },
    };
    Some(seen.cure.map_or(first, |cure| first.max(cure)))
}

#[cfg(test)]
pub(crate) mod tests;
