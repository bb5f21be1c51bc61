//! Whether a change asked for by a person may go ahead. Pure; changes nothing.

use std::time::Duration;

use failover_api::{Check, Copies, Kind, Mode, Node};
use serde::{Deserialize, Serialize};

use crate::decide::{FENCES, Rules};
use crate::state::State;
use crate::view::{Condition, Doubt, View};

/// What is asked.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Question {
    pub target: Node,
    pub allow_data_loss: bool,
    /// A planned switchover to a standby that lags, or is not confirmed as in sync: its data is checked after the stop.
    pub force: bool,
    pub while_paused: bool,
    pub expected_primary: Option<Node>,
}

/// Why not, with the HTTP status of the contract.
#[derive(Debug, Clone, PartialEq)]
pub struct Denied {
    pub status: u16,
    pub code: &'static str,
    pub message: String,
}

/// All checks, and what will be done or why nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    pub checks: Vec<Check>,
    /// None: not known.
    pub bytes_at_risk: Option<u64>,
    pub outcome: Result<Kind, Denied>,
}

/// Judges a question. Every check is made, so that a person sees all that is wrong; the first failed one decides.
#[must_use]
pub fn judge(question: &Question, state: &State, view: &View, rules: &Rules, now: Duration) -> Verdict {
    let mut bench = Bench::default();
    let policy = &rules.policy;
    let (target, primary) = (&question.target, &state.primary);
    let known: Vec<&str> = rules.addresses.keys().map(String::as_str).collect();
    bench.check("region", rules.addresses.contains_key(target), 400, "unknown_region", || {
        format!("{target} is not one of {}", known.join(", "))
    });
    let doubts = view.doubts(state, now, policy);
    bench.check("state_is_true", doubts.is_empty(), 409, "state_in_doubt", || in_doubt(&doubts));
    bench.check("not_there_already", target != primary, 409, "already_there", || {
        format!("{target} is the primary already")
    });
    bench.check("none_under_way", state.operation.is_none(), 409, "under_way", || {
        "another failover is under way; see GET /status".into()
    });
    let expected = question.expected_primary.as_ref().unwrap_or(primary);
    bench.check("expected_primary", expected == primary, 409, "unexpected_primary", || {
        format!("the primary is {primary}, not {expected}; look again before you decide")
    });
    bench.check("not_paused", state.mode == Mode::Auto || question.while_paused, 409, "paused", || {
        "failover is paused; POST /mode {\"mode\":\"auto\"} to resume, or add while_paused=true".into()
    });
    let seen = view.node(target);
    let candidate = seen.is_some_and(|seen| seen.is_candidate(now, policy, &state.system_id));
    let in_sync = state.sync_set.contains(target);
    let condition = view.condition(primary, now, policy);
    let source = view.node(primary);
    let source_lsn = source.map(|seen| seen.lsn()).unwrap_or_default();
    // What is received and not replayed has to be replayed before the target can lead.
    let position = seen.map(|seen| {
        let replayed = seen.sample(now, policy).and_then(|sample| sample.replayed);
        replayed.map_or(seen.lsn(), |replayed| replayed.min(seen.lsn()))
    });
    let lag = source_lsn.since(position.unwrap_or_default());
    let sync_detail = || {
        format!("{target} is not known to hold every acknowledged commit (sync set: {:?})", state.sync_set)
    };
    let mut bytes_at_risk = Some(0);
    // What the source wrote last is known only while it was seen, and comparable only on the same timeline.
    let known = source.and_then(|seen| seen.status.as_ref()).map_or(0, |status| status.timeline());
    let behind = source_lsn.since(seen.map(|seen| seen.lsn()).unwrap_or_default());
    let same = seen
        .and_then(|seen| seen.status.as_ref())
        .is_some_and(|status| known > 0 && known == status.timeline() && !status.estranged);
    let risk = if in_sync { Some(0) } else { same.then_some(behind) };
    let risk_detail = || match risk {
        Some(bytes) => format!("at least {bytes} bytes are at risk"),
        None => "how much would be lost is not known".to_owned(),
    };
    let not_running = || {
        let hint = match state.mode {
            Mode::Auto => "it is started so that what it has can be seen: ask again in a moment",
            Mode::Paused => {
                "it would be started, but not while paused: POST /mode {\"mode\":\"auto\"}, which promotes nothing that lacks commits"
            }
        };
        format!(
            "{target} is not a running standby of this cluster, or its agent is not heard; if it has data and {primary} \
             stays away, {hint}"
        )
    };
    let stalled =
        view.full(primary, now).is_some() || view.stalled(primary, &state.wait_for, now, policy).is_some();
    let kind = match condition {
        // It takes no part any more; its standby fences it.
        Condition::Alive if stalled && in_sync => {
            bench.check("target_runs", candidate, 412, "target_not_running", not_running);
            Kind::Unplanned
        }
        Condition::Alive => {
            bench.check("target_has_room", view.full(target, now).is_none(), 412, "target_full", || {
                format!("the disk of {target} is full: it could not be brought into office")
            });
            bench.check("target_runs", candidate, 412, "target_not_running", || {
                format!("{target} is not a running standby of this cluster, or its agent is not heard; see GET /status")
            });
            let streams = rules
                .addresses
                .get(primary)
                .zip(seen)
                .is_some_and(|(upstream, seen)| seen.streams_from(upstream));
            bench.check("target_streams", streams, 412, "target_not_streaming", || {
                format!("{target} does not stream from {primary}; wait until it has rejoined")
            });
            bench.check("target_in_sync", in_sync || question.force, 412, "target_not_in_sync", || {
                format!("{}; wait, or add force=true: what it has is checked after the stop", sync_detail())
            });
            bench.check(
                "target_lag",
                lag <= policy.max_lag_bytes || question.force,
                412,
                "target_lagging",
                || {
                    format!(
                        "{target} is {lag} bytes behind in what it has replayed (limit {}); wait, or add force=true",
                        policy.max_lag_bytes
                    )
                },
            );
            let paused =
                seen.and_then(|seen| seen.sample(now, policy)).is_some_and(|sample| sample.replay_paused);
            bench.check("target_replays", !paused || question.force, 412, "target_paused", || {
                format!("replay on {target} is paused; resume it or add force=true")
            });
            Kind::Planned
        }
        Condition::Gone | Condition::Lost => {
            bench.check("target_runs", candidate, 503, "no_safe_candidate", || {
                format!("{primary} is down and {}", not_running())
            });
            // It is in sync by name and cannot be had as such: only a person can decide what then.
            let in_sync = in_sync && !(question.allow_data_loss && view.failed_fences >= FENCES);
            bytes_at_risk = risk;
            bench.check(
                "target_in_sync",
                in_sync || question.allow_data_loss,
                503,
                "no_safe_candidate",
                || {
                    format!(
                        "{}; {}. Bring {primary} back, or add allow_data_loss=true",
                        sync_detail(),
                        risk_detail()
                    )
                },
            );
            if in_sync { Kind::Unplanned } else { Kind::Forced }
        }
        Condition::Standby => {
            bench.check("primary", false, 409, "under_way", || {
                format!("{primary} is being brought into office")
            });
            Kind::Planned
        }
        Condition::Uncertain(reason) => {
            bench.check("target_runs", candidate, 503, "no_safe_candidate", not_running);
            bytes_at_risk = risk;
            bench.check("primary_known", question.allow_data_loss, 412, "primary_uncertain", || {
                format!("{reason}. Find out, or add allow_data_loss=true; {}", risk_detail())
            });
            // In sync, nothing is lost however alive the primary is: the detached standby fences it.
            if in_sync { Kind::Unplanned } else { Kind::Forced }
        }
    };
    Verdict { checks: bench.checks, bytes_at_risk, outcome: bench.denied.map_or(Ok(kind), Err) }
}

/// What a person is told while nothing is done.
#[must_use]
pub fn in_doubt(doubts: &[Doubt]) -> String {
    let facts: Vec<String> = doubts.iter().map(ToString::to_string).collect();
    format!(
        "what this orchestrator has written down is older than the facts, and it does nothing: {}. Find out which region is right, then \
         POST /adopt/{{region}} (first with dry_run=true)",
        facts.join("; ")
    )
}

/// Whom a new primary waits for: other healthy standbys if there are any, else whom `copies` demands.
#[must_use]
pub fn wait_for_after(
    target: &str,
    state: &State,
    view: &View,
    rules: &Rules,
    now: Duration,
) -> std::collections::BTreeSet<Node> {
    let others: std::collections::BTreeSet<Node> = view
        .nodes
        .iter()
        .filter(|(node, seen)| {
            *node != target
                && **node != state.primary
                && seen.is_candidate(now, &rules.policy, &state.system_id)
        })
        .map(|(node, _)| node.clone())
        .collect();
    if others.is_empty() && rules.copies == Copies::TwoCopies {
        [state.primary.clone()].into()
    } else {
        others
    }
}

/// Collects checks; the first that fails decides.
#[derive(Debug, Default)]
pub(super) struct Bench {
    pub(super) checks: Vec<Check>,
    pub(super) denied: Option<Denied>,
}

impl Bench {
    pub(super) fn check(
        &mut self,
        name: &str,
        ok: bool,
        status: u16,
        code: &'static str,
        why: impl FnOnce() -> String,
    ) {
        let detail = if ok { String::new() } else { why() };
        if !ok && self.denied.is_none() {
            self.denied = Some(Denied { status, code, message: detail.clone() });
        }
        self.checks.push(Check { name: name.into(), ok, detail });
    }
}
