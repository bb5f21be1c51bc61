//! Taking the world as it is for the new truth, and giving up what was kept, when a person says so. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use failover_api::{Check, Copies, Facts, Lsn, Node};
use serde::{Deserialize, Serialize};

use crate::decide::Rules;
use crate::orchestrator::checks::{Bench, Denied};
use crate::orchestrator::report::role;
use crate::protocol::{NodeStatus, Postmaster};
use crate::state::{Adoption, State};
use crate::view::View;

/// What is asked.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AdoptQuestion {
    pub region: Node,
    /// Another node may have what `region` has not. Its data is kept, but nobody reads it.
    pub allow_data_loss: bool,
    /// The agent of another node is not heard: it may be writable.
    pub while_unheard: bool,
    pub reason: String,
}

/// All checks and facts, and what would be written down or why nothing.
#[derive(Debug, Clone)]
pub struct AdoptVerdict {
    pub checks: Vec<Check>,
    pub facts: Vec<Facts>,
    pub outcome: Result<Adoption, Denied>,
}

/// Judges a question. `state` is none before the first start is through.
#[must_use]
pub fn judge(
    question: &AdoptQuestion,
    state: Option<&State>,
    view: &View,
    rules: &Rules,
    now: Duration,
) -> AdoptVerdict {
    let mut bench = Bench::default();
    let region = &question.region;
    let known: Vec<&str> = rules.addresses.keys().map(String::as_str).collect();
    bench.check("region", rules.addresses.contains_key(region), 400, "unknown_region", || {
        format!("{region} is not one of {}", known.join(", "))
    });
    let doubtful = state.is_none_or(|state| !view.doubts(state, now, &rules.policy).is_empty());
    let idle = state.is_none_or(|state| state.operation.is_none());
    bench.check("none_under_way", idle || doubtful, 409, "under_way", || {
        "a failover is under way; see GET /status".into()
    });
    let status = view.node(region).and_then(|seen| seen.fresh(now, &rules.policy));
    bench.check("heard", status.is_some(), 412, "agent_not_heard", || {
        format!("the agent of {region} is not heard: start it")
    });
    let foreign = status.and_then(|status| status.foreign);
    bench.check("its_agents_own", foreign.is_none(), 412, "foreign_postmaster", || {
        format!(
            "a postmaster (process {}) that its agent has not started runs on the data of {region}: stop it (pg_ctl stop -m fast -W), \
             the agent starts it again",
            foreign.unwrap_or_default()
        )
    });
    let usable = status.is_some_and(is_usable);
    bench.check("usable", usable, 412, "no_usable_data", || {
        format!("{region} has no data that can be started, or it is being rewritten: see GET /status")
    });
    let (own, lsn) = status.map_or((0, Lsn::default()), |status| (status.timeline(), at(status)));
    // A primary has all that its standbys have.
    let follower = status.is_some_and(|status| {
        status.is_standby() || status.control.as_ref().is_some_and(|control| control.standby)
    });
    let mut kept = BTreeMap::new();
    let mut ahead = Vec::new();
    let mut unheard = Vec::new();
    for (node, seen) in view.nodes.iter().filter(|(node, _)| *node != region) {
        let Some(other) = seen.fresh(now, &rules.policy) else {
            unheard.push(node.as_str());
            kept.insert(node.clone(), format!("its agent was not heard when {region} was adopted"));
            continue;
        };
        let follows = rules.addresses.get(region).is_some_and(|upstream| seen.streams_from(upstream));
        if other.empty || follows || other.guarded && other.is_writable() {
            continue;
        }
        let (timeline, position) = (other.timeline(), at(other));
        let led = other.is_writable()
            || other.estranged
            || other.control.as_ref().is_some_and(|control| !control.standby);
        if timeline < own && led {
            let reason = format!(
                "it was a primary on timeline {timeline}, before somebody made {region} one on timeline {own}: what it acknowledged last may be nowhere else"
            );
            kept.insert(node.clone(), reason);
        } else if timeline > own || timeline == own && (position > lsn || led) {
            let reason = format!(
                "it is on timeline {timeline} at {position}, {region} on timeline {own} at {lsn}: it may have readings that {region} has not"
            );
            ahead.push(format!("{node}: {reason}"));
            kept.insert(node.clone(), reason);
        } else if timeline == own && follower && other.is_stopped() {
            let reason = format!(
                "it is stopped, so that nobody knows how far it got: it may have readings that {region}, a standby too, has not"
            );
            kept.insert(node.clone(), reason);
        }
    }
    bench.check(
        "others_heard",
        unheard.is_empty() || question.while_unheard,
        412,
        "others_not_heard",
        || {
            format!(
                "{} cannot be asked and may be writable: start the agent, or add while_unheard=true",
                unheard.join(", ")
            )
        },
    );
    bench.check("none_ahead", ahead.is_empty() || question.allow_data_loss, 412, "others_ahead", || {
        format!(
            "{}. Adopt that one, or add allow_data_loss=true: its data is kept until POST /discard",
            ahead.join("; ")
        )
    });
    let facts = facts(view, rules, now, &kept);
    let statuses: Vec<&NodeStatus> = view.nodes.values().filter_map(|seen| seen.status.as_ref()).collect();
    let others: BTreeSet<Node> = rules.addresses.keys().filter(|node| *node != region).cloned().collect();
    let highest = statuses.iter().filter(|status| status.node != *region).map(|status| status.timeline());
    let above = highest.max().unwrap_or(0);
    let adoption = Adoption {
        primary: region.clone(),
        system_id: status.map(|status| status.system_id.clone()).unwrap_or_default(),
        wait_for: if rules.copies == Copies::TwoCopies { others } else { BTreeSet::new() },
        epoch: statuses.iter().map(|status| status.epoch).max().unwrap_or(0),
        // A standby that follows on the same timeline is no reason to leave it.
        above: if above > own || above == own && !ahead.is_empty() { above } else { own.saturating_sub(1) },
        displaced: statuses
            .iter()
            .map(|status| status.orchestrator.clone())
            .filter(|id| !id.is_empty())
            .collect(),
        kept,
    };
    AdoptVerdict { checks: bench.checks, facts, outcome: bench.denied.map_or(Ok(adoption), Err) }
}

fn facts(view: &View, rules: &Rules, now: Duration, kept: &BTreeMap<Node, String>) -> Vec<Facts> {
    let each = view.nodes.iter().map(|(node, seen)| {
        let fresh = seen.fresh(now, &rules.policy);
        let status = seen.status.as_ref();
        Facts {
            region: node.clone(),
            role: role(fresh),
            heard: fresh.is_some(),
            timeline: status.map_or(0, NodeStatus::timeline),
            lsn: status.map(at).unwrap_or_default(),
            epoch: status.map_or(0, |status| status.epoch),
            orchestrator: status.map(|status| status.orchestrator.clone()).unwrap_or_default(),
            kept: kept.get(node).cloned(),
        }
    });
    each.collect()
}

fn is_usable(status: &NodeStatus) -> bool {
    match status.postmaster {
        Postmaster::Running => status.sample.is_some(),
        Postmaster::Stopped { settled, .. } => settled && status.control.is_some(),
        _ => false,
    }
}

fn at(status: &NodeStatus) -> Lsn {
    let sample = status.sample.as_ref().map(|sample| sample.lsn);
    sample.or(status.control.as_ref().map(|control| control.checkpoint)).unwrap_or_default()
}

/// Whether what was kept of `region` may be given up.
///
/// # Errors
/// Why not.
pub fn may_discard(region: &str, state: &State, rules: &Rules) -> Result<String, Denied> {
    let denied = |status, code, message: String| Err(Denied { status, code, message });
    if !rules.addresses.contains_key(region) {
        let known: Vec<&str> = rules.addresses.keys().map(String::as_str).collect();
        return denied(400, "unknown_region", format!("{region} is not one of {}", known.join(", ")));
    }
    match state.kept.get(region) {
        Some(kept) => Ok(kept.reason.clone()),
        None => {
            denied(409, "not_kept", format!("the data of {region} is not kept: there is nothing to give up"))
        }
    }
}
