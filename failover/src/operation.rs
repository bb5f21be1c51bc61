//! One change of the primary: its steps as data, and how they are carried out.
//!
//! Every completed step is durable before the next begins, but for the fence, which becomes so with the decision. Until
//! [`Step::Decide`] nothing has happened that cannot be undone, and an operation found in the journal there is
//! abandoned; from there on it is always finished, since the target may have been promoted and may have
//! acknowledged. Nothing here waits for the old primary unless it is known to live.

mod steps;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use failover_api::{Kind, Lsn, Node, StepRecord, StepStatus};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use utoipa::ToSchema;

use crate::hands::Hands;
use crate::protocol::Upstream;
use crate::state::State;
use steps::{carry_out, undo};

/// The steps, in the order of [`plan`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// The operation is in the journal.
    Journal,
    /// Checkpoint on the source, so that its stop is short.
    Prepare,
    /// From here on the source cannot acknowledge.
    Fence,
    /// The target is the primary, durably. No way back.
    Decide,
    Promote,
    /// The other standbys follow the new primary.
    Repoint,
    /// A row that carries the epoch is committed.
    Mark,
    Validate,
}

impl Step {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Journal => "journal",
            Self::Prepare => "prepare",
            Self::Fence => "fence",
            Self::Decide => "decide",
            Self::Promote => "promote",
            Self::Repoint => "repoint",
            Self::Mark => "mark",
            Self::Validate => "validate",
        }
    }
}

/// What is done, in this order. When commits will wait for a standby, that one is repointed before the first commit;
/// else the first commit comes first.
#[must_use]
pub fn plan(kind: Kind, waits: bool) -> Vec<Step> {
    let mut steps = vec![Step::Journal];
    if kind == Kind::Planned {
        steps.push(Step::Prepare);
    }
    steps.extend([Step::Fence, Step::Decide, Step::Promote]);
    steps.extend(if waits { [Step::Repoint, Step::Mark] } else { [Step::Mark, Step::Repoint] });
    steps.push(Step::Validate);
    steps
}

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Request {
    pub id: String,
    pub kind: Kind,
    pub target: Node,
    pub actor: String,
    pub reason: String,
    pub started_at: Timestamp,
    /// Whom the new primary waits for.
    pub wait_for: BTreeSet<Node>,
    /// Standbys that can be reached: detached before the decision, repointed after it.
    pub standbys: BTreeSet<Node>,
    pub addresses: BTreeMap<Node, Upstream>,
    /// Timeline and last acknowledged marker of the source, as last seen.
    pub timeline: u32,
    pub marker: u64,
    /// The source's word, on its timeline, of how far its standbys had acknowledged; 0/0 when it is not known.
    pub acknowledged: Lsn,
    /// None: not known.
    pub bytes_at_risk: Option<u64>,
    /// Commits wait for a second copy, even when nobody is there to hold it.
    pub two_copies: bool,
}

/// In the journal while under way, in the history afterwards.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Operation {
    pub id: String,
    pub kind: Kind,
    pub epoch: u64,
    pub source: Node,
    pub target: Node,
    pub actor: String,
    pub reason: String,
    #[schema(value_type = String)]
    pub started_at: Timestamp,
    /// The last step that was completed.
    pub completed: Step,
    pub steps: Vec<StepRecord>,
    pub sync_set_before: BTreeSet<Node>,
    pub wait_for_after: BTreeSet<Node>,
    pub standbys: BTreeSet<Node>,
    /// Standbys that the fence has seen to have no more than the target.
    #[serde(default)]
    pub behind: BTreeSet<Node>,
    pub addresses: BTreeMap<Node, Upstream>,
    pub timeline_before: u32,
    pub timeline_after: u32,
    pub source_lsn: Option<Lsn>,
    pub target_lsn: Option<Lsn>,
    /// Of WAL that the target may lack. None: not known.
    pub bytes_at_risk: Option<u64>,
    #[serde(default)]
    pub acknowledged: Lsn,
    #[serde(default)]
    pub two_copies: bool,
    /// Somebody was to be waited for when it began: the order of the steps goes by it.
    #[serde(default)]
    pub waits: bool,
    pub marker_before: u64,
    pub marker_after: u64,
    /// From the moment the source was known to be down, or was asked to stop, until the first commit on the target.
    pub write_gap_ms: Option<f64>,
}

/// The step that failed, and what was undone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Failure {
    pub step: Step,
    pub error: String,
    pub rolled_back: String,
}

impl Operation {
    #[must_use]
    pub fn new(request: Request, state: &State) -> Self {
        Self {
            id: request.id,
            kind: request.kind,
            epoch: state.epoch + 1,
            source: state.primary.clone(),
            target: request.target,
            actor: request.actor,
            reason: request.reason,
            started_at: request.started_at,
            completed: Step::Journal,
            steps: Vec::new(),
            sync_set_before: state.sync_set.clone(),
            waits: !request.wait_for.is_empty(),
            acknowledged: request.acknowledged,
            two_copies: request.two_copies,
            wait_for_after: request.wait_for,
            standbys: request.standbys,
            behind: BTreeSet::new(),
            addresses: request.addresses,
            timeline_before: request.timeline,
            timeline_after: 0,
            source_lsn: None,
            target_lsn: None,
            bytes_at_risk: request.bytes_at_risk,
            marker_before: request.marker,
            marker_after: 0,
            write_gap_ms: None,
        }
    }

    /// The point of no return lies behind.
    #[must_use]
    pub fn is_decided(&self) -> bool {
        self.completed >= Step::Decide
    }

    fn record(&mut self, action: &str, started: Instant, status: StepStatus, detail: String) {
        let number = u32::try_from(self.steps.len()).unwrap_or(u32::MAX).saturating_add(1);
        self.steps.push(StepRecord::new(number, action, started.elapsed(), status, detail));
    }
}

/// Journals a new operation and carries it out. `since` is when writers began to wait.
///
/// # Errors
/// Only when state cannot be saved: then nothing more may be done.
pub async fn begin<H: Hands>(
    hands: &H,
    state: &mut State,
    request: Request,
    since: Instant,
) -> anyhow::Result<(Operation, Option<Failure>)> {
    let started = Instant::now();
    let mut operation = Operation::new(request, state);
    operation.record(Step::Journal.name(), started, StepStatus::Done, format!("epoch {}", operation.epoch));
    state.epoch = operation.epoch;
    state.operation = Some(operation.clone());
    hands.save(state)?;
    hands.passed(Step::Journal.name());
    carry_on(hands, state, operation, since).await
}

/// What a restart does with an operation found in the journal.
///
/// # Errors
/// As [`begin`].
pub async fn resume<H: Hands>(
    hands: &H,
    state: &mut State,
    operation: Operation,
) -> anyhow::Result<(Operation, Option<Failure>)> {
    if operation.is_decided() {
        return carry_on(hands, state, operation, Instant::now()).await;
    }
    let mut operation = operation;
    let step = operation.completed;
    let rolled_back = undo(hands, state, &mut operation).await?;
    let error = "the orchestrator was restarted before the decision".into();
    Ok((operation, Some(Failure { step, error, rolled_back })))
}

async fn carry_on<H: Hands>(
    hands: &H,
    state: &mut State,
    mut operation: Operation,
    since: Instant,
) -> anyhow::Result<(Operation, Option<Failure>)> {
    let steps = plan(operation.kind, operation.waits);
    let at = steps.iter().position(|step| *step == operation.completed).map_or(0, |at| at + 1);
    let mut since = since;
    for step in steps.into_iter().skip(at) {
        let started = Instant::now();
        if step == Step::Fence && operation.kind == Kind::Planned {
            // Until now the source went on acknowledging.
            since = started;
        }
        match carry_out(hands, state, &mut operation, step).await {
            Ok(detail) => {
                if step == Step::Mark {
                    operation.write_gap_ms = Some(since.elapsed().as_secs_f64() * 1000.0);
                }
                operation.record(step.name(), started, StepStatus::Done, detail);
                operation.completed = step;
                if step == Step::Decide {
                    let above = operation.timeline_before;
                    state.hand_over(&operation.target, operation.wait_for_after.clone(), above);
                    if operation.kind == Kind::Forced {
                        // Everybody else may have more, but for who was seen to have less.
                        let others =
                            operation.addresses.keys().filter(|node| !operation.behind.contains(*node));
                        for node in others.filter(|node| **node != operation.target) {
                            let reason = format!(
                                "{} was made primary by force ({}): {node} may have acknowledged readings that no other node has",
                                operation.target, operation.id
                            );
                            state.keep(node, reason);
                        }
                    }
                }
                if step == Step::Promote {
                    // A promotion that was cut short may have used numbers in between.
                    state.above = state.above.max(operation.timeline_after.saturating_sub(1));
                }
                state.operation = Some(operation.clone());
                // The decision follows at once and is made durable with it; until then both are undone alike.
                if step != Step::Fence {
                    hands.save(state)?;
                }
                hands.passed(step.name());
            }
            Err(error) => {
                if step == Step::Validate && operation.marker_after < operation.marker_before {
                    let reason = format!(
                        "{} has marker {}, and {} had acknowledged {}: what is missing may be in its data",
                        operation.target, operation.marker_after, operation.source, operation.marker_before
                    );
                    state.keep(&operation.source, reason);
                    state.operation = Some(operation.clone());
                    hands.save(state)?;
                }
                operation.record(step.name(), started, StepStatus::Failed, error.clone());
                let rolled_back = if operation.is_decided() {
                    format!(
                        "nothing: {} stays the primary of record and is brought into office",
                        operation.target
                    )
                } else {
                    undo(hands, state, &mut operation).await?
                };
                return Ok((operation, Some(Failure { step, error, rolled_back })));
            }
        }
    }
    Ok((operation, None))
}
