//! What the journal holds of one change of the primary. Pure: no clock, nothing waits.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use failover_api::{Kind, Lsn, Node, StepRecord, StepStatus};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::protocol::Upstream;

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
    /// Of a state with this epoch, primary and sync set.
    #[must_use]
    pub fn new(request: Request, epoch: u64, primary: Node, sync_set: BTreeSet<Node>) -> Self {
        Self {
            id: request.id,
            kind: request.kind,
            epoch: epoch + 1,
            source: primary,
            target: request.target,
            actor: request.actor,
            reason: request.reason,
            started_at: request.started_at,
            completed: Step::Journal,
            steps: Vec::new(),
            sync_set_before: sync_set,
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

    /// Notes how a step went that has just ended.
    pub fn record(
        &mut self,
        action: &str,
        ended: Timestamp,
        took: Duration,
        status: StepStatus,
        detail: String,
    ) {
        let number = u32::try_from(self.steps.len()).unwrap_or(u32::MAX).saturating_add(1);
        self.steps.push(StepRecord::new(number, action, ended, took, status, detail));
    }
}
